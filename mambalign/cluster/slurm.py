"""A pipeline as Slurm batch scripts, one a stage, chained by afterok; each survives preemption and time limits.

The script keeps the batch shell alive (a shell that dies of SIGTERM takes the training with it at once), relays the
signal that Slurm sends before the time limit through srun to every task, and requeues the job when the training has
saved and exited with 85. It never exits 0 before the stage is finished: that would start the stages behind it.
"""

# ruff: noqa: RUF009 - `key` only calls dataclasses.field
from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mambalign.cluster.attempts import MANIFEST, PATIENCE
from mambalign.cluster.keys import (
    EXIT_SAVED,
    ClusterError,
    block,
    build,
    clock,
    environment,
    flag,
    key,
    one_of,
    plain_map,
    seconds,
    size,
    text,
    texts,
    whole,
)
from mambalign.cluster.pipeline import Pipeline, Stage

SUBMIT = "submit.sh"
PATIENCE_WITHOUT_FOLDER = 4 * PATIENCE  # a command whose progress cannot be seen


@dataclass(frozen=True)
class Container:
    """An image that the steps run in; the batch script stays outside, where scontrol is."""

    runtime: str = key("apptainer", one_of("apptainer", "singularity", "pyxis"), "What starts it.")
    image: str = key("", text, "Image file, or what pyxis takes: USER@REGISTRY#IMAGE:TAG.")
    binds: tuple[str, ...] = key((), texts, "Folders to show inside, as src or src:dst[:ro].")
    options: tuple[str, ...] = key((), texts, "Further words for the runtime.")


@dataclass(frozen=True)
class SlurmProfile:
    """A Slurm site: what its `sbatch` wants beside what a stage asks for."""

    scheduler: str = key("slurm", one_of("slurm"), "slurm")
    account: str | None = key(None, text, "Account to charge.")
    partition: str | None = key(None, text, "Partition, or several with commas.")
    qos: str | None = key(None, text, "Quality of service, such as a preemptible one.")
    constraint: str | None = key(None, text, "Features that nodes must have: `a100|h100`.")
    reservation: str | None = key(None, text, "Reservation to use.")
    exclude: str | None = key(None, text, "Nodes to avoid.")
    gpu_type: str | None = key(None, text, "GPU type, as in --gpus-per-node=TYPE:4.")
    save_lead: int = key(120, seconds, "Seconds before the time limit at which the training is told to save.")
    max_gpus_per_node: int | None = key(None, whole, "GPUs of the largest node.")
    max_nodes: int | None = key(None, whole, "Most nodes a job may have.")
    max_time: int | None = key(None, seconds, "The site's longest time limit.")
    setup: str = key("", block, "Shell lines before the step: module load ..., source env/bin/activate.")
    python: str = key("python", text, "Python that has mambalign, where the steps run.")
    container: dict[str, Any] = key({}, plain_map, "Container of the steps.")
    env: dict[str, str] = key({}, environment, "Environment variables at this site.")
    srun_options: tuple[str, ...] = key((), texts, "Further words for srun: --cpu-bind=none.")
    extra: tuple[str, ...] = key((), texts, "Further #SBATCH options: --mail-type=FAIL.")
    choose_gpus: bool = key(True, flag, "Ask `sbatch --test-only` which number of a range of GPUs starts first.")

    @classmethod
    def read(cls, values: Mapping[str, Any], source: str) -> SlurmProfile:
        profile = build(cls, values, source)
        if profile.container:
            container = build(Container, profile.container, f"{source}: container")
            if not container.image:
                raise ClusterError(f"{source}: container: image is missing")
        return profile


def render(
    pipeline: Pipeline, profile: SlurmProfile, work: str, folder: str, gpus: Mapping[str, int] | None = None
) -> dict[str, str]:
    """File name (in `folder`) -> text: a batch script a stage, the frozen recipes, and the script that submits them.

    Args:
        work: absolute working directory of the jobs, to which the pipeline's paths are relative.
        folder: absolute folder of the files, on the file system that all nodes share.
        gpus: number of GPUs of a stage that leaves it open; the most that it can use, where it is not given.

    Raises:
        ClusterError: a request that the profile says cannot be met.
    """
    files: dict[str, str] = {}
    for stage in pipeline.stages:
        count = (gpus or {}).get(stage.name, stage.gpu_counts[-1])
        _check(stage, profile, count)
        if stage.recipe is not None:
            files[f"{stage.name}.yaml"] = stage.recipe
        files[f"{stage.name}.sbatch"] = _script(pipeline, stage, profile, work, folder, count)
    files[SUBMIT] = _submit(pipeline, folder)
    return files


def _check(stage: Stage, profile: SlurmProfile, gpus: int) -> None:
    asked = stage.resources
    limits = (
        ("gpus", gpus, profile.max_gpus_per_node, "max_gpus_per_node"),
        ("nodes", stage.node_counts[-1], profile.max_nodes, "max_nodes"),
        ("time", asked.time, profile.max_time, "max_time"),
    )
    for name, value, limit, said in limits:
        if limit is not None and value > limit:
            raise ClusterError(f"stage {stage.name}: {name} is {value}, but the profile's {said} is {limit}")
    if asked.time <= profile.save_lead + 60:
        raise ClusterError(
            f"stage {stage.name}: time is {asked.time} s; it must be well above the profile's save_lead of "
            f"{profile.save_lead} s, or nothing is left to train in"
        )


