"""Intervals against scipy, DeLong against all pairs, permutation against relabelling, detectable effects against simulation."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics

from brainfm_cli.learning.scores import statistic
from brainfm_cli.learning.uncertainty import (
    averaged,
    bootstrap_p,
    delong,
    detectable_auroc,
    detectable_difference,
    holm,
    interval,
    leave_one_out_weights,
    over,
    permutation_p,
    resample_weights,
)


def predictions(rng, people=50, shift=1.0):
    labels = np.r_[0, 1, rng.integers(0, 2, people - 2)]
    p = 1 / (1 + np.exp(-(shift * labels + rng.normal(size=people))))
    return labels, np.column_stack([1 - p, p])


@pytest.mark.parametrize("method", ["percentile", "bca"])
def test_intervals_agree_with_scipy(generator, method):
    labels, p = predictions(generator)
    weighted = statistic("brier", "binary", labels.astype(float), p)
    weights = resample_weights(np.arange(50), 20_000, np.random.default_rng(1))
    found = interval(weighted, weights, method=method, level=0.95, jackknife=leave_one_out_weights(np.arange(50)))
    errors = (p[:, 1] - labels) ** 2
    expected = stats.bootstrap((errors,), np.mean, n_resamples=20_000, method=method, rng=np.random.default_rng(2))
    assert found.low == pytest.approx(expected.confidence_interval.low, abs=0.02 * errors.std())
    assert found.high == pytest.approx(expected.confidence_interval.high, abs=0.02 * errors.std())
    assert found.error == pytest.approx(expected.standard_error, rel=0.03)


def test_bca_of_a_skewed_statistic_agrees_with_scipy_and_differs_from_percentile(generator):
    values = generator.lognormal(0, 1, 40)

    def variance(weights):
        mean = weights @ values / 40
        return weights @ values**2 / 40 - mean**2

    weights = resample_weights(np.arange(40), 20_000, np.random.default_rng(1))
    found = interval(variance, weights, method="bca", level=0.95, jackknife=leave_one_out_weights(np.arange(40)))
    expected = stats.bootstrap((values,), lambda x, axis: np.var(x, axis=axis), n_resamples=20_000, method="BCa", rng=np.random.default_rng(2)).confidence_interval  # fmt: skip
    plain = interval(variance, weights, method="percentile", level=0.95)
    assert found.low == pytest.approx(expected.low, rel=0.03)
    assert found.high == pytest.approx(expected.high, rel=0.06)
    assert found.high > 1.2 * plain.high


def test_people_of_a_group_are_drawn_together(generator):
    units = np.array(["a", "b", "a", "c", "b"])
    weights = resample_weights(units, 200, generator)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 1] == weights[:, 4]).all()
    assert set(weights[:, [0, 1, 3]].sum(1)) == {3}
    assert leave_one_out_weights(units).tolist() == [[0, 1, 0, 1, 1], [1, 0, 1, 1, 0], [1, 1, 1, 0, 1]]


def test_an_interval_that_is_mostly_undefined_says_so():
    labels = np.array([0, 0, 0, 1])
    p = np.column_stack([[0.9, 0.8, 0.7, 0.1], [0.1, 0.2, 0.3, 0.9]])
    weights = resample_weights(np.arange(4), 500, np.random.default_rng(0))
    found = interval(statistic("auroc", "binary", labels.astype(float), p), weights, method="percentile", level=0.95)
    assert found.low is None
    assert "undefined in" in found.reason


def test_a_constant_statistic_has_an_interval_of_no_width():
    weights = resample_weights(np.arange(10), 300, np.random.default_rng(0))
    found = interval(lambda w: np.full(len(w), 0.5), weights, method="bca", level=0.95, jackknife=leave_one_out_weights(np.arange(10)))
    assert (found.low, found.high, found.error) == (0.5, 0.5, 0.0)


def test_chunks_do_not_change_anything(generator):
    weights = generator.multinomial(30, np.full(30, 1 / 30), size=777).astype(float)
    values = generator.normal(size=30)
    np.testing.assert_allclose(over(lambda w: w @ values, weights), weights @ values)
    np.testing.assert_allclose(averaged([lambda w: w @ values, lambda w: w @ values * 3])(weights), 2 * weights @ values)


def all_pairs(labels, scores):
    """DeLong, DeLong and Clarke-Pearson (1988), equations 3 to 5, by every pair of a case and a control."""
    cases, controls = scores[:, labels == 1], scores[:, labels == 0]
    psi = (cases[:, :, None] > controls[:, None, :]) + 0.5 * (cases[:, :, None] == controls[:, None, :])
    v10, v01 = psi.mean(2), psi.mean(1)
    return psi.mean((1, 2)), np.cov(v10) / v10.shape[1] + np.cov(v01) / v01.shape[1]


@pytest.mark.parametrize("digits", [1, 8])
def test_delong_agrees_with_all_pairs(generator, digits):
    labels, p = predictions(generator, 40)
    scores = np.round(
        np.stack([p[:, 1], np.clip(p[:, 1] + generator.normal(scale=0.2, size=40), 0, 1), generator.uniform(size=40)]), digits
    )
    found = delong(labels, scores)
    areas, covariance = all_pairs(labels, scores)
    np.testing.assert_allclose(found.areas, areas, atol=1e-12)
    np.testing.assert_allclose(found.areas, [metrics.roc_auc_score(labels, row) for row in scores], atol=1e-12)
    np.testing.assert_allclose(found.covariance, covariance, atol=1e-12)
    gap, error, p_value = found.difference(0, 1)
    variance = covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1]
    assert error == pytest.approx(np.sqrt(variance))
    assert p_value == pytest.approx(2 * stats.norm.sf(abs(gap) / error))


def test_delong_is_that_of_mlstatkit():
    """Kept values of another implementation, ties included (golden/make.py)."""
    values = json.loads((Path(__file__).parent / "golden" / "scores.json").read_text())["delong"]
    labels = np.array(values["labels"])
    found = delong(labels, np.array([values["first"], values["second"]]))
    gap, error, p = found.difference(0, 1)
    assert abs(gap / error) == pytest.approx(abs(values["z"]), rel=1e-9)
    assert p == pytest.approx(values["p"], rel=1e-9)


def test_delong_with_equal_repetitions_is_delong_without():
    rng = np.random.default_rng(3)
    labels, p = predictions(rng)
    scores = np.stack([p[:, 1], rng.uniform(size=50)])
    once, thrice = delong(labels, scores), delong(labels, np.repeat(scores[:, None], 3, axis=1))
    np.testing.assert_allclose(once.covariance, thrice.covariance)
    assert delong(labels, np.stack([p[:, 1], p[:, 1]])).difference(0, 1) == (0.0, 0.0, 1.0)


def test_delong_agrees_with_the_bootstrap(generator):
    labels, p = predictions(generator, 300)
    other = np.clip(p[:, 1] + generator.normal(scale=0.3, size=300), 0, 1)
    _, error, _ = delong(labels, np.stack([p[:, 1], other])).difference(0, 1)
    weights = resample_weights(np.arange(300), 4000, generator)
    both = [statistic("auroc", "binary", labels.astype(float), np.column_stack([1 - q, q])) for q in (p[:, 1], other)]
    assert np.std(both[0](weights) - both[1](weights)) == pytest.approx(error, rel=0.08)


def test_bootstrap_p_counts():
    assert bootstrap_p(np.r_[np.full(99, 1.0)]) == pytest.approx(2 / 100)
    assert bootstrap_p(np.r_[np.full(90, 1.0), np.full(9, -1.0)]) == pytest.approx(20 / 100)
    assert bootstrap_p(np.zeros(99)) == 1.0


def test_holm_is_the_step_down_rule():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.6]) == [1.0, 1.0]
    assert holm([]) == []
    rng = np.random.default_rng(0)
    false = [min(holm(list(rng.uniform(size=5)))) <= 0.05 for _ in range(4000)]
    assert np.mean(false) == pytest.approx(0.05, abs=0.012)  # of five true nulls, one or more is rejected one time in twenty


def pairs_won(members, p):
    gaps = p[members][:, None] - p[~members][None]
    return (gaps > 0).mean() + 0.5 * (gaps == 0).mean()


@pytest.mark.parametrize("kind", ["binary", "multiclass", "continuous"])
def test_permutation_p_of_few_people_is_near_that_of_all_orders(kind):
    rng = np.random.default_rng(5)
    observed = {"binary": [0, 1, 0, 1, 1, 0], "multiclass": [0, 1, 2, 0, 1, 2], "continuous": [1.0, 4, 2, 6, 3, 5]}[kind]
    observed = np.array(observed, float)
    if kind == "continuous":
        predicted = observed + rng.normal(scale=2.5, size=6)
        area = lambda labels: -np.sum((labels - predicted) ** 2)  # noqa: E731  (R² ranks as the squared error)
    else:
        classes = int(observed.max()) + 1
        predicted = rng.dirichlet(np.ones(classes), 6) + 0.25 * np.eye(classes)[observed.astype(int)]
        predicted /= predicted.sum(1, keepdims=True)
        area = lambda labels: np.mean(  # noqa: E731
            [pairs_won(labels == code, predicted[:, code]) for code in ([1] if kind == "binary" else range(classes))]
        )
    exact = np.mean([area(observed[list(order)]) >= area(observed) - 1e-12 for order in itertools.permutations(range(6))])
    found = permutation_p(kind, observed, predicted[None], strata=None, permutations=20_000, rng=rng)
    assert found == pytest.approx(exact, abs=0.012)


def test_permutation_within_strata_sees_through_a_site_effect():
    rng = np.random.default_rng(0)
    site = np.repeat(["a", "b"], 60)
    labels = np.r_[rng.uniform(size=60) < 0.2, rng.uniform(size=60) < 0.8].astype(float)
    p = np.r_[np.full(60, 0.3), np.full(60, 0.7)] + rng.normal(scale=0.01, size=120)  # knows the site, nothing else
    predicted = np.column_stack([1 - p, p])[None]
    arguments = {"permutations": 999, "rng": np.random.default_rng(1)}
    assert permutation_p("binary", labels, predicted, strata=None, **arguments) == 0.001
    assert permutation_p("binary", labels, predicted, strata=site, **arguments) > 0.05
    assert permutation_p("binary", labels, predicted, strata=labels, **arguments) is None


def test_pairs_of_people_that_predict_one_another_count_twice():
    """Out-of-fold predictions are K y with a symmetrical K: against fixed predictions chance is √2 too narrow, and p too small."""
    rng = np.random.default_rng(6)
    fold = np.arange(40) % 5
    plain, shared = [], []
    for _ in range(600):
        features = rng.normal(size=(40, 200))
        influence = features @ features.T * (fold[:, None] != fold)
        labels = rng.normal(size=40)
        predicted = (influence @ labels)[None]
        for found, wide in ((plain, False), (shared, True)):
            found.append(permutation_p("continuous", labels, predicted, strata=None, permutations=199, rng=rng, shared=wide))
    expected = stats.norm.sf(stats.norm.isf(0.05) / np.sqrt(2))  # 12 %
    assert np.mean(np.array(plain) <= 0.05) == pytest.approx(expected, abs=0.03)
    assert np.mean(np.array(shared) <= 0.05) == pytest.approx(0.05, abs=0.02)


def test_permutation_p_is_uniform_for_forecasts_that_know_nothing():
    rng = np.random.default_rng(2)
    found = []
    for _ in range(300):
        labels = rng.integers(0, 2, 40).astype(float)
        p = rng.uniform(size=40)
        found.append(permutation_p("binary", labels, np.column_stack([1 - p, p])[None], strata=None, permutations=199, rng=rng))
    # one-sided p on the grid k/200: never below 1/200, and uniform
    assert min(found) >= 1 / 200
    assert stats.kstest(np.array(found) - rng.uniform(0, 1 / 200, 300), "uniform").pvalue > 0.01


def test_detectable_effects_agree_with_simulated_power():
    rng = np.random.default_rng(4)
    error = 0.07
    estimate = detectable_difference(error) + rng.normal(scale=error, size=40_000)
    assert np.mean(np.abs(estimate) > stats.norm.ppf(0.975) * error) == pytest.approx(0.8, abs=0.01)
    positives, negatives = 30, 50
    area = detectable_auroc(positives, negatives)
    shift = np.sqrt(2) * stats.norm.ppf(area)  # two normals whose ROC curve has this area
    labels = np.r_[np.ones(positives), np.zeros(negatives)]
    found = []
    for _ in range(600):
        scores = rng.normal(size=80) + shift * labels
        found.append(stats.mannwhitneyu(scores[labels == 1], scores[labels == 0], alternative="greater").pvalue < 0.05)
    assert np.mean(found) == pytest.approx(0.8, abs=0.06)
