"""One participant of a raw dataset: what is found, what inherits what, and what is refused by name."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm_cli.bids.raw import check_raw_dataset, outside_dataset, raw_files, read_raw_participant
from brainfm_cli.config import Selection
from brainfm_cli.errors import InputDatasetError, InputNotFoundError
from tests.programs import fakes

EVERYTHING = Selection()


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return fakes.write_raw(tmp_path / "raw")


@pytest.fixture
def bold(raw: Path) -> Path:
    return raw / "sub-01" / "func" / "sub-01_task-rest_run-1_bold.nii.gz"


def test_a_whole_participant(tmp_path: Path) -> None:
    root = fakes.write_raw(tmp_path / "raw", labels=("01", "011"), runs=())
    folder = root / "sub-01" / "ses-a"
    for name in ("T1w", "ce-gadolinium_T1w", "T2w", "FLAIR"):
        fakes.write_image(folder / "anat" / f"sub-01_ses-a_{name}.nii.gz", (4, 4, 4))
    fakes.write_image(folder / "dwi" / "sub-01_ses-a_dwi.nii.gz", (4, 4, 4, 6))
    fakes.write_image(folder / "fmap" / "sub-01_ses-a_dir-AP_epi.nii.gz", (4, 4, 4))
    for echo in (2, 1):
        fakes.write_image(folder / "func" / f"sub-01_ses-a_task-rest_dir-AP_run-02_echo-{echo}_bold.nii.gz", (4, 4, 4, 5))
    fakes.write_image(folder / "func" / "sub-01_ses-a_task-rest_dir-AP_run-02_echo-1_sbref.nii.gz", (4, 4, 4))
    fakes.write_image(folder / "func" / "sub-01_ses-a_task-rest_dir-AP_run-02_echo-1_part-phase_bold.nii.gz", (4, 4, 4, 5))
    # Inheritance: the root says 2 s, the session's file for the task adds slice times and a direction.
    fakes.write_json(folder / "sub-01_ses-a_task-rest_bold.json", {"SliceTiming": [0, 0.5, 1, 1.5], "PhaseEncodingDirection": "j-"})
    (folder / "func" / "sub-01_ses-a_task-rest_events.tsv").write_text("onset\tduration\n")

    found = read_raw_participant(root, "01", EVERYTHING)
    assert [(image.modality, image.session) for image in found.images] == [
        ("T1w", None),
        ("FLAIR", "a"),
        ("T1w", "a"),
        ("T2w", "a"),
        ("contrast T1w", "a"),
        ("dwi", "a"),
    ]
    assert found.sessions == ("a",)
    (run,) = found.bold
    assert run.key.name == "sub-01_ses-a_task-rest_dir-AP_run-02"
    assert [path.name.split("_")[-2] for path in run.echoes] == ["echo-1", "echo-2"]
    assert run.path == run.echoes[0]
    assert run.sbref is not None
    assert run.sbref.name.endswith("echo-1_sbref.nii.gz")
    assert (run.repetition_time_s, run.slice_timing_s, run.phase_encoding) == (2.0, (0, 0.5, 1, 1.5), "j-")
    assert [path.name for path in found.fieldmaps] == ["sub-01_ses-a_dir-AP_epi.nii.gz"]
    names = {path.name for path in found.inputs}
    assert {"task-rest_bold.json", "sub-01_ses-a_task-rest_bold.json", "sub-01_ses-a_dir-AP_epi.nii.gz"} <= names
    assert not [name for name in names if "events" in name or "sub-011" in name or "description" in name]

    structural = read_raw_participant(root, "01", EVERYTHING, anat_only=True)
    assert (structural.bold, structural.fieldmaps) == ((), ())
    assert len(structural.images) == 6


def test_selection_and_filters(raw: Path, tmp_path: Path) -> None:
    fakes.write_image(raw / "sub-01" / "func" / "sub-01_task-face_bold.nii.gz", (4, 4, 4, 5))
    fakes.write_json(raw / "sub-01" / "func" / "sub-01_task-face_bold.json", {"RepetitionTime": 2.0})
    assert [run.key.task for run in read_raw_participant(raw, "01", Selection(task_id=("face",))).bold] == ["face"]
    filters = tmp_path / "filters.json"
    filters.write_text(json.dumps({"bold": {"run": "2", "datatype": "func"}, "t1w": {"acquisition": None}}))
    assert [run.key.run for run in read_raw_participant(raw, "01", Selection(bids_filter_file=filters)).bold] == ["2"]
    with pytest.raises(InputNotFoundError, match="no images that match"):
        filters.write_text(json.dumps({"bold": {"run": "9"}, "t1w": {"acquisition": "x"}}))
        read_raw_participant(raw, "01", Selection(bids_filter_file=filters))


def test_a_plan_needs_no_content(raw: Path, bold: Path) -> None:
    bold.write_bytes(b"")
    assert bold in raw_files(raw, "01", EVERYTHING)


def edit(bold: Path, **values: object) -> None:
    fakes.write_json(bold.with_name(bold.name.replace(".nii.gz", ".json")), values)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"RepetitionTime": "2"}, "RepetitionTime is '2'"),
        ({"RepetitionTime": 2000}, "must be in seconds"),
        ({"RepetitionTime": True}, "RepetitionTime is True"),
        ({"RepetitionTime": 1.5}, "1.5 s in the metadata and 2 s in the header"),
        ({"SliceTiming": [0, 1]}, "SliceTiming has 2 values for 4 slices"),
        ({"SliceTiming": [0, 1, "x", 2]}, "SliceTiming has 4 values"),
        ({"SliceTiming": [0, 500, 1000, 1500]}, "from 0 to 1500 within a repetition time of 2 s"),
        ({"SliceTiming": [-0.1, 0.5, 1, 1.5]}, "from -0.1"),
    ],
)
def test_metadata_that_cannot_be_right(values: dict, says: str, raw: Path, bold: Path) -> None:
    edit(bold, **values)
    with pytest.raises(InputDatasetError, match=says.replace("(", r"\(")) as caught:
        read_raw_participant(raw, "01", EVERYTHING)
    assert caught.value.exit_code == 65
    assert Path(caught.value.where) == bold


def test_metadata_that_is_right_though_odd(raw: Path, bold: Path) -> None:
    fakes.write_image(bold, (4, 5, 6, 7))
    edit(bold, SliceEncodingDirection="j-", SliceTiming=[0, 0.4, 0.8, 1.2, 1.6], RepetitionTime=2.0004)  # rounding in a header
    assert read_raw_participant(raw, "01", EVERYTHING).bold[0].repetition_time_s == 2.0004


@pytest.mark.parametrize(("unit", "zoom", "fits"), [("sec", 2.0, True), ("msec", 2000.0, True), ("sec", 2000.0, True), ("sec", 0.0, True), ("msec", 1500.0, False)])  # fmt: skip
def test_units_of_the_header(unit: str, zoom: float, fits: bool, raw: Path, bold: Path) -> None:
    image = nib.Nifti1Image(np.zeros((4, 4, 4, 5), np.int16), np.eye(4))
    image.header.set_zooms((3, 3, 3, zoom))
    image.header.set_xyzt_units("mm", unit)
    nib.save(image, bold)
    if fits:
        assert read_raw_participant(raw, "01", EVERYTHING).bold[0].repetition_time_s == 2.0
    else:
        with pytest.raises(InputDatasetError, match="in the header"):
            read_raw_participant(raw, "01", EVERYTHING)


def test_no_repetition_time(raw: Path) -> None:
    (raw / "task-rest_bold.json").unlink()
    with pytest.raises(InputDatasetError, match="RepetitionTime is missing"):
        read_raw_participant(raw, "01", EVERYTHING)


@pytest.mark.parametrize(
    ("shape", "says"), [((4, 4, 4), "must be a series"), ((4, 4, 4, 1), "must be a series"), ((4, 4, 4, 5, 2), "must be a series")]
)
def test_bold_of_other_dimensions(shape: tuple[int, ...], says: str, raw: Path, bold: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), np.eye(4)), bold)
    with pytest.raises(InputDatasetError, match=says):
        read_raw_participant(raw, "01", EVERYTHING)


def test_a_series_named_t1w(raw: Path) -> None:
    path = raw / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    fakes.write_image(path, (4, 4, 4, 3))
    with pytest.raises(InputDatasetError, match="4×4×4×3 and must be one volume"):
        read_raw_participant(raw, "01", EVERYTHING)
    fakes.write_image(path, (4, 4, 4, 1))
    assert len(read_raw_participant(raw, "01", EVERYTHING).t1w) == 1, "a last dimension of 1 is one volume"


@pytest.mark.parametrize("content", [b"", b"no image at all"])
def test_an_unreadable_image(content: bytes, raw: Path, bold: Path) -> None:
    bold.write_bytes(content)
    with pytest.raises(InputDatasetError, match="cannot be read"):
        read_raw_participant(raw, "01", EVERYTHING)


def test_unreadable_json(raw: Path, bold: Path) -> None:
    bold.with_name(bold.name.replace(".nii.gz", ".json")).write_text("{not json")
    with pytest.raises(InputDatasetError, match="cannot be indexed"):
        read_raw_participant(raw, "01", EVERYTHING)


def test_a_run_that_is_there_twice(raw: Path, bold: Path) -> None:
    shutil.copy(bold, bold.with_name(bold.name.replace("_bold", "_rec-x_bold").replace("_run-1_rec-x", "_rec-x_run-1")))
    with pytest.raises(InputDatasetError, match="task-rest_run-1 is there twice"):
        read_raw_participant(raw, "01", EVERYTHING)


def test_links(raw: Path, bold: Path, tmp_path: Path) -> None:
    assert outside_dataset(read_raw_participant(raw, "01", EVERYTHING)) == ()
    inside = raw / ".git" / "annex" / "content"
    inside.parent.mkdir(parents=True)
    shutil.move(bold, inside)
    bold.symlink_to(os.path.relpath(inside, bold.parent))
    assert outside_dataset(read_raw_participant(raw, "01", EVERYTHING)) == (), "an annexed file lies inside the dataset"
    outside = shutil.move(inside, tmp_path / "elsewhere.nii.gz")
    bold.unlink()
    bold.symlink_to(outside)
    assert outside_dataset(read_raw_participant(raw, "01", EVERYTHING)) == (bold,)
    outside.unlink()
    with pytest.raises(InputDatasetError, match="broken link") as caught:
        read_raw_participant(raw, "01", EVERYTHING)
    assert "datalad get" in caught.value.fix


@pytest.mark.parametrize(
    ("damage", "error", "says"),
    [
        (lambda root: shutil.rmtree(root), InputNotFoundError, "does not exist"),
        (lambda root: (root / "dataset_description.json").unlink(), InputNotFoundError, "no BIDS dataset"),
        (lambda root: (root / "dataset_description.json").write_text("{"), InputDatasetError, "not readable JSON"),
        (
            lambda root: fakes.write_json(root / "dataset_description.json", {"DatasetType": "derivative"}),
            InputDatasetError,
            "a derivative",
        ),
        (lambda root: shutil.rmtree(root / "sub-01"), InputNotFoundError, "no participants"),
    ],
)
def test_folders_that_are_no_raw_dataset(damage, error: type[Exception], says: str, raw: Path) -> None:
    check_raw_dataset(raw)
    damage(raw)
    with pytest.raises(error, match=says):
        check_raw_dataset(raw)


def test_real_datasets(test_data: Path) -> None:
    rest = read_raw_participant(test_data / "bids_rest_mini", "001", EVERYTHING)
    assert (rest.bold[0].repetition_time_s, len(rest.bold[0].slice_timing_s)) == (2.52, 26)
    glioma = read_raw_participant(test_data / "bids_glioma", "TCGADU7294", EVERYTHING, anat_only=True)
    assert {image.modality for image in glioma.images} == {"T1w", "contrast T1w", "T2w", "FLAIR"}
