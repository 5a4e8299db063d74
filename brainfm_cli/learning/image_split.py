"""Which pictures train, choose and test: by picture and never by trial, written before training, refused where it leaks.

All repeats of a picture, and all pictures that are the same under other names (same file, same captions, same group), are on one
side. Sets that show a few categories over and over have no pictures to hold out: they are split by run, which is said.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pandas as pd
from pydantic import Field

from brainfm_cli.bids.derivatives import write_tsv
from brainfm_cli.config import Frozen, digest_of
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from brainfm_cli.bids.stimuli import Stimulus
    from brainfm_cli.bids.voxel_cohort import VoxelCohort

Role = Literal["train", "validation", "test"]
ROLES: tuple[Role, ...] = ("train", "validation", "test")
COLUMNS = ("unit", "group", "role", "why")


class ImageSplitSettings(Frozen):
    """How pictures are divided into training, validation and test."""

    unit: Literal["image", "run"] = "image"
    """image: pictures are held out. run: whole runs, for sets that only show categories; refused where captions are people's."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of pictures (or runs) that test, where neither test_where, test_list nor shared says which."""
    validation_fraction: float = Field(default=0.1, gt=0, lt=1)
    """Share of the others that choose the epoch."""
    test_where: dict[str, tuple[str, ...]] = {}
    """Column of the stimulus table and the values of test pictures, e.g. {shared1000: ["True"]}."""
    test_list: Path | None = None
    """File with the names of test pictures, one a line, e.g. the 982 shared ones of an earlier release."""
    shared: bool = False
    """Pictures that every participant saw test."""
    min_repeats: int = Field(default=1, ge=1)
    """With shared: only those that every participant saw so often."""
    group: str | None = None
    """Column of the stimulus table whose equal values stay together (near duplicates, frames of one film)."""
    seed: int = Field(default=0, ge=0)
    """Seed of what is drawn."""


@dataclass(frozen=True, kw_only=True)
class ImageSplit:
    """The role of every picture, or of every run."""

    unit: Literal["image", "run"]
    """What is divided."""
    table: pd.DataFrame
    """Columns unit, group, role, why; one row per picture or run."""

    def __post_init__(self) -> None:
        _refuse_leaks(self.table)

    @property
    def sha256(self) -> str:
        """Hash of who is where."""
        return digest_of([self.unit, sorted(map(list, self.table[["unit", "role"]].to_numpy().tolist()))])

    def roles(self, trials: pd.DataFrame) -> pd.Series:
        """Role of every trial of a cohort's index.

        Raises
        ------
        InputDatasetError
            A trial belongs to no unit of the split.
        """
        known = self.table.set_index("unit")["role"]
        units = trials["stimulus"] if self.unit == "image" else _run_units(trials)
        found = units.map(known)
        if found.isna().any():
            raise InputDatasetError(
                f"{self.unit} '{units[found.isna()].iloc[0]}' is in no part of the model's split",
                fix="use the cohort that the model was trained on, or train again on this one",
            )
        return found

    def names(self, role: Role) -> tuple[str, ...]:
        """Units of one role, sorted."""
        return tuple(sorted(self.table.loc[self.table["role"] == role, "unit"]))

    def write(self, path: Path) -> Path:
        """Write ``split.tsv``."""
        return write_tsv(path, self.table.assign(kind=self.unit))

    @classmethod
    def read(cls, path: Path) -> ImageSplit:
        """The split of ``split.tsv``.

        Raises
        ------
        InputNotFoundError
            The file is absent.
        InputDatasetError
            It is no split, or one that leaks.
        """
        try:
            table = pd.read_csv(io.StringIO(path.read_text(encoding="utf-8")), sep="\t", dtype=str, keep_default_na=False)
        except FileNotFoundError as error:
            raise InputNotFoundError("the split is absent", where=path, fix="give a complete models/<id> folder") from error
        except (OSError, ValueError) as error:
            raise InputDatasetError(f"the split is unreadable: {error}", where=path, fix="copy the model folder again") from error
        if not {*COLUMNS, "kind"} <= set(table) or table.empty or set(table["kind"]) - {"image", "run"} or set(table["role"]) - set(ROLES):
            raise InputDatasetError("this is no split of pictures", where=path, fix="copy the model folder again")
        return cls(unit="run" if table["kind"].iloc[0] == "run" else "image", table=table[list(COLUMNS)])


