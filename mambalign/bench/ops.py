"""One op among contestants: results and every gradient beside float64 first, then times in turn."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mambalign.bench.measure import NoNumbers, Row, compete, relative_error, say

BOUNDS = {torch.bfloat16: 1e-2, torch.float32: 1e-5}  # relative errors that ours may have, or the peer's where larger


def unchanged(tensors: list[Tensor]) -> list[Tensor]:
    return tensors


@dataclass(frozen=True)
class Contestant:
    """`apply(**given)`, the gradients of its outputs, and how its results are brought to the layout of ours."""

    apply: Callable[..., Any]
    given: dict[str, Tensor]
    d_outputs: tuple[Tensor, ...]
    back: Callable[[list[Tensor]], list[Tensor]] = unchanged

    def forward(self) -> Any:
        return self.apply(**self.given)

    def both(self) -> list[Tensor]:
        """The outputs and the gradient of everything given."""
        outputs = self.forward()
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = torch.autograd.grad(outputs, list(self.given.values()), self.d_outputs)
        return [*(output.detach() for output in outputs), *gradients]

    def exact(self) -> list[Tensor]:
        """The same in float64, by the PyTorch backend."""
        given = {name: value.detach().double().requires_grad_() for name, value in self.given.items()}
        d_outputs = tuple(d.double() for d in self.d_outputs)
        return Contestant(partial(self.apply, backend="torch"), given, d_outputs).both()


Cases = dict[str, Contestant]


def rows_first(batch: int, tensor: Tensor) -> Tensor:
    """`[T, D]` as the peers have it, `[batch, D, T / batch]`."""
    return tensor.detach().view(batch, -1, tensor.shape[1]).transpose(1, 2).contiguous()


def channels_last(results: list[Tensor]) -> list[Tensor]:
    return [x.transpose(1, 2).flatten(0, 1) if x.dim() == 3 else x for x in results]


def check(op: str, cases: Cases, dtype: torch.dtype) -> Row:
    """Relative errors by contestant and tensor, of outputs and gradients beside float64.

    Raises:
        NoNumbers: "ours" is further off than `BOUNDS` and than every peer, or a second run gives other bits.
    """
    ours, truth = cases["ours"], cases["ours"].exact()
    names = [f"y{n + 1}" if n else "y" for n in range(len(ours.d_outputs))] + list(ours.given)
    results = {who: case.back(case.both()) for who, case in cases.items()}
    errors = {
        who: [relative_error(a, b) for a, b in zip(result, truth, strict=True)] for who, result in results.items()
    }
    for who, row in errors.items():
        named = "  ".join(f"{n} {e:.1e}" for n, e in zip(names, row, strict=True))
        say(f"{str(dtype).removeprefix('torch.'):>8}, {op}, {who}: {named}")
    peers = [row for who, row in errors.items() if who != "ours"]
    # A peer's NaN excuses nothing.
    allowed = [max([BOUNDS[dtype], *(row[i] for row in peers if math.isfinite(row[i]))]) for i in range(len(names))]
    if not all(e <= a for e, a in zip(errors["ours"], allowed, strict=True)):
        raise NoNumbers(f"{op}: ours is further off than it may be: no numbers")
    if not all(torch.equal(a, b) for a, b in zip(results["ours"], ours.both(), strict=True)):
        raise NoNumbers(f"{op}: a second run gives other bits: no numbers")
    return {who: dict(zip(names, row, strict=True)) for who, row in errors.items()}


def measure(
    op: str, shape: str, cases: Cases, repeats: int, burst: int = 5, seconds: float = float("inf")
) -> list[Row]:
    """A row for each that had enough memory: forward, and forward + backward; ms with quartiles, peak GiB."""
    with torch.no_grad():
        forward = compete({who: case.forward for who, case in cases.items()}, repeats, burst=burst, seconds=seconds)
    both = compete({who: case.both for who, case in cases.items()}, repeats, burst=burst, seconds=seconds)
    peer = next((both[who]["ms"] for who in both if not who.startswith("ours")), None)
    rows = []
    for who in both:
        row: Row = {"op": op, "shape": shape, "who": who}
        for name, times in (("forward", forward[who]), ("both", both[who])):
            row |= {f"{name}_{key}": times[key] for key in ("ms", "ms_low", "ms_high")}
        rows.append(row | {"peak_gib": both[who]["gib"]})
        ratio = f", {peer / both[who]['ms']:.2f}x the peer" if peer and who.startswith("ours") else ""
        say(
            f"{op:>15} {shape:>24} {who:>26}: forward {forward[who]['ms']:9.3f} ms, forward + backward "
            f"{both[who]['ms']:9.3f} ms, {both[who]['gib']:5.2f} GiB{ratio}"
        )
    return rows
