"""Quality of preprocessed runs: one table row per run, and the page that shows them with the outliers marked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from brainfm_cli.reports.drawing import BLUE, ORANGE, tidy
from brainfm_cli.reports.page import Page, Section, figure, paragraph, table
from brainfm_cli.signals.quality import outliers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from markupsafe import Markup

FD_THRESHOLD_MM = 0.5
"""Frames with more displacement count as moving, as in fMRIPrep."""
MIN_STEADY_MINUTES = 4.0
"""Runs with less time at rest are flagged, as XCP-D leaves them out."""

QC_COLUMNS: dict[str, str] = {
    "participant_id": "Participant.",
    "session": "Session label, n/a where there is none.",
    "run": "BIDS entities of the run after sub and ses.",
    "frames": "Frames of the run.",
    "non_steady_frames": "Frames before the steady state.",
    "mean_fd": "Mean framewise displacement in millimetres.",
    "max_fd": "Largest framewise displacement in millimetres.",
    "moving_fraction": f"Share of frames with a framewise displacement above {FD_THRESHOLD_MM} mm.",
    "still_minutes": "Minutes of frames that do not move.",
    "mean_std_dvars": "Mean standardised DVARS.",
    "tsnr": "Median over the brain of mean / SD over time, of the preprocessed series.",
    "brain_ml": "Volume of the brain mask in millilitres.",
    "template_correlation": "Correlation of the structural image with the template inside the brain.",
    "template_dice": "Overlap (Dice) of the brain mask with the template's.",
    "sequence_alignment": "Least ratio, over the other sequences, of mutual information with the reference to the largest when displaced.",
    "flagged_for": f"Less than {MIN_STEADY_MINUTES:g} still minutes, and columns more than 3.5 robust z-scores on the bad side.",
}
"""Columns of the group's quality table, with their descriptions."""
MEASURES = ("tsnr", "brain_ml", "template_correlation", "template_dice", "sequence_alignment")
"""Columns that come from images, not from the confounds table."""
_SIDES = {
    "mean_fd": 1, "moving_fraction": 1, "mean_std_dvars": 1, "tsnr": -1, "brain_ml": 0, "template_correlation": -1, "template_dice": -1,
    "sequence_alignment": -1,
}  # fmt: skip
_DPI, _COLOURS = 90, 192
_MOST_ROWS = 300


def assess_confounds(confounds: pd.DataFrame, repetition_time_s: float | None) -> dict[str, float]:
    """The motion columns of one run, from fMRIPrep's confounds table; NaN where the table lacks what is needed."""
    frames = len(confounds)
    fd = _column(confounds, "framewise_displacement")
    moving = fd > FD_THRESHOLD_MM
    known = bool(np.isfinite(fd).any())
    still_minutes = (frames - moving.sum()) * repetition_time_s / 60 if known and repetition_time_s else np.nan
    return {
        "frames": frames,
        "non_steady_frames": sum(name.startswith("non_steady_state_outlier") for name in confounds.columns),
        "mean_fd": _mean(fd),
        "max_fd": float(np.nanmax(fd)) if known else np.nan,
        "moving_fraction": float(moving.mean()) if known else np.nan,
        "still_minutes": float(still_minutes),
        "mean_std_dvars": _mean(_column(confounds, "std_dvars")),
    }


def build_table(rows: Sequence[Mapping[str, object]]) -> pd.DataFrame:
    """The quality table, :data:`QC_COLUMNS`, from one mapping per run; what a run lacks is missing."""
    frame = pd.DataFrame(rows, columns=[name for name in QC_COLUMNS if name != "flagged_for"])
    columns = {name: frame[name].to_numpy(float) for name in _SIDES}
    flags = outliers(columns, _SIDES)
    short = frame["still_minutes"].to_numpy(float) < MIN_STEADY_MINUTES
    frame["flagged_for"] = [
        ", ".join((["still_minutes"] if brief else []) + names) or None for brief, names in zip(short, flags, strict=True)
    ]
    return frame


def quality_page(frame: pd.DataFrame, *, title: str, notes: Sequence[str], methods: str) -> Page:
    """The page of a quality table."""
    flagged = frame["flagged_for"].notna()
    worst = frame.assign(_flags=flagged).sort_values(["_flags", "mean_fd"], ascending=False, kind="stable").drop(columns="_flags")
    shown = worst.head(_MOST_ROWS)
    rest = f"; the {len(worst) - len(shown)} others are in group_qc.tsv" if len(worst) > len(shown) else ""
    first = ["participant_id", "session", "run", "flagged_for"]  # what is wrong is seen without scrolling
    full = [name for name in [*first, *frame.columns.drop(first)] if frame[name].notna().any() or name == "flagged_for"]
    return Page(
        title=title,
        subtitle="quality of preprocessing",
        facts={
            "participants": str(frame["participant_id"].nunique()),
            "runs": str(len(frame)),
            "flagged runs": str(int(flagged.sum())),
            "median FD": _shown(frame["mean_fd"], " mm"),
            "median tSNR": _shown(frame["tsnr"], ""),
        },
        notes=tuple(notes),
        sections=(
            Section(title="Motion and signal", lead="One dot per run; flagged runs in orange.", blocks=_dots(frame, flagged.to_numpy())),
            Section(
                title="Runs",
                lead=f"Flagged runs first, then by motion{rest}.",
                blocks=(table(shown[full], highlight=np.flatnonzero(shown["flagged_for"].notna()).tolist()),),
            ),
            Section(title="Columns", blocks=tuple(paragraph(f"{name}: {QC_COLUMNS[name]}") for name in full)),
        ),
        methods=methods,
    )


def _dots(frame: pd.DataFrame, flagged: np.ndarray) -> tuple[Markup, ...]:
    from matplotlib.figure import Figure

    labels = {
        "mean_fd": "mean FD (mm)", "moving_fraction": "share of moving frames", "mean_std_dvars": "mean standardised DVARS",
        "tsnr": "tSNR", "brain_ml": "brain mask (ml)", "template_correlation": "correlation with template", "template_dice": "Dice with template",
        "sequence_alignment": "alignment of sequences",
    }  # fmt: skip
    names = [name for name in labels if frame[name].notna().any()]
    if not names:
        return ()
    drawing = Figure(figsize=(8, 0.9 * len(names)), layout="constrained")
    spread = np.random.default_rng(0).uniform(-0.3, 0.3, len(frame))  # fixed: the same table gives the same picture
    for axis, name in zip(np.ravel(drawing.subplots(len(names), 1)), names, strict=True):
        tidy(axis)
        values = frame[name].to_numpy(float)
        for chosen, colour in ((~flagged, BLUE), (flagged, ORANGE)):
            axis.plot(values[chosen], spread[chosen], ".", color=colour, markersize=6, alpha=0.7, markeredgewidth=0)
        axis.set_ylim(-1, 1)
        axis.set_yticks([])
        axis.set_xlabel(labels[name], fontsize=8)
        axis.tick_params(labelsize=7)
    caption = "Each row is one measure over all runs. Height within a row means nothing."
    return (figure(drawing, caption=caption, alt=f"dots for {', '.join(labels[name] for name in names)}", dpi=_DPI, colours=_COLOURS),)


def _column(confounds: pd.DataFrame, name: str) -> np.ndarray:
    values = confounds[name] if name in confounds else pd.Series(np.nan, index=confounds.index)
    return pd.to_numeric(values, errors="coerce").to_numpy(float)


def _mean(values: np.ndarray) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def _shown(column: pd.Series, unit: str) -> str:
    middle = column.astype(float).median()
    return "unknown" if pd.isna(middle) else f"{middle:.3g}{unit}"
