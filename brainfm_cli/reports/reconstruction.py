"""Sections of a report on how hidden pixels were reconstructed: figures of slices and scores beside their floors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from brainfm_cli.reports.page import Section, figure, paragraph, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from markupsafe import Markup

    from brainfm_cli.records import ReconstructedSlice


def reconstruction_sections(scores: pd.DataFrame, examples: Sequence[ReconstructedSlice]) -> tuple[Section, ...]:
    """A table of scores and a figure of slices; a sentence where nobody was held out."""
    if scores.empty:
        return (Section(title="Reconstruction", blocks=(paragraph("Nobody was held out: reconstruction was not scored."),)),)
    shown = scores.assign(**{"95 % interval": [_ends(low, high) for low, high in zip(scores["low"], scores["high"], strict=True)]})
    kept = shown[["score", "method", "mean", "95 % interval", "patients", "seed"]]
    return (
        Section(
            title="Reconstruction of held-out people",
            lead="Hidden cells of slices as scanned. The epoch was chosen on the same people, so the scores are slightly optimistic. "
            "The model must be above both floors on hidden brain; whole-image scores are inflated by the visible pixels (data range 1).",
            blocks=(table(kept),),
        ),
        Section(
            title="Examples",
            lead="What was scanned, what the encoder saw, and the fillings; visible pixels are pasted. Left is at the left.",
            blocks=(_figure(examples),),
        ),
    )


def _ends(low: float, high: float) -> str:
    return "not computed (one patient)" if low != low else f"{low:.3f} to {high:.3f}"  # noqa: PLR0124  (NaN is the only value unequal to itself)


def _figure(examples: Sequence[ReconstructedSlice]) -> Markup:
    from matplotlib.figure import Figure

    names = list(examples[0].images)
    drawing = Figure(figsize=(1.7 * len(names), 1.75 * len(examples)), layout="constrained")
    axes = drawing.subplots(len(examples), len(names), squeeze=False)
    for number, (row, example) in enumerate(zip(axes, examples, strict=True)):
        for axis, (name, image) in zip(row, example.images.items(), strict=True):
            shown = image if image.ndim == 2 else image[:, :, image.shape[2] // 2]
            axis.imshow(shown.T, origin="lower", cmap="gray", vmin=0, vmax=1)
            axis.set_xticks([])
            axis.set_yticks([])
            if number == 0:
                axis.set_title(name, fontsize=8)
        row[0].set_ylabel(example.sequence, fontsize=8, parse_math=False)
    return figure(drawing, caption="Slices of held-out people.", alt="Original, visible and reconstructed slices", colours=128)
