"""Denoising of region series: nilearn's strategies on an fMRIPrep confounds table, and its ``signal.clean``.

Averaging a region and regressing confounds are both linear, so cleaning the averages equals averaging cleaned voxels.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field, model_validator

from brainfm_cli.config import Frozen
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, SettingsError

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

Strategy = Literal["none", "none+gsr", "simple", "simple+gsr", "scrubbing", "scrubbing+gsr", "compcor", "compcor+gsr"]
Expansion = Literal["basic", "derivatives", "power2", "full"]

_MOTION = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")
_SUFFIXES: dict[Expansion, tuple[str, ...]] = {
    "basic": ("",),
    "derivatives": ("", "_derivative1"),
    "power2": ("", "_power2"),
    "full": ("", "_derivative1", "_power2", "_derivative1_power2"),
}
_CUTOFF_S = 128.0  # period of fMRIPrep's slowest kept fluctuation, by which it makes its cosines
_REMEDY = "run preprocessing again so that the confounds table is complete, or choose another --denoise-strategy"


class Denoising(Frozen):
    """How region series are cleaned. Names and defaults are those of nilearn's ``load_confounds_strategy``."""

    strategy: Strategy = "simple"
    """none, simple (motion, tissue, drift), scrubbing (also drops moving frames) or compcor; ``+gsr`` adds the global signal."""
    motion: Expansion = "full"
    """Motion columns: basic (6), derivatives (12), power2 (12) or full (24)."""
    wm_csf: Expansion | None = None
    """White-matter and CSF columns; unset takes the strategy's own: basic for simple, full for scrubbing."""
    global_signal: Expansion = "basic"
    """Global-signal columns of ``+gsr``."""
    n_compcor: int | Literal["all"] = "all"
    """Number of anatomical CompCor components."""
    fd_threshold: float = Field(default=0.5, gt=0)
    """Scrubbing: framewise displacement in millimetres above which a frame is dropped."""
    std_dvars_threshold: float = Field(default=1.5, gt=0)
    """Scrubbing: standardised DVARS above which a frame is dropped."""
    scrub: int = Field(default=5, ge=0)
    """Scrubbing: runs of kept frames shorter than this are dropped, too."""
    detrend: bool = False
    """Remove a linear trend; the cosines of all strategies but none already remove slow drift."""
    high_pass: float | None = Field(default=None, gt=0)
    """Butterworth cut-off in Hz, besides the cosines."""
    low_pass: float | None = Field(default=None, gt=0)
    """Butterworth cut-off in Hz."""
    standardize: Literal["zscore_sample", "psc", "none"] = "zscore_sample"
    """zscore_sample, psc (per cent signal change) or none."""

    @model_validator(mode="after")
    def _pass_band(self) -> Denoising:
        if self.high_pass is not None and self.low_pass is not None and self.high_pass >= self.low_pass:
            raise ValueError(f"high_pass {self.high_pass} Hz is not below low_pass {self.low_pass} Hz")
        return self

    @property
    def base(self) -> str:
        """The strategy without ``+gsr``."""
        return self.strategy.removesuffix("+gsr")

    @property
    def needs_confounds(self) -> bool:
        """Whether the strategy reads columns of a confounds table."""
        return self.strategy != "none"


@dataclass(frozen=True, kw_only=True)
class Nuisance:
    """What a strategy takes from one run's confounds table."""

    regressors: NDArray[np.float64]
    """(frames, columns), mean zero over the kept frames; no column where nothing is regressed."""
    names: tuple[str, ...]
    """Names of the columns."""
    kept: NDArray[np.bool_]
    """(frames,) False for non-steady-state frames and motion outliers."""
    fd: NDArray[np.float64] | None
    """(frames,) framewise displacement in millimetres, ``nan`` where unknown; none where the table has none."""


