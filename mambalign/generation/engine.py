"""Answers from a model, many at once.

A prompt is read by the model's own forward pass, at most `prefill_tokens` tokens between two steps of the answers that
are running, and the first token of each of its answers is chosen at once. Its state, which has one size whatever it
read, is copied into a *slot* for each answer that goes on. All slots step together (`stepper.py`), and a slot that is
done takes the next answer. Time per token does not depend on how much was read before.

**What is guaranteed** of an engine with given weights, `slots` and `prefill_tokens`, on one machine with one number of
threads: with `exact` (the default) the tokens and log-probabilities of an answer, greedy or drawn, depend on its
request and its number alone, to the last bit, not on what else is in the batch, the order, or the moment it comes. Rows
of a step have the same bits in any batch (measured at the start, see `stepper.py`), and prompts are read one at a time,
cut at multiples of `prefill_tokens`. On a GPU, Mamba-1's and Falcon-Mamba's short prompts are read together instead, in
passes of always the same number of tokens: there the guarantee rests on products of one shape that treat every row
alike, wherever it lies and whatever the others hold. With `exact=False` prompts are read many at a time, laid end to
end without padding, and products have as many rows as there are answers: faster for many short prompts and small
batches, equal up to rounding, which can turn a near tie between two tokens. Another number of slots is another
rounding, too.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mambalign.data.chat import end_of_turn_id
from mambalign.generation import fused, native
from mambalign.generation.decode import Decoder
from mambalign.generation.requests import Completion, Delta, FinishReason, Request, Sampling, TokenLogprob
from mambalign.generation.sampling import Choice, choose, token_logprobs
from mambalign.generation.scoring import best_device
from mambalign.generation.state import Cache, LayerState, State, fingerprint
from mambalign.generation.stepper import Stepper
from mambalign.generation.text import TextStream
from mambalign.models.checkpoint import load_model, load_tokenizer
from mambalign.ops.backends import send
from mambalign.ops.native import Unavailable
from mambalign.recipe import UserError

logger = logging.getLogger("mambalign")

Sink = Callable[[Delta], None]

# With `exact`, prompts are read together on a GPU in passes of always `bin_of(model)` tokens, padded with others that
# no one reads: products of one shape. Parts longer than SHORT go alone, since the scan may cut them by what is beside.
SHORT = 256
BINS = 1024, 4096  # at least, at most
WORK = 2**39  # parameters times tokens: less, and a pass takes as long as the host needs to start it
HEADS = 64  # rows of a product with the head, then
READ_AHEAD = 4  # answers to each slot, at most, that wait for one with a state of their own

NO_RANDOM = random.Random(0)  # of greedy answers, which draw nothing: seeding one each takes longer than a step's share


def bin_of(model: Any) -> int:
    """Tokens of a pass, a power of two: many of a small model, whose answers wait for the host meanwhile."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return min(max(BINS[0], 2 ** int(math.log2(max(WORK // parameters, 1)))), BINS[1])


def make_decoder(model: Any, capacity: int, *, exact: bool = True, step: str = "auto") -> Stepper:
    """The fastest decoder that `model` can have where it is.

    Raises:
        UserError: step "native" where it cannot be.
    """
    reason = fused.unavailable(model)
    if reason is None:
        return fused.FusedDecoder(model, capacity, exact=exact, step=step)
    if model.backbone.embeddings.weight.device.type == "cuda":
        logger.info("generation: plain PyTorch's kernels, since the fused step %s", reason)
    elif step in ("auto", "native"):
        reason = native.unavailable(model)
        try:
            if reason is None:
                return native.NativeDecoder(model, capacity)
        except Unavailable as error:
            reason = f"is not compiled: {error}"
        if step == "native":
            raise UserError(f"step: the native step {reason}; choose auto")
        logger.info("generation: plain PyTorch's calls, since the native step %s", reason)
    return Decoder(model, capacity, exact=exact, step=step)


