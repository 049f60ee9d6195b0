"""The objectives against their formulas written out by hand, and their gradients against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mambalign.train.objectives import (
    LOSSES,
    Completions,
    PreferenceOptions,
    preference_loss,
    preference_metrics,
    rewards,
    sequence_sums,
)


def sides(dtype: torch.dtype = torch.float64) -> tuple[Completions, Completions]:
    def one() -> Completions:
        lengths = torch.tensor([3.0, 10.0, 1.0], dtype=dtype)
        logps, reference = (-lengths * torch.rand(3, dtype=dtype).add(0.1) for _ in range(2))
        return Completions(logps, lengths, reference)

    return one(), one()


def by_hand(loss_type: str, c: float, r: float, rc: float, rr: float, nc: float, nr: float, beta: float) -> float:
    """One pair; natural logs, no tensor operations."""

    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    margin = beta * ((c - rc) - (r - rr))
    odds = [p / (1 - p) for p in (math.exp(c / nc), math.exp(r / nr))]
    return {
        "sigmoid": -math.log(sigmoid(margin)),
        "hinge": max(0.0, 1 - margin),
        "ipo": ((c - rc) / nc - (r - rr) / nr - 1 / (2 * beta)) ** 2,
        "apo_zero": 1 - sigmoid(beta * (c - rc)) + sigmoid(beta * (r - rr)),
        "apo_down": sigmoid(beta * (c - rc)) + 1 - sigmoid(margin),
        "simpo": -math.log(sigmoid(beta * (c / nc - r / nr) - 0.5)),
        "orpo": -c / nc - beta * math.log(sigmoid(math.log(odds[0]) - math.log(odds[1]))),
    }[loss_type]


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "apo_zero", "apo_down", "simpo", "orpo"])
def test_values(loss_type: str) -> None:
    chosen, rejected = sides()
    losses = preference_loss(chosen, rejected, PreferenceOptions(loss_type, beta=0.7))
    assert chosen.reference_logps is not None and rejected.reference_logps is not None
    columns = (
        chosen.logps, rejected.logps, chosen.reference_logps, rejected.reference_logps, chosen.lengths,
        rejected.lengths,
    )  # fmt: skip
    for loss, *numbers in zip(losses.tolist(), *(c.tolist() for c in columns), strict=True):
        assert loss == pytest.approx(by_hand(loss_type, *numbers, beta=0.7), rel=1e-9)


def test_label_smoothing_is_the_expected_loss_under_flips() -> None:
    chosen, rejected = sides()
    smoothed = preference_loss(chosen, rejected, PreferenceOptions("sigmoid", 0.7, label_smoothing=0.2))
    plain, flipped = (
        preference_loss(a, b, PreferenceOptions("sigmoid", 0.7)) for a, b in ((chosen, rejected), (rejected, chosen))
    )
    assert torch.allclose(smoothed, 0.8 * plain + 0.2 * flipped)
    robust = [
        preference_loss(a, b, PreferenceOptions("robust", 0.7, label_smoothing=0.2))
        for a, b in ((chosen, rejected), (rejected, chosen))
    ]
    assert torch.allclose(0.8 * robust[0] + 0.2 * robust[1], plain)  # unbiased: arXiv 2403.00409, lemma 3.1


def test_kto_uses_the_other_sides_clamped_mean_without_gradient() -> None:
    logps = torch.tensor([-1.0, -3.0], dtype=torch.float64, requires_grad=True)
    chosen = Completions(logps, torch.ones(2), torch.tensor([-2.0, -3.5], dtype=torch.float64))
    rejected = Completions(
        torch.tensor([-4.0, -9.0], dtype=torch.float64), torch.ones(2), torch.tensor([-3.0, -3.0], dtype=torch.float64)
    )
    loss = preference_loss(chosen, rejected, PreferenceOptions("kto", 1.0))
    sigmoid = torch.sigmoid
    ratio_c, ratio_r = torch.tensor([1.0, 0.5], dtype=torch.float64), torch.tensor([-1.0, -6.0], dtype=torch.float64)
    expected = (1 - sigmoid(ratio_c - 0.0) + 1 - sigmoid(0.75 - ratio_r)) / 2  # mean ratios 0.75 and -3.5, clamped to 0
    assert torch.allclose(loss.detach(), expected)
    (gradient,) = torch.autograd.grad(loss[0], logps)
    assert gradient[1] == 0  # pair 1 enters pair 0's loss through the reference point only


@pytest.mark.parametrize("loss_type", sorted(set(LOSSES) - {"kto"}))
def test_gradients_and_directions(loss_type: str) -> None:
    chosen, rejected = sides()
    options = PreferenceOptions(
        loss_type, beta=0.7, rpo_alpha=0.3, label_smoothing=0.1 if loss_type in ("sigmoid", "robust") else 0.0
    )

    def loss(c: Tensor, r: Tensor) -> Tensor:
        return preference_loss(
            Completions(c, chosen.lengths, chosen.reference_logps),
            Completions(r, rejected.lengths, rejected.reference_logps),
            options,
        )

    inputs = (chosen.logps.requires_grad_(), rejected.logps.requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)
    down = torch.autograd.grad(loss(*inputs).sum(), inputs)[1]
    assert (down >= 0).all() or loss_type == "ipo"  # a likelier rejected answer never lowers the loss


def test_rpo_adds_the_average_nll() -> None:
    chosen, rejected = sides()
    plain, with_nll = (preference_loss(chosen, rejected, PreferenceOptions(rpo_alpha=a)) for a in (None, 0.5))
    assert torch.allclose(with_nll - plain, -0.5 * chosen.logps / chosen.lengths)


def test_metrics_and_rewards() -> None:
    chosen, rejected = sides()
    options = PreferenceOptions(beta=0.7)
    metrics = preference_metrics(chosen, rejected, preference_loss(chosen, rejected, options), options)
    up, down = rewards(chosen, options), rewards(rejected, options)
    assert metrics["rewards/margins"] == pytest.approx(float((up - down).sum()))
    assert metrics["rewards/accuracies"] == float((up > down).sum())
    same = preference_metrics(chosen, chosen, torch.zeros(3), options)
    assert same["rewards/accuracies"] == 1.5  # all ties: as good as a coin


def test_extreme_log_probs_stay_finite() -> None:
    for value in (0.0, -1e-9, -1e4):
        logps = torch.full((2,), value, requires_grad=True)
        side = Completions(logps, torch.ones(2), torch.zeros(2))
        other = Completions(torch.tensor([-1.0, -2e4]), torch.ones(2), torch.zeros(2))
        for loss_type in LOSSES:
            loss = preference_loss(side, other, PreferenceOptions(loss_type)).sum()
            (gradient,) = torch.autograd.grad(loss, logps)
            assert loss.isfinite() and gradient.isfinite().all(), (loss_type, value)


def test_sequence_sums() -> None:
    logps = torch.tensor([1.0, 2.0, 4.0, 8.0], requires_grad=True)
    sums, lengths = sequence_sums(logps, torch.tensor([0, 0, 2, 2]), 4)
    assert sums.tolist() == [3, 0, 12, 0] and lengths.tolist() == [2, 0, 2, 0]
    (gradient,) = torch.autograd.grad(sums[2], logps)
    assert gradient.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(loss_type="dpo"), "choose one of apo_down"),
        (dict(beta=0.0), "beta must be positive"),
        (dict(label_smoothing=0.5), "label_smoothing must be in"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PreferenceOptions(**options)  # type: ignore[arg-type]
