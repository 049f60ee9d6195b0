"""Verbs over finished models, and over this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import mambalign
from mambalign.cli.app import app
from mambalign.cli.common import (
    Debug,
    Device,
    Dtype,
    Out,
    log_to_stderr,
    user_errors,
    without_a_silent_hub,
)

PANEL = "Models"


@app.command(rich_help_panel=PANEL)
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
    log_to_stderr()
    with user_errors(debug, interrupted="; run the same command again to go on"):
        from mambalign.generation.scoring import score_file

        out = out or file.with_suffix(".scored.jsonl")
        print_summary(out, score_file(model, file, out, device=device, dtype=dtype, max_tokens=max_tokens))


@app.command("best-of-n", rich_help_panel=PANEL)
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
    log_to_stderr()
    with user_errors(debug, interrupted="; run the same command again to go on"):
        from mambalign.generation.best_of_n import best_of_n as choose
        from mambalign.generation.requests import Sampling

        sampling = Sampling(n, max_new_tokens, temperature, top_p, seed=seed)
        out = out or prompts.with_suffix(f".best-of-{n}.jsonl")
        print_summary(out, choose(policy, reward_model, prompts, out, sampling, device=device, dtype=dtype))


def print_summary(out: Path, summary: dict[str, Any]) -> None:
    print(f"{out}: {'was finished before' if summary.pop('finished_before', False) else 'finished'}")
    for name, value in summary.items():
        print(f"  {name.replace('_', ' ')}: {value:,}")


@app.command(rich_help_panel=PANEL)
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Model folder or hub id, in either layout.")],
    destination: Annotated[str, typer.Argument(metavar="DST", help="New folder.")],
    to: Annotated[str, typer.Option(help="hf (transformers, vLLM) or mamba-ssm (the original state-spaces layout).")],
    debug: Debug = False,
) -> None:
    """Rewrite a model in the other layout, and compare parameters and logits before claiming success.

    Example: [bold]mambalign convert state-spaces/mamba-130m my/mamba-130m-hf --to hf[/]
    """
    log_to_stderr()
    with user_errors(debug):
        if to not in ("hf", "mamba-ssm"):
            raise mambalign.UserError(f"--to must be hf or mamba-ssm, not {to!r}")
        if not Path(source).expanduser().exists():
            without_a_silent_hub()
        from mambalign.models.checkpoint import convert as convert_model

        report = convert_model(source, destination, to)  # type: ignore[arg-type]
        difference = report.max_abs_logit_difference
        print(f"{report.destination}: {report.tensors} tensors, {report.bytes / 1e6:,.1f} MB, in the {to} layout")
        print(f"compared with {report.source}: parameters equal, logits differ by at most {difference:g}")
        for note in report.notes:
            print(f"note: {note}")


@app.command(rich_help_panel=PANEL)
def merge(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder, checkpoint or hub id with an adapter.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="New folder.")],
    base: Annotated[str | None, typer.Option(help="The base model, where it is not where the adapter says.")] = None,
    debug: Debug = False,
) -> None:
    """Put an adapter into its base model, compare logits before and after, and write plain transformers files.

    Example: [bold]mambalign merge data/mamba-2.8b-dpo-qlora my/mamba-2.8b-chat[/]
    """
    log_to_stderr()
    with user_errors(debug):
        if not Path(run).expanduser().exists():
            without_a_silent_hub()
        from mambalign.models.lineage import merge_adapter

        report = merge_adapter(run, out, base=base)
        print(f"{report.destination}: {report.source} on {report.base}, {report.bytes / 1e6:,.1f} MB")
        print(f"compared with the model before merging: logits differ by at most {report.max_abs_logit_difference:g}")
        for note in report.notes:
            print(f"note: {note}")
