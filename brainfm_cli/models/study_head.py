"""Slices of a study to one answer: gated attention over slice features (Ilse et al., ICML 2018), which also says which slices counted."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


class GatedAttentionHead(nn.Module):
    """Standardised slice features, weighed by gated attention, then a small perceptron."""

    def __init__(self, features: int, outputs: int, *, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))
        self.enter = nn.Linear(features, width)
        self.value = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)
        self.score = nn.Linear(width, 1)
        self.leave = nn.Linear(width, outputs)

    @torch.no_grad()
    def set_scale(self, mean: Tensor, spread: Tensor) -> None:
        """Take over the training slices' (features,) statistics; a feature that never changes is left out."""
        self.get_buffer("mean").copy_(mean)
        self.get_buffer("spread").copy_(torch.where(spread > 1e-6, spread, torch.inf))

    def forward(self, slices: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, outputs) logits and (batch, slices) weights that sum to one over the ``present`` (batch, slices) ones."""
        inner = functional.gelu(self.enter((slices - self.get_buffer("mean")) / self.get_buffer("spread")))
        inner = functional.dropout(inner, self.dropout, training=self.training)
        scores = self.score(torch.tanh(self.value(inner)) * torch.sigmoid(self.gate(inner)))[..., 0]
        weights = scores.masked_fill(~present, -torch.inf).softmax(dim=1)
        study = torch.einsum("bs,bsw->bw", weights, inner)
        return self.leave(functional.dropout(study, self.dropout, training=self.training)), weights
