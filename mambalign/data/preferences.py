"""Preference rows to prompt, chosen and rejected tokens.

The prompt of a row that does not give it apart is the longest common *token* prefix of the two rendered conversations,
taken back to the beginning of the assistant's turn in which they part, so that answers that begin with the same words
keep them trained. Comparing tokens and not text never splits a word differently in prompt and completion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import datasets

from mambalign.data import chat
from mambalign.data.rows import ChatRules, PlainText, Skip, continued, conversation_notes, render_or_skip
from mambalign.data.tokenizing import IDS, MASK, Row, TokenizedData, as_batch, require_columns, run
from mambalign.recipe import UserError

if TYPE_CHECKING:
    from mambalign.recipe import Recipe

COLUMNS = {"prompt_ids": IDS, "chosen_ids": IDS, "chosen_mask": MASK, "rejected_ids": IDS, "rejected_mask": MASK}
MARGIN = "margin"  # of a reward model's pairs; optional


@dataclass
class _Pair:
    """Both sides of a row as whole sequences; `prompt` is None where it is to be found as the common prefix."""

    chosen: chat.Encoded
    rejected: chat.Encoded
    prompt: list[int] | None


class PairTokenizer:
    """Batches of preference rows to prompt and completions; a picklable function for `Dataset.map`."""

    def __init__(self, tokenizer: Any, recipe: Recipe):
        self.tokenizer, self.rules, self.plain = tokenizer, ChatRules.of(recipe, tokenizer), PlainText(tokenizer)
        self.max_length, self.drop = recipe.max_length, recipe.truncation == "drop"
        self.max_prompt_length = recipe.max_prompt_length or recipe.max_length // 2
        self.control = chat.control_text(tokenizer)

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        rows: list[Row] = []
        waiting: list[tuple[Row, list[chat.Rendered]]] = []  # conversations are tokenised all at once
        for number, row_id in enumerate(batch["row_id"]):
            row = Row({}, row_id)
            rows.append(row)
            prompt = batch["prompt"][number] if "prompt" in batch else None
            chosen, rejected = batch["chosen"][number], batch["rejected"][number]
            try:
                if MARGIN in batch:
                    row.columns = {MARGIN: _margin(batch[MARGIN][number], row)}
                if chosen == rejected:
                    raise Skip("chosen_equals_rejected" if chosen else "empty_conversation")
                if self._is_chat(prompt, chosen, rejected):
                    waiting.append((row, self._render(prompt, chosen, rejected, row)))
                else:
                    self._finish(row, self._plain(prompt, chosen, rejected, row))
            except Skip as skip:
                row.skip(skip)
        encoded = iter(chat.encode_rendered(self.tokenizer, [text for _, texts in waiting for text in texts]))
        for row, texts in waiting:
            parts = [next(encoded) for _ in texts]
            try:
                self._finish(row, _Pair(parts[0], parts[1], parts[2].ids if len(parts) > 2 else None))
            except Skip as skip:
                row.skip(skip)
        return as_batch(rows, [*COLUMNS, MARGIN] if MARGIN in batch else COLUMNS)

    def _is_chat(self, prompt: Any, chosen: Any, rejected: Any) -> bool:
        messages = any(value is not None and not isinstance(value, str) for value in (prompt, chosen, rejected))
        return messages or (prompt is not None and self.rules.wrap_text)

    def _render(self, prompt: Any, chosen: Any, rejected: Any, row: Row) -> list[chat.Rendered]:
        """Both whole conversations, and the prompt if the row gives it apart from the completions."""
        given = None if prompt is None else self.rules.as_messages(prompt, "user")
        chosen, rejected = (self.rules.as_messages(side, "assistant") for side in (chosen, rejected))
        whole = [given is None or is_whole(side, given, prompt) for side in (chosen, rejected)]
        if any(whole) and not all(whole):
            raise Skip("prompt_not_a_prefix")
        apart = not all(whole)
        opening = given if given and apart else []
        turns = [self.rules.read(continued(opening, side or [])) for side in (chosen, rejected)]
        if any(side[-1]["role"] != "assistant" for side in turns):
            raise Skip("last_turn_not_assistant")
        row.notes += sorted({note for side in turns for note in conversation_notes(side, self.control)})
        texts = [render_or_skip(self.tokenizer, side) for side in turns]
        if apart:
            answered = chosen[0]["role"] == rejected[0]["role"] == "assistant"
            before = self.rules.read(opening, needs_answer=False)
            texts.append(render_or_skip(self.tokenizer, before, answer_next=answered))
        return texts

    def _plain(self, prompt: Any, chosen: Any, rejected: Any, row: Row) -> _Pair:
        """Text as it is; the completions end with eos."""
        if not all(isinstance(side, str) for side in (chosen, rejected)):
            raise Skip("not_text")
        if any(self.control.search(text) for text in (prompt or "", chosen, rejected)):
            row.notes.append("control_text")
        if not prompt:
            whole = [self.plain.encode(side, begin=True, end=True) for side in (chosen, rejected)]
            first, second = (chat.Encoded(ids, [1] * len(ids), ()) for ids in whole)
            return _Pair(first, second, None)
        head = self.plain.encode(prompt, begin=True, end=False)
        tails = [self.plain.encode(side, begin=False, end=True) for side in (chosen, rejected)]
        first, second = (chat.Encoded(head + ids, [0] * len(head) + [1] * len(ids), ()) for ids in tails)
        return _Pair(first, second, head)

    def _finish(self, row: Row, pair: _Pair) -> None:
        prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
        if chosen.ids == rejected.ids:
            raise Skip("chosen_equals_rejected")
        if prompt is None:
            prompt = chosen.ids[: common_prompt(chosen, rejected)]
        cut = len(prompt)
        if chosen.ids[:cut] != prompt or rejected.ids[:cut] != prompt:
            raise Skip("prompt_not_a_prefix")
        if cut in (len(chosen.ids), len(rejected.ids)):
            raise Skip("empty_completion")
        total = len(chosen.ids) + len(rejected.ids) - cut
        room = self._room(row, cut, max(len(chosen.ids), len(rejected.ids)), total)
        prompt = prompt[-self.max_prompt_length :] if "prompt_truncated" in row.notes else prompt
        sides = {}
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            sides[f"{name}_ids"] = side.ids[cut : cut + room]
            sides[f"{name}_mask"] = side.mask[cut : cut + room]
            row.lost += max(0, len(side.ids) - cut - room)
            if not prompt:  # nothing predicts the first token
                sides[f"{name}_mask"][0] = 0
        problem = "" if any(sides["chosen_mask"]) and any(sides["rejected_mask"]) else "nothing_trained"
        if problem and row.lost:
            problem = "truncated_away"
        if sides["chosen_ids"] == sides["rejected_ids"]:
            problem = "chosen_equals_rejected"
        if problem:
            row.lost = total if row.lost else 0
            raise Skip(problem)
        row.columns |= {"prompt_ids": prompt, **sides}

    def _room(self, row: Row, prompt: int, longest: int, total: int) -> int:
        """Tokens a completion may have, by the handbook's rule: a pair that is too long loses the beginning of its
        prompt down to `max_prompt_length`, then the ends of its completions."""
        if longest <= self.max_length:
            return longest
        if self.drop:
            row.lost = total
            raise Skip("too_long")
        row.notes.append("truncated")
        if prompt > self.max_prompt_length:
            row.notes.append("prompt_truncated")
            row.lost += prompt - self.max_prompt_length
        room = self.max_length - min(prompt, self.max_prompt_length)
        if longest - prompt > room:
            row.notes.append("completion_truncated")
        return room


def _margin(value: float | None, row: Row) -> float:
    """Of a row that gives none it is 0, which is noted: in a mix not every dataset knows margins."""
    if value is None:
        row.notes.append("no_margin")
        return 0.0
    if not 0 <= value < math.inf:
        raise Skip("not_a_margin", str(value))
    return float(value)


def is_whole(side: Any, given: list[Any], prompt: Any) -> bool:
    """Whether an answer is the whole conversation, the prompt included (ultrafeedback's layout).

    `given`: the prompt as messages; `prompt`: as the row has it.
    """
    if not side:
        return False
    if isinstance(prompt, str):
        return bool(side[0].get("role") != "assistant")
    return len(side) > len(given) and list(side[: len(given)]) == list(given)


def common_prompt(chosen: chat.Encoded, rejected: chat.Encoded) -> int:
    """Tokens of the implicit prompt: the common prefix, back to the start of an assistant turn that it would cut."""
    shared = chat.common_prefix(chosen.ids, rejected.ids)
    starts = [start for side in (chosen, rejected) for start, end in side.regions if start < shared < end]
    return min([shared, *starts])


def tokenize_preferences(dataset: datasets.Dataset, tokenizer: Any, recipe: Recipe) -> TokenizedData:
    """Preference pairs (`chosen`, `rejected`, perhaps `prompt`) as prompt, two completions and their masks.

    `chosen` and `rejected` are whole conversations (the prompt, if given as well, is then not needed: ultrafeedback's
    layout), or the messages or text after `prompt`. Plain text is taken as it is, eos at the end, unless the recipe
    sets `chat_template` and the row has a prompt: then it is a user and an assistant turn. Masks hold the assistant's
    tokens with their end-of-turn token, of all turns after the prompt.

    A pair longer than `max_length` (prompt + longer completion) is cut by the handbook's rule, or skipped with
    `truncation: drop`. `tokens_lost` counts the prompt once.

    For a reward model `margin` (float32) is a column too, where the data have it.

    Raises:
        UserError: no `chosen` and `rejected`; the template fails `check_template`; no room for completions; every row
            is skipped.
    """
    require_columns(dataset, [("chosen", "rejected")], recipe.stage or "dpo")
    if recipe.max_length < 2:
        raise UserError(f"max_length: {recipe.max_length} is too small for a pair; it needs 2 tokens")
    function = PairTokenizer(tokenizer, recipe)
    if function.max_prompt_length >= recipe.max_length:
        raise UserError(
            f"max_prompt_length: {function.max_prompt_length} leaves no room for a completion in max_length: "
            f"{recipe.max_length}; make it smaller"
        )
    features: Sequence[Any] = [dataset.features[n] for n in ("prompt", "chosen") if n in dataset.features]
    all_text = all(isinstance(feature, datasets.Value) for feature in features)
    if recipe.chat_template is not None or not all_text:
        chat.check_template(tokenizer)
    margin = {MARGIN: datasets.Value("float32")} if MARGIN in dataset.column_names else {}
    data = run(function, dataset, recipe, COLUMNS | margin)
    data.plain_text = all_text and not (function.rules.wrap_text and "prompt" in dataset.column_names)
    return data
