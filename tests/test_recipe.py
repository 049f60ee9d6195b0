"""Recipes: types, overrides, errors that teach, keys of earlier handbooks, and what transformers is given."""

from __future__ import annotations

import ast
import dataclasses
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from mambalign.recipe import Recipe, UserError, key_groups, key_types, load_recipe

MINIMAL = {"model_name_or_path": "some/model", "dataset_mixer": {"some/data": 1.0}, "output_dir": "out"}


@pytest.fixture
def write(tmp_path: Path) -> Any:
    def write(text: str | dict[str, Any], name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
        return path

    return write


def overridden(write: Any, *words: str, **keys: Any) -> Recipe:
    return load_recipe(write(MINIMAL | keys), words, stage="sft")


# --- types and overrides ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("written", ["5e-7", "5.0e-07", "0.0000005", "'5e-7'"])
def test_a_learning_rate_is_a_number_however_yaml_reads_it(write: Any, written: str) -> None:
    recipe = load_recipe(write(f"learning_rate: {written}\n"))
    assert recipe.learning_rate == 5e-7


def test_numbers_inside_maps_are_numbers_too(write: Any) -> None:
    recipe = load_recipe(write("lr_scheduler_kwargs: {min_lr: 1e-6}\ndataset_mixer: {a: 5e-1}\n"))
    assert recipe.lr_scheduler_kwargs == {"min_lr": 1e-6}
    assert recipe.dataset_mixer == {"a": 0.5}


def test_yaml_no_and_none_mean_what_they_say(write: Any) -> None:
    text = "eval_strategy: no\nsave_strategy: no\nreport_to: none\nchat_template: none\ndtype: null\n"
    recipe = load_recipe(write(text))
    assert (recipe.eval_strategy, recipe.save_strategy, recipe.report_to) == ("no", "no", [])
    assert recipe.chat_template is None and recipe.dtype is None


def test_overrides_of_every_form(write: Any) -> None:
    words = "--learning_rate 1e-5 --max-steps -1 --packing=false --push_to_hub --seed=7 --dataset_splits a,test_a"
    recipe = overridden(write, *words.split(), "--report_to", "wandb", "tensorboard", "--chat_template", "zephyr")
    assert recipe.learning_rate == 1e-5 and recipe.max_steps == -1 and recipe.seed == 7
    assert recipe.packing is False and recipe.push_to_hub is True
    assert recipe.dataset_splits == ["a", "test_a"] and recipe.report_to == ["wandb", "tensorboard"]
    assert overridden(write, "--dataset_splits", "[x, y]").dataset_splits == ["x", "y"]
    assert overridden(write, "--max_train_samples", "none").max_train_samples is None
    assert overridden(write, "--dataset_mixer", "{my/data: 0.5}").dataset_mixer == {"my/data": 0.5}


def test_dotted_overrides_reach_into_maps_whose_keys_hold_dots(write: Any) -> None:
    mixer = {"data/chat.v2.jsonl": {"fraction": 1.0}, "b": 1.0}
    recipe = overridden(
        write,
        "--dataset_mixer.data/chat.v2.jsonl.fraction=0.25",
        "--dataset_mixer.b",
        "0.5",
        "--dataset_mixer.new/set.jsonl=1e-1",
        "--gradient_checkpointing_kwargs.use_reentrant=false",
        dataset_mixer=mixer,
    )
    assert recipe.dataset_mixer == {"data/chat.v2.jsonl": {"fraction": 0.25}, "b": 0.5, "new/set.jsonl": 0.1}
    assert recipe.gradient_checkpointing_kwargs == {"use_reentrant": False}


def test_a_recipe_survives_being_written_and_read(write: Any) -> None:
    recipe = overridden(write, "--learning_rate=3e-7", "--eval_strategy", "no", "--lr_scheduler_kwargs.min_lr=1e-8")
    again = load_recipe(write(recipe.to_yaml(), "frozen.yaml"))
    assert again == recipe and again.stage == "sft"
    # The run folder's reader is plain YAML.
    assert Recipe.from_dict(yaml.safe_load(recipe.to_yaml())) == recipe


def test_stages_bring_their_defaults_but_never_over_what_is_written(write: Any) -> None:
    path = write(MINIMAL)
    assert load_recipe(path, stage="sft").learning_rate == 2e-5
    dpo = load_recipe(path, stage="dpo")
    assert (dpo.learning_rate, dpo.max_length, dpo.max_prompt_length) == (5e-7, 1024, None)
    assert load_recipe(path, ["--learning_rate", "1e-6"], stage="dpo").learning_rate == 1e-6
    assert load_recipe(path, ["--max_length", "256"], stage="dpo").max_length == 256
    assert load_recipe(path, stage="cpt").truncation == "split"


def test_extends_is_relative_to_its_file_and_the_later_file_wins(write: Any) -> None:
    write("learning_rate: 1e-5\nseed: 1\ndataset_mixer: {a: 1.0}\n", "common/base.yaml")
    write("extends: base.yaml\nseed: 2\nbeta: 0.5\n", "common/more.yaml")
    path = write("extends: [../common/base.yaml, ../common/more.yaml]\ndataset_mixer: {b: 1.0}\n", "model/r.yaml")
    recipe = load_recipe(path)
    assert (recipe.learning_rate, recipe.seed, recipe.beta, recipe.dataset_mixer) == (1e-5, 2, 0.5, {"b": 1.0})
    circle = write("extends: b.yaml\n", "a.yaml")
    write("extends: a.yaml\n", "b.yaml")
    with pytest.raises(UserError, match="circle"):
        load_recipe(circle)


# --- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("learning_rate: fast", ["learning_rate", "a number", "'fast'"]),
        ("max_length: 2048.5", ["max_length", "a whole number", "2048.5"]),
        ("max_length: yes", ["max_length", "a whole number"]),
        ("learning_rate: .inf", ["learning_rate"]),
        ("packing: sometimes", ["packing", "true or false"]),
        ("output_dir: [a, b]", ["output_dir", "text"]),
        ("dataset_mixer: some/data", ["dataset_mixer", "a map"]),
        ("dataset_mixer: {a: true}", ["dataset_mixer", "'a'", "True"]),
        ("loss_type: sigmoyd", ["loss_type", "did you mean 'sigmoid'"]),
        ("lr_scheduler_type: cosin", ["lr_scheduler_type", "did you mean 'cosine'"]),
        ("leraning_rate: 1e-5", ["unknown key 'leraning_rate'", "did you mean 'learning_rate'"]),
        ("max_seq_len: 512", ["unknown key 'max_seq_len'", "max_seq_length"]),
        ("dtype: int8", ["dtype", "float32"]),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(write: Any, text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load_recipe(write(text))
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"beta": 0}, "beta is 0.0: it must be above 0"),
        ({"label_smoothing": 0.5}, "label_smoothing"),
        ({"label_smoothing": 0.1, "loss_type": "ipo"}, "only sigmoid and robust"),
        ({"warmup_ratio": 1.0}, "warmup_steps"),
        ({"warmup_ratio": 0.1, "warmup_steps": 10}, "keep one"),
        ({"max_steps": 0}, "max_steps"),
        ({"bf16": True, "fp16": True}, "keep bf16"),
        ({"load_in_4bit": True, "load_in_8bit": True}, "keep one"),
        ({"per_device_train_batch_size": 0}, "above 0"),
        ({"dataset_mixer": {"a": 1, "b": 1}, "dataset_configs": ["x"]}, "each of the 2 datasets"),
        ({"load_best_model_at_end": True}, "eval_strategy"),
        ({"seed": -1}, "from 0 to 4294967295"),
        ({"dataloader_persistent_workers": True}, "dataloader_num_workers above 0"),
        ({"log_level": "loud"}, "log_level must be one of debug"),
        ({"backend": "cuda-magic"}, "backend must be one of auto, cuda, torch, reference"),
    ],
)
def test_values_that_cannot_work_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as error:
        Recipe(**keys)
    assert words in str(error.value)


