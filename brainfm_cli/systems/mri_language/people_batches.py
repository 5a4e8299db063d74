"""Batches of people, as the training loop wants them: their order, each rank's part, and the key that the random draws of a study depend on."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar

import numpy as np
from torch.utils.data import Dataset

Batch = TypeVar("Batch")


@dataclass(frozen=True, kw_only=True)
class PeopleBatches(ABC, Generic[Batch]):
    """Who trains, in another order in every epoch, and who chooses the epoch, always the same."""

    people: tuple[str, ...]
    """Who trains."""
    validation_people: tuple[str, ...]
    """Who chooses the epoch."""
    batch_size: int
    """Studies per batch."""
    seed: int
    """Of the order and of all draws."""

    @abstractmethod
    def batch(self, people: Sequence[str], epoch: int | None) -> Batch:
        """Studies of these people; without an epoch they are drawn as for validation."""

    @cached_property
    def num_batches(self) -> int:
        """Batches per epoch."""
        return -(-len(self.people) // self.batch_size)

    def training(self, epoch: int, *, rank: int, world_size: int) -> Dataset[Batch]:
        """One epoch of this rank's batches."""
        order = [self.people[place] for place in np.random.default_rng([self.seed, epoch]).permutation(len(self.people))]
        return _Batches(self, self._parts(order, rank, world_size), epoch)

    def validation(self, *, rank: int, world_size: int) -> Dataset[Batch] | None:
        """The same studies in every epoch."""
        return _Batches(self, self._parts(self.validation_people, rank, world_size), None) if self.validation_people else None

    def _parts(self, order: Sequence[str], rank: int, world_size: int) -> list[list[str]]:
        parts = [list(order[start : start + self.batch_size]) for start in range(0, len(order), self.batch_size)]
        return [part[rank::world_size] or part[:1] for part in parts]


class _Batches(Dataset[Batch]):
    """Batches by place."""

    def __init__(self, source: PeopleBatches[Batch], parts: list[list[str]], epoch: int | None) -> None:
        self._source, self._parts, self._epoch = source, parts, epoch

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, place: int) -> Batch:
        return self._source.batch(self._parts[place], self._epoch)


def study_key(seed: int, label: str, epoch: int | None) -> int:
    """What the random draws of a study depend on: the same in every run, another in every epoch of training."""
    text = f"{seed}|{label}|{'validation' if epoch is None else epoch}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1
