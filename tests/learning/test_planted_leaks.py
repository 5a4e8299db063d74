"""Leaks that make scores worthless, each planted five times: refused or reported, every time.

Scalers and selections fitted on everybody are planted too: code leaks, which the probe of test_fold_fitting.py finds.
"""

from __future__ import annotations

import numpy as np
import pytest

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.evaluation import Context, EvaluationSettings, evaluate
from brainfm_cli.learning.floors import majority
from brainfm_cli.learning.kernels import Kernel
from brainfm_cli.learning.splits import DesignSettings, Split, fixed_split, make_split, participant_hash
from tests.learning.cohorts import binary_target, names_of, plain_table
from tests.learning.test_fold_fitting import LEAKS, data, peeks

PEOPLE = 40
QUICK = EvaluationSettings(bootstraps=100, permutations=99, inner_folds=2)


class Planted:
    """A clean evaluation of forty people, and what a leak changes in it."""

    def __init__(self, seed):
        self.rng = np.random.default_rng(seed)
        order = self.rng.permutation(PEOPLE)
        self.target = binary_target(order % 2)
        self.table = plain_table(PEOPLE, site=np.where(order % 4 < 2, "A", "B"))
        self.values = self.rng.normal(size=(PEOPLE, 300))
        self.names = [str(name) for name in self.rng.permutation(names_of(PEOPLE))]
        self.first, self.second = (names_of(PEOPLE).index(name) for name in (self.names[0], self.names[-1]))
        self.pretrained, self.transductive = None, False

    def evaluate(self, split=None):
        split = split or fixed_split(self.target, train=self.names[:25], test=self.names[25:], why="by hand")
        kernel = Kernel(participants=tuple(names_of(PEOPLE)), matrix=self.values @ self.values.T)
        context = Context(table=self.table, kernels={"Toy": kernel}, pretrained=self.pretrained, transductive=self.transductive)
        return evaluate(self.target, split, {"Majority": majority}, context, QUICK)


def copied(case):
    """One scan under two names, one in training and one in test."""
    case.values[case.second] = case.values[case.first]
    case.evaluate()


def scanned_twice(case):
    """One person's two scans under two names."""
    case.values[case.second] = case.values[case.first] + 0.4 * case.rng.normal(size=300)
    return case.evaluate()


def windows_of_one_scan(case):
    """Two overlapping windows of a scan as two people: three quarters of what is measured is the same."""
    own, other = case.rng.normal(size=(2, 300))
    case.values[case.first], case.values[case.second] = (np.sqrt(0.75) * own + 0.5 * noise for noise in (other, case.rng.normal(size=300)))
    return case.evaluate()


def windows_of_a_named_group(case):
    """The same, the group column telling whose windows they are, in a split that somebody edited."""
    table = case.table.assign(scan=[f"s{row}" for row in range(PEOPLE)])
    table.iloc[case.second, table.columns.get_loc("scan")] = f"s{case.first}"
    rows = make_split(case.target, table, DesignSettings(folds=2, group="scan")).table.copy()
    moved = (rows["participant_id"] == names_of(PEOPLE)[case.second]) & (rows["fold"] == 1)
    rows.loc[moved, "role"] = "train" if rows.loc[moved, "role"].iloc[0] == "test" else "test"
    case.evaluate(Split(table=rows))


def site_is_the_label(case):
    case.table["site"] = np.where(case.target.observed == 1, "A", "B")
    return case.evaluate()


def site_is_nearly_the_label(case):
    """One site has patients only."""
    case.table["site"] = np.where(case.target.observed == 1, np.where(case.rng.uniform(size=PEOPLE) < 0.5, "A", "B"), "B")
    return case.evaluate()


def pretrained_on_a_test_person(case):
    case.pretrained = {participant_hash("toy", case.names[-1]), participant_hash("toy", case.names[0])}
    case.evaluate()


def pretrained_and_said_so(case):
    case.pretrained, case.transductive = {participant_hash("toy", case.names[-1])}, True
    return case.evaluate()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    ("plant", "refused", "reported"),
    [
        (copied, "have the same scan and are on both sides", None),
        (scanned_twice, None, ("One person under two names", "look like two scans of one person")),
        (windows_of_one_scan, None, ("One person under two names", "look like two scans of one person")),
        (windows_of_a_named_group, "group scan:.* is in training and test", None),
        (site_is_the_label, None, ("Sites and labels", "Every site has one class")),
        (site_is_nearly_the_label, None, ("Sites and labels", "One class only at: A")),
        (pretrained_on_a_test_person, "1 of 15 test people were in the model's pretraining", None),
        (pretrained_and_said_so, None, ("Pretraining people in the test set", "Transductive: 1 of 15")),
    ],
)
def test_every_planted_leak_is_refused_or_reported(plant, refused, reported, seed):
    if refused:
        with pytest.raises(InputDatasetError, match=refused) as caught:
            plant(Planted(seed))
        assert caught.value.fix
        return
    check, text = reported
    (item,) = (item for item in plant(Planted(seed)).metrics.audit if item.check == check)
    assert item.verdict == "warning"
    assert text in item.text


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", LEAKS)
def test_what_is_fitted_on_everybody_is_found(name, seed):
    assert peeks(LEAKS[name], *data("binary", seed)) == "data"


@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_reported_where_nothing_is_planted(seed):
    case = Planted(seed)
    case.pretrained = {participant_hash("toy", case.names[0])}  # a training person may have been in the pretraining
    verdicts = {item.check: item.verdict for item in case.evaluate().metrics.audit}
    assert verdicts["Same scan under two names"] == verdicts["One person under two names"] == "passed"
    assert verdicts["Sites and labels"] == verdicts["Pretraining people in the test set"] == "passed"
