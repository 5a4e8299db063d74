"""A masked autoencoder over patches of voxels: the cross-subject encoder of single-trial responses (MindSemantix, MinD-Vis).

A token is a patch of 16 voxels that are neighbours in the stored order: Linear(patch) + Linear(code of the patch's place) + the
person's embedding. People differ in number and tuning of voxels, so a person may also have a first and a last layer of
their own, patch by patch, and a class token that starts from a linear summary of all their visible voxels (``first_layer=person``):
attention between normalised patches loses how strongly each one speaks. The published design has one first layer for all. Voxels that fill up the last patch are
zero and never counted; a patch is never made of filling alone. Only visible patches are encoded in pretraining.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from brainfm_cli.models.attention import NO_BIAS
from brainfm_cli.models.graph_encoder import TransformerLayer
from brainfm_cli.models.series_encoder import place_regions

FirstLayer = Literal["person", "shared"]
_PLACE_CODE = 27  # place_regions
_SMALLEST_SD = 1e-6


@dataclass(frozen=True, kw_only=True)
class VoxelShape:
    """Sizes of a voxel encoder; the published ViT-L ones by default."""

    width: int = 1024
    """Length of a token."""
    num_layers: int = 24
    """Encoder layers."""
    num_heads: int = 16
    """Attention heads."""
    mlp_ratio: float = 1.0
    """Hidden length of the feed-forward part, in widths."""
    decoder_width: int = 512
    """Length of a decoder token."""
    decoder_layers: int = 8
    """Decoder layers, which only pretraining uses."""
    decoder_heads: int = 16
    """Attention heads of the decoder."""
    patch_voxels: int = 16
    """Voxels of a patch."""
    first_layer: FirstLayer = "person"
    """person adds a first and a last layer of each person's own; shared has one for all."""
    dropout: float = 0.0
    """Share of activations dropped in training."""


@dataclass(frozen=True, kw_only=True)
class Viewer:
    """A participant as a model knows them."""

    places_mm: Tensor
    """(voxels, 3) millimetres."""

    @property
    def num_voxels(self) -> int:
        """Number of voxels."""
        return len(self.places_mm)


@dataclass(frozen=True, kw_only=True)
class VoxelPatches:
    """A batch of responses of one participant, cut into patches."""

    participant: str
    """Whose responses."""
    values: Tensor
    """(batch, patches, voxels of a patch), zero where there is no voxel."""
    real: Tensor
    """(patches, voxels of a patch) bool: a voxel is there."""


@dataclass(frozen=True, kw_only=True)
class VoxelEncoding:
    """What the encoder makes of a batch."""

    summary: Tensor
    """(batch, width) normalised class token."""
    tokens: Tensor
    """(batch, kept patches, width) normalised tokens of visible patches."""
    order: Tensor
    """(batch, kept patches) patch of each token."""


