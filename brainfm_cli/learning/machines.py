"""Floors whose decision values are no probabilities: support vectors and kernel ridge, with Platt's fit on inner folds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.svm import SVC, SVR

from brainfm_cli.learning.forecasts import Forecast, TrainingFold
from brainfm_cli.learning.linear import choose_penalty, rescaled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from brainfm_cli.learning.kernels import Kernel

    # What a machine is fitted on and what it decides: coordinates, or distances to the people fitted on.
    Rows = tuple[NDArray[np.float64], NDArray[np.float64]]
    Inner = Callable[[NDArray[np.int64], NDArray[np.int64]], Rows]
    # (training rows, their observed classes or standardised values, rows to decide, penalty) -> (rows, columns) decision values
    Decide = Callable[[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64], float], NDArray[np.float64]]


@dataclass(frozen=True, kw_only=True)
class SupportVectorFloor:
    """Linear support vectors on connectivity."""

    kernel: Kernel
    """Inner products of the features."""
    penalties: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0)
    """Inverse penalties tried, relative to a mean squared norm of 1."""

    def __call__(self, fold: TrainingFold, test: Sequence[str]) -> Forecast:
        """Centre, scale, penalty and Platt's fit from the training people."""
        inside, outside = self.kernel.coordinates(fold.target.participants, test)

        def inner(train: NDArray[np.int64], validation: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            return rescaled(inside[train], inside[validation])

        if fold.target.kind == "continuous":
            return _values(fold, (inside, outside), inner, self.penalties, _support_values)
        return _probabilities(fold, (inside, outside), inner, self.penalties, _support_decisions)


@dataclass(frozen=True, kw_only=True)
class KernelRidgeFloor:
    """Ridge regression on a Gaussian kernel of connectivity (classes: on their indicators); width from training people."""

    kernel: Kernel
    """Inner products of the features."""
    penalties: tuple[float, ...] = (0.1, 1.0, 10.0, 100.0)
    """Inverse penalties tried."""

    def __call__(self, fold: TrainingFold, test: Sequence[str]) -> Forecast:
        """Width, penalty and Platt's fit from the training people."""
        people = fold.target.participants
        # Distances and not coordinates: those leave out what of a test person lies outside the space of the training people.
        among, outside = self.kernel.distances(people, people), self.kernel.distances(people, test)

        def inner(train: NDArray[np.int64], validation: NDArray[np.int64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
            return among[np.ix_(train, train)], among[np.ix_(validation, train)]

        if fold.target.kind == "continuous":
            return _values(fold, (among, outside), inner, self.penalties, _ridge)
        classes = len(fold.target.classes)

        def decide(
            rows: NDArray[np.float64], labels: NDArray[np.float64], others: NDArray[np.float64], penalty: float
        ) -> NDArray[np.float64]:
            shares = np.eye(classes)[labels.astype(np.int64)][:, 1 if classes == 2 else 0 :]
            base = shares.mean(0)
            return _ridge(rows, shares - base, others, penalty) + base

        return _probabilities(fold, (among, outside), inner, self.penalties, decide)


def _probabilities(fold: TrainingFold, whole: Rows, inner: Inner, penalties: Sequence[float], decide: Decide) -> Forecast:
    """Penalty by the log-loss of Platt's fit to decision values of inner folds."""
    labels = fold.labels
    columns = 1 if fold.target.kind == "binary" else len(fold.target.classes)
    decisions = np.full((len(penalties), len(labels), columns), np.nan)
    for train, validation in fold.inner:
        rows, others = inner(train, validation)
        for index, value in enumerate(penalties):
            decisions[index, validation] = decide(rows, fold.target.observed[train], others, value)
    fits = [LogisticRegression(C=1e4, max_iter=1000).fit(values, labels) for values in decisions]
    losses = [log_loss(labels, platt.predict_proba(values)) for platt, values in zip(fits, decisions, strict=True)]
    best = int(np.argmin(losses))
    given = decide(whole[0], fold.target.observed, whole[1], penalties[best])
    return Forecast(test=fits[best].predict_proba(given), train=fits[best].predict_proba(decisions[best]), choices={"C": penalties[best]})


def _values(fold: TrainingFold, whole: Rows, inner: Inner, penalties: Sequence[float], decide: Decide) -> Forecast:
    """Penalty by the squared error on inner folds; values are standardised by the people fitted on."""

    def fitted(rows: NDArray[np.float64], values: NDArray[np.float64], others: NDArray[np.float64], penalty: float) -> NDArray[np.float64]:
        centre, spread = values.mean(), values.std() or 1.0
        return decide(rows, (values - centre) / spread, others, penalty) * spread + centre

    def path(train: NDArray[np.int64], validation: NDArray[np.int64]) -> list[NDArray[np.float64]]:
        rows, others = inner(train, validation)
        return [fitted(rows, fold.target.observed[train], others, value) for value in penalties]

    best, held_out = choose_penalty(fold, path, penalties)
    return Forecast(test=fitted(whole[0], fold.target.observed, whole[1], penalties[best]), train=held_out, choices={"C": penalties[best]})


def _support_decisions(
    rows: NDArray[np.float64], labels: NDArray[np.float64], others: NDArray[np.float64], penalty: float
) -> NDArray[np.float64]:
    machine = SVC(kernel="precomputed", C=penalty, decision_function_shape="ovr").fit(rows @ rows.T, labels)
    return machine.decision_function(others @ rows.T).reshape(len(others), -1)


def _support_values(
    rows: NDArray[np.float64], values: NDArray[np.float64], others: NDArray[np.float64], penalty: float
) -> NDArray[np.float64]:
    return SVR(kernel="precomputed", C=penalty).fit(rows @ rows.T, values).predict(others @ rows.T)


def _ridge(among: NDArray[np.float64], values: NDArray[np.float64], others: NDArray[np.float64], penalty: float) -> NDArray[np.float64]:
    width = float(np.median(among[np.triu_indices(len(among), 1)])) or 1.0
    return KernelRidge(kernel="precomputed", alpha=1 / penalty).fit(np.exp(-among / width), values).predict(np.exp(-others / width))
