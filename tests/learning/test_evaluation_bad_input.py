"""Bad input of an evaluation as one table: a named error with a way out, or the handling that is stated."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from brainfm_cli.errors import InputDatasetError, InputNotFoundError, InternalError
from brainfm_cli.learning.evaluation import Context, EvaluationSettings, evaluate
from brainfm_cli.learning.floors import CovariateFloor, FloorSettings, LinearFloor, majority, make_floors, typed
from brainfm_cli.learning.forecasts import Forecast
from brainfm_cli.learning.kernels import Kernel, connectivity_kernel
from brainfm_cli.learning.regions import RegionFloor
from brainfm_cli.learning.scores import best_threshold, score
from brainfm_cli.learning.splits import DesignSettings, fixed_split, inner_folds, make_split
from brainfm_cli.learning.targets import TargetSettings, participant_table, read_target, target_of_table
from brainfm_cli.learning.uncertainty import delong, permutation_p
from tests.learning.cohorts import binary_target, continuous_target, names_of, pack_cohort, plain_table, series_of

PEOPLE = 40
QUICK = EvaluationSettings(bootstraps=100, permutations=99, inner_folds=2)
ALTERNATING = [0, 1] * (PEOPLE // 2)


def linear(features, penalty=1.0):
    return LinearFloor(kernel=Kernel(participants=tuple(names_of(len(features))), matrix=features @ features.T), penalties=(penalty,))


def features(seed=0):
    return np.random.default_rng(seed).normal(size=(PEOPLE, 12))


def run(predictor=majority, target=None, split=None, table=None, settings=QUICK):
    table = plain_table(PEOPLE) if table is None else table
    target = target or binary_target(ALTERNATING)
    split = split or make_split(target, table, DesignSettings(folds=4))
    return evaluate(target, split, {"One": predictor}, Context(table=table), settings).metrics


def packed(tmp_path, spoil):
    rng = np.random.default_rng(0)
    table = plain_table(PEOPLE, group=["no", "yes"] * (PEOPLE // 2))
    series = {name: [series_of(1.0, rng)] for name in table.index}
    spoil(series)
    return pack_cohort(tmp_path / "cohort", table, series)


def one_class_everywhere(_):
    target_of_table(pd.DataFrame({"group": ["a"] * 9}), "group", TargetSettings())


def one_class_in_a_training_fold(_):
    sites = np.where(np.array(ALTERNATING) == 1, "A", "B")
    make_split(binary_target(ALTERNATING), plain_table(PEOPLE, site=sites), DesignSettings(kind="leave-one-site-out"))


def one_class_in_a_fixed_training_set(_):
    names = np.array(names_of(PEOPLE))
    fixed_split(binary_target(ALTERNATING), train=names[::2], test=names[1::2], why="by hand")


def one_class_in_an_inner_fold(_):
    target = binary_target([0] * 30 + [1] * 10)
    inner_folds(target, groups=dict.fromkeys(target.participants[30:], "family"), folds=3, seed=0)


def fewer_people_of_a_class_than_folds(_):
    make_split(binary_target([0] * 37 + [1] * 3), plain_table(PEOPLE), DesignSettings(folds=5))


def a_group_larger_than_a_fold(_):
    table = plain_table(PEOPLE, family=["one"] * 12 + [f"f{row}" for row in range(28)])
    make_split(binary_target(ALTERNATING), table, DesignSettings(folds=5, group="family"))


def nobody_has_a_label(_):
    target_of_table(pd.DataFrame({"group": [None, "", np.nan]}), "group", TargetSettings())


def a_constant_number(_):
    target_of_table(pd.DataFrame({"age": [7.5] * 9}), "age", TargetSettings())


def an_infinite_number(_):
    target_of_table(pd.DataFrame({"age": [7.5, np.inf, 3.0]}), "age", TargetSettings())


def everybody_has_the_same_connectivity(_):
    run(linear(np.ones((PEOPLE, 5))))


def no_usable_region_in_a_person(tmp_path):
    cohort = packed(tmp_path, lambda series: series["p003"][0].fill(np.nan))
    connectivity_kernel(cohort, names_of(PEOPLE), "Toy", "fisherz")


def forecasts_that_are_nan(_):
    run(lambda fold, test: Forecast(test=np.full((len(test), 2), np.nan)))


def people_scanned_at_several_sites(_):
    table = plain_table(PEOPLE, site=["A"] * 20 + ["B"] * 19 + ["A+B"])
    make_split(binary_target(ALTERNATING), table, DesignSettings(kind="leave-one-site-out"))


@pytest.mark.parametrize(
    ("bad", "error", "match"),
    [
        (one_class_everywhere, InputDatasetError, "one class cannot be predicted"),
        (one_class_in_a_training_fold, InputDatasetError, "class '.*' of 'group' has 0 people in training"),
        (one_class_in_a_fixed_training_set, InputDatasetError, "class 'yes' of 'group' has 0 people in training"),
        (one_class_in_an_inner_fold, InputDatasetError, "in one group only: no inner fold can learn it"),
        (fewer_people_of_a_class_than_folds, InputDatasetError, "class 'yes' of 'group' has 3 people or groups, fewer than 5 folds"),
        (a_group_larger_than_a_fold, InputDatasetError, r"largest group of 'family' has 12 people, more than a fold \(8.0\)"),
        (nobody_has_a_label, InputNotFoundError, "nobody with series has a value of 'group'"),
        (a_constant_number, InputDatasetError, "a constant cannot be predicted"),
        (an_infinite_number, InputDatasetError, "holds infinite values"),
        (everybody_has_the_same_connectivity, InputDatasetError, "everybody in the training set has the same connectivity"),
        (no_usable_region_in_a_person, InputDatasetError, "p003 has no usable region"),
        (forecasts_that_are_nan, InternalError, "predictor 'One' gave 20 predictions that are not finite"),
        (people_scanned_at_several_sites, InputDatasetError, "1 people were scanned at several sites"),
    ],
)
def test_what_cannot_be_evaluated_is_a_named_error(tmp_path, bad, error, match):
    with pytest.raises(error, match=match) as caught:
        bad(tmp_path)
    assert caught.value.fix


def test_a_test_fold_of_one_class_is_pooled_with_the_others():
    """Scores are of the pooled predictions, so that a fold, or a site, of one class needs no score of its own."""
    sites = np.repeat(["A", "B", "C"], [18, 18, 4])
    labels = [0, 1] * 18 + [1] * 4
    table = plain_table(PEOPLE, site=sites)
    target = binary_target(labels)
    metrics = run(linear(features()), target, make_split(target, table, DesignSettings(kind="leave-one-site-out")), table)
    assert metrics.of("One").scores["auroc"].value is not None
    (site,) = (item for item in metrics.groups if item.column == "site" and item.level == "C")
    assert site.scores["auroc"].value is None
    assert site.scores["auroc"].reason == "one class only among these people"
    assert any(item.check == "Sites and labels" and item.verdict == "warning" and "C" in item.text for item in metrics.audit)


def test_missing_labels_are_left_out_and_counted(tmp_path):
    cohort = packed(tmp_path, lambda series: None)
    cohort.participants.loc[["p004", "p010", "p011"], "group"] = None
    target = read_target(cohort, "group")
    metrics = run(majority, target, table=participant_table(cohort))
    assert metrics.people == PEOPLE - 3
    assert metrics.dropped == {"without a label": 3}


def test_a_constant_feature_changes_nothing():
    values, target = features(), binary_target(ALTERNATING)
    constant = np.column_stack([values, np.full(PEOPLE, 7.0)])
    for make in (
        linear,
        lambda rows: RegionFloor(participants=tuple(names_of(PEOPLE)), features=rows, components=None, penalties=(1.0,)),
        lambda rows: CovariateFloor(table=pd.DataFrame(rows, index=names_of(PEOPLE)).add_prefix("c"), penalties=(1.0,)),
    ):
        plain, more = run(make(values), target).of("One"), run(make(constant), target).of("One")
        assert more.scores["brier"].value == pytest.approx(plain.scores["brier"].value, rel=1e-6)


def test_nan_in_one_region_costs_that_region_only(tmp_path):
    """NaN frames of one person's region: the person's other edges stay, the floors are computed, nothing is NaN."""

    def spoil(series):
        series["p003"][0][5, 4] = np.nan

    cohort = packed(tmp_path, spoil)
    target, table = read_target(cohort, "group"), participant_table(cohort)
    floors = make_floors(cohort, target, table, FloorSettings(kinds=("fisherz", "tangent", "spread"), penalties=(1.0,)))
    result = evaluate(target, make_split(target, table, DesignSettings(folds=4)), floors.predictors, Context(table=table), QUICK)
    assert set(result.pooled) >= {"Linear, Fisher-z", "Linear, tangent"}
    assert all(np.isfinite(pooled.predicted).all() for pooled in result.pooled.values())


def test_missing_covariates_are_imputed_in_the_fold_and_marked():
    table = plain_table(PEOPLE, age=np.linspace(8, 40, PEOPLE))
    table.loc[["p001", "p002"], "age"] = np.nan
    informative = binary_target([1 if name in {"p001", "p002", *names_of(PEOPLE)[20:]} else 0 for name in names_of(PEOPLE)])
    metrics = run(CovariateFloor(table=table[["age"]], penalties=(100.0,)), informative, table=table)
    assert metrics.of("One").scores["auroc"].value > 0.9


def test_ties_are_worth_one_half_and_never_significant():
    labels = np.array(ALTERNATING, dtype=float)
    tied = np.full((PEOPLE, 2), 0.5)
    found = score("binary", labels, tied)
    assert found["auroc"].value == 0.5
    assert found["mcc"].value is None
    assert permutation_p("binary", labels, tied[None], strata=None, permutations=99, rng=np.random.default_rng(0)) == 1.0
    assert permutation_p("binary", labels, tied[None], strata=None, permutations=99, rng=np.random.default_rng(0), shared=True) == 1.0
    assert delong(labels.astype(int), np.stack([tied[:, 1], tied[:, 1]])).difference(0, 1) == (0.0, 0.0, 1.0)
    half = np.where(np.arange(PEOPLE) < 20, 0.25, 0.75)
    assert 0.25 < best_threshold((half > 0.5).astype(int), half) < 0.75
    same = continuous_target(np.repeat([10.0, 20.0], PEOPLE // 2))
    assert np.isfinite(run(linear(features()), same).of("One").scores["r2"].value)


def test_a_site_seen_once_is_tested_predicted_and_told():
    """Left out it is a test set of one; in training folds it has a column of its own, which new sites lack."""
    table = plain_table(PEOPLE, site=["A"] * 20 + ["B"] * 19 + ["C"])
    target = binary_target(ALTERNATING)
    split = make_split(target, table, DesignSettings(kind="leave-one-site-out"))
    assert [len(fold.test) for fold in split.folds()] == [20, 19, 1]
    floor = CovariateFloor(table=typed(table[["site"]]), penalties=(1.0,))
    for chosen in (split, make_split(target, table, DesignSettings(folds=4))):
        metrics = run(floor, target, chosen, table)
        assert metrics.people == PEOPLE
        (site,) = (item for item in metrics.groups if item.column == "site" and item.level == "C")
        assert site.people == 1
        assert site.scores["auroc"].reason == "one class only among these people"
    audited = next(item for item in metrics.audit if item.check == "Sites and labels")
    assert audited.verdict == "warning"
    assert "One class only at: C" in audited.text
    # Within strata nobody of C can change places: where only that label varies there is no p, and the program says why.
    alone, p = np.r_[np.zeros(39), 1.0], np.random.default_rng(0).dirichlet([1, 1], PEOPLE)
    assert permutation_p("binary", alone, p[None], strata=table["site"].to_numpy(), permutations=99, rng=np.random.default_rng(0)) is None
