"""Columns of a participant table as what studies are asked: a class, an ordered grade, or survival."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import pandas as pd

from brainfm_cli.errors import SettingsError
from brainfm_cli.learning.follow_up import FollowUp, FollowUpSettings, horizons_of, read_follow_up, time_grid
from brainfm_cli.learning.targets import TargetSettings, target_of_table
from brainfm_cli.systems.mri_language.outcomes import StudyTask


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked of everybody who has an answer."""

    name: str
    """Column, or the column of the event."""
    names: tuple[str, ...]
    """Classes, grades or causes."""
    strata: Mapping[str, str]
    """By participant what splits are drawn within."""
    notes: tuple[str, ...]
    """What was left out."""
    classes: StudyTask | None = None
    """Of a class or grade."""
    follow_up: FollowUp | None = None
    """Of survival."""
    settings: FollowUpSettings | None = None
    """Of survival."""

    def task(self, train: Sequence[str]) -> StudyTask:
        """The task; times at which survival is told are those of training people."""
        if self.classes is not None:
            return self.classes
        found, settings = self._survival()
        rows = found.rows(train)
        return StudyTask(
            kind=settings.method,
            labels=dict(zip(found.participants, map(int, found.cause), strict=True)),
            times=dict(zip(found.participants, map(float, found.time), strict=True)),
            count=len(self.names),
            edges=time_grid(found.time[rows], found.cause[rows], settings.bins),
        )

    def horizons(self, train: Sequence[str]) -> tuple[float, ...]:
        """Times at which risk is told; none without survival."""
        if self.classes is not None:
            return ()
        found, settings = self._survival()
        rows = found.rows(train)
        return horizons_of(settings, found.time[rows], found.cause[rows])

    def _survival(self) -> tuple[FollowUp, FollowUpSettings]:
        assert self.follow_up is not None  # noqa: S101  (a question is one or the other)
        assert self.settings is not None  # noqa: S101
        return self.follow_up, self.settings


class Asked(Protocol):
    """What settings say of a task."""

    @property
    def task(self) -> str:
        """classification, grading or survival."""

    @property
    def target(self) -> str | None:
        """Column of a class or grade."""

    @property
    def coding(self) -> TargetSettings:
        """How that column is read."""

    @property
    def follow_up(self) -> FollowUpSettings:
        """Columns of survival."""


def question_of(asked: Asked, table: pd.DataFrame, people: Sequence[str], place: str | None) -> Question:
    """The question of a task; raises what :func:`class_question` and :func:`survival_question` do."""
    if asked.task == "survival":
        return survival_question(table, asked.follow_up, people, place)
    assert asked.target is not None  # noqa: S101  (checked before anything was written)
    return class_question(table, asked.target, asked.coding, people, place, graded=asked.task == "grading")


def class_question(
    table: pd.DataFrame, column: str, coding: TargetSettings, people: Sequence[str], place: str | None, *, graded: bool
) -> Question:
    """A column of classes, or of grades in the order of ``coding.classes`` or of their numbers.

    Raises
    ------
    SettingsError
        The column is continuous, or grades have no order.
    InputDatasetError, InputNotFoundError
        As :func:`brainfm_cli.learning.targets.target_of_table`.
    """
    if graded:
        coding = coding.model_copy(update={"type": "categorical", "ordered": True})
    target = target_of_table(table, column, coding, participants=people, place=place)
    if target.kind == "continuous":
        raise SettingsError(
            f"'{target.name}' is continuous: classification needs classes", fix="set coding.type=categorical, or choose another --target"
        )
    labels = {label: int(value) for label, value in zip(target.participants, target.observed, strict=True)}
    return Question(
        name=target.name,
        names=target.classes,
        strata={label: target.classes[number] for label, number in labels.items()},
        notes=(*target.notes, *_dropped(target.dropped)),
        classes=StudyTask(kind="grading" if graded else "classification", labels=labels, count=len(target.classes)),
    )


def survival_question(table: pd.DataFrame, settings: FollowUpSettings, people: Sequence[str], place: str | None) -> Question:
    """Two columns of follow-up; raises what :func:`brainfm_cli.learning.follow_up.read_follow_up` does."""
    found = read_follow_up(table, settings, participants=people, place=place)
    names = ("+".join(settings.happened), *(["+".join(settings.competing)] if settings.competing else []))
    notes = (f"{names[1]} competes with {names[0]}: who had it is free of {names[0]} for good",) if settings.competing else ()
    return Question(
        name=str(settings.event),
        names=names,
        strata={label: ("censored", *names)[cause] for label, cause in zip(found.participants, found.cause, strict=True)},
        notes=(*notes, *_dropped(found.dropped)),
        follow_up=found,
        settings=settings,
    )


def _dropped(reasons: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(f"{count} people left out: {reason}" for reason, count in reasons.items())
