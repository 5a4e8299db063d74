"""From probabilities on slices to lesion labels in the grid of the scan's file, and what is true there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from brainfm_cli.bids.images import write_image
from brainfm_cli.signals.slices import SliceGrid, Volume, read_labels

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from brainfm_cli.bids.scans import LesionMask
    from brainfm_cli.bids.slice_cohort import PackedScan


@dataclass(frozen=True, kw_only=True)
class NativeChances:
    """Probabilities on one native grid, of all scans that share it."""

    reference: PackedScan
    """The first of these scans."""
    scans: tuple[str, ...]
    """Names of all of them."""
    chances: NDArray[np.float32]
    """(1 + lesion classes, x, y, z) in RAS order; they sum to one."""
    voxel_mm: tuple[float, float, float]
    """Voxel size in RAS order."""

    def to_native(self, labels: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """(x, y, z) RAS labels in the order of the file."""
        return self._volume().to_native(labels)

    def save(self, labels: NDArray[np.uint8], path: Path) -> Path:
        """Write RAS labels as an image on the grid of the reference scan."""
        return write_image(path, self.to_native(labels), np.array(self.reference.native_affine), dtype=np.uint8)

    def save_values(self, values: NDArray[np.float32], path: Path) -> Path:
        """Write (x, y, z) RAS values as an image on the grid of the reference scan."""
        return write_image(path, self._volume().to_native(values), np.array(self.reference.native_affine), dtype=np.float32)

    def millilitres(self, labels: NDArray[np.uint8], value: int | None = None) -> float:
        """Volume of one label, or of all."""
        return float((labels > 0 if value is None else labels == value).sum() * np.prod(self.voxel_mm) / 1000)

    def _volume(self) -> Volume:
        affine: NDArray[Any] = np.array(self.reference.native_affine)
        shape = self.chances.shape[1:]
        return Volume(data=np.zeros(shape, np.float32), affine=affine, native_shape=self.reference.native_shape, native_affine=affine)


def native_chances(scans: Sequence[PackedScan], chances_of: Callable[[Sequence[PackedScan]], NDArray[np.float32]]) -> list[NativeChances]:
    """Probabilities on every native grid of a study; ``chances_of`` gives (1 + classes, items, *pixels) of the scans on one grid."""
    groups: dict[tuple[Any, ...], list[PackedScan]] = {}
    for scan in scans:
        groups.setdefault(scan.place, []).append(scan)
    found = []
    for members in groups.values():
        given = members[0].grid
        grid = SliceGrid(**{**given, "shape": tuple(given["shape"]), "voxel_mm": tuple(given["voxel_mm"])})
        chances = np.stack([grid.restore(one) for one in chances_of(members)]).astype(np.float32)
        # outside the padded square of a slice grid nothing is known: no lesion
        chances[0] += np.clip(1 - chances.sum(axis=0), 0, None)
        found.append(
            NativeChances(
                reference=members[0], scans=tuple(scan.name for scan in members), chances=chances, voxel_mm=tuple(given["voxel_mm"])
            )
        )
    return found


def to_labels(chances: NDArray[np.float32], values: Sequence[int], *, smallest: int) -> NDArray[np.uint8]:
    """(x, y, z) label values of (1 + classes, x, y, z) probabilities; lesions (touching voxels of any class) below ``smallest`` voxels are dropped."""
    labels = np.array([0, *values], np.uint8)[chances.argmax(axis=0)]
    if smallest > 1:
        parts, number = ndimage.label(labels > 0, np.ones((3,) * labels.ndim, bool))
        sizes = np.bincount(parts.ravel(), minlength=number + 1)
        labels[(sizes < smallest)[parts] & (labels > 0)] = 0
    return labels


def joined_labels(masks: Sequence[LesionMask], volume: Volume) -> tuple[NDArray[np.uint8] | None, tuple[str, ...]]:
    """All masks of a study on one scan's grid, RAS order, and what to say of them; none without a mask. Where two overlap, the later name wins."""
    if not masks:
        return None, ()
    together, notes = np.zeros(volume.data.shape, np.uint8), []
    for mask in masks:
        drawn, said = read_labels(mask, volume)
        together = np.where(drawn > 0, drawn, together)
        notes += [f"{mask.path.name}: {text}" for text in said]
    return together, tuple(notes)
