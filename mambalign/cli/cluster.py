"""Verbs for chains of stages: run them here, submit them to a cluster, ask what became of them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mambalign
from mambalign.cli.app import app
from mambalign.cli.common import AsJson, Debug, log_to_stderr, user_errors

if TYPE_CHECKING:
    from mambalign.cluster.pipeline import Pipeline, RecipeFacts

PANEL = "Pipelines"
PipelinePath = Annotated[Path, typer.Argument(metavar="PIPELINE", help="A pipeline's YAML file.", show_default=False)]
OutDir = Annotated[
    Path | None, typer.Option("--out", help="Folder of frozen recipes, logs and job files; default: runs/NAME.")
]


def read_recipe(kind: str, path: str, overrides: Mapping[str, Any]) -> RecipeFacts:
    """What a pipeline needs to know of a recipe."""
    from mambalign.cluster.pipeline import RecipeFacts
    from mambalign.recipe import load_recipe

    words = [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]
    recipe = load_recipe(path, words, stage=kind)
    names = [recipe.model_name_or_path, recipe.tokenizer_name_or_path, recipe.chat_template, recipe.deepspeed]
    paths = [name for name in (*names, *recipe.dataset_mixer) if name and len(name) < 4096]
    began = Path(str(recipe.output_dir)).expanduser()
    if began.is_dir() and any(began.iterdir()):
        paths.append(str(recipe.output_dir))
    return RecipeFacts(
        text=recipe.to_yaml(),
        output_dir=str(recipe.output_dir),
        model=str(recipe.model_name_or_path),
        inputs=tuple(dict.fromkeys(name for name in paths if Path(name).expanduser().exists())),
        fixed_batch=recipe.global_batch_size is not None,
        accumulation=recipe.accumulation_steps,
    )


def load_pipeline(path: Path) -> Pipeline:
    from mambalign.cluster.pipeline import read_pipeline
    from mambalign.recipe import read_yaml_map

    return read_pipeline(read_yaml_map(path, "pipeline"), str(path), read_recipe)


def _tell_notes(pipeline: Pipeline) -> None:
    from mambalign.cli.common import say

    for note in pipeline.notes:
        say(f"note: {note}")


@app.command(rich_help_panel=PANEL)
def run(
    pipeline: PipelinePath,
    start: Annotated[
        str | None, typer.Option("--from", help="First stage to run; what is before must be done.")
    ] = None,
    only: Annotated[list[str] | None, typer.Option("--only", help="Run this stage alone (can be repeated).")] = None,
    out: OutDir = None,
    gpus: Annotated[int | None, typer.Option(min=0, help="GPUs to use at most; default: all that are visible.")] = None,
    debug: Debug = False,
) -> None:
    """Run a chain of stages (SFT, DPO, evaluation ...) on this machine, one after the other.

    Stopped, killed or failed? The same command goes on where it was: finished stages are passed over, a training
    resumes from its newest checkpoint. An evaluation or command runs again where what it needs was made anew.

    Example: [bold]mambalign run recipes/tiny/pipeline.yaml --from dpo[/]
    """
    log_to_stderr()
    with user_errors(debug, interrupted="; run the same command again to go on"):
        from mambalign.cluster.local import StageFailed, run_pipeline
        from mambalign.cluster.submit import prepare

        loaded = load_pipeline(pipeline)
        _tell_notes(loaded)
        names = [stage.name for stage in loaded.stages]
        chosen = [loaded.stage(name).name for name in only or []]
        if start is not None and chosen:
            raise mambalign.UserError("--from and --only exclude each other")
        if start is not None:
            chosen = names[names.index(loaded.stage(start).name) :]
        folder = out or Path("runs") / loaded.name
        prepare(loaded, folder, "local")
        try:
            code = run_pipeline(loaded, folder, chosen, lambda line: print(line, flush=True), gpus)
        except StageFailed as error:
            from mambalign.cli.common import say

            say(str(error))
            raise typer.Exit(1) from None
        if code:
            raise typer.Exit(code)


@app.command(rich_help_panel=PANEL)
def submit(
    pipeline: PipelinePath,
    to: Annotated[str, typer.Option("--to", help="local, slurm or htcondor.")],
    profile: Annotated[
        Path | None, typer.Option(help="The cluster's profile; recipes/clusters/ has commented examples.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the files; write and submit nothing.")] = False,
    out: OutDir = None,
    debug: Debug = False,
) -> None:
    """Turn a chain of stages into jobs of a cluster that survive eviction, and submit them.

    Needs no torch. The recipes are frozen: what you edit later does not change what waits in the queue.

    Example: [bold]mambalign submit chain.yaml --to slurm --profile recipes/clusters/slurm.yaml --dry-run[/]
    """
    log_to_stderr()
    with user_errors(debug):
        from mambalign.cluster.submit import SCHEDULERS, submit_pipeline
        from mambalign.recipe import read_yaml_map

        if to not in SCHEDULERS:
            from mambalign.recipe import nearest

            raise mambalign.UserError(f"--to must be {', '.join(SCHEDULERS)}, not {to!r}{nearest(to, SCHEDULERS)}")
        loaded = load_pipeline(pipeline)
        _tell_notes(loaded)
        site = read_yaml_map(profile, "profile") if profile else {}
        folder = out or Path("runs") / loaded.name
        for line in submit_pipeline(loaded, folder, to, site, str(profile), pipeline_path=pipeline, dry_run=dry_run):
            print(line)


@app.command(rich_help_panel=PANEL)
def status(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of `run` or `submit`, or of one training run.")],
    watch: Annotated[bool, typer.Option("--watch", help="Again every few seconds, until all is done.")] = False,
    every: Annotated[float, typer.Option(min=1, help="Seconds between two looks of --watch.")] = 10,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say how a chain is doing: stages, progress, time left, restarts, lost seconds, why it waits, what to do next.

    Example: [bold]mambalign status runs/tiny --watch[/]
    """
    with user_errors(debug):
        from mambalign.cluster.status import is_over, read_status, render

        while True:
            report = read_status(folder)
            print(json.dumps(report, indent=2) if as_json else render(report), flush=True)
            if not watch or is_over(report):
                return
            time.sleep(every)


@app.command(rich_help_panel=PANEL)
def why(
    job: Annotated[str, typer.Argument(metavar="JOB|RUN", help="Job id, or the folder of `submit`.")],
    debug: Debug = False,
) -> None:
    """Say why a job does not start, and what would make it start sooner.

    Example: [bold]mambalign why runs/tiny[/]
    """
    with user_errors(debug):
        from mambalign.cluster.why import explain

        print("\n".join(explain(job)))
