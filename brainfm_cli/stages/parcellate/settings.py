"""Settings of ``brainfm parcellate``, and the atlases that they name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, field_validator

from brainfm_cli.atlases.catalogue import DEFAULT_ATLASES, find_atlas
from brainfm_cli.bids.codings import LabelTable
from brainfm_cli.bids.stimuli import StimulusSettings
from brainfm_cli.config import Settings
from brainfm_cli.errors import SettingsError
from brainfm_cli.signals.denoise import Denoising
from brainfm_cli.signals.single_trial import SingleTrialSettings

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from brainfm_cli.atlases.atlas import Atlas
    from brainfm_cli.bids.inputs import Source

_OF_GROUP = ("labels", "site_column", "min_frames", "stimuli")


class ParcellateSettings(Settings):
    """Settings of ``brainfm parcellate``."""

    atlases: tuple[str, ...] = ()
    """Atlas names. Empty: Schaefer100 and AAL116 for images, and every atlas of series that are parcellated already."""
    denoise: Denoising = Denoising()
    """How region series are cleaned; series of other programs are taken as they are."""
    min_coverage: float = Field(default=0.5, ge=0, le=1)
    """Regions with a smaller share inside the brain mask are n/a."""
    space: str | None = None
    """Template label of ``space-``; unset takes each run's first of MNI152NLin2009cAsym, MNI152NLin6Asym, other MNI152 variants, fsLR."""
    resolution: str | None = None
    """Label of ``res-``, where a run exists at several."""
    matrices: tuple[Literal["pearson", "fisherz", "partial"], ...] = ("pearson", "fisherz", "partial")
    """Connectivity matrices that are written."""
    repetition_time_s: float | None = Field(default=None, gt=0, lt=60)
    """For ready-made series whose files state none, seconds."""
    min_frames: int = Field(default=20, ge=2)
    """Group level: runs with fewer kept frames are left out of the cohort."""
    labels: LabelTable = {}
    """Group level: target → dataset → column, classes or continuous, and missing codes. Needed for every target of several datasets."""
    site_column: str | None = None
    """Group level: column of participants.tsv that holds the site."""
    trials: bool = False
    """Single-trial responses in a mask, in place of region series (--trials)."""
    single_trial: SingleTrialSettings = SingleTrialSettings()
    """With --trials: how responses are estimated, and in which mask."""
    stimuli: StimulusSettings = StimulusSettings()
    """With --trials, group level: what was seen."""

    @field_validator("atlases", "matrices")
    @classmethod
    def _once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(values)) != len(values):
            raise ValueError("a name is given twice")
        return values

    def of_participants(self) -> ParcellateSettings:
        """The same with the group level's own fields at their defaults: they may change without parcellating again."""
        fields = type(self).model_fields
        return self.model_copy(update={name: fields[name].get_default() for name in _OF_GROUP})


def choose_atlases(settings: ParcellateSettings, source: Source, datasets: Mapping[str, Path]) -> tuple[Atlas, ...]:
    """The atlases that images of ``source`` are averaged in; none for ready-made series, which bring their own.

    Raises
    ------
    InputNotFoundError
        An atlas does not exist or its file is absent.
    SettingsError
        Two names mean atlases whose files would have one name.
    """
    if source.kind != "images":
        return ()
    atlases = tuple(find_atlas(name, datasets) for name in settings.atlases or DEFAULT_ATLASES)
    seen: dict[str, str] = {}
    for name, atlas in zip(settings.atlases or DEFAULT_ATLASES, atlases, strict=True):
        if atlas.label in seen:
            raise SettingsError(f"atlases '{seen[atlas.label]}' and '{name}' are both called {atlas.label} in file names", fix="choose one")
        seen[atlas.label] = name
        atlas.path  # noqa: B018  (raises where the image is absent)
    return atlases
