"""Splits by their properties, and the file they are written to."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from brainfm_cli.errors import InputDatasetError, InputNotFoundError, SettingsError
from brainfm_cli.learning.splits import DesignSettings, fixed_split, inner_folds, make_split, read_split, write_split
from tests.learning.cohorts import binary_target, continuous_target, multiclass_target, names_of, plain_table


@st.composite
def families(draw):
    """(labels, family of each person): families of one to three, both classes common."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=16, max_size=30))
    family = np.repeat(np.arange(len(sizes)), sizes)
    seed = draw(st.integers(0, 10_000))
    labels = np.random.default_rng(seed).integers(0, 2, len(sizes))
    labels[:12] = [0, 1] * 6
    return labels[family], [f"f{code}" for code in family], seed


@settings(max_examples=40, deadline=None)
@given(families(), st.integers(2, 5), st.integers(1, 3))
def test_no_family_is_on_both_sides_and_everybody_is_tested_once_per_repeat(drawn, folds, repeats):
    labels, family, seed = drawn
    target = binary_target(labels)
    split = make_split(
        target, plain_table(len(labels), family=family), DesignSettings(folds=folds, repeats=repeats, group="family", seed=seed)
    )
    of = dict(zip(target.participants, family, strict=True))
    tested = []
    for fold in split.folds():
        assert not {of[name] for name in fold.train} & {of[name] for name in fold.test}
        assert sorted(fold.train + fold.test) == sorted(target.participants)
        assert set(labels[target.rows(fold.train)]) == {0, 1}
        tested += [(fold.repeat, name) for name in fold.test]
    assert sorted(tested) == sorted((repeat, name) for repeat in range(1, repeats + 1) for name in target.participants)
    assert split.repeats == repeats
    assert split.cross_validated


@settings(max_examples=30, deadline=None)
@given(st.integers(20, 90), st.integers(2, 6), st.integers(0, 1000))
def test_folds_are_stratified_to_one_person(people, folds, seed):
    labels = np.random.default_rng(seed).integers(0, 2, people)
    labels[: 2 * folds] = [0, 1] * folds
    split = make_split(binary_target(labels), plain_table(people), DesignSettings(folds=folds, seed=seed))
    target = binary_target(labels)
    positives = [int(labels[target.rows(fold.test)].sum()) for fold in split.folds()]
    assert max(positives) - min(positives) <= 1
    sizes = [len(fold.test) for fold in split.folds()]
    assert max(sizes) - min(sizes) <= 2


def test_a_continuous_target_is_stratified_by_its_fifths(generator):
    values = generator.lognormal(0, 1, 100)
    target = continuous_target(values)
    fifth = np.searchsorted(np.quantile(values, [0.2, 0.4, 0.6, 0.8]), values)
    for fold in make_split(target, plain_table(100), DesignSettings()).folds():
        assert np.bincount(fifth[target.rows(fold.test)], minlength=5).tolist() == [4] * 5


def test_repetitions_differ_and_seeds_decide():
    target, table = binary_target([0, 1] * 20), plain_table(40)
    split = make_split(target, table, DesignSettings(repeats=2))
    first, second = ([fold.test for fold in split.folds() if fold.repeat == repeat] for repeat in (1, 2))
    assert first != second
    assert make_split(target, table, DesignSettings(repeats=2)).digest() == split.digest()
    assert make_split(target, table, DesignSettings(repeats=2, seed=9)).digest() != split.digest()


def test_leave_one_site_out_tests_each_site_once_and_keeps_families_together():
    sites = ["A"] * 8 + ["B"] * 8 + ["C"] * 8 + [""]
    family = ["same" if index in {0, 8} else f"f{index}" for index in range(25)]
    target = binary_target([0, 1] * 12 + [0])
    split = make_split(target, plain_table(25, site=sites, family=family), DesignSettings(kind="leave-one-site-out", group="family"))
    names = names_of(25)
    folds = list(split.folds())
    assert [fold.test for fold in folds] == [tuple(names[:8]), tuple(names[8:16]), tuple(names[16:24])]
    assert names[8] not in folds[0].train  # sister of a person tested at A
    assert names[0] not in folds[1].train
    assert all(names[24] not in fold.train + fold.test for fold in folds)


