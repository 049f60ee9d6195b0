"""State passing on a GPU: memory and speed of forward + backward by the length of a document, no optimizer.

    python benchmarks/long_context.py                 # Mamba-1 of 130m, chunks of 16,384; about 80 s on an H200

One document of random tokens, every token a target, fp32 weights under bf16 autocast. `exact` and `truncated` are the
trainer's own steps (`mambalign/train/long_context.py`); beside them the whole sequence at once, as it is and with its
blocks recomputed, up to the length where it is out of memory. Correctness first: in fp32, loss and every gradient of
`exact` against the whole sequence of 8,192 tokens; no number is printed unless they agree. Peaks are the most that
tensors took at a time, weights and gradients included; those of state passing must not grow with the document.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from common import arguments, parse
from transformers import TrainingArguments

from mambalign.bench import contestants as models
from mambalign.bench.measure import DEVICE, compete, free_memory, relative_error, result_of, save
from mambalign.data.batches import Collator, PackedBatch, collate_sequences
from mambalign.train.long_context import StatePassing, StatePassingTrainer

LENGTHS = (32768, 131072, 262144, 1_000_000)
CHUNK = 16384
CHECKED = (8192, 1000)  # tokens, chunk
TOLERANCE = 1e-4  # of a gradient's norm: fp32 sums in another order, over 8,192 tokens and 24 layers
WHOLE = 262144  # the longest that is tried at once
GROWTH = 0.02  # of the peak, from the shortest document to the longest


def document(size: str, length: int) -> PackedBatch:
    ids = np.random.default_rng(0).integers(0, models.VOCABULARY[size], length)
    return collate_sequences([{"input_ids": ids, "loss_mask": np.ones(length, dtype=np.int8), "index": 0}])


def trainer_of(model: Any, exact: bool, chunk: int, bf16: bool) -> StatePassingTrainer:
    args = TrainingArguments(
        output_dir=tempfile.mkdtemp(), report_to="none", bf16=bf16, use_cpu=DEVICE.type == "cpu", disable_tqdm=True
    )
    return StatePassingTrainer(
        model=model, args=args, objective=StatePassing(exact, chunk), train_rows=None, eval_rows=None,
        collator=Collator("sequences"), tokenizer=None, sampler_seed=0,
    )  # fmt: skip


def in_chunks(model: Any, batch: PackedBatch, exact: bool, chunk: int, bf16: bool = True) -> Callable[[], torch.Tensor]:
    trainer = trainer_of(model, exact, chunk, bf16)
    trainer.accelerator.prepare_model(model)  # as `train()` does: the forward pass has autocast in it from then on
    return lambda: trainer.training_step(model, [batch], batch.num_targets)


def at_once(model: Any, batch: PackedBatch, bf16: bool = True) -> Callable[[], torch.Tensor]:
    def run() -> torch.Tensor:
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            loss = models.packed_loss(model, batch.to(DEVICE))
        loss.backward()
        return loss.detach()

    return run


def check(size: str, length: int, chunk: int) -> float:
    """The largest error of a gradient, relative to its norm."""
    model = models.ours(size, "fp32 + autocast")
    batch = document(size, length)
    results = []
    for run in (at_once(model, batch, bf16=False), in_chunks(model, batch, True, chunk, bf16=False)):
        loss = float(run())
        results.append((loss, {name: p.grad.clone() for name, p in model.named_parameters()}))
        model.zero_grad(set_to_none=True)
    (loss, whole), (ours, parts) = results
    errors = {name: relative_error(parts[name], value) for name, value in whole.items()}
    worst = max(errors, key=errors.__getitem__)
    print(
        f"{length:,} tokens in chunks of {chunk:,}, fp32: loss {ours:.6f}, whole {loss:.6f}; gradients within", end=" "
    )
    print(f"{errors[worst]:.1e} ({worst}), median {sorted(errors.values())[len(errors) // 2]:.1e}", flush=True)
    if not (abs(ours / loss - 1) < 1e-5 and errors[worst] < TOLERANCE):
        raise SystemExit("they are not those of the whole sequence: no numbers")
    return errors[worst]


def cleared(model: Any, run: Callable[[], torch.Tensor]) -> Callable[[], None]:
    def step() -> None:
        try:
            run()
        finally:  # also where memory ran out
            model.zero_grad(set_to_none=True)

    return step


def measure(size: str, length: int, chunk: int, options: Any) -> list[dict[str, Any]]:
    batch = document(size, length)
    plain = models.ours(size, "fp32 + autocast")
    steps = {
        "exact": cleared(plain, in_chunks(plain, batch, True, chunk)),
        "truncated": cleared(plain, in_chunks(plain, batch, False, chunk)),
    }
    weights = {name: models.gib(plain) for name in (*steps, "whole")}
    if length <= WHOLE:
        steps["whole"] = cleared(plain, at_once(plain, batch))
        recomputed = models.ours(size, "fp32 + autocast", recompute=True)
        steps["whole, recomputed"] = cleared(recomputed, at_once(recomputed, batch))
        weights["whole, recomputed"] = models.gib(recomputed)
    results = compete(steps, options.repeats, warmup=2, seconds=options.seconds)
    rows = []
    for who in steps:
        if who not in results:
            rows.append({"size": size, "length": length, "chunk": chunk, "who": who, "out_of_memory": True})
            continue
        ms, peak = results[who]["ms"], weights[who] + results[who]["gib"]
        row = {"size": size, "length": length, "chunk": chunk, "who": who, "ms": ms, "peak_gib": peak}
        rows.append(row | {"tokens_per_second": length / ms * 1e3})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    for row in rows:
        figures = "out of memory | |"
        if "ms" in row:
            figures = f"{row['tokens_per_second']:,.0f} | {row['peak_gib']:.2f} |"
        print(f"| {row['length']:,} | {row['who']} | {figures}", flush=True)


def grown(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By how much the peak of each way of state passing grows from the shortest document to the longest."""
    growth = {}
    for who in ("exact", "truncated"):
        peaks = [row["peak_gib"] for row in rows if row["who"] == who and "ms" in row]
        growth[who] = max(peaks) / max(peaks[0], 1e-9) - 1
    return growth


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__ or "", "long_context", repeats=3)
    parser.add_argument("--lengths", nargs="*", type=int, default=list(LENGTHS), help="tokens of the document")
    parser.add_argument("--chunk", type=int, default=CHUNK, help="state_passing_chunk")
    parser.add_argument("--seconds", type=float, default=5.0, help="no new turn of a length after so long, from 3 on")
    options = parse(parser, argv)
    size, lengths, chunk, checked = "130m", options.lengths, options.chunk, CHECKED
    if options.tiny:
        size, lengths, chunk, checked = "tiny", [64, 256, 512], 32, (128, 24)
    error = check(size, *checked)
    free_memory()
    rows: list[dict[str, Any]] = []
    print("\n| tokens | way | tokens/s | peak GiB |\n|---:|---|---:|---:|", flush=True)
    for length in lengths:  # written after each: the long ones are the last, and what is measured is kept
        rows += (made := measure(size, length, chunk, options))
        show(made)
        growth = grown(rows)
        save(result_of("long_context", rows) | {"largest_gradient_error": error, "growth": growth}, options.json)
        free_memory()
    for who, share in growth.items():
        print(f"{who}: the peak grows by {share:.1%} from {lengths[0]:,} to {lengths[-1]:,} tokens")
    print(f"written to {options.json}")
    # Of tiny documents on a CPU the peak is the process's own noise.
    if DEVICE.type == "cuda" and max(growth.values()) > GROWTH:
        raise SystemExit("memory grows with the document: it must not")


if __name__ == "__main__":
    main()
