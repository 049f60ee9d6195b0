"""Statistics, tables and plots of the case study, from its JSON alone."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mambalign.bench.figures import OURS, PEER, TRANSFORMER
from mambalign.demo.evaluate import Share, share
from mambalign.evals.statistics import Estimate, clustered_mean

Results = dict[str, Any]
Array = NDArray[np.float64]
# Edges of chosen's tokens minus rejected's; about a tenth to a quarter of the held-out pairs lie in each stratum.
EDGES = (-math.inf, -50.0, 0.0, 50.0, 150.0, 300.0, math.inf)
PADDED = {
    "cpt-padded": "padded pre-training", "sft-padded": "padded SFT", "sft-sorted": "SFT padded by length",
    "dpo-padded": "padded DPO",
}  # fmt: skip
WAYS = {"packed": "packed", "padded": "padded", "sorted": "padded by length"}
TITLES = {"cpt": "pre-training", "sft": "SFT", "dpo": "DPO", "simpo": "SimPO"}

# --------------------------------------------------------------------------------------------------------- statistics


def mean_loss(logps: Sequence[float], tokens: Sequence[int], resamples: int = 2000) -> tuple[float, float, float]:
    """Loss per token and its 95% percentile interval, documents drawn anew: a document's tokens go together."""
    sums, counts = -np.asarray(logps), np.asarray(tokens, dtype=np.float64)
    drawn = np.random.default_rng(0).integers(len(sums), size=(resamples, len(sums)))
    low, high = np.percentile(sums[drawn].sum(1) / counts[drawn].sum(1), [2.5, 97.5])
    return float(sums.sum() / counts.sum()), float(low), float(high)


def loss_difference(
    before: Sequence[float], after: Sequence[float], tokens: Sequence[int], resamples: int = 2000
) -> tuple[float, float, float]:
    """Of the same documents under two models, `after` minus `before`, as `mean_loss`."""
    return mean_loss((np.asarray(after) - np.asarray(before)).tolist(), tokens, resamples)


def margins(pairs: Results, model: str, *, reference: str | None, average: bool, beta: float = 1.0) -> Array:
    """Reward of chosen minus reward of rejected, `[P]`: beta times the log-probs, over the reference's if one is named
    (DPO, arXiv 2305.18290), divided by the completion's tokens if `average` (SimPO, arXiv 2405.14734)."""
    values = np.asarray(pairs["logps"][model], dtype=np.float64)
    if reference is not None:
        values = values - np.asarray(pairs["logps"][reference])
    if average:
        values = values / np.asarray(pairs["tokens"])
    result: Array = beta * (values[:, 0] - values[:, 1])
    return result


def length_differences(pairs: Results) -> Array:
    """Tokens of chosen minus those of rejected, `[P]`."""
    tokens = np.asarray(pairs["tokens"], dtype=np.float64)
    result: Array = tokens[:, 0] - tokens[:, 1]
    return result


def strata(lengths: Array, values: Array) -> list[dict[str, Any]]:
    """By stratum of `lengths` (low < length <= high): how many pairs, the share ranked right, the mean margin."""
    rows = []
    for low, high in pairwise(EDGES):
        inside = values[(lengths > low) & (lengths <= high)]
        mean = clustered_mean(inside.tolist()) if len(inside) else Estimate(math.nan, math.nan, 0, 0)
        rows.append({"low": low, "high": high, "right": share((inside > 0).tolist()), "margin": mean})
    return rows


def _between(low: float, high: float) -> str:
    return f"to {high:g}" if low == -math.inf else f"over {low:g}" if high == math.inf else f"{low:g} to {high:g}"


def rank_correlation(a: Array, b: Array) -> float:
    """Spearman's: Pearson's of the ranks, ties with their mean rank."""
    return float(np.corrcoef(_ranks(a), _ranks(b))[0, 1])


def _ranks(values: Array) -> Array:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[inverse]


def same_steps(one: Results, other: Results) -> tuple[Array, Array]:
    """Losses of two runs at the log lines that both have."""
    first = {line["step"]: line["loss"] for line in one["curve"]["train"]}
    second = {line["step"]: line["loss"] for line in other["curve"]["train"]}
    steps = sorted(first.keys() & second.keys())
    return np.array([first[step] for step in steps]), np.array([second[step] for step in steps])


