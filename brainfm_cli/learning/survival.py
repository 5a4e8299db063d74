"""Scores of survival: concordance (Harrell, Uno), time-dependent AUROC, Brier score and its integral.

Each is a function of (resamples, people) weights, as in :mod:`brainfm_cli.learning.scores`: a row of ones gives the
score itself, bootstrap rows its interval. Censoring is weighed by its Kaplan–Meier curve among *training* people, so
that nothing of the test people's follow-up is fitted. NaN where nobody can be compared.

With a competing end (death before metastasis), people who had it are known to be free of the event for good: they are never censored, stay
in every comparison, and a forecast is one minus the cumulative incidence (Wolbers et al. 2014; Blanche et al. 2013, second definition).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.integrate import trapezoid

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.scores import weighted_auroc

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from brainfm_cli.learning.uncertainty import Weighted


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How long each person was followed, and whether that ended in the event."""

    time: NDArray[np.float64]
    """(people,) follow-up, in one unit."""
    event: NDArray[np.bool_]
    """(people,) whether the event happened; otherwise the person was censored, or had the competing end."""
    competing: NDArray[np.bool_] | None = None
    """(people,) whether something happened after which the event cannot; none where there is no such end."""

    def __post_init__(self) -> None:
        if self.time.shape != self.event.shape or self.time.ndim != 1:
            raise InputDatasetError(f"{self.time.shape} follow-up times for {self.event.shape} events", fix="give one of each per person")
        if not np.isfinite(self.time).all() or (self.time < 0).any():
            raise InputDatasetError("a follow-up time is missing, infinite or negative", fix="mend the time column, or leave the person out ('where')")  # fmt: skip
        if self.event.dtype != np.bool_:
            raise InputDatasetError(f"events are {self.event.dtype}, not true or false", fix="declare which code is the event: it is never guessed")  # fmt: skip
        if self.competing is not None and (self.competing.shape != self.event.shape or (self.competing & self.event).any()):
            raise InputDatasetError("somebody had both the event and the competing end, or one of them is not known for everybody", fix="give one end per person")  # fmt: skip

    @property
    def freed(self) -> NDArray[np.bool_]:
        """(people,) who had the competing end."""
        return np.zeros(len(self.event), bool) if self.competing is None else self.competing


@dataclass(frozen=True, kw_only=True)
class StepCurve:
    """A Kaplan–Meier curve."""

    times: NDArray[np.float64]
    """(steps,) distinct times, ascending."""
    share: NDArray[np.float64]
    """(steps,) share still free of the event just after each."""

    def at(self, when: NDArray[np.float64]) -> NDArray[np.float64]:
        """The share at each of ``when``; 1 before the first step."""
        return np.r_[1.0, self.share][np.searchsorted(self.times, when, side="right")]


def kaplan_meier(outcome: Outcome, *, censoring: bool = False) -> StepCurve:
    """Share of people free of the event over time; with ``censoring`` free of censoring, where events come first among ties."""
    times, inverse = np.unique(outcome.time, return_inverse=True)
    ended = outcome.event | outcome.freed if censoring else outcome.event
    total, events = np.bincount(inverse), np.bincount(inverse, weights=ended)
    at_risk = (np.cumsum(total[::-1])[::-1]).astype(np.float64)
    happened = total - events if censoring else events
    if censoring:
        at_risk = at_risk - events
    factors = np.divide(at_risk - happened, at_risk, out=np.ones(len(times)), where=at_risk > 0)
    return StepCurve(times=times, share=np.cumprod(factors))


def weighted_harrell(outcome: Outcome, risk: NDArray[np.float64]) -> Weighted:
    """Harrell's C: of pairs whose order is known, how many the risk orders rightly; ties of risk count one half."""
    return _concordance(outcome, risk, np.ones(len(risk)), outcome.freed.astype(np.float64))


def weighted_uno(train: Outcome, outcome: Outcome, risk: NDArray[np.float64], *, until: float) -> Weighted:
    """Uno's C (2011): the same for events before ``until``, weighed so that it does not depend on censoring.

    Raises
    ------
    InputDatasetError
        No training person is followed as long as an event before ``until``.
    """
    used = outcome.event & (outcome.time < until)
    mine = _inverse(train, outcome.time, used)
    before = outcome.freed & (outcome.time < until)
    return _concordance(outcome, risk, mine, _inverse(train, outcome.time, before))


