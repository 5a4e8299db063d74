"""What alignment with texts learns in one atlas, and its loss: the pairwise sigmoid contrast of Zhai et al. (ICCV 2023)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from brainfm_cli.models.text_conditioning import ClauseCondition, PooledCondition, coupling_pairs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from brainfm_cli.models.text_conditioning import NetworkNames, StatedCouplings

Condition = Literal["clauses", "pooled"]


class AtlasAlignment(nn.Module):
    """What was learnt in one atlas."""

    def __init__(self, condition: Condition, *, regions: int, networks: int, text_width: int, token_width: int, readout_width: int) -> None:
        super().__init__()
        couplings = len(coupling_pairs(networks))
        self.register_buffer("shares", torch.zeros(regions, networks))
        self.register_buffer("mean", torch.zeros(couplings))
        self.register_buffer("scale", torch.ones(couplings))
        self.register_buffer("inverse", torch.eye(couplings))
        self.condition = ClauseCondition(token_width, text_width) if condition == "clauses" else None
        self.pooled = PooledCondition(text_width, token_width) if condition == "pooled" else None
        self.head = nn.Linear(readout_width, 1) if condition == "pooled" else None

    def standardised(self, couplings: Tensor) -> Tensor:
        """(people, couplings) in units of the spread of people without a disorder."""
        return (couplings - self.get_buffer("mean")) / self.get_buffer("scale")

    def logits(self, couplings: Tensor, nodes: Tensor | None, texts: Sequence[StatedCouplings], names: NetworkNames) -> Tensor:
        """(people, texts) of the clause condition."""
        assert self.condition is not None  # noqa: S101  (the caller knows the condition)
        directions = torch.stack([self.condition.direction(text, names) for text in texts])
        return self.condition(directions, self.standardised(couplings), self.get_buffer("inverse"), nodes)


def sigmoid_contrast(logits: Tensor, pairs: Tensor) -> Tensor:
    """Pairwise sigmoid loss of (people, texts) logits, Zhai et al. 2023; for every text, pairs and others weigh the same."""
    positive = pairs.to(logits.dtype)
    share = positive.sum(0, keepdim=True).clamp_min(1)
    weights = positive / share + (1 - positive) / (len(positive) - share).clamp_min(1)
    signs = 2 * positive - 1
    return 0.5 * (weights * functional.softplus(-signs * logits)).sum(0).mean()
