"""A pipeline on this machine: stage after stage, each going on where it was stopped."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mambalign.cluster import attempts
from mambalign.cluster.attempts import Attempts
from mambalign.cluster.keys import EXIT_SAVED, ClusterError
from mambalign.cluster.launch import Group, process_count, visible_gpus
from mambalign.cluster.pipeline import Pipeline, Stage
from mambalign.cluster.progress import describe_progress

TAIL = 15  # lines of a failed stage's log that are shown
EVERY = 30.0  # seconds between lines about a running stage


class StageFailed(ClusterError):
    """A stage ended with an error of its own; the message has the end of its log."""


def run_pipeline(
    pipeline: Pipeline,
    folder: Path,
    chosen: Sequence[str] = (),
    say: Callable[[str], None] = print,
    gpus: int | None = None,
) -> int:
    """Run the stages in their order; what is finished is passed over, what was stopped goes on.

    Args:
        folder: of frozen recipes, logs and attempts; the pipeline's results are where its recipes say.
        chosen: names of the stages to run; all when empty.
        gpus: GPUs to use at most; None: those that are visible.

    Returns:
        0 when all is done, 85 when a signal stopped it, 130 after Ctrl-C: the same command goes on.

    Raises:
        StageFailed: a stage failed, or was restarted several times without a new checkpoint.
    """
    for stage in pipeline.stages:
        if stage.name not in chosen and chosen:
            continue
        _check_needs(pipeline, stage, folder)
        if _is_done(stage, folder):
            older = _made_anew_since(stage, folder)
            say(f"{stage.name}: finished before" + (f", from an earlier {' and '.join(older)}; "
                f"delete {stage.output_dir} to train it again" if older else ""))  # fmt: skip
            continue
        _freeze(stage, folder)
        code = _run_stage(stage, folder, say, visible_gpus(os.environ) if gpus is None else gpus)
        if code:
            return code
    return 0


def _check_needs(pipeline: Pipeline, stage: Stage, folder: Path) -> None:
    for name in stage.needs:
        if not _is_done(pipeline.stage(name), folder):
            raise ClusterError(f"stage {stage.name} needs {name}, which has not finished; run `--from {name}`")


def _is_done(stage: Stage, folder: Path) -> bool:
    """Finished, and as the pipeline says it now: a changed recipe or command is run, and says itself what to do.

    So is a command or evaluation whose model was made anew: its numbers would be the old one's.
    """
    if stage.trains:
        return attempts.finished(stage.output_dir) and _frozen(stage, folder) in (stage.recipe, None)
    last = _last_end(stage.name, folder)
    same = last.get("code") == 0 and last.get("command") == stage.command(str(folder))
    return same and not _made_anew_since(stage, folder)


def _last_end(name: str, folder: Path) -> dict[str, Any]:
    return next((line for line in reversed(Attempts.of(folder, name).lines()) if line.get("event") == "end"), {})


def _times_finished(stage: Stage, folder: Path) -> dict[str, int]:
    """How often each stage that this one needs was finished by now; counted, since clocks change."""
    lines = {name: Attempts.of(folder, name).lines() for name in stage.needs}
    return {name: sum(line.get("code") == 0 for line in found) for name, found in lines.items()}


def _made_anew_since(stage: Stage, folder: Path) -> list[str]:
    """Stages it needs that were finished again after it; unknown (none) where its record does not say."""
    before = _last_end(stage.name, folder).get("made_from", {})
    return [name for name, times in _times_finished(stage, folder).items() if times > before.get(name, times)]


def _frozen(stage: Stage, folder: Path) -> str | None:
    path = Path(stage.recipe_file(str(folder)))
    return path.read_text() if path.is_file() else None


def _freeze(stage: Stage, folder: Path) -> None:
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    if stage.recipe is not None:
        Path(stage.recipe_file(str(folder))).write_text(stage.recipe)


def stage_environment(stage: Stage) -> dict[str, str]:
    """The environment of a stage's processes: `mambalign` in a command is the one that runs now."""
    env: Mapping[str, str] = os.environ
    path = os.pathsep.join([os.path.dirname(sys.executable), env.get("PATH", os.defpath)])
    hidden = {} if stage.gpu_counts[-1] else {"CUDA_VISIBLE_DEVICES": ""}
    return {**env, "PATH": path, **hidden, **stage.env}


def _run_stage(stage: Stage, folder: Path, say: Callable[[str], None], gpus: int) -> int:
    record = Attempts.of(folder, stage.name)
    command = stage.command(str(folder), program=f"{shlex.quote(sys.executable)} -m mambalign")
    words = shlex.split(command) if stage.trains else ["bash", "-ceu", command]
    count = process_count(stage.gpu_counts, gpus) if stage.trains else 1
    log = folder / "logs" / f"{stage.name}.log"
    stuck, before = 0, attempts.progress(stage.output_dir)
    while True:
        record.start(stage.output_dir)
        say(f"{stage.name}: {'starts' if len(record.starts) == 1 else 'goes on'}; log in {log}")
        with log.open("ab") as output:
            group = Group(words, count, stage_environment(stage), output)
            code = group.wait(tick=_Reporter(stage, say))
        record.end(code, command=stage.command(str(folder)), made_from=_times_finished(stage, folder))
        if signal.SIGINT in group.received:
            return 130
        if code == 0:
            say(f"{stage.name}: finished")
            return 0
        if code != EXIT_SAVED:
            raise StageFailed(f"stage {stage.name} failed with exit code {code}; the end of {log}:\n{_tail(log)}")
        if group.received:
            say(f"{stage.name}: stopped; the same command goes on")
            return EXIT_SAVED
        now = attempts.progress(stage.output_dir)
        stuck, before = (0, now) if now > before else (stuck + 1, before)
        if stuck >= attempts.PATIENCE:
            raise StageFailed(
                f"stage {stage.name} stopped {stuck} times with no new checkpoint since step {now}; save more often, "
                f"or see why it is stopped. The end of {log}:\n{_tail(log)}"
            )


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-TAIL:])


class _Reporter:
    """A line about the running stage now and then."""

    def __init__(self, stage: Stage, say: Callable[[str], None]):
        self.stage, self.say = stage, say
        self.started = self.last = time.time()

    def __call__(self) -> None:
        if time.time() - self.last < EVERY or not self.stage.trains:
            return
        self.last = time.time()
        line = describe_progress(self.stage.output_dir, self.started)
        if line:
            self.say(f"{self.stage.name}: {line}")
