"""Two models' verdicts side by side: paired differences, with tests, by category, and how much longer one writes.

Pairs are questions: two turns of one question are not independent, and a question that one side lacks is in no number.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mambalign.data.json_rows import json_rows
from mambalign.evals import alpaca_eval, mt_bench_scores
from mambalign.evals.mt_bench import Answer, Question
from mambalign.evals.mt_bench_scores import FAILED_VERDICT, category_of
from mambalign.evals.report import Page, interval, judge_warnings, number, table
from mambalign.evals.statistics import paired_test, wins
from mambalign.recipe import UserError

Key = int | str


@dataclass(frozen=True)
class Side:
    """One model's verdicts by one judge. scores: question -> its verdicts; lengths: question -> characters of each
    answer. places: every (question, turn) that has a verdict. orders: pairwise only, the share of matches in which
    swapping the answers changed nothing. unread: verdicts that hold no score."""

    file: str
    benchmark: str
    unit: str
    model: str
    judge: str
    against: str | None
    scores: Mapping[Key, list[float]]
    categories: Mapping[Key, str]
    lengths: Mapping[Key, list[int]] = field(default_factory=dict)
    places: frozenset[tuple[Key, int]] = frozenset()
    orders: float | None = None
    unread: int = 0


def load_side(
    path: Path,
    model: str | None = None,
    questions: Sequence[Question] | None = None,
    answers: Mapping[str, Mapping[int, Answer]] | None = None,
) -> Side:
    """A file of judgments or annotations; what it is, its rows say. model: which of several in it.

    Raises:
        UserError: it holds several models or judges and `model` does not choose; it has none of that name.
    """
    first = next((row for _, row in json_rows(path)), {})
    if "instruction" in first:
        return _alpaca_side(path, model)
    by_id = None if questions is None else {question.question_id: question for question in questions}
    return (_pair_side if "model_1" in first else _single_side)(path, model, by_id, answers or {})


def _single_side(
    path: Path,
    model: str | None,
    questions: Mapping[int, Question] | None,
    answers: Mapping[str, Mapping[int, Answer]],
) -> Side:
    rows = mt_bench_scores.load_judgments(path)
    model = _chosen(path, model, [j.model for j in rows])
    rows = [j for j in rows if j.model == model]
    judge = _one_judge(path, [j.judge for j in rows])
    return Side(
        str(path), "MT-Bench, single answers", "rating (1 to 10)", model, judge, None,
        {number: scores for number, scores in mt_bench_scores.question_scores(rows).items()},
        {j.question_id: category_of(j.question_id, questions) for j in rows},
        _lengths(answers.get(model, {})),
        frozenset((j.question_id, j.turn) for j in rows if not j.failed),
        unread=sum(not j.parsed for j in rows),
    )  # fmt: skip


def _pair_side(
    path: Path,
    model: str | None,
    questions: Mapping[int, Question] | None,
    answers: Mapping[str, Mapping[int, Answer]],
) -> Side:
    rows = mt_bench_scores.load_pair_judgments(path)
    model = _chosen(path, model, [j.models[0] for j in rows], [name for j in rows for name in j.models])
    rows = [j for j in rows if model in j.models]
    judge = _one_judge(path, [j.judge for j in rows])
    others = sorted({name for j in rows for name in j.models} - {model})
    if len(others) > 1:
        raise UserError(f"{path}: {model} meets {' and '.join(others)}; a comparison needs one opponent on both sides")
    read = [j for j in rows if j.winner != FAILED_VERDICT]
    scores: dict[Key, list[float]] = {}
    for j in read:
        scores.setdefault(j.question_id, []).append(0.5 if j.winner == "tie" else float(j.winner == model))
    return Side(
        str(path), "MT-Bench, pairwise", "win 1, tie 0.5, loss 0", model, judge, others[0], scores,
        {j.question_id: category_of(j.question_id, questions) for j in rows},
        _lengths(answers.get(model, {})),
        frozenset((j.question_id, j.turn) for j in read),
        orders=sum(j.g1_winner == j.g2_winner for j in read) / len(read) if read else None,
        unread=len(rows) - len(read),
    )  # fmt: skip


def _alpaca_side(path: Path, model: str | None) -> Side:
    rows = alpaca_eval.load_annotations(path)
    model = _chosen(path, model, [str(row.get("generator_2")) for row in rows])
    rows = [row for row in rows if str(row.get("generator_2")) == model]
    judge = _one_judge(path, [str(row.get("annotator")) for row in rows])
    references = sorted({str(row.get("generator_1")) for row in rows})
    if len(references) > 1:
        raise UserError(f"{path}: annotations against {' and '.join(references)}; a comparison needs one reference")
    return Side(
        str(path), "AlpacaEval", "preference for the model (0 to 1)", model, judge, references[0],
        {row["instruction"]: [row["preference"] - 1] for row in rows if row["preference"] is not None},
        {row["instruction"]: str(row.get("dataset") or "unnamed") for row in rows},
        {row["instruction"]: [len(row.get("output_2") or "")] for row in rows},
        frozenset((row["instruction"], 1) for row in rows),
        unread=sum(row["preference"] is None for row in rows),
    )  # fmt: skip


def _chosen(path: Path, wanted: str | None, usual: Sequence[str], known: Sequence[str] | None = None) -> str:
    """`wanted`, which is in the file; else the only one of `usual`."""
    names = sorted(set(usual))
    everyone = sorted(set(known or usual))
    if wanted is not None:
        if wanted not in everyone:
            raise UserError(f"{path} has no verdicts on {wanted!r}; it has those on {', '.join(everyone)}")
        return wanted
    if len(names) > 1:
        raise UserError(f"{path} has verdicts on {', '.join(names)}; choose with --model-a or --model-b")
    return names[0]


def _one_judge(path: Path, judges: Sequence[str]) -> str:
    names = sorted(set(judges))
    if len(names) > 1:
        raise UserError(f"{path} has verdicts by {' and '.join(names)}; a comparison needs one judge a side")
    return names[0]


def _lengths(answers: Mapping[int, Answer]) -> dict[Key, list[int]]:
    return {number: [len(turn) for turn in answer.turns] for number, answer in answers.items()}


def compare(
    a: Side,
    b: Side,
    *,
    expected: Sequence[Key] | None = None,
    different_judges: bool = False,
) -> dict[str, Any]:
    """b less a, over the questions that both have.

    difference: mean over questions of b's mean verdict less a's, `standard_error`, 95 % `interval` (Student's t), and
    both paired tests (`statistics.paired_test`). wins: questions on which b is above a, below, or equal; likewise in
    `categories`. length: of the answers in characters, None where unknown. expected: the benchmark's questions; `final`
    is whether both sides have verdicts on all of them, or without it on the same ones.

    Raises:
        UserError: two benchmarks or opponents, nothing in common, or two judges without `different_judges`.
    """
    if a.benchmark != b.benchmark:
        raise UserError(f"{a.file} is {a.benchmark} and {b.file} is {b.benchmark}; compare files of one kind")
    if a.against != b.against:
        raise UserError(f"{a.model} was judged against {a.against}, {b.model} against {b.against}: no comparison")
    if a.judge != b.judge and not different_judges:
        raise UserError(
            f"{a.model} was judged by {a.judge}, {b.model} by {b.judge}: their difference is also the judges'. Have "
            "one judge both, or say --different-judges to have it computed and labelled"
        )
    both = [key for key in a.scores if key in b.scores]
    if not both:
        raise UserError(f"{a.file} and {b.file} have no question in common that both have a verdict on")
    mean_a, mean_b = _means(a.scores), _means(b.scores)
    groups: dict[str, list[Key]] = {}
    for key in both:
        groups.setdefault(a.categories.get(key, "other"), []).append(key)
    missing = {side: _missing(one, other, expected) for side, one, other in (("a", a, b), ("b", b, a))}
    return {
        "benchmark": a.benchmark,
        "unit": a.unit,
        "a": _about(a),
        "b": _about(b),
        "judges": list(dict.fromkeys((a.judge, b.judge))),
        "same_judge": a.judge == b.judge,
        "against": a.against,
        "n_questions": len(both),
        "n_unpaired": len(a.scores) + len(b.scores) - 2 * len(both),
        "missing": missing,
        "final": not any(missing.values()),
        "checked": expected is not None,
        "mean_a": math.fsum(mean_a[key] for key in both) / len(both),
        "mean_b": math.fsum(mean_b[key] for key in both) / len(both),
        "difference": _difference(a.scores, b.scores),
        "wins": wins(mean_a, mean_b, within=1e-9),
        "categories": {
            name: {
                "n": len(keys),
                "mean_a": math.fsum(mean_a[key] for key in keys) / len(keys),
                "mean_b": math.fsum(mean_b[key] for key in keys) / len(keys),
                "wins": wins({key: mean_a[key] for key in keys}, mean_b, within=1e-9),
            }
            for name, keys in groups.items()
        },
        "length": _length(a, b, both),
    }


def _about(side: Side) -> dict[str, Any]:
    told = {"model": side.model, "judge": side.judge, "file": side.file, "n_unread": side.unread}
    return told if side.orders is None else told | {"orders_agree": side.orders}


def _means(scores: Mapping[Key, Sequence[float]]) -> dict[Any, float]:
    return {key: math.fsum(values) / len(values) for key, values in scores.items()}


def _missing(one: Side, other: Side, expected: Sequence[Key] | None) -> int:
    """Places of the benchmark on which `one` has no verdict; unread verdicts are verdicts."""
    if expected is None:
        return len(other.places - one.places)
    turns = (1,) if one.benchmark == "AlpacaEval" else (1, 2)
    return len({(key, turn) for key in expected for turn in turns} - one.places)


def _difference(a: Mapping[Key, Sequence[float]], b: Mapping[Key, Sequence[float]]) -> dict[str, Any]:
    pairs: tuple[dict[Any, Sequence[float]], ...] = ({**a}, {**b})
    test = paired_test(*pairs)
    ends = test.difference.interval()
    numbers = {"mean": test.difference.mean, "standard_error": test.difference.standard_error}
    numbers |= {"t": test.t, "p_t": test.p_t, "p_permutation": test.p_permutation}
    known: dict[str, Any] = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
    return known | {"interval": None if math.isnan(ends[0]) else list(ends)}


def _length(a: Side, b: Side, both: Sequence[Key]) -> dict[str, Any] | None:
    known = [key for key in both if key in a.lengths and key in b.lengths]
    if not known:
        return None
    one, other = ({key: side.lengths[key] for key in known} for side in (a, b))
    mean_a, mean_b = (sum(_means(side).values()) / len(known) for side in (one, other))
    return {"n": len(known), "mean_a": mean_a, "mean_b": mean_b, "difference": _difference(one, other)}


# Showing ------------------------------------------------------------------------------------------------------------


def alarms(result: Mapping[str, Any]) -> list[str]:
    """Why the difference is not final."""
    said = []
    for side in "ab":
        if result["missing"][side]:
            about = result[side]
            said.append(f"{about['model']}: {result['missing'][side]} verdicts by {about['judge']} are missing")
    return said


def different_judges_warning(result: Mapping[str, Any]) -> list[str]:
    """The label of a comparison that no one judge made."""
    if result["same_judge"]:
        return []
    (a, judge_a), (b, judge_b) = ((result[side]["model"], result[side]["judge"]) for side in "ab")
    return [f"DIFFERENT JUDGES: {judge_a} judged {a}, {judge_b} judged {b}; the difference is also theirs"]


def tables(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The comparison as tables of texts: overall, by category, and what else must be known."""
    a, b = result["a"], result["b"]
    who = f"{b['model']} less {a['model']}, judged by {' and '.join(result['judges'])}"
    who += f", against {result['against']}" if result["against"] else ""
    who += ("" if result["same_judge"] else " (DIFFERENT JUDGES)") + (" (NOT FINAL)" if alarms(result) else "")

    def difference(name: str, of: Mapping[str, Any], values: Mapping[str, Any], digits: int) -> list[str]:
        means = [number(values["mean_a"], digits), number(values["mean_b"], digits)]
        tests = [_p(of["p_t"]), _p(of["p_permutation"])]
        return [name, *means, f"{of['mean']:+.{digits}f}", interval(of["interval"], digits), *tests]

    rows = [difference(result["unit"], result["difference"], result, 3)]
    if result["length"]:
        rows.append(difference("length, characters", result["length"]["difference"], result["length"], 0))
    columns = ("", a["model"], b["model"], "difference", "95 % interval", "p (t)", "p (permutation)")
    total = {key: result[key] for key in ("mean_a", "mean_b", "wins")} | {"n": result["n_questions"]}
    by_category = [
        [
            *(name, str(part["n"]), number(part["mean_a"], 3), number(part["mean_b"], 3)),
            *(f"{part['mean_b'] - part['mean_a']:+.3f}", *(str(part["wins"][key]) for key in ("win", "tie", "loss"))),
        ]
        for name, part in [("all", total), *result["categories"].items()]
    ]
    heads = ("category", "questions", a["model"], b["model"], "difference", "wins", "ties", "losses")
    return [table(columns, rows, who), table(heads, by_category, f"wins of {b['model']} by question, {who}")]


def lines(result: Mapping[str, Any]) -> list[str]:
    """What stands below the tables."""
    said = different_judges_warning(result)
    said += [f"{result['n_questions']} questions that both have; {result['n_unpaired']} that only one has are left out"]
    for about in (result["a"], result["b"]):
        if about["n_unread"]:
            said.append(f"{about['model']}: {about['n_unread']} verdicts could not be read and are left out")
        if "orders_agree" in about:
            said.append(f"{about['model']}: both orders agree in {about['orders_agree']:.1%} of the matches")
    if not result["checked"]:
        said.append("no question file: completeness is judged by the other side's questions")
    if result["length"] is None:
        said.append("lengths are not known: --answers names the answer files")
    return said


def page(result: Mapping[str, Any]) -> Page:
    """The comparison as a page of its own."""
    a, b = result["a"]["model"], result["b"]["model"]
    title = f"{b} less {a}, judged by {' and '.join(result['judges'])}"
    section = {"title": "Paired by question", "tables": tables(result), "lines": lines(result)}
    warnings = [*different_judges_warning(result), *judge_warnings(result["judges"])]
    return Page(title, f"{result['benchmark']}: comparison", alarms(result), warnings, [section])


def _p(value: float | None) -> str:
    """A test's p; below 1e-15 it is only rounding."""
    return "–" if value is None else "< 1e-15" if value < 1e-15 else f"{value:.2g}"
