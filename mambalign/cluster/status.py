"""How a chain is doing: what its folder holds, and what the scheduler says, put together."""

from __future__ import annotations

import os
import platform
import re
import time
from pathlib import Path
from typing import Any

from mambalign.cluster import attempts
from mambalign.cluster.attempts import Attempts, read_json
from mambalign.cluster.events import histories, read_events
from mambalign.cluster.keys import ClusterError
from mambalign.cluster.progress import duration, read_progress
from mambalign.cluster.submit import JOBS, PLAN, ask

OVER = ("finished", "failed", "cancelled")
BAR = 20


def read_status(folder: Path) -> dict[str, Any]:
    """Plain values: `name`, `scheduler`, `stages` in order, `notes`, `next` (what to do).

    A stage has `state` (waiting, pending, running, stopped, held, finished, failed, cancelled), `step`, `share`,
    `loss`, `seconds_left`, `restarts`, `lost_seconds`, `reason`, `job`.

    Raises:
        ClusterError: the folder is neither a pipeline's nor a run's.
    """
    plan, jobs = read_json(folder / PLAN), read_json(folder / JOBS)
    if not plan:
        return _single_run(folder)
    scheduler = jobs.get("scheduler") or plan.get("scheduler", "local")
    notes: list[str] = []
    ids: dict[str, str] = jobs.get("jobs", {})
    told: dict[str, dict[str, Any]] = {}
    if scheduler == "slurm":
        told = _ask_slurm(ids, notes)
    elif scheduler == "htcondor":
        told = _read_logs(folder, list(plan["stages"]), notes)
    stages: dict[str, dict[str, Any]] = {}
    for name, stage in plan["stages"].items():
        stages[name] = _stage(folder, plan, name, stage, told.get(name, {}), stages, scheduler)
        stages[name]["job"] = ids.get(name) or told.get(name, {}).get("job")
    report = {"name": plan["name"], "scheduler": scheduler, "stages": stages, "notes": notes}
    return {**report, "next": _advice(report, folder)}


def _single_run(folder: Path) -> dict[str, Any]:
    state = read_json(folder / "run.json")
    if not state:
        raise ClusterError(f"{folder} holds neither {PLAN} (of `run` or `submit`) nor run.json (of a training run)")
    started = _unix(str(state.get("started", "")))
    stage = {**_progress(str(folder), started), "restarts": 0, "lost_seconds": 0, "reason": "", "job": None}
    stage["state"] = "finished" if attempts.finished(folder) else "running" if _is_locked(folder) else "stopped"
    name = str(state.get("stage", "run"))
    report = {"name": folder.name, "scheduler": "local", "stages": {name: stage}, "notes": []}
    advice = f"go on with `mambalign {name} {folder}/recipe.yaml`" if stage["state"] == "stopped" else ""
    return {**report, "next": advice}


def _unix(written: str) -> float | None:
    import calendar

    try:
        return float(calendar.timegm(time.strptime(written, "%Y-%m-%dT%H:%M:%SZ")))
    except ValueError:
        return None


def _is_locked(folder: Path) -> bool:
    """Whether a process trains in the folder (on this machine; over a network lock too, where there are locks)."""
    import fcntl

    try:
        with (folder / ".lock").open("r+") as file:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.lockf(file, fcntl.LOCK_UN)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        return False
    return False


