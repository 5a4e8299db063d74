"""Grades and survival of mri-language through the command line: tables, curves, clinical variables, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainfm_cli.errors import EXIT_BAD_DATA, EXIT_NOT_FOUND, EXIT_SETTINGS
from brainfm_cli.programs.validator import validate
from tests.stages.command import brainfm
from tests.stages.test_mri_chain import PRETRAIN, only
from tests.synthetic_scans import write_scans

FIT = ("schedule.epochs=2", "schedule.batch_size=8", "execution.precision=32-true", "slices.sequences=[FLAIR]", "random_encoder=false", "clinical.columns=[age, sex]")  # fmt: skip
SURVIVAL = ("task=survival", "follow_up.time=days", "follow_up.event=end", "follow_up.happened=[spread]", "follow_up.competing=[dead]", "follow_up.censored=[free]", "follow_up.bins=3")  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("outcomes")
    write_scans(root / "raw", participants=14, masks=False)
    table = pd.read_csv(root / "raw" / "participants.tsv", sep="\t", dtype=str)
    table["grade"] = [str(1 + place % 3) for place in range(14)]
    table["days"] = [str(10 * (place + 1)) for place in range(14)]
    table["end"] = [("spread", "dead", "free")[place % 3] for place in range(14)]
    table["age"] = [str(40 + 3 * place) for place in range(13)] + ["n/a"]
    table["sex"] = ["FM"[place % 2] for place in range(14)]
    table.to_csv(root / "raw" / "participants.tsv", sep="\t", index=False)
    pretrain = ("pretrain", root / "raw", root / "pretrain", "group", "--system", "mri-language", "--device", "cpu")
    assert (
        brainfm(*pretrain, "--participant-label", "01", "02", "--set", *(one.replace("batch_size=16", "batch_size=4") for one in PRETRAIN))
        == 0
    )
    return root


def tune(root: Path, name: str, *options: str, raw: Path | None = None) -> int:
    model = ("--model", only(root / "pretrain" / "models"), "--device", "cpu")
    return brainfm("prompt-tune", raw or root / "raw", root / name, "group", *model, *options)


def said(root: Path, out: str, label: str) -> dict:
    return json.loads((root / out / f"sub-{label}" / f"sub-{label}_desc-brainfm_prediction.json").read_text())


def test_grades_are_told_with_clinical_variables_and_low_rank_weights(root: Path) -> None:
    assert tune(root, "grade", "--target", "grade", "--set", "task=grading", "tune=lora", *FIT) == 0
    validate(root / "grade")
    model = only(root / "grade" / "models")
    pretrained = only(root / "pretrain" / "models")
    assert (model / "model.safetensors").read_bytes() == (pretrained / "model.safetensors").read_bytes()
    assert (model / "adapted.safetensors").stat().st_size < (model / "model.safetensors").stat().st_size / 2
    scores = pd.DataFrame(json.loads((model / "evaluation.json").read_text()))
    assert scores["score"].iloc[0] == "Quadratic κ"
    methods = set(scores["method"])
    assert {
        "model",
        "frozen encoder, same head",
        "shares of grades",
        "clinical variables only",
        "intensities and volumes, linear",
    } <= methods
    assert "was imputed" in (model / "README.md").read_text()
    assert brainfm("predict", root / "raw", root / "graded", "participant", "--model", model, "--device", "cpu", "--participant-label", "05", "14") == 0  # fmt: skip
    values = said(root, "graded", "05")
    assert list(values["probabilities"]) == ["1", "2", "3"]
    assert values["value"] == pytest.approx(values["probabilities"]["2"] + 2 * values["probabilities"]["3"], abs=1e-5)
    assert set(values["clinical"]) == {"age", "sex=M"} or "age missing" in values["clinical"]
    assert brainfm("predict", root / "raw", root / "graded", "group", "--model", model, "--device", "cpu") == 0
    table = pd.read_csv(root / "graded" / "phenotype" / "brainfm_grade.tsv", sep="\t")
    assert {"decided", "p_1", "p_2", "p_3", "value"} <= set(table)
    validate(root / "graded")


@pytest.mark.parametrize("method", ["cox", pytest.param("discrete", marks=pytest.mark.long)])
def test_risk_and_curves_are_told_with_a_competing_end(root: Path, method: str) -> None:
    assert tune(root, method, "--set", *SURVIVAL, f"follow_up.method={method}", "follow_up.horizons=[50, 100]", *FIT) == 0
    validate(root / method)
    model = only(root / method / "models")
    scores = pd.DataFrame(json.loads((model / "evaluation.json").read_text()))
    assert scores["score"].iloc[0] == "Uno C"
    assert "dead competes with spread" in (model / "README.md").read_text()
    out = f"said-{method}"
    assert (
        brainfm("predict", root / "raw", root / out, "participant", "--model", model, "--device", "cpu", "--participant-label", "05") == 0
    )
    values = said(root, out, "05")
    assert set(values["risk"]) == {"spread", "dead"}
    curve = pd.read_csv(root / out / values["curve"], sep="\t")
    np.testing.assert_allclose(curve[["free", "incidence_spread", "incidence_dead"]].sum(axis=1), 1, atol=3e-6)
    assert (curve["free"].diff().dropna() <= 1e-6).all()
    expected = np.interp(50, [0, *curve["time"]], [0, *curve["incidence_spread"]])
    assert values["risk"]["spread"]["50"] == pytest.approx(expected, abs=1e-5)
    assert values["unit"] == "days"
    assert brainfm("predict", root / "raw", root / out, "group", "--model", model, "--device", "cpu") == 0
    table = pd.read_csv(root / out / "phenotype" / "brainfm_end.tsv", sep="\t")
    assert table["risk_spread_50"].iloc[0] == pytest.approx(values["risk"]["spread"]["50"])
    validate(root / out)
    if method == "cox":
        bare = root / "bare"
        shutil.copytree(root / "raw", bare)
        (bare / "participants.tsv").unlink()
        asked = ("predict", bare, root / "bare-out", "participant", "--model", model, "--device", "cpu", "--participant-label", "05")
        assert brainfm(*asked) == EXIT_NOT_FOUND


def test_bad_follow_up_and_clinical_columns_are_named(
    root: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    for name, options, code, text in (
        ("e1", ("--set", "task=survival"), EXIT_SETTINGS, "survival needs two columns"),
        ("e2", ("--set", *SURVIVAL, "follow_up.competing=[]", *FIT), EXIT_BAD_DATA, "'dead', which no setting declares"),
        ("e3", ("--set", *SURVIVAL, "follow_up.happened=[]", *FIT), EXIT_SETTINGS, "never guessed"),
        ("e4", ("--set", *SURVIVAL, "follow_up.time=grade2", *FIT), EXIT_NOT_FOUND, "no column 'grade2'"),
        (
            "e5",
            ("--target", "grade", "--set", "task=grading", *FIT, "clinical.missing=refuse"),
            EXIT_BAD_DATA,
            "'age' of sub-14 is missing",
        ),
        (
            "e6",
            ("--target", "side", "--set", "task=grading", "coding.classes=[left]", *FIT),
            EXIT_BAD_DATA,
            "one class cannot be predicted",
        ),
        ("e7", ("--target", "grade", "--set", "task=survival"), EXIT_SETTINGS, "read from two columns"),
        ("e8", ("--set", "task=segmentation", "clinical.columns=[age]"), EXIT_SETTINGS, "say nothing of where a lesion is"),
    ):
        assert tune(root, name, *options) == code, name
        assert text in " ".join((caplog.text + "".join(capsys.readouterr())).split()), name
        caplog.clear()
    assert tune(root, "e9", "--set", *SURVIVAL, "--dry-run") == 0
    assert not (root / "e9").exists()


@pytest.mark.long
def test_tasks_are_evaluated_in_one_report_beside_their_floors(root: Path) -> None:
    model = only(root / "pretrain" / "models")
    tasks = {
        "grade": {"task": "grading", "target": "grade", "clinical": {"columns": ["age"]}},
        "spread": {"task": "survival", "follow_up": {"time": "days", "event": "end", "happened": ["spread", "dead"], "censored": ["free"], "bins": 2}},
    }  # fmt: skip
    asked = (
        "scans.schedule.epochs=1", "scans.slices.sequences=[FLAIR]", "execution.precision=32-true", "design.folds=2", f"scans.tasks={json.dumps(tasks)}",
        "scans.few_shot={shares: [0.5], draws: 1}", "scans.adaptation.slices=2", "scans.floors={random_encoder: true, network: true}",
    )  # fmt: skip
    call = ("predict", root / "raw", root / "tasks", "group", "--model", model, "--device", "cpu")
    assert brainfm(*call, "--set", *asked) == 0
    validate(root / "tasks")
    found = pd.DataFrame(json.loads((root / "tasks" / "scan-evaluation" / "evaluation.json").read_text()))
    assert set(found["task"]) == {"grade", "spread"}
    grade = found[found["task"] == "grade"]
    methods = {"model", "shares of grades", "clinical variables only", "intensities and volumes, linear", "no pretraining, same head", "plain CNN from scratch"}  # fmt: skip
    assert methods <= set(grade["method"])
    assert set(grade["people"]) == {12}  # the two of the encoder's pretraining never test
    fold = json.loads((root / "tasks" / "scan-evaluation" / "grade" / "fold-1.json").read_text())
    assert not {"01", "02"} & set(fold["test"])
    assert not set(fold["train"]) & set(fold["test"])
    few = pd.read_csv(root / "tasks" / "scan-evaluation" / "grade" / "few_shot.tsv", sep="\t")
    assert {"model", "model − no pretraining, same head", "model − clinical variables only"} <= set(few["method"])
    page = (root / "tasks" / "report.html").read_text()
    assert "plain CNN from scratch" in page
    assert "model − clinical variables only" in page
    before = (root / "tasks" / "scan-evaluation" / "grade" / "fold-1.json").stat().st_mtime_ns
    assert brainfm(*call, "--set", *asked) == 0
    assert (root / "tasks" / "scan-evaluation" / "grade" / "fold-1.json").stat().st_mtime_ns == before
    centres = (*asked[:5], "design.kind=leave-one-site-out", "scans.floors={random_encoder: false, image_numbers: false}")
    assert brainfm("predict", root / "raw", root / "centres", *call[3:], "--set", *(one.replace("design.folds=2", "design.seed=0") for one in centres)) == 0  # fmt: skip
    fold = json.loads((root / "centres" / "scan-evaluation" / "grade" / "fold-1.json").read_text())
    table = pd.read_csv(root / "raw" / "participants.tsv", sep="\t", dtype=str).set_index("participant_id")["site"]
    assert set(table[[f"sub-{label}" for label in fold["test"]]]) == {"centre0"}
    assert set(table[[f"sub-{label}" for label in fold["train"]]]) == {"centre1"}
