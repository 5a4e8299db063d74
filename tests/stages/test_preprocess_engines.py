"""``brainfm preprocess`` with fMRIPrep: fake engines on PATH, real files, real exit codes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from brainfm_cli import cli
from brainfm_cli.programs import fmriprep_outputs
from tests.programs import fakes

ALL = ("fmriprep", "docker", "apptainer", "fmriprep-docker")
ENGINES = {
    "fmriprep": (),
    "docker": (),
    "fmriprep-docker": ("--set", "fmriprep_docker=true"),
    "apptainer": ("--image", "fmriprep.sif"),
    "singularity": ("--image", "fmriprep.sif"),
}


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    return fakes.write_raw(tmp_path / "raw")


@pytest.fixture
def engines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fakes.Fakes:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fmriprep.sif").write_text("image")
    return fakes.install(tmp_path, monkeypatch, ALL, fakes.write_tree(tmp_path / "tree"))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    before = signal.getsignal(signal.SIGTERM)

    def call(*arguments: object) -> tuple[int, str]:
        with pytest.raises(SystemExit) as ended:
            cli.main(["preprocess", *map(str, arguments)])
        said = capsys.readouterr()
        logged = "\n".join(line.getMessage() for line in caplog.records)
        caplog.clear()
        return int(ended.value.code or 0), " ".join((said.out + said.err + logged).split())

    yield call
    signal.signal(signal.SIGTERM, before)


def preprocess(raw: Path, out: Path, *more: object) -> tuple[object, ...]:
    return (raw, out, "participant", "--mem-mb", "9000", *more)


def record(out: Path, unit: str = "sub-01") -> dict:
    return json.loads((out / "logs" / "records" / f"{unit}.json").read_text())


@pytest.mark.parametrize("engine", ENGINES)
def test_every_engine_publishes_what_fmriprep_wrote(engine: str, raw: Path, tmp_path: Path, engines: fakes.Fakes, run) -> None:
    out = tmp_path / "out"
    name = "docker" if engine == "fmriprep-docker" else engine
    arguments = preprocess(raw, out, "--engine", name, *ENGINES[engine])
    code, said = run(*arguments)
    assert code == 0, said
    assert [call[0] for call in engines.runs] == ["apptainer" if engine == "singularity" else engine]
    tree = {path.relative_to(tmp_path / "tree") for path in (tmp_path / "tree").rglob("*") if path.is_file()}
    own = {Path("dataset_description.json"), Path(".bidsignore"), Path("logs/CITATION.md")}
    assert all((out / path).read_bytes() == (tmp_path / "tree" / path).read_bytes() for path in tree - own)
    assert (out / "logs" / "sub-01_CITATION.md").read_text() == "cite us\n"
    assert not list((out / ".work").glob("*")), "the scratch folder of a finished participant is removed"
    description = json.loads((out / "dataset_description.json").read_text())
    assert [entry["Name"] for entry in description["GeneratedBy"]] == ["brainfm", "fMRIPrep"]
    assert description["DatasetLinks"]["raw"] == "../raw"
    assert record(out)["status"] == "done"
    assert "has a terminal" not in str(engines.calls)
    # Again: everything is current, and no engine is asked anything.
    before = len(engines.calls)
    assert run(*arguments)[0] == 0
    assert len(engines.calls) == before


def test_engines_of_fmriprep_share_one_output(raw: Path, tmp_path: Path, engines: fakes.Fakes, run) -> None:
    out = tmp_path / "out"
    assert run(*preprocess(raw, out, "--engine", "docker"))[0] == 0
    code, said = run(*preprocess(raw, out, "--engine", "fmriprep"))
    assert code == 0, said
    code, said = run(*preprocess(raw, out, "--engine", "docker", "--output-spaces", "T1w"))
    assert code == 73
    code, said = run(*preprocess(raw, out, "--engine", "docker", "--", "--use-syn-sdc"))
    assert code == 73, "an option after -- changes the result and so the hash"


def test_dry_run_prints_the_line_that_is_run(
    raw: Path, tmp_path: Path, engines: fakes.Fakes, run, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    arguments = preprocess(raw, out, "--engine", "docker", "--output-spaces", "MNI152NLin6Asym:res-2", "T1w")
    with pytest.raises(SystemExit):
        cli.main(["preprocess", *map(str, arguments), "--dry-run", "--", "--use-syn-sdc", "warn"])
    printed = capsys.readouterr().out.splitlines()
    assert not out.exists(), "a plan writes nothing"
    shell = "\n".join(line for line in printed if not line.startswith("#"))
    engines.record.unlink()
    subprocess.run(["bash", "-c", shell], check=True, capture_output=True, stdin=subprocess.DEVNULL)
    by_hand = engines.runs
    engines.record.unlink()
    run(*arguments, "--", "--use-syn-sdc", "warn")
    assert engines.runs == by_hand
    assert by_hand[0][-4:] == ["MNI152NLin6Asym:res-2", "T1w", "--use-syn-sdc", "warn"]


@pytest.mark.parametrize("engine", ["docker", "fmriprep"])
@pytest.mark.parametrize(
    ("ending", "code", "says"),
    [
        ({"FAKE_CODE": "1"}, 70, "fMRIPrep failed (code 1)"),
        ({"FAKE_CODE": "70"}, 70, "could not build its workflow"),
        ({"FAKE_CODE": "65"}, 65, "finds the data unusable"),
        ({"FAKE_CODE": "126"}, 126, "FreeSurfer licence"),
        ({"FAKE_CODE": "127"}, 127, "lacks a program"),
        ({"FAKE_CODE": "134"}, 75, "out of memory (code 134)"),
        ({"FAKE_CODE": "137"}, 75, "out of memory (code 137)"),
        ({"FAKE_CODE": "139"}, 70, "segmentation fault"),
        ({"FAKE_CODE": "143"}, 75, "stopped from outside"),
        ({"FAKE_SIGNAL": "KILL"}, 75, "out of memory (code 137)"),
        ({"FAKE_SIGNAL": "SEGV"}, 70, "segmentation fault (code 139)"),
        ({"FAKE_CODE": "1", "FAKE_LOG": "OSError: [Errno 28] No space left on device"}, 75, "ran full"),
        ({"FAKE_CODE": "1", "FAKE_LOG": "OSError: [Errno 122] Disk quota exceeded"}, 75, "ran full"),
        ({"FAKE_CODE": "1", "FAKE_LOG": "concurrent.futures.process.BrokenProcessPool: A process"}, 75, "out of memory"),
        ({"FAKE_CODE": "1", "FAKE_LOG": "PermissionError: [Errno 13] Permission denied: '/out'"}, 73, "may not read or write"),
        (
            {"FAKE_CODE": "1", "FAKE_LOG": "ERROR: it appears that recon-all is already running for sub-01: IsRunning.lh+rh"},
            70,
            "already being",
        ),
        ({"FAKE_CODE": "1", "FAKE_LOG": "requests.exceptions.ConnectionError: Max retries exceeded"}, 66, "no network"),
        ({"FAKE_CODE": "2", "FAKE_LOG": "fmriprep: error: unrecognized arguments: --nonsense"}, 2, "unrecognized arguments: --nonsense"),
    ],
)
def test_endings_have_codes_and_sentences(
    engine: str, ending: dict[str, str], code: int, says: str, raw: Path, tmp_path: Path, engines: fakes.Fakes, run, monkeypatch
) -> None:
    for name, value in ending.items():
        monkeypatch.setenv(name, value)
    out = tmp_path / "out"
    got, said = run(*preprocess(raw, out, "--engine", engine))
    assert got == code, said
    assert says in said
    failure = record(out)["failure"]
    assert failure["exit_code"] == code
    assert failure["fix"]
    assert not (out / "sub-01").exists(), "a failed participant leaves nothing in the dataset"
    assert "Finished" in (out / "logs" / "sub-01_fmriprep.log").read_text()


@pytest.mark.parametrize(
    ("engine", "ending", "code", "says"),
    [
        ("apptainer", {"FAKE_CODE": "255", "FAKE_LOG": "FATAL:   could not open image"}, 69, "could not be started (code 255)"),
        ("apptainer", {"FAKE_CODE": "255"}, 70, "fMRIPrep failed (code 255)"),
        ("docker", {"FAKE_CODE": "125", "FAKE_LOG": "docker: Error response from daemon: invalid mount"}, 69, "could not be started (code 125)"),
        ("docker", {"FAKE_CODE": "126", "FAKE_LOG": "docker: Error response from daemon: OCI runtime create failed"}, 69, "could not be started"),
        ("docker", {"FAKE_CODE": "125", "FAKE_LOG": 'docker: The container name "/brainfm-sub-01-abc" is already in use'}, 69, "docker rm -f brainfm-sub-01-abc"),
    ],
)  # fmt: skip
def test_an_engine_that_does_not_start_is_no_fmriprep_failure(
    engine: str, ending: dict[str, str], code: int, says: str, raw: Path, tmp_path: Path, engines: fakes.Fakes, run, monkeypatch
) -> None:
    for name, value in ending.items():
        monkeypatch.setenv(name, value)
    got, said = run(*preprocess(raw, tmp_path / "out", "--engine", engine, *ENGINES[engine]))
    assert (got, says in said) == (code, True), said


@pytest.mark.parametrize(
    "lost",
    [
        "*desc-preproc_T1w.nii.gz",
        "*run-2*desc-preproc_bold.nii.gz",
        "*run-1*desc-brain_mask.nii.gz",
        "*run-2*confounds_timeseries.tsv",
        "*/sub-01.html",
    ],
)
def test_a_missing_output_is_named_though_fmriprep_ended_with_0(
    lost: str, raw: Path, tmp_path: Path, engines: fakes.Fakes, run, monkeypatch
) -> None:
    monkeypatch.setenv("FAKE_MISSING", lost)
    code, said = run(*preprocess(raw, tmp_path / "out", "--engine", "docker"))
    assert code == 70
    assert "did not write" in said
    assert lost.rpartition("*")[2].lstrip("/") in said


def test_a_truncated_output_is_found(raw: Path, tmp_path: Path, engines: fakes.Fakes, run) -> None:
    image = next((tmp_path / "tree").rglob("*run-2*desc-preproc_bold.nii.gz"))
    image.write_bytes(image.read_bytes()[:-40])
    code, said = run(*preprocess(raw, tmp_path / "out", "--engine", "docker"))
    assert code == 65, said
    assert image.name in said
    assert not (tmp_path / "out" / "sub-01").exists()


def test_a_failed_report_keeps_the_data(raw: Path, tmp_path: Path, engines: fakes.Fakes, run, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_CODE", "1")
    monkeypatch.setenv("FAKE_MISSING", "*/sub-01.html")
    monkeypatch.setenv(
        "FAKE_LOG", "fMRIPrep finished successfully!\\nReport generation was not successful for the following participants : 01."
    )
    code, said = run(*preprocess(raw, tmp_path / "out", "--engine", "docker"))
    assert code == 0, said
    assert "report could not be made" in said
    assert "report could not be made" in record(tmp_path / "out")["notes"][1]


def test_one_participant_fails_and_the_other_is_done(tmp_path: Path, engines: fakes.Fakes, run) -> None:
    raw = fakes.write_raw(tmp_path / "two", labels=("01", "02"))
    (raw / "sub-02" / "anat" / "sub-02_T1w.nii.gz").unlink()
    out = tmp_path / "out"
    code, said = run(*preprocess(raw, out, "--engine", "docker"))
    assert code == 3
    assert (record(out)["status"], record(out, "sub-02")["status"]) == ("done", "failed")
    assert "needs a T1w image" in said
    assert len(engines.runs) == 1, "what fMRIPrep cannot do is seen before it starts"


def test_everything_that_is_missing_is_said_at_once_and_nothing_is_written(
    raw: Path, tmp_path: Path, engines: fakes.Fakes, run, monkeypatch
) -> None:
    monkeypatch.delenv("FS_LICENSE")
    monkeypatch.setenv("FAKE_NO_IMAGE", "1")
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "absent"))
    out = tmp_path / "out"
    code, said = run(raw, out, "participant", "--engine", "docker", "--mem-mb", "100")
    assert code == 75
    for line in ("--fs-license-file FILE", "unset TEMPLATEFLOW_HOME", "docker pull nipreps/fmriprep:25.2.7", "--mem-mb 8000"):
        assert line in said
    assert not out.exists()
    assert not engines.runs
    monkeypatch.delenv("TEMPLATEFLOW_HOME")
    monkeypatch.delenv("FAKE_NO_IMAGE")
    assert run(*preprocess(raw, out, "--engine", "docker"))[0] == 126


@pytest.mark.parametrize(
    ("change", "arguments", "code", "says"),
    [
        (lambda raw: shutil.rmtree(raw / "sub-01" / "func"), (), 66, "--anat-only"),
        (lambda raw: shutil.rmtree(raw / "sub-01" / "func"), ("--anat-only",), 0, ""),
        (lambda raw: (raw / "task-rest_bold.json").unlink(), (), 65, "RepetitionTime is missing"),
        (lambda raw: _link_away(raw), (), 65, "cp -rL"),
        (lambda raw: _link_away(raw), ("--engine", "fmriprep"), 0, ""),
        (lambda raw: None, ("--datasets", "absent"), 66, "does not exist"),
        (lambda raw: None, ("--fs-subjects-dir", "absent"), 66, "does not exist"),
        (lambda raw: None, ("--participant-label", "99"), 66, "no data for participant 99"),
        (lambda raw: None, ("--engine", "podman"), 78, "engine"),
        (lambda raw: None, ("--engine", "fmriprep", "--set", "fmriprep_docker=true"), 78, "goes with engine docker"),
        (lambda raw: None, ("--output-spaces", "../x"), 78, "no output space"),
        (lambda raw: None, ("--work-dir", "raw/work", "--engine", "fmriprep"), 73, "inside the input dataset"),
        (lambda raw: None, ("--", "--output-layout", "legacy"), 2, "brainfm's to set"),
        (lambda raw: fakes.write_text(raw / "sub-01" / "junk.txt", "x"), ("--validate",), 16, "NOT_INCLUDED"),
    ],
)  # fmt: skip
def test_bad_inputs_and_settings(change, arguments: tuple[str, ...], code: int, says: str, raw: Path, tmp_path: Path, engines: fakes.Fakes, run) -> None:  # fmt: skip
    change(raw)
    got, said = run(*preprocess(raw, tmp_path / "out", "--engine", "docker", *arguments))
    assert (got, says in said) == (code, True), said


def _link_away(raw: Path) -> None:
    image = raw / "sub-01" / "anat" / "sub-01_T1w.nii.gz"
    image.symlink_to(shutil.move(image, raw.parent / "elsewhere.nii.gz"))


def test_tasks_and_filters_reach_fmriprep(raw: Path, tmp_path: Path, engines: fakes.Fakes, run, monkeypatch) -> None:
    run(*preprocess(raw, tmp_path / "one", "--engine", "docker", "--task-id", "rest"))
    assert "--task-id rest" in " ".join(engines.runs[-1])
    given = tmp_path / "given.json"
    monkeypatch.setenv("FAKE_CODE", "1")  # so that the work folder stays
    fakes.write_image(raw / "sub-01" / "func" / "sub-01_task-face_bold.nii.gz", (4, 4, 4, 5))
    fakes.write_json(raw / "sub-01" / "func" / "sub-01_task-face_bold.json", {"RepetitionTime": 2.0})
    given.write_text(json.dumps({"bold": {"acquisition": None}, "t1w": {"session": None}}))
    run(*preprocess(raw, tmp_path / "two", "--engine", "docker", "--task-id", "rest", "face", "--bids-filter-file", given))
    assert "--bids-filter-file /scratch/bids_filters.json" in " ".join(engines.runs[-1])
    (written,) = (tmp_path / "two" / ".work").rglob("bids_filters.json")
    assert json.loads(written.read_text()) == {
        "bold": {"acquisition": None, "task": ["rest", "face"]},
        "sbref": {"task": ["rest", "face"]},
        "t1w": {"session": None},
    }


def test_the_output_passes_the_validator(raw: Path, tmp_path: Path, engines: fakes.Fakes, run) -> None:
    validator = Path(sys.executable).with_name("bids-validator-deno")
    if not validator.exists():
        pytest.skip("bids-validator-deno is not installed")
    out = tmp_path / "out"
    assert run(*preprocess(raw, out, "--engine", "docker"))[0] == 0
    assert run(raw, out, "group", "--engine", "docker")[0] == 0
    done = subprocess.run([str(validator), str(out), "--ignoreWarnings"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("listing", ["ds005", "ds054"])
def test_the_listings_of_fmriprep_itself_are_complete(
    listing: str, test_data: Path, tmp_path: Path, engines: fakes.Fakes, run, monkeypatch
) -> None:
    """fMRIPrep's continuous integration: the files of these runs are what a finished run has."""
    names = (test_data / "fmriprep_reference" / f"{listing}_outputs.txt").read_text()
    runs = sorted({match[1] for match in re.finditer(r"(sub-\w+?_task-\w+?(?:_run-\d+)?)_desc-confounds_timeseries.tsv", names)})
    label = re.search(r"sub-(\w+?)/", names)[1]
    spaces = sorted({match[1] for match in re.finditer(r"_space-(\w+?)_(?:desc-preproc_)?bold", names)})
    raw = fakes.write_raw(tmp_path / listing, labels=(label,), runs=())
    for stem in runs:
        fakes.write_image(raw / f"sub-{label}" / "func" / f"{stem}_bold.nii.gz", (4, 4, 4, 5))
        fakes.write_json(raw / f"sub-{label}" / "func" / f"{stem}_bold.json", {"RepetitionTime": 2.0})
    tree = fakes.write_from_listing(tmp_path / "listed", test_data / "fmriprep_reference" / f"{listing}_outputs.txt")
    monkeypatch.setenv("FAKE_TREE", str(tree))
    code, said = run(*preprocess(raw, tmp_path / "out", "--engine", "docker", "--output-spaces", *(spaces or ["func"])))
    assert code == 0, said
    assert len(record(tmp_path / "out", f"sub-{label}")["outputs"]) >= len([name for name in names.split() if "." in Path(name).name]) - 3


