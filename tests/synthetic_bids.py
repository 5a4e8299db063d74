"""Small fMRIPrep-like datasets with known numbers, for every test that needs one; written in milliseconds.

The planted series are orthogonal to every confound column, so that a regression of the confounds, which are
also added to the voxels, gives the planted correlations back exactly.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TEMPLATE = "MNI152NLin2009cAsym"
SHAPE = (8, 8, 8)
AFFINE = np.array([[20.0, 0, 0, -70], [0, 20, 0, -80], [0, 0, 20, -60], [0, 0, 0, 1]])
REGIONS = ("LeftBack", "RightBack", "LeftFront", "RightFront")
NETWORKS = ("Vis", "Vis", "Default", "Default")
ATLAS = "Quad4"
# The correlations that every run carries, before and after denoising.
CORRELATION = np.array([[1.0, 0.6, -0.3, 0.2], [0.6, 1.0, 0.1, -0.2], [-0.3, 0.1, 1.0, 0.4], [0.2, -0.2, 0.4, 1.0]])


@dataclass(frozen=True, kw_only=True)
class Synthetic:
    """What was written, and what is true of it."""

    root: Path
    """The fMRIPrep-like derivative."""
    atlases: Path
    """The BIDS-Atlas dataset with the four-region atlas."""
    series: dict[str, np.ndarray] = field(default_factory=dict)
    """(frames, regions) planted series by run name, e.g. ``sub-01_task-rest``."""
    fd: dict[str, np.ndarray] = field(default_factory=dict)
    """Framewise displacement by run name, first frame 0."""


def labels() -> np.ndarray:
    """(8, 8, 8) label image of the four regions, 1 to 4 with a border of background."""
    image = np.zeros(SHAPE, np.int16)
    image[1:4, 1:4, 1:7], image[4:7, 1:4, 1:7] = 1, 2
    image[1:4, 4:7, 1:7], image[4:7, 4:7, 1:7] = 3, 4
    return image


def write_atlas(root: Path, *, name: str = ATLAS) -> Path:
    """A BIDS-Atlas dataset that holds the four-region atlas; gives back its folder."""
    folder = root / f"tpl-{TEMPLATE}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(root / "dataset_description.json", {"Name": "test atlases", "BIDSVersion": "1.10.0", "DatasetType": "derivative", "GeneratedBy": [{"Name": "tests"}]})  # fmt: skip
    write_json(root / f"atlas-{name}_description.json", {"Name": name, "License": "CC0", "Authors": ["nobody"], "SampleSize": 1})
    stem = f"tpl-{TEMPLATE}_atlas-{name}_dseg"
    nib.save(nib.Nifti1Image(labels(), AFFINE), folder / f"{stem}.nii.gz")
    rows = {"index": [1, 2, 3, 4], "name": REGIONS, "network": NETWORKS}
    pd.DataFrame(rows).to_csv(folder / f"{stem}.tsv", sep="\t", index=False)
    return root


def write_fmriprep(
    root: Path,
    *,
    participants: Sequence[str] = ("01", "02"),
    sessions: Sequence[str | None] = (None,),
    runs: Sequence[str | None] = (None,),
    frames: int = 120,
    repetition_time_s: float = 2.0,
    cut: dict[str, float] | None = None,
    seed: int = 0,
) -> Synthetic:
    """An fMRIPrep-like derivative with rest runs, and its atlas in ``root.parent / 'atlases'``.

    ``cut`` names participants whose brain mask misses a share of the fourth region, cut off from the top.
    """
    generator = np.random.default_rng(seed)
    made = Synthetic(root=root, atlases=write_atlas(root.parent / "atlases"))
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "dataset_description.json", {"Name": "fMRIPrep - test", "BIDSVersion": "1.9.0", "DatasetType": "derivative", "GeneratedBy": [{"Name": "fMRIPrep", "Version": "25.2.0"}]})  # fmt: skip
    sex = ["F" if number % 2 else "M" for number in range(len(participants))]
    table = {
        "participant_id": [f"sub-{label}" for label in participants],
        "age": [20 + 5 * n for n in range(len(participants))],
        "sex": sex,
    }
    pd.DataFrame(table).to_csv(root / "participants.tsv", sep="\t", index=False)
    for label in participants:
        mask = (labels() > 0).astype(np.uint8)
        fourth = np.argwhere(labels() == 4)
        missing = fourth[np.lexsort(fourth.T)][::-1][: round((cut or {}).get(label, 0.0) * len(fourth))]
        mask[tuple(missing.T)] = 0
        for session in sessions:
            for run in runs:
                parts = [f"sub-{label}", *([f"ses-{session}"] if session else []), "task-rest", *([f"run-{run}"] if run else [])]
                folder = root / f"sub-{label}" / (f"ses-{session}" if session else "") / "func"
                _write_run(folder, "_".join(parts), made, mask, frames, repetition_time_s, generator)
    return made


def _write_run(folder: Path, name: str, made: Synthetic, mask: np.ndarray, frames: int, repetition_time_s: float, generator: np.random.Generator) -> None:  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    table, descriptions = confounds(frames, repetition_time_s, generator)
    table.to_csv(folder / f"{name}_desc-confounds_timeseries.tsv", sep="\t", index=False, na_rep="n/a")
    write_json(folder / f"{name}_desc-confounds_timeseries.json", descriptions)
    series = planted(table, generator)
    bold = np.zeros((*SHAPE, frames))
    image = labels()
    for region in range(len(REGIONS)):
        place = image == region + 1
        noise = generator.standard_normal((int(place.sum()), frames))
        noise -= noise.mean(0)  # the region mean of every frame is exactly the planted series
        bold[place] = 1000 + 10 * series[:, region] + 5 * noise
    nuisance = table[["csf", "white_matter", "trans_x", "rot_z"]].to_numpy() @ np.array([0.3, 0.3, 20.0, 300.0])
    bold[image > 0] += nuisance - nuisance.mean()
    stem = f"{name}_space-{TEMPLATE}_res-2"
    picture = nib.Nifti1Image(bold, AFFINE)
    picture.header.set_zooms((20, 20, 20, repetition_time_s))
    picture.header.set_xyzt_units("mm", "sec")
    nib.save(picture, folder / f"{stem}_desc-preproc_bold.nii.gz")
    write_json(folder / f"{stem}_desc-preproc_bold.json", {"RepetitionTime": repetition_time_s, "SkullStripped": False, "TaskName": "rest"})
    nib.save(nib.Nifti1Image(mask, AFFINE), folder / f"{stem}_desc-brain_mask.nii.gz")
    made.series[name] = series
    made.fd[name] = table["framewise_displacement"].fillna(0).to_numpy()


def planted(table: pd.DataFrame, generator: np.random.Generator) -> np.ndarray:
    """(frames, 4) series of exactly :data:`CORRELATION`, zero mean and orthogonal to every confound column."""
    nuisance = table.bfill().to_numpy(float)  # nilearn fills the first row of derivatives from the second
    basis = np.column_stack([np.ones(len(table)), np.linspace(-1, 1, len(table)), nuisance])
    basis = np.linalg.qr((basis - np.r_[0, basis.mean(0)[1:]]) / np.r_[1, basis.std(0)[1:] + 1e-12])[0]
    white = generator.standard_normal((len(table), len(REGIONS)))
    white -= basis @ (basis.T @ white)
    white = np.linalg.qr(white)[0]
    return white @ np.linalg.cholesky(CORRELATION).T * np.sqrt(len(table))


def confounds(frames: int, repetition_time_s: float, generator: np.random.Generator) -> tuple[pd.DataFrame, dict[str, object]]:
    """fMRIPrep's confounds table and its JSON: motion, tissue, global, FD, DVARS, cosines, aCompCor."""
    base = {f"trans_{axis}": 0.02 * generator.standard_normal(frames).cumsum() for axis in "xyz"}
    base |= {f"rot_{axis}": 0.0003 * generator.standard_normal(frames).cumsum() for axis in "xyz"}
    base |= {name: 1000 + 3 * generator.standard_normal(frames) for name in ("csf", "white_matter", "global_signal")}
    columns: dict[str, np.ndarray] = {}
    for name, values in base.items():
        derivative = np.r_[np.nan, np.diff(values)]
        columns |= {
            name: values,
            f"{name}_derivative1": derivative,
            f"{name}_power2": values**2,
            f"{name}_derivative1_power2": derivative**2,
        }
    motion = np.column_stack([base[f"{kind}_{axis}"] * (1 if kind == "trans" else 50) for kind in ("trans", "rot") for axis in "xyz"])
    columns["framewise_displacement"] = np.r_[np.nan, np.abs(np.diff(motion, axis=0)).sum(1)]
    columns["dvars"] = np.r_[np.nan, 20 + generator.standard_normal(frames - 1)]
    columns["std_dvars"] = np.r_[np.nan, 1 + 0.05 * generator.standard_normal(frames - 1)]
    time = np.arange(frames)
    for order in range(int(2 * frames * repetition_time_s / 128)):
        columns[f"cosine{order:02d}"] = np.sqrt(2 / frames) * np.cos(np.pi * (order + 1) * (2 * time + 1) / (2 * frames))
    descriptions: dict[str, object] = {}
    for number in range(6):
        name = f"a_comp_cor_{number:02d}"
        columns[name] = generator.standard_normal(frames) / np.sqrt(frames)
        descriptions[name] = {"Method": "aCompCor", "Mask": "combined", "Retained": True, "SingularValue": 10.0 - number, "VarianceExplained": 0.1, "CumulativeVarianceExplained": 0.1 * (number + 1)}  # fmt: skip
    return pd.DataFrame(columns), descriptions


