"""Report of one participant's parcellated runs: carpet and motion, connectivity, coverage, connectome."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.records import RegionTable, RunKey
from brainfm_cli.reports.drawing import (
    BLUE,
    GREY,
    ORANGE,
    draw_connectome,
    listed,
    matrix_figure,
    name_networks,
    network_order,
    scale_limit,
    tidy,
)
from brainfm_cli.reports.page import Page, Section, figure, heading, paragraph, side_by_side, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from markupsafe import Markup
    from matplotlib.axes import Axes

_STRONGEST = 120
_COLOURS = 192
_DPI = 90


@dataclass(frozen=True, kw_only=True)
class AtlasSummary:
    """What the report shows of one run in one atlas."""

    atlas: str
    """Atlas label in entity form."""
    series: NDArray[np.float64]
    """(frames, regions) after denoising, censored frames left out; ``nan`` columns for lost regions."""
    coverage: NDArray[np.float64]
    """(regions,) share of each region's voxels inside the brain mask, 0 to 1."""
    regions: RegionTable
    """Names, networks, centroids."""
    correlation: NDArray[np.float64]
    """(regions, regions) Pearson correlation, ``nan`` for lost regions."""
    notes: tuple[str, ...] = ()
    """Warnings of this atlas."""

    @property
    def lost(self) -> tuple[str, ...]:
        """Names of the regions without a series."""
        gone = np.flatnonzero(~np.isfinite(self.series).all(axis=0))
        return tuple(self.regions.names[row] for row in gone)


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """What the report shows of one run."""

    key: RunKey
    """Which run."""
    space: str
    """Template of the BOLD series."""
    repetition_time_s: float
    """Seconds between frames."""
    fd: NDArray[np.float64] | None
    """(all frames,) framewise displacement in millimetres, may hold ``nan``; none where there is no motion table."""
    kept: NDArray[np.bool_]
    """(all frames,) whether denoising kept the frame."""
    atlases: tuple[AtlasSummary, ...]
    """In the order shown."""
    fd_threshold_mm: float = 0.5
    """Line across the motion trace."""

    def __post_init__(self) -> None:
        for atlas in self.atlases:
            if len(atlas.series) not in {int(self.kept.sum()), len(self.kept)}:
                raise InputDatasetError(
                    f"{self.key.name}: {len(atlas.series)} frames of series, {int(self.kept.sum())} of {len(self.kept)} kept",
                    fix="report this as a bug",
                )


def participant_page(label: str, runs: Sequence[RunSummary], *, methods: str, citations: Sequence[str], notes: Sequence[str]) -> Page:
    """The report of one participant; ``label`` is without ``sub-``."""
    frames = sum(len(run.kept) for run in runs)
    kept = sum(int(run.kept.sum()) for run in runs)
    motion = [run.fd for run in runs if run.fd is not None and np.isfinite(run.fd).any()]
    lost = sum(len(atlas.lost) for run in runs for atlas in run.atlases)
    return Page(
        title=f"sub-{label}",
        subtitle="Region series and connectivity, brainfm parcellate",
        facts={
            "Runs": str(len(runs)),
            "Atlases": str(len({atlas.atlas for run in runs for atlas in run.atlases})),
            "Frames kept": f"{kept} of {frames}" + (f" ({100 * kept / frames:.0f} %)" if frames else ""),
            "Mean FD": f"{np.nanmean(np.concatenate(motion)):.3f} mm" if motion else "unknown",
            "Regions lost": str(lost),
        },
        notes=tuple(notes),
        sections=tuple(_run_section(run) for run in runs),
        methods=methods,
        citations=tuple(citations),
    )


def _run_section(run: RunSummary) -> Section:
    entities = run.key.entities
    del entities["sub"]
    seconds = len(run.kept) * run.repetition_time_s
    blocks = [_carpet(run)] if run.atlases else [paragraph("No atlas gave a series for this run.")]
    if run.atlases:
        blocks.append(table(pd.DataFrame([_row(atlas) for atlas in run.atlases])))
    for atlas in run.atlases:
        blocks.extend(_atlas_blocks(atlas))
    return Section(
        title=" ".join(f"{key}-{value}" for key, value in entities.items()),
        lead=(
            f"{len(run.kept)} frames of {run.repetition_time_s:g} s ({seconds / 60:.1f} min), {int(run.kept.sum())} kept; "
            f"space {run.space}."
        ),
        blocks=tuple(blocks),
    )


def _row(atlas: AtlasSummary) -> dict[str, str | int | float]:
    values = np.abs(atlas.correlation[np.triu_indices(len(atlas.correlation), 1)])
    finite = values[np.isfinite(values)]
    return {
        "atlas": atlas.atlas,
        "regions": len(atlas.regions.names),
        "lost": len(atlas.lost),
        "mean coverage": float(np.nanmean(atlas.coverage)) if np.isfinite(atlas.coverage).any() else float("nan"),
        "mean |r|": float(finite.mean()) if finite.size else float("nan"),
    }


def _atlas_blocks(atlas: AtlasSummary) -> list[Markup]:
    connectome = _connectome(atlas)
    beside = [_coverage(atlas)] if connectome is None else [connectome, _coverage(atlas)]
    return [heading(atlas.atlas), *(paragraph(note) for note in atlas.notes), side_by_side([_matrix(atlas)], beside)]


