"""The graph encoder: transformer blocks with graph convolutions over region tokens, one model for every atlas.

Notable choices: pre-norm; each block is several transformer layers and one residual graph convolution, blocks
one after another; attention is biased per head by the prompted adjacency and the edge prompt, from zero; an
atlas enters by its own token and a learned identity of each region. After BrainGFM (ICLR 2026), revised code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from brainfm_cli.models.attention import EdgeBias, attention_weights, biased_attention
from brainfm_cli.models.graphs import NUM_WALK_STEPS, known_complete, normalised_adjacency


@dataclass(frozen=True, kw_only=True)
class EncoderShape:
    """Sizes of a graph encoder; R2's published ones by default."""

    width: int = 256
    """Length of a token."""
    num_heads: int = 8
    """Attention heads."""
    feedforward: int = 512
    """Hidden length of the feed-forward part."""
    num_blocks: int = 4
    """Blocks, one after another."""
    num_layers: int = 4
    """Transformer layers in each block."""
    dropout: float = 0.2
    """Share of activations dropped in training."""
    input_width: int = 512
    """Columns of the shared input projection; an atlas may have at most this many regions less five."""


@dataclass(frozen=True, kw_only=True)
class Encoding:
    """What the encoder makes of a batch of graphs."""

    nodes: Tensor
    """(batch, regions, width) normalised region vectors."""
    readout: Tensor
    """(batch, 2 · width) mean and maximum over present regions."""


@dataclass(frozen=True, kw_only=True)
class EncoderInput:
    """A batch of prompted graphs, ready to be encoded."""

    atlas: str
    """Atlas label."""
    features: Tensor
    """(batch, regions, regions) connectivity rows."""
    walks: Tensor
    """(batch, regions, 5) random-walk encodings."""
    adjacency: Tensor
    """(batch, regions, regions) edge weights, no self-loops."""
    edge_prompt: Tensor | None
    """(1 or batch, regions, regions) edge prompt; none where no prompt is used."""
    present: Tensor
    """(batch, regions) bool."""
    hidden: Tensor | None = None
    """(batch, regions) bool, replaced by the learned mask vector; none where nothing is masked."""


