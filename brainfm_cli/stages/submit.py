"""submit: a brainfm command as SLURM jobs, an array over participants with the group job behind it, and failed tasks once more."""

from __future__ import annotations

import sys
from collections import defaultdict
from typing import TYPE_CHECKING

from rich.console import Console

from brainfm_cli.atlases.catalogue import DEFAULT_ATLASES, find_atlas
from brainfm_cli.bids.inputs import choose_participants
from brainfm_cli.bids.names import strip_prefix
from brainfm_cli.config import read_value
from brainfm_cli.errors import EXIT_OK, InputNotFoundError, UsageError
from brainfm_cli.programs.commands import ask
from brainfm_cli.programs.estimates import estimate_participants
from brainfm_cli.programs.slurm import (
    FOLDER,
    LARGEST_ARRAY,
    MEMORY_OPTIONS,
    Job,
    Resources,
    job_script,
    megabytes,
    read_submissions,
    seconds,
    submit_jobs,
    warning_s,
)
from brainfm_cli.programs.slurm_tasks import tasks_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from brainfm_cli.config import Invocation
    from brainfm_cli.programs.slurm import Submission
    from brainfm_cli.programs.slurm_tasks import Task

BRAINFM = (sys.executable, "-m", "brainfm_cli")
BY_PARTICIPANT = frozenset({"preprocess", "parcellate"})
"""Commands whose input has a folder per participant: one task each."""
RESUMING = frozenset({"preprocess", "pretrain", "align", "prompt-tune", "predict"})
"""Commands that go on in the middle of a unit, so that a time limit costs little."""
# Sizes of small cohorts at the default settings (docs/performance.md); clusters differ, so any --slurm wins.
DEFAULTS: dict[str, dict[str, str]] = {
    "preprocess": {"cpus-per-task": "2", "mem": "4G", "time": "02:00:00"},
    "parcellate": {"cpus-per-task": "1", "mem": "2G", "time": "00:30:00"},
}
_TRAINING = {"cpus-per-task": "4", "mem": "16G", "time": "12:00:00"}
_HIDDEN = frozenset({"--participant-label"})


def submit(call: Invocation, argv: Sequence[str], pairs: Sequence[str], *, dry_run: bool) -> int:
    """Submit the command ``argv``, of which ``call`` is the reading; gives back the exit code.

    Raises
    ------
    UsageError
        Input, output and level do not follow the command's name.
    InputNotFoundError
        A participant asked for is not there.
    SettingsError, MissingProgramError, ProgramFailedError
        As :func:`submit_jobs`.
    """
    name, *rest = argv
    places = [str(call.input_dir), str(call.output_dir), call.level] if len(rest) > 2 else []
    if [name, *rest[:3]] != [call.command, *places]:
        raise UsageError("submit needs input, output and level behind the command's name", fix=f"brainfm submit {name} INPUT OUTPUT LEVEL [options] --slurm …")  # fmt: skip
    asked = Resources.parse(pairs)
    defaults = DEFAULTS.get(name, _TRAINING)
    if any(option in asked.options for option in MEMORY_OPTIONS):
        defaults = {option: value for option, value in defaults.items() if option != "mem"}
    resources = asked.model_copy(update={"options": defaults | asked.options})
    paths = (str(call.input_dir.absolute()), str(call.output_dir.absolute()))
    if call.level == "participant" and name in BY_PARTICIPANT:
        labels = strip_prefix(choose_participants(call.input_dir, call.selection), "sub")  # a folder may have any name
        options = _without(rest[3:], _HIDDEN)
        parts = [labels[start : start + LARGEST_ARRAY] for start in range(0, len(labels), LARGEST_ARRAY)]
        jobs = [
            Job(role="participants", job_id="", labels=part, argv=(name, *paths, "participant", *options), resources=resources)
            for part in parts
        ]
        jobs.append(Job(role="group", job_id="", argv=(name, *paths, "group", *options), resources=resources))
    else:
        jobs = [Job(role="single", job_id="", argv=(name, *paths, call.level, *rest[3:]), resources=resources)]
    atlases = read_value(call.config, call.overrides, "atlases") if name == "parcellate" else None
    regions = [find_atlas(one, call.datasets).num_regions for one in atlases or DEFAULT_ATLASES]  # refuses one that does not exist
    if dry_run:
        _print_estimate(call, jobs, regions)
    return _submit(call.output_dir, jobs, dry_run=dry_run)


def _print_estimate(call: Invocation, jobs: Sequence[Job], regions: Sequence[int]) -> None:
    """What the participants of an array need, beside what is asked for; other commands know their own needs."""
    labels = [label for job in jobs for label in job.labels]
    if not labels:
        lines = [f"resources: 'brainfm {call.command} … --dry-run' says what it will need"]
    else:
        estimate = estimate_participants(call.command, call.input_dir, labels, regions)
        lines = estimate.lines() if estimate else ["resources: nothing here says what they will need"]
        asked = jobs[0].resources.options
        if estimate and "mem" in asked and megabytes(asked["mem"]) < estimate.memory_mb:
            lines.append(f"mem={asked['mem']} is less than that")
        if estimate and "time" in asked and seconds(asked["time"]) < estimate.seconds:
            lines.append(f"time={asked['time']} is less than that")
    sys.stdout.write("".join(f"# {line}\n" for line in lines))


