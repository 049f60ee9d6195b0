"""Training verbs and what goes with a recipe: check it, list recipes, draw curves."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated

import typer

import mambalign
from mambalign.cli.app import app
from mambalign.cli.common import (
    OVERRIDES,
    AsJson,
    Debug,
    RecipePath,
    log_to_stderr,
    long_column,
    make_console,
    name_column,
    quiet_libraries,
    recipe_path,
    user_errors,
    without_a_silent_hub,
)

PANEL = "Train"
_TRAINING_VERBS = "[dim]Every key of the recipe is an option too: `mambalign recipes keys` explains them.[/]"

recipes_app = typer.Typer(help="List recipes, show one in full, explain their keys.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes", rich_help_panel=PANEL)


def _train(stage: str, recipe: str, overrides: list[str], debug: bool) -> None:
    log_to_stderr()
    with user_errors(debug, interrupted="; run the same command again to go on from the newest checkpoint"):
        loaded = mambalign.load_recipe(recipe_path(recipe), overrides, stage=stage)
        from mambalign.train.processes import leaving
        from mambalign.train.run import run

        with leaving():
            result = run(stage, loaded)
        if os.environ.get("RANK", "0") == "0":
            done = "was finished before" if result.already_finished else "finished"
            print(f"{done}: {result.global_step} steps; the model is in {result.output_dir}")


@app.command(context_settings=OVERRIDES, epilog=_TRAINING_VERBS, rich_help_panel=PANEL)
def cpt(ctx: typer.Context, recipe: RecipePath, debug: Debug = False) -> None:
    """Continue the pre-training of a model on plain text.

    Long texts are cut, short ones packed into rows of max_length tokens whose states never mix.

    Example: [bold]mambalign cpt my/cpt.yaml --learning_rate 1e-4 --max_steps 1000[/]
    """
    _train("cpt", recipe, ctx.args, debug)


@app.command(context_settings=OVERRIDES, epilog=_TRAINING_VERBS, rich_help_panel=PANEL)
def sft(ctx: typer.Context, recipe: RecipePath, debug: Debug = False) -> None:
    """Fine-tune a model on conversations (supervised fine-tuning).

    Trains on the assistant's turns. Running the same command again resumes; a finished run says so.

    Example: [bold]mambalign sft recipes/mamba-130m/sft/config_full.yaml --max_train_samples 2000[/]

    On 8 GPUs: [bold]torchrun --nproc-per-node 8 -m mambalign sft RECIPE[/]
    """
    _train("sft", recipe, ctx.args, debug)


@app.command(context_settings=OVERRIDES, epilog=_TRAINING_VERBS, rich_help_panel=PANEL)
def dpo(ctx: typer.Context, recipe: RecipePath, debug: Debug = False) -> None:
    """Align a fine-tuned model to preferences (DPO, and IPO, SimPO, ORPO, KTO and others by loss_type).

    Start from the result of an SFT run, whose weights are also the reference.

    A prompt is computed once for both completions, the reference's log-probabilities once for the run.

    Example: [bold]mambalign dpo recipes/mamba-130m/dpo/config_full.yaml --beta 0.1[/]
    """
    _train("dpo", recipe, ctx.args, debug)


@app.command(context_settings=OVERRIDES, epilog=_TRAINING_VERBS, rich_help_panel=PANEL)
def reward(ctx: typer.Context, recipe: RecipePath, debug: Debug = False) -> None:
    """Train a reward model on preferences: one score for an answer, higher where people would prefer it.

    A scalar head on the model, Bradley-Terry loss, with margins if the data have a column `margin`. Start from the
    result of an SFT run, or from a reward model, whose head is then trained on.

    Watch rewards/accuracies beside lengths/accuracies, what preferring the longer answer would reach.

    Example: [bold]mambalign reward recipes/mamba-130m/reward/config_full.yaml --learning_rate 3e-5[/]
    """
    _train("reward", recipe, ctx.args, debug)


@app.command(context_settings=OVERRIDES, epilog=_TRAINING_VERBS, rich_help_panel=PANEL)
def check(
    ctx: typer.Context,
    recipe: RecipePath,
    stage: Annotated[str | None, typer.Option(help="cpt, sft, dpo or reward, if recipe and folder do not say.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices the run will have.")] = 1,
    full: Annotated[bool, typer.Option("--full", help="Tokenise every row, not a sample of 1000.")] = False,
    card: Annotated[
        str | None, typer.Option(help="Plan for this card: h200, h100, a100-80, a100-40, l40s, rtx-4090, 24gb ...")
    ] = None,
    gpus: Annotated[int | None, typer.Option(min=1, help="Cards the proposal may take; as few as it takes.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check a recipe without training: files, columns, template, tokens, batch, memory, time, steps, known mistakes.

    Exits with 0 when the recipe can be run, with or without warnings, and with 2 when it cannot.

    Example: [bold]mambalign check recipes/mamba-130m/dpo/config_full.yaml --devices 8[/]
    """
    with user_errors(debug):
        path = recipe_path(recipe)
        quiet_libraries()
        problem = without_a_silent_hub()
        from mambalign.check import check as check_recipe
        from mambalign.check import show

        # The report carries the recipe's notes itself.
        logging.getLogger("mambalign").setLevel(logging.ERROR)
        report = check_recipe(path, ctx.args, stage=stage, devices=devices, full=full, card=card, gpus=gpus)
        if problem:
            report.notes = [*report.notes, f"the hub is offline, {problem}: only what is cached was looked at"]
        if as_json:
            print(json.dumps(report.to_dict(), indent=2))
        else:
            show(report, make_console())
        if not report.usable:
            raise typer.Exit(2)


