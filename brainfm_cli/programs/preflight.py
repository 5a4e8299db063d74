"""What a run of hours needs, looked at before it starts: licence, templates, space, inodes, memory."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from brainfm_cli.errors import BrainFMError, DiskFullError, InputNotFoundError, LicenceError, OutOfMemoryError
from brainfm_cli.programs.fmriprep import template_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

MIN_MEMORY_MB = 8_000
"""What fMRIPrep's authors ask for one participant."""
# Measured by their users: resampled series, transforms and a FreeSurfer subject over compressed inputs, and nipype's folders.
_SPACE_FACTOR, _SPACE_BASE_MB = 30, 3_000
_INODES = 50_000
_REGISTER = "get one free at https://surfer.nmr.mgh.harvard.edu/registration.html, then --fs-license-file FILE (or FS_LICENSE)"
# Skull-stripping and normalisation need these whatever the output spaces are.
_ALWAYS_TEMPLATES = ("OASIS30ANTs", "MNI152NLin2009cAsym")


def find_licence(given: Path | None) -> Path:
    """FreeSurfer's licence: the file given, ``FS_LICENSE``, or the one of ``FREESURFER_HOME``; absolute.

    Raises
    ------
    LicenceError
        There is none, or the file cannot be one.
    """
    home = os.environ.get("FREESURFER_HOME")
    candidates = [given, os.environ.get("FS_LICENSE"), Path(home, "license.txt") if home else None]
    chosen = next((Path(path) for path in candidates if path), None)
    if chosen is None:
        raise LicenceError("fMRIPrep needs a FreeSurfer licence and none is given", fix=_REGISTER)
    if not chosen.is_file():
        raise LicenceError("the FreeSurfer licence is not there", where=chosen, fix=_REGISTER)
    try:
        lines = [line for line in chosen.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    except OSError as error:
        raise LicenceError(f"the FreeSurfer licence cannot be read: {error.strerror}", where=chosen, fix=f"chmod u+r {chosen}") from error
    if len(lines) < 3:
        raise LicenceError("the file is no FreeSurfer licence: it must hold an address, a number and a key", where=chosen, fix=_REGISTER)
    return chosen.absolute()


def find_templateflow(output_spaces: Sequence[str]) -> Path | None:
    """``TEMPLATEFLOW_HOME`` where it is set, once it is known to hold the templates needed; none means fMRIPrep's own.

    Raises
    ------
    InputNotFoundError
        The folder is absent, or a template in it is absent or empty.
    """
    value = os.environ.get("TEMPLATEFLOW_HOME")
    if not value:
        return None
    home = Path(value).absolute()
    if not home.is_dir():
        raise InputNotFoundError(
            "TEMPLATEFLOW_HOME is no folder", where=home, fix="unset TEMPLATEFLOW_HOME to use fMRIPrep's own templates"
        )
    for name in dict.fromkeys([*_ALWAYS_TEMPLATES, *filter(None, map(template_of, output_spaces))]):
        images = (home / f"tpl-{name}").glob("**/*.nii.gz")
        # TemplateFlow's skeleton holds every file with 0 bytes until it is fetched.
        if not any(path.stat().st_size > 0 for path in images):
            raise InputNotFoundError(
                f"TemplateFlow's template {name} is not here, or its files are empty",
                where=home,
                fix=f"where there is a network: python -c \"from templateflow import api; api.get('{name}')\"",
            )
    return home


def check_space(folders: Iterable[Path], *, input_bytes: int) -> None:
    """See that a disk takes the outputs and intermediate files of inputs of this size.

    Raises
    ------
    DiskFullError
        Space or inodes are too few.
    """
    needed_mb = _SPACE_BASE_MB + _SPACE_FACTOR * input_bytes // 1_000_000
    for folder in folders:
        place = _existing(folder)
        free_mb = shutil.disk_usage(place).free // 1_000_000
        if free_mb < needed_mb:
            raise DiskFullError(
                f"{free_mb} MB are free and about {needed_mb} MB needed",
                where=folder,
                fix="free space, or choose another disk with --work-dir",
            )
        status = os.statvfs(place)
        # File systems without fixed inodes say 0 of 0.
        if status.f_files and status.f_favail < _INODES:
            raise DiskFullError(
                f"{status.f_favail} inodes are free and about {_INODES} needed", where=folder, fix="remove files, or choose another disk with --work-dir"
            )  # fmt: skip


def memory_per_unit_mb(given_mb: int | None, *, units: int) -> int:
    """Megabytes that each of ``units`` participants at a time may use: of those given, or of this machine (or job).

    Raises
    ------
    OutOfMemoryError
        They are fewer than fMRIPrep needs.
    """
    total = given_mb or machine_memory_mb()
    share = total // units
    if share < MIN_MEMORY_MB:
        raise OutOfMemoryError(
            f"{total} MB for {units} participants at a time leave {share} MB each, and fMRIPrep needs {MIN_MEMORY_MB}",
            fix=f"ask for more memory (--mem-mb {MIN_MEMORY_MB * units})" + (", or for fewer --nprocs" if units > 1 else ""),
        )
    return share


def machine_memory_mb() -> int:
    """Memory of this machine, or of the job's share of it where that is less, megabytes."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 1_000_000]
    if (job := os.environ.get("SLURM_MEM_PER_NODE", "")).isdigit():
        limits.append(int(job))
    for path in (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes")):
        try:
            text = path.read_text(encoding="ascii").strip()
        except OSError:
            continue
        if text.isdigit():
            limits.append(int(text) // 1_000_000)
    return min(limit for limit in limits if limit > 0)


def collect(checks: Iterable[Callable[[], object]]) -> list[BrainFMError]:
    """What each check finds wrong, in order, so that all can be mended at once."""
    found = []
    for check in checks:
        try:
            check()
        except BrainFMError as error:
            found.append(error)
    return found


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
