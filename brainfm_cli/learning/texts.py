"""What is said of disorders and networks: packaged, editable tables, and free text.

A disorder's text is its name, abbreviation and clinical description; what couplings it states is read by
:mod:`brainfm_cli.learning.facts` or given in the table. A text that no table holds is taken as a description.
"""

from __future__ import annotations

import io
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd
import yaml
from pydantic import ValidationError, field_validator, model_validator

from brainfm_cli.config import Frozen
from brainfm_cli.documents import parse_yaml
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, SettingsError
from brainfm_cli.learning.facts import Fact, NetworkWords, read_facts

if TYPE_CHECKING:
    from collections.abc import Sequence

Table = TypeVar("Table", bound=Frozen)

NEUTRAL = "A disorder of the brain."
"""A text that says nothing: the control of every text-conditioned score."""
UNAFFECTED = "A healthy person without any disorder."
"""The text of controls."""
_FEWEST_WORDS = 4


class DisorderText(Frozen):
    """What is said of one disorder."""

    name: str
    """Full name."""
    abbreviation: str = ""
    """Short name, as label tables use it."""
    description: str
    """Clinical description."""
    sources: tuple[str, ...] = ()
    """Publications behind the stated couplings."""
    stated: tuple[Fact, ...] | None = None
    """Couplings given in the table (key ``facts``), in place of those read from the description."""

    @model_validator(mode="before")
    @classmethod
    def _facts_key(cls, values: Any) -> Any:  # noqa: ANN401
        if isinstance(values, dict) and "facts" in values:
            values = {key: value for key, value in values.items() if key != "facts"} | {"stated": values["facts"]}
        return values

    @field_validator("name", "description")
    @classmethod
    def _not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must not be empty")
        return " ".join(value.split())

    @property
    def sentence(self) -> str:
        """Name, abbreviation and description in one text."""
        short = f" ({self.abbreviation})" if self.abbreviation else ""
        return f"{self.name[0].upper()}{self.name[1:]}{short}. {self.description}"

    def facts(self, words: NetworkWords) -> tuple[Fact, ...]:
        """The couplings that the table or the description states."""
        return read_facts(self.description, words) if self.stated is None else self.stated


class DisorderTable(Frozen):
    """Disorders by name and abbreviation."""

    disorders: tuple[DisorderText, ...]
    """Every disorder."""

    @model_validator(mode="after")
    def _names_are_unique(self) -> DisorderTable:
        seen: set[str] = set()
        for disorder in self.disorders:
            for name in {disorder.name.casefold(), disorder.abbreviation.casefold()} - {""}:
                if name in seen:
                    raise ValueError(f"two disorders are called '{name}'")
                seen.add(name)
        return self

    def find(self, name: str) -> DisorderText | None:
        """The disorder of that name or abbreviation, whatever its case; none where the table has none."""
        wanted = name.strip().casefold()
        return next((each for each in self.disorders if wanted in {each.name.casefold(), each.abbreviation.casefold()} - {""}), None)

    def text_of(self, wanted: str) -> DisorderText:
        """The disorder of a name or abbreviation, or ``wanted`` itself as the description of an unnamed one.

        Raises
        ------
        InputNotFoundError
            It is neither in the table nor long enough to be a description.
        """
        known = self.find(wanted)
        if known is not None:
            return known
        if len(wanted.split()) < _FEWEST_WORDS:
            names = ", ".join(each.abbreviation or each.name for each in self.disorders)
            raise InputNotFoundError(
                f"no text describes '{wanted}'",
                fix=f"use one of: {names}; add it to a copy of the table; or give a description in its place",
            )
        return DisorderText(name="a disorder", description=wanted)


@cache
def packaged_disorders() -> DisorderTable:
    """The table that comes with brainfm."""
    return DisorderTable.model_validate(yaml.safe_load((resources.files(__package__) / "disorders.yaml").read_text(encoding="utf-8")))


@cache
def packaged_networks() -> NetworkWords:
    """The words for networks that come with brainfm."""
    return NetworkWords.model_validate(yaml.safe_load((resources.files(__package__) / "networks.yaml").read_text(encoding="utf-8")))


def read_disorders(path: Path | None) -> DisorderTable:
    """A YAML table, a TSV with the columns name, abbreviation and description, or the packaged table.

    Raises
    ------
    InputNotFoundError
        The file is absent.
    InputDatasetError
        It is unreadable, or a row is incomplete.
    """
    if path is None:
        return packaged_disorders()
    if path.suffix == ".tsv":
        try:
            table = pd.read_csv(io.StringIO(_text(path)), sep="\t", dtype=str, keep_default_na=False)
        except ValueError as error:
            raise InputDatasetError(f"the table is no TSV: {error}", where=path, fix="separate name, abbreviation and description by tabs") from error  # fmt: skip
        columns = [column for column in ("name", "abbreviation", "description") if column in table]
        return _table(DisorderTable, {"disorders": table[columns].to_dict("records")}, path)
    return _table(DisorderTable, _yaml(path), path)


def read_networks(path: Path | None) -> NetworkWords:
    """A YAML table of networks, or the packaged one; errors as for :func:`read_disorders`."""
    return packaged_networks() if path is None else _table(NetworkWords, _yaml(path), path)


def atlas_sentence(label: str, num_regions: int, networks: Sequence[str | None]) -> str:
    """What is said of an atlas."""
    named = sorted({name for name in networks if name})
    kind = f"grouped into {len(named)} networks ({', '.join(named)})" if named else "without functional networks"
    return f"Brain parcellation {label} of {num_regions} regions, {kind}."


def person_sentence(age: float | None, sex: str | None) -> str:
    """What is said of a person's age and sex; empty where neither is known."""
    words = {"f": "woman", "female": "woman", "m": "man", "male": "man"}.get(str(sex).casefold(), "person") if sex else "person"
    if age is None or age != age:  # noqa: PLR0124  (NaN)
        return "" if words == "person" else f"A {words}."
    return f"A {words} of {round(age)} years."


def _table(kind: type[Table], values: Any, path: Path) -> Table:  # noqa: ANN401
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SettingsError(
            f"the table is wrong at {place}: {first['msg']}", where=path, fix="compare with the packaged table (docs/texts.md)"
        ) from error


def _yaml(path: Path) -> Any:  # noqa: ANN401
    try:
        return parse_yaml(_text(path))
    except yaml.YAMLError as error:
        raise InputDatasetError(f"the table is no YAML: {error}", where=path, fix="mend the file") from error


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InputNotFoundError("the table is absent", where=path, fix="mend the path of text.disorders or text.networks") from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputDatasetError(f"the table is unreadable: {error}", where=path, fix="it must be UTF-8") from error
