"""Tune an encoder of scans for a class or for lesions: fit on training people, choose on validation people, and what every fit stands beside."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from brainfm_cli.bids.slice_cohort import SEQUENCES, SliceCohort
from brainfm_cli.config import Frozen
from brainfm_cli.learning.clinical import ClinicalCoding
from brainfm_cli.learning.loop import TrainingPlan, TrainingResult, train
from brainfm_cli.learning.slice_samples import SliceBatches
from brainfm_cli.models.lora import plain_tensors
from brainfm_cli.models.study_head import GatedAttentionHead
from brainfm_cli.systems.mri_language.adaptation import (
    AdaptationSettings,
    AdaptingTuner,
    DrawnStudies,
    NetworkReader,
    ReadStudies,
    Tune,
    adapt_encoder,
)
from brainfm_cli.systems.mri_language.augmentation import AugmentSettings
from brainfm_cli.systems.mri_language.classification import (
    EncoderReader,
    StudyBatches,
    StudyFeatures,
    encode_studies,
    new_tuner,
    read_slices,
    study_scores,
)
from brainfm_cli.systems.mri_language.encoder import MriLanguage
from brainfm_cli.systems.mri_language.outcomes import LinearAnswer, StudyTask, balanced_weights, fit_linear_answer
from brainfm_cli.systems.mri_language.segmentation import (
    ScanSegmenter,
    SequenceSettings,
    balanced_rows,
    items_of,
    masked_rows,
    new_segmenter,
)

if TYPE_CHECKING:
    from brainfm_cli.config import Execution
    from brainfm_cli.learning.scan_tuning import TuningPeople
    from brainfm_cli.models.mri_encoder import MriEncoder

_RISK_SET = 32  # least people whose risks a Cox loss compares at once: fewer compare too little, more leave too few steps
_TEMPERATURES = np.round(np.geomspace(0.25, 8.0, 41), 4)
_BIN_MM = 10.0
_CUTS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


class ScanTuningRecord(Frozen):
    """``tuning`` of a model folder's config.yaml."""

    task: Literal["classification", "grading", "survival", "segmentation"]
    """What the model was tuned for."""
    target: str
    """Column of participants.tsv, or lesion."""
    tune: Tune = "linear"
    """What was trained of the encoder: nothing, low-rank additions, or everything."""
    adaptation: AdaptationSettings = AdaptationSettings()
    """Of lora and full."""
    classes: tuple[str, ...] = ()
    """Classes of the column by index."""
    ordered: bool = False
    """Whether the classes have an order."""
    temperature: float = 1.0
    """Logits are divided by it, fitted on validation people."""
    method: Literal["cox", "discrete"] | None = None
    """Of survival: which model."""
    causes: tuple[str, ...] = ()
    """Of survival: the event, and the competing end where there is one."""
    times: tuple[float, ...] = ()
    """Of survival: times at which curves are told."""
    horizons: tuple[float, ...] = ()
    """Of survival: times at which risk is told and scored."""
    unit: str = ""
    """Of survival: unit of time."""
    baseline: tuple[tuple[float, ...], ...] = ()
    """Of Cox models: cumulative baseline hazard at each time, by cause."""
    clinical: ClinicalCoding = ClinicalCoding()
    """How clinical variables become numbers."""
    labels: dict[int, str] = {}
    """Lesion labels by value."""
    together: bool = False
    """Of segmentation: whether the sequences that show a place are read as one."""
    smallest_lesion: int = 0
    """Predicted lesions below so many voxels are dropped, chosen on validation people."""
    sequences: tuple[str, ...] = ()
    """Sequences that are read; all where empty."""
    size: int
    """Pixels along each side."""
    plane: str
    """Which way slices run."""
    people: int
    """Training people."""
    encoder_sha256: str
    """Hash of the pretrained encoder's weights."""

    @property
    def task_of_studies(self) -> StudyTask:
        """What studies are asked, without anybody's answer."""
        if self.task == "survival":
            assert self.method is not None  # noqa: S101  (written with the task)
            return StudyTask(kind=self.method, labels={}, count=len(self.causes), edges=self.times)
        return StudyTask(kind="grading" if self.task == "grading" else "classification", labels={}, count=len(self.classes))


