"""State-space dual scan in plain PyTorch, any device: exact on packed and forked segments, linear in time and memory.

Section 6 of arXiv 2405.21060: time is cut into chunks; inside a chunk the recurrence is a masked matrix product, and
states pass from chunk to chunk. Here every *segment* is cut, and a chunk knows the chunk that its path comes from, so a
fork and a cut through a long sequence are the same thing:

    locals   the state each chunk would reach from zero, all chunks at once
    walk     true starts, parents first, all chunks of the same depth at once
    outputs  what a chunk's own tokens give (masked product) plus what its start gives

A segment's last tokens rarely fill a chunk; they go into one of the next power of two, so a generation step of one
token costs one token. Few of one size go to the next larger: every size is a round of products. The backward pass keeps
the inputs only and walks the same way in reverse. States are `[N, P]` inside, not the contract's `[P, N]`: B and C are
shared by all heads of a group, so with heads and channels side by side a group's states are one matrix, and products
with them are one product.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambalign.ops.backends import add_rows, send, without_autocast
from mambalign.ops.reference import compute_dtype, step_size
from mambalign.ops.segments import Segments
from mambalign.ops.torch_scan import LOG2_E

CHUNK = 64  # tokens, a power of two
# Elements of the decay matrices `[chunks, H, chunk, chunk]` that exist at a time.
CPU_TILE, GPU_TILE = 1 << 19, 1 << 24
# Elements of padding `[tokens, H * P]` that cost less than another round of products (about 100 calls).
CPU_SLACK, GPU_SLACK = 1 << 15, 1 << 25


@dataclass
class Bucket:
    """Chunks of one padded size, numbered from `first`; `exists` is like `tokens`, None where all of them exist."""

    first: int
    tokens: Tensor  # [K, size]
    exists: Tensor | None


class Chunk(NamedTuple):
    """Tokens `begin:end` padded to `size`, after chunk `before` of their path or, at its start, `-1 - root`."""

    size: int
    begin: int
    end: int
    before: int


class Generation(NamedTuple):
    """Chunks, which other each of them continues, and whether two continue the same."""

    chunks: Tensor
    sources: Tensor
    forks: bool


@dataclass
class Plan:
    """Chunks and their ancestry. Where a path has no chunk yet, `count + root` stands for the root's initial state."""

    count: int
    buckets: list[Bucket]
    generations: list[Generation]  # by depth
    tails: Tensor  # [S]: the last chunk on the path that ends with a segment


def plan(segments: Segments, width: int, device: torch.device) -> Plan:
    """Cut `segments`, whose tokens have `width` elements each."""
    slack = (CPU_SLACK if device.type == "cpu" else GPU_SLACK) // width
    key = ("ssd", CHUNK, slack, str(device))
    if key not in segments.memo:
        segments.memo[key] = _plan(segments, slack, device)
    return segments.memo[key]


def _plan(segments: Segments, slack: int, device: torch.device) -> Plan:
    chunks, tails = _cut(segments)
    merged = _merged(Counter(chunk.size for chunk in chunks), slack)
    chunks = [chunk._replace(size=merged[chunk.size]) for chunk in chunks]
    order = sorted(range(len(chunks)), key=lambda i: -chunks[i].size)
    number = dict(zip(order, range(len(chunks)), strict=True))  # chunks are renumbered by size
    number |= {-1 - root: len(chunks) + root for root in range(segments.num_segments)}
    buckets: list[Bucket] = []
    for size, members in groupby(order, lambda i: chunks[i].size):
        spans = torch.tensor([[chunks[i].begin, chunks[i].end] for i in members])
        first = buckets[-1].first + len(buckets[-1].tokens) if buckets else 0
        buckets.append(_bucket(first, size, spans[:, :1], spans[:, 1:], device))
    final = torch.tensor([number[tail] for tail in tails], dtype=torch.int64)
    return Plan(len(chunks), buckets, _generations(chunks, number, device), send(final, device))


