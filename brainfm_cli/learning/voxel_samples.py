"""From a packed voxel cohort to batches of single trials, and the statistics by which voxels are scaled.

A batch holds trials of one participant, as people have different voxels. Rows are read from disk when they are needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from brainfm_cli.bids.voxel_cohort import VoxelCohort
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.image_split import ImageSplit
from brainfm_cli.learning.samples import equal_share

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import NDArray

    # Person and trials of one rank's batch, and how many of these at the end another rank has as well.
    Part = tuple[int, NDArray[np.int64], int]

_CHUNK = 256  # trials read at a time


@dataclass(frozen=True, kw_only=True)
class TrialBatch:
    """Single trials of one participant, as stored."""

    participant: str
    """Whose."""
    responses: Tensor
    """(batch, voxels) float32, not yet scaled."""
    keys: Tensor
    """(batch,) int64: what random masks of each trial depend on; another in every epoch of training."""
    images: Tensor
    """(batch,) int64 number of the picture."""
    names: tuple[str, ...]
    """(batch,) its name."""
    captions: tuple[str, ...]
    """(batch,) one caption each, drawn anew in every epoch; the first in validation."""
    repeated: int = 0
    """Items at the end that another rank has as well."""

    @property
    def counted(self) -> Tensor:
        """(batch,) bool: false for those, which count once over all ranks."""
        return torch.arange(len(self.keys), device=self.keys.device) < len(self.keys) - self.repeated

    def to(self, device: torch.device) -> TrialBatch:
        """The same on a device."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in ("responses", "keys", "images")}
        return TrialBatch(participant=self.participant, names=self.names, captions=self.captions, repeated=self.repeated, **moved)


@dataclass(frozen=True, kw_only=True)
class PersonTrials:
    """Trials of one participant that take part in something."""

    participant: str
    """Whose."""
    rows: NDArray[np.int64]
    """(trials,) rows of the participant's store."""
    names: tuple[str, ...]
    """(trials,) pictures."""


def select_trials(cohort: VoxelCohort, split: ImageSplit, participants: Sequence[str], role: str, *, share: float = 1.0, seed: int = 0) -> tuple[PersonTrials, ...]:  # fmt: skip
    """Trials of one role of each participant, in the order of the store.

    ``share`` keeps that share of each participant's pictures, with all their repeats, drawn by name: what a person with less
    data would have.

    Raises
    ------
    InputDatasetError
        Somebody has no trial of that role.
    """
    found = []
    for key in participants:
        trials = cohort.trials_of(key)
        trials = trials[(split.roles(trials) == role).to_numpy()]
        if share < 1:
            names = sorted(set(trials["stimulus"]), key=lambda name: hashlib.sha256(f"{seed}|{name}".encode()).hexdigest())
            trials = trials[trials["stimulus"].isin(names[: max(2, round(share * len(names)))])]
        if trials.empty:
            raise InputDatasetError(
                f"participant {key} has no trial for {role}", where=cohort.root, fix="change the split, or leave the person out"
            )
        found.append(PersonTrials(participant=key, rows=trials["row"].to_numpy(np.int64), names=tuple(map(str, trials["stimulus"]))))
    return tuple(found)


def voxel_statistics(cohort: VoxelCohort, trials: PersonTrials) -> tuple[Tensor, Tensor]:
    """(voxels,) mean and SD over the given trials alone, streamed in double precision."""
    store = cohort.responses(trials.participant)
    total, squares = np.zeros(store.shape[1]), np.zeros(store.shape[1])
    shift = np.asarray(store[int(trials.rows[0])], np.float64)  # keeps the difference of squares exact
    for start in range(0, len(trials.rows), _CHUNK):
        part = np.asarray(store[trials.rows[start : start + _CHUNK]], np.float64) - shift
        total += part.sum(0)
        squares += (part**2).sum(0)
    mean = total / len(trials.rows)
    variance = np.clip(squares / len(trials.rows) - mean**2, 0, None)
    return torch.from_numpy((mean + shift).astype(np.float32)), torch.from_numpy(np.sqrt(variance).astype(np.float32))


def read_rows(cohort: VoxelCohort, participant: str, rows: NDArray[np.int64]) -> Tensor:
    """(rows, voxels) float32 copies of stored responses."""
    return torch.from_numpy(np.asarray(cohort.responses(participant)[rows], np.float32).copy())


