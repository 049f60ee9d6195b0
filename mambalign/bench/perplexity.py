"""Perplexity of long documents, by position and by the length of the context, at constant memory.

Two questions, two curves for each model:

- *by position*: a document is read from its beginning with one state, in pieces; the loss of the tokens between two
  positions says whether the model still uses, or at least survives, all that it has read. A Transformer reads the same
  document whole, also past its training length.
- *state reset every k tokens*: documents are cut into windows of k tokens, each read from an empty state; the mean over
  all predicted tokens is `exp` of the loss that transformers computes on such windows, the number usually quoted.

Intervals are 95%, by Student's t over documents, which are the independent units; tokens are not. Every document counts
at every position: those shorter than the longest length are left out, and counted, unless documents are joined.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambalign.bench import contestants
from mambalign.bench.measure import DEVICE, Result, Row, free_memory, result_of, say, timed
from mambalign.data.json_rows import json_rows
from mambalign.data.rows import PlainText
from mambalign.models.checkpoint import load_tokenizer
from mambalign.ops import token_logps
from mambalign.recipe import UserError, nearest

OURS, TRANSFORMER = "ours", "transformer"
CHUNK = {"cpu": 1024, "cuda": 16384}
FIRST = 32  # upper end of the first bucket of positions
# 97.5% quantile of Student's t for 1, 2, ... degrees of freedom; the normal's beyond.
T = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23, 2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09,
     2.09, 2.08, 2.07, 2.07, 2.06, 2.06, 2.06, 2.05, 2.05, 2.05, 2.04)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """What is read by whom.

    model: folder or hub id of a Mamba; transformer: of a language model with the same tokenizer, or None. data: file
    (.jsonl, .json, .parquet, .txt), folder or dataset; `column` of it is text. lengths: of contexts, the longest is how
    much of a document is read. join: a column whose equal values mark parts of one document, in order. concatenate:
    documents are laid end to end. documents: at most so many. chunk: tokens read at a time; None: by device.
    """

    model: str
    data: str
    transformer: str | None = None
    tokenizer: str | None = None
    column: str = "text"
    split: str | None = None
    lengths: tuple[int, ...] = (128, 256, 512, 1024, 2048)
    join: str | None = None
    concatenate: bool = False
    documents: int = 64
    chunk: int | None = None
    dtype: str = "float32"
    minutes: float = 10.0

    def check(self) -> None:
        """UserError for an option that is none."""
        if not self.lengths or min(self.lengths) < 2:
            raise UserError("--lengths: a context needs at least 2 tokens, one to read and one to predict")
        if self.documents < 1 or (self.chunk is not None and self.chunk < 1):
            raise UserError("--documents and --chunk must be at least 1")
        if self.dtype not in ("float32", "bfloat16"):
            raise UserError(f"--dtype {self.dtype!r}: choose float32 or bfloat16")
        if self.join and self.concatenate:
            raise UserError("--join and --concatenate: one of them")


# ------------------------------------------------------------------------------------------------------------ documents


def texts_of(options: Options) -> Iterator[str]:
    """The documents' texts, in the data's order; parts of one joined where `join` says so.

    Raises:
        UserError: no such data or column, or a column that is no text.
    """
    path = Path(options.data).expanduser()
    if path.suffix == ".txt":
        if options.join:
            raise UserError(f"--join {options.join}: a .txt file is one document and has no columns")
        try:
            yield path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: not UTF-8 text, at byte {error.start}; save the file as UTF-8") from error
        return
    joined: dict[Any, list[str]] = {}
    for row in _rows_of(options, path):
        for column in filter(None, (options.column, options.join)):
            if column not in row:
                hint = nearest(column, row)
                raise UserError(f"--data {options.data}: no column {column!r}; there are {', '.join(row)}{hint}")
        text = row[options.column]
        if not isinstance(text, str):
            raise UserError(f"--data {options.data}: column {options.column!r} holds {type(text).__name__}, not text")
        if options.join is None:
            yield text
        else:
            joined.setdefault(row[options.join], []).append(text)
    yield from ("".join(pieces) for pieces in joined.values())


def _rows_of(options: Options, path: Path) -> Iterator[Row]:
    """A JSON-lines file as it is read; else the split that is named, or the first held-out one, or the training one."""
    if path.suffix == ".jsonl" and path.is_file():
        yield from (row for _, row in json_rows(path))
        return
    from mambalign.data.sources import Source, load_source  # `datasets` takes seconds to import

    source = Source(options.data, splits=(options.split,) if options.split else None)
    try:
        for kind, splits in (("test", ["test", "validation"]), ("train", ["train"])):
            for _, rows in load_source(source, splits, kind):
                yield from rows
                return
    except UserError as error:  # in the words of a recipe
        raise UserError(f"--data: {str(error).removeprefix('dataset_mixer: ')}") from error
    raise UserError(f"--data {options.data}: nothing to read; name a --split")


def documents_of(options: Options, tokenizer: Any) -> tuple[Tensor, Row]:
    """(int64 `[documents, longest length]`, what was left out and how documents were made).

    Raises:
        UserError: no document is long enough; the message names the longest.
    """
    longest, plain = max(options.lengths), PlainText(tokenizer)
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)  # "longer than the maximum"
    kept: list[list[int]] = []
    stream: list[int] = []
    seen = short = most = 0
    for text in texts_of(options):
        ids = plain.encode(text, begin=True, end=True)
        seen, most = seen + 1, max(most, len(ids))
        if options.concatenate:
            stream += ids
            whole = min(len(stream) // longest, options.documents - len(kept))
            kept += [stream[start : start + longest] for start in range(0, whole * longest, longest)]
            stream = stream[whole * longest :]
        elif len(ids) >= longest:
            kept.append(ids[:longest])
        else:
            short += 1
        if len(kept) >= options.documents:
            break
    if not kept:
        total, advice = f"all {seen} together have {len(stream):,}", ""
        if not options.concatenate:
            total = f"the longest of {seen} has {most:,}"
            advice = ", join parts with --join COLUMN, or lay documents end to end with --concatenate"
        raise UserError(
            f"--lengths {longest}: no document of {options.data} has so many tokens ({total}); give shorter "
            f"--lengths{advice}"
        )
    joined = "laid end to end (concatenated)" if options.concatenate else (
        f"of which parts are joined by {options.join!r}" if options.join else None
    )  # fmt: skip
    facts = {"documents": min(len(kept), options.documents), "too_short": short, "joined": joined}
    return torch.tensor(kept[: options.documents]), facts


# --------------------------------------------------------------------------------------------------------------- losses


@torch.inference_mode()
def stream_nll(model: Any, ids: Tensor, chunk: int) -> Tensor:
    """Negative log-likelihood of every token but the first of each row, the state carried from piece to piece.

    Memory does not depend on the rows' length: `chunk` tokens of all rows together are in the model at a time.

    Args:
        model: a language model of `mambalign.models`.
        ids: int64 `[R, L]`, L at least 2.

    Returns:
        fp32 `[R, L - 1]` on the CPU; element t belongs to token t + 1, in nats.
    """
    rows, length = ids.shape
    size = max(1, chunk // rows)
    cache = None
    found = []
    for start in range(0, length - 1, size):
        piece = ids[:, start : min(start + size, length - 1)].to(DEVICE)
        targets = ids[:, start + 1 : start + 1 + piece.shape[1]].to(DEVICE)
        out = model(
            piece, cache_params=cache, use_cache=True, target_ids=targets.flatten(),
            target_positions=torch.arange(piece.numel(), device=DEVICE),
        )  # fmt: skip
        cache = out.cache_params
        found.append(-out.logps.view(rows, -1).float().cpu())
    return torch.cat(found, 1)


@torch.inference_mode()
def whole_nll(model: Any, ids: Tensor) -> Tensor:
    """The same of a Transformer, rows read whole; logits exist for a chunk of positions at a time."""
    ids = ids.to(DEVICE)
    hidden, head = contestants.hidden_and_head(model, ids[:, :-1])
    logps = token_logps(hidden.flatten(0, 1), head, ids[:, 1:].flatten())
    return -logps.view(ids.shape[0], -1).float().cpu()


def windows_nll(model: Any, ids: Tensor, length: int, chunk: int, streamed: bool) -> Tensor:
    """Of windows of `length` tokens, each read from an empty state: `[R, windows * (length - 1)]`; a rest is left out.

    As many windows at a time as `chunk` tokens hold.
    """
    rows, count = ids.shape[0], ids.shape[1] // length
    windows = ids[:, : count * length].reshape(rows * count, length)
    parts = windows.split(max(1, chunk // length))
    found = [stream_nll(model, part, chunk) if streamed else whole_nll(model, part) for part in parts]
    return torch.cat(found).view(rows, -1)


def interval(per_document: Sequence[float]) -> Row:
    """Perplexity of documents of one size, from their mean losses; `_low` and `_high` are 95%, None for one document.

    >>> interval([math.log(4.0)])["perplexity"]
    4.0
    """
    n = len(per_document)
    mean = math.fsum(per_document) / n
    row: Row = {"nll": mean, "perplexity": _exp(mean), "perplexity_low": None, "perplexity_high": None}
    if n > 1:
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in per_document) / (n - 1))
        half = (T[n - 2] if n - 2 < len(T) else 1.96) * deviation / math.sqrt(n)
        row |= {"perplexity_low": _exp(mean - half), "perplexity_high": _exp(mean + half)}
    return row


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf


def edges(longest: int) -> list[int]:
    """Ends of the buckets of positions: 32, 64, 128 ... and the longest."""
    ends = [FIRST * 2**i for i in range(32) if FIRST * 2**i < longest]
    return [*ends, longest]


def by_position(nll: Tensor) -> list[Row]:
    """Rows of kind "position" from losses `[documents, L - 1]`: tokens that have seen `from` to `to` - 1 tokens."""
    rows: list[Row] = []
    start = 1
    for end in edges(nll.shape[1] + 1):
        part = nll[:, start - 1 : end - 1].double().mean(1).tolist()
        rows.append({"kind": "position", "from": start, "to": end, **interval(part)})
        start = end
    return rows


# ------------------------------------------------------------------------------------------------------------ measuring


def run(options: Options) -> Result:
    """Read the documents with each model; rows of kind "position" and "reset".

    Raises:
        UserError: an option that is none, a model or data that is not there, another tokenizer's Transformer.
    """
    options.check()
    deadline = time.monotonic() + 60 * options.minutes
    tokenizer = load_tokenizer(options.tokenizer or options.model)
    ids, facts = documents_of(options, tokenizer)
    longest = ids.shape[1]
    left = f", {facts['too_short']} too short" if facts["too_short"] else ""
    how = f", {facts['joined']}" if facts["joined"] else ""
    say(f"{facts['documents']} documents of {longest:,} tokens{left}{how}")
    weights = "bf16" if options.dtype == "bfloat16" else "fp32"
    chunk = options.chunk or CHUNK[DEVICE.type]
    rows: list[Row] = []
    notes: dict[str, str] = {}
    for who, path in ((OURS, options.model), (TRANSFORMER, options.transformer)):
        if path is None:
            continue
        model = (contestants.load_ours if who == OURS else contestants.load_transformer)(path, weights).eval()
        _check_vocabulary(options, model, tokenizer, ids, path)
        if who == TRANSFORMER:
            _check_head(model, ids[:1, :64], path, weights)
        known: Row = {"who": who, "model": Path(path).name, "documents": facts["documents"], "joined": facts["joined"]}
        can = longest
        if who == TRANSFORMER:
            can, notes[Path(path).name] = contestants.reach(model, longest)
            known["training_length"] = contestants.training_length(model)
            say(f"{Path(path).name}: {notes[Path(path).name]}")
        rows += [known | row for row in read(model, ids[:, :can], options.lengths, chunk, who == OURS, deadline)]
        del model
        free_memory()
    settings = asdict(options) | facts | {"chunk": chunk, "notes": notes}
    return result_of("perplexity", rows, settings)


def read(model: Any, ids: Tensor, lengths: Sequence[int], chunk: int, streamed: bool, deadline: float) -> list[Row]:
    """Rows of one model; a Transformer that runs out of memory, or all when time is over, have fewer."""
    parts: list[Tensor] = []
    peak = 0.0

    def one(document: Tensor) -> None:
        parts.append(stream_nll(model, document, chunk) if streamed else whole_nll(model, document))

    try:
        for document in ids.split(1):
            peak = max(peak, timed(partial(one, document))[1])
    except torch.OutOfMemoryError:
        say(f"out of memory at {ids.shape[1]:,} tokens")
        parts.clear()
        free_memory()
        shorter = [length for length in lengths if length < ids.shape[1]]
        return read(model, ids[:, : max(shorter)], shorter, chunk, streamed, deadline) if shorter else []
    rows = by_position(torch.cat(parts)) if parts else []
    rows = [row | {"peak_gib": peak} for row in rows]
    for row in rows:
        say(f"  after {row['from']:>8,} to {row['to'] - 1:>8,} tokens: perplexity {_shown(row)}")
    for length in sorted(lengths):
        if length > ids.shape[1]:
            continue
        if time.monotonic() > deadline:
            say(f"the time is over: no state reset every {length:,} tokens or more")
            break
        nll = windows_nll(model, ids, length, chunk, streamed)
        row = {"kind": "reset", "length": length, **interval(nll.double().mean(1).tolist())}
        say(f"  state reset every {length:>8,} tokens: perplexity {_shown(row)}")
        rows.append(row)
    return rows


def _shown(row: Row) -> str:
    if row["perplexity_low"] is None:
        return f"{row['perplexity']:,.2f}"
    return f"{row['perplexity']:,.2f} [{row['perplexity_low']:,.2f}, {row['perplexity_high']:,.2f}]"


@torch.inference_mode()
def _check_head(model: Any, ids: Tensor, path: str, weights: str) -> None:
    """A head with a bias, a scale or a cap is not the product that `whole_nll` takes it for."""
    logits = model(ids.to(DEVICE), use_cache=False).logits[:, :-1].float().cpu()
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    if not abs(whole_nll(model, ids).mean() - expected) < (1e-3 if weights == "fp32" else 5e-2):
        raise UserError(f"--transformer {path}: its logits are not its last hidden states times its head's weight, so "
                        "its losses would be wrong here; take another model")  # fmt: skip


def _check_vocabulary(options: Options, model: Any, tokenizer: Any, ids: Tensor, path: str) -> None:
    """Perplexities a token compare only for the same tokens."""
    if int(ids.max()) >= model.get_input_embeddings().weight.shape[0]:
        raise UserError(
            f"{path}: token {int(ids.max())} of the data is none of its tokens; is the tokenizer another's?"
        )
    if path == options.model or options.tokenizer:
        return
    try:
        theirs = load_tokenizer(path)
    except UserError:
        say(f"{path}: no tokenizer of its own; the tokens are those of {options.model}")
        return
    sample = "Perplexities compare only for the same tokens: 1,024 of them."
    if theirs(sample)["input_ids"] != tokenizer(sample)["input_ids"]:
        raise UserError(
            f"--transformer {path}: its tokenizer makes other tokens than that of {options.model}, and perplexities a "
            "token would not compare; take a model with the same tokenizer"
        )
