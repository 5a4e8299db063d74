"""Pictures that several reports share: connectivity matrices with network borders, connectomes in a glass brain."""

from __future__ import annotations

import io
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from brainfm_cli.records import RegionTable

BLUE, ORANGE, GREY = "#1f5fa8", "#c2571a", "#9aa5b1"
_GLASS_SIZE, _GLASS_DPI = (7.2, 2.7), 160
_PLANES = {"x": (1, 2), "y": (0, 2), "z": (0, 1)}  # axis looked along -> horizontal and vertical axis


@dataclass(frozen=True, kw_only=True)
class NetworkOrder:
    """Regions ordered so that those of a network stand together."""

    order: NDArray[np.intp]
    """(regions,) positions in the atlas table."""
    names: tuple[str, ...]
    """Networks in that order; empty where the atlas states none."""
    starts: tuple[int, ...]
    """First row of each network, then the number of regions."""


def network_order(regions: RegionTable) -> NetworkOrder:
    """Networks in the order in which the table first names them; regions without one come last."""
    count = len(regions.names)
    if not any(regions.networks):
        return NetworkOrder(order=np.arange(count), names=(), starts=(0, count))
    labels = [network or "no network" for network in regions.networks]
    names = list(dict.fromkeys(label for label, network in zip(labels, regions.networks, strict=True) if network))
    if not all(regions.networks):
        names.append("no network")
    rank = np.array([names.index(label) for label in labels])
    order = np.argsort(rank, kind="stable")
    starts = np.searchsorted(rank[order], np.arange(len(names) + 1))
    return NetworkOrder(order=order, names=tuple(names), starts=tuple(int(start) for start in starts))


def matrix_figure(matrix: NDArray[np.floating], regions: RegionTable, *, limit: float, label: str) -> Figure:
    """(regions, regions) connectivity ordered by network, on a scale symmetric about 0; missing values are grey."""
    from matplotlib.figure import Figure

    networks = network_order(regions)
    shown = np.array(matrix[np.ix_(networks.order, networks.order)], dtype=float)
    np.fill_diagonal(shown, np.nan)
    left, side = (1.65 if networks.names else 0.35), 3.6  # inches: fixed places are drawn in half the time of a layout
    width, height = left + side + 0.65, side + 0.2
    drawing = Figure(figsize=(width, height))
    axis = drawing.add_axes((left / width, 0.1 / height, side / width, side / height))
    image = axis.imshow(shown, cmap=diverging(), vmin=-limit, vmax=limit, interpolation="nearest", aspect="auto")
    for start in networks.starts[1:-1]:
        axis.axhline(start - 0.5, color="black", linewidth=0.5)
        axis.axvline(start - 0.5, color="black", linewidth=0.5)
    name_networks(axis, networks)
    axis.set_xticks([])
    bar = drawing.colorbar(image, cax=drawing.add_axes(((left + side + 0.1) / width, 0.2, 0.1 / width, 0.6)), ticks=[-limit, 0, limit])
    bar.ax.tick_params(labelsize=8)
    bar.ax.set_title(label, fontsize=8)
    return drawing


def name_networks(axis: Axes, networks: NetworkOrder) -> None:
    """Network names at the left of a picture whose rows are regions; names that would overlap are left out."""
    rows = networks.starts[-1]
    axis.tick_params(axis="y", length=0)
    if not networks.names:
        axis.set_yticks([])
        axis.set_ylabel(f"{rows} regions", fontsize=8)
        return
    ticks: list[tuple[float, str]] = []
    for name, start, stop in zip(networks.names, networks.starts[:-1], networks.starts[1:], strict=True):
        middle = (start + stop - 1) / 2
        if not ticks or middle - ticks[-1][0] >= rows / 28:
            ticks.append((middle, name))
    axis.set_yticks([middle for middle, _ in ticks])
    # names come from the dataset: a dollar sign in one is no formula
    axis.set_yticklabels([shortened(name) for _, name in ticks], fontsize=7, parse_math=False)


