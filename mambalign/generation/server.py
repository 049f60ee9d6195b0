"""An OpenAI-compatible server of one model: `/v1/chat/completions`, `/v1/completions`, `/v1/models`, and a chat page.

`make_app` builds the application around any engine, `serve` runs it on a socket until a signal comes.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import os
import re
import secrets
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.resources import files
from types import FrameType
from typing import Any, TypeVar

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import Response
from jinja2.exceptions import TemplateError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import mambalign
from mambalign.data.chat import encode_prompt, template_roles, template_text
from mambalign.data.rows import ChatRules, PlainText, Skip
from mambalign.generation.answers import Answers, ChatAnswers, TextAnswers, Vocabulary, encoded
from mambalign.generation.gate import Gate, Receive, Rules, Send
from mambalign.generation.metrics import CONTENT_TYPE, Metrics
from mambalign.generation.protocol import ApiError, Asked, ChatAsked, TextAsked, read_body
from mambalign.generation.requests import Request as Wanted
from mambalign.generation.requests import Sampling
from mambalign.generation.worker import Busy, Call, Engine, EngineDied, Stopping, Worker
from mambalign.recipe import UserError

logger = logging.getLogger(__name__)

Value = TypeVar("Value")

LOOPBACK = ("127.0.0.1", "::1", "localhost")
PATHS = ("/", "/health", "/metrics", "/v1/chat/completions", "/v1/completions", "/v1/models")


@dataclass(frozen=True)
class Options:
    """Limits of a server; see `mambalign serve --help`.

    max_tokens: of a request, prompt and answer together. max_new_tokens: of a chat answer that names no limit of its
    own. slots: answers at a time. queue: answers that may wait. cached_states: conversations whose state is kept.
    stall_seconds: after which a reader that takes nothing is dropped. drain_seconds: that running requests have to
    finish once the server is told to stop.
    """

    name: str = "mambalign"
    max_tokens: int = 8192
    max_new_tokens: int = Sampling.max_new_tokens
    slots: int = 32
    queue: int = 128
    cached_states: int = 64
    stall_seconds: float = 60.0
    drain_seconds: float = 30.0
    rules: Rules = field(default_factory=Rules)


class Service:
    """What the endpoints share."""

    def __init__(self, engine: Engine, tokenizer: Any, options: Options):
        if not template_text(tokenizer):
            raise UserError(
                "the tokenizer has no chat template, so there is no telling how this model is asked; give one with "
                "--chat-template (zephyr, chatml, Jinja text or a file), the one that the model was trained with"
            )
        self.tokenizer, self.options = tokenizer, options
        self.vocabulary = Vocabulary(tokenizer)
        self.vocabulary_size = len(tokenizer)
        self.rules = ChatRules(template_roles(tokenizer), None, True)
        self.plain = PlainText(tokenizer)
        self.metrics = Metrics()
        self.worker = Worker(
            engine, slots=options.slots, queue=options.queue, cached_states=options.cached_states, counters=self.metrics
        )
        self.draining = False
        self.started = int(time.time())
        self.fingerprint = f"mambalign-{mambalign.__version__}"
        # One thread: a fast tokenizer may not be used by two.
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="tokenizer")
        watch = self.metrics.watch
        watch("answers_active", "Answers that are being generated.", lambda: self.worker.active)
        watch("answers_waiting", "Answers that wait for a slot.", lambda: self.worker.waiting)
        watch("slots", "Answers that can be generated at a time.", lambda: options.slots)
        watch("states_cached", "Conversations whose state is kept.", lambda: len(self.worker.states))
        watch("engine_up", "1 while the engine works, 0 after it failed.", lambda: self.worker.error is None)

    def closed(self) -> str | None:
        return "the server is shutting down and takes no new requests" if self.draining else None

    def stop(self) -> None:
        self.worker.stop()
        self._reader.shutdown(wait=False, cancel_futures=True)

    async def read(self, work: Callable[[], list[Value]]) -> list[Value]:
        """Do what uses the tokenizer, off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._reader, work)

    def chat_prompt(self, asked: ChatAsked) -> list[tuple[int, ...]]:
        try:
            turns = self.rules.read(asked.turns(), needs_answer=False)
            if turns[-1]["role"] == "assistant":
                raise Skip("nothing_asked")
            return [tuple(encode_prompt(self.tokenizer, turns))]
        except Skip as skip:
            raise ApiError(400, skip.sentence, param="messages") from skip
        except TemplateError as error:
            reason = " ".join(str(error).split())[:200]
            raise ApiError(400, f"the chat template refuses these messages: {reason}", param="messages") from error

    def text_prompts(self, asked: TextAsked) -> list[tuple[int, ...]]:
        prompts = []
        for prompt in asked.prompts():
            ids = prompt if isinstance(prompt, list) else self.plain.encode(prompt, begin=True, end=False)
            if not ids:
                raise ApiError(400, "prompt: a prompt needs at least one token", param="prompt")
            if max(ids) >= self.vocabulary_size:
                raise ApiError(
                    400, f"prompt: {max(ids)} is no token; they end at {self.vocabulary_size - 1}", param="prompt"
                )
            prompts.append(tuple(ids))
        return prompts

    def shown(self, asked: TextAsked) -> list[str]:
        """The prompts as text."""
        return [prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt) for prompt in asked.prompts()]

    def call(self, asked: Asked, prompts: list[tuple[int, ...]], param: str) -> Call:
        """Check the bounds, and put the requests into the queue.

        Raises:
            ApiError: 404 for another model, 400 for a request that can never be taken, 429 for one that now cannot.
        """
        options = self.options
        seed = secrets.randbits(63)
        requests = []
        for prompt in prompts:
            wanted = asked.new_tokens()
            room = options.max_tokens - len(prompt)
            if room < (wanted or 1):
                raise ApiError(
                    400,
                    f"the prompt's {len(prompt)} tokens and {wanted or 'at least 1'} new ones are more than this "
                    f"server's {options.max_tokens} (--max-tokens); shorten the prompt or lower max_tokens",
                    param=param,
                    code="context_length_exceeded",
                )
            requests.append(Wanted(prompt, asked.sampling(wanted or min(options.max_new_tokens, room), seed)))
        call = Call(requests)
        if asked.answers > options.slots:
            raise ApiError(400, f"n: {asked.answers} is more than this server's {options.slots} answers at a time "
                                "(--max-concurrent)", param="n")  # fmt: skip
        if call.answers > options.slots + options.queue:
            raise ApiError(400, f"{call.answers} answers in one request are more than this server's "
                                f"{options.slots + options.queue} in all; split it", param=param)  # fmt: skip
        self.worker.submit(call)
        return call

    def check_model(self, asked: Asked) -> None:
        if asked.model is not None and asked.model != self.options.name:
            raise _no_model(asked.model, self.options.name)