def _concordance(outcome: Outcome, risk: NDArray[np.float64], weight: NDArray[np.float64], freed: NDArray[np.float64]) -> Weighted:
    """Pairs (i, j): i has the event, and j is followed longer, or as long and without the event, or had the competing end before.

    A pair weighs ``weight`` of i squared, or with the competing end that of i times ``freed`` of j.
    """
    time, event = outcome.time, outcome.event
    later = (time[:, None] < time) | ((time[:, None] == time) & ~event)
    known = (event * weight**2)[:, None] * later + (event * weight)[:, None] * (freed * outcome.freed) * ~later
    right = known * ((risk[:, None] > risk) + 0.5 * (risk[:, None] == risk))

    def share(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        return _ratio(np.sum(weights @ right * weights, axis=1), np.sum(weights @ known * weights, axis=1))

    return share


def weighted_auroc_at(train: Outcome, outcome: Outcome, risk: NDArray[np.float64], *, when: float) -> Weighted:
    """Cumulative/dynamic AUROC (Uno 2007): people with the event by ``when`` against those free of it, for now or for good."""
    case, free = outcome.event & (outcome.time <= when), outcome.time > when
    freed = outcome.freed & (outcome.time <= when)
    still = _inverse(train, np.full(len(risk), when), free) if freed.any() else free.astype(np.float64)
    share = np.where(free, still, _inverse(train, outcome.time, case | freed))
    area = weighted_auroc(case.astype(np.int64), risk)
    return lambda weights: area(weights * share)


def weighted_brier(train: Outcome, outcome: Outcome, survival: NDArray[np.float64], *, when: float) -> Weighted:
    """Brier score at ``when`` (Graf 1999) of (people,) forecast probabilities to be free of the event then."""
    errors = _brier_terms(train, outcome, survival[:, None], [when])[:, 0]
    return lambda weights: _ratio(weights @ errors, weights.sum(1))


def weighted_integrated_brier(train: Outcome, outcome: Outcome, survival: NDArray[np.float64], *, times: Sequence[float]) -> Weighted:
    """Brier score of (people, times) probabilities, integrated over ``times`` by trapezoids and divided by their span.

    Raises
    ------
    InputDatasetError
        Fewer than two times, or times that do not ascend or lie beyond the training people's follow-up.
    """
    grid = np.asarray(times, dtype=np.float64)
    if len(grid) < 2 or (np.diff(grid) <= 0).any():
        raise InputDatasetError("the integrated Brier score needs two or more ascending times", fix="give times inside the follow-up")
    errors = trapezoid(_brier_terms(train, outcome, survival, times), grid, axis=1) / (grid[-1] - grid[0])
    return lambda weights: _ratio(weights @ errors, weights.sum(1))


def _brier_terms(train: Outcome, outcome: Outcome, survival: NDArray[np.float64], times: Sequence[float]) -> NDArray[np.float64]:
    """(people, times) squared errors, weighed against censoring; 0 for people censored before."""
    terms = np.zeros((len(outcome.time), len(times)))
    for column, when in enumerate(times):
        case, free = outcome.event & (outcome.time <= when), outcome.time > when
        freed = outcome.freed & (outcome.time <= when)
        weight = _inverse(train, np.where(case | freed, outcome.time, when), case | free | freed)
        terms[:, column] = weight * np.where(case, survival[:, column], 1 - survival[:, column]) ** 2
    return terms


def _inverse(train: Outcome, when: NDArray[np.float64], used: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(people,) 1 / share of training people not yet censored at ``when``; 0 where not ``used``."""
    share = kaplan_meier(train, censoring=True).at(when)
    if (used & (share <= 0)).any():
        raise InputDatasetError(
            f"no training person is followed beyond {when[used & (share <= 0)].min():g}: later times cannot be scored",
            fix="score earlier times only",
        )
    return np.divide(1.0, share, out=np.zeros(len(share)), where=used)


def _ratio(sums: NDArray[np.float64], totals: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.divide(sums, totals, out=np.full(len(sums), np.nan), where=totals > 0)
