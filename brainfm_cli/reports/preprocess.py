"""Report of one participant of the embedded preprocessing: brain, tissues, alignments, carpet with motion, gates, methods."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainfm_cli.bids.inputs import run_key
from brainfm_cli.bids.names import parse_name
from brainfm_cli.reports.drawing import BLUE, ORANGE, tidy
from brainfm_cli.reports.page import Page, Section, figure, table
from brainfm_cli.reports.preprocess_methods import cited, methods_paragraph

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from markupsafe import Markup
    from matplotlib.axes import Axes

    from brainfm_cli.programs.embedded.workflow import EmbeddedResult

Volume = NDArray[np.float32]
_DPI, _COLOURS, _CUTS = 90, 192, 7
_CARPET_VOXELS = {"GM": 300, "WM": 120, "CSF": 120}  # voxels drawn of each tissue; dseg counts them 1, 2, 3
_SHOWN_CONFOUNDS = (
    "global_signal", "csf", "white_matter", "framewise_displacement", "std_dvars", "a_comp_cor_00", "a_comp_cor_01",
    "trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Outline:
    """Lines to draw over an image, on the same grid."""

    values: Volume
    """(x, y, z)."""
    levels: tuple[float, ...]
    """Values at which lines run."""
    colours: tuple[str, ...]
    """One for each level."""


def participant_page(label: str, result: EmbeddedResult, *, notes: Sequence[str] = ()) -> Page:
    """The report of one participant; ``label`` is without ``sub-``. Reads the published files."""
    files = [(parse_name(path.name), path) for path in result.outputs]
    keys = list(dict.fromkeys(run_key(entities) for (entities, _, _), path in files if path.parent.name == "func"))
    gates = {gate["name"]: gate["value"] for gate in result.gates["anat"]}
    bold = bool(keys)
    return Page(
        title=f"sub-{label}",
        subtitle="Preprocessing with the embedded engine, brainfm preprocess",
        facts={
            "Reference": result.facts["reference"],
            "Brain found by": result.facts["method"],
            "Correlation with template": f"{gates['template_correlation']:.2f}",
            "Mask overlap with template": f"{gates['template_dice']:.3f}",
            "Runs": str(len(keys)),
        },
        notes=(*result.notes, *notes),
        sections=(
            _anatomy(result.outputs),
            *_others(result.outputs),
            *(_run(result.outputs, key.name) for key in keys),
            Section(
                title="Gates",
                lead="Measures that a result must keep to be published.",
                blocks=(table(_gate_table(result.gates)),),
            ),
        ),
        methods=methods_paragraph(result.facts, bold=bold),
        citations=tuple(work.text for work in cited(result.facts, bold=bold)),
    )


def mosaic(image: Volume, outlines: Sequence[Outline], zooms: Sequence[float], *, inside: NDArray[np.bool_]) -> Any:  # noqa: ANN401
    """A matplotlib figure: cuts along the three axes through what is inside, with outlines over them.

    Parameters
    ----------
    image
        (x, y, z) with axes towards right, anterior, superior.
    zooms
        (3,) voxel size in millimetres.
    """
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(14, 6.4), facecolor="black")
    axes = np.atleast_2d(
        drawing.subplots(3, _CUTS, gridspec_kw={"wspace": 0.02, "hspace": 0.02, "left": 0, "right": 1, "top": 1, "bottom": 0})
    )
    used = [np.flatnonzero(inside.any(tuple(other for other in range(3) if other != axis))) for axis in range(3)]
    window = tuple(slice(max(0, int(one[0]) - 4), int(one[-1]) + 5) for one in used)
    low, high = 0.0, float(np.percentile(image[inside], 99.5))
    for row, axis in zip(axes, (2, 1, 0), strict=True):
        for place, panel in zip(np.linspace(used[axis][0], used[axis][-1], _CUTS + 2)[1:-1].round().astype(int), row, strict=True):
            panel.set_axis_off()
            plane = [window[other] for other in range(3) if other != axis]
            sizes = [zooms[other] for other in range(3) if other != axis]
            panel.imshow(
                _cut(image, axis, place, plane),
                cmap="gray",
                vmin=low,
                vmax=high,
                origin="lower",
                interpolation="nearest",
                aspect=sizes[1] / sizes[0],
            )
            for outline in outlines:
                _draw_outline(panel, outline, axis, place, plane)
    return drawing


def carpet_rows(series: Volume, first: int) -> NDArray[np.float32]:
    """(voxels, frames) z-scored after removing a line, from (frames, voxels); frames before ``first`` do not count in it."""
    steps = np.linspace(-1, 1, len(series))
    design = np.stack([np.ones(len(series)), steps], 1)
    weights = np.linalg.lstsq(design[first:], series[first:].astype(np.float64), rcond=None)[0]
    left = series - design @ weights
    spread = left[first:].std(0)
    return np.asarray(left / np.where(spread > 0, spread, 1), np.float32).T


def _anatomy(outputs: Sequence[Path]) -> Section:
    from brainfm_cli.programs.embedded.template import find_template, load_template

    native = _find(outputs, "anat", "preproc", space=None)
    image, zooms = _load(native)
    brain = _load(_find(outputs, "anat", "brain", space=None))[0] > 0
    in_template = _beside(outputs, native)
    placed, placed_zooms = _load(in_template)
    placed_brain = _load(_find(outputs, "anat", "brain"))[0] > 0
    template = load_template(find_template())
    model = _on_grid_of(in_template, template.brain, template.affine)
    tissue = float(np.median(model[placed_brain]))
    suffix = parse_name(native.name)[1]
    lines = Outline(values=model, levels=(0.35 * tissue, 1.08 * tissue), colours=("red", "orange"))
    pictures = [
        _picture(mosaic(image, [_edge(brain, "red")], zooms, inside=brain), f"{suffix} with the outline of the brain mask.", "Brain mask")
    ]
    if any(parse_name(path.name)[1] == "dseg" for path in outputs):  # only T1w contrast gives tissues
        edges = _tissue_edges(_load(_find(outputs, "anat", None, suffix="dseg", space=None))[0])
        caption = f"{suffix} with lines around white matter (yellow) and CSF (green)."
        pictures.append(_picture(mosaic(image, edges, zooms, inside=brain), caption, "Tissues"))
    caption = (
        f"{suffix} in template space with lines of the template: surface and ventricles (red), border of grey and white matter (orange)."
    )
    pictures.append(_picture(mosaic(placed, [lines], placed_zooms, inside=placed_brain), caption, "Registration to the template"))
    return Section(title="Structure", lead="Rows are axial, coronal and sagittal cuts.", blocks=tuple(pictures))


def _others(outputs: Sequence[Path]) -> tuple[Section, ...]:
    """The other sequences in the reference's space, with lines of the reference."""
    reference = parse_name(_find(outputs, "anat", "preproc", space=None).name)[1]
    brain = _load(_find(outputs, "anat", "brain", space=None))[0] > 0
    lines, about = [_edge(brain, "red")], "the brain mask (red)"
    if any(parse_name(path.name)[1] == "dseg" for path in outputs):
        lines += _tissue_edges(_load(_find(outputs, "anat", None, suffix="dseg", space=None))[0])
        about += ", white matter (yellow) and CSF (green)"
    pictures = []
    for path in outputs:
        entities, suffix, extension = parse_name(path.name)
        if (
            path.parent.name == "anat"
            and extension == ".nii.gz"
            and entities.get("space") == reference
            and entities.get("desc") == "preproc"
        ):
            image, zooms = _load(path)
            named = " ".join([*(f"{key}-{value}" for key, value in entities.items() if key not in {"sub", "space", "desc"}), suffix])
            shown = mosaic(image, lines, zooms, inside=brain)
            pictures.append(
                _picture(shown, f"{named} in the space of the {reference}, with lines of that image: {about}.", f"Alignment of {named}")
            )
    lead = f"Lines come from the {reference} and must follow the brain in the other sequences."
    return (Section(title="Other sequences", lead=lead, blocks=tuple(pictures)),) if pictures else ()