def _options(pipeline: Pipeline, stage: Stage, profile: SlurmProfile, work: str, folder: str, gpus: int) -> list[str]:
    asked, nodes = stage.resources, stage.node_counts
    kind = f"{profile.gpu_type}:" if profile.gpu_type else ""
    shortest = max(asked.slice, profile.save_lead + 60) if asked.slice else None
    options = {
        "job-name": f"{pipeline.name}-{stage.name}",
        "comment": f"mambalign:{pipeline.name}:{stage.name}",
        "chdir": work,
        "output": os.path.join(folder, "logs", f"{stage.name}.log"),
        "open-mode": "append",
        "account": profile.account,
        "partition": profile.partition,
        "qos": profile.qos,
        "reservation": profile.reservation,
        "constraint": profile.constraint,
        "exclude": profile.exclude,
        "time": clock(asked.time),
        "time-min": clock(shortest) if shortest and shortest < asked.time else None,
        "signal": f"B:USR1@{profile.save_lead}",
        # Alone: with --ntasks-per-node beside it, a range of nodes always becomes the smallest.
        "nodes": str(nodes[0]) if len(nodes) == 1 else f"{nodes[0]}-{nodes[-1]}",
        "gpus-per-node": f"{kind}{gpus}" if gpus else None,
        "cpus-per-task": str(asked.cpus),
        "mem": size(asked.memory),
    }
    lines = [f"#SBATCH --{name}={_word(value, name)}" for name, value in options.items() if value is not None]
    return [*lines, "#SBATCH --requeue", *(f"#SBATCH {option}" for option in profile.extra)]


def _word(value: str, name: str) -> str:
    if any(character.isspace() or character in "\"'\\" for character in value):
        raise ClusterError(f"--{name}: {value!r} has blanks or quotes, which #SBATCH lines cannot carry; rename it")
    return value


def _script(pipeline: Pipeline, stage: Stage, profile: SlurmProfile, work: str, folder: str, gpus: int) -> str:
    record = os.path.join(folder, "attempts", f"{stage.name}.jsonl")
    patience = PATIENCE if stage.output_dir else PATIENCE_WITHOUT_FOLDER
    env = {**profile.env, **stage.env}
    lines = [
        "#!/bin/bash",
        *_options(pipeline, stage, profile, work, folder, gpus),
        "",
        "set -u",
        f"out={shlex.quote(stage.output_dir or '')}",
        f"record={shlex.quote(record)}",
        f"mkdir -p {shlex.quote(os.path.dirname(record))}",
        *(f"export {name}={shlex.quote(value)}" for name, value in env.items()),
        *(["", profile.setup] if profile.setup else []),
        "",
        *_PROGRESS[stage.trains],
        *_GUARD.format(patience=patience).splitlines(),
        "",
        *_step(stage, profile, folder, gpus),
        "",
        *_ENDING[stage.trains].replace("SAVED", str(EXIT_SAVED)).splitlines(),
    ]
    return "\n".join(lines) + "\n"


_PROGRESS = {
    True: f"""\
# The newest complete checkpoint, and the seconds of work behind it that the last attempt lost.
step=0; lost=0
for path in "$out"/checkpoint-*/{MANIFEST}; do
  [ -e "$path" ] || continue
  n=${{path%/{MANIFEST}}}; n=${{n##*checkpoint-}}
  [ "$n" -gt "$step" ] && step=$n
done
if [ "$step" -gt 0 ] && [ -e "$out/metrics.jsonl" ]; then
  lost=$(($(stat -c %Y "$out/metrics.jsonl") - $(stat -c %Y "$out/checkpoint-$step/{MANIFEST}")))
  [ "$lost" -gt 0 ] || lost=0
fi""".splitlines(),
    False: """\
# What it has written so far tells whether it gets on.
step=0; lost=0
[ -n "$out" ] && [ -d "$out" ] && step=$(du -sb "$out" | cut -f1)""".splitlines(),
}

_GUARD = """\
job="\\"job\\": \\"$SLURM_JOB_ID\\""
note() {{ printf '{{"event": "%s", "time": %s, %s, %s}}\\n' "$1" "$(date +%s)" "$job" "$2" >>"$record"; }}
# Requeueing for ever without getting on helps nobody.
same=$(grep '"start"' "$record" 2>/dev/null | grep "$job" | tail -n {patience} | grep -c "\\"step\\": $step,")
if [ "$same" -ge {patience} ]; then
  echo "mambalign: started {patience} times without getting past step $step; giving up" >&2
  note end '"code": 1, "why": "no progress"'
  exit 1
fi
note start "\\"step\\": $step, \\"lost\\": $lost, \\"restart\\": ${{SLURM_RESTART_COUNT:-0}}\""""


