"""The Brain Q-Former and what joins it to a frozen language model and to sentence or image vectors (after BLIP-2, Li et al. 2023).

Learned queries attend to one another, and in every second layer to the brain's tokens. Each query becomes one vector in front of
the language model, of the length that token vectors have; the mean query is contrasted with what was said or seen. Attention begins by
averaging over all tokens, in which the encoder's summary of a whole brain is one of many: by default every query therefore starts from a
linear map of the summary, added to what it has learnt.

The language model may also read the vector that was contrasted, in place of the queries: a network that turns sentence vectors into prefixes
learns from text alone and is then given the brain's vector (CapDec, Nukrai et al. 2022).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from brainfm_cli.models.attention import NO_BIAS
from brainfm_cli.models.graph_encoder import TransformerLayer

VectorKind = Literal["brain", "sentence"]
_REMEMBERED = 100.0  # batches in a running mean
_HIDDEN = 512  # of the network that reads a vector


@dataclass(frozen=True, kw_only=True)
class QFormerShape:
    """Sizes of a Q-Former; BLIP-2's by default."""

    num_queries: int = 32
    """Queries, and so vectors in front of the language model."""
    width: int = 768
    """Length of a query."""
    num_layers: int = 12
    """Layers, cross-attention in every second, the first included."""
    num_heads: int = 12
    """Attention heads."""
    dropout: float = 0.0
    """Share of activations dropped in training."""
    from_summary: bool = True
    """Whether queries start from the encoder's summary; BLIP-2's start the same for every input."""


