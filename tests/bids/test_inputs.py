"""Preprocessed runs of one participant: which images count, what their metadata inherit, and that none of it waits for pybids."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from brainfm_cli.bids.inputs import find_runs
from brainfm_cli.config import Selection
from brainfm_cli.errors import InputDatasetError
from tests.synthetic_bids import write_fmriprep, write_json

SIDECAR = "sub-01_task-rest_space-MNI152NLin2009cAsym_res-2_desc-preproc_bold.json"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_fmriprep(tmp_path / "data", participants=("01",), frames=20).root


def repetition_time(root: Path) -> float:
    (run,) = find_runs(root, "01", Selection())
    return run.repetition_time_s


def test_the_nearest_and_most_specific_sidecar_that_states_it_counts(root: Path) -> None:
    own = root / "sub-01" / "func" / SIDECAR
    values = json.loads(own.read_text())
    assert repetition_time(root) == values.pop("RepetitionTime") == 2.0
    write_json(root / "bold.json", {"RepetitionTime": 1.1})
    write_json(root / "task-rest_mask.json", {"RepetitionTime": 9.0})
    write_json(root / "task-other_bold.json", {"RepetitionTime": 9.0})
    assert repetition_time(root) == 2.0
    write_json(own, values)  # it stays, and says nothing of it
    assert repetition_time(root) == 1.1
    write_json(root / "task-rest_bold.json", {"RepetitionTime": 1.2})
    assert repetition_time(root) == 1.2
    write_json(root / "sub-01" / "sub-01_bold.json", {"RepetitionTime": 1.3})
    assert repetition_time(root) == 1.3
    own.unlink()
    assert repetition_time(root) == 1.3
    write_json(root / "sub-01" / "func" / "sub-01_task-rest_bold.json", {"RepetitionTime": 1.4})
    assert repetition_time(root) == 1.4


@pytest.mark.parametrize("text", ["{", "[1]", "3", "[" * 100_000])
def test_a_sidecar_that_is_no_object_is_named(root: Path, text: str) -> None:
    (root / "sub-01" / "func" / SIDECAR).write_text(text)
    with pytest.raises(InputDatasetError, match="sidecar is unreadable"):
        find_runs(root, "01", Selection())


def test_images_that_are_no_preprocessed_run_are_left_out(root: Path) -> None:
    func = root / "sub-01" / "func"
    image = func / SIDECAR.replace(".json", ".nii.gz")
    for name in ("sub-01_task-raw_bold.nii.gz", "sub-01_task-rest_echo-1_space-MNI152NLin2009cAsym_res-2_desc-preproc_bold.nii.gz"):
        (func / name).symlink_to(image)
    for folder in ("anat", "figures", ".hidden"):
        (root / "sub-01" / folder).mkdir(exist_ok=True)
        (root / "sub-01" / folder / "sub-01_task-aside_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz").symlink_to(image)
    assert [run.bold for run in find_runs(root, "01", Selection())] == [image]


def test_filters_of_the_user_choose_by_pybids(root: Path, tmp_path: Path) -> None:
    func = root / "sub-01" / "func"
    for path in list(func.iterdir()):
        (func / path.name.replace("task-rest", "task-rest_acq-b")).write_bytes(path.read_bytes())
    assert len(find_runs(root, "01", Selection())) == 2
    filters = tmp_path / "filters.json"
    for wanted, expected in ({"acquisition": "b"}, "b"), ({"acquisition": None}, None):
        write_json(filters, {"bold": wanted})
        assert [run.key.acquisition for run in find_runs(root, "01", Selection(bids_filter_file=filters))] == [expected]


def test_a_task_of_an_array_starts_without_pybids(root: Path, tmp_path: Path) -> None:
    """It takes half of the start of a process (docs/performance.md)."""
    code = (
        "import sys; from brainfm_cli import cli\n"
        f"try: cli.main(['parcellate', {str(root)!r}, {str(tmp_path / 'out')!r}, 'participant', '--participant-label', '01', '--dry-run'])\n"
        "except SystemExit as ended: assert not ended.code, ended.code\n"
        "print([name for name in ('bids', 'pandas', 'nilearn', 'scipy', 'torch') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]"
