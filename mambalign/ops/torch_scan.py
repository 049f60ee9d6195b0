"""Selective scan in plain PyTorch, any device: exact on packed and forked segments, linear in time and memory.

How it works. Segments of one tree level are independent, so they become *lanes* that walk time in lockstep; children
wait for their parents' level. Time is cut into tiles of K steps. Inside a tile everything that can be vectorised over
`[K, lanes, N, D]` is (exponentials, outer products, output contractions), and the recurrence itself is one in-place
multiply-add per step. Layout is `[N, D]`, not the papers' `[D, N]`: the long channel axis must be innermost, otherwise
every broadcast runs over 16 elements at a time (measured 3-4x slower).

The backward pass recomputes a tile's states from the state at its start, so only `1/K` of them are ever stored, and
nothing of size `[T, D, N]` exists at any time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambalign.ops.backends import add_rows, without_autocast
from mambalign.ops.reference import compute_dtype
from mambalign.ops.segments import Segments

# Elements of state one step should touch (below it, dispatch costs more than arithmetic) and elements of a tile
# (above it, a CPU core's cache no longer holds the tile's three buffers). Chosen with `benchmarks/cpu.py`.
CPU_STEP, CPU_TILE = 1 << 15, 1 << 18
GPU_STEP, GPU_TILE = 1 << 24, 1 << 26
MIN_STEPS, MAX_STEPS = 16, 256
LOG2_E = math.log2(math.e)  # of decays: exp2 costs less than exp


@dataclass
class Tile:
    """`index [K, lanes]` names the token of every step; `valid` (flat, or None for all) those that exist."""

    index: Tensor
    lanes: int
    valid: Tensor | None
    padding: Tensor | None  # [K, lanes, 1] of 0/1, None where every step exists


@dataclass
class Group:
    """Lanes walked together: segments of one level, longest first."""

    segments: Tensor
    parents: Tensor  # -1 at roots
    roots: Tensor
    tiles: list[Tile]


def plan(segments: Segments, state_size: int, device: torch.device) -> list[Group]:
    """Cut `segments` into groups of lanes and tiles of time for states of `state_size` elements."""
    step, tile = (CPU_STEP, CPU_TILE) if device.type == "cpu" else (GPU_STEP, GPU_TILE)
    max_lanes = max(1, step // state_size)
    key = ("scan", state_size, str(device))
    cached = segments.memo.get(key)
    if cached is None:
        cached = segments.memo[key] = [
            _group(segments, chosen, tile // state_size, device)
            for level in segments.levels
            for chosen in _split(sorted(level, key=lambda s: -int(segments.lengths[s])), max_lanes)
        ]
    return cached


def _split(items: list[int], size: int) -> Iterator[list[int]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _group(segments: Segments, chosen: list[int], lane_steps: int, device: torch.device) -> Group:
    index = torch.tensor(chosen)
    starts, lengths = segments.cu_seqlens[index], segments.lengths[index]
    steps = min(max(lane_steps // len(chosen), MIN_STEPS), MAX_STEPS)
    tiles = [_tile(starts, lengths, begin, steps, device) for begin in range(0, int(lengths[0]), steps)]
    parents = segments.parent[index]
    return Group(index.to(device), parents.to(device), (parents < 0).to(device), tiles)


def _tile(starts: Tensor, lengths: Tensor, begin: int, steps: int, device: torch.device) -> Tile:
    lanes = int((lengths > begin).sum())
    steps = min(steps, int(lengths[0]) - begin)
    offset = begin + torch.arange(steps)[:, None]
    exists = offset < lengths[:lanes]
    index = starts[:lanes] + torch.minimum(offset, lengths[:lanes] - 1)
    if bool(exists.all()):
        return Tile(index.to(device), lanes, None, None)
    return Tile(index.to(device), lanes, exists.flatten().nonzero()[:, 0].to(device), exists[..., None].to(device))


def _rows(x: Tensor, tile: Tile) -> Tensor:
    """`x [T, F]` -> `[K, lanes, F]`."""
    return x.index_select(0, tile.index.flatten()).view(*tile.index.shape, x.shape[1])


def _existing(x: Tensor, tile: Tile) -> Tensor:
    """`[K, lanes, F]` with the steps past a lane's end set to zero: decay one, no input, no gradient."""
    return x if tile.padding is None else x * tile.padding


def _scatter(out: Tensor, value: Tensor, tile: Tile) -> None:
    """Write `[K, lanes, F]` to the tokens it belongs to."""
    index, value = tile.index.flatten(), value.flatten(0, 1)
    if tile.valid is not None:
        index, value = index[tile.valid], value[tile.valid]
    out.index_copy_(0, index, value)


