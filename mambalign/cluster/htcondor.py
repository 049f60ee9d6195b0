"""A pipeline as an HTCondor DAG: a submit file and a job script a stage, with or without a shared file system.

A stage is told to save after a slice, or by the SIGTERM of a vacate, and exits with 85. `checkpoint_exit_code` with
`transfer_checkpoint_files` keeps the first, `ON_EXIT_OR_EVICT` with `transfer_output_files` the second: leave out one
of the four and an eviction costs a slice, or all. Without a shared file system the run folder itself travels, as
`ckpt`; with one, `ckpt` is an empty mark and the run folder stays where it is.
"""

# ruff: noqa: RUF009 - `key` only calls dataclasses.field
from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mambalign.cluster.keys import (
    EXIT_SAVED,
    ClusterError,
    block,
    build,
    environment,
    flag,
    key,
    mebibytes,
    number,
    numbers,
    one_of,
    plain_map,
    seconds,
    size,
    text,
    texts,
    whole,
)
from mambalign.cluster.pipeline import Pipeline, Stage

DAG = "pipeline.dag"
SANDBOX = "ckpt"  # what travels with the job


@dataclass(frozen=True)
class HTCondorProfile:
    """An HTCondor pool: what its jobs want beside what a stage asks for."""

    scheduler: str = key("htcondor", one_of("htcondor"), "htcondor")
    shared_filesystem: bool = key(False, flag, "Whether every machine sees the working directory under the same path.")
    elastic: bool = key(
        True, flag, "Ask for a range of GPUs with an expression; false where the pool refuses one: the most, then."
    )
    container_image: str | None = key(None, text, "image.sif, docker://REPOSITORY:TAG or a folder.")
    universe: str | None = key(None, one_of("vanilla", "container", "docker"), "Only where the pool insists on one.")
    requirements: str | None = key(None, text, "Further condition on machines: TARGET.HasWeka.")
    attributes: dict[str, Any] = key({}, plain_map, "The site's own +Attributes: {JobRunTime: 9, CanCheckpoint: true}.")
    rank: str | None = key(None, text, "Which of the machines that fit is preferred.")
    accounting_group: str | None = key(None, text, "Group to account to.")
    nice_user: bool = key(False, flag, "Run only where nobody else wants to.")
    present_on_machines: tuple[str, ...] = key(
        (), texts, "Paths that every machine (or the image) has: not transferred."
    )
    transfer_input: tuple[str, ...] = key((), texts, "Further files for every stage: a packed environment.")
    transfer_executable: bool = key(True, flag, "Whether the job script travels; false only with a shared file system.")
    preserve_paths: bool = key(True, flag, "Keep relative paths in the sandbox (HTCondor 8.9 or newer).")
    gpus_maximum_capability: float | None = key(None, number, "Most CUDA capability.")
    vacate_time: int = key(300, seconds, "Grace to ask for; the machine may give less.")
    retirement_time: int | None = key(
        None, lambda v: 0 if v == 0 else seconds(v), "MaxJobRetirementTime; 0 may let a draining machine take the job."
    )
    lease: int = key(600, seconds, "How long a lost machine is waited for; the default of 40 minutes is too long.")
    max_retries: int = key(3, whole, "Starts again after a failure of its own.")
    release_codes: tuple[int, ...] = key((47, 12, 13), numbers, "Hold reasons that may pass by themselves.")
    max_holds: int = key(10, whole, "After so many holds it stays held.")
    release_after: int = key(300, seconds, "Seconds that a job stays held before it is released.")
    retry_memory: int | None = key(None, mebibytes, "Memory of a second try after running out of it (HTCondor 24.2).")
    output: str = key("$(cluster).$(process).out", text, "Name of the file of stdout.")
    error: str = key("$(cluster).$(process).err", text, "Name of the file of stderr.")
    log: str = key("events", text, "Ending of the event log's name, which is STAGE.events.")
    setup: str = key("", block, "Shell lines of the job before the stage: tar xzf env.tar.gz ...")
    python: str = key("python3", text, "Python that has mambalign, where the job runs.")
    env: dict[str, str] = key({}, environment, "Environment variables at this site.")
    max_gpus: int | None = key(None, whole, "GPUs of the largest machine.")
    max_time: int | None = key(None, seconds, "The site's longest job.")
    extra: tuple[str, ...] = key((), texts, "Further lines of the submit file, `key = value`.")

    @classmethod
    def read(cls, values: Mapping[str, Any], source: str) -> HTCondorProfile:
        profile = build(cls, values, source)
        for name in profile.attributes:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise ClusterError(f"{source}: attributes: {name!r} is no name; write it without the +")
        for line in profile.extra:
            if not re.match(r"\+?[A-Za-z_][\w.]*\s*=", line) or re.match(r"queue\b", line, re.IGNORECASE):
                raise ClusterError(f"{source}: extra: {line!r} is no `key = value` line")
        if not profile.transfer_executable and not profile.shared_filesystem:
            raise ClusterError(f"{source}: transfer_executable: false needs shared_filesystem: true")
        return profile


