"""Error bars, paired tests, agreement and rank correlation, for scores that come in clusters (two turns a question).

Pure functions of numbers; what is random is seeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_EXACT_SIGN_FLIPS = 14  # clusters up to which all 2^n sign flips are enumerated


@dataclass(frozen=True)
class Estimate:
    """A mean with its standard error (nan of one cluster) over `n_clusters` clusters with `n` values in all."""

    mean: float
    standard_error: float
    n: int
    n_clusters: int

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """mean -+ t * standard error, t of Student's distribution with n_clusters - 1 degrees of freedom."""
        if self.n_clusters < 2:
            return math.nan, math.nan
        half = student_t_quantile((1 + level) / 2, self.n_clusters - 1) * self.standard_error
        return self.mean - half, self.mean + half


@dataclass(frozen=True)
class PairedTest:
    """b minus a, paired by cluster. `difference.mean` weighs every cluster alike; p_t of Student's t,
    p_permutation of random sign flips."""

    difference: Estimate
    t: float
    p_t: float
    p_permutation: float
    n_unpaired: int


def clustered_mean(values: Sequence[float], clusters: Sequence[Hashable] | None = None) -> Estimate:
    """The mean of all values, and its standard error where values of a cluster are not independent.

    SE = sqrt(G / (G - 1) * sum_g (sum_{i in g} (x_i - mean))^2) / n, with G clusters: the cluster-robust variance of
    Liang and Zeger (Biometrika 1986) for a mean, as in arXiv 2411.00640, section 2.2, with the small-sample factor of
    Cameron and Miller (J. Human Resources 2015, section VI). With one value a cluster it is sd / sqrt(n), with equally
    many in each the sd of the clusters' means over sqrt(G).

    >>> clustered_mean([1, 3, 5, 7], ["a", "a", "b", "b"])
    Estimate(mean=4.0, standard_error=2.0, n=4, n_clusters=2)
    """
    sums, counts = _cluster_sums(values, clusters)
    n, groups = int(counts.sum()), len(counts)
    if not n:
        return Estimate(math.nan, math.nan, 0, 0)
    mean = math.fsum(values) / n
    if groups < 2:
        return Estimate(mean, math.nan, n, groups)
    residuals = sums - counts * mean
    return Estimate(mean, math.sqrt(groups / (groups - 1) * float(residuals @ residuals)) / n, n, groups)


def bootstrap_interval(
    values: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
    method: Literal["bca", "percentile"] = "bca",
) -> tuple[float, float]:
    """Interval of the mean from resampled clusters: bias-corrected and accelerated (Efron, JASA 1987), or percentile.

    Whole clusters are drawn with replacement; a resample's mean is that of all its values. BCa's acceleration is the
    jackknife's over clusters. Of one cluster, or values without spread, both ends are the mean (nan of none).
    """
    sums, counts = _cluster_sums(values, clusters)
    groups = len(counts)
    if not groups:
        return math.nan, math.nan
    mean = float(sums.sum() / counts.sum())
    generator = np.random.default_rng(seed)
    means = np.empty(resamples)
    for start in range(0, resamples, 1000):  # bounds the memory
        drawn = generator.integers(groups, size=(min(1000, resamples - start), groups))
        means[start : start + len(drawn)] = sums[drawn].sum(1) / counts[drawn].sum(1)
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca" and groups > 1 and np.ptp(means) > 0:
        tails = _bca_tails(tails, means, mean, sums, counts)
    low, high = np.quantile(means, tails)
    return float(low), float(high)


def _bca_tails(tails: Array, means: Array, mean: float, sums: Array, counts: Array) -> Array:
    below = (np.count_nonzero(means < mean) + 0.5 * np.count_nonzero(means == mean)) / len(means)
    bias = _normal_quantile(min(max(below, 0.5 / len(means)), 1 - 0.5 / len(means)))
    jackknife = (sums.sum() - sums) / (counts.sum() - counts)
    lean = jackknife.mean() - jackknife
    spread = float((lean**2).sum())
    acceleration = float((lean**3).sum()) / (6 * spread**1.5) if spread else 0.0
    z = np.array([bias + _normal_quantile(float(tail)) for tail in tails])
    return np.array([_normal_cdf(bias + each / (1 - acceleration * each)) for each in z])


