"""One simulated head as a scanner sees it: T1w and BOLD in native space, with everything planted that preprocessing must undo.

The template's brain gets a skull and a scalp, is deformed, turned and scaled into the person's own space, and is seen in T1w and
BOLD contrast through bias fields; the head moves between frames, and slices are taken one after the other. All of it is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field
from scipy import ndimage

from brainfm_cli.config import Frozen
from brainfm_cli.signals.transforms import rigid
from brainfm_cli.simulation.anatomy import template_path
from brainfm_cli.simulation.population import stream

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    Volume = NDArray[np.float32]
    Points = NDArray[np.float64]
    Matrix = NDArray[np.float64]

_PAD_MM = 24  # around the template, for skull and scalp
_WARP_MM, _WARP_SIGMA_MM = 4.0, 24.0
_SOURCE_MM = 2.0  # grid of what the BOLD frames are looked up in
_SHELLS_MM = (2.0, 8.0, 14.0)  # outer ends of CSF, skull and scalp, from the brain's surface
_SHELLS_T1W, _SHELLS_BOLD = (150.0, 30.0, 850.0), (900.0, 40.0, 350.0)
_NETWORKS, _WAVES = 4, 6
_NETWORK_SIGMA_MM = 12.0
_FREQUENCIES_HZ = (0.01, 0.08)
_NON_STEADY_GAIN = 1.4
_MARGIN_MM = 6.0
_SIZE = 0.92  # of people beside the template, which is large
_DRIFT_FRAMES, _JERKS = 4.0, 0.03  # smoothness of the drift, and share of frames with a jerk
_BOLD_SHAPE, _BOLD_TILT = (64, 64, 44), 0.2


class RawSettings(Frozen):
    """What is planted in raw images."""

    t1w_mm: float = Field(default=1.0, ge=0.7, le=3)
    """Voxel size of the T1w image."""
    bold_mm: float = Field(default=3.5, ge=3, le=6)
    """Voxel size of the BOLD run."""
    deformation_mm: float = Field(default=3.0, ge=0, le=6)
    """SD of the smooth displacement between template and person, beside an affine change of size and pose."""
    motion_mm: float = Field(default=0.4, ge=0, le=5)
    """SD of each translation of the head over the run; rotations move its surface by as much."""
    bias: float = Field(default=0.3, ge=0, le=1)
    """Size of the bias fields, as the SD of their logarithm."""
    noise: float = Field(default=0.01, ge=0, le=0.2)
    """SD of thermal noise, as a share of the brain's intensity."""
    slice_timing: bool = True
    """Slices are taken one after the other, odd ones first; otherwise all at once."""
    amplitude: float = Field(default=0.02, ge=0, le=0.2)
    """SD of the signal of grey matter, as a share of the baseline."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Image:
    """An image on a grid."""

    data: Volume
    """(x, y, z)."""
    affine: Matrix
    """(4, 4) voxels to millimetres, RAS."""


@dataclass(frozen=True, kw_only=True, eq=False)
class RawHead:
    """One person: geometry, structure, and what is needed to draw BOLD frames."""

    t1w: Image
    """T1w image as scanned."""
    brain: Image
    """1 inside the brain, on the grid of the T1w image."""
    placed: tuple[Volume, Matrix]
    """(x, y, z, 3) where each voxel of a 4 mm template grid lies in the T1w image's space, and the (4, 4) affine of that grid."""
    coregistration: Matrix
    """(4, 4) points of the T1w image to points of the BOLD run's reference position."""
    motion: Matrix
    """(frames, 4, 4) points of the reference position to points of each frame."""
    slice_times_s: NDArray[np.float64] | None
    """(slices,) seconds after the frame's start; none where all are taken at once."""
    sources: tuple[Image, ...]
    """Baseline and, per network, its change per unit of signal, in the T1w image's space."""
    waves: NDArray[np.float64]
    """(networks, waves, 3) amplitude, frequency in hertz and phase of each network's signal."""
    bold_shape: tuple[int, int, int]
    """Voxels of the BOLD grid."""
    bold_affine: Matrix
    """(4, 4) of the BOLD grid, oblique and left-handed, as many scanners store it."""