def test_a_stage_needs_its_keys(write: Any) -> None:
    for name in MINIMAL:
        with pytest.raises(UserError, match=f"^{name} is missing"):
            load_recipe(write({k: v for k, v in MINIMAL.items() if k != name}), stage="sft")
    with pytest.raises(UserError, match="needs room"):
        load_recipe(write(MINIMAL | {"max_length": 512, "max_prompt_length": 512}), stage="dpo")
    with pytest.raises(UserError, match="nothing is left to train on"):
        load_recipe(write(MINIMAL | {"dataset_splits": ["test_sft"]}), stage="sft")
    only_test = MINIMAL | {"dataset_splits": ["test"]}
    with pytest.raises(UserError, match="nothing is left to train on"):
        load_recipe(write(only_test | {"dataset_mixer": {"d": {"split": "dev"}}}), stage="sft")
    for own in ({"splits": ["train_x", "test_x"]}, {"split": "train_x"}):
        load_recipe(write(only_test | {"dataset_mixer": {"d": own}}), stage="sft")
    with pytest.raises(UserError, match="recipe for dpo"):
        load_recipe(write(MINIMAL | {"stage": "dpo"}), stage="sft")


def test_a_folder_names_the_recipes_in_it(tmp_path: Path) -> None:
    for depth in ("a/b", "a/b/c"):
        (tmp_path / depth).mkdir(parents=True)
        (tmp_path / depth / "r.yaml").touch()
    with pytest.raises(UserError) as error:
        load_recipe(tmp_path)
    assert str(error.value).endswith(f"is a folder, a recipe is a YAML file; it holds {tmp_path / 'a/b/r.yaml'}")