def paired_test(
    a: Mapping[Hashable, float | Sequence[float]],
    b: Mapping[Hashable, float | Sequence[float]],
    *,
    flips: int = 20_000,
    seed: int = 0,
) -> PairedTest:
    """Whether two models' scores on the same clusters (questions) differ.

    Of every cluster that both have, the mean of b's values less that of a's. The t-test is Student's paired one, with
    G - 1 degrees of freedom. The permutation test flips the differences' signs (Fisher 1935): all 2^G ways up to 14
    clusters, else `flips` seeded ones, with p = (1 + extreme) / (1 + flips) (Phipson, Smyth 2010). Two-sided, both.
    """
    both = [key for key in a if key in b]
    differences = np.array([np.mean(b[key]) - np.mean(a[key]) for key in both], dtype=np.float64)
    estimate = clustered_mean([float(d) for d in differences])
    t = _ratio(estimate.mean, estimate.standard_error)
    p_t = 2 * student_t_sf(abs(t), len(both) - 1) if not math.isnan(t) else math.nan
    return PairedTest(estimate, t, p_t, _sign_flip_p(differences, flips, seed), len(a) + len(b) - 2 * len(both))


def _ratio(mean: float, error: float) -> float:
    if math.isnan(error) or (mean == 0 and error == 0):
        return math.nan if math.isnan(error) else 0.0
    return mean / error if error else math.copysign(math.inf, mean)


def _sign_flip_p(differences: Array, flips: int, seed: int) -> float:
    n = len(differences)
    if n == 0:
        return math.nan
    observed = abs(differences.sum()) * (1 - 1e-12)  # the unflipped one counts, whatever rounding says
    if n <= _EXACT_SIGN_FLIPS:
        signs = 1 - 2 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float(np.mean(np.abs(signs @ differences) >= observed))
    generator = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, flips, 1000):
        signs = generator.integers(0, 2, size=(min(1000, flips - start), n)) * 2 - 1
        extreme += int(np.count_nonzero(np.abs(signs @ differences) >= observed))
    return (1 + extreme) / (1 + flips)


def wins(a: Mapping[Hashable, float], b: Mapping[Hashable, float], *, within: float = 0.0) -> dict[str, int]:
    """How often b's value is above a's, below, or `within` of it, over the keys that both have."""
    differences = [b[key] - a[key] for key in a if key in b]
    win, loss = sum(d > within for d in differences), sum(d < -within for d in differences)
    return {"win": win, "loss": loss, "tie": len(differences) - win - loss}


# Agreement ----------------------------------------------------------------------------------------------------------


def cohen_kappa(a: Sequence[Any], b: Sequence[Any], *, weights: Literal["quadratic"] | None = None) -> float:
    """Agreement of two raters beyond chance (Cohen 1960); of numbers also with quadratic weights (Cohen 1968).

    kappa = 1 - sum(w * observed) / sum(w * expected); w = 1 where the ratings differ, or their squared difference. nan
    where chance alone would agree entirely.
    """
    if len(a) != len(b):
        raise ValueError(f"kappa needs ratings of the same things: {len(a)} are not {len(b)}")
    if not a:
        return math.nan
    labels = sorted(set(a) | set(b))
    index = {label: i for i, label in enumerate(labels)}
    observed = np.zeros((len(labels), len(labels)))
    for first, second in zip(a, b, strict=True):
        observed[index[first], index[second]] += 1
    expected = np.outer(observed.sum(1), observed.sum(0)) / len(a)
    if weights == "quadratic":
        numbers = np.array(labels, dtype=np.float64)
        cost = (numbers[:, None] - numbers[None]) ** 2
    else:
        cost = 1 - np.eye(len(labels))
    by_chance = float((cost * expected).sum())
    return 1 - float((cost * observed).sum()) / by_chance if by_chance else math.nan


Vote = Mapping[str, Any]


def vote_agreement(a: Sequence[Vote], b: Sequence[Vote], *, turn: int, ties: bool = True) -> tuple[int, int]:
    """(agreeing, compared) pairs of votes of two judges on the same question, models and turn: FastChat's
    `compute_agreement`.

    A vote is `{"question_id", "model_a", "model_b", "winner", "turn"}` with winner "model_a", "model_b" or one that
    says tie ("tie (inconsistent)" too). Which model is called a does not matter. Every vote of `a` meets every one
    of `b`. `ties=False` leaves out pairs in which either is a tie.
    """
    theirs: dict[Hashable, list[str]] = {}
    for vote in b:
        if vote["turn"] == turn:
            key, winner = _vote(vote)
            theirs.setdefault(key, []).append(winner)
    agreeing = compared = 0
    for vote in a:
        if vote["turn"] != turn:
            continue
        key, mine = _vote(vote)
        for other in theirs.get(key, ()):
            if ties or "tie" not in (mine, other):
                compared += 1
                agreeing += mine == other
    return agreeing, compared


