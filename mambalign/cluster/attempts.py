"""What happened to a stage so far: a line of JSON for every start and end, beside the checkpoints that they left.

The same lines are written by `local` and by the scripts of `slurm` and `htcondor`, and read by `status`:
`{"event": "start", "time": 1764000000, "step": 200, "lost": 31}`, `{"event": "end", "time": ..., "code": 85}`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PATIENCE = 5  # starts without a new checkpoint before a stage is given up
MANIFEST = "manifest.json"  # of a checkpoint: the last file that a save writes


def newest_step(output_dir: str | Path | None) -> int:
    """Step of the newest checkpoint in a run folder; 0 if there is none."""
    return max((step for step, _ in _manifests(output_dir)), default=0)


def _manifests(output_dir: str | Path | None) -> list[tuple[int, Path]]:
    if output_dir is None:
        return []
    found = [(re.search(r"checkpoint-(\d+)$", p.parent.name), p) for p in Path(output_dir).glob(f"*/{MANIFEST}")]
    return [(int(match[1]), path) for match, path in found if match]


def progress(output_dir: str | Path | None) -> int:
    """A number that grows while a stage gets on: the newest checkpoint's step, or the bytes written where none are."""
    if output_dir is None or newest_step(output_dir):
        return newest_step(output_dir)
    folder = Path(output_dir)
    if (folder / "run.json").exists():
        return 0  # training, before its first checkpoint
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def finished(output_dir: str | Path | None) -> bool:
    """Whether the run folder says that its training is done."""
    return read_json(Path(output_dir) / "run.json").get("status") == "finished" if output_dir else False


def lost_seconds(output_dir: str | Path | None) -> int:
    """Seconds of work behind the newest checkpoint: from its save to the last sign of life."""
    manifests = _manifests(output_dir)
    if output_dir is None or not manifests:
        return 0
    try:
        alive = (Path(output_dir) / "metrics.jsonl").stat().st_mtime
        return max(0, round(alive - max(manifests)[1].stat().st_mtime))
    except FileNotFoundError:
        return 0


def read_json(path: Path) -> dict[str, Any]:
    """A map from a file; empty when it is not there, or is being written."""
    try:
        value = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The JSON maps of a file of lines; lines that a kill tore are left out."""
    lines = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


@dataclass(frozen=True)
class Attempts:
    """The record of one stage, `FOLDER/attempts/STAGE.jsonl`."""

    path: Path

    @classmethod
    def of(cls, folder: Path, stage: str) -> Attempts:
        return cls(folder / "attempts" / f"{stage}.jsonl")

    def _write(self, line: dict[str, Any]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def start(self, output_dir: str | None) -> None:
        step, lost = progress(output_dir), lost_seconds(output_dir)
        line = {"event": "start", "time": int(time.time()), "step": step, "lost": lost}
        self._write(line | {"pid": os.getpid(), "host": platform.node()})

    def end(self, code: int, **more: Any) -> None:
        self._write({"event": "end", "time": int(time.time()), "code": code, **more})

    def lines(self) -> list[dict[str, Any]]:
        return read_lines(self.path)

    @property
    def starts(self) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line.get("event") == "start"]

    def is_stuck(self, output_dir: str | None) -> bool:
        """Whether the last `PATIENCE` starts were all where the next one would be. Without a folder nothing tells."""
        steps = [line.get("step") for line in self.starts[-PATIENCE:]]
        return output_dir is not None and steps == [progress(output_dir)] * PATIENCE

    @property
    def last_code(self) -> int | None:
        """Exit code of the newest attempt; None while it runs, or was killed without a word."""
        lines = self.lines()
        return lines[-1].get("code") if lines and lines[-1].get("event") == "end" else None
