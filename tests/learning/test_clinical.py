"""Clinical variables and follow-up: fitted on training people alone, codes declared, every fault named."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from brainfm_cli.errors import BrainFMError, InputDatasetError, InputNotFoundError, SettingsError
from brainfm_cli.learning.clinical import ClinicalSettings, fit_clinical
from brainfm_cli.learning.follow_up import FollowUpSettings, horizons_of, read_follow_up, time_grid

TABLE = pd.DataFrame(
    {
        "age": [60.0, 40.0, np.nan, 80.0, 1000.0, np.nan],
        "sex": ["F", "M", "M", "F", "X", None],
        "stage": [1, 2, 2, 1, 3, 1],
        "weight": ["70", "80", "heavy", "60", "65", "75"],
        "same": [1.0] * 6,
        "days": [10, 20, 30, 40, 50, 60],
        "end": ["dead", "alive", "dead", "spread", "dead", "spread"],
        "none": [None] * 6,
    },
    index=[f"{n:02d}" for n in range(6)],
)
TRAIN = ("00", "01", "02", "03")


def test_only_training_people_impute_and_scale() -> None:
    coding = fit_clinical(TABLE, TRAIN, ClinicalSettings(columns=("age", "sex", "same")))
    assert coding.names == ("age", "age missing", "sex=M", "same")
    mean, spread = np.mean([60, 40, 60, 80]), np.std([60, 40, 60, 80])  # the median 60 stands for what is missing
    found = coding.encode(TABLE, ("00", "02", "04", "05"))
    np.testing.assert_allclose(found[:, 0], (np.array([60, 60, 1000, 60]) - mean) / spread, rtol=1e-6)
    assert found[:, 1].tolist() == [0, 1, 0, 1]
    assert found[:, 2].tolist() == [0, 1, 0, 0]
    assert found[:, 3].tolist() == [0, 0, 0, 0]
    said = " ".join(coding.notes(TABLE, ("04", "05")))
    assert "'age' is missing for 1 of 2" in said
    assert "no training person had and that count as none: X" in said
    changed = TABLE.copy()
    changed.loc[["04", "05"], ["age", "sex"]] = [[-5.0, "M"], [3.0, "F"]]
    assert fit_clinical(changed, TRAIN, ClinicalSettings(columns=("age", "sex", "same"))) == coding


def test_codes_become_categories_where_they_are_named() -> None:
    coding = fit_clinical(TABLE, tuple(TABLE.index), ClinicalSettings(columns=("stage",), categorical=("stage",)))
    assert coding.names == ("stage=1", "stage=2", "stage=3")
    assert coding.encode(TABLE, ("04",)).tolist() == [[0, 0, 1]]
    assert fit_clinical(TABLE, TRAIN, ClinicalSettings()).encode(TABLE, TRAIN).shape == (4, 0)


@pytest.mark.parametrize(
    ("settings", "kind", "match"),
    [
        ({"columns": ("height",)}, InputNotFoundError, "no column 'height'"),
        ({"columns": ("weight",)}, InputDatasetError, "holds numbers and 'heavy'"),
        ({"columns": ("none",)}, InputDatasetError, "no training person has a value of 'none'"),
        ({"columns": ("age",), "categorical": ("sex",)}, SettingsError, "names 'sex'"),
    ],
)
def test_faults_of_clinical_columns_are_named(settings: dict, kind: type[BrainFMError], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        fit_clinical(TABLE, TRAIN, ClinicalSettings(**settings), "participants.tsv")
    assert caught.value.fix


def test_a_missing_value_is_refused_where_that_is_asked_for() -> None:
    coding = fit_clinical(TABLE, TRAIN, ClinicalSettings(columns=("age",), missing="refuse"))
    assert coding.encode(TABLE, ("00",)).shape == (1, 2)
    with pytest.raises(InputDatasetError, match="'age' of sub-05 is missing"):
        coding.encode(TABLE, ("00", "05"))
    broken = TABLE.assign(age=["old"] * 6)
    with pytest.raises(InputDatasetError, match="'age' of sub-00 is 'old', which is no number"):
        coding.encode(broken, ("00",))


def follow_up(**changes: object) -> FollowUpSettings:
    values = {"time": "days", "event": "end", "happened": ["dead"], "censored": ["alive"], "competing": ["spread"]}
    return FollowUpSettings.model_validate(values | changes)


def test_follow_up_is_read_as_declared() -> None:
    table = pd.concat([TABLE, TABLE.set_index("1" + TABLE.index)])
    found = read_follow_up(table, follow_up(), participants=table.index[:-1])
    assert found.cause.tolist() == [1, 0, 1, 2, 1, 2, 1, 0, 1, 2, 1]
    outcome = found.outcome(("00", "03"))
    assert outcome.event.tolist() == [True, False]
    assert outcome.freed.tolist() == [False, True]
    assert found.causes == 2
    lacking = table.assign(days=[np.nan, *table["days"].tolist()[1:]])
    assert read_follow_up(lacking, follow_up()).dropped == {"without follow-up": 1}
    assert time_grid(found.time, found.cause, 50)[-1] == 60
    assert horizons_of(follow_up(), found.time, found.cause) == (15.0, 30.0, 45.0)
    assert horizons_of(follow_up(horizons=[365]), found.time, found.cause) == (365.0,)
    numbers = table.assign(end=[1, 0, 1, 0, 1, 0] * 2)
    assert read_follow_up(numbers, follow_up(happened=[1], censored=[0], competing=[])).causes == 1


@pytest.mark.parametrize(
    ("changes", "table", "kind", "match"),
    [
        ({"time": None}, {}, SettingsError, "needs two columns"),
        ({"event": "death"}, {}, InputNotFoundError, "no column 'death'"),
        ({"happened": []}, {}, SettingsError, "never guessed; it has: alive, dead, spread"),
        ({"censored": []}, {}, SettingsError, "never guessed"),
        ({"censored": ["alive", "dead"]}, {}, SettingsError, "'dead' of 'end' is declared twice"),
        ({"competing": []}, {}, InputDatasetError, "'end' of sub-03 is 'spread', which no setting declares"),
        ({}, {"days": [10, -1, 3, 4, 5, 6]}, InputDatasetError, "'days' of sub-01 is '-1', which is negative"),
        ({}, {"days": ["10", "soon", "3", "4", "5", "6"]}, InputDatasetError, "'soon', which is no number"),
        ({}, {"days": [np.nan] * 6}, InputNotFoundError, "nobody has both"),
        ({}, {"end": ["alive"] * 6}, InputDatasetError, "0 people have 'end' = dead"),
        ({}, {}, InputDatasetError, "2 people have 'end' = spread: 3 are needed"),
    ],
)
def test_faults_of_follow_up_are_named(changes: dict, table: dict, kind: type[BrainFMError], match: str) -> None:
    with pytest.raises(kind, match=match) as caught:
        read_follow_up(TABLE.assign(**table), follow_up(**changes), place="participants.tsv")
    assert caught.value.fix
