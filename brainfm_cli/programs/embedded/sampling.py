"""One-step resampling: each frame as acquired is interpolated once, through head motion, coregistration and template warp together."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from brainfm_cli.bids.derivatives import temporary_path
from brainfm_cli.bids.images import write_image, write_series
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.programs.embedded import itk
from brainfm_cli.programs.embedded.functional import Series, open_stored
from brainfm_cli.programs.embedded.gates import Gate
from brainfm_cli.programs.embedded.template import output_grid
from brainfm_cli.signals.transforms import read_itk

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from brainfm_cli.programs.embedded.settings import EmbeddedSettings

    Volume = NDArray[np.float32]
    Points = NDArray[np.float32]
    Matrix = NDArray[np.float64]

_MARGIN = 2  # voxels around the brain mask that are written too
_SEEN = 0.9  # of the frames in which a voxel must lie inside the field of view
_INTEGER_RANGE = (1000.0, 25_000.0)  # largest values that integers hold without loss that matters, overshoot of splines included


def resample_run(
    folder: Path, about: str, masks: str, motion: str, coreg: str, forward: str, brain: str, settings: EmbeddedSettings, threads: int
) -> tuple[dict[str, str], dict[str, Any]]:
    """The run in template space and, inside the native brain mask, on the reference's grid.

    Returns
    -------
    tuple
        Files: ``bold``, ``mask``, ``boldref`` in template space and ``native``, a (frames, voxels) array. And the gate of coverage.

    Raises
    ------
    InputDatasetError
        Too little of the brain lies inside the field of view.
    """
    import nibabel as nib

    series = open_stored(about)
    moves = read_itk(Path(motion))
    shape, target = output_grid(settings.resolution)
    brain_image: Any = nib.load(brain)
    inside = np.asarray(brain_image.dataobj) > 0
    written = np.asarray(ndimage.binary_dilation(inside, iterations=_MARGIN), bool)
    chain = itk.mapped_points(shape, target, [Path(forward)])[written]
    points = _apply(read_itk(Path(coreg))[0], chain)
    codes_image: Any = nib.load(masks)
    codes = np.asarray(codes_image.dataobj)
    native_points = _voxel_points((codes & 1) > 0, series.affine)

    seen = np.zeros(len(points), np.int32)
    to_voxels = np.linalg.inv(series.affine)
    limits = np.asarray(series.frames.shape[1:], np.float32) - 0.5
    for move in moves:
        places = _apply(to_voxels @ move, points)
        seen += ((places > -0.5) & (places < limits)).all(1)
    covered = np.zeros(shape, bool)
    covered[written] = seen >= _SEEN * len(moves)
    gate = Gate(
        name="coverage", value=float((covered & inside).sum() / max(int(inside.sum()), 1)), low=settings.min_coverage,
        meaning="share of the brain mask inside the BOLD field of view",
    )  # fmt: skip
    if not gate.passed:
        raise InputDatasetError(gate.sentence, fix="look at the run's field of view and at its alignment with the T1w image")

    native = folder / "native.npy"
    temporary = temporary_path(native)
    stored = np.lib.format.open_memmap(temporary, "w+", np.float32, (len(moves), len(native_points)))
    top = max(float(frame.max()) for frame in series.frames)
    whole = _INTEGER_RANGE[0] < top < _INTEGER_RANGE[1]
    total = np.zeros(int(written.sum()), np.float64)
    cut = ~covered[written]

    def volumes() -> Iterator[Volume]:
        for index, (far, near) in enumerate(_look(series, moves, points, native_points, threads)):
            far[cut] = 0
            stored[index] = near
            if index >= series.first:
                total[:] += far
            volume = np.zeros(shape, np.float32)
            volume[written] = far
            yield volume

    bold = write_series(
        folder / "bold.nii.gz", volumes(), num_frames=len(moves), shape=shape, affine=target,
        repetition_time_s=series.repetition_time_s, space="template", dtype=np.int16 if whole else np.float32,
    )  # fmt: skip
    stored.flush()
    temporary.replace(native)
    mean = np.zeros(shape, np.float32)
    mean[written] = total / len(series.steady)
    files = {
        "bold": bold,
        "mask": write_image(folder / "mask.nii.gz", (covered & inside).astype(np.uint8), target, space="template"),
        "boldref": write_image(folder / "boldref.nii.gz", mean, target, space="template"),
        "native": native,
    }
    return {name: str(path) for name, path in files.items()}, gate.as_row()


def _look(series: Series, moves: Matrix, points: Points, native: Points, threads: int) -> Iterator[tuple[Volume, Volume]]:
    """Values of each frame at both sets of points, in order; at most ``threads`` frames are held at a time."""
    to_voxels = np.linalg.inv(series.affine)

    def look(index: int) -> tuple[Volume, Volume]:
        smooth = ndimage.spline_filter(np.asarray(series.frames[index]), 3, output=np.float32, mode="nearest")
        found = []
        for places in (points, native):
            voxels = _apply(to_voxels @ moves[index], places).T
            found.append(ndimage.map_coordinates(smooth, voxels, order=3, mode="nearest", prefilter=False, output=np.float32))
        return found[0], found[1]

    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(moves), threads):
            yield from pool.map(look, range(start, min(start + threads, len(moves))))


def _apply(matrix: Matrix, points: Points) -> Points:
    return points @ matrix[:3, :3].T.astype(np.float32) + matrix[:3, 3].astype(np.float32)


def _voxel_points(mask: NDArray[np.bool_], affine: Matrix) -> Points:
    """(voxels, 3) millimetres of the voxels of a mask, in the order of boolean indexing."""
    return _apply(affine, np.argwhere(mask).astype(np.float32))