def start(*arguments: object, hang: Path | None) -> subprocess.Popen[bytes]:
    environment = {**os.environ, **({"FAKE_HANG": str(hang)} if hang else {})}
    words = [sys.executable, "-m", "brainfm_cli", "preprocess", *map(str, arguments)]
    return subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def wait_for(path: Path, seconds: float = 30) -> str:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        if path.exists() and path.read_text().strip():
            return path.read_text().strip()
        time.sleep(0.02)
    raise AssertionError(f"{path.name} never came")


def test_a_kill_while_files_are_published_is_mended(raw: Path, tmp_path: Path, engines: fakes.Fakes, run, monkeypatch) -> None:
    done, link = [], fmriprep_outputs._link

    def stops_halfway(path: Path, place: Path) -> str:
        done.append(place)
        if len(done) == 12:
            raise KeyboardInterrupt
        return link(path, place)

    out = tmp_path / "out"
    monkeypatch.setattr(fmriprep_outputs, "_link", stops_halfway)
    assert run(*preprocess(raw, out, "--engine", "docker"))[0] == 130
    monkeypatch.setattr(fmriprep_outputs, "_link", link)
    (tmp_path / "nothing").mkdir()
    monkeypatch.setenv("FAKE_TREE", str(tmp_path / "nothing"))  # a second run of fMRIPrep finds its work done and writes nothing
    code, said = run(*preprocess(raw, out, "--engine", "docker"))
    assert code == 0, said
    assert {path.relative_to(tmp_path / "tree") for path in (tmp_path / "tree" / "sub-01").rglob("*")} == {
        path.relative_to(out) for path in (out / "sub-01").rglob("*")
    }
    assert not list(out.rglob("*.part"))


