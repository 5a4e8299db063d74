"""Headers and metadata of raw images that cannot be right, found before hours are spent. Only headers are read."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from brainfm_cli.bids.images import load_image
from brainfm_cli.errors import InputDatasetError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

_REPETITION_TOLERANCE_S = 0.005  # what scanners and converters round away
_SECONDS_OF_UNIT = {"sec": 1.0, "msec": 1e-3, "usec": 1e-6, "unknown": 1.0}


def check_volume(path: Path, *, diffusion: bool = False) -> None:
    """See that a structural image is one volume (a diffusion image may be several).

    Raises
    ------
    InputDatasetError
        The header is unreadable, or the image has another number of dimensions.
    """
    shape = _header(path)[0]
    if len(shape) != 3 and not (diffusion and len(shape) == 4):
        raise InputDatasetError(
            f"the image has the shape {'×'.join(map(str, shape))} and must be one volume",
            where=path,
            fix="split a series into runs (run-1, run-2 …), or average it, e.g. with 'fslmaths -Tmean'",
        )


def check_run(path: Path, metadata: Mapping[str, Any]) -> float:
    """The repetition time of a BOLD run in seconds, once header and metadata are known to agree.

    Raises
    ------
    InputDatasetError
        The series is not 4-D, ``RepetitionTime`` is missing, no number, or not the header's, or ``SliceTiming``
        does not fit the slices or the repetition time.
    """
    shape, header_time_s = _header(path)
    if len(shape) != 4:
        raise InputDatasetError(
            f"the BOLD image has the shape {'×'.join(map(str, shape))} and must be a series of volumes",
            where=path,
            fix="give the whole run, (x, y, z, frames); a single volume is an _sbref",
        )
    time = _repetition_time(path, metadata, header_time_s)
    _check_slice_timing(path, metadata, shape, time)
    return time


def _header(path: Path) -> tuple[tuple[int, ...], float]:
    image = load_image(path)
    shape = tuple(int(size) for size in image.shape)
    try:
        zooms, unit = image.header.get_zooms(), image.header.get_xyzt_units()[1]
    except (AttributeError, KeyError) as error:  # another format that nibabel knows, or an unknown unit
        raise InputDatasetError(f"the image cannot be read: its units ({error})", where=path, fix="convert or copy it again") from error
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if any(size < 1 for size in shape):
        raise InputDatasetError(f"the image is empty: its shape is {'×'.join(map(str, shape))}", where=path, fix="convert it again")
    return shape, float(zooms[3]) * _SECONDS_OF_UNIT.get(unit, math.nan) if len(zooms) > 3 else math.nan


def _repetition_time(path: Path, metadata: Mapping[str, Any], header_time_s: float) -> float:
    time = metadata.get("RepetitionTime")
    if time is None and "VolumeTiming" in metadata:
        raise InputDatasetError("the run has VolumeTiming: its frames are not evenly spaced", where=path, fix="such runs are not supported")
    if not isinstance(time, int | float) or isinstance(time, bool) or not 0 < time < 60:
        hint = ", it must be in seconds" if isinstance(time, int | float) and time >= 60 else ""
        raise InputDatasetError(
            f"RepetitionTime is {'missing' if time is None else f'{time!r}{hint}'}",
            where=path,
            fix="state RepetitionTime in seconds in the image's JSON",
        )
    # A header that says 0, or 1 s where the converter knew nothing better, states no time; milliseconds under a wrong unit agree.
    stated = math.isfinite(header_time_s) and header_time_s not in (0.0, 1.0)
    if stated and min(abs(header_time_s - time), abs(header_time_s / 1000 - time)) > _REPETITION_TOLERANCE_S:
        raise InputDatasetError(
            f"RepetitionTime is {time:g} s in the metadata and {header_time_s:g} s in the header",
            where=path,
            fix="find out which is right, and mend the JSON or the header's pixdim[4]",
        )
    return float(time)


def _check_slice_timing(path: Path, metadata: Mapping[str, Any], shape: tuple[int, ...], repetition_time_s: float) -> None:
    timing = metadata.get("SliceTiming")
    if timing is None:
        return
    axis = str(metadata.get("SliceEncodingDirection", "k"))[:1]
    slices = shape["ijk".index(axis)] if axis in "ijk" else -1
    numbers = isinstance(timing, list) and all(isinstance(value, int | float) and not isinstance(value, bool) for value in timing)
    if not numbers or len(timing) != slices:
        raise InputDatasetError(
            f"SliceTiming has {len(timing) if isinstance(timing, list) else 'no'} values for {slices} slices",
            where=path,
            fix="state one time per slice, or remove SliceTiming to go without its correction",
        )
    if min(timing) < 0 or max(timing) > repetition_time_s + _REPETITION_TOLERANCE_S:
        raise InputDatasetError(
            f"SliceTiming runs from {min(timing):g} to {max(timing):g} within a repetition time of {repetition_time_s:g} s",
            where=path,
            fix="state SliceTiming in seconds after the start of the frame",
        )
