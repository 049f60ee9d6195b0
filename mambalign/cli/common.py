"""What the verbs share: options, errors as sentences, the log, tables."""

from __future__ import annotations

import errno
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

# Words that the verb does not know are overrides of the recipe: --learning_rate 1e-5.
OVERRIDES = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["-h", "--help"]}
RecipePath = Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's YAML file.", show_default=False)]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Out = Annotated[Path | None, typer.Option("--out", help="File to write; default: beside the input.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1; default: the GPU if there is one.")]
Dtype = Annotated[str, typer.Option("--dtype", help="Type of the weights: float32, bfloat16 or auto (as stored).")]


def say(message: str) -> None:
    print(f"mambalign: {message}", file=sys.stderr)


def _raised_by_us(error: BaseException) -> bool:
    frames = traceback.extract_tb(error.__traceback__)
    return bool(frames) and Path(frames[-1].filename).is_relative_to(Path(mambalign.__file__).parent)


def _sentence(error: BaseException) -> str | None:
    """What to tell the user about their mistake; None when the error is not one."""
    if isinstance(error, OSError):
        full = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the disk quota is used up"}
        if error.errno in full:
            where = error.filename or "while writing"
            return f"{full[error.errno]} ({where}); nothing that was complete is lost"
        kinds = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError, FileExistsError)
        if isinstance(error, kinds) and (error.filename or _raised_by_us(error)):
            return f"{error.filename}: {error.strerror}" if error.strerror and error.filename else str(error)
        return None
    if type(error).__name__ == "OutOfMemoryError":
        keys = "per_device_train_batch_size or set max_tokens_per_device; with state_passing lower state_passing_chunk"
        return f"out of device memory; lower {keys}"
    if isinstance(error, mambalign.UserError) or (isinstance(error, ValueError) and _raised_by_us(error)):
        return str(error)
    return None


@contextmanager
def user_errors(debug: bool, interrupted: str = "") -> Iterator[None]:
    """Turn a user's mistake into one sentence and exit code 2; anything else stays a traceback."""
    try:
        yield
    except KeyboardInterrupt:
        if debug:
            traceback.print_exc()
        print(file=sys.stderr)  # the cursor stands in a progress bar, behind ^C
        say(f"interrupted{interrupted}")
        raise typer.Exit(130) from None
    except Exception as error:
        diverged = type(error).__name__ == "NonFiniteLossError"  # by name: importing it would import torch
        sentence = str(error) if diverged else _sentence(error)
        if sentence is None:
            raise
        if debug:
            traceback.print_exc()
        say(sentence)
        raise typer.Exit(1 if diverged else 2) from None


def log_to_stderr() -> None:
    """Our log to stderr; of several processes only the first says what is not a warning."""
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s", level=logging.WARNING)
    for library in ("datasets", "huggingface_hub"):  # they have handlers of their own and would say all twice
        logging.getLogger(library).propagate = False
    main_process = os.environ.get("RANK", "0") == "0"
    logging.getLogger("mambalign").setLevel(logging.INFO if main_process else logging.ERROR)


def recipe_path(word: str) -> str:
    if word.startswith("-"):
        raise mambalign.UserError(f"the recipe comes first, then options such as {word}")
    return word


def make_console() -> Any:
    from rich.console import Console

    # Piped output is not cut to 80 columns.
    return Console(highlight=False, width=None if sys.stdout.isatty() else 200)


def name_column(header: str) -> Any:
    """A column of what one types: never cut."""
    from rich.table import Column

    return Column(header, no_wrap=True, overflow="fold")


def long_column(header: str) -> Any:
    """A column of words without spaces, which break rather than end in an ellipsis."""
    from rich.table import Column

    return Column(header, overflow="fold")


def make_table(heading: str, values: dict[str, Any]) -> Any:
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=heading, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim", min_width=20)
    table.add_column()
    for name, value in values.items():
        table.add_row(name.replace("_", " "), escape(str(value)))
    return table


def quiet_libraries() -> None:
    """No progress bars and advice of the libraries around our own report."""
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def without_a_silent_hub() -> str | None:
    """Where the hub cannot be reached, use only what is cached; returns why. Before the hub's client is imported."""
    from mambalign.doctor import hub_problem

    problem = hub_problem()
    if problem:
        os.environ["HF_HUB_OFFLINE"] = "1"
    return problem
