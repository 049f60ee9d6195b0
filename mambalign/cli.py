"""The command line. Each verb is a few lines over one library function, which is imported when the verb runs.

Exit codes: 0 done; 1 a crash (a traceback says where) or a diverged loss; 2 something the user wrote (one sentence says
what); 85 stopped by a signal after a checkpoint, run it again; 130 interrupted from the keyboard.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

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
recipes_app = typer.Typer(help="List recipes, show one in full, explain their keys.", no_args_is_help=True)
app.add_typer(recipes_app, name="recipes")

# Words that the verb does not know are overrides of the recipe: --learning_rate 1e-5.
_OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
_TRAINING_VERBS = "[dim]Every key of the recipe is an option too: `mambalign recipes keys` explains them.[/]"


# --- errors ----------------------------------------------------------------------------------------------------------


def _say(message: str) -> None:
    print(f"mambalign: {message}", file=sys.stderr)


def _raised_by_us(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(mambalign.__file__).parent)


def _sentence(error: BaseException) -> str | None:
    """What to tell the user about their mistake; None when the error is not one."""
    if isinstance(error, OSError):
        if error.errno == errno.ENOSPC:
            return f"the disk is full ({error.filename or 'while writing'}); nothing that was complete is lost"
        kinds = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
        if isinstance(error, kinds) and (error.filename or _raised_by_us(error)):
            return f"{error.filename}: {error.strerror}" if error.strerror and error.filename else str(error)
        return None
    if type(error).__name__ == "OutOfMemoryError":
        return "out of device memory; lower per_device_train_batch_size or set max_tokens_per_device"
    if isinstance(error, mambalign.UserError) or (isinstance(error, ValueError) and _raised_by_us(error)):
        return str(error)
    return None


@contextmanager
def _user_errors(debug: bool, interrupted: str = "") -> Iterator[None]:
    """Turn a user's mistake into one sentence and exit code 2; anything else stays a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print(file=sys.stderr)  # the cursor stands in a progress bar, behind ^C
        _say(f"interrupted{interrupted}")
        raise typer.Exit(130) from None
    except Exception as error:
        diverged = type(error).__name__ == "NonFiniteLossError"  # by name: importing it would import torch
        sentence = str(error) if diverged else _sentence(error)
        if sentence is None:
            raise
        if debug:
            traceback.print_exc()
        _say(sentence)
        raise typer.Exit(1 if diverged else 2) from None


