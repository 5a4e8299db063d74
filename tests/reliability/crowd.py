"""Commands as forked processes: they share what is imported, so that many start within the same millisecond, and any can be killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from typing import TYPE_CHECKING

import numpy as np

from tests.stages.command import brainfm

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

Line = tuple[object, ...]
GRID = np.array([[15.0, 0, 0, -82], [0, 15, 0, -82], [0, 0, 15, -82], [0, 0, 0, 1]])
"""Voxels of the coarse grid to millimetres."""


def start(line: Line, at: float = 0.0) -> int:
    """Fork a process that runs a command line at the moment ``at``; gives back its number."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.setsid()
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        time.sleep(max(0.0, at - time.monotonic()))
        code = brainfm(*line)
    finally:
        os._exit(code)


def wait(child: int) -> int:
    """Exit code of a process; negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def together(lines: Sequence[Line]) -> list[int]:
    """Exit codes of command lines that start at the same moment."""
    at = time.monotonic() + 0.2
    return [wait(child) for child in [start(line, at) for line in lines]]


def killed_after(line: Line, seconds: float) -> bool:
    """Whether a command was still running after so many seconds, when it and all that it started are killed."""
    child = start(line)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.killpg(child, signal.SIGKILL)
    return wait(child) == -signal.SIGKILL


def content(path: Path) -> bytes:
    """The bytes of a file; of an ITK transform, whose HDF5 holds the time of writing, where it brings the points of a coarse grid."""
    if path.suffix != ".h5":
        return path.read_bytes()
    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"  # ITK reads it once; processes forked from here on inherit what it read
    from brainfm_cli.programs.embedded.itk import mapped_points

    return mapped_points((12, 12, 12), GRID, [path]).tobytes()


def tree(root: Path) -> dict[str, str]:
    """Hash of every file below ``root``, hidden leftovers included; logs, which hold times, are left out."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(content(path)).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.relative_to(root).parts[0] != "logs"
    }


def records(root: Path) -> dict[str, list[str]]:
    """Hashes of the outputs of every unit, all of which are done."""
    found = [json.loads(path.read_text()) for path in sorted((root / "logs" / "records").glob("*.json"))]
    assert all(record["status"] == "done" for record in found)
    return {record["unit"]: [stamp["sha256"] for stamp in record["outputs"] if not stamp["path"].endswith(".h5")] for record in found}
