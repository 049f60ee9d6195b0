"""The ways of computing a step that the case study compares; two of them are not for use, so no recipe has them.

`packed`: mambalign's own. `padded`: the same examples of the same steps as padded rows, as is usual: logits of all
positions, every completion behind its own copy of the prompt, several passes a step because logits take memory. It is
exact, and should give the same losses. `sorted` is padded with the examples of a device batch in order of length, so
with few pads. `leaky`: a packed row is one sequence to the model, so the state at the end of
one document goes into the next, which is what other stacks do to a Mamba when they pack. Nothing is said, and the
losses look well.

A way is put in place of names in `mambalign.train` while a run lasts (`in_place`); all else is the run as it is.
"""

from __future__ import annotations

import importlib.util
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import TrainerCallback

from mambalign.data.batches import Collator, Example, Kind, PackedBatch, collate_sequences
from mambalign.ops.segments import Segments
from mambalign.train import reference, run, trainer
from mambalign.train.objectives import sequence_sums
from mambalign.train.trainer import PackedTrainer, target_logps

ROWS = 16  # examples, or pairs, of a padded pass
AT_ONCE = 32  # rows, or pairs, of a held-out pass
MULTIPLE = 8  # of a padded length
SIDES = ("chosen", "rejected")

# ------------------------------------------------------------------------------------------------------------- padded


class PaddedCollator:
    """As `Collator`, but `ROWS` examples, or pairs, a batch, in their order; each completion with its own prompt."""

    def __init__(self, kind: Kind, max_tokens: int | None = None):
        self.collate: Callable[..., PackedBatch] = collate_sequences if kind == "sequences" else collate_whole_pairs

    def __call__(self, items: Sequence[Sequence[Example]]) -> list[PackedBatch]:
        examples = self.ordered([example for item in items for example in item])
        return [self.collate(examples[start : start + ROWS]) for start in range(0, len(examples), ROWS)]

    def ordered(self, examples: list[Example]) -> list[Example]:
        return examples


class SortedCollator(PaddedCollator):
    """As `PaddedCollator("sequences")`, the examples in order of length."""

    def ordered(self, examples: list[Example]) -> list[Example]:
        return sorted(examples, key=lambda example: len(example["input_ids"]))


def collate_whole_pairs(pairs: Sequence[Example]) -> PackedBatch:
    """Pairs as sequences of their own: prompt and completion, for each side."""
    sequences = []
    for pair in pairs:
        prompt = pair["prompt_ids"]
        for side in SIDES:
            ids = np.concatenate([prompt, pair[f"{side}_ids"]])
            mask = np.concatenate([np.zeros_like(prompt), pair[f"{side}_mask"]])
            sequences.append({"input_ids": ids, "loss_mask": mask, "index": 0})
    indices = torch.tensor([pair["index"] for pair in pairs])
    return replace(collate_sequences(sequences), pairs=torch.arange(len(sequences)).view(-1, 2), indices=indices)


