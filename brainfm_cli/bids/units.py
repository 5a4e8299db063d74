"""Run units of work: skip what is current, do the rest, record how each ended."""

from __future__ import annotations

import ctypes
import logging
import resource
import signal
import sys
import time
import traceback
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from datetime import UTC, datetime
from multiprocessing import active_children, get_context
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from brainfm_cli.bids.derivatives import sweep
from brainfm_cli.errors import EXIT_OK, BrainFMError, InputDatasetError, InputNotFoundError, OutOfMemoryError, classify, combined_exit_code
from brainfm_cli.provenance import (
    FailureRecord,
    FileStamp,
    UnitRecord,
    package_versions,
    read_record,
    record_path,
    stamp_input,
    stamp_output,
    unit_state,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from brainfm_cli.bids.derivatives import OutputDataset
    from brainfm_cli.config import Execution

log = logging.getLogger(__name__)
console = Console(stderr=True)
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


@dataclass(frozen=True, kw_only=True)
class UnitResult:
    """What a unit's work gives back."""

    outputs: tuple[Path, ...]
    """Files written."""
    notes: tuple[str, ...] = ()
    """Warnings for the reader of the results."""
    seed: int | None = None
    """Seed, where one was used."""


@dataclass(frozen=True, kw_only=True)
class Unit:
    """One unit of work: a name, the files it reads, and the call that does it (picklable)."""

    name: str
    """``sub-01``, ``group``, ``model-<id>``; also the record's file name."""
    inputs: tuple[Path, ...]
    """Every file whose change makes the unit stale."""
    work: Callable[..., UnitResult | None]
    """A module-level function; none where another process of the same training records the unit."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of ``work``; picklable."""


def plan_units(dataset: OutputDataset, units: Sequence[Unit]) -> dict[str, str]:
    """State of each unit: missing, current, stale, failed or interrupted."""
    return {unit.name: _state(dataset, unit) for unit in units}


def run_units(dataset: OutputDataset, units: Sequence[Unit], execution: Execution) -> int:
    """Do every unit that is not current, record each, and give back the exit code of the whole.

    A unit's failure is recorded with its class and remedy, and the next unit runs.
    """
    states = plan_units(dataset, units)
    todo = [unit for unit in units if states[unit.name] != "current"]
    if "interrupted" in states.values():
        sweep(dataset.root, recursive=True)
    skipped = len(units) - len(todo)
    codes = [EXIT_OK] * skipped
    if skipped:
        log.info("%d of %d units are current and skipped", skipped, len(units))
    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        console=console, disable=not console.is_terminal,
    ) as progress:  # fmt: skip
        task = progress.add_task(dataset.command, total=len(units), completed=skipped)
        for code in _execute(dataset, todo, execution):
            codes.append(code)
            progress.advance(task)
            if code != EXIT_OK and execution.stop_on_first_crash:
                break
    return combined_exit_code(codes)


def do_unit(dataset: OutputDataset, unit: Unit) -> int:
    """Do one unit in this process, record it, and give back its exit code."""
    started, clock = datetime.now(UTC), time.perf_counter()
    common: dict[str, Any] = {
        "unit": unit.name,
        "command": dataset.command,
        "configuration_hash": dataset.configuration_hash,
        "started": started.isoformat(timespec="seconds"),
        "versions": package_versions(),
    }
    stamps: tuple[FileStamp, ...] = ()
    try:
        stamps = _present(unit)  # taken before the work: a file that changes meanwhile makes the unit stale
        dataset.write_record(UnitRecord(status="running", inputs=stamps, **common))
        result = unit.work(**unit.arguments)
        if result is None:
            return EXIT_OK
        record = UnitRecord(
            status="done",
            inputs=_hashed(unit, stamps),
            outputs=tuple(stamp_output(path, root=dataset.root) for path in sorted(result.outputs)),
            seed=result.seed,
            notes=result.notes,
            seconds=round(time.perf_counter() - clock, 3),
            peak_memory_mb=peak_memory_mb(),
            **common,
        )
        dataset.write_record(record)
    except Exception as error:  # noqa: BLE001  (the border where any error becomes a record; nothing is swallowed)
        return _record_failure(dataset, unit, error, common, stamps, time.perf_counter() - clock)
    return EXIT_OK


