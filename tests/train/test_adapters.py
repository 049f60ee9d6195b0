"""Runs that train adapters: they learn and resume, and every model knows what it was made from."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from mambalign.cli import app
from mambalign.models import lineage
from mambalign.models.checkpoint import load_model
from mambalign.models.lineage import load_adapter
from mambalign.recipe import Recipe, UserError
from mambalign.train import checkpoint
from mambalign.train.run import load_start, run
from tests.test_check import EARLIER_DPO, EARLIER_SFT
from tests.train.conftest import history, killed_run

Make = Callable[..., Recipe]
ALL = ["in_proj", "x_proj", "dt_proj", "out_proj", "embeddings", "lm_head"]
EARLIER = ["x_proj", "embeddings", "in_proj", "out_proj"]
PEFT: dict[str, Any] = dict(use_peft=True, lora_r=4, lora_alpha=8, lora_dropout=0.1)
IDS = torch.randint(264, (2, 21), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).abs().max() < 1e-5 * max(1.0, float(a.abs().max())))


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in history(folder) if "learning_rate" in line]


def test_a_run_learns_and_its_folder_is_the_model(recipe: Make, workbench: Path, tmp_path: Path) -> None:
    result = run("sft", recipe("sft", **PEFT, lora_target_modules=EARLIER, learning_rate=0.05))
    folder = result.output_dir
    assert losses(folder)[-1] < losses(folder)[0] - 0.2
    assert not {"model.safetensors", "config.json", "trained.safetensors"} & {path.name for path in folder.iterdir()}
    made = logits(load_model(folder))
    assert not same(made, logits(load_model(workbench / "model")))
    plain = AutoModelForCausalLM.from_pretrained(workbench / "model")
    assert same(made, logits(PeftModel.from_pretrained(plain, folder)))
    assert same(made, logits(AutoModelForCausalLM.from_pretrained(folder)))  # transformers finds base and adapter
    out = CliRunner().invoke(app, ["merge", str(folder), str(tmp_path / "merged")])
    assert out.exit_code == 0 and "logits differ by at most" in out.output and "two matrices" in out.output, out.output
    assert same(made, logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")))
    assert len(AutoTokenizer.from_pretrained(tmp_path / "merged")) == 257
    assert [line["stage"] for line in lineage.steps(lineage.read(tmp_path / "merged"))] == ["merge", "sft"]
    assert CliRunner().invoke(app, ["merge", str(folder), str(tmp_path / "merged")]).exit_code == 2


def test_the_earlier_groups_recipes_run(workbench: Path, tmp_path: Path) -> None:
    """As they wrote them, but for size and folders; in 4 bits and with its optimizer where bitsandbytes is."""
    present = importlib.util.find_spec("bitsandbytes") is not None
    for stage, values in (("sft", EARLIER_SFT), ("dpo", EARLIER_DPO)):
        ours = dict(
            model_name_or_path=str(workbench / "model"), dataset_mixer={str(workbench / stage): 1.0},
            dataset_splits=["train", "test"], output_dir=str(tmp_path / stage), per_device_train_batch_size=4,
            max_steps=3, lora_r=4, push_to_hub=False, use_cpu=True, report_to=[], load_in_4bit=present,
        )  # fmt: skip
        ours |= {} if present else {"optim": "adamw_torch"}
        length = {"max_seq_length": 128} if stage == "sft" else {"max_length": 128, "max_prompt_length": 64}
        result = run(stage, Recipe.from_dict(values | ours | length, stage=stage))
        assert result.global_step == 3 and (result.output_dir / "adapter_model.safetensors").is_file()
        merged = logits(load_model(result.output_dir))
        assert merged.isfinite().all() and not same(merged, logits(load_model(workbench / "model")))


def test_state_parameters_train_beside_the_adapters(recipe: Make, workbench: Path) -> None:
    named = ["A_log", "D", "dt_proj.bias", "conv1d"]
    result = run("sft", recipe("sft", **PEFT, lora_modules_to_save=named, lora_target_modules=["in_proj"], max_steps=3))
    before, after = (dict(load_model(path).named_parameters()) for path in (workbench / "model", result.output_dir))
    moved = {name.split("layers.0.mixer.")[-1] for name in before if not torch.equal(before[name], after[name])}
    moved = {name for name in moved if "layers" not in name}
    assert moved == {"A_log", "D", "dt_proj.bias", "conv1d.weight", "conv1d.bias", "in_proj.weight"}


def test_killed_and_resumed_is_unkilled(recipe: Make, tmp_path: Path) -> None:
    """With dropout, and with the adapters' tensors alone in the checkpoints."""
    stage = "dpo"
    changes = dict(**PEFT, lora_target_modules=["all-linear"], lora_modules_to_save=["A_log"], max_steps=5)
    whole = recipe(stage, output_dir=str(tmp_path / "whole"), **changes)
    run(stage, whole)
    cut = recipe(stage, output_dir=str(tmp_path / "cut"), **changes)
    killed_run(stage, cut, lambda folder: checkpoint.newest_complete(folder) is not None)
    newest = checkpoint.newest_complete(tmp_path / "cut")
    assert newest is not None and not (newest / "model.safetensors").exists()
    held = load_file(newest / "trained.safetensors")
    assert {name.split(".lora_")[0].rsplit(".", 1)[-1] for name in held} == {
        "in_proj", "x_proj", "dt_proj", "out_proj", "A_log"
    }  # fmt: skip
    run(stage, cut)
    assert history(tmp_path / "whole") == history(tmp_path / "cut")
    ours, theirs = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_best_checkpoint_is_the_one_that_is_exported(recipe: Make) -> None:
    changes: dict[str, Any] = dict(eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, max_steps=6)
    result = run("sft", recipe("sft", **PEFT, **changes, learning_rate=0.3))
    evaluated = {line["step"]: line["eval_loss"] for line in history(result.output_dir) if "eval_loss" in line}
    best = min((3, 6), key=evaluated.__getitem__)
    assert same(logits(load_model(result.output_dir)), logits(load_model(result.output_dir / f"checkpoint-{best}")))
    assert result.metrics["eval_loss"] == pytest.approx(evaluated[best], abs=1e-6)


