"""The embedded preprocessing: recovery of what was planted, realignment beside other programs, seconds of each step.

python benchmarks/preprocess.py recovery --people 3
python benchmarks/preprocess.py realignment --frames 40
python benchmarks/preprocess.py chain RAW_BIDS
python benchmarks/preprocess.py signal RAW_BIDS OUT --atlases ATLASES   (bids_localizer and its preprocessed output)
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import nibabel as nib
import numpy as np
from scipy import ndimage

SPACE = "MNI152NLin2009cAsym"
BLOCKS = 13
Transforms = np.ndarray


def recover(raw: Path, out: Path, label: str) -> dict[str, object]:
    """What the embedded engine found of a head that ``simulate --raw`` planted; displacements are in millimetres."""
    from brainfm_cli.programs.embedded import itk
    from brainfm_cli.signals.transforms import centre_of_mass_mm, motion_table, read_itk

    sub = f"sub-{label}"
    truth, anat, func = raw / "sourcedata" / "truth" / sub, out / sub / "anat", out / sub / "func"
    hmc, coreg = f"{sub}_task-rest_from-orig_to-boldref_mode-image_desc-hmc_xfm.txt", f"{sub}_task-rest_from-boldref_to-T1w_mode-image_desc-coreg_xfm.txt"  # fmt: skip
    planted, found = read_itk(truth / hmc), read_itk(func / hmc)
    planted_coreg, found_coreg = read_itk(truth / coreg)[0], read_itk(func / coreg)[0]
    reference = nib.load(func / f"{sub}_task-rest_desc-hmc_boldref.nii.gz")
    centre = centre_of_mass_mm(reference.get_fdata(), reference.header.get_zooms()[:3])
    tables = [motion_table(moves, reference.shape, reference.affine, centre) for moves in (planted, found)]
    brain = nib.load(truth / f"{sub}_desc-brain_mask.nii.gz")
    inside = brain.get_fdata() > 0
    edge = inside & ~ndimage.binary_erosion(inside)
    points = {
        name: nib.affines.apply_affine(brain.affine, np.argwhere(where)[::17]) for name, where in (("brain", inside), ("boundary", edge))
    }
    gone = {}
    for name, places in points.items():  # from the T1w image to where each frame has it
        apart = [
            np.linalg.norm(
                nib.affines.apply_affine(one @ planted_coreg, places) - nib.affines.apply_affine(other @ found_coreg, places), axis=1
            )
            for one, other in zip(planted, found, strict=True)
        ]
        gone[name] = np.median(apart)
    placed = nib.load(truth / f"{sub}_from-{SPACE}_to-T1w_desc-points_map.nii.gz")
    ours = itk.mapped_points(placed.shape[:3], placed.affine, [anat / f"{sub}_from-T1w_to-{SPACE}_mode-image_xfm.h5"])
    apart = np.linalg.norm(ours - placed.get_fdata(), axis=-1)
    mask = nib.load(out / sub / "anat" / f"{sub}_space-{SPACE}_res-2_desc-brain_mask.nii.gz")
    voxels = np.linalg.inv(mask.affine) @ placed.affine
    grid = np.rint(nib.affines.apply_affine(voxels, np.argwhere(np.ones(placed.shape[:3])))).astype(int)
    fits = ((grid >= 0) & (grid < mask.shape)).all(1)
    in_brain = np.zeros(len(grid), bool)
    whole = mask.get_fdata() > 0
    in_brain[fits] = whole[tuple(grid[fits].T)]
    surface = whole & ~ndimage.binary_erosion(whole)
    at_edge = np.zeros(len(grid), bool)
    at_edge[fits] = surface[tuple(grid[fits].T)]
    own = nib.load(anat / f"{sub}_desc-brain_mask.nii.gz").get_fdata() > 0
    return {
        "motion correlation": [round(float(np.corrcoef(one, other)[0, 1]), 4) for one, other in zip(*(table.T for table in tables), strict=True)],
        "T1w to frames, brain": round(float(gone["brain"]), 3),
        "T1w to frames, boundary": round(float(gone["boundary"]), 3),
        "template to T1w, brain": round(float(np.median(apart.ravel()[in_brain])), 3),
        "template to T1w, boundary": round(float(np.median(apart.ravel()[at_edge])), 3),
        "mask dice": round(float(2 * (own & inside).sum() / (own.sum() + inside.sum())), 4),
    }  # fmt: skip


def chain(raw: Path, work: Path, *, threads: int) -> dict[str, object]:
    """Seconds of each step for every participant of a dataset."""
    from brainfm_cli.bids.inputs import list_participants
    from brainfm_cli.bids.raw import read_raw_participant
    from brainfm_cli.bids.units import peak_memory_mb
    from brainfm_cli.config import Selection
    from brainfm_cli.programs.embedded.settings import EmbeddedSettings
    from brainfm_cli.programs.embedded.workflow import preprocess_participant

    found = {}
    for label in list_participants(raw):
        participant = read_raw_participant(raw, label, Selection())
        clock = time.perf_counter()
        result = preprocess_participant(participant, work / "out", work / label, EmbeddedSettings(), seed=1, nthreads=threads)
        found[label] = {
            "seconds": round(time.perf_counter() - clock, 1), "steps": result.seconds, "peak MB of the process": peak_memory_mb(),
            "gates": {gate["name"]: round(gate["value"], 4) for gates in result.gates.values() for gate in gates}, "notes": result.notes,
        }  # fmt: skip
    return found


def simulate(root: Path, people: int, frames: int) -> Path:
    """A dataset of ``simulate --raw``."""
    from brainfm_cli.stages.simulate import SimulateSettings, write_raw_person

    settings = SimulateSettings(level="raw", participants=people, frames=frames)
    for index in range(1, people + 1):
        write_raw_person(root, settings, index)
    (root / "dataset_description.json").write_text(json.dumps({"Name": "simulated", "BIDSVersion": "1.10.0", "DatasetType": "raw"}))
    return root


def recovery(folder: Path, people: int, frames: int, threads: int) -> dict[str, object]:
    raw = simulate(folder / "raw", people, frames)
    times = chain(raw, folder / "work", threads=threads)
    return {label: {**recover(raw, folder / "work" / "out", label), "seconds": times[label]["seconds"]} for label in times}


def realignment(folder: Path, frames: int) -> dict[str, object]:
    """Ours, antspyx and dipy on one run, one thread each: seconds a volume, and median displacement from the truth in the brain."""
    import os

    os.environ["ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS"] = "1"
    import ants
    from dipy.align import affine_registration

    from brainfm_cli.programs.embedded import itk
    from brainfm_cli.signals.realignment import average_reference, build_target, realign
    from brainfm_cli.signals.transforms import read_itk

    raw = simulate(folder / "raw", 1, frames)
    sub = "sub-0001"
    run = nib.load(raw / sub / "func" / f"{sub}_task-rest_bold.nii.gz")
    values = np.moveaxis(run.get_fdata(dtype=np.float32), -1, 0)
    affine = run.affine
    truth = read_itk(raw / "sourcedata" / "truth" / sub / f"{sub}_task-rest_from-orig_to-boldref_mode-image_desc-hmc_xfm.txt")
    steady = range(1, frames)
    clock = time.perf_counter()
    reference = average_reference(lambda index: values[index], steady, affine)
    building = time.perf_counter() - clock
    points = nib.affines.apply_affine(affine, np.argwhere(reference > 0.5 * np.percentile(reference, 98))[::7])

    def error(found: Transforms) -> float:
        # The reference lies where the middle frames were: what all frames have in common is no error of motion.
        residual = [np.linalg.inv(one) @ other for one, other in zip(found, truth[1:], strict=True)]
        common = np.median([nib.affines.apply_affine(one, points) for one in residual], axis=0)
        return float(np.median([np.linalg.norm(nib.affines.apply_affine(one, points) - common, axis=1) for one in residual]))

    def timed(name: str, estimate: object) -> dict[str, float]:
        clock = time.perf_counter()
        found = np.array(estimate())
        return {
            name: {"seconds a volume": round((time.perf_counter() - clock) / len(found), 4), "median error, mm": round(error(found), 4)}
        }

    def by_ants() -> list[np.ndarray]:
        fixed = itk.to_itk(reference, affine)
        found = []
        for index in steady:
            moving = itk.to_itk(values[index], affine)
            result = ants.registration(fixed, moving, "BOLDRigid", outprefix=str(folder / "a_"))
            found.append(itk.matrix_of(Path(result["fwdtransforms"][0])))
        return found

    def by_dipy() -> list[np.ndarray]:
        return [
            affine_registration(
                values[index], reference, moving_affine=affine, static_affine=affine, pipeline=["rigid"], level_iters=[100, 50, 10],
                sigmas=[2.0, 1.0, 0.0], factors=[4, 2, 1],
            )[1]
            for index in steady
        ]  # fmt: skip

    target = build_target(reference, affine)
    none = {"no realignment": {"median error, mm": round(error(np.repeat(np.eye(4)[None], len(steady), 0)), 4)}}
    return {
        "frames": len(steady), "voxels": list(reference.shape), "reference, seconds": round(building, 3), **none,
        **timed("brainfm", lambda: realign(lambda index: values[index], steady, target)),
        **timed("antspyx BOLDRigid", by_ants), **timed("dipy rigid, mutual information", by_dipy),
    }  # fmt: skip


def ventral_points(run: nib.Nifti1Image, func: Path, stem: str, atlases: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Ventral temporal cortex as a mask in the template and as (3, points) voxels of the run; millimetres there to one of the head."""
    import pandas as pd
    from nilearn.image import resample_to_img

    from brainfm_cli.programs.embedded import itk
    from brainfm_cli.signals.transforms import read_itk

    folder, anat = atlases / f"tpl-{SPACE}", func.with_name("anat")
    labels = nib.load(next(folder.glob("*AAL116*dseg.nii.gz")))
    table = pd.read_csv(next(folder.glob("*AAL116*dseg.tsv")), sep="\t")
    wanted = table["index"][table["name"].str.contains("Fusiform|ParaHippo|Lingual", case=False)]
    region = nib.Nifti1Image(np.isin(labels.get_fdata(), wanted).astype(np.float32), labels.affine)
    covered = nib.load(func / f"{stem}_space-{SPACE}_res-2_desc-brain_mask.nii.gz")
    in_template = resample_to_img(region, covered, interpolation="nearest", force_resample=True, copy_header=True)
    chosen = (in_template.get_fdata() > 0.5) & (covered.get_fdata() > 0)
    head = itk.mapped_points(covered.shape, covered.affine, [next(anat.glob(f"*_from-T1w_to-{SPACE}_mode-image_xfm.h5"))])
    to_run = np.linalg.inv(run.affine) @ read_itk(func / f"{stem}_from-boldref_to-T1w_mode-image_desc-coreg_xfm.txt")[0]
    steps = np.stack([np.stack(np.gradient(head[..., axis]), -1)[chosen] for axis in range(3)], -2)
    enlarged = np.cbrt(abs(np.linalg.det(covered.affine[:3, :3])) / np.abs(np.linalg.det(steps)))
    return chosen, nib.affines.apply_affine(to_run, head[chosen]).T, float(np.median(enlarged))


