"""The server through OpenAI's own client, and through sockets that do what no client does. Slots are always freed:
`running` asserts it at the end of every test."""

from __future__ import annotations

import asyncio
import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest
from typer.testing import CliRunner

from mambalign.cli import app as cli
from mambalign.data.chat import encode_prompt
from mambalign.generation.engine import Engine
from mambalign.generation.requests import Request, Sampling
from mambalign.generation.worker import StateCache
from tests.generation.serving import (
    ANSWER,
    BYTES,
    CHAT,
    HELLO,
    FakeEngine,
    Live,
    client,
    http,
    post,
    refused,
    running,
)
from tests.train.conftest import byte_tokenizer
from tests.waiting import PATIENCE

# --------------------------------------------------------------------------------------------- OpenAI's own client


def test_a_chat_answer_whole(live: Live) -> None:
    answer = client(live).chat.completions.create(**CHAT, n=2)
    assert [choice.message.content for choice in answer.choices] == [ANSWER, ANSWER]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    prompt = len(encode_prompt(byte_tokenizer(), HELLO))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (prompt, 2 * BYTES)
    assert answer.usage.total_tokens == prompt + 2 * BYTES


def test_a_chat_answer_in_pieces_is_framed_as_openais(live: Live) -> None:
    stream = client(live).chat.completions.create(**CHAT, n=2, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    *body, last = chunks
    assert last.choices == [] and last.usage is not None and last.usage.completion_tokens == 2 * BYTES
    assert all(chunk.usage is None and len(chunk.choices) == 1 for chunk in body)
    for index in range(2):
        mine = [chunk.choices[0] for chunk in body if chunk.choices[0].index == index]
        assert mine[0].delta.role == "assistant" and mine[0].delta.content == ""
        assert "".join(choice.delta.content or "" for choice in mine) == ANSWER
        assert [choice.finish_reason for choice in mine] == [None] * (len(mine) - 1) + ["stop"]
        assert mine[-1].delta.content is None
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_events_as_bytes(live: Live) -> None:
    response = post(live, CHAT | {"stream": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    events = response.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])
    assert "usage" not in json.loads(events[0][6:])  # only where it was asked for


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_in_the_chat_format_make_up_the_text(live: Live, stream: bool) -> None:
    asked = client(live).chat.completions.create(**CHAT, logprobs=True, top_logprobs=3, stream=stream)
    choices = [chunk.choices[0] for chunk in asked] if stream else [asked.choices[0]]
    tokens = [token for choice in choices if choice.logprobs for token in choice.logprobs.content]
    assert b"".join(bytes(token.bytes) for token in tokens).decode() == ANSWER
    assert all(len(token.top_logprobs) == 3 and token.top_logprobs[0].token == token.token for token in tokens)
    assert tokens[0].token == "h" and tokens[1].token == "bytes:\\xc3"


def test_no_logprobs_where_none_are_asked_for(live: Live) -> None:
    assert client(live).chat.completions.create(**CHAT).choices[0].logprobs is None
    with_them = client(live).chat.completions.create(**CHAT, logprobs=True).choices[0].logprobs
    assert with_them is not None and all(token.top_logprobs == [] for token in with_them.content or [])


def test_completions_of_every_form_of_prompt(live: Live) -> None:
    ids = [[1, 2, 3], [4]]
    for prompt, answers in (("ab", 1), (["ab", "c", "d"], 3), (ids[0], 1), (ids, 2)):
        done = client(live).completions.create(model="tiny", prompt=prompt, n=2, max_tokens=100)  # type: ignore[arg-type]
        assert [choice.text for choice in done.choices] == [ANSWER] * 2 * answers
        assert [choice.index for choice in done.choices] == list(range(2 * answers))
    assert [request.prompt for request in live.engine.requests[-2:]] == [(1, 2, 3), (4,)]
    assert done.usage is not None and done.usage.prompt_tokens == 4


def test_completions_default_to_16_tokens_and_say_that_they_were_cut(live: Live) -> None:
    (choice,) = client(live).completions.create(model="tiny", prompt="x").choices
    assert choice.finish_reason == "length" and len(choice.text.encode()) == 14  # the 🙂 is not whole
    assert live.engine.requests[-1].sampling.max_new_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
def test_echo_repeats_each_prompt_before_its_answers(live: Live, stream: bool) -> None:
    prompts = ["añ", [98, 99]]
    texts = ["añ", byte_tokenizer().decode([98, 99])]
    for prompt, text in zip(prompts, texts, strict=True):
        done = client(live).completions.create(
            model="tiny", prompt=prompt, n=2, echo=True, max_tokens=99, stream=stream
        )  # type: ignore[call-overload]
        parts = [chunk.choices[0] for chunk in done] if stream else done.choices
        for index in range(2):
            assert "".join(part.text for part in parts if part.index == index) == text + ANSWER


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_in_the_older_format_have_offsets_in_characters(live: Live, stream: bool) -> None:
    done = client(live).completions.create(model="tiny", prompt="x", logprobs=2, max_tokens=99, stream=stream)
    parts = [chunk.choices[0] for chunk in done] if stream else [done.choices[0]]
    logprobs = [part.logprobs for part in parts if part.logprobs]
    tokens = [token for one in logprobs for token in one.tokens or []]
    offsets = [offset for one in logprobs for offset in one.text_offset or []]
    assert len(tokens) == len(offsets) == BYTES
    assert all(ANSWER[offset] == token for token, offset in zip(tokens, offsets, strict=True) if len(token) == 1)
    assert all(len(top) == 2 for one in logprobs for top in one.top_logprobs or [])


def test_stop_ends_an_answer_before_it(live: Live) -> None:
    for stop in ("wör", ["nowhere", "wör"], ["a", "b", "c", "wör", "e"]):
        choice = client(live).chat.completions.create(**CHAT, stop=stop).choices[0]
        assert (choice.message.content, choice.finish_reason) == ("héllo ", "stop")


def test_what_is_asked_for_reaches_the_engine(live: Live) -> None:
    extra = {"top_k": 7, "min_p": 0.1, "repetition_penalty": 1.2, "ignore_eos": True}
    values: dict[str, Any] = dict(seed=-5, temperature=0, top_p=0.5, max_completion_tokens=9, max_tokens=3)
    client(live).chat.completions.create(**CHAT, **values, extra_body=extra)
    assert live.engine.requests[-1].sampling == Sampling(
        n=1, max_new_tokens=9, temperature=0, top_p=0.5, top_k=7, min_p=0.1, repetition_penalty=1.2, seed=-5,
        ignore_end=True,
    )  # fmt: skip
    client(live).chat.completions.create(**CHAT, extra_body={"top_k": -1, "user": "me", "metadata": {}, "store": False})
    drawn = [live.engine.requests[-1].sampling.seed]
    client(live).chat.completions.create(**CHAT)
    assert live.engine.requests[-1].sampling.seed not in drawn  # without a seed every answer is another
    assert live.engine.requests[-1].sampling.top_k == 0 == live.engine.requests[-2].sampling.top_k


def test_an_answer_can_be_handed_back_as_a_turn(live: Live) -> None:
    said = client(live).chat.completions.create(**CHAT).choices[0].message
    messages = [{"role": "developer", "content": "Be brief."}, *HELLO, said, {"role": "user", "content": [
        {"type": "text", "text": "and "}, {"type": "text", "text": "now"}]}]  # fmt: skip
    client(live).chat.completions.create(model="tiny", messages=messages)  # type: ignore[arg-type]
    turns = [{"role": "system", "content": "Be brief."}, *HELLO, {"role": "assistant", "content": ANSWER}]
    expected = encode_prompt(byte_tokenizer(), [*turns, {"role": "user", "content": "and now"}])
    last = live.engine.requests[-1]
    assert [*(last.state.tokens if last.state else ()), *last.prompt] == expected


def test_models(live: Live) -> None:
    assert [model.id for model in client(live).models.list()] == ["tiny"]
    assert client(live).models.retrieve("tiny").owned_by == "mambalign"
    with pytest.raises(openai.NotFoundError, match="there is no model 'a/b' here, only 'tiny'"):
        client(live).models.retrieve("a/b")
    with pytest.raises(openai.NotFoundError) as error:
        client(live).chat.completions.create(model="gpt-4", messages=HELLO)
    assert error.value.code == "model_not_found"


# ------------------------------------------------------------------------------------------------- what is refused

MESSAGE = b'{"messages":[{"role":"user","content":"x"}]'
MALFORMED: list[tuple[bytes, str, str | None]] = [
    (b"", "not JSON", None),
    (b"{", "not JSON", None),
    (b"\xff\xfe", "not JSON", None),
    (b"[]", "must be a JSON object", None),
    (b"null", "must be a JSON object", None),
    (b"[" * 200_000, "not JSON", None),
    (b'{"a":' * 100_000, "not JSON", None),
    (MESSAGE + b',"seed":1' + b"0" * 100_000 + b"}", "not JSON", None),
    (MESSAGE + b',"seed":' + str(1 << 70).encode() + b"}", "seed: ", "seed"),
    (MESSAGE + b',"seed":1.5}', "seed: ", "seed"),
    (MESSAGE + b',"temperature":NaN}', "temperature: ", "temperature"),
    (MESSAGE + b',"temperature":Infinity}', "temperature: ", "temperature"),
    (MESSAGE + b',"temperature":1e400}', "", "temperature"),
    (MESSAGE + b',"temperature":"1"}', "temperature: ", "temperature"),
    (MESSAGE + b',"temperature":-0.1}', "temperature: ", "temperature"),
    (MESSAGE + b',"top_p":0}', "top_p: ", "top_p"),
    (MESSAGE + b',"n":0}', "n: ", "n"),
    (MESSAGE + b',"n":true}', "n: ", "n"),
    (MESSAGE + b',"n":100}', "answers at a time", "n"),
    (MESSAGE + b',"max_tokens":0}', "max_tokens: ", "max_tokens"),
    (MESSAGE + b',"max_tokens":8192}', "shorten the prompt or lower max_tokens", "messages"),
    (MESSAGE + b',"stop":[1]}', "stop: ", "stop"),
    (MESSAGE + b',"stop":[""]}', "stop: an empty text", "stop"),
    (MESSAGE + b',"top_logprobs":2}', "top_logprobs needs logprobs", "top_logprobs"),
    (MESSAGE + b',"logprobs":true,"top_logprobs":21}', "top_logprobs: ", "top_logprobs"),
    (MESSAGE + b',"stream_options":{"x":1}}', "unknown key", "stream_options.x"),
    (MESSAGE + b',"temprature":1}', "did you mean 'temperature'", "temprature"),
    (b'{"message":[]}', "did you mean 'messages'", "message"),
    (MESSAGE + b',"tools":[{"type":"function"}]}', "calls no tools", "tools"),
    (MESSAGE + b',"response_format":{"type":"json_object"}}', "only plain text", "response_format"),
    (MESSAGE + b',"frequency_penalty":0.5}', "repetition_penalty", "frequency_penalty"),
    (MESSAGE + b',"presence_penalty":-1}', "repetition_penalty", "presence_penalty"),
    (MESSAGE + b',"logit_bias":{"1":5}}', "logits", "logit_bias"),
    (b'{"messages":[]}', "messages: ", "messages"),
    (b'{"messages":"x"}', "messages: ", "messages"),
    (b'{"messages":[1]}', "messages[0]: ", "messages[0]"),
    (b'{"messages":[{"role":"user"}]}', "not text", "messages"),
    (b'{"messages":[{"role":"user","content":5}]}', "messages[0].content: ", "messages[0].content"),
    (b'{"messages":[{"role":"king","content":"x"}]}', "unknown_role", "messages"),
    (b'{"messages":[{"role":"system","content":"x"}]}', "empty_conversation", "messages"),
    (b'{"messages":[{"role":"assistant","content":"x"}]}', "starts_with_assistant", "messages"),
    (b'{"messages":[{"role":"user","content":"x"},{"role":"assistant","content":"y"}]}', "nothing_asked", "messages"),
    (b'{"messages":[{"role":"user","content":"\\ud800"}]}', "not JSON", None),
    (b'{"\\udc00":1}', "not JSON", None),
    (b'{"messages":[{"role":"user","content":[{"type":"image_url"}]}]}', "reads text only", "messages"),
]  # fmt: skip


def test_malformed_bodies_are_400_and_name_the_key(live: Live) -> None:
    for body, words, param in MALFORMED:
        response = post(live, body)
        message = refused(response, 400)
        assert words.lower().replace("_", " ") in message.lower().replace("_", " "), (body[:80], message)
        if param or "not JSON" not in words:
            assert response.json()["error"]["param"] == param or (not words and not param), (body[:80], response.text)
    assert not live.engine.requests


def test_malformed_prompts_are_400(live: Live) -> None:
    for body, words in (
        ({}, "prompt is missing"),
        ({"prompt": ""}, "at least one token"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [1 << 40]}, "is no token; they end at 256"),
        ({"prompt": "x" * 8192}, "more than this server's 8192"),
        ({"prompt": "x", "suffix": "y"}, "suffix is not supported"),
        ({"prompt": "x", "best_of": 3}, "best_of is not supported"),
        ({"prompt": "x", "logprobs": True}, "logprobs"),
        ({"prompt": "x", "logprobs": 1, "echo": True}, "leave out echo or logprobs"),
        ({"prompt": ["x"] * 200}, "split it"),
    ):
        assert words in refused(post(live, body, "/v1/completions"), 400), body
    assert not live.engine.requests


