"""Chains on this machine: going on, giving up, signals, several processes."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from mambalign.cluster import attempts, launch, local
from mambalign.cluster.attempts import Attempts
from mambalign.cluster.keys import EXIT_SAVED, ClusterError
from mambalign.cluster.launch import GRACE, Group, process_count
from mambalign.cluster.local import StageFailed, run_pipeline
from mambalign.cluster.pipeline import read_pipeline
from tests.cluster.conftest import fake_recipe
from tests.waiting import PATIENCE, until

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def chain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that runs commands by stage name, in a folder of their own; returns (code, what was said)."""
    monkeypatch.chdir(tmp_path)

    def run(stages: dict[str, Any], *chosen: str) -> tuple[int, list[str]]:
        said: list[str] = []
        stages = {name: {"command": stage} if isinstance(stage, str) else stage for name, stage in stages.items()}
        pipeline = read_pipeline({"stages": stages}, "p.yaml", fake_recipe)
        return run_pipeline(pipeline, tmp_path / "run", chosen, said.append), said

    return run


def test_finished_stages_are_passed_over_unless_they_changed(chain: Any) -> None:
    stages = {"a": "echo a >> log", "b": {"command": "echo b >> log", "needs": ["a"]}}
    assert chain(stages)[0] == 0
    assert chain(stages) == (0, ["a: finished before", "b: finished before"])
    assert Path("log").read_text() == "a\nb\n"
    assert chain(stages | {"b": {"command": "echo B >> log", "needs": ["a"]}})[0] == 0
    assert Path("log").read_text() == "a\nb\nB\n"


def test_what_is_made_from_a_stage_that_is_made_anew_is_made_anew(chain: Any, tmp_path: Path) -> None:
    """Else a new model's evaluation would be passed over, and its numbers be the old one's."""
    stages = {"a": "cp wanted model", "b": {"command": "cat model >> log", "needs": ["a"]}}
    stages |= {"c": {"command": "wc -l log >> counts", "needs": ["b"]}, "d": "echo d >> other"}
    Path("wanted").write_text("old\n")
    assert chain(stages)[0] == 0
    Path("wanted").write_text("new\n")
    code, said = chain(stages | {"a": "cp -f wanted model"})
    assert code == 0 and said[-1] == "d: finished before"
    assert Path("log").read_text() == "old\nnew\n" and len(Path("counts").read_text().splitlines()) == 2
    assert chain(stages | {"a": "cp -f wanted model"})[1] == [f"{name}: finished before" for name in "abcd"]
    record = Attempts.of(tmp_path / "run", "b").path  # of a version that did not count
    record.write_text(re.sub(r', "made_from": {[^}]*}', "", record.read_text()))
    assert chain(stages)[1][-1] == "d: finished before"


def test_a_training_from_an_earlier_model_is_said(chain: Any, tmp_path: Path) -> None:
    sft, dpo = tmp_path / "sft", tmp_path / "dpo"
    stages = {"sft": {"recipe": "sft.yaml", "output_dir": str(sft)}, "dpo": {"recipe": "dpo.yaml", "model": "sft",
              "output_dir": str(dpo)}}  # fmt: skip
    for folder in (sft, dpo):
        folder.mkdir()
        (folder / "run.json").write_text('{"status": "finished"}')
    Attempts.of(tmp_path / "run", "sft").end(0)
    Attempts.of(tmp_path / "run", "dpo").end(0, made_from={"sft": 1})
    assert chain(stages)[1] == ["sft: finished before", "dpo: finished before"]
    Attempts.of(tmp_path / "run", "sft").end(85)
    Attempts.of(tmp_path / "run", "sft").end(0)
    assert chain(stages)[1][1] == f"dpo: finished before, from an earlier sft; delete {dpo} to train it again"


def test_a_failure_shows_the_end_of_its_log_and_stops_the_chain(chain: Any) -> None:
    stages = {"a": "seq 100; false; echo never", "b": {"command": "touch wrong", "needs": ["a"]}}
    with pytest.raises(StageFailed, match=r"stage a failed with exit code 1; the end of .*a.log:\n86\n[\s\S]*100$"):
        chain(stages)
    assert not Path("wrong").exists()
    with pytest.raises(ClusterError, match="stage b needs a, which has not finished; run `--from a`"):
        chain(stages, "b")
    assert chain(stages | {"a": "true"})[0] == 0 and Path("wrong").exists()


def test_a_stage_that_saves_and_stops_goes_on(chain: Any, tmp_path: Path) -> None:
    """Exit code 85 with something new each time: started again until it is done."""
    command = "echo x >> out/progress; [ $(wc -l < out/progress) = 4 ] || exit 85"
    Path("out").mkdir()
    code, said = chain({"a": {"command": command, "output_dir": "out"}})
    assert code == 0 and said[-1] == "a: finished"
    assert len(Attempts.of(tmp_path / "run", "a").starts) == 4


def test_a_stage_that_does_not_get_on_is_given_up(chain: Any, tmp_path: Path) -> None:
    with pytest.raises(StageFailed, match="stopped 5 times with no new checkpoint since step 0"):
        chain({"a": "exit 85"})
    assert len(Attempts.of(tmp_path / "run", "a").starts) == attempts.PATIENCE


