"""A masked autoencoder over region × time patches of ROI series: the general series encoder (after BrainLM and FMM_TC).

A token is one patch of one region: Linear(patch) + Linear(log power spectrum of the patch) + Linear(code of the region's centre) + a
sinusoidal code of its time in seconds. The spectrum is there because the mean over time of anything linear in a patch says nothing of
how fast a region fluctuates; it is also a second thing to reconstruct, and the one that a person's other patches foretell.
Centres are coded as sines and cosines too (Tancik 2020): products of bare coordinates do not tell near from far.
Nothing depends on the order of regions, so any atlas with centres can be encoded; the class token is deterministic.
Only visible tokens are encoded in pretraining; the decoder gets a learned token with place and time for the others.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from brainfm_cli.models.attention import NO_BIAS, EdgeBias
from brainfm_cli.models.graph_encoder import TransformerLayer

Masking = Literal["random", "tube"]
# Centre and half-width of the brain in MNI millimetres: coordinates enter the encoder near unit size.
_CENTRE_MM = (0.0, -20.0, 15.0)
_HALF_WIDTH_MM = 50.0
_WAVELENGTHS_MM = (400.0, 200.0, 100.0, 50.0)
_PLACE_CODE = 3 * (1 + 2 * len(_WAVELENGTHS_MM))
_POWER_FLOOR = 0.05  # of unit variance: below it logarithms would speak of nothing but noise
_LONGEST_PERIOD_S = 4096.0
_SHORTEST_PERIOD_S = 4.0


@dataclass(frozen=True, kw_only=True)
class SeriesShape:
    """Sizes of a series encoder; the published reference's by default."""

    width: int = 256
    """Length of a token."""
    num_heads: int = 4
    """Attention heads."""
    feedforward: int = 1024
    """Hidden length of the feed-forward part."""
    num_layers: int = 4
    """Encoder layers."""
    decoder_layers: int = 2
    """Decoder layers."""
    patch_frames: int = 20
    """Frames of a patch, at the encoder's repetition time."""
    dropout: float = 0.0
    """Share of activations dropped in training."""


@dataclass(frozen=True, kw_only=True)
class Patches:
    """A batch of windows of one atlas, cut into patches."""

    values: Tensor
    """(batch, regions, patches, frames of a patch), zero where unusable."""
    usable: Tensor
    """(batch, regions, patches) bool: the region has a signal and the patch lies inside the window."""
    places: Tensor
    """(regions, 27) code of the region centres (:func:`place_regions`)."""
    seconds: Tensor
    """(patches,) middle of each patch, seconds from the start of the window."""


@dataclass(frozen=True, kw_only=True)
class SeriesEncoding:
    """What the encoder makes of a batch."""

    summary: Tensor
    """(batch, width) normalised class token."""
    tokens: Tensor
    """(batch, kept tokens, width) normalised tokens of visible patches; padding at the end of shorter items."""
    order: Tensor
    """(batch, kept tokens) position of each token in regions × patches, flattened."""
    kept: Tensor
    """(batch, kept tokens) bool, False for padding."""


def place_regions(centroids_mm: Tensor) -> Tensor:
    """(regions, 27) from (regions, 3) centres in MNI millimetres: coordinates near unit size, their sines and cosines."""
    centred = centroids_mm - centroids_mm.new_tensor(_CENTRE_MM)
    angles = torch.cat([2 * math.pi * centred / wavelength for wavelength in _WAVELENGTHS_MM], dim=1)
    return torch.cat([centred / _HALF_WIDTH_MM, angles.sin(), angles.cos()], dim=1)


def cut_patches(series: Tensor, frames: Tensor, places: Tensor, *, patch_frames: int, repetition_time_s: float) -> Patches:
    """Patches of (batch, longest, regions) scaled series; a last, incomplete patch is left out.

    Regions with NaN are unusable throughout; frames past an item's own length are never part of a usable patch.
    """
    batch, longest, regions = series.shape
    count = longest // patch_frames
    values = series[:, : count * patch_frames].reshape(batch, count, patch_frames, regions).permute(0, 3, 1, 2)
    inside = torch.arange(1, count + 1, device=series.device)[None, :] * patch_frames <= frames[:, None]
    finite = (torch.isfinite(values).all(dim=3) | ~inside[:, None, :]).all(dim=2)
    usable = finite[:, :, None] & inside[:, None, :]
    seconds = (torch.arange(count, device=series.device) + 0.5) * patch_frames * repetition_time_s
    return Patches(values=torch.where(usable[..., None], values, 0.0), usable=usable, places=places, seconds=seconds)


