"""Scores of held-out predictions: point values from scikit-learn, and the same scores over resampled people.

A score that is undefined is ``None`` with its reason, never 0. Resampled scores take a (resamples, people) matrix
of weights, because a bootstrap sample is nothing but how often each person was drawn; tests hold both forms equal.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.optimize import minimize
from scipy.special import expit
from sklearn import metrics

from brainfm_cli.config import Frozen

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

Direction = Literal["higher", "lower", "one"]
_EPS = 1e-15
CALIBRATION_BINS = 10


@dataclass(frozen=True, slots=True)
class Metric:
    """A score's name for people, and which way is better."""

    label: str
    """As printed."""
    better: Direction
    """higher, lower, or one (best at 1)."""


METRICS: dict[str, Metric] = {
    "auroc": Metric("AUROC", "higher"),
    "balanced_accuracy": Metric("Balanced accuracy", "higher"),
    "auprc": Metric("AUPRC", "higher"),
    "mcc": Metric("MCC", "higher"),
    "f1": Metric("F1", "higher"),
    "sensitivity": Metric("Sensitivity", "higher"),
    "specificity": Metric("Specificity", "higher"),
    "brier": Metric("Brier score", "lower"),
    "ece": Metric("Calibration error (ECE)", "lower"),
    "calibration_slope": Metric("Calibration slope", "one"),
    "accuracy": Metric("Accuracy", "higher"),
    "quadratic_kappa": Metric("Quadratic κ", "higher"),
    "r2": Metric("R²", "higher"),
    "mae": Metric("MAE", "lower"),
    "pearson_r": Metric("Pearson r", "higher"),
}
PRIMARY = {"binary": "auroc", "multiclass": "auroc", "continuous": "r2"}


class Score(Frozen):
    """One score, its interval, or why it was not computed."""

    value: float | None = None
    """The score; none where it is undefined."""
    low: float | None = None
    """Lower end of the interval."""
    high: float | None = None
    """Upper end of the interval."""
    reason: str | None = None
    """Why value or interval is not computed."""

    def __str__(self) -> str:
        if self.value is None:
            return f"not computed ({self.reason})"
        if self.low is None or self.high is None:
            return f"{self.value:.3f}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def score(
    kind: str,
    observed: NDArray[np.float64],
    predicted: NDArray[np.float64],
    decided: NDArray[np.int64] | None = None,
    *,
    ordered: bool = False,
) -> dict[str, Score]:
    """Every score of one set of predictions.

    ``observed`` is (people,) class indices or values; ``predicted`` (people, classes) probabilities or (people,) values;
    ``decided`` the class chosen for each person at the training folds' threshold; ``ordered`` adds the quadratic κ of
    classes that have an order.
    """
    if kind == "continuous":
        return _continuous(observed, predicted)
    classes = predicted.shape[1]
    labels = observed.astype(np.int64)
    decided = predicted.argmax(1) if decided is None else decided
    if len(labels) == 0:
        return dict.fromkeys((*_names(kind), *(("quadratic_kappa",) if ordered else ())), Score(reason="nobody"))
    present = np.bincount(labels, minlength=classes)
    if kind == "binary":
        return _binary(labels, predicted[:, 1], decided, one_class=bool((present == 0).any()))
    found = _multiclass(labels, predicted, decided, present)
    return found | {"quadratic_kappa": _quadratic_kappa(labels, decided)} if ordered else found


def _names(kind: str) -> tuple[str, ...]:
    if kind == "continuous":
        return ("r2", "mae", "pearson_r")
    if kind == "multiclass":
        return ("auroc", "balanced_accuracy", "auprc", "mcc", "f1", "accuracy", "brier", "ece")
    return (
        "auroc",
        "balanced_accuracy",
        "auprc",
        "mcc",
        "f1",
        "sensitivity",
        "specificity",
        "accuracy",
        "brier",
        "ece",
        "calibration_slope",
    )


