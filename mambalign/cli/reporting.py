"""Verbs that show verdicts: `eval mt-bench report`, `eval alpaca report`, `eval compare`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, cast

import typer

import mambalign
from mambalign.cli.common import AsJson, Debug, log_to_stderr, make_console, user_errors
from mambalign.cli.evaluation import (
    DataDir,
    alpaca_app,
    eval_app,
    gamed_or_none,
    instructions_or_none,
    is_pairwise,
    mt_bench_app,
)
from mambalign.cli.evaluation import questions_or_none as questions_of

Page = Annotated[Path, typer.Option("--out", help="The page to write.")]
Answers = Annotated[
    list[Path] | None,
    typer.Option("--answers", help="Answer file of a model (can be repeated): its answers, lengths and prompts."),
]
Questions = Annotated[Path | None, typer.Option(help="Another question.jsonl than the data folder's.")]


@mt_bench_app.command("report")
def report_mt_bench(
    judgments: Annotated[list[Path], typer.Argument(metavar="JUDGMENTS.jsonl...", help="FastChat's judgment files.")],
    out: Page = Path("mt-bench.html"),
    answers: Answers = None,
    questions: Questions = None,
    duplicates: Annotated[str, typer.Option(help="As in show: all, first or last.")] = "all",
    baseline: Annotated[str | None, typer.Option(help="Pairwise: only matches against this model.")] = None,
    data_dir: DataDir = None,
    debug: Debug = False,
) -> None:
    """Write MT-Bench's judgments as one self-contained HTML page.

    Radar by category, scores by turn with intervals clustered by question, the ten lowest ratings with the judge's
    text, verdicts without a rating, prompts as rendered. It says "not final" while an answer or verdict is missing.

    Example: [bold]mambalign eval mt-bench report model_judgment/gpt-4_single.jsonl --answers model_answer/mine.jsonl[/]
    """
    log_to_stderr()
    with user_errors(debug):
        from mambalign.evals import mt_bench_scores, report
        from mambalign.evals.judging import write_whole
        from mambalign.evals.mt_bench import load_questions

        asked = questions_of(questions, data_dir, load_questions)
        abouts = [about for path in judgments if (about := report.load_about(path))]
        pairwise = {is_pairwise(path) for path in judgments}
        if len(pairwise) > 1:
            raise mambalign.UserError("single and pairwise judgments are two evaluations; give the files of one")
        if pairwise.pop():
            pairs = [j for path in judgments for j in mt_bench_scores.load_pair_judgments(path)]
            page = report.pair_page(pairs, asked, baseline, abouts)
        else:
            rows = [j for path in judgments for j in mt_bench_scores.load_judgments(path)]
            answered = dict(report.load_answered(path) for path in answers or ())
            page = report.mt_bench_page(rows, asked, answered, abouts, cast(mt_bench_scores.Duplicates, duplicates))
        write_whole(out, page.html())
        _tell(out, page.alarms)


@alpaca_app.command("report")
def report_alpaca(
    annotations: Annotated[
        list[Path], typer.Argument(metavar="ANNOTATIONS.json...", help="One file a model or judge.")
    ],
    out: Page = Path("alpaca-eval.html"),
    outputs: Annotated[
        list[Path] | None, typer.Option(help="A model's model_outputs.json (can be repeated), for its prompts.")
    ] = None,
    instructions: Annotated[Path | None, typer.Option(help="The benchmark's rows; default: the data folder's.")] = None,
    length_control: Annotated[
        bool, typer.Option("--length-control", help="Fit the length-controlled win rate too (needs df_gamed.csv).")
    ] = False,
    data_dir: DataDir = None,
    debug: Debug = False,
) -> None:
    """Write AlpacaEval's annotations as one self-contained HTML page.

    Win rate with its interval, the length-controlled one, by dataset, lengths, the ten worst losses with the judge's
    text, prompts as rendered. It says "not final" while an instruction has no verdict.

    Example: [bold]mambalign eval alpaca report results/mine/alpaca_eval_gpt4/annotations.json --length-control[/]
    """
    log_to_stderr()
    with user_errors(debug):
        from mambalign.evals import alpaca_eval, report
        from mambalign.evals.alpaca_scores import summarize
        from mambalign.evals.judging import write_whole

        gamed = gamed_or_none(length_control, data_dir)
        asked = instructions_or_none(instructions, data_dir, needed=length_control)
        rendered = {alpaca_eval.load_outputs(path)[0].generator: report.load_rendered(path) for path in outputs or ()}
        pages = []
        for path in annotations:
            rows = alpaca_eval.load_annotations(path)
            result, about = summarize(rows, asked, gamed), report.load_about(path)
            prompts = rendered.pop(result["model"], [])
            pages.append(report.alpaca_page(rows, result, about, prompts, checked=asked is not None))
        page = report.joined(pages)
        write_whole(out, page.html())
        _tell(out, page.alarms)


def _tell(out: Path, alarms: list[str]) -> None:
    print(f"{out}: written")
    for alarm in alarms:
        print(f"  NOT FINAL: {alarm}")


@eval_app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="Judgments or annotations of one model.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="Those of the other; may be the same file.")],
    model_a: Annotated[str | None, typer.Option("--model-a", help="Which model of A, where it has several.")] = None,
    model_b: Annotated[str | None, typer.Option("--model-b", help="Which model of B, where it has several.")] = None,
    answers: Answers = None,
    questions: Questions = None,
    different_judges: Annotated[
        bool, typer.Option("--different-judges", help="Compare though the judges differ, and label it so.")
    ] = False,
    html: Annotated[Path | None, typer.Option("--html", help="Write the comparison as a page, too.")] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Compare two models question by question: B less A, with two paired tests, by category, and in length.

    MT-Bench's single or pairwise judgments, or AlpacaEval's annotations. Refuses two judges, opponents or benchmarks.

    Example: [bold]mambalign eval compare gpt-4_single.jsonl gpt-4_single.jsonl --model-a sft --model-b dpo[/]
    """
    log_to_stderr()
    with user_errors(debug):
        from mambalign.evals import compare as comparing
        from mambalign.evals.judging import write_whole
        from mambalign.evals.mt_bench import load_answers, load_questions

        given = {next(iter(of.values())).model: of for of in map(load_answers, answers or ())}
        alpaca = not is_judgment(a)
        asked = None if alpaca else questions_of(questions, data_dir, load_questions)
        sides = [comparing.load_side(path, model, asked, given) for path, model in ((a, model_a), (b, model_b))]
        expected = (
            instructions_or_none(None, data_dir) if alpaca else asked and [question.question_id for question in asked]
        )
        result = comparing.compare(*sides, expected=expected, different_judges=different_judges)
        if html is not None:
            write_whole(html, comparing.page(result).html())
        if as_json:
            print(json.dumps(result, indent=2))
            return
        console = make_console()
        for each in comparing.tables(result):
            console.print(_table(each))
        for line in comparing.lines(result):
            print(f"  {line}")
        for alarm in comparing.alarms(result):
            print(f"  NOT FINAL: {alarm}")


def is_judgment(path: Path) -> bool:
    from mambalign.data.json_rows import json_rows

    return "instruction" not in next((row for _, row in json_rows(path)), {})


def _table(of: dict[str, list[str]]) -> object:
    from rich.markup import escape
    from rich.table import Table

    shown = Table(*map(escape, of["columns"]), title=escape(str(of["caption"])), title_justify="left", box=None)
    for row in of["rows"]:
        shown.add_row(*map(escape, row))
    return shown
