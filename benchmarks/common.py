"""What the GPU benchmarks share: correctness before numbers, contestants in turn in one run, medians, peak memory."""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib
import importlib.metadata
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


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


def environment() -> dict[str, str]:
    """Date, card and versions: what a figure means nothing without."""
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name, needed in (("mamba-ssm", "mamba_ssm.ops.selective_scan_interface"), ("causal-conv1d", "causal_conv1d")):
        try:
            importlib.import_module(needed)
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "of unknown version"
        except ImportError:
            versions[name] = "not installed: no peer"
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "none"
    return {"date": datetime.date.today().isoformat(), "card": card, **versions}


def compete(
    contestants: dict[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 2,
    burst: int = 1,
    seconds: float = float("inf"),
) -> dict[str, dict[str, float]]:
    """Median milliseconds and peak GiB (above what was there before) of each, measured in turn.

    `burst` calls are timed together, as a model makes them: then what the host does for one is hidden by another.
    After `seconds` no new turn begins, except to make them three. A contestant that runs out of memory is left out,
    aloud.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    peaks: dict[str, float] = {}
    deadline = time.monotonic() + seconds
    for turn in range(warmup + repeats):
        if turn - warmup >= 3 and time.monotonic() > deadline:
            break
        for name, run in contestants.items():
            if name not in times:
                continue
            try:
                elapsed, peak = _timed(run, burst)
            except torch.OutOfMemoryError:
                del times[name]
            if name not in times:  # past the exception, which holds on to the tensors
                print(f"{name}: out of memory", flush=True)
                free_memory()
                continue
            peaks[name] = max(peak, peaks.get(name, 0.0))
            if turn >= warmup:
                times[name].append(elapsed)
    return {name: {"ms": statistics.median(t), "gib": peaks[name]} for name, t in times.items() if t}


def _timed(run: Callable[[], Any], burst: int) -> tuple[float, float]:
    if DEVICE.type != "cuda":
        began = time.perf_counter()
        for _ in range(burst):
            run()
        return (time.perf_counter() - began) / burst * 1e3, 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(burst):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / burst, (torch.cuda.max_memory_allocated() - before) / 2**30


def free_memory() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of the exact one; NaN counts as infinite."""
    error = float((ours.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))
    return error if error == error else float("inf")


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


def write(benchmark: str, path: Path, rows: list[dict[str, Any]]) -> None:
    """The JSON first, then the plot beside it, where matplotlib is installed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"benchmark": benchmark, "environment": environment(), "rows": rows}, indent=2) + "\n")
    print(f"\nwritten to {path}", flush=True)
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print(f"no plot: matplotlib is not installed; where it is, python benchmarks/plot.py {path}")
        return
    from plot import draw

    print(f"plotted to {draw([path])}")
