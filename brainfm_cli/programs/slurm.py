"""SLURM: what jobs ask for, scripts that requeue themselves, and submission."""

from __future__ import annotations

import re
import shlex
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from brainfm_cli.bids.derivatives import write_json, write_text
from brainfm_cli.config import Frozen
from brainfm_cli.errors import InputDatasetError, MissingProgramError, OutputError, ProgramFailedError, SettingsError
from brainfm_cli.programs.commands import ask

if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER = Path("logs") / "slurm"
"""Where submissions lie in an output folder."""
MOST_REQUEUES = 20
"""A job that was stopped by its time limit this often makes no progress."""
LARGEST_ARRAY = 1000
"""Tasks of one array: the index that sbatch takes by default is below 1001."""
MEMORY_OPTIONS = ("mem", "mem-per-cpu", "mem-per-gpu")
"""Options of sbatch that exclude one another."""
WARNING_S = 120
"""Seconds before the time limit at which a job that resumes is told to save its state; a third of limits below three minutes."""
SHORTEST_S = 120
"""SLURM looks at its clock once a minute: below this limit a job would be told to stop before it has done anything."""
_OWN = frozenset({"throttle", "modules", "extra", "requeue"})
_REFUSED = frozenset({"array", "output", "error", "dependency", "wrap", "parsable", "signal", "no-requeue", "export", "chdir"})
_KEY = re.compile(r"[a-z][a-z0-9-]*")
_MEMORY = re.compile(r"(\d+(?:\.\d+)?)([KMGT]?)B?", re.IGNORECASE)


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
    after: tuple[Annotated[str, Field(pattern=r"^\d+$")], ...] = ()
    """Jobs of earlier submissions that a group job waits for too."""


class Submission(Frozen):
    """What was given to the scheduler at one moment."""

    name: str
    """Folder below logs/slurm."""
    submitted: str
    """UTC time."""
    jobs: tuple[Job, ...]
    """In order."""


def job_script(job: Job, folder: Path, number: int, *, brainfm: Sequence[str], resumes: bool, behind: Sequence[str] = ()) -> str:
    """The batch script of job ``number`` of a submission whose ``folder`` (absolute) holds logs, exit codes and lists of participants.

    It waits for the end of the jobs that it is ``behind``.

    A command that ``resumes`` within a unit is told :data:`WARNING_S` before the time limit to save its state (SIGUSR1), and
    the job is put into the queue again.

    Raises
    ------
    SettingsError
        The time limit of a command that resumes is so short that it would be stopped before it has done anything.
    """
    array = job.role == "participants"
    requeues = resumes and job.resources.requeue
    name = f"brainfm-{job.argv[0]}" + ("" if array else f"-{job.role}")
    options = {
        "job-name": name,
        **job.resources.options,
        "output": f"{str(folder).replace('%', '%%')}/task-{'%A_%a' if array else '%j'}.out",
        "open-mode": "append",
    }
    if array:
        options["array"] = f"1-{len(job.labels)}" + (f"%{job.resources.throttle}" if job.resources.throttle else "")
    if behind:
        options["dependency"] = f"afterany:{':'.join(behind)}"
    if requeues:
        options["signal"] = f"B:USR1@{warning_s(job.resources)}"
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


def warning_s(resources: Resources) -> int:
    """Seconds before its time limit at which a job that resumes is told so.

    Raises
    ------
    SettingsError
        The limit is below :data:`SHORTEST_S`.
    """
    limit = seconds(resources.options["time"]) if "time" in resources.options else 86400
    if limit < SHORTEST_S:
        raise SettingsError(
            f"a time limit of {limit} s is over before the job has done anything, and it would be requeued in vain",
            fix="give at least two minutes, or requeue=no",
        )
    return WARNING_S if limit > WARNING_S + 59 else limit // 3


def _directive(value: str) -> str:
    """A value as sbatch reads it back from an #SBATCH line: blanks, quotes and ``#`` inside quotes, escaped by backslashes."""
    if not re.search(r"[\s\"'#\\]", value):
        return value
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


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
    folder = _own_folder((output / FOLDER).absolute())
    submitted: list[Job] = []
    for number, job in enumerate(jobs, 1):
        if job.role == "participants":
            write_text(folder / participants_file(number), "\n".join(job.labels) + "\n")
        behind = [*job.after, *(earlier.job_id for earlier in submitted)] if job.role == "group" else []
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
        submission = Submission(name=folder.name, submitted=datetime.now(UTC).isoformat(timespec="seconds"), jobs=tuple(submitted))
        write_json(folder / "submission.json", submission.model_dump(mode="json"))
    return submission


def _own_folder(parent: Path) -> Path:
    """A new folder named by the time, ours alone also where somebody else submits in the same second."""
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
    for name in (stamp, *(f"{stamp}-{number}" for number in range(2, 1000))):
        try:
            (parent / name).mkdir(parents=True)
        except FileExistsError:
            continue
        return parent / name
    raise OutputError("a thousand submissions within a second", where=parent, fix="submit again")


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
