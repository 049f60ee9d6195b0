"""One self-contained HTML page an evaluation: scores with intervals, worst answers, what is missing, the prompts.

Nothing is fetched: figures are inline SVG. All that models and judges wrote is text, whatever it looks like. A page is
a list of sections, each tables, a figure or texts, drawn by one template.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup, escape

from mambalign.data.json_rows import json_rows
from mambalign.evals import alpaca_scores, mt_bench_scores
from mambalign.evals.alpaca_eval import N_INSTRUCTIONS, TIE
from mambalign.evals.answers import rendered_file
from mambalign.evals.mt_bench import ERROR_ANSWER, Answer, Question, load_answers
from mambalign.evals.mt_bench_scores import Duplicates, Judgment, PairJudgment
from mambalign.evals.rule_judge import MODEL as RULES
from mambalign.support import encodable

WORST = 10
QUESTION_IDS = frozenset(range(81, 161))  # MT-Bench's
NAMED = 8  # how many missing things a banner names
COLOURS = ("#3569c9", "#0e8f72", "#cf4f36", "#8a5cc2", "#b8860b", "#667085")
Section = dict[str, Any]
Table = dict[str, Any]


@dataclass(frozen=True)
class Page:
    """What the template draws. alarms: why no number here is final. warnings: what else must be known of them."""

    title: str
    kicker: str
    alarms: list[str]
    warnings: list[str]
    sections: list[Section]

    def html(self) -> str:
        environment = jinja2.Environment(
            loader=jinja2.FileSystemLoader(Path(__file__).parent),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        page = environment.get_template("report.html.j2").render(**vars(self))
        return encodable(page)


@dataclass(frozen=True)
class Answered:
    """A model's answers and, where they are known, the rows that say what it was given (`load_rendered`)."""

    answers: Mapping[int, Answer]
    rendered: list[dict[str, Any]]


def load_rendered(answers: Path) -> list[dict[str, Any]]:
    """The rows of `rendered_file`; none where it is not there."""
    path = rendered_file(answers)
    return [row for _, row in json_rows(path)] if path.is_file() else []


def load_answered(path: Path) -> tuple[str, Answered]:
    """(model, its MT-Bench answers and prompts). Raises UserError as `load_answers`."""
    answers = load_answers(path)
    return next(iter(answers.values())).model, Answered(answers, load_rendered(path))


def load_about(judgments: Path) -> dict[str, Any]:
    """What `.judge.json` beside a file of judgments says; empty where it is not there."""
    path = judgments.with_suffix(".judge.json")
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


# Pieces -------------------------------------------------------------------------------------------------------------


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], caption: str) -> Table:
    """caption: names the judge, since a table may be copied alone."""
    return {"columns": list(columns), "rows": [list(row) for row in rows], "caption": caption}


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def interval(ends: Sequence[float] | None, digits: int = 2) -> str:
    return f"{ends[0]:.{digits}f} to {ends[1]:.{digits}f}" if ends and not math.isnan(ends[0]) else "–"


def fold(title: str, texts: Iterable[tuple[str, str | None]]) -> dict[str, Any]:
    """Texts under a line that opens them."""
    return {"title": title, "texts": [(label, text) for label, text in texts if text is not None]}


def _named(things: Sequence[str]) -> str:
    more = len(things) - NAMED
    return "; ".join(things[:NAMED]) + (f"; and {more} more" if more > 0 else "")


def judge_warnings(judges: Iterable[str], abouts: Iterable[Mapping[str, Any]] = ()) -> list[str]:
    """What must be known of these judges wherever their numbers stand."""
    said = []
    for judge in dict.fromkeys(judges):
        if "not-a-language-model" in judge or RULES in judge:
            said.append(f"The judge {judge} is rule-based, not a language model; its numbers are no benchmark's.")
    for about in abouts:
        said += [f"{about.get('judge')}: {note}" for note in about.get("notes") or ()]
    return list(dict.fromkeys(said))


def about_missing(about: Mapping[str, Any], model: str) -> list[str]:
    """Why verdicts on a model are missing, as the command that judged it recorded."""
    missing = about.get("missing") or {}
    if model not in (about.get("made_from") or {}).get("models", ()):
        return []
    reasons = sorted({str(reason) for reason in missing.values()})
    return [f"{len(missing)} verdicts are missing: {_named(reasons)}"] if missing else []


