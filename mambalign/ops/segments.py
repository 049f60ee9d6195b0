"""`Segments`: the one description of packing and of forking that every op understands.

Tokens of many sequences lie end to end in one `[T, ...]` tensor. Segment `s` covers tokens
`cu_seqlens[s]:cu_seqlens[s + 1]` and either starts a sequence (`parent[s] == -1`, a root) or continues segment
`parent[s]` from its *final* convolution window and state. So a padded batch is equal roots, a packed row is many
roots, a preference pair is prompt, chosen and rejected with `parent = [-1, 0, 0]`, and a tree of turns is a deeper
tree.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from mambalign.ops.backends import end_to_end, send, taken_apart

# What an op makes of segments on the host: numbers that decide how it is called, and tables of one dtype for a device.
Tables = tuple[Any, list[Tensor]]


@dataclass
class _Made:
    """A plan, and how it is made for other segments."""

    tables: Callable[[Segments], Tables]
    build: Callable[..., Any]
    form: Any
    sent: Tensor
    plan: Any


def _form(made: Tables) -> Any:
    """What two plans have in common where the tables of one can be written over those of the other."""
    facts, tables = made
    return facts, [table.shape for table in tables]


class Segments:
    """Boundaries and ancestry of the segments of a packed tensor.

    Args:
        cu_seqlens: int64 `[S + 1]`, non-decreasing, starts at 0 and ends at T. A segment may be empty; its final state
            is then the state it started from.
        parent: int64 `[S]`, `-1` for a root, else the index of an *earlier* segment. `None` means all roots.

    The structure lives on the CPU, whatever device the packed tensors are on, because it decides shapes and loop
    bounds; index tensors made from it are moved once per device and kept (`on`, `plan`).

    fixed: the tables of its plans have shapes that depend on the numbers of tokens and segments alone, with empty
        entries where less is needed: what a CUDA graph needs to run again on other segments (`padded`, `become`).

    Example:
        >>> pair = Segments.from_lengths([5, 3, 4], parent=[-1, 0, 0])  # prompt, chosen, rejected
        >>> pair.predecessor().tolist()
        [-1, 0, 1, 2, 3, 4, 5, 6, 4, 8, 9, 10]
    """

    def __init__(self, cu_seqlens: Tensor, parent: Tensor | None = None):
        self.cu_seqlens = torch.as_tensor(cu_seqlens, dtype=torch.int64, device="cpu")
        count = self.cu_seqlens.numel() - 1
        if self.cu_seqlens.dim() != 1 or count < 0:
            raise ValueError(
                f"cu_seqlens must be one-dimensional with at least one entry, got {list(self.cu_seqlens.shape)}"
            )
        if parent is None:
            parent = torch.full((count,), -1)
        self.parent = torch.as_tensor(parent, dtype=torch.int64, device="cpu")
        if self.parent.shape != (count,):
            raise ValueError(f"parent must have one entry per segment ({count}), got shape {list(self.parent.shape)}")
        if int(self.cu_seqlens[0]) != 0 or bool((self.cu_seqlens.diff() < 0).any()):
            raise ValueError("cu_seqlens must start at 0 and never decrease")
        if bool(((self.parent < -1) | (self.parent >= torch.arange(count))).any()):
            raise ValueError("parent[s] must be -1 (a root) or the index of an earlier segment")
        self.fixed = False
        self.memo: dict[object, Any] = {}  # what ops remember of these segments
        self._on_device: dict[tuple[str, str], Tensor] = {}
        self._plans: dict[object, _Made] = {}

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], parent: Sequence[int] | None = None) -> Segments:
        """Segments of the given lengths, laid end to end in that order."""
        cu_seqlens = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        cu_seqlens[1:] = torch.as_tensor(list(lengths), dtype=torch.int64).cumsum(0)
        return cls(cu_seqlens, None if parent is None else torch.as_tensor(list(parent), dtype=torch.int64))

    @property
    def num_segments(self) -> int:
        return self.parent.numel()

    @cached_property
    def num_tokens(self) -> int:
        return int(self.cu_seqlens[-1])

    @cached_property
    def lengths(self) -> Tensor:
        """int64 `[S]`."""
        return self.cu_seqlens.diff()

    @cached_property
    def levels(self) -> list[list[int]]:
        """Segments by depth in the tree: level 0 holds the roots; a level needs only final states of earlier ones."""
        depth: list[int] = []
        for parent in self.parent.tolist():
            depth.append(0 if parent < 0 else depth[parent] + 1)
        levels: list[list[int]] = [[] for _ in range(max(depth, default=-1) + 1)]
        for segment, level in enumerate(depth):
            levels[level].append(segment)
        return levels

    @cached_property
    def segment_of_token(self) -> Tensor:
        """int64 `[T]`: the segment each token lies in."""
        return torch.repeat_interleave(torch.arange(self.num_segments), self.lengths)

    @cached_property
    def last_token(self) -> Tensor:
        """int64 `[S]`: the last token on the path that ends with segment s; if the path is empty, `-1 - root`."""
        last: list[int] = []
        for segment, (parent, length) in enumerate(zip(self.parent.tolist(), self.lengths.tolist(), strict=True)):
            if length:
                last.append(int(self.cu_seqlens[segment + 1]) - 1)
            else:
                last.append(last[parent] if parent >= 0 else -1 - segment)
        return torch.tensor(last, dtype=torch.int64)

    @cached_property
    def _previous(self) -> Tensor:
        """int64 `[T]`: the token before t along its path, or `-1 - root` at the start of that root."""
        previous = torch.arange(-1, self.num_tokens - 1)
        starts = self.cu_seqlens[:-1]
        roots = -1 - torch.arange(self.num_segments)
        entry = torch.where(self.parent < 0, roots, self.last_token[self.parent.clamp(min=0)])
        nonempty = self.lengths > 0
        previous[starts[nonempty]] = entry[nonempty]
        return previous

    def predecessor(self) -> Tensor:
        """int64 `[T]`: index of the token before t along its path, forks crossed; -1 where nothing comes before."""
        return self._previous.clamp(min=-1)

    def windows(self, width: int) -> Tensor:
        """int64 `[T, width]`: for each token, the `width` inputs before it along its path, oldest first.

        Entry `e >= 0` is a token. `e < 0` lies before the sequence: `-1 - e` is an index into the flattened
        `[S, width]` table of initial windows (oldest first), which is zero where no initial state is given.
        """
        return self._step_back(self._previous, width)

    def windows_at(self, tokens: Tensor, width: int) -> Tensor:
        """int64 `[len(tokens), width]`: the rows of `windows` of these tokens, without making the others."""
        return self._step_back(self._previous[tokens], width)

    def final_windows(self, width: int) -> Tensor:
        """int64 `[S, width]`: the last `width` inputs along the path ending with segment s; entries as in `windows`."""
        return self._step_back(self.last_token, width)

    def _step_back(self, position: Tensor, width: int) -> Tensor:
        columns: list[Tensor] = []
        for _ in range(width):
            columns.append(position)
            before = self._previous[position.clamp(min=0)] if self.num_tokens else position
            # Before a root, walk backwards through that root's row of the initial-window table.
            position = torch.where(position >= 0, before, position - self.num_segments)
        # `-1 - root - S * k` so far: root's input number k before its first token, newest first.
        stacked = torch.stack(columns[::-1], dim=1) if columns else position.new_zeros(position.numel(), 0)
        code = -1 - stacked
        table = (code % max(self.num_segments, 1)) * width + (width - 1 - code // max(self.num_segments, 1))
        return torch.where(stacked >= 0, stacked, -1 - table)

    def on(self, name: str, value: Tensor, device: torch.device) -> Tensor:
        """`value` on `device`, copied once and remembered under `name` (all layers of a model share a Segments)."""
        key = (name, str(device))
        if key not in self._on_device:
            self._on_device[key] = value.to(device)
        return self._on_device[key]

    def plan(
        self, key: object, device: torch.device, tables: Callable[[Segments], Tables], build: Callable[..., Any]
    ) -> Any:
        """`build(facts, *tables)` of `tables(self)`, these sent to `device` in one copy; made once for a `key`."""
        if key not in self._plans:
            made = facts, on_host = self._tables(key, tables)
            sent = send(end_to_end(on_host), device)
            self._plans[key] = _Made(tables, build, _form(made), sent, build(facts, *taken_apart(sent, on_host)))
        return self._plans[key].plan

    def _tables(self, key: object, make: Callable[[Segments], Tables]) -> Tables:
        """Of the plan for `key`, on the host; made once, however many graphs are asked whether they fit it."""
        if ("tables", key) not in self.memo:
            self.memo["tables", key] = make(self)
        made: Tables = self.memo["tables", key]
        return made

    @property
    def planned(self) -> set[str]:
        """The first words of the keys of its plans: whose they are."""
        return {str(key[0]) for key in self._plans if isinstance(key, tuple)}

    def padded(self, num_tokens: int, num_segments: int) -> Segments:
        """These, then a root of the tokens that are missing and empty roots, up to these numbers; `fixed`.

        Raises:
            ValueError: there is no room for them.

        Example:
            >>> Segments.from_lengths([5, 3], parent=[-1, 0]).padded(12, 4)
            Segments(lengths=[5, 3, 4, 0], parent=[-1, 0, -1, -1])
        """
        tokens, segments = num_tokens - self.num_tokens, num_segments - self.num_segments
        if tokens < 0 or segments < bool(tokens):
            raise ValueError(f"{self} does not fit {num_tokens} tokens in {num_segments} segments")
        more = torch.full((segments,), num_tokens)
        padded = Segments(torch.cat([self.cu_seqlens, more]), torch.cat([self.parent, torch.full((segments,), -1)]))
        padded.fixed = True
        return padded

    def prepare(self, like: Segments) -> bool:
        """Make the plans that `like` has; whether `like` could `become` these."""
        for key, theirs in like._plans.items():
            self.plan(key, theirs.sent.device, theirs.tables, theirs.build)
            if self._plans[key].form != theirs.form:
                return False
        return True

    def become(self, other: Segments) -> bool:
        """Describe what `other` does from now on, its plans written over these in place: whoever holds the addresses of
        their tables works on `other`. False, and nothing changed, where a plan of `other` would have another shape.
        """
        if self == other:
            return True
        made = {key: other._tables(key, mine.tables) for key, mine in self._plans.items()}
        if any(_form(made[key]) != mine.form for key, mine in self._plans.items()):
            return False
        for key, mine in self._plans.items():
            mine.sent.copy_(send(end_to_end(made[key][1]), mine.sent.device))
        for name, value in list(vars(Segments).items()):
            if isinstance(value, cached_property):
                vars(self).pop(name, None)
        self.memo.clear()
        self._on_device.clear()
        self.cu_seqlens, self.parent = other.cu_seqlens, other.parent
        return True

    def __getstate__(self) -> dict[str, Any]:
        return {"cu_seqlens": self.cu_seqlens, "parent": self.parent, "fixed": self.fixed}  # plans are made again

    def __setstate__(self, state: dict[str, Any]) -> None:
        Segments.__init__(self, state["cu_seqlens"], state["parent"])
        self.fixed = state["fixed"]

    def __repr__(self) -> str:
        return f"Segments(lengths={self.lengths.tolist()}, parent={self.parent.tolist()})"

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Segments)
            and torch.equal(self.cu_seqlens, other.cu_seqlens)
            and torch.equal(self.parent, other.parent)
        )

    __hash__ = None  # type: ignore[assignment]


def whole(num_tokens: int) -> Segments:
    """One root that covers everything: what `segments=None` means."""
    return Segments.from_lengths([num_tokens])