def _binary(labels: NDArray[np.int64], p: NDArray[np.float64], decided: NDArray[np.int64], *, one_class: bool) -> dict[str, Score]:
    absent = Score(reason="one class only among these people")
    none_positive = Score(reason="nobody of the positive class among these people")
    none_negative = Score(reason="nobody of the negative class among these people")
    positives, negatives = bool(labels.any()), not labels.all()
    return {
        "auroc": absent if one_class else Score(value=float(metrics.roc_auc_score(labels, p))),
        "balanced_accuracy": absent if one_class else Score(value=float(metrics.balanced_accuracy_score(labels, decided))),
        "auprc": absent if one_class else Score(value=float(metrics.average_precision_score(labels, p))),
        "mcc": absent
        if one_class
        else Score(reason="everybody was given the same class")
        if np.ptp(decided) == 0
        else Score(value=float(metrics.matthews_corrcoef(labels, decided))),
        "f1": Score(value=float(metrics.f1_score(labels, decided, zero_division=0.0))) if positives else none_positive,
        "sensitivity": Score(value=float(decided[labels == 1].mean())) if positives else none_positive,
        "specificity": Score(value=float(1 - decided[labels == 0].mean())) if negatives else none_negative,
        "accuracy": Score(value=float((labels == decided).mean())),
        "brier": Score(value=float(np.mean((p - labels) ** 2))),
        "ece": Score(value=float(weighted_ece(labels, p)(np.ones((1, len(p))))[0])),
        "calibration_slope": absent if one_class else calibration_slope(labels, p),
    }


def _multiclass(
    labels: NDArray[np.int64], p: NDArray[np.float64], decided: NDArray[np.int64], present: NDArray[np.int64]
) -> dict[str, Score]:
    classes = p.shape[1]
    everyone = np.ones((1, len(labels)))
    if (present == 0).any():
        absent = Score(reason=f"{int((present == 0).sum())} of {classes} classes do not occur among these people")
        ranked = dict.fromkeys(("auroc", "balanced_accuracy", "auprc", "mcc", "f1"), absent)
    else:
        onehot = np.eye(classes)[labels]
        ranked = {
            # One-vs-rest per class and averaged: roc_auc_score(multi_class="ovr") refuses rows that do not sum to 1.
            "auroc": Score(value=float(metrics.roc_auc_score(onehot, p, average="macro"))),
            "balanced_accuracy": Score(value=float(metrics.balanced_accuracy_score(labels, decided))),
            "auprc": Score(value=float(metrics.average_precision_score(onehot, p, average="macro"))),
            "mcc": Score(reason="everybody was given the same class")
            if np.ptp(decided) == 0
            else Score(value=float(metrics.matthews_corrcoef(labels, decided))),
            "f1": Score(value=float(metrics.f1_score(labels, decided, average="macro", zero_division=0.0))),
        }
    return ranked | {
        "accuracy": Score(value=float((labels == decided).mean())),
        "brier": Score(value=float(np.mean(np.sum((p - np.eye(classes)[labels]) ** 2, axis=1)))),
        "ece": Score(value=float(weighted_ece((labels == p.argmax(1)).astype(np.int64), p.max(1))(everyone)[0])),
    }


def _quadratic_kappa(labels: NDArray[np.int64], decided: NDArray[np.int64]) -> Score:
    """Cohen's κ with squared distances between classes as weights."""
    if np.ptp(np.concatenate([labels, decided])) == 0:
        return Score(reason="everybody has, and was given, the same class")
    return Score(value=float(_weighted_kappa(labels, decided)(np.ones((1, len(labels))))[0]))


