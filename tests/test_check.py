"""`mambalign check`: the sums are right, the known mistakes are seen, errors do not hide one another."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from typer.testing import CliRunner

from mambalign.check import CheckReport, ModelShape, check, estimate, known_mistakes
from mambalign.check.memory import tokens_per_forward
from mambalign.cli import app
from mambalign.models import Mamba2ForCausalLM
from mambalign.models.checkpoint import load_model, load_tokenizer, save_model
from mambalign.models.reward import with_reward_head
from mambalign.ops.backends import OPS
from mambalign.recipe import PAIR_STAGES, Recipe, UserError

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
TINY_SFT, TINY_DPO, TINY_REWARD = (
    str(RECIPES / "tiny" / stage / "config_full.yaml") for stage in ("sft", "dpo", "reward")
)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with what recipes/tiny/prepare.py makes."""
    spec = importlib.util.spec_from_file_location("prepare", RECIPES / "tiny" / "prepare.py")
    assert spec is not None and spec.loader is not None
    prepare = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(prepare)
    folder = tmp_path_factory.mktemp("work")
    prepare.main(folder / "data" / "tiny")
    return folder


@pytest.fixture
def tiny(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tiny_folder)
    return tiny_folder / "data" / "tiny"


def found(report: CheckReport, key: str, words: str = "", level: str | None = None) -> bool:
    return any(f.key == key and words in f.message and level in (None, f.level) for f in report.findings)


