"""An answer for each study: the encoder's slice features, gated attention over them, clinical variables, and a head that is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from brainfm_cli.bids.slice_cohort import SliceCohort
from brainfm_cli.learning.slice_samples import all_slices
from brainfm_cli.models.mri_encoder import Context, MriEncoder, MriEncoding
from brainfm_cli.models.study_head import GatedAttentionHead
from brainfm_cli.systems.mri_language.encoder import context_of
from brainfm_cli.systems.mri_language.outcomes import StudyTask, balanced_weights
from brainfm_cli.systems.mri_language.people_batches import PeopleBatches, study_key

_ENCODE_BATCH = 32
HEAD_WIDTH, HEAD_DROPOUT = 64, 0.2
HEAD_FILE = "head.safetensors"


@dataclass(frozen=True, kw_only=True)
class StudyFeatures:
    """What the frozen encoder makes of every slice of some people."""

    slices: dict[str, Tensor]
    """(slices, features) by participant."""
    rows: dict[str, NDArray[np.int64]]
    """(slices,) place of each in the cohort's index."""


def features_of(found: MriEncoding) -> Tensor:
    """(slices, 3 · width) class token, mean and maximum over the tokens."""
    return torch.cat([found.summary, found.tokens.mean(dim=1), found.tokens.amax(dim=1)], dim=1).float()


class EncoderReader(nn.Module):
    """The encoder as something that makes features of slices."""

    def __init__(self, encoder: MriEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, context: Context) -> Tensor:
        """(slices, features) of (slices, *pixels) in [0, 1]."""
        return features_of(self.encoder(images, context))


@torch.no_grad()
def read_slices(reader: nn.Module, cohort: SliceCohort, people: Sequence[str]) -> StudyFeatures:
    """(slices, features) of what a reader makes of every slice; people without slices are left out."""
    device = next(reader.parameters()).device
    reader.eval()
    source = all_slices(cohort)
    names = cohort.slices["participant"].to_numpy().astype(str)
    slices, rows = {}, {}
    for label in people:
        mine = np.flatnonzero(names == label)
        parts = []
        for start in range(0, len(mine), _ENCODE_BATCH):
            batch = source.batch(mine[start : start + _ENCODE_BATCH], None).to(device)
            parts.append(reader(batch.images.float() / 255, context_of(batch)).float().cpu())
        if parts:
            slices[label], rows[label] = torch.cat(parts), mine
    return StudyFeatures(slices=slices, rows=rows)


def encode_studies(encoder: MriEncoder, cohort: SliceCohort, people: Sequence[str]) -> StudyFeatures:
    """(slices, 3 · width) features of every slice by the encoder."""
    return read_slices(EncoderReader(encoder), cohort, people)


@dataclass(frozen=True, kw_only=True)
class StudyBatch:
    """Studies with their slices side by side."""

    slices: Tensor
    """(batch, most slices, features), zero where a study has fewer."""
    present: Tensor
    """(batch, most slices) bool."""
    labels: Tensor
    """(batch,) int64 class, grade or cause."""
    times: Tensor
    """(batch,) float64 follow-up; zero without survival."""
    clinical: Tensor
    """(batch, clinical variables)."""
    keys: Tensor
    """(batch,) int64."""

    def to(self, device: torch.device) -> StudyBatch:
        """The same on a device."""
        return StudyBatch(**{name: getattr(self, name).to(device) for name in ("slices", "present", "labels", "times", "clinical", "keys")})