def read_nuisance(path: Path | None, denoising: Denoising, *, num_frames: int, repetition_time_s: float) -> Nuisance:
    """Regressors and kept frames of one run, as nilearn's ``load_confounds_strategy`` gives them.

    Non-steady-state frames are left out under every strategy, also under none, where a table is at hand.

    Raises
    ------
    InputDatasetError
        The table is absent, unreadable, has another number of rows, lacks columns, has columns that contradict one
        another or values that are no numbers, or keeps no frame.
    InputNotFoundError
        The table does not exist.
    """
    if path is None:
        if denoising.needs_confounds:
            raise InputDatasetError(f"the run has no confounds table, which strategy '{denoising.strategy}' needs", fix=_REMEDY)
        return Nuisance(regressors=np.empty((num_frames, 0)), names=(), kept=np.ones(num_frames, bool), fd=None)
    table = _read_table(path, num_frames)
    fd = _column(table, "framewise_displacement", path) if "framewise_displacement" in table else None
    names = _select(table, path, denoising, num_frames * repetition_time_s)
    kept = np.ones(num_frames, bool)
    for name in table.columns:
        if "non_steady_state" in name:
            kept &= _column(table, name, path) == 0
    if denoising.base == "scrubbing":
        kept &= ~_moving_frames(table, path, denoising)
    if not kept.any():
        raise InputDatasetError("every frame is an outlier", where=path, fix="exclude the run, or raise denoise.fd_threshold")
    regressors = np.column_stack([_column(table, name, path) for name in names]) if names else np.empty((num_frames, 0))
    _check_derivatives(table, names, path)
    # The first row of derivatives is empty; nilearn repeats the second there.
    first = np.isnan(regressors[0])
    regressors[0, first] = regressors[1, first]
    if np.isnan(regressors).any():
        frame, column = np.argwhere(np.isnan(regressors))[0]
        raise InputDatasetError(f"confound '{names[column]}' is empty at frame {frame}", where=path, fix=_REMEDY)
    return Nuisance(regressors=regressors - regressors[kept].mean(0), names=names, kept=kept, fd=fd)


def clean_series(series: NDArray[np.float64], nuisance: Nuisance, denoising: Denoising, *, repetition_time_s: float) -> NDArray[np.float64]:
    """(kept frames, regions) cleaned series; outlier frames are interpolated before filters and left out afterwards.

    Raises
    ------
    InputDatasetError
        Fewer frames are kept than regression needs.
    SettingsError
        A cut-off lies above half the sampling rate.
    """
    from nilearn.signal import clean

    num_kept, num_regressors = int(nuisance.kept.sum()), nuisance.regressors.shape[1]
    if num_kept < num_regressors + 3:
        raise InputDatasetError(
            f"{num_kept} frames are left for {num_regressors} confounds: nothing would remain",
            fix="exclude the run, keep more frames, or choose a strategy with fewer confounds",
        )
    highest = max(denoising.low_pass or 0.0, denoising.high_pass or 0.0)
    if highest >= 0.5 / repetition_time_s:
        raise SettingsError(
            f"a cut-off of {highest} Hz is above half the sampling rate at a repetition time of {repetition_time_s} s",
            fix="lower denoise.low_pass or denoise.high_pass",
        )
    filtered = denoising.low_pass is not None or denoising.high_pass is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its advice on defaults; every argument is given here
        return clean(
            series,
            detrend=denoising.detrend,
            standardize=None if denoising.standardize == "none" else denoising.standardize,
            sample_mask=None if nuisance.kept.all() else np.flatnonzero(nuisance.kept),
            confounds=nuisance.regressors if num_regressors else None,
            filter="butterworth" if filtered else False,
            low_pass=denoising.low_pass,
            high_pass=denoising.high_pass,
            t_r=repetition_time_s,
        )


def _read_table(path: Path, num_frames: int) -> pd.DataFrame:
    import pandas as pd

    try:
        table = pd.read_csv(path, sep="\t", na_values=["n/a"])
    except FileNotFoundError as error:
        raise InputNotFoundError("the confounds table does not exist", where=path, fix=_REMEDY) from error
    except (OSError, ValueError) as error:
        raise InputDatasetError(f"the confounds table is unreadable: {error}", where=path, fix=_REMEDY) from error
    if len(table) != num_frames:
        raise InputDatasetError(
            f"the confounds table has {len(table)} rows, the series {num_frames} frames", where=path, fix="they must belong to the same run"
        )
    return table


