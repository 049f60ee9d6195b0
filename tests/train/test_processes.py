"""Two processes on the CPU beside one: the same steps, losses, evaluations and weights, and runs that resume."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mambalign.recipe import Recipe
from mambalign.train.preemption import EXIT_CODE, Preempted
from mambalign.train.processes import FilledRows, FilledSampler, add_up
from mambalign.train.run import run
from mambalign.train.trainer import PackedTrainer
from tests.train.conftest import history

Make = Callable[..., Recipe]


def _rank(rank: int, port: int, stage: str, values: dict[str, Any], stop_at: int | None) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if rank == 1:  # one that is asked to stop is enough
        _stop_at(stop_at)
    run(stage, Recipe.from_dict(values))


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


def on_two_processes(stage: str, recipe: Recipe, stop_at: int | None = None) -> None:
    """As torchrun starts them, without its imports."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mambalign.train.run"])
    ranks = [context.Process(target=_rank, args=(rank, port, stage, recipe.to_dict(), stop_at)) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in ranks] == [0 if stop_at is None else EXIT_CODE] * 2


@pytest.mark.parametrize(("stage", "bound"), [("sft", None), ("dpo", 140), ("reward", 140)])
def test_two_processes_are_one(stage: str, bound: int | None, recipe: Make, tmp_path: Path) -> None:
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
    on_two_processes(stage, shared)
    for a, b in zip(history(one), history(two), strict=True):
        assert a == pytest.approx(b, rel=1e-4, abs=1e-6)
    for name, expected in load_file(one / "model.safetensors").items():
        assert (expected - load_file(two / "model.safetensors")[name]).abs().max() < 1e-5, name

    before = history(two)  # of a run that was killed after its second checkpoint
    state = json.loads((two / "run.json").read_text())
    (two / "run.json").write_text(json.dumps(state | {"status": "running"}))
    (two / "checkpoint-8" / "manifest.json").unlink()
    on_two_processes(stage, shared)
    assert history(two) == before


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
    moved = recipe("sft", output_dir=str(tmp_path / "moved"), **(changes | batch))
    on_two_processes("sft", moved, stop_at=1)
    undo = _stop_at(3)
    try:
        with pytest.raises(Preempted):
            run("sft", moved)
    finally:
        undo()
    on_two_processes("sft", moved)
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
