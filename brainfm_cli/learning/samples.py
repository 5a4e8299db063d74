"""From a packed cohort to batches: which people, which windows, in which order.

Everything random is a function of (seed, epoch, sample), never of what was drawn before, so that a run that was
killed goes on with the very same batches. A batch holds one atlas. No imaging library.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, SettingsError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_SCAN = ["dataset", "participant", "session", "run"]
_ROUNDING = 1e-6  # 200 s at 0.8 s are 250 frames, whatever binary fractions make of it


@dataclass(frozen=True, kw_only=True)
class Scan:
    """One run of one person, in every atlas it was parcellated with."""

    dataset: str
    """Name of the dataset."""
    participant: str
    """Participant key."""
    site: str
    """Site or scanner, empty where unknown."""
    name: str
    """Dataset, participant, session and run in one text; unique."""
    repetition_time_s: float
    """Seconds between frames."""
    rows: Mapping[str, Any]
    """Index row per atlas label."""


@dataclass(frozen=True, kw_only=True)
class WindowRule:
    """How long the random windows of pretraining are; a run that is too short for one is left out."""

    min_frames: int = 1
    """Frames of the shortest window."""
    min_seconds: float = 0.0
    """Seconds of the shortest window."""
    max_seconds: float = math.inf
    """Seconds of the longest window."""
    min_share: float = 0.5
    """Shortest window as a share of the longest."""
    setting: str = "the shortest window"
    """What to lower where no run is long enough, for the message."""

    def fewest(self, repetition_time_s: float) -> int:
        """Frames of the shortest run that is used."""
        return max(self.min_frames, math.ceil(self.min_seconds / repetition_time_s - _ROUNDING)) if self.min_seconds else self.min_frames

    def most(self, frames: int, repetition_time_s: float) -> int:
        """Frames of the longest window of a run."""
        return frames if math.isinf(self.max_seconds) else min(frames, int(self.max_seconds / repetition_time_s + _ROUNDING))


_ANY_LENGTH = WindowRule()


@dataclass(frozen=True, kw_only=True)
class Windows:
    """A batch of windows in one atlas, padded to the longest."""

    atlas: str
    """Atlas label."""
    series: Tensor
    """(batch, longest, regions) float32, zero past each item's own length, NaN in absent regions."""
    frames: Tensor
    """(batch,) int64 valid frames."""
    seconds: Tensor
    """(batch,) window length in seconds."""

    def to(self, device: torch.device) -> Windows:
        """The same on a device."""
        return _moved(self, device)


@dataclass(frozen=True, kw_only=True)
class PretrainBatch:
    """Two windows of each scan in one atlas, and where there is one a third in another atlas."""

    first: Windows
    """One window of each scan."""
    second: Windows
    """Another window of each scan."""
    crossed: bool
    """The plan asks for a view in another atlas; the same on every rank, even where ``other`` is none."""
    other: Windows | None
    """A window in another atlas of the scans in ``other_rows``; none where no scan has that atlas."""
    other_rows: Tensor
    """Positions in the batch of the scans in ``other``."""
    keys: Tensor
    """(batch,) int64: what random numbers of each item depend on."""
    dataset: Tensor
    """(batch,) int64 code of the dataset."""
    participant: Tensor
    """(batch,) int64 code of the participant."""
    counted: Tensor
    """(batch,) bool: false for a scan that another rank has as well, so that all ranks have equally many."""

    def to(self, device: torch.device) -> PretrainBatch:
        """The same on a device."""
        return _moved(self, device)


@dataclass(frozen=True, kw_only=True)
class BatchPlan:
    """Which scans form a batch."""

    atlas: str
    """Atlas label."""
    scans: tuple[int, ...]
    """Positions in the list of scans."""
    other_atlas: str | None
    """Atlas of the cross-atlas view; none where there is none."""
    epoch: int
    """Epoch the windows are drawn for."""
    repeated: int = 0
    """How many scans at the end another rank has as well."""


def select_participants(cohort: Cohort, where: Mapping[str, Sequence[str]], labels: Sequence[str] = ()) -> list[str]:
    """Sorted participant keys whose columns have the allowed values, and whose label is listed where labels are.

    Raises
    ------
    SettingsError
        A column of ``where`` is not in participants.tsv.
    InputNotFoundError
        Nobody is left.
    """
    table = cohort.participants
    chosen = np.ones(len(table), bool)
    for column, allowed in where.items():
        if column not in table:
            raise SettingsError(
                f"'where' names the column '{column}', which participants.tsv does not have",
                where=cohort.root / "participants.tsv",
                fix=f"use one of: {', '.join(map(str, table.columns))}",
            )
        chosen &= table[column].map(_plain).isin([_plain(value) for value in allowed]).to_numpy()
    if labels:
        wanted = set(labels)
        chosen &= np.array([key in wanted or key.rpartition("+")[2] in wanted for key in table.index])
    scanned = set(cohort.index["participant"])
    keys = sorted(key for key in table.index[chosen] if key in scanned)
    if not keys:
        raise InputNotFoundError(
            "no participant with series matches the filters", where=cohort.root, fix="relax 'where' or --participant-label"
        )
    return keys


