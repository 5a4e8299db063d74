"""Drug-response, optional alignment: the series encoder learns to tell which connectivity is of the same scan, without labels.

A scan's series in one window and its connectivity in another are drawn together, those of other people apart (NT-Xent; Chen 2020,
Radford 2021 across modalities). Masked patches go on being reconstructed, so that the encoder does not forget what no connectivity
shows. The connectivity tower is thrown away; what is kept is an ordinary series model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from brainfm_cli.bids.cohort import CohortAtlas
from brainfm_cli.config import Frozen
from brainfm_cli.learning import objectives
from brainfm_cli.learning.checkpoints import AtlasRecord
from brainfm_cli.learning.pretraining import Credits
from brainfm_cli.learning.samples import PretrainBatch, WindowRule, Windows
from brainfm_cli.models.graphs import correlate, fisher_z
from brainfm_cli.models.series_readout import sum_by_region
from brainfm_cli.systems.drug_response import DrugResponse


class PairSettings(Frozen):
    """How series and connectivity are drawn together."""

    weight: float = Field(default=1.0, gt=0)
    """Weight of the contrast; that of the reconstruction is the model's own."""
    temperature: float = Field(default=0.1, gt=0)
    """Of the contrast."""
    width: int = Field(default=64, ge=4)
    """Length of the vectors that are compared."""
    hidden: int = Field(default=128, ge=4)
    """Hidden length of the connectivity tower."""


@dataclass(frozen=True, kw_only=True)
class PairFactory:
    """Makes a model for alignment out of a pretrained one, in the form that pretraining asks for."""

    given: DrugResponse
    """The pretrained model; changed by the training."""
    settings: PairSettings
    """Contrast."""

    @property
    def credits(self) -> Credits:
        """As pretraining."""
        return self.given.settings.credits

    def remember(self, atlas: CohortAtlas) -> AtlasRecord:
        """The model's own record of the atlas.

        Raises
        ------
        CheckpointMismatchError
            The model was not made for it.
        """
        self.given.check_atlas(atlas)
        return self.given.atlases[atlas.label]

    def build(self, atlases: Mapping[str, AtlasRecord]) -> SeriesPairs:
        """The pretrained encoder with two fresh towers, from torch's global generator."""
        sizes = {label: len(record.regions) for label, record in atlases.items()}
        return SeriesPairs(given=self.given, settings=self.settings, pair=_Pair(self.given, sizes, self.settings))

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """Settings of the system."""
        return self.given.settings.model_dump(mode=mode)


class _Pair(nn.Module):
    """The backbone and the two towers."""

    def __init__(self, given: DrugResponse, sizes: Mapping[str, int], settings: PairSettings) -> None:
        super().__init__()
        self.backbone = given.module
        self.series = nn.Linear(2 * given.settings.shape.width, settings.width)
        self.connectivity = nn.ModuleDict(
            {
                label: nn.Sequential(
                    nn.Linear(regions * (regions - 1) // 2, settings.hidden), nn.GELU(), nn.Linear(settings.hidden, settings.width)
                )
                for label, regions in sorted(sizes.items())
            }
        )


@dataclass(frozen=True, kw_only=True)
class SeriesPairs:
    """What the training loop sees of an alignment."""

    given: DrugResponse
    """The model whose encoder learns."""
    settings: PairSettings
    """Contrast."""
    pair: _Pair
    """Everything that is trained."""

    @property
    def module(self) -> nn.Module:
        """The module that is trained."""
        return self.pair

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term."""
        return {"contrast": self.settings.weight, **self.given.loss_weights}

    @property
    def window_rule(self) -> WindowRule:
        """Windows of half a run at least, so that two of a scan differ."""
        rule = self.given.window_rule
        return WindowRule(min_seconds=rule.min_seconds, max_seconds=rule.max_seconds, min_share=0.5, setting=rule.setting)

    @property
    def cross_atlas_probability(self) -> float:
        """Nothing is compared between atlases."""
        return 0.0

    def fit_normalisation(self, windows: Iterable[Windows]) -> dict[str, Any]:  # noqa: ARG002
        """The pretrained scale stays."""
        return {}

    def losses(self, batch: PretrainBatch, *, epoch: float) -> dict[str, Tensor]:
        """The contrast, the reconstruction, and ``monitor_…`` values."""
        first, second = self.series_vectors(batch.first), self.connectivity_vectors(batch.second)
        contrast = objectives.nt_xent(
            objectives.gather_ranks(first),
            objectives.gather_ranks(second),
            dataset=objectives.gather_ranks(batch.dataset),
            participant=objectives.gather_ranks(batch.participant),
            temperature=self.settings.temperature,
            valid=objectives.gather_ranks(batch.counted),
        )
        return {"contrast": contrast, **self.given.losses(batch, epoch=epoch), "monitor_own_first": _own_first(first, second)}

    def series_vectors(self, windows: Windows) -> Tensor:
        """(batch, width) unit vectors of the series."""
        patches = self.given.patches(windows)
        encoding = self.given.model.series.encoder(patches)
        mean = sum_by_region(encoding, patches.usable).sum(dim=1) / patches.usable.sum(dim=(1, 2)).clamp_min(1)[:, None]
        return functional.normalize(self.pair.series(torch.cat([encoding.summary, mean], dim=1)).float(), dim=1)

    def connectivity_vectors(self, windows: Windows) -> Tensor:
        """(batch, width) unit vectors of the connectivity."""
        correlation, _ = correlate(windows.series, windows.frames)
        rows, columns = torch.triu_indices(correlation.shape[1], correlation.shape[2], offset=1, device=correlation.device)
        edges = fisher_z(correlation)[:, rows, columns]
        return functional.normalize(self.pair.connectivity[windows.atlas](edges).float(), dim=1)


def _own_first(first: Tensor, second: Tensor) -> Tensor:
    """Share of scans whose own connectivity is nearest to their series; chance is one over the batch."""
    nearest = (first.detach() @ second.detach().T).argmax(dim=1)
    return (nearest == torch.arange(len(first), device=first.device)).float().mean()
