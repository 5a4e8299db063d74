"""Write derivatives: every file appears whole or not at all, and every output folder says what made it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from brainfm_cli.bids.names import BIDSIGNORE
from brainfm_cli.config import Settings, digest_of
from brainfm_cli.documents import read_json
from brainfm_cli.errors import ConfigurationConflictError, InputNotFoundError, OutputError
from brainfm_cli.provenance import UnitRecord, brainfm_version, input_configuration_hash, record_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pandas as pd

_OWNER = re.compile(r"\.(?P<host>[0-9a-f]{8})-(?P<pid>[0-9]+)-[0-9a-f]{8}\.part$")
_FOREIGN_LEFTOVER_S = 86_400
BIDS_VERSION = "1.10.0"
CODE_URL = "https://github.com/brainfm/brainfm-cli"


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path in the same folder that becomes ``path`` when the block ends without error.

    The file is flushed to disk before the rename, so a reader sees the old file, the new file, or none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_path(path)
    try:
        yield temporary
        with temporary.open("rb") as stream:
            os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_path(path: Path) -> Path:
    """A name beside ``path`` that no other process uses and that says which process owns it.

    A leading dot and a foreign suffix keep half-written files out of every glob and of the validator.
    """
    return path.parent / f".{path.name}.{_host()}-{os.getpid()}-{secrets.token_hex(4)}.part"


def sweep(folder: Path, *, recursive: bool = False) -> None:
    """Remove what killed processes left half-written in ``folder``; files of living or foreign owners stay for a day."""
    for path in folder.rglob(".*.part") if recursive else folder.glob(".*.part"):
        if _is_abandoned(path):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_abandoned(path: Path) -> bool:
    match = _OWNER.search(path.name)
    if match is None:
        return False
    try:
        if match["host"] != _host():  # another node's process cannot be asked
            return time.time() - path.stat().st_mtime > _FOREIGN_LEFTOVER_S
        os.kill(int(match["pid"]), 0)
    except (ProcessLookupError, FileNotFoundError):
        return True
    except PermissionError:
        return False
    return False


def _host() -> str:
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def write_bytes(path: Path, data: bytes) -> Path:
    """Write bytes atomically; gives back the path."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)
    return path


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text atomically; gives back the path."""
    return write_bytes(path, text.encode())


def write_once(path: Path, text: str) -> Path:
    """Write UTF-8 text unless the file holds it already; gives back the path."""
    if path.is_file() and path.read_text(encoding="utf-8") == text:
        return path
    return write_text(path, text)


def write_json(path: Path, values: object) -> Path:
    """Write JSON atomically, keys in the order given; NaN is refused (JSON has none)."""
    return write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def write_tsv(path: Path, table: pd.DataFrame, *, index_label: str | None = None) -> Path:
    """Write a BIDS table atomically: tabs, ``n/a`` for missing values, shortest float text that reads back equal."""
    text = table.to_csv(None, sep="\t", na_rep="n/a", index=index_label is not None, index_label=index_label, lineterminator="\n")
    return write_text(path, text)


@dataclass(frozen=True, kw_only=True)
class OutputDataset:
    """An output folder that is ours to write: a BIDS derivative with its description and settings."""

    root: Path
    """Folder of the derivative."""
    command: str
    """Command that writes it."""
    configuration_hash: str
    """Hash of the settings, chained to the input's."""

    @classmethod
    def open(
        cls,
        root: Path,
        *,
        command: str,
        settings: Settings,
        sources: Sequence[Path] = (),
        citation: str = "",
        dataset_type: str = "derivative",
        made_with: Sequence[Mapping[str, str]] = (),
        links: Mapping[str, str] | None = None,
    ) -> OutputDataset:
        """Open an output folder for one command, creating its root files once.

        Array jobs may open the same folder at the same time: root files are written atomically and hold
        nothing that differs between jobs.

        Parameters
        ----------
        made_with
            Entries of GeneratedBy after ours: programs whose outputs the dataset holds.
        links
            Further DatasetLinks, where those outputs name datasets by links of their own.

        Raises
        ------
        ConfigurationConflictError
            The folder was made by another command or with other settings (exit 73).
        OutputError
            The folder cannot be written (exit 73).
        InputNotFoundError
            A source does not exist (exit 66).
        """
        for source in sources:
            if not source.is_dir():
                raise InputNotFoundError("the input folder does not exist", where=source, fix="check the path")
            if root.resolve() == source.resolve() and command != "simulate":
                raise OutputError("output and input are the same folder", where=root, fix="choose another OUTPUT_DIR")
        chained = chained_hash(command, settings, sources)
        description = _description(root, command, chained, sources, dataset_type)
        description["GeneratedBy"] += [dict(entry) for entry in made_with]
        description["DatasetLinks"] |= dict(links or {})
        existing = root / "dataset_description.json"
        for folder in (root, root / "logs", record_path(root, "any").parent):
            sweep(folder)
        if existing.exists():
            _check_same(existing, command, chained)
        else:
            _check_writable(root)
            write_text(root / ".bidsignore", BIDSIGNORE)
            write_text(root / "config.yaml", settings.to_yaml())
            write_text(root / "logs" / "CITATION.md", citation or _citation(command))
            write_json(existing, description)  # last: its presence means that the other root files are there
        return cls(root=root, command=command, configuration_hash=chained)

    def write_record(self, record: UnitRecord) -> Path:
        """Write a unit's completion record, after all its outputs."""
        return write_text(record_path(self.root, record.unit), record.model_dump_json(indent=2, exclude_none=True) + "\n")