def _no_model(name: str, ours: str) -> ApiError:
    return ApiError(404, f"there is no model {name!r} here, only {ours!r}", param="model", code="model_not_found")


def make_app(engine: Engine, tokenizer: Any, options: Options) -> FastAPI:
    """The ASGI application. Its `state.service` is what it works with; the engine's thread runs while the app does.

    Raises:
        UserError: the tokenizer has no chat template.
    """
    service = Service(engine, tokenizer, options)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        yield
        await asyncio.to_thread(service.stop)

    # Its pages of documentation load scripts from elsewhere.
    app = FastAPI(
        title="mambalign", version=mambalign.__version__, lifespan=lifespan, docs_url=None, redoc_url=None,
        openapi_url=None, redirect_slashes=False,
    )  # fmt: skip
    app.state.service = service
    _add_errors(app)
    _add_pages(app, service)
    _add_api(app, service)

    def answered(path: str, status: int) -> None:
        known = path if path in PATHS else "other"
        service.metrics.requests.labels(known, str(status)).inc()

    app.add_middleware(Gate, rules=options.rules, closed=service.closed, answered=answered)
    if options.rules.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(options.rules.origins), allow_methods=["*"], allow_headers=["*"]
        )
    return app


def _add_errors(app: FastAPI) -> None:
    def response(error: ApiError) -> Response:
        return Response(error.encoded(), error.status, error.headers, "application/json")

    @app.exception_handler(ApiError)
    async def refused(_: Request, error: ApiError) -> Response:
        return response(error)

    @app.exception_handler(HTTPException)
    async def no_such_path(request: Request, error: HTTPException) -> Response:
        sentences = {
            404: f"there is no {request.url.path}; see /v1/models, /v1/chat/completions and /v1/completions",
            405: f"{request.method} is not possible on {request.url.path}",
        }
        message = sentences.get(error.status_code, str(error.detail))
        headers = dict(error.headers or {})
        return response(ApiError(error.status_code, message, headers=headers))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return response(_as_api_error(error))


