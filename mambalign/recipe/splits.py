"""Which splits of a dataset are for evaluation only, and which an entry of `dataset_mixer` names."""

from __future__ import annotations

import re
from typing import Any

from mambalign.recipe.values import UserError

# Whole words only: `latest`, `contest`, `retrieval`, `invalid` and `testimonials` are no test sets.
_TEST_WORDS = re.compile(
    r"(?<![a-z])(?:(?:test|eval|val|valid|dev)(?:s|set|data|split)?|testing|test-?dev|test-?mini|evaluations?|validation"
    r"|development|h[eo]ld[-_ ]?out)(?![a-z])"
)


def is_test_split(name: str) -> bool:
    """Whether a split (or file) of this name is for evaluation only: whether one of its words says so.

    Example:
        >>> [is_test_split(n) for n in ("test_sft", "validation", "heldout", "myTest", "train", "latest", "retrieval")]
        [True, True, True, True, False, False, False]
    """
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    return bool(_TEST_WORDS.search(words.lower()))


def entry_splits(name: str, entry: Any) -> list[str]:
    """The splits that the `dataset_mixer` entry `name` gives itself, before the recipe's `dataset_splits`.

    Raises:
        UserError: both `split` and `splits`, or neither a name nor a list of names.
    """
    if not isinstance(entry, dict):
        return []
    if "split" in entry and "splits" in entry:
        raise UserError(f"dataset_mixer.{name}: give split or splits, not both")
    splits = entry.get("splits", entry.get("split")) or []
    splits = [splits] if isinstance(splits, str) else splits
    if not isinstance(splits, list) or not all(isinstance(split, str) for split in splits):
        raise UserError(f"dataset_mixer.{name}: splits {splits!r} must be a name or a list of names")
    return splits
