"""Steps of a BOLD run on small runs whose truth is known."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from scipy import ndimage

from brainfm_cli.bids.derivatives import write_text
from brainfm_cli.bids.images import write_image
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.programs.embedded import functional, itk, sampling
from brainfm_cli.programs.embedded.settings import EmbeddedSettings
from brainfm_cli.signals.transforms import itk_text, read_itk, rigid
from tests.programs.heads import AFFINE, SHAPE, t1w, tissues

TR = 2.0
BOLD_AFFINE = np.array([[-4.0, 0, 0, 72], [0, 4.0, 0, -90], [0, 0, 4.0, -70], [0, 0, 0, 1]])  # left is first, as scanners do it
BOLD_SHAPE = (37, 46, 36)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    itk.prepare(1, 1)


def contrast(labels: np.ndarray) -> np.ndarray:
    """T2* contrast: CSF bright, white matter dark."""
    return ndimage.gaussian_filter(np.array([0, 1400, 1000, 800, 150], np.float32)[labels], 0.6)


def seen_by_scanner(motion: np.ndarray, shape: tuple[int, ...] = BOLD_SHAPE, affine: np.ndarray = BOLD_AFFINE) -> np.ndarray:
    """(frames, x, y, z) of the head, moved by transforms from reference points to frame points."""
    still = contrast(tissues())
    frames = []
    for move in motion:
        matrix = np.linalg.inv(AFFINE) @ np.linalg.inv(move) @ affine
        frames.append(ndimage.affine_transform(still, matrix[:3, :3], matrix[:3, 3], shape, order=3, mode="constant"))
    return np.stack(frames).astype(np.float32)


def save_run(path: Path, frames: np.ndarray, affine: np.ndarray = BOLD_AFFINE) -> str:
    image = nib.Nifti1Image(np.moveaxis(frames, 0, -1), affine)
    image.header.set_zooms((*image.header.get_zooms()[:3], TR))
    nib.save(image, path)
    return str(path)


def drift(count: int, generator: np.random.Generator) -> np.ndarray:
    steps = generator.normal(0, [0.15, 0.15, 0.15, 0.003, 0.003, 0.003], (count, 6)).cumsum(0)
    return rigid(steps - steps.mean(0), np.zeros(3))


def folder(tmp_path: Path, name: str) -> Path:
    made = tmp_path / name
    made.mkdir()
    return made


def test_a_stored_run_is_the_run(tmp_path: Path, generator: np.random.Generator) -> None:
    frames = generator.normal(1000, 5, (45, 6, 7, 5)).astype(np.float32)
    frames[:3] *= 1.3  # before the steady state
    frames[20, 0, 0, 0] = np.nan
    series = functional.open_stored(functional.store(tmp_path, save_run(tmp_path / "bold.nii.gz", frames), TR))
    np.testing.assert_array_equal(series.frames, np.nan_to_num(frames))
    np.testing.assert_allclose(series.affine, BOLD_AFFINE)
    assert series.first == 3
    assert list(series.steady) == list(range(3, 45))
    assert not list(tmp_path.glob(".*.part"))


@pytest.mark.parametrize("direction", ["k", "k-", "j"])
def test_slices_are_moved_to_the_middle_of_the_frame(tmp_path: Path, direction: str) -> None:
    shape, frames = (4, 6, 5), 120
    axis = "ijk".index(direction[0])
    times = np.linspace(0, TR * 0.9, shape[axis])
    listed = times[::-1] if direction.endswith("-") else times
    start = np.arange(frames)[:, None] * TR
    wave = np.sin(2 * np.pi * 0.03 * (start + times)) * 10 + 500  # as each slice saw it
    run = np.broadcast_to(np.expand_dims(wave, tuple(other + 1 for other in range(3) if other != axis)), (frames, *shape)).astype(
        np.float32
    )
    about = functional.store(folder(tmp_path, "a"), save_run(tmp_path / "bold.nii.gz", run), TR)
    timed, moment = functional.time_slices(folder(tmp_path, "b"), about, listed.tolist(), direction)
    assert moment == pytest.approx(TR * 0.45, abs=1e-3)
    expected = np.sin(2 * np.pi * 0.03 * (start[:, 0] + moment)) * 10 + 500
    found = functional.open_stored(timed).frames
    np.testing.assert_allclose(found[10:-10], np.broadcast_to(expected[10:-10, None, None, None], (100, *shape)), atol=0.05)
    assert np.abs(run[10:-10] - expected[10:-10, None, None, None]).max() > 1


def test_no_times_leave_the_run_alone(tmp_path: Path) -> None:
    assert functional.time_slices(tmp_path, "series.json", None, "k") == ("series.json", None)
    assert not list(tmp_path.iterdir())


def test_coregistration_finds_the_head_wherever_it_lies(tmp_path: Path, generator: np.random.Generator) -> None:
    labels = tissues()
    structural = write_image(tmp_path / "t1w.nii", t1w(labels, generator), AFFINE)
    inside = np.asarray(ndimage.binary_fill_holes((labels > 0) & (labels < 4)))
    mask = write_image(tmp_path / "mask.nii", inside.astype(np.uint8), AFFINE)
    corners = np.array([[-50, -60, -40, 1], [50, 60, 50, 1], [0, 60, -40, 1], [0, 0, 0, 1.0]]).T
    planted = (rigid(np.array([3.0, -4, 5, 0.06, -0.03, 0.04]), np.zeros(3)), rigid(np.array([40.0, 60, -50, 0, 0, 0.05]), np.zeros(3)))
    for number, move in enumerate(planted):
        affine = move @ BOLD_AFFINE  # the whole grid is elsewhere
        frame = seen_by_scanner(np.eye(4)[None])[0]
        boldref = write_image(tmp_path / f"boldref{number}.nii", frame + 1, affine)
        path, information = functional.coregister(
            folder(tmp_path, str(number)), str(boldref), str(structural), str(mask), EmbeddedSettings(), seed=1
        )
        error = np.abs((read_itk(Path(path))[0] - move) @ corners).max()
        assert error < 1.5, error  # mm, of BOLD voxels of 4 mm
        assert information > 0.3


def chain(
    tmp_path: Path, frames: np.ndarray, generator: np.random.Generator, *, move: np.ndarray | None = None, affine: np.ndarray = BOLD_AFFINE
) -> dict[str, str]:
    """Files of a run up to its masks; structure and template are one space, so that the truth is known everywhere."""
    labels = tissues()
    inside = np.asarray(ndimage.binary_fill_holes((labels > 0) & (labels < 4)))
    mask = write_image(tmp_path / "mask.nii", inside.astype(np.uint8), AFFINE)
    shares = [ndimage.gaussian_filter((labels == code).astype(np.float32), 0.4) for code in (1, 2, 3)]
    probabilities = [str(write_image(tmp_path / f"p{code}.nii", share, AFFINE)) for code, share in enumerate(shares)]
    about = functional.store(folder(tmp_path, "store"), save_run(tmp_path / "bold.nii.gz", frames, affine), TR)
    boldref, motion = functional.align_frames(folder(tmp_path, "realign"), about, 1)
    coreg = str(write_text(tmp_path / "coreg.txt", itk_text(np.eye(4) if move is None else move)))
    masks, fractions = functional.native_masks(folder(tmp_path, "masks"), boldref, coreg, str(mask), probabilities)
    assert set(fractions) == {"CSF", "WM"}
    del generator
    return {"about": about, "boldref": boldref, "motion": motion, "coreg": coreg, "masks": masks, "mask": str(mask)}


def template_brain(tmp_path: Path) -> tuple[str, np.ndarray]:
    """Brain mask and labels of the head on the output grid of 2 mm."""
    from brainfm_cli.programs.embedded.template import output_grid

    shape, affine = output_grid(2)
    labels = tissues(shape, affine)
    inside = np.asarray(ndimage.binary_fill_holes((labels > 0) & (labels < 4)))
    return str(write_image(tmp_path / "brain.nii", inside.astype(np.uint8), affine)), labels


def test_a_moving_head_stands_still_after_one_interpolation(tmp_path: Path, generator: np.random.Generator) -> None:
    motion = drift(24, generator)
    frames = seen_by_scanner(motion)
    files = chain(tmp_path, frames, generator)
    identity = str(write_text(tmp_path / "identity.txt", itk_text(np.eye(4))))
    brain, labels = template_brain(tmp_path)
    found, gate = sampling.resample_run(
        folder(tmp_path, "sample"), files["about"], files["masks"], files["motion"], files["coreg"], identity, brain, EmbeddedSettings(), 2
    )
    assert gate["passed"]
    assert gate["value"] > 0.95
    series = np.asarray(nib.load(found["bold"]).dataobj)
    covered = np.asarray(nib.load(found["mask"]).dataobj) > 0
    left = series[covered].std(1).mean() / series[covered].mean()
    raw = frames[:, frames.mean(0) > 600].std(0).mean() / 1000
    assert left < 0.5 * raw
    middle = ndimage.binary_erosion(labels == 3, iterations=3)
    assert series[middle].mean() == pytest.approx(800, rel=0.02)  # white matter is where the template has it
    header = nib.load(found["bold"]).header
    assert header["sform_code"] == 4
    assert header.get_zooms()[3] == TR

    native = np.load(found["native"])
    codes = np.asarray(nib.load(files["masks"]).dataobj).astype(np.uint8)
    assert native.shape == (24, int((codes & 1).sum()))
    table, description = functional.tabulate(tmp_path, files["about"], found["native"], files["masks"], files["boldref"], files["motion"])
    confounds = pd.read_csv(table, sep="\t", na_values="n/a")
    np.testing.assert_allclose(confounds["global_signal"], native.mean(1), rtol=1e-5)
    inside = codes[(codes & 1) > 0]
    np.testing.assert_allclose(confounds["white_matter"], native[:, (inside & 4) > 0].mean(1), rtol=1e-5)
    assert confounds["white_matter"].mean() == pytest.approx(800, rel=0.03)
    assert confounds["csf"].mean() > 1150
    planted = np.linalg.inv(motion[0]) @ motion
    assert np.corrcoef(confounds["trans_z"], planted[:, 2, 3])[0, 1] ** 2 > 0.9
    described = json.loads(Path(description).read_text())
    assert described["a_comp_cor_00"]["Mask"] == "combined"


# Axes of the voxels, their sizes in millimetres, and the tilt of the grid in radians.
GRIDS = {
    "anisotropic": ("LAS", (3.0, 3.0, 5.0), 0.0),
    "anisotropic, RPI": ("RPI", (3.0, 3.0, 5.0), 0.0),
    "anisotropic, oblique": ("LAS", (3.0, 3.0, 5.0), 0.3),
    "sagittal slices, oblique": ("PSR", (3.5, 3.0, 5.0), -0.25),
}


def scanner_grid(axes: str, zooms: tuple[float, float, float], tilt: float) -> tuple[tuple[int, ...], np.ndarray]:
    """A grid around the whole head whose voxel axes point as named."""
    towards = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    rotation = rigid(np.array([0, 0, 0, tilt, tilt / 3, tilt / 2]), np.zeros(3))
    directions = np.array([towards[axis] for axis in axes], float).T
    extents = np.abs(directions.T) @ [176.0, 214.0, 176.0]
    shape = tuple(np.ceil(extents / zooms).astype(int).tolist())
    affine = np.eye(4)
    affine[:3, :3] = directions * zooms
    affine = rotation @ affine
    affine[:3, 3] = -affine[:3, :3] @ (0.5 * (np.array(shape) - 1))
    return shape, affine


@pytest.mark.parametrize("grid", [pytest.param(name, marks=() if name == "anisotropic, oblique" else pytest.mark.long) for name in GRIDS])
def test_voxels_of_any_shape_and_direction(tmp_path: Path, grid: str, generator: np.random.Generator) -> None:
    """Motion, coregistration, masks and one-step resampling where the scanner's axes are not the head's, nor voxels cubes."""
    shape, affine = scanner_grid(*GRIDS[grid])
    motion = drift(6, generator)
    frames = seen_by_scanner(motion, shape, affine)
    files = chain(tmp_path, frames, generator, affine=affine)
    corners = np.array([[-50, -60, -40, 1], [50, 60, 50, 1], [0, 60, -40, 1], [0, 0, 0, 1.0]]).T
    moves = read_itk(Path(files["motion"]))
    from_first = [one @ np.linalg.inv(one[0]) for one in (moves, motion)]  # apart from where the reference lies
    assert np.abs((from_first[0] - from_first[1]) @ corners).max() < 0.15  # mm

    labels = tissues()
    structural = write_image(tmp_path / "t1w.nii", t1w(labels, generator), AFFINE)
    coreg, _ = functional.coregister(
        folder(tmp_path, "coreg"), files["boldref"], str(structural), files["mask"], EmbeddedSettings(), seed=1
    )
    # The reference lies between the frames; the structure where it was when none had moved.
    reference = np.mean([np.linalg.inv(move) @ planted for move, planted in zip(moves, motion, strict=True)], 0)
    error = np.abs((read_itk(Path(coreg))[0] - reference) @ corners).max()
    assert error < 1.5, error  # mm, of voxels of 5 mm

    identity = str(write_text(tmp_path / "identity.txt", itk_text(np.eye(4))))
    brain, wanted = template_brain(tmp_path)
    found, gate = sampling.resample_run(
        folder(tmp_path, "sample"), files["about"], files["masks"], files["motion"], coreg, identity, brain, EmbeddedSettings(), 2
    )
    assert gate["value"] > 0.99
    mean = np.asarray(nib.load(found["boldref"]).dataobj)
    inner = {code: ndimage.binary_erosion(wanted == code, iterations=3) for code in (2, 3)}
    assert mean[inner[3]].mean() == pytest.approx(800, rel=0.03)
    assert mean[inner[2]].mean() == pytest.approx(1000, rel=0.05)
    codes = np.asarray(nib.load(files["masks"]).dataobj).astype(np.uint8)
    truth = tissues(shape, affine)
    inside = np.asarray(ndimage.binary_fill_holes((truth > 0) & (truth < 4)))
    assert 2 * ((codes & 1) * inside).sum() / ((codes & 1).sum() + inside.sum()) > 0.95


def test_threads_change_nothing(tmp_path: Path, generator: np.random.Generator) -> None:
    files = chain(tmp_path, seen_by_scanner(drift(6, generator)), generator)
    identity = str(write_text(tmp_path / "identity.txt", itk_text(np.eye(4))))
    brain, _ = template_brain(tmp_path)
    made = []
    for threads in (1, 3):
        found, _ = sampling.resample_run(
            folder(tmp_path, f"s{threads}"), files["about"], files["masks"], files["motion"], files["coreg"], identity, brain,
            EmbeddedSettings(), threads,
        )  # fmt: skip
        made.append(Path(found["bold"]).read_bytes())
    assert made[0] == made[1]


@pytest.mark.parametrize(("scale", "stored"), [(1.0, np.int16), (30.0, np.float32), (0.01, np.float32)])
def test_brightness_decides_how_a_series_is_stored(tmp_path: Path, generator: np.random.Generator, scale: float, stored: type) -> None:
    frames = seen_by_scanner(drift(4, generator)) * np.float32(scale)
    files = chain(tmp_path, frames, generator)
    identity = str(write_text(tmp_path / "identity.txt", itk_text(np.eye(4))))
    brain, labels = template_brain(tmp_path)
    found, _ = sampling.resample_run(
        folder(tmp_path, "s"), files["about"], files["masks"], files["motion"], files["coreg"], identity, brain, EmbeddedSettings(), 1
    )
    image = nib.load(found["bold"])
    assert image.get_data_dtype() == stored
    middle = ndimage.binary_erosion(labels == 3, iterations=3)
    assert np.asarray(image.dataobj)[middle].mean() == pytest.approx(800 * scale, rel=0.02)  # nothing is cut off


def test_a_cut_field_of_view_is_refused(tmp_path: Path, generator: np.random.Generator) -> None:
    files = chain(tmp_path, seen_by_scanner(drift(6, generator)), generator)
    high = str(write_text(tmp_path / "high.txt", itk_text(rigid(np.array([0.0, 0, 90, 0, 0, 0]), np.zeros(3)))))
    identity = str(write_text(tmp_path / "identity.txt", itk_text(np.eye(4))))
    brain, _ = template_brain(tmp_path)
    with pytest.raises(InputDatasetError, match="inside the BOLD field of view"):
        sampling.resample_run(
            folder(tmp_path, "s"), files["about"], files["masks"], files["motion"], high, identity, brain, EmbeddedSettings(), 1
        )


def test_masks_of_the_run_are_the_structures(tmp_path: Path, generator: np.random.Generator) -> None:
    files = chain(tmp_path, seen_by_scanner(np.broadcast_to(np.eye(4), (4, 4, 4))), generator)
    codes = np.asarray(nib.load(files["masks"]).dataobj).astype(np.uint8)
    labels = tissues(BOLD_SHAPE, BOLD_AFFINE)
    truth = np.asarray(ndimage.binary_fill_holes((labels > 0) & (labels < 4)))
    brain = (codes & 1) > 0
    assert 2 * (brain & truth).sum() / (brain.sum() + truth.sum()) > 0.97
    assert set(np.unique(labels[(codes & 4) > 0])) == {3}
    assert (labels[(codes & 2) > 0] == 1).mean() > 0.9
    assert not ((codes & 2) & ((codes & 4) >> 1)).any()
    assert SHAPE != BOLD_SHAPE
