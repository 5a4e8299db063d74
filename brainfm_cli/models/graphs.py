"""Region series to graph tensors, batched and on any device: connectivity, edges, random-walk encodings, masking.

Nothing here is learned. Regions without a usable series (below coverage, constant) are absent nodes: their rows
and columns are zero and they take no part in attention, edges or readout.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Connectivity = Literal["pearson", "fisher-z"]
Edges = Literal["top-k", "threshold", "knn"]

NUM_WALK_STEPS = 5
# Fisher z diverges at |r| = 1, which duplicated series reach.
_LARGEST_R = 0.999999


@dataclass(frozen=True, kw_only=True)
class Graphs:
    """A batch of graphs in one atlas."""

    atlas: str
    """Atlas label."""
    features: Tensor
    """(batch, regions, regions) connectivity rows, zero diagonal, absent and hidden entries zero."""
    adjacency: Tensor
    """(batch, regions, regions) edge weights, symmetric, zero diagonal."""
    present: Tensor
    """(batch, regions) bool: the region has a series."""
    hidden: Tensor | None = None
    """(batch, regions) bool: masked for reconstruction; none where nothing is masked."""


def full_precision(device: torch.device) -> torch.autocast:
    """Inside, products are taken in 32 bits whatever the training's precision: which regions are joined hangs on the third digit."""
    return torch.autocast(device.type, enabled=False)


def known_complete(mask: Tensor) -> bool:
    """Whether every entry is known to be true. Looked up on CPUs only: a GPU would have to wait, and its kernels mask for nothing."""
    return mask.device.type == "cpu" and bool(mask.all())


