"""Brain extraction: an image that is stripped already, deepbet's network, or the template's mask after registration."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import ndimage

from brainfm_cli.bids.derivatives import write_text
from brainfm_cli.errors import MissingProgramError
from brainfm_cli.programs.embedded import itk
from brainfm_cli.programs.embedded.grids import coarser, on_grid, zooms_of
from brainfm_cli.signals.transforms import itk_text

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from brainfm_cli.programs.embedded.template import TemplateImages

    Volume = NDArray[np.float32]
    Mask = NDArray[np.bool_]
    Matrix = NDArray[np.float64]

Method = Literal["stripped", "deepbet", "template"]
_EMPTY_SHARE = 0.5  # of voxels that are exactly 0 in a skull-stripped image
_COARSE_MM = 3.0
_FOREGROUND = 0.15  # of the 98th percentile
_CEILING = 1.3  # of the foreground's median
_EDGE_MM, _REACH_MM, _BRIDGE_MM, _DEEP_MM = 2.0, 6.0, 4.0, 3.0
_BRAIN_BRIGHTNESS = 0.4  # of the median in the mask
_POSE: dict[str, Any] = {"aff_iterations": (200, 100, 50), "aff_shrink_factors": (3, 2, 1), "aff_smoothing_sigmas": (2, 1, 0)}
_SIZE: dict[str, Any] = {"aff_iterations": (100, 50), "aff_shrink_factors": (2, 1), "aff_smoothing_sigmas": (1, 0)}
_SHAPE: dict[str, Any] = {"reg_iterations": (40, 20), "mask_all_stages": True}
_PITCHES, _HEIGHTS_MM = (-20.0, 0.0, 20.0), (0.0, 20.0)
_SCALES = (0.87, 0.97)  # the template's brain is larger than most people's


@dataclass(frozen=True, kw_only=True, eq=False)
class Brain:
    """A brain mask and how it was found."""

    mask: Mask
    """(x, y, z) inside of the brain."""
    method: Method
    """Way of extraction."""


def volume_ml(mask: Mask, affine: Matrix) -> float:
    """Volume of a mask in millilitres."""
    return float(mask.sum()) * abs(float(np.linalg.det(affine[:3, :3]))) / 1000


def is_stripped(data: Volume, affine: Matrix, limits_ml: tuple[float, float]) -> bool:
    """Whether an image shows a brain alone: most of it exactly 0, and one filled blob of a brain's volume."""
    inside = data != 0
    if inside.mean() > 1 - _EMPTY_SHARE:
        return False
    blob = largest_blob(inside)
    return bool(blob.sum() > 0.95 * inside.sum() and limits_ml[0] <= volume_ml(blob, affine) <= limits_ml[1])


def largest_blob(mask: Mask) -> Mask:
    """The largest connected part of a mask, holes filled."""
    labels, count = ndimage.label(mask)
    if count > 1:
        sizes = np.bincount(labels.ravel())
        sizes[0] = 0
        mask = labels == sizes.argmax()
    return np.asarray(ndimage.binary_fill_holes(mask), bool)


def deepbet_mask(data: Volume, affine: Matrix) -> Mask:
    """(x, y, z) brain mask of deepbet's network (Fisch 2024), on the processor; empty where it finds no brain.

    Raises
    ------
    MissingProgramError
        deepbet is not installed.
    """
    import nibabel as nib

    try:
        from deepbet import BrainExtraction
    except ImportError as error:
        raise MissingProgramError(
            "deepbet is not installed", fix="run 'pip install --no-deps deepbet==1.0.2', or use brain_extraction=template"
        ) from error
    try:
        _, mask, _ = BrainExtraction(no_gpu=True).run(nib.Nifti1Image(data, affine))
    except (AssertionError, ValueError):  # its way of saying that there is no brain
        return np.zeros(data.shape, bool)
    return np.asarray(mask.dataobj) > 0


