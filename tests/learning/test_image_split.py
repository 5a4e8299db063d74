"""Splits of pictures: by picture and not by trial, all names of one picture together, and what leaks is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from brainfm_cli.bids.stimuli import Stimulus
from brainfm_cli.bids.voxel_cohort import VoxelCohort
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, SettingsError
from brainfm_cli.learning.image_split import ImageSplit, ImageSplitSettings, make_split, picture_groups, refuse_same_pictures
from tests.learning.voxel_cohorts import write_cohort


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> VoxelCohort:
    return write_cohort(tmp_path_factory.mktemp("split"))


def test_repeats_and_people_are_on_one_side(cohort: VoxelCohort) -> None:
    split = make_split(cohort, ImageSplitSettings())
    roles = split.roles(cohort.trials)
    sides = roles.groupby(cohort.trials["stimulus"]).nunique()
    assert (sides == 1).all()
    counts = split.table["role"].value_counts()
    assert counts["test"] == round(0.2 * len(split.table))
    assert counts["validation"] == round(0.1 * (len(split.table) - counts["test"]))
    assert make_split(cohort, ImageSplitSettings()).sha256 == split.sha256
    assert make_split(cohort, ImageSplitSettings(seed=1)).sha256 != split.sha256


def test_who_tests_can_be_said(cohort: VoxelCohort, tmp_path: Path) -> None:
    shared = {name for name, one in cohort.stimuli.items() if one.fields["shared"] == "yes"}
    assert set(make_split(cohort, ImageSplitSettings(shared=True)).names("test")) == shared
    assert set(make_split(cohort, ImageSplitSettings(test_where={"shared": ("yes",)})).names("test")) == shared
    (tmp_path / "list.txt").write_text("\n".join(sorted(shared)[:5]) + "\n")
    assert set(make_split(cohort, ImageSplitSettings(test_list=tmp_path / "list.txt")).names("test")) == set(sorted(shared)[:5])
    with pytest.raises(InputDatasetError, match="no image is left for test"):
        make_split(cohort, ImageSplitSettings(shared=True, min_repeats=3))
    (tmp_path / "list.txt").write_text("nothing\n")
    with pytest.raises(InputDatasetError, match=r"in no trial, e\.g\. 'nothing'"):
        make_split(cohort, ImageSplitSettings(test_list=tmp_path / "list.txt"))
    with pytest.raises(InputNotFoundError):
        make_split(cohort, ImageSplitSettings(test_list=tmp_path / "absent.txt"))
    with pytest.raises(SettingsError, match="no column 'place'"):
        make_split(cohort, ImageSplitSettings(test_where={"place": ("x",)}))
    with pytest.raises(SettingsError, match="no column 'film'"):
        make_split(cohort, ImageSplitSettings(group="film"))


def test_one_picture_under_two_names_stays_together(cohort: VoxelCohort) -> None:
    names = sorted(cohort.stimuli)
    test = make_split(cohort, ImageSplitSettings()).names("test")[0]
    other = next(name for name in make_split(cohort, ImageSplitSettings()).names("train"))
    copied = replace(cohort.stimuli[other], captions=cohort.stimuli[test].captions)
    planted = replace(cohort, stimuli={**cohort.stimuli, other: copied})
    groups = picture_groups([planted.stimuli[name] for name in names], None)
    assert groups[test] == groups[other]
    split = make_split(planted, ImageSplitSettings())
    sides = split.table.set_index("unit")["role"]
    assert sides[test] == sides[other]
    # a split that was made without knowing it is refused
    with pytest.raises(InputDatasetError, match="are the same picture and stand on several sides"):
        refuse_same_pictures(make_split(cohort, ImageSplitSettings()), planted.stimuli)
    refuse_same_pictures(make_split(cohort, ImageSplitSettings()), cohort.stimuli)


def stimulus(name: str, **values: object) -> Stimulus:
    return Stimulus(**({"name": name, "captions": (name,), "source": "captions", "file": "", "fields": {}} | values))  # type: ignore[arg-type]


def test_pictures_are_joined_by_file_captions_and_column() -> None:
    given = [
        stimulus("a", file="x.png"), stimulus("b", file="x.png"), stimulus("c", captions=("b",)), stimulus("d"),
        stimulus("e", fields={"film": "1"}), stimulus("f", fields={"film": "1"}),
    ]  # fmt: skip
    groups = picture_groups(given[:4], None)
    assert groups["a"] == groups["b"] == groups["c"] != groups["d"]
    groups = picture_groups(given[4:], "film")
    assert groups["e"] == groups["f"]
    # sentences from a template are the same for many different pictures
    template = [stimulus(name, captions=("a cat",), source="template") for name in "gh"]
    assert len(set(picture_groups(template, None).values())) == 2


def test_a_planted_leak_is_refused_when_read(cohort: VoxelCohort, tmp_path: Path) -> None:
    split = make_split(cohort, ImageSplitSettings())
    path = split.write(tmp_path / "split.tsv")
    assert ImageSplit.read(path).sha256 == split.sha256
    table = pd.read_csv(path, sep="\t", dtype=str)
    leaked = table.copy()
    leaked.loc[len(leaked)] = leaked[leaked["role"] == "test"].iloc[0].replace("test", "train")
    leaked.to_csv(path, sep="\t", index=False)
    with pytest.raises(InputDatasetError, match=r"the split leaks: '.*' is in it twice"):
        ImageSplit.read(path)
    grouped = table.copy()
    grouped.loc[grouped["role"] == "test", "group"] = grouped.loc[grouped["role"] == "train", "group"].iloc[0]
    grouped.to_csv(path, sep="\t", index=False)
    with pytest.raises(InputDatasetError, match="the split leaks"):
        ImageSplit.read(path)
    path.write_text("a\tb\n1\t2\n")
    with pytest.raises(InputDatasetError, match="no split of pictures"):
        ImageSplit.read(path)


def test_runs_are_held_out_only_where_captions_are_templates(cohort: VoxelCohort, tmp_path: Path) -> None:
    with pytest.raises(InputDatasetError, match="runs cannot be held out"):
        make_split(cohort, ImageSplitSettings(unit="run"))
    templates = write_cohort(tmp_path, template=True)
    split = make_split(templates, ImageSplitSettings(unit="run", test_fraction=0.3))
    roles = split.roles(templates.trials)
    runs = templates.trials["participant"] + templates.trials["run"]
    assert set(roles.groupby(runs).nunique()) == {1}
    assert set(roles) == {"train", "validation", "test"}


def test_trials_that_a_split_does_not_know_are_refused(cohort: VoxelCohort) -> None:
    split = make_split(cohort, ImageSplitSettings())
    with pytest.raises(InputDatasetError, match="image 'new' is in no part of the model's split"):
        split.roles(cohort.trials.assign(stimulus="new"))
