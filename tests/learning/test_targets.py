"""Labels are read as declared, and never guessed."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from brainfm_cli.errors import InputDatasetError, InputNotFoundError, SettingsError
from brainfm_cli.learning.targets import TargetSettings, class_text, participant_table, read_target, target_of_table
from tests.learning.cohorts import names_of, pack_cohort, series_of


def read(values, declared=None, participants=None, **settings):
    table = pd.DataFrame({"dx": values}, index=names_of(len(values)))
    return target_of_table(table, "dx", TargetSettings(**settings), declared=declared, participants=participants)


def test_text_is_categorical_and_says_which_class_it_took():
    target = read(["control", "case"] * 5)
    assert (target.kind, target.classes, target.positive) == ("binary", ("case", "control"), "control")
    assert "no positive class" in target.notes[0]
    assert target.counts() == {"case": 5, "control": 5}
    assert read(["control", "case"] * 5, positive="case").classes == ("control", "case")
    assert read(["control", "case"] * 5, declared={"PositiveClass": "case"}).positive == "case"


@pytest.mark.parametrize(
    ("values", "settings", "declared", "kind", "classes"),
    [
        ([1, 2] * 5, {"positive": 2}, None, "binary", ("1", "2")),
        ([1.0, 2.0] * 5, {"positive": "1"}, None, "binary", ("2", "1")),
        ([0, 1] * 5, {}, {"Levels": {"0": "control", "1": "case"}}, "binary", ("0", "1")),
        ([0, 1] * 5, {}, {"PositiveClass": 0, "Levels": {"0": "a", "1": "b"}}, "binary", ("1", "0")),
        ([1, 2, 3] * 5, {"type": "categorical"}, None, "multiclass", ("1", "2", "3")),
        ([1, 2, 3] * 5, {"classes": [3, 1], "positive": 3}, None, "binary", ("1", "3")),
        ([1, 2, 3] * 5, {"type": "continuous"}, None, "continuous", ()),
        ([1, 2, 3] * 5, {}, {"Units": "years"}, "continuous", ()),
        ([1.5, 2, 3] * 5, {}, None, "continuous", ()),
        (list(range(30)), {}, None, "continuous", ()),
        ([True, False] * 5, {}, None, "binary", ("False", "True")),
    ],
)
def test_coding_is_what_was_declared(values, settings, declared, kind, classes):
    target = read(values, declared=declared, **settings)
    assert (target.kind, target.classes) == (kind, classes)
    if classes:
        assert [target.classes[int(code)] for code in target.observed] == [class_text(value) for value in values if class_text(value) in classes]  # fmt: skip


@pytest.mark.parametrize(
    ("values", "settings", "error", "match"),
    [
        ([1, 2] * 5, {}, InputDatasetError, "may be class codes or measurements"),
        ([1, 2] * 5, {"type": "categorical"}, InputDatasetError, "nobody declares which code is the positive class"),
        ([1, 2, 3] * 5, {"classes": [3, 1]}, InputDatasetError, "coded 3/1 and nobody declares"),
        (["a"] * 5, {}, InputDatasetError, "one class cannot be predicted"),
        ([3.5] * 5, {}, InputDatasetError, "a constant cannot be predicted"),
        (["a", "b"] * 5, {"type": "continuous"}, InputDatasetError, "'a' is no number"),
        ([1.5, np.inf, 3.0], {}, InputDatasetError, "infinite"),
        ([None, np.nan, ""], {}, InputNotFoundError, "nobody with series has a value"),
        (["a", "b"] * 5, {"positive": "c"}, SettingsError, "'c' does not occur"),
        (["a", "b"] * 5, {"classes": ("a", "c")}, SettingsError, "nobody has 'dx' = c"),
        (["a", "b", "c"] * 5, {"positive": "a"}, SettingsError, "has 3 classes"),
        ([f"x{index}" for index in range(10)], {}, InputDatasetError, "10 classes for 10 people"),
    ],
)
def test_what_cannot_be_read_is_a_named_error(values, settings, error, match):
    with pytest.raises(error, match=match) as caught:
        read(values, **settings)
    assert caught.value.fix


def test_missing_labels_and_left_out_classes_are_counted():
    target = read(["a", "b", None, "a", "c", "", "b"], classes=("a", "b"))
    assert target.participants == ("p000", "p001", "p003", "p006")
    assert target.dropped == {"without a label": 2, "of a class that coding.classes leaves out": 1}
    assert target.rows(["p006", "p000"]).tolist() == [3, 0]
    assert target.keep(["p006", "p001"]).participants == ("p001", "p006")
    assert read(["a", "b", "a", "b"], participants=["p001", "p002"]).participants == ("p001", "p002")


def test_ordered_classes_are_in_their_order():
    values = [10, 2, 0, 10, 2, 0, 3, 3] * 2
    assert read(values, ordered=True).classes == ("0", "2", "3", "10")
    assert read(values, ordered=True).ordered
    assert not read(values, type="categorical").ordered
    mild = ["mild", "none", "severe"] * 4
    assert read(mild, ordered=True, classes=("none", "mild", "severe")).classes == ("none", "mild", "severe")
    with pytest.raises(SettingsError, match="to be ordered, but are no numbers"):
        read(mild, ordered=True)
    assert not read(["a", "b"] * 6, ordered=True).ordered  # two classes have no order beyond which is positive


def test_a_missing_column_names_those_that_exist():
    with pytest.raises(InputNotFoundError, match="no column 'age'; it has: dx"):
        target_of_table(pd.DataFrame({"dx": ["a"]}), "age", TargetSettings())


@pytest.mark.parametrize(
    ("value", "text"), [(1.0, "1"), (1.5, "1.5"), (np.nan, ""), (None, ""), (pd.NA, ""), (" a ", "a"), (np.float64(2), "2")]
)
def test_class_text(value, text):
    assert class_text(value) == text


def test_the_participant_table_knows_sites_and_motion(tmp_path):
    rng = np.random.default_rng(0)
    names = names_of(3)
    table = pd.DataFrame({"dx": ["a", "b", "a"], "site": ["", "S", "T"]}, index=names)
    cohort = pack_cohort(tmp_path / "cohort", table, {name: [series_of(1.0, rng)] * 2 for name in names}, descriptions={"dx": {"PositiveClass": "a"}})  # fmt: skip
    index = cohort.index.copy()
    index.loc[(index["participant"] == "p001") & (index["run"] == "run-1"), "site"] = "R"
    index.loc[(index["participant"] == "p002") & (index["run"] == "run-1"), "mean_fd"] = 0.3
    object.__setattr__(cohort, "index", index)
    found = participant_table(cohort)
    assert found["site"].map(class_text).tolist() == ["", "R+S", "T"]
    assert found["mean_fd"].tolist() == pytest.approx([0.1, 0.1, 0.2])
    assert read_target(cohort, "dx").positive == "a"
    (cohort.root / "participants.json").write_text("{")
    with pytest.raises(InputDatasetError, match=r"participants\.json is unreadable"):
        read_target(cohort, "dx")
    (cohort.root / "participants.json").write_text(json.dumps({"dx": {"Levels": {"a": {"Description": "case"}, "b": "control"}}}))
    assert any("a = case" in note and "b = control" in note for note in read_target(cohort, "dx").notes)
