"""Every predictor on the same folds, then scores, intervals, paired differences, groups and audit of the pooled predictions."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from brainfm_cli.config import Frozen
from brainfm_cli.errors import SettingsError
from brainfm_cli.learning import audit, uncertainty
from brainfm_cli.learning.forecasts import Predictor, renamed
from brainfm_cli.learning.pooling import pool_all, positions, run_folds
from brainfm_cli.learning.results import Difference, EvaluationResult, GroupScores, Metrics, Pooled, PredictorResult, Truth
from brainfm_cli.learning.scores import METRICS, PRIMARY, Score, score, statistic
from brainfm_cli.learning.splits import Fold, Split, refuse_pretrained
from brainfm_cli.learning.statement import describe_design, state
from brainfm_cli.learning.targets import Target, class_text
from brainfm_cli.provenance import package_versions

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from numpy.typing import NDArray

    from brainfm_cli.learning.kernels import Kernel

log = logging.getLogger(__name__)
_GROUP_METRICS = {"binary": ("auroc", "balanced_accuracy", "brier"), "multiclass": ("auroc", "balanced_accuracy", "brier"), "continuous": ("r2", "mae", "pearson_r")}  # fmt: skip


class EvaluationSettings(Frozen):
    """How pooled predictions are scored."""

    bootstraps: int = Field(default=2000, ge=100)
    """Resamples of people for intervals and paired differences."""
    interval: Literal["percentile", "bca"] = "bca"
    """Kind of bootstrap interval of scores; differences take percentiles."""
    level: float = Field(default=0.95, gt=0.5, lt=1)
    """Nominal coverage of intervals."""
    permutations: int = Field(default=1000, ge=99)
    """Permutations of held-out labels."""
    refit_permutations: int = Field(default=0, ge=0)
    """Permutations through the whole pipeline, every predictor fitted again in every fold of each; 0 leaves them out."""
    strata: tuple[str, ...] = ("site",)
    """Columns within which labels are permuted; absent ones are ignored."""
    groups: tuple[str, ...] = ("site", "sex", "age")
    """Columns by whose values scores are broken down; absent ones are ignored."""
    age_bands: tuple[float, ...] = (6, 12, 18, 40, 65)
    """Lower edges of age bands, years."""
    inner_folds: int = Field(default=5, ge=2)
    """Folds inside each training set, for penalties and thresholds."""
    seed: int = 0
    """Seed of inner folds, resamples and permutations."""


@dataclass(frozen=True, kw_only=True)
class Context:
    """What stands around the numbers."""

    table: pd.DataFrame
    """Participant table: sites, sexes, ages, datasets."""
    models: tuple[str, ...] = ()
    """Names of predictors that are models; all others are floors."""
    pools: Mapping[str, tuple[str, ...]] | None = None
    """Name -> predictors whose predictions are averaged under it."""
    kernels: Mapping[str, Kernel] | None = None
    """Connectivity kernels, for the search for duplicate scans."""
    pretrained: Collection[str] | None = None
    """Hashes of the people that the models were pretrained on; none where no model states them."""
    transductive: bool = False
    """Allow pretraining people in the test set."""
    truth: Truth | None = None
    """Best possible scores of simulated data."""
    notes: tuple[str, ...] = ()
    """What the reader should know, e.g. left-out covariates."""


def evaluate(
    target: Target,
    split: Split,
    predictors: Mapping[str, Predictor],
    context: Context,
    settings: EvaluationSettings | None = None,
    *,
    progress: Callable[[str, Fold], None] | None = None,
) -> EvaluationResult:
    """Run every predictor on every fold of ``split`` and score the pooled predictions of the test people.

    Audits come first: a split that leaks is refused before anything is fitted.

    Raises
    ------
    InputDatasetError
        A leak, or test people that differ between repetitions.
    SettingsError
        Two predictors or pools share a name, or a pool names an unknown predictor.
    """
    settings = settings or EvaluationSettings()
    pools = dict(context.pools or {})
    _check_names(predictors, pools, context.models)
    tested = split.tested
    overlap = (
        None
        if context.pretrained is None
        else refuse_pretrained(split, context.table, context.pretrained, transductive=context.transductive)
    )
    used = target.keep(list(split.table["participant_id"]))
    kernels = context.kernels or {}
    checks = (
        audit.audit_scans(split, kernels),
        audit.audit_people(split, kernels),
        audit.audit_pretraining(overlap, len(tested)),
        audit.audit_site(used, context.table),
        audit.audit_site_in_connectivity(kernels, context.table),
        audit.audit_size(target.keep(tested)),
    )
    forecasts, fold_of = run_folds(target, split, predictors, inner=settings.inner_folds, seed=settings.seed, progress=progress)
    people = target.keep(tested)
    pooled = pool_all(people, split, forecasts, pools)
    scorer = _Scorer(people, split, context.table, settings)
    refitted = _refit_p(target, split, predictors, pools, context.table, settings)
    models = [name for name in pooled if name in context.models]
    order = models + [name for name in pooled if name not in models]
    results = tuple(
        scorer.result(name, pooled[name], "model" if name in models else "floor", pools.get(name, ()), refitted.get(name)) for name in order
    )
    differences = tuple(
        item
        for first in models
        for item in _corrected([scorer.difference(first, second, pooled) for second in order if second not in models])
    )
    metrics = Metrics(
        target=target.name,
        kind=target.kind,
        classes=target.classes,
        people=len(tested),
        counts=people.counts(),
        dropped=target.dropped,
        design=describe_design(split),
        repeats=split.repeats,
        split_sha256=split.digest(),
        cross_validated=split.cross_validated,
        transductive_overlap=overlap or 0,
        primary=PRIMARY[target.kind],
        interval=f"{settings.level:.0%} bootstrap over participants, {'BCa' if settings.interval == 'bca' else 'percentile'}, {settings.bootstraps} resamples",
        interval_caveat=uncertainty.COVERAGE_CAVEAT if split.cross_validated else None,
        permutation_caveat=uncertainty.PERMUTATION_CAVEAT if split.cross_validated else None,
        predictors=results,
        differences=differences,
        groups=scorer.groups({name: pooled[name] for name in _headline(order, pools)}),
        audit=checks,
        truth=context.truth,
        statement=state(target, split, results, differences, transductive=overlap or 0),
        notes=(*target.notes, *context.notes),
        seed=settings.seed,
        versions=package_versions(),
    )
    return EvaluationResult(
        metrics=metrics,
        split=split,
        people=people.participants,
        observed=people.observed,
        fold_of=fold_of[:, positions(tested, people.participants)],
        pooled={name: pooled[name] for name in order},
    )


def _check_names(predictors: Mapping[str, Predictor], pools: Mapping[str, tuple[str, ...]], models: Sequence[str]) -> None:
    twice = set(predictors) & set(pools)
    unknown = [name for members in pools.values() for name in members if name not in predictors]
    unknown += [name for name in models if name not in predictors and name not in pools]
    if twice or unknown or not predictors:
        what = (
            f"'{min(twice)}' is a predictor and a pool"
            if twice
            else f"no predictor is called '{unknown[0]}'"
            if unknown
            else "nothing to evaluate"
        )
        raise SettingsError(what, fix="name each predictor and pool once")


def _refit_p(
    target: Target,
    split: Split,
    predictors: Mapping[str, Predictor],
    pools: Mapping[str, tuple[str, ...]],
    table: pd.DataFrame,
    settings: EvaluationSettings,
) -> dict[str, float]:
    """One-sided p, (1 + b) / (1 + m), of the primary score of every predictor refitted on permuted people.

    Labels, folds and strata stay; which person's data stand behind a label is permuted within strata. So folds remain
    stratified, and a permuted data set is as likely as the real one where data and labels are independent.
    """
    if not settings.refit_permutations:
        return {}
    people, metric = target.keep(split.tested), PRIMARY[target.kind]
    used = target.keep(list(split.table["participant_id"])).participants
    strata = strata_of(table.loc[list(used)], settings.strata, target.name)
    everyone = np.ones((1, len(people.participants)))

    def scores(given: Mapping[str, Predictor]) -> dict[str, float]:
        forecasts, _ = run_folds(target, split, given, inner=settings.inner_folds, seed=settings.seed)
        pooled = pool_all(people, split, forecasts, pools)
        found = {}
        for name, one in pooled.items():
            parts = [statistic(metric, people.kind, people.observed, predicted) for predicted in one.predicted]
            found[name] = float(uncertainty.averaged([part for part in parts if part is not None])(everyone)[0])
        return found

    rng = np.random.default_rng(np.random.SeedSequence([settings.seed, 1]))
    real = scores(predictors)
    reached = dict.fromkeys(real, 1)
    for _ in range(settings.refit_permutations):
        stand_in = uncertainty.permuted_names(used, strata, rng)
        permuted = scores({name: renamed(predictor, stand_in) for name, predictor in predictors.items()})
        for name, value in permuted.items():
            reached[name] += value >= real[name] - 1e-12
    return {name: count / (1 + settings.refit_permutations) for name, count in reached.items() if np.isfinite(real[name])}


def _corrected(items: Sequence[Difference]) -> list[Difference]:
    """One model's differences, p corrected for their number."""
    known = [item.bootstrap_p for item in items if item.bootstrap_p is not None]
    corrected = iter(uncertainty.holm(known))
    return [item if item.bootstrap_p is None else item.model_copy(update={"holm_p": next(corrected)}) for item in items]


