"""Find what a derivative holds: its kind, its participants, and one participant's preprocessed runs.

Participants are listed with one directory scan, the runs of one participant by a walk through that participant's tree alone;
filters of the user are answered by pybids on that tree, in memory: never a shared database, and nothing is written into the input.
Series that another program has already parcellated are found in :mod:`brainfm_cli.bids.series_inputs`.
"""

from __future__ import annotations

import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from brainfm_cli.bids.names import parse_name
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, SettingsError
from brainfm_cli.records import RunFiles, RunKey

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from brainfm_cli.config import Selection

Kind = Literal["images", "series", "cohort"]
# Where several spaces exist and none is asked for, the first of these that a run has.
SPACE_ORDER = ("MNI152NLin2009cAsym", "MNI152NLin6Asym", "MNI152NLin2009aSym", "MNI152NLin6Sym", "fsLR")
UNINDEXABLE = (OSError, ValueError, TypeError, AttributeError, RecursionError)
"""What pybids raises on files of others: it trusts JSON to be an object that is not nested deeply."""
_ASIDE = frozenset({"anat", "fmap", "dwi"})
_IMAGES = (".nii.gz", ".nii", ".dtseries.nii")
_READ = re.compile(r"_(bold|mask|timeseries|regressors|coverage|motion|outliers)\.(nii|nii\.gz|dtseries\.nii|tsv|json)$")
_LONG = {"subject": "sub", "session": "ses", "acquisition": "acq", "ceagent": "ce", "reconstruction": "rec", "direction": "dir", "segmentation": "seg"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Source:
    """A dataset that parcellate may read, and what it holds."""

    given: Path
    """Folder as given by the user."""
    root: Path
    """Folder that holds the ``sub-`` folders (inside a HALFpipe working folder, its derivative)."""
    kind: Kind
    """images, series (already parcellated) or cohort (already packed)."""
    producer: str
    """Name of the first GeneratedBy entry, empty where none is stated."""
    version: str
    """Its version, empty where none is stated."""


def open_source(dataset: Path) -> Source:
    """What ``dataset`` holds.

    Raises
    ------
    InputNotFoundError
        The folder is absent, or holds neither preprocessed images, region series nor a packed cohort.
    """
    if not dataset.is_dir():
        raise InputNotFoundError("the input folder does not exist", where=dataset, fix="check the path")
    root = _root(dataset)
    producer, version = _producer(root)
    kind = _kind(root)
    if kind is None and (dataset / "cohort" / "index.parquet").is_file():
        kind = "cohort"
    if kind is None:
        raise InputNotFoundError(
            "no preprocessed BOLD, region series or packed cohort here",
            where=dataset,
            fix="give a derivative of fMRIPrep, brainfm preprocess, HALFpipe, XCP-D or giga_connectome; raw BIDS is preprocessed first",
        )
    return Source(given=dataset, root=root, kind=kind, producer=producer, version=version)


def list_participants(root: Path) -> list[str]:
    """Labels of the ``sub-`` folders, sorted, from one directory scan."""
    with os.scandir(root) as entries:
        return sorted(entry.name[4:] for entry in entries if entry.name.startswith("sub-") and entry.is_dir())


def choose_participants(root: Path, selection: Selection) -> list[str]:
    """The participants a run is about: those asked for, or everybody.

    Raises
    ------
    InputNotFoundError
        Somebody asked for is not in the dataset, or nobody is there at all.
    """
    present = list_participants(root)
    if not present:
        raise InputNotFoundError("the dataset has no participants", where=root, fix="it must hold sub-<label> folders")
    absent = [label for label in selection.participant_label if label not in present]
    if absent:
        raise InputNotFoundError(
            f"no data for participant {', '.join(absent[:5])}", where=root, fix="check --participant-label; labels are case-sensitive"
        )
    return list(selection.participant_label) or present


def root_sidecars(root: Path) -> tuple[Path, ...]:
    """JSON files at the root of a dataset whose metadata the runs below inherit."""
    with os.scandir(root) as entries:
        return tuple(sorted(Path(entry.path) for entry in entries if entry.name.endswith(".json") and _READ.search(f"_{entry.name}")))


def participant_files(root: Path, label: str, selection: Selection) -> tuple[Path, ...]:
    """A participant's files that decide the results under this selection, sorted: images, tables and their JSONs."""
    wanted = [path for path in walk_files(root / f"sub-{label}", _READ) if in_selection(parse_name(path.name)[0], selection)]
    return tuple(sorted(wanted))


def walk_files(folder: Path, matching: re.Pattern[str] | None = None) -> Iterator[Path]:
    """Files below ``folder`` whose names hold ``matching``, except figures and hidden ones, in a stable order."""
    for directory, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if name not in {"figures", "log", "logs"} and not name.startswith("."))
        here = Path(directory)
        yield from (here / name for name in sorted(files) if not name.startswith(".") and (matching is None or matching.search(name)))


