"""The packed voxel cohort: one memory-mapped store of single-trial responses per participant, and what was seen.

Layout of a ``cohort/`` folder::

    trials.parquet               one row per trial (:data:`TRIAL_COLUMNS`)
    voxels-<participant>.npy     (trials, voxels) float32, never read whole
    order-<participant>.npy      (voxels,) int32: place of each voxel in the flattened mask volume, C order
    places-<participant>.npy     (voxels, 3) float32 millimetres
    voxels-<participant>.json    space, mask and order hashes, region of each voxel
    stimuli.json                 captions, their source, picture and further columns by stimulus
    participants.tsv             one row per participant

Free of imaging libraries: training reads cohorts on bare GPU nodes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from brainfm_cli.bids.cohort import BROKEN_STORE, HEADER_BYTES, npy_header, open_store, read_participants
from brainfm_cli.bids.derivatives import atomic_path, sweep, temporary_path, write_json, write_tsv
from brainfm_cli.bids.names import check_keys
from brainfm_cli.bids.stimuli import Stimulus
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    import pandas as pd
    from numpy.typing import NDArray

TRIAL_COLUMNS: dict[str, str] = {
    "dataset": "name of the dataset the trial comes from",
    "participant": "participant key",
    "session": "session label, empty where there is none",
    "run": "the run's BIDS entities after sub and ses",
    "trial": "volume of the run's map, from 0",
    "stimulus": "name of the picture",
    "repeat": "how often the person had seen it, this time included",
    "row": "row of voxels-<participant>.npy",
}
_AGAIN = "pack the cohort again"


@dataclass(frozen=True, kw_only=True)
class VoxelSpace:
    """The voxels of one participant, in the order of every response."""

    participant: str
    """Participant key."""
    space: str
    """Label of ``space-``, e.g. T1w or a template."""
    mask_sha256: str
    """Hash of the mask's shape, affine and voxels."""
    order_sha256: str
    """Hash of the mask and the order of voxels: models refuse responses of another."""
    places_mm: NDArray[np.float32]
    """(voxels, 3) centres in millimetres of that space."""
    regions: tuple[str, ...] = ()
    """Region of each voxel; empty where no segmentation was given."""

    @property
    def num_voxels(self) -> int:
        """Number of voxels."""
        return len(self.places_mm)


