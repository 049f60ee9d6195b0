"""Small random models whose answers wander: no parameter at its initial value; and a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import mambalign.models.mamba2  # noqa: F401  (adds its family)
from mambalign.models import Mamba2ForCausalLM, MambaForCausalLM
from mambalign.models.checkpoint import save_model
from mambalign.models.mamba import FAMILIES
from tests.train.conftest import byte_tokenizer

V = 264
FUSED = ("mamba", "falcon_mamba")  # families that have a step written as a whole


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


@pytest.fixture
def live() -> Iterator[Any]:
    """A server around a `FakeEngine`."""
    from tests.generation.serving import FakeEngine, running  # its clients are not on every machine with a GPU

    with running(FakeEngine()) as server:
        yield server


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder to serve."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    torch.manual_seed(0)
    model = MambaForCausalLM(
        transformers.MambaConfig(vocab_size=257, hidden_size=16, num_hidden_layers=2, state_size=4)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    save_model(model, folder, tokenizer=byte_tokenizer())
    return folder


__all__ = ["FAMILIES", "FUSED", "Mamba2ForCausalLM", "MambaForCausalLM", "V", "pair"]
