"""The evaluation's own numbers on cohorts whose truth is known, by the functions of benchmarks/calibration.py.

Few cohorts here, so that gross faults are seen; the full numbers are long tests, and in docs/results.md.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from brainfm_cli.learning.uncertainty import holm


@pytest.fixture(scope="module")
def study():
    path = Path(__file__).parents[2] / "benchmarks" / "calibration.py"
    spec = importlib.util.spec_from_file_location("calibration", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["calibration"] = module
    spec.loader.exec_module(module)
    return module


def inside(hits, share, level=0.999):
    low, high = stats.binom.interval(level, len(hits), share)
    return low <= sum(hits) <= high


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_the_true_score_is_that_of_very_many_people(study, kind):
    """The closed form that coverage is measured against, by drawing 40,000 new people."""
    features, target, _ = study.draw(80, 1.0, kind, np.random.default_rng(1))
    more, others, _ = study.draw(40_000, 1.0, kind, np.random.default_rng(2))
    rows, given = study.rescaled(features, more)
    predict = study.fit_model("ridge" if kind == "continuous" else "logistic", rows, target.observed, 1.0, exact=True)
    p = predict(given)
    measured = roc_auc_score(others.observed, p[:, 1]) if kind == "binary" else 1 - np.mean((others.observed - p) ** 2) / others.observed.var()  # fmt: skip
    assert study.truth(features, target, np.arange(80), 1.0) == pytest.approx(measured, abs=0.01)


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_intervals_cover_on_independent_people(study, kind):
    hits = [study.cover(seed, kind=kind, design="independent", people=100, method="bca")["hit"] for seed in range(30)]
    assert inside(hits, 0.95)


@pytest.mark.parametrize(("kind", "sites"), [("binary", 3), ("continuous", 1)])
def test_p_values_are_uniform_where_there_is_nothing(study, kind, sites):
    p = [study.alarm(seed, kind=kind, design="independent", people=60, sites=sites, refits=0)["fixed"] for seed in range(40)]
    assert study.uniform_p(p, 200) > 0.001
    assert inside([one <= 0.05 for one in p], 0.05)


def test_choosing_on_the_test_people_is_found(study):
    """Proof that the check above can fail."""
    honest, cheating = ([study.selected(seed, people=60, choose=choose)["fixed"] for seed in range(40)] for choose in (False, True))
    assert study.uniform_p(honest, 200) > 0.001
    assert inside([one <= 0.05 for one in honest], 0.05)
    assert study.uniform_p(cheating, 200) < 1e-9
    assert np.mean(np.array(cheating) <= 0.05) > 0.8


@pytest.mark.parametrize(("positives", "negatives"), [(20, 20), (15, 85)])
def test_power_is_that_of_the_formula(study, positives, negatives):
    rows = [study.power(seed, positives=positives, negatives=negatives) for seed in range(200)]
    for name in ("single", "bootstrap", "delong"):
        assert np.mean([row[name] for row in rows]) == pytest.approx(0.8, abs=0.11), name
    assert np.mean([row["stated"] for row in rows]) == pytest.approx(rows[0]["true"], rel=0.1)


@pytest.mark.long
def test_false_alarms_of_200_cohorts_in_every_structure(study):
    """Holm-corrected Kolmogorov–Smirnov tests over all structures of independent test people."""
    corrected = []
    for config in study.STUDIES["alarms"][1]:
        p = [study.alarm(seed, **config)["fixed"] for seed in range(200)]
        if config["design"] == "independent":
            corrected.append(study.uniform_p(p, 200))
            assert inside([one <= 0.05 for one in p], 0.05)
        else:
            assert study.too_small_p(p, 200) > 0.001  # wider than exact, never too small
    assert min(holm(corrected)) > 0.05


@pytest.mark.long
@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_refitted_false_alarms_of_200_cohorts(study, kind):
    p = [study.alarm(seed, kind=kind, design="cross-validated", people=48, sites=3, refits=99)["refitted"] for seed in range(200)]
    assert study.uniform_p(p, 100) > 0.025
    assert inside([one <= 0.05 for one in p], 0.05)


def test_a_study_goes_on_where_it_stopped(study, tmp_path):
    out = tmp_path / "rows.jsonl"
    assert len(study.run("selection", 2, 1, out)) == 4
    first = out.read_text()
    assert len(study.run("selection", 3, 1, out)) == 6
    assert out.read_text().startswith(first)
    assert len(out.read_text().splitlines()) == 6


def test_the_linear_rule_of_the_closed_form_is_that_of_sklearn(study):
    features, target, _ = study.draw(60, 1.5, "binary", np.random.default_rng(3))
    rows, _ = study.rescaled(features, features)
    weights = LogisticRegression(C=1.0, tol=1e-10, max_iter=5000).fit(rows, target.observed).coef_[0]
    expected = stats.norm.cdf(1.5 * weights[0] / np.sqrt(2) / np.linalg.norm(weights))
    assert study.truth(features, target, np.arange(60), 1.5) == pytest.approx(expected, abs=1e-4)
