"""The engine's thread: requests come in from an event loop, deltas go back to it.

The engine is used from this thread alone. What it says is put into the `Call` it belongs to, merged with what the
reader has not fetched yet; so a slow reader costs the others nothing, and memory only up to its own answers' text.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from mambalign.generation.requests import Delta, Request

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """What is needed of an engine."""

    def add(self, request: Request, sink: Callable[[Delta], None]) -> Any: ...

    def cancel(self, ticket: Any) -> None: ...

    def step(self) -> int: ...


class Busy(Exception):
    """No place in the queue; `retry_after` seconds from now there may be one."""

    def __init__(self, retry_after: int):
        super().__init__(retry_after)
        self.retry_after = retry_after


class EngineDied(Exception):
    """The engine raised an error in the middle of its work, so nothing it holds can be trusted any more."""


class Stopping(Exception):
    """The server is being stopped."""


@dataclass
class Times:
    """time.monotonic() of what happened to a call; 0 is not yet."""

    submitted: float = 0.0
    first: float = 0.0


class Call:
    """The answers to one HTTP request: `requests` in their order, each with its n answers.

    Made and read in an event loop, filled by the engine's thread. Deltas are numbered through all requests: answer i of
    request r, each with n answers, is r * n + i.
    """

    def __init__(self, requests: Sequence[Request]):
        self.requests = list(requests)
        self.answers = sum(request.sampling.n for request in requests)
        self.unfinished = self.answers
        self.cached_tokens = 0
        self.times = Times()
        self.cancelled = False
        self._loop = asyncio.get_running_loop()
        self._ready = asyncio.Event()
        self._lock = threading.Lock()
        self._pending: dict[int, Delta] = {}
        self._error: Exception | None = None

    def put(self, delta: Delta) -> None:
        with self._lock:
            before = self._pending.get(delta.index)
            self._pending[delta.index] = delta if before is None else joined([before, delta])

    def fail(self, error: Exception) -> None:
        with self._lock:
            self._error = self._error or error

    def wake(self) -> None:
        """Tell the reader that there is something."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._ready.set)

    async def read(self, patience: float) -> list[Delta]:
        """What has come since the last call, at most one delta an answer; nothing after `patience` seconds.

        Raises:
            Exception: what the call failed with, once all that came before it is read.
        """
        try:
            async with asyncio.timeout(patience):
                await self._ready.wait()
        except TimeoutError:
            return []
        with self._lock:
            self._ready.clear()
            deltas, self._pending = list(self._pending.values()), {}
            if self._error is not None:
                if not deltas:
                    raise self._error
                self._ready.set()
        return deltas


def joined(deltas: Sequence[Delta]) -> Delta:
    """Deltas of one answer, in their order, as one."""
    told = any(delta.logprobs is not None for delta in deltas)
    return replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        tokens=tuple(token for delta in deltas for token in delta.tokens),
        logprobs=tuple(one for delta in deltas for one in delta.logprobs or ()) if told else None,
    )


class StateCache:
    """States behind answers, by the tokens they cover; the least recently used goes first.

    Only a state whose tokens are the beginning of a prompt, and not all of it, is given out for it, so an answer is the
    one that reading the whole prompt gives. Used by one thread.
    """

    def __init__(self, entries: int):
        self.entries = entries
        self._states: OrderedDict[tuple[int, ...], Any] = OrderedDict()

    def __len__(self) -> int:
        return len(self._states)

    def put(self, state: Any) -> None:
        self._states[state.tokens] = state
        self._states.move_to_end(state.tokens)
        while len(self._states) > self.entries:
            self._states.popitem(last=False)

    def find(self, prompt: tuple[int, ...]) -> tuple[int, Any]:
        """How many of the prompt's tokens are covered, and by which state; 0 and None."""
        fits = [key for key in self._states if len(key) < len(prompt) and prompt[: len(key)] == key]
        if not fits:
            return 0, None
        best = max(fits, key=len)
        self._states.move_to_end(best)
        return len(best), self._states[best]


@dataclass
class _Work:
    """One request of a call."""

    call: Call
    request: Request
    first: int  # the call's number of its answer 0
    unfinished: int
    ticket: Any = None
    last: dict[int, float] = field(default_factory=dict)  # when an answer's last token came


class Counters(Protocol):
    """What is told what happens; called by the engine's thread. Seconds are of wall-clock time."""

    def prompt(self, read: int, cached: int) -> None: ...

    def generated(self, count: int) -> None: ...

    def first_token(self, seconds: float) -> None: ...

    def token(self, seconds: float) -> None: ...


