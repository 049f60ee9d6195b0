"""Log-probabilities of given tokens straight from hidden states: no logits and no gradient of size [T, V] exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambalign.ops import cuda_logps, nvrtc, reference, torch_logps
from mambalign.ops.backends import select, without_autocast
from mambalign.ops.reference import compute_dtype

IGNORE = -100
# Logits held at a time. On a CPU 64 MiB in fp32; a GPU wants long rows of blocks: 256 MiB in bf16.
CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}


class TokenLogps(torch.autograd.Function):
    """A chunk of rows at a time; the backward pass makes the chunk's logits again instead of keeping them.

    With `summed` the gradient of the sum is made at once, while the logits are there: a quarter of the matrix products
    less. That is all a backward pass needs whose gradients are one number for all rows, which autograd hands on as a
    tensor of stride 0; for any other it starts anew.

    `rows`: the module with the row-wise functions, `forward`, `backward_` and `both_`, and `scaled`.
    """

    @staticmethod
    @without_autocast
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int, rows: Any, summed: bool
    ) -> Tensor:
        logps = torch.empty(labels.shape[0], dtype=compute_dtype(hidden, weight), device=hidden.device)
        log_z = torch.empty_like(logps)
        ctx.chunk_size, ctx.rows = chunk_size, rows
        summed = summed and any(ctx.needs_input_grad) and labels.shape[0] > 0
        gradients = _Gradients(ctx, hidden, weight) if summed else None
        for start in range(0, labels.shape[0], chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = _logits(hidden[chunk], weight)
            if gradients is None:
                logps[chunk], log_z[chunk] = rows.forward(logits, labels[chunk])
            else:
                logps[chunk], log_z[chunk], d_logits = rows.both_(logits, labels[chunk])
                gradients.add(chunk, d_logits)
        ready = (None, None) if gradients is None else (gradients.hidden, gradients.weight)
        ctx.save_for_backward(hidden, weight, labels, log_z, *ready)
        ctx.summed = summed
        return logps

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_logps: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, labels, log_z, d_hidden, d_weight = ctx.saved_tensors
        if ctx.summed and d_logps.stride() == (0,):
            ready = ((d_hidden, hidden.dtype), (d_weight, weight.dtype))
            d_hidden, d_weight = (None if d is None else ctx.rows.scaled(d, d_logps[:1], dtype) for d, dtype in ready)
            return d_hidden, d_weight, None, None, None, None
        gradients = _Gradients(ctx, hidden, weight)
        for start in range(0, labels.shape[0], ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            logits = _logits(hidden[chunk], weight)
            gradients.add(chunk, ctx.rows.backward_(logits, labels[chunk], log_z[chunk], d_logps[chunk]))
        d_weight = None if gradients.weight is None else gradients.weight.to(weight.dtype)
        return gradients.hidden, d_weight, None, None, None, None


class _Gradients:
    """Of hidden states, row by row, and of the weight, summed in fp32 (fp64), where they are wanted."""

    def __init__(self, ctx: Any, hidden: Tensor, weight: Tensor):
        self._hidden, self._weight = hidden, weight
        self.hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        dtype = compute_dtype(hidden, weight)
        self.weight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None

    def add(self, chunk: slice, d_logits: Tensor) -> None:
        if self.hidden is not None:
            self.hidden[chunk] = (d_logits @ self._weight.to(d_logits.dtype)).to(self.hidden.dtype)
        if self.weight is None:
            return
        hidden = self._hidden[chunk].to(d_logits.dtype)
        if d_logits.device.type == "cuda" and d_logits.dtype != self.weight.dtype:
            # Added up in fp32 within the product: no rounding to 16 bits, and a pass over the weight less.
            torch.addmm(self.weight, d_logits.T, hidden, out_dtype=self.weight.dtype, out=self.weight)
        else:
            self.weight += d_logits.T @ hidden


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """The matrix product runs in the inputs' own precision, everything after it in fp32 (fp64)."""
    common = torch.promote_types(hidden.dtype, weight.dtype)
    return hidden.to(common) @ weight.to(common).T


def _reference(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int, summed: bool) -> Tensor:
    return reference.token_logps(hidden, weight, labels)


def _torch(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int, summed: bool) -> Tensor:
    logps: Tensor = TokenLogps.apply(hidden, weight, labels, chunk_size, torch_logps, summed)
    return logps


def _cuda(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int, summed: bool) -> Tensor:
    logps: Tensor = TokenLogps.apply(hidden, weight, labels, chunk_size, cuda_logps, summed)
    return logps


def _evenly(rows: int, most: int) -> int:
    """The size of equal chunks of about `most` rows: a small last one would cost a pass over the weight's gradient."""
    return max(1, -(-rows // max(1, -(-4 * rows // (5 * most)))))


BACKENDS = {"cuda": _cuda, "torch": _torch, "reference": _reference}


def select_backend(backend: str, device: torch.device, *inputs: Tensor | None) -> tuple[str, str]:
    """(name, reason) of the backend that runs on `device`, for these inputs where given.

    Raises:
        ValueError: a named backend that does not exist, or cannot run on them.
    """
    return select("token_logps", backend, BACKENDS, nvrtc.unavailable(device, *inputs))


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    chunk_size: int | None = None,
    backend: str = "auto",
    summed: bool = False,
) -> Tensor:
    """`log softmax(hidden @ weight.T)[label]` of every row.

    Args:
        hidden: `[T, H]`, bf16, fp16, fp32 or fp64; row t must already be the one that *predicts* `labels[t]`.
        weight: `[V, H]`, the head. labels: int64 `[T]`, -100 for rows without one.
        chunk_size: rows whose logits exist at a time; None chooses by device.
        backend: "auto", or a name from `BACKENDS`; a named backend always wins, and raises if it cannot run.
        summed: only the sum of the result will matter, so its gradient may be made in the forward pass, which spares
            making the logits twice. Gradients are right in any case; of anything but the sum they take longer.

    Returns:
        `[T]` in fp32 (fp64 for fp64 inputs), 0 where the label is -100. Gradients flow to `hidden` and `weight`.

    Raises:
        ValueError: shapes or dtypes that do not fit, or a label outside `[0, V)` other than -100.

    Example:
        >>> logps = token_logps(torch.randn(5, 8), torch.randn(11, 8), torch.tensor([1, -100, 3, 4, 10]))
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"token_logps: hidden must be [T, H] and weight [V, H], got {list(hidden.shape)} and {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:1] or labels.dtype != torch.int64:
        raise ValueError(
            f"token_logps: labels must be int64 [{hidden.shape[0]}], got {labels.dtype} {list(labels.shape)}"
        )
    # On a GPU this look at the labels would wait for the device at every step; there a wrong one makes NaN or asserts.
    if labels.device.type == "cpu" and bool(((labels != IGNORE) & ((labels < 0) | (labels >= weight.shape[0]))).any()):
        raise ValueError(f"token_logps: labels must be -100 or in [0, {weight.shape[0]})")
    if torch.is_autocast_enabled(hidden.device.type):
        # The head is a projection like any other: autocast runs it in its own dtype, both ways.
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    held = CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cpu"])
    rows = chunk_size or _evenly(hidden.shape[0], max(1, held // weight.shape[0]))
    summed = summed and torch.is_grad_enabled()  # within a Function all inputs look as if gradients were wanted
    return BACKENDS[select_backend(backend, hidden.device, hidden, weight)[0]](hidden, weight, labels, rows, summed)
