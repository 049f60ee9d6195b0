"""Selective scan on a GPU: `selective_scan.cu`, the passes around it, and their gradients.

A *unit* is a segment, or a piece of a long one. The main passes walk all units at once, a warp for 32 channels of each,
so they must know the state in which every unit starts (forwards) and the gradient of the state in which it ends
(backwards). Where no unit has a parent, both are given and one pass does it. Otherwise:

    heads   units with a child, walked from a zero state: where that leads, and the sum of their step sizes
    join    true starts, parents first: a state decays over a unit by exp(A times that sum), one exponential
    main    outputs, final states, and the state before every 32 tokens for the backward pass
    tails   units with a parent, walked backwards from a zero gradient
    join    the same with gradients, children first; several children of one parent add up
    main    backwards: recomputes 32 tokens from the stored state, then all gradients

Pieces and forks are thus one thing. dB and dC are sums over channels: every warp writes its own share, and a sum over
warps in a fixed order follows, so results repeat bit for bit.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambalign.ops import nvrtc
from mambalign.ops.nvrtc import IO
from mambalign.ops.segments import Segments

SOURCE = Path(__file__).with_name("selective_scan.cu")
# As in the source: states of a channel, channels of a warp, tokens between stored states.
STATES, LANES, TILE = 16, 16, 32
WARPS = 2  # of a block: they share B and C, and add up dB and dC
# Blocks that a multiprocessor holds, by registers and shared memory.
FORWARD_BLOCKS, BACKWARD_BLOCKS = 10, 6
ENOUGH = 4  # blocks for each multiprocessor: cutting segments for more costs more than it brings
SHORTEST_PIECE = 256  # tokens: cutting costs a second walk over what is cut
LONGEST_PIECE = 1 << 15  # tokens: the kernels' offsets within a unit are 32 bits wide
STATIC = True  # compile for the row lengths at hand: addresses then cost no instructions (a sixth of all)
LOG2_E = 1.4426950408889634


@dataclass
class Walk:
    """Which units each row of a grid walks, one after the other: `units[starts[i] : starts[i + 1]]`, int32."""

    starts: Tensor
    units: Tensor

    @property
    def rows(self) -> int:
        return self.starts.numel() - 1


@dataclass
class Plan:
    """`units` int32 `[U, 8]` as `struct Unit`; `joined`: those with a parent or a child, parents first."""

    units: Tensor
    joined: Tensor
    all: Walk
    heads: Walk
    tails: Walk
    checkpoints: int


def plan(segments: Segments, blocks: int, held: int, device: torch.device) -> Plan:
    """Cut and distribute `segments` for `blocks` blocks of channels on a device that runs `held` blocks at a time."""
    key = ("cuda scan", blocks, held, SHORTEST_PIECE, str(device))
    if key not in segments._plans:
        segments._plans[key] = _plan(segments, blocks, held, device)
    return segments._plans[key]  # type: ignore[return-value]


def _longest_piece(segments: Segments, blocks: int, held: int, enough: int) -> int:
    """Tokens; as long as the device allows, since cutting costs a second walk over what is cut."""
    longest = int(segments.cu_seqlens.diff().max()) if segments.num_segments else 0
    if longest and segments.num_tokens // longest * blocks < enough:
        # As many rows as fill the device twice, so that what is left over by whole rows weighs less.
        longest = max(SHORTEST_PIECE, -(-segments.num_tokens // max(1, 2 * held // blocks)))
    return min(_up(longest, TILE), LONGEST_PIECE)


def _plan(segments: Segments, blocks: int, held: int, device: torch.device) -> Plan:
    longest = _longest_piece(segments, blocks, held, ENOUGH * _multiprocessors(device))
    begins, lengths, parents, owners, lasts = [], [], [], [], []
    last_unit: list[int] = []  # of each segment
    for segment, (begin, end, parent) in enumerate(
        zip(segments.cu_seqlens.tolist(), segments.cu_seqlens[1:].tolist(), segments.parent.tolist(), strict=False)
    ):
        pieces = max(1, -(-(end - begin) // longest))
        step = _up(-(-(end - begin) // pieces), TILE)
        cuts = [*range(begin, end, step)] or [begin]
        before = last_unit[parent] if parent >= 0 else -1
        for cut in cuts:
            begins.append(cut)
            lengths.append(min(step, end - cut))
            parents.append(before)
            owners.append(segment)
            lasts.append(cut == cuts[-1])
            before = len(begins) - 1
        last_unit.append(before)
    has_child = [False] * len(begins)
    for parent in parents:
        if parent >= 0:
            has_child[parent] = True
    joined = [u for u, parent in enumerate(parents) if parent >= 0 or has_child[u]]
    slots = dict(zip(joined, itertools.count(), strict=False))
    tiles = [-(-length // TILE) for length in lengths]
    first_tile = [0, *itertools.accumulate(tiles)]
    rows = [
        (begins[u], lengths[u], owners[u], parents[u], slots.get(u, -1), first_tile[u], lasts[u], has_child[u])
        for u in range(len(begins))
    ]

    def walk(units: Sequence[int]) -> Walk:
        return _walk(units, lengths, max(1, -(-4 * held // blocks)), device)

    return Plan(
        torch.tensor(rows, dtype=torch.int32).view(-1, 8).to(device),
        torch.tensor(joined, dtype=torch.int32).to(device),
        walk(range(len(begins))),
        walk([u for u in joined if has_child[u]]),
        walk([u for u in joined if parents[u] >= 0]),
        first_tile[-1],
    )


def _up(x: int, multiple: int) -> int:
    return max(multiple, -(-x // multiple) * multiple)


def _walk(units: Sequence[int], lengths: Sequence[int], most: int, device: torch.device) -> Walk:
    """Spread units over at most `most` rows, longest first to the row with the fewest tokens."""
    rows: list[list[int]] = [[] for _ in range(min(most, len(units)))]
    loads = [(0, row) for row in range(len(rows))]
    for unit in sorted(units, key=lambda u: -lengths[u]):
        load, row = heapq.heappop(loads)
        rows[row].append(unit)
        heapq.heappush(loads, (load + lengths[unit], row))
    starts = [0, *itertools.accumulate(len(row) for row in rows)]
    flat = list(itertools.chain.from_iterable(rows))
    return Walk(torch.tensor(starts, dtype=torch.int32).to(device), torch.tensor(flat, dtype=torch.int32).to(device))


def unavailable(device: torch.device, A: Tensor | None = None, *others: Tensor | None) -> str | None:
    """Why this backend cannot run on `device`, or on these inputs; None if it can."""
    if A is not None and A.shape[1] > STATES:
        return f"holds at most {STATES} states a channel, A has {A.shape[1]}"
    return nvrtc.unavailable(device, A, *others)


def module(macros: tuple[tuple[str, int], ...], device: torch.device) -> Any:
    return nvrtc.module(SOURCE, macros, device)


def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


class _Call:
    """One call's kernels, plan and parameters: what its forward and its backward pass share."""

    def __init__(
        self,
        tokens: dict[str, Tensor],
        A: Tensor,
        segments: Segments,
        vectors: dict[str, Tensor | None],
        softplus: bool,
        held: int,
    ):
        u = tokens["u"]
        (self.T, self.D), self.N = u.shape, A.shape[1]
        self.Dp = _up(self.D, LANES * WARPS)
        self.blocks = self.Dp // (LANES * WARPS)
        self.device, self.dtype = u.device, u.dtype
        self.softplus = softplus
        self.plan = plan(segments, self.blocks, held * _multiprocessors(self.device), self.device)
        self.values: dict[str, Any] = {
            "A": self.padded(A.float()[None] * LOG2_E),
            "units": self.plan.units,
            "joined": self.plan.joined,
            "num_channels": self.D,
            "padded_channels": self.Dp,
            "num_states": self.N,
            "num_tokens": self.T,
            "num_blocks": self.blocks,
            "num_joined": self.plan.joined.numel(),
        }
        self.add_tokens(**tokens)
        for name, value in vectors.items():
            self.values[name] = None if value is None else torch.nn.functional.pad(value.float(), (0, self.Dp - self.D))

    def add_tokens(self, **tensors: Tensor) -> None:
        """Token tensors in the call's dtype, with the row stride of each."""
        for name, value in tensors.items():
            value = value.to(self.dtype)
            value = value if value.stride(1) == 1 else value.contiguous()
            self.values |= {name: value, f"{name}_stride": value.stride(0)}

    def padded(self, states: Tensor) -> Tensor:
        """`[R, D, N]` -> fp32 `[R, 16, Dp]`."""
        out = torch.zeros(states.shape[0], STATES, self.Dp, dtype=torch.float32, device=self.device)
        out[:, : self.N, : self.D] = states.transpose(1, 2)
        return out

    def unpadded(self, states: Tensor) -> Tensor:
        """`[R, 16, Dp]` -> `[R, D, N]`."""
        return states[:, : self.N, : self.D].transpose(1, 2)

    def states(self, rows: int) -> Tensor:
        return torch.empty(rows, STATES, self.Dp, dtype=torch.float32, device=self.device)

    def tokens(self) -> Tensor:
        return torch.empty(self.T, self.D, dtype=self.dtype, device=self.device)

    def walk(self, kernel: str, walk: Walk) -> None:
        values = self.values | {"item_starts": walk.starts, "item_units": walk.units}
        self.launch(kernel, (self.blocks, walk.rows), 32 * WARPS, values)

    def launch(self, kernel: str, grid: tuple[int, int], threads: int, values: dict[str, Any]) -> None:
        macros = {"IO": IO[self.dtype], "GATED": "z" in self.values, "SOFTPLUS": self.softplus, "WARPS": WARPS}
        macros["ALIGNED_ROWS"] = self.N == STATES and all(self.aligned(name) for name in ("B", "C"))
        tokens = [name for name in ("u", "delta", "z", "d_out") if name in self.values]
        macros["ALIGNED_TOKENS"] = self.D % 4 == 0 and all(self.aligned(name) for name in tokens)
        if STATIC:
            # What a pass does not read has the usual length, so that both passes share one build.
            strides = {n: self.values.get(f"{n}_stride", self.D) for n in ("u", "delta", "z", "d_out")}
            macros |= {"STATIC": 1, "STATIC_WIDTH": self.D} | {f"STATIC_{name}": n for name, n in strides.items()}
        key = tuple((name, int(value)) for name, value in macros.items())
        module(key, self.device).launch(kernel, grid, threads, values)

    def aligned(self, name: str) -> bool:
        """Whether four neighbours can be read at once anywhere in the rows of a token tensor."""
        rows = self.values[name]
        return rows.data_ptr() % (4 * rows.itemsize) == 0 and rows.stride(0) % 4 == 0

    def join(self, kernel: str) -> None:
        if self.plan.joined.numel():
            self.launch(kernel, (-(-STATES * self.Dp // 128), 1), 128, self.values)

    def add_workspace(self) -> None:
        joined = self.plan.joined.numel()
        sums = torch.empty(joined, self.Dp, dtype=torch.float32, device=self.device)
        self.values |= {"starts": self.states(joined), "ends": self.states(joined), "sums": sums}


class SelectiveScan(torch.autograd.Function):
    """See `mambalign.ops.selective_scan` for the contract."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        z: Tensor | None,
        delta_bias: Tensor | None,
        delta_softplus: bool,
        segments: Segments,
        initial_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        call = _call(u, delta, A, B, C, D, z, delta_bias, delta_softplus, segments, FORWARD_BLOCKS)
        if initial_state is not None:
            call.values["initial"] = call.padded(initial_state)
        call.add_workspace()
        call.walk("scan_heads", call.plan.heads)
        call.join("join_forward")
        y = call.tokens()
        checkpoints, finals = call.states(call.plan.checkpoints), call.states(segments.num_segments)
        call.values |= {"y": y, "checkpoints": checkpoints, "finals": finals}
        call.walk("scan_forward", call.plan.all)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, checkpoints)
        ctx.delta_softplus, ctx.segments = delta_softplus, segments
        ctx.set_materialize_grads(False)
        return y.to(u.dtype), call.unpadded(finals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_finals: Tensor | None) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, delta_bias, initial_state, checkpoints = ctx.saved_tensors
        call = _call(u, delta, A, B, C, D, z, delta_bias, ctx.delta_softplus, ctx.segments, BACKWARD_BLOCKS)
        call.add_tokens(d_out=torch.zeros_like(u) if d_out is None else d_out)
        call.add_workspace()
        call.values["d_final"] = None if d_finals is None else call.padded(d_finals)
        call.walk("scan_tails", call.plan.tails)
        call.join("join_backward")
        items = call.plan.all.rows
        grads = {
            name: torch.empty(call.T, call.D, dtype=call.dtype, device=u.device) for name in ("d_u", "d_delta", "d_z")
        }
        d_BC = torch.empty(call.blocks, call.T, 2 * STATES, dtype=torch.float32, device=u.device)
        d_A = call.states(items)
        d_D, d_bias = (torch.empty(items, call.Dp, dtype=torch.float32, device=u.device) for _ in range(2))
        d_initial = None
        if initial_state is not None:
            d_initial = torch.zeros(ctx.segments.num_segments, STATES, call.Dp, dtype=torch.float32, device=u.device)
        call.values |= grads | {"checkpoints": checkpoints, "d_BC": d_BC, "d_A": d_A, "d_D": d_D, "d_bias": d_bias}
        call.values["d_initial"] = d_initial
        call.walk("scan_backward", call.plan.all)
        d_B, d_C = (torch.empty(call.T, STATES, dtype=call.dtype, device=u.device) for _ in range(2))
        call.launch("sum_BC", (-(-call.T * 8 // 128), 1), 128, call.values | {"d_BC": d_BC, "d_B": d_B, "d_C": d_C})
        return (
            grads["d_u"].to(u.dtype),
            grads["d_delta"].to(delta.dtype),
            call.unpadded(d_A.sum(0, keepdim=True))[0].to(A.dtype),
            d_B[:, : call.N].to(B.dtype),
            d_C[:, : call.N].to(C.dtype),
            None if D is None else d_D.sum(0)[: call.D].to(D.dtype),
            None if z is None else grads["d_z"].to(z.dtype),
            None if delta_bias is None else d_bias.sum(0)[: call.D].to(delta_bias.dtype),
            None,
            None,
            None if d_initial is None else call.unpadded(d_initial).to(initial_state.dtype),
        )


def _call(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    segments: Segments,
    held: int,
) -> _Call:
    tokens = {"u": u, "delta": delta, "B": B, "C": C} | ({} if z is None else {"z": z})
    # One element type for all: where they differ, the widest keeps every bit.
    dtypes = {t.dtype for t in tokens.values()}
    if len(dtypes) > 1:
        tokens = {name: value.float() for name, value in tokens.items()}
    return _Call(tokens, A, segments, {"D": D, "bias": delta_bias}, delta_softplus, held)


def selective_scan(*args: Any) -> tuple[Tensor, Tensor]:
    """CUDA backend; arguments as `mambalign.ops.reference.selective_scan`."""
    y, final_state = SelectiveScan.apply(*args)
    return y, final_state
