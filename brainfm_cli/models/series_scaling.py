"""From region series as scanned to what a series encoder reads: one repetition time for all, and one scale.

Resampling is band-limited (a Kaiser-windowed sinc, Smith and Gossett 1984), so that nothing above the coarser sampling's
Nyquist frequency is folded into the BOLD band. Scaling is robust: a region's own median is taken off, because an offset is
image intensity and no signal, and its spread is measured by the interquartile range of the people pretrained on.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor, nn

Gain = Literal["scan", "kept"]

_ZERO_CROSSINGS = 12
"""Half-width of the kernel, in samples of the coarser series."""
_KAISER_BETA = 8.0
_PASS_BAND = 0.9
"""Cut-off as a share of the coarser series' Nyquist frequency."""
_SAME_TIME = 1e-3
"""Repetition times this close, relatively, are one: nothing is resampled."""
_IQR_OF_NORMAL = 1.349
_FLAT = 1e-3
"""A region whose spread is this share of the scan's typical one has no signal."""


def resample(series: Tensor, repetition_time_s: float, target_s: float) -> Tensor:
    """(frames, regions) series at another repetition time, over the same seconds.

    A frame stands for the middle of its repetition time. NaN columns stay NaN.
    """
    if abs(repetition_time_s / target_s - 1) < _SAME_TIME:
        return series
    return _kernel(len(series), repetition_time_s, target_s).to(series) @ series


@lru_cache(maxsize=8)
def _kernel(frames: int, given_s: float, target_s: float) -> Tensor:
    """(new frames, frames) weights, each row adding up to 1."""
    count = int(frames * given_s / target_s + _SAME_TIME)
    before = (torch.arange(frames, dtype=torch.float64) + 0.5) * given_s
    after = (torch.arange(count, dtype=torch.float64) + 0.5) * target_s
    coarser = max(given_s, target_s)
    away = (after[:, None] - before[None, :]) / coarser
    inside = (1 - (away / _ZERO_CROSSINGS).square()).clamp_min(0)
    window = torch.where(inside > 0, torch.special.i0(_KAISER_BETA * inside.sqrt()), 0.0)
    weights = torch.sinc(_PASS_BAND * away) * window
    return weights / weights.sum(dim=1, keepdim=True)


def robust_spread(series: Tensor) -> Tensor:
    """(regions,) interquartile range of (frames, regions) over that of a standard normal; NaN where a region has no signal."""
    quartiles = torch.quantile(series.float(), series.new_tensor([0.25, 0.75], dtype=torch.float32), dim=0)
    return (quartiles[1] - quartiles[0]) / _IQR_OF_NORMAL


class SeriesScaler(nn.Module):
    """The spread of every region over the people pretrained on, kept with the weights."""

    def __init__(self, atlases: Mapping[str, int]) -> None:
        super().__init__()
        for label, regions in sorted(atlases.items()):
            self.register_buffer(f"spread_{label}", torch.ones(regions))

    def set(self, atlas: str, spread: Tensor) -> None:
        """Take over (regions,) spreads."""
        self.get_buffer(f"spread_{atlas}").copy_(spread)

    def forward(self, series: Tensor, atlas: str, *, gain: Gain, clip: float) -> tuple[Tensor, Tensor]:
        """(frames, regions) scaled series, NaN in regions without signal, and the scan's gain.

        The gain is the typical ratio of the scan's spreads to those pretrained on. It is divided out where ``gain`` is
        ``scan``: then the unit of the series, and the scanner's, does not matter, and how regions differ still does.
        """
        spread = robust_spread(series)
        reference = self.get_buffer(f"spread_{atlas}")
        ratio = spread / reference
        typical = torch.nanmedian(ratio)
        usable = ratio > _FLAT * typical
        scale = reference * typical if gain == "scan" else reference
        scaled = (series - series.median(dim=0).values) / torch.where(usable, scale, math.nan)
        return scaled.clamp(-clip, clip), typical


def population_spread(spreads: Tensor) -> Tensor:
    """(regions,) typical spread from (scans, regions) spreads of single scans.

    The pattern over regions is the median of the scans' own patterns, so that scans in other units do not distort it; its
    size is the median of their sizes. A region that no scan has gets the typical spread.
    """
    usable = torch.where(spreads > 0, spreads, math.nan)
    sizes = torch.nanmedian(usable, dim=1, keepdim=True).values
    pattern = torch.nanmedian(usable / sizes, dim=0).values
    return torch.nan_to_num(pattern, nan=1.0) * torch.nanmedian(sizes)
