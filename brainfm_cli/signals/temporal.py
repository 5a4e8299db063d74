"""How steady a run's voxels are over time, in one pass over the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from brainfm_cli.signals.parcellation import read_mask
from brainfm_cli.signals.volumes import open_series

if TYPE_CHECKING:
    from pathlib import Path


def temporal_snr(path: Path, mask: Path, *, first: int = 0) -> tuple[float, float]:
    """Median over the brain of mean / SD over time, and the brain mask's volume in millilitres.

    Parameters
    ----------
    first
        Frames left out at the beginning, before the steady state.

    Returns
    -------
    tuple
        NaN for the first where fewer than two frames are left or no voxel varies.
    """
    with open_series(path) as (header, volumes):
        inside = read_mask(mask, header)
        volume_ml = float(inside.sum() * abs(np.linalg.det(header.affine[:3, :3])) / 1000)
        mean, squares, count = np.zeros(int(inside.sum())), np.zeros(int(inside.sum())), 0
        for frame, volume in enumerate(volumes):
            if frame < first:
                continue
            values = volume[inside] * header.slope + header.intercept
            count += 1
            # Welford's update: sums of squares of raw values would lose the small variance of large means.
            difference = values - mean
            mean += difference / count
            squares += difference * (values - mean)
    varies = squares > 0
    if count < 2 or not varies.any():
        return float("nan"), volume_ml
    return float(np.median(mean[varies] / np.sqrt(squares[varies] / (count - 1)))), volume_ml
