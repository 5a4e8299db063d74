"""From scores to probabilities: ordered grades by a cumulative link, discrete time by hazards of competing causes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

_EPS = 1e-3


class OrderedThresholds(nn.Module):
    """Proportional odds (McCullagh 1980): one score, and thresholds between neighbouring grades that stay in order."""

    def __init__(self, shares: Sequence[float]) -> None:
        """``shares`` of people per grade, lowest first: the thresholds start there."""
        super().__init__()
        grades = torch.tensor(list(shares), dtype=torch.float64).clamp_min(_EPS)
        cuts = torch.logit((grades.cumsum(0) / grades.sum())[:-1]).float()
        self.first = nn.Parameter(cuts[:1].clone())
        self.steps = nn.Parameter(torch.log(torch.expm1(cuts.diff().clamp_min(_EPS))))

    def thresholds(self) -> Tensor:
        """(grades − 1,) ascending."""
        return torch.cat([self.first, self.first + functional.softplus(self.steps).cumsum(0)])

    def forward(self, scores: Tensor) -> Tensor:
        """(people, grades) log probabilities of (people, 1) scores; higher scores, higher grades."""
        odds = self.thresholds() - scores
        low, high = functional.logsigmoid(odds), functional.logsigmoid(-odds)
        gap = self.thresholds().diff()
        between = low[:, 1:] + high[:, :-1] + torch.log(-torch.expm1(-gap))
        return torch.cat([low[:, :1], between, high[:, -1:]], dim=1)


class HazardBaseline(nn.Module):
    """Discrete time, proportional odds of each cause's hazard against nothing happening, one baseline per bin and cause."""

    def __init__(self, hazards: Tensor) -> None:
        """``hazards`` (bins, causes) of everybody: the baselines start there."""
        super().__init__()
        nothing = (1 - hazards.sum(1, keepdim=True)).clamp_min(_EPS)
        self.baseline = nn.Parameter(torch.log(hazards.clamp_min(_EPS) / nothing).float())

    def forward(self, scores: Tensor) -> Tensor:
        """(people, bins, 1 + causes) log probabilities of (people, causes) scores: nothing, then each cause."""
        odds = self.baseline[None] + scores[:, None, :]
        return torch.cat([torch.zeros_like(odds[:, :, :1]), odds], dim=2).log_softmax(dim=2)