@dataclass(frozen=True, kw_only=True)
class FittedStudies:
    """A head fitted on one encoder's features."""

    head: GatedAttentionHead
    """In evaluation mode."""
    task: StudyTask
    """What was asked."""
    temperature: float
    """Logits of classes are divided by it."""
    baseline: torch.Tensor | None
    """(times, causes) cumulative baseline hazards of a Cox model."""
    features: StudyFeatures
    """Of everybody."""
    clinical: Mapping[str, NDArray[np.float32]]
    """(variables,) by participant."""
    clinical_only: LinearAnswer | None
    """The linear model of clinical variables where the head began; none without such variables."""
    result: TrainingResult
    """How the fit ended."""

    def answer(self, people: Sequence[str]) -> NDArray[np.float64]:
        """(people, classes) probabilities, or (people, times, causes) cumulative incidences."""
        scores, _ = study_scores(self.head, self.features, self.clinical, people)
        found = self.task.answer(scores.to(torch.float32), self.head.link, self.baseline)
        return sharpen(found, self.temperature) if self.task.kind == "classification" else found


def fit_studies(
    encoder: MriEncoder,
    cohort: SliceCohort,
    task: StudyTask,
    people: TuningPeople,
    plan: TrainingPlan,
    *,
    clinical: Mapping[str, NDArray[np.float32]] | None = None,
    batch_size: int,
    execution: Execution,
    folder: Path,
) -> FittedStudies:
    """Encode every slice once, then fit gated attention and a head; goes on from ``folder`` where it was killed.

    With clinical variables the head begins as their linear model, to which images add.
    """
    features = encode_studies(encoder, cohort, tuple(task.labels))
    beside = clinical if clinical is not None else {label: np.zeros(0, np.float32) for label in task.labels}
    source = study_batches(features, cohort, task, people, beside, batch_size=batch_size, seed=plan.seed)
    tuner = new_tuner(source, seed=plan.seed)
    known = None
    if len(next(iter(beside.values()))):
        known = fit_linear_answer(task, beside, people.role("train"), people.role("validation"))
        tuner.head.start_from(known.weights, known.bias)
        if tuner.head.link is not None and known.link is not None:
            tuner.head.link.load_state_dict(known.link.state_dict())
    result = train(tuner, source, plan, execution, folder)
    tuner.head.load_state_dict(result.weights)
    return finish_fit(tuner.head.cpu().eval(), features, task, people, beside, known, result)


def adapt_studies(
    begun: FittedStudies,
    encoder: MriEncoder | None,
    like: MriEncoder,
    cohort: SliceCohort,
    people: TuningPeople,
    plan: TrainingPlan,
    *,
    tune: Tune,
    settings: AdaptationSettings,
    batch_size: int,
    execution: Execution,
    folder: Path,
) -> tuple[FittedStudies, MriEncoder | None]:
    """Train reader and head together from where a linear fit ended; gives back the adapted copy of the encoder.

    Without ``encoder`` the reader is a plain network of about as many parameters as ``like`` with fresh weights, and so is its head.
    """
    task, clinical = begun.task, begun.clinical
    adapted = None if encoder is None else adapt_encoder(encoder, tune, settings, seed=plan.seed)
    if adapted is None:
        with torch.random.fork_rng():
            torch.manual_seed(plan.seed)
            reader: torch.nn.Module = NetworkReader(like)
        first = read_slices(reader, cohort, tuple(people.role("train")))
        tuner = new_tuner(study_batches(first, cohort, task, people, clinical, batch_size=batch_size, seed=plan.seed), seed=plan.seed)
        head = tuner.head
        if begun.clinical_only is not None:
            head.start_from(begun.clinical_only.weights, begun.clinical_only.bias)
    else:
        reader, head = EncoderReader(adapted), copy.deepcopy(begun.head)
    source = DrawnStudies(
        cohort=cohort, rows=begun.features.rows, task=task, clinical=clinical, people=people.role("train"),
        validation_people=people.role("validation"), batch_size=batch_size, slices=settings.slices, seed=plan.seed,
    )  # fmt: skip
    system = AdaptingTuner(
        module=ReadStudies(reader, head.requires_grad_()), task=task, class_weights=balanced_weights(task, people.role("train")),
        settings=settings, share=settings.rate if tune == "full" and adapted is not None else 1.0,
    )  # fmt: skip
    result = train(system, source, plan, execution, folder)
    system.module.load_state_dict(result.weights)
    system.module.cpu().eval()
    features = read_slices(reader, cohort, tuple(task.labels))
    return finish_fit(head, features, task, people, clinical, begun.clinical_only, result), adapted


