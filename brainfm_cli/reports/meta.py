"""Report of meta-learning: query losses before and after adaptation, and the tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from brainfm_cli.reports.page import Page, Section, figure, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from markupsafe import Markup

_CITATIONS = (
    "Finn et al., Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017",
    "Wei et al., A Brain Graph Foundation Model, ICLR 2026",
)
_METHODS = (
    "A start for prompts and a linear head was meta-learned on a frozen backbone. A task was one disorder of one dataset in one atlas against that "
    "dataset's people without a disorder; support and query people were drawn anew in every epoch and never shared."
)


def meta_page(
    before: Sequence[float],
    after: Sequence[float],
    tasks: Sequence[Mapping[str, Any]],
    *,
    title: str,
    subtitle: str,
    facts: Mapping[str, str],
) -> Page:
    """The page of one meta-learning; ``before`` and ``after`` are mean query losses by epoch."""
    note = "Losses of people of the tasks themselves. They are no test scores: tune a target that was left out, and evaluate it with 'brainfm predict … group'."
    sections = (
        Section(
            title="Query losses",
            lead="Cross-entropy of query people before and after adapting to the support; 0.693 is chance. The gap is what a few people add.",
            blocks=(_picture(before, after),),
        ),
        Section(title="Tasks", lead="One disorder of one dataset in one atlas each.", blocks=(table(pd.DataFrame(list(tasks))),)),
    )
    return Page(title=title, subtitle=subtitle, facts=dict(facts), notes=(note,), sections=sections, methods=_METHODS, citations=_CITATIONS)


def _picture(before: Sequence[float], after: Sequence[float]) -> Markup:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7, 2.6), layout="constrained")
    axis = drawing.subplots()
    epochs = range(1, len(after) + 1)
    axis.plot(epochs, before, color="#9aa7b8", linewidth=1.2, label="before adapting")
    axis.plot(epochs, after, color="#c2571a", linewidth=1.6, label="after adapting")
    axis.axhline(0.6931, color="#444444", linewidth=0.8, linestyle=":")
    axis.set_xlabel("epoch")
    axis.set_ylabel("query loss")
    axis.legend(fontsize=7, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure(drawing, caption="Mean query loss over all tasks; dotted: chance.", alt="Query loss by epoch, before and after adapting")
