"""The people of a cohort: participants tables of one or several datasets, harmonised by a declared label table.

One dataset keeps its columns as they are. Several datasets share only the columns that the label table declares for each of
them: a code that means one thing here and another there must never be merged by its name alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from brainfm_cli.bids.cohort import participant_key, read_participants
from brainfm_cli.errors import InputDatasetError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from brainfm_cli.bids.codings import LabelColumn, LabelTable


@dataclass(frozen=True, kw_only=True)
class People:
    """One dataset's participants table, and who of it is to be packed."""

    dataset: str
    """Name of the dataset."""
    table: Path | None
    """Its participants.tsv, none where it has none."""
    labels: tuple[str, ...]
    """Participants with series."""


@dataclass(frozen=True, kw_only=True)
class Harmonised:
    """The participants of a cohort."""

    frame: pd.DataFrame
    """One row per participant key (index), columns ready for participants.tsv."""
    descriptions: dict[str, Any]
    """For participants.json."""
    sites: dict[str, str]
    """Site of each participant key, empty text where unknown."""
    notes: tuple[str, ...] = field(default=())
    """Who has series and no row, and the other way round."""


def harmonise(people: Sequence[People], labels: LabelTable, *, site_column: str | None = None) -> Harmonised:
    """The participants table of the datasets together.

    Raises
    ------
    SettingsError
        A target is not declared for every dataset, or the table names a dataset that is not packed.
    InputDatasetError
        A declared column is absent, a code is not listed, a value of a continuous column is no number, the site column is
        absent, or a participants.tsv and the series have nobody in common.
    """
    several = len(people) > 1
    names = [one.dataset for one in people]
    _check_declared(labels, names)
    notes: list[str] = []
    frames: list[pd.DataFrame] = []
    sites: dict[str, str] = {}
    for one in people:
        frame, found = _people_of(one, labels, site_column, notes, several=several)
        frames.append(frame)
        sites |= found
    frame = pd.concat(frames)
    frame.index.name = "participant_id"
    if several and not labels:
        notes.append("no column of participants.tsv is packed: several datasets need a 'labels' table that declares each one's coding")
    return Harmonised(frame=frame, descriptions=_descriptions(labels, frame, several=several), sites=sites, notes=tuple(notes))


def _people_of(
    one: People, labels: LabelTable, site_column: str | None, notes: list[str], *, several: bool
) -> tuple[pd.DataFrame, dict[str, str]]:
    keys = [participant_key(one.dataset, label, several=several) for label in one.labels]
    if one.table is None:
        notes.append(f"{one.dataset}: no participants.tsv; its {len(keys)} participants are packed without labels")
        table = text = pd.DataFrame(index=pd.Index([], dtype=object))
    else:
        table, text = read_participants(one.table), _as_text(one.table)
        _compare(one, list(table.index), notes)
    rows = text.reindex(one.labels)
    frame = pd.DataFrame(index=keys) if several else table.reindex(one.labels).set_axis(keys)
    if several:
        frame["dataset"] = one.dataset
    for target, codings in labels.items():
        coding = codings[one.dataset]
        frame[target] = np.nan if coding is None or one.table is None else _decode(rows, coding, target, one, notes).to_numpy()
    column = site_column or ("site" if "site" in rows else None)
    if site_column and one.table is not None and site_column not in rows:
        raise InputDatasetError(f"participants.tsv has no column '{site_column}'", where=one.table, fix="mend --set site_column=NAME")
    values = rows[column].fillna("") if column and column in rows else pd.Series("", index=one.labels)
    sites = dict(zip(keys, (str(value) for value in values), strict=True))
    if several:
        frame["site"] = [sites[key] or np.nan for key in keys]
    return frame, sites


def _check_declared(labels: LabelTable, names: Sequence[str]) -> None:
    for target, codings in labels.items():
        unknown = [name for name in codings if name not in names]
        if unknown:
            raise SettingsError(
                f"labels.{target} names the dataset '{unknown[0]}', which is not packed", fix=f"the datasets are {', '.join(names)}"
            )
        undeclared = [name for name in names if name not in codings]
        if undeclared:
            raise SettingsError(
                f"the coding of '{target}' is not declared for {', '.join(undeclared)}",
                fix=f"add labels.{target}.{undeclared[0]}: {{column: NAME, classes: {{CODE: CLASS}}}}, or null where it is absent",
            )
        kinds = {coding.continuous for coding in codings.values() if coding is not None}
        if len(kinds) > 1:
            raise SettingsError(f"labels.{target} is continuous in one dataset and has classes in another", fix="declare one kind")


