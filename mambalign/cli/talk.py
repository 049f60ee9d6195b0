"""Verbs that answer: at the terminal, and over HTTP."""

from __future__ import annotations

import copy
import logging
import os
from pathlib import Path
from typing import Annotated, Any

import typer

import mambalign
from mambalign.cli.app import app
from mambalign.cli.common import (
    Debug,
    Device,
    Dtype,
    log_to_stderr,
    quiet_libraries,
    say,
    user_errors,
    without_a_silent_hub,
)

PANEL = "Answers"
SERVE_EXTRA = ("fastapi", "starlette", "pydantic", "uvicorn", "prometheus_client")

Model = Annotated[str, typer.Argument(metavar="MODEL", help="Model folder or hub id.", show_default=False)]
Template = Annotated[
    str | None,
    typer.Option(help="zephyr, chatml, Jinja text or a file, for a model whose tokenizer has no chat template."),
]


@app.command(rich_help_panel=PANEL)
def chat(
    model: Model,
    prompt: Annotated[str | None, typer.Option("--prompt", help="Answer this and end.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System prompt.")] = None,
    load: Annotated[str | None, typer.Option("--load", help="Go on with a conversation that /save wrote.")] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token, always.")] = 0.7,
    top_p: Annotated[float, typer.Option(help="Sample among the likeliest tokens of this total probability.")] = 0.95,
    top_k: Annotated[int, typer.Option(help="Sample among this many likeliest tokens; 0: all.")] = 0,
    min_p: Annotated[float, typer.Option(help="Leave out tokens less likely than this share of the likeliest.")] = 0.0,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: what was said is said less.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 1024,
    seed: Annotated[int | None, typer.Option(help="Decides the answers; default: drawn for every answer.")] = None,
    chat_template: Template = None,
    device: Device = None,
    dtype: Dtype = "float32",
    debug: Debug = False,
) -> None:
    """Talk to a model. Answers appear as they are generated; a conversation's state is kept, so that every question is
    read alone, and can be saved and gone on with.

    /help lists the commands. Ctrl-C stops an answer, not the program. Lines that are piped in are questions.

    Example: [bold]mambalign chat runs/dpo --system "Answer in one sentence."[/]
    """
    log_to_stderr()
    with user_errors(debug):
        quiet_libraries()
        from rich.console import Console
        from transformers.utils import logging as hf_logging

        from mambalign.generation.terminal import Settings, Terminal

        logging.getLogger("mambalign").setLevel(logging.WARNING)
        hf_logging.disable_progress_bar()
        settings = Settings(temperature, top_p, top_k, min_p, repetition_penalty, max_new_tokens, seed)
        settings.sampling(0)
        engine = _load(model, device, dtype, chat_template)
        terminal = Terminal(engine, settings, Console(stderr=True), system, load)
        if prompt is None:
            terminal.run()
        else:
            terminal.answer(prompt)


