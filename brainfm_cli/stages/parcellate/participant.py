"""Participant level: every run of one participant in every atlas, one resumable unit per participant."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING

from brainfm_cli.bids.inputs import choose_participants, find_runs, in_selection, participant_files, root_sidecars, walk_files
from brainfm_cli.bids.names import parse_name
from brainfm_cli.bids.units import Unit, UnitResult, plan_units, run_units
from brainfm_cli.config import Selection
from brainfm_cli.errors import EXIT_OK, InputNotFoundError, UsageError
from brainfm_cli.stages.parcellate.settings import ParcellateSettings, choose_atlases

if TYPE_CHECKING:
    from collections.abc import Sequence

    from brainfm_cli.bids.derivatives import OutputDataset
    from brainfm_cli.bids.inputs import Source
    from brainfm_cli.config import Invocation

log = logging.getLogger(__name__)
Datasets = tuple[tuple[str, Path], ...]
# One pybids index per participant: beyond this number the plan names participants only.
_DETAILED = 20


def run(call: Invocation, settings: ParcellateSettings, source: Source, dataset: OutputDataset) -> int:
    """Do the participants that are not current; gives back the exit code."""
    if source.kind == "cohort":
        raise UsageError(
            "the input is a packed cohort, which has no participant level", fix="use the group level, or pretrain on it directly"
        )
    labels = choose_participants(source.root, call.selection)
    sidecars = root_sidecars(source.root)
    units = [_unit(label, source, call, settings, dataset, sidecars) for label in labels]
    if call.dry_run:
        _print_plan(call, settings, source, dict(zip(labels, plan_units(dataset, units).values(), strict=True)))
        return EXIT_OK
    if call.reports_only:
        from brainfm_cli.stages.parcellate.pages import rebuild_participants

        return rebuild_participants(dataset, labels, settings)
    return run_units(dataset, units, call.execution)


def _unit(label: str, source: Source, call: Invocation, settings: ParcellateSettings, dataset: OutputDataset, sidecars: Sequence[Path]) -> Unit:  # fmt: skip
    arguments = {
        "root": dataset.root,
        "source": source,
        "label": label,
        "selection": call.selection.model_copy(update={"participant_label": ()}),
        "settings": settings.of_participants(),
        "datasets": tuple(sorted(call.datasets.items())),
    }
    inputs = (*sidecars, *participant_files(source.root, label, call.selection))
    return Unit(name=f"sub-{label}", inputs=inputs, work=parcellate_participant, arguments=arguments)


def parcellate_participant(
    root: Path, source: Source, label: str, selection: Selection, settings: ParcellateSettings, datasets: Datasets
) -> UnitResult:
    """Write one participant's series, coverage, matrices and page; nothing is written before every run is computed."""
    from brainfm_cli.stages.parcellate import results
    from brainfm_cli.stages.parcellate.pages import write_participant_page

    if source.kind == "series":
        made = results.take_series(source, label, selection, settings, dict(datasets))
    else:
        made = results.parcellate_images(source, label, selection, settings, choose_atlases(settings, source, dict(datasets)))
    written: list[Path] = []
    notes: list[str] = []
    for one in made:
        written += results.write(root, one, settings)
        notes += one.notes
    notes = list(dict.fromkeys(notes))
    _remove_left_over(root, label, selection, written)
    written.append(write_participant_page(root, label, settings))
    return UnitResult(outputs=tuple(written), notes=tuple(notes))


def _remove_left_over(root: Path, label: str, selection: Selection, written: Sequence[Path]) -> None:
    """Drop files of runs that the input no longer has; other sessions and tasks belong to other jobs."""
    keep = set(written)
    for path in list(walk_files(root / f"sub-{label}")):
        if path not in keep and in_selection(parse_name(path.name)[0], selection):
            path.unlink()


def _print_plan(call: Invocation, settings: ParcellateSettings, source: Source, states: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table

    made_with = f" by {source.producer} {source.version}".rstrip() if source.producer else ""
    console = Console(soft_wrap=True, highlight=False)
    console.print(
        f"parcellate {len(states)} participants of {call.input_dir} ({source.kind}{made_with}) into {call.output_dir}", markup=False
    )
    if source.kind == "images":
        console.print(f"denoising {settings.denoise.strategy}; matrices {', '.join(settings.matrices) or 'none'}", markup=False)
    table = Table("participant", "state", *(("run", "atlases") if len(states) <= _DETAILED else ()), box=None)
    for label, state in states.items():
        if len(states) > _DETAILED:
            table.add_row(f"sub-{label}", state)
            continue
        rows = _planned_runs(source, label, call, settings)
        for position, (name, atlases) in enumerate(rows):
            table.add_row(*((f"sub-{label}", state) if position == 0 else ("", "")), name, atlases)
    console.print(table)


def _planned_runs(source: Source, label: str, call: Invocation, settings: ParcellateSettings) -> list[tuple[str, str]]:
    by_run: dict[str, list[str]] = {}
    try:
        if source.kind == "series":
            from brainfm_cli.bids.series_inputs import find_series

            for files in find_series(source.root, label, call.selection, sidecars=root_sidecars(source.root)):
                by_run.setdefault(files.key.name, []).append(files.atlas)
        else:
            names = [atlas.name for atlas in choose_atlases(settings, source, call.datasets)]
            for run in find_runs(source.root, label, call.selection, space=settings.space, resolution=settings.resolution):
                by_run[f"{run.key.name} in {run.space}"] = names
    except InputNotFoundError as error:
        return [(f"nothing: {error.what}", "")]
    return [(name, ", ".join(atlases)) for name, atlases in by_run.items()]
