"""What is true of a lesion: volume, side, extent, regions, signal. Counted from its mask, never learnt.

World coordinates decide on sides (NIfTI: x grows to the right), so that a left lesion is left whatever order its file stores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import ndimage

from brainfm_cli.errors import InputDatasetError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

Side = Literal["left", "right", "both"]
Signal = Literal["hyperintense", "isointense", "hypointense"]
_OTHER_SIDE = 0.05
"""Smallest share of the volume that makes a lesion lie on both sides; less is the width of the midline."""
_CLEAR = 1.0
"""Standard deviations of the mirrored tissue by which a signal is called raised or lowered."""


@dataclass(frozen=True, kw_only=True)
class LesionFacts:
    """What a mask says of the lesions of one study."""

    volume_ml: float
    """Volume, millilitres; 0 where there is no lesion, and then nothing else is known."""
    parts: int = 0
    """Separate parts (voxels that touch by a corner belong together)."""
    side: Side | None = None
    """Hemisphere that holds it; both where each holds at least 5 %."""
    left_share: float = 0.0
    """Share of the volume left of the midline."""
    centre_mm: tuple[float, float, float] | None = None
    """Centre of mass in world coordinates."""
    extent_mm: tuple[float, float, float] | None = None
    """Extent along left-right, posterior-anterior and inferior-superior."""
    regions: tuple[tuple[str, float], ...] = ()
    """Regions of an atlas and their shares of the volume, largest first."""
    signals: tuple[tuple[str, Signal], ...] = ()
    """Signal by sequence, against the same place in the other hemisphere."""

    @property
    def longest_mm(self) -> float | None:
        """Largest of the three extents."""
        return None if self.extent_mm is None else max(self.extent_mm)


def lesion_facts(
    mask: NDArray[np.integer | np.bool_],
    affine: NDArray[np.float64],
    *,
    midline_mm: float = 0.0,
    labels: NDArray[np.integer] | None = None,
    names: Mapping[int, str] | None = None,
    images: Mapping[str, NDArray[np.floating]] | None = None,
) -> LesionFacts:
    """Facts of one mask.

    Parameters
    ----------
    mask
        (x, y, z); every value but 0 is lesion.
    affine
        (4, 4) voxels to world millimetres, x to the right.
    midline_mm
        World x of the midline: 0 in template space, the middle of the brain elsewhere.
    labels, names
        (x, y, z) atlas labels on the grid of the mask, and the region of each.
    images
        (x, y, z) images on the grid of the mask, by sequence.

    Raises
    ------
    InputDatasetError
        The mask has not three dimensions, or labels or an image lie on another grid.
    """
    if mask.ndim != 3:
        raise InputDatasetError(f"a lesion mask has three dimensions, this one {mask.ndim}", fix="give one volume")
    for name, other in {**({} if labels is None else {"the atlas": labels}), **(images or {})}.items():
        if other.shape != mask.shape:
            raise InputDatasetError(
                f"{name} has the grid {other.shape}, the lesion mask {mask.shape}", fix="resample one to the grid of the other"
            )
    lesion = np.asarray(mask) != 0
    inside = np.argwhere(lesion)
    if len(inside) == 0:
        return LesionFacts(volume_ml=0.0)
    world = _apply(affine, inside)
    edges = np.abs(np.asarray(affine)[:3, :3]).sum(axis=1)  # a voxel's own extent along the world's axes
    left = float((world[:, 0] < midline_mm).mean())
    opposite = _mirrored(lesion, world, affine, midline_mm) if images else ()
    centre, extent = world.mean(axis=0), np.ptp(world, axis=0) + edges
    return LesionFacts(
        volume_ml=len(inside) * abs(float(np.linalg.det(np.asarray(affine)[:3, :3]))) / 1000,
        parts=int(ndimage.label(lesion, np.ones((3, 3, 3)))[1]),
        side="left" if left > 1 - _OTHER_SIDE else "right" if left < _OTHER_SIDE else "both",
        left_share=left,
        centre_mm=(float(centre[0]), float(centre[1]), float(centre[2])),
        extent_mm=(float(extent[0]), float(extent[1]), float(extent[2])),
        regions=() if labels is None else _regions(labels[tuple(inside.T)], names or {}),
        signals=tuple((name, _signal(image, lesion, opposite)) for name, image in (images or {}).items()),
    )


def _apply(affine: NDArray[Any], points: NDArray[Any]) -> NDArray[np.float64]:
    """(points, 3) places after an affine."""
    moved: NDArray[np.float64] = points @ np.asarray(affine)[:3, :3].T + np.asarray(affine)[:3, 3]
    return moved


def _regions(values: NDArray[np.integer], names: Mapping[int, str]) -> tuple[tuple[str, float], ...]:
    found, counts = np.unique(values[values > 0], return_counts=True)
    shares: dict[str, float] = {}
    for value, count in zip(found, counts, strict=True):
        name = names.get(int(value), f"region {int(value)}")
        shares[name] = shares.get(name, 0.0) + float(count) / len(values)
    return tuple(sorted(shares.items(), key=lambda pair: (-pair[1], pair[0])))


def _mirrored(
    lesion: NDArray[np.bool_], world: NDArray[np.float64], affine: NDArray[np.float64], midline_mm: float
) -> tuple[NDArray[np.intp], ...]:
    """Voxels of the other hemisphere that face the lesion's ``world`` places, as an index; those that are lesion themselves left out."""
    facing = np.c_[2 * midline_mm - world[:, 0], world[:, 1:]]
    places = np.round(_apply(np.linalg.inv(affine), facing)).astype(np.intp)
    places = places[((places >= 0) & (places < np.array(lesion.shape))).all(axis=1)]
    return tuple(places[~lesion[tuple(places.T)]].T)


def _signal(image: NDArray[np.floating], lesion: NDArray[np.bool_], opposite: tuple[NDArray[np.intp], ...]) -> Signal:
    """The lesion's mean against that of the voxels which face it, in their standard deviations."""
    tissue = image[opposite]
    if len(tissue) < 2:  # a lesion of both sides mirrors onto itself
        return "isointense"
    spread = float(tissue.std()) or 1e-12
    height = (float(image[lesion].mean()) - float(tissue.mean())) / spread
    return "hyperintense" if height > _CLEAR else "hypointense" if height < -_CLEAR else "isointense"
