"""fMRIPrep's arguments for one participant, and what its way of ending means.

Where the program runs (on this machine, in Docker, in Apptainer) is :mod:`brainfm_cli.programs.containers`' business.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from brainfm_cli.errors import (
    BrainFMError,
    DiskFullError,
    EngineUnavailableError,
    InputDatasetError,
    LicenceError,
    MissingProgramError,
    NetworkError,
    OutOfMemoryError,
    OutputError,
    ProgramFailedError,
    StoppedError,
    UsageError,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from brainfm_cli.programs.commands import Ending

LTS_VERSION = "25.2.7"
"""Pinned release of the long-term-support series (25.2, maintained to October 2029)."""
CODE_URL = "https://github.com/nipreps/fmriprep"
# Not templates: nothing is looked up in TemplateFlow for them.
NONSTANDARD_SPACES = ("anat", "T1w", "T2w", "run", "func", "bold", "boldref", "sbref", "fsnative")
# What brainfm sets itself, by the spelling that fMRIPrep reads; the second entry says how to ask for it.
_MANAGED = {
    "--participant-label": "--participant-label before '--'",
    "--session-label": "--session-label before '--'",
    "--task-id": "--task-id before '--'",
    "-t": "--task-id before '--'",
    "--bids-filter-file": "--bids-filter-file before '--'",
    "--bids-database-dir": "nothing: no index is shared between jobs",
    "--derivatives": "--datasets NAME=DIR before '--'",
    "-d": "--datasets NAME=DIR before '--'",
    "--nprocs": "--omp-nthreads before '--'",
    "--nthreads": "--omp-nthreads before '--'",
    "--n-cpus": "--omp-nthreads before '--'",
    "--omp-nthreads": "--omp-nthreads before '--'",
    "--mem": "--mem-mb before '--'",
    "--mem-mb": "--mem-mb before '--'",
    "--anat-only": "--anat-only before '--'",
    "--level": "--level before '--'",
    "--ignore": "--ignore before '--'",
    "--output-spaces": "--output-spaces before '--'",
    "--output-layout": "nothing: the layout is always BIDS",
    "--random-seed": "--seed before '--'",
    "--fs-license-file": "--fs-license-file before '--'",
    "--fs-subjects-dir": "--fs-subjects-dir before '--'",
    "--fs-no-reconall": "--fs-no-reconall before '--'",
    "--work-dir": "--work-dir before '--'",
    "-w": "--work-dir before '--'",
    "--clean-workdir": "--clean-workdir before '--'",
    "--reports-only": "a new run: finished participants are skipped",
    "--image": "--image before '--'",
    "-i": "--image before '--'",
}


@dataclass(frozen=True, kw_only=True)
class Task:
    """What fMRIPrep is to do for one participant. Every path is absolute and of this machine."""

    label: str
    """Participant, without ``sub-``."""
    data: Path
    """Raw dataset."""
    output: Path
    """Folder that fMRIPrep takes for its output: this participant's alone, moved to the dataset at the end."""
    scratch: Path
    """Its work folder, kept until it is done, so that a killed job resumes."""
    licence: Path
    """FreeSurfer's licence."""
    output_spaces: tuple[str, ...]
    """As fMRIPrep writes them, ``MNI152NLin6Asym:res-2``."""
    level: str
    """minimal, resampling or full."""
    threads: int
    """Threads of the whole run."""
    memory_mb: int
    """Upper bound, megabytes."""
    anat_only: bool = False
    """No functional images."""
    fs_no_reconall: bool = False
    """No surface reconstruction."""
    ignore: tuple[str, ...] = ()
    """Aspects of the data to leave out, e.g. fieldmaps."""
    seed: int | None = None
    """Seed; none leaves it to fMRIPrep."""
    sessions: tuple[str, ...] = ()
    """Session labels; empty means all."""
    task: str | None = None
    """Task label; none means all."""
    filters: Path | None = None
    """JSON of pybids filters, inside :attr:`scratch`."""
    datasets: tuple[tuple[str, Path], ...] = ()
    """Precomputed derivatives by name."""
    fs_subjects_dir: Path | None = None
    """Existing FreeSurfer subjects to use and extend; none puts them into the output."""
    templateflow: Path | None = None
    """TemplateFlow home; none means fMRIPrep's own."""
    options: tuple[str, ...] = ()
    """Further options, as typed after ``--``."""
    verbose: int = 0
    """How many ``-v``."""