# ------------------------------------------------------------------------------------------------------- the audit


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (dict(lora_target_modules=["in_proj", "x_porj"]), r"'x_porj' matches no module .*'x_proj'.*dt_proj"),
        (dict(lora_target_modules=["q_proj", "v_proj"]), r"'q_proj' matches no module"),
        (dict(lora_target_modules=[]), r"empty.*in_proj"),
        (dict(lora_target_modules=["conv1d"]), r"lora_modules_to_save: \[conv1d\]"),
        (dict(lora_modules_to_save=["A_logs"]), r"lora_modules_to_save: 'A_logs' matches no .*'A_log'"),
        (dict(lora_modules_to_save=["in_proj"]), r"in_proj has an adapter .*keep one"),
        (dict(chat_template="chatml"), r"chatml adds tokens.*embeddings and lm_head.*\[embeddings\]"),
        (dict(load_in_4bit=True, use_peft=False), r"set use_peft: true"),
    ],
)
def test_what_cannot_train_is_refused_by_name(keys: dict[str, Any], says: str, recipe: Make) -> None:
    with pytest.raises(UserError, match=says):
        run("sft", recipe("sft", **(PEFT | keys)))


def test_new_tokens_train_with_the_embedding(recipe: Make, workbench: Path) -> None:
    """ChatML's two tokens fall into padding rows; what they became is in the adapter."""
    result = run("sft", recipe("sft", **PEFT, chat_template="chatml", lora_modules_to_save=["embeddings"], max_steps=3))
    merged = load_model(result.output_dir)
    rows = merged.get_input_embeddings().weight[257:259]
    assert not torch.equal(rows[0], rows[1])
    plain = AutoModelForCausalLM.from_pretrained(workbench / "model")
    assert same(logits(PeftModel.from_pretrained(plain, result.output_dir)), logits(merged))


