"""``brainfm parcellate --trials``: single-trial responses; group packs them and what was seen into a voxel cohort."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

import yaml

from brainfm_cli.bids.derivatives import OutputDataset, chained_hash, write_text
from brainfm_cli.bids.inputs import choose_participants, find_runs, open_source, participant_files, run_key, walk_files
from brainfm_cli.bids.names import parse_name
from brainfm_cli.bids.packing import dataset_name
from brainfm_cli.bids.people import find_participants_table, linked_datasets
from brainfm_cli.bids.stimuli import StimulusSettings, name_stimuli, read_stimuli
from brainfm_cli.bids.trials import find_trials, holds_trials, read_trial_table
from brainfm_cli.bids.units import Unit, UnitResult, plan_units, run_units
from brainfm_cli.bids.voxel_cohort import VoxelCohortWriter
from brainfm_cli.errors import EXIT_OK, InputDatasetError, InputNotFoundError, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from brainfm_cli.bids.stimuli import StimulusBook
    from brainfm_cli.bids.trials import TrialRun
    from brainfm_cli.config import Invocation, Selection
    from brainfm_cli.records import RunKey
    from brainfm_cli.signals.trial_maps import VoxelMask
    from brainfm_cli.stages.parcellate.settings import ParcellateSettings

log = logging.getLogger(__name__)


def run(call: Invocation, settings: ParcellateSettings) -> int:
    """Estimate single-trial responses, or pack them; gives back the exit code."""
    if not call.input_dir.is_dir():
        raise InputNotFoundError("the input folder does not exist", where=call.input_dir, fix="check the path")
    if call.level == "participant":
        if holds_trials(call.input_dir):
            raise UsageError("the input holds single-trial maps already", where=call.input_dir, fix="run the group level, which packs them")
        return _estimate(call, settings)
    return _pack(call, settings)


def _estimate(call: Invocation, settings: ParcellateSettings) -> int:
    source = open_source(call.input_dir)
    if source.kind != "images":
        raise UsageError("single-trial responses need preprocessed images", where=call.input_dir, fix="give a derivative of fMRIPrep or brainfm preprocess")  # fmt: skip
    people = choose_participants(source.root, call.selection)
    raw = call.datasets.get("raw")
    units = []
    dataset = _open(call, settings)
    for label in people:
        events = tuple(find_events(source.root, label, raw=raw).values())
        arguments = {
            "root": dataset.root,
            "source": source.root,
            "label": label,
            "selection": call.selection,
            "settings": settings,
            "raw": raw,
        }
        inputs = (*participant_files(source.root, label, call.selection), *events)
        units.append(Unit(name=f"sub-{label}", inputs=tuple(dict.fromkeys(inputs)), work=estimate_participant, arguments=arguments))
    if call.dry_run:
        from rich.console import Console

        for name, state in plan_units(dataset, units).items():
            Console(highlight=False).print(f"estimate single trials ({settings.single_trial.estimator}) of {name} ({state})", markup=False)
        return EXIT_OK
    return run_units(dataset, units, call.execution)


def estimate_participant(
    root: Path, source: Path, label: str, selection: Selection, settings: ParcellateSettings, raw: Path | None
) -> UnitResult:
    """Write one participant's single-trial maps."""
    from brainfm_cli.bids.trials import write_trials
    from brainfm_cli.signals.single_trial import choose_trials, estimate_trials, read_motion
    from brainfm_cli.signals.trial_maps import read_mask_image
    from brainfm_cli.signals.volumes import open_series

    chosen = settings.single_trial
    events, written, notes = find_events(source, label, raw=raw), [], []
    for run in find_runs(source, label, selection, space=settings.space, resolution=settings.resolution):
        if run.mask is None:
            raise InputDatasetError(
                "single-trial responses are estimated from NIfTI series", where=run.bold, fix="choose a volume space (space)"
            )
        if run.key not in events:
            notes.append(f"{run.key.name} left out: it has no events")
            continue
        mask = _find_mask(source, label, chosen.mask) if chosen.mask else run.mask
        with open_series(run.bold) as (header, _):
            frames = header.num_frames
        table = choose_trials(
            read_trial_table(events[run.key]), chosen, num_frames=frames, repetition_time_s=run.repetition_time_s, where=events[run.key]
        )
        motion = read_motion(run.confounds, frames) if chosen.motion and run.confounds is not None else None
        voxels = read_mask_image(mask)
        made = estimate_trials(run.bold, voxels, table, motion, chosen, repetition_time_s=run.repetition_time_s)
        if made.empty_voxels:
            notes.append(f"{run.key.name}: {made.empty_voxels} voxels of the mask have no signal")
        facts = {"Units": "percent signal change", "Estimator": chosen.estimator, "HaemodynamicResponse": chosen.hrf, "Unit": chosen.unit}
        written += write_trials(
            root,
            run.key,
            run.space,
            iter(made.responses),
            made.table,
            voxels.mask,
            voxels.affine,
            facts=facts,
            mask_label=chosen.mask or "brain",
        )
    if not written:
        raise InputNotFoundError(
            f"no run of participant {label} has events",
            where=source,
            fix="events lie beside the raw images: give them with --datasets raw=DIR",
        )
    return UnitResult(outputs=tuple(written), notes=tuple(notes))


