"""From examples to flat batches: sequences end to end, preference pairs as completions that fork from one prompt.

Nothing is padded. A batch is one `[T]` row of tokens described by `Segments`; a packed row is many roots, a preference
pair is a prompt with two children. What is trained is a list of targets, each with the position whose hidden state
predicts it, so that the first token of a completion is predicted by the last token of its prompt, across the fork.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mambalign.data.bins import best_fit_decreasing
from mambalign.ops.segments import Segments
from mambalign.recipe import UserError

Kind = Literal["sequences", "pairs"]
Example = Mapping[str, Any]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class PackedBatch:
    """One flat batch of K sequences (SFT: examples; preferences: distinct completions).

    Attributes:
        input_ids: int64 `[T]`, all tokens end to end.
        segments: their boundaries and forks; stays on the CPU.
        target_positions: int64 `[M]`, the position whose hidden state predicts target m: the token before it along its
            path, which for a completion's first token is the prompt's last token.
        target_ids: int64 `[M]`, the token to predict.
        target_sequence: int64 `[M]`, the sequence `0..K-1` that target m belongs to.
        num_sequences: K.
        last_positions: int64 `[K]`, where the last trained token of every sequence lies (its last token, if none is
            trained): the end of its answer, which a reward model scores.
        pairs: int64 `[P, 2]` of (chosen k, rejected k), or None for plain sequences.
        indices: int64, the dataset index of every example: `[K]` for sequences, `[P]` for pairs; stays on the CPU.
        num_prompt_tokens_saved: prompt tokens that computing every completion alone would compute in addition.
        margins: fp32 `[P]`, by how much the reward of chosen is to be above that of rejected, if the pairs say so.
    """

    input_ids: Tensor
    segments: Segments
    target_positions: Tensor
    target_ids: Tensor
    target_sequence: Tensor
    num_sequences: int
    last_positions: Tensor
    pairs: Tensor | None
    indices: Tensor
    num_prompt_tokens_saved: int = 0
    margins: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def num_targets(self) -> int:
        return self.target_ids.numel()

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PackedBatch:
        """A copy with every tensor on `device` but what only the host asks: `segments` and `indices`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PackedBatch:
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function: Any) -> PackedBatch:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {name: v for name, v in values.items() if isinstance(v, Tensor) and name != "indices"}
        return replace(self, **{name: function(tensor) for name, tensor in tensors.items()})


def token_key(ids: Any) -> bytes:
    """Ids as int64 bytes: equal exactly where the ids are, and readable with `np.frombuffer`."""
    return np.ascontiguousarray(ids, dtype=np.int64).tobytes()


def _assemble(
    tokens: list[Ints], masks: list[Ints], parents: list[int], sequences: list[int], **rest: Any
) -> PackedBatch:
    """Lay segments end to end. `sequences[s]` is the number k of the sequence that segment s holds, -1 for a prompt."""
    lengths = [ids.size for ids in tokens]
    assert min(lengths) > 0, "an empty segment reached the batch"
    assert lengths == [mask.size for mask in masks]
    segments = Segments.from_lengths(lengths, parents)
    flat, mask = np.concatenate(tokens), np.concatenate(masks)
    before = segments.predecessor().numpy()
    targets = np.flatnonzero((mask != 0) & (before >= 0))
    sequence = np.repeat(np.asarray(sequences, dtype=np.int64), lengths)[targets]
    assert (sequence >= 0).all(), "a prompt token is marked as trained"
    starts = segments.cu_seqlens.tolist()
    ends = [starts[s] + _last_trained(masks[s]) for s, k in enumerate(sequences) if k >= 0]
    return PackedBatch(
        input_ids=torch.from_numpy(flat),
        segments=segments,
        target_positions=torch.from_numpy(before[targets]),
        target_ids=torch.from_numpy(flat[targets]),
        target_sequence=torch.from_numpy(sequence),
        last_positions=torch.tensor(ends, dtype=torch.int64),
        **rest,
    )


def _last_trained(mask: Ints) -> int:
    trained = np.flatnonzero(mask)
    return int(trained[-1]) if trained.size else mask.size - 1


