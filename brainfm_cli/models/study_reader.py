"""A whole study for a language model: slice features to tokens that know sequence, plane and height, a small Transformer, and a bridge."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from brainfm_cli.models.attention import EdgeBias
from brainfm_cli.models.graph_encoder import TransformerLayer
from brainfm_cli.models.mri_encoder import PLACE_CODE, Context, place_code
from brainfm_cli.models.q_former import BrainBridge, QFormerShape
from brainfm_cli.models.study_head import StandardisedSlices

Bridge = Literal["perceiver", "mlp"]


@dataclass(frozen=True, kw_only=True)
class StudyShape:
    """Sizes of what reads a study."""

    width: int
    """Length of a slice's token."""
    num_layers: int
    """Layers of the Transformer over slices."""
    num_heads: int
    """Attention heads; must divide the width."""
    dropout: float = 0.0
    """Share of activations dropped in training."""
    num_sequences: int = 8
    """Kinds of contrast."""
    num_planes: int = 3
    """Ways that slices run."""


class StudyReader(StandardisedSlices):
    """(batch, slices, features) of a frozen encoder to a study token and one token per slice."""

    def __init__(self, shape: StudyShape, features: int) -> None:
        super().__init__(features)
        self.shape = shape
        self.enter = nn.Linear(features, shape.width)
        self.sequence, self.plane = nn.Embedding(shape.num_sequences, shape.width), nn.Embedding(shape.num_planes, shape.width)
        self.height = nn.Linear(PLACE_CODE, shape.width, bias=False)
        self.study = nn.Parameter(nn.init.normal_(torch.empty(shape.width), std=0.02))
        self.layers = nn.ModuleList(
            TransformerLayer(shape.width, shape.num_heads, 4 * shape.width, shape.dropout, edge_bias=False) for _ in range(shape.num_layers)
        )
        self.norm = nn.LayerNorm(shape.width)
        for embedding in (self.sequence, self.plane):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, slices: Tensor, present: Tensor, context: Context) -> Tensor:
        """(batch, 1 + slices, width) of (batch, slices, features); fields of ``context`` are (batch, slices), absent slices are not attended to."""
        tokens = self.enter(self.standardised(slices))
        heights = self.height(place_code(context.z_mm.flatten()).to(tokens.dtype)).unflatten(0, context.z_mm.shape)
        tokens = tokens + self.sequence(context.sequence) + self.plane(context.plane) + heights
        tokens = torch.cat([self.study.to(tokens.dtype).expand(len(tokens), 1, -1), tokens], dim=1)
        bias = EdgeBias(adjacency=None, prompt=None, absent=functional.pad(~present, (1, 0)))
        for layer in self.layers:
            tokens = layer(tokens, bias)
        return self.norm(tokens)


class MlpBridge(nn.Module):
    """The simpler bridge: the study token through two layers to all vectors at once (LLaVA's projector, on one token)."""

    def __init__(self, num_vectors: int, *, token_width: int, language_width: int, contrast_width: int, token_norm: float) -> None:
        super().__init__()
        self.num_vectors = num_vectors
        self.hidden = nn.Linear(token_width, language_width)
        self.to_language = nn.Linear(language_width, num_vectors * language_width)
        self.to_contrast = nn.Linear(token_width, contrast_width)
        self.token_norm: Tensor
        self.register_buffer("token_norm", torch.tensor(token_norm))

    def forward(self, tokens: Tensor, present: Tensor | None = None) -> tuple[Tensor, Tensor]:  # noqa: ARG002  (as the other bridge is called)
        """(batch, vectors, language width) vectors as long as token vectors on average, and (batch, contrast width) unit vectors."""
        study = tokens[:, 0]
        prefix = self.to_language(functional.gelu(self.hidden(study))).unflatten(1, (self.num_vectors, -1))
        return functional.normalize(prefix, dim=-1) * self.token_norm, functional.normalize(self.to_contrast(study), dim=-1)


class StudySpeaker(nn.Module):
    """Reader and bridge: everything that is trained in front of a frozen language model, and what was added to that model where it is adapted."""

    def __init__(
        self, shape: StudyShape, bridge: Bridge, q_former: QFormerShape, *, features: int, language_width: int, contrast_width: int, token_norm: float
    ) -> None:  # fmt: skip
        super().__init__()
        self.reader = StudyReader(shape, features)
        widths = {"token_width": shape.width, "language_width": language_width, "contrast_width": contrast_width}
        self.num_vectors = q_former.num_queries
        self.language_parts = nn.ParameterDict()
        self.bridge: nn.Module = (
            MlpBridge(q_former.num_queries, **widths, token_norm=token_norm) if bridge == "mlp" else BrainBridge(q_former, **widths, token_norm=token_norm)
        )  # fmt: skip

    def forward(self, slices: Tensor, present: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """(batch, vectors, language width) for the language model and (batch, contrast width) unit vectors of studies."""
        tokens = self.reader(slices, present, context)
        found: tuple[Tensor, Tensor] = self.bridge(tokens, present=functional.pad(present, (1, 0), value=True))
        return found
