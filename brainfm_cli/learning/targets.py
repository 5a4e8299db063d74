"""What is predicted: a column of a cohort's participants, its classes and coding stated, nobody guessed.

Label tables declare column, classes and positive class: in settings (:class:`TargetSettings`) or in the
``Levels``, ``PositiveClass`` and ``Units`` of participants.json. Integer codes that nobody declared are an error.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import field_validator

from brainfm_cli.config import Frozen
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from brainfm_cli.bids.cohort import Cohort

Kind = Literal["binary", "multiclass", "continuous"]
# Whole numbers with at most this many different values may be codes as well as measurements.
_MAX_CODES = 20
_FEW = 5
_FROM_INDEX = ("dataset", "site", "mean_fd", "kept_fraction")


class TargetSettings(Frozen):
    """How the target column is read."""

    type: Literal["auto", "categorical", "continuous"] = "auto"
    """categorical, continuous, or auto: text is categorical, fractions are continuous, undeclared whole-number codes are an error."""
    classes: tuple[str, ...] = ()
    """Classes to keep, in order; people of other classes are left out and counted. Empty keeps all."""
    positive: str | None = None
    """Positive class of a two-class target; required for number codes that participants.json does not declare."""
    ordered: bool = False
    """The classes have an order, that of ``classes`` or else of their numbers: quadratic κ is then scored too."""

    @field_validator("classes", "positive", mode="before")
    @classmethod
    def _codes_as_text(cls, value: Any) -> Any:  # noqa: ANN401  (YAML gives numbers for codes)
        if isinstance(value, list | tuple):
            return tuple(class_text(item) for item in value)
        return value if value is None else class_text(value)


@dataclass(frozen=True, kw_only=True)
class Target:
    """A column read as what is predicted, one value per participant."""

    name: str
    """Column of participants.tsv."""
    kind: Kind
    """binary, multiclass or continuous."""
    participants: tuple[str, ...]
    """Participant keys that have series and a label, in the order of the participants table."""
    observed: NDArray[np.float64]
    """(participants,) index of the class, or the value of a continuous target."""
    classes: tuple[str, ...] = ()
    """Class names by index; of two, the second is the positive one. Empty for continuous targets."""
    ordered: bool = False
    """Whether the order of three or more classes means something."""
    dropped: dict[str, int] = field(default_factory=dict)
    """How many people were left out, by reason."""
    notes: tuple[str, ...] = ()
    """What the reader of the results should know about the coding."""

    @property
    def positive(self) -> str | None:
        """The positive class of a binary target."""
        return self.classes[1] if self.kind == "binary" else None

    def counts(self) -> dict[str, int]:
        """People per class; empty for continuous targets."""
        return {name: int(np.sum(self.observed == index)) for index, name in enumerate(self.classes)}

    def rows(self, participants: Sequence[str]) -> NDArray[np.int64]:
        """Positions of ``participants`` in :attr:`participants`."""
        place = {name: index for index, name in enumerate(self.participants)}
        return np.array([place[name] for name in participants], dtype=np.int64)

    def keep(self, participants: Sequence[str]) -> Target:
        """The same target for some of its participants, in table order."""
        wanted = set(participants)
        rows = [index for index, name in enumerate(self.participants) if name in wanted]
        return replace(self, participants=tuple(self.participants[row] for row in rows), observed=self.observed[rows])


def participant_table(cohort: Cohort) -> pd.DataFrame:
    """One row per participant that has series: the columns of participants.tsv, and from the index dataset, site and motion.

    Motion is the mean over runs; a person scanned at several sites has them joined by ``+``. A column of
    participants.tsv is used where the index knows nothing.
    """
    runs = cohort.index.drop_duplicates(["participant", "session", "run"])
    grouped = runs.groupby("participant", sort=False)
    index = pd.DataFrame(
        {
            "dataset": grouped["dataset"].first(),
            "site": grouped["site"].agg(lambda sites: "+".join(sorted({str(site) for site in sites.dropna()} - {""}))),
            "mean_fd": grouped["mean_fd"].mean(),
            "kept_fraction": grouped["kept_fraction"].mean(),
        }
    )
    table = cohort.participants[cohort.participants.index.isin(index.index)].copy()
    index = index.reindex(table.index)
    index["site"] = index["site"].replace("", None)
    for column in _FROM_INDEX:
        if column not in table or index[column].notna().any():
            table[column] = index[column]
    return table


def read_target(
    cohort: Cohort, column: str, settings: TargetSettings | None = None, *, participants: Sequence[str] | None = None
) -> Target:
    """The target of a cohort's column, of all people with series or of ``participants``.

    Raises
    ------
    InputNotFoundError
        The column is absent, or nobody with series has a value.
    InputDatasetError
        One class only, a constant, number codes that nobody declared, or a value that is no number.
    SettingsError
        Declared classes do not occur.
    """
    settings = settings or TargetSettings()
    table = participant_table(cohort)
    declared = _declaration(cohort, column)
    return target_of_table(
        table, column, settings, declared=declared, participants=participants, place=str(cohort.root / "participants.tsv")
    )


def target_of_table(
    table: pd.DataFrame,
    column: str,
    settings: TargetSettings,
    *,
    declared: Mapping[str, Any] | None = None,
    participants: Sequence[str] | None = None,
    place: str | None = None,
) -> Target:
    """The target of one column of a participant table; ``declared`` is the column's entry of participants.json."""
    declared = declared or {}
    require_column(table, column, place)
    chosen = table[column] if participants is None else table.loc[table.index.isin(set(participants)), column]
    labelled = chosen[chosen.notna() & (chosen.map(class_text) != "")]
    dropped = {"without a label": len(chosen) - len(labelled)} if len(labelled) < len(chosen) else {}
    if not len(labelled):
        raise InputNotFoundError(
            f"nobody with series has a value of '{column}'", where=place, fix="fill the column, or choose another --target"
        )
    notes: list[str] = []
    if _is_categorical(labelled, settings, declared, column, place, notes):
        return _categorical(labelled, settings, declared, column, place, dropped, notes)
    return _continuous(labelled, column, place, dropped, notes)


