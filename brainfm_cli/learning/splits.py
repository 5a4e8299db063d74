"""Who trains and who tests: split designs, the split file, and the refusal of splits that leak.

A split is made before any training, written as ``split.tsv`` (who, repeat, fold, role, why), and read by the
model and by every floor. Nothing here looks at series.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

import numpy as np
import pandas as pd
from pydantic import Field
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from brainfm_cli.bids.derivatives import write_tsv
from brainfm_cli.config import Frozen, digest_of
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, SettingsError
from brainfm_cli.learning.targets import Target, class_text, require_column

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

COLUMNS = {
    "participant_id": "participant key, as in the cohort index",
    "group": "people of one group (family, twins; otherwise the person) are never on both sides",
    "repeat": "repetition, from 1",
    "fold": "fold of the repetition, from 1",
    "role": "train, test or unused",
    "why": "the rule that put the person there",
}
_QUANTILES = 5  # strata of a continuous target


class DesignSettings(Frozen):
    """How people are divided into training and test."""

    kind: Literal["cross-validation", "leave-one-site-out", "fixed"] = "cross-validation"
    """cross-validation: repeated stratified folds; leave-one-site-out: each site tested once; fixed: one test set."""
    folds: int = Field(default=5, ge=2)
    """Folds of cross-validation."""
    repeats: int = Field(default=1, ge=1)
    """Repetitions of cross-validation, each with other folds."""
    inner_folds: int = Field(default=5, ge=2)
    """Folds inside each training set, for penalties, thresholds and early stopping."""
    group: str | None = None
    """Column that names people who must stay together (family, twins); unset keeps only each person together."""
    strata: tuple[str, ...] = ()
    """Columns whose values cross-validation spreads evenly over the folds, beside the classes: the arms of a trial."""
    site: str = "site"
    """Column that leave-one-site-out goes through."""
    test_where: dict[str, tuple[str, ...]] = {}
    """For fixed: column -> values of the people who test, e.g. {dataset: [adhd200]}; everybody else trains."""
    seed: int = 0
    """Seed of the folds."""
    transductive: bool = False
    """Allow people of the pretraining set in test sets; then said in every table."""


@dataclass(frozen=True, kw_only=True)
class Fold:
    """One training and test set."""

    repeat: int
    """From 1."""
    fold: int
    """From 1."""
    train: tuple[str, ...]
    """Participant keys."""
    test: tuple[str, ...]
    """Participant keys."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """Who is where in every repetition and fold; checked against leaks when made or read."""

    table: pd.DataFrame
    """One row per participant, repetition and fold, columns :data:`COLUMNS`."""

    def __post_init__(self) -> None:
        _refuse_malformed(self.table)
        _refuse_leaks(self.table)

    def folds(self) -> Iterator[Fold]:
        """Every fold in order."""
        for key, rows in self.table.groupby(["repeat", "fold"], sort=True):
            repeat, fold = cast("tuple[int, int]", key)
            yield Fold(
                repeat=int(repeat),
                fold=int(fold),
                train=tuple(rows.loc[rows["role"] == "train", "participant_id"]),
                test=tuple(rows.loc[rows["role"] == "test", "participant_id"]),
            )

    @property
    def repeats(self) -> int:
        """Number of repetitions."""
        return int(self.table["repeat"].nunique())

    @property
    def cross_validated(self) -> bool:
        """Whether test people of one fold train in another, so that pooled scores are dependent."""
        roles = self.table.groupby("participant_id")["role"].agg(set)
        return bool(roles.map(lambda found: {"train", "test"} <= found).any())

    @property
    def tested(self) -> tuple[str, ...]:
        """Everybody who is in a test set, in table order."""
        return tuple(dict.fromkeys(self.table.loc[self.table["role"] == "test", "participant_id"]))

    @property
    def groups(self) -> dict[str, str]:
        """Group of each participant."""
        return dict(zip(self.table["participant_id"], self.table["group"], strict=True))

    def digest(self) -> str:
        """SHA-256 of who is where."""
        return digest_of(self.table[["participant_id", "repeat", "fold", "role"]].astype(str).to_numpy().tolist())


def make_split(target: Target, table: pd.DataFrame, design: DesignSettings) -> Split:
    """The split of a target's participants under a design; ``table`` is the participant table.

    Raises
    ------
    InputNotFoundError
        The site, group or test column is absent, or nobody tests.
    InputDatasetError
        Too few people of a class or groups too large for the folds; a site column that cannot be left out.
    """
    table = table.loc[list(target.participants)]
    groups = people_groups(table, design.group)
    if design.kind == "cross-validation":
        return Split(table=_cross_validation(target, table, groups, design))
    if design.kind == "leave-one-site-out":
        return Split(table=_leave_one_site_out(target, table, groups, design))
    if not design.test_where:
        raise SettingsError(
            "a fixed split needs to know who tests", fix="set design.test_where, e.g. --set 'design.test_where={dataset: [adhd200]}'"
        )
    tests = np.ones(len(table), dtype=bool)
    for column, values in design.test_where.items():
        require_column(table, column)
        tests &= table[column].map(class_text).isin(values).to_numpy()
    names = np.array(target.participants)
    why = "test: " + ", ".join(f"{column} in {'/'.join(values)}" for column, values in design.test_where.items())
    return fixed_split(target, train=names[~tests], test=names[tests], groups=groups, why=why)


def fixed_split(
    target: Target, *, train: Sequence[str] | NDArray, test: Sequence[str] | NDArray, why: str, groups: Mapping[str, str] | None = None
) -> Split:
    """One training and one test set, named person by person; people of the target in neither are unused."""
    sides = {**dict.fromkeys(map(str, train), "train"), **dict.fromkeys(map(str, test), "test")}
    both = set(map(str, train)) & set(map(str, test))
    if both:
        raise _leak(f"{len(both)} people are in training and test, e.g. {min(both)}")
    for side in ("train", "test"):
        if side not in {sides.get(name) for name in target.participants}:
            raise InputNotFoundError(f"nobody with a label is in the {side} set", fix="mend the rule that chooses test people")
    roles = [sides.get(name, "unused") for name in target.participants]
    split = Split(table=_rows(target.participants, groups or {}, 1, 1, roles, [why if role == "test" else "the others" for role in roles]))
    _require_classes(target, split)
    return split


def write_split(path: Path, split: Split) -> Path:
    """Write ``split.tsv``; gives back the path."""
    return write_tsv(path, split.table)


def read_split(path: Path) -> Split:
    """A split file, checked again: a leak written by hand is refused.

    Raises
    ------
    InputNotFoundError
        The file is absent.
    InputDatasetError
        It is unreadable, malformed, or leaks.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputNotFoundError("the split file is absent", where=path, fix="make the split before training") from error
    try:
        table = pd.read_csv(io.StringIO(text), sep="\t", dtype={"participant_id": str, "group": str, "why": str}, keep_default_na=False)
        return Split(table=table)
    except (ValueError, TypeError) as error:
        raise InputDatasetError(
            f"the split file is unreadable: {error}", where=path, fix=f"it must be a table of {', '.join(COLUMNS)}"
        ) from error
    except InputDatasetError as error:
        raise InputDatasetError(error.what, where=path, fix=error.fix) from error


