"""Bin packing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np


def best_fit_decreasing(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Pack items into bins of `budget` tokens: longest first, each into the fullest bin that still takes it.

    O(n log n) for the sort, then one look-up an item in a two-level bit set of the free capacities.
    Deterministic: equal lengths keep their order, of equally full bins the latest is taken.

    Args:
        lengths: tokens of each item, `1..budget`.
        budget: capacity of a bin.

    Returns:
        Bins in the order they were opened; each lists its items' indices, ascending. Every index occurs once.

    Raises:
        ValueError: an item is empty or longer than the budget.

    Example:
        >>> best_fit_decreasing([6, 5, 4, 3, 2], budget=10)
        [[0, 2], [1, 3, 4]]
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if sizes.size == 0:
        return []
    if budget < 1 or sizes.min() < 1 or sizes.max() > budget:
        bad = int(np.argmax((sizes < 1) | (sizes > budget)))
        raise ValueError(f"item {bad} has {sizes[bad]} tokens; items of 1 to {budget} tokens fit a row of {budget}")
    shift = max(1, (int(budget).bit_length() + 1) // 2)  # words of about sqrt(budget) bits
    low = (1 << shift) - 1
    words = [0] * ((budget >> shift) + 1)  # bit r of word w: some bin has w * 2**shift + r tokens free
    summary = 0  # bit w: words[w] is not empty
    open_bins: dict[int, list[int]] = defaultdict(list)  # by free capacity
    bins: list[list[int]] = []
    order = np.argsort(-sizes, kind="stable").tolist()
    for index, size in zip(order, sizes[order].tolist(), strict=True):
        word = size >> shift
        fits = words[word] >> (size & low) << (size & low)
        if not fits:
            above = summary >> (word + 1) << (word + 1)
            word = (above & -above).bit_length() - 1
            fits = words[word] if word >= 0 else 0
        if fits:
            free = (word << shift) + (fits & -fits).bit_length() - 1
            chosen = open_bins[free].pop()
            if not open_bins[free]:
                words[word] &= ~(1 << (free & low))
                if not words[word]:
                    summary &= ~(1 << word)
            bins[chosen].append(index)
        else:
            free, chosen = budget, len(bins)
            bins.append([index])
        rest = free - size
        if rest:
            open_bins[rest].append(chosen)
            words[rest >> shift] |= 1 << (rest & low)
            summary |= 1 << (rest >> shift)
    for items in bins:
        items.sort()
    return bins
