"""Chains on a real Slurm of two nodes: requeued, preempted, drained, crashed, cancelled."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from mambalign.cli.cluster import read_recipe
from mambalign.cluster.attempts import Attempts, read_json, read_lines
from mambalign.cluster.keys import ClusterError
from mambalign.cluster.pipeline import read_pipeline
from mambalign.cluster.submit import submit_pipeline
from tests.cluster.conftest import on_a_leash
from tests.train.conftest import history
from tests.train.conftest import workbench as workbench
from tests.train.leash import let
from tests.train.test_run import assert_same_run
from tests.waiting import PATIENCE, until

UP = Path(__file__).with_name("slurm_up.sh")
REPOSITORY = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow
SITE = {
    "partition": "low",
    "python": sys.executable,
    "env": {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., str]]:
    """A function that runs one of Slurm's commands on a cluster of its own."""
    folder = Path(tempfile.mkdtemp(prefix="mambalign-slurm-", dir="/tmp"))  # short: a socket has 108 characters at most
    port = 20000 + 3 * os.getpid() % 12000  # it and the next two are no other process's; the kernel's begin at 32768
    done = subprocess.run(["bash", str(UP), str(folder), str(port)], capture_output=True, text=True, timeout=900)
    if done.returncode == 3:
        pytest.skip(f"no Slurm to test on: {done.stderr.strip()}")
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(folder / "etc/slurm.conf")
    try:
        assert done.returncode == 0, done.stderr

        def command(*words: str) -> str:
            done = subprocess.run(words, capture_output=True, text=True, timeout=PATIENCE, check=True)
            return done.stdout.strip()

        yield command
    finally:
        subprocess.run(["bash", str(UP), "--down", str(folder)], timeout=PATIENCE, check=False, capture_output=True)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


def submitted(pipeline: dict[str, Any], folder: Path, **site: Any) -> dict[str, str]:
    """Job ids by stage."""
    loaded = read_pipeline(pipeline, "pipeline.yaml", read_recipe)
    list(submit_pipeline(loaded, folder, "slurm", SITE | site, "site", pipeline_path=Path("pipeline.yaml")))
    jobs: dict[str, str] = read_json(folder / "jobs.json")["jobs"]
    return jobs


def state(slurm: Callable[..., str], job: str) -> str:
    shown = re.search(r"JobState=(\S+)", slurm("scontrol", "-o", "show", "job", job))
    assert shown is not None
    return shown[1]


def wait_for(slurm: Callable[..., str], job: str, *states: str) -> None:
    until(lambda: state(slurm, job) in states, f"job {job} is not {' or '.join(states)}")


def wait_for_restart(slurm: Callable[..., str], job: str, number: int) -> None:
    """The states in between are too short to be seen for certain."""

    def restarted() -> bool:
        shown = slurm("scontrol", "-o", "show", "job", job)
        assert "JobState=COMPLETED" not in shown, "the job was done before it was disturbed"
        return f" Restarts={number} " in shown

    until(restarted, f"job {job} is not started again")


def _is_back(slurm: Callable[..., str], node: str) -> bool:
    """Slurm refuses a resume while the node still cleans up, and once it has come back by itself."""
    if slurm("sinfo", "-h", "-p", "low", "-n", node, "-o", "%t") in ("idle", "mix", "alloc"):
        return True
    subprocess.run(["scontrol", "update", f"nodename={node}", "state=resume"], capture_output=True, timeout=PATIENCE)
    return False


