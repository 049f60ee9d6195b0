"""The same ops on a CUDA device: equal to the float64 reference on the CPU, and the same bits every time."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mambalign.ops import Segments, causal_conv1d, selective_scan, token_logps
from tests.ops.test_ops import (
    TOLERANCE,
    TREES,
    assert_same,
    conv_inputs,
    outputs_and_gradients,
    relative_error,
    scan_inputs,
)

pytestmark = pytest.mark.gpu


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().cuda().requires_grad_() for name, value in inputs.items()}


def exact(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.detach().double().requires_grad_() for name, value in inputs.items()}


def projected(op: Any, inputs: dict[str, torch.Tensor], **options: Any) -> dict[str, torch.Tensor]:
    """As `outputs_and_gradients`, with the projection drawn on the CPU and moved."""
    y, final = op(**inputs, output_final_state=True, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(t.device) for t in (y, final)]
    loss = (y * weights[0]).sum() + (final * weights[1]).sum()
    gradients = torch.autograd.grad(loss, list(inputs.values()))
    results = {"y": y, "final_state": final} | dict(zip(inputs, gradients, strict=True))
    return {name: value.double().cpu() for name, value in results.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tree", TREES)
def test_scan_and_conv(tree: str, dtype: torch.dtype) -> None:
    segments = Segments.from_lengths(*TREES[tree])
    for op, inputs, options in (
        (selective_scan, scan_inputs(segments.num_tokens, segments.num_segments, dtype), {"delta_softplus": True}),
        (causal_conv1d, conv_inputs(segments.num_tokens, segments.num_segments, dtype), {"activation": "silu"}),
    ):
        theirs = outputs_and_gradients(op, exact(inputs), segments=segments, backend="reference", **options)
        first, second = (projected(op, on_gpu(inputs), segments=segments, **options) for _ in range(2))
        assert_same(first, theirs, TOLERANCE[dtype])
        assert all(torch.equal(first[name], second[name]) for name in first)


def test_token_logps() -> None:
    hidden, weight = torch.randn(300, 64).requires_grad_(), torch.randn(1000, 64).requires_grad_()
    labels = torch.randint(1000, (300,))
    labels[::7] = -100
    theirs = torch.autograd.grad(token_logps(hidden, weight, labels, backend="reference").sum(), (hidden, weight))
    moved = [t.detach().cuda().requires_grad_() for t in (hidden, weight)]
    ours = torch.autograd.grad(token_logps(*moved, labels.cuda(), chunk_size=128).sum(), moved)
    assert all(relative_error(a.cpu(), b) < 1e-4 for a, b in zip(ours, theirs, strict=True))
