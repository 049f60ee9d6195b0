"""Forward + backward of whole models on a GPU, no optimizer: ours, mamba-ssm's own, and a Transformer of the same size.

    python benchmarks/train_step.py --only 130m       # groups as printed by --help; all by default

Random weights and tokens, every token a target. The Transformer is transformers' GPT-NeoX in Pythia's shapes with
PyTorch's flash attention and the same chunked head as ours. Correctness first: the loss of ours and of mamba-ssm's
model on the same weights and tokens must agree. Then all take turns in one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from common import arguments, finish, keep, parse

from mambalign.bench import contestants as models
from mambalign.bench.length import EVERYONE, MARKS
from mambalign.bench.measure import DEVICE, compete, free_memory


@dataclass(frozen=True)
class Case:
    """One row of the table; `seconds`: what it takes on an H200, models' making included.

    `recompute`: whole blocks, or "selective" as in a recipe, which only ours has (the peers stand in the case before).
    """

    group: str
    size: str
    rows: int
    length: int
    weights: str
    seconds: int
    recompute: bool | str = False
    who: tuple[str, ...] = EVERYONE


CASES = [
    Case("130m", "130m", 16, 2048, "fp32 + autocast", 10),
    Case("130m", "130m", 16, 2048, "fp32 + autocast", 8, recompute="selective", who=("ours",)),
    Case("130m", "130m", 16, 2048, "bf16", 8),
    Case("790m", "790m", 8, 2048, "bf16", 10),
    Case("2.8b", "2.8b", 4, 2048, "bf16", 15),
    Case("2.8b", "2.8b", 4, 2048, "bf16", 10, recompute="selective", who=("ours",)),
    Case("2.8b", "2.8b", 4, 2048, "fp32 + autocast", 18, recompute=True),
    Case("130m-long", "130m", 4, 8192, "bf16", 8),
    Case("130m-long", "130m", 1, 32768, "bf16", 8),
    Case("130m-long", "130m", 1, 131072, "bf16", 5, who=("ours",)),
    Case("130m-long", "130m", 1, 131072, "bf16", 28, recompute=True),
    Case("2.8b-long", "2.8b", 1, 8192, "bf16", 15),
    Case("2.8b-long", "2.8b", 1, 32768, "bf16", 40, recompute=True),
]
TINY = [
    Case("tiny", "tiny", 2, 64, "fp32 + autocast", 0),
    Case("tiny", "tiny", 1, 128, "bf16", 0, recompute=True),
    Case("tiny", "tiny", 1, 128, "bf16", 0, recompute="selective", who=("ours",)),
]


def contestants(case: Case, ids: torch.Tensor) -> tuple[dict[str, Callable[[], torch.Tensor]], dict[str, float]]:
    """(who -> one step, who -> GiB of weights) of those that the case names and that are installed."""
    made: dict[str, Any] = {}
    steps: dict[str, Callable[[], torch.Tensor]] = {}
    if "ours" in case.who:
        model = made["ours"] = models.ours(case.size, case.weights, case.recompute)
        batch = models.random_batch(ids)
        steps["ours"] = models.step(model, case.weights, lambda: models.packed_loss(model, batch))
    if "mamba-ssm" in case.who and (peer := models.mamba_ssm(made["ours"], case.weights, case.recompute)) is not None:
        made["mamba-ssm"] = peer
        steps["mamba-ssm"] = models.step(peer, case.weights, lambda: models.padded_loss(peer, ids, ids))
    if "transformer" in case.who:
        neox = made["transformer"] = models.transformer(case.size, case.weights, case.recompute, case.length)
        steps["transformer"] = models.step(neox, case.weights, lambda: models.transformer_loss(neox, ids))
    return steps, {name: models.gib(model) for name, model in made.items()}


def measure(case: Case, repeats: int, seconds: float) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    ids = torch.randint(models.VOCABULARY[case.size], (case.rows, case.length), device=DEVICE)
    steps, weights = contestants(case, ids)
    losses: dict[str, float] = {}
    for name, run in list(steps.items()):
        try:
            losses[name] = float(run())
        except torch.OutOfMemoryError:
            del steps[name]
        if name not in steps:
            print(f"{case.size} {case.rows} x {case.length:,}: {name} has not enough memory", flush=True)
            free_memory()
    models.check_peer(losses)
    results = compete(steps, repeats, warmup=1, seconds=seconds)
    rows = []
    facts = {k: v for k, v in asdict(case).items() if k not in ("group", "who", "seconds")}
    for name, result in results.items():
        speed = case.rows * case.length / result["ms"] * 1e3
        row = {**facts, "who": name, "ms": result["ms"], "tokens_per_second": speed}
        rows.append(row | {"peak_gib": weights[name] + result["gib"], "weights_gib": weights[name]})
    for row in rows:
        _show(row, losses[row["who"]], rows)
    return rows


def _show(row: dict[str, Any], loss: float, beside: list[dict[str, Any]]) -> None:
    """One line; what is ours also as a multiple of the others."""
    others = [other for other in beside if row["who"] == "ours" and other["who"] != "ours"]
    ratios = "".join(
        f", {row['tokens_per_second'] / other['tokens_per_second']:.2f}x {other['who']}"
        f" with {row['peak_gib'] / other['peak_gib']:.2f} of its memory"
        for other in others
    )
    print(
        f"{row['size']:>5} {row['rows']:>3} x {row['length']:>7,} {row['weights']:>15}"
        f"{MARKS[row['recompute']]:22} {row['who']:>12}: {row['tokens_per_second']:>10,.0f} tok/s, "
        f"{row['peak_gib']:6.1f} GiB, loss {loss:.4f}{ratios}",
        flush=True,
    )


def _show_growth(rows: list[dict[str, Any]]) -> None:
    """Time per token at 131,072 tokens over that at 2,048: 1 if linear in the length."""
    speed = {
        (row["length"], row["recompute"]): row["tokens_per_second"]
        for row in rows
        if (row["size"], row["weights"], row["who"]) == ("130m", "bf16", "ours")
    }
    for long in ((131072, False), (131072, True)):
        if long in speed and (2048, False) in speed:
            how = "recomputed" if long[1] else "not recomputed"
            print(f"ours, time per token at 131,072 ({how}) over 2,048: {speed[2048, False] / speed[long]:.2f}")


def main(argv: Sequence[str] | None = None) -> None:
    seconds: dict[str, int] = {}
    for case in CASES:
        seconds[case.group] = seconds.get(case.group, 0) + case.seconds
    estimates = ", ".join(f"{group} ({spent} s)" for group, spent in seconds.items())
    parser = arguments(__doc__ or "", "train_step", repeats=7)
    parser.add_argument("--only", nargs="*", choices=list(seconds), help=f"groups, seconds on an H200: {estimates}")
    parser.add_argument("--who", nargs="*", default=list(EVERYONE[1:]), help="whom to measure beside ours")
    parser.add_argument("--seconds", type=float, default=6.0, help="no new turn of a case after so long, from 3 on")
    options = parse(parser, argv)
    wanted = options.only or list(seconds)
    cases = TINY if options.tiny else [case for case in CASES if case.group in wanted]
    print(f"groups: {estimates}; here {sum(case.seconds for case in cases)} s", flush=True)
    rows: list[dict[str, Any]] = []
    for case in cases:
        began = time.monotonic()
        who = tuple(name for name in case.who if name == "ours" or name in options.who)
        rows += measure(replace(case, who=who), options.repeats, options.seconds)
        print(f"{'':44}{time.monotonic() - began:.0f} s of {case.seconds} expected", flush=True)
        keep("train_step", options.json, rows)
        free_memory()
    _show_growth(rows)
    finish("train_step", options.json, rows)


if __name__ == "__main__":
    main()
