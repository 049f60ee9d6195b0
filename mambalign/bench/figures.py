"""Figures of what the benchmarks wrote, in the project's one style (`train.curves.STYLE`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from mambalign.bench.measure import Row
from mambalign.recipe import UserError
from mambalign.train.curves import FORMATS, STYLE

# Okabe and Ito's colours, which most colour-blind readers tell apart; marks and dashes say the same without colour.
OURS, PEER, TRANSFORMER, OTHER, FLOOR = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#666666"
New = Callable[..., Any]  # (lines, columns, **options) -> (figure, flat list of axes)


def colour(who: str) -> str:
    if "mamba-ssm" in who or "conv1d" in who:
        return PEER
    if who in ("transformer", "PyTorch"):
        return TRANSFORMER
    return OTHER if who in ("transformers' Mamba", "plain loop") else OURS


def mark(who: str) -> str:
    return {PEER: "s", TRANSFORMER: "^", OTHER: "D"}.get(colour(who), "o")


def grouped(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    return groups


def line(axes: Any, rows: Sequence[Row], x: str, y: str, who: str, label: str = "", **style: Any) -> None:
    """`y` over `x`, with a band from `y_low` to `y_high` where the rows have them."""
    rows = sorted((row for row in rows if row.get(y) is not None), key=lambda row: row[x])
    if not rows:
        return
    kind = {"color": colour(who), "marker": mark(who), "markersize": 4, "linewidth": 1.4, "label": label or who}
    at = [row[x] for row in rows]
    axes.plot(at, [row[y] for row in rows], **kind | style)
    if all(row.get(f"{y}_low") is not None for row in rows):
        low, high = ([row[f"{y}_{end}"] for row in rows] for end in ("low", "high"))
        axes.fill_between(at, low, high, color=colour(who), alpha=0.2, linewidth=0)


def short(tokens: float) -> str:
    """512, 2k, 128k, 1M.

    >>> short(512), short(2048), short(1 << 20)
    ('512', '2k', '1M')
    """
    for size, unit in ((1 << 20, "M"), (1 << 10, "k")):
        if tokens >= size and tokens % size == 0:
            return f"{int(tokens) // size}{unit}"
    return f"{tokens:,.0f}"


def over_lengths(axes: Any, lengths: Iterable[int], label: str) -> None:
    """A logarithmic axis of tokens; every second tick where there are many."""
    ticks = sorted(set(lengths))
    ticks = ticks[:: 1 + (len(ticks) > 7)]
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [short(tick) for tick in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label)


def shared_legend(figure: Any, panels: Sequence[Any], columns: int = 4, title: str | None = None) -> None:
    """One legend of all panels under them, where it covers no data."""
    named: dict[str, Any] = {}
    for axes in panels:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named.setdefault(label, handle)
    where = {"loc": "outside lower center", "ncols": min(columns, len(named)), "title": title, "title_fontsize": 7}
    figure.legend(named.values(), named.keys(), **where)


# --------------------------------------------------------------------------------------------------- the four verbs


def length(rows: list[Row], new: New) -> Any:
    """Time and memory a token, a line of panels a size; open marks: recomputed, crosses: out of memory."""
    sizes = grouped(rows, "size")
    figure, panels = new(len(sizes), 2, figsize=(7, 0.6 + 2.6 * len(sizes)), sharex="col")
    for number, ((size,), some) in enumerate(sizes.items()):
        time, memory = panels[2 * number : 2 * number + 2]
        per_token = [row | _per_token(row) if row["outcome"] == "measured" else row for row in some]
        for axes, value in ((time, "us"), (memory, "kib")):
            for (who,), one in grouped(per_token, "who").items():
                line(axes, one, "length", value, who, f"{who}, {one[0]['parameters_million']:,.0f}M parameters")
                again = [
                    {"length": row["length"], value: row[value]} for row in one if row["recompute"] and value in row
                ]
                style = {"markerfacecolor": "white", "linestyle": "", "label": "blocks recomputed"}
                line(axes, again, "length", value, who, **style)
            axes.set(yscale="log", title=f"{size}, {some[0]['weights']}" if len(sizes) > 1 else None)
            _out_of_memory(axes, per_token, value)
            plain_ticks(axes)
            over_lengths(axes, [row["length"] for row in rows], "tokens in a sequence")
        time.set_ylabel("time of a training step, µs/token")
        memory.set_ylabel("peak memory, KiB/token")
    shared_legend(figure, panels)
    return figure


def _per_token(row: Row) -> Row:
    us = {f"us{end}": 1e3 * row[f"ms{end}"] / row["tokens"] for end in ("", "_low", "_high")}
    return us if row["peak_gib"] is None else us | {"kib": row["peak_gib"] * 2**20 / row["tokens"]}


def _out_of_memory(axes: Any, rows: Sequence[Row], value: str) -> None:
    """A cross where each contestant first had too little memory, above its last point."""
    for (who,), some in grouped(rows, "who").items():
        lacking = [row["length"] for row in some if row["outcome"] == "out of memory"]
        before = [row[value] for row in some if row.get(value) is not None]
        if lacking:
            height = before[-1] if before else axes.get_ylim()[1]
            axes.plot(
                [min(lacking)],
                [height],
                marker="X",
                color=colour(who),
                linestyle="",
                markersize=7,
                label="out of memory",
            )


def plain_ticks(axes: Any) -> None:
    """Numbers as one writes them, 0.5 and 20, and enough of them, on a logarithmic vertical axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = axes.get_ylim()
    steps = (1.0, 2.0, 5.0) if high / low < 1e3 else (1.0,)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def scan(rows: list[Row], new: New) -> Any:
    """Time a token of one op, forward and with its backward pass, with the floors of the machine dashed."""
    figure, panels = new(1, 2, figsize=(7, 3.2), sharey=True)
    names = (("forward", "forward"), ("both", "forward + backward"))
    slow = max(row["both_ms"] / row["tokens"] for row in rows) > 0.02  # then in microseconds
    unit, scale = ("µs", 1e3) if slow else ("ns", 1e6)
    for axes, (value, title) in zip(panels, names, strict=True):
        for (who,), some in grouped(rows, "who").items():
            dashed = {"linestyle": ":"} if "segments" in who else {}
            per_token = [
                row | {f"time{end}": scale * row[f"{value}_ms{end}"] / row["tokens"] for end in ("", "_low", "_high")}
                for row in some
                if row.get(f"{value}_ms") is not None
            ]
            line(axes, per_token, "length", "time", who, **dashed)
        for floor, dash in (("bytes", "--"), ("exponentials", "-.")):
            some = [row for row in rows if row.get(f"{value}_{floor}_ms")]
            heights = {row["length"]: scale * row[f"{value}_{floor}_ms"] / row["tokens"] for row in some}
            if heights:
                at = sorted(heights)
                axes.plot(at, [heights[x] for x in at], dash, color=FLOOR, linewidth=1, label=f"floor: {floor}")
        axes.set(title=title)
        axes.set_yscale("log")
        over_lengths(axes, [row["length"] for row in rows], "tokens in a sequence")
    plain_ticks(panels[0])
    panels[0].set_ylabel(f"time of the scan, {unit}/token")
    shared_legend(figure, panels, columns=3)
    return figure


