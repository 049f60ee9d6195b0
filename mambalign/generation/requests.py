"""What is asked of the engine and what comes back: plain values, shared by chat, server, best-of-n and evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from mambalign.recipe import UserError

if TYPE_CHECKING:
    from mambalign.generation.state import State

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are chosen.

    Each step: repetition penalty (arXiv 1909.05858, section 4.1, over prompt and answer), temperature, top-k, top-p
    (arXiv 1904.09751, section 3.1), min-p (arXiv 2407.01082, section 3), in transformers' order, then one draw.

    n: answers to the prompt, whose state is computed once. temperature: 0 is greedy. top_k: 0 is all. seed: with the
    prompt's tokens and an answer's number it decides that answer, whatever else is in the batch. stop: texts that end
    an answer and are not part of it. logprobs: how many alternatives to report for every token (None: no
    log-probabilities at all, 0: those of the chosen tokens), always of the model's own distribution, before any of the
    above. ignore_end: go on past the end of turn (benchmarks).
    """

    n: int = 1
    max_new_tokens: int = 1024
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int = 42
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_end: bool = False

    def __post_init__(self) -> None:
        for name, least in (("n", 1), ("max_new_tokens", 1), ("top_k", 0), ("temperature", 0), ("logprobs", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise UserError(f"{name}: {value} must be at least {least}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p: {self.min_p} must be between 0 and 1")
        if not self.repetition_penalty > 0:
            raise UserError(f"repetition_penalty: {self.repetition_penalty} must be above 0; 1 is none")
        if not all(self.stop):
            raise UserError("stop: an empty text would end every answer at once")

    def answer_seed(self, prompt: Sequence[int], index: int) -> int:
        """63 bits for the generator of answer `index`."""
        text = f"{self.seed}:{index}:{','.join(map(str, prompt))}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


@dataclass(frozen=True)
class Request:
    """prompt: token ids, at least one. state: what they continue; None: nothing. keep_state: the last `Delta` of every
    answer carries the state behind it."""

    prompt: tuple[int, ...]
    sampling: Sampling
    state: State | None = None
    keep_state: bool = False

    def __post_init__(self) -> None:
        if not self.prompt:
            raise UserError("a prompt needs at least one token")


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, its log-probability (natural), and the likeliest alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Delta:
    """What became certain of one answer: text that no stop string can take back any more and that is whole characters.

    index: 0 <= index < n. tokens: the ids decoded since the last delta, the end-of-turn token not among them. The last
    delta of an answer, and only that, has a `finish_reason`; it may have no text.
    """

    index: int
    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] | None = None
    finish_reason: FinishReason | None = None
    state: State | None = None


@dataclass(frozen=True)
class Completion:
    """A whole answer: the concatenation of its deltas."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    logprobs: tuple[TokenLogprob, ...] | None = None
    state: State | None = None