def _run(outputs: Sequence[Path], name: str) -> Section:
    mine = [path for path in outputs if path.parent.name == "func" and path.name.startswith(f"{name}_")]
    reference, zooms = _load(_find(mine, "func", None, suffix="boldref"))
    covered = _load(_find(mine, "func", "brain"))[0] > 0
    classes = _load(_find(outputs, "anat", None, suffix="dseg"))[0]
    brain = _load(_find(outputs, "anat", "brain"))[0] > 0
    confounds = pd.read_csv(_find(mine, "func", "confounds", suffix="timeseries", extension=".tsv", space=None), sep="\t", na_values="n/a")
    first = sum(str(column).startswith("non_steady_state_outlier") for column in confounds)
    seconds = _repetition_time(_find(mine, "func", "preproc", suffix="bold"))
    fd = confounds["framewise_displacement"]
    return Section(
        title=name.partition("_")[2].replace("_", " "),
        lead=f"{len(confounds)} frames of {seconds:g} s, {first} before the steady state; mean FD {fd.mean():.3f} mm, largest {fd.max():.2f} mm.",
        blocks=(
            _picture(
                mosaic(reference, [_edge(classes == 2, "#ffd92f"), _edge(brain, "red")], zooms, inside=covered),
                "Mean BOLD in template space with lines of the structural image: white matter (yellow) and brain mask (red).",
                f"Alignment of {name}",
            ),
            _picture(
                _carpet(_find(mine, "func", "preproc", suffix="bold"), np.where(covered, classes, 0), confounds, first, seconds),
                "Framewise displacement, standardised DVARS and global signal above voxels of grey matter, white matter and CSF, each without "
                "its linear trend, z-scored, dark −2 to light +2. The dashed lines are 0.5 mm and 1.5.",
                f"Carpet of {name}",
            ),
            _picture(_correlations(confounds[first:]), "Correlation between confounds over the steady frames.", f"Confounds of {name}"),
        ),
    )