def test_work_on_another_disk_is_copied(raw: Path, tmp_path: Path, engines: fakes.Fakes, run, monkeypatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.EXDEV, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuses)
    out = tmp_path / "out"
    assert run(*preprocess(raw, out, "--engine", "docker", "--work-dir", tmp_path / "scratch"))[0] == 0
    assert (out / "sub-01.html").read_text() == "<html></html>"
    assert (out / "sourcedata" / "freesurfer" / "sub-01" / "mri" / "orig.mgz").read_text() == "surfaces"
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_kill_and_resume(number: signal.Signals, raw: Path, tmp_path: Path, engines: fakes.Fakes) -> None:
    out, hang = tmp_path / "out", tmp_path / "hanging"
    arguments = preprocess(raw, out, "--engine", "docker")
    process = start(*arguments, hang=hang)
    pid = int(wait_for(hang))
    process.send_signal(number)
    code = process.wait(30)
    assert code == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    wait_for(Path(f"{hang}.ended"))  # the engine was told to end, not left alone
    limit = time.monotonic() + 5
    while fakes.is_alive(pid) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not fakes.is_alive(pid)
    assert record(out)["status"] == "running"
    assert not (out / "sub-01").exists()
    scratch = [path for call in engines.runs for path in call if path.endswith(":/scratch")]

    again = start(*arguments, hang=None)
    assert again.wait(60) == 0, again.stderr.read()
    assert record(out)["status"] == "done"
    assert [path for call in engines.runs for path in call if path.endswith(":/scratch")] == scratch * 2, "the work folder is the same"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_engine_outlives_parallel_participants(number: signal.Signals, tmp_path: Path, engines: fakes.Fakes, monkeypatch) -> None:
    raw = fakes.write_raw(tmp_path / "two", labels=("01", "02"))
    process = start(
        raw, tmp_path / "out", "participant", "--engine", "docker", "--nprocs", "2", "--mem-mb", "20000", hang=tmp_path / "hanging"
    )
    pids = [int(wait_for(tmp_path / f"hanging.sub-{label}")) for label in ("01", "02")]
    process.send_signal(number)
    assert process.wait(15) == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[number]
    limit = time.monotonic() + 5
    while any(map(fakes.is_alive, pids)) and time.monotonic() < limit:
        time.sleep(0.02)
    assert not any(map(fakes.is_alive, pids))


