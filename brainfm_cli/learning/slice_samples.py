"""From a packed slice cohort to batches, streamed from disk; and who trains and who chooses the epoch, 8:2 by patient within each centre."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from brainfm_cli.bids.slice_cohort import PLANES, SEQUENCES, SliceCohort
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.samples import equal_share

if TYPE_CHECKING:
    from numpy.typing import NDArray

    # Slices of one rank's batch, and how many at their end another rank has as well.
    Part = tuple[NDArray[np.int64], int]


@dataclass(frozen=True, kw_only=True)
class SliceBatch:
    """Slices as stored."""

    images: Tensor
    """(batch, *pixels) uint8."""
    sequence: Tensor
    """(batch,) int64 number in the list of sequences."""
    plane: Tensor
    """(batch,) int64 number in the list of planes."""
    z_mm: Tensor
    """(batch,) float32."""
    participant: Tensor
    """(batch,) int64 code of the participant."""
    keys: Tensor
    """(items,) int64: what random masks and augmentations depend on; another in every epoch of training."""
    masks: Tensor | None = None
    """(items, *pixels) uint8 lesion labels; none where they are not asked for."""
    item: Tensor | None = None
    """(batch,) int64, ascending: of which item each slice is a sequence; none where every slice is an item."""
    repeated: int = 0
    """Items at the end that another rank has as well."""

    @property
    def counted(self) -> Tensor:
        """(batch,) bool: false for those, which count once over all ranks."""
        return torch.arange(len(self.keys), device=self.keys.device) < len(self.keys) - self.repeated

    def to(self, device: torch.device) -> SliceBatch:
        """The same on a device."""
        names = ("images", "sequence", "plane", "z_mm", "participant", "keys")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        further = {name: getattr(self, name) for name in ("masks", "item")}
        moved |= {name: value.to(device, non_blocking=True) for name, value in further.items() if value is not None}
        return SliceBatch(**moved, repeated=self.repeated)


@dataclass(frozen=True, kw_only=True)
class SlicePeople:
    """Who trains and who chooses the epoch."""

    table: pd.DataFrame
    """participant_id, site, role (train or validation)."""

    def role(self, name: str) -> tuple[str, ...]:
        """Participants of one role."""
        return tuple(self.table.loc[self.table["role"] == name, "participant_id"])


def divide_people(sites: Mapping[str, str], fraction: float, *, seed: int) -> SlicePeople:
    """People divided within each site, ``fraction`` of them to validation; who is drawn depends on the seed and the label alone.

    Raises
    ------
    InputDatasetError
        Fewer than two people.
    """
    if len(sites) < 2:
        raise InputDatasetError(f"{len(sites)} participants with slices: two are needed", fix="give a dataset with more participants")
    wanted = min(len(sites) - 1, max(1, round(fraction * len(sites)))) if fraction > 0 else 0
    ranked: list[tuple[float, str, str]] = []
    for site in sorted(set(sites.values())):
        members = sorted((label for label, of in sites.items() if of == site), key=lambda label: _hash(seed, label))
        # the share of the site that is drawn before this person: sites are drawn from in step
        ranked += [((place + 0.5) / len(members), _hash(seed, label), label) for place, label in enumerate(members)]
    held_out = {label for _, _, label in sorted(ranked)[:wanted]}
    rows = [(label, sites[label], "validation" if label in held_out else "train") for label in sorted(sites)]
    return SlicePeople(table=pd.DataFrame(rows, columns=["participant_id", "site", "role"]))


def _hash(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}|{text}".encode()).hexdigest()


def site_of_people(cohort: SliceCohort) -> dict[str, str]:
    """Site of each participant with slices."""
    first = cohort.slices.drop_duplicates("participant")
    return {str(label): str(site) for label, site in zip(first["participant"], first["site"], strict=True)}


def rows_of(cohort: SliceCohort, people: Sequence[str]) -> NDArray[np.int64]:
    """Places in the index of these people's slices, ascending."""
    return np.flatnonzero(cohort.slices["participant"].isin(list(people)).to_numpy())


def draw_rows(rows: NDArray[np.int64], most: int | None, *, seed: int) -> NDArray[np.int64]:
    """At most ``most`` of the rows, drawn once, ascending."""
    if most is None or len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


