"""Head motion: each volume of a series rigidly aligned to one reference by Gauss-Newton. Pure numbers, nothing is written.

The warp is inverse-compositional (Baker & Matthews 2004): derivatives belong to the reference, so that Jacobian and
pseudo-inverse are computed once per run. A volume's brightness and offset are fitted beside its motion, because the
first frames of a run are brighter than the rest.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.signals.transforms import rigid

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Volume = NDArray[np.float32]
    Matrix = NDArray[np.float64]

_FINE_SIGMA, _COARSE_SIGMA = 0.8, 2.0  # voxels
_FINE_POINTS, _COARSE_POINTS = 25_000, 6_000  # more points gain nothing measurable: docs/performance.md
_FOREGROUND = 0.2  # of the 98th percentile
_MAX_ITERATIONS = 8
_STOP_MM, _STOP_RAD = 2e-3, 2e-5
_CHUNK = 16  # frames that start from one another; fixed, so that threads do not change results
_REFERENCE_FRAMES = 16
_MIN_POINTS = 200


@dataclass(frozen=True, kw_only=True, eq=False)
class Level:
    """The reference at one smoothness, ready for Gauss-Newton."""

    sigma: float
    """Gaussian in voxels, applied to reference and volumes alike."""
    order: int
    """Spline order of interpolation."""
    points: NDArray[np.float64]
    """(3, points) voxel coordinates of the foreground."""
    values: NDArray[np.float64]
    """(points,) smoothed intensity of the reference."""
    inverse: NDArray[np.float64]
    """(6, points) rows of the pseudo-inverse that give the motion."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Target:
    """What volumes are aligned to."""

    shape: tuple[int, int, int]
    """Voxels of the grid, which all volumes share."""
    affine: Matrix
    """(4, 4) voxels to RAS millimetres."""
    centre: NDArray[np.float64]
    """(3,) rotation centre of the updates, RAS millimetres."""
    levels: tuple[Level, ...]
    """Coarse to fine."""


def build_target(reference: Volume, affine: Matrix) -> Target:
    """The reference with its derivatives.

    Raises
    ------
    InputDatasetError
        The image has next to no foreground.
    """
    shape = reference.shape
    centre = affine[:3, :3] @ (0.5 * (np.asarray(shape) - 1)) + affine[:3, 3]
    levels = (
        _build_level(reference, affine, centre, sigma=_COARSE_SIGMA, order=1, limit=_COARSE_POINTS),
        _build_level(reference, affine, centre, sigma=_FINE_SIGMA, order=3, limit=_FINE_POINTS),
    )
    return Target(shape=(shape[0], shape[1], shape[2]), affine=affine, centre=centre, levels=levels)


def align(target: Target, volume: Volume, start: Matrix) -> Matrix:
    """(4, 4) rigid transform from reference points to the volume's points, RAS millimetres."""
    to_voxels = np.linalg.inv(target.affine)
    transform = start
    for level in target.levels:
        smooth = ndimage.gaussian_filter(volume, level.sigma, mode="nearest")
        if level.order > 1:
            smooth = ndimage.spline_filter(smooth, level.order, output=np.float32, mode="nearest")
        for _ in range(_MAX_ITERATIONS):
            step = _step(level, target, smooth, to_voxels @ transform @ target.affine)
            transform = transform @ np.linalg.inv(rigid(step, target.centre))
            if np.abs(step[:3]).max() < _STOP_MM and np.abs(step[3:]).max() < _STOP_RAD:
                break
    return transform


def realign(read: Callable[[int], Volume], frames: Sequence[int], target: Target, *, threads: int = 1) -> Matrix:
    """(frames, 4, 4) transforms from reference points to the points of each frame.

    Parameters
    ----------
    read
        Gives one frame, free of NaN; called from several threads where ``threads`` exceeds one.
    """
    chunks = [frames[start : start + _CHUNK] for start in range(0, len(frames), _CHUNK)]

    def follow(chunk: Sequence[int]) -> list[Matrix]:
        found, transform = [], np.eye(4)
        for frame in chunk:
            transform = align(target, read(frame), transform)
            found.append(transform)
        return found

    with ThreadPoolExecutor(threads) as pool:
        return np.stack([transform for chunk in pool.map(follow, chunks) for transform in chunk])


