"""``brainfm preprocess`` with the embedded engine: one simulated head from raw to published, and what is refused before that."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from benchmarks.preprocess import recover
from brainfm_cli.programs.validator import validate
from tests.bad_input_bench import HEAD_FRAMES, make_head
from tests.programs import fakes
from tests.stages.command import brainfm

SPACE = "space-MNI152NLin2009cAsym_res-2"
ANAT = {
    *(f"{place}{name}" for place in ("", f"{SPACE}_") for name in (
        "desc-preproc_T1w.nii.gz", "desc-preproc_T1w.json", "desc-brain_mask.nii.gz", "desc-brain_mask.json", "dseg.nii.gz", "dseg.json",
        *(f"label-{tissue}_probseg.nii.gz" for tissue in ("CSF", "GM", "WM")),
    )),
    *(f"{SPACE}_label-{tissue}_probseg.json" for tissue in ("CSF", "GM", "WM")),
    "from-T1w_to-MNI152NLin2009cAsym_mode-image_xfm.h5", "from-MNI152NLin2009cAsym_to-T1w_mode-image_xfm.h5",
}  # fmt: skip
FUNC = {
    *(f"{name}{end}" for name in (
        "desc-hmc_boldref", "desc-coreg_boldref", "desc-brain_mask", f"{SPACE}_boldref", f"{SPACE}_desc-brain_mask", f"{SPACE}_desc-preproc_bold",
    ) for end in (".nii.gz", ".json")),
    "from-orig_to-boldref_mode-image_desc-hmc_xfm.txt", "from-boldref_to-T1w_mode-image_desc-coreg_xfm.txt",
    "desc-confounds_timeseries.tsv", "desc-confounds_timeseries.json",
}  # fmt: skip
ROOT = {
    ".bidsignore", "config.yaml", "dataset_description.json", "logs/CITATION.md", "sub-0001.html", "logs/sub-0001_CITATION.md",
    "logs/sub-0001_CITATION.bib", "logs/quality/sub-0001.json", "logs/records/sub-0001.json",
}  # fmt: skip


def tree(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def said(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> str:
    printed = capsys.readouterr()
    logged = "\n".join(line.getMessage() for line in caplog.records)
    return " ".join((printed.out + printed.err + logged).split())


@pytest.fixture(scope="module")
def head(tmp_path_factory: pytest.TempPathFactory) -> Path:
    raw = tmp_path_factory.mktemp("simulated") / "raw"
    make_head(raw)
    return raw


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory, head: Path) -> tuple[Path, set[str]]:
    """An output whose job was killed while the brain was registered, and the steps that were done by then."""
    out = tmp_path_factory.mktemp("derivatives") / "out"
    arguments = [sys.executable, "-m", "brainfm_cli", "preprocess", str(head), str(out), "participant", "--omp-nthreads", "1"]
    child = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.time() + 300
    while child.poll() is None and time.time() < deadline and not list(out.glob(".work/*/embedded/normalise/_inputs.pklz")):
        time.sleep(0.1)
    child.send_signal(signal.SIGKILL)
    child.wait()
    return out, {path.parent.name for path in out.glob(".work/*/embedded/*/result_*.pklz")}


@pytest.fixture(scope="module")
def out(killed: tuple[Path, set[str]], head: Path) -> tuple[Path, float]:
    """The same output once the same command was given again, and when that was."""
    started = time.time()
    assert brainfm("preprocess", head, killed[0], "participant", "--omp-nthreads", 1) == 0
    return killed[0], started


@pytest.mark.long
def test_a_killed_job_goes_on_and_leaves_no_work_behind(killed: tuple[Path, set[str]], out: tuple[Path, float], head: Path) -> None:
    root, started = out
    assert {"conform", "extract"} <= killed[1]
    assert "normalise" not in killed[1]
    assert not list((root / ".work").glob("*"))
    record = json.loads((root / "logs/records/sub-0001.json").read_text())
    assert (record["status"], record["seed"]) == ("done", 1)
    before = (root / "sub-0001.html").stat().st_mtime
    assert before > started
    assert brainfm("preprocess", head, root, "participant") == 0
    assert (root / "sub-0001.html").stat().st_mtime == before, "a participant that is done is skipped"


@pytest.mark.long
def test_everything_is_there_under_fmripreps_names(out: tuple[Path, float]) -> None:
    root = out[0]
    anat, func = (f"sub-0001/{place}" for place in ("anat/sub-0001", "func/sub-0001_task-rest"))
    assert tree(root) == {*ROOT, *(f"{anat}_{name}" for name in ANAT), *(f"{func}_{name}" for name in FUNC)}
    validate(root)
    description = json.loads((root / "dataset_description.json").read_text())
    assert [entry["Name"] for entry in description["GeneratedBy"]] == ["brainfm"], "fMRIPrep had no part in it"
    quality = json.loads((root / "logs/quality/sub-0001.json").read_text())["sub-0001_task-rest"]
    assert set(quality) == {"tsnr", "brain_ml", "template_correlation", "template_dice"}
    image = nib.load(root / f"{func}_{SPACE}_desc-preproc_bold.nii.gz")
    assert image.shape == (97, 115, 97, HEAD_FRAMES)
    assert "@article{nipype," in (root / "logs/sub-0001_CITATION.bib").read_text()
    assert "embedded engine of brainfm" in (root / "logs/sub-0001_CITATION.md").read_text()
    page = (root / "sub-0001.html").read_text()
    assert page.count("data:image/png;base64") == 6
    assert "slices were moved to the middle of the acquisition" in page


@pytest.mark.long
def test_what_was_planted_is_recovered(out: tuple[Path, float], head: Path) -> None:
    found = recover(head, out[0], "0001")
    assert min(found["motion correlation"]) >= 0.98
    assert found["T1w to frames, boundary"] < 1.5  # mm, of voxels of 4.5 mm
    assert found["template to T1w, brain"] < 2
    assert found["mask dice"] > 0.93


@pytest.mark.long
def test_nilearn_and_parcellate_read_it(out: tuple[Path, float], tmp_path: Path) -> None:
    from nilearn.interfaces.fmriprep import load_confounds_strategy

    bold = out[0] / "sub-0001" / "func" / f"sub-0001_task-rest_{SPACE}_desc-preproc_bold.nii.gz"
    for strategy in ("simple", "scrubbing", "compcor"):
        table, _ = load_confounds_strategy(str(bold), denoise_strategy=strategy)
        assert np.isfinite(table.to_numpy()).all()
    assert brainfm("parcellate", out[0], tmp_path / "regions", "participant", "--atlases", "Schaefer100", "--denoise-strategy", "none") == 0
    series = pd.read_csv(next((tmp_path / "regions").rglob("*stat-mean_timeseries.tsv")), sep="\t", na_values="n/a")
    assert len(series) >= HEAD_FRAMES - 1
    assert series.notna().all().sum() >= 95


@pytest.mark.long
def test_the_group_level_shows_what_the_images_say(out: tuple[Path, float], head: Path, tmp_path: Path) -> None:
    root = shutil.copytree(out[0], tmp_path / "out")
    assert brainfm("preprocess", head, root, "group") == 0
    row = pd.read_csv(root / "group_qc.tsv", sep="\t", na_values="n/a").iloc[0]
    mask = nib.load(root / "sub-0001/anat/sub-0001_desc-brain_mask.nii.gz").get_fdata()
    assert row["brain_ml"] == pytest.approx(mask.sum() * 8 / 1000, rel=1e-3)
    assert row[["tsnr", "template_correlation", "template_dice"]].notna().all()
    assert "preprocessed with the embedded engine" in (root / "group.html").read_text()


def test_a_plan_says_memory_and_threads_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw, out = fakes.write_raw(tmp_path / "raw", labels=("01", "02")), tmp_path / "out"
    assert brainfm("preprocess", raw, out, "participant", "--dry-run", "--nprocs", 2, "--omp-nthreads", 3) == 0
    printed = capsys.readouterr().out
    assert "2 at a time, each with 3 threads" in printed
    assert "sub-02: missing; about " in printed
    assert not out.exists()


def test_too_little_memory_is_said_before_anything_is_done(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    raw, out = fakes.write_raw(tmp_path / "raw", labels=("01", "02")), tmp_path / "out"
    assert brainfm("preprocess", raw, out, "participant", "--mem-mb", 2000, "--nprocs", 2) == 75
    assert "fewer --nprocs" in said(capsys, caplog)
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--", "--use-syn-sdc"), "options cannot be used with engine embedded"),
        (("--output-spaces", "T1w"), "output_spaces cannot be used"),
        (("--ignore", "slicetiming"), "ignore cannot be used"),
        (("--fs-no-reconall",), "fs_no_reconall cannot be used"),
        (("--level", "minimal"), "level cannot be used"),
        (("--seed", "0"), "at least 1"),
        (("--engine", "docker", "--set", "embedded.resolution=1"), "embedded cannot be used with engine docker"),
        (("--set", "embedded.resolution=3"), "embedded.resolution"),
    ],
)
def test_what_an_engine_does_not_know_is_refused(
    arguments: tuple[str, ...], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    assert brainfm("preprocess", fakes.write_raw(tmp_path / "raw"), out, "participant", *arguments) == 78
    assert says in said(capsys, caplog)
    assert not out.exists()


def test_results_of_two_engines_do_not_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from brainfm_cli.stages.preprocess.settings import PreprocessSettings

    embedded, docker = PreprocessSettings(), PreprocessSettings(engine="docker")
    assert embedded.digest() != docker.digest() == PreprocessSettings(engine="apptainer").digest()
    other = PreprocessSettings.from_values({"embedded": {"resolution": 1}})
    assert other.digest() != embedded.digest()


BOLD, T1W = "func/sub-01_task-rest_run-1_bold.nii.gz", "anat/sub-01_T1w.nii.gz"


def _rewrite(name: str, values: np.ndarray):
    def change(sub: Path) -> None:
        nib.save(nib.Nifti1Image(values, np.diag([3.0, 3, 3, 1])), sub / name)

    return change


def _describe(**values: object):
    return lambda sub: fakes.write_json(sub / "func" / "sub-01_task-rest_run-1_bold.json", values)


def _headers(sub: Path) -> None:
    image = nib.Nifti1Image(np.zeros((4, 4, 4, 5), np.int16), np.eye(4))
    image.header.set_zooms((3, 3, 3, 1.5))
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, sub / BOLD)


def _break_link(sub: Path) -> None:
    (sub / BOLD).unlink()
    (sub / BOLD).symlink_to(sub / "elsewhere.nii.gz")


FAULTS = {
    "no T1w": (lambda sub: (sub / T1W).unlink(), 66, "no T1w image"),
    "T1w only": (lambda sub: shutil.rmtree(sub / "func"), 66, "no BOLD run"),
    "nothing": (lambda sub: [shutil.rmtree(sub / place) for place in ("anat", "func")], 66, "no images that match"),
    "3-D BOLD": (_rewrite(BOLD, np.ones((4, 4, 4), np.int16)), 65, "must be a series of volumes"),
    "4-D T1w": (_rewrite(T1W, np.ones((4, 4, 4, 3), np.int16)), 65, "must be one volume"),
    "no RepetitionTime": (lambda sub: (sub.parent / "task-rest_bold.json").unlink(), 65, "RepetitionTime is missing"),
    "another RepetitionTime in the header": (_headers, 65, "in the header"),
    "milliseconds": (_describe(RepetitionTime=2000), 65, "must be in seconds"),
    "SliceTiming of the wrong length": (_describe(SliceTiming=[0, 1]), 65, "SliceTiming has 2 values for 4 slices"),
    "SliceTiming in milliseconds": (_describe(SliceTiming=[0, 500, 1000, 1500]), 65, "SliceTiming runs from 0 to 1500"),
    "unreadable JSON": (lambda sub: (sub / "func" / "sub-01_task-rest_run-1_bold.json").write_text("{"), 65, "cannot be indexed"),
    "a run twice": (lambda sub: shutil.copy(sub / BOLD, sub / BOLD.replace("_run-1", "_rec-x_run-1")), 65, "is there twice"),
    "a broken link": (_break_link, 65, "broken link"),
    "an image that is none": (lambda sub: (sub / BOLD).write_bytes(b"x"), 65, "cannot be read"),
    "an empty T1w": (_rewrite(T1W, np.zeros((6, 6, 6), np.int16)), 65, "one value everywhere"),
    "NaN only": (_rewrite(T1W, np.full((6, 6, 6), np.nan, np.float32)), 65, "one value everywhere"),
    "a T1w of few voxels": (lambda sub: None, 65, "voxels of the structural image"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_bad_input_has_a_name_and_a_code_and_leaves_nothing(
    fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    change, code, says = FAULTS[fault]
    raw, out = fakes.write_raw(tmp_path / "raw"), tmp_path / "out"
    change(raw / "sub-01")
    got = brainfm("preprocess", raw, out, "participant", "--omp-nthreads", 1)
    assert got == code
    assert says in said(capsys, caplog)
    record = json.loads((out / "logs/records/sub-01.json").read_text())
    assert record["status"] == "failed"
    assert record["failure"]["fix"]
    assert not (out / "sub-01").exists()


def test_a_head_without_a_brain_is_refused(
    tmp_path: Path, generator: np.random.Generator, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    raw, out = fakes.write_raw(tmp_path / "raw"), tmp_path / "out"
    _rewrite(T1W, generator.normal(100, 9, (40, 40, 40)).astype(np.float32))(raw / "sub-01")
    assert brainfm("preprocess", raw, out, "participant", "--anat-only", "--set", "embedded.brain_extraction=deepbet") == 65
    assert "no believable brain mask was found (deepbet: volume of the brain mask is" in said(capsys, caplog)


def test_a_link_out_of_the_dataset_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    """Nothing is bound into a container: the file is read where it lies, and found to be no head."""
    raw, out = fakes.write_raw(tmp_path / "raw"), tmp_path / "out"
    moved = shutil.move(raw / "sub-01" / T1W, tmp_path / "elsewhere.nii.gz")
    nib.save(nib.Nifti1Image(np.zeros((6, 6, 6), np.int16), np.eye(4)), moved)
    (raw / "sub-01" / T1W).symlink_to(moved)
    assert brainfm("preprocess", raw, out, "participant") == 65
    assert "one value everywhere" in said(capsys, caplog)
