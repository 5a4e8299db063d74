"""Licence, templates, space, inodes and memory: what is missing is said with the line that mends it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from brainfm_cli.errors import DiskFullError, InputNotFoundError, LicenceError, OutOfMemoryError
from brainfm_cli.programs import preflight
from brainfm_cli.programs.preflight import check_space, find_licence, find_templateflow, machine_memory_mb, memory_per_unit_mb
from tests.programs.fakes import LICENCE


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FS_LICENSE", "FREESURFER_HOME", "TEMPLATEFLOW_HOME", "SLURM_MEM_PER_NODE"):
        monkeypatch.delenv(name, raising=False)


def test_the_licence_given_wins_over_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    places = [tmp_path / "given.txt", tmp_path / "environment.txt", tmp_path / "freesurfer" / "license.txt"]
    for place in places:
        place.parent.mkdir(exist_ok=True)
        place.write_text(LICENCE)
    monkeypatch.setenv("FREESURFER_HOME", str(places[2].parent))
    assert find_licence(None) == places[2]
    monkeypatch.setenv("FS_LICENSE", str(places[1]))
    assert find_licence(None) == places[1]
    assert find_licence(places[0]) == places[0]


@pytest.mark.parametrize(
    ("text", "says"), [(None, "not there"), ("", "no FreeSurfer licence"), ("<html>\nlog in\n", "no FreeSurfer licence")]
)
def test_a_licence_that_is_none(text: str | None, says: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "license.txt").write_text(text)
    with pytest.raises(LicenceError, match=says) as caught:
        find_licence(tmp_path / "license.txt")
    assert "--fs-license-file" in caught.value.fix


def test_no_licence_anywhere() -> None:
    with pytest.raises(LicenceError) as caught:
        find_licence(None)
    assert caught.value.exit_code == 126
    assert "registration.html" in caught.value.fix


def test_templateflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_templateflow(["MNI152NLin6Asym"]) is None
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path / "absent"))
    with pytest.raises(InputNotFoundError, match="no folder"):
        find_templateflow([])
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path))
    for name in ("OASIS30ANTs", "MNI152NLin2009cAsym", "MNI152NLin6Asym"):
        folder = tmp_path / f"tpl-{name}"
        folder.mkdir()
        (folder / f"tpl-{name}_T1w.nii.gz").write_bytes(b"" if name == "MNI152NLin6Asym" else b"image")
    assert find_templateflow(["T1w", "fsaverage5"]) == tmp_path
    with pytest.raises(InputNotFoundError, match="MNI152NLin6Asym is not here") as caught:
        find_templateflow(["MNI152NLin6Asym:res-2"])
    assert "api.get('MNI152NLin6Asym')" in caught.value.fix


def test_space_and_inodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "not" / "yet"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5_000_000_000))
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_files=0, f_favail=0))
    check_space([place], input_bytes=60_000_000)  # a file system that has no fixed inodes
    with pytest.raises(DiskFullError, match="5000 MB are free and about 6000 MB needed"):
        check_space([place], input_bytes=100_000_000)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_files=100_000, f_favail=10))
    with pytest.raises(DiskFullError, match="10 inodes") as caught:
        check_space([place], input_bytes=0)
    assert caught.value.exit_code == 75
    assert not place.exists()


def test_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory_per_unit_mb(20_000, units=2) == 10_000
    with pytest.raises(OutOfMemoryError, match="leave 6666 MB each") as caught:
        memory_per_unit_mb(20_000, units=3)
    assert "--mem-mb 24000" in caught.value.fix
    assert "--nprocs" in caught.value.fix
    monkeypatch.setattr(preflight, "machine_memory_mb", lambda: 4_000)
    with pytest.raises(OutOfMemoryError):
        memory_per_unit_mb(None, units=1)


def test_a_job_has_less_than_its_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = machine_memory_mb()
    monkeypatch.setenv("SLURM_MEM_PER_NODE", str(whole // 2))
    assert machine_memory_mb() == whole // 2