def choose_hidden_patches(usable: Tensor, scores: Tensor, *, ratio: float, masking: Masking) -> Tensor:
    """(batch, regions, patches) bool: the ``ratio`` of usable patches (random) or regions (tube) with the lowest scores.

    ``scores`` are uniform, (batch, regions, patches); tubes read the first patch's score. At least one patch (region)
    stays hidden and one visible.
    """
    if masking == "tube":
        present = usable.any(dim=2)
        return _lowest(present, scores[:, :, 0], ratio)[:, :, None] & usable
    flat = _lowest(usable.flatten(1), scores.flatten(1), ratio)
    return flat.view_as(usable)


def _lowest(candidates: Tensor, scores: Tensor, ratio: float) -> Tensor:
    total = candidates.sum(dim=1)
    count = (total * ratio).round().long().clamp_min(1)
    count = torch.minimum(count, (total - 1).clamp_min(0))
    ranked = torch.where(candidates, scores, torch.inf).argsort(dim=1).argsort(dim=1)
    return (ranked < count[:, None]) & candidates


class SeriesEncoder(nn.Module):
    """Patches of any atlas to a class token and patch tokens."""

    def __init__(self, shape: SeriesShape) -> None:
        super().__init__()
        self.shape = shape
        self.patch = nn.Linear(shape.patch_frames, shape.width)
        self.power = nn.Linear(shape.patch_frames // 2 + 1, shape.width)
        self.place = nn.Linear(_PLACE_CODE, shape.width)
        self.class_token = nn.Parameter(nn.init.normal_(torch.empty(shape.width), std=0.02))
        self.layers = nn.ModuleList(
            TransformerLayer(shape.width, shape.num_heads, shape.feedforward, shape.dropout, edge_bias=False)
            for _ in range(shape.num_layers)
        )
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, patches: Patches, hidden: Tensor | None = None) -> SeriesEncoding:
        """Encoding of the visible patches: usable ones that are not ``hidden`` (batch, regions, patches)."""
        visible = (patches.usable if hidden is None else patches.usable & ~hidden).flatten(1)
        order, kept = _visible_first(visible)
        tokens = self.patch(patches.values) + self.power(log_spectrum(patches.values)) + self.context(patches)
        tokens = tokens.flatten(1, 2).gather(1, order[:, :, None].expand(-1, -1, self.shape.width))
        summary = self.class_token.expand(len(tokens), 1, -1)
        tokens = torch.cat([summary, tokens], dim=1)
        bias = _padding_bias(nn.functional.pad(kept, (1, 0), value=True))
        for layer in self.layers:
            tokens = layer(tokens, bias)
        tokens = self.norm(tokens)
        return SeriesEncoding(summary=tokens[:, 0], tokens=tokens[:, 1:], order=order, kept=kept)

    def context(self, patches: Patches) -> Tensor:
        """(regions, patches, width): where and when each patch is."""
        when = time_code(patches.seconds, self.shape.width).to(patches.values.dtype)
        return self.place(patches.places)[:, None, :] + when[None]


