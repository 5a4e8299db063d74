"""Whether a map of what speaks for an answer lies where it should: on a lesion that was drawn, and not where a random network would look."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from brainfm_cli.config import Frozen
from brainfm_cli.learning.attributions import agreement

TOP_SHARE = 0.15
_MOST_VOXELS = 200_000


class Localisation(Frozen):
    """How a map agrees with a mask."""

    energy: float | None
    """Share of the map that lies in the mask; none where the map is zero everywhere."""
    chance: float
    """The same of a flat map: share of the head that the mask takes."""
    pointing: bool | None
    """Whether the map is largest inside the mask."""
    top_iou: float | None
    """Overlap (intersection over union) of the mask with the highest 15 % of the head."""

    @property
    def gain(self) -> float | None:
        """Energy over chance; 1 is a flat map."""
        return None if self.energy is None or not self.chance else self.energy / self.chance


def localise(values: NDArray[np.floating], mask: NDArray[np.bool_], head: NDArray[np.bool_]) -> Localisation:
    """Agreement of (x, y, z) values, not negative, with a mask; only the head counts."""
    inside, weights = mask & head, np.where(head, values, 0).astype(np.float64)
    chance = float(inside.sum() / max(1, head.sum()))
    total = float(weights.sum())
    if total <= 0:
        return Localisation(energy=None, chance=chance, pointing=None, top_iou=None)
    cut = np.quantile(weights[head], 1 - TOP_SHARE)
    top = head & (weights >= cut) & (weights > 0)
    return Localisation(
        energy=float(weights[inside].sum() / total),
        chance=chance,
        pointing=bool(inside.ravel()[weights.argmax()]),
        top_iou=float((top & inside).sum() / max(1, (top | inside).sum())),
    )


def random_agreement(values: NDArray[np.floating], random: NDArray[np.floating], head: NDArray[np.bool_]) -> float | None:
    """Rank correlation inside the head with the map of a random encoder (Adebayo et al. 2018); near 1 the map tells nothing of what was learnt."""
    step = max(1, int(head.sum()) // _MOST_VOXELS)
    return agreement(values[head][::step].astype(np.float64), random[head][::step].astype(np.float64))
