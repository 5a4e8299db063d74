"""Curves behind the pictures of an evaluation, averaged over repetitions: ROC, precision-recall, reliability, net benefit.

Averages are taken so that the area under an averaged curve is the averaged score, which is the one printed beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from sklearn import metrics

from brainfm_cli.learning.scores import CALIBRATION_BINS

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Curve:
    """A line to draw."""

    x: NDArray[np.float64]
    """(points,) ascending."""
    y: NDArray[np.float64]
    """(points,)."""


@dataclass(frozen=True, slots=True)
class Reliability:
    """Observed share of the class among people of similar probability."""

    mean: NDArray[np.float64]
    """(bins,) mean probability; NaN in empty bins."""
    observed: NDArray[np.float64]
    """(bins,) share of the class; NaN in empty bins."""
    people: NDArray[np.float64]
    """(bins,) people, averaged over repetitions."""


def roc(labels: NDArray[np.int64], p: NDArray[np.float64]) -> Curve:
    """Sensitivity over 1 − specificity of (repetitions, people) probabilities; ``labels`` are (people,) 0 and 1, both present."""
    curves = [metrics.roc_curve(labels, row, drop_intermediate=True)[:2] for row in p]
    # A vertical step has two points at one x; np.interp would see one of them only, so each x is taken from both sides.
    grid = np.unique(np.concatenate([false for false, _ in curves]))
    low = np.mean([_one_sided(false, true, grid, last=False) for false, true in curves], axis=0)
    high = np.mean([_one_sided(false, true, grid, last=True) for false, true in curves], axis=0)
    return Curve(x=np.repeat(grid, 2), y=np.column_stack([low, high]).ravel())


def precision_recall(labels: NDArray[np.int64], p: NDArray[np.float64]) -> Curve:
    """Precision as a step function of recall, of (repetitions, people) probabilities; y holds to the left of its x."""
    grid = np.arange(1, int(labels.sum()) + 1) / labels.sum()
    rows = []
    for row in p:
        precision, recall, _ = metrics.precision_recall_curve(labels, row)
        reached = np.searchsorted(recall[::-1], grid - 1e-12)
        rows.append(precision[::-1][reached])
    return Curve(x=grid, y=np.mean(rows, axis=0))


def reliability(labels: NDArray[np.int64], p: NDArray[np.float64], bins: int = CALIBRATION_BINS) -> Reliability:
    """Equal bins of (repetitions, people) probabilities."""
    place = np.clip((p * bins).astype(np.int64), 0, bins - 1).ravel()
    counts = np.bincount(place, minlength=bins).astype(np.float64)
    with np.errstate(invalid="ignore"):
        mean = np.bincount(place, weights=p.ravel(), minlength=bins) / counts
        observed = np.bincount(place, weights=np.tile(labels, len(p)).astype(np.float64), minlength=bins) / counts
    return Reliability(mean=mean, observed=observed, people=counts / len(p))


def net_benefit(labels: NDArray[np.int64], p: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    """(thresholds,) net benefit per person of acting on probabilities at or above a threshold (Vickers & Elkin 2006)."""
    acted = p[:, :, None] >= thresholds
    hits = (acted & (labels == 1)[None, :, None]).mean((0, 1))
    false = (acted & (labels == 0)[None, :, None]).mean((0, 1))
    return hits - false * thresholds / (1 - thresholds)


def _one_sided(x: NDArray[np.float64], y: NDArray[np.float64], grid: NDArray[np.float64], *, last: bool) -> NDArray[np.float64]:
    """A curve's value at ``grid``: the first or the last of the points that share an x, linear in between."""
    distinct, first = np.unique(x, return_index=True)
    ends = np.r_[first[1:], len(x)] - 1
    at_grid = np.interp(grid, distinct, y[ends if last else first])
    if len(distinct) == len(x):
        return at_grid
    # Between two distinct x the line runs from the last point of the left to the first point of the right one.
    right = np.clip(np.searchsorted(distinct, grid, side="left"), 1, len(distinct) - 1)
    left = right - 1
    share = (grid - distinct[left]) / (distinct[right] - distinct[left])
    between = y[ends[left]] * (1 - share) + y[first[right]] * share
    return np.where(np.isin(grid, distinct), at_grid, between)
