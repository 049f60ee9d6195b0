"""Deltas of the engine as OpenAI's objects: whole, and as server-sent events."""

from __future__ import annotations

import codecs
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import lru_cache
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from mambalign.generation.protocol import usage
from mambalign.generation.requests import Delta, TokenLogprob
from mambalign.generation.worker import Call, joined

KEEP_ALIVE_SECONDS = 15.0  # between signs of life to a client that waits


class Vocabulary:
    """What a token is in bytes: a character may be spread over several tokens."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        decoder = json.loads(tokenizer.backend_tokenizer.to_str())["decoder"] or {}
        self._byte_level = "ByteLevel" in {decoder.get("type"), *(d["type"] for d in decoder.get("decoders", ()))}
        self._byte = {character: byte for byte, character in bytes_to_unicode().items()}
        self.bytes_of = lru_cache(maxsize=1 << 16)(self._bytes_of)

    def _bytes_of(self, token: int) -> bytes:
        piece = self._tokenizer.convert_ids_to_tokens(token)
        if piece is None:  # a row of the embedding that no token has (padding of the vocabulary)
            return b""
        if token in self._special:
            return piece.encode()
        if self._byte_level:
            return bytes(self._byte[c] for c in piece) if all(c in self._byte for c in piece) else piece.encode()
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace("\u2581", " ").encode()

    def text_of(self, token: int) -> str:
        """The token in print; bytes that are no character as OpenAI writes them."""
        raw = self.bytes_of(token)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def chat_logprobs(vocabulary: Vocabulary, chosen: Sequence[TokenLogprob]) -> dict[str, Any]:
    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {
            "token": vocabulary.text_of(token),
            "logprob": _finite(logprob),
            "bytes": list(vocabulary.bytes_of(token)),
        }

    content = [
        entry(one.token_id, one.logprob) | {"top_logprobs": [entry(*alternative) for alternative in one.top]}
        for one in chosen
    ]
    return {"content": content, "refusal": None}


class _TextLogprobs:
    """The older format, whose offsets (in characters) run on from delta to delta."""

    def __init__(self, vocabulary: Vocabulary, offset: int):
        self.vocabulary, self.offset = vocabulary, offset
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, chosen: Sequence[TokenLogprob]) -> dict[str, Any]:
        offsets = []
        for one in chosen:
            offsets.append(self.offset)
            self.offset += len(self._decoder.decode(self.vocabulary.bytes_of(one.token_id)))
        name = self.vocabulary.text_of
        return {
            "tokens": [name(one.token_id) for one in chosen],
            "token_logprobs": [_finite(one.logprob) for one in chosen],
            "top_logprobs": [{name(token): _finite(value) for token, value in one.top} for one in chosen],
            "text_offset": offsets,
        }


def _finite(logprob: float) -> float:
    """JSON has no infinity; OpenAI writes this number for it."""
    return max(logprob, -9999.0)


class Answers:
    """The answers to one call in OpenAI's form.

    Args:
        prompts: texts to begin the answers of each request with (`echo`), or nothing.
    """

    kind = ""
    chunk_kind = ""

    def __init__(self, call: Call, model: str, fingerprint: str, vocabulary: Vocabulary, prompts: Sequence[str] = ()):
        self.call, self.vocabulary, self.prompts = call, vocabulary, prompts
        self.id = f"{'chatcmpl' if self.kind == 'chat.completion' else 'cmpl'}-{uuid.uuid4().hex}"
        self._shared = {"created": int(time.time()), "model": model, "system_fingerprint": fingerprint}
        self._prompt_tokens = sum(len(request.prompt) for request in call.requests)
        self._decoded = 0
        self._unfinished = call.answers

    # -------------------------------------------------------------------------------------------- for the subclasses

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        """A choice before there is text."""
        raise NotImplementedError

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        """What a delta adds to a choice."""
        raise NotImplementedError

    def choice(self, whole: Delta) -> dict[str, Any]:
        raise NotImplementedError

    # -------------------------------------------------------------------------------------------------- both of them

    def echoed(self, index: int) -> str:
        return self.prompts[index // self.call.requests[0].sampling.n] if self.prompts else ""

    async def whole(self) -> dict[str, Any]:
        """
        Raises:
            Exception: what the call failed with.
        """
        parts: list[list[Delta]] = [[] for _ in range(self.call.answers)]
        while self._unfinished:
            for delta in await self._read():
                parts[delta.index].append(delta)
        choices = [self.choice(joined(deltas)) for deltas in parts]
        return {"id": self.id, "object": self.kind, **self._shared, "choices": choices, "usage": self._usage()}

    async def events(self, include_usage: bool) -> AsyncIterator[bytes]:
        """Server-sent events, as OpenAI sends them. While there is nothing to say a comment is sent now and then: a
        proxy does not take the connection for dead.

        Raises:
            Exception: what the call failed with.
        """
        no_usage: dict[str, Any] = {"usage": None} if include_usage else {}
        for index in range(self.call.answers):
            first = self.first_chunk(index)
            if first is not None:
                yield self._event([first], no_usage)
        while self._unfinished:
            deltas = await self._read()
            if not deltas:
                yield b": waiting\n\n"
            for delta in deltas:
                for chunk in self.chunks(delta):
                    yield self._event([chunk], no_usage)
        if include_usage:
            yield self._event([], {"usage": self._usage()})
        yield b"data: [DONE]\n\n"

    async def _read(self) -> list[Delta]:
        deltas = await self.call.read(KEEP_ALIVE_SECONDS)
        for delta in deltas:
            self._decoded += len(delta.tokens)
            self._unfinished -= delta.finish_reason is not None
        return deltas

    def _event(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        body = {"id": self.id, "object": self.chunk_kind, **self._shared, "choices": choices, **more}
        return b"data: " + encoded(body) + b"\n\n"

    def _usage(self) -> dict[str, Any]:
        return usage(self._prompt_tokens, self._decoded, self.call.cached_tokens)


class ChatAnswers(Answers):
    """`/v1/chat/completions`."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        return _chat_chunk(index, {"role": "assistant", "content": "", "refusal": None}, None, None)

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        found = []
        if delta.text or delta.logprobs:
            logprobs = self._logprobs(delta)
            found.append(_chat_chunk(delta.index, {"content": delta.text}, logprobs, None))
        if delta.finish_reason is not None:
            found.append(_chat_chunk(delta.index, {}, None, delta.finish_reason))
        return found

    def choice(self, whole: Delta) -> dict[str, Any]:
        return {
            "index": whole.index,
            "message": {"role": "assistant", "content": whole.text, "refusal": None},
            "logprobs": self._logprobs(whole),
            "finish_reason": whole.finish_reason,
        }

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        return None if delta.logprobs is None else chat_logprobs(self.vocabulary, delta.logprobs)


