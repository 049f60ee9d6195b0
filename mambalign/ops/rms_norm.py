"""RMS norm (arXiv 1910.07467): the norm before every Mamba block. Public op and choice of backend."""

from __future__ import annotations

import torch
from torch import Tensor

from mambalign.ops import cuda_norm, reference
from mambalign.ops.backends import select
from mambalign.ops.reference import compute_dtype


def _torch(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """Rounded to x's dtype before the weight is applied, as transformers does it."""
    return (weight * normalised(x, eps).to(x.dtype)).to(dtype)


def normalised(x: Tensor, eps: float) -> Tensor:
    """`x / rms(x)` in fp32, or in fp64 for fp64: transformers' norms would round fp64 to fp32."""
    exact = x.to(compute_dtype(x))
    return exact * torch.rsqrt(exact.pow(2).mean(-1, keepdim=True) + eps)


BACKENDS = {"cuda": cuda_norm.rms_norm, "torch": _torch, "reference": reference.rms_norm}


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
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"rms_norm: weight must have shape {list(x.shape[-1:])}, got {list(weight.shape)}")
    dtype = torch.promote_types(x.dtype, weight.dtype) if dtype is None else dtype
    return BACKENDS[select_backend(backend, x.device, x, weight)[0]](x, weight, eps, dtype)
