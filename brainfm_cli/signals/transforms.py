"""Rigid and affine transforms in their three dialects: RAS matrices, ITK text, FSL's scaled voxels. Nothing is written.

A transform here maps points of the reference to points of the moving image, in RAS millimetres, as ITK means it: to
resample the moving image on the reference's grid, look up the mapped points.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from brainfm_cli.errors import InputDatasetError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]

_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # ITK counts left and posterior positive
_TRANSFORM = re.compile(r"^Transform: (?P<kind>\S+)\nParameters: (?P<parameters>.*)\nFixedParameters: (?P<fixed>.*)$", re.MULTILINE)
_HEADER = "#Insight Transform File V1.0"


def rigid(parameters: NDArray[np.float64], centre: NDArray[np.float64]) -> Matrix:
    """(..., 4, 4) matrices that rotate about ``centre`` and then translate.

    Parameters
    ----------
    parameters
        (..., 6) three translations in millimetres and three rotations in radians; the rotation is
        ``Rx(rx) @ Ry(ry) @ Rz(rz)``.
    centre
        (3,) in millimetres.
    """
    matrix = np.zeros((*parameters.shape[:-1], 4, 4))
    rotation = _rotation(parameters[..., 3:])
    matrix[..., :3, :3] = rotation
    matrix[..., :3, 3] = parameters[..., :3] + centre - rotation @ centre
    matrix[..., 3, 3] = 1
    return matrix


def rigid_parameters(matrix: Matrix, centre: NDArray[np.float64]) -> NDArray[np.float64]:
    """(..., 6) translations and rotations of rigid matrices about ``centre``; the inverse of :func:`rigid`."""
    rotation = matrix[..., :3, :3]
    angles = np.stack(
        [
            np.arctan2(-rotation[..., 1, 2], rotation[..., 2, 2]),
            np.arcsin(np.clip(rotation[..., 0, 2], -1, 1)),
            np.arctan2(-rotation[..., 0, 1], rotation[..., 0, 0]),
        ],
        -1,
    )
    return np.concatenate([matrix[..., :3, 3] + rotation @ centre - centre, angles], -1)


def to_fsl(matrices: Matrix, shape: Sequence[int], affine: Matrix) -> Matrix:
    """(frames, 4, 4) FSL matrices, moving to reference, of (frames, 4, 4) RAS transforms between images of one grid.

    FSL measures in millimetres from the corner voxel and, where the grid is right-handed, from the other end of x.
    """
    scale = _fsl_scale(shape, affine) @ np.linalg.inv(affine)
    return np.asarray(np.linalg.inv(scale @ matrices @ np.linalg.inv(scale)), np.float64)


def from_fsl(matrices: Matrix, shape: Sequence[int], affine: Matrix) -> Matrix:
    """(frames, 4, 4) RAS transforms of FSL matrices; the inverse of :func:`to_fsl`."""
    scale = _fsl_scale(shape, affine) @ np.linalg.inv(affine)
    return np.linalg.inv(scale) @ np.linalg.inv(matrices) @ scale


def motion_table(matrices: Matrix, shape: Sequence[int], affine: Matrix, centre_mm: NDArray[np.float64]) -> NDArray[np.float64]:
    """(frames, 6) fMRIPrep's ``trans_x … rot_z`` of head-motion transforms: MCFLIRT's parameters.

    Parameters
    ----------
    centre_mm
        (3,) rotation centre in FSL's millimetres: the reference's centre of mass times its voxel size.

    Notes
    -----
    MCFLIRT's rotation is ``Rx Ry Rz`` of its angles' negatives, and its translation is the displacement of the centre. The
    transpose of ``Rx Ry Rz`` is another rotation: it differs by products of two angles.
    """
    fsl = to_fsl(matrices, shape, affine)
    rotation = fsl[:, :3, :3]
    translation = fsl[:, :3, 3] + rotation @ centre_mm - centre_mm
    return np.concatenate([translation, -rigid_parameters(fsl, np.zeros(3))[:, 3:]], 1)


def from_motion_table(table: NDArray[np.float64], shape: Sequence[int], affine: Matrix, centre_mm: NDArray[np.float64]) -> Matrix:
    """(frames, 4, 4) RAS transforms of a motion table; the inverse of :func:`motion_table`."""
    fsl = np.zeros((len(table), 4, 4))
    rotation = _rotation(-table[:, 3:])
    fsl[:, :3, :3] = rotation
    fsl[:, :3, 3] = table[:, :3] - rotation @ centre_mm + centre_mm
    fsl[:, 3, 3] = 1
    return from_fsl(fsl, shape, affine)


def centre_of_mass_mm(image: NDArray[np.floating], zooms: Sequence[float]) -> NDArray[np.float64]:
    """(3,) FSL's centre of gravity: centre of mass in voxels times the voxel size."""
    from scipy.ndimage import center_of_mass

    return np.asarray(center_of_mass(image)) * np.asarray(zooms, np.float64)


