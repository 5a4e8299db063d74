"""Single-trial responses from BOLD and events: least squares separate (Mumford 2012) or one ridge model of all trials.

Each trial's response is a weighted sum of frames whose weights depend on the design alone. They are computed first, so that the
series is read once, frame by frame. Designs are nilearn's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from brainfm_cli.config import Frozen
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.signals.volumes import open_series

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from numpy.typing import NDArray

    from brainfm_cli.signals.trial_maps import VoxelMask

MOTION = ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")


class SingleTrialSettings(Frozen):
    """How single-trial responses are estimated."""

    estimator: Literal["lss", "ridge"] = "lss"
    """lss: each trial against all others, one model per trial; ridge: all trials in one penalised model, for fast designs."""
    penalty: float = Field(default=0.1, gt=0)
    """For ridge: share of the design's mean squared size that is added to its diagonal."""
    hrf: Literal["glover", "spm", "glover + derivative"] = "glover"
    """Haemodynamic response; with a derivative, timing may differ between voxels."""
    high_pass_hz: float = Field(default=0.01, ge=0)
    """Cosine drifts below this frequency are removed."""
    motion: bool = True
    """Whether the six motion parameters of the confounds table are removed."""
    unit: Literal["event", "block"] = "event"
    """block joins successive events of one trial_type whose onsets are at most ``gap_s`` apart."""
    gap_s: float = Field(default=4.0, gt=0)
    """Longest pause inside a block, seconds from onset to onset."""
    where: dict[str, tuple[str, ...]] = {}
    """Columns of the events and the values of trials, e.g. {trial_type: [face, house]}; all events where empty."""
    mask: str | None = None
    """Label of ``desc-`` of the mask; unset takes the only one of the dataset, or for BOLD the brain mask."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SingleTrials:
    """Responses of one run."""

    responses: NDArray[np.float32]
    """(trials, voxels) percent signal change, voxels in C order of the mask."""
    table: pd.DataFrame
    """One row per trial: the event's columns, of a block its first event's."""
    empty_voxels: int
    """Voxels without a signal, whose responses are zero."""


def choose_trials(
    events: pd.DataFrame, settings: SingleTrialSettings, *, num_frames: int, repetition_time_s: float, where: Path
) -> pd.DataFrame:
    """The trials of a run: chosen events, or blocks of them; ``onset`` and ``duration`` as numbers.

    Raises
    ------
    InputDatasetError
        A column is missing, a time is no number, no event is chosen, or one lies outside the run.
    """
    missing = [name for name in ("onset", "duration", *settings.where) if name not in events]
    if missing:
        raise InputDatasetError(f"the events have no column '{missing[0]}'", where=where, fix="events need onset and duration, in seconds")
    chosen = events
    for column, values in settings.where.items():
        chosen = chosen[chosen[column].astype(str).isin(values)]
    if chosen.empty:
        raise InputDatasetError("no event is a trial", where=where, fix="change single_trial.where")
    chosen = chosen.copy()
    for name in ("onset", "duration"):
        try:
            chosen[name] = chosen[name].replace("n/a", "0").astype(float) if name == "duration" else chosen[name].astype(float)
        except ValueError as error:
            raise InputDatasetError(f"'{name}' is no number: {error}", where=where, fix="onsets and durations are seconds") from error
    seconds = num_frames * repetition_time_s
    outside = chosen[~((chosen["onset"] >= 0) & (chosen["onset"] < seconds))]
    if len(outside):
        raise InputDatasetError(
            f"row {int(outside.index[0]) + 1}: the trial at {outside['onset'].iloc[0]:g} s lies outside the run of {seconds:g} s",
            where=where,
            fix="check that events and image are of the same run",
        )
    chosen = chosen.sort_values("onset", kind="stable")
    return _blocks(chosen, settings.gap_s, where) if settings.unit == "block" else chosen.reset_index(drop=True)


def read_motion(confounds: Path, num_frames: int) -> NDArray[np.float64]:
    """(frames, 6) motion parameters of a confounds table.

    Raises
    ------
    InputDatasetError
        The table lacks them, or has another number of rows than the image has frames.
    """
    import pandas as pd

    try:
        table = pd.read_csv(confounds, sep="\t", na_values=["n/a"], usecols=list(MOTION))
    except (OSError, ValueError) as error:
        raise InputDatasetError(
            f"the confounds hold no motion parameters: {error}", where=confounds, fix="or set single_trial.motion=false"
        ) from error
    if len(table) != num_frames:
        raise InputDatasetError(
            f"the confounds have {len(table)} rows and the image {num_frames} frames", where=confounds, fix="give the table of this run"
        )
    return table[list(MOTION)].fillna(0.0).to_numpy(np.float64)


def estimate_trials(
    bold: Path,
    voxels: VoxelMask,
    trials: pd.DataFrame,
    motion: NDArray[np.float64] | None,
    settings: SingleTrialSettings,
    *,
    repetition_time_s: float,
) -> SingleTrials:
    """Responses of every trial in every voxel of a mask, in percent of the voxel's mean; one frame is in memory at a time.

    ``motion`` (frames, parameters) is removed.

    Raises
    ------
    InputDatasetError
        The image is on another grid than the mask, or the design has fewer frames than columns.
    """
    places = np.flatnonzero(voxels.mask)
    with open_series(bold) as (header, volumes):
        if header.shape != voxels.mask.shape or np.abs(header.affine - voxels.affine).max() > 0.01:
            raise InputDatasetError("the image is on another grid than the mask", where=bold, fix="resample the mask to the image")
        weights = trial_weights(trials, motion, settings, num_frames=header.num_frames, repetition_time_s=repetition_time_s, where=bold)
        stored = np.ravel_multi_index(np.unravel_index(places, header.shape), header.shape, order="F")
        responses, total = np.zeros((len(trials), len(places))), np.zeros(len(places))
        for frame, volume in enumerate(volumes):
            values = volume[stored].astype(np.float64) * header.slope + header.intercept
            if not np.isfinite(values).all():
                raise InputDatasetError(f"voxels of the mask have no number in frame {frame}", where=bold, fix="leave them out of the mask")
            total += values
            responses += weights[:, frame, None] * values
        mean = total / header.num_frames
    empty = mean <= 0
    responses = np.where(empty, 0.0, 100 * responses / np.where(empty, 1.0, mean))
    return SingleTrials(responses=responses.astype(np.float32), table=trials, empty_voxels=int(empty.sum()))


def trial_weights(
    trials: pd.DataFrame,
    motion: NDArray[np.float64] | None,
    settings: SingleTrialSettings,
    *,
    num_frames: int,
    repetition_time_s: float,
    where: Path,
) -> NDArray[np.float64]:
    """(trials, frames) weights whose product with a voxel's series is each trial's coefficient."""
    own, derivative, nuisance = _design(trials, motion, settings, num_frames, repetition_time_s)
    if nuisance.shape[1] + 2 >= num_frames:
        raise InputDatasetError(f"{num_frames} frames are too few for {nuisance.shape[1]} nuisance columns", where=where, fix="raise single_trial.high_pass_hz")  # fmt: skip
    if settings.estimator == "ridge":
        basis = np.linalg.qr(nuisance)[0]
        clean = own - basis @ (basis.T @ own)
        gram = clean.T @ clean
        weights = np.linalg.solve(gram + settings.penalty * np.trace(gram) / len(gram) * np.eye(len(gram)), clean.T)
        return weights - (weights @ basis) @ basis.T
    rows = []
    for trial in range(own.shape[1]):
        parts = [own[:, trial], own.sum(1) - own[:, trial]] if own.shape[1] > 1 else [own[:, trial]]
        if derivative is not None:
            parts += [derivative[:, trial], derivative.sum(1) - derivative[:, trial]]
        rows.append(np.linalg.pinv(np.column_stack([*parts, nuisance]))[0])
    return np.stack(rows)


def _design(
    trials: pd.DataFrame, motion: NDArray[np.float64] | None, settings: SingleTrialSettings, num_frames: int, repetition_time_s: float
) -> tuple[NDArray[np.float64], NDArray[np.float64] | None, NDArray[np.float64]]:
    """(frames, trials) responses expected of each trial alone, their derivatives, and (frames, columns) of what is removed."""
    import pandas as pd
    from nilearn.glm.first_level import make_first_level_design_matrix

    times = (np.arange(num_frames) + 0.5) * repetition_time_s  # slices were taken around the middle of the frame
    names = [f"trial{number:05d}" for number in range(len(trials))]
    events = pd.DataFrame({"onset": trials["onset"].to_numpy(), "duration": trials["duration"].to_numpy(), "trial_type": names})
    design = make_first_level_design_matrix(times, events, hrf_model=settings.hrf, drift_model=None)
    drift = make_first_level_design_matrix(times, None, drift_model="cosine", high_pass=settings.high_pass_hz).to_numpy()
    own = design[names].to_numpy()
    late = [f"{name}_derivative" for name in names]
    derivative = design[late].to_numpy() if late[0] in design else None
    moved = [] if motion is None else [motion - motion.mean(0)]
    return own, derivative, np.column_stack([drift, *moved])


def _blocks(events: pd.DataFrame, gap_s: float, where: Path) -> pd.DataFrame:
    if "trial_type" not in events:
        raise InputDatasetError("blocks need a column trial_type", where=where, fix="use single_trial.unit=event")
    new = (events["trial_type"] != events["trial_type"].shift()) | (events["onset"].diff() > gap_s)
    number = new.cumsum()
    ends = (events["onset"] + events["duration"]).groupby(number).max()
    first = events.groupby(number).first()
    first["duration"] = ends - first["onset"]
    first["events"] = events.groupby(number).size()
    return first.reset_index(drop=True)
