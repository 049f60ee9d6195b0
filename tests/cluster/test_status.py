"""What became of it: event logs, reports, and why a job waits."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mambalign.cluster import progress, status, submit, why
from mambalign.cluster.attempts import Attempts
from mambalign.cluster.events import histories, read_events
from mambalign.cluster.keys import ClusterError
from mambalign.cluster.pipeline import read_pipeline
from mambalign.cluster.submit import Answer, prepare
from tests.cluster.conftest import chain, fake_recipe

NOW = 1_800_000_000  # Unix time
# (state, starts, evictions, holds) of every recorded job, counted by hand in the logs.
RECORDED = {
    "htcondor_full": ("finished", 2, 1, 0),
    "htcondor_K1": ("finished", 2, 1, 0),
    "htcondor_P1": ("removed", 2, 0, 2),
    "htcondor_P3": ("removed", 0, 0, 0),
}


@pytest.mark.shared("cluster_logs")
def test_recorded_logs_of_a_pool_are_understood(shared_data: Path) -> None:
    seen = 0
    for path in sorted((shared_data / "cluster_logs").glob("*.log")):
        text = path.read_text()
        events, unknown = read_events(text)
        assert unknown == 0, path.name
        assert len(events) == text.count("\n...\n"), path.name
        jobs = histories(events)
        seen += len(jobs)
        if path.stem in RECORDED:
            (job,) = jobs.values()
            assert (job.state, job.starts, job.evictions, job.holds) == RECORDED[path.stem], path.name
        if path.stem == "htcondor_full":
            assert job.gpus == 4 and job.lost == 0  # the vacated job's files came home in the same second
        if path.stem == "htcondor_K1":
            assert job.lost == 4 and job.exit_code == 0  # worked from 22:23:22 until its machine fell silent at :26
    assert seen > 10


HEAD = "000 (7.000.000) 2026-01-02 03:04:05 Job submitted from host: <1.2.3.4:9618>\n...\n"
START = (
    "001 (7.000.000) 2026-01-02 03:05:00 Job executing on host: <1.2.3.4:9618?x>\n"
    "\tSlotName: slot1@a\n\tGPUs = 2\n...\n"
)


def test_a_log_that_is_torn_or_strange_is_read_as_far_as_it_goes() -> None:
    strange = "something else\n\tindented\n...\n"
    dateless = "001 (7.000.000) 13/45 99:00:00 Job executing\n...\n"
    events, unknown = read_events(HEAD + strange + dateless + START + "005 (7.000.000) 2026-01-02 03:06:00 Job termin")
    assert unknown == 2 and [event.code for event in events] == [0, 1]
    job = histories(events)["7.0"]
    assert (job.state, job.machine, job.gpus) == ("running", "slot1@a", 2)
    assert read_events("") == ([], 0)
    old, unknown = read_events("001 (7.000.000) 01/02 03:05:00 Job executing on host: <1.2.3.4:9618>\n...\n", year=2026)
    assert unknown == 0 and old[0].time == events[1].time
    fractions, unknown = read_events(START.replace("03:05:00", "03:05:00.123+01:00"))
    assert unknown == 0 and fractions[0].time == events[1].time


def test_lost_time_is_what_no_transfer_saved() -> None:
    saved = "040 (7.000.000) 2026-01-02 03:06:00 Finished transferring output files\n...\n"
    evicted = "004 (7.000.000) 2026-01-02 03:06:30 Job was evicted. Code 1022 Subcode 0\n\tReason: power cut\n...\n"
    held = "012 (7.000.000) 2026-01-02 03:07:00 Job was held.\n\tno such file\n\tCode 13 Subcode 2\n...\n"
    job = histories(read_events(HEAD + START + saved + evicted)[0])["7.0"]
    assert (job.lost, job.state, job.reason, job.evictions) == (30, "idle", "power cut", 1)
    job = histories(read_events(HEAD + START + evicted + held)[0])["7.0"]
    assert (job.lost, job.state, job.holds) == (90, "held", 1) and "no such file" in job.reason


# ------------------------------------------------------------------------------------------------------------- reports


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A prepared pipeline whose SFT is done and whose DPO is at step 30 of 60, twice interrupted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(progress, "time", SimpleNamespace(time=lambda: NOW))
    run = tmp_path / "runs"
    prepare(read_pipeline(chain(), "chain.yaml", fake_recipe), run, "local")
    for name, state in (("sft", "finished"), ("dpo", "running")):
        out = tmp_path / "out" / name
        (out / "checkpoint-20").mkdir(parents=True)
        (out / "checkpoint-20" / "manifest.json").write_text("{}")
        (out / "run.json").write_text(json.dumps({"status": state}))
        (out / "recipe.yaml").write_text("max_steps: 60\n")
        lines = [{"step": step, "epoch": step / 30, "loss": 3 - step / 30, "learning_rate": 1} for step in (10, 20, 30)]
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4')
        os.utime(out / "checkpoint-20" / "manifest.json", (NOW - 130, NOW - 130))
    record = Attempts.of(run, "dpo")
    for step, lost in ((0, 0), (10, 12), (20, 31)):
        record._write({"event": "start", "time": NOW - 100, "step": step, "lost": lost})
    return run


def test_a_report_tells_progress_restarts_and_what_to_do(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_is_locked", lambda path: True)
    report = status.read_status(folder)
    sft, dpo, judge = report["stages"].values()
    assert (sft["state"], dpo["state"], judge["state"]) == ("finished", "running", "waiting")
    assert (dpo["step"], dpo["share"], dpo["loss"], dpo["checkpoint"]) == (30, 0.5, 2.0, 20)
    assert (dpo["restarts"], dpo["lost_seconds"], judge["reason"]) == (2, 43, "waits for dpo")
    assert dpo["seconds_left"] == pytest.approx(300)  # 10 steps in 100 s, 30 to go
    text = status.render(report)
    assert "[##########..........]   50%  step 30  loss 2  5 min left  2 restarts, 43 s lost" in text
    assert not status.is_over(report)
    monkeypatch.setattr(status, "_is_locked", lambda path: False)
    stopped = status.read_status(folder)
    assert stopped["stages"]["dpo"]["state"] == "stopped" and status.is_over(stopped)
    assert "goes on from step 20" in stopped["next"]


def test_a_launcher_that_was_killed_is_noticed(folder: Path) -> None:
    child = subprocess.Popen(["sleep", "100"])
    record = Attempts.of(folder, "dpo")
    line = record.starts[-1] | {"pid": child.pid, "host": platform.node()}
    record._write(line)
    assert status.read_status(folder)["stages"]["dpo"]["state"] == "running"
    child.kill()
    child.wait()
    assert status.read_status(folder)["stages"]["dpo"]["state"] == "stopped"
    record._write(line | {"host": "elsewhere", "pid": 1})
    assert status.read_status(folder)["stages"]["dpo"]["state"] == "stopped"


def test_one_training_run_is_a_report_too(folder: Path) -> None:
    report = status.read_status(folder.parent / "out" / "dpo")
    (stage,) = report["stages"].values()
    assert (stage["state"], stage["step"]) == ("stopped", 30)
    with pytest.raises(ClusterError, match=r"holds neither pipeline.json .* nor run.json"):
        status.read_status(folder.parent)


def slurm_jobs(folder: Path, monkeypatch: pytest.MonkeyPatch, told: dict[str, Answer]) -> dict[str, Any]:
    (folder / submit.JOBS).write_text(json.dumps({"scheduler": "slurm", "jobs": {"sft": "1", "dpo": "2", "eval": "3"}}))

    def ask(command: list[str], timeout: float = 0) -> Answer:
        return told.get(command[-1], Answer("", "scontrol: slurm_load_jobs error: Invalid job id specified"))

    monkeypatch.setattr(status, "ask", ask)
    return status.read_status(folder)


def test_slurms_words_become_states(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = "JobId={} JobName=x y UserId=me(1) Priority=1 Restarts={} JobState={} Reason={} Dependency=(null)"
    told = {
        "2": Answer(shown.format(2, 4, "PENDING", "Resources")),
        "3": Answer(shown.format(3, 0, "PENDING", "Dependency")),
    }
    report = slurm_jobs(folder, monkeypatch, told)
    dpo = report["stages"]["dpo"]
    assert (dpo["state"], dpo["restarts"], dpo["reason"], dpo["job"]) == ("pending", 4, "Resources", "2")
    assert f"`mambalign why {folder}`" in report["next"]
    assert report["notes"] == ["Slurm has forgotten job 1 of sft: what its folder says is shown"]
    told["2"] = Answer(shown.format(2, 0, "FAILED", "NonZeroExitCode"))
    report = slurm_jobs(folder, monkeypatch, told)
    assert report["stages"]["dpo"]["reason"] == "FAILED NonZeroExitCode" and "mend it" in report["next"]


def test_no_scheduler_is_a_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    (folder / submit.JOBS).write_text(json.dumps({"scheduler": "slurm", "jobs": {"sft": "1"}}))
    assert "there is no scontrol here" in status.read_status(folder)["notes"][0]
    with pytest.raises(ClusterError, match="there is no condor_q here"):
        why.explain("12")
    with pytest.raises(ClusterError, match="neither a job id nor a folder"):
        why.explain("nowhere")


def test_a_command_that_hangs_is_not_waited_for() -> None:
    answer = submit.ask(["sleep", "60"], timeout=0.2)
    assert answer.problem == "sleep did not answer within 0 s; the scheduler may be down"


@pytest.mark.parametrize(
    ("reason", "said", "advice"),
    [
        ("Resources", "waits for enough free resources", "fewer GPUs"),
        ("Priority", "higher priority", "less time"),
        ("BeginTime", "requeued a moment ago", ""),
        ("QOSMaxCpuPerUserLimit", "a limit of your account or QOS", "fewer GPUs"),
        ("ReqNodeNotAvail,_UnavailableNodes:n1", "down, drained or reserved", "another constraint"),
        ("DependencyNeverSatisfied", "can never start", "submit again"),
        ("NeverHeardOf", "Slurm says NeverHeardOf", ""),
    ],
)
def test_why_a_slurm_job_waits(reason: str, said: str, advice: str) -> None:
    fields = {
        "JobState": "PENDING",
        "Reason": reason,
        "TresPerNode": "gres:gpu:4",
        "NumNodes": "1",
        "TimeLimit": "4:00:00",
    }
    lines = why.slurm_sentences("7", fields, "2026-01-02T03:04:05")
    assert said in lines[0] and "2026-01-02T03:04:05" in lines[1]
    assert advice in lines[-1] if advice else len(lines) == 2


ANALYSIS = """
The Requirements expression for job 12.000 is

    (TARGET.Arch == "X86_64") && (TARGET.GPUs >= RequestGPUs) && (TARGET.Memory >= RequestMemory)

