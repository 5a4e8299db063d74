"""Clinical variables beside images: which columns, and how their values become numbers, imputed and scaled by training people alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd

from brainfm_cli.config import Frozen
from brainfm_cli.errors import InputDatasetError, SettingsError
from brainfm_cli.learning.targets import class_text, require_column

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


class ClinicalSettings(Frozen):
    """Columns of participants.tsv that are read beside the images."""

    columns: tuple[str, ...] = ()
    """Columns, e.g. [age, sex]; none is read unless named. The target, or what is known only after the scan, does not belong here."""
    categorical: tuple[str, ...] = ()
    """Those of them whose numbers are codes; text is categorical in any case."""
    missing: Literal["impute", "refuse"] = "impute"
    """impute: the median or no category of training people, and a further variable that says so; refuse: an error."""


class ClinicalVariable(Frozen):
    """How one column becomes numbers."""

    name: str
    """Column."""
    kind: Literal["number", "category"]
    """number is standardised, category becomes one variable per value."""
    centre: float = 0.0
    """Mean of training people, after imputation."""
    scale: float = 1.0
    """Standard deviation of training people; 0 where everybody has the same value, which is then left out."""
    median: float = 0.0
    """Stands for missing values."""
    categories: tuple[str, ...] = ()
    """Values among training people; others count as none of them."""
    indicator: bool = False
    """Whether a further variable says that the value is missing: where training people lack some."""


class ClinicalCoding(Frozen):
    """Columns to numbers, as fitted on training people."""

    variables: tuple[ClinicalVariable, ...] = ()
    """By column."""
    missing: Literal["impute", "refuse"] = "impute"
    """What becomes of missing values."""

    @property
    def names(self) -> tuple[str, ...]:
        """What each number is."""
        found: list[str] = []
        for one in self.variables:
            found += [one.name] if one.kind == "number" else [f"{one.name}={value}" for value in one.categories]
            found += [f"{one.name} missing"] if one.indicator else []
        return tuple(found)

    def encode(self, table: pd.DataFrame, people: Sequence[str], place: str | None = None) -> NDArray[np.float32]:
        """(people, numbers) float32.

        Raises
        ------
        InputNotFoundError
            A column is absent.
        InputDatasetError
            A value is no number, or is missing where missing values are refused.
        """
        blocks = [np.zeros((len(people), 0))]
        for one in self.variables:
            values = _column(table, one.name, people, place)
            absent = np.array([value == "" for value in values], bool)
            if absent.any() and self.missing == "refuse":
                raise InputDatasetError(
                    f"'{one.name}' of sub-{people[int(absent.argmax())]} is missing ({int(absent.sum())} in all)", where=place,
                    fix="fill the column, leave these people out, or let it be imputed (clinical.missing=impute)",
                )  # fmt: skip
            if one.kind == "number":
                numbers = _numbers(one.name, values, people, place)
                numbers[absent] = one.median
                blocks.append(((numbers - one.centre) / one.scale if one.scale > 0 else np.zeros(len(people)))[:, None])
            else:
                blocks.append(
                    np.array([[value == name for name in one.categories] for value in values], np.float64).reshape(len(people), -1)
                )
            if one.indicator:
                blocks.append(absent[:, None].astype(np.float64))
        return np.concatenate(blocks, axis=1).astype(np.float32)

    def notes(self, table: pd.DataFrame, people: Sequence[str], place: str | None = None) -> tuple[str, ...]:
        """What was missing or not known to training people."""
        found = []
        for one in self.variables:
            values = _column(table, one.name, people, place)
            absent = sum(value == "" for value in values)
            if absent:
                found.append(f"'{one.name}' is missing for {absent} of {len(people)} people and was imputed")
            unknown = sorted({value for value in values if value and one.kind == "category" and value not in one.categories})
            if unknown:
                found.append(f"'{one.name}' has values that no training person had and that count as none: {', '.join(unknown[:5])}")
        return tuple(found)


def fit_clinical(table: pd.DataFrame, people: Sequence[str], settings: ClinicalSettings, place: str | None = None) -> ClinicalCoding:
    """The coding of these training people.

    Raises
    ------
    SettingsError
        ``categorical`` names a column that is not read.
    InputNotFoundError
        A column is absent.
    InputDatasetError
        Nobody has a value, or a value is no number.
    """
    strangers = sorted(set(settings.categorical) - set(settings.columns))
    if strangers:
        raise SettingsError(f"clinical.categorical names '{strangers[0]}', which clinical.columns lacks", fix="name it in both")
    variables = []
    for name in settings.columns:
        values = _column(table, name, people, place)
        known = [value for value in values if value]
        if not known:
            raise InputDatasetError(f"no training person has a value of '{name}'", where=place, fix="leave it out of clinical.columns")
        indicator = len(known) < len(values)
        if name in settings.categorical or not all(_is_number(value) for value in known):
            mixed = [value for value in known if _is_number(value)]
            if mixed and name not in settings.categorical:
                odd = next(value for value in known if not _is_number(value))
                raise InputDatasetError(
                    f"'{name}' holds numbers and '{odd}'", where=place, fix="mend the value, or name the column in clinical.categorical"
                )
            categories = tuple(sorted(set(known)))
            # of two values one says everything
            kept = categories[1:] if len(categories) == 2 else categories
            variables.append(ClinicalVariable(name=name, kind="category", categories=kept, indicator=indicator))
            continue
        numbers = _numbers(name, values, people, place)
        median = float(np.nanmedian(numbers))
        filled = np.where(np.isnan(numbers), median, numbers)
        variables.append(
            ClinicalVariable(name=name, kind="number", centre=float(filled.mean()), scale=float(filled.std()), median=median, indicator=indicator)
        )  # fmt: skip
    return ClinicalCoding(variables=tuple(variables), missing=settings.missing)


def _column(table: pd.DataFrame, name: str, people: Sequence[str], place: str | None) -> list[str]:
    """Values as text, empty where missing."""
    require_column(table, name, place)
    return [class_text(value) for value in table[name].reindex(list(people))]


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _numbers(name: str, values: Sequence[str], people: Sequence[str], place: str | None) -> NDArray[np.float64]:
    """Values as numbers, NaN where missing."""
    found = np.full(len(values), np.nan)
    for row, value in enumerate(values):
        if not value:
            continue
        if not _is_number(value):
            raise InputDatasetError(f"'{name}' of sub-{people[row]} is '{value}', which is no number", where=place, fix="mend the value, or write n/a")  # fmt: skip
        found[row] = float(value)
    return found
