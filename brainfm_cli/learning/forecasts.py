"""The one Protocol between evaluation and whatever predicts: a model, a floor, or a later system's floor.

A predictor gets the training people with their labels and the names of the test people, never their labels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from brainfm_cli.errors import InternalError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from brainfm_cli.learning.targets import Target


@dataclass(frozen=True, kw_only=True)
class TrainingFold:
    """All that a predictor may learn from in one fold."""

    target: Target
    """Training people only, with their labels; classes as in the whole cohort."""
    inner: tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]
    """(training rows, validation rows) into ``target``, for penalties, thresholds, epochs."""
    repeat: int
    """From 1."""
    fold: int
    """From 1."""
    seed: int
    """Seed of everything random in this fold, the same for every predictor."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """(people,) class indices of a categorical target."""
        return self.target.observed.astype(np.int64)


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a predictor says of a fold's test people."""

    test: NDArray[np.float64]
    """(test people, classes) probabilities, or (test people,) values of a continuous target."""
    train: NDArray[np.float64] | None = None
    """The same for training people, each predicted without their own label (inner folds), NaN rows where not; the
    decision threshold and the cuts of strata are chosen on these. None: the likeliest class is decided."""
    choices: dict[str, float | str] = field(default_factory=dict)
    """What was chosen inside the fold, e.g. the penalty."""


class Predictor(Protocol):
    """Learns from a training fold and predicts its test people."""

    def __call__(self, fold: TrainingFold, test: Sequence[str]) -> Forecast:
        """The forecast for ``test``, participant keys in this order."""
        ...


def renamed(predictor: Predictor, stand_in: Mapping[str, str]) -> Predictor:
    """The predictor, seeing the data of other people behind every label: ``stand_in`` says whose."""

    def predict(fold: TrainingFold, test: Sequence[str]) -> Forecast:
        people = tuple(stand_in[name] for name in fold.target.participants)
        return predictor(replace(fold, target=replace(fold.target, participants=people)), [stand_in[name] for name in test])

    return predict


def check_forecast(name: str, forecast: Forecast, fold: TrainingFold, test: Sequence[str]) -> Forecast:
    """The forecast itself, once its shape, finiteness and sums are right.

    Raises
    ------
    InternalError
        A predictor broke the Protocol.
    """
    classes = len(fold.target.classes)
    shape = (len(test), classes) if classes else (len(test),)
    problem = None
    if forecast.test.shape != shape:
        problem = f"gave predictions of shape {forecast.test.shape} where {shape} is due"
    elif not np.isfinite(forecast.test).all():
        problem = f"gave {int((~np.isfinite(forecast.test)).sum())} predictions that are not finite"
    elif classes and not (np.all(forecast.test >= 0) and np.allclose(forecast.test.sum(1), 1, atol=1e-5)):
        problem = "gave probabilities that are negative or do not sum to 1"
    elif forecast.train is not None and forecast.train.shape != (len(fold.target.participants), *shape[1:]):
        problem = f"gave training predictions of shape {forecast.train.shape}"
    if problem:
        raise InternalError(f"predictor '{name}' {problem} (repeat {fold.repeat}, fold {fold.fold})", fix="this is a bug in that predictor; please report it")  # fmt: skip
    return forecast
