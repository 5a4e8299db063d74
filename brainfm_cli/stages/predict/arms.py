"""predict group on a randomised trial: whether the model's held-out score says something else under treatment."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from brainfm_cli.bids.derivatives import write_json
from brainfm_cli.config import Frozen
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.targets import class_text, require_column
from brainfm_cli.learning.trials import InteractionSettings, interaction

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from brainfm_cli.learning.results import EvaluationResult

_FILE = "interaction.json"
_SMALLEST = 1e-4  # probabilities nearer to 0 or 1 than this are not told apart


class ArmSettings(Frozen):
    """The arms of a randomised trial."""

    column: str = "arm"
    """Column of participants.tsv that holds the arm."""
    treated: str = Field(min_length=1)
    """Its value under treatment; one other value is the control."""
    covariates: tuple[str, ...] = ()
    """Columns of numbers that are fitted beside the score, e.g. [age]; nobody may lack one."""
    test: InteractionSettings = InteractionSettings()
    """Bootstraps and level."""


def write_interaction(root: Path, result: EvaluationResult, table: pd.DataFrame, settings: ArmSettings) -> Path:
    """Test the interaction of the model's held-out score with the arm, and write it; gives back the file.

    Raises
    ------
    InputNotFoundError
        A column is absent.
    InputDatasetError
        More than two classes, other than two arms, too few patients, or somebody without arm or covariate.
    """
    metrics = result.metrics
    if metrics.kind == "multiclass":
        raise InputDatasetError(f"'{metrics.target}' has several classes: no interaction with the arm is defined", fix="leave 'arms' out, or choose two classes")  # fmt: skip
    for column in (settings.column, *settings.covariates):
        require_column(table, column)
    rows = table.loc[list(result.people)]
    arm = rows[settings.column].map(class_text).to_numpy()
    covariates = rows[list(settings.covariates)].apply(pd.to_numeric, errors="coerce")
    lacking = (arm == "") | covariates.isna().any(axis=1).to_numpy()
    if lacking.any():
        raise InputDatasetError(
            f"{int(lacking.sum())} of {len(rows)} people lack the arm or a covariate, e.g. {rows.index[lacking][0]}",
            fix="leave them out ('where'), or the covariate",
        )
    found = interaction(
        result.observed,
        _score(result),
        arm,
        treated=settings.treated,
        covariates=covariates.to_numpy(float) if settings.covariates else None,
        binary=metrics.kind == "binary",
        settings=settings.test,
    )
    return write_json(root / _FILE, {"predictor": metrics.predictors[0].name, **asdict(found), "verdict": found.verdict})


def verdict(root: Path) -> tuple[str, ...]:
    """The sentence for the report; none where no arms were named."""
    path = root / _FILE
    return (str(json.loads(path.read_text(encoding="utf-8"))["verdict"]),) if path.is_file() else ()


def _score(result: EvaluationResult) -> NDArray[np.float64]:
    """(people,) the model's held-out prediction, averaged over repetitions; log-odds of a class."""
    predicted = result.pooled[result.metrics.predictors[0].name].predicted.mean(axis=0)
    if result.metrics.kind == "continuous":
        return np.asarray(predicted, float)
    chance = np.clip(predicted[:, 1], _SMALLEST, 1 - _SMALLEST)
    return np.asarray(np.log(chance / (1 - chance)))
