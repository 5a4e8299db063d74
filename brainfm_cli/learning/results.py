"""What an evaluation leaves behind: metrics.json with its schema, the out-of-fold predictions, the phenotype table."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import ValidationError

from brainfm_cli.bids.derivatives import write_json, write_text, write_tsv
from brainfm_cli.config import Frozen
from brainfm_cli.errors import InputDatasetError, InputNotFoundError
from brainfm_cli.learning.scores import Score
from brainfm_cli.learning.splits import Split, read_split, write_split
from brainfm_cli.learning.stratification import Stratification

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

PREDICTIONS = "predictions.tsv"
Role = Literal["model", "floor"]


class PredictorResult(Frozen):
    """One predictor's scores on the pooled test people."""

    name: str
    """As printed."""
    role: Role
    """model or floor."""
    scores: dict[str, Score]
    """By metric."""
    thresholds: tuple[float, ...] = ()
    """Probability at which the positive class is decided, one per repetition and fold, chosen in training folds."""
    threshold_rule: str = ""
    """How classes are decided."""
    permutation_p: float | None = None
    """One-sided p of the primary score, labels permuted within strata against the fixed predictions."""
    permutation_reason: str | None = None
    """Why there is no p."""
    refit_p: float | None = None
    """The same with every fold fitted again on each permutation; none where that was not asked for."""
    pooled_from: tuple[str, ...] = ()
    """Predictors whose predictions were averaged."""
    choices: dict[str, tuple[float | str, ...]] = {}
    """What was chosen inside each fold, e.g. the penalty."""

    @property
    def chance_p(self) -> float | None:
        """P against chance: through the whole pipeline where that was asked for, else with fixed predictions."""
        return self.permutation_p if self.refit_p is None else self.refit_p


class Difference(Frozen):
    """A paired difference of the primary score on the same people and folds."""

    first: str
    """Predictor."""
    second: str
    """What it is compared with."""
    metric: str
    """Name of the score."""
    value: float | None
    """First minus second."""
    low: float | None = None
    """Lower end of the paired bootstrap interval."""
    high: float | None = None
    """Upper end."""
    bootstrap_p: float | None = None
    """Two-sided."""
    holm_p: float | None = None
    """The same, corrected for the number of comparisons of ``first`` (Holm)."""
    delong_p: float | None = None
    """Two-sided, two classes only."""
    detectable: float | None = None
    """Smallest true difference found with 80 % power at this number of people."""
    reason: str | None = None
    """Why it is not computed."""


class GroupScores(Frozen):
    """Scores of one predictor among the people of one site, sex or age band."""

    column: str
    """site, sex, age …"""
    level: str
    """Which of them."""
    people: int
    """How many were tested."""
    counts: dict[str, int] = {}
    """People per class."""
    predictor: str
    """Name."""
    scores: dict[str, Score]
    """By metric."""


class AuditItem(Frozen):
    """One check of the evaluation itself."""

    check: str
    """What was looked at."""
    verdict: Literal["passed", "warning", "not checked"]
    """What came out."""
    text: str
    """One sentence."""


class Truth(Frozen):
    """Best scores that simulated data allow, from truth.json."""

    bayes_optimal: float | None = None
    """With the generator's own likelihood."""
    attainable: float | None = None
    """Of a linear model on exactly the planted features."""