@dataclass(eq=False)
class _Prompt:
    """A request being read: `state` is behind `done` of its tokens. `answers` are made when all are read."""

    ticket: int
    request: Request
    sink: Sink
    stream: bool
    state: LayerState | None
    done: int = 0
    answers: list[_Answer] = field(default_factory=list)


@dataclass(eq=False)
class _Answer:
    """An answer: it waits with its first token and the state `start` for a slot, is in slot `row`, or needs none (row
    -1). `asked` of its tokens are chosen, on the device at least, and all but one of them are in the slot's state;
    `heard` are known here, its end among them."""

    ticket: int
    index: int
    sampling: Sampling
    sink: Sink
    random: random.Random
    text: TextStream | None
    context: tuple[int, ...]  # what the state covered at its start
    keep_state: bool
    start: LayerState | None
    seen: Tensor | None = None
    first: Tensor | None = None  # on the device
    row: int = -1
    tokens: list[int] = field(default_factory=list)
    asked: int = 0
    heard: int = 0
    sent: int = 0
    logprobs: list[TokenLogprob] = field(default_factory=list)
    over: bool = False


@dataclass(eq=False)
class _Chosen:
    """The next tokens of `answers`, perhaps still on their way from the device. logits: a row each. `given` of them are
    handed out: all, unless a sink raised."""

    answers: list[_Answer]
    choice: Choice
    logits: Tensor
    given: int = 0