def _cut(segments: Segments) -> tuple[list[Chunk], list[int]]:
    """(chunks in the order of their tokens, the last chunk on the path of every segment or `-1 - root`)."""
    chunks: list[Chunk] = []
    tails: list[int] = []
    bounds = segments.cu_seqlens.tolist()
    for segment, parent in enumerate(segments.parent.tolist()):
        tail = tails[parent] if parent >= 0 else -1 - segment
        for begin in range(bounds[segment], bounds[segment + 1], CHUNK):
            end = min(begin + CHUNK, bounds[segment + 1])
            chunks.append(Chunk(1 << (end - begin - 1).bit_length(), begin, end, tail))
            tail = len(chunks) - 1
        tails.append(tail)
    return chunks, tails


def _generations(chunks: list[Chunk], number: dict[int, int], device: torch.device) -> list[Generation]:
    depth: list[int] = []
    members: list[list[int]] = []
    for i, chunk in enumerate(chunks):
        depth.append(0 if chunk.before < 0 else depth[chunk.before] + 1)
        if depth[i] == len(members):
            members.append([])
        members[depth[i]].append(i)
    sizes = [len(own) for own in members]
    pairs = [[number[i], number[chunks[i].before]] for own in members for i in own]
    # One copy to the device for all of them.
    flat = send(torch.tensor(pairs, dtype=torch.int64).view(-1, 2), device)
    unique = [len({chunks[i].before for i in own}) == len(own) for own in members]
    parts = zip(flat[:, 0].split(sizes), flat[:, 1].split(sizes), unique, strict=True)
    return [Generation(own, source, not alone) for own, source, alone in parts]


def _merged(counts: Counter[int], slack: int) -> dict[int, int]:
    """The size that chunks of each size are padded to: the next larger one if that adds at most `slack` tokens."""
    sizes = sorted(counts)
    target = {size: size for size in sizes}
    for size, larger in pairwise(sizes):
        if counts[size] * (larger - size) <= slack:
            counts[larger] += counts[size]
            target = {own: larger if padded == size else padded for own, padded in target.items()}
    return target


def _bucket(first: int, size: int, begin: Tensor, end: Tensor, device: torch.device) -> Bucket:
    tokens = begin + torch.arange(size)
    exists = tokens < end
    tokens = send(torch.minimum(tokens, end - 1), device)
    return Bucket(first, tokens, None if bool(exists.all()) else send(exists, device))


