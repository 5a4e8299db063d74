"""Small published networks that are trained from scratch on the people at hand, to stand beside a pretrained encoder on the same folds."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class BrainNetworkTransformer(nn.Module):
    """Connectivity rows as tokens, and a readout by clusters with orthonormal centres (Kan et al., NeurIPS 2022).

    As published: two transformer layers of the rows' own width, soft assignment of regions to clusters, the clusters'
    features reduced and read by a perceptron.
    """

    def __init__(self, regions: int, outputs: int, *, clusters: int = 10, layers: int = 2, feedforward: int = 256) -> None:
        super().__init__()
        heads = next(count for count in (4, 3, 2, 1) if regions % count == 0)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(regions, heads, feedforward, dropout=0.1, batch_first=True) for _ in range(layers)
        )
        centres = torch.empty(clusters, regions)
        nn.init.orthogonal_(centres)
        self.register_buffer("centres", centres)
        self.reduce = nn.Sequential(nn.Linear(regions, 8), nn.LeakyReLU())
        self.leave = nn.Sequential(nn.Linear(8 * clusters, 32), nn.LeakyReLU(), nn.Linear(32, outputs))

    def forward(self, rows: Tensor) -> Tensor:
        """(batch, outputs) from (batch, regions, regions) connectivity."""
        for layer in self.layers:
            rows = layer(rows)
        assigned = torch.softmax(rows @ self.get_buffer("centres").T, dim=2)
        read: Tensor = self.leave(self.reduce(assigned.transpose(1, 2) @ rows).flatten(1))
        return read


class SeriesNetwork(nn.Module):
    """A one-dimensional convolutional network over time, regions as channels; any length."""

    def __init__(self, regions: int, outputs: int, *, width: int = 32, dropout: float = 0.3) -> None:
        super().__init__()
        steps: list[nn.Module] = []
        for number in range(3):
            steps += [nn.Conv1d(width if number else regions, width, 7, padding=3), nn.GroupNorm(4, width), nn.GELU(), nn.AvgPool1d(2)]
        self.steps = nn.Sequential(*steps)
        self.leave = nn.Sequential(nn.Dropout(dropout), nn.Linear(2 * width, outputs))

    def forward(self, series: Tensor) -> Tensor:
        """(batch, outputs) from (batch, frames, regions) standardised series."""
        found = self.steps(series.transpose(1, 2))
        read: Tensor = self.leave(torch.cat([found.mean(dim=2), found.square().mean(dim=2)], dim=1))
        return read


class SliceNetwork(nn.Module):
    """A plain convolutional network of slices or cubes: four stages of one 3-convolution, each halving; mean and maximum at the end."""

    def __init__(self, width: int, *, dims: int = 2) -> None:
        super().__init__()
        kind = nn.Conv2d if dims == 2 else nn.Conv3d
        pool = nn.MaxPool2d(2) if dims == 2 else nn.MaxPool3d(2)
        steps: list[nn.Module] = []
        for number in range(4):
            before, after = (1 if number == 0 else width * 2 ** (number - 1)), width * 2**number
            steps += [kind(before, after, 3, padding=1), nn.GroupNorm(4, after), nn.GELU(), pool]
        self.steps = nn.Sequential(*steps)
        self.features = 2 * width * 8

    @staticmethod
    def width_for(parameters: int, *, dims: int = 2) -> int:
        """The width, a multiple of four, whose network has about so many parameters."""
        return max(4, 4 * round((parameters / (42 * 3**dims)) ** 0.5 / 4))

    def forward(self, images: Tensor) -> Tensor:
        """(slices, features) of (slices, *pixels) in [0, 1]."""
        found = self.steps(images[:, None]).flatten(2)
        return torch.cat([found.mean(dim=2), found.amax(dim=2)], dim=1)