def draw_connectome(matrix: NDArray[np.floating], centroids_mm: NDArray[np.floating], *, strongest: int, limit: float) -> Figure:
    """The strongest edges of a (regions, regions) matrix between region centres in millimetres, seen from three sides.

    Looks like :func:`nilearn.plotting.plot_connectome`, whose outlines are drawn once and reused: it takes two seconds a picture.
    """
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    outline, views = _glass_brain()
    drawing = Figure(figsize=_GLASS_SIZE)
    axis = drawing.add_axes((0, 0, 1, 1), xlim=(0, 1), ylim=(0, 1))
    axis.set_axis_off()
    axis.imshow(outline, extent=(0, 1, 0, 1), aspect="auto", interpolation="antialiased")
    rows, columns, values = strongest_edges(matrix, centroids_mm, strongest)
    used = np.unique(np.r_[rows, columns])
    for view in views:
        # one axis for three views: a third of the time
        placed = view.place(centroids_mm)
        ends = np.stack([placed[rows], placed[columns]], axis=1)
        lines = LineCollection(list(ends), array=values, cmap=diverging(), linewidths=0.4 + 1.6 * np.abs(values) / limit, alpha=0.8)
        lines.set_clim(-limit, limit)
        axis.add_collection(lines, autolim=False)
        axis.scatter(placed[used, 0], placed[used, 1], s=7, color="#1a2230", zorder=3, linewidths=0)
    return drawing


def strongest_edges(
    matrix: NDArray[np.floating], centroids_mm: NDArray[np.floating], count: int
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.float64]]:
    """Rows, columns and values of the ``count`` edges of largest size, weakest first; edges without a value or a centre are left out."""
    rows, columns = np.triu_indices(len(matrix), 1)
    values = np.asarray(matrix[rows, columns], float)
    placed = np.isfinite(centroids_mm).all(axis=1)
    usable = np.flatnonzero(np.isfinite(values) & placed[rows] & placed[columns])
    kept = usable[np.argsort(np.abs(values[usable]), kind="stable")[max(0, len(usable) - count) :]]
    return rows[kept], columns[kept], values[kept]


def scale_limit(values: NDArray[np.floating]) -> float:
    """A round limit of a scale symmetric about 0 that leaves out the largest 1 % of the values."""
    finite = np.abs(values[np.isfinite(values)])
    return max(0.1, float(np.ceil(np.percentile(finite, 99) * 10) / 10)) if finite.size else 1.0


def diverging() -> Colormap:
    """Blue, white, red, with grey for missing values."""
    from matplotlib import colormaps

    return colormaps["RdBu_r"].with_extremes(bad="#d9dfe7")


def tidy(axis: Axes) -> None:
    """Small ticks, no box."""
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def shortened(text: str, length: int = 26) -> str:
    """Text that fits beside a picture."""
    return text if len(text) <= length else text[: length - 1] + "…"


def listed(names: Sequence[str], most: int = 40) -> str:
    """Names separated by commas, cut after ``most``."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


@dataclass(frozen=True, kw_only=True)
class _View:
    """Where one side of the glass brain lies in the figure."""

    plane: tuple[int, int]
    """Axis in millimetres that runs to the right, and the one that runs upwards."""
    corner: tuple[float, float]
    """Lower left corner, as a share of the figure."""
    size: tuple[float, float]
    """Width and height, as a share of the figure."""
    limits_mm: tuple[tuple[float, float], tuple[float, float]]
    """Millimetres at the left and right, and at the lower and upper border."""

    def place(self, points_mm: NDArray[np.floating]) -> NDArray[np.floating]:
        """(points, 2) places in the figure of (points, 3) millimetres."""
        low, high = (np.array(ends) for ends in zip(*self.limits_mm, strict=True))
        return np.array(self.corner) + (points_mm[:, list(self.plane)] - low) / (high - low) * np.array(self.size)


@cache
def _glass_brain() -> tuple[NDArray[np.uint8], tuple[_View, ...]]:
    """Outlines of nilearn as a picture, and where its three views lie."""
    from matplotlib.figure import Figure
    from matplotlib.image import imread
    from nilearn.plotting import plot_glass_brain

    drawing = Figure(figsize=_GLASS_SIZE)
    display = plot_glass_brain(None, figure=drawing, display_mode="ortho", annotate=False)
    buffer = io.BytesIO()
    drawing.savefig(buffer, format="png", dpi=_GLASS_DPI)
    buffer.seek(0)
    views = []
    for direction, part in display.axes.items():
        box = part.ax.get_position()
        limits = (part.ax.get_xlim(), part.ax.get_ylim())
        views.append(_View(plane=_PLANES[direction], corner=(box.x0, box.y0), size=(box.width, box.height), limits_mm=limits))
    return (imread(buffer) * 255).astype(np.uint8), tuple(views)
