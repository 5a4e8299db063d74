"""Report of an alignment with texts: what was read from each text, and how well disorders left out were told."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from brainfm_cli.reports.page import Page, Section, figure, paragraph, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from markupsafe import Markup

_CITATIONS = (
    "Wei et al., A Brain Graph Foundation Model, ICLR 2026",
    "Zhai et al., Sigmoid Loss for Language Image Pre-Training, ICCV 2023",
)


def alignment_page(
    atlases: Mapping[str, tuple[Mapping[int, float], int, Sequence[float]]],
    *,
    statements: Sequence[tuple[str, str, Sequence[str]]],
    title: str,
    subtitle: str,
    facts: Mapping[str, str],
) -> Page:
    """The page of one alignment.

    Parameters
    ----------
    atlases
        By label: AUROC of left-out disorders by number of steps, the number chosen, and the loss of the final fit.
    statements
        Name, text, and what was read from it, of each disorder.
    """
    silent = [name for name, _, said in statements if not said]
    frame = pd.DataFrame(
        [(name, text, "; ".join(said) or "nothing") for name, text, said in statements], columns=["disorder", "text", "read"]
    )
    texts = Section(
        title="What the texts state",
        lead="Couplings between networks, as they were read from each text. Mend the text, or state 'facts' in the table, where this is wrong.",
        blocks=(table(frame),),
    )
    left = pd.DataFrame(
        [(label, steps, area, "chosen" if steps == chosen else "") for label, (areas, chosen, _) in atlases.items() for steps, area in areas.items()],
        columns=["atlas", "steps", "AUROC of disorders left out", ""],
    )  # fmt: skip
    inner = "These figures chose the length of training. They are no test scores: 'brainfm predict … group' gives those, beside controls and floors."
    fits = Section(
        title="Training",
        lead="Each disorder was left out once, together with a share of the people, and scored by its text alone.",
        blocks=(*((table(left),) if len(left) else (paragraph("Too few disorders to leave any out: nothing was trained beyond the reading of texts."),)), *_curves(atlases)),
    )  # fmt: skip
    notes = (f"Nothing could be read from the texts of {', '.join(silent)}: their scores are the same for everybody.",) if silent else ()
    return Page(
        title=title, subtitle=subtitle, facts=dict(facts), notes=(inner, *notes), sections=(texts, fits), methods=_METHODS, citations=_CITATIONS
    )  # fmt: skip


_METHODS = (
    "Region series were summed up as covariances between functional networks; their logarithms were standardised with the people without a disorder. "
    "A text's statements were attended to networks by the similarity of their names; people were scored along the direction that a text states, "
    "with and without decorrelation, and by the backbone's region vectors, trained with the pairwise sigmoid contrast."
)


def _curves(atlases: Mapping[str, tuple[Mapping[int, float], int, Sequence[float]]]) -> tuple[Markup, ...]:
    from matplotlib.figure import Figure

    curves = {label: losses for label, (_, _, losses) in atlases.items() if len(losses)}
    if not curves:
        return ()
    drawing = Figure(figsize=(7, 2.6), layout="constrained")
    axis = drawing.subplots()
    for label, losses in curves.items():
        axis.plot(range(1, len(losses) + 1), losses, label=label, linewidth=1.2)
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.legend(fontsize=7, frameon=False)
    return (figure(drawing, caption="Contrast between people and texts, final fit.", alt="Training loss by step, one line per atlas."),)
