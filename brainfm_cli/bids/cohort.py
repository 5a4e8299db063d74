"""The packed cohort: one memory-mapped series store per atlas, one index, one participants table.

Layout of a ``cohort/`` folder::

    index.parquet            one row per run and atlas (:data:`INDEX_COLUMNS`)
    atlas-<label>.npy        (frames of all runs, regions) float32, never read whole
    atlas-<label>.json       region names, networks, centroids, template
    participants.tsv         one row per participant key, harmonised labels
    participants.json        column descriptions and codings

Free of imaging libraries: training reads cohorts on bare GPU nodes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from tokenize import TokenError
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from brainfm_cli.bids.derivatives import atomic_path, sweep, temporary_path, write_json, write_tsv
from brainfm_cli.bids.names import check_keys
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError
from brainfm_cli.records import RegionTable

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    import pandas as pd

INDEX_COLUMNS: dict[str, str] = {
    "dataset": "name of the dataset the run comes from",
    "participant": "participant key: the label, preceded by '<dataset>+' where several datasets are packed",
    "session": "session label, empty where there is none",
    "run": "the run's BIDS entities after sub and ses, e.g. task-rest_run-1",
    "site": "site or scanner, empty where unknown",
    "repetition_time": "seconds between frames",
    "atlas": "atlas label in entity form",
    "frames": "number of frames kept",
    "offset": "first row of the run in atlas-<label>.npy",
    "mean_fd": "mean framewise displacement in millimetres, NaN where unknown",
    "kept_fraction": "share of frames that denoising kept, NaN where unknown",
}
HEADER_BYTES = 128
BROKEN_STORE = (OSError, ValueError, EOFError, OverflowError, SyntaxError, TokenError)
"""What numpy raises on files that are no .npy; the last two from headers that are no Python."""


@dataclass(frozen=True, kw_only=True)
class CohortAtlas:
    """One atlas of a cohort."""

    label: str
    """Atlas label in entity form."""
    regions: RegionTable
    """Names, networks, centroids."""
    template: str
    """Template of the series, e.g. MNI152NLin2009cAsym."""


@dataclass(frozen=True, kw_only=True)
class Cohort:
    """A packed cohort, opened for reading; series stay on disk until a slice is taken."""

    root: Path
    """The ``cohort/`` folder."""
    index: pd.DataFrame
    """One row per run and atlas, :data:`INDEX_COLUMNS`."""
    participants: pd.DataFrame
    """Indexed by participant key; columns of participants.tsv, ``n/a`` read as missing."""
    atlases: dict[str, CohortAtlas]
    """By label."""

    @classmethod
    def open(cls, folder: Path) -> Cohort:
        """Open ``folder`` or ``folder/cohort``.

        Raises
        ------
        InputNotFoundError
            There is no packed cohort.
        InputDatasetError
            Index, stores and participants table do not fit together.
        """
        import pandas as pd

        root = folder / "cohort" if (folder / "cohort").is_dir() else folder
        if not (root / "index.parquet").is_file():
            raise InputNotFoundError(
                "no packed cohort here", where=root, fix="run 'brainfm parcellate INPUT OUTPUT group' and give its OUTPUT"
            )
        try:
            index = pd.read_parquet(root / "index.parquet")
        except (OSError, ValueError) as error:
            raise InputDatasetError(f"the cohort index is unreadable: {error}", where=root / "index.parquet", fix="pack the cohort again") from error  # fmt: skip
        missing = [column for column in INDEX_COLUMNS if column not in index]
        if missing:
            raise InputDatasetError(f"the cohort index lacks {', '.join(missing)}", where=root / "index.parquet", fix="pack the cohort again")  # fmt: skip
        _check_index(index, root / "index.parquet")
        participants = read_participants(root / "participants.tsv")
        unknown = sorted(set(index["participant"]) - set(participants.index))
        if unknown:
            raise InputDatasetError(
                f"{len(unknown)} participants of the index are not in participants.tsv, e.g. {unknown[0]}", where=root, fix="pack the cohort again"
            )  # fmt: skip
        atlases = {label: _read_atlas(root, label) for label in sorted(set(index["atlas"]))}
        cohort = cls(root=root, index=index, participants=participants, atlases=atlases)
        for label in atlases:
            cohort._check_store(label)
        return cohort

    def series(self, row: Any) -> np.ndarray:  # noqa: ANN401  (a namedtuple of DataFrame.itertuples)
        """(frames, regions) float32 view of one index row's series, on disk until it is used."""
        return self._stores[row.atlas][row.offset : row.offset + row.frames]

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file of the cohort, sorted."""
        return tuple(sorted(path for path in self.root.iterdir() if path.is_file() and not path.name.startswith(".")))

    @cached_property
    def dataset_of(self) -> dict[str, str]:
        """Name of the dataset of each participant key."""
        first = self.index.drop_duplicates("participant")
        return {str(key): str(name) for key, name in zip(first["participant"], first["dataset"], strict=True)}

    def choose_atlases(self, labels: Sequence[str]) -> list[str]:
        """The atlases of ``labels``, or all where it is empty; sorted.

        Raises
        ------
        InputNotFoundError
            The cohort lacks one.
        """
        absent = [label for label in labels if label not in self.atlases]
        if absent:
            raise InputNotFoundError(
                f"the cohort has no atlas '{absent[0]}'", where=self.root, fix=f"it has {', '.join(sorted(self.atlases))}"
            )
        return sorted(labels or self.atlases)

    @cached_property
    def _stores(self) -> dict[str, np.ndarray]:
        return {label: np.load(self.root / f"atlas-{label}.npy", mmap_mode="r") for label in self.atlases}

    def _check_store(self, label: str) -> None:
        path = self.root / f"atlas-{label}.npy"
        store = open_store(path, "the series store", fix="pack the cohort again")
        rows = self.index[self.index["atlas"] == label]
        if (
            store.ndim != 2
            or store.shape[1] != len(self.atlases[label].regions.names)
            or int((rows["offset"] + rows["frames"]).max()) > store.shape[0]
        ):
            raise InputDatasetError("the series store does not fit its index", where=path, fix="pack the cohort again")  # fmt: skip


@dataclass
class CohortWriter:
    """Packs runs into a cohort; nothing appears under its final name before :meth:`finish`."""

    root: Path
    """The ``cohort/`` folder to make."""
    _atlases: dict[str, CohortAtlas] = field(default_factory=dict)
    _rows: list[dict[str, Any]] = field(default_factory=list)
    _frames: dict[str, int] = field(default_factory=dict)

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

    def add_atlas(self, atlas: CohortAtlas) -> None:
        """Declare an atlas before its first run; the same label with other regions is refused."""
        known = self._atlases.get(atlas.label)
        if known is not None:
            if known.regions.names != atlas.regions.names:
                raise InputDatasetError(
                    f"atlas {atlas.label} has other regions in another dataset", fix="give the atlases different names, or pack them apart"
                )  # fmt: skip
            return
        self._atlases[atlas.label] = atlas
        self._frames[atlas.label] = 0
        stream = self._stack.enter_context((self._temporary / f"atlas-{atlas.label}.npy").open("wb"))
        stream.write(b"\0" * HEADER_BYTES)
        self._streams[atlas.label] = stream

    def add_run(self, atlas: str, series: np.ndarray, row: Mapping[str, Any]) -> None:
        """Append one run's (frames, regions) series; ``row`` holds the other index columns."""
        if series.ndim != 2 or series.shape[1] != len(self._atlases[atlas].regions.names):
            raise InputDatasetError(f"series {series.shape} does not fit atlas {atlas}", fix="check the run's series file")
        self._streams[atlas].write(np.ascontiguousarray(series, dtype="<f4").tobytes())
        self._rows.append({**row, "atlas": atlas, "frames": int(series.shape[0]), "offset": self._frames[atlas]})
        self._frames[atlas] += int(series.shape[0])

    def finish(self, participants: pd.DataFrame, descriptions: Mapping[str, Any] | None = None) -> list[Path]:
        """Write index, tables and headers, and move everything to its final name; gives back the files."""
        import pandas as pd

        for label, stream in self._streams.items():
            stream.seek(0)
            stream.write(npy_header(self._frames[label], len(self._atlases[label].regions.names)))
            stream.flush()
            os.fsync(stream.fileno())
            _write_atlas(self._temporary, self._atlases[label])
        table = (
            participants.reset_index(names="participant_id") if participants.index.name != "participant_id" else participants.reset_index()
        )
        write_tsv(self._temporary / "participants.tsv", table)
        write_json(self._temporary / "participants.json", dict(descriptions or {}))
        index = pd.DataFrame(self._rows).reindex(columns=list(INDEX_COLUMNS))
        with atomic_path(self._temporary / "index.parquet") as temporary:
            index.to_parquet(temporary, index=False)
        if self.root.exists():
            shutil.rmtree(self.root)
        self._stack.close()
        self._temporary.replace(self.root)
        return sorted(self.root.iterdir())


