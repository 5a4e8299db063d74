"""What became of every task that was submitted, with and without an accounting database, and after the scheduler has forgotten it."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Literal

from brainfm_cli.config import Frozen
from brainfm_cli.programs.commands import ask
from brainfm_cli.programs.slurm import FOLDER

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from brainfm_cli.programs.slurm import Submission

Class = Literal["memory", "time", "node", "cancelled", "data", "settings", "program", "unknown"]
TaskStatus = Literal["pending", "running", "done", "failed"]
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


def tasks_of(output: Path, submissions: Sequence[Submission]) -> list[Task]:
    """What became of every piece of work, by its last attempt; queue and memory of the scheduler are asked once, whatever the number of tasks."""
    queue = _queue()
    last: dict[tuple[str, str, str], tuple[Path, str, str, str]] = {}
    for submission in submissions:
        folder = output / FOLDER / submission.name
        for job in submission.jobs:
            for number, label in enumerate(job.labels, 1) if job.role == "participants" else ((None, ""),):
                name = job.job_id if number is None else f"{job.job_id}_{number}"
                unit = f"sub-{label}" if label else job.role
                what = " ".join(job.argv) if job.role == "single" else job.argv[0]
                last[what, job.role, unit] = (folder, job.role, name, unit)
    ended = {name: _exit_of(folder / f"exit-{name}") for folder, _, name, _ in last.values() if name not in queue}
    past = _past([name for name, (code, _) in ended.items() if code is None])
    known = queue | {name: (state, "", node) for name, (state, node) in past.items()}
    return [_task(output, *one, known.get(one[2], ("", "", "")), ended.get(one[2])) for one in last.values()]


def _task(
    output: Path, folder: Path, role: str, name: str, unit: str, known: tuple[str, str, str], ended: tuple[int | None, str] | None
) -> Task:
    log = folder / f"task-{name}.out"
    about = {"unit": unit, "role": role, "job": name, "log": log.relative_to(output).as_posix()}
    state, reason, node = known
    if state in _WAITING:
        return Task(status="pending", reason=reason, **about)  # type: ignore[arg-type]
    if state in _ACTIVE:
        return Task(status="running", node=node, **about)  # type: ignore[arg-type]
    code, where = ended or _exit_of(folder / f"exit-{name}")  # a job that completes is in the queue for a moment longer
    node = where or node
    if code == 0:
        return Task(status="done", node=node, **about)  # type: ignore[arg-type]
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


def _past(names: Sequence[str]) -> dict[str, tuple[str, str]]:
    """(state, node) of jobs and tasks that the queue lacks, from accounting, else from the controller's own short memory.

    Accounting is asked for all jobs together, the controller once per job (not per task of an array).
    """
    if not names:
        return {}
    jobs = sorted({name.partition("_")[0] for name in names}, key=int)
    code, said = ask("sacct", "--noheader", "--parsable2", "--allocations", f"--jobs={','.join(jobs)}", "--format=JobID,State,NodeList")
    found: dict[str, tuple[str, str]] = {}
    for line in said.splitlines() if code == 0 else ():
        job, _, rest = line.strip().partition("|")
        state, bar, node = rest.partition("|")
        if bar and state:
            found |= dict.fromkeys(_tasks_named(job), (state.split()[0].upper(), node))
    for job in sorted({name.partition("_")[0] for name in names if name not in found}, key=int):
        code, said = ask("scontrol", "--oneliner", "show", "job", job)
        for line in said.splitlines() if code == 0 else ():
            fields = dict(part.split("=", 1) for part in line.split() if "=" in part)
            name = f"{fields['ArrayJobId']}_{fields.get('ArrayTaskId', '')}" if "ArrayJobId" in fields else fields.get("JobId", job)
            node = fields.get("NodeList", "").replace("(null)", "")
            found |= dict.fromkeys(_tasks_named(name), (fields.get("JobState", "").upper(), node))
    return found


def _tasks_named(text: str) -> list[str]:
    """``50_3`` itself; the tasks of ``50_[1-3,7%2]``, as tasks that wait are named together."""
    match = re.fullmatch(r"(\d+)_\[?([\d,-]+)(?:%\d+)?\]?", text)
    if match is None:
        return [text]
    ranges = [part.partition("-") for part in match[2].split(",") if part]
    return [f"{match[1]}_{number}" for first, _, end in ranges if first for number in range(int(first), int(end or first) + 1)]


def _exit_of(path: Path) -> tuple[int | None, str]:
    """Exit code and node that a job left behind; none where it left nothing."""
    try:
        code, _, where = path.read_text(encoding="utf-8").strip().partition(" ")
        return int(code), where
    except (OSError, ValueError):
        return None, ""


def _tail(path: Path) -> str:
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - _TAIL_BYTES))
            return stream.read().decode(errors="replace")
    except OSError:
        return ""
