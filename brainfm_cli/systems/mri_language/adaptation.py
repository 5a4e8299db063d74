"""Train what reads the slices together with the head: low-rank additions, the whole encoder, or a plain network without pretraining."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from brainfm_cli.bids.slice_cohort import SliceCohort
from brainfm_cli.config import Frozen
from brainfm_cli.learning.checkpoints import load_weights
from brainfm_cli.learning.slice_samples import SliceBatch, SliceBatches, all_slices
from brainfm_cli.models.lora import add_low_rank, low_rank_tensors
from brainfm_cli.models.mri_encoder import Context, MriEncoder
from brainfm_cli.models.rivals import SliceNetwork
from brainfm_cli.models.study_head import GatedAttentionHead
from brainfm_cli.systems.mri_language.augmentation import AugmentSettings, make_view
from brainfm_cli.systems.mri_language.encoder import context_of
from brainfm_cli.systems.mri_language.outcomes import StudyTask
from brainfm_cli.systems.mri_language.people_batches import PeopleBatches

Tune = Literal["linear", "lora", "full"]
ADAPTED_FILE = "adapted.safetensors"
_READER = "reader."


class AdaptationSettings(Frozen):
    """How an encoder is tuned where it does not stay frozen."""

    rank: int = Field(default=8, ge=1)
    """lora: rank of what is added to each linear layer."""
    alpha: float = Field(default=16.0, gt=0)
    """lora: what is added is multiplied by alpha / rank."""
    slices: int = Field(default=8, ge=1)
    """Slices of a study that are read in a training step, drawn anew each time; all are read afterwards."""
    rate: float = Field(default=0.2, gt=0, le=1)
    """full: share of the learning rate that the encoder gets."""
    augment: AugmentSettings = AugmentSettings(flip=0.0)
    """How these slices are varied; flips exchange left and right and are off."""


def adapt_encoder(encoder: MriEncoder, tune: Tune, settings: AdaptationSettings, *, seed: int) -> MriEncoder:
    """A copy of the encoder whose trainable weights are those of ``tune``; the given one stays as it is."""
    adapted = copy.deepcopy(encoder)
    if tune == "lora":
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            add_low_rank(adapted, settings.rank, settings.alpha)
    else:
        adapted.requires_grad_(requires_grad=tune == "full")
    return adapted


def adapted_tensors(encoder: MriEncoder, tune: Tune) -> dict[str, Tensor]:
    """What was trained of an encoder."""
    return low_rank_tensors(encoder) if tune == "lora" else encoder.state_dict() if tune == "full" else {}


def load_adapted(encoder: MriEncoder, folder: Path, tune: Tune, settings: AdaptationSettings) -> MriEncoder:
    """The encoder of a tuned model's folder, in evaluation mode; the given one where it was not tuned.

    Raises
    ------
    CheckpointMismatchError
        The weights do not fit.
    """
    if tune == "linear":
        return encoder
    adapted = adapt_encoder(encoder, tune, settings, seed=0)
    beside = (
        {} if tune == "full" else {name: value for name, value in adapted.state_dict().items() if name not in low_rank_tensors(adapted)}
    )
    load_weights(adapted, folder / ADAPTED_FILE, beside=beside)
    return adapted.eval()


class NetworkReader(nn.Module):
    """A plain network of about as many parameters as the encoder, never pretrained; it is not told sequence, plane or place."""

    def __init__(self, like: MriEncoder) -> None:
        super().__init__()
        dims = like.shape.dims
        self.network = SliceNetwork(SliceNetwork.width_for(sum(one.numel() for one in like.parameters()), dims=dims), dims=dims)

    def forward(self, images: Tensor, context: Context) -> Tensor:  # noqa: ARG002  (as the encoder is called)
        """(slices, features) of (slices, *pixels) in [0, 1]."""
        return self.network(images)


@dataclass(frozen=True, kw_only=True)
class DrawnBatch:
    """Some slices of each of some studies."""

    slices: SliceBatch
    """Of all studies, one after the other."""
    study: Tensor
    """(slices,) int64 place of each slice's study."""
    labels: Tensor
    """(studies,) int64."""
    times: Tensor
    """(studies,) float64."""
    clinical: Tensor
    """(studies, clinical variables)."""

    @property
    def keys(self) -> Tensor:
        """(studies,) keys of their first slices: the loop weighs batches by their number."""
        return self.slices.keys[: len(self.labels)]

    def to(self, device: torch.device) -> DrawnBatch:
        """The same on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("study", "labels", "times", "clinical")}
        return DrawnBatch(slices=self.slices.to(device), **moved)


@dataclass(frozen=True, kw_only=True)
class DrawnStudies(PeopleBatches[DrawnBatch]):
    """Batches of studies of which a few slices are read, as the training loop wants them."""

    cohort: SliceCohort
    """Where the pixels are."""
    rows: Mapping[str, NDArray[np.int64]]
    """Places of each person's slices."""
    task: StudyTask
    """What is asked, and what is known of everybody."""
    clinical: Mapping[str, NDArray[np.float32]]
    """(clinical variables,) by participant."""
    slices: int
    """Slices per study."""

    def batch(self, people: Sequence[str], epoch: int | None) -> DrawnBatch:
        """Studies of these people: drawn slices in training, evenly spaced ones in validation."""
        chosen = [self._drawn(label, place, epoch) for place, label in enumerate(people)]
        return DrawnBatch(
            slices=self._source.batch(np.concatenate(chosen), epoch),
            study=torch.from_numpy(np.repeat(np.arange(len(people)), [len(one) for one in chosen])),
            labels=torch.from_numpy(self.task.classes_of(people)),
            times=torch.from_numpy(self.task.times_of(people) if self.task.is_survival else np.zeros(len(people))),
            clinical=torch.from_numpy(np.stack([self.clinical[label] for label in people])),
        )

    def _drawn(self, label: str, place: int, epoch: int | None) -> NDArray[np.int64]:
        mine = self.rows[label]
        if len(mine) <= self.slices:
            return mine
        if epoch is None:
            return mine[np.linspace(0, len(mine) - 1, self.slices).round().astype(np.int64)]
        draw = np.random.default_rng([self.seed, epoch, place, int(mine[0])])
        return np.sort(draw.choice(mine, self.slices, replace=False))

    @cached_property
    def _source(self) -> SliceBatches:
        return all_slices(self.cohort)


