"""What all benchmarks share: contestants in turn in one process, medians, peak memory, the environment, the JSON."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import gc
import importlib
import importlib.metadata
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from mambalign.support import write_text

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PEERS = (("mamba-ssm", "mamba_ssm.ops.selective_scan_interface"), ("causal-conv1d", "causal_conv1d"))
Row = dict[str, Any]
Result = dict[str, Any]  # {"benchmark", "environment", "settings", "rows", "summary"}


class NoNumbers(SystemExit):
    """A check failed, so no figure may be shown: the process ends with this sentence and exit code 1."""


def say(message: str) -> None:
    """Progress, to stderr: stdout is for results."""
    print(message, file=sys.stderr, flush=True)


def environment() -> dict[str, str]:
    """Date, machine and versions: what a figure means nothing without."""
    import transformers

    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    for name, needed in PEERS:
        try:
            importlib.import_module(needed)
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "of unknown version"
        except ImportError:
            versions[name] = "not installed: no peer"
    card = torch.cuda.get_device_name() if DEVICE.type == "cuda" else "none"
    machine = f"{os.cpu_count()} cores, {platform.machine()}, threads: {torch.get_num_threads()}"
    return {"date": datetime.date.today().isoformat(), "card": card, "machine": machine, **versions}


# ------------------------------------------------------------------------------------------------------ time, memory


def compete(
    contestants: dict[str, Callable[[], Any]],
    repeats: int,
    warmup: int = 2,
    burst: int = 1,
    seconds: float = float("inf"),
) -> dict[str, dict[str, float]]:
    """Milliseconds (median, and quartiles as `ms_low`, `ms_high`) and peak GiB of each, measured in turn.

    `gib` is above what was there before, NaN where it cannot be measured. `burst` calls are timed together, as a model
    makes them: then what the host does for one is hidden by another. After `seconds` no new turn begins, except to make
    them three. A contestant that runs out of memory is left out, aloud.
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
                elapsed, peak = timed(run, burst)
            except torch.OutOfMemoryError:
                del times[name]
            if name not in times:  # past the exception, which holds on to the tensors
                say(f"{name}: out of memory")
                free_memory()
                continue
            peaks[name] = peak if turn == 0 else max(peak, peaks[name])
            if turn >= warmup:
                times[name].append(elapsed)
    return {name: {**spread_of(t, "ms"), "gib": peaks[name]} for name, t in times.items() if t}


def spread_of(values: Sequence[float], name: str) -> dict[str, float]:
    """Median and quartiles, as `name`, `name_low` and `name_high`."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {name: statistics.median(values), f"{name}_low": low, f"{name}_high": high}


def timed(run: Callable[[], Any], burst: int = 1) -> tuple[float, float]:
    """(milliseconds of one of `burst` calls, peak GiB above what was there before)."""
    if DEVICE.type != "cuda":
        before = _start_peak()
        began = time.perf_counter()
        for _ in range(burst):
            run()
        return (time.perf_counter() - began) / burst * 1e3, _resident("VmHWM") - before
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(burst):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / burst, (torch.cuda.max_memory_allocated() - held) / 2**30


def _start_peak() -> float:
    """Linux forgets the process's peak of resident memory; returns what is resident, once freed blocks are returned."""
    try:
        with contextlib.suppress(AttributeError):  # a C library that is not glibc
            ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return float("nan")
    return _resident("VmRSS")


def _resident(name: str) -> float:
    """GiB that /proc/self/status gives for `name`; NaN where there is none."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("nan")
    return next((int(line.split()[1]) / 2**20 for line in lines if line.startswith(f"{name}:")), float("nan"))


def memory_left() -> float:
    """GiB of the machine that may still be asked for; infinite where nobody knows."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return float("inf")
    return next((int(x.split()[1]) / 2**20 for x in lines if x.startswith("MemAvailable:")), float("inf"))


def free_memory() -> None:
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.empty_cache()


# ------------------------------------------------------------------------------------------------------- correctness


def relative_error(ours: torch.Tensor, exact: torch.Tensor) -> float:
    """Norm of the difference over the norm of the exact one; NaN counts as infinite."""
    error = float((ours.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-30))
    return error if error == error else float("inf")


# ------------------------------------------------------------------------------------------------------------- files


def result_of(benchmark: str, rows: list[Row], settings: Row | None = None, summary: Row | None = None) -> Result:
    """What a benchmark writes: its rows, under what settings and on what they were measured."""
    found = {"benchmark": benchmark, "environment": environment(), "settings": settings or {}, "rows": rows}
    return found | ({"summary": summary} if summary else {})


def save(result: Result, path: Path) -> None:
    """The JSON alone: what is measured so far, since a long run may be cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, as_json(result) + "\n")


def write(result: Result, path: Path, plot: Path | None = None, plots: dict[str, Any] | None = None) -> None:
    """The JSON first, then the figure (`plot`, or a PNG beside it), where matplotlib is installed; says what it wrote.

    plots: how benchmarks are drawn; default: `figures.PLOTS`.
    """
    save(result, path)
    say(f"written to {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        how = "mambalign bench plot" if plots is None else "python benchmarks/plot.py"
        say(f"no plot: matplotlib is not installed; where it is, {how} {path}")
        return
    from mambalign.bench import figures

    say(f"plotted to {figures.draw([path], plot, plots)}")


def as_json(result: Result) -> str:
    """Strict JSON: a number that is none (not measured) is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: plain(one) for name, one in value.items()}
        if isinstance(value, list | tuple):
            return [plain(one) for one in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(result), indent=2, allow_nan=False)
