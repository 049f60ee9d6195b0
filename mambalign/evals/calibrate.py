"""How far a judge can stand for another whose verdicts were published: the same texts, judged again and compared."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mambalign.data.json_rows import json_rows
from mambalign.evals import alpaca_eval, mt_bench
from mambalign.evals.data import find_data
from mambalign.evals.endpoint import Reply
from mambalign.evals.judge import Call
from mambalign.evals.judging import Asking, annotator_named, notes_on, read_verdict, write_whole
from mambalign.evals.mt_bench_scores import rating_of
from mambalign.evals.statistics import bootstrap_interval, clustered_mean, cohen_kappa, spearman
from mambalign.recipe import UserError

Kind = Literal["rating", "comparison"]
RESAMPLES = 1000
WORTHLESS, GOOD = 0.5, 0.7  # rank correlations: two samplings of GPT-4 itself have about 0.8 or more
SHIFT = 0.25  # of ratings: about what two judgings by GPT-4 differ by


@dataclass(frozen=True)
class Item:
    """One published verdict. published: a rating, or a comparison from -1 (what is named first is better) to 1.

    read: the verdict of new replies, one a call; None where it cannot be read. first: of replies, how often (0 to 1)
    what was shown first won, or None. published_first: the same of the published verdict. longer: characters by which
    what is named second is longer; of a rating, characters of the prompt.
    """

    kind: Kind
    cluster: str
    calls: tuple[Call, ...]
    published: float
    read: Callable[[Sequence[Reply]], float | None]
    longer: float
    judge: str
    first: Callable[[Sequence[Reply]], float | None] = lambda replies: None
    published_first: float | None = None


def sampled(
    files: Sequence[Path], *, n: int, seed: int, annotator: str | None = None, data_dir: Path | None = None
) -> list[Item]:
    """`n` published verdicts, or all where there are fewer, chosen by `seed` and nothing else.

    Raises:
        UserError: files that hold neither kind of judgments, or both; nothing in them that can be judged again.
    """
    items = [item for file in files for item in _items(file, annotator, data_dir)]
    kinds = {item.kind for item in items}
    if len(kinds) > 1:
        raise UserError("ratings and comparisons are calibrated apart: give files of one kind")
    if not items:
        raise UserError(f"{files[0]}: no published verdict that could be judged again")
    chosen = random.Random(seed).sample(range(len(items)), min(n, len(items)))
    return [items[i] for i in sorted(chosen)]


def calls_of(items: Sequence[Item]) -> list[Call]:
    """In their order."""
    return [call for item in items for call in item.calls]


def calibrate(items: Sequence[Item], asking: Asking, out: Path) -> dict[str, Any]:
    """Judge the items again; the report, which is written to `out`/<judge>.calibration.json too.

    Raises:
        UserError: see `Judge.ask`.
    """
    asked = asking.ask(calls_of(items), "calibrating")
    replies = iter(asked.outcome.replies)
    pairs: list[tuple[Item, float, float | None]] = []
    missing = unread = 0
    for item in items:
        there = [reply for reply in (next(replies) for _ in item.calls) if reply]
        if len(there) < len(item.calls):
            missing += 1
        elif (value := item.read(there)) is None:
            unread += 1
        else:
            pairs.append((item, value, item.first(there)))
    numbers = _known(_numbers(pairs)) if pairs else {}
    report = {
        "judge": asking.endpoint.name,
        "published_judge": ", ".join(sorted({item.judge for item in items})),
        "kind": items[0].kind,
        "wanted": len(items),
        "compared": len(pairs),
        "unread": unread,
        "missing": missing,
        "why_missing": next(iter(asked.outcome.failures.values()), ""),
        "stopped": asked.outcome.stopped,
        "numbers": numbers,
        "notes": notes_on(asking, asked, [reply for reply in asked.outcome.replies if reply]),
        "spent": asked.spent,
    }
    report["verdict"] = verdict(report)
    write_whole(out / f"{asking.endpoint.file_name}.calibration.json", json.dumps(report, indent=2) + "\n")
    return report


def verdict(report: dict[str, Any]) -> str:
    """The report in plain words."""
    judge, theirs, n = report["judge"], report["published_judge"], report["compared"]
    if n < 2:
        return f"{judge} gave {n} verdicts that could be compared: nothing can be said."
    rank = report["numbers"]["rank_correlation"]
    said = f"On {n} verdicts of {theirs}, {judge} has a rank correlation of {in_words(rank)}"
    if report["kind"] == "rating":
        bias = report["numbers"]["bias"]
        said += f" and rates {abs(bias['value']):.2f} {'higher' if bias['value'] > 0 else 'lower'}"
        said += f" (difference {_written(bias['low'], '+.2f')} to {_written(bias['high'], '+.2f')})."
        shifted = abs(bias["value"]) > SHIFT and (bias["low"] or 0) * (bias["high"] or 0) > 0
    else:
        agreement = report["numbers"]["agreement_without_ties"]
        said += f" and agrees on {in_words(agreement)} of what neither calls a tie."
        bias = report["numbers"]["win_rate_bias"]
        shifted = (bias["low"] or 0) * (bias["high"] or 0) > 0
    if (rank["value"] or 0) < WORTHLESS or (rank["low"] or 0) <= 0:
        return f"{said} It does not order answers as {theirs} does; do not use it in its place."
    if rank["low"] < GOOD:
        said += f" It orders answers somewhat as {theirs} does; read differences between models with care."
    else:
        said += f" It orders answers much as {theirs} does."
    if shifted:
        said += " Its scale is shifted: compare its numbers only with its own."
    return said


def in_words(value: Any) -> str:
    """A number, with its interval where it has one."""
    if not isinstance(value, dict):
        return str(value) if isinstance(value, int) else _written(value, ".3g")
    found, low, high = (_written(value[name], ".3f") for name in ("value", "low", "high"))
    return f"{found} ({low} to {high})"


def _written(value: float | None, shape: str) -> str:
    return "unknown" if value is None else format(value, shape)


# Published verdicts -------------------------------------------------------------------------------------------------


def _items(file: Path, annotator: str | None, data_dir: Path | None) -> list[Item]:
    first = next(json_rows(file), (0, {}))[1]
    if "instruction" in first:
        return _annotations(file, annotator, data_dir)
    if "score" in first or "g1_judgment" in first:
        prompts = mt_bench.load_judge_prompts(find_data("mt-bench judge prompts", data_dir))
        rows = [(f"{file}:{line}", row) for line, row in json_rows(file)]
        found = []
        for where, row in rows:
            try:
                found.append(_rating(where, row, prompts) if "score" in row else _pair(where, row, prompts))
            except KeyError as error:
                raise UserError(f"{where}: the judgment lacks {error}") from error
        return [item for item in found if item]
    raise UserError(
        f"{file}: neither FastChat's judgments (score, g1_judgment) nor alpaca_eval's annotations (instruction)"
    )


def _prompt(where: str, row: dict[str, Any], prompts: dict[str, mt_bench.JudgePrompt]) -> mt_bench.JudgePrompt:
    judge = row.get("judge")
    if not isinstance(judge, list) or len(judge) != 2 or judge[1] not in prompts:
        raise UserError(f"{where}: judge must be [model, one of {', '.join(prompts)}], this is {judge!r}")
    return prompts[judge[1]]


def _call(prompt: mt_bench.JudgePrompt, user_prompt: str, readable: Callable[[str], bool]) -> Call:
    messages = ({"role": "system", "content": prompt.system_prompt}, {"role": "user", "content": user_prompt})
    told = mt_bench.JUDGE_PARAMETERS
    return Call(messages, told["max_tokens"], told["temperature"], verdict=readable)


def _rating(where: str, row: dict[str, Any], prompts: dict[str, mt_bench.JudgePrompt]) -> Item | None:
    published = rating_of(row)
    if published == mt_bench.UNPARSED:
        return None
    prompt = _prompt(where, row, prompts)

    def read(replies: Sequence[Reply]) -> float | None:
        rating = mt_bench.parse_rating(replies[0].text)
        return None if rating == mt_bench.UNPARSED else float(rating)

    call = _call(prompt, row["user_prompt"], lambda text: mt_bench.parse_rating(text) != mt_bench.UNPARSED)
    cluster, length = str(row["question_id"]), float(len(row["user_prompt"]))
    return Item("rating", cluster, (call,), float(published), read, length, row["judge"][0])


_SIDES = {"model_1": -1.0, "model_2": 1.0, "tie": 0.0}


def _pair(where: str, row: dict[str, Any], prompts: dict[str, mt_bench.JudgePrompt]) -> Item | None:
    published = _both(row["g1_winner"], row["g2_winner"])
    if published is None:
        return None
    prompt = _prompt(where, row, prompts)
    shape = prompt.output_format

    def winners(replies: Sequence[Reply]) -> tuple[str, str]:
        one, two = (mt_bench.parse_verdict(reply.text, shape) for reply in replies)
        return mt_bench.pair_winners(one, two)

    def readable(text: str) -> bool:
        return mt_bench.parse_verdict(text, shape) != "error"

    calls = tuple(_call(prompt, row[f"{game}_user_prompt"], readable) for game in ("g1", "g2"))
    return Item(
        "comparison",
        str(row["question_id"]),
        calls,
        published,
        lambda replies: _both(*winners(replies)),
        float(_shown(row["g1_user_prompt"], "B") - _shown(row["g1_user_prompt"], "A")),
        row["judge"][0],
        lambda replies: _first(*winners(replies)),
        _first(row["g1_winner"], row["g2_winner"]),
    )


def _both(one: str, two: str) -> float | None:
    """FastChat's reading of both games: a tie unless they agree."""
    if one not in _SIDES or two not in _SIDES:
        return None
    return _SIDES[one] if one == two else 0.0