def render(pipeline: Pipeline, profile: HTCondorProfile, work: str, folder: str) -> dict[str, str]:
    """File name (in `folder`) -> text: the DAG, a submit file and a script a stage, the frozen recipes.

    Args:
        work: absolute working directory, to which the pipeline's paths are relative.
        folder: absolute folder of the files.

    Raises:
        ClusterError: a request that the pool cannot meet, or a path that cannot travel.
    """
    for path in (work, folder):
        if re.search(r"[\s\"',;=]", path):
            raise ClusterError(f"{path} has characters that a submit file cannot carry; work in another folder")
    files: dict[str, str] = {}
    for stage in pipeline.stages:
        _check(stage, profile)
        if stage.recipe is not None:
            files[f"{stage.name}.yaml"] = stage.recipe
        files[f"{stage.name}.sh"] = _script(stage, profile, work, folder)
        files[f"{stage.name}.sub"] = _submit(pipeline, stage, profile, work, folder)
    files[DAG] = _dag(pipeline, folder)
    return files


def _check(stage: Stage, profile: HTCondorProfile) -> None:
    if stage.node_counts[-1] > 1:
        raise ClusterError(
            f"stage {stage.name}: nodes: an HTCondor job runs on one machine (several need the parallel universe and a "
            "dedicated scheduler); ask for more gpus instead"
        )
    if profile.max_gpus is not None and stage.gpu_counts[0] > profile.max_gpus:
        raise ClusterError(
            f"stage {stage.name}: gpus is {stage.gpu_counts[0]}, but the profile's max_gpus is {profile.max_gpus}"
        )
    if profile.max_time is not None and stage.resources.time > profile.max_time:
        raise ClusterError(
            f"stage {stage.name}: time is {stage.resources.time} s, but the profile's max_time is {profile.max_time}"
        )


# -------------------------------------------------------------------------------------------------------- submit file


def gpu_request(counts: tuple[int, ...], elastic: bool) -> str:
    """The most of `counts` that a machine has.

    Example:
        >>> gpu_request((1, 2, 4), elastic=True)
        'ifThenElse(TARGET.GPUs >= 4, 4, ifThenElse(TARGET.GPUs >= 2, 2, 1))'
        >>> gpu_request((1, 2, 4), elastic=False)
        '4'
    """
    if not elastic:
        return str(counts[-1])
    expression = str(counts[0])
    for count in counts[1:]:
        expression = f"ifThenElse(TARGET.GPUs >= {count}, {count}, {expression})"
    return expression


def _counts(stage: Stage, profile: HTCondorProfile) -> tuple[int, ...]:
    return tuple(count for count in stage.gpu_counts if profile.max_gpus is None or count <= profile.max_gpus)


