"""Average a 4-D series over the regions of many atlases in one pass, a few volumes in memory at a time.

Where eight atlases overlap, a voxel would be read eight times. The voxels are therefore first summed over the *cells*
that no atlas divides further, once per frame, and one sparse matrix then adds cells up to the regions of all atlases.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfm_cli.bids.images import load_image, read_voxels
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.signals.spaces import labels_on_grid
from brainfm_cli.signals.volumes import open_series

if TYPE_CHECKING:
    from collections.abc import Hashable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray
    from scipy.sparse import csr_array

    from brainfm_cli.atlases.atlas import Atlas
    from brainfm_cli.signals.volumes import SeriesHeader

_FRAMES_AT_ONCE = 32
_MASKS_KEPT = 4
_MASK_REMEDY = "give the brain mask that preprocessing wrote beside the image"


@dataclass(frozen=True, kw_only=True)
class RegionAverages:
    """One run's region means in one atlas."""

    series: NDArray[np.float64]
    """(frames, regions) means over the voxels inside the mask; NaN for a region without such a voxel."""
    coverage: NDArray[np.float64]
    """(regions,) share of each region's voxels inside the mask, 0 to 1; what the field of view cuts off counts as outside."""


@dataclass(frozen=True, kw_only=True)
class _Grid:
    """Labels of all atlases on one grid: only voxels that lie in a region of some atlas."""

    voxels: NDArray[np.int64]
    """Positions in a flat volume of Fortran order."""
    cells: NDArray[np.int64]
    """(voxels,) cell of each."""
    num_cells: int
    """Number of cells."""
    members: tuple[NDArray[np.int64], NDArray[np.int64]]
    """Pairs of region, counted over all atlases, and cell: which cells make up each region."""
    full_sizes: NDArray[np.int64]
    """(regions of all atlases,) voxels of each region on an unlimited grid."""


@dataclass(frozen=True, kw_only=True)
class _Operator:
    """What turns volumes on one grid with one mask into region means."""

    voxels: NDArray[np.int64]
    """Positions of the voxels that are read."""
    cells: NDArray[np.int64]
    """(voxels,) cell of each."""
    means: csr_array
    """(regions of all atlases, cells): 1 / voxels of the region."""
    sizes: NDArray[np.int64]
    """(regions of all atlases,) voxels inside the mask."""
    full_sizes: NDArray[np.int64]
    """(regions of all atlases,) voxels inside and outside."""


# Participants share few grids but no masks; both are kept for the runs that follow in the same process.
_grids: OrderedDict[Hashable, _Grid] = OrderedDict()
_operators: OrderedDict[Hashable, _Operator] = OrderedDict()


def average_regions(path: Path, atlases: Sequence[Atlas], *, space: str, mask: Path) -> list[RegionAverages]:
    """Region means of the series ``path`` in each atlas, from one pass over its volumes.

    Sums are float64, whatever the file holds. Voxels outside the mask or outside every region are never looked at.

    Raises
    ------
    InputNotFoundError
        The image or the mask does not exist.
    InputDatasetError
        The image cannot be read, the mask is empty, unreadable or on another grid, an atlas does not fit the space, or a
        region holds values that are no finite numbers.
    """
    with open_series(path) as (header, volumes):
        operator = _operator(header, atlases, space, mask)
        means = _average(operator, header, volumes)
    covered = operator.sizes > 0
    _check_finite(means, covered, header)
    means = means * header.slope + header.intercept  # linear, so it may follow the averaging
    means[:, ~covered] = np.nan
    coverage = operator.sizes / np.maximum(operator.full_sizes, 1)
    edges = np.cumsum([0, *(atlas.num_regions for atlas in atlases)])
    return [RegionAverages(series=means[:, start:stop], coverage=coverage[start:stop]) for start, stop in pairwise(edges)]


def _average(operator: _Operator, header: SeriesHeader, volumes: Iterator[NDArray[Any]]) -> NDArray[np.float64]:
    """(frames, regions of all atlases) means in stored units."""
    num_cells = operator.means.shape[1]
    means = np.empty((header.num_frames, operator.means.shape[0]))
    sums = np.empty((num_cells, _FRAMES_AT_ONCE))
    for frame, volume in enumerate(volumes):
        column = frame % _FRAMES_AT_ONCE
        with np.errstate(invalid="ignore"):
            sums[:, column] = np.bincount(operator.cells, weights=volume.take(operator.voxels), minlength=num_cells)
        if column == _FRAMES_AT_ONCE - 1 or frame == header.num_frames - 1:
            means[frame - column : frame + 1] = (operator.means @ sums[:, : column + 1]).T
    return means


