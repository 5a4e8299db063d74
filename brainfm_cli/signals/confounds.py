"""The confounds of a run, with fMRIPrep's names and definitions. Pure numbers in, a table and its description out.

Series here are (frames, voxels) of the realigned run inside its brain mask; they may be memory-mapped, and no function
holds a copy of more than a block of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from brainfm_cli.errors import InputDatasetError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]
    Series = NDArray[np.float32]
    Mask = NDArray[np.bool_]

MOTION = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
HIGH_PASS_PERIOD_S = 128.0
FD_RADIUS_MM = 50.0
FD_THRESHOLD_MM, STD_DVARS_THRESHOLD = 0.5, 1.5
STEADY_STATE_FRAMES = 40
_NORMALISED_MEDIAN = 1000.0
_VARIANCE_SHARE = 0.5
_BLOCK_BYTES = 64 << 20
_DESCRIPTIONS = {
    "trans_x": {"Description": "Translation along left-right axis.", "Units": "mm"},
    "trans_y": {"Description": "Translation along anterior-posterior axis.", "Units": "mm"},
    "trans_z": {"Description": "Translation along superior-inferior axis.", "Units": "mm"},
    "rot_x": {"Description": "Rotation about left-right axis. Also known as \"pitch\".", "Units": "rad"},
    "rot_y": {"Description": "Rotation about anterior-posterior axis. Also known as \"roll\".", "Units": "rad"},
    "rot_z": {"Description": "Rotation about superior-inferior axis. Also known as \"yaw\".", "Units": "rad"},
    "framewise_displacement": {"Description": "Sum of absolute motion from the frame before (Power 2012), head radius 50 mm.", "Units": "mm"},
    "rmsd": {"Description": "Root-mean-square displacement from the frame before (Jenkinson 1999).", "Units": "mm"},
    "dvars": {"Description": "Root mean square over voxels of the change from the frame before, at a median intensity of 1000."},
    "std_dvars": {"Description": "DVARS divided by its expectation without artefact (Nichols 2013)."},
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Components:
    """Principal components of one noise mask (CompCor), those that explain half of its variance."""

    series: Floats
    """(frames, components) with unit norm over the steady frames, 0 before."""
    singular_values: Floats
    """(components,) singular values of the normalised series."""
    variance: Floats
    """(components,) share of variance explained by each."""


def non_steady_frames(first_volumes: Series) -> int:
    """Number of frames at the beginning that are not in steady state: mean intensity far from the rest of the first 40.

    Parameters
    ----------
    first_volumes
        (up to 40 frames, voxels) of the raw run, all voxels.
    """
    clipped = np.clip(first_volumes, 0, np.percentile(first_volumes, 99.8))
    means = clipped.mean(1, dtype=np.float64)
    distance = np.abs(means - np.median(means))
    spread = np.median(distance)
    if spread == 0:
        return 0
    outlying = 0.6745 * distance / spread > 3.5  # Iglewicz & Hoaglin 1993
    return int(np.argmin(outlying)) if not outlying.all() else 0


def framewise_displacement(motion: Floats) -> Floats:
    """(frames,) sum of absolute changes of six motion parameters, rotations as arcs at 50 mm; NaN for the first frame."""
    change = np.abs(np.diff(motion, axis=0)) * [1, 1, 1, FD_RADIUS_MM, FD_RADIUS_MM, FD_RADIUS_MM]
    return np.r_[np.nan, change.sum(1)]


def dvars(series: Series) -> tuple[Floats, Floats]:
    """DVARS and standardised DVARS, (frames,) each; NaN for the first frame.

    Source: Power 2012; Nichols 2013, as nipype computes them: voxels without spread left out, robust SD from quartiles.
    """
    frames = len(series)
    scale = _NORMALISED_MEDIAN / _median(series)
    squares, expected, voxels = np.zeros(frames - 1), 0.0, 0
    quarter = [int(np.floor(share * (frames - 1))) for share in (0.25, 0.75)]
    for block in _blocks(series):
        values = block.astype(np.float64) * scale
        parted = np.partition(values, quarter, axis=0)
        spread = (parted[quarter[1]] - parted[quarter[0]]) / 1.349
        values, spread = values[:, spread > 0], spread[spread > 0]
        centred = values - values.mean(0)
        lag = (centred[1:] * centred[:-1]).sum(0) / (centred**2).sum(0)
        squares += (np.diff(values, axis=0) ** 2).sum(1)
        expected += float((np.sqrt(2 * (1 - lag)) * spread).sum())
        voxels += values.shape[1]
    if not voxels:
        raise InputDatasetError("no voxel of the brain mask changes in time", fix="look at the series: it seems to hold one image repeated")
    plain = np.sqrt(squares / voxels)
    return np.r_[np.nan, plain], np.r_[np.nan, plain / (expected / voxels)]


def cosine_basis(frames: int, repetition_time_s: float, *, period_s: float = HIGH_PASS_PERIOD_S) -> Floats:
    """(frames, cosines) slow cosines of at least half a period of ``period_s``; none for short runs."""
    count = max(int(np.floor(2 * frames * repetition_time_s / period_s)), 1) - 1
    steps = np.arange(frames)[:, None] + 0.5
    return np.sqrt(2 / frames) * np.cos(np.pi / frames * steps * np.arange(1, count + 1))


def noise_components(series: Series, voxels: Mask, *, repetition_time_s: float, first: int = 0) -> Components:
    """Components that explain half the variance inside a noise mask, after removing mean and slow drift.

    Parameters
    ----------
    voxels
        (voxels,) the noise mask within the series.
    first
        First steady frame; rows before are 0.
    """
    frames = len(series) - first
    basis = np.column_stack([cosine_basis(frames, repetition_time_s), np.ones(frames)])
    orthonormal = np.linalg.qr(basis)[0]
    gram = np.zeros((frames, frames))
    for block in _blocks(series[first:], np.flatnonzero(voxels)):
        values = block.astype(np.float64)
        values = values - orthonormal @ (orthonormal.T @ values)
        spread = values.std(0)
        values = values / np.where(spread > 1e-9, spread, 1)
        gram += values @ values.T
    power, vectors = np.linalg.eigh(gram)
    power, vectors = np.maximum(power[::-1], 0), vectors[:, ::-1]
    if power.sum() <= 0:
        return Components(series=np.zeros((len(series), 0)), singular_values=np.zeros(0), variance=np.zeros(0))
    share = power / power.sum()
    count = int(np.searchsorted(np.cumsum(share), _VARIANCE_SHARE)) + 1
    kept = vectors[:, :count]
    # An eigenvector's sign is arbitrary: fix it, so that repeats agree.
    kept = kept * np.sign(kept[np.abs(kept).argmax(0), np.arange(count)])
    return Components(
        series=np.concatenate([np.zeros((first, count)), kept]), singular_values=np.sqrt(power[:count]), variance=share[:count]
    )


def mean_signals(series: Series, masks: Mapping[str, Mask]) -> dict[str, Floats]:
    """(frames,) mean of the series within each mask of its voxels; NaN where a mask is empty."""
    names = list(masks)
    weights = np.stack([masks[name] for name in names], 1).astype(np.float64)
    with np.errstate(invalid="ignore"):
        weights /= weights.sum(0)
    total = np.zeros((len(series), len(names)))
    for block, columns in _located_blocks(series, np.arange(series.shape[1])):
        total += block.astype(np.float64) @ weights[columns]
    return {name: total[:, index] for index, name in enumerate(names)}


def build_table(
    *,
    signals: Mapping[str, Floats],
    motion: Floats,
    rmsd: Floats,
    dvars_pair: tuple[Floats, Floats],
    components: Mapping[str, Components],
    repetition_time_s: float,
    first: int,
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The confounds table and the description of its columns.

    Parameters
    ----------
    signals
        ``global_signal``, ``csf``, ``white_matter`` and ``csf_wm``.
    motion
        (frames, 6) in the order of :data:`MOTION`.
    components
        By noise mask: ``CSF``, ``WM`` and ``combined``.
    first
        Number of frames before steady state.
    """
    frames = len(motion)
    columns: dict[str, Floats] = {}
    for name in ("global_signal", "csf", "white_matter"):
        columns |= expand(name, signals[name])
    columns["csf_wm"] = signals["csf_wm"]
    columns["std_dvars"], columns["dvars"] = dvars_pair[1], dvars_pair[0]
    columns["framewise_displacement"], columns["rmsd"] = framewise_displacement(motion), rmsd
    described: dict[str, Any] = {name: {"Method": "Mean"} for name in ("global_signal", "csf", "white_matter", "csf_wm")} | dict(
        _DESCRIPTIONS
    )
    for prefix, mask in (("c", "CSF"), ("w", "WM"), ("a", "combined")):
        _add_components(columns, described, f"{prefix}_comp_cor_", mask, components[mask])
    basis = cosine_basis(frames - first, repetition_time_s)
    for index in range(basis.shape[1]):
        columns[f"cosine{index:02d}"] = np.r_[np.zeros(first), basis[:, index]]
    columns |= _spikes("non_steady_state_outlier", range(first), frames)
    for index, name in enumerate(MOTION):
        columns |= expand(name, motion[:, index])
    columns |= _spikes("motion_outlier", np.flatnonzero(_moving(columns)).tolist(), frames)
    return pd.DataFrame(columns), described


