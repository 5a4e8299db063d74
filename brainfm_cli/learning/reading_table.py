"""The table of a reader study: one row per reader, case and arm; read, checked, and turned into arrays.

Required columns: ``reader``, ``case``, ``arm`` (or ``condition``, ``modality``), ``score`` (or ``rating``) and ``truth``.
Optional: ``decision`` (0 or 1), ``time_s``, strata of readers (``seniority`` or ``level``, ``tier``, ``specialty``),
``model_score`` and ``model_decision`` (what the model said of the case), and follow-up of cases: ``follow_up`` and
``event``. ``n/a`` or empty is unread or unknown.
"""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from brainfm_cli.config import Frozen
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

_SAME = {"condition": "arm", "modality": "arm", "rating": "score", "level": "seniority", "hospital_tier": "tier"}
_REQUIRED = ("reader", "case", "arm", "score", "truth")


class ReaderStudySettings(Frozen):
    """How a table of readings is analysed (predict group --reader-study)."""

    reference: str | None = None
    """Arm that the others are compared with, e.g. doctors alone; the first of the table where unset."""
    positive: str = "1"
    """Value of ``truth`` of cases that have the condition; every other value is without it."""
    event: str = "1"
    """Value of ``event`` where follow-up ended in the event; every other value is censored."""
    threshold: float | None = None
    """Score at and above which a reading counts as positive, where the table has no ``decision``."""
    model_reader: str = "model"
    """Name in ``reader`` of the rows that are a model's; it is compared with people and never pooled with them."""
    strata: tuple[str, ...] = ("seniority", "tier", "specialty")
    """Columns that sort readers; those that the table lacks are passed over."""
    level: float = Field(default=0.95, gt=0, lt=1)
    """Level of intervals."""
    bootstraps: int = Field(default=2000, ge=10)
    """Resamples of cases behind the intervals of agreement."""
    seed: int = Field(default=0, ge=0)
    """Seed of the resamples."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Readings:
    """A reader study as arrays; ``reference`` is arm 0."""

    arms: tuple[str, ...]
    """Names."""
    readers: tuple[str, ...]
    """People, without the model."""
    cases: tuple[str, ...]
    """Names."""
    scores: NDArray[np.float64]
    """(arms, readers, cases); NaN where unread."""
    truth: NDArray[np.bool_]
    """(cases,) whether each has the condition."""
    decisions: NDArray[np.float64] | None = None
    """(arms, readers, cases) 0 or 1; NaN where unread."""
    seconds: NDArray[np.float64] | None = None
    """(arms, readers, cases) reading times; NaN where unknown."""
    strata: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Column → level of each reader."""
    model_scores: NDArray[np.float64] | None = None
    """(cases,) of the model."""
    model_decisions: NDArray[np.float64] | None = None
    """(cases,) 0 or 1; NaN where unknown."""
    follow_up: NDArray[np.float64] | None = None
    """(cases,) time; NaN where unknown."""
    event: NDArray[np.bool_] | None = None
    """(cases,) whether follow-up ended in the event."""


def read_readings(path: Path, settings: ReaderStudySettings) -> Readings:
    """The table at ``path``.

    Raises
    ------
    InputNotFoundError
        The file is absent.
    InputDatasetError
        It is unreadable, or its rows contradict one another.
    SettingsError
        The reference arm is none of the table's.
    """
    try:
        text = path.read_text(encoding="utf-8")
        table = pd.read_csv(io.StringIO(text), sep="\t", dtype=str, keep_default_na=False)
    except FileNotFoundError as error:
        raise InputNotFoundError("there is no table of readings", where=path, fix="check the path of --reader-study") from error
    except (OSError, ValueError) as error:
        raise InputDatasetError(f"the table is unreadable: {error}", where=path, fix="give a tab-separated UTF-8 file") from error
    return _Reader(table, path, settings).readings()


