"""What a captioner must beat, from the same training pictures: a constant sentence, and ridge regression to sentence vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from brainfm_cli.systems.brain_caption.decoding import list_viewings, scaled_responses

if TYPE_CHECKING:
    from brainfm_cli.bids.voxel_cohort import VoxelCohort
    from brainfm_cli.learning.voxel_samples import PersonTrials
    from brainfm_cli.models.voxel_encoder import VoxelScale
    from brainfm_cli.systems.brain_caption.decoding import Viewing

_PENALTIES = tuple(10.0**power for power in range(-3, 5))  # times the mean eigenvalue of the Gram matrix


@dataclass(frozen=True, kw_only=True)
class CaptionBank:
    """Captions of the training pictures with their vectors."""

    captions: tuple[str, ...]
    """Different sentences."""
    vectors: Tensor
    """(captions, width) unit vectors."""

    def nearest(self, vectors: Tensor) -> list[tuple[str, float]]:
        """The training caption nearest to each of (items, width) vectors, and its cosine."""
        cosines = functional.normalize(vectors.float(), dim=1) @ self.vectors.T
        best = cosines.max(dim=1)
        return [(self.captions[int(place)], float(value)) for place, value in zip(best.indices, best.values, strict=True)]

    def constant(self) -> str:
        """The caption nearest to the mean of all: the best single sentence in the sentence encoder's view."""
        return self.nearest(self.vectors.mean(dim=0, keepdim=True))[0][0]


def picture_vectors(names: Sequence[str], captions: Mapping[str, Sequence[str]], targets: Mapping[str, Tensor]) -> Tensor:
    """(pictures, width) unit mean of the vectors of each picture's captions."""
    return functional.normalize(torch.stack([torch.stack([targets[text] for text in captions[name]]).mean(0) for name in names]), dim=1)


@dataclass(frozen=True, kw_only=True)
class RidgeDecoder:
    """Ridge regression of one participant's responses to sentence vectors, through the Gram matrix of the training pictures."""

    participant: str
    """Whose."""
    training: Tensor
    """(pictures, voxels) averaged z-scores."""
    weights: Tensor
    """(pictures, width) dual coefficients."""
    offset: Tensor
    """(width,) mean of the training vectors."""
    penalty: float
    """Chosen on the validation pictures, as a multiple of the mean eigenvalue."""

    def predict(self, scaled: Tensor) -> Tensor:
        """(items, width) vectors, not of unit length."""
        return scaled.cpu().float() @ self.training.T @ self.weights + self.offset


def fit_ridge(
    scale: VoxelScale,
    cohort: VoxelCohort,
    training: PersonTrials,
    validation: PersonTrials,
    captions: Mapping[str, Sequence[str]],
    targets: Mapping[str, Tensor],
) -> RidgeDecoder:
    """Ridge on repeat-averaged responses of the training pictures; the penalty with the best mean cosine on validation pictures."""
    seen, held = list_viewings(training, "repeats"), list_viewings(validation, "repeats")
    x, y = _averages(scale, cohort, seen), picture_vectors([one.name for one in seen], captions, targets)
    other, wanted = _averages(scale, cohort, held), picture_vectors([one.name for one in held], captions, targets)
    offset = y.mean(dim=0)
    values, basis = torch.linalg.eigh((x @ x.T).double())
    values = values.clamp_min(0)
    rotated = basis.T @ (y - offset).double()
    best: tuple[float, float, Tensor] | None = None
    for penalty in _PENALTIES:
        weights = (basis @ (rotated / (values + penalty * values.mean())[:, None])).float()
        score = float(functional.cosine_similarity(other @ x.T @ weights + offset, wanted, dim=1).mean())
        if best is None or score > best[0]:
            best = (score, penalty, weights)
    assert best is not None  # noqa: S101  (there are penalties)
    return RidgeDecoder(participant=training.participant, training=x, weights=best[2], offset=offset, penalty=best[1])


def _averages(scale: VoxelScale, cohort: VoxelCohort, viewings: Sequence[Viewing], at_once: int = 64) -> Tensor:
    return torch.cat(
        [scaled_responses(scale, cohort, viewings[start : start + at_once]).cpu() for start in range(0, len(viewings), at_once)]
    )
