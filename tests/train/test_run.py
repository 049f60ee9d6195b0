"""Whole runs of a tiny model: invariances of the step, resuming after kill -9, torn checkpoints, bad input."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from mambalign.recipe import Recipe, UserError
from mambalign.train import checkpoint
from mambalign.train.finite import NonFiniteLossError
from mambalign.train.run import run, training_arguments
from mambalign.train.trainer import PackedTrainer
from tests.train.conftest import history, killed_run, write_jsonl
from tests.waiting import PATIENCE

Make = Callable[..., Recipe]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_run(a: Path, b: Path) -> None:
    assert history(a) == history(b)
    assert all(torch.equal(x, weights(b)[name]) for name, x in weights(a).items())


@pytest.mark.parametrize("stage", ["cpt", "sft", "dpo"])
def test_a_run_learns_and_leaves_everything_behind(stage: str, recipe: Make, workbench: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = dict(
        num_train_epochs=6, eval_strategy="epoch", learning_rate=2e-2, report_to=["tensorboard"]
    )
    if stage == "cpt":
        text = [{"text": f"{w} {w} {w} {w}"} for w in ("red", "blue", "green", "dog", "cat") * 12]
        (tmp_path / "text").mkdir()
        write_jsonl(tmp_path / "text" / "train.jsonl", text)
        write_jsonl(tmp_path / "text" / "test.jsonl", text[:5])
        changes |= dict(dataset_mixer={str(tmp_path / "text"): 1.0}, max_length=64, num_train_epochs=10)
    result = run(stage, recipe(stage, **changes))
    folder = result.output_dir
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    evaluated = [line for line in lines if "eval_loss" in line]
    assert evaluated[-1]["eval_loss"] < evaluated[0]["eval_loss"]
    assert [line["step"] for line in evaluated] == sorted({line["step"] for line in evaluated})  # none twice
    assert all(line["tokens_per_second"] > 0 for line in lines if "learning_rate" in line)
    if stage == "dpo":
        assert result.metrics["rewards/accuracies"] > 0.7
        assert {"rewards/chosen", "rewards/margins", "logps/chosen", "eval_rewards/accuracies"} <= set(result.metrics)
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert type(plain) is transformers.MambaForCausalLM
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "why"}], add_generation_prompt=True, return_tensors="pt"
    )
    assert plain(**ids).logits.isfinite().all()
    for name in ("recipe.yaml", "environment.json", "data.json", "run.json", "README.md"):
        assert (folder / name).stat().st_size > 0, name
    assert json.loads((folder / "data.json").read_text())["train"]["fingerprint"] in (folder / "README.md").read_text()
    assert list(folder.glob("runs/**/events*")), "no TensorBoard events"
    assert not (folder / checkpoint.STAGING).exists()


@pytest.mark.parametrize("bf16", [False, True])
def test_step_zero_of_dpo_is_the_reference(bf16: bool, recipe: Make) -> None:
    result = run("dpo", recipe("dpo", max_steps=1, logging_steps=1, bf16=bf16))
    assert result.metrics["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert result.metrics["loss"] == pytest.approx(0.693147, abs=1e-5)


@pytest.mark.parametrize("stage", ["sft", "dpo", "reward"])
def test_how_a_step_is_cut_changes_nothing(stage: str, recipe: Make, tmp_path: Path) -> None:
    """8 x 1, 1 x 8, and one device batch under a token bound: the same losses, the same weights."""
    cuts = {
        "wide": dict(per_device_train_batch_size=8, gradient_accumulation_steps=1),
        "long": dict(per_device_train_batch_size=1, gradient_accumulation_steps=8),
        "bounded": dict(per_device_train_batch_size=8, gradient_accumulation_steps=1, max_tokens_per_device=140),
    }
    for name, cut in cuts.items():
        run(stage, recipe(stage, output_dir=str(tmp_path / name), logging_steps=1, packing=False, optim="sgd", **cut))
    for name in ("long", "bounded"):
        for a, b in zip(history(tmp_path / "wide"), history(tmp_path / name), strict=True):
            if "eval_loss" in a:
                assert a["eval_loss"] == pytest.approx(b["eval_loss"], rel=1e-5)
                continue
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
            assert a["num_tokens"] == b["num_tokens"] or stage != "sft"
        for key, expected in weights(tmp_path / "wide").items():
            assert (expected - weights(tmp_path / name)[key]).abs().max() < 1e-5, key


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_killed_at_any_step_and_resumed_is_unkilled(stage: str, recipe: Make, tmp_path: Path) -> None:
    """SIGKILL at random moments, several times; log lines and saves deliberately do not coincide."""
    calm = run(stage, recipe(stage, output_dir=str(tmp_path / "calm")))
    chaotic = recipe(stage, output_dir=str(tmp_path / "chaotic"))
    folder = tmp_path / "chaotic"
    dice = random.Random(4)
    for _ in range(6):
        latest = time.monotonic() + dice.uniform(0.05, 1.2)
        started = dice.choice([None, calm.global_step // 3, calm.global_step // 2])

        def reached(_: Path, started: int | None = started, latest: float = latest) -> bool:
            newest = max((int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*")), default=0)
            return (started is not None and newest >= started) or time.monotonic() > latest

        killed_run(stage, chaotic, reached)
    run(stage, chaotic)
    assert_same_run(tmp_path / "calm", folder)


def test_an_optimizer_finer_than_the_weights_resumes_exactly(recipe: Make, tmp_path: Path) -> None:
    def make(name: str) -> Recipe:
        changes = dict(dtype="bfloat16", optim="adafactor", save_steps=3, max_steps=6, save_total_limit=None)
        return recipe("sft", output_dir=str(tmp_path / name), **changes)

    run("sft", make("calm"))
    shutil.copytree(tmp_path / "calm", tmp_path / "killed")
    shutil.rmtree(tmp_path / "killed" / "checkpoint-6")
    (tmp_path / "killed" / "run.json").unlink()
    assert run("sft", make("killed")).global_step == 6
    assert_same_run(tmp_path / "calm", tmp_path / "killed")


@pytest.mark.parametrize("changes", [{}, {"eval_strategy": "epoch", "eval_on_start": True}])
def test_killed_between_the_last_checkpoint_and_the_end(
    changes: dict[str, Any], recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last evaluation is in the log already, nothing else says that the run is finished."""
    run("sft", recipe("sft", output_dir=str(tmp_path / "calm"), **changes))
    for moment in ("final_evaluation", "create_model_card"):
        real = getattr(PackedTrainer, moment)

        def killed(self: PackedTrainer, real: Any = real) -> None:
            real(self)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(PackedTrainer, moment, killed)
            run("sft", recipe("sft", output_dir=str(tmp_path / "killed"), **changes))
    run("sft", recipe("sft", output_dir=str(tmp_path / "killed"), **changes))
    assert_same_run(tmp_path / "calm", tmp_path / "killed")


