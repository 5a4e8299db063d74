"""Read single-trial maps: the voxels of a mask in their stored order, one trial at a time. Nothing is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from brainfm_cli.bids.images import load_image, read_voxels
from brainfm_cli.bids.trials import TrialRun, read_scale, read_trial_table
from brainfm_cli.bids.voxel_cohort import VoxelSpace, mask_hash, order_hash, order_voxels
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.signals.volumes import SeriesHeader, open_series

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

_PLACE_MM = 0.01  # rounding of affines by other programs


@dataclass(frozen=True, kw_only=True, eq=False)
class VoxelMask:
    """The voxels of one participant that are used, and their order."""

    path: Path
    """Where the mask lies, for messages."""
    mask: NDArray[np.bool_]
    """(x, y, z)."""
    affine: NDArray[np.float64]
    """(4, 4) voxels to millimetres."""
    order: NDArray[np.int32]
    """(voxels,) places in the flattened mask, C order."""
    regions: tuple[str, ...]
    """Region number of each ordered voxel as text; empty without a segmentation."""

    @property
    def sha256(self) -> str:
        """Hash of shape, place and voxels."""
        return mask_hash(self.mask, self.affine)

    def space(self, participant: str, space: str) -> VoxelSpace:
        """What a cohort keeps of it."""
        where = np.stack(np.unravel_index(self.order, self.mask.shape), axis=1)
        places = where @ self.affine[:3, :3].T + self.affine[:3, 3]
        return VoxelSpace(
            participant=participant,
            space=space,
            mask_sha256=self.sha256,
            order_sha256=order_hash(self.sha256, self.order),
            places_mm=places.astype(np.float32),
            regions=self.regions,
        )


def read_mask(run: TrialRun) -> VoxelMask:
    """The mask of a run, with the order of its voxels.

    Raises
    ------
    InputDatasetError
        It is no 3-D image, has no voxel, or the segmentation is on another grid.
    """
    return read_mask_image(run.mask, run.segmentation)


def read_mask_image(path: Path, segmentation: Path | None = None) -> VoxelMask:
    """The voxels of a mask image; errors as for :func:`read_mask`."""
    data, affine = _volume(path)
    mask = np.isfinite(data) & (data > 0)
    if not mask.any():
        raise InputDatasetError("the mask holds no voxel", where=path, fix="make it from the region whose responses are decoded")
    regions = None
    if segmentation is not None:
        labels, other = _volume(segmentation)
        if labels.shape != mask.shape or np.abs(other - affine).max() > _PLACE_MM:
            raise InputDatasetError("the segmentation is on another grid than the mask", where=segmentation, fix="resample it with nearest neighbours")  # fmt: skip
        regions = labels.astype(np.int64)
    order = order_voxels(mask, regions)
    named = () if regions is None else tuple(str(value) for value in regions.ravel()[order])
    return VoxelMask(path=path, mask=mask, affine=affine, order=order, regions=named)


def read_table(run: TrialRun, num_trials: int) -> pd.DataFrame:
    """The run's table of trials, which must have one row per volume.

    Raises
    ------
    InputDatasetError
        It has another number of rows than the map has volumes.
    """
    table = read_trial_table(run.table)
    if len(table) != num_trials:
        raise InputDatasetError(
            f"the table has {len(table)} rows and the map {run.image.name} {num_trials} volumes",
            where=run.table,
            fix="give one row per volume, in the same order",
        )
    return table


def count_trials(run: TrialRun) -> int:
    """Volumes of a map, from its header."""
    with open_series(run.image) as (header, _):
        return header.num_frames


def read_responses(run: TrialRun, voxels: VoxelMask) -> Iterator[NDArray[np.float32]]:
    """(voxels,) responses of every trial in the stored order and in real units: memory is one volume.

    Raises
    ------
    InputDatasetError
        The map is on another grid than the mask, holds integers without a scale, or a voxel has no number.
    """
    scale = read_scale(run)
    with open_series(run.image) as (header, volumes):
        _check_grid(header, voxels)
        if header.dtype.kind in "iu" and scale is None and header.slope == 1.0:
            raise InputDatasetError(
                f"the responses are stored as {header.dtype} without a scale",
                where=run.image,
                fix='state it in the JSON beside, e.g. "Scale": 0.0033333 for NSD (percent signal change × 300)',
            )
        place = _stored_places(voxels, header.shape)
        factor = 1.0 if scale is None else scale
        for trial, volume in enumerate(volumes):
            values = (volume[place].astype(np.float64) * header.slope + header.intercept) * factor
            if not np.isfinite(values).all():
                raise InputDatasetError(
                    f"{int((~np.isfinite(values)).sum())} voxels of the mask have no number in volume {trial}",
                    where=run.image,
                    fix="leave these voxels out of the mask",
                )
            yield values.astype(np.float32)


def same_voxels(first: VoxelMask, other: VoxelMask) -> None:
    """Refuse a run whose mask is not the participant's.

    Raises
    ------
    InputDatasetError
        The masks differ.
    """
    if first.sha256 != other.sha256 or not np.array_equal(first.order, other.order):
        raise InputDatasetError(
            f"the mask differs from that of the participant's other runs ({first.path.name})",
            where=other.path,
            fix="use one mask and grid for all runs of a participant",
        )


def _check_grid(header: SeriesHeader, voxels: VoxelMask) -> None:
    if header.shape != voxels.mask.shape or np.abs(header.affine - voxels.affine).max() > _PLACE_MM:
        raise InputDatasetError(
            f"the map ({'×'.join(map(str, header.shape))}) is on another grid than the mask {voxels.path.name} ({'×'.join(map(str, voxels.mask.shape))})",
            where=header.path,
            fix="resample the mask to the map with nearest neighbours",
        )


def _stored_places(voxels: VoxelMask, shape: tuple[int, int, int]) -> NDArray[np.intp]:
    # volumes come in the file's Fortran order, the order of voxels is kept in C order
    return np.ravel_multi_index(np.unravel_index(voxels.order, shape), shape, order="F")


def _volume(path: Path) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    image = load_image(path)
    data: NDArray[np.float64] = read_voxels(path, image, np.float64)
    affine = np.asarray(image.affine, np.float64)
    if data.ndim == 4 and data.shape[3] == 1:
        data = data[..., 0]
    if data.ndim != 3:
        raise InputDatasetError(f"the image has {data.ndim} dimensions, not three", where=path, fix="give one volume")
    return data, affine