class Metrics(Frozen):
    """Everything an evaluation found, as in metrics.json."""

    target: str
    """Column of participants.tsv."""
    kind: Literal["binary", "multiclass", "continuous"]
    """What the target is."""
    classes: tuple[str, ...] = ()
    """Class names; of two the second is positive."""
    people: int
    """Number of test people."""
    counts: dict[str, int] = {}
    """Test people per class."""
    dropped: dict[str, int] = {}
    """People left out, by reason."""
    design: str
    """How people were divided, in words."""
    repeats: int
    """Repetitions."""
    split_sha256: str
    """Digest of the split file."""
    cross_validated: bool
    """Whether test people of one fold train in another."""
    transductive_overlap: int = 0
    """Test people who were in the pretraining."""
    primary: str
    """The score that leads."""
    interval: str
    """Method and level of the intervals."""
    interval_caveat: str | None = None
    """What the intervals do not cover, and the coverage that was measured."""
    permutation_caveat: str | None = None
    """What the permutation p of fixed predictions leaves out."""
    predictors: tuple[PredictorResult, ...]
    """Models first, then floors."""
    differences: tuple[Difference, ...] = ()
    """Every model against every floor."""
    groups: tuple[GroupScores, ...] = ()
    """By site, sex and age band."""
    audit: tuple[AuditItem, ...] = ()
    """Checks of the evaluation itself."""
    truth: Truth | None = None
    """Best possible scores of simulated data."""
    stratification: Stratification | None = None
    """Of a trial: likely, uncertain and unlikely responders, and the patients that a next trial needs."""
    statement: str
    """What the numbers allow and do not allow to say."""
    notes: tuple[str, ...] = ()
    """Coding, left-out columns, and other things to know."""
    seed: int
    """Seed of the resampling."""
    versions: dict[str, str] = {}
    """Package versions."""

    def of(self, name: str) -> PredictorResult:
        """The result of one predictor."""
        return next(result for result in self.predictors if result.name == name)


@dataclass(frozen=True, kw_only=True)
class Pooled:
    """Out-of-fold predictions of one predictor over all test people."""

    predicted: NDArray[np.float64]
    """(repetitions, people, classes) or (repetitions, people)."""
    decided: NDArray[np.int64] | None
    """(repetitions, people) class at the training folds' threshold; none for continuous targets."""
    thresholds: tuple[float, ...] = ()
    """One per repetition and fold."""
    rule: str = ""
    """How classes are decided."""
    choices: tuple[dict[str, float | str], ...] = ()
    """Per repetition and fold."""
    places: NDArray[np.float64] | None = None
    """(repetitions, people) share of the fold's training people whose held-out prediction is lower; of one class or number
    only, and none where a predictor tells nothing of its training people. Not written."""


@dataclass(frozen=True, kw_only=True)
class EvaluationResult:
    """An evaluation: the numbers, and the predictions they come from."""

    metrics: Metrics
    """Scores, intervals, differences."""
    split: Split
    """Who was where."""
    people: tuple[str, ...]
    """Test people, in the order of every array."""
    observed: NDArray[np.float64]
    """(people,) class index or value."""
    fold_of: NDArray[np.int64]
    """(repetitions, people) fold in which each was tested."""
    pooled: dict[str, Pooled]
    """Predictions by predictor."""

    def write(self, root: Path) -> list[Path]:
        """Write metrics.json, its schema, split.tsv, predictions.tsv and the phenotype table; gives back the paths."""
        name = _slug(self.metrics.target)
        table, columns = phenotype(self)
        return [
            write_split(root / "split.tsv", self.split),
            write_tsv(root / PREDICTIONS, _long(self)),
            write_tsv(root / "phenotype" / f"brainfm_{name}.tsv", table),
            write_json(root / "phenotype" / f"brainfm_{name}.json", columns),
            write_json(root / "logs" / "metrics.schema.json", Metrics.model_json_schema()),
            write_text(root / "metrics.json", self.metrics.model_dump_json(indent=2) + "\n"),
        ]

    @classmethod
    def read(cls, root: Path) -> EvaluationResult:
        """What :meth:`write` wrote, for rebuilding reports.

        Raises
        ------
        InputNotFoundError
            There is no evaluation.
        InputDatasetError
            Its files are unreadable or do not belong together.
        """
        path = root / "metrics.json"
        try:
            metrics = Metrics.model_validate_json(path.read_bytes())
            long = pd.read_csv(root / PREDICTIONS, sep="\t", dtype={"participant_id": str, "predictor": str}, na_values=["n/a"], keep_default_na=False)  # fmt: skip
        except FileNotFoundError as error:
            raise InputNotFoundError(
                "no evaluation here", where=root, fix="run 'brainfm predict INPUT OUTPUT group --target COLUMN' first"
            ) from error
        except (OSError, ValueError, ValidationError) as error:
            raise InputDatasetError(f"the evaluation is unreadable: {error}", where=path, fix="evaluate again") from error
        split = read_split(root / "split.tsv")
        if split.digest() != metrics.split_sha256:
            raise InputDatasetError("metrics.json was made with another split.tsv", where=path, fix="evaluate again")
        return _from_long(metrics, split, long)


