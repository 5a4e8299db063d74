from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from brainfm_cli.bids.derivatives import OutputDataset, write_text
from brainfm_cli.bids.units import Unit, UnitResult, plan_units, run_units
from brainfm_cli.config import Execution, Settings
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.provenance import read_record, record_path
from brainfm_cli.stages.status import status


class NoSettings(Settings):
    pass


def copy(source: Path, target: Path) -> UnitResult:
    text = source.read_text()
    if text == "bad":
        raise InputDatasetError("the text is bad", where=source, fix="write something better")
    if text == "bug":
        raise ZeroDivisionError("oops")
    if text == "die":
        os._exit(9)
    return UnitResult(outputs=(write_text(target, text.upper()),))


def dataset(tmp_path: Path) -> OutputDataset:
    return OutputDataset.open(tmp_path / "out", command="parcellate", settings=NoSettings())


def units(tmp_path: Path, *texts: str) -> list[Unit]:
    made = []
    for number, text in enumerate(texts):
        source = tmp_path / f"{number}.txt"
        if not source.exists():
            source.write_text(text)
        made.append(
            Unit(
                name=f"sub-{number}",
                inputs=(source,),
                work=copy,
                arguments={"source": source, "target": tmp_path / "out" / f"{number}.out"},
            )
        )
    return made


def test_current_units_are_skipped_and_changed_ones_redone(tmp_path: Path) -> None:
    out, todo = dataset(tmp_path), units(tmp_path, "a", "b")
    assert plan_units(out, todo) == {"sub-0": "missing", "sub-1": "missing"}
    assert run_units(out, todo, Execution()) == 0
    stamps = [(tmp_path / "out" / f"{number}.out").stat().st_mtime_ns for number in (0, 1)]
    time.sleep(0.02)
    assert run_units(out, todo, Execution()) == 0
    assert [(tmp_path / "out" / f"{number}.out").stat().st_mtime_ns for number in (0, 1)] == stamps
    (tmp_path / "1.txt").write_text("changed")
    assert plan_units(out, todo) == {"sub-0": "current", "sub-1": "stale"}
    assert run_units(out, todo, Execution()) == 0
    assert (tmp_path / "out" / "1.out").read_text() == "CHANGED"
    (tmp_path / "out" / "0.out").unlink()
    assert plan_units(out, todo)["sub-0"] == "stale"


@pytest.mark.parametrize("nprocs", [1, 2])
def test_failures_are_recorded_and_the_others_go_on(tmp_path: Path, nprocs: int) -> None:
    out, todo = dataset(tmp_path), units(tmp_path, "a", "bad", "bug", "d")
    assert run_units(out, todo, Execution(nprocs=nprocs)) == 3
    assert (tmp_path / "out" / "0.out").read_text() == "A"
    assert (tmp_path / "out" / "3.out").read_text() == "D"
    record = read_record(record_path(tmp_path / "out", "sub-1"))
    assert record is not None
    assert record.failure is not None
    assert (record.failure.failure_class, record.failure.exit_code, record.failure.fix) == ("bad data", 65, "write something better")
    bug = read_record(record_path(tmp_path / "out", "sub-2"))
    assert bug is not None
    assert bug.failure is not None
    assert bug.failure.exit_code == 1


def test_a_killed_worker_is_a_memory_failure(tmp_path: Path) -> None:
    out, todo = dataset(tmp_path), units(tmp_path, "die", "die")
    assert run_units(out, todo, Execution(nprocs=2)) == 75


def test_one_class_alone_keeps_its_code_and_stop_on_first_crash_stops(tmp_path: Path) -> None:
    out, todo = dataset(tmp_path), units(tmp_path, "bad", "b")
    assert run_units(out, todo, Execution(stop_on_first_crash=True)) == 65
    assert not (tmp_path / "out" / "1.out").exists()


def test_status_says_what_happened(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import json

    out, todo = dataset(tmp_path), units(tmp_path, "a", "bad", "c", "d")
    run_units(out, todo, Execution())
    (tmp_path / "2.txt").write_text("changed")
    output = tmp_path / "out" / "3.out"
    output.write_text("E")  # same size, other contents: only --verify sees it
    capsys.readouterr()
    status(tmp_path / "out", as_json=True)
    found = {unit["unit"]: unit for unit in json.loads(capsys.readouterr().out)["units"]}
    assert {name: unit["state"] for name, unit in found.items()} == {
        "sub-0": "current",
        "sub-1": "failed",
        "sub-2": "stale",
        "sub-3": "current",
    }
    assert found["sub-1"]["failure_class"] == "bad data"
    status(tmp_path, as_json=True, verify=True)
    assert {unit["unit"]: unit["state"] for unit in json.loads(capsys.readouterr().out)["units"]}["sub-3"] == "stale"
    status(tmp_path / "out")
    assert "write something better" in " ".join(capsys.readouterr().out.split())
