"""Sentences for people: one tree of errors, each with its exit code and failure class.

A message has three parts: what happened, in which file, and what to do next. Only this module decides
exit codes (docs/exit_codes.md); nothing else calls ``sys.exit`` with a literal.
"""

from __future__ import annotations

import errno
import os
from typing import ClassVar

EXIT_OK = 0
EXIT_BUG = 1
EXIT_USAGE = 2
EXIT_PARTIAL = 3
EXIT_VALIDATION = 16
EXIT_BAD_DATA = 65
EXIT_NOT_FOUND = 66
EXIT_ENGINE = 69
EXIT_PROGRAM = 70
EXIT_OUTPUT = 73
EXIT_RETRY = 75
EXIT_SETTINGS = 78
EXIT_LICENCE = 126
EXIT_MISSING_PROGRAM = 127
EXIT_SIGINT = 130
EXIT_SIGTERM = 143

EXIT_CODES: dict[int, str] = {
    EXIT_OK: "done, or everything already current",
    EXIT_BUG: "internal error (a bug; the traceback is in the log)",
    EXIT_USAGE: "usage: unknown option, bad value, or a level the command does not have",
    EXIT_PARTIAL: "some units failed with different classes, or some participants failed and others finished",
    EXIT_VALIDATION: "the input dataset fails BIDS validation (only asked for with --validate)",
    EXIT_BAD_DATA: "bad data: truncated image, missing confounds, empty mask, foreign checkpoint",
    EXIT_NOT_FOUND: "path absent, or nothing matches labels and filters",
    EXIT_ENGINE: "engine unusable: daemon down, image absent",
    EXIT_PROGRAM: "a wrapped program failed; its own code is recorded",
    EXIT_OUTPUT: "cannot write: read-only output, or an existing output made with other settings",
    EXIT_RETRY: "retryable: out of memory, disk or inodes full, time limit",
    EXIT_SETTINGS: "settings file or --set invalid, or the system does not support the stage",
    EXIT_LICENCE: "licence missing",
    EXIT_MISSING_PROGRAM: "required program or optional package missing",
    EXIT_SIGINT: "interrupted; state is consistent, the same command resumes",
    EXIT_SIGTERM: "terminated; state is consistent, the same command resumes",
}


class BrainFMError(Exception):
    """Root of every error a user may cause or mend."""

    exit_code: ClassVar[int] = EXIT_BUG
    failure_class: ClassVar[str] = "bug"

    def __init__(self, what: str, *, where: str | os.PathLike[str] | None = None, fix: str) -> None:
        self.what = what
        self.where = None if where is None else os.fspath(where)
        self.fix = fix
        super().__init__(what, self.where, fix)

    def __str__(self) -> str:
        place = f" [{self.where}]" if self.where else ""
        return f"{self.what}{place} — {self.fix}"

    def __reduce__(self) -> tuple[object, ...]:  # exceptions cross process borders in worker pools
        return _rebuild, (type(self), self.what, self.where, self.fix)


def _rebuild(kind: type[BrainFMError], what: str, where: str | None, fix: str) -> BrainFMError:
    return kind(what, where=where, fix=fix)


class InternalError(BrainFMError):
    """A bug of ours, wrapped so that a record can name it."""


class UsageError(BrainFMError):
    """The command line asks for something that does not exist."""

    exit_code = EXIT_USAGE
    failure_class = "settings"


class ValidationFailedError(BrainFMError):
    """The BIDS validator found errors in the input."""

    exit_code = EXIT_VALIDATION
    failure_class = "bad data"


class InputDatasetError(BrainFMError):
    """The input exists but cannot be used as it is."""

    exit_code = EXIT_BAD_DATA
    failure_class = "bad data"


class CheckpointMismatchError(InputDatasetError):
    """A model folder does not fit the data or the request."""


class InputNotFoundError(BrainFMError):
    """A path is absent, or nothing matches the labels and filters."""

    exit_code = EXIT_NOT_FOUND
    failure_class = "bad data"


