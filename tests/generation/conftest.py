"""Small random models whose answers wander: no parameter at its initial value."""

from __future__ import annotations

from typing import Any

import torch
import transformers

import mambalign.models.mamba2  # noqa: F401  (adds its family)
from mambalign.models.mamba import FAMILIES

V = 264


def pair(family: str, seed: int = 0, **changes: Any) -> tuple[Any, Any]:
    """(transformers' model, ours) with the same weights."""
    configs = {"mamba": "MambaConfig", "falcon_mamba": "FalconMambaConfig", "mamba2": "Mamba2Config"}
    sizes = dict(vocab_size=V, hidden_size=24, num_hidden_layers=3, state_size=4, pad_token_id=0, eos_token_id=1)
    if family == "mamba2":  # heads of 8 channels, three in a group
        sizes |= dict(num_heads=6, head_dim=8, n_groups=2, chunk_size=8)
    config = getattr(transformers, configs[family])(**sizes | changes)
    torch.manual_seed(seed)
    plain = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    ours = FAMILIES[family](config).eval()
    ours.load_state_dict(plain.state_dict())
    return plain, ours
