"""Time and peak memory of a training step against the length of its sequences.

Ours, mamba-ssm's own model where it is installed, and a Transformer of the same size (transformers' GPT-NeoX with
FlashAttention through PyTorch's SDPA, and the same chunked head as ours). All have the same number of tokens a step
while a sequence fits into it; what runs out of memory is tried with its blocks recomputed, and then is a row that says
so.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambalign.bench import contestants
from mambalign.bench.measure import (
    DEVICE,
    Result,
    Row,
    compete,
    free_memory,
    memory_left,
    result_of,
    say,
)
from mambalign.recipe import UserError, nearest

OURS, PEER, TRANSFORMER = EVERYONE = ("ours", "mamba-ssm", "transformer")
BURST = 3  # steps timed together: in training none waits for the device to be done with the one before
MARKS: dict[bool | str, str] = {False: "", True: " recomputed", "selective": " recomputed in part"}
# What is tried in turn, of the contestant and of `recompute`.
LEVELS: dict[str, tuple[bool | str, ...]] = {
    "auto": (False, "selective", True), "none": (False,), "selective": ("selective",), "full": (True,),
}  # fmt: skip
OK, NO_MEMORY = "measured", "out of memory"
NO_TIME, NO_POSITIONS = "left out: no time left", "left out: it has no positions so far"
TOKENS = {"tiny": 256, "4m": 2048, "130m": 32768, "790m": 16384, "2.8b": 8192}

# What fits the machine where the user says nothing.
DEFAULTS: dict[str, Row] = {
    "cpu": {
        "size": "4m",
        "weights": "fp32",
        "lengths": tuple(2**i for i in range(7, 12)),
        "minutes": 1.5,
        "repeats": 3,
    },
    "cuda": {"size": "130m", "weights": "bf16", "lengths": tuple(2**i for i in range(9, 20)), "minutes": 3.0},
}


@dataclass(frozen=True)
class Options:
    """What is measured.

    size: of random weights; model, transformer: folders or hub ids instead. lengths: of a sequence. tokens: of a step,
    None: by size; a longer sequence is a step of its own. weights: "bf16", "fp32 + autocast" or "fp32". recompute: one
    of `LEVELS`; "auto" does where memory runs out. optimizer: AdamW's step is part of it. repeats: timed steps of each.
    minutes: no new length begins after them.
    """

    size: str = "4m"
    model: str | None = None
    transformer: str | None = None
    lengths: tuple[int, ...] = ()
    tokens: int | None = None
    weights: str = "fp32"
    recompute: str = "auto"
    optimizer: bool = False
    repeats: int = 5
    minutes: float = 3.0
    who: tuple[str, ...] = EVERYONE

    def check(self) -> None:
        """UserError for an option that is none."""
        for name, value, choices in (
            ("size", self.size, contestants.MAMBA), ("weights", self.weights, contestants.WEIGHTS),
            ("recompute", self.recompute, LEVELS), *(("who", one, EVERYONE) for one in self.who),
        ):  # fmt: skip
            if value not in choices:
                raise UserError(f"--{name} {value!r}: choose {', '.join(choices)}{nearest(value, choices)}")
        if any(length < 2 for length in self.lengths) or not self.lengths:
            raise UserError(f"--lengths {', '.join(map(str, self.lengths))}: a sequence needs at least 2 tokens")


@dataclass
class Contestant:
    """A model that takes training steps; `held` GiB are its weights and, once made, its optimizer's state."""

    name: str
    model: Any
    weights: str
    loss: Callable[[Any, Tensor], Callable[[], Tensor]]
    levels: tuple[bool | str, ...]
    optimizer: torch.optim.Optimizer | None = None
    attention: str | None = None
    context: Callable[[], Any] | None = None
    recompute: bool | str = False  # the last level tried
    speeds: list[tuple[int, float]] = field(default_factory=list)  # (length, ms a token)
    gib_per_token: float = 0.0  # above what it holds, at the length before

    def step(self, ids: Tensor) -> Callable[[], Tensor]:
        extra = {} if self.context is None else {"context": self.context}
        return contestants.step(self.model, self.weights, self.loss(self.model, ids), optimizer=self.optimizer, **extra)

    @property
    def held(self) -> float:
        states = [] if self.optimizer is None else [s for one in self.optimizer.state.values() for s in one.values()]
        held = sum(s.numel() * s.element_size() for s in states if isinstance(s, Tensor)) / 2**30
        return contestants.gib(self.model) + held

    def expected_ms(self, length: int, tokens: int) -> float:
        """Of a step, from the growth between the last two lengths."""
        if not self.speeds:
            return 0.0
        (before, slow), (last, now) = self.speeds[-2:] if len(self.speeds) > 1 else [self.speeds[-1]] * 2
        grown = (now / slow) ** (math.log(length / last) / math.log(last / before)) if last > before else 1.0
        return now * max(1.0, grown) * tokens


