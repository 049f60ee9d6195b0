"""report.html: one self-contained page that shows what the stages did; figures are inline SVG in the page's theme."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup

from mambalign.train import curves

Metrics = list[dict[str, Any]]
Line = tuple[str, str, tuple[list[float], list[float]]]  # label, colour of THEME, (steps, values)
# Colours that stand for the page's CSS variables: matplotlib wants a real colour, the page wants to change it.
THEME = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--base)",
    "#050505": "var(--sft)",
    "#060606": "var(--dpo)",
    "#070707": "var(--bad)",
}
INK, MUTED, LINE, BASE, SFT, DPO, BAD = THEME
STYLE = curves.STYLE | {
    "axes.edgecolor": LINE,
    "axes.grid.axis": "y",
    "axes.labelcolor": MUTED,
    "font.size": 9,
    "grid.alpha": 1.0,
    "grid.color": LINE,
    "legend.labelcolor": INK,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
}


def read_metrics(path: Path) -> Metrics:
    """The lines of a run folder's metrics.jsonl; a last line torn by a kill is left out."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


def series(metrics: Metrics, key: str) -> tuple[list[float], list[float]]:
    """(steps, values) of the log lines that have `key`; of a step logged twice (a resumed run), the last."""
    points = {row["step"]: row[key] for row in metrics if row.get(key) is not None and "step" in row}
    return list(points), [float(value) for value in points.values()]


def figure(title: str, lines: Sequence[Line]) -> Markup:
    """An inline SVG of `lines`; held-out values, which are few, are drawn as dots too."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        canvas = Figure(figsize=(4.6, 2.7), layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.add_subplot()
        for label, colour, (x, y) in lines:
            marker = "o" if label == "held-out" else ""
            axes.plot(x, y, label=label, color=colour, linewidth=1.8, marker=marker, markersize=4)
        axes.set_xlabel("step")
        axes.tick_params(length=0)
        axes.spines["left"].set_visible(False)
        if len(lines) > 1:
            axes.legend(loc="best", fontsize=8)
        out = io.StringIO()
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in THEME.items():
        svg = svg.replace(colour, variable)
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1))


def figures(metrics: dict[str, Metrics]) -> list[dict[str, Any]]:
    """Every figure that the metrics have the numbers for: {"title", "note", "svg"}."""
    plans: list[tuple[str, str, str, list[tuple[str, str, str]]]] = [
        (
            "cpt",
            "Pre-training loss",
            "cross-entropy per token, nats",
            [("training", BASE, "loss"), ("held-out", INK, "eval_loss")],
        ),
        (
            "sft",
            "SFT loss",
            "cross-entropy per assistant token, nats",
            [("training", SFT, "loss"), ("held-out", INK, "eval_loss")],
        ),
        (
            "dpo",
            "DPO loss",
            "per pair: sigmoid, plus rpo_alpha times the chosen reply's cross-entropy",
            [("training", DPO, "loss"), ("held-out", INK, "eval_loss")],
        ),
        (
            "dpo",
            "Implicit rewards",
            "beta times the log-ratio to the reference model",
            [("chosen", DPO, "rewards/chosen"), ("rejected", BAD, "rewards/rejected")],
        ),
        (
            "dpo",
            "Reward margin",
            "chosen minus rejected",
            [("training", DPO, "rewards/margins"), ("held-out", INK, "eval_rewards/margins")],
        ),
        (
            "dpo",
            "Reward accuracy",
            "share of pairs whose chosen reply has the higher reward",
            [("training", DPO, "rewards/accuracies"), ("held-out", INK, "eval_rewards/accuracies")],
        ),
    ]
    drawn = []
    for stage, title, note, wanted in plans:
        lines = [(label, colour, series(metrics.get(stage, []), key)) for label, colour, key in wanted]
        lines = [line for line in lines if line[2][0]]
        if lines:
            drawn.append({"title": title, "note": note, "svg": figure(title, lines)})
    return drawn


def percent(value: float, digits: int = 0) -> str:
    return "–" if math.isnan(value) else f"{100 * value:.{digits}f}%"


def render(results: dict[str, Any], metrics: dict[str, Metrics]) -> str:
    """The page. `results` as `mambalign.demo.main` writes it to evaluation.json; `metrics` by stage."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    return environment.get_template("report.html.j2").render(**results, figures=figures(metrics))


def write_report(folder: Path, results: dict[str, Any]) -> Path:
    """Draws `folder`/report.html from `results` and the metrics of the stages' run folders under `folder`."""
    metrics = {stage: read_metrics(folder / stage / "metrics.jsonl") for stage in results["stages"]}
    page = folder / "report.html"
    page.write_text(render(results, metrics), encoding="utf-8")
    return page
