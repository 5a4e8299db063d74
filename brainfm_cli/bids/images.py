"""Write NIfTI images: volume by volume, whole or not at all, and the same bytes for the same numbers."""

from __future__ import annotations

import contextlib
import math
import struct
import zlib
from typing import IO, TYPE_CHECKING, Any, Literal, cast
from xml.parsers.expat import ExpatError

import numpy as np

from brainfm_cli.bids.derivatives import atomic_path
from brainfm_cli.errors import InputDatasetError, InputNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

Space = Literal["scanner", "template"]
_LARGEST_INFLATION = 1100  # a gzip stream grows 1032-fold at most
_FORM_CODES: dict[Space, int] = {"scanner": 1, "template": 4}


def check_size(path: Path, shape: Sequence[int], dtype: np.dtype[Any]) -> None:
    """See that a file can hold the numbers that its header promises, before memory is asked for them.

    Raises
    ------
    InputDatasetError
        It cannot: the header is wrong, or the file is cut off.
    """
    promised = math.prod(int(size) for size in shape) * dtype.itemsize
    if promised > path.stat().st_size * (_LARGEST_INFLATION if path.suffix == ".gz" else 1):
        raise InputDatasetError(
            f"the header promises {'×'.join(map(str, shape))} numbers, more than the file can hold", where=path, fix="convert or copy it again"
        )  # fmt: skip


def load_image(path: Path, *, what: str = "the image", fix: str = "convert or copy it again") -> Any:  # noqa: ANN401  (nibabel has no types)
    """An image by its header, whose voxels are on disk until :func:`read_voxels`.

    Raises
    ------
    InputNotFoundError
        The file does not exist.
    InputDatasetError
        It is empty, no image, or its header cannot be right.
    """
    import nibabel as nib

    if not path.exists():
        raise InputNotFoundError(f"{what} does not exist", where=path, fix="check the path and the labels")
    try:
        if path.stat().st_size == 0:
            raise InputDatasetError(f"{what} cannot be read: it has 0 bytes", where=path, fix=fix)
        image: Any = nib.load(path)
        shape, dtype = image.shape, image.get_data_dtype()
    except _broken() as error:
        raise InputDatasetError(f"{what} cannot be read: {error}", where=path, fix=fix) from error
    check_size(path, shape, dtype)
    return image


def read_voxels(path: Path, image: Any, dtype: type | None = None, *, what: str = "the image", fix: str = "copy it again from its source") -> NDArray[Any]:  # noqa: ANN401  # fmt: skip
    """All voxels of an image, scaled as its header says.

    Raises
    ------
    InputDatasetError
        They are cut off, damaged, or no numbers.
    """
    try:
        voxels = np.asanyarray(image.dataobj) if dtype is None else np.asarray(image.dataobj, dtype)
    except _broken() as error:
        raise InputDatasetError(f"{what} cannot be read: {error}", where=path, fix=fix) from error
    if voxels.dtype.kind not in "biuf":
        raise InputDatasetError(f"{what} holds {voxels.dtype}, not real numbers", where=path, fix="store it as integers or floats")
    return voxels


def _broken() -> tuple[type[Exception], ...]:
    """What nibabel and the libraries below it raise on files that are no intact images."""
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError
    from nibabel.wrapstruct import WrapStructError

    nibabel: tuple[type[Exception], ...] = (ImageFileError, HeaderDataError, WrapStructError)
    return (*nibabel, OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, zlib.error, struct.error, ExpatError)  # fmt: skip


def write_image(
    path: Path, data: NDArray[Any], affine: NDArray[np.float64], *, space: Space = "scanner", dtype: np.dtype | type | None = None
) -> Path:
    """Write one (x, y, z) image; gives back the path.

    Parameters
    ----------
    affine
        (4, 4) voxels to millimetres, RAS.
    dtype
        Type on disk, unset for the data's own. Numbers are rounded and clipped for integer types.
    """
    return _write(path, [data], data.shape, affine, space=space, dtype=np.dtype(dtype or data.dtype))


def write_series(
    path: Path,
    volumes: Iterable[NDArray[Any]],
    *,
    num_frames: int,
    shape: Sequence[int],
    affine: NDArray[np.float64],
    repetition_time_s: float,
    space: Space = "scanner",
    dtype: np.dtype | type = np.int16,
) -> Path:
    """Write a 4-D series from its volumes, of which one at a time is held; gives back the path."""
    size = (*shape, num_frames)
    return _write(path, volumes, size, affine, space=space, dtype=np.dtype(dtype), repetition_time_s=repetition_time_s)


def sidecar(path: Path) -> Path:
    """The JSON that belongs to a data file."""
    return path.with_name(f"{path.name.partition('.')[0]}.json")


def _write(
    path: Path,
    volumes: Iterable[NDArray[Any]],
    shape: Sequence[int],
    affine: NDArray[np.float64],
    *,
    space: Space,
    dtype: np.dtype,
    repetition_time_s: float = 0.0,
    intent: str = "none",
) -> Path:
    header = _header(shape, affine, space, dtype, repetition_time_s, intent)
    with atomic_path(path) as temporary, _compressed(temporary, compress=path.name.endswith(".gz")) as stream:
        stream.write(header)
        for volume in volumes:
            stream.write(_stored(volume, dtype).tobytes(order="F"))
    return path


def _header(
    shape: Sequence[int], affine: NDArray[np.float64], space: Space, dtype: np.dtype, repetition_time_s: float, intent: str
) -> bytes:
    from nibabel.nifti1 import Nifti1Header

    header = Nifti1Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(tuple(shape))
    header.set_qform(affine, _FORM_CODES[space])
    header.set_sform(affine, _FORM_CODES[space])
    header["pixdim"][4] = repetition_time_s
    header.set_xyzt_units("mm", "sec")
    header.set_intent(intent)
    header.set_slope_inter(1, 0)
    header["vox_offset"] = 352
    return bytes(header.binaryblock) + b"\0\0\0\0"  # no extension follows


def _stored(volume: NDArray[Any], dtype: np.dtype) -> NDArray[Any]:
    if dtype.kind in "iu" and volume.dtype.kind == "f":
        limits = np.iinfo(dtype)
        return np.clip(np.rint(volume), limits.min, limits.max).astype(dtype)
    return volume.astype(dtype, copy=False)


@contextlib.contextmanager
def _compressed(path: Path, *, compress: bool) -> Iterator[IO[bytes]]:
    from isal import igzip

    with path.open("wb") as file:
        if not compress:
            yield file
            return
        # No name and no time in the gzip header, so that repeats are equal byte for byte.
        with igzip.IGzipFile(filename="", mode="wb", fileobj=file, mtime=0) as stream:
            yield cast("IO[bytes]", stream)
