"""Average a CIFTI dense series over the parcels of dlabel atlases, a block of grayordinates at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from brainfm_cli.bids.images import load_image
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.signals.parcellation import RegionAverages
from brainfm_cli.signals.spaces import relation

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from brainfm_cli.atlases.atlas import Atlas

_BLOCK_NUMBERS = 1 << 22  # numbers read at once: 32 MB as float64, whatever the length of the series


def average_grayordinates(path: Path, atlases: Sequence[Atlas], *, space: str) -> list[RegionAverages]:
    """Region means of a dense series in each dlabel atlas.

    A grayordinate without signal (constant, or NaN throughout) counts as not covered, as in Connectome Workbench.

    Raises
    ------
    InputNotFoundError
        The series does not exist.
    InputDatasetError
        A file is unreadable or of another kind, an atlas is on another surface mesh or in another space, or a grayordinate
        has some frames without a finite number.
    """
    for atlas in atlases:
        relation(atlas, space)
    image = _load(path)
    time, grayordinates = (image.header.get_axis(axis) for axis in range(2))
    if not hasattr(grayordinates, "iter_structures") or not hasattr(time, "step"):
        raise InputDatasetError("the image is no dense series", where=path, fix="give a .dtseries.nii")
    if len(time) < 2:
        raise InputDatasetError("the series has one frame", where=path, fix="give a BOLD series of many frames")
    placed = [_labels(atlas, grayordinates) for atlas in atlases]
    sums = [np.zeros((len(time), atlas.num_regions)) for atlas in atlases]
    counts = [np.zeros(atlas.num_regions, np.int64) for atlas in atlases]
    width = max(1, _BLOCK_NUMBERS // len(time))
    for start in range(0, len(grayordinates), width):
        block = _block(image, path, start, start + width)
        alive = _alive(block, path, start)
        for (regions, _), total, count in zip(placed, sums, counts, strict=True):
            chosen = regions[start : start + width]
            used = np.flatnonzero((chosen >= 0) & alive)
            np.add.at(total.T, chosen[used], block[:, used].T)
            np.add.at(count, chosen[used], 1)
    averages = []
    for (_, full), total, count in zip(placed, sums, counts, strict=True):
        with np.errstate(invalid="ignore"):
            averages.append(RegionAverages(series=total / count, coverage=count / np.maximum(full, 1)))
    return averages


def _load(path: Path) -> Any:  # noqa: ANN401  (nibabel's CIFTI classes have no types)
    import nibabel as nib

    image = load_image(path, what="the CIFTI file", fix="copy the file again from its source")
    if not isinstance(image, nib.Cifti2Image):
        raise InputDatasetError("the image is no CIFTI-2 file", where=path, fix="give a .dtseries.nii or .dlabel.nii")
    return image


def _block(image: Any, path: Path, start: int, stop: int) -> NDArray[np.float64]:  # noqa: ANN401
    """(frames, grayordinates) of one block."""
    try:
        return np.asarray(image.dataobj[:, start:stop], np.float64)
    except (OSError, EOFError, ValueError) as error:
        raise InputDatasetError(f"the image is truncated: {error}", where=path, fix="copy the file again from its source") from error


def _alive(block: NDArray[np.float64], path: Path, start: int) -> NDArray[np.bool_]:
    finite = np.isfinite(block)
    partly = finite.any(0) & ~finite.all(0)
    if partly.any():
        column = int(np.flatnonzero(partly)[0])
        frame = int(np.flatnonzero(~finite[:, column])[0])
        raise InputDatasetError(
            f"grayordinate {start + column} holds no finite number in frame {frame}", where=path, fix="run preprocessing again"
        )
    return finite.all(0) & (np.ptp(np.where(finite, block, 0.0), axis=0) > 0)


def _labels(atlas: Atlas, grayordinates: Any) -> tuple[NDArray[np.int64], NDArray[np.int64]]:  # noqa: ANN401
    """(grayordinates,) region of each element of the series, -1 for none; and the size of each region in the atlas."""
    if atlas.path is None:
        raise InputDatasetError(f"atlas {atlas.name} has no dlabel file", fix="choose a CIFTI atlas")
    image = _load(atlas.path)
    own = image.header.get_axis(1)
    if not hasattr(own, "iter_structures") or not hasattr(image.header.get_axis(0), "label"):
        raise InputDatasetError(f"atlas {atlas.name} is no dense label file", where=atlas.path, fix="give a .dlabel.nii")
    keys = np.rint(np.asarray(image.dataobj[0, :], np.float64)).astype(np.int64)
    row_of = {value: row for row, value in enumerate(atlas.values)}
    rows = np.array([row_of.get(int(key), -1) for key in keys], np.int64)
    unknown = sorted(set(keys.tolist()) - set(row_of) - {0})
    if unknown:
        raise InputDatasetError(
            f"atlas {atlas.name}: labels without a name: {unknown[:5]}", where=atlas.path, fix="give the table one row per label"
        )
    by_structure = {name: (model, rows[part]) for name, part, model in own.iter_structures()}
    placed = np.full(len(grayordinates), -1, np.int64)
    for name, part, model in grayordinates.iter_structures():
        if name in by_structure:
            placed[part] = _match(model, *by_structure[name], atlas=atlas, structure=name)
    return placed, np.bincount(rows[rows >= 0], minlength=atlas.num_regions)


def _match(model: Any, own: Any, rows: NDArray[np.int64], *, atlas: Atlas, structure: str) -> NDArray[np.int64]:  # noqa: ANN401
    """Regions of one structure's elements, matched by vertex or voxel."""
    sizes = model.nvertices.get(structure), own.nvertices.get(structure)
    if sizes[0] != sizes[1]:
        raise InputDatasetError(
            f"{structure}: atlas {atlas.name} has {sizes[1]} vertices, the series {sizes[0]}",
            where=atlas.path, fix="choose an atlas on the same surface mesh",
        )  # fmt: skip
    if sizes[0] is not None:
        of_vertex = np.full(sizes[0], -1, np.int64)
        of_vertex[own.vertex] = rows
        return of_vertex[model.vertex]
    if not np.allclose(model.affine, own.affine, atol=1e-3):
        raise InputDatasetError(f"{structure}: atlas {atlas.name} and the series lie on different grids", where=atlas.path, fix="choose an atlas on the same grid")  # fmt: skip
    of_voxel = {tuple(voxel): int(row) for voxel, row in zip(own.voxel.tolist(), rows, strict=True)}
    return np.array([of_voxel.get(tuple(voxel), -1) for voxel in model.voxel.tolist()], np.int64)
