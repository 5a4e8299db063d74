"""Studies with what is to be said of them, as batches: slice features, the vector of the report, and one conversation drawn per study and epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from brainfm_cli.models.mri_encoder import Context
from brainfm_cli.systems.mri_language.people_batches import PeopleBatches, study_key

Turns = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class ToldBatch:
    """Studies side by side."""

    slices: Tensor
    """(batch, most slices, features), zero where a study has fewer."""
    present: Tensor
    """(batch, most slices) bool."""
    context: Context
    """Fields (batch, most slices)."""
    targets: Tensor
    """(batch, contrast width) unit vectors of reports."""
    groups: Tensor
    """(batch,) int64: studies of one group say the same."""
    turns: tuple[Turns, ...]
    """One conversation per study."""
    keys: Tensor
    """(batch,) int64."""

    def to(self, device: torch.device) -> ToldBatch:
        """The same on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("slices", "present", "targets", "groups", "keys")}
        return ToldBatch(**moved, context=self.context.to(device), turns=self.turns)


@dataclass(frozen=True, kw_only=True)
class ToldStudies(PeopleBatches[ToldBatch]):
    """Batches of studies, as the training loop wants them."""

    slices: Mapping[str, Tensor]
    """(slices, features) by participant."""
    contexts: Mapping[str, Context]
    """Fields (slices,) by participant."""
    targets: Mapping[str, Tensor]
    """(contrast width,) by participant."""
    groups: Mapping[str, int]
    """By participant."""
    conversations: Mapping[str, tuple[Turns, ...]]
    """What may be taught of each participant, facts in the question."""
    without_facts: Mapping[str, tuple[Turns, ...]]
    """The same without facts."""
    drop_sequence: float
    """Share of training studies of which a sequence is hidden."""
    drop_facts: float
    """Share of training studies whose facts are left out."""

    def batch(self, people: Sequence[str], epoch: int | None) -> ToldBatch:
        """Studies of these people."""
        most = max(len(self.slices[label]) for label in people)
        width = next(iter(self.slices.values())).shape[1]
        slices, present = torch.zeros(len(people), most, width), torch.zeros(len(people), most, dtype=torch.bool)
        context = {name: torch.zeros(len(people), most, dtype=torch.float32 if name == "z_mm" else torch.int64) for name in ("sequence", "plane", "z_mm")}  # fmt: skip
        keys, turns = [], []
        for place, label in enumerate(people):
            found = self.slices[label]
            keys.append(study_key(self.seed, label, epoch))
            draw = np.random.default_rng(keys[-1])
            slices[place, : len(found)] = found
            present[place, : len(found)] = self._kept(label, draw, training=epoch is not None)
            for name, row in context.items():
                row[place, : len(found)] = getattr(self.contexts[label], name)
            turns.append(self._drawn(label, draw, training=epoch is not None))
        return ToldBatch(
            slices=slices,
            present=present,
            context=Context(**context),
            targets=torch.stack([self.targets[label] for label in people]),
            groups=torch.tensor([self.groups[label] for label in people]),
            turns=tuple(turns),
            keys=torch.tensor(keys),
        )

    def _kept(self, label: str, draw: np.random.Generator, *, training: bool) -> Tensor:
        numbers = self.contexts[label].sequence
        kinds = numbers.unique()
        hides = draw.random() < self.drop_sequence
        if not training or len(kinds) < 2 or not hides:
            return torch.ones(len(numbers), dtype=torch.bool)
        return numbers != kinds[int(draw.integers(len(kinds)))]

    def _drawn(self, label: str, draw: np.random.Generator, *, training: bool) -> Turns:
        hides = training and draw.random() < self.drop_facts
        known = (self.without_facts if hides else self.conversations)[label]
        return known[int(draw.integers(len(known)))]
