"""What is done to a finished model before it is tuned: an atlas is added (pretrain --model), a start is meta-learned (prompt-tune with meta)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pandas as pd
import pytest

from brainfm_cli.learning.checkpoints import read_model_config, read_tensors
from brainfm_cli.programs.validator import validate
from tests.stages.command import brainfm_on_cpu as brainfm

if TYPE_CHECKING:
    from pathlib import Path

SCHAEFER, AAL = "Schaefer2018_seg-7n_scale-100", "AAL116"
TRAINING = ("epochs=1", "steps=3", "batch_size=16", "log_every=1", "where.split=[discovery]")
META = ("meta.shots=2", "meta.queries=2", "meta.inner_steps=1", "meta.epochs=1", "meta.exclude=[Arvel]", "where.split=[discovery]")
QUICK = ("floors.kinds=[majority]", "evaluation.bootstraps=50", "evaluation.permutations=19", "evaluation.inner_folds=2")


def only(folder: Path) -> Path:
    (found,) = (folder / "models").iterdir()
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("extended")
    codes = [
        brainfm("simulate", root / "series", "--kind", "rest", "--level", "series", "--participants", 120, "--seed", 3, "--atlases", "Schaefer100", "AAL116", "--set", "frames=80", "population.num_disorders=3"),
        brainfm("pretrain", root / "series", root / "first", "group", "--system", "brain-graph", "--set", "system.preset=tiny", f"atlases=[{SCHAEFER}]", *TRAINING),
    ]  # fmt: skip
    codes += [
        brainfm("pretrain", root / "series", root / "both", "group", "--model", only(root / "first"), "--set", *TRAINING),
    ]
    codes += [
        brainfm("prompt-tune", root / "series", root / "meta", "group", "--model", only(root / "both"), "--target", "diagnosis", "--set", *META),
    ]  # fmt: skip
    assert codes == [0] * 4
    return root


def test_an_added_atlas_leaves_the_rest_as_it_was(root: Path) -> None:
    before, after = (read_tensors(only(root / name) / "model.safetensors") for name in ("first", "both"))
    assert set(before) < set(after)
    assert all((after[name] == value).all() for name, value in before.items())
    assert all(AAL in name for name in set(after) - set(before))
    trained = {"encoder.atlas_vector", "encoder.node_identity", "prompt.node", "prompt.edge", "decoder.columns"}
    fresh = read_tensors(only(root / "both") / "model.safetensors")
    assert {name.rpartition(".")[0] for name in set(after) - set(before)} >= trained
    assert float(fresh[f"standardiser.scale_{AAL}"].std()) > 0  # fitted, not the identity
    config = read_model_config(only(root / "both"))
    assert sorted(config.atlases) == [AAL, SCHAEFER]
    assert config.added[0]["atlases"] == [AAL]
    summary = json.loads((only(root / "both") / "normalisation.json").read_text())
    assert sorted(summary) == [AAL, SCHAEFER]


def test_what_was_added_was_trained(root: Path, tmp_path: Path) -> None:
    none = ("epochs=1", "steps=1", "optimiser.learning_rate=1e-12", *TRAINING[2:])
    assert brainfm("pretrain", root / "series", tmp_path / "none", "group", "--model", only(root / "first"), "--set", *none) == 0
    untrained, trained = (read_tensors(only(folder) / "model.safetensors") for folder in (tmp_path / "none", root / "both"))
    for name in (f"encoder.node_identity.{AAL}", f"encoder.atlas_vector.{AAL}", f"decoder.columns.{AAL}", f"prompt.node.{AAL}"):
        assert not (untrained[name] == trained[name]).all(), name


def test_people_of_both_pretrainings_are_remembered(root: Path) -> None:
    first, both = (json.loads((only(root / name) / "provenance.json").read_text()) for name in ("first", "both"))
    assert set(first["pretrained_on"]) <= set(both["pretrained_on"])
    assert both["added_to"] == only(root / "first").name
    assert both["added"] == [AAL]


def test_nothing_to_add_and_unsuitable_models_are_refused(root: Path, tmp_path: Path) -> None:
    again = ("pretrain", root / "series", tmp_path / "x", "group", "--model", only(root / "both"), "--set", *TRAINING)
    assert brainfm(*again) == 2
    tune = ("where.split=[discovery]", "tuning.epochs=0", "tuning.inner_folds=2")
    assert (
        brainfm("prompt-tune", root / "series", tmp_path / "t", "group", "--model", only(root / "first"), "--target", "sex", "--set", *tune)
        == 0
    )
    assert brainfm("pretrain", root / "series", tmp_path / "y", "group", "--model", only(tmp_path / "t"), "--set", *TRAINING) == 65
    assert (
        brainfm(
            "prompt-tune",
            root / "series",
            tmp_path / "z",
            "group",
            "--model",
            only(tmp_path / "t"),
            "--target",
            "diagnosis",
            "--set",
            *META,
        )
        == 65
    )
    assert not any((tmp_path / name).exists() for name in "xyz")


def test_a_start_is_kept_beside_an_unchanged_backbone(root: Path) -> None:
    model, meta = only(root / "both"), only(root / "meta")
    assert (model / "model.safetensors").read_bytes() == (meta / "model.safetensors").read_bytes()
    tensors = read_tensors(meta / "meta.safetensors")
    assert {name.partition(":")[0] for name in tensors} == {AAL, SCHAEFER}
    record = read_model_config(meta).meta
    assert {task["disorder"] for task in record["tasks"]}
    assert "Arvel" not in {task["disorder"] for task in record["tasks"]}


@pytest.mark.parametrize("name", ["both", "meta"])
def test_outputs_are_valid_bids(root: Path, name: str) -> None:
    validate(root / name)


def test_a_start_is_tuned_for_a_disorder_that_was_left_out(root: Path, tmp_path: Path) -> None:
    table = pd.read_csv(root / "series" / "cohort" / "participants.tsv", sep="\t", dtype=str)
    assert (table["diagnosis"] == "Arvel").sum() > 4
    coding = (
        "coding.type=categorical",
        "coding.classes=[control, Arvel]",
        "coding.positive=Arvel",
        "tuning.epochs=0",
        "tuning.inner_folds=2",
    )
    options = ("--target", "diagnosis", "--set", *coding, "where.diagnosis=[control, Arvel]", "where.split=[holdout]")
    assert brainfm("prompt-tune", root / "series", tmp_path / "tuned", "group", "--model", only(root / "meta"), *options) == 0
    tuned = only(tmp_path / "tuned")
    assert (tuned / "meta.safetensors").read_bytes() == (only(root / "meta") / "meta.safetensors").read_bytes()
    heads = read_tensors(tuned / "head.safetensors")
    assert any(name.endswith("weights.meta") for name in heads)
    # whose diagnosis shaped the start is no test person
    predict = (
        "predict",
        root / "series",
        tmp_path / "p",
        "group",
        "--model",
        tuned,
        "--set",
        "where.split=[discovery]",
        "where.diagnosis=[control, Arvel]",
        *QUICK,
    )
    assert brainfm(*predict) != 0


def test_a_plan_lists_the_people_of_each_disorder(root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = (
        "prompt-tune",
        root / "series",
        tmp_path / "m",
        "group",
        "--model",
        only(root / "both"),
        "--target",
        "diagnosis",
        "--dry-run",
    )
    assert brainfm(*arguments, "--set", *META) == 0
    said = capfd.readouterr().out
    assert "control (control)" in said
    assert "Arvel" not in said
    assert not (tmp_path / "m").exists()
