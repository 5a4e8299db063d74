"""Who made this, from what, and is it still current. Pure: reading and comparing, never writing.

A unit of work (one participant, one cohort, one model) has one completion record,
``logs/records/<unit>.json``, written by :mod:`brainfm_cli.bids.derivatives` when the unit ends.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from functools import cache, lru_cache
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from brainfm_cli.config import Frozen
from brainfm_cli.documents import read_json

RECORDS_FOLDER = Path("logs") / "records"
Status = Literal["done", "failed", "running"]
State = Literal["missing", "current", "stale", "failed", "interrupted"]

_VERSIONED = ("brainfm-cli", "numpy", "scipy", "nibabel", "nilearn", "pandas", "pybids", "torch", "lightning", "scikit-learn")


class FileStamp(Frozen):
    """Size and time of a file, and its contents' hash where one was taken."""

    path: str
    """Relative to the dataset it belongs to, or absolute where it belongs to none."""
    size: int
    """Bytes."""
    mtime_ns: int | None = None
    """Modification time; none for outputs, whose contents are compared."""
    sha256: str | None = None
    """Hash of the contents."""


class FailureRecord(Frozen):
    """Why a unit failed."""

    failure_class: str
    """bad data, settings, memory, disk, licence, network, engine or bug."""
    exit_code: int
    """Code the unit alone would have ended with."""
    message: str
    """What happened and in which file."""
    fix: str
    """What to do next."""


class UnitRecord(Frozen):
    """The completion record of one unit of work."""

    unit: str
    """Name, also the record's file name: ``sub-01``, ``group``, ``model-<id>``."""
    command: str
    """Command that made it."""
    status: Status
    """done, failed, or running while (or if it was killed in which case, still) at work."""
    configuration_hash: str
    """Hash of the settings, chained to the input's."""
    inputs: tuple[FileStamp, ...] = ()
    """Files read, with size and time."""
    outputs: tuple[FileStamp, ...] = ()
    """Files written, with hash, relative to the output."""
    seed: int | None = None
    """Seed, where one was used."""
    versions: dict[str, str] = {}
    """Package versions; recorded, never compared."""
    started: str = ""
    """UTC time."""
    seconds: float = 0.0
    """Duration."""
    peak_memory_mb: float = 0.0
    """Largest resident size of the process, megabytes."""
    failure: FailureRecord | None = None
    """Set when status is failed."""
    notes: tuple[str, ...] = ()
    """Warnings a reader of the results should see."""


def record_path(output_dir: Path, unit: str) -> Path:
    """Where the record of ``unit`` lies."""
    return output_dir / RECORDS_FOLDER / f"{unit}.json"


def read_record(path: Path) -> UnitRecord | None:
    """The record in ``path``; none where absent or unreadable, so that the unit is simply redone."""
    try:
        return UnitRecord.model_validate_json(path.read_bytes())
    except (OSError, ValidationError, ValueError):
        return None


def read_records(output_dir: Path) -> list[UnitRecord]:
    """All readable records of an output folder, sorted by unit."""
    folder = output_dir / RECORDS_FOLDER
    paths = sorted(folder.glob("*.json")) if folder.is_dir() else []
    return [record for path in paths if (record := read_record(path)) is not None]


def stamp_input(path: Path, *, root: Path | None = None, contents: bool = False) -> FileStamp:
    """The stamp of an input file: size and time, with its hash where ``contents``."""
    info = path.stat()
    return FileStamp(
        path=_relative(path, root),
        size=info.st_size,
        mtime_ns=info.st_mtime_ns,
        sha256=_known_sha256(path, info.st_size, info.st_mtime_ns) if contents else None,
    )


def stamp_output(path: Path, *, root: Path) -> FileStamp:
    """The stamp of an output file: size and hash."""
    return FileStamp(path=_relative(path, root), size=path.stat().st_size, sha256=file_sha256(path))


def unit_state(
    record: UnitRecord | None,
    *,
    configuration_hash: str,
    inputs: tuple[FileStamp, ...],
    output_dir: Path,
    verify: bool = False,
) -> State:
    """Whether a unit's record still holds: same settings, same inputs, outputs present with their size.

    With ``verify`` the outputs' contents are hashed again.
    """
    if record is None:
        return "missing"
    if record.status == "failed":
        return "failed"
    if record.status == "running":
        return "interrupted"
    if record.configuration_hash != configuration_hash or _keys(record.inputs) != _keys(inputs):
        return "stale"
    return "current" if outputs_hold(record, output_dir, verify=verify) else "stale"


def outputs_hold(record: UnitRecord, output_dir: Path, *, verify: bool = False) -> bool:
    """Whether every recorded output exists with its size (and, with ``verify``, its contents)."""
    for stamp in record.outputs:
        try:
            if os.stat(f"{output_dir}/{stamp.path}").st_size != stamp.size:  # noqa: PTH116  (Path takes as long as the disk, for 80 files a person)
                return False
        except OSError:
            return False
        if verify and file_sha256(output_dir / stamp.path) != stamp.sha256:
            return False
    return True


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's contents."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@lru_cache(maxsize=4096)
def _known_sha256(path: Path, size: int, mtime_ns: int) -> str:  # noqa: ARG001  (what makes the hash known)
    """Hash of an input that many units of one process read, e.g. a cohort's stores."""
    return file_sha256(path)


def input_configuration_hash(dataset: Path) -> str | None:
    """ConfigurationHash of the first GeneratedBy entry of a derivative; none for raw datasets."""
    try:
        description = read_json(dataset / "dataset_description.json")
        value = description["GeneratedBy"][0]["ConfigurationHash"]
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None
    return value if isinstance(value, str) else None


@cache
def package_versions() -> dict[str, str]:
    """Installed versions of what can change a result, and of Python."""
    found = {"python": platform.python_version()}
    for name in _VERSIONED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


@cache
def brainfm_version() -> str:
    """Version of this package; ``0+unknown`` when it runs from a source tree that is not installed."""
    try:
        return importlib.metadata.version("brainfm-cli")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"


def _relative(path: Path, root: Path | None) -> str:
    if root is not None and path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return path.as_posix()


def _keys(stamps: tuple[FileStamp, ...]) -> set[tuple[str, int, int | None]]:
    return {(stamp.path, stamp.size, stamp.mtime_ns) for stamp in stamps}
