"""Series of other programs, several datasets in one cohort, and where participants tables are found."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.bids.people import copy_participants, find_participants_table
from brainfm_cli.errors import EXIT_BAD_DATA, EXIT_NOT_FOUND, EXIT_PARTIAL, EXIT_SETTINGS, EXIT_USAGE, EXIT_VALIDATION
from brainfm_cli.programs.validator import validate
from tests import synthetic_bids as synthetic
from tests.stages.command import brainfm

if TYPE_CHECKING:
    from pathlib import Path

FRAMES = 50
NAMES = ("Visual", "Motor", "Default")


def xcpd(
    root: Path, labels: tuple[str, ...], *, atlases: tuple[str, ...] = ("Gordon", "Tian"), seed: int = 0
) -> dict[tuple[str, str], np.ndarray]:
    """A small XCP-D output whose last region is covered to 20 % in the second participant; gives back the series."""
    root.mkdir(parents=True)
    synthetic.write_json(root / "dataset_description.json", {"Name": "XCP-D", "BIDSVersion": "1.9.0", "DatasetType": "derivative", "GeneratedBy": [{"Name": "xcp_d", "Version": "26.1.1"}]})  # fmt: skip
    made = {}
    generator = np.random.default_rng(seed)
    for number, label in enumerate(labels):
        folder = root / f"sub-{label}" / "func"
        folder.mkdir(parents=True)
        for atlas in atlases:
            stem = folder / f"sub-{label}_task-rest_space-{synthetic.TEMPLATE}_atlas-{atlas}_stat-"
            series = generator.standard_normal((FRAMES, 3))
            coverage = [1.0, 0.9, 0.2 if number == 1 else 0.8]
            pd.DataFrame(series, columns=NAMES).to_csv(f"{stem}mean_timeseries.tsv", sep="\t", index=False)
            pd.DataFrame([coverage], columns=NAMES).to_csv(f"{stem}coverage_bold.tsv", sep="\t", index=False)
            synthetic.write_json(stem.with_name(f"{stem.name}mean_timeseries.json"), {"RepetitionTime": 2.0})
            made[label, atlas] = series
    return made


def table_of(root: Path, text: str) -> Path:
    (root / "participants.tsv").write_text(text)
    return root / "participants.tsv"


def test_ready_made_series_are_taken_as_they_are(tmp_path: Path) -> None:
    made = xcpd(tmp_path / "xcpd", ("01", "02"))
    table_of(tmp_path / "xcpd", "participant_id\tage\nsub-01\t30\nsub-02\t40\n")
    out = tmp_path / "out"
    assert brainfm("parcellate", tmp_path / "xcpd", out, "participant") == 0
    stem = f"sub-01_task-rest_space-{synthetic.TEMPLATE}_atlas-Tian_stat-"
    series = pd.read_csv(out / "sub-01" / "func" / f"{stem}mean_timeseries.tsv", sep="\t")
    np.testing.assert_allclose(series.to_numpy(), made["01", "Tian"], rtol=1e-7)
    sidecar = json.loads((out / "sub-01" / "func" / f"{stem}mean_timeseries.json").read_text())
    assert sidecar["Denoising"] == "taken as delivered by xcp_d 26.1.1"
    matrix = pd.read_csv(out / "sub-01" / "func" / f"{stem}pearsoncorrelation_relmat.tsv", sep="\t", index_col="Node")
    np.testing.assert_allclose(matrix.to_numpy(), np.corrcoef(made["01", "Tian"].T), atol=1e-6)
    lost = pd.read_csv(next(out.glob("sub-02/func/*Tian*mean_timeseries.tsv")), sep="\t")
    assert lost.isna().all().tolist() == [False, False, True]
    assert "no usable signal in 1 of 3 regions (Default)" in (out / "sub-02.html").read_text()
    assert brainfm("parcellate", tmp_path / "xcpd", out, "group") == 0
    cohort = Cohort.open(out)
    assert sorted(set(cohort.index["atlas"])) == ["Gordon", "Tian"]
    quality = pd.read_csv(out / "group_qc.tsv", sep="\t", dtype={"participant_id": str})
    assert quality.set_index(["participant_id", "atlas"])["missing_regions"].to_dict() == {
        ("01", "Gordon"): 0, ("01", "Tian"): 0, ("02", "Gordon"): 1, ("02", "Tian"): 1,
    }  # fmt: skip
    validate(out)


def test_an_atlas_that_the_series_do_not_have_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    xcpd(tmp_path / "xcpd", ("01",))
    assert brainfm("parcellate", tmp_path / "xcpd", tmp_path / "out", "participant", "--atlases", "Schaefer100") == EXIT_NOT_FOUND
    assert "there are Gordon, Tian" in caplog.text


def test_a_packed_cohort_has_no_participant_level(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    xcpd(tmp_path / "xcpd", ("01", "02"))
    assert brainfm("parcellate", tmp_path / "xcpd", tmp_path / "packed", "group") == 0  # without a participant level of its own
    assert brainfm("parcellate", tmp_path / "packed", tmp_path / "out", "participant") == EXIT_USAGE
    assert "no participant level" in capfd.readouterr().err


LABELS = "labels={sex: {siteone: {column: sex, classes: {F: female, M: male}}, two: {column: gender, classes: {2: female, 1: male}}}}"


def test_several_datasets_share_declared_targets_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one, two, out = tmp_path / "siteone", tmp_path / "sitetwo", tmp_path / "out"
    series = xcpd(one, ("01", "02")) | {("two", *key): value for key, value in xcpd(two, ("01", "03"), seed=9).items()}
    table_of(one, "participant_id\tsex\nsub-01\tF\nsub-02\tM\n")
    table_of(two, "participant_id\tgender\nsub-01\t1\nsub-03\t2\n")
    assert brainfm("parcellate", one, out, "participant") == 0
    common = ("parcellate", one, out, "group", "--datasets", f"two={two}")
    wrong = LABELS.replace(", two: {column: gender, classes: {2: female, 1: male}}", "")
    assert brainfm(*common, "--set", wrong) == EXIT_SETTINGS
    assert "not declared for two" in caplog.text
    assert not (out / "cohort").exists()
    assert brainfm(*common, "--set", LABELS) == 0
    cohort = Cohort.open(out)
    assert cohort.participants["sex"].to_dict() == {"siteone+01": "female", "siteone+02": "male", "two+01": "male", "two+03": "female"}
    for row in cohort.index.itertuples():
        label = row.participant.partition("+")[2]
        planted = series[("two", label, row.atlas) if row.dataset == "two" else (label, row.atlas)]
        covered = ~np.isnan(cohort.series(row)).all(0)
        np.testing.assert_allclose(cohort.series(row)[:, covered], planted[:, covered], rtol=1e-6)
    # Only people of the first dataset have folders here.
    assert pd.read_csv(out / "participants.tsv", sep="\t")["participant_id"].tolist() == ["sub-01", "sub-02"]
    # The labels are the group's business: the participants stay current, and the cohort is packed again when labels change.
    packed = (out / "cohort" / "index.parquet").stat().st_mtime_ns
    people = (out / "logs" / "records" / "sub-01.json").read_bytes()
    assert brainfm(*common, "--set", LABELS) == 0
    assert (out / "cohort" / "index.parquet").stat().st_mtime_ns == packed
    assert brainfm(*common, "--set", LABELS.replace("female", "woman")) == 0
    assert set(Cohort.open(out).participants["sex"]) == {"woman", "male"}
    assert (out / "logs" / "records" / "sub-01.json").read_bytes() == people


def test_the_quality_page_alone_is_rebuilt(tmp_path: Path) -> None:
    xcpd(tmp_path / "xcpd", ("01", "02"))
    out = tmp_path / "out"
    assert brainfm("parcellate", tmp_path / "xcpd", out, "participant") == 0
    assert brainfm("parcellate", tmp_path / "xcpd", out, "group", "--reports-only") == EXIT_NOT_FOUND
    assert brainfm("parcellate", tmp_path / "xcpd", out, "group") == 0
    before = {path.name: path.read_bytes() for path in out.glob("group*")}
    packed = (out / "cohort" / "index.parquet").stat().st_mtime_ns
    (out / "group.html").unlink()
    assert brainfm("parcellate", tmp_path / "xcpd", out, "group", "--reports-only") == 0
    assert {path.name: path.read_bytes() for path in out.glob("group*")} == before
    assert (out / "cohort" / "index.parquet").stat().st_mtime_ns == packed


def test_people_whose_level_failed_are_left_out_and_named(tmp_path: Path) -> None:
    xcpd(tmp_path / "xcpd", ("01", "02", "03"))
    out = tmp_path / "out"
    assert brainfm("parcellate", tmp_path / "xcpd", out, "participant") == 0
    next((tmp_path / "xcpd" / "sub-02").rglob("*Tian*timeseries.tsv")).write_text("Visual\tMotor\tDefault\n1\t2\n")
    assert brainfm("parcellate", tmp_path / "xcpd", out, "participant") != 0
    assert brainfm("parcellate", tmp_path / "xcpd", out, "group") == 0
    assert sorted(set(Cohort.open(out).index["participant"])) == ["01", "03"]
    assert "sub-02" in " ".join(json.loads((out / "logs" / "records" / "group.json").read_text())["notes"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty"),
        ("Visual\tMotor\tDefault\n", "no frames"),
        ("Visual\tMotor\tDefault\n1\t2\t3\n", "one frame"),
        ("Visual\tMotor\tDefault\n" + "1\t2\t3\n" * FRAMES, "no region has a usable signal"),
        ("Visual\tMotor\tDefault\n" + "1\t2\t3\n2\t1\t5\n3\t1\t0\n" * 4, f"12 frames in Tian and {FRAMES} in Gordon"),
        ("Visual\tMotor\tVisual\n" + "1\t2\t3\n2\t1\t5\n" * 9, "region names repeat: Visual"),
        ("Visual\tMotor\tDefault\n" + "1\t2\t3\n2\tinf\t5\n" * 9, "without a finite number"),
    ],
)
def test_spoilt_series_are_named_and_nothing_of_them_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str, says: str
) -> None:
    xcpd(tmp_path / "xcpd", ("01", "02"))
    next((tmp_path / "xcpd" / "sub-02").rglob("*Tian*timeseries.tsv")).write_text(text)
    out = tmp_path / "out"
    assert brainfm("parcellate", tmp_path / "xcpd", out, "participant") == EXIT_PARTIAL
    assert says in caplog.text
    assert json.loads((out / "logs" / "records" / "sub-02.json").read_text())["failure"]["exit_code"] == EXIT_BAD_DATA
    assert not [path for path in out.rglob("*sub-02*") if path.is_file() and path.parent.name != "records"]
    assert (out / "sub-01.html").exists()


def test_files_of_runs_that_are_gone_are_removed(tmp_path: Path) -> None:
    xcpd(tmp_path / "xcpd", ("01",))
    out = tmp_path / "out"
    assert brainfm("parcellate", tmp_path / "xcpd", out, "participant") == 0
    for path in (tmp_path / "xcpd").rglob("*Tian*"):
        path.unlink()
    assert brainfm("parcellate", tmp_path / "xcpd", out, "participant") == 0
    assert not list((out / "sub-01").rglob("*Tian*"))
    assert list((out / "sub-01").rglob("*Gordon*timeseries.tsv"))


def test_validation_is_asked_for_and_ends_with_its_own_code(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    xcpd(tmp_path / "xcpd", ("01",))
    (tmp_path / "xcpd" / "no_bids_name.tsv").write_text("x\n1\n")
    out = tmp_path / "out"
    assert brainfm("parcellate", tmp_path / "xcpd", out, "participant", "--validate") == EXIT_VALIDATION
    assert not out.exists()
    assert "validator" in capfd.readouterr().err


@pytest.mark.parametrize("way", ["own", "link", "parent", "none"])
def test_where_the_participants_table_is_found(tmp_path: Path, way: str) -> None:
    raw = tmp_path / "raw"
    derivative = raw / "derivatives" / "fmriprep" if way == "parent" else tmp_path / "elsewhere"
    derivative.mkdir(parents=True)
    raw.mkdir(exist_ok=True)
    expected = None
    if way == "own":
        expected = table_of(derivative, "participant_id\n")
    if way in {"own", "link", "parent"}:
        other = table_of(raw, "participant_id\n")
        expected = expected or other
    links = {"raw": "../raw", "gone": "/no/such/folder", "remote": "https://example.org/raw"} if way in {"own", "link"} else {}
    synthetic.write_json(derivative / "dataset_description.json", {"Name": "x", "DatasetLinks": links})
    found = find_participants_table(derivative)
    assert (found and found.resolve()) == (expected and expected.resolve())


def test_links_in_a_circle_end(tmp_path: Path) -> None:
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        synthetic.write_json(tmp_path / name / "dataset_description.json", {"SourceDatasets": [{"URL": f"../{other}"}]})
    assert find_participants_table(tmp_path / "a") is None


def test_a_copied_table_has_a_row_for_every_folder(tmp_path: Path) -> None:
    table = table_of(tmp_path, "participant_id\tage\tcode\nsub-01\t30\t007\nsub-02\tn/a\t\nsub-09\t50\t1\n")
    synthetic.write_json(tmp_path / "participants.json", {"age": {"Units": "year"}})
    (tmp_path / "out").mkdir()
    written = copy_participants(table, tmp_path / "out", ["01", "02", "05"])
    assert [path.name for path in written] == ["participants.tsv", "participants.json"]
    rows = [line.split("\t") for line in written[0].read_text().splitlines()]
    assert rows[0] == ["participant_id", "age", "code"]
    assert rows[1:] == [["sub-01", "30", "007"], ["sub-02", "n/a", "n/a"], ["sub-05", "n/a", "n/a"]]
