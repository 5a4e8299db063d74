"""SIGKILL at random moments, the same command again: the final tree equals an undisturbed run's."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

# Records and logs hold times; the CSV log of training and event files may repeat what was done twice.
_UNCOMPARED = {"logs"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "brainfm_cli", *map(str, arguments)]


def tree(root: Path) -> dict[str, str]:
    """Path to hash of every file below ``root``, hidden leftovers included, logs left out."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] not in _UNCOMPARED
    }


def outputs_of_records(root: Path) -> dict[str, list[str]]:
    records = [json.loads(path.read_text()) for path in sorted((root / "logs" / "records").glob("*.json"))]
    assert all(record["status"] == "done" for record in records)
    return {record["unit"]: [stamp["sha256"] for stamp in record["outputs"]] for record in records}


def kill_until_done(arguments: list[str], *, kills: int, longest: float, generator: np.random.Generator) -> int:
    """Start the command again and again, killing its process group at random moments; gives back how often it was killed."""
    killed = 0
    while killed < kills:
        process = subprocess.Popen(arguments, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            process.wait(timeout=float(generator.uniform(0.3, longest)))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
        else:
            break  # finished before the kill: nothing left to interrupt
    subprocess.run(arguments, check=True, capture_output=True)
    return killed


def timed(arguments: list[str]) -> float:
    clock = time.monotonic()
    subprocess.run(arguments, check=True, capture_output=True)
    return time.monotonic() - clock


@pytest.fixture(scope="module")
def bold(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bold")
    subprocess.run(command("simulate", out, "--kind", "rest", "--level", "bold", "--participants", 6, "--seed", 3), check=True)
    return out


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("series")
    subprocess.run(
        command("simulate", out, "--kind", "rest", "--level", "series", "--participants", 60, "--seed", 3, "--atlases", "Schaefer100"),
        check=True,
    )
    return out


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.long)])
def test_parcellate_survives_sigkill(tmp_path: Path, bold: Path, kills: int) -> None:
    def arguments(name: str) -> list[str]:
        return command("parcellate", bold, tmp_path / name, "participant", "--atlases", "Schaefer100", "AAL116")

    seconds = timed(arguments("calm"))
    generator = np.random.default_rng(kills)
    killed = 0
    while killed < kills:  # a run that gets through before its kills are spent starts afresh
        target = f"killed-{killed}"
        killed += kill_until_done(arguments(target), kills=kills - killed, longest=seconds, generator=generator)
        assert tree(tmp_path / target) == tree(tmp_path / "calm")
        assert outputs_of_records(tmp_path / target) == outputs_of_records(tmp_path / "calm")
    assert killed == kills


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.long)])
def test_pretrain_survives_sigkill(tmp_path: Path, packed: Path, kills: int) -> None:
    def arguments(name: str) -> list[str]:
        settings = ["--set", "system.preset=tiny", "epochs=3", "batch_size=8", "checkpoint_every=2"]
        return command("pretrain", packed, tmp_path / name, "group", "--system", "brain-graph", "--seed", 5, "--device", "cpu", *settings)

    seconds = timed(arguments("calm"))
    generator = np.random.default_rng(kills)
    killed = 0
    while killed < kills:
        target = f"killed-{killed}"
        killed += kill_until_done(arguments(target), kills=kills - killed, longest=seconds, generator=generator)
        assert tree(tmp_path / target) == tree(tmp_path / "calm")
    assert killed == kills
