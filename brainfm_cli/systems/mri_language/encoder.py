"""The masked MRI encoder: settings, assembly, losses and what they must beat, loading."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from brainfm_cli.config import Frozen
from brainfm_cli.errors import CheckpointMismatchError
from brainfm_cli.learning import objectives
from brainfm_cli.learning.checkpoints import load_weights, read_model_config
from brainfm_cli.learning.image_objectives import masked_brain_loss, mean_over, ssim_map, vicreg
from brainfm_cli.learning.pretraining import Credits
from brainfm_cli.learning.slice_samples import SliceBatch
from brainfm_cli.models.graphs import hashed_uniform
from brainfm_cli.models.mri_encoder import STRIDE, Backbone, Context, MriAutoencoder, MriShape, choose_hidden_cells
from brainfm_cli.systems.mri_language.augmentation import AugmentSettings, View, make_view
from brainfm_cli.systems.mri_language.presets import PRESETS, default_size

_RATIO, _HIDE = 1, 2  # streams of the hashed random numbers; the view is added to the second
CREDITS = Credits(
    methods=(
        "Slices were clipped to the 0.5th and 99.5th percentile of the head, stored with 8 bits and padded to squares. A hybrid of ConvNeXt V2 stages and "
        "a Transformer was trained without labels to reconstruct 50 to 75 % hidden cells of 16 pixels a side from the visible ones (squared error relative "
        "to each cell's variance, and structural similarity), and to agree on two differently augmented and masked views of a slice. Hidden pixels are "
        "kept from every convolution and normalisation."
    ),
    citation="Woo et al., ConvNeXt V2: co-designing and scaling ConvNets with masked autoencoders, CVPR 2023",
    follows="ConvNeXt V2 (CVPR 2023),\nMCMAE (Gao et al., NeurIPS 2022) and SparK (Tian et al., ICLR 2023), whose masked convolutions it follows.",
    prompts="ConvNeXt V2 (CVPR 2023),\non whose masked pretraining the frozen encoder rests.",
)


class MriLanguageSettings(Frozen):
    """The mri-language system."""

    kind: Literal["mri-language"]
    """Which system."""
    preset: Literal["nano", "tiny", "small", "base", "large"] = "small"
    """Size of the encoder: nano 0.17, tiny 3, small 23, base 91, large 314 million parameters."""
    dims: Literal[2, 3] = 2
    """2 reads slices, 3 whole scans as cubes."""
    backbone: Backbone = "hybrid"
    """hybrid; convnext and transformer are ablations of near-equal size."""
    mask_low: float = Field(default=0.5, gt=0, lt=1)
    """Smallest share of cells that is hidden."""
    mask_high: float = Field(default=0.75, gt=0, lt=1)
    """Largest share; each batch draws one in between."""
    contrast: Literal["infonce", "vicreg", "none"] = "infonce"
    """How two views of a slice are made to agree; vicreg needs no negatives and suits small batches."""
    temperature: float = Field(default=0.1, gt=0)
    """Of infonce."""
    ssim_weight: float = Field(default=0.1, ge=0)
    """Weight of one minus the structural similarity; 0 leaves it out."""
    contrast_weight: float = Field(default=0.1, ge=0)
    """Weight of the agreement of views."""
    augment: AugmentSettings = AugmentSettings()
    """How strongly the views differ."""
    slices_per_epoch: int | None = Field(default=None, ge=1)
    """Slices per epoch, drawn anew in each; all where unset."""
    validation_slices: int | None = Field(default=2048, ge=2)
    """Slices of held-out people that choose the epoch, drawn once; all where unset."""
    evaluated_slices: int = Field(default=512, ge=2)
    """Slices of held-out people whose reconstruction is scored beside the floors, drawn once."""

    @model_validator(mode="after")
    def _ratios_in_order(self) -> MriLanguageSettings:
        if self.mask_low > self.mask_high:
            raise ValueError("mask_low must not exceed mask_high")
        return self

    @property
    def shape(self) -> MriShape:
        """Sizes of the preset."""
        return replace(PRESETS[self.preset], dims=self.dims, backbone=self.backbone)

    @property
    def size(self) -> int:
        """Pixels along each side that the preset is meant for."""
        return default_size(self.preset, self.dims)

    @property
    def credits(self) -> Credits:
        """What the outputs say of the method and whom to cite."""
        return CREDITS

    def build(self) -> MriLanguage:
        """A model with weights from torch's global generator."""
        return MriLanguage(settings=self, model=MriAutoencoder(self.shape))


