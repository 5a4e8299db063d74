"""Planted leaks, each refused or reported by name: splits edited by hand, twins, copies, pretraining, sites, peeking."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.audit import audit_people, audit_site, audit_site_in_connectivity, audit_size
from brainfm_cli.learning.evaluation import Context, EvaluationSettings, evaluate
from brainfm_cli.learning.floors import LinearFloor, majority
from brainfm_cli.learning.forecasts import Forecast
from brainfm_cli.learning.kernels import Kernel
from brainfm_cli.learning.splits import (
    DesignSettings,
    fixed_split,
    make_split,
    participant_hash,
    read_split,
    refuse_pretrained,
    write_split,
)
from tests.learning.cohorts import binary_target, continuous_target, multiclass_target, names_of, plain_table

QUICK = EvaluationSettings(bootstraps=100, permutations=99, inner_folds=2)


def rows(split, person, fold):
    return (split["participant_id"] == person) & (split["fold"] == fold)


def person_on_both_sides(table):
    return pd.concat([table, table[rows(table, "p000", 1)].assign(role="train" if is_test(table) else "test")])


def is_test(table):
    return table.loc[rows(table, "p000", 1), "role"].iloc[0] == "test"


def person_tested_twice(table):
    table = table.copy()
    fold = 2 if is_test(table) else 1
    table.loc[rows(table, "p000", fold) | (table["group"].eq(table.loc[rows(table, "p000", fold), "group"].iloc[0]) & table["fold"].eq(fold)), "role"] = "test"  # fmt: skip
    return table


def twin_moved(table):
    table = table.copy()
    tests = table[(table["fold"] == 1) & (table["role"] == "test")]
    table.loc[tests.index[0], "role"] = "train"  # its twin stays in the test set
    return table


def windows_as_people(table):
    """A window of p000's scan under another name, the group telling whose it is, on the other side."""
    window = table[rows(table, "p000", 1)].assign(participant_id="p000_window-2", role="train" if is_test(table) else "test")
    return pd.concat([table, window])


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (person_on_both_sides, "p000 is twice in one fold"),
        (person_tested_twice, "tested in two folds of one repetition"),
        (twin_moved, "is in training and test of repeat 1, fold 1"),
        (windows_as_people, "is in training and test of repeat 1, fold 1"),
    ],
)
def test_split_files_that_leak_are_refused(tmp_path, spoil, match):
    target = binary_target([0, 0, 1, 1] * 6)
    family = [f"f{index // 2}" for index in range(24)]
    split = make_split(target, plain_table(24, family=family), DesignSettings(folds=2, group="family"))
    path = write_split(tmp_path / "split.tsv", split)
    assert read_split(path).digest() == split.digest()
    spoil(split.table).to_csv(path, sep="\t", index=False)
    with pytest.raises(InputDatasetError, match=f"the split leaks: .*{match}") as caught:
        read_split(path)
    assert str(path) in str(caught.value)
    assert caught.value.fix


def test_a_person_named_for_both_sides_is_refused():
    names = names_of(10)
    with pytest.raises(InputDatasetError, match=r"1 people are in training and test, e\.g\. p004"):
        fixed_split(binary_target([0, 1] * 5), train=names[:5], test=names[4:], why="by hand")


def features(rng, people=40, size=60):
    return rng.normal(size=(people, size))


def kernel_of(values):
    return Kernel(participants=tuple(names_of(len(values))), matrix=values @ values.T)


def test_one_scan_under_two_names_is_refused_across_and_reported_within(generator):
    values = features(generator)
    values[7] = values[3] * (1 + 1e-9)
    target, table = binary_target([0, 1] * 20), plain_table(40)
    context = Context(table=table, kernels={"Toy": kernel_of(values)})
    names = names_of(40)
    apart = fixed_split(target, train=[name for name in names if name != "p007"][:25], test=[*names[30:], "p007"], why="by hand")
    with pytest.raises(InputDatasetError, match="p003 and p007 have the same scan"):
        evaluate(target, apart, {"Majority": majority}, context, QUICK)
    together = fixed_split(target, train=names[:25], test=names[30:], why="by hand")
    result = evaluate(target, together, {"Majority": majority}, context, QUICK)
    item = next(item for item in result.metrics.audit if item.check == "Same scan under two names")
    assert item.verdict == "warning"
    assert "p003 = p007" in item.text


