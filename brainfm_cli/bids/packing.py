"""Pack the region series of one or several datasets into one cohort, streamed: one run in memory at a time."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfm_cli.bids.cohort import Cohort, CohortAtlas, CohortWriter, participant_key
from brainfm_cli.bids.inputs import Source, choose_participants, root_sidecars
from brainfm_cli.bids.series_inputs import SeriesFiles, as_run, find_series, read_series
from brainfm_cli.errors import InputNotFoundError
from brainfm_cli.provenance import outputs_hold, read_record, record_path

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from brainfm_cli.bids.codings import LabelTable
    from brainfm_cli.bids.labels import Harmonised
    from brainfm_cli.config import Selection
    from brainfm_cli.records import ParcellatedRun, RegionTable

# Folder names that say what made a dataset and not whose data it is.
_GENERIC = {"derivatives", "fmriprep", "xcpd", "halfpipe", "gigaconnectome", "brainfm", "preprocess", "parcellate", "output", "out", "cohort"}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PackedDataset:
    """One dataset of a cohort, and what of it is packed."""

    name: str
    """Name in participant keys and in the index."""
    source: Source
    """Where its series lie."""
    table: Path | None
    """participants.tsv, none where there is none."""
    series: dict[str, list[SeriesFiles]] = field(default_factory=dict)
    """Series by participant; empty for a packed cohort."""
    notes: tuple[str, ...] = ()
    """Participants left out and why."""

    @property
    def inputs(self) -> list[Path]:
        """Every file whose change makes the cohort stale."""
        tables = [self.table] if self.table else []
        if self.source.kind == "cohort":
            return sorted([*tables, *(path for path in _cohort_folder(self.source).iterdir() if path.is_file())])
        files = [path for runs in self.series.values() for run in runs for path in (run.series, run.coverage, run.motion, run.outliers, *run.sidecars) if path]  # fmt: skip
        return sorted({*tables, *files}, key=str)


@dataclass(frozen=True, kw_only=True)
class PackingRules:
    """What decides which runs are packed and how."""

    min_coverage: float
    """Regions below are NaN."""
    min_frames: int
    """Shorter runs are left out."""
    repetition_time_s: float | None
    """For series whose files do not say."""
    site_column: str | None
    """Column of participants.tsv that holds the site."""
    labels: LabelTable
    """Declared codings."""
    atlases: tuple[str, ...]
    """Atlas labels to pack; all where empty."""


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What was packed."""

    files: tuple[Path, ...]
    """Files of the cohort."""
    harmonised: Harmonised
    """Its participants."""
    coverage: dict[tuple[str, str, str, str], tuple[float, int]]
    """Mean coverage and number of regions without signal by (participant key, session, run, atlas)."""
    notes: tuple[str, ...]
    """Runs left out and why."""


def dataset_name(folder: Path) -> str:
    """A name for an unnamed dataset: the last part of its path that is not just the name of a program."""
    for part in reversed(folder.resolve().parts):
        name = re.sub(r"[^A-Za-z0-9]", "", part)
        if name and name.lower() not in _GENERIC and not name.lower().startswith("brainfm"):
            return name
    return "dataset"


def open_dataset(
    name: str, source: Source, table: Path | None, selection: Selection, *, records: Path | None = None, everybody: bool = True
) -> PackedDataset:
    """One dataset with its series found; ``records`` is the folder of our own derivative whose unfinished participants are left out."""
    if source.kind == "cohort":
        own = _cohort_folder(source) / "participants.tsv"
        return PackedDataset(name=name, source=source, table=own if own.is_file() else table)
    labels = choose_participants(source.root, selection if everybody else selection.model_copy(update={"participant_label": ()}))
    notes = []
    if records is not None:
        unfinished = [label for label in labels if not _finished(records, label)]
        if unfinished:
            shown = ", ".join(f"sub-{label}" for label in unfinished[:5]) + (
                f" and {len(unfinished) - 5} more" if len(unfinished) > 5 else ""
            )
            notes.append(f"{name}: left out, their participant level failed, was interrupted or its files changed: {shown}")
        labels = [label for label in labels if label not in set(unfinished)]
    sidecars = root_sidecars(source.root)
    series: dict[str, list[SeriesFiles]] = {}
    for label in labels:
        try:
            series[label] = find_series(source.root, label, selection, sidecars=sidecars)
        except InputNotFoundError:
            notes.append(f"{name}: sub-{label} has no series that match the selection")
    if not series:
        raise InputNotFoundError(
            f"nobody in {name} has region series to pack", where=source.root, fix="run 'brainfm parcellate INPUT OUTPUT participant' first"
        )
    return PackedDataset(name=name, source=source, table=table, series=series, notes=tuple(notes))


