"""The curves of a run, drawn from its `metrics.jsonl`: what the model card shows and what one looks at first."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mambalign.recipe import UserError
from mambalign.train.callbacks import METRICS, read_metrics

CURVES = "curves.svg"
LABELS = {"lengths/accuracies": "by length alone"}
FORMATS = (".svg", ".png", ".pdf")
# Of every figure of the project: runs, benchmarks, the demo's page (which gives it the page's colours).
STYLE: dict[str, Any] = {
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 9,
    "font.size": 8,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes a page's font
    "svg.hashsalt": "mambalign",  # the same file every time
}
# (title, metrics in the training lines; those that are there are drawn, each with its `eval_` twin)
PANELS = (
    ("loss", ("loss",)),
    ("tokens per second", ("tokens_per_second",)),
    ("rewards", ("rewards/chosen", "rewards/rejected")),
    ("share of pairs ranked right", ("rewards/accuracies", "lengths/accuracies")),
)


def draw(folders: Sequence[Path], target: Path) -> Path:
    """One row of panels for each run folder, in the format that the target's ending names.

    Raises:
        UserError: a folder without logged metrics, or an ending that names no format.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    if target.suffix not in FORMATS:
        raise UserError(f"cannot draw to {target}: give a file name that ends in {', '.join(FORMATS)}")
    rows = [(folder, _series(folder)) for folder in folders]
    columns = max(len(_panels(series)) for _, series in rows)
    with rc_context(STYLE):
        figure = Figure(figsize=(3.6 * columns, 2.7 * len(rows)), layout="constrained")
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for axes, (folder, series) in zip(grid, rows, strict=True):
            for axis in axes:
                axis.set_visible(False)
            for axis, (title, names) in zip(axes, _panels(series), strict=False):
                axis.set_visible(True)
                _panel(axis, f"{folder.name}: {title}", names, series)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None, dpi=110)
    return target


def _series(folder: Path) -> dict[str, list[tuple[int, float]]]:
    lines = read_metrics(folder / METRICS)
    series: dict[str, list[tuple[int, float]]] = {}
    for line in lines:
        for name, value in line.items():
            if isinstance(value, int | float):
                series.setdefault(name, []).append((line["step"], value))
    if not _panels(series):
        raise UserError(f"{folder} holds no {METRICS} with anything in it to draw; is it a run folder?")
    return series


def _panels(series: dict[str, Any]) -> list[tuple[str, tuple[str, ...]]]:
    return [(title, tuple(n for n in names if n in series)) for title, names in PANELS if names[0] in series]


def _panel(axis: Any, title: str, names: tuple[str, ...], series: dict[str, list[tuple[int, float]]]) -> None:
    for number, name in enumerate(names):
        color = f"C{number}"
        label = LABELS.get(name, name.removeprefix("rewards/"))
        axis.plot(*zip(*series[name], strict=True), color=color, alpha=0.55, linewidth=1, label=label)
        held_out = series.get(f"eval_{name}")
        if held_out:
            steps, values = zip(*held_out, strict=True)
            axis.plot(steps, values, color=color, marker="o", markersize=3, label=f"{label}, held out")
    axis.set_title(title)
    axis.set_xlabel("step")
    if len(names) > 1 or f"eval_{names[0]}" in series:
        axis.legend()
