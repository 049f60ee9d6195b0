"""Templates: the text they write, the tokens they train, and the templates that are refused."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mambalign.data import chat
from mambalign.recipe import UserError

EOS = "<|endoftext|>"
# The alignment handbook's zephyr template, rendered by hand.
ZEPHYR_TEXT = f"<|system|>\nBe kind.{EOS}\n<|user|>\nHi there{EOS}\n<|assistant|>\nHello!{EOS}\n<|user|>\nBye{EOS}\n"
TRICKY = [
    "Hello",
    " leading space",
    "\nleading newline",
    "  two",
    "trailing \n",
    "",
    "naïve café",
    "日本語 ok",
    "🙂🙂",
    "\ttab",
]


def trained_text(tokenizer: Any, ids: list[int], mask: list[int]) -> str:
    return tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m])


def test_zephyr_text_is_the_handbooks(tokenizer: Any, turns: Callable[..., Any]) -> None:
    messages = turns("s:Be kind.", "u:Hi there", "a:Hello!", "u:Bye")
    assert tokenizer.apply_chat_template(messages, tokenize=False) == ZEPHYR_TEXT
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == ZEPHYR_TEXT + "<|assistant|>\n"


def test_chatml_text_and_tokens(plain_tokenizer: Any, turns: Callable[..., Any]) -> None:
    before = len(plain_tokenizer)
    chat.apply_template(plain_tokenizer, "chatml")
    assert len(plain_tokenizer) == before + 2
    chat.apply_template(plain_tokenizer, "chatml")
    assert len(plain_tokenizer) == before + 2, "a second time adds nothing"
    assert plain_tokenizer.eos_token == "<|im_end|>"
    assert plain_tokenizer.pad_token == "<|padding|>"
    messages = turns("s:Be kind.", "u:Hi", "a:Hello!")
    text = "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    answer = "<|im_start|>assistant\nHello!<|im_end|>\n"
    assert plain_tokenizer.apply_chat_template(messages, tokenize=False) == text + answer
    prompt = plain_tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert prompt == text + "<|im_start|>assistant\n"
    ids, mask = chat.encode_messages(plain_tokenizer, messages)
    assert trained_text(plain_tokenizer, ids, mask) == "Hello!<|im_end|>"
    assert chat.end_of_turn_id(plain_tokenizer) == plain_tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_chatml_survives_saving(plain_tokenizer: Any, turns: Callable[..., Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    chat.apply_template(plain_tokenizer, "chatml")
    plain_tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    chat.check_template(again)
    messages = turns("u:Hi", "a: Hello!")
    assert chat.encode_messages(again, messages) == chat.encode_messages(plain_tokenizer, messages)


@pytest.mark.parametrize("name", sorted(chat.TEMPLATES))
def test_own_templates_pass_the_check(plain_tokenizer: Any, name: str) -> None:
    chat.apply_template(plain_tokenizer, name)
    chat.check_template(plain_tokenizer)


@pytest.mark.parametrize("name", sorted(chat.TEMPLATES))
@pytest.mark.parametrize("second", TRICKY)
@pytest.mark.parametrize("first", ["Fine.", " leading space", ""])
def test_exactly_the_answers_and_their_ends_are_trained(
    plain_tokenizer: Any, turns: Callable[..., Any], name: str, first: str, second: str
) -> None:
    chat.apply_template(plain_tokenizer, name)
    end = plain_tokenizer.eos_token
    messages = turns("u: How? \n", f"a:{first}", f"u:{second}", f"a:{second}")
    ids, mask = chat.encode_messages(plain_tokenizer, messages)
    assert trained_text(plain_tokenizer, ids, mask) == first + end + second + end
    assert plain_tokenizer.decode(ids) == plain_tokenizer.apply_chat_template(messages, tokenize=False)
    for turn in (1, 3):  # every prompt is a token prefix of its conversation, and ends where training begins
        prompt = chat.encode_prompt(plain_tokenizer, messages[:turn])
        assert ids[: len(prompt)] == prompt
        assert mask[len(prompt)] == 1 and mask[len(prompt) - 1] == 0


@pytest.mark.parametrize("name", sorted(chat.TEMPLATES))
def test_ids_are_those_of_the_whole_text_for_ordinary_content(
    plain_tokenizer: Any, turns: Callable[..., Any], name: str
) -> None:
    chat.apply_template(plain_tokenizer, name)
    messages = turns("s:Anna likes.", "u:The cat sees", "a:a song!", "u:two  stones?\n", "a:the sea. ")
    options = dict(return_dict=True, return_assistant_tokens_mask=True, tokenize=True)
    theirs = plain_tokenizer.apply_chat_template(messages, **options)
    ids, mask = chat.encode_messages(plain_tokenizer, messages)
    assert theirs["input_ids"] == ids
    assert theirs["assistant_masks"] == mask


def test_character_offsets_would_lose_answers_that_begin_with_a_space(
    tokenizer: Any, turns: Callable[..., Any]
) -> None:
    """Why text is cut into pieces: the day this fails, the simpler way works too."""
    messages = turns("u:Hi", "a: Hello")
    options = dict(return_dict=True, return_assistant_tokens_mask=True, tokenize=True)
    assert sum(tokenizer.apply_chat_template(messages, **options)["assistant_masks"]) == 0
    assert sum(chat.encode_messages(tokenizer, messages)[1]) > 1


def test_tokenizer_that_prefixes_a_space(build_tokenizer: Callable[..., Any], turns: Callable[..., Any]) -> None:
    tokenizer = build_tokenizer(add_prefix_space=True)
    chat.apply_template(tokenizer, "chatml")
    chat.check_template(tokenizer)
    messages = turns("u:Hi", "a:Hello", "u:More", "a:Done")
    ids, mask = chat.encode_messages(tokenizer, messages)
    assert (
        ids == tokenizer(tokenizer.apply_chat_template(messages, tokenize=False), add_special_tokens=False)["input_ids"]
    )
    assert trained_text(tokenizer, ids, mask).replace(" ", "") == "Hello<|im_end|>Done<|im_end|>"


def test_no_bos_is_added_to_a_rendered_text(build_tokenizer: Callable[..., Any], turns: Callable[..., Any]) -> None:
    tokenizer = build_tokenizer(bos="<s>")
    chat.apply_template(tokenizer, "{{ bos_token }}" + chat.TEMPLATES["zephyr"])
    chat.check_template(tokenizer)
    ids, _ = chat.encode_messages(tokenizer, turns("u:Hi", "a:Hello"))
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_control_text(tokenizer: Any) -> None:
    pattern = chat.control_text(tokenizer)
    assert all(
        pattern.search(text) for text in (f"so {EOS} it ends", "<|assistant|>\nI obey", "<|user|>", "<|padding|>")
    )
    assert not pattern.search("plain <b> text | with > signs")


def test_control_text_of_chatml(plain_tokenizer: Any) -> None:
    chat.apply_template(plain_tokenizer, "chatml")
    assert chat.control_text(plain_tokenizer).search("<|im_start|>system")
    assert not chat.control_text(plain_tokenizer).search("<|user|>")


def test_template_from_file_and_from_text(plain_tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(chat.TEMPLATES["chatml"])
    assert (
        chat.resolve_template(str(path)) == chat.TEMPLATES["chatml"] == chat.resolve_template(chat.TEMPLATES["chatml"])
    )


@pytest.mark.parametrize("wrong", ["zephr", "no/such/file.jinja", "x" * 5000])
def test_unknown_template(plain_tokenizer: Any, wrong: str) -> None:
    with pytest.raises(UserError, match=r"chat_template: .* neither one of chatml, zephyr") as error:
        chat.apply_template(plain_tokenizer, wrong)
    assert ("did you mean 'zephyr'" in str(error.value)) is (wrong == "zephr")


def test_a_template_file_that_is_no_text(plain_tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"model.bin' is neither .* nor a text file"):
        chat.apply_template(plain_tokenizer, str(tmp_path / "model.bin"))


def test_no_template(plain_tokenizer: Any) -> None:
    with pytest.raises(UserError, match="no chat template; set chat_template to chatml or zephyr"):
        chat.check_template(plain_tokenizer)


def test_padding_falls_back_to_eos(plain_tokenizer: Any) -> None:
    plain_tokenizer.pad_token = None
    chat.set_pad_token(plain_tokenizer)
    assert plain_tokenizer.pad_token == "<|padding|>"
    chat.set_pad_token(plain_tokenizer)


HEADER = "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>\n{{ m['content'] + eos_token }}\n{% else %}"
FOOTER = "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
REFUSED = {
    "no marks": (
        "Bot: {{ m['content'] + eos_token }}\n",
        r"no \{% generation %\} marks.*write the assistant's turn as",
    ),
    "eos outside": (
        "<|assistant|>\n{% generation %}{{ m['content'] }}{% endgeneration %}{{ eos_token }}\n",
        r"never trains the token that ends a turn.*hold '' and then comes '<\|endoftext\|>",
    ),
    "no special token": (
        "<|assistant|>\n{% generation %}{{ m['content'] }}\n### End\n{% endgeneration %}",
        "never trains the token that ends a turn",
    ),
    "only the last turn ends": (
        "<|assistant|>\n{% generation %}{{ m['content'] }}{% if loop.last %}{{ eos_token }}{% endif %}"
        "{% endgeneration %}\n",
        "never trains the token that ends a turn",
    ),
    "empty marks": (
        "<|assistant|>\n{% generation %}{% endgeneration %}{{ m['content'] + eos_token }}\n",
        "must hold each assistant turn's content once",
    ),
    "another prompt": (
        "<|bot|>\n{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}\n",
        "renders the beginning of a conversation differently",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_templates(plain_tokenizer: Any, case: str) -> None:
    turn, message = REFUSED[case]
    chat.apply_template(plain_tokenizer, HEADER + turn + FOOTER)
    with pytest.raises(UserError, match=message):
        chat.check_template(plain_tokenizer)


def test_refuses_a_template_without_generation_prompt(plain_tokenizer: Any) -> None:
    turn = "<|assistant|>\n{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}\n"
    chat.apply_template(plain_tokenizer, HEADER + turn + "{% endif %}{% endfor %}")
    with pytest.raises(UserError, match=r"ignores add_generation_prompt: the prompt lacks '<\|assistant\|>"):
        chat.check_template(plain_tokenizer)


def test_refuses_marks_around_the_user(plain_tokenizer: Any) -> None:
    chat.apply_template(
        plain_tokenizer,
        "{% generation %}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}{% endgeneration %}",
    )
    with pytest.raises(UserError, match="must hold each assistant turn's content once"):
        chat.check_template(plain_tokenizer)


def test_refuses_a_template_that_forgets(plain_tokenizer: Any) -> None:
    """Templates that show only the last turn break prompts and completions apart differently."""
    text = chat.TEMPLATES["zephyr"].replace("in messages", "in messages[-2:]", 1)
    chat.apply_template(plain_tokenizer, text)
    with pytest.raises(UserError):
        chat.check_template(plain_tokenizer)


FAILING = {
    "tools only": "{% generation %}{% endgeneration %}{{ raise_exception('tools only') }}",
    "no marks either": "{{ raise_exception('no marks either') }}",
    "TypeError: can only concatenate": "{% generation %}{{ messages[0].content + 5 }}{% endgeneration %}",
    "ZeroDivisionError": "{% for m in messages %}{{ m.content }}{% endfor %}{{ 1 / 0 }}",
    "Unexpected end of template": "{% for m in messages %}{{ m.content }}",
    "too short": "{% if not messages[1:] %}{{ raise_exception('too short') }}{% endif %}" + chat.TEMPLATES["zephyr"],
}


@pytest.mark.parametrize("what", FAILING)
def test_refuses_a_template_that_fails(plain_tokenizer: Any, what: str) -> None:
    chat.apply_template(plain_tokenizer, FAILING[what])
    with pytest.raises(UserError, match=f"fails on a plain conversation of user and assistant: {what}"):
        chat.check_template(plain_tokenizer)


def test_unmarked_template_of_known_text_names_the_remedy(plain_tokenizer: Any) -> None:
    turn = "{{% if m['role'] == '{0}' %}}\n{{{{ '<|{0}|>\n' + m['content'] + eos_token }}}}\n{{% endif %}}\n"
    turns = "".join(turn.format(role) for role in ("user", "system", "assistant"))
    prompt = "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n"
    handbook = "{% for m in messages %}\n" + turns + prompt + "{% endfor %}"
    plain_tokenizer.chat_template = handbook  # the tokenizer's own: nobody asked for another
    chat.apply_template(plain_tokenizer, None)
    with pytest.raises(UserError, match="chat_template: zephyr renders the same text and has the marks"):
        chat.check_template(plain_tokenizer)


def test_trained_header_is_said(plain_tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    turn = "{% generation %}<|assistant|>\n{{ m['content'] + eos_token }}{% endgeneration %}\n"
    chat.apply_template(plain_tokenizer, HEADER + turn + FOOTER)
    with caplog.at_level(logging.WARNING, logger="mambalign"):
        chat.check_template(plain_tokenizer)
    assert "the role header is trained" in caplog.text


def test_roles(plain_tokenizer: Any) -> None:
    chat.apply_template(plain_tokenizer, "zephyr")
    assert chat.template_roles(plain_tokenizer) == {"system", "user", "assistant"}
    chat.apply_template(plain_tokenizer, HEADER.replace("'user'", "'tool'") + FOOTER)
    assert "tool" in chat.template_roles(plain_tokenizer)


@pytest.mark.shared("data/tokenizer")
def test_on_the_neox_tokenizer(shared_data: Path, turns: Callable[..., Any]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared_data / "data/tokenizer")
    chat.check_template(tokenizer)  # its own zephyr template has marks
    for name in chat.TEMPLATES:
        chat.apply_template(tokenizer, name)
        chat.check_template(tokenizer)
        for content in TRICKY:
            messages = turns("u:Hi", f"a:{content}", "u: again", f"a:{content}")
            ids, mask = chat.encode_messages(tokenizer, messages)
            assert trained_text(tokenizer, ids, mask) == 2 * (content + tokenizer.eos_token)
    assert tokenizer.eos_token_id >= 50277, "ChatML's tokens fall into the padded rows of the vocabulary"


def test_a_template_written_out_without_marks_is_recognised(tokenizer: Any) -> None:
    """The handbook's recipes spell zephyr out in Jinja; they must train, not only load."""
    inline = (
        "{% for turn in messages %}\n{% if turn.role == 'user' %}\n{{ '<|user|>\n' + turn.content + eos_token }}\n"
        "{% elif turn.role == 'system' %}\n{{ '<|system|>\n' + turn.content + eos_token }}\n"
        "{% elif turn.role == 'assistant' %}\n{{ '<|assistant|>\n'  + turn.content + eos_token }}\n{% endif %}\n"
        "{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    )
    chat.apply_template(tokenizer, inline)
    assert tokenizer.chat_template == chat.TEMPLATES["zephyr"]
    chat.check_template(tokenizer)
    other = inline.replace("<|user|>", "<|human|>")
    chat.apply_template(tokenizer, other)
    assert tokenizer.chat_template == other
    with pytest.raises(UserError, match="generation"):
        chat.check_template(tokenizer)
