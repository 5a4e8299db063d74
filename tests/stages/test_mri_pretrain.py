"""pretrain --system mri-language through the command line: packed, trained, scored; killed and resumed; bad input named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import load_file

from brainfm_cli.errors import EXIT_BAD_DATA, EXIT_NOT_FOUND, EXIT_SETTINGS
from brainfm_cli.programs.validator import validate
from brainfm_cli.systems.mri_language import MriLanguage
from tests.stages.command import brainfm
from tests.synthetic_scans import write_scans

SMALL = (
    "system.preset=nano",
    "slices.size=48",
    "slices.sequences=[FLAIR]",
    "epochs=2",
    "batch_size=16",
    "system.evaluated_slices=24",
    "log_every=2",
    "execution.precision=32-true",
)
START = ("--system", "mri-language", "--device", "cpu")


def only(folder: Path) -> Path:
    (found,) = folder.iterdir()
    return found


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("mri")
    write_scans(root / "raw", participants=10)
    assert brainfm("pretrain", root / "raw", root / "out", "group", *START, "--set", *SMALL) == 0
    return root


def test_the_model_folder_is_whole(root: Path) -> None:
    validate(root / "out")
    model = only(root / "out" / "models")
    names = {path.name for path in model.iterdir()}
    assert {
        "model.safetensors",
        "config.yaml",
        "split.tsv",
        "log.csv",
        "evaluation.json",
        "provenance.json",
        "README.md",
        "report.html",
    } <= names
    assert "checkpoints" not in names
    split = pd.read_csv(model / "split.tsv", sep="\t", dtype=str)
    assert split.groupby(["site", "role"]).size().to_dict() == {
        ("centre0", "train"): 4, ("centre0", "validation"): 1, ("centre1", "train"): 4, ("centre1", "validation"): 1,
    }  # fmt: skip
    scores = pd.DataFrame(json.loads((model / "evaluation.json").read_text()))
    assert {"model", "mean fill", "inpainting", "model less inpainting"} <= set(scores["method"])
    assert scores["patients"].eq(2).all()
    report = (model / "report.html").read_text()
    assert "Original, visible and reconstructed slices" in report
    assert "inflated by" in report
    system = MriLanguage.load(model)
    assert system.settings.preset == "nano"
    provenance = json.loads((model / "provenance.json").read_text())
    assert len(provenance["pretrained_on"]) == 8


def test_the_same_command_again_does_nothing_and_another_reads_the_packed_slices(root: Path) -> None:
    model = only(root / "out" / "models")
    before = {path: path.stat().st_mtime_ns for path in sorted((root / "out").rglob("*")) if path.is_file() and "logs" not in path.parts}
    assert brainfm("pretrain", root / "raw", root / "out", "group", *START, "--set", *SMALL) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert brainfm("pretrain", root / "out", root / "other", "group", *START, "--set", *SMALL, "system.contrast=none", "steps=2") == 0
    assert not (root / "other" / "cohort").exists()
    assert only(root / "other" / "models").name != model.name
    assert brainfm("pretrain", root / "out", root / "cubes", "group", *START, "--set", *SMALL, "system.dims=3") == EXIT_SETTINGS


def test_killed_and_resumed_gives_the_same_weights(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from brainfm_cli.systems.mri_language.encoder import MriLanguage as System

    real, calls = System.losses, []

    def dies(self: System, given: object, *, epoch: float) -> object:
        calls.append(epoch)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return real(self, given, epoch=epoch)  # type: ignore[arg-type]

    monkeypatch.setattr(System, "losses", dies)
    options = (*START, "--set", *SMALL, "checkpoint_every=2")
    assert brainfm("pretrain", root / "raw", tmp_path / "killed", "group", *options) == 130
    assert (only(tmp_path / "killed" / "models") / "checkpoints").is_dir()
    monkeypatch.setattr(System, "losses", real)
    assert brainfm("pretrain", root / "raw", tmp_path / "killed", "group", *options) == 0
    assert brainfm("pretrain", root / "raw", tmp_path / "whole", "group", *options) == 0
    first, second = (load_file(only(tmp_path / name / "models") / "model.safetensors") for name in ("killed", "whole"))
    assert all(np.array_equal(first[name], second[name]) for name in second)
    logs = [(only(tmp_path / name / "models") / "log.csv").read_text() for name in ("killed", "whole")]
    assert logs[0] == logs[1]


def test_a_dry_run_writes_nothing(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert brainfm("pretrain", root / "raw", tmp_path / "dry", "group", *START, "--dry-run", "--set", *SMALL) == 0
    assert not (tmp_path / "dry").exists()
    said = capsys.readouterr().out
    assert "10" in said
    assert "GB" in said
    assert brainfm("pretrain", root / "out", tmp_path / "dry", "group", *START, "--dry-run", "--set", *SMALL) == 0
    assert "8 train" in capsys.readouterr().out


def test_bad_input_is_named(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert brainfm("pretrain", empty, tmp_path / "o1", "group", *START) == EXIT_NOT_FOUND
    assert brainfm("pretrain", root / "raw", tmp_path / "o2", "group", *START, "--set", *SMALL, "batch_size=5000") == EXIT_SETTINGS
    assert brainfm("pretrain", root / "raw", tmp_path / "o3", "group", *START, "--set", *SMALL, "slices.sequences=[T2w]") == EXIT_NOT_FOUND
    raw = tmp_path / "raw"
    shutil.copytree(root / "raw", raw)
    stolen = raw / "derivatives" / "lesions" / "sub-01" / "anat"
    (stolen / "sub-01_label-L_mask.nii.gz").rename(stolen / "sub-02_label-L_mask.nii.gz")
    code = brainfm("pretrain", raw, tmp_path / "o4", "group", *START, "--set", *SMALL)
    assert code not in (0, 1)
    assert "named for sub-02" in caplog.text
    alone = brainfm("pretrain", raw, tmp_path / "o5", "group", *START, "--participant-label", "01", "--set", *SMALL)
    assert alone == EXIT_BAD_DATA
    single = brainfm("pretrain", root / "raw", tmp_path / "o6", "group", *START, "--participant-label", "01", "--set", *SMALL)
    assert single == EXIT_BAD_DATA
