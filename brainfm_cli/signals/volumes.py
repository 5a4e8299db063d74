"""Read a 4-D NIfTI series frame by frame: memory is one frame, whatever the number of frames. Nothing is written."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any, cast

import numpy as np

from brainfm_cli.bids.images import check_size
from brainfm_cli.errors import InputDatasetError, InputNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

_REMEDY = "copy the file again from its source, or run preprocessing again for this participant"
_SKIP_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True)
class SeriesHeader:
    """What the header of a 4-D NIfTI file says."""

    path: Path
    """The file."""
    shape: tuple[int, int, int]
    """Voxels along each axis."""
    num_frames: int
    """Number of volumes."""
    affine: NDArray[np.float64]
    """4 x 4, voxels to millimetres."""
    dtype: np.dtype[Any]
    """Type on disk, with its byte order."""
    slope: float
    """Stored values are multiplied by it."""
    intercept: float
    """Added after the slope."""
    repetition_time_s: float
    """Seconds between volumes; 0 where the header states none."""

    @property
    def num_voxels(self) -> int:
        """Voxels of one volume."""
        return int(np.prod(self.shape))


@contextlib.contextmanager
def open_series(path: Path) -> Iterator[tuple[SeriesHeader, Iterator[NDArray[Any]]]]:
    """The header of a series, and an iterator over its volumes in stored units.

    Volumes come as flat arrays in the file's own (Fortran) voxel order and dtype. Each one overwrites the one before.

    Raises
    ------
    InputNotFoundError
        The file does not exist.
    InputDatasetError
        0 bytes, no gzip, no NIfTI, truncated, a failed checksum, not four dimensions, or fewer than two volumes.
    """
    with _readable(path) as stream:
        header = _read_header(path, stream)
        yield header, _volumes(header, stream)


@contextlib.contextmanager
def _readable(path: Path) -> Iterator[IO[bytes]]:
    """A stream of the uncompressed bytes; whatever goes wrong while it is read becomes a named error."""
    from isal import igzip_threaded, isal_zlib

    if not path.is_file():
        raise InputNotFoundError("the image does not exist", where=path, fix="check the path and the labels")
    if path.stat().st_size == 0:
        raise InputDatasetError("the image has 0 bytes", where=path, fix=_REMEDY)
    try:
        # One thread inflates while this one averages; both release the interpreter.
        with igzip_threaded.open(path, "rb", threads=1) if path.suffix == ".gz" else path.open("rb") as stream:
            yield stream
    except EOFError as error:
        raise InputDatasetError("the compressed image is truncated", where=path, fix=_REMEDY) from error
    except (gzip.BadGzipFile, cast("type[Exception]", isal_zlib.error), zlib.error) as error:
        raise InputDatasetError(f"the image is no intact gzip file: {error}", where=path, fix=_REMEDY) from error


def _read_header(path: Path, stream: IO[bytes]) -> SeriesHeader:
    from nibabel.nifti1 import Nifti1Header
    from nibabel.nifti2 import Nifti2Header
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    head = stream.read(348)
    sizes = {int.from_bytes(head[:4], "little"), int.from_bytes(head[:4], "big")}
    if not sizes & {348, 540}:
        raise InputDatasetError("the image is no NIfTI file", where=path, fix=_REMEDY)
    kind: type[Nifti1Header] = Nifti1Header
    if 540 in sizes:
        kind, head = Nifti2Header, head + stream.read(540 - 348)
    try:
        header = kind.from_fileobj(io.BytesIO(head))
        shape = tuple(int(size) for size in header.get_data_shape())
        dtype = header.get_data_dtype()
        slope, intercept = header.get_slope_inter()
        affine = np.asarray(header.get_best_affine(), np.float64)
        offset = int(header.get_data_offset())
        zooms, units = header.get_zooms(), header.get_xyzt_units()[1]
    except (HeaderDataError, WrapStructError, ValueError, KeyError, OverflowError) as error:
        raise InputDatasetError(f"the NIfTI header cannot be used: {error}", where=path, fix=_REMEDY) from error
    if len(shape) != 4:
        raise InputDatasetError(
            f"the image has {len(shape)} dimensions {shape}, not four", where=path, fix="give a BOLD series, not a single volume"
        )
    if shape[3] < 2:
        raise InputDatasetError("the series has one frame", where=path, fix="give a BOLD series of many volumes")
    check_size(path, shape[:3], dtype)  # of one volume: a series that is cut off later says where
    if dtype.kind not in "iuf":
        raise InputDatasetError(f"the image holds {dtype}, not real numbers", where=path, fix="store it as integers or floats")
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputDatasetError("the image's affine is singular", where=path, fix=_REMEDY)
    _skip(stream, offset - len(head))  # extensions
    seconds = float(zooms[3]) * {"msec": 1e-3, "usec": 1e-6}.get(units, 1.0)
    return SeriesHeader(
        path=path,
        shape=(shape[0], shape[1], shape[2]),
        num_frames=shape[3],
        affine=affine,
        dtype=dtype,
        slope=1.0 if slope is None else float(slope),
        intercept=0.0 if intercept is None else float(intercept),
        repetition_time_s=seconds,
    )


def _volumes(header: SeriesHeader, stream: IO[bytes]) -> Iterator[NDArray[Any]]:
    volume = np.empty(header.num_voxels, header.dtype)
    view = memoryview(volume.view(np.uint8))  # type: ignore[arg-type]
    for frame in range(header.num_frames):
        filled = 0
        while filled < len(view):
            got = stream.readinto(view[filled:])  # type: ignore[attr-defined]
            if not got:
                raise InputDatasetError(f"the image ends within frame {frame} of {header.num_frames}", where=header.path, fix=_REMEDY)
            filled += got
        yield volume
    stream.read(1)  # reaching the end makes gzip compare its checksum


def _skip(stream: IO[bytes], count: int) -> None:
    while count > 0 and (got := len(stream.read(min(count, _SKIP_BYTES)))):
        count -= got
