"""Group level: finished participants, and further datasets, packed into one cohort with its quality table and page."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from brainfm_cli.atlases.datasets import dataset_atlases
from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.bids.derivatives import write_json, write_text, write_tsv
from brainfm_cli.bids.inputs import Source, list_participants, open_source
from brainfm_cli.bids.packing import PackedDataset, PackingRules, dataset_name, open_dataset, pack
from brainfm_cli.bids.people import copy_participants, find_participants_table
from brainfm_cli.bids.units import Unit, UnitResult, plan_units, run_units
from brainfm_cli.errors import EXIT_OK, InputDatasetError, InputNotFoundError, UsageError
from brainfm_cli.provenance import RECORDS_FOLDER, brainfm_version, read_record, record_path
from brainfm_cli.stages.parcellate.pages import restamp
from brainfm_cli.stages.parcellate.results import atlas_labels, region_lookup

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from brainfm_cli.bids.derivatives import OutputDataset
    from brainfm_cli.config import Invocation
    from brainfm_cli.stages.parcellate.settings import ParcellateSettings

log = logging.getLogger(__name__)
Coverage = dict[tuple[str, str, str, str], tuple[float, int]]
_PARCELLATE_FIRST = "run 'brainfm parcellate {} OUTPUT participant' first"


def run(call: Invocation, settings: ParcellateSettings, source: Source, dataset: OutputDataset) -> int:
    """Pack the cohort unless it is current; gives back the exit code."""
    datasets = _datasets(call, source)
    rules = PackingRules(
        min_coverage=settings.min_coverage,
        min_frames=settings.min_frames,
        repetition_time_s=settings.repetition_time_s,
        site_column=settings.site_column,
        labels=settings.labels,
        atlases=_packed_atlases(settings, datasets, call.datasets),
    )
    choices = dataset.root / "logs" / "group.yaml"
    text = _choices(settings, datasets)
    changed = not choices.is_file() or choices.read_text(encoding="utf-8") != text
    if changed and not call.dry_run:
        write_text(choices, text)
    table = find_participants_table(source.given)
    described = [table.with_suffix(".json")] if table is not None and table.with_suffix(".json").is_file() else []
    inputs = dict.fromkeys([*described, *(path for one in datasets for path in one.inputs)])
    unit = Unit(
        name="group",
        inputs=(*([] if changed and call.dry_run else [choices]), *inputs),
        work=pack_cohort,
        arguments={
            "root": dataset.root,
            "datasets": tuple(datasets),
            "rules": rules,
            "named": tuple(sorted(call.datasets.items())),
            "table": table,
        },
    )
    if call.dry_run:
        state = plan_units(dataset, [unit])["group"]
        _print_plan(call, datasets, rules, "stale" if changed and state == "current" else state)
        return EXIT_OK
    if call.reports_only:
        return _rebuild(dataset, datasets)
    return run_units(dataset, [unit], call.execution)


def pack_cohort(
    root: Path,
    datasets: tuple[PackedDataset, ...],
    rules: PackingRules,
    named: tuple[tuple[str, Path], ...],
    table: Path | None,
) -> UnitResult:
    """Write ``cohort/``, the participants table, the quality table and ``group.html``."""
    packed = pack(root / "cohort", datasets, rules, region_lookup(dict(named)))
    outputs = [*packed.files]
    own = list_participants(root)
    if table is not None and own:
        outputs += copy_participants(table, root, own)
    outputs += _write_quality(root, datasets, packed.coverage, packed.notes)
    for note in packed.notes:
        log.warning("%s", note)
    return UnitResult(outputs=tuple(outputs), notes=packed.notes)


def _write_quality(root: Path, datasets: Sequence[PackedDataset], coverage: Coverage, notes: Sequence[str]) -> list[Path]:
    from brainfm_cli.reports.quality import QC_COLUMNS, assess, quality_page

    assessment = assess(Cohort.open(root / "cohort"), coverage)
    names = ", ".join(one.name for one in datasets)
    page = quality_page(assessment, title=f"Quality of {names}", notes=tuple(notes), methods=_methods(datasets))
    return [
        write_tsv(root / "group_qc.tsv", assessment.table),
        write_json(root / "group_qc.json", {name: {"Description": text} for name, text in QC_COLUMNS.items()}),
        write_text(root / "group.html", page.render()),
    ]


def _rebuild(dataset: OutputDataset, datasets: Sequence[PackedDataset]) -> int:
    record = read_record(record_path(dataset.root, "group"))
    table = dataset.root / "group_qc.tsv"
    if record is None or record.status != "done" or not table.is_file():
        raise InputNotFoundError("there is no finished cohort to report on", where=dataset.root, fix="run without --reports-only first")
    written = _write_quality(dataset.root, datasets, _read_coverage(table), record.notes)
    restamp(dataset, record, written)
    return EXIT_OK


def _read_coverage(table: Path) -> Coverage:
    """Coverage of every run from the quality table itself, which is written again from it."""
    import pandas as pd

    text = dict.fromkeys(("participant_id", "session", "run", "atlas"), str)
    try:
        frame = pd.read_csv(table, sep="\t", dtype=text, na_values=["n/a"], keep_default_na=False)
        rows = frame[[*text, "mean_coverage", "missing_regions"]].fillna({"session": "", "run": ""})
    except (OSError, ValueError, KeyError) as error:
        raise InputDatasetError(f"the quality table is unreadable: {error}", where=table, fix="run without --reports-only") from error
    return {(key, session, run, atlas): (float(mean), int(lost)) for key, session, run, atlas, mean, lost in rows.itertuples(index=False)}


def _methods(datasets: Sequence[PackedDataset]) -> str:
    made = [f"{one.name} ({one.source.producer or 'unknown program'} {one.source.version}".rstrip() + ")" for one in datasets]
    return (
        f"Region series of {', '.join(made)} were packed into one cohort with brainfm {brainfm_version()}; runs that failed are left out."
    )


def _datasets(call: Invocation, source: Source) -> list[PackedDataset]:
    """What is packed: this folder's own participants (or ready-made series of the input), then ``--datasets``."""
    found = []
    name, table = dataset_name(call.input_dir), find_participants_table(source.given)
    others = _others(call)
    if list_participants(call.output_dir) if call.output_dir.is_dir() else []:
        own = Source(given=call.output_dir, root=call.output_dir, kind="series", producer="brainfm", version=brainfm_version())
        found.append(open_dataset(name, own, table, call.selection, records=call.output_dir))
    elif source.kind != "images":
        found.append(open_dataset(name, source, table, call.selection))
    elif not others:
        raise InputNotFoundError("no participant is parcellated yet", where=call.output_dir, fix=_PARCELLATE_FIRST.format(call.input_dir))
    for key, other in others.items():
        if found and key == name:
            raise UsageError(f"two datasets are called '{key}': the input and one of --datasets", fix=f"rename it: --datasets {key}2=DIR")
        records = other.given if (other.given / RECORDS_FOLDER).is_dir() and other.kind == "series" else None
        found.append(open_dataset(key, other, find_participants_table(other.given), call.selection, records=records, everybody=False))
    return found