def _first(one: str, two: str) -> float | None:
    """How often what was shown first won, ties counting half: model_1 in the first game, model_2 in the second."""
    if one not in _SIDES or two not in _SIDES:
        return None
    return ((1 - _SIDES[one]) + (1 + _SIDES[two])) / 4


def _shown(prompt: str, side: str) -> int:
    """Characters of what an assistant is shown with."""
    block = re.search(rf"The Start of Assistant {side}'s.*The End of Assistant {side}'s", prompt, re.DOTALL)
    return len(block.group()) if block else 0


def _annotations(file: Path, annotator: str | None, data_dir: Path | None) -> list[Item]:
    rows = {row["instruction"]: row for row in alpaca_eval.load_annotations(file)}
    named = {str(row.get("annotator")) for row in rows.values()}
    if annotator is None and len(named) > 1:
        raise UserError(f"{file}: of several annotators ({', '.join(sorted(named))}); say which with --annotator")
    how = annotator_named(annotator or named.pop())
    template = find_data(how.prompt, data_dir).read_text(encoding="utf-8")
    sides = []
    for side in ("1", "2"):
        sides.append(
            [
                alpaca_eval.Output(text, row.get(f"output_{side}") or "", str(row.get(f"generator_{side}")))
                for text, row in rows.items()
            ]
        )
    items = []
    for one in alpaca_eval.comparisons(sides[0], sides[1], how, template, parity=True):
        row = rows[one.output.instruction]
        if one.decided is None and row["preference"] is not None:
            items.append(_annotation(one, row["preference"], str(row.get("annotator"))))
    return items


