"""Mistakes that can be seen in a recipe without its data: each was made in a published recipe or costs a lost run."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mambalign.recipe import Recipe, entry_splits, is_test_split, nearest

# Published base models of the supported families: DPO of one has no instruction-following reference to stay near.
_BASE_MODEL = re.compile(r"(^|/)mamba2?-\d+(\.\d+)?[mb](-slimpj)?(-hf)?/?$|(^|/)falcon-mamba-7b/?$")


PROJECTIONS = ("in_proj", "x_proj", "dt_proj", "out_proj", "all-linear")


@dataclass(frozen=True)
class Finding:
    """One thing to know about a recipe. error: the run would stop or be worthless; warning: look again."""

    level: Literal["error", "warning"]
    key: str
    message: str


def known_mistakes(recipe: Recipe, stage: str) -> Iterator[Finding]:
    """Findings from the recipe's values alone."""
    yield from _learning_rate(recipe, stage)
    yield from _precision(recipe)
    yield from _splits(recipe)
    yield from _adapters(recipe)
    if stage == "dpo":
        yield from _preferences(recipe)
    if stage == "reward":
        yield from _rewards(recipe)
    if recipe.save_total_limit == 1:
        yield Finding("warning", "save_total_limit", "1 leaves nothing when a crash tears the newest; keep 2")
    if recipe.save_only_model and recipe.save_strategy != "no":
        yield Finding("warning", "save_only_model", "checkpoints without optimizer state cannot resume")
    if recipe.push_to_hub and not recipe.hub_model_id:
        name = Path(recipe.output_dir or ".").name
        yield Finding("warning", "hub_model_id", f"not given; the model is pushed as {name!r} under your account")


def _learning_rate(recipe: Recipe, stage: str) -> Iterator[Finding]:
    rate, adapters = recipe.learning_rate, recipe.use_peft
    usual, most = {
        ("dpo", False): (5e-7, 1e-5),
        ("dpo", True): (5e-6, 5e-5),
        ("reward", False): (1e-5, 1e-3),
        ("reward", True): (1e-4, 1e-3),
        ("sft", False): (2e-5, 1e-3),
        ("sft", True): (2e-4, 1e-3),
    }.get((stage, adapters), (2e-4, 3e-3))
    if rate > most:
        how = "adapters" if adapters else "all weights"
        yield Finding(
            "warning",
            "learning_rate",
            f"{rate:g} is {rate / usual:,.0f} times the usual {usual:g} for {stage.upper()} of {how}"
            + ("; published DPO runs took 5e-7 to 5e-6" if stage == "dpo" else ""),
        )
    if recipe.warmup_steps == 0 or (recipe.warmup_steps is None and recipe.warmup_ratio == 0):
        yield Finding("warning", "warmup_ratio", "no warmup: AdamW's first steps are full-size in every weight")


def _precision(recipe: Recipe) -> Iterator[Finding]:
    if recipe.dtype in ("bfloat16", "float16") and not recipe.use_peft:
        yield Finding(
            "warning",
            "dtype",
            f"{recipe.dtype} weights without float32 masters: an update below about 1/256 of a weight is rounded "
            "away; leave dtype out and set bf16: true",
        )
    if recipe.fp16 or recipe.dtype == "float16":
        yield Finding(
            "warning", "fp16" if recipe.fp16 else "dtype", "a Mamba's states overflow float16's 65504; use bf16: true"
        )


def _splits(recipe: Recipe) -> Iterator[Finding]:
    for name, entry in recipe.dataset_mixer.items():
        splits = entry_splits(name, entry)
        if splits and all(map(is_test_split, splits)):
            yield Finding(
                "warning",
                "dataset_mixer",
                f"{name}: split {', '.join(splits)} is by its name only evaluated, never trained on",
            )


def _adapters(recipe: Recipe) -> Iterator[Finding]:
    if not recipe.use_peft:
        if recipe.lora_target_modules or recipe.lora_modules_to_save:
            yield Finding("warning", "use_peft", "false, so the lora_* keys mean nothing and all weights train")
        return
    targets = recipe.lora_target_modules or []
    for name in targets:
        last = name.split(".")[-1]
        if last in ("embeddings", "lm_head") and not {"embeddings", "lm_head"} <= {t.split(".")[-1] for t in targets}:
            yield Finding(
                "warning",
                "lora_target_modules",
                f"{name}: where embeddings and lm_head are tied (all Mamba-1 models), an adapter moves one of the two, "
                "and the merged model has both matrices",
            )
        elif last in ("conv1d", "A_log", "D", "bias", "norm"):
            yield Finding(
                "error",
                "lora_target_modules",
                f"{name} is no projection; it is small: train it in full with lora_modules_to_save: [{name}]",
            )
        elif last not in (*PROJECTIONS, "embeddings", "lm_head"):
            yield Finding(
                "error",
                "lora_target_modules",
                f"{name}: no such module in a Mamba{nearest(name, PROJECTIONS)}; it has in_proj, x_proj, dt_proj, "
                "out_proj",
            )


def _preferences(recipe: Recipe) -> Iterator[Finding]:
    # (loss types, lowest, highest, what is usual)
    ranges = [
        (("sigmoid", "hinge", "robust", "apo_zero", "apo_down", "kto"), 0.005, 1.0, "0.01 to 0.5"),
        (("ipo",), 0.005, 1.0, "0.01 to 0.5"),
        (("simpo",), 1.0, 20.0, "2 to 10"),
        (("orpo",), 0.01, 1.0, "0.05 to 0.5"),
    ]
    for names, low, high, usual in ranges:
        if recipe.loss_type in names and not low <= recipe.beta <= high:
            yield Finding("warning", "beta", f"{recipe.beta:g} is extreme for {recipe.loss_type}; usual is {usual}")
    name = recipe.model_name_or_path or ""
    if recipe.loss_type != "orpo" and (_BASE_MODEL.search(name) or _trained_for(name) == "cpt"):
        yield Finding(
            "warning",
            "model_name_or_path",
            f"{name} is a base model: it has not learnt to answer, and neither has the reference; run SFT first and "
            "start from its output_dir",
        )
    if _trained_for(name) == "dpo":
        yield Finding("warning", "model_name_or_path", f"{name} is a DPO run's result already; is a second one meant?")
    if recipe.rpo_alpha is not None and recipe.rpo_alpha > 10:
        yield Finding("warning", "rpo_alpha", f"{recipe.rpo_alpha:g} leaves little of the preference loss; usual is 1")


def _rewards(recipe: Recipe) -> Iterator[Finding]:
    if recipe.num_train_epochs > 2 and recipe.max_steps < 0:
        yield Finding(
            "warning",
            "num_train_epochs",
            f"{recipe.num_train_epochs:g}: a reward model overfits its pairs after one epoch (arXiv 2203.02155, "
            "appendix C.2); usual is 1",
        )
    name = recipe.model_name_or_path or ""
    if _BASE_MODEL.search(name) or _trained_for(name) == "cpt":
        yield Finding(
            "warning",
            "model_name_or_path",
            f"{name} is a base model: a reward model usually starts from the result of an SFT run, which knows the "
            "chat template",
        )
    if (recipe.center_rewards_coefficient or 0) > 1:
        yield Finding(
            "warning",
            "center_rewards_coefficient",
            f"{recipe.center_rewards_coefficient:g} leaves little of the preference loss; usual is 0.01",
        )


def _trained_for(model: str) -> str | None:
    """The stage of the run whose folder `model` is, if it is one."""
    try:
        state = json.loads((Path(model).expanduser() / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state.get("stage") if isinstance(state, dict) else None