class PaddedLogps:
    """In the place of `target_logps`: log-probs from the logits of padded rows.

    `positions` counts what training has computed, pads included.
    """

    def __init__(self) -> None:
        self.positions = 0

    def __call__(self, model: Any, batch: PackedBatch, summed: bool = False) -> Tensor:
        segments, device = batch.segments, batch.input_ids.device
        assert int(segments.parent.max()) < 0, "rows of a padded batch do not fork"
        length = -(-int(segments.lengths.max()) // MULTIPLE) * MULTIPLE
        if torch.is_grad_enabled():  # the reference pass and evaluations are not training
            self.positions += segments.num_segments * length
        row = segments.segment_of_token
        place = (row * length + torch.arange(segments.num_tokens) - segments.cu_seqlens[row]).to(device)
        ids = torch.zeros(segments.num_segments * length, dtype=torch.int64, device=device)
        ids[place] = batch.input_ids
        logits = model(input_ids=ids.view(-1, length), use_cache=False).logits.flatten(0, 1)
        logps: Tensor = logits.float().log_softmax(-1)[place[batch.target_positions], batch.target_ids]
        return logps


# -------------------------------------------------------------------------------------------------------------- leaky


class LeakyCollator:
    """As `Collator("sequences")` without a bound, with `leaky` rows."""

    def __init__(self, kind: Kind, max_tokens: int | None = None):
        assert kind == "sequences", "the ablation is about packed rows"

    def __call__(self, items: Sequence[Sequence[Example]]) -> list[PackedBatch]:
        batch = collate_sequences([example for item in items for example in item])
        return [leaky(batch, [len(item) for item in items])]


def leaky(batch: PackedBatch, counts: Sequence[int]) -> PackedBatch:
    """The batch with the next `counts[i]` sequences made one, for every i: states and windows flow between them.

    Targets stay what they were, so the first token of a document is none.
    """
    ends = [0, *accumulate(counts)]
    assert ends[-1] == batch.segments.num_segments and int(batch.segments.parent.max()) < 0
    return replace(batch, segments=Segments(batch.segments.cu_seqlens[ends]))


# ------------------------------------------------------------------------------------------------------- in their place


@contextmanager
def _replaced(*names: tuple[Any, str, Any]) -> Iterator[None]:
    before = [(place, name, getattr(place, name)) for place, name, _ in names]
    for place, name, value in names:
        setattr(place, name, value)
    try:
        yield
    finally:
        for place, name, value in before:
            setattr(place, name, value)


@contextmanager
def in_place(way: str, seconds: float | None = None) -> Iterator[dict[str, Any]]:
    """While it is open, `mambalign.train.run.run` trains this way and fills the dict that is given with what it took.

    seconds: of training (without evaluations) after which the run ends as if its last step had come; its schedule is
    that of the whole run.
    """
    facts: dict[str, Any] = {}
    watch = _Watch(facts, seconds)
    names: list[tuple[Any, str, Any]] = [(run, "PackedTrainer", _watched_by(watch))]
    if importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: the run's own curves are left out", flush=True)
        names += [(run.curves, "draw", lambda folders, target: None)]
    padded = PaddedLogps()
    if way in ("padded", "sorted"):
        collator = PaddedCollator if way == "padded" else SortedCollator
        names += [(place, "target_logps", padded) for place in (reference, trainer)]
        names += [(place, "Collator", collator) for place in (reference, run)]
    elif way == "leaky":
        names += [(run, "Collator", LeakyCollator)]
    else:
        assert way == "packed", way
    with _replaced(*names):
        try:
            yield facts
        finally:
            watch.close()
    facts["padded_positions"] = padded.positions or None


def _watched_by(watch: _Watch) -> type[PackedTrainer]:
    class Watched(PackedTrainer):
        def __init__(self, **options: Any):
            super().__init__(**options)
            self.add_callback(watch)
            watch.began = time.perf_counter()

    return Watched


class _Watch(TrainerCallback):
    """Times, memory and how busy the card was while the steps were taken."""

    def __init__(self, facts: dict[str, Any], seconds: float | None):
        self.facts, self.seconds = facts, seconds
        self.began = self.evaluating = 0.0
        self.sampler: subprocess.Popen[str] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        now = time.perf_counter()
        self.facts["before_training_s"], self.began = now - self.began, now  # the reference pass, if there is one
        self.facts["max_steps"] = state.max_steps
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.sampler = _sample_utilisation()

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: Any = None, **_: Any) -> None:
        self.evaluating += (metrics or {}).get("eval_runtime", 0.0)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.seconds is not None and time.perf_counter() - self.began - self.evaluating > self.seconds:
            control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.facts |= {"training_s": time.perf_counter() - self.began - self.evaluating, "steps": state.global_step}
        self.facts["evaluating_s"] = self.evaluating
        if torch.cuda.is_available():
            self.facts["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        self.facts["utilisation"] = _mean_utilisation(self.close())

    def close(self) -> str:
        """End the sampler, if there is one; what it said."""
        sampler, self.sampler = self.sampler, None
        if sampler is None:
            return ""
        sampler.terminate()
        return sampler.communicate()[0]


def _sample_utilisation() -> subprocess.Popen[str] | None:
    query = ["nvidia-smi", "-i", "0", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "250"]
    try:
        return subprocess.Popen(query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError as error:
        print(f"utilisation is not measured: nvidia-smi cannot be started ({error})", flush=True)
        return None


def _mean_utilisation(said: str) -> float | None:
    """Percent of the time in which at least one kernel ran, as nvidia-smi has it."""
    values = [int(line) for line in said.split("\n") if line.strip().isdigit()]
    return sum(values) / len(values) if values else None


# --------------------------------------------------------------------------------------------------------- held out


def document_logps(model: Any, rows: Any, bf16: bool, *, leak: bool = False) -> tuple[list[Any], list[Any]]:
    """Summed log-probs and numbers of the targets of every example of `rows` (`PackedRows` of sequences), by index.

    leak: `leaky` rows; the right value is without.
    """
    collate = LeakyCollator("sequences") if leak else Collator("sequences")
    return _summed(model, rows, bf16, collate)


def pair_logps(model: Any, rows: Any, bf16: bool) -> tuple[list[Any], list[Any]]:
    """Summed log-probs and trained tokens of [chosen, rejected] of every pair of `rows`, by index."""
    return _summed(model, rows, bf16, Collator("pairs"))


@torch.no_grad()
def _summed(
    model: Any, rows: Any, bf16: bool, collate: Callable[..., list[PackedBatch]]
) -> tuple[list[Any], list[Any]]:
    found: dict[int, tuple[Any, Any]] = {}
    model.eval()
    for start in range(0, len(rows), AT_ONCE):
        for batch in collate([rows[i] for i in range(start, min(start + AT_ONCE, len(rows)))]):
            batch = batch.to(model.device)
            with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
                sums, counts = sequence_sums(target_logps(model, batch), batch.target_sequence, batch.num_sequences)
            if batch.pairs is not None:
                sums, counts = sums[batch.pairs], counts[batch.pairs]
            values = np.round(sums.double().cpu().numpy(), 2).tolist(), counts.long().tolist()
            found |= dict(zip(batch.indices.tolist(), zip(*values, strict=True), strict=True))
    ordered = [found[index] for index in sorted(found)]
    return [sums for sums, _ in ordered], [counts for _, counts in ordered]


# ------------------------------------------------------------------------------------------------------- exactness


def exactness(model: Any, rows: Any, kind: Kind, count: int) -> dict[str, float]:
    """One step's losses and gradient in fp32: padded against packed (and, of sequences, leaky against packed).

    `loss_difference` is of one example (or completion) over its loss, at most; `gradient_error` is the norm of the
    difference over the norm.
    """
    items = [rows[i] for i in range(min(count, len(rows)))]
    model.eval()
    packed, gradient = _step(model, Collator(kind)(items), target_logps)
    padded, other = _step(model, PaddedCollator(kind)(items), PaddedLogps())
    facts = {"sequences": packed.numel(), "loss_difference": _apart(padded, packed)}
    facts["gradient_error"] = float((other - gradient).norm() / gradient.norm())
    if kind == "sequences":
        leaking, other = _step(model, LeakyCollator(kind)(items), target_logps)
        facts["leaky_loss_difference"] = _apart(leaking, packed)
        facts["leaky_gradient_error"] = float((other - gradient).norm() / gradient.norm())
    return facts


def _step(model: Any, batches: Sequence[PackedBatch], logps_of: Callable[..., Tensor]) -> tuple[Tensor, Tensor]:
    """(log-probs of the sequences or of the pairs' completions, gradient of minus their sum), flat."""
    model.zero_grad(set_to_none=True)
    sums = []
    for batch in batches:
        batch = batch.to(model.device)
        logps = logps_of(model, batch)
        total, _ = sequence_sums(logps, batch.target_sequence, batch.num_sequences)
        total = total if batch.pairs is None else total[batch.pairs].flatten()
        (-total.sum()).backward()
        sums.append(total.detach())
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()
    model.zero_grad(set_to_none=True)
    return torch.cat(sums).double(), gradient


def _apart(values: Tensor, exact: Tensor) -> float:
    return float(((values - exact).abs() / exact.abs().clamp(min=1e-6)).max())