# --- sizes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mamba", "falcon_mamba"])
def test_parameters_are_counted_as_transformers_makes_them(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    for options in (
        {},
        {"use_bias": True, "use_conv_bias": False},
        {"tie_word_embeddings": False, "state_size": 8, "expand": 3, "time_step_rank": 5, "conv_kernel": 3},
    ):
        config = AutoConfig.for_model(family, hidden_size=48, num_hidden_layers=3, vocab_size=104, **options)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.tie_weights()
        shape = ModelShape.from_config(config.to_dict())
        assert shape.parameters == sum(p.numel() for p in model.parameters()), options


def test_parameters_of_a_mamba2_are_counted_as_the_models_are_made() -> None:
    from transformers import Mamba2Config

    from mambalign.models import original
    from mambalign.models.mamba2 import Mamba2ForCausalLM

    for options in (
        {},
        {"use_bias": True, "use_conv_bias": False, "tie_word_embeddings": True},
        {"n_groups": 3, "expand": 3, "num_heads": 18, "state_size": 5, "conv_kernel": 3, "gated_norm": "none"},
    ):
        sizes = {"hidden_size": 48, "num_hidden_layers": 3, "vocab_size": 104, "num_heads": 12, "head_dim": 8}
        config = Mamba2Config(**sizes | {"n_groups": 2} | options)
        with torch.device("meta"):
            model = Mamba2ForCausalLM(config)
        model.tie_weights()
        for written in (config.to_dict(), original.to_original_config(model)):
            shape = ModelShape.from_config(written)
            assert shape.parameters == sum(p.numel() for p in model.parameters()), written
            mixer = model.backbone.layers[0].mixer
            modules = {name: getattr(mixer, name) for name in shape.projections}
            assert shape.projections == {name: (m.in_features, m.out_features) for name, m in modules.items()}
            assert shape.scan == "ssd"


def test_the_published_models_have_their_published_sizes() -> None:
    original = {"d_model": 2560, "n_layer": 64, "vocab_size": 50277, "ssm_cfg": {}, "pad_vocab_size_multiple": 8}
    assert ModelShape.from_config(original).parameters == 2_768_345_600
    # https://huggingface.co/state-spaces/mamba2-2.7b and -130m: 50,277 tokens in rows padded to 16.
    for hidden, layers, count in ((2560, 64, 2_702_599_680), (768, 24, 128_989_632)):
        original = {"d_model": hidden, "n_layer": layers, "vocab_size": 50277, "pad_vocab_size_multiple": 16}
        assert ModelShape.from_config(original | {"ssm_cfg": {"layer": "Mamba2"}}).parameters == count
    falcon = {"model_type": "falcon_mamba", "hidden_size": 4096, "num_hidden_layers": 64, "vocab_size": 65024}
    falcon |= {"intermediate_size": 8192, "time_step_rank": 256, "tie_word_embeddings": False}
    assert ModelShape.from_config(falcon).parameters == 7_272_665_088


def test_configs_of_other_models_are_refused() -> None:
    with pytest.raises(UserError, match="'llama'; supported are mamba"):
        ModelShape.from_config({"model_type": "llama"})
    with pytest.raises(UserError, match="'Mamba3'; supported are Mamba1 and Mamba2"):
        ModelShape.from_config({"d_model": 8, "n_layer": 1, "vocab_size": 8, "ssm_cfg": {"layer": "Mamba3"}})
    with pytest.raises(UserError, match="n_layer"):
        ModelShape.from_config({"d_model": 8})


def test_the_estimate_follows_the_recipe() -> None:
    shape = ModelShape(hidden=2560, layers=64, vocab=50280, inner=5120, rank=160)
    count = shape.parameters

    def parts(**keys: Any) -> dict[str, float]:
        return estimate(shape, Recipe(**keys), "sft")

    full = parts(bf16=True, gradient_checkpointing=True, per_device_train_batch_size=4)
    fixed = full["weights"] + full["autocast copies"] + full["gradients"] + full["optimizer"]
    assert fixed == pytest.approx(18 * count, rel=1e-3)
    assert parts()["autocast copies"] == 0 and parts(dtype="bfloat16")["weights"] == 2 * count
    assert parts(optim="adamw_8bit")["optimizer"] == 2 * count
    assert parts()["kept for backward"] > 5 * parts(gradient_checkpointing=True)["kept for backward"]
    # What tests/models/test_recompute.py measures to the byte.
    dropped = (
        parts(bf16=True)["kept for backward"]
        - parts(bf16=True, gradient_checkpointing="selective")["kept for backward"]
    )
    assert dropped == pytest.approx(64 * 2 * (2560 + 2 * 5120) * tokens_per_forward(Recipe(), "sft"))
    adapters = parts(use_peft=True, lora_r=8, lora_target_modules=["in_proj"], lora_modules_to_save=["A_log", "D"])
    trained = 64 * (8 * (2560 + 2 * 5120) + 5120 * 17)
    assert adapters["gradients"] == 4 * trained and adapters["optimizer"] == 8 * trained
    assert adapters["weights"] == 4 * (count + trained)
    head = parts(use_peft=True, lora_r=8, lora_target_modules=["all-linear", "lm_head"])["gradients"]
    assert head == 4 * 8 * (64 * (2560 + 10240 + 5120 + 192 + 160 + 5120 + 5120 + 2560) + 50280 + 2560)
    packed = parts(use_peft=True, load_in_4bit=True, bf16=True, dtype="bfloat16", lora_r=8)
    large = 64 * (2560 * 10240 + 5120 * 2560)  # in_proj and out_proj; one at a time is unpacked
    trained = 64 * 8 * (2560 + 10240 + 5120 + 2560)
    expected = 0.5625 * large + 2 * (count - large) + 4 * trained + 2 * 2560 * 10240
    assert packed["weights"] == pytest.approx(expected)
    assert packed["kept for backward"] > parts(dtype="bfloat16", bf16=True)["kept for backward"]
    # Not all at once: gradients come while what is kept goes.
    assert full["total"] < sum(v for k, v in full.items() if k != "total")
    assert full["total"] > full["weights"] + full["gradients"] + full["optimizer"]


def test_a_bound_on_tokens_bounds_the_forward_pass() -> None:
    recipe = Recipe(max_length=100, per_device_train_batch_size=8)
    assert (tokens_per_forward(recipe, "sft"), tokens_per_forward(recipe, "dpo")) == (800, 1600)
    assert tokens_per_forward(Recipe(max_length=100, max_tokens_per_device=300), "dpo") == 300


# --- known mistakes --------------------------------------------------------------------------------------------------

GOOD_DPO = {"learning_rate": 5e-7, "beta": 0.1, "model_name_or_path": "my/sft-model"}
GOOD_SFT = {"learning_rate": 2e-5, "model_name_or_path": "state-spaces/mamba-130m"}


@pytest.mark.parametrize(
    ("stage", "keys", "key", "words"),
    [
        ("dpo", {"learning_rate": 2e-3}, "learning_rate", "4,000 times the usual 5e-07"),
        ("sft", {"learning_rate": 2e-3}, "learning_rate", "100 times the usual 2e-05"),
        ("dpo", {"model_name_or_path": "state-spaces/mamba-2.8b-slimpj"}, "model_name_or_path", "base model"),
        ("dpo", {"model_name_or_path": "state-spaces/mamba-130m-hf"}, "model_name_or_path", "base model"),
        ("dpo", {"model_name_or_path": "models/falcon-mamba-7b/"}, "model_name_or_path", "base model"),
        ("dpo", {"model_name_or_path": "state-spaces/mamba2-2.7b"}, "model_name_or_path", "base model"),
        ("dpo", {"beta": 0.0001}, "beta", "extreme"),
        ("dpo", {"beta": 50.0}, "beta", "extreme"),
        ("dpo", {"beta": 0.1, "loss_type": "simpo"}, "beta", "usual is 2 to 10"),
        ("sft", {"dtype": "bfloat16"}, "dtype", "float32 masters"),
        ("sft", {"fp16": True}, "fp16", "overflow"),
        ("sft", {"lora_target_modules": ["in_proj"]}, "use_peft", "mean nothing"),
        ("sft", {"use_peft": True, "lora_target_modules": ["conv1d"]}, "lora_target_modules", "lora_modules_to_save"),
        (
            "sft",
            {"use_peft": True, "lora_target_modules": ["in_porj"]},
            "lora_target_modules",
            "did you mean 'in_proj'",
        ),
        ("sft", {"use_peft": True, "lora_target_modules": ["q_proj"]}, "lora_target_modules", "no such module"),
        ("sft", {"use_peft": True, "lora_target_modules": ["embeddings"]}, "lora_target_modules", "tied"),
        ("sft", {"dataset_mixer": {"a": {"split": "test_sft"}}}, "dataset_mixer", "only evaluated"),
        ("sft", {"warmup_ratio": 0.0}, "warmup_ratio", "no warmup"),
        ("sft", {"save_total_limit": 1}, "save_total_limit", "keep 2"),
        ("sft", {"save_only_model": True}, "save_only_model", "cannot resume"),
        ("reward", {"num_train_epochs": 3}, "num_train_epochs", "overfits its pairs"),
        ("reward", {"learning_rate": 1e-2}, "learning_rate", "1,000 times the usual 1e-05"),
        ("reward", {"center_rewards_coefficient": 10.0}, "center_rewards_coefficient", "usual is 0.01"),
        ("reward", {"model_name_or_path": "state-spaces/mamba-130m"}, "model_name_or_path", "base model"),
    ],
)
def test_a_known_mistake_is_seen(stage: str, keys: dict[str, Any], key: str, words: str) -> None:
    good = GOOD_DPO if stage in PAIR_STAGES else GOOD_SFT
    assert list(known_mistakes(Recipe(**good), stage)) == []
    findings = list(known_mistakes(Recipe(**(good | keys)), stage))
    assert any(f.key == key and words in f.message for f in findings), findings


# The recipes of the group that asked for this, in their own keys (their data and folders apart).
EARLIER_SFT = {
    "model_name_or_path": "state-spaces/mamba-2.8b-hf", "torch_dtype": "float32", "load_in_4bit": True,
    "use_peft": True, "lora_r": 16, "lora_alpha": 16, "lora_dropout": 0.05, "task_type": "CAUSAL_LM", "bias": "none",
    "lora_target_modules": ["x_proj", "embeddings", "in_proj", "out_proj"], "bf16": False, "max_seq_length": 2048,
    "learning_rate": "2.0e-03", "lr_scheduler_type": "cosine", "warmup_ratio": 0.1, "num_train_epochs": 1,
    "per_device_train_batch_size": 64, "gradient_accumulation_steps": 2, "optim": "adamw_torch", "adam_beta1": 0.9,
    "adam_beta2": 0.95, "weight_decay": 0.1, "max_grad_norm": 1, "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False}, "save_steps": 100, "save_total_limit": 1, "seed": 42,
    "evaluation_strategy": "no", "report_to": ["tensorboard"], "output_dir": "out", "dataset_mixer": {"sft": 1.0},
    "dataset_splits": ["train_sft", "test_sft"], "chat_template": "zephyr", "push_to_hub": True,
}  # fmt: skip
EARLIER_DPO = {key: value for key, value in EARLIER_SFT.items() if key not in ("max_seq_length", "chat_template")} | {
    "lora_r": 128, "lora_alpha": 128, "beta": 0.01, "optim": "paged_adamw_32bit", "per_device_train_batch_size": 32,
    "gradient_accumulation_steps": 4, "max_length": 1024, "max_prompt_length": 512, "dataset_mixer": {"dpo": 1.0},
    "dataset_splits": ["train_prefs", "test_prefs"],
}  # fmt: skip


def test_the_earlier_groups_recipes_load_and_their_mistakes_are_named() -> None:
    found = {}
    for stage, values in (("sft", EARLIER_SFT), ("dpo", EARLIER_DPO)):
        recipe = Recipe.from_dict(values, stage=stage)
        assert recipe.per_device_train_batch_size * recipe.accumulation_steps() == 128
        findings = list(known_mistakes(recipe, stage))
        assert not [f for f in findings if f.level == "error"], findings
        found[stage] = {f.key: f.message for f in findings}
    assert "10 times the usual 0.0002" in found["sft"]["learning_rate"]
    assert "400 times the usual 5e-06" in found["dpo"]["learning_rate"]
    assert "base model" in found["dpo"]["model_name_or_path"]
    for messages in found.values():
        assert "embeddings" in messages["lora_target_modules"] and "keep 2" in messages["save_total_limit"]


def test_a_run_folder_says_what_it_was_trained_for(tmp_path: Path) -> None:
    recipe = Recipe(**(GOOD_DPO | {"model_name_or_path": str(tmp_path)}))
    for stage, words in (("dpo", "already"), ("cpt", "base model")):
        (tmp_path / "run.json").write_text(json.dumps({"stage": stage}))
        assert [words in f.message for f in known_mistakes(recipe, "dpo")] == [True]
    (tmp_path / "run.json").write_text(json.dumps({"stage": "sft"}))
    assert list(known_mistakes(recipe, "dpo")) == []


# --- the whole check -------------------------------------------------------------------------------------------------


def test_the_tiny_sft_recipe_is_usable_and_its_numbers_add_up(tiny: Path) -> None:
    report = check(TINY_SFT)
    assert report.usable and report.stage == "sft" and report.findings == []
    train, batch = report.sections["train"], report.sections["batch"]
    assert train["rows"] == train["rows_looked_at"] == 200
    lengths = train["input_tokens"]
    assert lengths["count"] == 200 and lengths["p0"] <= lengths["p50"] <= lengths["p100"] <= 256
    assert lengths["mean"] == pytest.approx(train["tokens"] / 200, abs=0.1)
    assert 0 < train["trained_share"] < 1
    assert train["packing_fill"] == pytest.approx(train["tokens"] / (train["packed_rows"] * 256), abs=1e-3)
    assert batch["rows_per_step"] == 4 and batch["gradient_accumulation_steps"] == 2
    assert batch["steps_per_epoch"] == math.ceil(train["packed_rows"] / 4)
    assert batch["steps"] == 20 and batch["warmup_steps"] == 2
    from safetensors import safe_open

    with safe_open(tiny / "base" / "model.safetensors", "pt") as file:
        stored = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118 - not a dict
    assert report.sections["model"]["parameters"] == stored
    assert set(report.sections["backends"]) == set(OPS) - {"ssd"}
    json.dumps(report.to_dict())


def test_dpo_counts_pairs_and_sees_a_base_model(tiny: Path) -> None:
    report = check(TINY_DPO, ["--model_name_or_path", "data/tiny/base", "--chat_template", "zephyr"])
    assert report.usable
    assert found(report, "model_name_or_path", "no chat template")
    assert report.sections["batch"]["pairs_per_step"] == 8
    assert {"prompt_tokens", "chosen_tokens", "rejected_tokens", "chosen_longer_share"} <= set(report.sections["train"])
    assert report.sections["batch"]["steps_per_epoch"] == 25


def test_reward_models_are_counted_without_a_language_head_and_never_taken_for_one(tiny: Path, tmp_path: Path) -> None:
    untied = load_model(tiny / "base")
    untied.config.tie_word_embeddings = False
    untied.lm_head.weight = torch.nn.Parameter(untied.lm_head.weight + 1)
    save_model(untied, tmp_path / "lm", tokenizer=load_tokenizer(tiny / "base"))
    reward = with_reward_head(untied, seed=0)
    save_model(reward, tmp_path / "reward", tokenizer=load_tokenizer(tiny / "base"))
    for name, start in (("lm", "new, from the seed"), ("reward", "the trained one of")):
        words = ["--model_name_or_path", str(tmp_path / name), "--chat_template", "zephyr"]
        report = check(TINY_REWARD, words)
        assert report.usable and report.stage == "reward", report.findings
        assert report.sections["reward_head"]["start"].startswith(start)
        stored = sum(parameter.numel() for parameter in reward.backbone.parameters())
        assert report.sections["model"]["parameters"] == stored
        assert report.sections["batch"]["pairs_per_step"] == 8 and report.sections["memory_gb"]["head"] == 0
    refused = check(TINY_SFT, ["--model_name_or_path", str(tmp_path / "reward")])
    assert found(refused, "model_name_or_path", "is a reward model: it scores answers", "error")


def test_devices_change_the_accumulation_not_the_batch(tiny: Path) -> None:
    two = check(TINY_SFT, devices=2)
    assert two.sections["batch"]["gradient_accumulation_steps"] == 1 and two.sections["batch"]["rows_per_step"] == 4
    eight = check(TINY_SFT, devices=8)
    assert not eight.usable and found(eight, "global_batch_size", "not a multiple")


@pytest.mark.parametrize(
    ("words", "key", "message", "level"),
    [
        (["--max_length", "20"], "max_length", "below the train data's median", "warning"),
        (["--model_name_or_path", "./nowhere"], "model_name_or_path", "nowhere", "error"),
        (["--dataset_mixer", "{data/tiny/nowhere.jsonl: 1.0}"], "dataset_mixer", "nowhere.jsonl", "error"),
        (["--chat_template", "zephir"], "chat_template", "did you mean 'zephyr'", "error"),
        (["--chat_template", "{% for m in messages %}{{ m.content }}{% endfor %}"], "chat_template", "marks", "error"),
        (["--schema", "text"], "dataset_mixer", "columns", "error"),
        (["--backend", "cuda", "--use_cpu"], "backend", "on this machine selective_scan: backend 'cuda'", "error"),
        (["--dataset_splits", "train", "--eval_strategy", "epoch"], "eval_strategy", "no rows to evaluate on", "error"),
        (["--global_batch_size", "128"], "global_batch_size", "and an epoch has", "warning"),
        (["--output_dir", "data/tiny/sft/train.jsonl"], "output_dir", "is a file", "error"),
        (["--max_steps", "5", "--save_steps", "100"], "save_steps", "would start anew", "warning"),
        (["--output_dir", "x", "--tokenizer_name_or_path", "./nope"], "chat_template", "nope", "error"),
        (["--optim", "adamw"], "recipe", "adamw is not a valid", "error"),
        (["--lr_scheduler_type", "warmup_stable_decay"], "recipe", "num_decay_steps", "error"),
        (["--report_to", "comet"], "recipe", "comet is not supported", "error"),
        (["--load_best_model_at_end", "--eval_steps", "3"], "recipe", "multiple of the evaluation steps", "error"),
        (["--chat_template", "chatml", "--use_peft"], "chat_template", "rows nothing trains", "error"),
        (["--use_peft", "--lora_modules_to_save", "conv1"], "lora_modules_to_save", "did you mean 'conv1d'", "error"),
        (["--max_tokens_per_device", "20"], "max_tokens_per_device", "is too small for a train row", "error"),
        (["--max_train_samples", "1", "--dataloader_drop_last"], "dataloader_drop_last", "do not fill", "error"),
    ],
)
def test_what_is_wrong_with_files_and_data_is_found(
    tiny: Path, words: list[str], key: str, message: str, level: str
) -> None:
    report = check(TINY_SFT, words)
    assert found(report, key, message, level), report.findings
    assert report.usable == (level == "warning")


def test_modules_are_those_of_the_family(tiny: Path, tmp_path: Path) -> None:
    config = transformers.Mamba2Config(
        vocab_size=264, hidden_size=16, num_hidden_layers=1, state_size=4, num_heads=4, head_dim=8, n_groups=1
    )
    save_model(Mamba2ForCausalLM(config), tmp_path / "mamba2", tokenizer=load_tokenizer("data/tiny/base"))
    words = ["--model_name_or_path", str(tmp_path / "mamba2"), "--use_peft", "--lora_modules_to_save", "dt_bias,norm_f"]
    assert not found(check(TINY_SFT, words), "lora_modules_to_save", "", "error")
    words += ["--lora_target_modules", "x_proj,in_proj", "--lora_modules_to_save", "dt_proj.bias"]
    report = check(TINY_SFT, words)
    assert found(report, "lora_target_modules", "x_proj: a Mamba-2 has", "error")
    assert found(report, "lora_modules_to_save", "dt_proj.bias", "error")


def test_what_only_the_other_machine_has_is_no_mistake(tiny: Path) -> None:
    words = ["--use_cpu", "false", "--bf16", "--tf32", "true", "--ddp_backend", "nccl", "--global_batch_size", "32"]
    words += ["--gradient_accumulation_steps", "2"]
    assert check(TINY_SFT, words, devices=8).usable


def test_one_error_does_not_hide_the_next(tiny: Path) -> None:
    words = ["--model_name_or_path", "./nowhere", "--tokenizer_name_or_path", "data/tiny/base"]
    report = check(TINY_SFT, [*words, "--dataset_mixer", "{data/tiny/nowhere.jsonl: 1.0}", "--learning_rate", "1"])
    assert {f.key for f in report.findings} >= {"model_name_or_path", "dataset_mixer", "learning_rate"}


def test_data_are_looked_at_without_a_tokenizer_too(tiny: Path) -> None:
    report = check(TINY_SFT, ["--tokenizer_name_or_path", "./nope"])
    assert report.sections["train"]["rows"] == 200 and "messages" in report.sections["train"]["columns"]
    report = check(TINY_SFT, ["--tokenizer_name_or_path", "./nope", "--dataset_mixer", "{data/tiny/no.jsonl: 1.0}"])
    assert [f.key for f in report.errors] == ["chat_template", "dataset_mixer"], "data that is not there is said once"
    assert report.errors[1].message.startswith("'no.jsonl' does not exist")


def test_skipped_rows_are_named_with_reason_and_place(tiny: Path) -> None:
    bad = tiny / "some-bad.jsonl"
    good = '{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}\n'
    bad.write_text(good + '{"messages": []}\n' + good)
    report = check(TINY_SFT, ["--dataset_mixer", "{data/tiny/some-bad.jsonl: 1.0}"])
    assert found(report, "dataset_mixer", "first: data/tiny/some-bad.jsonl:train:1)", "warning")
    assert found(report, "dataset_mixer", "1 of 3 train rows would be skipped: 1 x empty_conversation (no messages")
    bad.write_text('{"messages": [{"role": "assistant", "content": "Hello"}]}\n' * 2)
    report = check(TINY_SFT, ["--dataset_mixer", "{data/tiny/some-bad.jsonl: 1.0}"])
    assert found(report, "dataset_mixer", "2 x starts_with_assistant", "error"), report.findings


def test_a_tokenizer_of_another_model_is_suspected(tiny: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("data/tiny/base")
    rows = check(TINY_SFT).sections["model"]["vocabulary_rows"]
    tokenizer.add_tokens([f"word{i}" for i in range(rows + 5 - len(tokenizer))])
    tokenizer.save_pretrained(tmp_path)
    report = check(TINY_SFT, ["--tokenizer_name_or_path", str(tmp_path)])
    assert found(report, "tokenizer_name_or_path", f"{rows + 5} tokens and the model {rows} rows")


def test_chat_tokens_beyond_the_embedding_are_announced(tiny: Path) -> None:
    section = check(TINY_SFT, ["--chat_template", "chatml"]).sections["tokenizer"]
    assert section["tokens_added"] == 2 and section["end_of_turn"] == "<|im_end|>"


def test_the_stage_comes_from_the_option_the_key_or_the_folder(tiny: Path) -> None:
    path = tiny / "mine.yaml"
    path.write_text("model_name_or_path: m\ndataset_mixer: {d: 1.0}\noutput_dir: o\n")
    assert found(check(path), "recipe", "does not say what it is for", "error")
    path.write_text(path.read_text() + "stage: dpo\n")
    assert check(path).stage == "dpo"
    assert found(check(path, stage="sft"), "recipe", "recipe for dpo", "error")


def test_a_checkpoint_there_means_resuming(tiny: Path) -> None:
    (tiny / "sft-full" / "checkpoint-9").mkdir(parents=True)
    (tiny / "sft-full" / "checkpoint-10").mkdir()
    assert check(TINY_SFT).sections["output"]["will_resume_from"] == "checkpoint-10"


def test_the_command_prints_tables_or_json_and_exits_with_0_or_2(tiny: Path) -> None:
    def run(*words: str) -> Any:
        return CliRunner().invoke(app, ["check", *words], env={"TERM": "dumb"})

    result = run(TINY_SFT)
    assert result.exit_code == 0 and "can be run (sft)" in result.stdout and "steps per epoch" in result.stdout
    result = run(TINY_SFT, "--json", "--learning_rate", "0.01")
    answer = json.loads(result.stdout)
    assert result.exit_code == 0 and answer["usable"] and answer["findings"][0]["key"] == "learning_rate"
    result = run(TINY_SFT, "--card", "h200", "--gpus", "2")
    assert result.exit_code == 0 and "proposal" in result.stdout and "2 x h200" in result.stdout
    result = run(TINY_SFT, "--dataset_mixer", "{nowhere.jsonl: 1.0}")
    assert result.exit_code == 2 and "not ok" in result.stdout


def test_a_card_is_planned_for_on_any_machine(tiny: Path) -> None:
    report = check(TINY_SFT, card="h200")
    planned, proposal, batch = (report.sections[name] for name in ("plan", "proposal", "batch"))
    assert report.usable and planned["fits"] and planned["card"] == "1 x h200, 141 GB"
    assert planned["hours"] == pytest.approx(batch["steps"] * planned["step_seconds"] / 3600, rel=0.02)
    assert report.sections["memory_gb"]["context"] > 0 and planned["device_gb"] >= planned["of_it_tensors_gb"]
    rows = proposal["per_device_train_batch_size"] * proposal["gradient_accumulation_steps"] * proposal["gpus"]
    assert rows == batch["rows_per_step"] and proposal["step_seconds"] <= planned["step_seconds"]
    assert check(TINY_SFT, proposal["add"].split(), card="h200").sections["plan"]["fits"]
    assert found(check(TINY_SFT, card="h20"), "card", "did you mean 'h200'", "error")
    small = check(TINY_SFT, card="0.5gb", gpus=2)
    assert not small.sections["plan"]["fits"] and "none" in small.sections["proposal"]
    assert found(small, "per_device_train_batch_size", "of the 0.5 GB", "warning")
    uneven = check(TINY_SFT, card="h200", gpus=7).sections["proposal"]["none"]
    assert "no multiple of 7 GPUs; set global_batch_size" in uneven
    dpo = check(TINY_DPO, ["--model_name_or_path", "data/tiny/base", "--chat_template", "zephyr"], card="h100")
    assert dpo.sections["plan"]["reference_hours"] > 0 and "h200" in dpo.sections["plan"]["give_or_take"]


def test_a_sample_stands_for_all_rows(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = check(TINY_SFT).sections
    monkeypatch.setattr("mambalign.check.run.SAMPLE", 100)
    sample = check(TINY_SFT).sections
    assert sample["train"]["rows"] == 200 and sample["train"]["rows_looked_at"] == 100
    assert sample["batch"]["steps_per_epoch"] == pytest.approx(everything["batch"]["steps_per_epoch"], abs=2)
    assert check(TINY_SFT, full=True).sections["train"] == everything["train"]


def test_plain_text_is_checked_for_continued_pre_training(tiny: Path) -> None:
    (tiny / "text.jsonl").write_text('{"text": "The first word is cat. The last word is dog."}\n' * 40)
    path = tiny / "cpt.yaml"
    path.write_text(
        "stage: cpt\nmodel_name_or_path: data/tiny/base\ndataset_mixer: {data/tiny/text.jsonl: 1.0}\n"
        "dataset_splits: [train]\noutput_dir: out\nmax_length: 64\nper_device_train_batch_size: 1\n"
    )
    report = check(path)
    assert report.usable and report.sections["train"]["trained_share"] > 0.9
    assert "test" not in report.sections