def test_odd_but_valid_text_is_answered(live: Live) -> None:
    for content in ("\u0000", " ", "", "\U0010ffff", "a\u202eb", "<|endoftext|>", "\n" * 1000):
        response = post(live, {"messages": [{"role": "user", "content": content}]})
        assert response.status_code == 200, response.text
        assert response.json()["choices"][0]["message"]["content"] == ANSWER


def test_paths_and_methods_that_there_are_not(live: Live) -> None:
    assert "there is no /v1/engines" in refused(http(live, "GET", "/v1/engines"), 404)
    assert "there is no /v1/completions/" in refused(post(live, CHAT, "/v1/completions/"), 404)
    response = http(live, "GET", "/v1/chat/completions")
    assert "GET is not possible" in refused(response, 405) and response.headers["allow"] == "POST"
    assert refused(http(live, "DELETE", "/v1/models"), 405)
    assert http(live, "HEAD", "/health").status_code == 200


def test_errors_are_openais_exceptions(live: Live) -> None:
    with pytest.raises(openai.BadRequestError, match="temperature") as error:
        client(live).chat.completions.create(**CHAT, temperature=3)
    assert error.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as error:
        client(live).chat.completions.create(**CHAT, max_tokens=100_000)
    assert error.value.code == "context_length_exceeded"


