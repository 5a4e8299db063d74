"""Pictures of an evaluation: scores with intervals, ROC and precision-recall, calibration, net benefit, confusion, values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from brainfm_cli.learning import curves
from brainfm_cli.learning.scores import METRICS
from brainfm_cli.reports.drawing import BLUE, GREY, ORANGE, shortened, tidy
from brainfm_cli.reports.page import figure

if TYPE_CHECKING:
    from collections.abc import Sequence

    from markupsafe import Markup
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from brainfm_cli.learning.results import EvaluationResult, Metrics, PredictorResult

_MODELS = (BLUE, "#0b8a8f", "#5b2a86")
_FLOORS = (ORANGE, "#7a8699", "#8c6d31", "#3a7d44", "#c98bb0", "#b0a030", "#5f6b7a")
_STYLES = ("--", "-.", ":")
_LINE = "#3a4454"


def forest(metrics: Metrics, metric: str, chance: float) -> Markup:
    """Every predictor's score with its interval, models first; lines at chance and at the best that simulated data allow."""
    from matplotlib.figure import Figure

    rows = metrics.predictors
    known = [result.scores[metric] for result in rows if result.scores[metric].value is not None]
    ends = [value for score in known for value in (score.value, score.low, score.high) if value is not None]
    lines = _reference_lines(metrics, metric, chance)
    floor = -0.5 if metrics.kind == "continuous" else 0.0  # R² has no lower end; what lies below is written beside its row
    left, right = max(floor, min([*ends, chance])), min(1.0, max([*ends, chance, *(value for value, _, _ in lines)]))
    margin = 0.04 * max(right - left, 0.1)
    drawing = Figure(figsize=(9, 1.3 + 0.34 * len(rows)), layout="constrained")
    axis = drawing.subplots()
    for row, result in enumerate(rows):
        _interval(axis, -row, result, metric, floor)
    for value, style, label in lines:
        axis.axvline(value, color=_LINE, linewidth=1, linestyle=style, label=label, zorder=0)
    axis.set_xlim(left - margin, right + margin)
    axis.set_ylim(-len(rows) + 0.4, 0.6)
    axis.set_yticks([-row for row in range(len(rows))])
    axis.set_yticklabels([shortened(("    " if _member(metrics, result.name) else "") + result.name, 40) for result in rows], fontsize=9, parse_math=False)  # fmt: skip
    for tick, result in zip(axis.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("bold" if result.role == "model" else "normal")
    axis.set_xlabel(METRICS[metric].label, fontsize=9)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8, frameon=False)
    return figure(
        drawing,
        caption=f"{METRICS[metric].label} of every predictor with its interval ({metrics.interval}). Models blue, floors grey. Higher is better.",
        alt=f"{METRICS[metric].label} of {len(rows)} predictors: " + "; ".join(f"{result.name} {result.scores[metric]}" for result in rows),
    )


def discrimination(result: EvaluationResult, names: Sequence[str], code: int) -> Markup:
    """ROC and precision-recall curves of one class against the others, models and floors in one picture."""
    from matplotlib.figure import Figure

    labels = (result.observed == code).astype(np.int64)
    drawing = Figure(figsize=(10, 5.6), layout="constrained")
    left, right = drawing.subplots(1, 2)
    for name in names:
        p = result.pooled[name].predicted[:, :, code]
        roc, precision = curves.roc(labels, p), curves.precision_recall(labels, p)
        colour, width, style = _look(result.metrics, name, names)
        left.plot(roc.x, roc.y, color=colour, linewidth=width, linestyle=style, label=f" {name}")
        right.step(np.r_[0, precision.x], np.r_[precision.y[0], precision.y], where="pre", color=colour, linewidth=width, linestyle=style)
    left.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    right.axhline(labels.mean(), color=GREY, linewidth=0.8)
    left.set_xlabel("1 − specificity", fontsize=9)
    left.set_ylabel("sensitivity", fontsize=9)
    right.set_xlabel("recall (sensitivity)", fontsize=9)
    right.set_ylabel("precision", fontsize=9)
    for axis in (left, right):
        _unit_square(axis)
    _legend(drawing, left)
    who = result.metrics.classes[code]
    return figure(
        drawing,
        caption=f"'{who}' against the rest ({int(labels.sum())} of {len(labels)} people): ROC and precision-recall, averaged over repetitions. Grey: a rule that knows nothing.",
        alt=f"ROC and precision-recall curves of {who}",
    )


