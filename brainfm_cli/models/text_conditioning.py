"""How a text decides what is looked for in a brain: as one pooled vector, or clause by clause.

*Pooled* is the published design: one vector per disorder, projected to the encoder's disorder token, which switches the
graph prompts. *Clauses* is the one that generalises to unseen disorders: the ends of each stated coupling attend to
networks by the cosine between what both are called, so that a new text selects couplings that no label taught.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from brainfm_cli.models.readouts import network_couplings

TEMPERATURE = 0.02
"""Of the softmax over cosines: sentence encoders give related names 0.5 to 0.7, the same name 1."""
_SMALLEST = 1e-6
SHRINKAGE = 0.1
"""Share of the identity in the covariance of couplings before it is inverted."""


@dataclass(frozen=True, kw_only=True)
class StatedCouplings:
    """The couplings that one text states, as vectors of the text encoder."""

    ends: Tensor
    """(facts, 2, width) unit vectors of what the two ends are called; equal for a coupling within."""
    clauses: Tensor
    """(facts, width) unit vectors of the clauses, direction words included."""
    placed: Tensor
    """(facts,) bool: the ends are known; otherwise the clause itself is matched with couplings."""
    signs: Tensor
    """(facts,) +1 stronger, -1 weaker, 0 left to the probe."""

    @classmethod
    def none(cls, width: int) -> StatedCouplings:
        """A text that states nothing."""
        return cls(
            ends=torch.zeros(0, 2, width), clauses=torch.zeros(0, width), placed=torch.zeros(0, dtype=torch.bool), signs=torch.zeros(0)
        )

    def to(self, device: torch.device) -> StatedCouplings:
        """The same on a device."""
        return StatedCouplings(
            ends=self.ends.to(device), clauses=self.clauses.to(device), placed=self.placed.to(device), signs=self.signs.to(device)
        )


@dataclass(frozen=True, kw_only=True)
class NetworkNames:
    """What couplings are called, as vectors of the text encoder."""

    networks: Tensor
    """(networks, width) unit vectors of the networks' words."""
    couplings: Tensor
    """(couplings, width) unit vectors of "between the … and the …" and "within the …", upper triangle row by row."""


@dataclass(frozen=True, kw_only=True)
class CouplingReader:
    """A text in one atlas, ready to be read without a language model: one weight per coupling."""

    shares: Tensor
    """(regions, networks) share of each network in each region."""
    weights: Tensor
    """(couplings,) of unstandardised couplings, in the order of :func:`coupling_pairs`."""
    offset: Tensor
    """() added to the score."""

    def __call__(self, correlation: Tensor, present: Tensor) -> Tensor:
        """(batch,) logits of (batch, regions, regions) correlations with zero diagonal."""
        couplings = network_couplings(correlation, present, self.shares.to(correlation.device))
        return couplings @ self.weights.to(couplings) + self.offset.to(couplings)


