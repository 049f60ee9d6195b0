"""State passing: training on documents longer than memory, a chunk of tokens at a time.

What a recurrent model has read is in its state, whose size does not depend on how much that was. So a long document is
cut into chunks that go through the model one after the other, each from the state the one before ended in: per layer
the convolution's window and the scan's state. Two ways to train:

    exact       A first pass without gradients keeps the state at every cut. The second pass takes the chunks from the
                last to the first, computes each again from its state, and goes backwards through its share of the loss
                plus <final state, gradient of the final state>, which the chunk after it has left. Gradients are those
                of the whole document; memory is one chunk's. It is checkpointing (arXiv 1604.06174) along time.
    truncated   One pass; states are handed on, gradients are not (truncated backpropagation through time, Williams and
                Peng 1990). A token teaches nothing about tokens of earlier chunks.

Only documents longer than a chunk are cut, so only they cost a first pass. Cut states wait in host memory: what is on
the device does not depend on the length of a document. An evaluation streams: it is exact, whatever the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mambalign.data.packing import PackedBatch
from mambalign.models.mamba import LayerState
from mambalign.ops.segments import Segments
from mambalign.recipe import Recipe
from mambalign.train.asking import target_output
from mambalign.train.processes import placeholder
from mambalign.train.trainer import PackedTrainer, SequenceObjective


class Boundary:
    """A cut through a document, and what crosses it: states forwards, their gradient backwards.

    Lists of tensors are flat: window and state of the first layer, of the second, ...; each of one row.
    """

    def __init__(self) -> None:
        self.states: list[Tensor] = []  # in host memory
        self.starts: list[Tensor] = []  # the same on the device, leaves of the chunk after the cut
        self.ends: list[Tensor] = []  # the same with the graph of the chunk before it
        self.gradient: list[Tensor] = []
        self.random: RandomState | None = None  # before the chunk before it was first computed

    def keep(self, ends: Sequence[Tensor]) -> None:
        """Lets the states go to host memory. Nothing waits: the copy back is on the same stream."""
        self.states = [state.detach().clone().to("cpu", non_blocking=state.is_cuda) for state in ends]

    def pull(self) -> Tensor:
        """Scalar with the gradient, by the states before the cut, of the loss behind it."""
        assert self.gradient, "the chunk after the cut comes first"
        terms = [(_wide(end) * gradient).sum() for end, gradient in zip(self.ends, self.gradient, strict=True)]
        return torch.stack(terms).sum()

    def take_gradient(self, scale: float) -> None:
        """Of the states after the cut; `scale` is that of the loss."""
        grads = [start.grad for start in self.starts]
        self.gradient = [_wide(grad) / scale for grad in grads if grad is not None]
        self.states, self.starts = [], []


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor


class RandomState:
    """The random generators as they are now, so that a chunk's dropout is the same when it is computed again."""

    def __init__(self, device: torch.device):
        self._device, self._host = device, torch.get_rng_state()
        self._there = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    @contextmanager
    def replayed(self) -> Iterator[None]:
        devices = [] if self._there is None else [self._device]
        with torch.random.fork_rng(devices, device_type="cuda" if self._there is None else self._device.type):
            torch.set_rng_state(self._host)
            if self._there is not None:
                torch.get_device_module(self._device).set_rng_state(self._there, self._device)
            yield


@dataclass(frozen=True)
class Chunk(PackedBatch):
    """A part of a batch. `entry`: the cut it begins at, `exit`: the one it ends at; None at the edge of a document."""

    entry: Boundary | None = None
    exit: Boundary | None = None


@dataclass(frozen=True)
class Cut:
    """Tokens `start:end` of a batch, and which of its targets they predict; a `Chunk` when it is needed."""

    batch: PackedBatch
    start: int
    end: int
    targets: slice
    entry: Boundary | None = field(default=None, compare=False)
    exit: Boundary | None = field(default=None, compare=False)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Chunk:
        batch, start, end = self.batch, self.start, self.end
        edges = batch.segments.cu_seqlens
        first, last = int(torch.searchsorted(edges, start, right=True)) - 1, int(torch.searchsorted(edges, end))
        return Chunk(
            input_ids=batch.input_ids[start:end],
            segments=Segments(edges[first : last + 1].clamp(start, end) - start),
            target_positions=batch.target_positions[self.targets] - start,
            target_ids=batch.target_ids[self.targets],
            target_sequence=batch.target_sequence[self.targets] - first,
            num_sequences=last - first,
            last_positions=batch.last_positions[first:last].clamp(start, end - 1) - start,
            pairs=None,
            indices=batch.indices[first:last],
            entry=self.entry,
            exit=self.exit,
        ).to(device, non_blocking)  # type: ignore[return-value]


def cuts(batch: PackedBatch, chunk: int) -> list[Cut]:
    """A batch of sequences in parts of at most `chunk` tokens.

    Raises:
        ValueError: the batch has forks, whose children would need states of parents in other chunks.
    """
    if bool((batch.segments.parent >= 0).any()):
        raise ValueError("state passing takes sequences without forks; preference pairs share their prompts by forks")
    edges = batch.segments.cu_seqlens.tolist()
    places = _places(edges, chunk)
    boundaries = {place: Boundary() for place in set(places) - set(edges)}
    # Targets are in the order of their positions; all are looked up at once, for the batch may be on a device.
    positions = batch.target_positions
    bounds = torch.searchsorted(positions, torch.tensor(places, device=positions.device)).tolist()
    return [
        Cut(batch, start, end, slice(*targets), boundaries.get(start), boundaries.get(end))
        for (start, end), targets in zip(pairwise(places), pairwise(bounds), strict=True)
    ]


