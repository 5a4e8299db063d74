"""One simulated person as fMRIPrep would have left them: a series in template space, a brain mask and a confounds table.

The image is realigned and not denoised: what motion left behind is in the voxels, and the motion is in the table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from brainfm_cli.signals.confounds import build_table, dvars, mean_signals, noise_components
from brainfm_cli.signals.transforms import centre_of_mass_mm, from_motion_table, rms_deviation
from brainfm_cli.simulation.anatomy import tissue_masks
from brainfm_cli.simulation.rest import simulate_voxels

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd
    from numpy.typing import NDArray

    from brainfm_cli.simulation.anatomy import Anatomy
    from brainfm_cli.simulation.population import Person
    from brainfm_cli.simulation.rest import RestSimulation
    from brainfm_cli.simulation.sources import PersonSources


@dataclass(frozen=True, kw_only=True, eq=False)
class PreprocessedRun:
    """One person's run in template space."""

    person: Person
    """Who."""
    series: NDArray[np.float32]
    """(brain voxels, frames) whole numbers, as the image stores them."""
    confounds: pd.DataFrame
    """fMRIPrep's columns, one row per frame."""
    descriptions: dict[str, Any]
    """What each column is."""


def simulate_run(simulation: RestSimulation, index: int) -> PreprocessedRun:
    """Person number ``index`` with the image and the confounds that fMRIPrep would give."""
    person, drawn, series = simulate_voxels(simulation, index)
    np.rint(series, out=series)
    table, descriptions = _confounds(simulation, drawn, series.T)
    return PreprocessedRun(person=person, series=series, confounds=table, descriptions=descriptions)


def volumes(anatomy: Anatomy, series: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """(x, y, z) images of the frames of a (brain voxels, frames) series, 0 outside the brain."""
    volume = np.zeros(int(np.prod(anatomy.shape)), np.float32)
    for frame in range(series.shape[1]):
        volume[anatomy.voxels] = series[:, frame]
        yield volume.reshape(anatomy.shape)


def brain_mask(anatomy: Anatomy) -> NDArray[np.uint8]:
    """(x, y, z) 1 inside the brain."""
    mask = np.zeros(int(np.prod(anatomy.shape)), np.uint8)
    mask[anatomy.voxels] = 1
    return mask.reshape(anatomy.shape)


def _confounds(simulation: RestSimulation, drawn: PersonSources, series: NDArray[np.float32]) -> tuple[pd.DataFrame, dict[str, Any]]:
    anatomy, scan = simulation.anatomy, simulation.scan
    csf, white, brain = tissue_masks(anatomy) > 0
    first = scan.non_steady_frames
    masks = {"csf": csf, "white_matter": white, "global_signal": brain, "csf_wm": csf | white}
    noise = {"CSF": csf, "WM": white, "combined": csf | white}
    return build_table(
        signals=mean_signals(series, masks),
        motion=drawn.motion,
        rmsd=_rms_deviation(anatomy, drawn.motion),
        dvars_pair=dvars(series),
        components={
            name: noise_components(series, voxels, repetition_time_s=scan.repetition_time_s, first=first) for name, voxels in noise.items()
        },
        repetition_time_s=scan.repetition_time_s,
        first=first,
    )


def _rms_deviation(anatomy: Anatomy, motion: NDArray[np.float64]) -> NDArray[np.float64]:
    image = np.zeros(int(np.prod(anatomy.shape)))
    image[anatomy.voxels] = anatomy.baseline
    zooms = np.linalg.norm(anatomy.affine[:3, :3], axis=0)
    centre = centre_of_mass_mm(image.reshape(anatomy.shape), zooms.tolist())
    return rms_deviation(from_motion_table(motion, anatomy.shape, anatomy.affine, centre), anatomy.shape, anatomy.affine)