def in_selection(entities: Mapping[str, str], selection: Selection) -> bool:
    """Whether a file belongs to the selected sessions and tasks; a file that carries neither entity does."""
    session, task = entities.get("ses"), entities.get("task")
    return (not selection.session_label or session is None or session in selection.session_label) and (
        not selection.task_id or task is None or task in selection.task_id
    )


def read_filters(selection: Selection, query: str) -> dict[str, Any]:
    """The filters of one query (``bold`` or ``timeseries``) of ``--bids-filter-file``; empty without the file.

    Raises
    ------
    SettingsError
        The file is not JSON of ``{"query": {"entity": value}}``.
    """
    path = selection.bids_filter_file
    if path is None:
        return {}
    try:
        queries = read_json(path)
    except FileNotFoundError as error:
        raise SettingsError("the filter file does not exist", where=path, fix="check --bids-filter-file") from error
    except (OSError, ValueError) as error:
        raise SettingsError(f"the filter file is not readable JSON: {error}", where=path, fix="write it as for fMRIPrep") from error
    if not isinstance(queries, dict) or not all(isinstance(value, dict) for value in queries.values()):
        raise SettingsError("the filter file must map query names to filters", where=path, fix='e.g. {"bold": {"task": "rest"}}')
    return dict(queries.get(query, {}))


def matches_filters(entities: Mapping[str, str], filters: Mapping[str, Any]) -> bool:
    """Whether a file's entities satisfy pybids-style filters: a value, a list of values, or null for an absent entity."""
    for name, wanted in filters.items():
        found = entities.get(_LONG.get(name, name))
        allowed = wanted if isinstance(wanted, list) else [wanted]
        if found not in [None if value is None else str(value) for value in allowed] and not (found is not None and wanted == "*"):
            return False
    return True


def run_key(entities: Mapping[str, str]) -> RunKey:
    """Which run a file belongs to."""
    return RunKey(
        participant=entities["sub"],
        task=entities.get("task", ""),
        session=entities.get("ses"),
        acquisition=entities.get("acq"),
        direction=entities.get("dir"),
        run=entities.get("run"),
    )


def find_runs(root: Path, label: str, selection: Selection, *, space: str | None = None, resolution: str | None = None) -> list[RunFiles]:
    """The preprocessed runs of one participant in one space, sorted by name.

    Parameters
    ----------
    space, resolution
        Labels of ``space-`` and ``res-``. Without a space, each run's first of :data:`SPACE_ORDER`.

    Raises
    ------
    InputNotFoundError
        Nothing matches the selection, or no run exists in the space.
    InputDatasetError
        A run has two images, no brain mask, unreadable metadata or no repetition time.
    """
    runs: dict[RunKey, list[_Image]] = {}
    images, files = _index(root, label, selection)
    for image in images:
        # Single echoes and phase images are by-products, not the preprocessed run.
        if in_selection(image.entities, selection) and "echo" not in image.entities and image.entities.get("part") in (None, "mag"):
            runs.setdefault(run_key(image.entities), []).append(image)
    if not runs:
        raise InputNotFoundError(
            f"sub-{label} has no preprocessed BOLD that matches the selection",
            where=root / f"sub-{label}",
            fix="check --session-label, --task-id and --bids-filter-file; files must be named …_space-<S>_desc-preproc_bold.nii.gz",
        )
    parsed = [(parse_name(path.name), path) for path in files]
    ordered = sorted(runs.items(), key=lambda item: item[0].name)
    return [_run_files(key, _choose(key, found, space, resolution), parsed) for key, found in ordered]