class _Workspace:
    """Three `[K, lanes, N, D]` buffers like `[N, D]`, allocated once a call: fresh pages cost as much as arithmetic."""

    def __init__(self, groups: list[Group], like: Tensor):
        steps = max((tile.index.numel() for group in groups for tile in group.tiles), default=0)
        self._flat = like.new_empty(3, steps * like.numel())
        self._state = like.shape
        self._steps: dict[tuple[int, torch.Size], tuple[Tensor, ...]] = {}

    def __getitem__(self, key: tuple[int, Tile]) -> Tensor:
        number, tile = key
        shape = (*tile.index.shape, *self._state)
        return self._flat[number][: tile.index.numel() * self._state.numel()].view(shape)

    def steps(self, number: int, tile: Tile) -> tuple[Tensor, ...]:
        """Buffer `number` as one view a step, made once for all tiles of a shape: a view costs a third of its step."""
        key = (number, tile.index.shape)
        if key not in self._steps:
            self._steps[key] = self[number, tile].unbind(0)
        return self._steps[key]


def _states(
    tile: Tile, workspace: _Workspace, dt: Tensor, du: Tensor, A: Tensor, B: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """All states of a tile from the state at its start: (decay, states), both `[K, lanes, N, D]`."""
    decay, states = workspace[0, tile], workspace[1, tile]
    # exp2 of a scaled A: a third cheaper than exp, and exponentials are the largest single cost here.
    torch.mul(dt[:, :, None, :], A * LOG2_E, out=decay).exp2_()
    torch.mul(B[..., None], du[:, :, None, :], out=states)
    for a, h in zip(workspace.steps(0, tile), workspace.steps(1, tile), strict=True):
        state = h.addcmul_(a, state)
    return decay, states


class SelectiveScan(torch.autograd.Function):
    """See `mambalign.ops.selective_scan` for the contract. Tensors inside are `[.., N, D]` in the compute dtype."""

    @staticmethod
    @without_autocast
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
        dtype = compute_dtype(u, delta, A, B, C, initial_state)
        dt = _step_size(delta, delta_bias, delta_softplus, dtype)
        uc, At, Bc, Cc = u.to(dtype), A.to(dtype).T.contiguous(), B.to(dtype), C.to(dtype)
        du = dt * uc
        groups = plan(segments, At.numel(), u.device)
        workspace = _Workspace(groups, At)
        finals = At.new_zeros(segments.num_segments, *At.shape)
        y = torch.empty_like(uc)
        starts: list[Tensor] = []
        for group in groups:
            state = _entry_states(group, finals, initial_state)
            for tile in group.tiles:
                # A copy: the lanes' states are overwritten as they advance.
                start = state[: tile.lanes].clone()
                starts.append(start)
                dts, dus = _existing(_rows(dt, tile), tile), _existing(_rows(du, tile), tile)
                _, states = _states(tile, workspace, dts, dus, At, _rows(Bc, tile), start)
                _scatter(y, (_rows(Cc, tile)[:, :, None, :] @ states)[:, :, 0], tile)
                state[: tile.lanes] = states[-1]
            finals[group.segments] = state
        if D is not None:
            y.addcmul_(uc, D.to(dtype))
        out = y if z is None else y * F.silu(z.to(dtype))
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, y if z is not None else None, *starts)
        ctx.delta_softplus, ctx.segments, ctx.groups = delta_softplus, segments, groups
        ctx.set_materialize_grads(False)
        return out.to(u.dtype), finals.transpose(1, 2)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_out: Tensor | None, d_finals: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        u, delta, A, B, C, D, z, delta_bias, initial_state, y, *starts = ctx.saved_tensors
        dtype = compute_dtype(u, delta, A, B, C, initial_state)
        dt = _step_size(delta, delta_bias, ctx.delta_softplus, dtype)
        uc, At, Bc, Cc = u.to(dtype), A.to(dtype).T.contiguous(), B.to(dtype), C.to(dtype)
        d_y = torch.zeros_like(uc) if d_out is None else d_out.to(dtype)
        d_z = None
        if z is not None:
            gate = torch.sigmoid(z.to(dtype))
            d_z = d_y * y * gate * (1 + z.to(dtype) * (1 - gate))
            d_y = d_y * gate * z.to(dtype)
        grads = _scan_backward(ctx.segments, ctx.groups, starts, dt, uc, At, Bc, Cc, d_y, d_finals)
        d_dt, d_u, d_A, d_B, d_C, d_states = grads
        d_D = None
        if D is not None:
            d_D = (d_y * uc).sum(0).to(D.dtype)
            d_u.addcmul_(d_y, D.to(dtype))
        if ctx.delta_softplus:
            # softplus'(x) = sigmoid(x) = 1 - exp(-softplus(x)): no need to keep x.
            d_dt.mul_(-torch.expm1(-dt))
        d_bias = None if delta_bias is None else d_dt.sum(0).to(delta_bias.dtype)
        d_initial = None
        if initial_state is not None:
            roots = ctx.segments.on("roots", (ctx.segments.parent < 0)[:, None, None], u.device)
            d_initial = (d_states * roots).transpose(1, 2).to(initial_state.dtype)
        return (
            d_u.to(u.dtype),
            d_dt.to(delta.dtype),
            d_A.T.to(A.dtype),
            d_B.to(B.dtype),
            d_C.to(C.dtype),
            d_D,
            None if d_z is None else d_z.to(z.dtype),
            d_bias,
            None,
            None,
            d_initial,
        )


