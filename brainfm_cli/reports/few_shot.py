"""Report of learning curves: model and floors with ever more training people, on the same draws."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from brainfm_cli.reports.page import Page, Section, figure, table

if TYPE_CHECKING:
    from collections.abc import Mapping

    from markupsafe import Markup

    from brainfm_cli.learning.results import Metrics, PredictorResult
    from brainfm_cli.learning.scores import Score

_MODEL, _FLOOR = "#1f5fa8", "#9aa7b8"


def few_shot_page(few: Mapping[int, Metrics], whole: Metrics, *, model: str) -> Page:
    """The page of the learning curves of one evaluation; ``few`` is by people per class, ``whole`` has all training people."""
    first = next(iter(few.values()))
    people = "in all" if first.kind == "continuous" else "per class"
    members = {name for result in first.predictors for name in result.pooled_from}
    names = [result.name for result in first.predictors if result.name not in members]
    scores = pd.DataFrame(
        [(name, *(_cell(metrics, name) for metrics in few.values()), _cell(whole, name)) for name in names],
        columns=["predictor", *(f"{number} {people}" for number in few), "everybody"],
    )
    differences = pd.DataFrame(
        [
            (f"{item.first} − {item.second}", number, f"{item.value:+.3f}", "" if item.low is None or item.high is None else f"{item.low:+.3f} to {item.high:+.3f}")
            for number, metrics in few.items()
            for item in metrics.differences
            if item.second in names and item.value is not None
        ],
        columns=["difference", f"people {people}", first.primary, "95 % interval"],
    )  # fmt: skip
    lead = f"Mean over {first.repeats} draws of training people, the same for all; the test people stay. Intervals are over test people."
    sections = (
        Section(title="Learning curves", lead=lead, blocks=(_picture(few, whole, names), table(scores))),
        Section(title="Model against floors", lead="Paired: same draws, same test people.", blocks=(table(differences),)),
    )
    return Page(
        title=f"Few people to learn {whole.target} from",
        subtitle=f"brainfm predict, model {model}",
        facts={"Target": whole.target, "People tested": str(whole.people), "Draws": str(first.repeats)},
        sections=sections,
    )


def _result(metrics: Metrics, name: str) -> PredictorResult | None:
    return next((result for result in metrics.predictors if result.name == name), None)


def _score(metrics: Metrics, name: str) -> Score | None:
    result = _result(metrics, name)
    return None if result is None else result.scores.get(metrics.primary)


def _cell(metrics: Metrics, name: str) -> str:
    score = _score(metrics, name)
    return "" if score is None else str(score)


def _picture(few: Mapping[int, Metrics], whole: Metrics, names: list[str]) -> Markup:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7, 3.2), layout="constrained")
    axis = drawing.subplots()
    places = [*few, 2 * max(few)]
    models = {result.name for result in whole.predictors if result.role == "model"}
    for name in names:
        found = [_score(metrics, name) for metrics in (*few.values(), whole)]
        kept = [(place, one.value) for place, one in zip(places, found, strict=True) if one is not None and one.value is not None]
        if kept:
            colour, width = (_MODEL, 1.8) if name in models else (_FLOOR, 0.9)
            axis.plot([place for place, _ in kept], [value for _, value in kept], "o-", color=colour, linewidth=width, markersize=3)
            axis.annotate(name, kept[-1], xytext=(4, 0), textcoords="offset points", fontsize=6, va="center")
    axis.set_xscale("log")
    axis.set_xticks(places, [*map(str, few), "all"])
    axis.minorticks_off()
    axis.set_xlabel("training people")
    axis.set_ylabel(whole.primary)
    return figure(drawing, caption="Model in blue, floors in grey.", alt="Score of model and floors by number of training people.")