def test_yaml_anchors_are_merged_and_overridden(write: Any) -> None:
    text = "dataset_mixer:\n  a: &shared {fraction: 0.5, split: train}\n  b: {<<: *shared, fraction: 1.0}\n"
    assert load_recipe(write(text)).dataset_mixer["b"] == {"fraction": 1.0, "split": "train"}


def test_broken_files_are_named_with_their_line(write: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"r\.yaml, line 3: key 'seed' is given twice \(first in line 1\)"):
        load_recipe(write("seed: 1\nbeta: 0.1\nseed: 2\n", "r.yaml"))
    with pytest.raises(UserError, match=r"r\.yaml, line 3.*begun in line 2"):
        load_recipe(write("seed: 1\nbeta: [0.1\nrun_name: x\n", "r.yaml"))
    with pytest.raises(UserError, match="a map of `key: value` lines"):
        load_recipe(write("- a\n- b\n"))
    with pytest.raises(UserError, match=r"does not exist; did you mean 'config_full\.yaml'"):
        write("seed: 1\n", "config_full.yaml")
        load_recipe(tmp_path / "config_ful.yaml")
    with pytest.raises(UserError, match="is a folder"):
        load_recipe(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_recipe(tmp_path / "bytes.yaml")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rate"], "--learning_rate needs a value"),
        (["--learning_rate", "1", "2"], "takes one value, not 2"),
        (["1e-5"], "not an option"),
        (["--seed.x", "1"], "seed is not a map"),
        (["--dataset_mixer.some/data.split=x"], "not a map"),
        (["--lerning_rate=1"], "did you mean 'learning_rate'"),
    ],
)
def test_wrong_overrides_are_named(write: Any, words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        overridden(write, *words)


# --- batch arithmetic ------------------------------------------------------------------------------------------------


def test_global_batch_size_holds_for_any_number_of_devices() -> None:
    recipe = Recipe(global_batch_size=128, per_device_train_batch_size=8)
    assert [recipe.accumulation_steps(n) for n in (1, 2, 8, 16)] == [16, 8, 2, 1]
    with pytest.raises(UserError, match="128 is not a multiple of per_device_train_batch_size 8 x 3"):
        recipe.accumulation_steps(3)
    with pytest.raises(UserError, match="disagree"):
        Recipe(global_batch_size=64, per_device_train_batch_size=8, gradient_accumulation_steps=16).accumulation_steps()
    assert Recipe(per_device_train_batch_size=8, gradient_accumulation_steps=4).accumulation_steps(8) == 4


# --- transformers ----------------------------------------------------------------------------------------------------


def test_training_arguments_are_taken_by_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    supported = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
    recipe = Recipe(
        output_dir=str(tmp_path),
        learning_rate=3e-6,
        warmup_ratio=0.25,
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"preserve_rng_state": False},
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-7},
        use_cpu=True,
        report_to=[],
        global_batch_size=32,
    )
    args = transformers.TrainingArguments(**recipe.training_arguments(world_size=2, supported=supported))
    assert args.learning_rate == 3e-6 and args.gradient_checkpointing and args.report_to == []
    assert recipe.training_arguments()["gradient_checkpointing_kwargs"] == {
        "use_reentrant": False,  # torch's own default is the other one, with a warning
        "preserve_rng_state": False,
    }
    assert "gradient_checkpointing" not in Recipe(gradient_checkpointing="selective").training_arguments()
    assert args.get_warmup_steps(1000) == 250
    assert args.gradient_accumulation_steps == 2
    assert set(recipe.training_arguments()) <= supported
    assert Recipe(warmup_steps=30).training_arguments()["warmup_steps"] == 30
    # Written out in many recipes: the other key's "not set".
    assert Recipe(warmup_ratio=0.2, warmup_steps=0).training_arguments()["warmup_steps"] == 0.2
    assert Recipe(warmup_ratio=0, warmup_steps=30).training_arguments()["warmup_steps"] == 30
    assert Recipe(warmup_ratio=0).training_arguments()["warmup_steps"] == 0
    assert Recipe().training_arguments()["warmup_steps"] == 0.1


