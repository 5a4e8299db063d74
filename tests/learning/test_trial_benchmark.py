"""A head whose epoch is chosen on the test people finds responders in noise; the evaluation's own protocol does not (small form of benchmarks/trials.py)."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.model_selection import StratifiedKFold

from brainfm_cli.learning.evaluation import Context, EvaluationSettings, evaluate
from brainfm_cli.learning.regions import RegionFloor
from brainfm_cli.learning.splits import DesignSettings, make_split
from tests.learning.cohorts import binary_target, names_of, plain_table

PATIENTS, TRIALS = 56, 8


@pytest.fixture(scope="module")
def trials() -> Any:
    spec = importlib.util.spec_from_file_location("trials_benchmark", Path(__file__).parents[2] / "benchmarks" / "trials.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_selecting_the_epoch_on_the_test_fold_finds_responders_in_noise_and_our_protocol_does_not(trials: Any) -> None:
    features, labels, tests, ours = [], [], [], []
    for seed in range(TRIALS):
        rng = np.random.default_rng(seed)
        drawn, said = rng.normal(size=(PATIENTS, 60)), rng.permutation(np.arange(PATIENTS) % 2)
        for _, rows in StratifiedKFold(5, shuffle=True, random_state=seed).split(said, said):
            features.append(drawn)
            labels.append(said)
            tests.append(np.isin(np.arange(PATIENTS), rows))
        target, table = binary_target(said), plain_table(PATIENTS)
        split = make_split(target, table, DesignSettings(folds=5, seed=seed))
        floor = RegionFloor(participants=tuple(names_of(PATIENTS)), features=drawn, components=None, penalties=(1.0,))
        settings = EvaluationSettings(bootstraps=100, permutations=99, interval="percentile", groups=(), inner_folds=2)
        result = evaluate(target, split, {"model": floor}, Context(table=table), settings)
        ours.append(result.metrics.of("model").scores["mcc"].value)
    curves = trials.epoch_scores(np.stack(features), np.stack(labels), np.stack(tests), epochs=25, seed=0)
    last, selected = curves[:, -1], curves.max(1)
    assert np.mean(selected) > 0.15
    assert abs(np.mean(last)) < 3 * np.std(last) / len(last) ** 0.5 + 0.02
    assert abs(np.mean(ours)) < 3 * np.std(ours) / TRIALS**0.5 + 0.02


def test_a_head_that_can_learn_does(trials: Any) -> None:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(PATIENTS) % 2)
    features = rng.normal(size=(PATIENTS, 20)) + 2 * labels[:, None]
    test = np.arange(PATIENTS) < 12
    assert trials.epoch_scores(features[None], labels[None], test[None], epochs=60, seed=0)[0, -1] > 0.8


def _row(trials: Any, seed: int, *, parts: dict[str, float], patterns: list[int] | None = None) -> dict[str, Any]:
    scores = {name: {"auroc": value, "pearson_r": value, "r2": value} for name, value in {**parts, trials.ATTAINABLE: 0.8}.items()}
    world = {"patients": 56, "effect": 2.5, "repeats": 1, "trial": {} if patterns is None else {"patterns": patterns}}
    both = {"response": scores, "analgesia": scores}
    return {"seed": seed, **world, "scores": both, "bayes": {"response": {"auroc": 0.9}, "analgesia": {"r2": 0.5}}}


def test_files_of_one_world_are_joined_and_of_two_kept_apart(trials: Any) -> None:
    model = [_row(trials, seed, parts={"both": 0.7}, patterns=[4, 2]) for seed in (1, 2, 3)]
    rivals = [_row(trials, seed, parts={"1-D CNN on series": 0.6}, patterns=[4, 2]) for seed in (1, 2)]
    other = [_row(trials, 1, parts={"both": 0.5})]
    worlds = trials.joined([*model, *rivals, *other])
    found = {tuple(sorted(rows[0]["scores"]["response"])): [row["seed"] for row in rows] for rows in worlds.values()}
    assert found == {
        tuple(sorted(("both", "1-D CNN on series", trials.ATTAINABLE))): [1, 2],  # the third trial lacks its rivals
        tuple(sorted(("both", trials.ATTAINABLE))): [1],
    }
    report = trials.report_planted(next(iter(worlds.values())))
    assert report["response, auroc"]["differences"]["both - 1-D CNN on series"][0] == pytest.approx(0.1)
    assert report["response, auroc"]["share_of_attainable"][0] == pytest.approx(0.667, abs=1e-3)


def test_a_file_without_the_model_is_reported_too(trials: Any) -> None:
    report = trials.report_planted([_row(trials, seed, parts={"1-D CNN on series": 0.6}) for seed in (1, 2)])
    assert report["analgesia, pearson_r"]["scores"]["1-D CNN on series"][0] == pytest.approx(0.6)
    assert "share_of_attainable" not in report["analgesia, pearson_r"]