@dataclass(frozen=True, kw_only=True)
class Places:
    """Where fMRIPrep finds things: paths as it sees them, in a container or not."""

    data: str
    output: str
    scratch: str
    licence: str
    fs_subjects_dir: str | None
    filters: str | None
    datasets: tuple[tuple[str, str], ...]


def native_places(task: Task) -> Places:
    """The paths of this machine."""
    return Places(
        data=str(task.data),
        output=str(task.output),
        scratch=str(task.scratch),
        licence=str(task.licence),
        fs_subjects_dir=str(task.fs_subjects_dir) if task.fs_subjects_dir else None,
        filters=str(task.filters) if task.filters else None,
        datasets=tuple((name, str(path)) for name, path in task.datasets),
    )


def arguments(task: Task, places: Places) -> list[str]:
    """Arguments of fMRIPrep after the program's name. Positionals come first: list options would swallow them."""
    # --mem_mb in this spelling keeps fmriprep-docker from asking a question where memory is small.
    words = [places.data, places.output, "participant", "--participant-label", task.label, "--skip-bids-validation", "--notrack"]
    words += ["--work-dir", places.scratch, "--fs-license-file", places.licence]
    words += ["--nprocs", str(task.threads), "--omp-nthreads", str(min(task.threads, 8)), "--mem_mb", str(task.memory_mb)]
    words += ["--output-layout", "bids", "--level", task.level]
    if places.fs_subjects_dir:
        words += ["--fs-subjects-dir", places.fs_subjects_dir]
    words += ["--session-label", *task.sessions] if task.sessions else []
    words += ["--task-id", task.task] if task.task else []
    words += ["--bids-filter-file", places.filters] if places.filters else []
    words += ["--anat-only"] if task.anat_only else []
    words += ["--fs-no-reconall"] if task.fs_no_reconall else []
    words += ["--ignore", *task.ignore] if task.ignore else []
    words += ["--random-seed", str(task.seed)] if task.seed is not None else []
    if places.datasets:
        words += ["--derivatives", *(f"{name}={path}" for name, path in places.datasets)]
    words += ["-" + "v" * task.verbose] if task.verbose else []
    return [*words, "--output-spaces", *task.output_spaces, *task.options]


def check_options(options: Sequence[str]) -> None:
    """See that options typed after ``--`` do not contradict what brainfm sets.

    Raises
    ------
    UsageError
        One of them is brainfm's to set, or the first word is no option.
    """
    if options and not options[0].startswith("-"):
        raise UsageError(f"'{options[0]}' after '--' is no option", fix="write fMRIPrep's options there, e.g. -- --use-syn-sdc warn")
    for word in options:
        flag = word.partition("=")[0]
        flag = "--" + flag[2:].replace("_", "-") if flag.startswith("--") else flag
        if flag in _MANAGED:
            raise UsageError(f"'{word}' after '--' is brainfm's to set", fix=f"use {_MANAGED[flag]}")


def template_of(space: str) -> str | None:
    """TemplateFlow's name of an output space; none for spaces of the participant and of FreeSurfer."""
    name = space.partition(":")[0]
    return None if name in NONSTANDARD_SPACES or name.startswith("fsaverage") else name


_PERMISSION = re.compile(r"PermissionError|Permission denied|Read-only file system|Errno 13\b|Errno 30\b")
_SPACE = re.compile(r"No space left on device|Disk quota exceeded|Errno 28\b|Errno 122\b")
_MEMORY = re.compile(r"MemoryError|BrokenProcessPool|oom-kill|Out of memory|Cannot allocate memory|Errno 12\b|std::bad_alloc")
_SEGFAULT = re.compile(r"Segmentation fault|SIGSEGV")
_RECON = re.compile(r"IsRunning\.(lh|rh)|recon-all may already be running|It appears that recon-all is already running")
_NETWORK = re.compile(r"ConnectionError|Max retries exceeded|Name or service not known|Temporary failure in name resolution|URLError")
_LICENCE = re.compile(r"(valid|FreeSurfer) license (file )?(is required|not found)|license\.txt.*(not found|No such file)", re.IGNORECASE)
_FINISHED = "fMRIPrep finished successfully!"
_NO_REPORT = "Report generation was not successful"
_ENGINE = re.compile(r"^docker: |OCI runtime|FATAL:|Error response from daemon", re.MULTILINE)
_ARGUMENTS = re.compile(r"error: (unrecognized arguments|argument |ambiguous option).*")


