"""Who the simulated people are: site, age, sex, diagnosis, motion, and how their networks are coupled.

Person ``i`` depends on (seed, i) and on the settings only, so that two datasets of one population may be written apart.
All couplings live in the logarithm of the network covariance, where planted shifts add up and any sum is a covariance.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field
from scipy import linalg

from brainfm_cli.config import Frozen
from brainfm_cli.simulation.anatomy import NETWORKS, YEO_NETWORKS

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONTROL = "control"
# Invented names: nobody may mistake a planted effect for a claim about a real disorder.
DISORDER_NAMES = (
    "Arvel", "Brennic", "Caldor", "Dornish", "Elmar", "Fenwick", "Garron", "Hallow", "Istrid", "Jorvik", "Kelder", "Lorant",
    "Mirren", "Norval", "Osric", "Perrin", "Quillan", "Rothen", "Selwyn", "Tamsin", "Ulric", "Verrin", "Wystan", "Yorrick",
    "Zelany", "Abrec", "Bastin", "Corvin", "Destrel", "Edrith", "Faldor", "Grimond", "Hestor", "Ingram", "Jessamy", "Kendry",
)  # fmt: skip
NETWORK_WORDS = {
    "Visual": "visual network",
    "Somatomotor": "somatomotor network",
    "Dorsal Attention": "dorsal attention network",
    "Salience/Ventral Attention": "salience network",
    "Limbic": "limbic network",
    "Control": "frontoparietal control network",
    "Default": "default mode network",
}
COUPLINGS = tuple((first, second) for first, second in itertools.combinations_with_replacement(YEO_NETWORKS, 2))
SPREAD = 0.35  # SD over people of each coupling, in the logarithm of the network covariance
_NODE_SPREAD = 0.12  # SD over people of each pair of nodes: idiosyncratic, unrelated to anything recorded
_NETWORK_VARIANCE, _NODE_VARIANCE = 0.6, 0.35
_SITE_SPREAD = 0.08

# Correlation between networks at rest in a typical adult, in the order of NETWORKS.
_TYPICAL = np.array([
    [1.00, 0.38, 0.40, 0.15, 0.05, 0.05, -0.02, 0.10],
    [0.38, 1.00, 0.36, 0.34, 0.05, -0.02, -0.05, 0.15],
    [0.40, 0.36, 1.00, 0.30, -0.05, 0.28, -0.15, 0.10],
    [0.15, 0.34, 0.30, 1.00, 0.08, 0.25, -0.08, 0.20],
    [0.05, 0.05, -0.05, 0.08, 1.00, 0.08, 0.32, 0.15],
    [0.05, -0.02, 0.28, 0.25, 0.08, 1.00, 0.28, 0.12],
    [-0.02, -0.05, -0.15, -0.08, 0.32, 0.28, 1.00, 0.10],
    [0.10, 0.15, 0.10, 0.20, 0.15, 0.12, 0.10, 1.00],
])  # fmt: skip


class PopulationSettings(Frozen):
    """Whom to simulate. Part of the settings of ``simulate``."""

    num_disorders: int = Field(default=12, ge=1, le=len(DISORDER_NAMES))
    """Disorders drawn from the seed."""
    disorders: tuple[str, ...] = ()
    """Names of the disorders that people have; empty means all of them. The others stay described, for zero-shot tests."""
    couplings_per_disorder: int = Field(default=3, ge=1, le=10)
    """Network couplings that each disorder shifts."""
    case_share: float = Field(default=0.5, gt=0, lt=1)
    """Share of people with a disorder."""
    num_sites: int = Field(default=4, ge=1, le=26)
    """Sites, with their own age range, couplings and share of cases."""
    confounding: float = Field(default=1.0, ge=0)
    """How strongly diagnosis goes with age, sex, site and motion; 1 gives a covariate floor near 0.6. Ignored at effect 0."""
    holdout_share: float = Field(default=0.3, ge=0, lt=1)
    """Share of people marked 'holdout' in the column 'split'."""
    mean_fd_mm: float = Field(default=0.16, gt=0)
    """Median over people of the mean framewise displacement, millimetres."""


@dataclass(frozen=True, kw_only=True)
class Disorder:
    """One disorder: the couplings it shifts."""

    name: str
    """Invented name."""
    abbreviation: str
    """Three or four letters."""
    couplings: tuple[tuple[str, str], ...]
    """Pairs of Yeo network names; a pair of equals is the coupling within a network."""
    directions: tuple[int, ...]
    """+1 stronger, -1 weaker, one per coupling."""

    @property
    def description(self) -> str:
        """The clinical description: says which couplings change, and how."""
        clauses = [
            f"{'stronger' if sign > 0 else 'weaker'} coupling {coupling_words(pair)}"
            for pair, sign in zip(self.couplings, self.directions, strict=True)
        ]
        listed = clauses[0] if len(clauses) == 1 else f"{', '.join(clauses[:-1])} and {clauses[-1]}"
        return f"{self.name} disorder ({self.abbreviation}) shows {listed}."

    def shift(self) -> NDArray[np.float64]:
        """(8, 8) symmetric: +1 or -1 at the shifted couplings."""
        change = np.zeros((len(NETWORKS), len(NETWORKS)))
        for (first, second), sign in zip(self.couplings, self.directions, strict=True):
            i, j = NETWORKS.index(first), NETWORKS.index(second)
            change[i, j] = change[j, i] = sign
        return change


@dataclass(frozen=True, kw_only=True)
class Person:
    """One person: what participants.tsv says, and how their networks are coupled."""

    index: int
    """Number of the person in the population, from 1."""
    age: float
    """Years."""
    sex: str
    """F or M."""
    site: str
    """Site name."""
    diagnosis: str
    """``control`` or a disorder's name."""
    split: str
    """discovery or holdout."""
    mean_fd_mm: float
    """Planned mean framewise displacement."""
    noise_gain: float
    """Thermal noise of the person's scanner, 1 on average."""
    coupling: NDArray[np.float64]
    """(8, 8) symmetric deviation of the person's log network covariance from the typical one, covariates included."""
    node_covariance: NDArray[np.float64]
    """(nodes, nodes) covariance of the source signals."""
    node_tilt: NDArray[np.float64] | None = None
    """(nodes,) exponent by which the power of each source signal is tilted towards fast (positive); none for no tilt."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Population:
    """Everything that is shared by the people of one seed."""

    settings: PopulationSettings
    """Whom to simulate."""
    seed: int
    """Seed of the population."""
    effect: float
    """Size of the planted shifts, in SDs of :data:`SPREAD`; 0 makes diagnosis independent of everything."""
    disorders: tuple[Disorder, ...]
    """All disorders of the seed, in the order of their names."""
    age_shift: NDArray[np.float64]
    """(8, 8) change of log covariance per SD of age (12 years)."""
    sex_shift: NDArray[np.float64]
    """(8, 8) change of log covariance from F to M."""
    site_shifts: NDArray[np.float64]
    """(sites, 8, 8) change of log covariance at each site."""
    node_networks: NDArray[np.int64]
    """(nodes,) network of each source node."""
    node_logarithm: NDArray[np.float64]
    """(nodes, nodes) logarithm of the typical covariance of what is a node's own."""
    mixing: NDArray[np.float64] | None = None
    """(28, 28) what makes people's own couplings go together, in the order of :data:`COUPLINGS`; none: every coupling varies by itself."""

    @property
    def present(self) -> tuple[Disorder, ...]:
        """Disorders that people of this cohort have."""
        return tuple(disorder for disorder in self.disorders if not self.settings.disorders or disorder.name in self.settings.disorders)

    @property
    def confounding(self) -> float:
        """How strongly diagnosis goes with covariates; none in a null cohort."""
        return self.settings.confounding if self.effect > 0 else 0.0

    def shift_of(self, diagnosis: str) -> NDArray[np.float64]:
        """(8, 8) planted change of log covariance, zero for controls."""
        for disorder in self.disorders:
            if disorder.name == diagnosis:
                return self.effect * SPREAD * disorder.shift()
        return np.zeros((len(NETWORKS), len(NETWORKS)))