def _log() -> None:
    """Our log to stderr; of several processes only the first says what is not a warning."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    for library in ("datasets", "huggingface_hub"):  # they have handlers of their own and would say all twice
        logging.getLogger(library).propagate = False
    main_process = os.environ.get("RANK", "0") == "0"
    logging.getLogger("mambalign").setLevel(logging.INFO if main_process else logging.ERROR)


# --- training --------------------------------------------------------------------------------------------------------


def _train(stage: str, recipe: str, overrides: list[str], debug: bool) -> None:
    _log()
    with _user_errors(debug, interrupted="; run the same command again to go on from the newest checkpoint"):
        loaded = mambalign.load_recipe(_recipe_path(recipe), overrides, stage=stage)
        from mambalign.train.run import run

        result = run(stage, loaded)
        if os.environ.get("RANK", "0") == "0":
            done = "was finished before" if result.already_finished else "finished"
            print(f"{done}: {result.global_step} steps; the model is in {result.output_dir}")


def _recipe_path(word: str) -> str:
    if word.startswith("-"):
        raise mambalign.UserError(f"the recipe comes first, then options such as {word}")
    return word


@app.command(context_settings=_OVERRIDES, epilog=_TRAINING_VERBS)
def cpt(ctx: typer.Context, recipe: RecipePath, debug: Debug = False) -> None:
    """Continue the pre-training of a model on plain text.

    Long texts are cut, short ones packed into rows of max_length tokens whose states never mix.

    Example: [bold]mambalign cpt my/cpt.yaml --learning_rate 1e-4 --max_steps 1000[/]
    """
    _train("cpt", recipe, ctx.args, debug)


@app.command(context_settings=_OVERRIDES, epilog=_TRAINING_VERBS)
def sft(ctx: typer.Context, recipe: RecipePath, debug: Debug = False) -> None:
    """Fine-tune a model on conversations (supervised fine-tuning).

    Trains on the assistant's turns. Running the same command again resumes; a finished run says so.

    Example: [bold]mambalign sft recipes/mamba-130m/sft/config_full.yaml --max_train_samples 2000[/]

    On 8 GPUs: [bold]torchrun --nproc-per-node 8 -m mambalign sft RECIPE[/]
    """
    _train("sft", recipe, ctx.args, debug)


@app.command(context_settings=_OVERRIDES, epilog=_TRAINING_VERBS)
def dpo(ctx: typer.Context, recipe: RecipePath, debug: Debug = False) -> None:
    """Align a fine-tuned model to preferences (DPO, and IPO, SimPO, ORPO, KTO and others by loss_type).

    Start from the result of an SFT run, whose weights are also the reference.

    A prompt is computed once for both completions, the reference's log-probabilities once for the run.

    Example: [bold]mambalign dpo recipes/mamba-130m/dpo/config_full.yaml --beta 0.1[/]
    """
    _train("dpo", recipe, ctx.args, debug)


@app.command(context_settings=_OVERRIDES, epilog=_TRAINING_VERBS)
def reward(ctx: typer.Context, recipe: RecipePath, debug: Debug = False) -> None:
    """Train a reward model on preferences: one score for an answer, higher where people would prefer it.

    A scalar head on the model, Bradley-Terry loss, with margins if the data have a column `margin`. Start from the
    result of an SFT run, or from a reward model, whose head is then trained on.

    Watch rewards/accuracies beside lengths/accuracies, what preferring the longer answer would reach.

    Example: [bold]mambalign reward recipes/mamba-130m/reward/config_full.yaml --learning_rate 3e-5[/]
    """
    _train("reward", recipe, ctx.args, debug)


# --- reward models at work -------------------------------------------------------------------------------------------


Out = Annotated[Path | None, typer.Option("--out", help="File to write; default: beside the input.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; default: the GPU if there is one.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Type of the weights: float32, bfloat16 or auto (as stored).")]


@app.command()
def score(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A reward model: a `mambalign reward` run's folder.")],
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="Rows with answers.", show_default=False)],
    out: Out = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a forward pass; lower it if memory is short.")] = (
        16384
    ),
    device: Device = None,
    dtype: Dtype = "float32",
    debug: Debug = False,
) -> None:
    """Score answers with a reward model and rank them.

    A row is {"prompt": text or messages, "responses": [...]}, or {"messages": [...], "responses": [...]}, or a
    preference pair {"chosen": ..., "rejected": ...}. Rows come out in their order with `scores`, one a response, and
    `ranking`, best first; of pairs the accuracy is printed too, beside that of length alone.

    Killed? The same command goes on where it stopped.

    Example: [bold]mambalign score runs/reward answers.jsonl --out ranked.jsonl[/]
    """
    _log()
    with _user_errors(debug, interrupted="; run the same command again to go on"):
        from mambalign.generation.scoring import score_file

        out = out or file.with_suffix(".scored.jsonl")
        _summary(out, score_file(model, file, out, device=device, dtype=dtype, max_tokens=max_tokens))


@app.command("best-of-n")
def best_of_n(
    policy: Annotated[str, typer.Argument(metavar="POLICY", help="The model that answers.", show_default=False)],
    reward_model: Annotated[str, typer.Argument(metavar="REWARD", help="The reward model.", show_default=False)],
    prompts: Annotated[Path, typer.Argument(metavar="PROMPTS.jsonl", help="Rows with prompts.", show_default=False)],
    n: Annotated[int, typer.Option("-n", help="Answers a prompt.")] = 8,
    out: Out = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(help="Of sampling; lower is more alike.")] = 1.0,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="With a prompt's tokens it decides the answers to it.")] = 42,
    device: Device = None,
    dtype: Dtype = "float32",
    debug: Debug = False,
) -> None:
    """Answer every prompt n times and keep the answer that a reward model scores highest.

    A row is {"prompt": text or messages} or {"messages": [...]}. Rows come out in their order with `best` and all
    `candidates`, their scores, and whether the model finished them. The policy's and the reward model's own chat
    templates are used.

    Killed? The same command goes on where it stopped, with the same answers.

    Example: [bold]mambalign best-of-n runs/sft runs/reward prompts.jsonl -n 8 --temperature 0.8[/]
    """
    _log()
    with _user_errors(debug, interrupted="; run the same command again to go on"):
        from mambalign.generation.best_of_n import best_of_n as choose
        from mambalign.generation.sampling import Sampling

        sampling = Sampling(n, max_new_tokens, temperature, top_p, seed)
        out = out or prompts.with_suffix(f".best-of-{n}.jsonl")
        _summary(out, choose(policy, reward_model, prompts, out, sampling, device=device, dtype=dtype))


def _summary(out: Path, summary: dict[str, Any]) -> None:
    print(f"{out}: {'was finished before' if summary.pop('finished_before', False) else 'finished'}")
    for name, value in summary.items():
        print(f"  {name.replace('_', ' ')}: {value:,}")


# --- looking, converting ---------------------------------------------------------------------------------------------


@app.command(context_settings=_OVERRIDES, epilog=_TRAINING_VERBS)
def check(
    ctx: typer.Context,
    recipe: RecipePath,
    stage: Annotated[str | None, typer.Option(help="cpt, sft, dpo or reward, if recipe and folder do not say.")] = None,
    devices: Annotated[int, typer.Option(min=1, help="Devices the run will have.")] = 1,
    full: Annotated[bool, typer.Option("--full", help="Tokenise every row, not a sample of 1000.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check a recipe without training: files, columns, template, tokens, batch, memory, steps, known mistakes.

    Exits with 0 when the recipe can be run, with or without warnings, and with 2 when it cannot.

    Example: [bold]mambalign check recipes/mamba-130m/dpo/config_full.yaml --devices 8[/]
    """
    with _user_errors(debug):
        path = _recipe_path(recipe)
        _quiet_libraries()
        problem = _without_a_silent_hub()
        from mambalign.check import check as check_recipe
        from mambalign.check import show

        # The report carries the recipe's notes itself.
        logging.getLogger("mambalign").setLevel(logging.ERROR)
        report = check_recipe(path, ctx.args, stage=stage, devices=devices, full=full)
        if problem:
            report.notes = [*report.notes, f"the hub is offline, {problem}: only what is cached was looked at"]
        if as_json:
            print(json.dumps(report.to_dict(), indent=2))
        else:
            show(report, _console())
        if not report.usable:
            raise typer.Exit(2)


