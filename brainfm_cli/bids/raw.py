"""One participant of a raw BIDS dataset: images by modality, BOLD runs with their metadata, and every file that counts.

As in :mod:`brainfm_cli.bids.inputs`, pybids sees that participant's tree alone, in memory; nothing is written into
the input. Only headers are read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from brainfm_cli.bids.inputs import UNINDEXABLE, in_selection, list_participants, matches_filters, read_filters, run_key, walk_files
from brainfm_cli.bids.names import parse_name
from brainfm_cli.bids.raw_headers import check_run, check_volume
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from brainfm_cli.config import Selection
    from brainfm_cli.records import RunKey

Modality = Literal["T1w", "contrast T1w", "T2w", "FLAIR", "dwi"]
_QUERY_OF_SUFFIX = {"T1w": "t1w", "T2w": "t2w", "FLAIR": "flair", "dwi": "dwi"}
_IMAGES = (".nii.gz", ".nii")
_COUNTS = re.compile(r"\.(nii|nii\.gz|json|bval|bvec)$")
_FOLDERS = ("anat", "func", "fmap", "dwi")


@dataclass(frozen=True, kw_only=True)
class RawImage:
    """One structural or diffusion image."""

    path: Path
    """NIfTI file."""
    modality: Modality
    """T1w, contrast T1w (a T1w with ``ce-``), T2w, FLAIR or dwi."""
    session: str | None
    """Label without ``ses-``, none where the dataset has no sessions."""
    entities: dict[str, str]
    """BIDS entities of the name, short form."""


@dataclass(frozen=True, kw_only=True)
class RawRun:
    """One BOLD run; of several echoes the first."""

    path: Path
    """NIfTI series (x, y, z, frames)."""
    key: RunKey
    """Which run."""
    metadata: dict[str, Any]
    """Inherited metadata; ``RepetitionTime`` is there, in seconds, and agrees with the header."""
    repetition_time_s: float
    """Seconds between frames."""
    sbref: Path | None
    """Single-band reference of the same run (and echo), none where there is none."""
    echoes: tuple[Path, ...] = ()
    """All echoes by number where the run has several, ``path`` first; empty otherwise."""

    @property
    def slice_timing_s(self) -> tuple[float, ...] | None:
        """Seconds from the start of a frame to each slice; none where it is not stated."""
        timing = self.metadata.get("SliceTiming")
        return None if timing is None else tuple(float(value) for value in timing)

    @property
    def phase_encoding(self) -> str | None:
        """``i``, ``j``, ``k`` with or without ``-``; none where it is not stated."""
        return self.metadata.get("PhaseEncodingDirection")


@dataclass(frozen=True, kw_only=True)
class RawParticipant:
    """What a raw dataset holds of one participant, under a selection."""

    label: str
    """Label without ``sub-``."""
    root: Path
    """Folder of the dataset."""
    images: tuple[RawImage, ...]
    """Structural and diffusion images, sorted by name."""
    bold: tuple[RawRun, ...]
    """BOLD runs, sorted by name."""
    fieldmaps: tuple[Path, ...]
    """Images in ``fmap/``, sorted."""
    inputs: tuple[Path, ...]
    """Every file whose change makes a result stale: images, sidecars, gradients, and the JSONs of the root; sorted."""

    @property
    def t1w(self) -> tuple[RawImage, ...]:
        """T1w images without contrast agent."""
        return self.of("T1w")

    @property
    def sessions(self) -> tuple[str, ...]:
        """Session labels, sorted; empty where there are none."""
        labels = [image.session for image in self.images] + [run.key.session for run in self.bold]
        return tuple(sorted({label for label in labels if label}))

    def of(self, modality: Modality) -> tuple[RawImage, ...]:
        """Images of one modality."""
        return tuple(image for image in self.images if image.modality == modality)


def check_raw_dataset(root: Path) -> None:
    """See that a folder is a raw BIDS dataset.

    Raises
    ------
    InputNotFoundError
        The folder is absent, has no ``dataset_description.json``, or no participants.
    InputDatasetError
        The description is unreadable, or says that the dataset is a derivative.
    """
    if not root.is_dir():
        raise InputNotFoundError("the input folder does not exist", where=root, fix="check the path")
    path = root / "dataset_description.json"
    try:
        description = read_json(path)
    except FileNotFoundError as error:
        raise InputNotFoundError(
            "the input is no BIDS dataset: it has no dataset_description.json", where=root, fix="give the folder that holds it"
        ) from error
    except ValueError as error:
        raise InputDatasetError(f"the dataset description is not readable JSON: {error}", where=path, fix="mend it") from error
    if isinstance(description, dict) and description.get("DatasetType") == "derivative":
        raise InputDatasetError(
            "the input is a derivative, not raw data", where=path, fix="give the raw BIDS dataset; derivatives go to 'brainfm parcellate'"
        )
    if not list_participants(root):
        raise InputNotFoundError("the dataset has no participants", where=root, fix="it must hold sub-<label> folders")


def raw_files(root: Path, label: str, selection: Selection, *, anat_only: bool = False) -> tuple[Path, ...]:
    """Every file whose change makes a participant's result stale, sorted: images, sidecars, gradients, JSONs of the root.

    From names alone; a broken link is left out here and refused by :func:`read_raw_participant`.
    """
    mine = (path for path in walk_files(root / f"sub-{label}") if _counts(path, selection, anat_only=anat_only) and path.exists())
    return tuple(sorted({*mine, *_inherited(root)}))


def read_raw_participant(root: Path, label: str, selection: Selection, *, anat_only: bool = False) -> RawParticipant:
    """What the dataset holds of one participant, checked as far as names, metadata and headers go.

    Parameters
    ----------
    anat_only
        Leave BOLD runs and field maps out.

    Raises
    ------
    InputNotFoundError
        Nothing matches the selection.
    InputDatasetError
        A link is broken, a JSON unreadable, a run is there twice, or a header or metadata cannot be right.
    """
    paths = raw_files(root, label, selection, anat_only=anat_only)
    for path in walk_files(root / f"sub-{label}"):
        if path.is_symlink() and not path.exists() and _counts(path, selection, anat_only=anat_only):
            raise InputDatasetError("the file is a broken link", where=path, fix="fetch its content first, e.g. 'datalad get'")
    images = tuple(_image(path) for path in _matching(paths, selection, tuple(_QUERY_OF_SUFFIX)))
    runs = {} if anat_only else _grouped(_matching(paths, selection, ("bold",)))
    if not images and not runs:
        raise InputNotFoundError(
            f"sub-{label} has no images that match the selection",
            where=root / f"sub-{label}",
            fix="check --session-label, --task-id and --bids-filter-file",
        )
    references = _matching(paths, selection, ("sbref",))
    metadata = _read_metadata(root, label, [echoes[0] for echoes in runs.values()])
    for image in images:
        check_volume(image.path, diffusion=image.modality == "dwi")
    return RawParticipant(
        label=label,
        root=root,
        images=images,
        bold=tuple(_run(key, echoes, metadata[echoes[0]], references) for key, echoes in runs.items()),
        fieldmaps=tuple(path for path in paths if path.parent.name == "fmap" and path.name.endswith(_IMAGES)),
        inputs=paths,
    )


def outside_dataset(participant: RawParticipant) -> tuple[Path, ...]:
    """Inputs that are links to files outside the dataset: a container that binds the dataset alone cannot read them."""
    root = participant.root.resolve()
    return tuple(path for path in participant.inputs if not path.resolve().is_relative_to(root))


def _counts(path: Path, selection: Selection, *, anat_only: bool) -> bool:
    folder = path.parent.name
    # Sidecars that several modalities inherit lie directly in sub-X or ses-Y.
    if not _COUNTS.search(path.name) or (folder not in _FOLDERS and not folder.startswith(("sub-", "ses-"))):
        return False
    return not (anat_only and folder in {"func", "fmap"}) and in_selection(parse_name(path.name)[0], selection)


def _inherited(root: Path) -> Iterable[Path]:
    return (path for path in root.glob("*_*.json") if path.name != "dataset_description.json")


def _matching(paths: Iterable[Path], selection: Selection, suffixes: Sequence[str]) -> list[Path]:
    filters = {suffix: read_filters(selection, _QUERY_OF_SUFFIX.get(suffix, suffix)) for suffix in suffixes}
    found = []
    for path in paths:
        entities, suffix, extension = parse_name(path.name)
        if suffix not in suffixes or extension not in _IMAGES or entities.get("part") not in (None, "mag"):
            continue
        described = {**entities, "suffix": suffix, "extension": extension, "datatype": path.parent.name}
        if matches_filters(described, filters[suffix]):
            found.append(path)
    return sorted(found)


def _image(path: Path) -> RawImage:
    entities, suffix, _ = parse_name(path.name)
    modality: Any = "contrast T1w" if suffix == "T1w" and "ce" in entities else suffix
    return RawImage(path=path, modality=modality, session=entities.get("ses"), entities=entities)


def _grouped(paths: Iterable[Path]) -> dict[RunKey, tuple[Path, ...]]:
    runs: dict[RunKey, list[tuple[int, Path]]] = {}
    for path in paths:
        entities = parse_name(path.name)[0]
        echo = entities.get("echo", "0")
        if not echo.isdecimal():
            raise InputDatasetError(f"'{echo}' is no number of an echo", where=path, fix="name echoes echo-1, echo-2 …")
        runs.setdefault(run_key(entities), []).append((int(echo), path))
    for key, echoes in runs.items():
        for (number, path), (following, other) in pairwise(sorted(echoes)):
            if number == following:
                raise InputDatasetError(
                    f"{key.name} is there twice: {path.name} and {other.name}",
                    where=path.parent,
                    fix="remove one, or choose with --bids-filter-file",
                )
    return {key: tuple(path for _, path in sorted(echoes)) for key, echoes in sorted(runs.items(), key=lambda item: item[0].name)}


def _run(key: RunKey, echoes: tuple[Path, ...], metadata: Mapping[str, Any], references: Sequence[Path]) -> RawRun:
    path = echoes[0]
    return RawRun(
        path=path,
        key=key,
        metadata=dict(metadata),
        repetition_time_s=check_run(path, metadata),
        sbref=_sbref(path, references),
        echoes=echoes if len(echoes) > 1 else (),
    )


def _sbref(bold: Path, references: Sequence[Path]) -> Path | None:
    entities = {key: value for key, value in parse_name(bold.name)[0].items() if key != "part"}
    for path in references:
        if {key: value for key, value in parse_name(path.name)[0].items() if key != "part"} == entities:
            return path
    return None


def _read_metadata(root: Path, label: str, paths: Sequence[Path]) -> dict[Path, dict[str, Any]]:
    if not paths:
        return {}
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    mine = rf"sub-{re.escape(label)}(/|$)"
    # Everybody else's files and every other folder of the root are never entered or parsed.
    ignored = [rf"^/sub-(?!{mine[4:]})", rf"^/(?!{mine})[^/.]+(/|$)", r"^/\.", r"/(figures|log)(/|$)"]
    indexer = BIDSLayoutIndexer(validate=False, ignore=[re.compile(pattern) for pattern in ignored])
    try:
        layout = BIDSLayout(root, validate=False, config=["bids"], indexer=indexer)
        return {path: dict(layout.get_metadata(str(path.absolute()))) for path in paths}
    except UNINDEXABLE as error:
        raise InputDatasetError(
            f"the files of sub-{label} cannot be indexed: {error}", where=root, fix="mend the named JSON file; a sidecar must be valid JSON"
        ) from error
