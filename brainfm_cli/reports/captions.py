"""Report of captions of what was seen: the model beside its floors and ceilings, pictures told apart, and examples of all kinds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pandas as pd

from brainfm_cli.reports.drawing import BLUE, GREY, ORANGE, tidy
from brainfm_cli.reports.page import Page, Section, figure, paragraph, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from markupsafe import Markup

_COLOURS = {"model": BLUE, "floor": GREY, "ceiling": ORANGE}
_AVERAGE = {"repeats": "repeats averaged", "none": "single trials"}


def captions_page(
    metrics: Mapping[str, Any],
    examples: pd.DataFrame,
    *,
    title: str,
    subtitle: str,
    notes: Sequence[str],
    methods: str,
    citations: Sequence[str],
) -> Page:
    """The page of one scoring.

    ``metrics`` is what metrics.json holds: ``rows`` (name, role, average, participant, scores), ``retrieval`` and ``metrics`` (name → meaning).
    ``examples`` has the columns participant, stimulus, said by people, said by the model, and one per floor.
    """
    first, *others = metrics["metrics"]
    rows = [row for row in metrics["rows"] if row["participant"] == "mean"]
    sections = [
        Section(
            title="Scores",
            lead=f"Mean over participants, {metrics['pictures']} test pictures; 95 % intervals over pictures. What is not above the floors says nothing of the brain.",
            blocks=(score_bars(rows, first), table(score_table(rows, [first, *others]))),
        ),
        Section(
            title="Model less floor",
            lead="Paired over the same pictures. An interval that holds 0 is no difference.",
            blocks=(table(difference_table(rows, [first, *others])),),
        ),
        Section(
            title="Each participant",
            blocks=(
                table(
                    score_table(
                        [row for row in metrics["rows"] if row["participant"] != "mean" and row["role"] != "ceiling"],
                        [first, *others],
                        people=True,
                    )
                ),
            ),
        ),
    ]
    if metrics["retrieval"]:
        sections.append(
            Section(
                title="Pictures told apart",
                lead="A brain's vector (or what was said of it) is compared with the mean sentence vector of every test picture.",
                blocks=(table(_retrieval(metrics["retrieval"])),),
            )
        )
    sections += [
        Section(title="Examples", lead="Best, middle and worst by the first score, not a selection.", blocks=(table(examples),)),
        Section(title="What the scores are", blocks=tuple(paragraph(f"{name}: {meaning}") for name, meaning in metrics["metrics"].items())),
    ]
    return Page(
        title=title,
        subtitle=subtitle,
        facts={
            "Participants": str(len(metrics["participants"])),
            "Test pictures": str(metrics["pictures"]),
            "Split by": str(metrics["split_unit"]),
            "Captions": str(metrics["captions_of_training"]),
            "Resamples": str(metrics["bootstraps"]),
        },
        notes=tuple(notes),
        sections=tuple(sections),
        methods=methods,
        citations=tuple(citations),
    )


def cell(score: Mapping[str, Any] | None, digits: int = 3) -> str:
    """A score with its interval; why there is none otherwise."""
    if score is None or score.get("value") is None:
        return "not computed"
    text = f"{score['value']:.{digits}f}"
    return text if score.get("low") is None else f"{text} ({score['low']:.{digits}f} to {score['high']:.{digits}f})"


def _name(row: Mapping[str, Any]) -> str:
    return f"{row['name']}, {_AVERAGE[row['average']]}" if row["role"] == "model" and row["average"] else str(row["name"])


def score_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str], *, people: bool = False) -> pd.DataFrame:
    """Scores of every predictor with their intervals, with ``people`` by participant."""
    found = []
    for row in rows:
        head = ([row["participant"]] if people else []) + [_name(row), row["role"]]
        found.append([*head, *(cell(row["scores"].get(name)) for name in names)])
    return pd.DataFrame(found, columns=[*(["participant"] if people else []), "predictor", "role", *names])


def difference_table(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> pd.DataFrame:
    """The model's lead over every floor with its interval."""
    found = [[row["name"], *(cell(row["difference"].get(name)) for name in names)] for row in rows if row.get("difference")]
    return pd.DataFrame(found, columns=["floor", *names])


def _retrieval(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    found = [
        [
            row["participant"],
            row["name"],
            row["role"],
            row["candidates"],
            cell(row["first"]),
            f"{row['mean_rank']:.2f}",
            f"{row['percentile']:.3f}",
        ]
        for row in rows
    ]
    return pd.DataFrame(
        found, columns=["participant", "by", "role", "pictures", "own picture first", "mean rank", "share of others behind"]
    )


def score_bars(rows: Sequence[Mapping[str, Any]], metric: str, *, over: str = "pictures") -> Markup:
    """One score of every predictor as bars, with intervals ``over`` what was resampled."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["scores"].get(metric, {}).get("value") is not None]
    drawing = Figure(figsize=(7.2, 0.7 + 0.36 * len(shown)), layout="constrained")
    axis = drawing.subplots()
    for height, row in enumerate(reversed(shown)):
        score = row["scores"][metric]
        axis.barh(height, score["value"], color=_COLOURS[row["role"]], height=0.62)
        if score.get("low") is not None:
            axis.plot([score["low"], score["high"]], [height, height], color="#1a2230", linewidth=1.4)
    axis.set_yticks(range(len(shown)), [_name(row) for row in reversed(shown)], fontsize=8)
    axis.set_xlabel(metric, fontsize=9)
    axis.set_xlim(left=0)
    tidy(axis)
    return figure(
        drawing,
        caption=f"{metric}: the model in blue, floors in grey, ceilings in orange; lines are 95 % intervals over {over}.",
        alt=f"{metric} of the model beside its floors and ceilings",
    )
