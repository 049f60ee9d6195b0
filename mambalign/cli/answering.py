"""Verbs of evaluation in which a model answers: `eval mt-bench answer`, `eval alpaca answer`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import mambalign
from mambalign.cli.common import Debug, Device, Dtype, log_to_stderr, make_console, make_table, user_errors
from mambalign.cli.evaluation import DataDir, alpaca_app, mt_bench_app

if TYPE_CHECKING:
    from mambalign.evals.answers import Model

RESUME = "; what was answered is kept, run the same command again to go on"

Policy = Annotated[str, typer.Argument(metavar="MODEL", help="Folder, hub id, or the name behind --base-url.")]
Name = Annotated[
    str | None, typer.Option("--model-id", help="What the model is called in files; default: its folder's.")
]
BaseUrl = Annotated[
    str | None, typer.Option("--base-url", help="The model is behind this OpenAI-compatible address, ending in /v1.")
]
KeyFile = Annotated[Path | None, typer.Option("--api-key-file", help="File that holds the address's API key.")]
Trained = Annotated[
    int | None,
    typer.Option(min=1, help="Count prompts of more tokens than this; default: max_length of the run's recipe.yaml."),
]


def answering_model(
    model: str, name: str | None, base_url: str | None, key_file: Path | None, device: str | None, dtype: str
) -> Model:
    """Who answers: a model here in the engine, or one behind an endpoint."""
    if base_url is not None:
        from mambalign.evals.answers import EndpointModel
        from mambalign.evals.endpoint import read_key_file

        key = read_key_file(key_file, "--api-key-file") if key_file else "none"
        return EndpointModel(name or model, base_url, key, asked_for=model)
    if key_file is not None:
        raise mambalign.UserError("--api-key-file goes with --base-url")
    from mambalign.evals.answers import EngineModel
    from mambalign.generation.engine import Engine
    from mambalign.generation.journal import model_fingerprint

    engine = Engine.load(model, device=device, dtype=dtype)
    return EngineModel(name or default_name(model), engine, {"model": model_fingerprint(model), "dtype": dtype})


def default_name(model: str) -> str:
    return Path(model).expanduser().resolve().name if Path(model).expanduser().exists() else model.split("/")[-1]


def trained_length(model: str, given: int | None) -> int | None:
    """`max_length` of the recipe in a run's folder, unless it is given."""
    recipe = Path(model).expanduser() / "recipe.yaml"
    if given is not None or not recipe.is_file():
        return given
    import yaml

    found = (yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}).get("max_length")
    return found if isinstance(found, int) else None


def show_answered(out: Path, summary: dict[str, Any]) -> None:
    print(f"{out}: {'was finished before' if summary.pop('finished_before', False) else 'finished'}")
    make_console().print(make_table("", summary))


@mt_bench_app.command("answer")
def answer_mt_bench(
    model: Policy,
    out: Annotated[Path | None, typer.Option("--out", help="Default: model_answer/<model id>.jsonl.")] = None,
    model_id: Name = None,
    base_url: BaseUrl = None,
    api_key_file: KeyFile = None,
    questions: Annotated[Path | None, typer.Option(help="Another question.jsonl.")] = None,
    choices: Annotated[int, typer.Option(min=1, help="Answers a question; only the first is judged.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 1024,
    force_temperature: Annotated[float | None, typer.Option(min=0, help="Instead of each category's own.")] = None,
    trained_tokens: Trained = None,
    parity: Annotated[
        bool, typer.Option("--parity", help='A failed call is the answer "ERROR", as in FastChat.')
    ] = False,
    data_dir: DataDir = None,
    device: Device = None,
    dtype: Dtype = "auto",
    debug: Debug = False,
) -> None:
    """Answer MT-Bench's 80 questions of two turns, into FastChat's answer file.

    The chat template is the model's own, from its tokenizer, never guessed from a name; the prompts as rendered are in
    rendered/ beside the answers. Killed? The same command goes on where it stopped.

    Example: [bold]mambalign eval mt-bench answer runs/dpo --model-id mamba-dpo[/]
    """
    log_to_stderr()
    with user_errors(debug, interrupted=RESUME):
        from mambalign.evals.data import find_data
        from mambalign.evals.mt_bench import load_questions

        asked = load_questions(questions or find_data("mt-bench questions", data_dir))
        from mambalign.evals import answers

        who = answering_model(model, model_id, base_url, api_key_file, device, dtype)
        out = out or Path("model_answer") / f"{who.name.replace('/', '_')}.jsonl"
        summary = answers.answer_mt_bench(
            asked,
            who,
            out,
            choices=choices,
            max_new_tokens=max_new_tokens,
            force_temperature=force_temperature,
            trained_length=trained_length(model, trained_tokens),
            parity=parity,
        )
        show_answered(out, summary)


@alpaca_app.command("answer")
def answer_alpaca(
    model: Policy,
    out: Annotated[Path | None, typer.Option("--out", help="Default: results/<model id>/model_outputs.json.")] = None,
    model_id: Name = None,
    base_url: BaseUrl = None,
    api_key_file: KeyFile = None,
    instructions: Annotated[Path | None, typer.Option(help="Another file of rows with `instruction`.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 2048,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling; 0 is greedy.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="With a prompt's tokens it decides the answer.")] = 0,
    trained_tokens: Trained = None,
    data_dir: DataDir = None,
    device: Device = None,
    dtype: Dtype = "auto",
    debug: Debug = False,
) -> None:
    """Answer AlpacaEval's 805 instructions, into alpaca_eval's model_outputs.json.

    Sampled as the Zephyr paper's configuration does. The chat template is the model's own; the prompts as rendered are
    in rendered/ beside the answers. Killed? The same command goes on where it stopped.

    Example: [bold]mambalign eval alpaca answer runs/dpo --model-id mamba-dpo[/]
    """
    log_to_stderr()
    with user_errors(debug, interrupted=RESUME):
        from mambalign.evals.alpaca_eval import load_outputs
        from mambalign.evals.data import find_data

        asked = load_outputs(instructions or find_data("alpaca reference 2", data_dir))
        from mambalign.evals import answers

        who = answering_model(model, model_id, base_url, api_key_file, device, dtype)
        out = out or Path("results") / who.name.replace("/", "_") / "model_outputs.json"
        summary = answers.answer_alpaca(
            asked,
            who,
            out,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            trained_length=trained_length(model, trained_tokens),
        )
        show_answered(out, summary)