def _chat_chunk(index: int, delta: dict[str, Any], logprobs: Any, finish_reason: str | None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


class TextAnswers(Answers):
    """`/v1/completions`."""

    kind, chunk_kind = "text_completion", "text_completion"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self._logprobs = [_TextLogprobs(self.vocabulary, len(self.echoed(i))) for i in range(self.call.answers)]

    def first_chunk(self, index: int) -> dict[str, Any] | None:
        echoed = self.echoed(index)
        return {"index": index, "text": echoed, "logprobs": None, "finish_reason": None} if echoed else None

    def chunks(self, delta: Delta) -> list[dict[str, Any]]:
        if not delta.text and not delta.logprobs and delta.finish_reason is None:
            return []
        return [self._choice(delta, delta.text)]

    def choice(self, whole: Delta) -> dict[str, Any]:
        return self._choice(whole, self.echoed(whole.index) + whole.text)

    def _choice(self, delta: Delta, text: str) -> dict[str, Any]:
        logprobs = None if delta.logprobs is None else self._logprobs[delta.index].write(delta.logprobs)
        return {"index": delta.index, "text": text, "logprobs": logprobs, "finish_reason": delta.finish_reason}


def encoded(value: Any) -> bytes:
    """JSON as it goes over the wire. ASCII only: half a surrogate pair, in a key or a token, is no UTF-8."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()