class CrossAttention(nn.Module):
    """Pre-norm attention of queries to tokens of another width."""

    def __init__(self, width: int, token_width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.norm, self.token_norm = nn.LayerNorm(width), nn.LayerNorm(token_width)
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(token_width, 2 * width)
        self.merge = nn.Linear(width, width)

    def forward(self, queries: Tensor, tokens: Tensor, present: Tensor | None = None) -> Tensor:
        """(batch, queries, width) queries with what they found in (batch, tokens, token width), of which ``present`` (batch, tokens) count."""
        batch, count, width = queries.shape
        heads = (self.num_heads, width // self.num_heads)
        q = self.query(self.norm(queries)).view(batch, count, *heads).transpose(1, 2)
        k, v = self.key_value(self.token_norm(tokens)).view(batch, -1, 2, *heads).permute(2, 0, 3, 1, 4).unbind(0)
        mask = None if present is None else present[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
        return queries + functional.dropout(self.merge(mixed), self.dropout, training=self.training)


class QFormer(nn.Module):
    """Brain tokens to a fixed number of query vectors."""

    def __init__(self, shape: QFormerShape, token_width: int) -> None:
        super().__init__()
        self.shape = shape
        self.queries = nn.Parameter(nn.init.normal_(torch.empty(shape.num_queries, shape.width), std=0.02))
        self.start = nn.Linear(token_width, shape.num_queries * shape.width) if shape.from_summary else None
        self.cross = nn.ModuleDict(
            {
                str(layer): CrossAttention(shape.width, token_width, shape.num_heads, shape.dropout)
                for layer in range(0, shape.num_layers, 2)
            }
        )
        self.layers = nn.ModuleList(
            TransformerLayer(shape.width, shape.num_heads, 4 * shape.width, shape.dropout, edge_bias=False) for _ in range(shape.num_layers)
        )
        self.norm = nn.LayerNorm(shape.width)

    def forward(self, tokens: Tensor, present: Tensor | None = None) -> Tensor:
        """(batch, queries, width) normalised queries from (batch, tokens, token width), the first token being the summary."""
        queries = self.queries.expand(len(tokens), -1, -1)
        if self.start is not None:
            queries = queries + self.start(tokens[:, 0]).unflatten(1, self.queries.shape)
        for number, layer in enumerate(self.layers):
            if str(number) in self.cross:
                queries = self.cross[str(number)](queries, tokens, present)
            queries = layer(queries, NO_BIAS)
        return self.norm(queries)


class VectorPrefix(nn.Module):
    """One unit vector, of a sentence or of a brain, to vectors for a language model.

    Contrast leaves open where the brains' vectors lie as a whole, and sentences share a direction that brains do not have (the modality gap,
    Liang et al. 2022): each kind is therefore taken from the mean of its own kind, which training keeps count of.
    """

    def __init__(self, width: int, num_vectors: int, language_width: int) -> None:
        super().__init__()
        self.num_vectors, self.width = num_vectors, width
        self.expand = nn.Linear(width, _HIDDEN)
        self.contract = nn.Linear(_HIDDEN, num_vectors * language_width)
        for kind in get_args(VectorKind):
            self.register_buffer(f"mean_{kind}", torch.zeros(width))
            self.register_buffer(f"batches_{kind}", torch.zeros(()))

    def forward(self, vectors: Tensor, kind: VectorKind) -> Tensor:
        """(batch, vectors, language width) from (batch, width) unit vectors."""
        centred = functional.normalize(vectors - self.get_buffer(f"mean_{kind}"), dim=-1)
        hidden = functional.gelu(self.expand(centred * self.width**0.5))  # entries of unit variance
        return self.contract(hidden).unflatten(1, (self.num_vectors, -1))

    @torch.no_grad()
    def count(self, vectors: Tensor, kind: VectorKind) -> None:
        """Take (batch, width) vectors of training into the mean of their kind: of all batches, or of about the last hundred of many."""
        if not self.expand.weight.requires_grad:  # a person is added to what others have learnt
            return
        batches = self.get_buffer(f"batches_{kind}").add_(1)
        mean = self.get_buffer(f"mean_{kind}")
        mean += (vectors.mean(dim=0).to(mean) - mean) / batches.clamp_max(_REMEMBERED)


class BrainBridge(nn.Module):
    """Q-Former with its two outlets: vectors for a language model, and one vector for contrast.

    After :meth:`read_vectors` the former are made of the latter, and no gradient goes back from one to the other.
    """

    def __init__(self, shape: QFormerShape, *, token_width: int, language_width: int, contrast_width: int, token_norm: float) -> None:
        super().__init__()
        self.q_former = QFormer(shape, token_width)
        self.to_language = nn.Linear(shape.width, language_width)
        self.from_vector: VectorPrefix | None = None
        self.to_contrast = nn.Linear(shape.width, contrast_width)
        # a number that belongs to the language model: kept with the weights
        self.token_norm: Tensor
        self.register_buffer("token_norm", torch.tensor(token_norm))

    def forward(self, tokens: Tensor, *, projection_alone: bool = False, present: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(batch, queries, language width) vectors as long as token vectors on average, and (batch, contrast width) unit vectors.

        Only tokens that are ``present`` (batch, tokens) are attended to. With ``projection_alone`` the gradient of the former reaches the last linear layer and no further.
        """
        queries = self.q_former(tokens, present)
        vector = functional.normalize(self.to_contrast(queries.mean(dim=1)), dim=-1)
        if self.from_vector is not None:
            if self.training:
                self.from_vector.count(vector.detach(), "brain")
            return self.prefix_of(vector.detach(), "brain"), vector
        return self._as_tokens(self.to_language(queries.detach() if projection_alone else queries)), vector

    def read_vectors(self) -> BrainBridge:
        """Let the language model read the contrasted vector in place of the queries; gives back itself."""
        self.from_vector = VectorPrefix(self.to_contrast.out_features, self.q_former.shape.num_queries, self.to_language.out_features)
        return self

    def prefix_of(self, vectors: Tensor, kind: VectorKind) -> Tensor:
        """(batch, queries, language width) vectors in front of the language model for (batch, contrast width) unit vectors of sentences or brains."""
        assert self.from_vector is not None  # noqa: S101  (fit.speaks_from)
        return self._as_tokens(self.from_vector(vectors, kind))

    def _as_tokens(self, vectors: Tensor) -> Tensor:
        return functional.normalize(vectors, dim=-1) * self.token_norm


def same_image_contrast(brains: Tensor, others: Tensor, images: Tensor, *, temperature: float) -> Tensor:
    """InfoNCE in both directions between (batch, width) unit vectors of brains and of sentences or pictures.

    Rows of the same image (equal ``images`` (batch,) codes) are positives of one another: the target spreads over them evenly.
    """
    logits = brains @ others.T / temperature
    same = (images[:, None] == images[None, :]).to(logits.dtype)
    target = same / same.sum(dim=1, keepdim=True)
    forwards = -(target * logits.log_softmax(dim=1)).sum(dim=1).mean()
    backwards = -(target * logits.T.log_softmax(dim=1)).sum(dim=1).mean()
    return 0.5 * (forwards + backwards)
