"""Lesions that people drew, in the grid of the scans, for scores of what a model says there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from brainfm_cli.bids.scans import read_studies
from brainfm_cli.config import Selection
from brainfm_cli.errors import InputNotFoundError
from brainfm_cli.signals.segmentations import NativeChances, joined_labels, native_chances, to_labels
from brainfm_cli.signals.slices import read_volume

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

    from brainfm_cli.bids.slice_cohort import PackedScan
    from brainfm_cli.signals.slice_packing import SliceSettings


@dataclass(frozen=True, kw_only=True)
class DrawnLesions:
    """Where the true labels are read."""

    raw: Path
    """The BIDS dataset."""
    mask_roots: tuple[Path, ...]
    """Further datasets with masks."""
    slices: SliceSettings
    """Which scans are read."""
    tolerance_mm: float
    """Tolerance of the surface Dice."""

    def labels(self, label: str, scan: str) -> NDArray[np.uint8] | None:
        """(x, y, z) RAS labels on the grid of the scan of that name; none where its study has no mask.

        Raises
        ------
        InputNotFoundError
            The scan is no longer there.
        """
        studies = read_studies(
            self.raw, label, Selection(), sequences=self.slices.sequences, space=self.slices.space, mask_roots=self.mask_roots
        )
        for study in studies:
            for one in study.scans:
                if one.name == scan:
                    return joined_labels(study.masks, read_volume(one.path, gradients=one.gradients))[0]
        raise InputNotFoundError(f"the scan {scan} is no longer there", where=self.raw, fix="give the dataset that was packed")

    def grids(self, scans: Sequence[PackedScan], chances_of: Callable[[Sequence[PackedScan]], NDArray[np.float32]]) -> list[NativeChances]:
        """Probabilities on every native grid of these scans."""
        return native_chances(scans, chances_of)

    def decide(self, grid: NativeChances, values: Sequence[int], *, smallest: int) -> NDArray[np.uint8]:
        """(x, y, z) labels of the probabilities on a grid; lesions below ``smallest`` voxels are dropped."""
        return to_labels(grid.chances, values, smallest=smallest)
