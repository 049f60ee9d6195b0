"""Rows to token ids, in parallel and cached, with an account of every row and token that did not make it.

Problems of single rows never stop a run and are never silent: each is a counted skip with the id of its first row.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets.fingerprint import Hasher
from numpy.typing import NDArray

from mambalign.data import chat
from mambalign.data.rows import SKIPS, ChatRules, PlainText, Skip, continued, conversation_notes, render_or_skip
from mambalign.recipe import UserError

if TYPE_CHECKING:
    from mambalign.recipe import Recipe

logger = logging.getLogger(__name__)

BATCH_BYTES = 2**24  # of rows that are tokenised at a time
_VERSION = 4  # of the code below: part of the cache key, raise it when the output changes
IDS = datasets.List(datasets.Value("int32"))
MASK = datasets.List(datasets.Value("int8"))
_ACCOUNT = {
    "reason": datasets.Value("string"),
    "detail": datasets.Value("string"),
    "notes": datasets.List(datasets.Value("string")),
    "lost": datasets.Value("int32"),
}


@dataclass
class TokenizedData:
    """Tokenised examples and the account of how they came to be.

    Attributes:
        dataset: sft/cpt columns `input_ids` (int32 list), `loss_mask` (int8 list, 1 = trained, never the first token),
            `row_id`; preference columns `prompt_ids, chosen_ids, rejected_ids` (int32 lists; completions are the tokens
            after the prompt), `chosen_mask, rejected_mask`, `row_id`.
        report: counts: `rows` read, `kept` and `skipped` of them (`skipped/<reason>`), `examples` made of them,
            `truncated` rows, `tokens`, `trained_tokens`, `tokens_lost` (cut off, or in rows too long to use), `longest`
            example, `notes/<what>` for rows used although something is odd about them.
        fingerprint: sha256 over the ids, masks and row ids.
        first_rows: for every `skipped/...`, `notes/...` and `truncated`, the id of the first such row.
        details: for a `skipped/...`, what only that first row can tell: the role, the template's own error.
        plain_text: preference pairs only: whether they were taken as text, outside any chat template.
    """

    dataset: datasets.Dataset
    report: dict[str, int | float]
    fingerprint: str
    first_rows: dict[str, str] = field(default_factory=dict)
    details: dict[str, str] = field(default_factory=dict)
    plain_text: bool = False

    def skips(self) -> str:
        """`2 x unknown_role (a role that is none of the template's: 'bot'; first: data.jsonl:train:7); ...`"""
        said = []
        for name, count in self.report.items():
            if (reason := name.removeprefix("skipped/")) != name:
                detail = f": {self.details[name]}" if name in self.details else ""
                said.append(f"{count} x {reason} ({SKIPS[reason]}{detail}; first: {self.first_rows[name]})")
        return "; ".join(said)


@dataclass
class Row:
    """What tokenisation makes of one row, or of a piece of it."""

    columns: dict[str, Any]
    row_id: str
    notes: list[str] = field(default_factory=list)
    reason: str = ""
    detail: str = ""
    lost: int = 0

    def skip(self, skip: Skip) -> None:
        self.reason, self.detail = skip.reason, skip.detail


# ---------------------------------------------------------------------------------------------------- SFT and text


class SequenceTokenizer:
    """Batches of rows to `input_ids` and `loss_mask`; a picklable function for `Dataset.map`.

    A row is read as `messages`, else as `prompt` and `completion`, else as `text` (documents end with eos; all tokens
    are trained). Truncation to `max_length`, unless states are passed on (`recipe.state_passing`) and nothing has to
    be cut: keep_start, keep_end, drop (a skip), split (text only). Split pieces after
    the first begin with the last token of the piece before, which is not trained again: so every token of a document
    but its first is a target exactly once.
    """

    def __init__(self, tokenizer: Any, recipe: Recipe):
        self.tokenizer, self.rules, self.plain = tokenizer, ChatRules.of(recipe, tokenizer), PlainText(tokenizer)
        self.max_length = recipe.max_length if recipe.state_passing == "off" else None
        self.truncation = recipe.truncation
        if self.truncation == "split" and self.max_length is not None and self.max_length < 2:
            raise UserError(f"max_length: {self.max_length} is too small to split documents; a piece needs 2 tokens")
        self.assistant_only = recipe.assistant_only_loss
        self.control = chat.control_text(tokenizer)

    def __call__(self, batch: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
        rows: list[Row | list[Row]] = []
        waiting: list[tuple[int, Row, int | None, chat.Rendered]] = []  # conversations are tokenised all at once
        for number, row_id in enumerate(batch["row_id"]):
            values = {name: column[number] for name, column in batch.items()}
            row = Row({}, row_id)
            try:
                if values.get("messages") is None and not self._is_prompted_chat(values):
                    rows.append(self._text(values, row))
                    continue
                turns, given = self._conversation(values, row)
                waiting.append((len(rows), row, given, render_or_skip(self.tokenizer, turns)))
            except Skip as skip:
                row.skip(skip)
            rows.append(row)
        encoded = chat.encode_rendered(self.tokenizer, [item[-1] for item in waiting])
        for (place, row, given, _), tokens in zip(waiting, encoded, strict=True):
            mask = list(tokens.mask) if self.assistant_only else [1] * len(tokens.ids)
            if given is not None:  # a template may leave an empty turn out
                first = tokens.regions[given][0] if given < len(tokens.regions) else len(mask)
                mask[:first] = [0] * first
            rows[place] = self._cut(row, tokens.ids, mask, is_text=False)
        return as_batch(rows, ("input_ids", "loss_mask"))

    def _is_prompted_chat(self, values: Mapping[str, Any]) -> bool:
        return values.get("completion") is not None and self.rules.is_chat(values.get("prompt"), values["completion"])

    def _conversation(self, values: Mapping[str, Any], row: Row) -> tuple[list[dict[str, str]], int | None]:
        """The turns to render and, for a prompt with a completion, how many assistant turns are the prompt's."""
        given = None
        messages = values.get("messages")
        if messages is None:
            prompt = self.rules.as_messages(values.get("prompt"), "user") or []
            given = sum(turn.get("role") == "assistant" for turn in prompt)
            messages = continued(prompt, self.rules.as_messages(values["completion"], "assistant"))
        turns = self.rules.read(self.rules.as_messages(messages, "user"))
        last = max(i for i, turn in enumerate(turns) if turn["role"] == "assistant")
        if last < len(turns) - 1:
            row.notes.append("trailing_turns_cut")
        turns = turns[: last + 1]
        if given is not None and given >= sum(turn["role"] == "assistant" for turn in turns):
            raise Skip("nothing_trained")
        row.notes += conversation_notes(turns, self.control)
        return turns, given

    def _text(self, values: Mapping[str, Any], row: Row) -> list[Row]:
        prompt, text = values.get("prompt"), values.get("completion")
        if text is None:
            prompt, text = "", values.get("text")
        if not isinstance(text, str) or not isinstance(prompt, str):
            raise Skip("empty_conversation" if "text" not in values and "completion" not in values else "not_text")
        if self.control.search(text):
            row.notes.append("control_text")
        given = self.plain.encode(prompt, begin=True, end=False) if prompt else []
        if not text.strip():
            raise Skip("empty_text")
        ids = given + self.plain.encode(text, begin=not given, end=True)
        mask = [0] * len(given) + [1] * (len(ids) - len(given))
        return self._cut(row, ids, mask, is_text=not prompt)

    def _cut(self, row: Row, ids: list[int], mask: list[int], *, is_text: bool) -> list[Row]:
        limit, rows = self.max_length, [row]
        row.columns = {"input_ids": ids, "loss_mask": mask}
        if limit is not None and len(ids) > limit:
            if self.truncation == "drop":
                row.reason, row.lost = "too_long", len(ids)
                return rows
            row.notes.append("split" if self.truncation == "split" else "truncated")
            if self.truncation == "split" and is_text:
                starts = range(0, len(ids) - 1, limit - 1)
                pieces = [(slice(at, at + limit), f"{row.row_id}#{k}") for k, at in enumerate(starts)]
                rows = [Row({"input_ids": ids[cut], "loss_mask": mask[cut]}, name) for cut, name in pieces]
                rows[0].notes = row.notes
            else:
                part = slice(-limit, None) if self.truncation == "keep_end" else slice(limit)
                row.columns = {"input_ids": ids[part], "loss_mask": mask[part]}
                row.lost = len(ids) - limit
        for piece in rows:
            trained = piece.columns["loss_mask"]
            assert isinstance(trained, list)
            trained[:1] = [0] * len(trained[:1])  # nothing predicts the first token
            if not piece.reason and not any(trained):
                piece.reason = "truncated_away" if piece.lost else "nothing_trained"
                piece.lost = len(ids) if piece.lost else 0
        return rows


