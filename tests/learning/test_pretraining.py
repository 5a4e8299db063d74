"""Pretraining on a small simulated cohort: who trains, what is fitted, that it learns, what the folder says."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import torch

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.config import Execution
from brainfm_cli.errors import InputDatasetError, InputNotFoundError
from brainfm_cli.learning.checkpoints import read_model_config, read_tensors
from brainfm_cli.learning.loop import OptimiserSettings
from brainfm_cli.learning.pretraining import PretrainingSettings, is_finished, prepare, pretrain_model
from brainfm_cli.learning.samples import select_participants
from brainfm_cli.stages.simulate import SimulateSettings, write_cohort
from brainfm_cli.systems.brain_graph import BrainGraph, BrainGraphSettings

if TYPE_CHECKING:
    from pathlib import Path

    from brainfm_cli.learning.loop import TrainingResult
    from brainfm_cli.learning.pretraining import Prepared

CPU = Execution(device="cpu")
SYSTEM = BrainGraphSettings(kind="brain-graph", preset="tiny", width=32, feedforward=64, num_blocks=1)
SETTINGS = PretrainingSettings(epochs=2, batch_size=6, seed=4, validation_fraction=0.25, log_every=1, where={"split": ("discovery",)})
SCHAEFER = "Schaefer2018_seg-7n_scale-100"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    root = tmp_path_factory.mktemp("simulated")
    write_cohort(root, SimulateSettings(level="series", participants=24, frames=80, seed=2, atlases=("Schaefer100", "AAL116")), ())
    return Cohort.open(root)


@pytest.fixture(scope="module")
def trained(cohort: Cohort, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Prepared, TrainingResult, list[Path]]:
    folder = tmp_path_factory.mktemp("model")
    prepared = prepare(SYSTEM, SETTINGS, cohort, select_participants(cohort, SETTINGS.where))
    return folder, prepared, *pretrain_model(prepared, SETTINGS, CPU, folder)


def hashes(people: tuple[str, ...]) -> list[str]:
    return sorted(hashlib.sha256(f"simulated+{key}".encode()).hexdigest() for key in people)


def test_test_people_are_in_no_part(cohort: Cohort, trained: tuple) -> None:
    folder, prepared, _, _ = trained
    table = cohort.participants
    kept_away = set(table.index[table["split"] == "holdout"])
    assert kept_away
    everyone = {*prepared.training, *prepared.validation}
    assert everyone == set(table.index[table["split"] == "discovery"])
    assert not set(prepared.training) & set(prepared.validation)
    assert {scan.participant for scan in prepared.source.scans} == set(prepared.training)
    assert {scan.participant for scan in prepared.source.validation_scans} == set(prepared.validation)
    provenance = json.loads((folder / "provenance.json").read_text())
    seen = {*provenance["pretrained_on"], *provenance["validated_on"]}
    assert not seen & set(hashes(tuple(kept_away)))


def test_provenance_names_everybody_by_hash_only(trained: tuple) -> None:
    folder, prepared, result, _ = trained
    text = (folder / "provenance.json").read_text()
    provenance = json.loads(text)
    assert provenance["pretrained_on"] == hashes(prepared.training)
    assert provenance["validated_on"] == hashes(prepared.validation)
    assert provenance["datasets"] == ["simulated"]
    assert provenance["scans"] == len(prepared.training)
    assert provenance["atlases"] == ["AAL116", SCHAEFER]
    assert (provenance["steps"], provenance["best_epoch"]) == (result.position.step, result.position.best_epoch)
    assert not any(f'"{key}"' in text for key in prepared.training)
    assert is_finished(folder)


def test_the_folder_rebuilds_the_model(cohort: Cohort, trained: tuple) -> None:
    folder, prepared, result, files = trained
    names = {"model.safetensors", "config.yaml", "normalisation.json", "log.csv", "provenance.json"}
    assert {path.name for path in files} == names
    assert all(path.is_file() for path in files)
    loaded = BrainGraph.load(folder)
    weights = read_tensors(folder / "model.safetensors")
    assert all(torch.equal(value, weights[name]) for name, value in loaded.model.state_dict().items())
    series = [np.asarray(cohort.series(scan.rows[SCHAEFER])) for scan in prepared.source.scans[:3]]
    np.testing.assert_array_equal(loaded.embed(series, SCHAEFER), prepared.system.embed(series, SCHAEFER))
    config = read_model_config(folder)
    assert PretrainingSettings.from_values(config.pretraining, where=folder) == SETTINGS
    assert config.atlases[SCHAEFER].regions == cohort.atlases[SCHAEFER].regions.names
    log = pd.read_csv(folder / "log.csv")
    assert (log["kind"] == "validation").sum() == 2
    assert result.position.best_loss == pytest.approx(log.loc[log["kind"] == "validation", "loss"].min())


def test_normalisation_is_numpys_over_training_people(cohort: Cohort, trained: tuple) -> None:
    folder, prepared, _, _ = trained
    weights = read_tensors(folder / "model.safetensors")
    summary = json.loads((folder / "normalisation.json").read_text())
    for label in prepared.atlases:
        z = []
        for scan in prepared.source.scans:
            r = np.corrcoef(np.asarray(cohort.series(scan.rows[label]), np.float64), rowvar=False)
            np.fill_diagonal(r, 0)
            z.append(np.arctanh(r))
        mean, spread = np.mean(z, axis=0), np.std(z, axis=0)
        np.fill_diagonal(spread, 1)
        np.testing.assert_allclose(weights[f"standardiser.mean_{label}"], mean, atol=1e-5)
        np.testing.assert_allclose(weights[f"standardiser.scale_{label}"], spread, atol=1e-5)
        off = ~np.eye(len(mean), dtype=bool)
        assert summary[label]["mean"] == pytest.approx(mean[off].mean(), abs=1e-5)
        assert summary[label]["spread"] == pytest.approx(spread[off].mean(), abs=1e-5)
        assert summary[label]["scans"] == len(prepared.training)


def test_the_same_people_and_seed_give_the_same_bytes(cohort: Cohort, trained: tuple, tmp_path: Path) -> None:
    _, prepared, _, files = trained
    torch.manual_seed(99)  # whatever was drawn before
    again = prepare(SYSTEM, SETTINGS, cohort, list(reversed(select_participants(cohort, SETTINGS.where))))
    pretrain_model(again, SETTINGS, CPU, tmp_path)
    assert again.training == prepared.training
    for path in files:
        assert (tmp_path / path.name).read_bytes() == path.read_bytes(), path.name
    other = prepare(SYSTEM, SETTINGS.model_copy(update={"seed": 5}), cohort, [*prepared.training, *prepared.validation])
    first, second = prepared.system.model.state_dict(), other.system.model.state_dict()
    assert not torch.equal(first["encoder.projection.weight"], second["encoder.projection.weight"])
    assert other.training != prepared.training


def test_preparing_leaves_torchs_generator_alone(cohort: Cohort) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    prepare(SYSTEM, SETTINGS, cohort, select_participants(cohort, SETTINGS.where))
    assert torch.equal(torch.rand(3), expected)


def test_the_loss_falls_on_few_people(cohort: Cohort, tmp_path: Path) -> None:
    settings = PretrainingSettings(
        epochs=100,
        steps=60,
        batch_size=6,
        validation_fraction=0,
        log_every=1,
        atlases=(SCHAEFER,),
        optimiser=OptimiserSettings(learning_rate=3e-3, warmup_epochs=2.0),
    )
    prepared = prepare(SYSTEM, settings, cohort, select_participants(cohort, {})[:6])
    result, _ = pretrain_model(prepared, settings, CPU, tmp_path)
    assert result.position.step == 60
    for term, factor in (("loss", 0.5), ("node", 0.7), ("contrast", 0.2)):
        values = result.log.curve("train", term)[1]
        assert len(values) == 60
        assert np.mean(values[-5:]) < factor * np.mean(values[:5]), term
    assert np.mean(result.log.curve("train", "monitor_distinct_rows")[1][-5:]) > 20  # no collapsed decoder
    assert np.mean(result.log.curve("train", "monitor_embedding_spread")[1][-5:]) > 0.05


def test_what_cannot_be_pretrained_is_said(cohort: Cohort) -> None:
    people = select_participants(cohort, {})
    with pytest.raises(InputNotFoundError, match="no atlas 'Nowhere'"):
        prepare(SYSTEM, SETTINGS.model_copy(update={"atlases": ("Nowhere",)}), cohort, people)
    with pytest.raises(InputDatasetError, match="1 people train: contrast needs two"):
        prepare(SYSTEM, SETTINGS, cohort, people[:2])
    long_windows = SYSTEM.model_copy(update={"graph": SYSTEM.graph.model_copy(update={"min_frames": 90})})
    with pytest.raises(InputDatasetError, match="no run has 90 frames"):
        prepare(long_windows, SETTINGS, cohort, people)