def calibration(result: EvaluationResult, names: Sequence[str], code: int) -> Markup:
    """Observed share over predicted probability in ten equal bins, and how many people are in each."""
    from matplotlib.figure import Figure

    labels = (result.observed == code).astype(np.int64)
    drawing = Figure(figsize=(7, 6.6), layout="constrained")
    above, below = drawing.subplots(2, 1, height_ratios=(3, 1), sharex=True)
    above.plot([0, 1], [0, 1], color=GREY, linewidth=0.8)
    for place, name in enumerate(names):
        found = curves.reliability(labels, result.pooled[name].predicted[:, :, code])
        colour, width, style = _look(result.metrics, name, names)
        filled = found.people > 0
        above.plot(found.mean[filled], found.observed[filled], color=colour, linewidth=width, linestyle=style, marker="o", markersize=4, label=f" {name}")  # fmt: skip
        bins, step = len(found.people), 1 / len(found.people)
        bar = step * 0.85 / len(names)
        below.bar(np.arange(bins) * step + step * 0.075 + bar * (place + 0.5), found.people, width=bar, color=colour)
    for axis in (above, below):
        tidy(axis)
    above.set_xlim(-0.02, 1.02)
    above.set_ylim(-0.02, 1.02)
    who = result.metrics.classes[code]
    above.set_ylabel(f"observed share of {shortened(who)}", fontsize=9, parse_math=False)
    below.set_ylabel("people", fontsize=9)
    below.set_xlabel(f"predicted probability of {shortened(who)}", fontsize=9, parse_math=False)
    _legend(drawing, above)
    return figure(
        drawing,
        caption=f"Calibration of '{who}': on the diagonal, probabilities can be taken at their word. Below: people per bin (mean over repetitions); points of few people say little.",
        alt=f"Calibration of {who}",
    )


def decision(result: EvaluationResult, names: Sequence[str]) -> Markup:
    """Net benefit of acting on the probabilities, against treating everybody and nobody."""
    from matplotlib.figure import Figure

    labels = result.observed.astype(np.int64)
    grid = np.linspace(0.01, 0.99, 99, dtype=np.float64)
    drawing = Figure(figsize=(7, 4.6), layout="constrained")
    axis = drawing.subplots()
    everybody = curves.net_benefit(labels, np.ones((1, len(labels))), grid)
    axis.plot(grid, everybody, color=GREY, linewidth=0.9, label=" everybody")
    axis.axhline(0, color=_LINE, linewidth=0.9, label=" nobody")
    best = float(labels.mean())
    for name in names:
        benefit = curves.net_benefit(labels, result.pooled[name].predicted[:, :, 1], grid)
        colour, width, style = _look(result.metrics, name, names)
        axis.plot(grid, benefit, color=colour, linewidth=width, linestyle=style, label=f" {name}")
    axis.set_ylim(-0.15 * best, 1.08 * best)
    axis.set_xlim(0, 1)
    axis.set_xlabel("probability at which one would act", fontsize=9)
    axis.set_ylabel("net benefit per person", fontsize=9)
    tidy(axis)
    _legend(drawing, axis)
    return figure(
        drawing,
        caption="Decision curve: acting on a predictor is worth it only where its line is above both 'everybody' and 'nobody'.",
        alt="Decision curve",
    )


def confusion(result: EvaluationResult, names: Sequence[str]) -> Markup:
    """People by observed and decided class, mean over repetitions; shade is the share of the observed class."""
    from matplotlib.figure import Figure

    classes = result.metrics.classes
    size = max(2.6, 0.55 * len(classes) + 1.4)
    drawing = Figure(figsize=(max(5.0, size * len(names) + 1.2), size + 0.6), layout="constrained")
    for place, (axis, name) in enumerate(zip(np.atleast_1d(drawing.subplots(1, len(names))), names, strict=True)):
        counts = confusion_counts(result, name)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1e-12)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        for (row, column), share in np.ndenumerate(shares):
            text = f"{counts[row, column]:.1f}".removesuffix(".0")
            axis.text(column, row, f"{text}\n{share:.0%}", ha="center", va="center", fontsize=8, color="white" if share > 0.55 else "black")
        ticks = [shortened(text, 14) for text in classes]
        axis.set_xticks(range(len(classes)))
        axis.set_xticklabels(ticks, fontsize=8, parse_math=False, rotation=30 if len(classes) > 3 else 0)
        axis.set_yticks(range(len(classes)))
        axis.set_yticklabels(ticks if place == 0 else [], fontsize=8, parse_math=False)
        axis.set_title(shortened(name, 34), fontsize=9, parse_math=False)
        axis.set_xlabel("decided", fontsize=8)
        if place == 0:
            axis.set_ylabel("observed", fontsize=8)
    return figure(
        drawing,
        caption="Confusion at the threshold chosen in the training folds: people (mean over repetitions), and share of the observed class.",
        alt="; ".join(f"{name}: {np.round(confusion_counts(result, name), 1).tolist()}" for name in names),
    )