def list_scans(cohort: Cohort, participants: Sequence[str], atlases: Sequence[str], *, rule: WindowRule = _ANY_LENGTH) -> list[Scan]:
    """Scans of these people in these atlases, sorted by name; runs shorter than the rule's shortest window are left out.

    Raises
    ------
    InputDatasetError
        No run is long enough.
    """
    index = cohort.index
    index = index[index["participant"].isin(set(participants)) & index["atlas"].isin(set(atlases))]
    if rule.min_seconds and not (index["repetition_time"] > 0).all():
        unknown = index.loc[~(index["repetition_time"] > 0), "participant"].iloc[0]
        raise InputDatasetError(
            f"the repetition time of a run of {unknown} is unknown, and windows are in seconds",
            where=cohort.root,
            fix="state it when parcellating (--set repetition_time_s=SECONDS), and pack again",
        )
    fewest = index["repetition_time"].map(rule.fewest)
    long_enough = index[index["frames"] >= fewest]
    if long_enough.empty:
        longest = int(index["frames"].max()) if len(index) else 0
        raise InputDatasetError(
            f"no run has {int(fewest.min()) if len(index) else rule.min_frames} frames (the longest has {longest})",
            where=cohort.root,
            fix=f"lower {rule.setting}, or give longer runs",
        )
    by_scan: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in long_enough.fillna({"session": "", "run": "", "site": ""}).itertuples():
        by_scan.setdefault(tuple(str(getattr(row, column)) for column in _SCAN), {})[str(row.atlas)] = row
    return [_scan(key, rows) for key, rows in sorted(by_scan.items())]


def _scan(key: tuple[str, ...], rows: Mapping[str, Any]) -> Scan:
    first = rows[min(rows)]
    return Scan(
        dataset=key[0],
        participant=key[1],
        site=str(first.site),
        name="|".join(key),
        repetition_time_s=float(first.repetition_time),
        rows=dict(sorted(rows.items())),
    )


def hold_out(participants: Sequence[str], fraction: float, *, seed: int) -> tuple[list[str], list[str]]:
    """Training and validation people; who is held out depends on the seed and the person's key alone."""
    count = min(len(participants) - 1, max(1, round(fraction * len(participants)))) if fraction > 0 else 0
    ranked = sorted(participants, key=lambda key: hashlib.sha256(f"{seed}|{key}".encode()).hexdigest())
    return sorted(ranked[count:]), sorted(ranked[:count])