def tokenize_sft(dataset: datasets.Dataset, tokenizer: Any, recipe: Recipe) -> TokenizedData:
    """Conversations, prompts with completions, or texts as `input_ids` and `loss_mask` (see `SequenceTokenizer`).

    In a conversation the assistant's tokens with their end-of-turn token are trained, all tokens if
    `assistant_only_loss` is false; of a prompt with a completion, the completion is. Plain-text prompts and completions
    are taken as they are, with eos at the end, unless the recipe sets `chat_template`: then they are one user and one
    assistant turn. Turns after the assistant's last are cut off and noted.

    Raises:
        UserError: no fitting columns; the template fails `check_template`; every row is skipped; truncation: split.
    """
    require_columns(dataset, [("messages",), ("prompt", "completion"), ("text",)], "sft")
    if recipe.truncation == "split" and dataset.column_names != ["text", "row_id"]:
        raise UserError("truncation: split is for plain text; for conversations use keep_start, keep_end or drop")
    if {"messages", "completion"} & set(dataset.column_names):
        needs_template = "messages" in dataset.column_names or recipe.chat_template is not None
        if needs_template or not isinstance(dataset.features["completion"], datasets.Value):
            chat.check_template(tokenizer)
    return run(SequenceTokenizer(tokenizer, recipe), dataset, recipe, {"input_ids": IDS, "loss_mask": MASK})