def decode(rows: list[Row], new: New) -> Any:
    """Tokens a second by batch, then time a token and memory by the length of what was read before."""
    figure, panels = new(1, 3, figsize=(10, 3.3))
    batches = [row for row in rows if row["case"] == "even"]
    for (who,), some in grouped(batches, "who").items():
        open_mark = {"markerfacecolor": "white", "linestyle": "--"} if "not exact" in who else {}
        line(panels[0], some, "batch", "tokens_per_second", who, **open_mark)
    sizes = sorted({row["batch"] for row in batches})
    panels[0].set_xscale("log", base=2)
    panels[0].set_xticks(sizes, [str(size) for size in sizes])
    panels[0].minorticks_off()
    panels[0].set(xlabel="answers at once", ylabel="tokens/s", yscale="log")
    contexts = [row for row in rows if row["case"] == "context"]
    for axes, value, label in zip(
        panels[1:], ("ms_per_token", "state_mib"), ("time, ms/token", "state or cache, MiB"), strict=True
    ):
        for (who,), some in grouped(contexts, "who").items():
            line(axes, some, "context", value, who)
            if value == "ms_per_token":
                floor = [{"context": row["context"], value: row.get("floor_ms")} for row in some]
                style = {"marker": "", "linestyle": ":", "label": "floor (dotted): weights and state read once"}
                line(axes, floor, "context", value, who, **style)
        over_lengths(axes, [row["context"] for row in contexts], "tokens read before")
        axes.set(ylabel=label, yscale="log")
    for axes in panels:
        plain_ticks(axes)
    shared_legend(figure, panels, columns=5)
    return figure


