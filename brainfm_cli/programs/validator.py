"""The BIDS validator."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from brainfm_cli.errors import MissingProgramError, ProgramFailedError, ValidationFailedError

_ERRORS = 16
_SHOWN = 4


def validate(dataset: Path) -> None:
    """Run ``bids-validator-deno`` on a dataset.

    Raises
    ------
    MissingProgramError
        The validator is not installed.
    ValidationFailedError
        It reports errors.
    ProgramFailedError
        It crashed.
    """
    # The environment's own programs are found even where it is not activated.
    program = shutil.which("bids-validator-deno") or shutil.which("bids-validator-deno", path=str(Path(sys.executable).parent))
    if program is None:
        raise MissingProgramError("the BIDS validator is not installed", fix="install it with: pip install bids-validator-deno")
    done = subprocess.run([program, str(dataset), "--ignoreWarnings"], capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    if done.returncode == _ERRORS:
        found = [line for line in lines if "[ERROR]" in line]
        raise ValidationFailedError(
            f"the BIDS validator finds errors: {'; '.join((found or lines)[:_SHOWN])}",
            where=dataset, fix="mend the dataset, or run without --validate; 'bids-validator-deno DIR' lists everything",
        )  # fmt: skip
    raise ProgramFailedError(
        f"the BIDS validator ended with code {done.returncode}: {' '.join(lines[-2:])}", where=dataset, fix="run it by hand"
    )
