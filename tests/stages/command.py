"""A command line run in this process, and what it leaves."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest

from brainfm_cli import cli

if TYPE_CHECKING:
    from pathlib import Path


def brainfm(*arguments: object) -> int:
    """Exit code of a command line; the handler of SIGTERM that it sets is put back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, before)
    return int(ended.value.code or 0)


def brainfm_on_cpu(*arguments: object) -> int:
    """The same for commands that train; simulating knows no device."""
    return brainfm(*arguments, *([] if arguments[0] == "simulate" else ["--device", "cpu"]))


def only(folder: Path) -> Path:
    """The only entry of a folder."""
    (found,) = folder.iterdir()
    return found
