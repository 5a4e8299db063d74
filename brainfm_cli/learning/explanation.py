"""What a prediction rests on: integrated gradients on every input of a tuned model, through its frozen encoder and its head.

Works with any system that offers :class:`Explainable`. An input is what one run gives the model by one way, a *modality*: region
series, connectivity. Attributions add up to the score minus that of a baseline (completeness; Sundararajan 2017); how far they
miss it is the gap, and steps are doubled until it is small. Nothing here writes files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.errors import UnsupportedStageError
from brainfm_cli.learning.attributions import Attribution, Baseline, ExplanationSettings
from brainfm_cli.learning.head_fit import FittedHead
from brainfm_cli.learning.samples import Windows, list_scans, whole_scans

SERIES, CONNECTIVITY = "series", "connectivity"
"""Names of the ways by which a run reaches the head."""
_SMALLEST_SHARE = 0.01  # of the sum of attributions: a smaller change of score is no scale for the gap


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
        score = torch.stack([(value.flatten(1) * 0).sum(dim=1).double() for value in values]).sum(dim=0)
        if missing := weights.keys() - blocks.keys():
            what = f"the head reads '{min(missing)}', which is no function of the run's own inputs"
            raise UnsupportedStageError(what, fix="tune a head without it (tuning.blocks), or leave 'explain' out")
        for name, weight in weights.items():
            score = score + blocks[name].double() @ weight.to(blocks[name].device)
        return score

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


def _binned(part: Tensor, bins: int) -> NDArray[np.float64]:
    """(bins, regions) sums of absolute values over equal parts of (frames, regions)."""
    return np.stack([piece.abs().sum(dim=0).cpu().numpy() for piece in torch.tensor_split(part, bins)])