def rms_deviation(matrices: Matrix, shape: Sequence[int], affine: Matrix, *, radius_mm: float = 80.0) -> NDArray[np.float64]:
    """(frames,) root-mean-square displacement between successive frames in a sphere, millimetres; NaN for the first.

    Source: Jenkinson 1999, FMRIB TR99MJ1, about the centre of the grid.
    """
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    centre = 0.5 * (np.asarray(shape[:3]) - 1) * zooms
    fsl = to_fsl(matrices, shape, affine)
    change = fsl[1:] @ np.linalg.inv(fsl[:-1]) - np.eye(4)
    turn = change[:, :3, :3]
    shift = change[:, :3, 3] + turn @ centre
    squared = (shift**2).sum(1) + (turn**2).sum((1, 2)) * radius_mm**2 / 5
    return np.r_[np.nan, np.sqrt(squared)]


def read_itk(path: Path) -> Matrix:
    """(transforms, 4, 4) RAS matrices of an ITK text file of affine transforms.

    Raises
    ------
    InputDatasetError
        The file is no ITK transform text, or holds something else than affine transforms.
    """
    text = path.read_text(encoding="utf-8", errors="replace")
    found = list(_TRANSFORM.finditer(text))
    if not text.startswith(_HEADER) or not found:
        raise InputDatasetError("the file is no ITK transform text", where=path, fix="give a transform as fMRIPrep writes it")
    matrices = np.zeros((len(found), 4, 4))
    for matrix, match in zip(matrices, found, strict=True):
        values, centre = _numbers(match["parameters"]), _numbers(match["fixed"])
        if len(values) != 12 or len(centre) != 3:
            raise InputDatasetError(
                f"the file holds a {match['kind']}, not an affine transform", where=path, fix="give an affine transform"
            )
        matrix[:3, :3] = values[:9].reshape(3, 3)
        matrix[:3, 3] = values[9:] + centre - matrix[:3, :3] @ centre
        matrix[3, 3] = 1
    return _LPS @ matrices @ _LPS


def itk_text(matrices: Matrix) -> str:
    """ITK text of (transforms, 4, 4) RAS matrices, all digits kept."""
    blocks = [_HEADER]
    for index, matrix in enumerate(_LPS @ np.atleast_3d(matrices).reshape(-1, 4, 4) @ _LPS):
        values = [*matrix[:3, :3].ravel(), *matrix[:3, 3]]
        numbers = " ".join(repr(float(value) + 0.0) for value in values)  # + 0.0 turns -0.0 into 0.0
        blocks.append(f"#Transform {index}\nTransform: AffineTransform_double_3_3\nParameters: {numbers}\nFixedParameters: 0 0 0\n")
    return "\n".join(blocks)


def _fsl_scale(shape: Sequence[int], affine: Matrix) -> Matrix:
    zooms = np.linalg.norm(affine[:3, :3], axis=0)
    scale = np.diag([*zooms, 1.0])
    if np.linalg.det(affine[:3, :3]) > 0:
        scale[0] = [-zooms[0], 0, 0, (shape[0] - 1) * zooms[0]]
    return scale


def _rotation(angles: NDArray[np.float64]) -> NDArray[np.float64]:
    cosine, sine = np.cos(angles), np.sin(angles)
    (cx, cy, cz), (sx, sy, sz) = np.moveaxis(cosine, -1, 0), np.moveaxis(sine, -1, 0)
    rows = [
        [cy * cz, -cy * sz, sy],
        [cx * sz + sx * sy * cz, cx * cz - sx * sy * sz, -sx * cy],
        [sx * sz - cx * sy * cz, sx * cz + cx * sy * sz, cx * cy],
    ]
    return np.stack([np.stack(row, -1) for row in rows], -2)


def _numbers(text: str) -> NDArray[np.float64]:
    return np.array([float(value) for value in text.split()])
