"""A program: `python -m tests.train.witness FOLDER sft recipe.yaml` is `mambalign sft recipe.yaml`, and tells about it.

Every process writes `FOLDER/rank-N.json`: where it computes, and what it has on the other devices. A file
`FOLDER/leash` holds the run as `leash.py` does. A process that hangs says where after a while.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from mambalign.support import write_json
from mambalign.train import sharding
from mambalign.train.trainer import PackedTrainer
from tests.train.leash import hold

graphs = 0  # how many CUDA graphs there are
HANGS = 60.0  # seconds, after which the stacks are written: well before the test gives up


def allowed(leash: Path, trainer: PackedTrainer) -> int:
    return int(leash.read_text()) if leash.exists() else trainer.state.max_steps


def note_the_first_step(file: Path) -> None:
    real = PackedTrainer.training_step

    def training_step(self: PackedTrainer, *args: Any, **kwargs: Any) -> Any:
        global graphs
        loss = real(self, *args, **kwargs)
        graphs = getattr(self.model.backbone.graphs, "captured", 0)
        if not file.exists():
            distributed = torch.distributed.is_initialized()
            write_json(
                file,
                {
                    "pid": os.getpid(),
                    "device": str(self.args.device),
                    "backend": torch.distributed.get_backend() if distributed else None,
                    "way": "fsdp" if sharding.is_sharded(self.model) else type(self.model_wrapped).__name__,
                },
            )
        return loss

    PackedTrainer.training_step = training_step  # type: ignore[method-assign]


def note_the_end(file: Path) -> None:
    """Which devices have a context of this process's (half a GB, needed or not), the most it held on each, graphs."""
    devices = range(torch.cuda.device_count())
    contexts = [device for device in devices if torch._C._cuda_hasPrimaryContext(device)]
    held = [torch.cuda.max_memory_allocated(device) for device in devices]
    write_json(file, json.loads(file.read_text()) | {"contexts": contexts, "held": held, "graphs": graphs})


def main(folder: str, *words: str) -> None:
    from mambalign.cli import app

    faulthandler.dump_traceback_later(HANGS)
    file = Path(folder) / f"rank-{os.environ.get('RANK', '0')}.json"
    file.unlink(missing_ok=True)
    note_the_first_step(file)
    hold(lambda trainer: allowed(Path(folder) / "leash", trainer))
    try:
        app(words)
    finally:
        if file.exists() and torch.cuda.is_available():
            note_the_end(file)


if __name__ == "__main__":
    main(*sys.argv[1:])
