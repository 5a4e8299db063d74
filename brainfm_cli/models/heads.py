"""What is put on top of an encoder: the masked-node decoder and the contrast projection."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from brainfm_cli.models.attention import NO_BIAS, EdgeBias
from brainfm_cli.models.graph_encoder import TransformerLayer


class NodeDecoder(nn.Module):
    """Region vectors back to connectivity rows and edges: two pre-norm layers with a token for hidden regions.

    Rows are read out with one learned vector per region of the atlas, so that a column means a region and not a
    position. Edges are scaled cosines of decoded vectors, less their mean over regions.
    """

    def __init__(self, width: int, atlases: Mapping[str, int], *, num_layers: int = 2, num_heads: int = 4, feedforward: int) -> None:
        super().__init__()
        self.enter = nn.Linear(width, width)
        self.hidden_token = nn.Parameter(nn.init.normal_(torch.empty(width), std=0.02))
        self.layers = nn.ModuleList(TransformerLayer(width, num_heads, feedforward, 0.0, edge_bias=False) for _ in range(num_layers))
        self.norm = nn.LayerNorm(width)
        self.columns = nn.ParameterDict(
            {label: nn.init.normal_(torch.empty(n, width), std=width**-0.5) for label, n in sorted(atlases.items())}
        )
        self.offset = nn.ParameterDict({label: torch.zeros(n) for label, n in sorted(atlases.items())})
        self.edge_scale = nn.Parameter(torch.tensor(1.0))
        self.edge_shift = nn.Parameter(torch.tensor(0.0))

    def forward(self, nodes: Tensor, hidden: Tensor, present: Tensor | None, identity: Tensor) -> Tensor:
        """(batch, regions, width) decoded vectors.

        ``identity`` (regions, width) tells hidden regions apart; ``present`` is none where every region is.
        """
        tokens = torch.where(hidden[:, :, None], self.hidden_token + identity, self.enter(nodes))
        bias = NO_BIAS if present is None else EdgeBias(adjacency=None, prompt=None, absent=~present)
        for layer in self.layers:
            tokens = layer(tokens, bias)
        return self.norm(tokens)

    def rows(self, decoded: Tensor, atlas: str) -> Tensor:
        """(…, regions) connectivity rows from (…, width) decoded vectors."""
        return decoded @ self.columns[atlas].T + self.offset[atlas]

    def edge_logits(self, decoded: Tensor) -> Tensor:
        """(batch, regions, regions) log odds of an edge."""
        # What all regions share would make every cosine 1, and no edge could be told from another.
        unit = nn.functional.normalize(decoded - decoded.mean(dim=1, keepdim=True), dim=-1)
        return self.edge_scale * torch.bmm(unit, unit.transpose(1, 2)) + self.edge_shift


class ContrastHead(nn.Module):
    """Readout to unit vectors for contrast: a two-layer perceptron."""

    def __init__(self, width: int, out_width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2 * width, width), nn.GELU(), nn.Linear(width, out_width))

    def forward(self, readout: Tensor) -> Tensor:
        """(batch, out width) of length one."""
        return nn.functional.normalize(self.layers(readout), dim=-1)
