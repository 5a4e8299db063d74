"""Several readers, several cases: how far accuracies, and their differences, hold for other readers and other cases.

The analysis of Obuchowski & Rockette (1995) with Hillis's degrees of freedom (2007). An accuracy of every cell (arm and
reader) comes with its *influence*: how much each case moves it. The covariance of any two cells is the inner product of
their influences, which for areas under the ROC curve is DeLong's, also where not everybody read every case.

Everything that is asked is the mean over readers of one value per reader (a cell, or a difference of two), or the
difference of two such means: readers in two arms, senior and junior readers, readers and a model. Variants: readers and cases
random (the result holds for other readers and cases), readers fixed (for these readers, other cases), cases fixed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy import stats

from brainfm_cli.config import Frozen
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.uncertainty import leave_one_out_weights, placements

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from brainfm_cli.learning.uncertainty import Weighted

Variant = Literal["random", "fixed readers", "fixed cases"]
VARIANTS: tuple[Variant, ...] = ("random", "fixed readers", "fixed cases")
_NOTHING = 1e-12


class Estimate(Frozen):
    """A mean or a difference with its interval and test, or why there is none."""

    value: float | None = None
    """The estimate."""
    low: float | None = None
    """Lower end of the interval."""
    high: float | None = None
    """Upper end."""
    error: float | None = None
    """Standard error."""
    df: float | None = None
    """Degrees of freedom of t; none where the normal distribution is used."""
    p: float | None = None
    """Two-sided p of the estimate being 0; none for what is no difference."""
    reason: str | None = None
    """Why something is not computed."""


class Components(Frozen):
    """Mean squares and error covariances of a study in which every reader read in every arm."""

    error_variance: float
    """Of one cell."""
    cov1: float
    """Same reader, other arm."""
    cov2: float
    """Other reader, same arm."""
    cov3: float
    """Other reader, other arm."""
    ms_arm: float
    """MS(T)."""
    ms_arm_reader: float
    """MS(T·R)."""


class Omnibus(Frozen):
    """Test of all arms being equal."""

    variant: Variant
    """What is random."""
    statistic: float
    """F, or χ² for fixed readers."""
    df1: float
    """Of the arms."""
    df2: float | None
    """Of the denominator; none for χ²."""
    p: float
    """P value."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cells:
    """An accuracy of every cell."""

    values: NDArray[np.float64]
    """(arms, readers); NaN where a reader did not read in an arm."""
    influence: NDArray[np.float64]
    """(arms, readers, cases); 0 for cases that were not read, NaN for the whole of an absent cell."""

    def covariance(self) -> NDArray[np.float64]:
        """(arms · readers, arms · readers)."""
        flat = self.influence.reshape(-1, self.influence.shape[2])
        return flat @ flat.T


