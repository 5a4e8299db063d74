"""Linear models inside a fold: scale, penalty by inner folds, fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import log_loss, roc_auc_score

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from brainfm_cli.learning.forecasts import TrainingFold


def rescaled(rows: NDArray[np.float64], others: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Coordinates of an inner fold, centred on and scaled by its own training rows (mean squared norm 1)."""
    centre = rows.mean(0)
    scale = np.sqrt(np.mean(np.sum((rows - centre) ** 2, axis=1)))
    return (rows - centre) / scale, (others - centre) / scale


def choose_penalty(
    fold: TrainingFold, path: Callable[[NDArray[np.int64], NDArray[np.int64]], list[NDArray[np.float64]]], penalties: Sequence[float]
) -> tuple[int, NDArray[np.float64]]:
    """(best position in ``penalties``, its inner out-of-fold predictions of the training people).

    Two classes: by the AUROC of the pooled predictions, which is what is reported. Log-loss would prefer predictions shrunk to
    the base rate, whose pooled order is that of the folds' base rates: on 155 people such a floor lost up to 0.1 of its AUROC.
    More classes: by log-loss. Numbers: by squared error.
    """
    observed, classes = fold.target.observed, len(fold.target.classes)
    held_out = np.full((len(penalties), len(observed), *((classes,) if classes else ())), np.nan)
    for train, validation in fold.inner:
        for index, values in enumerate(path(train, validation)):
            held_out[index, validation] = values
    if classes == 2:
        losses = [-float(roc_auc_score(fold.labels, values[:, 1])) for values in held_out]
    elif classes:
        losses = [log_loss(fold.labels, values, labels=range(classes)) for values in held_out]
    else:
        losses = [float(np.mean((values - observed) ** 2)) for values in held_out]
    best = int(np.argmin(losses))  # the first of equals: the strongest penalty
    return best, held_out[best]


def penalty_path(
    model: str, rows: NDArray[np.float64], observed: NDArray[np.float64], others: NDArray[np.float64], penalties: Sequence[float]
) -> list[NDArray[np.float64]]:
    """Predictions for ``others`` along the penalties, each logistic fit starting from the one before."""
    if model == "ridge":
        return [fit_model(model, rows, observed, value, exact=False)(others) for value in penalties]
    estimator = LogisticRegression(warm_start=True, tol=1e-6, max_iter=2000)
    results = []
    for value in penalties:
        estimator.set_params(C=value).fit(rows, observed.astype(np.int64))
        results.append(estimator.predict_proba(others))
    return results


def fit_model(
    model: str, rows: NDArray[np.float64], observed: NDArray[np.float64], penalty: float, *, exact: bool
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """A fitted model's prediction function."""
    if model == "ridge":
        return Ridge(alpha=1 / penalty).fit(rows, observed).predict
    labels = observed.astype(np.int64)
    # Newton converges to rounding; its Hessian grows with the number of classes squared.
    newton = exact and labels.max() == 1
    solver = {"solver": "newton-cholesky", "tol": 1e-12} if newton else {"solver": "lbfgs", "tol": 1e-8}
    return LogisticRegression(C=penalty, max_iter=2000, **solver).fit(rows, labels).predict_proba
