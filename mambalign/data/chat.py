"""Conversations to tokens: which text a template writes, which of its tokens are trained, where a turn ends.

A template marks what the assistant says with `{% generation %} ... {% endgeneration %}`. The marks must hold the
content *and* the end-of-turn token (else the model never learns to stop), not the role header.

Text is cut where a trained region begins and ends, and every piece is tokenised alone. That is what generation does
(the prompt is tokenised, then tokens are appended), it makes the mask exact, and it makes every prompt a token prefix
of its conversation. Tokenising the whole text and mapping characters back to tokens gives the same ids for ordinary
content, but loses the mask where content begins with a space, since byte-level tokenizers trim their offsets.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from jinja2.exceptions import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from mambalign.recipe import UserError, nearest

logger = logging.getLogger(__name__)

Message = Mapping[str, str]
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}

# The text of "zephyr" is the alignment handbook's. Tags on lines of their own vanish when rendered (trim_blocks and
# lstrip_blocks are on), the newline after an expression stays.
_ZEPHYR = """\
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|assistant|>\\n' }}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}
{%- elif message['role'] in ['system', 'user'] %}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + eos_token + '\\n' }}
{%- else %}
{{- raise_exception("role '" + message['role'] + "' is not one of system, user, assistant") }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>\\n' }}
{%- endif %}
"""

_CHATML = """\
{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['role'] == 'assistant' %}
{%- generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{%- else %}
{{- message['content'] + '<|im_end|>' }}
{%- endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""

TEMPLATES: dict[str, str] = {"zephyr": _ZEPHYR, "chatml": _CHATML}

_CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")
_PAD_NAMES = ("<|padding|>", "<|pad|>", "<pad>", "<PAD>", "[PAD]")
_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PROBE = [
    {"role": "user", "content": "What is one and one?"},
    {"role": "assistant", "content": "One and one is two."},
    {"role": "user", "content": "And who counts?"},
    {"role": "assistant", "content": "Everybody does."},
]
_MARKED_EXAMPLE = "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"


# ---------------------------------------------------------------------------------------------- setting a template


def resolve_template(name_or_jinja_or_path: str) -> str:
    """The Jinja text meant: a name in `TEMPLATES`, Jinja itself, or a file that holds it.

    Raises:
        UserError: neither a known name, nor Jinja, nor an existing text file.
    """
    given = str(name_or_jinja_or_path)
    if given in TEMPLATES:
        return TEMPLATES[given]
    if "{%" in given or "{{" in given:
        return given
    with contextlib.suppress(OSError, ValueError):  # no such file, no name that a file can have, no text in it
        return Path(given).expanduser().read_text(encoding="utf-8")
    raise UserError(
        f"chat_template: {given!r} is neither one of {', '.join(sorted(TEMPLATES))}, nor Jinja text, nor a text file"
        + nearest(given, TEMPLATES)
    )


def apply_template(tokenizer: Any, name_or_jinja_or_path: str | None) -> None:
    """Give the tokenizer a chat template, the special tokens it needs, and a padding token if it has none.

    None keeps the tokenizer's own template. ChatML's `<|im_start|>` and `<|im_end|>` become special tokens if they are
    not in the vocabulary, and `<|im_end|>` becomes the end-of-sequence token, so that generation stops there; the model
    must then be grown with `models.checkpoint.add_tokens`. The padding token is the vocabulary's own if it has one
    (GPT-NeoX: `<|padding|>`), else the end-of-sequence token; training never uses it.

    Raises:
        UserError: no template given and the tokenizer has none; unknown name; no end-of-sequence token.
    """
    if name_or_jinja_or_path is None:
        if not tokenizer.chat_template:
            raise UserError(
                "the tokenizer has no chat template; set chat_template to "
                f"{' or '.join(sorted(TEMPLATES))}, to Jinja text, or to a file that holds it"
            )
    else:
        tokenizer.chat_template = _marked_twin(tokenizer, resolve_template(name_or_jinja_or_path))
    if tokenizer.eos_token is None and tokenizer.chat_template != _CHATML:
        raise UserError("the tokenizer has no end-of-sequence token (eos_token); a turn could not be ended")
    if tokenizer.chat_template == _CHATML:
        vocabulary = tokenizer.get_vocab()
        known = set(tokenizer.all_special_tokens)
        missing = [token for token in _CHATML_TOKENS if token not in known or token not in vocabulary]
        if missing:
            tokenizer.add_tokens(list(missing), special_tokens=True)
        tokenizer.eos_token = "<|im_end|>"
    set_pad_token(tokenizer)


def template_text(tokenizer: Any) -> str:
    """The chat template in force, or an empty string."""
    return str(tokenizer.get_chat_template()) if tokenizer.chat_template else ""


def _marked_twin(tokenizer: Any, template: str) -> str:
    """The built-in template that renders the same text as `template`, where that one says nothing of what is trained.

    The handbook's recipes of 2024 write the zephyr format out in Jinja, without generation marks.
    """
    if _MARK.search(template):
        return template
    system = {"role": "system", "content": " Be brief. "}
    for name, marked in TEMPLATES.items():
        if all(_same_text(tokenizer, template, marked, turns) for turns in ([system, *_PROBE], _PROBE[:1])):
            logger.info("chat_template: renders as the built-in %r, which also marks what is trained; using that", name)
            return marked
    return template


def _same_text(tokenizer: Any, one: str, other: str, turns: list[dict[str, str]]) -> bool:
    asks = turns[-1]["role"] == "user"
    try:
        texts = [_render(tokenizer, template, turns, add_generation_prompt=asks).text for template in (one, other)]
    except TemplateError:
        return False  # `check_template` says what is wrong with it
    return texts[0] == texts[1]


def set_pad_token(tokenizer: Any) -> None:
    """Give the tokenizer a padding token if it has none: one its vocabulary already holds, else the end-of-sequence."""
    if tokenizer.pad_token is None:
        vocabulary = tokenizer.get_vocab()
        tokenizer.pad_token = next((name for name in _PAD_NAMES if name in vocabulary), tokenizer.eos_token)


# ------------------------------------------------------------------------------------------- rendering and encoding


@dataclass(frozen=True)
class Rendered:
    """The text of a conversation and the character ranges `[start, end)` of it that are trained."""

    text: str
    regions: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Encoded:
    """Token ids, their mask (1 = trained), and the token ranges `[start, end)` of the trained regions."""

    ids: list[int]
    mask: list[int]
    regions: tuple[tuple[int, int], ...]


def render(tokenizer: Any, messages: Sequence[Message], *, add_generation_prompt: bool = False) -> Rendered:
    """Render a conversation with the tokenizer's chat template.

    Raises:
        jinja2.exceptions.TemplateError: the template refuses the conversation, or fails on it.
    """
    return _render(tokenizer, tokenizer.get_chat_template(), messages, add_generation_prompt=add_generation_prompt)


def _render(tokenizer: Any, template: str, messages: Sequence[Message], *, add_generation_prompt: bool) -> Rendered:
    marked = bool(_MARK.search(template))
    try:
        texts, regions = render_jinja_template(
            conversations=[list(messages)],
            chat_template=template,
            return_assistant_tokens_mask=marked,
            add_generation_prompt=add_generation_prompt,
            **tokenizer.special_tokens_map,
        )
    except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
        # A template is a program.
        raise TemplateError(f"{type(error).__name__}: {error}") from error
    return Rendered(texts[0], tuple((start, end) for start, end in regions[0] if end > start) if marked else ())


def encode_rendered(tokenizer: Any, rendered: Sequence[Rendered]) -> list[Encoded]:
    """Tokenise rendered conversations; the template has written all special tokens, so none are added."""
    pieces: list[str] = []
    trained: list[bool] = []
    counts: list[int] = []
    for item in rendered:
        cuts = [0, *(cut for region in item.regions for cut in region), len(item.text)]
        parts = [item.text[a:b] for a, b in pairwise(cuts)]
        pieces += parts
        trained += [bool(k % 2) for k in range(len(parts))]
        counts.append(len(parts))
    if not _pieces_compose(tokenizer):
        return [_encode_whole(tokenizer, item) for item in rendered]
    ids = tokenizer(pieces, add_special_tokens=False)["input_ids"] if pieces else []
    encoded: list[Encoded] = []
    at = 0
    for count in counts:
        tokens: list[int] = []
        mask: list[int] = []
        regions: list[tuple[int, int]] = []
        for piece, is_trained in zip(ids[at : at + count], trained[at : at + count], strict=True):
            if is_trained:
                regions.append((len(tokens), len(tokens) + len(piece)))
            tokens += piece
            mask += [int(is_trained)] * len(piece)
        encoded.append(Encoded(tokens, mask, tuple(regions)))
        at += count
    return encoded


def _pieces_compose(tokenizer: Any) -> bool:
    """Whether tokenising piece by piece is sound: false for tokenizers that put a space before every text they see."""
    whole, left, right = tokenizer(["is:\nTwo", "is:\n", "Two"], add_special_tokens=False)["input_ids"]
    return bool(whole == left + right)


def _encode_whole(tokenizer: Any, item: Rendered) -> Encoded:
    """For tokenizers whose pieces do not compose: a region begins where the tokens of the text before it end."""
    ids = tokenizer(item.text, add_special_tokens=False)["input_ids"]
    mask = [0] * len(ids)
    regions = []
    for region in item.regions:
        before = tokenizer([item.text[:cut] for cut in region], add_special_tokens=False)["input_ids"]
        start, end = (common_prefix(ids, part) for part in before)
        mask[start:end] = [1] * (end - start)
        regions.append((start, end))
    return Encoded(ids, mask, tuple(regions))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of leading tokens that both have in common."""
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


def encode_messages(tokenizer: Any, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Token ids of a conversation and their loss mask: 1 for the assistant's content and its end-of-turn token."""
    encoded = encode_rendered(tokenizer, [render(tokenizer, messages)])[0]
    return encoded.ids, encoded.mask


def encode_prompt(tokenizer: Any, messages: Sequence[Message]) -> list[int]:
    """Token ids of the messages and the header after which the assistant speaks: what generation starts from."""
    return encode_rendered(tokenizer, [render(tokenizer, messages, add_generation_prompt=True)])[0].ids


def control_text(tokenizer: Any) -> re.Pattern[str]:
    """Matches what template or tokenizer would take for control in a message: special tokens and role headers.

    Such text is tokenised as it stands, as everywhere else, so a document that quotes `<|endoftext|>` puts a real
    end-of-text into the row; the data report counts these rows.
    """
    names = set(tokenizer.all_special_tokens) | set(re.findall(r"<\|\w+\|>", template_text(tokenizer)))
    if tokenizer.chat_template == _ZEPHYR:
        names |= {"<|user|>", "<|system|>"}
    return re.compile("|".join(re.escape(name) for name in sorted(names, key=len, reverse=True)) or r"(?!)")


def template_roles(tokenizer: Any) -> frozenset[str]:
    """Roles a conversation may use: system, user, assistant, and `tool` if the template speaks of it."""
    extra = {"tool"} & set(re.findall(r"['\"](\w+)['\"]", template_text(tokenizer)))
    return frozenset({"system", "user", "assistant"} | extra)


# --------------------------------------------------------------------------------------------- checking a template


def check_template(tokenizer: Any) -> None:
    """Refuse a template that would train the wrong tokens, by rendering a conversation of two assistant turns.

    Raises:
        UserError: there is no template; it has no generation marks; the marks do not hold exactly one assistant turn
            each; the end-of-turn token is not among the trained tokens; a prompt with `add_generation_prompt` is not a
            prefix, in text and in tokens, of the whole conversation. The message says how to mend it.
    """
    apply_template(tokenizer, None)
    try:
        rendered = render(tokenizer, _PROBE)
        prompts = {turn: render(tokenizer, _PROBE[:turn], add_generation_prompt=True) for turn in (1, 3)}
    except TemplateError as error:
        raise UserError(f"the chat template fails on a plain conversation of user and assistant: {error}") from error
    if not _MARK.search(tokenizer.get_chat_template()):
        raise UserError(
            "the chat template has no {% generation %} marks, so nothing tells the assistant's tokens from the others; "
            + _mend_missing_marks(tokenizer, rendered.text)
        )
    _check_regions(rendered)
    for turn, prompt in prompts.items():
        _check_prefix(tokenizer, rendered, prompt, turn)
    end_of_turn_id(tokenizer)


def _mend_missing_marks(tokenizer: Any, text: str) -> str:
    for name, template in TEMPLATES.items():
        if _render(tokenizer, template, _PROBE, add_generation_prompt=False).text.strip() == text.strip():
            return f"chat_template: {name} renders the same text and has the marks"
    return f"write the assistant's turn as {_MARKED_EXAMPLE}, or set chat_template to {' or '.join(sorted(TEMPLATES))}"


def _check_regions(rendered: Rendered) -> None:
    contents = [message["content"] for message in _PROBE if message["role"] == "assistant"]
    marked = [rendered.text[start:end] for start, end in rendered.regions]
    if len(marked) != len(contents) or not all(c in m for c, m in zip(contents, marked, strict=True)):
        raise UserError(
            "the chat template's {% generation %} marks must hold each assistant turn's content once; in a "
            f"conversation with the answers {contents} they hold {marked}; write the turn as {_MARKED_EXAMPLE}"
        )
    if any(message["content"] in text for message in _PROBE[::2] for text in marked):
        raise UserError(f"the chat template's {{% generation %}} marks hold what the user says: {marked}")


def _tail(rendered: Rendered, turn: int) -> str:
    """What the marks of the assistant's turn hold after its content."""
    start, end = rendered.regions[turn // 2]
    content = _PROBE[turn]["content"]
    return rendered.text[start:end].rpartition(content)[2]


def end_of_turn_id(tokenizer: Any) -> int:
    """The token that ends an assistant turn: the first special token that the template trains after the content.

    It is the tokenizer's eos with "zephyr" and `<|im_end|>` with "chatml"; generation must stop there.

    Raises:
        UserError: the template trains no such token.
    """
    rendered = render(tokenizer, _PROBE)
    special = set(tokenizer.all_special_ids) | {i for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    ends = []
    for turn in (1, 3):
        ids = tokenizer(_tail(rendered, turn), add_special_tokens=False)["input_ids"]
        ends.append(next((token for token in ids if token in special), None))
    if ends[-1] is None or ends[0] is None:
        turn = 3 if ends[-1] is None else 1
        after = rendered.text[rendered.regions[turn // 2][1] :][:40]
        raise UserError(
            f"the chat template never trains the token that ends a turn: after the answer its {{% generation %}} marks "
            f"hold {_tail(rendered, turn)!r} and then comes {after!r}, so the model would not learn to stop; put the "
            f"end-of-turn token (a special token of this tokenizer, such as {tokenizer.eos_token!r}) before "
            "{% endgeneration %}"
        )
    return int(ends[-1])


def _check_prefix(tokenizer: Any, rendered: Rendered, prompt: Rendered, turn: int) -> None:
    start = rendered.regions[turn // 2][0]
    if not rendered.text.startswith(prompt.text):
        raise UserError(
            f"the chat template renders the beginning of a conversation differently from the conversation: with "
            f"add_generation_prompt the first {turn} message(s) end in {prompt.text[-60:]!r}, but the whole "
            f"conversation has {rendered.text[max(0, len(prompt.text) - 60) : len(prompt.text)]!r} there; prompts "
            "must be prefixes"
        )
    if len(prompt.text) != start and turn == 1:
        what = "the role header is outside the prompt" if len(prompt.text) < start else "the role header is trained"
        between = rendered.text[min(start, len(prompt.text)) : max(start, len(prompt.text))]
        logger.warning("chat template: %s: %r lies between the prompt and the answer", what, between)
        if len(prompt.text) < start:
            raise UserError(
                f"the chat template ignores add_generation_prompt: the prompt lacks {between!r}, which precedes the "
                "answer"
            )
    whole, part = encode_rendered(tokenizer, [rendered, prompt])
    if whole.ids[: len(part.ids)] != part.ids:
        raise UserError(
            f"with this chat template and tokenizer the tokens of a prompt, which ends in {prompt.text[-20:]!r}, are "
            "not a prefix of the tokens of its conversation; let the prompt end in a newline or in a special token"
        )