def chained_hash(command: str, settings: Settings, sources: Sequence[Path]) -> str:
    """Hash of a command's settings, chained to the hashes of the derivatives it reads."""
    return digest_of([command, settings.digest(), [value for source in sources if (value := input_configuration_hash(source))]])


def _description(root: Path, command: str, chained: str, sources: Sequence[Path], dataset_type: str) -> dict[str, Any]:
    generated: dict[str, Any] = {
        "Name": "brainfm",
        "Version": brainfm_version(),
        "Description": f"brainfm {command}",
        "CodeURL": CODE_URL,
        "ConfigurationHash": chained,
    }
    container = {
        key: value for key, value in (("Type", os.environ.get("BRAINFM_CONTAINER_TYPE")), ("Tag", os.environ.get("BRAINFM_CONTAINER_TAG"))) if value
    }  # fmt: skip
    if container:
        generated["Container"] = container
    return {
        "Name": f"brainfm {command}",
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": dataset_type,
        "License": "inherits the licence of the source data",
        "GeneratedBy": [generated],
        "SourceDatasets": [{"URL": _uri(source, root)} for source in sources],
        "DatasetLinks": {link_name(source, index): _uri(source, root) for index, source in enumerate(sources)},
    }


def _uri(source: Path, root: Path) -> str:
    # Relative, so that a tree that is moved as a whole stays linked and paths of a machine stay private.
    return Path(os.path.relpath(source.resolve(), root.resolve())).as_posix()


def link_name(source: Path, index: int) -> str:
    """Name of a source in ``DatasetLinks``, and so in BIDS URIs: ``bids:<name>:sub-01/…``."""
    name = "".join(character for character in source.resolve().name if character.isalnum())
    return name or f"input{index}"


def _check_same(existing: Path, command: str, chained: str) -> None:
    try:
        description: Mapping[str, Any] = read_json(existing)
        generated = description["GeneratedBy"][0]
        made_by, found = str(generated["Description"]), generated["ConfigurationHash"]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ConfigurationConflictError(
            "the output folder holds a dataset that brainfm did not make", where=existing, fix="choose another OUTPUT_DIR"
        ) from error
    if made_by != f"brainfm {command}" or found != chained:
        raise ConfigurationConflictError(
            f"the output folder was made by '{made_by}' with other settings or from another input",
            where=existing.parent / "config.yaml",
            fix="choose another OUTPUT_DIR, or repeat the settings in that config.yaml (--config)",
        )


def _check_writable(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        probe = temporary_path(root / "probe")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(
            f"the output folder cannot be written: {error.strerror}", where=root, fix="choose a writable OUTPUT_DIR"
        ) from error


def _citation(command: str) -> str:
    return f"# How this was made\n\nbrainfm {brainfm_version()}, command `{command}`. See CITATION.cff of brainfm for what to cite.\n"
