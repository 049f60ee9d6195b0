"""MT-Bench's numbers: judgment files, averaged as FastChat's `show_result` does, with what that hides beside them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mambalign.data.json_rows import json_rows
from mambalign.evals.mt_bench import CATEGORIES, UNPARSED, Question, parse_rating
from mambalign.evals.statistics import Estimate, bootstrap_interval, clustered_mean
from mambalign.recipe import UserError

Duplicates = Literal["all", "first", "last"]
FAILED = "$ERROR$"  # FastChat's judgment where the judge could not be reached
LOWEST, HIGHEST = 1, 10
FAILED_VERDICT = "error"
WINNERS = ("model_1", "model_2", "tie", FAILED_VERDICT)


@dataclass(frozen=True)
class Judgment:
    """A judge's verdict on one turn. score: -1 where no rating was read."""

    question_id: int
    model: str
    judge: str
    prompt: str
    turn: int
    score: float
    text: str
    row: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def parsed(self) -> bool:
        return self.score != UNPARSED

    @property
    def failed(self) -> bool:
        """No judge has read it, though there is a row."""
        return not self.parsed and self.text == FAILED


@dataclass(frozen=True)
class PairJudgment:
    """A judge's verdicts on two models' answers, shown in either order: g1 as model_1, model_2; g2 reversed."""

    question_id: int
    models: tuple[str, str]
    judge: str
    prompt: str
    turn: int
    g1_winner: str
    g2_winner: str
    row: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def winner(self) -> str:
        """A model's name; "tie", which also a changed mind is; "error" where one game has no verdict."""
        if FAILED_VERDICT in (self.g1_winner, self.g2_winner):
            return FAILED_VERDICT
        if self.g1_winner == "tie" or self.g1_winner != self.g2_winner:
            return "tie"
        return self.models[0] if self.g1_winner == "model_1" else self.models[1]


# Reading ------------------------------------------------------------------------------------------------------------


def load_judgments(path: Path) -> list[Judgment]:
    """Rows of `<judge>_single.jsonl`, plain or gzipped. A missing score is read from the judgment; one that is null or
    no number is -1; a missing turn is the prompt's.

    Raises:
        UserError: naming file, line and key.
    """
    judgments = []
    for line, row in json_rows(path):
        where = f"{path}:{line}"
        if "model" not in row:
            hint = "; these are pairwise judgments" if "model_1" in row else ""
            raise UserError(f"{where}: no key model, so this is no judgment of a single answer{hint}")
        judge, prompt = _judge(row)
        text = row.get("judgment") or ""
        turn = _turn(row, prompt, where)
        judgments.append(Judgment(_id(row, where), str(row["model"]), judge, prompt, turn, rating_of(row), text, row))
    if not judgments:
        raise UserError(f"{path}: there are no judgments")
    return judgments


def load_pair_judgments(path: Path) -> list[PairJudgment]:
    """Rows of `<judge>_pair.jsonl`, plain or gzipped, also old ones with one `winner`. Raises UserError as above."""
    judgments = []
    for line, row in json_rows(path):
        where = f"{path}:{line}"
        if "model_1" not in row or "model_2" not in row:
            hint = "; these are judgments of single answers" if "model" in row else ""
            raise UserError(f"{where}: no keys model_1 and model_2, so this is no pairwise judgment{hint}")
        g1, g2 = (row.get(key, row.get("winner")) or FAILED_VERDICT for key in ("g1_winner", "g2_winner"))
        unknown = [winner for winner in (g1, g2) if winner not in WINNERS]
        if unknown:
            raise UserError(f"{where}: winner {unknown[0]!r} is none of {', '.join(WINNERS)}")
        judge, prompt = _judge(row)
        models = (str(row["model_1"]), str(row["model_2"]))
        judgments.append(PairJudgment(_id(row, where), models, judge, prompt, _turn(row, prompt, where), g1, g2, row))
    if not judgments:
        raise UserError(f"{path}: there are no judgments")
    return judgments


def _judge(row: Mapping[str, Any]) -> tuple[str, str]:
    judge = row.get("judge") or "an unnamed judge"
    return (judge, "") if isinstance(judge, str) else (str(judge[0]), str(judge[1]) if len(judge) > 1 else "")


