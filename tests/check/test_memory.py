"""The planner's memory: against every byte that the code allocates, and against what a GPU was measured to take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig

from mambalign.check.memory import Load, estimate, highest_moment, load_of, on_gpu
from mambalign.check.shapes import ModelShape
from mambalign.models.adapters import AdapterOptions, attach
from mambalign.models.mamba import model_class
from mambalign.ops import nvrtc
from mambalign.ops.segments import Segments
from mambalign.recipe import Recipe

SIZES: dict[str, dict[str, Any]] = {
    "mamba": {"state_size": 16},
    "falcon_mamba": {"state_size": 16, "intermediate_size": 256, "time_step_rank": 8},
    "mamba2": {"state_size": 32, "num_heads": 16, "head_dim": 16, "n_groups": 1},
}
TOKENS, TARGETS, HIDDEN, LAYERS, VOCABULARY = 2048, 100, 128, 3, 64


class CudaDropout(torch.autograd.Function):
    """Keeps what the one on a GPU keeps: a byte for each number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(torch.ones(x.shape, dtype=torch.bool))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        assert ctx.saved_tensors[0].shape == gradient.shape
        return gradient.clone()


@contextmanager
def kernels() -> Iterator[None]:
    """Our kernels' Python on a CPU: it allocates what it does on a GPU, and launches nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            nvrtc, "module", lambda _, macros, device: SimpleNamespace(launch=lambda *_: None, macros=dict(macros))
        )
        patch.setattr(nvrtc, "_unavailable", lambda device: None)
        patch.setattr(nvrtc, "multiprocessors", lambda device: 132)
        patch.setattr(torch.nn.functional, "dropout", lambda x, *_, **__: CudaDropout.apply(x))
        yield


def allocated(run: Callable[[], None]) -> tuple[int, int]:
    """(highest, last) number of bytes that PyTorch's allocator holds, above those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = highest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        highest = max(highest, held)
    return highest, held


def step(family: str, recipe: Recipe, kernel: bool) -> tuple[ModelShape, float, float]:
    """(shape, bytes when the forward pass ends, at their highest), without the weights."""
    sizes = SIZES[family] | {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY}
    config = AutoConfig.for_model(family, **sizes)
    model: Any = model_class(config)(config)
    if recipe.dtype == "bfloat16":
        model = model.bfloat16()
    model.set_backend("cuda" if kernel else "auto")
    model.set_selective_recomputation(recipe.gradient_checkpointing == "selective")
    if recipe.use_peft:
        attach(model, AdapterOptions.from_recipe(recipe), seed=0)
    if recipe.gradient_checkpointing is True:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    ids, results = torch.randint(VOCABULARY, (1, TOKENS)), []
    segments, positions = Segments.from_lengths([TOKENS]), torch.arange(TARGETS)
    targets = {"target_positions": positions, "target_ids": ids[0, 1 : TARGETS + 1], "targets_summed": True}

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            results.append(model(ids, segments=segments, use_cache=False, **targets).logps.sum())

    def backward() -> None:
        results.pop().backward()

    forward()
    backward()
    model.zero_grad()
    highest, kept = allocated(forward)
    return replace(ModelShape.from_config(config.to_dict()), kernels=kernel), kept, max(
        highest, kept + allocated(backward)[0]
    )  # fmt: skip


PRECISIONS = {
    "fp32": {},
    "fp32 + autocast": {"bf16": True},
    "bf16": {"dtype": "bfloat16"},
    "bf16 + autocast": {"dtype": "bfloat16", "bf16": True},
}
LORA = {"use_peft": True, "lora_r": 8}
CASES = [
    *[("mamba", True, p, c, lora) for p in PRECISIONS for c in (False, "selective", True) for lora in ({}, LORA)],
    ("mamba", True, "bf16 + autocast", False, LORA | {"lora_target_modules": ["all-linear"], "lora_dropout": 0.0}),
    *[("falcon_mamba", True, "fp32 + autocast", c, {}) for c in (False, True)],
    ("falcon_mamba", True, "bf16 + autocast", "selective", LORA),
    *[(family, False, "fp32", c, {}) for family in ("mamba", "mamba2") for c in ("selective", True)],
    *[(family, False, "bf16 + autocast", False, LORA) for family in ("mamba", "mamba2")],
]


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize(("family", "kernel", "precision", "checkpointing", "lora"), CASES)
def test_the_plan_counts_what_the_code_allocates(
    family: str, kernel: bool, precision: str, checkpointing: Any, lora: dict[str, Any]
) -> None:
    keys = PRECISIONS[precision] | lora
    recipe = Recipe(**keys, gradient_checkpointing=checkpointing, optim="sgd", do_eval=False)
    with kernels() if kernel else nullcontext():
        shape, kept, highest = step(family, recipe, kernel)
    parts = estimate(shape, recipe, "sft", load=Load(TOKENS, TARGETS))
    planned = parts["kept for backward"] + parts["head"] + (0 if checkpointing is True else parts["autocast copies"])
    assert planned == pytest.approx(kept, rel=0.15)
    assert parts["total"] - parts["weights"] == pytest.approx(highest, rel=0.12)


