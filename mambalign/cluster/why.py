"""Why a job does not start, and what would help: a scheduler's words turned into a sentence."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from mambalign.cluster.attempts import read_json
from mambalign.cluster.keys import ClusterError
from mambalign.cluster.status import is_over, parse_scontrol, read_status
from mambalign.cluster.submit import JOBS, PLAN, ask

# Reasons of Slurm (squeue's manual page), with what the user can do about them.
SLURM = {
    "Resources": ("it is next in line and waits for enough free resources", "fewer"),
    "Priority": ("jobs of higher priority are before it", "shorter"),
    "Dependency": ("it waits for the stages before it", ""),
    "DependencyNeverSatisfied": ("a stage before it failed, so it can never start", "cancel it and submit again"),
    "BeginTime": ("it was requeued a moment ago and waits out Slurm's pause (two minutes at most sites)", ""),
    "JobHeldUser": ("you hold it", "scontrol release {job}"),
    "JobHeldAdmin": ("an administrator holds it", "ask them"),
    "launch failed requeued held": (
        "it could not be launched, and was held",
        "see its log, then scontrol release {job}",
    ),
    "ReqNodeNotAvail": ("the machines that it wants are down, drained or reserved", "weaker"),
    "Reservation": ("its reservation has not begun", ""),
    "PartitionDown": ("its partition is closed", "another partition"),
    "PartitionInactive": ("its partition is inactive", "another partition"),
    "PartitionTimeLimit": ("its time limit is longer than the partition allows", "shorter"),
    "PartitionNodeLimit": ("it asks for more machines than the partition has", "fewer"),
    "QOSMaxGRESPerUser": ("you use as many GPUs as your QOS allows", "fewer"),
    "AssocGrpGRES": ("your account uses as many GPUs as it may", "fewer"),
    "BadConstraints": ("no machine has the features that it asks for", "weaker"),
    "Nodes required for job are DOWN, DRAINED or reserved": (
        "the machines that it needs are down or drained",
        "weaker",
    ),
}
HELP = {
    "fewer": "ask for fewer GPUs (`gpus: 1-4` takes what comes first), or for fewer nodes",
    "shorter": "ask for less time (`time: 1h` with `slice: 30m` fits into holes that others leave)",
    "weaker": "ask for less: another constraint, partition or smaller gpu_memory",
}


def explain(job: str) -> list[str]:
    """Sentences about a job's id, or about the first stage of a pipeline's folder that waits.

    Raises:
        ClusterError: no such folder or job, or no scheduler here.
    """
    folder = Path(job)
    if (folder / PLAN).is_file():
        return _explain_folder(folder)
    if not re.fullmatch(r"\d+(\.\d+|_\d+)?", job):
        raise ClusterError(f"{job!r} is neither a job id nor a folder of `mambalign submit`")
    answer = ask(["scontrol", "-o", "show", "job", job], timeout=15)
    if answer.problem and "there is no scontrol" not in answer.problem:
        raise ClusterError(f"job {job}: {answer.problem}")
    return _slurm(job, answer.out) if not answer.problem else _condor(job)


def _explain_folder(folder: Path) -> list[str]:
    report = read_status(folder)
    stages = report["stages"]
    if all(stage["state"] == "finished" for stage in stages.values()):
        return [f"{report['name']}: all is done"]
    for name, stage in stages.items():
        if stage["state"] in ("finished", "waiting"):
            continue
        if stage["state"] == "running":
            return [f"{name} is running; the stages behind it wait for it"]
        if stage["state"] == "pending" and stage["job"] and report["scheduler"] == "slurm":
            return [f"{name}: {line}" for line in explain(stage["job"])]
        if stage["state"] in ("pending", "held") and stage["job"] and report["scheduler"] == "htcondor":
            return [f"{name}: {line}" for line in (_held(stage) or _condor(stage["job"]))]
        return [f"{name} is {stage['state']}" + (f" ({stage['reason']})" if stage["reason"] else ""), report["next"]]
    problem = "; ".join(report["notes"]) if not is_over(report) else ""
    jobs = read_json(folder / JOBS)
    if not jobs:
        return [f"{report['name']} has not been submitted"]
    return [f"nothing is waiting. {problem}".strip()]


def _held(stage: dict[str, object]) -> list[str]:
    if stage["state"] != "held":
        return []
    return [f"it is held: {stage['reason']}", f"mend the cause, then condor_release {stage['job']}"]


# --------------------------------------------------------------------------------------------------------------- Slurm


def _slurm(job: str, shown: str) -> list[str]:
    fields = parse_scontrol(shown)
    if not fields:
        raise ClusterError(f"job {job}: Slurm does not know it")
    if fields.get("JobState") != "PENDING":
        return [f"job {job} is {fields.get('JobState', '?').lower()}, not waiting"]
    start = ask(["squeue", "-h", "--start", "-j", job, "-o", "%S"], timeout=15)
    return slurm_sentences(job, fields, start.out.strip())


def slurm_sentences(job: str, fields: dict[str, str], start: str) -> list[str]:
    """From `scontrol show job` and `squeue --start`."""
    reason = fields.get("Reason", "None")
    known = next((SLURM[name] for name in (reason, reason.split(",")[0], reason.split("_")[0]) if name in SLURM), None)
    if known is None:
        limit = re.match(r"(QOS|Assoc|Max)\w*", reason)
        known = (f"a limit of your account or QOS is reached ({reason})", "fewer") if limit else None
    if reason == "None":
        known = ("Slurm has not looked at it yet", "")
    said, hint = known or (f"Slurm says {reason}", "")
    lines = [f"job {job} waits because {said}"]
    if start and start not in ("N/A", "(null)"):
        lines.append(f"Slurm expects it to start at {start}")
    advice = HELP.get(hint, hint).format(job=job)
    if advice:
        asked = fields.get("TresPerNode", "").replace("gres:", "").replace("gpu:", "GPUs a node: ")
        now = ", ".join(filter(None, (asked, f"{fields.get('NumNodes', '1')} node(s)", fields.get("TimeLimit", ""))))
        lines.append(f"to start sooner: {advice} (now {now})")
    return lines


# ------------------------------------------------------------------------------------------------------------ HTCondor


@dataclass(frozen=True)
class Condition:
    """A line of `condor_q -better-analyze`: how many slots meet a part of the requirements."""

    matched: int
    text: str


def parse_analysis(text: str) -> tuple[list[Condition], dict[str, int]]:
    """(conditions, counts of machines) of `condor_q -better-analyze`."""
    conditions = [
        Condition(int(match[1]), match[2].strip())
        for match in re.finditer(r"^\[\d+\]\s+(\d+)\s+(.+)$", text, flags=re.MULTILINE)
    ]
    counts = {
        match[2].strip(): int(match[1])
        for match in re.finditer(r"^\s*(\d+) (are rejected by .*|reject .*|match .*|are able to .*)$", text, flags=re.M)
    }
    return conditions, counts


def _condor(job: str) -> list[str]:
    answer = ask(["condor_q", "-better-analyze", job], timeout=30)
    if answer.problem:
        raise ClusterError(f"job {job}: {answer.problem}")
    return condor_sentences(job, answer.out)


def condor_sentences(job: str, analysis: str) -> list[str]:
    conditions, counts = parse_analysis(analysis)
    lines = []
    impossible = [c for c in conditions if c.matched == 0 and not re.fullmatch(r"\[\d+\] (&&|\|\|) \[\d+\]", c.text)]
    able = next((n for what, n in counts.items() if what.startswith("are able to")), None)
    busy = next((n for what, n in counts.items() if what.startswith("match and are already running")), 0)
    refused = next((n for what, n in counts.items() if what.startswith("reject ")), 0)
    if impossible:
        lines.append(f"job {job} can never start: no machine meets {impossible[0].text}")
        lines.append(f"to start: {_condor_advice(impossible[0].text)}")
    elif able:
        lines.append(f"job {job} fits {able} machines that could take it; it waits for the next round, or for its turn")
    elif conditions:
        tightest = min(conditions, key=lambda condition: condition.matched)
        others = (
            f"; {busy} machines that fit are busy" if busy else f"; {refused} machines refuse it" if refused else ""
        )
        lines.append(f"job {job} waits{others}; the tightest condition is {tightest.text} ({tightest.matched} slots)")
        lines.append(f"to start sooner: {_condor_advice(tightest.text)}")
    else:
        said = next((line.strip() for line in analysis.splitlines() if "reason" in line.lower()), "it says no more")
        lines.append(f"job {job}: {said}")
    return lines


def _condor_advice(condition: str) -> str:
    lowered = condition.lower()
    if "requestgpus" in lowered or "target.gpus" in lowered:
        return HELP["fewer"] + "; of a job in the queue: condor_qedit JOB RequestGPUs 1"
    if "countmatches" in lowered or "capability" in lowered or "memorymb" in lowered:
        return "lower gpu_memory or gpu_capability"
    for name, key in (("requestmemory", "memory"), ("requestdisk", "disk"), ("requestcpus", "cpus")):
        if name in lowered or f"target.{key}" in lowered:
            return f"ask for less {key}"
    if "image" in lowered or "container" in lowered or "docker" in lowered or "hassif" in lowered:
        return "few machines run containers of this kind; try the profile without container_image"
    return f"drop that condition ({condition}) from the profile's requirements"
