"""Conversations: what continues a state is what a reading from the beginning gives, also from disk and when cut off."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mambalign.data.chat import TEMPLATES, encode_prompt
from mambalign.generation.conversation import Conversation
from mambalign.generation.engine import Engine
from mambalign.generation.requests import Delta, Request, Sampling
from mambalign.generation.state import State
from mambalign.recipe import UserError
from tests.generation.conftest import FAMILIES, pair
from tests.train.conftest import byte_tokenizer

DRAWN = Sampling(max_new_tokens=12, temperature=1.5)
GREEDY = Sampling(max_new_tokens=12, temperature=0)
QUESTIONS = ("why not", "and the cat?", "ünïcödé — é")


@pytest.fixture(scope="module", params=FAMILIES)
def engine(request: pytest.FixtureRequest) -> Engine:
    return Engine(pair(request.param)[1], byte_tokenizer(), slots=2)


@pytest.fixture(scope="module")
def mamba() -> Engine:
    return Engine(pair("mamba")[1], byte_tokenizer(), slots=2)


def say(talk: Conversation, engine: Engine, text: str, sampling: Sampling = DRAWN) -> str:
    return "".join(delta.text for delta in talk.ask(engine, text, sampling))


def reread(engine: Engine, state: State) -> State:
    request = Request(state.tokens, Sampling(max_new_tokens=1, temperature=0), keep_state=True)
    again = engine.generate([request])[0][0].state
    assert again is not None and again.tokens == state.tokens
    return again


def close(a: State, b: State) -> bool:
    pairs = zip((*a.conv, *a.ssm), (*b.conv, *b.ssm), strict=True)
    return all(float((x - y).abs().max()) <= 1e-5 * max(1.0, float(y.abs().max())) for x, y in pairs)


@pytest.mark.parametrize("sampling", [DRAWN, GREEDY], ids=["drawn", "greedy"])
def test_continuing_from_disk_is_reading_again(engine: Engine, sampling: Sampling, tmp_path: Path) -> None:
    """Tokens equal, states equal up to rounding, and of the history nothing is read."""
    talk = Conversation([{"role": "system", "content": "be brief"}])
    for question in QUESTIONS[:2]:
        say(talk, engine, question, sampling)
    talk.save(tmp_path / "talk")
    again = Conversation.load(tmp_path / "talk", engine)
    assert again.messages == talk.messages and again.state is not None and talk.state is not None
    assert again.state.tokens == talk.state.tokens and close(again.state, reread(engine, talk.state))
    fresh = Conversation(talk.messages)
    fresh._said = dict(talk._said)
    asked: list[int] = []
    real = engine.add

    def add(request: Request, sink: Any) -> int:
        asked.append(len(request.prompt))
        return real(request, sink)

    engine.add = add  # type: ignore[method-assign]
    try:
        texts = [say(one, engine, QUESTIONS[2], sampling) for one in (talk, again, fresh)]
    finally:
        engine.add = real  # type: ignore[method-assign]
    assert len(set(texts)) == 1 and talk.messages == again.messages == fresh.messages
    assert talk.reread is None and again.reread is None
    assert asked[0] == asked[1] < asked[2] - 40  # the turn alone, against all of it
    assert again.state is not None and fresh.state is not None and close(again.state, fresh.state)
    assert len(texts[0]) > 3


def test_the_first_turn_is_an_ordinary_request(mamba: Engine) -> None:
    talk = Conversation()
    text = say(talk, mamba, "why")
    prompt = encode_prompt(mamba.tokenizer, [{"role": "user", "content": "why"}])
    assert text == mamba.generate([Request(tuple(prompt), DRAWN)])[0][0].text
    assert talk.messages == [{"role": "user", "content": "why"}, {"role": "assistant", "content": text}]


def test_an_interrupted_answer_keeps_what_was_said(mamba: Engine) -> None:
    talk = Conversation()
    say(talk, mamba, QUESTIONS[0])
    before = talk.state
    heard = ""
    answer = talk.ask(mamba, QUESTIONS[1], DRAWN)
    for delta in answer:
        heard += delta.text
        if len(heard) >= 3:
            break
    answer.close()  # type: ignore[attr-defined]
    assert mamba.running == mamba.waiting == 0
    assert talk.messages[-1] == {"role": "assistant", "content": heard} and talk.state is before
    text = say(talk, mamba, QUESTIONS[2])
    assert talk.reread is None
    assert talk.state is not None and close(talk.state, reread(mamba, talk.state))
    fresh = Conversation(talk.messages[:4])
    fresh._said = {k: v for k, v in talk._said.items() if k < 4}
    assert say(fresh, mamba, QUESTIONS[2]) == text


def test_a_question_without_an_answer_is_taken_back(mamba: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    talk = Conversation()
    say(talk, mamba, QUESTIONS[0])
    messages = [dict(message) for message in talk.messages]

    def step() -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(mamba, "step", step)
    with pytest.raises(KeyboardInterrupt):
        say(talk, mamba, QUESTIONS[1])
    assert talk.messages == messages and mamba.waiting == 0


def test_a_template_that_rewrites_the_past_is_read_again_and_said(mamba: Engine, monkeypatch: Any) -> None:
    talk = Conversation()
    say(talk, mamba, QUESTIONS[0])
    numbered = "{{ messages | length }}" + TEMPLATES["zephyr"]
    monkeypatch.setattr(mamba.tokenizer, "chat_template", numbered)
    text = say(talk, mamba, QUESTIONS[1])
    assert talk.reread is not None and "from token 0" in talk.reread and "read again from its beginning" in talk.reread
    fresh = Conversation(talk.messages[:2])
    fresh._said = {1: talk._said[1]}
    assert say(fresh, mamba, QUESTIONS[1]) == text


def test_an_answer_is_put_back_as_the_tokens_it_was_said_in(mamba: Engine) -> None:
    talk = Conversation()
    text = say(talk, mamba, QUESTIONS[0], Sampling(max_new_tokens=30, temperature=3.0, ignore_end=True))
    talk.messages.append({"role": "user", "content": "x"})
    tokens = talk.tokens(mamba.tokenizer)
    plain = tuple(encode_prompt(mamba.tokenizer, talk.messages))
    assert "\ufffd" in text and tokens != plain  # no text could be cut into these bytes
    assert talk.state is not None and tokens[: len(talk.state.tokens)] == talk.state.tokens
    assert mamba.tokenizer.decode(list(tokens)).startswith(mamba.tokenizer.decode(list(plain[:20])))


def test_what_is_refused(mamba: Engine, tmp_path: Path) -> None:
    talk = Conversation()
    with pytest.raises(UserError, match="one answer a turn"):
        list(talk.ask(mamba, "x", Sampling(n=2)))
    assert not talk.messages
    talk.save(tmp_path / "empty.safetensors")
    assert Conversation.load(tmp_path / "empty.safetensors", mamba).state is None
    say(talk, mamba, "x")
    talk.save(tmp_path / "t")
    other = Engine(pair("mamba", seed=1)[1], byte_tokenizer(), slots=1)
    with pytest.raises(UserError, match="made by another model"):
        Conversation.load(tmp_path / "t", other)
    assert talk.state is not None
    talk.state.save(tmp_path / "s.safetensors")
    with pytest.raises(UserError, match="a state without a conversation"):
        Conversation.load(tmp_path / "s.safetensors", mamba)
    with pytest.raises(UserError, match="there is no saved state"):
        Conversation.load(tmp_path / "none", mamba)


def test_deltas_come_as_they_are_made(mamba: Engine) -> None:
    deltas: list[Delta] = list(Conversation().ask(mamba, "why", DRAWN))
    assert deltas[-1].finish_reason is not None and all(delta.finish_reason is None for delta in deltas[:-1])
    assert len(deltas) > 3