class _Reader:
    """Checks one table while its columns are read."""

    def __init__(self, table: pd.DataFrame, path: Path, settings: ReaderStudySettings) -> None:
        self.path, self.settings = path, settings
        table = table.rename(columns={old: new for old, new in _SAME.items() if old in table and new not in table})
        lacking = [column for column in _REQUIRED if column not in table]
        if lacking:
            raise self.error(f"the table lacks the column '{lacking[0]}'", f"give {', '.join(_REQUIRED)}, separated by tabs")
        table = table.replace({"n/a": "", "NA": "", "nan": ""}).apply(lambda column: column.str.strip())
        unnamed = (table[["reader", "case", "arm"]] == "").any(axis=1)
        if unnamed.any() or table.empty:
            raise self.error(f"row {_row(unnamed)} has no reader, case or arm" if len(table) else "the table has no rows", "name all three")
        twice = table.duplicated(["reader", "case", "arm"])
        if twice.any():
            first = table[twice].iloc[0]
            raise self.error(
                f"row {_row(twice)}: reader '{first['reader']}' read case '{first['case']}' in arm '{first['arm']}' twice",
                "keep one reading, or call the second session another arm",
            )
        self.table = table
        self.cases = tuple(dict.fromkeys(table["case"]))
        model = table["reader"] == settings.model_reader
        self.people, self.model = table[~model], table[model]
        if self.people.empty:
            raise self.error(f"every row is of the model ('{settings.model_reader}')", "give the readings of people too")
        self.readers = tuple(dict.fromkeys(self.people["reader"]))
        self.arms = self._arms()

    def readings(self) -> Readings:
        scores = self._grid("score")
        decisions = self._grid("decision") if "decision" in self.table else None
        if decisions is not None and np.isin(decisions[np.isfinite(decisions)], (0, 1)).sum() != np.isfinite(decisions).sum():
            raise self.error("a decision is neither 0 nor 1", "code positive readings 1, negative ones 0, missing ones n/a")
        if decisions is None and self.settings.threshold is not None:
            decisions = np.where(np.isfinite(scores), scores >= self.settings.threshold, np.nan)
        seconds = self._grid("time_s") if "time_s" in self.table else None
        if seconds is not None and (seconds[np.isfinite(seconds)] <= 0).any():
            raise self.error("a reading time is zero or negative", "give seconds, or n/a where it was not taken")
        model_scores, model_decisions = self._model()
        follow_up, event = self._follow_up()
        truth = self._truth()
        self._check_classes(scores, truth)
        return Readings(
            arms=self.arms,
            readers=self.readers,
            cases=self.cases,
            scores=scores,
            truth=truth,
            decisions=decisions,
            seconds=seconds,
            strata=self._strata(),
            model_scores=model_scores,
            model_decisions=model_decisions,
            follow_up=follow_up,
            event=event,
        )

    def error(self, what: str, fix: str) -> InputDatasetError:
        return InputDatasetError(what, where=self.path, fix=fix)

    def _arms(self) -> tuple[str, ...]:
        arms = list(dict.fromkeys(self.people["arm"]))
        reference = self.settings.reference
        if reference is None:
            return tuple(arms)
        if reference not in arms:
            raise SettingsError(
                f"no row is of the reference arm '{reference}'",
                where=self.path,
                fix=f"choose one of: {', '.join(arms)} (reader_study.reference)",
            )
        return (reference, *(arm for arm in arms if arm != reference))

    def _numbers(self, column: str, rows: pd.DataFrame) -> NDArray[np.float64]:
        values = pd.to_numeric(rows[column], errors="coerce").to_numpy(np.float64, copy=True)
        wrong = (rows[column] != "").to_numpy() & ~np.isfinite(values)
        if wrong.any():
            place = int(np.argmax(wrong))
            raise self.error(
                f"row {rows.index[place] + 2}: '{rows[column].iloc[place]}' in '{column}' is no number", "give a number, or n/a"
            )
        return values

    def _grid(self, column: str) -> NDArray[np.float64]:
        grid = np.full((len(self.arms), len(self.readers), len(self.cases)), np.nan)
        places = [
            pd.Categorical(self.people[name], categories=list(order)).codes
            for name, order in (("arm", self.arms), ("reader", self.readers), ("case", self.cases))
        ]
        grid[tuple(places)] = self._numbers(column, self.people)
        return grid

    def _of_case(self, column: str, rows: pd.DataFrame) -> list[str]:
        """The one value that a case has; empty where it has none."""
        known = rows[rows[column] != ""]
        several = known.groupby("case", sort=False)[column].nunique()
        if (several > 1).any():
            raise self.error(f"case '{several.index[several > 1][0]}' has several values of '{column}'", "mend the table: it is a property of the case")  # fmt: skip
        found = known.drop_duplicates("case").set_index("case")[column]
        return [str(found.get(case, "")) for case in self.cases]

    def _truth(self) -> NDArray[np.bool_]:
        said = self._of_case("truth", self.table)
        if "" in said:
            raise self.error(f"case '{self.cases[said.index('')]}' has no truth", "leave it out until its truth is known")
        truth = np.array([value == self.settings.positive for value in said])
        if truth.all() or not truth.any():
            values = ", ".join(sorted(set(said)))
            raise self.error(f"all cases are of one class (truth: {values})", "say which value is the condition: reader_study.positive")
        if len(set(said)) > 2:
            raise self.error(f"truth has more than two values: {', '.join(sorted(set(said)))}", "code it as with and without the condition")
        return truth

    def _check_classes(self, scores: NDArray[np.float64], truth: NDArray[np.bool_]) -> None:
        for (row, arm), (place, reader) in product(enumerate(self.arms), enumerate(self.readers)):
            read = np.isfinite(scores[row, place])
            counts = int((read & truth).sum()), int((read & ~truth).sum())
            if read.any() and min(counts) < 2:
                raise self.error(
                    f"reader '{reader}' scored {counts[0]} cases with and {counts[1]} without the condition in arm '{arm}'",
                    "an area under the ROC curve needs two of each; leave the reader out",
                )

    def _strata(self) -> dict[str, tuple[str, ...]]:
        found = {}
        for column in self.settings.strata:
            if column not in self.table:
                continue
            several = self.people[self.people[column] != ""].groupby("reader")[column].nunique()
            if (several > 1).any():
                raise self.error(f"reader '{several.index[several > 1][0]}' has several values of '{column}'", "give one")
            levels = self.people[self.people[column] != ""].drop_duplicates("reader").set_index("reader")[column]
            if len(levels) < len(self.readers):
                missing = next(name for name in self.readers if name not in levels.index)
                raise self.error(f"reader '{missing}' has no '{column}'", "fill it in, or leave the column out of reader_study.strata")
            found[column] = tuple(str(levels[name]) for name in self.readers)
        return found

    def _model(self) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
        """Scores and decisions of the model: from its own rows, else from the columns of the cases."""
        rows, columns = self.table, ("model_score", "model_decision")
        if not self.model.empty:
            rows, columns = self.model, ("score", "decision")
        scores, decisions = (self._model_column(column, rows) for column in columns)
        if decisions is None and scores is not None and self.settings.threshold is not None:
            decisions = np.where(np.isfinite(scores), scores >= self.settings.threshold, np.nan)
        if decisions is not None and not np.isin(decisions[np.isfinite(decisions)], (0, 1)).all():
            raise self.error("a decision of the model is neither 0 nor 1", "code positive 1, negative 0, missing n/a")
        return scores, decisions

    def _model_column(self, column: str, rows: pd.DataFrame) -> NDArray[np.float64] | None:
        if column not in rows:
            return None
        values = self._numbers(column, pd.DataFrame({column: self._of_case(column, rows)}))
        return values if np.isfinite(values).any() else None

    def _follow_up(self) -> tuple[NDArray[np.float64] | None, NDArray[np.bool_] | None]:
        if "follow_up" not in self.table and "event" not in self.table:
            return None, None
        if not {"follow_up", "event"} <= set(self.table):
            raise self.error("follow-up needs both 'follow_up' and 'event'", "add the other column, or leave both out")
        times = self._numbers("follow_up", pd.DataFrame({"follow_up": self._of_case("follow_up", self.table)}))
        if (times[np.isfinite(times)] < 0).any():
            raise self.error("a follow-up time is negative", "mend the column follow_up")
        codes = self._of_case("event", self.table)
        known = {code for code in codes if code}
        if self.settings.event not in known or len(known) > 2:
            raise self.error(
                f"the codes of 'event' are {', '.join(sorted(known)) or 'absent'}, not '{self.settings.event}' and one other",
                "say which code is the event (reader_study.event): it is never guessed",
            )
        times = np.where([bool(code) for code in codes], times, np.nan)
        return times, np.array([code == self.settings.event for code in codes])


def _row(which: pd.Series) -> int:
    """Line of the file of the first marked row."""
    return int(np.argmax(which.to_numpy())) + 2
