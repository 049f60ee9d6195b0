"""Log-probabilities of given tokens straight from hidden states: no logits and no gradient of size [T, V] exist."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mambalign.ops import reference
from mambalign.ops.backends import select, without_autocast
from mambalign.ops.reference import compute_dtype

IGNORE = -100
CHUNK_ELEMENTS = 1 << 24  # logits held at a time: 64 MiB in fp32


class TokenLogps(torch.autograd.Function):
    """A chunk of rows at a time; the backward pass makes the chunk's logits again instead of keeping them."""

    @staticmethod
    @without_autocast
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
        dtype = compute_dtype(hidden, weight)
        logps = torch.zeros(labels.shape[0], dtype=dtype, device=hidden.device)
        log_z = torch.zeros_like(logps)
        for rows in torch.arange(labels.shape[0], device=hidden.device).split(chunk_size):
            logits = _logits(hidden, weight, rows, dtype)
            log_z[rows] = logits.logsumexp(1)
            logps[rows] = logits.gather(1, labels[rows].clamp(min=0)[:, None])[:, 0] - log_z[rows]
        ctx.save_for_backward(hidden, weight, labels, log_z)
        ctx.chunk_size = chunk_size
        return logps.masked_fill_(labels == IGNORE, 0.0)

    @staticmethod
    @once_differentiable
    @without_autocast
    def backward(ctx: Any, d_logps: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, labels, log_z = ctx.saved_tensors
        dtype = compute_dtype(hidden, weight)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_weight = torch.zeros_like(weight, dtype=dtype) if ctx.needs_input_grad[1] else None
        d_logps = d_logps.masked_fill(labels == IGNORE, 0.0)
        for rows in torch.arange(labels.shape[0], device=hidden.device).split(ctx.chunk_size):
            # d logp / d logits = onehot(label) - softmax(logits)
            d_logits = _logits(hidden, weight, rows, dtype).sub_(log_z[rows, None]).exp_().neg_()
            target = labels[rows].clamp(min=0)[:, None]
            d_logits.scatter_add_(1, target, torch.ones_like(target, dtype=dtype))
            d_logits = d_logits.mul_(d_logps[rows, None]).to(torch.promote_types(hidden.dtype, weight.dtype))
            if d_hidden is not None:
                d_hidden[rows] = (d_logits @ weight.to(d_logits.dtype)).to(hidden.dtype)
            if d_weight is not None:
                d_weight += d_logits.T @ hidden[rows].to(d_logits.dtype)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None


def _logits(hidden: Tensor, weight: Tensor, rows: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrix product runs in the inputs' own precision, everything after it in `dtype`."""
    common = torch.promote_types(hidden.dtype, weight.dtype)
    return (hidden[rows].to(common) @ weight.to(common).T).to(dtype)


def _chunked(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    logps: Tensor = TokenLogps.apply(hidden, weight, labels, chunk_size)
    return logps


def _reference(hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int) -> Tensor:
    return reference.token_logps(hidden, weight, labels)


BACKENDS = {"torch": _chunked, "reference": _reference}


def select_backend(backend: str, device: torch.device) -> tuple[str, str]:
    """(name, reason) of the backend that runs on `device`; raises `ValueError` when a named one does not exist."""
    return select("token_logps", backend, BACKENDS, "torch", f"chunked head in PyTorch, on {device.type}")


def token_logps(
    hidden: Tensor, weight: Tensor, labels: Tensor, chunk_size: int | None = None, backend: str = "auto"
) -> Tensor:
    """`log softmax(hidden @ weight.T)[label]` of every row.

    Args:
        hidden: `[T, H]`, bf16, fp16, fp32 or fp64; row t must already be the one that *predicts* `labels[t]`.
        weight: `[V, H]`, the head. labels: int64 `[T]`, -100 for rows without one.
        chunk_size: rows whose logits exist at a time; None keeps them near 16 million elements.
        backend: "auto", or a name from `BACKENDS`; a named backend always wins, and raises if it cannot run.

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
    # On a GPU this look at the labels would wait for the device at every step; indexing asserts there anyway.
    if labels.device.type == "cpu" and bool(((labels != IGNORE) & ((labels < 0) | (labels >= weight.shape[0]))).any()):
        raise ValueError(f"token_logps: labels must be -100 or in [0, {weight.shape[0]})")
    if torch.is_autocast_enabled(hidden.device.type):
        # The head is a projection like any other: autocast runs it in its own dtype, both ways.
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    rows = chunk_size or max(1, CHUNK_ELEMENTS // weight.shape[0])
    return BACKENDS[select_backend(backend, hidden.device)[0]](hidden, weight, labels, rows)
