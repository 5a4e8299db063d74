"""Families of splits: the same test people with ever fewer training people, and datasets that test one another."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import numpy as np
import pandas as pd
from pydantic import Field

from brainfm_cli.config import Frozen
from brainfm_cli.errors import InputDatasetError, SettingsError
from brainfm_cli.learning.splits import DesignSettings, Split, make_split
from brainfm_cli.learning.targets import class_text, require_column

if TYPE_CHECKING:
    from collections.abc import Sequence

    from brainfm_cli.learning.targets import Target


class FewShotSettings(Frozen):
    """Learning curves: the same test people with ever fewer training people, drawn several times."""

    shots: tuple[int, ...] = ()
    """Training people per class (continuous targets: in all, at least two); empty leaves learning curves out. One of each class leaves
    nobody to hold out: sets of blocks and penalties then weigh what the two people themselves say of them."""
    fractions: tuple[float, ...] = ()
    """The same as shares of the smallest class of the smallest training set, e.g. [0.01, 0.1]; at least two people are drawn."""
    draws: int = Field(default=20, ge=1)
    """Draws of each number, nested: the people of fewer shots are among those of more."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draws."""

    def numbers(self, target: Target, split: Split) -> tuple[int, ...]:
        """Every number of shots asked for, ascending."""
        smallest = min(min(target.keep(fold.train).counts().values(), default=len(fold.train)) for fold in split.folds())
        return tuple(sorted({*self.shots, *(max(2, round(share * smallest)) for share in self.fractions)}))


def origin_of(repeat: int, draws: int) -> int:
    """The repetition of the whole split that a repetition of :func:`few_shot_splits` was drawn from."""
    return (repeat - 1) // draws + 1


def few_shot_splits(target: Target, split: Split, *, shots: Sequence[int], draws: int, seed: int = 0) -> dict[int, Split]:
    """For each number of shots, the folds of ``split`` with that many training people per class (continuous: in all).

    Draws are nested: the people of fewer shots are among those of more, so that learning curves are paired. Every
    draw is a repetition of its own; people who were not drawn are unused.

    Raises
    ------
    SettingsError
        No person per class, or fewer than two of a continuous target.
    InputDatasetError
        A fold has fewer training people of a class than the largest number of shots.
    """
    fewest = 1 if target.classes else 2
    if not shots or min(shots) < fewest or draws < 1:
        raise SettingsError(
            f"{min(shots, default=0)} shots and {draws} draws make no training set", fix=f"use at least {fewest} shots and one draw"
        )
    classes = pd.Series(target.observed if target.classes else 0.0, index=list(target.participants))
    parts: dict[int, list[pd.DataFrame]] = {number: [] for number in shots}
    for key, rows in split.table.groupby(["repeat", "fold"], sort=True):
        repeat, fold = cast("tuple[int, int]", key)
        trained = rows["role"] == "train"
        names = rows.loc[trained, "participant_id"].to_numpy()
        for draw in range(draws):
            order = classes[np.random.default_rng([seed, repeat, fold, draw]).permutation(names)]
            place = order.groupby(order).cumcount()  # how manieth of their class
            smallest = int(order.value_counts().min())
            if smallest < max(shots):
                raise InputDatasetError(
                    f"repeat {repeat}, fold {fold} has {smallest} training people of the smallest class, fewer than {max(shots)} shots",
                    fix="use fewer shots, or more people",
                )
            for number in shots:
                left_out = trained & ~rows["participant_id"].isin(place.index[place < number])
                why = rows["why"].mask(trained, f"{number} shots, draw {draw + 1}, seed {seed}").mask(left_out, "not drawn")
                role = rows["role"].mask(left_out, "unused")
                parts[number].append(rows.assign(repeat=(repeat - 1) * draws + draw + 1, role=role, why=why))
    return {number: Split(table=pd.concat(tables, ignore_index=True)) for number, tables in parts.items()}


def both_ways(target: Target, table: pd.DataFrame, *, column: str = "dataset", group: str | None = None) -> dict[str, Split]:
    """For each value of ``column``, the split in which it tests once what the others trained; nothing is fitted on it.

    Raises
    ------
    InputNotFoundError
        The column is absent.
    InputDatasetError
        Fewer than two values, or a training set lacks a class.
    """
    rows = table.loc[list(target.participants)]
    require_column(rows, column)
    values = sorted(set(rows[column].map(class_text)) - {""})
    if len(values) < 2:
        raise InputDatasetError(f"column '{column}' has {len(values)} value(s): there is nothing to test across", fix="pack several datasets into one cohort")  # fmt: skip
    design = DesignSettings(kind="fixed", group=group)
    return {value: make_split(target, rows, design.model_copy(update={"test_where": {column: (value,)}})) for value in values}
