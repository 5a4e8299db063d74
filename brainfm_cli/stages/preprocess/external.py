"""Participant level with fMRIPrep: preflight, one resumable unit per participant, outputs checked and published."""

from __future__ import annotations

import logging
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from brainfm_cli.bids.derivatives import write_json
from brainfm_cli.bids.inputs import choose_participants, read_filters
from brainfm_cli.bids.raw import outside_dataset, raw_files, read_raw_participant
from brainfm_cli.bids.units import Unit, UnitResult, plan_units, run_units
from brainfm_cli.config import Selection
from brainfm_cli.documents import read_json
from brainfm_cli.errors import EXIT_OK, BrainFMError, InputDatasetError, InputNotFoundError, OutputError, ProgramFailedError
from brainfm_cli.programs.commands import run_logged
from brainfm_cli.programs.containers import build_command, check_binds, check_engine, official_image, scratch_folders
from brainfm_cli.programs.fmriprep import Task, error_of, only_report_failed
from brainfm_cli.programs.fmriprep_outputs import missing_outputs, publish, stated_version
from brainfm_cli.programs.preflight import check_space, find_licence, find_templateflow, memory_per_unit_mb
from brainfm_cli.stages.preprocess.measures import measure_runs, measures_path
from brainfm_cli.stages.preprocess.output import open_dataset, planned_dataset
from brainfm_cli.stages.preprocess.work import at_a_time, check_has_runs, participant_folder, remove_folders, threads_each, work_dir

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from brainfm_cli.bids.raw import RawParticipant
    from brainfm_cli.config import Invocation
    from brainfm_cli.programs.commands import Command
    from brainfm_cli.programs.containers import Engine
    from brainfm_cli.stages.preprocess.settings import PreprocessSettings

log = logging.getLogger(__name__)
Found = TypeVar("Found")
_SHOWN = 6


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What this machine has for the run, found by the preflight."""

    engine: Engine
    """Way of running fMRIPrep."""
    image: str | None
    """Docker image or Apptainer file; none on this machine itself."""
    rootless: bool
    """Docker's daemon runs as the user."""
    licence: Path
    """FreeSurfer's licence."""
    templateflow: Path | None
    """TemplateFlow home, none for fMRIPrep's own."""
    memory_mb: int
    """For each participant."""
    threads: int
    """For each participant."""


def preprocess_participants(call: Invocation, settings: PreprocessSettings) -> int:
    """Do the participants that are not current; gives back the exit code."""
    labels = choose_participants(call.input_dir, call.selection)
    inputs = {label: raw_files(call.input_dir, label, call.selection, anat_only=settings.anat_only) for label in labels}
    bare = [Unit(name=f"sub-{label}", inputs=inputs[label], work=preprocess_participant) for label in labels]
    states = plan_units(planned_dataset(call, settings), bare)
    todo = [label for label in labels if states[f"sub-{label}"] != "current"]
    if not todo and not call.dry_run:
        return run_units(open_dataset(call, settings), bare, call.execution)  # says so; nothing is asked of any engine
    machine, problems = _preflight(call, settings, [inputs[label] for label in todo])
    tasks = {label: _task(call, settings, machine, label, inputs[label]) for label in labels}
    if call.dry_run:
        _print_plan(call, machine, tasks, states, problems)
        return EXIT_OK
    if problems:
        for problem in problems[:-1]:
            log.error("%s", problem)
        raise problems[-1]
    dataset = open_dataset(call, settings)
    units = [_unit(call, dataset.root, tasks[label], inputs[label], machine) for label in labels]
    return run_units(dataset, units, call.execution)


