"""Report of an evaluation: the model among its floors, what the numbers allow to say, and who was where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from brainfm_cli.learning.scores import METRICS
from brainfm_cli.reports import evaluation_figures as figures
from brainfm_cli.reports.drawing import listed
from brainfm_cli.reports.page import Page, Section, heading, paragraph, table
from brainfm_cli.reports.stratification import stratification_sections

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from markupsafe import Markup

    from brainfm_cli.learning.results import EvaluationResult, Metrics, PredictorResult
    from brainfm_cli.learning.scores import Score

_MOST_CLASSES = 6  # a picture each; further classes are in the tables
_MOST_FOLDS = 60
_DELONG = "DeLong ER, DeLong DM, Clarke-Pearson DL. Comparing the areas under two or more correlated receiver operating characteristic curves. Biometrics 1988;44:837."
_BCA = "Efron B. Better bootstrap confidence intervals. Journal of the American Statistical Association 1987;82:171."
_PERMUTATION = (
    "Phipson B, Smyth GK. Permutation p-values should never be zero. Statistical Applications in Genetics and Molecular Biology 2010;9:39."
)


def evaluation_page(
    result: EvaluationResult, *, title: str, subtitle: str, facts: Mapping[str, str], notes: Sequence[str], extra: Sequence[Section] = ()
) -> Page:
    """The page of one evaluation; ``notes`` stand above everything, after the transductive warning, ``extra`` before who was where."""
    metrics = result.metrics
    names = headline(metrics)
    sections = [
        _overview(metrics),
        _scores(metrics),
        *_differences(metrics),
        *stratification_sections(metrics),
        *(_continuous(result, names) if metrics.kind == "continuous" else _categorical(result, names)),
        *_groups(metrics),
        *extra,
        _split(result),
        _audit(metrics),
        *_choices(metrics),
        _remarks(metrics),
    ]
    return Page(
        title=title,
        subtitle=subtitle,
        facts=dict(facts),
        notes=(*_banner(metrics), *notes),
        sections=tuple(sections),
        methods=_methods(metrics),
        citations=_citations(metrics),
    )


def headline(metrics: Metrics) -> list[str]:
    """Predictors without those that are averaged under another name: one line per idea."""
    members = {name for result in metrics.predictors for name in result.pooled_from}
    return [result.name for result in metrics.predictors if result.name not in members]


def leaders(metrics: Metrics) -> list[str]:
    """Models and the best floor; floors only: the best two."""
    names = headline(metrics)
    models = [name for name in names if metrics.of(name).role == "model"]
    floors = [name for name in names if name not in models]
    ranked = sorted(floors, key=lambda name: -_value(metrics.of(name).scores[metrics.primary]))
    return [*models, *ranked[: 1 if models else 2]]


def _value(score: Score) -> float:
    return float("-inf") if score.value is None else score.value


def _banner(metrics: Metrics) -> tuple[str, ...]:
    if not metrics.transductive_overlap:
        return ()
    told = f"TRANSDUCTIVE: {metrics.transductive_overlap} of {metrics.people} test people were in the pretraining (without labels)."
    return (f"{told} Every score of a model below holds under this condition only.",)


def _overview(metrics: Metrics) -> Section:
    chance = 0.0 if metrics.kind == "continuous" else 0.5
    blocks = [paragraph(metrics.statement), figures.forest(metrics, metrics.primary, chance)]
    if metrics.interval_caveat:
        blocks.append(paragraph(metrics.interval_caveat))
    if metrics.truth is not None:
        blocks.append(
            paragraph(
                "The data are simulated: no predictor can be better than the Bayes-optimal line except by luck of the draw; "
                "the attainable line is a linear model on exactly the planted features, as these series show them."
            )
        )
    return Section(
        title="What the numbers say",
        lead=f"Target '{metrics.target}', {metrics.people} test people. {metrics.design}. Models and floors saw the same folds.",
        blocks=tuple(blocks),
    )


def _scores(metrics: Metrics) -> Section:
    names = list(dict.fromkeys(name for result in metrics.predictors for name in result.scores))
    rows = [
        [_named(result), *(_cell(result.scores.get(name)) for name in names), _p(result.permutation_p), _p(result.refit_p)]
        for result in metrics.predictors
    ]
    frame = pd.DataFrame(rows, columns=["predictor", *(_column(name) for name in names), "permutation p", "refitted p"])
    if all(result.refit_p is None for result in metrics.predictors):
        frame = frame.drop(columns="refitted p")
    models = [place for place, result in enumerate(metrics.predictors) if result.role == "model"]
    rules: dict[str, list[str]] = {}
    for result in metrics.predictors:
        rules.setdefault(result.threshold_rule, []).append(result.name)
    return Section(
        title="All scores",
        lead=f"{_repeated(metrics)}Intervals: {metrics.interval}. Arrows say which way is better; models are marked.",
        blocks=(
            table(frame, highlight=models),
            *(paragraph(f"Class decided: {rule} ({_whose(metrics, names)}).") for rule, names in rules.items() if rule),
            *(paragraph(text) for text in (*_caveats(metrics), *_reasons(metrics))),
        ),
    )


def _repeated(metrics: Metrics) -> str:
    return f"Mean over {metrics.repeats} repetitions. " if metrics.repeats > 1 else ""


def _caveats(metrics: Metrics) -> list[str]:
    """What to know of the intervals and p values of this table."""
    fixed = any(result.permutation_p is not None and result.refit_p is None for result in metrics.predictors)
    return [text for text in (metrics.interval_caveat, metrics.permutation_caveat if fixed else None) if text]


def _named(result: PredictorResult) -> str:
    return f"{result.name} (mean of {len(result.pooled_from)} atlases' predictions)" if result.pooled_from else result.name


def _column(name: str) -> str:
    metric = METRICS[name]
    return metric.label + {"higher": " ↑", "lower": " ↓", "one": " → 1"}[metric.better]


def _cell(score: Score | None) -> str:
    if score is None:
        return ""
    return "not computed" if score.value is None else _unbroken(score)


def _unbroken(score: Score) -> str:
    """A score whose interval stays on one line."""
    return str(score).replace(", ", ",\N{NO-BREAK SPACE}")


def _p(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2g}"


def _reasons(metrics: Metrics) -> list[str]:
    """Why scores, intervals or p values are missing, each reason once."""
    found: dict[str, list[str]] = {}
    for result in metrics.predictors:
        for name, score in result.scores.items():
            if score.reason:
                what = "not computed" if score.value is None else "without interval"
                found.setdefault(f"{METRICS[name].label} {what}: {score.reason}", []).append(result.name)
        if result.permutation_reason:
            found.setdefault(f"Permutation p not computed: {result.permutation_reason}", []).append(result.name)
    return [f"{text} ({_whose(metrics, names)})." for text, names in found.items()]


def _whose(metrics: Metrics, names: Sequence[str]) -> str:
    return "all" if len(names) == len(metrics.predictors) else "; ".join(names)


def _differences(metrics: Metrics) -> list[Section]:
    if not metrics.differences:
        return []
    label = METRICS[metrics.primary].label
    rows = [
        (
            item.first,
            item.second,
            "not computed" if item.value is None else f"{item.value:+.3f}",
            "" if item.low is None or item.high is None else f"[{item.low:+.3f},\N{NO-BREAK SPACE}{item.high:+.3f}]",
            _p(item.bootstrap_p),
            _p(item.holm_p),
            _p(item.delong_p),
            "" if item.detectable is None else f"{item.detectable:.3f}",
            item.reason or _verdict(item.low, item.high),
        )
        for item in metrics.differences
    ]
    frame = pd.DataFrame(
        rows,
        columns=[
            "model",
            "floor",
            f"difference of {label}",
            "interval",
            "bootstrap p",
            "Holm p",
            "DeLong p",
            "smallest difference found with 80 % power",
            "reading",
        ],
    )
    clear = [place for place, item in enumerate(metrics.differences) if item.low is not None and item.low > 0]
    lead = "Same people, same folds, same resamples. Positive: the model is better. Rows whose interval is above 0 are marked."
    return [Section(title="Model against floors", lead=lead, blocks=(table(frame, highlight=clear),))]


def _verdict(low: float | None, high: float | None) -> str:
    if low is None or high is None:
        return ""
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def _categorical(result: EvaluationResult, names: list[str]) -> list[Section]:
    metrics = result.metrics
    codes = [1] if metrics.kind == "binary" else list(range(len(metrics.classes)))
    present = [code for code in codes if 0 < int(np.sum(result.observed == code)) < len(result.observed)]
    drawn = present[:_MOST_CLASSES]
    if not drawn:
        return [
            Section(title="ROC and precision-recall", blocks=(paragraph("Not drawn: one class only among the test people."),)),
            _confused(result),
        ]
    rest = "" if len(present) == len(drawn) else f" Of {len(present)} classes the first {len(drawn)} are drawn."
    best = leaders(metrics)
    found = [
        Section(
            title="ROC and precision-recall",
            lead="Models solid, floors broken lines." + rest,
            blocks=tuple(figures.discrimination(result, names, code) for code in drawn),
        ),
        Section(
            title="Calibration",
            lead="Whether a probability of 0.7 means seven of ten." + rest,
            blocks=tuple(figures.calibration(result, best, code) for code in drawn),
        ),
    ]
    if metrics.kind == "binary":
        found.append(Section(title="Decision curve", blocks=(figures.decision(result, best),)))
    return [*found, _confused(result)]


def _confused(result: EvaluationResult) -> Section:
    metrics = result.metrics
    names = leaders(metrics)
    shown = [figures.confusion(result, names[start : start + 3]) for start in range(0, len(names), 3)]
    thresholds = [
        f"{name}: {np.median(values):.3f} (median of {len(values)} folds, {min(values):.3f} to {max(values):.3f})"
        for name in names
        if (values := metrics.of(name).thresholds)
    ]
    return Section(title="Confusion", blocks=(*shown, *(paragraph(f"Threshold of {text}.") for text in thresholds)))


def _continuous(result: EvaluationResult, names: list[str]) -> list[Section]:
    drawn = [name for name in leaders(result.metrics) if name in names]
    shown = tuple(figures.values(result, drawn[start : start + 3]) for start in range(0, len(drawn), 3))
    return [Section(title="Predicted and observed", blocks=shown)]


def _groups(metrics: Metrics) -> list[Section]:
    if not metrics.groups:
        return []
    blocks: list[Markup] = []
    predictors = list(dict.fromkeys(item.predictor for item in metrics.groups))
    for name in dict.fromkeys(name for item in metrics.groups for name in item.scores):
        rows: dict[tuple[str, str], list[str]] = {}
        for item in metrics.groups:
            row = rows.setdefault((item.column, item.level), [item.column, item.level, str(item.people), _counts(item.counts)])
            row.append(_with_reason(item.scores[name]))
        columns = ["group", "level", "people", "classes", *predictors]
        frame = pd.DataFrame(list(rows.values()), columns=columns)
        if not metrics.classes:
            frame = frame.drop(columns="classes")
        blocks += [heading(_column(name)), table(frame)]
    lead = "The same predictions, scored among the people of one site, sex or age band. Small groups give wide intervals."
    return [Section(title="By site, sex and age", lead=lead, blocks=tuple(blocks))]


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in counts.items())


def _with_reason(score: Score) -> str:
    if score.value is None:
        return f"not computed: {score.reason}"
    return f"{_unbroken(score)} ({score.reason})" if score.reason else _unbroken(score)


def _split(result: EvaluationResult) -> Section:
    metrics, split = result.metrics, result.split.table
    classes = dict(zip(result.people, result.observed, strict=True))
    rows = []
    for (repeat, fold), part in split.groupby(["repeat", "fold"], sort=True):
        tested = part.loc[part["role"] == "test"]
        roles = part["role"].value_counts()
        observed = [classes[name] for name in tested["participant_id"]]
        who = (
            _counts({name: observed.count(code) for code, name in enumerate(metrics.classes)})
            if metrics.classes
            else f"mean {np.mean(observed):.4g}, {min(observed):.4g} to {max(observed):.4g}"
        )
        rows.append([repeat, fold, int(roles.get("train", 0)), len(tested), int(roles.get("unused", 0)), who, listed(sorted(set(tested["why"])), 2)])  # fmt: skip
    frame = pd.DataFrame(rows, columns=["repetition", "fold", "train", "test", "unused", f"'{metrics.target}' of test people", "why"])
    blocks = [table(frame.head(_MOST_FOLDS))]
    if len(frame) > _MOST_FOLDS:
        blocks.append(paragraph(f"The first {_MOST_FOLDS} of {len(frame)} folds; split.tsv has all."))
    groups = split["group"].nunique()
    people = split["participant_id"].nunique()
    if groups < people:
        blocks.append(paragraph(f"{people} people form {groups} groups; a group is never on both sides."))
    if metrics.dropped:
        blocks.append(paragraph("Left out: " + ", ".join(f"{count} {reason}" for reason, count in metrics.dropped.items()) + "."))
    blocks.append(paragraph(f"Digest of the split (SHA-256): {metrics.split_sha256}"))
    return Section(
        title="Who was where", lead="Written before anything was fitted, and read by models and floors alike.", blocks=tuple(blocks)
    )


def _audit(metrics: Metrics) -> Section:
    frame = pd.DataFrame([(item.check, item.verdict, item.text) for item in metrics.audit], columns=["check", "verdict", "finding"])
    warned = [place for place, item in enumerate(metrics.audit) if item.verdict == "warning"]
    lead = "Checks of the evaluation itself. A leak that would make the scores worthless stops the evaluation; what is left is told here."
    return Section(title="Audit", lead=lead, blocks=(table(frame, highlight=warned),))


def _choices(metrics: Metrics) -> list[Section]:
    rows = [
        (result.name, name, listed([f"{value:g}" if isinstance(value, float) else str(value) for value in values], 60))
        for result in metrics.predictors
        for name, values in (*result.choices.items(), *((("threshold", _rounded(result.thresholds)),) if result.thresholds else ()))
    ]
    if not rows:
        return []
    frame = pd.DataFrame(rows, columns=["predictor", "choice", "value in each repetition and fold"])
    return [Section(title="Choices in each fold", lead="Made on training people only.", blocks=(table(frame),))]


def _rounded(values: Sequence[float]) -> tuple[float, ...]:
    return tuple(round(value, 3) for value in values)


def _remarks(metrics: Metrics) -> Section:
    versions = ", ".join(f"{name} {version}" for name, version in metrics.versions.items())
    blocks = [paragraph(text) for text in metrics.notes]
    blocks.append(paragraph(f"Seed of resampling: {metrics.seed}." + (f" Versions: {versions}." if versions else "")))
    return Section(title="Notes", blocks=tuple(blocks))


def _methods(metrics: Metrics) -> str:
    parts = [
        f"'{metrics.target}' was predicted for {metrics.people} people ({metrics.design}).",
        "Every predictor was fitted on the training people of each fold only, with penalties and thresholds chosen on inner folds of them.",
        "The predictions of test people were pooled within each repetition.",
        f"Intervals: {metrics.interval}; resamples are shared by all predictors, so that differences are paired.",
        "Permutation p: one-sided, labels permuted within strata against the fixed predictions, counted (1 + b) / (1 + m)"
        + (", the permuted scores spread √2 times as far because folds share people." if metrics.cross_validated else "."),
    ]
    if metrics.kind == "binary":
        parts.append("Areas under ROC curves were also compared by DeLong's test.")
    return " ".join(parts)


def _citations(metrics: Metrics) -> tuple[str, ...]:
    return (
        *((_BCA,) if "BCa" in metrics.interval else ()),
        *((_DELONG,) if metrics.kind == "binary" and metrics.differences else ()),
        _PERMUTATION,
    )
