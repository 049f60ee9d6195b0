"""How one row is read: which conversations are usable, and text outside any template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from mambalign.data import chat
from mambalign.recipe import UserError

if TYPE_CHECKING:
    from mambalign.recipe import Recipe

SKIPS = {
    "empty_conversation": "no messages, or a system message only",
    "starts_with_assistant": "the first turn is the assistant's",
    "no_assistant_turn": "nobody answers",
    "last_turn_not_assistant": "a preference whose answer is not the assistant's",
    "unknown_role": "a role that is none of the template's",
    "not_text": "a content, prompt or completion that is missing or not text",
    "empty_text": "a document without a token",
    "refused_by_template": "the chat template raises an error",
    "prompt_not_a_prefix": "the prompt is not the beginning of the conversation, or only of one of the two",
    "chosen_equals_rejected": "nothing to prefer, before or after truncation",
    "empty_completion": "one completion is only the beginning of the other",
    "too_long": "over the budget, and truncation is drop",
    "truncated_away": "over max_length, and no trained token is left of it",
    "nothing_trained": "no trained token",
    "not_a_margin": "a margin that is no number from 0 on",
    "nothing_asked": "the assistant has the last word already",
}


class Skip(Exception):
    """This row cannot be used: `reason` is one of `SKIPS`, `detail` is what only the row itself can tell."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail

    @property
    def sentence(self) -> str:
        return f"{self.reason}: {SKIPS[self.reason]}" + (f" ({self.detail})" if self.detail else "")


@dataclass
class ChatRules:
    """How conversations of a recipe are read; shared by SFT and preferences."""

    roles: frozenset[str]
    system_prompt: str | None
    wrap_text: bool  # plain-text prompts and completions become chat turns

    @classmethod
    def of(cls, recipe: Recipe, tokenizer: Any) -> ChatRules:
        system = recipe.system_prompt
        template = chat.template_text(tokenizer)
        takes_system = "system" in template or "<|im_start|>" in template
        if system is None and recipe.auto_insert_empty_system_msg and takes_system:
            system = ""
        return cls(chat.template_roles(tokenizer), system, recipe.chat_template is not None)

    def read(self, messages: Any, *, needs_answer: bool = True) -> list[dict[str, str]]:
        """The conversation as role and content, the recipe's system message in front.

        Raises:
            Skip: it cannot be trained on.
        """
        if not messages:
            raise Skip("empty_conversation")
        turns = [{"role": m.get("role"), "content": m.get("content")} for m in messages]
        unknown = [turn["role"] for turn in turns if turn["role"] not in self.roles]
        if unknown:
            raise Skip("unknown_role", f"{unknown[0]!r}" if unknown[0] else "a message without a role")
        if any(not isinstance(turn["content"], str) for turn in turns):
            raise Skip("not_text")
        spoken = [turn["role"] for turn in turns if turn["role"] != "system"]
        if not spoken:
            raise Skip("empty_conversation")
        if spoken[0] == "assistant":
            raise Skip("starts_with_assistant")
        if needs_answer and "assistant" not in spoken:
            raise Skip("no_assistant_turn")
        if self.system_prompt is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        return turns

    def as_messages(self, value: Any, role: str) -> Any:
        """Text as one message of `role`; messages under our roles, a missing one as one without role and content."""
        if isinstance(value, str):
            return [{"role": role, "content": value}]
        return [_our_role(message or {}) for message in value] if value else value

    def is_chat(self, *values: Any) -> bool:
        """Whether these values are a conversation: messages, or text that the recipe's chat_template is to wrap."""
        return self.wrap_text or any(value is not None and not isinstance(value, str) for value in values)


def _our_role(message: Mapping[str, Any]) -> Mapping[str, Any]:
    role = chat.SHAREGPT_ROLES.get(message.get("role") or "")
    return {**message, "role": role} if role else message


def continued(prompt: Sequence[Mapping[str, str]], answer: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """The prompt's messages and those after it.

    Raises:
        Skip: the prompt ends in a question and what follows asks anew, so it does not continue the prompt.
    """
    if prompt and answer and prompt[-1].get("role") == "user" and answer[0].get("role") in ("system", "user"):
        raise Skip("prompt_not_a_prefix")
    return [*prompt, *answer]


def render_or_skip(tokenizer: Any, messages: Sequence[chat.Message], *, answer_next: bool = False) -> chat.Rendered:
    """`chat.render`, `Skip` where the template refuses."""
    try:
        return chat.render(tokenizer, messages, add_generation_prompt=answer_next)
    except TemplateError as error:
        raise Skip("refused_by_template", " ".join(str(error).split())[:200]) from error


class PlainText:
    """Text outside any template: begun as the tokenizer begins texts (a bos token, if it adds one), ended with eos."""

    def __init__(self, tokenizer: Any):
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-sequence token (eos_token); a text could not be ended")
        self.tokenizer = tokenizer
        empty = tokenizer("")["input_ids"]
        self.begin = [tokenizer.bos_token_id] if empty[:1] == [tokenizer.bos_token_id] else []

    def encode(self, text: str, *, begin: bool, end: bool) -> list[int]:
        """Ids of the text; never a second bos or eos where the text already has it."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if begin and ids[: len(self.begin)] != self.begin:
            ids = self.begin + ids
        if end and ids[-1:] != [self.tokenizer.eos_token_id]:
            ids = [*ids, self.tokenizer.eos_token_id]
        return ids


def conversation_notes(turns: Iterable[Mapping[str, str]], control: Any) -> list[str]:
    """What is odd about a conversation that is used all the same."""
    turns = list(turns)
    notes = ["control_text"] if any(control.search(turn["content"]) for turn in turns) else []
    if any(turn["role"] == "assistant" and not turn["content"].strip() for turn in turns):
        notes.append("empty_answer")
    return notes
