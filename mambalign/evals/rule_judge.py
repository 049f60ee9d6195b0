"""A judge that is rule-based, not a language model: for demonstrations and tests of everything around a judge.

It speaks the OpenAI protocol and understands the prompts of MT-Bench and AlpacaEval. The mark of an answer counts its
words, the words that it shares with the question or reference, and its last character: nothing that says whether it is
good. The same request always gets the same verdict. `Faults` make it behave as badly as real endpoints do.

    python -m mambalign.evals.rule_judge --port 8000 --throttle-every 7

`RuleEndpoint` is the same judge within this process, without HTTP: `--judge-base-url rule`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, fields
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mambalign.evals.endpoint import Endpoint, Reply

MODEL = "rule-based-not-a-language-model"
IN_PROCESS = "rule"  # in place of an address
Tokens = list[tuple[str, float]]
REFUSALS = {  # what `refuse` may name, and the words in which OpenAI's models refuse it
    "temperature": "Unsupported value: 'temperature' does not support 0 with this model. Only 1 is supported.",
    "max_tokens": "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.",
    "logprobs": "You are not allowed to request logprobs from this model.",
    "top_p": "Unsupported parameter: 'top_p' is not supported with this model.",
    "system": "Unsupported value: 'messages[0].role' does not support 'system' with this model.",
}


@dataclass
class Faults:
    """What goes wrong. `..._every`: of all requests each n-th, 0 for none.

    throttle_every: 429. throttle_seconds: a storm, 429 for so long from the first judgment on. retry_after: its header;
    empty: none. error_every: 500. drop_every: the connection closes without a word. truncate_every: half the JSON.
    html_every: a page of a proxy with status 200. empty_every, junk_every: of the *prompts* one in n, by its hash, is
    answered with nothing, or without a verdict; always the same ones. cut_every: as junk, with finish_reason length.
    filter_every: as empty, by a content filter. delay: seconds before each reply. no_logprobs: they are ignored
    silently. refuse: names in REFUSALS that get a 400. api_key: what must be sent. no_usage: no tokens are counted.
    """

    throttle_every: int = 0
    throttle_seconds: float = 0.0
    retry_after: str = "1"
    error_every: int = 0
    drop_every: int = 0
    truncate_every: int = 0
    html_every: int = 0
    empty_every: int = 0
    junk_every: int = 0
    cut_every: int = 0
    filter_every: int = 0
    delay: float = 0.0
    no_logprobs: bool = False
    refuse: tuple[str, ...] = ()
    api_key: str = ""
    no_usage: bool = False


@dataclass
class RuleJudge:
    """A running server: its address, and what it has seen.

    requests: bodies of all chat requests, in the order of arrival. answered: of those that got a verdict.
    """

    url: str
    faults: Faults
    requests: list[dict[str, Any]] = field(default_factory=list)
    answered: list[dict[str, Any]] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _storm_until: float | None = None

    @property
    def judged(self) -> list[dict[str, Any]]:
        """Of the answered: those that were judgments, not a probe."""
        return [body for body in self.answered if kind(_text(body)) is not None]

    def take(self, body: dict[str, Any]) -> int:
        with self._lock:
            self.requests.append(body)
            return len(self.requests)

    def storm(self) -> bool:
        """Whether the storm, which the first judgment starts, is on."""
        with self._lock:
            if self._storm_until is None:
                self._storm_until = time.monotonic() + self.faults.throttle_seconds
            return time.monotonic() < self._storm_until


def mark(answer: str, question: str = "") -> float:
    """0 to 10, by rule.

    >>> mark(""), mark("Paris is the capital of France.", "What is the capital of France?")
    (0.0, 4.5)
    """
    words, asked = re.findall(r"\w+", answer.lower()), set(re.findall(r"\w{4,}", question.lower()))
    if not words:
        return 0.0
    length = min(len(words) / 40, 1.0) * 5
    shared = len(asked & set(words)) / max(len(asked), 1) * 4
    ended = answer.rstrip()[-1:] in ".!?`"
    return round((length + shared + ended) * 4) / 4


def kind(prompt: str) -> str | None:
    """single, pair, rank or letter; None where it is no judge's prompt."""
    if "rank the models by the quality" in prompt:
        return "rank"
    if '"model_identifier": "M"' in prompt:
        return "letter"
    if re.search(r"Assistant B's (Answer|Conversation)", prompt):
        return "pair"
    if re.search(r"Assistant('s Answer| A's Conversation)", prompt):
        return "single"
    return None


