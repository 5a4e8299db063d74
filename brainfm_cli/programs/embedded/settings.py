"""Settings of the embedded preprocessing."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from brainfm_cli.config import Frozen

BrainMethod = Literal["auto", "deepbet", "template"]
Preset = Literal["fast", "full"]


class EmbeddedSettings(Frozen):
    """How the embedded engine preprocesses."""

    resolution: Literal[1, 2] = 2
    """Voxel size of results in template space, in millimetres; the grids are TemplateFlow's."""
    brain_extraction: BrainMethod = "auto"
    """deepbet's network, the template's mask after registration, or the first of both that passes the gates."""
    registration: Preset = "fast"
    """fast fits the deformation to the template down to 2 mm, full down to 1 mm with local correlation (minutes)."""
    coregistration_dof: Literal[6, 12] = 6
    """Degrees of freedom between BOLD reference and T1w: 6 rigid, 12 affine."""
    slice_timing: bool = True
    """Correct for slice timing where SliceTiming is stated."""
    brain_ml: tuple[float, float] = (900.0, 2000.0)
    """Smallest and largest believable brain mask, in millilitres."""
    min_template_correlation: float = Field(default=0.5, ge=0, le=1)
    """Least correlation of the structural image with the template inside the brain; below, nothing is published."""
    min_template_correlation_other: float = Field(default=0.35, ge=0, le=1)
    """The same of structural images that are not T1w, compared by a cubic curve of the template's intensities."""
    min_coverage: float = Field(default=0.8, ge=0, le=1)
    """Least share of the brain mask inside the BOLD field of view; below, nothing is published."""
