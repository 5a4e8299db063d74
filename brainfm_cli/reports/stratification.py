"""Part of an evaluation's report: likely, uncertain and unlikely responders of a trial, and the patients that a next trial needs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from brainfm_cli.reports.drawing import BLUE, GREY, ORANGE, tidy
from brainfm_cli.reports.page import Section, figure, paragraph, table

if TYPE_CHECKING:
    from markupsafe import Markup

    from brainfm_cli.learning.results import Metrics
    from brainfm_cli.learning.scores import Score
    from brainfm_cli.learning.stratification import Stratification


def stratification_sections(metrics: Metrics) -> list[Section]:
    """What the strata of a trial's patients say; nothing where the evaluation is of no trial."""
    found = metrics.stratification
    if found is None:
        return []
    lead = (
        f"By the held-out score of {found.predictor}. A patient's place is the share of the training people of the same fold whose held-out "
        f"score is lower: unlikely below {found.cuts[0]:.2f}, likely from {found.cuts[1]:.2f}. Intervals resample patients within arms."
    )
    sized = (
        f"Sizes are for {found.power:.0%} power at a two-sided level of {found.level:g}, with two equal arms and the difference between arms that these "
        "patients show, which is itself uncertain: read the intervals. Enrolling likely responders pays where the score is predictive; "
        "fitting the score beside the arm pays where it is prognostic. The rules were not chosen by these figures, but there are several."
    )
    blocks = (paragraph(found.statement), _picture(found, metrics), table(_strata(found, metrics)), table(_sizes(found)), paragraph(sized))
    return [Section(title="Likely and unlikely responders", lead=lead, blocks=blocks)]


def _what(metrics: Metrics) -> str:
    return f"share '{metrics.classes[1]}'" if metrics.kind == "binary" else f"mean '{metrics.target}'"


def _strata(found: Stratification, metrics: Metrics) -> pd.DataFrame:
    arms = list(found.strata[0].patients)
    rows = [
        (
            one.name,
            ", ".join(f"{count} {arm}" for arm, count in one.patients.items()),
            _cell(one.outcome),
            *(_cell(one.by_arm[arm]) for arm in arms),
            _cell(one.benefit),
        )
        for one in found.strata
    ]
    what = _what(metrics)
    columns = ["stratum", "patients", what, *(f"{what}, {arm}" for arm in arms), f"{found.treated} minus other arm"]
    return pd.DataFrame(rows, columns=columns)


def _sizes(found: Stratification) -> pd.DataFrame:
    rows = [
        (one.rule, _cell(one.enrolled), _cell(one.benefit), _patients(one.randomise), _patients(one.screen), _cell(one.ratio))
        for one in found.sizes
    ]
    columns = ["who is enrolled", "share of the screened", "benefit", "patients to randomise", "patients to screen", "relative to no score"]
    return pd.DataFrame(rows, columns=columns)


def _cell(score: Score) -> str:
    if score.value is None:
        return f"not computed: {score.reason}"
    if score.low is None or score.high is None:
        return f"{score.value:.2f}" + (f" ({score.reason})" if score.reason else "")
    return f"{score.value:.2f} [{score.low:.2f},\N{NO-BREAK SPACE}{score.high:.2f}]"


def _patients(score: Score) -> str:
    """A number of patients, rounded up to a pair; its interval may be open."""
    ends = [None if value is None else 2 * -int(-value // 2) for value in (score.low, score.high)]
    shown = [f"{value:,}" if value is not None else "no end" for value in ends]
    if score.value is None:
        return f"not computed: {score.reason}"
    return f"{2 * -int(-score.value // 2):,} [{shown[0]},\N{NO-BREAK SPACE}{shown[1]}]"


def _picture(found: Stratification, metrics: Metrics) -> Markup:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6.5, 2.8), layout="constrained")
    axis = drawing.subplots()
    arms = list(found.strata[0].patients)
    for place, (arm, colour) in enumerate(zip(arms, (ORANGE, BLUE), strict=True)):
        for row, one in enumerate(found.strata):
            score = one.by_arm[arm]
            if score.value is None or score.low is None or score.high is None:
                continue
            x = row + 0.24 * (place - 0.5)
            axis.plot([x, x], [score.low, score.high], color=colour, linewidth=1.6)
            axis.plot([x], [score.value], "o", color=colour, markersize=6)
        axis.plot([], [], "o", color=colour, label=arm)
    axis.set_xticks(range(len(found.strata)), [f"{one.name}\n{sum(one.patients.values())} patients" for one in found.strata])
    axis.set_ylabel(_what(metrics), fontsize=8, parse_math=False)
    axis.grid(axis="y", color=GREY, alpha=0.3)
    tidy(axis)
    axis.legend(fontsize=8, frameon=False)
    return figure(
        drawing,
        caption="Outcome by stratum and arm, with 95 % intervals.",
        alt="Outcome of unlikely, uncertain and likely responders by arm",
    )
