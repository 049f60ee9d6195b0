"""Mamba-2 (arXiv 2405.21060) on packed tokens: transformers' classes with the forward pass of `models/mamba.py`.

The gated norm needs care. transformers computes `norm(y * silu(z))` whatever a config.json says, and those of
published models say `"norm_before_gate": true`, once a wrong default
(https://github.com/huggingface/transformers/pull/32686): that key is ignored here, too. What the original layout says
is meant: `rmsnorm` and `norm_before_gate` of its `ssm_cfg` become `gated_norm`, one of `GATED_NORMS`, of the
transformers config (see `original.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache
from transformers.integrations.accelerate import force_accelerate_hooks
from transformers.models.mamba2 import modeling_mamba2 as hf_mamba2

from mambalign.models.mamba import FAMILIES, LayerState, PackedBlock, PackedCausalLM, PackedModel, StatefulMixer
from mambalign.models.recompute import Recomputation
from mambalign.ops import Segments, gated_rms_norm, ssd

GATE_FIRST, NORM_FIRST, NO_NORM = GATED_NORMS = ("gate_first", "norm_first", "none")


def gated_norm(config: Any) -> str:
    """Which of `GATED_NORMS` a model has: transformers' unless its config says otherwise.

    Raises:
        ValueError: another name.
    """
    kind = getattr(config, "gated_norm", GATE_FIRST)
    if kind not in GATED_NORMS:
        raise ValueError(f"gated_norm is {kind!r}; it must be one of {', '.join(GATED_NORMS)}")
    return str(kind)


class GatedRMSNorm(nn.Module):
    """The norm of y and z, with the parameter of the one in transformers (whose earlier versions ignore the groups)."""

    def __init__(self, hidden_size: int, group_size: int, eps: float, norm_before_gate: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.group_size, self.variance_epsilon, self.norm_before_gate = group_size, eps, norm_before_gate

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        return gated_rms_norm(
            hidden_states, gate, self.weight, self.variance_epsilon, self.group_size, self.norm_before_gate
        )


class Mamba2Mixer(StatefulMixer, hf_mamba2.Mamba2Mixer):
    """Projection, convolution over x, B and C together, scan, gated norm, projection, on packed tokens."""

    fp32_parameters = ("A_log", "D", "dt_bias")

    def __init__(self, config: Any, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.backend = "auto"
        kind = gated_norm(config)
        self.norm: nn.Module | None = None
        if kind != NO_NORM:
            group = self.intermediate_size // self.n_groups
            self.norm = GatedRMSNorm(self.intermediate_size, group, config.layer_norm_epsilon, kind == NORM_FIRST)
        self._apply(lambda parameter: parameter)  # made in half precision where that is torch's default dtype

    @force_accelerate_hooks("conv1d")  # parameters of it are used without a call of the module
    def forward(
        self,
        hidden_states: Tensor,
        cache_params: Cache | None = None,
        segments: Segments | None = None,
        recomputation: Recomputation | None = None,
        state: LayerState = (None, None),
        output_state: bool = False,
        **_: Any,
    ) -> Any:
        """As `PackedMixer.forward`."""
        assert segments is not None and hidden_states.shape[0] == 1, "mixers see packed tokens only"
        recomputation = recomputation or Recomputation(enabled=False)
        conv_state, ssm_state = self._read(cache_params, state)
        projected = self.in_proj(hidden_states).squeeze(0)
        z, xBC, dt = projected.split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        caching = output_state or cache_params is not None
        (xBC, _same), conv_state = self._convolve(xBC, conv_state, segments, recomputation, caching)
        shared = self.n_groups * self.ssm_state_size
        x, B, C = xBC.split([self.intermediate_size, shared, shared], dim=-1)
        scanned: Any = ssd(
            x.unflatten(-1, (self.num_heads, self.head_dim)),
            dt,
            -torch.exp(self.A_log),
            B.unflatten(-1, (self.n_groups, self.ssm_state_size)),
            C.unflatten(-1, (self.n_groups, self.ssm_state_size)),
            self.D,
            z.unflatten(-1, (self.num_heads, self.head_dim)) if self.norm is None else None,
            self.dt_bias,
            dt_softplus=True,
            dt_limit=self.time_step_limit,
            segments=segments,
            initial_state=ssm_state,
            output_final_state=caching,
            backend=self.backend,
        )
        y, ssm_state = scanned if caching else (scanned, None)
        self._write(cache_params, conv_state, ssm_state)
        y = y.flatten(1)
        if self.norm is not None:
            ungated, y = y, self.norm(y, z)
            recomputation.drop(y, self.norm, ungated, z, module=self.norm)
        out: Tensor = self.out_proj(y)[None]
        return (out, conv_state, ssm_state) if output_state else out


class Mamba2Block(PackedBlock, hf_mamba2.Mamba2Block):
    mixer_class = Mamba2Mixer


class Mamba2Model(PackedModel, hf_mamba2.Mamba2Model):
    pretrained_class, block_class = hf_mamba2.Mamba2PreTrainedModel, Mamba2Block
    graphable = False  # the scan's kernels are flash-linear-attention's, which choose among themselves while they run


class Mamba2ForCausalLM(PackedCausalLM, hf_mamba2.Mamba2ForCausalLM):
    """transformers' `Mamba2ForCausalLM`, exact on packed, forked and padded input."""

    pretrained_class, backbone_class = hf_mamba2.Mamba2PreTrainedModel, Mamba2Model


FAMILIES["mamba2"] = Mamba2ForCausalLM
