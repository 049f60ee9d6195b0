"""Files on disk, jobs in a queue: what turns a rendered pipeline into work."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mambalign.cluster import htcondor, slurm
from mambalign.cluster.attempts import read_json
from mambalign.cluster.htcondor import HTCondorProfile
from mambalign.cluster.keys import ClusterError
from mambalign.cluster.pipeline import Pipeline, to_dict
from mambalign.cluster.slurm import SlurmProfile
from mambalign.support import write_text

SCHEDULERS = ("local", "slurm", "htcondor")
PLAN, JOBS = "pipeline.json", "jobs.json"  # in the folder: what there is to do, and what it was handed to
TIMEOUT = 60.0  # clients of a scheduler that is away wait for many seconds, some for ever


@dataclass(frozen=True)
class Answer:
    """What a command said; `problem` is a sentence where it could not be asked, or failed."""

    out: str
    problem: str | None = None


def ask(command: Sequence[str], timeout: float = TIMEOUT, cwd: str | None = None) -> Answer:
    """Run a scheduler's command; never waits longer than `timeout`."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=cwd, errors="replace")
    except FileNotFoundError:
        return Answer("", f"there is no {command[0]} here; is this a machine of the cluster?")
    except subprocess.TimeoutExpired:
        return Answer("", f"{command[0]} did not answer within {timeout:.0f} s; the scheduler may be down")
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or [f"exit code {done.returncode}"]
        said = "; ".join(line.strip() for line in lines[-2:])
        return Answer(done.stdout, said if command[0] in ("bash", said.split(":")[0]) else f"{command[0]}: {said}")
    return Answer(done.stdout + (done.stderr if "--test-only" in command else ""))


def prepare(pipeline: Pipeline, folder: Path, scheduler: str, work: str | None = None) -> None:
    """Make the folder of a pipeline's files, and note in it what there is to do."""
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    (folder / "attempts").mkdir(exist_ok=True)
    plan = {**to_dict(pipeline, str(folder)), "scheduler": scheduler, "work": work or os.getcwd()}
    write_text(folder / PLAN, json.dumps(plan, indent=2) + "\n")


def submit_pipeline(
    pipeline: Pipeline,
    folder: Path,
    to: str,
    site: Mapping[str, Any],
    source: str,
    pipeline_path: Path,
    dry_run: bool = False,
) -> Iterator[str]:
    """Render, write and submit; yields what to tell the user, of a dry run the files.

    Args:
        site: the profile's map, read from `source`.
        pipeline_path: the pipeline's file, for `to="local"`, which runs it in the background.

    Raises:
        ClusterError: the profile is for another scheduler, a request cannot be met, a command failed.
    """
    work, absolute = os.getcwd(), str(folder.absolute())
    _check_free(folder, dry_run)
    if to == "local":
        yield from _submit_locally(pipeline, folder, pipeline_path, dry_run)
        return
    said = site.get("scheduler", to)
    if said != to:
        raise ClusterError(f"{source} is a profile for {said}; submit --to {said}, or give one for {to}")
    if to == "slurm":
        profile = SlurmProfile.read(site, source)
        files = slurm.render(pipeline, profile, work, absolute)
        commands = [["bash", os.path.join(absolute, slurm.SUBMIT)]]
    else:
        pool = HTCondorProfile.read(site, source)
        files = htcondor.render(pipeline, pool, work, absolute)
        commands = [["condor_submit_dag", os.path.join(absolute, htcondor.DAG)]]
    if dry_run:
        for name, content in files.items():
            yield f"# ---------------- {os.path.join(str(folder), name)}"
            yield content
        yield f"# {shlex.join(commands[0])}"
        return
    _require(to)
    prepare(pipeline, folder, to, work)
    _write_all(folder, files, pipeline, to)
    if to == "slurm" and profile.choose_gpus:
        chosen = _choose_gpus(pipeline, absolute)
        if chosen:
            yield "; ".join(f"{name} asks for {count} GPUs, which start first" for name, count in chosen.items())
            _write_all(folder, slurm.render(pipeline, profile, work, absolute, chosen), pipeline, to)
    answer = ask(commands[0], cwd=work)
    if answer.problem:
        raise ClusterError(f"{answer.problem}; nothing is left in the queue")
    jobs = dict(re.findall(r"^(\S+) (\d+)$", answer.out, re.M)) if to == "slurm" else _dag_job(answer.out)
    write_text(
        folder / JOBS, json.dumps({"scheduler": to, "jobs": jobs, "submitted": int(time.time())}, indent=2) + "\n"
    )
    yield from (f"{name}: job {job}" for name, job in jobs.items())
    yield f"mambalign status {shlex.quote(str(folder))}    # how it is doing"