def resubmit(output: Path, pairs: Sequence[str], *, dry_run: bool) -> int:
    """Submit once more what failed for want of memory, time or a node, with more where that was the cause.

    Raises
    ------
    InputNotFoundError
        Nothing was submitted for this folder.
    """
    submissions = read_submissions(output)
    if not submissions:
        raise InputNotFoundError("nothing was submitted for this folder", where=output, fix="give the OUTPUT_DIR of 'brainfm submit'")
    console = Console()
    tasks = tasks_of(output, submissions)
    open_tasks = [task for task in tasks if task.status in {"pending", "running"}]
    failed = [task for task in tasks if task.status == "failed"]
    hopeless = [task for task in failed if task.failure in {"data", "settings", "program"}]
    for task in hopeless:
        console.print(f"{task.unit}: not submitted again: {task.failure} ({task.reason}); see {task.log}", markup=False, soft_wrap=True)
    again = [task for task in failed if task not in hopeless]
    if not again:
        console.print(f"nothing to submit again; {len(open_tasks)} tasks wait or run, {len(hopeless)} need mending first", highlight=False)
        return EXIT_OK
    given = Resources.parse(pairs)
    for jobs in _once_more(submissions, again, tasks, given):
        _submit(output, jobs, dry_run=dry_run)
        for task in _superseded(jobs, tasks):
            if not dry_run:  # only once the new one is there
                ask("scancel", task.job)
            console.print(
                f"job {task.job}: {'would be ' if dry_run else ''}cancelled, the new group job waits for everybody", highlight=False
            )
    return EXIT_OK


def _once_more(submissions: Sequence[Submission], again: Sequence[Task], tasks: Sequence[Task], given: Resources) -> list[list[Job]]:
    """Jobs of each new submission: tasks of one command that need the same resources are an array, the group job behind all of them."""
    origin = {_name(job.job_id, number): job for one in submissions for job in one.jobs for number in range(len(job.labels) + 1)}
    arrays: dict[tuple[str, str], list[Task]] = defaultdict(list)
    single = []
    for task in again:
        if task.role == "participants":
            job = origin[task.job]
            more = _more(job.resources, task, given)
            arrays[job.argv[0], more.model_dump_json()].append(task)
        elif task.role == "single":
            single.append([origin[task.job].model_copy(update={"resources": _more(origin[task.job].resources, task, given)})])
    found: dict[str, list[Job]] = defaultdict(list)
    for (command, resources), mine in arrays.items():
        labels = tuple(task.unit.removeprefix("sub-") for task in mine)
        found[command].append(
            origin[mine[0].job].model_copy(update={"labels": labels, "resources": Resources.model_validate_json(resources)})
        )
    for group in [task for task in tasks if task.role == "group"]:
        job = origin[group.job]
        if job.argv[0] in found or group in again:  # the group is done anew behind the participants that are
            after = _still_to_end(tasks, origin, job.argv[0])
            found[job.argv[0]].append(job.model_copy(update={"resources": _more(job.resources, group, given), "after": after}))
    return [*found.values(), *single]


def _still_to_end(tasks: Sequence[Task], origin: Mapping[str, Job], command: str) -> tuple[str, ...]:
    """Jobs of a command that a new group job must wait for: arrays with tasks that wait or run, and a group job that runs."""
    mine = [task for task in tasks if task.role != "single" and origin[task.job].argv[0] == command]
    waits = [task for task in mine if task.status == "running" or (task.status == "pending" and task.role == "participants")]
    return tuple(dict.fromkeys(task.job.partition("_")[0] for task in waits))


def _superseded(jobs: Sequence[Job], tasks: Sequence[Task]) -> list[Task]:
    """Group jobs in the queue whose place a new one takes: two would do the same work, the first of them too early."""
    if not any(job.role == "group" for job in jobs):
        return []
    replaced = {job.job_id for job in jobs if job.role == "group"}  # jobs still carry the id of the one they were made from
    return [task for task in tasks if task.role == "group" and task.status == "pending" and task.job in replaced]


def _more(resources: Resources, task: Task, given: Resources) -> Resources:
    more = resources.with_more(memory=task.failure == "memory", time=task.failure == "time")
    return more.model_copy(update={"options": more.options | given.options})


def _name(job_id: str, number: int) -> str:
    return f"{job_id}_{number}" if number else job_id


def _submit(output: Path, jobs: Sequence[Job], *, dry_run: bool) -> int:
    resumes = jobs[0].argv[0] in RESUMING
    for job in jobs if resumes else ():
        if job.resources.requeue:
            warning_s(job.resources)  # refused before anything is written
    console = Console()
    if dry_run:
        folder = (output / FOLDER / "WHEN").absolute()
        for number, job in enumerate(jobs, 1):
            behind = [*job.after, *(f"JOB{before}" for before in range(1, number))] if job.role == "group" else []
            script = job_script(job, folder, number, brainfm=BRAINFM, resumes=resumes, behind=behind)
            about = (
                f"{len(job.labels)} participants, one task each: {', '.join(job.labels[:10])}{' …' if len(job.labels) > 10 else ''}"
                if job.labels
                else job.role
            )
            sys.stdout.write(f"# {about}\n{script}\n")
        return EXIT_OK
    submission = submit_jobs(output, jobs, brainfm=BRAINFM, resumes=resumes)
    for job in submission.jobs:
        what = f"{len(job.labels)} participants" if job.labels else job.role
        console.print(f"job {job.job_id}: {job.argv[0]}, {what}", highlight=False)
    console.print(f"logs in {output / FOLDER / submission.name}; 'brainfm status {output}' shows how they do", markup=False, soft_wrap=True)
    return EXIT_OK


def _without(tokens: Sequence[str], flags: frozenset[str]) -> tuple[str, ...]:
    """``tokens`` as the command line normalises them, without some flags and their values."""
    kept: list[str] = []
    skip = False
    for token in tokens:
        if skip:
            skip = False
        elif token in flags:
            skip = True
        elif token.partition("=")[0] not in flags:
            kept.append(token)
    return tuple(kept)
