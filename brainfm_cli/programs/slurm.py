"""SLURM: job scripts that requeue themselves, submission, and what became of every task, with and without an accounting database."""

from __future__ import annotations

import os
import re
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from brainfm_cli.bids.derivatives import write_json, write_text
from brainfm_cli.config import Frozen
from brainfm_cli.errors import InputDatasetError, MissingProgramError, ProgramFailedError, SettingsError
from brainfm_cli.programs.commands import ask

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

FOLDER = Path("logs") / "slurm"
"""Where submissions lie in an output folder."""
MOST_REQUEUES = 20
"""A job that was stopped by its time limit this often makes no progress."""
LARGEST_ARRAY = 1000
"""Tasks of one array: the index that sbatch takes by default is below 1001."""
MEMORY_OPTIONS = ("mem", "mem-per-cpu", "mem-per-gpu")
"""Options of sbatch that exclude one another."""
WARNING_S = 120
"""Seconds before the time limit at which a job that resumes is told to save its state."""
Class = Literal["memory", "time", "node", "cancelled", "data", "settings", "program", "unknown"]
TaskStatus = Literal["pending", "running", "done", "failed"]
_OWN = frozenset({"throttle", "modules", "extra", "requeue"})
_REFUSED = frozenset({"array", "output", "error", "dependency", "wrap", "parsable", "signal", "no-requeue", "export", "chdir"})
_KEY = re.compile(r"[a-z][a-z0-9-]*")
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)([KMGT]?)B?", re.IGNORECASE)
_WAITING = frozenset({"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "STOPPED", "SPECIAL_EXIT"})
_ACTIVE = frozenset({"RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING"})
_CLASS_OF_STATE: dict[str, Class] = {
    "OUT_OF_MEMORY": "memory", "TIMEOUT": "time", "DEADLINE": "time", "NODE_FAIL": "node", "BOOT_FAIL": "node", "PREEMPTED": "node",
    "CANCELLED": "cancelled", "REVOKED": "cancelled",
}  # fmt: skip
# What slurmstepd leaves in the task's own log, which outlives the scheduler's memory of the job.
_CLASS_OF_WORDS: tuple[tuple[str, Class], ...] = (
    ("due to time limit", "time"), ("oom-kill", "memory"), ("oom_kill", "memory"), ("exceeded memory limit", "memory"),
    ("exceeded job memory limit", "memory"), ("due to node failure", "node"), ("due to preemption", "node"),
)  # fmt: skip
_CLASS_OF_CODE: dict[int, Class] = {
    2: "settings",
    16: "data",
    65: "data",
    66: "data",
    73: "settings",
    78: "settings",
    126: "settings",
    127: "settings",
}
_TAIL_BYTES = 20_000


class Resources(Frozen):
    """What a job asks for."""

    options: dict[str, str] = {}
    """Long options of sbatch and their values, e.g. partition, time, mem, cpus-per-task, gres, account."""
    throttle: int | None = None
    """Tasks of an array that run at the same time at most."""
    modules: tuple[str, ...] = ()
    """Loaded by ``module load`` before the command."""
    extra: tuple[str, ...] = ()
    """Lines of shell before the command; in an array ``$label`` is the participant."""
    requeue: bool = True
    """Go on after the time limit, where the command resumes inside a unit."""

    @classmethod
    def parse(cls, pairs: Sequence[str]) -> Resources:
        """From ``key=value`` texts of --slurm.

        Raises
        ------
        SettingsError
            A text is no pair, an option is one that the submission decides itself, or a value spans lines.
        """
        options: dict[str, str] = {}
        own: dict[str, list[str]] = {name: [] for name in _OWN}
        for pair in pairs:
            key, separator, value = pair.partition("=")
            key = key.strip().lstrip("-").replace("_", "-")
            if not separator or not _KEY.fullmatch(key):
                raise SettingsError(f"--slurm '{pair}' is no KEY=VALUE", fix="e.g. --slurm partition=short time=01:00:00 mem=4G")
            if "\n" in value or "\r" in value:
                raise SettingsError(f"--slurm {key} spans several lines", fix="give one line; use 'extra' once per line")
            if key in _REFUSED:
                raise SettingsError(f"--slurm {key} is set by the submission itself", fix="leave it out")
            if key in own:
                own[key].append(value)
            else:
                options[key] = value
        for name in MEMORY_OPTIONS:
            if name in options:
                megabytes(options[name])
        if "time" in options:
            seconds(options["time"])
        return cls(
            options=options,
            throttle=_positive(own["throttle"][-1]) if own["throttle"] else None,
            modules=tuple(name for text in own["modules"] for name in text.split(",") if name),
            extra=tuple(own["extra"]),
            requeue=not own["requeue"] or own["requeue"][-1].lower() not in {"false", "no", "0"},
        )

    def with_more(self, *, memory: bool, time: bool) -> Resources:
        """Twice the memory, or twice the time."""
        options = dict(self.options)
        for name in MEMORY_OPTIONS:
            if memory and name in options:
                options[name] = f"{2 * megabytes(options[name])}M"
        if time and "time" in options:
            options["time"] = clock(2 * seconds(options["time"]))
        return self.model_copy(update={"options": options})


class Job(Frozen):
    """One job or array of a submission."""

    role: Literal["participants", "single", "group"]
    """An array over participants, one job for a command, or the group job after an array."""
    job_id: str = Field(pattern=r"^\d*$")
    """As sbatch gave it."""
    labels: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9+]+$")], ...] = ()
    """Participants of an array; task 1 is the first."""
    argv: tuple[str, ...]
    """brainfm's arguments; an array's tasks get ``--participant-label`` behind them."""
    resources: Resources
    """What was asked for."""


class Submission(Frozen):
    """What was given to the scheduler at one moment."""

    name: str
    """Folder below logs/slurm."""
    submitted: str
    """UTC time."""
    jobs: tuple[Job, ...]
    """In order."""


class Task(Frozen):
    """The last attempt at one piece of work."""

    unit: str
    """``sub-01``, or the role of a job without participants."""
    role: str
    """participants, single or group."""
    job: str
    """Job id, with the task's number in an array."""
    status: TaskStatus
    """pending, running, done or failed."""
    failure: Class | None = None
    """Why it failed."""
    reason: str = ""
    """The scheduler's words, or the exit code."""
    node: str = ""
    """Where it ran, as far as known."""
    log: str
    """Its log, relative to the output folder."""


def job_script(job: Job, folder: Path, number: int, *, brainfm: Sequence[str], resumes: bool, behind: Sequence[str] = ()) -> str:
    """The batch script of job ``number`` of a submission whose ``folder`` (absolute) holds logs, exit codes and lists of participants.

    It waits for the end of the jobs that it is ``behind``.

    A command that ``resumes`` within a unit is told :data:`WARNING_S` before the time limit to save its state (SIGUSR1), and
    the job is put into the queue again.
    """
    array = job.role == "participants"
    requeues = resumes and job.resources.requeue
    name = f"brainfm-{job.argv[0]}" + ("" if array else f"-{job.role}")
    options = {
        "job-name": name,
        **job.resources.options,
        "output": f"{folder / 'task-%A_%a.out' if array else folder / 'task-%j.out'}",
        "open-mode": "append",
    }
    if array:
        options["array"] = f"1-{len(job.labels)}" + (f"%{job.resources.throttle}" if job.resources.throttle else "")
    if behind:
        options["dependency"] = f"afterany:{':'.join(behind)}"
    if requeues:
        options["signal"] = f"B:USR1@{WARNING_S}"
    lines = ["#!/usr/bin/env bash", *(f"#SBATCH --{key}={_directive(value)}" for key, value in options.items())]
    lines += ["#SBATCH --requeue" if requeues else "#SBATCH --no-requeue", "set -u", f"folder={shlex.quote(str(folder))}"]
    lines.append('task="${SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}${SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}"')
    if job.resources.modules:
        lines.append(shlex.join(["module", "load", *job.resources.modules]))
    command = shlex.join([*brainfm, *job.argv])
    if array:  # before the extra lines, which may use it
        lines.append(f'label=$(sed -n "${{SLURM_ARRAY_TASK_ID}}p" {shlex.quote(str(folder / participants_file(number)))})')
        command += ' --participant-label "$label"'
    lines += ['export OMP_NUM_THREADS="${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}"', *job.resources.extra]
    if requeues:
        lines += ["asked=0", "trap 'asked=1; kill -USR1 \"$child\" 2>/dev/null' USR1"]
    lines += [f"{command} &", "child=$!", 'wait "$child"; code=$?']
    if requeues:
        lines += [
            "# a trapped signal ends 'wait' before the command has ended",
            'while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done',
            f'if [ "$asked" = 1 ] && {{ [ "$code" = 75 ] || [ "$code" -gt 128 ]; }} && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {MOST_REQUEUES} ]; then',
            '  scontrol requeue "$SLURM_JOB_ID" && exit 0',
            "fi",
        ]
    lines += [
        'printf \'%s %s\\n\' "$code" "$(hostname)" > "$folder/exit-$task.part" && mv "$folder/exit-$task.part" "$folder/exit-$task"',
        'exit "$code"',
    ]
    return "\n".join(lines) + "\n"


def _directive(value: str) -> str:
    return f'"{value}"' if re.search(r"\s", value) else value


def participants_file(number: int) -> str:
    """Name of the list of an array's participants."""
    return f"participants-{number}.txt"


def submit_jobs(output: Path, jobs: Sequence[Job], *, brainfm: Sequence[str], resumes: bool) -> Submission:
    """Write the scripts of a submission and give them to sbatch, a group job waiting for the arrays before it.

    Raises
    ------
    MissingProgramError
        sbatch is not there.
    ProgramFailedError
        sbatch refused a job; those before it are cancelled.
    """
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    known = {path.name for path in (output / FOLDER).glob("*")}
    name = next(text for text in (stamp, *(f"{stamp}-{number}" for number in range(2, 100))) if text not in known)
    folder = (output / FOLDER / name).absolute()
    submitted: list[Job] = []
    for number, job in enumerate(jobs, 1):
        if job.role == "participants":
            write_text(folder / participants_file(number), "\n".join(job.labels) + "\n")
        behind = [earlier.job_id for earlier in submitted] if job.role == "group" else []
        text = job_script(job, folder, number, brainfm=brainfm, resumes=resumes, behind=behind)
        script = write_text(folder / f"job-{number}-{job.role}.sh", text)
        code, said = ask("sbatch", "--parsable", str(script))
        found = re.search(r"^(\d+)(?:;\S+)?\s*$", said, re.MULTILINE)
        if code != 0 or found is None:
            for earlier in submitted:
                ask("scancel", earlier.job_id)
            if code == 127:
                raise MissingProgramError(
                    "sbatch is not there", fix="run this on a login node of a SLURM cluster, or look at the scripts with --dry-run"
                )
            raise ProgramFailedError(
                f"sbatch refused the job: {said.strip()}", where=script, fix="mend what it says with --slurm KEY=VALUE"
            )
        submitted.append(job.model_copy(update={"job_id": found.group(1)}))
        # after every job, so that nothing that was submitted is forgotten
        submission = Submission(name=name, submitted=datetime.now(UTC).isoformat(timespec="seconds"), jobs=tuple(submitted))
        write_json(folder / "submission.json", submission.model_dump(mode="json"))
    return submission


def read_submissions(output: Path) -> list[Submission]:
    """All submissions of an output folder, the oldest first.

    Raises
    ------
    InputDatasetError
        One is unreadable.
    """
    found = []
    for path in sorted((output / FOLDER).glob("*/submission.json")):
        try:
            one = Submission.model_validate_json(path.read_bytes())
            if one.name != path.parent.name:  # its logs would be looked for elsewhere
                raise ValueError(f"it calls itself '{one.name}'")
            found.append(one)
        except (OSError, ValueError) as error:
            raise InputDatasetError(
                f"the submission is unreadable: {error}", where=path, fix="remove its folder, and submit again"
            ) from error
    return found


def tasks_of(output: Path, submissions: Sequence[Submission]) -> list[Task]:
    """What became of every piece of work, by its last attempt; the scheduler is asked once."""
    queue = _queue()
    last: dict[tuple[str, str, str], Task] = {}
    for submission in submissions:
        folder = output / FOLDER / submission.name
        for job in submission.jobs:
            for number, label in enumerate(job.labels, 1) if job.role == "participants" else ((None, ""),):
                name = job.job_id if number is None else f"{job.job_id}_{number}"
                unit = f"sub-{label}" if label else job.role
                last[" ".join(job.argv) if job.role == "single" else job.argv[0], job.role, unit] = _task(
                    output, folder, job, name, unit, queue
                )
    return list(last.values())


def _task(output: Path, folder: Path, job: Job, name: str, unit: str, queue: Mapping[str, tuple[str, str, str]]) -> Task:
    log = folder / f"task-{name}.out"
    about = {"unit": unit, "role": job.role, "job": name, "log": log.relative_to(output).as_posix()}
    state, reason, node = queue.get(name, ("", "", ""))
    if state in _WAITING:
        return Task(status="pending", reason=reason, **about)  # type: ignore[arg-type]
    if state in _ACTIVE:
        return Task(status="running", node=node, **about)  # type: ignore[arg-type]
    code, node = _exit_of(folder / f"exit-{name}", node)
    if code == 0:
        return Task(status="done", node=node, **about)  # type: ignore[arg-type]
    if not state and code is None:
        state, node = _remembered(name, node)
        if state in _WAITING | _ACTIVE:  # the queue could not be read, or belongs to somebody else
            return Task(status="pending" if state in _WAITING else "running", node=node, **about)  # type: ignore[arg-type]
    words = _tail(log).lower()
    failure = _CLASS_OF_STATE.get(state) or next((kind for text, kind in _CLASS_OF_WORDS if text in words), None)
    if failure in {None, "cancelled"}:
        by_words = next((kind for text, kind in _CLASS_OF_WORDS if text in words), None)
        failure = by_words or (_CLASS_OF_CODE.get(code, "program") if code is not None else failure or "unknown")
    said = state.lower().replace("_", " ") if state else "the scheduler knows nothing of it any more"
    return Task(status="failed", failure=failure, reason=said if code is None else f"exit code {code}", node=node, **about)  # type: ignore[arg-type]


def _queue() -> dict[str, tuple[str, str, str]]:
    """(state, reason, node) of every job of this user that waits or runs, by job or task id; empty where there is no scheduler."""
    code, said = ask("squeue", "--noheader", "--array", "--me", "--format=%i|%T|%r|%N")
    found = {}
    for line in said.splitlines() if code == 0 else ():
        parts = line.strip().split("|")
        if len(parts) == 4:
            found[parts[0]] = (parts[1], "" if parts[2] == "None" else parts[2], parts[3])
    return found


def _remembered(name: str, node: str) -> tuple[str, str]:
    """State and node of a job that has ended, from accounting, else from the controller's own short memory."""
    code, said = ask("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={name}", "--format=State,NodeList")
    line = said.strip().splitlines()[0] if code == 0 and "|" in said else ""
    if line:
        state, _, where = line.partition("|")
        return state.split()[0].upper(), node or where
    code, said = ask("scontrol", "--oneliner", "show", "job", name)
    found = dict(part.split("=", 1) for part in said.split() if "=" in part) if code == 0 else {}
    return found.get("JobState", "").upper(), node or found.get("NodeList", "").replace("(null)", "")


def _exit_of(path: Path, node: str) -> tuple[int | None, str]:
    try:
        code, _, where = path.read_text(encoding="utf-8").strip().partition(" ")
        return int(code), where or node
    except (OSError, ValueError):
        return None, node


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""


def megabytes(text: str) -> int:
    """Megabytes of a memory size as sbatch reads it (no unit: megabytes).

    Raises
    ------
    SettingsError
        It is no size.
    """
    found = _MEMORY.fullmatch(text.strip())
    if found is None or float(found.group(1)) == 0:
        raise SettingsError(f"'{text}' is no memory size", fix="e.g. --slurm mem=4G")
    return max(1, round(float(found.group(1)) * {"K": 1 / 1024, "": 1, "M": 1, "G": 1024, "T": 1024**2}[found.group(2).upper()]))


def seconds(text: str) -> int:
    """Seconds of a time limit as sbatch reads it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    Raises
    ------
    SettingsError
        It is no time limit.
    """
    days, dash, rest = text.strip().rpartition("-")
    parts = rest.split(":")
    try:
        numbers = [int(part) for part in parts]
        whole_days = int(days) if dash else 0
    except ValueError:
        numbers = []
    if not numbers or len(numbers) > 3 or min(numbers) < 0:
        raise SettingsError(f"'{text}' is no time limit", fix="e.g. --slurm time=02:00:00, or time=1-12 for a day and a half")
    if dash:
        units: tuple[int, ...] = (3600, 60, 1)
    else:
        units = {1: (60,), 2: (60, 1), 3: (3600, 60, 1)}[len(numbers)]
    return 86400 * whole_days + sum(number * unit for number, unit in zip(numbers, units, strict=False))


def clock(number: int) -> str:
    """Seconds as a time limit."""
    days, rest = divmod(number, 86400)
    return (f"{days}-" if days else "") + f"{rest // 3600:02d}:{rest % 3600 // 60:02d}:{rest % 60:02d}"


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) == 0:
        raise SettingsError(f"--slurm throttle={text} is no number of tasks", fix="e.g. --slurm throttle=50")
    return int(text)