def draw_head(settings: RawSettings, *, seed: int, index: int, frames: int, repetition_time_s: float) -> RawHead:
    """Person number ``index``: its structure and all that is planted."""
    rng = stream(seed, index, 6)
    head, brain, contrast = _template_head()
    pose = rigid(np.r_[rng.normal(0, 4, 3), rng.normal(0, 0.06, 3)], np.zeros(3)) @ np.diag([*rng.normal(_SIZE, 0.03, 3), 1.0])
    warp = _draw_warp(head, settings.deformation_mm, rng)
    shape, affine = _native_grid(head, pose, settings.t1w_mm)
    back = _Back.of(warp, pose, shape, affine)
    structure = back.render(head, shape, affine)
    bias = _bias(shape, settings.bias, rng)
    noisy = structure * bias + rng.normal(0, settings.noise * 700, shape)
    coregistration = rigid(np.r_[rng.normal(0, 5, 3), rng.normal(0, 0.05, 3)], np.zeros(3))
    sources, waves = _draw_sources(contrast, brain, back, affine, shape, settings, rng)
    bold_affine = _bold_grid(sources[0], coregistration, settings.bold_mm)
    return RawHead(
        t1w=Image(data=np.maximum(noisy, 0).astype(np.float32), affine=affine),
        brain=Image(data=(back.render(brain, shape, affine) > 0.5).astype(np.float32), affine=affine),
        placed=(_forward(warp, pose), warp.affine),
        coregistration=coregistration,
        motion=_draw_motion(frames, settings.motion_mm, (bold_affine @ [*(0.5 * np.array(_BOLD_SHAPE)), 1])[:3], rng),
        slice_times_s=_slice_times(_BOLD_SHAPE[2], repetition_time_s) if settings.slice_timing else None,
        sources=sources,
        waves=waves,
        bold_shape=_BOLD_SHAPE,
        bold_affine=bold_affine,
    )


def bold_frames(
    head: RawHead, settings: RawSettings, *, seed: int, index: int, repetition_time_s: float, non_steady_frames: int
) -> Iterator[Volume]:
    """(x, y, z) frames of the run, in order."""
    rng = stream(seed, index, 7)
    bias = _bias(head.bold_shape, settings.bias, rng)
    grid = np.stack(np.meshgrid(*[np.arange(size, dtype=np.float64) for size in head.bold_shape], indexing="ij"), -1)
    slices = np.zeros(head.bold_shape[2]) if head.slice_times_s is None else head.slice_times_s
    for frame, move in enumerate(head.motion):
        seen = _apply(_inverse(move @ head.coregistration) @ head.bold_affine, grid)
        baseline, *changes = (_at(source, seen) for source in head.sources)
        signal = network_signals(head, frame * repetition_time_s + slices)
        volume = baseline + sum(change * values for change, values in zip(changes, signal, strict=True))
        gain = _NON_STEADY_GAIN if frame < non_steady_frames else 1.0
        volume = gain * volume * bias + rng.normal(0, settings.noise * 800, head.bold_shape)
        yield np.maximum(volume, 0).astype(np.float32)


