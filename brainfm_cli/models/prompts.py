"""Graph prompts: a learned gain on connectivity and a learned edge weight, per atlas, switched by the context tokens.

Node prompt: X · (1 + tanh(α_n·P + β_n)). Edge prompt: A + 0.3·σ(α_e·E + β_e)·(1 − A), symmetric, zero diagonal.
The four gates come from the disorder and atlas tokens. β_e starts at −4, so that a non-edge starts near 0.005
and the graph stays sparse (at 0 every non-edge would be 0.15).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from brainfm_cli.models.graphs import Graphs, known_complete

EDGE_STRENGTH = 0.3
_FIRST_GATES = (1.0, 0.0, 1.0, -4.0)


class GraphPrompt(nn.Module):
    """One node prompt and one edge prompt per atlas, with gates from [disorder ‖ atlas]."""

    def __init__(self, width: int, atlases: Mapping[str, int]) -> None:
        super().__init__()
        self.node = nn.ParameterDict({label: 0.02 * torch.randn(n, n) for label, n in sorted(atlases.items())})
        self.edge = nn.ParameterDict({label: 0.02 * torch.randn(n, n) for label, n in sorted(atlases.items())})
        last = nn.Linear(width, 4)
        nn.init.normal_(last.weight, std=0.02)
        with torch.no_grad():
            last.bias.copy_(torch.tensor(_FIRST_GATES))
        self.gates = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), last)

    def forward(self, graphs: Graphs, disorder: Tensor, atlas: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Prompted features, prompted adjacency, and the (1 or batch, regions, regions) edge prompt.

        ``disorder`` (1 or batch, width) and ``atlas`` (1, width) are the encoder's context tokens. Entries of
        hidden and absent regions stay zero.
        """
        gates = self.gates(torch.cat([disorder, atlas.expand(disorder.shape[0], -1)], dim=-1))
        alpha_node, beta_node, alpha_edge, beta_edge = gates[:, :, None, None].unbind(dim=1)
        gain = 1.0 + torch.tanh(alpha_node * self.node[graphs.atlas] + beta_node)
        edge = torch.sigmoid(alpha_edge * self.edge[graphs.atlas] + beta_edge)
        edge = 0.5 * (edge + edge.transpose(1, 2))
        edge = edge * (1.0 - torch.eye(edge.shape[-1], device=edge.device, dtype=edge.dtype))
        usable = graphs.present if graphs.hidden is None else graphs.present & ~graphs.hidden
        offered = edge
        if not known_complete(usable):
            usable = usable.to(edge.dtype)
            offered = edge * usable[:, :, None] * usable[:, None, :]
        adjacency = graphs.adjacency + EDGE_STRENGTH * offered * (1.0 - graphs.adjacency)
        return graphs.features * gain, adjacency, edge


class TargetPrompt(nn.Module):
    """What is tuned for one target in one atlas: a graph prompt of its own and the disorder token that switches it."""

    def __init__(self, pretrained: GraphPrompt, token: Tensor, atlas: str) -> None:
        """Starts as the pretrained prompt, so that an untuned one changes nothing."""
        super().__init__()
        regions = pretrained.node[atlas].shape[0]
        self.graph = GraphPrompt(token.shape[-1], {atlas: regions})
        own = pretrained.state_dict()
        self.graph.load_state_dict({name: own[name] for name in self.graph.state_dict()})
        self.token = nn.Parameter(token.detach().clone().reshape(1, -1))
        self.to(token.device)
