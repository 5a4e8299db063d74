"""Settings of predict group for mri-language models: tasks, floors, few-shot curves."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from brainfm_cli.config import Frozen
from brainfm_cli.learning.clinical import ClinicalSettings
from brainfm_cli.learning.follow_up import FollowUpSettings
from brainfm_cli.learning.loop import OptimiserSettings, ScheduleSettings
from brainfm_cli.learning.targets import TargetSettings
from brainfm_cli.signals.slice_packing import SliceSettings
from brainfm_cli.systems.mri_language.adaptation import AdaptationSettings, Tune
from brainfm_cli.systems.mri_language.augmentation import AugmentSettings
from brainfm_cli.systems.mri_language.comparison import ScanFloors
from brainfm_cli.systems.mri_language.segmentation import SequenceSettings


class ScanTask(Frozen):
    """One task that the encoder is tuned for and tested on."""

    task: Literal["classification", "grading", "survival", "segmentation"]
    """As of prompt-tune."""
    target: str | None = None
    """Column of a class or grade."""
    coding: TargetSettings = TargetSettings()
    """How the column is read."""
    follow_up: FollowUpSettings = FollowUpSettings()
    """Of survival."""
    clinical: ClinicalSettings = ClinicalSettings()
    """Clinical variables beside the images."""


class ScanFewShot(Frozen):
    """Learning curves."""

    shares: tuple[float, ...] = ()
    """Shares of training people, e.g. [0.1, 0.5, 1]; none unless asked for. Not for segmentation."""
    draws: int = Field(default=3, ge=1)
    """Draws of people (and first weights) at each share; the whole is drawn once per seed too."""


class ScanEvaluationSettings(Frozen):
    """An mri-language encoder on several tasks, each beside its floors on the same folds."""

    tasks: dict[str, ScanTask] = {}
    """By name, e.g. {grade: {task: grading, target: who_grade, clinical: {columns: [age]}}}. Without any, group makes a table of predictions."""
    cam: Literal["none", "gradcam", "hirescam"] = "none"
    """participant: write volumes and pictures of where a scan speaks for a class, a grade or risk, scored on lesion masks where there are any.
    gradcam weighs channels by their mean gradient; hirescam takes gradient times what differs from the slice's median, place by place."""
    tune: Tune = "linear"
    """What is trained of the encoder, as of prompt-tune."""
    adaptation: AdaptationSettings = AdaptationSettings()
    """Of lora and full, and of the plain network."""
    floors: ScanFloors = ScanFloors(network=True)
    """What stands beside the model."""
    slices: SliceSettings = SliceSettings()
    """How scans become slices; the size is the model's."""
    validation_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of a fold's training people who choose the epoch and the penalties."""
    segmentation: SequenceSettings = SequenceSettings()
    """For segmentation: whether the sequences of a study are read together."""
    augment: AugmentSettings = AugmentSettings()
    """For segmentation: how training slices are varied."""
    tolerance_mm: float = Field(default=2.0, gt=0)
    """For segmentation: tolerance of the surface Dice."""
    few_shot: ScanFewShot = ScanFewShot()
    """Learning curves of the model beside the same on an encoder without pretraining."""
    schedule: ScheduleSettings = ScheduleSettings(
        epochs=40, batch_size=16, patience=10, optimiser=OptimiserSettings(learning_rate=1e-3, warmup_epochs=1.0)
    )
    """How long and how fast heads are trained."""
