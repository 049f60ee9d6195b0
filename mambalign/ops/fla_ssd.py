"""State-space dual scan on flash-linear-attention's Triton kernels (extra `mamba2`).

Mamba-2's recurrence is their "simple GLA": queries C, keys B, values dt * x, and the logarithm dt * A of one decay a
head. Their kernels take packed sequences and initial states, not forks: segments of one tree level are one call, and
children start from their parents' final states.

They want B and C once a head, which is most of what a call would keep for its backward pass: it is made again there.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib import import_module, metadata
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mambalign.ops.backends import send, take_rows, without_autocast
from mambalign.ops.reference import step_size
from mambalign.ops.segments import Segments

REASON = "flash-linear-attention's kernels"
STATES = 256  # theirs, for 16-bit inputs
# Their backward pass refuses to run there: https://github.com/fla-org/flash-linear-attention/issues/640.
HOPPER, BROKEN_ON_HOPPER = 9, ((3, 4, 0), (3, 7, 1))


@cache
def kernel() -> Any:
    """Their `chunk_simple_gla`, or the error that says why there is none."""
    try:
        return import_module("fla.ops.simple_gla").chunk_simple_gla
    except (ImportError, AttributeError, RuntimeError) as error:  # the latter two with a Triton they do not know
        return error


@cache
def triton() -> tuple[int, ...]:
    """Its version."""
    return tuple(int(part) for part in re.findall(r"\d+", metadata.version("triton"))[:3])


def unavailable(
    device: torch.device, x: Tensor | None = None, B: Tensor | None = None, *_: Tensor | None
) -> str | None:
    """Why this backend cannot run on `device`, for these inputs where given; None if it can."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if isinstance(kernel(), Exception):
        return f"needs flash-linear-attention (pip install 'mambalign[mamba2]'): {kernel()}"
    if torch.cuda.get_device_capability(device)[0] == HOPPER and BROKEN_ON_HOPPER[0] <= triton() < BROKEN_ON_HOPPER[1]:
        written = ".".join(map(str, triton()))
        return f"would go backwards wrongly with Triton {written} on this GPU, which needs 3.7.1 or newer"
    if x is not None and x.dtype not in (torch.bfloat16, torch.float16):
        return f"takes 16-bit x, not {x.dtype}: it would round float32 products to TF32"
    if B is not None and B.shape[2] > STATES:
        return f"takes up to {STATES} states, not {B.shape[2]}"
    return None


@dataclass
class Level:
    """Segments of one tree level; their kernels see only those that have tokens (`filled`)."""

    segments: Tensor
    parents: Tensor  # -1 at roots
    filled: Tensor  # positions in `segments`
    tokens: Tensor
    cu_seqlens: Tensor  # int32, of the filled segments


def plan(segments: Segments, device: torch.device) -> list[Level]:
    key = ("fla ssd", str(device))
    if key not in segments.memo:
        segments.memo[key] = [_level(segments, torch.tensor(level), device) for level in segments.levels]
    return segments.memo[key]


def _level(segments: Segments, members: Tensor, device: torch.device) -> Level:
    filled = (segments.lengths[members] > 0).nonzero()[:, 0]
    lengths = segments.lengths[members[filled]]
    cu_seqlens = F.pad(lengths.cumsum(0), (1, 0))
    shift = torch.repeat_interleave(segments.cu_seqlens[members[filled]] - cu_seqlens[:-1], lengths)
    parts = (members, segments.parent[members], filled, torch.arange(len(shift)) + shift, cu_seqlens.int())
    return Level(*(send(part, device) for part in parts))


def _run(x: Tensor, step: Tensor, A: Tensor, B: Tensor, C: Tensor, entry: Tensor, cu_seqlens: Tensor) -> Any:
    """(y `[T, H, P]`, final states) of sequences that start from `entry [S, H, N, P]`."""
    heads = x.shape[1]
    queries, keys = (t.to(x.dtype).repeat_interleave(heads // t.shape[1], dim=1)[None] for t in (C, B))
    values = (step[..., None] * x).to(x.dtype)[None]
    y, finals = kernel()(
        q=queries,
        k=keys,
        v=values,
        g=(step * A)[None],
        scale=1.0,
        initial_state=entry,
        output_final_state=True,
        cu_seqlens=cu_seqlens,
    )
    return y[0], finals


@without_autocast
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
    """Arguments as `mambalign.ops.reference.ssd`."""
    step = step_size(dt, dt_bias, dt_softplus, dt_limit, torch.float32)
    A = A.float()
    finals = torch.zeros(segments.num_segments, x.shape[1], B.shape[2], x.shape[2], device=x.device)
    initial = finals if initial_state is None else initial_state.float().transpose(2, 3)
    y = torch.zeros_like(x)
    for level in plan(segments, x.device):
        parents = take_rows(finals, level.parents.clamp(min=0))
        entry = torch.where((level.parents < 0)[:, None, None, None], initial[level.segments], parents)
        if level.tokens.numel():
            inputs = [take_rows(t, level.tokens) for t in (x, step, B, C)]
            out, final = checkpoint(
                _run,
                *inputs[:2],
                A,
                *inputs[2:],
                take_rows(entry, level.filled),
                level.cu_seqlens,
                use_reentrant=False,
                preserve_rng_state=False,
            )
            y = y.index_copy(0, level.tokens, out)
            entry = entry.index_copy(0, level.filled, final)
        finals = finals.index_copy(0, level.segments, entry)
    if D is not None:
        y = y + x * D.float().view(x.shape[1], -1)
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(x.dtype), finals.transpose(2, 3)