def _preflight(call: Invocation, settings: PreprocessSettings, inputs: Sequence[Sequence[Path]]) -> tuple[Machine, list[BrainFMError]]:
    """What the machine has, and everything that it lacks, so that all of it can be mended at once."""
    problems: list[BrainFMError] = []

    def check(question: Callable[[], Found], otherwise: Found) -> Found:
        try:
            return question()
        except BrainFMError as error:
            problems.append(error)
            return otherwise

    engine: Engine = "fmriprep-docker" if settings.fmriprep_docker else cast("Engine", settings.engine)
    execution = call.execution
    official = official_image(engine, settings.fmriprep_version)
    image = None if engine == "fmriprep" else execution.image or official
    together = at_a_time(execution, len(inputs))
    largest = sorted((sum(path.stat().st_size for path in paths) for paths in inputs), reverse=True)[:together]
    licence = check(lambda: find_licence(execution.fs_license_file), Path("license.txt"))
    templateflow = check(lambda: find_templateflow(settings.output_spaces), None)
    rootless = check(
        lambda: check_engine(engine, image=image, version=settings.fmriprep_version, pinned=engine != "apptainer" and image == official),
        otherwise=False,
    )
    memory_mb = check(lambda: memory_per_unit_mb(execution.mem_mb, units=together), execution.mem_mb or 0)
    check(lambda: _check_folders(call, engine), None)
    check(lambda: check_space((call.output_dir, work_dir(call)), input_bytes=sum(largest)), None)
    machine = Machine(
        engine=engine,
        image=image,
        rootless=rootless,
        licence=licence,
        templateflow=templateflow,
        memory_mb=memory_mb,
        threads=threads_each(execution, len(inputs)),
    )
    return machine, problems


def _check_folders(call: Invocation, engine: Engine) -> None:
    given = [*call.datasets.values(), *([call.execution.fs_subjects_dir] if call.execution.fs_subjects_dir else [])]
    for folder in given:
        if not folder.is_dir():  # Docker would make it, as root
            raise InputNotFoundError("the folder does not exist", where=folder, fix="check --datasets and --fs-subjects-dir")
    # fMRIPrep looks at the paths it is given: in our own containers the work folder has another one.
    if engine in {"fmriprep", "fmriprep-docker"} and work_dir(call).resolve().is_relative_to(call.input_dir.resolve()):
        raise OutputError(
            "fMRIPrep refuses a work folder inside the input dataset", where=work_dir(call), fix="give another with --work-dir DIR"
        )


def _task(call: Invocation, settings: PreprocessSettings, machine: Machine, label: str, inputs: Sequence[Path]) -> Task:
    folder = participant_folder(call, settings, label, inputs)
    tasks = call.selection.task_id
    filtered = call.selection.bids_filter_file is not None or len(tasks) > 1
    subjects = call.execution.fs_subjects_dir
    return Task(
        label=label,
        data=call.input_dir,
        output=folder / "out",
        scratch=folder / "scratch",
        licence=machine.licence,
        output_spaces=settings.output_spaces,
        level=settings.level,
        threads=machine.threads,
        memory_mb=machine.memory_mb,
        anat_only=settings.anat_only,
        fs_no_reconall=settings.fs_no_reconall,
        ignore=settings.ignore,
        seed=settings.seed,
        sessions=call.selection.session_label,
        task=tasks[0] if len(tasks) == 1 else None,
        filters=folder / "scratch" / "bids_filters.json" if filtered else None,
        datasets=tuple(sorted((name, path.absolute()) for name, path in call.datasets.items())),
        fs_subjects_dir=subjects.absolute() if subjects else None,
        templateflow=machine.templateflow,
        options=settings.options,
        verbose=call.execution.verbose,
    )


def _unit(call: Invocation, root: Path, task: Task, inputs: tuple[Path, ...], machine: Machine) -> Unit:
    arguments: dict[str, Any] = {
        "root": root,
        "task": task,
        "machine": machine,
        "selection": call.selection.model_copy(update={"participant_label": ()}),
        "max_hours": call.execution.max_hours,
        "clean": call.execution.clean_workdir,
    }
    return Unit(name=f"sub-{task.label}", inputs=inputs, work=preprocess_participant, arguments=arguments)


