"""Quality of a packed cohort: one table row per run and atlas, motion's trace in connectivity, and the page that shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainfm_cli.bids.cohort import iterate_runs
from brainfm_cli.records import RegionTable
from brainfm_cli.reports.drawing import BLUE, ORANGE, matrix_figure, scale_limit, shortened, tidy
from brainfm_cli.reports.page import Page, Section, figure, heading, paragraph, side_by_side, table
from brainfm_cli.signals.connectivity import fisher_z, pearson
from brainfm_cli.signals.quality import MIN_RUNS_FOR_MOTION, MotionTrace, correlation, edge_distances, edges, outliers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from markupsafe import Markup
    from matplotlib.axes import Axes

    from brainfm_cli.bids.cohort import Cohort

QC_COLUMNS: dict[str, str] = {
    "participant_id": "Participant key, as in the packed cohort.",
    "session": "Session label, n/a where there is none.",
    "run": "BIDS entities of the run after sub and ses.",
    "atlas": "Atlas label.",
    "dataset": "Dataset that the run comes from.",
    "site": "Site or scanner.",
    "frames": "Frames that denoising kept.",
    "kept_fraction": "Share of the run's frames that denoising kept.",
    "mean_fd": "Mean framewise displacement in millimetres over all frames of the run.",
    "mean_coverage": "Mean over regions of the share of the region's voxels inside the brain mask.",
    "missing_regions": "Regions without a series, for lack of coverage or of variance.",
    "mean_fisherz": "Mean Fisher z of the correlations between different regions.",
    "distance_dependence": "Correlation over edges of Fisher z with the distance between the region centres.",
    "typicality": "Correlation over edges of Fisher z with its mean over all other runs (the run itself is left out).",
    "outlier_in": "Columns in which the run lies more than 3.5 robust z-scores (0.6745 x deviation from the median / MAD; mean absolute deviation where the MAD is 0) on the bad side.",
}
"""Columns of the group's quality table, with their descriptions."""

OUTLIER_SIDES: dict[str, int] = {
    "kept_fraction": -1, "mean_fd": 1, "mean_coverage": -1, "missing_regions": 1,
    "mean_fisherz": 0, "distance_dependence": 0, "typicality": -1,
}  # fmt: skip
"""Columns searched for outliers: +1 high is bad, -1 low, 0 both."""

_MOST_FLAGGED = 200
_MOST_SITES = 24
_FEWEST_FOR_BOX = 5
_COLOURS, _DPI = 192, 90


@dataclass(frozen=True, kw_only=True)
class AtlasQuality:
    """What motion does to the connectivity of one atlas, over all runs."""

    atlas: str
    """Atlas label."""
    regions: RegionTable
    """Names, networks, centroids."""
    runs: int
    """Runs in the cohort."""
    mean_fisherz: NDArray[np.float64]
    """(edges,) mean over runs, upper triangle; ``nan`` where no run has the edge."""
    motion: NDArray[np.float64]
    """(edges,) correlation over runs with mean FD (QC-FC); ``nan`` with fewer than ten runs of known motion."""
    distances_mm: NDArray[np.float64]
    """(edges,) distance between the region centres; ``nan`` where unknown."""

    @property
    def median_motion(self) -> float:
        """Median size of the correlation of an edge with motion."""
        sizes = np.abs(self.motion[np.isfinite(self.motion)])
        return float(np.median(sizes)) if sizes.size else float("nan")

    @property
    def motion_by_distance(self) -> float:
        """Correlation over edges of QC-FC with distance."""
        return correlation(self.motion, self.distances_mm)


@dataclass(frozen=True, kw_only=True)
class Assessment:
    """Quality of all runs of a cohort."""

    table: pd.DataFrame
    """One row per run and atlas, :data:`QC_COLUMNS`."""
    atlases: tuple[AtlasQuality, ...]
    """By label."""

    @property
    def runs(self) -> pd.DataFrame:
        """One row per run: that of its first atlas."""
        return self.table.drop_duplicates(["participant_id", "session", "run"])

    @property
    def flagged(self) -> pd.DataFrame:
        """Rows that are extreme in some column, most columns first."""
        rows = self.table[self.table["outlier_in"].notna()]
        count = rows["outlier_in"].str.count(",")
        return rows.loc[count.sort_values(ascending=False, kind="stable").index]