def confusion_counts(result: EvaluationResult, name: str) -> NDArray[np.float64]:
    """(observed, decided) people, mean over repetitions."""
    decided = result.pooled[name].decided
    classes = len(result.metrics.classes)
    if decided is None:
        raise ValueError(f"{name} decides no class")
    cells = np.tile(result.observed.astype(np.int64), len(decided)) * classes + decided.ravel()
    return np.bincount(cells, minlength=classes**2).reshape(classes, classes) / len(decided)


def values(result: EvaluationResult, names: Sequence[str]) -> Markup:
    """Predicted over observed values, and the error over observed values, one column per predictor."""
    from matplotlib.figure import Figure

    observed = result.observed
    drawing = Figure(figsize=(max(5.0, 3.4 * len(names)), 6.2), layout="constrained")
    axes = drawing.subplots(2, len(names), squeeze=False, sharex=True, sharey="row")
    ends = [observed.min(), observed.max()]
    for column, name in enumerate(names):
        predicted = result.pooled[name].predicted.mean(0)
        colour = _look(result.metrics, name, names)[0]
        upper, lower = axes[:, column]
        upper.plot(ends, ends, color=GREY, linewidth=0.9)
        upper.scatter(observed, predicted, s=12, color=colour, alpha=0.6, linewidths=0)
        lower.axhline(0, color=GREY, linewidth=0.9)
        lower.scatter(observed, predicted - observed, s=12, color=colour, alpha=0.6, linewidths=0)
        slope = np.polyfit(observed, predicted - observed, 1)
        lower.plot(ends, np.polyval(slope, ends), color=_LINE, linewidth=1)
        upper.set_title(shortened(name, 34), fontsize=9, parse_math=False)
        lower.set_xlabel(f"observed {shortened(result.metrics.target)}", fontsize=8, parse_math=False)
        for axis in (upper, lower):
            tidy(axis)
    axes[0, 0].set_ylabel("predicted", fontsize=8)
    axes[1, 0].set_ylabel("predicted − observed", fontsize=8)
    return figure(
        drawing,
        caption="Predicted values (mean over repetitions; grey: perfect) and errors. A falling line of errors means that extremes are drawn towards the middle.",
        alt=f"Predicted and observed {result.metrics.target}",
    )


def _interval(axis: Axes, height: int, result: PredictorResult, metric: str, floor: float) -> None:
    score = result.scores[metric]
    colour = BLUE if result.role == "model" else "#6b7787"
    if score.value is None:
        axis.text(0.01, height, "not computed", fontsize=8, color=GREY, va="center", transform=axis.get_yaxis_transform())
        return
    if score.low is not None and score.high is not None:
        axis.plot([max(score.low, floor), max(score.high, floor)], [height, height], color=colour, linewidth=2 if result.role == "model" else 1.4)  # fmt: skip
    axis.plot([max(score.value, floor)], [height], marker="<" if score.value < floor else "o", color=colour, markersize=6)
    axis.text(1.01, height, str(score), fontsize=8, va="center", transform=axis.get_yaxis_transform())


def _reference_lines(metrics: Metrics, metric: str, chance: float) -> list[tuple[float, str, str]]:
    """(value, line style, label): chance, and of simulated data what is attainable and optimal."""
    lines = [(chance, ":", f"chance ({chance:g})")]
    if metrics.truth is None or metric != metrics.primary:
        return lines
    if metrics.truth.attainable is not None:
        lines.append((metrics.truth.attainable, "--", f"attainable ({metrics.truth.attainable:.3f})"))
    if metrics.truth.bayes_optimal is not None:
        lines.append((metrics.truth.bayes_optimal, "-", f"Bayes-optimal ({metrics.truth.bayes_optimal:.3f})"))
    return lines


def _member(metrics: Metrics, name: str) -> bool:
    """Whether a predictor is averaged under another one's name."""
    return any(name in result.pooled_from for result in metrics.predictors)


def _look(metrics: Metrics, name: str, names: Sequence[str]) -> tuple[str, float, str]:
    """(colour, width, style) of a predictor's lines; models are solid and thick."""
    models = [other for other in names if metrics.of(other).role == "model"]
    if name in models:
        return _MODELS[models.index(name) % len(_MODELS)], 2.2, "-"
    place = [other for other in names if other not in models].index(name)
    return _FLOORS[place % len(_FLOORS)], 1.3, _STYLES[place % len(_STYLES)]


def _legend(drawing: Figure, axis: Axes) -> None:
    handles, labels = axis.get_legend_handles_labels()
    legend = drawing.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _unit_square(axis: Axes) -> None:
    axis.set_xlim(-0.01, 1.01)
    axis.set_ylim(-0.01, 1.01)
    axis.set_aspect("equal")
    tidy(axis)
