"""Measures of a participant's runs that come from images: taken once, when the participant is done, for the group level."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from brainfm_cli.bids.inputs import find_runs
from brainfm_cli.config import Selection
from brainfm_cli.programs.fmriprep import template_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


def measures_path(root: Path, label: str) -> Path:
    """Where a participant's measures from images lie, for the group level: run name to measure to value."""
    return root / "logs" / "quality" / f"sub-{label}.json"


def measure_runs(root: Path, label: str, output_spaces: Sequence[str]) -> dict[str, dict[str, float]]:
    """Temporal SNR and brain volume of every run, in the first output space that is a template's.

    Every volume is read, so that a truncated series is found.

    Raises
    ------
    InputDatasetError
        A series or mask cannot be read.
    """
    from brainfm_cli.signals.temporal import temporal_snr

    space = next((space for space in output_spaces if template_of(space)), None)
    if space is None:  # surfaces, or the participant's own space
        return {}
    resolution = next((part[4:] for part in space.split(":") if part.startswith("res-") and part != "res-native"), None)
    measured = {}
    for run in find_runs(root, label, Selection(), space=template_of(space), resolution=resolution):
        if run.mask is not None:
            tsnr, brain_ml = temporal_snr(run.bold, run.mask, first=_non_steady(run.confounds))
            finite = {"tsnr": tsnr, "brain_ml": brain_ml} if np.isfinite(tsnr) else {"brain_ml": brain_ml}
            measured[run.key.name] = {name: round(value, 4) for name, value in finite.items()}
    return measured


def _non_steady(confounds: Path | None) -> int:
    if confounds is None:
        return 0
    with confounds.open(encoding="utf-8") as stream:
        return sum(name.startswith("non_steady_state_outlier") for name in stream.readline().rstrip("\n").split("\t"))
