"""Answers from a model, many at once.

A prompt is read by the model's own forward pass, at most `prefill_tokens` tokens between two steps of the answers that
are running; its state, which has one size whatever it read, is copied into a *slot* for each of its answers. All slots
step together (`decode.py`), and a slot that is done takes the next answer. Time per token does not depend on how much
was read before.

**What is guaranteed** of an engine with given weights, `slots` and `prefill_tokens`, on one machine with one number of
threads: with `exact` (the default) the tokens and log-probabilities of an answer, greedy or drawn, depend on its
request and its number alone, to the last bit, not on what else is in the batch, the order, or the moment it comes. Rows
of a step have the same bits in any batch (measured at the start, see `decode.py`), and prompts are read one at a time,
cut at multiples of `prefill_tokens`. With `exact=False` prompts are read many at a time, laid end to end without
padding, and products have as many rows as there are answers: faster for many short prompts and small batches, equal up
to rounding, which can turn a near tie between two tokens. Another number of slots is another rounding, too.
"""

from __future__ import annotations

import contextlib
import itertools
import random
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from mambalign.data.chat import end_of_turn_id
from mambalign.generation.decode import Decoder
from mambalign.generation.requests import Completion, Delta, FinishReason, Request, Sampling, TokenLogprob
from mambalign.generation.sampling import choose, token_logprobs
from mambalign.generation.scoring import best_device
from mambalign.generation.state import LayerState, State, fingerprint
from mambalign.generation.text import TextStream
from mambalign.models.checkpoint import load_model, load_tokenizer
from mambalign.recipe import UserError

Sink = Callable[[Delta], None]


@dataclass(eq=False)
class _Prompt:
    """A request being read, then waiting for slots. `state` and `done` grow; `logits [V]` come with the last token."""

    ticket: int
    request: Request
    sink: Sink
    stream: bool
    state: LayerState | None
    done: int = 0
    logits: Tensor | None = None
    started: int = 0  # answers that have got a slot

    @property
    def waiting(self) -> int:
        return self.request.sampling.n - self.started


@dataclass(eq=False)
class _Answer:
    """An answer in slot `row`; `fed` of its tokens are in the slot's state."""

    ticket: int
    index: int
    sampling: Sampling
    sink: Sink
    random: random.Random
    text: TextStream | None
    context: tuple[int, ...]  # what the state covered at its start
    keep_state: bool
    row: int
    seen: Tensor | None = None
    tokens: list[int] = field(default_factory=list)
    fed: int = 0
    sent: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    over: bool = False


