"""Numbers that say whether connectivity can be trusted: distance dependence, typicality, motion's trace, outliers. Pure numpy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

MIN_RUNS_FOR_MOTION = 10
"""Correlations over fewer people say nothing about motion."""


def edges(matrix: Floats) -> Floats:
    """Upper triangle of a (regions, regions) matrix, without the diagonal."""
    return matrix[np.triu_indices(len(matrix), 1)]


def edge_distances(centroids_mm: NDArray[np.float32] | None, regions: int) -> Floats:
    """Euclidean distance in millimetres between the regions of every edge; NaN where centres are unknown."""
    if centroids_mm is None:
        return np.full(regions * (regions - 1) // 2, np.nan)
    centres = centroids_mm.astype(float)
    return edges(np.linalg.norm(centres[:, None] - centres[None], axis=2))


def correlation(left: Floats, right: Floats) -> float:
    """Pearson correlation over the entries that are finite in both; NaN with fewer than three or without variance."""
    usable = np.isfinite(left) & np.isfinite(right)
    if usable.sum() < 3:
        return float("nan")
    a, b = left[usable] - left[usable].mean(), right[usable] - right[usable].mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")


@dataclass
class MotionTrace:
    """Streaming correlation over runs of every edge with mean framewise displacement (QC-FC), without storing the edges."""

    num_edges: int
    """Edges of one matrix."""
    count: Floats = field(init=False)
    """Runs in which each edge is finite."""

    def __post_init__(self) -> None:
        self.count = np.zeros(self.num_edges)
        self._sums = {name: np.zeros(self.num_edges) for name in ("z", "zz", "f", "ff", "zf")}
        self._total, self._runs = np.zeros(self.num_edges), np.zeros(self.num_edges)

    def add(self, z: Floats, mean_fd: float) -> None:
        """Add one run's Fisher z edges; runs without a known motion count for the mean only."""
        finite = np.isfinite(z)
        clean = np.where(finite, z, 0.0)
        self._total += clean
        self._runs += finite
        if not np.isfinite(mean_fd):
            return
        self.count += finite
        for name, value in (("z", clean), ("zz", clean**2), ("f", finite * mean_fd), ("ff", finite * mean_fd**2), ("zf", clean * mean_fd)):
            self._sums[name] += value

    @property
    def mean(self) -> Floats:
        """Mean Fisher z of every edge; NaN where no run has it."""
        with np.errstate(invalid="ignore"):
            return self._total / self._runs

    def mean_without(self, z: Floats) -> Floats:
        """Mean of every edge over the runs added, but for one of them; NaN where no other run has the edge."""
        finite = np.isfinite(z)
        with np.errstate(invalid="ignore"):
            return (self._total - np.where(finite, z, 0.0)) / (self._runs - finite)

    @property
    def correlations(self) -> Floats:
        """Correlation of every edge with motion; NaN with fewer than :data:`MIN_RUNS_FOR_MOTION` runs."""
        n, s = np.where(self.count >= MIN_RUNS_FOR_MOTION, self.count, np.nan), self._sums
        covariance = s["zf"] / n - s["z"] / n * s["f"] / n
        variance = (s["zz"] / n - (s["z"] / n) ** 2) * (s["ff"] / n - (s["f"] / n) ** 2)
        return np.where(variance > 1e-20, covariance / np.sqrt(np.maximum(variance, 1e-300)), np.nan)


def outliers(columns: Mapping[str, Floats], sides: Mapping[str, int], *, threshold: float = 3.5) -> list[list[str]]:
    """Names of the columns in which each row is extreme, by the robust z-score 0.6745 (x - median) / MAD.

    ``sides`` says which side is bad: +1 high, -1 low, 0 both. Where more than half of the values are the same, as lost regions mostly
    are, the MAD is 0 and the mean absolute deviation takes its place, scaled alike for normal values. Source: Iglewicz & Hoaglin 1993.
    """
    rows = len(next(iter(columns.values()))) if columns else 0
    flagged: list[list[str]] = [[] for _ in range(rows)]
    for name, values in columns.items():
        finite = values[np.isfinite(values)]
        if len(finite) < 5:  # a median absolute deviation of fewer says nothing
            continue
        middle = np.median(finite)
        spread = np.median(np.abs(finite - middle)) / 0.6745
        if spread <= 1e-12 * max(1.0, abs(middle)):
            spread = np.mean(np.abs(finite - middle)) * np.sqrt(np.pi / 2)
        if spread <= 1e-12 * max(1.0, abs(middle)):
            continue
        z = (values - middle) / spread
        bad = np.abs(z) if sides[name] == 0 else sides[name] * z
        for row in np.flatnonzero(bad > threshold):
            flagged[row].append(name)
    return flagged