def _id(row: Mapping[str, Any], where: str) -> int:
    try:
        return int(row["question_id"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: question_id must be a whole number") from error


def _turn(row: Mapping[str, Any], prompt: str, where: str) -> int:
    turn = row.get("turn")
    if turn is None and prompt:
        turn = 2 if prompt.endswith("multi-turn") else 1
    if isinstance(turn, bool) or turn not in (1, 2):
        raise UserError(f"{where}: turn must be 1 or 2, this is {turn!r}")
    return int(turn)


def rating_of(row: Mapping[str, Any]) -> float:
    """A row's score; a missing one is read from the judgment, one that is null or no number is -1."""
    if "score" not in row:
        return parse_rating(row.get("judgment"))
    value = row["score"]
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return UNPARSED
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if number and math.isfinite(value) else UNPARSED


# Single answers -----------------------------------------------------------------------------------------------------


def category_of(question_id: int, questions: Mapping[int, Question] | None = None) -> str:
    """Of the question set; without one, MT-Bench's own by id (ten each from 81 on), else "other"."""
    if questions is not None:
        return questions[question_id].category if question_id in questions else "other"
    return CATEGORIES[(question_id - 81) // 10] if 81 <= question_id <= 160 else "other"


def without_duplicates(judgments: Sequence[Judgment], keep: Duplicates = "all") -> tuple[list[Judgment], int]:
    """(judgments, number of verdicts beyond the first on the same turn of the same model by the same judge).

    FastChat's show_result averages "all" of them, its clean_judgment keeps the "first", its answer files the "last".
    """
    if keep not in ("all", "first", "last"):
        raise UserError(f"duplicates: {keep!r} is none of all, first, last")
    chosen: dict[tuple[Any, ...], Judgment] = {}
    for judgment in judgments:
        key = (judgment.judge, judgment.model, judgment.question_id, judgment.turn)
        if keep == "last" or key not in chosen:
            chosen[key] = judgment
    surplus = len(judgments) - len(chosen)
    return (list(judgments) if keep == "all" else list(chosen.values())), surplus


def summarize(
    judgments: Iterable[Judgment],
    questions: Sequence[Question] | None = None,
    *,
    duplicates: Duplicates = "all",
) -> list[dict[str, Any]]:
    """One summary a judge and model, best average first; `average` and the like are FastChat's, to the last digit.

    average: the mean of all verdicts with a rating (not of the turns' means, nor of the categories'); first_turn,
    second_turn and categories (of both turns) likewise, None where there is none. Each has `standard_error` and
    `interval` (95 %) beside it in `errors`: clustered by question, BCa bootstrap. if_unparsed_were_1 and _10: the
    average if every verdict without a rating had been that. n_missing: turns of `questions` (without them: of the
    questions in the file) that have no verdict, or only a failed call's; `final` is whether none is missing.
    """
    by_id = None if questions is None else {question.question_id: question for question in questions}
    groups: dict[tuple[str, str], list[Judgment]] = {}
    seen: set[int] = set()
    for judgment in judgments:
        groups.setdefault((judgment.judge, judgment.model), []).append(judgment)
        seen.add(judgment.question_id)
    expected = {(number, turn) for number in (seen if by_id is None else by_id) for turn in (1, 2)}
    summaries = []
    for (judge, model), group in groups.items():
        kept, surplus = without_duplicates(group, duplicates)
        summary = {"benchmark": "MT-Bench, single answers", "model": model, "judge": judge, "duplicates": duplicates}
        summaries.append(summary | _summary(kept, surplus, expected, by_id))
    return sorted(summaries, key=lambda summary: -(summary["average"] or 0))


def _summary(
    kept: list[Judgment],
    surplus: int,
    expected: set[tuple[int, int]],
    questions: Mapping[int, Question] | None,
) -> dict[str, Any]:
    rated = [judgment for judgment in kept if judgment.parsed]
    judged = {(judgment.question_id, judgment.turn) for judgment in kept if not judgment.failed}
    by_category: dict[str, list[Judgment]] = {}
    for judgment in rated:
        by_category.setdefault(category_of(judgment.question_id, questions), []).append(judgment)
    order = dict.fromkeys(category_of(number, questions) for number, _ in sorted(expected))
    turns = {"first_turn": 1, "second_turn": 2}
    parts = {name: [j for j in rated if j.turn == turn] for name, turn in turns.items()} | {"average": rated}
    missing = expected - judged
    unparsed = [judgment for judgment in kept if not judgment.parsed and not judgment.failed]
    return {
        **{name: _mean(part) for name, part in parts.items()},
        "categories": {name: _mean(by_category[name]) for name in [*order, "other"] if name in by_category},
        "category_turns": {
            name: [_mean([j for j in part if j.turn == turn]) for turn in (1, 2)] for name, part in by_category.items()
        },
        "errors": {name: error_bars(part) for name, part in parts.items()}
        | {name: error_bars(part) for name, part in by_category.items()},
        "n": len(rated),
        "n_questions": len({judgment.question_id for judgment in rated}),
        "n_unparsed": len(unparsed),
        "n_missing": len(missing),
        "missing": sorted(missing)[:20],
        "n_duplicates": surplus,
        "n_out_of_range": sum(not LOWEST <= judgment.score <= HIGHEST for judgment in rated),
        "unparsed": [(judgment.question_id, judgment.turn) for judgment in unparsed],
        "if_unparsed_were_1": _mean_with(rated, len(unparsed), LOWEST),
        "if_unparsed_were_10": _mean_with(rated, len(unparsed), HIGHEST),
        "final": not missing,
    }


def _mean(judgments: Sequence[Judgment]) -> float | None:
    return math.fsum(judgment.score for judgment in judgments) / len(judgments) if judgments else None


def _mean_with(rated: Sequence[Judgment], more: int, score: float) -> float | None:
    total = math.fsum(judgment.score for judgment in rated) + more * score
    return total / (len(rated) + more) if rated or more else None


def notes(result: Mapping[str, Any]) -> list[str]:
    """What stands below a table of MT-Bench scores."""
    said = [f"{result['n']} ratings of {result['n_questions']} questions by {result['judge']}"]
    if result["n_missing"]:
        places = ", ".join(f"{number} turn {turn}" for number, turn in result["missing"][:5])
        said.append(f"NOT FINAL: {result['n_missing']} verdicts are missing ({places} ...)")
    if result["n_unparsed"]:
        low, high = (f"{result[key]:.3f}" for key in ("if_unparsed_were_1", "if_unparsed_were_10"))
        said.append(f"{result['n_unparsed']} verdicts had no rating and are left out; as 1 or 10: {low} to {high}")
    if result["n_out_of_range"]:
        said.append(f"{result['n_out_of_range']} ratings are not within 1 to 10 and count as they are (parity)")
    if result["n_duplicates"]:
        said.append(
            f"{result['n_duplicates']} verdicts are on an answer that had one already; counted: {result['duplicates']}"
        )
    return said


def estimate(judgments: Sequence[Judgment]) -> Estimate:
    """The mean of the ratings, its standard error clustered by question."""
    rated = [judgment for judgment in judgments if judgment.parsed]
    return clustered_mean([judgment.score for judgment in rated], [judgment.question_id for judgment in rated])


def error_bars(judgments: Sequence[Judgment]) -> dict[str, Any]:
    """`standard_error` and 95 % `interval` of the mean, clustered by question; None of one question."""
    of = estimate(judgments)
    if of.n_clusters < 2:
        return {"standard_error": None, "interval": None}
    rated = [judgment for judgment in judgments if judgment.parsed]
    ends = bootstrap_interval([j.score for j in rated], [j.question_id for j in rated])
    return {"standard_error": of.standard_error, "interval": list(ends)}


def question_scores(judgments: Sequence[Judgment]) -> dict[int, list[float]]:
    """question_id -> its ratings, for `statistics.paired_test`."""
    scores: dict[int, list[float]] = {}
    for judgment in judgments:
        if judgment.parsed:
            scores.setdefault(judgment.question_id, []).append(judgment.score)
    return scores


# Pairs --------------------------------------------------------------------------------------------------------------


def against(judgments: Sequence[PairJudgment], baseline: str | None) -> Sequence[PairJudgment]:
    """Those with `baseline` on either side; all where it is None. Raises UserError where there is none."""
    if baseline is None:
        return judgments
    met = [judgment for judgment in judgments if baseline in judgment.models]
    if not met:
        models = sorted({model for judgment in judgments for model in judgment.models})
        raise UserError(f"--baseline: there are no judgments of {baseline!r}; there are those of {', '.join(models)}")
    return met


def pair_table(judgments: Iterable[PairJudgment], baseline: str | None = None) -> list[dict[str, Any]]:
    """A row a judge and model, best win_rate_adjusted first: FastChat's pairwise show_result.

    Matches in which a game has no verdict are left out; only those against `baseline` count if there is one, and it
    has no row. win_rate = w / n, loss_rate = l / n, win_rate_adjusted = (w + t / 2) / n with n = w + l + t.
    """
    counts: dict[tuple[str, str], Counter[str]] = {}
    for judgment in judgments:
        if judgment.winner == FAILED_VERDICT or (baseline is not None and baseline not in judgment.models):
            continue
        for model in judgment.models:
            if model != baseline:
                outcome = "tie" if judgment.winner == "tie" else "win" if judgment.winner == model else "loss"
                counts.setdefault((judgment.judge, model), Counter())[outcome] += 1
    table = []
    for (judge, model), count in counts.items():
        win, loss, tie = count["win"], count["loss"], count["tie"]
        n = win + loss + tie
        row = {"model": model, "judge": judge, "win": win, "loss": loss, "tie": tie, "n": n}
        rates = {"win_rate": win / n, "loss_rate": loss / n, "win_rate_adjusted": (win + 0.5 * tie) / n}
        table.append(row | rates)
    return sorted(table, key=lambda row: -row["win_rate_adjusted"])


def pair_summary(
    judgments: Sequence[PairJudgment],
    questions: Sequence[Question] | None = None,
    baseline: str | None = None,
) -> dict[str, Any]:
    """`pair_table` of all matches, of each turn and category, and how far the judge's two verdicts can be trusted.

    consistent: share of the matches with two verdicts in which swapping the answers changed nothing. first_shown: share
    of the decided games that the answer shown first won (no bias: 0.5), with the two-sided p of a sign test. n_missing:
    matches of the models in the file on `questions` that are not there; n_errors: those with a game without a verdict.
    All of it is of the matches against `baseline` where there is one. Raises UserError where nothing met it.
    """
    judgments = against(judgments, baseline)
    by_id = None if questions is None else {question.question_id: question for question in questions}
    known = [j for j in judgments if j.winner != FAILED_VERDICT]
    first = sum((j.g1_winner == "model_1") + (j.g2_winner == "model_2") for j in known)
    second = sum((j.g1_winner == "model_2") + (j.g2_winner == "model_1") for j in known)
    keys = {(j.judge, frozenset(j.models), j.question_id, j.turn) for j in judgments}
    line_ups = {key[:2] for key in keys}
    numbers = set(by_id) if by_id is not None else {j.question_id for j in judgments}
    expected = {(*line_up, number, turn) for line_up in line_ups for number in numbers for turn in (1, 2)}
    categories: dict[str, list[PairJudgment]] = {}
    for judgment in judgments:
        categories.setdefault(category_of(judgment.question_id, by_id), []).append(judgment)
    answered = {(j.judge, frozenset(j.models), j.question_id, j.turn) for j in known}
    errors, missing = len(keys - answered), len(expected - keys)
    return {
        "benchmark": "MT-Bench, pairwise",
        "baseline": baseline,
        "table": pair_table(judgments, baseline),
        "turns": {turn: pair_table([j for j in judgments if j.turn == turn], baseline) for turn in (1, 2)},
        "categories": {name: pair_table(part, baseline) for name, part in categories.items()},
        "n_matches": len(judgments),
        "n_errors": errors,
        "n_missing": missing,
        "n_duplicates": len(judgments) - len(keys),
        "consistent": sum(j.g1_winner == j.g2_winner for j in known) / len(known) if known else None,
        "first_shown": first / (first + second) if first + second else None,
        "first_shown_p": sign_test(first, second),
        "final": not errors and not missing,
    }


def pair_notes(result: Mapping[str, Any]) -> list[str]:
    """What stands below a table of pairwise rates, beside the judge's bias."""
    n = result["n_duplicates"]
    return [f"{n} matches were judged again, in this order of models or the other; all count, as in FastChat"] * bool(n)


def sign_test(first: int, second: int) -> float | None:
    """Two-sided exact p of so uneven a split of first + second fair coins; None of no coins.

    >>> sign_test(5, 0)
    0.0625
    """
    n, most = first + second, max(first, second)
    if not n:
        return None
    ways = tail = math.comb(n, most)
    for k in range(most, n):
        ways = ways * (n - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**n)


def votes(judgments: Iterable[PairJudgment]) -> list[dict[str, Any]]:
    """As `statistics.vote_agreement` takes them; a changed mind is "tie (inconsistent)"; matches without a verdict are
    left out."""
    rows = []
    for judgment in judgments:
        if judgment.winner == FAILED_VERDICT:
            continue
        names = {judgment.models[0]: "model_a", judgment.models[1]: "model_b"}
        consistent = judgment.g1_winner == judgment.g2_winner
        winner = names.get(judgment.winner, "tie" if consistent else "tie (inconsistent)")
        models = {"model_a": judgment.models[0], "model_b": judgment.models[1]}
        about = {"question_id": judgment.question_id, "turn": judgment.turn}
        rows.append({**about, **models, "winner": winner, "judge": [judgment.judge, judgment.prompt]})
    return rows
