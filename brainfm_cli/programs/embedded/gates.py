"""Gates: measures of a result with the limits that it must keep. What fails is not published."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfm_cli.programs.embedded.brain import mutual_information, volume_ml
from brainfm_cli.programs.embedded.grids import on_grid

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from brainfm_cli.programs.embedded.settings import EmbeddedSettings
    from brainfm_cli.programs.embedded.template import TemplateImages

MIN_TEMPLATE_DICE = 0.8
_MIN_COVERED = 0.1  # of the brain mask, by a sequence of few slices
_DISPLACED_MM = 6.0
_MIN_FILLED = 0.7  # of the mask where the image has signal


@dataclass(frozen=True, kw_only=True)
class Gate:
    """One measure and its limits."""

    name: str
    """As in the quality table where it is there, e.g. brain_ml."""
    value: float
    """What was measured."""
    low: float
    """Least value that passes."""
    high: float = float("inf")
    """Largest value that passes."""
    unit: str = ""
    """Unit of the value."""
    meaning: str = ""
    """What is measured, in words."""

    @property
    def passed(self) -> bool:
        """Whether the value is within its limits; NaN is not."""
        return bool(self.low <= self.value <= self.high)

    @property
    def sentence(self) -> str:
        """The measure and its limits in words."""
        limit = f"at least {self.low:g}" if self.high == float("inf") else f"{self.low:g} to {self.high:g}"
        unit = f" {self.unit}" if self.unit else ""
        return f"{self.meaning or self.name} is {self.value:.3g}{unit} and must be {limit}{unit}"

    def as_row(self) -> dict[str, Any]:
        """Plain values, for JSON and tables."""
        high = None if self.high == float("inf") else self.high
        return {
            "name": self.name,
            "meaning": self.meaning,
            "value": self.value,
            "low": self.low,
            "high": high,
            "unit": self.unit,
            "passed": self.passed,
        }


def check_brain(mask: NDArray[np.bool_], image: NDArray[np.float32], affine: NDArray[np.float64], settings: EmbeddedSettings) -> Gate:
    """The gate of a brain mask: its volume, or the share of it that shows signal where that is too small."""
    low, high = settings.brain_ml
    volume = Gate(name="brain_ml", value=volume_ml(mask, affine), low=low, high=high, unit="ml", meaning="volume of the brain mask")
    if not volume.passed:
        return volume
    filled = float((image[mask] > 0.1 * np.percentile(image, 98)).mean())
    signal = Gate(name="mask_signal", value=filled, low=_MIN_FILLED, meaning="share of the brain mask that shows signal")
    return volume if signal.passed else signal


def template_gates(
    image: NDArray[np.float32],
    mask: NDArray[np.bool_],
    affine: NDArray[np.float64],
    template: TemplateImages,
    settings: EmbeddedSettings,
    *,
    modality: str = "T1w",
) -> list[Gate]:
    """Likeness of a structural image on the template's grid to the template.

    Of contrasts other than T1w dark and bright change places: there a cubic curve of the template's intensities is compared.
    """
    inside = on_grid(template.mask, template.affine, image.shape, affine) > 0.5
    model = on_grid(template.brain, template.affine, image.shape, affine)
    both = inside & mask & (model > 0)
    likeness, low, meaning = 0.0, settings.min_template_correlation, "correlation with the template inside the brain"
    if both.sum() > 100 and image[both].std() > 0:
        expected = model[both].astype(np.float64)
        if modality != "T1w":
            curve = np.polynomial.Polynomial.fit(expected, image[both].astype(np.float64), 3)
            expected = np.asarray(curve(expected), np.float64)
            low, meaning = settings.min_template_correlation_other, "correlation with a cubic curve of the template inside the brain"
        likeness = float(np.corrcoef(image[both], expected)[0, 1])
    return [
        Gate(name="template_correlation", value=likeness, low=low, meaning=meaning),
        Gate(name="template_dice", value=dice(mask, inside), low=MIN_TEMPLATE_DICE, meaning="overlap (Dice) of the brain mask with the template's"),
    ]  # fmt: skip


def sequence_gates(
    reference: NDArray[np.float32], moved: NDArray[np.float32], inside: NDArray[np.bool_], zoom_mm: float
) -> tuple[Gate, ...]:
    """Whether another sequence lies on the reference: what the two share must fall when one is displaced in any direction.

    Parameters
    ----------
    reference, moved
        (x, y, z) on one grid of voxels of about ``zoom_mm``; ``moved`` is 0 where the sequence was not measured.
    inside
        (x, y, z) brain mask.
    """
    covered = inside & (moved > 0)
    share = float(covered.sum() / max(1, inside.sum()))
    gates = (Gate(name="sequence_coverage", value=share, low=_MIN_COVERED, meaning="share of the brain mask that the sequence covers"),)
    if not gates[0].passed:
        return gates
    steps = max(1, round(_DISPLACED_MM / zoom_mm))
    shared = mutual_information(reference[covered], moved[covered])
    away = [
        mutual_information(reference[covered], np.roll(moved, sign * steps, axis)[covered]) for axis in range(3) for sign in (-1, 1)
    ]  # fmt: skip
    meaning = f"mutual information with the reference, over the largest when displaced by {_DISPLACED_MM:g} mm"
    return (*gates, Gate(name="sequence_alignment", value=shared / max(*away, 1e-9), low=1.0, meaning=meaning))


def dice(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """Overlap of two masks, 0 to 1; NaN where both are empty."""
    total = int(one.sum()) + int(other.sum())
    return 2 * int((one & other).sum()) / total if total else float("nan")