def make_split(cohort: VoxelCohort, settings: ImageSplitSettings) -> ImageSplit:
    """The split of a cohort's pictures; who is drawn depends on the seed and the picture's name alone.

    Raises
    ------
    InputDatasetError
        A side is empty, pictures asked for are not there, or runs are divided although people's captions repeat over them.
    """
    if settings.unit == "run":
        return _by_run(cohort, settings)
    names = sorted(set(cohort.trials["stimulus"]))
    groups = picture_groups([cohort.stimuli[name] for name in names], settings.group)
    asked, why = _asked_for(cohort, names, settings)
    if asked is None:
        tested = _drawn(set(groups.values()), settings.test_fraction, settings.seed, "test")
    else:
        tested = {groups[name] for name in asked}
    rest = sorted(set(groups.values()) - tested)
    validated = _drawn(rest, settings.validation_fraction, settings.seed, "validation")
    rows = []
    for name in names:
        role: Role = "test" if groups[name] in tested else "validation" if groups[name] in validated else "train"
        reason = why if role == "test" else "drawn" if role == "validation" else "the rest"
        if role == "test" and asked is not None and name not in asked:
            reason = "the same picture as one that tests"
        rows.append((name, groups[name], role, reason))
    return _checked("image", rows, settings)


def picture_groups(stimuli: Sequence[Stimulus], column: str | None) -> dict[str, str]:
    """Group of each picture: joined are those with one file, the same captions of people, or one value of ``column``."""
    parent = {one.name: one.name for one in stimuli}

    def root(name: str) -> str:
        while parent[name] != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    first: dict[tuple[str, object], str] = {}
    for one in stimuli:
        marks: list[tuple[str, object]] = [("file", one.file)] if one.file else []
        if one.source == "captions":
            marks.append(("captions", tuple(sorted(one.captions))))
        if column is not None:
            if column not in one.fields:
                raise SettingsError(
                    f"the stimulus table has no column '{column}'", fix=f"split.group: one of {', '.join(one.fields) or 'none'}"
                )
            marks.append(("column", one.fields[column]))
        for mark in marks:
            other = first.setdefault(mark, one.name)
            parent[root(one.name)] = root(other)
    return {name: root(name) for name in parent}


def extend_split(split: ImageSplit, cohort: VoxelCohort, settings: ImageSplitSettings | None) -> ImageSplit:
    """The split with a cohort's further pictures: those that are a known one under another name join it, the others test or are drawn.

    ``settings`` say what share of new pictures trains and chooses; without them all new pictures test.
    """
    old_units = set(split.table["unit"])
    if split.unit == "run":
        new = sorted(set(_run_units(cohort.trials)) - old_units)
        groups = {unit: unit for unit in new}
    else:
        new = sorted(set(cohort.trials["stimulus"]) - old_units)
        groups = picture_groups(list(cohort.stimuli.values()), None)
    if not new:
        return split
    known = {groups.get(unit, unit): role for unit, role in zip(split.table["unit"], split.table["role"], strict=True)}
    fresh = sorted({groups[name] for name in new} - set(known))
    tested = set(fresh) if settings is None else _drawn(fresh, settings.test_fraction, settings.seed, "test") if fresh else set()
    rest = sorted(set(fresh) - tested)
    validated = _drawn(rest, settings.validation_fraction, settings.seed, "validation") if settings is not None and rest else set()
    rows = []
    for name in new:
        group = groups[name]
        role = known.get(group, "test" if group in tested else "validation" if group in validated else "train")
        rows.append((name, group, role, "the same picture as a known one" if group in known else "new"))
    # groups of the model's own table may be called after other members: names of units are what counts
    old = split.table.assign(group=[groups.get(unit, group) for unit, group in zip(split.table["unit"], split.table["group"], strict=True)])
    return ImageSplit(unit=split.unit, table=pd.concat([old, pd.DataFrame(rows, columns=list(COLUMNS))], ignore_index=True))