@app.command(rich_help_panel=PANEL)
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Picture to write: .svg, .png or .pdf.")] = Path("curves.svg"),
    debug: Debug = False,
) -> None:
    """Draw the curves of runs, finished or not: loss, rewards, accuracy, tokens per second.

    Example: [bold]mambalign plot runs/sft runs/dpo --out curves.png[/]
    """
    with user_errors(debug):
        from mambalign.train.curves import draw

        print(draw(runs, out))


@recipes_app.command("list")
def list_recipes(
    folder: Annotated[
        Path | None, typer.Argument(help="Where to look: ./recipes, else those that mambalign brings.")
    ] = None,
    debug: Debug = False,
) -> None:
    """List the recipes under a folder: what each trains, on what.

    Example: [bold]mambalign recipes list recipes/mamba-130m[/]
    """
    with user_errors(debug):
        if folder is None:
            brought = Path(mambalign.__file__).parent / "recipes"
            folder = brought if brought.is_dir() and not Path("recipes").is_dir() else Path("recipes")
        if not folder.is_dir():
            raise mambalign.UserError(f"there is no folder {folder} here; name the one that holds your recipes")
        logging.getLogger("mambalign").setLevel(logging.ERROR)
        console = make_console()
        from rich.table import Table

        from mambalign.recipe import STAGES

        table = Table(
            name_column("recipe"), "stage", long_column("starts from"), long_column("data"), box=None, pad_edge=False
        )
        for path in sorted(folder.rglob("*.y*ml")):
            if path.parent.name in STAGES:
                recipe = mambalign.load_recipe(path)
                name = recipe.model_name_or_path or ""
                table.add_row(str(path), recipe.stage or path.parent.name, name, ", ".join(recipe.dataset_mixer))
        console.print(table)


@recipes_app.command("show", context_settings=OVERRIDES)
def show_recipe(
    ctx: typer.Context,
    recipe: RecipePath,
    stage: Annotated[str | None, typer.Option(help="cpt, sft, dpo or reward: with the defaults of that stage.")] = None,
    debug: Debug = False,
) -> None:
    """Print a recipe in full: with what it extends, your overrides, and every default, as YAML.

    Example: [bold]mambalign recipes show recipes/mamba-130m/sft/config_full.yaml --seed 1[/]
    """
    from mambalign.recipe import STAGES

    log_to_stderr()
    with user_errors(debug):
        path = recipe_path(recipe)
        folder = Path(path).resolve().parent.name
        loaded = mambalign.load_recipe(path, ctx.args, stage=stage or (folder if folder in STAGES else None))
        print(loaded.to_yaml(), end="")


@recipes_app.command("keys")
def show_keys(
    group: Annotated[str | None, typer.Option(help="Only this group, e.g. data.")] = None, debug: Debug = False
) -> None:
    """Print every key of a recipe with its default and what it means.

    Example: [bold]mambalign recipes keys --group objective[/]
    """
    with user_errors(debug):
        from rich.markup import escape
        from rich.table import Table

        from mambalign.recipe import key_default, key_groups, key_types, nearest, type_name

        groups = key_groups()
        if group is not None and group not in groups:
            hint = nearest(group, groups)
            raise mambalign.UserError(f"there is no group {group!r}{hint}; groups: {', '.join(groups)}")
        console = make_console()
        for name in [group] if group else groups:
            columns = name_column("key"), long_column("default"), "meaning"
            table = Table(*columns, title=name, title_justify="left", box=None, pad_edge=False)
            for item in groups[name]:
                default = "null" if (value := key_default(item)) is None else json.dumps(value)
                kind = type_name(key_types()[item.name])
                choices = f" ({kind})" if kind.startswith("one of") else ""
                table.add_row(item.name, escape(default), escape(item.metadata["help"] + choices))
            console.print(table)
            console.print()