@dataclass(frozen=True, kw_only=True)
class SliceBatches:
    """Batches of slices, as the training loop wants them."""

    cohort: SliceCohort
    """Where the pixels are."""
    rows: NDArray[np.int64]
    """Slices that train."""
    validation_rows: NDArray[np.int64]
    """Slices that choose the epoch; empty where nobody is held out."""
    batch_size: int
    """Slices per batch, over all ranks."""
    seed: int
    """Of order, masks and augmentations."""
    per_epoch: int | None = None
    """Slices per epoch, drawn anew in each; all where unset."""
    masks: bool = False
    """Whether batches carry lesion labels."""
    together: Mapping[int, NDArray[np.int64]] | None = None
    """For each row the slices that show the same place in other sequences, itself among them: they are read as one item. None: each by itself."""
    hidden: float = 0.0
    """Share of training items with several sequences of which some are hidden, one up to all but one."""

    @cached_property
    def num_batches(self) -> int:
        """Batches per epoch; slices that fill no batch come in another epoch."""
        count = len(self.rows) if self.per_epoch is None else min(self.per_epoch, len(self.rows))
        return max(1, count // self.batch_size)

    def training(self, epoch: int, *, rank: int, world_size: int) -> Dataset[SliceBatch]:
        """One epoch of this rank's batches."""
        order = np.random.default_rng([self.seed, epoch]).permutation(self.rows)[: self.num_batches * self.batch_size]
        return _Batches(self, self._parts(order, rank, world_size), epoch)

    def validation(self, *, rank: int, world_size: int) -> Dataset[SliceBatch] | None:
        """The same slices, masks and augmentations in every epoch."""
        if not len(self.validation_rows):
            return None
        # slices of several people in each batch: views of one person are no negatives
        order = np.random.default_rng(self.seed).permutation(self.validation_rows)
        return _Batches(self, self._parts(order, rank, world_size), None)

    def _parts(self, order: NDArray[np.int64], rank: int, world_size: int) -> list[Part]:
        batches = [order[start : start + self.batch_size] for start in range(0, len(order), self.batch_size)]
        shares = [equal_share(len(members), rank=rank, world_size=world_size) for members in batches]
        return [(members[places], repeated) for members, (places, repeated) in zip(batches, shares, strict=True)]

    def batch(self, rows: NDArray[np.int64], epoch: int | None, repeated: int = 0) -> SliceBatch:
        """The slices at these places of the index, with those that are read together with them."""
        codes, read, item = self._codes, rows, None
        if self.together is not None:
            members = [self._shown(int(row), epoch) for row in rows]
            read, item = np.concatenate(members), torch.from_numpy(np.repeat(np.arange(len(rows)), [len(one) for one in members]))
        return SliceBatch(
            images=torch.from_numpy(self.cohort.items(read)),
            sequence=torch.from_numpy(codes["sequence"][read]),
            plane=torch.from_numpy(codes["plane"][read]),
            z_mm=torch.from_numpy(self._heights[read]),
            participant=torch.from_numpy(codes["participant"][read]),
            keys=torch.tensor([_key(self.seed, int(row), epoch) for row in rows], dtype=torch.int64),
            masks=torch.from_numpy(self.cohort.masks(rows)) if self.masks else None,
            item=item,
            repeated=repeated,
        )

    def _shown(self, row: int, epoch: int | None) -> NDArray[np.int64]:
        """The sequences of an item that are read, drawn anew in every epoch of training."""
        assert self.together is not None  # noqa: S101  (the caller looked)
        mine = self.together[row]
        draw = None if epoch is None else np.random.default_rng([self.seed, epoch, row])
        if draw is None or len(mine) < 2 or draw.random() >= self.hidden:
            return mine
        return np.sort(draw.choice(mine, int(draw.integers(1, len(mine))), replace=False))

    @cached_property
    def _heights(self) -> NDArray[np.float32]:
        return np.array(self.cohort.slices["z_mm"], np.float32)

    @cached_property
    def _codes(self) -> dict[str, NDArray[np.int64]]:
        table = self.cohort.slices
        return {
            "sequence": _numbers(table["sequence"], SEQUENCES),
            "plane": _numbers(table["plane"], PLANES),
            "participant": np.asarray(table["participant"].cat.codes, np.int64),
        }


def _numbers(column: pd.Series, names: Sequence[str]) -> NDArray[np.int64]:
    known = np.array([names.index(str(name)) for name in column.cat.categories], np.int64)
    return np.asarray(known[column.cat.codes.to_numpy()], np.int64)


def _key(seed: int, row: int, epoch: int | None) -> int:
    text = f"{seed}|{row}|{'validation' if epoch is None else epoch}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


class _Batches(Dataset[SliceBatch]):
    """Batches by place; pixels are read when they are asked for."""

    def __init__(self, source: SliceBatches, parts: Sequence[Part], epoch: int | None) -> None:
        self._source, self._parts, self._epoch = source, parts, epoch

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, place: int) -> SliceBatch:
        rows, repeated = self._parts[place]
        return self._source.batch(rows, self._epoch, repeated)


def all_slices(cohort: SliceCohort, together: Mapping[int, NDArray[np.int64]] | None = None) -> SliceBatches:
    """Batches of whichever slices :meth:`SliceBatches.batch` is asked for, without epochs."""
    nothing = np.array([], np.int64)
    return SliceBatches(cohort=cohort, rows=nothing, validation_rows=nothing, batch_size=1, seed=0, together=together)


def rows_together(cohort: SliceCohort, rows: NDArray[np.int64]) -> dict[int, NDArray[np.int64]]:
    """The given slices by the place that they show: those with the same number in scans of one session on one grid, under the first of them."""
    table = cohort.slices.iloc[rows]
    place = {(label, scan.name): scan.place for label in map(str, table["participant"].unique()) for scan in cohort.scans(label)}
    found: dict[tuple[object, ...], list[int]] = {}
    for row, label, scan, number in zip(rows.tolist(), table["participant"], table["scan"], table["slice"], strict=True):
        found.setdefault((label, place[label, scan], number), []).append(row)
    return {members[0]: np.array(members, np.int64) for members in found.values()}