def pack(
    root: Path,
    datasets: Sequence[PackedDataset],
    rules: PackingRules,
    regions_of: Callable[[ParcellatedRun, tuple[str, ...], bool, Path], RegionTable],
) -> Packed:
    """Write ``root`` (a ``cohort/`` folder) from the datasets; nothing appears before everything is read.

    ``regions_of(run, names, named, dataset root)`` gives the region table of a ready-made series.

    Raises
    ------
    InputDatasetError
        A series is unreadable, an atlas differs between datasets, or labels do not fit their declaration.
    InputNotFoundError
        No run is long enough to be packed.
    """
    from brainfm_cli.bids.labels import People, harmonise

    several = len(datasets) > 1
    people = [People(dataset=one.name, table=one.table, labels=_labels(one)) for one in datasets]
    harmonised = harmonise(people, rules.labels, site_column=rules.site_column)
    notes = [note for one in datasets for note in one.notes]
    coverage: dict[tuple[str, str, str, str], tuple[float, int]] = {}
    packed: set[str] = set()
    with CohortWriter(root) as writer:
        for one in datasets:
            if one.source.kind == "cohort":
                packed |= _copy_cohort(writer, one, harmonised, rules, several=several)
            else:
                packed |= _pack_series(writer, one, harmonised, rules, regions_of, coverage, notes, several=several)
        if not packed:
            raise InputNotFoundError("no run is long enough to be packed", where=root, fix=f"lower min_frames ({rules.min_frames})")
        frame = harmonised.frame.loc[[key in packed for key in harmonised.frame.index]]
        files = writer.finish(frame, harmonised.descriptions)
    return Packed(files=tuple(files), harmonised=harmonised, coverage=coverage, notes=(*notes, *harmonised.notes))


def _labels(one: PackedDataset) -> tuple[str, ...]:
    if one.source.kind == "cohort":
        return tuple(dict.fromkeys(Cohort.open(_cohort_folder(one.source)).index["participant"]))
    return tuple(one.series)


def _pack_series(
    writer: CohortWriter,
    one: PackedDataset,
    harmonised: Harmonised,
    rules: PackingRules,
    regions_of: Callable[[ParcellatedRun, tuple[str, ...], bool, Path], RegionTable],
    coverage: dict[tuple[str, str, str, str], tuple[float, int]],
    notes: list[str],
    *,
    several: bool,
) -> set[str]:
    packed = set()
    known: dict[tuple[str, tuple[str, ...]], RegionTable] = {}
    for label, runs in one.series.items():
        key = participant_key(one.name, label, several=several)
        for files in runs:
            if rules.atlases and files.atlas not in rules.atlases:
                continue
            ready = read_series(files, repetition_time_s=rules.repetition_time_s)
            run, run_notes = as_run(ready, min_coverage=rules.min_coverage)
            notes += [f"{one.name}: {note}" for note in run_notes] if one.source.producer != "brainfm" else []
            if len(run.series) < rules.min_frames:
                notes.append(f"{one.name}: {run.key.name} left out, {len(run.series)} frames are fewer than {rules.min_frames}")
                continue
            if (run.atlas, ready.names) not in known:
                known[run.atlas, ready.names] = regions_of(run, ready.names, ready.named, one.source.root)
            regions = known[run.atlas, ready.names]
            writer.add_atlas(CohortAtlas(label=run.atlas, regions=regions, template=run.space or "unknown"))
            row = _row(one.name, key, run, harmonised.sites[key], mean_fd=ready.mean_fd, kept_fraction=ready.kept_fraction)
            writer.add_run(run.atlas, run.series, row)
            mean = float(np.nanmean(run.coverage)) if np.isfinite(run.coverage).any() else float("nan")
            coverage[key, row["session"], row["run"], run.atlas] = (mean, int(np.isnan(run.series).all(0).sum()))
            packed.add(key)
    return packed


def _copy_cohort(writer: CohortWriter, one: PackedDataset, harmonised: Harmonised, rules: PackingRules, *, several: bool) -> set[str]:
    cohort = Cohort.open(_cohort_folder(one.source))
    packed = set()
    rows: Any = cohort.index.itertuples()  # pandas gives its columns no types
    for row in rows:
        if (rules.atlases and row.atlas not in rules.atlases) or row.frames < rules.min_frames:
            continue
        key = participant_key(one.name, str(row.participant), several=several)
        writer.add_atlas(cohort.atlases[row.atlas])
        values: dict[str, Any] = {
            name: getattr(row, name) for name in ("session", "run", "site", "repetition_time", "mean_fd", "kept_fraction")
        }
        site = harmonised.sites[key] or values["site"]
        writer.add_run(
            row.atlas, cohort.series(row), {**values, "dataset": one.name if several else row.dataset, "participant": key, "site": site}
        )
        packed.add(key)
    return packed


def _row(dataset: str, key: str, run: ParcellatedRun, site: str, *, mean_fd: float, kept_fraction: float) -> dict[str, Any]:
    parts = [f"{name}-{value}" for name, value in run.key.entities.items() if name not in {"sub", "ses"} and value]
    return {
        "dataset": dataset,
        "participant": key,
        "session": run.key.session or "",
        "run": "_".join(parts),
        "site": site,
        "repetition_time": run.repetition_time_s,
        "mean_fd": mean_fd,
        "kept_fraction": kept_fraction,
    }


def _finished(output: Path, label: str) -> bool:
    record = read_record(record_path(output, f"sub-{label}"))
    return record is not None and record.status == "done" and outputs_hold(record, output)


def _cohort_folder(source: Source) -> Path:
    inner = source.given / "cohort"
    return inner if inner.is_dir() else source.given