class TransformerLayer(nn.Module):
    """Pre-norm self-attention and feed-forward layer."""

    def __init__(self, width: int, num_heads: int, feedforward: int, dropout: float, *, edge_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.feedforward_norm = nn.LayerNorm(width)
        self.expand = nn.Linear(width, feedforward)
        self.contract = nn.Linear(feedforward, width)
        # one weight for the prompted adjacency and one for the edge prompt, per head; zero at the start
        self.edge_bias = nn.Parameter(torch.zeros(2, num_heads)) if edge_bias else None

    def forward(self, tokens: Tensor, bias: EdgeBias) -> Tensor:
        """(batch, tokens, width) of the same shape."""
        mixed = biased_attention(self._heads(tokens), bias, self.edge_bias, dropout=self.dropout if self.training else 0.0)
        tokens = tokens + self._drop(self.merge(mixed))
        inner = self._drop(functional.gelu(self.expand(self.feedforward_norm(tokens))))
        return tokens + self._drop(self.contract(inner))

    def attended(self, tokens: Tensor, bias: EdgeBias) -> Tensor:
        """(batch, tokens, tokens) attention weights, mean over heads."""
        return attention_weights(self._heads(tokens), bias, self.edge_bias).mean(1)

    def _heads(self, tokens: Tensor) -> Tensor:
        """(batch, tokens, 3, heads, head width) queries, keys and values."""
        batch, length, width = tokens.shape
        return self.qkv(self.attention_norm(tokens)).view(batch, length, 3, self.num_heads, width // self.num_heads)

    def _drop(self, x: Tensor) -> Tensor:
        return functional.dropout(x, self.dropout, training=True) if self.training and self.dropout > 0 else x


class GraphConvolution(nn.Module):
    """Residual graph convolution on normalised adjacency, the same as ``torch_geometric.nn.DenseGCNConv`` inside."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.linear = nn.Linear(width, width, bias=False)
        self.bias = nn.Parameter(torch.zeros(width))
        self.norm = nn.LayerNorm(width)

    def propagate(self, nodes: Tensor, propagation: Tensor) -> Tensor:
        """(batch, regions, width) after one convolution, before norm and residual."""
        return torch.baddbmm(self.bias, propagation, self.linear(nodes))

    def forward(self, nodes: Tensor, propagation: Tensor) -> Tensor:
        """(batch, regions, width) of the same shape."""
        update = functional.gelu(self.norm(self.propagate(nodes, propagation)))
        return nodes + functional.dropout(update, self.dropout, training=self.training)


class Block(nn.Module):
    """Transformer layers over all tokens, then one graph convolution over region tokens."""

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TransformerLayer(shape.width, shape.num_heads, shape.feedforward, shape.dropout, edge_bias=True)
            for _ in range(shape.num_layers)
        )
        self.convolution = GraphConvolution(shape.width, shape.dropout)

    def forward(self, tokens: Tensor, bias: EdgeBias, propagation: Tensor, num_extra: int) -> Tensor:
        """(batch, tokens, width) of the same shape; the first ``num_extra`` tokens are no regions."""
        for layer in self.layers:
            tokens = layer(tokens, bias)
        nodes = self.convolution(tokens[:, num_extra:], propagation)
        return torch.cat([tokens[:, :num_extra], nodes], dim=1)


class GraphEncoder(nn.Module):
    """Region graphs of any known atlas to region vectors and one readout."""

    NUM_EXTRA = 2
    """The disorder token and the atlas token stand before the regions."""

    def __init__(self, shape: EncoderShape, atlases: Mapping[str, int]) -> None:
        """``atlases`` gives the number of regions per atlas label."""
        super().__init__()
        self.shape = shape
        self.projection = nn.Linear(shape.input_width, shape.width)
        self.atlas_vector = nn.ParameterDict({label: _small(shape.input_width) for label in sorted(atlases)})
        self.node_identity = nn.ParameterDict({label: _small(atlases[label], shape.width) for label in sorted(atlases)})
        self.no_disorder = nn.Parameter(_small(shape.width))
        self.hidden_vector = nn.Parameter(_small(shape.input_width))
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.num_blocks))
        self.norm = nn.LayerNorm(shape.width)

    def context(self, atlas: str, disorder: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The (1 or batch, width) disorder token, none given meaning 'no disorder named', and the (1, width) atlas token."""
        named = self.no_disorder[None, :] if disorder is None else disorder
        return named, self.projection(self.atlas_vector[atlas])[None, :]

    def forward(self, graphs: EncoderInput, disorder: Tensor | None = None) -> Encoding:
        """Region vectors and readout; ``disorder`` is an optional (batch, width) token."""
        tokens = self.tokens(graphs, disorder)
        everyone = known_complete(graphs.present)
        bias, propagation = self._edges(graphs), normalised_adjacency(graphs.adjacency)
        for block in self.blocks:
            tokens = block(tokens, bias, propagation, self.NUM_EXTRA)
        nodes = self.norm(tokens[:, self.NUM_EXTRA :])
        return Encoding(nodes=nodes, readout=read_out(nodes, None if everyone else graphs.present))

    @torch.no_grad()
    def rollout(self, graphs: EncoderInput, disorder: Tensor | None = None) -> Tensor:
        """(batch, 2 + regions) share of each first token in the mean region that is read out; rows add up to 1.

        Attention rollout (Abnar and Zuidema 2020): heads are averaged, half of every layer is its residual, and layers are
        multiplied. A graph convolution counts as a layer whose weights are its propagation, rows scaled to 1. What values and
        feed-forward parts do is left out: a map of where information can come from, no attribution.
        """
        tokens, bias, propagation = self.tokens(graphs, disorder), self._edges(graphs), normalised_adjacency(graphs.adjacency)
        spread = propagation / propagation.sum(-1, keepdim=True)
        flow = torch.eye(tokens.shape[1], device=tokens.device).expand(len(tokens), -1, -1)
        for block in cast("list[Block]", list(self.blocks)):
            for layer in cast("list[TransformerLayer]", list(block.layers)):
                flow = (flow + layer.attended(tokens, bias) @ flow) / 2
                tokens = layer(tokens, bias)
            extra, regions = flow.split([self.NUM_EXTRA, flow.shape[1] - self.NUM_EXTRA], dim=1)
            flow = torch.cat([extra, (regions + spread @ regions) / 2], dim=1)
            tokens = torch.cat([tokens[:, : self.NUM_EXTRA], block.convolution(tokens[:, self.NUM_EXTRA :], propagation)], dim=1)
        share = graphs.present / graphs.present.sum(1, keepdim=True).clamp_min(1)
        return torch.einsum("br,brt->bt", share, flow[:, self.NUM_EXTRA :])

    def _edges(self, graphs: EncoderInput) -> EdgeBias:
        present = None if known_complete(graphs.present) else graphs.present
        return EdgeBias.over_tokens(graphs.adjacency, graphs.edge_prompt, present, num_extra=self.NUM_EXTRA)

    def tokens(self, graphs: EncoderInput, disorder: Tensor | None = None) -> Tensor:
        """(batch, 2 + regions, width) tokens before the first block."""
        batch, regions, _ = graphs.features.shape
        weight = self.projection.weight
        # Zero-padding to the shared width and projecting is projecting with the columns that are in use.
        nodes = functional.linear(graphs.features, weight[:, :regions], self.projection.bias)
        nodes = nodes + functional.linear(graphs.walks, weight[:, -NUM_WALK_STEPS:])
        if graphs.hidden is not None:
            nodes = torch.where(graphs.hidden[:, :, None], self.projection(self.hidden_vector), nodes)
        nodes = nodes + self.node_identity[graphs.atlas]
        named, atlas = self.context(graphs.atlas, disorder)
        extra = torch.stack([named.expand(batch, -1), atlas.expand(batch, -1)], dim=1)
        return torch.cat([extra, nodes], dim=1)


def read_out(nodes: Tensor, present: Tensor | None) -> Tensor:
    """(batch, 2 · width) mean and maximum over present regions."""
    if present is None:
        return torch.cat([nodes.mean(dim=1), nodes.amax(dim=1)], dim=-1)
    there = present[:, :, None]
    count = present.sum(dim=1, keepdim=True).clamp_min(1)
    mean = torch.where(there, nodes, 0.0).sum(dim=1) / count
    largest = torch.where(there, nodes, torch.finfo(nodes.dtype).min).amax(dim=1)
    return torch.cat([mean, largest], dim=-1)


def _small(*sizes: int) -> Tensor:
    return nn.init.normal_(torch.empty(*sizes), std=0.02)
