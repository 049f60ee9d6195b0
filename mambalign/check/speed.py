"""The time of an optimizer step, from shapes, a card's figures and a few measured rates.

A forward and a backward pass take what the card takes, or what Python takes to launch the kernels, whichever is more
(and a little more than either, where they are about the same). The card's time is a sum over what it does one after
the other:

    products     2 operations a weight and token forwards, 4 backwards (2 where the weights are frozen), 2 more where
                 layers are computed again; over `matrix` x H / (H + `narrow`) of the card's peak, H the hidden size
    head         the same for the rows that predict: products of [rows, H] and [H, V], 3 where the loss is the sum of
                 log-probs (SFT), 4 where not (DPO: its logits are made twice), one less with a frozen head
    scan         seconds a token and channel, measured; other cards by their multiprocessors times clock
    memory       bytes of everything else over the card's bandwidth: convolution, norm, casts of autocast, adapters,
                 unpacking of 4-bit weights
    optimizer    bytes of AdamW's passes over parameters, gradients and moments, and of clipping

Python's time is one of layers, adapted and 4-bit modules, trained tensors, and of the tokens that become a batch.
`RATES` is all that was measured. `python benchmarks/plan.py --fit RESULTS.json` prints new ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from mambalign.check.memory import Load, Types, adapters_of
from mambalign.check.shapes import Mamba2Shape, ModelShape
from mambalign.recipe import PAIR_STAGES, Recipe, UserError, nearest


@dataclass(frozen=True)
class Card:
    """Figures of its data sheet: memory in bytes, dense operations a second (16 bits with fp32 sums, TF32, fp32), bytes
    a second, multiprocessors times clock in Hz, and bytes a second to another card of the host, one way."""

    name: str
    memory: float
    matrix: float = 0.0
    tf32: float = 0.0
    fp32: float = 0.0
    bandwidth: float = 0.0
    issue: float = 0.0
    link: float = 0.0

    @property
    def has_speed(self) -> bool:
        return self.matrix > 0


# Boost clocks. Only the H200 was measured; times on the others are predictions from these figures.
CARDS = {
    card.name: card
    for card in (
        Card("h200", 141e9, 989e12, 495e12, 67e12, 4.8e12, 132 * 1.98e9, 450e9),
        Card("h100", 80e9, 989e12, 495e12, 67e12, 3.35e12, 132 * 1.98e9, 450e9),
        Card("a100-80", 80e9, 312e12, 156e12, 19.5e12, 2.04e12, 108 * 1.41e9, 300e9),
        Card("a100-40", 40e9, 312e12, 156e12, 19.5e12, 1.56e12, 108 * 1.41e9, 300e9),
        Card("l40s", 48e9, 362e12, 183e12, 91.6e12, 0.86e12, 142 * 2.52e9, 25e9),
        Card("rtx-4090", 24e9, 165e12, 82.6e12, 82.6e12, 1.01e12, 128 * 2.52e9, 25e9),
        Card("rtx-3090", 24e9, 71e12, 35.6e12, 35.6e12, 0.94e12, 82 * 1.7e9, 25e9),
    )
}
MEASURED = "h200"


def card_named(name: str) -> Card:
    """A card of `CARDS`, or any card of so many gigabytes ("24gb"), whose speed is not known.

    Raises:
        UserError: neither.
    """
    wanted = name.lower().replace("_", "-").removeprefix("nvidia-")
    if wanted in CARDS:
        return CARDS[wanted]
    if f"rtx-{wanted}" in CARDS:
        return CARDS[f"rtx-{wanted}"]
    number = wanted.removesuffix("gb")
    if number != wanted and number.replace(".", "", 1).isdigit() and float(number) > 0:
        return Card(wanted, float(number) * 1e9)
    choices = ", ".join([*CARDS, "24gb", "48gb ..."])
    raise UserError(f"card: {name!r} is unknown{nearest(wanted, CARDS)} (there are {choices})")


def card_here(name: str, memory: float) -> Card:
    """The card that `torch.cuda` calls `name`, with the memory it says it has."""
    wanted = name.lower().replace(" ", "-")
    known = [card for key, card in CARDS.items() if key.split("-80")[0].split("-40")[0] in wanted]
    return replace(known[0], memory=memory) if known else Card(name, memory)


@dataclass(frozen=True)
class Rates:
    """What was measured. Seconds are the H200's; shares are of a card's peak.

    All are fitted together to `benchmarks/results/plan.json`, 24 kinds of whole steps on one H200, 2026-11-26, torch
    2.11, by `benchmarks/plan.py --fit`. The card's are held near what kernels took there one at a time; they absorb
    some of each other's errors, so none is to be read alone. Those of Python have nothing but the steps to go by.
    """

    matrix: float = 0.887  # of 16-bit products, where the model is wide
    narrow: float = 133.0  # hidden size at which half of it is reached
    head: float = 0.569  # of the head's products, softmax included
    scan_forward: float = 8.96e-12  # seconds a token and channel
    scan_backward: float = 20.7e-12
    convolution_forward: float = 8.12  # bytes a token and channel at full bandwidth
    convolution_backward: float = 23.8
    norm_forward: float = 30.1  # bytes a token and number of the hidden state
    norm_backward: float = 99.6
    memory: float = 0.8  # of the bandwidth, in passes over memory
    unpack: float = 0.408  # of the bandwidth, while 4-bit weights are unpacked
    optimizer: float = 85.4  # bytes a trained fp32 parameter that AdamW reads and writes
    host_forward: float = 1.27e-3  # seconds of Python a layer
    host_backward: float = 1.92e-3
    host_adapter: float = 0.386e-3  # an adapted module, each way
    host_packed: float = 0.0383e-3  # a 4-bit module, each time it runs
    host_again: float = 0.37e-3  # a layer that is computed again, each way, beside its second run
    host_tensor: float = 31.7e-6  # a trained tensor, in the optimizer and while gradients are clipped
    host_step: float = 5.32e-3  # callbacks
    host_token: float = 0.463e-6  # rows become a batch
    host_wrapped: float = 0.15e-3  # a layer with adapters, a step: modules that are walked through
    host_graph: float = 0.326e-3  # a layer in a CUDA graph, each way


RATES = Rates()
OVERLAP = 4.0  # how sharply the longer of card and Python decides; 4 meets steps where both take about the same
ERROR = 0.30  # what a prediction for the measured card may be off by; twice that on others


def times(
    shape: ModelShape, recipe: Recipe, stage: str, card: Card, load: Load, devices: int = 1, rates: Rates = RATES
) -> dict[str, float]:
    """Seconds of an optimizer step by part: "forward", "backward", "optimizer", "communication", "step" (their sum and
    what Python does beside); and "reference", those of a DPO's reference pass over as many tokens.

    Raises:
        UserError: a card whose speed is unknown, or a Mamba-2, whose steps were not measured.
    """
    if not card.has_speed:
        raise UserError(f"the speed of {card.name} is not known; {', '.join(CARDS)} have one")
    if isinstance(shape, Mamba2Shape):
        raise UserError("unknown: steps of a Mamba-2 were not measured")
    step = _Step(shape, recipe, stage, card, load, rates, graphed=has_graphs(recipe))
    if devices > 1:
        from mambalign.train.replicas import MOST  # imports for a second

        step.graphed = step.graphed and not recipe.fsdp and step.gradients() <= MOST
    forward, backward = load.passes * step.forward(), load.passes * step.backward()
    optimizer = step.optimizer(devices if recipe.fsdp else 1)
    communication = _communication(shape, recipe, step, devices, forward, backward) if devices > 1 else 0.0
    return {
        "forward": forward,
        "backward": backward,
        "optimizer": optimizer,
        "communication": communication,
        "step": forward + backward + optimizer + communication + step.between(),
        "reference": load.passes * step.reference(),
    }


def has_graphs(recipe: Recipe) -> bool:
    """Whether one process of this recipe runs a Mamba-1's layers as CUDA graphs (`models/cuda_graphs.py`)."""
    drops_again = recipe.gradient_checkpointing is True and recipe.use_peft and bool(recipe.lora_dropout)
    return recipe.allows_graphs and not drops_again


