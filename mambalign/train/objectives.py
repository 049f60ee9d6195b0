"""Training objectives as pure functions of log-probabilities (a reward model's: of rewards), with the equation of the
paper on the line that uses it.

Notation: for completion k, `logps` is `sum_t log pi(y_t | x, y_<t)` over its trained tokens and `lengths` their number;
`ratios` are `logps - reference logps`. Preference losses return one value per pair, never an average: the trainer
divides by the number of pairs of the whole optimizer step, whatever batches it was computed in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Completions:
    """One side (chosen or rejected) of P pairs, every field fp32 `[P]`.

    `reference_logps` is None for objectives without a reference model.
    """

    logps: Tensor
    lengths: Tensor
    reference_logps: Tensor | None = None

    @property
    def ratios(self) -> Tensor:
        """`log pi / pi_ref`; `log pi` itself where there is no reference."""
        return self.logps if self.reference_logps is None else self.logps - self.reference_logps

    @property
    def average_logps(self) -> Tensor:
        return self.logps / self.lengths

    @property
    def average_ratios(self) -> Tensor:
        return self.ratios / self.lengths


@dataclass(frozen=True)
class PreferenceOptions:
    """The knobs of the preference objectives; names as in the recipes."""

    loss_type: str = "sigmoid"
    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    rpo_alpha: float | None = None

    def __post_init__(self) -> None:
        if self.loss_type not in LOSSES:
            raise ValueError(f"loss_type {self.loss_type!r} is unknown; choose one of {', '.join(sorted(LOSSES))}")
        if not self.beta > 0:
            raise ValueError(f"beta must be positive, got {self.beta}")
        if not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing must be in [0, 0.5), got {self.label_smoothing}")

    @property
    def needs_reference(self) -> bool:
        return self.loss_type not in REFERENCE_FREE


def sequence_sums(logps: Tensor, sequence: Tensor, num_sequences: int) -> tuple[Tensor, Tensor]:
    """Per-token values `[M]` summed by `sequence` (ascending) -> (sums `[K]`, lengths `[K]`), in a fixed order."""
    lengths = torch.bincount(sequence, minlength=num_sequences)
    return torch.segment_reduce(logps, "sum", lengths=lengths), lengths.to(logps.dtype)


def sft_loss(logps: Tensor) -> Tensor:
    """Negative log-likelihood summed over the trained tokens `[M]` -> scalar; divide by the step's token count."""
    return -logps.sum()


def _sigmoid(chosen: Completions, rejected: Completions, options: PreferenceOptions) -> Tensor:
    """DPO, arXiv 2305.18290 eq. 7; with label_smoothing, conservative DPO (Mitchell 2023, eq. 3)."""
    margin = options.beta * (chosen.ratios - rejected.ratios)
    return -(1 - options.label_smoothing) * F.logsigmoid(margin) - options.label_smoothing * F.logsigmoid(-margin)


def _robust(chosen: Completions, rejected: Completions, options: PreferenceOptions) -> Tensor:
    """Robust DPO, arXiv 2403.00409 eq. 12: unbiased when a share `label_smoothing` of the labels is flipped."""
    margin = options.beta * (chosen.ratios - rejected.ratios)
    clean = -(1 - options.label_smoothing) * F.logsigmoid(margin)
    flipped = -options.label_smoothing * F.logsigmoid(-margin)
    return (clean - flipped) / (1 - 2 * options.label_smoothing)


def _hinge(chosen: Completions, rejected: Completions, options: PreferenceOptions) -> Tensor:
    """SLiC's hinge on DPO's margin, arXiv 2309.06657 section 2."""
    return torch.relu(1 - options.beta * (chosen.ratios - rejected.ratios))


def _ipo(chosen: Completions, rejected: Completions, options: PreferenceOptions) -> Tensor:
    """IPO, arXiv 2310.12036 eq. 17 with tau = beta, on per-token averages as its authors ran it."""
    return (chosen.average_ratios - rejected.average_ratios - 1 / (2 * options.beta)) ** 2


def _apo_zero(chosen: Completions, rejected: Completions, options: PreferenceOptions) -> Tensor:
    """APO-zero, arXiv 2408.06266 eq. 7: chosen up, rejected down."""
    return 1 - torch.sigmoid(options.beta * chosen.ratios) + torch.sigmoid(options.beta * rejected.ratios)


def _apo_down(chosen: Completions, rejected: Completions, options: PreferenceOptions) -> Tensor:
    """APO-down, arXiv 2408.06266 eq. 8: both down, rejected further (chosen is worse than the model)."""
    margin = options.beta * (chosen.ratios - rejected.ratios)
    return torch.sigmoid(options.beta * chosen.ratios) + 1 - torch.sigmoid(margin)


def _simpo(chosen: Completions, rejected: Completions, options: PreferenceOptions) -> Tensor:
    """SimPO, arXiv 2405.14734 eq. 6: length-averaged, no reference, target margin simpo_gamma."""
    margin = options.beta * (chosen.average_logps - rejected.average_logps)
    return -F.logsigmoid(margin - options.simpo_gamma)


