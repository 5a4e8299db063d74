"""Transforms against what fMRIPrep wrote, and round trips between dialects."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.signals import transforms
from brainfm_cli.signals.confounds import framewise_displacement

RUN = "sub-01_task-mixedgamblestask_run-01"
PARAMETERS = ["trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z"]
SHAPE = (20, 24, 18)


def affine(axes: str) -> np.ndarray:
    """An oblique affine of anisotropic voxels whose axes point as named."""
    matrix = np.diag([3.0, 3.5, 4.0, 1.0])
    matrix[:3, :3] = transforms.rigid(np.array([0, 0, 0, 0.2, -0.1, 0.15]), np.zeros(3))[:3, :3] @ matrix[:3, :3]
    matrix[:3, 3] = [-30, -40, -20]
    flips = np.diag([-1.0 if axis in "LPI" else 1.0 for axis in axes] + [1.0])
    return matrix @ flips


def draw(generator: np.random.Generator, frames: int = 12) -> np.ndarray:
    return transforms.rigid(generator.normal(0, [2, 2, 2, 0.05, 0.05, 0.05], (frames, 6)), generator.normal(0, 20, 3))


@pytest.fixture
def reference(test_data):
    folder = test_data / "fmriprep_reference"
    image = nib.load(folder / f"{RUN}_desc-hmc_boldref.nii.gz")
    table = pd.read_csv(folder / f"{RUN}_desc-motion_timeseries.tsv", sep="\t", na_values="n/a")
    matrices = transforms.read_itk(folder / f"{RUN}_from-orig_to-boldref_mode-image_desc-hmc_xfm.txt")
    centre = transforms.centre_of_mass_mm(np.asarray(image.dataobj), image.header.get_zooms())
    return image, table, matrices, centre


def test_fmriprep_transforms_give_its_motion_table(reference):
    """As far as the digits that were shipped say it: rotations are rounded to 1e-6, and the axes are up to 97 mm from the centre."""
    image, table, matrices, centre = reference
    ours = transforms.motion_table(matrices, image.shape, image.affine, centre)
    theirs = table[PARAMETERS].to_numpy()
    half_digit = 5e-7
    np.testing.assert_allclose(ours[:, 3:], theirs[:, 3:], atol=1.01 * half_digit)
    assert (np.abs(ours[:, :3] - theirs[:, :3]) < half_digit * (1 + np.abs(centre).sum())).all()
    displaced = framewise_displacement(ours)[1:] - table["framewise_displacement"][1:]
    assert np.abs(displaced).max() < 2 * half_digit * (3 * (1 + np.abs(centre).sum()) + 3 * 50)
    np.testing.assert_allclose(transforms.rms_deviation(matrices, image.shape, image.affine)[1:], table["rmsd"][1:], atol=7e-5)


def test_fmriprep_motion_table_gives_its_transforms_digit_by_digit(reference):
    """Rounded as MCFLIRT rounds its matrices, what the table says is what was shipped: within 1e-5, and 1.5e-5 mm."""
    image, table, shipped, centre = reference
    fsl = transforms.to_fsl(transforms.from_motion_table(table[PARAMETERS].to_numpy(), image.shape, image.affine, centre), image.shape, image.affine)  # fmt: skip
    written = transforms.from_fsl(fsl.round(6), image.shape, image.affine)
    beside = ~np.eye(3, dtype=bool)
    np.testing.assert_allclose(written[:, :3, :3][:, beside], shipped[:, :3, :3][:, beside], atol=1e-9)
    np.testing.assert_allclose(written[:, :3, :3], shipped[:, :3, :3], atol=5e-7)  # of 0.9999998 six digits were shipped
    apart = np.abs(written[:, :3, 3] - shipped[:, :3, 3])
    assert apart.max() < 1.5e-5  # single precision of numbers near 100; the transposed rotation would be off by 2.1e-5
    assert np.median(apart) < 2e-6


def test_fmriprep_motion_table_gives_its_fd_and_rmsd(reference):
    """Without the rounding of the shipped transforms the definitions agree to 1e-5 and better."""
    image, table, _, centre = reference
    matrices = transforms.from_motion_table(table[PARAMETERS].to_numpy(), image.shape, image.affine, centre)
    again = transforms.motion_table(matrices, image.shape, image.affine, centre)
    np.testing.assert_allclose(again, table[PARAMETERS].to_numpy(), atol=1e-9)
    np.testing.assert_allclose(framewise_displacement(again)[1:], table["framewise_displacement"][1:], atol=1e-8)
    # The transposed rotation would be off by 1.9e-6.
    np.testing.assert_allclose(transforms.rms_deviation(matrices, image.shape, image.affine)[1:], table["rmsd"][1:], atol=1e-6)


def test_the_motion_table_has_mcflirts_rotation_order(generator):
    """Angles large enough that products of two of them show; the convention is that of FSL's miscmaths (Rx Ry Rz, sines negated)."""
    from scipy.spatial.transform import Rotation

    angles, centre, grid = generator.normal(0, 0.3, (10, 3)), np.array([31.0, 40.0, 33.0]), affine("LAS")
    fsl = np.repeat(np.eye(4)[None], 10, 0)
    fsl[:, :3, :3] = Rotation.from_euler("XYZ", -angles).as_matrix()
    found = transforms.motion_table(transforms.from_fsl(fsl, SHAPE, grid), SHAPE, grid, centre)
    np.testing.assert_allclose(found[:, 3:], angles, atol=1e-9)
    np.testing.assert_allclose(found[:, :3], fsl[:, :3, :3] @ centre - centre, atol=1e-9)


