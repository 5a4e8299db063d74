"""Attributions of a model's inputs as numbers: how they are asked for, the mean maps, the shares of modalities and the checks on them.

:mod:`brainfm_cli.learning.explanation` computes them; reports read them, without torch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import stats

from brainfm_cli.config import Frozen
from brainfm_cli.learning.scores import Score

Baseline = Literal["zero", "mean-signal"]
_RESAMPLES = 2000
_ENDS = (2.5, 97.5)


class ExplanationSettings(Frozen):
    """How predictions are explained."""

    baselines: tuple[Baseline, ...] = Field(default=("zero", "mean-signal"), min_length=1)
    """zero: no fluctuation and no coupling; mean-signal: all regions carry the run's mean signal, all pairs its mean coupling."""
    steps: int = Field(default=64, ge=8)
    """Steps of the path from the baseline to the run."""
    most_steps: int = Field(default=1024, ge=8)
    """Steps are doubled up to this many while the gap is larger than ``tolerance``."""
    tolerance: float = Field(default=0.05, gt=0, lt=1)
    """Largest gap between the sum of attributions and the change of score, as a share of the change."""
    people: int | None = Field(default=None, ge=1)
    """Test people explained in each fold; all where unset. Each takes about as long as training on ``steps`` windows."""
    time_bins: int = Field(default=10, ge=1)
    """Parts of equal length of a run in the map of regions and time."""
    seed: int = 0
    """Seed of the random weights of the check and of the resamples."""


@dataclass(frozen=True, kw_only=True)
class Attribution:
    """One run's attributions against one baseline."""

    participant: str
    """Whose run."""
    atlas: str
    """Atlas label."""
    fold: int
    """Fold whose model is explained."""
    baseline: Baseline
    """Against what."""
    regions: dict[str, NDArray[np.float64]]
    """By modality, (regions,) sum of absolute attributions; an edge counts for both its regions."""
    signed: dict[str, NDArray[np.float64]]
    """The same of the attributions themselves."""
    times: dict[str, NDArray[np.float64]]
    """By modality that has time, (time bins, regions) sum of absolute attributions."""
    totals: dict[str, float]
    """Sum of absolute attributions by modality."""
    elements: dict[str, int]
    """Inputs by modality."""
    change: float
    """Score (log-odds, or the value) minus that of the baseline."""
    gap: float
    """Share of the change that the attributions miss."""
    steps: int
    """Steps taken."""

    def share(self, modality: str, *, per_element: bool) -> float:
        """Share of a modality in the sum of absolute attributions, or in that of their means per element."""
        sizes = {name: total / (self.elements[name] if per_element else 1) for name, total in self.totals.items()}
        whole = sum(sizes.values())
        return sizes[modality] / whole if whole > 0 else float("nan")


class ModalityShare(Frozen):
    """How much of the attributions is a modality's."""

    modality: str
    """series, connectivity …"""
    share: Score
    """Of the sum of absolute attributions, mean over people, with its interval over people."""
    share_per_element: Score
    """The same of absolute attributions per input, as modalities differ in the number of their inputs."""
    fold_agreement: float | None
    """Mean rank correlation of the maps of regions of different folds; none for a single fold."""
    random_agreement: float | None
    """Rank correlation of the map of regions with that of random encoder weights, head kept (Adebayo 2018): near 1, the map
    tells of the input and the head, not of what the encoder has learnt."""


class Explanation(Frozen):
    """What the predictions of one atlas rest on, against one baseline."""

    atlas: str
    """Atlas label."""
    baseline: Baseline
    """Against what."""
    people: int
    """People explained, each by the model of the fold in which they were tested."""
    steps: int
    """Most steps that were needed."""
    largest_gap: float
    """Largest gap of a run."""
    missed: int
    """Runs whose gap stayed above the tolerance."""
    modalities: tuple[ModalityShare, ...]
    """Shares and checks."""

    @property
    def warnings(self) -> tuple[str, ...]:
        """What should make the reader doubt."""
        found = []
        if self.missed:
            found.append(
                f"{self.missed} runs of {self.atlas} ({self.baseline}) miss completeness by up to {self.largest_gap:.0%} after {self.steps} steps."
            )
        return tuple(found)


@dataclass(frozen=True, kw_only=True)
class Maps:
    """Mean maps of one atlas and baseline; every person's attributions are divided by their absolute sum."""

    regions: dict[str, NDArray[np.float64]]
    """By modality, (regions,)."""
    signed: dict[str, NDArray[np.float64]]
    """By modality, (regions,): positive where the inputs spoke for the outcome."""
    times: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    """By modality with time, (time bins, regions)."""


def mean_maps(found: Sequence[Attribution]) -> Maps:
    """Means over runs of one atlas and baseline."""
    kept = [one for one in found if sum(one.totals.values()) > 0]
    size = [sum(one.totals.values()) for one in kept]

    def mean(which: Callable[[Attribution], Mapping[str, NDArray[np.float64]]]) -> dict[str, NDArray[np.float64]]:
        names = list(which(kept[0])) if kept else []
        return {name: np.mean([which(one)[name] / total for one, total in zip(kept, size, strict=True)], axis=0) for name in names}

    return Maps(regions=mean(lambda one: one.regions), signed=mean(lambda one: one.signed), times=mean(lambda one: one.times))


def summarise(found: Sequence[Attribution], random: Sequence[Attribution], settings: ExplanationSettings) -> list[Explanation]:
    """One :class:`Explanation` per atlas and baseline."""
    summaries = []
    for atlas, baseline in itertools.product(dict.fromkeys(one.atlas for one in found), settings.baselines):
        mine = [one for one in found if one.atlas == atlas and one.baseline == baseline]
        twins = [one for one in random if one.atlas == atlas and one.baseline == baseline]
        whole, twin = mean_maps(mine), mean_maps(twins)
        folds = [mean_maps([one for one in mine if one.fold == fold]) for fold in sorted({one.fold for one in mine})]
        summaries.append(
            Explanation(
                atlas=atlas,
                baseline=baseline,
                people=len({one.participant for one in mine}),
                steps=max(one.steps for one in mine),
                largest_gap=max(one.gap for one in mine),
                missed=sum(one.gap > settings.tolerance for one in mine),
                modalities=tuple(
                    ModalityShare(
                        modality=name,
                        share=_mean([one.share(name, per_element=False) for one in mine], settings.seed),
                        share_per_element=_mean([one.share(name, per_element=True) for one in mine], settings.seed),
                        fold_agreement=_mutual([maps.regions[name] for maps in folds if name in maps.regions]),
                        random_agreement=agreement(whole.regions[name], twin.regions[name]) if name in twin.regions else None,
                    )
                    for name in whole.regions
                ),
            )
        )
    return summaries


def agreement(first: NDArray[np.float64], second: NDArray[np.float64]) -> float | None:
    """Spearman's rank correlation of two maps of regions; none where one is constant."""
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(stats.spearmanr(first, second).statistic)


def _mutual(maps: Sequence[NDArray[np.float64]]) -> float | None:
    values = [value for first, second in itertools.combinations(maps, 2) if (value := agreement(first, second)) is not None]
    return float(np.mean(values)) if values else None


def _mean(values: Sequence[float], seed: int) -> Score:
    known = np.array([value for value in values if np.isfinite(value)])
    if not len(known):
        return Score(reason="nothing is attributed to any input")
    drawn = np.random.default_rng(seed).choice(known, (_RESAMPLES, len(known))).mean(1)
    low, high = np.percentile(drawn, _ENDS)
    return Score(value=float(known.mean()), low=float(low), high=float(high))