The Requirements expression for job 12.000 reduces to these conditions:

         Slots
Step    Matched  Condition
-----  --------  ---------
[0]          24  TARGET.Arch == "X86_64"
[5]          {gpus}  TARGET.GPUs >= RequestGPUs
[7]          20  TARGET.Memory >= RequestMemory

012.000:  Run analysis summary ignoring user priority.  Of 24 machines,
     20 are rejected by your job's requirements
      0 reject your job because of their own requirements
      {busy} match and are already running your jobs
      0 match but are serving other users
      {able} are able to run your job
"""


def test_why_an_htcondor_job_waits() -> None:
    never = why.condor_sentences("12", ANALYSIS.format(gpus=0, busy=0, able=0))
    assert "can never start: no machine meets TARGET.GPUs >= RequestGPUs" in never[0]
    assert "fewer GPUs" in never[1] and "condor_qedit" in never[1]
    busy = why.condor_sentences("12", ANALYSIS.format(gpus=4, busy=4, able=0))
    assert "tightest condition is TARGET.GPUs >= RequestGPUs (4 slots)" in busy[0]
    assert "4 machines that could take it" in why.condor_sentences("12", ANALYSIS.format(gpus=4, busy=0, able=4))[0]
    assert why.condor_sentences("12", "") == ["job 12: it says no more"]
