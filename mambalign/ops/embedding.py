"""Embedding whose gradient repeats bit for bit on a GPU, and is summed in fp32. Public op and choice of backend.

PyTorch's adds up rows of one token in an order that differs from run to run, once there are more than 3,072 tokens: a
resumed run would part from one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambalign.ops import nvrtc
from mambalign.ops.backends import select

SOURCE = Path(__file__).with_name("embedding.cu")
CHUNK = 32  # as in the source
THREADS = 128


class Embedding(torch.autograd.Function):
    """`sum_runs` and `sum_pieces` of `embedding.cu` on rows sorted by token."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.dtype = weight.shape, weight.dtype
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_rows: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        width, device = ctx.shape[1], ids.device
        d_rows = d_rows.reshape(-1, width).to(ctx.dtype).contiguous()
        tokens, rows = torch.sort(ids.flatten().int(), stable=True)
        chunks = -(-tokens.numel() // CHUNK)
        began, going_on = torch.empty(2, chunks, width, dtype=torch.float32, device=device).unbind(0)
        d_weight = torch.zeros(ctx.shape, dtype=ctx.dtype, device=device)
        values: dict[str, Any] = {
            "tokens": tokens,
            "rows": rows.int(),
            "d": d_rows,
            "d_weight": d_weight,
            "began": began,
        }
        values |= {"going_on": going_on, "num_tokens": tokens.numel(), "width": width}
        aligned = width % 4 == 0 and nvrtc.in_fours(d_rows)
        macros = {"IO": nvrtc.IO[ctx.dtype], "ALIGNED_ROWS": int(aligned), "THREADS": THREADS}
        kernels = module(tuple(macros.items()), device)
        for kernel in ("sum_runs", "sum_pieces"):
            kernels.launch(kernel, (chunks, -(-width // (4 * THREADS))), THREADS, values)
        return None, d_weight


def module(macros: tuple[tuple[str, int], ...], device: torch.device) -> Any:
    return nvrtc.module(SOURCE, macros, device)


def _cuda(ids: Tensor, weight: Tensor) -> Tensor:
    rows: Tensor = Embedding.apply(ids, weight) if weight.requires_grad else F.embedding(ids, weight)
    return rows


BACKENDS: dict[str, Callable[..., Tensor]] = {"cuda": _cuda, "torch": F.embedding, "reference": F.embedding}


def select_backend(backend: str, device: torch.device, *inputs: Tensor | None) -> tuple[str, str]:
    """(name, reason) of the backend that runs on `device`, for these inputs where given.

    Raises:
        ValueError: a named backend that does not exist, or cannot run on them.
    """
    return select("embedding", backend, BACKENDS, nvrtc.unavailable(device, *inputs))


def embedding(ids: Tensor, weight: Tensor, backend: str = "auto") -> Tensor:
    """`weight[ids]`.

    Args:
        ids: int64 `[...]`, in `[0, V)`.
        weight: `[V, H]`, bf16, fp16, fp32 or fp64.
        backend: "auto", or a name from `BACKENDS`; a named backend always wins, and raises if it cannot run.

    Returns:
        `[..., H]`. Gradients flow to `weight`.

    Example:
        >>> rows = embedding(torch.tensor([[1, 0, 1]]), torch.randn(2, 4))
    """
    return BACKENDS[select_backend(backend, ids.device, weight)[0]](ids, weight)