# ------------------------------------------------------------------------------------------------------------ states


def test_a_turn_reads_only_what_is_new(live: Live) -> None:
    post(live, CHAT)
    turns = [*HELLO, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "more"}]
    usage = post(live, {"messages": turns}).json()["usage"]
    tokenizer = byte_tokenizer()
    covered = (*encode_prompt(tokenizer, HELLO), *tokenizer(ANSWER)["input_ids"])
    request = live.engine.requests[-1]
    assert request.state.tokens == covered
    assert (*covered, *request.prompt) == tuple(encode_prompt(tokenizer, turns))
    assert usage["prompt_tokens_details"]["cached_tokens"] == len(covered)
    assert usage["prompt_tokens"] == len(covered) + len(request.prompt)
    changed = [*HELLO, {"role": "assistant", "content": ANSWER + "?"}, {"role": "user", "content": "more"}]
    post(live, {"messages": [{"role": "user", "content": "hellO"}, *changed[1:]]})
    assert live.engine.requests[-1].state is None  # no prefix, no state


def test_states_can_be_switched_off() -> None:
    with running(FakeEngine(), cached_states=0) as live:
        for _ in range(2):
            post(live, CHAT)
        assert [(request.state, request.keep_state) for request in live.engine.requests] == [(None, False)] * 2


