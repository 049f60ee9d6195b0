"""The small modules of all families: transformers' parameters, computed by the ops."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.mamba import modeling_mamba as hf_mamba

from mambalign.ops import add_rms_norm, embedding


class StepSizeProjection(nn.Linear):
    """`dt_proj` without its bias, which the scan adds in fp32: `bias` stays fp32 beside weights in bf16.

    Whoever wraps it must not take the bias out of its output: it is not in there (see `adapters.StepSizeLora`).
    """

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight)


class Embedding(nn.Embedding):
    """With a gradient that repeats bit for bit on a GPU."""

    backend = "auto"

    def forward(self, input: Tensor) -> Tensor:
        return embedding(input, self.weight, self.backend)


class RMSNorm(hf_mamba.MambaRMSNorm):
    """transformers' norm with the sum in at least fp32, of `hidden_states` plus, if given, the stream before them."""

    backend = "auto"

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> Tensor:
        return add_rms_norm(hidden_states, residual, self.weight, self.variance_epsilon, backend=self.backend)[0]


class ResidualRMSNorm(RMSNorm):
    """The norm before a mixer: (norm in `dtype`, the residual stream in `residual_dtype`)."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, residual: Tensor | None, dtype: torch.dtype, residual_dtype: torch.dtype | None
    ) -> tuple[Tensor, Tensor]:
        eps = self.variance_epsilon
        return add_rms_norm(hidden_states, residual, self.weight, eps, dtype, residual_dtype, self.backend)