def _carpet(bold: Path, classes: Volume, confounds: pd.DataFrame, first: int, seconds: float) -> Any:  # noqa: ANN401
    from matplotlib.figure import Figure

    picked = {}
    for code, (tissue, most) in enumerate(_CARPET_VOXELS.items(), 1):
        place = np.flatnonzero(classes.ravel(order="F") == code)
        picked[tissue] = place[np.linspace(0, len(place) - 1, min(most, len(place))).astype(int)] if len(place) else place
    rows = carpet_rows(_voxels(bold, np.concatenate(list(picked.values()))), first)
    drawing = Figure(figsize=(10, 6))
    times = np.arange(len(confounds)) * seconds
    extent = (-seconds / 2, times[-1] + seconds / 2, len(rows) - 0.5, -0.5)
    names = {"framewise_displacement": ("FD in mm", 0.5), "std_dvars": ("std. DVARS", 1.5), "global_signal": ("global signal", None)}
    for number, (name, (title, limit)) in enumerate(names.items()):
        axis = drawing.add_axes((0.08, 0.87 - 0.12 * number, 0.91, 0.1))
        tidy(axis)
        axis.plot(times, confounds[name], color=BLUE, linewidth=0.9)
        if limit is not None:
            axis.axhline(limit, color=ORANGE, linewidth=0.7, linestyle="--")
        axis.set(xlim=extent[:2], xticks=[])
        axis.set_ylabel(title, fontsize=7)
        axis.tick_params(labelsize=7)
    below = drawing.add_axes((0.08, 0.08, 0.91, 0.52))
    below.imshow(rows, cmap="gray", vmin=-2, vmax=2, aspect="auto", interpolation="nearest", extent=extent)
    borders = np.cumsum([0, *(len(place) for place in picked.values())])
    for border in borders[1:-1]:
        below.axhline(border - 0.5, color=ORANGE, linewidth=0.8)
    below.set_yticks((borders[:-1] + borders[1:]) / 2, list(picked), fontsize=8)
    below.tick_params(labelsize=8)
    below.set_xlabel("time in seconds", fontsize=8)
    return drawing


def _correlations(confounds: pd.DataFrame) -> Any:  # noqa: ANN401
    from matplotlib.figure import Figure

    shown = [name for name in _SHOWN_CONFOUNDS if name in confounds]
    drawing = Figure(figsize=(5.6, 4.9))
    axis = drawing.add_axes((0.29, 0.34, 0.58, 0.64))
    image = axis.imshow(confounds[shown].corr().to_numpy(), cmap="RdBu_r", vmin=-1, vmax=1, interpolation="nearest", aspect="auto")
    axis.set_yticks(range(len(shown)), shown, fontsize=7)
    axis.set_xticks(range(len(shown)), shown, fontsize=7, rotation=90)
    drawing.colorbar(image, cax=drawing.add_axes((0.89, 0.34, 0.02, 0.64))).ax.tick_params(labelsize=7)
    return drawing