@pytest.mark.parametrize(
    ("sites", "labels", "match"),
    [
        (["A"] * 20, [0, 1] * 10, "1 site"),
        (["A"] * 10 + ["A+B"] * 10, [0, 1] * 10, "scanned at several sites"),
        (["A"] * 10 + ["B"] * 10, [0] * 10 + [1] * 10, "0 people in training"),
    ],
)
def test_sites_that_cannot_be_left_out_are_named_errors(sites, labels, match):
    with pytest.raises(InputDatasetError, match=match):
        make_split(binary_target(labels), plain_table(20, site=sites), DesignSettings(kind="leave-one-site-out"))


def test_a_site_seen_once_is_tested_alone():
    split = make_split(binary_target([0, 1] * 10 + [1]), plain_table(21, site=["A"] * 10 + ["B"] * 10 + ["C"]), DesignSettings(kind="leave-one-site-out"))  # fmt: skip
    assert [len(fold.test) for fold in split.folds()] == [10, 10, 1]


def test_fixed_by_column_is_cross_dataset():
    table = plain_table(20)
    table["dataset"] = ["one"] * 12 + ["two"] * 8
    target = binary_target([0, 1] * 10)
    split = make_split(target, table, DesignSettings(kind="fixed", test_where={"dataset": ("two",)}))
    (fold,) = split.folds()
    assert fold.test == tuple(names_of(20)[12:])
    assert not split.cross_validated
    with pytest.raises(SettingsError, match="needs to know who tests"):
        make_split(target, table, DesignSettings(kind="fixed"))
    with pytest.raises(InputNotFoundError, match="nobody with a label is in the test set"):
        make_split(target, table, DesignSettings(kind="fixed", test_where={"dataset": ("three",)}))
    with pytest.raises(InputNotFoundError, match="no column 'scanner'"):
        make_split(target, table, DesignSettings(kind="fixed", test_where={"scanner": ("x",)}))


def test_people_in_neither_set_are_unused():
    names = names_of(12)
    split = fixed_split(binary_target([0, 1] * 6), train=names[:6], test=names[6:10], why="by hand")
    assert split.table["role"].tolist() == ["train"] * 6 + ["test"] * 4 + ["unused"] * 2
    assert split.tested == tuple(names[6:10])


@pytest.mark.parametrize(
    ("labels", "columns", "design", "match"),
    [
        ([0] * 17 + [1] * 3, {}, {"folds": 5}, "class 'yes' of 'group' has 3 people"),
        ([0, 1] * 2, {}, {"folds": 5}, "cannot fill 5 folds"),
        ([0, 1] * 10, {"family": ["big"] * 9 + [f"f{i}" for i in range(11)]}, {"folds": 5, "group": "family"}, "largest group of 'family' has 9"),
        ([1] * 6 + [0] * 14, {"family": ["f"] * 6 + [f"g{i}" for i in range(14)]}, {"folds": 2, "group": "family"}, "class 'yes' of 'group' has 1 people or groups"),
    ],
)  # fmt: skip
def test_folds_that_cannot_be_made_are_named_errors(labels, columns, design, match):
    with pytest.raises(InputDatasetError, match=match) as caught:
        make_split(binary_target(labels), plain_table(len(labels), **columns), DesignSettings(**design))
    assert caught.value.fix


def test_a_family_called_like_a_person_is_not_that_person():
    table = plain_table(20, family=["p001", *[""] * 19])
    split = make_split(binary_target([0, 1] * 10), table, DesignSettings(group="family"))
    assert split.groups["p000"] == "family:p001"
    assert split.groups["p001"] == "p001"