@dataclass(frozen=True, kw_only=True)
class _Image:
    """A preprocessed image."""

    path: Path
    """Where it is."""
    entities: dict[str, str]
    """Of its name."""
    repetition_time: Any
    """``RepetitionTime`` of its metadata, inherited ones included; none where absent."""


def _index(root: Path, label: str, selection: Selection) -> tuple[list[_Image], list[Path]]:
    """The images of one participant that match the filters, and all of its files."""
    folder = root / f"sub-{label}"
    files = [path for path in walk_files(folder) if _ASIDE.isdisjoint(path.relative_to(folder).parts)]
    filters = read_filters(selection, "bold")
    chosen = _filtered(root, label, filters, selection) if filters else [path for path in files if _is_run(path)]
    sidecars = [path for path in (*root_sidecars(root), *files) if path.suffix == ".json"]
    images = [
        _Image(path=path, entities=parse_name(path.name)[0], repetition_time=_inherited("RepetitionTime", path, sidecars))
        for path in chosen
    ]
    return images, files


def _is_run(path: Path) -> bool:
    """Whether a name is that of a preprocessed run; without desc-preproc only CIFTI is one: a plain _bold.nii.gz is raw data."""
    entities, suffix, extension = parse_name(path.name)
    return suffix == "bold" and extension in _IMAGES and entities.get("desc", extension) in {"preproc", ".dtseries.nii"}


def _inherited(key: str, image: Path, sidecars: Sequence[Path]) -> Any:  # noqa: ANN401
    """A value of an image's metadata by BIDS's inheritance: of the nearest and most specific sidecar that states it; none where none does."""
    entities, suffix, _ = parse_name(image.name)
    above = {folder: depth for depth, folder in enumerate(image.parents)}
    ranked = []
    for path in sidecars:
        theirs, kind, _ = parse_name(path.name)
        if kind == suffix and path.parent in above and theirs.items() <= entities.items():
            ranked.append((above[path.parent], -len(theirs), path))
    for *_, path in sorted(ranked):
        try:
            values = dict(read_json(path))
        except UNINDEXABLE as error:
            raise InputDatasetError(
                f"the sidecar is unreadable: {error}", where=path, fix="a sidecar must be valid JSON of an object"
            ) from error
        if key in values:
            return values[key]
    return None


def _filtered(root: Path, label: str, filters: Mapping[str, Any], selection: Selection) -> list[Path]:
    """Images of one participant that pybids finds by the user's filters, which may name any entity and metadata that pybids knows.

    pybids is imported for them alone: it takes half of the start of a process.
    """
    from bids.layout import Query

    special = {None: Query.NONE, "*": Query.ANY}
    wanted = {name: special.get(value, value) if value is None or isinstance(value, str) else value for name, value in filters.items()}
    defaults: dict[str, Any] = {"suffix": "bold", "extension": list(_IMAGES), "desc": ["preproc", Query.NONE]}
    with tempfile.TemporaryDirectory(prefix="brainfm-") as folder:
        window = Path(folder)
        layout = _layout(root, label, window)
        try:
            found = layout.get(**{**defaults, **wanted, "subject": label})
        except (ValueError, TypeError) as error:
            raise SettingsError(
                f"the filters of 'bold' are not understood: {error}", where=selection.bids_filter_file, fix="use pybids entity names"
            ) from error
        runs = [file.path for file in found if "desc" in file.entities or file.path.endswith(".dtseries.nii")]
        return [root / Path(path).relative_to(window) for path in runs]


def _layout(root: Path, label: str, window: Path) -> Any:  # noqa: ANN401  (pybids has no types)
    """An index of one participant, seen through the folder ``window`` of links: pybids would look at every entry of the root."""
    from bids.layout import BIDSLayout, BIDSLayoutIndexer

    for name in (f"sub-{label}", "dataset_description.json", *(path.name for path in root_sidecars(root))):
        if (root / name).exists():
            (window / name).symlink_to((root / name).absolute())
    ignored = [re.compile(r"/\."), re.compile(rf"/(figures|log|{'|'.join(sorted(_ASIDE))})(/|$)")]
    indexer = BIDSLayoutIndexer(validate=False, ignore=ignored)
    try:
        return BIDSLayout(window, validate=False, is_derivative=True, config=["bids", "derivatives"], indexer=indexer)
    except UNINDEXABLE as error:
        raise InputDatasetError(
            f"the files of sub-{label} cannot be indexed: {error}".replace(str(window), str(root)), where=root,
            fix="mend the named JSON file; a sidecar must be valid JSON",
        ) from error  # fmt: skip


