"""Checkpoints that are complete or not there: written beside, listed in a manifest, synced, renamed.

A folder `checkpoint-N` counts only if `manifest.json` lists every file with its size and SHA-256 and all agree. A kill
at any moment leaves either the finished folder or a staging folder that the next save removes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from mambalign.support import sha256_file, write_json

logger = logging.getLogger("mambalign")

MANIFEST = "manifest.json"
STAGING = ".saving"
DISK_ERRORS = (OSError, SafetensorError, RuntimeError)  # torch.save's is the last
_NAME = re.compile(r"checkpoint-(\d+)$")


def _files(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)


def seal(folder: Path) -> None:
    """Write the manifest of `folder` and force everything to disk."""
    entries = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in _files(folder)
    }
    write_json(folder / MANIFEST, {"files": entries})
    for path in _files(folder):
        shutil.copymode(folder / MANIFEST, path)  # safetensors writes for the owner alone, whatever the umask
    for path in [*_files(folder), folder / MANIFEST, folder]:
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish(staged: Path, final: Path) -> None:
    """Seal `staged` and make it appear as `final` in one rename; an older folder of that name goes first."""
    seal(staged)
    if final.exists():
        discard(final)
    os.replace(staged, final)
    _sync(final.parent)


def discard(folder: Path) -> None:
    """Delete a checkpoint, which is gone in one rename: a kill while its files go leaves no torn one behind."""
    aside = folder.parent / STAGING / f"{folder.name}-old"
    aside.parent.mkdir(exist_ok=True)
    shutil.rmtree(aside, ignore_errors=True)
    os.replace(folder, aside)
    shutil.rmtree(aside)


def failure_of(work: Callable[[], None]) -> str | None:
    """Do `work`; what went wrong if the disk did not take it."""
    try:
        work()
    except DISK_ERRORS as error:
        return str(error)
    return None


def conclude(staged: Path, final: Path, failure: str | None, limit: int | None, keep: str | None) -> None:
    """Publish `staged`, unless there was a `failure`, and `rotate`; say so aloud where there is no checkpoint."""
    failure = failure or failure_of(lambda: publish(staged, final))
    if failure is None:
        rotate(final.parent, limit, keep)
        return
    kept = newest_complete(final.parent)
    logger.error(
        "saving %s failed (%s); training goes on, the newest complete checkpoint is %s. Free space on %s.",
        final.name, failure, kept.name if kept else "none yet", final.parent,
    )  # fmt: skip


def fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None if it is complete and unchanged."""
    try:
        listed: dict[str, Any] = json.loads((folder / MANIFEST).read_text())["files"]
        entries = [(folder / name, int(entry["bytes"]), str(entry["sha256"])) for name, entry in listed.items()]
    except FileNotFoundError:
        return f"has no {MANIFEST}: the save did not finish"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"has an unreadable {MANIFEST}"
    for path, size, digest in entries:
        if not path.is_file():
            return f"misses {path.name}"
        if path.stat().st_size != size:
            return f"has {path.name} with {path.stat().st_size:,} bytes instead of {size:,}"
        if sha256_file(path) != digest:
            return f"has {path.name} with changed content"
    return None


def checkpoints(run: Path) -> list[Path]:
    """All `checkpoint-N` folders of a run, newest first, complete or not."""
    found = [(int(match[1]), path) for path in run.glob("checkpoint-*") if (match := _NAME.search(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def newest_complete(run: Path) -> Path | None:
    """The newest checkpoint that can be trusted; every newer torn one is named in a warning."""
    for path in checkpoints(run):
        problem = fault(path)
        if problem is None:
            return path
        logger.warning("skipping %s: it %s", path, problem)
    return None


def load_optimizer(optimizer: Any, state: dict[str, Any]) -> None:
    """`load_state_dict` of a whole model's state, without torch's rounding: it casts a state's numbers to the type of
    their parameter, and Adafactor keeps fp32 ones for 16-bit weights."""
    optimizer.load_state_dict(state)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for number, values in state["state"].items():
        held = optimizer.state[parameters[number]]
        for name, value in values.items():
            if isinstance(value, Tensor) and value.dtype != held[name].dtype:
                held[name] = value.to(held[name].device, copy=True)


def rotate(run: Path, limit: int | None, keep: str | None = None) -> None:
    """Keep the newest `limit` complete checkpoints and `keep`. Torn ones never count: the last good one never goes."""
    if limit is None:
        return
    complete = [path for path in checkpoints(run) if (path / MANIFEST).is_file()]
    for path in complete[max(limit, 1) :]:
        if str(path) != keep:
            discard(path)