class VoxelEncoder(nn.Module):
    """Patches of any known participant to a class token and patch tokens."""

    def __init__(self, shape: VoxelShape, viewers: Mapping[str, Viewer]) -> None:
        super().__init__()
        self.shape = shape
        self.patch = nn.Linear(shape.patch_voxels, shape.width)
        self.place = nn.Linear(_PLACE_CODE, shape.width)
        self.class_token = nn.Parameter(nn.init.normal_(torch.empty(shape.width), std=0.02))
        self.people = nn.ParameterDict()
        self.first = nn.ParameterDict()
        self.whole = nn.ParameterDict()
        self.layers = nn.ModuleList(
            TransformerLayer(shape.width, shape.num_heads, round(shape.mlp_ratio * shape.width), shape.dropout, edge_bias=False)
            for _ in range(shape.num_layers)
        )
        self.norm = nn.LayerNorm(shape.width)
        for name, viewer in sorted(viewers.items()):
            self.add(name, viewer)

    def add(self, name: str, viewer: Viewer) -> None:
        """Make room for a participant; the embedding starts as the mean of those known."""
        centres, real = patch_places(viewer.places_mm, self.shape.patch_voxels)
        self.register_buffer(f"places_{name}", place_regions(centres), persistent=True)
        self.register_buffer(f"real_{name}", real, persistent=True)
        known = list(self.people.values())
        start = torch.stack([one.detach() for one in known]).mean(0) if known else nn.init.normal_(torch.empty(self.shape.width), std=0.02)
        self.people[name] = nn.Parameter(start.clone())
        if self.shape.first_layer == "person":
            own = torch.empty(len(real), self.shape.patch_voxels, self.shape.width)
            self.first[name] = nn.Parameter(nn.init.normal_(own, std=self.shape.patch_voxels**-0.5 / 2))
            self.whole[name] = nn.Parameter(nn.init.normal_(torch.empty_like(own), std=real.numel() ** -0.5 / 2))

    def forward(self, patches: VoxelPatches, hidden: Tensor | None = None) -> VoxelEncoding:
        """Encoding of the patches that are not ``hidden`` (batch, patches); as many must be hidden in every item."""
        tokens = self.patch(patches.values) + self.context(patches.participant)
        if patches.participant in self.first:
            tokens = tokens + torch.einsum("bkv,kvw->bkw", patches.values, self.first[patches.participant])
        batch, count, width = tokens.shape
        summary = self.class_token.expand(batch, -1)
        if patches.participant in self.whole:
            seen = patches.values if hidden is None else patches.values * ~hidden[:, :, None]
            summary = summary + torch.einsum("bkv,kvw->bw", seen, self.whole[patches.participant])
        if hidden is None:
            order = torch.arange(count, device=tokens.device).expand(batch, -1)
        else:
            visible = count - int(hidden[0].sum())
            order = hidden.to(torch.int8).argsort(dim=1, stable=True)[:, :visible]
            tokens = tokens.gather(1, order[:, :, None].expand(-1, -1, width))
        tokens = torch.cat([summary[:, None].to(tokens.dtype), tokens], dim=1)
        for layer in self.layers:
            tokens = layer(tokens, NO_BIAS)
        tokens = self.norm(tokens)
        return VoxelEncoding(summary=tokens[:, 0], tokens=tokens[:, 1:], order=order)

    def context(self, participant: str) -> Tensor:
        """(patches, width): where each patch is, and in whom."""
        return self.place(self.places(participant)) + self.people[participant]

    def places(self, participant: str) -> Tensor:
        """(patches, 27) codes of the patches' places."""
        found = self.get_buffer(f"places_{participant}")
        return found.to(self.place.weight.dtype)

    def real(self, participant: str) -> Tensor:
        """(patches, voxels of a patch) bool."""
        return self.get_buffer(f"real_{participant}")


class VoxelModel(nn.Module):
    """Scale of the input, the encoder, and the decoder that pretraining needs."""

    def __init__(self, shape: VoxelShape, viewers: Mapping[str, Viewer]) -> None:
        super().__init__()
        self.shape = shape
        self.scale = VoxelScale()
        self.encoder = VoxelEncoder(shape, {})
        self.enter = nn.Linear(shape.width, shape.decoder_width)
        self.hidden_token = nn.Parameter(nn.init.normal_(torch.empty(shape.decoder_width), std=0.02))
        self.place = nn.Linear(_PLACE_CODE, shape.decoder_width)
        self.person = nn.Linear(shape.width, shape.decoder_width, bias=False)
        self.layers = nn.ModuleList(
            TransformerLayer(shape.decoder_width, shape.decoder_heads, round(shape.mlp_ratio * shape.decoder_width), 0.0, edge_bias=False)
            for _ in range(shape.decoder_layers)
        )
        self.norm = nn.LayerNorm(shape.decoder_width)
        self.leave = nn.Linear(shape.decoder_width, shape.patch_voxels)
        self.last = nn.ParameterDict()
        for name, viewer in sorted(viewers.items()):
            self.add(name, viewer)

    def add(self, name: str, viewer: Viewer) -> None:
        """Make room for a participant."""
        self.scale.add(name, viewer.num_voxels)
        self.encoder.add(name, viewer)
        if self.shape.first_layer == "person":
            real = self.encoder.real(name)
            own = torch.empty(len(real), self.shape.decoder_width, self.shape.patch_voxels)
            self.last[name] = nn.Parameter(nn.init.normal_(own, std=self.shape.decoder_width**-0.5 / 2))

    def patches(self, participant: str, responses: Tensor) -> VoxelPatches:
        """Patches of (batch, voxels) responses as stored, scaled by the training trials' mean and SD."""
        return cut_voxels(participant, self.scale(participant, responses), self.encoder.real(participant))

    def reconstruct(self, patches: VoxelPatches, hidden: Tensor) -> tuple[Tensor, VoxelEncoding]:
        """(batch, patches, voxels of a patch) predictions of every patch from those not hidden, and their encoding."""
        encoding = self.encoder(patches, hidden)
        batch, count = hidden.shape
        width = self.shape.decoder_width
        tokens = self.hidden_token.to(encoding.tokens.dtype).expand(batch, count, width)
        tokens = tokens.scatter(1, encoding.order[:, :, None].expand(-1, -1, width), self.enter(encoding.tokens).to(tokens.dtype))
        name = patches.participant
        tokens = tokens + self.place(self.encoder.places(name)) + self.person(self.encoder.people[name])
        tokens = torch.cat([self.enter(encoding.summary)[:, None], tokens], dim=1)
        for layer in self.layers:
            tokens = layer(tokens, NO_BIAS)
        decoded = self.norm(tokens[:, 1:])
        predicted = self.leave(decoded)
        if name in self.last:
            predicted = predicted + torch.einsum("bkw,kwv->bkv", decoded, self.last[name])
        return predicted, encoding


