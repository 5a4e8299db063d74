"""Nothing is lost and nothing is wrong: many at once, killed at any moment, on full or read-only disks, with clocks that differ.

Figures of the long runs stand in docs/reliability.md.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests import synthetic_bids as synthetic
from tests.bad_input_bench import Bench, Case
from tests.reliability.crowd import Line, killed_after, records, together, tree
from tests.stages.command import brainfm, only

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.long
EIGHT = tuple(f"{number:02d}" for number in range(1, 9))


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> synthetic.Synthetic:
    """Eight people as fMRIPrep leaves them, in a folder that nobody may write to."""
    made = synthetic.write_fmriprep(tmp_path_factory.mktemp("eight") / "fmriprep", participants=EIGHT, frames=60, seed=4)
    for path in (made.root, *made.root.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return made


def parcellate(made: synthetic.Synthetic, out: Path, *options: object, level: str = "participant") -> Line:
    return ("parcellate", made.root, out, level, "--atlases", synthetic.ATLAS, "--datasets", f"tests={made.atlases}", *options)


def test_eight_at_once_are_byte_identical_to_one_after_another(eight: synthetic.Synthetic, tmp_path: Path) -> None:
    for label in EIGHT:
        assert brainfm(*parcellate(eight, tmp_path / "serial", "--participant-label", label)) == 0
    expected = tree(tmp_path / "serial")
    for repeat in range(20):
        out = tmp_path / f"together-{repeat}"
        assert together([parcellate(eight, out, "--participant-label", label) for label in EIGHT]) == [0] * 8
        assert tree(out) == expected
        assert records(out) == records(tmp_path / "serial")
        shutil.rmtree(out)


ATLAS = ("--atlases", synthetic.ATLAS, "--datasets", "tests={atlases}")
CPU = ("--device", "cpu")
HOLDOUT = "where.split=[holdout]"
QUICK = ("floors.kinds=[majority,covariates]", "evaluation.bootstraps=100", "evaluation.permutations=99", "evaluation.inner_folds=2")
DISORDERS = "name\tabbreviation\tdescription\nArvel\tARV\tweaker coupling between the visual network and the default mode network\n"
COMMANDS: dict[str, tuple[str | None, ...]] = {
    "simulate": ("simulate", None, "--participants", "3", "--seed", "1", "--atlases", "Schaefer100", "--set", "frames=40"),
    "parcellate participant": ("parcellate", "{fmriprep}", None, "participant", *ATLAS),
    "parcellate group": ("parcellate", "{fmriprep}", None, "group", *ATLAS),
    "pretrain": ("pretrain", "{series}", None, "group", "--system", "brain-graph", *CPU, "--set", "system.preset=tiny", "epochs=3", "batch_size=8", "checkpoint_every=1"),
    "align": ("align", "{series}", None, "group", "--model", "{model}", "--target", "diagnosis", *CPU, "--set", "disorders={place}/d.tsv"),
    "prompt-tune": ("prompt-tune", "{series}", None, "group", "--model", "{model}", "--target", "diagnosis_binary", *CPU, "--set", "tuning.epochs=2", "tuning.inner_folds=2"),
    "predict participant": ("predict", "{series}", None, "participant", "--model", "{tuned}", *CPU, "--set", HOLDOUT),
    "predict group": ("predict", "{series}", None, "group", "--model", "{tuned}", *CPU, "--set", HOLDOUT, *QUICK),
    "preprocess": ("preprocess", "{head}", None, "participant", "--omp-nthreads", "1"),  # repeats are equal at one thread
    "caption": ("caption", "{voxels}", None, "participant", "--model", "{captioner}", *CPU, "--set", "max_tokens=12"),
}  # fmt: skip
"""A line of every command that writes; its output is left open."""


def command(name: str, bench: Bench, place: Path) -> Line:
    """One of these lines with its inputs, without its output."""
    case = Case(bench, place)
    case.file("d.tsv", DISORDERS)
    return tuple(None if word is None else case.argument(word) for word in COMMANDS[name])


def output(name: str, bench: Bench, out: Path) -> Path:
    """Where a command writes: the group level of parcellate into the output of its participants, others into nothing yet."""
    if name == "parcellate group":
        assert brainfm(*into(command("parcellate participant", bench, out.parent), out)) == 0
    return out


def into(line: Line, out: Path) -> Line:
    return tuple(out if word is None else word for word in line)


KILLS = 7  # of each command: 70 in all


@pytest.mark.parametrize("name", COMMANDS)
def test_fifty_kills_over_every_command(bench: Bench, tmp_path: Path, name: str) -> None:
    """Killed with all it started at a random moment, started again and again; the end equals that of an undisturbed run."""
    generator = np.random.default_rng(50)
    line = command(name, bench, tmp_path)
    calm, seconds, kills = output(name, bench, tmp_path / "calm"), 0.0, 0
    clock = time.monotonic()
    assert together([into(line, calm)]) == [0]
    seconds = time.monotonic() - clock
    for attempt in range(30):
        if kills == KILLS:
            break
        out = output(name, bench, tmp_path / f"killed-{attempt}")
        while kills < KILLS and killed_after(into(line, out), float(generator.uniform(0.02, 1.0) * seconds)):
            kills += 1
            if generator.random() < 0.5:
                break
        assert together([into(line, out)]) == [0]
        assert tree(out) == tree(calm)
        assert records(out) == records(calm)
        shutil.rmtree(out)
    assert kills == KILLS


@pytest.mark.parametrize(
    "name", ["simulate", "parcellate participant", "parcellate group", "prompt-tune", "predict participant", "predict group", "pretrain"]
)
def test_two_people_start_the_same_command_in_the_same_folder(bench: Bench, tmp_path: Path, name: str) -> None:
    line = command(name, bench, tmp_path)
    calm, both = (output(name, bench, tmp_path / folder) for folder in ("calm", "both"))
    assert brainfm(*into(line, calm)) == 0
    codes = together([into(line, both)] * 2)
    assert 0 in codes, codes
    assert brainfm(*into(line, both)) == 0  # whoever was in the other's way is done by the same command
    assert tree(both) == tree(calm)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """An own file system in memory that can be resized; the test is skipped where none may be mounted."""
    place = tmp_path / "disk"
    place.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", place], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no file system may be mounted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", place], check=True)


FULL = "disk, quota or inodes full"


@pytest.mark.parametrize("limit", ["size=200k,nr_inodes=10000", "size=50m,nr_inodes=40"], ids=["bytes", "inodes"])
def test_a_full_disk(eight: synthetic.Synthetic, tmp_path: Path, small_disk: Path, limit: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    remount(small_disk, limit)
    assert brainfm(*parcellate(eight, tmp_path / "calm" / "out")) == 0
    assert brainfm(*parcellate(eight, small_disk / "out")) in {3, 75}  # 3: some were done before it was full
    said = capfd.readouterr()
    assert FULL in " ".join((said.err + caplog.text).split())
    assert "Traceback" not in said.err + said.out + caplog.text
    assert not list(small_disk.rglob("*.part"))
    remount(small_disk, "size=50m,nr_inodes=10000")
    assert brainfm(*parcellate(eight, small_disk / "out")) == 0
    assert tree(small_disk / "out") == tree(tmp_path / "calm" / "out")


@pytest.mark.parametrize("limit", ["size=200k,nr_inodes=10000", "size=50m,nr_inodes=12"], ids=["bytes", "inodes"])
def test_a_full_disk_while_training(bench: Bench, tmp_path: Path, small_disk: Path, limit: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    line = command("pretrain", bench, tmp_path)
    remount(small_disk, limit)
    assert brainfm(*into(line, tmp_path / "calm" / "out")) == 0
    assert brainfm(*into(line, small_disk / "out")) == 75
    said = capfd.readouterr()
    assert FULL in " ".join((said.err + caplog.text).split())
    assert "Traceback" not in said.err + said.out + caplog.text
    remount(small_disk, "size=50m,nr_inodes=10000")
    assert brainfm(*into(line, small_disk / "out")) == 0
    assert tree(small_disk / "out") == tree(tmp_path / "calm" / "out")


def test_an_output_that_may_not_be_written(eight: synthetic.Synthetic, small_disk: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:  # fmt: skip
    remount(small_disk, "size=50m,ro")
    assert brainfm(*parcellate(eight, small_disk / "out")) == 73
    assert "cannot be written" in " ".join(capfd.readouterr().err.split())
    remount(small_disk, "size=50m,rw")
    assert brainfm(*parcellate(eight, small_disk / "out", "--participant-label", "01")) == 0
    before = tree(small_disk / "out")
    remount(small_disk, "size=50m,ro")  # half-way
    assert brainfm(*parcellate(eight, small_disk / "out")) in {3, 73}
    said = capfd.readouterr()
    assert "no permission to write" in " ".join((said.err + caplog.text).split())
    assert "Traceback" not in said.err + said.out + caplog.text
    assert tree(small_disk / "out") == before


@pytest.mark.parametrize("days", [-400, 400])
def test_clocks_that_differ(bench: Bench, tmp_path: Path, days: int, caplog: pytest.LogCaptureFixture) -> None:
    """Times of files may lie in the past or the future of ours: what is current stays so, what was touched is done again to the same bytes."""
    case = shutil.copytree(bench.healthy("fmriprep"), tmp_path / "case")
    line = (
        "parcellate",
        case / "data",
        tmp_path / "out",
        "participant",
        "--atlases",
        synthetic.ATLAS,
        "--datasets",
        f"tests={case / 'atlases'}",
    )

    def move(root: Path) -> None:
        for path in [path for path in root.rglob("*") if path.is_file()]:
            os.utime(path, (path.stat().st_atime, path.stat().st_mtime + 86400 * days))

    move(case)
    assert brainfm(*line) == 0
    before = tree(tmp_path / "out")
    move(tmp_path / "out")
    caplog.clear()
    assert brainfm(*line) == 0
    assert "2 of 2 units are current and skipped" in caplog.text
    move(case)
    caplog.clear()
    assert brainfm(*line) == 0
    assert "current and skipped" not in caplog.text
    assert tree(tmp_path / "out") == before


def test_a_folder_of_models_has_one_model(bench: Bench, tmp_path: Path) -> None:
    """Three people tune the same model at the same moment: one model, whole."""
    line = command("prompt-tune", bench, tmp_path)
    codes = together([into(line, tmp_path / "out")] * 3)
    assert 0 in codes
    assert brainfm(*into(line, tmp_path / "out")) == 0
    assert (only(tmp_path / "out" / "models") / "head.safetensors").is_file()
