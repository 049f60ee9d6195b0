"""Verbs of evaluation: the benchmarks' files, answers, judgments and scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import typer

import mambalign
from mambalign.cli.app import app
from mambalign.cli.common import AsJson, Debug, log_to_stderr, make_console, user_errors

PANEL = "Evaluation"
eval_app = typer.Typer(
    help="MT-Bench and AlpacaEval: answers, judgments, scores with error bars.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
mt_bench_app = typer.Typer(
    help="MT-Bench: 80 questions of two turns, in FastChat's formats.", no_args_is_help=True, rich_markup_mode="rich"
)
alpaca_app = typer.Typer(
    help="AlpacaEval 1 and 2: 805 instructions against a reference, in alpaca_eval's formats.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
app.add_typer(eval_app, name="eval", rich_help_panel=PANEL)
eval_app.add_typer(mt_bench_app, name="mt-bench")
eval_app.add_typer(alpaca_app, name="alpaca")

DataDir = Annotated[
    Path | None,
    typer.Option("--data-dir", help="Folder with the benchmarks' files; default: where fetch-data puts them."),
]


@eval_app.callback()
def _eval() -> None:
    pass


@mt_bench_app.callback()
def _mt_bench() -> None:
    pass


@alpaca_app.callback()
def _alpaca() -> None:
    pass


@eval_app.command("fetch-data")
def fetch(data_dir: DataDir = None, debug: Debug = False) -> None:
    """Download the questions, references and judge prompts of MT-Bench and AlpacaEval, pinned and checked.

    AlpacaEval's data are for non-commercial use (CC-BY-NC-4.0). Interrupted? The same command goes on.

    Example: [bold]mambalign eval fetch-data --data-dir eval-data[/]
    """
    log_to_stderr()
    with user_errors(debug, interrupted="; run the same command again to go on"):
        from mambalign.evals.data import fetch_data

        fetch_data(data_dir)


PROVISIONAL = "[bold red]not final[/]"


@mt_bench_app.command("show")
def show_mt_bench(
    judgments: Annotated[list[Path], typer.Argument(metavar="JUDGMENTS.jsonl...", help="FastChat's judgment files.")],
    questions: Annotated[Path | None, typer.Option(help="Another question.jsonl than the data folder's.")] = None,
    duplicates: Annotated[
        str, typer.Option(help="Of verdicts on the same answer: all (as FastChat averages), first or last.")
    ] = "all",
    baseline: Annotated[str | None, typer.Option(help="Pairwise: only matches against this model.")] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print MT-Bench's scores: per turn and category, as FastChat averages them, with what an average hides.

    Intervals are of 95 %, clustered by question (bootstrap, BCa). A score is not final while a verdict is missing.
    Without a question file, the questions are those of the judgments.

    Example: [bold]mambalign eval mt-bench show model_judgment/gpt-4_single.jsonl --json[/]
    """
    log_to_stderr()
    with user_errors(debug):
        from mambalign.evals import mt_bench_scores as scores
        from mambalign.evals.mt_bench import load_questions

        asked = questions_or_none(questions, data_dir, load_questions)
        results: list[dict[str, Any]] = []
        for path in judgments:
            if is_pairwise(path):
                results.append(scores.pair_summary(scores.load_pair_judgments(path), asked, baseline))
            else:
                rows = scores.load_judgments(path)
                results += scores.summarize(rows, asked, duplicates=cast(Any, duplicates))
        if as_json:
            print(json.dumps(results, indent=2))
            return
        for result in results:
            (print_pairs if "table" in result else print_single)(result)
        print(_sources(asked))


def questions_or_none(given: Path | None, data_dir: Path | None, load: Callable[[Path], Any]) -> Any:
    if given is not None:
        return load(given)
    from mambalign.evals.data import find_data

    try:
        return load(find_data("mt-bench questions", data_dir))
    except mambalign.UserError:
        if data_dir is not None:
            raise
        return None


def gamed_or_none(wanted: bool, data_dir: Path | None) -> Any:
    """What the length-controlled win rate is fitted with, if it is wanted."""
    if not wanted:
        return None
    from mambalign.evals.data import find_data
    from mambalign.evals.length_control import load_gamed

    return load_gamed(find_data("alpaca gamed", data_dir))


def instructions_or_none(given: Path | None, data_dir: Path | None, needed: bool = False) -> list[str] | None:
    """AlpacaEval's instructions, from a file of rows; None where none was named, and none is found or `needed`."""
    from mambalign.evals.alpaca_eval import load_outputs
    from mambalign.evals.data import find_data

    try:
        source = given or find_data("alpaca reference 2", data_dir)
    except mambalign.UserError:
        if data_dir is not None or needed:
            raise
        return None
    return [row.instruction for row in load_outputs(source)]


def _sources(asked: Any) -> str:
    if asked is None:
        return "no question file: completeness is judged by the questions in the file (mambalign eval fetch-data)"
    return f"{len(asked)} questions"


def is_pairwise(path: Path) -> bool:
    from mambalign.data.json_rows import json_rows

    return "model_1" in next((row for _, row in json_rows(path)), {})