def inner_folds(
    target: Target, *, groups: Mapping[str, str], folds: int, seed: int
) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]:
    """(training rows, validation rows) inside one training set, stratified and grouped like the outer folds.

    Fewer folds are used where a class has fewer people than folds; the fewest is two.
    """
    labels = _strata(target)
    limit = int(np.bincount(labels).min()) if target.kind != "continuous" else len(labels) // 2
    number = max(2, min(folds, limit, len({groups.get(name, name) for name in target.participants})))
    test = _assign(labels, [groups.get(name, name) for name in target.participants], number, seed)
    pairs = tuple((np.flatnonzero(test != fold), np.flatnonzero(test == fold)) for fold in range(number))
    for train, _ in pairs:
        if target.kind != "continuous" and len(np.unique(labels[train])) < len(target.classes):
            raise InputDatasetError(
                f"a class of '{target.name}' is in one group only: no inner fold can learn it",
                fix="leave the class out (coding.classes), or check the group column",
            )
    return pairs


def participant_hash(dataset: str, participant: str) -> str:
    """SHA-256 of ``<dataset>+<label>``, the form in which a model's provenance.json lists the people it saw."""
    key = participant if participant.startswith(f"{dataset}+") else f"{dataset}+{participant}"
    return hashlib.sha256(key.encode()).hexdigest()