def speed(stage: Results, name: str = "num_tokens") -> float:
    """What a run did in a second of training (of `step`: steps), its first log line left out, which has the loading of
    the kernels in it."""
    lines = stage["curve"]["train"]
    lines = lines[1:] if len(lines) > 2 else lines
    return float((lines[-1][name] - lines[0][name]) / max(lines[-1]["train_s"] - lines[0]["train_s"], 1e-9))


# ------------------------------------------------------------------------------------------------------------- tables


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _interval(value: float, low: float, high: float, digits: int = 3) -> str:
    return f"{value:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _share(some: Share) -> str:
    return _interval(some.value, some.low, some.high) if some.total else "-"


def _estimate(some: Estimate, digits: int = 3) -> str:
    return f"{some.mean:.{digits}f} ± {some.standard_error:.{digits}f}" if some.n > 1 else "-"


def environment_table(results: Results) -> str:
    facts, (width, layers) = results["environment"], results["settings"]["size"]
    if results["settings"]["tiny"]:
        raise ValueError("these are results of --tiny, which mean nothing: run it on a GPU")
    said = (
        f"{facts['date']}, one {facts['card']}, torch {facts['torch']}, transformers {facts['transformers']}; "
        f"{width} wide, {layers} layers, bf16 autocast on fp32 weights."
    )
    if any(name in results["stages"] for name in PADDED):
        said += f" Padded runs end after {results['settings']['padded_seconds']:g} seconds of training."
    return said


def not_run(stages: Results) -> str:
    """A sentence about the padded runs that are not there; nothing where all are."""
    missing = [title for name, title in PADDED.items() if name not in stages]
    if not missing:
        return ""
    return f"*Not run: {', '.join(missing)}. That needs `--only padded`, about {2 * len(missing)} minutes on one GPU.*"


def _ways(stages: Results, name: str) -> list[Results]:
    """The packed run, and those in other ways that are there."""
    keys = [name, *(f"{name}-{way}" for way in WAYS)]
    return [stages[key] for key in keys if key in stages]


def runs_table(results: Results) -> str:
    stages, rows = results["stages"], []
    for name in TITLES:
        for stage in _ways(stages, name):
            pairs = name in ("dpo", "simpo")
            real = speed(stage, "step") * stage["batch"] if pairs else speed(stage)
            last = stage["curve"]["train"][-1]
            positions = stage["padded_positions"]
            # The last log line may be steps before the end; the positions are those of all steps.
            tokens = last["num_tokens"] / last["step"] * stage["steps"]
            rows.append(
                [
                    f"{TITLES[name]}, {WAYS[stage['way']]}",
                    f"{stage['steps']:,} of {stage['max_steps']:,}",
                    f"{tokens / 1e6:.1f} M",
                    f"{1 - tokens / positions:.0%}" if positions else "0%",
                    f"{stage['training_s']:.0f} s",
                    f"{stage['before_training_s']:.0f} s" if name == "dpo" else "-",
                    f"{real:,.0f} {'pairs' if pairs else 'tokens'}/s",
                    f"{stage['peak_gib']:.1f} GiB" if stage.get("peak_gib") else "-",
                    f"{stage['utilisation']:.0f}%" if stage.get("utilisation") else "-",
                    f"{stage['metrics']['eval_loss']:.3f}",
                ]
            )
    head = ["run", "steps", "tokens", "pads", "training", "reference pass", "speed", "peak memory", "GPU busy"]
    head += ["held-out loss at its end"]
    return "\n\n".join(part for part in (_table(head, rows), not_run(stages)) if part)


def agreement_table(results: Results) -> str:
    stages, rows = results["stages"], []
    for name in ("cpt", "sft", "dpo"):
        packed, *others = _ways(stages, name)
        unit = "step" if name == "dpo" else "num_tokens"
        for other in others:
            ours, theirs = same_steps(packed, other)
            apart = np.abs(ours - theirs)
            cells = [str(len(ours)), f"{ours[0]:.3f} to {ours[-1]:.3f}", f"{apart.max():.1e}", f"{apart.mean():.1e}"]
            ratio = speed(packed, unit) / speed(other, unit)
            rows.append([f"{TITLES[name]}, {WAYS[other['way']]}", *cells, f"{ratio:.1f}x"])
    head = ["run", "log lines in both", "loss over them", "largest difference", "mean difference"]
    table = _table([*head, "packed is faster by"], rows) if rows else ""
    return "\n\n".join(part for part in (table, not_run(stages)) if part)