def print_single(result: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from mambalign.evals.mt_bench_scores import notes

    console = make_console()
    state = "" if result["final"] else f" {PROVISIONAL}"
    title = f"{escape(result['model'])}, judged by {escape(result['judge'])}{state}"
    table = Table("", "mean", "s.e.", "95 % interval", "turn 1", "turn 2", title=title, title_justify="left", box=None)
    for name, key in (("average", "average"), ("first turn", "first_turn"), ("second turn", "second_turn")):
        table.add_row(name, *_bars(result[key], result["errors"][key]))
    for name, mean in result["categories"].items():
        turns = (_number(turn) for turn in result["category_turns"][name])
        table.add_row(name, *_bars(mean, result["errors"][name]), *turns)
    console.print(table)
    console.print("\n".join(f"  {note}" for note in notes(result)), markup=False)


def print_pairs(result: dict[str, Any]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from mambalign.evals.mt_bench_scores import pair_notes

    state = "" if result["final"] else f" {PROVISIONAL}"
    against = f" against {escape(result['baseline'])}" if result["baseline"] else ""
    columns = ("model", "judge", "win", "loss", "tie", "win rate", "loss rate", "adjusted", "turn 1", "turn 2")
    table = Table(*columns, title=f"pairwise{against}{state}", title_justify="left", box=None)
    turns = [
        {(row["model"], row["judge"]): row["win_rate_adjusted"] for row in part} for part in result["turns"].values()
    ]
    for row in result["table"]:
        counts = (str(row[key]) for key in ("win", "loss", "tie"))
        rates = (_number(row[key], 4) for key in ("win_rate", "loss_rate", "win_rate_adjusted"))
        by_turn = (_number(turn.get((row["model"], row["judge"])), 4) for turn in turns)
        table.add_row(escape(row["model"]), escape(row["judge"]), *counts, *rates, *by_turn)
    make_console().print(table)
    if result["n_missing"] or result["n_errors"]:
        print(
            f"  NOT FINAL: {result['n_missing']} matches are missing, {result['n_errors']} have no verdict (left out)"
        )
    for note in pair_notes(result):
        print(f"  {note}")
    if result["first_shown"] is not None:
        print(
            f"  the judge kept its verdict when answers were swapped in {result['consistent']:.1%} of the matches; "
            f"what was shown first won {result['first_shown']:.1%} of decided games (p = {result['first_shown_p']:.2g})"
        )


@alpaca_app.command("show")
def show_alpaca(
    annotations: Annotated[list[Path], typer.Argument(metavar="ANNOTATIONS.json...", help="One file a model.")],
    instructions: Annotated[
        Path | None, typer.Option(help="The benchmark's rows, or the reference's; default: the data folder's.")
    ] = None,
    length_control: Annotated[
        bool, typer.Option("--length-control", help="Fit the length-controlled win rate too (needs df_gamed.csv).")
    ] = False,
    positional: Annotated[
        bool, typer.Option("--positional", help="Difficulties by row, as alpaca_eval; parity only.", hidden=True)
    ] = False,
    leaderboard: Annotated[Path | None, typer.Option(help="Write alpaca_eval's leaderboard.csv, too.")] = None,
    data_dir: DataDir = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Print AlpacaEval's win rates, as alpaca_eval computes them, with what they hide.

    A win rate is not final while an instruction has no verdict. The length-controlled one needs scikit-learn and the
    hub's df_gamed.csv; difficulties are joined by instruction.

    Example: [bold]mambalign eval alpaca show results/mamba-dpo/weighted_alpaca_eval_gpt4_turbo/annotations.json[/]
    """
    log_to_stderr()
    with user_errors(debug):
        from mambalign.evals import alpaca_eval
        from mambalign.evals.alpaca_scores import leaderboard_of, summarize

        gamed = gamed_or_none(length_control, data_dir)
        asked = instructions_or_none(instructions, data_dir, needed=length_control)
        results = [summarize(alpaca_eval.load_annotations(path), asked, gamed, positional=positional)
                   for path in annotations]  # fmt: skip
        if leaderboard is not None:
            leaderboard.write_text(leaderboard_of(results), encoding="utf-8")
        if as_json:
            print(json.dumps(results, indent=2))
            return
        print_alpaca(results)
        if asked is None:
            print("no instructions to compare with: completeness is not checked (mambalign eval fetch-data)")


def print_alpaca(results: list[dict[str, Any]]) -> None:
    from rich.markup import escape
    from rich.table import Table

    from mambalign.evals.alpaca_scores import notes

    columns = ("model", "judge", "against", "win rate", "s.e.", "95 % interval", "wins", "losses", "draws", "n",
               "discrete", "length", "LC", "LC s.e.")  # fmt: skip
    table = Table(*columns, box=None, pad_edge=False)
    for result in results:
        name = escape(result["model"]) + ("" if result["final"] else f" {PROVISIONAL}")
        counts = (str(result[key]) for key in ("n_wins", "n_wins_base", "n_draws", "n_total"))
        bars = {"standard_error": result["standard_error"], "interval": result["interval"]}
        controlled = (_number(result.get(key)) for key in ("length_controlled_winrate", "lc_standard_error"))
        table.add_row(
            name, escape(result["judge"]), escape(result["reference"]), *_bars(result["win_rate"], bars), *counts,
            _number(result["discrete_win_rate"]), str(result["avg_length"]), *controlled,
        )  # fmt: skip
    make_console().print(table)
    for result in results:
        for note in notes(result):
            print(f"  {result['model']}: {note}")


def _bars(mean: float | None, errors: dict[str, Any]) -> tuple[str, str, str]:
    interval = errors["interval"]
    ends = f"{interval[0]:.2f} to {interval[1]:.2f}" if interval else ""
    return _number(mean), _number(errors["standard_error"]), ends


def _number(value: float | None, digits: int = 3) -> str:
    return "" if value is None else f"{value:.{digits}f}"
