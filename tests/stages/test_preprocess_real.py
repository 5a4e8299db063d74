"""``brainfm preprocess`` with the embedded engine on two real people, as a user calls it: listing, validator, quality, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm_cli.programs.validator import validate

GOLDEN = Path(__file__).with_name("golden")
SPACE = "space-MNI152NLin2009cAsym_res-2"


@dataclass(frozen=True)
class Done:
    """A dataset after its one participant was preprocessed."""

    name: str
    out: Path
    code: int
    peak_mb: float


@pytest.fixture(scope="module", params=["bids_rest_mini", "bids_localizer"])
def done(request: pytest.FixtureRequest, test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    out = tmp_path_factory.mktemp(request.param) / "out"
    command = [sys.executable, "-m", "brainfm_cli", "preprocess", str(test_data / request.param), str(out), "participant"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return Done(request.param, out, child.returncode, usage.ru_maxrss / 1024)


def one(done: Done, end: str) -> Path:
    (found,) = done.out.rglob(f"*{end}")
    return found


@pytest.mark.long
def test_exactly_the_files_of_the_listing(done: Done) -> None:
    assert done.code == 0
    wanted = (GOLDEN / f"embedded_{done.name}.txt").read_text().split()
    assert sorted(path.relative_to(done.out).as_posix() for path in done.out.rglob("*") if path.is_file()) == sorted(wanted)
    assert all(path.stat().st_size > 0 for path in done.out.rglob("*") if path.is_file())


@pytest.mark.long
def test_the_validator_finds_no_error(done: Done) -> None:
    validate(done.out)


@pytest.mark.long
def test_memory_is_below_what_was_promised(done: Done) -> None:
    assert done.peak_mb < 3000


@pytest.mark.long
def test_brain_and_grey_matter_lie_where_the_template_has_them(done: Done) -> None:
    from nilearn.datasets import load_mni152_gm_template
    from nilearn.image import resample_to_img

    (quality,) = json.loads(next((done.out / "logs/quality").glob("*.json")).read_text()).values()
    assert quality["template_dice"] >= 0.92
    assert quality["template_correlation"] >= 0.6
    ours = nib.load(one(done, f"{SPACE}_label-GM_probseg.nii.gz"))
    theirs = resample_to_img(load_mni152_gm_template(resolution=2), ours, force_resample=True, copy_header=True)
    grey, wanted = ours.get_fdata() > 0.5, theirs.get_fdata() > 0.5
    assert 2 * (grey & wanted).sum() / (grey.sum() + wanted.sum()) >= 0.7


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["simple", "scrubbing", "compcor"])
def test_nilearn_takes_the_confounds(done: Done, strategy: str) -> None:
    from nilearn.interfaces.fmriprep import load_confounds_strategy

    bold = one(done, f"{SPACE}_desc-preproc_bold.nii.gz")
    table, _ = load_confounds_strategy(str(bold), denoise_strategy=strategy)
    assert len(table) == nib.load(bold).shape[3]
    assert np.isfinite(table.to_numpy()).all()
