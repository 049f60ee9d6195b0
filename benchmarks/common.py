"""What the GPU benchmarks share: correctness before numbers, contestants in turn in one run, medians, peak memory."""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def arguments(description: str, name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("--repeats", type=int, default=20, help="timed runs of each contestant, in turn")
    return parser


def environment() -> dict[str, str]:
    """Date, card and versions: what a figure means nothing without."""
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    try:
        import mamba_ssm  # noqa: F401

        versions["mamba-ssm"] = "2.3.2.post1, CUDA kernels built for this card"
    except ImportError:
        versions["mamba-ssm"] = "not installed: no peer"
    return {"date": datetime.date.today().isoformat(), "card": torch.cuda.get_device_name(), **versions}


def compete(
    contestants: dict[str, Callable[[], Any]], repeats: int, warmup: int = 2, burst: int = 1
) -> dict[str, dict[str, float]]:
    """Median milliseconds and peak GiB (above what was there before) of each, measured in turn.

    `burst` calls are timed together, as a model makes them: then what the host does for one is hidden by another.

    A contestant that runs out of memory is left out, aloud.
    """
    times: dict[str, list[float]] = {name: [] for name in contestants}
    peaks: dict[str, float] = {}
    for turn in range(warmup + repeats):
        for name, run in contestants.items():
            if name in peaks and peaks[name] < 0:
                continue
            try:
                elapsed, peak = _timed(run, burst)
            except torch.OutOfMemoryError:
                print(f"{name}: out of memory", flush=True)
                torch.cuda.empty_cache()
                peaks[name] = -1.0
                continue
            peaks[name] = peak
            if turn >= warmup:
                times[name].append(elapsed)
    return {name: {"ms": statistics.median(t), "gib": peaks[name]} for name, t in times.items() if t}


def _timed(run: Callable[[], Any], burst: int) -> tuple[float, float]:
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


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of the exact one; NaN counts as infinite."""
    error = float((ours.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))
    return error if error == error else float("inf")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")
    print(f"\nwritten to {path}")