def refuse_pretrained(split: Split, table: pd.DataFrame, seen: Collection[str], *, transductive: bool) -> int:
    """Number of test people whose hash is among ``seen``, the people a model was pretrained on.

    Raises
    ------
    InputDatasetError
        There are some and the design is not transductive.
    """
    seen = set(seen)
    overlap = [name for name in split.tested if participant_hash(str(table.loc[name, "dataset"]), name) in seen]
    if overlap and not transductive:
        raise InputDatasetError(
            f"{len(overlap)} of {len(split.tested)} test people were in the model's pretraining, e.g. {overlap[0]}",
            fix="test on other people, pretrain inside each fold, or say so in every table: --set design.transductive=true",
        )
    return len(overlap)


def _leak(what: str) -> InputDatasetError:
    return InputDatasetError(f"the split leaks: {what}", fix="make the split again with people and groups on one side only")


def _refuse_malformed(table: pd.DataFrame) -> None:
    missing = [column for column in COLUMNS if column not in table]
    if missing:
        raise InputDatasetError(f"the split lacks {', '.join(missing)}", fix=f"it must be a table of {', '.join(COLUMNS)}")
    wrong = sorted(set(table["role"]) - {"train", "test", "unused"})
    if wrong:
        raise InputDatasetError(f"'{wrong[0]}' is no role of a split", fix="roles are train, test and unused")
    for (repeat, fold), rows in table.groupby(["repeat", "fold"]):
        for role in ("train", "test"):
            if role not in set(rows["role"]):
                raise InputDatasetError(f"repeat {repeat}, fold {fold} has nobody in {role}", fix="make the split again")


def _refuse_leaks(table: pd.DataFrame) -> None:
    used = table[table["role"] != "unused"]
    repeated = used.duplicated(["participant_id", "repeat", "fold"])
    if repeated.any():
        raise _leak(f"{used.loc[repeated, 'participant_id'].iloc[0]} is twice in one fold")
    for (repeat, fold), rows in used.groupby(["repeat", "fold"]):
        both = set(rows.loc[rows["role"] == "train", "group"]) & set(rows.loc[rows["role"] == "test", "group"])
        if both:
            raise _leak(f"group {min(both)} is in training and test of repeat {repeat}, fold {fold}")
    tests = used[used["role"] == "test"].duplicated(["participant_id", "repeat"])
    if tests.any():
        raise _leak("a person is tested in two folds of one repetition")


def people_groups(table: pd.DataFrame, column: str | None) -> dict[str, str]:
    """Group of each person of ``table`` by a column (family, twins); everybody alone where it is unset or empty."""
    if column is None:
        return {str(name): str(name) for name in table.index}
    require_column(table, column)
    # A person without a family is a group of their own; the prefix keeps a family called like a person apart.
    texts = table[column].map(class_text)
    return {str(name): f"{column}:{text}" if text else str(name) for name, text in texts.items()}


