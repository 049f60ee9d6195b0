"""Selective scan on a GPU: `selective_scan.cu`, the passes around it, and their gradients.

A *unit* is a segment, or a piece of a long one. The main passes walk all units at once, a block for 64 channels of
each, so they must know the state in which every unit starts (forwards) and the gradient of the state in which it ends
(backwards). Where no unit has a parent, both are given and one pass does it. Otherwise:

    heads   units with a child, walked from a zero state: where that leads, and the sum of their step sizes
    join    true starts, parents first: a state decays over a unit by exp(A times that sum), one exponential
    main    outputs, final states, and the state before every 32 tokens for the backward pass
    tails   units with a parent, walked backwards from a zero gradient
    join    the same with gradients, children first; several children of one parent add up
    main    backwards: recomputes 32 tokens from the stored state, then all gradients

Pieces and forks are thus one thing. Rows of one length, enough to keep a device busy, go in a *relay* instead: a unit
is a leg of a row, and starts from where the leg before it left off. As many blocks as the device runs at a time take
legs of all rows in turn, first legs first, so no scheduler has less to do than another.

dB and dC are sums over channels: every block writes its own share, and a sum over blocks in a fixed order follows, so
results repeat bit for bit.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambalign.ops import nvrtc
from mambalign.ops.halves import JointGradient
from mambalign.ops.nvrtc import IO
from mambalign.ops.segments import Segments, Tables

SOURCE = Path(__file__).with_name("selective_scan.cu")
PARAMETERS = Path(__file__).with_name("scan_parameters.cu")
# As in the source: states of a channel, channels of a warp, tokens between stored states.
STATES, LANES, TILE = 16, 16, 32
WARPS = 4  # of a block: they share B and C, and add up dB and dC
# Warps that a multiprocessor holds, by registers and shared memory. In a relay fewer, with registers for the next tile.
HELD = {"scan_forward": 20, "scan_backward": 12}
HELD_IN_RELAY = 8
ENOUGH = 8 // WARPS  # blocks for each multiprocessor: cutting segments for more costs more than it brings
# Bytes of the source's `struct Shared`: B and C of a tile; for every warp groups of four tokens, and one in passing.
SHARED = 4 * (2 * TILE * STATES + WARPS * (TILE // 4 * (3 * 76 + 4 * 64) + 4 * 64))
SHORTEST_PIECE = 256  # tokens: cutting costs a second walk over what is cut
LEGS = 4  # of a segment in a relay
# Of the blocks that it runs at a time. More rows than that are better off with three warps on nearly every scheduler.
RELAYED = 1.3
LONGEST_PIECE = 1 << 15  # tokens: the kernels' offsets within a unit are 32 bits wide
STATIC = True  # compile for the row lengths at hand: addresses then cost no instructions (a sixth of all)


@dataclass
class Walk:
    """Items of units that a block of channels walks, one after the other: `units[starts[i] : starts[i + 1]]`, int32."""

    starts: Tensor
    units: Tensor

    @property
    def items(self) -> int:
        return self.starts.numel() - 1


@dataclass
class Plan:
    """`units` int32 `[U, 10]` as `struct Unit`; `joined`: those with a parent or a child, parents first; then -1.

    `rows`: 0, or in a relay, whose items are the units in their order, how many of them are next to each other.
    """

    units: Tensor
    joined: Tensor
    checkpoints: int
    rows: int
    all: Walk
    heads: Walk
    tails: Walk


def plan(segments: Segments, blocks: int, held: int, device: torch.device, backwards: bool = False) -> Plan:
    """Cut and distribute `segments` for `blocks` blocks of channels on a device that runs `held` blocks at a time."""

    def tables(segments: Segments) -> Tables:
        if _is_relay(segments, blocks, device):
            return _relay(segments, backwards)
        return _distributed(segments, blocks, held, device)

    made: Plan = segments.plan(
        ("cuda scan", blocks, held, SHORTEST_PIECE, str(device), backwards), device, tables, _built
    )
    return made


def _built(facts: tuple[int, int], units: Tensor, joined: Tensor, *walks: Tensor) -> Plan:
    return Plan(units, joined, *facts, *(Walk(*walks[i : i + 2]) for i in (0, 2, 4)))


def _is_relay(segments: Segments, blocks: int, device: torch.device) -> bool:
    """Whether rows of one length are enough for all the blocks that a relay runs at a time, and not many more."""
    chains = segments.num_segments * blocks
    held = HELD_IN_RELAY // WARPS * nvrtc.multiprocessors(device)
    return held <= chains <= RELAYED * held and _are_equal_roots(segments)


def _are_equal_roots(segments: Segments) -> bool:
    key = ("equal roots", SHORTEST_PIECE)
    if key not in segments.memo:
        lengths = segments.lengths
        equal = bool((lengths == lengths[0]).all() and (segments.parent < 0).all())
        segments.memo[key] = equal and LEGS * SHORTEST_PIECE <= int(lengths[0]) <= LEGS * LONGEST_PIECE
    return bool(segments.memo[key])


def _relay(segments: Segments, backwards: bool) -> Tables:
    """Segments of one length in `LEGS` units each: first legs first, or last legs first, one an item."""
    length = int(segments.cu_seqlens[1])
    step, tiles = _up(-(-length // LEGS), TILE), -(-length // TILE)
    cuts = [(cut, min(step, length - cut)) for cut in range(0, length, step)]
    units: list[tuple[int, ...]] = []
    for segment in range(segments.num_segments):
        for leg, (cut, tokens) in enumerate(cuts):
            unit, last = len(units), leg + 1 == len(cuts)
            before, after = (unit - 1 if leg else -1), (-1 if last else unit)
            tile, begin = segment * tiles + cut // TILE, segment * length + cut
            units.append((begin, tokens, segment, before, -1, tile, last, False, before, after))
    legs = sorted(range(len(units)), key=lambda u: -(u % len(cuts)) if backwards else u % len(cuts))
    rows = segments.num_segments
    walks = [range(len(legs) + 1), legs, *2 * ([0], [])]
    return (tiles * rows, rows), [_int32(units).view(-1, 10), _int32([]), *map(_int32, walks)]


def _int32(values: Iterable[Any]) -> Tensor:
    return torch.tensor([*values], dtype=torch.int32)


def _longest_piece(segments: Segments, blocks: int, held: int, enough: int) -> int:
    """Tokens; as long as the device allows, since cutting costs a second walk over what is cut."""
    longest = int(segments.cu_seqlens.diff().max()) if segments.num_segments else 0
    if longest and segments.num_tokens // longest * blocks < enough:
        # As many rows as fill the device twice, so that what is left over by whole rows weighs less.
        longest = max(SHORTEST_PIECE, -(-segments.num_tokens // max(1, 2 * held // blocks)))
    return min(_up(longest, TILE), LONGEST_PIECE)


def _distributed(segments: Segments, blocks: int, held: int, device: torch.device) -> Tables:
    longest = _longest_piece(segments, blocks, held, ENOUGH * nvrtc.multiprocessors(device))
    begins: list[int] = []
    lengths: list[int] = []
    parents: list[int] = []
    owners: list[int] = []
    lasts: list[bool] = []
    last_unit: list[int] = []  # of each segment
    for segment, (begin, end, parent) in enumerate(
        zip(segments.cu_seqlens.tolist(), segments.cu_seqlens[1:].tolist(), segments.parent.tolist(), strict=False)
    ):
        pieces = max(1, -(-(end - begin) // longest))
        step = _up(-(-(end - begin) // pieces), TILE)
        cuts = [*range(begin, end, step)] or [begin]
        before = last_unit[parent] if parent >= 0 else -1
        if segments.fixed and begin == end:  # many are, and nobody asks for their states
            cuts = []
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
    units: list[tuple[Any, ...]] = [
        (begins[u], lengths[u], owners[u], parents[u], slots.get(u, -1), first_tile[u], lasts[u], has_child[u], -1, -1)
        for u in range(len(begins))
    ]
    walked = (range(len(begins)), [u for u in joined if has_child[u]], [u for u in joined if parents[u] >= 0])
    # As many as there can be, of these tokens in these segments: no piece that is not a segment's last is shorter.
    room = segments.num_segments + segments.num_tokens // SHORTEST_PIECE if segments.fixed else 0
    checkpoints = segments.num_segments + segments.num_tokens // TILE if segments.fixed else first_tile[-1]
    walks = [table for part in walked for table in _walk(part, lengths, blocks, held, room)]
    units += [(0,) * 10] * (room - len(units))
    joined += [-1] * (room - len(joined) if joined else 0)
    return (checkpoints, 0), [_int32(units).view(-1, 10), _int32(joined), *map(_int32, walks)]


def _up(x: int, multiple: int) -> int:
    return max(multiple, -(-x // multiple) * multiple)


def _walk(
    units: Sequence[int], lengths: Sequence[int], blocks: int, held: int, room: int
) -> tuple[list[int], list[int]]:
    """Spread units over items, longest first to the item with the fewest tokens; as in `Walk`.

    room: units that the tables are to have room for, and items with them; 0 for no more than there are.
    """
    count = most = max(1, -(-4 * held // blocks))
    # Where all blocks run at a time the device spreads them evenly, and must count few that have nothing to do.
    if not room or len(units) * blocks < held:
        few = len(units) <= 8 or not room
        count = min(most, len(units) if few else _up(len(units), 4))
    items: list[list[int]] = [[] for _ in range(count)]
    loads = [(0, item) for item in range(count)]
    for unit in sorted(units, key=lambda u: -lengths[u]):
        load, item = heapq.heappop(loads)
        items[item].append(unit)
        heapq.heappush(loads, (load + lengths[unit], item))
    listed = [*itertools.chain(*items)]
    more = room - len(listed) if listed else 0
    return [0, *itertools.accumulate(map(len, items))], listed + [0] * max(0, more)


def unavailable(device: torch.device, A: Tensor | None = None, *others: Tensor | None) -> str | None:
    """Why this backend cannot run on `device`, or on these inputs; None if it can."""
    if A is not None and A.shape[1] > STATES:
        return f"holds at most {STATES} states a channel, A has {A.shape[1]}"
    return nvrtc.unavailable(device, A, *others)


def module(macros: tuple[tuple[str, int], ...], device: torch.device) -> Any:
    return nvrtc.module(SOURCE, macros, device)


class _Problem:
    """What the passes of one call share. It holds no token tensors: autograd keeps those, and may drop them.

    Small models are bound by the host, so what can be prepared once for both directions is.
    """

    def __init__(
        self,
        tokens: dict[str, Tensor],
        A: Tensor,
        D: Tensor | None,
        delta_bias: Tensor | None,
        segments: Segments,
        joint: JointGradient | None,
        log_A: bool,
    ):
        u = tokens["u"]
        (self.T, self.D), self.N = u.shape, A.shape[1]
        self.Dp = _up(self.D, LANES * WARPS)
        self.blocks = self.Dp // (LANES * WARPS)
        self.device, self.segments, self.joint = u.device, segments, joint
        # One element type for all: where they differ, the widest keeps every bit.
        self.dtype = u.dtype if all(t.dtype == u.dtype for t in tokens.values()) else torch.float32
        self._parameters = nvrtc.module(PARAMETERS, (("IO", 0),), self.device)
        sizes = {"num_channels": self.D, "padded_channels": self.Dp, "num_states": self.N}
        self._given = sizes | {"A": A.float().contiguous(), "is_log": log_A}
        rates = self.states(1)
        self._parameters.launch("scan_rates", (-(-STATES * self.Dp // 128), 1), 128, self._given | {"rates": rates})
        self._shared = {
            "A": rates,
            "D": self._vector(D),
            "bias": self._vector(delta_bias),
            **sizes,
            "num_tokens": self.T,
            "num_blocks": self.blocks,
        }

    def compile(self, laid: dict[str, Any], softplus: bool) -> None:
        """Choose the kernels, for both directions, by the layout of the token tensors."""
        rows = self.N == STATES and all(nvrtc.in_fours(laid[name]) for name in ("B", "C"))
        tokens = self.D % 4 == 0 and all(nvrtc.in_fours(laid[name]) for name in ("u", "delta", "z") if name in laid)
        macros = {
            "IO": IO[self.dtype],
            "GATED": "z" in laid,
            "SOFTPLUS": softplus,
            "WARPS": WARPS,
            "SHARED_BYTES": SHARED,
        }
        relay = _is_relay(self.segments, self.blocks, self.device)
        forward, backward = (HELD_IN_RELAY if relay else held for held in HELD.values())
        macros |= {"RELAY": relay, "HELD_FORWARD": forward, "HELD": backward}
        macros |= {"ALIGNED_ROWS": rows, "ALIGNED_TOKENS": tokens}
        if STATIC:
            # y's gradient, and z where there is none, have the usual row length.
            strides = {name: laid.get(f"{name}_stride", self.D) for name in ("u", "delta", "B", "C", "z", "d_out")}
            strides["d_z"] = self.D if self.joint is None else 2 * self.D
            macros |= {"STATIC": 1, "STATIC_WIDTH": self.D} | {f"STATIC_{name}": n for name, n in strides.items()}
        self._module = module(tuple((name, int(value)) for name, value in macros.items()), self.device)

    def laid(self, tokens: dict[str, Tensor]) -> dict[str, Any]:
        """Token tensors in the call's dtype, with the row stride of each."""
        values: dict[str, Any] = {}
        for name, value in tokens.items():
            value = value.to(self.dtype)
            value = value if value.stride(1) == 1 else value.contiguous()
            values[name], values[f"{name}_stride"] = value, value.stride(0)
        return values

    def laid_gradient(self, d_out: Tensor) -> dict[str, Any]:
        """The same of y's gradient, in the layout that the kernels were compiled for."""
        d_out = d_out.to(self.dtype).contiguous()
        d_out = d_out if d_out.data_ptr() % (4 * d_out.itemsize) == 0 else d_out.clone()
        return {"d_out": d_out, "d_out_stride": self.D}

    def plan(self, kernel: str) -> Plan:
        held = HELD[kernel] // WARPS * nvrtc.multiprocessors(self.device)
        return plan(self.segments, self.blocks, held, self.device, kernel == "scan_backward")

    def values(self, plan: Plan) -> dict[str, Any]:
        """What every pass with this plan is given."""
        joined = plan.joined.numel()
        values = self._shared | {"units": plan.units, "joined": plan.joined, "num_joined": joined}
        if joined:
            sums = torch.empty(joined, self.Dp, dtype=torch.float32, device=self.device)
            values |= {"starts": self.states(joined), "ends": self.states(joined), "sums": sums}
        elif plan.rows:
            values["starts"] = values["ends"] = self.states(plan.all.items)
        return values

    def _vector(self, value: Tensor | None) -> Tensor | None:
        """`[D]` -> fp32 `[Dp]`."""
        if value is None:
            return None
        missing = self.Dp - self.D
        return torch.nn.functional.pad(value.float(), (0, missing)) if missing else value.float().contiguous()

    def states(self, rows: int) -> Tensor:
        return torch.empty(rows, STATES, self.Dp, dtype=torch.float32, device=self.device)

    def _states(self, rows: int) -> Tensor:
        """Zero where no state or channel is."""
        full = self.N == STATES and self.Dp == self.D
        return self.states(rows) if full else self.states(rows).zero_()

    def padded(self, states: Tensor | None) -> Tensor | None:
        """`[R, D, N]` -> fp32 `[R, 16, Dp]`."""
        if states is None:
            return None
        out = self._states(states.shape[0])
        out[:, : self.N, : self.D] = states.transpose(1, 2)
        return out

    def unpadded(self, states: Tensor) -> Tensor:
        """`[R, 16, Dp]` -> `[R, D, N]`."""
        return states[:, : self.N, : self.D].transpose(1, 2)

    def gradients(self, gated: bool) -> dict[str, Any]:
        """Of the token tensors, unwritten; that of z beside its other half where there is one."""
        grads: dict[str, Any] = {name: self.tokens() for name in ("d_u", "d_delta")}
        if gated:
            joint = self.joint
            d_z = self.tokens() if joint is None else joint.right(self.T, self.D, self.dtype, self.device)
            grads |= {"d_z": d_z, "d_z_stride": d_z.stride(0)}
        return grads

    def tokens(self) -> Tensor:
        return torch.empty(self.T, self.D, dtype=self.dtype, device=self.device)

    def walk(self, kernel: str, plan: Plan, walk: Walk, values: dict[str, Any]) -> None:
        """Every pair of an item and a block of channels; in a relay as turns of the blocks that run at a time."""
        values = values | {"item_starts": walk.starts, "item_units": walk.units}
        blocks = pairs = self.blocks * walk.items
        if plan.rows and pairs:
            blocks = min(pairs, HELD_IN_RELAY // WARPS * nvrtc.multiprocessors(self.device))
            turns = torch.zeros(1 + pairs, dtype=torch.int32, device=self.device)
            values |= {"turns": turns, "num_turns": pairs, "turns_apart": self.blocks * plan.rows}
        self._module.launch(kernel, (blocks, 1), 32 * WARPS, values, SHARED if kernel == "scan_backward" else 0)

    def join(self, kernel: str, values: dict[str, Any]) -> None:
        if values["num_joined"]:
            self._module.launch(kernel, (-(-STATES * self.Dp // 128), 1), 128, values)

    def sum_vectors(self, d_vectors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """fp32 dA `[D, N]`, dD and the bias' gradient `[D]` from the shares of all items."""
        sizes = ((self.D, self.N), (self.D,), (self.D,))
        d_A, d_D, d_bias = (torch.empty(size, dtype=torch.float32, device=self.device) for size in sizes)
        values = self._given | {"d_vectors": d_vectors, "num_items": d_vectors.shape[0]}
        values |= {"d_A": d_A, "d_D": d_D, "d_bias": d_bias}
        self._parameters.launch("sum_vectors", (-(-self.D // 32), STATES + 2), nvrtc.SUMMERS, values)
        return d_A, d_D, d_bias

    def sum_BC(self, values: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """dB and dC `[T, N]` from the shares of all blocks."""
        d_B, d_C = torch.empty(2, self.T, STATES, dtype=self.dtype, device=self.device).unbind(0)
        self._module.launch("sum_BC", (-(-self.T * 8 // 128), 1), 128, values | {"d_B": d_B, "d_C": d_C})
        return d_B[:, : self.N], d_C[:, : self.N]


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
        output_final_state: bool,
        joint: JointGradient | None = None,
        log_A: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        tokens = _tokens(u, delta, B, C, z)
        problem = _Problem(tokens, A, D, delta_bias, segments, joint, log_A)
        laid = problem.laid(tokens)
        problem.compile(laid, delta_softplus)
        plan = problem.plan("scan_forward")
        y, checkpoints = problem.tokens(), problem.states(plan.checkpoints)
        finals = problem.states(segments.num_segments) if output_final_state else None
        values = problem.values(plan) | laid | {"initial": problem.padded(initial_state)}
        values |= {"y": y, "checkpoints": checkpoints, "finals": finals}
        problem.walk("scan_heads", plan, plan.heads, values)
        problem.join("join_forward", values)
        problem.walk("scan_forward", plan, plan.all, values)
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, checkpoints)
        ctx.problem = problem
        ctx.set_materialize_grads(False)
        return y.to(u.dtype), None if finals is None else problem.unpadded(finals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor | None, d_finals: Tensor | None) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, delta_bias, initial_state, checkpoints = ctx.saved_tensors
        problem: _Problem = ctx.problem
        plan = problem.plan("scan_backward")
        values = problem.values(plan) | problem.laid(_tokens(u, delta, B, C, z))
        values |= problem.laid_gradient(torch.zeros_like(u) if d_out is None else d_out)
        values |= {"d_final": problem.padded(d_finals), "checkpoints": checkpoints}
        problem.walk("scan_tails", plan, plan.tails, values)
        problem.join("join_backward", values)
        grads = problem.gradients(gated=z is not None)
        # Of every item, or row of a relay: 16 rows of A, one of D, one of the bias.
        shares = plan.rows or plan.all.items
        d_vectors = torch.empty(shares, STATES + 2, problem.Dp, dtype=torch.float32, device=u.device)
        d_BC = torch.empty(problem.blocks, problem.T, 2 * STATES, dtype=torch.float32, device=u.device)
        d_initial = None
        if initial_state is not None:
            d_initial = problem.states(problem.segments.num_segments).zero_()
        values |= grads | {"d_BC": d_BC, "d_vectors": d_vectors, "d_initial": d_initial}
        problem.walk("scan_backward", plan, plan.all, values)
        d_B, d_C = problem.sum_BC(values)
        d_A, d_D, d_bias = problem.sum_vectors(d_vectors)
        return (
            grads["d_u"].to(u.dtype),
            grads["d_delta"].to(delta.dtype),
            d_A.to(A.dtype),
            d_B.to(B.dtype),
            d_C.to(C.dtype),
            None if D is None else d_D.to(D.dtype),
            None if z is None else grads["d_z"].to(z.dtype),
            None if delta_bias is None else d_bias.to(delta_bias.dtype),
            None,
            None,
            None if d_initial is None else problem.unpadded(d_initial).to(initial_state.dtype),
            None,
            None,
            None,
        )


def _tokens(u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor | None) -> dict[str, Tensor]:
    return {"u": u, "delta": delta, "B": B, "C": C} | ({} if z is None else {"z": z})


def selective_scan(*args: Any) -> tuple[Tensor, Tensor | None]:
    """CUDA backend; arguments as `mambalign.ops.reference.selective_scan`, then `joint`, `log_A`."""
    y, final_state = SelectiveScan.apply(*args)
    if y.requires_grad:
        y.grad_fn.problem.plan("scan_backward")  # made while the device is busy: when it is needed, it may wait for it
    return y, final_state