@dataclass(frozen=True, kw_only=True)
class TrialBatches:
    """Batches of trials, as the training loop wants them."""

    cohort: VoxelCohort
    """Where the responses are."""
    trials: tuple[PersonTrials, ...]
    """Trials that train."""
    validation_trials: tuple[PersonTrials, ...]
    """Trials that choose the epoch."""
    batch_size: int
    """Trials per batch, at most."""
    seed: int
    """Of order, masks and captions."""
    captions_per_image: int | None = None
    """Captions that are drawn from, the first ones; all where unset."""

    @cached_property
    def numbers(self) -> Mapping[str, int]:
        """Number of each picture."""
        return {name: number for number, name in enumerate(sorted(self.cohort.stimuli))}

    @cached_property
    def num_batches(self) -> int:
        """Batches per epoch."""
        return len(self._plan(self.trials, None))

    def training(self, epoch: int, *, rank: int, world_size: int) -> Dataset[TrialBatch]:
        """One epoch of this rank's batches."""
        return _Batches(self, self.trials, self._shard(self._plan(self.trials, epoch), rank, world_size), epoch)

    def validation(self, *, rank: int, world_size: int) -> Dataset[TrialBatch] | None:
        """The same batches, masks and captions in every epoch."""
        if not self.validation_trials:
            return None
        return _Batches(self, self.validation_trials, self._shard(self._plan(self.validation_trials, None), rank, world_size), None)

    def captions_of(self, name: str) -> tuple[str, ...]:
        """The captions of a picture that may be drawn."""
        return self.cohort.stimuli[name].captions[: self.captions_per_image]

    def _plan(self, trials: Sequence[PersonTrials], epoch: int | None) -> list[tuple[int, NDArray[np.int64]]]:
        """Person and trials of every batch; in the order of the store without an epoch."""
        plans: list[tuple[int, NDArray[np.int64]]] = []
        for person, one in enumerate(trials):
            members = np.arange(len(one.rows))
            if epoch is not None:
                members = np.random.default_rng([self.seed, epoch, person]).permutation(members)
            plans += [(person, part) for part in np.array_split(members, -(-len(members) // self.batch_size))]
        if epoch is not None:
            plans = [plans[place] for place in np.random.default_rng([self.seed, epoch]).permutation(len(plans))]
        return plans

    @staticmethod
    def _shard(plans: list[tuple[int, NDArray[np.int64]]], rank: int, world_size: int) -> list[Part]:
        shares = [equal_share(len(members), rank=rank, world_size=world_size) for _, members in plans]
        return [(person, members[places], repeated) for (person, members), (places, repeated) in zip(plans, shares, strict=True)]


class _Batches(Dataset[TrialBatch]):
    """Batches by position."""

    def __init__(self, source: TrialBatches, trials: Sequence[PersonTrials], plans: Sequence[Part], epoch: int | None) -> None:
        self._source, self._trials, self._plans, self._epoch = source, trials, plans, epoch

    def __len__(self) -> int:
        return len(self._plans)

    def __getitem__(self, place: int) -> TrialBatch:
        person, members, repeated = self._plans[place]
        one, source = self._trials[person], self._source
        names = tuple(one.names[member] for member in members)
        keys = [_key(source.seed, one.participant, int(one.rows[member]), self._epoch) for member in members]
        return TrialBatch(
            participant=one.participant,
            responses=read_rows(source.cohort, one.participant, one.rows[members]),
            keys=torch.tensor(keys, dtype=torch.int64),
            images=torch.tensor([source.numbers[name] for name in names]),
            names=names,
            captions=tuple(self._caption(name, key) for name, key in zip(names, keys, strict=True)),
            repeated=repeated,
        )

    def _caption(self, name: str, key: int) -> str:
        said = self._source.captions_of(name)
        return said[0 if self._epoch is None else key % len(said)]


def _key(seed: int, participant: str, row: int, epoch: int | None) -> int:
    text = f"{seed}|{participant}|{row}|{'validation' if epoch is None else epoch}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def trial_table(cohort: VoxelCohort, split: ImageSplit, participant: str) -> pd.DataFrame:
    """One participant's trials with their role."""
    trials = cohort.trials_of(participant)
    return trials.assign(role=split.roles(trials))
