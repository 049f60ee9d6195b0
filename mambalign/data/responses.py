"""Answers to tokens, as a reward model saw them in training: rows of a prompt with any number of responses.

Every response is read on its own, as the whole conversation that it ends; what the responses of a row have in common at
the beginning is found in their tokens, and computed once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any

from mambalign.data import chat
from mambalign.data.preferences import is_whole
from mambalign.data.rows import ChatRules, PlainText, Skip, continued, render_or_skip
from mambalign.data.sources import plain_message
from mambalign.data.tokenizing import TokenizedData
from mambalign.recipe import UserError

if TYPE_CHECKING:
    from mambalign.recipe import Recipe


@dataclass(frozen=True)
class RewardInputs:
    """What a reward model must know of its training data to read others the same way; kept in its config.json.

    plain_text: it was trained on text outside any chat template. system_prompt: put before conversations without one.
    """

    plain_text: bool = False
    system_prompt: str | None = None

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: Any, data: TokenizedData) -> RewardInputs:
        return cls(data.plain_text, ChatRules.of(recipe, tokenizer).system_prompt)

    @classmethod
    def from_config(cls, config: Any) -> RewardInputs:
        """Of a model's config; the defaults, where another trainer made the model."""
        return cls(**(getattr(config, "reward_inputs", None) or {}))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Responses:
    """Token ids of a row's responses: `prompt` is what they share, each of `endings` is not empty."""

    prompt: list[int]
    endings: list[list[int]]

    @classmethod
    def sharing(cls, whole: Sequence[list[int]]) -> Responses:
        """Cut whole sequences behind their longest common beginning, leaving each a token.

        >>> Responses.sharing([[1, 2, 3], [1, 2], [1, 2, 4]])
        Responses(prompt=[1], endings=[[2, 3], [2], [2, 4]])
        """
        if len(whole) < 2:
            return cls([], list(whole))
        shared: list[int] = reduce(lambda a, b: a[: chat.common_prefix(a, b)], whole)
        cut = min(len(shared), min(map(len, whole)) - 1)
        return cls(whole[0][:cut], [ids[cut:] for ids in whole])


def responses_of(row: Mapping[str, Any], where: str) -> tuple[Any, list[Any]]:
    """(prompt, responses) of a row: `prompt` (text or messages) or `messages`, with `responses`; or `chosen` and
    `rejected`, which are then the responses in this order, with or without a `prompt`.

    Raises:
        UserError: neither; `where` names the row.
    """
    if "chosen" in row and "rejected" in row:
        return row.get("prompt"), [row["chosen"], row["rejected"]]
    responses = row.get("responses")
    if not isinstance(responses, list) or not responses:
        raise UserError(
            f"{where}: a row needs `responses`, a list of answers to its `prompt` or `messages`, or else `chosen` and "
            f"`rejected`; it has {', '.join(row) or 'nothing'}"
        )
    if "prompt" in row and "messages" in row:
        raise UserError(f"{where}: give prompt or messages, not both")
    return row.get("prompt", row.get("messages")), responses


class ResponseTokenizer:
    """Rows of (prompt, responses) to token ids that end with the last trained token: the end of the answer's turn."""

    def __init__(self, tokenizer: Any, inputs: RewardInputs):
        self.tokenizer, self.plain = tokenizer, PlainText(tokenizer)
        self.rules = ChatRules(chat.template_roles(tokenizer), inputs.system_prompt, not inputs.plain_text)
        if not inputs.plain_text:
            chat.check_template(tokenizer)

    def __call__(self, prompt: Any, responses: Sequence[Any]) -> Responses:
        """Token ids of a row.

        Raises:
            Skip: the row cannot be read as a conversation; the reason is one of `SKIPS`.
        """
        if self.rules.is_chat(prompt, *responses):
            texts = [self._render(prompt, response) for response in responses]
            encoded = chat.encode_rendered(self.tokenizer, texts)
            return Responses.sharing([_until_trained(item) for item in encoded])
        if any(plain_message({"content": text})["content"] is None for text in (prompt or "", *responses)):
            raise Skip("not_text")
        head = self.plain.encode(prompt, begin=True, end=False) if prompt else []
        return Responses.sharing([head + self.plain.encode(text, begin=not head, end=True) for text in responses])

    def _render(self, prompt: Any, response: Any) -> chat.Rendered:
        given = [] if prompt is None else self._messages(prompt, "user")
        answer = self._messages(response, "assistant")
        turns = self.rules.read(continued([] if is_whole(answer, given, prompt) else given, answer))
        if turns[-1]["role"] != "assistant":
            raise Skip("last_turn_not_assistant")
        return render_or_skip(self.tokenizer, turns)

    def _messages(self, value: Any, role: str) -> list[Any]:
        if not isinstance(value, str | list):
            raise Skip("not_text")
        messages = [{"role": role, "content": value}] if isinstance(value, str) else value
        return list(self.rules.as_messages([*map(plain_message, messages)], role))


def _until_trained(item: chat.Encoded) -> list[int]:
    if not any(item.mask):
        raise Skip("nothing_trained")
    return item.ids[: max(i for i, trained in enumerate(item.mask) if trained) + 1]
