"""status: what is done, current, stale or failed, and why."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from brainfm_cli.config import Frozen
from brainfm_cli.errors import EXIT_OK, InputNotFoundError
from brainfm_cli.programs.slurm import FOLDER as SLURM_FOLDER
from brainfm_cli.programs.slurm import read_submissions
from brainfm_cli.programs.slurm_tasks import tasks_of
from brainfm_cli.provenance import (
    RECORDS_FOLDER,
    FileStamp,
    State,
    UnitRecord,
    file_sha256,
    input_configuration_hash,
    outputs_hold,
    read_records,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from brainfm_cli.programs.slurm_tasks import Task

_MOST_LINES = 200
"""Units of the table; of a large dataset only those are shown that need something."""
_STYLE = {"pending": "yellow", "running": "yellow", "current": "green", "stale": "yellow", "interrupted": "yellow", "failed": "red"}


class UnitStatus(Frozen):
    """One line of the table."""

    folder: str
    """Output folder, relative to the one asked about."""
    command: str
    """Command that wrote it."""
    unit: str
    """Name of the unit."""
    state: State
    """current, stale, failed or interrupted."""
    reason: str
    """Why it is not current; empty where it is."""
    failure_class: str | None = None
    """Class of the failure."""
    fix: str | None = None
    """What to do next."""
    seconds: float
    """Duration."""
    peak_memory_mb: float
    """Largest resident size."""


def status(folder: Path, *, as_json: bool = False, verify: bool = False) -> int:
    """Print the state of every unit in ``folder`` and the output folders inside it.

    Raises
    ------
    InputNotFoundError
        There is no completion record.
    """
    roots = _output_folders(folder)
    found = [line for root in roots for line in _lines(root, folder, verify=verify)]
    tasks = {root: tasks_of(root, submissions) for root in roots if (submissions := read_submissions(root))}
    if not found and not tasks:
        raise InputNotFoundError("no completion records here", where=folder, fix="give an OUTPUT_DIR of a brainfm command")
    if as_json:
        counts = Counter(line.state for line in found)
        jobs = [{"folder": _label(root, folder), **task.model_dump()} for root, listed in tasks.items() for task in listed]
        text = json.dumps({"counts": dict(counts), "units": [line.model_dump() for line in found], "jobs": jobs}, indent=2)
        sys.stdout.write(text + "\n")
        return EXIT_OK
    table = Table("folder", "command", "unit", "state", "seconds", "MB", "why, and what to do", box=None)
    shown = found if len(found) <= _MOST_LINES else [line for line in found if line.state != "current"][:_MOST_LINES]
    for line in shown:
        reason = f"{line.failure_class}: {line.reason} — {line.fix}" if line.failure_class else line.reason
        state = f"[{_STYLE[line.state]}]{line.state}[/]"
        table.add_row(
            escape(line.folder), line.command, escape(line.unit), state, f"{line.seconds:.1f}", f"{line.peak_memory_mb:.0f}", escape(reason)
        )
    console = Console()
    console.print(table)
    if len(shown) < len(found):
        console.print(f"{len(found) - len(shown)} more, those that are current left out first; --json lists all", highlight=False)
    console.print(", ".join(f"{count} {state}" for state, count in sorted(Counter(line.state for line in found).items())))
    for root, listed in tasks.items():
        _print_jobs(console, _label(root, folder), listed)
    return EXIT_OK


def _print_jobs(console: Console, label: str, tasks: Sequence[Task]) -> None:
    """What waits, runs or failed on the cluster, and how many tasks are done."""
    table = Table("folder", "unit", "job", "state", "why", "node", "log", box=None)
    for task in tasks:
        if task.status != "done" and table.row_count < _MOST_LINES:
            why = f"{task.failure}: {task.reason}" if task.failure else task.reason
            state = f"[{_STYLE.get(task.status, 'white')}]{task.status}[/]"
            table.add_row(escape(label), escape(task.unit), task.job, state, escape(why), escape(task.node), escape(task.log))
    counts = ", ".join(f"{count} {state}" for state, count in sorted(Counter(task.status for task in tasks).items()))
    console.print(f"tasks on the cluster: {counts}", highlight=False)
    if table.row_count:
        console.print(table)
    if (more := sum(task.status != "done" for task in tasks) - table.row_count) > 0:
        console.print(f"{more} more of them; --json lists all", highlight=False)
    lacking = [task for task in tasks if task.failure in {"memory", "time", "node", "cancelled", "unknown"}]
    if lacking:
        console.print(f"{len(lacking)} of them may succeed with more: brainfm submit --resubmit failed OUTPUT_DIR", highlight=False)


def _label(root: Path, asked: Path) -> str:
    return "." if root == asked else root.name


def _output_folders(folder: Path) -> list[Path]:
    if _has_work(folder):
        return [folder]
    if not folder.is_dir():
        raise InputNotFoundError("the folder does not exist", where=folder, fix="check the path")
    return sorted(child for child in folder.iterdir() if _has_work(child))


def _has_work(folder: Path) -> bool:
    return (folder / RECORDS_FOLDER).is_dir() or (folder / SLURM_FOLDER).is_dir()


def _lines(root: Path, asked: Path, *, verify: bool) -> list[UnitStatus]:
    configuration_hash = input_configuration_hash(root)
    lines = []
    for record in read_records(root):
        state, reason = _judge(record, root, configuration_hash, verify=verify)
        lines.append(
            UnitStatus(
                folder=_label(root, asked),
                command=record.command,
                unit=record.unit,
                state=state,
                reason=reason,
                failure_class=record.failure.failure_class if record.failure else None,
                fix=record.failure.fix if record.failure else None,
                seconds=record.seconds,
                peak_memory_mb=record.peak_memory_mb,
            )
        )
    return lines


def _judge(record: UnitRecord, root: Path, configuration_hash: str | None, *, verify: bool) -> tuple[State, str]:
    if record.failure is not None:
        return "failed", record.failure.message
    if record.status == "running":
        return "interrupted", "started and not finished (or still running); the same command resumes"
    if record.configuration_hash != configuration_hash:
        return "stale", "made with other settings"
    for stamp in record.inputs:
        changed = _changed(stamp, root, verify=verify)
        if changed:
            return "stale", changed
    if not outputs_hold(record, root, verify=verify):
        return "stale", "an output is missing or differs from its record"
    return "current", ""


def _changed(stamp: FileStamp, root: Path, *, verify: bool) -> str:
    path = root / stamp.path  # an absolute stamp path stays what it is
    try:
        info = path.stat()
    except OSError:
        return f"input is gone: {stamp.path}"
    if (info.st_size, info.st_mtime_ns) != (stamp.size, stamp.mtime_ns):
        return f"input changed: {stamp.path}"
    if verify and stamp.sha256 is not None and file_sha256(path) != stamp.sha256:
        return f"input contents changed: {stamp.path}"
    return ""
