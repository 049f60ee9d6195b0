"""Times against measured steps, what a card's figures change, and proposals that fit and keep the rows of a step."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mambalign.check.memory import CONTEXT_BYTES, Load
from mambalign.check.plan import Plan, Rows, described, plan, propose, words
from mambalign.check.shapes import ModelShape
from mambalign.check.speed import CARDS, ERROR, H200, RATES, Card, card_here, card_named, times
from mambalign.recipe import Recipe, UserError
from mambalign.recipe.values import split_overrides

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

# docs/performance.md, "Whole steps": tokens a second of forward and backward passes on an H200, every token a target.
MEASURED = [
    ("130m", 16 * 2048, {"dtype": "bfloat16"}, False, 349_400),
    ("130m", 16 * 2048, {"bf16": True}, False, 346_500),
    ("130m", 16 * 2048, {"bf16": True}, "selective", 331_200),
    ("130m", 131072, {"dtype": "bfloat16"}, False, 309_900),
    ("2.8b", 4 * 2048, {"dtype": "bfloat16"}, "selective", 25_400),
    ("2.8b", 4 * 2048, {"bf16": True}, True, 18_300),
    # Before CUDA graphs.
    ("130m", 16 * 2048, {"dtype": "bfloat16", "cuda_graphs": False}, False, 328_000),
]
SHAPES = {"130m": (768, 24), "790m": (1536, 48), "2.8b": (2560, 64)}


def shape_of(size: str) -> ModelShape:
    hidden, layers = SHAPES[size]
    return ModelShape(hidden=hidden, layers=layers, vocab=50280, inner=2 * hidden, rank=hidden // 16)


@pytest.mark.parametrize(("size", "tokens", "keys", "checkpointing", "speed"), MEASURED)
def test_measured_steps_are_met(size: str, tokens: int, keys: dict[str, Any], checkpointing: Any, speed: float) -> None:
    recipe = Recipe(**keys, gradient_checkpointing=checkpointing)
    seconds = times(shape_of(size), recipe, "sft", H200, Load(tokens, tokens))
    assert tokens / (seconds["forward"] + seconds["backward"]) == pytest.approx(speed, rel=0.15)


RESULTS = json.loads((BENCHMARKS / "results" / "plan.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def bench() -> Iterator[ModuleType]:
    """`benchmarks/plan.py`: it knows the recipes of its rows."""
    before = {name: sys.modules.pop(name, None) for name in ("plan", "common")}
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("plan")
    for name in before:
        sys.modules.pop(name, None)
    sys.modules.update({name: module for name, module in before.items() if module is not None})


@pytest.mark.parametrize("row", RESULTS["rows"], ids=lambda row: f"{row['group']}-{row['stage']}-{row['rows']}")
def test_whole_steps_measured_on_an_h200_are_met(bench: ModuleType, row: dict[str, Any]) -> None:
    """The claim of `mambalign check`: memory within 15 %, the time of a step within 30 %. No row is left out.

    Only `reference_seconds` of the DPO rows is not claimed: in those runs the reference pass computed without autocast,
    in fp32 where weights are fp32, which a plan does not foresee; docs/planning.md says so.
    """
    assert "missing" not in row, "all were measured"
    count = row["rows"] * row["length"] * row["accumulation"]
    assert (row["tokens"], row["targets"], row["passes"]) == (count, count * 3 // 4, row["accumulation"])
    # What `check` takes from the data: rows, or pairs with their prompt once, and the share that is predicted.
    recipe = bench.case_of(row).recipe
    seen = Rows.of([row["length"]] * 9, 0.75)
    assert bench.load_of(row) == seen.load(recipe, row["stage"], 1, usual=True)
    assert bench.load_of(row) == seen.load(recipe, row["stage"], 1, usual=False)
    made = bench.planned(row, bench.card_of(RESULTS["environment"], row))
    assert made["total"] == pytest.approx(row["peak_allocated"], rel=0.15)
    # bitsandbytes' paged moments are not among what PyTorch's allocator reserves.
    taken = made["device"] - made["parts"]["paged optimizer"]
    assert taken == pytest.approx(row["peak_reserved"] + CONTEXT_BYTES, rel=0.15)
    assert made["seconds"]["step"] == pytest.approx(row["seconds"], rel=ERROR) and ERROR == 0.30


def test_the_rates_are_those_that_fit_the_measured_steps(bench: ModuleType) -> None:
    fitted = bench.fit(RESULTS["rows"], bench.card_of(RESULTS["environment"], RESULTS["rows"][0]))
    assert asdict(fitted) == pytest.approx(asdict(RATES), rel=0.01)


def test_the_handbook_shows_todays_plan_beside_what_was_measured(bench: ModuleType) -> None:
    expected = [documented(bench, row) for row in RESULTS["rows"]]
    page = (BENCHMARKS.parent / "docs/planning.md").read_text(encoding="utf-8")
    shown = [line for line in page.splitlines() if line.startswith(("| 130m ", "| 2.8b "))]
    assert len(shown) >= 12 and set(shown) <= set(expected), "these are true:\n" + "\n".join(expected)


def documented(bench: ModuleType, row: dict[str, Any]) -> str:
    """The row of docs/planning.md."""
    made = bench.planned(row, bench.card_of(RESULTS["environment"], row))
    seconds, peak = made["seconds"]["step"], row["peak_allocated"]
    method = {"full": "full", "lora": "LoRA", "qlora": "QLoRA"}[row["method"]]
    cells = [
        f"{row['size']} {row['stage'].upper()} {method}, {row['rows']} x {row['length']:,}",
        f"`{str(bench.case_of(row).recipe.gradient_checkpointing).lower()}`",
        *(f"{value / 1e9:.1f}" for value in (peak, made["total"])),
        f"{made['total'] / peak - 1:+.0%}".replace("-0%", "+0%"),
        *(f"{1e3 * value:.0f}" for value in (row["seconds"], seconds)),
        f"{seconds / row['seconds'] - 1:+.0%}".replace("-0%", "+0%"),
    ]
    return f"| {' | '.join(cells)} |"


def test_every_method_was_measured_and_2_8b_qlora_in_24_gb() -> None:
    measured = {(row["size"], row["stage"], row["method"]) for row in RESULTS["rows"]}
    assert measured == set(itertools.product(("130m", "2.8b"), ("sft", "dpo"), ("full", "lora", "qlora")))
    small = [row for row in RESULTS["rows"] if row["limit_gb"] == 24]
    assert {(row["stage"], row["rows"], row["length"]) for row in small} >= {("sft", 8, 2048), ("dpo", 8, 1024)}
    assert all(row["group"] == "2.8b-qlora" and row["peak_reserved"] + CONTEXT_BYTES < 24e9 for row in small)


def test_time_follows_the_recipe() -> None:
    shape, load = shape_of("2.8b"), Load(16384, 12288)
    keys: dict[str, Any] = {"bf16": True, "dtype": "bfloat16", "gradient_checkpointing": True}

    def seconds(passes: int = 1, stage: str = "sft", **more: Any) -> dict[str, float]:
        return times(shape, Recipe(**keys | more), stage, H200, replace(load, passes=passes))

    full, lora = seconds(), seconds(use_peft=True)
    qlora = seconds(use_peft=True, load_in_4bit=True)
    assert lora["optimizer"] < full["optimizer"] / 4
    assert lora["optimizer"] == pytest.approx(64 * 4 * RATES.host_tensor, rel=0.02), "as long as Python takes"
    assert qlora["forward"] > lora["forward"] and qlora["backward"] > lora["backward"]
    assert seconds(use_peft=True, lora_r=256)["step"] > lora["step"]
    assert seconds(use_peft=True, lora_target_modules=["all-linear"])["step"] > lora["step"]
    kept = seconds(gradient_checkpointing=False)
    assert kept["backward"] < seconds(gradient_checkpointing="selective")["backward"] < full["backward"]
    assert seconds(passes=4)["forward"] == pytest.approx(4 * full["forward"])
    assert seconds(passes=4)["optimizer"] == full["optimizer"]
    dpo = seconds(stage="dpo")
    assert dpo["forward"] < full["forward"] and dpo["backward"] > full["backward"], "its logits are made twice"
    assert 0 < dpo["reference"] <= 1.01 * dpo["forward"], "no graph, no gradients"
    assert seconds(bf16=False, dtype="float32")["step"] > 3 * full["step"], "without tensor cores"


def test_a_small_step_waits_for_python() -> None:
    recipe = Recipe(bf16=True, cuda_graphs=False)
    made = [times(shape_of("130m"), recipe, "sft", H200, Load(n, n)) for n in (64, 512, 32768)]
    passes = [seconds["forward"] + seconds["backward"] for seconds in made]
    assert passes[0] == pytest.approx(passes[1], rel=0.01)
    assert passes[0] == pytest.approx(24 * (RATES.host_forward + RATES.host_backward), rel=0.01)
    assert passes[2] > 1.4 * passes[1]
    assert made[1]["step"] - passes[1] == pytest.approx(made[0]["step"] - passes[0] + 448 * RATES.host_token)


def test_a_graph_does_not_wait_for_python() -> None:
    def step(devices: int = 1, size: str = "130m", **keys: Any) -> float:
        recipe = Recipe(bf16=True, **keys)
        return times(shape_of(size), recipe, "sft", H200, Load(512, 512), devices=devices)["step"]

    without = step(cuda_graphs=False)
    assert step() < without / 2 and step(gradient_checkpointing=True) < without / 2
    assert step(devices=2) < without / 2, "few gradients, which can wait for the backward pass"
    # Where there is none, Python is waited for as before.
    assert step(deepspeed="ds.json") == without and step(devices=2, fsdp="full_shard") > 0.9 * without
    assert step(devices=2, size="2.8b") == step(devices=2, size="2.8b", cuda_graphs=False)
    dropout = dict(use_peft=True, gradient_checkpointing=True)
    assert step(**dropout, lora_dropout=0.1) == step(**dropout, lora_dropout=0.1, cuda_graphs=False)
    assert step(**dropout, lora_dropout=0.0) < step(**dropout, lora_dropout=0.0, cuda_graphs=False)


def test_python_takes_longer_for_adapters_4_bits_and_layers_that_run_again() -> None:
    def step(**keys: Any) -> float:
        recipe = Recipe(bf16=True, dtype="bfloat16", cuda_graphs=False, **keys)
        return times(shape_of("2.8b"), recipe, "sft", H200, Load(64, 64))["step"]

    full, lora, qlora = step(), step(use_peft=True), step(use_peft=True, load_in_4bit=True)
    assert full < lora < qlora < step(use_peft=True, load_in_4bit=True, gradient_checkpointing=True)
    assert step(gradient_checkpointing=True) - full > 64 * (RATES.host_forward + RATES.host_again)


def test_devices_share_and_talk() -> None:
    shape, load = shape_of("2.8b"), Load(8192, 8192)
    recipe = Recipe(bf16=True, gradient_checkpointing=True)
    slow = replace(H200, link=1e9)
    assert times(shape, recipe, "sft", H200, load, devices=8)["communication"] == 0.0, "hidden behind the backward pass"
    assert times(shape, recipe, "sft", slow, load, devices=8)["communication"] > 1.0
    shards = replace(recipe, fsdp="full_shard")
    alone, eighth = (times(shape, r, "sft", H200, load, devices=8) for r in (recipe, shards))
    assert alone["optimizer"] / 8 < eighth["optimizer"] < alone["optimizer"] / 3, (
        "an eighth for the card, not for Python"
    )
    assert times(shape, shards, "sft", slow, load, devices=8)["communication"] > 10.0


def test_cards_by_name() -> None:
    assert card_named("H200") is H200 and card_named("nvidia_h100") is CARDS["h100"]
    assert card_named("4090") is CARDS["rtx-4090"]
    assert card_named("24gb") == Card("24gb", 24e9) and not card_named("24GB").has_speed
    with pytest.raises(UserError, match="did you mean 'h200'"):
        card_named("h20")
    assert card_here("NVIDIA H200", 150e9) == replace(H200, memory=150e9)
    assert card_here("NVIDIA A100-SXM4-80GB", 85e9).matrix == CARDS["a100-80"].matrix
    assert card_here("NVIDIA GeForce RTX 4090", 25e9).name == "rtx-4090"
    assert not card_here("Some GPU", 8e9).has_speed
    order = ["rtx-3090", "rtx-4090", "a100-80", "h100", "h200"]
    steps = [plan(shape_of("790m"), Recipe(bf16=True), "sft", CARDS[name]).seconds for name in order]
    assert [s["step"] for s in steps if s] == sorted((s["step"] for s in steps if s), reverse=True)


def test_what_is_not_known_is_said() -> None:
    recipe = Recipe(bf16=True)
    unknown = plan(shape_of("130m"), recipe, "sft", card_named("24gb"))
    assert unknown.seconds is None and unknown.speed == 0.0
    assert "speed of 24gb is not known" in described(unknown)["time"]
    mamba2 = ModelShape.from_config(
        {"d_model": 768, "n_layer": 24, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}}
    )
    assert "Mamba-2" in described(plan(mamba2, recipe, "sft", H200))["time"]
    assert (
        "only the h200 was measured" in described(plan(shape_of("130m"), recipe, "sft", CARDS["h100"]))["give_or_take"]
    )


def total(p: Plan) -> int:
    return p.recipe.per_device_train_batch_size * p.devices * p.recipe.accumulation_steps(p.devices)


def test_a_proposal_fits_and_keeps_the_rows_of_a_step() -> None:
    shape = shape_of("2.8b")
    recipe = Recipe(bf16=True, per_device_train_batch_size=8, global_batch_size=128, gradient_checkpointing=True)
    for name in CARDS:
        best = propose(shape, recipe, "sft", CARDS[name])
        assert best is not None and best.fits and total(best) == 128, name
        assert best.parts["device"] <= 0.97 * best.card.memory
    large, small = propose(shape, recipe, "sft", CARDS["h200"]), propose(shape, recipe, "sft", CARDS["rtx-4090"])
    assert large and small and large.devices == 1 and small.devices > 1 and small.recipe.fsdp == "full_shard"
    asked = plan(shape, recipe, "sft", H200)
    assert asked.fits and asked.seconds and large.seconds and large.seconds["step"] <= asked.seconds["step"]
    assert propose(shape, recipe, "sft", card_named("4gb")) is None
    assert propose(shape, recipe, "sft", CARDS["rtx-4090"], gpus=1) is None
    eight = propose(shape, recipe, "sft", CARDS["a100-80"], gpus=8)
    assert eight and eight.devices == 8 and total(eight) == 128
    assert propose(shape, replace(recipe, global_batch_size=4), "sft", H200, gpus=8) is None, "fewer rows than GPUs"
    qlora = replace(recipe, use_peft=True, load_in_4bit=True, dtype="bfloat16")
    one = propose(shape, qlora, "sft", card_named("24gb"))
    assert one and one.devices == 1 and not one.recipe.fsdp and total(one) == 128


def test_a_proposal_in_words() -> None:
    recipe = Recipe(bf16=True, per_device_train_batch_size=16, gradient_checkpointing=True)
    best = propose(shape_of("130m"), recipe, "sft", card_named("8gb"))
    assert best is not None
    text = words(best, recipe)
    assert f"--per_device_train_batch_size {best.recipe.per_device_train_batch_size}" in text
    assert f"--gradient_accumulation_steps {16 // best.recipe.per_device_train_batch_size}" in text
    assert words(plan(shape_of("130m"), recipe, "sft", H200), recipe) == ""
    assert "--fsdp null" in words(
        replace(best, recipe=replace(best.recipe, fsdp=None)), replace(recipe, fsdp="full_shard")
    )


@pytest.mark.parametrize("keys", [(), ("accumulation",), ("global",), ("accumulation", "global")])
@pytest.mark.parametrize("devices", [1, 2])
def test_the_words_of_a_proposal_make_it(keys: tuple[str, ...], devices: int) -> None:
    given: dict[str, Any] = {"bf16": True, "per_device_train_batch_size": 4}
    given |= {"gradient_accumulation_steps": 4} if "accumulation" in keys else {}
    given |= {"global_batch_size": 16 * devices} if "global" in keys else {}  # both agree here, as they must
    recipe = Recipe(**given)
    for gpus in (1, 2, 4):
        best = propose(shape_of("130m"), recipe, "sft", card_named("8gb"), gpus, devices=devices)
        assert best is not None
        made = Recipe(
            **given | {name: value and value[0] for name, value in split_overrides(words(best, recipe).split())}
        )
        assert made.per_device_train_batch_size * made.accumulation_steps(gpus) * gpus == (16 if keys else 4) * devices
        assert (made.gradient_checkpointing, made.fsdp) == (best.recipe.gradient_checkpointing, best.recipe.fsdp)


def test_rows_bound_the_memory_and_give_the_time() -> None:
    rows = Rows.of([100, 300, 200], 0.5)
    assert (rows.mean, rows.longest, rows.targets) == (200, 300, 0.5)
    recipe = Recipe(per_device_train_batch_size=4, global_batch_size=8)
    usual, largest = (rows.load(recipe, "dpo", 1, usual=which) for which in (True, False))
    assert usual == Load(800, 400, 2) and largest == Load(1200, 600, 2)
    bound = rows.load(replace(recipe, max_tokens_per_device=300), "dpo", 1, usual=False)
    assert bound.tokens == 300 and bound.passes == 2 * 3
