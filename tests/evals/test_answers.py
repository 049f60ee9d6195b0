"""The answer step: seeds, the second turn, state, resuming, failures; through a stand-in of the engine and a server."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mambalign.evals.alpaca_eval import Output, load_outputs
from mambalign.evals.answers import EndpointModel, EngineModel, answer_alpaca, answer_mt_bench
from mambalign.evals.mt_bench import Question, load_answers
from mambalign.generation.requests import Delta, Request
from mambalign.recipe import UserError
from tests.train.conftest import byte_tokenizer


class StandIn:
    """The engine's `tokenizer`, `add` and `step`: an answer is a function of all tokens before it and the seed."""

    def __init__(self, die_after: int | None = None):
        self.tokenizer = byte_tokenizer()
        self.requests: list[Request] = []
        self.waiting: list[tuple[Request, Any]] = []
        self.die_after = die_after

    def add(self, request: Request, sink: Any) -> int:
        self.requests.append(request)
        self.waiting.append((request, sink))
        return len(self.requests)

    def step(self) -> int:
        if not self.waiting:
            return 0
        if self.die_after == 0:
            raise KeyboardInterrupt
        if self.die_after is not None:
            self.die_after -= 1
        request, sink = self.waiting.pop()  # the last first: order must not matter
        past: tuple[int, ...] = request.state.tokens if request.state else ()  # type: ignore[attr-defined]
        tokens = (*past, *request.prompt)
        said = hashlib.sha256(f"{tokens}{request.sampling.seed}".encode()).hexdigest()[:6]
        ids = tuple(self.tokenizer(said, add_special_tokens=False)["input_ids"])
        state: Any = SimpleNamespace(tokens=(*tokens, *ids))
        sink(Delta(0, said[:3], ids[:3]))
        sink(Delta(0, said[3:], ids[3:], finish_reason="stop", state=state))
        return len(self.waiting) + 1


def model(engine: StandIn) -> EngineModel:
    return EngineModel("m", engine, {"weights": "w"})


def rendered_rows(out: Path) -> list[dict[str, Any]]:
    path = out.parent / "rendered" / f"{out.stem}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_two_turns_with_the_models_own_answer(questions: list[Question], tmp_path: Path) -> None:
    out, engine = tmp_path / "model_answer/m.jsonl", StandIn()
    summary = answer_mt_bench(questions, model(engine), out, choices=2, trained_length=40)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [3, 5, 7]
    assert [[choice["index"] for choice in row["choices"]] for row in rows] == [[0, 1]] * 3
    assert rows[0]["choices"][0] != rows[0]["choices"][1] | {"index": 0}, "every choice has its seed"
    kept = {(row["question_id"], row["index"]): row for row in rendered_rows(out)}
    row = kept[7, 0]
    first, second = row["turns"]
    assert row["prompts"][0].count("write {x}") == 1 and "again" not in row["prompts"][0]
    assert "write {x}" in row["prompts"][1] and first in row["prompts"][1] and "again" in row["prompts"][1]
    assert load_answers(out)[7].turns == (first, second)
    assert {key: value["temperature"] for key, value in kept.items() if key[1] == 0} == {
        (7, 0): 0.7,
        (3, 0): 0,
        (5, 0): 0.3,
    }
    assert row["beyond_trained_length"] == [n > 40 for n in row["prompt_tokens"]]
    assert summary["prompts_beyond_trained_length"] == sum(sum(r["beyond_trained_length"]) for r in kept.values()) > 0
    assert {request.sampling.max_new_tokens for request in engine.requests} == {1024}


def test_the_second_turn_continues_the_state(questions: list[Question], tmp_path: Path) -> None:
    engine = StandIn()
    answer_mt_bench(questions, model(engine), tmp_path / "m.jsonl")
    continued = [request for request in engine.requests if request.state is not None]
    assert len(continued) == len(questions)
    fresh = StandIn()
    original = fresh.add

    def forgetful(request: Request, sink: Any) -> int:
        assert request.state is None
        return original(
            request, lambda delta: sink(Delta(delta.index, delta.text, delta.tokens, None, delta.finish_reason))
        )

    fresh.add = forgetful  # type: ignore[method-assign]
    answer_mt_bench(questions, model(fresh), tmp_path / "again.jsonl")
    kept, again = load_answers(tmp_path / "m.jsonl"), load_answers(tmp_path / "again.jsonl")
    assert {key: value.turns for key, value in kept.items()} == {key: value.turns for key, value in again.items()}