def _as_api_error(error: Exception) -> ApiError:
    """What a client is told of an error: of a bug no more than that it is one."""
    match error:
        case ApiError():
            return error
        case Busy():
            return ApiError(
                429, f"the queue is full; try again in {error.retry_after} s", code="queue_full",
                headers={"retry-after": str(error.retry_after)},
            )  # fmt: skip
        case EngineDied():
            return ApiError(500, str(error), code="engine_failed")
        case Stopping():
            return ApiError(503, str(error), code="shutting_down", headers={"retry-after": "5"})
        case UserError():
            return ApiError(400, str(error))
    return ApiError(500, f"an error of the server ({type(error).__name__}); its log says more", code="internal_error")


def _add_pages(app: FastAPI, service: Service) -> None:
    page = files("mambalign.generation").joinpath("chat.html").read_bytes()
    headers = {
        "content-security-policy": _policy(page.decode()),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cache-control": "no-cache",
    }

    @app.api_route("/", methods=["GET", "HEAD"])
    async def chat_page() -> Response:
        return Response(page, 200, headers, "text/html; charset=utf-8")

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> Response:
        error = service.worker.error
        reason = str(error) if error is not None else service.closed()
        body = {"status": "ok"} if reason is None else {"status": "unavailable", "reason": reason}
        return Response(encoded(body), 200 if reason is None else 503, None, "application/json")

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(service.metrics.text(), 200, None, CONTENT_TYPE)