def test_a_chain_survives_what_a_cluster_does(
    slurm: Callable[..., str], workbench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Preempted, requeued, drained and crashed at random steps; the weights are those of a calm run on no cluster."""
    from mambalign.recipe import Recipe
    from mambalign.train.run import run

    monkeypatch.chdir(tmp_path)
    torch.set_num_threads(1)  # as the jobs
    shared = dict(max_length=128, per_device_train_batch_size=2, gradient_accumulation_steps=2, learning_rate=3e-3,
                  max_steps=60, logging_steps=1, save_steps=4, use_cpu=True, disable_tqdm=True)  # fmt: skip
    recipes: dict[str, dict[str, Any]] = {
        "sft": shared | dict(model_name_or_path=str(workbench / "model"), dataset_mixer={str(workbench / "sft"): 1.0}),
        "dpo": shared | dict(model_name_or_path="out/sft", dataset_mixer={str(workbench / "dpo"): 1.0},
                             max_prompt_length=64),
    }  # fmt: skip
    for name, values in recipes.items():
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values | {"output_dir": f"out/{name}"}))
        run(name, Recipe.from_dict(values | {"output_dir": f"out/{name}"}, stage=name))
    shutil.move("out", "calm")

    small = {"gpus": 0, "cpus": 1, "memory": "1GB", "time": "30m"}
    stages = {
        "sft": {"recipe": "sft.yaml"},
        "dpo": {"recipe": "dpo.yaml", "model": "sft"},
        "eval": {"command": "sha256sum ${dpo.output_dir}/model.safetensors > result.txt"},
    }
    for name in recipes:
        let(tmp_path / f"{name}.leash", 0)
    pipeline = {"name": "chain", "resources": small, "stages": stages}
    jobs = submitted(pipeline, Path("runs/chain"), python=str(on_a_leash(tmp_path)))
    dice = random.Random(7)

    def at_random_step(stage: str) -> int:
        """Wait for a step some way behind the newest that is logged, at which the job stays."""
        lines = lambda: read_lines(tmp_path / "out" / stage / "metrics.jsonl")  # noqa: E731
        seen = max((line["step"] for line in lines()), default=0)
        target = seen + dice.randint(3, 8)
        let(tmp_path / f"{stage}.leash", target)
        attempt = len(Attempts.of(Path("runs/chain"), stage).starts)
        until(
            lambda: any(line["step"] >= target for line in lines()), f"{stage} (attempt {attempt}) is not at {target}"
        )
        assert state(slurm, jobs[stage]) == "RUNNING"
        return target

    first, second = slurm("sinfo", "-h", "-p", "low", "-N", "-o", "%N").split()
    at_random_step("sft")
    slurm("sbatch", "--partition=high", "--nodes=2", "--cpus-per-task=16", "--output=/dev/null", "--wrap=sleep 1")
    wait_for_restart(slurm, jobs["sft"], 1)
    wait_for(slurm, jobs["sft"], "RUNNING")
    at_random_step("sft")
    slurm("scontrol", "requeue", jobs["sft"])
    slurm("scontrol", "update", f"nodename={first}", "state=drain", "reason=test")  # the rest has to run on the other
    wait_for_restart(slurm, jobs["sft"], 2)
    let(tmp_path / "sft.leash", 60)
    wait_for(slurm, jobs["dpo"], "RUNNING")
    at_random_step("dpo")
    slurm("scontrol", "update", f"nodename={first}", "state=resume")
    slurm("scontrol", "update", f"nodename={second}", "state=down", "reason=test")
    wait_for_restart(slurm, jobs["dpo"], 1)
    let(tmp_path / "dpo.leash", 60)
    until(lambda: _is_back(slurm, second), "the node is not back")
    wait_for(slurm, jobs["eval"], "COMPLETED", "CANCELLED", "FAILED")

    assert {name: state(slurm, job) for name, job in jobs.items()} == dict.fromkeys(jobs, "COMPLETED")
    attempts = {name: len(Attempts.of(Path("runs/chain"), name).starts) for name in jobs}
    assert attempts == {"sft": 3, "dpo": 2, "eval": 1}
    for name in recipes:
        assert_same_run(tmp_path / "calm" / name, tmp_path / "out" / name)
    assert Path("result.txt").read_text()


def test_a_time_limit_is_seen_coming(
    slurm: Callable[..., str], workbench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's warning is a checkpoint and a requeue, and what goes on is the calm run. The limit is shortened while the
    job runs, which spares a minute of waiting; where the warning comes is up to Slurm, which looks every 30 seconds."""
    from mambalign.recipe import Recipe
    from mambalign.train.run import run

    monkeypatch.chdir(tmp_path)
    values = dict(model_name_or_path=str(workbench / "model"), dataset_mixer={str(workbench / "sft"): 1.0},
                  output_dir="out", max_length=128, per_device_train_batch_size=8, max_steps=10**6, logging_steps=1,
                  lr_scheduler_type="constant", save_steps=10**6, use_cpu=True, disable_tqdm=True)  # fmt: skip
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(values))
    small = {"gpus": 0, "cpus": 1, "memory": "1GB", "time": "30m"}
    jobs = submitted({"name": "limit", "resources": small, "stages": {"sft": {"recipe": "sft.yaml"}}}, Path("run"))

    def stopped(attempt: int) -> tuple[str, int]:
        """(signal, step) at which that attempt saved."""
        attempts = lambda: read_json(tmp_path / "out/run.json").get("attempts", [])  # noqa: E731
        until(
            lambda: len(attempts()) >= attempt and "why" in attempts()[attempt - 1], f"attempt {attempt} has not saved"
        )
        why = re.fullmatch(r"(SIG\w+) at step (\d+) of 1000000", attempts()[attempt - 1]["why"])
        assert why is not None, attempts()
        return why[1], int(why[2])

    until(lambda: read_lines(tmp_path / "out/metrics.jsonl"), "it does not train")
    slurm("scontrol", "update", f"jobid={jobs['sft']}", "timelimit=2")
    signal, step = stopped(1)
    assert signal == "SIGUSR1"
    slurm("scontrol", "update", f"jobid={jobs['sft']}", "timelimit=30")
    until(lambda: len(read_lines(tmp_path / "out/metrics.jsonl")) >= step + 3, "it does not go on")
    slurm("scancel", jobs["sft"])
    signal, last = stopped(2)
    assert signal == "SIGTERM" and last >= step + 3

    torch.set_num_threads(1)  # as the job
    run("sft", Recipe.from_dict(values | {"output_dir": "calm", "max_steps": last, "do_eval": False}, stage="sft"))
    assert history(tmp_path / "calm") == history(tmp_path / "out")
    calm, shaken = (load_file(tmp_path / f / "model.safetensors") for f in ("calm", f"out/checkpoint-{last}"))
    assert all(torch.equal(value, shaken[name]) for name, value in calm.items())


