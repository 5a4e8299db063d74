"""The masked encoder of voxels: settings, assembly, loss and its floors, loading."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from brainfm_cli.config import Frozen
from brainfm_cli.errors import CheckpointMismatchError
from brainfm_cli.learning import objectives
from brainfm_cli.learning.checkpoints import ViewerRecord, load_weights, read_model_config
from brainfm_cli.learning.pretraining import Credits
from brainfm_cli.learning.voxel_samples import TrialBatch
from brainfm_cli.models.graphs import hashed_uniform
from brainfm_cli.models.voxel_encoder import (
    FirstLayer,
    Viewer,
    VoxelModel,
    VoxelPatches,
    VoxelShape,
    choose_hidden_patches,
    masked_voxel_loss,
    predict_from_neighbours,
)

PRESETS: dict[str, VoxelShape] = {
    "nano": VoxelShape(width=64, num_layers=2, num_heads=2, decoder_width=32, decoder_layers=1, decoder_heads=2),
    "small": VoxelShape(width=256, num_layers=6, num_heads=4, decoder_width=128, decoder_layers=2, decoder_heads=4),
    "base": VoxelShape(width=512, num_layers=12, num_heads=8, decoder_width=256, decoder_layers=4, decoder_heads=8),
    "large": VoxelShape(),
}
_SIZES = ("width", "num_layers", "num_heads", "decoder_width", "decoder_layers", "decoder_heads")
_HIDE = 0  # stream of the hashed random numbers
CREDITS = Credits(
    methods=(
        "Single-trial responses were z-scored by each voxel's mean and standard deviation over the training trials, ordered along a space-filling curve "
        "and cut into patches of 16 voxels. A transformer that knows the place of each patch and the person was trained over all participants "
        "to reconstruct 75 % hidden patches (mean squared error) from the visible ones."
    ),
    citation="Ren et al., MindSemantix: deciphering brain visual experiences with a brain-language model, arXiv 2405.18812 (2024)",
    follows="MindSemantix (arXiv 2405.18812)\nand MinD-Vis (Chen et al., CVPR 2023), whose masked autoencoder of voxel patches it follows.",
    prompts="MindSemantix (arXiv 2405.18812),\nwhose Brain Q-Former in front of a frozen language model it follows.",
)


class BrainCaptionSettings(Frozen):
    """The brain-caption system."""

    kind: Literal["brain-caption"]
    """Which system."""
    preset: Literal["nano", "small", "base", "large"] = "base"
    """Size of the encoder, large being the published ViT-L; each size below overrides it."""
    width: int | None = Field(default=None, ge=8)
    """Length of a token."""
    num_layers: int | None = Field(default=None, ge=1)
    """Encoder layers."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads; must divide the width."""
    decoder_width: int | None = Field(default=None, ge=8)
    """Length of a decoder token."""
    decoder_layers: int | None = Field(default=None, ge=1)
    """Decoder layers, which only pretraining uses."""
    decoder_heads: int | None = Field(default=None, ge=1)
    """Attention heads of the decoder."""
    patch_voxels: int = Field(default=16, ge=2)
    """Voxels of a patch."""
    first_layer: FirstLayer = "person"
    """person adds a first and a last layer of each person's own, patch by patch; shared is the published one layer for all."""
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of patches that is hidden in pretraining."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of activations dropped in training."""

    @property
    def shape(self) -> VoxelShape:
        """The preset's sizes with the overrides."""
        sizes = {name: getattr(self, name) or getattr(PRESETS[self.preset], name) for name in _SIZES}
        return VoxelShape(**sizes, patch_voxels=self.patch_voxels, first_layer=self.first_layer, dropout=self.dropout)

    @model_validator(mode="after")
    def _heads_divide_widths(self) -> BrainCaptionSettings:
        shape = self.shape
        if shape.width % shape.num_heads or shape.decoder_width % shape.decoder_heads:
            raise ValueError("num_heads must divide width, and decoder_heads decoder_width")
        return self

    @property
    def credits(self) -> Credits:
        """What the outputs say of the method and whom to cite."""
        return CREDITS

    def assemble(self, records: Mapping[str, ViewerRecord], places: Mapping[str, Tensor]) -> BrainCaption:
        """A new model for these participants, with weights from torch's global generator; ``places`` (voxels, 3) by participant."""
        viewers = {name: Viewer(places_mm=places[name]) for name in records}
        return BrainCaption(settings=self, viewers=dict(records), model=VoxelModel(self.shape, viewers))