def _annotation(one: alpaca_eval.Comparison, preference: float, judge: str) -> Item:
    told = one.annotator.parameters

    def shown(replies: Sequence[Reply]) -> float | None:
        return read_verdict(one.annotator, replies[0].text, replies[0].top_logprobs)

    def read(replies: Sequence[Reply]) -> float | None:
        found = alpaca_eval.unswitch(shown(replies), one.switched)
        return None if found is None else 2 * found - 3

    def first(replies: Sequence[Reply]) -> float | None:
        found = shown(replies)
        return None if found is None else 2 - found

    call = Call(
        tuple(one.messages),
        told["max_tokens"],
        told["temperature"],
        told.get("top_logprobs"),
        verdict=lambda text: read_verdict(one.annotator, text, None) is not None,
    )
    there = alpaca_eval.unswitch(preference, one.switched)
    return Item(
        "comparison",
        one.output.instruction,
        (call,),
        2 * preference - 3,
        read,
        float(len(one.output.output) - len(one.reference.output)),
        judge,
        first,
        None if there is None else 2 - there,
    )


# Numbers ------------------------------------------------------------------------------------------------------------


def _numbers(pairs: Sequence[tuple[Item, float, float | None]]) -> dict[str, Any]:
    clusters = [item.cluster for item, _, _ in pairs]
    theirs, ours = [item.published for item, _, _ in pairs], [value for _, value, _ in pairs]
    lengths = [item.longer for item, _, _ in pairs]
    rank = _interval_of_pairs(spearman, theirs, ours, clusters)
    if pairs[0][0].kind == "rating":
        return {
            "mean_published": float(np.mean(theirs)),
            "mean": float(np.mean(ours)),
            "bias": _mean([b - a for a, b in zip(theirs, ours, strict=True)], clusters),
            "mean_absolute_difference": _mean([abs(b - a) for a, b in zip(theirs, ours, strict=True)], clusters),
            "same_rating": _share([a == b for a, b in zip(theirs, ours, strict=True)], clusters),
            "within_one": _share([abs(a - b) <= 1 for a, b in zip(theirs, ours, strict=True)], clusters),
            "kappa_quadratic": cohen_kappa(theirs, ours, weights="quadratic"),
            "rank_correlation": rank,
            "length_bias": _interval_of_pairs(
                spearman, lengths, [b - a for a, b in zip(theirs, ours, strict=True)], clusters
            ),
        }
    signs = [(_sign(a), _sign(b)) for a, b in zip(theirs, ours, strict=True)]
    decided = [(c, a == b) for c, (a, b) in zip(clusters, signs, strict=True) if a and b]
    longer = [
        (c, _sign(a), _sign(b), _sign(n)) for c, a, b, n in zip(clusters, theirs, ours, lengths, strict=True) if n
    ]
    numbers = {
        "win_rate_published": 50 + 50 * float(np.mean(theirs)),
        "win_rate": 50 + 50 * float(np.mean(ours)),
        "win_rate_bias": _mean([50 * (b - a) for a, b in zip(theirs, ours, strict=True)], clusters),
        "agreement": _share([a == b for a, b in signs], clusters),
        "agreement_without_ties": _share([same for _, same in decided], [c for c, _ in decided]),
        "ties_published": sum(not a for a, _ in signs),
        "ties": sum(not b for _, b in signs),
        "kappa": cohen_kappa([a for a, _ in signs], [b for _, b in signs]),
        "rank_correlation": rank,
        "prefers_longer_published": _share([(a * n + 1) / 2 for _, a, _, n in longer], [one[0] for one in longer]),
        "prefers_longer": _share([(b * n + 1) / 2 for _, _, b, n in longer], [one[0] for one in longer]),
    }
    placed = [(item.cluster, item.published_first, first) for item, _, first in pairs if first is not None]
    numbers["prefers_first_published"] = _share([a for _, a, _ in placed if a is not None], [c for c, *_ in placed])
    numbers["prefers_first"] = _share([b for _, _, b in placed], [c for c, *_ in placed])
    return numbers


