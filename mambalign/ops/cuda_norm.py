"""RMS norm on a GPU: `rms_norm.cu`. One pass each way, in any mix of input and output types."""

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


class RMSNorm(torch.autograd.Function):
    """See `mambalign.ops.rms_norm` for the contract."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        x = x.contiguous()
        y = torch.empty(x.shape, dtype=dtype, device=x.device)
        scales = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
        _launch("norm_forward", x, dtype, weight=weight.float().contiguous(), y=y, scales=scales, eps=eps)
        ctx.save_for_backward(x, weight, scales)
        ctx.dtype = dtype
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        d_weights = torch.zeros(_blocks(x), x.shape[-1], dtype=torch.float32, device=x.device)
        given = {"weight": weight.float().contiguous(), "d_y": d_y.to(ctx.dtype).contiguous(), "scales": scales}
        _launch("norm_backward", x, ctx.dtype, d_x=d_x, d_weights=d_weights, **given)
        return d_x, d_weights.sum(0).to(weight.dtype), None, None


def module(macros: tuple[tuple[str, int], ...], device: torch.device) -> Any:
    return nvrtc.module(SOURCE, macros, device)


def _blocks(x: Tensor) -> int:
    return min(x.numel() // max(x.shape[-1], 1), MOST_BLOCKS)


def _launch(kernel: str, x: Tensor, dtype: torch.dtype, **values: Any) -> None:
    macros = (("IO", IO[dtype]), ("X_IO", IO[x.dtype]), ("WIDTH", x.shape[-1]))
    common = {"x": x, "num_rows": x.numel() // max(x.shape[-1], 1)}
    module(macros, x.device).launch(kernel, (_blocks(x), 1), THREADS, common | values)


def rms_norm(x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
    """CUDA backend; arguments as `mambalign.ops.reference.rms_norm`."""
    y: Tensor = RMSNorm.apply(x, weight, eps, dtype)
    return y