def _choose(key: RunKey, images: Sequence[_Image], space: str | None, resolution: str | None) -> _Image:
    spaces = sorted({image.entities["space"] for image in images if "space" in image.entities})
    wanted = space or next((name for name in SPACE_ORDER if name in spaces), None)
    if wanted is None or wanted not in spaces:
        asked = f"space {space}" if space else "a standard space"
        raise InputNotFoundError(
            f"{key.name} has no image in {asked}; it has {', '.join(spaces) or 'its own space only'}",
            where=images[0].path.parent,
            fix="choose one with --set space=NAME, or preprocess with that output space",
        )
    kept = [image for image in images if image.entities.get("space") == wanted]
    if resolution is not None:
        kept = [image for image in kept if image.entities.get("res") == resolution]
        if not kept:
            raise InputNotFoundError(
                f"{key.name} has no image in {wanted} at res-{resolution}",
                where=images[0].path.parent,
                fix="check --set resolution",
            )
    if len(kept) > 1:
        names = ", ".join(sorted(image.path.name for image in kept))
        raise InputDatasetError(
            f"{key.name} has several images: {names}",
            where=kept[0].path.parent,
            fix="choose one with --set resolution=LABEL or --bids-filter-file",
        )
    return kept[0]


def _run_files(key: RunKey, chosen: _Image, files: Sequence[tuple[tuple[dict[str, str], str, str], Path]]) -> RunFiles:
    entities, bold = chosen.entities, chosen.path
    if not bold.exists():
        raise InputDatasetError("the image is a broken link", where=bold, fix="fetch its content first, e.g. 'datalad get'")
    masks, confounds = [], []
    for (found, suffix, extension), path in files:
        if "sub" not in found or run_key(found) != key:
            continue
        same_grid = all(found.get(name) == entities.get(name) for name in ("space", "res"))
        if suffix == "mask" and found.get("desc") == "brain" and extension in (".nii.gz", ".nii") and same_grid:
            masks.append(path)
        elif suffix in {"timeseries", "regressors"} and found.get("desc") == "confounds" and extension == ".tsv":
            confounds.append(path)
    cifti = bold.name.endswith(".dtseries.nii")
    if not masks and not cifti:
        raise InputDatasetError("the run has no brain mask", where=bold, fix="it needs …_desc-brain_mask.nii.gz on the same grid beside it")
    time = chosen.repetition_time
    if not isinstance(time, int | float) or isinstance(time, bool) or not 0 < time < 60:
        raise InputDatasetError(
            f"RepetitionTime is {'missing' if time is None else repr(time)}",
            where=bold,
            fix="state RepetitionTime in seconds in the image's JSON",
        )
    return RunFiles(
        key=key,
        bold=bold,
        space=entities["space"],
        mask=None if cifti else min(masks),
        confounds=min(confounds) if confounds else None,
        repetition_time_s=float(time),
    )


def _root(dataset: Path) -> Path:
    # A HALFpipe working folder keeps its derivative, and fMRIPrep's, one level down.
    if not list_participants(dataset):
        for inner in (dataset / "derivatives" / "halfpipe", dataset / "derivatives" / "fmriprep"):
            if inner.is_dir() and list_participants(inner):
                return inner
    return dataset


def _kind(root: Path) -> Kind | None:
    for label in list_participants(root)[:20]:  # the first participants may have failed upstream
        series = False
        for path in walk_files(root / f"sub-{label}"):
            entities, suffix, extension = parse_name(path.name)
            if suffix == "bold" and (extension == ".dtseries.nii" or (extension in _IMAGES and entities.get("desc") == "preproc")):
                return "images"
            series = series or (suffix == "timeseries" and extension == ".tsv" and ("atlas" in entities or "seg" in entities))
        if series:
            return "series"
    return None


def _producer(root: Path) -> tuple[str, str]:
    try:
        first = read_json(root / "dataset_description.json")["GeneratedBy"][0]
        return str(first.get("Name", "")), str(first.get("Version", ""))
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
        return ("HALFpipe", "") if root.name == "halfpipe" else ("", "")