def test_a_dead_adapter_stops_the_run_at_its_first_step(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """x_proj is called and its adapter is not: what fused kernels do to it elsewhere."""
    from peft.tuners.lora.layer import Linear

    real = Linear.forward

    def forward(self: Linear, x: torch.Tensor) -> torch.Tensor:
        dead = self.get_base_layer().out_features == 9  # rank 1 + 2 x 4 states
        return self.base_layer(x) if dead else real(self, x)

    monkeypatch.setattr(Linear, "forward", forward)
    with pytest.raises(UserError, match=r"of 16 trained tensors got no gradient \(. of x_proj\): .*\.0\.mixer\.x_proj"):
        run("sft", recipe("sft", **PEFT, lora_target_modules=["all-linear"]))


def test_an_adapter_that_dies_after_a_step_is_found_too(recipe: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first half of a LoRA gets its first gradient when the other has moved; with warmup that is the third step."""
    from mambalign.train.callbacks import AdapterAudit

    real, seen = AdapterAudit.on_pre_optimizer_step, []

    def cut(self: AdapterAudit, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        for name, parameter in model.named_parameters():
            if "layers.1.mixer.in_proj.lora_A" in name:
                parameter.grad = None
        seen.append(state.global_step)
        real(self, args, state, control, **kwargs)

    monkeypatch.setattr(AdapterAudit, "on_pre_optimizer_step", cut)
    with pytest.raises(UserError, match=r"1 of 8 trained .*\(1 of in_proj\): .*layers\.1\.mixer\.in_proj\.lora_A"):
        run("sft", recipe("sft", **PEFT, warmup_steps=2))
    assert seen == [0, 1, 2]


def test_the_audit_table_counts(recipe: Make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mambalign"):
        changes = dict(lora_target_modules=["layers.1.mixer.in_proj", "x_proj"], lora_modules_to_save=["A_log", "D"])
        run("sft", recipe("sft", **PEFT, **changes, max_steps=1))
    table = next(r.getMessage() for r in caplog.records if r.getMessage().startswith("adapters:"))
    rows = {line.split()[0]: line.split()[1:] for line in table.splitlines()[2:]}
    # 16 inputs, 2 x 32 outputs, rank 4; 32 channels of 4 states; 2 layers
    assert rows["in_proj"][:4] == ["1", "of", "2", f"{4 * (16 + 64)}"]
    assert rows["x_proj"][:4] == ["2", "of", "2", f"{2 * 4 * (32 + 9)}"]
    assert rows["A_log"][:4] == ["2", "of", "2", f"{2 * 32 * 4}"] and rows["D"][3] == f"{2 * 32}"
    assert int(rows["all"][0].replace(",", "")) == 320 + 328 + 256 + 64


# ---------------------------------------------------------------------------------------------------------- lineage


def sft_then(recipe: Make, tmp_path: Path, **changes: Any) -> tuple[Path, Recipe]:
    """A finished SFT run of adapters, and the recipe of a DPO run on its folder."""
    sft = run("sft", recipe("sft", **PEFT, max_steps=4, learning_rate=0.05, **changes)).output_dir
    values = dict(model_name_or_path=str(sft), max_steps=4, logging_steps=1, lora_r=3, lora_dropout=0.2)
    return sft, recipe("dpo", **(PEFT | values | changes))


@pytest.mark.parametrize("full", [False, True])
def test_dpo_starts_from_the_sft_adapter(full: bool, recipe: Make, tmp_path: Path, workbench: Path) -> None:
    sft, dpo = sft_then(recipe, tmp_path, lora_target_modules=ALL, lora_modules_to_save=["D"])
    if full:
        dpo.use_peft = False
    start, *_ = load_start(dpo, "dpo")
    assert same(logits(start), logits(load_model(sft)))
    assert not same(logits(start), logits(load_model(workbench / "model")))
    # All pairs in one pass, as the reference's: what is equal is exactly equal.
    dpo.per_device_train_batch_size, dpo.gradient_accumulation_steps = 40, 1
    result = run("dpo", dpo)
    first = history(result.output_dir)[0]
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert abs(first["rewards/chosen"]) < 2e-6 and abs(first["rewards/rejected"]) < 2e-6
    made = logits(load_model(result.output_dir))
    assert not same(made, logits(start))
    line = lineage.read(result.output_dir)
    assert [line["stage"], line["from"]["stage"], line["from"]["from"]] == ["dpo", "sft", None]
    assert line["base"]["path"] == str(workbench / "model") and line["adapter"]
    if not full:  # relative to the raw base, and no less for that
        plain = AutoModelForCausalLM.from_pretrained(workbench / "model")
        assert same(made, logits(PeftModel.from_pretrained(plain, result.output_dir)))
    assert "supervised fine-tuning" in (result.output_dir / "README.md").read_text()


def test_an_adapter_on_other_weights_is_refused(recipe: Make, tmp_path: Path, workbench: Path) -> None:
    sft, dpo = sft_then(recipe, tmp_path)
    moved = tmp_path / "moved"
    shutil.copytree(workbench / "model", moved)
    tensors = load_file(moved / "model.safetensors")
    assert same(logits(load_adapter(sft, base=moved)[0]), logits(load_model(sft)))  # the same weights elsewhere
    tensors["backbone.layers.1.mixer.D"][3] += 1e-3
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"was trained on .*/model \(weights \w+\), and .*/moved holds other"):
        load_adapter(sft, base=moved)
    config = json.loads((sft / "adapter_config.json").read_text())
    (sft / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(moved)}))
    with pytest.raises(UserError, match=r"other weights"):
        run("dpo", dpo)
    (sft / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with pytest.raises(UserError, match=r"the base model of the adapter .*/sft: there is no model folder .*gone"):
        load_model(sft)


def test_a_run_is_not_resumed_on_other_weights(recipe: Make, tmp_path: Path, workbench: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(workbench / "model", moved)
    made = recipe("sft", **PEFT, model_name_or_path=str(moved), max_steps=3)
    state = run("sft", made).output_dir / "run.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"status": "running"}))
    tensors = load_file(moved / "model.safetensors")
    tensors["backbone.layers.0.mixer.A_log"] *= 1.01
    save_file(tensors, moved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"resume: .*checkpoint-\d+ was made from .*moved .*holds other weights now"):
        run("sft", made)


def test_dora_is_merged_before_another_stage(recipe: Make, tmp_path: Path) -> None:
    _, dpo = sft_then(recipe, tmp_path, use_dora=True)
    with pytest.raises(UserError, match=r"use_dora: .*mambalign merge"):
        run("dpo", dpo)
    dpo.use_dora = False
    with pytest.raises(UserError, match=r"model_name_or_path: .*mambalign merge"):
        run("dpo", dpo)
