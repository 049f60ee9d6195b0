"""One run on several processes: which rows each reads, and how their sums become one.

accelerate gives process r the device batches r, r + n, ... and fills a last round that is short with rows of the first.
Here it is filled with empty items instead: no row counts twice, and any number of processes takes the same steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

from mambalign.data.packing import EpochSampler, PackedBatch, PackedRows, collate_sequences


class FilledRows(torch.utils.data.Dataset[list[dict[str, Any]]]):
    """`rows`, and empty items behind them up to a multiple of `multiple`."""

    def __init__(self, rows: PackedRows, multiple: int):
        self.rows = rows
        self._length = -(-len(rows) // multiple) * multiple

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, item: int) -> list[dict[str, Any]]:
        return self.rows[item] if item < len(self.rows) else []


class FilledSampler(EpochSampler):
    """The order of the epoch's rows; the empty items of `FilledRows` come last."""

    def __init__(self, data: FilledRows, seed: int):
        super().__init__(len(data.rows), seed)
        self._length = len(data)

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[int]:
        yield from super().__iter__()
        yield from range(self.n, self._length)


def add_up(values: Mapping[str, float]) -> dict[str, float]:
    """The values of all processes added by name, in the order of the processes: the same numbers on each of them."""
    total: dict[str, float] = {}
    for part in gather_object([dict(values)]):
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    return total


def most(mine: int) -> int:
    """The largest of the processes' numbers; every process must ask."""
    count = torch.tensor(mine, device=PartialState().device)
    torch.distributed.all_reduce(count, op=torch.distributed.ReduceOp.MAX)
    return int(count)


def leave() -> None:
    """Ends this process's part in the run. Without it a process of gloo's may abort when it exits ("terminate called
    without an active exception"), and torchrun then kills the first one, which may still be writing the model."""
    if torch.distributed.is_initialized() and "gloo" in torch.distributed.get_backend():
        torch.distributed.destroy_process_group()


def placeholder() -> PackedBatch:
    """The smallest batch that passes through every parameter: for a process that has no rows where others have."""
    return collate_sequences([{"input_ids": [0, 0], "loss_mask": [0, 1], "index": 0}])