def participant_key(dataset: str, label: str, *, several: bool) -> str:
    """The label, preceded by ``<dataset>+`` where several datasets are packed."""
    return f"{dataset}+{label}" if several else label


def read_participants(path: Path) -> pd.DataFrame:
    """participants.tsv indexed by ``participant_id`` without ``sub-``; ``n/a`` is missing, labels stay text.

    Raises
    ------
    InputDatasetError
        The table is unreadable, lacks ``participant_id``, or lists someone twice.
    """
    import pandas as pd

    try:
        table = pd.read_csv(path, sep="\t", dtype={"participant_id": str}, na_values=["n/a"], keep_default_na=False)
    except FileNotFoundError as error:
        raise InputNotFoundError("participants.tsv is absent", where=path, fix="every target is a column of this table; add it") from error  # fmt: skip
    except (OSError, ValueError) as error:
        raise InputDatasetError(f"participants.tsv is unreadable: {error}", where=path, fix="it must be a tab-separated UTF-8 table") from error  # fmt: skip
    if "participant_id" not in table:
        raise InputDatasetError("participants.tsv has no column participant_id", where=path, fix="add it (sub-<label> per row)")
    table["participant_id"] = table["participant_id"].str.removeprefix("sub-")
    repeated = table["participant_id"][table["participant_id"].duplicated()]
    if len(repeated):
        raise InputDatasetError(f"participants.tsv lists {repeated.iloc[0]} twice", where=path, fix="keep one row per participant")
    return table.set_index("participant_id")


