"""A stand-in for mamba-ssm and causal-conv1d: their modules, parameter names and calls, computed with our ops.

What it shows is that benchmarks ask the peer rightly, and that they refuse to print a number when it disagrees.
"""

from __future__ import annotations

import sys
from collections import namedtuple
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from mambalign.models.mamba import MambaMixer
from mambalign.models.modules import RMSNorm
from mambalign.ops import Segments, causal_conv1d, selective_scan


class Block(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.norm, self.mixer = RMSNorm(config.hidden_size, eps=1e-5), MambaMixer(config, layer_idx=0)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None, inference_params: Any = None) -> Any:
        residual = hidden_states.float() if residual is None else residual + hidden_states
        rows, length, width = residual.shape
        normed = self.norm(residual.to(self.norm.weight.dtype)).view(1, -1, width)
        return self.mixer(normed, segments=Segments.from_lengths([length] * rows)).view(rows, length, width), residual


class Backbone(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([Block(config) for _ in range(config.num_hidden_layers)])
        self.norm_f = RMSNorm(config.hidden_size, eps=1e-5)

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden, residual = self.embedding(input_ids), None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual, inference_params=None)
        return self.norm_f((hidden + residual).to(self.norm_f.weight.dtype))


class MambaLMHeadModel(nn.Module):
    error = 0.0  # what is wrong with its logits

    def __init__(self, config: Any, device: Any = None, dtype: Any = None):
        super().__init__()
        self.backbone = Backbone(
            transformers.MambaConfig(
                vocab_size=config.vocab_size, hidden_size=config.d_model, num_hidden_layers=config.n_layer
            )
        )
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        self.lm_head.weight = self.backbone.embedding.weight
        self.to(device=device, dtype=dtype)

    def forward(self, input_ids: Tensor) -> Any:
        logits = self.lm_head(self.backbone(input_ids))
        return namedtuple("CausalLMOutput", ["logits"])(
            logits=logits + self.error * torch.arange(logits.shape[-1]).to(logits)
        )


def decode(ids: Tensor, model: Any, max_length: int, top_k: int, cg: bool) -> Any:
    assert top_k == 1 and cg
    with torch.no_grad():
        while ids.shape[1] < max_length:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    return SimpleNamespace(sequences=ids)


def packed(x: Tensor) -> Tensor:
    return x.transpose(1, 2).flatten(0, 1)


def selective_scan_fn(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, **rest: Any) -> Tensor:
    rows, channels, length = u.shape
    segments = Segments.from_lengths([length] * rows)
    z = packed(rest.pop("z"))
    y = selective_scan(*map(packed, (u, delta)), A, *map(packed, (B, C)), D, z, segments=segments, **rest)
    return y.view(rows, length, channels).transpose(1, 2)


def causal_conv1d_fn(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    rows, channels, length = x.shape
    y = causal_conv1d(packed(x), weight, bias, activation, Segments.from_lengths([length] * rows))
    return y.view(rows, length, channels).transpose(1, 2)


def rms_norm_fn(
    x: Tensor, weight: Tensor, bias: None, residual: Tensor, eps: float, prenorm: bool, residual_in_fp32: bool
) -> tuple[Tensor, Tensor]:
    assert prenorm and residual_in_fp32
    total = residual + x
    return (nn.functional.rms_norm(total, weight.shape, weight.float(), eps)).to(x.dtype), total


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `import mamba_ssm` and `import causal_conv1d` find the stand-in."""
    for name, members in {
        "mamba_ssm": {},
        "mamba_ssm.models": {},
        "mamba_ssm.models.config_mamba": {"MambaConfig": SimpleNamespace},
        "mamba_ssm.models.mixer_seq_simple": {"MambaLMHeadModel": MambaLMHeadModel},
        "mamba_ssm.utils": {},
        "mamba_ssm.utils.generation": {"decode": decode},
        "mamba_ssm.ops": {},
        "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan_fn},
        "mamba_ssm.ops.triton": {},
        "mamba_ssm.ops.triton.layer_norm": {"rms_norm_fn": rms_norm_fn},
        "causal_conv1d": {"causal_conv1d_fn": causal_conv1d_fn},
    }.items():
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
