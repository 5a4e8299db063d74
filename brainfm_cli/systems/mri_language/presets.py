"""Sizes of the MRI encoder by name."""

from __future__ import annotations

from brainfm_cli.models.mri_encoder import MriShape

PRESETS: dict[str, MriShape] = {
    "nano": MriShape(widths=(16, 32, 64), depths=(1, 1, 2), num_heads=2),
    "tiny": MriShape(widths=(32, 64, 192), depths=(2, 2, 6), num_heads=3),
    "small": MriShape(widths=(64, 128, 384), depths=(2, 2, 12), num_heads=6),
    "base": MriShape(widths=(128, 256, 768), depths=(3, 3, 12), num_heads=12),
    "large": MriShape(widths=(192, 384, 1024), depths=(3, 3, 24), num_heads=16, decoder_layers=2),
}
PIXELS: dict[int, dict[str, int]] = {2: {"nano": 64}, 3: {"nano": 64}}
"""Pixels along each side by dimensions, where a preset has others than 256 (96 for cubes)."""


def default_size(preset: str, dims: int) -> int:
    """Pixels along each side that a preset is meant for."""
    return PIXELS[dims].get(preset, 256 if dims == 2 else 96)
