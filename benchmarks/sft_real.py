"""Supervised fine-tuning on real conversations, forward + backward, no optimizer: ours beside how mamba-ssm is used.

    python benchmarks/real_data.py ...                          # once, where `datasets` is: makes sft.npz
    python benchmarks/sft_real.py --data sft.npz --only 130m    # or 2.8b; both by default

Peer: mamba-ssm's model on batches of 16 random conversations padded to the longest, logits of all positions, plain
cross-entropy with -100 on pads and on all that is not the assistant's (mamba-chat's way). Ours: the same conversations
best-fit packed into rows of 2,048 tokens, 16 rows to a device batch (4 at 2.8b, where the peer's 16 rows are
accumulated from 4 at a time), log-probs of trained tokens alone. In between, ours on the padded batches.

The conversations are those of batches spread evenly over all batches by padded size. Random weights. Correctness first:
log-probs of every trained token in ours, packed, against the peer's, padded; no time is printed unless they agree.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from common import arguments, finish, fits, keep, largest_difference, parse, spread
from real_data import MAX_LENGTH, Example, load

from mambalign.bench import contestants as models
from mambalign.bench.measure import DEVICE, compete, free_memory, relative_error
from mambalign.data.batches import PackedBatch, collate_sequences
from mambalign.data.bins import best_fit_decreasing
from mambalign.train.objectives import sequence_sums

ROWS = 16  # in a padded batch
MULTIPLE = 8  # of a padded length: the peer's kernels load whole vectors then


@dataclass(frozen=True)
class Case:
    """`batches` padded batches; `packed_rows` of 2,048 tokens in one of ours; at most `padded_rows` at a time."""

    size: str
    weights: str
    batches: int
    packed_rows: int = 16
    padded_rows: int = ROWS


CASES = [
    Case("130m", "fp32 + autocast", 32),
    Case("130m", "bf16", 32),
    Case("2.8b", "bf16", 12, packed_rows=4, padded_rows=4),
]
TINY = [Case("tiny", "fp32 + autocast", 2, packed_rows=1, padded_rows=4), Case("tiny", "bf16", 1)]

Padded = tuple[torch.Tensor, torch.Tensor]  # ids and labels, int64 [rows, length]


def padded(examples: Sequence[Example]) -> Padded:
    longest = max(example["input_ids"].size for example in examples)
    length = -(-longest // MULTIPLE) * MULTIPLE
    ids, labels = np.zeros((len(examples), length), np.int64), np.full((len(examples), length), -100)
    for row, example in enumerate(examples):
        size = example["input_ids"].size
        ids[row, :size] = example["input_ids"]
        labels[row, :size] = np.where(example["loss_mask"] != 0, example["input_ids"], -100)
    return torch.from_numpy(ids).to(DEVICE), torch.from_numpy(labels).to(DEVICE)


def packed(examples: Sequence[Example], rows: int) -> list[PackedBatch]:
    """Device batches of `rows` best-fit packed rows, laid flat."""
    bins = best_fit_decreasing([example["input_ids"].size for example in examples], MAX_LENGTH)
    bins = [bins[i] for i in np.random.default_rng(0).permutation(len(bins))]
    return [
        collate_sequences([examples[i] for row in bins[start : start + rows] for i in row]).to(DEVICE)
        for start in range(0, len(bins), rows)
    ]


def logps_of_logits(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """fp32 `[M]` of the labels of padded rows, in order, those that are not -100 and that something predicts."""
    predicting, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    wanted = (labels != -100).nonzero()[:, 0]
    rows = predicting[wanted].float()
    return -F.cross_entropy(rows, labels[wanted], reduction="none")


@torch.no_grad()
def check(model: Any, peer: Any, weights: str, examples: Sequence[Example]) -> None:
    """Ours, packed, against the peer, padded, on a few conversations; stops if it is not rounding."""
    examples = [dict(example, index=number) for number, example in enumerate(examples)]
    batch = collate_sequences(examples).to(DEVICE)
    ids, labels = padded(examples)
    with models.autocast(weights):
        ours = models.target_logps(model, batch)
        theirs = torch.cat(
            [
                logps_of_logits(peer(some).logits, wanted)
                for some, wanted in zip(ids.split(4), labels.split(4), strict=True)
            ]
        )
    sums = [sequence_sums(logps.float(), batch.target_sequence, len(examples))[0] for logps in (ours, theirs)]
    mean = theirs.mean()  # all are near -log V: what is to agree is how they differ
    worst, tokens = largest_difference(*sums), relative_error(ours - mean, theirs - mean)
    print(
        f"{len(examples)} conversations, ours packed against mamba-ssm padded: losses of conversations differ by at "
        f"most {worst:.1e}, log-probs of tokens by {tokens:.1e} of their spread",
        flush=True,
    )
    if not (worst < 2e-2 and tokens < 0.2):
        raise SystemExit("they differ by more than rounding: no numbers")


def padded_pass(model: Any, weights: str, batches: Sequence[Padded], rows: int) -> Callable[[], torch.Tensor]:
    """Forward and backward pass of every batch, at most `rows` rows at a time."""
    losses = [
        lambda some=some, wanted=wanted: models.padded_loss(model, some, wanted)
        for ids, labels in batches
        for some, wanted in zip(ids.split(rows), labels.split(rows), strict=True)
    ]
    return models.step(model, weights, *losses)


def packed_pass(model: Any, weights: str, batches: Sequence[PackedBatch]) -> Callable[[], torch.Tensor]:
    return models.step(model, weights, *[lambda b=batch: models.packed_loss(model, b) for batch in batches])


def measure(case: Case, data: list[Example], repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    everything = [data[start : start + ROWS] for start in range(0, len(data) - ROWS + 1, ROWS)]
    chosen = spread(everything, lambda batch: max(e["input_ids"].size for e in batch), case.batches)
    examples = [example for batch in chosen for example in batch]
    tokens = sum(example["input_ids"].size for example in examples)
    model = models.ours(case.size, case.weights)
    peer = models.mamba_ssm(model, case.weights)
    if peer is not None:
        check(model, peer, case.weights, examples[:ROWS] + examples[-ROWS:])
    ours, theirs = packed(examples, case.packed_rows), [padded(batch) for batch in chosen]
    at_once = fits(
        lambda rows: padded_pass(peer if peer is not None else model, case.weights, theirs[-1:], rows)(),
        case.padded_rows,
    )
    passes = {"ours, packed": packed_pass(model, case.weights, ours)}
    passes["ours, padded"] = padded_pass(model, case.weights, theirs, at_once)
    if peer is not None:
        passes["mamba-ssm, padded"] = padded_pass(peer, case.weights, theirs, at_once)
    packed_pass(model, case.weights, ours[:1])()
    padded_total = sum(ids.numel() for ids, _ in theirs)
    print(
        f"{case.size} {case.weights}: {len(examples)} conversations, {tokens:,} tokens; padded {ROWS} rows a batch "
        f"({at_once} at a time) {padded_total:,}, of them {1 - tokens / padded_total:.0%} pads; packed into "
        f"{len(ours)} batches of at most {case.packed_rows} x {MAX_LENGTH:,}",
        flush=True,
    )
    results = compete(passes, repeats, warmup=2)
    rows = []
    for who, result in results.items():
        row = {"size": case.size, "weights": case.weights, "who": who, "seconds": result["ms"] / 1e3}
        row |= {"tokens": tokens, "tokens_per_second": tokens / result["ms"] * 1e3}
        row |= {"peak_gib": result["gib"] + models.gib(model), "weights_gib": models.gib(model)}
        rows.append(row | {"rows_at_once": None if "packed" in who else at_once})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for number, row in enumerate(rows):
        ratios = "".join(
            f", {row['tokens_per_second'] / other['tokens_per_second']:.2f}x {other['who']}"
            f" with {row['peak_gib'] / other['peak_gib']:.2f} of its memory"
            for other in rows[number + 1 :]
        )
        print(
            f"{row['size']:>5} {row['weights']:>15} {row['who']:>18}: {row['tokens_per_second']:>9,.0f} real tok/s, "
            f"{row['peak_gib']:5.1f} GiB{ratios}",
            flush=True,
        )


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__ or "", "sft_real", repeats=3)
    parser.add_argument("--data", type=Path, default=Path("data/sft.npz"), help="made by real_data.py")
    parser.add_argument("--only", nargs="*", choices=["130m", "2.8b"], help="sizes: 30 s and 55 s on an H200")
    options = parse(parser, argv)
    data = load(options.data)
    if options.tiny:
        data = [dict(e, input_ids=e["input_ids"] % models.VOCABULARY["tiny"]) for e in data[: 3 * ROWS]]
    rows: list[dict[str, Any]] = []
    for case in TINY if options.tiny else [c for c in CASES if c.size in (options.only or ["130m", "2.8b"])]:
        began = time.monotonic()
        made = measure(case, data, options.repeats)
        show(made)
        print(f"{'':42}{time.monotonic() - began:.0f} s", flush=True)
        rows += made
        keep("sft_real", options.json, rows)
        free_memory()
    finish("sft_real", options.json, rows)


if __name__ == "__main__":
    main()
