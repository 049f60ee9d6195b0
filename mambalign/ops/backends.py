"""How every op turns `backend=` into an implementation."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("mambalign")

SCANS = ("selective_scan", "ssd")  # a model has one of them
OPS = (*SCANS, "causal_conv1d", "token_logps", "rms_norm", "embedding")
REASONS = {"cuda": "kernels compiled for this GPU", "torch": "plain PyTorch, on any device"}


def select(
    op: str, backend: str, available: Mapping[str, Any], no_cuda: str | None, cuda: str = REASONS["cuda"]
) -> tuple[str, str]:
    """Resolve `backend` to (name, reason): a name always wins; "auto" is "cuda" unless `no_cuda` says why it cannot be.

    `cuda` says what that backend is.

    Raises:
        ValueError: a name that is not available, naming those that are, or "cuda" where it cannot run.
    """
    if backend == "auto":
        name = "torch" if no_cuda else "cuda"
        reason = f"{REASONS['torch']}; the cuda backend {no_cuda}" if no_cuda else cuda
        _say_once(op, name, reason)
        return name, reason
    if backend not in available:
        raise ValueError(f"{op}: no backend {backend!r}; choose auto, {', '.join(sorted(available))}")
    if backend == "cuda" and no_cuda:
        raise ValueError(f"{op}: backend 'cuda' {no_cuda}; choose auto to run without it")
    return backend, "asked for by name"


def chosen_backends(backend: str, device: torch.device, ops: tuple[str, ...] = OPS) -> dict[str, tuple[str, str]]:
    """(name, reason) for each of `ops`: what `select_backend` of its module says of `device`.

    Raises:
        ValueError: as `select`.
    """
    modules = {op: importlib.import_module(f"mambalign.ops.{op}") for op in ops}
    return {op: module.select_backend(backend, device) for op, module in modules.items()}


@cache
def _say_once(op: str, name: str, reason: str) -> None:
    logger.info("%s: backend %s (%s)", op, name, reason)


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorates an autograd Function's forward or backward: its matrix products accumulate and keep their dtype."""

    @wraps(function)
    def wrapped(*args: Any) -> Any:
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args)

    return wrapped


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A small table made by the host, on `device`; from ordinary memory CUDA would wait for all work before it."""
    if device.type == "cuda" and tensor.numel():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def send_together(tables: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Tables of one dtype, sent in one copy."""
    return taken_apart(send(end_to_end(tables), device), tables)


def end_to_end(tables: Sequence[Tensor]) -> Tensor:
    """Tables of one dtype, as one row of numbers."""
    return torch.cat([table.flatten() for table in tables])


def taken_apart(row: Tensor, tables: Sequence[Tensor]) -> list[Tensor]:
    """The views of `row` that are `tables`, which it was made of."""
    parts = row.split([table.numel() for table in tables])
    return [part.view(table.shape) for part, table in zip(parts, tables, strict=True)]


def filled(table: Tensor, room: int, value: int) -> Tensor:
    """`table` with rows of `value` behind it, up to `room` of them."""
    return torch.cat([table, table.new_full((max(0, room - table.shape[0]), *table.shape[1:]), value)])


def add_rows(out: Tensor, index: Tensor, values: Tensor) -> None:
    """`out[index[i]] += values[i]` with repeated indices, summed in a fixed order on every device.

    On a CPU `index_put_` would use atomics from several threads, on a GPU `index_add_` would.
    """
    if out.device.type == "cpu":
        out.index_add_(0, index, values)
    else:
        out.index_put_((index,), values, accumulate=True)


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]` whose gradient sums repeated rows in a fixed order on every device (see `add_rows`)."""
    return x.index_select(0, index) if x.device.type == "cpu" else x[index]
