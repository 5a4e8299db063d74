"""The demo, shortened: every command runs, the table has its floors, and a second run does nothing again."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from brainfm_cli.config import Invocation
from brainfm_cli.stages.demo import DemoSettings, demo

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.long
def test_demo_runs_the_whole_chain_and_resumes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    call = Invocation(command="demo", input_dir=tmp_path / "demo", output_dir=tmp_path / "demo", level="group")
    settings = DemoSettings(imaged=2, people=100, epochs=1, tuning_epochs=0)
    assert demo(call, settings) == 0
    printed = capfd.readouterr().out
    report = tmp_path / "demo" / "predict" / "report.html"
    assert report.is_file()
    assert str(report) in printed
    for name in ("Majority", "Motion, age, sex, site", "Linear, Fisher-z", "Random frozen encoder", "attainable", "Bayes-optimal"):
        assert name in printed
    metrics = json.loads((tmp_path / "demo" / "predict" / "metrics.json").read_text())
    assert metrics["classes"] == ["control", "case"]
    assert metrics["truth"]["attainable"] <= 1
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*") if path.is_file()}
    assert demo(call, settings) == 0
    assert {path: path.stat().st_mtime_ns for path in written} == written
