"""Whole models on the emulated CUDA kernels: what mixer and kernels do for one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from mambalign.models.mamba import model_class
from mambalign.ops import Segments
from tests.ops.test_cuda import built, emulation, pytestmark  # noqa: F401 (fixtures)
from tests.ops.test_ops import relative_error

SEGMENTS = Segments.from_lengths([9, 4, 6, 20], [-1, 0, 0, -1])
IDS = torch.arange(39)[None] * 7 % 32


def made(config: type = transformers.MambaConfig, **changes: Any) -> Any:
    torch.manual_seed(0)
    settings = config(vocab_size=32, hidden_size=16, num_hidden_layers=2, state_size=4, time_step_rank=2, **changes)
    model = model_class(settings)(settings).train()
    # Random where initialised to one or zero, where a swapped or lost gradient would not show.
    for name, parameter in model.named_parameters():
        if name.endswith((".D", "bias", "norm.weight")):
            torch.nn.init.normal_(parameter, std=0.5)
    return model


def gradients(model: Any, backend: str) -> list[Tensor]:
    model.set_backend(backend)
    model.zero_grad()
    loss = model(IDS, segments=SEGMENTS, labels=IDS).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def compare(model: Any) -> None:
    ours, theirs = gradients(model, "cuda"), gradients(model, "torch")
    assert len(ours) == len(theirs) > 1
    assert max(relative_error(a, b) for a, b in zip(ours, theirs, strict=True)) < 2e-5
    again = gradients(model, "cuda")
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize("config", [transformers.MambaConfig, transformers.FalconMambaConfig])
def test_gradients_are_those_of_plain_pytorch(config: type) -> None:
    compare(made(config))


def test_no_activation_of_the_kernels() -> None:
    compare(made(hidden_act="gelu"))


def test_recomputation_changes_no_bit() -> None:
    model = made()
    plain = gradients(model, "cuda")
    model.set_selective_recomputation()
    selective = gradients(model, "cuda")
    model.set_selective_recomputation(False)
    results = [selective]
    for reentrant in (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        results.append(gradients(model, "cuda"))
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(plain, result, strict=True))


def test_modules_that_write_and_hooks_that_replace() -> None:
    """What may come between the ops that write for one another."""
    model = made()
    mixer = model.backbone.layers[1].mixer
    handle = mixer.x_proj.register_forward_pre_hook(lambda _, args: (args[0].mul_(0.5),))
    compare(model)
    handle.remove()
    mixer.in_proj.register_full_backward_hook(lambda *_: None)
    mixer.in_proj.register_forward_hook(lambda _, args, output: output * 1.5)
    compare(model)


def test_frozen_parts() -> None:
    """Nothing before the second layer's step sizes learns: most gradients are not asked for."""
    model = made().requires_grad_(False)
    for name in ("dt_proj.weight", "A_log", "conv1d.weight"):
        model.get_parameter(f"backbone.layers.1.mixer.{name}").requires_grad_()
    compare(model)


def test_gradients_add_up_over_micro_batches() -> None:
    model = made()
    model.set_backend("cuda")
    losses = [model(IDS, segments=SEGMENTS, labels=IDS).loss for _ in range(2)]
    sum(losses).backward()
    twice = [p.grad for p in model.parameters()]
    once = gradients(model, "cuda")[1:]
    assert max(relative_error(a, 2 * b) for a, b in zip(twice, once, strict=True)) < 1e-6