def phenotype(result: EvaluationResult) -> tuple[pd.DataFrame, dict[str, Any]]:
    """(one row per test person, column descriptions): out-of-fold predictions, averaged over repetitions."""
    metrics = result.metrics
    observed = result.observed if metrics.kind == "continuous" else [metrics.classes[int(code)] for code in result.observed]
    table = pd.DataFrame({"participant_id": [f"sub-{name}" for name in result.people], "observed": observed, "fold": result.fold_of[0]})
    columns: dict[str, Any] = {
        "MeasurementToolMetadata": {"Description": f"brainfm predict: out-of-fold predictions of '{metrics.target}'"},
        "observed": {"Description": f"value of '{metrics.target}' in participants.tsv"},
        "fold": {"Description": "fold in which the person was tested (first repetition)"},
    }
    if metrics.transductive_overlap:
        columns["MeasurementToolMetadata"]["Description"] += (
            f"; TRANSDUCTIVE: {metrics.transductive_overlap} test people were in the pretraining"
        )
    for predictor in metrics.predictors:
        values = result.pooled[predictor.name].predicted.mean(0)
        slug = _slug(predictor.name)
        if metrics.kind == "continuous":
            table[slug] = values
            columns[slug] = {"Description": f"{predictor.name} ({predictor.role}): predicted value"}
            continue
        for index, name in enumerate(metrics.classes):
            if metrics.kind == "binary" and index == 0:
                continue
            column = f"{slug}_{_slug(name)}"
            table[column] = values[:, index]
            columns[column] = {"Description": f"{predictor.name} ({predictor.role}): probability of '{name}'"}
    return table, columns


def _long(result: EvaluationResult) -> pd.DataFrame:
    parts = []
    for name, pooled in result.pooled.items():
        for repeat in range(len(pooled.predicted)):
            part = pd.DataFrame({"participant_id": result.people, "predictor": name, "repeat": repeat + 1, "fold": result.fold_of[repeat], "observed": result.observed})  # fmt: skip
            if pooled.decided is None:
                part["value"] = pooled.predicted[repeat]
            else:
                for index in range(pooled.predicted.shape[2]):
                    part[f"p{index}"] = pooled.predicted[repeat][:, index]
                part["decided"] = pooled.decided[repeat]
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _from_long(metrics: Metrics, split: Split, long: pd.DataFrame) -> EvaluationResult:
    first = long[(long["predictor"] == metrics.predictors[0].name) & (long["repeat"] == 1)]
    people = tuple(first["participant_id"])
    pooled, fold_of = {}, np.zeros((metrics.repeats, len(people)), dtype=np.int64)
    for predictor in metrics.predictors:
        rows = long[long["predictor"] == predictor.name].sort_values("repeat", kind="stable")
        if len(rows) != metrics.repeats * len(people) or tuple(rows["participant_id"][: len(people)]) != people:
            raise InputDatasetError(f"{PREDICTIONS} does not hold '{predictor.name}' for everybody", fix="evaluate again")
        shape = (metrics.repeats, len(people))
        fold_of = rows["fold"].to_numpy(np.int64).reshape(shape)
        if metrics.kind == "continuous":
            pooled[predictor.name] = Pooled(predicted=rows["value"].to_numpy(np.float64).reshape(shape), decided=None)
            continue
        columns = [f"p{index}" for index in range(len(metrics.classes))]
        pooled[predictor.name] = Pooled(
            predicted=rows[columns].to_numpy(np.float64).reshape(*shape, -1),
            decided=rows["decided"].to_numpy(np.int64).reshape(shape),
            thresholds=predictor.thresholds,
            rule=predictor.threshold_rule,
        )
    return EvaluationResult(metrics=metrics, split=split, people=people, observed=first["observed"].to_numpy(np.float64), fold_of=fold_of, pooled=pooled)  # fmt: skip


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_").lower() or "x"