def exactness_table(results: Results) -> str:
    rows = []
    for name, facts in ((name, results["stages"]["exactness"][name]) for name in ("sft", "dpo")):
        names = ["loss_difference", "gradient_error"]
        rows.append([f"{TITLES[name]}, padded", f"{facts['sequences']}", *(f"{facts[n]:.1e}" for n in names)])
        if f"leaky_{names[0]}" in facts:
            leaks = [f"{facts[f'leaky_{n}']:.1e}" for n in names]
            rows.append([f"{TITLES[name]}, leaky", f"{facts['sequences']}", *leaks])
    return _table(["against packed, fp32", "sequences", "loss of one, at most", "gradient"], rows)


def held_out_table(results: Results) -> str:
    found, rows = results["stages"]["held-out"], []
    for name in ("new", *TITLES):
        values = [_interval(*mean_loss(found[data]["logps"][name], found[data]["tokens"])) for data in ("text", "sft")]
        rows.append([{"new": "random weights", **TITLES}[name], *values])
    return _table(["after", "novels, loss a token", "conversations, loss an answer's token"], rows)


def scorings(results: Results) -> dict[str, Array]:
    """Margins of every held-out pair under the ways to score it."""
    found = results["stages"]["held-out"]
    pairs, betas = found["pairs"], found["betas"]
    return {
        "SFT model, log-prob a token": margins(pairs, "sft", reference=None, average=True, beta=betas["simpo"]),
        "DPO": margins(pairs, "dpo", reference="sft", average=False, beta=betas["dpo"]),
        "DPO model, log-ratio a token": margins(pairs, "dpo", reference="sft", average=True, beta=betas["dpo"]),
        "SimPO": margins(pairs, "simpo", reference=None, average=True, beta=betas["simpo"]),
    }


def rewards_table(results: Results) -> str:
    lengths, rows = length_differences(results["stages"]["held-out"]["pairs"]), []
    alone = share((lengths > 0).tolist())
    rows.append(["length alone", _share(alone), "-", "-", "1", "1.000", "0.000"])
    for name, values in scorings(results).items():
        right = values > 0
        rows.append(
            [
                name,
                _share(share(right.tolist())),
                _estimate(clustered_mean((right.astype(float) - (lengths > 0)).tolist())),
                _estimate(clustered_mean(values.tolist())),
                f"{rank_correlation(values, lengths):.2f}",
                _share(share(right[lengths > 0].tolist())),
                _share(share(right[lengths < 0].tolist())),
            ]
        )
    head = ["reward", "accuracy", "minus length alone", "margin", "rank correlation with length"]
    return _table([*head, "chosen longer", "chosen shorter"], rows)


def strata_table(results: Results) -> str:
    lengths = length_differences(results["stages"]["held-out"]["pairs"])
    by_name = {name: strata(lengths, values) for name, values in scorings(results).items() if name in ("DPO", "SimPO")}
    rows = []
    for number, (low, high) in enumerate(pairwise(EDGES)):
        some = [by_name[name][number] for name in ("DPO", "SimPO")]
        cells = [cell for row in some for cell in (_share(row["right"]), _estimate(row["margin"], 2))]
        rows.append([_between(low, high), str(some[0]["right"].total), *cells])
    head = ["chosen's tokens minus rejected's", "pairs", "DPO accuracy", "margin", "SimPO accuracy", "margin"]
    return _table(head, rows)


def answers_table(results: Results) -> str:
    found, rows = results["stages"]["answers"], []
    for name in TITLES:
        some = found[name]
        longer = np.subtract(some["lengths"], found["sft"]["lengths"]).astype(float).tolist()
        rows.append(
            [
                TITLES[name],
                _estimate(clustered_mean([float(n) for n in some["lengths"]]), 1),
                "-" if name in ("cpt", "sft") else _estimate(clustered_mean(longer), 1),
                f"{sum(some['stopped'])} of {len(some['stopped'])}",
            ]
        )
    return _table(["after", "tokens of an answer", "more than SFT's", "ended by the model"], rows)


def leakage_losses(results: Results) -> dict[tuple[str, str], list[float]]:
    """(trained, read) -> held-out loss for every seed; `read` is "alone" or "leaking"."""
    losses: dict[tuple[str, str], list[float]] = {}
    tokens = _leak_tokens(results)
    for seed in results["settings"]["seeds"]:
        for way in ("packed", "leaky"):
            stage = results["stages"][f"leak-{way}-{seed}"]
            for read in ("alone", "leaking"):
                losses.setdefault((way, read), []).append(mean_loss(stage[read], tokens, 1)[0])
    return losses


