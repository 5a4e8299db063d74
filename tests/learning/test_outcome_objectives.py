"""Grading and survival losses against statsmodels, scikit-learn and sums by hand; competing ends against their definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from statsmodels.duration.hazard_regression import PHReg
from statsmodels.miscmodels.ordinal_model import OrderedModel

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.outcome_objectives import (
    baseline_hazard,
    cox_loss,
    fit_linear,
    hazard_loss,
    incidence_of_cox,
    incidence_of_hazards,
    likelihood_loss,
)
from brainfm_cli.learning.survival import Outcome, kaplan_meier, weighted_auroc_at, weighted_brier, weighted_harrell, weighted_uno
from brainfm_cli.models.outcome_links import HazardBaseline, OrderedThresholds

RNG = np.random.default_rng(0)


def cohort(people: int = 120, *, ties: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = RNG.normal(size=(people, 3))
    time = RNG.exponential(np.exp(-x @ [0.8, -0.5, 0.0]))
    event = RNG.random(people) < 0.7
    return x, np.ceil(time * 4) if ties else time, event


@pytest.mark.parametrize("ties", [False, True])
def test_the_partial_likelihood_and_its_fit_are_those_of_statsmodels(ties: bool) -> None:
    x, time, event = cohort(ties=ties)
    oracle = PHReg(time, x, status=event.astype(int), ties="efron")
    t, e = torch.tensor(time), torch.tensor(event)
    for beta in ([0.0, 0.0, 0.0], [0.5, -1.0, 2.0]):
        mine = float(cox_loss(torch.tensor(x) @ torch.tensor(beta, dtype=torch.float64), t, e))
        assert mine == pytest.approx(-oracle.loglike(np.array(beta)) / event.sum(), rel=1e-10)
    weights, _ = fit_linear(torch.tensor(x), 1, None, lambda s: cox_loss(s[:, 0], t, e), penalty=0.0, bias=False)
    np.testing.assert_allclose(weights[:, 0].numpy(), oracle.fit().params, atol=1e-5)


def test_efron_is_not_breslow_and_shifts_change_nothing() -> None:
    x, time, event = cohort(ties=True)
    t, e = torch.tensor(time), torch.tensor(event)
    risk = torch.tensor(x[:, 0])
    breslow = -PHReg(time, x[:, :1], status=event.astype(int), ties="breslow").loglike(np.ones(1)) / event.sum()
    assert abs(float(cox_loss(risk, t, e)) - breslow) > 1e-3
    assert float(cox_loss(risk + 500, t, e)) == pytest.approx(float(cox_loss(risk, t, e)), abs=1e-9)
    free = risk.clone().requires_grad_()
    cox_loss(free, t, torch.zeros_like(e)).backward()
    assert free.grad is not None
    assert float(free.grad.abs().max()) == 0.0


def test_breslows_baseline_is_that_of_statsmodels() -> None:
    x, time, event = cohort(ties=False)
    fitted = PHReg(time, x, status=event.astype(int)).fit()
    times, hazard, _ = fitted.baseline_cumulative_hazard[0]
    mine = baseline_hazard(torch.tensor(x @ fitted.params), torch.tensor(time), torch.tensor(event), torch.tensor(times))
    np.testing.assert_allclose(mine.numpy()[:-1], hazard[1:], atol=1e-8)  # statsmodels gives the value just before each time


def test_ordered_grades_are_those_of_statsmodels() -> None:
    x = RNG.normal(size=(300, 2))
    latent = x @ [1.0, -0.7] + RNG.logistic(size=300)
    grade = np.digitize(latent, [-1.0, 0.3, 1.5])
    oracle = OrderedModel(grade, x, distr="logit").fit(method="bfgs", disp=False)
    link = OrderedThresholds(np.bincount(grade).tolist())
    target = torch.tensor(grade)
    weights, _ = fit_linear(torch.tensor(x), 1, link, lambda s: likelihood_loss(link(s), target), penalty=0.0, bias=False)
    np.testing.assert_allclose(weights[:, 0].numpy(), oracle.params[:2], atol=1e-3)
    chances = link(torch.tensor(x) @ weights).exp().detach().numpy()
    np.testing.assert_allclose(chances, oracle.predict(x), atol=1e-4)
    np.testing.assert_allclose(chances.sum(1), 1, atol=1e-12)
    assert (link.thresholds().diff() > 0).all()


def test_extreme_scores_stay_finite() -> None:
    link = OrderedThresholds([1, 1, 1])
    logs = link(torch.tensor([[-80.0], [80.0]]))
    assert torch.isfinite(logs).all()
    assert logs[0].argmax() == 0
    assert logs[1].argmax() == 2


def test_discrete_hazards_by_hand() -> None:
    edges = torch.tensor([1.0, 2.0, 3.0])
    hazards = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.4, 0.1], [0.6, 0.1, 0.3]])
    logs = hazards.log().expand(7, 3, 3)
    time = torch.tensor([0.5, 2.0, 2.0, 2.5, 3.0, 3.0, 9.0])
    cause = torch.tensor([1, 2, 0, 0, 0, 1, 1])
    expected = [0.2, 0.7 * 0.1, 0.7 * 0.5, 0.7 * 0.5, 0.7 * 0.5 * 0.6, 0.7 * 0.5 * 0.1, 0.7 * 0.5 * 0.6]
    assert float(hazard_loss(logs, time, cause, edges)) == pytest.approx(-np.log(expected).mean(), abs=1e-6)
    found = incidence_of_hazards(logs[:1])[0].numpy()
    np.testing.assert_allclose(found[:, 0], np.cumsum([0.2, 0.7 * 0.4, 0.35 * 0.1]), atol=1e-6)
    np.testing.assert_allclose(found[:, 1], np.cumsum([0.1, 0.7 * 0.1, 0.35 * 0.3]), atol=1e-6)


def test_discrete_time_is_a_logistic_regression_of_person_periods() -> None:
    x = RNG.normal(size=(150, 2))
    time, event = np.ceil(RNG.exponential(np.exp(-x @ [0.7, 0.0])) * 2), RNG.random(150) < 0.8
    edges = torch.tensor([1.0, 2.0, 3.0])
    rows, happened = [], []
    for one, t, e in zip(x, time, event, strict=True):
        for place in range(3):
            if t > place + 1 or (t == place + 1):
                rows.append(np.r_[np.eye(3)[place], one])
                happened.append(bool(e and t == place + 1))
                if t == place + 1:
                    break
    oracle = LogisticRegression(C=1e10, fit_intercept=False, tol=1e-10, max_iter=5000).fit(np.array(rows), happened)
    link = HazardBaseline(torch.full((3, 1), 0.3))
    t, c = torch.tensor(time), torch.tensor(event.astype(np.int64))
    weights, _ = fit_linear(torch.tensor(x), 1, link, lambda s: hazard_loss(link(s), t, c, edges), penalty=0.0, bias=False)
    np.testing.assert_allclose(weights[:, 0].numpy(), oracle.coef_[0, 3:], atol=2e-3)
    np.testing.assert_allclose(link.baseline[:, 0].detach().numpy(), oracle.coef_[0, :3], atol=2e-3)


def test_incidences_of_cox_add_up_and_without_competition_are_one_minus_survival() -> None:
    baseline = torch.tensor([[0.1, 0.2], [0.3, 0.2], [0.9, 0.8]], dtype=torch.float64)
    risk = torch.tensor([[0.5, -0.2], [-1.0, 1.0]], dtype=torch.float64)
    both = incidence_of_cox(risk, baseline)
    hazard = (baseline[None] * risk.exp()[:, None]).sum(2)
    torch.testing.assert_close(both.sum(2), 1 - (-hazard).exp())
    alone = incidence_of_cox(risk[:, :1], baseline[:, :1])[:, :, 0]
    torch.testing.assert_close(alone, 1 - (-baseline[:, 0] * risk[:, :1].exp()).exp())
    assert float(both[0, 1, 1]) == pytest.approx(float(both[0, 0, 1]))  # nothing of the second cause happens between the first two times


def test_a_competing_end_is_free_for_good_in_every_score() -> None:
    """Four people, no censoring: the event at 1 and 3, death at 2 and 4."""
    time = np.array([1.0, 2.0, 3.0, 4.0])
    event, dead = np.array([True, False, True, False]), np.array([False, True, False, True])
    outcome = Outcome(time=time, event=event, competing=dead)
    risk = np.array([4.0, 3.0, 2.0, 1.0])
    one = np.ones((1, 4))
    # pairs of the first: three others, all right; of the third: the second (dead before, wrong) and the fourth (right)
    assert weighted_harrell(outcome, risk)(one)[0] == pytest.approx(4 / 5)
    assert weighted_uno(outcome, outcome, risk, until=9.0)(one)[0] == pytest.approx(4 / 5)
    assert weighted_auroc_at(outcome, outcome, risk, when=3.0)(one)[0] == pytest.approx(3 / 4)
    free = np.array([0.1, 0.2, 0.3, 0.4])
    assert weighted_brier(outcome, outcome, free, when=3.0)(one)[0] == pytest.approx((0.1**2 + 0.8**2 + 0.3**2 + 0.6**2) / 4)
    assert kaplan_meier(outcome, censoring=True).share.min() == 1.0  # nobody was censored
    plain = Outcome(time=time, event=event)
    assert weighted_harrell(plain, risk)(one)[0] == pytest.approx(1.0)
    with pytest.raises(InputDatasetError, match="both the event and the competing end"):
        Outcome(time=time, event=event, competing=event)


def test_scores_with_competing_ends_do_not_depend_on_censoring() -> None:
    people = 4000
    x = RNG.normal(size=people)
    first, second = RNG.exponential(np.exp(-x) * 4), RNG.exponential(6.0, people)
    time, event = np.minimum(first, second), first < second
    found = {}
    for name, scale in (("none", 1e9), ("heavy", 5.0)):
        censored = RNG.exponential(scale, people)
        outcome = Outcome(time=np.minimum(time, censored), event=event & (time <= censored), competing=~event & (time <= censored))
        one = np.ones((1, people))
        free = 1 - 1 / (1 + np.exp(-x))
        found[name] = [
            weighted_uno(outcome, outcome, x, until=4.0)(one)[0],
            weighted_auroc_at(outcome, outcome, x, when=3.0)(one)[0],
            weighted_brier(outcome, outcome, free, when=3.0)(one)[0],
        ]
    np.testing.assert_allclose(found["heavy"], found["none"], atol=0.02)
