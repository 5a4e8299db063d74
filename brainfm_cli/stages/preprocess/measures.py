"""Measures of a participant's runs that come from images: taken once, when the participant is done, for the group level."""

from __future__ import annotations

from typing import TYPE_CHECKING

from brainfm_cli.bids.inputs import find_runs
from brainfm_cli.config import Selection
from brainfm_cli.errors import InputNotFoundError

if TYPE_CHECKING:
    from pathlib import Path


def measures_path(root: Path, label: str) -> Path:
    """Where a participant's measures from images lie, for the group level: run name to measure to value."""
    return root / "logs" / "quality" / f"sub-{label}.json"


def measure_runs(root: Path, label: str) -> dict[str, dict[str, float]]:
    """Temporal SNR and brain volume of every run of a participant that has a series in a standard space."""
    from brainfm_cli.signals.temporal import temporal_snr

    try:
        runs = find_runs(root, label, Selection())
    except InputNotFoundError:  # surfaces or the participant's own space only
        return {}
    measured = {}
    for run in runs:
        if run.mask is not None:
            tsnr, brain_ml = temporal_snr(run.bold, run.mask, first=_non_steady(run.confounds))
            measured[run.key.name] = {name: round(value, 4) for name, value in (("tsnr", tsnr), ("brain_ml", brain_ml)) if value == value}  # noqa: PLR0124
    return measured


def _non_steady(confounds: Path | None) -> int:
    if confounds is None:
        return 0
    with confounds.open(encoding="utf-8") as stream:
        return sum(name.startswith("non_steady_state_outlier") for name in stream.readline().rstrip("\n").split("\t"))