class VoxelScale(nn.Module):
    """Mean and standard deviation of each participant's voxels over the training trials."""

    def add(self, name: str, num_voxels: int) -> None:
        """Make room for a participant, unscaled."""
        self.register_buffer(f"mean_{name}", torch.zeros(num_voxels))
        self.register_buffer(f"sd_{name}", torch.ones(num_voxels))

    @torch.no_grad()
    def set(self, name: str, mean: Tensor, sd: Tensor) -> None:
        """Take over statistics; a voxel that never changes is scaled to zero."""
        self.get_buffer(f"mean_{name}").copy_(mean)
        self.get_buffer(f"sd_{name}").copy_(torch.where(sd > _SMALLEST_SD, sd, torch.inf))

    def forward(self, name: str, responses: Tensor) -> Tensor:
        """(batch, voxels) z-scores."""
        return (responses - self.get_buffer(f"mean_{name}")) / self.get_buffer(f"sd_{name}")


def patch_places(places_mm: Tensor, patch_voxels: int) -> tuple[Tensor, Tensor]:
    """(patches, 3) centres of patches of (voxels, 3) places, and (patches, voxels of a patch) which voxels are there.

    As many patches as are needed: none more where the number of voxels is divisible already.
    """
    count = -(-len(places_mm) // patch_voxels)
    missing = count * patch_voxels - len(places_mm)
    real = torch.ones(count * patch_voxels, dtype=torch.bool)
    real[len(places_mm) :] = False
    real = real.view(count, patch_voxels)
    padded = functional.pad(places_mm.float(), (0, 0, 0, missing)).view(count, patch_voxels, 3)
    return padded.sum(dim=1) / real.sum(dim=1, keepdim=True), real


def cut_voxels(participant: str, scaled: Tensor, real: Tensor) -> VoxelPatches:
    """Patches of (batch, voxels) scaled responses; ``real`` (patches, voxels of a patch) says where a voxel is."""
    padded = functional.pad(scaled, (0, real.numel() - scaled.shape[1]))
    return VoxelPatches(participant=participant, values=padded.view(len(scaled), *real.shape), real=real)


def choose_hidden_patches(scores: Tensor, ratio: float) -> Tensor:
    """(batch, patches) bool: the ``ratio`` of patches with the lowest uniform ``scores``, the same number in every item, never all."""
    count = scores.shape[1]
    chosen = min(count - 1, max(1, round(count * ratio)))
    return scores.argsort(dim=1).argsort(dim=1) < chosen


def masked_voxel_loss(predicted: Tensor, patches: VoxelPatches, hidden: Tensor) -> Tensor:
    """Mean squared error over the real voxels of hidden patches."""
    counted = hidden[:, :, None] & patches.real
    return torch.where(counted, (predicted - patches.values).square(), 0.0).sum() / counted.sum().clamp_min(1)


def predict_from_neighbours(patches: VoxelPatches, centres: Tensor, hidden: Tensor, *, neighbours: int = 2) -> Tensor:
    """(batch, patches, voxels of a patch): each patch predicted as the mean response of the nearest visible patches, the floor of reconstruction.

    ``centres`` (patches, any) are places whose distances count.
    """
    sums, counts = patches.values.sum(dim=2), patches.real.sum(dim=1).to(patches.values.dtype)
    distance = torch.cdist(centres.float(), centres.float())
    near = torch.where(hidden[:, None, :], torch.inf, distance[None])
    nearest = near.topk(min(neighbours, int((~hidden[0]).sum())), dim=2, largest=False).indices
    flat = nearest.flatten(1)
    mean = sums.gather(1, flat).view(nearest.shape).sum(dim=2) / counts[flat].view(nearest.shape).sum(dim=2)
    return mean[:, :, None].expand_as(patches.values)
