"""The treatment × score interaction: against separate regressions, on planted and null trials, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.trials import InteractionSettings, interaction

QUICK = InteractionSettings(bootstraps=199)


def trial(patients: int, *, prognostic: float, predictive: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(analgesia, score, arm)."""
    rng = np.random.default_rng(seed)
    arm = np.array(["drug", "placebo"] * (patients // 2))
    score = rng.normal(size=patients)
    slope = prognostic + predictive * (arm == "drug")
    return slope * score + 0.3 * (arm == "drug") + rng.normal(size=patients), score, arm


def test_the_estimate_is_the_difference_of_two_regressions() -> None:
    outcome, score, arm = trial(80, prognostic=0.4, predictive=0.8)
    found = interaction(outcome, 3 * score + 7, arm, treated="drug", binary=False, settings=QUICK)
    scaled = (score - score.mean()) / score.std()
    slopes = {name: stats.linregress(scaled[arm == name], outcome[arm == name]).slope for name in ("drug", "placebo")}
    assert found.slopes == pytest.approx(slopes)
    assert found.estimate == pytest.approx(slopes["drug"] - slopes["placebo"])
    assert found.interval[0] < found.estimate < found.interval[1]
    assert found.patients == {"placebo": 40, "drug": 40}


@pytest.mark.parametrize("binary", [True, False])
def test_a_planted_predictive_effect_is_found_and_a_prognostic_one_is_not_taken_for_it(binary: bool) -> None:
    for predictive in (1.5, 0.0):
        outcome, score, arm = trial(240, prognostic=0.8, predictive=predictive, seed=3)
        values = (outcome > np.median(outcome)).astype(float) if binary else outcome
        found = interaction(values, score, arm, treated="drug", binary=binary, settings=QUICK)
        assert found.predictive == (predictive > 0)
        assert found.p_prognostic < 0.01
        assert ("is predictive" in found.verdict) == (predictive > 0)
        assert ("prognostic, not predictive" in found.verdict) == (predictive == 0)


def test_false_alarms_are_nominal_at_the_size_of_a_small_trial() -> None:
    few = InteractionSettings(bootstraps=59)
    p = [
        interaction(*trial(40, prognostic=0.8, predictive=0.0, seed=seed), treated="drug", binary=False, settings=few).p
        for seed in range(100)
    ]
    assert np.mean(np.array(p) <= 0.05) < 0.13
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_covariates_take_their_part() -> None:
    outcome, score, arm = trial(120, prognostic=0.0, predictive=0.0)
    site = np.random.default_rng(5).normal(size=120)
    with_site = interaction(outcome + 5 * site, score, arm, treated="drug", covariates=site[:, None], binary=False, settings=QUICK)
    without = interaction(outcome, score, arm, treated="drug", covariates=site[:, None], binary=False, settings=QUICK)
    assert with_site.estimate == pytest.approx(without.estimate)
    assert "Neither" in without.verdict


def test_what_cannot_be_tested_is_said() -> None:
    outcome, score, arm = trial(40, prognostic=0.5, predictive=0.5)
    with pytest.raises(InputDatasetError, match="needs two arms, 'drug' among them; there are: placebo"):
        interaction(outcome, score, np.full(40, "placebo"), treated="drug", binary=False)
    with pytest.raises(InputDatasetError, match="'duloxetine' among them; there are: drug, placebo"):
        interaction(outcome, score, arm, treated="duloxetine", binary=False)
    with pytest.raises(InputDatasetError, match="constant or not finite"):
        interaction(outcome, np.ones(40), arm, treated="drug", binary=False)
    classes = np.zeros(40)
    classes[:6] = 1
    with pytest.raises(InputDatasetError, match="arm 'drug' has 3 patients of one class, fewer than 5"):
        interaction(classes, score, arm, treated="drug", binary=True)