def _is_alive(start: dict[str, Any]) -> bool:
    """Whether the launcher of an attempt lives, as far as this machine can tell."""
    if start.get("host") != platform.node() or "pid" not in start:
        return False
    try:
        os.kill(int(start["pid"]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _progress(output_dir: str | None, since: float | None) -> dict[str, Any]:
    now = read_progress(output_dir, since)
    if now is None:
        return {"step": None, "share": None, "loss": None, "checkpoint": None, "seconds_left": None}
    return {"step": now.step, "share": now.share, "loss": now.loss, "checkpoint": now.checkpoint,
            "seconds_left": now.seconds_left}  # fmt: skip


def _stage(
    folder: Path,
    plan: dict[str, Any],
    name: str,
    stage: dict[str, Any],
    told: dict[str, Any],
    before: dict[str, dict[str, Any]],
    scheduler: str,
) -> dict[str, Any]:
    record = Attempts.of(folder, name)
    lines, starts = record.lines(), record.starts
    output = stage["output_dir"]
    output = os.path.join(plan.get("work", "."), output) if output else None
    training = stage["kind"] in ("cpt", "sft", "dpo", "reward")
    if scheduler == "htcondor" and not lines and output:
        record = Attempts(Path(output) / "attempts.jsonl")  # came back with the checkpoint
        lines, starts = record.lines(), record.starts
    ended = record.last_code
    done = (training and attempts.finished(output)) or (ended == 0 and told.get("state") in (None, "finished"))
    if done:
        state = "finished"
    elif told.get("state"):
        state = told["state"]
    elif not starts:
        waits = [other for other in stage["needs"] if before.get(other, {}).get("state") != "finished"]
        state = "waiting" if waits else "pending"
    elif lines[-1].get("event") == "end":
        state = "stopped" if ended == 85 else "failed"
    else:
        alive = _is_alive(starts[-1]) or (output is not None and _is_locked(Path(output)))
        state = "running" if alive else "stopped"
    since = starts[-1]["time"] if starts and state == "running" else None
    result = {"state": state, **_progress(output if training else None, since)}
    result["restarts"] = max(told.get("restarts", 0), len(starts) - 1, 0)
    result["lost_seconds"] = max(sum(line.get("lost", 0) for line in starts), told.get("lost", 0))
    reason = told.get("reason", "")
    if state == "waiting":
        reason = "waits for " + ", ".join(o for o in stage["needs"] if before.get(o, {}).get("state") != "finished")
    if state == "failed" and not reason and lines and lines[-1].get("why"):
        reason = lines[-1]["why"]
    if state == "failed" and not reason and ended is not None:
        reason = f"exit code {ended}"
    result["reason"] = "" if state == "finished" else reason
    result["log"] = str(folder / "logs" / f"{name}.log")
    return result


# ------------------------------------------------------------------------------------------------------ the schedulers

_SLURM_STATES = {
    "PENDING": "pending", "CONFIGURING": "pending", "REQUEUED": "pending", "REQUEUE_HOLD": "held",
    "RUNNING": "running", "COMPLETING": "running", "STOPPED": "running", "SUSPENDED": "running",
    "COMPLETED": "finished", "CANCELLED": "cancelled", "FAILED": "failed", "TIMEOUT": "failed", "NODE_FAIL": "failed",
    "OUT_OF_MEMORY": "failed", "PREEMPTED": "failed", "BOOT_FAIL": "failed", "DEADLINE": "failed",
}  # fmt: skip


def _ask_slurm(ids: dict[str, str], notes: list[str]) -> dict[str, dict[str, Any]]:
    told: dict[str, dict[str, Any]] = {}
    for name, job in ids.items():
        answer = ask(["scontrol", "-o", "show", "job", job], timeout=15)
        if answer.problem and "Invalid job id" not in answer.problem:
            notes.append(answer.problem)
            return told
        fields = parse_scontrol(answer.out)
        if fields:
            state = _SLURM_STATES.get(fields.get("JobState", ""), "pending")
            reason = fields.get("Reason", "None")
            told[name] = {"state": state, "restarts": int(fields.get("Restarts", 0) or 0)}
            if state in ("pending", "failed", "cancelled", "held"):
                shown = fields.get("JobState", "") if state != "pending" else ""
                told[name]["reason"] = " ".join(filter(None, (shown, "" if reason == "None" else reason)))
            continue
        answer = ask(["sacct", "-n", "-X", "-P", "-j", job, "-o", "State"], timeout=15)
        words = answer.out.split()
        if answer.problem or not words:
            notes.append(f"Slurm has forgotten job {job} of {name}: what its folder says is shown")
        else:
            told[name] = {"state": _SLURM_STATES.get(words[-1] if words[-1] in _SLURM_STATES else words[0], "failed")}
    return told


def parse_scontrol(text: str) -> dict[str, str]:
    """`scontrol -o show job`: `Key=value Key=value ...`; a value may hold blanks.

    Example:
        >>> parse_scontrol("JobId=7 JobName=a b JobState=PENDING Reason=Resources")["JobName"]
        'a b'
    """
    return {
        key: value.strip() for key, value in re.findall(r"(?:^|\s)([A-Za-z/:]+)=(.*?)(?=\s[A-Za-z/:]+=|\s*$)", text)
    }


_CONDOR_STATES = {
    "idle": "pending", "running": "running", "held": "held", "disconnected": "running", "suspended": "running",
    "finished": "finished", "failed": "failed", "removed": "cancelled",
}  # fmt: skip


def _read_logs(folder: Path, names: list[str], notes: list[str]) -> dict[str, dict[str, Any]]:
    told: dict[str, dict[str, Any]] = {}
    for name in names:
        path = next(iter(sorted((folder / "logs").glob(f"{name}.events*"))), None)
        if path is None:
            continue
        events, unknown = read_events(path.read_text(errors="replace"))
        if unknown:
            notes.append(f"{path}: {unknown} entries were not understood and are left out")
        jobs = histories(events)
        if not jobs:
            continue
        newest = list(jobs.values())[-1]  # a DAG that was submitted again writes on in the same file
        told[name] = {
            "state": _CONDOR_STATES[newest.state],
            "job": newest.job,
            "restarts": max(0, sum(job.starts for job in jobs.values()) - 1),
            "lost": sum(job.lost for job in jobs.values()),
            "reason": newest.reason,
        }
    return told


# ------------------------------------------------------------------------------------------------------------- telling


def is_over(report: dict[str, Any]) -> bool:
    """Nothing will change any more: all finished, or what failed keeps the rest from starting."""
    states = {stage["state"] for stage in report["stages"].values()}
    if states <= set(OVER):
        return True
    if report["scheduler"] == "local":
        return bool(states & {"failed", "stopped"}) and "running" not in states
    return not states & {"pending", "running", "held", "stopped"}


def _advice(report: dict[str, Any], folder: Path) -> str:
    stages = report["stages"]
    for name, stage in stages.items():
        if stage["state"] == "failed":
            again = "run" if report["scheduler"] == "local" else "submit"
            return f"{name} failed ({stage['reason']}): see {stage['log']}; mend it and `{again}` the pipeline again"
        if stage["state"] == "held":
            return f"{name} is held ({stage['reason']}): mend the cause, then release it"
        if stage["state"] == "stopped":
            return f"{name} was stopped: the same `mambalign run` goes on from step {stage['checkpoint'] or 0}"
        if stage["state"] == "cancelled":
            return f"{name} was cancelled ({stage['reason']}): submit the pipeline again, finished work is kept"
        if stage["state"] == "pending" and report["scheduler"] != "local":
            return f"{name} waits for machines: `mambalign why {folder}` says why"
    if all(stage["state"] == "finished" for stage in stages.values()):
        return "all is done"
    return ""


def render(report: dict[str, Any]) -> str:
    """The report for people, a line a stage."""
    lines = [f"{report['name']} ({report['scheduler']})"]
    width = max(len(name) for name in report["stages"])
    for name, stage in report["stages"].items():
        share = 1.0 if stage["state"] == "finished" else stage["share"]
        full = round((share or 0) * BAR)
        parts = [f"  {name:<{width}}  {stage['state']:<9} [{'#' * full}{'.' * (BAR - full)}]"]
        parts.append(f"{share:4.0%}" if share is not None else "    ")
        if stage["step"]:
            parts.append(f"step {stage['step']}")
        if stage["loss"] is not None:
            parts.append(f"loss {stage['loss']:.4g}")
        if stage["seconds_left"]:
            parts.append(f"{duration(stage['seconds_left'])} left")
        if stage["restarts"]:
            parts.append(f"{stage['restarts']} restarts, {duration(stage['lost_seconds'])} lost")
        if stage["job"]:
            parts.append(f"job {stage['job']}")
        if stage["reason"]:
            parts.append(f"({stage['reason']})")
        lines.append("  ".join(parts).rstrip())
    lines += [f"note: {note}" for note in report["notes"]]
    if report["next"]:
        lines.append(f"next: {report['next']}")
    return "\n".join(lines)
