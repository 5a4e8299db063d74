"""Lesions slice by slice, from one sequence or from all that show a place: a decoder on the encoder, trained with Dice and cross-entropy."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from brainfm_cli.bids.slice_cohort import PackedScan, SliceCohort
from brainfm_cli.config import Frozen
from brainfm_cli.learning.checkpoints import read_tensors
from brainfm_cli.learning.image_objectives import dice_and_entropy
from brainfm_cli.learning.slice_samples import SliceBatch, all_slices, rows_together
from brainfm_cli.models.mri_decoder import MriSegmenter
from brainfm_cli.models.mri_encoder import MriEncoder
from brainfm_cli.systems.mri_language.augmentation import AugmentSettings, make_view, plain_view
from brainfm_cli.systems.mri_language.encoder import context_of

DECODER_FILE = "decoder.safetensors"
_ENCODER = "encoder."
SMALLEST_LESIONS = (0, 3, 10, 30, 100)  # voxels; the choice is made on validation people


class SequenceSettings(Frozen):
    """How a segmentation reads several sequences of a study."""

    together: bool = False
    """Whether scans of a session that share a grid are read together, each through the encoder and all through one decoder, so that a lesion
    which one of them shows is enough; a sequence may be absent. A scan on a grid of its own is read by itself. Off: every scan is read by
    itself, and probabilities on one grid are averaged."""
    hidden: float = Field(default=0.3, ge=0, le=1)
    """together: share of training slices of which some sequences are hidden, one up to all but one, so that fewer will do."""


def decoder_width(encoder: MriEncoder) -> int:
    """Channels of the decoder for an encoder's size."""
    return int(np.clip(encoder.shape.widths[2] // 4, 16, 96)) // 4 * 4


@dataclass(frozen=True, kw_only=True)
class ScanSegmenter:
    """Encoder and decoder with what is needed to train the second."""

    model: MriSegmenter
    """The torch module; the encoder's parameters get no gradient."""
    values: tuple[int, ...]
    """Label value of each class after the first, which is no lesion."""
    augment: AugmentSettings
    """How training slices are varied; labels move with them."""
    share: float = 1.0
    """Share of the learning rate that weights of the encoder get, where they are trained."""

    def rate_factor(self, name: str, progress: float) -> float:  # noqa: ARG002  (the same throughout)
        """Share of the learning rate of a parameter."""
        return self.share if name.startswith(_ENCODER) else 1.0

    @property
    def module(self) -> nn.Module:
        """The module that is trained."""
        return self.model

    @property
    def together(self) -> bool:
        """Whether it reads all sequences of a place as one item."""
        return self.model.together

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term."""
        return {"dice": 1.0, "entropy": 1.0}

    def losses(self, batch: SliceBatch, *, epoch: float) -> dict[str, Tensor]:
        """Dice over the batch and cross-entropy; validation slices are taken as they are."""
        labels = self.classes_of(batch)
        images = plain_view(batch.images).seen
        if np.isfinite(epoch) and self.model.training:
            view, labels = self._varied(batch, labels)
            images = view
        dice, entropy = dice_and_entropy(self.model(images, context_of(batch), batch.item), labels)
        return {"dice": dice, "entropy": entropy}

    def classes_of(self, batch: SliceBatch) -> Tensor:
        """(items, *pixels) int64 class of every pixel."""
        if batch.masks is None:
            raise ValueError("batches of segmentation carry masks")
        labels = torch.zeros(batch.masks.shape, dtype=torch.int64, device=batch.masks.device)
        for number, value in enumerate(self.values, start=1):
            labels[batch.masks == value] = number
        return labels

    def _varied(self, batch: SliceBatch, labels: Tensor) -> tuple[Tensor, Tensor]:
        keys, plane, light = batch.keys, batch.plane, None
        if batch.item is not None:  # sequences of one place lie alike, and each is seen through another scanner
            keys, light = keys[batch.item], keys[batch.item] + 1 + batch.sequence
            plane = torch.zeros_like(batch.keys).scatter_(0, batch.item, plane)
        view = make_view(batch.images, batch.plane, keys, self.augment, view=0, light=light)
        # labels move as the image does: each class as an image of its own, the strongest one wins
        still = self.augment.model_copy(update={"gamma": 0.0, "contrast": 0.0, "bias_field": 0.0, "noise": 0.0, "blur": 0.0})
        moved = [make_view((labels == number).to(torch.uint8) * 255, plane, batch.keys, still, view=0).clean for number in range(1, len(self.values) + 1)]  # fmt: skip
        shares = torch.stack([torch.full_like(moved[0], 0.5), *moved])
        return view.seen, shares.argmax(dim=0)

    def decoder_tensors(self) -> dict[str, Tensor]:
        """What was trained of the decoder."""
        return {name: value for name, value in self.model.state_dict().items() if not name.startswith(_ENCODER)}


def new_segmenter(
    encoder: MriEncoder, values: Sequence[int], augment: AugmentSettings, *, seed: int, together: bool, adapted: bool = False, share: float = 1.0
) -> ScanSegmenter:  # fmt: skip
    """A decoder with fresh weights on a frozen encoder; of an ``adapted`` one the weights that were trainable stay so."""
    trainable = [parameter for parameter in encoder.parameters() if parameter.requires_grad] if adapted else []
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MriSegmenter(encoder, 1 + len(values), width=decoder_width(encoder), together=together)
    for parameter in trainable:
        parameter.requires_grad_()
    return ScanSegmenter(model=model, values=tuple(values), augment=augment, share=share)


def load_segmenter(encoder: MriEncoder, folder: Path, values: Sequence[int], *, together: bool) -> ScanSegmenter:
    """The segmenter of a tuned model's folder, in evaluation mode."""
    made = new_segmenter(encoder, values, AugmentSettings(), seed=0, together=together)
    tensors = read_tensors(folder / DECODER_FILE)
    made.model.load_state_dict({**{f"{_ENCODER}{name}": value for name, value in encoder.state_dict().items()}, **tensors})
    made.model.eval()
    return made


def masked_rows(cohort: SliceCohort, people: Sequence[str]) -> NDArray[np.int64]:
    """Slices of these people's scans that have a mask."""
    table = cohort.slices
    return np.flatnonzero((table["participant"].isin(list(people)) & (table["lesion"] >= 0)).to_numpy())


def items_of(
    cohort: SliceCohort, rows: NDArray[np.int64], *, together: bool
) -> tuple[NDArray[np.int64], Mapping[int, NDArray[np.int64]] | None]:
    """Slices that stand for items, and what is read with each: every slice by itself, or the sequences of a place under the first of them."""
    if not together:
        return rows, None
    found = rows_together(cohort, rows)
    return np.array(list(found), np.int64), found


def told_sequences(cohort: SliceCohort, people: Sequence[str]) -> str:
    """How many sequences are read together at how many places of these people's scans with masks."""
    sizes = Counter(len(members) for members in rows_together(cohort, masked_rows(cohort, people)).values())
    return "sequences read together, by how many share a grid: " + ", ".join(
        f"{size} at {sizes[size]} places" for size in sorted(sizes, reverse=True)
    )


def balanced_rows(cohort: SliceCohort, rows: NDArray[np.int64], *, seed: int) -> NDArray[np.int64]:
    """Slices with lesions, and as many without: most of a brain holds no lesion, and a batch without any teaches little."""
    lesion = cohort.slices["lesion"].to_numpy()[rows] > 0
    hit, free = rows[lesion], rows[~lesion]
    if not len(hit) or len(free) <= len(hit):
        return rows
    return np.sort(np.concatenate([hit, np.random.default_rng(seed).choice(free, len(hit), replace=False)]))


@torch.no_grad()
def lesion_chances(
    segmenter: ScanSegmenter, cohort: SliceCohort, participant: str, scans: Sequence[PackedScan], *, batch_size: int = 16
) -> NDArray[np.float32]:
    """(1 + lesion classes, items of a whole scan, *pixels) probabilities on the slice grid that the scans share.

    Slices that were left out count as no lesion; where scans are not read together, theirs are averaged.
    """
    model, table = segmenter.model.eval(), cohort.slices
    mine = np.flatnonzero(((table["participant"] == participant) & table["scan"].isin([scan.name for scan in scans])).to_numpy())
    first, together = items_of(cohort, mine, together=segmenter.together)
    chances = np.zeros((cohort.num_items(scans[0]), 1 + len(segmenter.values), *cohort.item_shape), np.float32)
    source, number = all_slices(cohort, together), table["slice"].to_numpy()
    device = next(model.parameters()).device
    for start in range(0, len(first), batch_size):
        part = first[start : start + batch_size]
        batch = source.batch(part, None).to(device)
        found = model(batch.images.float() / 255, context_of(batch), batch.item).float().softmax(dim=1).cpu().numpy()
        np.add.at(chances, number[part], found)
    chances /= 1 if segmenter.together else len(scans)
    chances[:, 0] += 1 - chances.sum(axis=1)
    return np.moveaxis(chances, 1, 0)