@dataclass(frozen=True, kw_only=True)
class VoxelCohort:
    """A packed voxel cohort, opened for reading; responses stay on disk until rows are taken."""

    root: Path
    """The ``cohort/`` folder."""
    trials: pd.DataFrame
    """One row per trial, :data:`TRIAL_COLUMNS`."""
    stimuli: dict[str, Stimulus]
    """By name."""
    spaces: dict[str, VoxelSpace]
    """By participant."""
    participants: pd.DataFrame
    """Indexed by participant key."""

    @classmethod
    def open(cls, folder: Path) -> VoxelCohort:
        """Open ``folder`` or ``folder/cohort``.

        Raises
        ------
        InputNotFoundError
            There is no packed voxel cohort.
        InputDatasetError
            Index, stores and stimuli do not fit together.
        """
        import pandas as pd

        root = folder / "cohort" if (folder / "cohort").is_dir() else folder
        index = root / "trials.parquet"
        if not index.is_file():
            raise InputNotFoundError(
                "no packed trials here", where=root, fix="run 'brainfm parcellate INPUT OUTPUT group --trials' and give its OUTPUT"
            )
        try:
            trials = pd.read_parquet(index)
            described = read_json(root / "stimuli.json")
            stimuli = {
                name: Stimulus(
                    name=name, captions=tuple(one["captions"]), source=one["source"], file=one["file"], fields=dict(one["fields"])
                )
                for name, one in described.items()
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputDatasetError(f"the packed trials are unreadable: {error}", where=root, fix=_AGAIN) from error
        missing = [column for column in TRIAL_COLUMNS if column not in trials]
        if missing:
            raise InputDatasetError(f"the index lacks {', '.join(missing)}", where=index, fix=_AGAIN)
        if trials["row"].dtype.kind not in "iu" or (trials["row"] < 0).any():
            raise InputDatasetError("'row' of the index holds what is no number of a row", where=index, fix=_AGAIN)
        check_keys(trials["participant"].unique(), where=index)
        unknown = sorted(set(trials["stimulus"]) - set(stimuli))
        if unknown:
            raise InputDatasetError(f"{len(unknown)} stimuli of the index are not described, e.g. {unknown[0]}", where=root, fix=_AGAIN)
        spaces = {str(key): _read_space(root, str(key)) for key in sorted(set(trials["participant"]))}
        cohort = cls(root=root, trials=trials, stimuli=stimuli, spaces=spaces, participants=read_participants(root / "participants.tsv"))
        for key in spaces:
            cohort._check_store(key)
        return cohort

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the cohort, sorted."""
        return tuple(sorted(path for path in self.root.iterdir() if path.is_file() and not path.name.startswith(".")))

    def responses(self, participant: str) -> NDArray[np.float32]:
        """(trials, voxels) memory map of one participant's responses."""
        return self._stores[participant]

    def trials_of(self, participant: str) -> pd.DataFrame:
        """Rows of the index of one participant, in the order of the store."""
        return self.trials[self.trials["participant"] == participant].sort_values("row")

    def choose_participants(self, labels: Sequence[str]) -> list[str]:
        """The participants of ``labels``, or all where it is empty; sorted.

        Raises
        ------
        InputNotFoundError
            The cohort lacks one.
        """
        absent = [label for label in labels if label not in self.spaces]
        if absent:
            raise InputNotFoundError(
                f"the cohort has no participant '{absent[0]}'", where=self.root, fix=f"it has {', '.join(sorted(self.spaces))}"
            )
        return sorted(labels or self.spaces)

    @property
    def dataset_of(self) -> dict[str, str]:
        """Name of the dataset of each participant."""
        first = self.trials.drop_duplicates("participant")
        return {str(key): str(name) for key, name in zip(first["participant"], first["dataset"], strict=True)}

    @property
    def templated(self) -> bool:
        """Whether captions of some stimulus were made from a category name."""
        return any(stimulus.source == "template" for stimulus in self.stimuli.values())

    @cached_property
    def _stores(self) -> dict[str, NDArray[np.float32]]:
        return {key: np.load(self.root / f"voxels-{key}.npy", mmap_mode="r") for key in self.spaces}

    def _check_store(self, participant: str) -> None:
        path = self.root / f"voxels-{participant}.npy"
        store = open_store(path, "the store of responses", fix=_AGAIN)
        rows = self.trials.loc[self.trials["participant"] == participant, "row"]
        if store.ndim != 2 or store.shape[1] != self.spaces[participant].num_voxels or int(rows.max()) >= store.shape[0]:
            raise InputDatasetError("the store of responses does not fit its index", where=path, fix=_AGAIN)


@dataclass
class VoxelCohortWriter:
    """Packs trials into a voxel cohort, a row at a time; nothing appears under its final name before :meth:`finish`."""

    root: Path
    """The ``cohort/`` folder to make."""
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _counts: dict[str, int] = field(default_factory=dict)
    _spaces: dict[str, VoxelSpace] = field(default_factory=dict)
    _stimuli: dict[str, Stimulus] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._temporary = temporary_path(self.root)

    def __enter__(self) -> Self:
        self.root.parent.mkdir(parents=True, exist_ok=True)
        sweep(self.root.parent)
        self._temporary.mkdir()
        self._stack = contextlib.ExitStack()
        self._streams: dict[str, Any] = {}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()
        shutil.rmtree(self._temporary, ignore_errors=True)

    def add_participant(self, space: VoxelSpace, order: NDArray[np.int32]) -> None:
        """Declare a participant's voxels before the first trial; ``order`` is the place of each voxel in the flattened mask."""
        key = space.participant
        self._spaces[key], self._counts[key] = space, 0
        np.save(self._temporary / f"order-{key}.npy", order.astype(np.int32))
        np.save(self._temporary / f"places-{key}.npy", space.places_mm.astype(np.float32))
        write_json(
            self._temporary / f"voxels-{key}.json",
            {
                "space": space.space,
                "voxels": space.num_voxels,
                "mask_sha256": space.mask_sha256,
                "order_sha256": space.order_sha256,
                "regions": list(space.regions),
            },
        )
        stream = self._stack.enter_context((self._temporary / f"voxels-{key}.npy").open("wb"))
        stream.write(b"\0" * HEADER_BYTES)
        self._streams[key] = stream

    def add_trials(self, participant: str, responses: Iterable[NDArray[np.float32]], rows: Sequence[Mapping[str, Any]]) -> None:
        """Append trials: an iterable of (voxels,) responses and as many rows of the other index columns, streamed."""
        stream, width = self._streams[participant], self._spaces[participant].num_voxels
        for response, row in zip(responses, rows, strict=True):
            if response.shape != (width,):
                raise InputDatasetError(f"a response of {response.shape} does not fit {width} voxels", fix="report this as a bug")
            stream.write(np.ascontiguousarray(response, dtype="<f4").tobytes())
            self._rows.append({**row, "participant": participant, "row": self._counts[participant]})
            self._counts[participant] += 1

    def add_stimulus(self, stimulus: Stimulus) -> None:
        """Keep what is known of a stimulus.

        Raises
        ------
        InputDatasetError
            Another dataset says something else of a stimulus of that name.
        """
        known = self._stimuli.setdefault(stimulus.name, stimulus)
        if known.captions != stimulus.captions:
            raise InputDatasetError(
                f"stimulus '{stimulus.name}' has other captions in another dataset", fix="give different pictures different names"
            )

    def finish(self, participants: pd.DataFrame) -> list[Path]:
        """Write index, tables and headers, and move everything to its final name; gives back the files."""
        import pandas as pd

        for key, stream in self._streams.items():
            stream.seek(0)
            stream.write(npy_header(self._counts[key], self._spaces[key].num_voxels))
            stream.flush()
            os.fsync(stream.fileno())
        described = {
            name: {"captions": list(one.captions), "source": one.source, "file": one.file, "fields": one.fields}
            for name, one in sorted(self._stimuli.items())
        }
        write_json(self._temporary / "stimuli.json", described)
        write_tsv(self._temporary / "participants.tsv", participants.reset_index(names="participant_id"))
        trials = pd.DataFrame(self._rows).reindex(columns=list(TRIAL_COLUMNS))
        with atomic_path(self._temporary / "trials.parquet") as temporary:
            trials.to_parquet(temporary, index=False)
        if self.root.exists():
            shutil.rmtree(self.root)
        self._stack.close()
        self._temporary.replace(self.root)
        return sorted(self.root.iterdir())


def mask_hash(mask: NDArray[np.bool_], affine: NDArray[np.float64]) -> str:
    """SHA-256 of a mask's shape, place and voxels, the same whatever the file's type or compression."""
    digest = hashlib.sha256(repr(mask.shape).encode())
    digest.update(np.round(affine, 3).astype("<f8").tobytes())
    digest.update(np.packbits(mask).tobytes())
    return digest.hexdigest()


def order_hash(mask_sha256: str, order: NDArray[np.int32]) -> str:
    """SHA-256 of a mask and the order of its voxels."""
    return hashlib.sha256(mask_sha256.encode() + order.astype("<i4").tobytes()).hexdigest()


def order_voxels(mask: NDArray[np.bool_], regions: NDArray[np.int64] | None) -> NDArray[np.int32]:
    """(voxels,) places in the flattened mask: by region, then along a Z-order curve, so that neighbours in the order are neighbours in the brain.

    ``regions`` (x, y, z) are region numbers, none without a segmentation.
    """
    where = np.argwhere(mask)
    code = np.zeros(len(where), np.int64)
    for bit in range(12):  # grids of up to 4,096 voxels a side
        for axis in range(3):
            code |= ((where[:, axis] >> bit) & 1) << (3 * bit + axis)
    region = np.zeros(len(where), np.int64) if regions is None else regions[mask]
    flat = np.flatnonzero(mask)
    return flat[np.lexsort((code, region))].astype(np.int32)


def _read_space(root: Path, participant: str) -> VoxelSpace:
    path = root / f"voxels-{participant}.json"
    try:
        values = read_json(path)
        places = np.load(root / f"places-{participant}.npy", allow_pickle=False)
        return VoxelSpace(
            participant=participant,
            space=values["space"],
            mask_sha256=values["mask_sha256"],
            order_sha256=values["order_sha256"],
            places_mm=places,
            regions=tuple(values["regions"]),
        )
    except (*BROKEN_STORE, KeyError, TypeError) as error:
        raise InputDatasetError(f"the voxels' description is unreadable: {error}", where=path, fix=_AGAIN) from error
