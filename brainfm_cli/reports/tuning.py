"""Report of prompt tuning: what inner validation found, and what the head reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from brainfm_cli.reports.page import Page, Section, figure, paragraph, table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from markupsafe import Markup

_TUNED = "embedding"


@dataclass(frozen=True, kw_only=True)
class AtlasTuning:
    """What the report says of one atlas."""

    atlas: str
    """Label."""
    epochs: int
    """Epochs of prompt tuning that were chosen."""
    score: float
    """Held-out correlation of the final average with the target, inner folds."""
    scores: Mapping[str, float]
    """The same of the best penalty of every set of blocks."""
    shares: Mapping[str, float]
    """Share of each block in the average."""
    losses: Sequence[Sequence[float]]
    """Training loss per epoch: one row per inner fold, then the final fit."""


def tuning_page(atlases: Sequence[AtlasTuning], *, title: str, subtitle: str, facts: Mapping[str, str], notes: Sequence[str] = ()) -> Page:
    """The page of one tuning."""
    sections = [
        Section(
            title=one.atlas,
            lead="Inner validation people chose how long the prompts were tuned, the ridge penalty, and how much each block of features counts.",
            blocks=(_picture(one), table(_summary(one)), *_prompt_note(one)),
        )
        for one in atlases
    ]
    inner = "The figures below chose settings on inner folds of the people tuned on. They are no test scores: 'brainfm predict … group' gives those, beside the floors."
    return Page(title=title, subtitle=subtitle, facts=dict(facts), notes=(inner, *notes), sections=tuple(sections))


def _summary(one: AtlasTuning) -> pd.DataFrame:
    best = sorted(one.scores.items(), key=lambda item: -item[1])[:8]
    return pd.DataFrame(
        [(name.replace("+", " + "), value) for name, value in best], columns=["blocks read together", "held-out correlation"]
    )


def _prompt_note(one: AtlasTuning) -> tuple[Markup, ...]:
    share = one.shares.get(_TUNED, 0.0)
    if not one.epochs:
        return (paragraph("Not tuning the prompt at all did best on inner validation people, so the pretrained prompt is kept."),)
    return (paragraph(f"The prompt was tuned for {one.epochs} epochs; the prompted embedding makes {share:.0%} of the score."),)


def _picture(one: AtlasTuning) -> Markup:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10, 2.8), layout="constrained")
    left, right = drawing.subplots(1, 2)
    names = sorted(one.shares, key=lambda name: one.shares[name])
    left.barh(names, [one.shares[name] for name in names], color="#1f5fa8")
    left.set_xlim(0, 1)
    left.set_title("share of the score", fontsize=9)
    for row, losses in enumerate(one.losses):
        last = row == len(one.losses) - 1
        right.plot(range(1, len(losses) + 1), losses, color="#c2571a" if last else "#9aa7b8", linewidth=1.6 if last else 0.9)
    right.set_title("training loss of the prompt (orange: final fit, grey: inner folds)", fontsize=9)
    right.set_xlabel("epoch", fontsize=8)
    for axis in (left, right):
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    return figure(drawing, caption=f"{one.atlas}: what the head reads, and how the prompt was tuned.", alt=f"Tuning in {one.atlas}")