def _dag_job(said: str) -> dict[str, str]:
    found = re.search(r"submitted to cluster (\d+)", said)
    return {"dagman": found[1]} if found else {}


def _check_free(folder: Path, dry_run: bool) -> None:
    jobs = read_json(folder / JOBS)
    if dry_run or not jobs:
        return
    from mambalign.cluster.status import is_over, read_status

    if not is_over(read_status(folder)):
        raise ClusterError(
            f"{folder} has been submitted (jobs {', '.join(jobs['jobs'].values())}) and is not over; cancel them "
            "first, or choose another --out"
        )


def _require(to: str) -> None:
    needed = {"slurm": "sbatch", "htcondor": "condor_submit_dag"}[to]
    if shutil.which(needed) is None:
        raise ClusterError(f"there is no {needed} here: submit on a machine of the cluster, or look with --dry-run")


def _write_all(folder: Path, files: Mapping[str, str], pipeline: Pipeline, to: str) -> None:
    for name, content in files.items():
        write_text(folder / name, content)
        if content.startswith("#!"):
            (folder / name).chmod(0o755)
    if to == "htcondor":  # remaps need the folders that they lead to
        for stage in pipeline.stages:
            (folder / "marks" / stage.name).mkdir(parents=True, exist_ok=True)
            if stage.output_dir:
                Path(stage.output_dir).expanduser().mkdir(parents=True, exist_ok=True)


def _choose_gpus(pipeline: Pipeline, folder: str) -> dict[str, int]:
    """For the stages that start at once: of the numbers of GPUs that they can use, the most that starts earliest."""
    chosen = {}
    for stage in pipeline.stages:
        if stage.needs or len(stage.gpu_counts) < 2:
            continue
        starts = {}
        for count in stage.gpu_counts:
            script = os.path.join(folder, f"{stage.name}.sbatch")
            said = ask(["sbatch", "--test-only", f"--gpus-per-node={count}", script], timeout=20)
            found = re.search(r"to start at (\S+)", said.out)
            if found:
                starts[count] = found[1][:16]  # minutes: seconds are no reason to take fewer
        if starts:
            first = min(starts.values())
            chosen[stage.name] = max(count for count, start in starts.items() if start == first)
    return chosen


def _submit_locally(pipeline: Pipeline, folder: Path, path: Path, dry_run: bool) -> Iterator[str]:
    command = [sys.executable, "-m", "mambalign", "run", str(path), "--out", str(folder)]
    if dry_run:
        for stage in pipeline.stages:
            if stage.recipe is not None:
                yield f"# ---------------- {stage.recipe_file(str(folder))}\n{stage.recipe}"
            yield f"# {stage.name}\n{stage.command(str(folder))}"
        yield f"# {shlex.join(['mambalign', *command[3:]])}"
        return
    prepare(pipeline, folder, "local")
    log = folder / "logs" / "run.log"
    with log.open("ab") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    jobs = {"scheduler": "local", "jobs": {"run": str(process.pid)}, "submitted": int(time.time())}
    write_text(folder / JOBS, json.dumps(jobs, indent=2) + "\n")
    yield f"run: process {process.pid}, log in {log}"
    yield f"mambalign status {shlex.quote(str(folder))}    # how it is doing"
