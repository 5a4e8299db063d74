"""Participant level with the embedded engine: one resumable unit per participant, its report, and its methods to cite."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from brainfm_cli.bids.derivatives import write_json, write_text
from brainfm_cli.bids.inputs import choose_participants
from brainfm_cli.bids.raw import raw_files, read_raw_participant
from brainfm_cli.bids.units import Unit, UnitResult, plan_units, run_units
from brainfm_cli.errors import EXIT_OK
from brainfm_cli.programs.embedded.memory import check_memory, expected_memory_mb
from brainfm_cli.stages.preprocess.measures import measure_runs, measures_path
from brainfm_cli.stages.preprocess.output import open_dataset, planned_dataset
from brainfm_cli.stages.preprocess.work import at_a_time, check_has_runs, participant_folder, remove_folders, threads_each, work_dir

if TYPE_CHECKING:
    from collections.abc import Mapping

    from brainfm_cli.config import Invocation, Selection
    from brainfm_cli.programs.embedded.settings import EmbeddedSettings
    from brainfm_cli.stages.preprocess.settings import PreprocessSettings

_DEFAULT_SEED = 1


def preprocess_participants(call: Invocation, settings: PreprocessSettings) -> int:
    """Do the participants that are not current; gives back the exit code."""
    labels = choose_participants(call.input_dir, call.selection)
    inputs = {label: raw_files(call.input_dir, label, call.selection, anat_only=settings.anat_only) for label in labels}
    units = [_unit(call, settings, label, inputs[label]) for label in labels]
    states = plan_units(planned_dataset(call, settings), units)
    todo = [label for label in labels if states[f"sub-{label}"] != "current"]
    together = at_a_time(call.execution, len(todo))
    threads = threads_each(call.execution, len(todo))
    memory = {label: expected_memory_mb(inputs[label]) for label in (labels if call.dry_run else todo)}
    if call.dry_run:
        _print_plan(call, states, memory, together=together, threads=threads)
        return EXIT_OK
    check_memory(sorted(memory[label] for label in todo)[-together:], given_mb=call.execution.mem_mb)
    dataset = open_dataset(call, settings)
    if call.execution.clean_workdir:
        for label in todo:
            remove_folders(work_dir(call), label)
    for unit in units:
        unit.arguments["threads"] = threads
    return run_units(dataset, units, call.execution)


def preprocess_participant(
    root: Path,
    folder: Path,
    raw: Path,
    label: str,
    selection: Selection,
    settings: EmbeddedSettings,
    *,
    anat_only: bool,
    seed: int,
    threads: int,
) -> UnitResult:
    """Preprocess one participant, measure what came out, and write the report.

    Raises
    ------
    BrainFMError
        The input cannot be preprocessed, or the result does not pass a gate; then nothing is published.
    """
    from brainfm_cli.programs.embedded import workflow
    from brainfm_cli.reports.preprocess import participant_page
    from brainfm_cli.reports.preprocess_methods import as_bibtex, as_markdown

    participant = read_raw_participant(raw, label, selection, anat_only=anat_only)
    if not anat_only:
        check_has_runs(participant)
    result = workflow.preprocess_participant(participant, root, folder, settings, seed=seed, nthreads=threads)
    measured = measure_runs(root, label, (f"{result.facts['template']}:res-{settings.resolution}",)) if participant.bold else {}
    measures = {run: {**measured.get(run, {}), **result.measures[run]} for run in result.measures}
    bold = bool(participant.bold)
    outputs = (
        *result.outputs,
        write_json(measures_path(root, label), measures),
        write_text(root / f"sub-{label}.html", participant_page(label, result).render()),
        write_text(root / "logs" / f"sub-{label}_CITATION.md", as_markdown(result.facts, bold=bold)),
        write_text(root / "logs" / f"sub-{label}_CITATION.bib", as_bibtex(result.facts, bold=bold)),
    )
    shutil.rmtree(folder, ignore_errors=True)
    return UnitResult(outputs=outputs, notes=result.notes, seed=seed)


def _unit(call: Invocation, settings: PreprocessSettings, label: str, inputs: tuple[Path, ...]) -> Unit:
    arguments = {
        "root": call.output_dir,
        "folder": participant_folder(call, settings, label, inputs),
        "raw": call.input_dir,
        "label": label,
        "selection": call.selection.model_copy(update={"participant_label": ()}),
        "settings": settings.embedded,
        "anat_only": settings.anat_only,
        "seed": settings.seed or _DEFAULT_SEED,
    }
    return Unit(name=f"sub-{label}", inputs=inputs, work=preprocess_participant, arguments=arguments)


def _print_plan(call: Invocation, states: Mapping[str, str], memory: Mapping[str, int], *, together: int, threads: int) -> None:
    lines = [
        f"preprocess {len(memory)} participants of {call.input_dir} into {call.output_dir} with the embedded engine",
        f"{together} at a time, each with {threads} threads; work folder {work_dir(call)}",
        *(f"sub-{label}: {states[f'sub-{label}']}; about {megabytes} MB of memory" for label, megabytes in memory.items()),
    ]
    sys.stdout.write("\n".join(lines) + "\n")
