"""Verbs for a first look: this machine, and the whole pipeline in minutes."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Annotated

import typer

from mambalign.cli.app import app
from mambalign.cli.common import AsJson, Debug, log_to_stderr, make_console, make_table, quiet_libraries, user_errors

PANEL = "First"


@app.command(rich_help_panel=PANEL)
def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Print versions, devices, the backend of every op and why, and where models and data come from.

    Example: [bold]mambalign doctor --json > environment.json[/]
    """
    with user_errors(debug):
        quiet_libraries()
        from mambalign.doctor import diagnose

        logging.getLogger("mambalign").setLevel(logging.ERROR)
        facts = diagnose()
        if as_json:
            print(json.dumps(facts, indent=2))
            return
        console = make_console()
        for heading, values in facts.items():
            console.print(make_table(heading, values))
            console.print()


@app.command(rich_help_panel=PANEL)
def demo(
    output_dir: Annotated[Path, typer.Option("--output-dir", help="Folder for models, data and report.html.")] = Path(
        "demo-run"
    ),
    seed: Annotated[int, typer.Option(help="Seed of data and training.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="A few seconds a stage, to see that it runs; proves no more.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Pre-train, fine-tune and align a small Mamba from scratch, in minutes on a CPU, and compare the three.

    Needs no network and no judge: tasks and preferences are generated, and checked by program.

    Example: [bold]mambalign demo --output-dir demo-run[/]
    """
    log_to_stderr()
    with user_errors(debug, interrupted="; run the same command again"):
        from mambalign.demo.main import run_demo

        run_demo(output_dir, seed=seed, quick=quick)
