"""How datasets code a target: part of the settings, and so free of everything that takes long to import."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, model_validator

from brainfm_cli.config import Frozen

_Code = Annotated[str, BeforeValidator(lambda value: str(value) if isinstance(value, int | float | bool) else value)]


class LabelColumn(Frozen):
    """How one dataset codes one target."""

    column: str
    """Column of the dataset's participants.tsv."""
    classes: dict[_Code, str] = {}
    """Code in that column → name of the class, the same names in every dataset."""
    continuous: bool = False
    """The column holds numbers (and no ``classes`` are given)."""
    missing: tuple[_Code, ...] = ()
    """Codes that mean 'unknown' beside ``n/a``, e.g. -9999."""
    where: dict[str, tuple[_Code, ...]] = {}
    """Columns of the same table and the values with which a person has this label at all; everybody else gets none, whatever
    the column holds: healthy controls among patients, whose response is often coded as if they had been treated."""

    @model_validator(mode="after")
    def _one_coding(self) -> LabelColumn:
        if bool(self.classes) == self.continuous:
            raise ValueError("give either 'classes: {code: name}' or 'continuous: true'")
        return self


LabelTable = dict[str, dict[str, LabelColumn | None]]
"""Target → dataset → how it is coded there; ``null`` for a dataset that does not have the target."""
