"""Residual addition and RMS norm on a GPU: `rms_norm.cu`. One pass each way, in any mix of types."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambalign.ops import nvrtc
from mambalign.ops.nvrtc import IO

SOURCE = Path(__file__).with_name("rms_norm.cu")
THREADS = 128
WIDEST = 8192  # a thread holds its share of a row, and of the weight's gradient, in registers
MOST_BLOCKS = 1024  # that sum the weight's gradient apart


def unavailable(device: torch.device, x: Tensor | None = None, *others: Tensor | None) -> str | None:
    """Why this backend cannot run on `device`, or on these inputs; None if it can."""
    if x is not None and x.shape[-1] > WIDEST:
        return f"holds rows of at most {WIDEST} elements, x has {x.shape[-1]}"
    return nvrtc.unavailable(device, x, *others)


class AddRMSNorm(torch.autograd.Function):
    """See `mambalign.ops.rms_norm.add_rms_norm` for the contract."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
        sum_dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        ctx.residual_dtype, ctx.x_dtype, ctx.dtype = residual if residual is None else residual.dtype, x.dtype, dtype
        ctx.set_materialize_grads(False)
        given = x.contiguous()
        # Where nothing is added and nothing widened the sum is x itself, and is not written.
        total = x if residual is None and x.dtype == sum_dtype else x.new_empty(x.shape, dtype=sum_dtype)
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        values = {
            "x": given,
            "residual": None if residual is None else residual.to(sum_dtype).contiguous(),
            "total": None if total is x else total,
            "y": y,
            "scales": scales,
            "weight": weight.float().contiguous(),
            "eps": eps,
        }
        _launch("norm_forward", x, dtype, sum_dtype, values)
        ctx.save_for_backward(given if total is x else total, weight, scales)
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor | None, d_total: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, scales = ctx.saved_tensors
        if d_y is None:
            d_y = torch.zeros(total.shape, dtype=ctx.dtype, device=total.device)
        # Gradients for x and for the residual are the same numbers: written once where their types are the same.
        d_x = torch.empty(total.shape, dtype=ctx.x_dtype, device=total.device)
        d_residual = None
        if ctx.residual_dtype is not None:
            d_residual = d_x if total.dtype == ctx.x_dtype else torch.empty_like(total)
        d_weights = torch.zeros(_blocks(total), total.shape[-1], dtype=torch.float32, device=total.device)
        values = {
            "saved": total,
            "scales": scales,
            "weight": weight.float().contiguous(),
            "d_y": d_y.to(ctx.dtype).contiguous(),
            "d_total": None if d_total is None else d_total.to(total.dtype).contiguous(),
            "d_x": d_x,
            "d_residual": None if d_residual is d_x else d_residual,
            "d_weights": d_weights,
        }
        _launch("norm_backward", d_x, ctx.dtype, total.dtype, values)
        d_residual = None if d_residual is None else d_residual.to(ctx.residual_dtype)
        return d_x, d_residual, d_weights.sum(0).to(weight.dtype), None, None, None


def module(macros: tuple[tuple[str, int], ...], device: torch.device) -> Any:
    return nvrtc.module(SOURCE, macros, device)


def _blocks(x: Tensor) -> int:
    return min(x.numel() // max(x.shape[-1], 1), MOST_BLOCKS)


def _launch(kernel: str, x: Tensor, dtype: torch.dtype, sum_dtype: torch.dtype, values: dict[str, Any]) -> None:
    macros = (("IO", IO[dtype]), ("X_IO", IO[x.dtype]), ("SUM_IO", IO[sum_dtype]), ("WIDTH", x.shape[-1]))
    rows = x.numel() // max(x.shape[-1], 1)
    module(macros, x.device).launch(kernel, (_blocks(x), 1), THREADS, {"num_rows": rows} | values)


def add_rms_norm(*args: Any) -> tuple[Tensor, Tensor]:
    """CUDA backend; arguments as `mambalign.ops.reference.add_rms_norm`."""
    y, total = AddRMSNorm.apply(*args)
    return y, total


def add_rms_norm_into(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, y: Tensor, total: Tensor, scales: Tensor
) -> None:
    """The forward pass into buffers, for a CUDA graph: `y` the norm, `total` the sum (it may be `residual`).

    All contiguous `[rows, H]`, `residual` in `total`'s dtype. weight: fp32 `[H]`. scales: fp32 `[rows]`, 1 / rms.
    """
    values = {"x": x, "residual": residual, "total": total, "y": y, "scales": scales, "weight": weight, "eps": eps}
    _launch("norm_forward", x, y.dtype, total.dtype, values)
