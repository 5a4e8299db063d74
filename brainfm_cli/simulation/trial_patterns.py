"""Patterns of couplings and of spectra along which simulated people differ, the same in every population, as the typical connectome is.

``counts`` is how many of either; none: every coupling and every spectrum varies by itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from scipy import linalg

from brainfm_cli.simulation.truth import COUPLING_NAMES, TILT_NAMES

if TYPE_CHECKING:
    from numpy.typing import NDArray

_OWN = 0.2  # share of a trait's variance that follows no pattern, where there are patterns


def shared_patterns(counts: tuple[int, int] | None) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(28, patterns) and (7, patterns), columns of length 1 at right angles."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(35)))
    couplings, tilts = (np.linalg.qr(rng.normal(size=(size, size)))[0] for size in (len(COUPLING_NAMES), len(TILT_NAMES)))
    of_couplings, of_tilts = counts or (0, 0)
    return couplings[:, :of_couplings], tilts[:, :of_tilts]


def named_patterns(counts: tuple[int, int] | None) -> dict[str, dict[str, float]]:
    """Weights of couplings or tilts in each pattern, by its name; empty where there are none."""
    return {
        f"{kind} pattern {place + 1}": dict(zip(names, np.round(weights, 6).tolist(), strict=True))
        for kind, names, directions in zip(("coupling", "tilt"), (COUPLING_NAMES, TILT_NAMES), shared_patterns(counts), strict=True)
        for place, weights in enumerate(directions.T)
    }


def variance_along(directions: NDArray[np.float64]) -> float:
    """Of traits of mean variance 1, along each of the patterns."""
    size, count = directions.shape
    return _OWN + (1 - _OWN) * size / count


def mixing_of(counts: tuple[int, int] | None) -> NDArray[np.float64]:
    """(35, 35) symmetric root of the traits' covariance, whose mean variance is 1."""
    if counts is None:
        return np.eye(len(COUPLING_NAMES) + len(TILT_NAMES))
    roots = []
    for directions in shared_patterns(counts):
        along = directions @ directions.T
        roots.append(np.sqrt(variance_along(directions)) * along + np.sqrt(_OWN) * (np.eye(len(along)) - along))
    return linalg.block_diag(*roots)
