"""Slices of a study to one answer: gated attention over slice features (Ilse et al., ICML 2018), which also says which slices counted."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_CLINICAL_WIDTH = 16


class StandardisedSlices(nn.Module):
    """What reads features of slices, each in units of its spread over training slices."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("spread", torch.ones(features))

    @torch.no_grad()
    def set_scale(self, mean: Tensor, spread: Tensor) -> None:
        """Take over the training slices' (features,) statistics; a feature that never changes is left out."""
        self.get_buffer("mean").copy_(mean)
        self.get_buffer("spread").copy_(torch.where(spread > 1e-6, spread, torch.inf))

    def standardised(self, slices: Tensor) -> Tensor:
        """(…, features) of the same shape."""
        return (slices - self.get_buffer("mean")) / self.get_buffer("spread")


class GatedAttentionHead(StandardisedSlices):
    """Standardised slice features, weighed by gated attention, then a small perceptron; clinical variables are fused with the study late.

    Clinical variables reach the answer directly and through a hidden layer beside the study's, so that an image adds to what a linear
    model of them says.
    """

    def __init__(
        self, features: int, outputs: int, *, width: int, dropout: float, clinical: int = 0, link: nn.Module | None = None
    ) -> None:
        """``link`` turns scores into probabilities where that needs parameters; it is kept and trained with the head."""
        super().__init__(features)
        self.link = link
        self.dropout = dropout
        self.enter = nn.Linear(features, width)
        self.value = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)
        self.score = nn.Linear(width, 1)
        self.leave = nn.Linear(width + (_CLINICAL_WIDTH if clinical else 0), outputs)
        self.clinical = nn.Linear(clinical, _CLINICAL_WIDTH) if clinical else None
        self.direct = nn.Linear(clinical, outputs, bias=False) if clinical else None

    @torch.no_grad()
    def start_from(self, weights: Tensor, bias: Tensor) -> None:
        """Begin as the linear model of clinical variables with (clinical, outputs) weights and (outputs,) bias: images add to it."""
        assert self.direct is not None  # noqa: S101  (only a head with clinical variables is asked to)
        self.direct.weight.copy_(weights.T)
        self.leave.weight.zero_()
        self.leave.bias.copy_(bias)

    def forward(self, slices: Tensor, present: Tensor, clinical: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(batch, outputs) scores and (batch, slices) weights that sum to one over the ``present`` (batch, slices) ones.

        ``clinical`` is (batch, clinical); none where the head has no such variables.
        """
        inner = functional.gelu(self.enter(self.standardised(slices)))
        inner = functional.dropout(inner, self.dropout, training=self.training)
        scores = self.score(torch.tanh(self.value(inner)) * torch.sigmoid(self.gate(inner)))[..., 0]
        weights = scores.masked_fill(~present, -torch.inf).softmax(dim=1)
        study = torch.einsum("bs,bsw->bw", weights, inner)
        study = functional.dropout(study, self.dropout, training=self.training)
        if self.clinical is None or self.direct is None or clinical is None:
            return self.leave(study), weights
        hidden = functional.dropout(functional.gelu(self.clinical(clinical)), self.dropout, training=self.training)
        return self.leave(torch.cat([study, hidden], dim=1)) + self.direct(clinical), weights