def _check_finite(means: NDArray[np.float64], covered: NDArray[np.bool_], header: SeriesHeader) -> None:
    bad = ~np.isfinite(means[:, covered])
    if bad.any():
        frames = np.flatnonzero(bad.any(1))
        raise InputDatasetError(
            f"voxels inside the brain mask hold no finite number in {len(frames)} of {header.num_frames} frames, first in frame {frames[0]}",
            where=header.path, fix="run preprocessing again for this participant, or leave the run out",
        )  # fmt: skip


def _operator(header: SeriesHeader, atlases: Sequence[Atlas], space: str, mask: Path) -> _Operator:
    inside = read_mask(mask, header)
    atlas_keys = tuple((atlas.label, atlas.template, atlas.source) for atlas in atlases)
    grid_key = (header.shape, header.affine.tobytes(), space, atlas_keys)
    key = (grid_key, hashlib.sha256(np.packbits(inside).tobytes()).digest())
    if key not in _operators:
        if grid_key not in _grids:
            _grids.clear()  # one grid at a time: the labels of eight atlases are tens of megabytes
            _grids[grid_key] = _grid(header, atlases, space)
        while len(_operators) >= _MASKS_KEPT:
            _operators.popitem(last=False)
        _operators[key] = _build(_grids[grid_key], inside)
    return _operators[key]


def read_mask(path: Path, header: SeriesHeader) -> NDArray[np.bool_]:
    """(voxels,) the brain mask of a series in its Fortran order, checked to be on the same grid and not empty.

    Raises
    ------
    InputDatasetError
        Unreadable, on another grid, or empty.
    """
    image = load_image(path, what="the brain mask", fix=_MASK_REMEDY)
    data, affine = read_voxels(path, image, what="the brain mask", fix=_MASK_REMEDY), np.asarray(image.affine)
    if data.shape != header.shape or not np.allclose(affine, header.affine, atol=1e-3):
        raise InputDatasetError(
            f"the brain mask {data.shape} and the series {header.shape} lie on different grids", where=path, fix=_MASK_REMEDY
        )
    inside = data.reshape(-1, order="F") > 0
    if not inside.any():
        raise InputDatasetError("the brain mask is empty", where=path, fix="check registration; run preprocessing again")
    return inside


def _grid(header: SeriesHeader, atlases: Sequence[Atlas], space: str) -> _Grid:
    rows, sizes, first = [], [], 0
    for atlas in atlases:
        labels, full = labels_on_grid(atlas, space, header.shape, header.affine)
        row_of = np.full(max(int(labels.max()), *atlas.values) + 1, -1, np.int32)
        row_of[list(atlas.values)] = np.arange(first, first + atlas.num_regions, dtype=np.int32)
        rows.append(row_of[labels.reshape(-1, order="F")])
        sizes.append(full)
        first += atlas.num_regions
    stacked = np.stack(rows)
    voxels = np.flatnonzero((stacked >= 0).any(0))
    regions = stacked[:, voxels]
    cells = np.zeros(len(voxels), np.int64)
    for row in regions:
        # cells so far, divided further by this atlas
        _, cells = np.unique(cells * (first + 1) + (row + 1), return_inverse=True)
    num_cells = int(cells.max(initial=-1)) + 1
    of_cell = np.empty((len(regions), num_cells), np.int64)
    of_cell[:, cells] = regions  # all voxels of a cell have the same regions
    row_of_pair, cell = np.nonzero(of_cell >= 0)
    members = (of_cell[row_of_pair, cell], cell)
    return _Grid(voxels=voxels, cells=cells, num_cells=num_cells, members=members, full_sizes=np.concatenate(sizes))


def _build(grid: _Grid, inside: NDArray[np.bool_]) -> _Operator:
    """Only counting depends on the mask: the cells are those of the grid, of which the mask may empty some."""
    from scipy.sparse import csr_array

    chosen = inside[grid.voxels]
    voxels, cells = grid.voxels[chosen], grid.cells[chosen]
    voxels_of_cell = np.bincount(cells, minlength=grid.num_cells)
    regions, of_region = grid.members
    sizes = np.bincount(regions, weights=voxels_of_cell[of_region], minlength=len(grid.full_sizes)).astype(np.int64)
    weights = 1.0 / np.maximum(sizes[regions], 1)
    means = csr_array((weights, (regions, of_region)), shape=(len(grid.full_sizes), grid.num_cells))
    return _Operator(voxels=voxels, cells=cells, means=means, sizes=sizes, full_sizes=grid.full_sizes)
