"""What fMRIPrep must have written for a participant, and its way into the dataset.

fMRIPrep works in a folder of one participant's own. When everything is there, the files appear in the dataset, so
that jobs at the same time never write one file, and nothing half-done is ever seen.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from brainfm_cli.bids.derivatives import atomic_path, sweep, temporary_path
from brainfm_cli.bids.inputs import run_key
from brainfm_cli.bids.names import parse_name
from brainfm_cli.documents import read_json

if TYPE_CHECKING:
    from brainfm_cli.bids.raw import RawParticipant
    from brainfm_cli.programs.fmriprep import Task

# Each job would write its own; brainfm's are the dataset's.
_NOT_OURS = {"dataset_description.json", ".bidsignore"}


def missing_outputs(task: Task, participant: RawParticipant, *, report: bool = True) -> list[str]:
    """What fMRIPrep had to write for this participant and did not, as names with ``*`` for what may vary."""
    label = f"sub-{task.label}"
    names = [path for path in task.output.rglob(f"{label}*") if path.is_file() and path.stat().st_size > 0]
    parsed = [(parse_name(path.name), path) for path in names if "figures" not in path.parts and "sourcedata" not in path.parts]
    found = [(entities, f"{suffix}{extension}") for (entities, suffix, extension), _ in parsed]
    missing = []
    if report and not any(path.suffix == ".html" and path.parent == task.output for path in names):
        missing.append(f"{label}.html")
    for ending, desc in (("T1w.nii.gz", "preproc"), ("mask.nii.gz", "brain")):
        if not any(kind == ending and entities.get("desc") == desc and "task" not in entities for entities, kind in found):
            missing.append(f"{label}/**/anat/{label}*_desc-{desc}_{ending}")
    if task.anat_only:
        return missing
    for run in participant.bold:
        mine = [(entities, kind) for entities, kind in found if "sub" in entities and run_key(entities) == run.key]
        missing += [
            f"{run.key.name}*{_pattern(wanted)}_{ending}"
            for wanted, ending in _wanted(task)
            if not any(kind == ending and all(entities.get(key) == value for key, value in wanted.items()) for entities, kind in mine)
        ]
    return missing


def _wanted(task: Task) -> list[tuple[dict[str, str | None], str]]:
    """Entities and ending of every file that each run must have; a None is an entity that must be absent."""
    wanted: list[tuple[dict[str, str | None], str]] = [({"desc": "coreg", "space": None}, "boldref.nii.gz")]
    if task.level != "full":
        return wanted
    wanted.append(({"desc": "confounds"}, "timeseries.tsv"))
    for space in task.output_spaces:
        name, *rest = space.split(":")
        details = dict(part.split("-", 1) for part in rest if "-" in part)
        if name.startswith("fs"):
            if not task.fs_no_reconall:
                label = {"fsaverage:den-10k": "fsaverage5", "fsaverage:den-41k": "fsaverage6"}.get(space, name)
                wanted += [({"hemi": side, "space": label}, "bold.func.gii") for side in "LR"]
            continue
        if name in {"sbref", "boldref", "bold", "run", "func"}:
            wanted.append(({"desc": "preproc", "space": None}, "bold.nii.gz"))
            continue
        entities: dict[str, str | None] = {"space": "T1w" if name in {"anat", "T1w"} else name}
        entities |= {key: details[key] for key in ("cohort", "res") if key in details and details[key] != "native"}
        wanted += [({**entities, "desc": "preproc"}, "bold.nii.gz"), ({**entities, "desc": "brain"}, "mask.nii.gz")]
    return wanted


def _pattern(wanted: dict[str, str | None]) -> str:
    return "".join(f"_{key}-{value}" for key, value in wanted.items() if value is not None)


def publish(task: Task, root: Path) -> tuple[Path, ...]:
    """Put a participant's results into the dataset; gives back the files, sorted, FreeSurfer's left out.

    Files of an earlier run with the same name are replaced one by one. The folder they come from stays whole, so that
    this can be done again after a kill; on one disk the files are hard links and take no further space.
    """
    _publish_surfaces(task, root)
    published = []
    for path in sorted(task.output.rglob("*")):
        place = path.relative_to(task.output)
        if path.is_dir() or place.parts[0] == "sourcedata" or (len(place.parts) == 1 and path.name in _NOT_OURS):
            continue
        if place.parts[0] == "logs":  # citations, which every participant has
            place = place.with_name(f"sub-{task.label}_{path.name}")
        published.append(root / place)
        # Renaming one hard link of a file onto another does nothing and leaves both.
        if not ((root / place).exists() and (root / place).samefile(path)):
            with atomic_path(root / place) as temporary:
                _link(path, temporary)
    return tuple(published)


def stated_version(task: Task) -> str | None:
    """The version that fMRIPrep says it is, in what it wrote; none where it says nothing."""
    try:
        description = read_json(task.output / "dataset_description.json")
        return str(description["GeneratedBy"][0]["Version"])
    except (OSError, ValueError, KeyError, IndexError, TypeError):
        return None


def _publish_surfaces(task: Task, root: Path) -> None:
    label = f"sub-{task.label}"
    source = task.output / "sourcedata" / "freesurfer"
    for subject in sorted(source.iterdir()) if source.is_dir() else ():
        place = root / "sourcedata" / "freesurfer" / subject.name
        own = subject.name == label or subject.name.startswith(f"{label}_")
        if place.exists() and not own:
            continue  # fsaverage and its like, the same for all
        place.parent.mkdir(parents=True, exist_ok=True)
        sweep(place.parent)
        temporary = temporary_path(place)
        shutil.copytree(subject, temporary, symlinks=True, copy_function=_link)
        if place.exists():
            shutil.rmtree(place)
        try:
            temporary.replace(place)
        except OSError:  # another participant's job was faster with fsaverage
            if own:
                raise
            shutil.rmtree(temporary)


def _link(path: str | Path, place: str | Path) -> str:
    """Hard link, or a copy where the disk is another or has no links."""
    try:
        os.link(path, place)
    except OSError:
        shutil.copyfile(path, place)
    return str(place)
