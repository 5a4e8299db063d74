"""Tissue classes of a brain by intensity: a Gaussian mixture whose voxels lean towards their neighbours (Zhang 2001). Pure numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from brainfm_cli.errors import InputDatasetError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

_LEANING = 0.25  # log-probability that each of the six neighbours adds to its own class
_ITERATIONS, _LAST_ITERATIONS = 8, 3
_CENTRES = (0.1, 0.4, 0.8)  # quantiles at which k-means begins
_SMALLEST_SPREAD = 0.01  # of the range


@dataclass(frozen=True, kw_only=True, eq=False)
class _Classes:
    """Three Gaussians."""

    means: NDArray[np.float64]
    """(3,) intensities."""
    spreads: NDArray[np.float64]
    """(3,) standard deviations."""
    shares: NDArray[np.float64]
    """(3,) of the brain's voxels."""


def tissue_probabilities(
    values: Floats, inside: NDArray[np.bool_], *, learn_from: tuple[Floats, NDArray[np.bool_]] | None = None
) -> Floats:
    """(3, x, y, z) probability of each class, darkest first; 0 outside the brain.

    Parameters
    ----------
    learn_from
        A coarser copy of image and brain, from which the classes are learned in a fraction of the time; then few steps are
        left to do here.

    Raises
    ------
    InputDatasetError
        The brain has fewer than three intensities.
    """
    shown = _shown(values, inside)
    if learn_from is None:
        field, classes = _learn(shown, inside, _start(shown), _ITERATIONS)
    else:
        coarse = _shown(*learn_from)
        _, classes = _learn(coarse, learn_from[1], _start(coarse), _ITERATIONS)
        field, classes = _learn(shown, inside, classes, _LAST_ITERATIONS)
    return field[np.argsort(classes.means)]


def _shown(values: Floats, inside: NDArray[np.bool_]) -> Floats:
    """(voxels,) intensities of the brain without their extremes: vessels and fat would pull a class towards them."""
    shown = values[inside].astype(np.float32)
    low, high = np.percentile(shown, [0.5, 99.5]) if len(shown) else (0.0, 0.0)
    if not high > low:
        raise InputDatasetError("the brain has one intensity everywhere", fix="look at the structural image inside its brain mask")
    return shown.clip(low, high)


def _learn(shown: Floats, inside: NDArray[np.bool_], classes: _Classes, steps: int) -> tuple[Floats, _Classes]:
    """(3, x, y, z) probabilities after some steps, and the classes that fit them."""
    smallest = _SMALLEST_SPREAD * float(shown.max() - shown.min())
    field = np.zeros((3, *inside.shape), np.float32)
    leaning = np.zeros((3, len(shown)), np.float32)
    for step in range(steps):
        weights = leaning
        for place, (mean, spread, share) in enumerate(zip(classes.means, classes.spreads, classes.shares, strict=True)):
            weights[place] -= np.float32(0.5 / spread**2) * (shown - np.float32(mean)) ** 2 + np.float32(np.log(spread / share))
        weights -= weights.max(0)
        np.exp(weights, out=weights)
        weights /= weights.sum(0)
        field[:, inside] = weights
        total = weights.sum(1, dtype=np.float64) + 1e-9
        means = np.array([np.sum(one * shown, dtype=np.float64) for one in weights]) / total
        squares = [np.sum(one * (shown - np.float32(mean)) ** 2, dtype=np.float64) for one, mean in zip(weights, means, strict=True)]
        spreads = np.sqrt(np.maximum(np.array(squares) / total, smallest**2))
        classes = _Classes(means=means, spreads=spreads, shares=total / total.sum())
        if step < steps - 1:
            for place, one in enumerate(field):
                leaning[place] = _LEANING * _neighbours(one)[inside]
    return field, classes


def _neighbours(one: Floats) -> Floats:
    """Sum over the six neighbours of every voxel."""
    total = np.zeros_like(one)
    for axis in range(3):
        there, back = np.moveaxis(total, axis, 0), np.moveaxis(one, axis, 0)
        there[1:] += back[:-1]
        there[:-1] += back[1:]
    return total


def _start(shown: Floats) -> _Classes:
    """Three classes by k-means on a histogram."""
    counts, edges = np.histogram(shown, 256)
    centres = 0.5 * (edges[1:] + edges[:-1])
    means = np.quantile(shown, _CENTRES).astype(np.float64)
    for _ in range(50):
        nearest = np.abs(centres[:, None] - means).argmin(1)
        sums = np.bincount(nearest, counts * centres, 3), np.bincount(nearest, counts, 3)
        means = np.where(sums[1] > 0, sums[0] / np.maximum(sums[1], 1), means)
    nearest = np.abs(centres[:, None] - means).argmin(1)
    variance = np.bincount(nearest, counts * (centres - means[nearest]) ** 2, 3) / np.maximum(np.bincount(nearest, counts, 3), 1)
    spreads = np.sqrt(np.maximum(variance, float(0.02 * (edges[-1] - edges[0])) ** 2))
    return _Classes(means=means, spreads=spreads, shares=np.full(3, 1 / 3))
