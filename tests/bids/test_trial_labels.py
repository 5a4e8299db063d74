"""A trial's participants table with the columns and codes of the example: nothing guessed, controls have no response."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from brainfm_cli.bids.codings import LabelColumn, LabelTable
from brainfm_cli.bids.labels import Harmonised, People, harmonise
from brainfm_cli.config import Frozen
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.splits import DesignSettings, make_split
from brainfm_cli.learning.targets import TargetSettings, target_of_table

EXAMPLE = Path(__file__).parents[2] / "examples" / "drug-response" / "labels.yaml"
# (people, group, treatment, response) as in the published study: 20 controls, 17 and 39 patients in two studies
GROUPS = ((20, 0, 99, 0), (8, 1, 0, 1), (9, 1, 0, 0), (10, 2, 0, 1), (10, 2, 0, 0), (8, 2, 1, 1), (11, 2, 1, 0))


class Labels(Frozen):
    """The part of the packing settings that the example holds."""

    labels: LabelTable


def trial_table() -> pd.DataFrame:
    """76 people; controls are coded 0 as if they had not responded, two patients 99."""
    rng = np.random.default_rng(0)
    rows = []
    for count, group, treatment, response in GROUPS:
        for _ in range(count):
            analgesia = rng.uniform(30, 90) if response else rng.uniform(-20, 20)
            known = group > 0
            rows.append((group, treatment, response, f"{analgesia:.1f}" if known else "99", f"{analgesia - 3:.1f}" if known else "99"))
    table = pd.DataFrame(rows, columns=["group", "treatment", "response", "vas_analgesia", "womac_analgesia"]).astype(str)
    table.insert(0, "participant_id", [f"sub-{number:02d}" for number in range(1, len(table) + 1)])
    table.loc[[20, 50], ["response", "vas_analgesia"]] = "99"  # one responder of study 1, one non-responder of study 2
    return table


def declared(**changes: dict[str, object]) -> LabelTable:
    labels = Labels.from_values(yaml.safe_load(EXAMPLE.read_text(encoding="utf-8"))).labels
    for target, change in changes.items():
        coding = labels[target]["ds000208"]
        assert coding is not None
        labels[target] = {"ds000208": LabelColumn.model_validate(coding.model_dump() | change)}
    return labels


def pack(folder: Path, table: pd.DataFrame, labels: LabelTable) -> Harmonised:
    path = folder / "participants.tsv"
    table.to_csv(path, sep="\t", index=False)
    everybody = tuple(table["participant_id"].str.removeprefix("sub-"))
    return harmonise([People(dataset="ds000208", table=path, labels=everybody)], labels)


def test_the_example_reads_the_published_groups(tmp_path: Path) -> None:
    packed = pack(tmp_path, trial_table(), declared())
    frame = packed.frame
    assert frame["response"].value_counts().to_dict() == {"non-responder": 29, "responder": 25}
    assert frame["arm"].value_counts().to_dict() == {"placebo": 37, "duloxetine": 19}
    assert frame["study"].value_counts().to_dict() == {"two": 39, "none": 20, "one": 17}
    assert frame["analgesia"].notna().sum() == 54
    assert frame["analgesia"].max() <= 90  # no 99 is taken for a number
    counts = frame.groupby(["study", "arm", "response"]).size()
    assert counts["two", "duloxetine", "responder"] == 8
    assert counts["two", "duloxetine", "non-responder"] == 11


def test_controls_among_patients_have_no_response(tmp_path: Path) -> None:
    packed = pack(tmp_path, trial_table(), declared())
    assert packed.frame["response"].iloc[:20].isna().all()
    assert any("20 people are none of those that have a 'response'" in note for note in packed.notes)
    # without the declaration they would be twenty more non-responders
    without = pack(tmp_path, trial_table(), declared(response={"where": {}}))
    assert without.frame["response"].value_counts()["non-responder"] == 49


def test_a_code_that_nobody_declared_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputDatasetError, match="does not list: 99"):
        pack(tmp_path, trial_table(), declared(response={"missing": ()}))
    with pytest.raises(InputDatasetError, match="nobody has 'group' = patient") as error:
        pack(tmp_path, trial_table(), declared(response={"where": {"group": ("patient",)}}))
    assert "it holds 0, 1, 2" in str(error.value)
    with pytest.raises(InputDatasetError, match="no column 'patient'"):
        pack(tmp_path, trial_table(), declared(response={"where": {"patient": ("1",)}}))
    with pytest.raises(InputDatasetError, match="'lost' in column 'vas_analgesia' is no number"):
        pack(tmp_path, trial_table().replace({"vas_analgesia": {"99": "lost"}}), declared(analgesia={"where": {}}))


def test_one_arm_only_is_said(tmp_path: Path) -> None:
    table = trial_table()
    one_arm = table[table["treatment"] != "1"]
    frame = pack(tmp_path, one_arm, declared()).frame
    with pytest.raises(InputDatasetError, match="everybody has 'arm' = placebo: one class cannot be predicted"):
        target_of_table(frame, "arm", TargetSettings())
    response = target_of_table(frame, "response", TargetSettings(positive="responder"))
    assert response.counts() == {"non-responder": 18, "responder": 17}


def test_fewer_than_five_per_class_are_said_and_no_five_folds_made_of_them(tmp_path: Path) -> None:
    table = trial_table()
    few = table.drop(table.index[(table["response"] == "1")][4:])
    frame = pack(tmp_path, few, declared()).frame.assign(dataset="ds000208")
    target = target_of_table(frame, "response", TargetSettings(positive="responder"))
    assert target.counts()["responder"] == 4
    assert any("class 'responder' of 'response' has 4 people: too few" in note for note in target.notes)
    with pytest.raises(InputDatasetError, match=r"class 'responder' of 'response' has 4 people or groups, fewer than 5 folds"):
        make_split(target, frame, DesignSettings())
    assert not any(
        "too few" in note for note in target_of_table(pack(tmp_path, table, declared()).frame, "response", TargetSettings()).notes
    )


def test_analgesia_is_continuous_with_its_missing_people_counted(tmp_path: Path) -> None:
    target = target_of_table(pack(tmp_path, trial_table(), declared()).frame, "analgesia", TargetSettings(type="continuous"))
    assert target.kind == "continuous"
    assert target.dropped == {"without a label": 22}