def areas(scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> Cells:
    """Areas under the ROC curves of (arms, readers, cases) scores, NaN where unread.

    Raises
    ------
    InputDatasetError
        A reader read fewer than two cases of one class in an arm.
    """
    values, influence = _empty(scores)
    for place in np.ndindex(values.shape):
        read = np.isfinite(scores[place])
        if not read.any():
            continue
        m, n = int((read & truth).sum()), int((read & ~truth).sum())
        if min(m, n) < 2:
            raise InputDatasetError(
                f"reader {place[1] + 1} of arm {place[0] + 1} scored {m} cases with and {n} without the condition",
                fix="an area under the ROC curve needs two of each; leave the reader out",
            )
        above, below = placements(scores[place][read & truth], scores[place][read & ~truth])
        values[place] = above.mean()
        influence[place] = 0.0
        influence[place][read & truth] = _spread(above)
        influence[place][read & ~truth] = _spread(below)
    return Cells(values=values, influence=influence)


def means(numbers: NDArray[np.float64]) -> Cells:
    """Means over cases of (arms, readers, cases) numbers (right or wrong, log seconds), NaN where a case does not count."""
    values, influence = _empty(numbers)
    for place in np.ndindex(values.shape):
        read = np.isfinite(numbers[place])
        if read.sum() >= 2:
            values[place] = numbers[place][read].mean()
            influence[place] = 0.0
            influence[place][read] = _spread(numbers[place][read])
    return Cells(values=values, influence=influence)


def jackknifed(statistic: Sequence[Sequence[Weighted | None]], cases: int) -> Cells:
    """Any score of (arms)(readers), each a function of (resamples, cases) weights; covariances by the jackknife over cases."""
    weights = leave_one_out_weights(np.arange(cases))
    values, influence = _empty(np.zeros((len(statistic), len(statistic[0]), cases)))
    for arm, row in enumerate(statistic):
        for reader, weighted in enumerate(row):
            if weighted is not None:
                without = weighted(weights)
                values[arm, reader] = weighted(np.ones((1, cases)))[0]
                influence[arm, reader] = np.sqrt((cases - 1) / cases) * (without - without.mean())
    return Cells(values=values, influence=influence)


def _empty(scores: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    return np.full(scores.shape[:2], np.nan), np.full(scores.shape, np.nan)


def _spread(parts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Influence of each part on their mean, so that squares add up to its estimated variance."""
    count = len(parts)
    return (parts - parts.mean()) / np.sqrt(count * (count - 1))


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """One value per reader, with what each case does to it."""

    values: NDArray[np.float64]
    """(readers,)."""
    influence: NDArray[np.float64]
    """(readers, cases)."""
    fixed: bool = False
    """These readers are the only ones meant, e.g. a model."""


def of_arm(cells: Cells, arm: int, readers: Sequence[int] | NDArray[np.int64], *, fixed: bool = False) -> Group:
    """What readers reach in one arm; those without a cell are left out."""
    known = [reader for reader in readers if np.isfinite(cells.values[arm, reader])]
    return Group(values=cells.values[arm, known], influence=cells.influence[arm, known], fixed=fixed)


def of_change(cells: Cells, arm: int, reference: int, readers: Sequence[int] | NDArray[np.int64]) -> Group:
    """What readers reach in an arm less what the same readers reach in the reference."""
    known = [reader for reader in readers if np.isfinite(cells.values[[arm, reference], reader]).all()]
    return Group(
        values=cells.values[arm, known] - cells.values[reference, known],
        influence=cells.influence[arm, known] - cells.influence[reference, known],
    )


def estimate(first: Group, second: Group | None = None, *, variant: Variant = "random", level: float = 0.95, test: bool = True) -> Estimate:
    """Mean of ``first``, less that of ``second``, over random or fixed readers and cases.

    With r readers of values Y: (MS(R) + r·max(Cov2, 0))/r, where MS(R) is their variance and Cov2 the mean covariance of two of
    them through the cases; a difference of groups subtracts twice the covariance between them. Degrees of freedom after Hillis
    (2007), by Satterthwaite for two groups.
    """
    groups = [first] if second is None else [first, second]
    for group in groups:
        if not len(group.values):
            return Estimate(reason="nobody read")
    value = float(first.values.mean() - (second.values.mean() if second is not None else 0.0))
    if variant != "fixed readers" and any(len(group.values) < 2 and not group.fixed for group in groups):
        return Estimate(value=value, reason="one reader only: nothing can be said of others")
    moved = first.influence.mean(0) - (second.influence.mean(0) if second is not None else 0.0)
    by_readers = [0.0 if group.fixed else float(group.values.var(ddof=1)) / len(group.values) for group in groups] if variant != "fixed readers" else []  # fmt: skip
    if variant == "fixed readers":
        variance, df = float(moved @ moved), None
    else:
        # the variance of the mean through the cases, less each random group's own variances: what stays with ever more readers
        shared = float(moved @ moved) - sum(_own(group) for group in groups if not group.fixed) if variant == "random" else 0.0
        variance = sum(by_readers) + max(shared, 0.0)
        parts = sum(one**2 / (len(group.values) - 1) for one, group in zip(by_readers, groups, strict=True) if not group.fixed)
        df = variance**2 / parts if parts > _NOTHING**2 else None
    return _with_interval(value, variance, df, level=level, test=test)


def _own(group: Group) -> float:
    """What replaces the square of a mean over r readers by the mean covariance of two different ones.

    The variance of the mean is (V + (r − 1)·Cov2)/r, of which Cov2 is wanted: (V − Cov2)/r is taken off.
    """
    count = len(group.values)
    products = group.influence @ group.influence.T
    variance = float(np.trace(products)) / count
    between = (float(products.sum()) - count * variance) / (count * (count - 1))
    return (variance - between) / count


def _with_interval(value: float, variance: float, df: float | None, *, level: float, test: bool) -> Estimate:
    error = float(np.sqrt(max(variance, 0.0)))
    if error < _NOTHING:
        return Estimate(value=value, error=0.0, reason="every reader and case says the same: no interval")
    half = float(stats.t.ppf((1 + level) / 2, df) if df is not None else stats.norm.ppf((1 + level) / 2)) * error
    tail = stats.t.sf(abs(value) / error, df) if df is not None else stats.norm.sf(abs(value) / error)
    return Estimate(
        value=value,
        low=value - half,
        high=value + half,
        error=error,
        df=None if df is None else float(df),
        p=float(2 * tail) if test else None,
    )


def components(cells: Cells) -> Components | None:
    """Mean squares and covariances; none where a reader lacks an arm, or there are fewer than two arms or readers."""
    arms, readers = cells.values.shape
    if min(arms, readers) < 2 or not np.isfinite(cells.values).all():
        return None
    covariance = cells.covariance().reshape(arms, readers, arms, readers)
    same_arm, same_reader = np.eye(arms, dtype=bool)[:, None, :, None], np.eye(readers, dtype=bool)[None, :, None, :]

    def mean(which: NDArray[np.bool_]) -> float:
        return float(covariance[np.broadcast_to(which, covariance.shape)].mean())

    centred = cells.values - cells.values.mean()
    by_arm, by_reader = centred.mean(1, keepdims=True), centred.mean(0, keepdims=True)
    rest = centred - by_arm - by_reader
    return Components(
        error_variance=mean(same_arm & same_reader),
        cov1=mean(~same_arm & same_reader),
        cov2=mean(same_arm & ~same_reader),
        cov3=mean(~same_arm & ~same_reader),
        ms_arm=readers * float(np.sum(by_arm**2)) / (arms - 1),
        ms_arm_reader=float(np.sum(rest**2)) / ((arms - 1) * (readers - 1)),
    )


def omnibus(found: Components, arms: int, readers: int, variant: Variant) -> Omnibus | None:
    """Test of all arms being equal (Hillis 2007, OR-DBM MRMC's three analyses); none where nothing varies."""
    excess = max(found.cov2 - found.cov3, 0.0)
    df1, df2 = arms - 1, (arms - 1) * (readers - 1)
    if variant == "fixed readers":
        scale = found.error_variance - found.cov1 + (readers - 1) * excess
        if scale <= _NOTHING:
            return None
        statistic = df1 * found.ms_arm / scale
        return Omnibus(variant=variant, statistic=statistic, df1=df1, df2=None, p=float(stats.chi2.sf(statistic, df1)))
    scale = found.ms_arm_reader + (readers * excess if variant == "random" else 0.0)
    if scale <= _NOTHING or found.ms_arm_reader <= _NOTHING:
        return None
    freedom = scale**2 / (found.ms_arm_reader**2 / df2)
    statistic = found.ms_arm / scale
    return Omnibus(variant=variant, statistic=statistic, df1=df1, df2=freedom, p=float(stats.f.sf(statistic, df1, freedom)))