@dataclass(frozen=True, kw_only=True)
class MriLanguage:
    """A masked autoencoder with what is needed to train it."""

    settings: MriLanguageSettings
    """Sizes, masking and losses."""
    model: MriAutoencoder
    """The torch module."""

    @classmethod
    def load(cls, model_dir: Path) -> MriLanguage:
        """The pretrained model of a ``models/<id>`` folder, in evaluation mode.

        Raises
        ------
        CheckpointMismatchError
            It is no mri-language model, or its weights do not fit.
        """
        config = read_model_config(model_dir)
        if config.system.get("kind") != "mri-language":
            raise CheckpointMismatchError("this is no mri-language model", where=model_dir, fix="give a models/<id> folder of 'brainfm pretrain --system mri-language'")  # fmt: skip
        system = MriLanguageSettings.from_values(config.system, where=model_dir / "config.yaml").build()
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
        return {"patch": 1.0, "ssim": self.settings.ssim_weight, "contrast": self.settings.contrast_weight}

    def losses(self, batch: SliceBatch, *, epoch: float) -> dict[str, Tensor]:  # noqa: ARG002  (masking does not change)
        """The loss of hidden brain, its structural similarity, the agreement of two views, what the first must beat, and collapse alarms."""
        ratio = self.mask_ratio(objectives.gather_ranks(batch.keys))
        views = [make_view(batch.images, batch.plane, batch.keys, self.settings.augment, view=number) for number in range(2)]
        terms: dict[str, list[Tensor]] = {"patch": [], "ssim": [], "monitor_mean_fill": []}
        summaries = []
        for number, view in enumerate(views):
            hidden = self.hide(view, batch.keys, ratio, number)
            predicted, encoding = self.model.reconstruct(view.seen, context_of(batch), hidden)
            counted = spread_cells(hidden) & view.brain & batch.counted.view(-1, *(1,) * (view.brain.ndim - 1))
            loss = masked_brain_loss(predicted.float(), view.clean, counted, cell=STRIDE)
            terms["patch"].append(objectives.over_ranks(loss, counted.sum()))
            if self.settings.ssim_weight:
                joined = torch.where(counted, predicted.float(), view.clean)
                similarity = mean_over(ssim_map(joined, view.clean, data_range=1.0), counted)
                missed = 1 - similarity.nanmean().nan_to_num(1.0)
                terms["ssim"].append(objectives.over_ranks(missed, similarity.isfinite().sum()))
            with torch.no_grad():
                filled = fill_with_mean(view.clean, spread_cells(hidden), view.brain)
                terms["monitor_mean_fill"].append(masked_brain_loss(filled, view.clean, counted, cell=STRIDE))
            summaries.append(encoding.summary)
        found = {name: torch.stack(values).mean() for name, values in terms.items() if values}
        return found | self._agreement(summaries, batch)

    def _agreement(self, summaries: list[Tensor], batch: SliceBatch) -> dict[str, Tensor]:
        alarms = {
            "monitor_embedding_spread": objectives.embedding_spread(summaries[0]),
            "monitor_effective_rank": objectives.effective_rank(summaries[0]),
        }
        if self.settings.contrast == "none" or not self.settings.contrast_weight:
            return alarms
        counted = objectives.gather_ranks(batch.counted)
        if self.settings.contrast == "vicreg":
            first, second = (objectives.gather_ranks(self.model.project(summary).float())[counted] for summary in summaries)
            return {"contrast": vicreg(first, second), **alarms}
        first, second = (objectives.gather_ranks(self.model.embed(summary).float()) for summary in summaries)
        people = objectives.gather_ranks(batch.participant)
        agreement = objectives.nt_xent(
            first,
            second,
            dataset=torch.zeros_like(people),
            participant=people,
            temperature=self.settings.temperature,
            valid=counted,
        )
        return {"contrast": agreement, **alarms}

    def mask_ratio(self, keys: Tensor) -> float:
        """Share of cells hidden in a batch, from the first of its (batch,) keys."""
        draw = float(hashed_uniform(keys[:1], (1,), stream=_RATIO))
        return self.settings.mask_low + (self.settings.mask_high - self.settings.mask_low) * draw

    def hide(self, view: View, keys: Tensor, ratio: float, number: int) -> Tensor:
        """(batch, *cells) bool: as large a share of cells with brain as of those without."""
        pool = functional.max_pool2d if view.brain.ndim == 3 else functional.max_pool3d
        brain = pool(view.brain[:, None].float(), STRIDE)[:, 0] > 0
        scores = hashed_uniform(keys, tuple(brain.shape[1:]), stream=_HIDE + number)
        return choose_hidden_cells(scores, brain, ratio)


def context_of(batch: SliceBatch) -> Context:
    """What is known of each item beside its pixels."""
    return Context(sequence=batch.sequence, plane=batch.plane, z_mm=batch.z_mm)


def spread_cells(hidden: Tensor) -> Tensor:
    """(batch, *pixels) of (batch, *cells)."""
    for axis in range(1, hidden.ndim):
        hidden = hidden.repeat_interleave(STRIDE, dim=axis)
    return hidden


def fill_with_mean(images: Tensor, hidden: Tensor, brain: Tensor) -> Tensor:
    """(batch, *pixels) with hidden pixels at the mean of the item's visible brain: the simplest floor."""
    means = mean_over(images, brain & ~hidden).nan_to_num(0.0)
    return torch.where(hidden, means.view(-1, *(1,) * (images.ndim - 1)), images)