def test_cancelled_stays_cancelled_and_a_failure_stops_the_chain(
    slurm: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"gpus": 0, "cpus": 1, "memory": "1GB", "time": "30m"}
    stages = {
        "long": {"command": "sleep 600"},
        "after-long": {"command": "touch wrong", "needs": ["long"]},
        "bad": {"command": "exit 3"},
        "after-bad": {"command": "touch wrong", "needs": ["bad"]},
        "saver": {"command": "trap 'exit 85' TERM USR1; echo x >> saver.txt; sleep 600 & wait"},
    }
    jobs = submitted({"name": "ends", "resources": small, "stages": stages}, tmp_path / "run")
    wait_for(slurm, jobs["long"], "RUNNING")
    until(Path("saver.txt").exists, "the saver does not run")
    slurm("scancel", jobs["long"])
    slurm("scancel", jobs["saver"])  # saves, exits 85, and is not brought back to life
    for name, expected in (
        ("long", "CANCELLED"),
        ("bad", "FAILED"),
        ("after-bad", "CANCELLED"),
        ("saver", "CANCELLED"),
    ):
        wait_for(slurm, jobs[name], expected)
    wait_for(slurm, jobs["after-long"], "CANCELLED")
    time.sleep(8)  # longer than a requeued job waits
    assert state(slurm, jobs["saver"]) == "CANCELLED" and len(Path("saver.txt").read_text().split()) == 1
    assert not Path("wrong").exists()


def test_half_a_chain_is_never_left_in_the_queue(
    slurm: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = {"gpus": 0, "cpus": 1, "memory": "1GB", "time": "30m"}
    stages = {
        "first": {"command": "sleep 600"},
        "greedy": {"command": "true", "needs": ["first"], "resources": {"gpus": 99}},
    }
    with pytest.raises(ClusterError, match=r"Requested node configuration is not available.*nothing is left"):
        submitted({"name": "half", "resources": small, "stages": stages}, tmp_path / "run")
    until(lambda: not slurm("squeue", "-h", "-n", "half-first", "-t", "PD,R"), "the first stage is not gone")


def test_a_stage_that_never_gets_on_is_given_up(
    slurm: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    record = Attempts.of(tmp_path / "run", "stuck")
    stages = {"stuck": {"command": "exit 85", "output_dir": "out"}}
    small = {"gpus": 0, "cpus": 1, "memory": "1GB", "time": "30m"}
    pipeline = {"name": "stuck", "resources": small, "stages": stages}
    size = subprocess.run(["du", "-sb", "out"], capture_output=True, text=True, check=True).stdout.split()[0]
    # Four starts without a byte more, as the script writes them for the job that comes next.
    following = int(slurm("sbatch", "--parsable", "--output=/dev/null", "--wrap=true")) + 1
    record.path.parent.mkdir(parents=True)
    record.path.write_text(
        "".join(f'{{"event": "start", "time": 1, "job": "{following}", "step": {size}, "lost": 0}}\n' for _ in range(4))
    )
    jobs = submitted(pipeline, tmp_path / "run")
    assert jobs["stuck"] == str(following)
    wait_for(slurm, jobs["stuck"], "FAILED")
    assert "started 5 times without getting past" in (tmp_path / "run/logs/stuck.log").read_text()
    assert len(record.starts) == 5


def test_several_gpus_and_nodes_are_one_group(
    slurm: Callable[..., str], workbench: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two fake GPUs on each of up to two nodes: a task a GPU, ranks as torch wants them."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.sh").write_text(
        '#!/bin/bash\necho "$RANK/$WORLD_SIZE $LOCAL_RANK $CUDA_VISIBLE_DEVICES $SLURM_JOB_NUM_NODES $@" '
        '>> ranks.txt; mkdir -p out/sft; echo \'{"status": "finished"}\' > out/sft/run.json\n'
    )
    (tmp_path / "fake.sh").chmod(0o755)
    recipe = {"model_name_or_path": str(workbench / "model"), "dataset_mixer": {str(workbench / "sft"): 1.0},
              "output_dir": "out/sft", "global_batch_size": 8, "per_device_train_batch_size": 2}  # fmt: skip
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(recipe))
    asked = {"gpus": 2, "nodes": "1-2", "cpus": 4, "memory": "1GB", "time": "30m"}
    pipeline = {"name": "many", "resources": asked, "stages": {"sft": {"recipe": "sft.yaml"}}}
    jobs = submitted(pipeline, tmp_path / "run", python=str(tmp_path / "fake.sh"), gpu_type="a100")
    wait_for(slurm, jobs["sft"], "COMPLETED", "FAILED")
    assert state(slurm, jobs["sft"]) == "COMPLETED", (tmp_path / "run/logs/sft.log").read_text()
    lines = sorted(Path("ranks.txt").read_text().splitlines())
    call = f"2 -m mambalign sft {tmp_path}/run/sft.yaml"
    assert lines == [f"{rank}/4 {rank % 2} 0,1 {call}" for rank in range(4)]
