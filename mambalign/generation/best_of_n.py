"""Best-of-n sampling: of n answers that a policy gives, the one that a reward model likes best (arXiv 2112.09332)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from mambalign.data.chat import check_template, encode_prompt, template_roles
from mambalign.data.json_rows import json_rows
from mambalign.data.rows import ChatRules, Skip
from mambalign.data.sources import plain_message
from mambalign.generation.engine import Engine
from mambalign.generation.journal import (
    Journal,
    check_rows,
    model_fingerprint,
    progress,
)
from mambalign.generation.requests import Completion, Request, Sampling
from mambalign.generation.scoring import Scorer
from mambalign.recipe import UserError
from mambalign.support import sha256_file

ADDED = ("best", "candidates", "skipped")  # keys that are added to a row


def best_of_n(
    policy: str,
    reward: str,
    source: Path,
    out: Path,
    sampling: Sampling,
    *,
    device: str | None = None,
    dtype: str = "float32",
) -> dict[str, Any]:
    """Answer every prompt of `source` n times with `policy` and choose by `reward`; returns the summary.

    Rows hold `prompt` (text, or messages) or `messages`. `out` gets them in their order, each with `best` (text) and
    `candidates`: text, score, and whether the policy finished it, best first. Prompts are written in the policy's own
    chat template, scores read in the reward model's. Interrupted, the same call goes on, and gives the same answers.

    Raises:
        UserError: a model is of the wrong kind, a row has no prompt, all answers to one would be the same, or `out` is
            another result.
    """
    if sampling.temperature == 0 and sampling.n > 1:
        raise UserError(f"temperature: {sampling.temperature} must be above 0; at 0 all answers would be the same")
    total = check_rows(source, ADDED, _prompt)
    models = {"policy": model_fingerprint(policy), "reward": model_fingerprint(reward)}
    journal = Journal(out, models | {"input": sha256_file(source), "dtype": dtype} | asdict(sampling))
    if journal.finished is not None:
        return journal.finished | {"finished_before": True}
    engine = Engine.load(policy, device=device, dtype=dtype)
    check_template(engine.tokenizer)
    scorer = Scorer.load(reward, device=device, dtype=dtype)
    together = max(1, 2 * engine.slots // sampling.n)  # prompts: enough that slots are rarely empty
    with journal, progress(total, journal.written, f"best of {sampling.n}") as bar:
        tally = _Tally()
        for row in journal.earlier():
            tally.count(row)
        rows = (row for number, (_, row) in enumerate(json_rows(source)) if number >= journal.written)
        while part := list(islice(rows, together)):
            answered = _answered(part, engine, scorer, sampling)
            for row in answered:
                tally.count(row)
            journal.write(answered)
            bar.update(len(answered))
        journal.finish(tally.summary())
    return tally.summary()


def _prompt(row: dict[str, Any], where: str) -> Any:
    given = [row[name] for name in ("prompt", "messages") if name in row]
    if len(given) != 1 or not isinstance(given[0], str | list) or not given[0]:
        raise UserError(f"{where}: a row needs one `prompt` (text or messages) or `messages`; it has {', '.join(row)}")
    return given[0]


def _answered(rows: list[dict[str, Any]], engine: Engine, scorer: Scorer, sampling: Sampling) -> list[dict[str, Any]]:
    read = [_turns(row, engine.tokenizer) for row in rows]
    asked = [turns for turns in read if not isinstance(turns, Skip)]
    requests = [Request(tuple(encode_prompt(engine.tokenizer, turns)), sampling) for turns in asked]
    answers = iter(engine.generate(requests))
    return [
        _skipped(row, turns) if isinstance(turns, Skip) else _ranked(row, turns, next(answers), scorer)
        for row, turns in zip(rows, read, strict=True)
    ]


def _turns(row: dict[str, Any], tokenizer: Any) -> list[dict[str, str]] | Skip:
    prompt = _prompt(row, "")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    rules = ChatRules(template_roles(tokenizer), None, True)
    try:
        turns = rules.read(rules.as_messages([*map(plain_message, messages)], "user"), needs_answer=False)
        return Skip("nothing_asked") if turns[-1]["role"] == "assistant" else turns
    except Skip as skip:
        return skip


def _ranked(row: dict[str, Any], turns: Any, answers: list[Completion], scorer: Scorer) -> dict[str, Any]:
    try:
        (scores,) = scorer.score([scorer.read(turns, [answer.text for answer in answers])])
    except Skip as skip:
        return _skipped(row, skip)
    order = sorted(range(len(answers)), key=lambda i: -scores[i])
    candidates = [
        {"text": answers[i].text, "score": scores[i], "finished": answers[i].finish_reason == "stop"} for i in order
    ]
    return {**row, "best": candidates[0]["text"], "candidates": candidates}


def _skipped(row: dict[str, Any], skip: Skip) -> dict[str, Any]:
    return {**row, "best": None, "candidates": [], "skipped": skip.sentence}


@dataclass
class _Tally:
    rows: int = 0
    skipped: int = 0
    candidates: int = 0
    cut_at_max_new_tokens: int = 0
    scores: float = 0.0
    best_scores: float = 0.0

    def count(self, row: dict[str, Any]) -> None:
        self.rows += 1
        self.skipped += not row["candidates"]
        for place, candidate in enumerate(row["candidates"]):
            self.candidates += 1
            self.cut_at_max_new_tokens += not candidate["finished"]
            self.scores += candidate["score"]
            self.best_scores += 0.0 if place else candidate["score"]

    def summary(self) -> dict[str, Any]:
        counts = asdict(self)
        scores, best = counts.pop("scores"), counts.pop("best_scores")
        if not self.candidates:
            return counts
        means = {"mean_score": scores / self.candidates, "mean_score_of_the_best": best / (self.rows - self.skipped)}
        return counts | {name: round(value, 4) for name, value in means.items()}
