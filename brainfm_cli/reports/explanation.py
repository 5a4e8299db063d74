"""Part of an evaluation's report: what the predictions rest on, by modality, region and time."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from brainfm_cli.reports.drawing import BLUE, GREY, ORANGE, name_networks, network_order, shortened, tidy
from brainfm_cli.reports.page import Section, figure, heading, paragraph, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from markupsafe import Markup

    from brainfm_cli.learning.attributions import Explanation, Maps
    from brainfm_cli.learning.scores import Score
    from brainfm_cli.records import RegionTable

_SHOWN = 15
_SIMILAR = 0.5


def explanation_sections(
    found: Sequence[Explanation], maps: Mapping[tuple[str, str], Maps], regions: Mapping[str, RegionTable], *, outcome: str
) -> list[Section]:
    """Shares, checks and maps; ``maps`` by atlas and baseline, ``outcome`` is what a positive attribution speaks for."""
    if not found:
        return []
    lead = (
        "Integrated gradients of the score of test people, by the model of their own fold, through the frozen encoder and the head. "
        f"Positive attributions speak for {outcome}. They describe the model: they are no evidence that a region causes anything, and "
        "where the scores above are not better than chance they describe noise."
    )
    blocks: list[Markup] = [table(_shares(found)), *(paragraph(text) for one in found for text in (*one.warnings, *_doubts(one)))]
    for one in found:
        shown = maps[one.atlas, one.baseline]
        blocks += [heading(f"{one.atlas}, baseline {one.baseline}"), _top(shown, regions[one.atlas], outcome)]
        blocks += [_map(name, values, regions[one.atlas]) for name, values in shown.times.items()]
    return [Section(title="What the predictions rest on", lead=lead, blocks=tuple(blocks))]


def _shares(found: Sequence[Explanation]) -> pd.DataFrame:
    rows = [
        (
            one.atlas,
            one.baseline,
            part.modality,
            _cell(part.share),
            _cell(part.share_per_element),
            _number(part.fold_agreement),
            _number(part.random_agreement),
            one.people,
            f"{one.largest_gap:.1%}",
            one.steps,
        )
        for one in found
        for part in one.modalities
    ]
    columns = [
        "atlas",
        "baseline",
        "modality",
        "share",
        "share per input",
        "agreement of folds",
        "agreement with random weights",
        "people",
        "largest gap",
        "steps",
    ]
    return pd.DataFrame(rows, columns=columns)


def _doubts(one: Explanation) -> list[str]:
    """What the check with random weights says."""
    return [
        f"The map of regions by {part.modality} ({one.atlas}, {one.baseline}) looks alike with random encoder weights "
        f"(rank correlation {part.random_agreement:.2f}): it shows the input and the head rather than what pretraining has learnt."
        for part in one.modalities
        if part.random_agreement is not None and part.random_agreement > _SIMILAR
    ]


def _cell(score: Score) -> str:
    if score.value is None:
        return f"not computed: {score.reason}"
    return f"{score.value:.2f} [{score.low:.2f},\N{NO-BREAK SPACE}{score.high:.2f}]"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.2f}"


def _top(maps: Maps, regions: RegionTable, outcome: str) -> Markup:
    """The regions with most attribution, one column per modality."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(5 * max(1, len(maps.regions)), 3.6), layout="constrained")
    axes = np.atleast_1d(drawing.subplots(1, max(1, len(maps.regions))))
    for axis, (name, values) in zip(axes, maps.regions.items(), strict=False):
        chosen = np.argsort(values, kind="stable")[-_SHOWN:]
        signs = maps.signed[name][chosen]
        axis.barh(range(len(chosen)), 100 * values[chosen], color=[BLUE if sign >= 0 else ORANGE for sign in signs])
        axis.set_yticks(range(len(chosen)))
        axis.set_yticklabels([shortened(regions.names[row]) for row in chosen], fontsize=7, parse_math=False)
        axis.set_title(f"{name}: % of all absolute attributions", fontsize=9)
        tidy(axis)
    caption = f"Regions with most attribution. Blue: on the whole for {outcome}; orange: against."
    return figure(drawing, caption=caption, alt="Regions with most attribution by modality")


def _map(name: str, values: np.ndarray, regions: RegionTable) -> Markup:
    """(time bins, regions) as a picture of regions against time."""
    from matplotlib.figure import Figure

    networks = network_order(regions)
    drawing = Figure(figsize=(6.5, 3.8), layout="constrained")
    axis = drawing.subplots()
    shown = 100 * values[:, networks.order].T
    image = axis.imshow(
        shown, aspect="auto", interpolation="nearest", cmap="Blues", vmin=0, vmax=max(float(np.percentile(shown, 99)), 1e-9)
    )
    for start in networks.starts[1:-1]:
        axis.axhline(start - 0.5, color=GREY, linewidth=0.5)
    name_networks(axis, networks)
    axis.set_xlabel("part of the run, in order of time", fontsize=8)
    axis.set_xticks([])
    drawing.colorbar(image, ax=axis, shrink=0.8).ax.tick_params(labelsize=8)
    caption = f"{name}: % of all absolute attributions by region and time, mean over people. Even over time where no moment matters."
    return figure(drawing, caption=caption, alt=f"Attribution of {name} by region and time")