class Tile:
    """Some chunks of a bucket, with their inputs as `[k, G, Q, R * P]` (x) and `[k, G, Q, N]` (B, C); R = H / G."""

    def __init__(self, bucket: Bucket, part: slice, inputs: Inputs):
        self.inputs = inputs
        self.tokens = bucket.tokens[part]
        self.chunks = slice(bucket.first + part.start, bucket.first + part.start + len(self.tokens))
        self.exists = None if bucket.exists is None else bucket.exists[part]
        # A step that does not exist has size zero: it decays nothing and adds nothing.
        self.dt = self.existing(self.heads(inputs.dt))
        # `[k, G, R, Q]`, binary logarithms (exp2 costs two thirds of exp). They are subtracted: in float32 a strong
        # decay early in a chunk would cost the weak ones after it their digits. (MPS has no float64.)
        wide = torch.float32 if self.dt.device.type == "mps" else torch.float64
        self.sums = (self.dt * inputs.A).to(wide).mul_(LOG2_E).cumsum(2).transpose(2, 3)

    def heads(self, x: Tensor) -> Tensor:
        """`[T, H]` -> `[k, G, Q, R]`."""
        k, Q = self.tokens.shape
        G = self.inputs.groups
        return x.index_select(0, self.tokens.flatten()).view(k, Q, G, -1).transpose(1, 2)

    def rows(self, x: Tensor) -> Tensor:
        """`[T, G, F]` or `[T, H, P]` -> `[k, G, Q, F]` or `[k, G, Q, R * P]` in the compute dtype."""
        return self.heads(x.flatten(1)).to(self.inputs.dtype)

    def existing(self, x: Tensor) -> Tensor:
        """`[k, G, Q, F]` with zeros past a chunk's end, where the last token's row is repeated."""
        return x if self.exists is None else x * self.exists[:, None, :, None]

    def scatter(self, out: Tensor, value: Tensor) -> None:
        """Write `[k, G, Q, F]` to the rows of `out [T, ...]` that it belongs to."""
        index, value = self.tokens.flatten(), value.transpose(1, 2).reshape(self.tokens.numel(), *out.shape[1:])
        if self.exists is not None:
            index, value = index[self.exists.flatten()], value[self.exists.flatten()]
        out.index_copy_(0, index, value.to(out.dtype))

    def per_head(self, x: Tensor) -> Tensor:
        """`[k, G, Q, R * P]` -> `[k, G, R, Q, P]`."""
        return x.unflatten(-1, (self.inputs.heads_per_group, -1)).transpose(2, 3)

    def scaled(self, x: Tensor, factor: Tensor) -> Tensor:
        """`[k, G, Q, R * P]` times a number a head, `[k, G, Q, R]`."""
        return (x.unflatten(-1, (self.inputs.heads_per_group, -1)) * factor[..., None]).flatten(-2)

    def summed(self, x: Tensor) -> Tensor:
        """`[k, G, Q, R * P]` -> `[k, G, Q, R]`."""
        return x.unflatten(-1, (self.inputs.heads_per_group, -1)).sum(-1)

    def du(self) -> Tensor:
        """Step size times input."""
        return self.scaled(self.rows(self.inputs.x), self.dt)

    def decay_between(self) -> Tensor:
        """`[k, G, R, Q, Q]`: from the token of the column to that of the row, 0 where it comes later."""
        between = self.sums[..., :, None] - self.sums[..., None, :]
        return between.to(self.inputs.dtype).exp2_().tril_()

    def decay_from_start(self) -> Tensor:
        """`[k, G, Q, R]`: from before the first token through each token."""
        return self.sums.to(self.inputs.dtype).exp2().transpose(2, 3)

    def decay_to_end(self) -> Tensor:
        """`[k, G, Q, R]`: from after each token through the last."""
        return (self.sums[..., -1:] - self.sums).to(self.inputs.dtype).exp2().transpose(2, 3)

    def decay(self) -> Tensor:
        """`[k, G, 1, R]`: over the whole chunk."""
        return self.sums[..., -1:].to(self.inputs.dtype).exp2().transpose(2, 3)


