"""What must be there when fMRIPrep ends well, for every kind of output space."""

from __future__ import annotations

from pathlib import Path

import pytest

from brainfm_cli.bids.raw import read_raw_participant
from brainfm_cli.config import Selection
from brainfm_cli.programs.fmriprep import Task
from brainfm_cli.programs.fmriprep_outputs import missing_outputs, stated_version
from tests.programs import fakes

STEM = "sub-01_task-rest_run-1"


def expected(tmp_path: Path, spaces: tuple[str, ...], *files: str, **options: object) -> list[str]:
    """What is missed beside the structural files, when these functional files are there."""
    raw = fakes.write_raw(tmp_path / "raw", runs=("1",))
    out = fakes.write_tree(tmp_path / "out", runs=())
    for name in (f"{STEM}_desc-coreg_boldref.nii.gz", *files):
        fakes.write_text(out / "sub-01" / "func" / name, "content")
    values = {"level": "full", **options}
    task = Task(
        label="01", data=raw, output=out, scratch=tmp_path, licence=tmp_path, output_spaces=spaces, threads=1, memory_mb=1, **values
    )
    return missing_outputs(task, read_raw_participant(raw, "01", Selection(), anat_only=task.anat_only))


CONFOUNDS = f"{STEM}_desc-confounds_timeseries.tsv"


@pytest.mark.parametrize(
    ("space", "files"),
    [
        ("MNI152NLin6Asym:res-2", ("space-MNI152NLin6Asym_res-2_desc-preproc_bold.nii.gz", "space-MNI152NLin6Asym_res-2_desc-brain_mask.nii.gz")),
        ("MNI152NLin6Asym:res-native", ("space-MNI152NLin6Asym_desc-preproc_bold.nii.gz", "space-MNI152NLin6Asym_desc-brain_mask.nii.gz")),
        ("MNIPediatricAsym:cohort-2:res-1", ("space-MNIPediatricAsym_cohort-2_res-1_desc-preproc_bold.nii.gz", "space-MNIPediatricAsym_cohort-2_res-1_desc-brain_mask.nii.gz")),
        ("anat", ("space-T1w_desc-preproc_bold.nii.gz", "space-T1w_desc-brain_mask.nii.gz")),
        ("func", ("desc-preproc_bold.nii.gz",)),
        ("fsaverage5", ("hemi-L_space-fsaverage5_bold.func.gii", "hemi-R_space-fsaverage5_bold.func.gii")),
        ("fsaverage:den-10k", ("hemi-L_space-fsaverage5_bold.func.gii", "hemi-R_space-fsaverage5_bold.func.gii")),
        ("fsnative", ("hemi-L_space-fsnative_bold.func.gii", "hemi-R_space-fsnative_bold.func.gii")),
    ],
)  # fmt: skip
def test_every_space_has_its_files(space: str, files: tuple[str, ...], tmp_path: Path) -> None:
    names = [f"{STEM}_{name}" for name in files]
    assert expected(tmp_path / "all", (space,), CONFOUNDS, *names) == []
    for lost in names:
        others = [name for name in names if name != lost]
        (missed,) = expected(tmp_path / lost, (space,), CONFOUNDS, *others)
        assert missed.split("*")[-1].lstrip("_").split("_")[-1] == lost.split("_")[-1]
    other_resolution = [name.replace("res-2", "res-1").replace("cohort-2", "cohort-1") for name in names]
    if other_resolution != names:
        assert len(expected(tmp_path / "other", (space,), CONFOUNDS, *other_resolution)) == len(names)


def test_levels_and_structural_runs(tmp_path: Path) -> None:
    assert expected(tmp_path / "a", ("T1w",), level="minimal") == []
    assert len(expected(tmp_path / "b", ("T1w",))) == 3
    assert expected(tmp_path / "c", ("T1w",), anat_only=True) == []
    surfaces = ("fsaverage5", "T1w")
    files = [f"{STEM}_space-T1w_desc-{name}.nii.gz" for name in ("preproc_bold", "brain_mask")]
    assert expected(tmp_path / "d", surfaces, CONFOUNDS, *files, fs_no_reconall=True) == []


def test_an_empty_file_is_missing(tmp_path: Path) -> None:
    raw, out = fakes.write_raw(tmp_path / "raw"), fakes.write_tree(tmp_path / "out")
    lost = out / "sub-01" / "func" / "sub-01_task-rest_run-2_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz"
    lost.write_bytes(b"")
    spaces = ("MNI152NLin2009cAsym",)
    task = Task(label="01", data=raw, output=out, scratch=out, licence=out, output_spaces=spaces, level="full", threads=1, memory_mb=1)
    (missed,) = missing_outputs(task, read_raw_participant(raw, "01", Selection()))
    assert missed == "sub-01_task-rest_run-2*_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz"
    assert stated_version(task) == "25.2.7"
    (out / "dataset_description.json").unlink()
    assert stated_version(task) is None
