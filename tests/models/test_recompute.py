"""Selective recomputation: less is kept, and nothing else changes."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mambalign.models import mamba, modules, recompute
from mambalign.ops import Segments
from tests.models.test_mamba import FAMILIES, TREES, V, config_of

SEGMENTS = Segments.from_lengths(*TREES["pair"])
IDS = torch.randint(2, V, (1, SEGMENTS.num_tokens), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> Any:
    return made(family)


def made(family: str = "mamba", **changes: Any) -> Any:
    torch.manual_seed(0)
    model = FAMILIES[family][2](config_of(family, **changes)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def loss_of(model: Any, ids: Tensor = IDS, segments: Segments = SEGMENTS, autocast: bool = False) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        logits = model(ids, segments=segments).logits
    return (logits.double() * torch.linspace(-1, 1, logits.numel()).view(logits.shape)).sum()


def gradients(model: Any, *losses: Tensor) -> list[Tensor]:
    model.zero_grad()
    for loss in losses:
        loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def both_ways(model: Any, run: Any) -> tuple[list[Tensor], list[Tensor]]:
    """What `run()` returns without and with selective recomputation, from the same random numbers."""
    results = []
    for enabled in (False, True):
        model.set_selective_recomputation(enabled)
        torch.manual_seed(1)
        results.append(run())
    return results[0], results[1]


def assert_same_bits(results: tuple[list[Tensor], list[Tensor]]) -> None:
    assert len(results[0]) == len(results[1]) > 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def calls_of(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """Grows by one with every call of the op `name` that a model makes."""
    calls: list[str] = []
    where = modules if name == "add_rms_norm" else mamba
    real = getattr(where, name)
    monkeypatch.setattr(where, name, lambda *args, **kwargs: calls.append(name) or real(*args, **kwargs))
    return calls


@pytest.mark.parametrize("changes", [{}, {"residual_in_fp32": False}, {"hidden_act": "gelu"}], ids=str)
@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16", "autocast"])
def test_gradients_are_the_same_bits(family: str, precision: str, changes: dict[str, Any]) -> None:
    model = made(family, **changes)
    model = model.to({"fp64": torch.float64, "bf16": torch.bfloat16}.get(precision, torch.float32))
    assert_same_bits(both_ways(model, lambda: gradients(model, loss_of(model, autocast=precision == "autocast"))))


def test_each_dropped_tensor_is_computed_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    model.set_selective_recomputation()
    convolutions, norms = calls_of(monkeypatch, "causal_conv1d"), calls_of(monkeypatch, "add_rms_norm")
    scans = calls_of(monkeypatch, "selective_scan")
    loss = loss_of(model)
    assert (len(convolutions), len(norms), len(scans)) == (3, 4, 3)
    loss.backward()
    assert (len(convolutions), len(norms), len(scans)) == (6, 7, 3)


def test_a_wrong_recomputation_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above has teeth: the backward pass does use what is computed again."""
    model = made()
    kept, _ = both_ways(model, lambda: gradients(model, loss_of(model)))
    loss = loss_of(model)
    real = modules.add_rms_norm
    monkeypatch.setattr(modules, "add_rms_norm", lambda *a: tuple(2 * t for t in real(*a)))
    assert not all(torch.equal(a, b) for a, b in zip(kept, gradients(model, loss), strict=True))


