"""Stopping in time: signals and a bound on the run's time become a checkpoint and exit code 85.

Schedulers take machines back with a signal and some grace (SIGTERM from Slurm, HTCondor and Kubernetes; SIGUSR1 or
SIGUSR2 where a job asks to be warned), and short jobs fit into holes that long ones wait for. So a run looks at every
safe point whether it should stop: at the end of a step, between the batches of an evaluation, between the parts of the
reference pass. All processes decide together. 85 is an exit code that schedulers can be told to run again after; the
same command then goes on where this one stopped.
"""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.util
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import PartialState

logger = logging.getLogger("mambalign")

EXIT_CODE = 85
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
UNKNOWN_SAVE = 60.0  # seconds to leave for a save before one has been timed
ELSEWHERE = "the stop of another process"


class Preempted(SystemExit):
    """The run stopped in good order and wants to be started again; as an exit of the process, code 85."""

    def __init__(self, why: str):
        super().__init__(EXIT_CODE)
        self.why = why

    def __str__(self) -> str:
        return self.why


class Preemption:
    """Whether to stop, and whether the time has come for a save.

    Args:
        max_runtime: seconds after which the run should have stopped; None for no bound. They count from here, and what
            a step and a save were seen to take is left before them.
        save_seconds: seconds of work that may be lost; None leaves saving to `save_steps`.
    """

    def __init__(self, max_runtime: float | None = None, save_seconds: float | None = None):
        self.max_runtime, self.save_seconds = max_runtime, save_seconds
        self._started = self._step_ended = time.monotonic()
        self._work_since = self._started  # when the first step since the last save began
        self._longest_step = 0.0
        self._save_took = UNKNOWN_SAVE if max_runtime is None else min(UNKNOWN_SAVE, max_runtime / 10)
        self._signal: signal.Signals | None = None
        self._agreed: str | None = None

    @contextmanager
    def listening(self) -> Iterator[Preemption]:
        """Signals are noted, and act at the next safe point, while the context is open."""
        if threading.current_thread() is not threading.main_thread():
            logger.warning("not in the main thread: signals will not stop this run with a checkpoint")
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        self._listener = os.getpid()
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._listener:  # a forked helper: it dies of it as it would without us
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._signal = self._signal or signal.Signals(number)

    @property
    def reason(self) -> str | None:
        """Why this process would stop now; once all have agreed to stop, why they do, however long a save takes."""
        if self._agreed is not None:
            return self._agreed
        if self._signal is not None:
            return self._signal.name
        left = self._seconds_left()
        if left is not None and left < 0:
            return f"max_runtime, {self.max_runtime:g} s"
        return None

    def _seconds_left(self) -> float | None:
        if self.max_runtime is None:
            return None
        lead = 1.5 * self._save_took + self._longest_step
        return self._started + self.max_runtime - lead - time.monotonic()

    def check(self, doing: str) -> None:
        """A safe point where nothing has to be saved. Every process must come here.

        Raises:
            Preempted: one of them was asked to stop.
        """
        self._agree()
        if self._agreed is not None:
            raise Preempted(f"{self._agreed} came while {doing}")

    def _agree(self, due: bool = False) -> bool:
        """Whether a save is due to any process; from here on all know whether they stop."""
        mine = self.reason
        stop, save = agree(mine is not None, due)
        if stop:
            self._agreed = mine or ELSEWHERE
        return save

    @contextmanager
    def excusing(self, doing: str) -> Iterator[None]:
        """What fails in here after a signal failed because of it: helper processes got the signal, too.

        The next thing that processes do together must be a `check`: where this one failed, it takes part in theirs.
        """
        try:
            yield
        except Exception as error:
            if self._signal is None:
                raise
            self._agree()
            raise Preempted(f"{self._signal.name} came while {doing}") from error

    # --- what the trainer tells

    def training_begins(self) -> None:
        self._step_ended = self._work_since = time.monotonic()

    def step_ends(self) -> tuple[bool, bool]:
        """(stop, save): what all processes agree to do at the end of this step."""
        now = time.monotonic()
        self._longest_step = max(self._longest_step, now - self._step_ended)
        self._step_ended = now
        due = self.save_seconds is not None and now - self._work_since >= self.save_seconds
        save = self._agree(due)
        return self._agreed is not None, save

    def saved(self, seconds: float) -> None:
        """A save took so long and is over; it is no part of the next step."""
        self._save_took = max(seconds, 0.5 * self._save_took)
        self._work_since = self._step_ended = time.monotonic()


def agree(*mine: bool) -> list[bool]:
    """Position by position, whether any process says so; every process must ask."""
    processes = PartialState()
    if processes.num_processes == 1:
        return list(mine)
    votes = torch.tensor(mine, dtype=torch.int32, device=processes.device)
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MAX)
    return [bool(vote) for vote in votes.tolist()]


@contextmanager
def signals_held() -> Iterator[None]:
    """They come when the context closes. Workers born inside hold them until `DeafWorker` is ready."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def held_while_reading(loader: Iterable[Any]) -> Iterator[Any]:
    """`loader`, with `signals_held` while it reads (and, before the first item, starts its workers)."""
    items, end = iter(loader), object()
    while True:
        with signals_held():
            item = next(items, end)
        if item is end:
            return
        yield item


class DeafWorker:
    """A DataLoader's `worker_init_fn`: its worker outlives signals to the whole job, such as Slurm sends, because the
    step that is to finish needs its rows. What the parent sends at its own end still ends it.

    Args:
        start: the `worker_init_fn` that it takes the place of.
    """

    def __init__(self, start: Callable[[int], None] | None):
        self.start = start
        self._parent_ends = parent_ends = multiprocessing.RawValue("b", 0)  # without a lock: a handler reads it
        # Before multiprocessing ends what is left of its children.
        multiprocessing.util.Finalize(self, setattr, (parent_ends, "value", 1), exitpriority=100)

    def __call__(self, worker: int) -> None:
        for number in SIGNALS:
            signal.signal(number, self._hear)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        if self.start is not None:
            self.start(worker)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._parent_ends.value:
            os._exit(0)