@settings(max_examples=25, deadline=None)
@given(families(), st.integers(2, 6))
def test_inner_folds_keep_families_and_test_everybody_once(drawn, folds):
    labels, family, seed = drawn
    target = binary_target(labels)
    groups = dict(zip(target.participants, family, strict=True))
    pairs = inner_folds(target, groups=groups, folds=folds, seed=seed)
    assert sorted(np.concatenate([validation for _, validation in pairs])) == list(range(len(labels)))
    for train, validation in pairs:
        assert not {family[row] for row in train} & {family[row] for row in validation}
        assert set(labels[train]) == {0, 1}
        assert len(train) + len(validation) == len(labels)


def test_inner_folds_shrink_for_rare_classes_and_refuse_one_group():
    assert len(inner_folds(binary_target([0] * 20 + [1] * 3), groups={}, folds=5, seed=0)) == 3
    assert len(inner_folds(multiclass_target([0] * 9 + [1] * 9 + [2] * 2), groups={}, folds=5, seed=0)) == 2
    target = binary_target([0] * 20 + [1] * 4)
    groups = dict.fromkeys(target.participants[20:], "one")
    with pytest.raises(InputDatasetError, match="in one group only"):
        inner_folds(target, groups=groups, folds=2, seed=0)


def test_the_split_file_comes_back_as_it_was(tmp_path):
    table = plain_table(30, family=[f"{index // 2}" for index in range(30)])  # families and people look like numbers
    table.index = [f"{index:04d}" for index in range(30)]
    target = binary_target([0, 0, 1, 1, 0, 1] * 5, list(table.index))
    split = make_split(target, table, DesignSettings(repeats=2, folds=3, group="family"))
    again = read_split(write_split(tmp_path / "split.tsv", split))
    pd.testing.assert_frame_equal(again.table, split.table)
    assert again.digest() == split.digest()
    assert list(again.folds()) == list(split.folds())


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("participant_id\trepeat\n01\t1\n", "lacks group"),
        ("", "unreadable"),
        ("participant_id\tgroup\trepeat\tfold\trole\twhy\n01\t01\t1\t1\ttrain\t\n", "nobody in test"),
        ("participant_id\tgroup\trepeat\tfold\trole\twhy\n01\t01\t1\t1\tvalidate\t\n", "no role"),
    ],
)
def test_damaged_split_files_are_named_errors(tmp_path, text, match):
    path = tmp_path / "split.tsv"
    path.write_text(text)
    with pytest.raises(InputDatasetError, match=match) as caught:
        read_split(path)
    assert str(path) in str(caught.value)


def test_an_absent_split_file_is_a_named_error(tmp_path):
    with pytest.raises(InputNotFoundError, match="split file is absent"):
        read_split(tmp_path / "split.tsv")


def test_arms_are_spread_evenly_over_folds_where_the_design_asks_for_it():
    """56 patients as in the published trial: 8 of 19 respond to the drug, 18 of 37 to placebo."""
    labels = np.array([1] * 8 + [0] * 11 + [1] * 18 + [0] * 19)
    arm = np.array(["drug"] * 19 + ["placebo"] * 37)
    target, table = binary_target(labels), plain_table(56, arm=list(arm))

    def responders_of_the_drug(seed: int, **design: object) -> list[int]:
        split = make_split(target, table, DesignSettings(seed=seed, **design))
        return [int(((labels == 1) & (arm == "drug"))[target.rows(fold.test)].sum()) for fold in split.folds()]

    for seed in range(10):
        counts = responders_of_the_drug(seed, strata=("arm",))
        assert (min(counts), max(counts)) == (1, 2)
    assert any(min(responders_of_the_drug(seed)) == 0 for seed in range(10))
    with pytest.raises(InputNotFoundError, match="no column 'treatment'"):
        make_split(target, table, DesignSettings(strata=("treatment",)))
