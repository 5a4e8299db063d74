"""Scores against scikit-learn, torchmetrics, statsmodels and hand counts; weights against repeated people."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchmetrics.functional.classification as tm
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn import metrics
from sklearn.linear_model import LogisticRegression

from brainfm_cli.learning import curves
from brainfm_cli.learning.scores import METRICS, best_threshold, calibration_slope, score, statistic

BINARY = ("auroc", "balanced_accuracy", "auprc", "mcc", "f1", "sensitivity", "specificity", "accuracy", "brier", "ece")


def binary(rng, people=80, *, ties=False):
    labels = np.r_[0, 1, rng.integers(0, 2, people - 2)].astype(float)
    p = np.clip(0.5 + 0.25 * (labels - 0.5) + rng.normal(scale=0.2, size=people), 0.01, 0.99)
    p = np.round(p, 1) if ties else p
    return labels, np.column_stack([1 - p, p])


def multiclass(rng, people=90, classes=4):
    labels = np.r_[np.arange(classes), rng.integers(0, classes, people - classes)].astype(float)
    logits = rng.normal(size=(people, classes)) + 1.5 * np.eye(classes)[labels.astype(int)]
    return labels, np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


@pytest.mark.parametrize("ties", [False, True])
def test_binary_scores_agree_with_torchmetrics(generator, ties):
    labels, p = binary(generator, ties=ties)
    decided = (p[:, 1] >= 0.4).astype(np.int64)
    found = {name: value.value for name, value in score("binary", labels, p, decided).items()}
    y, q, d = torch.tensor(labels).long(), torch.tensor(p[:, 1]), torch.tensor(decided)
    expected = {
        "auroc": tm.binary_auroc(q, y),
        "auprc": tm.binary_average_precision(q, y),
        "mcc": tm.binary_matthews_corrcoef(d, y),
        "f1": tm.binary_f1_score(d, y),
        "sensitivity": tm.binary_recall(d, y),
        "specificity": tm.binary_specificity(d, y),
        "accuracy": tm.binary_accuracy(d, y),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=1e-6), name
    assert found["balanced_accuracy"] == pytest.approx((found["sensitivity"] + found["specificity"]) / 2)
    assert found["brier"] == pytest.approx(metrics.brier_score_loss(labels, p[:, 1]))
    if not ties:  # probabilities on bin edges are binned differently
        assert found["ece"] == pytest.approx(float(tm.binary_calibration_error(q, y, n_bins=10)), abs=1e-6)


def test_multiclass_scores_agree_with_torchmetrics(generator):
    labels, p = multiclass(generator)
    found = {name: value.value for name, value in score("multiclass", labels, p).items()}
    y, q = torch.tensor(labels).long(), torch.tensor(p)
    expected = {
        "auroc": tm.multiclass_auroc(q, y, 4),
        "auprc": tm.multiclass_average_precision(q, y, 4),
        "mcc": tm.multiclass_matthews_corrcoef(q, y, 4),
        "f1": tm.multiclass_f1_score(q, y, 4),
        "balanced_accuracy": tm.multiclass_recall(q, y, 4),
        "accuracy": tm.multiclass_accuracy(q, y, 4, average="micro"),
        "ece": tm.multiclass_calibration_error(q, y, 4, n_bins=10),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(float(value), abs=1e-6), name
    assert found["brier"] == pytest.approx(np.mean(np.sum((p - np.eye(4)[labels.astype(int)]) ** 2, axis=1)))


def test_quadratic_kappa_is_that_of_sklearn_and_of_a_count_by_hand(generator):
    labels, p = multiclass(generator)
    found = score("multiclass", labels, p, ordered=True)
    assert found["quadratic_kappa"].value == pytest.approx(metrics.cohen_kappa_score(labels, p.argmax(1), weights="quadratic"), abs=1e-12)
    assert "quadratic_kappa" not in score("multiclass", labels, p)
    table = np.array([[75, 1, 4], [5, 4, 1], [0, 0, 10]])
    first, second = np.repeat(np.indices((3, 3)).reshape(2, -1), table.ravel(), axis=1)
    gaps = (first[:, None] - second[None]) ** 2
    by_hand = 1 - np.mean((first - second) ** 2) / gaps.mean()
    again = score("multiclass", first.astype(float), np.eye(3)[second], ordered=True)["quadratic_kappa"].value
    assert again == pytest.approx(by_hand, abs=1e-12)
    assert again == pytest.approx(metrics.cohen_kappa_score(first, second, weights="quadratic"), abs=1e-12)
    flat = score("multiclass", np.array([0.0, 0, 0]), np.eye(3)[[0, 0, 0]], ordered=True)["quadratic_kappa"]
    assert flat.value is None
    assert "same class" in flat.reason


def test_continuous_scores_agree_with_their_definitions(generator):
    y = generator.normal(10, 3, 50)
    p = y + generator.normal(size=50)
    found = score("continuous", y, p)
    assert found["r2"].value == pytest.approx(1 - np.sum((y - p) ** 2) / np.sum((y - y.mean()) ** 2))
    assert found["mae"].value == pytest.approx(np.abs(y - p).mean())
    assert found["pearson_r"].value == pytest.approx(np.corrcoef(y, p)[0, 1])


def test_calibration_slope_is_the_unpenalised_logistic_regression_of_sklearn(generator):
    logit = generator.normal(0, 2, 400)
    labels = (generator.uniform(size=400) < 1 / (1 + np.exp(-0.6 * logit + 0.3))).astype(np.int64)
    fit = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logit[:, None], labels)
    assert calibration_slope(labels, 1 / (1 + np.exp(-logit))).value == pytest.approx(fit.coef_[0, 0], abs=1e-5)
    # a calibrated forecast has slope 1, one twice too sure 1/2
    sure = (generator.uniform(size=20000) < 1 / (1 + np.exp(-np.resize(logit, 20000)))).astype(np.int64)
    assert calibration_slope(sure, 1 / (1 + np.exp(-np.resize(logit, 20000)))).value == pytest.approx(1, abs=0.05)
    assert calibration_slope(sure, 1 / (1 + np.exp(-2 * np.resize(logit, 20000)))).value == pytest.approx(0.5, abs=0.03)


def resampled(rng, people, rows=6):
    return rng.multinomial(people, np.full(people, 1 / people), size=rows).astype(float)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", BINARY)
def test_weights_are_repeated_people_binary(generator, name, ties):
    labels, p = binary(generator, ties=ties)
    decided = (p[:, 1] >= 0.4).astype(np.int64)
    weights = resampled(generator, len(labels))
    values = statistic(name, "binary", labels, p, decided)(weights)
    for row, value in zip(weights.astype(int), values, strict=True):
        index = np.repeat(np.arange(len(labels)), row)
        assert value == pytest.approx(score("binary", labels[index], p[index], decided[index])[name].value, abs=1e-12)


@pytest.mark.parametrize("name", ["auroc", "balanced_accuracy", "auprc", "mcc", "f1", "accuracy", "brier", "ece", "quadratic_kappa"])
def test_weights_are_repeated_people_multiclass(generator, name):
    labels, p = multiclass(generator)
    weights = resampled(generator, len(labels))
    values = statistic(name, "multiclass", labels, p)(weights)
    for row, value in zip(weights.astype(int), values, strict=True):
        index = np.repeat(np.arange(len(labels)), row)
        assert value == pytest.approx(score("multiclass", labels[index], p[index], ordered=True)[name].value, abs=1e-12)


@pytest.mark.parametrize("name", ["r2", "mae", "pearson_r"])
def test_weights_are_repeated_people_continuous(generator, name):
    y = generator.normal(1e4, 1, 40)  # far from 0: a careless variance loses its digits here
    p = y + generator.normal(size=40)
    weights = resampled(generator, 40)
    values = statistic(name, "continuous", y, p)(weights)
    for row, value in zip(weights.astype(int), values, strict=True):
        index = np.repeat(np.arange(40), row)
        assert value == pytest.approx(score("continuous", y[index], p[index])[name].value, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    labels=hnp.arrays(np.int64, 12, elements=st.integers(0, 1)).filter(lambda y: 0 < y.sum() < 12),
    cells=hnp.arrays(np.int64, 12, elements=st.integers(0, 4)),
    weights=hnp.arrays(np.int64, 12, elements=st.integers(0, 3)),
)
def test_weighted_areas_agree_with_sample_weights_of_sklearn(labels, cells, weights):
    p = np.column_stack([1 - cells / 4, cells / 4])
    kept = weights > 0
    values = {name: statistic(name, "binary", labels.astype(float), p)(weights[None].astype(float))[0] for name in ("auroc", "auprc")}
    if len(set(labels[kept])) < 2:
        assert np.isnan(values["auroc"])
        return
    assert values["auroc"] == pytest.approx(metrics.roc_auc_score(labels[kept], p[kept, 1], sample_weight=weights[kept]))
    assert values["auprc"] == pytest.approx(metrics.average_precision_score(labels[kept], p[kept, 1], sample_weight=weights[kept]))


@pytest.mark.parametrize("label", [0, 1])
def test_one_class_gives_reasons_and_never_a_number_for_ranking_scores(label):
    p = np.column_stack([[0.2, 0.5, 0.9], [0.8, 0.5, 0.1]])
    found = score("binary", np.full(3, label, float), p)
    for name in ("auroc", "auprc", "balanced_accuracy", "mcc", "calibration_slope", "f1" if label == 0 else "specificity"):
        assert found[name].value is None, name
        assert found[name].reason, name
    assert found["accuracy"].value is not None
    assert str(found["auroc"]).startswith("not computed")


def test_undefined_scores_say_why():
    labels, p = np.array([0.0, 1, 2, 2]), np.full((4, 3), 1 / 3)
    assert score("multiclass", labels, p)["mcc"].reason == "everybody was given the same class"
    assert "1 of 3 classes" in score("multiclass", np.array([0.0, 1, 1, 0]), p)["auroc"].reason
    assert score("continuous", np.ones(4), np.arange(4.0))["r2"].value is None
    assert score("continuous", np.arange(4.0), np.ones(4))["pearson_r"].reason == "everybody was predicted the same value"
    assert score("continuous", np.arange(4.0), np.ones(4))["r2"].value is not None
    assert score("continuous", np.ones(1), np.ones(1))["mae"].value is None
    assert {one.reason for one in score("binary", np.empty(0), np.empty((0, 2))).values()} == {"nobody"}
    separated = calibration_slope(np.array([0, 0, 1, 1]), np.array([0.1, 0.2, 0.8, 0.9]))
    assert separated.value is None
    assert "separated" in separated.reason


def test_every_score_has_a_label_and_a_direction(generator):
    for kind, (labels, p) in {"binary": binary(generator), "multiclass": multiclass(generator)}.items():
        assert set(score(kind, labels, p, ordered=kind == "multiclass")) <= set(METRICS)
    assert set(score("continuous", np.arange(3.0), np.arange(3.0))) <= set(METRICS)


@settings(max_examples=60, deadline=None)
@given(
    labels=hnp.arrays(np.int64, 15, elements=st.integers(0, 1)).filter(lambda y: 0 < y.sum() < 15),
    cells=hnp.arrays(np.int64, 15, elements=st.integers(0, 20)),
)
def test_best_threshold_is_the_best_of_all_thresholds(labels, cells):
    p = cells / 20
    cut = best_threshold(labels, p)
    every = [metrics.balanced_accuracy_score(labels, p >= one) for one in np.r_[p, 1.5]]
    assert metrics.balanced_accuracy_score(labels, p >= cut) == pytest.approx(max(every))


def test_best_threshold_leaves_out_people_without_a_forecast():
    p = np.array([0.1, 0.2, np.nan, 0.8, 0.9])
    assert best_threshold(np.array([0, 0, 1, 1, 1]), p) == pytest.approx(0.5)


def test_averaged_curves_have_the_averaged_area(generator):
    labels, _ = binary(generator, 60)
    labels = labels.astype(np.int64)
    for digits in (1, 6):  # with and without ties
        p = np.round(np.clip(0.4 + 0.2 * labels + generator.normal(scale=0.25, size=(5, 60)), 0, 1), digits)
        roc = curves.roc(labels, p)
        assert metrics.auc(roc.x, roc.y) == pytest.approx(np.mean([metrics.roc_auc_score(labels, row) for row in p]), abs=1e-12)
        assert (np.diff(roc.x) >= 0).all()
        line = curves.precision_recall(labels, p)
        assert line.y.mean() == pytest.approx(np.mean([metrics.average_precision_score(labels, row) for row in p]), abs=1e-12)
    single = curves.roc(labels, p[:1])
    false, true, _ = metrics.roc_curve(labels, p[0], drop_intermediate=False)
    every = {(round(x, 9), round(y, 9)) for x, y in zip(false, true, strict=True)}
    assert {(round(x, 9), round(y, 9)) for x, y in zip(single.x, single.y, strict=True)} <= every


def test_reliability_counts_people_and_net_benefit_is_its_formula():
    labels = np.array([0, 0, 1, 1])
    p = np.array([[0.05, 0.15, 0.95, 0.15], [0.05, 0.15, 0.95, 0.95]])
    found = curves.reliability(labels, p)
    assert found.people.tolist() == [1, 1.5, 0, 0, 0, 0, 0, 0, 0, 1.5]
    assert found.observed[1] == pytest.approx(1 / 3)
    assert np.isnan(found.mean[4])
    # at 0.5: first repetition 1 hit, second 2 hits, no false alarm; at 0.1 the first has 1 false alarm of 4 people
    benefit = curves.net_benefit(labels, p, np.array([0.1, 0.5]))
    assert benefit == pytest.approx([0.5 - 0.25 / 9, 0.375])