def _step(stage: Stage, profile: SlurmProfile, folder: str, gpus: int) -> list[str]:
    tasks = max(gpus, 1) if stage.trains else 1
    lines = []
    if stage.trains:
        lines = [
            f"nodes={stage.node_counts[0]}",
            f"for n in {' '.join(map(str, stage.node_counts))}; do "
            '[ "$n" -le "$SLURM_JOB_NUM_NODES" ] && nodes=$n; done  # those on which the batch divides',
            'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 12000))  # below 32768 the kernel takes none",
        ]
        inner = "exec " + stage.command(folder, f"{profile.python} -m mambalign")
        if tasks > 1 or stage.node_counts[-1] > 1:
            inner = (
                "export RANK=$SLURM_PROCID WORLD_SIZE=$SLURM_NTASKS LOCAL_RANK=$SLURM_LOCALID "
                f"LOCAL_WORLD_SIZE={tasks}; {inner}"
            )
        shell = ["bash", "-c", inner]
    else:
        lines = ["nodes=1"]
        shell = ["bash", "-ceu", stage.command(folder)]
    srun = [
        "srun --nodes=$nodes",
        f"--ntasks=$((nodes * {tasks})) --ntasks-per-node={tasks}",
        f"--cpus-per-task={max(stage.resources.cpus // tasks, 1)}",
        "--kill-on-bad-exit=1",
        *profile.srun_options,
        *_container(profile, folder),
        " ".join(shlex.quote(word) for word in shell),
    ]
    return [
        *lines,
        "",
        """limit=$(date -d "$(squeue -h -j "$SLURM_JOB_ID" -o %e)" +%s 2>/dev/null || echo 9999999999)""",
        "ended=",
        "trap 'kill -USR1 $pid 2>/dev/null' USR1   # srun passes USR1 on to every task",
        "trap ended=1 TERM                         # steps get their own SIGTERM; this shell must outlive them",
        " ".join(srun) + " &",
        "pid=$!",
        "while kill -0 $pid 2>/dev/null; do wait $pid; done",
        "wait $pid; rc=$?   # the true one, also where a trap had cut the wait short",
    ]


def _container(profile: SlurmProfile, folder: str) -> list[str]:
    if not profile.container:
        return []
    box = build(Container, profile.container, "container")
    if box.runtime == "pyxis":
        mounts = ",".join(["$PWD:$PWD", *(shlex.quote(bind) for bind in (f"{folder}:{folder}", *box.binds))])
        words = [f"--container-image={shlex.quote(box.image)}", f"--container-mounts={mounts}"]
        words.append("--container-workdir=$PWD")
        return [*words, *box.options]
    binds = [f"--bind {shlex.quote(bind)}" for bind in box.binds]
    here = f"--bind $PWD --bind {shlex.quote(folder)} --pwd $PWD"
    return [f"{box.runtime} exec --nv {here}", *binds, *box.options, shlex.quote(box.image)]


# Of srun: 85, or 128 + the signal that meant to stop a stage which keeps no checkpoints of its own.
_AGAIN = """\
case $rc in
  SAVED | 138 | 140 | 143)
    # A SIGTERM to this shell before the time limit: cancelled, and a requeue would bring it back to life; or requeued
    # by Slurm, which needs no help.
    if [ -n "$ended" ] && [ "$(date +%s)" -lt "$((limit - 5))" ]; then exit $rc; fi
    scontrol requeue "$SLURM_JOB_ID" || echo "mambalign: requeued already, or not allowed" >&2
    sleep 300   # Slurm ends this shell; it must not exit, or the job would count as done
    ;;
esac
exit $rc"""
_ENDING = {
    True: """\
# srun also returns 0 when its node goes down: only the run folder knows.
if [ $rc = 0 ] && ! grep -q '"status": "finished"' "$out/run.json"; then rc=SAVED; fi
note end "\\"code\\": $rc"
"""
    + _AGAIN,
    False: """\
note end "\\"code\\": $rc"
"""
    + _AGAIN,
}


def _submit(pipeline: Pipeline, folder: str) -> str:
    """Submits all or nothing, and prints a line `STAGE JOBID` for each."""
    lines = [
        "#!/bin/bash",
        "# Each stage starts when those it needs have finished, and is cancelled when one of them failed.",
        "set -eEuo pipefail",
        f"cd {shlex.quote(folder)}",
        "declare -A job=()",
        "ids=()",
        """trap '[ ${#ids[@]} = 0 ] || scancel "${ids[@]}"' ERR""",
        'submit() { local id; id=$(sbatch --parsable "${@:2}"); id=${id%%;*}; ids+=("$id"); job[$1]=$id; '
        'echo "$1 $id"; }',
    ]
    for stage in pipeline.stages:
        after = "".join(f":${{job[{name}]}}" for name in stage.needs)
        depend = f"--dependency=afterok{after} --kill-on-invalid-dep=yes " if after else ""
        lines.append(f"submit {stage.name} {depend}{stage.name}.sbatch")
    return "\n".join(lines) + "\n"
