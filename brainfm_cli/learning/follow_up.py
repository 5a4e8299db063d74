"""How long people were followed and how it ended, from two columns whose codes are declared, never guessed."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, field_validator

from brainfm_cli.config import Frozen
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, SettingsError
from brainfm_cli.learning.survival import Outcome
from brainfm_cli.learning.targets import class_text, require_column

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd

_LEAST_EVENTS = 3


class FollowUpSettings(Frozen):
    """Columns and codes of survival."""

    time: str | None = None
    """Column of the follow-up, in one unit."""
    event: str | None = None
    """Column that says how the follow-up ended."""
    happened: tuple[str, ...] = ()
    """Codes of the event, e.g. [metastasis] or ['1']."""
    competing: tuple[str, ...] = ()
    """Codes of an end after which the event cannot happen any more, e.g. [death] for metastasis."""
    censored: tuple[str, ...] = ()
    """Codes of people who were still free of both when they were last seen."""
    unit: str = "days"
    """Unit of the time column, as printed."""
    horizons: tuple[float, ...] = ()
    """Times at which risk is told and scored; the quartiles of training people's events where none is given."""
    method: Literal["cox", "discrete"] = "discrete"
    """cox: proportional hazards by partial likelihood, one per cause; discrete: hazards of bins of time, all causes together."""
    bins: int = Field(default=10, ge=2, le=50)
    """Bins of time, at quantiles of training people's events: of discrete hazards, and of the curves that are told."""

    @field_validator("happened", "competing", "censored", mode="before")
    @classmethod
    def _codes_as_text(cls, value: Any) -> Any:  # noqa: ANN401  (YAML gives numbers for codes)
        return tuple(class_text(item) for item in value) if isinstance(value, list | tuple) else value


@dataclass(frozen=True, kw_only=True)
class FollowUp:
    """Follow-up of everybody who has one."""

    participants: tuple[str, ...]
    """In the order of the table."""
    time: NDArray[np.float64]
    """(participants,)."""
    cause: NDArray[np.int64]
    """(participants,) 0 censored, 1 the event, 2 the competing end."""
    dropped: dict[str, int] = field(default_factory=dict)
    """How many people were left out, by reason."""

    @property
    def causes(self) -> int:
        """1, or 2 with a competing end."""
        return max(1, int(self.cause.max()))

    def outcome(self, people: Sequence[str]) -> Outcome:
        """What scores need of some people."""
        rows = self.rows(people)
        return Outcome(time=self.time[rows], event=self.cause[rows] == 1, competing=self.cause[rows] == 2)

    def rows(self, people: Sequence[str]) -> NDArray[np.int64]:
        """Places of people."""
        place = {name: row for row, name in enumerate(self.participants)}
        return np.array([place[name] for name in people], dtype=np.int64)


def read_follow_up(
    table: pd.DataFrame, settings: FollowUpSettings, *, participants: Sequence[str] | None = None, place: str | None = None
) -> FollowUp:
    """Follow-up of the people of a participant table.

    Raises
    ------
    SettingsError
        Columns or codes are not declared, or a code is declared twice.
    InputNotFoundError
        A column is absent, or nobody has a follow-up.
    InputDatasetError
        A code that is not declared, a time that is negative or no number, or an end that too few people had.
    """
    if settings.time is None or settings.event is None:
        raise SettingsError("survival needs two columns", fix="set follow_up.time and follow_up.event")
    for column in (settings.time, settings.event):
        require_column(table, column, place)
    meaning = _meaning(table, settings, place)
    chosen = table if participants is None else table.loc[table.index.isin(set(participants))]
    names: list[str] = []
    times: list[float] = []
    causes: list[int] = []
    for label, time, code in zip(chosen.index, chosen[settings.time].map(class_text), chosen[settings.event].map(class_text), strict=True):
        if not time or not code:
            continue
        if code not in meaning:
            raise InputDatasetError(
                f"'{settings.event}' of sub-{label} is '{code}', which no setting declares", where=place,
                fix="name it in follow_up.happened, follow_up.competing or follow_up.censored, or write n/a",
            )  # fmt: skip
        names.append(str(label))
        times.append(_time(time, settings.time, str(label), place))
        causes.append(meaning[code])
    if not names:
        raise InputNotFoundError("nobody has both a follow-up time and an end", where=place, fix="fill the columns, or choose others")
    found = np.array(causes, np.int64)
    for number in (1, *([2] if settings.competing else [])):
        if (found == number).sum() < _LEAST_EVENTS:
            codes = settings.happened if number == 1 else settings.competing
            raise InputDatasetError(
                f"{int((found == number).sum())} people have '{settings.event}' = {' or '.join(codes)}: {_LEAST_EVENTS} are needed",
                where=place, fix="choose another column, or people who were followed longer",
            )  # fmt: skip
    dropped = {"without follow-up": len(chosen) - len(names)} if len(names) < len(chosen) else {}
    return FollowUp(participants=tuple(names), time=np.array(times), cause=found, dropped=dropped)


def _meaning(table: pd.DataFrame, settings: FollowUpSettings, place: str | None) -> dict[str, int]:
    have = ", ".join(sorted({text for value in table[str(settings.event)] if (text := class_text(value))})[:10])
    if not settings.happened or not settings.censored:
        raise SettingsError(
            f"which codes of '{settings.event}' are the event is never guessed; it has: {have}", where=place,
            fix="declare them, e.g. --set 'follow_up.happened=[1]' 'follow_up.censored=[0]'",
        )  # fmt: skip
    meaning: dict[str, int] = {}
    for number, codes in enumerate((settings.censored, settings.happened, settings.competing)):
        for code in codes:
            if code in meaning:
                raise SettingsError(f"'{code}' of '{settings.event}' is declared twice", fix="give each code one meaning")
            meaning[code] = number
    return meaning


def _time(text: str, column: str, label: str, place: str | None) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value) or value < 0:
        what = "is negative" if value < 0 else "is no number"
        raise InputDatasetError(f"'{column}' of sub-{label} is '{text}', which {what}", where=place, fix="mend the value, or write n/a")
    return value


def time_grid(time: NDArray[np.float64], cause: NDArray[np.int64], bins: int) -> tuple[float, ...]:
    """Upper ends of bins at quantiles of the times of events (any cause) of training people; fewer than ``bins`` where times repeat."""
    ends = np.unique(np.quantile(time[cause > 0], np.linspace(0, 1, bins + 1)[1:]))
    return tuple(float(end) for end in ends)


def horizons_of(settings: FollowUpSettings, time: NDArray[np.float64], cause: NDArray[np.int64]) -> tuple[float, ...]:
    """Times at which risk is told."""
    return settings.horizons or tuple(float(value) for value in np.unique(np.quantile(time[cause == 1], (0.25, 0.5, 0.75))))