def write_tree(root: Path, *, participants: int = 1000, sessions: int = 2, runs: int = 2, series: bool = False) -> Path:
    """A tree of fMRIPrep (or, with ``series``, XCP-D) names whose images are empty: for measuring discovery only."""
    root.mkdir(parents=True)
    name = "XCP-D" if series else "fMRIPrep"
    write_json(root / "dataset_description.json", {"Name": name, "BIDSVersion": "1.9.0", "DatasetType": "derivative", "GeneratedBy": [{"Name": name, "Version": "26.1.1" if series else "25.2.0"}]})  # fmt: skip
    write_json(root / "task-rest_bold.json", {"RepetitionTime": 2.0, "TaskName": "rest"})
    write_json(root / f"task-rest_space-{TEMPLATE}_res-2_desc-preproc_bold.json", {"RepetitionTime": 2.0})
    ends = [f"_space-{TEMPLATE}_res-2_desc-preproc_bold.nii.gz", f"_space-{TEMPLATE}_res-2_desc-preproc_bold.json", f"_space-{TEMPLATE}_res-2_desc-brain_mask.nii.gz", "_desc-confounds_timeseries.tsv", "_desc-confounds_timeseries.json", "_desc-hmc_boldref.nii.gz"]  # fmt: skip
    if series:
        parts = [f"_space-{TEMPLATE}_atlas-{atlas}_stat-" for atlas in ("Gordon", "Tian")]
        ends = [part + kind for part in parts for kind in ("mean_timeseries.tsv", "mean_timeseries.json", "coverage_bold.tsv", "pearsoncorrelation_relmat.tsv")]  # fmt: skip
    for number in range(participants):
        label = f"{number + 1:04d}"
        (root / f"sub-{label}.html").touch()
        for session in range(1, sessions + 1):
            folder = root / f"sub-{label}" / f"ses-{session}" / "func"
            folder.mkdir(parents=True)
            for run in range(1, runs + 1):
                stem = f"sub-{label}_ses-{session}_task-rest_run-{run}"
                for end in ends:
                    (folder / f"{stem}{end}").write_text("{}\n" if end.endswith(".json") else "")
    return root


def write_json(path: Path, values: object) -> None:
    """Plain JSON, as other programs write it."""
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
