"""Facts of masks as a study holds them: the same from either orientation on disk, and true on real studies by plain counting of voxels."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm_cli.config import Selection
from brainfm_cli.learning.radiology_reports import check_report, write_report
from brainfm_cli.signals.slice_packing import SliceSettings
from brainfm_cli.signals.study_facts import study_facts
from tests.synthetic_scans import VOXEL_MM, write_scans


def test_sides_and_volumes_of_planted_lesions(tmp_path: Path) -> None:
    made = write_scans(tmp_path / "raw", participants=4)
    for label, side in made.sides.items():
        facts = study_facts(made.root, label, Selection(), SliceSettings())
        assert facts is not None
        assert facts.side == side
        assert facts.volume_ml == pytest.approx(made.voxels[label] * np.prod(VOXEL_MM) / 1000)
        assert dict(facts.signals) == {"FLAIR": "hyperintense", "T1w": "hypointense"}


def test_without_a_mask_nothing_is_known_and_an_empty_one_says_that_nothing_is_there(tmp_path: Path) -> None:
    write_scans(tmp_path / "none", participants=1, masks=False)
    assert study_facts(tmp_path / "none", "01", Selection(), SliceSettings()) is None
    write_scans(tmp_path / "empty", participants=1, lesions=False)
    facts = study_facts(tmp_path / "empty", "01", Selection(), SliceSettings())
    assert facts is not None
    assert facts.volume_ml == 0


@pytest.mark.parametrize(
    ("dataset", "label", "mask"),
    [
        ("bids_stroke", "strokecase0009", "derivatives/lesion_masks/sub-strokecase0009/ses-0001/dwi/sub-strokecase0009_ses-0001_space-TRACE_label-lesion_mask.nii.gz"),
        ("bids_glioma", "TCGADU7294", "derivatives/tumour_masks/sub-TCGADU7294/anat/sub-TCGADU7294_seg-BraTS_dseg.nii.gz"),
        ("bids_glioma", "TCGAFG6692", "derivatives/tumour_masks/sub-TCGAFG6692/anat/sub-TCGAFG6692_seg-BraTS_dseg.nii.gz"),
    ],
)  # fmt: skip
def test_reports_of_real_studies_state_true_facts(test_data: Path, dataset: str, label: str, mask: str) -> None:
    facts = study_facts(test_data / dataset, label, Selection(), SliceSettings())
    assert facts is not None
    image = nib.load(test_data / dataset / mask)
    inside = np.argwhere(np.asarray(image.dataobj) > 0)
    volume = len(inside) * abs(np.linalg.det(image.affine[:3, :3])) / 1000
    assert facts.volume_ml == pytest.approx(volume, rel=0.05)
    scan = nib.load(next((test_data / dataset / f"sub-{label}").rglob("*FLAIR.nii.gz")))
    head = np.argwhere(np.asarray(scan.dataobj) > np.percentile(np.asarray(scan.dataobj), 60))
    middle = nib.affines.apply_affine(scan.affine, head)[:, 0].mean()
    left = (nib.affines.apply_affine(image.affine, inside)[:, 0] < middle).mean()
    assert facts.side == ("left" if left > 0.95 else "right" if left < 0.05 else "both")
    written = write_report(facts)
    assert check_report(written.text, facts) == ()
    assert f"a volume of {facts.volume_ml:.2f} mL" in written.text
