"""Reports and instructions that belong to studies: read from a table, from JSON, or from JSON lines.

BIDS has no home for reports. Three forms are read:

* a table (TSV) with participant_id, findings, impression and, where several languages occur, language; looked for as
  ``phenotype/radiology_report.tsv`` and ``phenotype/reports.tsv`` unless a file is given;
* a JSON object of cases, as RadGenome-Brain MRI has it: ``{case: {global_finding, impression}}`` or with the keys findings and impression;
* instructions as JSON lines: ``{"participant_id", "task", "turns": [[question, answer], …]}``.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from brainfm_cli.documents import parse_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

PLACES = ("phenotype/radiology_report.tsv", "phenotype/reports.tsv")
_FINDINGS = ("findings", "global_finding", "finding")
_MISSING = {"", "n/a"}


@dataclass(frozen=True, kw_only=True)
class StudyReport:
    """What a radiologist wrote of one participant."""

    findings: str
    """What is seen."""
    impression: str
    """What it means; empty where the report has none."""
    language: str = ""
    """As the table says; empty where it does not."""

    @property
    def text(self) -> str:
        """Both parts."""
        return f"{self.findings}\n{self.impression}" if self.impression else self.findings


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """Questions about one study with the answers that are to be given."""

    participant: str
    """Label without ``sub-``."""
    task: str
    """What kind of instruction."""
    turns: tuple[tuple[str, str], ...]
    """(question, answer), in order."""


def find_reports(root: Path, given: Path | None) -> Path:
    """The file of reports: the given one, or the first of :data:`PLACES`.

    Raises
    ------
    InputNotFoundError
        There is none.
    """
    found = given if given is not None else next((root / place for place in PLACES if (root / place).is_file()), None)
    if found is None or not found.is_file():
        raise InputNotFoundError(
            "there are no reports",
            where=found or root,
            fix=f"write {PLACES[0]} with participant_id, findings and impression, or give a file: --set reports=FILE",
        )
    return found


def read_reports(path: Path, people: Collection[str]) -> dict[str, StudyReport]:
    """The report of each participant; people without one are left out.

    Raises
    ------
    InputDatasetError
        The file is unreadable, lacks a column, names somebody who is not among ``people``, tells two reports of one person, or holds
        an empty report.
    """
    rows = _json_rows(path) if path.suffix == ".json" else _table_rows(path)
    found: dict[str, StudyReport] = {}
    for place, row in enumerate(rows, start=1):
        label = row["participant_id"].removeprefix("sub-")
        if label not in people:
            raise InputDatasetError(
                f"report {place} is of '{row['participant_id']}', who is not in the dataset", where=path, fix="take the report out, or add the scans"
            )  # fmt: skip
        if label in found:
            raise InputDatasetError(
                f"there are two reports of sub-{label}", where=path, fix="keep one per participant, or give one session at a time"
            )
        findings, impression = (_said(row.get(name)) for name in ("findings", "impression"))
        if not findings and not impression:
            raise InputDatasetError(f"the report of sub-{label} is empty", where=path, fix="write it or take the row out")
        found[label] = StudyReport(findings=findings or impression, impression=impression if findings else "", language=_said(row.get("language")))  # fmt: skip
    if not found:
        raise InputDatasetError("the file holds no report", where=path, fix="add one row per participant")
    return found


def read_conversations(path: Path, people: Collection[str]) -> tuple[Conversation, ...]:
    """Instructions with their answers, in the order of the file.

    Raises
    ------
    InputDatasetError
        A line is no JSON object, names somebody who is not among ``people``, or has a turn without question or answer.
    """
    found = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
            label = str(values["participant_id"]).removeprefix("sub-")
            turns = tuple((str(question).strip(), str(answer).strip()) for question, answer in values["turns"])
            task = str(values.get("task", "instruction"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputDatasetError(
                f"line {number} is no instruction: {error}",
                where=path,
                fix='every line is {"participant_id": "sub-01", "task": "findings", "turns": [["question", "answer"]]}',
            ) from error
        if label not in people:
            raise InputDatasetError(f"line {number} is about '{label}', who is not in the dataset", where=path, fix="take the line out")
        if not turns or not all(question and answer for question, answer in turns):
            raise InputDatasetError(f"line {number} has an empty question or answer", where=path, fix="write both, or take the line out")
        found.append(Conversation(participant=label, task=task, turns=turns))
    return tuple(found)


def _table_rows(path: Path) -> list[dict[str, Any]]:
    import pandas as pd

    try:
        table = pd.read_csv(io.StringIO(_text(path)), sep="\t", dtype=str, keep_default_na=False)
    except ValueError as error:
        raise InputDatasetError(f"the table of reports is unreadable: {error}", where=path, fix="it must be tab-separated") from error
    absent = [name for name in ("participant_id", "findings", "impression") if name not in table]
    if absent:
        raise InputDatasetError(f"the table of reports lacks {', '.join(absent)}", where=path, fix="add the column; impressions may be n/a")
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _json_rows(path: Path) -> list[dict[str, Any]]:
    try:
        cases: Mapping[str, Mapping[str, Any]] = parse_json(_text(path))
        return [
            {
                "participant_id": str(name),
                "findings": next((str(case[key]) for key in _FINDINGS if key in case), ""),
                "impression": str(case.get("impression", "")),
                "language": str(case.get("language", "")),
            }
            for name, case in cases.items()
        ]
    except (ValueError, TypeError, AttributeError) as error:
        raise InputDatasetError(
            f"the reports are unreadable: {error}", where=path, fix="write one object: {case: {findings, impression}}"
        ) from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputDatasetError(f"the file is unreadable: {error}", where=path, fix="it must be UTF-8 text") from error


def _said(value: object) -> str:
    text = " ".join(str(value or "").split())
    return "" if text in _MISSING else text
