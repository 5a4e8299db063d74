"""Self-attention biased per head by edge weights.

The bias of head h between regions i and j is ``w[0, h] · adjacency[i, j] + w[1, h] · edge_prompt[i, j]``; tokens that
are no regions have none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional


@dataclass(frozen=True, kw_only=True)
class EdgeBias:
    """What attention knows about edges, over all tokens; shared by every layer of an encoder."""

    adjacency: Tensor | None
    """(batch, tokens, tokens) prompted adjacency."""
    prompt: Tensor | None
    """(1 or batch, tokens, tokens) edge prompt."""
    absent: Tensor | None
    """(batch, tokens) bool, never attended to; none where every token is present."""

    @classmethod
    def over_tokens(cls, adjacency: Tensor, prompt: Tensor | None, present: Tensor | None, *, num_extra: int) -> EdgeBias:
        """Region matrices padded for the ``num_extra`` tokens that stand before the regions."""
        pad = (num_extra, 0, num_extra, 0)
        return cls(
            adjacency=functional.pad(adjacency, pad),
            prompt=None if prompt is None else functional.pad(prompt, pad),
            absent=None if present is None else functional.pad(~present, (num_extra, 0)),
        )


NO_BIAS = EdgeBias(adjacency=None, prompt=None, absent=None)


def biased_attention(qkv: Tensor, bias: EdgeBias, weights: Tensor | None, *, dropout: float = 0.0) -> Tensor:
    """(batch, tokens, width) attended values.

    ``qkv`` is (batch, tokens, 3, heads, head width); ``weights`` (2, heads), none for unbiased attention.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(dim=0)
    mask = head_bias(bias, weights)
    mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    return mixed.transpose(1, 2).flatten(2)


def head_bias(bias: EdgeBias, weights: Tensor | None) -> Tensor | None:
    """(batch, heads or 1, tokens, tokens) additive attention bias; none where there is nothing to add."""
    total: Tensor | None = None
    if weights is not None and bias.adjacency is not None:
        total = weights[0, None, :, None, None] * bias.adjacency[:, None]
        if bias.prompt is not None:
            total = total + weights[1, None, :, None, None] * bias.prompt[:, None]
    if bias.absent is not None:
        blocked = torch.where(bias.absent, -torch.inf, 0.0)[:, None, None, :]
        total = blocked if total is None else total + blocked
    return total