def perplexity(rows: list[Row], new: New) -> Any:
    """By position in a document, and by the length after which the state is reset; bands: 95% over documents."""
    figure, panels = new(1, 2, figsize=(7, 3.2), sharey=True)
    titles = ("position in the document", "read anew every")
    for axes, kind, x, title in zip(panels, ("position", "reset"), ("to", "length"), titles, strict=True):
        some = [row for row in rows if row["kind"] == kind]
        for (who, name), one in grouped(some, "who", "model").items():
            line(axes, one, x, "perplexity", who, f"{name}")
            trained = one[0].get("training_length")
            if trained:
                label = f"training length of {name}"
                axes.axvline(trained, color=colour(who), linestyle=":", linewidth=1, label=label)
        over_lengths(axes, [row[x] for row in some], f"{title}, tokens")
    shown = [row["perplexity"] for row in rows if row["perplexity"] is not None]
    # Of few documents a band may be wider than all curves together: it is cut, they are not.
    panels[0].set(ylabel="perplexity", yscale="log", ylim=(min(shown) / 1.5, max(shown) * 1.5))
    plain_ticks(panels[0])
    joined = rows[0].get("joined")
    count = f"{rows[0]['documents']} documents" + (f" {joined}" if joined else "")
    shared_legend(figure, panels, columns=3, title=f"{count}; bands: 95% over documents")
    return figure


PLOTS: dict[str, Callable[[list[Row], New], Any]] = {
    "length": length, "perplexity": perplexity, "scan": scan, "decode": decode,
}  # fmt: skip


def draw(paths: Sequence[Path], target: Path | None = None, plots: dict[str, Any] | None = None) -> Path:
    """One figure of the rows of all the files, which are of one benchmark; `target`, or a PNG beside the first.

    Raises:
        UserError: a file that no benchmark wrote, files of several, or an ending that names no format.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    plots = plots or PLOTS
    target = target or paths[0].with_suffix(".png")
    if target.suffix not in FORMATS:
        raise UserError(f"cannot draw to {target}: give a file name that ends in {', '.join(FORMATS)}")
    results = [_read(path, plots) for path in paths]
    if len({result["benchmark"] for result in results}) > 1:
        raise UserError(f"{', '.join(map(str, paths))}: results of several benchmarks cannot be one figure")

    def new(lines: int, columns: int, **options: Any) -> Any:
        size = options.pop("figsize")
        figure = Figure(figsize=size, layout="constrained")
        return figure, figure.subplots(lines, columns, squeeze=False, **options).flatten().tolist()

    with rc_context(STYLE):
        figure = plots[results[0]["benchmark"]]([row for result in results for row in result["rows"]], new)
        figure.suptitle(_measured_on(results[0]["environment"]), size=7, color=FLOOR)
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=200)
    return target


def _read(path: Path, plots: dict[str, Any]) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    name = result.get("benchmark") if isinstance(result, dict) else None
    if name not in plots:
        raise UserError(f"{path}: no result of {', '.join(plots)}; there is no figure of it")
    if not result["rows"]:
        raise UserError(f"{path}: no rows, so there is nothing to draw")
    return result


def _measured_on(facts: Row) -> str:
    card = facts["card"] if facts["card"] != "none" else f"CPU, {facts.get('machine', 'no card')}"
    peers = [f"{name} {facts[name]}" for name in ("mamba-ssm",) if not facts.get(name, "not").startswith("not")]
    return ", ".join([card, f"torch {facts['torch']}", *peers, facts["date"]])
