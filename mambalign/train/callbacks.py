"""What watches a training run: the log file that survives restarts, and the audit of adapters."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from mambalign.support import write_text

if TYPE_CHECKING:  # PEFT takes seconds to import
    from mambalign.models.adapters import Audit
    from mambalign.train.trainer import PackedTrainer

METRICS = "metrics.jsonl"


class AdapterAudit(TrainerCallback):
    """Stops a run whose adapters do not all train, in its first steps."""

    _audit: Audit | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        from mambalign.models.adapters import Audit

        self._audit = Audit(model)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._audit is not None and not self._audit.check():
            self._audit = None


class MetricsFile(TrainerCallback):
    """`metrics.jsonl` in the run folder: one line a log, without gaps or doubles however often the run restarts.

    `lines` counts those that are in it; a checkpoint remembers the count, and the lines written after it go when a
    run resumes there: they will come again.
    """

    def __init__(self) -> None:
        self.lines = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self._rewind(Path(args.output_dir) / METRICS)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        # The summary at the end of training averages over the last process only: not worth keeping.
        if not state.is_world_process_zero or not logs or "train_runtime" in logs:
            return
        path = Path(args.output_dir) / METRICS
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            file.write(json.dumps({"step": state.global_step, "epoch": state.epoch} | logs) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.lines += 1

    def _rewind(self, path: Path) -> None:
        kept = read_metrics(path)[: self.lines]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.lines = len(kept)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; a last line that a kill cut short is left out."""
    lines: list[dict[str, Any]] = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


class Milestones(TrainerCallback):
    """Tells the trainer where transformers' loop is, where it asks only callbacks."""

    def __init__(self, trainer: PackedTrainer) -> None:
        self._trainer, self.epoch_ended = trainer, False

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._trainer.make_up()
        self._trainer.preemption.training_begins()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.epoch_ended = False

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.epoch_ended = True
