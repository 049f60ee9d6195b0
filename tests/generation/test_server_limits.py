"""What a server withstands: too much, too slow, too many, the wrong ones, an engine that fails, and signals. Slots are
always freed: `running` asserts it at the end of every test."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from mambalign.data.chat import encode_prompt
from mambalign.generation.gate import Rules
from mambalign.generation.requests import Delta, TokenLogprob
from mambalign.generation.server import Options, listen, make_app, serve
from mambalign.generation.worker import joined
from tests.generation.serving import (
    ANSWER,
    BYTES,
    CHAT,
    HELLO,
    FakeEngine,
    Live,
    client,
    http,
    metric,
    post,
    refused,
    running,
)
from tests.train.conftest import byte_tokenizer
from tests.waiting import PATIENCE, until


def test_a_body_too_large_is_413_announced_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """And at once: not after the time that a body, or a client behind a refusal, is given."""
    monkeypatch.setattr("mambalign.generation.gate.LINGER_SECONDS", 10 * PATIENCE)
    rules = Rules(body_bytes=2000, body_seconds=10 * PATIENCE)
    with running(FakeEngine(), rules=rules) as live:
        exactly = json.dumps(CHAT).encode().ljust(2000)
        assert post(live, exactly).status_code == 200

        def chunks(count: int) -> Iterator[bytes]:
            for _ in range(count):
                yield b" " * 1000

        path = "/v1/chat/completions"
        for content in (exactly + b" ", b"x" * 5_000_000, chunks(3), chunks(5000)):
            assert "2,000 bytes" in refused(http(live, "POST", path, content=content), 413)
        # Nor does it wait for what was announced.
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5000000\r\n\r\n"
        assert b" 413 " in raw_request(live, head.encode())
        # No length, one chunk short: a body that is just small enough.
        assert http(live, "POST", path, content=iter([exactly[:1000], exactly[1000:]])).status_code == 200


def raw_request(live: Live, text: bytes) -> bytes:
    with socket.create_connection(("127.0.0.1", live.port), timeout=PATIENCE) as connection:
        connection.sendall(text)
        answer = b""
        while b"}}" not in answer and (part := connection.recv(65536)):
            answer += part
        return answer


def test_bodies_that_do_not_arrive() -> None:
    with running(FakeEngine(), rules=Rules(body_seconds=0.3)) as live:
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{"
        assert b" 408 " in raw_request(live, head).split(b"\r\n")[0]
        with socket.create_connection(("127.0.0.1", live.port)) as connection:
            connection.sendall(head)  # and goes away
        for lie in (b"-5", b"1e3", b"\xff", b"99999999999999999999999"):
            first = raw_request(live, head.replace(b"100", lie)).split(b"\r\n")[0]
            assert b" 400 " in first or b" 413 " in first, (lie, first)
        until(lambda: post(live, CHAT).status_code == 200)  # at last: a busy machine may be late with a body, too


def until_in(wanted: bytes, connection: socket.socket) -> None:
    answer = b""
    while wanted not in answer:
        part = connection.recv(65536)
        assert part, answer
        answer += part


def test_heads_that_do_not_arrive() -> None:
    """Silent from the start, half a head, and half of a second one; an answer that takes longer is not cut off."""
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with running(FakeEngine(step_seconds=0.05)) as live, contextlib.ExitStack() as stack:
        live.server.head_seconds = 0.5
        opened = [stack.enter_context(socket.create_connection(("127.0.0.1", live.port), 5)) for _ in range(4)]
        for connection, sent in zip(opened, (b"", whole[:20], whole, whole), strict=True):
            connection.sendall(sent)
        for connection in opened[2:]:
            until_in(b'{"status":"ok"}', connection)
        opened[2].sendall(whole[:20])
        assert post(live, CHAT).status_code == 200  # about a second
        for connection in opened[:3]:
            assert connection.recv(65536) == b""
        opened[3].sendall(whole)  # kept alive in good order
        until_in(b'{"status":"ok"}', opened[3])


# ------------------------------------------------------------------------------------------------------ who may ask


def test_keys() -> None:
    with running(FakeEngine(), rules=Rules(keys=("s3cret", "other"))) as live:
        for key in ("s3cret", "other"):
            assert client(live, key).chat.completions.create(**CHAT).choices[0].message.content == ANSWER
        for wrong in ("s3cre", "s3crets", "S3CRET", "x" * 5000):
            with pytest.raises(openai.AuthenticationError) as error:
                client(live, wrong).models.list()
            assert error.value.code == "invalid_api_key"
        for headers in (
            {},
            {"authorization": "s3cret"},
            {"authorization": "Basic s3cret"},
            {"authorization": "Bearer"},
        ):
            response = http(live, "GET", "/v1/models", headers=headers)
            assert refused(response, 401) and response.headers["www-authenticate"] == "Bearer"
        odd = [(b"authorization", b"Bearer \xff\xfe")]
        assert http(live, "GET", "/v1/models", headers=odd).status_code == 401
        assert http(live, "GET", "/v1/nothing").status_code == 401
        for path in ("/", "/health", "/metrics"):
            assert http(live, "GET", path).status_code == 200
        assert "s3cret" not in http(live, "GET", "/metrics").text


def test_a_page_of_another_origin_may_not_use_the_server(live: Live) -> None:
    own = f"http://127.0.0.1:{live.port}"
    assert post(live, CHAT, Origin=own).status_code == 200
    for origin in (
        "http://evil.example",
        "null",
        "http://127.0.0.1",
        f"{own}.evil.example",
        f"http://localhost:{live.port}",
    ):
        assert "web page" in refused(post(live, CHAT, Origin=origin), 403), origin
    assert not http(live, "OPTIONS", "/v1/models").headers.get("access-control-allow-origin")
    assert len(live.engine.requests) == 1


def test_a_rebound_name_may_not_use_the_server(live: Live) -> None:
    for name in ("localhost", f"localhost:{live.port}", "127.0.0.1", f"[::1]:{live.port}", "192.168.3.4:80"):
        assert post(live, CHAT, Host=name).status_code == 200, name
    for name in (
        "evil.example",
        f"evil.example:{live.port}",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "[evil]",
    ):
        response = post(live, CHAT, Host=name, Origin=f"http://{name}")
        assert "does not answer to the name" in refused(response, 403), name


def test_hosts_and_origins_can_be_allowed() -> None:
    rules = Rules(hosts=("box.lan",), origins=("https://ui.example",))
    with running(FakeEngine(), rules=rules) as live:
        assert post(live, CHAT, Host="BOX.lan:80").status_code == 200
        response = post(live, CHAT, Origin="https://ui.example")
        assert response.headers["access-control-allow-origin"] == "https://ui.example"
        ask = {"Origin": "https://ui.example", "Access-Control-Request-Method": "POST",
               "Access-Control-Request-Headers": "authorization,content-type"}  # fmt: skip
        assert http(live, "OPTIONS", "/v1/chat/completions", headers=ask).status_code == 200
        assert post(live, CHAT, Origin="https://other.example").status_code == 403
        refusal = http(live, "OPTIONS", "/v1/models", headers=ask | {"Origin": "https://other.example"})
        assert "access-control-allow-origin" not in refusal.headers


def test_with_a_key_the_name_does_not_matter() -> None:
    with running(FakeEngine(), rules=Rules(keys=("k",))) as live:
        assert post(live, CHAT, Host="models.example", Authorization="Bearer k").status_code == 200


# ------------------------------------------------------------------------------------------------- places and queues


def hold(live: Live, count: int, **body: Any) -> list[threading.Thread]:
    """Requests that wait for an answer in threads."""
    threads = [threading.Thread(target=post, args=(live, CHAT | body), daemon=True) for _ in range(count)]
    for thread in threads:
        thread.start()
    return threads


def test_a_full_queue_is_429_with_retry_after() -> None:
    gate = threading.Event()
    with running(FakeEngine(gate=gate), slots=2, queue=3) as live:
        worker = live.service.worker
        threads = hold(live, 5)
        until(lambda: worker.active + worker.waiting == 5)
        response = post(live, CHAT)
        assert "queue is full" in refused(response, 429, "queue_full")
        assert 1 <= int(response.headers["retry-after"]) <= 60
        with pytest.raises(openai.RateLimitError):
            client(live).chat.completions.create(**CHAT, stream=True)
        assert metric(live, "mambalign_answers_active") + metric(live, "mambalign_answers_waiting") == 5
        gate.set()
        for thread in threads:
            thread.join(PATIENCE)
        assert post(live, CHAT).status_code == 200
        assert live.engine.most == 2  # never more than there are slots


def test_several_answers_take_several_places() -> None:
    gate = threading.Event()
    with running(FakeEngine(gate=gate), slots=4, queue=0) as live:
        threads = hold(live, 1, n=3)
        until(lambda: live.service.worker.active == 3)
        assert post(live, CHAT | {"n": 2}).status_code == 429
        threads += hold(live, 1)
        until(lambda: live.service.worker.active + live.service.worker.waiting == 4)
        assert post(live, CHAT).status_code == 429
        gate.set()
        for thread in threads:
            thread.join(PATIENCE)


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("queued", [True, False])
def test_a_client_that_goes_away_frees_its_place(stream: bool, queued: bool) -> None:
    engine, longest = FakeEngine(endless=True, step_seconds=0.01), 100_000  # a quarter of an hour, unless cancelled
    with running(engine, slots=1, max_tokens=2 * longest) as live:
        first = None
        if queued:
            request = CHAT | {"stream": True, "max_tokens": longest}
            first = httpx.Client(timeout=PATIENCE).send(
                httpx.Request("POST", f"{live.base}/v1/chat/completions", json=request), stream=True
            )
            until(lambda: live.service.worker.active == 1)
        body = json.dumps(CHAT | {"stream": stream, "max_tokens": longest}).encode()
        with socket.create_connection(("127.0.0.1", live.port)) as connection:
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            until(lambda: live.service.worker.waiting == 1 if queued else live.service.worker.active == 1)
        until(lambda: live.service.worker.waiting == 0)
        if first is not None:
            assert live.service.worker.active == 1
            first.close()
        live.until_free()
        assert engine.cancelled


def test_slow_readers_cost_the_others_nothing() -> None:
    engine = FakeEngine(endless=True)
    with running(engine, slots=4, stall_seconds=1.0) as live:
        body = json.dumps(CHAT | {"stream": True, "max_tokens": 3000, "logprobs": True, "top_logprobs": 20}).encode()
        slow = []
        for _ in range(3):
            connection = socket.socket()
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", live.port))
            head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            slow.append(connection)
        assert len(post(live, CHAT | {"max_tokens": 30}).json()["choices"][0]["message"]["content"]) > 10
        live.until_free()  # their slots, though nothing was read
        until(lambda: not live.server.server_state.tasks)  # and at last they are dropped
        for connection in slow:
            connection.close()


def test_what_waits_for_a_reader_is_merged() -> None:
    one = Delta(0, "a", (1,), (TokenLogprob(1, -1.0),))
    two = Delta(0, "", (), None, "stop")
    assert joined([one, two]) == Delta(0, "a", (1,), (TokenLogprob(1, -1.0),), "stop")
    assert joined([Delta(0, "a", (1,)), Delta(0, "b", (2, 3), None, "length")]) == Delta(
        0, "ab", (1, 2, 3), None, "length"
    )


def test_a_stuck_engine_leaves_the_rest_alive() -> None:
    gate = threading.Event()
    with running(FakeEngine(gate=gate)) as live:
        threads = hold(live, 1)
        until(lambda: live.service.worker.active == 1)
        assert http(live, "GET", "/health").status_code == 200
        assert http(live, "GET", "/metrics").status_code == 200
        gate.set()
        threads[0].join(PATIENCE)


# ------------------------------------------------------------------------------------------------------------ faults


def test_an_engine_that_fails_is_told_everywhere_and_nothing_hangs() -> None:
    gate = threading.Event()
    with running(FakeEngine(fail_at=4, gate=gate), slots=2) as live:
        found: list[Any] = []
        waiting = [
            threading.Thread(target=lambda: found.append(post(live, CHAT))),
            threading.Thread(target=lambda: found.append(post(live, CHAT | {"stream": True}))),
            threading.Thread(target=lambda: found.append(post(live, CHAT))),  # in the queue
        ]
        for thread in waiting:
            thread.start()
        until(lambda: live.service.worker.active + live.service.worker.waiting == 3)
        gate.set()
        for thread in waiting:
            thread.join(PATIENCE)
            assert not thread.is_alive()
        whole = [response for response in found if response.headers["content-type"] == "application/json"]
        (stream,) = [response for response in found if response not in whole]
        assert all("fell off the bus" in refused(response, 500, "engine_failed") for response in whole)
        assert '"code": "engine_failed"' in stream.text and "[DONE]" not in stream.text
        refused(post(live, CHAT), 500, "engine_failed")
        with pytest.raises(openai.InternalServerError):
            client(live).chat.completions.create(**CHAT)
        health = http(live, "GET", "/health")
        assert health.status_code == 503 and "fell off the bus" in health.json()["reason"]
        assert metric(live, "mambalign_engine_up") == 0
        live.engine.running.clear()


def test_an_error_in_a_stream_is_an_exception_of_the_client() -> None:
    with running(FakeEngine(fail_at=4)) as live:
        with pytest.raises(openai.APIError, match="fell off the bus"):
            list(client(live).chat.completions.create(**CHAT, stream=True))
        live.engine.running.clear()


def test_one_request_that_cannot_be_begun_is_one_error(live: Live) -> None:
    with pytest.raises(openai.InternalServerError) as error:
        client(live).chat.completions.create(**CHAT, seed=666)
    assert "RuntimeError" in str(error.value) and "cannot be begun" not in str(error.value)  # no more than its kind
    assert "internal_error" in post(live, CHAT | {"seed": 666, "stream": True}).text
    assert client(live).chat.completions.create(**CHAT).choices[0].message.content == ANSWER


def test_metrics(live: Live) -> None:
    post(live, CHAT)
    post(live, b"{")
    http(live, "GET", f"/whatever/{'x' * 50}")
    prompt = len(encode_prompt(byte_tokenizer(), HELLO))
    for path, status in (("/v1/chat/completions", 200), ("/v1/chat/completions", 400), ("other", 404)):
        name = f'mambalign_requests_total{{path="{path}",status="{status}"}}'
        until(lambda name=name: metric(live, name) == 1, name)  # counted when all is sent, which is when we read on
    assert metric(live, "mambalign_prompt_tokens_total") == prompt
    assert metric(live, "mambalign_generated_tokens_total") == BYTES
    assert metric(live, "mambalign_time_to_first_token_seconds_count") == 1
    assert metric(live, "mambalign_time_per_token_seconds_count") == BYTES - 1
    assert metric(live, "mambalign_slots") == live.service.options.slots
    with running(FakeEngine()) as other:  # a registry of its own
        assert metric(other, "mambalign_generated_tokens_total") == 0


# ----------------------------------------------------------------------------------------------- a process of its own


class Process:
    """`mambalign serve` in a process."""

    def __init__(self, tiny: Path, *options: str, gate: Path):
        """No token is computed before there is a file `gate`."""
        code = (
            "import sys, time; from pathlib import Path; from mambalign.cli import app\n"
            "from mambalign.generation.engine import Engine\n"
            "def gated(self, step=Engine.step):\n"
            f"    while not Path({str(gate)!r}).exists(): time.sleep(0.01)\n"
            "    return step(self)\n"
            "Engine.step = gated; app(sys.argv[1:])"
        )
        words = [sys.executable, "-c", code, "serve", str(tiny), "--port", "0", "--device", "cpu", *options]
        self.process = subprocess.Popen(
            words, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )
        self.log = ""
        self.live: Any = None
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log += line
            if found := re.search(r"serving \S+ on (http://127.0.0.1:(\d+))", line):
                self.live = Live(found[1], int(found[2]), None, None, None)  # type: ignore[arg-type]
                break
        assert self.live is not None, self.log

    def ended(self) -> int:
        _, rest = self.process.communicate(timeout=PATIENCE)
        self.log += rest
        return self.process.returncode


def test_sigterm_lets_answers_finish_and_refuses_new_ones(tiny: Path, tmp_path: Path) -> None:
    server = Process(tiny, "--drain-seconds", str(PATIENCE), gate=tmp_path / "go")
    try:
        long = CHAT | {"stream": True, "max_tokens": 60, "ignore_eos": True}
        found: list[httpx.Response] = []
        reader = threading.Thread(target=lambda: found.append(post(server.live, long)))
        reader.start()
        until(lambda: metric(server.live, "mambalign_answers_active") == 1)
        server.process.send_signal(signal.SIGTERM)
        until(lambda: http(server.live, "GET", "/health").status_code == 503)
        response = post(server.live, CHAT)
        assert "shutting down" in refused(response, 503, "shutting_down") and response.headers["retry-after"]
        (tmp_path / "go").touch()
        assert server.ended() == 0
        reader.join(PATIENCE)
        assert found[0].text.endswith("data: [DONE]\n\n") and '"finish_reason":"length"' in found[0].text
        assert "finishing 1 answers" in server.log and "Traceback" not in server.log
    finally:
        server.process.kill()


def _serve(drain: float, ports: Any) -> None:
    app = make_app(FakeEngine(endless=True, step_seconds=0.01), byte_tokenizer(), Options(drain_seconds=drain))
    listener = listen("127.0.0.1", 0)
    ports.send(listener.getsockname()[1])
    serve(app, listener)


@pytest.mark.parametrize(("drain", "second"), [(0.5, False), (PATIENCE, True)])
def test_what_is_not_done_in_time_is_told_and_a_second_signal_ends_at_once(drain: float, second: bool) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.generation.serving"])
    mine, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(drain, theirs))
    process.start()
    try:
        port = mine.recv()
        live = Live(f"http://127.0.0.1:{port}", port, None, None, None)  # type: ignore[arg-type]
        found: list[Any] = []

        def read() -> None:
            try:
                found.append(post(live, CHAT | {"model": "mambalign", "stream": True, "max_tokens": 8000}).text)
            except httpx.HTTPError as error:
                found.append(error)

        reader = threading.Thread(target=read)
        until(lambda: _answers(live))
        reader.start()
        until(lambda: metric(live, "mambalign_answers_active") == 1)
        process.terminate()
        if second:
            until(lambda: http(live, "GET", "/health").status_code == 503)
            process.terminate()
        process.join(PATIENCE)
        assert process.exitcode == (128 + signal.SIGTERM if second else 0)
        reader.join(PATIENCE)
        assert isinstance(found[0], httpx.HTTPError) if second else "was stopped before the answer" in found[0]
    finally:
        process.kill()


def _answers(live: Live) -> bool:
    try:
        return http(live, "GET", "/health").status_code == 200
    except httpx.HTTPError:
        return False