class PooledCondition(nn.Module):
    """One text vector to the encoder's disorder token."""

    def __init__(self, text_width: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(text_width, width)

    def forward(self, texts: Tensor) -> Tensor:
        """(texts, width) disorder tokens of (texts, text width) unit vectors."""
        # unit vectors have entries near 1/√width; the projection sees entries near 1
        return self.projection(texts * math.sqrt(texts.shape[-1]))


class ClauseCondition(nn.Module):
    """Stated couplings to a direction among couplings, and the score of people along it.

    A score is ``gain · ⟨d, z⟩ / |d| + whitened gain · ⟨S⁻¹d, z⟩ / |S^-½ d|`` with standardised couplings z, their covariance S
    and the text's direction d; where region vectors are given, their bilinear reading of the same couplings is added.
    """

    def __init__(self, width: int, text_width: int) -> None:
        """``width`` is the encoder's, ``text_width`` the text encoder's."""
        super().__init__()
        self.log_temperature = nn.Parameter(torch.tensor(math.log(TEMPERATURE)))
        self.gain = nn.Parameter(torch.tensor(1.0))
        self.whitened_gain = nn.Parameter(torch.tensor(0.0))
        self.shift = nn.Parameter(torch.tensor(0.0))
        self.norm = nn.LayerNorm(width)
        self.bilinear = nn.Parameter(torch.zeros(width))
        self.register_buffer("probe", torch.zeros(text_width))

    def attention(self, texts: Tensor, names: Tensor) -> Tensor:
        """(…, names) weights of (…, width) unit vectors over (names, width) unit vectors."""
        return functional.softmax(texts @ names.T / self.log_temperature.exp(), dim=-1)

    def direction(self, stated: StatedCouplings, names: NetworkNames) -> Tensor:
        """(couplings,) what the text expects of each coupling; zero where it states nothing."""
        first, second = self.attention(stated.ends, names.networks).unbind(dim=1)
        pairs = first[:, :, None] * second[:, None, :]
        pairs = pairs + pairs.transpose(1, 2)
        rows, columns = torch.triu_indices(*pairs.shape[1:], device=pairs.device)
        placed = pairs[:, rows, columns] * torch.where(rows == columns, 0.5, 1.0)
        matched = self.attention(stated.clauses, names.couplings)
        weights = torch.where(stated.placed[:, None], placed, matched)
        return (self._signs(stated, weights, names)[:, None] * weights).sum(dim=0)

    def forward(self, directions: Tensor, couplings: Tensor, inverse: Tensor, nodes: Tensor | None = None) -> Tensor:
        """(people, texts) logits along the texts' directions; a text that states nothing gives everybody the same.

        Parameters
        ----------
        directions
            (texts, couplings), from :meth:`direction`.
        couplings
            (people, couplings) standardised.
        inverse
            (couplings, couplings) inverse of their (shrunk) covariance within groups.
        nodes
            (people, networks, width) mean region vectors of each network; none leaves the encoder out.
        """
        readings = couplings if nodes is None else couplings + self.read_nodes(nodes)
        whitened = directions @ inverse
        sizes = directions.norm(dim=1).clamp_min(_SMALLEST)
        spreads = (directions * whitened).sum(dim=1).clamp_min(_SMALLEST**2).sqrt()
        return readings @ (self.gain * directions / sizes[:, None] + self.whitened_gain * whitened / spreads[:, None]).T + self.shift

    def weights(self, direction: Tensor, inverse: Tensor) -> Tensor:
        """(couplings,) what a logit adds per unit of each standardised coupling, region vectors left out."""
        couplings = torch.eye(len(direction), dtype=direction.dtype)
        return self(direction[None], couplings, inverse)[:, 0] - self.shift

    def read_nodes(self, nodes: Tensor) -> Tensor:
        """(people, couplings) bilinear reading, the same for every pair of networks, so that it holds for unseen ones."""
        nodes = self.norm(nodes)
        products = (nodes * self.bilinear) @ nodes.transpose(1, 2) / nodes.shape[-1] ** 0.5
        rows, columns = torch.triu_indices(*products.shape[1:], device=products.device)
        return products[:, rows, columns]

    def _signs(self, stated: StatedCouplings, weights: Tensor, names: NetworkNames) -> Tensor:
        """(facts,) stated directions, and the probe's on (clause − name) where none is stated."""
        if bool((stated.signs != 0).all()):
            return stated.signs
        guessed = torch.tanh((stated.clauses - weights @ names.couplings) @ self.get_buffer("probe"))
        return torch.where(stated.signs == 0, guessed, stated.signs)


def fit_probe(clauses: Tensor, names: Tensor, signs: Tensor, *, penalty: float = 1.0) -> Tensor:
    """(width,) ridge direction that tells stronger from weaker in (clause − name) vectors."""
    difference = (clauses - names).double()
    system = difference.T @ difference + penalty * torch.eye(difference.shape[1], dtype=torch.float64)
    return torch.linalg.solve(system, difference.T @ signs.double()).float()


def coupling_pairs(num_networks: int) -> list[tuple[int, int]]:
    """Pairs of networks in the order of coupling vectors: the upper triangle row by row, diagonal included."""
    return [(first, second) for first in range(num_networks) for second in range(first, num_networks)]


def inverse_covariance(couplings: Tensor, groups: Tensor, *, shrinkage: float = SHRINKAGE) -> Tensor:
    """(couplings, couplings) inverse of the covariance within groups of people (dataset, diagnosis), shrunk to the identity.

    ``couplings`` is (people, couplings) standardised, ``groups`` (people,) codes.
    """
    wide = couplings.double()
    codes, places = groups.unique(return_inverse=True)
    sums = torch.zeros(len(codes), wide.shape[1], dtype=wide.dtype, device=wide.device).index_add_(0, places, wide)
    means = sums / torch.bincount(places, minlength=len(codes))[:, None]
    left = wide - means[places]
    covariance = left.T @ left / max(1, len(wide) - len(codes))
    identity = torch.eye(len(covariance), dtype=wide.dtype, device=wide.device)
    scale = covariance.diagonal().mean().clamp_min(1e-12)
    return torch.linalg.inv((1 - shrinkage) * covariance / scale + shrinkage * identity).to(couplings.dtype)
