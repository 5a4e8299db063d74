"""What the predicting head reads from connectivity, beside the encoder's embedding.

A frozen encoder's embedding alone loses to linear models on connectivity (docs/results.md), so the head reads
blocks side by side: the prompted embedding; the connectivity itself (Fisher z); its matrix logarithm, in which
shifts add up (log-Euclidean: Arsigny 2006, Varoquaux 2010); and the same two between groups of regions. Which
blocks count is weighed where the head is fitted.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SHRINKAGE = 0.1
"""Share of the identity mixed into a correlation matrix before its logarithm; short runs make it singular."""
_LARGEST_R = 0.999
_SMALLEST_VARIANCE = 1e-3


def connectivity_blocks(correlation: Tensor, present: Tensor, groups: Tensor | None) -> dict[str, Tensor]:
    """Blocks of features of a batch of connectivity matrices, (batch, features) each.

    Parameters
    ----------
    correlation
        (batch, regions, regions) with zero diagonal; rows and columns of absent regions zero.
    present
        (batch, regions) bool.
    groups
        (regions, groups) 0/1: the group of each region; none leaves the group blocks out.

    Returns
    -------
    ``edges``: Fisher z of the upper triangle. ``edges_log``: matrix logarithm. ``groups`` and ``groups_log``:
    covariance of the groups' average series (mean connectivity within and between groups), and its logarithm.
    Off-diagonal entries of ``_log`` blocks are times √2, so that distances are those between matrices. Absent
    regions stand as uncorrelated with everything.
    """
    wide = correlation.double()
    regions = wide.shape[-1]
    rows, columns = torch.triu_indices(regions, regions, offset=1, device=wide.device)
    identity = torch.eye(regions, dtype=wide.dtype, device=wide.device)
    blocks = {
        "edges": torch.atanh(wide[:, rows, columns].clamp(-_LARGEST_R, _LARGEST_R)),
        "edges_log": _logarithm((1 - SHRINKAGE) * wide + identity),
    }
    if groups is not None:
        blocks |= _group_blocks(wide + torch.diag_embed(present.double()), present, groups.to(wide))
    return {name: values.float() for name, values in blocks.items()}


def _group_blocks(full: Tensor, present: Tensor, groups: Tensor) -> dict[str, Tensor]:
    members = present.to(groups)[:, :, None] * groups
    count = members.sum(dim=1)
    shares = members / count.clamp_min(1)[:, None, :]
    pooled = shares.transpose(1, 2) @ full @ shares
    rows, columns = torch.triu_indices(*pooled.shape[1:], device=full.device)
    filled = pooled + torch.diag_embed((count == 0).to(pooled))  # an empty group has variance 1: its logarithm is zero
    return {"groups": pooled[:, rows, columns], "groups_log": _logarithm(filled)}


def _logarithm(matrices: Tensor) -> Tensor:
    logarithm = _MatrixLogarithm.apply(matrices)
    rows, columns = torch.triu_indices(*matrices.shape[1:], device=matrices.device)
    return logarithm[:, rows, columns] * torch.where(rows == columns, 1.0, 2.0**0.5)


class _MatrixLogarithm(torch.autograd.Function):
    """(batch, n, n) logarithm of symmetric matrices, eigenvalues clipped below; its derivative by divided differences (Daleckii and Krein).

    That of an eigendecomposition is infinite where eigenvalues are equal, as those of short runs' correlations are.
    """

    @staticmethod
    def forward(ctx: Any, matrices: Tensor) -> Tensor:  # noqa: ANN401  (torch's context)
        values, vectors = torch.linalg.eigh(matrices)
        clipped = values.clamp_min(_SMALLEST_VARIANCE)
        ctx.save_for_backward(values, clipped, vectors)
        return (vectors * clipped.log()[:, None, :]) @ vectors.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        values, clipped, vectors = ctx.saved_tensors
        apart = values[:, :, None] - values[:, None, :]
        mean = (clipped[:, :, None] + clipped[:, None, :]) / 2
        near = apart.abs() < 1e-6 * mean
        slope = torch.where((values > _SMALLEST_VARIANCE)[:, :, None] & (values > _SMALLEST_VARIANCE)[:, None, :], 1 / mean, 0.0)
        rise = clipped.log()[:, :, None] - clipped.log()[:, None, :]
        kernel = torch.where(near, slope, rise / torch.where(near, 1.0, apart))
        symmetric = (gradient + gradient.transpose(1, 2)) / 2
        return vectors @ (kernel * (vectors.transpose(1, 2) @ symmetric @ vectors)) @ vectors.transpose(1, 2)


def network_couplings(correlation: Tensor, present: Tensor, shares: Tensor) -> Tensor:
    """(batch, pairs) logarithm of the covariance between networks, upper triangle row by row, diagonal included.

    A network's series is the mean of its regions' standardised series, weighted by ``shares`` (regions, networks);
    shifts of couplings add up in the logarithm (log-Euclidean: Arsigny 2006). A network without regions is alone.
    """
    full = correlation.double() + torch.diag_embed(present.double())
    members = present.double()[:, :, None] * shares.to(full)
    total = members.sum(dim=1)
    weights = members / total.clamp_min(1e-9)[:, None, :]
    pooled = weights.transpose(1, 2) @ full @ weights + torch.diag_embed((total == 0).to(full))
    # Variances fall with the number of regions; relative to their mean over networks they are alike in every atlas.
    scale = pooled.diagonal(dim1=1, dim2=2).mean(dim=1)[:, None, None]
    identity = torch.eye(pooled.shape[-1], dtype=pooled.dtype, device=pooled.device)
    values, vectors = torch.linalg.eigh(pooled / scale + SHRINKAGE * identity)
    logarithm = (vectors * values.clamp_min(_SMALLEST_VARIANCE).log()[:, None, :]) @ vectors.transpose(1, 2)
    rows, columns = torch.triu_indices(*logarithm.shape[1:], device=logarithm.device)
    return logarithm[:, rows, columns].float()
