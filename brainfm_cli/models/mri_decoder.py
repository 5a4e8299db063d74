"""Segmentation of slices: a small U-Net decoder on the frozen encoder's maps of stride 16, 8 and 4, and a full-resolution stem of its own.

Where several sequences show one place, each goes through the encoder, and their maps become one before the decoder reads them.
"""

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


class _Join(nn.Module):
    """Maps of the sequences of one place as one map, whichever and however many there are, in any order.

    Each map is widened, scaled and shifted by its sequence (FiLM, Perez et al., AAAI 2018), then their mean and maximum are mixed: after
    HeMIS (Havaei et al., MICCAI 2016), whose moments over the modalities at hand are its mean and variance.
    """

    def __init__(self, width: int, num_sequences: int, dims: int) -> None:
        super().__init__()
        kind = nn.Conv2d if dims == 2 else nn.Conv3d
        self.enter = kind(width, 2 * width, 1)
        self.scale = nn.Embedding(num_sequences, 2 * width)
        self.shift = nn.Embedding(num_sequences, 2 * width)
        nn.init.zeros_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)
        self.leave = kind(4 * width, width, 1)

    def forward(self, x: Tensor, sequence: Tensor, item: Tensor) -> Tensor:
        """(items, width, *places) of (slices, width, *places); ``item`` (slices,) is ascending and leaves no item out."""
        shape = (len(x), -1, *(1,) * (x.ndim - 2))
        x = functional.gelu(self.enter(x) * (1 + self.scale(sequence).view(shape)) + self.shift(sequence).view(shape))
        counts = torch.bincount(item)
        place = torch.arange(len(item), device=item.device) - (counts.cumsum(0) - counts)[item]
        together = x.new_full((len(counts), int(counts.max()), *x.shape[1:]), -torch.inf)
        together[item, place] = x
        mean = torch.where(together > -torch.inf, together, 0).sum(dim=1) / counts.view(-1, *(1,) * (x.ndim - 1))
        return self.leave(torch.cat([mean, together.amax(dim=1)], dim=1))


class MriSegmenter(nn.Module):
    """The encoder, which is frozen unless its weights are made trainable afterwards, and a decoder of logits at full resolution.

    ``together`` makes one map of logits of all sequences of a place; without it every slice has its own.
    """

    def __init__(self, encoder: MriEncoder, classes: int, *, width: int, together: bool = False) -> None:
        super().__init__()
        shape = encoder.shape
        self.encoder = encoder.requires_grad_(requires_grad=False)
        self.dims, self.together = shape.dims, together
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
        joins = {"deep": width, "middle": width, "fine": width, "full": width // 2} if together else {}
        if not has_maps:
            joins = {name: size for name, size in joins.items() if name in {"deep", "full"}}
        self.join = nn.ModuleDict({name: _Join(size, shape.num_sequences, shape.dims) for name, size in joins.items()})

    def forward(self, images: Tensor, context: Context, item: Tensor | None = None) -> Tensor:
        """(items, classes, *pixels) logits of (slices, *pixels) images in [0, 1]; class 0 is no lesion.

        ``item`` (slices,) says of which item each slice is a sequence, in ascending order; unset, every slice is one.
        """
        trained = any(parameter.requires_grad for parameter in self.encoder.parameters())
        with torch.set_grad_enabled(trained and torch.is_grad_enabled()):
            encoding = self.encoder(images, context)
        whose = torch.arange(len(images), device=images.device) if item is None else item
        full = self._joined("full", self.stem(images[:, None]), context.sequence, whose)
        half = self.stem_half(full)
        x = self._joined("deep", self.deep(encoding.token_map()), context.sequence, whose)
        maps = (("middle", self.middle, encoding.middle, 2), ("fine", self.fine, encoding.fine, 4))
        lateral = (*(self._lateral(name, enter, given, x, factor, context.sequence, whose) for name, enter, given, factor in maps), half)
        for mix, beside in zip(self.mix, lateral, strict=True):
            x = mix(torch.cat([self._resize(x, beside), beside], dim=1))
        return self.leave(self.last(torch.cat([self._resize(x, full), full], dim=1)))

    def _joined(self, name: str, x: Tensor, sequence: Tensor, item: Tensor) -> Tensor:
        return self.join[name](x, sequence, item) if self.together else x

    def _lateral(
        self, name: str, enter: nn.Module | None, given: Tensor | None, x: Tensor, factor: int, sequence: Tensor, item: Tensor
    ) -> Tensor:
        if enter is None or given is None:
            return torch.zeros(*x.shape[:2], *(size * factor for size in x.shape[2:]), device=x.device, dtype=x.dtype)
        return self._joined(name, enter(given), sequence, item)

    def _resize(self, x: Tensor, like: Tensor) -> Tensor:
        return functional.interpolate(x, size=like.shape[2:], mode="bilinear" if self.dims == 2 else "trilinear", align_corners=False)
