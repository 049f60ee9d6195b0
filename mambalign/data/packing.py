"""From tokenised examples to the items of a data loader: best-fit-decreasing rows, pairs, and their order by epoch.

The batches themselves are in `batches`, the bin packing in `bins`; both are offered here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from mambalign.data.batches import (
    Collator,
    Kind,
    PackedBatch,
    collate_pairs,
    collate_sequences,
    token_key,
)
from mambalign.data.bins import best_fit_decreasing
from mambalign.data.tokenizing import example_lengths
from mambalign.recipe import UserError

__all__ = [
    "Collator",
    "EpochSampler",
    "PackedBatch",
    "PackedRows",
    "best_fit_decreasing",
    "collate_pairs",
    "collate_sequences",
]


class PackedRows(torch.utils.data.Dataset[list[dict[str, Any]]]):
    """Items for the data loader: each is the list of examples that one row of a batch holds.

    Args:
        tokenized: `TokenizedData.dataset`.
        max_length: tokens in a packed row (sequences only).
        kind: "sequences" (columns `input_ids, loss_mask`) or "pairs" (`prompt_ids, chosen_ids, ...`).
        seed: decides which of equally long examples share a row; the rows are the same in every epoch and for any
            number of processes, their order is `EpochSampler`'s.
        packing: sequences only; False puts every example in a row of its own.
        group_by_prompt: pairs only; an item is then all pairs of one prompt (which they share once), not one pair,
            and `len()` counts prompts.
        longer_alone: sequences only; one longer than max_length is a row of its own instead of an error.

    An example is a dict of the dataset's columns (integer columns as numpy arrays) and its `index` in the dataset.
    """

    def __init__(
        self,
        tokenized: Any,
        *,
        max_length: int | None,
        kind: Kind,
        seed: int,
        packing: bool = True,
        group_by_prompt: bool = False,
        longer_alone: bool = False,
    ):
        self.kind, self.max_length = kind, max_length
        self._rows_are_packed = kind == "sequences" and packing
        self._data = tokenized.with_format("numpy", columns=[c for c in tokenized.column_names if c != "row_id"])
        self._row_ids: list[str] | None = tokenized["row_id"][:] if "row_id" in tokenized.column_names else None
        self._tokens = example_lengths(tokenized)
        if kind == "sequences":
            self._items = self._pack(seed, longer_alone) if packing else [[i] for i in range(len(tokenized))]
        else:
            self._items = self._groups() if group_by_prompt else [[i] for i in range(len(tokenized))]

    def _pack(self, seed: int, longer_alone: bool) -> list[list[int]]:
        if self.max_length is None:
            raise UserError("packing: true needs max_length, the tokens of a packed row; set it, or packing: false")
        if self._tokens.max(initial=0) > self.max_length and not longer_alone:
            longest = int(self._tokens.argmax())
            raise UserError(
                f"max_length: row {self._row_ids[longest] if self._row_ids else longest} of {self._tokens[longest]} "
                f"tokens does not fit a packed row of {self.max_length}; tokenize with this max_length"
            )
        shuffled = np.random.default_rng(seed).permutation(self._tokens.size)
        # A longer one fills a row, as far as the others are concerned.
        bins = best_fit_decreasing(np.minimum(self._tokens[shuffled], self.max_length).tolist(), self.max_length)
        return [sorted(shuffled[items].tolist()) for items in bins]

    def _groups(self) -> list[list[int]]:
        groups: dict[bytes, list[int]] = {}
        for index, prompt in enumerate(self._data["prompt_ids"][:]):
            groups.setdefault(token_key(prompt) or b"no prompt %d" % index, []).append(index)
        return list(groups.values())

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, item: int) -> list[dict[str, Any]]:
        examples = []
        for index in self._items[item]:
            example = dict(self._data[index], index=index)
            if self._row_ids is not None:
                example["row_id"] = self._row_ids[index]
            examples.append(example)
        return examples

    def lengths(self) -> list[int]:
        """Tokens of each item, prompts shared inside a pair counted once."""
        return [int(self._tokens[items].sum()) for items in self._items]

    @property
    def example_lengths(self) -> list[int]:
        """Tokens of each example."""
        lengths: list[int] = self._tokens.tolist()
        return lengths

    @property
    def fill(self) -> float:
        """Real tokens over `rows * max_length`; 1.0 where rows have no fixed length (pairs, or `packing=False`).

        A row of one longer example is full.
        """
        if not self._rows_are_packed or not self._items:
            return 1.0
        assert self.max_length is not None
        return float(self._tokens.sum()) / sum(max(tokens, self.max_length) for tokens in self.lengths())


class EpochSampler(torch.utils.data.Sampler[int]):
    """A permutation of `range(n)` that depends on (seed, epoch) alone, so on no process count and no global state."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed, self.epoch = n, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.default_rng([self.seed, self.epoch]).permutation(self.n).tolist())