def template_mask(data: Volume, affine: Matrix, template: TemplateImages, folder: Path, *, seed: int) -> Mask:
    """(x, y, z) brain mask carried over from the template.

    The template has no skull, so a whole head must not be pulled onto it: the metric sees only the template's brain
    and a rim of scalp-free space, and several poses and sizes are tried, because a head's middle is not its brain's.
    """
    head, head_affine = coarser(data, affine, _COARSE_MM)
    shown = head > _FOREGROUND * np.percentile(head, 98)
    head = np.minimum(head, _CEILING * np.percentile(head[shown], 50))  # fat must not outshine the brain
    brain, brain_affine = coarser(template.brain, template.affine, _COARSE_MM)
    inside = coarser(template.mask, template.affine, _COARSE_MM)[0] > 0.5
    near = np.asarray(ndimage.binary_dilation(inside, iterations=1), bool)
    found: list[tuple[float, Path]] = []
    for number, start in enumerate(_starts(head, head_affine, inside, brain_affine)):
        path = write_text(folder / f"start{number}.txt", itk_text(start))
        forward, _ = itk.register(
            (brain, brain_affine), (head, head_affine), "Rigid", folder,
            name=f"pose{number}", seed=seed, fixed_mask=near, start=path, options=_POSE,
        )  # fmt: skip
        moved = itk.warp(head, head_affine, brain.shape, brain_affine, [forward])
        found.append((mutual_information(moved[near], brain[near]), forward))
    # Poses keep their size: free to grow, a brain would settle on the scalp.
    grown, _ = itk.register(
        (brain, brain_affine), (head, head_affine), "Affine", folder,
        name="size", seed=seed, fixed_mask=near, start=max(found)[1], options=_SIZE,
    )  # fmt: skip
    _, inverse = itk.register(
        (brain, brain_affine), (head, head_affine), "SyNOnly", folder,
        name="shape", seed=seed, fixed_mask=near, start=grown, options=_SHAPE,
    )  # fmt: skip
    mask = itk.warp(inside.astype(np.float32), brain_affine, head.shape, head_affine, [inverse])
    fine, fine_affine = coarser(data, affine, _EDGE_MM)
    grown_mask = grow_to_edge(fine, on_grid(mask, head_affine, fine.shape, fine_affine) > 0.5, fine_affine)
    return on_grid(grown_mask, fine_affine, data.shape, affine) > 0.5


def grow_to_edge(head: Volume, mask: Mask, affine: Matrix) -> Mask:
    """(x, y, z) the mask with the brain that lies just outside of it: what is as bright, up to the dark skull.

    Registration stops short of the cortex in some heads. Thin bridges, as of vessels and dura, are not crossed.
    """
    zoom = float(zooms_of(affine).mean())
    steps = np.arange(-round(_BRIDGE_MM / zoom), round(_BRIDGE_MM / zoom) + 1)
    ball = (np.stack(np.meshgrid(steps, steps, steps, indexing="ij")) ** 2).sum(0) <= steps[-1] ** 2
    deep = ndimage.binary_erosion(mask, iterations=max(1, round(_DEEP_MM / zoom)))
    solid = ndimage.binary_opening((head > _BRAIN_BRIGHTNESS * np.median(head[mask])) | deep, ball)
    found = ndimage.binary_dilation(mask, iterations=round(_REACH_MM / zoom), mask=solid | mask)
    margin = 2 * len(steps)
    closed = ndimage.binary_closing(np.pad(found, margin), ball, iterations=2)
    return largest_blob(closed[margin:-margin, margin:-margin, margin:-margin])


def mutual_information(one: NDArray[Any], other: NDArray[Any], bins: int = 32) -> float:
    """Mutual information of two images in nats, from their joint histogram."""
    joint = np.histogram2d(np.ravel(one), np.ravel(other), bins)[0]
    joint /= joint.sum()
    apart = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    filled = joint > 0
    return float((joint[filled] * np.log(joint[filled] / apart[filled])).sum())


def _starts(head: Volume, head_affine: Matrix, inside: Mask, brain_affine: Matrix) -> list[Matrix]:
    """(4, 4) transforms, template points to head points: the top of brain below the top of head, at several sizes and pitches."""
    shown = largest_blob(head > _FOREGROUND * np.percentile(head, 98))
    points = head_affine[:3, :3] @ np.array(np.nonzero(shown)) + head_affine[:3, 3:]
    top = np.percentile(points[2], 99.5)
    upper = points[:, points[2] > top - 120]  # without neck and most of the face
    centre = np.array([np.median(upper[0]), (upper[1].min() + upper[1].max()) / 2, top])
    brain_points = brain_affine[:3, :3] @ np.array(np.nonzero(inside)) + brain_affine[:3, 3:]
    crown = np.array([brain_points[0].mean(), (brain_points[1].min() + brain_points[1].max()) / 2, brain_points[2].max()])
    middle = brain_points.mean(1)
    found = []
    for scale, below_mm, degrees in product(_SCALES, _HEIGHTS_MM, _PITCHES):
        cosine, sine = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        turn = np.eye(4)
        turn[1:3, 1:3] = [[cosine, -sine], [sine, cosine]]
        turn[:3, :3] *= scale
        turn[:3, 3] = middle - turn[:3, :3] @ middle
        shift = np.eye(4)
        top_of_brain = middle + scale * (crown - middle)
        shift[:3, 3] = centre - top_of_brain - [0, 0, 8.0 + below_mm]  # scalp and skull are some 8 mm thick
        found.append(shift @ turn)
    return found
