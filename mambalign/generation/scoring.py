"""Scores for answers: `mambalign score` ranks a file of them, best-of-n sampling chooses by them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mambalign.data.batches import collate_responses
from mambalign.data.json_rows import json_rows
from mambalign.data.responses import Responses, ResponseTokenizer, RewardInputs, responses_of
from mambalign.data.rows import Skip
from mambalign.generation.journal import (
    Journal,
    check_rows,
    model_fingerprint,
    progress,
)
from mambalign.models.checkpoint import load_model, load_tokenizer
from mambalign.recipe import UserError
from mambalign.support import sha256_file

ADDED = ("scores", "ranking", "skipped")  # keys that scoring adds to a row


def best_device() -> str:
    """The accelerator, if there is one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Scorer:
    """A reward model with its tokenizer.

    max_tokens: bound of a forward pass; responses are cut into several passes at it, which changes no score beyond
    rounding. A response that is longer is a pass of its own.
    """

    model: Any
    tokenizer: Any
    max_tokens: int = 16384
    _read: ResponseTokenizer = field(init=False)

    def __post_init__(self) -> None:
        self._read = ResponseTokenizer(self.tokenizer, RewardInputs.from_config(self.model.config))
        self.model.eval()

    @classmethod
    def load(cls, path: str, *, device: str | None = None, dtype: str = "float32", max_tokens: int = 16384) -> Scorer:
        """The reward model in a folder or hub id, with the tokenizer beside it. Raises UserError."""
        model = load_model(path, head="reward", dtype=dtype, device=device or best_device())
        return cls(model, load_tokenizer(path), max_tokens)

    def read(self, prompt: Any, responses: Sequence[Any]) -> Responses:
        """Token ids of one row, for `score`; raises `Skip` where it cannot be read."""
        return self._read(prompt, responses)

    @torch.inference_mode()
    def score(self, rows: Sequence[Responses]) -> list[list[float]]:
        """The reward of every response of every row. A prompt is computed once for its responses.

        Raises:
            UserError: a reward is not finite.
        """
        scores: list[list[float]] = [[0.0] * len(row.endings) for row in rows]
        for part in self._passes(rows):
            groups = [(rows[r].prompt, [rows[r].endings[i] for i in which]) for r, which in part]
            batch = collate_responses(groups).to(self.model.device)
            output = self.model(
                input_ids=batch.input_ids[None], segments=batch.segments, positions=batch.last_positions
            )
            if not bool(output.logits.isfinite().all()):
                raise UserError(
                    "the reward model gives scores that are not finite; its weights are damaged or overflow"
                )
            rewards = iter(output.logits[:, 0].tolist())
            for r, which in part:
                for i in which:
                    scores[r][i] = next(rewards)
        return scores

    def _passes(self, rows: Sequence[Responses]) -> Iterator[list[tuple[int, list[int]]]]:
        """Forward passes of at most `max_tokens`, in order: (row, which of its responses)."""
        part: list[tuple[int, list[int]]] = []
        held = 0
        for r, row in enumerate(rows):
            which: list[int] = []
            for i, ending in enumerate(row.endings):
                cost = len(ending) + (0 if which else len(row.prompt))
                if held and held + cost > self.max_tokens:
                    yield [*part, (r, which)] if which else part
                    part, which, held = [], [], 0
                    cost = len(ending) + len(row.prompt)
                which.append(i)
                held += cost
            if which:
                part.append((r, which))
        if part:
            yield part