def study_batches(
    features: StudyFeatures, cohort: SliceCohort, task: StudyTask, people: TuningPeople, clinical: Mapping[str, NDArray[np.float32]],
    *, batch_size: int, seed: int,
) -> StudyBatches:  # fmt: skip
    """Batches of training and validation people; Cox losses compare the risks of many people at once."""
    numbers = cohort.slices["sequence"].map({name: place for place, name in enumerate(SEQUENCES)}).to_numpy(np.int64)
    return StudyBatches(
        features=features,
        task=task,
        clinical=clinical,
        sequences={label: np.asarray(numbers[rows], np.int64) for label, rows in features.rows.items()},
        people=people.role("train"),
        validation_people=people.role("validation"),
        batch_size=max(batch_size, _RISK_SET) if task.kind == "cox" else batch_size,
        seed=seed,
    )


def finish_fit(
    head: GatedAttentionHead, features: StudyFeatures, task: StudyTask, people: TuningPeople, clinical: Mapping[str, NDArray[np.float32]],
    known: LinearAnswer | None, result: TrainingResult,
) -> FittedStudies:  # fmt: skip
    """The temperature of classes from validation people and the baseline of a Cox model from training people."""
    validation, training = people.role("validation"), people.role("train")
    temperature = 1.0
    if task.kind == "classification":
        scores, _ = study_scores(head, features, clinical, validation)
        temperature = fit_temperature(task.answer(scores, None, None), task.classes_of(validation))
    baseline = task.baseline(study_scores(head, features, clinical, training)[0], training)
    return FittedStudies(
        head=head, task=task, temperature=temperature, baseline=baseline, features=features, clinical=clinical, clinical_only=known, result=result
    )  # fmt: skip


def sharpen(chances: NDArray[np.float64], temperature: float) -> NDArray[np.float64]:
    """Probabilities as if their logits were divided by ``temperature``."""
    powered = np.clip(chances, 1e-12, 1) ** (1 / temperature)
    return np.asarray(powered / powered.sum(1, keepdims=True), np.float64)


def fit_temperature(chances: NDArray[np.float64], truth: NDArray[np.int64]) -> float:
    """The temperature of least log-loss on validation people (Guo et al. 2017); 1 where fewer than ten are there."""
    if len(truth) < 10:
        return 1.0
    losses = [-np.log(np.clip(sharpen(chances, t)[np.arange(len(truth)), truth], 1e-12, 1)).mean() for t in _TEMPERATURES]
    return float(_TEMPERATURES[int(np.argmin(losses))])