def find_events(source: Path, label: str, *, raw: Path | None) -> dict[RunKey, Path]:
    """Events of a participant's runs: beside the images, in ``raw``, or in a dataset that the derivative names as its source."""
    found: dict[RunKey, Path] = {}
    for folder in (raw, source, *linked_datasets(source)):
        if folder is None or not (folder / f"sub-{label}").is_dir():
            continue
        for path in walk_files(folder / f"sub-{label}"):
            entities, suffix, extension = parse_name(path.name)
            if suffix == "events" and extension == ".tsv":
                found.setdefault(run_key(entities), path)
    return found


def _find_mask(source: Path, label: str, wanted: str) -> Path:
    masks = [
        path
        for path in walk_files(source / f"sub-{label}")
        if parse_name(path.name)[1] == "mask" and parse_name(path.name)[0].get("desc") == wanted
    ]
    if len(masks) != 1:
        raise InputNotFoundError(
            f"participant {label} has {len(masks)} masks desc-{wanted}, not one", where=source, fix="set single_trial.mask"
        )
    return masks[0]


def _pack(call: Invocation, settings: ParcellateSettings) -> int:
    own = call.output_dir.is_dir() and holds_trials(call.output_dir)
    source = call.output_dir if own else call.input_dir
    if not holds_trials(source):
        raise InputNotFoundError(
            "no single-trial maps here",
            where=source,
            fix="they are called …_stat-effect_desc-singletrial_statmap.nii.gz; estimate them with 'brainfm parcellate … participant --trials'",
        )
    people = choose_participants(source, call.selection)
    runs = {label: find_trials(source, label, call.selection, mask=settings.single_trial.mask) for label in people}
    table = find_participants_table(call.input_dir)
    chosen = settings.stimuli
    files = [
        path
        for path in (chosen.table, chosen.captions, call.input_dir / "stimuli" / "stimuli.tsv", table)
        if path is not None and path.is_file()
    ]
    inputs = tuple(dict.fromkeys([*files, *(path for found in runs.values() for one in found for path in one.inputs)]))
    dataset = _open(call, settings)
    choices = dataset.root / "logs" / "group.yaml"
    text = yaml.safe_dump({"stimuli": chosen.model_dump(mode="json"), "participants": people}, sort_keys=False)
    changed = not choices.is_file() or choices.read_text(encoding="utf-8") != text
    if changed and not call.dry_run:
        write_text(choices, text)
    arguments = {"root": dataset.root, "name": dataset_name(call.input_dir), "stimuli_of": call.input_dir, "runs": runs, "settings": chosen, "table": table}  # fmt: skip
    unit = Unit(name="group", inputs=(*([] if changed and call.dry_run else [choices]), *inputs), work=pack_trials, arguments=arguments)
    if call.dry_run:
        state = plan_units(dataset, [unit])["group"]
        _print_plan(call, runs, "stale" if changed and state == "current" else state)
        return EXIT_OK
    return run_units(dataset, [unit], call.execution)