def test_one_person_scanned_twice_under_two_names_is_reported(generator):
    traits = features(generator, 40, 300)
    values = traits + 0.5 * generator.normal(size=traits.shape)
    values[11] = traits[20] + 0.5 * generator.normal(size=300)  # p011 is p020 on another day
    target, table = binary_target([0, 1] * 20), plain_table(40)
    split = make_split(target, table, DesignSettings())
    item = audit_people(split, {"Toy": kernel_of(values)})
    assert item.verdict == "warning"
    assert "1 pairs" in item.text
    assert "p011 and p020" in item.text
    family = make_split(target, table.assign(family=["same" if row in {11, 20} else f"f{row}" for row in range(40)]), DesignSettings(group="family"))  # fmt: skip
    assert audit_people(family, {"Toy": kernel_of(values)}).verdict == "passed"
    strangers = [audit_people(split, {"Toy": kernel_of(features(np.random.default_rng(seed), 40, 300))}).verdict for seed in range(30)]
    assert strangers == ["passed"] * 30
    assert audit_people(split, {}).verdict == "not checked"


def test_people_of_the_pretraining_are_refused_or_counted():
    target, table = binary_target([0, 1] * 10), plain_table(20)
    split = make_split(target, table, DesignSettings(folds=2))
    seen = {participant_hash("toy", "p004"), participant_hash("elsewhere", "p005"), participant_hash("toy", "p099")}
    with pytest.raises(InputDatasetError, match=r"1 of 20 test people were in the model.s pretraining, e\.g\. p004"):
        refuse_pretrained(split, table, seen, transductive=False)
    with pytest.raises(InputDatasetError, match="pretraining"):
        evaluate(target, split, {"Majority": majority}, Context(table=table, pretrained=seen), QUICK)
    result = evaluate(target, split, {"Majority": majority}, Context(table=table, pretrained=seen, transductive=True), QUICK)
    assert result.metrics.transductive_overlap == 1
    assert "transductive" in result.metrics.statement
    assert any(item.verdict == "warning" and "Transductive: 1 of 20" in item.text for item in result.metrics.audit)
    clean = evaluate(target, split, {"Majority": majority}, Context(table=table, pretrained=set()), QUICK)
    assert any(item.verdict == "passed" and "None of the test people" in item.text for item in clean.metrics.audit)


@pytest.mark.parametrize(
    ("target", "site", "verdict", "text"),
    [
        (binary_target([0, 1] * 20), ["A", "B"] * 20, "warning", "Every site has one class"),
        (binary_target([0, 1] * 20), ["no", "yes"] * 20, "warning", "is the site itself"),
        (binary_target([0, 0, 1, 1] * 10), ["A", "B", "B", "B"] * 10, "warning", "One class only at: A"),
        (binary_target([0, 0, 1, 1] * 10), ["A", "B"] * 20, "passed", "V = 0.00"),
        (binary_target([0, 0, 1, 1] * 10), ["A"] * 40, "not checked", "Fewer than two sites"),
        (multiclass_target([0, 1, 2, 0] * 10), ["A", "B", "B", "A"] * 10, "warning", "One class only at: A"),
        (continuous_target([1.0, 10, 2, 11] * 10), ["A", "B"] * 20, "warning", "99% of the variance"),
        (continuous_target([1.0, 1, 2, 2] * 10), ["A", "B"] * 20, "passed", "0% of the variance"),
    ],
)
def test_sites_that_give_labels_away_are_reported(target, site, verdict, text):
    item = audit_site(target, plain_table(40, site=site))
    assert item.verdict == verdict
    assert text in item.text


