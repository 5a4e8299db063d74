"""What any model must beat, fitted on the same folds: majority, covariates, regions, linear and kernel models of connectivity.

Everything is fitted inside the fold; what does not depend on it (Gram matrices) comes ready-made from
:mod:`brainfm_cli.learning.kernels`. Penalties are chosen on inner folds by AUROC (two classes), log-loss or squared error.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import Field
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from brainfm_cli.config import Frozen
from brainfm_cli.learning.forecasts import Forecast, Predictor, TrainingFold
from brainfm_cli.learning.kernels import Kernel, StandardisedEdges, connectivity_features, connectivity_kernel, shared_atlases
from brainfm_cli.learning.linear import choose_penalty, fit_model, penalty_path, rescaled
from brainfm_cli.learning.machines import KernelRidgeFloor, SupportVectorFloor
from brainfm_cli.learning.regions import RegionFloor, region_features
from brainfm_cli.learning.targets import Target, class_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from brainfm_cli.bids.cohort import Cohort

FloorKind = Literal["majority", "covariates", "means", "spread", "fisherz", "fisherz-standardised", "tangent", "svm", "kernel-ridge"]
LABELS = {"majority": "Majority", "covariates": "Motion, age, sex, site", "fisherz": "Linear, Fisher-z", "fisherz-standardised": "Linear, Fisher-z, edges standardised", "tangent": "Linear, tangent", "svm": "Linear SVM, Fisher-z", "kernel-ridge": "Kernel ridge, Fisher-z", "means": "Linear, region means", "spread": "PCA + linear, region SD"}  # fmt: skip
# Attributes that may be the very definition of a target; site and motion never are: they stay, as confounds.
_DEFINING = ("age", "sex")
_NAMES = ("sex", "site", "dataset")
_SEPARATOR = " · "


class FloorSettings(Frozen):
    """Which floors stand beside the model, and how they are tuned."""

    kinds: tuple[FloorKind, ...] = (
        "majority",
        "covariates",
        "means",
        "spread",
        "fisherz",
        "fisherz-standardised",
        "tangent",
        "svm",
        "kernel-ridge",
    )
    """Floors to fit."""
    covariates: tuple[str, ...] = ("mean_fd", "kept_fraction", "age", "sex", "site")
    """Columns of the covariate floor; absent ones are named and left out."""
    penalties: tuple[float, ...] = Field(default=(0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0), min_length=1)
    """Inverse penalties C tried on inner folds, for features of mean squared norm 1."""
    components: int = Field(default=20, ge=1)
    """Principal components of the region SD, taken from training people."""


@dataclass(frozen=True, kw_only=True)
class Floors:
    """Floors ready for evaluation."""

    predictors: dict[str, Predictor]
    """By printed name."""
    pools: dict[str, tuple[str, ...]]
    """Name of a pooled floor -> the per-atlas floors whose predictions it averages."""
    notes: tuple[str, ...]
    """What was left out and why."""
    kernels: dict[str, Kernel]
    """Fisher-z kernel by atlas, for the leak audit."""


def make_floors(cohort: Cohort, target: Target, table: pd.DataFrame, settings: FloorSettings | None = None) -> Floors:
    """The floors of a cohort for one target; ``table`` is the participant table."""
    settings = settings or FloorSettings()
    predictors: dict[str, Predictor] = {}
    pools: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    kernels: dict[str, Kernel] = {}
    atlases, lacking = shared_atlases(cohort, target.participants)
    if lacking:
        notes.append(f"connectivity floors leave out {', '.join(lacking)}: not everybody has these series")
    if "majority" in settings.kinds:
        predictors[LABELS["majority"]] = majority
    if "covariates" in settings.kinds:
        columns, left_out = usable_covariates(target, table, settings.covariates)
        notes += left_out
        if columns:
            predictors[LABELS["covariates"]] = CovariateFloor(table=typed(table[columns]), penalties=settings.penalties)
        else:
            notes.append("the covariate floor has no column left and is not computed")
    for kind in settings.kinds:
        if kind in {"majority", "covariates"}:
            continue
        names = []
        for atlas in atlases:
            made = _atlas_floor(kind, cohort, target.participants, atlas, settings, kernels)
            if isinstance(made, str):
                notes.append(made)
                continue
            names.append(LABELS[kind] + (f"{_SEPARATOR}{atlas}" if len(atlases) > 1 else ""))
            predictors[names[-1]] = made
        if len(names) > 1:
            pools[LABELS[kind]] = tuple(names)
    return Floors(predictors=predictors, pools=pools, notes=tuple(notes), kernels=kernels)


def _atlas_floor(
    kind: FloorKind, cohort: Cohort, participants: Sequence[str], atlas: str, settings: FloorSettings, kernels: dict[str, Kernel]
) -> Predictor | str:
    """A floor of one atlas, or why there is none; Fisher-z kernels are kept in ``kernels``."""
    if kind in {"means", "spread"}:
        features = region_features(cohort, participants, atlas, "mean" if kind == "means" else "sd")
        if features is None:
            return f"'{LABELS[kind]}' is not computed: the series of {atlas} are standardised, so that it is the same for everybody"
        components = None if kind == "means" else settings.components
        return RegionFloor(participants=tuple(participants), features=features, components=components, penalties=settings.penalties)
    if kind == "fisherz-standardised":
        edges = StandardisedEdges(participants=tuple(participants), features=connectivity_features(cohort, participants, atlas, "fisherz"))
        return LinearFloor(kernel=edges, penalties=settings.penalties)
    if kind == "tangent":
        return LinearFloor(kernel=connectivity_kernel(cohort, participants, atlas, "tangent"), penalties=settings.penalties)
    if atlas not in kernels:
        kernels[atlas] = connectivity_kernel(cohort, participants, atlas, "fisherz")
    if kind == "svm":
        return SupportVectorFloor(kernel=kernels[atlas])
    if kind == "kernel-ridge":
        return KernelRidgeFloor(kernel=kernels[atlas])
    return LinearFloor(kernel=kernels[atlas], penalties=settings.penalties)


def majority(fold: TrainingFold, test: Sequence[str]) -> Forecast:
    """The commonest class of the training people, or their mean, for everybody."""
    if fold.target.kind == "continuous":
        return Forecast(test=np.full(len(test), fold.target.observed.mean()))
    # Certain of the commonest class: training frequencies differ between folds against the test people, which
    # gives a pooled AUROC below one half to a rule that knows nothing.
    classes = len(fold.target.classes)
    commonest = np.bincount(fold.labels, minlength=classes).argmax()
    return Forecast(test=np.tile(np.eye(classes)[commonest], (len(test), 1)))


@dataclass(frozen=True, kw_only=True)
class CovariateFloor:
    """Logistic or ridge regression on what is known without looking at the brain."""

    table: pd.DataFrame
    """Columns used, by participant."""
    penalties: tuple[float, ...]
    """Inverse penalties tried."""

    def __call__(self, fold: TrainingFold, test: Sequence[str]) -> Forecast:
        """Imputation, scaling, coding and penalty from the training people."""
        people, others = self.table.loc[list(fold.target.participants)], self.table.loc[list(test)]
        model = "ridge" if fold.target.kind == "continuous" else "logistic"

        def fitted(
            rows: pd.DataFrame, observed: NDArray[np.float64], outside: pd.DataFrame, penalties: Sequence[float]
        ) -> list[NDArray[np.float64]]:
            prepare = _preparation(rows)
            inputs, given = prepare.fit_transform(rows), prepare.transform(outside)
            return [fit_model(model, inputs, observed, value, exact=True)(given) for value in penalties]

        def path(train: NDArray[np.int64], validation: NDArray[np.int64]) -> list[NDArray[np.float64]]:
            return fitted(people.iloc[train], fold.target.observed[train], people.iloc[validation], self.penalties)

        best, held_out = choose_penalty(fold, path, self.penalties)
        chosen = self.penalties[best]
        return Forecast(test=fitted(people, fold.target.observed, others, [chosen])[0], train=held_out, choices={"C": chosen})


@dataclass(frozen=True, kw_only=True)
class LinearFloor:
    """L2 logistic or ridge regression on connectivity, exact through the Gram matrix."""

    kernel: Kernel | StandardisedEdges
    """Inner products of the features."""
    penalties: tuple[float, ...]
    """Inverse penalties tried, relative to a mean squared norm of 1."""

    def __call__(self, fold: TrainingFold, test: Sequence[str]) -> Forecast:
        """Centre, scale and penalty from the training people."""
        inside, outside = self.kernel.coordinates(fold.target.participants, test)
        model = "ridge" if fold.target.kind == "continuous" else "logistic"

        def path(train: NDArray[np.int64], validation: NDArray[np.int64]) -> list[NDArray[np.float64]]:
            rows, others = rescaled(inside[train], inside[validation])
            return penalty_path(model, rows, fold.target.observed[train], others, self.penalties)

        best, held_out = choose_penalty(fold, path, self.penalties)
        predict = fit_model(model, inside, fold.target.observed, self.penalties[best], exact=True)
        return Forecast(test=predict(outside), train=held_out, choices={"C": self.penalties[best]})


def usable_covariates(target: Target, table: pd.DataFrame, wanted: Sequence[str]) -> tuple[list[str], list[str]]:
    """(columns of the covariate floor, sentences on those left out).

    Left out are columns that are absent, empty or constant, the target itself (also under another name), and age or
    sex where they determine the target. This looks at everybody's labels, and only ever weakens the floor.
    """
    rows = table.loc[list(target.participants)]
    columns, notes = [], []
    for column in wanted:
        if column not in rows:
            notes.append(f"covariate floor without '{column}': no such column")
        elif rows[column].isna().all():
            notes.append(f"covariate floor without '{column}': nobody has a value")
        elif len(set(rows[column].map(class_text))) == 1:
            notes.append(f"covariate floor without '{column}': everybody has the same value")
        elif column == target.name or _same(rows[column], target):
            notes.append(f"covariate floor without '{column}': it is the target")
        elif column in _DEFINING and _determines(rows[column], target):
            notes.append(f"covariate floor without '{column}': it determines '{target.name}'")
        else:
            columns.append(column)
    return columns, notes


def _same(column: pd.Series, target: Target) -> bool:
    if target.kind == "continuous":
        return pd.api.types.is_numeric_dtype(column) and bool(np.array_equal(column.to_numpy(np.float64), target.observed))
    return [class_text(value) for value in column] == [target.classes[int(index)] for index in target.observed]


def _determines(column: pd.Series, target: Target) -> bool:
    known = column.notna().to_numpy()
    values, labels = column[known], target.observed[known]
    if target.kind == "continuous":
        if not pd.api.types.is_numeric_dtype(values) or values.nunique() < 3:
            return False
        return abs(float(np.corrcoef(values.to_numpy(np.float64), labels)[0, 1])) > 0.999
    if not pd.api.types.is_numeric_dtype(values):
        return bool(pd.Series(labels, index=values.index).groupby(values.map(class_text)).nunique().max() == 1)
    spans = sorted((values[labels == index].min(), values[labels == index].max()) for index in np.unique(labels))
    return all(above[0] > below[1] for below, above in itertools.pairwise(spans))


def typed(table: pd.DataFrame) -> pd.DataFrame:
    """Covariates as numbers or text: sites and sexes are never numbers, however they are coded."""
    text = [name for name in table if name in _NAMES or not pd.api.types.is_numeric_dtype(table[name]) or table[name].dtype == bool]
    return table.assign(**{str(name): table[name].map(class_text).astype(object) for name in text})


def _preparation(rows: pd.DataFrame) -> ColumnTransformer:
    numeric = [name for name in rows if pd.api.types.is_numeric_dtype(rows[name])]
    number = make_pipeline(SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True), StandardScaler())
    text = OneHotEncoder(handle_unknown="ignore")  # a site that the fold has not seen is no site
    return ColumnTransformer(
        [("numbers", number, numeric), ("texts", text, [name for name in rows if name not in numeric])], sparse_threshold=0
    )
