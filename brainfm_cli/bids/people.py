"""Where a dataset's participants table is, and a copy of it for a derivative."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from brainfm_cli.bids.derivatives import write_json, write_tsv
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_LINKS = 4


def find_participants_table(dataset: Path, *, depth: int = _LINKS) -> Path | None:
    """participants.tsv of a derivative, or of the dataset that it says it comes from or in whose ``derivatives/`` it lies.

    Most programs do not copy the table into their output. Only folders on this machine are looked at.
    """
    own = dataset / "participants.tsv"
    if own.is_file():
        return own
    if depth == 0:
        return None
    parents = [parent.parent for parent in (dataset, *dataset.parents) if parent.name == "derivatives"]
    for folder in (*linked_datasets(dataset), *parents[:1]):
        if folder.is_dir() and folder.resolve() != dataset.resolve() and (found := find_participants_table(folder, depth=depth - 1)):
            return found
    return None


def copy_participants(table: Path, root: Path, labels: Sequence[str]) -> list[Path]:
    """Copy participants.tsv and its JSON into ``root``: one row per label, ``n/a`` for those it does not list.

    BIDS wants as many rows as ``sub-`` folders.

    Raises
    ------
    InputDatasetError
        The table or its JSON is unreadable.
    """
    import pandas as pd

    try:
        frame = pd.read_csv(table, sep="\t", dtype=str, keep_default_na=False)
        frame.index = frame["participant_id"].str.removeprefix("sub-")
        rows = frame.reindex(list(labels)).replace("", "n/a")  # BIDS has no empty cells
    except (OSError, ValueError, KeyError) as error:
        raise InputDatasetError(
            f"participants.tsv cannot be used: {error}", where=table, fix="it must be a tab-separated UTF-8 table, one row per participant"
        ) from error
    rows["participant_id"] = [f"sub-{label}" for label in labels]
    written = [write_tsv(root / "participants.tsv", rows)]
    described = table.with_suffix(".json")
    if described.is_file():
        written.append(write_json(root / "participants.json", _read(described)))
    return written


def linked_datasets(dataset: Path) -> list[Path]:
    """Folders that dataset_description.json names as sources."""
    path = dataset / "dataset_description.json"
    description = _read(path) if path.is_file() else {}
    links, sources = description.get("DatasetLinks"), description.get("SourceDatasets")
    named = list(links.values()) if isinstance(links, dict) else []
    named += [one.get("URL") for one in sources if isinstance(one, dict)] if isinstance(sources, list) else []
    return [dataset / str(uri).removeprefix("file://") for uri in named if uri and "://" not in str(uri).removeprefix("file://")]


def _read(path: Path) -> dict[str, Any]:
    try:
        values = read_json(path)
    except (OSError, ValueError) as error:
        raise InputDatasetError(f"the JSON is unreadable: {error}", where=path, fix="mend the file") from error
    return values if isinstance(values, dict) else {}
