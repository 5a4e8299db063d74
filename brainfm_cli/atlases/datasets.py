"""Atlases of BIDS-Atlas datasets: label images with a region table beside them."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

from brainfm_cli.atlases.atlas import Atlas, Kind, Source
from brainfm_cli.bids.names import atlas_label, parse_name
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.records import RegionTable

# Networks that Schaefer's region names abbreviate.
_YEO7 = {
    "Vis": "Visual",
    "SomMot": "Somatomotor",
    "DorsAttn": "Dorsal Attention",
    "SalVentAttn": "Salience/Ventral Attention",
    "Limbic": "Limbic",
    "Cont": "Control",
    "Default": "Default",
}
_SCHAEFER_NAME = re.compile(r"(?:7|17)?(?:Networks_)?[LR]H_([A-Za-z]+)(?:_.*)?")
_NETWORK_COLUMNS = ("network", "network_label")
_IMAGES = {".nii.gz": "volume", ".nii": "volume", ".dlabel.nii": "cifti"}


def dataset_atlases(folder: Path) -> list[Atlas]:
    """Atlases of one dataset, by label and template; an empty list where the folder holds none.

    Of several resolutions of one atlas the finest (first ``res-``) is taken.

    Raises
    ------
    InputDatasetError
        A region table is absent or cannot be used.
    """
    found: dict[tuple[str, str, Kind], Atlas] = {}
    for path in sorted(folder.glob("tpl-*/**/tpl-*_atlas-*_dseg*.nii*")):
        entities, suffix, extension = parse_name(path.name)
        label = atlas_label(entities)
        if suffix != "dseg" or extension not in _IMAGES or label is None:
            continue
        kind: Kind = "cifti" if _IMAGES[extension] == "cifti" else "volume"
        if (label, entities["tpl"], kind) not in found:
            found[label, entities["tpl"], kind] = _read(folder, path, label, entities, kind)
    return list(found.values())


def read_region_table(path: Path) -> tuple[RegionTable, tuple[int, ...]]:
    """Regions and label values of a BIDS ``dseg.tsv``; a row with index 0 is background.

    Raises
    ------
    InputDatasetError
        Unreadable, no columns ``index`` and ``name``, an index that is no integer, or repeated labels or names.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t"))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputDatasetError(
            f"the region table is unreadable: {error}", where=path, fix="it must be a tab-separated UTF-8 table"
        ) from error
    if not rows or not {"index", "name"} <= set(rows[0]):
        raise InputDatasetError(
            "the region table has no columns 'index' and 'name', or no rows", where=path, fix="add them, one row per region"
        )
    try:
        rows = [row for row in rows if int(row["index"]) != 0]
        values = tuple(int(row["index"]) for row in rows)
    except (TypeError, ValueError) as error:
        raise InputDatasetError(f"the region table has an index that is no integer: {error}", where=path, fix="mend the table") from error
    if not rows:
        raise InputDatasetError("the region table has no region beside the background", where=path, fix="add a row per region")
    names = tuple(_strip(row["name"] or "") for row in rows)
    for what, column in (("index", values), ("name", names)):
        repeated = sorted({str(value) for value in column if column.count(value) > 1})  # type: ignore[attr-defined]
        if repeated:
            raise InputDatasetError(
                f"the region table repeats {what} {', '.join(repeated[:5])}", where=path, fix="every region needs its own index and name"
            )
    if not all(names):
        raise InputDatasetError("the region table has a region without name", where=path, fix="name every region")
    return RegionTable(names=names, networks=_networks(rows, names)), values


def _strip(name: str) -> str:
    return re.sub(r"^(?:7|17)Networks_", "", name.strip())


def _networks(rows: list[dict[str, Any]], names: tuple[str, ...]) -> tuple[str | None, ...]:
    for column in _NETWORK_COLUMNS:
        if column in rows[0]:
            return tuple(None if (row[column] or "n/a") == "n/a" else str(row[column]) for row in rows)
    matches = [_SCHAEFER_NAME.fullmatch(name) for name in names]
    if all(matches):
        return tuple(_YEO7.get(match[1], match[1]) for match in matches if match)
    return ()


def _read(folder: Path, path: Path, label: str, entities: dict[str, str], kind: Kind) -> Atlas:
    description = _description(folder, entities["atlas"])
    table = _table(path)
    if table is None:
        raise InputDatasetError(
            "the atlas has no region table", where=path, fix="add a _dseg.tsv with the columns index and name beside it"
        )
    regions, values = read_region_table(table)
    return Atlas(
        name=_short_name(entities, len(values)),
        label=label,
        template=entities["tpl"],
        regions=regions,
        values=values,
        description=str(description.get("Name", label)),
        licence=str(description.get("License", "not stated")),
        citation="; ".join(str(item) for item in _listed(description.get("ReferencesAndLinks") or description.get("Source") or ())),
        source=Source(kind="dataset", path=path),
        kind=kind,
    )


def _listed(value: object) -> list[object]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _description(folder: Path, atlas: str) -> dict[str, Any]:
    path = folder / f"atlas-{atlas}_description.json"
    try:
        values = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise InputDatasetError(f"the atlas description is unreadable: {error}", where=path, fix="it must be a JSON object") from error
    return values if isinstance(values, dict) else {}


def _table(image: Path) -> Path | None:
    """The table beside the image, or the one without its resolution or density (BIDS inheritance)."""
    stem = image.name.partition(".")[0]
    for name in (stem, re.sub(r"_(?:res|den)-[A-Za-z0-9]+", "", stem)):
        path = image.parent / f"{name}.tsv"
        if path.is_file():
            return path
    return None


def _short_name(entities: dict[str, str], num_regions: int) -> str:
    """``Schaefer300`` for Schaefer2018_scale-300, ``Shen268`` for Shen2013, ``AAL116`` as it is."""
    atlas = re.sub(r"(?:19|20)\d\d$", "", entities["atlas"])
    tail = "" if atlas[-1].isdigit() else str(num_regions)
    network = entities.get("seg", "7n")
    return atlas + tail + ("" if network == "7n" else f"-{network}")
