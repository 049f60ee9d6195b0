"""Statistics, against scipy and scikit-learn and against values computed by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import cohen_kappa_score

from mambalign.evals import statistics as ours


def test_the_clustered_error_by_hand() -> None:
    values, clusters = [1, 3, 5, 7, 9], ["a", "a", "b", "b", "c"]
    # mean 5; residual sums -6, 2, 4; sqrt(3 / 2 * 56) / 5
    found = ours.clustered_mean(values, clusters)
    assert found.mean == 5 and found.standard_error == pytest.approx(math.sqrt(84) / 5)
    alone = ours.clustered_mean(values)
    assert alone.standard_error == pytest.approx(stats.sem(values))
    means = np.array([[1, 3], [5, 7], [0, 4]], float)
    twice = ours.clustered_mean(means.ravel().tolist(), [0, 0, 1, 1, 2, 2])
    assert twice.standard_error == pytest.approx(stats.sem(means.mean(1)))
    low, high = alone.interval()
    assert (low, high) == pytest.approx(stats.t.interval(0.95, 4, 5, stats.sem(values)), abs=1e-8)
    assert math.isnan(ours.clustered_mean([1, 2], ["a", "a"]).standard_error) and ours.clustered_mean([]).n == 0
    with pytest.raises(ValueError, match="its cluster"):
        ours.clustered_mean([1, 2], ["a"])


def test_correlated_turns_have_wider_bars_than_independent_ones() -> None:
    values = [v for v in (1, 4, 9, 2, 7) for _ in range(2)]
    clustered = ours.clustered_mean(values, [i for i in range(5) for _ in range(2)])
    assert clustered.standard_error > 1.4 * ours.clustered_mean(values).standard_error


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_the_bootstrap_is_scipys(method: Any) -> None:
    x = np.random.default_rng(3).exponential(size=41)
    found = ours.bootstrap_interval(x.tolist(), method=method, seed=7, level=0.9)
    expected = stats.bootstrap(
        (x,), np.mean, method=method, n_resamples=10_000, confidence_level=0.9, rng=np.random.default_rng(7)
    ).confidence_interval
    assert found == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert ours.bootstrap_interval(x.tolist(), method=method) == ours.bootstrap_interval(x.tolist(), method=method)


def test_the_bootstrap_at_its_edges() -> None:
    assert ours.bootstrap_interval([4.0] * 9) == (4, 4)
    assert ours.bootstrap_interval([1, 2, 3], ["a"] * 3) == (2, 2)
    assert all(map(math.isnan, ours.bootstrap_interval([])))
    spread = ours.bootstrap_interval([1, 1, 9, 9] * 5, list("aabb" * 5))
    assert spread == (1, 9)  # two clusters only


def test_paired_tests() -> None:
    generator = np.random.default_rng(1)
    a = {i: generator.normal(size=2).tolist() for i in range(30)}
    b = {i: [v + 0.4 + 0.6 * generator.normal() for v in values] for i, values in a.items()}
    found = ours.paired_test(a, b | {99: 1.0})  # type: ignore[arg-type]
    expected = stats.ttest_rel([np.mean(b[i]) for i in a], [np.mean(a[i]) for i in a])
    assert (found.t, found.p_t) == pytest.approx((expected.statistic, expected.pvalue), rel=1e-9)
    permuted = stats.permutation_test(
        (np.array([np.mean(b[i]) for i in a]), np.array([np.mean(a[i]) for i in a])),
        lambda x, y, axis: np.mean(x - y, axis=axis),
        permutation_type="samples", n_resamples=20_000, vectorized=True, rng=np.random.default_rng(0),
    )  # fmt: skip
    assert found.p_permutation == pytest.approx(permuted.pvalue, abs=0.003)
    assert found.n_unpaired == 1 and found.difference.n_clusters == 30


def test_few_pairs_are_permuted_exactly() -> None:
    found = ours.paired_test(dict.fromkeys("abc", 0.0), {"a": 1.0, "b": 2.0, "c": 3.0})
    assert found.p_permutation == 2 / 8
    same = ours.paired_test({"a": 1, "b": 2}, {"a": 1, "b": 2})
    assert (same.t, same.p_t, same.p_permutation) == (0, 1, 1)
    assert math.isnan(ours.paired_test({}, {}).p_permutation)
    assert ours.wins({"a": 1, "b": 2, "c": 3}, {"a": 2, "b": 2, "c": 1, "d": 9}) == {"win": 1, "loss": 1, "tie": 1}


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 8, 79, 80, 804])
def test_students_distribution(freedom: int) -> None:
    for t in (0.0, 0.3, 1.0, 2.2, 6.0, -1.5):
        assert ours.student_t_sf(t, freedom) == pytest.approx(stats.t.sf(t, freedom), abs=1e-13)
    assert ours.student_t_quantile(0.975, freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-9)


def test_ranks_and_kappa_with_ties() -> None:
    generator = np.random.default_rng(2)
    for _ in range(5):
        a, b = generator.integers(1, 6, 25).tolist(), generator.integers(1, 6, 25).tolist()
        assert ours.spearman(a, b) == pytest.approx(stats.spearmanr(a, b)[0])
        assert ours.kendall(a, b) == pytest.approx(stats.kendalltau(a, b)[0])
        assert ours.cohen_kappa(a, b) == pytest.approx(cohen_kappa_score(a, b))
        assert ours.cohen_kappa(a, b, weights="quadratic") == pytest.approx(
            cohen_kappa_score(a, b, weights="quadratic")
        )
    assert ours.spearman([1, 2, 3], [9, 5, 1]) == pytest.approx(-1) and math.isnan(ours.spearman([1, 1], [1, 2]))
    assert math.isnan(ours.kendall([1], [1])) and math.isnan(ours.cohen_kappa(["x"], ["x"]))
    with pytest.raises(ValueError, match="1 are not 2"):
        ours.cohen_kappa([1], [1, 2])


def vote(number: int, a: str, b: str, winner: str, turn: int = 1) -> dict[str, Any]:
    return {"question_id": number, "model_a": a, "model_b": b, "winner": winner, "turn": turn}


def test_agreement_as_fastchat_counts_it() -> None:
    judge = [
        vote(1, "x", "y", "model_a"),
        vote(2, "x", "y", "tie (inconsistent)"),
        vote(3, "x", "y", "model_b", turn=2),
    ]
    people = [
        vote(1, "y", "x", "model_b"),  # the same, named the other way round
        vote(1, "x", "y", "tie"),
        vote(2, "x", "y", "tie"),
        vote(2, "y", "x", "model_a"),
        vote(3, "x", "y", "model_a", turn=2),
        vote(4, "x", "y", "model_a"),
    ]
    assert ours.vote_agreement(judge, people, turn=1) == (2, 4)
    assert ours.vote_agreement(judge, people, turn=1, ties=False) == (1, 1)
    assert ours.vote_agreement(judge, people, turn=2) == (0, 1)
    assert ours.votes_agreement_within(people, turn=1) == (0, 2)
    assert ours.votes_agreement_within(people, turn=1, ties=False) == (0, 0)
