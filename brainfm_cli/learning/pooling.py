"""Every predictor through every fold of a split, and its forecasts pooled over the test people."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.forecasts import Forecast, Predictor, TrainingFold, check_forecast
from brainfm_cli.learning.results import Pooled
from brainfm_cli.learning.scores import best_threshold
from brainfm_cli.learning.splits import Fold, Split, inner_folds
from brainfm_cli.learning.stratification import place_among

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from brainfm_cli.learning.targets import Target

    Part = tuple[Fold, TrainingFold, Forecast]


def run_folds(
    target: Target,
    split: Split,
    predictors: Mapping[str, Predictor],
    *,
    inner: int,
    seed: int,
    progress: Callable[[str, Fold], None] | None = None,
) -> tuple[dict[str, list[Part]], NDArray[np.int64]]:
    """Every predictor's forecast of every fold, and the (repetitions, people) fold in which each of ``split.tested`` was tested.

    ``inner`` is the number of folds inside each training set, ``seed`` that of everything random.

    Raises
    ------
    InputDatasetError
        Test people differ between repetitions.
    """
    tested, groups = split.tested, split.groups
    fold_of = np.zeros((split.repeats, len(tested)), dtype=np.int64)
    forecasts: dict[str, list[Part]] = {name: [] for name in predictors}
    for fold in split.folds():
        fold_of[fold.repeat - 1, positions(tested, fold.test)] = fold.fold
        training = target.keep(fold.train)
        drawn = int(np.random.SeedSequence([seed, fold.repeat, fold.fold]).generate_state(1)[0])
        learnt = TrainingFold(
            target=training,
            inner=_inner(training, groups, inner, drawn),
            repeat=fold.repeat,
            fold=fold.fold,
            seed=drawn,
        )
        for name, predictor in predictors.items():
            if progress is not None:
                progress(name, fold)
            forecasts[name].append((fold, learnt, check_forecast(name, predictor(learnt, fold.test), learnt, fold.test)))
    if (fold_of == 0).any():
        raise InputDatasetError("not everybody is tested in every repetition of the split", fix="make the split again")
    return forecasts, fold_of


def _inner(training: Target, groups: Mapping[str, str], folds: int, seed: int) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]:
    """Inner folds. One person of each class leaves nobody to hold out: everybody then judges themselves, and little can be chosen."""
    if training.classes and len(training.participants) == len(training.classes):
        everybody = np.arange(len(training.participants))
        return ((everybody, everybody),)
    return inner_folds(training, groups=groups, folds=folds, seed=seed)


def pool_all(people: Target, split: Split, forecasts: Mapping[str, list[Part]], pools: Mapping[str, tuple[str, ...]]) -> dict[str, Pooled]:
    """Pooled predictions of every predictor, and of the pools as means of their members."""
    pooled = {name: _pool(people, split, parts) for name, parts in forecasts.items()}
    for name, members in pools.items():
        pooled[name] = _pool(people, split, [_mean(list(parts)) for parts in zip(*(forecasts[member] for member in members), strict=True)])
    return pooled


def _mean(parts: list[Part]) -> Part:
    fold, learnt, _ = parts[0]
    forecasts = [forecast for _, _, forecast in parts]
    inside = [forecast.train for forecast in forecasts if forecast.train is not None]
    return fold, learnt, Forecast(
        test=np.mean([forecast.test for forecast in forecasts], axis=0),
        train=np.mean(inside, axis=0) if len(inside) == len(forecasts) else None,
    )  # fmt: skip


def _pool(people: Target, split: Split, parts: list[Part]) -> Pooled:
    """One predictor's forecasts of all folds, in the order of ``people``, with decisions at the folds' thresholds."""
    shape = (split.repeats, len(people.participants), *((len(people.classes),) if people.classes else ()))
    predicted = np.full(shape, np.nan)
    decided = np.zeros(shape[:2], dtype=np.int64) if people.classes else None
    thresholds: list[float] = []
    rule = "class of highest probability"
    places = np.full(shape[:2], np.nan)
    for fold, learnt, forecast in parts:
        rows = people.rows(fold.test)
        predicted[fold.repeat - 1, rows] = forecast.test
        if people.kind != "multiclass" and forecast.train is not None:
            places[fold.repeat - 1, rows] = place_among(_one(forecast.train), _one(forecast.test))
        if decided is None:
            continue
        decided[fold.repeat - 1, rows] = forecast.test.argmax(1)
        if people.kind == "binary" and forecast.train is not None and np.isfinite(forecast.train).any():
            thresholds.append(best_threshold(learnt.labels, forecast.train[:, 1]))
            decided[fold.repeat - 1, rows] = forecast.test[:, 1] >= thresholds[-1]
            rule = "threshold of highest balanced accuracy on inner folds of the training people"
    if not people.classes:
        rule = ""
    return Pooled(
        predicted=predicted,
        decided=decided,
        thresholds=tuple(thresholds),
        rule=rule,
        choices=tuple(forecast.choices for _, _, forecast in parts),
        places=places if np.isfinite(places).all() else None,
    )


def _one(predicted: NDArray[np.float64]) -> NDArray[np.float64]:
    """(people,) probability of the positive of two classes, or the value."""
    return predicted[:, 1] if predicted.ndim == 2 else predicted


def positions(order: Sequence[str], names: Sequence[str]) -> NDArray[np.int64]:
    """Where each of ``names`` is in ``order``."""
    place = {name: index for index, name in enumerate(order)}
    return np.array([place[name] for name in names], dtype=np.int64)