def assess(cohort: Cohort, coverage: Mapping[tuple[str, str, str, str], tuple[float, int]]) -> Assessment:
    """Go twice over the series on disk, one run in memory at a time: first for the means, then for typicality.

    Parameters
    ----------
    cohort
        The packed cohort.
    coverage
        By participant key, session, run and atlas: mean coverage of the regions, and the number of lost regions. A run that is not
        in it has unknown coverage, and its lost regions are counted in its series.
    """
    parts = [_assess_atlas(cohort, label, coverage) for label in cohort.atlases]
    frame = pd.concat([part[0] for part in parts], ignore_index=True) if parts else pd.DataFrame(columns=list(QC_COLUMNS))
    frame = frame.sort_values(["participant_id", "session", "run", "atlas"], kind="stable", na_position="first", ignore_index=True)
    return Assessment(table=frame[list(QC_COLUMNS)], atlases=tuple(part[1] for part in parts))


def _assess_atlas(
    cohort: Cohort, label: str, coverage: Mapping[tuple[str, str, str, str], tuple[float, int]]
) -> tuple[pd.DataFrame, AtlasQuality]:
    regions = cohort.atlases[label].regions
    distances = edge_distances(regions.centroids_mm, len(regions.names))
    trace = MotionTrace(len(distances))
    rows: list[dict[str, object]] = []
    for row, series in iterate_runs(cohort, label):
        z = edges(fisher_z(pearson(series)))
        trace.add(z, row.mean_fd)
        lost = int((~np.isfinite(series).all(axis=0)).sum())
        covered, missing = coverage.get((row.participant, row.session, row.run, label), (float("nan"), lost))
        rows.append(
            {
                "participant_id": row.participant, "session": row.session or None, "run": row.run or None, "atlas": label,
                "dataset": row.dataset or None, "site": row.site or None, "frames": row.frames,
                "kept_fraction": float(row.kept_fraction), "mean_fd": float(row.mean_fd),
                "mean_coverage": float(covered), "missing_regions": int(missing),
                "mean_fisherz": _mean(z), "distance_dependence": correlation(z, distances),
            }
        )  # fmt: skip
    typical = [correlation(z := edges(fisher_z(pearson(series))), trace.mean_without(z)) for _, series in iterate_runs(cohort, label)]
    frame = pd.DataFrame(rows).assign(typicality=typical)
    columns = {name: frame[name].to_numpy(float) for name in OUTLIER_SIDES}
    frame["outlier_in"] = [", ".join(names) or None for names in outliers(columns, OUTLIER_SIDES)]
    quality = AtlasQuality(
        atlas=label,
        regions=regions,
        runs=len(frame),
        mean_fisherz=trace.mean,
        motion=trace.correlations,
        distances_mm=distances,
    )
    return frame, quality


def quality_page(assessment: Assessment, *, title: str, notes: Sequence[str], methods: str) -> Page:
    """The report of the cohort's quality."""
    runs = assessment.runs
    flagged = assessment.flagged.drop_duplicates(["participant_id", "session", "run"])
    known = runs["mean_fd"].to_numpy(float)
    known = known[np.isfinite(known)]
    sections = [_motion_section(runs), _summary_section(assessment)]
    sections.extend(_atlas_section(quality) for quality in assessment.atlases)
    sections.append(_flagged_section(assessment))
    return Page(
        title=title,
        subtitle="Quality of a packed cohort, brainfm parcellate group",
        facts={
            "Participants": str(runs["participant_id"].nunique()),
            "Runs": str(len(runs)),
            "Atlases": str(len(assessment.atlases)),
            "Datasets": str(runs["dataset"].nunique()),
            "Median of mean FD": f"{np.median(known):.3f} mm" if known.size else "unknown",
            "Runs flagged": str(len(flagged)),
        },
        notes=tuple(notes),
        sections=tuple(sections),
        methods=methods,
    )


def _motion_section(runs: pd.DataFrame) -> Section:
    lead = "Mean framewise displacement of every run."
    if not np.isfinite(runs["mean_fd"].to_numpy(float)).any():
        return Section(title="Motion", lead=lead, blocks=(paragraph("No run has a motion table."),))
    sites = _by_site(runs)
    caption = (
        f"Mean FD by site ({len(sites)} shown): box from quartile to quartile, line at the median (from five runs on), every run a dot."
    )
    return Section(title="Motion", lead=lead, blocks=(_boxes(sites, label="mean FD in mm", caption=caption, alt="Motion by site"),))


