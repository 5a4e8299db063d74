"""Low-rank additions to linear layers (Hu et al., ICLR 2022): few weights are trained, and those of the layer stay as they are."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

ADAPTED = ("qkv", "merge", "expand", "contract")
"""Linear layers that are adapted: attention and feed-forward, of Transformer layers and ConvNeXt blocks."""
_ADDED = (".down", ".up")
_BASE = ".base."


class LowRank(nn.Module):
    """A frozen linear layer plus ``alpha / rank · up · down``; nothing is added at the start."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.base = base.requires_grad_(requires_grad=False)
        self.scale = alpha / rank
        like = base.weight
        self.down = nn.Parameter(torch.empty(rank, base.in_features, dtype=like.dtype, device=like.device))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, dtype=like.dtype, device=like.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        """(…, out) of (…, in)."""
        added = nn.functional.linear(nn.functional.linear(x, self.down), self.up)
        return self.base(x) + self.scale * added


def add_low_rank(module: nn.Module, rank: int, alpha: float, names: Sequence[str] = ADAPTED) -> int:
    """Freeze ``module`` and adapt its linear layers of these ``names``, in place; gives back how many."""
    module.requires_grad_(requires_grad=False)
    found = [(parent, name, child) for parent in module.modules() for name, child in parent.named_children() if name in names and isinstance(child, nn.Linear)]  # fmt: skip
    for parent, name, child in found:
        setattr(parent, name, LowRank(child, min(rank, child.in_features, child.out_features), alpha))
    return len(found)


def low_rank_tensors(module: nn.Module) -> dict[str, Tensor]:
    """What was added."""
    return {name: value for name, value in module.state_dict().items() if name.endswith(_ADDED)}


def plain_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The weights without what was added, under the names they have in a module that was never adapted."""
    return {name.replace(_BASE, "."): value for name, value in module.state_dict().items() if not name.endswith(_ADDED)}
