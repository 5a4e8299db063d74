"""Scores of classes, grades and survival of held-out people, every method beside the model, with paired differences.

One row per score and method: value, 95 % bootstrap interval over people, people, seed; ``model − floor`` rows are differences on the same
resamples. A score that cannot be computed has a reason, never a number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.scan_tuning import NO_SCORES, RESAMPLES
from brainfm_cli.learning.scores import METRICS, score, statistic
from brainfm_cli.learning.survival import (
    Outcome,
    kaplan_meier,
    weighted_auroc_at,
    weighted_brier,
    weighted_harrell,
    weighted_integrated_brier,
    weighted_uno,
)
from brainfm_cli.learning.uncertainty import averaged, interval, resample_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from brainfm_cli.learning.uncertainty import Weighted

MODEL = "model"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """One score of one method."""

    weighted: Weighted | None
    """As a function of weights; none where there is no interval."""
    value: float | None
    """On everybody."""
    reason: str | None = None
    """Why there is no value or interval."""


def score_classes(
    observed: NDArray[np.int64], predicted: Mapping[str, NDArray[np.float64]], *, classes: int, seed: int, ordered: bool = False
) -> pd.DataFrame:
    """Scores of (people, classes) probabilities; the primary one, AUROC or for ordered classes quadratic κ, comes first.

    Of ordered classes the median one is decided, which is what a mean absolute error wants.
    """
    if not len(observed):
        return NO_SCORES
    kind = "binary" if classes == 2 else "multiclass"
    found: dict[str, dict[str, Scored]] = {}
    for name, chances in predicted.items():
        decided = median_class(chances) if ordered else chances.argmax(1)
        for metric, one in score(kind, observed.astype(float), chances, decided, ordered=ordered).items():
            weighted = statistic(metric, kind, observed.astype(float), chances, decided) if one.value is not None else None
            found.setdefault(METRICS[metric].label, {})[name] = Scored(weighted=weighted, value=one.value, reason=one.reason)
        if ordered:
            errors = np.abs(decided - observed).astype(np.float64)
            concordant = _grade_concordance(observed, chances @ np.arange(classes))
            found.setdefault("MAE (grades)", {})[name] = _scored(lambda w, e=errors: w @ e / w.sum(1), len(observed))  # type: ignore[misc]
            found.setdefault("Concordance of grades", {})[name] = _scored(concordant, len(observed))
    first = METRICS["quadratic_kappa"].label if ordered and classes > 2 else METRICS["auroc"].label
    compared = (first, "Concordance of grades") if ordered else (first,)
    return _table({name: found[name] for name in (first, *(other for other in found if other != first))}, compared, len(observed), seed)


def median_class(chances: NDArray[np.float64]) -> NDArray[np.int64]:
    """(people,) the first class at which half of the probability is reached."""
    return np.asarray((chances.cumsum(1) < 0.5 - 1e-12).sum(1).clip(max=chances.shape[1] - 1), np.int64)


def score_survival(
    train: Outcome, test: Outcome, incidences: Mapping[str, NDArray[np.float64]], *, times: Sequence[float], horizons: Sequence[float], unit: str, seed: int
) -> pd.DataFrame:  # fmt: skip
    """Scores of (people, times) cumulative incidences of the event: Uno's and Harrell's C, integrated Brier score, AUROC and Brier at horizons.

    Censoring is weighed by the training people's. Times beyond their follow-up, or that of the test people, are left out.
    """
    if not len(test.time):
        return NO_SCORES
    grid = np.asarray(times, np.float64)
    until = last_known(train)
    kept = np.flatnonzero((grid < until) & (grid < test.time.max()))
    found: dict[str, dict[str, Scored]] = {}

    def add(label: str, name: str, make: Callable[[], Weighted]) -> None:
        try:
            found.setdefault(label, {})[name] = _scored(make(), len(test.time))
        except InputDatasetError as error:
            found.setdefault(label, {})[name] = Scored(weighted=None, value=None, reason=error.what)

    for name, curve in incidences.items():
        risk = curve[:, -1]
        add("Uno C", name, lambda r=risk: weighted_uno(train, test, r, until=until))  # type: ignore[misc]
        add("Harrell C", name, lambda r=risk: weighted_harrell(test, r))  # type: ignore[misc]
        add(
            "Integrated Brier score", name,
            lambda c=curve: weighted_integrated_brier(train, test, 1 - c[:, kept], times=[float(one) for one in grid[kept]]),  # type: ignore[misc]
        )  # fmt: skip
        for when in horizons:
            at = at_time(curve, grid, when)
            add(f"AUROC at {when:g} {unit}", name, lambda a=at, w=when: weighted_auroc_at(train, test, a, when=w))  # type: ignore[misc]
            add(f"Brier score at {when:g} {unit}", name, lambda a=at, w=when: weighted_brier(train, test, 1 - a, when=w))  # type: ignore[misc]
    return _table(found, ("Uno C", "Integrated Brier score"), len(test.time), seed)


def mean_over_draws(draws: Sequence[Mapping[str, Weighted]], people: int, *, label: str, against: Sequence[str], seed: int) -> pd.DataFrame:
    """A score of every method, averaged over draws of training people, and the model's difference from some methods; intervals over people."""
    weights = resample_weights([str(place) for place in range(people)], RESAMPLES, np.random.default_rng(seed))
    methods = {name: averaged([draw[name] for draw in draws]) for name in draws[0]}
    methods |= {f"{MODEL} − {name}": _less(methods[MODEL], methods[name]) for name in against if name in methods}
    one = np.ones((1, people))
    return pd.DataFrame([_row(label, name, float(found(one)[0]), found, None, weights, people, seed) for name, found in methods.items()])


