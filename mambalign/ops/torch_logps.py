"""The row-wise half of `token_logps` in plain PyTorch, any device."""

from __future__ import annotations

import torch
from torch import Tensor

from mambalign.ops.reference import compute_dtype


def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`[rows, V]`, int64 `[rows]` -> (log-probs of the labels, 0 at -100; log-normalisers), both `[rows]`."""
    exact = logits.to(compute_dtype(logits))
    log_z = exact.logsumexp(1)
    logps = exact.gather(1, labels.clamp(min=0)[:, None])[:, 0] - log_z
    return logps.masked_fill_(labels < 0, 0.0), log_z


def both_(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `forward`, and the gradient of the log-probs' sum; may overwrite the logits."""
    logps, log_z = forward(logits, labels)
    return logps, log_z, backward_(logits, labels, log_z, torch.ones_like(log_z))


def backward_(logits: Tensor, labels: Tensor, log_z: Tensor, d_logps: Tensor) -> Tensor:
    """Gradient of the logits, given that of the log-probs; may overwrite them."""
    # d logp / d logits = onehot(label) - softmax(logits)
    d_logits = logits.to(log_z.dtype).sub_(log_z[:, None]).exp_().neg_()
    target = labels.clamp(min=0)[:, None]
    d_logits.scatter_add_(1, target, torch.ones_like(target, dtype=d_logits.dtype))
    return d_logits.mul_(d_logps.masked_fill(labels < 0, 0.0)[:, None]).to(logits.dtype)


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`gradient * factor` in `dtype`, in one pass."""
    return torch.mul(gradient, factor, out=torch.empty_like(gradient, dtype=dtype))
