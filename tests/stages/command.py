"""A command line run in this process."""

from __future__ import annotations

import signal

import pytest

from brainfm_cli import cli


def brainfm(*arguments: object) -> int:
    """Exit code of a command line; the handler of SIGTERM that it sets is put back."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main([str(argument) for argument in arguments])
    finally:
        signal.signal(signal.SIGTERM, before)
    return int(ended.value.code or 0)
