"""How far a score can be trusted: bootstrap over participants, DeLong, permutation, detectable difference.

Resamples are (resamples, people) matrices of weights, drawn once and shared by every predictor, so that
differences are paired. Several repetitions of one split are averaged within a resample.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    Weighted = Callable[[NDArray[np.float64]], NDArray[np.float64]]

COVERAGE_CAVEAT = (
    "Intervals resample people and keep the fitted models fixed. On pooled cross-validated scores the folds share their "
    "training people, and a nominal 95 % interval was measured to cover 84–91 % (AUROC of 40 to 300 people; docs/results.md, "
    "Intervals): read it as too narrow."
)
PERMUTATION_CAVEAT = (
    "On cross-validated scores the permutation p is approximate: people predict one another, so chance is spread √2 times as far as "
    "permuted labels show. evaluation.refit_permutations asks for the exact p, with everything fitted again on each permutation."
)
_CHUNK = 250
_MOST_UNDEFINED = 0.05


@dataclass(frozen=True, slots=True)
class Interval:
    """An interval, or why there is none."""

    low: float | None
    """Lower end."""
    high: float | None
    """Upper end."""
    error: float | None
    """Standard deviation over resamples."""
    reason: str | None = None
    """Why there is no interval."""


@dataclass(frozen=True, slots=True)
class DeLong:
    """Areas under ROC curves with their covariance (DeLong 1988)."""

    areas: NDArray[np.float64]
    """(predictors,)."""
    covariance: NDArray[np.float64]
    """(predictors, predictors)."""

    def difference(self, first: int, second: int) -> tuple[float, float, float]:
        """(difference, standard error, two-sided p); p is 1 where both predictors rank everybody alike."""
        gap = float(self.areas[first] - self.areas[second])
        contrast = np.zeros(len(self.areas))
        contrast[first], contrast[second] = 1.0, -1.0
        error = float(np.sqrt(max(float(contrast @ self.covariance @ contrast), 0.0)))
        if error < 1e-12:
            return gap, 0.0, 1.0 if abs(gap) < 1e-12 else 0.0
        return gap, error, float(2 * ndtr(-abs(gap) / error))


def resample_weights(units: Sequence[str] | NDArray, resamples: int, rng: np.random.Generator) -> NDArray[np.float64]:
    """(resamples, people) how often each person was drawn; people of one unit (family, or the person) are drawn together."""
    codes, number = _codes(units)
    drawn = rng.integers(0, number, (resamples, number))
    counts = np.stack([np.bincount(row, minlength=number) for row in drawn]).astype(np.float64)
    return counts[:, codes]


def leave_one_out_weights(units: Sequence[str] | NDArray) -> NDArray[np.float64]:
    """(units, people) weights of the jackknife."""
    codes, number = _codes(units)
    return (codes[None, :] != np.arange(number)[:, None]).astype(np.float64)


def over(weighted: Weighted, weights: NDArray[np.float64]) -> NDArray[np.float64]:
    """A weighted score at every row of ``weights``, in chunks that bound memory."""
    return np.concatenate([weighted(weights[start : start + _CHUNK]) for start in range(0, len(weights), _CHUNK)])


def averaged(parts: Sequence[Weighted]) -> Weighted:
    """The mean of several weighted scores (repetitions of one split)."""
    return lambda weights: np.mean([part(weights) for part in parts], axis=0)


def interval(
    weighted: Weighted,
    weights: NDArray[np.float64],
    *,
    method: Literal["percentile", "bca"],
    level: float,
    jackknife: NDArray[np.float64] | None = None,
) -> Interval:
    """Bootstrap interval of a weighted score.

    percentile: quantiles of the resampled scores. bca: bias-corrected and accelerated (Efron 1987), which needs the
    ``jackknife`` weights. Resamples where the score is undefined are left out, and more than 5 % of them give none.
    """
    scores = over(weighted, weights)
    defined = np.isfinite(scores)
    if defined.mean() < 1 - _MOST_UNDEFINED:
        return Interval(None, None, None, f"undefined in {int((~defined).sum())} of {len(scores)} resamples")
    scores = scores[defined]
    ends = np.array([(1 - level) / 2, (1 + level) / 2])
    if method == "bca":
        if jackknife is None:
            raise ValueError("bca needs the jackknife weights")
        value = float(weighted(np.ones((1, weights.shape[1])))[0])
        ends = _bca_ends(scores, value, over(weighted, jackknife), ends)
    low, high = np.quantile(scores, ends)
    return Interval(float(low), float(high), float(scores.std(ddof=1)))


def _bca_ends(scores: NDArray[np.float64], value: float, left_out: NDArray[np.float64], ends: NDArray[np.float64]) -> NDArray[np.float64]:
    """Quantiles that BCa takes instead of ``ends``; the plain ones where all resamples agree or none brackets the value."""
    share = ((scores < value).mean() + (scores <= value).mean()) / 2
    left_out = left_out[np.isfinite(left_out)]
    spread = left_out.mean() - left_out
    power = np.sum(spread**2)
    if not 0 < share < 1 or power <= 0:
        return ends
    bias, acceleration = ndtri(share), np.sum(spread**3) / (6 * power**1.5)
    shifted = bias + ndtri(ends)
    return ndtr(bias + shifted / (1 - acceleration * shifted))


def bootstrap_p(differences: NDArray[np.float64]) -> float:
    """Two-sided p of a paired difference: twice the smaller share of resamples on either side of 0, counted (1+b)/(1+m)."""
    known = differences[np.isfinite(differences)]
    smaller = int(min(np.sum(known <= 0), np.sum(known >= 0)))
    return float(min(1.0, 2 * (1 + smaller) / (1 + len(known))))


def delong(labels: NDArray[np.int64], probabilities: NDArray[np.float64]) -> DeLong:
    """DeLong's areas and covariance of (predictors, people) or (predictors, repetitions, people) scores.

    Ranks instead of all pairs (Sun & Xu 2014); components are averaged over repetitions.
    """
    scores = probabilities[:, None, :] if probabilities.ndim == 2 else probabilities
    positive, negative = labels == 1, labels == 0
    m, n = int(positive.sum()), int(negative.sum())
    cases, controls = np.zeros((len(scores), m)), np.zeros((len(scores), n))
    for predictor, repeats in enumerate(scores):
        for row in repeats:
            above, below = placements(row[positive], row[negative])
            cases[predictor] += above / len(repeats)
            controls[predictor] += below / len(repeats)
    covariance = np.atleast_2d(np.cov(cases)) / m + np.atleast_2d(np.cov(controls)) / n
    return DeLong(areas=cases.mean(1), covariance=covariance)


def placements(positive: NDArray[np.float64], negative: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(cases,) share of controls that score below each case, and (controls,) share of cases that score above each control; ties count ½."""
    everyone = rankdata(np.r_[positive, negative])
    above = (everyone[: len(positive)] - rankdata(positive)) / len(negative)
    below = 1 - (everyone[len(positive) :] - rankdata(negative)) / len(positive)
    return above, below