def _column(table: pd.DataFrame, name: str, path: Path) -> NDArray[np.float64]:
    try:
        return table[name].to_numpy(np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise InputDatasetError(f"confound '{name}' holds text", where=path, fix=_REMEDY) from error


def _select(table: pd.DataFrame, path: Path, denoising: Denoising, duration_s: float) -> tuple[str, ...]:
    """Names of the strategy's columns, sorted."""
    wanted: list[str] = []
    if denoising.base != "none":
        wanted += _expand(_MOTION, denoising.motion)
        wanted += _cosines(table, path, duration_s)
    if denoising.base in {"simple", "scrubbing"}:
        wanted += _expand(("csf", "white_matter"), denoising.wm_csf or ("basic" if denoising.base == "simple" else "full"))
    if denoising.base == "compcor":
        wanted += _compcor(table, path, denoising)
    if denoising.strategy.endswith("+gsr"):
        wanted += _expand(("global_signal",), denoising.global_signal)
    missing = [name for name in wanted if name not in table]
    if missing:
        raise InputDatasetError(
            f"the confounds table lacks {len(missing)} of {len(wanted)} columns of strategy '{denoising.strategy}': {', '.join(missing[:6])}",
            where=path, fix=_REMEDY,
        )  # fmt: skip
    return tuple(sorted(set(wanted)))


def _expand(names: tuple[str, ...], expansion: Expansion) -> list[str]:
    return [name + suffix for name in names for suffix in _SUFFIXES[expansion]]


def _cosines(table: pd.DataFrame, path: Path, duration_s: float) -> list[str]:
    names = [name for name in table.columns if "cosine" in name]
    # nilearn goes on without them, and slow drift stays in; runs under 64 s have none.
    if not names and int(2 * duration_s / _CUTOFF_S) > 0:
        raise InputDatasetError(
            "the confounds table has no cosine columns (cosine00 …), without which slow drift would stay", where=path, fix=_REMEDY
        )
    return names


def _compcor(table: pd.DataFrame, path: Path, denoising: Denoising) -> list[str]:
    """Anatomical components of the combined mask, in order, as nilearn's ``anat_combined``."""
    sidecar = path.with_suffix(".json")
    try:
        described = read_json(sidecar)
        names = sorted(name for name in described if name.startswith("a_comp_cor_") and described[name]["Mask"] == "combined")
    except FileNotFoundError as error:
        raise InputDatasetError("strategy 'compcor' needs the JSON of the confounds table", where=sidecar, fix=_REMEDY) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputDatasetError(f"the JSON of the confounds table is unusable: {error}", where=sidecar, fix=_REMEDY) from error
    names = [name for name in names if name in table]
    if not names:
        raise InputDatasetError("the confounds table has no combined anatomical CompCor component", where=path, fix=_REMEDY)
    return names if denoising.n_compcor == "all" else names[: denoising.n_compcor]


def _moving_frames(table: pd.DataFrame, path: Path, denoising: Denoising) -> NDArray[np.bool_]:
    """(frames,) True where motion is above a threshold or too short a stretch lies between such frames."""
    missing = [name for name in ("framewise_displacement", "std_dvars") if name not in table]
    if missing:
        raise InputDatasetError(f"the confounds table lacks {', '.join(missing)}, which scrubbing needs", where=path, fix=_REMEDY)
    outlier = _column(table, "framewise_displacement", path) > denoising.fd_threshold  # the first frame's nan compares false
    outlier |= _column(table, "std_dvars", path) > denoising.std_dvars_threshold
    if not outlier.any():
        return outlier
    edges = np.flatnonzero(np.diff(np.r_[True, outlier, True].astype(int)))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        if stop - start < denoising.scrub:
            outlier[start:stop] = True
    return outlier


def _check_derivatives(table: pd.DataFrame, names: tuple[str, ...], path: Path) -> None:
    """Refuse tables whose derivative columns do not belong to their base: shuffled headers or rows."""
    for name in names:
        base = name.removesuffix("_derivative1")
        if base == name or base not in table:
            continue
        stated, computed = _column(table, name, path)[1:], np.diff(_column(table, base, path))
        if not (np.isfinite(stated).all() and np.isfinite(computed).all()) or min(stated.std(), computed.std()) < 1e-5:
            continue  # constant or rounded away: nothing to compare
        if np.corrcoef(stated, computed)[0, 1] < 0.9:
            raise InputDatasetError(
                f"confound '{name}' is not the derivative of '{base}': the table's columns or rows are shuffled", where=path, fix=_REMEDY
            )
