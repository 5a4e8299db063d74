"""Survival scores against scikit-survival, torchsurv, statsmodels and closed forms; weights against repeated people."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics
from statsmodels.duration.survfunc import SurvfuncRight

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.survival import (
    Outcome,
    kaplan_meier,
    weighted_auroc_at,
    weighted_brier,
    weighted_harrell,
    weighted_integrated_brier,
    weighted_uno,
)

GOLDEN = json.loads((Path(__file__).parent / "golden" / "scores.json").read_text())["survival"]


def outcome_of(values):
    return Outcome(time=np.array(values["time"], float), event=np.array(values["event"], bool))


@pytest.fixture(params=["plain", "ties"])
def case(request):
    values = GOLDEN[request.param]
    return values, outcome_of(values["train"]), outcome_of(values["test"]), np.array(values["test"]["risk"])


def whole(weighted, people):
    return float(weighted(np.ones((1, people)))[0])


def every_score(train, outcome, risk, free, times, until):
    return {
        "harrell": weighted_harrell(outcome, risk),
        "uno": weighted_uno(train, outcome, risk, until=until),
        "auroc_at": weighted_auroc_at(train, outcome, risk, when=times[1]),
        "brier": weighted_brier(train, outcome, free[:, 1], when=times[1]),
        "integrated_brier": weighted_integrated_brier(train, outcome, free, times=times),
    }


def test_scores_are_those_of_scikit_survival_and_torchsurv(case):
    values, train, outcome, risk = case
    free, times, people = np.array(values["free"]), values["times"], len(risk)
    found = every_score(train, outcome, risk, free, times, values["until"])
    for name in ("harrell", "uno", "integrated_brier"):
        assert whole(found[name], people) == pytest.approx(values[name], abs=1e-10), name
    assert whole(found["harrell"], people) == pytest.approx(values["harrell_torchsurv"], abs=1e-6)
    for column, when in enumerate(times):
        assert whole(weighted_auroc_at(train, outcome, risk, when=when), people) == pytest.approx(values["auroc_at"][column], abs=1e-10)
        assert whole(weighted_brier(train, outcome, free[:, column], when=when), people) == pytest.approx(values["brier"][column], abs=1e-10)  # fmt: skip


def test_planted_faults_are_far_from_the_golden_values(case):
    """The tolerances above mean something: censoring ignored, or weighed by the test people, gives other numbers."""
    values, train, outcome, risk = case
    people = len(risk)
    uncensored = Outcome(time=train.time, event=np.ones(len(train.time), bool))
    for fault in (uncensored, outcome):
        assert abs(whole(weighted_uno(fault, outcome, risk, until=values["until"]), people) - values["uno"]) > 1e-5
    assert abs(values["uno"] - values["harrell"]) > 1e-3


def test_kaplan_meier_is_that_of_statsmodels(case):
    _, train, _, _ = case
    for censoring, status in ((False, train.event), (True, ~train.event)):
        curve = kaplan_meier(train, censoring=censoring)
        if censoring and len(np.unique(train.time)) < len(train.time):
            continue  # statsmodels knows no order of events and censoring among ties; scikit-survival's scores above do
        expected = SurvfuncRight(train.time, status.astype(int))
        np.testing.assert_allclose(curve.at(expected.surv_times), expected.surv_prob, atol=1e-12)
    assert curve.at(np.array([0.0]))[0] == 1.0


def test_without_censoring_they_are_the_ordinary_scores(generator):
    time = generator.permutation(np.arange(1.0, 61.0))
    risk = -time + generator.normal(scale=20, size=60)
    everybody = Outcome(time=time, event=np.ones(60, bool))
    harrell = whole(weighted_harrell(everybody, risk), 60)
    pairs = [(risk[i] > risk[j]) for i in range(60) for j in range(60) if time[i] < time[j]]
    assert harrell == pytest.approx(np.mean(pairs))
    assert whole(weighted_uno(everybody, everybody, risk, until=1e9), 60) == pytest.approx(harrell)
    assert whole(weighted_auroc_at(everybody, everybody, risk, when=30), 60) == pytest.approx(metrics.roc_auc_score(time <= 30, risk))
    free = generator.uniform(size=60)
    assert whole(weighted_brier(everybody, everybody, free, when=30), 60) == pytest.approx(np.mean((free - (time > 30)) ** 2))


@pytest.mark.parametrize("name", ["harrell", "uno", "auroc_at", "brier", "integrated_brier"])
def test_weights_are_repeated_people(case, generator, name):
    values, train, outcome, risk = case
    free, times, until = np.array(values["free"]), values["times"], values["until"]
    weights = generator.multinomial(len(risk), np.full(len(risk), 1 / len(risk)), size=5)
    found = every_score(train, outcome, risk, free, times, until)[name](weights.astype(float))
    for row, value in zip(weights, found, strict=True):
        index = np.repeat(np.arange(len(risk)), row)
        again = Outcome(time=outcome.time[index], event=outcome.event[index])
        expected = whole(every_score(train, again, risk[index], free[index], times, until)[name], len(index))
        assert value == pytest.approx(expected, abs=1e-12)


def test_uno_does_not_depend_on_censoring_where_harrell_does():
    """Published property (Uno 2011): with heavier censoring Uno's C estimates the same number, Harrell's another."""
    rng = np.random.default_rng(3)
    people = 1500
    risk = rng.normal(size=people)
    # The risk orders early events well and late ones not at all, so that losing late pairs flatters Harrell's C.
    event_at = np.where(risk + 0.3 * rng.normal(size=people) > 0.5, rng.uniform(0, 4, people), rng.uniform(4, 20, people))
    found = {}
    for name, scale in (("light", 200.0), ("heavy", 8.0)):
        censored_at = rng.exponential(scale, people)
        outcome = Outcome(time=np.minimum(event_at, censored_at), event=event_at <= censored_at)
        found[name] = [
            whole(weighted_harrell(outcome, risk), people),
            whole(weighted_uno(outcome, outcome, risk, until=15.0), people),
        ]
    drift = np.abs(np.array(found["heavy"]) - found["light"])
    assert drift[0] > 0.07
    assert drift[1] < 0.03


def test_nobody_to_compare_is_nan_not_a_number():
    nobody = Outcome(time=np.array([1.0, 2.0, 3.0]), event=np.zeros(3, bool))
    risk = np.arange(3.0)
    assert np.isnan(whole(weighted_harrell(nobody, risk), 3))
    assert np.isnan(whole(weighted_auroc_at(nobody, nobody, risk, when=0.5), 3))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Outcome(time=np.array([1.0, -2.0]), event=np.ones(2, bool)), "missing, infinite or negative"),
        (lambda: Outcome(time=np.array([1.0, np.nan]), event=np.ones(2, bool)), "missing, infinite or negative"),
        (lambda: Outcome(time=np.array([1.0, 2.0]), event=np.array([1, 0])), "not true or false"),
        (lambda: Outcome(time=np.array([1.0, 2.0]), event=np.ones(3, bool)), r"\(2,\) follow-up times for \(3,\) events"),
        (lambda: late(until=50.0), "followed beyond"),
        (lambda: late(times=(1.0,)), "two or more ascending times"),
        (lambda: late(times=(2.0, 1.0)), "two or more ascending times"),
    ],
)
def test_what_cannot_be_scored_is_a_named_error(make, match):
    with pytest.raises(InputDatasetError, match=match) as caught:
        make()
    assert caught.value.fix


def late(*, until=None, times=None):
    train = Outcome(time=np.array([1.0, 2.0, 3.0]), event=np.array([True, True, False]))
    test = Outcome(time=np.array([1.0, 40.0, 45.0]), event=np.ones(3, bool))
    if until is not None:
        return weighted_uno(train, test, np.arange(3.0), until=until)
    return weighted_integrated_brier(train, test, np.full((3, len(times)), 0.5), times=times)