class Engine:
    """Generates from a Mamba-1, Falcon-Mamba or Mamba-2 (see the head of this module for what is guaranteed).

    Args:
        model: a language model of `mambalign.models`; adapters on it count. Its weights must not change afterwards.
        tokenizer: its tokenizer, or None: then there is no text, and no stop strings.
        slots: answers that run at once; None: 8 on a CPU, 64 on a GPU.
        prefill_tokens: prompt tokens read between two steps; None: 512 on a CPU, 8192 on a GPU.
        exact: answers do not depend on the batch.
        step: "auto", "eager", "graph" or "native" (see `stepper.select_step`).

    `generate` answers a list. A server calls instead, all from ONE thread (nothing here is locked):

    - `add(request, sink)` at any time; it returns a ticket at once. `sink(delta)` is called within later `step()`s, in
      the order of an answer's tokens; the last delta of each of the n answers has a `finish_reason`. A sink may call
      `add` and `cancel`; what it raises comes out of `step`, and costs no one else a token.
    - `step()` while there is work: it reads up to `prefill_tokens` of waiting prompts, whose answers get their first
      tokens, slot or not, and takes every answer in a slot one token further. On a GPU sinks hear of a token in the
      next `step()`, when the device is busy with the one after it, unless an answer wants log-probabilities. It returns
      how many answers are running or waiting; at 0 there is nothing to do.
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
        self.decoder = make_decoder(model, capacity, exact=exact, step=step)
        self.ends = end_ids(model, tokenizer)
        # A GPU gets its next step before the last one's tokens are looked at: it never waits for the host.
        self.ahead = not on_cpu
        # Tokens of a pass that is filled up on a GPU; always as many, where that is what answers to the last bit takes.
        self._pass = min(bin_of(model), self.prefill_tokens)
        self._bin = self._pass if exact and isinstance(self.decoder, fused.FusedDecoder) else 0
        self.waiting = 0  # answers that have no slot yet
        self._queue: deque[_Prompt] = deque()  # being read
        self._ready: deque[_Answer] = deque()  # waiting for a slot
        self._running: list[_Answer | None] = []  # by row
        self._holes: list[int] = []  # rows of None in it
        self._leaving: set[_Answer] = set()  # they need no slot any more, but their last token is not handed out yet
        self._chosen: deque[_Chosen] = deque()  # not handed out yet
        self._late = 0  # so many of them may stay so until the next step has begun
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
        return len(self._running) - len(self._holes)

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
        finished = 0

        def collect(answers: list[list[Delta]]) -> Sink:
            def sink(delta: Delta) -> None:
                nonlocal finished
                answers[delta.index].append(delta)
                if delta.finish_reason:
                    finished += 1
                    if progress is not None:
                        progress(1)

            return sink

        try:
            for request in requests:
                answers: list[list[Delta]] = [[] for _ in range(request.sampling.n)]
                found.append(answers)
                tickets.append(self._add(request, collect(answers), stream=False))
            count = sum(map(len, found))
            while finished < count and self.step():
                pass
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
        if min(request.prompt) < 0 or max(request.prompt) >= rows:
            wrong = next(token for token in request.prompt if not 0 <= token < rows)
            raise UserError(f"prompt: token {wrong} is none of the model's {rows}; is this another model's tokenizer?")
        if self.tokenizer is None and request.sampling.stop:
            raise UserError("stop: strings need a tokenizer, and this engine has none")
        if request.state is not None:
            request.state.check(self.fingerprint)
        prompt = _Prompt(next(self._tickets), request, sink, stream, request.state)
        self._queue.append(prompt)
        self.waiting += request.sampling.n
        return prompt.ticket

    def cancel(self, ticket: int) -> None:
        """Drop what is left of a request; nothing happens where it is finished or unknown."""
        for prompt in self._queue:
            if prompt.ticket == ticket:
                self.waiting -= prompt.request.sampling.n
                for answer in prompt.answers:  # there where reading another prompt failed
                    answer.over = True
        self._queue = deque(prompt for prompt in self._queue if prompt.ticket != ticket)
        held = (*self._running, *self._ready, *self._leaving)
        for answer in [answer for answer in held if answer is not None and answer.ticket == ticket]:
            self._leave(answer)

    # --------------------------------------------------------------------------------------------------------- steps

    @torch.inference_mode()
    def step(self) -> int:
        """Read some of the waiting prompts, then take every running answer one token further (see the class).

        Raises:
            UserError: the model gives logits that are no numbers.
        """
        self._hand_out_but(self._late)  # a sink raised: the others get theirs
        self._read_prompts()
        self._fill_slots()
        self._late = 0
        if self._running:
            answers = [answer for answer in self._running if answer is not None]
            logits = self.decoder.step(len(answers))
            self._late = int(self._choose(answers, logits))
        self._hand_out_but(self._late)
        return self.running + self.waiting + len(self._leaving)

    def _choose(self, answers: list[_Answer], logits: Tensor, first: bool = False) -> bool:
        """Give answers their next tokens, from a row of `logits` each, on the device; all that run, or `first` tokens.

        Returns whether the next step may begin before the tokens are handed out. What it computes for an answer that
        turns out to have ended is lost, and its slot is given away with it.
        """
        choice = choose(logits, answers)
        if first:
            for answer, token in zip(answers, choice.tokens.unbind(), strict=True):
                answer.first = token
        else:
            self.decoder.tokens[: len(answers)].copy_(choice.tokens)
        self._chosen.append(_Chosen(answers, choice, logits))
        remembers = self.decoder.remembered > 1
        ahead = self.ahead
        for answer in answers:
            answer.asked += 1
            if answer.sampling.logprobs is not None or (answer.keep_state and not remembers):
                ahead = False
        if ahead and not first:
            for answer in answers:
                if answer.asked == answer.sampling.max_new_tokens and not answer.keep_state:
                    self._vacate(answer)
                    self._leaving.add(answer)
        return ahead

    def _hand_out_but(self, left: int) -> None:
        while len(self._chosen) > left:
            self._hand_out()

    def _hand_out(self) -> None:
        """The oldest of what is chosen; where a sink raises, the rest of it is handed out in the next step."""
        chosen = self._chosen[0]
        tokens = chosen.choice.read()
        if min(tokens) < 0 and any(t < 0 and not a.over for a, t in zip(chosen.answers, tokens, strict=True)):
            self._chosen.popleft()
            raise UserError("the model gives logits that are no numbers; its weights are damaged or overflow")
        while chosen.given < len(tokens):
            row = chosen.given
            chosen.given += 1
            answer, token = chosen.answers[row], tokens[row]
            if answer.over:  # cancelled, or ended by a token that was not known yet when this one was computed
                continue
            answer.heard += 1
            top = answer.sampling.logprobs
            self._take(answer, token, None if top is None else token_logprobs(chosen.logits[row], token, top))
        self._chosen.popleft()

    def _take(self, answer: _Answer, token: int, logprob: TokenLogprob | None) -> None:
        sampling, text = answer.sampling, ""
        reason: FinishReason | None = None
        if token in self.ends and not sampling.ignore_end:
            reason = "stop"
        else:
            answer.tokens.append(token)
            if logprob is not None:
                answer.logprobs.append(logprob)
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
        """Before a step that was begun already, whose token the answer does not need."""
        if answer.start is not None:  # it never had a slot
            conv = answer.start.conv.to(self.decoder.embedding.dtype, copy=True).contiguous()
            layers = LayerState(conv, answer.start.ssm.to(self.decoder.dtype, copy=True).contiguous())
        else:
            layers = self.decoder.read(answer.row, answer.asked - answer.heard)
        tokens = (*answer.context, *answer.tokens[: answer.heard - 1])
        return State(layers.conv, layers.ssm, tokens, self.fingerprint)

    def _leave(self, answer: _Answer) -> None:
        answer.over = True
        if answer.row >= 0:
            self._vacate(answer)
        elif answer in self._leaving:
            self._leaving.remove(answer)
        else:
            self._ready.remove(answer)
            self.waiting -= 1

    def _vacate(self, answer: _Answer) -> None:
        """Free the answer's slot; `_fill_slots` sees to it that running ones lie together."""
        self._running[answer.row] = None
        self._holes.append(answer.row)
        answer.row = -1

    # ------------------------------------------------------------------------------------------------------- prompts

    def _read_prompts(self) -> None:
        """At most `prefill_tokens` tokens of as many prompts as there are slots for; on a GPU a pass is filled up.

        A pass of a few short prompts costs there what one of many does, and slots come free one at a time.
        """
        free = self.slots - self.running - len(self._ready)
        size = self._bin or (self._pass if self.ahead and not self.exact else 0)
        budget, short = self.prefill_tokens, 0
        parts: list[tuple[_Prompt, int]] = []
        for prompt in self._queue:
            # Always cut at the same places, so that a prompt's state does not depend on what was read before it.
            length = min(len(prompt.request.prompt) - prompt.done, self.prefill_tokens)
            if free <= 0 and (not size or length > min(SHORT, -short % size) or free <= -READ_AHEAD * self.slots):
                break
            if budget <= 0 or (parts and length > budget):
                break
            parts.append((prompt, length))
            free, budget = free - prompt.request.sampling.n, budget - length
            short += length if length <= SHORT else 0
        groups = self._apart(parts) if self.exact else [parts] if parts else []
        ahead = all([self._read(group) for group in groups])
        while self._queue and self._queue[0].answers:
            for answer in self._queue.popleft().answers:
                if answer.sampling.max_new_tokens > 1:
                    self._ready.append(answer)
                else:
                    self._leaving.add(answer)
                    self.waiting -= 1
        if not ahead:
            self._late = 0
            self._hand_out_but(0)

    def _apart(self, parts: list[tuple[_Prompt, int]]) -> list[list[tuple[_Prompt, int]]]:
        """One a pass; or short ones in passes of one size (see SHORT)."""
        groups: list[list[tuple[_Prompt, int]]] = []
        group: list[tuple[_Prompt, int]] = []
        room = 0
        for part in parts:
            if not self._bin or part[1] > SHORT:
                groups.append([part])
                continue
            if part[1] > room:
                group, room = [], self._bin
                groups.append(group)
            group.append(part)
            room -= part[1]
        return groups

    def _read(self, parts: list[tuple[_Prompt, int]]) -> bool:
        """Read the next `length` tokens of each prompt, in one forward pass without padding, and begin the answers of
        those that end. Returns whether a step may begin before these are heard of."""
        lengths = [length for _, length in parts]
        filled = bool(self._bin) and max(lengths) <= SHORT
        missing = self._bin - sum(lengths) if filled else 0
        lengths += [min(SHORT, missing - at) for at in range(0, missing, SHORT)]
        longest = max(lengths)
        rows = [(*p.request.prompt[p.done : p.done + n], *[0] * (longest - n)) for p, n in parts]
        rows += [(0,) * longest] * (len(lengths) - len(parts))
        mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
        states = [*(prompt.state for prompt, _ in parts), *[None] * (len(lengths) - len(parts))]
        cache = Cache(len(self.model.backbone.layers), states, self.device)
        hidden = self.model.backbone(
            send(torch.tensor(rows), self.device), attention_mask=send(mask, self.device), cache_params=cache,
            use_cache=True,
        ).last_hidden_state  # fmt: skip
        done: list[_Prompt] = []
        last: list[int] = []  # their last tokens, in rows laid end to end
        for row, (prompt, length) in enumerate(parts):
            prompt.state = cache.state(row)
            prompt.done += length
            if prompt.done == len(prompt.request.prompt):
                done.append(prompt)
                last.append(row * longest + length - 1)
        ahead = True
        if done:
            last += [0] * (-len(last) % HEADS) if filled else []
            chosen = hidden.flatten(0, 1).index_select(0, send(torch.tensor(last), self.device))
            head = self.model.lm_head
            for at, part in enumerate(chosen.to(head.weight.dtype).split(HEADS if filled else len(last))):
                prompts = done[at * HEADS :][: len(part)]
                ahead &= self._begin(prompts, head(part).to(self.decoder.dtype)[: len(prompts)])
        return ahead

    def _begin(self, prompts: list[_Prompt], logits: Tensor) -> bool:
        """Make the answers to `prompts` and choose their first tokens, from the prompt's row of `logits`."""
        for prompt in prompts:
            prompt.answers = [self._answer(prompt, index) for index in range(prompt.request.sampling.n)]
        answers = [(row, answer) for row, prompt in enumerate(prompts) for answer in prompt.answers]
        ahead = True
        most = max(self.slots, HEADS)  # many answers to one prompt take no more memory than a step
        for at in range(0, len(answers), most):
            rows, part = zip(*answers[at : at + most], strict=True)
            alike = rows == tuple(range(len(logits)))
            own = logits if alike else logits.index_select(0, send(torch.tensor(rows), self.device))
            ahead &= self._choose(list(part), own, first=True)
        return ahead

    def _answer(self, prompt: _Prompt, index: int) -> _Answer:
        request, sampling = prompt.request, prompt.request.sampling
        before = request.state.tokens if request.state is not None else ()
        context = (*before, *request.prompt)
        seen = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(self.decoder.logits.shape[1], dtype=torch.bool, device=self.device)
            seen.index_fill_(0, send(torch.tensor(context), self.device), True)
        drawn = random.Random(sampling.answer_seed(context, index)) if sampling.temperature > 0 else NO_RANDOM
        text = TextStream(self.tokenizer, sampling.stop) if prompt.stream or sampling.stop else None
        return _Answer(
            prompt.ticket, index, sampling, prompt.sink, drawn, text, context, request.keep_state, prompt.state, seen
        )

    def _fill_slots(self) -> None:
        """Put waiting answers into free slots, holes first; then close the holes that no one took."""
        while self._ready and self.running < self.slots:
            answer = self._ready.popleft()
            self.waiting -= 1
            if self._holes:
                answer.row = self._holes.pop()
                self._running[answer.row] = answer
            else:
                answer.row = len(self._running)
                self._running.append(answer)
            assert answer.start is not None and answer.first is not None
            self.decoder.load(answer.row, answer.start)
            self.decoder.tokens[answer.row].copy_(answer.first)
            answer.start = answer.first = None
        for hole in sorted(self._holes):
            while self._running and self._running[-1] is None:
                self._running.pop()
            if hole < len(self._running):
                last = self._running.pop()
                assert last is not None
                self.decoder.move(last.row, hole)
                self._running[hole], last.row = last, hole
        self._holes.clear()


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
