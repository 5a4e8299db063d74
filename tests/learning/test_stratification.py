"""Likely and unlikely responders: cuts of the training people alone, sizes of trials against closed forms, nothing found in noise."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats
from statsmodels.stats.power import TTestIndPower

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.evaluation import Context, EvaluationSettings, evaluate
from brainfm_cli.learning.forecasts import Forecast, TrainingFold
from brainfm_cli.learning.splits import DesignSettings, make_split
from brainfm_cli.learning.stratification import StrataSettings, Stratification, place_among, strata_of, stratify
from tests.learning.cohorts import binary_target, names_of, plain_table

QUICK = StrataSettings(bootstraps=300)


def trial(patients: int, *, prognostic: float, predictive: float, benefit: float = 0.5, seed: int = 0) -> tuple[np.ndarray, ...]:
    """(outcome of unit noise, score, arm)."""
    rng = np.random.default_rng(seed)
    arm = np.array(["drug", "placebo"] * (patients // 2))
    score = rng.normal(size=patients)
    treated = arm == "drug"
    return prognostic * score + (benefit + predictive * score) * treated + rng.normal(size=patients), score, arm


def strata(outcome: np.ndarray, score: np.ndarray, arm: np.ndarray, settings: StrataSettings = QUICK) -> Stratification:
    places = stats.norm.cdf(score)
    return stratify(outcome, places, score, arm, predictor="model", treated="drug", settings=settings)


def test_places_are_shares_of_the_training_people() -> None:
    training = np.array([0.1, np.nan, 0.2, 0.2, 0.4])
    np.testing.assert_allclose(place_among(training, np.array([0.0, 0.2, 0.3, 0.9])), [0, 0.5, 0.75, 1])
    assert np.isnan(place_among(np.array([np.nan]), np.array([0.3]))).all()
    assert strata_of(np.array([0.0, 0.33, 0.34, 0.67, 1.0]), (1 / 3, 2 / 3)).tolist() == [0, 0, 1, 2, 2]


def test_sizes_are_those_of_the_power_of_two_means_and_of_adjustment() -> None:
    outcome, score, arm = trial(40_000, prognostic=0.8, predictive=0.0)
    plain, *_, adjusted = strata(outcome, score, arm, StrataSettings(bootstraps=100)).sizes
    spread = np.sqrt(np.mean([outcome[arm == one].var(ddof=1) for one in ("drug", "placebo")]))
    effect = outcome[arm == "drug"].mean() - outcome[arm == "placebo"].mean()
    expected = 2 * TTestIndPower().solve_power(effect / spread, power=0.8, alpha=0.05)
    assert plain.randomise.value == pytest.approx(expected, rel=0.03)  # the normal quantile instead of Student's
    assert plain.screen.value == pytest.approx(plain.randomise.value)
    assert plain.ratio.value == 1
    # (1 - r²) of the variance within arms is left: 1 / (1 + 0.8²)
    assert adjusted.ratio.value == pytest.approx(1 / 1.64, abs=0.02)


def test_a_predictive_score_saves_by_enrichment_and_a_prognostic_one_by_adjustment_only() -> None:
    predictive = strata(*trial(4000, prognostic=0.0, predictive=0.8))
    likely = predictive.sizes[1]
    assert likely.enrolled.value == pytest.approx(1 / 3, abs=0.03)
    upper = stats.norm.expect(lambda x: x, lb=stats.norm.ppf(2 / 3), conditional=True)  # mean score of the likely
    assert likely.benefit.value == pytest.approx(0.5 + 0.8 * upper, abs=0.12)
    assert likely.ratio.high < 0.4
    assert likely.screen.value == pytest.approx(likely.randomise.value / likely.enrolled.value)
    assert likely.screen.value < predictive.sizes[0].screen.value
    assert "likely responders only" in predictive.statement
    prognostic = strata(*trial(4000, prognostic=0.8, predictive=0.0))
    assert prognostic.sizes[1].ratio.low < 1 < prognostic.sizes[1].ratio.high + 0.2
    assert prognostic.sizes[3].ratio.high < 0.7
    assert prognostic.gap.low > 0


def test_noise_saves_nothing_at_the_size_of_a_small_trial() -> None:
    false = 0
    for seed in range(60):
        outcome, _, arm = trial(56, prognostic=0.0, predictive=0.0, benefit=0.8, seed=seed)
        score = np.random.default_rng(1000 + seed).normal(size=56)
        found = strata(outcome, score, arm, StrataSettings(bootstraps=200))
        false += "relative to one without" in found.statement
    assert false <= 9  # three uses are looked at, one-sided 2.5 % each


def test_responses_are_counted_and_a_harmful_drug_needs_no_number() -> None:
    outcome, score, arm = trial(400, prognostic=0.5, predictive=0.0, benefit=-0.5)
    response = (outcome > 0).astype(float)
    found = strata(response, score, arm)
    unlikely, _, likely = found.strata
    chosen = score >= stats.norm.ppf(2 / 3)
    assert likely.patients == {"placebo": int(chosen[arm == "placebo"].sum()), "drug": int(chosen[arm == "drug"].sum())}
    assert likely.outcome.value == pytest.approx(response[chosen].mean())
    assert likely.by_arm["drug"].value == pytest.approx(response[chosen & (arm == "drug")].mean())
    assert found.gap.value == pytest.approx(likely.outcome.value - unlikely.outcome.value)
    plain = found.sizes[0]
    assert plain.randomise.value is None
    assert "no number of patients" in (plain.randomise.reason or "")
    assert plain.ratio.value is None


def test_an_empty_stratum_and_bad_input_are_said() -> None:
    outcome, score, arm = trial(40, prognostic=0.5, predictive=0.0)
    found = stratify(outcome, np.full(40, 0.5), score, arm, predictor="m", treated="drug", settings=QUICK)
    assert found.strata[2].outcome.reason == "nobody"
    assert "fewer than 2" in (found.sizes[1].ratio.reason or "")
    assert "not compared" in found.statement
    with pytest.raises(InputDatasetError, match="needs two arms"):
        stratify(outcome, score, score, np.full(40, "drug"), predictor="m", treated="drug")
    with pytest.raises(InputDatasetError, match="no cut can be fixed"):
        stratify(outcome, np.full(40, np.nan), score, arm, predictor="m", treated="drug")
    with pytest.raises(ValidationError, match="lower one first"):
        StrataSettings(cuts=(0.7, 0.3))


def test_places_come_from_the_training_people_of_each_fold() -> None:
    """Shifting what a predictor says in one fold, of training and test people alike, changes no place."""
    target = binary_target([0, 1] * 20)
    value = dict(zip(names_of(40), np.random.default_rng(0).uniform(0.2, 0.6, 40), strict=True))

    def predictor(shift: float):
        def predict(fold: TrainingFold, test: object) -> Forecast:
            def said(names: object) -> np.ndarray:
                p = np.array([value[name] for name in names]) + shift * fold.fold
                return np.column_stack([1 - p, p])

            return Forecast(test=said(test), train=said(fold.target.participants))

        return predict

    table = plain_table(40)
    split = make_split(target, table, DesignSettings(folds=4))
    settings = EvaluationSettings(bootstraps=100, permutations=99, groups=())
    result = evaluate(target, split, {"plain": predictor(0.0), "shifted": predictor(0.08)}, Context(table=table), settings)
    np.testing.assert_array_equal(result.pooled["plain"].places, result.pooled["shifted"].places)
    (fold, *_) = split.folds()
    training = np.array([value[name] for name in fold.train])
    rows = [result.people.index(name) for name in fold.test]
    expected = [(training < value[name]).mean() for name in fold.test]
    np.testing.assert_allclose(result.pooled["plain"].places[0, rows], expected)