@dataclass(frozen=True, kw_only=True)
class StudyBatches(PeopleBatches[StudyBatch]):
    """Batches of studies, as the training loop wants them."""

    features: StudyFeatures
    """Of everybody."""
    task: StudyTask
    """What is asked, and what is known of everybody."""
    clinical: Mapping[str, NDArray[np.float32]]
    """(clinical variables,) by participant."""
    sequences: Mapping[str, NDArray[np.int64]]
    """(slices,) number of the sequence of each slice, by participant: one is hidden now and then, so that studies that lack it are read too."""
    drop_sequence: float = 0.3
    """Share of training studies with several sequences of which one is hidden."""

    def batch(self, people: Sequence[str], epoch: int | None) -> StudyBatch:
        """Studies of these people."""
        most = max(len(self.features.slices[label]) for label in people)
        width = next(iter(self.features.slices.values())).shape[1]
        slices, present = torch.zeros(len(people), most, width), torch.zeros(len(people), most, dtype=torch.bool)
        keys = [study_key(self.seed, label, epoch) for label in people]
        for place, label in enumerate(people):
            found = self.features.slices[label]
            slices[place, : len(found)] = found
            present[place, : len(found)] = torch.from_numpy(self._kept(label, keys[place], epoch))
        return StudyBatch(
            slices=slices,
            present=present,
            labels=torch.from_numpy(self.task.classes_of(people)),
            times=torch.from_numpy(self.task.times_of(people) if self.task.is_survival else np.zeros(len(people))),
            clinical=torch.from_numpy(np.stack([self.clinical[label] for label in people])),
            keys=torch.tensor(keys),
        )

    def _kept(self, label: str, key: int, epoch: int | None) -> NDArray[np.bool_]:
        numbers = self.sequences[label]
        kinds = np.unique(numbers)
        draw = np.random.default_rng(key)
        if epoch is None or len(kinds) < 2 or draw.random() >= self.drop_sequence:
            return np.ones(len(numbers), bool)
        return np.asarray(numbers != draw.choice(kinds), bool)


@dataclass(frozen=True, kw_only=True)
class StudyTuner:
    """The head with what is needed to train it."""

    head: GatedAttentionHead
    """What is trained."""
    task: StudyTask
    """What is asked."""
    class_weights: Tensor | None
    """(classes,) weights that make every class count alike; none for grades and survival."""

    @property
    def module(self) -> nn.Module:
        """The module that is trained."""
        return self.head

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term."""
        return {"answer": 1.0}

    def losses(self, batch: StudyBatch, *, epoch: float) -> dict[str, Tensor]:  # noqa: ARG002
        """The loss of the task: balanced cross-entropy, likelihood of grades, or of survival."""
        scores, _ = self.head(batch.slices, batch.present, batch.clinical)
        return {"answer": self.task.loss(scores.float(), self.head.link, batch.labels, batch.times, self.class_weights)}


def new_head(task: StudyTask, features: int, clinical: int, people: Sequence[str], *, seed: int) -> GatedAttentionHead:
    """A head with fresh weights, which begins at what is known of ``people``."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GatedAttentionHead(
            features, task.outputs, width=HEAD_WIDTH, dropout=HEAD_DROPOUT, clinical=clinical, link=task.new_link(people)
        )


def new_tuner(source: StudyBatches, *, seed: int) -> StudyTuner:
    """A head with fresh weights, its features scaled by the training people's slices."""
    together = torch.cat([source.features.slices[label] for label in source.people])
    clinical = len(next(iter(source.clinical.values())))
    head = new_head(source.task, together.shape[1], clinical, source.people, seed=seed)
    head.set_scale(together.mean(dim=0), together.std(dim=0))
    return StudyTuner(head=head, task=source.task, class_weights=balanced_weights(source.task, source.people))


@torch.no_grad()
def study_scores(
    head: GatedAttentionHead, features: StudyFeatures, clinical: Mapping[str, NDArray[np.float32]], people: Sequence[str]
) -> tuple[Tensor, dict[str, NDArray[np.float32]]]:
    """(people, outputs) scores, and by participant the (slices,) weights that they rest on."""
    head.eval()
    scores, weights = [], {}
    for label in people:
        slices = features.slices[label][None]
        beside = torch.from_numpy(clinical[label])[None]
        found, weighed = head(slices, torch.ones(slices.shape[:2], dtype=torch.bool), beside)
        scores.append(found[0].double())
        weights[label] = weighed[0].numpy()
    return torch.stack(scores) if scores else torch.zeros(0, 1, dtype=torch.float64), weights


def load_head(folder: Path, task: StudyTask, features: int, clinical: int) -> GatedAttentionHead:
    """The head of a tuned model's folder."""
    from brainfm_cli.learning.checkpoints import load_weights

    head = new_head(task, features, clinical, (), seed=0)
    load_weights(head, folder / HEAD_FILE)
    head.eval()
    return head
