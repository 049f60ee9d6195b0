"""A run that goes no further than a test lets it, so that what is to happen to it cannot come too late.

Also a program, for runs through the command line: `python -m tests.train.leash FILE sft recipe.yaml` is
`mambalign sft recipe.yaml` that begins no step beyond the number in FILE.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mambalign.train.trainer import PackedTrainer


def hold(bound: Callable[[PackedTrainer], int]) -> None:
    """In this process, from here on: no step begins after so many, unless the run was asked to stop."""
    real = PackedTrainer.training_step

    def training_step(self: PackedTrainer, *args: Any, **kwargs: Any) -> Any:
        while self.state.global_step >= bound(self) and self.preemption.reason is None:
            time.sleep(0.01)
        return real(self, *args, **kwargs)

    PackedTrainer.training_step = training_step  # type: ignore[method-assign]


def let(file: Path, steps: int) -> None:
    """Let the run on this leash make so many steps."""
    written = file.with_suffix(".new")
    written.write_text(str(steps))
    written.replace(file)


def main(file: str, *words: str) -> None:
    from mambalign.cli import app

    hold(lambda _: int(Path(file).read_text()))
    app(words)


if __name__ == "__main__":
    main(*sys.argv[1:])
