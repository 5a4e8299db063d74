"""Programs that run for hours: their log, their signs of life, and their end."""

from __future__ import annotations

import logging
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from brainfm_cli.errors import EngineUnavailableError, MissingProgramError
from brainfm_cli.programs import commands
from brainfm_cli.programs.commands import Command, ask, run_logged
from tests.programs.fakes import is_alive


def bash(script: str, **environment: str) -> Command:
    return Command(argv=("bash", "-c", script), environment=environment)


def ends(pid: int) -> bool:
    """Whether a process that was told to end does so within seconds."""
    limit = time.monotonic() + 5
    while is_alive(pid) and time.monotonic() < limit:
        time.sleep(0.02)
    return not is_alive(pid)


def test_the_log_has_both_streams_and_the_command(tmp_path: Path) -> None:
    log_file = tmp_path / "logs" / "x.log"
    ending = run_logged(bash("echo to out; echo to err >&2; echo $WORD; exit 7", WORD="a word"), log_file, name="x")
    assert ending.code == 7
    assert ending.tail == ("to out", "to err", "a word")
    first, *rest = log_file.read_text().splitlines()
    assert first.endswith("WORD='a word' bash -c 'echo to out; echo to err >&2; echo $WORD; exit 7'")
    assert rest == ["to out", "to err", "a word", "# ended with 7"]
    run_logged(bash("echo again"), log_file, name="x")
    assert "to out" in log_file.read_text(), "the log of an earlier attempt is kept"


def test_there_is_no_terminal_and_no_input(tmp_path: Path) -> None:
    ending = run_logged(bash("tty; read -r -t 5 x; echo read $?"), tmp_path / "x.log", name="x")
    assert ending.tail == ("not a tty", "read 1")


@pytest.mark.parametrize(("number", "code"), [("KILL", 137), ("SEGV", 139), ("ABRT", 134), ("TERM", 143)])
def test_signals_are_codes_as_in_a_shell(number: str, code: int, tmp_path: Path) -> None:
    assert run_logged(bash(f"kill -{number} $$"), tmp_path / "x.log", name="x").code == code


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    assert run_logged(bash(r"printf 'a\377b\n'"), tmp_path / "x.log", name="x").tail == ("a\ufffdb",)


def test_a_program_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(MissingProgramError, match="no-such-program"):
        run_logged(Command(argv=("no-such-program",)), tmp_path / "x.log", name="x")
    script = tmp_path / "script"
    script.write_text("#!/bin/sh\n")
    with pytest.raises(EngineUnavailableError, match="cannot be run"):
        run_logged(Command(argv=(str(script),)), tmp_path / "x.log", name="x")


def test_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(commands, "_SIGN_OF_LIFE_S", 0.0)
    script = """echo 'INFO: [Node] Finished "wf.sub_01_wf.first", elapsed'; echo other; echo '[Node] Finished "wf.second", elapsed'"""
    with caplog.at_level(logging.INFO):
        run_logged(bash(script), tmp_path / "x.log", name="sub-01")
    said = [line.getMessage() for line in caplog.records]
    assert said == ["sub-01: 1 steps done in 0 min, last: first", "sub-01: 2 steps done in 0 min, last: second"]
    caplog.clear()
    with caplog.at_level(logging.INFO):
        run_logged(bash("echo one; echo two"), tmp_path / "x.log", name="sub-01", echo=True)
    assert [line.getMessage() for line in caplog.records] == ["sub-01 | one", "sub-01 | two"]


def test_a_program_that_ignores_its_end_is_killed_with_its_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "_GRACE_S", 0.3)
    script = f"trap '' TERM; sleep 600 & echo $! > {tmp_path}/child; wait; sleep 600"
    clock = time.monotonic()
    ending = run_logged(bash(script), tmp_path / "x.log", name="x", max_hours=0.5 / 3600)
    assert ending.timed_out
    assert ending.code == 137
    assert time.monotonic() - clock < 10
    child = int((tmp_path / "child").read_text())
    assert ends(child)


def test_a_child_that_outlives_its_parent_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"(trap '' TERM; echo $BASHPID > {tmp_path}/child; exec sleep 600) & sleep 600"
    clock = time.monotonic()
    assert run_logged(bash(script), tmp_path / "x.log", name="x", max_hours=0.5 / 3600).timed_out
    assert time.monotonic() - clock < 10
    assert ends(int((tmp_path / "child").read_text()))


def test_a_killed_parent_takes_the_program_with_it(tmp_path: Path) -> None:
    script = (
        "from pathlib import Path; from brainfm_cli.programs.commands import Command, run_logged; "
        f"run_logged(Command(argv=('bash', '-c', 'echo $$ > {tmp_path}/pid; exec sleep 600')), Path('{tmp_path}/x.log'), name='x')"
    )
    parent = subprocess.Popen([sys.executable, "-c", script])
    limit = time.monotonic() + 30
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text().strip()) and time.monotonic() < limit:
        time.sleep(0.02)
    pid = int((tmp_path / "pid").read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert ends(pid), "the program outlived its parent"


def test_questions(tmp_path: Path) -> None:
    assert ask("bash", "-c", "echo yes; exit 3") == (3, "yes")
    assert ask("no-such-program")[0] == 127
    assert ask("sleep", "60", timeout_s=0.1)[0] == 124