def stream(seed: int, person: int, purpose: int) -> np.random.Generator:
    """The generator of one purpose of one person: 0 traits, 1 couplings, 2 sources, 3 motion, 4 and 5 thermal noise, 6 dynamics, 7 outcome."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(seed, spawn_key=(1, person, purpose))))


def build_population(
    settings: PopulationSettings, *, seed: int, effect: float, node_networks: NDArray, node_hemispheres: NDArray, node_centres_mm: NDArray
) -> Population:
    """The population of a seed: its disorders, covariate effects and sites."""
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(0,))))
    disorders = _draw_disorders(settings, rng)
    # Sized apart from the sex and age draws, so that more sites leave the first ones as they are.
    age, sex = _random_shift(rng, 6, 0.10), _random_shift(rng, 5, 0.16)
    sites = np.stack([_symmetric(rng.normal(size=(len(NETWORKS), len(NETWORKS)))) * _SITE_SPREAD for _ in range(settings.num_sites)])
    return Population(
        settings=settings,
        seed=seed,
        effect=effect,
        disorders=disorders,
        age_shift=age,
        sex_shift=sex,
        site_shifts=sites,
        node_networks=node_networks,
        node_logarithm=_node_logarithm(node_networks, node_hemispheres, node_centres_mm),
    )


def draw_person(population: Population, index: int) -> Person:
    """Person number ``index``; the same whoever else is simulated."""
    settings, confounding = population.settings, population.confounding
    traits = stream(population.seed, index, 0)
    site = int(traits.integers(settings.num_sites))
    # Sites differ in their share of cases, alternately more and fewer.
    share = np.clip(settings.case_share + confounding * 0.05 * (1 if site % 2 else -1) * (settings.num_sites > 1), 0.02, 0.98)
    is_case = traits.random() < share
    which = population.present[int(traits.integers(len(population.present)))].name
    centre = 38.0 + 4.0 * (site % 3)
    age = float(np.clip(centre + 12.0 * traits.normal() + confounding * 2.0 * is_case, 18.0, 85.0))
    male = bool(traits.random() < 0.5 + confounding * 0.04 * (1 if is_case else -1))
    years = (age - 40.0) / 12.0
    fd = settings.mean_fd_mm * np.exp(0.35 * traits.normal() + 0.12 * years + 0.1 * confounding * is_case)
    split = "holdout" if traits.random() < settings.holdout_share else "discovery"
    diagnosis = which if is_case else CONTROL
    known = known_shift(population, age=age, male=male, site=site)
    own = stream(population.seed, index, 1)
    deviation = _mixed(_symmetric(own.normal(size=(len(NETWORKS), len(NETWORKS)))), population.mixing)
    coupling = known + population.shift_of(diagnosis) + SPREAD * deviation
    return Person(
        index=index,
        age=round(age, 1),
        sex="M" if male else "F",
        site=site_name(site),
        diagnosis=diagnosis,
        split=split,
        mean_fd_mm=float(np.clip(fd, 0.03, 1.2)),
        noise_gain=1.0 + 0.1 * ((site % 3) - 1),
        coupling=coupling,
        node_covariance=_node_covariance(population, coupling, own),
    )


def known_shift(population: Population, *, age: float, male: bool, site: int) -> NDArray[np.float64]:
    """(8, 8) change of log covariance that age, sex and site bring."""
    return (age - 40.0) / 12.0 * population.age_shift + (0.5 if male else -0.5) * population.sex_shift + population.site_shifts[site]


def site_name(site: int) -> str:
    """Name of a site: ``siteA``, ``siteB``, and so on."""
    return f"site{chr(ord('A') + site)}"


def coupling_name(pair: tuple[str, str]) -> str:
    """``Control--Default``, in the order of :data:`YEO_NETWORKS`; ``Visual--Visual`` is the coupling within."""
    return "--".join(pair)


def coupling_words(pair: tuple[str, str]) -> str:
    """``within the visual network`` or ``between the visual network and the limbic network``."""
    first, second = (NETWORK_WORDS[name] for name in pair)
    return f"within the {first}" if first == second else f"between the {first} and the {second}"


def typical_logarithm() -> NDArray[np.float64]:
    """(8, 8) logarithm of the typical network covariance."""
    return _logarithm(_NETWORK_VARIANCE * _TYPICAL)


def _draw_disorders(settings: PopulationSettings, rng: np.random.Generator) -> tuple[Disorder, ...]:
    taken: set[frozenset[int]] = set()
    disorders = []
    for name in DISORDER_NAMES[: settings.num_disorders]:
        chosen: NDArray[np.int64] = rng.choice(len(COUPLINGS), settings.couplings_per_disorder, replace=False)
        while frozenset(chosen.tolist()) in taken:
            chosen = rng.choice(len(COUPLINGS), settings.couplings_per_disorder, replace=False)
        taken.add(frozenset(chosen.tolist()))
        signs = rng.choice([-1, 1], settings.couplings_per_disorder)
        disorders.append(
            Disorder(
                name=name,
                abbreviation=f"{name[:3].upper()}D",
                couplings=tuple(COUPLINGS[index] for index in chosen),
                directions=tuple(int(sign) for sign in signs),
            )
        )
    return tuple(disorders)


def _random_shift(rng: np.random.Generator, count: int, size: float) -> NDArray[np.float64]:
    """(8, 8) symmetric: ``count`` couplings shifted by ``size`` in random directions."""
    change = np.zeros((len(NETWORKS), len(NETWORKS)))
    for index in rng.choice(len(COUPLINGS), count, replace=False):
        i, j = (YEO_NETWORKS.index(name) for name in COUPLINGS[index])
        change[i, j] = change[j, i] = size * rng.choice([-1, 1])
    return change


def _symmetric(square: NDArray[np.float64]) -> NDArray[np.float64]:
    """The lower triangle mirrored: every entry keeps its variance."""
    lower = np.tril(square)
    return lower + np.tril(square, -1).T


def _mixed(deviation: NDArray[np.float64], mixing: NDArray[np.float64] | None) -> NDArray[np.float64]:
    """The couplings between Yeo networks, mixed; those with what is no Yeo network stay."""
    if mixing is None:
        return deviation
    rows, columns = np.triu_indices(len(YEO_NETWORKS))
    changed = deviation.copy()
    changed[rows, columns] = changed[columns, rows] = mixing @ deviation[rows, columns]
    return changed


def _node_covariance(population: Population, coupling: NDArray[np.float64], own: np.random.Generator) -> NDArray[np.float64]:
    shared = _exponential(typical_logarithm() + coupling)
    nodes = len(population.node_networks)
    private = _exponential(population.node_logarithm + _NODE_SPREAD * _symmetric(own.normal(size=(nodes, nodes))))
    return shared[np.ix_(population.node_networks, population.node_networks)] + private


def _node_logarithm(networks: NDArray, hemispheres: NDArray, centres_mm: NDArray) -> NDArray[np.float64]:
    """Logarithm of a node's own covariance: nodes go with near nodes and with their mirror image."""
    mirrored = centres_mm * np.array([-1, 1, 1])
    near = np.exp(-0.5 * (np.linalg.norm(centres_mm[:, None] - centres_mm[None], axis=2) / 25.0) ** 2)
    across = np.exp(-0.5 * (np.linalg.norm(centres_mm[:, None] - mirrored[None], axis=2) / 20.0) ** 2)
    homotopic = across * (networks[:, None] == networks[None]) * (hemispheres[:, None] != hemispheres[None])
    blend = 0.35 * near + 0.3 * homotopic + 0.65 * np.eye(len(networks))
    values, vectors = linalg.eigh((blend + blend.T) / 2)
    return _logarithm(_NODE_VARIANCE * (vectors * np.maximum(values, 0.05)) @ vectors.T)


def _logarithm(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = linalg.eigh(matrix)
    return (vectors * np.log(values)) @ vectors.T


def _exponential(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = linalg.eigh(matrix)
    return (vectors * np.exp(values)) @ vectors.T