@dataclass(frozen=True, kw_only=True)
class BrainCaption:
    """A masked voxel encoder with what is needed to train it."""

    settings: BrainCaptionSettings
    """Sizes and masking."""
    viewers: dict[str, ViewerRecord]
    """Participants that the model knows."""
    model: VoxelModel
    """The torch module."""

    @classmethod
    def load(cls, model_dir: Path) -> BrainCaption:
        """The pretrained model of a ``models/<id>`` folder, in evaluation mode.

        Raises
        ------
        CheckpointMismatchError
            It is no brain-caption model, was aligned already, or its weights do not fit.
        """
        config = read_model_config(model_dir)
        if config.system.get("kind") != "brain-caption" or config.alignment:
            raise CheckpointMismatchError("this is no pretrained brain-caption model", where=model_dir, fix="give a models/<id> folder of 'brainfm pretrain --system brain-caption'")  # fmt: skip
        settings = BrainCaptionSettings.from_values(config.system, where=model_dir / "config.yaml")
        # the places come with the weights
        system = settings.assemble(config.viewers, {name: torch.zeros(one.voxels, 3) for name, one in config.viewers.items()})
        load_weights(system.model, model_dir / "model.safetensors")
        system.model.eval()
        return system

    @property
    def module(self) -> nn.Module:
        """The module that is trained."""
        return self.model

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term."""
        return {"patch": 1.0}

    def losses(self, batch: TrialBatch, *, epoch: float) -> dict[str, Tensor]:  # noqa: ARG002  (the share hidden does not change)
        """The loss of hidden patches, what it must beat on the same patches, and what warns of collapse."""
        terms, count = self.measure(batch)
        return terms | {"patch": objectives.over_ranks(terms["patch"], count)}

    def measure(self, batch: TrialBatch) -> tuple[dict[str, Tensor], Tensor]:
        """The same of this rank's trials alone, and the number of hidden voxels that its loss is a mean over."""
        patches, hidden = self._hide(batch)
        predicted, encoding = self.model.reconstruct(patches, hidden)
        with torch.no_grad():
            zero = masked_voxel_loss(torch.zeros_like(predicted), patches, hidden)
            neighbours = masked_voxel_loss(self._neighbours(patches, hidden), patches, hidden)
        judged = hidden & batch.counted[:, None]
        terms = {
            "patch": masked_voxel_loss(predicted, patches, judged),
            "monitor_predict_zero": zero,
            "monitor_neighbour_mean": neighbours,
            "monitor_correlation": _correlation(predicted.detach(), patches, hidden),
            "monitor_embedding_spread": objectives.embedding_spread(encoding.summary),
            "monitor_effective_rank": objectives.effective_rank(encoding.summary),
        }
        return terms, (judged[:, :, None] & patches.real).sum()

    def _hide(self, batch: TrialBatch) -> tuple[VoxelPatches, Tensor]:
        patches = self.model.patches(batch.participant, batch.responses)
        scores = hashed_uniform(batch.keys, (patches.values.shape[1],), stream=_HIDE)
        return patches, choose_hidden_patches(scores, self.settings.mask_ratio)

    def _neighbours(self, patches: VoxelPatches, hidden: Tensor) -> Tensor:
        centres = self.model.encoder.places(patches.participant)[:, :3]  # coordinates near unit size
        return predict_from_neighbours(patches, centres, hidden)


def _correlation(predicted: Tensor, patches: VoxelPatches, hidden: Tensor) -> Tensor:
    """Pearson correlation over all hidden real voxels of the batch."""
    counted = (hidden[:, :, None] & patches.real).to(predicted.dtype)
    number = counted.sum().clamp_min(1)
    centred = [(values - (values * counted).sum() / number) * counted for values in (predicted, patches.values)]
    product = (centred[0] * centred[1]).sum()
    return product / (centred[0].square().sum() * centred[1].square().sum()).sqrt().clamp_min(1e-12)
