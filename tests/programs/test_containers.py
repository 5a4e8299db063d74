"""The commands of the engines, word for word, and what is asked of an engine before it starts."""

from __future__ import annotations

import os
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from brainfm_cli.errors import BrainFMError, EngineUnavailableError, InputNotFoundError, MissingProgramError, SettingsError, UsageError
from brainfm_cli.programs.containers import build_command, check_binds, check_engine, container_name, scratch_folders
from brainfm_cli.programs.fmriprep import Task, check_options, template_of
from tests.programs import fakes

IMAGE = "nipreps/fmriprep:25.2.7"


@pytest.fixture
def task(tmp_path: Path) -> Task:
    return Task(
        label="01",
        data=tmp_path / "raw",
        output=tmp_path / "work" / "out",
        scratch=tmp_path / "work" / "scratch",
        licence=tmp_path / "license.txt",
        output_spaces=("MNI152NLin6Asym:res-2", "T1w"),
        level="full",
        threads=12,
        memory_mb=16000,
    )


def whole(task: Task, tmp_path: Path) -> Task:
    """A task with every option."""
    return replace(
        task,
        anat_only=True,
        fs_no_reconall=True,
        ignore=("fieldmaps", "sbref"),
        seed=0,
        sessions=("a", "b"),
        task="rest",
        filters=task.scratch / "bids_filters.json",
        datasets=(("smriprep", tmp_path / "deriv"),),
        fs_subjects_dir=tmp_path / "subjects",
        templateflow=tmp_path / "templateflow",
        options=("--use-syn-sdc", "warn"),
        verbose=2,
    )


COMMON = (
    "participant --participant-label 01 --skip-bids-validation --notrack --work-dir {scratch} --fs-license-file {licence} "
    "--nprocs 12 --omp-nthreads 8 --mem_mb 16000 --output-layout bids --level full"
)


def test_native(task: Task) -> None:
    common = COMMON.format(scratch=task.scratch, licence=task.licence)
    expected = f"fmriprep {task.data} {task.output} {common} --output-spaces MNI152NLin6Asym:res-2 T1w"
    command = build_command("fmriprep", task, image=None)
    assert command.argv == tuple(expected.split())
    assert command.environment == {}
    assert command.line == expected


def test_docker(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 1234)
    monkeypatch.setattr(os, "getgid", lambda: 99)
    common = COMMON.format(scratch="/scratch", licence="/opt/freesurfer/license.txt")
    expected = (
        f"docker run --rm --init --name {container_name(task)} --user 1234:99 --pull never --volume {task.data}:/data:ro "
        f"--volume {task.output}:/out --volume {task.scratch}:/scratch --volume {task.licence}:/opt/freesurfer/license.txt:ro "
        f"--volume {tmp_path}/subjects:/opt/subjects --volume {tmp_path}/deriv:/deriv/smriprep:ro "
        f"--volume {tmp_path}/templateflow:/templateflow:ro --env TEMPLATEFLOW_HOME=/templateflow --env TEMPLATEFLOW_AUTOUPDATE=off "
        f"{IMAGE} /data /out {common} --fs-subjects-dir /opt/subjects --session-label a b --task-id rest "
        "--bids-filter-file /scratch/bids_filters.json --anat-only --fs-no-reconall --ignore fieldmaps sbref --random-seed 0 "
        "--derivatives smriprep=/deriv/smriprep -vv --output-spaces MNI152NLin6Asym:res-2 T1w --use-syn-sdc warn"
    )
    assert build_command("docker", whole(task, tmp_path), image=IMAGE).line == expected
    assert "--user" not in build_command("docker", task, image=IMAGE, rootless=True).argv, "root inside is the user outside"
    monkeypatch.setattr(os, "getuid", lambda: 0)
    assert "--user" not in build_command("docker", task, image=IMAGE).argv


