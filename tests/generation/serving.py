"""A server on a real socket around an engine that says what a test wants."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import httpx
import openai
import uvicorn

from mambalign.generation.requests import Delta, Request, TokenLogprob
from mambalign.generation.server import Options, Server, Service, make_app
from tests.train.conftest import byte_tokenizer
from tests.waiting import PATIENCE, until

ANSWER = "héllo wörld 🙂!"


@dataclass
class _Running:
    request: Request
    sink: Callable[[Delta], None]
    tokens: list[int]
    raw: bytes
    at: int = 0
    text: str = ""


@dataclass
class FakeEngine:
    """Answers every prompt with `answer`, a byte (which is a token of `byte_tokenizer`) a step.

    step_seconds: a step's duration. fail_at: the step that raises. endless: answers go on until `max_new_tokens`.
    gate: steps wait for it.
    """

    answer: str = ANSWER
    step_seconds: float = 0.0
    fail_at: int | None = None
    endless: bool = False
    gate: threading.Event | None = None
    steps: int = 0
    requests: list[Request] = field(default_factory=list)
    running: dict[int, _Running] = field(default_factory=dict)
    cancelled: list[int] = field(default_factory=list)
    most: int = 0

    def __post_init__(self) -> None:
        self.tokenizer = byte_tokenizer()

    def add(self, request: Request, sink: Callable[[Delta], None]) -> int:
        if request.sampling.seed == 666:
            raise RuntimeError("a request that cannot be begun")
        self.requests.append(request)
        ticket = len(self.requests)
        text = (
            self.answer if not self.endless else self.answer * (request.sampling.max_new_tokens // len(self.answer) + 1)
        )
        text = text[: request.sampling.max_new_tokens]
        tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        self.running[ticket] = _Running(request, sink, tokens, text.encode())
        return ticket

    def cancel(self, ticket: int) -> None:
        if self.running.pop(ticket, None) is not None:
            self.cancelled.append(ticket)

    def step(self) -> int:
        self.steps += 1
        if self.gate is not None:
            assert self.gate.wait(PATIENCE)
        if self.step_seconds:
            time.sleep(self.step_seconds)
        if self.steps == self.fail_at:
            raise RuntimeError("the device fell off the bus")
        self.most = max(self.most, sum(one.request.sampling.n for one in self.running.values()))
        for ticket, one in list(self.running.items()):
            self._advance(ticket, one)
        return len(self.running)

    def _advance(self, ticket: int, one: _Running) -> None:
        sampling = one.request.sampling
        token = one.tokens[one.at]
        one.at += 1
        text = one.raw[: one.at].decode(errors="ignore")  # a token is a byte; a character comes with its last one
        stop = next((s for s in sampling.stop if s in text), None)
        if stop is not None:
            text = text[: text.index(stop)]
        finished = (
            "stop"
            if stop is not None or (one.at == len(one.tokens) and not self.endless)
            else "length" if one.at == sampling.max_new_tokens else None
        )  # fmt: skip
        if sampling.stop and not finished:
            text = ""  # all of it may yet turn out to be the beginning of a stop string
        new, one.text = text[len(one.text) :], text
        logprobs = None
        if sampling.logprobs is not None:
            top = tuple((token + i if token + i < 257 else i, -0.5 - i) for i in range(sampling.logprobs))
            logprobs = (TokenLogprob(token, -0.5, top),)
        state = None
        if finished and one.request.keep_state:
            before = one.request.state.tokens if one.request.state else ()
            state = SimpleNamespace(tokens=(*before, *one.request.prompt, *one.tokens[: one.at]))
        if finished:
            self.running.pop(ticket)
        for index in range(sampling.n):
            one.sink(Delta(index, new, (token,), logprobs, finished, state))  # type: ignore[arg-type]


@dataclass
class Live:
    """A running server. `base` is its address, `service` what it works with."""

    base: str
    port: int
    service: Service
    engine: Any
    server: Server

    def until_free(self) -> None:
        """Wait until all slots are free again, in the server's books and in the engine."""
        until(lambda: self.service.worker.idle and not getattr(self.engine, "running", None), "slots are still taken")


@contextmanager
def running(engine: Any, tokenizer: Any = None, options: Options | None = None, **changes: Any) -> Iterator[Live]:
    """A server around `engine` in a thread, on a free port; at the end it must have no answer left."""
    app = make_app(engine, tokenizer or byte_tokenizer(), replace(options or Options(name="tiny"), **changes))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=2)
    server = Server(config, app.state.service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    until(lambda: server.started or not thread.is_alive())
    assert server.started
    live = Live(f"http://127.0.0.1:{port}", port, app.state.service, engine, server)
    try:
        yield live
        live.until_free()
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server does not end"


HELLO: list[Any] = [{"role": "user", "content": "hello"}]
CHAT = {"model": "tiny", "messages": HELLO}
BYTES = len(ANSWER.encode())


def client(live: Live, key: str = "any", **options: Any) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.base}/v1", api_key=key, max_retries=0, timeout=PATIENCE, **options)


def post(live: Live, body: Any, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    return http(live, "POST", path, content=raw, headers=headers)


def http(live: Live, method: str, path: str, **options: Any) -> httpx.Response:
    """As `httpx.request`, which by itself gives a busy machine 5 seconds."""
    return httpx.request(method, live.base + path, timeout=PATIENCE, **options)


def refused(response: httpx.Response, status: int, code: str | None = None, param: str | None = None) -> str:
    """Checks that this is an error in OpenAI's form; returns its message."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (code, param) in ((None, None), (error["code"], param), (code, error["param"])) or error["param"] == param
    return str(error["message"])


def metric(live: Live, name: str) -> float:
    text = http(live, "GET", "/metrics").text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, flags=re.M)
    return float(found[1]) if found else 0.0
