"""``brainfm preprocess`` with the embedded engine on real people, as a user calls it: listing, validator, quality, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
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


def preprocess(raw: Path, out: Path, *options: str) -> Done:
    command = [sys.executable, "-m", "brainfm_cli", "preprocess", str(raw), str(out), "participant", *options]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    return Done(raw.name, out, child.returncode, usage.ru_maxrss / 1024)


@pytest.fixture(scope="module", params=["bids_rest_mini", "bids_localizer"])
def done(request: pytest.FixtureRequest, test_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Done:
    return preprocess(test_data / request.param, tmp_path_factory.mktemp(request.param) / "out")


def listing(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def golden(name: str) -> list[str]:
    return sorted((GOLDEN / f"embedded_{name}.txt").read_text().split())


def one(done: Done, end: str) -> Path:
    (found,) = done.out.rglob(f"*{end}")
    return found


@pytest.mark.long
def test_exactly_the_files_of_the_listing(done: Done) -> None:
    assert done.code == 0
    assert listing(done.out) == golden(done.name)
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


@pytest.mark.long
def test_structure_without_a_t1w_image(test_data: Path, tmp_path: Path) -> None:
    """FLAIR, TRACE and ADC of a stroke: the FLAIR is the reference, and nothing of it is divided into tissues."""
    done = preprocess(test_data / "bids_stroke", tmp_path / "out", "--anat-only")
    assert done.code == 0
    assert listing(done.out) == golden("bids_stroke_anat")
    validate(done.out)


@pytest.mark.long
def test_sequences_of_one_head_are_brought_together(test_data: Path, tmp_path: Path) -> None:
    """The images of the glioma dataset lie on one another already: what is found should move nothing."""
    from brainfm_cli.programs.embedded import itk

    done = preprocess(test_data / "bids_glioma", tmp_path / "out", "--anat-only", "--participant-label", "TCGADU7294")
    assert done.code == 0
    assert listing(done.out) == golden("bids_glioma_anat")
    validate(done.out)
    page = (done.out / "sub-TCGADU7294.html").read_text()
    assert all(f"Alignment of {name}" in page for name in ("ce-gadolinium T1w", "T2w", "FLAIR"))
    group = subprocess.run(
        [sys.executable, "-m", "brainfm_cli", "preprocess", str(test_data / "bids_glioma"), str(done.out), "group", "--anat-only"],
        check=True,
    )
    assert group.returncode == 0
    (row,) = pd.read_csv(done.out / "group_qc.tsv", sep="\t").to_dict("records")
    assert (row["participant_id"], row["run"]) == ("sub-TCGADU7294", "T1w")
    assert row["sequence_alignment"] > 1
    validate(done.out)
    mask = nib.load(one(done, "sub-TCGADU7294_desc-brain_mask.nii.gz"))
    inside = mask.get_fdata() > 0
    places = nib.affines.apply_affine(mask.affine, np.argwhere(inside))
    for name in ("ce-gadolinium_from-T1w", "from-T2w", "from-FLAIR"):
        moved = itk.mapped_points(mask.shape, mask.affine, [one(done, f"{name}_to-T1w_mode-image_xfm.h5")])[inside]
        assert np.median(np.linalg.norm(moved - places, axis=1)) < 1  # mm, of voxels of 1 mm
