"""Scores of one segmented volume: Dice, surface distances, surface Dice, and lesions found.

Surfaces and distances are those of MONAI (mask minus its erosion; distances between the centres of such voxels), so that
numbers compare with published ones; tests hold both equal. Undefined scores say why and are never 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.scores import Score

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_TOUCHING = 3  # voxels that share a corner belong to one lesion
_NOTHING = Score(reason="neither mask holds anything")


@dataclass(frozen=True, kw_only=True)
class LesionCounts:
    """Lesions (connected components) that were found, missed and invented."""

    found: int
    """True lesions that the prediction touches."""
    missed: int
    """True lesions that it does not touch."""
    invented: int
    """Predicted lesions that touch no true one."""

    @property
    def f1(self) -> Score:
        """Lesion-wise F1, as in ISLES 2022."""
        total = 2 * self.found + self.missed + self.invented
        return Score(value=2 * self.found / total) if total else _NOTHING


def score_masks(
    predicted: NDArray[np.bool_], observed: NDArray[np.bool_], *, voxel_mm: Sequence[float], tolerance_mm: float
) -> dict[str, Score]:
    """dice, hd95 (mm), nsd at ``tolerance_mm`` and lesion_f1 of one person's masks on one grid of ``voxel_mm``.

    Raises
    ------
    InputDatasetError
        Masks of different grids, or that are not true or false.
    """
    _check(predicted, observed, voxel_mm)
    lesions = count_lesions(predicted, observed).f1
    both = int(predicted.sum()) + int(observed.sum())
    if not both:
        return {"dice": _NOTHING, "hd95": _NOTHING, "nsd": _NOTHING, "lesion_f1": lesions}
    dice = Score(value=2 * int((predicted & observed).sum()) / both)
    if not predicted.any() or not observed.any():
        empty = Score(reason=f"the {'predicted' if observed.any() else 'true'} mask is empty")
        return {"dice": dice, "hd95": empty, "nsd": Score(value=0.0), "lesion_f1": lesions}
    there, back = surface_distances(predicted, observed, voxel_mm), surface_distances(observed, predicted, voxel_mm)
    near = int((there <= tolerance_mm).sum()) + int((back <= tolerance_mm).sum())
    return {
        "dice": dice,
        "hd95": Score(value=float(max(np.percentile(there, 95), np.percentile(back, 95)))),
        "nsd": Score(value=near / (len(there) + len(back))),
        "lesion_f1": lesions,
    }


def surface_distances(mask: NDArray[np.bool_], other: NDArray[np.bool_], voxel_mm: Sequence[float]) -> NDArray[np.float64]:
    """(surface voxels of ``mask``,) distance of each to the surface of ``other``, mm."""
    # One box around both: distances outside are not asked for, and a volume is mostly background.
    box = ndimage.find_objects((mask | other).astype(np.uint8))[0]
    return ndimage.distance_transform_edt(~_surface(other[box]), sampling=voxel_mm)[_surface(mask[box])]


def _surface(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    return mask & ~ndimage.binary_erosion(mask)


def count_lesions(predicted: NDArray[np.bool_], observed: NDArray[np.bool_]) -> LesionCounts:
    """Lesions found, missed and invented; one common voxel is enough to be found."""
    touching = ndimage.generate_binary_structure(observed.ndim, min(_TOUCHING, observed.ndim))
    true, number = ndimage.label(observed, touching)
    given, claimed = ndimage.label(predicted, touching)
    common = predicted & observed
    found = len(np.unique(true[common]))
    return LesionCounts(found=found, missed=number - found, invented=claimed - len(np.unique(given[common])))


def _check(predicted: NDArray[np.bool_], observed: NDArray[np.bool_], voxel_mm: Sequence[float]) -> None:
    if predicted.shape != observed.shape or len(voxel_mm) != observed.ndim:
        raise InputDatasetError(
            f"masks of {predicted.shape} and {observed.shape} voxels with {len(voxel_mm)} voxel sizes",
            fix="bring both to one grid first (nearest neighbour)",
        )
    if predicted.dtype != np.bool_ or observed.dtype != np.bool_:
        raise InputDatasetError(f"masks are {predicted.dtype} and {observed.dtype}, not true or false", fix="say which labels count")
