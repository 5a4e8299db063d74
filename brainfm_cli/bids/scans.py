"""Structural and diffusion scans of one participant by study, and the lesion masks that belong to them.

A study is one session. The sequence of a scan is read from its name: ``_T1w``, with ``ce-`` its contrast-enhanced form, ``_T2w``,
``_FLAIR``, ``_T2starw``, ``_swi``, ``_dwi`` with ``rec-TRACE`` or ``rec-ADC`` … Masks follow several conventions (see :func:`_lesion_names`).
From names and JSON files alone: no image is opened.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from brainfm_cli.bids.inputs import in_selection, list_participants, walk_files
from brainfm_cli.bids.names import parse_name
from brainfm_cli.bids.slice_cohort import ScanSequence
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from brainfm_cli.config import Selection

_OF_SUFFIX: dict[str, ScanSequence] = {
    "T1w": "T1w", "T2w": "T2w", "FLAIR": "FLAIR", "dwi": "dwi", "trace": "dwi", "adc": "adc", "ADC": "adc",
    "T2starw": "T2star", "T2star": "T2star", "swi": "T2star", "GRE": "T2star", "PDw": "other", "inplaneT2": "T2w",
}  # fmt: skip
_FOLDERS = {"anat", "dwi", "swi", "perf"}
_IMAGE = (".nii.gz", ".nii")
_LESION = re.compile(
    r"lesion|tumou?r|brats|glioma|infarct|stroke|ha?emorrhage|abscess|metastas|oedema|edema|enhancing|necro", re.IGNORECASE
)
LESION = "lesion"
_LESION_INDEX, _LESION_ABBREVIATION = 7, "L"  # BIDS 1.11, table of common image-derived labels


@dataclass(frozen=True, kw_only=True)
class StudyScan:
    """One image of a study."""

    path: Path
    """NIfTI file."""
    sequence: ScanSequence
    """What kind of contrast."""
    participant: str
    """Label without ``sub-``."""
    session: str
    """Label without ``ses-``, empty where the dataset has no sessions."""
    entities: dict[str, str]
    """BIDS entities of the name, short form."""
    gradients: Path | None = None
    """``.bval`` beside a diffusion series; none where there is none."""

    @property
    def name(self) -> str:
        """File name without extension."""
        return self.path.name.partition(".")[0]


@dataclass(frozen=True, kw_only=True)
class LesionMask:
    """One file of lesion labels."""

    path: Path
    """NIfTI file."""
    labels: dict[int, str]
    """Values that count as lesion and what each is called; every other value but 0 is unknown."""
    others: frozenset[int] = frozenset()
    """Values that a table describes and that are no lesion."""
    reference: Path | None = None
    """The scan whose grid the mask is said to have; none where nothing says so."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """What one session of one participant holds."""

    participant: str
    """Label without ``sub-``."""
    session: str
    """Label without ``ses-``, empty where there is none."""
    scans: tuple[StudyScan, ...]
    """Sorted by name."""
    masks: tuple[LesionMask, ...] = ()
    """Lesion masks, sorted by name."""

    @property
    def name(self) -> str:
        """``sub-<label>[_ses-<label>]``."""
        return f"sub-{self.participant}" + (f"_ses-{self.session}" if self.session else "")


def read_studies(
    root: Path,
    label: str,
    selection: Selection,
    *,
    sequences: Sequence[str] = (),
    space: str | None = None,
    mask_roots: Sequence[Path] = (),
) -> tuple[Study, ...]:
    """The studies of one participant, by session.

    Parameters
    ----------
    sequences
        Keep these alone; all where empty.
    space
        Label of ``space-`` of the images; unset takes those in the scanner's own space (no ``space-``).
    mask_roots
        Further datasets where masks are looked for, beside ``root`` and its ``derivatives/*``.

    Raises
    ------
    InputNotFoundError
        No scan is there, or none of the sequences asked for.
    InputDatasetError
        A link is broken, a scan is there twice, a mask lies with or refers to another patient, or no table says what its values mean.
    """
    scans = _scans(root, label, selection, space)
    if not scans:
        raise InputNotFoundError(
            f"sub-{label} has no structural or diffusion scans" + (f" in space {space}" if space else ""),
            where=root / f"sub-{label}", fix="images must lie in anat/, dwi/ or swi/ under BIDS names; derivatives may need --set space=NAME",
        )  # fmt: skip
    kept = [scan for scan in scans if not sequences or scan.sequence in sequences]
    if not kept:
        found = ", ".join(sorted({scan.sequence for scan in scans}))
        raise InputNotFoundError(
            f"sub-{label} has none of the sequences {', '.join(sequences)} (found: {found})",
            where=root / f"sub-{label}", fix="set 'sequences' to what the participants have, or leave this one out",
        )  # fmt: skip
    masks = _masks(_mask_datasets(root, mask_roots), label, selection, scans)
    sessions = sorted({scan.session for scan in kept})
    return tuple(
        Study(
            participant=label,
            session=session,
            scans=tuple(scan for scan in kept if scan.session == session),
            masks=tuple(mask for mask, of in masks if of == session),
        )
        for session in sessions
    )


def study_files(root: Path, label: str, selection: Selection, *, mask_roots: Sequence[Path] = ()) -> tuple[Path, ...]:
    """Every file whose change changes a participant's studies, sorted: images, masks, tables and JSONs."""
    found = {path for path in walk_files(root / f"sub-{label}") if _is_input(path, selection) and path.parent.name in _FOLDERS}
    for dataset in _mask_datasets(root, mask_roots):
        found |= {path for path in walk_files(dataset / f"sub-{label}") if _is_input(path, selection) and _is_mask_name(path.name)}
        found |= set(dataset.glob("*dseg.tsv"))
    return tuple(sorted(path for path in found if path.exists()))


def _is_input(path: Path, selection: Selection) -> bool:
    return path.name.endswith((*_IMAGE, ".json", ".tsv", ".bval")) and in_selection(parse_name(path.name)[0], selection)


def _scans(root: Path, label: str, selection: Selection, space: str | None) -> list[StudyScan]:
    found: dict[tuple[str, str], StudyScan] = {}
    for path in walk_files(root / f"sub-{label}"):
        if path.parent.name not in _FOLDERS or not path.name.endswith(_IMAGE):
            continue
        entities, suffix, _ = parse_name(path.name)
        sequence = sequence_of(entities, suffix)
        if sequence is None or entities.get("space") != space or entities.get("part") not in (None, "mag") or not in_selection(entities, selection):  # fmt: skip
            continue
        if int(entities.get("echo", "1")) > 1 or entities.get("desc", "preproc") != "preproc":
            continue
        if not path.exists():
            raise InputDatasetError("the file is a broken link", where=path, fix="fetch its content first, e.g. 'datalad get'")
        _refuse_other_patient(path, label, entities)
        gradients = path.with_name(f"{path.name.partition('.')[0]}.bval")
        scan = StudyScan(
            path=path,
            sequence=sequence,
            participant=label,
            session=entities.get("ses", ""),
            entities=entities,
            gradients=gradients if gradients.is_file() else None,
        )
        twin = found.setdefault((scan.session, scan.name), scan)
        if twin is not scan:
            raise InputDatasetError(f"the scan is there twice: {twin.path.name} and {path.name}", where=path.parent, fix="remove one")
    return sorted(found.values(), key=lambda scan: (scan.session, scan.name))


def sequence_of(entities: Mapping[str, str], suffix: str) -> ScanSequence | None:
    """The sequence that a BIDS name states; none where it is no structural or diffusion contrast."""
    if suffix == "dwi":
        made = entities.get("rec", "").lower()
        return "adc" if made == "adc" else "dwi"
    if suffix == "T1w" and "ce" in entities:
        return "T1w+ce"
    return _OF_SUFFIX.get(suffix)


def _refuse_other_patient(path: Path, label: str, entities: Mapping[str, str]) -> None:
    if entities.get("sub", label) != label:
        raise InputDatasetError(
            f"the file lies with sub-{label} and is named for sub-{entities['sub']}",
            where=path,
            fix="put it where it belongs: a mask of another patient is never used",
        )


def _mask_datasets(root: Path, further: Iterable[Path]) -> list[Path]:
    inside = [path for path in sorted((root / "derivatives").glob("*")) if path.is_dir()] if (root / "derivatives").is_dir() else []
    return list(dict.fromkeys([root, *inside, *further]))


def _is_mask_name(name: str) -> bool:
    suffix = parse_name(name)[1]
    return suffix in {"mask", "dseg", "msk", "roi"}


def _masks(datasets: Sequence[Path], label: str, selection: Selection, scans: Sequence[StudyScan]) -> list[tuple[LesionMask, str]]:
    found = []
    for dataset in datasets:
        for path in walk_files(dataset / f"sub-{label}"):
            if not path.name.endswith(_IMAGE) or not _is_mask_name(path.name):
                continue
            entities, suffix, _ = parse_name(path.name)
            if not in_selection(entities, selection):
                continue
            labels = _lesion_names(dataset, path, entities, suffix)
            if labels is None:
                continue
            if not path.exists():
                raise InputDatasetError("the mask is a broken link", where=path, fix="fetch its content first, e.g. 'datalad get'")
            _refuse_other_patient(path, label, entities)
            session = entities.get("ses", "")
            mine = [scan for scan in scans if scan.session == session]
            names, others = labels
            reference = _reference(path, label, entities, mine)
            found.append((LesionMask(path=path, labels=names, others=others, reference=reference), session))
    return sorted(found, key=lambda item: item[0].path.name)


def _lesion_names(dataset: Path, path: Path, entities: Mapping[str, str], suffix: str) -> tuple[dict[int, str], frozenset[int]] | None:
    """Values that are lesion, and further known ones; none where the file is another kind of mask.

    ``label-L_mask`` and ``label-lesion_mask`` (BIDS), ``[T2w_]desc-lesion[Acute]_mask`` (ARC, SOOP), ``label-L_desc-T1lesion_mask``
    (ATLAS), ``_msk`` (ISLES), ``seg-X_dseg`` with a table (BIDS, BraTS).
    """
    if suffix == "dseg":
        return _table_names(dataset, path, entities)
    said = [entities[key] for key in ("label", "desc") if key in entities]
    if suffix != "msk" and not any(text == _LESION_ABBREVIATION or _LESION.search(text) for text in said):
        return None
    words = [text for text in said if _LESION.search(text)]
    return {1: words[-1] if words else LESION}, frozenset()


def _table_names(dataset: Path, path: Path, entities: Mapping[str, str]) -> tuple[dict[int, str], frozenset[int]] | None:
    named = any(_LESION.search(entities.get(key, "")) for key in ("seg", "desc", "label"))
    table = _label_table(dataset, path, entities)
    if table is None:
        if not named:
            return None  # a segmentation of tissue or anatomy
        raise InputDatasetError(
            "no table says what the label values mean",
            where=path,
            fix="add …_dseg.tsv with columns index and name beside it or at the root",
        )
    rows = _read_labels(table)
    lesions = {
        index: name
        for index, (name, abbreviation) in rows.items()
        if index and (named or _LESION.search(name) or abbreviation == _LESION_ABBREVIATION or (index == _LESION_INDEX and not name))
    }
    return (lesions, frozenset(set(rows) - set(lesions) - {0})) if lesions else None


def _label_table(dataset: Path, path: Path, entities: Mapping[str, str]) -> Path | None:
    beside = path.with_name(f"{path.name.partition('.')[0]}.tsv")
    inherited = [table for table in sorted(dataset.glob("*dseg.tsv")) if parse_name(table.name)[0].items() <= entities.items()]
    return next((table for table in (beside, *inherited) if table.is_file()), None)


def _read_labels(table: Path) -> dict[int, tuple[str, str]]:
    try:
        with table.open(encoding="utf-8", newline="") as stream:
            rows = list(csv.DictReader(stream, delimiter="\t"))
        return {int(row["index"]): ((row.get("name") or "").strip(), (row.get("abbreviation") or "").strip()) for row in rows}
    except (OSError, UnicodeDecodeError, ValueError, KeyError, TypeError, csv.Error) as error:
        raise InputDatasetError(f"the label table cannot be used: {error}", where=table, fix="columns index (a whole number) and name, tab-separated") from error  # fmt: skip


def _reference(path: Path, label: str, entities: Mapping[str, str], scans: Sequence[StudyScan]) -> Path | None:
    """The scan that a mask was drawn on: as its JSON says, or as its name does."""
    said = _spatial_reference(path)
    if said is not None:
        other = re.search(r"sub-([A-Za-z0-9+]+)", said)
        if other and other[1] != label:
            raise InputDatasetError(
                f"the mask's SpatialReference is a scan of sub-{other[1]}",
                where=path,
                fix="mend the JSON: a mask of another patient is never used",
            )
        for scan in scans:
            if said.endswith(scan.path.name):
                return scan.path
    words = {part for part in path.name.partition(".")[0].split("_")[:-1] if "-" not in part}  # ARC: suffix before desc
    words |= {entities[key] for key in ("space", "from") if key in entities}
    for scan in scans:
        suffix = parse_name(scan.path.name)[1]
        if words & {suffix, *(scan.entities[key] for key in ("rec", "acq", "ce") if key in scan.entities)}:
            return scan.path
    return None


def _spatial_reference(path: Path) -> str | None:
    sidecar = path.with_name(f"{path.name.partition('.')[0]}.json")
    if not sidecar.is_file():
        return None
    try:
        values = read_json(sidecar)
        said = values.get("SpatialReference")
    except (OSError, ValueError, AttributeError) as error:
        raise InputDatasetError(f"the mask's JSON is unreadable: {error}", where=sidecar, fix="mend the file") from error
    said = next(iter(said.values()), None) if isinstance(said, dict) else said
    return said if isinstance(said, str) else None


def sites_of(root: Path, labels: Sequence[str], column: str) -> dict[str, str]:
    """Site of each participant by a column of participants.tsv; empty text where the table, the column or the value is absent."""
    table = root / "participants.tsv"
    if not table.is_file():
        return dict.fromkeys(labels, "")
    try:
        with table.open(encoding="utf-8-sig", newline="") as stream:
            rows = {row["participant_id"].removeprefix("sub-"): row.get(column) or "" for row in csv.DictReader(stream, delimiter="\t")}
    except (OSError, UnicodeDecodeError, KeyError, AttributeError, csv.Error) as error:
        raise InputDatasetError(
            f"participants.tsv cannot be used: {error}", where=table, fix="it must be a tab-separated UTF-8 table"
        ) from error
    return {label: "" if rows.get(label, "") in {"n/a", ""} else rows[label] for label in labels}


def has_scans(root: Path) -> bool:
    """Whether some participant of a dataset has structural or diffusion images; stops at the first."""
    return any(
        path.parent.name in _FOLDERS and path.name.endswith(_IMAGE) and sequence_of(*parse_name(path.name)[:2]) is not None
        for label in list_participants(root)
        for path in walk_files(root / f"sub-{label}")
    )