def _submit(pipeline: Pipeline, stage: Stage, profile: HTCondorProfile, work: str, folder: str) -> str:
    asked, counts = stage.resources, _counts(stage, profile)
    logs = os.path.join(folder, "logs")
    gpus = bool(counts[-1])
    env = {**profile.env, **stage.env}
    codes = ", ".join(map(str, profile.release_codes))
    release = f"member(HoldReasonCode, {{{codes}}}) && NumHolds < {profile.max_holds}"
    lines: list[tuple[str, str | None]] = [
        ("universe", profile.universe),
        ("batch_name", pipeline.name),
        ("executable", os.path.join(folder, f"{stage.name}.sh")),
        ("transfer_executable", None if profile.transfer_executable else "False"),
        ("container_image", profile.container_image),
        ("initialdir", work),
        ("log", os.path.join(logs, f"{stage.name}.{profile.log}")),
        ("output", os.path.join(logs, f"{stage.name}.{profile.output}")),
        ("error", os.path.join(logs, f"{stage.name}.{profile.error}")),
        ("environment", _environment(env) if env else None),
        ("", None),
        ("request_gpus", gpu_request(counts, profile.elastic) if gpus else None),
        ("gpus_minimum_memory", size(asked.gpu_memory, "B") if gpus and asked.gpu_memory else None),
        ("gpus_minimum_capability", f"{asked.gpu_capability:g}" if gpus and asked.gpu_capability else None),
        (
            "gpus_maximum_capability",
            f"{profile.gpus_maximum_capability:g}" if gpus and profile.gpus_maximum_capability else None,
        ),
        ("request_cpus", str(asked.cpus)),
        ("request_memory", size(asked.memory, "B")),
        ("retry_request_memory", size(profile.retry_memory, "B") if profile.retry_memory else None),
        ("request_disk", size(asked.disk, "B")),
        ("requirements", profile.requirements),
        ("rank", profile.rank),
        ("", None),
        ("should_transfer_files", "YES"),
        ("preserve_relative_paths", "True" if profile.preserve_paths and not profile.shared_filesystem else None),
        ("transfer_input_files", ", ".join(_inputs(stage, profile, work, folder)) or None),
        ("checkpoint_exit_code", str(EXIT_SAVED)),
        ("transfer_checkpoint_files", _travels(stage, profile)),
        ("transfer_output_files", _travels(stage, profile)),
        ("when_to_transfer_output", "ON_EXIT_OR_EVICT"),
        ("transfer_output_remaps", f'"{SANDBOX} = {_home(stage, profile, folder)}"'),
        ("job_max_vacate_time", str(profile.vacate_time)),
        ("max_job_retirement_time", None if profile.retirement_time is None else str(profile.retirement_time)),
        ("job_lease_duration", str(profile.lease)),
        ("want_graceful_removal", "True"),
        ("max_retries", str(profile.max_retries)),
        ("allowed_execute_duration", str(asked.time)),
        ("periodic_release", f"{release} && time() - EnteredCurrentStatus > {profile.release_after}"),
        ("accounting_group", profile.accounting_group),
        ("nice_user", "True" if profile.nice_user else None),
    ]
    text_lines = [f"{name} = {value}" if name else "" for name, value in lines if value is not None or not name]
    text_lines += [f"+{name} = {_classad(value)}" for name, value in profile.attributes.items()]
    return "\n".join([*text_lines, *profile.extra, "", "queue 1"]) + "\n"


def _classad(value: Any) -> str:
    if isinstance(value, bool):
        return "True" if value else "False"
    if isinstance(value, int | float):
        return str(value)
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    raise ClusterError(f"attributes: {value!r} must be a number, true, false or text")


def _environment(env: Mapping[str, str]) -> str:
    """HTCondor's second syntax: in double quotes, values in single ones; a quote inside is doubled."""
    words = []
    for name, value in env.items():
        escaped = value.replace("'", "''").replace('"', '""')
        words.append(f"{name}='{escaped}'")
    return '"' + " ".join(words) + '"'


# -------------------------------------------------------------------------------------------------------- what travels


def _outputs(stage: Stage, profile: HTCondorProfile) -> tuple[str, ...]:
    return () if profile.shared_filesystem else stage.outputs


def _travels(stage: Stage, profile: HTCondorProfile) -> str:
    return ", ".join((SANDBOX, *_outputs(stage, profile)))


def _home(stage: Stage, profile: HTCondorProfile, folder: str) -> str:
    """Where `ckpt` goes on the submit machine."""
    if profile.shared_filesystem or not stage.output_dir:
        return os.path.join(folder, "marks", stage.name)
    return stage.output_dir


def sandbox_path(path: str) -> str:
    """Where a transferred file lies in the job's folder: relative paths are kept, of others the name is left."""
    return os.path.basename(path.rstrip("/")) if os.path.isabs(path) else os.path.normpath(path)


