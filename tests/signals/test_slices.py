"""Volumes become slices and come back: no stretching, no change of side, whatever the orientation on disk."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm_cli.bids.scans import LesionMask
from brainfm_cli.bids.slice_cohort import PLANES
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.signals.slices import (
    acquired_plane,
    artefact_scores,
    find_head,
    grid_of,
    otsu,
    outliers,
    read_labels,
    read_volume,
    to_uint8,
)

VOXEL_MM = (2.0, 2.5, 4.0)
SHAPE = (40, 48, 20)


def head(shape: tuple[int, int, int] = SHAPE) -> tuple[np.ndarray, np.ndarray]:
    """A bright ellipsoid with a brighter ball in its left (low x) half, and the ball."""
    grid = np.indices(shape).astype(float)
    middle = (np.array(shape) - 1) / 2
    inside = sum(((grid[axis] - middle[axis]) / (0.4 * shape[axis])) ** 2 for axis in range(3)) < 1
    place = middle * np.array([0.6, 1.1, 1.0])
    distance = sum(((grid[axis] - place[axis]) * VOXEL_MM[axis]) ** 2 for axis in range(3))
    ball = distance < 9**2
    return (inside * 100.0 + ball * 80.0).astype(np.float32), ball


def affine(*, flipped: bool) -> np.ndarray:
    matrix = np.diag([*VOXEL_MM, 1.0])
    matrix[:3, 3] = -np.array(VOXEL_MM) * (np.array(SHAPE) - 1) / 2
    return matrix @ np.array([[-1, 0, 0, SHAPE[0] - 1], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]) if flipped else matrix


def save(path: Path, data: np.ndarray, *, flipped: bool = False, matrix: np.ndarray | None = None) -> Path:
    """The same picture of the world, stored from left to right or from right to left."""
    given = affine(flipped=flipped) if matrix is None else matrix
    nib.save(nib.Nifti1Image(data[::-1] if flipped else data, given), path)
    return path


def side_mm(path: Path) -> float:
    """Mean x in millimetres of what is not zero: negative is left."""
    image = nib.load(path)
    voxels = np.argwhere(np.asarray(image.dataobj) > 0)
    return float((np.c_[voxels, np.ones(len(voxels))] @ image.affine.T)[:, 0].mean())


@pytest.mark.parametrize("flipped", [False, True])
@pytest.mark.parametrize("plane", PLANES)
def test_a_left_lesion_stays_left(tmp_path: Path, plane: str, flipped: bool) -> None:
    data, ball = head()
    volume = read_volume(save(tmp_path / "t.nii.gz", data, flipped=flipped))
    mask = LesionMask(path=save(tmp_path / "m.nii.gz", ball.astype(np.uint8), flipped=flipped), labels={1: "lesion"})
    labels, notes = read_labels(mask, volume)
    assert notes == ()
    grid = grid_of(volume, size=64, plane=plane)
    slices = grid.cut(labels, nearest=True)
    if plane != "sagittal":  # the first in-plane axis runs to the right
        columns = np.argwhere(slices)[:, 1]
        assert columns.mean() < 31.5
    back = volume.to_native(grid.restore(slices, nearest=True))
    out = tmp_path / "back.nii.gz"
    nib.save(nib.Nifti1Image(back, volume.native_affine), out)
    assert side_mm(out) < -5
    stored = np.asarray(nib.load(mask.path).dataobj) > 0
    dice = 2 * (stored & (back > 0)).sum() / (stored.sum() + (back > 0).sum())
    assert dice > 0.9
    assert back.shape == stored.shape


def test_both_orientations_give_the_same_slices(tmp_path: Path) -> None:
    data, _ = head()
    first, second = (read_volume(save(tmp_path / f"{flipped}.nii.gz", data, flipped=flipped)) for flipped in (False, True))
    assert np.array_equal(first.data, second.data)
    assert np.allclose(first.affine, second.affine)


def test_an_oblique_volume_comes_back_to_its_voxels(tmp_path: Path) -> None:
    data, ball = head()
    angle = np.deg2rad(20)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    permuted = np.transpose(data, (2, 0, 1))[:, ::-1]
    matrix = turn @ affine(flipped=False) @ np.array([[0, -1, 0, SHAPE[0] - 1], [0, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 1.0]])
    volume = read_volume(save(tmp_path / "t.nii.gz", permuted, matrix=matrix))
    assert np.allclose(volume.data, data)
    assert np.array_equal(volume.to_native(volume.data), permuted)
    assert np.array_equal(volume.to_native(ball), np.transpose(ball, (2, 0, 1))[:, ::-1])


def test_pixels_are_square_and_the_aspect_is_kept(tmp_path: Path) -> None:
    data = np.zeros(SHAPE, np.float32)
    data[10:30, 16:32, 5:15] = 1.0  # 40 mm × 40 mm × 40 mm
    volume = read_volume(save(tmp_path / "t.nii.gz", data))
    for plane in PLANES:
        grid = grid_of(volume, size=60, plane=plane)
        sums = (grid.cut(data) > 0.5).max(0)
        extent = [np.ptp(np.flatnonzero(sums.any(axis))) + 1 for axis in (0, 1)]
        assert extent[0] * grid.pixel_mm == pytest.approx(40, abs=2.5)
        assert extent[1] * grid.pixel_mm == pytest.approx(40, abs=2.5)


def test_a_fine_grid_gives_every_voxel_back_exactly(tmp_path: Path, generator: np.random.Generator) -> None:
    data = generator.random((16, 16, 4)).astype(np.float32)
    nib.save(nib.Nifti1Image(data, np.diag([1.0, 1, 1, 1])), tmp_path / "t.nii.gz")
    volume = read_volume(tmp_path / "t.nii.gz")
    grid = grid_of(volume, size=16, plane="axial")
    assert np.allclose(grid.restore(grid.cut(data)), data, atol=1e-6)
    cube = grid_of(volume, size=16, dims=3)
    assert cube.cut(data).shape == (1, 16, 16, 16)
    assert np.allclose(cube.restore(cube.cut(data, nearest=True), nearest=True), data)


def test_area_means_keep_the_mean(generator: np.random.Generator, tmp_path: Path) -> None:
    data = generator.random((64, 64, 3)).astype(np.float32)
    nib.save(nib.Nifti1Image(data, np.eye(4)), tmp_path / "t.nii.gz")
    slices = grid_of(read_volume(tmp_path / "t.nii.gz"), size=16, plane="axial").cut(data)
    expected = data.reshape(16, 4, 16, 4, 3).mean((1, 3))
    assert np.allclose(np.moveaxis(slices, 0, -1), expected, atol=1e-5)


def test_thick_slices_are_taken_as_acquired(tmp_path: Path) -> None:
    data, _ = head()
    for thick, plane in ((0, "sagittal"), (1, "coronal"), (2, "axial")):
        matrix = np.eye(4)
        matrix[thick, thick] = 5.0
        assert acquired_plane(read_volume(save(tmp_path / f"{thick}.nii", data, matrix=matrix))) == plane
    assert acquired_plane(read_volume(save(tmp_path / "iso.nii", data, matrix=np.eye(4)))) == "axial"


def test_intensities_are_one_to_255_in_the_head_and_zero_outside(generator: np.random.Generator) -> None:
    data, _ = head()
    noisy = data + np.abs(generator.normal(0, 3, data.shape)).astype(np.float32)
    found = find_head(noisy)
    overlap = 2 * (found & (data > 0)).sum() / (found.sum() + (data > 0).sum())
    assert overlap > 0.95
    scaled = to_uint8(noisy, found)
    assert (scaled[~found] == 0).all()
    assert (scaled[found].min(), scaled[found].max()) == (1, 255)
    assert np.array_equal(find_head(data), data > 0)  # skull-stripped: zero is outside


def test_otsu_separates_two_classes(generator: np.random.Generator) -> None:
    assert 2 < otsu(np.r_[generator.normal(0, 1, 4000), generator.normal(10, 1, 1000)]) < 8


def test_artefacts_stand_out_of_their_group(generator: np.random.Generator) -> None:
    data, _ = head((40, 48, 40))
    data = data + np.abs(generator.normal(0, 1, data.shape)).astype(np.float32)
    volume_mask = find_head(data)
    ghost = data.copy()
    ghost[:, :, 20] += 0.4 * np.roll(data[:, :, 20], 24, axis=1)
    ghost[:, :, 10] += np.abs(generator.normal(0, 40, ghost.shape[:2])).astype(np.float32)
    from brainfm_cli.signals.slices import SliceGrid

    grid = SliceGrid(shape=(40, 48, 40), voxel_mm=(1, 1, 1), plane="axial", size=48, dims=2)
    scores = artefact_scores(ghost, volume_mask, grid)
    flagged = {name: set(np.flatnonzero(outliers(values, ["a"] * 40, limit=6))) for name, values in scores.items()}
    assert 20 in flagged["ghosting"]
    assert 10 in flagged["noise"]
    clean = artefact_scores(data, volume_mask, grid)
    assert not outliers(clean["ghosting"], ["a"] * 40, limit=6)[20]
    assert not outliers(np.arange(10.0), ["a"] * 10, limit=0.1).any()  # too few to say


def test_a_mask_on_another_grid_is_resampled_and_said(tmp_path: Path) -> None:
    data, ball = head()
    volume = read_volume(save(tmp_path / "t.nii.gz", data))
    coarse = ball[::2, ::2]
    matrix = affine(flipped=False) @ np.diag([2, 2, 1, 1.0])
    mask = LesionMask(path=save(tmp_path / "m.nii.gz", coarse.astype(np.uint8), matrix=matrix), labels={1: "lesion"})
    labels, notes = read_labels(mask, volume)
    assert "another grid" in notes[0]
    dice = 2 * ((labels > 0) & ball).sum() / ((labels > 0).sum() + ball.sum())
    assert dice > 0.7


def test_bad_masks_are_named(tmp_path: Path) -> None:
    data, ball = head()
    volume = read_volume(save(tmp_path / "t.nii.gz", data))

    def mask(name: str, values: np.ndarray, matrix: np.ndarray | None = None) -> LesionMask:
        return LesionMask(path=save(tmp_path / name, values, matrix=matrix), labels={1: "lesion"}, others=frozenset({3}))

    labels, notes = read_labels(mask("empty.nii", np.zeros(SHAPE, np.uint8)), volume)
    assert not labels.any()
    assert "empty" in notes[0]
    with pytest.raises(InputDatasetError, match="unknown label values 2"):
        read_labels(mask("two.nii", ball.astype(np.uint8) * 2), volume)
    known, _ = read_labels(mask("three.nii", ball.astype(np.uint8) * 3), volume)  # described, but no lesion
    assert not known.any()
    with pytest.raises(InputDatasetError, match="fractions"):
        read_labels(mask("half.nii", ball * np.float32(0.5)), volume)
    far = affine(flipped=False)
    far[:3, 3] += 500
    with pytest.raises(InputDatasetError, match="outside the image"):
        read_labels(mask("far.nii", ball.astype(np.uint8), far), volume)


def test_bad_images_are_named(tmp_path: Path) -> None:
    colours = np.zeros((8, 8, 8), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")]))
    cases = {
        "single slice": np.ones((8, 8, 1), np.float32),
        "one volume": np.ones((8, 8, 8, 4), np.float32),
        "same value": np.ones((8, 8, 8), np.float32),
        "colours": colours,
    }
    for number, (message, values) in enumerate(cases.items()):
        path = tmp_path / f"{number}.nii.gz"
        nib.save(nib.Nifti1Image(values, np.eye(4)), path)
        with pytest.raises(InputDatasetError, match=message):
            read_volume(path)
    (tmp_path / "text.nii").write_text("no image")
    with pytest.raises(InputDatasetError, match="cannot be read"):
        read_volume(tmp_path / "text.nii")
    whole = (tmp_path / "0.nii.gz").read_bytes()
    data, _ = head()
    whole = save(tmp_path / "whole.nii.gz", data).read_bytes()
    (tmp_path / "cut.nii.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputDatasetError, match="cannot be read"):
        read_volume(tmp_path / "cut.nii.gz")


def test_a_diffusion_series_becomes_its_weighted_mean(tmp_path: Path, generator: np.random.Generator) -> None:
    series = generator.random((8, 8, 8, 4)).astype(np.float32)
    nib.save(nib.Nifti1Image(series, np.eye(4)), tmp_path / "d.nii.gz")
    (tmp_path / "d.bval").write_text("0 1000 1000 5\n")
    volume = read_volume(tmp_path / "d.nii.gz", gradients=tmp_path / "d.bval")
    assert np.allclose(volume.data, series[..., 1:3].mean(-1))
    assert "2 diffusion-weighted" in volume.notes[0]
    (tmp_path / "d.bval").write_text("0 0 0 5\n")
    with pytest.raises(InputDatasetError, match="b-values"):
        read_volume(tmp_path / "d.nii.gz", gradients=tmp_path / "d.bval")


def test_real_masks_come_back_to_their_grid(test_data: Path) -> None:
    from brainfm_cli.bids.scans import read_studies
    from brainfm_cli.config import Selection

    study = read_studies(test_data / "bids_stroke", "strokecase0009", Selection())[0]
    scan = next(one for one in study.scans if one.sequence == "dwi")
    volume = read_volume(scan.path)
    labels, notes = read_labels(study.masks[0], volume)
    assert notes == ()
    grid = grid_of(volume, size=256)
    back = volume.to_native(grid.restore(grid.cut(labels, nearest=True), nearest=True))
    assert np.array_equal(back > 0, np.asarray(nib.load(study.masks[0].path).dataobj) > 0)  # 256 pixels are finer than 112 voxels
    flair = read_volume(next(one for one in study.scans if one.sequence == "FLAIR").path)
    moved, notes = read_labels(study.masks[0], flair)
    assert "another grid" in notes[0]
    volume_ml = [float((values > 0).sum() * np.prod(of.voxel_mm) / 1000) for values, of in ((labels, volume), (moved, flair))]
    assert volume_ml[1] == pytest.approx(volume_ml[0], rel=0.15)
