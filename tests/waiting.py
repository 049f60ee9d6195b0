"""Waiting for what another thread or process does: for the thing itself, however slow the machine is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

PATIENCE = 300.0  # seconds, after which a thing will not happen any more; where it does, this costs nothing


def until(holds: Callable[[], Any], what: str | Callable[[], str] = "it did not come to that") -> None:
    """Return once `holds()`.

    Raises:
        AssertionError: with `what`, when it does not come to that, or `holds` raises one because it never can.
    """
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end, what if isinstance(what, str) else what()
        time.sleep(0.005)