def permutation_p(
    kind: str,
    observed: NDArray[np.float64],
    predicted: NDArray[np.float64],
    *,
    strata: Sequence[str] | NDArray | None,
    permutations: int,
    rng: np.random.Generator,
    shared: bool = False,
) -> float | None:
    """One-sided p of fixed predictions, (1+b)/(1+m) over labels permuted within strata; none where nothing can move or a class is absent.

    ``predicted`` is (repetitions, people, classes) or (repetitions, people). Classes: AUROC (macro, one versus rest);
    continuous: R², which for fixed predictions ranks permutations as Σ observed·predicted does. ``shared``: people who
    test in one fold train in another. By chance, then, what i's label does to j's prediction j's label does to i's, so
    that every pair counts twice where permuted labels count it once: the permuted scores are spread √2 times as far.
    """
    groups = _members(strata, len(observed))
    absent = kind != "continuous" and len(np.unique(observed)) < predicted.shape[2]
    if absent or all(np.ptp(observed[rows]) == 0 for rows in groups):
        return None
    permuted = np.tile(observed, (permutations + 1, 1))
    for rows in groups:
        permuted[1:, rows] = rng.permuted(np.tile(observed[rows], (permutations, 1)), axis=1)
    score = _permuted_products(permuted, predicted) if kind == "continuous" else _permuted_areas(permuted, predicted, kind)
    tolerance = 1e-12 * max(1.0, abs(float(score[0])))
    chance = score[1:].mean() + np.sqrt(2) * (score[1:] - score[1:].mean()) if shared else score[1:]
    return float((1 + np.sum(chance >= score[0] - tolerance)) / (1 + permutations))


