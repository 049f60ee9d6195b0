"""Plots of what the GPU benchmarks wrote.

    python benchmarks/plot.py benchmarks/results/*.json     # several files of one benchmark become one plot

Each plot lies beside the first file it is made from. cpu.json, which has no plot, is passed over.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mambalign.bench.figures import PLOTS as VERBS
from mambalign.bench.figures import colour, draw, grouped, mark
from mambalign.bench.measure import Row


def _bars(axes: Any, rows: Sequence[Row], values: Sequence[float], names: Sequence[str], said: Sequence[str]) -> None:
    """Horizontal bars, the first on top, each with what is said of it at its end."""
    bars = axes.barh(range(len(rows)), values, color=[colour(row["who"]) for row in rows])
    axes.bar_label(bars, said, padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.spines[["top", "right"]].set_visible(False)


def ops(rows: list[Row], new: Callable[..., Any]) -> Any:
    """Forward + backward of every shape, a panel an op, over what the peer takes for the same shape."""
    groups = grouped(rows, "op")
    most = max(len(some) for some in groups.values())
    figure, panels = new(-(-len(groups) // 2), 2, figsize=(12, 1 + 0.38 * most * -(-len(groups) // 2)))
    for axes in panels[len(groups) :]:
        axes.remove()
    for axes, ((op,), some) in zip(panels, groups.items(), strict=False):
        whole = {row["shape"]: row["both_ms"] for row in reversed(some)}
        whole |= {row["shape"]: row["both_ms"] for row in some if not row["who"].startswith("ours")}
        _bars(
            axes,
            some,
            [row["both_ms"] / whole[row["shape"]] for row in some],
            [f"{row['shape']}, {row['who']}" for row in some],
            [f"{row['both_ms']:.3g} ms" for row in some],
        )
        axes.set(title=op, xlabel="time, forward + backward, over the peer's")
    return figure


def train_step(rows: list[Row], new: Callable[..., Any]) -> Any:
    """Speed and memory by length, a column a size; open marks: blocks recomputed in the backward pass."""
    sizes = grouped([row for row in rows if row["weights"] == "bf16"], "size")
    sizes = {size: some for size, some in sizes.items() if len({row["length"] for row in some}) > 1} or sizes
    figure, panels = new(2, len(sizes), figsize=(4.8 * len(sizes), 7), sharex="col")
    for column, ((size,), some) in enumerate(sizes.items()):
        for (who, recompute), line in grouped(some, "who", "recompute").items():
            line = sorted(line, key=lambda row: row["length"])
            for axes, value in zip(panels[column :: len(sizes)], ("tokens_per_second", "peak_gib"), strict=True):
                axes.plot(
                    [row["length"] for row in line],
                    [row[value] for row in line],
                    color=colour(who),
                    marker=mark(who),
                    markerfacecolor="white" if recompute else colour(who),
                    linestyle="--" if recompute else "-",
                    label=f"{who}{', recomputed' if recompute else ''}{' in part' if recompute == 'selective' else ''}",
                )
        panels[column].set(title=f"{size}, bf16", ylabel="tokens/s, forward + backward", ylim=(0, None))
        panels[column].legend(fontsize=8)
        lower = panels[len(sizes) + column]
        lower.set(xlabel="tokens in a sequence", ylabel="peak memory, GiB", ylim=(0, None))
        lower.set_xscale("log", base=2)
        lengths = sorted({row["length"] for row in some})
        lower.set_xticks(lengths, [f"{length:,}" for length in lengths])
        panels[column].yaxis.set_major_formatter("{x:,.0f}")
    return figure


def sft_real(rows: list[Row], new: Callable[..., Any]) -> Any:
    return _speed_and_memory(rows, new, ("size", "weights"), "tokens_per_second", "real tokens/s")


def dpo_real(rows: list[Row], new: Callable[..., Any]) -> Any:
    rows = [row for row in rows if not row["who"].startswith("reference")]
    return _speed_and_memory(rows, new, ("size", "data"), "pairs_per_second", "pairs/s")


def _speed_and_memory(rows: list[Row], new: Callable[..., Any], keys: tuple[str, str], value: str, unit: str) -> Any:
    """A line of two panels for every case."""
    groups = grouped(rows, *keys)
    heights = [1 + 0.3 * len(some) for some in groups.values()]
    figure, panels = new(len(groups), 2, figsize=(11, sum(heights) + 1), height_ratios=heights)
    for line, (case, some) in enumerate(groups.items()):
        speed, memory = panels[2 * line : 2 * line + 2]
        speeds, peaks = [row[value] for row in some], [row["peak_gib"] for row in some]
        _bars(
            speed, some, speeds, [row["who"] for row in some], [f"{x:,.4g}" if x < 1e3 else f"{x:,.0f}" for x in speeds]
        )
        _bars(memory, some, peaks, [""] * len(some), [f"{x:.1f}" for x in peaks])
        speed.set(title=", ".join(case), xlabel=f"{unit}, forward + backward")
        memory.set(xlabel="peak memory, GiB")
    return figure


PLOTS = {"ops": ops, "train_step": train_step, "sft_real": sft_real, "dpo_real": dpo_real, **VERBS}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, nargs="+")
    by_benchmark: dict[str, list[Path]] = {}
    for path in parser.parse_args(argv).json:
        by_benchmark.setdefault(json.loads(path.read_text()).get("benchmark", ""), []).append(path)
    for benchmark, paths in by_benchmark.items():
        if benchmark in PLOTS:
            print(draw(paths, plots=PLOTS))


if __name__ == "__main__":
    main()
