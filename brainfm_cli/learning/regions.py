"""Floors that look at single regions and not at connectivity: mean intensity, and the standard deviation over time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from sklearn.decomposition import PCA
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from brainfm_cli.learning.forecasts import Forecast, TrainingFold
from brainfm_cli.learning.linear import choose_penalty, fit_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from sklearn.pipeline import Pipeline

    from brainfm_cli.bids.cohort import Cohort

# Differences between people below this share of a standard deviation are rounding and resampling of standardised series.
_SAME = 0.02


def region_features(cohort: Cohort, participants: Sequence[str], atlas: str, what: Literal["mean", "sd"]) -> NDArray[np.float64] | None:
    """(participants, regions) mean or logarithm of the standard deviation over time, averaged over runs; NaN where a region is lacking.

    None where the series are standardised, so that everybody has the same.
    """
    rows = cohort.index[cohort.index["atlas"] == atlas]
    found: dict[str, list[NDArray[np.float64]]] = {name: [] for name in participants}
    spreads = []
    for run in rows.itertuples():
        if run.participant not in found:
            continue
        series = np.asarray(cohort.series(run), dtype=np.float64)
        spread = series.std(0)
        usable = np.isfinite(series).all(0) & (spread > 0)
        values = series.mean(0) if what == "mean" else np.log(np.where(usable, spread, 1.0))
        found[str(run.participant)].append(np.where(usable, values, np.nan))
        spreads.append(np.where(usable, spread, np.nan))
    stack = [np.stack(runs) for runs in found.values()]
    features = np.array([np.where(np.isfinite(runs).any(0), np.nansum(runs, 0) / np.maximum(np.isfinite(runs).sum(0), 1), np.nan) for runs in stack])  # fmt: skip
    features = features[:, np.isfinite(features).mean(0) > 0.5]
    scale = 1.0 if what == "sd" else float(np.nanmedian(spreads))
    if features.shape[1] == 0 or np.nanmax(np.nanmax(features, 0) - np.nanmin(features, 0)) < _SAME * scale:
        return None
    return features


@dataclass(frozen=True, kw_only=True)
class RegionFloor:
    """Logistic or ridge regression on region features, or on their principal components."""

    participants: tuple[str, ...]
    """Participant keys."""
    features: NDArray[np.float64]
    """(participants, regions), NaN where lacking."""
    components: int | None
    """Principal components kept; none uses the regions themselves."""
    penalties: tuple[float, ...]
    """Inverse penalties tried."""

    def __call__(self, fold: TrainingFold, test: Sequence[str]) -> Forecast:
        """Imputation, scaling, components and penalty from the training people."""
        place = {name: row for row, name in enumerate(self.participants)}
        people = self.features[[place[name] for name in fold.target.participants]]
        others = self.features[[place[name] for name in test]]
        model = "ridge" if fold.target.kind == "continuous" else "logistic"

        def fitted(
            rows: NDArray[np.float64], observed: NDArray[np.float64], outside: NDArray[np.float64], penalties: Sequence[float]
        ) -> list[NDArray[np.float64]]:
            prepare = self._preparation(rows)
            inputs, given = prepare.fit_transform(rows), prepare.transform(outside)
            scale = np.sqrt(np.mean(np.sum(inputs**2, axis=1)))  # penalties mean the same for any number of regions
            return [fit_model(model, inputs / scale, observed, value, exact=False)(given / scale) for value in penalties]

        def path(train: NDArray[np.int64], validation: NDArray[np.int64]) -> list[NDArray[np.float64]]:
            return fitted(people[train], fold.target.observed[train], people[validation], self.penalties)

        best, held_out = choose_penalty(fold, path, self.penalties)
        chosen = self.penalties[best]
        return Forecast(test=fitted(people, fold.target.observed, others, [chosen])[0], train=held_out, choices={"C": chosen})

    def _preparation(self, rows: NDArray[np.float64]) -> Pipeline:
        steps = [SimpleImputer(strategy="median", keep_empty_features=True), StandardScaler()]
        if self.components is not None:
            steps.append(PCA(min(self.components, len(rows) - 1, rows.shape[1]), svd_solver="full"))
        return make_pipeline(*steps)
