"""What all decoders share: slots that hold a sequence's state each, and how the calls of a step are run.

**Rows do not depend on each other, to the last bit.** The same row can come out differently in a product of 1 row and
in one of 8, since libraries choose another kernel, and near a buffer's end a vector loop hands over to a scalar one. So
the decoder *measures* at the start, on this machine and these weights, with the same row everywhere: `plans` holds, for
each number of rows, how many rows the products must have so that every row has the bits it has in the full batch. What
cannot be had so is run with more rows. `exact=False` leaves that out, and is a little faster for few rows.

A sum in another order differs in the last bit now and then, and rounding to 16 bits hides nearly all of that: a trial
of one row can miss what a thousand steps meet. So several rows are tried, the more the fewer numbers each of them
shows, and not only results are compared but what lies in the step's buffers, before it was rounded.

The measurement rests on one assumption: what a product of given shapes does to a row depends on that row and its place
alone, not on the other rows' numbers.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mambalign.generation.state import LayerState

logger = logging.getLogger("mambalign")

STEPS = ("eager", "graph", "native")

Call = Callable[[], Any]

# Rows that are tried, at least and at most, and the numbers that they show together: a step of a large model shows many
# at once, and on a CPU takes long.
DRAWS = {"cpu": (1, 4, 2**20), "cuda": (8, 64, 2**24)}


class Plan(NamedTuple):
    """rows: that a program works on. width: rows of its matrix products, at least as many."""

    rows: int
    width: int


def select_step(step: str, device: torch.device) -> tuple[str, str]:
    """(name, reason) of how steps run: "graph" replays a CUDA graph, "eager" makes the calls one by one, "native" is
    one call of code compiled for a CPU.

    Raises:
        ValueError: an unknown name, or one that is not for this device.
    """
    if step == "auto":
        if device.type == "cuda":
            return "graph", "a CUDA graph for every number of rows, so that the host does not set the pace"
        return "eager", f"a {device.type} device has no CUDA graphs"
    if step not in STEPS:
        raise ValueError(f"step: {step!r} must be auto, {' or '.join(STEPS)}")
    wanted = {"graph": "cuda", "native": "cpu"}.get(step, device.type)
    if device.type != wanted:
        raise ValueError(f"step: {step!r} needs a {wanted} device, and this is {device.type}; choose auto")
    return step, "asked for by name"


class Stepper:
    """The state of `capacity` sequences, and the step that takes each of them one token further.

    `tokens` int64 `[capacity]` is written before a step, `logits` fp32 (fp64 for fp64 models) `[capacity, V]` read
    after it. The weights are those of the model when this was made. Rows `0 .. count - 1` take part in `step(count)`,
    the others keep their state or are overwritten before they matter: see `load`.

    A subclass has the buffers, and the calls that make up a step (`program`). Nothing in them may depend on the tokens
    or wait for the device, so that a CUDA graph can hold them.
    """

    dtype: torch.dtype  # of logits and states
    embedding: Tensor
    logits: Tensor
    turns = 1  # a step's calls repeat after as many steps
    remembered = 1  # states of a row that can be read: the last one, or also that before the last step

    def __init__(self, device: torch.device, capacity: int, step: str):
        self.device, self.capacity, self.step_kind = device, capacity, select_step(step, device)
        self.tokens = torch.zeros(capacity, dtype=torch.int64, device=device)
        self.phase = 0
        self._programs: dict[tuple[Plan, int, int], Any] = {}
        self._stream = torch.cuda.Stream(device) if self.step_kind[0] == "graph" else None

    def load(self, row: int, state: LayerState) -> None:
        """Put a sequence's state into a row, over everything that was there."""
        raise NotImplementedError

    def read(self, row: int, back: int = 0) -> LayerState:
        """A copy of the state in a row, as it was `back < remembered` steps ago."""
        raise NotImplementedError

    def move(self, source: int, target: int) -> None:
        """Copy a row's state and token."""
        for buffer in (self.tokens, *self.buffers()):
            buffer[target].copy_(buffer[source])

    def buffers(self) -> list[Tensor]:
        """All that a sequence's state consists of, rows first."""
        raise NotImplementedError

    def intermediates(self) -> list[Tensor]:
        """What the program made last leaves in its buffers, rows first: numbers that are the same in any batch, too."""
        return []

    def program(self, plan: Plan, start: int, phase: int) -> list[Call]:
        """The calls that take rows `start ...` one token further, at step `phase` of `turns`."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------- the step

    @torch.inference_mode()
    def step(self, count: int) -> Tensor:
        """Advance rows `0 .. count - 1` by their `tokens`; returns their logits `[count, V]`, valid until the next."""
        for start in range(0, count, self.chunk):
            self.built(self.plan(min(count - start, self.chunk)), start)()
        self.phase = (self.phase + 1) % self.turns
        return self.logits[:count]

    def plan(self, count: int) -> Plan:
        return self.plans[min(rows for rows in self.plans if rows >= count)]

    def built(self, plan: Plan, start: int) -> Call:
        key = plan, start, self.phase
        run: Call | None = self._programs.get(key)
        if run is None:
            graph = self.step_kind[0] == "graph"
            with torch.no_grad():
                calls = self.program(*key)
                run = self._programs[key] = _captured(calls, self._stream) if graph else partial(_call_all, calls)
        return run

    # --------------------------------------------------------------------------- which numbers of rows are the same

    @torch.inference_mode()
    def settle(self, exact: bool) -> None:
        """Choose the `plans`. The buffers must be there, and are zero afterwards."""
        with self._aside():
            self.plans = self._measured() if exact else self._unmeasured()
            self.chunk = max(self.plans)
            for buffer in self.buffers():
                buffer.zero_()

    @contextlib.contextmanager
    def _aside(self) -> Iterator[None]:
        """On the stream on which graphs are captured: what has run there has its workspace, and kernels are loaded."""
        if self._stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            yield
        current.wait_stream(self._stream)

    def _sizes(self) -> list[int]:
        return [*(2**i for i in range(self.capacity.bit_length()) if 2**i < self.capacity), self.capacity]

    def _unmeasured(self) -> dict[int, Plan]:
        if self.step_kind[0] == "eager":
            return {n: Plan(n, n) for n in range(1, self.capacity + 1)}
        plans = {n: Plan(n, n) for n in self._sizes()}
        for plan in reversed(plans.values()):  # the widest first, which makes the largest buffers
            self._trial(plan)
        return plans

    def _measured(self) -> dict[int, Plan]:
        """For a few numbers of rows, the narrowest products that leave the bits of every row as in the full batch.

        Where not even the full batch treats all its rows alike, sequences go in parts, at worst one by one.
        """
        sizes = self._sizes()
        for full in reversed([n for n in sizes if self.capacity % n == 0]):
            expected = self._trials(Plan(full, full))
            if expected is not None:
                break
        else:
            return {1: Plan(1, 1)}
        if full < self.capacity:
            logger.warning("products of %d rows do not treat them alike here: %d at a time", self.capacity, full)
        found = {full: Plan(full, full)}
        for rows in (n for n in sizes if n < full):
            for width in (n for n in sizes if rows <= n < full):
                if self._trials(Plan(rows, width), expected) is not None:
                    found[rows] = Plan(rows, width)
                    break
        return found

    def _trials(self, plan: Plan, expected: list[list[Tensor]] | None = None) -> list[list[Tensor]] | None:
        """Outcomes of several draws; None if rows part in one of them, or it is not what is `expected`."""
        least, most, numbers = DRAWS.get(self.device.type, DRAWS["cpu"])
        shown = sum(x[0].numel() for x in (self.logits, *self.buffers()))
        outcomes: list[list[Tensor]] = []
        for draw in range(min(most, max(least, numbers // shown))):
            outcome = self._trial(plan, draw)
            if outcome is None or (expected and not _same(outcome, expected[draw])):
                return None
            outcomes.append(outcome)
        return outcomes

    def _trial(self, plan: Plan, draw: int = 0) -> list[Tensor] | None:
        """Logits, states and intermediates of one row after a step with the same row everywhere; None if rows part."""
        generator = torch.Generator(self.device).manual_seed(draw)
        for buffer in self.buffers():
            row = torch.randn(buffer.shape[1:], generator=generator, dtype=self.dtype, device=self.device)
            buffer.copy_(row.expand(buffer.shape))
        self.tokens.fill_((1 + draw) % self.embedding.shape[0])
        _call_all(self.program(plan, 0, 0))
        outcome = [x[: plan.rows] for x in (self.logits, *self.buffers(), *self.intermediates())]
        if not _same(outcome, [x[:1] for x in outcome]):
            return None
        return [x[0].clone() for x in outcome]


def _same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Whether all are equal; waits for the device once."""
    return bool(torch.stack([(a == b).all() for a, b in zip(found, expected, strict=True)]).all())


def _call_all(calls: list[Call]) -> None:
    for call in calls:
        call()


def _captured(calls: list[Call], stream: Any) -> Call:
    """The replay of a CUDA graph of `calls`; capturing runs nothing, so no state is touched by it.

    The same calls must have run on `stream` before, whatever their buffers: a library that loads a kernel, or takes its
    workspace, cannot do so within.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        _call_all(calls)
    return partial(_replay, graph, calls)


def _replay(graph: Any, calls: list[Call]) -> None:
    """calls: they own the buffers whose addresses the graph knows, so they must live as long as it."""
    graph.replay()
