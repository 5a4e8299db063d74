"""Settings of prompt-tune for mri-language, what every task gives to the model folder, and who trains, chooses and tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from brainfm_cli.config import Settings
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.clinical import ClinicalSettings
from brainfm_cli.learning.follow_up import FollowUpSettings
from brainfm_cli.learning.loop import OptimiserSettings, ScheduleSettings
from brainfm_cli.learning.scan_tuning import divide_for_tuning
from brainfm_cli.learning.targets import TargetSettings
from brainfm_cli.learning.tuned import read_seen
from brainfm_cli.signals.slice_packing import SliceSettings
from brainfm_cli.systems.mri_language.adaptation import AdaptationSettings, Tune
from brainfm_cli.systems.mri_language.augmentation import AugmentSettings
from brainfm_cli.systems.mri_language.segmentation import SequenceSettings
from brainfm_cli.systems.mri_language.tuning import ScanTuningRecord, encoder_hash

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from brainfm_cli.bids.slice_cohort import SliceCohort
    from brainfm_cli.config import Execution
    from brainfm_cli.learning.loop import TrainingResult
    from brainfm_cli.learning.scan_tuning import TuningPeople
    from brainfm_cli.systems.mri_language import MriLanguage

_LEAST_PEOPLE = 5


class TuneScansSettings(Settings):
    """Settings of ``brainfm prompt-tune`` for mri-language models."""

    task: Literal["classification", "grading", "survival", "segmentation"] = "classification"
    """classification and grading learn a column (--target), grading one whose values have an order; survival learns follow_up;
    segmentation learns the lesion masks of the dataset."""
    target: str | None = None
    """Column of participants.tsv to learn (--target)."""
    coding: TargetSettings = TargetSettings()
    """How the column is read."""
    follow_up: FollowUpSettings = FollowUpSettings()
    """For survival: columns, codes and model."""
    clinical: ClinicalSettings = ClinicalSettings()
    """Clinical variables that are read beside the images; not for segmentation."""
    tune: Tune = "linear"
    """linear leaves the encoder as it is; lora adds low-rank weights to it; full trains a copy of it. Both begin where linear ends."""
    adaptation: AdaptationSettings = AdaptationSettings()
    """Of lora and full."""
    slices: SliceSettings = SliceSettings()
    """How scans become slices; the size is the model's."""
    test_fraction: float = Field(default=0.3, ge=0, lt=1)
    """Share of people who test, drawn within classes; the study design's 7:3. 0 tests nobody: then nothing is claimed."""
    validation_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of the others who choose the epoch, the temperature, penalties and the smallest lesion."""
    transductive: bool = False
    """Let people of the encoder's pretraining test; then said in every table."""
    random_encoder: bool = True
    """Whether the same is fitted on an encoder that was never pretrained, as a floor."""
    image_numbers: bool = True
    """Whether a linear model of intensities, head volume and asymmetry is one of the floors; not for segmentation."""
    network: bool = False
    """Whether a plain convolutional network, trained from scratch on the same people, is one of the floors; not for segmentation. Slow."""
    segmentation: SequenceSettings = SequenceSettings()
    """For segmentation: whether the sequences of a study are read together."""
    augment: AugmentSettings = AugmentSettings()
    """For segmentation: how training slices are varied."""
    tolerance_mm: float = Field(default=2.0, gt=0)
    """For segmentation: tolerance of the surface Dice."""
    schedule: ScheduleSettings = ScheduleSettings(
        epochs=40, batch_size=16, patience=10, optimiser=OptimiserSettings(learning_rate=1e-3, warmup_epochs=1.0)
    )
    """How long and how fast."""
    seed: int = Field(default=0, ge=0)
    """Seed of the split, first weights, order and augmentation."""


@dataclass(frozen=True, kw_only=True)
class TuningCall:
    """Everything that a task needs."""

    system: MriLanguage
    """The pretrained encoder."""
    cohort: SliceCohort
    """Packed slices."""
    chosen: tuple[str, ...]
    """People who take part."""
    settings: TuneScansSettings
    """As given."""
    execution: Execution
    """Device and precision."""
    folder: Path
    """The model folder to be."""
    model: Path
    """The folder of the pretrained model."""
    raw: Path
    """The BIDS dataset, for masks."""
    mask_roots: tuple[Path, ...]
    """Further datasets with masks."""

    @property
    def place(self) -> str:
        """The table of participants, for errors."""
        return str(self.cohort.root / "participants.tsv")

    def split(self, strata: dict[str, str]) -> TuningPeople:
        """Who trains, chooses and tests.

        Raises
        ------
        InputDatasetError
            Too few people, or too few whom the encoder has not seen.
        """
        settings = self.settings
        if len(strata) < _LEAST_PEOPLE and settings.test_fraction:
            raise InputDatasetError(
                f"{len(strata)} people can take part: {_LEAST_PEOPLE} are needed",
                where=self.cohort.root,
                fix="give more people with labels or masks",
            )
        return divide_for_tuning(
            strata, self.cohort.dataset_of, read_seen(self.model)["pretrained_on"], test=settings.test_fraction,
            validation=settings.validation_fraction, seed=settings.seed, transductive=settings.transductive,
        )  # fmt: skip

    def record(self, split: TuningPeople, **fields: Any) -> ScanTuningRecord:  # noqa: ANN401
        """What ``predict`` has to know."""
        settings = self.settings
        return ScanTuningRecord(
            task=settings.task, size=self.cohort.size, plane=settings.slices.plane, sequences=settings.slices.sequences, tune=settings.tune,
            adaptation=settings.adaptation, people=len(split.role("train")), encoder_sha256=encoder_hash(self.system.model.encoder), **fields,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a fit gives to the model folder."""

    record: ScanTuningRecord
    """For ``predict``."""
    scores: pd.DataFrame
    """Of test people, every method."""
    people_scores: pd.DataFrame
    """Predictions or scores person by person."""
    result: TrainingResult
    """How the fit ended."""
    files: list[Path]
    """Weights that were written."""
    notes: tuple[str, ...]
    """What the reader should know."""
