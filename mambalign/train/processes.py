"""One run on several processes: which rows each reads, and how their sums become one.

accelerate gives process r the device batches r, r + n, ... and fills a last round that is short with rows of the first.
Here it is filled with empty items instead: no row counts twice, and any number of processes takes the same steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from mambalign.data.packing import EpochSampler, PackedBatch, PackedRows, collate_sequences
from mambalign.recipe import UserError
from mambalign.train.preemption import Preempted

Found = TypeVar("Found")


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


def first_decides(decide: Callable[[], Found]) -> Found:
    """What the first process finds, in all of them; every process must ask.

    Raises:
        UserError: the one that the first process met. In all: gloo tells a process that another one has gone, but NCCL
            lets it wait.
    """
    answer: list[Any] = [None]
    if PartialState().is_main_process:
        try:
            answer = [decide()]
        except UserError as error:
            answer = [error]
    found: Any = broadcast_object_list(answer)[0]
    if isinstance(found, UserError):
        raise found
    return found


@contextmanager
def leaving() -> Iterator[None]:
    """`leave` behind a run that ends in good order; after an error nobody knows what the others wait for."""
    try:
        yield
    except Preempted:
        leave()
        raise
    leave()


def leave() -> None:
    """Ends this process's part in the run; with NCCL it waits until those of the same machine come to it, too.

    Without it a process of gloo's may abort when it exits ("terminate called without an active exception"), and
    torchrun then kills the first one, which may still be writing the model. NCCL's warn.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def placeholder() -> PackedBatch:
    """The smallest batch that passes through every parameter: for a process that has no rows where others have."""
    return collate_sequences([{"input_ids": [0, 0], "loss_mask": [0, 1], "index": 0}])
