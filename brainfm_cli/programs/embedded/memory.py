"""Memory that the embedded engine needs, from the size of the images alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from brainfm_cli.bids.images import check_size
from brainfm_cli.bids.names import parse_name
from brainfm_cli.errors import InputDatasetError, OutOfMemoryError
from brainfm_cli.programs.preflight import machine_memory_mb

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# Measured on real people at the default settings; interpreter, template, brain network and registration at 2 mm are the base.
_BASE_MB = 1_200
_BYTES_PER_VOXEL = 25  # of the largest structural image
_BYTES_PER_SAMPLE = 8  # of the longest run, which is mapped into memory twice


def expected_memory_mb(inputs: Sequence[Path]) -> int:
    """Megabytes that one participant takes, from the headers of its images; unreadable ones count nothing here."""
    structural, run = 0, 0
    for path in inputs:
        if path.name.endswith((".nii", ".nii.gz")):
            if parse_name(path.name)[1] == "bold":
                run = max(run, _size(path))
            else:
                structural = max(structural, _size(path))
    return _BASE_MB + (_BYTES_PER_VOXEL * structural + _BYTES_PER_SAMPLE * run) // 1_000_000


def _size(path: Path) -> int:
    import nibabel as nib
    from nibabel.filebasedimages import ImageFileError
    from nibabel.spatialimages import HeaderDataError

    try:
        image: Any = nib.load(path)
        check_size(path, image.shape, image.get_data_dtype())
    except (InputDatasetError, ImageFileError, HeaderDataError, OSError, EOFError, ValueError, KeyError, OverflowError):
        return 0  # the unit itself names what is wrong with it
    return math.prod(int(extent) for extent in image.shape)


def check_memory(expected_mb: Sequence[int], *, given_mb: int | None) -> None:
    """See that the participants at a time fit into the memory given, or else of this machine.

    Raises
    ------
    OutOfMemoryError
        They do not.
    """
    needed, total = sum(expected_mb), given_mb or machine_memory_mb()
    if needed > total:
        fewer = ", or for fewer --nprocs" if len(expected_mb) > 1 else ""
        raise OutOfMemoryError(
            f"{len(expected_mb)} participants at a time need about {needed} MB, and there are {total} MB",
            fix=f"ask for more memory (--mem-mb {needed}){fewer}",
        )