def expand(name: str, values: Floats) -> dict[str, Floats]:
    """A signal, its backward difference, and the squares of both."""
    change = np.r_[np.nan, np.diff(values)]
    return {name: values, f"{name}_derivative1": change, f"{name}_derivative1_power2": change**2, f"{name}_power2": values**2}


def _moving(columns: Mapping[str, Floats]) -> Mask:
    with np.errstate(invalid="ignore"):  # the first frame has no change
        return (columns["framewise_displacement"] > FD_THRESHOLD_MM) | (columns["std_dvars"] > STD_DVARS_THRESHOLD)


def _spikes(prefix: str, frames: Sequence[int], total: int) -> dict[str, Floats]:
    return {f"{prefix}{index:02d}": (np.arange(total) == frame).astype(np.float64) for index, frame in enumerate(frames)}


def _add_components(columns: dict[str, Floats], described: dict[str, Any], prefix: str, mask: str, found: Components) -> None:
    cumulative = np.cumsum(found.variance)
    for index in range(found.series.shape[1]):
        name = f"{prefix}{index:02d}"
        columns[name] = found.series[:, index]
        described[name] = {
            "Method": "aCompCor",
            "Mask": mask,
            "Retained": True,
            "SingularValue": round(float(found.singular_values[index]), 10),
            "VarianceExplained": round(float(found.variance[index]), 10),
            "CumulativeVarianceExplained": round(float(cumulative[index]), 10),
        }


def _blocks(series: Series, columns: NDArray[np.intp] | None = None) -> Iterator[Series]:
    wanted = np.arange(series.shape[1]) if columns is None else columns
    for block, _ in _located_blocks(series, wanted):
        yield block


def _located_blocks(series: Series, columns: NDArray[np.intp]) -> Iterator[tuple[Series, NDArray[np.intp]]]:
    width = max(1, _BLOCK_BYTES // (8 * len(series)))
    for start in range(0, len(columns), width):
        part = columns[start : start + width]
        yield series[:, part], part


def _median(series: Series) -> float:
    """Median of all values to a millionth of their range, from a histogram, so that no copy of the series is made."""
    low = min(float(block.min()) for block in _blocks(series))
    high = max(float(block.max()) for block in _blocks(series))
    if not high > low:
        return high or 1.0
    counts = np.zeros(1_000_000, np.int64)
    for block in _blocks(series):
        place = ((block.astype(np.float64) - low) * ((len(counts) - 1) / (high - low))).astype(np.int64)
        counts += np.bincount(place.ravel(), minlength=len(counts))
    position = int(np.searchsorted(np.cumsum(counts), series.size / 2))
    return (low + (position + 0.5) * (high - low) / (len(counts) - 1)) or 1.0