def correlate(series: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
    """Pearson correlation of each item's first ``frames`` rows, and which regions are present.

    Parameters
    ----------
    series
        (batch, longest, regions); rows past an item's own length are ignored, NaN marks absent regions.
    frames
        (batch,) number of valid rows.

    Returns
    -------
    (batch, regions, regions) correlation with zero diagonal, absent regions zero; (batch, regions) bool.
    """
    valid = torch.arange(series.shape[1], device=series.device)[None, :, None] < frames[:, None, None]
    finite = (torch.isfinite(series) | ~valid).all(dim=1)
    centred = torch.where(valid & finite[:, None, :], series, 0.0)
    mean = centred.sum(dim=1, keepdim=True) / frames[:, None, None]
    centred = torch.where(valid, centred - mean, 0.0)
    norm = centred.square().sum(dim=1).sqrt()
    # a constant series leaves rounding only: relative to its mean, not to zero
    present = finite & (norm > 1e-5 * (mean[:, 0].abs() + 1e-12) * frames[:, None].sqrt())
    centred = centred * torch.where(present, 1.0 / norm.clamp_min(1e-30), 0.0)[:, None, :]
    correlation = torch.bmm(centred.transpose(1, 2), centred).clamp(-1.0, 1.0)
    correlation.diagonal(dim1=1, dim2=2).zero_()
    return correlation, present


def fisher_z(correlation: Tensor) -> Tensor:
    """Inverse hyperbolic tangent of correlations, clipped below 1."""
    return torch.atanh(correlation.clamp(-_LARGEST_R, _LARGEST_R))


def build_graphs(
    atlas: str,
    correlation: Tensor,
    present: Tensor,
    *,
    connectivity: Connectivity,
    edges: Edges,
    density: float,
    threshold: float,
) -> Graphs:
    """Graphs of what :func:`correlate` gives; features are not yet standardised."""
    adjacency = connect(correlation, present, edges=edges, density=density, threshold=threshold)
    features = fisher_z(correlation) if connectivity == "fisher-z" else correlation
    return Graphs(atlas=atlas, features=features, adjacency=adjacency, present=present)


def connect(correlation: Tensor, present: Tensor, *, edges: Edges, density: float, threshold: float) -> Tensor:
    """(batch, regions, regions) 0/1 edges, symmetric, without self-loops.

    ``top-k``: the K largest positive correlations of each region, K = ceil(density · regions), united both ways.
    ``knn``: the K regions with the nearest connectivity rows. ``threshold``: correlation above ``threshold``.
    Regions that are not ``present`` have no edges and no say in those of the others.
    """
    regions = correlation.shape[-1]
    usable = present[:, :, None] & present[:, None, :] & ~torch.eye(regions, dtype=torch.bool, device=correlation.device)
    correlation = torch.where(usable, correlation, 0.0)
    if edges == "threshold":
        return (correlation > threshold).to(correlation.dtype)
    score = correlation if edges == "top-k" else -torch.cdist(correlation, correlation)
    score = torch.where(usable, score, -torch.inf)
    k = min(regions - 1, math.ceil(density * regions - 1e-9))
    chosen = torch.zeros_like(correlation)
    values, places = score.topk(k, dim=-1, sorted=False)
    wanted = values > 0 if edges == "top-k" else values > -torch.inf
    chosen.scatter_(-1, places, wanted.to(chosen.dtype))
    return torch.maximum(chosen, chosen.transpose(1, 2))


def random_walk_encoding(adjacency: Tensor) -> Tensor:
    """(batch, regions, 5): the chance that a random walk is back at its region after 1 … 5 steps.

    diag((D⁻¹A)ᵏ) = diag(Sᵏ) with the symmetric S = D^-½ A D^-½, so two products give all five diagonals.
    """
    scale = _inverse_root(adjacency.sum(dim=-1))
    once = scale[:, :, None] * adjacency * scale[:, None, :]
    twice = torch.bmm(once, once)
    thrice = torch.bmm(twice, once)
    diagonals = (
        once.diagonal(dim1=1, dim2=2),
        twice.diagonal(dim1=1, dim2=2),
        thrice.diagonal(dim1=1, dim2=2),
        twice.square().sum(dim=-1),
        (twice * thrice).sum(dim=-1),
    )
    return torch.stack(diagonals, dim=-1)


def normalised_adjacency(adjacency: Tensor) -> Tensor:
    """D^-½ (A + I) D^-½, the propagation of a graph convolution (Kipf and Welling 2017)."""
    looped = adjacency + torch.eye(adjacency.shape[-1], device=adjacency.device, dtype=adjacency.dtype)
    scale = looped.sum(dim=-1).rsqrt()
    return scale[:, :, None] * looped * scale[:, None, :]


def hide_nodes(graphs: Graphs, hidden: Tensor, adjacency: Tensor) -> Graphs:
    """The graphs without hidden regions' rows and columns, with the edges that the visible regions have on their own.

    ``adjacency`` is :func:`connect` of the visible regions: edges of the whole graph would tell of the hidden ones, as
    places among the largest correlations that a hidden region takes are missing among the visible.
    """
    keep = (~hidden).to(graphs.features.dtype)
    return replace(graphs, features=graphs.features * keep[:, :, None] * keep[:, None, :], adjacency=adjacency, hidden=hidden)


def choose_hidden(present: Tensor, scores: Tensor, ratio: float) -> Tensor:
    """(batch, regions) bool: the ``ratio`` of each item's present regions that have the lowest random ``scores``."""
    count = (present.sum(dim=1) * ratio).round().clamp_min(1).long()
    ranked = torch.where(present, scores, torch.inf).argsort(dim=1).argsort(dim=1)
    return (ranked < count[:, None]) & present


def perturb(graphs: Graphs, drop_scores: Tensor, noise: Tensor, *, edge_drop: float, noise_scale: float) -> Graphs:
    """A light augmentation: each edge left out with probability ``edge_drop``, features with added noise.

    ``drop_scores`` (batch, regions, regions) uniform; the upper triangle decides, so each edge is drawn once.
    ``noise`` (batch, regions, regions) standard normal, symmetrised here.
    """
    kept = (drop_scores >= edge_drop).triu(1).to(graphs.adjacency.dtype)
    adjacency = graphs.adjacency * (kept + kept.transpose(1, 2))
    seen = graphs.present if graphs.hidden is None else graphs.present & ~graphs.hidden
    there = (seen[:, :, None] & seen[:, None, :]).to(graphs.features.dtype)
    features = graphs.features + (noise_scale * 0.5**0.5) * (noise + noise.transpose(1, 2)) * there
    features.diagonal(dim1=1, dim2=2).zero_()
    return replace(graphs, features=features, adjacency=adjacency)


def hashed_uniform(keys: Tensor, shape: tuple[int, ...], *, stream: int) -> Tensor:
    """(batch, *shape) uniform numbers in [0, 1) that depend on each item's key and the stream alone.

    The same on every device, rank and batch composition, so that masks survive resuming and sharding.
    Counter-based: the 'lowbias32' integer hash (Wellons) over key and position.
    """
    count = 1
    for size in shape:
        count *= size
    position = torch.arange(count, device=keys.device, dtype=torch.int64)
    start = _mix((keys ^ (stream * 0x9E3779B1)) & 0xFFFFFFFF)
    start = _mix(start ^ ((keys >> 32) & 0xFFFFFFFF))
    # the same factor less 2³², which compiled kernels can hold in 32 bits; the product modulo 2³² does not change
    bits = _mix((start[:, None] + position[None, :] * (0x9E3779B1 - (1 << 32))) & 0xFFFFFFFF)
    # 24 bits are exact in float32
    return ((bits >> 8).to(torch.float32) / 16777216.0).reshape(keys.shape[0], *shape)


def hashed_normal(keys: Tensor, shape: tuple[int, ...], *, stream: int) -> Tensor:
    """(batch, *shape) standard normal numbers that depend on each item's key and the stream alone."""
    uniform = hashed_uniform(keys, shape, stream=stream)
    return torch.erfinv((2.0 * uniform - 1.0).clamp(-0.9999999, 0.9999999)) * 2.0**0.5


def _mix(x: Tensor) -> Tensor:
    x = x ^ (x >> 16)
    x = (x * 0x7FEB352D) & 0xFFFFFFFF
    x = x ^ (x >> 15)
    x = (x * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def _inverse_root(degree: Tensor) -> Tensor:
    return torch.where(degree > 0, degree.clamp_min(1e-12).rsqrt(), 0.0)