def radar(series: Mapping[str, Mapping[str, float | None]], top: float, title: str) -> Markup:
    """An SVG of one polygon a series over the categories, from 0 at the centre to `top`. A category without a number
    has no corner, so its polygon stays open there."""
    names = list(dict.fromkeys(name for values in series.values() for name in values))
    if len(names) < 3:
        return Markup("")
    middle, radius = (230.0, 190.0), 130.0

    def at(i: int, share: float) -> tuple[float, float]:
        angle = 2 * math.pi * i / len(names) - math.pi / 2
        return middle[0] + radius * share * math.cos(angle), middle[1] + radius * share * math.sin(angle)

    def path(points: Sequence[tuple[float, float]]) -> str:
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)

    parts = [f'<svg role="img" viewBox="0 0 460 {390 + 18 * len(series)}" aria-label="{escape(title)}">']
    for ring in (0.2, 0.4, 0.6, 0.8, 1.0):
        corners = path([at(i, ring) for i in range(len(names))])
        parts.append(f'<polygon points="{corners}" class="ring"/>')
        x, y = at(0, ring)
        parts.append(f'<text x="{x + 4:.1f}" y="{y - 2:.1f}" class="tick">{top * ring:g}</text>')
    for i, name in enumerate(names):
        x, y = at(i, 1.12)
        side = "middle" if abs(x - middle[0]) < 20 else "start" if x > middle[0] else "end"
        parts.append(f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="{side}">{escape(name)}</text>')
    for number_, (label, values) in enumerate(series.items()):
        colour = COLOURS[number_ % len(COLOURS)]
        known = [(i, value) for i, name in enumerate(names) if (value := values.get(name)) is not None]
        points = path([at(i, min(max(value / top, 0.0), 1.0)) for i, value in known])
        shape = "polygon" if len(known) == len(names) else "polyline"
        fill = f'fill="{colour}" fill-opacity=".12"' if shape == "polygon" else 'fill="none"'
        parts.append(f'<{shape} points="{points}" stroke="{colour}" stroke-width="2" {fill}/>')
        y = 385 + 18 * number_
        parts.append(f'<rect x="20" y="{y - 9}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="36" y="{y}">{escape(label)}</text>')
    return Markup("".join([*parts, "</svg>"]))


# MT-Bench -----------------------------------------------------------------------------------------------------------


def mt_bench_page(
    judgments: Sequence[Judgment],
    questions: Sequence[Question] | None = None,
    answered: Mapping[str, Answered] | None = None,
    abouts: Sequence[Mapping[str, Any]] = (),
    duplicates: Duplicates = "all",
) -> Page:
    """The page of single-answer judgments, of one model or several.

    answered: by model, so that the page has answers and prompts. abouts: what `load_about` read. Without `questions`
    completeness cannot be known, and the page says so.
    """
    answered = answered or {}
    results = mt_bench_scores.summarize(judgments, questions, duplicates=duplicates)
    by_id = None if questions is None else {question.question_id: question for question in questions}
    alarms = [] if questions is not None else ["no question file: whether all questions were judged is not known"]
    sections: list[Section] = []
    shown = {f"{result['model']}, judged by {result['judge']}": result["categories"] for result in results}
    sections.append({"title": "By category", "svg": radar(shown, 10, "Mean rating by category")})
    for result in results:
        model, judge = result["model"], result["judge"]
        own = [j for j in judgments if (j.model, j.judge) == (model, judge)]
        there = answered.get(model)
        why = [*_missing(result, by_id), *_missing_answers(there, by_id)]
        why += [line for about in abouts if about.get("judge") == judge for line in about_missing(about, model)]
        alarms += [f"{model}: {line}" for line in why]
        sections += _single_sections(result, own, by_id, there, final=not why and questions is not None)
    judged = {result["model"] for result in results}
    for model, there in answered.items():
        alarms += [f"{model}: none of its answers has a verdict"] if model not in judged else []
        sections += _prompt_sections(model, there.rendered)
    judges = list(dict.fromkeys(result["judge"] for result in results))
    models = ", ".join(dict.fromkeys(result["model"] for result in results))
    title = f"{models}, judged by {', '.join(judges)}"
    kicker = f"{_benchmark(judgments, questions)}, single answers"
    return Page(title, kicker, alarms, judge_warnings(judges, abouts), sections)


def _benchmark(judgments: Sequence[Judgment | PairJudgment], questions: Sequence[Question] | None) -> str:
    """The name is the benchmark's only where its questions were asked."""
    if questions is None:
        own = {j.question_id for j in judgments} <= QUESTION_IDS
    else:
        own = {question.question_id for question in questions} == QUESTION_IDS
    return "MT-Bench" if own else "MT-Bench's format, other questions"


def _missing(result: Mapping[str, Any], questions: Mapping[int, Question] | None) -> list[str]:
    if not result["n_missing"]:
        return []
    places = [f"question {number} turn {turn}" for number, turn in result["missing"]]
    more = result["n_missing"] - len(places)
    places += [""] * more
    return [f"{result['n_missing']} verdicts by {result['judge']} are missing: {_named(places)}"]


def _missing_answers(there: Answered | None, questions: Mapping[int, Question] | None) -> list[str]:
    if there is None:
        return []
    said = []
    lacking = [
        f"question {number}"
        for number in questions or ()
        if number not in there.answers or len(there.answers[number].turns) < 2
    ]
    if lacking:
        said.append(f"{len(lacking)} answers are missing: {_named(lacking)}")
    failed = [f"question {number}" for number, answer in there.answers.items() if ERROR_ANSWER in answer.turns]
    if failed:
        said.append(f'{len(failed)} answers are the word "{ERROR_ANSWER}" of a failed call: {_named(failed)}')
    return said


def _single_sections(
    result: Mapping[str, Any],
    judgments: Sequence[Judgment],
    questions: Mapping[int, Question] | None,
    there: Answered | None,
    final: bool,
) -> list[Section]:
    who = f"{result['model']}, judged by {result['judge']}" + ("" if final else " (NOT FINAL)")
    errors = result["errors"]

    def bars(name: str) -> tuple[str, str]:
        return number(errors[name]["standard_error"]), interval(errors[name]["interval"])

    turns = (("both turns", "average"), ("first turn", "first_turn"), ("second turn", "second_turn"))
    scores = table(
        ("", "mean", "s.e.", "95 % interval"), [(label, number(result[key]), *bars(key)) for label, key in turns], who
    )
    categories = table(
        ("category", "mean", "s.e.", "95 % interval", "turn 1", "turn 2"),
        [
            (name, number(mean), *bars(name), *map(number, result["category_turns"][name]))
            for name, mean in result["categories"].items()
        ],
        who,
    )
    rated = sorted((j for j in judgments if j.parsed), key=lambda j: (j.score, j.question_id, j.turn))
    unread = [j for j in judgments if not j.parsed]
    sections: list[Section] = [
        {
            "title": who,
            "note": "Ratings of 1 to 10. Standard errors and intervals (bootstrap, BCa) are clustered by question.",
            "tables": [scores, categories],
            "lines": mt_bench_scores.notes(result),
        },
        {
            "title": f"The {min(WORST, len(rated))} lowest ratings: {who}",
            "cards": [_judged_card(j, questions, there) for j in rated[:WORST]],
        },
    ]
    if unread:
        low, high = number(result["if_unparsed_were_1"]), number(result["if_unparsed_were_10"])
        sections.append(
            {
                "title": f"Verdicts without a rating: {who}",
                "note": f"Left out of the mean ({number(result['average'])}). Had all been 1 or 10: {low} to {high}.",
                "cards": [_judged_card(j, questions, there) for j in unread],
            }
        )
    return sections


def _judged_card(
    judgment: Judgment, questions: Mapping[int, Question] | None, there: Answered | None
) -> dict[str, Any]:
    number_, turn = judgment.question_id, judgment.turn
    question = (questions or {}).get(number_)
    answer = there.answers.get(number_) if there else None
    said = answer.turns[turn - 1] if answer and len(answer.turns) >= turn else None
    score = f"{judgment.score:g}" if judgment.parsed else "no rating"
    category = mt_bench_scores.category_of(number_, questions)
    return {
        "head": f"question {number_}, turn {turn}, {category}: {score} by {judgment.judge}",
        "texts": _present(
            ("question", question.turns[turn - 1] if question else None),
            ("answer", said),
            (f"what {judgment.judge} wrote", judgment.text),
        ),
        "folds": [fold("what the judge was shown", [("", judgment.row.get("user_prompt"))])]
        if judgment.row.get("user_prompt")
        else [],
    }


def _present(*texts: tuple[str, str | None]) -> list[tuple[str, str]]:
    return [(label, text or "(nothing)") for label, text in texts if text is not None]


def _prompt_sections(model: str, rows: Sequence[Mapping[str, Any]]) -> list[Section]:
    """Of either benchmark: every prompt as it went into the model."""
    if not rows:
        return []
    lines, folds = [], []
    for row in rows:
        given = row["prompts"] if "prompts" in row else [row["prompt"]]
        said = row["turns"] if "turns" in row else [row["output"]]
        name = f"question {row['question_id']}" if "question_id" in row else row["instruction"][:80]
        if any(prompt is not None for prompt in given):
            texts = [(f"prompt {i}", prompt) for i, prompt in enumerate(given, 1)]
            folds.append(fold(name, [*texts, *((f"answer {i}", text) for i, text in enumerate(said, 1))]))
    ends = [end for row in rows for end in row.get("finish_reasons", [row.get("finish_reason")])]
    beyond = [mark for row in rows for mark in _as_list(row.get("beyond_trained_length"))]
    lines.append(
        f"{len(rows)} rows; {ends.count('length')} answers were cut off at the longest length, "
        f"{sum(map(bool, beyond))} prompts are longer than the model was trained on"
    )
    if not folds:
        lines.append("the model was behind an endpoint, which renders the prompts itself")
    return [{"title": f"What {model} was given, as rendered", "lines": lines, "folds": folds}]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def pair_page(
    judgments: Sequence[PairJudgment],
    questions: Sequence[Question] | None = None,
    baseline: str | None = None,
    abouts: Sequence[Mapping[str, Any]] = (),
) -> Page:
    """The page of pairwise judgments: rates, agreement of both orders, matches in which a model lost twice."""
    judgments = mt_bench_scores.against(judgments, baseline)
    result = mt_bench_scores.pair_summary(judgments, questions, baseline)
    by_id = None if questions is None else {question.question_id: question for question in questions}
    judges = list(dict.fromkeys(j.judge for j in judgments))
    alarms = [] if questions is not None else ["no question file: whether all questions were judged is not known"]
    if not result["final"]:
        alarms.append(f"{result['n_missing']} matches are missing, {result['n_errors']} have no verdict (left out)")
    models = sorted({model for j in judgments for model in j.models})
    alarms += [line for about in abouts for line in dict.fromkeys(x for m in models for x in about_missing(about, m))]
    state = " (NOT FINAL)" if alarms else ""
    columns = ("model", "judge", "win", "loss", "tie", "win rate", "loss rate", "adjusted win rate")

    def rows(part: Iterable[Mapping[str, Any]]) -> list[list[str]]:
        rates = ("win_rate", "loss_rate", "win_rate_adjusted")
        return [
            [row["model"], row["judge"], *(str(row[key]) for key in ("win", "loss", "tie"))]
            + [number(row[key], 4) for key in rates]
            for row in part
        ]

    captions = {"all": result["table"]} | {f"turn {turn}": part for turn, part in result["turns"].items()}
    captions |= result["categories"]
    tables = [
        table(columns, rows(part), f"{name}, judged by {', '.join(judges)}{state}") for name, part in captions.items()
    ]
    lines = mt_bench_scores.pair_notes(result)
    if result["consistent"] is not None:
        lines.append(f"swapping the answers changed nothing in {result['consistent']:.1%} of the matches")
    if result["first_shown"] is not None:
        lines.append(
            f"what was shown first won {result['first_shown']:.1%} of the decided games "
            f"(p = {result['first_shown_p']:.2g})"
        )
    met = [(j, j.models[::-1] if j.models[0] == baseline else j.models) for j in judgments]
    lost = [(j, *models) for j, models in met if j.winner == models[1]]
    cards = [
        {
            "head": f"question {j.question_id}, turn {j.turn}: {model} lost to {other}, by {j.judge}",
            "texts": _present(
                ("question", by_id[j.question_id].turns[j.turn - 1] if by_id and j.question_id in by_id else None),
                ("what the judge wrote, first order", j.row.get("g1_judgment")),
                ("what the judge wrote, second order", j.row.get("g2_judgment")),
            ),
            "folds": [fold("what the judge was shown", [("", j.row.get("g1_user_prompt"))])],
        }
        for j, model, other in lost[:WORST]
    ]
    sections = [
        {"title": f"Wins, losses, ties{state}", "tables": tables, "lines": lines},
        {"title": f"Matches lost in both orders, {len(cards)} of {len(lost)}", "cards": cards},
    ]
    against = f" against {baseline}" if baseline else ""
    title = f"{', '.join(m for m in models if m != baseline)}{against}, judged by {', '.join(judges)}"
    return Page(
        title, f"{_benchmark(judgments, questions)}, pairwise", alarms, judge_warnings(judges, abouts), sections
    )


# AlpacaEval ---------------------------------------------------------------------------------------------------------


def alpaca_page(
    annotations: Sequence[Mapping[str, Any]],
    result: Mapping[str, Any],
    about: Mapping[str, Any] | None = None,
    rendered: Sequence[Mapping[str, Any]] = (),
    *,
    checked: bool = True,
) -> Page:
    """The page of one model's annotations. result: their `alpaca_scores.summarize`. rendered: see `load_rendered`.
    checked: whether the summary knew all instructions."""
    model, judge, reference = result["model"], result["judge"], result["reference"]
    alarms = [] if checked else ["no instructions to compare with: whether all were judged is not known"]
    if result["n_missing"]:
        alarms.append(f"{model}: {result['n_missing']} instructions have no verdict by {judge}")
    alarms += [f"{model}: {line}" for line in about_missing(about or {}, model)]
    who = f"{model} against {reference}, judged by {judge}" + (" (NOT FINAL)" if alarms else "")
    length, theirs = result["avg_length"], result["reference_length"]
    numbers = [
        ("win rate, %", number(result["win_rate"]), number(result["standard_error"]), interval(result["interval"])),
        ("discrete win rate, %", number(result["discrete_win_rate"]), "", ""),
    ]
    if "length_controlled_winrate" in result:
        numbers.append(
            (
                "length-controlled win rate, %",
                number(result["length_controlled_winrate"]),
                number(result["lc_standard_error"]),
                "",
            )
        )
    counts = [
        ("wins, losses, draws", f"{result['n_wins']}, {result['n_wins_base']}, {result['n_draws']}"),
        ("verdicts", str(result["n_total"])),
        ("mean length, characters", f"{length}; the reference's {theirs} ({length - theirs:+})"),
    ]
    datasets = [(name, number(part["win_rate"]), str(part["n"])) for name, part in result["datasets"].items()]
    read = sorted((row for row in annotations if row["preference"] is not None), key=lambda row: row["preference"])
    lost = [row for row in read if row["preference"] < TIE]
    unread = [row for row in annotations if row["preference"] is None]
    sections: list[Section] = [
        {
            "title": who,
            "note": "The interval is of 95 %, bootstrap (BCa) over instructions.",
            "tables": [
                table(("", "value", "s.e.", "95 % interval"), numbers, who),
                table(("", ""), counts, who),
                table(("dataset", "win rate, %", "verdicts"), datasets, who),
            ],
            "lines": alpaca_scores.notes(result),
        },
        {
            "title": f"The {min(WORST, len(lost))} worst losses: {who}",
            "cards": list(map(_annotation_card, lost[:WORST])),
        },
    ]
    if unread:
        low, high = number(result["if_unparsed_lost"]), number(result["if_unparsed_won"])
        sections.append(
            {
                "title": f"Verdicts that could not be read: {who}",
                "note": f"Left out of the win rate ({number(result['win_rate'])}). "
                f"Had all been losses or wins: {low} to {high}.",
                "cards": [_annotation_card(row) for row in unread],
            }
        )
    sections += _prompt_sections(model, rendered)
    own = not checked or len(annotations) + result["n_missing"] == N_INSTRUCTIONS
    kicker = "AlpacaEval" if own else "AlpacaEval's format, other instructions"
    return Page(who, kicker, alarms, judge_warnings([judge], [about] if about else []), sections)


def joined(pages: Sequence[Page]) -> Page:
    """Several pages of one benchmark as one."""

    def all_of(name: str) -> list[Any]:
        return [each for page in pages for each in getattr(page, name)]

    alarms, warnings = (list(dict.fromkeys(all_of(name))) for name in ("alarms", "warnings"))
    return Page("; ".join(page.title for page in pages), pages[0].kicker, alarms, warnings, all_of("sections"))


def _annotation_card(row: Mapping[str, Any]) -> dict[str, Any]:
    raw = row.get("raw_completion")
    wrote = raw.get("text") if isinstance(raw, Mapping) else raw
    preference = row["preference"]
    share = "no preference" if preference is None else f"preference for the model {preference - 1:.3f}"
    return {
        "head": f"{row.get('dataset') or 'unnamed'}: {share}, by {row.get('annotator')}",
        "texts": _present(
            ("instruction", row["instruction"]),
            (f"{row.get('generator_2')} wrote", row.get("output_2") or ""),
            ("the judge wrote", None if wrote is None else str(wrote)),
        ),
        "folds": [fold(f"what {row.get('generator_1')} wrote", [("", row.get("output_1"))])],
    }
