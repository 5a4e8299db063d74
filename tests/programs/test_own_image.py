"""--container: the same command line inside an image; what is bound, how, and what is refused, with fake engines."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from brainfm_cli.cli import take_container


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    """A folder of fake engines, alone on PATH, and the folder that they are called in."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, body in {"docker": '[ "$1" = image ] && { [ "$5" = there ]; exit $?; }', "apptainer": ""}.items():
        path = folder / name
        path.write_text(f'#!{shutil.which("bash")}\n{body}\nprintf \'%s\\n\' "$0" "$@"\nexit 3\n')
        path.chmod(0o755)
    (tmp_path / "run" / "in" / "sub-01").mkdir(parents=True)
    (tmp_path / "run" / "more").mkdir()
    (tmp_path / "run" / "image.sif").write_text("x")
    (tmp_path / "run" / "s.yaml").write_text("{}")
    return folder


def call(fake: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "brainfm_cli", *arguments],
        cwd=fake.parent / "run",
        env={**os.environ, "PATH": str(fake), "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


LINE = ("parcellate", "in", "out", "participant", "--atlases", "A", "B", "-d", "m=more", "--config", "s.yaml", "-w", "scratch")


def test_docker_runs_the_same_line(fake: Path) -> None:
    done = call(fake, *LINE, "--container", "docker", "--image", "there")
    assert done.returncode == 3  # the container's own
    words = done.stdout.splitlines()
    run = fake.parent / "run"
    inside = words[words.index("there") + 1 :]
    assert inside == ["parcellate", "in", "out", "participant", "--atlases", "A", "--atlases", "B", "-d", "m=more", "--config", "s.yaml", "-w", "scratch"]  # fmt: skip
    binds = {words[place + 1] for place, word in enumerate(words) if word == "--volume"}
    assert binds == {f"{run / name}:{run / name}{mode}" for name, mode in {"in": ":ro", "out": "", "more": ":ro", "s.yaml": ":ro", "scratch": ""}.items()}  # fmt: skip
    assert words[words.index("--workdir") + 1] == str(run)
    assert words[words.index("--network") + 1] == "none"
    assert {"--rm", "--read-only"} <= set(words)
    assert not {"--gpus", "--interactive", "--tty"} & set(words)
    assert (run / "out").is_dir()
    assert (run / "scratch").is_dir()


@pytest.mark.parametrize("kind", ["apptainer", "singularity"])
def test_apptainer_runs_the_same_line(fake: Path, kind: str) -> None:
    done = call(
        fake,
        "pretrain",
        "in",
        "out",
        "group",
        "--system",
        "brain-graph",
        "--device",
        "cuda",
        f"--container={kind}",
        BRAINFM_IMAGE="image.sif",
    )
    assert done.returncode == 3
    words = done.stdout.splitlines()
    assert words[0].endswith("apptainer")
    assert {"run", "--cleanenv", "--no-home", "--nv"} <= set(words)
    assert words[words.index(str(fake.parent / "run" / "image.sif")) + 1] == "pretrain"
    assert not any(word.startswith("--container") for word in words)


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        ((*LINE, "--container", "podman", "--image", "x"), 2, "podman is unknown"),
        ((*LINE, "--container", "docker"), 2, "needs an image"),
        ((*LINE, "--container", "docker", "--image", "absent"), 69, "is not on this machine"),
        ((*LINE, "--container", "apptainer", "--image", "absent.sif"), 69, "does not exist"),
        (("parcellate", "in", "o:ut", "participant", "--container", "docker", "--image", "there"), 66, "cannot be bound"),
        (("parcellate", "in", "out", "participant", "--no-such", "--container", "docker", "--image", "there"), 2, "no-such"),
        (("demo", "out", "--container", "docker", "--image", "there"), 2, "cannot be run elsewhere"),
        (("--container", "docker", "--image", "there"), 2, "a command is needed"),
    ],
)
def test_what_cannot_be_is_said(fake: Path, arguments: tuple[str, ...], code: int, told: str) -> None:
    done = call(fake, *arguments)
    assert (done.returncode, done.stdout) == (code, "")
    assert told in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (fake.parent / "run" / "out").exists()


def test_without_an_engine(fake: Path) -> None:
    (fake / "docker").unlink()
    done = call(fake, *LINE, "--container", "docker", "--image", "there")
    assert (done.returncode, "not on PATH" in done.stderr) == (127, True)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("preprocess a b participant", (None, None, "preprocess a b participant")),
        ("x --image i --y z", (None, None, "x --image i --y z")),  # fMRIPrep's own image
        ("x --container docker --y z --image i", ("docker", "i", "x --y z")),
        ("x --image=i --container=docker", ("docker", "i", "x")),
        ("x --container docker -- --image i", ("docker", None, "x -- --image i")),
        ("x --container", ("", None, "x")),
    ],
)
def test_the_flags_are_taken_out(line: str, expected: tuple[str | None, str | None, str]) -> None:
    kind, image, rest = take_container(line.split())
    assert (kind, image, " ".join(rest)) == expected