def _carpet(run: RunSummary) -> Markup:
    """Motion above the series of the atlas with most regions, on one time axis."""
    from matplotlib.figure import Figure

    atlas = max(run.atlases, key=lambda one: len(one.regions.names))
    seconds = np.arange(len(run.kept)) * run.repetition_time_s
    drawing = Figure(figsize=(10, 4.6))
    top, below = drawing.add_axes((0.16, 0.74, 0.83, 0.22)), drawing.add_axes((0.16, 0.1, 0.83, 0.61))
    _draw_motion(top, run, seconds)
    networks = network_order(atlas.regions)
    extent = (-run.repetition_time_s / 2, seconds[-1] + run.repetition_time_s / 2, len(networks.order) - 0.5, -0.5)
    below.imshow(
        carpet_values(atlas.series, run.kept)[:, networks.order].T,
        cmap="gray", vmin=-2.5, vmax=2.5, aspect="auto", interpolation="nearest", extent=extent,
    )  # fmt: skip
    below.set_facecolor("#f6dcc8")
    for start in networks.starts[1:-1]:
        below.axhline(start - 0.5, color=BLUE, linewidth=0.7)
    name_networks(below, networks)
    top.set_xlim(extent[:2])
    top.set_xticks([])
    below.set_xlabel("time in seconds", fontsize=8)
    below.tick_params(labelsize=8)
    return figure(
        drawing,
        caption=(
            f"Above: framewise displacement; orange marks are frames left out, the dashed line is {run.fd_threshold_mm:g} mm. "
            f"Below: series of {atlas.atlas}, each region z-scored, dark −2.5 to light +2.5; gaps are frames left out or regions lost."
        ),
        alt=f"Motion and region series of {run.key.name}",
        dpi=_DPI,
        colours=_COLOURS,
        trim=False,
    )


def carpet_values(series: NDArray[np.float64], kept: NDArray[np.bool_]) -> NDArray[np.float64]:
    """(all frames, regions) z-scored series with ``nan`` rows where a frame was left out."""
    used = series[kept] if len(series) == len(kept) else series
    spread = used.std(axis=0)
    with np.errstate(invalid="ignore", divide="ignore"):
        scaled = np.where(spread > 0, (used - used.mean(axis=0)) / spread, np.nan)
    values = np.full((len(kept), series.shape[1]), np.nan)
    values[kept] = scaled
    return values


def _draw_motion(axis: Axes, run: RunSummary, seconds: NDArray[np.floating]) -> None:
    tidy(axis)
    dropped = ~run.kept
    height = run.fd_threshold_mm
    if run.fd is None:
        axis.text(0.5, 0.5, "no motion table", transform=axis.transAxes, ha="center", fontsize=9, color=GREY)
    else:
        axis.plot(seconds, run.fd, color=BLUE, linewidth=0.9)
        axis.axhline(run.fd_threshold_mm, color="black", linewidth=0.7, linestyle="--")
        height = max(float(np.nanmax(run.fd, initial=0.0)), run.fd_threshold_mm)
    axis.set_ylim(0, 1.15 * height)
    if dropped.any():  # an empty line that is not clipped has no extent, and breaks the layout
        axis.plot(seconds[dropped], np.full(int(dropped.sum()), 1.1 * height), "|", color=ORANGE, markersize=7, clip_on=False)
    axis.set_ylabel("FD in mm", fontsize=8)


def _matrix(atlas: AtlasSummary) -> Markup:
    drawing = matrix_figure(atlas.correlation, atlas.regions, limit=scale_limit(_upper(atlas.correlation)), label="r")
    ordered = "ordered by network" if any(atlas.regions.networks) else "in the order of the atlas"
    return figure(
        drawing,
        caption=f"Pearson correlation, {len(atlas.regions.names)} regions {ordered}; grey: lost regions.",
        alt=f"Connectivity matrix of {atlas.atlas}",
        dpi=_DPI,
        colours=_COLOURS,
        trim=False,
    )


def _connectome(atlas: AtlasSummary) -> Markup | None:
    centres = atlas.regions.centroids_mm
    if centres is None or not np.isfinite(_upper(atlas.correlation)).any():
        return None
    drawing = draw_connectome(atlas.correlation, centres, strongest=_STRONGEST, limit=1.0)
    return figure(
        drawing,
        caption=f"The {_STRONGEST} strongest correlations between region centres: red positive, blue negative.",
        alt=f"Connectome of {atlas.atlas} in a glass brain",
        dpi=_DPI,
        colours=_COLOURS,
        trim=False,
    )


def _coverage(atlas: AtlasSummary) -> Markup:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(5.4, 1.7))
    axis = drawing.add_axes((0.1, 0.26, 0.88, 0.69))
    tidy(axis)
    order = np.argsort(atlas.coverage, kind="stable")
    gone = set(atlas.lost)
    lost = np.array([atlas.regions.names[row] in gone for row in order], dtype=bool)
    ranks = np.arange(len(order))
    axis.fill_between(ranks, atlas.coverage[order], step="mid", color=BLUE, alpha=0.35, linewidth=0)
    if lost.any():
        axis.plot(ranks[lost], np.nan_to_num(atlas.coverage[order][lost]), "x", color=ORANGE, markersize=5, clip_on=False)
    axis.set(xlim=(-0.5, len(order) - 0.5), ylim=(0, 1.02))
    axis.set_xlabel("regions, least covered first", fontsize=8)
    axis.set_ylabel("coverage", fontsize=8)
    caption = "Share of each region inside the brain mask."
    caption += f" Lost ({len(atlas.lost)}): {listed(atlas.lost)}." if atlas.lost else " No region is lost."
    return figure(drawing, caption=caption, alt=f"Coverage of {atlas.atlas}", dpi=_DPI, colours=_COLOURS, trim=False)


def _upper(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    return matrix[np.triu_indices(len(matrix), 1)]
