"""A chat whose past is kept as a state: each turn reads only what is new, a saved one goes on without re-reading.

The state covers tokens, so the next turn must begin with exactly those. Templates render a chat anew each turn; an
answer is put back as the tokens that the model said, which need not be those that its text would be cut into.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mambalign.data.chat import common_prefix, encode_rendered, render
from mambalign.generation.engine import Engine
from mambalign.generation.requests import Delta, Request, Sampling
from mambalign.generation.state import State
from mambalign.recipe import UserError

FILE = "conversation.safetensors"


class Conversation:
    """Messages, and the state behind them.

    Args:
        messages: to begin with, such as a system prompt; they are read with the first question.

    `state` is that behind the last finished answer, None before it. `reread` says, after a question, why the chat was
    read from its beginning, None where the state was continued.

    Example:
        >>> talk = Conversation([{"role": "system", "content": "Be brief."}])
        >>> for delta in talk.ask(engine, "Why?", Sampling(temperature=0)):    # doctest: +SKIP
        ...     print(delta.text, end="")
        >>> talk.save("talk")                                                  # doctest: +SKIP
    """

    def __init__(self, messages: Sequence[dict[str, str]] = ()):
        self.messages = [dict(message) for message in messages]
        self.state: State | None = None
        self.reread: str | None = None
        self._said: dict[int, tuple[int, ...]] = {}  # message -> the tokens that the model said

    def ask(self, engine: Engine, text: str, sampling: Sampling) -> Iterator[Delta]:
        """Ask, and yield the answer as it comes.

        An iterator that is closed early cancels the answer: what it said so far stays in `messages`, and the next turn
        goes on from there; if it said nothing, the question is taken back, too.

        Raises:
            UserError: n is not 1, or the state is of another model.
        """
        if sampling.n != 1:
            raise UserError(f"n: a conversation has one answer a turn, not {sampling.n}")
        self.messages.append({"role": "user", "content": text})
        said: list[int] = []
        pieces: list[str] = []
        arrived: deque[Delta] = deque()
        ticket = None
        finished = False
        try:
            ticket = engine.add(self._request(engine, sampling), arrived.append)
            while not finished:
                engine.step()
                while arrived:
                    delta = arrived.popleft()
                    said += delta.tokens
                    pieces.append(delta.text)
                    if delta.finish_reason is not None:
                        finished, self.state = True, delta.state
                    yield delta
        finally:
            if ticket is not None and not finished:
                engine.cancel(ticket)
            if finished or "".join(pieces):
                self._said[len(self.messages)] = tuple(said)
                self.messages.append({"role": "assistant", "content": "".join(pieces)})
            else:
                self.messages.pop()

    def tokens(self, tokenizer: Any) -> tuple[int, ...]:
        """The whole chat up to where the assistant speaks next, its answers as the tokens that were said."""
        rendered = render(tokenizer, self.messages, add_generation_prompt=True)
        encoded = encode_rendered(tokenizer, [rendered])[0]
        answers = [i for i, message in enumerate(self.messages) if message["role"] == "assistant"]
        if len(encoded.regions) != len(answers):
            return tuple(encoded.ids)
        ids: list[int] = []
        at = 0
        for number, (start, end), (begin, stop) in zip(answers, encoded.regions, rendered.regions, strict=True):
            ids += encoded.ids[at:start]
            at = end
            content, region = self.messages[number]["content"], rendered.text[begin:stop]
            said = self._said.get(number)
            if said is None or not region.startswith(content) or _text(tokenizer, said) != content:
                ids += encoded.ids[start:end]
            else:
                ids += [*said, *tokenizer(region[len(content) :], add_special_tokens=False)["input_ids"]]
        return (*ids, *encoded.ids[at:])

    def _request(self, engine: Engine, sampling: Sampling) -> Request:
        tokens = self.tokens(engine.tokenizer)
        state, self.reread = self.state, None
        if state is not None:
            covered, same = len(state.tokens), common_prefix(tokens, state.tokens)
            if same < covered or covered == len(tokens):
                self.reread = (
                    f"the chat template writes earlier turns differently now (from token {same} of {covered} on), so "
                    "the chat was read again from its beginning"
                )
                state = None
        read = 0 if state is None else len(state.tokens)
        return Request(tokens[read:], replace(sampling, n=1), state, keep_state=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write messages and state into one file, whole or not at all: `path` if it ends in .safetensors, else the file
        `conversation.safetensors` in the folder `path`."""
        said = {str(number): tokens for number, tokens in self._said.items()}
        state = self.state or State(torch.empty(0), torch.empty(0))
        about = {"messages": json.dumps(self.messages), "said": json.dumps(said)}
        state.save(_file(path), about | {"begun": json.dumps(self.state is not None)})

    @classmethod
    def load(cls, path: str | os.PathLike[str], engine: Engine) -> Conversation:
        """What `save` wrote, to go on with the same model in the same precision.

        Raises:
            UserError: no such file, no conversation in it, or that of another model.
        """
        file = _file(path)
        about = State.about(file)
        if "messages" not in about:
            raise UserError(f"{file} holds a state without a conversation")
        talk = cls(json.loads(about["messages"]))
        talk._said = {int(number): tuple(tokens) for number, tokens in json.loads(about["said"]).items()}
        if json.loads(about["begun"]):
            talk.state = State.load(file, engine.fingerprint)
        return talk


def _text(tokenizer: Any, tokens: Sequence[int]) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True))


def _file(path: str | os.PathLike[str]) -> Path:
    """
    Raises:
        UserError: a name that no file can have: ~ of an unknown user, a NUL.
    """
    try:
        file = Path(path).expanduser()
    except RuntimeError as error:
        raise UserError(f"{path}: there is no such user; write ./{path} for a file whose name begins so") from error
    if "\0" in str(file):
        raise UserError(f"{str(file)!r} is no name of a file")
    return file if file.suffix == Path(FILE).suffix else file / FILE