def average_reference(read: Callable[[int], Volume], frames: Sequence[int], affine: Matrix, *, threads: int = 1) -> Volume:
    """Mean of up to 16 frames spread over the run, each moved onto the middle one: (x, y, z).

    A mean is less noisy than any single frame, and the noise of the reference biases every alignment to it.
    """
    chosen = [frames[index] for index in np.unique(np.linspace(0, len(frames) - 1, _REFERENCE_FRAMES).round().astype(int))]
    middle = read(chosen[len(chosen) // 2])
    if len(chosen) == 1:
        return middle.copy()
    target = build_target(middle, affine)
    total = np.zeros(middle.shape, np.float64)
    for frame, transform in zip(chosen, realign(read, chosen, target, threads=threads), strict=True):
        total += move(read(frame), affine, transform)
    return (total / len(chosen)).astype(np.float32)


def move(volume: Volume, affine: Matrix, transform: Matrix) -> Volume:
    """A volume resampled on its own grid through a transform, by cubic splines; edges continue outwards."""
    matrix = np.linalg.inv(affine) @ transform @ affine
    return ndimage.affine_transform(volume, matrix[:3, :3], matrix[:3, 3], order=3, mode="nearest", output=np.float32)


def _step(level: Level, target: Target, smooth: Volume, to_volume: Matrix) -> NDArray[np.float64]:
    places = to_volume[:3, :3] @ level.points + to_volume[:3, 3:]
    found = ndimage.map_coordinates(smooth, places, order=level.order, mode="nearest", prefilter=False, output=np.float64)
    residual = found - level.values
    beyond = ((places < 0) | (places > np.asarray(target.shape)[:, None] - 1)).any(0)
    residual[beyond] = 0  # a point out of the field of view says nothing
    return level.inverse @ residual


def _build_level(reference: Volume, affine: Matrix, centre: NDArray[np.float64], *, sigma: float, order: int, limit: int) -> Level:
    smooth = ndimage.gaussian_filter(reference, sigma, mode="nearest").astype(np.float64)
    foreground = smooth > _FOREGROUND * np.percentile(smooth, 98)
    for axis in range(3):  # the outermost slices have no neighbour to take a derivative from
        np.moveaxis(foreground, axis, 0)[[0, -1]] = False
    index = np.flatnonzero(foreground)
    if len(index) < _MIN_POINTS:
        raise InputDatasetError(
            f"the BOLD reference has {len(index)} foreground voxels",
            fix="look at the series: it seems to be empty, or to have very few slices",
        )
    if len(index) > limit:
        index = index[np.linspace(0, len(index) - 1, limit).astype(int)]
    points = np.stack(np.unravel_index(index, reference.shape)).astype(np.float64)
    coefficients = ndimage.spline_filter(smooth, order, mode="nearest") if order > 1 else smooth
    gradient = _gradient(coefficients, points, order)
    per_mm = np.linalg.inv(affine[:3, :3]).T @ gradient
    arm = affine[:3, :3] @ points + affine[:3, 3:] - centre[:, None]
    turning = np.cross(arm.T, per_mm.T)
    values = smooth.ravel()[index]
    design = np.concatenate([per_mm.T, turning, values[:, None], np.ones((len(index), 1))], 1)
    scale = np.linalg.norm(design, axis=0)
    inverse = np.linalg.pinv(design / scale) / scale[:, None]
    return Level(sigma=sigma, order=order, points=points, values=values, inverse=inverse[:6])


def _gradient(coefficients: NDArray[np.float64], points: NDArray[np.float64], order: int) -> NDArray[np.float64]:
    """(3, points) derivative of the interpolated image along each voxel axis."""
    reach = 0.1 if order > 1 else 1.0  # voxels
    steps = np.eye(3) * reach

    def look(places: NDArray[np.float64]) -> NDArray[np.float64]:
        return ndimage.map_coordinates(coefficients, places, order=order, mode="nearest", prefilter=False)

    return np.stack([(look(points + step[:, None]) - look(points - step[:, None])) / (2 * reach) for step in steps])