def network_signals(head: RawHead, times_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """(networks, times) planted signals, of SD about 1."""
    amplitude, frequency, phase = np.moveaxis(head.waves, -1, 0)[..., None]
    return (amplitude * np.sin(2 * np.pi * frequency * times_s + phase)).sum(1)


@lru_cache(maxsize=1)
def _template_head() -> tuple[Image, Image, Image]:
    """T1w contrast, brain and BOLD contrast of the template's brain inside a skull and a scalp."""
    import nibabel as nib

    stored = nib.load(template_path())
    values = np.pad(np.asarray(stored.dataobj, np.float32), _PAD_MM)  # type: ignore[attr-defined]
    affine = np.asarray(stored.affine, np.float64).copy()  # type: ignore[attr-defined]
    affine[:3, 3] -= affine[:3, :3] @ np.full(3, float(_PAD_MM))
    brain = np.asarray(ndimage.binary_fill_holes(values > 0), bool)
    distance = np.asarray(ndimage.distance_transform_edt(~brain), np.float32)
    t1w = np.where(brain, 10 * values, 0).astype(np.float32)
    bold = np.where(brain, 1200 - 5 * values, 0).astype(np.float32)  # T2*: CSF bright, white matter dark
    inner = 0.0
    for outer, structural, functional in zip(_SHELLS_MM, _SHELLS_T1W, _SHELLS_BOLD, strict=True):
        shell = (distance > inner) & (distance <= outer)
        t1w[shell], bold[shell] = structural, functional
        inner = outer
    return tuple(Image(data=one, affine=affine) for one in (t1w, brain.astype(np.float32), bold))  # type: ignore[return-value]


def _draw_warp(head: Image, size_mm: float, rng: np.random.Generator) -> Image:
    """(x, y, z, 3) smooth displacements on a coarse grid over the template."""
    shape = tuple(int(np.ceil(extent / _WARP_MM)) for extent in head.data.shape)
    affine = head.affine.copy()
    affine[:3, :3] *= _WARP_MM
    fields = [ndimage.gaussian_filter(rng.standard_normal(shape), _WARP_SIGMA_MM / _WARP_MM, mode="nearest") for _ in range(3)]
    field = np.stack([one / one.std() * size_mm for one in fields], -1)
    return Image(data=field.astype(np.float32), affine=affine)


def _forward(warp: Image, pose: Matrix) -> Volume:
    """(x, y, z, 3) native millimetres of the voxels of the displacement's grid."""
    grid = np.stack(np.meshgrid(*[np.arange(size) for size in warp.data.shape[:3]], indexing="ij"), -1)
    return _apply(pose, _apply(warp.affine, grid) + warp.data).astype(np.float32)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Back:
    """The way from native to template points: an affine, and what a smooth displacement adds to it."""

    straight: Matrix
    """(4, 4) inverse of the pose."""
    offset: Image
    """(x, y, z, 3) template millimetres to add, on a coarse native grid."""

    @classmethod
    def of(cls, warp: Image, pose: Matrix, shape: Sequence[int], affine: Matrix) -> _Back:
        """Found on the coarse grid by fixed point."""
        zooms = np.linalg.norm(affine[:3, :3], axis=0)
        coarse = tuple(int(np.ceil((size - 1) * zoom / _WARP_MM)) + 1 for size, zoom in zip(shape, zooms, strict=True))
        coarse_affine = np.asarray(affine @ np.diag([*(_WARP_MM / zooms), 1.0]), np.float64)
        grid = np.stack(np.meshgrid(*[np.arange(size, dtype=np.float64) for size in coarse], indexing="ij"), -1)
        straight = _inverse(pose)
        start = _apply(straight @ coarse_affine, grid)
        found = start
        for _ in range(12):
            found = start - _vectors_at(warp, found)
        return cls(straight=straight, offset=Image(data=(found - start).astype(np.float32), affine=coarse_affine))

    def render(self, image: Image, shape: Sequence[int], affine: Matrix) -> Volume:
        """A template image on a native grid, some planes at a time."""
        result = np.empty(tuple(shape), np.float32)
        for start in range(0, shape[0], 16):
            planes = np.arange(start, min(start + 16, shape[0]), dtype=np.float64)
            grid = np.stack(np.meshgrid(planes, np.arange(shape[1]), np.arange(shape[2]), indexing="ij"), -1)
            native = _apply(affine, grid)
            result[start : start + 16] = _at(image, _apply(self.straight, native) + _vectors_at(self.offset, native))
        return result


def _native_grid(head: Image, pose: Matrix, size_mm: float) -> tuple[tuple[int, int, int], Matrix]:
    """A grid of the person's space that holds the head."""
    inside = np.asarray(np.argwhere(head.data[::4, ::4, ::4] > 0) * 4.0, np.float64)
    points = _apply(np.asarray(pose @ head.affine, np.float64), inside)
    low, high = points.min(0) - _MARGIN_MM, points.max(0) + _MARGIN_MM
    affine = np.diag([size_mm] * 3 + [1.0])
    affine[:3, 3] = low
    first, second, third = (int(np.ceil(extent / size_mm)) for extent in high - low)
    return (first, second, third), affine


def _draw_sources(
    contrast: Image,
    brain: Image,
    back: _Back,
    affine: Matrix,
    shape: Sequence[int],
    settings: RawSettings,
    rng: np.random.Generator,
) -> tuple[tuple[Image, ...], NDArray[np.float64]]:
    """Baseline and networks of the BOLD contrast in the person's space, and the networks' waves."""
    ratio = _SOURCE_MM / settings.t1w_mm
    source_shape = tuple(int(np.ceil(size / ratio)) for size in shape)
    source_affine = affine @ np.diag([ratio, ratio, ratio, 1.0])
    seen = back.render(contrast, source_shape, source_affine)
    baseline = ndimage.gaussian_filter(seen, settings.bold_mm / _SOURCE_MM / 2.355)  # voxels average what they hold
    grey = (back.render(brain, source_shape, source_affine) > 0.5) & (baseline > 780) & (baseline < 920)  # between white matter and CSF
    images = [baseline]
    for _ in range(_NETWORKS):
        pattern = ndimage.gaussian_filter(rng.standard_normal(source_shape), _NETWORK_SIGMA_MM / _SOURCE_MM)
        images.append(np.asarray(settings.amplitude * baseline * grey * pattern / pattern.std() / np.sqrt(_NETWORKS), np.float32))
    waves = np.stack(
        [
            np.full((_NETWORKS, _WAVES), np.sqrt(2 / _WAVES)),
            rng.uniform(*_FREQUENCIES_HZ, (_NETWORKS, _WAVES)),
            rng.uniform(0, 2 * np.pi, (_NETWORKS, _WAVES)),
        ],
        -1,
    )
    return tuple(Image(data=np.asarray(one, np.float32), affine=source_affine) for one in images), waves


def _bold_grid(baseline: Image, coregistration: Matrix, size_mm: float) -> Matrix:
    """The affine of a grid around the head: tilted, and with x from right to left."""
    middle = np.append(np.array(ndimage.center_of_mass(baseline.data > 300)), 1.0)
    centre = (coregistration @ baseline.affine @ middle)[:3]
    affine = rigid(np.array([0, 0, 0, _BOLD_TILT, 0, 0]), np.zeros(3)) @ np.diag([-size_mm, size_mm, size_mm, 1.0])
    affine[:3, 3] = centre - affine[:3, :3] @ (0.5 * (np.array(_BOLD_SHAPE) - 1))
    return affine


def _draw_motion(frames: int, size_mm: float, centre: NDArray[np.float64], rng: np.random.Generator) -> Matrix:
    """(frames, 4, 4) of a head that drifts slowly, and now and then jerks and stays where it is."""
    drift = ndimage.gaussian_filter1d(np.cumsum(rng.standard_normal((frames, 6)), 0), _DRIFT_FRAMES, axis=0)
    jerks = np.cumsum(rng.standard_normal((frames, 6)) * (rng.uniform(size=(frames, 1)) < _JERKS), 0)
    walk = drift / np.maximum(drift.std(0), 1e-9) + 0.5 * jerks
    walk -= walk.mean(0)
    walk /= np.maximum(walk.std(0), 1e-9)
    radius_mm = 50.0
    return rigid(walk * size_mm * np.array([1, 1, 1, *[1 / radius_mm] * 3]), centre)


def _slice_times(slices: int, repetition_time_s: float) -> NDArray[np.float64]:
    """(slices,) every second slice first, then those between."""
    order = np.r_[np.arange(0, slices, 2), np.arange(1, slices, 2)]
    times = np.empty(slices)
    times[order] = np.arange(slices) * repetition_time_s / slices
    return times.round(6)


def _bias(shape: Sequence[int], size: float, rng: np.random.Generator) -> Volume:
    """(x, y, z) smooth gain: the exponential of a quadratic."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, extent, dtype=np.float32) for extent in shape], indexing="ij", sparse=True)
    weights = rng.standard_normal(6)
    field = (
        weights[0] * x + weights[1] * y + weights[2] * z + weights[3] * x * y + weights[4] * (y * y - 1 / 3) + weights[5] * (z * z - 1 / 3)
    )
    return np.asarray(np.exp(size * field / field.std()), np.float32)


def _at(image: Image, points: Points) -> Volume:
    """Linear interpolation at millimetres; 0 outside."""
    voxels = np.moveaxis(_apply(_inverse(image.affine), points), -1, 0)
    return np.asarray(ndimage.map_coordinates(image.data, voxels, order=1, mode="constant", output=np.float32))


def _vectors_at(field: Image, points: Points) -> Points:
    """(..., 3) vectors of a field at millimetres; edges continue outwards."""
    voxels = np.moveaxis(_apply(_inverse(field.affine), points), -1, 0)
    parts = [ndimage.map_coordinates(field.data[..., axis], voxels, order=1, mode="nearest", output=np.float32) for axis in range(3)]
    return np.stack(parts, -1)


def _inverse(matrix: Matrix) -> Matrix:
    return np.asarray(np.linalg.inv(matrix), np.float64)


def _apply(matrix: Matrix, points: Points) -> Points:
    return points @ matrix[:3, :3].T + matrix[:3, 3]