@pytest.mark.parametrize("installed", ["apptainer", "singularity"])
def test_apptainer_by_either_name(installed: str, task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.install(tmp_path, monkeypatch, [installed], tmp_path)
    monkeypatch.chdir(tmp_path)
    common = COMMON.format(scratch="/scratch", licence="/opt/freesurfer/license.txt")
    expected = (
        f"{installed} run --cleanenv --home {task.scratch}/home:/home/brainfm --bind {task.data}:/data:ro --bind {task.output}:/out "
        f"--bind {task.scratch}:/scratch --bind {task.licence}:/opt/freesurfer/license.txt:ro "
        "--env TEMPLATEFLOW_HOME=/home/fmriprep/.cache/templateflow --env TEMPLATEFLOW_AUTOUPDATE=off "
        f"{tmp_path}/fmriprep.sif /data /out {common} --output-spaces MNI152NLin6Asym:res-2 T1w"
    )
    assert build_command("apptainer", task, image="fmriprep.sif").line == expected
    assert task.scratch / "home" in scratch_folders("apptainer", task)
    bound = build_command("apptainer", whole(task, tmp_path), image="fmriprep.sif").line
    assert f"--bind {tmp_path}/templateflow:/templateflow:ro --env TEMPLATEFLOW_HOME=/templateflow" in bound


def test_fmriprep_docker_is_never_asked_a_question(task: Task, tmp_path: Path) -> None:
    words = build_command("fmriprep-docker", replace(whole(task, tmp_path), templateflow=None), image=IMAGE).argv
    assert words[:4] == ("fmriprep-docker", str(task.data), str(task.output), "participant")
    assert "--no-tty" in words
    assert words[words.index("--mem_mb") + 1] == "16000", "in this spelling, or small memory is asked about"
    assert words[words.index("--image") + 1] == IMAGE
    assert f"smriprep={tmp_path}/deriv" in words, "it takes NAME=DIR only"
    with pytest.raises(SettingsError, match="TemplateFlow"):
        build_command("fmriprep-docker", whole(task, tmp_path), image=IMAGE)


def test_the_real_fmriprep_docker_does_what_our_docker_command_does(task: Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("fmriprep_docker", reason="fmriprep-docker is not installed")
    installed = fakes.install(tmp_path, monkeypatch, ["docker"], fakes.write_tree(tmp_path / "tree"))
    monkeypatch.setenv("PYTHONPATH", str(Path(package.__file__).parents[1]))
    full = replace(whole(task, tmp_path), templateflow=None)
    for folder in (full.data, full.output, full.scratch, tmp_path / "deriv", tmp_path / "subjects"):
        folder.mkdir(parents=True, exist_ok=True)
    full.filters.write_text("{}")
    script = "import sys; from fmriprep_docker.__main__ import main; sys.exit(main())"
    wrapper = build_command("fmriprep-docker", full, image=IMAGE).argv[1:]
    subprocess.run([os.sys.executable, "-c", script, *wrapper], stdin=subprocess.DEVNULL, check=True, capture_output=True)
    theirs, ours = installed.runs[-1], list(build_command("docker", full, image=IMAGE).argv)
    # Ours has a name, an init and no download; both must bind the same and give fMRIPrep the same options.
    binds = [{words[at + 1] for at, word in enumerate(words) if word in {"-v", "--volume"}} for words in (theirs, ours)]
    assert binds[0] - binds[1] == {f"{full.filters}:/tmp/bids_filter.json"}
    assert binds[1] - binds[0] == set()
    spelled = {"-w": "--work-dir", "/tmp/bids_filter.json": "/scratch/bids_filters.json", "/deriv/smriprep": "smriprep=/deriv/smriprep"}
    options = [spelled.get(word, word) for word in theirs[theirs.index(IMAGE) + 1 :]]
    expected = [word for word in ours[ours.index(IMAGE) + 1 :] if word not in {"--fs-license-file", "/opt/freesurfer/license.txt"}]
    assert sorted(options) == sorted(expected)


def test_a_line_can_be_pasted_into_a_shell(task: Task, tmp_path: Path) -> None:
    odd = replace(task, data=Path("/data set/it's"), templateflow=tmp_path / "tf")
    command = build_command("fmriprep", odd, image=None)
    assert shlex.split(command.line)[2:] == list(command.argv)
    assert command.environment == {"TEMPLATEFLOW_HOME": str(tmp_path / "tf"), "TEMPLATEFLOW_AUTOUPDATE": "off"}


def test_one_participant_of_one_output_has_one_container(task: Task, tmp_path: Path) -> None:
    assert container_name(task) == container_name(replace(task, threads=1))
    assert container_name(task) != container_name(replace(task, output=tmp_path / "other"))
    assert "+" not in container_name(replace(task, label="a+b")), "Docker allows no plus"


@pytest.mark.parametrize("name", ["data:set", "data,set"])
def test_paths_that_a_bind_would_split_are_refused(name: str, task: Task, tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="cannot be bound"):
        check_binds(replace(task, data=tmp_path / name))


@pytest.mark.parametrize(
    ("engine", "installed", "environment", "image", "error", "says"),
    [
        ("fmriprep", [], {}, None, MissingProgramError, "load its module"),
        ("docker", [], {}, IMAGE, MissingProgramError, "'docker' is not on PATH"),
        ("apptainer", [], {}, "fmriprep.sif", MissingProgramError, "'apptainer' is not on PATH"),
        ("fmriprep-docker", ["docker"], {}, IMAGE, MissingProgramError, "pip install fmriprep-docker"),
        ("fmriprep-docker", ["fmriprep-docker"], {}, IMAGE, MissingProgramError, "'docker' is not on PATH"),
        ("docker", ["docker"], {"FAKE_DAEMON": "1"}, IMAGE, EngineUnavailableError, "daemon does not answer"),
        ("docker", ["docker"], {"FAKE_NO_IMAGE": "1"}, IMAGE, EngineUnavailableError, f"docker pull {IMAGE}"),
        ("docker", ["docker"], {"FAKE_VERSION": "24.1.1"}, "lab/fmriprep:x", EngineUnavailableError, "fmriprep_version=24.1.1"),
        ("fmriprep", ["fmriprep"], {"FAKE_VERSION": "23.0.0"}, None, EngineUnavailableError, "is version 23.0.0, the settings say 25.2.7"),
        ("apptainer", ["apptainer"], {}, "absent.sif", EngineUnavailableError, f"apptainer build fmriprep-25.2.7.sif docker://{IMAGE}"),
        ("apptainer", ["singularity"], {}, "absent.sif", EngineUnavailableError, "singularity build"),
        ("apptainer", ["apptainer"], {}, "empty.sif", EngineUnavailableError, "download broke off"),
        ("apptainer", ["apptainer"], {}, f"docker://{IMAGE}", EngineUnavailableError, "fetched for every participant"),
        ("apptainer", ["apptainer"], {"FAKE_VERSION": "25.2.6"}, "fmriprep.sif", EngineUnavailableError, "one dataset, one version"),
    ],
)  # fmt: skip
def test_an_engine_that_cannot_be_used(engine, installed, environment, image, error: type[BrainFMError], says: str, tmp_path: Path, monkeypatch) -> None:  # fmt: skip
    fakes.install(tmp_path, monkeypatch, installed, tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.sif").touch()
    (tmp_path / "fmriprep.sif").write_text("image")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(error) as caught:
        check_engine(engine, image=image, version="25.2.7", pinned=image == IMAGE)
    assert says in str(caught.value)


def test_engines_that_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = fakes.install(tmp_path, monkeypatch, ["docker"], tmp_path)
    assert not check_engine("docker", image=IMAGE, version="25.2.7", pinned=True)
    assert not [call for call in installed.calls if "run" in call], "a pinned tag says its version"
    monkeypatch.setenv("FAKE_ROOTLESS", "1")
    assert check_engine("docker", image=IMAGE, version="25.2.7", pinned=True)


@pytest.mark.parametrize(
    "options", [["--participant_label", "02"], ["-w", "x"], ["--output-spaces=T1w"], ["--mem-mb", "1"], ["warn"], ["-d", "x"]]
)
def test_options_that_are_ours_are_refused(options: list[str]) -> None:
    with pytest.raises(UsageError):
        check_options(options)


def test_other_options_pass() -> None:
    check_options(["--use-syn-sdc", "warn", "--fd-spike-threshold", "0.3", "--dummy-scans", "2"])
    check_options([])


def test_templates_of_spaces() -> None:
    names = [template_of(space) for space in ("MNI152NLin6Asym:res-2", "T1w", "fsaverage:den-10k", "fsnative", "MNIPediatricAsym:cohort-2")]
    assert names == ["MNI152NLin6Asym", None, None, None, "MNIPediatricAsym"]
