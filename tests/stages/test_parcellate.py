"""brainfm parcellate through the command line: what is written, what the numbers are, what is done again."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.programs.validator import validate
from tests import synthetic_bids as synthetic
from tests.stages.command import brainfm

if TYPE_CHECKING:
    from pathlib import Path

STEM = f"task-rest_space-{synthetic.TEMPLATE}_atlas-{synthetic.ATLAS}"
ROOT = {
    ".bidsignore", "config.yaml", "dataset_description.json", f"atlas-{synthetic.ATLAS}_description.json", "logs/CITATION.md",
    *(f"tpl-{synthetic.TEMPLATE}/tpl-{synthetic.TEMPLATE}_atlas-{synthetic.ATLAS}_dseg{end}" for end in (".json", ".nii.gz", ".tsv")),
}  # fmt: skip
GROUP = {
    "participants.tsv", "group.html", "group_qc.json", "group_qc.tsv", "logs/group.yaml", "logs/records/group.json",
    *(f"cohort/{name}" for name in ("index.parquet", "participants.json", "participants.tsv", f"atlas-{synthetic.ATLAS}.json", f"atlas-{synthetic.ATLAS}.npy")),
}  # fmt: skip


def person(label: str) -> set[str]:
    kinds = (
        "stat-mean_timeseries",
        "stat-coverage_bold",
        "stat-pearsoncorrelation_relmat",
        "stat-fisherz_relmat",
        "stat-partialcorrelation_relmat",
    )
    files = {f"sub-{label}/func/sub-{label}_{STEM}_{kind}{end}" for kind in kinds for end in (".tsv", ".json")}
    return {*files, f"sub-{label}.html", f"logs/records/sub-{label}.json"}


def tree(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> synthetic.Synthetic:
    made = synthetic.write_fmriprep(tmp_path_factory.mktemp("input") / "fmriprep", participants=("01", "02"), frames=100, seed=2)
    (made.root / "participants.tsv").write_text("participant_id\tage\tsite\nsub-01\t30\tA\nsub-02\tn/a\tB\n")
    return made


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, made: synthetic.Synthetic) -> Path:
    out = tmp_path_factory.mktemp("output") / "parcellate"
    atlas = ("--atlases", synthetic.ATLAS, "--datasets", f"tests={made.atlases}")
    assert brainfm("parcellate", made.root, out, "participant", *atlas) == 0
    assert tree(out) == {*ROOT, *person("01"), *person("02")}
    assert brainfm("parcellate", made.root, out, "group", *atlas) == 0
    return out


def test_golden_listing_and_the_validator(out: Path) -> None:
    assert tree(out) == {*ROOT, *person("01"), *person("02"), *GROUP}
    validate(out)  # raises where the validator ends with an error


def test_written_numbers_are_the_planted_ones(out: Path) -> None:
    for label in ("01", "02"):
        folder = out / f"sub-{label}" / "func"
        matrix = pd.read_csv(folder / f"sub-{label}_{STEM}_stat-pearsoncorrelation_relmat.tsv", sep="\t", index_col="Node")
        assert list(matrix.columns) == list(matrix.index) == list(synthetic.REGIONS)
        np.testing.assert_allclose(matrix.to_numpy(), synthetic.CORRELATION, atol=1e-6)
        sidecar = json.loads((folder / f"sub-{label}_{STEM}_stat-mean_timeseries.json").read_text())
        assert sidecar["RepetitionTime"] == 2.0
        assert all(source.startswith("bids:") for source in sidecar["Sources"])


def test_the_cohort_holds_what_the_tables_hold(out: Path) -> None:
    cohort = Cohort.open(out)
    assert list(cohort.participants.index) == ["01", "02"]
    assert np.isnan(cohort.participants.loc["02", "age"])
    for row in cohort.index.itertuples():
        table = pd.read_csv(out / f"sub-{row.participant}" / "func" / f"sub-{row.participant}_{STEM}_stat-mean_timeseries.tsv", sep="\t")
        np.testing.assert_allclose(cohort.series(row), table.to_numpy(), rtol=1e-6)
    assert sorted(cohort.index["site"]) == ["A", "B"]


def test_only_what_changed_is_done_again(tmp_path: Path, made: synthetic.Synthetic, out: Path) -> None:
    source, copy = shutil.copytree(made.root, tmp_path / "fmriprep"), shutil.copytree(out, tmp_path / "out")
    atlas = ("--atlases", synthetic.ATLAS, "--datasets", f"tests={made.atlases}")
    assert brainfm("parcellate", source, copy, "participant", *atlas) == 0  # copied inputs have other times: all is redone once
    times = {path: path.stat().st_mtime_ns for path in copy.rglob("*.tsv")}
    table = source / "sub-02" / "func" / "sub-02_task-rest_desc-confounds_timeseries.tsv"
    table.write_text(table.read_text())
    assert brainfm("parcellate", source, copy, "participant", *atlas) == 0
    redone = {path.relative_to(copy).parts[0] for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert redone == {"sub-02"}


def test_reports_alone_are_rebuilt(tmp_path: Path, made: synthetic.Synthetic, out: Path) -> None:
    copy = shutil.copytree(out, tmp_path / "out")
    page = copy / "sub-01.html"
    expected = page.read_bytes()
    page.unlink()
    series = {path: path.stat().st_mtime_ns for path in copy.rglob("*_timeseries.tsv")}
    atlas = ("--atlases", synthetic.ATLAS, "--datasets", f"tests={made.atlases}")
    assert brainfm("parcellate", made.root, copy, "participant", "--reports-only", *atlas) == 0
    assert page.read_bytes() == expected
    assert {path: path.stat().st_mtime_ns for path in series} == series


def test_a_dry_run_writes_nothing(tmp_path: Path, made: synthetic.Synthetic, capfd: pytest.CaptureFixture[str]) -> None:
    atlas = ("--atlases", synthetic.ATLAS, "--datasets", f"tests={made.atlases}")
    assert brainfm("parcellate", made.root, tmp_path / "out", "participant", "--dry-run", *atlas) == 0
    assert not (tmp_path / "out").exists()
    assert "sub-01" in capfd.readouterr().out