def test_sites_that_connectivity_shows_are_reported(generator):
    values = features(generator, 60)
    site = ["A", "B", "C"] * 20
    hidden = audit_site_in_connectivity({"Toy": kernel_of(values)}, plain_table(60, site=site))
    assert hidden.verdict == "passed"
    shown = values + 3 * np.eye(60)[:, :60][[ord(name) - 65 for name in site]]
    item = audit_site_in_connectivity({"Toy": kernel_of(values), "Other": kernel_of(shown)}, plain_table(60, site=site))
    assert item.verdict == "warning"
    assert "(Other)" in item.text
    assert audit_site_in_connectivity({"Toy": kernel_of(values)}, plain_table(60, site=["A"] * 55 + ["B"] * 5)).verdict == "not checked"


def test_few_people_are_reported():
    assert audit_size(binary_target([0] * 30 + [1] * 19)).verdict == "warning"
    assert audit_size(binary_target([0] * 30 + [1] * 20)).verdict == "passed"
    assert audit_size(continuous_target(np.arange(19.0))).verdict == "warning"


def test_labels_of_test_people_never_reach_a_predictor(generator):
    """Every floor gives the same forecasts, bit for bit, when the labels of test people are shuffled."""
    labels = [0, 1] * 20
    target, table = binary_target(labels), plain_table(40, site=["A", "B"] * 20)
    names = names_of(40)
    split = fixed_split(target, train=names[:25], test=names[25:], why="by hand")
    shuffled = target.observed.copy()
    shuffled[25:] = 1 - shuffled[25:]
    floor = LinearFloor(kernel=kernel_of(features(generator)), penalties=(1.0, 100.0))
    forecasts = [
        evaluate(one, split, {"Linear": floor, "Majority": majority}, Context(table=table), QUICK).pooled
        for one in (target, replace(target, observed=shuffled))
    ]
    for name in ("Linear", "Majority"):
        np.testing.assert_array_equal(forecasts[0][name].predicted, forecasts[1][name].predicted)
        np.testing.assert_array_equal(forecasts[0][name].decided, forecasts[1][name].decided)
        assert forecasts[0][name].thresholds == forecasts[1][name].thresholds


def test_a_predictor_is_given_training_people_only():
    target, table = binary_target([0, 1] * 20), plain_table(40)
    seen = []

    def watching(fold, test):
        assert not set(fold.target.participants) & set(test)
        assert len(fold.target.observed) == len(fold.target.participants) == 32
        assert all(rows.max() < 32 for pair in fold.inner for rows in pair)
        seen.append((fold.repeat, fold.fold, fold.seed))
        return Forecast(test=np.full((len(test), 2), 0.5))

    split = make_split(target, table, DesignSettings(repeats=2))
    evaluate(target, split, {"One": watching, "Two": watching}, Context(table=table), QUICK)
    assert len(seen) == 20
    assert seen[0::2] == seen[1::2]  # both predictors have the same folds and seeds
    assert len(set(seen)) == 10


def test_choosing_on_the_test_fold_inflates_and_the_checks_see_it():
    """Proof that the false-alarm check can fail: the best of fifty blind forecasts, chosen by the test labels, is 'significant'."""
    rng = np.random.default_rng(0)
    honest, cheating = [], []
    for _ in range(40):
        target, table = binary_target(list(rng.permutation([0, 1] * 20))), plain_table(40)
        split = make_split(target, table, DesignSettings(folds=2, seed=int(rng.integers(1000))))
        guesses = {f"p{row:03d}": rng.uniform(size=50) for row in range(40)}
        label = dict(zip(target.participants, target.observed, strict=True))

        def blind(fold, test, choose=False, guesses=guesses, label=label):
            table = np.array([guesses[name] for name in test])
            truth = np.array([label[name] for name in test])
            best = int(np.argmax(table[truth == 1].mean(0) - table[truth == 0].mean(0))) if choose else 0
            return Forecast(test=np.column_stack([1 - table[:, best], table[:, best]]))

        predictors = {"Honest": blind, "Cheating": lambda fold, test, blind=blind: blind(fold, test, choose=True)}
        metrics = evaluate(target, split, predictors, Context(table=table), QUICK).metrics
        honest.append(metrics.of("Honest").permutation_p)
        cheating.append(metrics.of("Cheating").permutation_p)
    assert np.mean(np.array(honest) <= 0.05) <= 0.15
    assert np.mean(np.array(cheating) <= 0.05) >= 0.9
