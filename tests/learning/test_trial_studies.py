"""A trial planted in one modality is explained by that modality and by the planted regions (small form of benchmarks/trial_studies.py)."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from brainfm_cli.learning.attributions import ExplanationSettings
from brainfm_cli.learning.networks import NetworkSettings
from brainfm_cli.stages.predict.rivals import NAMES, RivalSettings
from brainfm_cli.systems import drug_response, load_system

if TYPE_CHECKING:
    from collections.abc import Iterator

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def studies() -> Iterator[Any]:
    sys.path.insert(0, str(BENCHMARKS))
    yield importlib.import_module("trial_studies")
    sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def model(studies: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    importlib.import_module("trials").pretrain(folder, people=24, atlas="Schaefer100", epochs=1)
    return folder


def test_planted_regions_and_modality_are_recovered_and_the_share_moves(studies: Any, model: Path) -> None:
    settings = ExplanationSettings(people=1, baselines=("zero",), steps=16)
    row = studies.explained(2, model=model, patients=80, effect=6.0, atlas="Schaefer100", explanation=settings)
    for modality in ("series", "connectivity"):
        assert row[modality]["scores"]["pearson_r"] > 0.3, modality
        found = row[modality]["maps"]["zero"]
        assert found["auroc"][modality] > 0.85, modality
        assert found["share"][modality] > 0.6, modality
        assert found["largest_gap"] < 0.05, modality
    assert row["series"]["maps"]["zero"]["share"]["series"] - row["connectivity"]["maps"]["zero"]["share"]["series"] > 0.4
    assert studies.report_explained([row])["series"]["zero"]["trials at 0.9 or more"] in (0, 1)


def test_pretraining_ends_with_the_axes_of_its_people(studies: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drug_response, "_FEWEST_HALVED", 12)
    importlib.import_module("trials").pretrain(tmp_path / "model", people=16, atlas="Schaefer100", epochs=1)
    for folder in (tmp_path / "model", tmp_path / "model" / "random"):
        (axes,) = load_system(folder).model.kept.values()
        assert axes.fitted, folder.name


def test_parts_of_a_trial_run_apart_share_their_folds_and_are_joined(model: Path) -> None:
    trials = importlib.import_module("trials")
    rivals = RivalSettings(kinds=("brain-network-transformer", "series-cnn"), training=NetworkSettings(epochs=1, inner_folds=1))
    given = {"model": model, "patients": 40, "repeats": 1, "atlas": "Schaefer100", "effect": 3.0, "trial": {"patterns": [4, 2]}}
    rows = [trials.planted(3, parts=("model",), **given), trials.planted(3, parts=("probes",), rivals=rivals, **given)]
    knows = [row["scores"]["analgesia"][trials.ATTAINABLE] for row in rows]
    assert knows[0] == knows[1]  # the same people and folds
    assert knows[0]["pearson_r"] > 0.3
    (world,) = trials.joined([*rows, {**rows[0], "seed": 4}]).values()
    (joined,) = world  # the other trial has one part only
    for name in ("both", "series only", "connectivity only", "linear probe, network connectivity", *(NAMES[kind] for kind in rivals.kinds)):
        assert joined["scores"]["response"][name]["auroc"] is not None, name
    assert "trial_response" in joined
    assert trials.report_planted([joined])["response, auroc"]["scores"]["both"][0] == joined["scores"]["response"]["both"]["auroc"]


def test_planted_regions_are_those_of_the_networks_that_carry_the_score(studies: Any) -> None:
    shares = np.eye(3)[[0, 1, 1, 2]]
    truth = {
        "atlases": {"A": {"network_shares": shares.tolist()}},
        "networks": ["Visual", "Limbic", "Default"],
        "scores": {"prognostic": {"loadings": {"Visual--Default": 1.0}}},
    }
    assert studies.planted_regions(truth).tolist() == [True, False, False, True]
    truth["scores"]["prognostic"]["loadings"] = {"tilt Limbic": -1.0}
    assert studies.planted_regions(truth).tolist() == [False, True, True, False]
