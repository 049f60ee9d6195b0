"""Verbs of evaluation: the benchmarks' files, answers, judgments and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mambalign.cli.app import app
from mambalign.cli.common import Debug, log_to_stderr, user_errors

PANEL = "Evaluation"
_HELP = {"no_args_is_help": True, "rich_markup_mode": "rich"}
eval_app = typer.Typer(help="MT-Bench and AlpacaEval: answers, judgments, scores with error bars.", **_HELP)
mt_bench_app = typer.Typer(help="MT-Bench: 80 questions of two turns, in FastChat's formats.", **_HELP)
alpaca_app = typer.Typer(help="AlpacaEval 1 and 2: 805 instructions against a reference, in its formats.", **_HELP)
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
