"""Report of a training run: losses, learning rate and alarms over steps."""

from __future__ import annotations

from typing import TYPE_CHECKING

from brainfm_cli.learning.log import PROBE
from brainfm_cli.reports.page import Page, Section, figure, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from markupsafe import Markup

    from brainfm_cli.learning.log import TrainingLog

_MONITOR = "monitor_"


def training_page(
    log: TrainingLog,
    *,
    title: str,
    subtitle: str,
    facts: Mapping[str, str],
    notes: Sequence[str] = (),
    people: pd.DataFrame | None = None,
    sections: Sequence[Section] = (),
    methods: str = "",
    citations: Sequence[str] = (),
) -> Page:
    """The page of one pretraining: every loss term by itself, then what warns of collapse.

    ``people`` is a small table of who trained and who chose the epoch; ``sections`` stand before the curves.
    """
    terms = [name for name in log.terms() if not name.startswith(_MONITOR)]
    probes = [name for name in log.terms() if name.startswith(PROBE)]
    monitors = [name for name in log.terms() if name.startswith(_MONITOR) and name not in probes]
    shown = [
        *sections,
        Section(
            title="Losses",
            lead="Training (line) and held-out people (dots), in optimiser steps. The epoch with the lowest held-out loss is kept.",
            blocks=(_curves(log, ["loss", *terms], "losses"),),
        ),
        Section(
            title="Learning rate and gradient",
            lead="Linear warm-up, then cosine decay; the norm of the whole gradient before clipping.",
            blocks=(_curves(log, ["learning_rate", "gradient_norm"], "learning rate and gradient norm"),),
        ),
    ]
    if monitors:
        shown.append(
            Section(
                title="Alarms",
                lead="Not trained on. An embedding spread near 0, or one distinct decoded row, would mean that the model has collapsed.",
                blocks=(_curves(log, monitors, "monitors"),),
            )
        )
    if probes:
        shown.append(
            Section(
                title="Probes",
                lead="What a linear model reads from the untuned embedding after each epoch: AUROC of classes (chance 0.5), correlation of "
                "numbers (chance 0). A site that is told ever better is what the model should not learn.",
                blocks=(_curves(log, probes, "probes"),),
            )
        )
    if people is not None:
        shown.append(Section(title="People", blocks=(table(people),)))
    return Page(
        title=title,
        subtitle=subtitle,
        facts=dict(facts),
        notes=tuple(notes),
        sections=tuple(shown),
        methods=methods,
        citations=tuple(citations),
    )


def _curves(log: TrainingLog, names: Sequence[str], what: str) -> Markup:
    from matplotlib.figure import Figure

    shown = [name for name in names if log.curve("train", name)[0] or log.curve("validation", name)[0]]
    rows = -(-len(shown) // 3)
    drawing = Figure(figsize=(11, 2.6 * rows), layout="constrained")
    axes = drawing.subplots(rows, 3, squeeze=False).ravel()
    for axis, name in zip(axes, shown, strict=False):
        steps, values = log.curve("train", name)
        axis.plot(steps, values, color="#1f5fa8", linewidth=1.2)
        held, scores = log.curve("validation", name)
        axis.plot(held, scores, "o-", color="#c2571a", markersize=3, linewidth=0.8)
        axis.set_title(name.removeprefix(_MONITOR).replace("_", " "), fontsize=9)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    return figure(drawing, caption=f"Curves of {what}: training in blue, held-out people in orange.", alt=f"Curves of {what}")
