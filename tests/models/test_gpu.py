"""Whole models on a CUDA device, packed and forked, against float64 on the CPU."""

from __future__ import annotations

import pytest
import torch
import transformers

from mambalign.models.mamba import model_class
from mambalign.ops import Segments
from tests.ops.test_ops import relative_error

pytestmark = pytest.mark.gpu


def gradients(model: torch.nn.Module, ids: torch.Tensor, segments: Segments) -> list[torch.Tensor]:
    model.zero_grad()
    output = model(ids, segments=segments, labels=ids)
    output.loss.backward()
    # Copies: moving a model moves its gradients too.
    return [t.detach().double().cpu().clone() for t in (output.loss, *(p.grad for p in model.parameters()))]


@pytest.mark.parametrize("precision", ["fp32", "bf16 autocast", "bf16"])
@pytest.mark.parametrize(
    "config", [transformers.MambaConfig, transformers.FalconMambaConfig, transformers.Mamba2Config]
)
def test_forked_gradients(config: type, precision: str) -> None:
    torch.manual_seed(0)
    heads = dict(num_heads=4, head_dim=32, n_groups=2) if config is transformers.Mamba2Config else {}
    settings = config(vocab_size=96, hidden_size=64, num_hidden_layers=3, state_size=16, **heads)
    segments = Segments.from_lengths([70, 33, 5, 100], [-1, 0, 0, -1])
    ids = torch.randint(96, (1, segments.num_tokens))
    model = model_class(settings)(settings)
    theirs = gradients(model.double(), ids, segments)
    model = model.to("cuda", torch.bfloat16 if precision == "bf16" else torch.float32)
    with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16 autocast"):
        ours = gradients(model, ids.cuda(), segments)
    again = gradients(model, ids.cuda(), segments) if precision != "bf16 autocast" else ours
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    errors = [relative_error(a, b) for a, b in zip(ours, theirs, strict=True)]
    assert max(errors) < (1e-4 if precision == "fp32" else 0.1), max(errors)


@pytest.mark.parametrize("config", [transformers.MambaConfig, transformers.FalconMambaConfig])
def test_recomputation_changes_no_bit(config: type) -> None:
    """The convolution that is computed again has the same two users, and the halves one gradient."""
    torch.manual_seed(0)
    settings = config(vocab_size=96, hidden_size=64, num_hidden_layers=3, state_size=16)
    segments = Segments.from_lengths([70, 33, 5, 100], [-1, 0, 0, -1])
    ids = torch.randint(96, (1, segments.num_tokens), device="cuda")
    model = model_class(settings)(settings).to("cuda", torch.bfloat16).train()
    plain = gradients(model, ids, segments)
    model.set_selective_recomputation()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(model, ids, segments), strict=True))