def _recipe_file(stage: Stage, work: str, folder: str) -> str:
    path = stage.recipe_file(folder)
    inside = os.path.relpath(path, work)
    return path if inside.startswith("..") else inside


def _inputs(stage: Stage, profile: HTCondorProfile, work: str, folder: str) -> list[str]:
    if profile.shared_filesystem:
        return []
    found = [_recipe_file(stage, work, folder)] if stage.recipe is not None else []
    for path in (*stage.inputs, *profile.transfer_input):
        if any(_below(path, root) for root in profile.present_on_machines):
            continue
        if path not in profile.transfer_input and (os.path.isabs(os.path.expanduser(path)) or _outside(path)):
            raise ClusterError(
                f"stage {stage.name}: {path} does not lie below the working directory, so a job without a shared file "
                "system would not find it under that name; copy it here, or, if every machine has it, name it in the "
                "profile's present_on_machines"
            )
        if re.search(r"[\s\"',;=]", path):
            raise ClusterError(
                f"stage {stage.name}: {path!r} has characters that a submit file cannot carry; rename it"
            )
        found.append(path.rstrip("/"))
    return list(dict.fromkeys(found))


def _below(path: str, root: str) -> bool:
    return os.path.normpath(path) == os.path.normpath(root) or os.path.normpath(path).startswith(
        os.path.normpath(root) + os.sep
    )


def _outside(path: str) -> bool:
    return os.path.normpath(path).split(os.sep)[0] == ".."


# --------------------------------------------------------------------------------------------------------- job script


def _script(stage: Stage, profile: HTCondorProfile, work: str, folder: str) -> str:
    shared = profile.shared_filesystem
    out = stage.output_dir if shared else SANDBOX
    record = os.path.join(folder, "attempts", f"{stage.name}.jsonl") if shared else f"{SANDBOX}/attempts.jsonl"
    launch = [profile.python, "-m", "mambalign.cluster.launch", "--gpus", ",".join(map(str, _counts(stage, profile)))]
    if not stage.trains:
        launch[-1] = "1"
    if stage.resources.slice:
        launch += ["--slice", str(stage.resources.slice)]
    launch += ["--record", shlex.quote(record)]
    launch += ["--output-dir", shlex.quote(out)] if out else []
    if stage.trains:
        recipe = stage.recipe_file(folder) if shared else sandbox_path(_recipe_file(stage, work, folder))
        command = f"{profile.python} -m mambalign {stage.kind} {shlex.quote(recipe)}"
        command += "" if shared else f" --output_dir {SANDBOX}"
    else:
        command = f"bash -ceu {shlex.quote(_in_sandbox(stage, shared, folder))}"
    lines = [
        "#!/bin/bash",
        "set -u",
        f"mkdir -p {SANDBOX}   # must be there however early the job fails, or it is put on hold",
        *([f"cd {shlex.quote(work)} || exit 1"] if shared else []),
        'export HOME="${HOME:-$PWD}"',
        *([profile.setup] if profile.setup else []),
        *([] if shared else _earlier(stage)),
        f"exec {' '.join(launch)} -- \\",
        f"  {command}",
    ]
    return "\n".join(lines) + "\n"


def _earlier(stage: Stage) -> list[str]:
    """What an earlier submission brought home is gone on with, unless this job has come further."""
    if not stage.output_dir or stage.output_dir not in stage.inputs:
        return []
    return [f'[ -n "$(ls -A {SANDBOX})" ] || cp -r {shlex.quote(os.path.normpath(stage.output_dir))}/. {SANDBOX}/']


def _in_sandbox(stage: Stage, shared: bool, folder: str) -> str:
    """A command's own folder is `ckpt` where nothing is shared: a link of its name leads there."""
    command = stage.command(folder)
    if shared or not stage.output_dir:
        return command
    out = shlex.quote(stage.output_dir)
    return f'mkdir -p "$(dirname {out})"; rm -rf {out}; ln -s "$PWD/{SANDBOX}" {out}\n{command}'


def _dag(pipeline: Pipeline, folder: str) -> str:
    lines = [f"JOB {stage.name} {os.path.join(folder, stage.name)}.sub" for stage in pipeline.stages]
    lines += [f"PARENT {' '.join(s.needs)} CHILD {s.name}" for s in pipeline.stages if s.needs]
    return "\n".join(lines) + "\n"