def _held_while_saving() -> None:
    """What is staged is never published."""
    pytest.MonkeyPatch().setattr(checkpoint, "publish", lambda staged, final: time.sleep(PATIENCE))


def test_killed_while_saving(recipe: Make, tmp_path: Path) -> None:
    """When a staging folder has its model: nothing torn is ever taken for a checkpoint."""
    run("sft", recipe("sft", output_dir=str(tmp_path / "calm"), save_steps=2))
    victim = recipe("sft", output_dir=str(tmp_path / "victim"), save_steps=2)
    folder = tmp_path / "victim"
    staged = f"{checkpoint.STAGING}/checkpoint-*/model.safetensors"
    killed_run("sft", victim, lambda f: any(f.glob(staged)), _held_while_saving)
    assert any(folder.glob(staged)) and not checkpoint.checkpoints(folder)
    run("sft", victim)
    assert not (folder / checkpoint.STAGING).exists()
    assert_same_run(tmp_path / "calm", folder)


@pytest.mark.parametrize(
    "damage", ["truncated", "missing file", "flipped bit", "no manifest", "garbled manifest", "null manifest"]
)
def test_a_torn_checkpoint_is_skipped_aloud(
    damage: str, recipe: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("sft", recipe("sft", output_dir=str(tmp_path / "calm"), save_total_limit=None))
    torn = tmp_path / "torn"
    shutil.copytree(tmp_path / "calm", torn)
    state = json.loads((torn / "run.json").read_text())
    (torn / "run.json").write_text(json.dumps(state | {"status": "running"}))
    newest, before = checkpoint.checkpoints(torn)[:2]
    victim = newest / "optimizer.pt"
    if damage == "truncated":
        victim.write_bytes(victim.read_bytes()[:-100])
    elif damage == "missing file":
        victim.unlink()
    elif damage == "flipped bit":
        content = bytearray(victim.read_bytes())
        content[len(content) // 2] ^= 1
        victim.write_bytes(bytes(content))
    elif damage == "no manifest":
        (newest / checkpoint.MANIFEST).unlink()
    else:
        (newest / checkpoint.MANIFEST).write_text('{"files": ' if damage == "garbled manifest" else "null")
    with caplog.at_level(logging.INFO, logger="mambalign"):
        run("sft", recipe("sft", output_dir=str(torn), save_total_limit=None))
    assert f"skipping {newest}" in caplog.text
    assert f"resuming from {before}" in caplog.text
    assert_same_run(tmp_path / "calm", torn)


def test_a_finished_run_says_so(recipe: Make, caplog: pytest.LogCaptureFixture) -> None:
    first = run("sft", recipe("sft"))
    stamp = (first.output_dir / "model.safetensors").stat().st_mtime_ns
    with caplog.at_level(logging.INFO, logger="mambalign"):
        again = run("sft", recipe("sft"))
    assert again.already_finished and "nothing to do" in caplog.text
    assert again.metrics == first.metrics
    assert (first.output_dir / "model.safetensors").stat().st_mtime_ns == stamp


def test_another_recipe_is_refused_and_nothing_is_lost(recipe: Make, tmp_path: Path) -> None:
    run("sft", recipe("sft", max_steps=3))
    with pytest.raises(UserError, match=r"differs in learning_rate \(0.003, now 0.004\)"):
        run("sft", recipe("sft", max_steps=3, learning_rate=4e-3))
    run("sft", recipe("sft", max_steps=3, logging_steps=1))  # how often one logs changes nothing
    for number in (1, 2):
        run("sft", recipe("sft", max_steps=3, learning_rate=4e-3, resume="never"))
        assert (tmp_path / "sft" / f"previous-{number}" / "model.safetensors").is_file()
    shutil.rmtree(tmp_path / "sft" / "previous-1")
    run("sft", recipe("sft", max_steps=3, learning_rate=4e-3, resume="never"))
    assert (tmp_path / "sft" / "previous-1" / "model.safetensors").is_file()


def test_the_model_that_a_run_starts_from_is_never_overwritten(recipe: Make, workbench: Path) -> None:
    with pytest.raises(UserError, match=r"output_dir: .* is model_name_or_path too"):
        run("sft", recipe("sft", output_dir=f"{workbench}/sft/../model"))


def test_a_checkpoint_without_optimizer_is_not_resumed_from(recipe: Make, tmp_path: Path) -> None:
    only_model = recipe("sft", save_only_model=True)
    killed_run("sft", only_model, lambda f: (f / "checkpoint-3").is_dir())
    with pytest.raises(UserError, match=r"save_only_model: .*checkpoint-\d+ holds no optimizer state"):
        run("sft", only_model)


def test_resume_from_a_named_checkpoint(recipe: Make, tmp_path: Path) -> None:
    run("sft", recipe("sft", save_total_limit=None))
    folder = tmp_path / "sft"
    state = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(state | {"status": "running"}))
    before = history(folder)
    run("sft", recipe("sft", save_total_limit=None, resume=str(folder / "checkpoint-3")))
    assert history(folder) == before
    with pytest.raises(UserError, match="neither auto, never nor a checkpoint folder"):
        run("sft", recipe("sft", output_dir=str(tmp_path / "x"), resume=str(tmp_path / "nowhere")))


def _hold(lock: str, ready: Any, done: Any) -> None:
    with Path(lock).open("w") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        multiprocessing.get_context("fork").Process(target=time.sleep, args=(600,), daemon=True).start()
        ready.set()
        done.wait()
        os.kill(os.getpid(), signal.SIGKILL)


def test_two_processes_in_one_folder(recipe: Make, tmp_path: Path) -> None:
    """Refused while the other lives; free as soon as it is dead, although a data worker of it lives on."""
    (tmp_path / "sft").mkdir()
    context = multiprocessing.get_context("forkserver")
    ready, done = context.Event(), context.Event()
    other = context.Process(target=_hold, args=(str(tmp_path / "sft" / ".lock"), ready, done))
    other.start()
    assert ready.wait(PATIENCE)
    with pytest.raises(UserError, match="another process is training"):
        run("sft", recipe("sft"))
    done.set()
    other.join()
    run("sft", recipe("sft", max_steps=1))


def test_a_full_disk_fails_the_save_and_not_the_run(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run("sft", recipe("sft", output_dir=str(tmp_path / "calm")))
    real = PackedTrainer._save_accumulators

    def full_at_six(self: PackedTrainer, folder: Path) -> None:
        if self.state.global_step == 6:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, folder)

    monkeypatch.setattr(PackedTrainer, "_save_accumulators", full_at_six)
    with caplog.at_level(logging.ERROR, logger="mambalign"):
        run("sft", recipe("sft", output_dir=str(tmp_path / "full"), save_total_limit=None))
    assert "saving checkpoint-6 failed" in caplog.text and "newest complete checkpoint is checkpoint-3" in caplog.text
    assert not (tmp_path / "full" / "checkpoint-6").exists()
    assert (tmp_path / "full" / "checkpoint-9").exists()
    assert_same_run(tmp_path / "calm", tmp_path / "full")


def test_rotation_never_deletes_the_last_complete_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        staged = tmp_path / ".saving" / f"checkpoint-{step}"
        staged.mkdir(parents=True)
        (staged / "weights").write_text(str(step))
        checkpoint.publish(staged, tmp_path / staged.name)
    (tmp_path / "checkpoint-4").mkdir()  # torn: no manifest
    checkpoint.rotate(tmp_path, 1)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    assert checkpoint.newest_complete(tmp_path) == tmp_path / "checkpoint-3"


@pytest.mark.parametrize("again", [False, True], ids=["rotated out", "saved again"])
def test_a_kill_while_an_old_checkpoint_is_deleted_leaves_no_torn_one(
    again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def staged(step: int) -> Path:
        folder = tmp_path / checkpoint.STAGING / f"checkpoint-{step}"
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_text(str(step))
        return folder

    for step in (1, 2):
        checkpoint.publish(staged(step), tmp_path / f"checkpoint-{step}")

    def killed(folder: Path, **_: Any) -> None:
        if folder.is_dir():
            (folder / checkpoint.MANIFEST).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        if again:
            checkpoint.publish(staged(1), tmp_path / "checkpoint-1")
        else:
            checkpoint.rotate(tmp_path, 1)
    assert all(checkpoint.fault(path) is None for path in checkpoint.checkpoints(tmp_path))
    assert checkpoint.newest_complete(tmp_path) == tmp_path / "checkpoint-2"


def test_the_reference_cache_is_reused_and_verified(
    recipe: Make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def again(**changes: Any) -> str:
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="mambalign"):
            run("dpo", recipe("dpo", max_steps=2, **changes))
        state = json.loads((tmp_path / "dpo" / "run.json").read_text())
        (tmp_path / "dpo" / "run.json").write_text(json.dumps(state | {"status": "running"}))
        return caplog.text

    assert "reused" not in again()
    assert "40 of 40 pairs verified and reused" in again()
    part = next((tmp_path / "dpo" / "reference").glob("*/part-00000.safetensors"))
    content = bytearray(part.read_bytes())
    content[-1] ^= 1
    part.write_bytes(bytes(content))
    assert "does not match its own hash: computing it again" in again()
    part.write_bytes(b"torn")
    assert "cannot be read" in again()


def test_a_full_disk_in_the_reference_pass_is_one_sentence(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mambalign.train import reference

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(UserError, match=r"part-00000\.safetensors cannot be written"):
        patch.setattr(reference, "save", full)
        run("dpo", recipe("dpo", max_steps=1))
    run("dpo", recipe("dpo", max_steps=1))


def test_a_diverging_loss_stops_with_the_rows(recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from mambalign.train import trainer as module

    real, calls = module.target_logps, []

    def poisoned(*given: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        return real(*given, **options) * (float("nan") if len(calls) == 9 else 1.0)

    monkeypatch.setattr(module, "target_logps", poisoned)
    with pytest.raises(
        NonFiniteLossError, match=r"loss is nan at step 5; rows of the batch: .*train:\d+.*learning_rate"
    ):
        run("sft", recipe("sft"))
    assert checkpoint.newest_complete(tmp_path / "sft") == tmp_path / "sft" / "checkpoint-3"


def test_a_diverging_gradient_never_reaches_a_checkpoint(
    recipe: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The loss is finite; the rows named are those of the whole step."""
    from mambalign.train import trainer as module

    real, calls = module.target_logps, []

    def poisoned(*given: Any, **options: Any) -> torch.Tensor:
        calls.append(1)
        logps = real(*given, **options)
        if len(calls) == 5:
            logps.register_hook(lambda gradient: gradient * float("nan"))
        return logps

    monkeypatch.setattr(module, "target_logps", poisoned)
    with pytest.raises(NonFiniteLossError, match=r"gradient's norm is nan at step 3; rows .*(train:\d+.*){4}intact"):
        run("sft", recipe("sft", save_steps=1, packing=False))
    newest = checkpoint.newest_complete(tmp_path / "sft")
    assert newest == tmp_path / "sft" / "checkpoint-2"
    assert all(value.isfinite().all() for value in weights(newest).values())


@pytest.mark.parametrize("save_strategy", ["steps", "no"])
def test_an_optimizer_that_overflows_leaves_no_checkpoint(save_strategy: str, recipe: Make, tmp_path: Path) -> None:
    """Adam's epsilon is 0 in float16: a row without gradient becomes 0 / 0."""
    changes = dict(dtype="float16", save_steps=1, max_steps=1, save_strategy=save_strategy)
    with pytest.raises(NonFiniteLossError, match=r"embeddings.weight is not finite at step 1.*dtype: float32"):
        run("sft", recipe("sft", **changes))
    assert not checkpoint.checkpoints(tmp_path / "sft")
    assert not (tmp_path / "sft" / "model.safetensors").exists()


def test_what_is_read_by_a_team_is_readable(recipe: Make, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        run("dpo", recipe("dpo", max_steps=1))
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "dpo").rglob("*") if path.is_file()}
    assert set(modes.values()) == {0o644}, modes


def test_the_best_checkpoint_by_perplexity_is_the_lowest(recipe: Make, caplog: pytest.LogCaptureFixture) -> None:
    changes: dict[str, Any] = dict(eval_strategy="steps", eval_steps=3, load_best_model_at_end=True, max_steps=6)
    with caplog.at_level(logging.WARNING):
        result = run("sft", recipe("sft", metric_for_best_model="perplexity", **changes))
    evaluated = [line["eval_perplexity"] for line in history(result.output_dir) if "eval_perplexity" in line]
    assert result.metrics["eval_perplexity"] == pytest.approx(min(evaluated[:2])) and evaluated[1] < evaluated[0]
    assert "missing keys" not in caplog.text  # the tied head


def test_dataloader_drop_last_drops_no_held_out_row(recipe: Make, tmp_path: Path) -> None:
    metrics = [
        run("sft", recipe("sft", output_dir=str(tmp_path / str(drop)), max_steps=1, packing=False,
                          per_device_eval_batch_size=5, dataloader_drop_last=drop)).metrics["eval_loss"]
        for drop in (True, False)
    ]  # fmt: skip
    assert metrics[0] == metrics[1]


def test_norms_biases_and_state_parameters_never_decay(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, float] = {}
    real = PackedTrainer.create_optimizer

    def spy(self: PackedTrainer, *args: Any) -> Any:
        optimizer = real(self, *args)
        names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        held.update({names[id(p)]: g["weight_decay"] for g in optimizer.param_groups for p in g["params"]})
        return optimizer

    monkeypatch.setattr(PackedTrainer, "create_optimizer", spy)
    run("sft", recipe("sft", max_steps=1, weight_decay=0.1))
    free = {name for name in held if re.search(r"norm|bias$|\.A_log$|\.D$", name)}
    assert "backbone.norm_f.weight" in free and len(free) < len(held)
    assert all(decay == (0 if name in free else 0.1) for name, decay in held.items()), held


def test_a_logger_is_attached_once(recipe: Make, tmp_path: Path) -> None:
    for given, attached in ((["tensorboard"], ["tensorboard"]), ([], [])):
        assert training_arguments(recipe("sft", report_to=given), tmp_path).report_to == attached


def test_bad_input_is_one_sentence(recipe: Make, tmp_path: Path, workbench: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(model_name_or_path=str(tmp_path / "no-model")), "no-model"),
        (dict(dataset_mixer={str(tmp_path / "no-data.jsonl"): 1.0}), "no-data.jsonl"),
        (dict(eval_strategy="steps", dataset_splits=["train"]), "eval_strategy"),
        (dict(lr_scheduler_type="cosine", optim="adamw_nonsense"), "adamw_nonsense"),
        (dict(backend="cuda-magic"), "cuda-magic"),
        (dict(optim="adamw_8bit"), "optim: .*bitsandbytes"),
        (dict(optim_args="fast"), "optim: "),
        (dict(adam_beta1=1.5), "optim: Invalid beta"),
        (dict(lr_scheduler_kwargs={"speed": 1}), "lr_scheduler_kwargs: .*'speed'"),
        (dict(metric_for_best_model="eval_los", eval_strategy="epoch"), "metric_for_best_model: los .*'loss'"),
        (dict(dataloader_drop_last=True, per_device_train_batch_size=64), "dataloader_drop_last: 18 training rows"),
        (dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrent": 1}), "'use_reentrant'"),
        (dict(gradient_checkpointing="selectiv"), "true or false, or one of selective.*did you mean 'selective'"),
        (dict(report_to=["wandb"]), "report_to: .*pip install wandb"),
        (dict(report_to=["paper"]), "report_to: paper is not supported"),
    ]
    for changes, named in cases:
        with pytest.raises(ValueError, match=named):
            run("sft", recipe("sft", **changes, output_dir=str(tmp_path / f"out-{named[:5]}")))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"output_dir: .* cannot be made a folder"):
        run("sft", recipe("sft", output_dir=str(tmp_path / "file")))


def test_chat_tokens_fit_into_the_padding_rows(recipe: Make, tmp_path: Path) -> None:
    result = run("sft", recipe("sft", chat_template="chatml", max_steps=2))
    config = json.loads((result.output_dir / "config.json").read_text())
    tokenizer = transformers.AutoTokenizer.from_pretrained(result.output_dir)
    assert config["vocab_size"] == 264 and len(tokenizer) == 259  # 257 bytes + 2 in the 264 rows it had
    assert config["eos_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert "lm_head.weight" not in weights(result.output_dir)  # still tied


def test_selective_recomputation_trains_the_same_weights(recipe: Make, tmp_path: Path) -> None:
    for name, policy in (("kept", False), ("selective", "selective")):
        run("sft", recipe("sft", output_dir=str(tmp_path / name), max_steps=2, gradient_checkpointing=policy))
    assert_same_run(tmp_path / "kept", tmp_path / "selective")