class Engine:
    """Generates from a Mamba-1, Falcon-Mamba or Mamba-2 (see the head of this module for what is guaranteed).

    Args:
        model: a language model of `mambalign.models`; adapters on it count. Its weights must not change afterwards.
        tokenizer: its tokenizer, or None: then there is no text, and no stop strings.
        slots: answers that run at once; None: 8 on a CPU, 64 on a GPU.
        prefill_tokens: prompt tokens read between two steps; None: 512 on a CPU, 8192 on a GPU.
        exact: answers do not depend on the batch.
        step: "auto", "eager" or "graph" (see `decode.select_step`).

    `generate` answers a list. A server calls instead, all from ONE thread (nothing here is locked):

    - `add(request, sink)` at any time; it returns a ticket at once. `sink(delta)` is called within later `step()`s, in
      the order of an answer's tokens; the last delta of each of the n answers has a `finish_reason`. A sink may call
      `add` and `cancel`; what it raises comes out of `step`.
    - `step()` while there is work: it reads up to `prefill_tokens` of waiting prompts and takes every running answer
      one token further. It returns how many answers are running or waiting; at 0 there is nothing to do.
    - `cancel(ticket)` frees what the request holds; its sink is not called again.

    Raises:
        UserError: quantised weights.

    Example:
        >>> engine = Engine.load("runs/sft")                                                   # doctest: +SKIP
        >>> prompt = encode_prompt(engine.tokenizer, [{"role": "user", "content": "Hello"}])   # doctest: +SKIP
        >>> engine.generate([Request(tuple(prompt), Sampling(temperature=0))])[0][0].text      # doctest: +SKIP
        'Hello! How can I help you?'
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        slots: int | None = None,
        prefill_tokens: int | None = None,
        exact: bool = True,
        step: str = "auto",
    ):
        self.model, self.tokenizer, self.exact = model.eval(), tokenizer, exact
        self.device = model.backbone.embeddings.weight.device
        on_cpu = self.device.type == "cpu"
        self.slots = slots or (8 if on_cpu else 64)
        self.prefill_tokens = prefill_tokens or (512 if on_cpu else 8192)
        if self.slots < 1 or self.prefill_tokens < 1:
            raise UserError(f"slots ({slots}) and prefill_tokens ({prefill_tokens}) must be at least 1")
        # A product of 5 rows on 2 threads is cut unevenly, and its rows part: capacities are round.
        capacity = self.slots if self.slots == 1 else -(-self.slots // 8) * 8
        self.decoder = Decoder(model, capacity, exact=exact, step=step)
        self.ends = end_ids(model, tokenizer)
        self._queue: deque[_Prompt] = deque()  # being read
        self._ready: deque[_Prompt] = deque()  # read, with answers that wait for a slot
        self._running: list[_Answer] = []  # by row
        self._tickets = itertools.count()

    @classmethod
    def load(
        cls, path: str, *, device: str | None = None, dtype: str = "auto", tokenizer: str | None = None, **options: Any
    ) -> Engine:
        """The model (or adapter on its base) in a folder or hub id, with the tokenizer beside it, or from elsewhere.

        dtype: of the weights; "auto" as stored. options: those of `Engine`. Raises UserError.
        """
        model = load_model(path, dtype=dtype, device=device or best_device())
        return cls(model, load_tokenizer(tokenizer or path), **options)

    @cached_property
    def fingerprint(self) -> str:
        """What a `State` must carry to be continued here."""
        return fingerprint(self.model)

    @property
    def running(self) -> int:
        """Answers that hold a slot."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Answers that have none yet."""
        return sum(prompt.waiting for prompt in (*self._queue, *self._ready))

    # ------------------------------------------------------------------------------------------------------ in, out

    def generate(
        self, requests: Iterable[Request], progress: Callable[[int], Any] | None = None
    ) -> list[list[Completion]]:
        """All answers to all requests, in order, n each; `progress(1)` is called as each is finished.

        Raises:
            UserError: see `add`. Then, and when interrupted, nothing of these requests stays in the engine.
        """
        found: list[list[list[Delta]]] = []
        tickets: list[int] = []

        def collect(answers: list[list[Delta]]) -> Sink:
            def sink(delta: Delta) -> None:
                answers[delta.index].append(delta)
                if delta.finish_reason and progress is not None:
                    progress(1)

            return sink

        try:
            for request in requests:
                answers: list[list[Delta]] = [[] for _ in range(request.sampling.n)]
                found.append(answers)
                tickets.append(self._add(request, collect(answers), stream=False))
            mine = set(tickets)
            while self._holds(mine):
                self.step()
        except BaseException:
            for ticket in tickets:
                self.cancel(ticket)
            raise
        return [[_joined(deltas) for deltas in answers] for answers in found]

    def add(self, request: Request, sink: Sink) -> int:
        """Queue a request; returns its ticket.

        Raises:
            UserError: a token that the model does not have, a state of another model, or stop strings without a
                tokenizer.
        """
        return self._add(request, sink, stream=True)

    def _add(self, request: Request, sink: Sink, stream: bool) -> int:
        rows = self.decoder.embedding.shape[0]
        wrong = next((token for token in request.prompt if not 0 <= token < rows), None)
        if wrong is not None:
            raise UserError(f"prompt: token {wrong} is none of the model's {rows}; is this another model's tokenizer?")
        if self.tokenizer is None and request.sampling.stop:
            raise UserError("stop: strings need a tokenizer, and this engine has none")
        if request.state is not None:
            request.state.check(self.fingerprint)
        prompt = _Prompt(next(self._tickets), request, sink, stream, request.state)
        self._queue.append(prompt)
        return prompt.ticket

    def cancel(self, ticket: int) -> None:
        """Drop what is left of a request; nothing happens where it is finished or unknown."""
        self._queue = deque(prompt for prompt in self._queue if prompt.ticket != ticket)
        self._ready = deque(prompt for prompt in self._ready if prompt.ticket != ticket)
        for answer in [answer for answer in self._running if answer.ticket == ticket]:
            self._leave(answer)

    def _holds(self, tickets: set[int]) -> bool:
        held: list[Any] = [*self._running, *self._ready, *self._queue]
        return any(item.ticket in tickets for item in held)

    # --------------------------------------------------------------------------------------------------------- steps

    @torch.inference_mode()
    def step(self) -> int:
        """Read some of the waiting prompts, then take every running answer one token further (see the class).

        Raises:
            UserError: the model gives logits that are no numbers.
        """
        self._read_prompts()
        self._fill_slots()
        if self._running:
            answers = list(self._running)
            tokens = torch.tensor([answer.tokens[-1] for answer in answers])
            self.decoder.tokens[: len(answers)].copy_(tokens)
            logits = self.decoder.step(len(answers))
            for answer in answers:
                answer.fed += 1
            self._advance(answers, logits)
        return self.running + self.waiting

    def _advance(self, answers: Sequence[_Answer], logits: Tensor) -> None:
        """Give every answer its next token, from a row of `logits` each."""
        for answer, token, row in zip(answers, choose(logits, answers), range(len(answers)), strict=True):
            if answer.over:  # cancelled by another's sink
                continue
            top = answer.sampling.logprobs
            self._take(answer, token, None if top is None else token_logprobs(logits[row], token, top))

    def _take(self, answer: _Answer, token: int, logprob: TokenLogprob | None) -> None:
        sampling, text = answer.sampling, ""
        reason: FinishReason | None = None
        if token in self.ends and not sampling.ignore_end:
            reason = "stop"
        else:
            answer.tokens.append(token)
            if logprob is not None:
                answer.logprobs.append(logprob)
            if answer.seen is not None:
                answer.seen[token] = True
            if answer.text is not None:
                text = answer.text.push(token)
            if answer.text is not None and answer.text.stopped:
                reason = "stop"
            elif len(answer.tokens) == sampling.max_new_tokens:
                reason = "length"
        if reason is None:
            if text:
                self._send(answer, text)
            return
        if answer.text is None:
            text = self._whole_text(answer.tokens)
        elif not answer.text.stopped:
            text += answer.text.finish()
            reason = "stop" if answer.text.stopped else reason
        state = self._state(answer) if answer.keep_state else None
        self._leave(answer)
        self._send(answer, text, reason, state)

    def _whole_text(self, tokens: list[int]) -> str:
        return "" if self.tokenizer is None else str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _send(self, answer: _Answer, text: str, reason: FinishReason | None = None, state: State | None = None) -> None:
        fresh = slice(answer.sent, None)
        logprobs = None if answer.sampling.logprobs is None else tuple(answer.logprobs[fresh])
        delta = Delta(answer.index, text, tuple(answer.tokens[fresh]), logprobs, reason, state)
        answer.sent = len(answer.tokens)
        answer.sink(delta)

    def _state(self, answer: _Answer) -> State:
        layers = self.decoder.read(answer.row)
        return State(layers.conv, layers.ssm, (*answer.context, *answer.tokens[: answer.fed]), self.fingerprint)

    def _leave(self, answer: _Answer) -> None:
        """Free the answer's slot; the last one moves into it, so that running slots lie together."""
        answer.over = True
        last = self._running.pop()
        if last is not answer:
            self.decoder.move(last.row, answer.row)
            self._running[answer.row] = last
            last.row = answer.row

    # ------------------------------------------------------------------------------------------------------- prompts

    def _read_prompts(self) -> None:
        """At most `prefill_tokens` tokens of as many prompts as there are slots for."""
        free = self.slots - self.running - sum(prompt.waiting for prompt in self._ready)
        budget = self.prefill_tokens
        parts: list[tuple[_Prompt, int]] = []
        for prompt in self._queue:
            if free <= 0 or budget <= 0:
                break
            # Always cut at the same places, so that a prompt's state does not depend on what was read before it.
            length = min(len(prompt.request.prompt) - prompt.done, self.prefill_tokens)
            if parts and length > budget:
                break
            parts.append((prompt, length))
            free, budget = free - prompt.waiting, budget - length
        for group in [[part] for part in parts] if self.exact else [parts] if parts else []:
            self._read(group)
        while self._queue and self._queue[0].logits is not None:
            self._ready.append(self._queue.popleft())

    def _read(self, parts: list[tuple[_Prompt, int]]) -> None:
        """Read the next `length` tokens of each prompt, in one forward pass without padding."""
        longest = max(length for _, length in parts)
        ids = torch.zeros(len(parts), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, (prompt, length) in enumerate(parts):
            ids[row, :length] = torch.tensor(prompt.request.prompt[prompt.done : prompt.done + length])
            mask[row, :length] = 1
        cache = self._cache([prompt.state for prompt, _ in parts])
        hidden = self.model.backbone(
            ids.to(self.device), attention_mask=mask.to(self.device), cache_params=cache, use_cache=True
        ).last_hidden_state
        for row, (prompt, length) in enumerate(parts):
            layers: Any = cache.layers
            conv = tuple(layer.conv_states[0][row, :, 1:].clone() for layer in layers)
            prompt.state = LayerState(conv, tuple(layer.recurrent_states[0][row].clone() for layer in layers))
            prompt.done += length
            if prompt.done == len(prompt.request.prompt):
                last = hidden[row, length - 1][None].to(self.model.lm_head.weight.dtype)
                prompt.logits = self.model.lm_head(last)[0].to(self.decoder.dtype)

    def _cache(self, states: list[LayerState | None]) -> Any:
        """A transformers cache with a row a state; a text's beginning is a state of zeros."""
        cache = DynamicCache(config=self.model.config)
        known = next((state for state in states if state is not None), None)
        if known is None:
            return cache
        for index, (conv, ssm) in enumerate(zip(known.conv, known.ssm, strict=True)):
            rows = [
                (torch.zeros_like(conv), torch.zeros_like(ssm))
                if state is None
                else (state.conv[index], state.ssm[index])
                for state in states
            ]
            windows, recurrent = (torch.stack(part).to(self.device) for part in zip(*rows, strict=True))
            cache.update_conv_state(torch.nn.functional.pad(windows, (1, 0)), index)
            cache.update_recurrent_state(recurrent, index)
        return cache

    def _fill_slots(self) -> None:
        """Start waiting answers in free slots; each gets its first token from the prompt's logits."""
        while self._ready and self.running < self.slots:
            prompt = self._ready[0]
            answer = self._start(prompt)
            if not prompt.waiting:
                self._ready.popleft()
            assert prompt.logits is not None
            self._advance([answer], prompt.logits[None])

    def _start(self, prompt: _Prompt) -> _Answer:
        request, index = prompt.request, prompt.started
        prompt.started += 1
        sampling = request.sampling
        before = request.state.tokens if request.state is not None else ()
        context = (*before, *request.prompt)
        seen = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(self.decoder.head.outputs, dtype=torch.bool, device=self.device)
            seen[torch.tensor(context, device=self.device)] = True
        text = TextStream(self.tokenizer, sampling.stop) if prompt.stream or sampling.stop else None
        answer = _Answer(
            prompt.ticket, index, sampling, prompt.sink, random.Random(sampling.answer_seed(context, index)), text,
            context, request.keep_state, row=self.running, seen=seen,
        )  # fmt: skip
        assert prompt.state is not None
        self.decoder.load(answer.row, prompt.state)
        self._running.append(answer)
        return answer


def end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the template's end of turn, the tokenizer's and the model's ends of sequence."""
    ends: set[int] = set()
    for source in (getattr(model, "generation_config", None), model.config, tokenizer):
        given = getattr(source, "eos_token_id", None)
        ends.update([] if given is None else [given] if isinstance(given, int) else given)
    if tokenizer is not None and tokenizer.chat_template:
        with contextlib.suppress(UserError):  # a template without marks says no more than the tokenizer
            ends.add(end_of_turn_id(tokenizer))
    return frozenset(ends)


def _joined(deltas: list[Delta]) -> Completion:
    last = deltas[-1]
    assert last.finish_reason is not None
    logprobs = None
    if last.logprobs is not None:
        logprobs = tuple(item for delta in deltas for item in delta.logprobs or ())
    return Completion(
        "".join(delta.text for delta in deltas), tuple(token for delta in deltas for token in delta.tokens),
        last.finish_reason, logprobs, last.state,
    )  # fmt: skip
