"""A hybrid masked autoencoder of MRI slices or cubes: ConvNeXt V2 stages for detail, a Transformer for the whole.

Stem (stride 4) → ConvNeXt V2 blocks → stride 8 → blocks → tokens (stride 16) with class token and registers → pre-norm Transformer on
the visible tokens. The maps of stride 4 and 8 are added to the tokens (detail path). The mask is drawn at stride 16; features are
multiplied with it before and after every depthwise convolution, and response normalisation sees visible places alone, so that hidden
pixels reach nothing: a test alters them and finds a difference of exactly 0. After ConvNeXt V2 (Woo et al., CVPR 2023), MCMAE (Gao et
al., NeurIPS 2022) and SparK (Tian et al., ICLR 2023). Two or three dimensions, by a setting; pure architecture, no files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from brainfm_cli.models.attention import NO_BIAS
from brainfm_cli.models.graph_encoder import TransformerLayer

Backbone = Literal["hybrid", "convnext", "transformer"]
STRIDE = 16
NUM_REGISTERS = 4
_POSITIONS = {2: 16, 3: 6}  # side of the learned grid of positions: 256 pixels, or 96 voxels
_KERNEL = 7
PLACE_CODE = 16
_MM = 100.0  # slices lie within about ± this


@dataclass(frozen=True, kw_only=True)
class MriShape:
    """Sizes of an encoder."""

    widths: tuple[int, int, int]
    """Channels at stride 4, 8 and 16; the last is a token's length."""
    depths: tuple[int, int, int]
    """ConvNeXt V2 blocks at stride 4 and 8, and layers at stride 16."""
    num_heads: int
    """Attention heads."""
    decoder_layers: int = 1
    """Transformer layers of the decoder, which only pretraining uses."""
    dims: int = 2
    """2 for slices, 3 for cubes."""
    backbone: Backbone = "hybrid"
    """hybrid; convnext replaces the Transformer by as many parameters of ConvNeXt V2 blocks; transformer has no convolution stages."""
    num_sequences: int = 8
    """Kinds of contrast."""
    num_planes: int = 3
    """Axial, coronal, sagittal."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What is known of each item beside its pixels."""

    sequence: Tensor
    """(batch,) number of the contrast."""
    plane: Tensor
    """(batch,) number of the plane."""
    z_mm: Tensor
    """(batch,) place along the normal, millimetres from the centre of the head."""

    def to(self, device: torch.device) -> Context:
        """The same on a device."""
        return Context(sequence=self.sequence.to(device), plane=self.plane.to(device), z_mm=self.z_mm.to(device))


@dataclass(frozen=True, kw_only=True)
class MriEncoding:
    """What the encoder makes of a batch."""

    summary: Tensor
    """(batch, width) normalised class token."""
    tokens: Tensor
    """(batch, visible cells, width) normalised tokens, in the order of the grid."""
    order: Tensor
    """(batch, visible cells) cell of each token in the flattened grid."""
    grid: tuple[int, ...]
    """Cells along each axis."""
    fine: Tensor | None
    """(batch, channels, *grid · 4) map of stride 4; none without convolutions."""
    middle: Tensor | None
    """(batch, channels, *grid · 2) map of stride 8; none without convolutions."""

    def token_map(self) -> Tensor:
        """(batch, width, *grid) of an encoding in which nothing was hidden."""
        return self.tokens.transpose(1, 2).unflatten(2, self.grid)


