"""The row-wise half of `token_logps` on a GPU (`token_logps.cu`): a pass over a chunk's logits each way, or both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambalign.ops import nvrtc, torch_logps

SOURCE = Path(__file__).with_name("token_logps.cu")
LANES, BLOCK = 32, 512


def module(dtype: torch.dtype, device: torch.device) -> Any:
    return nvrtc.module(SOURCE, (("IO", nvrtc.IO[dtype]),), device)


def forward(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """`[rows, V]`, int64 `[rows]` -> (log-probs of the labels, 0 at -100; log-normalisers), both fp32 `[rows]`."""
    return _launch_forward("logps_forward", LANES, logits, labels)


def both_(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As `forward`, and the gradient of the log-probs' sum, which overwrites the logits."""
    return (*_launch_forward("logps_both", BLOCK, logits, labels), logits)


def backward_(logits: Tensor, labels: Tensor, log_z: Tensor, d_logps: Tensor) -> Tensor:
    """Overwrites the logits with their gradient, given that of the log-probs."""
    given = {"log_z": log_z.contiguous(), "d_logps": d_logps.float().contiguous()}
    _launch("logps_backward", LANES, logits, labels, given)
    return logits


def scaled(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """fp32 `gradient * factor` in `dtype`; PyTorch takes twice as long where types differ."""
    if gradient.dtype != torch.float32 or dtype == torch.float32 or not gradient.is_contiguous():
        return torch_logps.scaled(gradient, factor, dtype)
    result = torch.empty(gradient.shape, dtype=dtype, device=gradient.device)
    values = {"wide": gradient, "factor": factor.float(), "scaled": result, "count": gradient.numel()}
    module(dtype, gradient.device).launch("scale", (-(-gradient.numel() // (4 * BLOCK)), 1), BLOCK, values)
    return result


def _launch_forward(kernel: str, threads: int, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    logps, log_z = torch.empty(2, logits.shape[0], dtype=torch.float32, device=logits.device).unbind(0)
    _launch(kernel, threads, logits, labels, {"logps": logps, "log_z": log_z})
    return logps, log_z


def _launch(kernel: str, threads: int, logits: Tensor, labels: Tensor, values: dict[str, Tensor]) -> None:
    assert logits.is_contiguous()
    common = {"logits": logits, "labels": labels.contiguous(), "vocabulary": logits.shape[1]}
    module(logits.dtype, logits.device).launch(kernel, (logits.shape[0], 1), threads, common | values)
