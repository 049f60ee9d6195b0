"""Signals, bounds on time, and random kills: nothing is lost, and what resumes is the undisturbed run, bit for bit."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mambalign.recipe import Recipe, UserError
from mambalign.train import checkpoint, preemption
from mambalign.train.preemption import EXIT_CODE, Preempted, Preemption, agree
from mambalign.train.run import run
from mambalign.train.trainer import PackedTrainer
from tests.train.conftest import history, start
from tests.train.leash import let
from tests.train.test_run import assert_same_run
from tests.waiting import PATIENCE, until

REPOSITORY = Path(__file__).resolve().parents[2]
Make = Callable[..., Recipe]


def step_of(folder: Path) -> int:
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def interrupted_at(stage: str, recipe: Recipe, monkeypatch: pytest.MonkeyPatch, step: int, number: int) -> Preempted:
    """Run in this process; the signal arrives in the middle of a step."""
    real = PackedTrainer.training_step

    def signalled(self: PackedTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == step:
            os.kill(os.getpid(), number)
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Preempted) as stopped:
        patch.setattr(PackedTrainer, "training_step", signalled)
        run(stage, recipe)
    return stopped.value


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_is_a_checkpoint_and_exit_code_85(
    number: signal.Signals, recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("sft", recipe("sft", output_dir=str(tmp_path / "calm")))
    shaken = recipe("sft", output_dir=str(tmp_path / "shaken"), save_steps=1000)
    before = signal.getsignal(number)
    for step in (0, 4):
        stop = interrupted_at("sft", shaken, monkeypatch, step, number)
        assert stop.code == EXIT_CODE == 85
        assert stop.why.startswith(f"{number.name} at step {step + 1} of")
        newest = checkpoint.newest_complete(tmp_path / "shaken")
        assert newest is not None and newest.name == f"checkpoint-{step + 1}"
        state = json.loads((tmp_path / "shaken/run.json").read_text())
        assert state["status"] == "preempted" and number.name in state["why"]
    assert signal.getsignal(number) is before
    run("sft", shaken)
    assert_same_run(tmp_path / "calm", tmp_path / "shaken")
    attempts = json.loads((tmp_path / "shaken/run.json").read_text())["attempts"]
    assert [attempt["status"] for attempt in attempts] == ["preempted", "preempted", "finished"]


@pytest.mark.parametrize(
    "changes",
    [
        dict(eval_strategy="steps", eval_steps=2),
        dict(eval_strategy="epoch", save_strategy="epoch", logging_strategy="epoch"),
        dict(eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True),
        dict(eval_strategy="steps", eval_steps=4, max_steps=7),
        dict(eval_strategy="epoch", save_strategy="no", max_steps=7),
        dict(save_only_model=True, save_steps=2),
    ],
    ids=lambda changes: ",".join(f"{k}={v}" for k, v in changes.items()),
)
def test_stopped_anywhere_the_history_has_no_seam(
    changes: dict[str, Any], recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where an evaluation is due: it waits for the next start, and the log has it where it belongs."""
    calm = run("sft", recipe("sft", output_dir=str(tmp_path / "calm"), **changes))
    shaken = recipe("sft", output_dir=str(tmp_path / "shaken"), **changes)
    for step in sorted({1, 3, 4, calm.global_step - 1}):  # with evaluations after 2, 4, an epoch of 5, and the end
        interrupted_at("sft", shaken, monkeypatch, step, signal.SIGTERM)
    run("sft", shaken)
    assert_same_run(tmp_path / "calm", tmp_path / "shaken")


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_a_signal_in_an_evaluation(
    strategy: str, recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the n-th evaluation of the n-th attempt: the one that makes up for the last is let through."""
    changes = dict(eval_strategy="steps", eval_steps=4, save_strategy=strategy, save_steps=4)
    run("sft", recipe("sft", output_dir=str(tmp_path / "calm"), **changes))
    shaken = recipe("sft", output_dir=str(tmp_path / "shaken"), **changes)
    real = PackedTrainer.get_eval_dataloader
    stops = 0
    for victim in (1, 1, 2, 2, 2, 2):
        calls: list[int] = []

        def signalled(self: PackedTrainer, *args: Any, calls: list[int] = calls, victim: int = victim) -> Any:
            calls.append(self.state.global_step)
            if len(calls) == victim:
                os.kill(os.getpid(), signal.SIGUSR1)
            return real(self, *args)

        with monkeypatch.context() as patch:
            patch.setattr(PackedTrainer, "get_eval_dataloader", signalled)
            try:
                run("sft", shaken)
                break
            except Preempted:
                stops += 1
    run("sft", shaken)
    assert stops >= 4
    assert_same_run(tmp_path / "calm", tmp_path / "shaken")


def test_a_signal_in_the_reference_pass(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mambalign.train import reference

    monkeypatch.setattr(reference, "PART", 8)
    run("dpo", recipe("dpo", output_dir=str(tmp_path / "calm")))
    shaken = recipe("dpo", output_dir=str(tmp_path / "shaken"))
    real, computed = reference._compute, []

    def signalled(*args: Any) -> Any:
        computed.append(args[2])
        if len(computed) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(reference, "_compute", signalled)
    with pytest.raises(Preempted, match="SIGTERM came while computing reference log-probs"):
        run("dpo", shaken)
    assert len(computed) == 2
    run("dpo", shaken)
    assert len(computed) == len(set(map(str, computed))) + 1  # the evaluation's first part has the range of the first
    assert_same_run(tmp_path / "calm", tmp_path / "shaken")


def test_a_signal_before_there_is_anything_to_save(
    recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokenising in helper processes fails when the signal ends those."""
    from mambalign.train import run as module

    def killed(*_: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        raise RuntimeError("one of the subprocesses has abruptly died")

    with monkeypatch.context() as patch, pytest.raises(Preempted, match="SIGTERM came while loading"):
        patch.setattr(module, "load_data", killed)
        run("sft", recipe("sft"))

    def broken(*_: Any) -> Any:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a bug"):
        patch.setattr(module, "load_data", broken)
        run("sft", recipe("sft"))


def test_the_whole_job_gets_the_signal(recipe: Make, tmp_path: Path) -> None:
    """As from Slurm, and through the command line: data workers get it too, and still feed the step that finishes.

    It comes anywhere behind the second step; the thirteenth waits for it.
    """
    run("sft", recipe("sft", output_dir=str(tmp_path / "calm"), num_train_epochs=4))
    shaken = recipe(
        "sft", output_dir=str(tmp_path / "shaken"), num_train_epochs=4, dataloader_num_workers=1, save_steps=1000
    )
    (tmp_path / "recipe.yaml").write_text(shaken.to_yaml())
    let(tmp_path / "leash", 12)
    words = [sys.executable, "-m", "tests.train.leash", str(tmp_path / "leash"), "sft", str(tmp_path / "recipe.yaml")]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True, cwd=REPOSITORY)
        until(lambda: step_of(tmp_path / "shaken") >= 2 or job.poll() is not None)
        assert job.poll() is None, (tmp_path / "log").read_text()
        os.killpg(job.pid, signal.SIGTERM)
        assert job.wait(PATIENCE) == EXIT_CODE, (tmp_path / "log").read_text()
    assert "stopped: SIGTERM at step" in (tmp_path / "log").read_text()
    run("sft", replace(shaken, dataloader_num_workers=0))
    assert_same_run(tmp_path / "calm", tmp_path / "shaken")


@pytest.fixture
def steps_of_twenty_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the clock of the bounds on time; nothing else takes any."""
    real, now = PackedTrainer.training_step, [0.0]

    def training_step(self: PackedTrainer, *args: Any, **kwargs: Any) -> Any:
        now[0] = 20.0 * (self.state.global_step + 1)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(PackedTrainer, "training_step", training_step)
    monkeypatch.setattr(preemption, "time", SimpleNamespace(monotonic=lambda: now[0]))


@pytest.mark.usefixtures("steps_of_twenty_seconds")
def test_max_runtime_leaves_time_for_the_save(recipe: Make, tmp_path: Path) -> None:
    """One and a half times the minute that a save may take, and 20 s for a step: of 600 s they are left after 480."""
    changes = dict(max_runtime="10m", num_train_epochs=1000, save_steps=10**6)
    with pytest.raises(Preempted, match="max_runtime, 600 s at step 25 of 5000"):
        run("sft", recipe("sft", output_dir=str(tmp_path / "sliced"), **changes))
    newest = checkpoint.newest_complete(tmp_path / "sliced")
    assert newest is not None and newest.name == "checkpoint-25"


def test_save_minutes_bounds_what_is_lost(recipe: Make, tmp_path: Path) -> None:
    saved: list[int] = []
    changes = dict(save_strategy="no", num_train_epochs=4, save_total_limit=None)
    run("sft", recipe("sft", output_dir=str(tmp_path / "never"), **changes))
    assert not list((tmp_path / "never").glob("checkpoint-*"))
    steps = run("sft", recipe("sft", output_dir=str(tmp_path / "always"), save_minutes=1e-9, **changes)).global_step
    saved = sorted(int(path.name.split("-")[1]) for path in (tmp_path / "always").glob("checkpoint-*"))
    assert saved == list(range(1, steps + 1))
    assert_same_run(tmp_path / "never", tmp_path / "always")


@pytest.mark.usefixtures("steps_of_twenty_seconds")
def test_a_kill_costs_save_minutes_and_a_step(recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a minute may be lost every third step saves, and no more is lost than since then."""
    real = PackedTrainer.training_step

    def killed(self: PackedTrainer, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 8:
            raise KeyboardInterrupt
        return real(self, *args, **kwargs)

    monkeypatch.setattr(PackedTrainer, "training_step", killed)
    changes = dict(save_minutes=1, save_steps=10**6, num_train_epochs=1000, save_total_limit=None)
    with pytest.raises(KeyboardInterrupt):
        run("sft", recipe("sft", output_dir=str(tmp_path / "victim"), **changes))
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "victim")] == ["checkpoint-6", "checkpoint-3"]


