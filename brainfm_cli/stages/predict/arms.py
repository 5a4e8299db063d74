"""predict group on a randomised trial: whether the model's held-out score says something else under treatment, and what it saves."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from pydantic import Field

from brainfm_cli.bids.derivatives import write_json
from brainfm_cli.config import Frozen
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.stratification import StrataSettings, stratify
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
    strata: StrataSettings = StrataSettings()
    """Cuts between unlikely, uncertain and likely responders, and the trial that is sized with them."""


def with_strata(result: EvaluationResult, table: pd.DataFrame, settings: ArmSettings) -> EvaluationResult:
    """The result with what became of likely and unlikely responders, and with the sizes of trials that use the score.

    Raises
    ------
    InputNotFoundError, InputDatasetError
        As :func:`write_interaction`, or no training person has a held-out prediction.
    """
    people = _people(result, table, settings)
    first = result.metrics.predictors[0].name
    places = result.pooled[first].places
    found = stratify(
        result.observed,
        np.full(len(people.arm), np.nan) if places is None else places,
        _score(result),
        people.arm,
        predictor=first,
        treated=settings.treated,
        settings=settings.strata,
    )
    return replace(result, metrics=result.metrics.model_copy(update={"stratification": found}))


def write_interaction(root: Path, result: EvaluationResult, table: pd.DataFrame, settings: ArmSettings) -> Path:
    """Test the interaction of the model's held-out score with the arm, and write it; gives back the file.

    Raises
    ------
    InputNotFoundError
        A column is absent.
    InputDatasetError
        More than two classes, other than two arms, too few patients, or somebody without arm or covariate.
    """
    people = _people(result, table, settings)
    metrics = result.metrics
    found = interaction(
        result.observed,
        _score(result),
        people.arm,
        treated=settings.treated,
        covariates=people.covariates,
        binary=metrics.kind == "binary",
        settings=settings.test,
    )
    return write_json(root / _FILE, {"predictor": metrics.predictors[0].name, **asdict(found), "verdict": found.verdict})


def verdict(root: Path) -> tuple[str, ...]:
    """The sentence for the report; none where no arms were named."""
    path = root / _FILE
    return (str(read_json(path)["verdict"]),) if path.is_file() else ()


@dataclass(frozen=True, kw_only=True, eq=False)
class _People:
    """What is known of the test people of a trial."""

    arm: NDArray[np.str_]
    covariates: NDArray[np.float64] | None


def _people(result: EvaluationResult, table: pd.DataFrame, settings: ArmSettings) -> _People:
    metrics = result.metrics
    if metrics.kind == "multiclass":
        raise InputDatasetError(f"'{metrics.target}' has several classes: no interaction with the arm is defined", fix="leave 'arms' out, or choose two classes")  # fmt: skip
    for column in (settings.column, *settings.covariates):
        require_column(table, column)
    rows = table.loc[list(result.people)]
    arm = rows[settings.column].map(class_text).to_numpy(dtype=np.str_)
    covariates = rows[list(settings.covariates)].apply(pd.to_numeric, errors="coerce")
    lacking = (arm == "") | covariates.isna().any(axis=1).to_numpy()
    if lacking.any():
        raise InputDatasetError(
            f"{int(lacking.sum())} of {len(rows)} people lack the arm or a covariate, e.g. {rows.index[lacking][0]}",
            fix="leave them out ('where'), or the covariate",
        )
    return _People(arm=arm, covariates=covariates.to_numpy(float) if settings.covariates else None)


def _score(result: EvaluationResult) -> NDArray[np.float64]:
    """(people,) the model's held-out prediction, averaged over repetitions; log-odds of a class."""
    predicted = result.pooled[result.metrics.predictors[0].name].predicted.mean(axis=0)
    if result.metrics.kind == "continuous":
        return np.asarray(predicted, float)
    chance = np.clip(predicted[:, 1], _SMALLEST, 1 - _SMALLEST)
    return np.asarray(np.log(chance / (1 - chance)))