@app.command(rich_help_panel=PANEL)
def serve(
    model: Model,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 is every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    name: Annotated[str | None, typer.Option(help="The model's name in the API; default: the folder's.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File of keys, one a line; any of them lets in.")] = None,
    api_key_env: Annotated[str | None, typer.Option(help="Name of the variable that holds the key.")] = None,
    allow_host: Annotated[
        list[str] | None, typer.Option(help="Host name the server is reached by; repeatable.")
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Origin whose web pages may use it (https://example.org); repeatable.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of a request, prompt and answer together.")] = 8192,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of a chat answer that names no limit.")] = 1024,
    max_concurrent: Annotated[
        int | None, typer.Option(min=1, help="Answers at a time; default: 8 on a CPU, 64 on a GPU.")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Answers that may wait; beyond them 429.")] = 128,
    max_body_bytes: Annotated[int, typer.Option(min=1024, help="Of a request's body; beyond it 413.")] = 1 << 20,
    cached_states: Annotated[
        int, typer.Option(min=0, help="Conversations whose state is kept, to read new turns alone; 0: none.")
    ] = 64,
    stall_seconds: Annotated[float, typer.Option(min=1, help="Drop a reader that takes nothing for so long.")] = 60,
    drain_seconds: Annotated[float, typer.Option(min=0, help="For running answers to finish at SIGTERM.")] = 30,
    chat_template: Template = None,
    device: Device = None,
    dtype: Dtype = "float32",
    debug: Debug = False,
) -> None:
    """Serve a model over an OpenAI-compatible API, with a chat page at /, /health and Prometheus /metrics.

    Any OpenAI client works with base_url http://127.0.0.1:8000/v1. Only this machine reaches it unless --host says
    otherwise; then give it a key. SIGTERM or Ctrl-C lets running answers finish, a second one ends at once.

    Example: [bold]mambalign serve runs/dpo --port 8000[/]
    """
    log_to_stderr()
    with user_errors(debug):
        quiet_libraries()
        try:
            from mambalign.generation import server
            from mambalign.generation.gate import Rules
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] not in SERVE_EXTRA:
                raise
            raise mambalign.UserError(
                f"serving needs {error.name}, which is not installed: pip install 'mambalign[serve]'"
            ) from error
        keys = _keys(api_key_file, api_key_env)
        if host not in server.LOOPBACK and not keys:
            say(f"anybody who reaches {host} can use this server: it has no key; see --api-key-file")
        rules = Rules(keys, tuple(h.lower() for h in allow_host or ()), tuple(allow_origin or ()), max_body_bytes)
        with server.listen(host, port) as listener:
            engine = _load(model, device, dtype, chat_template, slots=max_concurrent)
            options = server.Options(
                name or Path(model).name, max_tokens, max_new_tokens, engine.slots, max_queue, cached_states,
                stall_seconds, drain_seconds, rules,
            )  # fmt: skip
            server.serve(server.make_app(engine, copy.deepcopy(engine.tokenizer), options), listener)
        logging.getLogger(__name__).info("stopped")


def _load(model: str, device: str | None, dtype: str, chat_template: str | None, **options: Any) -> Any:
    """
    Raises:
        UserError: there is no chat template, or one that the model was not trained with.
    """
    if not Path(model).expanduser().exists():
        without_a_silent_hub()
    from mambalign.data.chat import apply_template
    from mambalign.generation.engine import Engine
    from mambalign.generation.scoring import best_device
    from mambalign.models.checkpoint import load_model, load_tokenizer

    tokenizer = load_tokenizer(model)
    known = len(tokenizer)
    if chat_template is not None or not tokenizer.chat_template:
        try:
            apply_template(tokenizer, chat_template)
        except mambalign.UserError as error:
            raise mambalign.UserError(
                f"{model}: {error} (--chat-template, the one that the model was trained with)"
            ) from error
    if len(tokenizer) > known:
        raise mambalign.UserError(
            f"--chat-template {chat_template}: the model has no such tokens; it was not trained with it"
        )
    return Engine(load_model(model, dtype=dtype, device=device or best_device()), tokenizer, **options)


def _keys(file: Path | None, variable: str | None) -> tuple[str, ...]:
    """
    Raises:
        UserError: a key was to be there and is not; a server without one must not come of that.
    """
    keys: list[str] = []
    if file is not None:
        text = file.expanduser().read_text(encoding="utf-8-sig", errors="replace")
        keys += [line.strip() for line in text.splitlines() if line.strip()]
        if not keys:
            raise mambalign.UserError(f"--api-key-file {file} is empty; put a key into it, one a line")
    if variable is not None:
        key = os.environ.get(variable, "").strip()
        if not key:
            raise mambalign.UserError(f"--api-key-env {variable}: this variable is not set, or empty")
        keys.append(key)
    if not all(key.isascii() and key.isprintable() for key in keys):
        raise mambalign.UserError("an API key must be of printable ASCII characters: it travels in a header")
    return tuple(keys)
