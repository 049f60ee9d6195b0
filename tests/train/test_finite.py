"""Numbers of a GPU are looked at later, but never too late, and never forgotten."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from mambalign.train import finite
from mambalign.train.finite import FiniteWatch, NonFiniteLossError


class Late:
    """A CUDA number as far as `FiniteWatch` looks: it arrives when the test says so."""

    device = torch.device("cuda")

    def __init__(self, value: float):
        self.value = value

    def detach(self) -> Late:
        return self


class Event:
    arrived: ClassVar[list[Event]] = []

    def record(self) -> None:
        pass

    def query(self) -> bool:
        return self in Event.arrived

    def synchronize(self) -> None:
        Event.arrived.append(self)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> FiniteWatch:
    class Kept:
        def copy_(self, value: Late, non_blocking: bool) -> None:
            self.value = value.value

        def __float__(self) -> float:
            return self.value

    monkeypatch.setattr(Event, "arrived", [])
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(finite.torch, "empty", lambda *shape, **options: Kept())
    return FiniteWatch(behind=2)


def say(step: int) -> Any:
    return lambda value: f"loss is {value} at step {step}"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_on_a_cpu_at_once(value: float) -> None:
    FiniteWatch().watch(torch.tensor(3.0), say(1))
    with pytest.raises(NonFiniteLossError, match="at step 2"):
        FiniteWatch().watch(torch.tensor(value), say(2))


def test_a_number_that_has_not_arrived_is_not_waited_for(watch: FiniteWatch) -> None:
    watch.watch(Late(float("nan")), say(1))  # type: ignore[arg-type]
    watch.watch(Late(1.0), say(2))  # type: ignore[arg-type]
    with pytest.raises(NonFiniteLossError, match="at step 1"):
        watch.watch(Late(1.0), say(3))  # type: ignore[arg-type]


def test_one_that_has_arrived_is_read(watch: FiniteWatch) -> None:
    watch.watch(Late(float("inf")), say(7))  # type: ignore[arg-type]
    watch._pending[0].arrived.synchronize()
    with pytest.raises(NonFiniteLossError, match="loss is inf at step 7"):
        watch.settle(2)


def test_before_a_save_all_are_waited_for(watch: FiniteWatch) -> None:
    watch.watch(Late(0.5), say(1))  # type: ignore[arg-type]
    watch.watch(Late(float("nan")), say(2))  # type: ignore[arg-type]
    with pytest.raises(NonFiniteLossError, match="at step 2"):
        watch.settle()
    watch.settle()  # said once
