"""The state-space dual scan: Mamba-2's recurrence over packed, forked segments. Public op and choice of backend."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mambalign.ops import fla_ssd, reference, torch_ssd
from mambalign.ops.backends import select
from mambalign.ops.segments import Segments, whole

BACKENDS = {"cuda": fla_ssd.ssd, "torch": torch_ssd.ssd, "reference": reference.ssd}


def select_backend(backend: str, device: torch.device, *inputs: Tensor | None) -> tuple[str, str]:
    """(name, reason) of the backend that runs on `device`, for these inputs (x first, then B) where given.

    Raises:
        ValueError: a named backend that does not exist, or cannot run on them.
    """
    return select("ssd", backend, BACKENDS, fla_ssd.unavailable(device, *inputs), fla_ssd.REASON)


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    segments: Segments | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]^T`, `y[t] = h[t] C[t] + D x[t]`, times `silu(z[t])` if given.

    The state-space dual model of Mamba-2 (arXiv 2405.21060, sections 6 and 7) on packed tokens, with one decay a head:
    `h[t-1]` is the state before t *along t's own path* (see `Segments`), so nothing leaks between sequences and
    children continue from their parent's last state.

    Args:
        x: `[T, H, P]` inputs (H heads of P channels), bf16, fp16, fp32 or fp64.
        dt: `[T, H]` step sizes before `dt_bias`, softplus and the limits.
        A: `[H]`, negative. B, C: `[T, G, N]`; head h uses group `h // (H / G)`. D: `[H]`, `[H, P]` or None.
        z: `[T, H, P]` or None. dt_bias: `[H]` or None.
        dt_limit: (lowest, highest) step size after softplus; a clamped step passes no gradient.
        segments: boundaries and forks; None means one sequence.
        initial_state: `[S, H, P, N]`; rows of roots are where they start, rows of children are ignored (zero gradient).
        output_final_state: also return the state after the last token of every segment.
        backend: "auto", or a name from `BACKENDS`; a named backend always wins, and raises if it cannot run. "cuda"
            are flash-linear-attention's kernels, for 16-bit x.

    Returns:
        y `[T, H, P]` in x's dtype, and if asked final_state `[S, H, P, N]` in fp32 (fp64 for fp64 inputs). Sums and
        states are fp32 (fp64) inside. Gradients flow to every tensor argument, also through `final_state` and across
        forks.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit, naming the argument.

    Example:
        >>> T, H, P, G, N = 6, 4, 3, 2, 5
        >>> x, dt, B, C = torch.randn(T, H, P), torch.rand(T, H), torch.randn(T, G, N), torch.randn(T, G, N)
        >>> y = ssd(x, dt, -torch.ones(H), B, C, segments=Segments.from_lengths([2, 4]))
    """
    segments = whole(x.shape[0]) if segments is None else segments
    dt_limit = (float(dt_limit[0]), float(dt_limit[1]))
    _check(x, dt, A, B, C, D, z, dt_bias, dt_limit, segments, initial_state)
    run = BACKENDS[select_backend(backend, x.device, x, B, dt, A, C, D, z, dt_bias, initial_state)[0]]
    y, final_state = run(x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, segments, initial_state)
    return (y, final_state) if output_final_state else y


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_limit: tuple[float, float],
    segments: Segments,
    initial_state: Tensor | None,
) -> None:
    if x.dim() != 3 or B.dim() != 3:
        raise ValueError(f"ssd: x must be [T, H, P] and B [T, G, N], got {list(x.shape)} and {list(B.shape)}")
    (T, H, P), (_, G, N), S = x.shape, B.shape, segments.num_segments
    if G < 1 or H % G:
        raise ValueError(f"ssd: the {H} heads of x must be a multiple of the {G} groups of B")
    if not 0 <= dt_limit[0] < dt_limit[1]:
        raise ValueError(f"ssd: dt_limit must be two increasing numbers from 0 on, got {dt_limit}")
    if segments.num_tokens != T:
        raise ValueError(f"ssd: segments cover {segments.num_tokens} tokens, x has {T}")
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "x": (x, (T, H, P)),
        "dt": (dt, (T, H)),
        "A": (A, (H,)),
        "B": (B, (T, G, N)),
        "C": (C, (T, G, N)),
        "D": (D, (H,) if D is None or D.dim() == 1 else (H, P)),
        "z": (z, (T, H, P)),
        "dt_bias": (dt_bias, (H,)),
        "initial_state": (initial_state, (S, H, P, N)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"ssd: {name} must have shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"ssd: {name} is on {tensor.device}, x on {x.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"ssd: {name} must be floating point, got {tensor.dtype}")
