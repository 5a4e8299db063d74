"""Stimulus names of public datasets, and the captions that belong to them."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from brainfm_cli.bids.stimuli import StimulusSettings, name_stimuli, read_stimuli
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, SettingsError

HERE = Path("trials.tsv")


@pytest.mark.parametrize(
    ("preset", "column", "value", "name"),
    [
        ("bids", "stim_id", "scene1", "scene1"),
        ("bids", "stim_file", "a/b.png", "a/b.png"),
        ("nsd", "73KID", "1", "0"),  # counts from 1, the stimulus table from 0
        ("nod", "condition", "coco/000000000139.jpg", "139"),
        ("bold5000", "stim_file", "COCO_train2014_000000000139.jpg", "139"),
        ("bold5000", "stim_file", "n01833805_1411.JPEG", "1411"),
        ("things", "file_path", "images/aardvark/aardvark_01b.jpg", "aardvark_01b"),
        ("god", "stimulus_name", "n01443537_22563", "n01443537_22563"),
    ],
)
def test_presets(preset: str, column: str, value: str, name: str) -> None:
    assert name_stimuli(pd.DataFrame({column: [value]}), StimulusSettings(preset=preset), HERE) == [name]


def test_stim_id_goes_before_stim_file_and_a_given_column_before_both() -> None:
    trials = pd.DataFrame({"stim_file": ["f"], "stim_id": ["i"], "mine": ["m"]})
    assert name_stimuli(trials, StimulusSettings(), HERE) == ["i"]
    assert name_stimuli(trials, StimulusSettings(column="mine"), HERE) == ["m"]


def test_trials_without_a_picture() -> None:
    trials = pd.DataFrame({"stim_id": ["a", "catch", "n/a"]})
    with pytest.raises(InputDatasetError, match="row 3 names no picture"):
        name_stimuli(trials, StimulusSettings(skip=("catch",)), HERE)
    assert name_stimuli(trials, StimulusSettings(skip=("catch", "n/a")), HERE) == ["a", "", ""]
    with pytest.raises(InputDatasetError, match="no column names the picture"):
        name_stimuli(pd.DataFrame({"x": ["a"]}), StimulusSettings(), HERE)
    with pytest.raises(InputDatasetError, match="row 1: 'house'"):
        name_stimuli(pd.DataFrame({"73KID": ["house"]}), StimulusSettings(preset="nsd"), HERE)


def test_captions_from_the_stimulus_table(tmp_path: Path) -> None:
    (tmp_path / "stimuli").mkdir()
    table = pd.DataFrame(
        {
            "stim_id": ["a", "b"],
            "filename": ["a.png", "n/a"],
            "shared": ["yes", "no"],
            "caption_1": ["One.", "n/a"],
            "caption_2": ["Two.", "n/a"],
        }
    )
    table.to_csv(tmp_path / "stimuli" / "stimuli.tsv", sep="\t", index=False)
    book = read_stimuli(tmp_path, StimulusSettings())
    found = book.find("a", None, row=1, table=HERE)
    assert (found.captions, found.source, found.file, found.fields["shared"]) == (("One.", "Two."), "captions", "a.png", "yes")
    with pytest.raises(InputDatasetError, match="row 4: stimulus 'b' has no caption"):
        book.find("b", None, row=4, table=HERE)
    with pytest.raises(InputDatasetError, match="row 2: stimulus 'c' is in no stimulus table"):
        book.find("c", None, row=2, table=HERE)


def test_coco_captions_join_by_image_number(tmp_path: Path) -> None:
    coco = {
        "annotations": [
            {"image_id": 139, "caption": " A room\nwith a TV. "},
            {"image_id": 139, "caption": "A TV."},
            {"image_id": 7, "caption": "x"},
        ]
    }
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(coco))
    book = read_stimuli(tmp_path, StimulusSettings(preset="nod", captions=path))
    assert book.find("139", None, row=1, table=HERE).captions == ("A room with a TV.", "A TV.")
    # NSD: 73KID 5 is nsdId 4, which has a COCO number
    (tmp_path / "nsd.csv").write_text("nsdId,cocoId,shared1000\n4,139,True\n5,7,False\n")
    nsd = StimulusSettings(preset="nsd", captions=path, table=tmp_path / "nsd.csv")
    (name,) = name_stimuli(pd.DataFrame({"73KID": ["5"]}), nsd, HERE)
    found = read_stimuli(tmp_path, nsd).find(name, None, row=1, table=HERE)
    assert found.captions[1] == "A TV."
    assert found.fields["shared1000"] == "True"


def test_category_sets_get_marked_templates(tmp_path: Path) -> None:
    book = read_stimuli(tmp_path, StimulusSettings(template="a photo of a {category}"))
    found = book.find("img7", "polar_bear", row=1, table=HERE)
    assert (found.captions, found.source) == (("a photo of a polar bear",), "template")
    with pytest.raises(SettingsError, match="cannot be filled"):
        read_stimuli(tmp_path, StimulusSettings(template="a {thing}"))


@pytest.mark.parametrize("text", ["no json", '{"annotations": [{"image_id": 1}]}', '{"1": [3]}', "[1, 2]"])
def test_caption_files_that_are_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(InputDatasetError, match="unreadable"):
        read_stimuli(tmp_path, StimulusSettings(captions=path))
    with pytest.raises(InputNotFoundError):
        read_stimuli(tmp_path, StimulusSettings(captions=tmp_path / "absent.json"))
