"""DPO on real preference pairs, forward + backward, no optimizer: the usual way, ours, and every step between the two.

    python benchmarks/real_data.py ...                                          # once: makes dpo.npz and hh.npz
    python benchmarks/dpo_real.py --data dpo.npz --multi-turn hh.npz --only 130m    # or 2.8b; both by default

The usual way: policy and reference model, both mamba-ssm's; chosen and rejected padded to the longest of 16 pairs and
concatenated; logits of all positions, log-softmax, gather; as many pairs at a time as the table says. From there to
ours, one step at a time: our kernels; log-probs without logits, of trained tokens alone; reference log-probs computed
before; completions end to end without padding; each prompt once, with two completions that fork from it. On
conversations of several turns the step to shared prompts alone, with batches large enough that the GPU is what is
measured. Last, ours again with blocks recomputed in part and in whole, for what it saves in memory.

The pairs are those of batches spread evenly over all batches by padded size. Policy and reference have different
random weights. Correctness first: log-probs of every completion, and the losses, of all ways against the usual one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, finish, fits, keep, largest_difference, parse, spread
from real_data import Example, load
from torch import Tensor

from mambalign.bench import contestants as models
from mambalign.bench.measure import DEVICE, compete, free_memory, relative_error
from mambalign.data.batches import Collator, PackedBatch, collate_sequences
from mambalign.data.bins import best_fit_decreasing
from mambalign.train.objectives import Completions, PreferenceOptions, preference_loss, sequence_sums

PAIRS = 16  # in a batch
MULTIPLE = 8  # of a padded length: the peer's kernels load whole vectors then
OPTIONS = PreferenceOptions(loss_type="sigmoid", beta=0.1)
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Case:
    """`batches` of 16 pairs; at most `padded_pairs` of them, or `packed_tokens`, at a time; `multi_turn` pairs of the
    others in a batch."""

    size: str
    batches: int
    padded_pairs: int = PAIRS
    packed_tokens: int = 65536
    multi_turn: int = 256


CASES = [Case("130m", 8), Case("2.8b", 2, padded_pairs=4, packed_tokens=8192, multi_turn=64)]
TINY = [Case("tiny", 2, padded_pairs=4, packed_tokens=8192, multi_turn=32)]


@dataclass(frozen=True)
class PaddedPairs:
    """`ids` and `labels` int64 `[P, 2, L]`, -100 where nothing is trained; `indices` into the pairs; and the same
    targets by position in the `2 P L` tokens: what predicts them, what they are, and in which of the 2 P rows."""

    ids: Tensor
    labels: Tensor
    indices: Tensor
    positions: Tensor
    targets: Tensor
    rows: Tensor

    @property
    def lengths(self) -> Tensor:
        """fp32 `[P, 2]`: trained tokens of each completion."""
        return (self.labels[..., 1:] != -100).sum(-1).float()


def whole(pair: Example, side: str) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and completion as one sequence, and its mask."""
    ids = np.concatenate([pair["prompt_ids"], pair[f"{side}_ids"]])
    return ids, np.concatenate([np.zeros_like(pair["prompt_ids"]), pair[f"{side}_mask"]])