def _strata(target: Target) -> NDArray[np.int64]:
    if target.kind != "continuous":
        return target.observed.astype(np.int64)
    ranks = np.argsort(np.argsort(target.observed, kind="stable"), kind="stable")
    number = min(_QUANTILES, max(1, len(ranks) // 10))
    return (ranks * number // len(ranks)).astype(np.int64)


def _joint(labels: NDArray[np.int64], table: pd.DataFrame, columns: Sequence[str]) -> NDArray[np.int64]:
    """Strata of the labels and of further columns of the participant table together."""
    for column in columns:
        require_column(table, column)
        labels = pd.factorize(pd.Series(zip(labels, table[column].map(class_text), strict=True)), sort=True)[0].astype(np.int64)
    return labels


def _assign(labels: NDArray[np.int64], groups: Sequence[str], folds: int, seed: int) -> NDArray[np.int64]:
    """Test fold of every row."""
    single = len(set(groups)) == len(groups)
    splitter = StratifiedKFold if single else StratifiedGroupKFold
    codes = None if single else pd.factorize(np.asarray(groups))[0]
    assigned = np.full(len(labels), -1, dtype=np.int64)
    for fold, (_, test) in enumerate(splitter(folds, shuffle=True, random_state=seed).split(labels[:, None], labels, codes)):
        assigned[test] = fold
    return assigned


def _cross_validation(target: Target, table: pd.DataFrame, groups: Mapping[str, str], design: DesignSettings) -> pd.DataFrame:
    names, labels = target.participants, _joint(_strata(target), table, design.strata)
    number = len(set(groups.values()))
    if number < design.folds:
        raise InputDatasetError(f"{number} people or groups cannot fill {design.folds} folds", fix="use fewer folds (--set design.folds=N) or more people")  # fmt: skip
    for index, name in enumerate(target.classes):
        members = {groups[person] for person, value in zip(names, target.observed, strict=True) if value == index}
        if len(members) < design.folds:
            raise InputDatasetError(
                f"class '{name}' of '{target.name}' has {len(members)} people or groups, fewer than {design.folds} folds",
                fix="use fewer folds (--set design.folds=N), or leave the class out (coding.classes)",
            )
    largest = max(pd.Series(list(groups.values())).value_counts())
    if largest > len(names) / design.folds and largest > 1:
        raise InputDatasetError(
            f"the largest group of '{design.group}' has {largest} people, more than a fold ({len(names) / design.folds:.1f})",
            fix="use fewer folds (--set design.folds=N), or check the group column",
        )
    why = f"stratified {design.folds}-fold, seed {design.seed}" + "".join(f", and by {column}" for column in design.strata)
    why += f", grouped by {design.group}" if design.group else ""
    parts = []
    for repeat in range(design.repeats):
        assigned = _assign(labels, [groups[name] for name in names], design.folds, design.seed + repeat)
        for fold in range(design.folds):
            roles = np.where(assigned == fold, "test", "train")
            parts.append(_rows(names, groups, repeat + 1, fold + 1, roles, [why] * len(names)))
    split = Split(table=pd.concat(parts, ignore_index=True))
    _require_classes(target, split)
    return split.table


def _leave_one_site_out(target: Target, table: pd.DataFrame, groups: Mapping[str, str], design: DesignSettings) -> pd.DataFrame:
    require_column(table, design.site)
    sites = table[design.site].map(class_text)
    several = sites[sites.str.contains("+", regex=False)]
    if len(several):
        raise InputDatasetError(f"{len(several)} people were scanned at several sites, e.g. {several.index[0]}", fix="leave them out ('where'), or choose another design.site")  # fmt: skip
    known = sorted(set(sites) - {""})
    if len(known) < 2:
        raise InputDatasetError(f"column '{design.site}' has {len(known)} site(s): none can be left out", fix="use cross-validation, or another design.site")  # fmt: skip
    parts = []
    for fold, site in enumerate(known):
        away = {groups[name] for name in table.index[sites == site]}
        roles = [
            "test" if sites[name] == site else "unused" if not sites[name] or groups[name] in away else "train" for name in table.index
        ]
        why = {
            "test": f"{design.site} {site} is left out",
            "train": "another site",
            "unused": "site unknown, or family at the site left out",
        }
        parts.append(_rows(target.participants, groups, 1, fold + 1, roles, [why[role] for role in roles]))
    split = Split(table=pd.concat(parts, ignore_index=True))
    _require_classes(target, split)
    return split.table


def _require_classes(target: Target, split: Split) -> None:
    """Refuse a training set with fewer than two people of a class."""
    if target.kind == "continuous":
        return
    for fold in split.folds():
        counts = np.bincount(target.observed[target.rows(fold.train)].astype(int), minlength=len(target.classes))
        if counts.min() < 2:
            name = target.classes[int(counts.argmin())]
            raise InputDatasetError(
                f"repeat {fold.repeat}, fold {fold.fold}: class '{name}' of '{target.name}' has {counts.min()} people in training",
                fix="two are the least; use another design, or leave the class or site out ('where', target.classes)",
            )


def _rows(
    names: Sequence[str], groups: Mapping[str, str], repeat: int, fold: int, roles: Sequence[str] | NDArray, why: Sequence[str]
) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "participant_id": list(names),
            "group": [groups.get(name, name) for name in names],
            "repeat": repeat,
            "fold": fold,
            "role": [str(role) for role in roles],
            "why": list(why),
        }
    )
