"""Two views of a slice: turned, scaled and flipped as a scan could lie, and seen through another scanner. The clean view is the target.

Every number drawn depends on the item's key and the view alone. A flip turns a left lesion into a right one: both views of an item have
the same flip, or the embedding would become blind to sides; alignment with reports takes no flips at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from brainfm_cli.config import Frozen
from brainfm_cli.models.graphs import hashed_normal, hashed_uniform

_FLIP, _PLACE, _LIGHT, _NOISE = 10, 20, 30, 40  # streams of the hashed random numbers; the view is added
_BIAS_TERMS = 5


class AugmentSettings(Frozen):
    """How strongly the views of a slice differ."""

    rotation_deg: float = Field(default=15.0, ge=0, le=180)
    """Largest turn in the plane (of cubes: about the vertical axis)."""
    scale: float = Field(default=0.1, ge=0, lt=1)
    """Largest relative change of size."""
    flip: float = Field(default=0.5, ge=0, le=1)
    """Share of items whose left and right are exchanged, in both views alike; sagittal slices never."""
    gamma: float = Field(default=0.3, ge=0)
    """Largest logarithm of the exponent of intensities."""
    contrast: float = Field(default=0.2, ge=0, lt=1)
    """Largest relative change of the spread about the mean."""
    bias_field: float = Field(default=0.3, ge=0)
    """Largest logarithm of a smooth factor over the image."""
    noise: float = Field(default=0.03, ge=0)
    """Largest SD of added noise, intensities being in [0, 1]."""
    blur: float = Field(default=0.5, ge=0, le=1)
    """Largest share of a smoothed copy."""


@dataclass(frozen=True, kw_only=True)
class View:
    """One view of a batch."""

    clean: Tensor
    """(batch, *pixels) intensities in [0, 1] after the change of place alone: what is reconstructed."""
    seen: Tensor
    """(batch, *pixels) what the encoder is given."""
    brain: Tensor
    """(batch, *pixels) bool: inside the head."""


def make_view(
    images: Tensor, plane: Tensor, keys: Tensor, settings: AugmentSettings, *, view: int, light: Tensor | None = None, sagittal: int = 2
) -> View:
    """A view of (batch, *pixels) uint8 slices; ``view`` numbers it, ``plane`` (batch,) says where left and right are.

    ``light`` (batch,) are keys of what changes intensities, where slices that must lie alike are not to be seen alike; unset they are ``keys``.
    """
    flipped = (hashed_uniform(keys, (1,), stream=_FLIP)[:, 0] < settings.flip) & (plane != sagittal)
    moved = _move(images.float() / 255, flipped, hashed_uniform(keys, (2,), stream=_PLACE + view), settings)
    brain = moved > 0.5 / 255
    clean = torch.where(brain, moved, 0.0)
    return View(
        clean=clean, seen=torch.where(brain, _light(clean, brain, keys if light is None else light, settings, view), 0.0), brain=brain
    )


def plain_view(images: Tensor) -> View:
    """(batch, *pixels) uint8 slices as they are."""
    clean = images.float() / 255
    return View(clean=clean, seen=clean, brain=images > 0)


def _move(images: Tensor, flipped: Tensor, draws: Tensor, settings: AugmentSettings) -> Tensor:
    angle = (2 * draws[:, 0] - 1) * settings.rotation_deg * torch.pi / 180
    size = 1 + (2 * draws[:, 1] - 1) * settings.scale
    sign = torch.where(flipped, -1.0, 1.0)
    dims = images.ndim - 1
    # output places to input places, axis by axis; torch names axes from the last to the first
    turn = torch.zeros(len(images), dims, dims + 1, device=images.device)
    turn[:, 0, 0], turn[:, 0, 1] = sign * angle.cos() / size, -sign * angle.sin() / size
    turn[:, 1, 0], turn[:, 1, 1] = angle.sin() / size, angle.cos() / size
    if dims == 3:
        turn[:, 2, 2] = 1 / size
    turn = torch.cat([turn[:, :, :dims].flip(1, 2), turn[:, :, dims:]], dim=2)
    grid = functional.affine_grid(turn, [len(images), 1, *images.shape[1:]], align_corners=False)
    return functional.grid_sample(images[:, None], grid, align_corners=False)[:, 0]


def _light(clean: Tensor, brain: Tensor, keys: Tensor, settings: AugmentSettings, view: int) -> Tensor:
    dims = clean.ndim - 1
    draws = (2 * hashed_uniform(keys, (4 + _BIAS_TERMS,), stream=_LIGHT + view) - 1).view(len(clean), -1, *(1,) * dims)
    x = clean.clamp_min(1e-4) ** torch.exp(settings.gamma * draws[:, 0])
    count = brain.flatten(1).sum(dim=1).clamp_min(1).view(-1, *(1,) * dims)
    middle = torch.where(brain, x, 0.0).flatten(1).sum(dim=1).view(-1, *(1,) * dims) / count
    x = middle + (x - middle) * (1 + settings.contrast * draws[:, 1])
    x = x * torch.exp(settings.bias_field * _smooth_field(clean.shape[1:], draws[:, 4:]))
    blurred = x[:, None]
    kernel = torch.tensor([0.25, 0.5, 0.25], device=x.device)
    convolve = functional.conv2d if dims == 2 else functional.conv3d
    for axis in range(dims):
        shape, padding = [1] * (dims + 2), [0] * dims
        shape[2 + axis], padding[axis] = 3, 1
        blurred = convolve(blurred, kernel.view(shape), padding=padding)
    share = settings.blur * draws[:, 2].abs()
    x = (1 - share) * x + share * blurred[:, 0]
    level = settings.noise * draws[:, 3].abs()
    return (x + level * hashed_normal(keys, tuple(clean.shape[1:]), stream=_NOISE + view)).clamp(0, 1)


def _smooth_field(shape: torch.Size, weights: Tensor) -> Tensor:
    """(batch, *pixels) polynomial of second order of the first two axes, within about ±1; ``weights`` (batch, 5, 1, …)."""
    axes = [torch.linspace(-1, 1, size, device=weights.device).view(*(-1 if place == axis else 1 for place in range(len(shape)))) for axis, size in enumerate(shape)]  # fmt: skip
    x, y = axes[0], axes[1]
    terms = (x + 0 * y, y + 0 * x, x * y, x**2 - 1 / 3 + 0 * y, y**2 - 1 / 3 + 0 * x)
    return sum((weights[:, number] * term for number, term in enumerate(terms)), torch.zeros((), device=weights.device)) / 2
