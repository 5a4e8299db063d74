"""Region series that were parcellated before: our own, XCP-D, giga_connectome and HALFpipe, found by name and read as they are.

================  =======================================================================================
producer          names
================  =======================================================================================
brainfm, XCP-D 26 ``_space-S_atlas-A_stat-mean_timeseries.tsv``, ``_stat-coverage_bold.tsv``
XCP-D 0.7-0.14    the same with ``seg-A`` instead of ``atlas-A``
XCP-D 0.6         ``_space-S_atlas-A_timeseries.tsv``, ``_coverage.tsv``
giga_connectome   ``_seg-Schaefer2018100Parcels7Networks_desc-denoiseSimple_timeseries.tsv``, columns 0..N-1
HALFpipe          ``func/task-T/…_feature-F_atlas-A_timeseries.tsv`` without a header
================  =======================================================================================
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np

from brainfm_cli.bids.inputs import in_selection, matches_filters, read_filters, run_key, walk_files
from brainfm_cli.bids.names import atlas_label, parse_name
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError
from brainfm_cli.records import ParcellatedRun

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    from brainfm_cli.config import Selection
    from brainfm_cli.records import RunKey

_USED = re.compile(r"_(timeseries|bold|coverage|motion|outliers)\.")
_SCHAEFER = re.compile(r"Schaefer2018(\d+)Parcels(7|17)Networks")
_MEAN_FD = ("MeanFramewiseDisplacement", "FDMean", "MeanFD")
_COVERAGE = ("RegionCoverage", "Coverage")


@dataclass(frozen=True, kw_only=True)
class SeriesFiles:
    """The files of one run in one atlas."""

    key: RunKey
    """Which run."""
    atlas: str
    """Atlas label in entity form."""
    space: str | None
    """Template of the ``space-`` entity, none where the producer does not say."""
    producer: str
    """brainfm, XCP-D, giga_connectome or HALFpipe."""
    series: Path
    """The series table."""
    coverage: Path | None
    """Table of the share of each region inside the mask."""
    motion: Path | None
    """Table with framewise displacement."""
    outliers: Path | None
    """Table with 1 for every frame that the producer censored."""
    sidecars: tuple[Path, ...]
    """JSON files whose metadata apply, the more specific later."""


@dataclass(frozen=True, kw_only=True)
class ReadySeries:
    """A run's region series as another program wrote them."""

    files: SeriesFiles
    """Where they come from."""
    names: tuple[str, ...]
    """Region names; numbers where the producer gives none."""
    named: bool
    """Whether the producer gives names."""
    values: NDArray[np.float64]
    """(frames, regions); regions without signal are NaN throughout."""
    coverage: NDArray[np.float64]
    """(regions,) share inside the mask, NaN where the producer does not say."""
    fd: NDArray[np.float64] | None
    """Framewise displacement of every frame before censoring, millimetres."""
    kept: NDArray[np.bool_] | None
    """Which frames the producer kept, none where it does not say."""
    repetition_time_s: float
    """Seconds between frames."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """Merged sidecars."""

    @property
    def mean_fd(self) -> float:
        """Mean framewise displacement in millimetres, NaN where unknown."""
        if self.fd is not None and np.isfinite(self.fd).any():
            return float(np.nanmean(self.fd))
        return next((float(value) for name in _MEAN_FD if _is_number(value := self.metadata.get(name))), float("nan"))

    @property
    def kept_fraction(self) -> float:
        """Share of frames kept, NaN where unknown."""
        if self.kept is not None:
            return float(self.kept.mean())
        stated = self.metadata.get("KeptFraction")
        return float(stated) if _is_number(stated) else float("nan")


def find_series(root: Path, label: str, selection: Selection, *, sidecars: Sequence[Path] = ()) -> list[SeriesFiles]:
    """The ready-made series of one participant, sorted by run and atlas.

    ``sidecars`` are the JSON files at the dataset's root (:func:`brainfm_cli.bids.inputs.root_sidecars`).

    Raises
    ------
    InputNotFoundError
        Nothing matches the selection.
    InputDatasetError
        A run has two series in one atlas.
    """
    folder = root / f"sub-{label}"
    # Matrices are most of the files, and none of what is looked for.
    parsed = [(path, *parse_name(path.name)) for path in walk_files(folder, _USED)]
    jsons = [(path, *parse_name(path.name)[:2]) for path in sidecars]
    jsons += [(path, entities, suffix) for path, entities, suffix, extension in parsed if extension == ".json"]
    tables: dict[RunKey, list[tuple[Path, dict[str, str], str]]] = {}
    for path, entities, suffix, extension in parsed:
        if extension == ".tsv" and "sub" in entities:
            tables.setdefault(run_key(entities), []).append((path, entities, suffix))
    filters = read_filters(selection, "timeseries")
    found: dict[tuple[str, str], SeriesFiles] = {}
    for path, entities, suffix, extension in parsed:
        if suffix != "timeseries" or extension != ".tsv" or entities.get("sub") != label:
            continue
        label_of_atlas = _atlas(entities)
        if label_of_atlas is None:
            continue
        if entities.get("stat", "mean") != "mean" or not in_selection(entities, selection) or not matches_filters(entities, filters):
            continue
        files = _series_files(path, entities, label_of_atlas, tables, jsons)
        twin = found.get((files.key.name, files.atlas))
        if twin is not None:
            raise InputDatasetError(
                f"{files.key.name} has two series in {files.atlas}: {twin.series.name} and {path.name}",
                where=path.parent,
                fix='choose one with --bids-filter-file, e.g. {"timeseries": {"space": "MNI152NLin2009cAsym", "desc": "denoiseSimple"}}',
            )
        found[files.key.name, files.atlas] = files
    if not found:
        raise InputNotFoundError(
            f"sub-{label} has no region series that match the selection", where=folder, fix="check --session-label, --task-id and --bids-filter-file"
        )  # fmt: skip
    return [found[key] for key in sorted(found)]


def read_series(files: SeriesFiles, *, repetition_time_s: float | None = None) -> ReadySeries:
    """One run's series, checked.

    ``repetition_time_s`` serves datasets whose files do not say.

    Raises
    ------
    InputDatasetError
        Unreadable table, repeated names, values that are no finite numbers, companions of another length, or no repetition time.
    """
    metadata = _merge(files.sidecars)
    names, named, values = _read_table(files)
    kept = _kept(files, len(values))
    return ReadySeries(
        files=files,
        names=names,
        named=named,
        values=values,
        coverage=_coverage(files, metadata, names, named=named),
        fd=_framewise_displacement(files),
        kept=kept,
        repetition_time_s=_repetition_time(files, metadata, repetition_time_s),
        metadata=metadata,
    )


def as_run(ready: ReadySeries, *, min_coverage: float) -> tuple[ParcellatedRun, list[str]]:
    """The series as a run of ours, regions below the coverage rule or without variance set to NaN, and notes that name them."""
    values = ready.values.copy()  # noqa: PD011  (no pandas object)
    with np.errstate(invalid="ignore"):
        thin = ready.coverage < min_coverage
        flat = ~np.isnan(values).any(0) & (np.ptp(values, axis=0) == 0)
    values[:, thin | flat] = np.nan
    notes = []
    lost = [name for name, gone in zip(ready.names, np.asarray(np.isnan(values).all(axis=0)).tolist(), strict=True) if gone]
    if lost:
        shown = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        notes.append(
            f"{ready.files.key.name}, {ready.files.atlas}: no usable signal in {len(lost)} of {len(ready.names)} regions ({shown})"
        )
    run = ParcellatedRun(
        key=ready.files.key,
        atlas=ready.files.atlas,
        space=ready.files.space or "",
        series=values,
        coverage=ready.coverage,
        repetition_time_s=ready.repetition_time_s,
    )
    return run, notes


def _series_files(
    path: Path,
    entities: dict[str, str],
    atlas: str,
    tables: Mapping[RunKey, Sequence[tuple[Path, dict[str, str], str]]],
    jsons: Sequence[tuple[Path, dict[str, str], str]],
) -> SeriesFiles:
    key = run_key(entities)
    same_run = tables[key]
    coverage = [p for p, e, s in same_run if (s == "coverage" or e.get("stat") == "coverage") and _atlas(e) == atlas and e.get("space") == entities.get("space")]  # fmt: skip
    # XCP-D writes the filtered motion beside the plain one: take the plain one where both exist.
    motion = sorted((p for p, _, s in same_run if s == "motion"), key=lambda p: ("desc-filtered" in p.name, p.name))
    outliers = [p for p, _, s in same_run if s == "outliers"]
    return SeriesFiles(
        key=key,
        atlas=atlas,
        space=entities.get("space") or ("MNI152NLin2009cAsym" if "feature" in entities else None),  # HALFpipe has this space only
        producer=_producer(entities),
        series=path,
        coverage=coverage[0] if coverage else None,
        motion=motion[0] if motion else None,
        outliers=min(outliers) if outliers else None,
        sidecars=_applicable(entities, path, jsons),
    )


def _applicable(entities: dict[str, str], path: Path, jsons: Sequence[tuple[Path, dict[str, str], str]]) -> tuple[Path, ...]:
    """JSON files that apply to the series: those of its images (for the repetition time), then its own, specific ones last."""
    items = entities.items()
    own = [p for p, e, suffix in jsons if suffix == "timeseries" and e.items() <= items and p.parent in path.parents]
    image = {name: value for name, value in entities.items() if name not in {"atlas", "seg", "scale", "stat"}}
    ours = [p for p, e, suffix in jsons if suffix == "bold" and "stat" not in e and {n: v for n, v in e.items() if n not in {"desc", "res", "den"}}.items() <= image.items()]  # fmt: skip
    depth = lambda p: (len(p.parts), len(p.name))  # noqa: E731
    return (*sorted(ours, key=depth), *sorted(own, key=depth))


def _atlas(entities: Mapping[str, str]) -> str | None:
    label = atlas_label(entities)
    if label is None and "seg" in entities:
        schaefer = _SCHAEFER.fullmatch(entities["seg"])  # giga_connectome
        label = f"Schaefer2018_seg-{schaefer[2]}n_scale-{schaefer[1]}" if schaefer else entities["seg"]
    return label


def _producer(entities: Mapping[str, str]) -> str:
    if "feature" in entities:
        return "HALFpipe"
    if entities.get("desc", "").startswith("denoise"):
        return "giga_connectome"
    return "XCP-D"


def _merge(sidecars: Sequence[Path]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for path in sidecars:
        try:
            values = read_json(path)
        except (OSError, ValueError) as error:
            raise InputDatasetError(f"the JSON is unreadable: {error}", where=path, fix="mend the file") from error
        if isinstance(values, dict):
            merged |= values
    return merged


def _read_table(files: SeriesFiles) -> tuple[tuple[str, ...], bool, NDArray[np.float64]]:
    import pandas as pd

    path = files.series
    header: int | None = None if files.producer == "HALFpipe" else 0
    try:
        table = pd.read_csv(path, sep="\t", header=header, na_values=["n/a"], keep_default_na=True, dtype=np.float64)
        first = [] if header is None else path.open(encoding="utf-8").readline().rstrip("\r\n").split("\t")
    except pd.errors.EmptyDataError as error:
        raise InputDatasetError("the series table is empty", where=path, fix="make it again, or leave the run out") from error
    except (OSError, ValueError) as error:
        raise InputDatasetError(
            f"the series table is unreadable: {error}",
            where=path,
            fix="it must be a tab-separated table of numbers with region names on top",
        ) from error
    # pandas renames repeated columns, so the header is judged as it stands in the file.
    named = header is not None and not all(name.isdigit() for name in first)
    if header is not None and len(set(first)) != len(first):
        repeated = sorted({name for name in first if first.count(name) > 1})
        raise InputDatasetError(f"region names repeat: {', '.join(repeated[:5])}", where=path, fix="make the names unique")
    if header is not None and any(_is_decimal(name) for name in first):
        raise InputDatasetError("the series table has no header of region names", where=path, fix="write one name per column on top")
    values = table.to_numpy()
    if len(values) < 2 or not values.size:
        frames = "one frame" if values.size else "no frames"
        raise InputDatasetError(f"the series table holds {frames}", where=path, fix="make it again, or leave the run out")
    names = tuple(first) if named else tuple(f"region{number + 1:04d}" for number in range(values.shape[1]))
    missing = np.isnan(values)
    partial = missing.any(0) & ~missing.all(0)
    if partial.any() or np.isinf(values).any():
        bad = names[int(np.flatnonzero(partial | np.isinf(values).any(0))[0])]
        raise InputDatasetError(
            f"region {bad} has frames without a finite number", where=path, fix="write censored series, or n/a for the whole region"
        )
    return names, named, values


def _coverage(files: SeriesFiles, metadata: Mapping[str, Any], names: tuple[str, ...], *, named: bool) -> NDArray[np.float64]:
    import pandas as pd

    stated = next((metadata[name] for name in _COVERAGE if isinstance(metadata.get(name), list)), None)
    if files.coverage is None:
        fits = stated is not None and len(stated) == len(names) and all(_is_number(value) for value in stated)
        return np.asarray(stated if fits else np.full(len(names), np.nan), float)
    try:
        table = pd.read_csv(files.coverage, sep="\t", na_values=["n/a"])
    except (OSError, ValueError) as error:
        raise InputDatasetError(f"the coverage table is unreadable: {error}", where=files.coverage, fix="make it again") from error
    if "Node" in table.columns:  # one row per region
        table = table.set_index("Node").iloc[:, :1].T
    absent = [name for name in names if named and name not in table.columns]
    if absent or table.shape[0] != 1 or (not named and table.shape[1] != len(names)):
        raise InputDatasetError(
            f"the coverage table does not fit the series{f': it lacks {absent[0]}' if absent else ''}",
            where=files.coverage, fix="make both again with one version of the producer",
        )  # fmt: skip
    row = table.iloc[0]
    return (row[list(names)] if named else row).to_numpy(float)


def _framewise_displacement(files: SeriesFiles) -> NDArray[np.float64] | None:
    if files.motion is None:
        return None
    table = _companion(files.motion)
    return table["framewise_displacement"].to_numpy(float) if "framewise_displacement" in table else None


def _kept(files: SeriesFiles, frames: int) -> NDArray[np.bool_] | None:
    if files.outliers is None:
        return None
    kept = np.asarray(~(_companion(files.outliers).fillna(0).to_numpy(float) > 0).any(1), bool)
    if kept.sum() == frames:
        return kept
    if len(kept) == frames:  # the producer interpolated censored frames and kept them
        return np.ones(frames, bool)
    raise InputDatasetError(
        f"the series has {frames} frames, the outliers table {len(kept)} of which {int(kept.sum())} are kept",
        where=files.outliers, fix="make both again with one version of the producer",
    )  # fmt: skip


def _companion(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        return pd.read_csv(path, sep="\t", na_values=["n/a"])
    except (OSError, ValueError) as error:
        raise InputDatasetError(f"the table is unreadable: {error}", where=path, fix="make it again") from error


def _repetition_time(files: SeriesFiles, metadata: Mapping[str, Any], given: float | None) -> float:
    time, rate = metadata.get("RepetitionTime"), metadata.get("SamplingFrequency")
    if _is_number(time) and 0 < float(time) < 60:
        return float(time)
    if _is_number(rate) and float(rate) > 1 / 60:
        return 1 / float(rate)
    if given is not None:
        return given
    raise InputDatasetError(
        "no repetition time is stated", where=files.series, fix="state it with --set repetition_time_s=SECONDS, or in the series' JSON"
    )


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value  # noqa: PLR0124  (NaN)


def _is_decimal(text: str) -> bool:
    return re.fullmatch(r"-?\d+\.\d+(?:[eE][+-]?\d+)?", text) is not None
