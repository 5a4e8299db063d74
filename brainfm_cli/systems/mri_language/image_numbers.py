"""A few numbers per person that need no network: intensities, head volume and asymmetry by sequence, for a linear floor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from brainfm_cli.bids.slice_cohort import PackedScan, SliceCohort

_QUANTILES = (0.1, 0.5, 0.9, 0.99)
NUMBERS = ("mean", "SD", *(f"quantile {share:g}" for share in _QUANTILES), "bright share", "dark share", "asymmetry", "head volume")
_BATCH = 64


def image_numbers(cohort: SliceCohort, people: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """By participant (sequences · numbers,), NaN for sequences that a person lacks; sequences are those of the cohort, sorted."""
    sequences = sorted(map(str, cohort.slices["sequence"].unique()))
    names, kinds = (cohort.slices[column].to_numpy().astype(str) for column in ("participant", "sequence"))
    return {
        label: np.concatenate([_numbers(cohort, label, np.flatnonzero((names == label) & (kinds == kind))) for kind in sequences])
        for label in people
    }


def _numbers(cohort: SliceCohort, label: str, rows: NDArray[np.int64]) -> NDArray[np.float64]:
    if not len(rows):
        return np.full(len(NUMBERS), np.nan)
    sizes = {scan.name: _pixel_ml(scan, cohort) for scan in cohort.scans(label)}
    counts = np.zeros(256)
    volume, uneven, total = 0.0, 0.0, 0.0
    scans = cohort.slices["scan"].to_numpy().astype(str)
    for start in range(0, len(rows), _BATCH):
        mine = rows[start : start + _BATCH]
        items = cohort.items(mine).reshape(len(mine), *cohort.item_shape)
        counts += np.bincount(items.ravel(), minlength=256)
        uneven += float(np.abs(items.astype(np.float32) - items[:, ::-1]).sum())
        total += float(items.sum(dtype=np.float64))
        for place, name in zip(range(len(mine)), scans[mine], strict=True):
            volume += float((items[place] > 0).sum()) * sizes[name]
    counts[0] = 0  # outside the head
    weights, values = counts / max(counts.sum(), 1), np.arange(256.0)
    mean = weights @ values
    spread = np.sqrt(weights @ (values - mean) ** 2)
    quantiles = np.searchsorted(weights.cumsum(), _QUANTILES)
    bright, dark = weights[values > mean + 2 * spread].sum(), weights[values < mean - 2 * spread].sum()
    return np.array([mean, spread, *quantiles, bright, dark, uneven / max(total, 1.0), volume / len(set(scans[rows]))])


def _pixel_ml(scan: PackedScan, cohort: SliceCohort) -> float:
    """Volume of a pixel, in millilitres: the side of the padded square or cube over its pixels, and the distance of slices."""
    grid, normal = scan.grid, scan.normal
    cut = [axis for axis in range(3) if cohort.dims == 3 or axis != normal]
    pixel = max(grid["shape"][axis] * grid["voxel_mm"][axis] for axis in cut) / cohort.size
    return float(pixel**2 * (pixel if cohort.dims == 3 else grid["voxel_mm"][normal]) / 1000)


def standardised(numbers: Mapping[str, NDArray[np.float64]], training: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """The same on the scale of training people; what is missing becomes their mean."""
    known = np.stack([numbers[label] for label in training])
    with np.errstate(invalid="ignore"):
        present = np.isfinite(known)
        count = present.sum(0)
        mean = np.where(present, known, 0).sum(0) / np.maximum(count, 1)
        spread = np.sqrt((np.where(present, known - mean, 0) ** 2).sum(0) / np.maximum(count, 1))
    usable = spread > 1e-9
    return {
        label: np.where(np.isfinite(values) & usable, (values - mean) / np.where(usable, spread, 1), 0).astype(np.float32)
        for label, values in numbers.items()
    }