def test_a_time_limit_ends_a_run_that_hangs(raw: Path, tmp_path: Path, engines: fakes.Fakes, run, monkeypatch) -> None:
    monkeypatch.setenv("FAKE_HANG", str(tmp_path / "hanging"))
    code, said = run(*preprocess(raw, tmp_path / "out", "--engine", "fmriprep", "--set", f"execution.max_hours={1 / 3600}"))
    assert code == 75, said
    assert "time limit" in said
    assert not fakes.is_alive(int((tmp_path / "hanging").read_text()))


def test_parallel_participants_in_one_output(tmp_path: Path, engines: fakes.Fakes, run, monkeypatch) -> None:
    labels = ("01", "02", "03")
    raw = fakes.write_raw(tmp_path / "three", labels=labels)
    for label in labels:
        fakes.write_tree(tmp_path / "tree", label=label)  # each fake writes all; only the own participant's matter
    code, said = run(raw, tmp_path / "out", "participant", "--engine", "docker", "--nprocs", "2", "--mem-mb", "20000")
    assert code == 0, said
    assert all(record(tmp_path / "out", f"sub-{label}")["status"] == "done" for label in labels)
    assert all("10000" in call for call in engines.runs), "memory is divided among those at a time"


def test_group_sums_up_the_quality_of_finished_participants(tmp_path: Path, engines: fakes.Fakes, run, monkeypatch) -> None:
    raw, out = fakes.write_raw(tmp_path / "two", labels=("01", "02", "03")), tmp_path / "out"
    for label, fd in (("01", 0.1), ("02", 0.4)):
        shutil.rmtree(tmp_path / "tree")
        fakes.write_tree(tmp_path / "tree", label=label, fd=fd)
        assert run(*preprocess(raw, out, "--engine", "docker", "--participant-label", label))[0] == 0
    assert run(raw, out, "group", "--engine", "docker")[0] == 0
    table = pd.read_csv(out / "group_qc.tsv", sep="\t", na_values="n/a").set_index(["participant_id", "run"])
    assert len(table) == 4
    first = table.loc[("sub-02", "task-rest_run-1")]
    expected = fakes.confounds(0.4)["framewise_displacement"]
    assert first["mean_fd"] == pytest.approx(expected.mean())
    assert first["moving_fraction"] == pytest.approx((expected > 0.5).sum() / len(expected))
    assert first["still_minutes"] == pytest.approx((len(expected) - (expected > 0.5).sum()) * 2.0 / 60)
    assert (first["non_steady_frames"], first["frames"]) == (1, fakes.FRAMES)
    assert first["brain_ml"] == pytest.approx(64 * 27 / 1000)
    assert first["flagged_for"] == "still_minutes"
    assert table["tsnr"].notna().all()
    page = (out / "group.html").read_text()
    assert "1 participants of the dataset are not done: 03" in page
    assert set(json.loads((out / "group_qc.json").read_text())) == {"participant_id", "run", *table.columns}
