"""Residual addition and RMS norm on a GPU: `rms_norm.cu`. One pass each way, in any mix of types."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambalign.ops import nvrtc
from mambalign.ops.nvrtc import IO

SOURCE = Path(__file__).with_name("rms_norm.cu")
WIDEST = 8192  # elements: 8 a thread, of this row and of the next, and of the weight's gradient, are in registers
# Threads that a multiprocessor holds by these registers (a thread has 48 forwards and 90 backwards, sm_90).
FORWARD_THREADS, BACKWARD_THREADS = 1280, 768


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
        launcher = _launcher(x.shape[-1], dtype, x.dtype, sum_dtype, weight.dtype, x.device)
        rows = scales.numel()
        values = {
            "x": given,
            "residual": None if residual is None else residual.to(sum_dtype).contiguous(),
            "total": None if total is x else total,
            "y": y,
            "scales": scales,
            "weight": weight.contiguous(),
            "eps": eps,
        }
        launcher("norm_forward", rows, launcher.blocks(rows, FORWARD_THREADS), values)
        ctx.launcher = launcher
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
        launcher: _Launcher = ctx.launcher
        rows, width = scales.numel(), total.shape[-1]
        blocks = launcher.blocks(rows, BACKWARD_THREADS)
        d_weight = torch.empty(width, dtype=weight.dtype, device=weight.device)
        values = {
            "saved": total,
            "scales": scales,
            "weight": weight.contiguous(),
            "d_y": d_y.to(ctx.dtype).contiguous(),
            "d_total": None if d_total is None else d_total.to(total.dtype).contiguous(),
            "d_x": d_x,
            "d_residual": None if d_residual is d_x else d_residual,
            "d_weights": torch.empty(blocks, width, dtype=torch.float32, device=total.device),
            "d_weight": d_weight,
            "num_shares": blocks,
        }
        launcher("norm_backward", rows, blocks, values)
        launcher.sum_weight(values)
        d_residual = None if d_residual is None else d_residual.to(ctx.residual_dtype)
        return d_x, d_residual, d_weight, None, None, None


def module(macros: tuple[tuple[str, int], ...], device: torch.device) -> Any:
    return nvrtc.module(SOURCE, macros, device)


class _Launcher:
    """The kernels for rows of one length and one mix of types."""

    def __init__(self, width: int, device: torch.device, **types: torch.dtype):
        self.width, self.device = width, device
        self.threads = min(1024, max(32, -(-width // 256) * 32))
        macros = {name: IO[dtype] for name, dtype in types.items()} | {"WIDTH": width, "THREADS": self.threads}
        macros |= {"FORWARD_BLOCKS": self._held(FORWARD_THREADS), "BLOCKS": self._held(BACKWARD_THREADS)}
        self._module = module(tuple(macros.items()), device)

    def _held(self, threads: int) -> int:
        """Blocks to a multiprocessor, 32 at most."""
        return min(32, max(1, threads // self.threads))

    def blocks(self, rows: int, threads: int) -> int:
        return min(rows, self._held(threads) * nvrtc.multiprocessors(self.device))

    def __call__(self, kernel: str, rows: int, blocks: int, values: dict[str, Any]) -> None:
        self._module.launch(kernel, (blocks, 1), self.threads, {"num_rows": rows} | values)

    def sum_weight(self, values: dict[str, Any]) -> None:
        self._module.launch("sum_weight", (-(-self.width // 32), 1), nvrtc.SUMMERS, values)


@cache
def _launcher(
    width: int,
    dtype: torch.dtype,
    x_dtype: torch.dtype,
    sum_dtype: torch.dtype,
    weight_dtype: torch.dtype,
    device: torch.device,
) -> _Launcher:
    """Made once: a small model's step is launches, and what the host does between them."""
    return _Launcher(width, device, IO=dtype, X_IO=x_dtype, SUM_IO=sum_dtype, W_IO=weight_dtype)


def add_rms_norm(*args: Any) -> tuple[Tensor, Tensor]:
    """CUDA backend; arguments as `mambalign.ops.reference.add_rms_norm`."""
    y, total = AddRMSNorm.apply(*args)
    return y, total


def add_rms_norm_into(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, y: Tensor, total: Tensor, scales: Tensor
) -> None:
    """The forward pass into buffers, for a CUDA graph: `y` the norm, `total` the sum (it may be `residual`).

    All contiguous `[rows, H]`, `residual` in `total`'s dtype. weight: `[H]`. scales: fp32 `[rows]`, 1 / rms.
    """
    values = {"x": x, "residual": residual, "total": total, "y": y, "scales": scales, "weight": weight, "eps": eps}
    launcher = _launcher(x.shape[-1], y.dtype, x.dtype, total.dtype, weight.dtype, x.device)
    launcher("norm_forward", x.shape[0], launcher.blocks(x.shape[0], FORWARD_THREADS), values)
