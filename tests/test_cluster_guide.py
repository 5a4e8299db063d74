"""Every command line of docs/cluster.md runs: brainfm's against a small dataset and a fake scheduler, the others are looked up."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from brainfm_cli.programs.slurm import read_submissions
from tests.stages.command import brainfm, brainfm_on_cpu, only
from tests.synthetic_bids import write_fmriprep

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "cluster.md"
# What the guide does on a fresh account, before there is a brainfm; each is checked in its own way below.
_SHELL = {"make install VENV=$HOME/brainfm", "source $HOME/brainfm/bin/activate"}


def blocks(text: str) -> list[str]:
    """Command lines of a page: indented blocks, continued lines joined."""
    lines = [line[4:] for line in re.findall(r"(?m)^    \S.*$|^      \S.*$", text)]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [" ".join(line.split()) for line in joined.splitlines()]


LINES = [line for line in blocks(GUIDE.read_text(encoding="utf-8")) if line not in _SHELL]


@pytest.fixture
def account(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder as the guide supposes it, and a scheduler that accepts everything."""
    made = write_fmriprep(tmp_path / "fmriprep", participants=("01", "02"), frames=60)
    shutil.copytree(made.root, tmp_path / "raw")
    (tmp_path / "raw" / "dataset_description.json").write_text('{"Name": "raw", "BIDSVersion": "1.10.0"}')
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, body in {"sbatch": "echo 41", "squeue": "exit 0", "sacct": "exit 0", "scontrol": "exit 1", "scancel": "exit 0"}.items():
        (programs / name).write_text(f"#!/bin/sh\n{body}\n")
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_line_is_covered() -> None:
    assert len(LINES) >= 8
    assert all(line.startswith("brainfm ") for line in LINES), LINES


def test_the_lines_of_the_installation_exist() -> None:
    assert set(blocks(GUIDE.read_text(encoding="utf-8"))) >= _SHELL
    assert re.search(r"(?m)^install:", (ROOT / "Makefile").read_text(encoding="utf-8"))
    assert "$(VENV)" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_lines_run_in_the_order_of_the_guide(account: Path) -> None:
    codes = {}
    for line in LINES:
        words = shlex.split(line)[1:]
        if words[:1] in (["pretrain"], ["predict"], ["prompt-tune"]):  # on the cluster itself, not through submit
            words += ["--dry-run"]
        codes[line] = brainfm(*words)
    assert codes == dict.fromkeys(LINES, 0)
    assert len(read_submissions(account / "parcellated")) >= 1


def test_scripts_and_keys_that_the_guide_names_exist(account: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = GUIDE.read_text(encoding="utf-8")
    for name in re.findall(r"`((?:examples|containers|docs)/[^`*]+)`", text):
        assert (ROOT / name).exists(), name
    for pattern in re.findall(r"`((?:examples|containers|docs)/[^`]*\*[^`]*)`", text):
        assert list(ROOT.glob(pattern)), pattern
    line = ("submit", "parcellate", "fmriprep", "parcellated", "participant", "--dry-run", "--slurm")
    keys = [cell.strip("`") for cell in re.findall(r"(?m)^\| (`[^`]+`) \|", text)]
    assert brainfm(*line, *keys) == 0
    said = capsys.readouterr().out
    for shown in ("module load python/3.11 cuda", "--array=1-2%50", "export TMPDIR=/scratch/$SLURM_JOB_ID"):
        assert shown in said


@pytest.mark.long
def test_the_study_of_the_guide_without_a_scheduler(tmp_path: Path) -> None:
    """The commands that the jobs carry, one after another, to a finished evaluation."""
    series = ("--kind", "rest", "--level", "series", "--participants", 60, "--seed", 3, "--atlases", "Schaefer100", "--set", "frames=80")
    assert brainfm("simulate", tmp_path / "packed", *series) == 0
    tiny = ("--system", "brain-graph", "--set", "system.preset=tiny", "epochs=1", "steps=2", "where.split=[discovery]")
    assert brainfm_on_cpu("pretrain", tmp_path / "packed", tmp_path / "models", "group", *tiny) == 0
    tune = ("--target", "diagnosis_binary", "--set", "tuning.epochs=0", "where.split=[discovery]")
    model = only(tmp_path / "models" / "models")
    assert brainfm_on_cpu("prompt-tune", tmp_path / "packed", tmp_path / "tuned", "group", "--model", model, *tune) == 0
    tuned = only(tmp_path / "tuned" / "models")
    split = ("--set", "where.split=[holdout]")
    assert brainfm_on_cpu("predict", tmp_path / "packed", tmp_path / "predicted", "group", "--model", tuned, *split) == 0
    assert (tmp_path / "predicted" / "report.html").is_file()
