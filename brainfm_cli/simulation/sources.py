"""The temporal half of the generative model: what one person's sources do during a scan.

Source series are Gaussian with the power spectrum of BOLD at rest: 1/f neural power seen through the haemodynamic
response, hence 0.01 to 0.1 Hz. Motion is a slow wander with occasional jerks.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from scipy import fft, linalg, signal, special

from brainfm_cli.signals.confounds import FD_RADIUS_MM, HIGH_PASS_PERIOD_S, framewise_displacement
from brainfm_cli.simulation.population import stream

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from brainfm_cli.simulation.anatomy import Anatomy, RegionMap
    from brainfm_cli.simulation.population import Person

# SDs as a share of the mean intensity.
_NODE_SD, _LOCAL_SD, _THERMAL_SD = 0.008, 0.010, 0.010
_CSF_SD, _WHITE_SD, _BREATH_SD, _DRIFT_SD = 0.015, 0.003, 0.0015, 0.006
_JERK_DECAY_S = 4.0
_JERK_SHARE = 0.04
_TILT_PIVOT_HZ = 0.03
NON_STEADY_GAIN = 0.12  # the first frames are brighter before T1 saturation


@dataclass(frozen=True, kw_only=True)
class Scan:
    """How long and how fast a scan is."""

    frames: int
    """Frames in the file, non-steady ones included."""
    repetition_time_s: float
    """Seconds between frames."""
    non_steady_frames: int
    """Frames at the beginning before the magnetisation is steady."""


@dataclass(frozen=True, kw_only=True)
class PersonSources:
    """What one person's sources do during one scan."""

    sources: NDArray[np.float32]
    """(frames, nodes + local + 7 motion + 3 tissues), the columns of :attr:`RegionMap.sources`."""
    motion: NDArray[np.float64]
    """(frames, 6) millimetres and radians, in the order of :data:`brainfm_cli.signals.confounds.MOTION`."""
    displacement_mm: NDArray[np.float64]
    """(frames,) framewise displacement (Power 2012), nan in the first frame."""


def draw_sources(anatomy: Anatomy, person: Person, seed: int, scan: Scan) -> PersonSources:
    """One person's sources during one scan; the same for every atlas and for the voxel image."""
    rng = stream(seed, person.index, 2)
    nodes = rest_noise(rng, anatomy.num_nodes, scan, tilt=person.node_tilt)
    local = rest_noise(rng, anatomy.local.shape[1], scan)
    body = rest_noise(rng, 5, scan)
    motion = _motion(stream(seed, person.index, 3), person.mean_fd_mm, scan.frames)
    moved = framewise_displacement(motion)
    jerk = signal.lfilter([1.0], [1.0, -np.exp(-scan.repetition_time_s / _JERK_DECAY_S)], np.nan_to_num(moved) ** 1.5)
    # The symmetric root keeps each node's own spectrum on that node; the covariance is the same with either.
    root = linalg.cholesky(person.node_covariance, lower=True) if person.node_tilt is None else _symmetric_root(person.node_covariance)
    tissues = np.stack([_CSF_SD * body[:, 0], np.zeros(scan.frames), _WHITE_SD * body[:, 1]], 1)
    tissues += _BREATH_SD * body[:, 2:3]
    slow = np.linspace(-1, 1, scan.frames)
    tissues += _DRIFT_SD * (body[:1, 3] * slow + body[:1, 4] * (slow**2 - 1 / 3))[:, None]
    sources = np.hstack(
        [
            _NODE_SD * nodes @ root.T.astype(np.float32),
            _LOCAL_SD * local,
            motion - motion.mean(0),
            (jerk * _JERK_SHARE)[:, None],
            tissues,
        ]
    )
    return PersonSources(sources=sources.astype(np.float32), motion=motion, displacement_mm=moved)


def region_series(maps: list[RegionMap], drawn: PersonSources, rng: np.random.Generator, *, noise_gain: float) -> list[NDArray[np.float32]]:
    """(frames, regions) of each map, in BOLD intensity around zero.

    Thermal noise is drawn apart for each map: it averages to almost nothing over a region's voxels, so what two
    atlases share of it is left out.
    """
    stacked = drawn.sources @ np.vstack([region_map.sources for region_map in maps]).T
    thermal = np.concatenate([region_map.thermal for region_map in maps])
    stacked += rng.standard_normal(stacked.shape, np.float32) * (thermal * np.float32(_THERMAL_SD * noise_gain))
    return np.split(stacked, np.cumsum([len(region_map.thermal) for region_map in maps])[:-1], axis=1)