def test_the_longest_beginning_wins_and_the_least_recently_used_goes() -> None:
    class Covering:
        def __init__(self, *tokens: int):
            self.tokens = tokens

    cache = StateCache(2)
    short, long = Covering(1, 2), Covering(1, 2, 3)
    cache.put(short)
    cache.put(long)
    assert cache.find((1, 2, 3, 4)) == (3, long)
    assert cache.find((1, 2, 3)) == (2, short)  # a state that covers all leaves nothing to read
    assert cache.find((1, 2)) == (0, None) == cache.find((2, 1, 2))
    cache.put(Covering(9))
    assert len(cache) == 2 and cache.find((1, 2, 3, 4)) == (2, short)


# --------------------------------------------------------------------------------------------------- the real engine


def test_the_real_engine_says_the_same_through_the_server(tiny: Path) -> None:
    engine = Engine.load(str(tiny), device="cpu", slots=4)
    prompt = tuple(encode_prompt(engine.tokenizer, HELLO))
    sampling = Sampling(n=2, max_new_tokens=24, temperature=0.9, seed=3, logprobs=2)
    expected = engine.generate([Request(prompt, sampling)])[0]
    greedy = Sampling(max_new_tokens=24, temperature=0)
    (said,) = engine.generate([Request(prompt, greedy)])[0]
    asked: dict[str, Any] = dict(max_tokens=24, temperature=0.9, seed=3, logprobs=True, top_logprobs=2)
    with running(engine, cached_states=0, slots=4) as live:
        whole = client(live).chat.completions.create(**CHAT, **asked, n=2)
        assert [choice.message.content for choice in whole.choices] == [answer.text for answer in expected]
        assert whole.usage is not None
        assert whole.usage.completion_tokens == sum(len(answer.tokens) for answer in expected)
        for choice, answer in zip(whole.choices, expected, strict=True):
            assert choice.logprobs is not None and choice.logprobs.content is not None and answer.logprobs is not None
            assert [one.logprob for one in choice.logprobs.content] == [one.logprob for one in answer.logprobs]
        stream = client(live).chat.completions.create(**CHAT, max_tokens=24, temperature=0, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == said.text


@pytest.mark.slow
def test_many_streaming_clients(tiny: Path) -> None:
    """A short form of the load test that docs/serving.md reports: no error, exact counts, memory flat."""
    with running(Engine.load(str(tiny), device="cpu", slots=16), slots=16, queue=200) as live:
        process = psutil.Process()
        asyncio.run(crowd(live, clients=60, answers=3))
        before = process.memory_info().rss
        asyncio.run(crowd(live, clients=60, answers=5))
        assert process.memory_info().rss - before < 40 << 20


async def crowd(live: Live, clients: int, answers: int) -> None:
    """Clients that stream so many answers each, one after another, all of them complete."""
    ask = openai.AsyncOpenAI(base_url=f"{live.base}/v1", api_key="x", max_retries=0, timeout=PATIENCE)

    async def one(number: int) -> None:
        for turn in range(answers):
            length = 3 + (number + turn) % 20
            stream = await ask.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": f"{number} {turn}"}], stream=True,
                stream_options={"include_usage": True}, max_tokens=length, extra_body={"ignore_eos": True},
            )  # fmt: skip
            chunks = [chunk async for chunk in stream]
            assert chunks[-2].choices[0].finish_reason == "length"
            assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == length

    async with ask:
        await asyncio.gather(*map(one, range(clients)))