def require_column(table: pd.DataFrame, column: str, place: str | None = None) -> None:
    """Refuse a column that the table does not have, naming those it has."""
    if column not in table:
        have = ", ".join(str(name) for name in table.columns) or "none"
        raise InputNotFoundError(f"participants.tsv has no column '{column}'; it has: {have}", where=place, fix="choose one of these")


def class_text(value: object) -> str:
    """A value as class name: whole numbers without a decimal point, missing values empty."""
    if value is None or (isinstance(value, float) and np.isnan(value)) or value is pd.NA:
        return ""
    if isinstance(value, float | np.floating) and float(value).is_integer():
        return str(int(value))
    return str(value).strip()


def _declaration(cohort: Cohort, column: str) -> dict[str, Any]:
    path = cohort.root / "participants.json"
    try:
        entry = read_json(path).get(column, {})
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as error:
        raise InputDatasetError(f"participants.json is unreadable: {error}", where=path, fix="it must be a JSON object, one entry per column") from error  # fmt: skip
    return entry if isinstance(entry, dict) else {}


def _numbers(values: pd.Series) -> NDArray[np.float64] | None:
    if values.dtype == bool:
        return None
    numbers = pd.to_numeric(values, errors="coerce")
    return None if numbers.isna().any() else numbers.to_numpy(np.float64)


def _is_categorical(
    values: pd.Series, settings: TargetSettings, declared: Mapping[str, Any], column: str, place: str | None, notes: list[str]
) -> bool:
    if settings.type != "auto":
        return settings.type == "categorical"
    if settings.ordered or settings.classes or settings.positive is not None or declared.get("Levels"):
        return True
    numbers = _numbers(values)
    if numbers is None:
        return True
    if declared.get("Units") or not np.all(numbers == np.round(numbers)):
        return False
    distinct = len(np.unique(numbers))
    if distinct <= _MAX_CODES:
        codes = ", ".join(class_text(code) for code in np.unique(numbers)[:6])
        raise InputDatasetError(
            f"'{column}' holds {distinct} whole numbers ({codes}{', …' if distinct > 6 else ''}) that may be class codes or measurements, and nobody declares which",
            where=place,
            fix="declare it: --set coding.type=continuous, or --set coding.type=categorical --set coding.positive=CODE, or 'Levels'/'Units' in participants.json",
        )  # fmt: skip
    notes.append(f"'{column}' holds {distinct} different whole numbers and was read as continuous")
    return False