def holm(p_values: Sequence[float]) -> list[float]:
    """P values of several targets or comparisons, corrected for their number (Holm 1979)."""
    order = np.argsort(p_values, kind="stable")
    corrected = np.empty(len(order))
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, np.asarray(p_values)[order] * np.arange(len(order), 0, -1)))
    return [float(p) for p in corrected]


def permuted_names(names: Sequence[str], strata: Sequence[str] | NDArray | None, rng: np.random.Generator) -> dict[str, str]:
    """Every name -> another of its stratum, by a random permutation."""
    order = np.arange(len(names))
    for rows in _members(strata, len(names)):
        order[rows] = rng.permutation(rows)
    return {name: names[int(place)] for name, place in zip(names, order, strict=True)}


def detectable_difference(error: float, *, level: float = 0.05, power: float = 0.8) -> float:
    """Smallest true difference that a two-sided test at ``level`` finds with ``power``, given a standard error."""
    return float((ndtri(1 - level / 2) + ndtri(power)) * error)


def detectable_auroc(positives: int, negatives: int, *, level: float = 0.05, power: float = 0.8) -> float:
    """Smallest AUROC that one-sided testing against 0.5 at ``level`` finds with ``power`` on independent test people.

    The null error is exact (Mann–Whitney); under the alternative Hanley & McNeil's (1982) formula.
    """
    null = np.sqrt((positives + negatives + 1) / (12 * positives * negatives))
    grid = np.linspace(0.5, 1.0, 5001)
    first, second = grid / (2 - grid), 2 * grid**2 / (1 + grid)
    spread = grid * (1 - grid) + (positives - 1) * (first - grid**2) + (negatives - 1) * (second - grid**2)
    error = np.sqrt(np.maximum(spread, 0) / (positives * negatives))
    found = grid - 0.5 >= ndtri(1 - level) * null + ndtri(power) * error
    return float(grid[np.argmax(found)]) if found.any() else 1.0


def _codes(units: Sequence[str] | NDArray) -> tuple[NDArray[np.int64], int]:
    names, codes = np.unique(np.asarray(units), return_inverse=True)
    return codes, len(names)


def _members(strata: Sequence[str] | NDArray | None, number: int) -> list[NDArray[np.int64]]:
    if strata is None:
        return [np.arange(number)]
    codes, count = _codes(strata)
    return [np.flatnonzero(codes == code) for code in range(count)]


def _permuted_products(permuted: NDArray[np.float64], predicted: NDArray[np.float64]) -> NDArray[np.float64]:
    return permuted @ predicted.mean(0)


def _permuted_areas(permuted: NDArray[np.float64], predicted: NDArray[np.float64], kind: str) -> NDArray[np.float64]:
    """Mean one-versus-rest AUROC of every permutation; ranks are fixed, so each is one matrix product."""
    classes = [1] if kind == "binary" else range(predicted.shape[2])
    total = np.zeros(len(permuted))
    for code in classes:
        members = (permuted == code).astype(np.float64)
        m = members[0].sum()
        n = members.shape[1] - m
        ranks = np.mean([rankdata(repeat[:, code]) for repeat in predicted], axis=0)
        total += (members @ ranks - m * (m + 1) / 2) / (m * n)
    return total / len(classes)
