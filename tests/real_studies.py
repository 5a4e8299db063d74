"""Real studies with lesion masks, and what plain counting of voxels says of them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

MASKS = {
    ("bids_stroke", "strokecase0009"): "lesion_masks/sub-strokecase0009/ses-0001/dwi/sub-strokecase0009_ses-0001_space-TRACE_label-lesion_mask.nii.gz",
    ("bids_glioma", "TCGADU7294"): "tumour_masks/sub-TCGADU7294/anat/sub-TCGADU7294_seg-BraTS_dseg.nii.gz",
    ("bids_glioma", "TCGAFG6692"): "tumour_masks/sub-TCGAFG6692/anat/sub-TCGAFG6692_seg-BraTS_dseg.nii.gz",
}  # fmt: skip
"""Mask below derivatives/, by dataset and participant."""


def counted(test_data: Path, dataset: str, label: str) -> tuple[float, str]:
    """Volume of a lesion in mL, and its side: that of the middle of the head on which 95 % of it lie, or both."""
    mask = nib.load(test_data / dataset / "derivatives" / MASKS[dataset, label])
    inside = np.argwhere(np.asarray(mask.dataobj) > 0)
    scan = nib.load(next((test_data / dataset / f"sub-{label}").rglob("*FLAIR.nii.gz")))
    brightness = np.asarray(scan.dataobj)
    head = nib.affines.apply_affine(scan.affine, np.argwhere(brightness > np.percentile(brightness, 60)))
    left = (nib.affines.apply_affine(mask.affine, inside)[:, 0] < head[:, 0].mean()).mean()
    volume = len(inside) * abs(np.linalg.det(mask.affine[:3, :3])) / 1000
    return volume, "left" if left > 0.95 else "right" if left < 0.05 else "both"


def lies_on_its_source(path: Path, dataset: Path) -> bool:
    """Whether a written image has shape and place of the image that its sidecar names."""
    reference = json.loads(path.with_name(path.name.replace(".nii.gz", ".json")).read_text())["SpatialReference"]
    source, image = nib.load(dataset / reference.removeprefix("bids::")), nib.load(path)
    return image.shape == source.shape and np.allclose(image.affine, source.affine, atol=1e-3)
