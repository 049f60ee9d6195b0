"""Every recipe under recipes/: it parses, its arithmetic is what it says, its README's numbers are computed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from mambalign.check import ModelShape, estimate, known_mistakes
from mambalign.check.memory import on_gpu
from mambalign.recipe import PAIR_STAGES, Recipe, load_recipe

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
FILES = sorted(p for p in RECIPES.glob("*/*/*.yaml"))
NAMES = [str(p.relative_to(RECIPES)) for p in FILES]
REAL = [p for p in FILES if p.parts[-3] != "tiny"]
MODELS = sorted({p.parts[-3] for p in REAL})

# (hidden size, layers) of the original checkpoints, https://arxiv.org/abs/2312.00752 table 12,
# and https://huggingface.co/state-spaces/mamba2-130m.
ORIGINAL = {
    "mamba-130m": (768, 24),
    "mamba-370m": (1024, 48),
    "mamba-790m": (1536, 48),
    "mamba-1.4b": (2048, 48),
    "mamba-2.8b": (2560, 64),
    "mamba-2.8b-slimpj": (2560, 64),
    "mamba2-130m": (768, 24),
}


def shape_of(model: str) -> ModelShape:
    if model == "falcon-mamba-7b":
        return ModelShape(
            hidden=4096, layers=64, vocab=65024, inner=8192, rank=256, tied=False, inner_norms=True, kernels=True
        )
    hidden, layers = ORIGINAL[model]
    config = {"d_model": hidden, "n_layer": layers, "vocab_size": 50277, "pad_vocab_size_multiple": 8}
    if model.startswith("mamba2"):
        config |= {"ssm_cfg": {"layer": "Mamba2"}, "pad_vocab_size_multiple": 16}
    return on_gpu(ModelShape.from_config(config))


def load(path: Path) -> Recipe:
    return load_recipe(path, stage=path.parts[-2])


def test_there_is_a_recipe_for_every_model_and_stage() -> None:
    assert set(MODELS) == {*ORIGINAL, "falcon-mamba-7b"}
    for model in MODELS:
        for stage in ("sft", "dpo"):
            names = {p.name for p in (RECIPES / model / stage).iterdir()}
            assert {"config_full.yaml", "config_gemma_full.yaml", "config_lora.yaml"} <= names


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_a_recipe_loads_in_todays_keys_with_a_batch_that_any_machine_reaches(path: Path) -> None:
    recipe = load(path)
    assert recipe.notes == []
    assert Recipe.from_dict(recipe.to_dict()) == recipe
    for devices in (1, 2) if path.parts[-3] == "tiny" else (1, 2, 4, 8):
        per_step = recipe.per_device_train_batch_size * devices * recipe.accumulation_steps(devices)
        assert per_step == recipe.global_batch_size


@pytest.mark.parametrize("path", REAL, ids=[str(p.relative_to(RECIPES)) for p in REAL])
def test_hyper_parameters_are_the_handbooks(path: Path) -> None:
    recipe, stage = load(path), path.parts[-2]
    variant = path.stem.removeprefix("config_")
    expected = {
        ("sft", "full"): (2e-5, 128, 1.0, 2048, None),
        ("sft", "gemma_full"): (2e-5, 128, 3.0, 2048, None),
        ("sft", "lora"): (2e-4, 64, 1.0, 2048, None),
        ("sft", "qlora"): (2e-4, 64, 1.0, 2048, None),
        ("dpo", "full"): (5e-7, 128, 1.0, 1024, 0.01),
        ("dpo", "gemma_full"): (5e-7, 128, 2.0, 1024, 0.05),
        ("dpo", "lora"): (5e-6, 128, 1.0, 1024, 0.01),
        ("dpo", "qlora"): (5e-6, 128, 1.0, 1024, 0.01),
        ("reward", "full"): (1e-5, 64, 1.0, 1024, None),  # not the handbook's, which has none
    }
    rate, batch, epochs, length, beta = expected[stage, variant]
    assert (recipe.learning_rate, recipe.global_batch_size) == (rate, batch)
    assert (recipe.num_train_epochs, recipe.max_length) == (epochs, length)
    assert beta is None or recipe.beta == beta
    assert recipe.warmup_ratio == 0.1 and recipe.lr_scheduler_type == "cosine" and recipe.seed == 42
    # float32 master weights, computing in bfloat16; frozen weights need no masters
    assert recipe.bf16 and recipe.dtype == ("bfloat16" if recipe.use_peft else None)
    assert recipe.load_in_4bit is (variant == "qlora") and recipe.use_peft is variant.endswith("lora")
    assert recipe.train_splits and recipe.test_splits
    assert recipe.global_batch_size and recipe.accumulation_steps(8) >= 1
    assert list(known_mistakes(recipe, stage)) == []


PREFERENCES = [p for p in FILES if p.parts[-2] in PAIR_STAGES]


@pytest.mark.parametrize("path", PREFERENCES, ids=lambda p: str(p.relative_to(RECIPES)))
def test_preferences_start_from_the_sft_runs_output(path: Path) -> None:
    sft = load(path.parents[1] / "sft" / path.name)
    recipe = load(path)
    assert recipe.model_name_or_path == sft.output_dir != recipe.output_dir
    # The SFT run saves its tokenizer with its template.
    assert recipe.tokenizer_name_or_path is None and recipe.chat_template is None


@pytest.mark.parametrize("model", [m for m in MODELS if m in ORIGINAL])
def test_original_checkpoints_name_the_neox_tokenizer(model: str) -> None:
    for path in (RECIPES / model / "sft").iterdir():
        recipe = load(path)
        assert recipe.tokenizer_name_or_path == "EleutherAI/gpt-neox-20b"
        assert recipe.model_name_or_path == f"state-spaces/{model}"


@pytest.mark.parametrize("model", MODELS)
def test_a_readmes_memory_is_the_formulas(model: str) -> None:
    text = (RECIPES / model / "README.md").read_text()
    shape = shape_of(model)
    assert f"{shape.parameters:,} parameters" in text
    rows = re.findall(r"^\| (sft|dpo)/(config_\w+) \| (\d+) .*\| ([\d.]+) \|$", text, re.MULTILINE)
    assert len(rows) == (6 if (RECIPES / model / "sft" / "config_qlora.yaml").exists() else 4)
    for stage, config, batch, total in rows:
        recipe = load(RECIPES / model / stage / f"{config}.yaml")
        assert int(batch) == recipe.per_device_train_batch_size
        assert total == f"{estimate(shape, recipe, stage)['total'] / 1e9:.1f}"


def test_the_readme_of_all_recipes_does_its_sums() -> None:
    text = " ".join((RECIPES / "README.md").read_text().split())
    shape = shape_of("mamba-2.8b")
    parts = estimate(shape, load(RECIPES / "mamba-2.8b" / "sft" / "config_full.yaml"), "sft")
    fixed = parts["weights"] + parts["autocast copies"] + parts["gradients"] + parts["optimizer"]
    assert f"18 x {shape.parameters / 1e9:.3f}e9 = {fixed / 1e9:.1f} GB" in text
    assert f"comes to {parts['total'] / 1e9:.0f} GB" in text


def test_links_inside_the_readmes_lead_somewhere() -> None:
    for path in RECIPES.rglob("README.md"):
        for target in re.findall(r"\]\(([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path}: {target}"
