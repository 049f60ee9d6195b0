"""Best-of-n sampling: of n answers that a policy gives, the one that a reward model likes best (arXiv 2112.09332)."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mambalign.data.chat import check_template, encode_prompt, template_roles
from mambalign.data.json_rows import json_rows
from mambalign.data.rows import ChatRules, Skip
from mambalign.data.sources import plain_message
from mambalign.generation.journal import (
    Journal,
    check_rows,
    model_fingerprint,
    progress,
)
from mambalign.generation.sampling import Sampling, sample
from mambalign.generation.scoring import Scorer, best_device
from mambalign.models import files
from mambalign.models.checkpoint import load_model, load_tokenizer
from mambalign.recipe import UserError

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
        UserError: a model is of the wrong kind, a row has no prompt, or `out` is another result.
    """
    total = check_rows(source, ADDED, _prompt)
    models = {"policy": model_fingerprint(policy), "reward": model_fingerprint(reward)}
    journal = Journal(out, models | {"input": files.sha256_file(source), "dtype": dtype} | asdict(sampling))
    if journal.finished is not None:
        return journal.finished | {"finished_before": True}
    model = load_model(policy, dtype=dtype, device=device or best_device()).eval()
    tokenizer = load_tokenizer(policy)
    check_template(tokenizer)
    scorer = Scorer.load(reward, device=device, dtype=dtype)
    rules = ChatRules(template_roles(tokenizer), None, True)
    with journal, progress(total, journal.written, f"best of {sampling.n}") as bar:
        tally = _Tally()
        for row in journal.earlier():
            tally.count(row)
        for number, (_, row) in enumerate(json_rows(source)):
            if number >= journal.written:
                answered = _answered(row, model, tokenizer, scorer, rules, sampling)
                tally.count(answered)
                journal.write([answered])
                bar.update(1)
        journal.finish(tally.summary())
    return tally.summary()


def _prompt(row: dict[str, Any], where: str) -> Any:
    given = [row[name] for name in ("prompt", "messages") if name in row]
    if len(given) != 1 or not isinstance(given[0], str | list) or not given[0]:
        raise UserError(f"{where}: a row needs one `prompt` (text or messages) or `messages`; it has {', '.join(row)}")
    return given[0]


def _answered(
    row: dict[str, Any], model: Any, tokenizer: Any, scorer: Scorer, rules: ChatRules, sampling: Sampling
) -> dict[str, Any]:
    prompt = _prompt(row, "")
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    try:
        turns = rules.read(rules.as_messages([*map(plain_message, messages)], "user"), needs_answer=False)
        if turns[-1]["role"] == "assistant":
            raise Skip("nothing_asked")
        samples = sample(model, tokenizer, encode_prompt(tokenizer, turns), sampling)
        (scores,) = scorer.score([scorer.read(turns, [answer.text for answer in samples])])
    except Skip as skip:
        return {**row, "best": None, "candidates": [], "skipped": skip.sentence}
    order = sorted(range(len(samples)), key=lambda i: -scores[i])
    candidates = [{"text": samples[i].text, "score": scores[i], "finished": samples[i].finished} for i in order]
    return {**row, "best": candidates[0]["text"], "candidates": candidates}


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
