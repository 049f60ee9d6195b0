"""Whole models on a CUDA device, packed and forked, against float64 on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from mambalign.models.cuda_graphs import GraphedLayers
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


# Of three sizes, with and without forks; those of a size come back with other lengths.
TREES: list[tuple[list[int], list[int] | None]] = [
    ([400, 90, 20], None),
    ([70, 33, 5, 100], [-1, 0, 0, -1]),
    ([511], None),
    ([100, 300, 101], None),
    ([70, 5, 33, 97], [-1, 0, 1, 0]),
    ([256, 256], None),
    ([3000, 70, 900], [-1, 0, 0]),
    ([256, 256], None),
    ([100, 70, 3811], [-1, 0, 0]),
]


def trained(config: type, precision: str, capture: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[list[Any], Any]:
    """Losses of steps of two batches each, and the weights after them; without `capture` in eager mode, filled."""
    with monkeypatch.context() as patch:
        if not capture:
            patch.setattr(GraphedLayers, "_capture", lambda *_: None)
        torch.manual_seed(0)
        settings = config(vocab_size=96, hidden_size=64, num_hidden_layers=3, state_size=16)
        model = model_class(settings)(settings).to("cuda", torch.bfloat16 if precision == "bf16" else torch.float32)
        model.train().set_cuda_graphs()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        generator, losses = torch.Generator("cuda").manual_seed(1), []
        for step in range(12):
            for tree in (TREES[step % len(TREES)], TREES[(step * 5 + 1) % len(TREES)]):
                segments = Segments.from_lengths(*tree)
                ids = torch.randint(96, (1, segments.num_tokens), generator=generator, device="cuda")
                with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16 autocast"):
                    loss = model(ids, segments=segments, labels=ids).loss
                loss.backward()
                losses.append(loss.detach())
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert model.backbone.graphs._failed is None
        assert (model.backbone.graphs.captured > 3) == capture
        return [float(loss) for loss in losses], [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("precision", ["fp32", "bf16 autocast", "bf16"])
@pytest.mark.parametrize("config", [transformers.MambaConfig, transformers.FalconMambaConfig])
def test_graphs_change_no_bit_of_a_training(config: type, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (losses, weights), (expected, exact) = (
        trained(config, precision, capture, monkeypatch) for capture in (True, False)
    )
    assert losses == expected and len(set(losses)) > 20
    assert all(torch.equal(a, b) for a, b in zip(weights, exact, strict=True))


@pytest.mark.parametrize("recompute", ["nothing", "selective", "blocks"])
def test_graphs_and_filling_have_the_gradients_of_the_batch(recompute: str) -> None:
    torch.manual_seed(0)
    settings = transformers.MambaConfig(vocab_size=96, hidden_size=64, num_hidden_layers=3, state_size=16)
    model = model_class(settings)(settings).to("cuda").train()
    model.set_selective_recomputation(recompute == "selective")
    if recompute == "blocks":
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for tree in TREES:
        segments = Segments.from_lengths(*tree)
        ids = torch.randint(96, (1, segments.num_tokens), device="cuda")
        model.set_cuda_graphs(False)
        expected = gradients(model, ids, segments)
        model.set_cuda_graphs(True)
        for _ in range(3):
            found = gradients(model, ids, segments)
            assert max(relative_error(a, b) for a, b in zip(found, expected, strict=True)) < 1e-4
        assert model.backbone.graphs.captured == 1
