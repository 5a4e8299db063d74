"""A simulated trial through the command line: each modality alone, and whether the score is predictive."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainfm_cli.errors import EXIT_BAD_DATA
from brainfm_cli.programs.validator import validate
from tests.stages.command import brainfm, only

TRAINING = ("system.preset=tiny", "system.windows.patch_s=20", "system.windows.window_s=80", "system.windows.min_s=40")
SMALL = ("system.width=32", "epochs=1", "batch_size=8", "where.cohort=[drug-free]")
TUNE = ("--target", "response", "--set", "where.cohort=[trial]", "tuning.epochs=0", "tuning.inner_folds=2")
QUICK = (
    "refit=always", "design.folds=2", "design.strata=[arm]", "floors.kinds=[majority]", "evaluation.bootstraps=100",
    "evaluation.permutations=99", "evaluation.inner_folds=2", "evaluation.groups=[arm]", "where.cohort=[trial]",
)  # fmt: skip
ABLATIONS = "ablations={series only: [embedding], connectivity only: [edges, groups]}"
ARMS = ("arms.treated=drug", "arms.test.bootstraps=99", "arms.strata.bootstraps=100")
EXPLAIN = ("explain.people=1", "explain.steps=8", "explain.most_steps=64", "explain.baselines=[zero]")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trial")
    options = ("--participants", 44, "--seed", 2, "--atlases", "Schaefer100", "--set", "frames=60", "trial.drug_free=10")
    assert brainfm("simulate", root / "series", "--kind", "drug", "--level", "series", *options) == 0
    pretrain = ("pretrain", root / "series", root / "pretrain", "group", "--system", "drug-response", "--device", "cpu")
    assert brainfm(*pretrain, "--set", *TRAINING, *SMALL) == 0
    tuned = ("prompt-tune", root / "series", root / "tune", "group", "--device", "cpu")
    assert brainfm(*tuned, "--model", only(root / "pretrain" / "models"), *TUNE) == 0
    return root


def predict(root: Path, name: str, *options: str) -> int:
    model = ("--model", only(root / "tune" / "models"), "--device", "cpu")
    return brainfm("predict", root / "series", root / name, "group", *model, "--set", *QUICK, *options)


def test_each_modality_and_the_interaction_are_on_the_same_folds(root: Path) -> None:
    assert predict(root, "scored", ABLATIONS, *ARMS, *EXPLAIN) == 0
    validate(root / "scored")
    metrics = json.loads((root / "scored" / "metrics.json").read_text())
    names = [row["name"] for row in metrics["predictors"]]
    assert names[1:5] == [
        "Random frozen encoder, same head", "series only", "series only, random frozen encoder", "connectivity only",
    ]  # fmt: skip
    table = pd.read_csv(root / "scored" / "predictions.tsv", sep="\t", dtype={"participant_id": str})
    folds = table.pivot_table(index="participant_id", columns="predictor", values="fold")
    assert folds.eq(folds[names[0]], axis=0).all(axis=None)
    read = {row["name"]: {key.rpartition("share of ")[2] for key in row["choices"] if "share of" in key} for row in metrics["predictors"]}
    assert read["series only"] == read["series only, random frozen encoder"] == {"embedding"}
    assert set() < read["connectivity only"] <= {"edges", "groups"}
    found = json.loads((root / "scored" / "interaction.json").read_text())
    assert found["patients"] == {"placebo": 22, "drug": 22}
    assert 0 < found["p"] <= 1
    assert found["verdict"] in (root / "scored" / "report.html").read_text()
    said = table.pivot_table(index="participant_id", columns="predictor", values="p1")
    for name in (names[0], "series only"):
        random = names[1] if name == names[0] else f"{name}, random frozen encoder"
        assert not np.allclose(said[name], said[random], atol=1e-4), name  # the random encoder reads everybody anew
    arms = pd.read_csv(root / "series" / "cohort" / "participants.tsv", sep="\t", dtype=str).set_index("participant_id")["arm"]
    first = table[table["predictor"] == names[0]]
    treated = (arms[first["participant_id"]] == "drug").to_numpy()
    assert first["fold"][treated].value_counts().to_dict() == pytest.approx({1: 11, 2: 11}, abs=1)


def test_strata_and_explanation_stand_in_the_files_and_in_the_report(root: Path) -> None:
    """Depends on the evaluation above, whose folder it reads."""
    folder = root / "scored"
    page = (folder / "report.html").read_text()
    strata = json.loads((folder / "metrics.json").read_text())["stratification"]
    assert [one["name"] for one in strata["strata"]] == ["unlikely", "uncertain", "likely"]
    assert sum(sum(one["patients"].values()) for one in strata["strata"]) == 44
    assert len(strata["sizes"]) == 4
    assert strata["statement"] in page
    (found,) = json.loads((folder / "explanation" / "summary.json").read_text())["explanations"]
    assert found["people"] == 2  # one of each fold
    assert {part["modality"] for part in found["modalities"]} == {"series", "connectivity"}
    regions = pd.read_csv(folder / "explanation" / "regions.tsv", sep="\t")
    assert len(regions) == 2 * 100
    assert regions["share"].sum() == pytest.approx(1, abs=1e-3)
    times = pd.read_csv(folder / "explanation" / "times.tsv", sep="\t")
    assert times["share"].sum() == pytest.approx(regions.loc[regions["modality"] == "series", "share"].sum(), abs=1e-3)
    assert "What the predictions rest on" in page
    assert predict(root, "scored", ABLATIONS, *ARMS, *EXPLAIN, "--reports-only") == 0
    assert (folder / "report.html").read_text() == page


def test_a_trial_of_one_arm_has_no_interaction(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert predict(root, "one", "where.arm=[drug]", *ARMS) == EXIT_BAD_DATA
    assert "needs two arms, 'drug' among them; there are: drug" in caplog.text
    assert not (root / "one" / "interaction.json").exists()
