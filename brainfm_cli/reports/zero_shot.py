"""Report of people scored by texts: every disorder beside control texts and floors, in one table and one picture."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from brainfm_cli.reports.page import Page, Section, figure, paragraph, table

if TYPE_CHECKING:
    from markupsafe import Markup

    from brainfm_cli.learning.scores import Score
    from brainfm_cli.learning.zero_shot import TestedDisorder, ZeroShot


def zero_shot_page(summary: ZeroShot) -> Page:
    """The page of one zero-shot evaluation."""
    tested = summary.disorders
    silent = [one.name for one in tested if one.auroc.value is not None and one.auroc.low == one.auroc.high == 0.5]
    seen = [one.name for one in tested if one.seen]
    notes = [
        "A text has told something where its AUROC is above the control texts; the floors learnt from labels of other disorders what ill people share."
    ]
    if seen:
        notes.append(f"The model was aligned with other people who have {', '.join(seen)}: these are no zero-shot scores.")
    if silent:
        notes.append(f"Nothing could be read from the texts of {', '.join(silent)}.")
    sections = [
        Section(
            title="Disorders",
            lead="AUROC of the disorder against none, people that the model has not seen. Bars: 95 % intervals; grey: range of control texts.",
            blocks=(_picture(tested), table(_table(tested))),
        ),
        Section(title="Floors on the same people", blocks=(table(_floors(tested)),)),
        Section(
            title="Texts",
            blocks=(table(pd.DataFrame([(one.name, one.text) for one in tested], columns=["disorder", "text"])),),
        ),
    ]
    if summary.retrieval is not None:
        found = summary.retrieval
        line = (
            f"Of {found.people} people with one of {found.texts} disorders, {found.first:.0%} have their own text first (chance {found.chance_first:.0%}); "
            f"mean reciprocal rank {found.reciprocal_rank:.3f} (chance {found.chance_reciprocal_rank:.3f})."
        )
        sections.append(Section(title="Retrieval", blocks=(paragraph(line),)))
    return Page(
        title="Disorders by their texts",
        subtitle=f"brainfm predict, model {summary.model}",
        facts={"Disorders": str(len(tested)), "Column": summary.column},
        notes=tuple(notes),
        sections=tuple(sections),
        methods=_METHODS,
        citations=("Wei et al., A Brain Graph Foundation Model, ICLR 2026",),
    )


_METHODS = (
    "People were scored by what the text of a disorder states of couplings between brain networks; nobody with that disorder was labelled for the model. "
    "Control texts make as many statements about random couplings, as many stronger as weaker. Random vectors stand for the text encoder's. "
    "Floors were fitted on the people the model was aligned with, to tell any of their disorders from none."
)


def _table(tested: tuple[TestedDisorder, ...]) -> pd.DataFrame:
    rows = [
        (
            one.name,
            f"{one.cases} of {one.people}",
            _cell(one.auroc),
            f"{one.shuffled.mean:.3f} ({one.shuffled.mean_low:.3f} to {one.shuffled.mean_high:.3f})",
            f"{one.shuffled.low:.3f} to {one.shuffled.high:.3f}",
            f"{one.shuffled.share_above:.3f}",
            "0.500" if one.neutral_spread == 0 else f"scores differ by {one.neutral_spread:g}",
        )
        for one in tested
    ]
    columns = [
        "disorder",
        "cases",
        "own text",
        f"mean of {tested[0].shuffled.count} control texts",
        "their range",
        "share as good",
        "neutral text",
    ]
    return pd.DataFrame(rows, columns=columns)


def _floors(tested: tuple[TestedDisorder, ...]) -> pd.DataFrame:
    names = list(dict.fromkeys(name for one in tested for name in one.others))
    return pd.DataFrame(
        [(name, *(_cell(one.others[name]) if name in one.others else "" for one in tested)) for name in names],
        columns=["rule", *(one.name for one in tested)],
    )


def _cell(score: Score) -> str:
    if score.value is None:
        return "undefined"
    return f"{score.value:.3f}" + ("" if score.low is None or score.high is None else f" ({score.low:.3f} to {score.high:.3f})")


def _picture(tested: tuple[TestedDisorder, ...]) -> Markup:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7, 0.8 + 0.45 * len(tested)), layout="constrained")
    axis = drawing.subplots()
    for height, one in enumerate(reversed(tested)):
        axis.plot([one.shuffled.low, one.shuffled.high], [height, height], color="#c9d0da", linewidth=9, solid_capstyle="butt")
        if one.auroc.value is not None:
            if one.auroc.low is not None and one.auroc.high is not None:
                axis.plot([one.auroc.low, one.auroc.high], [height, height], color="#1f5fa8", linewidth=1.6)
            axis.plot(one.auroc.value, height, "o", color="#1f5fa8")
    axis.axvline(0.5, color="#888888", linewidth=0.8)
    axis.set_yticks(range(len(tested)), [one.name for one in reversed(tested)])
    axis.set_xlabel("AUROC")
    axis.set_xlim(0.2, 1.0)
    return figure(
        drawing, caption="Own text (blue) and control texts (grey).", alt="AUROC of each disorder by its text beside control texts."
    )
