"""Dockerfile, Apptainer definition and batch scripts of examples: as far as they can be checked without building or a cluster."""

from __future__ import annotations

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.stages.command import brainfm
from tests.synthetic_bids import ATLAS, write_fmriprep

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "containers" / "Dockerfile").read_text(encoding="utf-8")
DEFINITION = (ROOT / "containers" / "brainfm.def").read_text(encoding="utf-8")
SECTIONS = {"arguments", "files", "post", "environment", "runscript", "labels", "help"}


def stages() -> dict[str, tuple[str, str]]:
    """Stage of the Dockerfile → what it starts from, and its lines."""
    text = DOCKERFILE.replace("\\\n", " ")
    parts = re.split(r"(?m)^FROM (\S+) AS (\S+)$", text)
    return {parts[i + 1]: (parts[i], parts[i + 2]) for i in range(1, len(parts), 3)}


def sections(stage: str) -> dict[str, str]:
    """Sections of one stage of the definition."""
    (text,) = [part for part in DEFINITION.split("Bootstrap: docker\n") if f"Stage: {stage}\n" in part]
    parts = re.split(r"(?m)^%([a-z]+)(?: from \S+)?$", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def environment(text: str) -> dict[str, str]:
    words = [word for line in re.findall(r"(?m)^(?:ENV|\s*export) (.*)$", text) for word in shlex.split(line)]
    return dict(word.split("=", 1) for word in words)


def commands(text: str) -> list[str]:
    """What is done with pip."""
    return re.findall(r"/opt/brainfm/bin/pip install [^&\n]*[^&\s]", text)


def test_every_stage_starts_from_the_base_or_from_another() -> None:
    found = stages()
    assert list(found) == ["sources", "build-cpu", "build-cuda", "runtime", "cuda", "cpu"]  # the last is what is built without --target
    assert {start for start, _ in found.values()} <= {"${BASE}", *found}
    for name in ("cuda", "cpu"):
        assert f"COPY --from=build-{name} /opt/brainfm /opt/brainfm" in found[name][1]
        assert "USER 1000" in found[name][1]
    assert "find-links" not in found["build-cuda"][1]
    assert "NVIDIA_VISIBLE_DEVICES" in found["cuda"][1]


def test_files_of_the_images_exist() -> None:
    copied = re.findall(r"(?m)^COPY (?!--from)(.*) \S+$", DOCKERFILE)
    listed = [line.split()[0] for line in sections("build")["files"].strip().splitlines()]
    for name in [*(word for line in copied for word in line.split()), *listed]:
        assert (ROOT / name).exists(), name
    assert {name.rstrip("/").removeprefix("./") for line in copied for name in line.split()} == set(listed)


def test_the_definition_does_what_the_dockerfile_does(tmp_path: Path) -> None:
    assert set(sections("build")) | set(sections("final")) == SECTIONS
    assert commands(sections("build")["post"]) == commands(stages()["build-cpu"][1])
    inside, outside = environment(sections("final")["environment"]), environment(stages()["runtime"][1])
    assert inside.pop("BRAINFM_CONTAINER_TYPE") == "apptainer"
    assert {name: value for name, value in outside.items() if name not in {"HOME", "BRAINFM_CONTAINER_TYPE"}} == inside
    assert DEFINITION.count("{{ base }}") == 2
    for stage in ("build", "final"):
        script = tmp_path / stage
        script.write_text(sections(stage)["post"])
        subprocess.run(["sh", "-n", script], check=True)
    subprocess.run(["sh", "-n", "-c", sections("final")["runscript"]], check=True)


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.sbatch")), ids=lambda path: path.name)
def test_batch_scripts_are_bash_and_call_what_exists(path: Path) -> None:
    subprocess.run(["bash", "-n", path], check=True)
    text = path.read_text(encoding="utf-8").replace("\\\n", " ")
    lines = re.findall(r"(?m)(?:^|-m )brainfm(?:_cli)? (\S+)", text)
    assert lines
    for command in lines:
        assert brainfm(command, "--help") == 0


def test_the_array_of_the_examples_does_one_participant(tmp_path: Path) -> None:
    """The script itself, with a brainfm that records what it is given and an index as SLURM sets it."""
    made = write_fmriprep(tmp_path / "fmriprep", participants=("01", "02"), frames=60)
    (tmp_path / "participants.txt").write_text("sub-01\nsub-02\n")
    program = tmp_path / "brainfm"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" > called.txt\n')
    program.chmod(0o755)
    script = ROOT / "examples" / "cluster" / "array.sbatch"
    subprocess.run(
        ["bash", script, made.root, "out"], cwd=tmp_path, env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_ARRAY_TASK_ID": "2"}, check=True
    )
    called = (tmp_path / "called.txt").read_text().splitlines()
    assert called[:4] == ["parcellate", str(made.root), "out", "participant"]
    assert called[called.index("--participant-label") + 1] == "sub-02"
    called = [ATLAS if word == "Schaefer100" else word for word in called if word != "AAL116"]
    assert brainfm(*called, "--datasets", f"tests={made.atlases}", "--dry-run") == 0
