"""Two processes on the CPU beside one: the same steps, losses, evaluations and weights, and runs that resume."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mambalign.recipe import Recipe
from mambalign.train.processes import FilledRows, FilledSampler, add_up
from mambalign.train.run import run
from tests.train.conftest import history

Make = Callable[..., Recipe]


def _rank(rank: int, port: int, stage: str, values: dict[str, Any]) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="localhost", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    run(stage, Recipe.from_dict(values))


def on_two_processes(stage: str, recipe: Recipe) -> None:
    """As torchrun starts them, without its imports."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mambalign.train.run"])
    ranks = [context.Process(target=_rank, args=(rank, port, stage, recipe.to_dict())) for rank in (0, 1)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(120)
        process.kill()
        assert process.exitcode == 0


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
