"""A Mamba-2 from an original checkpoint through `check`, SFT, DPO and `convert`, as the command line does it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from typer.testing import CliRunner

from mambalign.cli import app
from mambalign.models.checkpoint import load_model, save_model
from mambalign.models.mamba2 import Mamba2ForCausalLM
from mambalign.recipe import Recipe
from mambalign.train.trainer import PackedTrainer
from tests.train.conftest import byte_tokenizer


def call(*words: Any) -> None:
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200", "TERM": "dumb"})
    assert result.exit_code == 0, result.output


def test_original_checkpoint_to_sft_to_dpo_and_back(workbench: Path, recipe: Any, tmp_path: Path) -> None:
    config = transformers.Mamba2Config(
        vocab_size=264, hidden_size=16, num_hidden_layers=2, state_size=4, num_heads=4, head_dim=8, n_groups=2,
        tie_word_embeddings=True,
    )  # fmt: skip
    base = save_model(Mamba2ForCausalLM(config), tmp_path / "base", layout="mamba-ssm", tokenizer=byte_tokenizer())
    folders = {"sft": tmp_path / "sft", "dpo": tmp_path / "dpo"}
    for stage, start in (("sft", base), ("dpo", folders["sft"])):
        keys = dict(learning_rate=2e-2, num_train_epochs=3, eval_strategy="epoch", eval_on_start=True, logging_steps=1)
        keys |= dict(save_strategy="no")
        made: Recipe = recipe(stage, model_name_or_path=str(start), **keys)
        path = tmp_path / f"{stage}.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in made.to_dict().items() if v is not None}))
        call("check", path, "--stage", stage)
        call(stage, path)
        lines = [json.loads(line) for line in (folders[stage] / "metrics.jsonl").read_text().splitlines()]
        evaluated = [line["eval_loss"] for line in lines if "eval_loss" in line]
        assert evaluated[-1] < 0.9 * evaluated[0], stage
        if stage == "dpo":
            first = next(line for line in lines if "rewards/margins" in line)
            assert abs(first["rewards/margins"]) < 1e-5  # of the untouched SFT model, which is the reference
    call("convert", folders["dpo"], tmp_path / "original", "--to", "mamba-ssm")
    ids = torch.randint(264, (1, 100))
    ours = load_model(tmp_path / "original")
    plain = transformers.AutoModelForCausalLM.from_pretrained(folders["dpo"])
    assert type(plain) is transformers.Mamba2ForCausalLM and type(ours) is Mamba2ForCausalLM
    torch.testing.assert_close(ours(ids).logits, plain(ids).logits, rtol=1e-5, atol=1e-5)


def test_step_sizes_bias_and_norms_never_decay() -> None:
    sizes = dict(vocab_size=264, hidden_size=16, num_hidden_layers=1, num_heads=4, head_dim=8, n_groups=1)
    model = Mamba2ForCausalLM(transformers.Mamba2Config(**sizes))
    decaying = PackedTrainer.get_decay_parameter_names(object.__new__(PackedTrainer), model)
    assert {name.split("mixer.")[-1] for name in decaying} == {
        "backbone.embeddings.weight", "lm_head.weight", "in_proj.weight", "conv1d.weight", "out_proj.weight",
    }  # fmt: skip