def _by_site(runs: pd.DataFrame) -> dict[str, NDArray[np.float64]]:
    """Finite mean FD by site, sites with most runs first; the small rest together."""
    usable = runs[np.isfinite(runs["mean_fd"].to_numpy(float))]
    sites = usable["site"].fillna("site unknown").astype(str)
    order = list(sites.value_counts(sort=False).sort_index().sort_values(ascending=False, kind="stable").index)
    if len(order) > _MOST_SITES:
        rest = order[_MOST_SITES - 1 :]
        sites = sites.where(~sites.isin(rest), f"{len(rest)} other sites")
        order = [*order[: _MOST_SITES - 1], f"{len(rest)} other sites"]
    return {site: usable.loc[sites == site, "mean_fd"].to_numpy(float) for site in order}


def _summary_section(assessment: Assessment) -> Section:
    rows = []
    for quality in assessment.atlases:
        part = assessment.table[assessment.table["atlas"] == quality.atlas]
        rows.append(
            {
                "atlas": quality.atlas,
                "regions": len(quality.regions.names),
                "runs": quality.runs,
                "mean coverage": _mean(part["mean_coverage"].to_numpy(float)),
                "runs with lost regions": int((part["missing_regions"] > 0).sum()),
                "median |QC-FC|": quality.median_motion,
                "by chance": chance_motion(int(np.isfinite(part["mean_fd"].to_numpy(float)).sum())),
                "QC-FC with distance": quality.motion_by_distance,
                "median typicality": _median(part["typicality"].to_numpy(float)),
                "flagged": int(part["outlier_in"].notna().sum()),
            }
        )
    by_atlas = {
        quality.atlas: values[np.isfinite(values)]
        for quality in assessment.atlases
        if np.isfinite(values := assessment.table.loc[assessment.table["atlas"] == quality.atlas, "mean_coverage"].to_numpy(float)).any()
    }
    blocks: list[Markup] = [table(pd.DataFrame(rows))]
    if by_atlas:
        caption = "Mean coverage of the regions of every run, by atlas: 1 means that the brain mask holds them whole."
        blocks.append(_boxes(by_atlas, label="mean coverage", caption=caption, alt="Coverage by atlas"))
    else:
        blocks.append(paragraph("The coverage of the regions is unknown."))
    lead = (
        "QC-FC is the correlation over runs of an edge with mean FD. A median size near the one expected by chance, for so many "
        "independent runs, means that denoising removed the trace of motion."
    )
    return Section(title="Atlases", lead=lead, blocks=tuple(blocks))


def chance_motion(runs: int) -> float:
    """Median size of the correlation of ``runs`` independent normal values with others; ``nan`` below ten runs."""
    from scipy.stats import t

    if runs < MIN_RUNS_FOR_MOTION:
        return float("nan")
    middle = float(t.ppf(0.75, runs - 2))
    return middle / float(np.sqrt(runs - 2 + middle**2))


def _atlas_section(quality: AtlasQuality) -> Section:
    matrix = _mean_matrix(quality)
    if not np.isfinite(quality.motion).any():
        few = f"QC-FC is not computed: it needs at least {MIN_RUNS_FOR_MOTION} runs with known motion."
        return Section(title=quality.atlas, lead=f"Mean over {quality.runs} runs.", blocks=(side_by_side([matrix], [paragraph(few)]),))
    lead = f"Mean over {quality.runs} runs, and what is left of motion in it."
    return Section(title=quality.atlas, lead=lead, blocks=(side_by_side([matrix], [_motion_pictures(quality)]),))


def _mean_matrix(quality: AtlasQuality) -> Markup:
    count = len(quality.regions.names)
    matrix = np.full((count, count), np.nan)
    matrix[np.triu_indices(count, 1)] = np.tanh(quality.mean_fisherz)
    matrix = np.where(np.isnan(matrix), matrix.T, matrix)
    drawing = matrix_figure(matrix, quality.regions, limit=scale_limit(np.tanh(quality.mean_fisherz)), label="mean r")
    caption = f"Mean correlation of {count} regions (through Fisher z); grey: no run has the edge."
    return figure(drawing, caption=caption, alt=f"Group mean matrix of {quality.atlas}", dpi=_DPI, colours=_COLOURS, trim=False)


def _motion_pictures(quality: AtlasQuality) -> Markup:
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(5.4, 4.4), layout="constrained")
    placed = np.isfinite(quality.distances_mm) & np.isfinite(quality.motion)
    axes = drawing.subplots(2 if placed.any() else 1, 1, squeeze=False).ravel()
    finite = quality.motion[np.isfinite(quality.motion)]
    limit = max(0.2, float(np.abs(finite).max()))
    axes[0].hist(finite, bins=np.linspace(-limit, limit, 61), color=BLUE)
    axes[0].axvline(float(np.median(finite)), color=ORANGE, linewidth=1.2)
    axes[0].set_xlabel("QC-FC", fontsize=8)
    axes[0].set_ylabel("edges", fontsize=8)
    caption = f"Correlation of every edge with mean FD; the median (orange) is {np.median(finite):.3f}, its median size {quality.median_motion:.3f}."
    if placed.any():
        _draw_by_distance(axes[1], quality.distances_mm[placed], quality.motion[placed], limit)
        caption += f" Below: against distance (correlation {quality.motion_by_distance:.3f}), with the median in steps of distance."
    for axis in axes:
        tidy(axis)
    return figure(drawing, caption=caption, alt=f"Motion in the edges of {quality.atlas}", dpi=_DPI, colours=_COLOURS)


