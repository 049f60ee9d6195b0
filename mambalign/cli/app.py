"""The program: what `mambalign` alone says."""

from __future__ import annotations

from typing import Annotated

import typer

import mambalign

app = typer.Typer(
    name="mambalign",
    help="Aligns Mamba language models: continued pre-training, SFT, DPO, reward models from YAML recipes, on a CPU or "
    "many GPUs.",
    epilog="New here? [bold]mambalign demo[/] shows all of it in minutes.\n\n"
    "Exit codes: 0 done, 1 a crash or a diverged loss, 2 a mistake in what was given (one sentence says which), "
    "85 stopped by a signal after a checkpoint, 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mambalign {mambalign.__version__}")
        raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass
