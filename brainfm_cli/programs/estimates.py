"""What a command will need, from its input: memory, time, disk and files, by figures of docs/performance.md. Headers and sizes only are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from brainfm_cli.bids.images import load_image
from brainfm_cli.bids.inputs import SPACE_ORDER, walk_files
from brainfm_cli.bids.names import parse_name
from brainfm_cli.errors import BrainFMError
from brainfm_cli.programs.embedded.memory import expected_memory_mb

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_LOOKED_AT = 5  # participants; the largest of them stands for all
_IMAGES = (".nii", ".nii.gz", ".dtseries.nii")
# parcellate: 256 MB measured with eight atlases; 183 MB of compressed BOLD took 2 s on a busy node; Python, atlases and page take the rest.
_PARCELLATE_MB, _PARCELLATE_S, _BOLD_MB_PER_S = 400, 15.0, 60.0
_BYTES_PER_NUMBER = 20  # a float64 as text that reads back equal, with its tab
_PAGE_BYTES = 1e5  # of a run on the page of its participant
_FILES_PER_ATLAS, _MATRICES = 10, 3  # series, coverage and three matrices, each with its JSON
# preprocess: 51 s for 20 frames of 46 x 46 x 26, 118 s for 156 frames of 80 x 80 x 35 with two threads; twice that on a busy node.
_PREPROCESS_S, _S_PER_SAMPLE = 90.0, 4e-6
_TEMPLATE_VOXELS, _STORED_BYTES, _STRUCTURE_MB = 97 * 115 * 97, 0.85, 40  # at 2 mm, int16, compressed
_FILES_PER_PERSON, _FILES_PER_RUN = 45, 15


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What participants need."""

    memory_mb: int
    """Of one participant."""
    seconds: int
    """Of one participant, on a busy node."""
    disk_mb: float
    """Of all of them, in the output folder."""
    files: int
    """Inodes of all of them, in the output folder."""
    participants: int
    """How many they are."""

    def lines(self) -> list[str]:
        """For people."""
        return [
            f"each of {self.participants} participants: about {self.memory_mb} MB of memory and {self.seconds} s (the largest of a few, on a busy node)",
            f"in all: about {self.disk_mb:.1f} MB of disk in {self.files} files",
        ]


def estimate_participants(command: str, root: Path, labels: Sequence[str], regions: Sequence[int]) -> Estimate | None:
    """What ``preprocess`` (of raw data) or ``parcellate`` (in atlases of so many ``regions``) needs; none where no image says so."""
    if not labels:
        return None
    step = max(1, len(labels) // _LOOKED_AT)
    people = [_person(command, root, label, regions) for label in list(labels)[::step][:_LOOKED_AT]]
    known = [person for person in people if person is not None]
    if not known:
        return None
    share = len(labels) / len(known)
    return Estimate(
        memory_mb=max(person[0] for person in known),
        seconds=math.ceil(max(person[1] for person in known)),
        disk_mb=sum(person[2] for person in known) * share / 1e6,
        files=math.ceil(sum(person[3] for person in known) * share),
        participants=len(labels),
    )


def _person(command: str, root: Path, label: str, regions: Sequence[int]) -> tuple[int, float, float, int] | None:
    """Megabytes of memory, seconds, bytes on disk and files of one participant."""
    paths = [path for path in walk_files(root / f"sub-{label}") if path.name.endswith(_IMAGES)]
    runs = [path for path in paths if parse_name(path.name)[1] == "bold"]
    if command == "preprocess":
        sizes = [_shape(path) for path in runs]
        samples = sum(math.prod(shape) for shape in sizes)
        frames = sum(shape[-1] for shape in sizes if len(shape) == 4)
        seconds = _PREPROCESS_S + _S_PER_SAMPLE * samples
        disk = _STRUCTURE_MB * 1e6 + frames * _TEMPLATE_VOXELS * _STORED_BYTES
        return (expected_memory_mb(paths), seconds, disk, _FILES_PER_PERSON + _FILES_PER_RUN * len(runs)) if paths else None
    runs = _of_one_space(runs)
    if not runs:
        return None
    frames = sum(_shape(path)[-1] for path in runs if _shape(path))
    seconds = _PARCELLATE_S + sum(path.stat().st_size for path in runs) / 1e6 / _BOLD_MB_PER_S
    numbers = sum(frames * count + len(runs) * _MATRICES * count**2 for count in regions)
    pages = 2 + len(runs)  # record, page and figures
    return (
        _PARCELLATE_MB,
        seconds,
        _BYTES_PER_NUMBER * numbers + _PAGE_BYTES * len(runs),
        _FILES_PER_ATLAS * len(regions) * len(runs) + pages,
    )


def _of_one_space(runs: Sequence[Path]) -> list[Path]:
    """The images that parcellate would take: of each run one, in the first space that it knows."""
    spaces = {parse_name(path.name)[0].get("space") for path in runs}
    space = next((name for name in SPACE_ORDER if name in spaces), None)
    return [path for path in runs if parse_name(path.name)[0].get("space") == space and space is not None]


def _shape(path: Path) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in load_image(path).shape)
    except BrainFMError:  # the task itself will say what is wrong with it
        return ()
