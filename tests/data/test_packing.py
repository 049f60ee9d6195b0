"""Packing keeps every example once and fills rows; batches hold exactly the targets of each sequence alone."""

from __future__ import annotations

import random
import time
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from mambalign.data.packing import (
    Collator,
    EpochSampler,
    PackedBatch,
    PackedRows,
    best_fit_decreasing,
    collate_pairs,
    collate_sequences,
)
from mambalign.recipe import UserError

Pair = dict[str, Any]


# ------------------------------------------------------------------------------------------------------ bin packing


def best_fit_slowly(lengths: list[int], budget: int) -> list[list[int]]:
    """The definition: longest first, into the fullest bin with room."""
    bins: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [(budget - sum(lengths[i] for i in b), n) for n, b in enumerate(bins)]
        fitting = [(free, n) for free, n in fitting if free >= lengths[index]]
        if fitting:
            bins[min(fitting)[1]].append(index)
        else:
            bins.append([index])
    return [sorted(b) for b in bins]


@pytest.mark.parametrize("seed", range(20))
def test_bins_are_those_of_the_definition(seed: int) -> None:
    rng = random.Random(seed)
    budget = rng.choice([1, 2, 3, 7, 63, 64, 65, 100, 1000, 4097])
    lengths = [rng.randint(1, max(1, int(budget * rng.choice([1, 0.5, 0.1])))) for _ in range(rng.randint(0, 120))]
    bins = best_fit_decreasing(lengths, budget)
    assert sorted(i for b in bins for i in b) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in b) for b in bins]
    assert all(0 < load <= budget for load in loads)
    assert all(b == sorted(b) for b in bins)
    # Bins may differ where two are equally full, their loads may not.
    assert sorted(loads) == sorted(sum(lengths[i] for i in b) for b in best_fit_slowly(lengths, budget))
    assert bins == best_fit_decreasing(np.array(lengths, dtype=np.int32), budget), "deterministic"
    lower = -(-sum(lengths) // budget)
    assert len(bins) <= 11 / 9 * lower + 1 or any(length > budget / 2 for length in lengths)


def test_the_fullest_bin_takes_it() -> None:
    assert best_fit_decreasing([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]
    assert best_fit_decreasing([7, 8, 2], 10) == [[1, 2], [0]]
    assert best_fit_decreasing([5], 5) == [[0]] and best_fit_decreasing([], 5) == []


@pytest.mark.parametrize(("lengths", "budget"), [([3, 11], 10), ([3, 0], 10), ([-1], 10), ([1], 0)])
def test_bins_refuse_what_cannot_fit(lengths: list[int], budget: int) -> None:
    with pytest.raises(ValueError, match=r"item . has -?\d+ tokens"):
        best_fit_decreasing(lengths, budget)


@pytest.mark.parametrize("budget", [2048, 131072])
def test_bins_of_many_items_fast(budget: int) -> None:
    lengths = np.random.default_rng(0).integers(1, budget, 200_000).tolist()
    start = time.process_time()
    bins = best_fit_decreasing(lengths, budget)
    assert time.process_time() - start < 60, "about a second where nothing else runs, half an hour if all is compared"
    assert sum(lengths) / (len(bins) * budget) > 0.995


# ------------------------------------------------------------------------------------------------------------ rows


def sequences(lengths: list[int], seed: int = 0) -> datasets.Dataset:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(0, 50, n).tolist() for n in lengths]
    masks = [[0, *rng.integers(0, 2, n - 1).tolist()] for n in lengths]
    features = datasets.Features(
        {
            "input_ids": datasets.List(datasets.Value("int32")),
            "loss_mask": datasets.List(datasets.Value("int8")),
            "row_id": datasets.Value("string"),
        }
    )
    rows = {"input_ids": ids, "loss_mask": masks, "row_id": [f"d:train:{i}" for i in range(len(ids))]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_rows_hold_every_example_once_within_the_budget() -> None:
    data = sequences(np.random.default_rng(1).integers(1, 64, 500).tolist())
    rows = PackedRows(data, max_length=64, kind="sequences", seed=3)
    items = [rows[i] for i in range(len(rows))]
    assert sorted(example["index"] for item in items for example in item) == list(range(500))
    assert [sum(len(example["input_ids"]) for example in item) for item in items] == rows.lengths()
    assert max(rows.lengths()) <= 64
    assert rows.fill == pytest.approx(sum(rows.lengths()) / (64 * len(rows)))
    assert rows.fill > 0.97
    example = items[7][0]
    assert example["row_id"] == f"d:train:{example['index']}"
    assert list(example["input_ids"]) == data[example["index"]]["input_ids"]


def test_rows_depend_on_the_seed_only() -> None:
    data = sequences([10] * 60)

    def make(seed: int) -> list[list[int]]:
        return [[e["index"] for e in row] for row in PackedRows(data, max_length=30, kind="sequences", seed=seed)]

    torch.manual_seed(1)
    first = make(0)
    torch.manual_seed(2)
    assert first == make(0)
    assert first != make(1), "of equally long examples the seed decides which share a row"


def test_rows_of_a_dataset_with_rows_left_out() -> None:
    data = sequences([5, 9, 7, 3]).select([3, 1])
    rows = PackedRows(data, max_length=20, kind="sequences", seed=0)
    assert rows.lengths() == [12]
    assert [e["row_id"] for e in rows[0]] == ["d:train:3", "d:train:1"]


def test_rows_without_packing() -> None:
    rows = PackedRows(sequences([5, 9, 7]), max_length=20, kind="sequences", seed=0, packing=False)
    assert rows.lengths() == [5, 9, 7] and len(rows) == 3 and rows.fill == 1.0


def test_a_row_needs_a_budget() -> None:
    with pytest.raises(UserError, match="packing: true needs max_length"):
        PackedRows(sequences([5]), max_length=None, kind="sequences", seed=0)


def test_an_example_over_the_budget_is_named() -> None:
    with pytest.raises(UserError, match=r"max_length: row d:train:1 of 9 tokens does not fit a packed row of 8"):
        PackedRows(sequences([5, 9, 7]), max_length=8, kind="sequences", seed=0)


def test_no_examples_are_no_rows() -> None:
    rows = PackedRows(sequences([]), max_length=8, kind="sequences", seed=0)
    assert len(rows) == 0 and rows.lengths() == [] and rows.fill == 1.0


def test_epochs_are_permutations_of_their_own() -> None:
    sampler = EpochSampler(50, seed=7)
    orders = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
    assert orders[0] == orders[2] != orders[1]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert list(EpochSampler(50, seed=8)) != orders[0]
    assert len(sampler) == 50


# ---------------------------------------------------------------------------------------------------------- batches


def paths(batch: PackedBatch) -> list[list[int]]:
    """For each sequence k the token positions from the start of its root to its end: leaf segments in their order."""
    found: list[list[int]] = []
    bounds, parents = batch.segments.cu_seqlens.tolist(), batch.segments.parent.tolist()
    for segment, parent in enumerate(parents):
        own = list(range(bounds[segment], bounds[segment + 1]))
        found.append((found[parent] if parent >= 0 else []) + own)
    return [path for segment, path in enumerate(found) if segment not in parents]


def targets_of(batch: PackedBatch, k: int) -> list[tuple[int, int]]:
    """(position of the predicting token, target id) of sequence k."""
    mine = batch.target_sequence == k
    return list(zip(batch.target_positions[mine].tolist(), batch.target_ids[mine].tolist(), strict=True))


def check_sequence(batch: PackedBatch, k: int, prompt: list[int], ids: list[int], mask: list[int]) -> None:
    """Sequence k, read along its path through the forks, is prompt + ids and has exactly the targets it has alone."""
    path, tokens = paths(batch)[k], batch.input_ids.tolist()
    assert [tokens[position] for position in path] == prompt + ids
    trained = [0] * len(prompt) + mask
    expected = [(path[t - 1], tokens[path[t]]) for t in range(1, len(path)) if trained[t]]
    assert targets_of(batch, k) == expected


def random_pairs(rng: random.Random, count: int, *, empty_prompts: bool = True) -> list[Pair]:
    """Pairs over few prompts and completions, so that many are shared."""
    prompts = [[rng.randrange(9) for _ in range(rng.randint(1, 6))] for _ in range(3)] + [[]] * empty_prompts
    completions = [[rng.randrange(9) for _ in range(rng.randint(1, 5))] for _ in range(5)]
    pairs = []
    while len(pairs) < count:
        prompt, chosen, rejected = rng.choice(prompts), rng.choice(completions), rng.choice(completions)
        if chosen == rejected:
            continue
        masks = [[rng.randrange(2) for _ in c[:-1]] + [1] for c in (chosen, rejected)]
        pair = dict(prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)
        pairs.append(dict(pair, chosen_mask=masks[0], rejected_mask=masks[1], index=len(pairs)))
    return pairs


def check_pairs(batch: PackedBatch, pairs: list[Pair]) -> None:
    assert batch.pairs is not None and batch.indices.tolist() == [pair["index"] for pair in pairs]
    for pair, (chosen, rejected) in zip(pairs, batch.pairs.tolist(), strict=True):
        check_sequence(batch, chosen, pair["prompt_ids"], pair["chosen_ids"], pair["chosen_mask"])
        check_sequence(batch, rejected, pair["prompt_ids"], pair["rejected_ids"], pair["rejected_mask"])
    assert sorted({int(k) for k in batch.pairs.flatten()}) == list(range(batch.num_sequences))
    assert batch.num_targets == batch.target_positions.numel() == batch.target_sequence.numel()


def test_a_pair_forks_after_its_prompt() -> None:
    pair = dict(
        prompt_ids=[5, 6, 7], chosen_ids=[1, 2], chosen_mask=[1, 1], rejected_ids=[3, 4, 8], rejected_mask=[1, 0, 1]
    )
    batch = collate_pairs([dict(pair, index=11)])
    assert batch.input_ids.tolist() == [5, 6, 7, 1, 2, 3, 4, 8]
    assert batch.segments.parent.tolist() == [-1, 0, 0]
    assert batch.target_positions.tolist() == [2, 3, 2, 6]  # the prompt's last token predicts both first tokens
    assert batch.target_ids.tolist() == [1, 2, 3, 8]
    assert batch.target_sequence.tolist() == [0, 0, 1, 1]
    assert batch.pairs is not None and batch.pairs.tolist() == [[0, 1]]
    assert batch.indices.tolist() == [11]
    assert batch.num_prompt_tokens_saved == 3


def test_an_empty_prompt_leaves_two_roots() -> None:
    pair = dict(prompt_ids=[], chosen_ids=[1, 2], chosen_mask=[1, 1], rejected_ids=[3, 4], rejected_mask=[1, 1])
    batch = collate_pairs([dict(pair, index=0), dict(pair, index=1)])
    assert batch.segments.parent.tolist() == [-1, -1]
    assert batch.target_ids.tolist() == [2, 4], "nothing predicts a first token"
    assert batch.num_prompt_tokens_saved == 0


def test_shared_prompts_and_completions_are_held_once() -> None:
    base = dict(prompt_ids=[5, 6], chosen_ids=[1], chosen_mask=[1], rejected_ids=[2], rejected_mask=[1])
    flipped = dict(base, chosen_ids=[2], rejected_ids=[1])
    other_mask = dict(base, rejected_ids=[2, 3], rejected_mask=[0, 1])
    another = dict(base, prompt_ids=[5, 7])
    pairs = [dict(pair, index=i) for i, pair in enumerate([base, flipped, another, other_mask])]
    batch = collate_pairs(pairs)
    assert batch.segments.parent.tolist() == [-1, 0, 0, 0, -1, 4, 4]
    assert batch.num_tokens == 2 + 1 + 1 + 2 + 2 + 1 + 1
    assert batch.pairs is not None and batch.pairs.tolist() == [[0, 1], [1, 0], [3, 4], [0, 2]]
    assert batch.num_prompt_tokens_saved == 4 * 2 * 2 - 4
    same_ids = dict(base, rejected_ids=[1, 2], chosen_ids=[1, 2], chosen_mask=[1, 1], rejected_mask=[0, 1], index=9)
    assert collate_pairs([same_ids]).num_sequences == 2, "the mask tells completions apart"
    check_pairs(batch, pairs)


@pytest.mark.parametrize("seed", range(25))
def test_forked_targets_are_those_of_each_completion_alone(seed: int) -> None:
    rng = random.Random(seed)
    pairs = random_pairs(rng, rng.randint(1, 12))
    batch = collate_pairs(pairs)
    check_pairs(batch, pairs)
    alone = sum(2 * len(p["prompt_ids"]) for p in pairs)
    bounds, parent = batch.segments.cu_seqlens.tolist(), batch.segments.parent.tolist()
    with_children = {p for p in parent if p >= 0}
    assert batch.num_prompt_tokens_saved == alone - sum(bounds[s + 1] - bounds[s] for s in with_children)


@pytest.mark.parametrize("seed", range(10))
def test_packed_targets_are_those_of_each_sequence_alone(seed: int) -> None:
    rng = random.Random(seed)
    data = sequences([rng.randint(1, 9) for _ in range(rng.randint(1, 8))], seed)
    examples = [dict(row, index=i + 100) for i, row in enumerate(data)]
    batch = collate_sequences(examples)
    assert batch.segments.parent.tolist() == [-1] * len(examples) and batch.pairs is None
    assert batch.num_sequences == len(examples) and batch.indices.tolist() == [e["index"] for e in examples]
    for k, example in enumerate(examples):
        check_sequence(batch, k, [], example["input_ids"], example["loss_mask"])
    assert batch.input_ids.dtype == batch.target_ids.dtype == batch.target_positions.dtype == torch.int64


def test_our_own_mistakes_are_caught() -> None:
    with pytest.raises(AssertionError, match="empty segment"):
        collate_sequences([dict(input_ids=[], loss_mask=[], index=0)])
    same = dict(prompt_ids=[1], chosen_ids=[2], chosen_mask=[1], rejected_ids=[2], rejected_mask=[1], index=0)
    with pytest.raises(AssertionError, match="chosen and rejected are the same"):
        collate_pairs([same])


def test_moving_a_batch() -> None:
    batch = collate_sequences([dict(input_ids=[1, 2, 3], loss_mask=[0, 1, 1], index=0)])
    moved = batch.to("meta", non_blocking=True)
    assert moved.input_ids.is_meta and moved.target_ids.is_meta and not moved.indices.is_meta
    assert moved.segments is batch.segments and moved.pairs is None and moved.num_sequences == 1
    assert not batch.input_ids.is_meta


# --------------------------------------------------------------------------------------------------------- collator


def test_collator_makes_one_batch_or_several_small_ones() -> None:
    data = sequences(np.random.default_rng(2).integers(2, 40, 60).tolist())
    rows = PackedRows(data, max_length=40, kind="sequences", seed=0)
    items = [rows[i] for i in range(6)]
    indices = [example["index"] for item in items for example in item]
    (whole,) = Collator("sequences")(items)
    assert whole.indices.tolist() == indices
    parts = Collator("sequences", max_tokens=64)(items)
    assert len(parts) > 1 and all(part.num_tokens <= 64 for part in parts)
    assert sorted(i for part in parts for i in part.indices.tolist()) == sorted(indices)
    assert sum(part.num_targets for part in parts) == whole.num_targets


@pytest.mark.parametrize("seed", range(10))
def test_pair_micro_batches_hold_the_same_targets(seed: int) -> None:
    rng = random.Random(seed)
    pairs = random_pairs(rng, 14, empty_prompts=seed % 2 == 0)
    items = [[pair] for pair in pairs]
    (whole,) = Collator("pairs")(items)
    check_pairs(whole, pairs)
    parts = Collator("pairs", max_tokens=24)(items)
    assert all(part.num_tokens <= 24 for part in parts)
    for part in parts:
        check_pairs(part, [pairs[i] for i in part.indices.tolist()])
    assert sorted(i for part in parts for i in part.indices.tolist()) == list(range(14))
    (roomy,) = Collator("pairs", max_tokens=whole.num_tokens)(items)
    assert roomy.num_tokens == whole.num_tokens, "one unit a prompt, so nothing is computed twice if it fits"


def test_collator_refuses_an_example_over_the_bound() -> None:
    example = dict(input_ids=[1] * 9, loss_mask=[0] + [1] * 8, index=3, row_id="d:train:3")
    with pytest.raises(UserError, match="max_tokens_per_device: 8 is too small for row d:train:3 of 9 tokens"):
        Collator("sequences", max_tokens=8)([[example]])


def test_pairs_as_items() -> None:
    pairs = random_pairs(random.Random(0), 30)
    columns = {name: [pair[name] for pair in pairs] for name in pairs[0] if name != "index"}
    data = datasets.Dataset.from_dict({**columns, "row_id": [str(i) for i in range(30)]})
    rows = PackedRows(data, max_length=64, kind="pairs", seed=0)
    assert len(rows) == 30 and rows.fill == 1.0
    assert rows.lengths() == [sum(len(p[f"{n}_ids"]) for n in ("prompt", "chosen", "rejected")) for p in pairs]
    (batch,) = Collator("pairs")([rows[4], rows[9]])
    check_pairs(batch, [pairs[4], pairs[9]])
    groups = PackedRows(data, max_length=64, kind="pairs", seed=0, group_by_prompt=True)
    held = [[tuple(example["prompt_ids"]) for example in groups[i]] for i in range(len(groups))]
    assert sorted(e["index"] for i in range(len(groups)) for e in groups[i]) == list(range(30))
    assert all(len(set(prompts)) == 1 for prompts in held)
    full = [prompts[0] for prompts in held if prompts[0]]
    assert len(full) == len(set(full)), "one item a prompt"
    assert all(len(prompts) == 1 for prompts in held if not prompts[0]), "no prompt is nothing to share"


def test_works_in_a_data_loader() -> None:
    rows = PackedRows(sequences([4] * 20), max_length=8, kind="sequences", seed=0)
    loader = torch.utils.data.DataLoader(
        rows, batch_size=2, sampler=EpochSampler(len(rows), 0), collate_fn=Collator("sequences"), num_workers=1
    )
    seen = [i for batches in loader for batch in batches for i in batch.indices.tolist()]
    assert sorted(seen) == list(range(20))