def fit_segmenter(
    encoder: MriEncoder,
    cohort: SliceCohort,
    people: TuningPeople,
    plan: TrainingPlan,
    *,
    values: Sequence[int],
    augment: AugmentSettings,
    batch_size: int,
    execution: Execution,
    folder: Path,
    tune: Tune = "linear",
    adaptation: AdaptationSettings | None = None,
    sequences: SequenceSettings | None = None,
) -> tuple[ScanSegmenter, TrainingResult]:
    """Fit the decoder on slices with and without lesions, and what ``tune`` says of a copy of the encoder; goes on from ``folder`` where it was killed."""
    adaptation, sequences = adaptation or AdaptationSettings(), sequences or SequenceSettings()
    masked = [masked_rows(cohort, people.role(name)) for name in ("train", "validation")]
    items, together = items_of(cohort, np.concatenate(masked), together=sequences.together)
    rows, held_out = (balanced_rows(cohort, np.intersect1d(items, mine), seed=plan.seed) for mine in masked)
    source = SliceBatches(
        cohort=cohort, rows=rows, validation_rows=held_out, batch_size=min(batch_size, max(2, len(rows))), seed=plan.seed, masks=True,
        together=together, hidden=sequences.hidden,
    )  # fmt: skip
    copied = encoder if tune == "linear" else adapt_encoder(encoder, tune, adaptation, seed=plan.seed)
    segmenter = new_segmenter(
        copied, values, augment, seed=plan.seed, together=sequences.together, adapted=tune != "linear",
        share=adaptation.rate if tune == "full" else 1.0,
    )  # fmt: skip
    result = train(segmenter, source, plan, execution, folder)
    segmenter.model.load_state_dict(result.weights)
    segmenter.model.cpu().eval()
    return segmenter, result


@dataclass(frozen=True, kw_only=True)
class MeanMask:
    """Where training people have lesions, by plane and height: the floor of segmentation."""

    shares: dict[tuple[str, int], NDArray[np.float32]]
    """(classes, *pixels) share of slices with each class, by plane and height in tenths of millimetres times ten."""
    cut: float
    """Share from which a pixel counts as lesion, best on the training slices."""

    def chances(self, plane: str, z_mm: NDArray[np.float32], classes: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """(classes, items, *pixels): 1 for the class that is called."""
        out = np.zeros((classes, len(z_mm), *shape), np.float32)
        out[0] = 1
        for place, height in enumerate(z_mm):
            found = self.shares.get((plane, int(np.floor(height / _BIN_MM))))
            if found is not None:
                called = found[1:].sum(axis=0) >= self.cut
                out[:, place][:, called] = np.eye(classes, dtype=np.float32)[1 + found[1:].argmax(axis=0)[called]].T
        return out


def fit_mean_mask(cohort: SliceCohort, people: Sequence[str], values: Sequence[int]) -> MeanMask:
    """The mean mask of training people's slices and the cut of highest Dice on them."""
    rows = masked_rows(cohort, people)
    table = cohort.slices
    planes, heights = table["plane"].to_numpy().astype(str)[rows], np.floor(table["z_mm"].to_numpy()[rows] / _BIN_MM).astype(int)
    shares: dict[tuple[str, int], NDArray[np.float32]] = {}
    members: dict[tuple[str, int], NDArray[np.int64]] = {}
    for plane, height in sorted(set(zip(planes.tolist(), heights.tolist(), strict=True))):
        members[plane, height] = rows[(planes == plane) & (heights == height)]
        masks = cohort.masks(members[plane, height])
        shares[plane, height] = np.stack([(masks == value).mean(0) for value in (0, *values)]).astype(np.float32)
    scored = []
    for cut in _CUTS:
        common = both = 0.0
        for key, mine in members.items():
            called = shares[key][1:].sum(0) >= cut
            lesion = cohort.masks(mine) > 0
            common += float((lesion & called).sum())
            both += float(lesion.sum() + called.sum() * len(mine))
        scored.append(2 * common / both if both else 0.0)
    return MeanMask(shares=shares, cut=_CUTS[int(np.argmax(scored))])


def random_twin(system: MriLanguage, *, seed: int) -> MriLanguage:
    """The same encoder with weights that were never trained: what pretraining must beat."""
    with torch.random.fork_rng():
        torch.manual_seed(seed + 1)
        twin = system.settings.build()
    twin.model.eval()
    return twin


def encoder_hash(encoder: MriEncoder) -> str:
    """SHA-256 of an encoder's own weights, without what was added to them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(plain_tensors(encoder).items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
