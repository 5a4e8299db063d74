"""Memory that the embedded engine needs, from the size of the images alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from brainfm_cli.bids.names import parse_name
from brainfm_cli.errors import OutOfMemoryError
from brainfm_cli.programs.preflight import machine_memory_mb

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_BASE_MB = 1_500
"""Interpreter, libraries, template, brain network and registration at 2 mm."""
_BYTES_PER_VOXEL = 60
"""Of the largest structural image."""


def expected_memory_mb(inputs: Sequence[Path]) -> int:
    """Megabytes that one participant takes, from the headers of its images; unreadable ones count nothing here."""
    import nibabel as nib

    structural = 0
    for path in inputs:
        if not path.name.endswith((".nii", ".nii.gz")) or parse_name(path.name)[1] == "bold":
            continue
        try:
            image: Any = nib.load(path)
        except Exception:  # noqa: BLE001, S112  (the unit itself names what is wrong with it)
            continue
        size = 1
        for extent in image.shape[:3]:
            size *= int(extent)
        structural = max(structural, size)
    return _BASE_MB + _BYTES_PER_VOXEL * structural // 1_000_000


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