def tokenize_text(dataset: datasets.Dataset, tokenizer: Any, recipe: Recipe) -> TokenizedData:
    """Documents (`text`) for continued pre-training: every token is trained, each document ends with eos.

    `truncation: split` cuts long documents into pieces of `max_length` of which no token is lost.
    """
    require_columns(dataset, [("text",)], "cpt")
    dataset = dataset.select_columns(["text", "row_id"])
    return run(SequenceTokenizer(tokenizer, recipe), dataset, recipe, {"input_ids": IDS, "loss_mask": MASK})


def require_columns(dataset: datasets.Dataset, alternatives: list[tuple[str, ...]], stage: str) -> None:
    there = set(dataset.column_names) - {"row_id"}
    if not any(set(names) <= there for names in alternatives):
        wanted = ", or ".join(" and ".join(names) for names in alternatives)
        hint = "; this looks like preference data, for `mambalign dpo`" if "chosen" in there else ""
        raise UserError(f"{stage} needs {wanted}; the data has {', '.join(sorted(there)) or 'no known column'}{hint}")


# ---------------------------------------------------------------------------------------------- mapping and account


def as_batch(rows: Iterable[Row | list[Row]], names: Iterable[str]) -> dict[str, list[Any]]:
    flat = [piece for row in rows for piece in (row if isinstance(row, list) else [row])]
    for row in flat:
        if row.reason:  # a skip is the only thing to report of a skipped row
            row.notes = []
    batch: dict[str, list[Any]] = {name: [None if r.reason else r.columns[name] for r in flat] for name in names}
    return batch | {key: [getattr(r, key) for r in flat] for key in ("row_id", "reason", "detail", "notes", "lost")}


def run(
    function: Callable[[Mapping[str, list[Any]]], dict[str, list[Any]]],
    dataset: datasets.Dataset,
    recipe: Recipe,
    columns: Mapping[str, Any],
) -> TokenizedData:
    """Map `function` over the dataset (cached by content), set the skipped rows apart and account for everything.

    Raises:
        UserError: no row is left; the message lists the reasons with counts.
    """
    workers = recipe.preprocessing_num_workers or 1
    table = dataset.map(
        function,
        batched=True,
        batch_size=_rows_at_a_time(dataset),
        remove_columns=dataset.column_names,
        features=datasets.Features({**columns, "row_id": datasets.Value("string"), **_ACCOUNT}),
        num_proc=workers if workers > 1 else None,
        new_fingerprint=_cache_key(function, dataset),
        desc="tokenizing",
    )
    kept = table.select(np.flatnonzero(np.asarray(table.data.column("reason").to_numpy(zero_copy_only=False)) == ""))
    kept = kept.select_columns([*columns, "row_id"])
    report, first_rows, details = _account(len(dataset), table, kept)
    data = TokenizedData(kept, report, fingerprint(kept), first_rows, details)
    _say(data)
    if not len(kept):
        raise UserError(f"none of the {len(dataset)} rows can be used: {data.skips() or 'there are no rows'}")
    return data


def _rows_at_a_time(dataset: datasets.Dataset) -> int:
    """256, or fewer long documents: lists of Python's numbers take ten times the room of the text."""
    bytes_a_row = dataset.data.nbytes / max(dataset.data.num_rows, 1)
    return int(max(1, min(256, BATCH_BYTES / max(bytes_a_row, 1))))