def signal(raw: Path, out: Path, atlases: Path, smoothing: float) -> dict[str, object]:
    """Faces against houses in ventral temporal cortex: the preprocessed run in template space beside the run as scanned.

    The region is drawn once, in the template (AAL116: fusiform, parahippocampal, lingual), and brought to the run by the transforms
    found. Both runs are smoothed by the same length in the person's head, which the template enlarges, and read at the same points.
    In the third arm nothing is interpolated: what the motion found does to the reference is subtracted from the run as scanned.
    Errors of differences are of a jackknife over blocks of frames.
    """
    import pandas as pd
    from nilearn.glm.contrasts import compute_contrast
    from nilearn.glm.first_level import make_first_level_design_matrix, run_glm
    from nilearn.image import smooth_img

    from brainfm_cli.signals.realignment import move
    from brainfm_cli.signals.transforms import read_itk

    source = next(raw.rglob("*_bold.nii.gz"))
    run = nib.load(source)
    stem, sub = source.name.removesuffix("_bold.nii.gz"), source.name.partition("_")[0]
    func = out / sub / "func"
    preprocessed = func / f"{stem}_space-{SPACE}_res-2_desc-preproc_bold.nii.gz"
    about = json.loads(preprocessed.with_name(preprocessed.name.replace(".nii.gz", ".json")).read_text())
    confounds = pd.read_csv(func / f"{stem}_desc-confounds_timeseries.tsv", sep="\t", na_values="n/a")
    first = sum(name.startswith("non_steady") for name in confounds)
    events = pd.read_csv(source.with_name(f"{stem}_events.tsv"), sep="\t")[["onset", "duration", "trial_type"]]
    chosen, places, enlarged = ventral_points(run, func, stem, atlases)
    tr = float(run.header.get_zooms()[3])
    moment = about["StartTime"] / tr if about["SliceTimingCorrected"] else 0.5
    motion = confounds[[f"{kind}_{axis}" for kind in ("trans", "rot") for axis in "xyz"]].iloc[first:].to_numpy()
    shifted = events.assign(onset=events["onset"] - first * tr)

    def design(middle: float, regressors: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        times = (np.arange(run.shape[3] - first) + middle) * tr
        names = None if regressors is None else [f"motion{number}" for number in range(6)]
        made = make_first_level_design_matrix(times, shifted, hrf_model="spm", drift_model="cosine", high_pass=1 / 128, add_regs=regressors, add_reg_names=names)  # fmt: skip
        return made.to_numpy(), (made.columns == "face") * 1.0 - (made.columns == "house")

    def tail(values: np.ndarray, matrix: np.ndarray, contrast: np.ndarray) -> float:
        labels, fitted = run_glm(values, matrix, noise_model="ar1")
        return float(np.percentile(np.abs(compute_contrast(labels, fitted, contrast, stat_type="t").z_score()), 95))

    def as_scanned(image: object) -> np.ndarray:
        smooth = smooth_img(image, smoothing)
        values = np.moveaxis(smooth.get_fdata(dtype=np.float32), -1, 0)[first:]
        return np.stack([ndimage.map_coordinates(frame, places, order=1, mode="nearest") for frame in values])

    reference = nib.load(func / f"{stem}_desc-hmc_boldref.nii.gz").get_fdata(dtype=np.float32)
    moves = read_itk(func / f"{stem}_from-orig_to-boldref_mode-image_desc-hmc_xfm.txt")
    frames = run.get_fdata(dtype=np.float32)
    still = [frames[..., index] - move(reference, run.affine, np.linalg.inv(one)) + reference for index, one in enumerate(moves)]
    runs = {
        "as scanned": (0.5, as_scanned(run)),
        "preprocessed": (moment, smooth_img(str(preprocessed), smoothing * enlarged).get_fdata(dtype=np.float32)[chosen].T[first:]),
        "as scanned, motion of the reference subtracted": (0.5, as_scanned(nib.Nifti1Image(np.stack(still, -1), run.affine, run.header))),
    }
    blocks = np.array_split(np.arange(run.shape[3] - first), BLOCKS)
    found: dict[str, object] = {"points": int(chosen.sum()), "millimetres of the template to one of the head": round(enlarged, 3)}
    matrix, contrast = design(0.5, None)
    fit, *_ = np.linalg.lstsq(matrix, motion, rcond=None)
    spread = np.sqrt(((motion - matrix @ fit) ** 2).sum(0) / (len(motion) - matrix.shape[1]) * (contrast @ np.linalg.pinv(matrix.T @ matrix) @ contrast))  # fmt: skip
    found["t of face - house in motion"] = (contrast @ fit / spread).round(2).tolist()
    without: dict[str, np.ndarray] = {}
    for regressors in (None, motion):
        for name, (middle, values) in runs.items():
            matrix, contrast = design(middle, regressors)
            key = name if regressors is None else f"{name}, motion regressed"
            whole = tail(values, matrix, contrast)
            without[name] = np.array([tail(np.delete(values, block, 0), np.delete(matrix, block, 0), contrast) for block in blocks])
            apart = without[name] - without["as scanned"]
            error = np.sqrt((BLOCKS - 1) * ((apart - apart.mean()) ** 2).mean())
            tsnr = float(np.median(values.mean(0) / values.std(0)))
            found[key] = {"median tSNR": round(tsnr, 2), "95th percentile of |z|": round(whole, 3), "error of its difference": round(float(error), 3)}  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["recovery", "realignment", "chain", "signal"])
    parser.add_argument("raw", type=Path, nargs="?", help="raw BIDS dataset, for chain and signal")
    parser.add_argument("derivative", type=Path, nargs="?", help="its preprocessed output, for signal")
    parser.add_argument("--atlases", type=Path, help="BIDS-Atlas dataset with AAL116, for signal")
    parser.add_argument("--people", type=int, default=3)
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoothing", type=float, default=6.0, help="full width in mm of the head, for signal")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        todo = {
            "recovery": lambda: recovery(folder, options.people, options.frames, options.threads),
            "realignment": lambda: realignment(folder, options.frames),
            "chain": lambda: chain(options.raw, folder, threads=options.threads),
            "signal": lambda: signal(options.raw, options.derivative, options.atlases, options.smoothing),
        }
        text = json.dumps(todo[options.what](), indent=2)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