def score_file(
    model: str,
    source: Path,
    out: Path,
    *,
    device: str | None = None,
    dtype: str = "float32",
    max_tokens: int = 16384,
) -> dict[str, Any]:
    """Score every response of every row of `source`; returns the summary.

    `out` gets the rows of `source` in their order, each with `scores` (in the order of its responses; for `chosen` and
    `rejected` in this order) and `ranking` (their indices, best first). A row that cannot be read keeps its place, with
    `skipped` saying why. Rows stream: the file may be larger than memory. Interrupted, the same call goes on.

    Raises:
        UserError: what `source` holds is no such rows, or `model` is no reward model, or `out` is another result.
    """
    total = check_rows(source, ADDED, responses_of)
    made_from = {"model": model_fingerprint(model), "input": sha256_file(source), "dtype": dtype}
    journal = Journal(out, made_from)
    if journal.finished is not None:
        return journal.finished | {"finished_before": True}
    scorer = Scorer.load(model, device=device, dtype=dtype, max_tokens=max_tokens)
    tally = Tally()
    with journal, progress(total, journal.written, "scoring") as bar:
        tally.count(journal.earlier())
        rows = (row for number, (_, row) in enumerate(json_rows(source)) if number >= journal.written)
        for part in _read_parts(scorer, rows):
            scored = _scored(scorer, part)
            tally.count(scored)
            journal.write(scored)
            bar.update(len(scored))
        summary = tally.summary()
        journal.finish(summary)
    return summary


Part = list[tuple[dict[str, Any], Responses | Skip]]


def _read_parts(scorer: Scorer, rows: Iterator[dict[str, Any]]) -> Iterator[Part]:
    """Rows with their tokens, as many at a time as fill a forward pass."""
    part: Part = []
    held = 0
    for row in rows:
        item: Responses | Skip
        try:
            item = scorer.read(*responses_of(row, ""))
            held += len(item.prompt) + sum(map(len, item.endings))
        except Skip as skip:
            item = skip
        part.append((row, item))
        if held >= scorer.max_tokens or len(part) >= 1024:
            yield part
            part, held = [], 0
    if part:
        yield part


def _scored(scorer: Scorer, part: Part) -> list[dict[str, Any]]:
    scores = iter(scorer.score([item for _, item in part if isinstance(item, Responses)]))
    rows = []
    for row, item in part:
        if isinstance(item, Skip):
            rows.append({**row, "scores": None, "ranking": None, "skipped": item.sentence})
        else:
            values = next(scores)
            rows.append({**row, "scores": values, "ranking": sorted(range(len(values)), key=lambda i: -values[i])})
    return rows


@dataclass
class Tally:
    """Counts over scored rows; of `chosen` and `rejected` also how often they were ranked as people did, and how often
    the longer text alone would have been right."""

    rows: int = 0
    responses: int = 0
    skipped: int = 0
    right: dict[str, float] = field(default_factory=dict)
    pairs: dict[str, int] = field(default_factory=dict)

    def count(self, rows: Iterable[dict[str, Any]]) -> None:
        for row in rows:
            self.rows += 1
            if row["scores"] is None:
                self.skipped += 1
                continue
            self.responses += len(row["scores"])
            if "chosen" in row and "rejected" in row:
                chosen, rejected = row["scores"]
                self._pair(chosen, rejected, _length(row["chosen"]), _length(row["rejected"]))

    def _pair(self, chosen: float, rejected: float, length: int, other: int) -> None:
        order = "longer" if length > other else "shorter" if length < other else "as_long"
        measured = {
            "accuracy": _right(chosen, rejected),
            "accuracy_of_length_alone": _right(length, other),
            f"accuracy_where_chosen_is_{order}": _right(chosen, rejected),
        }
        for name, value in measured.items():
            self.right[name] = self.right.get(name, 0.0) + value
            self.pairs[name] = self.pairs.get(name, 0) + 1

    def summary(self) -> dict[str, Any]:
        shares = {name: round(value / self.pairs[name], 4) for name, value in self.right.items()}
        counts = {name.replace("accuracy_where", "pairs_where"): n for name, n in self.pairs.items() if "where" in name}
        return {"rows": self.rows, "responses": self.responses, "skipped": self.skipped} | shares | counts


def _right(chosen: float, rejected: float) -> float:
    return 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0


def _length(answer: Any) -> int:
    """Characters of an answer; of messages, those of the last."""
    return len(answer if isinstance(answer, str) else str((answer[-1] or {}).get("content")))
