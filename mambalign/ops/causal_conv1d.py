"""Depthwise causal convolution over packed, forked segments. Public op and choice of backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mambalign.ops import cuda_conv, reference, torch_conv
from mambalign.ops.backends import select
from mambalign.ops.halves import JointGradient
from mambalign.ops.segments import Segments, whole

BACKENDS: dict[str, Any] = {
    "cuda": cuda_conv.causal_conv1d,
    "torch": torch_conv.causal_conv1d,
    "reference": reference.causal_conv1d,
}


def select_backend(backend: str, device: torch.device, *inputs: Tensor | None) -> tuple[str, str]:
    """(name, reason) of the backend that runs on `device`, for these inputs (weight first) where given.

    Raises:
        ValueError: a named backend that does not exist, or cannot run on them.
    """
    return select("causal_conv1d", backend, BACKENDS, cuda_conv.unavailable(device, *inputs))


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    segments: Segments | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    joint: JointGradient | None = None,
    twice: bool = False,
    backend: str = "auto",
) -> Any:
    """`y[t] = activation(bias + sum_j weight[:, j] x[t - (W - 1) + j])`, each token seeing only its own path.

    The convolution of Mamba's block (arXiv 2312.00752, section 3.4). The window crosses forks: the first tokens of a
    child see the last inputs of its parent, of the grandparent too where the parent is shorter than W - 1, and before a
    root its initial window or zeros.

    Args:
        x: `[T, D]`, bf16, fp16, fp32 or fp64. weight: `[D, W]`. bias: `[D]` or None.
        activation: None or "silu".
        segments: boundaries and forks; None means one sequence.
        initial_state: `[S, D, W - 1]` inputs before each root, oldest first; rows of children are ignored (zero
            gradient).
        output_final_state: also return the last W - 1 inputs of every segment's path.
        joint: what `halves` gave with x: where x's gradient may be written beside that of the other half.
        twice: return y as a pair of tensors over the same memory, for two users of it: their gradients then arrive
            apart, and are added where they are read.
        backend: "auto", or a name from `BACKENDS`; a named backend always wins, and raises if it cannot run.

    Returns:
        y `[T, D]` (or a pair of it) in x's dtype, and if asked final_state `[S, D, W - 1]` in x's dtype. Accumulation
        is fp32 (fp64 for fp64 inputs). Gradients flow to every tensor argument, also through `final_state` and across
        forks.

    Raises:
        ValueError: shapes, devices or dtypes that do not fit, or an unknown activation.

    Example:
        >>> y = causal_conv1d(torch.randn(6, 4), torch.randn(4, 3), segments=Segments.from_lengths([1, 5]))
    """
    segments = whole(x.shape[0]) if segments is None else segments
    _check(x, weight, bias, activation, segments, initial_state)
    name = select_backend(backend, x.device, weight, x, bias, initial_state)[0]
    inputs = x, weight, bias, activation, segments, initial_state, output_final_state
    if name == "cuda":
        y, final_state, again = cuda_conv.causal_conv1d(*inputs, joint)
    else:
        y, final_state = BACKENDS[name](*inputs)
        again = y
    given = (y, again) if twice else y
    return (given, final_state) if output_final_state else given


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    segments: Segments,
    initial_state: Tensor | None,
) -> None:
    if x.dim() != 2 or weight.dim() != 2:
        raise ValueError(
            f"causal_conv1d: x must be [T, D] and weight [D, W], got {list(x.shape)} and {list(weight.shape)}"
        )
    if activation not in (None, "silu"):
        raise ValueError(f"causal_conv1d: activation must be None or 'silu', got {activation!r}")
    if segments.num_tokens != x.shape[0]:
        raise ValueError(f"causal_conv1d: segments cover {segments.num_tokens} tokens, x has {x.shape[0]}")
    expected: dict[str, tuple[Tensor | None, tuple[int, ...]]] = {
        "weight": (weight, (x.shape[1], weight.shape[1])),
        "bias": (bias, (x.shape[1],)),
        "initial_state": (initial_state, (segments.num_segments, x.shape[1], weight.shape[1] - 1)),
    }
    for name, (tensor, shape) in expected.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape:
            raise ValueError(f"causal_conv1d: {name} must have shape {list(shape)}, got {list(tensor.shape)}")
        if tensor.device != x.device:
            raise ValueError(f"causal_conv1d: {name} is on {tensor.device}, x on {x.device}")
        if not tensor.is_floating_point():
            raise ValueError(f"causal_conv1d: {name} must be floating point, got {tensor.dtype}")