def _known(value: Any) -> Any:
    """None for every nan, which JSON lacks."""
    if isinstance(value, dict):
        return {name: _known(each) for name, each in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _mean(values: Sequence[float], clusters: Sequence[str]) -> dict[str, float]:
    """With Student's 95 % interval over clusters."""
    estimate = clustered_mean(values, clusters)
    low, high = estimate.interval()
    return {"value": estimate.mean, "low": low, "high": high}


def _share(values: Sequence[float], clusters: Sequence[str]) -> dict[str, float]:
    """With a bootstrap interval, which stays within 0 and 1."""
    low, high = bootstrap_interval([float(value) for value in values], clusters, resamples=RESAMPLES)
    return {"value": float(np.mean(values)) if values else math.nan, "low": low, "high": high}


def _interval_of_pairs(
    of: Callable[[Sequence[float], Sequence[float]], float],
    a: Sequence[float],
    b: Sequence[float],
    clusters: Sequence[str],
) -> dict[str, float]:
    """`of(a, b)` with a percentile interval from resampled clusters."""
    members: dict[str, list[int]] = {}
    for i, cluster in enumerate(clusters):
        members.setdefault(cluster, []).append(i)
    groups, x, y = list(members.values()), np.asarray(a), np.asarray(b)
    generator, found = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = [i for g in generator.integers(len(groups), size=len(groups)) for i in groups[g]]
        value = of(x[drawn].tolist(), y[drawn].tolist())
        if not math.isnan(value):
            found.append(value)
    low, high = np.quantile(found, [0.025, 0.975]) if found else (math.nan, math.nan)
    return {"value": of(a, b), "low": float(low), "high": float(high)}
