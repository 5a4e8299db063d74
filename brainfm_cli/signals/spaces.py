"""Whether an atlas may be used in a space, and its labels on another grid."""

from __future__ import annotations

import importlib.util
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from brainfm_cli.atlases.templateflow import template_transform
from brainfm_cli.errors import InputDatasetError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from brainfm_cli.atlases.atlas import Atlas

Relation = Literal["same", "transform", "variant"]


def relation(atlas: Atlas, space: str) -> Relation:
    """How the atlas's template and the series' space relate, by name.

    ``transform`` where both are MNI152 variants and TemplateFlow's transform and antspyx are at hand, ``variant`` where
    they are not: the atlas is then used as it is.

    Raises
    ------
    InputDatasetError
        The two are different brains or different kinds of space.
    """
    if atlas.template == space:
        return "same"
    if not (_is_mni152(atlas.template) and _is_mni152(space)):
        raise InputDatasetError(
            f"atlas {atlas.name} is in {atlas.template}, the series in {space}: these spaces cannot be combined",
            fix=f"preprocess with {atlas.template} among the output spaces, or choose an atlas in {space}",
        )
    return "transform" if _transform(atlas.template, space) is not None else "variant"


def space_note(atlas: Atlas, space: str) -> str | None:
    """The sentence that a report must show about the atlas's space; none where it equals the series'."""
    kind = relation(atlas, space)
    if kind == "same":
        return None
    if kind == "transform":
        return f"atlas {atlas.name} was moved from {atlas.template} to {space} with TemplateFlow's transform"
    stated = "an MNI152 space whose variant its authors do not state" if atlas.template == "MNI152" else atlas.template
    return (
        f"atlas {atlas.name} is in {stated}, the series in {space}; no transform is at hand, so it was used as it is: "
        "expect borders to be off by a few millimetres"
    )


def labels_on_grid(
    atlas: Atlas, space: str, shape: tuple[int, int, int], affine: NDArray[np.float64]
) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
    """The atlas's labels on a grid, and the number of voxels that each region would have on that grid without its borders.

    The first is (x, y, z), nearest neighbour, equal to nilearn's ``resample_to_img``; the second (regions,), larger than
    what the grid holds where the field of view cuts a region.
    """
    labels, own_affine = atlas.load()
    path = _transform(atlas.template, space) if relation(atlas, space) == "transform" else None

    def place(target_shape: tuple[int, int, int], target_affine: NDArray[np.float64]) -> NDArray[np.int32]:
        if path is not None:
            return _warp(labels, own_affine, path, target_shape, target_affine)
        return resample_nearest(labels, own_affine, target_shape, target_affine)

    before, after = _overhang(labels, own_affine, shape, affine)
    if not before.any() and not after.any():
        placed = place(shape, affine)
        return placed, _count(placed, atlas.values)
    wide_affine = affine.copy()
    wide_affine[:3, 3] -= affine[:3, :3] @ before
    wide_shape = tuple(int(size) for size in np.asarray(shape) + before + after)
    wide = place((wide_shape[0], wide_shape[1], wide_shape[2]), wide_affine)
    return place(shape, affine), _count(wide, atlas.values)


def resample_nearest(
    labels: NDArray[np.int32], own_affine: NDArray[np.float64], shape: tuple[int, int, int], affine: NDArray[np.float64]
) -> NDArray[np.int32]:
    """Labels on another grid by nearest neighbour, 0 outside; voxel for voxel what nilearn gives."""
    from scipy.ndimage import affine_transform

    if labels.shape == shape and np.allclose(own_affine, affine):
        return labels
    transform = np.linalg.inv(own_affine) @ affine
    matrix = transform[:3, :3]
    if np.all(np.diag(np.diag(matrix)) == matrix):
        # Ties between two voxels fall differently in scipy's diagonal algorithm; nilearn uses that one.
        matrix = np.diag(matrix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy reminds of a change of 2016
        return affine_transform(labels, matrix, offset=transform[:3, 3], output_shape=shape, order=0, cval=0)


def _is_mni152(template: str) -> bool:
    # Colin27 is the single brain that was registered to MNI152's predecessor and on which AAL was drawn.
    return template.startswith("MNI152") or template == "MNIColin27"


def _transform(template: str, space: str) -> Path | None:
    if importlib.util.find_spec("ants") is None:
        return None
    return template_transform(moving=template, fixed=space)


def _overhang(
    labels: NDArray[np.int32], own_affine: NDArray[np.float64], shape: tuple[int, int, int], affine: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Grid voxels missing before and behind each axis to hold every labelled voxel."""
    extent = []
    for axis in range(3):
        held = np.flatnonzero(labels.any(axis=tuple(other for other in range(3) if other != axis)))
        extent.append((held[0] - 0.5, held[-1] + 0.5) if held.size else (0.0, 0.0))
    corners = np.array(np.meshgrid(*extent, indexing="ij")).reshape(3, -1)
    to_grid = np.linalg.inv(affine) @ own_affine
    reached = to_grid[:3, :3] @ corners + to_grid[:3, 3:]
    before = np.maximum(0, np.ceil(-0.5 - reached.min(1) - 1e-6)).astype(np.int64)
    after = np.maximum(0, np.ceil(reached.max(1) - (np.asarray(shape) - 0.5) - 1e-6)).astype(np.int64)
    return before, after


def _count(labels: NDArray[np.int32], values: tuple[int, ...]) -> NDArray[np.int64]:
    found, count = np.unique(labels, return_counts=True)
    by_value = dict(zip(found.tolist(), count.tolist(), strict=True))
    return np.array([by_value.get(value, 0) for value in values], np.int64)


def _warp(
    labels: NDArray[np.int32], own_affine: NDArray[np.float64], path: Path, shape: tuple[int, int, int], affine: NDArray[np.float64]
) -> NDArray[np.int32]:
    """Labels moved through an ITK transform; ants does it, on files, which carry the orientation."""
    import ants
    import nibabel as nib

    with tempfile.TemporaryDirectory() as folder:
        moving, fixed = Path(folder) / "labels.nii.gz", Path(folder) / "grid.nii.gz"
        nib.save(nib.Nifti1Image(labels.astype(np.int32), own_affine), moving)
        nib.save(nib.Nifti1Image(np.zeros(shape, np.uint8), affine), fixed)
        moved = ants.apply_transforms(
            fixed=ants.image_read(str(fixed)),
            moving=ants.image_read(str(moving)),
            transformlist=[str(path)],
            interpolator="nearestNeighbor",
        )
        return np.rint(moved.numpy()).astype(np.int32)
