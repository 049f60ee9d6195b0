"""The gated RMS norm inside Mamba-2's block. Public op; plain PyTorch on any device."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mambalign.ops.reference import compute_dtype
from mambalign.ops.rms_norm import normalised


def gated_rms_norm(
    x: Tensor,
    z: Tensor,
    weight: Tensor,
    eps: float = 1e-5,
    group_size: int | None = None,
    norm_before_gate: bool = False,
) -> Tensor:
    """`norm(x * silu(z)) * weight`, or `norm(x) * weight * silu(z)`, the mean over each group of the last axis.

    The norm of Mamba-2's block (arXiv 2405.21060, section 7.2); each group can live on a device of its own there. Only
    the arguments are kept for the backward pass, which computes the rest again.

    Args:
        x, z: `[..., H]`, bf16, fp16, fp32 or fp64. weight: `[H]`.
        group_size: elements that share a mean, a divisor of H; None means H.
        norm_before_gate: the second form; published Mamba-2 models have the first.

    Returns:
        `[..., H]` in x's dtype; gate and mean are fp32 (fp64 for fp64) inside. Gradients flow to x, z and weight.

    Raises:
        ValueError: shapes that do not fit.

    Example:
        >>> y = gated_rms_norm(torch.randn(5, 8), torch.randn(5, 8), torch.ones(8), group_size=4)
    """
    width = x.shape[-1]
    if z.shape != x.shape or weight.shape != (width,):
        raise ValueError(
            f"gated_rms_norm: z must have shape {list(x.shape)} and weight [{width}], got {list(z.shape)} and "
            f"{list(weight.shape)}"
        )
    group_size = width if group_size is None else group_size
    if group_size < 1 or width % group_size:
        raise ValueError(f"gated_rms_norm: group_size = {group_size} does not divide {width}")
    arguments = (x, z, weight, eps, group_size, norm_before_gate)
    if not torch.is_grad_enabled():
        return _gated(*arguments)
    y: Tensor = checkpoint(_gated, *arguments, use_reentrant=False, preserve_rng_state=False)
    return y


def _gated(x: Tensor, z: Tensor, weight: Tensor, eps: float, group_size: int, norm_before_gate: bool) -> Tensor:
    exact = x.to(compute_dtype(x))
    gate = F.silu(z.to(exact.dtype))
    gated = exact if norm_before_gate else exact * gate
    # Rounded before the weight is applied, as transformers does it.
    normed = weight * normalised(gated.unflatten(-1, (-1, group_size)), eps).flatten(-2).to(x.dtype)
    return (normed * gate if norm_before_gate else normed).to(x.dtype)