def collate_sequences(examples: Sequence[Example]) -> PackedBatch:
    """Examples (`input_ids, loss_mask, index`) as roots of one flat batch; `loss_mask` 1 marks a target.

    The first token of a sequence has nothing before it and is never a target.
    """
    tokens = [np.asarray(example["input_ids"], dtype=np.int64) for example in examples]
    return _assemble(
        tokens,
        [np.asarray(example["loss_mask"], dtype=np.int64) for example in examples],
        [-1] * len(tokens),
        list(range(len(tokens))),
        num_sequences=len(tokens),
        pairs=None,
        indices=torch.tensor([example["index"] for example in examples]),
    )


@dataclass
class _Prompt:
    """One distinct prompt of a batch, its distinct completions, and the pairs that use them."""

    ids: Ints
    completions: dict[tuple[bytes, bytes], int]  # (ids, mask) -> position among this prompt's completions
    members: list[int]  # examples

    def cost(self, completions: Iterable[tuple[bytes, bytes]]) -> int:
        """Tokens of this prompt with these completions."""
        return self.ids.size + sum(len(ids) // self.ids.itemsize for ids, _ in completions)


def _completion(example: Example, side: str) -> tuple[bytes, bytes]:
    return token_key(example[f"{side}_ids"]), token_key(example[f"{side}_mask"])


def _by_prompt(examples: Sequence[Example]) -> list[_Prompt]:
    """Distinct prompts in order of first use. An empty prompt is shared by nobody: there is nothing to compute once."""
    prompts: dict[bytes, _Prompt] = {}
    for number, example in enumerate(examples):
        key = token_key(example["prompt_ids"])
        prompt = prompts.setdefault(key, _Prompt(np.frombuffer(key, dtype=np.int64), {}, []))
        prompt.members.append(number)
        for side in ("chosen", "rejected"):
            prompt.completions.setdefault(_completion(example, side), len(prompt.completions))
    return list(prompts.values())


def collate_pairs(examples: Sequence[Example]) -> PackedBatch:
    """Preference pairs as one flat batch of forked segments.

    Identical `prompt_ids` are one root; identical (prompt, completion, mask) are one child of it. Where the prompt is
    empty, completions are roots themselves and their first token is not a target.

    Args:
        examples: dicts with `prompt_ids, chosen_ids, chosen_mask, rejected_ids, rejected_mask, index`.

    Example:
        >>> pair = dict(prompt_ids=[5, 6], chosen_ids=[7], chosen_mask=[1], rejected_ids=[8, 9], rejected_mask=[1, 1])
        >>> batch = collate_pairs([{**pair, "index": 0}])
        >>> batch.segments.parent.tolist(), batch.target_positions.tolist(), batch.target_ids.tolist()
        ([-1, 0, 0], [1, 1, 3], [7, 8, 9])
    """
    tokens: list[Ints] = []
    masks: list[Ints] = []
    parents: list[int] = []
    sequences: list[int] = []
    pairs = np.full((len(examples), 2), -1, dtype=np.int64)
    num_sequences = saved = 0
    for prompt in _by_prompt(examples):
        root = -1
        if prompt.ids.size:
            root = len(tokens)
            tokens.append(prompt.ids)
            masks.append(np.zeros_like(prompt.ids))
            parents.append(-1)
            sequences.append(-1)
        for offset, (ids, mask) in enumerate(prompt.completions):
            tokens.append(np.frombuffer(ids, dtype=np.int64))
            masks.append(np.frombuffer(mask, dtype=np.int64))
            parents.append(root)
            sequences.append(num_sequences + offset)
        for number in prompt.members:
            for column, side in enumerate(("chosen", "rejected")):
                pairs[number, column] = num_sequences + prompt.completions[_completion(examples[number], side)]
        saved += prompt.ids.size * (2 * len(prompt.members) - 1)
        num_sequences += len(prompt.completions)
    assert (pairs >= 0).all() and (pairs[:, 0] != pairs[:, 1]).all(), "a pair's chosen and rejected are the same"
    margins = [example["margin"] for example in examples if "margin" in example]
    assert len(margins) in (0, len(examples))
    return _assemble(
        tokens,
        masks,
        parents,
        sequences,
        num_sequences=num_sequences,
        pairs=torch.from_numpy(pairs),
        indices=torch.tensor([example["index"] for example in examples]),
        num_prompt_tokens_saved=saved,
        margins=torch.tensor(margins, dtype=torch.float32) if margins else None,
    )


def collate_responses(groups: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> PackedBatch:
    """Groups of (prompt ids, responses' ids) as one flat batch without targets, for scoring: sequence k is response k.

    A prompt is one root, each of its responses a child; where the prompt is empty, responses are roots.

    Example:
        >>> batch = collate_responses([([5, 6], [[7], [8, 9]]), ([], [[4]])])
        >>> batch.segments.parent.tolist(), batch.last_positions.tolist()
        ([-1, 0, 0, -1], [2, 4, 5])
    """
    tokens: list[Ints] = []
    parents: list[int] = []
    sequences: list[int] = []
    count = saved = 0
    for prompt, responses in groups:
        root = len(tokens) if len(prompt) else -1
        laid = [prompt, *responses] if len(prompt) else responses
        tokens += [np.asarray(ids, dtype=np.int64) for ids in laid]
        parents += ([-1] if len(prompt) else []) + [root] * len(responses)
        sequences += ([-1] if len(prompt) else []) + list(range(count, count + len(responses)))
        count += len(responses)
        saved += len(prompt) * (len(responses) - 1)
    return _assemble(
        tokens,
        [np.zeros_like(ids) for ids in tokens],
        parents,
        sequences,
        num_sequences=count,
        pairs=None,
        indices=torch.arange(len(groups)),
        num_prompt_tokens_saved=saved,
    )


class Collator:
    """Turns the items of a device batch into flat micro-batches.

    Args:
        kind: as in `PackedRows`.
        max_tokens: no micro-batch holds more tokens; None makes one flat batch of everything. Pairs of one prompt stay
            together as long as they fit.

    Raises (on call):
        UserError: one example alone is longer than `max_tokens`.
    """

    def __init__(self, kind: Kind, max_tokens: int | None = None):
        self.kind, self.max_tokens = kind, max_tokens
        self._collate = collate_sequences if kind == "sequences" else collate_pairs

    def __call__(self, items: Sequence[Sequence[Example]]) -> list[PackedBatch]:
        examples = [example for item in items for example in item]
        if self.max_tokens is None:
            return [self._collate(examples)] if examples else []
        units, costs = self._units(examples)
        self._check(examples, units, costs)
        bins = best_fit_decreasing(costs, self.max_tokens)
        batches = sorted(sorted(number for unit in items for number in units[unit]) for items in bins)
        return [self._collate([examples[number] for number in batch]) for batch in batches]

    def _units(self, examples: list[Example]) -> tuple[list[list[int]], list[int]]:
        """What is not to be torn apart, as example numbers, and its tokens."""
        if self.kind == "sequences":
            return [[n] for n in range(len(examples))], [len(example["input_ids"]) for example in examples]
        assert self.max_tokens is not None
        units: list[list[int]] = []
        costs: list[int] = []
        for prompt in _by_prompt(examples):
            part: list[int] = []
            held: set[tuple[bytes, bytes]] = set()
            for number in prompt.members:
                pair = {_completion(examples[number], side) for side in ("chosen", "rejected")}
                if part and prompt.cost(held | pair) > self.max_tokens:
                    units.append(part)
                    costs.append(prompt.cost(held))
                    part, held = [], set()
                part.append(number)
                held |= pair
            units.append(part)
            costs.append(prompt.cost(held))
        return units, costs

    def _check(self, examples: list[Example], units: list[list[int]], costs: list[int]) -> None:
        for unit, cost in zip(units, costs, strict=True):
            if self.max_tokens is not None and cost > self.max_tokens:
                example = examples[unit[0]]
                longest = "2 * max_length" if self.kind == "pairs" else "max_length"
                raise UserError(
                    f"max_tokens_per_device: {self.max_tokens} is too small for row "
                    f"{example.get('row_id', example['index'])} of {cost} tokens; raise it ({longest} is always "
                    "enough) or lower max_length"
                )
