"""What is read from a frozen series encoder: the class token and means of patch tokens, over all regions and over networks.

Which regions count is what a target's prompt learns; untuned, all count the same.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from brainfm_cli.models.series_encoder import SeriesEncoder, SeriesEncoding, cut_patches

_SHARPNESS = 10.0
"""How fast weights of regions follow the prompt: steps of 0.01 must matter within tens of them."""
_SHRINKAGE = 0.1  # of the covariance within scans towards equal variances: some of hundreds are nearly none


@dataclass(frozen=True, kw_only=True)
class SeriesReadout:
    """What the frozen encoder says of whole runs in one atlas."""

    atlas: str
    """Atlas label."""
    summary: Tensor
    """(runs, width) class token, averaged over windows."""
    regions: Tensor
    """(runs, regions, width) patch tokens averaged over patches and windows; zero in absent regions."""
    present: Tensor
    """(runs, regions) bool: the region has a signal."""


class RegionPrompt(nn.Module):
    """Weights of regions for one target in one atlas; starts with equal ones."""

    groups: Tensor | None

    def __init__(self, regions: int, groups: Tensor | None) -> None:
        """``groups`` (regions, groups) 0/1: networks that are read each by itself; none for no such reading."""
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(regions))
        self.register_buffer("groups", groups, persistent=False)

    def forward(self, readout: SeriesReadout) -> Tensor:
        """(runs, width · (2 + groups)): class token, weighted mean over regions, weighted means over each group."""
        weights = torch.exp(_SHARPNESS * (self.logits - self.logits.max())) * readout.present
        parts = [readout.summary, _mean(weights[:, :, None], readout.regions).squeeze(1)]
        if self.groups is not None:
            parts.append(_mean(weights[:, :, None] * self.groups, readout.regions).flatten(1))
        return torch.cat(parts, dim=1)


def sum_by_region(encoding: SeriesEncoding, usable: Tensor) -> Tensor:
    """(batch, regions, width) sums of patch tokens over the patches of each region; ``usable`` (batch, regions, patches)."""
    regions, patches = usable.shape[1:]
    tokens = encoding.tokens
    # Padding goes to an extra row that is cut off.
    place = torch.where(encoding.kept, encoding.order // patches, regions)
    sums = tokens.new_zeros(len(tokens), regions + 1, tokens.shape[2])
    return sums.scatter_add(1, place[:, :, None].expand_as(tokens), tokens)[:, :-1]


def _mean(weights: Tensor, regions: Tensor) -> Tensor:
    """(runs, groups, width) means of (runs, regions, width) with (runs, regions, groups) weights; zero for an empty group."""
    total = weights.sum(dim=1)
    return weights.transpose(1, 2) @ regions / total.clamp_min(1e-12)[:, :, None]


class SeriesClassifier(nn.Module):
    """An encoder with its readout and a linear head, all trained together: what pretraining is compared with."""

    places: Tensor

    def __init__(self, encoder: SeriesEncoder, readout: RegionPrompt, places: Tensor, outputs: int, *, repetition_time_s: float) -> None:
        """``places`` (regions, 27) code of the region centres (:func:`~brainfm_cli.models.series_encoder.place_regions`)."""
        super().__init__()
        self.encoder, self.readout, self.repetition_time_s = encoder, readout, repetition_time_s
        self.register_buffer("places", places)
        groups = 0 if readout.groups is None else readout.groups.shape[1]
        self.leave = nn.Linear(encoder.shape.width * (2 + groups), outputs)

    def forward(self, series: Tensor) -> Tensor:
        """(batch, outputs) from (batch, frames, regions) scaled series of one length; NaN in absent regions."""
        frames = torch.full((len(series),), series.shape[1], device=series.device)
        shape = self.encoder.shape
        patches = cut_patches(series, frames, self.places, patch_frames=shape.patch_frames, repetition_time_s=self.repetition_time_s)
        encoding = self.encoder(patches)
        counts = patches.usable.sum(dim=2)
        regions = sum_by_region(encoding, patches.usable) / counts.clamp_min(1)[:, :, None]
        read: Tensor = self.leave(self.readout(SeriesReadout(atlas="", summary=encoding.summary, regions=regions, present=counts > 0)))
        return read


class ReliableAxes(nn.Module):
    """The part of an atlas' readout that differs between people and not within a scan, learnt from scans without labels.

    A readout has hundreds of numbers, most of which change from one half of a scan to the other as much as from one person to the
    next; in a small trial a head cannot tell which. The axes are those of the largest variance between people where that within
    scans is one (canonical axes of repeated measures; cf. probabilistic LDA, Ioffe 2006), each times the root of its reliability.
    """

    def __init__(self, features: int, axes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("axes", torch.zeros(features, min(axes, features)))
        self.register_buffer("reliability", torch.zeros(min(axes, features)))

    @property
    def fitted(self) -> bool:
        """Whether axes were learnt; without them a readout stays as it is."""
        return bool(self.get_buffer("reliability").any())

    def forward(self, readout: Tensor) -> Tensor:
        """(runs, axes) from (runs, features)."""
        return (readout - self.get_buffer("mean")) @ self.get_buffer("axes") if self.fitted else readout

    def fit(self, first: Tensor, second: Tensor) -> None:
        """Learn from the (scans, features) readouts of both halves of the same scans."""
        first, second = first.double(), second.double()
        mean = (first.mean(0) + second.mean(0)) / 2
        one, other = first - first.mean(0), second - second.mean(0)
        spread = ((one.square().mean(0) + other.square().mean(0)) / 2).sqrt().clamp_min(1e-9)
        one, other = one / spread, other / spread
        within = (one - other).T @ (one - other) / (2 * len(one))
        within += _SHRINKAGE * within.diagonal().mean() * torch.eye(len(within), dtype=within.dtype, device=within.device)
        values, vectors = torch.linalg.eigh(within)
        whiten = vectors / values.sqrt()
        both = whiten.T @ (one.T @ other + other.T @ one) @ whiten / (2 * len(one))
        between, turn = torch.linalg.eigh(both)
        count = self.get_buffer("reliability").shape[0]
        between, turn = between.flip(0)[:count].clamp_min(0), turn.flip(1)[:, :count]
        reliability = between / (between + 1)
        # an eigenvector's sign is anybody's guess: its largest entry is positive
        axes = whiten @ turn
        axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
        self.get_buffer("mean").copy_(mean)
        self.get_buffer("axes").copy_(axes * reliability.sqrt() / spread[:, None])
        self.get_buffer("reliability").copy_(reliability)
