"""What the plans of docs/scaling.md rest on: files, bytes and processor time of one run in eight atlases, of packing it, and of reading batches.

python benchmarks/scaling.py --frames 200 --people 24
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd

ATLASES = ("Schaefer100", "Schaefer200", "Schaefer400", "AAL116", "AAL3v1", "Dosenbach160", "Power264", "Seitzman300")


def brainfm(*arguments: object) -> float:
    """Processor seconds of a command line."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen([sys.executable, "-m", "brainfm_cli", *map(str, arguments)], stdout=said, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            said.seek(0)
            raise SystemExit(said.read())
    return usage.ru_utime + usage.ru_stime


def write_run(root: Path, frames: int) -> None:
    """One run of noise as fMRIPrep leaves it, at 2 mm."""
    func = root / "sub-0000" / "func"
    func.mkdir(parents=True)
    (root / "dataset_description.json").write_text(
        '{"Name": "one", "BIDSVersion": "1.10.0", "DatasetType": "derivative", "GeneratedBy": [{"Name": "fMRIPrep"}]}'
    )
    affine = np.diag([2.0, 2, 2, 1])
    affine[:3, 3] = -96.5, -132.5, -78.5
    generator = np.random.default_rng(1)
    shape, stem = (97, 115, 97), "sub-0000_task-rest_space-MNI152NLin2009cAsym_res-2"
    distance = sum(((np.arange(size) - size / 2) / (0.4 * size)).reshape([-1 if a == axis else 1 for a in range(3)]) ** 2 for axis, size in enumerate(shape))  # fmt: skip
    inside = distance < 1
    data = np.where(inside[..., None], generator.integers(8000, 12000, (*shape, frames)), 0).astype(np.int16)
    image = nib.Nifti1Image(data, affine)
    image.header.set_zooms((2, 2, 2, 2.0))
    nib.save(image, func / f"{stem}_desc-preproc_bold.nii.gz")
    nib.save(nib.Nifti1Image(inside.astype(np.uint8), affine), func / f"{stem}_desc-brain_mask.nii.gz")
    (func / f"{stem}_desc-preproc_bold.json").write_text('{"RepetitionTime": 2.0}')
    table = pd.DataFrame({f"cosine{number:02d}": generator.standard_normal(frames) for number in range(4)})
    table["framewise_displacement"] = np.abs(generator.standard_normal(frames))
    for name in ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z", "csf", "white_matter"):
        values = pd.Series(generator.standard_normal(frames))
        table = table.assign(**{name: values, f"{name}_derivative1": values.diff(), f"{name}_power2": values**2})
        table[f"{name}_derivative1_power2"] = table[f"{name}_derivative1"] ** 2
    table.to_csv(func / "sub-0000_task-rest_desc-confounds_timeseries.tsv", sep="\t", index=False, na_rep="n/a")


def copy_people(out: Path, people: int) -> None:
    """Further participants with the series and records of the first."""
    for number in range(1, people):
        label = f"{number:04d}"
        for path in sorted((out / "sub-0000").rglob("*")):
            if path.is_file():
                target = out / f"sub-{label}" / path.relative_to(out / "sub-0000").parent / path.name.replace("sub-0000", f"sub-{label}")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)


def read_batches(packed: Path, batch: int) -> tuple[float, float]:
    """Scans a second and megabytes a second of batches of two windows, read by one process."""
    from brainfm_cli.bids.cohort import Cohort
    from brainfm_cli.learning.pretraining import CohortBatches
    from brainfm_cli.learning.samples import WindowRule, list_scans

    cohort = Cohort.open(packed)
    scans = tuple(list_scans(cohort, list(cohort.participants.index), list(cohort.atlases)))
    source = CohortBatches(cohort=cohort, scans=scans, validation_scans=(), batch_size=batch, seed=1, rule=WindowRule(), cross_atlas=0.0)
    count = size = 0
    started = time.process_time()
    for epoch in range(3):
        for one in source.training(epoch, rank=0, world_size=1):  # type: ignore[attr-defined]
            count += len(one.keys)
            size += sum(view.series.numel() * 4 for view in (one.first, one.second))
    seconds = time.process_time() - started
    return count / seconds, size / 1e6 / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--frames", type=int, default=200)
    parser.add_argument("--people", type=int, default=24)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        tree, out = Path(place) / "fmriprep", Path(place) / "out"
        write_run(tree, arguments.frames)
        bold = next(tree.rglob("*_bold.nii.gz")).stat().st_size / 1e6
        common = (tree, out)
        atlases = ("--atlases", *ATLASES, "--nthreads", 1)
        for name, more in (("three matrices", ()), ("no matrices", ("--set", "matrices=[]"))):
            shutil.rmtree(out, ignore_errors=True)
            seconds = brainfm("parcellate", *common, "participant", *atlases, *more)
            files = [path for path in out.rglob("*") if path.is_file() and ("sub-0000" in path.as_posix())]
            size = sum(path.stat().st_size for path in files) / 1e6
            sys.stdout.write(f"participant, {name}: {bold:.0f} MB of BOLD, {seconds:.1f} s, {len(files)} files, {size:.1f} MB\n")
        copy_people(out, arguments.people)
        for number in range(1, arguments.people):
            (tree / f"sub-{number:04d}").symlink_to(tree / "sub-0000")
        seconds = brainfm("parcellate", out, Path(place) / "packed", "group", *atlases)
        packed = Path(place) / "packed" / "cohort"
        size = sum(path.stat().st_size for path in packed.iterdir() if path.is_file()) / 1e6
        sys.stdout.write(f"group: {seconds / arguments.people:.2f} s and {size / arguments.people:.2f} MB per run\n")
        for batch in (64,):
            rate, megabytes = read_batches(packed.parent, batch)
            sys.stdout.write(f"batches of {batch}: {rate:.0f} graphs a second, {megabytes:.0f} MB a second\n")


if __name__ == "__main__":
    main()