class ReadStudies(nn.Module):
    """What reads slices, and the head."""

    def __init__(self, reader: nn.Module, head: GatedAttentionHead) -> None:
        super().__init__()
        self.reader, self.head = reader, head


@dataclass(frozen=True, kw_only=True)
class AdaptingTuner:
    """Reader and head with what is needed to train both."""

    module: ReadStudies
    """What is trained."""
    task: StudyTask
    """What is asked."""
    class_weights: Tensor | None
    """(classes,) weights that make every class count alike."""
    settings: AdaptationSettings
    """Augmentation and the reader's share of the learning rate."""
    share: float
    """Share of the learning rate that the reader gets."""

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term."""
        return {"answer": 1.0}

    def rate_factor(self, name: str, progress: float) -> float:  # noqa: ARG002  (the same throughout)
        """Share of the learning rate of a parameter."""
        return self.share if name.startswith(_READER) else 1.0

    def losses(self, batch: DrawnBatch, *, epoch: float) -> dict[str, Tensor]:  # noqa: ARG002
        """The loss of the task."""
        slices = batch.slices
        if self.module.training:
            images = make_view(slices.images, slices.plane, slices.keys, self.settings.augment, view=0).seen
        else:
            images = slices.images.float() / 255
        found = self.module.reader(images, context_of(slices)).float()
        counts = torch.bincount(batch.study, minlength=len(batch.labels))
        place = torch.arange(len(found), device=found.device) - (counts.cumsum(0) - counts)[batch.study]
        together = found.new_zeros(len(counts), int(counts.max()), found.shape[1])
        together[batch.study, place] = found
        present = torch.arange(together.shape[1], device=found.device)[None] < counts[:, None]
        scores, _ = self.module.head(together, present, batch.clinical)
        return {"answer": self.task.loss(scores.float(), self.module.head.link, batch.labels, batch.times, self.class_weights)}
