"""What crosses a border between rooms: small frozen records, shapes checked once when built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from brainfm_cli.errors import InputDatasetError

if TYPE_CHECKING:  # a plan names runs and needs no arrays
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class RunKey:
    """Which run: the BIDS entities that tell runs apart."""

    participant: str
    """Label without ``sub-``."""
    task: str
    """Label without ``task-``."""
    session: str | None = None
    """Label without ``ses-``."""
    acquisition: str | None = None
    """Label without ``acq-``."""
    direction: str | None = None
    """Label without ``dir-``."""
    run: str | None = None
    """Index as written, zero padding kept."""

    @property
    def entities(self) -> dict[str, str]:
        """The entities in BIDS short form, absent ones left out."""
        pairs = {
            "sub": self.participant,
            "ses": self.session,
            "task": self.task,
            "acq": self.acquisition,
            "dir": self.direction,
            "run": self.run,
        }
        return {key: value for key, value in pairs.items() if value is not None}

    @property
    def name(self) -> str:
        """``sub-01_ses-1_task-rest_run-1``."""
        return "_".join(f"{key}-{value}" for key, value in self.entities.items())


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFiles:
    """One preprocessed run, as found in a derivative."""

    key: RunKey
    """Which run."""
    bold: Path
    """Preprocessed BOLD, NIfTI or CIFTI dense series."""
    space: str
    """Template name of the ``space-`` entity."""
    mask: Path | None
    """Brain mask on the BOLD grid; none for CIFTI."""
    confounds: Path | None
    """Confounds table; its JSON lies beside it."""
    repetition_time_s: float
    """Seconds between frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RegionTable:
    """The regions of an atlas, in the order of every series and matrix made from it."""

    names: tuple[str, ...]
    """Unique region names."""
    networks: tuple[str | None, ...] = ()
    """Functional network of each region (Yeo 7 names), empty where the atlas states none."""
    centroids_mm: NDArray[np.float32] | None = None
    """(regions, 3) centres in template millimetres (RAS), none where unknown."""

    def __post_init__(self) -> None:
        if len(set(self.names)) != len(self.names):
            repeated = sorted({name for name in self.names if self.names.count(name) > 1})
            raise InputDatasetError(f"region names repeat: {', '.join(repeated[:5])}", fix="make the atlas table's names unique")
        if self.networks and len(self.networks) != len(self.names):
            raise InputDatasetError("the atlas table has another number of networks than names", fix="mend the atlas table")
        if self.centroids_mm is not None and self.centroids_mm.shape != (len(self.names), 3):
            raise InputDatasetError("the atlas table's centroids are not (regions, 3)", fix="mend the atlas table")


@dataclass(frozen=True, kw_only=True, slots=True)
class ParcellatedRun:
    """Region series of one run in one atlas, after denoising."""

    key: RunKey
    """Which run."""
    atlas: str
    """Atlas label in entity form, e.g. ``Schaefer2018_seg-7n_scale-100``."""
    space: str
    """Template of the BOLD series."""
    series: NDArray[np.float64]
    """(frames, regions); ``nan`` columns for regions below the coverage rule; censored frames left out."""
    coverage: NDArray[np.float64]
    """(regions,) share of each region's voxels inside the brain mask, 0 to 1."""
    repetition_time_s: float
    """Seconds between frames."""

    def __post_init__(self) -> None:
        if self.series.ndim != 2 or self.coverage.shape != (self.series.shape[1],):
            raise InputDatasetError(f"series {self.series.shape} and coverage {self.coverage.shape} disagree", fix="report this as a bug")


@dataclass(frozen=True, kw_only=True, slots=True)
class Prediction:
    """What a model says of one participant."""

    participant: str
    """Participant key, as in the cohort index."""
    target: str
    """Column of participants.tsv."""
    value: float
    """Probability of the positive class, or the predicted value of a continuous target."""
    probabilities: dict[str, float]
    """Probability per class; empty for continuous targets."""
    model: str
    """Identifier of the model."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ReconstructedSlice:
    """A slice, what an encoder saw of it, and how its hidden part was filled."""

    participant: str
    """Label without ``sub-``."""
    sequence: str
    """Contrast."""
    images: dict[str, NDArray[np.float32]]
    """(x, y) or (x, y, z) intensities in [0, 1]: original, visible, and each method's filling."""
