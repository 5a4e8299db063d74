"""Report of written reports: the model beside its floors, closed questions, languages, and examples of all kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from brainfm_cli.reports.captions import cell, difference_table, score_bars, score_table
from brainfm_cli.reports.page import Page, Section, paragraph, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def study_reports_page(
    metrics: Mapping[str, Any],
    examples: pd.DataFrame,
    *,
    title: str,
    subtitle: str,
    notes: Sequence[str],
    methods: str,
    citations: Sequence[str],
) -> Page:
    """The page of one scoring; ``metrics`` is what metrics.json holds, ``examples`` reports of people from best to worst."""
    names = list(metrics["metrics"])
    rows = [row for row in metrics["rows"] if row["participant"] == "mean"]
    sections = [
        Section(
            title="Scores",
            lead=f"{metrics['people']} people who took no part in the alignment; 95 % intervals over people. Measured facts stand in the model's question: the floor that has "
            "nothing but them says what the images add.",
            blocks=(score_bars(rows, names[0], over="people"), table(score_table(rows, names))),
        ),
        Section(
            title="Model less floor",
            lead="Paired over the same people. An interval that holds 0 is no difference.",
            blocks=(table(difference_table(rows, names)),),
        ),
        Section(
            title="Closed questions",
            lead="Share answered right of those whose report tells the answer; withheld answers count as wrong. The floors: the commonest answer of training reports, "
            "and the same model without the images.",
            blocks=(table(_closed(metrics["closed"])),),
        ),
    ]
    if len(metrics["languages"]) > 1:
        by_language = [
            row | {"name": f"{row['name']}, {row['people']} reports in {name}"}
            for name, found in metrics["languages"].items()
            for row in found
        ]
        sections.append(Section(title="By language of the report", blocks=(table(score_table(by_language, names)),)))
    sections += [
        Section(title="Examples", lead="Best, middle and worst by the first score, not a selection.", blocks=(table(examples),)),
        Section(title="What the scores are", blocks=tuple(paragraph(f"{name}: {meaning}") for name, meaning in metrics["metrics"].items())),
    ]
    return Page(
        title=title,
        subtitle=subtitle,
        facts={"People": str(metrics["people"]), "Language model": str(metrics["language_model"]), "Resamples": str(metrics["bootstraps"])},
        notes=tuple(notes),
        sections=tuple(sections),
        methods=methods,
        citations=tuple(citations),
    )


def _closed(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(
        [[row["question"], row["name"], cell(row["score"]), row["people"], row["withheld"]] for row in rows],
        columns=["question", "by", "right", "people", "withheld"],
    )
