"""What the benchmark scripts share beside `mambalign.bench`: their options, and batches that stand for all."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mambalign.bench.measure import DEVICE, Row, environment, free_memory, result_of, save, write

RESULTS = Path(__file__).parent / "results"


def arguments(description: str, name: str, repeats: int = 20) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json", help="the plot is written beside it")
    parser.add_argument("--repeats", type=int, default=repeats, help="timed runs of each contestant, in turn")
    parser.add_argument(
        "--tiny", action="store_true", help="tiny shapes, on a CPU too: tries the script, its figures mean nothing"
    )
    return parser


def parse(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """The options, once it is sure that there is something to measure on; prints on what."""
    options = parser.parse_args(argv)
    if DEVICE.type != "cuda" and not options.tiny:
        raise SystemExit("no CUDA device: nothing to measure (--tiny tries the script without one)")
    torch.manual_seed(0)
    print(" | ".join(f"{k} {v}" for k, v in environment().items()), flush=True)
    return options


def largest_difference(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Of log-probs of sequences, over the exact one, or over 40 where that is less: noise of a token or two."""
    return float(((ours - exact).abs() / exact.abs().clamp(min=40.0)).max())


def fits(run: Callable[[int], Any], largest: int) -> int:
    """The largest of `largest`, its half, its quarter ... rows at a time that `run` has memory for."""
    rows = largest
    while True:
        try:
            run(rows)
            return rows
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        free_memory()
        rows //= 2
        print(f"out of memory: {rows} at a time", flush=True)


def spread(batches: list[Any], size: Callable[[Any], int], count: int) -> list[Any]:
    """`count` batches that stand for all: the middle one of each of `count` equal parts of the batches by size."""
    ordered = sorted(batches, key=size)
    count = min(count, len(ordered))
    return [ordered[(2 * part + 1) * len(ordered) // (2 * count)] for part in range(count)]


def keep(benchmark: str, path: Path, rows: list[Row]) -> None:
    """Write what is measured so far."""
    save(result_of(benchmark, rows), path)


def finish(benchmark: str, path: Path, rows: list[Row]) -> None:
    """Write the JSON, and the plot beside it."""
    from plot import PLOTS

    write(result_of(benchmark, rows), path, plots=PLOTS)
