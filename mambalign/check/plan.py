"""What a run takes on a card, and which batch, checkpointing and number of GPUs suit it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mambalign.check.memory import Load, estimate, highest_moment, load_of, on_gpu, tokens_per_forward
from mambalign.check.shapes import ModelShape
from mambalign.check.speed import ERROR, MEASURED, Card, times
from mambalign.recipe import Recipe, UserError
from mambalign.recipe.schema import Checkpointing

MARGIN = 0.03  # of a card's memory that a proposal leaves free
POLICIES: tuple[bool | Checkpointing, ...] = (False, "selective", True)
COUNTS = (1, 2, 4, 8)  # of GPUs in one host
LARGEST_BATCH = 64  # rows or pairs: larger ones bring nothing
AS_FAST = 1.03  # of plans that are this near the fastest, the one with the least memory


@dataclass(frozen=True)
class Rows:
    """The training rows (packed rows, or pairs): tokens of one, and what share of them is predicted."""

    mean: float
    deviation: float
    longest: float
    targets: float

    @classmethod
    def of(cls, lengths: Sequence[int], targets: float) -> Rows:
        mean = sum(lengths) / len(lengths)
        deviation = math.sqrt(sum((length - mean) ** 2 for length in lengths) / len(lengths))
        return cls(mean, deviation, max(lengths), targets)

    def load(self, recipe: Recipe, stage: str, devices: int, *, usual: bool) -> Load:
        """A usual step, for its time; or its largest pass, for the memory, of which a run of thousands sees some."""
        count = recipe.per_device_train_batch_size
        likely = count * self.mean + (0 if usual else 4 * self.deviation * math.sqrt(count))
        tokens = max(1, math.ceil(min(likely, count * self.longest)))
        whole = max(1, math.ceil(count * self.mean))
        bound = recipe.max_tokens_per_device
        passes = math.ceil(whole / bound) if bound else 1
        tokens = min(tokens, math.ceil(whole / passes) if usual else tokens, bound or tokens)
        return Load(tokens, math.ceil(tokens * self.targets), passes * recipe.accumulation_steps(devices))


@dataclass(frozen=True)
class Plan:
    """A recipe on a number of cards.

    parts: bytes, as `estimate` gives them. moment: when they are most. seconds: of a step, as `times` gives them, or
    None where they are not known, and `unknown` says why. tokens: of a step on all devices.
    """

    recipe: Recipe
    card: Card
    devices: int
    parts: dict[str, float]
    moment: str
    seconds: dict[str, float] | None
    tokens: float
    unknown: str = ""

    @property
    def fits(self) -> bool:
        return self.parts["device"] <= self.card.memory

    @property
    def error(self) -> float:
        """What the times may be off by."""
        return ERROR if self.card.name == MEASURED and self.devices == 1 else 2 * ERROR

    @property
    def rows_a_step(self) -> int:
        device_batch = self.recipe.per_device_train_batch_size
        return device_batch * self.devices * self.recipe.accumulation_steps(self.devices)

    @property
    def speed(self) -> float:
        """Tokens a second on all devices; 0 where unknown."""
        return self.tokens / self.seconds["step"] if self.seconds else 0.0


def plan(
    shape: ModelShape, recipe: Recipe, stage: str, card: Card, devices: int = 1, rows: Rows | Load | None = None
) -> Plan:
    """What `recipe` takes on `devices` cards.

    Args:
        rows: of the training data, or what a device sees in a step; None: rows as long as the recipe allows, all
            predicted.

    Raises:
        UserError: the batch is not a multiple of what the devices take.
    """
    shape = on_gpu(shape)
    if isinstance(rows, Rows):
        largest, usual = (rows.load(recipe, stage, devices, usual=which) for which in (False, True))
    else:
        largest = usual = rows or load_of(recipe, stage, devices)
    parts = estimate(shape, recipe, stage, devices, largest)
    seconds, unknown = None, ""
    try:
        seconds = times(shape, recipe, stage, card, usual, devices)
    except UserError as error:
        unknown = str(error)
    moment = highest_moment(shape, recipe, stage, parts, largest)
    return Plan(recipe, card, devices, parts, moment, seconds, usual.tokens * usual.passes * devices, unknown)


def propose(
    shape: ModelShape,
    recipe: Recipe,
    stage: str,
    card: Card,
    gpus: int | None = None,
    rows: Rows | None = None,
    devices: int = 1,
) -> Plan | None:
    """The fastest plan that fits and takes the same rows a step; None where none fits.

    Batch of a device, accumulation, gradient_checkpointing and, with several GPUs, fsdp are free.

    Args:
        gpus: how many there are; None: as few as it takes, of 1, 2, 4 and 8.
        rows: as for `plan`.
        devices: of the run as it stands, which decide its rows a step where the recipe has no global_batch_size.
    """
    recipe = replace(recipe, global_batch_size=step_rows(recipe, devices), gradient_accumulation_steps=None)
    for count in COUNTS if gpus is None else (gpus,):
        plans = [plan(shape, choice, stage, card, count, rows) for choice in _choices(recipe, stage, count)]
        fitting = [p for p in plans if p.parts["device"] <= (1 - MARGIN) * card.memory]
        if fitting:
            return _best(fitting)
    return None


def _best(plans: list[Plan]) -> Plan:
    if plans[0].seconds is None:  # no speed is known: nothing computed twice, then the largest batch
        return min(
            plans,
            key=lambda p: (
                POLICIES.index(p.recipe.gradient_checkpointing),
                bool(p.recipe.fsdp),
                -p.recipe.per_device_train_batch_size,
            ),
        )
    fastest = min(_of(p)["step"] for p in plans)
    return min((p for p in plans if _of(p)["step"] <= AS_FAST * fastest), key=lambda p: p.parts["device"])


def _of(p: Plan) -> dict[str, float]:
    assert p.seconds is not None
    return p.seconds


def step_rows(recipe: Recipe, devices: int = 1) -> int:
    """Rows (pairs) of a step, which a proposal keeps."""
    each = recipe.per_device_train_batch_size * (recipe.gradient_accumulation_steps or 1)
    return recipe.global_batch_size or each * devices


def _choices(recipe: Recipe, stage: str, devices: int) -> Iterator[Recipe]:
    """Recipes of the same rows a step."""
    assert recipe.global_batch_size is not None
    if recipe.global_batch_size % devices:
        return
    each = recipe.global_batch_size // devices
    bound = tokens_per_forward(recipe, stage) if recipe.max_tokens_per_device else None
    shards: list[str | None] = [None]
    if devices > 1 and not (recipe.load_in_4bit or recipe.load_in_8bit or recipe.fp16 or recipe.deepspeed):
        shards = [None, "full_shard"]
    for batch in (n for n in range(1, min(each, LARGEST_BATCH) + 1) if each % n == 0):
        for policy in POLICIES:
            for fsdp in shards:
                yield replace(
                    recipe,
                    per_device_train_batch_size=batch,
                    gradient_checkpointing=policy,
                    max_tokens_per_device=bound,
                    fsdp=fsdp,
                )


# ------------------------------------------------------------------------------------------------------ as a report


def described(p: Plan, steps: int | None = None, rows: int | None = None) -> dict[str, Any]:
    """A plan in gigabytes, seconds and hours, for a report. `steps` of the run, `rows` (pairs) for a reference pass."""
    section: dict[str, Any] = {
        "card": f"{p.devices} x {p.card.name}, {p.card.memory / 1e9:g} GB",
        "device_gb": _round(p.parts["device"] / 1e9),
        "of_it_tensors_gb": _round(p.parts["total"] / 1e9),
        "highest_when": p.moment,
        "fits": p.fits,
    }
    if p.seconds is None:
        return section | {"time": p.unknown}
    section |= {"step_seconds": _round(p.seconds["step"]), "tokens_per_second": round(p.speed)}
    if steps is not None:
        section["hours"] = _round(steps * p.seconds["step"] / 3600)
    if rows is not None:
        section["reference_hours"] = _round(rows / p.rows_a_step * p.seconds["reference"] / 3600)
    measured = "" if p.card.name == MEASURED else f"; a prediction: only the {MEASURED} was measured"
    return section | {"give_or_take": f"{p.error:.0%} of the time, 15% of the memory{measured}"}


def words(p: Plan, recipe: Recipe) -> str:
    """The words of a command line that make `recipe` the plan's; "" where they are the same."""
    names = ("per_device_train_batch_size", "gradient_checkpointing", "fsdp")
    changed = {name: getattr(p.recipe, name) for name in names if getattr(p.recipe, name) != getattr(recipe, name)}
    given, wanted = recipe.gradient_accumulation_steps, p.recipe.accumulation_steps(p.devices)
    follows = recipe.global_batch_size is not None and given is None
    if not follows and wanted != (given or 1):
        changed["gradient_accumulation_steps"] = wanted
    return " ".join(f"--{name} {'null' if value is None else str(value).lower()}" for name, value in changed.items())


def _round(value: float) -> float:
    return float(f"{value:.3g}")