def _places(edges: Sequence[int], chunk: int) -> list[int]:
    """Where chunks begin and end. What fits into one is not cut; a longer document begins where there is room."""
    places = [0]
    for start, end in pairwise(edges):
        if end - places[-1] > chunk >= end - start:
            places.append(start)
        while end - places[-1] > chunk:
            places.append(places[-1] + chunk)
    return [*places, edges[-1]]


def describe(recipe: Recipe, lengths: Sequence[int]) -> str:
    """What `state_passing` will do with examples of so many tokens, in a sentence."""
    chunk, long = recipe.state_passing_chunk, [n for n in lengths if n > recipe.state_passing_chunk]
    text = f"{recipe.state_passing}, chunks of {chunk:,} tokens"
    if not long:
        return f"{text}; no example is longer (of {len(lengths):,})"
    text += f"; {len(long):,} of {len(lengths):,} examples are longer, the longest has {max(long):,}"
    if recipe.state_passing == "exact":
        twice = sum((n - 1) // chunk * chunk for n in long) / sum(lengths)
        text += f"; up to {twice:.0%} of all tokens go forward twice"
    return text


class StatePassing(SequenceObjective):
    """Cross-entropy of the trained tokens, of documents in chunks of at most `chunk` tokens."""

    def __init__(self, exact: bool, chunk: int):
        self.exact, self.chunk = exact, chunk

    def ask(self, model: nn.Module, batch: PackedBatch) -> Tensor:
        """Log-probs of the targets; a `Chunk` begins from the state at its entry and leaves one at its exit."""
        if not isinstance(batch, Chunk):
            return super().ask(model, batch)
        if self.exact and torch.is_grad_enabled():
            logps, ends = self._forward(model, batch, differentiable=True)
            if batch.exit is not None:
                batch.exit.ends = ends
            return logps
        logps, ends = self._forward(model, batch)
        if batch.entry is not None:
            batch.entry.states = []
        if batch.exit is not None:
            batch.exit.keep(ends)
        return logps

    @torch.no_grad()
    def read(self, model: nn.Module, chunk: Chunk) -> None:
        """The first of two passes: only the state at the exit is wanted, so the head sees a single token."""
        assert chunk.exit is not None
        chunk.exit.random = RandomState(chunk.input_ids.device)
        nothing = chunk.target_ids[:0]
        chunk.exit.keep(self._forward(model, replace(chunk, target_ids=nothing, target_positions=nothing))[1])

    def _forward(self, model: nn.Module, chunk: Chunk, differentiable: bool = False) -> tuple[Tensor, list[Tensor]]:
        """(log-probs, states at the exit)."""
        initial = None
        if chunk.entry is not None:
            starts = [state.to(chunk.input_ids.device, non_blocking=True) for state in chunk.entry.states]
            if differentiable:
                chunk.entry.starts = [start.requires_grad_() for start in starts]
            initial = _states_of_all(starts, chunk.segments.num_segments)
        asked, empty = chunk, chunk.num_targets == 0
        if empty:  # a token all the same, so that every parameter has a gradient: DDP waits for all of them
            none = chunk.input_ids.new_zeros(1)
            asked = replace(chunk, target_positions=none, target_ids=none)
        leaving = chunk.exit is not None
        output = target_output(model, asked, summed=True, initial_states=initial, output_final_states=leaving)
        ends = [state[-1:] for layer in output.final_states or () for state in layer]
        return (0.0 * output.logps if empty else output.logps), ends


def _states_of_all(first: Sequence[Tensor], rows: int) -> list[LayerState]:
    """Per layer, states of `rows` segments: `first` of the first one, zeros of those that begin in the chunk."""
    whole = [torch.cat([state, state.new_zeros(rows - 1, *state.shape[1:])]) if rows > 1 else state for state in first]
    return list(zip(whole[::2], whole[1::2], strict=True))


class StatePassingTrainer(PackedTrainer):
    """`PackedTrainer` whose objective is `StatePassing`: what it takes at once are chunks, and a step is their sum."""

    objective: StatePassing

    def _parts(self, model: nn.Module, batches: Sequence[PackedBatch]) -> Sequence[Any]:
        parts = [cut for batch in batches for cut in cuts(batch, self.objective.chunk)]
        if not (self.objective.exact and torch.is_grad_enabled()):
            return parts
        leaving = [cut for cut in parts if cut.exit is not None]
        for number in range(self._passes(len(leaving))):
            with torch.no_grad(), self.compute_loss_context_manager():
                if number < len(leaving):
                    self.objective.read(model, leaving[number].to(self.args.device))
                else:
                    self.objective.ask(model, placeholder().to(self.args.device))
        return parts[::-1]

    def _forward_backward(self, model: nn.Module, batch: PackedBatch, num_items: Any) -> Tensor:
        random = batch.exit.random if isinstance(batch, Chunk) and batch.exit is not None else None
        with nullcontext() if random is None else random.replayed():
            return super()._forward_backward(model, batch, num_items)

    def _backward(self, loss: Tensor, batch: PackedBatch) -> None:
        if not self.objective.exact or not isinstance(batch, Chunk):
            super()._backward(loss, batch)
            return
        if batch.exit is not None:
            loss = loss + batch.exit.pull()
            batch.exit.ends, batch.exit.gradient = [], []
        super()._backward(loss, batch)
        if batch.entry is not None:
            scaler = self.accelerator.scaler
            batch.entry.take_gradient(1.0 if scaler is None else scaler.get_scale())