def padded(pairs: Sequence[Example], at_once: int) -> Iterator[PaddedPairs]:
    """The batch as the usual way has it, `at_once` pairs at a time, all padded to the longest of the whole batch."""
    longest = max(whole(pair, side)[0].size for pair in pairs for side in SIDES)
    length = -(-longest // MULTIPLE) * MULTIPLE
    ids, labels = np.zeros((len(pairs), 2, length), np.int64), np.full((len(pairs), 2, length), -100)
    for row, pair in enumerate(pairs):
        for column, side in enumerate(SIDES):
            tokens, mask = whole(pair, side)
            ids[row, column, : tokens.size] = tokens
            labels[row, column, : tokens.size] = np.where(mask != 0, tokens, -100)
    for start in range(0, len(pairs), at_once):
        part = slice(start, start + at_once)
        rows, before = np.nonzero(labels[part].reshape(-1, length)[:, 1:] != -100)
        arrays = (
            ids[part],
            labels[part],
            np.array([pair["index"] for pair in pairs[part]]),
            rows * length + before,
            labels[part].reshape(-1, length)[rows, before + 1],
            rows,
        )
        yield PaddedPairs(*(torch.from_numpy(array).to(DEVICE) for array in arrays))


def alone(pairs: Sequence[Example], tokens: int) -> list[PackedBatch]:
    """Packed, every completion behind its own copy of the prompt."""
    costs = [sum(whole(pair, side)[0].size for side in SIDES) for pair in pairs]
    batches = []
    for bin_ in best_fit_decreasing(costs, max(tokens, *costs)):
        sequences = [whole(pairs[i], side) for i in bin_ for side in SIDES]
        batch = collate_sequences([{"input_ids": ids, "loss_mask": mask, "index": 0} for ids, mask in sequences])
        batches.append(
            replace(
                batch,
                pairs=torch.arange(len(sequences)).view(-1, 2),
                indices=torch.tensor([pairs[i]["index"] for i in bin_]),
            )
        )
    return [batch.to(DEVICE) for batch in batches]


def forked(pairs: Sequence[Example], tokens: int) -> list[PackedBatch]:
    """Packed as the project trains: each prompt once, its completions children of it."""
    longest = max(sum(pair[f"{name}_ids"].size for name in ("prompt", *SIDES)) for pair in pairs)
    return [batch.to(DEVICE) for batch in Collator("pairs", max(tokens, longest))([[pair] for pair in pairs])]


# Each gives the log-probs of chosen and rejected, fp32 [P, 2], of one part of a batch.


def by_logits(model: Any, part: PaddedPairs) -> Tensor:
    logits = model(part.ids.flatten(0, 1)).logits[:, :-1].float()
    labels = part.labels.flatten(0, 1)[:, 1:]
    logps = logits.log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    return (logps * (labels != -100)).sum(-1).view(-1, 2)


def by_targets(model: Any, part: PaddedPairs) -> Tensor:
    ids = part.ids.flatten(0, 1)
    logps = model(ids, target_positions=part.positions, target_ids=part.targets, use_cache=False).logps
    return sequence_sums(logps, part.rows, 2 * len(part.ids))[0].view(-1, 2)


def of_packed(model: Any, part: PackedBatch) -> Tensor:
    sums, _ = sequence_sums(models.target_logps(model, part), part.target_sequence, part.num_sequences)
    assert part.pairs is not None
    return sums[part.pairs]


def lengths_of(part: Any) -> Tensor:
    if isinstance(part, PaddedPairs):
        return part.lengths
    return torch.bincount(part.target_sequence, minlength=part.num_sequences)[part.pairs].float()


Logps = Callable[[Any, Any], Tensor]


def losses(logps: Tensor, reference: Tensor, lengths: Tensor) -> Tensor:
    """DPO's loss of every pair, from `[P, 2]` each."""
    chosen, rejected = (Completions(logps[:, i], lengths[:, i], reference[:, i]) for i in (0, 1))
    return preference_loss(chosen, rejected, OPTIONS)


@torch.no_grad()
def all_logps(model: Any, parts: Sequence[Any], logps: Logps, count: int) -> Tensor:
    """fp32 `[count, 2]` by pair index; NaN for pairs that are in none of the parts."""
    values = torch.full((count, 2), float("nan"), device=DEVICE)
    for part in parts:
        values[part.indices] = logps(model, part).float()
    return values


@dataclass(frozen=True)
class Way:
    """One way to train: on what, how log-probs come about, and the reference, a model or its log-probs `[N, 2]`."""

    name: str
    policy: Any
    parts: Sequence[Any]
    logps: Logps
    reference: Any
    recompute: bool | str = False

    @property
    def gib(self) -> float:
        return models.gib(self.policy, *([] if isinstance(self.reference, Tensor) else [self.reference]))

    def pass_over(self) -> Callable[[], Tensor]:
        """Forward and backward pass of every part."""
        run = models.step(self.policy, "bf16", *[lambda part=part: self._loss(part) for part in self.parts])
        return run if not self.recompute else models.recomputing(self.policy, self.recompute, run)

    def _loss(self, part: Any) -> Tensor:
        if isinstance(self.reference, Tensor):
            reference = self.reference[part.indices]
        else:
            with torch.no_grad():
                reference = self.logps(self.reference, part)
        return losses(self.logps(self.policy, part), reference, lengths_of(part)).sum() / PAIRS

    def results(self, count: int) -> tuple[Tensor, Tensor]:
        """Log-probs `[count, 2]` under the policy, and the losses `[count]`, of the first pairs (of whole batches)."""
        parts = [part for part in self.parts if int(part.indices.max()) < count]
        logps = all_logps(self.policy, parts, self.logps, count)
        cached = isinstance(self.reference, Tensor)
        reference = self.reference[:count] if cached else all_logps(self.reference, parts, self.logps, count)
        return logps, losses(logps, reference, torch.ones_like(logps))


def check(ways: Sequence[Way], count: int) -> None:
    """Every way against the first; stops if log-probs or losses differ by more than rounding."""
    truth, loss = ways[0].results(count)
    for way in ways[1:]:
        other, its_loss = way.results(count)
        worst, norm = largest_difference(other, truth), relative_error(its_loss, loss)
        print(
            f"{count} pairs, {way.name} against {ways[0].name}: log-probs differ by at most {worst:.1e}, "
            f"losses by {norm:.1e} in norm (mean {float(its_loss.mean()):.4f}, {float(loss.mean()):.4f})",
            flush=True,
        )
        if not (worst < 2e-2 and norm < 0.15):
            raise SystemExit("they differ by more than rounding: no numbers")


def ladder(case: Case, batches: Sequence[Sequence[Example]], count: int) -> list[Way]:
    """The usual way first, ours last, on the same pairs."""
    policy, reference = models.ours(case.size, "bf16"), models.ours(case.size, "bf16")
    peers = models.mamba_ssm(policy, "bf16"), models.mamba_ssm(reference, "bf16")
    usual = "mamba-ssm, the usual way"

    def widest(at_once: int) -> None:
        pair = (policy, reference) if peers[0] is None else peers
        Way(usual, pair[0], list(padded(batches[-1], at_once))[:1], by_logits, pair[1]).pass_over()()

    at_once = fits(widest, case.padded_pairs)
    pads = [part for batch in batches for part in padded(batch, at_once)]
    single = [part for batch in batches for part in alone(batch, case.packed_tokens)]
    shared = [part for batch in batches for part in forked(batch, case.packed_tokens)]
    tokens = sum(part.num_tokens for part in single)
    print(
        f"{case.size}: {sum(map(len, batches))} pairs, {tokens:,} tokens; padded ({at_once} pairs at a time) "
        f"{(total := sum(part.ids.numel() for part in pads)):,}, of them {1 - tokens / total:.0%} pads; "
        f"prompts shared {sum(part.num_tokens for part in shared):,}",
        flush=True,
    )
    cache = all_logps(reference, shared, of_packed, count)
    ways = [] if peers[0] is None else [Way(usual, peers[0], pads, by_logits, peers[1])]
    return [
        *ways,
        Way("a: our kernels", policy, pads, by_logits, reference),
        Way("b: + fused log-probs", policy, pads, by_targets, reference),
        Way("c: + cached reference", policy, pads, by_targets, cache),
        Way("d: + packing", policy, single, of_packed, cache),
        Way("e: + prefix sharing", policy, shared, of_packed, cache),
        Way("e, recomputed in part", policy, shared, of_packed, cache, recompute="selective"),
        Way("e, blocks recomputed", policy, shared, of_packed, cache, recompute=True),
    ]


def multi_turn(case: Case, policy: Any, pairs: Sequence[Example]) -> list[Way]:
    """Packing without and with shared prompts."""
    groups = [pairs[start : start + case.multi_turn] for start in range(0, len(pairs), case.multi_turn)]
    tokens = max(case.packed_tokens, 16384)
    shared = [part for group in groups for part in forked(group, tokens)]
    cache = torch.zeros(len(pairs), 2, device=DEVICE)  # what the reference says changes nothing about the time
    single = [part for group in groups for part in alone(group, tokens)]
    return [
        Way("d: + packing", policy, single, of_packed, cache),
        Way("e: + prefix sharing", policy, shared, of_packed, cache),
    ]


def measure(ways: Sequence[Way], size: str, pairs: int, repeats: int, data: str) -> list[dict[str, Any]]:
    passes = {way.name: way.pass_over() for way in ways}
    weights = {way.name: way.gib for way in ways}
    last = ways[-1]
    if data == "pairs":
        # What the cache costs once: with it, the whole price of a single epoch.
        count = last.reference.shape[0]
        passes["reference log-probs, once"] = lambda: all_logps(last.policy, last.parts, last.logps, count)
        weights["reference log-probs, once"] = last.gib
    results = compete(passes, repeats, warmup=2)
    rows = []
    for who, result in results.items():
        row = {"size": size, "data": data, "who": who, "seconds": result["ms"] / 1e3, "pairs": pairs}
        row |= {"pairs_per_second": pairs / result["ms"] * 1e3, "peak_gib": weights[who] + result["gib"]}
        rows.append(row | {"weights_gib": weights[who]})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    """A table; every step as a multiple of the one before and of the first, a single epoch of ours at the end."""
    first, before = rows[0], rows[0]
    for row in rows:
        line = (
            f"{row['size']:>5} {row['data']:>10} {row['who']:>26}: {row['pairs_per_second']:8.2f} pairs/s, "
            f"{row['peak_gib']:6.1f} GiB"
        )
        if row is not first and not row["who"].startswith("reference"):
            line += f", {row['pairs_per_second'] / before['pairs_per_second']:5.2f}x the line before"
            line += f", {row['pairs_per_second'] / first['pairs_per_second']:6.2f}x the first"
            line += f" with {row['peak_gib'] / first['peak_gib']:.2f} of its memory"
        print(line, flush=True)
        before = row
    by_name = {row["who"]: row for row in rows}
    once, ours = by_name.get("reference log-probs, once"), by_name.get("e: + prefix sharing")
    if once and ours:
        speed = ours["pairs"] / (ours["seconds"] + once["seconds"])
        print(
            f"      with the reference pass counted, one epoch: {speed:.2f} pairs/s, "
            f"{speed / first['pairs_per_second']:.2f}x the first"
        )


def numbered(pairs: Sequence[Example], vocabulary: int) -> list[Example]:
    """Numbered from 0, with ids of the model's vocabulary."""
    return [
        {name: value % vocabulary if name.endswith("_ids") else value for name, value in pair.items()} | {"index": i}
        for i, pair in enumerate(pairs)
    ]


def run(case: Case, data: list[Example], turns: list[Example], repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    vocabulary = models.VOCABULARY[case.size]
    everything = [data[start : start + PAIRS] for start in range(0, len(data) - PAIRS + 1, PAIRS)]
    chosen = spread(everything, lambda b: max(whole(p, side)[0].size for p in b for side in SIDES), case.batches)
    pairs = numbered([pair for batch in chosen for pair in batch], vocabulary)
    batches = [pairs[start : start + PAIRS] for start in range(0, len(pairs), PAIRS)]
    ways = ladder(case, batches, len(pairs))
    check(ways, PAIRS)
    rows = measure(ways, case.size, len(pairs), repeats, "pairs")
    show(rows)
    policy = ways[-1].policy
    del ways
    free_memory()
    turns = numbered(turns[: case.multi_turn], vocabulary)
    forks = multi_turn(case, policy, turns)
    check(forks, len(turns))
    made = measure(forks, case.size, len(turns), repeats, "multi-turn")
    show(made)
    return rows + made


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__ or "", "dpo_real", repeats=3)
    parser.add_argument("--data", type=Path, default=Path("data/dpo.npz"), help="made by real_data.py")
    parser.add_argument("--multi-turn", type=Path, default=Path("data/hh.npz"), help="made by real_data.py")
    parser.add_argument("--only", nargs="*", choices=["130m", "2.8b"], help="sizes: 30 s and 65 s on an H200")
    options = parse(parser, argv)
    data, turns = load(options.data), load(options.multi_turn)
    if options.tiny:
        data, turns = data[: 3 * PAIRS], turns[:PAIRS]
    rows: list[dict[str, Any]] = []
    for case in TINY if options.tiny else [c for c in CASES if c.size in (options.only or ["130m", "2.8b"])]:
        began = time.monotonic()
        rows += run(case, data, turns, options.repeats)
        print(f"{'':42}{time.monotonic() - began:.0f} s", flush=True)
        keep("dpo_real", options.json, rows)
        free_memory()
    finish("dpo_real", options.json, rows)


if __name__ == "__main__":
    main()