def _asked_for(cohort: VoxelCohort, names: Sequence[str], settings: ImageSplitSettings) -> tuple[set[str] | None, str]:
    if settings.test_list is not None:
        try:
            listed = {line.strip() for line in settings.test_list.read_text(encoding="utf-8").splitlines()} - {""}
        except OSError as error:
            raise InputNotFoundError(
                "the list of test pictures is absent", where=settings.test_list, fix="check split.test_list"
            ) from error
        absent = sorted(listed - set(names))
        if absent:
            raise InputDatasetError(
                f"{len(absent)} pictures of the list are in no trial, e.g. '{absent[0]}'",
                where=settings.test_list,
                fix="give names as in stimuli.json",
            )
        return listed, "listed"
    if settings.test_where:
        columns = set.intersection(*(set(cohort.stimuli[name].fields) for name in names))
        unknown = sorted(set(settings.test_where) - columns)
        if unknown:
            raise SettingsError(
                f"the stimulus table has no column '{unknown[0]}'",
                fix=f"split.test_where: {', '.join(sorted(columns)) or 'no column is known'}",
            )
        chosen = {
            name for name in names if all(cohort.stimuli[name].fields[column] in values for column, values in settings.test_where.items())
        }
        return chosen, ", ".join(f"{column} is {' or '.join(values)}" for column, values in settings.test_where.items())
    if settings.shared:
        counts = cohort.trials.groupby(["stimulus", "participant"]).size().unstack(fill_value=0)  # noqa: PD010
        seen = counts.index[(counts >= settings.min_repeats).all(axis=1)]
        return set(map(str, seen)), f"seen by everybody at least {settings.min_repeats} times"
    return None, "drawn"


def _by_run(cohort: VoxelCohort, settings: ImageSplitSettings) -> ImageSplit:
    if any(one.source == "captions" for one in cohort.stimuli.values()):
        raise InputDatasetError(
            "runs cannot be held out: pictures with captions of people repeat over runs, so that training would have seen the test pictures",
            where=cohort.root,
            fix="use split.unit=image; runs are for sets whose captions come from a category template",
        )
    units = sorted(set(_run_units(cohort.trials)))
    tested = _drawn(units, settings.test_fraction, settings.seed, "test")
    validated = _drawn(sorted(set(units) - tested), settings.validation_fraction, settings.seed, "validation")
    rows = [(unit, unit, "test" if unit in tested else "validation" if unit in validated else "train", "drawn") for unit in units]
    return _checked("run", rows, settings)


def _run_units(trials: pd.DataFrame) -> pd.Series:
    return trials["participant"].astype(str) + "|" + trials["session"].astype(str) + "|" + trials["run"].astype(str)


def _drawn(units: Iterable[str], fraction: float, seed: int, what: str) -> set[str]:
    ranked = sorted(units, key=lambda unit: hashlib.sha256(f"{seed}|{what}|{unit}".encode()).hexdigest())
    return set(ranked[: max(1, round(fraction * len(ranked)))])


def _checked(unit: Literal["image", "run"], rows: Sequence[tuple[str, str, str, str]], settings: ImageSplitSettings) -> ImageSplit:
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    empty = [role for role in ROLES if role not in set(table["role"])]
    if empty:
        raise InputDatasetError(
            f"no {unit} is left for {' and '.join(empty)} ({len(table)} in all, seed {settings.seed})",
            fix="give more data, or change split.test_fraction, split.test_where and split.validation_fraction",
        )
    return ImageSplit(unit=unit, table=table)


def _refuse_leaks(table: pd.DataFrame) -> None:
    repeated = table["unit"][table["unit"].duplicated()]
    if len(repeated):
        raise InputDatasetError(f"the split leaks: '{repeated.iloc[0]}' is in it twice", fix="make the split anew")
    sides = table.groupby("group")["role"].nunique()
    if (sides > 1).any():
        group = str(sides.index[sides > 1][0])
        found = table[table["group"] == group]
        raise InputDatasetError(
            f"the split leaks: {', '.join(found['unit'].head(3))} are the same picture and stand on several sides ({', '.join(sorted(set(found['role'])))})",
            fix="make the split anew",
        )


def refuse_same_pictures(split: ImageSplit, stimuli: Mapping[str, Stimulus]) -> None:
    """Refuse a split that was made elsewhere and has one picture, under two names of this cohort, on several sides.

    Raises
    ------
    InputDatasetError
        It leaks.
    """
    if split.unit == "image":
        names = [name for name in split.table["unit"] if name in stimuli]
        groups = picture_groups([stimuli[name] for name in names], None)
        table = split.table[split.table["unit"].isin(names)]
        _refuse_leaks(table.assign(group=table["unit"].map(groups)))
