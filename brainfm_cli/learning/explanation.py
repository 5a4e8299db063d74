"""What a prediction rests on: integrated gradients on every input of a tuned model, through its frozen encoder and its head.

Works with any system that offers :class:`Explainable`. An input is what one run gives the model by one way, a *modality*: region
series, connectivity. Attributions add up to the score minus that of a baseline (completeness; Sundararajan 2017); how far they
miss it is the gap, and steps are doubled until it is small. Nothing here writes files.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from scipy import stats
from torch import Tensor, nn

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.config import Frozen
from brainfm_cli.errors import UnsupportedStageError
from brainfm_cli.learning.head_fit import FittedHead
from brainfm_cli.learning.samples import Windows, list_scans, whole_scans
from brainfm_cli.learning.scores import Score

Baseline = Literal["zero", "mean-signal"]
_SMALLEST_SHARE = 0.01  # of the sum of attributions: a smaller change of score is no scale for the gap
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
class Modality:
    """What one run gives the model by one way."""

    values: Tensor
    """(1, …, regions) input; zero in absent regions."""
    present: Tensor
    """(regions,) bool: the region takes part."""
    symmetric: bool
    """The values are (1, regions, regions), each pair twice; otherwise (1, frames, regions)."""

    @property
    def elements(self) -> int:
        """Number of inputs that may differ: frames of present regions, or pairs of them."""
        regions = int(self.present.sum())
        return regions * (regions - 1) // 2 if self.symmetric else regions * self.values.shape[1]

    def baseline(self, kind: Baseline) -> Tensor:
        """An input of the same shape that tells nothing: see :class:`ExplanationSettings`."""
        if kind == "zero":
            return torch.zeros_like(self.values)
        there = self.present.to(self.values)
        if not self.symmetric:
            mean = (self.values * there).sum(dim=-1, keepdim=True) / there.sum().clamp_min(1)
            return mean * there
        pairs = there[:, None] * there - torch.diag_embed(there)
        return (self.values * pairs).sum() / pairs.sum().clamp_min(1) * pairs[None]


class Explainable(Protocol):
    """What an explanation needs of a system."""

    @property
    def module(self) -> nn.Module:
        """The frozen backbone."""

    def new_prompt(self, atlas: str) -> nn.Module:
        """A prompt at its pretrained state."""

    def modalities(self, windows: Windows) -> dict[str, Modality]:
        """What the model reads of the one run in ``windows``, by modality."""

    def blocks_of(self, values: Mapping[str, Tensor], windows: Windows, prompt: Any) -> dict[str, Tensor]:  # noqa: ANN401
        """Blocks of a head, (rows, features) each, of (rows, …) inputs that stand in for those of the run; gradients reach the inputs."""

    def randomised(self, seed: int) -> Any:  # noqa: ANN401  (an Explainable)
        """The same with random weights."""


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


def integrated_gradients(
    forward: Callable[..., Tensor], inputs: Sequence[Tensor], baselines: Sequence[Tensor], settings: ExplanationSettings
) -> tuple[list[Tensor], float, float, int]:
    """Attributions of one item's inputs, the change of score, the gap as a share of it, and the steps taken.

    ``forward`` takes one (rows, …) tensor per input and gives (rows,) scores; ``inputs`` have one row. The path is integrated
    by Gauss–Legendre quadrature; steps are doubled while the gap is larger than the tolerance. Where positive and negative
    attributions all but cancel, the gap is a share of a hundredth of their absolute sum instead.
    """
    from captum.attr import IntegratedGradients

    explainer = IntegratedGradients(forward)
    with torch.no_grad():
        change = float(forward(*inputs)) - float(forward(*baselines))
    steps = settings.steps
    while True:
        parts = explainer.attribute(tuple(inputs), tuple(baselines), n_steps=steps, method="gausslegendre", internal_batch_size=16)
        found = [part.detach().double() for part in parts]
        scale = max(abs(change), _SMALLEST_SHARE * sum(float(part.abs().sum()) for part in found), 1e-12)
        gap = abs(sum(float(part.sum()) for part in found) - change) / scale
        if gap <= settings.tolerance or 2 * steps > settings.most_steps:
            return found, change, gap, steps
        steps *= 2


def attribute_run(
    system: Explainable, windows: Windows, prompt: Mapping[str, Tensor], head: FittedHead, baseline: Baseline, settings: ExplanationSettings
) -> tuple[dict[str, Tensor], dict[str, Modality], float, float, int]:
    """(attributions by modality, inputs, change, gap, steps) of the one run in ``windows``.

    Explained are the log-odds of the second of two classes, the score of the last of several, or the value.
    """
    given = system.modalities(windows)
    names = list(given)
    module = system.new_prompt(windows.atlas)
    module.load_state_dict(dict(prompt))
    module.requires_grad_(False)  # noqa: FBT003
    weights = {name: torch.from_numpy(head.slope * values[:, -1]) for name, values in head.weights.items()}

    def forward(*values: Tensor) -> Tensor:
        blocks = system.blocks_of(dict(zip(names, values, strict=True)), windows, module)
        # added to the inputs' own zero, so that gradients exist for a modality that the head does not read
        nothing = sum((value.flatten(1) * 0).sum(dim=1).double() for value in values)
        return nothing + sum(blocks[name].double() @ weight.to(blocks[name].device) for name, weight in weights.items())

    inputs = [one.values for one in given.values()]
    parts, change, gap, steps = integrated_gradients(forward, inputs, [one.baseline(baseline) for one in given.values()], settings)
    return dict(zip(names, parts, strict=True)), given, change, gap, steps


class FoldExplainer:
    """Explains test people by the model of their own fold, as an evaluation goes through the folds (first repetition only)."""

    def __init__(self, cohort: Cohort, settings: ExplanationSettings) -> None:
        self._cohort, self._settings = cohort, settings
        self.found: list[Attribution] = []
        self.random: list[Attribution] = []
        """The same people and baseline (the first), the encoder's weights random, the head kept."""

    def __call__(self, system: Any, atlases: Mapping[str, Any], test: Sequence[str], *, repeat: int, fold: int) -> None:  # noqa: ANN401
        """Explain ``test`` with ``atlases`` (prompt and head by label) of one fold.

        Raises
        ------
        UnsupportedStageError
            The system offers no explanation.
        """
        if not hasattr(system, "blocks_of"):
            raise UnsupportedStageError("this system's predictions cannot be explained by integrated gradients", fix="leave 'explain' out")
        if repeat != 1:
            return
        people = list(test)[: self._settings.people]
        twin = system.randomised(self._settings.seed)
        twin.module.to(next(system.module.parameters()).device)
        for module in (system.module, twin.module):
            module.requires_grad_(False)  # noqa: FBT003  (only the inputs' gradients are wanted)
            module.eval()
        for label, model in atlases.items():
            for baseline in self._settings.baselines:
                self.found += self._explain(system, label, model, people, baseline, fold)
            self.random += self._explain(twin, label, model, people, self._settings.baselines[0], fold)

    def _explain(self, system: Any, atlas: str, model: Any, people: Sequence[str], baseline: Baseline, fold: int) -> list[Attribution]:  # noqa: ANN401
        device = next(system.module.parameters()).device
        found = []
        having = set(self._cohort.index.loc[self._cohort.index["atlas"] == atlas, "participant"])
        for scan in list_scans(self._cohort, [name for name in people if name in having], [atlas]):
            windows = whole_scans(self._cohort, [scan], atlas).to(device)
            parts, given, change, gap, steps = attribute_run(system, windows, model.prompt, model.head, baseline, self._settings)
            one = Attribution(
                participant=scan.participant,
                atlas=atlas,
                fold=fold,
                baseline=baseline,
                regions={name: part.abs().sum(dim=1)[0].cpu().numpy() for name, part in parts.items()},
                signed={name: part.sum(dim=1)[0].cpu().numpy() for name, part in parts.items()},
                times={name: _binned(part[0], self._settings.time_bins) for name, part in parts.items() if not given[name].symmetric},
                totals={name: float(part.abs().sum()) for name, part in parts.items()},
                elements={name: modality.elements for name, modality in given.items()},
                change=change,
                gap=gap,
                steps=steps,
            )
            found.append(one)
        return found


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


def _binned(part: Tensor, bins: int) -> NDArray[np.float64]:
    """(bins, regions) sums of absolute values over equal parts of (frames, regions)."""
    return np.stack([piece.abs().sum(dim=0).cpu().numpy() for piece in torch.tensor_split(part, bins)])