def plan_epoch(
    scans: Sequence[Scan],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    cross_atlas: float = 0.0,
    shuffle: bool = True,
    atlases: Collection[str] = (),
) -> list[BatchPlan]:
    """The batches of one epoch: every scan once in each of its atlases, batches of near-equal size, in random order.

    Where ``atlases`` are given, only these have batches; the others give views across atlases alone.
    """
    plans = []
    labels = sorted({label for scan in scans for label in scan.rows if not atlases or label in atlases})
    for number, label in enumerate(labels):
        members = np.array([place for place, scan in enumerate(scans) if label in scan.rows])
        if shuffle:
            members = np.random.default_rng([seed, epoch, number]).permutation(members)
        draw = np.random.default_rng([seed, epoch, number, 1])
        for group in np.array_split(members, -(-len(members) // batch_size)):
            others = sorted({other for place in group for other in scans[place].rows} - {label})
            crossed = bool(draw.random() < cross_atlas)
            other = str(others[int(draw.integers(len(others)))]) if others and crossed else None
            plans.append(BatchPlan(atlas=label, scans=tuple(map(int, group)), other_atlas=other, epoch=epoch))
    if shuffle:
        order = np.random.default_rng([seed, epoch]).permutation(len(plans))
        plans = [plans[place] for place in order]
    return plans


def shard(plan: BatchPlan, *, rank: int, world_size: int) -> BatchPlan:
    """One rank's share of a batch; shares are equally large, the first scans coming twice, but counting once, where they must."""
    if world_size == 1:
        return plan
    places, repeated = equal_share(len(plan.scans), rank=rank, world_size=world_size)
    return replace(plan, scans=tuple(plan.scans[place] for place in places), repeated=repeated)


def equal_share(count: int, *, rank: int, world_size: int) -> tuple[NDArray[np.int64], int]:
    """Places of one rank's items among ``count``, and how many at their end another rank has as well.

    Ranks follow one another, so that what is gathered from them is in the order of one rank.
    """
    size = -(-count // world_size)
    return np.arange(rank * size, (rank + 1) * size) % count, min(size, max(0, (rank + 1) * size - count))


class PretrainSamples(Dataset[PretrainBatch]):
    """Batches of a list of plans: item ``i`` is the whole batch of plan ``i``."""

    def __init__(self, cohort: Cohort, scans: Sequence[Scan], plans: Sequence[BatchPlan], *, seed: int, rule: WindowRule) -> None:
        self.cohort = cohort
        self.scans = scans
        self.plans = plans
        self.seed = seed
        self.rule = rule

    def __len__(self) -> int:
        return len(self.plans)

    def __getitem__(self, place: int) -> PretrainBatch:
        plan = self.plans[place]
        scans = [self.scans[number] for number in plan.scans]
        rows = [row for row, scan in enumerate(scans) if plan.other_atlas in scan.rows]
        other = self._windows([scans[row] for row in rows], plan.other_atlas, plan.epoch, 2) if plan.other_atlas and rows else None
        return PretrainBatch(
            first=self._windows(scans, plan.atlas, plan.epoch, 0),
            second=self._windows(scans, plan.atlas, plan.epoch, 1),
            crossed=plan.other_atlas is not None,
            other=other,
            other_rows=torch.tensor(rows if other is not None else [], dtype=torch.int64),
            keys=torch.tensor([_key(self.seed, plan.epoch, plan.atlas, scan.name) for scan in scans]),
            dataset=torch.tensor([self._codes[0][scan.dataset] for scan in scans]),
            participant=torch.tensor([self._codes[1][scan.participant] for scan in scans]),
            counted=torch.arange(len(scans)) < len(scans) - plan.repeated,
        )

    @cached_property
    def _codes(self) -> tuple[dict[str, int], dict[str, int]]:
        datasets = sorted({scan.dataset for scan in self.scans})
        people = sorted({scan.participant for scan in self.scans})
        return {name: code for code, name in enumerate(datasets)}, {name: code for code, name in enumerate(people)}

    def _windows(self, scans: Sequence[Scan], atlas: str, epoch: int, view: int) -> Windows:
        cuts = []
        for scan in scans:
            row = scan.rows[atlas]
            key = _key(self.seed, epoch, atlas, scan.name)
            start, length = draw_window(row.frames, scan.repetition_time_s, self.rule, key=key, view=view)
            cuts.append(self.cohort.series(row)[start : start + length])
        return pad_windows(cuts, atlas, [scan.repetition_time_s for scan in scans])


def draw_window(frames: int, repetition_time_s: float, rule: WindowRule, *, key: int, view: int) -> tuple[int, int]:
    """Start and length of a random window of a run, in frames."""
    draw = np.random.default_rng([key, view])
    longest = rule.most(frames, repetition_time_s)
    shortest = min(longest, max(rule.fewest(repetition_time_s), math.ceil(longest * rule.min_share)))
    length = int(draw.integers(shortest, longest + 1))
    return int(draw.integers(0, frames - length + 1)), length


def pad_windows(series: Sequence[np.ndarray], atlas: str, repetition_times_s: Sequence[float]) -> Windows:
    """(frames, regions) series as one batch."""
    lengths = [len(one) for one in series]
    padded = np.zeros((len(series), max(lengths), series[0].shape[1]), np.float32)
    for place, one in enumerate(series):
        padded[place, : len(one)] = one
    return Windows(
        atlas=atlas,
        series=torch.from_numpy(padded),
        frames=torch.tensor(lengths, dtype=torch.int64),
        seconds=torch.tensor([frames * time for frames, time in zip(lengths, repetition_times_s, strict=True)], dtype=torch.float32),
    )


def whole_scans(cohort: Cohort, scans: Sequence[Scan], atlas: str) -> Windows:
    """The whole series of scans in one atlas, as one batch."""
    return pad_windows([cohort.series(scan.rows[atlas]) for scan in scans], atlas, [scan.repetition_time_s for scan in scans])


def _plain(value: object) -> str:
    # YAML and TSV disagree about 1, 1.0 and "1"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return "n/a" if value is None or (isinstance(value, float) and value != value) else str(value)  # noqa: PLR0124


def _key(seed: int, epoch: int, atlas: str, name: str) -> int:
    # non-negative, for numpy's seed sequence
    return int.from_bytes(hashlib.blake2b(f"{seed}|{epoch}|{atlas}|{name}".encode(), digest_size=8).digest()) >> 1


def _moved(record: Any, device: torch.device) -> Any:  # noqa: ANN401  (any frozen record of tensors)
    moved = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            value = value.to(device, non_blocking=True)
        elif isinstance(value, Windows):
            value = value.to(device)
        moved[field.name] = value
    return replace(record, **moved)
