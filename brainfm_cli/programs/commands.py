"""Run another program for hours: its log on disk line by line, signs of life, and no orphan when we are stopped."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shlex
import signal
import subprocess
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from brainfm_cli.bids.units import die_with_parent
from brainfm_cli.errors import EXIT_SIGTERM, EngineUnavailableError, MissingProgramError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import FrameType

log = logging.getLogger(__name__)

_TAIL_LINES = 400
_SIGN_OF_LIFE_S = 60.0
_GRACE_S = 20.0
_FINISHED = re.compile(r'\[Node\] Finished "(?P<node>[^"]+)"')


@dataclass(frozen=True, kw_only=True)
class Command:
    """One command line."""

    argv: tuple[str, ...]
    """Program and arguments."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables set besides those of this process."""

    @property
    def line(self) -> str:
        """The command as a shell reads it, variables first."""
        variables = [f"{key}={shlex.quote(value)}" for key, value in self.environment.items()]
        return " ".join([*variables, shlex.join(self.argv)])


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a program ended."""

    code: int
    """As a shell says it: 128 + number for a signal."""
    tail: tuple[str, ...]
    """Last lines of its output."""
    timed_out: bool = False
    """We stopped it because its time was over."""


def run_logged(command: Command, log_file: Path, *, name: str, max_hours: float | None = None, echo: bool = False) -> Ending:
    """Run a program to its end; its output is appended to ``log_file`` as it comes.

    The program has no terminal and no input, so it cannot ask anything. It is stopped when this process is
    interrupted, terminated or killed.

    Parameters
    ----------
    name
        Unit of work, named in messages.
    max_hours
        Stop the program after this time.
    echo
        Show every line, not only signs of life once a minute.

    Raises
    ------
    MissingProgramError
        The program does not exist.
    EngineUnavailableError
        It exists and may not be run.
    """
    log_file.parent.mkdir(parents=True, exist_ok=True)
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    life = _SignsOfLife(name)
    with log_file.open("a", encoding="utf-8") as stream, _terminated_as_exception():
        stream.write(f"# {datetime.now(UTC).isoformat(timespec='seconds')} {command.line}\n")
        stream.flush()
        process = _start(command)
        over = threading.Event()
        timer = threading.Timer(max_hours * 3600, _stop_late, (process, over)) if max_hours else None
        try:
            if timer:
                timer.daemon = True
                timer.start()
            assert process.stdout is not None  # noqa: S101  (opened as a pipe)
            for line in process.stdout:
                stream.write(line)
                stream.flush()
                tail.append(line.rstrip("\n"))
                life.see(line)
                if echo:
                    log.info("%s | %s", name, line.rstrip("\n"))
            code = process.wait()
        finally:
            if timer:
                timer.cancel()
            _stop(process)
        stream.write(f"# ended with {code}\n")
    return Ending(code=128 - code if code < 0 else code, tail=tuple(tail), timed_out=over.is_set())


def ask(*argv: str, timeout_s: float = 120.0) -> tuple[int, str]:
    """Exit code and output of a short question to a program; 127 where it does not exist, 124 where it does not answer."""
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=timeout_s, check=False
        )  # fmt: skip
    except FileNotFoundError:
        return 127, ""
    except OSError as error:
        return 126, str(error)
    except subprocess.TimeoutExpired:
        return 124, ""
    return done.returncode, done.stdout.strip()


class _SignsOfLife:
    """Says once a minute how far the program is, by the nodes that its log reports finished."""

    def __init__(self, name: str) -> None:
        self._name, self._nodes = name, 0
        self._started = self._said = time.monotonic()

    def see(self, line: str) -> None:
        match = _FINISHED.search(line)
        if match is None:
            return
        self._nodes += 1
        now = time.monotonic()
        if now - self._said >= _SIGN_OF_LIFE_S:
            self._said = now
            step = match["node"].rsplit(".", 1)[-1]
            log.info("%s: %d steps done in %d min, last: %s", self._name, self._nodes, (now - self._started) // 60, step)


def _start(command: Command) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            command.argv,
            env={**os.environ, **command.environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that the whole group can be stopped
            # A killed brainfm must not leave a program behind that writes where the next attempt works.
            preexec_fn=die_with_parent,  # noqa: PLW1509  (one system call, no Python lock is taken)
        )
    except FileNotFoundError as error:
        raise MissingProgramError(f"'{command.argv[0]}' is not on PATH", fix="install it, or load its module") from error
    except OSError as error:
        raise EngineUnavailableError(f"'{command.argv[0]}' cannot be run: {error.strerror}", fix="check its permissions") from error


def _stop_late(process: subprocess.Popen[str], over: threading.Event) -> None:
    over.set()
    _stop(process)


def _stop(process: subprocess.Popen[str]) -> None:
    """Terminate the program's process group, and kill what does not go: children may outlive their parent."""
    if process.poll() is not None:
        return
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_S)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


class _TerminatedError(SystemExit):
    """SIGTERM, in a process that has no handler of its own."""


@contextlib.contextmanager
def _terminated_as_exception() -> Iterator[None]:
    # SIGTERM's default ends a worker process at once, before it can stop the program.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    except _TerminatedError:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)  # a pool's worker would take the exception for a result, and wait for more
        raise
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _leave(_signal: int, _frame: FrameType | None) -> None:
    raise _TerminatedError(EXIT_SIGTERM)