def bytes_kept(model: Any, tokens: int, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of storages that one forward pass leaves to autograd, weights and their casts aside."""
    held: dict[int, Any] = {}

    def hold(tensor: Tensor | None) -> None:
        if tensor is not None and tokens in tensor.shape:
            held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()

    def packing(recipes: Any, tensor: Tensor) -> Any:
        packed = real(recipes, tensor)
        for kept in packed.recipe.inputs if isinstance(packed, recompute._View) else [packed]:
            hold(kept and kept.tensor)
        return packed

    real = recompute._pack
    with monkeypatch.context() as patch, torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: hold(tensor) or tensor, lambda tensor: tensor
    ):  # fmt: skip
        patch.setattr(recompute, "_pack", packing)
        loss = loss_of(model, torch.full((1, tokens), 7), Segments.from_lengths([20, tokens - 20]), autocast)
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in held.values())


@pytest.mark.parametrize("autocast", [False, True])
def test_what_a_layer_keeps_of_a_token(autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly the norm's output H, the convolution's E and the step sizes' E less, in the type they have."""
    H, tokens, itemsize = 48, 61, 2 if autocast else 4
    kept = {}
    for selective in (False, True):
        sizes = {}
        for layers in (2, 5):
            model = made(hidden_size=H, num_hidden_layers=layers)
            model.set_selective_recomputation(selective)
            sizes[layers] = bytes_kept(model, tokens, autocast, monkeypatch)
        kept[selective] = (sizes[5] - sizes[2]) / 3 / tokens
    assert kept[False] - kept[True] == itemsize * (H + 2 * 2 * H)
    assert kept[True] < (0.83 if autocast else 0.75) * kept[False]  # the CPU's norm and conversions keep much besides


def test_nothing_stays_when_the_backward_pass_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made()
    model.set_selective_recomputation()
    computed: list[weakref.ref[Tensor]] = []
    real = mamba.causal_conv1d

    def convolve(*args: Any, **kwargs: Any) -> Any:
        result = real(*args, **kwargs)
        computed.append(weakref.ref((result[0] if isinstance(result, tuple) else result).untyped_storage()))
        return result

    monkeypatch.setattr(mamba, "causal_conv1d", convolve)
    gc.disable()
    try:
        loss = loss_of(model)
        assert all(value() is None for value in computed)
        loss.backward(retain_graph=True)
        assert len(computed) == 6 and all(value() is None for value in computed)
    finally:
        gc.enable()


def test_micro_batches_in_flight_and_parts_of_a_backward_pass(model: Any) -> None:
    other = IDS.flip(1)

    def interleaved() -> list[Tensor]:
        first, second = loss_of(model), loss_of(model, other)
        return gradients(model, second, first)

    def in_parts() -> list[Tensor]:
        loss, wanted = loss_of(model), dict(model.named_parameters())
        names = [name for name in wanted if name.endswith(("x_proj.weight", "A_log", "in_proj.weight"))]
        parts = [torch.autograd.grad(loss, wanted[name], retain_graph=True)[0] for name in names]
        return [*parts, *gradients(model, loss)]

    assert_same_bits(both_ways(model, interleaved))
    assert_same_bits(both_ways(model, in_parts))


def test_a_mamba2_drops_both_norms_and_the_convolution(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its 24, 48 and 48 + 2 * 2 * 4 channels in each of three layers."""
    model = made("mamba2")
    assert (model.backbone.layers[0].mixer.intermediate_size, model.backbone.layers[0].mixer.conv_dim) == (48, 64)
    kept = [0, 0]
    for selective in (False, True):
        model.set_selective_recomputation(selective)
        kept[selective] = bytes_kept(model, 61, False, monkeypatch)
    assert kept[False] - kept[True] == 3 * 61 * 4 * (24 + 48 + 64)


class Adapter(nn.Module):
    """A projection with a low-rank update beside it, as adapters wrap them."""

    def __init__(self, base: Any, dropout: float):
        super().__init__()
        self.base, self.calls = base.requires_grad_(False), 0
        self.down, self.up = nn.Linear(base.in_features, 2), nn.Linear(2, base.out_features)
        self.dropout = nn.Dropout(dropout)
        self.bias = base.bias  # what the scan adds

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.base(x) + self.up(self.down(self.dropout(x)))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_adapters_act_and_learn(model: Any, dropout: float) -> None:
    """Without dropout the step sizes are computed again through the adapter; with it they are kept."""
    for layer in model.backbone.layers:
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            if hasattr(layer.mixer, name):
                setattr(layer.mixer, name, Adapter(getattr(layer.mixer, name), dropout))
    results = both_ways(model, lambda: gradients(model, loss_of(model)))
    assert_same_bits(results)
    mixer = model.backbone.layers[1].mixer
    assert mixer.in_proj.calls == 2
    if hasattr(mixer, "dt_proj"):
        assert mixer.dt_proj.calls == (2 if dropout else 3)
    assert all(p.grad.any() for name, p in model.named_parameters() if ".up.weight" in name)


@pytest.mark.parametrize("where", ["norm", "mixer.dt_proj", "mixer.in_proj", "mixer.x_proj"])
def test_hooks_are_called_once_and_their_work_stays(model: Any, where: str) -> None:
    if model.config.model_type == "mamba2":  # what it has instead
        where = {"mixer.dt_proj": "mixer.norm", "mixer.x_proj": "mixer.out_proj"}.get(where, where)
    module = model.backbone.layers[1].get_submodule(where)
    calls: list[int] = []

    def halve(_: Any, __: Any, out: Any) -> Any:
        calls.append(1)
        return (out[0] / 2, out[1]) if isinstance(out, tuple) else out / 2

    module.register_forward_hook(halve)
    assert_same_bits(both_ways(model, lambda: gradients(model, loss_of(model))))
    assert len(calls) == 2


def test_a_module_that_writes_to_its_input(model: Any) -> None:
    """Then the convolution's output (in a Mamba-2 the norm's) is no longer what it would be if computed again."""
    mixer = model.backbone.layers[1].mixer
    module = mixer.out_proj if model.config.model_type == "mamba2" else mixer.x_proj
    module.register_forward_pre_hook(lambda _, args: (args[0].mul_(0.5),))
    assert_same_bits(both_ways(model, lambda: gradients(model, loss_of(model))))


@pytest.mark.parametrize("name", ["norm.weight", "mixer.conv1d.bias", "mixer.dt_proj.weight", "mixer.in_proj.weight"])
def test_weights_changed_in_between_are_refused(name: str) -> None:
    model = made()
    model.set_selective_recomputation()
    loss = loss_of(model)
    with torch.no_grad():
        model.backbone.layers[1].get_parameter(name).mul_(2)
    with pytest.raises(RuntimeError, match=r"modified (in place|by an inplace operation)"):
        loss.backward()


def test_within_whole_layers_recomputed_it_rests(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model.gradient_checkpointing_enable({"use_reentrant": False, "every_n_layers": 2})
    assert_same_bits(both_ways(model, lambda: gradients(model, loss_of(model))))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    sizes = []
    for selective in (False, True):
        model.set_selective_recomputation(selective)
        sizes.append(bytes_kept(model, 61, False, monkeypatch))
    assert sizes[0] == sizes[1]


def test_inference_and_caches_are_untouched(model: Any) -> None:
    model.eval()
    options: dict[str, Any] = dict(max_new_tokens=5, do_sample=False, eos_token_id=None)

    def steps() -> list[Tensor]:
        with torch.inference_mode():
            return [model(IDS, segments=SEGMENTS).logits, model.generate(IDS, **options)]

    assert_same_bits(both_ways(model, steps))


def test_a_row_without_tokens() -> None:
    model = made()
    none = torch.empty(1, 0, dtype=torch.long)
    assert_same_bits(both_ways(model, lambda: gradients(model, loss_of(model, none, Segments.from_lengths([])))))