def _cache_key(function: Any, dataset: datasets.Dataset) -> str:
    """Unlike a hash of the pickled function, this does not change with what a tokenizer has been used for before."""
    tokenizer = function.tokenizer
    settings = {key: value for key, value in vars(function).items() if key not in ("tokenizer", "plain", "control")}
    words = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else sorted(tokenizer.get_vocab().items())
    rules = vars(settings.pop("rules")).copy()
    rules["roles"] = sorted(rules["roles"])
    state = [type(function).__name__, sorted(settings.items()), sorted(rules.items()), words]
    state += [tokenizer.chat_template, sorted(tokenizer.special_tokens_map.items()), function.plain.begin, _VERSION]
    return str(Hasher.hash([dataset._fingerprint, repr(state)]))


def _account(
    rows: int, table: datasets.Dataset, kept: datasets.Dataset
) -> tuple[dict[str, int | float], dict[str, str], dict[str, str]]:
    """`TokenizedData`'s report, first_rows and details."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    details: dict[str, str] = {}
    account = table.select_columns(["row_id", *_ACCOUNT]).with_format("arrow")[:]
    lost = int(pc.sum(account["lost"]).as_py() or 0)
    odd = pc.or_(pc.not_equal(account["reason"], ""), pc.greater(pc.list_value_length(account["notes"]), 0))
    for row in account.filter(odd).to_pylist():
        names = [f"skipped/{row['reason']}"] if row["reason"] else []
        names += [name if name in ("truncated", "split") else f"notes/{name}" for name in row["notes"]]
        for name in names:
            counts[name] += 1
            if name not in first:
                first[name] = row["row_id"]
                if row["detail"]:
                    details[name] = row["detail"]
    skipped = sum(count for name, count in counts.items() if name.startswith("skipped/"))
    lengths = example_lengths(kept)
    masks = [name for name in kept.column_names if name.endswith("_mask") or name == "loss_mask"]
    report: dict[str, int | float] = {
        "rows": rows,
        "kept": rows - skipped,
        "skipped": skipped,
        "examples": len(kept),
        "truncated": counts.pop("truncated", 0),
        "tokens": int(lengths.sum()),
        "trained_tokens": sum(int(pc.sum(pc.list_flatten(_column(kept, name))).as_py() or 0) for name in masks),
        "tokens_lost": lost,
        "longest": int(lengths.max(initial=0)),
    }
    return report | dict(sorted(counts.items())), first, details


def _column(dataset: datasets.Dataset, name: str) -> pa.ChunkedArray:
    return dataset.select_columns([name]).with_format("arrow")[:][name]


def list_lengths(dataset: datasets.Dataset, name: str) -> NDArray[np.int64]:
    """Length of every row's list in a column."""
    column = pc.fill_null(pc.list_value_length(dataset.data.column(name)), 0)  # rows left out have no list
    lengths: NDArray[np.int64] = column.to_numpy().astype(np.int64)
    kept = dataset._indices  # where rows were left out; copying what is left would take longer than packing it
    return lengths if kept is None else lengths[kept.column(0).to_numpy()]


def example_lengths(dataset: datasets.Dataset) -> NDArray[np.int64]:
    """Tokens of every example: of a pair, those of its prompt once and of both completions."""
    columns = [list_lengths(dataset, name) for name in dataset.column_names if name.endswith("_ids")]
    return np.sum(columns, axis=0, dtype=np.int64)


def fingerprint(dataset: datasets.Dataset) -> str:
    """sha256 over row ids, ids and masks, whatever the files or chunks they lie in."""
    digest = hashlib.sha256()
    for name in sorted(dataset.column_names):
        digest.update(f"{name}:{len(dataset)}\n".encode())
        column = _column(dataset, name)
        if name == "row_id":
            digest.update("\n".join(column.to_pylist()).encode())
            continue
        if not pa.types.is_list(column.type):  # a margin
            digest.update(column.to_numpy().astype("<f4").tobytes())
            continue
        digest.update(pc.list_value_length(column).to_numpy().astype("<i4").tobytes())
        digest.update(pc.list_flatten(column).to_numpy().astype("<i4").tobytes())
    return digest.hexdigest()


def _say(data: TokenizedData) -> None:
    report = data.report
    logger.info(
        "tokenized %d of %d rows into %d examples, %d tokens, %d of them trained",
        report["kept"], report["rows"], report["examples"], report["tokens"], report["trained_tokens"],
    )  # fmt: skip
    if report["skipped"]:
        logger.warning("skipped %d of %d rows: %s", report["skipped"], report["rows"], data.skips())
    if report["truncated"]:
        logger.warning(
            "truncated %d of %d rows, the first is %s; with rows too long to use, %d tokens are lost",
            report["truncated"], report["rows"], data.first_rows["truncated"], report["tokens_lost"],
        )  # fmt: skip
    for name, count in report.items():
        if name.startswith("notes/"):
            logger.info("%d rows have %s, the first is %s", count, name.removeprefix("notes/"), data.first_rows[name])