def ours_loss(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    return partial(contestants.packed_loss, model, contestants.random_batch(ids))


def peer_loss(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    return partial(contestants.padded_loss, model, ids, ids)


def transformer_loss(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    return partial(contestants.transformer_loss, model, ids)


def entered(options: Options) -> list[Contestant]:
    """Those that the options name and that are installed, with the weights of ours checked (see `check_ours`)."""
    torch.manual_seed(0)
    weights, levels = options.weights, LEVELS[options.recompute]
    blocks = tuple(level for level in levels if level != "selective") or (False,)  # only ours recomputes in part
    if options.model is None:
        model = contestants.ours(options.size, weights)
    else:
        model = contestants.load_ours(options.model, weights).train()
    made = [Contestant(OURS, model, weights, ours_loss, levels)]
    if PEER in options.who and (peer := contestants.mamba_ssm(model, weights)) is not None:
        made.append(Contestant(PEER, peer, weights, peer_loss, blocks))
    if TRANSFORMER in options.who:
        longest = max(options.lengths)
        if options.transformer is None:
            other = contestants.transformer(options.size, weights, length=longest)
        else:
            other = contestants.load_transformer(options.transformer, weights)
        probe = torch.zeros(1, 16, dtype=torch.int64, device=DEVICE)
        with contestants.autocast(weights):
            context, said = contestants.attention(other, probe)
        made.append(Contestant(TRANSFORMER, other, weights, transformer_loss, blocks, None, said, context))
    for one in made:
        if options.optimizer:
            one.optimizer = torch.optim.AdamW(one.model.parameters(), lr=1e-6, fused=DEVICE.type == "cuda")
    return made


def vocabulary(made: Sequence[Contestant]) -> int:
    """Tokens that all of them have."""
    return min(int(one.model.config.vocab_size) for one in made if one.name != PEER)


# ---------------------------------------------------------------------------------------------------------- measuring


def run(options: Options) -> Result:
    """Measure; rows are contestants by length, the summary says where they cross.

    Raises:
        UserError: an option that is none, a model that is not there.
        NoNumbers: ours is wrong.
    """
    options.check()
    deadline = time.monotonic() + 60 * options.minutes
    size = options.size if options.model is None else Path(options.model).name
    try:
        made = entered(options)
    except torch.OutOfMemoryError:
        raise UserError("not enough memory for the weights of all contestants at once; take a smaller --size") from None
    tokens = options.tokens or TOKENS[options.size]
    say(f"{', '.join(f'{one.name} {contestants.million(one.model):,.1f}M' for one in made)}; {tokens:,} tokens a step")
    words = vocabulary(made)
    errors = contestants.check_ours(made[0].model, options.weights, words)
    rows: list[Row] = []
    stopped = None
    for length in sorted(options.lengths):
        if rows and time.monotonic() > deadline:
            say(f"{options.minutes:g} minutes are over: no length beyond {rows[-1]['length']:,}")
            break
        try:
            found = measure(made, length, max(1, tokens // length), words, options.repeats, deadline)
        except RuntimeError as error:  # a kernel that cannot be so long; what was measured before is not lost
            if not rows:
                raise
            stopped = f"at {length:,} tokens: {(str(error).strip().splitlines() or [type(error).__name__])[0]}"
            say(f"stopped {stopped}")
            break
        rows += [{"size": size, **row} for row in found]
        if all(row["outcome"] != OK for row in found):
            break
    settings = {
        **asdict(options), "tokens": tokens, "errors": errors, "stopped": stopped,
        "attention": next((one.attention for one in made if one.attention), None),
    }  # fmt: skip
    return result_of("length", rows, settings, summary(rows))


def measure(made: Sequence[Contestant], length: int, rows: int, words: int, repeats: int, deadline: float) -> list[Row]:
    """A row for each contestant at one length: who is ready takes turns."""
    torch.manual_seed(length)
    ids = torch.randint(words, (rows, length), device=DEVICE)
    outcome: dict[str, str] = {}
    steps: dict[str, Callable[[], Tensor]] = {}
    losses: dict[str, float] = {}
    for one in made:
        left = 1e3 * (deadline - time.monotonic())
        if one.name == TRANSFORMER and contestants.reach(one.model, length)[0] < length:
            outcome[one.name] = NO_POSITIONS
        elif one.speeds and 4 * one.expected_ms(length, ids.numel()) > left:  # a first step, and three that count
            outcome[one.name] = NO_TIME
        elif (loss := first_step(one, ids)) is None:
            outcome[one.name] = NO_MEMORY
        else:
            steps[one.name], losses[one.name] = one.step(ids), loss
    if not any(one.optimizer for one in made):  # it would have moved their weights apart
        contestants.check_peer(losses)
    seconds = max(0.0, min(20.0, deadline - time.monotonic()))
    long = sum(one.expected_ms(length, ids.numel()) for one in made if one.name in steps) > 1500
    burst = 1 if long or DEVICE.type == "cpu" else BURST  # of long steps what the host does is nothing
    warmup = int(DEVICE.type == "cuda")  # what a CUDA graph is captured in
    measured = compete(steps, repeats, warmup=warmup, burst=burst, seconds=seconds)
    found = []
    for one in made:
        row: Row = {
            "who": one.name, "parameters_million": contestants.million(one.model), "length": length, "rows": rows,
            "tokens": ids.numel(), "weights": one.weights, "recompute": one.recompute, "weights_gib": one.held,
            "outcome": OK if one.name in measured else outcome.get(one.name, NO_MEMORY),
        }  # fmt: skip
        if one.name in measured:
            times = measured[one.name]
            one.speeds.append((length, times["ms"] / ids.numel()))
            one.gib_per_token = times["gib"] / ids.numel()
            row |= {name: times[name] for name in ("ms", "ms_low", "ms_high")}
            row |= {"tokens_per_second": 1e3 * ids.numel() / times["ms"], "peak_gib": one.held + times["gib"]}
        found.append(row)
        _show(row, found)
    del steps
    free_memory()
    return found


def first_step(one: Contestant, ids: Tensor) -> float | None:
    """The loss of a step that warms up, with as little recomputed as memory allows; None where there is too little."""
    while one.levels:
        one.recompute = one.levels[0]
        contestants.set_recompute(one.model, one.recompute)
        try:
            if DEVICE.type == "cpu" and 1.2 * one.gib_per_token * ids.numel() > memory_left():
                raise torch.OutOfMemoryError  # the system would end the process instead
            return float(one.step(ids)())
        except torch.OutOfMemoryError:
            pass
        free_memory()
        one.levels, one.gib_per_token = one.levels[1:], 0.0
        if one.levels:
            say(f"{one.name}: out of memory at {ids.shape[1]:,} tokens;{MARKS[one.levels[0]]} from here on")
    return None


def _show(row: Row, beside: list[Row]) -> None:
    """One line; the Transformer's, which comes last, with ours as a multiple of it."""
    head = f"{row['rows']:>4} x {row['length']:>9,} {row['who']:>12}{MARKS[row['recompute']]:19}"
    if row["outcome"] != OK:
        say(f"{head}: {row['outcome']}")
        return
    mine = next((other for other in beside if other["who"] == OURS and other["outcome"] == OK), None)
    ratio = ""
    if mine is not None and mine is not row:
        ratio = f", ours is {mine['tokens_per_second'] / row['tokens_per_second']:.2f}x as fast"
    say(f"{head}: {row['tokens_per_second']:>10,.0f} tokens/s, {row['peak_gib']:6.2f} GiB{ratio}")


# ---------------------------------------------------------------------------------------------------------- crossover


def crossover(ours: dict[int, float], other: dict[int, float]) -> Row:
    """From which length on the first costs less than the second, for good: by interpolation in log-log.

    ours, other: cost by length; lengths that only one of them has do not count.

    Returns:
        {"length": the crossing, None if there is none in range, "says": a sentence}

    >>> crossover({512: 2.0, 2048: 2.0}, {512: 1.0, 2048: 4.0})["length"]
    1024
    """
    lengths = sorted(ours.keys() & other.keys())
    if not lengths:
        return {"length": None, "says": "nothing to compare: no length that both reached"}
    gaps = [math.log(ours[length] / other[length]) for length in lengths]
    span = f"{lengths[0]:,} to {lengths[-1]:,} tokens"
    if gaps[-1] >= 0:
        where = "at every length" if min(gaps) >= 0 else f"at {lengths[-1]:,}, though less at some before"
        return {"length": None, "says": f"no crossover in range: more {where} ({span} measured)"}
    above = [index for index, gap in enumerate(gaps) if gap >= 0]
    if not above:
        return {"length": None, "says": f"no crossover in range: less at every length ({span} measured)"}
    at = above[-1]
    share = gaps[at] / (gaps[at] - gaps[at + 1])
    found = round(math.exp(math.log(lengths[at]) + share * math.log(lengths[at + 1] / lengths[at])))
    return {"length": found, "says": f"less from about {found:,} tokens on ({span} measured)"}


def summary(rows: Sequence[Row]) -> Row:
    """Crossovers of both Mambas with the Transformer, of time and of memory a token."""
    curves: dict[str, dict[str, dict[int, float]]] = {"time": {}, "memory": {}}
    for row in rows:
        if row["outcome"] == OK:
            costs = {"time": row["ms"], "memory": row["peak_gib"]}
            for what, cost in ((what, cost) for what, cost in costs.items() if math.isfinite(cost)):
                curves[what].setdefault(row["who"], {})[row["length"]] = cost / row["tokens"]
    return {
        f"{what} of {who}, beside the Transformer": crossover(by_who[who], by_who[TRANSFORMER])
        for what, by_who in curves.items()
        for who in (OURS, PEER)
        if who in by_who and TRANSFORMER in by_who
    }
