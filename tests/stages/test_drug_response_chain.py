"""simulate → pretrain → prompt-tune → predict with the drug-response system, through the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.learning.checkpoints import read_model_config, read_tensors
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.models.series_scaling import population_spread, robust_spread
from brainfm_cli.programs.validator import validate
from tests.stages.command import brainfm_on_cpu as brainfm
from tests.stages.command import only

TRAINING = (
    "system.preset=tiny", "system.windows.patch_s=20", "system.windows.window_s=80", "system.windows.min_s=40",
    "epochs=3", "batch_size=16", "log_every=1", "where.split=[discovery]", "optimiser.learning_rate=0.003",
)  # fmt: skip
TUNE = ("--target", "diagnosis_binary", "--set", "where.split=[discovery]", "tuning.epochs=2", "tuning.stops=1", "tuning.inner_folds=2")
QUICK = (
    "floors.kinds=[majority,fisherz]", "evaluation.bootstraps=100", "evaluation.permutations=99", "evaluation.inner_folds=2",
    "evaluation.groups=[sex]",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chain")
    simulated = ("--participants", 40, "--seed", 3, "--atlases", "Schaefer100", "--set", "frames=80", "population.disorders=[Arvel]")
    assert brainfm("simulate", root / "series", "--kind", "rest", "--level", "series", *simulated) == 0
    assert pretrain(root, "pretrain") == 0
    tuned = ("prompt-tune", root / "series", root / "tune", "group", "--model", only(root / "pretrain" / "models"))
    assert brainfm(*tuned, *TUNE) == 0
    model = ("--model", only(root / "tune" / "models"))
    assert brainfm("predict", root / "series", root / "people", "participant", *model, "--set", "where.split=[holdout]") == 0
    assert brainfm("predict", root / "series", root / "applied", "group", *model, "--set", "where.split=[holdout]", *QUICK) == 0
    return root


def pretrain(root: Path, name: str) -> int:
    return brainfm("pretrain", root / "series", root / name, "group", "--system", "drug-response", "--seed", 3, "--set", *TRAINING)


def people(root: Path, split: str) -> list[str]:
    table = pd.read_csv(root / "series" / "cohort" / "participants.tsv", sep="\t", dtype=str)
    return sorted(table.loc[table["split"] == split, "participant_id"])


@pytest.mark.parametrize("name", ["pretrain", "tune", "people", "applied"])
def test_outputs_are_valid_bids(root: Path, name: str) -> None:
    validate(root / name)


def test_the_series_model_learns_and_says_what_it_is(root: Path) -> None:
    folder = only(root / "pretrain" / "models")
    log = pd.read_csv(folder / "log.csv")
    held_out = log[log["kind"] == "validation"]
    for term in ("loss", "patch", "spectrum"):
        assert held_out[term].iloc[-1] < 0.95 * held_out[term].iloc[0], term
    assert (log["monitor_effective_rank"] > 1).all()
    assert (log["monitor_window_seconds"] == 80).all()
    provenance = json.loads((folder / "provenance.json").read_text())
    assert {*provenance["pretrained_on"], *provenance["validated_on"]} == {
        participant_hash("simulated", name) for name in people(root, "discovery")
    }
    (atlas,) = read_model_config(folder).atlases.values()
    assert len(atlas.centroids_mm) == len(atlas.regions) == 100
    assert "masked autoencoder" in (root / "pretrain" / "logs" / "CITATION.md").read_text()
    assert "BrainGFM" not in (folder / "report.html").read_text() + (root / "tune" / "logs" / "CITATION.md").read_text()
    assert "hidden patches" in (folder / "report.html").read_text()


def test_the_scale_is_that_of_the_training_people_alone(root: Path) -> None:
    """Who chooses the epoch, and who is tested later, must not enter it."""
    folder = only(root / "pretrain" / "models")
    trained = set(json.loads((folder / "provenance.json").read_text())["pretrained_on"])
    cohort = Cohort.open(root / "series")
    (label,) = cohort.atlases
    spreads = {
        row.participant: robust_spread(torch.from_numpy(np.array(cohort.series(row))))
        for row in cohort.index.itertuples()
        if row.participant in people(root, "discovery")
    }
    own = [spread for name, spread in spreads.items() if participant_hash("simulated", name) in trained]
    assert 0 < len(own) == len(trained) < len(spreads)
    found = read_tensors(folder / "model.safetensors")[f"scaler.spread_{label}"]
    torch.testing.assert_close(found, population_spread(torch.stack(own)))
    assert not torch.allclose(found, population_spread(torch.stack(list(spreads.values()))))


def test_the_same_seed_gives_the_same_weights(root: Path, tmp_path: Path) -> None:
    (tmp_path / "series").symlink_to(root / "series")
    assert pretrain(tmp_path, "again") == 0
    first, again = only(root / "pretrain" / "models"), only(tmp_path / "again" / "models")
    for name in ("model.safetensors", "normalisation.json", "log.csv", "config.yaml"):
        assert (first / name).read_bytes() == (again / name).read_bytes(), name


def test_tuning_leaves_the_encoder_as_it_is(root: Path) -> None:
    before, after = only(root / "pretrain" / "models"), only(root / "tune" / "models")
    assert (after / "model.safetensors").read_bytes() == (before / "model.safetensors").read_bytes()
    assert {name.partition(":")[2] for name in read_tensors(after / "prompts.safetensors")} == {"logits"}


@pytest.mark.parametrize(("blocks", "read"), [("[embedding]", {"embedding"}), ("[edges,groups]", {"edges", "groups"})])
def test_one_modality_alone_is_a_setting(root: Path, tmp_path: Path, blocks: str, read: set[str]) -> None:
    model = ("--model", only(root / "pretrain" / "models"))
    assert brainfm("prompt-tune", root / "series", tmp_path, "group", *model, *TUNE, f"tuning.blocks={blocks}") == 0
    names = {name.partition(":weights.")[2] for name in read_tensors(only(tmp_path / "models") / "head.safetensors")} - {""}
    assert names
    assert names <= read


def test_people_are_predicted_alike_alone_and_in_the_evaluation(root: Path) -> None:
    table = pd.read_csv(root / "applied" / "predictions.tsv", sep="\t", dtype={"participant_id": str})
    metrics = json.loads((root / "applied" / "metrics.json").read_text())
    names = [row["name"] for row in metrics["predictors"]]
    assert names[:2] == ["drug-response, prompt-tuned", "Random frozen encoder, same head"]
    own, random = (table[table["predictor"] == name].set_index("participant_id")["p1"] for name in names[:2])
    assert sorted(own.index) == people(root, "holdout")
    assert not np.allclose(own, random)
    for name in own.index:
        values = json.loads((root / "people" / f"sub-{name}" / f"sub-{name}_desc-brainfm_prediction.json").read_text())
        assert values["probabilities"]["case"] == pytest.approx(own[name], abs=2e-6)