@app.command()
def plot(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", help="Picture to write: .svg, .png or .pdf.")] = Path("curves.svg"),
    debug: Debug = False,
) -> None:
    """Draw the curves of runs, finished or not: loss, rewards, accuracy, tokens per second.

    Example: [bold]mambalign plot runs/sft runs/dpo --out curves.png[/]
    """
    with _user_errors(debug):
        from mambalign.train.curves import draw

        print(draw(runs, out))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Model folder or hub id, in either layout.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="New folder.")],
    to: Annotated[str, typer.Option(help="hf (transformers, vLLM) or mamba-ssm (the original state-spaces layout).")],
    debug: Debug = False,
) -> None:
    """Rewrite a model in the other layout, and compare parameters and logits before claiming success.

    Example: [bold]mambalign convert state-spaces/mamba-130m my/mamba-130m-hf --to hf[/]
    """
    _log()
    with _user_errors(debug):
        if to not in ("hf", "mamba-ssm"):
            raise mambalign.UserError(f"--to must be hf or mamba-ssm, not {to!r}")
        if not Path(source).expanduser().exists():
            _without_a_silent_hub()
        from mambalign.models.checkpoint import convert as convert_model

        report = convert_model(source, destination, to)  # type: ignore[arg-type]
        difference = report.max_abs_logit_difference
        print(f"{report.destination}: {report.tensors} tensors, {report.bytes / 1e6:,.1f} MB, in the {to} layout")
        print(f"compared with {report.source}: parameters equal, logits differ by at most {difference:g}")
        for note in report.notes:
            print(f"note: {note}")


@app.command()
def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, checkpoint or hub id with an adapter.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="New folder.")],
    base: Annotated[str | None, typer.Option(help="The base model, where it is not where the adapter says.")] = None,
    debug: Debug = False,
) -> None:
    """Put an adapter into its base model, compare logits before and after, and write plain transformers files.

    Example: [bold]mambalign merge data/mamba-2.8b-dpo-qlora my/mamba-2.8b-chat[/]
    """
    _log()
    with _user_errors(debug):
        if not Path(run).expanduser().exists():
            _without_a_silent_hub()
        from mambalign.models.lineage import merge_adapter

        report = merge_adapter(run, out, base=base)
        print(f"{report.destination}: {report.source} on {report.base}, {report.bytes / 1e6:,.1f} MB")
        print(f"compared with the model before merging: logits differ by at most {report.max_abs_logit_difference:g}")
        for note in report.notes:
            print(f"note: {note}")


