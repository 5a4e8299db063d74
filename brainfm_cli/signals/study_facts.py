"""Facts of the lesion masks of a participant, measured on the voxels of the scan that the mask was drawn on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from brainfm_cli.bids.scans import read_studies
from brainfm_cli.signals.lesions import lesion_facts
from brainfm_cli.signals.segmentations import joined_labels
from brainfm_cli.signals.slices import find_head, read_volume

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from brainfm_cli.bids.scans import Study, StudyScan
    from brainfm_cli.config import Selection
    from brainfm_cli.signals.lesions import LesionFacts
    from brainfm_cli.signals.slice_packing import SliceSettings
    from brainfm_cli.signals.slices import Volume

_NAMED = {"T1w", "T2w", "FLAIR", "dwi"}
"""Sequences that reports can name; the others lie on the same grid and would only add words."""


def study_facts(
    raw: Path, label: str, selection: Selection, settings: SliceSettings, mask_roots: Sequence[Path] = ()
) -> LesionFacts | None:
    """Facts of the first study of a participant that has a mask; none where no study has one.

    The midline is the middle of the head in world coordinates, and signals are told of every sequence that shares the mask's grid.

    Raises
    ------
    InputDatasetError
        A mask is of another patient, on a grid that cannot be brought together, or has values that nothing explains.
    """
    studies = read_studies(raw, label, selection, sequences=settings.sequences, space=settings.space, mask_roots=tuple(mask_roots))
    study = next((one for one in studies if one.masks and one.scans), None)
    if study is None:
        return None
    reference = _drawn_on(study)
    volume = read_volume(reference.path, gradients=reference.gradients)
    labels, _ = joined_labels(study.masks, volume)
    if labels is None:
        return None
    return lesion_facts(labels, volume.affine, midline_mm=_midline(volume), images=_images(study, reference, volume))


def _drawn_on(study: Study) -> StudyScan:
    named = [mask.reference for mask in study.masks if mask.reference is not None]
    return next((scan for scan in study.scans if scan.path in named), study.scans[0])


def _midline(volume: Volume) -> float:
    inside = np.argwhere(find_head(volume.data))
    return float((inside @ volume.affine[:3, :3].T + volume.affine[:3, 3])[:, 0].mean())


def _images(study: Study, reference: StudyScan, volume: Volume) -> dict[str, np.ndarray]:
    found = {}
    for scan in study.scans:
        if scan.sequence not in _NAMED or scan.sequence in found:
            continue
        other = volume if scan is reference else read_volume(scan.path, gradients=scan.gradients)
        if other.data.shape == volume.data.shape and np.allclose(other.affine, volume.affine, atol=1e-3):
            found[scan.sequence] = other.data
    return dict(sorted(found.items()))
