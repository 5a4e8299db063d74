"""The report of an encoder of scans on several tasks: every score beside its floors on the same folds, and learning curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd

from brainfm_cli.reports.drawing import tidy
from brainfm_cli.reports.page import Page, Section, figure, paragraph, table
from brainfm_cli.reports.scan_tuning import with_intervals

if TYPE_CHECKING:
    from collections.abc import Mapping

    from markupsafe import Markup

_MINUS = "−"


def scan_evaluation_page(
    tables: Mapping[str, pd.DataFrame], curves: Mapping[str, pd.DataFrame], *, title: str, design: str, notes: tuple[str, ...]
) -> Page:
    """One section per task; ``tables`` have score, method, value, low, high, reason, people, seed, ``curves`` also share and draws."""
    sections = [Section(title="Overview", lead="The first score of every task.", blocks=(table(_overview(tables)),))]
    for name, scores in tables.items():
        blocks = [table(with_intervals(scores))] if len(scores) else [paragraph("Nobody tested: nothing is claimed.")]
        if name in curves:
            blocks += [table(with_intervals(curves[name], "share", "draws")), _picture(curves[name])]
        sections.append(
            Section(
                title=name,
                lead=f"Test people of all folds ({design}); 95 % intervals are bootstrapped over people. The model must be above every floor.",
                blocks=tuple(blocks),
            )
        )
    return Page(title=f"Tasks of {title}", subtitle="brainfm predict, mri-language, tuned anew in every fold; not for clinical use", facts={"Tasks": str(len(tables)), "Design": design}, notes=notes, sections=tuple(sections))  # fmt: skip


def _overview(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    rows = []
    for name, scores in tables.items():
        if not len(scores):
            continue
        first = scores[scores["score"] == scores["score"].iloc[0]]
        shown = with_intervals(first[~first["method"].str.contains(_MINUS)])
        shown.insert(0, "task", name)
        rows += shown.to_dict("records")
    return pd.DataFrame(rows)


def _picture(curve: pd.DataFrame) -> Markup:
    drawing, axis = plt.subplots(figsize=(5.5, 3.2))
    for name, rows in curve[~curve["method"].str.contains(_MINUS)].groupby("method", sort=False):
        known = rows.dropna(subset=["low"])
        axis.errorbar(
            100 * known["share"], known["value"], yerr=[known["value"] - known["low"], known["high"] - known["value"]], marker="o", label=str(name), capsize=2
        )  # fmt: skip
    axis.set_xlabel("training people (%)")
    axis.set_ylabel(str(curve["score"].iloc[0]))
    axis.legend(fontsize=7, frameon=False)
    tidy(axis)
    return figure(drawing, caption="Score by share of labelled training people.", alt="learning curves with intervals")