# -------------------------------------------------------------------------------------------------------- the verb


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere/at/all"], "nowhere/at/all"),
        (["TINY", "--api-key-env", "NO_SUCH_VARIABLE"], "this variable is not set"),
        (["TINY", "--api-key-file", "EMPTY"], "is empty; put a key into it"),
        (["TINY", "--api-key-file", "BYTES"], "printable ASCII"),
        (["TINY", "--api-key-file", "nowhere"], "nowhere: No such file"),
        (["TINY", "--host", "203.0.113.9"], "cannot listen on 203.0.113.9, port 8000"),
        (["TINY", "--chat-template", "zephir"], "did you mean 'zephyr'"),
        (["TINY", "--chat-template", "chatml"], "the model has no such tokens"),
        (["BARE", "--port", "0"], "--chat-template, the one that the model was trained with"),
    ],
)
def test_what_a_user_writes_wrong_is_one_sentence(words: list[str], message: str, tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n \n")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in tiny.iterdir():
        if "chat_template" not in file.name:
            (bare / file.name).symlink_to(file)
    names = {"TINY": str(tiny), "EMPTY": str(tmp_path / "empty"), "BYTES": str(tmp_path / "bytes"), "BARE": str(bare)}
    result = CliRunner().invoke(cli, ["serve", *[names.get(word, word) for word in words]])
    assert result.exit_code == 2, result.output
    assert message in result.output and "Traceback" not in result.output


def test_a_port_that_is_taken(tiny: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        result = CliRunner().invoke(cli, ["serve", str(tiny), "--port", str(taken.getsockname()[1])])
    assert result.exit_code == 2 and "choose others with --host and --port" in result.output


def test_without_the_extra_the_sentence_names_it(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (
        "import sys; sys.modules['uvicorn'] = None\n"
        f"from mambalign.cli import app\napp(['serve', {str(tiny)!r}])"
    )  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'mambalign[serve]'" in done.stderr and "Traceback" not in done.stderr