def _others(call: Invocation) -> dict[str, Source]:
    sources = {}
    for name, folder in call.datasets.items():
        try:
            source = open_source(folder.absolute())
        except InputNotFoundError:
            if folder.is_dir() and dataset_atlases(folder):
                continue  # it was given for its atlases
            raise
        if source.kind == "images":
            raise InputDatasetError(f"dataset '{name}' holds images, not region series", where=folder, fix=_PARCELLATE_FIRST.format(folder))
        sources[name] = source
    return sources


def _packed_atlases(settings: ParcellateSettings, datasets: Sequence[PackedDataset], named: Mapping[str, Path]) -> tuple[str, ...]:
    labels = atlas_labels(settings.atlases, named) if settings.atlases else ()
    present = {files.atlas for one in datasets for runs in one.series.values() for files in runs}
    present |= {label for one in datasets if one.source.kind == "cohort" for label in Cohort.open(one.source.given).atlases}
    absent = [label for label in labels if label not in present]
    if absent:
        raise InputNotFoundError(
            f"nothing is parcellated in atlas {absent[0]}; there is {', '.join(sorted(present))}",
            fix="choose --atlases from these, or parcellate with that atlas into another output",
        )
    return labels


def _choices(settings: ParcellateSettings, datasets: Sequence[PackedDataset]) -> str:
    """The group level's own settings: the cohort is stale when they change, its participants are not."""
    values: dict[str, Any] = settings.model_dump(mode="json", include={"labels", "site_column", "min_frames"})
    values["datasets"] = [one.name for one in datasets]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def _print_plan(call: Invocation, datasets: Sequence[PackedDataset], rules: PackingRules, state: str) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True, highlight=False)
    console.print(f"pack {len(datasets)} datasets into {call.output_dir / 'cohort'} ({state})", markup=False)
    table = Table("dataset", "kind", "participants", "series", "participants table", box=None)
    for one in datasets:
        number = sum(len(runs) for runs in one.series.values())
        counts = ("packed", "packed") if one.source.kind == "cohort" else (str(len(one.series)), str(number))
        table.add_row(one.name, one.source.kind, *counts, "none" if one.table is None else str(one.table))
    console.print(table)
    console.print(f"atlases: {', '.join(rules.atlases) or 'all'}; runs of at least {rules.min_frames} frames", markup=False)
    for one in datasets:
        for note in one.notes:
            console.print(note, markup=False)
