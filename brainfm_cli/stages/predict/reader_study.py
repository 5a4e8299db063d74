"""predict group --reader-study: what doctors reach with and without a model, from the table of their readings."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from pydantic import ValidationError
from rich.console import Console

from brainfm_cli.bids.derivatives import OutputDataset, write_json, write_text
from brainfm_cli.bids.people import find_participants_table
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, UsageError
from brainfm_cli.learning.reader_study import ReaderStudy, analyse
from brainfm_cli.learning.reading_table import ReaderStudySettings, Readings, read_readings
from brainfm_cli.reports.reader_study import reader_study_page
from brainfm_cli.stages.predict.locking import SEAL, TABLE, LockedPredictions, read_lock

if TYPE_CHECKING:
    from pathlib import Path

    from brainfm_cli.config import Invocation, Settings

RESULT, PAGE = "reader_study.json", "reader_study.html"


def study_readers(call: Invocation, settings: Settings, study: ReaderStudySettings) -> int:
    """Analyse the table of ``call.reader_study``; gives back the exit code.

    Raises
    ------
    UsageError
        Asked for at participant level.
    InputNotFoundError, InputDatasetError
        As :func:`read_readings`, :func:`read_lock`.
    """
    assert call.reader_study is not None  # noqa: S101  (checked by the caller)
    if call.level != "group":
        raise UsageError("--reader-study is of the group level", fix="brainfm predict INPUT OUTPUT group --reader-study FILE")
    if call.reports_only:
        return _rebuild(call.output_dir)
    locked = call.datasets.get("locked")
    # read before anything is written, so that a bad table leaves nothing behind
    readings = _readings(call.reader_study, study, None if locked is None else read_lock(locked))
    if call.dry_run:
        Console().print(_plan(readings), highlight=False)
        return 0
    dataset = OutputDataset.open(call.output_dir, command="predict", settings=settings, sources=[call.input_dir])
    inputs = (call.reader_study, *([] if locked is None else [locked / TABLE, locked / SEAL]))
    arguments = {"table": call.reader_study, "locked": locked, "people": call.input_dir, "root": dataset.root, "settings": study}
    return run_units(dataset, [Unit(name="reader-study", inputs=inputs, work=write_study, arguments=arguments)], call.execution)


def write_study(table: Path, locked: Path | None, people: Path, root: Path, settings: ReaderStudySettings) -> UnitResult:
    """Analyse, and write reader_study.json and its page."""
    lock = None if locked is None else read_lock(locked)
    readings = _readings(table, settings, lock)
    found = analyse(readings, settings)
    notes = (*found.notes, *_notes(readings, lock, people))
    found = found.model_copy(update={"notes": notes, "predictions_sha256": None if lock is None else lock.sha256})
    outputs = (
        write_json(root / RESULT, found.model_dump(mode="json")),
        write_json(root / "logs" / "reader_study.schema.json", ReaderStudy.model_json_schema()),
        write_text(root / PAGE, reader_study_page(found).render()),
    )
    return UnitResult(outputs=outputs, notes=notes, seed=settings.seed)


def _readings(table: Path, settings: ReaderStudySettings, lock: LockedPredictions | None) -> Readings:
    readings = read_readings(table, settings)
    if lock is None:
        return readings
    if readings.model_scores is not None:
        raise InputDatasetError(
            "the model's scores are in the table and locked as well", where=table, fix="leave them out of the table, or -d locked out"
        )
    scores, decisions = lock.of(readings.cases)
    return replace(readings, model_scores=scores, model_decisions=decisions)


def _notes(readings: Readings, lock: LockedPredictions | None, people: Path) -> list[str]:
    notes = []
    if lock is not None:
        notes.append(f"The model's predictions ({lock.model}) were locked on {lock.date}; sha256 {lock.sha256}.")
        if lock.outcomes_known:
            notes.append(f"{lock.outcomes_known} outcomes were known when they were locked: for those it is no prospective prediction.")
    table = find_participants_table(people)
    if table is not None:
        known = {line.split("\t")[0].removeprefix("sub-") for line in table.read_text(encoding="utf-8").splitlines()[1:]}
        foreign = [case for case in readings.cases if case.removeprefix("sub-") not in known]
        if foreign:
            notes.append(f"{len(foreign)} of {len(readings.cases)} cases are not in participants.tsv of the input, e.g. '{foreign[0]}'.")
    return notes


def _plan(readings: Readings) -> str:
    kinds = ", ".join(f"{column} ({len(set(levels))})" for column, levels in readings.strata.items()) or "none"
    return (
        f"reader study: {len(readings.readers)} readers, {len(readings.cases)} cases ({int(readings.truth.sum())} with the condition), "
        f"arms {', '.join(readings.arms)} (the first is the reference); kinds of readers: {kinds}; "
        f"model {'absent' if readings.model_scores is None else 'present'}"
    )


def _rebuild(root: Path) -> int:
    path = root / RESULT
    try:
        found = ReaderStudy.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise InputNotFoundError("no reader study here", where=root, fix="run it once without --reports-only") from error
    except (OSError, ValidationError) as error:
        raise InputDatasetError(f"the reader study is unreadable: {error}", where=path, fix="analyse the table again") from error
    write_text(root / PAGE, reader_study_page(found).render())
    return 0
