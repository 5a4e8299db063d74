"""Reports and instructions as labs have them: tables, JSON of cases, JSON lines; what is wrong is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from brainfm_cli.bids.reports import find_reports, read_conversations, read_reports
from brainfm_cli.errors import InputDatasetError, InputNotFoundError

PEOPLE = ("01", "02", "03")
HEAD = "participant_id\tlanguage\tfindings\timpression\n"


def table(folder: Path, *rows: str, head: str = HEAD) -> Path:
    path = folder / "phenotype" / "reports.tsv"
    path.parent.mkdir(exist_ok=True)
    path.write_text(head + "".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def test_a_table_and_a_json_of_cases_say_the_same(tmp_path: Path) -> None:
    path = table(tmp_path, "sub-01\ten\tA  left  infarct.\tInfarct.", "02\tzh\t未见病灶。\tn/a")
    found = read_reports(find_reports(tmp_path, None), PEOPLE)
    assert found["01"].text == "A left infarct.\nInfarct."
    assert (found["02"].text, found["02"].language) == ("未见病灶。", "zh")
    cases = tmp_path / "cases.json"
    cases.write_text(json.dumps({"sub-01": {"global_finding": "A left infarct.", "impression": "Infarct.", "modal_wise_finding": {}}}))
    assert read_reports(cases, PEOPLE)["01"].text == found["01"].text
    assert find_reports(tmp_path, cases) == cases != path


@pytest.mark.parametrize(
    ("rows", "head", "says"),
    [
        (["sub-09\ten\tx\ty"], HEAD, "not in the dataset"),
        (["sub-01\ten\tx\ty", "01\ten\tx\ty"], HEAD, "two reports of sub-01"),
        (["sub-01\ten\tn/a\t"], HEAD, "is empty"),
        ([], HEAD, "no report"),
        (["sub-01\tx"], "participant_id\tfindings\n", "lacks impression"),
        (['sub-01\t"x'], "participant_id\tfindings\timpression\n", "unreadable"),
    ],
)
def test_a_table_that_cannot_be_used_is_named(tmp_path: Path, rows: list[str], head: str, says: str) -> None:
    with pytest.raises(InputDatasetError, match=says):
        read_reports(table(tmp_path, *rows, head=head), PEOPLE)


def test_absent_or_unreadable_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="no reports"):
        find_reports(tmp_path, None)
    with pytest.raises(InputNotFoundError):
        find_reports(tmp_path, tmp_path / "absent.tsv")
    latin = tmp_path / "latin.tsv"
    latin.write_bytes(HEAD.encode() + "sub-01\ten\tödem\tx\n".encode("latin-1"))
    with pytest.raises(InputDatasetError, match="UTF-8"):
        read_reports(latin, PEOPLE)
    cases = tmp_path / "cases.json"
    cases.write_text("[1]")
    with pytest.raises(InputDatasetError, match="unreadable"):
        read_reports(cases, PEOPLE)


def test_instructions_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "told.jsonl"
    path.write_text(
        json.dumps({"participant_id": "sub-01", "task": "follow-up", "turns": [["What next?", "A scan in six months."], ["Why?", "To see growth."]]})
        + "\n\n" + json.dumps({"participant_id": "02", "turns": [["Is it left?", "Yes."]]}) + "\n"
    )  # fmt: skip
    first, second = read_conversations(path, PEOPLE)
    assert (first.participant, first.task, first.turns[1]) == ("01", "follow-up", ("Why?", "To see growth."))
    assert second.task == "instruction"


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 1 is no instruction"),
        ('{"participant_id": "01"}', "line 1 is no instruction"),
        ('{"participant_id": "01", "turns": [["only one"]]}', "line 1 is no instruction"),
        ('{"participant_id": "09", "turns": [["a", "b"]]}', "not in the dataset"),
        ('{"participant_id": "01", "turns": [["a", " "]]}', "empty question or answer"),
        ('{"participant_id": "01", "turns": []}', "empty question or answer"),
    ],
)
def test_a_line_that_is_no_instruction_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "told.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(InputDatasetError, match=says):
        read_conversations(path, PEOPLE)
