"""Training objectives as pure functions of tensors: masked nodes, masked edges, contrast, and a collapse alarm."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional


def mask_ratio(epoch: float, *, first: float, last: float, ramp_epochs: float) -> float:
    """Share of regions to hide: from ``first`` to ``last``, linearly over ``ramp_epochs`` (fractional) epochs."""
    progress = min(1.0, epoch / ramp_epochs) if ramp_epochs > 0 else 1.0
    return first + (last - first) * progress


def masked_node_loss(predicted: Tensor, target: Tensor, hidden: Tensor, present: Tensor) -> Tensor:
    """Mean smooth L1 over the rows of hidden regions, absent columns and the diagonal left out.

    ``predicted`` and ``target`` are (batch, regions, regions), ``hidden`` and ``present`` (batch, regions) bool.
    """
    counted = hidden[:, :, None] & present[:, None, :]
    diagonal = torch.eye(counted.shape[-1], dtype=torch.bool, device=counted.device)
    counted = counted & ~diagonal
    loss = functional.smooth_l1_loss(predicted, target, reduction="none")
    return over_ranks(torch.where(counted, loss, 0.0).sum() / counted.sum().clamp_min(1), counted.sum())


def masked_edge_loss(logits: Tensor, adjacency: Tensor, hidden: Tensor, present: Tensor, scores: Tensor) -> Tensor:
    """Binary cross-entropy of edges that touch a hidden region, against as many sampled non-edges (in expectation).

    ``logits``, ``adjacency`` (0/1) and the uniform ``scores`` are (batch, regions, regions); a non-edge is sampled
    where its score is below the item's ratio of edges to non-edges. Edges and non-edges weigh the same.
    """
    there = present[:, :, None] & present[:, None, :]
    diagonal = torch.eye(there.shape[-1], dtype=torch.bool, device=there.device)
    candidate = hidden[:, :, None] & there & ~diagonal
    edge = candidate & (adjacency > 0)
    absent = candidate & ~edge
    share = edge.sum(dim=(1, 2)) / absent.sum(dim=(1, 2)).clamp_min(1)
    sampled = absent & (scores < share[:, None, None])
    loss = functional.softplus(torch.where(edge, -logits, logits))
    positive = torch.where(edge, loss, 0.0).sum() / edge.sum().clamp_min(1)
    negative = torch.where(sampled, loss, 0.0).sum() / sampled.sum().clamp_min(1)
    return 0.5 * (over_ranks(positive, edge.sum()) + over_ranks(negative, sampled.sum()))


def nt_xent(
    first: Tensor, second: Tensor, *, dataset: Tensor, participant: Tensor, temperature: float, valid: Tensor | None = None
) -> Tensor:
    """Normalised-temperature cross-entropy between two views, negatives from the same dataset and other people only.

    Parameters
    ----------
    first, second
        (batch, width) unit vectors; row i of both is the same scan.
    dataset, participant
        (batch,) codes. Scans of one participant are never negatives of one another; other datasets neither, so that
        scanner and site do not solve the task.
    valid
        (batch,) bool; rows without a second view take no part.

    Returns
    -------
    The mean over anchors that have a negative, both views being anchors; zero (with gradient zero) where none has.
    """
    batch = first.shape[0]
    both = torch.cat([first, second]).float()
    similarity = both @ both.T / temperature
    negative = (dataset[:, None] == dataset[None, :]) & (participant[:, None] != participant[None, :])
    if valid is not None:
        negative = negative & valid[:, None] & valid[None, :]
    negative = negative.repeat(2, 2)
    place = torch.arange(2 * batch, device=first.device)
    positive = similarity[place, (place + batch) % (2 * batch)]
    allowed = similarity.masked_fill(~negative, -torch.inf)
    counted = negative.any(dim=1)
    # rows without negatives would be log(exp(p)) - p = 0; kept finite, then left out of the mean
    total = torch.logsumexp(torch.cat([positive[:, None], allowed], dim=1), dim=1)
    loss = torch.where(counted, total - positive, 0.0)
    return loss.sum() / counted.sum().clamp_min(1)


def distinct_rows(rows: Tensor, *, tolerance: float = 1e-3) -> Tensor:
    """Mean number of clearly different rows per item of (batch, rows, width): 1 means a collapsed decoder.

    Rows count as equal where they differ by less than ``tolerance`` of the item's largest entry.
    """
    rows = rows.detach().float()
    scale = rows.abs().amax(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    near = torch.cdist(rows / scale, rows / scale, p=float("inf")) < tolerance
    # a row is counted unless an earlier one equals it
    earlier = near.tril(-1).any(dim=2)
    return (~earlier).sum(dim=1).float().mean()


def embedding_spread(vectors: Tensor) -> Tensor:
    """Standard deviation over the batch of (batch, width) vectors, averaged over the width: 0 means collapse."""
    return vectors.detach().float().std(dim=0, correction=0).mean()


def effective_rank(vectors: Tensor) -> Tensor:
    """Exponential of the entropy of the batch's singular values (Roy and Vetterli 2007): 1 means that all lie on one line."""
    centred = vectors.detach().float()
    values = torch.linalg.svdvals(centred - centred.mean(dim=0))
    shares = values / values.sum().clamp_min(1e-12)
    return torch.exp(-torch.xlogy(shares, shares).sum())


def over_ranks(mean: Tensor, count: Tensor) -> Tensor:
    """A rank's mean over ``count`` items, scaled so that its average over ranks is the mean over the items of all of them.

    Ranks average their gradients, whatever share of the counted items each has.
    """
    if _alone():
        return mean
    counts = gather_ranks(count.detach().reshape(1).to(mean.dtype))
    return mean * (count * len(counts) / counts.sum().clamp_min(1))


def _alone() -> bool:
    return not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1


def gather_ranks(x: Tensor) -> Tensor:
    """The rows of every rank, in rank order, with gradients to all of them; ``x`` itself on one rank."""
    if _alone():
        return x
    gathered: Tensor = _Gather.apply(x)
    return gathered


class _Gather(torch.autograd.Function):
    """Rows of all ranks; each rank's rows get the sum of all ranks' gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # noqa: ANN401  (torch's context)
        ctx.rows = len(x)
        parts = [torch.empty_like(x) for _ in range(distributed.get_world_size())]
        distributed.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # noqa: ANN401
        gradient = gradient.contiguous()
        distributed.all_reduce(gradient)
        first = distributed.get_rank() * ctx.rows
        return gradient[first : first + ctx.rows]