def _less(first: Weighted, second: Weighted) -> Weighted:
    return lambda weights: first(weights) - second(weights)


def primary_classes(observed: NDArray[np.int64], chances: NDArray[np.float64], *, ordered: bool) -> Weighted:
    """What few-shot curves show: AUROC, or of grades the concordance, which needs no cut."""
    if ordered:
        return _grade_concordance(observed, chances @ np.arange(chances.shape[1]))
    found = statistic("auroc", "binary" if chances.shape[1] == 2 else "multiclass", observed.astype(float), chances)
    assert found is not None  # noqa: S101  (AUROC is a function of weights)
    return found


def at_time(curves: NDArray[np.float64], times: NDArray[np.float64], when: float) -> NDArray[np.float64]:
    """(people,) incidence at a time, on straight lines between the told ones, from 0 at time 0; the last value after them."""
    return np.array([np.interp(when, np.r_[0.0, times], np.r_[0.0, one]) for one in curves])


def last_known(train: Outcome) -> float:
    """The time from which no training person is left under observation; infinite where the last one is not censored."""
    curve = kaplan_meier(train, censoring=True)
    gone = curve.times[curve.share <= 0]
    return float(gone[0]) if len(gone) else float("inf")


def _scored(weighted: Weighted, people: int) -> Scored:
    value = float(weighted(np.ones((1, people)))[0])
    return Scored(weighted=weighted, value=value) if np.isfinite(value) else Scored(weighted=None, value=None, reason="no two people can be compared")  # fmt: skip


def _grade_concordance(observed: NDArray[np.int64], expected: NDArray[np.float64]) -> Weighted:
    """Of pairs of people with different grades, the share whose expected grades have the same order; ties count one half."""
    known = (observed[:, None] > observed).astype(np.float64)
    right = known * ((expected[:, None] > expected) + 0.5 * (expected[:, None] == expected))

    def share(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        sums, totals = np.sum(weights @ right * weights, axis=1), np.sum(weights @ known * weights, axis=1)
        return np.divide(sums, totals, out=np.full(len(sums), np.nan), where=totals > 0)

    return share


def _table(found: Mapping[str, Mapping[str, Scored]], compared: Sequence[str], people: int, seed: int) -> pd.DataFrame:
    weights = resample_weights([str(place) for place in range(people)], RESAMPLES, np.random.default_rng(seed))
    rows: list[dict[str, Any]] = []
    for label, methods in found.items():
        rows += [_row(label, name, one.value, one.weighted, one.reason, weights, people, seed) for name, one in methods.items()]
        first = methods.get(MODEL)
        if label not in compared or first is None or first.weighted is None or first.value is None:
            continue
        for name, other in methods.items():
            if name != MODEL and other.weighted is not None and other.value is not None:
                gap = _less(first.weighted, other.weighted)
                rows.append(_row(label, f"{MODEL} − {name}", first.value - other.value, gap, None, weights, people, seed))
    return pd.DataFrame(rows)


def _row(
    label: str, name: str, value: float | None, weighted: Weighted | None, reason: str | None, weights: NDArray[np.float64], people: int, seed: int
) -> dict[str, Any]:  # fmt: skip
    made = None if weighted is None else interval(weighted, weights, method="percentile", level=0.95)
    return {
        "score": label, "method": name, "value": value, "low": None if made is None else made.low, "high": None if made is None else made.high,
        "reason": reason or (None if made is None else made.reason), "people": people, "seed": seed,
    }  # fmt: skip