class ChannelNorm(nn.Module):
    """Layer norm over the channels of (batch, channels, *places)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


class ConvBlock(nn.Module):
    """ConvNeXt V2 block whose depthwise convolution and response normalisation see visible places alone."""

    def __init__(self, width: int, dims: int) -> None:
        super().__init__()
        kind = nn.Conv2d if dims == 2 else nn.Conv3d
        self.depthwise = kind(width, width, _KERNEL, padding=_KERNEL // 2, groups=width)
        self.norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.scale = nn.Parameter(torch.zeros(4 * width))
        self.shift = nn.Parameter(torch.zeros(4 * width))
        self.contract = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """(batch, width, *places) of the same shape; ``visible`` (batch, 1, *places) is 1 where nothing is hidden."""
        seen = x if visible is None else x * visible
        mixed = self.depthwise(seen)
        if visible is not None:
            mixed = mixed * visible
        inner = functional.gelu(self.expand(self.norm(mixed.movedim(1, -1))))
        inner = self._respond(inner, None if visible is None else visible.movedim(1, -1))
        out = x + self.contract(inner).movedim(-1, 1)
        return out if visible is None else out * visible

    def _respond(self, x: Tensor, visible: Tensor | None) -> Tensor:
        """Global response normalisation: each channel by its norm over visible places, relative to the mean over channels."""
        places = tuple(range(1, x.ndim - 1))
        counted = x if visible is None else x * visible
        # float32: sums of squares over 4,096 places overflow half precision
        norm = counted.float().square().sum(dim=places, keepdim=True).add(1e-12).sqrt()
        share = (norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)).to(x.dtype)
        return self.scale * (x * share) + self.shift + x


class Position(nn.Module):
    """A learned vector per cell of a reference grid, interpolated to the grid that is given."""

    def __init__(self, width: int, dims: int) -> None:
        super().__init__()
        self.dims = dims
        self.table = nn.Parameter(nn.init.normal_(torch.empty(1, width, *(_POSITIONS[dims],) * dims), std=0.02))

    def forward(self, grid: tuple[int, ...]) -> Tensor:
        """(cells, width)."""
        table: Tensor = self.table
        if tuple(table.shape[2:]) != grid:
            table = functional.interpolate(table, size=grid, mode="bilinear" if self.dims == 2 else "trilinear", align_corners=False)
        return table.flatten(2)[0].T


class MriEncoder(nn.Module):
    """Slices or cubes in [0, 1] to a class token, tokens of stride 16, and maps of stride 4 and 8."""

    def __init__(self, shape: MriShape) -> None:
        super().__init__()
        self.shape = shape
        kind = nn.Conv2d if shape.dims == 2 else nn.Conv3d
        first, second, width = shape.widths
        if shape.backbone == "transformer":
            self.patch = kind(1, width, STRIDE, stride=STRIDE)
        else:
            self.stem = kind(1, first, 4, stride=4)
            self.stem_norm = ChannelNorm(first)
            self.fine_blocks = nn.ModuleList(ConvBlock(first, shape.dims) for _ in range(shape.depths[0]))
            self.halve = nn.Sequential(ChannelNorm(first), kind(first, second, 2, stride=2))
            self.middle_blocks = nn.ModuleList(ConvBlock(second, shape.dims) for _ in range(shape.depths[1]))
            self.enter = nn.Sequential(ChannelNorm(second), kind(second, width, 2, stride=2))
            self.fine_detail = kind(first, width, 4, stride=4)
            self.middle_detail = kind(second, width, 2, stride=2)
        self.position = Position(width, shape.dims)
        self.sequence = nn.Embedding(shape.num_sequences, width)
        self.plane = nn.Embedding(shape.num_planes, width)
        self.height = nn.Linear(PLACE_CODE, width, bias=False)
        self.class_token = nn.Parameter(nn.init.normal_(torch.empty(1 + NUM_REGISTERS, width), std=0.02))
        if shape.backbone == "convnext":
            self.layers = nn.ModuleList(ConvBlock(width, shape.dims) for _ in range(_equal_depth(shape)))
        else:
            self.layers = nn.ModuleList(
                TransformerLayer(width, shape.num_heads, 4 * width, 0.0, edge_bias=False) for _ in range(shape.depths[2])
            )
        self.norm = nn.LayerNorm(width)
        for embedding in (self.sequence, self.plane):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, images: Tensor, context: Context, hidden: Tensor | None = None) -> MriEncoding:
        """Encoding of (batch, *pixels) images; ``hidden`` (batch, *cells) bool, as many in every item."""
        grid = tuple(size // STRIDE for size in images.shape[1:])
        fine = middle = None
        if self.shape.backbone == "transformer":
            cells = self.patch(images[:, None])
        else:
            cells, fine, middle = self._convolve(images[:, None], hidden)
        known = self.sequence(context.sequence) + self.plane(context.plane) + self.height(place_code(context.z_mm).to(cells.dtype))
        tokens = cells.flatten(2).transpose(1, 2) + self.position(grid) + known[:, None]
        if self.shape.backbone == "convnext":
            return self._pooled(tokens, known, hidden, grid, fine, middle)
        order = _visible_order(hidden, tokens)
        tokens = tokens.gather(1, order[:, :, None].expand(-1, -1, tokens.shape[2]))
        extra = self.class_token.to(tokens.dtype).expand(len(tokens), -1, -1)
        tokens = torch.cat([extra, tokens], dim=1)
        for layer in self.layers:
            tokens = layer(tokens, NO_BIAS)
        tokens = self.norm(tokens)
        return MriEncoding(summary=tokens[:, 0], tokens=tokens[:, 1 + NUM_REGISTERS :], order=order, grid=grid, fine=fine, middle=middle)

    def _convolve(self, images: Tensor, hidden: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        at = {factor: None if hidden is None else _spread(hidden, factor).to(images.dtype) for factor in (4, 2, 1)}
        x = self.stem_norm(self.stem(images))
        x = x if at[4] is None else x * at[4]
        for block in self.fine_blocks:
            x = block(x, at[4])
        fine = x
        x = self.halve(x)
        x = x if at[2] is None else x * at[2]
        for block in self.middle_blocks:
            x = block(x, at[2])
        return self.enter(x) + self.fine_detail(fine) + self.middle_detail(x), fine, x

    def _pooled(
        self, tokens: Tensor, known: Tensor, hidden: Tensor | None, grid: tuple[int, ...], fine: Tensor | None, middle: Tensor | None
    ) -> MriEncoding:
        """The convolutional variant: blocks on the map, and the mean over visible cells as class token."""
        visible = None if hidden is None else _spread(hidden, 1).to(tokens.dtype)
        x = tokens.transpose(1, 2).unflatten(2, grid)
        x = x if visible is None else x * visible
        for layer in self.layers:
            x = layer(x, visible)
        order = _visible_order(hidden, tokens)
        kept = x.flatten(2).transpose(1, 2).gather(1, order[:, :, None].expand(-1, -1, x.shape[1]))
        summary = self.norm(kept.mean(dim=1) + self.class_token[0] + known)
        return MriEncoding(summary=summary, tokens=self.norm(kept), order=order, grid=grid, fine=fine, middle=middle)


class MriAutoencoder(nn.Module):
    """The encoder, the decoder that fills hidden cells, and the projection that views are contrasted by."""

    def __init__(self, shape: MriShape, *, projection: int = 128) -> None:
        super().__init__()
        self.shape = shape
        width = shape.widths[2]
        self.encoder = MriEncoder(shape)
        self.enter = nn.Linear(width, width)
        self.hidden_token = nn.Parameter(nn.init.normal_(torch.empty(width), std=0.02))
        self.position = Position(width, shape.dims)
        self.layers = nn.ModuleList(
            TransformerLayer(width, shape.num_heads, 4 * width, 0.0, edge_bias=False) for _ in range(shape.decoder_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, STRIDE**shape.dims)
        self.project = nn.Linear(width, projection)

    def reconstruct(self, images: Tensor, context: Context, hidden: Tensor) -> tuple[Tensor, MriEncoding]:
        """(batch, *pixels) predicted intensities of every pixel from the visible cells, and their encoding."""
        encoding = self.encoder(images, context, hidden)
        return self.decode(encoding), encoding

    def decode(self, encoding: MriEncoding) -> Tensor:
        """(batch, *pixels) predicted intensities."""
        batch, width, count = len(encoding.summary), self.hidden_token.shape[0], math.prod(encoding.grid)
        tokens = self.hidden_token.to(encoding.tokens.dtype).expand(batch, count, width)
        tokens = tokens.scatter(1, encoding.order[:, :, None].expand(-1, -1, width), self.enter(encoding.tokens).to(tokens.dtype))
        tokens = torch.cat([self.enter(encoding.summary)[:, None], tokens + self.position(encoding.grid)], dim=1)
        for layer in self.layers:
            tokens = layer(tokens, NO_BIAS)
        return from_cells(self.leave(self.norm(tokens[:, 1:])), encoding.grid)

    def embed(self, summary: Tensor) -> Tensor:
        """(batch, projection) unit vectors of class tokens."""
        return functional.normalize(self.project(summary), dim=-1)


def _equal_depth(shape: MriShape) -> int:
    """ConvNeXt V2 blocks with as many parameters as the Transformer's layers."""
    width = shape.widths[2]
    layer = 12 * width**2 + 13 * width
    block = 8 * width**2 + (_KERNEL**shape.dims + 16) * width
    return max(1, round(shape.depths[2] * layer / block))


