"""RMS norm (arXiv 1910.07467), alone and with the residual addition before it. Public ops and choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from mambalign.ops import cuda_norm, reference
from mambalign.ops.backends import select
from mambalign.ops.reference import compute_dtype


def _torch(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype, sum_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rounded before the weight is applied, to the dtype of what is normed, as transformers does it."""
    total = x if residual is None else x.to(sum_dtype) + residual
    return (weight * normalised(total, eps).to(total.dtype)).to(dtype), total.to(sum_dtype)


def normalised(x: Tensor, eps: float) -> Tensor:
    """`x / rms(x)` in fp32, or in fp64 for fp64: transformers' norms would round fp64 to fp32."""
    exact = x.to(compute_dtype(x))
    return exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)


BACKENDS = {"cuda": cuda_norm.add_rms_norm, "torch": _torch, "reference": reference.add_rms_norm}


def select_backend(backend: str, device: torch.device, *inputs: Tensor | None) -> tuple[str, str]:
    """(name, reason) of the backend that runs on `device`, for these inputs (x first) where given.

    Raises:
        ValueError: a named backend that does not exist, or cannot run on them.
    """
    return select("rms_norm", backend, BACKENDS, cuda_norm.unavailable(device, *inputs))


def rms_norm(
    x: Tensor, weight: Tensor, eps: float = 1e-5, dtype: torch.dtype | None = None, backend: str = "auto"
) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last axis, the mean in at least fp32.

    Args:
        x: `[..., H]`, bf16, fp16, fp32 or fp64. weight: `[H]`.
        dtype: of the result; None means that of `weight * x`.
        backend: "auto", or a name from `BACKENDS`; a named backend always wins, and raises if it cannot run.

    Returns:
        `[..., H]`. Gradients flow to `x` and `weight`.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> y = rms_norm(torch.randn(5, 8), torch.ones(8))
    """
    return add_rms_norm(x, None, weight, eps, dtype, backend=backend)[0]


def add_rms_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    eps: float = 1e-5,
    dtype: torch.dtype | None = None,
    residual_dtype: torch.dtype | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`h = x + residual`, and `rms_norm(h, weight)`: the two ends of pre-norm residual blocks, each read once.

    The backward pass adds the gradient that comes down the residual stream to the norm's own, and writes the sum in
    the dtypes of `x` and of `residual`, in one pass too.

    Args:
        x: `[..., H]`, what the block before adds to the stream; bf16, fp16, fp32 or fp64. residual: the same shape,
            the stream before that, or None at its beginning.
        weight: `[H]`.
        dtype: of the norm; None means that of `weight * h`.
        residual_dtype: of h, or wider where `x` or `residual` is wider; None means as they are.
        backend: as for `rms_norm`.

    Returns:
        (norm, h), both `[..., H]`. Gradients flow to `x`, `residual` and `weight`.

    Raises:
        ValueError: shapes or devices that do not fit.

    Example:
        >>> norm, h = add_rms_norm(torch.randn(5, 8).bfloat16(), torch.randn(5, 8), torch.ones(8), dtype=torch.bfloat16)
        >>> norm.dtype, h.dtype
        (torch.bfloat16, torch.float32)
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must have shape {list(x.shape[-1:])}, got {list(weight.shape)}")
    sum_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"add_rms_norm: residual must have shape {list(x.shape)}, got {list(residual.shape)}")
    if residual is not None and residual.device != x.device:
        raise ValueError(f"add_rms_norm: residual is on {residual.device}, x on {x.device}")
    dtype = torch.promote_types(sum_dtype, weight.dtype) if dtype is None else dtype
    sum_dtype = sum_dtype if residual_dtype is None else torch.promote_types(sum_dtype, residual_dtype)
    run = BACKENDS[select_backend(backend, x.device, x, residual, weight)[0]]
    return run(x, residual, weight, eps, dtype, sum_dtype)