def _draw_by_distance(axis: Axes, distances_mm: NDArray[np.float64], motion: NDArray[np.float64], limit: float) -> None:
    axis.hexbin(distances_mm, motion, gridsize=(50, 24), cmap="Blues", bins="log", mincnt=1, linewidths=0.1)
    borders = np.linspace(distances_mm.min(), distances_mm.max() + 1e-9, 13)
    step = np.digitize(distances_mm, borders) - 1
    medians = [(float(distances_mm[step == one].mean()), float(np.median(motion[step == one]))) for one in range(12) if (step == one).any()]
    axis.plot(*zip(*medians, strict=True), color=ORANGE, linewidth=1.2)
    axis.axhline(0.0, color="black", linewidth=0.6)
    axis.set_ylim(-limit, limit)
    axis.set_xlabel("distance in mm", fontsize=8)
    axis.set_ylabel("QC-FC", fontsize=8)


def _flagged_section(assessment: Assessment) -> Section:
    rows = assessment.flagged
    lead = "Runs more than 3.5 robust z-scores on the bad side of the others. A flag is a reason to look, not a verdict."
    if rows.empty:
        return Section(title="Flagged runs", lead=lead, blocks=(paragraph("No run is flagged."),))
    merged = rows.groupby(["participant_id", "session", "run"], dropna=False, sort=False).agg(
        site=("site", "first"), frames=("frames", "first"), mean_fd=("mean_fd", "first"), kept_fraction=("kept_fraction", "first"),
        atlases=("atlas", "nunique"), outlier_in=("outlier_in", _union),
    ).reset_index()  # fmt: skip
    shown = merged.head(_MOST_FLAGGED).astype(object)
    blocks: list[Markup] = [table(shown.where(shown.notna(), "n/a"))]
    if len(merged) > _MOST_FLAGGED:
        blocks.append(paragraph(f"{len(merged) - _MOST_FLAGGED} more are in group_qc.tsv."))
    return Section(title="Flagged runs", lead=lead, blocks=(heading(f"{len(merged)} runs"), *blocks))


def _union(cells: pd.Series) -> str:
    named = {name for cell in cells for name in cell.split(", ")}
    return ", ".join(name for name in OUTLIER_SIDES if name in named)


def _boxes(groups: Mapping[str, NDArray[np.float64]], *, label: str, caption: str, alt: str) -> Markup:
    """One row per group: dots, and a box where there are enough of them."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(8, 1.0 + 0.3 * len(groups)), layout="constrained")
    axis = drawing.subplots()
    tidy(axis)
    heights = np.arange(len(groups))[::-1]
    spread = np.random.default_rng(0)  # fixed: the same table gives the same picture
    for height, values in zip(heights, groups.values(), strict=True):
        size, alpha = (6, 0.9) if len(values) < 100 else (4, 0.5)
        axis.plot(
            values, height + spread.uniform(-0.25, 0.25, len(values)), ".", color=BLUE, markersize=size, alpha=alpha, markeredgewidth=0
        )
    many = {height: values for height, values in zip(heights, groups.values(), strict=True) if len(values) >= _FEWEST_FOR_BOX}
    if many:  # matplotlib takes no boxes for one box without a place
        axis.boxplot(
            list(many.values()), positions=list(many), orientation="horizontal", widths=0.6, showfliers=False, manage_ticks=False,
            medianprops={"color": ORANGE},
        )  # fmt: skip
    names = [f"{shortened(name, 32)} ({len(values)})" for name, values in groups.items()]
    axis.set_yticks(heights)
    axis.set_yticklabels(names, fontsize=8, parse_math=False)  # names come from the dataset: a dollar sign is no formula
    axis.set_xlabel(label, fontsize=8)
    return figure(drawing, caption=caption, alt=alt, dpi=_DPI, colours=_COLOURS)


def _mean(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(finite.mean()) if finite.size else float("nan")


def _median(values: NDArray[np.float64]) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if finite.size else float("nan")
