"""One resting-state dataset in memory: who scans whom, and each person's series in every atlas.

Joins anatomy, population and sources; writes nothing. Region series are denoised as ``parcellate`` does by default
(``simple``: drift, 24 motion parameters, white matter and CSF), so that both levels of a simulation may be packed together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from brainfm_cli.signals.confounds import cosine_basis, expand
from brainfm_cli.simulation.anatomy import Anatomy, RegionMap, build_anatomy, find_atlases, map_regions, map_tissues
from brainfm_cli.simulation.population import Person, Population, PopulationSettings, build_population, draw_person, stream
from brainfm_cli.simulation.sources import PersonSources, Scan, draw_sources, region_series, voxel_series

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from brainfm_cli.atlases.catalogue import Atlas


@dataclass(frozen=True, kw_only=True, eq=False)
class RestSimulation:
    """A population, the scanner's protocol, and the atlases that people are seen through."""

    anatomy: Anatomy
    """The shared anatomy."""
    population: Population
    """The shared truth."""
    scan: Scan
    """Frames and repetition time."""
    atlases: tuple[Atlas, ...]
    """Atlases of the region series."""
    maps: tuple[RegionMap, ...]
    """One per atlas."""
    tissues: RegionMap
    """CSF, white matter, whole brain."""


@dataclass(frozen=True, kw_only=True)
class PersonSeries:
    """One person seen through every atlas."""

    person: Person
    """Who."""
    series: tuple[NDArray[np.float32], ...]
    """Per atlas (steady frames, regions), denoised, in BOLD intensity."""
    mean_fd_mm: float
    """Mean framewise displacement of the scan."""


def build_rest(
    settings: PopulationSettings,
    *,
    seed: int,
    effect: float,
    scan: Scan,
    resolution_mm: float,
    atlases: tuple[str, ...],
    datasets: Mapping[str, Path],
) -> RestSimulation:
    """A simulation that is ready to draw people from; takes about a second at 4 mm."""
    anatomy = build_anatomy(resolution_mm)
    chosen = find_atlases(atlases, datasets)
    return RestSimulation(
        anatomy=anatomy,
        population=build_population(
            settings,
            seed=seed,
            effect=effect,
            node_networks=anatomy.node_networks,
            node_hemispheres=anatomy.node_hemispheres,
            node_centres_mm=anatomy.node_centres_mm,
        ),
        scan=scan,
        atlases=chosen,
        maps=tuple(map_regions(anatomy, atlas) for atlas in chosen),
        tissues=map_tissues(anatomy),
    )


def simulate_series(simulation: RestSimulation, index: int) -> PersonSeries:
    """Person number ``index`` as denoised region series."""
    return series_of(simulation, draw_person(simulation.population, index))


def series_of(simulation: RestSimulation, person: Person) -> PersonSeries:
    """A person as denoised region series."""
    drawn = draw_sources(simulation.anatomy, person, simulation.population.seed, simulation.scan)
    rng = stream(simulation.population.seed, person.index, 4)
    # Tissues first: what a person's confounds are must not depend on the atlases asked for.
    tissues, *series = region_series([simulation.tissues, *simulation.maps], drawn, rng, noise_gain=person.noise_gain)
    steady = slice(simulation.scan.non_steady_frames, None)
    basis = _nuisance_basis(drawn.motion, tissues[:, :2], simulation.scan.repetition_time_s, first=simulation.scan.non_steady_frames)
    clean = [values[steady] - basis @ (basis.T @ values[steady]) for values in series]
    return PersonSeries(person=person, series=tuple(clean), mean_fd_mm=float(np.nanmean(drawn.displacement_mm)))


def simulate_voxels(simulation: RestSimulation, index: int) -> tuple[Person, PersonSources, NDArray[np.float32]]:
    """Person number ``index`` as (brain voxels, frames) BOLD intensity, not denoised."""
    person = draw_person(simulation.population, index)
    drawn = draw_sources(simulation.anatomy, person, simulation.population.seed, simulation.scan)
    rng = stream(simulation.population.seed, index, 5)
    return person, drawn, voxel_series(simulation.anatomy, drawn, rng, simulation.scan, noise_gain=person.noise_gain)


def _nuisance_basis(
    motion: NDArray[np.float64], tissues: NDArray[np.float32], repetition_time_s: float, *, first: int
) -> NDArray[np.float32]:
    """(steady frames, terms) orthonormal: what ``parcellate`` regresses by default, the mean included."""
    steady = len(motion) - first
    expanded = np.column_stack([column for index in range(6) for column in expand("", motion[:, index]).values()])
    expanded[0] = np.where(np.isnan(expanded[0]), expanded[1], expanded[0])  # as nilearn fills the first difference
    design = np.hstack([np.ones((steady, 1)), cosine_basis(steady, repetition_time_s), expanded[first:], tissues[first:]])
    design[:, 1:] -= design[:, 1:].mean(0)
    basis, triangle = np.linalg.qr(design / np.maximum(np.linalg.norm(design, axis=0), 1e-12))
    return basis[:, np.abs(np.diag(triangle)) > 1e-9].astype(np.float32)
