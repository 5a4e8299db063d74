"""Report of a reader study: each reader with and without the model, what changes, for whom, how fast, and the model alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from brainfm_cli.reports.drawing import BLUE, GREY, ORANGE, shortened, tidy
from brainfm_cli.reports.page import Page, Section, figure, heading, paragraph, table

if TYPE_CHECKING:
    from markupsafe import Markup

    from brainfm_cli.learning.mrmc import Estimate
    from brainfm_cli.learning.reader_study import Endpoint, ReaderStudy

_METHODS = (
    "Accuracies of readers were compared by the method of Obuchowski and Rockette with the degrees of freedom of Hillis, readers and cases "
    "being random; covariances of areas under the ROC curve are DeLong's, those of proportions and of logarithmic reading times the usual ones "
    "over cases, those of concordance the jackknife's. Differences between kinds of readers and between a model and readers use the same "
    "variances with Satterthwaite's degrees of freedom. Agreement is Cohen's kappa, averaged over pairs of readers, with bootstrap intervals over cases."
)
_CITATIONS = (
    "Obuchowski NA, Rockette HE. Hypothesis testing of diagnostic accuracy for multiple readers and multiple tests. Communications in Statistics – Simulation and Computation 1995;24:285–308.",
    "Hillis SL. A comparison of denominator degrees of freedom methods for multiple observer ROC analysis. Stat Med 2007;26:596–619.",
    "DeLong ER, DeLong DM, Clarke-Pearson DL. Comparing the areas under two or more correlated ROC curves. Biometrics 1988;44:837–845.",
)


def reader_study_page(study: ReaderStudy) -> Page:
    """The page of one study."""
    return Page(
        title="Reader study",
        subtitle="brainfm predict group --reader-study",
        facts={
            "Readers": str(study.readers),
            "Cases": f"{study.cases} ({study.positive} with the condition)",
            "Arms": ", ".join(study.arms),
            "Reference": study.arms[0],
        },
        notes=study.notes,
        sections=tuple(reader_study_sections(study)),
        methods=_METHODS,
        citations=_CITATIONS,
    )


def reader_study_sections(study: ReaderStudy) -> list[Section]:
    """Parts of the page, in order."""
    level = f"{study.level:.0%}"
    primary = study.endpoints[0]
    sections = [
        Section(
            title="With and without",
            lead=f"{_sentence(primary, study)} Intervals of {level} over readers and cases: what other readers would reach on other cases.",
            blocks=(_picture(primary, study), table(_arms(study)), heading("Change from the reference"), table(_changes(study))),
        )
    ]
    if any(one.strata for one in study.endpoints):
        sections.append(
            Section(
                title="Kinds of readers",
                lead="Exploratory: p values are not corrected for their number, and few readers of a kind give wide intervals.",
                blocks=(table(_strata(primary)), heading("Between kinds"), table(_gaps(study))),
            )
        )
    if any(one.model is not None for one in study.endpoints):
        lead = "The model reads the same cases alone. Negative differences: readers reach more than the model."
        sections.append(Section(title="Model alone", lead=lead, blocks=(table(_model(study)),)))
    if study.agreement:
        rows = [(one.arm, one.pairs, str(one.kappa), str(one.weighted_kappa)) for one in study.agreement]
        sections.append(
            Section(
                title="Agreement",
                lead="Between readers, whatever the truth.",
                blocks=(table(pd.DataFrame(rows, columns=["arm", "pairs of readers", "κ of decisions", "quadratic κ of scores"])),),
            )
        )
    sections.append(Section(title="Each reader", blocks=(table(_readers(primary, study)),)))
    absent = [paragraph(f"{one.label}: not computed ({one.reason}).") for one in study.endpoints if one.reason]
    meanings = [paragraph(f"{one.label}: {one.meaning}.") for one in study.endpoints]
    sections.append(Section(title="What is measured", blocks=(*meanings, *absent, *_variances(primary))))
    return sections


def _sentence(primary: Endpoint, study: ReaderStudy) -> str:
    if not primary.changes:
        return f"One arm only, {study.arms[0]}: nothing is compared."
    change = primary.changes[0]
    one = change.random
    if one.value is None or one.low is None or one.high is None:
        return f"{primary.label} in {change.arm} less {study.arms[0]}: not computed ({one.reason})."
    says = "a difference" if one.low > 0 or one.high < 0 else "no difference that these data can tell from none"
    return f"{primary.label} in '{change.arm}' less '{study.arms[0]}': {one.value:+.3f} ({one.low:+.3f} to {one.high:+.3f}), {says}."


def _arms(study: ReaderStudy) -> pd.DataFrame:
    rows = [(one.label, *(_mean(one.arms.get(arm), one) for arm in study.arms)) for one in study.endpoints if one.arms]
    return pd.DataFrame(rows, columns=["measure", *study.arms])


def _changes(study: ReaderStudy) -> pd.DataFrame:
    rows = [
        (
            one.label,
            change.arm,
            _difference(change.random, one),
            _p(change.random),
            _difference(change.fixed_readers, one),
            _difference(change.fixed_cases, one),
            f"{change.readers}, {change.design}",
        )
        for one in study.endpoints
        for change in one.changes
    ]
    columns = ["measure", "arm", "other readers, other cases", "p", "these readers, other cases", "other readers, these cases", "readers"]
    return pd.DataFrame(rows, columns=columns)


def _strata(primary: Endpoint) -> pd.DataFrame:
    rows = [
        (
            one.column,
            one.level,
            one.readers,
            *(_mean(mean, primary) for mean in one.arms.values()),
            *(_difference(change, primary) for change in one.changes.values()),
        )
        for one in primary.strata
    ]
    first = primary.strata[0]
    columns = [
        "kind",
        "level",
        "readers",
        *(f"{primary.label}, {arm}" for arm in first.arms),
        *(f"change in {arm}" for arm in first.changes),
    ]
    return pd.DataFrame(rows, columns=columns)


def _gaps(study: ReaderStudy) -> pd.DataFrame:
    rows = [
        (
            one.label,
            gap.column,
            f"{gap.first} − {gap.second}",
            f"change from {study.arms[0]} to {gap.arm}" if gap.benefit else gap.arm,
            _difference(gap.difference, one),
            _p(gap.difference),
        )
        for one in study.endpoints
        for gap in one.gaps
    ]
    return pd.DataFrame(rows, columns=["measure", "kind", "difference", "of", "value", "p"])


def _model(study: ReaderStudy) -> pd.DataFrame:
    rows = [
        (one.label, _mean(one.model, one), *(_difference(one.model_less_readers.get(arm), one) for arm in study.arms))
        for one in study.endpoints
        if one.model is not None
    ]
    return pd.DataFrame(rows, columns=["measure", "model alone", *(f"less readers, {arm}" for arm in study.arms)])


def _readers(primary: Endpoint, study: ReaderStudy) -> pd.DataFrame:
    values = {(cell.reader, cell.arm): cell.value for cell in primary.cells}
    kinds = {cell.reader: cell.strata for cell in primary.cells}
    columns = list(next(iter(kinds.values()), {}))
    rows = [
        (reader, *(kinds[reader][column] for column in columns), *(values.get((reader, arm)) for arm in study.arms)) for reader in kinds
    ]
    return pd.DataFrame(rows, columns=["reader", *columns, *(f"{primary.label}, {arm}" for arm in study.arms)])


def _variances(primary: Endpoint) -> list[Markup]:
    found = primary.components
    if found is None:
        return []
    rows = [
        ("error variance of one reader in one arm", found.error_variance),
        ("Cov1: same reader, other arm", found.cov1),
        ("Cov2: other reader, same arm", found.cov2),
        ("Cov3: other reader, other arm", found.cov3),
        ("mean square of arms", found.ms_arm),
        ("mean square of arms by readers", found.ms_arm_reader),
    ]
    tests = [
        (one.variant, f"{one.statistic:.4f}", f"{one.df1:g}", "χ²" if one.df2 is None else f"{one.df2:.2f}", f"{one.p:.3g}")
        for one in primary.omnibus
    ]
    return [
        heading(f"Variances of {primary.label}"),
        table(pd.DataFrame([(name, f"{value:.3e}") for name, value in rows], columns=["part", "value"])),
        table(pd.DataFrame(tests, columns=["all arms equal", "F or χ²", "df1", "df2", "p"])),
    ]


def _mean(one: Estimate | None, endpoint: Endpoint) -> str:
    if one is None or one.value is None:
        return f"not computed: {one.reason}" if one is not None and one.reason else "not computed"
    if endpoint.log10:
        shown = [f"{10**value:.1f} s" for value in (one.value, one.low, one.high) if value is not None]
    else:
        # an accuracy cannot leave 0 … 1, which an interval by t does not know
        ends = [None if value is None else min(1.0, max(0.0, value)) for value in (one.low, one.high)]
        shown = [f"{value:.3f}" for value in (one.value, *ends) if value is not None]
    return shown[0] if len(shown) < 3 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def _difference(one: Estimate | None, endpoint: Endpoint) -> str:
    if one is None or one.value is None:
        return f"not computed: {one.reason}" if one is not None and one.reason else "not computed"
    values = [value for value in (one.value, one.low, one.high) if value is not None]
    shown = [f"× {10**value:.2f}" if endpoint.log10 else f"{value:+.3f}" for value in values]
    return f"{shown[0]} (no interval: {one.reason})" if len(shown) < 3 else f"{shown[0]} ({shown[1]} to {shown[2]})"


def _p(one: Estimate) -> str:
    return "n/a" if one.p is None else f"{one.p:.2g}"


def _picture(primary: Endpoint, study: ReaderStudy) -> Markup:
    """Each reader's value in every arm as a line, means with their intervals, the model as a dashed line."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(6.8, 3.6), layout="constrained")
    axis = drawing.subplots()
    places = {arm: place for place, arm in enumerate(study.arms)}
    columns = list(primary.cells[0].strata) if primary.cells else []
    kinds = sorted({cell.strata[columns[0]] for cell in primary.cells}) if columns else [""]
    colours = dict(zip(kinds, (BLUE, ORANGE, "#0b8a8f", "#5b2a86", "#3a7d44", "#8c6d31"), strict=False))
    for reader in dict.fromkeys(cell.reader for cell in primary.cells):
        cells = [cell for cell in primary.cells if cell.reader == reader]
        kind = cells[0].strata[columns[0]] if columns else ""
        x, y = [places[cell.arm] for cell in cells], [cell.value for cell in cells]
        axis.plot(x, y, "-o", color=colours.get(kind, GREY), alpha=0.55, linewidth=1, markersize=3.5)
    for arm, mean in primary.arms.items():
        if mean.value is not None and mean.low is not None and mean.high is not None:
            axis.plot([places[arm] - 0.12] * 2, [max(0.0, mean.low), min(1.0, mean.high)], color="#1a2230", linewidth=2)
            axis.plot([places[arm] - 0.12], [mean.value], "s", color="#1a2230", markersize=6)
    for kind in kinds:
        if kind:
            axis.plot([], [], "-o", color=colours.get(kind, GREY), label=shortened(kind), markersize=3.5)
    axis.plot([], [], "-s", color="#1a2230", label="mean")
    if primary.model is not None and primary.model.value is not None:
        axis.axhline(primary.model.value, color=GREY, linestyle="--", linewidth=1.2, label="model alone")
    axis.set_xticks(range(len(study.arms)), [shortened(arm) for arm in study.arms], parse_math=False)
    axis.set_xlim(-0.4, len(study.arms) - 0.6)
    axis.set_ylabel(primary.label, fontsize=9)
    tidy(axis)
    axis.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure(
        drawing,
        caption=f"{primary.label} of every reader in every arm; squares are means with {study.level:.0%} intervals over readers and cases.",
        alt=f"{primary.label} of each reader by arm, with means and the model alone",
    )
