"""Connectivity of each participant as a Gram matrix: everything that does not depend on the fold, computed once.

A linear model with an L2 penalty and a free intercept sees its features only through their inner products, so a
person × person matrix replaces 80,000 edges exactly. Centre, scale and basis are taken from training people only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from sklearn.covariance import ledoit_wolf

from brainfm_cli.errors import InputDatasetError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from brainfm_cli.bids.cohort import Cohort

Measure = Literal["fisherz", "tangent"]
_CLIP = 1 - 1e-7  # arctanh of a correlation of exactly 1 is infinite
_BLOCK = 4096
_SMALLEST_SPREAD = 1e-8


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Inner products of participants' connectivity features."""

    participants: tuple[str, ...]
    """Participant keys."""
    matrix: NDArray[np.float64]
    """(participants, participants)."""

    def coordinates(self, train: Sequence[str], test: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(people, rank) coordinates whose inner products are those of the features, centred and scaled by ``train``.

        The scale makes the mean squared norm of training people 1. Values of test people reach their own rows only.
        """
        place = {name: row for row, name in enumerate(self.participants)}
        rows, others = [place[name] for name in train], [place[name] for name in test]
        inside, across = self.matrix[np.ix_(rows, rows)], self.matrix[np.ix_(others, rows)]
        means = inside.mean(0)
        inside = inside - means - means[:, None] + means.mean()
        across = across - across.mean(1, keepdims=True) - means + means.mean()
        return _coordinates(inside, across, smallest=1e-12 * float(np.abs(self.matrix.diagonal()).max() or 1.0))

    def distances(self, people: Sequence[str], others: Sequence[str]) -> NDArray[np.float64]:
        """(others, people) squared distances between features. No centre or scale is involved, so nothing is fitted."""
        place = {name: row for row, name in enumerate(self.participants)}
        rows, columns = [place[name] for name in others], [place[name] for name in people]
        norms = self.matrix.diagonal()
        return np.maximum(norms[rows][:, None] + norms[columns] - 2 * self.matrix[np.ix_(rows, columns)], 0.0)

    def similarity(self) -> NDArray[np.float64]:
        """(participants, participants) correlation of centred profiles; 1 is the same scan."""
        means = self.matrix.mean(0)
        centred = self.matrix - means - means[:, None] + means.mean()
        norms = np.sqrt(np.maximum(centred.diagonal(), 1e-300))
        return centred / norms / norms[:, None]


@dataclass(frozen=True, kw_only=True)
class StandardisedEdges:
    """Participants' connectivity features, every edge centred and divided by its spread over training people.

    Edges then count alike, also those that hardly vary. Unlike :class:`Kernel` this has to be computed in every fold.
    """

    participants: tuple[str, ...]
    """Participant keys."""
    features: NDArray[np.float32]
    """(participants, edges)."""

    def coordinates(self, train: Sequence[str], test: Sequence[str]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """As :meth:`Kernel.coordinates`; edges that are the same in all of ``train`` are left out."""
        place = {name: row for row, name in enumerate(self.participants)}
        rows, others = [place[name] for name in train], [place[name] for name in test]
        inside, across = np.zeros((len(rows), len(rows))), np.zeros((len(others), len(rows)))
        for start in range(0, self.features.shape[1], _BLOCK):
            block = self.features[:, start : start + _BLOCK].astype(np.float64)
            mean, spread = block[rows].mean(0), block[rows].std(0)
            block = (block - mean) * np.divide(1.0, spread, out=np.zeros_like(spread), where=spread > _SMALLEST_SPREAD)
            inside += block[rows] @ block[rows].T
            across += block[others] @ block[rows].T
        return _coordinates(inside, across, smallest=0.0)


def _coordinates(
    inside: NDArray[np.float64], across: NDArray[np.float64], *, smallest: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(people, rank) coordinates of training and test people from their centred (training) and (test, training) Gram matrices."""
    scale = float(np.trace(inside)) / len(inside)
    if scale <= smallest:
        raise InputDatasetError("everybody in the training set has the same connectivity", fix="check the series of the cohort")
    values, vectors = np.linalg.eigh(inside / scale)
    keep = values > values[-1] * len(inside) * np.finfo(np.float64).eps
    roots = np.sqrt(values[keep])
    return vectors[:, keep] * roots, across / scale @ (vectors[:, keep] / roots)


def shared_atlases(cohort: Cohort, participants: Sequence[str]) -> tuple[list[str], list[str]]:
    """(atlases that everybody has, atlases that somebody lacks).

    Raises
    ------
    InputDatasetError
        No atlas has everybody.
    """
    wanted = set(participants)
    having = {atlas: wanted <= set(rows["participant"]) for atlas, rows in cohort.index.groupby("atlas")}
    everywhere = [str(atlas) for atlas, all_there in having.items() if all_there]
    if not everywhere:
        raise InputDatasetError("no atlas has series of all participants", where=cohort.root, fix="parcellate everybody with one atlas, or restrict the participants ('where')")  # fmt: skip
    return everywhere, [str(atlas) for atlas, all_there in having.items() if not all_there]


def connectivity_kernel(cohort: Cohort, participants: Sequence[str], atlas: str, measure: Measure) -> Kernel:
    """The Gram matrix of everybody's connectivity in one atlas, averaged over each person's runs."""
    features = connectivity_features(cohort, participants, atlas, measure)
    matrix = np.zeros((len(participants), len(participants)))
    for start in range(0, features.shape[1], _BLOCK):  # float64 sums without a float64 copy of everything
        block = features[:, start : start + _BLOCK].astype(np.float64)
        matrix += block @ block.T
    return Kernel(participants=tuple(participants), matrix=matrix)


def connectivity_features(cohort: Cohort, participants: Sequence[str], atlas: str, measure: Measure) -> NDArray[np.float32]:
    """(participants, features) of one atlas, float32.

    fisherz: Fisher z of Pearson correlations, upper triangle. tangent: matrix logarithm of the Ledoit–Wolf
    covariance of standardised series (log-Euclidean tangent space; its reference is the mean, taken in the fold).
    A region that a person lacks (NaN or constant) takes that person's mean edge, so nothing is learnt from others;
    regions that more than half lack are left out.

    Raises
    ------
    InputDatasetError
        Somebody has fewer than three frames, or no usable region.
    """
    rows = cohort.index[cohort.index["atlas"] == atlas]
    runs = {name: list(group.itertuples()) for name, group in rows.groupby("participant")}
    usable = np.stack([np.any([_usable(cohort.series(run)) for run in runs[name]], axis=0) for name in participants])
    regions = np.flatnonzero(usable.mean(0) >= 0.5)
    if len(regions) < 2:
        raise InputDatasetError(f"fewer than two regions of {atlas} are covered in half of the participants", where=cohort.root, fix="check coverage, or use another atlas")  # fmt: skip
    upper = np.triu_indices(len(regions), k=1 if measure == "fisherz" else 0)
    result = np.empty((len(participants), len(upper[0])), dtype=np.float32)
    for row, name in enumerate(participants):
        matrices = [_matrix(np.asarray(cohort.series(run), dtype=np.float64)[:, regions], measure, name) for run in runs[name]]
        result[row] = _vector(matrices, upper, measure, name)
    return result


def _usable(series: NDArray) -> NDArray[np.bool_]:
    """(regions,) whether a region is finite and varies."""
    finite = np.isfinite(series).all(0)
    return finite & (np.ptp(np.where(np.isfinite(series), series, 0), axis=0) > 0)


def _matrix(series: NDArray[np.float64], measure: Measure, name: str) -> NDArray[np.float64]:
    """(regions, regions) Fisher z or logarithm; NaN where a region is not usable."""
    if len(series) < 3:
        raise InputDatasetError(
            f"{name} has a run of {len(series)} frames: too short for connectivity", fix="leave the run out, or keep more frames"
        )
    good = _usable(series)
    matrix = np.full((series.shape[1], series.shape[1]), np.nan)
    if good.sum() < 2:
        return matrix
    standard = series[:, good] - series[:, good].mean(0)
    standard /= standard.std(0)
    if measure == "fisherz":
        part = np.arctanh(np.clip(standard.T @ standard / len(standard), -_CLIP, _CLIP))
    else:
        values, vectors = np.linalg.eigh(ledoit_wolf(standard, assume_centered=True)[0])
        part = (vectors * np.log(np.maximum(values, 1e-10))) @ vectors.T
    matrix[np.ix_(good, good)] = part
    return matrix


def _vector(matrices: list[NDArray[np.float64]], upper: tuple[NDArray, NDArray], measure: Measure, name: str) -> NDArray[np.float64]:
    stack = np.stack([matrix[upper] for matrix in matrices])
    known = np.isfinite(stack)
    if not known.any():
        raise InputDatasetError(f"{name} has no usable region", fix="check coverage, or leave the participant out ('where')")
    counts = known.sum(0)
    mean = np.where(known, stack, 0).sum(0) / np.maximum(counts, 1)
    edge = upper[0] != upper[1]
    mean[(counts == 0) & edge] = mean[(counts > 0) & edge].mean()
    mean[(counts == 0) & ~edge] = mean[(counts > 0) & ~edge].mean() if measure == "tangent" else 0.0
    if measure == "tangent":
        mean[edge] *= np.sqrt(2)  # so that the inner product is the Frobenius product of the matrices
    return mean