def _step_size(delta: Tensor, delta_bias: Tensor | None, softplus: bool, dtype: torch.dtype) -> Tensor:
    dt = delta.to(dtype)
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)
    return F.softplus(dt) if softplus else dt


def _entry_states(group: Group, finals: Tensor, initial_state: Tensor | None) -> Tensor:
    """State `[lanes, N, D]` in which each lane starts: its parent's final one, or the initial one at a root."""
    if initial_state is None:
        entry = finals.new_zeros(())
    else:
        entry = initial_state[group.segments].transpose(1, 2).to(finals.dtype)
    return torch.where(group.roots[:, None, None], entry, finals[group.parents.clamp(min=0)])


def _scan_backward(
    segments: Segments,
    groups: list[Group],
    starts: list[Tensor],
    dt: Tensor,
    u: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    d_y: Tensor,
    d_finals: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dt, u, A `[N, D]`, B, C, states at segment starts `[S, N, D]`), walking levels and time backwards."""
    du = dt * u
    workspace = _Workspace(groups, A)
    d_dt, d_du = torch.empty_like(dt), torch.empty_like(dt)
    d_A, d_B, d_C = torch.zeros_like(A), torch.empty_like(B), torch.empty_like(C)
    # Gradient of every segment's final state: from the caller, plus what its children hand up.
    d_final = A.new_zeros(segments.num_segments, *A.shape)
    if d_finals is not None:
        d_final += d_finals.transpose(1, 2)
    d_start = torch.zeros_like(d_final)
    position = len(starts)
    for group in reversed(groups):
        carry = d_final[group.segments]
        for tile in reversed(group.tiles):
            position -= 1
            start, lanes = starts[position], tile.lanes
            dts, dus = _existing(_rows(dt, tile), tile), _existing(_rows(du, tile), tile)
            Bs, d_ys = _rows(B, tile), _existing(_rows(d_y, tile), tile)
            decay, states = _states(tile, workspace, dts, dus, A, Bs, start)
            _scatter(d_C, _over_channels(states, d_ys), tile)
            d_h = workspace[2, tile]
            torch.mul(_rows(C, tile)[..., None], d_ys[:, :, None, :], out=d_h)
            carry[:lanes] = _reverse(workspace.steps(0, tile), workspace.steps(2, tile), carry[:lanes])
            _scatter(d_du, (Bs[:, :, None, :] @ d_h)[:, :, 0], tile)
            _scatter(d_B, _over_channels(d_h, dus), tile)
            # d/d(dt A) of exp(dt A) h_before is decay * h_before * d_h.
            decay.mul_(d_h)
            decay[1:].mul_(states[:-1])
            decay[0].mul_(start)
            _scatter(d_dt, torch.mul(decay, A, out=d_h).sum(2), tile)
            d_A += torch.mul(decay, dts[:, :, None, :], out=states).flatten(0, 1).sum(0)
        d_start[group.segments] = carry
        children = (~group.roots).nonzero()[:, 0]
        if children.numel():
            add_rows(d_final, group.parents[children], carry[children])
    d_u = d_du * dt
    d_dt.addcmul_(d_du, u)
    return d_dt, d_u, d_A, d_B, d_C, d_start


def _over_channels(x: Tensor, row: Tensor) -> Tensor:
    """`[K, lanes, N, D]`, `[K, lanes, D]` -> `[K, lanes, N]`. Row by transpose: 8x faster than matrix by column."""
    return torch.matmul(row[:, :, None, :], x.transpose(2, 3))[:, :, 0]


def _reverse(decay: tuple[Tensor, ...], d_h: tuple[Tensor, ...], carry: Tensor) -> Tensor:
    """Turn `d_h` (each step's own gradient) into the full one, last step first; returns that of the state before."""
    above = None
    for a, d in zip(reversed(decay), reversed(d_h), strict=True):
        if above is None:
            d.add_(carry)
        else:
            d.addcmul_(*above)
        above = (a, d)
    assert above is not None
    return above[0] * above[1]


def selective_scan(*args: Any) -> tuple[Tensor, Tensor]:
    """Chunked PyTorch backend; arguments as `mambalign.ops.reference.selective_scan`."""
    y, final_state = SelectiveScan.apply(*args[:-1])  # the last state comes in any case
    return y, final_state