def pack_trials(
    root: Path, name: str, stimuli_of: Path, runs: dict[str, list[TrialRun]], settings: StimulusSettings, table: Path | None
) -> UnitResult:
    """Write ``cohort/``: memory is one volume, whatever the number of trials."""
    import pandas as pd

    from brainfm_cli.bids.cohort import read_participants
    from brainfm_cli.signals.trial_maps import read_mask, same_voxels

    book = read_stimuli(stimuli_of, settings)
    with VoxelCohortWriter(root / "cohort") as writer:
        for label, found in runs.items():
            voxels = read_mask(found[0])
            writer.add_participant(voxels.space(label, found[0].space), voxels.order)
            seen: Counter[str] = Counter()
            for one in found:
                if one.mask != found[0].mask:
                    same_voxels(voxels, read_mask(one))
                _pack_run(writer, name, one, voxels, book, settings, seen)
            log.info("sub-%s: %d trials of %d pictures, %d voxels", label, sum(seen.values()), len(seen), len(voxels.order))
        people = pd.DataFrame(index=pd.Index(list(runs), name="participant_id"))
        if table is not None:
            people = read_participants(table).reindex(list(runs))
        files = writer.finish(people)
    return UnitResult(outputs=tuple(files))


def _pack_run(
    writer: VoxelCohortWriter,
    dataset: str,
    run: TrialRun,
    voxels: VoxelMask,
    book: StimulusBook,
    settings: StimulusSettings,
    seen: Counter[str],
) -> None:
    from brainfm_cli.signals.trial_maps import count_trials, read_responses, read_table

    table = read_table(run, count_trials(run))
    names = name_stimuli(table, settings, run.table)
    shown = _category(table, settings)
    rows: list[dict[str, Any]] = []
    for trial, name in enumerate(names):
        if not name:
            continue
        writer.add_stimulus(book.find(name, shown[trial] if shown else None, row=trial + 1, table=run.table))
        seen[name] += 1
        rows.append(
            {
                "dataset": dataset,
                "session": run.key.session or "",
                "run": "_".join(f"{key}-{value}" for key, value in run.key.entities.items() if key not in {"sub", "ses"} and value),
                "trial": trial,
                "stimulus": name,
                "repeat": seen[name],
            }
        )
    kept = (response for response, name in zip(read_responses(run, voxels), names, strict=True) if name)
    writer.add_trials(run.key.participant, kept, rows)


def _category(table: pd.DataFrame, settings: StimulusSettings) -> list[str] | None:
    return None if settings.category is None or settings.category not in table else [str(value) for value in table[settings.category]]


def _open(call: Invocation, settings: ParcellateSettings) -> OutputDataset:
    own = settings.of_participants()
    if call.dry_run:  # a plan writes nothing
        digest = chained_hash("parcellate", own, (call.input_dir,))
        return OutputDataset(root=call.output_dir, command="parcellate", configuration_hash=digest)
    return OutputDataset.open(call.output_dir, command="parcellate", settings=own, sources=(call.input_dir,))


def _print_plan(call: Invocation, runs: dict[str, list[TrialRun]], state: str) -> None:
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False)
    console.print(f"pack single trials of {len(runs)} participants into {call.output_dir / 'cohort'} ({state})", markup=False)
    for label, found in runs.items():
        console.print(f"  sub-{label}: {len(found)} runs, mask {found[0].mask.name}", markup=False)
