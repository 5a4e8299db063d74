"""Tiny multi-centre brain volumes with a lesion each, written as raw BIDS with masks in derivatives/: known sides and sizes."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import nibabel as nib
import numpy as np

SHAPE = (32, 36, 12)
VOXEL_MM = (5.0, 5.0, 10.0)


@dataclass(kw_only=True)
class SyntheticScans:
    """What was written, and what is true of it."""

    root: Path
    """The raw dataset."""
    sides: dict[str, str] = field(default_factory=dict)
    """left or right, by participant."""
    voxels: dict[str, int] = field(default_factory=dict)
    """Voxels of the lesion, by participant."""


def affine(*, flipped: bool) -> np.ndarray:
    """(4, 4) centred on the head; ``flipped`` stores right first."""
    matrix = np.diag([*VOXEL_MM, 1.0])
    matrix[:3, 3] = -np.array(VOXEL_MM) * (np.array(SHAPE) - 1) / 2
    return matrix @ np.array([[-1, 0, 0, SHAPE[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]) if flipped else matrix


def brain(generator: np.random.Generator, *, side: str, radius_mm: float) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """T1w and FLAIR of one head, and the lesion in one half, on a grid from left to right."""
    grid = np.indices(SHAPE).astype(float)
    middle = (np.array(SHAPE) - 1) / 2
    size = 0.42 * np.array(SHAPE) * generator.uniform(0.92, 1.05, 3)
    distance = sum(((grid[axis] - middle[axis]) / size[axis]) ** 2 for axis in range(3))
    head, inner = distance < 1, distance < 0.6
    folds = np.sin(grid[0] * 0.9 + generator.uniform(0, 6)) * np.sin(grid[1] * 0.8 + generator.uniform(0, 6))
    ventricle = (np.abs(grid[0] - middle[0]) < 2) & (np.abs(grid[1] - middle[1]) < 6) & (np.abs(grid[2] - middle[2]) < 3)
    towards = -1 if side == "left" else 1
    centre = middle + np.array([towards * 0.4 * size[0], generator.uniform(-0.3, 0.3) * size[1], generator.uniform(-0.2, 0.2) * size[2]])
    lesion = (sum(((grid[axis] - centre[axis]) * VOXEL_MM[axis]) ** 2 for axis in range(3)) < radius_mm**2) & head
    t1w = head * (60 + 30 * inner + 8 * folds) - 50 * (ventricle & head) - 30 * lesion
    flair = head * (70 - 15 * inner + 6 * folds) - 50 * (ventricle & head) + 60 * lesion
    noise = 2.0
    images = {name: np.where(head, np.clip(values + generator.normal(0, noise, SHAPE), 1, None), 0).astype(np.float32) for name, values in (("T1w", t1w), ("FLAIR", flair))}  # fmt: skip
    return images, lesion


def write_scans(
    root: Path, *, participants: int = 8, sites: int = 2, seed: int = 0, masks: bool = True, lesions: bool = True
) -> SyntheticScans:
    """A raw BIDS dataset; odd participants are stored from right to left, and every second one has its lesion on the left."""
    generator = np.random.default_rng(seed)
    made = SyntheticScans(root=root)
    root.mkdir(parents=True)
    (root / "dataset_description.json").write_text(json.dumps({"Name": "scans", "BIDSVersion": "1.10.0", "DatasetType": "raw"}))
    lines = ["participant_id\tsite\tside\tsize"]
    for number in range(participants):
        label, side = f"{number + 1:02d}", "left" if number % 4 < 2 else "right"
        radius = 14.0 if number % 2 else 24.0
        images, lesion = brain(generator, side=side, radius_mm=radius if lesions else 0.0)
        folder = root / f"sub-{label}" / "anat"
        folder.mkdir(parents=True)
        for name, data in images.items():
            save(folder / f"sub-{label}_{name}.nii.gz", data, flipped=bool(number % 2))
        if masks:
            save(root / "derivatives" / "lesions" / f"sub-{label}" / "anat" / f"sub-{label}_label-L_mask.nii.gz", lesion.astype(np.uint8), flipped=bool(number % 2))  # fmt: skip
        made.sides[label], made.voxels[label] = side, int(lesion.sum())
        lines.append(f"sub-{label}\tcentre{number % sites}\t{side}\t{'large' if radius > 20 else 'small'}")
    (root / "participants.tsv").write_text("\n".join(lines) + "\n")
    if masks:
        (root / "derivatives" / "lesions" / "dataset_description.json").write_text(json.dumps({"Name": "lesions", "BIDSVersion": "1.10.0", "DatasetType": "derivative", "GeneratedBy": [{"Name": "tests"}]}))  # fmt: skip
    return made


def save(path: Path, data: np.ndarray, *, flipped: bool = False) -> None:
    """An image on the grid of :func:`affine`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(data[::-1] if flipped else data, affine(flipped=flipped)), path)