def _leak_tokens(results: Results) -> list[int]:
    tokens: list[int] = results["stages"]["held-out"]["sft"]["tokens"]  # the same documents
    return tokens


def _all_seeds(results: Results, way: str) -> list[float]:
    """Every document's log-prob read alone, the mean of the seeds."""
    runs = [results["stages"][f"leak-{way}-{seed}"]["alone"] for seed in results["settings"]["seeds"]]
    mean: list[float] = np.mean(runs, axis=0).tolist()
    return mean


def leakage_table(results: Results) -> str:
    losses, rows = leakage_losses(results), []
    for way, title in (("packed", "leak-free"), ("leaky", "leaky")):
        gap = np.subtract(losses[way, "leaking"], losses[way, "alone"]).tolist()
        cells = [_estimate(clustered_mean(values), 4) for values in (losses[way, "alone"], losses[way, "leaking"], gap)]
        rows.append([title, *cells])
    cost = clustered_mean(np.subtract(losses["leaky", "alone"], losses["packed", "alone"]).tolist())
    each = ", ".join(f"{b - a:+.4f}" for a, b in zip(losses["packed", "alone"], losses["leaky", "alone"], strict=True))
    head = ["trained with packing that is", "read alone (right)", "read in leaking rows", "second minus first"]
    both = [_all_seeds(results, way) for way in ("packed", "leaky")]
    documents = _interval(*loss_difference(*both, _leak_tokens(results)), digits=4)
    said = (
        f"\n\nLeaky minus leak-free, read alone: {_estimate(cost, 4)} over seeds ({each}), {documents} over documents."
    )
    return _table(head, rows) + said


def samples_text(results: Results, width: int = 240) -> str:
    """Every stage's answers, cut after `width` characters, under file and row of their prompts."""
    found, parts = results["stages"]["answers"], []
    for number, prompt in enumerate(found["prompts"]):
        lines = [f"**{prompt['source']}**, row {prompt['row']} of `{prompt['file']}`", ""]
        lines += [f"- *{TITLES[name]}*: {_quoted(found[name]['shown'][number], width)}" for name in TITLES]
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def _quoted(text: str, width: int) -> str:
    """One line that Markdown leaves as it is."""
    flat = " ".join(text.split())
    cut = flat if len(flat) <= width else flat[:width] + " ..."
    return "`` " + cut.replace("``", "'") + " ``" if cut else "(nothing)"


def plot_link(results: Results) -> str:
    return "![loss of the runs, rewards by length, and leakage](../benchmarks/results/case_study.png)"


TABLES: dict[str, Callable[[Results], str]] = {
    "environment": environment_table,
    "plot": plot_link,
    "runs": runs_table,
    "agreement": agreement_table,
    "exactness": exactness_table,
    "held-out": held_out_table,
    "rewards": rewards_table,
    "strata": strata_table,
    "answers": answers_table,
    "leakage": leakage_table,
    "samples": samples_text,
}


def text(results: Results) -> str:
    """All tables of what is there."""
    parts = []
    for name, table in TABLES.items():
        try:
            parts.append(f"## {name}\n\n{table(results)}")
        except KeyError as missing:
            parts.append(f"## {name}\n\nnot measured: {missing}")
        except ValueError as why:
            parts.append(f"## {name}\n\n{why}")
    return "\n\n".join(parts)


def filled(document: str, results: Results) -> str:
    """The document with the tables between its marks `<!-- begin NAME -->` and `<!-- end NAME -->`.

    Raises:
        ValueError: results of --tiny. KeyError: a stage that a table needs is not among the results.
    """
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        made = table(results)
        document, count = pattern.subn(lambda found, made=made: f"{found[1]}{made}\n{found[2]}", document)
        if count != 1:
            raise ValueError(f"the document has {count} places for the table {name}, not one")
    return document


def write_docs(results: Results, path: Path) -> None:
    path.write_text(filled(path.read_text(encoding="utf-8"), results), encoding="utf-8")
    print(f"the tables are in {path}")


# -------------------------------------------------------------------------------------------------------------- plots