def test_the_clock_of_save_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    watch = Preemption(save_seconds=60)
    watch.training_begins()
    decisions = []
    for _ in range(5):
        now[0] += 25
        decisions.append(watch.step_ends())
        if decisions[-1][1]:
            now[0] += 10  # the save itself is not lost work
            watch.saved(10)
    assert decisions == [(False, False), (False, False), (False, True), (False, False), (False, False)]


def test_the_clock_of_max_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of 90 s and a save of a minute, with half of one for safety: 180 s are left for them."""
    now = [0.0]
    monkeypatch.setattr(preemption.time, "monotonic", lambda: now[0])
    watch = Preemption(max_runtime=1000)
    watch.training_begins()
    stops = []
    for _ in range(10):
        now[0] += 90
        stops.append(watch.step_ends()[0])
    assert stops == [False] * 9 + [True]
    for _ in range(6):  # quick saves, which would leave time for a step, and are no other reason
        watch.saved(1)
    assert watch.reason == "max_runtime, 1000 s"


def test_another_processes_stop_is_a_reason_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preemption, "agree", lambda *mine: [True] * len(mine))
    for stop in (lambda watch: watch.step_ends(), lambda watch: watch.check("evaluating")):
        watch = Preemption()
        assert watch.reason is None
        with suppress(Preempted):
            stop(watch)
        assert watch.reason == "the stop of another process"


def test_agreement_of_one_process_is_its_own_mind() -> None:
    assert agree(True, False) == [True, False]


@pytest.mark.parametrize("text", ["4", "240", "4 hours", "0h", "-1h", "4:00", "1h-2m", "00:00:00"])
def test_what_is_no_time(text: str, recipe: Make) -> None:
    with pytest.raises(UserError, match="max_runtime"):
        recipe("sft", max_runtime=text)


@pytest.mark.slow
@pytest.mark.parametrize("kills", [8])  # 200 were tried by hand
def test_random_kills(kills: int, recipe: Make, tmp_path: Path) -> None:
    """SIGKILL and SIGTERM at random moments, in saves too: it always resumes and ends at the same weights.

    A run that is done before its moment comes is looked at, and begun anew.
    """
    changes = dict(save_steps=2, eval_strategy="steps", eval_steps=3, num_train_epochs=12)
    run("sft", recipe("sft", output_dir=str(tmp_path / "calm"), **changes))
    victim = recipe("sft", output_dir=str(tmp_path / "victim"), **changes)
    folder = tmp_path / "victim"
    dice = random.Random(5)
    done = 0
    while done < kills:
        child = start("sft", victim)
        saving, latest = dice.random() < 0.4, time.monotonic() + dice.uniform(0.0, 1.2)

        def is_time(child: Any = child, saving: bool = saving, latest: float = latest) -> bool:
            due = (folder / checkpoint.STAGING).exists() if saving else time.monotonic() > latest
            return due or not child.is_alive()

        until(is_time)
        number = dice.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
        if not child.is_alive():
            assert child.exitcode == 0
            assert_same_run(tmp_path / "calm", folder)
            shutil.rmtree(folder)
            continue
        os.kill(child.pid, number)
        child.join(PATIENCE)
        assert child.exitcode in (-number, EXIT_CODE, 0), child.exitcode
        done += 1
        for path in checkpoint.checkpoints(folder):
            assert checkpoint.fault(path) is None
    run("sft", victim)
    assert_same_run(tmp_path / "calm", folder)
    assert history(folder) == history(tmp_path / "calm")