def marks(prompt: str) -> list[float]:
    """Of the answers in a judge's prompt, in their order."""
    question = _between(prompt, "[Question]", "\n[The Start") or _between(prompt, "[User Question]", "\n[The Start")
    question = question or _between(prompt, '"instruction": """', '"""') or _last_turn(prompt, "User")
    question += _between(prompt, "[The Start of Reference Answer]", "[The End") + _last_turn(prompt, "Reference answer")
    if kind(prompt) in ("rank", "letter"):
        answers = re.findall(r'"(?:answer|output)": """(.*?)"""(?:\n|$)', prompt, re.DOTALL)[:2]
    elif "Conversation with User|>" in prompt:
        answers = [_last_turn(prompt, f"Assistant {name}") for name in "AB"]
    else:
        answers = re.findall(r"\[The Start of Assistant.*?\]\n(.*?)\n\[The End of Assistant", prompt, re.DOTALL)
    return [mark(answer, question) for answer in answers[: 1 if kind(prompt) == "single" else 2]] or [0.0]


def verdict(prompt: str, logprobs: bool) -> tuple[str, Tokens | None]:
    """(text, likeliest first tokens with natural log-probabilities where `logprobs`)."""
    first, second = [*marks(prompt), 0.0][:2]
    wanted = kind(prompt)
    share = 1 / (1 + math.exp(second - first))  # of the first answer
    if wanted == "rank":
        ranks = (1, 2) if first >= second else (2, 1)
        return str([{"model": f"model_{i}", "rank": rank} for i, rank in enumerate(ranks, 1)]), None
    if wanted == "pair":
        letter = "C" if first == second else "A" if first > second else "B"
        return f"By rule, A has {first:g} and B has {second:g}. [[{letter}]]", None
    if wanted == "single":
        return f"By rule, not by a language model. Rating: [[{max(1, round(first))}]]", None
    text = "m" if share >= 0.5 else "M"
    likely = sorted({"m": share, "M": 1 - share}.items(), key=lambda one: -one[1])
    return text, [(token, math.log(max(p, 1e-30))) for token, p in likely] + [("The", -30.0)] if logprobs else None


def _between(text: str, start: str, end: str) -> str:
    _, found, rest = text.partition(start)
    return rest.partition(end)[0] if found else ""


def _last_turn(text: str, speaker: str) -> str:
    _, found, rest = text.rpartition(f"### {speaker}:\n")
    return re.split(r"\n\n(?:### |<\|)", rest)[0] if found else ""


def _text(body: Mapping[str, Any]) -> str:
    return "\n".join(str(message.get("content")) for message in body.get("messages") or [])


def _choice(text: str, top: Tokens | None, reason: str = "stop") -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "message": {"role": "assistant", "content": text}}
    if top:
        alternatives = [{"token": t, "bytes": list(t.encode()), "logprob": p} for t, p in top]
        choice["logprobs"] = {"content": [alternatives[0] | {"top_logprobs": alternatives}]}
    return choice


def _usage(prompt: str, text: str) -> tuple[int, int]:
    return len(prompt) // 5 + 1, len(text) // 5 + 1


