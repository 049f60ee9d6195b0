"""Whole runs on a CUDA device: what is stopped and resumed has the bits of what never was, CUDA graphs and all."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mambalign.models import cuda_graphs
from mambalign.recipe import Recipe
from mambalign.train.run import run
from tests.train.conftest import history
from tests.train.test_preemption import interrupted_at
from tests.train.test_run import assert_same_run

pytestmark = pytest.mark.gpu


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counted: list[int] = []
    forward = cuda_graphs._Graph.forward

    def counting(self: Any, embeds: Any) -> Any:
        counted.append(embeds.shape[1])
        return forward(self, embeds)

    monkeypatch.setattr(cuda_graphs._Graph, "forward", counting)
    return counted


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("sft", dict(dtype="float32", bf16=True)),
        ("sft", dict(dtype="bfloat16", gradient_checkpointing="selective")),
        ("sft", dict(dtype="bfloat16", gradient_checkpointing=True)),
        ("sft", dict(gradient_accumulation_steps=2, per_device_train_batch_size=2)),
        ("dpo", dict(dtype="float32", bf16=True)),
        ("sft", dict(use_peft=True, lora_r=4, lora_dropout=0.1, bf16=True)),
    ],
    ids=str,
)
def test_stopped_and_resumed_it_is_the_same_run(
    stage: str,
    changes: dict[str, Any],
    recipe: Callable[..., Recipe],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replays: list[int],
) -> None:
    changes = dict(num_train_epochs=4, report_to="none", use_cpu=False, **changes)
    calm = run(stage, recipe(stage, output_dir=str(tmp_path / "calm"), **changes))
    assert calm.global_step > 6 and len(replays) > 3
    replays.clear()
    shaken = recipe(stage, output_dir=str(tmp_path / "shaken"), **changes)
    for step in (1, calm.global_step // 2, calm.global_step - 1):
        interrupted_at(stage, shaken, monkeypatch, step, signal.SIGTERM)
    run(stage, shaken)
    if changes.get("use_peft"):
        assert history(tmp_path / "calm") == history(tmp_path / "shaken")
    else:
        assert_same_run(tmp_path / "calm", tmp_path / "shaken")


def test_graphs_are_a_matter_of_speed(recipe: Callable[..., Recipe], tmp_path: Path, replays: list[int]) -> None:
    for graphs in (True, False):
        run(
            "sft",
            recipe("sft", output_dir=str(tmp_path / str(graphs)), cuda_graphs=graphs, report_to="none", use_cpu=False),
        )
    with_graphs, without = (history(tmp_path / name) for name in ("True", "False"))
    assert replays and [line["loss"] for line in with_graphs if "loss" in line] == pytest.approx(
        [line["loss"] for line in without if "loss" in line], rel=1e-3
    )
