"""Answers from a model, many at once.

A prompt is read by the model's own forward pass, at most `prefill_tokens` tokens between two steps of the answers that
are running; its state, which has one size whatever it read, is copied into a *slot* for each of its answers. All slots
step together (`stepper.py`), and a slot that is done takes the next answer. Time per token does not depend on how much
was read before.

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

# With `exact`, prompts are read together on a GPU in passes of always BIN tokens, padded with others that no one reads:
# products of one shape. Parts longer than SHORT go alone, since the scan may cut them by what is beside them.
BIN, SHORT = 1024, 256
HEADS = 64  # rows of a product with the head, then


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
    """An answer in slot `row`, -1 once it needs none; `fed` of its tokens are in the slot's state, `asked` are chosen,
    on the device at least, and `heard` are known here, its end among them."""

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
    - `step()` while there is work: it reads up to `prefill_tokens` of waiting prompts and takes every running answer
      one token further. On a GPU sinks hear of a token in the next `step()`, when the device is busy with the one
      after it, unless an answer wants log-probabilities. It returns how many answers are running or waiting; at 0
      there is nothing to do.
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
        self._bin = min(BIN, self.prefill_tokens) if exact and isinstance(self.decoder, fused.FusedDecoder) else 0
        self.waiting = 0  # answers that have no slot yet
        self._queue: deque[_Prompt] = deque()  # being read
        self._ready: deque[_Prompt] = deque()  # read, with answers that wait for a slot
        self._running: list[_Answer] = []  # by row
        self._chosen: deque[_Chosen] = deque()  # not handed out yet
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
        self.waiting += prompt.waiting
        return prompt.ticket

    def cancel(self, ticket: int) -> None:
        """Drop what is left of a request; nothing happens where it is finished or unknown."""
        self.waiting -= sum(p.waiting for p in (*self._queue, *self._ready) if p.ticket == ticket)
        self._queue = deque(prompt for prompt in self._queue if prompt.ticket != ticket)
        self._ready = deque(prompt for prompt in self._ready if prompt.ticket != ticket)
        for answer in [answer for answer in (*self._running, *self._unheard()) if answer.ticket == ticket]:
            self._leave(answer)

    def _holds(self, tickets: set[int]) -> bool:
        held: Iterable[Any] = itertools.chain(self._running, self._unheard(), self._ready, self._queue)
        return any(item.ticket in tickets for item in held)

    def _unheard(self) -> list[_Answer]:
        """Answers that need no slot any more, whose last token is not handed out yet."""
        return [answer for chosen in self._chosen for answer in chosen.answers if answer.row < 0 and not answer.over]

    # --------------------------------------------------------------------------------------------------------- steps

    @torch.inference_mode()
    def step(self) -> int:
        """Read some of the waiting prompts, then take every running answer one token further (see the class).

        Raises:
            UserError: the model gives logits that are no numbers.
        """
        while self._chosen and self._chosen[0].given:  # a sink raised: the others get theirs
            self._hand_out()
        self._read_prompts()
        self._fill_slots()
        left = 0
        if self._running:
            answers = list(self._running)
            logits = self.decoder.step(len(answers))
            for answer in answers:
                answer.fed += 1
            left = int(self._choose(answers, logits))
        while len(self._chosen) > left:
            self._hand_out()
        return self.running + self.waiting + len(self._unheard())

    def _choose(self, answers: list[_Answer], logits: Tensor) -> bool:
        """Give answers in neighbouring rows their next tokens, from a row of `logits` each, on the device.

        Returns whether the next step may begin before the tokens are handed out. What it computes for an answer that
        turns out to have ended is lost, and its slot is given away with it.
        """
        choice, row = choose(logits, answers), answers[0].row
        self.decoder.tokens[row : row + len(answers)].copy_(choice.tokens)
        self._chosen.append(_Chosen(answers, choice, logits))
        remembers = self.decoder.remembered > 1
        ahead = self.ahead and all(a.sampling.logprobs is None and (remembers or not a.keep_state) for a in answers)
        for answer in answers:
            answer.asked += 1
        for answer in answers:
            if ahead and not answer.keep_state and answer.asked == answer.sampling.max_new_tokens:
                self._vacate(answer)
        return ahead

    def _hand_out(self) -> None:
        """The oldest of what is chosen; where a sink raises, the rest of it is handed out in the next step."""
        chosen = self._chosen[0]
        tokens = chosen.choice.read()
        if any(token < 0 and not answer.over for answer, token in zip(chosen.answers, tokens, strict=True)):
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
        back = answer.asked - answer.heard
        layers = self.decoder.read(answer.row, back)
        tokens = (*answer.context, *answer.tokens[: answer.fed - back])
        return State(layers.conv, layers.ssm, tokens, self.fingerprint)

    def _leave(self, answer: _Answer) -> None:
        answer.over = True
        if answer.row >= 0:
            self._vacate(answer)

    def _vacate(self, answer: _Answer) -> None:
        """Free the answer's slot; the last one moves into it, so that running slots lie together."""
        last = self._running.pop()
        if last is not answer:
            self.decoder.move(last.row, answer.row)
            self._running[answer.row] = last
            last.row = answer.row
        answer.row = -1

    # ------------------------------------------------------------------------------------------------------- prompts

    def _read_prompts(self) -> None:
        """At most `prefill_tokens` tokens of as many prompts as there are slots for; on a GPU a pass is filled up.

        A pass of a few short prompts costs there what one of many does, and slots come free one at a time.
        """
        free, together = self.slots - self.running - sum(prompt.waiting for prompt in self._ready), not self.exact
        size = self._bin or (min(BIN, self.prefill_tokens) if self.ahead and together else 0)
        budget, short = self.prefill_tokens, 0
        parts: list[tuple[_Prompt, int]] = []
        for prompt in self._queue:
            # Always cut at the same places, so that a prompt's state does not depend on what was read before it.
            length = min(len(prompt.request.prompt) - prompt.done, self.prefill_tokens)
            if free <= 0 and (not size or length > min(SHORT, -short % size)):
                break
            if budget <= 0 or (parts and length > budget):
                break
            parts.append((prompt, length))
            free, budget = free - prompt.waiting, budget - length
            short += length if length <= SHORT else 0
        if together:
            if parts:
                self._read(parts)
        else:
            for group in self._apart(parts):
                self._read(group)
        while self._queue and self._queue[0].logits is not None:
            self._ready.append(self._queue.popleft())

    def _apart(self, parts: list[tuple[_Prompt, int]]) -> list[list[tuple[_Prompt, int]]]:
        """One a pass; or short ones in passes of one size (see BIN)."""
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

    def _read(self, parts: list[tuple[_Prompt, int]]) -> None:
        """Read the next `length` tokens of each prompt, in one forward pass without padding."""
        lengths = [length for _, length in parts]
        filled = bool(self._bin) and max(lengths) <= SHORT
        missing = self._bin - sum(lengths) if filled else 0
        lengths += [min(SHORT, missing - at) for at in range(0, missing, SHORT)]
        longest = max(lengths)
        ids = torch.zeros(len(lengths), longest, dtype=torch.int64)
        for row, (prompt, length) in enumerate(parts):
            ids[row, :length] = torch.tensor(prompt.request.prompt[prompt.done : prompt.done + length])
        mask = (torch.arange(longest) < torch.tensor(lengths)[:, None]).long()
        states = [*(prompt.state for prompt, _ in parts), *[None] * (len(lengths) - len(parts))]
        cache = Cache(len(self.model.backbone.layers), states, self.device)
        hidden = self.model.backbone(
            send(ids, self.device), attention_mask=send(mask, self.device), cache_params=cache, use_cache=True
        ).last_hidden_state
        done: list[_Prompt] = []
        last: list[int] = []  # their last tokens, in rows laid end to end
        for row, (prompt, length) in enumerate(parts):
            prompt.state = cache.state(row)
            prompt.done += length
            if prompt.done == len(prompt.request.prompt):
                done.append(prompt)
                last.append(row * longest + length - 1)
        if done:
            last += [0] * (-len(last) % HEADS) if filled else []
            chosen = hidden.flatten(0, 1).index_select(0, send(torch.tensor(last), self.device))
            head = self.model.lm_head
            for at, rows in enumerate(chosen.to(head.weight.dtype).split(HEADS if filled else len(last))):
                for prompt, logits in zip(done[at * HEADS :], head(rows).to(self.decoder.dtype), strict=False):
                    prompt.logits = logits

    def _fill_slots(self) -> None:
        """Start waiting answers in free slots; each gets its first token from the prompt's logits."""
        while self._ready and self.running < self.slots:
            answers: list[_Answer] = []
            logits: list[Tensor] = []
            while self._ready and self.running < self.slots:
                prompt = self._ready[0]
                assert prompt.logits is not None
                answers.append(self._start(prompt))
                logits.append(prompt.logits)
                if not prompt.waiting:
                    self._ready.popleft()
            if not self._choose(answers, torch.stack(logits)):
                while self._chosen:
                    self._hand_out()

    def _start(self, prompt: _Prompt) -> _Answer:
        request, index = prompt.request, prompt.started
        prompt.started += 1
        self.waiting -= 1
        sampling = request.sampling
        before = request.state.tokens if request.state is not None else ()
        context = (*before, *request.prompt)
        seen = None
        if sampling.repetition_penalty != 1:
            seen = torch.zeros(self.decoder.logits.shape[1], dtype=torch.bool, device=self.device)
            seen.index_fill_(0, send(torch.tensor(context), self.device), True)
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
