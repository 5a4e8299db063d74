"""Networks trained from scratch as predictors: they learn what is there, see nothing outside the fold, and repeat."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from torch import nn

from brainfm_cli.learning.forecasts import TrainingFold
from brainfm_cli.learning.networks import NetworkPredictor, NetworkSettings
from brainfm_cli.learning.splits import inner_folds
from brainfm_cli.learning.targets import Target
from brainfm_cli.models.graphs import correlate, fisher_z
from brainfm_cli.models.rivals import BrainNetworkTransformer, SeriesNetwork
from tests.learning.cohorts import binary_target, continuous_target, names_of, series_of

PEOPLE = 80
QUICK = NetworkSettings(epochs=30, stops=2, inner_folds=2, learning_rate=3e-3)


def data(seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """(people, frames, regions) series whose first regions are coupled in cases, and who is one."""
    rng = np.random.default_rng(seed)
    labels = np.arange(PEOPLE) % 2
    series = np.stack([series_of(0.3 + 1.5 * code, rng) for code in labels])
    return torch.from_numpy((series - series.mean(1, keepdims=True)) / series.std(1, keepdims=True)), labels


def fold_of(target: Target, train: slice) -> TrainingFold:
    training = target.keep(target.participants[train])
    return TrainingFold(target=training, inner=inner_folds(training, groups={}, folds=3, seed=0), repeat=1, fold=1, seed=5)


def connectivity(series: torch.Tensor) -> torch.Tensor:
    return fisher_z(correlate(series, torch.full((len(series),), series.shape[1]))[0])


def test_both_networks_find_a_planted_class() -> None:
    series, labels = data()
    target, names = binary_target(labels), names_of(PEOPLE)
    for inputs, build in ((connectivity(series), partial(BrainNetworkTransformer, 8)), (series, partial(SeriesNetwork, 8))):
        predictor = NetworkPredictor(participants=tuple(names), inputs=inputs, build=build, settings=QUICK)
        found = predictor(fold_of(target, slice(0, 60)), names[60:])
        assert ((found.test[:, 1] > 0.5) == labels[60:]).mean() > 0.8
        np.testing.assert_allclose(found.test.sum(1), 1)
        held_out = np.isfinite(found.train[:, 1])
        assert 0 < held_out.sum() < 60  # two of three inner folds
        assert found.choices["epochs"] in {15.0, 30.0}
        again = predictor(fold_of(target, slice(0, 60)), names[60:])
        np.testing.assert_array_equal(again.test, found.test)


def test_numbers_come_back_on_their_own_scale() -> None:
    rng = np.random.default_rng(0)
    inputs = torch.from_numpy(rng.normal(size=(PEOPLE, 3)).astype(np.float32))
    values = 40 + 8 * inputs[:, 0].numpy()
    predictor = NetworkPredictor(
        participants=tuple(names_of(PEOPLE)),
        inputs=inputs,
        build=partial(nn.Linear, 3),
        settings=NetworkSettings(epochs=80, learning_rate=3e-2),
    )
    found = predictor(fold_of(continuous_target(values), slice(0, 60)), names_of(PEOPLE)[60:])
    assert np.corrcoef(found.test, values[60:])[0, 1] > 0.95
    assert abs(found.test.mean() - values[60:].mean()) < 2


def test_test_people_change_nothing() -> None:
    series, labels = data()
    names = names_of(PEOPLE)
    other = series.clone()
    other[60:] = 1e3
    fold = fold_of(binary_target(labels), slice(0, 60))
    found = [
        NetworkPredictor(participants=tuple(names), inputs=one, build=partial(SeriesNetwork, 8), settings=QUICK)(fold, names[60:]).train
        for one in (series, other)
    ]
    np.testing.assert_array_equal(*found)


def test_the_orthonormal_centres_and_region_numbers_that_no_head_divides() -> None:
    network = BrainNetworkTransformer(13, 2)
    torch.testing.assert_close(network.centres @ network.centres.T, torch.eye(10), atol=1e-5, rtol=0)
    assert network(torch.randn(2, 13, 13)).shape == (2, 2)