def _weighted_kappa(y: NDArray[np.int64], d: NDArray[np.int64]) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """The same as a function of weights: with squared weights both tables are moments, none is counted out."""
    gap, squares = (y - d).astype(np.float64) ** 2, (y**2 + d**2).astype(np.float64)

    def kappa(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = weights.sum(1)
        return 1 - _divided(weights @ gap * total, weights @ squares * total - 2 * (weights @ y) * (weights @ d))

    return kappa


def _continuous(observed: NDArray[np.float64], predicted: NDArray[np.float64]) -> dict[str, Score]:
    if len(observed) < 2:
        return dict.fromkeys(_names("continuous"), Score(reason="fewer than two people"))
    flat = Score(reason="everybody has the same value")
    constant = np.ptp(observed) == 0
    still = np.ptp(predicted) <= 1e-12 * max(1.0, float(np.abs(predicted).max()))
    return {
        "r2": flat if constant else Score(value=float(metrics.r2_score(observed, predicted))),
        "mae": Score(value=float(metrics.mean_absolute_error(observed, predicted))),
        "pearson_r": flat
        if constant
        else Score(reason="everybody was predicted the same value")
        if still
        else Score(value=float(np.corrcoef(observed, predicted)[0, 1])),
    }


def calibration_slope(labels: NDArray[np.int64], p: NDArray[np.float64]) -> Score:
    """Slope of the logistic regression of the outcome on the logit of the probability (Cox 1958); 1 is calibrated."""
    logit = np.log(np.clip(p, _EPS, 1 - _EPS)) - np.log1p(-np.clip(p, _EPS, 1 - _EPS))
    if np.ptp(logit) < 1e-9:
        return Score(reason="everybody has the same probability")
    if logit[labels == 1].min() > logit[labels == 0].max() or logit[labels == 1].max() < logit[labels == 0].min():
        return Score(reason="the classes are separated completely: the slope is infinite")
    centre, scale = logit.mean(), logit.std()
    x = (logit - centre) / scale
    design = np.column_stack([np.ones_like(x), x])

    def loss(beta: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        eta = design @ beta
        return float(np.mean(np.logaddexp(0, eta) - labels * eta)), design.T @ (expit(eta) - labels) / len(x)

    def curvature(beta: NDArray[np.float64]) -> NDArray[np.float64]:
        mean = expit(design @ beta)
        return (design * (mean * (1 - mean))[:, None]).T @ design / len(x)

    found = minimize(loss, np.zeros(2), jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-10})
    if not np.isfinite(found.x).all() or abs(found.x[1]) > 1e6:
        return Score(reason="the calibration fit did not converge")
    return Score(value=float(found.x[1] / scale))


def best_threshold(labels: NDArray[np.int64], p: NDArray[np.float64]) -> float:
    """Probability at and above which the positive class is decided, so that balanced accuracy is highest; midway between scores."""
    known = np.isfinite(p)
    labels, p = labels[known], p[known]
    false, true, cuts = metrics.roc_curve(labels, p, drop_intermediate=False)
    best = int(np.argmax(true - false))
    if not np.isfinite(cuts[best]):
        return float(np.nextafter(p.max(), 2.0))
    below = p[p < cuts[best]]
    return float((cuts[best] + below.max()) / 2) if len(below) else float(cuts[best])


def statistic(
    name: str, kind: str, observed: NDArray[np.float64], predicted: NDArray[np.float64], decided: NDArray[np.int64] | None = None
) -> Callable[[NDArray[np.float64]], NDArray[np.float64]] | None:
    """The score as a function of (resamples, people) weights, NaN where undefined; none for the calibration slope."""
    if kind == "continuous":
        return _weighted_continuous(name, observed, predicted)
    labels = observed.astype(np.int64)
    decided = predicted.argmax(1) if decided is None else decided
    if kind == "binary":
        return _weighted_binary(name, labels, predicted[:, 1], decided)
    return _weighted_multiclass(name, labels, predicted, decided)


def _weighted_binary(name: str, y: NDArray[np.int64], p: NDArray[np.float64], decided: NDArray[np.int64]) -> Callable | None:
    direct: dict[str, Callable] = {"auroc": weighted_auroc, "auprc": weighted_auprc, "ece": weighted_ece}
    if name in direct:
        return direct[name](y, p)
    if name in {"brier", "accuracy"}:
        return _mean((p - y) ** 2 if name == "brier" else (y == decided).astype(np.float64))
    cells = np.stack([y * decided, (1 - y) * decided, y * (1 - decided), (1 - y) * (1 - decided)], axis=1).astype(np.float64)

    def confusion(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        tp, fp, fn, tn = (weights @ cells).T
        with np.errstate(divide="ignore", invalid="ignore"):
            sensitivity, specificity = tp / (tp + fn), tn / (tn + fp)
            if name == "sensitivity":
                return sensitivity
            if name == "specificity":
                return specificity
            if name == "balanced_accuracy":
                return (sensitivity + specificity) / 2
            if name == "f1":
                return np.where(tp + fn > 0, 2 * tp / (2 * tp + fp + fn), np.nan)
            return (tp * tn - fp * fn) / np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))

    return confusion if name in {"sensitivity", "specificity", "balanced_accuracy", "f1", "mcc"} else None