@pytest.mark.parametrize("killed_after", [0, 1, 3, 5])
def test_a_killed_command_goes_on_with_the_same_answers(
    questions: list[Question], tmp_path: Path, killed_after: int
) -> None:
    whole = tmp_path / "whole.jsonl"
    answer_mt_bench(questions, model(StandIn()), whole)
    out = tmp_path / "m.jsonl"
    with pytest.raises(KeyboardInterrupt):
        answer_mt_bench(questions, model(StandIn(killed_after)), out)
    assert not out.exists()
    engine = StandIn()
    answer_mt_bench(questions, model(engine), out)
    assert len(engine.requests) <= 6 - 2 * (killed_after // 2)
    assert {k: v.turns for k, v in load_answers(out).items()} == {k: v.turns for k, v in load_answers(whole).items()}
    idle = StandIn()
    assert answer_mt_bench(questions, model(idle), out)["finished_before"] and not idle.requests
    with pytest.raises(UserError, match=r"another result \(another max_new_tokens"):
        answer_mt_bench(questions, model(idle), out, max_new_tokens=5)
    out.unlink()
    answer_mt_bench(questions, model(idle), out)
    assert out.exists() and not idle.requests, "deleted answers come back from what is kept"


def test_alpaca_outputs(tmp_path: Path) -> None:
    asked = [Output(f"q{i}", "ref", "r", "d") for i in range(7)]
    out = tmp_path / "model_outputs.json"
    with pytest.raises(KeyboardInterrupt):
        answer_alpaca(asked, model(StandIn(3)), out)
    engine = StandIn()
    summary = answer_alpaca(asked, model(engine), out)
    assert len(engine.requests) == 4 and summary["instructions"] == 7 and summary["mean_characters"] == 6
    rows = json.loads(out.read_text())
    assert [list(row) for row in rows] == [["dataset", "instruction", "output", "generator"]] * 7
    assert [row["instruction"] for row in rows] == [f"q{i}" for i in range(7)]
    assert load_outputs(out)[0].generator == "m"
    sampling = engine.requests[0].sampling
    assert (sampling.max_new_tokens, sampling.temperature, sampling.top_p) == (2048, 0.7, 1.0)
    assert all("q" in row["prompt"] and row["finish_reason"] == "stop" for row in rendered_rows(out))


def test_a_tokenizer_without_a_template_is_refused() -> None:
    engine = StandIn()
    engine.tokenizer.chat_template = None
    with pytest.raises(UserError, match=r"chat.template"):
        model(engine)


@pytest.fixture
def server() -> Iterator[SimpleNamespace]:
    """An OpenAI-compatible server that fails every request whose text holds one of `fails`."""
    state = SimpleNamespace(bodies=[], fails=set(), url="", raw=None)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            state.bodies.append(body)
            last = body["messages"][-1]["content"]
            failed = last in state.fails
            message = {"role": "assistant", "content": f" answer to {last} "}
            reply = {
                "id": "x", "object": "chat.completion", "created": 0, "model": body["model"],
                "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
            }  # fmt: skip
            raw = json.dumps({"error": {"message": "no"}} if failed else reply).encode()
            raw = state.raw or raw
            self.send_response(400 if failed else 200)
            self.send_header("Content-Length", str(len(raw)))
            self.send_header("Content-Type", "text/html" if raw.startswith(b"<") else "application/json")
            self.end_headers()
            self.wfile.write(raw)

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    state.url = f"http://127.0.0.1:{http.server_port}/v1"
    yield state
    http.shutdown()
    thread.join()
    http.server_close()


def roles(body: dict[str, Any]) -> Sequence[str]:
    return [message["role"] for message in body["messages"]]


def test_behind_an_endpoint_a_failed_call_is_no_answer(
    questions: list[Question], tmp_path: Path, server: SimpleNamespace
) -> None:
    behind = EndpointModel("m", server.url, parallel=3)
    out = tmp_path / "m.jsonl"
    server.fails = {"again"}
    with pytest.raises(UserError, match=r"1 of 3 could not be answered \(question 7: .*no"):
        answer_mt_bench(questions, behind, out)
    assert not out.exists()
    server.fails, asked = set(), len(server.bodies)
    answer_mt_bench(questions, behind, out)
    assert len(server.bodies) == asked + 2
    assert load_answers(out)[7].turns == ("answer to write {x}", "answer to again")
    last = server.bodies[-1]
    assert roles(last) == ["user", "assistant", "user"] and last["messages"][1]["content"] == "answer to write {x}"
    assert (last["temperature"], last["seed"], last["max_tokens"], last["model"]) == (0.7, 0, 1024, "m")


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"<html>busy</html>", "no chat completion: '<html>busy</html>'"),
        (b'{"choices": [', "no JSON"),
        (b"[]", "no chat completion"),
        (b'{"choices": []}', "no chat completion"),
        (b'{"choices": [{"message": {"content": null}}]}', "no content"),
        (b'{"choices": [{"message": {"content": [{"type": "text", "text": "x"}]}}]}', "no content"),
    ],
)
def test_a_reply_that_is_none_is_a_failed_call(
    raw: bytes, why: str, questions: list[Question], tmp_path: Path, server: SimpleNamespace
) -> None:
    server.raw = raw
    with pytest.raises(UserError, match=f"3 of 3 could not be answered .*{re.escape(why)}"):
        answer_mt_bench(questions, EndpointModel("m", server.url), tmp_path / "m.jsonl")


def test_half_a_surrogate_pair_is_asked_and_written_on(
    questions: list[Question], tmp_path: Path, server: SimpleNamespace
) -> None:
    server.raw = b'{"choices": [{"message": {"content": "a\\ud800"}, "finish_reason": "stop"}]}'
    answer_mt_bench(questions, EndpointModel("m", server.url), tmp_path / "m.jsonl")
    assert load_answers(tmp_path / "m.jsonl")[7].turns == ("a?", "a?")
    assert server.bodies[-1]["messages"][1]["content"] == "a?"


def test_a_model_may_have_another_name_at_its_endpoint(tmp_path: Path, server: SimpleNamespace) -> None:
    behind = EndpointModel("mine", server.url, asked_for="served")
    answer_alpaca([Output("x", "", "reference")], behind, tmp_path / "m.json")
    assert load_outputs(tmp_path / "m.json")[0].generator == "mine" and server.bodies[-1]["model"] == "served"


def test_parity_keeps_fastchats_error_answer(
    questions: list[Question], tmp_path: Path, server: SimpleNamespace
) -> None:
    server.fails = {"again", "1+1?"}
    answer_mt_bench(questions, EndpointModel("m", server.url), tmp_path / "m.jsonl", parity=True)
    found = load_answers(tmp_path / "m.jsonl")
    assert found[7].turns[1] == "ERROR" and found[3].turns == ("ERROR", "answer to 2+2?")