def _gate_table(gates: Mapping[str, Sequence[Mapping[str, Any]]]) -> pd.DataFrame:
    rows = [
        {
            "about": "structure" if about == "anat" else about,
            "measure": gate["meaning"],
            "value": f"{gate['value']:.3g} {gate['unit']}".strip(),
            "must be": f"at least {gate['low']:g}" if gate["high"] is None else f"{gate['low']:g} to {gate['high']:g}",
            "passed": "yes" if gate["passed"] else "no",
        }
        for about, found in gates.items()
        for gate in found
    ]
    return pd.DataFrame(rows)


def _picture(drawing: Any, caption: str, alt: str) -> Markup:  # noqa: ANN401
    return figure(drawing, caption=caption, alt=alt, dpi=_DPI, colours=_COLOURS, trim=False)


def _edge(mask: NDArray[np.bool_], colour: str) -> Outline:
    return Outline(values=mask.astype(np.float32), levels=(0.5,), colours=(colour,))


def _tissue_edges(classes: Volume) -> list[Outline]:
    # dseg counts grey matter 1, white matter 2, CSF 3
    return [_edge(classes == code, colour) for code, colour in ((3, "#2ca02c"), (2, "#ffd92f"))]


def _draw_outline(panel: Axes, outline: Outline, axis: int, place: int, plane: Sequence[slice]) -> None:
    cut = _cut(outline.values, axis, place, plane)
    levels = [(level, colour) for level, colour in zip(outline.levels, outline.colours, strict=True) if cut.min() < level < cut.max()]
    if levels:
        panel.contour(cut, levels=[level for level, _ in levels], colors=[colour for _, colour in levels], linewidths=0.7)


def _cut(values: Volume, axis: int, place: int, plane: Sequence[slice]) -> Volume:
    """A cut with the second remaining axis upwards."""
    return np.asarray(values[(slice(None),) * axis + (place,)][tuple(plane)].T)  # a view: np.take would copy the whole image


def _voxels(bold: Path, places: NDArray[np.intp]) -> Volume:
    """(frames, voxels) of a series at flat places in the file's order."""
    from brainfm_cli.signals.volumes import open_series

    with open_series(bold) as (_, volumes):
        return np.stack([volume[places].astype(np.float32) for volume in volumes])


def _load(path: Path) -> tuple[Volume, tuple[float, float, float]]:
    import nibabel as nib

    image: Any = nib.as_closest_canonical(nib.load(path))
    return np.asarray(image.dataobj, np.float32), tuple(float(size) for size in image.header.get_zooms()[:3])  # type: ignore[return-value]


def _on_grid_of(path: Path, values: Volume, affine: NDArray[np.float64]) -> Volume:
    import nibabel as nib

    from brainfm_cli.programs.embedded.grids import on_grid

    image: Any = nib.load(path)
    return on_grid(values, affine, image.shape, np.asarray(image.affine))


def _repetition_time(bold: Path) -> float:
    import nibabel as nib

    image: Any = nib.load(bold)
    return float(image.header.get_zooms()[3])


def _beside(outputs: Sequence[Path], native: Path) -> Path:
    """The same image in template space."""
    entities, suffix, _ = parse_name(native.name)
    for path in outputs:
        found, other, ending = parse_name(path.name)
        placed = {key: value for key, value in found.items() if key not in {"space", "res"}}
        if other == suffix and ending == ".nii.gz" and "res" in found and placed == entities:
            return path
    raise FileNotFoundError(f"{native.name} is not there in template space")


def _find(
    outputs: Sequence[Path], kind: str, desc: str | None, *, suffix: str = "", extension: str = ".nii.gz", space: str | None = "any"
) -> Path:
    """The published file of one kind; ``space`` None is the participant's own."""
    for path in outputs:
        entities, found, ending = parse_name(path.name)
        wanted = suffix or ("mask" if desc == "brain" else found)
        if (
            path.parent.name == kind and ending == extension and found == wanted and entities.get("desc") == desc
            and (entities.get("space") is None) == (space is None) and "label" not in entities
        ):  # fmt: skip
            return path
    raise FileNotFoundError(f"no {suffix or desc} in {kind}")