def open_store(path: Path, what: str, *, fix: str) -> np.ndarray:
    """A float32 store as a memory map.

    Raises
    ------
    InputDatasetError
        It is no .npy file, shorter than it says, or holds something else than float32 numbers.
    """
    try:
        store: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except BROKEN_STORE as error:
        raise InputDatasetError(f"{what} is unreadable: {error}", where=path, fix=fix) from error
    if store.dtype != np.dtype("<f4"):
        raise InputDatasetError(f"{what} holds {store.dtype}, not float32", where=path, fix=fix)
    return store


def iterate_runs(cohort: Cohort, atlas: str) -> Iterator[tuple[Any, np.ndarray]]:
    """Index rows of one atlas with their (frames, regions) series."""
    for row in cohort.index[cohort.index["atlas"] == atlas].itertuples():
        yield row, cohort.series(row)


def npy_header(frames: int, regions: int) -> bytes:
    """The first :data:`HEADER_BYTES` of a float32 store of that shape, whose rows are appended before their number is known."""
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({frames}, {regions}), }}"
    magic = b"\x93NUMPY\x01\x00" + (HEADER_BYTES - 10).to_bytes(2, "little")
    return magic + text.ljust(HEADER_BYTES - 11).encode() + b"\n"


def _check_index(index: pd.DataFrame, where: Path) -> None:
    for column, kinds in (("offset", "iu"), ("frames", "iu"), ("repetition_time", "iuf")):
        if index[column].dtype.kind not in kinds or (index[column] < 0).any():
            raise InputDatasetError(f"'{column}' of the cohort index holds what is no number of that kind", where=where, fix="pack the cohort again")  # fmt: skip
    check_keys(index["participant"].unique(), where=where)
    check_keys(index["atlas"].unique(), where=where, atlases=True)


def _write_atlas(folder: Path, atlas: CohortAtlas) -> None:
    centroids = atlas.regions.centroids_mm
    write_json(
        folder / f"atlas-{atlas.label}.json",
        {
            "label": atlas.label,
            "template": atlas.template,
            "names": list(atlas.regions.names),
            "networks": list(atlas.regions.networks),
            "centroids_mm": None if centroids is None else np.round(centroids, 2).tolist(),
        },
    )


def _read_atlas(root: Path, label: str) -> CohortAtlas:
    path = root / f"atlas-{label}.json"
    try:
        values = read_json(path)
        centroids = values["centroids_mm"]
        if not isinstance(values["names"], list) or not all(isinstance(name, str) for name in (*values["names"], values["template"])):
            raise TypeError("names and template must be texts")
        regions = RegionTable(
            names=tuple(values["names"]),
            networks=tuple(values["networks"]),
            centroids_mm=None if centroids is None else np.asarray(centroids, np.float32),
        )
        return CohortAtlas(label=label, regions=regions, template=values["template"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputDatasetError(f"the atlas description is unreadable: {error}", where=path, fix="pack the cohort again") from error
