"""Images between grids without ITK: read as RAS, coarser copies, points looked up by splines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from brainfm_cli.errors import InputDatasetError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Volume = NDArray[np.float32]
    Matrix = NDArray[np.float64]


def read_ras(path: Path) -> tuple[Volume, Matrix]:
    """(x, y, z) values with axes towards right, anterior, superior, and the (4, 4) affine; NaN and infinities are 0.

    Of a diffusion series the first volume, which has no diffusion weighting by convention.

    Raises
    ------
    InputDatasetError
        The image cannot be read, or holds nothing.
    """
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError

    try:
        image: Any = nib.as_closest_canonical(nib.load(path))
        values = np.asarray(image.dataobj[..., 0] if image.ndim == 4 else image.dataobj, np.float32)
    except (ImageFileError, OSError, EOFError, ValueError) as error:
        raise InputDatasetError(f"the image cannot be read: {error}", where=path, fix="convert or copy it again") from error
    values = np.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
    if values.max() <= values.min():
        raise InputDatasetError("the image holds one value everywhere", where=path, fix="look at the image: it seems to be empty")
    return values, np.asarray(image.affine, np.float64)


def zooms_of(affine: Matrix) -> NDArray[np.float64]:
    """(3,) voxel size in millimetres."""
    return np.linalg.norm(affine[:3, :3], axis=0)


def coarser(values: NDArray[Any], affine: Matrix, size_mm: float) -> tuple[Volume, Matrix]:
    """Means over blocks of whole voxels of about ``size_mm``; the image itself where its voxels are that large."""
    factors = np.maximum(1, np.rint(size_mm / zooms_of(affine))).astype(int)
    blocks = [max(1, size // factor) for size, factor in zip(values.shape, factors, strict=True)]
    kept = values[tuple(slice(0, count * factor) for count, factor in zip(blocks, factors, strict=True))]
    means = kept.reshape([part for pair in zip(blocks, factors, strict=True) for part in pair]).mean((1, 3, 5), dtype=np.float32)
    changed = affine.copy()
    changed[:3, :3] = affine[:3, :3] * factors
    changed[:3, 3] = affine[:3, 3] + affine[:3, :3] @ (0.5 * (factors - 1))
    return means, changed


def on_grid(values: NDArray[Any], affine: Matrix, shape: Sequence[int], target: Matrix, *, order: int = 1) -> Volume:
    """An image on another grid of the same space; 0 outside of it."""
    matrix = np.linalg.inv(affine) @ target
    if values.shape == tuple(shape) and np.allclose(matrix, np.eye(4), atol=1e-6):
        return np.array(values, np.float32)
    return ndimage.affine_transform(
        np.asarray(values, np.float32), matrix[:3, :3], matrix[:3, 3], tuple(shape), order=order, mode="constant", output=np.float32
    )


def box_around(mask: NDArray[np.bool_], margin: int) -> tuple[slice, slice, slice]:
    """Smallest box that holds a mask, with a margin in voxels.

    Raises
    ------
    InputDatasetError
        The mask is empty.
    """
    found = ndimage.find_objects(mask.astype(np.int8))
    if not found:
        raise InputDatasetError("the brain mask is empty", fix="look at the structural image")
    first, second, third = (slice(max(0, part.start - margin), part.stop + margin) for part in found[0])
    return first, second, third


def moved_affine(affine: Matrix, box: Sequence[slice]) -> Matrix:
    """The affine of a box cut out of an image."""
    changed = affine.copy()
    changed[:3, 3] += affine[:3, :3] @ [part.start for part in box]
    return changed
