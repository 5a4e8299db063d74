"""Segmentation of slices: a small U-Net decoder on the frozen encoder's maps of stride 16, 8 and 4, and a full-resolution stem of its own."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from brainfm_cli.models.mri_encoder import Context, MriEncoder


class _Mix(nn.Module):
    """Two convolutions of 3 with group normalisation."""

    def __init__(self, before: int, after: int, dims: int) -> None:
        super().__init__()
        kind = nn.Conv2d if dims == 2 else nn.Conv3d
        self.layers = nn.Sequential(
            kind(before, after, 3, padding=1), nn.GroupNorm(4, after), nn.GELU(),
            kind(after, after, 3, padding=1), nn.GroupNorm(4, after), nn.GELU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """(batch, after, *places)."""
        return self.layers(x)


class MriSegmenter(nn.Module):
    """The encoder, which is frozen unless its weights are made trainable afterwards, and a decoder of logits at full resolution."""

    def __init__(self, encoder: MriEncoder, classes: int, *, width: int) -> None:
        super().__init__()
        shape = encoder.shape
        self.encoder = encoder.requires_grad_(requires_grad=False)
        self.dims = shape.dims
        kind = nn.Conv2d if shape.dims == 2 else nn.Conv3d
        self.deep = kind(shape.widths[2], width, 1)
        has_maps = shape.backbone != "transformer"
        self.middle = kind(shape.widths[1], width, 1) if has_maps else None
        self.fine = kind(shape.widths[0], width, 1) if has_maps else None
        self.stem = _Mix(1, width // 2, shape.dims)
        self.stem_half = kind(width // 2, width, 2, stride=2)
        self.mix = nn.ModuleList(_Mix(2 * width, width, shape.dims) for _ in range(3))
        self.last = _Mix(width + width // 2, width, shape.dims)
        self.leave = kind(width, classes, 1)

    def forward(self, images: Tensor, context: Context) -> Tensor:
        """(batch, classes, *pixels) logits of (batch, *pixels) images in [0, 1]; class 0 is no lesion."""
        trained = any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            encoding = self.encoder(images, context)
        full = self.stem(images[:, None])
        half = self.stem_half(full)
        x = self.deep(encoding.token_map())
        lateral = (
            self._lateral(self.middle, encoding.middle, x, 2),
            self._lateral(self.fine, encoding.fine, x, 4),
            half,
        )
        for mix, beside in zip(self.mix, lateral, strict=True):
            x = mix(torch.cat([self._resize(x, beside), beside], dim=1))
        return self.leave(self.last(torch.cat([self._resize(x, full), full], dim=1)))

    def _lateral(self, enter: nn.Module | None, given: Tensor | None, x: Tensor, factor: int) -> Tensor:
        if enter is None or given is None:
            return torch.zeros(*x.shape[:2], *(size * factor for size in x.shape[2:]), device=x.device, dtype=x.dtype)
        return enter(given)

    def _resize(self, x: Tensor, like: Tensor) -> Tensor:
        return functional.interpolate(x, size=like.shape[2:], mode="bilinear" if self.dims == 2 else "trilinear", align_corners=False)
