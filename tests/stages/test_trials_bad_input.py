"""parcellate --trials: responses estimated from BOLD and events, and every kind of bad input ends with a named error."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainfm_cli.bids.voxel_cohort import VoxelCohort
from brainfm_cli.programs.validator import validate
from tests.stages.command import brainfm
from tests.synthetic_bids import TEMPLATE, write_fmriprep

STEM = "sub-01_task-rest"


@pytest.fixture
def viewers(tmp_path: Path) -> Path:
    options = ("participants=1", "viewing.images=12", "viewing.shared=4", "viewing.voxels=40", "viewing.repeats=2", "viewing.captions=2")
    assert brainfm("simulate", tmp_path / "raw", "--kind", "viewing", "--seed", 1, "--set", *options) == 0
    return tmp_path / "raw"


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Callable[[], str]:
    def words() -> str:
        shown = capfd.readouterr()
        logged = "\n".join(line.getMessage() for line in caplog.records)
        return " ".join((shown.out + shown.err + logged).split())

    return words


def files(root: Path) -> tuple[Path, Path, Path]:
    func = root / "sub-0001" / "func"
    return tuple(next(func.glob(pattern)) for pattern in ("*_statmap.nii.gz", "*_trials.tsv", "*_mask.nii.gz"))  # type: ignore[return-value]


def pack(root: Path, *options: object) -> int:
    return brainfm("parcellate", root, root.parent / "out", "group", "--trials", *options)


def change_table(root: Path, change: Callable[[pd.DataFrame], pd.DataFrame]) -> None:
    _, path, _ = files(root)
    change(pd.read_csv(path, sep="\t", dtype=str)).to_csv(path, sep="\t", index=False)


def test_row_counts_that_differ(viewers: Path, said: Callable[[], str]) -> None:
    change_table(viewers, lambda table: table.iloc[:-1])
    assert pack(viewers) == 65
    assert "the table has 23 rows and the map" in said()
    assert not (viewers.parent / "out" / "cohort").exists()


def test_stimuli_that_nothing_describes(viewers: Path, said: Callable[[], str]) -> None:
    change_table(viewers, lambda table: table.assign(stim_id=["other", *table["stim_id"][1:]]))
    assert pack(viewers) == 65
    assert "row 1: stimulus 'other' is in no stimulus table" in said()


def test_a_missing_caption(viewers: Path, said: Callable[[], str]) -> None:
    path = viewers / "stimuli" / "stimuli.tsv"
    table = pd.read_csv(path, sep="\t", dtype=str)
    table.loc[:, [name for name in table if name.startswith("caption")]] = "n/a"
    table.to_csv(path, sep="\t", index=False)
    assert pack(viewers) == 65
    assert "has no caption" in said()
    # the other file has them
    assert pack(viewers, "--set", f"stimuli.captions={viewers / 'stimuli' / 'captions.json'}") == 0
    assert all(len(one.captions) == 2 for one in VoxelCohort.open(viewers.parent / "out").stimuli.values())


def test_integers_without_scale(viewers: Path, said: Callable[[], str]) -> None:
    path, _, _ = files(viewers)
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.rint(image.get_fdata() * 300).astype(np.int16), image.affine), path)
    assert pack(viewers) == 65
    assert "int16 without a scale" in said()


def test_a_mask_on_another_grid(viewers: Path, said: Callable[[], str]) -> None:
    _, _, path = files(viewers)
    image = nib.load(path)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine + np.eye(4)), path)
    assert pack(viewers) == 65
    assert "another grid than the mask" in said()


def test_what_is_no_trial_dataset(viewers: Path, tmp_path: Path, said: Callable[[], str]) -> None:
    (tmp_path / "empty" / "sub-01").mkdir(parents=True)
    assert pack(tmp_path / "empty") == 66
    assert "no single-trial maps here" in said()
    assert brainfm("parcellate", viewers, tmp_path / "o", "participant", "--trials") == 2
    assert "holds single-trial maps already" in said()
    assert brainfm("pretrain", viewers, tmp_path / "p", "group", "--system", "brain-caption", "--device", "cpu") == 66
    assert "no packed trials" in said()


def write_events(root: Path, **columns: object) -> Path:
    path = root / "sub-01" / "func" / f"{STEM}_events.tsv"
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {"onset": 10 + 12.0 * np.arange(16), "duration": 2.0, "trial_type": ["face", "house"] * 8, "stim_id": ["face", "house"] * 8}
    pd.DataFrame(table | columns).to_csv(path, sep="\t", index=False)
    return path


def test_from_bold_and_events_to_a_cohort(tmp_path: Path, said: Callable[[], str]) -> None:
    source, raw = write_fmriprep(tmp_path / "prep", participants=("01",)).root, tmp_path / "raw"
    write_events(raw)
    template = "stimuli.template=a photo of a {category}"
    estimate = ("parcellate", source, tmp_path / "out", "participant", "--trials", "-d", f"raw={raw}", "--set", template)
    assert brainfm(*estimate, "--dry-run") == 0
    assert brainfm(*estimate) == 0
    folder = tmp_path / "out" / "sub-01" / "func"
    image = nib.load(folder / f"{STEM}_space-{TEMPLATE}_stat-effect_desc-singletrial_statmap.nii.gz")
    assert image.shape == (8, 8, 8, 16)
    described = json.loads((folder / f"{STEM}_space-{TEMPLATE}_stat-effect_desc-singletrial_statmap.json").read_text())
    assert described["Estimator"] == "lss"
    assert brainfm("parcellate", source, tmp_path / "out", "group", "--trials", "--set", template) == 0
    cohort = VoxelCohort.open(tmp_path / "out")
    assert cohort.templated
    assert cohort.stimuli["face"].captions == ("a photo of a face",)
    assert cohort.responses("01").shape == (16, int((image.get_fdata()[..., 0] != 0).sum()))
    validate(tmp_path / "out")


def test_trials_outside_the_run(tmp_path: Path, said: Callable[[], str]) -> None:
    source = write_fmriprep(tmp_path / "prep", participants=("01",)).root
    write_events(tmp_path / "raw", onset=20.0 * np.arange(16))
    call = ("parcellate", source, tmp_path / "out", "participant", "--trials")
    assert brainfm(*call, "-d", f"raw={tmp_path / 'raw'}") == 65
    assert "row 13: the trial at 240 s lies outside the run of 240 s" in said()
    # events beside the raw images are not found by themselves
    assert brainfm("parcellate", source, tmp_path / "other", "participant", "--trials") == 66
    assert "has events" in said()