def only_report_failed(ending: Ending) -> bool:
    """Whether fMRIPrep ended with 1 for its report's sake alone: its workflow was done, and the data are whole."""
    return ending.code == 1 and any(_FINISHED in line for line in ending.tail) and any(_NO_REPORT in line for line in ending.tail)


def error_of(ending: Ending, *, log_file: Path, output: Path, in_container: bool) -> BrainFMError:
    """The named error that an exit code other than 0 and the last lines of the log stand for.

    Parameters
    ----------
    output
        Folder that fMRIPrep wrote to, where its crash reports are.
    """
    text = "\n".join(ending.tail)
    code = ending.code
    if ending.timed_out:
        return StoppedError(
            "fMRIPrep ran past its time limit", where=log_file, fix="give execution.max_hours more; the same command resumes"
        )
    if code in {130, 143}:
        return StoppedError(
            f"fMRIPrep was stopped from outside (code {code})", where=log_file, fix="run the same command again; it resumes"
        )
    if _SPACE.search(text):
        return DiskFullError(
            "disk, quota or inodes ran full", where=log_file, fix="free space or move --work-dir, then run the same command"
        )
    if code in {134, 137} or _MEMORY.search(text):
        return OutOfMemoryError(f"fMRIPrep ran out of memory (code {code})", where=log_file, fix="give more with --mem-mb or fewer --nprocs; the same command resumes")  # fmt: skip
    refused = in_container and (code == 125 or (code in {126, 255} and _ENGINE.search(text) is not None))
    if (code == 126 and not refused) or _LICENCE.search(text):
        return LicenceError(
            "fMRIPrep does not accept the FreeSurfer licence", where=log_file, fix="give a valid one: --fs-license-file FILE"
        )
    if code == 127:
        return MissingProgramError("fMRIPrep lacks a program that it needs", where=log_file, fix="the log names it; use the official image")
    if refused:
        return _engine_error(code, text, log_file)
    if code == 2 and (match := _ARGUMENTS.search(text)):
        return UsageError(f"fMRIPrep does not accept an option: {match[0]}", where=log_file, fix="check what follows '--'")
    if _PERMISSION.search(text):
        return OutputError(
            "fMRIPrep may not read or write a file", where=log_file, fix="the log names it; mend its permissions or its bind"
        )
    return _failure(code, text, log_file, output)


def _engine_error(code: int, text: str, log_file: Path) -> BrainFMError:
    if match := re.search(r'The container name "/?(?P<name>[^"]+)" is already in use', text):
        return EngineUnavailableError(
            "an earlier container of this participant is still there",
            where=log_file,
            fix=f"wait for it, or remove it with: docker rm -f {match['name']}",
        )
    last = text.strip().rpartition("\n")[2][:300]
    return EngineUnavailableError(f"the container could not be started (code {code}): {last}", where=log_file, fix="see the log; then run the same command")  # fmt: skip


def _failure(code: int, text: str, log_file: Path, output: Path) -> BrainFMError:
    if code == 139 or _SEGFAULT.search(text):
        what = f"a program of fMRIPrep crashed with a segmentation fault (code {code})"
    elif _RECON.search(text):
        what = "FreeSurfer believes that this participant is already being reconstructed"
        fix = "if no other job runs, delete the file IsRunning.* that the log names; then run the same command"
        return ProgramFailedError(what, where=log_file, fix=fix)
    elif _NETWORK.search(text):
        fix = "give a filled TemplateFlow home (TEMPLATEFLOW_HOME), or run once where there is a network"
        return NetworkError("fMRIPrep wants to fetch something and there is no network", where=log_file, fix=fix)
    elif code == 65:
        fix = "mend the metadata that the log names, e.g. TotalReadoutTime, or add -- --fallback-total-readout-time estimated"
        return InputDatasetError("fMRIPrep finds the data unusable (code 65)", where=log_file, fix=fix)
    elif code == 70:
        what = "fMRIPrep could not build its workflow (code 70)"
    else:
        what = f"fMRIPrep failed (code {code})"
    return ProgramFailedError(what, where=log_file, fix=f"read the log, and crash-*.txt below {output}; the same command resumes")
