"""Losses and gradient norms that must be finite, looked at without making a GPU wait."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class NonFiniteLossError(RuntimeError):
    """Loss, gradient or weights became NaN or infinite; the message names the step and the rows, and says what to try.

    No checkpoint of such weights is ever published.
    """


@dataclass(frozen=True)
class _Pending:
    value: Tensor  # in page-locked memory, once `arrived`
    arrived: Any  # torch.cuda.Event
    message: Callable[[float], str]


class FiniteWatch:
    """Raises `NonFiniteLossError` for what is not finite.

    On a CPU at once. On a GPU, whoever reads a number waits for everything queued before it, and what follows is queued
    too late: half the time of a small model's step. So there the number is copied aside and read when it has arrived,
    during a later step at the latest `behind` numbers on; `settle` is called before anything is made of the weights.
    """

    def __init__(self, behind: int = 32):
        self.behind = behind
        self._pending: deque[_Pending] = deque()

    def watch(self, value: Tensor, message: Callable[[float], str]) -> None:
        """`value`: one number. `message`: what to say of it if it is not finite."""
        value = value.detach()
        if value.device.type != "cuda":
            _check(float(value), message)
            return
        kept = torch.empty((), dtype=torch.float32, pin_memory=True)
        kept.copy_(value, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._pending.append(_Pending(kept, arrived, message))
        self.settle(self.behind)

    def settle(self, behind: int = 0) -> None:
        """Look at all that has arrived, and wait until no more than `behind` numbers are left to look at."""
        while self._pending:
            first = self._pending[0]
            if len(self._pending) <= behind and not first.arrived.query():
                return
            first.arrived.synchronize()
            self._pending.popleft()
            _check(float(first.value), first.message)


def _check(value: float, message: Callable[[float], str]) -> None:
    if value - value != 0:  # NaN or infinite
        raise NonFiniteLossError(message(value))


def advice(what: str, step: int, rows: list[str], folder: str) -> str:
    """What to tell of a step that went wrong: `rows` are the ids of those it read."""
    shown = ", ".join(rows[:16]) + (f" and {len(rows) - 16} more" if len(rows) > 16 else "")
    read = f"; rows of the batch: {shown}" if rows else ""
    return (
        f"{what} at step {step}{read}. The checkpoints in {folder} are intact. Try a lower learning_rate or a longer "
        "warmup, max_grad_norm: 1.0, dtype: float32 with bf16: true instead of pure 16-bit weights"
        f"{', and look at these rows' if rows else ''}."
    )