@dataclass
class Inputs:
    """The op's inputs as they came (x, B, C) and in the compute dtype (dt, and A as `[G, 1, R]`)."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    dtype: torch.dtype

    @property
    def groups(self) -> int:
        return self.B.shape[1]

    @property
    def heads_per_group(self) -> int:
        return self.A.shape[2]

    @property
    def width(self) -> int:
        return self.x.shape[1] * self.x.shape[2]

    @property
    def state_shape(self) -> tuple[int, int, int]:
        """`[G, N, R * P]`."""
        return self.groups, self.B.shape[2], self.heads_per_group * self.x.shape[2]

    def tiles(self, plan: Plan) -> Iterator[Tile]:
        limit = CPU_TILE if self.x.device.type == "cpu" else GPU_TILE
        for bucket in plan.buckets:
            count, size = bucket.tokens.shape
            step = max(1, limit // (self.x.shape[1] * size * size))
            for start in range(0, count, step):
                yield Tile(bucket, slice(start, min(start + step, count)), self)

    def pack(self, state: Tensor) -> Tensor:
        """`[S, H, P, N]` -> `[S, G, N, R * P]` in the compute dtype."""
        split = state.to(self.dtype).unflatten(1, (self.groups, self.heads_per_group))
        return split.permute(0, 1, 4, 2, 3).flatten(3)

    def unpack(self, state: Tensor) -> Tensor:
        """The reverse of `pack`, in the same dtype."""
        split = state.unflatten(3, (self.heads_per_group, -1))
        return split.permute(0, 1, 3, 4, 2).flatten(1, 2)


def _states(plan: Plan, inputs: Inputs, initial_state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """(starts `[K, G, N, RP]`, ends `[K + S, G, N, RP]` with the roots' after the chunks', decays `[K, G, 1, R]`)."""
    segments = plan.tails.numel()
    starts = inputs.x.new_empty(plan.count, *inputs.state_shape, dtype=inputs.dtype)
    ends = torch.zeros(plan.count + segments, *inputs.state_shape, dtype=inputs.dtype, device=inputs.x.device)
    decays = starts.new_empty(plan.count, inputs.groups, 1, inputs.heads_per_group)
    for tile in inputs.tiles(plan):
        torch.matmul(
            tile.rows(inputs.B).transpose(2, 3), tile.scaled(tile.du(), tile.decay_to_end()), out=ends[tile.chunks]
        )
        decays[tile.chunks] = tile.decay()
    if initial_state is not None:
        ends[plan.count :] = inputs.pack(initial_state)
    for own, source, _ in plan.generations:
        start = ends[source]
        starts[own] = start
        ends[own] += _times(start, decays[own])
    return starts, ends, decays


def _times(state: Tensor, factor: Tensor) -> Tensor:
    """`[K, G, N, R * P]` times a number a head, `[K, G, 1, R]`."""
    return (state.unflatten(3, (factor.shape[3], -1)) * factor[..., None]).flatten(3)


class SSD(torch.autograd.Function):
    """See `mambalign.ops.ssd` for the contract; step sizes come finished, y goes out in the compute dtype."""

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None,
        segments: Segments,
        initial_state: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        inputs = _inputs(x, dt, A, B, C)
        chunks = plan(segments, inputs.width, x.device)
        starts, ends, _ = _states(chunks, inputs, initial_state)
        y = torch.empty(x.shape, dtype=dt.dtype, device=x.device)
        for tile in inputs.tiles(chunks):
            Ct = tile.rows(C)
            within = tile.decay_between().mul_((Ct @ tile.rows(B).transpose(2, 3))[:, :, None])
            out = (within @ tile.per_head(tile.du())).transpose(2, 3).flatten(3)
            out += tile.scaled(Ct @ starts[tile.chunks], tile.decay_from_start())
            tile.scatter(y, out)
        if D is not None:
            y += x * D.to(dt.dtype).view(x.shape[1], -1)
        ctx.save_for_backward(x, dt, A, B, C, D, initial_state)
        ctx.segments = segments
        ctx.set_materialize_grads(False)
        return y, inputs.unpack(ends[chunks.tails])

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_y: Tensor | None, d_finals: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, dt, A, B, C, D, initial_state = ctx.saved_tensors
        inputs = _inputs(x, dt, A, B, C)
        chunks = plan(ctx.segments, inputs.width, x.device)
        starts, _, decays = _states(chunks, inputs, initial_state)
        d_y = torch.zeros(x.shape, dtype=dt.dtype, device=x.device) if d_y is None else d_y
        d_ends = _end_gradients(chunks, inputs, decays, d_y, d_finals)
        d_x, d_dt = torch.empty(x.shape, dtype=dt.dtype, device=x.device), torch.empty_like(dt)
        d_A = torch.zeros_like(inputs.A)
        d_B, d_C = torch.empty_like(B), torch.empty_like(C)
        for tile in inputs.tiles(chunks):
            d_A += _tile_gradients(tile, starts[tile.chunks], d_ends[tile.chunks], d_y, d_x, d_dt, d_B, d_C)
        d_D = None
        if D is not None:
            d_D = (d_y * x).sum(0)
            d_D = (d_D.sum(1) if D.dim() == 1 else d_D).to(D.dtype)
            d_x += d_y * D.to(dt.dtype).view(x.shape[1], -1)
        d_initial = None
        if initial_state is not None:
            d_initial = inputs.unpack(d_ends[chunks.count :]).to(initial_state.dtype)
        return d_x.to(x.dtype), d_dt, d_A.flatten().to(A.dtype), d_B, d_C, d_D, None, d_initial


def _inputs(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Inputs:
    return Inputs(x, dt, A.to(dt.dtype).view(B.shape[1], 1, -1), B, C, dt.dtype)


def _end_gradients(plan: Plan, inputs: Inputs, decays: Tensor, d_y: Tensor, d_finals: Tensor | None) -> Tensor:
    """Gradients of every chunk's end, and after them of the roots' initial states: `[K + S, G, N, R * P]`."""
    shape = (plan.count + plan.tails.numel(), *inputs.state_shape)
    d_ends = torch.zeros(shape, dtype=inputs.dtype, device=d_y.device)
    if d_finals is not None:
        add_rows(d_ends, plan.tails, inputs.pack(d_finals))
    d_starts = torch.empty(plan.count, *inputs.state_shape, dtype=inputs.dtype, device=d_y.device)
    for tile in inputs.tiles(plan):
        scaled = tile.scaled(tile.existing(tile.rows(d_y)), tile.decay_from_start())
        torch.matmul(tile.rows(inputs.C).transpose(2, 3), scaled, out=d_starts[tile.chunks])
    for own, source, forks in reversed(plan.generations):
        d_start = d_starts[own] + _times(d_ends[own], decays[own])
        if forks:
            add_rows(d_ends, source, d_start)
        else:  # without a sort
            d_ends[source] += d_start
    return d_ends


def _tile_gradients(
    tile: Tile, start: Tensor, d_end: Tensor, d_y: Tensor, d_x: Tensor, d_dt: Tensor, d_B: Tensor, d_C: Tensor
) -> Tensor:
    """Fills the tile's rows of d_x, d_dt, d_B and d_C; returns its share of d_A. `sums` are those of dt * A."""
    x, Bt, Ct = (tile.rows(t) for t in (tile.inputs.x, tile.inputs.B, tile.inputs.C))
    du, d_out = tile.scaled(x, tile.dt), tile.existing(tile.rows(d_y))
    # Within the chunk: out = (C B^T * decay) du.
    decay, scores = tile.decay_between(), Ct @ Bt.transpose(2, 3)
    d_within = (tile.per_head(d_out) @ tile.per_head(du).transpose(3, 4)).mul_(decay)
    d_scores = d_within.sum(2)
    # Of its logarithm. What a token gives itself has not decayed; left in, it would only cancel, up to rounding.
    d_decay = d_within.mul_(scores[:, :, None]).tril_(-1)
    # Of the logarithms' sums up to each token: large terms that nearly cancel.
    d_sums = d_decay.sum(4, dtype=tile.sums.dtype) - d_decay.sum(3, dtype=tile.sums.dtype)
    d_du = (decay.mul_(scores[:, :, None]).transpose(3, 4) @ tile.per_head(d_out)).transpose(2, 3).flatten(3)
    d_Bt, d_Ct = d_scores.transpose(2, 3) @ Ct, d_scores @ Bt
    # From the start: out = decay_from_start * (C start).
    scaled = tile.scaled(d_out, tile.decay_from_start())
    d_Ct += scaled @ start.transpose(2, 3)
    d_sums += tile.summed((Ct @ start).mul_(scaled)).transpose(2, 3)
    # To the end: end = B^T (decay_to_end * du) + decay * start.
    to_end = tile.decay_to_end()
    scaled = tile.scaled(du, to_end)
    d_Bt += scaled @ d_end.transpose(2, 3)
    d_scaled = Bt @ d_end
    d_du += tile.scaled(d_scaled, to_end)
    d_to_end = tile.summed(d_scaled.mul_(scaled)).to(d_sums.dtype).transpose(2, 3)
    d_sums -= d_to_end
    kept = tile.summed(_times(start, tile.decay()).mul_(d_end)).sum(2)
    d_sums[..., -1] += d_to_end.sum(3) + kept
    d_steps = d_sums.flip(3).cumsum(3).flip(3).transpose(2, 3).to(tile.dt.dtype)
    tile.scatter(d_dt, d_steps * tile.inputs.A + tile.summed(d_du * x))
    tile.scatter(d_x, tile.scaled(d_du, tile.dt))
    tile.scatter(d_B, d_Bt)
    tile.scatter(d_C, d_Ct)
    return (d_steps * tile.dt).sum((0, 2))[:, None]


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_limit: tuple[float, float],
    segments: Segments,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Chunked PyTorch backend; arguments as `mambalign.ops.reference.ssd`."""
    dtype = compute_dtype(x, dt, A, B, C, initial_state)
    step = step_size(dt, dt_bias, dt_softplus, dt_limit, dtype)
    y, final_state = SSD.apply(x, step, A, B, C, D, segments, initial_state)
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(x.dtype), final_state
