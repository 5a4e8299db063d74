"""The packed slice cohort: one uint8 store per participant, and one index of all slices.

Layout of a ``cohort/`` folder::

    sub-<label>/items.npy        (items, size, size) uint8, or (items, size, size, size) for cubes; never read whole
    sub-<label>/masks.npy        the same of lesion labels; absent where no scan of the participant has a mask
    sub-<label>/items.parquet    one row per slice, those left out included (:data:`SLICE_COLUMNS`)
    sub-<label>/scans.json       each scan's file, grid and the way back to it
    slices.parquet               the slices of everybody that are kept
    dropped.tsv                  the slices that are not, and why
    participants.tsv, cohort.json

A store is one participant, so that packing resumes where it stopped and nothing large is ever rewritten. Free of imaging libraries.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from brainfm_cli.bids.cohort import read_participants
from brainfm_cli.bids.derivatives import atomic_path, sweep, temporary_path, write_json, write_tsv
from brainfm_cli.bids.names import check_keys
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

ScanSequence = Literal["T1w", "T1w+ce", "T2w", "FLAIR", "dwi", "adc", "T2star", "other"]
SEQUENCES: tuple[ScanSequence, ...] = ("T1w", "T1w+ce", "T2w", "FLAIR", "dwi", "adc", "T2star", "other")
Plane = Literal["axial", "coronal", "sagittal"]
PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")
NORMAL: dict[str, int] = {"sagittal": 0, "coronal": 1, "axial": 2}
"""RAS axis that the slices of a plane are stacked along."""
SLICE_COLUMNS: dict[str, str] = {
    "dataset": "name of the dataset the slice comes from",
    "participant": "participant label",
    "session": "session label, empty where there is none",
    "site": "site or scanner, empty where unknown",
    "scan": "file name of the scan, without extension",
    "sequence": "T1w, T1w+ce, T2w, FLAIR, dwi, adc, T2star or other",
    "plane": "axial, coronal or sagittal",
    "item": "row of items.npy, -1 where the slice was not stored",
    "slice": "number of the slice along its normal in RAS order, from 0",
    "z_mm": "place along the normal, millimetres from the centre of the head",
    "brain": "share of pixels inside the head",
    "noise": "SD outside the head over the mean inside",
    "ghosting": "mean where a ghost falls, less the rest outside, over the mean inside",
    "entropy": "of the intensities inside, bits",
    "lesion": "pixels of the mask, -1 where the scan has no mask",
    "why": "why the slice is left out, empty where it is kept",
}
_CATEGORIES = ("dataset", "participant", "session", "site", "scan", "sequence", "plane")
_AGAIN = "run the same command again: it packs what is missing"


@dataclass(frozen=True, kw_only=True)
class PackedScan:
    """Where the slices of a scan come from, and how values on them go back."""

    name: str
    """File name without extension."""
    path: str
    """File, relative to its dataset."""
    session: str
    """Session label, empty where there is none."""
    sequence: str
    """What kind of contrast."""
    grid: dict[str, Any]
    """Fields of the slice grid."""
    native_shape: tuple[int, int, int]
    """Voxels of the file."""
    native_affine: tuple[tuple[float, ...], ...]
    """(4, 4) voxels of the file to millimetres."""
    mask: str | None
    """File of the lesion mask; none where the scan has none."""
    labels: dict[int, str]
    """Values of the mask and what each is called."""
    notes: tuple[str, ...]
    """What was done to the scan or its mask."""

    @property
    def normal(self) -> int:
        """RAS axis that the slices are stacked along."""
        return NORMAL[self.grid["plane"]]

    @property
    def place(self) -> tuple[Any, ...]:
        """Session and grid: scans in which they are equal lie voxel on voxel, and so do their slices."""
        return (self.session, self.native_shape, np.round(self.native_affine, 3).tobytes())


@dataclass(frozen=True, kw_only=True)
class SliceCohort:
    """A packed slice cohort, opened for reading; pixels stay on disk until rows are taken."""

    root: Path
    """The ``cohort/`` folder."""
    slices: pd.DataFrame
    """One row per kept slice, :data:`SLICE_COLUMNS` without ``why``; numbered from 0."""
    size: int
    """Pixels along each side."""
    dims: int
    """2 for slices, 3 for cubes."""
    labels: dict[int, str]
    """Lesion labels of all masks."""
    participants: pd.DataFrame
    """Indexed by participant label; empty of columns where the dataset has no participants.tsv."""

    @classmethod
    def open(cls, folder: Path) -> SliceCohort:
        """Open ``folder`` or ``folder/cohort``.

        Raises
        ------
        InputNotFoundError
            There is no packed slice cohort.
        InputDatasetError
            It is damaged.
        """
        import pandas as pd

        root = folder / "cohort" if (folder / "cohort").is_dir() else folder
        index = root / "slices.parquet"
        if not index.is_file():
            raise InputNotFoundError(
                "no packed slices here", where=root, fix="give a BIDS dataset with images, or the OUTPUT of 'brainfm pretrain --system mri-language'"
            )  # fmt: skip
        try:
            slices = pd.read_parquet(index)
            described = read_json(root / "cohort.json")
            size, dims = int(described["size"]), int(described["dims"])
            labels = {int(value): str(name) for value, name in described["labels"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputDatasetError(f"the packed slices are unreadable: {error}", where=root, fix=_AGAIN) from error
        missing = [name for name in SLICE_COLUMNS if name not in slices and name != "why"]
        if missing:
            raise InputDatasetError(f"the index lacks {', '.join(missing)}", where=index, fix=_AGAIN)
        if slices["item"].dtype.kind not in "iu" or (slices["item"] < 0).any() or slices["participant"].dtype != "category":
            raise InputDatasetError("'item' or 'participant' of the index holds what it must not", where=index, fix=_AGAIN)
        check_keys(slices["participant"].cat.categories, where=index)
        participants = read_participants(root / "participants.tsv")
        return cls(root=root, slices=slices, size=size, dims=dims, labels=labels, participants=participants)

    @classmethod
    def of_participant(cls, root: Path, label: str, *, size: int, dims: int) -> SliceCohort:
        """One packed participant of the folder ``root``, without the index of everybody: slices with brain, none left out as outliers."""
        import pandas as pd

        folder = root / f"sub-{label}"
        rows = pd.read_parquet(folder / "items.parquet")
        kept = rows[(rows["item"] >= 0).to_numpy()].drop(columns="why").reset_index(drop=True)
        labels = {value: name for scan in read_scans(folder) for value, name in scan.labels.items()}
        slices = kept.astype(dict.fromkeys(_CATEGORIES, "category"))
        return cls(root=root, slices=slices, size=size, dims=dims, labels=labels, participants=pd.DataFrame(index=[label]))

    @property
    def files(self) -> tuple[Path, ...]:
        """Files that change whenever a slice changes, sorted; not the stores, which may hold a terabyte (cohort.json has their hashes)."""
        return tuple(self.root / name for name in ("cohort.json", "participants.tsv", "slices.parquet"))

    @property
    def labels_of_people(self) -> list[str]:
        """Participants with at least one slice, sorted."""
        return sorted(map(str, self.slices["participant"].unique()))

    @property
    def dataset_of(self) -> dict[str, str]:
        """Name of the dataset each participant comes from."""
        first = self.slices.drop_duplicates("participant")
        return {str(label): str(name) for label, name in zip(first["participant"], first["dataset"], strict=True)}

    @property
    def item_shape(self) -> tuple[int, ...]:
        """Pixels of one item."""
        return (self.size,) * self.dims

    def items(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(rows, size, size) copies of the slices at these places of :attr:`slices`."""
        return self._read("items.npy", rows)

    def masks(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        """(rows, size, size) lesion labels; zero where a scan has no mask."""
        return self._read("masks.npy", rows)

    def num_items(self, scan: PackedScan) -> int:
        """Items of the whole scan, those that were left out counted."""
        return 1 if self.dims == 3 else int(scan.grid["shape"][scan.normal])

    def scans(self, participant: str) -> tuple[PackedScan, ...]:
        """The scans of a participant."""
        return read_scans(self.root / f"sub-{participant}")

    def _read(self, name: str, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        people, codes, items = self._columns
        out = np.zeros((len(rows), *self.item_shape), np.uint8)
        length = int(np.prod(self.item_shape))
        for code in np.unique(codes[rows]):
            path = self.root / f"sub-{people[code]}" / name
            if name == "masks.npy" and not path.is_file():
                continue
            mine = np.flatnonzero(codes[rows] == code)
            try:
                start = self._start_of(path)
                with path.open("rb") as stream:
                    for place in mine:
                        stream.seek(start + int(items[rows[place]]) * length)
                        out[place].reshape(-1)[:] = np.frombuffer(stream.read(length), np.uint8)
            except (OSError, ValueError, EOFError) as error:
                raise InputDatasetError(f"the store of slices is damaged: {error}", where=path, fix="delete its folder, then run 'brainfm pretrain' again") from error  # fmt: skip
        return out

    def _start_of(self, path: Path) -> int:
        """Bytes before the first item of a store, read once."""
        if path not in self._starts:
            with path.open("rb") as stream:
                version = np.lib.format.read_magic(stream)
                read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
                shape, fortran, dtype = read(stream)
                if shape[1:] != self.item_shape or fortran or dtype != np.uint8:
                    raise ValueError(f"it holds {dtype} of {shape}")
                self._starts[path] = stream.tell()
        return self._starts[path]

    @cached_property
    def _columns(self) -> tuple[list[str], NDArray[np.int64], NDArray[np.int64]]:
        """Labels of people, and for each slice the number of its participant and its place in their store."""
        column = self.slices["participant"].cat
        return list(map(str, column.categories)), np.asarray(column.codes, np.int64), self.slices["item"].to_numpy(np.int64)

    @cached_property
    def _starts(self) -> dict[Path, int]:
        return {}


def read_scans(folder: Path) -> tuple[PackedScan, ...]:
    """The scans of one participant's packed folder."""
    path = folder / "scans.json"
    try:
        return tuple(_packed_scan(values) for values in read_json(path)["scans"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputDatasetError(f"the description of packed scans is unreadable: {error}", where=path, fix=_AGAIN) from error


def _packed_scan(values: Mapping[str, Any]) -> PackedScan:
    return PackedScan(
        name=values["name"],
        path=values["path"],
        session=values["session"],
        sequence=values["sequence"],
        grid=dict(values["grid"]),
        native_shape=tuple(values["native_shape"]),
        native_affine=tuple(tuple(row) for row in values["native_affine"]),
        mask=values["mask"],
        labels={int(value): name for value, name in values["labels"].items()},
        notes=tuple(values["notes"]),
    )


def write_participant(
    folder: Path, batches: Iterator[tuple[PackedScan, pd.DataFrame, NDArray[np.uint8], NDArray[np.uint8] | None]]
) -> list[Path]:
    """Write one participant's folder, a scan at a time; it appears whole. Gives back its files.

    Every batch is a scan, its rows of :data:`SLICE_COLUMNS` (``item`` ≥ 0 counts from 0 in the scan), the stored items, and their labels
    where it has a mask.
    """
    import pandas as pd

    folder.parent.mkdir(parents=True, exist_ok=True)
    sweep(folder.parent)
    temporary = temporary_path(folder)
    temporary.mkdir()
    try:
        scans: list[PackedScan] = []
        tables: list[pd.DataFrame] = []
        counts: list[int] = []
        masked = False
        for number, (scan, rows, items, masks) in enumerate(batches):
            np.save(temporary / f"items{number}.npy", items)
            if masks is not None:
                np.save(temporary / f"masks{number}.npy", masks)
                masked = True
            stored = rows["item"].to_numpy() >= 0
            tables.append(rows.assign(item=np.where(stored, rows["item"] + sum(counts), -1).astype(np.int32)))
            scans.append(scan)
            counts.append(len(items))
        shape = np.load(temporary / "items0.npy", mmap_mode="r").shape[1:]
        names = ["items", *(["masks"] if masked else [])]
        for name in names:
            _join(temporary, name, counts, shape)
        pd.concat(tables, ignore_index=True).reindex(columns=list(SLICE_COLUMNS)).to_parquet(temporary / "items.parquet", index=False)
        write_json(temporary / "scans.json", {"scans": [_plain(scan) for scan in scans]})
        shutil.rmtree(folder, ignore_errors=True)
        temporary.replace(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return sorted(folder.iterdir())


def _plain(scan: PackedScan) -> dict[str, Any]:
    from dataclasses import asdict

    return asdict(scan)


def _join(folder: Path, name: str, counts: Sequence[int], shape: tuple[int, ...]) -> None:
    """One store of the parts of every scan; parts that are absent are zero."""
    store = np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=np.uint8, shape=(sum(counts), *shape))
    start = 0
    for number, count in enumerate(counts):
        part = folder / f"{name}{number}.npy"
        if part.is_file():
            store[start : start + count] = np.load(part)
            part.unlink()
        start += count
    store.flush()


def write_index(root: Path, slices: pd.DataFrame, participants: pd.DataFrame, described: Mapping[str, Any]) -> list[Path]:
    """Write the index of everybody's slices, those that are left out with their reason, and the table of people; gives back the files."""
    kept = slices[(slices["why"] == "").to_numpy()].drop(columns="why").reset_index(drop=True)
    kept = kept.astype(dict.fromkeys(_CATEGORIES, "category"))
    dropped = slices.loc[(slices["why"] != "").to_numpy(), ["participant", "session", "scan", "slice", "brain", "noise", "ghosting", "entropy", "why"]]  # fmt: skip
    with atomic_path(root / "slices.parquet") as temporary:
        kept.to_parquet(temporary, index=False)
    return [
        root / "slices.parquet",
        write_tsv(root / "dropped.tsv", dropped.replace({"session": {"": "n/a"}})),
        write_tsv(root / "participants.tsv", participants),
        write_json(root / "cohort.json", dict(described)),
    ]
