"""Realignment recovers planted motion: on smooth images, through noise, jumps, brightness changes and odd grids."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.signals import realignment, transforms

SHAPE = (44, 50, 30)


def head(generator: np.random.Generator) -> np.ndarray:
    """An ellipsoid with smooth structure inside, on (x, y, z) voxels of 4, 4 and 5 mm."""
    grid = (np.indices(SHAPE).astype(float) - (np.array(SHAPE)[:, None, None, None] - 1) / 2) / np.array([17, 20, 12])[:, None, None, None]
    inside = ndimage.gaussian_filter(((grid**2).sum(0) < 1).astype(float), 0.7)
    texture = ndimage.gaussian_filter(generator.standard_normal(SHAPE), 1.6)
    return (1000 * inside * (1 + 0.3 * texture / texture.std())).astype(np.float32)


def grid_affine(axes: str) -> np.ndarray:
    matrix = np.diag([4.0, 4.0, 5.0, 1.0])
    matrix[:3, :3] = transforms.rigid(np.array([0, 0, 0, 0.3, -0.1, 0.1]), np.zeros(3))[:3, :3] @ matrix[:3, :3]
    matrix[:3, 3] = [-80, -90, -60]
    return matrix @ np.diag([-1.0 if axis in "LPI" else 1.0 for axis in axes] + [1.0])


def grid_centre(affine: np.ndarray) -> np.ndarray:
    return affine[:3, :3] @ (0.5 * (np.array(SHAPE) - 1)) + affine[:3, 3]


def scan(image: np.ndarray, affine: np.ndarray, matrices: np.ndarray, noise: float, generator: np.random.Generator) -> np.ndarray:
    """(frames, x, y, z): the head moved so that reference point p is at ``matrix @ p``; sampled by quintic splines."""
    coefficients = ndimage.spline_filter(image.astype(float), 5)
    frames = []
    for matrix in matrices:
        back = np.linalg.inv(affine) @ np.linalg.inv(matrix) @ affine
        moved = ndimage.affine_transform(coefficients, back[:3, :3], back[:3, 3], order=5, prefilter=False, mode="nearest")
        frames.append(moved + noise * generator.standard_normal(SHAPE))
    return np.stack(frames).astype(np.float32)


@pytest.mark.parametrize("axes", ["RAS", "LAS", "LPI", "RPI"])
def test_a_random_walk_is_recovered(axes, generator):
    affine = grid_affine(axes)
    walk = np.cumsum(generator.normal(0, [0.1, 0.1, 0.2, 0.003, 0.002, 0.002], (24, 6)), 0)
    truth = transforms.rigid(walk, grid_centre(affine))
    image = head(generator)
    frames = scan(image, affine, truth, 20.0, generator)
    found = realignment.realign(frames.__getitem__, range(24), realignment.build_target(image, affine))
    recovered = transforms.rigid_parameters(found, grid_centre(affine))
    for column in range(6):
        assert np.corrcoef(recovered[:, column], walk[:, column])[0, 1] > 0.98
    np.testing.assert_allclose(recovered[:, :3], walk[:, :3], atol=0.06)
    np.testing.assert_allclose(recovered[:, 3:], walk[:, 3:], atol=1.5e-3)


def test_a_jump_of_a_centimetre_and_eight_degrees(generator):
    affine = grid_affine("LAS")
    jump = np.array([[0, 0, 0, 0, 0, 0], [10, -8, 6, 0.14, -0.1, 0.12]])
    truth = transforms.rigid(jump, grid_centre(affine))
    image = head(generator)
    frames = scan(image, affine, truth, 10.0, generator)
    found = realignment.realign(frames.__getitem__, [0, 1], realignment.build_target(image, affine))
    np.testing.assert_allclose(transforms.rigid_parameters(found, grid_centre(affine)), jump, atol=0.12)


def test_brighter_frames_do_not_look_like_motion(generator):
    affine, image = grid_affine("RAS"), head(generator)
    bright = np.stack([image * 1.4 + 30, image]).astype(np.float32)
    found = realignment.realign(bright.__getitem__, [0, 1], realignment.build_target(image, affine))
    np.testing.assert_allclose(found, np.stack([np.eye(4)] * 2), atol=1e-3)


def test_threads_do_not_change_a_bit(generator):
    affine, image = grid_affine("RAS"), head(generator)
    truth = transforms.rigid(generator.normal(0, [0.3] * 3 + [0.005] * 3, (40, 6)), grid_centre(affine))
    frames, target = scan(image, affine, truth, 10.0, generator), realignment.build_target(image, affine)
    one, three = (realignment.realign(frames.__getitem__, range(40), target, threads=count) for count in (1, 3))
    np.testing.assert_array_equal(one, three)


def test_reference_is_sharper_than_the_plain_mean(generator):
    """Frames moved by 3 mm: the aligned average correlates with the middle frame's head better than the plain mean."""
    affine, image = grid_affine("RAS"), head(generator)
    parameters = generator.normal(0, [3, 3, 3, 0.03, 0.03, 0.03], (16, 6))
    parameters[8] = 0
    frames = scan(image, affine, transforms.rigid(parameters, grid_centre(affine)), 30.0, generator)
    reference = realignment.average_reference(frames.__getitem__, range(16), affine)
    inner = (slice(4, -4),) * 3
    ours, plain = (np.corrcoef(one[inner].ravel(), image[inner].ravel())[0, 1] for one in (reference, frames.mean(0)))
    assert ours > 0.995
    assert ours > plain


def test_moving_undoes_the_motion(generator):
    affine, image = grid_affine("LPI"), head(generator)
    truth = transforms.rigid(np.array([[1.5, -2.0, 1.0, 0.02, 0.03, -0.02]]), grid_centre(affine))
    frame = scan(image, affine, truth, 0.0, generator)[0]
    inner = (slice(5, -5),) * 3
    undone = np.abs(realignment.move(frame, affine, truth[0]) - image)[inner]
    untouched = np.abs(frame - image)[inner]
    assert np.percentile(undone, 95) < 0.05 * np.percentile(untouched, 95)


def test_an_empty_series_is_a_named_error():
    with pytest.raises(InputDatasetError, match="foreground voxels"):
        realignment.build_target(np.zeros(SHAPE, np.float32), np.eye(4))
