"""How far readers agree with one another: Cohen's κ of decisions and of ordinal scores, over all pairs of readers."""

from __future__ import annotations

from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from brainfm_cli.config import Frozen
from brainfm_cli.learning.scores import Score
from brainfm_cli.learning.uncertainty import interval, resample_weights

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from brainfm_cli.learning.reading_table import ReaderStudySettings, Readings
    from brainfm_cli.learning.uncertainty import Weighted

_FEWEST = 2  # cases that two readers share
_MOST_VALUES = 10  # of an ordinal score


class Agreement(Frozen):
    """How far readers agree in one arm."""

    arm: str
    """Name."""
    pairs: int
    """Pairs of readers."""
    kappa: Score
    """Cohen's κ of decisions, mean over pairs of readers (Light 1971)."""
    weighted_kappa: Score
    """Quadratic κ of scores with at most ten values, mean over pairs."""


def agreement(readings: Readings, settings: ReaderStudySettings) -> list[Agreement]:
    """Agreement in every arm, with intervals over cases."""
    weights = resample_weights(np.arange(len(readings.cases)), settings.bootstraps, np.random.default_rng(settings.seed))
    found = []
    for place, arm in enumerate(readings.arms):
        decisions = None if readings.decisions is None else readings.decisions[place]
        scores = readings.scores[place]
        coarse = scores if len(np.unique(scores[np.isfinite(scores)])) <= _MOST_VALUES else None
        found.append(
            Agreement(
                arm=arm,
                pairs=len(list(combinations(range(len(readings.readers)), 2))),
                kappa=_mean_kappa(decisions, weights, settings.level, "no decisions and no threshold", squared=False),
                weighted_kappa=_mean_kappa(coarse, weights, settings.level, f"scores have more than {_MOST_VALUES} values", squared=True),
            )
        )
    return found


def _mean_kappa(readings: NDArray[np.float64] | None, weights: NDArray[np.float64], level: float, absent: str, *, squared: bool) -> Score:
    """Mean over pairs of readers of Cohen's κ on the cases that both read."""
    if readings is None:
        return Score(reason=absent)
    pairs = [(readings[a], readings[b]) for a, b in combinations(range(len(readings)), 2)]
    pairs = [pair for pair in pairs if (np.isfinite(pair[0]) & np.isfinite(pair[1])).sum() >= _FEWEST]
    if not pairs:
        return Score(reason="no two readers read the same cases")
    parts = [_kappa(first, second, squared=squared) for first, second in pairs]

    def mean(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        values = np.array([part(rows) for part in parts])
        known = np.isfinite(values)
        total = known.sum(0)
        return np.divide(np.where(known, values, 0.0).sum(0), total, out=np.full(len(rows), np.nan), where=total > 0)

    value = float(mean(np.ones((1, weights.shape[1])))[0])
    if not np.isfinite(value):
        return Score(reason="everybody says the same of every case: κ is undefined")
    found = interval(mean, weights, method="percentile", level=level)
    return Score(value=value, low=found.low, high=found.high, reason=found.reason)


def _kappa(first: NDArray[np.float64], second: NDArray[np.float64], *, squared: bool) -> Weighted:
    """Cohen's κ as a function of (resamples, cases) weights; disagreements count alike, or by their square."""
    both = np.isfinite(first) & np.isfinite(second)
    values = np.unique(np.r_[first[both], second[both]])
    mine, theirs = ((one[both][:, None] == values).astype(np.float64) for one in (first, second))
    cost = (values[:, None] - values[None, :]) ** 2 if squared else (values[:, None] != values[None, :]).astype(np.float64)
    seen = np.sum(mine @ cost * theirs, axis=1)

    def kappa(rows: NDArray[np.float64]) -> NDArray[np.float64]:
        used = rows[:, both]
        total = used.sum(1)
        chance = np.sum((used @ mine) @ cost * (used @ theirs), axis=1)
        return 1 - np.divide(used @ seen * total, chance, out=np.full(len(rows), np.nan), where=chance > 0)

    return kappa
