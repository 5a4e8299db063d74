"""Tune an encoder of scans for a class or for lesions: fit on training people, choose on validation people, and what every fit stands beside."""

from __future__ import annotations

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
from brainfm_cli.learning.loop import TrainingPlan, TrainingResult, train
from brainfm_cli.learning.slice_samples import SliceBatches
from brainfm_cli.models.study_head import GatedAttentionHead
from brainfm_cli.systems.mri_language.augmentation import AugmentSettings
from brainfm_cli.systems.mri_language.classification import StudyBatches, StudyFeatures, classify, encode_studies, new_classifier
from brainfm_cli.systems.mri_language.encoder import MriLanguage
from brainfm_cli.systems.mri_language.segmentation import ScanSegmenter, balanced_rows, masked_rows, new_segmenter

if TYPE_CHECKING:
    from brainfm_cli.config import Execution
    from brainfm_cli.learning.scan_tuning import TuningPeople
    from brainfm_cli.models.mri_encoder import MriEncoder

_TEMPERATURES = np.round(np.geomspace(0.25, 8.0, 41), 4)
_BIN_MM = 10.0
_CUTS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5)


class ScanTuningRecord(Frozen):
    """``tuning`` of a model folder's config.yaml."""

    task: Literal["classification", "segmentation"]
    """What the model was tuned for."""
    target: str
    """Column of participants.tsv, or lesion."""
    classes: tuple[str, ...] = ()
    """Classes of the column by index."""
    ordered: bool = False
    """Whether the classes have an order."""
    temperature: float = 1.0
    """Logits are divided by it, fitted on validation people."""
    labels: dict[int, str] = {}
    """Lesion labels by value."""
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
    """Hash of the encoder's weights, which tuning leaves as they were."""


@dataclass(frozen=True, kw_only=True)
class FittedClassifier:
    """A head fitted on one encoder's features."""

    head: GatedAttentionHead
    """In evaluation mode."""
    temperature: float
    """Logits are divided by it."""
    features: StudyFeatures
    """Of everybody."""
    result: TrainingResult
    """How the fit ended."""

    def chances(self, people: Sequence[str]) -> NDArray[np.float64]:
        """(people, classes) probabilities."""
        return sharpen(classify(self.head, self.features, people)[0], self.temperature)


def fit_classifier(
    encoder: MriEncoder,
    cohort: SliceCohort,
    labels: Mapping[str, int],
    people: TuningPeople,
    plan: TrainingPlan,
    *,
    classes: int,
    batch_size: int,
    execution: Execution,
    folder: Path,
) -> FittedClassifier:
    """Encode every slice once, then fit gated attention and a head; goes on from ``folder`` where it was killed."""
    features = encode_studies(encoder, cohort, tuple(labels))
    numbers = cohort.slices["sequence"].map({name: place for place, name in enumerate(SEQUENCES)}).to_numpy(np.int64)
    source = StudyBatches(
        features=features,
        labels=labels,
        sequences={label: np.asarray(numbers[rows], np.int64) for label, rows in features.rows.items()},
        people=people.role("train"),
        validation_people=people.role("validation"),
        batch_size=batch_size,
        seed=plan.seed,
    )
    classifier = new_classifier(source, classes, seed=plan.seed)
    result = train(classifier, source, plan, execution, folder)
    classifier.head.load_state_dict(result.weights)
    head = classifier.head.cpu().eval()
    validation = people.role("validation")
    truth = np.array([labels[label] for label in validation])
    temperature = fit_temperature(classify(head, features, validation)[0], truth)
    return FittedClassifier(head=head, temperature=temperature, features=features, result=result)


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
) -> tuple[ScanSegmenter, TrainingResult]:
    """Fit the decoder on slices with and without lesions; goes on from ``folder`` where it was killed."""
    rows = balanced_rows(cohort, masked_rows(cohort, people.role("train")), seed=plan.seed)
    held_out = balanced_rows(cohort, masked_rows(cohort, people.role("validation")), seed=plan.seed)
    source = SliceBatches(
        cohort=cohort, rows=rows, validation_rows=held_out, batch_size=min(batch_size, max(2, len(rows))), seed=plan.seed, masks=True
    )
    segmenter = new_segmenter(encoder, values, augment, seed=plan.seed)
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
    """SHA-256 of an encoder's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