def test_names_of_every_schedule_and_default_are_transformers_own() -> None:
    transformers = pytest.importorskip("transformers")
    from typing import get_args

    known = {s.value for s in transformers.SchedulerType}
    assert set(get_args(key_types()["lr_scheduler_type"])) <= known


def test_backends_of_a_recipe_are_those_of_the_ops() -> None:
    from mambalign.ops import causal_conv1d, rms_norm, selective_scan, ssd, token_logps

    for op in (selective_scan, ssd, causal_conv1d, token_logps, rms_norm):
        assert get_args(key_types()["backend"]) == ("auto", *sys.modules[op.__module__].BACKENDS)


def test_every_key_is_explained() -> None:
    for group, items in key_groups().items():
        for item in items:
            assert item.metadata["help"].endswith((".", ").")), f"{group}.{item.name}"


def test_importing_recipes_is_light() -> None:
    code = "import sys, mambalign.recipe; print({'torch', 'transformers', 'rich'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


# --- the handbook's own keys -----------------------------------------------------------------------------------------

ZEPHYR = "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + eos_token }}{% endfor %}"
SHARED = {
    "bf16": True, "do_eval": True, "gradient_checkpointing": True, "log_level": "info", "lr_scheduler_type": "cosine",
    "gradient_checkpointing_kwargs": {"use_reentrant": False}, "push_to_hub": True, "save_strategy": "steps",
    "save_steps": 100, "save_total_limit": 1, "seed": 42, "warmup_ratio": 0.1, "preprocessing_num_workers": 12,
}  # fmt: skip
LORA = {
    "use_peft": True, "load_in_4bit": True, "lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.05,
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}  # fmt: skip
SFT = SHARED | {
    "model_name_or_path": "mistralai/Mistral-7B-v0.1", "model_revision": "main", "torch_dtype": "bfloat16",
    "chat_template": ZEPHYR, "dataset_mixer": {"HuggingFaceH4/ultrachat_200k": 1.0},
    "dataset_splits": ["train_sft", "test_sft"], "evaluation_strategy": "epoch", "hub_strategy": "every_save",
    "learning_rate": "2.0e-05", "logging_steps": 5, "logging_strategy": "steps", "max_seq_length": 2048,
    "max_steps": -1, "num_train_epochs": 1, "overwrite_output_dir": True, "per_device_eval_batch_size": 8,
    "report_to": ["tensorboard"],
}  # fmt: skip
DPO = SHARED | {
    "dataset_mixer": {"HuggingFaceH4/ultrafeedback_binarized": 1.0}, "dataset_splits": ["train_prefs", "test_prefs"],
    "beta": 0.01, "evaluation_strategy": "steps", "eval_steps": 100, "learning_rate": "5.0e-7", "logging_steps": 10,
    "max_length": 1024, "max_prompt_length": 512, "num_train_epochs": 1, "optim": "adamw_torch",
    "per_device_eval_batch_size": 8,
}  # fmt: skip
HANDBOOK = {
    "beta-sft-full": SFT | {
        "use_flash_attention_2": True, "remove_unused_columns": True, "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1, "output_dir": "data/zephyr-7b-sft-full", "hub_model_id": "zephyr-7b-sft-full",
    },
    "beta-sft-qlora": SFT | LORA | {
        "attn_implementation": "flash_attention_2", "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2,
        "learning_rate": "2.0e-04", "output_dir": "data/zephyr-7b-sft-qlora", "torch_dtype": "auto",
    },
    "beta-dpo-full": DPO | {
        "model_name_or_path": "alignment-handbook/zephyr-7b-sft-full", "torch_dtype": None,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "output_dir": "data/zephyr-7b-dpo-full",
    },
    "beta-dpo-qlora": DPO | LORA | {
        "model_name_or_path": "alignment-handbook/zephyr-7b-sft-qlora", "torch_dtype": "bfloat16",
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "learning_rate": "5.0e-6", "lora_r": 128,
        "lora_alpha": 128, "optim": "paged_adamw_32bit", "output_dir": "data/zephyr-7b-dpo-qlora",
    },
    "gemma-sft-full": SFT | {
        "model_name_or_path": "google/gemma-7b", "tokenizer_name_or_path": "philschmid/gemma-tokenizer-chatml",
        "use_flash_attention_2": True, "dataset_mixer": {"HuggingFaceH4/deita-10k-v0-sft": 1.0},
        "dataset_kwargs": {"add_special_tokens": False, "append_concat_token": False}, "num_train_epochs": 3,
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "output_dir": "data/zephyr-7b-gemma-sft",
        "report_to": ["tensorboard", "wandb"],
    },
    "gemma-dpo-full": DPO | {
        "model_name_or_path": "HuggingFaceH4/zephyr-7b-gemma-sft-v0.1", "torch_dtype": "bfloat16",
        "dataset_mixer": {"argilla/dpo-mix-7k": 1.0}, "dataset_splits": ["train", "test"], "beta": 0.05,
        "num_train_epochs": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8,
        "save_strategy": "no",
        "output_dir": "data/zephyr-7b-gemma-dpo",
    },
}  # fmt: skip