def _weighted_multiclass(name: str, y: NDArray[np.int64], p: NDArray[np.float64], decided: NDArray[np.int64]) -> Callable | None:
    classes = p.shape[1]
    onehot = np.eye(classes)[y]
    if name in {"auroc", "auprc"}:
        make = weighted_auroc if name == "auroc" else weighted_auprc
        parts = [make(onehot[:, index].astype(np.int64), p[:, index]) for index in range(classes)]
        return lambda weights: np.mean([part(weights) for part in parts], axis=0)
    if name == "ece":
        return weighted_ece((y == p.argmax(1)).astype(np.int64), p.max(1))
    if name == "brier":
        return _mean(np.sum((p - onehot) ** 2, axis=1))
    if name == "accuracy":
        return _mean((y == decided).astype(np.float64))
    if name == "quadratic_kappa":
        return _weighted_kappa(y, decided)
    chosen = np.eye(classes)[decided]

    def confusion(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        true, given, hit = weights @ onehot, weights @ chosen, weights @ (onehot * chosen)
        total = weights.sum(1)
        with np.errstate(divide="ignore", invalid="ignore"):
            if name == "balanced_accuracy":
                return np.mean(hit / true, axis=1)
            if name == "f1":
                return np.where((true > 0).all(1), np.mean(2 * hit / (true + given), axis=1), np.nan)
            covariance = hit.sum(1) * total - np.sum(true * given, axis=1)
            return covariance / np.sqrt((total**2 - np.sum(given**2, axis=1)) * (total**2 - np.sum(true**2, axis=1)))

    return confusion if name in {"balanced_accuracy", "f1", "mcc"} else None


def _weighted_continuous(name: str, y: NDArray[np.float64], p: NDArray[np.float64]) -> Callable | None:
    if name == "mae":
        return _mean(np.abs(y - p))
    # Centred on the whole sample first: the formulas below subtract large numbers otherwise.
    y0, p0 = y - y.mean(), p - p.mean()

    def moments(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        total = np.where(weights.sum(1) > 0, weights.sum(1), np.nan)
        my, mp = weights @ y0 / total, weights @ p0 / total
        vy = weights @ y0**2 / total - my**2
        with np.errstate(divide="ignore", invalid="ignore"):
            if name == "r2":
                return np.where(vy > 1e-12 * np.var(y0), 1 - (weights @ (y - p) ** 2 / total) / vy, np.nan)
            vp = weights @ p0**2 / total - mp**2
            return (weights @ (y0 * p0) / total - my * mp) / np.sqrt(vy * vp)

    return moments if name in {"r2", "pearson_r"} else None


def _mean(values: NDArray[np.float64]) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    return lambda weights: _divided(weights @ values, weights.sum(1))


def _divided(sums: NDArray[np.float64], totals: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN where a resample drew nobody of a group."""
    return np.divide(sums, totals, out=np.full(len(sums), np.nan), where=totals > 0)


def weighted_auroc(y: NDArray[np.int64], p: NDArray[np.float64]) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Area under the ROC curve (Mann–Whitney with ties) as a function of weights."""
    order = np.argsort(p, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(p[order]) > 0])
    positive = y[order].astype(np.float64)

    def area(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        sorted_weights = weights[:, order]
        pos = np.add.reduceat(sorted_weights * positive, starts, axis=1)
        neg = np.add.reduceat(sorted_weights * (1 - positive), starts, axis=1)
        below = np.cumsum(neg, axis=1) - neg / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.sum(pos * below, axis=1) / (pos.sum(1) * neg.sum(1))

    return area


def weighted_auprc(y: NDArray[np.int64], p: NDArray[np.float64]) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Average precision as a function of weights."""
    order = np.argsort(-p, kind="stable")
    starts = np.flatnonzero(np.r_[True, np.diff(p[order]) < 0])
    positive = y[order].astype(np.float64)

    def area(weights: NDArray[np.float64]) -> NDArray[np.float64]:
        sorted_weights = weights[:, order]
        hits = np.add.reduceat(sorted_weights * positive, starts, axis=1)
        called = np.cumsum(np.add.reduceat(sorted_weights, starts, axis=1), axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            precision = np.where(called > 0, np.cumsum(hits, axis=1) / called, 0.0)
            return np.sum(hits * precision, axis=1) / hits.sum(1)

    return area


def weighted_ece(y: NDArray[np.int64], p: NDArray[np.float64]) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    """Expected calibration error over ten equal bins of probability, as a function of weights."""
    place = np.clip((p * CALIBRATION_BINS).astype(np.int64), 0, CALIBRATION_BINS - 1)
    gaps = np.eye(CALIBRATION_BINS)[place] * (y - p)[:, None]
    return lambda weights: _divided(np.abs(weights @ gaps).sum(1), weights.sum(1))
