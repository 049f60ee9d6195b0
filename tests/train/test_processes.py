"""Two processes on the CPU beside one: the same steps, losses, evaluations and weights, and runs that resume."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

from mambalign.models import MambaForCausalLM
from mambalign.recipe import Recipe, UserError
from mambalign.train import replicas, sharding
from mambalign.train import run as module
from mambalign.train.preemption import EXIT_CODE, Preempted
from mambalign.train.processes import FilledRows, FilledSampler, add_up, first_decides, leave, leaving
from mambalign.train.run import run, training_arguments
from mambalign.train.trainer import PackedTrainer
from tests.train.conftest import history
from tests.waiting import PATIENCE

Make = Callable[..., Recipe]
MISTAKE = 2  # the exit code of a UserError


def _rank(
    rank: int,
    port: int,
    processes: int,
    stage: str,
    values: dict[str, Any],
    stop_at: int | None,
    sabotage: Callable[[int], None] | None,
) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), LOCAL_WORLD_SIZE=str(processes))
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    torch.set_num_threads(1)
    if rank == 1:  # one that is asked to stop is enough
        _stop_at(stop_at)
    if sabotage is not None:
        sabotage(rank)
    try:
        run(stage, Recipe.from_dict(values))
    except UserError:
        sys.exit(MISTAKE)


def _stop_at(step: int | None) -> Any:
    """From here on, a SIGTERM in the middle of the step after `step`; returns what undoes it."""
    real = PackedTrainer.training_step

    def signalled(self: PackedTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, *args, **kwargs)

    patch = pytest.MonkeyPatch()
    patch.setattr(PackedTrainer, "training_step", signalled)
    return patch.undo


def _full_disk(rank: int) -> None:
    """The first process cannot write the model of checkpoint-3."""
    real = PreTrainedModel.save_pretrained

    def save_pretrained(self: Any, folder: Any, *args: Any, **kwargs: Any) -> None:
        if Path(folder).name == "checkpoint-3":
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, folder, *args, **kwargs)

    if rank == 0:
        pytest.MonkeyPatch().setattr(PreTrainedModel, "save_pretrained", save_pretrained)


def _first_saves_alone(_: int) -> None:
    """As in transformers 5.17, which asks nobody else to `_save`."""

    def save_model(self: Any, output_dir: str, _internal_call: bool) -> None:
        if self.args.should_save:
            self._save(output_dir)

    pytest.MonkeyPatch().setattr(transformers.Trainer, "save_model", save_model)


def _first_loses_its_helpers(rank: int) -> None:
    """The signal comes while the first process tokenises, and ends those that help it."""

    def killed(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("one of the subprocesses has abruptly died")

    if rank == 0:
        pytest.MonkeyPatch().setattr(module, "load_data", killed)


def _averaged_here(rank: int) -> None:
    """As on GPUs whose layers run as CUDA graphs: without DDP."""
    pytest.MonkeyPatch().setattr(replicas, "_wanted", lambda model, accelerator: True)
    pytest.MonkeyPatch().setattr(replicas, "TOGETHER", 4096)  # several exchanges


def on_processes(
    stage: str,
    recipe: Recipe,
    stop_at: int | None = None,
    sabotage: Callable[[int], None] | None = None,
    code: int | None = None,
    processes: int = 2,
) -> None:
    """As torchrun starts them, without its imports: they meet at a store of ours, whose port nobody can take before."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mambalign.train.run"])
    facts = store.port, processes, stage, recipe.to_dict(), stop_at, sabotage
    ranks = [context.Process(target=_rank, args=(rank, *facts)) for rank in range(processes)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(PATIENCE)
        process.kill()
    expected = code if code is not None else 0 if stop_at is None else EXIT_CODE
    assert [process.exitcode for process in ranks] == [expected] * processes


def assert_same_losses(one: Path, two: Path) -> None:
    """Losses within 1e-5, and the norms and rates beside them nearly so."""
    for a, b in zip(history(one), history(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
        for name in a.keys() & {"loss", "eval_loss"}:
            assert a[name] == pytest.approx(b[name], rel=0, abs=1e-5), name


@pytest.mark.parametrize(
    ("stage", "bound", "way"),
    [("sft", None, None), ("dpo", 140, None), ("reward", 140, None), ("sft", 140, _averaged_here)],
    ids=["sft", "dpo", "reward", "sft without DDP"],
)
def test_two_processes_are_one(
    stage: str, bound: int | None, way: Callable[[int], None] | None, recipe: Make, tmp_path: Path
) -> None:
    """Neither training nor evaluation rows divide by the batch; of the last round one process gets no row at all.

    Under a token bound, processes have unequal numbers of micro-batches.
    """
    changes: dict[str, Any] = dict(
        global_batch_size=12, gradient_accumulation_steps=None, per_device_train_batch_size=3, optim="sgd",
        per_device_eval_batch_size=3, logging_steps=1, eval_strategy="steps", eval_steps=3, save_steps=3, packing=False,
        max_tokens_per_device=bound, load_best_model_at_end=True,
    )  # fmt: skip
    one, two = tmp_path / "one", tmp_path / "two"
    run(stage, recipe(stage, output_dir=str(one), **changes))
    shared = recipe(stage, output_dir=str(two), **changes)
    on_processes(stage, shared, sabotage=way)
    assert_same_losses(one, two)
    for name, expected in load_file(one / "model.safetensors").items():
        assert (expected - load_file(two / "model.safetensors")[name]).abs().max() < 1e-5, name

    before = history(two)  # of a run that was killed after its second checkpoint
    state = json.loads((two / "run.json").read_text())
    (two / "run.json").write_text(json.dumps(state | {"status": "running"}))
    (two / "checkpoint-8" / "manifest.json").unlink()
    on_processes(stage, shared, sabotage=way)
    assert history(two) == before


def _note_train_loss(rank: int) -> Any:
    """transformers' summary, which is for the loggers alone, goes into the run folder too; returns what undoes it."""
    real = PackedTrainer.log

    def log(self: PackedTrainer, logs: dict[str, float], *args: Any) -> None:
        if "train_loss" in logs and rank == 0:
            (Path(str(self.args.output_dir)) / "train_loss").write_text(str(logs["train_loss"]))
        real(self, logs, *args)

    patch = pytest.MonkeyPatch()
    patch.setattr(PackedTrainer, "log", log)
    return patch.undo


def test_the_mean_loss_of_a_run_is_that_of_all_processes(recipe: Make, tmp_path: Path) -> None:
    changes: dict[str, Any] = dict(
        global_batch_size=2, gradient_accumulation_steps=None, per_device_train_batch_size=1, optim="sgd", max_steps=3,
        logging_steps=100, packing=False, save_strategy="no",
    )  # fmt: skip
    undo = _note_train_loss(rank=0)
    run("sft", recipe("sft", output_dir=str(tmp_path / "one"), **changes))
    undo()
    on_processes("sft", recipe("sft", output_dir=str(tmp_path / "two"), **changes), sabotage=_note_train_loss)
    one, two = (float((tmp_path / name / "train_loss").read_text()) for name in ("one", "two"))
    assert one == pytest.approx(two, abs=1e-5)


@pytest.mark.parametrize(
    ("end", "left"), [(None, True), (Preempted("SIGTERM"), True), (RuntimeError("a bug"), False)], ids=repr
)
def test_a_process_leaves_its_group(end: BaseException | None, left: bool, tmp_path: Path) -> None:
    """In good order only: where it has failed, the others wait for something else."""
    leave()  # where there is none
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    with suppress(Preempted, RuntimeError), leaving():
        if end is not None:
            raise end
    assert torch.distributed.is_initialized() != left
    leave()
    assert not torch.distributed.is_initialized()


def test_what_the_first_process_refuses_is_refused_by_all(recipe: Make, tmp_path: Path) -> None:
    """Under NCCL nobody would know that it has gone, and wait half an hour for what it had to say."""
    (tmp_path / "recipe.yaml").write_text(recipe("sft", output_dir=str(tmp_path), learning_rate=1).to_yaml())
    (tmp_path / "run.json").write_text('{"status": "finished"}')
    on_processes("sft", recipe("sft", output_dir=str(tmp_path)), code=MISTAKE)
    assert first_decides(lambda: 7) == 7


def test_all_stop_where_the_first_process_fails_of_a_signal(recipe: Make) -> None:
    on_processes("sft", recipe("sft"), sabotage=_first_loses_its_helpers, code=EXIT_CODE)


SHARDED: dict[str, Any] = dict(
    global_batch_size=12, gradient_accumulation_steps=None, per_device_train_batch_size=3, adam_epsilon=1e-3,
    per_device_eval_batch_size=3, logging_steps=1, eval_strategy="steps", eval_steps=3, save_steps=3, packing=False,
    load_best_model_at_end=True, max_steps=5, max_grad_norm=0.1,
)  # fmt: skip


def assert_same_run(one: Path, two: Path) -> None:
    assert_same_losses(one, two)
    names = [name for name in ("model.safetensors", "adapter_model.safetensors") if (one / name).exists()]
    expected, found = load_file(one / names[0]), load_file(two / names[0])
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert (value - found[key]).abs().max() < 1e-5, key


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("reward", dict(gradient_checkpointing=True, bf16=True)),
        ("dpo", dict(use_peft=True, dtype="bfloat16", lora_dropout=0.0, lora_target_modules=["in_proj", "dt_proj"])),
    ],
    ids=["full", "lora"],
)
def test_shards_are_one(stage: str, changes: dict[str, Any], recipe: Make, tmp_path: Path) -> None:
    """Under a token bound processes have unequal numbers of micro-batches, and shards are exchanged in each.

    In bfloat16, too: whatever autocast does on one process, it does on gathered shards.
    """
    one, two = tmp_path / "one", tmp_path / "two"
    changes = SHARDED | dict(max_tokens_per_device=140) | changes
    run(stage, recipe(stage, output_dir=str(one), **changes))
    on_processes(stage, recipe(stage, output_dir=str(two), fsdp="full_shard", **changes), sabotage=_full_disk)
    assert_same_run(one, two)
    assert (two / "checkpoint-3").exists() == bool(changes.get("use_peft"))  # which has another way to the disk


def test_shards_are_resumed_in_any_number(recipe: Make, tmp_path: Path) -> None:
    """Stopped on two, on one, gone on with two: the checkpoints are the same kind, with a state of the optimizer."""
    one, two = tmp_path / "one", tmp_path / "two"
    changes = SHARDED | dict(gradient_checkpointing="selective")
    run("sft", recipe("sft", output_dir=str(one), **changes))
    shared = recipe("sft", output_dir=str(two), fsdp="full_shard", fsdp_config={"fsdp_version": 2}, **changes)
    on_processes("sft", shared, stop_at=0, sabotage=_first_saves_alone)
    undo = _stop_at(1)
    try:
        with pytest.raises(Preempted):
            run("sft", shared)
    finally:
        undo()
    on_processes("sft", shared)
    assert_same_run(one, two)
    assert transformers.AutoModelForCausalLM.from_pretrained(two).lm_head.weight.isfinite().all()

    before, weights = history(two), load_file(two / "model.safetensors")  # bit for bit on as many
    state = json.loads((two / "run.json").read_text())
    (two / "run.json").write_text(json.dumps(state | {"status": "running"}))
    (two / "checkpoint-5" / "manifest.json").unlink()
    on_processes("sft", shared)
    assert history(two) == before
    assert all(torch.equal(value, weights[key]) for key, value in load_file(two / "model.safetensors").items())


@pytest.mark.parametrize("way", [None, _averaged_here], ids=["DDP", "without"])
def test_three_processes_are_resumed_to_the_bit(
    way: Callable[[int], None] | None, recipe: Make, tmp_path: Path
) -> None:
    """Unlike those of two, their sums depend on the order in which gradients lie in a bucket of DDP's."""
    changes: dict[str, Any] = dict(
        gradient_checkpointing=True, global_batch_size=12, gradient_accumulation_steps=None, packing=False,
        logging_steps=1, save_steps=100,
    )  # fmt: skip
    calm, shaken = (recipe("sft", output_dir=str(tmp_path / name), **changes) for name in ("calm", "shaken"))
    on_processes("sft", calm, processes=3, sabotage=way)
    on_processes("sft", shaken, stop_at=1, processes=3, sabotage=way)
    on_processes("sft", shaken, processes=3, sabotage=way)
    assert history(tmp_path / "calm") == history(tmp_path / "shaken")
    expected, found = (load_file(tmp_path / name / "model.safetensors") for name in ("calm", "shaken"))
    assert all(torch.equal(value, found[key]) for key, value in expected.items())


def test_a_full_disk_is_known_to_all(recipe: Make, tmp_path: Path) -> None:
    """transformers has a barrier in the middle of a save where there is a best step: nobody may be missing there."""
    on_processes("sft", recipe("sft", output_dir=str(tmp_path), **SHARDED), sabotage=_full_disk)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-5"]
    state = json.loads((tmp_path / "checkpoint-5/trainer_state.json").read_text())
    assert state["global_step"] == 5 and state["best_global_step"] in (3, 5)
    assert json.loads((tmp_path / "run.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (dict(fsdp="full_shard offload"), "fsdp: 'offload' is not supported; full_shard is"),
        (dict(fsdp="ful_shard"), "did you mean 'full_shard'"),
        (dict(fsdp="full_shard", fsdp_config={"fsdp_version": 1}), "fsdp_config: fsdp_version is 1"),
        (dict(fsdp="full_shard", fsdp_config={"fsdp_auto_wrap_policy": "x"}), "the model's blocks are the units"),
        (dict(fsdp="full_shard", fsdp_config={"state_dict_type": "x"}), "any number of processes resumes"),
        (dict(fsdp="full_shard", fsdp_config={"backward_prefetch": "x"}), "backward_prefetch is not supported"),
        (dict(fsdp_config={"version": 2}), "fsdp_config: has no effect without fsdp"),
        (dict(fsdp="full_shard", deepspeed="zero3.json"), "fsdp: does not go together with deepspeed"),
        (dict(deepspeed="recipes/distributed/zero3.json"), "deepspeed: .*pip install deepspeed"),
    ],
)
def test_what_cannot_be_sharded_is_one_sentence(
    changes: dict[str, Any], named: str, recipe: Make, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=named):
        training_arguments(recipe("sft", **changes), tmp_path)


def test_a_unit_of_shards_has_one_type() -> None:
    model = MambaForCausalLM(transformers.MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(UserError, match=r"float32 and torch.bfloat16|bfloat16 and torch.float32"):
        sharding.shard(model.to(torch.bfloat16), None)


@pytest.mark.parametrize("named", [True, False], ids=["global_batch_size", "gradient_accumulation_steps"])
def test_interrupted_on_two_resumed_on_one_and_back(named: bool, recipe: Make, tmp_path: Path) -> None:
    """The same rows a step and the same losses, whether the recipe says the global batch or how it is reached."""
    batch: dict[str, Any] = dict(global_batch_size=12, gradient_accumulation_steps=None)
    if not named:
        batch = dict(gradient_accumulation_steps=2)
    changes: dict[str, Any] = dict(
        per_device_train_batch_size=3, per_device_eval_batch_size=3, packing=False, logging_steps=1, save_steps=100,
        eval_strategy="steps", eval_steps=3,
    )  # fmt: skip
    calm = recipe("sft", output_dir=str(tmp_path / "calm"), **changes, global_batch_size=12)
    calm.gradient_accumulation_steps = None
    run("sft", calm)
    # The process that writes the checkpoint is not the one that is asked to stop: it must keep the optimizer, too.
    moved = recipe("sft", output_dir=str(tmp_path / "moved"), save_only_model=True, **(changes | batch))
    on_processes("sft", moved, stop_at=1)
    undo = _stop_at(3)
    try:
        with pytest.raises(Preempted):
            run("sft", moved)
    finally:
        undo()
    on_processes("sft", moved)
    for a, b in zip(history(tmp_path / "calm"), history(tmp_path / "moved"), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    attempts = json.loads((tmp_path / "moved/run.json").read_text())["attempts"]
    assert [attempt["processes"] for attempt in attempts] == [2, 1, 2]


def test_empty_items_come_last_and_only_there() -> None:
    rows: Any = [[{"index": i}] for i in range(5)]
    filled = FilledRows(rows, 4)
    sampler = FilledSampler(filled, seed=1)
    sampler.set_epoch(3)
    order = list(sampler)
    assert len(filled) == len(sampler) == 8 and sorted(order[:5]) == list(range(5))
    assert [filled[i] for i in order[5:]] == [[], [], []]
    assert len(FilledRows(rows, 5)) == 5


def test_add_up_of_one_process_changes_nothing() -> None:
    assert add_up({"loss": 0.1, "items": 3}) == {"loss": 0.1, "items": 3}