@pytest.mark.parametrize("name", HANDBOOK)
def test_the_handbooks_zephyr_recipes_load_with_their_own_keys(
    write: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    stage = name.split("-")[1]
    with caplog.at_level(logging.INFO, logger="mambalign"):
        recipe = load_recipe(write(HANDBOOK[name]), stage=stage)
    values = HANDBOOK[name]
    per_step = recipe.per_device_train_batch_size * recipe.accumulation_steps(8) * 8
    assert per_step == (64 if name == "beta-sft-qlora" else 128)
    assert recipe.learning_rate == float(values["learning_rate"]) and recipe.warmup_ratio == 0.1
    assert recipe.max_length == (2048 if stage == "sft" else 1024)
    assert recipe.eval_strategy == values["evaluation_strategy"]
    assert recipe.dtype == values["torch_dtype"]
    assert recipe.use_peft is recipe.load_in_4bit is ("qlora" in name)
    # Every renamed or ignored key is said, and once.
    said = [r.getMessage().split(": ", 1)[1] for r in caplog.records]
    assert len(said) == len(set(said)) and said == recipe.notes
    changed = {"torch_dtype", "max_seq_length", "evaluation_strategy", "use_flash_attention_2", "attn_implementation",
               "overwrite_output_dir", "remove_unused_columns", "dataset_kwargs"}  # fmt: skip
    assert {note.split()[0] for note in said} == changed & set(values)


def test_keys_of_the_earlier_mamba_recipes_load(write: Any) -> None:
    keys = MINIMAL | {
        "task_type": "CAUSAL_LM", "bias": "none", "adam_beta1": 0.9, "adam_beta2": 0.95, "weight_decay": 0.1,
        "max_grad_norm": 1, "lora_target_modules": ["x_proj", "embeddings"], "trust_remote_code": False,
    }  # fmt: skip
    recipe = load_recipe(write(keys), stage="sft")
    assert recipe.lora_bias == "none" and recipe.adam_beta2 == 0.95
    assert "task_type is ignored: only causal language models are trained here" in recipe.notes
    assert "bias is now called lora_bias" in recipe.notes


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"trust_remote_code": True}, "trust_remote_code: True is not supported"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"dataset_kwargs": {"add_special_tokens": True}}, "add_special_tokens"),
        ({"hub_token": "x"}, "hf auth login"),
        ({"dtype": "bfloat16", "torch_dtype": "bfloat16"}, "the same key; keep dtype"),
        ({"truncation_side": "middle"}, "truncation must be"),
    ],
)
def test_an_old_key_that_would_lose_its_meaning_is_an_error(write: Any, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_recipe(write(MINIMAL | keys), stage="sft")


def test_old_values_are_mapped_exactly(write: Any) -> None:
    assert overridden(write, truncation_side="left").truncation == "keep_end"
    assert [overridden(write, resume_from_checkpoint=v).resume for v in (None, True, False, "x/checkpoint-5")] == [
        "auto", "auto", "never", "x/checkpoint-5",
    ]  # fmt: skip
    assert overridden(write, "--torch_dtype", "bfloat16").dtype == "bfloat16"


def test_the_2025_mixture_is_refused_with_the_lines_to_write(write: Any) -> None:
    mixture = {"datasets": [{"id": "a/b", "split": "train_sft", "weight": 0.5}, {"id": "a/b", "split": "test_sft"}]}
    with pytest.raises(UserError, match=r"dataset_splits: \['train_sft', 'test_sft'\]"):
        overridden(write, dataset_mixture=mixture)


def test_the_source_of_recipes_needs_only_the_standard_library_and_yaml() -> None:
    import mambalign.recipe as package

    for path in Path(package.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                top = name.split(".")[0]
                assert top in sys.stdlib_module_names or top in ("yaml", "mambalign"), f"{path.name}: {name}"