def _orpo(chosen: Completions, rejected: Completions, options: PreferenceOptions) -> Tensor:
    """ORPO, arXiv 2403.07691 eq. 6-7 with lambda = beta: NLL of the chosen answer plus the log odds ratio."""
    p_chosen, p_rejected = chosen.average_logps, rejected.average_logps
    log_odds = (p_chosen - p_rejected) - (_log1mexp(p_chosen) - _log1mexp(p_rejected))
    return -p_chosen - options.beta * F.logsigmoid(log_odds)


def _kto(chosen: Completions, rejected: Completions, options: PreferenceOptions) -> Tensor:
    """KTO on pairs, arXiv 2402.01306 eq. 8: each side is judged against the other side's estimated KL.

    The reference point z0 is the mean ratio of the pairs given, clamped at 0 and without gradient as in the paper;
    so, unlike every other loss here, it depends on which pairs are computed together (a device batch, or under
    `max_tokens_per_device` each of its parts): eight or more should be.
    """
    kl_chosen = chosen.ratios.mean().clamp(min=0).detach()
    kl_rejected = rejected.ratios.mean().clamp(min=0).detach()
    desirable = 1 - torch.sigmoid(options.beta * (chosen.ratios - kl_rejected))
    undesirable = 1 - torch.sigmoid(options.beta * (kl_chosen - rejected.ratios))
    return (desirable + undesirable) / 2


def _log1mexp(x: Tensor) -> Tensor:
    """`log(1 - exp(x))` for x < 0 without cancellation (Maechler 2012, eq. 7)."""
    x = x.clamp(max=-1e-6)
    return torch.where(x > -0.6931472, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


LOSSES: dict[str, Callable[[Completions, Completions, PreferenceOptions], Tensor]] = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "simpo": _simpo,
    "orpo": _orpo,
    "kto": _kto,
}
REFERENCE_FREE = frozenset({"simpo", "orpo"})


def preference_loss(chosen: Completions, rejected: Completions, options: PreferenceOptions) -> Tensor:
    """Loss of every pair, fp32 `[P]`.

    With `rpo_alpha` the chosen answer's length-averaged NLL is added (RPO, arXiv 2404.19733 eq. 1).
    """
    losses = LOSSES[options.loss_type](chosen, rejected, options)
    if options.rpo_alpha is not None:
        losses = losses - options.rpo_alpha * chosen.average_logps
    return losses


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margins: Tensor | None = None, center_coefficient: float | None = None
) -> Tensor:
    """Loss of a reward model on every pair, `[P]`, from the rewards (scores) of both completions, `[P]` each.

    margins: `[P]`, larger where chosen was judged better by more; None is 0. center_coefficient adds a pull of each
    pair's rewards to a sum of 0, which the first term leaves open.

    Example:
        >>> loss = bradley_terry_loss(torch.tensor([2.0]), torch.tensor([0.5]), margins=torch.tensor([1.5]))
        >>> round(loss.item(), 4)  # log 2: the margin is just reached
        0.6931
    """
    difference = chosen - rejected
    if margins is not None:
        difference = difference - margins  # Llama 2, arXiv 2307.09288 eq. 2
    losses = -F.logsigmoid(difference)  # Bradley-Terry, arXiv 2203.02155 eq. 1
    if center_coefficient is not None:
        losses = losses + center_coefficient * (chosen + rejected) ** 2  # arXiv 2312.09244 section 2
    return losses


@torch.no_grad()
def reward_metrics(
    chosen: Tensor, rejected: Tensor, lengths: tuple[Tensor, Tensor], losses: Tensor
) -> dict[str, Tensor]:
    """Sums over the pairs; divide by their number. `lengths`: trained tokens of chosen and of rejected, `[P]` each.

    `lengths/accuracies` is what preferring the longer completion would reach: a reward model that is no better than
    that has perhaps learnt nothing else.
    """
    return {
        "loss": losses.sum(),
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/mean": (chosen + rejected).sum() / 2,
        "rewards/margins": (chosen - rejected).sum(),
        "rewards/accuracies": _ranked_right(chosen, rejected),
        "lengths/chosen": lengths[0].sum(),
        "lengths/rejected": lengths[1].sum(),
        "lengths/accuracies": _ranked_right(*lengths),
    }


def _ranked_right(chosen: Tensor, rejected: Tensor) -> Tensor:
    """How many pairs are. A tie is half right: where all rewards are zero, a coin would score as well."""
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).sum()


@torch.no_grad()
def rewards(completions: Completions, options: PreferenceOptions) -> Tensor:
    """Implicit reward `[P]`: beta log pi/pi_ref (arXiv 2305.18290 section 4), or without reference beta mean log pi."""
    if options.needs_reference:
        return options.beta * completions.ratios
    return options.beta * completions.average_logps


@torch.no_grad()
def preference_metrics(
    chosen: Completions, rejected: Completions, losses: Tensor, options: PreferenceOptions
) -> dict[str, Tensor]:
    """Sums over the pairs of everything the field logs; divide by the number of pairs."""
    up, down = rewards(chosen, options), rewards(rejected, options)
    return {
        "loss": losses.sum(),
        "rewards/chosen": up.sum(),
        "rewards/rejected": down.sum(),
        "rewards/margins": (up - down).sum(),
        "rewards/accuracies": _ranked_right(up, down),
        "logps/chosen": chosen.logps.sum(),
        "logps/rejected": rejected.logps.sum(),
        "lengths/chosen": chosen.lengths.sum(),
        "lengths/rejected": rejected.lengths.sum(),
    }