def _categorical(
    values: pd.Series,
    settings: TargetSettings,
    declared: Mapping[str, Any],
    column: str,
    place: str | None,
    dropped: dict[str, int],
    notes: list[str],
) -> Target:
    names = values.map(class_text)
    found = sorted(set(names))
    levels = declared.get("Levels") if isinstance(declared.get("Levels"), dict) else {}
    if settings.classes:
        absent = [name for name in settings.classes if name not in found]
        if absent:
            raise SettingsError(f"nobody has '{column}' = {', '.join(absent)}; it has: {', '.join(found[:20])}", where=place, fix="mend coding.classes")  # fmt: skip
        kept = names.isin(settings.classes)
        if not kept.all():
            dropped["of a class that coding.classes leaves out"] = int((~kept).sum())
        names, found = names[kept], list(settings.classes)
    if len(found) == 1:
        raise InputDatasetError(f"everybody has '{column}' = {found[0]}: one class cannot be predicted", where=place, fix="choose another --target or other participants")  # fmt: skip
    if len(found) > max(2, len(names) // 2):
        raise InputDatasetError(f"'{column}' has {len(found)} classes for {len(names)} people", where=place, fix="choose a column with several people per class, or --set coding.type=continuous")  # fmt: skip
    if len(found) == 2:
        found = _ordered(found, settings, declared, levels, column, place, notes)
    elif settings.ordered and not settings.classes:
        found = _by_number(found, column, place)
    if len(found) > 2 and settings.positive is not None:
        raise SettingsError(f"coding.positive is set, but '{column}' has {len(found)} classes", where=place, fix="leave coding.positive out, or name two coding.classes")  # fmt: skip
    if levels:
        shown = ", ".join(f"{name} = {_level_text(levels[name])}" for name in found if name in levels)
        notes.append(f"coding of '{column}' (participants.json): {shown or 'none of the classes found'}")
    codes = {name: index for index, name in enumerate(found)}
    notes += _few(names, found, column)
    return Target(
        name=column,
        kind="binary" if len(found) == 2 else "multiclass",
        participants=tuple(names.index),
        observed=names.map(codes).to_numpy().astype(np.float64),
        classes=tuple(found),
        ordered=settings.ordered and len(found) > 2,
        dropped=dropped,
        notes=tuple(notes),
    )


def _few(names: pd.Series, found: Sequence[str], column: str) -> list[str]:
    counts = {name: int((names == name).sum()) for name in found}
    return [f"class '{name}' of '{column}' has {count} people: too few for any figure to be relied on" for name, count in counts.items() if count < _FEW]  # fmt: skip


def _ordered(
    found: list[str],
    settings: TargetSettings,
    declared: Mapping[str, Any],
    levels: Mapping[str, Any] | None,
    column: str,
    place: str | None,
    notes: list[str],
) -> list[str]:
    stated = declared.get("PositiveClass")
    positive = settings.positive if settings.positive is not None else None if stated is None else class_text(stated)
    if positive is None:
        positive = found[1]
        if all(_is_number(name) for name in found) and not levels:
            raise InputDatasetError(
                f"'{column}' is coded {found[0]}/{found[1]} and nobody declares which code is the positive class",
                where=place,
                fix=f"declare it: --set coding.positive={found[1]}, or 'PositiveClass' in participants.json",
            )
        notes.append(f"no positive class of '{column}' is declared; '{positive}' was taken (--set coding.positive=… changes it)")
    if positive not in found:
        raise SettingsError(f"the positive class '{positive}' does not occur in '{column}'; it has: {', '.join(found)}", where=place, fix="mend coding.positive")  # fmt: skip
    return [name for name in found if name != positive] + [positive]


def _by_number(found: list[str], column: str, place: str | None) -> list[str]:
    """Ordered classes by their numbers; as text, 10 would come before 2."""
    if not all(_is_number(name) for name in found):
        raise SettingsError(f"the classes of '{column}' are to be ordered, but are no numbers: {', '.join(found[:20])}", where=place, fix="name them in their order: --set 'coding.classes=[…]'")  # fmt: skip
    return sorted(found, key=float)


def _continuous(values: pd.Series, column: str, place: str | None, dropped: dict[str, int], notes: list[str]) -> Target:
    numbers = _numbers(values)
    if numbers is None:
        wrong = values[pd.to_numeric(values, errors="coerce").isna()].iloc[0]
        raise InputDatasetError(f"'{column}' is continuous, but '{wrong}' is no number", where=place, fix="write numbers or n/a")
    if not np.isfinite(numbers).all():
        raise InputDatasetError(f"'{column}' holds infinite values", where=place, fix="write numbers or n/a")
    if np.ptp(numbers) == 0:
        raise InputDatasetError(f"everybody has '{column}' = {numbers[0]:g}: a constant cannot be predicted", where=place, fix="choose another --target or other participants")  # fmt: skip
    return Target(name=column, kind="continuous", participants=tuple(values.index), observed=numbers, dropped=dropped, notes=tuple(notes))


def _level_text(level: object) -> str:
    return str(level.get("Description", level.get("TermURL", ""))) if isinstance(level, dict) else str(level)


def _is_number(text: str) -> bool:
    return pd.notna(pd.to_numeric(text, errors="coerce"))
