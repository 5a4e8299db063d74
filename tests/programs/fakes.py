"""Fake engines on a temporary PATH, a small raw dataset, and the tree that a fake fMRIPrep writes for it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pytest

SCRIPT = Path(__file__).with_name("fake_engine.sh")
LICENCE = "someone@example.org\n12345\n *Cabcdefghijkl\n FSabcdefghijk\n"
FRAMES = 12


@dataclass(frozen=True)
class Fakes:
    """Installed fakes and what they recorded."""

    folder: Path
    """Folder of the programs."""
    record: Path
    """One line per call."""

    @property
    def calls(self) -> list[list[str]]:
        """Program and arguments of each call; a line that is no call (a terminal, an input) is a list of one."""
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [line.rstrip("\037").split("\037") for line in lines]

    @property
    def runs(self) -> list[list[str]]:
        """The calls that were to preprocess somebody."""
        return [call for call in self.calls if "participant" in call]


def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: Sequence[str], tree: Path) -> Fakes:
    """Put fakes on PATH, and nothing else but the system's own programs."""
    folder = tmp_path / "bin"
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copy(SCRIPT, folder / name)
    record = tmp_path / "calls.txt"
    licence = tmp_path / "license.txt"
    licence.write_text(LICENCE)
    for name in ("TEMPLATEFLOW_HOME", "FREESURFER_HOME", "SLURM_MEM_PER_NODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"PATH": f"{folder}:/usr/bin:/bin", "FAKE_RECORD": record, "FAKE_TREE": tree, "FS_LICENSE": licence}.items():
        monkeypatch.setenv(name, str(value))
    return Fakes(folder, record)


def write_raw(root: Path, *, labels: Sequence[str] = ("01",), runs: Sequence[str] = ("1", "2")) -> Path:
    """A raw dataset with a T1w image and rest runs for each participant."""
    write_json(root / "dataset_description.json", {"Name": "test", "BIDSVersion": "1.10.0", "DatasetType": "raw", "License": "CC0", "Authors": ["n", "m"]})  # fmt: skip
    (root / "README").write_text("A dataset for tests, of images that hold only noise and belong to nobody at all.\n")
    write_json(root / "task-rest_bold.json", {"TaskName": "rest", "RepetitionTime": 2.0})
    for label in labels:
        write_image(root / f"sub-{label}" / "anat" / f"sub-{label}_T1w.nii.gz", (6, 6, 6))
        for run in runs:
            write_image(root / f"sub-{label}" / "func" / f"sub-{label}_task-rest_run-{run}_bold.nii.gz", (4, 4, 4, FRAMES))
    return root


def write_tree(
    root: Path, *, label: str = "01", runs: Sequence[str] = ("1", "2"), space: str = "MNI152NLin2009cAsym", fd: float = 0.1
) -> Path:
    """What fMRIPrep writes of a participant for one volumetric space, root files and surfaces included."""
    sub = f"sub-{label}"
    write_json(root / "dataset_description.json", {"Name": "fMRIPrep", "BIDSVersion": "1.4.0", "DatasetType": "derivative", "GeneratedBy": [{"Name": "fMRIPrep", "Version": "25.2.7"}]})  # fmt: skip
    write_text(root / ".bidsignore", "*.html\n")
    write_text(root / "desc-aseg_dseg.tsv", "index\tname\n1\tbrain\n")
    write_text(root / "logs" / "CITATION.md", "cite us\n")
    write_text(root / f"{sub}.html", "<html></html>")
    write_text(root / sub / "figures" / f"{sub}_T1w.svg", "<svg/>")
    write_text(root / "sourcedata" / "freesurfer" / sub / "mri" / "orig.mgz", "surfaces")
    write_text(root / "sourcedata" / "freesurfer" / "fsaverage" / "mri" / "orig.mgz", "average")
    anat = root / sub / "anat"
    for name in ("desc-preproc_T1w", "desc-brain_mask", "dseg", "label-GM_probseg"):
        write_image(anat / f"{sub}_{name}.nii.gz", (6, 6, 6))
    write_json(anat / f"{sub}_desc-preproc_T1w.json", {"SkullStripped": False})
    write_json(anat / f"{sub}_desc-brain_mask.json", {"Type": "Brain", "RawSources": ["bids:raw:sub-01/anat/sub-01_T1w.nii.gz"]})
    write_text(anat / f"{sub}_from-T1w_to-{space}_mode-image_xfm.h5", "transform")
    write_text(anat / f"{sub}_hemi-L_white.surf.gii", "surface")
    for run in runs:
        stem = f"{sub}_task-rest_run-{run}"
        func = root / sub / "func"
        for name in ("desc-hmc_boldref", "desc-coreg_boldref"):
            write_image(func / f"{stem}_{name}.nii.gz", (4, 4, 4))
            write_json(func / f"{stem}_{name}.json", {"Sources": ["bids:raw:x"]})
        write_image(func / f"{stem}_space-{space}_desc-preproc_bold.nii.gz", (4, 4, 4, FRAMES))
        write_json(
            func / f"{stem}_space-{space}_desc-preproc_bold.json", {"RepetitionTime": 2.0, "TaskName": "rest", "SkullStripped": False}
        )
        write_image(func / f"{stem}_space-{space}_desc-brain_mask.nii.gz", (4, 4, 4))
        write_json(func / f"{stem}_space-{space}_desc-brain_mask.json", {"Type": "Brain"})
        table = confounds(fd)
        table.to_csv(func / f"{stem}_desc-confounds_timeseries.tsv", sep="\t", index=False, na_rep="n/a")
        write_json(func / f"{stem}_desc-confounds_timeseries.json", {})
    return root


def confounds(fd: float) -> pd.DataFrame:
    """A confounds table with a known mean framewise displacement (mm), every second value twice the others' distance from 0."""
    displacement = np.where(np.arange(FRAMES) % 2, 0.5, 1.5) * fd
    displacement[0] = np.nan
    return pd.DataFrame({"framewise_displacement": displacement, "std_dvars": np.linspace(1, 2, FRAMES), "non_steady_state_outlier00": [1, *[0] * (FRAMES - 1)]})  # fmt: skip


def write_from_listing(root: Path, listing: Path) -> Path:
    """Every file of an output listing of fMRIPrep's own tests, with images that can be read."""
    names = [line.strip() for line in listing.read_text().splitlines() if line.strip()]
    folders = {str(Path(name).parent) for name in names}
    for name in names:
        if name.endswith(".nii.gz"):
            write_image(root / name, (4, 4, 4, FRAMES) if name.endswith("bold.nii.gz") else (4, 4, 4))
        elif name not in folders and "." in Path(name).name:
            write_text(root / name, json.dumps({"RepetitionTime": 2.0}))
    return root


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def write_image(path: Path, shape: tuple[int, ...]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = np.random.default_rng(len(shape)).integers(1, 100, shape).astype(np.int16)
    image = nib.Nifti1Image(data, np.diag([3.0, 3, 3, 1]))
    image.header.set_xyzt_units("mm", "sec")
    if len(shape) == 4:
        image.header.set_zooms((3, 3, 3, 2.0))
    nib.save(image, path)


def write_json(path: Path, values: object) -> None:
    write_text(path, json.dumps(values))


def write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