class Worker:
    """Runs an engine in a thread of its own.

    Args:
        slots: answers that are generated at a time.
        queue: answers that may wait beyond those.
        cached_states: states of earlier answers to keep (0: none).
    """

    def __init__(self, engine: Engine, *, slots: int, queue: int, cached_states: int, counters: Counters):
        self.engine, self.slots, self.queue = engine, slots, queue
        self.states = StateCache(cached_states)
        self.counters = counters
        self.active = 0  # answers in the engine
        self.waiting = 0  # answers in the queue
        self.error: Exception | None = None
        self._queue: deque[_Work] = deque()
        self._running: list[_Work] = []
        self._dropped: list[Call] = []
        self._woken: set[Call] = set()
        self._change = threading.Condition()
        self._stopped = False
        self._mean_seconds = 1.0  # a request takes; for Retry-After
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # ------------------------------------------------------------------------------------- called by the event loop

    def start(self) -> None:
        self._thread.start()

    def stop(self, patience: float = 10.0) -> None:
        """End the thread once its current step is done; calls that are not answered fail with `Stopping`."""
        with self._change:
            self._stopped = True
            self._change.notify()
        if self._thread.ident is not None:
            self._thread.join(patience)

    def submit(self, call: Call) -> None:
        """Take a call in whole, or not at all.

        Raises:
            Busy: there is no place for all of its answers.
            EngineDied, Stopping: there never will be.
        """
        assert all(request.sampling.n <= self.slots for request in call.requests)
        with self._change:
            if self.error is not None:
                raise self.error
            if self._stopped:
                raise Stopping("the server is stopping")
            if self.active + self.waiting + call.answers > self.slots + self.queue:
                raise Busy(self._retry_after())
            first = 0
            for request in call.requests:
                self._queue.append(_Work(call, request, first, request.sampling.n))
                first += request.sampling.n
            self.waiting += call.answers
            call.times.submitted = time.monotonic()
            self._change.notify()

    def cancel(self, call: Call) -> None:
        """Nobody wants it any more: free its places. Does nothing to a finished call."""
        with self._change:
            if call.cancelled or not call.unfinished:
                return
            call.cancelled = True
            kept = deque(work for work in self._queue if work.call is not call)
            self.waiting -= sum(work.unfinished for work in self._queue if work.call is call)
            self._queue = kept
            self._dropped.append(call)
            self._change.notify()

    @property
    def idle(self) -> bool:
        return not self.active and not self.waiting

    def _retry_after(self) -> int:
        """Seconds until the queue has moved on by one, as far as the past tells."""
        return min(60, max(1, math.ceil(self._mean_seconds * max(1, self.waiting) / self.slots)))

    # ------------------------------------------------------------------------------------- the engine's thread

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            self._fail_all(Stopping("the server was stopped before the answer was complete"))
        except Exception as error:
            logger.exception("the engine failed; this server answers nothing any more")
            self._fail_all(EngineDied(f"the engine failed ({type(error).__name__}: {error}); restart the server"))

    def _turn(self) -> bool:
        """Drop, begin, step once, tell the readers. False when the thread is to end."""
        with self._change:
            self._change.wait_for(lambda: self._stopped or self._dropped or self._running or self._queue)
            if self._stopped:
                return False
            dropped, self._dropped = self._dropped, []
            begun = self._next_in_line()
        for call in dropped:
            self._drop(call)
        for work in begun:
            self._begin(work)
        if self._running:
            self.engine.step()
        self._wake_readers()
        return True

    def _next_in_line(self) -> list[_Work]:
        begun = []
        while self._queue and self.active + self._queue[0].unfinished <= self.slots:
            work = self._queue.popleft()
            self.waiting -= work.unfinished
            self.active += work.unfinished
            begun.append(work)
        return begun

    def _begin(self, work: _Work) -> None:
        if work.call.cancelled:
            self._free(work.unfinished)
            return
        request = work.request
        covered, state = self.states.find(request.prompt)
        if state is not None:
            request = replace(request, prompt=request.prompt[covered:], state=state)
        request = replace(request, keep_state=bool(self.states.entries) and request.sampling.n == 1)
        try:
            work.ticket = self.engine.add(request, lambda delta: self._take(work, delta))
        except Exception as error:  # of this request alone: the engine has not begun it
            logger.exception("a request could not be begun")
            self._free(work.unfinished)
            self._fail(work.call, error)
            return
        self._running.append(work)
        work.call.cached_tokens += covered
        self.counters.prompt(len(request.prompt), covered)

    def _take(self, work: _Work, delta: Delta) -> None:
        """The sink: called by the engine during a step."""
        call, now = work.call, time.monotonic()
        if call.cancelled:
            return
        if delta.tokens:
            self.counters.generated(len(delta.tokens))
            if not call.times.first:
                call.times.first = now
                self.counters.first_token(now - call.times.submitted)
            if delta.index in work.last:
                self.counters.token((now - work.last[delta.index]) / len(delta.tokens))
            work.last[delta.index] = now
        if delta.state is not None:
            self.states.put(delta.state)
        call.put(replace(delta, index=work.first + delta.index, state=None))
        self._woken.add(call)
        if delta.finish_reason is not None:
            self._finished_one(work, now)

    def _finished_one(self, work: _Work, now: float) -> None:
        work.unfinished -= 1
        self._free(1, work.call)
        if not work.unfinished:
            self._running.remove(work)
            self._mean_seconds += 0.1 * (now - work.call.times.submitted - self._mean_seconds)

    def _free(self, answers: int, call: Call | None = None) -> None:
        with self._change:
            self.active -= answers
            if call is not None:
                call.unfinished -= answers

    def _drop(self, call: Call) -> None:
        for work in [work for work in self._running if work.call is call]:
            self.engine.cancel(work.ticket)
            self._running.remove(work)
            self._free(work.unfinished)

    def _fail(self, call: Call, error: Exception) -> None:
        call.fail(error)
        self.cancel(call)
        self._woken.add(call)

    def _wake_readers(self) -> None:
        woken, self._woken = self._woken, set()
        for call in woken:
            call.wake()

    def _fail_all(self, error: Exception) -> None:
        with self._change:
            self.error = error
            calls = {work.call for work in [*self._running, *self._queue]}
            self._running, self._queue = [], deque()
            self.active = self.waiting = 0
        for call in calls:
            call.fail(error)
            self._woken.add(call)
        self._wake_readers()
