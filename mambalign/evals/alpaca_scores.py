"""AlpacaEval's numbers of one annotations file, and what they hide: missing rows, unread verdicts, length."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mambalign.evals.alpaca_eval import N_INSTRUCTIONS, Output, avg_length, leaderboard_text, metrics
from mambalign.evals.length_control import Gamed, difficulties, length_controlled
from mambalign.evals.statistics import bootstrap_interval
from mambalign.recipe import UserError


def summarize(
    annotations: Sequence[Mapping[str, Any]],
    instructions: Sequence[str] | None = None,
    gamed: Gamed | None = None,
    *,
    outputs: Sequence[Output] | None = None,
    positional: bool = False,
) -> dict[str, Any]:
    """The seven metrics of rows as `load_annotations` reads them, all of one model, with what belongs beside them.

    avg_length is of `outputs` (the model's; else of the rows) over all `instructions` (without them, 805 if the
    file has more than 700 rows, else its rows). if_unparsed_lost and _won: the win rate if every verdict that could
    not be read had been that. interval: of the win rate, 95 %, BCa bootstrap over instructions. datasets: win rate and
    number by subset. n_missing: instructions without a row; `final` is whether none is. gamed: adds the
    length-controlled win rate (see `length_control`).

    Raises:
        UserError: rows of two models, references or annotators, an instruction twice, or one that is not asked.
    """
    about = {key: _only(annotations, key) for key in ("generator_1", "generator_2", "annotator")}
    asked = [row["instruction"] for row in annotations]
    if len(set(asked)) < len(asked):
        twice = next(each for i, each in enumerate(asked) if each in asked[:i])
        raise UserError(f"the instruction {twice[:60]!r} is annotated twice; keep one of its rows")
    wanted = set(instructions) if instructions is not None else set(asked)
    stray = [each for each in asked if each not in wanted]
    if stray:
        raise UserError(f"{len(stray)} annotations are of other instructions, such as {stray[0][:60]!r}")
    n = len(wanted) if instructions is not None else N_INSTRUCTIONS if len(asked) > 700 else len(asked)
    numbers = metrics(row["preference"] for row in annotations)
    x = [row["preference"] - 1 for row in annotations if row["preference"] is not None]
    unread = len(annotations) - len(x)
    low, high = ((100 * (math.fsum(x) + won) / len(annotations) if annotations else math.nan) for won in (0, unread))
    own = [row.get("output_2") or "" for row in annotations]
    reference = [row.get("output_1") or "" for row in annotations]
    summary: dict[str, Any] = {
        "benchmark": "AlpacaEval",
        "model": about["generator_2"],
        "reference": about["generator_1"],
        "judge": about["annotator"],
        **{key: None if isinstance(value, float) and math.isnan(value) else value for key, value in numbers.items()},
        "interval": [100 * end for end in bootstrap_interval(x)] if len(x) > 1 else None,
        "avg_length": avg_length(own if outputs is None else [each.output for each in outputs], n),
        "reference_length": avg_length(reference, n),
        "n_unparsed": unread,
        "if_unparsed_lost": low,
        "if_unparsed_won": high,
        "n_missing": n - len(annotations),
        "n_empty": sum(not text.strip() for text in own),
        "datasets": _by_dataset(annotations),
        "final": n <= len(annotations),
    }
    if gamed is not None:
        summary |= _controlled(annotations, instructions, gamed, positional)
    return summary


def leaderboard_of(results: Sequence[Mapping[str, Any]]) -> str:
    """leaderboard.csv of the summaries that are final. It has no column for a judge, so all must be of one.

    Raises:
        UserError: several judges or references, or a model twice.
    """
    for key in ("judge", "reference"):
        found = sorted({str(result[key]) for result in results})
        if len(found) > 1:
            raise UserError(f"--leaderboard: its table names no {key}, so it is of one, not of {' and '.join(found)}")
    rows = {str(result["model"]): result for result in results}
    if len(rows) < len(results):
        raise UserError("--leaderboard: a model is there twice; give one file a model")
    return leaderboard_text({name: row for name, row in rows.items() if row["final"]})


def notes(result: Mapping[str, Any]) -> list[str]:
    """What stands below a table of AlpacaEval's win rates."""
    said = list(result.get("lc_warnings", ()))
    if result["n_missing"]:
        said.append(f"NOT FINAL: {result['n_missing']} instructions have no verdict")
    if result["n_unparsed"]:
        low, high = (f"{result[key]:.3f}" for key in ("if_unparsed_lost", "if_unparsed_won"))
        said.append(f"{result['n_unparsed']} verdicts could not be read and are left out; lost or won: {low} to {high}")
    if result["n_empty"]:
        said.append(f"{result['n_empty']} outputs are empty")
    return said


def _controlled(
    annotations: Sequence[Mapping[str, Any]], instructions: Sequence[str] | None, gamed: Gamed, positional: bool
) -> dict[str, Any]:
    if instructions is None and not positional:
        raise UserError("length control joins difficulties by instruction, so it needs the benchmark's instructions")
    hard = difficulties(annotations, instructions or (), gamed.difficulties(), positional=positional)
    controlled = length_controlled(annotations, hard, gamed)
    notes = [*controlled.warnings, *(["difficulties are joined by position, for parity only"] if positional else [])]
    return {
        "length_controlled_winrate": controlled.win_rate,
        "lc_standard_error": None if math.isnan(controlled.standard_error) else controlled.standard_error,
        "lc_C": controlled.C,
        "lc_warnings": notes,
    }


def _only(annotations: Sequence[Mapping[str, Any]], key: str) -> str:
    found = {str(row.get(key)) for row in annotations}
    if len(found) > 1:
        raise UserError(
            f"the annotations are of several: {key} is {' and '.join(sorted(found)[:3])}; give one's at a time"
        )
    return found.pop() if found else "unknown"


def _by_dataset(annotations: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float | int]]:
    groups: dict[str, list[float]] = {}
    for row in annotations:
        if row["preference"] is not None:
            groups.setdefault(str(row.get("dataset") or "unnamed"), []).append(row["preference"] - 1)
    return {name: {"win_rate": 100 * float(np.mean(x)), "n": len(x)} for name, x in sorted(groups.items())}