def place_code(z_mm: Tensor) -> Tensor:
    """(batch, 16) sines and cosines of eight wavelengths, from 200 mm down to 1.6 mm."""
    rates = math.pi / _MM * 2.0 ** torch.arange(PLACE_CODE // 2, device=z_mm.device)
    angle = z_mm.float()[:, None] * rates
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def _spread(hidden: Tensor, factor: int) -> Tensor:
    """(batch, 1, *cells · factor): true where a place is visible."""
    visible = ~hidden[:, None]
    for axis in range(2, visible.ndim):
        visible = visible.repeat_interleave(factor, dim=axis)
    return visible


def _visible_order(hidden: Tensor | None, tokens: Tensor) -> Tensor:
    if hidden is None:
        return torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
    flat = hidden.flatten(1)
    return flat.to(torch.int8).argsort(dim=1, stable=True)[:, : flat.shape[1] - int(flat[0].sum())]


def to_cells(images: Tensor) -> Tensor:
    """(batch, cells, pixels of a cell) of (batch, *pixels)."""
    dims = images.ndim - 1
    for axis in range(dims):
        images = images.unflatten(1 + 2 * axis, (-1, STRIDE))
    first = [1 + 2 * axis for axis in range(dims)]
    return images.permute(0, *first, *(place + 1 for place in first)).flatten(1 + dims).flatten(1, dims)


def from_cells(cells: Tensor, grid: tuple[int, ...]) -> Tensor:
    """(batch, *pixels) of (batch, cells, pixels of a cell)."""
    dims = len(grid)
    x = cells.unflatten(1, grid).unflatten(-1, (STRIDE,) * dims)
    x = x.permute(0, *(place for axis in range(dims) for place in (1 + axis, 1 + dims + axis)))
    for axis in range(dims):
        x = x.flatten(1 + axis, 2 + axis)
    return x


def choose_hidden_cells(scores: Tensor, brain: Tensor, ratio: float) -> Tensor:
    """(batch, *cells) bool: the same number in every item, spread evenly over cells with and without brain; never all.

    ``scores`` are uniform and ``brain`` bool, both (batch, *cells).
    """
    flat, inside = scores.flatten(1), brain.flatten(1)
    count = flat.shape[1]
    chosen = min(count - 1, max(1, round(count * ratio)))
    # a rank within one's own kind, as a share of that kind: the lowest shares are hidden, so both kinds lose the same part
    share = torch.zeros_like(flat)
    for kind in (inside, ~inside):
        rank = torch.where(kind, flat, torch.inf).argsort(dim=1).argsort(dim=1)
        share = torch.where(kind, (rank + flat) / kind.sum(dim=1, keepdim=True).clamp_min(1), share)
    return (share.argsort(dim=1).argsort(dim=1) < chosen).view(scores.shape)