@dataclass(frozen=True)
class RuleEndpoint(Endpoint):
    """The rules as an endpoint in this process: every step of a judgment except HTTP, and no package but this one.

    model: the judge's name in every result. rule: (the judge's prompt, whether log-probabilities are wanted) -> (its
    reply, likeliest first tokens); another rule needs another name.
    """

    base_url: str = IN_PROCESS
    model: str = MODEL
    rule: Callable[[str, bool], tuple[str, Tokens | None]] = verdict

    def __post_init__(self) -> None:
        """There is no address to check."""

    @property
    def name(self) -> str:
        return self.model

    async def call(self, params: Mapping[str, Any], messages: list[dict[str, str]]) -> Reply:
        prompt = _text({"messages": messages})
        text, top = self.rule(prompt, bool(params.get("logprobs")))
        return Reply(_choice(text, top), _usage(prompt, text), model=self.model, time=time.time())

    async def models(self) -> list[str]:
        return [self.model]

    async def close(self) -> None:
        """Nothing is open."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    judge: RuleJudge

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._reply(200, {"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "nobody"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        faults, number = self.judge.faults, self.judge.take(body)
        if faults.delay:
            time.sleep(faults.delay)
        if faults.api_key and self.headers.get("authorization") != f"Bearer {faults.api_key}":
            sent = self.headers.get("authorization", "").removeprefix("Bearer ")
            return self._error(401, f"Incorrect API key provided: {sent}", "invalid_api_key")
        if not self.path.endswith("/chat/completions"):
            return self._error(404, f"Unknown request URL: POST {self.path}", "unknown_url")
        if body.get("model") != MODEL:
            return self._error(404, f"The model `{body.get('model')}` does not exist", "model_not_found")
        refused = next((name for name in faults.refuse if self._has(body, name)), None)
        if refused:
            return self._error(400, REFUSALS[refused], "unsupported_parameter", param=refused)
        judging = kind(_text(body)) is not None
        if _nth(number, faults.throttle_every) or (judging and faults.throttle_seconds and self.judge.storm()):
            headers = {"retry-after": faults.retry_after} if faults.retry_after else {}
            return self._error(429, "Rate limit reached", "rate_limit_exceeded", headers)
        if _nth(number, faults.error_every):
            return self._error(500, "The server had an error while processing your request", "server_error")
        if _nth(number, faults.drop_every):
            self.close_connection = True
            return None
        self._answer(body, number, judging)
        return None

    def _answer(self, body: dict[str, Any], number: int, judging: bool) -> None:
        faults, prompt = self.judge.faults, _text(body)
        text, top = verdict(prompt, bool(body.get("logprobs")) and not faults.no_logprobs)
        reason, hashed = "stop", zlib.crc32(prompt.encode(errors="replace")) if judging else 1
        if judging and _nth(hashed, faults.junk_every):
            text = "Both have their merits; I would rather not put a number on it."
        elif judging and _nth(hashed, faults.cut_every):
            text, reason = "The assistant begins by", "length"
        elif judging and _nth(hashed, faults.empty_every):
            text = ""
        elif judging and _nth(hashed, faults.filter_every):
            text, reason = "", "content_filter"
        choice = _choice(text, top, reason)
        tokens_in, tokens_out = _usage(prompt, text)
        usage = {"prompt_tokens": tokens_in, "completion_tokens": tokens_out, "total_tokens": tokens_in + tokens_out}
        answer = {"id": f"rule-{number}", "object": "chat.completion", "created": int(time.time()), "model": MODEL}
        answer |= {"system_fingerprint": "rules-1", "choices": [choice]}
        if not faults.no_usage:
            answer["usage"] = usage
        data = json.dumps(answer).encode()
        if _nth(number, faults.truncate_every):
            return self._send(200, data[: len(data) // 2])
        if _nth(number, faults.html_every):
            return self._send(200, b"<html>502 Bad Gateway</html>", {"content-type": "text/html"})
        with self.judge._lock:
            self.judge.answered.append(body)
        return self._send(200, data)

    def _has(self, body: dict[str, Any], feature: str) -> bool:
        if feature == "system":
            return any(message["role"] == "system" for message in body["messages"])
        return feature in body and (feature != "temperature" or body[feature] != 1)

    def _error(
        self, status: int, message: str, code: str, headers: dict[str, str] | None = None, param: str | None = None
    ) -> None:
        self._reply(status, {"error": {"message": message, "type": code, "code": code, "param": param}}, headers)

    def _reply(self, status: int, value: Any, headers: dict[str, str] | None = None) -> None:
        self._send(status, json.dumps(value).encode(), headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (
            {"content-type": "application/json", "content-length": str(len(data))} | (headers or {})
        ).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)


def _nth(number: int, every: int) -> bool:
    return bool(every) and number % every == 0


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no news."""


@contextmanager
def running(faults: Faults | None = None, host: str = "127.0.0.1", port: int = 0) -> Iterator[RuleJudge]:
    """The server in a thread, on a free port where `port` is 0."""
    server = _Server((host, port), type("Handler", (_Handler,), {}))
    judge = RuleJudge(f"http://{host}:{server.server_address[1]}/v1", faults or Faults())
    server.RequestHandlerClass.judge = judge  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=f"Serves {MODEL} for demonstrations and tests.")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    for one in fields(Faults):
        flag = f"--{one.name.replace('_', '-')}"
        if isinstance(one.default, bool):
            parser.add_argument(flag, action="store_true")
        elif isinstance(one.default, tuple):
            parser.add_argument(flag, nargs="*", choices=REFUSALS, default=())
        else:
            parser.add_argument(flag, type=type(one.default), default=one.default)
    words = vars(parser.parse_args())
    host, port = words.pop("host"), words.pop("port")
    with running(Faults(**words), host, port) as judge:
        print(f"{MODEL} serves at {judge.url}; stop it with Ctrl-C", flush=True)
        with suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