def die_with_parent() -> None:
    """Ask the kernel to terminate this process when its parent is gone, also when that was killed; on Linux."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def peak_memory_mb() -> float:
    """Largest resident size of this process so far, megabytes."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def _execute(dataset: OutputDataset, todo: Sequence[Unit], execution: Execution) -> Any:  # noqa: ANN401  (generator of int)
    if execution.nprocs <= 1 or len(todo) <= 1:
        for unit in todo:
            yield do_unit(dataset, unit)
        return
    # spawn: forked children inherit locks of BLAS and torch threads and may hang
    workers = min(execution.nprocs, len(todo))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=die_with_parent) as pool:
        running: dict[Future[int], Unit] = {pool.submit(do_unit, dataset, unit): unit for unit in todo}
        try:
            while running:
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    unit = running.pop(future)
                    yield _outcome(dataset, unit, future)
        except BaseException:
            # Interrupted, terminated, or stopped at a failure: Python would wait for what runs to end, which may take hours.
            for worker in active_children():
                worker.terminate()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _outcome(dataset: OutputDataset, unit: Unit, future: Future[int]) -> int:
    try:
        return future.result()
    except BrokenProcessPool:
        # The kernel killed a worker; by far the most frequent reason is memory.
        error = OutOfMemoryError(
            "a worker process was killed, most likely for memory", fix="give more memory or fewer --nprocs, then run again"
        )
        return _record_failure(dataset, unit, error, {"unit": unit.name, "command": dataset.command, "configuration_hash": dataset.configuration_hash}, (), 0.0)  # fmt: skip


def _record_failure(
    dataset: OutputDataset, unit: Unit, error: Exception, common: dict[str, Any], stamps: tuple[FileStamp, ...], seconds: float
) -> int:
    known: BrainFMError = classify(error)
    where = f" [{known.where}]" if known.where else ""
    log.error("%s: %s", unit.name, known)
    if known.exit_code == 1:
        log.error("%s", "".join(traceback.format_exception(error)))
    failure = FailureRecord(failure_class=known.failure_class, exit_code=known.exit_code, message=f"{known.what}{where}", fix=known.fix)
    record = UnitRecord(
        status="failed", inputs=stamps, failure=failure, seconds=round(seconds, 3), peak_memory_mb=peak_memory_mb(), **common
    )
    try:
        dataset.write_record(record)
    except OSError as writing:
        log.error("%s: the failure could not be recorded: %s", unit.name, writing)
    return known.exit_code


def _state(dataset: OutputDataset, unit: Unit) -> str:
    record = read_record(record_path(dataset.root, unit.name))
    if record is None:
        return "missing"  # whatever its inputs are: a large cohort has some ten thousand
    try:
        stamps = _stamps(unit)
    except OSError:
        return "stale"  # an input vanished: doing the unit gives the named error
    return unit_state(record, configuration_hash=dataset.configuration_hash, inputs=stamps, output_dir=dataset.root)


def _stamps(unit: Unit) -> tuple[FileStamp, ...]:
    return tuple(stamp_input(path) for path in unit.inputs)


def _present(unit: Unit) -> tuple[FileStamp, ...]:
    try:
        return _stamps(unit)
    except FileNotFoundError as error:
        raise InputNotFoundError("a file that this needs is absent", where=error.filename, fix="check the path, or put it back") from error


def _hashed(unit: Unit, stamps: tuple[FileStamp, ...]) -> tuple[FileStamp, ...]:
    # Hashed after the work, while the files are still in the page cache.
    hashed = tuple(stamp_input(path, contents=True) for path in unit.inputs)
    for before, after in zip(stamps, hashed, strict=True):
        if (before.size, before.mtime_ns) != (after.size, after.mtime_ns):
            raise InputDatasetError("the file changed while it was being read", where=after.path, fix="run the same command again")
    return hashed
