"""Few-shot draws are nested and seeded; datasets test one another."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from brainfm_cli.errors import InputDatasetError, InputNotFoundError, SettingsError
from brainfm_cli.learning.draws import both_ways, few_shot_splits
from brainfm_cli.learning.forecasts import Forecast, TrainingFold
from brainfm_cli.learning.pooling import run_folds
from brainfm_cli.learning.splits import DesignSettings, make_split
from tests.learning.cohorts import binary_target, continuous_target, names_of, plain_table


def test_fewer_shots_are_among_more_and_tests_stay():
    target = binary_target([0, 0, 1] * 20)
    split = make_split(target, plain_table(60), DesignSettings(folds=3, repeats=2))
    found = few_shot_splits(target, split, shots=(2, 5, 10), draws=4, seed=1)
    assert list(found) == [2, 5, 10]
    label = dict(zip(target.participants, target.observed, strict=True))
    originals = {(fold.repeat, fold.fold): fold for fold in split.folds()}
    for number, one in found.items():
        folds = list(one.folds())
        assert len(folds) == 2 * 3 * 4
        assert one.repeats == 8
        for fold in folds:
            original = originals[(fold.repeat - 1) // 4 + 1, fold.fold]
            assert fold.test == original.test
            assert set(fold.train) <= set(original.train)
            assert sorted(label[name] for name in fold.train) == [0] * number + [1] * number
    for few, many in ((2, 5), (5, 10)):
        for one, other in zip(found[few].folds(), found[many].folds(), strict=True):
            assert set(one.train) < set(other.train)
    draws = {fold.train for fold in found[5].folds() if fold.fold == 1}
    assert len(draws) == 8
    assert few_shot_splits(target, split, shots=(2, 5, 10), draws=4, seed=1)[5].digest() == found[5].digest()
    assert few_shot_splits(target, split, shots=(2, 5, 10), draws=4, seed=2)[5].digest() != found[5].digest()


def test_continuous_targets_draw_people():
    target = continuous_target(np.arange(30.0))
    split = make_split(target, plain_table(30), DesignSettings(folds=3))
    assert all(len(fold.train) == 7 for fold in few_shot_splits(target, split, shots=(7,), draws=1)[7].folds())


def test_shots_that_cannot_be_drawn_are_named_errors():
    target = binary_target([0] * 24 + [1] * 6)
    split = make_split(target, plain_table(30), DesignSettings(folds=3))
    with pytest.raises(InputDatasetError, match="has 4 training people of the smallest class, fewer than 5 shots"):
        few_shot_splits(target, split, shots=(2, 5), draws=1)
    for shots in ((), (0, 4)):
        with pytest.raises(SettingsError, match="make no training set"):
            few_shot_splits(target, split, shots=shots, draws=1)
    numbers = continuous_target(np.arange(30.0))
    with pytest.raises(SettingsError, match="use at least 2 shots"):
        few_shot_splits(numbers, make_split(numbers, plain_table(30), DesignSettings(folds=3)), shots=(1, 4), draws=1)


def test_one_person_of_each_class_trains_every_predictor():
    """Nobody can be held out of two people: they judge themselves, and what is told apart strongly is still told apart."""
    target = binary_target([0, 1] * 30)
    (split,) = few_shot_splits(target, make_split(target, plain_table(60), DesignSettings(folds=3)), shots=(1,), draws=5).values()
    seen = []

    def nearer(fold: TrainingFold, test: Sequence[str]) -> Forecast:
        seen.append((len(fold.target.participants), fold.inner))
        share = np.array([0.9 if target.observed[target.rows([name])[0]] else 0.2 for name in test])
        return Forecast(test=np.stack([1 - share, share], axis=1), train=None)

    forecasts, _ = run_folds(target, split, {"rule": nearer}, inner=5, seed=0)
    assert len(forecasts["rule"]) == 15
    for people, inner in seen:
        assert people == 2
        ((train, validation),) = inner
        assert train.tolist() == validation.tolist() == [0, 1]


def test_each_dataset_is_tested_once_by_the_others():
    table = plain_table(30)
    table["dataset"] = ["one"] * 12 + ["two"] * 18
    target = binary_target([0, 1] * 15)
    found = both_ways(target, table)
    names = names_of(30)
    assert {name: split.tested for name, split in found.items()} == {"one": tuple(names[:12]), "two": tuple(names[12:])}
    for name, split in found.items():
        (fold,) = split.folds()
        assert set(fold.train) == set(names) - set(found[name].tested)
        assert not split.cross_validated
    with pytest.raises(InputDatasetError, match=r"has 1 value"):
        both_ways(target, plain_table(30))
    with pytest.raises(InputNotFoundError, match="no column 'scanner'"):
        both_ways(target, table, column="scanner")
    family = table.assign(family=["f"] + ["" for _ in range(28)] + ["f"])
    with pytest.raises(InputDatasetError, match="the split leaks"):
        both_ways(target, family, group="family")
