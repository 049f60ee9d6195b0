"""The selective scan: Mamba-1's recurrence over packed, forked segments. Public op and choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from mambalign.ops import cuda_scan, reference, torch_scan
from mambalign.ops.backends import select
from mambalign.ops.halves import JointGradient
from mambalign.ops.segments import Segments, whole

BACKENDS = {
    "cuda": cuda_scan.selective_scan,
    "torch": torch_scan.selective_scan,
    "reference": reference.selective_scan,
}


def select_backend(backend: str, device: torch.device, *inputs: Tensor | None) -> tuple[str, str]:
    """(name, reason) of the backend that runs on `device`, for these inputs (A first) where given.

    Raises:
        ValueError: a named backend that does not exist, or cannot run on them.
    """
    return select("selective_scan", backend, BACKENDS, cuda_scan.unavailable(device, *inputs))


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    segments: Segments | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    joint: JointGradient | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """`h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]`, `y[t] = C[t] h[t] + D u[t]`, times `silu(z[t])` if given.

    Equations (2a, 2b) of Mamba (arXiv 2312.00752) with the discretisation of its section 3.2, on packed tokens:
    `h[t-1]` is the state before t *along t's own path* (see `Segments`), so nothing leaks between sequences and
    children continue from their parent's last state.

    Args:
        u: `[T, D]` inputs, bf16, fp16, fp32 or fp64.
        delta: `[T, D]` step sizes before `delta_bias` and softplus.
        A: `[D, N]`, negative. B, C: `[T, N]`. D: `[D]` or None. z: `[T, D]` or None. delta_bias: `[D]` or None.
        segments: boundaries and forks; None means one sequence.
        initial_state: `[S, D, N]`; rows of roots are where they start, rows of children are ignored (zero gradient).
        output_final_state: also return the state after the last token of every segment.
        joint: what `halves` gave with z: where z's gradient may be written beside that of the other half.
        backend: "auto", or a name from `BACKENDS`; a named backend always wins, and raises if it cannot run.

    Returns:
        y `[T, D]` in u's dtype, and if asked final_state `[S, D, N]` in fp32 (fp64 for fp64 inputs). Sums and states
        are fp32 (fp64) inside. Gradients flow to every tensor argument, also through `final_state` and across forks.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit, naming the argument.

    Example:
        >>> T, D, N = 6, 4, 2
        >>> u, delta, B, C = torch.randn(T, D), torch.rand(T, D), torch.randn(T, N), torch.randn(T, N)
        >>> y = selective_scan(u, delta, -torch.ones(D, N), B, C, segments=Segments.from_lengths([2, 4]))
    """
    segments = whole(u.shape[0]) if segments is None else segments
    _check(u, delta, A, B, C, D, z, delta_bias, segments, initial_state)
    name = select_backend(backend, u.device, A, u, delta, B, C, D, z, delta_bias, initial_state)[0]
    inputs = u, delta, A, B, C, D, z, delta_bias, delta_softplus, segments, initial_state, output_final_state
    y, final_state = BACKENDS[name](*inputs, joint) if name == "cuda" else BACKENDS[name](*inputs)
    if not output_final_state:
        return y
    assert final_state is not None
    return y, final_state


def _check(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    segments: Segments,
    initial_state: Tensor | None,
) -> None:
    if u.dim() != 2 or A.dim() != 2:
        raise ValueError(f"selective_scan: u must be [T, D] and A [D, N], got {list(u.shape)} and {list(A.shape)}")
    (T, D_), N, S = u.shape, A.shape[1], segments.num_segments
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "delta": (delta, (T, D_)),
        "A": (A, (D_, N)),
        "B": (B, (T, N)),
        "C": (C, (T, N)),
        "D": (D, (D_,)),
        "z": (z, (T, D_)),
        "delta_bias": (delta_bias, (D_,)),
        "initial_state": (initial_state, (S, D_, N)),
    }
    if segments.num_tokens != T:
        raise ValueError(f"selective_scan: segments cover {segments.num_tokens} tokens, u has {T}")
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"selective_scan: {name} must have shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != u.device:
            raise ValueError(f"selective_scan: {name} is on {tensor.device}, u on {u.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"selective_scan: {name} must be floating point, got {tensor.dtype}")
