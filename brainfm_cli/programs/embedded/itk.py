"""The border to antspyx: images to ITK, registration, warps. The only module that imports ants."""

from __future__ import annotations

import os
import shutil
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from brainfm_cli.errors import InputDatasetError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    Volume = NDArray[np.float32]
    Matrix = NDArray[np.float64]

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK counts left and posterior positive
_MAX_SHEAR = 1e-3
Interpolation = Literal["linear", "nearestNeighbor", "lanczosWindowedSinc", "bSpline"]


def prepare(threads: int, seed: int) -> None:
    """Say how many threads ITK may use, before it is imported: it asks once per process."""
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = str(threads)
    os.environ["ANTS_RANDOM_SEED"] = str(seed)


@cache
def _ants() -> Any:  # noqa: ANN401  (antspyx has no types)
    import ants

    return ants


def to_itk(data: NDArray[Any], affine: Matrix) -> Any:  # noqa: ANN401
    """An ITK image of (x, y, z) values.

    Raises
    ------
    InputDatasetError
        The axes of the grid are not at right angles, which ITK cannot express.
    """
    lps = _LPS @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    direction = lps[:3, :3] / spacing
    if np.abs(direction.T @ direction - np.eye(3)).max() > _MAX_SHEAR:
        raise InputDatasetError("the axes of the image are not at right angles", fix="convert the image again from DICOM")
    left, _, right = np.linalg.svd(direction)
    values = np.ascontiguousarray(data, np.float32)
    return _ants().from_numpy(values, origin=lps[:3, 3].tolist(), spacing=spacing.tolist(), direction=left @ right)


def register(
    fixed: tuple[Volume, Matrix],
    moving: tuple[Volume, Matrix],
    kind: str,
    folder: Path,
    *,
    name: str,
    seed: int,
    fixed_mask: NDArray[np.bool_] | None = None,
    start: Path | None = None,
    options: Mapping[str, Any],
) -> tuple[Path, Path]:
    """Register and write both composite transforms as ``.h5``: the one that brings moving images onto fixed, and its inverse.

    Parameters
    ----------
    kind
        ``type_of_transform`` of antspyx.
    options
        Further options of ``ants.registration``.
    """
    prefix = folder / f"{name}_"
    found = _ants().registration(
        to_itk(*fixed),
        to_itk(*moving),
        type_of_transform=kind,
        outprefix=str(prefix),
        write_composite_transform=True,
        random_seed=seed,
        **({} if fixed_mask is None else {"mask": to_itk(fixed_mask, fixed[1])}),
        **({} if start is None else {"initial_transform": str(start)}),
        **options,
    )
    forward, inverse = folder / f"{name}_forward.h5", folder / f"{name}_inverse.h5"
    shutil.move(found["fwdtransforms"], forward)
    shutil.move(found["invtransforms"], inverse)
    return forward, inverse


def warp(
    data: NDArray[Any],
    affine: Matrix,
    shape: Sequence[int],
    target: Matrix,
    transforms: Sequence[Path],
    *,
    interpolation: Interpolation = "linear",
    outside: float = 0.0,
) -> Volume:
    """A moving image on the grid of the fixed one; of several transforms the last is applied to the moving image first."""
    image = _ants().apply_transforms(
        to_itk(np.zeros(tuple(shape), np.float32), target),
        to_itk(data, affine),
        transformlist=[str(path) for path in transforms],
        interpolator=interpolation,
        defaultvalue=outside,
    )
    return np.asarray(image.numpy(), np.float32)


def mapped_points(shape: Sequence[int], target: Matrix, transforms: Sequence[Path]) -> Volume:
    """(x, y, z, 3) where each voxel of the fixed grid comes from in the moving space, RAS millimetres.

    Two voxels to a side, far apart, make an image of a coordinate: linear interpolation of what is linear is exact.
    """
    far = 500.0  # millimetres; nothing in a scanner lies further out
    affine = np.diag([2 * far, 2 * far, 2 * far, 1.0])
    affine[:3, 3] = -far
    corner = np.array([-far, far], np.float32)
    grids = np.meshgrid(corner, corner, corner, indexing="ij")
    return np.stack([warp(grid, affine, shape, target, transforms) for grid in grids], -1)


def matrix_of(transform: Path) -> Matrix:
    """(4, 4) matrix of an affine transform's file, fixed points to moving points, RAS millimetres."""
    affine = np.diag([100.0, 100.0, 100.0, 1.0])
    affine[:3, 3] = -50
    corners = np.stack(np.meshgrid(*[[-50.0, 50.0]] * 3, indexing="ij"), -1).reshape(-1, 3)
    moved = mapped_points((2, 2, 2), affine, [transform]).reshape(-1, 3).astype(np.float64)
    solution = np.linalg.lstsq(np.c_[corners, np.ones(8)], moved, rcond=None)[0]
    matrix = np.eye(4)
    matrix[:3] = solution.T
    return matrix
