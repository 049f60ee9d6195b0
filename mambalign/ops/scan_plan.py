"""How segments are distributed over the blocks of the selective scan on a GPU: cut, joined, and in which order.

A block of channels walks an *item*: a list of units, segments or pieces of them, one after the other, whose states it
holds. There are three ways for a unit to come by the state it starts from, if it has a parent:

    apart       All units at a time, with what they leave each other made known first by other passes (`cuda_scan`).
                Also for one long segment, whose pieces are units.
    families    One block walks a whole tree of segments, parents first, and on the way back children first: no token
                is walked twice. For batches with enough trees to keep the device busy, which `_go_in_families` reckons.
    relay       For rows of one length: a unit is a leg of a row. As many blocks as the device runs at a time take legs
                of all rows in turn, first legs first, so no scheduler has less to do than another.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mambalign.ops import nvrtc
from mambalign.ops.backends import filled
from mambalign.ops.segments import Segments, Tables

Array: TypeAlias = NDArray[np.int64]

TILE = 32  # as in the source: tokens between stored states
HAS_CHILD, IS_LAST = 1, 2  # as in the source: of `struct Join`
WARPS = 4  # of a block: they share B and C, and add up dB and dC
# Warps that a multiprocessor holds, by registers and shared memory. In a relay fewer, with registers for the next tile.
HELD = {"scan_forward": 20, "scan_backward": 12}
HELD_IN_RELAY = 8
ENOUGH = 8 // WARPS  # blocks for each multiprocessor: cutting segments for more costs more than it brings
SHORTEST_PIECE = 256  # tokens: cutting costs a second walk over what is cut
LONGEST_PIECE = 1 << 15  # tokens: the kernels' offsets within a unit are 32 bits wide
LEGS = 4  # of a segment in a relay
# Of the blocks that it runs at a time. More rows than that are better off with three warps on nearly every scheduler.
RELAYED = 1.3


@dataclass(frozen=True)
class Pace:
    """Microseconds that a walk takes for a token of the longest row where few blocks run, and of a block for a token
    where the device is full; in between, the root of both squared. On an H200; what counts is how they compare."""

    alone: float
    full: float

    def time(self, rows: Array, blocks: int, running: int) -> float:
        """rows: tokens of each."""
        return math.hypot(self.alone * int(rows.max(initial=0)), self.full * int(rows.sum()) * blocks / running)


# Of the main passes, of the walks from zero before them, and for a unit that is joined: fitted to nine batches of forks
# (docs/lab-notes.md), all of which they put on the faster way.
PACE = {"scan_forward": Pace(0.105, 0.30), "scan_backward": Pace(0.29, 0.57)}
PACE_FROM_ZERO = {"scan_forward": Pace(0.09, 0.17), "scan_backward": Pace(0.12, 0.155)}
JOINING = {"scan_forward": 0.27, "scan_backward": 0.55}


@dataclass
class Walk:
    """Items of units that a block of channels walks, one after the other: `units[starts[i] : starts[i + 1]]`, int32."""

    starts: Tensor
    units: Tensor

    @property
    def items(self) -> int:
        return self.starts.numel() - 1


@dataclass
class Plan:
    """`units` int32 `[U, 10]` as `struct Unit`; `joined` `[J, 4]` as `struct Join`: those with a slot, parents first.

    `rows`: 0, or in a relay, whose items are the units in their order, how many of them are next to each other.
    `handed`: states that units hand on to others, where none are joined.
    """

    units: Tensor
    joined: Tensor
    checkpoints: int
    rows: int
    handed: int
    all: Walk
    heads: Walk
    tails: Walk


def plan(segments: Segments, blocks: int, device: torch.device, kernel: str = "scan_forward") -> Plan:
    """Cut and distribute `segments` for `blocks` blocks of channels of one of the main passes."""

    def tables(segments: Segments) -> Tables:
        if is_relay(segments, blocks, device):
            return _relay(segments, kernel)
        return _distributed(segments, blocks, kernel, device)

    made: Plan = segments.plan(("cuda scan", blocks, SHORTEST_PIECE, str(device), kernel), device, tables, _built)
    return made


def _built(facts: tuple[int, int, int], units: Tensor, joined: Tensor, *walks: Tensor) -> Plan:
    return Plan(units, joined, *facts, *(Walk(*walks[i : i + 2]) for i in (0, 2, 4)))


def is_relay(segments: Segments, blocks: int, device: torch.device) -> bool:
    """Whether rows of one length are enough for all the blocks that a relay runs at a time, and not many more."""
    chains = segments.num_segments * blocks
    running = held(HELD_IN_RELAY, device)
    return running <= chains <= RELAYED * running and _are_equal_roots(segments)


def _are_equal_roots(segments: Segments) -> bool:
    key = ("equal roots", SHORTEST_PIECE)
    if key not in segments.memo:
        lengths = segments.lengths
        equal = bool((lengths == lengths[0]).all() and (segments.parent < 0).all())
        segments.memo[key] = equal and LEGS * SHORTEST_PIECE <= int(lengths[0]) <= LEGS * LONGEST_PIECE
    return bool(segments.memo[key])


def _relay(segments: Segments, kernel: str) -> Tables:
    """Segments of one length in `LEGS` pieces each: first legs first, or last legs first, one an item."""
    rows = segments.num_segments
    pieces = _cut(segments, _up(-(-int(segments.cu_seqlens[1]) // LEGS), TILE))
    number = np.arange(len(pieces.length))
    leg = number % (len(number) // rows)
    order = np.argsort(-leg if kernel == "scan_backward" else leg, kind="stable")
    after = np.where(pieces.is_last, -1, number)
    units, checkpoints = _units(pieces, (np.full_like(number, -1), pieces.parent, after, np.zeros_like(number)))
    nobody = np.zeros(1), np.empty(0)
    tables = units, np.empty((0, 4)), np.append(number, len(number)), order, *nobody, *nobody
    return (checkpoints, rows, len(number)), [*map(_int32, tables)]


def _units(pieces: _Pieces, links: Sequence[Array]) -> tuple[Array, int]:
    """`[U, 10]` as `struct Unit`, and how many states they leave for the backward pass; links: slot, before, after and
    adds, `[U]` each."""
    tiles = -(-pieces.length // TILE)
    checkpoint = tiles.cumsum() - tiles
    slot, *handing = links
    return np.stack([*pieces[:4], slot, checkpoint, pieces.is_last, *handing], axis=1), int(tiles.sum())


def _int32(values: Array) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.int32))


class _Pieces(NamedTuple):
    """Segments, or parts of them, in their order, `[U]` each; parent: the piece before one on its path, or -1."""

    begin: Array
    length: Array
    segment: Array
    parent: Array
    is_last: Array


class _Groups(NamedTuple):
    """Pieces that a block walks in their order: `units[starts[g] : starts[g + 1]]`."""

    units: Array
    starts: Array

    def tokens(self, pieces: _Pieces) -> Array:
        """`[G]`, of each group."""
        before = np.concatenate([[0], pieces.length[self.units].cumsum()])
        return before[self.starts[1:]] - before[self.starts[:-1]]


class _Paths(NamedTuple):
    """How pieces come by their first states: four members of `struct Unit`, `[U]` each; `joined` `[J, 4]`, as
    `struct Join`; and who is walked by whom."""

    slot: Array
    before: Array
    after: Array
    adds: Array
    joined: Array
    all: _Groups
    heads: _Groups
    tails: _Groups


def _alone(units: Array) -> _Groups:
    """A group for each."""
    return _Groups(units, np.arange(len(units) + 1))


def _cut(segments: Segments, longest: int) -> _Pieces:
    """Segments in pieces of at most `longest` tokens, each but a segment's last of whole tiles."""
    key = ("pieces", longest)
    if key in segments.memo:
        return segments.memo[key]
    lengths, parents = segments.lengths.numpy(), segments.parent.numpy()
    counts = np.maximum(-(-lengths // longest), 1)
    steps = np.maximum(-(-lengths // counts // TILE) * TILE, TILE)
    counts = np.maximum(-(-lengths // steps), 0 if segments.fixed else 1)  # of fixed ones many are empty: no pieces
    ends = counts.cumsum()
    segment = np.repeat(np.arange(len(lengths)), counts)
    number = np.arange(len(segment)) - np.repeat(ends - counts, counts)
    last = ends - 1  # piece of each segment, or of the ancestor whose state an empty one hands on
    for empty in (counts == 0).nonzero()[0]:
        last[empty] = last[parents[empty]] if parents[empty] >= 0 else -1
    before = np.where(parents >= 0, last[parents], -1) if len(parents) else parents
    first = number * steps[segment]
    length = np.minimum(steps[segment], lengths[segment] - first)
    parent = np.where(number > 0, np.arange(len(segment)) - 1, before[segment])
    is_last = number == counts[segment] - 1
    begin = segments.cu_seqlens.numpy()[segment] + first
    pieces = segments.memo[key] = _Pieces(begin, length, segment, parent, is_last)
    return pieces


def _pieces(segments: Segments, blocks: int, kernel: str, device: torch.device) -> _Pieces:
    """As long as the device allows, since cutting costs a second walk over what is cut."""
    longest = int(segments.lengths.max()) if segments.num_segments else 0
    if longest and segments.num_tokens // longest * blocks < ENOUGH * nvrtc.multiprocessors(device):
        # As many rows as fill the device twice, so that what is left over by whole rows weighs less.
        rows = max(1, 2 * held(HELD[kernel], device) // blocks)
        longest = max(SHORTEST_PIECE, -(-segments.num_tokens // rows))
    return _cut(segments, min(_up(longest, TILE), LONGEST_PIECE))


def held(warps: int, device: torch.device) -> int:
    """Blocks that a device runs at a time whose multiprocessors hold so many warps."""
    return warps // WARPS * nvrtc.multiprocessors(device)


def _distributed(segments: Segments, blocks: int, kernel: str, device: torch.device) -> Tables:
    if _go_in_families(segments, blocks, device):
        pieces = _cut(segments, LONGEST_PIECE)
        paths = _families(pieces, kernel == "scan_backward")
    else:
        pieces = _pieces(segments, blocks, kernel, device)
        paths = _apart(pieces)
    units, checkpoints = _units(pieces, paths[:4])
    # As many as there can be, of these tokens in these segments: no piece that is not a segment's last is shorter.
    room = segments.num_segments + segments.num_tokens // SHORTEST_PIECE if segments.fixed else 0
    handed = int(paths.after.max(initial=-1)) + 1
    if segments.fixed:
        checkpoints = segments.num_segments + segments.num_tokens // TILE
        handed = segments.num_segments if handed else 0
    walks = [
        table
        for groups in (paths.all, paths.heads, paths.tails)
        for table in _walk(groups, groups.tokens(pieces), blocks, held(HELD[kernel], device), room)
    ]
    joined = filled(_int32(paths.joined), room if len(paths.joined) else 0, -1)
    return (checkpoints, 0, handed), [filled(_int32(units), room, 0), joined, *walks]


def _go_in_families(segments: Segments, blocks: int, device: torch.device) -> bool:
    """Whether walking every token once, but a family by one block, takes less time than all at a time with what they
    leave each other made known first; both passes together, which thus have plans of one kind."""
    if not bool((segments.parent >= 0).any()):
        return False
    key = ("families", blocks, SHORTEST_PIECE, str(device))
    if key not in segments.memo:
        whole = _cut(segments, LONGEST_PIECE)
        families, saved = _families(whole, False).all.tokens(whole), 0.0
        for kernel, pace in PACE.items():
            running, pieces = held(HELD[kernel], device), _pieces(segments, blocks, kernel, device)
            is_head, is_tail = _has_child(pieces), pieces.parent >= 0
            again = pieces.length[is_head if kernel == "scan_forward" else is_tail]
            saved += pace.time(pieces.length, blocks, running) - pace.time(families, blocks, running)
            saved += PACE_FROM_ZERO[kernel].time(again, blocks, running) + JOINING[kernel] * (is_head | is_tail).sum()
        segments.memo[key] = saved >= 0
    return bool(segments.memo[key])


def _has_child(pieces: _Pieces) -> Array:
    """bool `[U]`."""
    has_child = np.zeros(len(pieces.parent), dtype=bool)
    has_child[pieces.parent[pieces.parent >= 0]] = True
    return has_child


def _numbered(chosen: Array) -> Array:
    """The number of each that is chosen, among these; -1 for the others, and for what index -1 finds."""
    return np.append(np.where(chosen, chosen.cumsum() - 1, -1), -1)


def _apart(pieces: _Pieces) -> _Paths:
    """All at a time, with what others leave them made known first."""
    is_head, is_tail = _has_child(pieces), pieces.parent >= 0
    chosen = (is_head | is_tail).nonzero()[0]
    slot = _numbered(is_head | is_tail)
    flags = HAS_CHILD * is_head + IS_LAST * pieces.is_last
    joined = np.stack([slot[:-1], slot[pieces.parent], pieces.segment, flags], axis=1)[chosen]
    none = np.full(len(is_head), -1)
    walked = (np.arange(len(is_head)), is_head.nonzero()[0], is_tail.nonzero()[0])
    return _Paths(slot[:-1], none, none, none + 1, joined, *map(_alone, walked))


def _families(pieces: _Pieces, backwards: bool) -> _Paths:
    """Each with its ancestors and descendants, by one block: parents before their children, or after them."""
    count = len(pieces.parent)
    row = _numbered(_has_child(pieces))
    root: list[int] = []
    for u, parent in enumerate(pieces.parent.tolist()):
        root.append(u if parent < 0 else root[parent])
    order = np.argsort(root, kind="stable")
    starts = np.append(np.unique(np.asarray(root)[order], return_index=True)[1], count)
    if backwards:
        order, starts = order[::-1], count - starts[::-1]
    # The last of siblings is the first to go backwards: it leaves its gradient, the others add theirs.
    youngest = np.full(count + 1, -1)
    youngest[pieces.parent] = np.arange(count)
    adds = (pieces.parent >= 0) & (youngest[pieces.parent] != np.arange(count))
    none, nobody = np.full(count, -1), _alone(np.empty(0, dtype=np.int64))
    joined = np.empty((0, 4), dtype=np.int64)
    return _Paths(none, row[pieces.parent], row[:-1], adds, joined, _Groups(order, starts), nobody, nobody)


def _up(x: int, multiple: int) -> int:
    return max(multiple, -(-x // multiple) * multiple)


def _walk(groups: _Groups, tokens: Array, blocks: int, running: int, room: int) -> tuple[Tensor, Tensor]:
    """Spread groups of units over items, longest first to the item with the fewest tokens; as in `Walk`.

    room: units that the tables are to have room for, and items with them; 0 for no more than there are.
    """
    count = most = max(1, -(-4 * running // blocks))
    # Where all blocks run at a time the device spreads them evenly, and must count few that have nothing to do.
    if not room or len(tokens) * blocks < running:
        few = len(tokens) <= 8 or not room
        count = min(most, len(tokens) if few else _up(len(tokens), 4))
    order = np.argsort(-tokens, kind="stable")
    item_of = np.arange(len(tokens))  # of each group, in that order
    if len(tokens) > count:
        loads = [(0, item) for item in range(count)]
        for i, load in enumerate(tokens[order].tolist()):
            fewest, item = loads[0]
            item_of[i] = item
            heapq.heapreplace(loads, (fewest + load, item))
    by_item = order[np.argsort(item_of, kind="stable")]
    sizes = np.diff(groups.starts)
    units = np.zeros(count, dtype=np.int64)
    np.add.at(units, item_of, sizes[order])
    # Where in `groups.units` each unit of the list is: one after the other from the start of its group on.
    ends = sizes[by_item].cumsum()
    at = np.arange(ends[-1] if len(ends) else 0) + np.repeat(
        groups.starts[by_item] - (ends - sizes[by_item]), sizes[by_item]
    )
    listed = groups.units[at]
    return _int32(np.append(0, units.cumsum())), filled(_int32(listed), room if len(listed) else 0, 0)
