"""One resting-state dataset in memory: who scans whom, and each person's series in every atlas.

Joins anatomy, population and sources; writes nothing. Region series are denoised as ``parcellate`` does by default
(``simple``: drift, 24 motion parameters, white matter and CSF), so that both levels of a simulation may be packed together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from brainfm_cli.simulation.anatomy import Anatomy, RegionMap, build_anatomy, find_atlases, map_regions, map_tissues
from brainfm_cli.simulation.population import Person, Population, PopulationSettings, build_population, draw_person, stream
from brainfm_cli.simulation.sources import PersonSources, Scan, draw_sources, region_series, voxel_series

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from brainfm_cli.atlases.catalogue import Atlas

_HIGH_PASS_S = 128.0  # fMRIPrep's cut-off of the cosine basis


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
    person, drawn = _draw(simulation, index)
    rng = stream(simulation.population.seed, index, 4)
    # Tissues first: what a person's confounds are must not depend on the atlases asked for.
    tissues, *series = region_series([simulation.tissues, *simulation.maps], drawn, rng, noise_gain=person.noise_gain)
    steady = slice(simulation.scan.non_steady_frames, None)
    basis = _nuisance_basis(drawn.motion[steady], tissues[steady, :2], simulation.scan.repetition_time_s)
    clean = [values[steady] - basis @ (basis.T @ values[steady]) for values in series]
    return PersonSeries(person=person, series=tuple(clean), mean_fd_mm=float(np.nanmean(drawn.displacement_mm)))


def simulate_voxels(simulation: RestSimulation, index: int) -> tuple[Person, PersonSources, NDArray[np.float32]]:
    """Person number ``index`` as (brain voxels, frames) BOLD intensity, not denoised."""
    person, drawn = _draw(simulation, index)
    rng = stream(simulation.population.seed, index, 5)
    return person, drawn, voxel_series(simulation.anatomy, drawn, rng, simulation.scan, noise_gain=person.noise_gain)


def cosine_basis(frames: int, repetition_time_s: float) -> NDArray[np.float64]:
    """(frames, terms) discrete cosines slower than 128 s, as fMRIPrep writes them."""
    count = int(np.floor(2 * frames * repetition_time_s / _HIGH_PASS_S))
    phase = (np.arange(frames) + 0.5) * np.pi / frames
    return np.sqrt(2 / frames) * np.cos(phase[:, None] * np.arange(1, count + 1))


def motion_expansion(motion: NDArray[np.float64]) -> NDArray[np.float64]:
    """(frames, 24) parameters, differences, squares of both; the first difference is 0."""
    change = np.vstack([np.zeros((1, motion.shape[1])), np.diff(motion, axis=0)])
    return np.hstack([motion, change, motion**2, change**2])


def _draw(simulation: RestSimulation, index: int) -> tuple[Person, PersonSources]:
    person = draw_person(simulation.population, index)
    return person, draw_sources(simulation.anatomy, person, simulation.population.seed, simulation.scan)


def _nuisance_basis(motion: NDArray[np.float64], tissues: NDArray[np.float32], repetition_time_s: float) -> NDArray[np.float32]:
    frames = len(motion)
    design = np.hstack([np.ones((frames, 1)), cosine_basis(frames, repetition_time_s), motion_expansion(motion), tissues])
    basis, triangle = np.linalg.qr(design / np.maximum(np.linalg.norm(design, axis=0), 1e-12))
    return basis[:, np.abs(np.diag(triangle)) > 1e-9].astype(np.float32)