def _decode(rows: pd.DataFrame, coding: LabelColumn, target: str, one: People, notes: list[str]) -> pd.Series:
    for column in (coding.column, *coding.where):
        if column not in rows:
            raise InputDatasetError(
                f"participants.tsv of {one.dataset} has no column '{column}' for '{target}'",
                where=one.table,
                fix=f"mend labels.{target}",
            )
    values = rows[coding.column]
    concerned = _concerned(rows, coding, target, one)
    if not concerned.all():
        notes.append(f"{one.dataset}: {int((~concerned).sum())} people are none of those that have a '{target}' (where), and get none")
        values = values.where(concerned)
    values = values.mask(np.array([any(_same(value, code) for code in coding.missing) for value in values], bool))
    if coding.continuous:
        numbers = pd.to_numeric(values, errors="coerce")
        bad = values[numbers.isna() & values.notna()]
        if len(bad):
            raise InputDatasetError(
                f"'{bad.iloc[0]}' in column '{coding.column}' is no number (sub-{bad.index[0]})",
                where=one.table, fix=f"mend it, or list it under labels.{target}.{one.dataset}.missing",
            )  # fmt: skip
        return numbers
    decoded = values.map(
        lambda value: next((name for code, name in coding.classes.items() if _same(value, code)), None), na_action="ignore"
    )
    unlisted = sorted({str(value) for value, name in zip(values, decoded, strict=True) if pd.notna(value) and pd.isna(name)})
    if unlisted:
        raise InputDatasetError(
            f"column '{coding.column}' has codes that labels.{target}.{one.dataset} does not list: {', '.join(unlisted[:8])}",
            where=one.table, fix="give each a class, or list it under 'missing'",
        )  # fmt: skip
    return decoded


def _concerned(rows: pd.DataFrame, coding: LabelColumn, target: str, one: People) -> pd.Series:
    """Whether each person has the label at all."""
    concerned = pd.Series(True, index=rows.index)  # noqa: FBT003
    for column, allowed in coding.where.items():
        there = np.array([any(_same(value, code) for code in allowed) for value in rows[column]], bool)
        if not there.any():
            found = ", ".join(sorted({str(value) for value in rows[column].dropna()})[:8]) or "nothing"
            raise InputDatasetError(
                f"nobody has '{column}' = {' or '.join(allowed)}, which labels.{target}.{one.dataset} asks for; it holds {found}",
                where=one.table, fix="mend 'where'",
            )  # fmt: skip
        concerned &= there
    return concerned


def _same(value: object, code: str) -> bool:
    if not isinstance(value, str):
        return False
    if value == code:
        return True
    try:
        return float(value) == float(code)
    except ValueError:
        return False


def _compare(one: People, listed: Sequence[str], notes: list[str]) -> None:
    without_row = [label for label in one.labels if label not in set(listed)]
    without_series = [label for label in listed if label not in set(one.labels)]
    if len(without_row) == len(one.labels):
        raise InputDatasetError(
            f"participants.tsv and the series of {one.dataset} have nobody in common (sub-{one.labels[0]} is not listed)",
            where=one.table, fix="participant_id must be sub-<label> as in the folder names, leading zeros included",
        )  # fmt: skip
    if without_row:
        notes.append(f"{one.dataset}: series without a row in participants.tsv, packed without labels: {_listing(without_row)}")
    if without_series:
        notes.append(f"{one.dataset}: a label for nobody, left out (a row in participants.tsv and no series): {_listing(without_series)}")


def _listing(labels: Sequence[str]) -> str:
    return ", ".join(f"sub-{label}" for label in labels[:5]) + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")


def _as_text(path: Path) -> pd.DataFrame:
    table = pd.read_csv(path, sep="\t", dtype=str, na_values=["n/a", ""], keep_default_na=False)
    table["participant_id"] = table["participant_id"].str.removeprefix("sub-")
    return table.set_index("participant_id")


def _descriptions(labels: LabelTable, frame: pd.DataFrame, *, several: bool) -> dict[str, Any]:
    described: dict[str, Any] = {}
    for target, codings in labels.items():
        declared = {name: coding for name, coding in codings.items() if coding is not None}
        levels = sorted({name for coding in declared.values() for name in coding.classes.values()})
        described[target] = {
            "Description": f"{target}, harmonised from {', '.join(f'{name}:{coding.column}' for name, coding in declared.items())}",
            **({"Levels": {level: level for level in levels}} if levels else {}),
            "Coding": {name: coding.model_dump(exclude_defaults=True) for name, coding in declared.items()},
        }
    if several:
        described["dataset"] = {"Description": "dataset the participant comes from"}
        described["site"] = {"Description": "site or scanner"}
    return {name: described[name] for name in frame.columns if name in described}