# docs/performance.md, "Whole steps": peak GiB of forward and backward passes on an H200, all weights trained.
MEASURED = [
    ("130m", 16 * 2048, {"dtype": "bfloat16"}, False, 18.2),
    ("130m", 16 * 2048, {"bf16": True}, False, 18.7),
    ("130m", 16 * 2048, {"bf16": True}, "selective", 13.1),
    ("130m", 131072, {"dtype": "bfloat16"}, False, 70.6),
    ("130m", 131072, {"dtype": "bfloat16"}, True, 13.9),
    ("2.8b", 4 * 2048, {"dtype": "bfloat16"}, "selective", 31.9),
    ("2.8b", 4 * 2048, {"bf16": True}, True, 21.8),
]


def shape_of(size: str) -> ModelShape:
    hidden, layers = {"130m": (768, 24), "2.8b": (2560, 64)}[size]
    return on_gpu(ModelShape(hidden=hidden, layers=layers, vocab=50280, inner=2 * hidden, rank=hidden // 16))


@pytest.mark.parametrize(("size", "tokens", "keys", "checkpointing", "gib"), MEASURED)
def test_measured_peaks_are_met(size: str, tokens: int, keys: dict[str, Any], checkpointing: Any, gib: float) -> None:
    recipe = Recipe(**keys, gradient_checkpointing=checkpointing, optim="sgd")
    total = estimate(shape_of(size), recipe, "sft", load=Load(tokens, tokens))["total"]
    assert total / 2**30 == pytest.approx(gib, rel=0.06)


def test_qlora_of_2_8b_at_2048_tokens_is_planned_for_a_24_gb_card() -> None:
    keys = {"use_peft": True, "load_in_4bit": True, "dtype": "bfloat16", "bf16": True, "max_length": 2048}
    shape = shape_of("2.8b")
    one, eight = (
        estimate(shape, Recipe(**keys, gradient_checkpointing=True, per_device_train_batch_size=n), "sft")["device"]
        for n in (1, 8)
    )
    assert one < 6e9 and 14e9 < eight < 20e9
    nested = estimate(shape, Recipe(**keys, use_bnb_nested_quant=True, gradient_checkpointing=True), "sft")
    plain = estimate(shape, Recipe(**keys, gradient_checkpointing=True), "sft")
    assert plain["weights"] - nested["weights"] == pytest.approx(shape.quantised * (4 - 1 - 4 / 256) / 64)


def test_several_passes_a_step_keep_gradients_and_a_bound_makes_several() -> None:
    shape, keys = shape_of("130m"), {"per_device_train_batch_size": 8, "bf16": True}
    one, two = Recipe(**keys), Recipe(**keys, gradient_accumulation_steps=2)
    assert load_of(one, "sft").passes == 1 and load_of(two, "sft").passes == 2
    more = estimate(shape, two, "sft")["total"] - estimate(shape, one, "sft")["total"]
    assert more == pytest.approx(4 * shape.parameters)
    assert load_of(Recipe(**keys, max_tokens_per_device=4096), "sft") == Load(4096, 4096, 4)
    shared = Recipe(**keys, global_batch_size=64)
    assert [load_of(shared, "dpo", devices).passes for devices in (1, 8)] == [8, 1]


def test_moments_and_devices() -> None:
    shape = shape_of("2.8b")
    recipe = Recipe(bf16=True, gradient_checkpointing=True, per_device_train_batch_size=1)
    parts, load = estimate(shape, recipe, "sft"), load_of(recipe, "sft")
    assert highest_moment(shape, recipe, "sft", parts, load) == "update"
    assert parts["total"] == pytest.approx(20 * shape.parameters, rel=0.01)
    fused = replace(recipe, optim="adamw_torch_fused")
    assert highest_moment(shape, fused, "sft", estimate(shape, fused, "sft"), load) == "backward ends"
    assert estimate(shape, recipe, "sft", devices=2)["total"] > parts["total"], "DDP's buckets"
    shards = [estimate(shape, replace(recipe, fsdp="full_shard"), "sft", devices=n)["total"] for n in (2, 4, 8)]
    assert parts["total"] / 2 < shards[0] < 0.75 * parts["total"] and shards[2] < shards[1] < shards[0]
    wide = replace(recipe, per_device_eval_batch_size=512)
    assert highest_moment(shape, wide, "sft", estimate(shape, wide, "sft"), load) == "evaluation"
    adapters = replace(recipe, use_peft=True, dtype="bfloat16", reference_batch_tokens=400_000, do_eval=False)
    assert highest_moment(shape, adapters, "dpo", estimate(shape, adapters, "dpo"), load) == "reference pass"
    paged = replace(recipe, use_peft=True, optim="paged_adamw_32bit")
    assert estimate(shape, paged, "sft")["optimizer"] == 0 < estimate(shape, paged, "sft")["paged optimizer"]