@app.command()
def doctor(as_json: AsJson = False, debug: Debug = False) -> None:
    """Print versions, devices, the backend of every op and why, and where models and data come from.

    Example: [bold]mambalign doctor --json > environment.json[/]
    """
    with _user_errors(debug):
        _quiet_libraries()
        from mambalign.doctor import diagnose

        logging.getLogger("mambalign").setLevel(logging.ERROR)
        facts = diagnose()
        if as_json:
            print(json.dumps(facts, indent=2))
            return
        console = _console()
        for heading, values in facts.items():
            console.print(_table(heading, values))
            console.print()


@app.command()
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
    _log()
    with _user_errors(debug, interrupted="; run the same command again"):
        from mambalign.demo.main import run_demo

        run_demo(output_dir, seed=seed, quick=quick)


# --- recipes ---------------------------------------------------------------------------------------------------------


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
    with _user_errors(debug):
        if folder is None:
            brought = Path(mambalign.__file__).parent / "recipes"
            folder = brought if brought.is_dir() and not Path("recipes").is_dir() else Path("recipes")
        if not folder.is_dir():
            raise mambalign.UserError(f"there is no folder {folder} here; name the one that holds your recipes")
        logging.getLogger("mambalign").setLevel(logging.ERROR)
        console = _console()
        from rich.table import Table

        from mambalign.recipe import STAGES

        table = Table(_name("recipe"), "stage", _long("starts from"), _long("data"), box=None, pad_edge=False)
        for path in sorted(folder.rglob("*.y*ml")):
            if path.parent.name in STAGES:
                recipe = mambalign.load_recipe(path)
                name = recipe.model_name_or_path or ""
                table.add_row(str(path), recipe.stage or path.parent.name, name, ", ".join(recipe.dataset_mixer))
        console.print(table)


@recipes_app.command("show", context_settings=_OVERRIDES)
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

    _log()
    with _user_errors(debug):
        path = _recipe_path(recipe)
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
    with _user_errors(debug):
        from rich.markup import escape
        from rich.table import Table

        from mambalign.recipe import key_default, key_groups, key_types, nearest, type_name

        groups = key_groups()
        if group is not None and group not in groups:
            hint = nearest(group, groups)
            raise mambalign.UserError(f"there is no group {group!r}{hint}; groups: {', '.join(groups)}")
        console = _console()
        for name in [group] if group else groups:
            columns = _name("key"), _long("default"), "meaning"
            table = Table(*columns, title=name, title_justify="left", box=None, pad_edge=False)
            for item in groups[name]:
                default = "null" if (value := key_default(item)) is None else json.dumps(value)
                kind = type_name(key_types()[item.name])
                choices = f" ({kind})" if kind.startswith("one of") else ""
                table.add_row(item.name, escape(default), escape(item.metadata["help"] + choices))
            console.print(table)
            console.print()


# --- helpers ---------------------------------------------------------------------------------------------------------


def _console() -> Any:
    from rich.console import Console

    # Piped output is not cut to 80 columns.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def _name(header: str) -> Any:
    """A column of what one types: never cut."""
    from rich.table import Column

    return Column(header, no_wrap=True, overflow="fold")


def _long(header: str) -> Any:
    """A column of words without spaces, which break rather than end in an ellipsis."""
    from rich.table import Column

    return Column(header, overflow="fold")


def _table(heading: str, values: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=heading, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", min_width=20)
    table.add_column()
    for name, value in values.items():
        table.add_row(name.replace("_", " "), escape(str(value)))
    return table


def _quiet_libraries() -> None:
    """No progress bars and advice of the libraries around our own report."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _without_a_silent_hub() -> str | None:
    """Where the hub cannot be reached, use only what is cached; returns why. Before the hub's client is imported."""
    from mambalign.doctor import hub_problem

    problem = hub_problem()
    if problem:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return problem


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


def main() -> None:
    """Entry point of the `mambalign` command."""
    app()


if __name__ == "__main__":
    main()
