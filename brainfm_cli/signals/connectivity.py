"""Connectivity of region series in plain numpy, usable by training: no imaging library, no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Pearson correlations of exactly 1 (duplicate regions) would give an infinite z.
_LARGEST_R = 1.0 - 1e-7


def pearson(series: NDArray[np.floating]) -> NDArray[np.float64]:
    """(regions, regions) Pearson correlation of (frames, regions) series, diagonal 1.

    A region with ``nan`` or without variance has ``nan`` throughout.
    """
    scaled = _zscored(series)
    matrix = np.clip(scaled.T @ scaled / max(len(scaled) - 1, 1), -1.0, 1.0)
    np.fill_diagonal(matrix, np.where(np.isfinite(np.diag(matrix)), 1.0, np.nan))
    return matrix


def fisher_z(correlation: NDArray[np.floating]) -> NDArray[np.float64]:
    """Inverse hyperbolic tangent of correlations below 1 in size, diagonal 0; ``nan`` stays."""
    z = np.arctanh(np.clip(np.asarray(correlation, np.float64), -_LARGEST_R, _LARGEST_R))
    np.fill_diagonal(z, np.where(np.isfinite(np.diag(z)), 0.0, np.nan))
    return z


def partial(series: NDArray[np.floating]) -> NDArray[np.float64]:
    """(regions, regions) partial correlation from the inverse of the Ledoit-Wolf covariance, diagonal 1.

    nilearn's definition, on z-scored series. Regions with ``nan`` or without variance are left out and have ``nan``.
    """
    scaled = _zscored(series)
    usable = np.isfinite(scaled).all(0)
    matrix = np.full((scaled.shape[1],) * 2, np.nan)
    if not usable.any():
        return matrix
    precision = np.linalg.inv(ledoit_wolf(scaled[:, usable]))
    diagonal = np.sqrt(np.diag(precision))
    inner = -precision / diagonal / diagonal[:, None]
    np.fill_diagonal(inner, 1.0)
    matrix[np.ix_(usable, usable)] = (inner + inner.T) / 2
    return matrix


def ledoit_wolf(series: NDArray[np.floating]) -> NDArray[np.float64]:
    """(regions, regions) covariance shrunk towards a scaled identity by Ledoit and Wolf's (2004) estimate."""
    centred = np.asarray(series, np.float64) - np.mean(series, axis=0, dtype=np.float64)
    frames, regions = centred.shape
    covariance = centred.T @ centred / frames
    scale = np.trace(covariance) / regions
    fourth = np.sum((centred**2).sum(1) ** 2) / frames  # mean squared Frobenius norm of one frame's outer product
    squared = np.sum(covariance**2)
    error = (fourth - squared) / frames
    distance = squared - regions * scale**2
    shrinkage = 0.0 if distance <= 0 else min(max(error, 0.0) / distance, 1.0)
    shrunk = (1 - shrinkage) * covariance
    shrunk.flat[:: regions + 1] += shrinkage * scale
    return shrunk


def _zscored(series: NDArray[np.floating]) -> NDArray[np.float64]:
    values = np.asarray(series, np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        centred = values - values.mean(0)
        spread = centred.std(0, ddof=1)
        # a constant column leaves rounding noise, not variance
        spread[spread <= 1e-12 * np.abs(values).max(0, initial=0)] = np.nan
        return centred / spread