def voxel_series(anatomy: Anatomy, drawn: PersonSources, rng: np.random.Generator, scan: Scan, *, noise_gain: float) -> NDArray[np.float32]:
    """(brain voxels, frames) BOLD intensity, baseline included."""
    nodes, local = anatomy.num_nodes, anatomy.local.shape[1]
    source = np.ascontiguousarray(drawn.sources.T)
    series = anatomy.loadings @ source[:nodes]
    series += anatomy.local @ source[nodes : nodes + local]
    series += anatomy.tissue @ source[nodes + local + 7 :]
    series += rng.standard_normal(series.shape, np.float32) * np.float32(_THERMAL_SD * noise_gain)
    series[:, : scan.non_steady_frames] += NON_STEADY_GAIN * 0.5 ** np.arange(scan.non_steady_frames, dtype=np.float32)
    series += 1
    series *= anatomy.baseline[:, None]
    series += anatomy.motion @ source[nodes + local : nodes + local + 7]
    return series


def rest_noise(rng: np.random.Generator, count: int, scan: Scan, *, tilt: NDArray[np.float64] | None = None) -> NDArray[np.float32]:
    """(frames, count) independent Gaussian series of unit variance with the spectrum of rest.

    ``tilt`` (count,) multiplies each one's power by (frequency / 0.03 Hz) to that exponent; the variance of what the removal of
    drifts leaves stays the same, so that connectivity does not show it.
    """
    length, amplitude = _amplitudes(scan.frames, scan.repetition_time_s)
    bins = rng.standard_normal((2, count, len(amplitude)), np.float32)
    if tilt is not None:
        amplitude = amplitude * _tilts(tilt, amplitude, fft.rfftfreq(length, scan.repetition_time_s)).astype(np.float32)
    spectrum = (bins[0] + 1j * bins[1]) * amplitude
    # Drawn longer than needed and cut: a periodic series would tie its end to its beginning.
    return fft.irfft(spectrum, length, axis=1)[:, : scan.frames].T


@lru_cache(maxsize=4)
def _amplitudes(frames: int, repetition_time_s: float) -> tuple[int, NDArray[np.float32]]:
    """Padded length, and the amplitude of each Fourier bin for unit variance."""
    length = fft.next_fast_len(int(1.5 * frames), real=True)
    frequency = fft.rfftfreq(length, repetition_time_s)
    power = rest_power(frequency)
    power[0] = 0
    weight = np.full(len(frequency), 2.0)
    weight[-1] = 1.0 if length % 2 == 0 else 2.0
    # irfft divides by length; a bin of weight 2 contributes 2·E|X|²/length² with E|X|² = 2·amplitude².
    amplitude = length * np.sqrt(power / (2.0 * weight @ power))
    return length, amplitude.astype(np.float32)


def _tilts(tilt: NDArray[np.float64], amplitude: NDArray[np.float32], frequency: NDArray[np.float64]) -> NDArray[np.float64]:
    """(count, bins) factors of the amplitudes."""
    factors = (np.maximum(frequency, frequency[1]) / _TILT_PIVOT_HZ)[None, :] ** (0.5 * tilt[:, None])
    power = np.where(frequency > 1 / HIGH_PASS_PERIOD_S, amplitude.astype(float) ** 2, 0.0)
    return factors * np.sqrt(power.sum() / (factors**2 @ power))[:, None]


def _symmetric_root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = linalg.eigh(matrix)
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def rest_power(frequency: NDArray[np.float64]) -> NDArray[np.float64]:
    """Relative power at each frequency in hertz: 1/f above a corner of 0.03 Hz, times the haemodynamic response's."""
    step = 0.05
    time = np.arange(0, 32, step)
    # Glover's double gamma: peaks at 6 and 16 s, undershoot a sixth.
    response = time**5 * np.exp(-time) / special.gamma(6) - time**15 * np.exp(-time) / special.gamma(16) / 6
    transfer = np.abs(np.exp(-2j * np.pi * frequency[:, None] * time[None]) @ response) ** 2 * step**2
    return transfer / (0.03 + frequency)


def _motion(rng: np.random.Generator, mean_fd_mm: float, frames: int) -> NDArray[np.float64]:
    """(frames, 6) head motion whose mean framewise displacement is the planned one."""
    scale = np.array([0.6, 0.8, 1.0, 0.9 / FD_RADIUS_MM, 0.6 / FD_RADIUS_MM, 0.6 / FD_RADIUS_MM])
    wander = signal.lfilter([1.0], [1.0, -0.97], rng.normal(size=(frames, 6)), axis=0) - 0.4 * rng.normal(size=(frames, 6))
    jerks = (rng.random(frames) < 0.03)[:, None] * rng.normal(size=(frames, 6)) * 6.0
    motion = (wander + signal.lfilter([1.0], [1.0, -0.7], jerks, axis=0)) * scale
    motion -= motion[0]
    return motion * (mean_fd_mm / np.nanmean(framewise_displacement(motion)))