class SeriesModel(nn.Module):
    """The encoder with the decoder that pretraining needs."""

    def __init__(self, shape: SeriesShape) -> None:
        super().__init__()
        self.encoder = SeriesEncoder(shape)
        self.enter = nn.Linear(shape.width, shape.width)
        self.hidden_token = nn.Parameter(nn.init.normal_(torch.empty(shape.width), std=0.02))
        self.place = nn.Linear(_PLACE_CODE, shape.width)
        self.layers = nn.ModuleList(
            TransformerLayer(shape.width, shape.num_heads, shape.feedforward, 0.0, edge_bias=False) for _ in range(shape.decoder_layers)
        )
        self.norm = nn.LayerNorm(shape.width)
        self.leave = nn.Linear(shape.width, shape.patch_frames)
        self.leave_power = nn.Linear(shape.width, shape.patch_frames // 2 + 1)

    def reconstruct(self, patches: Patches, hidden: Tensor) -> tuple[Tensor, Tensor, SeriesEncoding]:
        """(batch, regions, patches, frames) predictions of every patch, (…, bins) of its spectrum, and the encoding of the visible ones."""
        encoding = self.encoder(patches, hidden)
        batch, regions, count, _ = patches.values.shape
        width = self.encoder.shape.width
        tokens = self.hidden_token.to(encoding.tokens.dtype).expand(batch, regions * count, width)
        # Padding writes to an extra row that is cut off, so that it cannot overwrite a patch.
        target = torch.where(encoding.kept, encoding.order, regions * count)
        tokens = nn.functional.pad(tokens, (0, 0, 0, 1))
        tokens = tokens.scatter(1, target[:, :, None].expand(-1, -1, width), self.enter(encoding.tokens).to(tokens.dtype))[:, :-1]
        when = time_code(patches.seconds, width).to(tokens.dtype)
        tokens = tokens + (self.place(patches.places)[:, None, :] + when[None]).flatten(0, 1)
        tokens = torch.cat([encoding.summary[:, None], tokens], dim=1)
        bias = _padding_bias(nn.functional.pad(patches.usable.flatten(1), (1, 0), value=True))
        for layer in self.layers:
            tokens = layer(tokens, bias)
        decoded = self.norm(tokens[:, 1:]).view(batch, regions, count, -1)
        return self.leave(decoded), self.leave_power(decoded), encoding


def masked_patch_loss(predicted: Tensor, patches: Patches, hidden: Tensor) -> Tensor:
    """Mean squared error over the frames of hidden, usable patches."""
    counted = hidden & patches.usable
    error = (predicted - patches.values).square().mean(dim=3)
    return torch.where(counted, error, 0.0).sum() / counted.sum().clamp_min(1)


def log_spectrum(values: Tensor) -> Tensor:
    """(…, frames // 2 + 1) logarithm of a patch's power at each frequency, near unit size; offsets of a patch are no frequency."""
    power = torch.fft.rfft(values.float() - values.float().mean(dim=-1, keepdim=True), norm="ortho").abs().square()
    return torch.log(power + _POWER_FLOOR).to(values.dtype)


def masked_spectrum_loss(predicted: Tensor, patches: Patches, hidden: Tensor) -> Tensor:
    """Mean squared error of the log spectra of hidden, usable patches."""
    counted = hidden & patches.usable
    error = (predicted - log_spectrum(patches.values)).square().mean(dim=3)
    return torch.where(counted, error, 0.0).sum() / counted.sum().clamp_min(1)


def time_code(seconds: Tensor, width: int) -> Tensor:
    """(times, width) sines and cosines of periods from 4 to 4096 s (Vaswani 2017, in seconds instead of positions)."""
    half = width // 2
    steps = torch.arange(half, device=seconds.device, dtype=torch.float32) / max(half - 1, 1)
    periods = _SHORTEST_PERIOD_S * (_LONGEST_PERIOD_S / _SHORTEST_PERIOD_S) ** steps
    angle = 2 * math.pi * seconds.float()[:, None] / periods
    code = torch.cat([angle.sin(), angle.cos()], dim=1)
    return nn.functional.pad(code, (0, width - 2 * half))


def _visible_first(visible: Tensor) -> tuple[Tensor, Tensor]:
    """(batch, most visible) positions of the visible tokens in order, and which of them are no padding."""
    most = max(1, int(visible.sum(dim=1).max()))
    order = (~visible).to(torch.int8).argsort(dim=1, stable=True)[:, :most]
    return order, visible.gather(1, order)


def _padding_bias(kept: Tensor) -> EdgeBias:
    # Without padding no mask is made, so that the fast attention kernels apply.
    return NO_BIAS if bool(kept.all()) else EdgeBias(adjacency=None, prompt=None, absent=~kept)