def test_progress_counts_complete_checkpoints_only(tmp_path: Path) -> None:
    for step, whole in ((9, True), (10, True), (100, False)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if whole:
            (tmp_path / f"checkpoint-{step}" / "manifest.json").write_text("{}")
    assert attempts.progress(tmp_path) == attempts.newest_step(tmp_path) == 10
    assert attempts.progress(None) == 0


RUN = """
import signal, sys
from pathlib import Path
from mambalign.cluster.local import run_pipeline
from mambalign.cluster.pipeline import read_pipeline
pipeline = read_pipeline({"stages": {"a": {"command": sys.argv[1]}}}, "p", None)
sys.exit(run_pipeline(pipeline, Path("run"), say=lambda line: None))
"""
SAVER = "trap 'echo saved >> seen; exit 85' TERM USR1; echo $$ > pid; sleep 300 & wait"


@pytest.mark.parametrize(
    ("number", "command", "code"),
    [
        (signal.SIGTERM, SAVER, 85),
        (signal.SIGUSR1, SAVER, 85),
        (signal.SIGTERM, "echo $$ > pid; exec sleep 1000", 85),  # knows nothing of signals: it is stopped all the same
        (signal.SIGINT, "echo $$ > pid; exec sleep 1000", 130),
        (signal.SIGTERM, "trap 'exit 0' TERM; echo $$ > pid; sleep 300 & wait", 0),  # was done just then
        (signal.SIGKILL, SAVER, -9),
    ],
)
def test_a_signal_reaches_the_stage_once(number: int, command: str, code: int, tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", RUN, command], cwd=tmp_path,
                               env={**os.environ, "PYTHONPATH": str(REPOSITORY)})  # fmt: skip
    pid = wait_for_text(tmp_path / "pid")
    process.send_signal(number)
    assert process.wait(PATIENCE) == code
    until(lambda: not lives(pid), "the stage lives on without its launcher")
    if command == SAVER:
        assert (tmp_path / "seen").read_text() == "saved\n"


def wait_for_text(path: Path) -> str:
    until(lambda: path.exists() and path.read_text().strip(), str(path))
    return path.read_text().strip()


def lives(pid: str) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_several_processes_are_one_group(tmp_path: Path) -> None:
    script = 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR" > rank-$RANK'
    group = Group(["bash", "-c", f"cd {tmp_path}; {script}"], 3, os.environ)
    assert group.wait() == 0
    assert [(tmp_path / f"rank-{r}").read_text() for r in range(3)] == [f"{r} {r} 3 127.0.0.1\n" for r in range(3)]
    group = Group(["bash", "-c", "[ $RANK = 1 ] && exit 7; exec sleep 1000"], 2, os.environ)
    started = time.monotonic()
    assert group.wait() == 7  # the first failure, not the SIGTERM that ended the other
    assert time.monotonic() - started < GRACE, "killed, not asked to stop"
    group = Group(["bash", "-c", "exit 85"], 2, os.environ)
    assert group.wait() == EXIT_SAVED
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "our handlers outlive the group"


def test_one_that_ignores_everything_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "GRACE", 0.3)
    for failing in (0, 1):  # whose exit code counts: the other one only waited for it
        script = f"[ $RANK = {failing} ] && exit 3; trap '' TERM; while :; do sleep 0.1; done"
        assert Group(["bash", "-c", script], 2, os.environ).wait() == 3


def test_the_port_where_processes_meet_is_kept_for_torch() -> None:
    with launch._hold_port() as held:
        port = held.getsockname()[1]
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port))
        for libuv in (True, False):
            torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False, use_libuv=libuv)


def test_a_slice_ends_with_a_save() -> None:
    group = Group(["bash", "-c", "trap 'exit 85' USR1; sleep 300 & wait"], 1, os.environ)
    assert group.wait(slice_seconds=0.5) == EXIT_SAVED


@pytest.mark.parametrize(
    ("listed", "counts", "expected"),
    [
        ("GPU-a,GPU-b,GPU-c", (1, 2, 4), 2),
        ("0,1,2,3", (1, 2, 4), 4),
        ("10000", (1, 2, 4), 1),
        ("MIG-1", (0,), 1),
        ("", (1, 2), 1),
        ("-1", (1, 2), 1),
    ],
)
def test_processes_are_as_many_as_the_gpus_allow(listed: str, counts: tuple[int, ...], expected: int) -> None:
    assert process_count(counts, launch.visible_gpus({"CUDA_VISIBLE_DEVICES": listed})) == expected


def test_the_job_script_s_launcher_gives_up_too(tmp_path: Path) -> None:
    record = Attempts(tmp_path / "ckpt" / "attempts.jsonl")
    words = [
        "--record",
        str(record.path),
        "--output-dir",
        str(tmp_path / "ckpt" / "none"),
        "--",
        "bash",
        "-c",
        "exit 85",
    ]
    assert [launch.main(words) for _ in range(6)] == [85] * 5 + [1]


def test_the_environment_of_a_stage_finds_this_mambalign() -> None:
    pipeline = read_pipeline({"env": {"X": True}, "stages": {"a": {"command": "x"}}}, "p", fake_recipe)
    env = local.stage_environment(pipeline.stages[0])
    assert env["X"] == "true" and env["PATH"].split(os.pathsep)[0] == os.path.dirname(sys.executable)
