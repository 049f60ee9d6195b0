"""The row-wise half of `token_logps` on a GPU (`token_logps.cu`): one pass over a chunk's logits each way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambalign.ops import nvrtc

SOURCE = Path(__file__).with_name("token_logps.cu")
LANES = 32


def module(dtype: torch.dtype, device: torch.device) -> Any:
    return nvrtc.module(SOURCE, (("IO", nvrtc.IO[dtype]),), device)


def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`[rows, V]`, int64 `[rows]` -> (log-probs of the labels, 0 at -100; log-normalisers), both fp32 `[rows]`."""
    logps, log_z = torch.empty(2, logits.shape[0], dtype=torch.float32, device=logits.device).unbind(0)
    _launch("logps_forward", logits, labels, logps=logps, log_z=log_z)
    return logps, log_z


def backward_(logits: Tensor, labels: Tensor, log_z: Tensor, d_logps: Tensor) -> Tensor:
    """Overwrites the logits with their gradient, given that of the log-probs."""
    _launch("logps_backward", logits, labels, log_z=log_z.contiguous(), d_logps=d_logps.float().contiguous())
    return logits


def _launch(kernel: str, logits: Tensor, labels: Tensor, **values: Tensor) -> None:
    assert logits.is_contiguous()
    common = {"logits": logits, "labels": labels.contiguous(), "vocabulary": logits.shape[1]}
    module(logits.dtype, logits.device).launch(kernel, (logits.shape[0], 1), LANES, common | values)
