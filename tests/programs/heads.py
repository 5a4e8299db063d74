"""Small heads of known geometry: tissues, skull, bias, on any grid."""

from __future__ import annotations

import numpy as np
from scipy import ndimage

AFFINE = np.array([[3.0, 0, 0, -72], [0, 3.0, 0, -90], [0, 0, 3.0, -72], [0, 0, 0, 1]])
SHAPE = (48, 60, 48)


def ellipsoid(
    shape: tuple[int, ...], affine: np.ndarray, centre: tuple[float, float, float], radii: tuple[float, float, float]
) -> np.ndarray:
    """Squared distance in units of the radii: below 1 is inside."""
    points = np.stack(np.meshgrid(*[np.arange(size) for size in shape], indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]
    return (((points - centre) / radii) ** 2).sum(-1)


def tissues(shape: tuple[int, ...] = SHAPE, affine: np.ndarray = AFFINE) -> np.ndarray:
    """CSF 1, grey matter 2, white matter 3, scalp 4, background 0; not symmetric, so that a wrong turn shows."""
    labels = np.zeros(shape, np.uint8)
    labels[ellipsoid(shape, affine, (0, 0, 0), (68, 84, 68)) < 1] = 4
    labels[ellipsoid(shape, affine, (0, 0, 2), (62, 78, 60)) < 1] = 0  # skull is dark
    labels[ellipsoid(shape, affine, (0, 0, 4), (57, 73, 53)) < 1] = 1
    labels[ellipsoid(shape, affine, (0, 0, 4), (54, 70, 50)) < 1] = 2
    for side in (-1, 1):
        labels[ellipsoid(shape, affine, (24 * side, 5, 10), (22, 52, 30)) < 1] = 3
        labels[ellipsoid(shape, affine, (8 * side, 0, 10), (5, 26, 9)) < 1] = 1
    labels[ellipsoid(shape, affine, (30, 40, 12), (9, 9, 9)) < 1] = 2
    labels[ellipsoid(shape, affine, (-20, -50, -15), (16, 12, 10)) < 1] = 3
    return labels


def t1w(labels: np.ndarray, generator: np.random.Generator, *, noise: float = 15.0) -> np.ndarray:
    """T1 contrast with soft borders."""
    clean = np.array([0, 250, 650, 1000, 800], np.float32)[labels]
    return (ndimage.gaussian_filter(clean, 0.6) + generator.normal(0, noise, labels.shape)).clip(0).astype(np.float32)


def smooth_field(shape: tuple[int, ...]) -> np.ndarray:
    """A bias field from about a half to two."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    return np.exp(0.5 * x - 0.4 * y**2 + 0.3 * z * x).astype(np.float32)