def draw(results: Results, source: Path) -> Path | None:
    """One picture of what is there, beside the JSON; None, aloud, where matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        print(f"no plot: matplotlib is not installed; where it is, case_study.py --plot-only {source}")
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(2, 4, figsize=(19, 8), layout="constrained")
    panels = panels.flatten().tolist()
    stages = results["stages"]
    if any(name in stages for name in PADDED):
        curves = [("cpt", "num_tokens"), ("sft", "step"), ("sft", "train_s"), ("dpo", "step"), ("dpo", "train_s")]
    else:  # nothing to compare, so one picture a run
        curves = [("cpt", "num_tokens"), ("sft", "step"), ("dpo", "step"), ("simpo", "step")]
    for axes, (name, by) in zip(panels, curves, strict=False):
        _curves(axes, stages, name, by)
    lengths_panel, right_panel, leak_panel, *unused = panels[len(curves) :]
    for axes in unused:
        axes.set_axis_off()
    if "held-out" in stages:
        _strata_panels(right_panel, lengths_panel, results)
    if all(f"leak-{way}-{seed}" in stages for way in ("packed", "leaky") for seed in results["settings"]["seeds"]):
        _leak_panel(leak_panel, results)
    facts = results["environment"]
    figure.suptitle(f"{facts['card']}, torch {facts['torch']}, {facts['date']}", size=9)
    target = source.with_suffix(".png")
    figure.savefig(target, dpi=110)
    pyplot.close(figure)
    print(f"plotted to {target}")
    return target


def _curves(axes: Any, stages: Results, name: str, by: str) -> None:
    """Training loss as lines, held-out loss as dots."""
    colours = {"packed": (OURS, "-"), "padded": (PEER, "--"), "sorted": (TRANSFORMER, ":")}
    for stage in _ways(stages, name):
        colour, dash = colours[stage["way"]]
        style = {"color": colour, "linestyle": dash}
        for split, loss in (("train", "loss"), ("eval", "eval_loss")):
            lines = stage["curve"][split]
            mark = {"marker": "o", "linewidth": 0} if split == "eval" else {"linewidth": 1, "label": WAYS[stage["way"]]}
            axes.plot([line[by] for line in lines], [line[loss] for line in lines], **style, **mark)
    unit = {"num_tokens": "tokens", "step": "step", "train_s": "seconds of training"}[by]
    axes.set(title=f"{TITLES[name]}: loss, held out as dots", xlabel=unit)
    axes.legend(fontsize=8)


def _strata_panels(right: Any, mean: Any, results: Results) -> None:
    lengths = length_differences(results["stages"]["held-out"]["pairs"])
    names = [_between(low, high) for low, high in pairwise(EDGES)]
    colours = {"DPO": PEER, "DPO model, log-ratio a token": TRANSFORMER, "SimPO": OURS}
    for name, values in scorings(results).items():
        if name not in colours:
            continue
        rows, places = strata(lengths, values), np.arange(len(names))
        shares = [row["right"] for row in rows]
        bars = np.array([[s.value - s.low, s.high - s.value] if s.total else [0, 0] for s in shares]).T.clip(min=0)
        right.errorbar(places, [s.value for s in shares], yerr=bars, marker="o", label=name, color=colours[name])
        spread = float(values.std()) or 1.0
        means = [row["margin"].mean / spread for row in rows]
        errors = [row["margin"].standard_error / spread for row in rows]
        mean.errorbar(places, means, yerr=errors, marker="o", label=name, color=colours[name])
    for axes, title in ((right, "share of pairs ranked right"), (mean, "mean margin over its spread")):
        axes.set_xticks(range(len(names)), names, fontsize=8)
        axes.set(title=title, xlabel="chosen's tokens minus rejected's")
        axes.axhline(0.5 if axes is right else 0.0, color="grey", linewidth=0.5)
        axes.legend(fontsize=8)


def _leak_panel(axes: Any, results: Results) -> None:
    names = []
    for number, ((way, read), values) in enumerate(leakage_losses(results).items()):
        axes.plot([number] * len(values), values, "o", color=OURS if way == "packed" else PEER)
        names.append(f"{'leak-free' if way == 'packed' else 'leaky'},\nread {read}")
    axes.set_xticks(range(len(names)), names, fontsize=8)
    axes.set(
        title="SFT: held-out loss, a dot a seed", xlabel="how it was packed in training, and read", xlim=(-0.5, 3.5)
    )