def strata_of(table: pd.DataFrame, columns: Sequence[str], target: str) -> NDArray | None:
    """(people,) stratum of each row of ``table``; none where no column is known."""
    known = [column for column in columns if column in table and column != target]
    return table[known].map(class_text).agg("|".join, axis=1).to_numpy() if known else None


def _headline(order: Sequence[str], pools: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Predictors without the members of pools: one line per idea."""
    members = {name for names in pools.values() for name in names}
    return [name for name in order if name not in members]


class _Scorer:
    """Scores with intervals; the resamples are drawn once and shared, so that differences are paired."""

    def __init__(self, people: Target, split: Split, table: pd.DataFrame, settings: EvaluationSettings) -> None:
        self.people, self.settings, self.shared = people, settings, split.cross_validated
        self.table = table.loc[list(people.participants)]
        groups = split.groups
        self.units = np.array([groups[name] for name in people.participants])
        weights_seed, self.permutation_seed = np.random.SeedSequence(settings.seed).spawn(2)
        self.weights = uncertainty.resample_weights(self.units, settings.bootstraps, np.random.default_rng(weights_seed))
        self.jackknife = uncertainty.leave_one_out_weights(self.units) if settings.interval == "bca" else None
        self.strata = strata_of(self.table, settings.strata, people.name)

    def result(
        self, name: str, pooled: Pooled, role: Literal["model", "floor"], members: tuple[str, ...], refit_p: float | None
    ) -> PredictorResult:
        """Every score of one predictor over everybody."""
        names = {key for choice in pooled.choices for key in choice}
        p = uncertainty.permutation_p(
            self.people.kind,
            self.people.observed,
            pooled.predicted,
            strata=self.strata,
            permutations=self.settings.permutations,
            rng=np.random.default_rng(self.permutation_seed),
            shared=self.shared,
        )
        return PredictorResult(
            name=name,
            role=role,
            scores=self.scores(pooled, np.arange(len(self.units))),
            thresholds=pooled.thresholds,
            threshold_rule=pooled.rule,
            permutation_p=p,
            refit_p=refit_p,
            permutation_reason=None if p is not None else "labels do not vary within strata, or a class is absent",
            pooled_from=members,
            choices={key: tuple(choice[key] for choice in pooled.choices if key in choice) for key in sorted(names)},
        )

    def scores(self, pooled: Pooled, rows: NDArray[np.int64], only: Sequence[str] = ()) -> dict[str, Score]:
        """Scores of some people, averaged over repetitions, with intervals."""
        kind, observed = self.people.kind, self.people.observed[rows]
        repeats = range(len(pooled.predicted))
        decided = [None if pooled.decided is None else pooled.decided[repeat, rows] for repeat in repeats]
        points = [score(kind, observed, pooled.predicted[repeat, rows], decided[repeat], ordered=self.people.ordered) for repeat in repeats]
        result = {}
        for metric in only or points[0]:
            values = [point[metric].value for point in points]
            if any(value is None for value in values):
                result[metric] = next(point[metric] for point in points if point[metric].value is None)
                continue
            parts = [statistic(metric, kind, observed, pooled.predicted[repeat, rows], decided[repeat]) for repeat in repeats]
            value = float(np.mean([value for value in values if value is not None]))
            result[metric] = self._interval(metric, value, [part for part in parts if part is not None], rows)
        return result

    def _interval(self, metric: str, value: float, parts: list[uncertainty.Weighted], rows: NDArray[np.int64]) -> Score:
        if not parts:
            return Score(value=value, reason=f"no interval: the {METRICS[metric].label.lower()} is a fit of its own")
        jackknife = None
        if self.jackknife is not None:
            touched = (self.jackknife[:, rows] == 0).any(1)
            jackknife = self.jackknife[touched][:, rows]
        found = uncertainty.interval(
            uncertainty.averaged(parts),
            self.weights[:, rows],
            method=self.settings.interval,
            level=self.settings.level,
            jackknife=jackknife,
        )
        return Score(value=value, low=found.low, high=found.high, reason=found.reason)

    def difference(self, first: str, second: str, pooled: Mapping[str, Pooled]) -> Difference:
        """Paired difference of the primary score."""
        kind, observed, metric = self.people.kind, self.people.observed, PRIMARY[self.people.kind]
        weighted = []
        for name in (first, second):
            predicted, decided = pooled[name].predicted, pooled[name].decided
            parts = [
                statistic(metric, kind, observed, predicted[repeat], None if decided is None else decided[repeat])
                for repeat in range(len(predicted))
            ]
            weighted.append(uncertainty.averaged([part for part in parts if part is not None]))
        everyone = np.ones((1, len(observed)))
        value = float(weighted[0](everyone)[0] - weighted[1](everyone)[0])
        if not np.isfinite(value):
            return Difference(first=first, second=second, metric=metric, value=None, reason="the score is undefined on these people")
        resampled = uncertainty.over(weighted[0], self.weights) - uncertainty.over(weighted[1], self.weights)
        found = uncertainty.interval(lambda _: resampled, self.weights[:1], method="percentile", level=self.settings.level)
        p_delong = None
        if kind == "binary":
            stacked = np.stack([pooled[name].predicted[:, :, 1] for name in (first, second)])
            p_delong = uncertainty.delong(observed.astype(np.int64), stacked).difference(0, 1)[2]
        return Difference(
            first=first,
            second=second,
            metric=metric,
            value=value,
            low=found.low,
            high=found.high,
            bootstrap_p=uncertainty.bootstrap_p(resampled),
            delong_p=p_delong,
            detectable=None if found.error is None else uncertainty.detectable_difference(found.error, level=1 - self.settings.level),
            reason=found.reason,
        )

    def groups(self, pooled: Mapping[str, Pooled]) -> tuple[GroupScores, ...]:
        """Scores by site, sex and age band; undefined ones say why."""
        found = []
        for column, level, rows in self._levels():
            part = self.people.keep([self.people.participants[row] for row in rows])
            for name, values in pooled.items():
                scores = self.scores(values, rows, _GROUP_METRICS[self.people.kind])
                found.append(GroupScores(column=column, level=level, people=len(rows), counts=part.counts(), predictor=name, scores=scores))
        return tuple(found)

    def _levels(self) -> list[tuple[str, str, NDArray[np.int64]]]:
        levels = []
        for column in self.settings.groups:
            if column not in self.table or self.table[column].isna().all() or column == self.people.name:
                continue
            names = _age_bands(self.table[column], self.settings.age_bands) if column == "age" else self.table[column].map(class_text)
            found = dict.fromkeys(sorted(names, key=_band_order))
            levels += [(column, level or "unknown", np.flatnonzero(names == level)) for level in found]
        return levels


def _age_bands(ages: pd.Series, edges: Sequence[float]) -> pd.Series:
    """Age band of each person, as text; people without an age are unknown."""
    numbers = pd.to_numeric(ages, errors="coerce")
    names = [
        f"under {edges[0]:g}",
        *(f"{low:g} to {high:g}" for low, high in itertools.pairwise(edges)),
        f"{edges[-1]:g} and over",
    ]
    return numbers.map(lambda age: "" if np.isnan(age) else names[int(np.searchsorted(edges, age, side="right"))])


def _band_order(name: str) -> tuple[int, float, str]:
    if name.startswith("under "):
        return (0, 0.0, name)
    first = name.split(" ", maxsplit=1)[0]
    try:
        return (1, float(first), name)
    except ValueError:
        return (2, 0.0, name)
