"""How far a training run is, read from its folder: step, share, loss, time left."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mambalign.cluster.attempts import finished, newest_step, read_json, read_lines


@dataclass(frozen=True)
class Progress:
    """`share`: of the whole training, 0 to 1. `seconds_left`: at the pace since `since`; None where it is not known."""

    step: int
    share: float | None
    loss: float | None
    checkpoint: int
    seconds_left: float | None
    finished: bool


def read_progress(output_dir: str | Path | None, since: float | None = None) -> Progress | None:
    """Progress of the run in a folder; None when nothing of it is there yet.

    Args:
        since: Unix time at which the running attempt started, to tell its pace.
    """
    if output_dir is None or not (Path(output_dir) / "run.json").is_file():
        return None
    folder = Path(output_dir)
    lines = [line for line in read_lines(folder / "metrics.jsonl") if isinstance(line.get("step"), int)]
    trained = [line for line in lines if "learning_rate" in line]
    done = finished(folder)
    last = trained[-1] if trained else {}
    share = 1.0 if done else _share(last, _recipe(folder))
    step = int(read_json(folder / "run.json").get("global_step") or last.get("step", 0))
    return Progress(step, share, last.get("loss"), newest_step(folder), _left(folder, last, share, since, done), done)


def _recipe(folder: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load((folder / "recipe.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return values if isinstance(values, dict) else {}


def _share(last: dict[str, Any], recipe: dict[str, Any]) -> float | None:
    if not last:
        return 0.0
    steps, epochs = recipe.get("max_steps") or -1, recipe.get("num_train_epochs")
    if steps > 0:
        return min(1.0, float(last["step"] / steps))
    if epochs and last.get("epoch") is not None:
        return min(1.0, float(last["epoch"] / float(epochs)))
    return None


def _left(folder: Path, last: dict[str, Any], share: float | None, since: float | None, done: bool) -> float | None:
    """Steps left at the pace of this attempt, which began at the newest checkpoint that is older than it."""
    if done or not share or since is None or not last:
        return 0.0 if done else None
    older = [
        int(path.parent.name.split("-")[1])
        for path in folder.glob("checkpoint-*/manifest.json")
        if path.stat().st_mtime <= since
    ]
    steps, elapsed = last["step"] - max(older, default=0), time.time() - since
    if steps <= 0 or elapsed <= 0:
        return None
    total = last["step"] / share
    return float((total - last["step"]) * elapsed / steps)


def describe_progress(output_dir: str | Path | None, since: float | None = None) -> str:
    """`step 40 (20 %), loss 1.234, 3 min left`; empty when there is nothing to tell."""
    now = read_progress(output_dir, since)
    if now is None:
        return ""
    parts = [f"step {now.step}" + (f" ({now.share:.0%})" if now.share is not None else "")]
    if now.loss is not None:
        parts.append(f"loss {now.loss:.4g}")
    if now.seconds_left and not now.finished:
        parts.append(f"{duration(now.seconds_left)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """A duration for people: `40 s`, `3 min`, `2.5 h`, `3.1 days`.

    Example:
        >>> [duration(s) for s in (40, 200, 9000, 270000)]
        ['40 s', '3 min', '2.5 h', '3.1 days']
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172800 else f"{seconds / 86400:.1f} days"