def _policy(page: str) -> str:
    """Only the page's own script and style run, and it talks to this server alone."""

    def digests(tag: str) -> str:
        texts = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.S)
        return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(t.encode()).digest()).decode()}'" for t in texts)

    return (
        f"default-src 'none'; script-src {digests('script')}; style-src {digests('style')}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _add_api(app: FastAPI, service: Service) -> None:
    options = service.options
    card = {"id": options.name, "object": "model", "created": service.started, "owned_by": "mambalign"}
    card["max_model_len"] = options.max_tokens

    @app.get("/v1/models")
    async def models() -> Response:
        return Response(encoded({"object": "list", "data": [card]}), 200, None, "application/json")

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> Response:
        if name != options.name:
            raise _no_model(name, options.name)
        return Response(encoded(card), 200, None, "application/json")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = read_body(ChatAsked, await request.body())
        service.check_model(asked)
        prompts = await service.read(lambda: service.chat_prompt(asked))
        call = service.call(asked, prompts, "messages")
        return _Reply(service, call, asked, ChatAnswers(call, options.name, service.fingerprint, service.vocabulary))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        asked = read_body(TextAsked, await request.body())
        service.check_model(asked)
        prompts = await service.read(lambda: service.text_prompts(asked))
        echoed = await service.read(lambda: service.shown(asked)) if asked.echo else []
        call = service.call(asked, prompts, "prompt")
        return _Reply(
            service, call, asked, TextAnswers(call, options.name, service.fingerprint, service.vocabulary, echoed)
        )


class _Reply(Response):
    """The answers to a call, whole or as a stream. However it ends, the call's places are free behind it."""

    def __init__(self, service: Service, call: Call, asked: Asked, answers: Answers):
        super().__init__()
        self.service, self.call, self.asked, self.answers = service, call, asked, answers

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        reply = asyncio.create_task(self._stream(send) if self.asked.stream else self._whole(scope, receive, send))
        gone = asyncio.create_task(_until_gone(receive))
        try:
            await asyncio.wait({reply, gone}, return_when=asyncio.FIRST_COMPLETED)
            if reply.done():
                reply.result()
        finally:
            self.service.worker.cancel(self.call)
            for task in (reply, gone):
                task.cancel()
            await asyncio.gather(reply, gone, return_exceptions=True)

    async def _whole(self, scope: Any, receive: Receive, send: Send) -> None:
        try:
            response = Response(encoded(await self.answers.whole()), 200, None, "application/json")
        except (EngineDied, Stopping, UserError) as error:
            refusal = _as_api_error(error)
            response = Response(refusal.encoded(), refusal.status, refusal.headers, "application/json")
        await response(scope, receive, send)

    async def _stream(self, send: Send) -> None:
        headers = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache",
                   "x-accel-buffering": "no"}  # fmt: skip
        raw = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": 200, "headers": raw})
        try:
            async for event in self.answers.events(self.asked.include_usage):
                await self._send(send, event)
        except TimeoutError:
            logger.warning("a reader took nothing for %g s; dropped", self.service.options.stall_seconds)
            return
        except Exception as error:
            if not isinstance(error, EngineDied | Stopping | UserError):
                logger.exception("a stream failed")
            await self._send(send, b"data: " + _as_api_error(error).encoded() + b"\n\n")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, event: bytes) -> None:
        async with asyncio.timeout(self.service.options.stall_seconds):
            await send({"type": "http.response.body", "body": event, "more_body": True})


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Server(uvicorn.Server):
    """Stops in order: at the first signal new requests get 503 while running ones finish, up to `drain_seconds`; at the
    second the process ends at once. A connection on which no request's head arrives within `head_seconds` is closed:
    uvicorn would keep it for ever, and so many use up all that a process may have open."""

    head_seconds = 30.0

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self.should_exit = False
        self.service = service
        self._headless: dict[Any, float] = {}  # connections without a request's head, since time.monotonic()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.service.draining:
            sys.stderr.write("mambalign: stopped at once\n")
            os._exit(128 + sig)  # the engine's thread may be in the middle of anything
        self.service.draining = True
        logger.info(
            "%s: finishing %d answers, at most %g s more; again to stop at once", signal.Signals(sig).name,
            self.service.worker.active + self.service.worker.waiting, self.service.options.drain_seconds,
        )  # fmt: skip

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for listener in sockets or ():
            host, port = listener.getsockname()[:2]
            shown = f"[{host}]" if ":" in host else host
            logger.info(
                "serving %s on http://%s:%d: chat page at /, API at /v1", self.service.options.name, shown, port
            )

    async def main_loop(self) -> None:
        deadline = None
        while not self.should_exit:
            await super().on_tick(0)
            await asyncio.sleep(0.1)
            self._close_headless()
            if self.service.draining:
                deadline = deadline or time.monotonic() + self.service.options.drain_seconds
                if time.monotonic() > deadline:
                    await asyncio.to_thread(self.service.worker.stop)  # tells the readers, too
                    self.should_exit = True
                elif self.service.worker.idle and not self.server_state.tasks:
                    self.should_exit = True

    def _close_headless(self) -> None:
        now = time.monotonic()
        waiting = {one for one in self.server_state.connections if _is_headless(one)}
        self._headless = {one: self._headless.get(one, now) for one in waiting}
        for connection, since in self._headless.items():
            if now - since > self.head_seconds:
                connection.transport.close()


def _is_headless(connection: Any) -> bool:
    """Before a first request, or behind one where something came, but no whole head. In between uvicorn's own timer
    runs."""
    if connection.cycle is None:
        return True
    return connection.cycle.response_complete and connection.timeout_keep_alive_task is None


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 is any free one.

    Raises:
        UserError: the address is not this machine's, or taken.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"cannot listen on {host}, port {port}: {reason}; choose others with --host and --port"
        ) from error
    return listener


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Answer requests until a signal comes; see `Server`."""
    service: Service = app.state.service
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # a peer that takes nothing: the kernel closes the connection, too
        milliseconds = int(service.options.stall_seconds * 1000)
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    config = uvicorn.Config(
        app,
        http="h11",  # httptools, where it is installed, reads a head of any size into memory
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        timeout_graceful_shutdown=5,
        timeout_keep_alive=30,
    )
    Server(config, service).run(sockets=[listener])