class _Step:
    def __init__(
        self, shape: ModelShape, recipe: Recipe, stage: str, card: Card, load: Load, rates: Rates, graphed: bool
    ):
        self.shape, self.recipe, self.card, self.load, self.rates = shape, recipe, card, load, rates
        self.graphed = graphed
        self.types, self.adapters = Types.of(recipe), adapters_of(recipe, on_gpu=True)
        self.summed = stage not in PAIR_STAGES
        self.scored = stage == "reward"
        self.whole, self.selective = recipe.gradient_checkpointing is True, recipe.gradient_checkpointing == "selective"
        self.weights = shape.layers * sum(math.prod(size) for size in shape.projections.values())
        self.channels = shape.layers * shape.inner * load.tokens
        self.hidden = (shape.layers + 1) * shape.hidden * load.tokens
        self.trained = shape.parameters
        if recipe.use_peft:
            self.trained = shape.lora_parameters(recipe.lora_r, recipe.lora_target_modules)
            self.trained += shape.full_parameters(recipe.lora_modules_to_save)

    # What the card does, in seconds.

    def _products(self, times: float) -> float:
        """`times` products of all tokens with every matrix."""
        return times * 2 * self.weights * self.load.tokens / self._rate(self.rates.matrix)

    def _rate(self, share: float) -> float:
        """Operations a second of the model's matrix products."""
        wide = self.card.tf32 if self.recipe.tf32 else self.card.fp32
        peak = wide if self.types.compute == 4 else self.card.matrix
        return peak * share * self.shape.hidden / (self.shape.hidden + self.rates.narrow)

    def _bytes(self, count: float, share: float | None = None) -> float:
        return count / (self.card.bandwidth * (self.rates.memory if share is None else share))

    def _scan(self, seconds: float) -> float:
        wide = self.types.compute / 2  # fp32 numbers: twice the bytes, and products in two parts
        return self.channels * seconds * (1 + wide) / 2 * H200.issue / self.card.issue

    def _small(self, convolution: float, norm: float) -> float:
        return (convolution * self.channels + norm * self.hidden) * self.types.compute / 2 / self.card.bandwidth

    def _adapted(self, each_input: float, each_output: float) -> float:
        """Passes over inputs and outputs of adapted modules, in bytes a number."""
        if self.adapters is None:
            return 0.0
        sizes = self._adapted_sizes()
        numbers = sum(each_input * into + each_output * out for into, out in sizes)
        products = 4 * self.adapters.rank * sum(into + out for into, out in sizes)
        layers = self.shape.layers * self.load.tokens
        return self._bytes(layers * numbers) + layers * products / self._rate(self.rates.matrix)

    def _adapted_sizes(self) -> list[tuple[int, int]]:
        names = set() if self.adapters is None else self.shape.adapted(self.adapters.modules)
        return [size for name, size in self.shape.projections.items() if name in names]

    def _casts(self) -> float:
        """Copies of fp32 weights for autocast, or unpacked 4-bit ones, each time the layers run."""
        seconds = 0.0
        packed = self.shape.quantised if self.recipe.load_in_4bit or self.recipe.load_in_8bit else 0
        if self.types.mixed and self.types.stored == 4:
            seconds += self._bytes(6.0 * (self.weights - packed))
        return seconds + self._bytes(2.6 * packed, self.rates.unpack)

    def _layers_forward(self) -> float:
        dropped = bool(self.recipe.lora_dropout)
        return (
            self._products(1)
            + self._scan(self.rates.scan_forward)
            + self._small(self.rates.convolution_forward, self.rates.norm_forward)
            + self._adapted(23 if dropped else 14, 12)
            + self._casts()
        )

    def _layers_backward(self) -> float:
        frozen = self.recipe.use_peft
        seconds = (
            self._products(1 if frozen else 2)
            + self._scan(self.rates.scan_backward)
            + self._small(self.rates.convolution_backward, self.rates.norm_backward)
            + self._adapted(20, 8)
            + self._bytes(0 if frozen else 12.0 * self.weights)  # gradients, cast and added
        )
        if self.recipe.load_in_4bit or self.recipe.load_in_8bit:
            seconds += self._bytes(2.6 * self.shape.quantised, self.rates.unpack)
        if self.whole:
            seconds += self._layers_forward()
        elif self.selective:
            seconds += self._small(self.rates.convolution_forward, self.rates.norm_forward)
        return seconds

    def _head(self, products: float) -> float:
        if self.scored:
            return 0.0
        return products * 2 * self.shape.vocab * self.shape.hidden * self.load.targets / self._rate(self.rates.head)

    # What is waited for: the card, or Python.

    def _host(self, layer: float) -> float:
        if self.graphed:
            return self.shape.layers * self.rates.host_graph
        modules = len(self._adapted_sizes()) * self.rates.host_adapter
        packed = 2 * self.rates.host_packed if self.recipe.load_in_4bit or self.recipe.load_in_8bit else 0.0
        return self.shape.layers * (layer + modules + packed)

    def _again(self) -> float:
        return self.shape.layers * self.rates.host_again if self.whole and not self.graphed else 0.0

    def forward(self) -> float:
        frozen = int(self.recipe.use_peft)
        card = self._layers_forward() + self._head(3 - frozen if self.summed else 1)
        return _later(card, self._host(self.rates.host_forward) + self._again())

    def backward(self) -> float:
        frozen = int(self.recipe.use_peft)
        card = self._layers_backward() + self._head(0 if self.summed else 3 - frozen)
        card += self._bytes(0 if frozen else 20.0 * self.shape.vocab * self.shape.hidden)
        host = self._host(self.rates.host_backward)
        if self.whole:
            host += self._host(self.rates.host_forward) + self._again()
        return _later(card, host)

    def reference(self) -> float:
        host = self.shape.layers * self.rates.host_forward / 2  # no gradients, no graph
        return _later(self._layers_forward() + self._head(1), host)

    def gradients(self) -> float:
        """Bytes of them."""
        return self._trained_size * self.trained

    @property
    def _trained_size(self) -> int:
        return 4 if self.recipe.use_peft else self.types.stored

    def optimizer(self, shards: int) -> float:
        size = self._trained_size
        passes = (self.rates.optimizer + 12) * size / 4
        if self.recipe.optim != "adamw_torch":  # fused: every number once
            passes = 28 * size / 4 + 12
        modules = 4 if self.recipe.use_peft else 10
        host = self.rates.host_tensor * modules * self.shape.layers
        return _later(self._bytes(passes * self.trained / shards), host)

    def between(self) -> float:
        """What Python does between the passes of two steps."""
        wrapped = self.shape.layers * self.rates.host_wrapped if self.recipe.use_peft else 0.0
        return self.rates.host_step + self.rates.host_token * self.load.tokens * self.load.passes + wrapped


def _later(card: float, host: float) -> float:
    """Seconds of both at once: the longer, and more where they take about the same: now one waits, now the other."""
    return float((card**OVERLAP + host**OVERLAP) ** (1 / OVERLAP))


def _communication(
    shape: ModelShape, recipe: Recipe, step: _Step, devices: int, forward: float, backward: float
) -> float:
    """Seconds that are waited for other cards of the host: what the passes do not hide."""
    share = (devices - 1) / devices / (0.8 * step.card.link)
    gradients = step.gradients() * share
    if step.graphed:  # whose gradients are exchanged after the backward pass
        return 2 * gradients
    if not recipe.fsdp:
        return max(0.0, 2 * gradients - 0.7 * backward / step.load.passes)
    gathered = step.types.stored * shape.parameters * share * 2 * step.load.passes
    return max(0.0, gathered + gradients - 0.8 * (forward + backward))


H200 = CARDS[MEASURED]
