"""The whole graph model: standardisation, prompt, encoder, decoder and contrast head in one module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from brainfm_cli.models.graph_encoder import EncoderInput, EncoderShape, Encoding, GraphEncoder
from brainfm_cli.models.graphs import Graphs, full_precision, known_complete, random_walk_encoding
from brainfm_cli.models.heads import ContrastHead, NodeDecoder
from brainfm_cli.models.prompts import GraphPrompt

CONTRAST_WIDTH = 128


class Standardiser(nn.Module):
    """Mean and spread of every edge, fitted on the pretraining people and kept with the weights (not trained)."""

    def __init__(self, atlases: Mapping[str, int]) -> None:
        super().__init__()
        self.atlases = dict(atlases)
        for label, regions in sorted(atlases.items()):
            self.register_buffer(f"mean_{label}", torch.zeros(regions, regions))
            self.register_buffer(f"scale_{label}", torch.ones(regions, regions))

    def set(self, atlas: str, mean: Tensor, scale: Tensor) -> None:
        """Take over fitted (regions, regions) statistics."""
        self.get_buffer(f"mean_{atlas}").copy_(mean)
        self.get_buffer(f"scale_{atlas}").copy_(scale)

    def forward(self, graphs: Graphs) -> Graphs:
        """The graphs with each connectivity entry centred and divided by its spread; absent entries stay zero."""
        features = (graphs.features - self.get_buffer(f"mean_{graphs.atlas}")) / self.get_buffer(f"scale_{graphs.atlas}")
        there = graphs.present.to(features.dtype)
        features = features * there[:, :, None] * there[:, None, :]
        features.diagonal(dim1=1, dim2=2).zero_()
        return replace(graphs, features=features)


class GraphModel(nn.Module):
    """Graphs to region vectors and readout, with the heads that pretraining needs."""

    def __init__(self, shape: EncoderShape, atlases: Mapping[str, int]) -> None:
        """``atlases`` gives the number of regions per atlas label."""
        super().__init__()
        self.standardiser = Standardiser(atlases)
        self.encoder = GraphEncoder(shape, atlases)
        self.prompt = GraphPrompt(shape.width, atlases)
        self.decoder = NodeDecoder(shape.width, atlases, feedforward=shape.feedforward)
        self.contrast = ContrastHead(shape.width, min(CONTRAST_WIDTH, shape.width))

    def encode(self, graphs: Graphs, *, prompt: GraphPrompt | None = None, disorder: Tensor | None = None) -> Encoding:
        """Encode standardised graphs; ``prompt`` replaces the model's own, ``disorder`` is a (batch, width) token."""
        return self.encoder(self.prompted(graphs, prompt=prompt, disorder=disorder), disorder)

    def rollout(self, graphs: Graphs, *, prompt: GraphPrompt | None = None, disorder: Tensor | None = None) -> Tensor:
        """(batch, 2 + regions) attention rollout (:meth:`GraphEncoder.rollout`); arguments as for :meth:`encode`."""
        return self.encoder.rollout(self.prompted(graphs, prompt=prompt, disorder=disorder), disorder)

    def prompted(self, graphs: Graphs, *, prompt: GraphPrompt | None = None, disorder: Tensor | None = None) -> EncoderInput:
        """The encoder's input: graphs after the prompt, with random-walk encodings of the unprompted graph."""
        named, atlas = self.encoder.context(graphs.atlas, disorder)
        features, adjacency, edge = (prompt or self.prompt)(graphs, named, atlas)
        with torch.no_grad(), full_precision(graphs.adjacency.device):
            walks = random_walk_encoding(graphs.adjacency)
        return EncoderInput(
            atlas=graphs.atlas,
            features=features,
            walks=walks,
            adjacency=adjacency,
            edge_prompt=edge,
            present=graphs.present,
            hidden=graphs.hidden,
        )

    def decode(self, encoding: Encoding, graphs: Graphs, hidden: Tensor) -> Tensor:
        """(batch, regions, width) decoded vectors of graphs that were encoded with ``hidden`` (batch, regions) masked."""
        present = None if known_complete(graphs.present) else graphs.present
        return self.decoder(encoding.nodes, hidden, present, self.encoder.node_identity[graphs.atlas])