def preprocess_participant(
    root: Path, task: Task, machine: Machine, selection: Selection, max_hours: float | None, *, clean: bool
) -> UnitResult:
    """Run fMRIPrep for one participant, check what it wrote, and publish it.

    Raises
    ------
    BrainFMError
        The input cannot be preprocessed, or fMRIPrep ended with an error, or something is missing in the end.
    """
    participant = read_raw_participant(task.data, task.label, selection, anat_only=task.anat_only)
    _check(participant, task, machine)
    folder = task.output.parent
    if clean:
        remove_folders(folder.parent, task.label)
    for needed in scratch_folders(machine.engine, task):
        needed.mkdir(parents=True, exist_ok=True)
    if task.filters:
        write_json(task.filters, _filters(selection))
    log_file = root / "logs" / f"sub-{task.label}_fmriprep.log"
    command = _command(task, machine)
    ending = run_logged(command, log_file, name=f"sub-{task.label}", max_hours=max_hours, echo=task.verbose > 0)
    no_report = only_report_failed(ending)
    if ending.code != EXIT_OK and not no_report:
        raise error_of(ending, log_file=log_file, output=task.output, in_container=machine.engine != "fmriprep")
    if missing := missing_outputs(task, participant, report=not no_report):
        raise ProgramFailedError(
            f"fMRIPrep ended without an error and did not write {', '.join(missing[:_SHOWN])}",
            where=log_file,
            fix="read the log; the same command with --clean-workdir starts from the beginning",
        )
    notes = [f"made with fMRIPrep {stated_version(task) or 'of unknown version'}"]
    if no_report:
        notes.append(f"fMRIPrep's report could not be made; the data are complete, see {log_file.name}")
        log.warning("sub-%s: %s", task.label, notes[-1])
    has_series = not task.anat_only and task.level == "full"
    measures = measure_runs(task.output, task.label, task.output_spaces) if has_series else {}
    outputs = [*publish(task, root), write_json(measures_path(root, task.label), measures)]
    shutil.rmtree(folder, ignore_errors=True)
    return UnitResult(outputs=tuple(outputs), notes=tuple(notes))


def _command(task: Task, machine: Machine) -> Command:
    return build_command(machine.engine, task, image=machine.image, rootless=machine.rootless)


def _check(participant: RawParticipant, task: Task, machine: Machine) -> None:
    where = task.data / f"sub-{task.label}"
    if not participant.t1w and not task.datasets:
        raise InputNotFoundError("fMRIPrep needs a T1w image and there is none", where=where, fix="leave this participant out, or give its derivatives with --datasets")  # fmt: skip
    if not task.anat_only:
        check_has_runs(participant)
    if machine.engine == "fmriprep":
        return
    check_binds(task)
    if outside := outside_dataset(participant):
        raise InputDatasetError(
            f"{len(outside)} files are links to outside the dataset, which a container does not see",
            where=outside[0],
            fix="copy the dataset with 'cp -rL', or use --engine fmriprep",
        )


def _filters(selection: Selection) -> Mapping[str, Any]:
    path = selection.bids_filter_file
    filters: dict[str, Any] = read_json(path) if path else {}
    if len(selection.task_id) > 1:  # fMRIPrep's own option takes one
        for query in ("bold", "sbref"):
            filters[query] = {"task": list(selection.task_id), **read_filters(selection, query)}
    return filters


def _print_plan(
    call: Invocation, machine: Machine, tasks: Mapping[str, Task], states: Mapping[str, str], problems: Sequence[BrainFMError]
) -> None:
    lines = [
        f"# preprocess {len(tasks)} participants of {call.input_dir} into {call.output_dir}",
        f"# {call.execution.nprocs} at a time, each with {machine.memory_mb} MB and {machine.threads} threads; work folder {work_dir(call)}",
        *(f"# not ready: {problem}" for problem in problems),
    ]
    for label, task in tasks.items():
        lines.append(f"# sub-{label}: {states[f'sub-{label}']}")
        if states[f"sub-{label}"] != "current":
            folders = scratch_folders(machine.engine, task)
            lines += ["mkdir -p " + " ".join(shlex.quote(str(folder)) for folder in folders), _command(task, machine).line]
    sys.stdout.write("\n".join(lines) + "\n")