def votes_agreement_within(votes: Sequence[Vote], *, turn: int, ties: bool = True) -> tuple[int, int]:
    """`vote_agreement` of one group of judges with itself: every two votes on the same question, models and turn."""
    grouped: dict[Hashable, list[str]] = {}
    for vote in votes:
        if vote["turn"] == turn:
            key, winner = _vote(vote)
            grouped.setdefault(key, []).append(winner)
    agreeing = compared = 0
    for group in grouped.values():
        for i, first in enumerate(group):
            for second in group[i + 1 :]:
                if ties or "tie" not in (first, second):
                    compared += 1
                    agreeing += first == second
    return agreeing, compared


def _vote(vote: Vote) -> tuple[Hashable, str]:
    """(what it is about, with the models' names sorted; the winner's name, or "tie")."""
    models = sorted((vote["model_a"], vote["model_b"]))
    winner = vote["winner"]
    named = "tie" if "tie" in winner else vote.get(winner, winner)
    return (vote["question_id"], *models), named


# Ranks --------------------------------------------------------------------------------------------------------------


def spearman(a: Sequence[float], b: Sequence[float]) -> float:
    """Spearman's rank correlation; ties share their mean rank. nan where one side has no spread."""
    x, y = _ranks(a), _ranks(b)
    x, y = x - x.mean(), y - y.mean()
    scale = math.sqrt(float(x @ x) * float(y @ y)) if len(x) > 1 else 0.0
    return float(x @ y) / scale if scale else math.nan


def kendall(a: Sequence[float], b: Sequence[float]) -> float:
    """Kendall's tau-b (Biometrika 1945): pairs in order less pairs in reverse, corrected for ties."""
    x, y = np.asarray(a, np.float64), np.asarray(b, np.float64)
    upper = np.triu_indices(len(x), 1)
    dx, dy = (np.sign(each[:, None] - each[None])[upper] for each in (x, y))
    scale = math.sqrt(float(np.count_nonzero(dx)) * float(np.count_nonzero(dy)))
    return float((dx * dy).sum()) / scale if scale else math.nan


def _ranks(values: Sequence[float]) -> Array:
    _, inverse, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Array = (last - (counts - 1) / 2)[inverse]
    return ranks


# Distributions ------------------------------------------------------------------------------------------------------


def student_t_sf(t: float, freedom: int) -> float:
    """P(T > t) of Student's distribution with a whole number of degrees of freedom (Abramowitz and Stegun 26.7.3-4)."""
    if freedom < 1:
        return math.nan
    if t < 0:
        return 1 - student_t_sf(-t, freedom)
    angle = math.atan2(t, math.sqrt(freedom))
    cos2 = math.cos(angle) ** 2
    term, total = (math.cos(angle), math.cos(angle)) if freedom % 2 else (1.0, 1.0)
    for k in range(3 if freedom % 2 else 2, freedom - 1, 2):
        term *= cos2 * (k - 1) / k
        total += term
    if freedom % 2:
        within = 2 / math.pi * (angle + (math.sin(angle) * total if freedom > 1 else 0.0))
    else:
        within = math.sin(angle) * total
    return max(0.0, (1 - within) / 2)


def student_t_quantile(p: float, freedom: int) -> float:
    """The t that Student's distribution stays below with probability p, 0 < p < 1."""
    return _bisect(lambda t: 1 - student_t_sf(t, freedom), p, 1e6)


def _normal_cdf(z: float) -> float:
    return math.erfc(-z / math.sqrt(2)) / 2


def _normal_quantile(p: float) -> float:
    return _bisect(_normal_cdf, p, 40.0)


def _bisect(cdf: Callable[[float], float], p: float, bound: float) -> float:
    low, high = -bound, bound
    while high - low > 1e-12 * max(1.0, abs(low)):
        middle = (low + high) / 2
        if cdf(middle) < p:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def _cluster_sums(values: Sequence[float], clusters: Sequence[Hashable] | None) -> tuple[Array, Array]:
    """Sum and number of every cluster's values; None: a cluster a value."""
    numbers = np.asarray(values, np.float64)
    if clusters is None:
        return numbers, np.ones(len(numbers))
    if len(clusters) != len(numbers):
        raise ValueError(f"every value needs its cluster: {len(numbers)} values, {len(clusters)} clusters")
    index: dict[Hashable, int] = {}
    which = np.array([index.setdefault(cluster, len(index)) for cluster in clusters], dtype=np.intp)
    size = len(index)
    counts = np.bincount(which, minlength=size).astype(np.float64)
    return np.bincount(which, numbers, size).astype(np.float64), counts