class EngineUnavailableError(BrainFMError):
    """A container engine or image is not usable."""

    exit_code = EXIT_ENGINE
    failure_class = "engine"


class ProgramFailedError(BrainFMError):
    """A wrapped program ended with an error."""

    exit_code = EXIT_PROGRAM
    failure_class = "engine"


class OutputError(BrainFMError):
    """The output cannot be written, or belongs to another configuration."""

    exit_code = EXIT_OUTPUT
    failure_class = "disk"


class ConfigurationConflictError(OutputError):
    """The output folder was made with other settings."""

    failure_class = "settings"


class OutOfMemoryError(BrainFMError):
    """Memory ran out; the same command with more memory may succeed."""

    exit_code = EXIT_RETRY
    failure_class = "memory"


class DiskFullError(BrainFMError):
    """Disk, quota or inodes are full."""

    exit_code = EXIT_RETRY
    failure_class = "disk"


class StoppedError(BrainFMError):
    """A wrapped program was stopped from outside or ran past its time limit, or training was told to stop; going on is possible."""

    exit_code = EXIT_RETRY
    failure_class = "time"


class SettingsError(BrainFMError):
    """A settings file or ``--set`` is invalid."""

    exit_code = EXIT_SETTINGS
    failure_class = "settings"


class UnsupportedStageError(SettingsError):
    """The chosen system does not have this stage."""


class LicenceError(BrainFMError):
    """A licence is missing."""

    exit_code = EXIT_LICENCE
    failure_class = "licence"


class MissingProgramError(BrainFMError):
    """A program or an optional package is not installed."""

    exit_code = EXIT_MISSING_PROGRAM
    failure_class = "engine"


class NetworkError(BrainFMError):
    """Something must be fetched and the network does not answer."""

    exit_code = EXIT_NOT_FOUND
    failure_class = "network"


def classify(error: BaseException) -> BrainFMError:
    """The error of this tree that ``error`` stands for; unknown ones become :class:`InternalError`."""
    if isinstance(error, BrainFMError):
        return error
    if isinstance(error, MemoryError):
        return OutOfMemoryError("out of memory", fix="give the job more memory (--mem-mb) or fewer --nprocs")
    if isinstance(error, ModuleNotFoundError) and error.name and not error.name.startswith("brainfm_cli"):
        return missing_package(error.name)
    if isinstance(error, OSError):
        where = error.filename if isinstance(error.filename, str) else None
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            return DiskFullError("disk, quota or inodes full", where=where, fix="free space or inodes, then run the same command again")
        if error.errno in {errno.EROFS, errno.EACCES, errno.EPERM}:
            return OutputError("no permission to write or read", where=where, fix="check the path's permissions")
        if error.errno == errno.ENOMEM:
            return OutOfMemoryError("out of memory", fix="give the job more memory (--mem-mb)")
    return InternalError(f"{type(error).__name__}: {error}", fix="this is a bug in brainfm; please report the log with the traceback")


# The extra that brings an import name; what is not named here belongs to [all].
_EXTRA_OF_IMPORT = {
    "torch": "train",
    "lightning": "train",
    "torch_geometric": "train",
    "safetensors": "train",
    "transformers": "train",
    "captum": "train",
    "torchmetrics": "train",
    "nipype": "preprocess",
    "ants": "preprocess",
    "deepbet": "preprocess",
}


def missing_package(import_name: str) -> MissingProgramError:
    """The error for an optional package that is not installed, with the line that installs it."""
    extra = _EXTRA_OF_IMPORT.get(import_name.split(".", maxsplit=1)[0], "all")
    return MissingProgramError(
        f"the Python package '{import_name}' is not installed", fix=f"install it with: pip install 'brainfm-cli[{extra}]'"
    )


def combined_exit_code(codes: list[int]) -> int:
    """The exit code of a run from its units' codes: one class alone keeps its code, a mixture is 3."""
    failed = {code for code in codes if code != EXIT_OK}
    if not failed:
        return EXIT_OK
    if len(failed) == 1 and len(codes) == sum(code != EXIT_OK for code in codes):
        return failed.pop()
    return EXIT_PARTIAL