@pytest.mark.parametrize("axes", ["RAS", "LAS", "LPI", "RPI"])
def test_motion_table_round_trip(axes, generator):
    matrices, centre = draw(generator), np.array([31.0, 40.0, 33.0])
    table = transforms.motion_table(matrices, SHAPE, affine(axes), centre)
    np.testing.assert_allclose(transforms.from_motion_table(table, SHAPE, affine(axes), centre), matrices, atol=1e-9)


def test_rigid_round_trip(generator):
    parameters, centre = generator.normal(0, [3, 3, 3, 0.3, 0.3, 0.3], (20, 6)), np.array([5.0, -7.0, 11.0])
    matrices = transforms.rigid(parameters, centre)
    np.testing.assert_allclose(transforms.rigid_parameters(matrices, centre), parameters, atol=1e-12)
    np.testing.assert_allclose(np.linalg.det(matrices[:, :3, :3]), 1, atol=1e-12)
    moved = matrices[0, :3, :3] @ centre + matrices[0, :3, 3]
    np.testing.assert_allclose(moved, centre + parameters[0, :3], atol=1e-12)


def test_rotation_order_is_that_of_scipy(generator):
    from scipy.spatial.transform import Rotation

    angles = generator.normal(0, 0.4, (10, 3))
    parameters = np.concatenate([np.zeros((10, 3)), angles], 1)
    expected = Rotation.from_euler("XYZ", angles).as_matrix()
    np.testing.assert_allclose(transforms.rigid(parameters, np.zeros(3))[:, :3, :3], expected, atol=1e-12)


def test_itk_text_round_trip_keeps_every_digit(tmp_path, generator):
    matrices = draw(generator)
    path = tmp_path / "xfm.txt"
    path.write_text(transforms.itk_text(matrices))
    np.testing.assert_array_equal(transforms.read_itk(path), matrices)


def test_rms_deviation_of_a_known_step():
    """A translation moves every point alike; a small rotation by sqrt(2/5) of angle times radius."""
    matrices = np.stack([np.eye(4)] * 3)
    matrices[1, :3, 3] = [0.3, 0.0, 0.4]
    turn, grid = 0.001, affine("RAS")
    centre = grid[:3, :3] @ (0.5 * (np.array(SHAPE) - 1)) + grid[:3, 3]
    matrices[2] = transforms.rigid(np.array([0, 0, 0, turn, 0, 0]), centre) @ matrices[1]
    steps = transforms.rms_deviation(matrices, SHAPE, grid)
    assert np.isnan(steps[0])
    np.testing.assert_allclose(steps[1:], [0.5, turn * 80 * np.sqrt(2 / 5)], rtol=1e-4)


def test_a_file_of_another_kind_is_refused(tmp_path):
    path = tmp_path / "xfm.txt"
    path.write_text("1 0 0 0\n0 1 0 0\n")
    with pytest.raises(InputDatasetError, match="no ITK transform text"):
        transforms.read_itk(path)
    path.write_text(
        "#Insight Transform File V1.0\n#Transform 0\nTransform: Euler3DTransform_double_3_3\nParameters: 0 0 0 0 0 0\nFixedParameters: 0 0 0\n"
    )
    with pytest.raises(InputDatasetError, match="not an affine"):
        transforms.read_itk(path)
