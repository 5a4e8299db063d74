"""From a volume to square uint8 slices of one plane (or one cube), and from slices back to the voxels they came from.

Slices run in RAS order: the first in-plane axis goes to the right (or forward), so that left stays left however the file stores it.
Pixels are square: the field of view is padded to a square in millimetres, never stretched. 0 means outside the head (outside the
brain, where the image is skull-stripped); inside, the 0.5th to 99.5th percentile becomes 1 to 255.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from scipy import ndimage

from brainfm_cli.bids.images import load_image, read_voxels
from brainfm_cli.bids.slice_cohort import NORMAL, PLANES, Plane
from brainfm_cli.errors import InputDatasetError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from brainfm_cli.bids.scans import LesionMask

CLIP_PERCENTILES = (0.5, 99.5)
_THICK = 1.5  # slices so much thicker than pixels are wide were acquired in that plane
_STRIPPED = 0.2  # share of exact zeros of a skull-stripped image
_WEIGHTED_FROM = 500.0  # b-value, s/mm²
_SMALLEST_SIDE = 3
_CONVERT = "convert the image again"


@dataclass(frozen=True, kw_only=True)
class Volume:
    """One image in RAS order, with its way back to the file."""

    data: NDArray[np.float32]
    """(x, y, z), axes to the right, front and top; finite."""
    affine: NDArray[np.float64]
    """(4, 4) voxels of ``data`` to millimetres."""
    native_shape: tuple[int, int, int]
    """Voxels of the file."""
    native_affine: NDArray[np.float64]
    """(4, 4) voxels of the file to millimetres."""
    notes: tuple[str, ...] = ()
    """What was done to get one volume."""

    @property
    def voxel_mm(self) -> tuple[float, float, float]:
        """Voxel size along each axis of ``data``."""
        x, y, z = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(x), float(y), float(z)

    def to_native(self, values: NDArray[Any]) -> NDArray[Any]:
        """An (x, y, z) array of the grid of ``data``, in the order of the file."""
        import nibabel as nib

        there = nib.orientations.io_orientation(self.native_affine)
        back = nib.orientations.ornt_transform(np.array([[0, 1], [1, 1], [2, 1]]), there)
        return np.ascontiguousarray(nib.orientations.apply_orientation(values, back))


def read_volume(path: Path, *, gradients: Path | None = None) -> Volume:
    """One volume of a scan; a diffusion series becomes the mean of its weighted volumes.

    Raises
    ------
    InputDatasetError
        Unreadable, a single 2-D slice, a colour image, several volumes of no known kind, no finite values, or a singular affine.
    """
    image = load_image(path)
    if image.get_data_dtype().fields is not None:
        raise InputDatasetError("the image holds colours, not intensities", where=path, fix="give the scan itself, not a picture of it")
    shape = tuple(image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) < 3 or min(shape[:3]) < _SMALLEST_SIDE:
        raise InputDatasetError(
            f"the image is a single slice ({'×'.join(map(str, shape))} voxels)", where=path, fix="give the whole volume, not 2-D slices"
        )
    data, notes = _one_volume(path, read_voxels(path, image, np.float32).reshape(shape), gradients)
    data, affine = np.nan_to_num(data, nan=0.0, posinf=0.0, neginf=0.0), np.asarray(image.affine, np.float64)
    if not data.any() or data.min() == data.max():
        raise InputDatasetError("every voxel has the same value", where=path, fix=_CONVERT)
    if not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
        raise InputDatasetError("the image's affine is singular", where=path, fix=_CONVERT)
    turned, turned_affine = _to_ras(data, affine)
    return Volume(data=turned, affine=turned_affine, native_shape=(shape[0], shape[1], shape[2]), native_affine=affine, notes=notes)


def read_labels(mask: LesionMask, volume: Volume) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """(x, y, z) lesion labels on the grid of ``volume``, nearest neighbour where the mask has another grid, and what to say of it.

    Raises
    ------
    InputDatasetError
        The mask holds values that nothing describes or no label at all, or lies outside the volume.
    """
    image = load_image(mask.path)
    data = np.nan_to_num(read_voxels(mask.path, image, np.float32)).reshape(tuple(image.shape)[:3])
    rounded = np.rint(data)
    if np.abs(data - rounded).max() > 1e-3:
        raise InputDatasetError(
            "the mask holds fractions, not labels", where=mask.path, fix="threshold it, or resample with nearest neighbour"
        )
    found = {int(value) for value in np.unique(rounded)}
    unknown = sorted(found - set(mask.labels) - mask.others - {0})
    if unknown:
        raise InputDatasetError(
            f"unknown label values {', '.join(map(str, unknown[:5]))}; known: {', '.join(map(str, sorted(mask.labels)))}",
            where=mask.path, fix="describe every value in the …_dseg.tsv, or mend the mask",
        )  # fmt: skip
    kept = np.where(np.isin(rounded, list(mask.labels)), rounded, 0).astype(np.uint8)
    notes: list[str] = [] if kept.any() else ["the mask is empty: the study counts as free of lesions"]
    turned, affine = _to_ras(kept, np.asarray(image.affine, np.float64))
    if turned.shape == volume.data.shape and np.allclose(affine, volume.affine, atol=1e-2):
        return turned, tuple(notes)
    step = np.linalg.inv(affine) @ volume.affine
    placed = ndimage.affine_transform(turned, step[:3, :3], step[:3, 3], output_shape=volume.data.shape, order=0)
    notes.append(f"the mask has another grid ({'×'.join(map(str, kept.shape))}): resampled to the image's, nearest neighbour")
    if kept.any() and not placed.any():
        if _overlaps(np.argwhere(turned), affine, volume):
            notes.append("no voxel of the mask is left on the image's coarser grid")
        else:
            raise InputDatasetError(
                "the mask's lesion lies outside the image", where=mask.path, fix="mask and image must be aligned: register them, or find the image that it was drawn on"
            )  # fmt: skip
    return placed, tuple(notes)


def _overlaps(voxels: NDArray[np.int64], affine: NDArray[np.float64], volume: Volume) -> bool:
    places = (np.linalg.inv(volume.affine) @ affine @ np.c_[voxels, np.ones(len(voxels))].T)[:3].T
    return bool(((places >= -0.5) & (places <= np.array(volume.data.shape) - 0.5)).all(1).any())


def _one_volume(path: Path, data: NDArray[np.float32], gradients: Path | None) -> tuple[NDArray[np.float32], tuple[str, ...]]:
    if data.ndim == 3:
        return data, ()
    if data.ndim != 4 or gradients is None:
        raise InputDatasetError(
            f"the image has the shape {'×'.join(map(str, data.shape))} and must be one volume",
            where=path, fix="split the series into volumes; a diffusion series needs its .bval",
        )  # fmt: skip
    try:
        b_values = np.array(gradients.read_text(encoding="utf-8").split(), float)
    except (OSError, ValueError) as error:
        raise InputDatasetError(f"the b-values are unreadable: {error}", where=gradients, fix="one number per volume") from error
    weighted = b_values >= _WEIGHTED_FROM
    if len(b_values) != data.shape[3] or not weighted.any():
        raise InputDatasetError(
            f"{len(b_values)} b-values, {int(weighted.sum())} of at least {_WEIGHTED_FROM:g}, for {data.shape[3]} volumes",
            where=gradients, fix="one b-value per volume, some of them diffusion-weighted",
        )  # fmt: skip
    return data[..., weighted].mean(-1), (f"mean of {int(weighted.sum())} diffusion-weighted volumes",)


def _to_ras(data: NDArray[Any], affine: NDArray[np.float64]) -> tuple[NDArray[Any], NDArray[np.float64]]:
    import nibabel as nib

    turn = nib.orientations.io_orientation(affine)
    moved = nib.orientations.apply_orientation(data, turn)
    return np.ascontiguousarray(moved), affine @ nib.orientations.inv_ornt_aff(turn, data.shape[:3])


def acquired_plane(volume: Volume) -> Plane:
    """The plane that thick slices were acquired in; axial where voxels are near cubes."""
    size = np.array(volume.voxel_mm)
    thick = int(size.argmax())
    if size[thick] < _THICK * np.sort(size)[1]:
        return "axial"
    return next(plane for plane in PLANES if NORMAL[plane] == thick)


@dataclass(frozen=True, kw_only=True)
class SliceGrid:
    """Where the pixels of slices lie in a volume: enough to make them, and to bring values on them back."""

    shape: tuple[int, int, int]
    """Voxels of the RAS volume."""
    voxel_mm: tuple[float, float, float]
    """Their size."""
    plane: Plane
    """Which way the slices run; a cube has the axial order."""
    size: int
    """Pixels along each side."""
    dims: int
    """2: one item per slice; 3: one cube."""

    @property
    def normal(self) -> int:
        """RAS axis that slices are stacked along."""
        return NORMAL[self.plane]

    @property
    def side_mm(self) -> float:
        """Length of the square's or cube's side."""
        return max(self.shape[axis] * self.voxel_mm[axis] for axis in self._resampled)

    @property
    def pixel_mm(self) -> float:
        """Size of a pixel."""
        return self.side_mm / self.size

    @property
    def _resampled(self) -> tuple[int, ...]:
        return tuple(axis for axis in range(3) if self.dims == 3 or axis != self.normal)

    def cut(self, data: NDArray[Any], *, nearest: bool = False) -> NDArray[Any]:
        """(items, size, size) slices, or (1, size, size, size), of an (x, y, z) volume: area means, or the nearest voxel's value."""
        for axis in self._resampled:
            data = _along(data, axis, self._places(axis) if nearest else self._weights(axis))
        return data[None] if self.dims == 3 else np.moveaxis(data, self.normal, 0)

    def restore(self, items: NDArray[Any], *, nearest: bool = False) -> NDArray[Any]:
        """(x, y, z) volume of values on every slice (or the cube): linear, or the nearest pixel's value."""
        data = items[0] if self.dims == 3 else np.moveaxis(items, 0, self.normal)
        for axis in self._resampled:
            data = _along(data, axis, self._back_places(axis) if nearest else self._back_weights(axis))
        return data

    def _centres(self, axis: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Centres of voxels and of pixels along an axis, mm from the middle of both."""
        count, step = self.shape[axis], self.voxel_mm[axis]
        voxels = np.arange(count, dtype=np.float64) - (count - 1) / 2
        pixels = np.arange(self.size, dtype=np.float64) - (self.size - 1) / 2
        return np.asarray(voxels * step, np.float64), np.asarray(pixels * self.pixel_mm, np.float64)

    def _weights(self, axis: int) -> NDArray[np.float32]:
        """(pixels, voxels): overlap of each pixel with each voxel where pixels are larger, else linear interpolation; zero in the padding."""
        voxels, pixels = self._centres(axis)
        step = self.voxel_mm[axis]
        # the kernel is the wider of the two: a box as wide as the pixel, or a triangle between voxels
        if self.pixel_mm > step:
            low = np.maximum(pixels[:, None] - self.pixel_mm / 2, voxels[None] - step / 2)
            high = np.minimum(pixels[:, None] + self.pixel_mm / 2, voxels[None] + step / 2)
            weights = np.clip(high - low, 0, None) / self.pixel_mm
        else:
            weights = _linear(pixels, voxels, step)
        return weights.astype(np.float32)

    def _back_weights(self, axis: int) -> NDArray[np.float32]:
        voxels, pixels = self._centres(axis)
        return _linear(voxels, pixels, self.pixel_mm).astype(np.float32)

    def _places(self, axis: int) -> NDArray[np.int64]:
        voxels, pixels = self._centres(axis)
        place = np.rint((pixels - voxels[0]) / self.voxel_mm[axis]).astype(np.int64)
        return np.where((place < 0) | (place >= len(voxels)), -1, place)

    def _back_places(self, axis: int) -> NDArray[np.int64]:
        voxels, pixels = self._centres(axis)
        return np.clip(np.rint((voxels - pixels[0]) / self.pixel_mm).astype(np.int64), 0, self.size - 1)


def _linear(wanted: NDArray[np.float64], known: NDArray[np.float64], step: float) -> NDArray[np.float64]:
    """(wanted, known) weights of linear interpolation; half a step beyond the ends keeps the end's value, farther is zero."""
    inside = (wanted >= known[0] - step / 2 - 1e-6) & (wanted <= known[-1] + step / 2 + 1e-6)
    place = np.clip(wanted, known[0], known[-1])
    return np.clip(1 - np.abs(place[:, None] - known[None]) / step, 0, None) * inside[:, None]


def _along(data: NDArray[Any], axis: int, how: NDArray[Any]) -> NDArray[Any]:
    """``data`` with one axis resampled by a weight matrix, or by places (-1 for padding)."""
    if how.ndim == 2:
        return np.moveaxis(np.tensordot(data.astype(np.float32, copy=False), how, axes=(axis, 1)), -1, axis)
    taken = np.take(data, np.clip(how, 0, None), axis=axis)
    shape = [1] * data.ndim
    shape[axis] = len(how)
    return np.where((how >= 0).reshape(shape), taken, 0).astype(data.dtype)


def grid_of(volume: Volume, *, size: int, plane: Plane | Literal["acquired"] = "acquired", dims: int = 2) -> SliceGrid:
    """The slices (or cube) of a volume."""
    chosen: Plane = "axial" if dims == 3 else acquired_plane(volume) if plane == "acquired" else plane
    shape: Any = volume.data.shape
    return SliceGrid(shape=shape, voxel_mm=volume.voxel_mm, plane=chosen, size=size, dims=dims)


def find_head(data: NDArray[np.float32]) -> NDArray[np.bool_]:
    """(x, y, z) which voxels lie in the head: what is not exactly zero in skull-stripped images, else Otsu's threshold with holes filled."""
    if (data == 0).mean() > _STRIPPED:
        head = data != 0
    else:
        smooth = ndimage.gaussian_filter(data, 1.0)
        head = smooth > otsu(smooth)
    parts, number = ndimage.label(head)
    if number > 1:
        counts = np.bincount(parts.ravel())
        counts[0] = 0
        head = parts == counts.argmax()
    return np.asarray(ndimage.binary_fill_holes(head), bool)


def otsu(values: NDArray[np.floating]) -> float:
    """The threshold that separates two classes of values best (Otsu 1979), on 256 bins up to the 99.5th percentile."""
    clipped = np.clip(values, values.min(), np.percentile(values, 99.5))
    counts, edges = np.histogram(clipped, 256)
    centres = (edges[:-1] + edges[1:]) / 2
    below, total = np.cumsum(counts), counts.sum()
    sums = np.cumsum(counts * centres)
    above = total - below
    with np.errstate(divide="ignore", invalid="ignore"):
        between = below * above * (sums / below - (sums[-1] - sums) / above) ** 2
    return float(centres[np.nanargmax(between)])


def to_uint8(data: NDArray[np.float32], head: NDArray[np.bool_]) -> NDArray[np.float32]:
    """(x, y, z) intensities clipped to the head's 0.5th and 99.5th percentile: 1 to 255 inside, 0 outside; not yet rounded."""
    low, high = np.percentile(data[head], CLIP_PERCENTILES)
    scaled = 1 + 254 * np.clip((data - low) / max(float(high - low), 1e-12), 0, 1)
    return np.where(head, scaled, 0).astype(np.float32)


def artefact_scores(data: NDArray[np.float32], head: NDArray[np.bool_], grid: SliceGrid) -> dict[str, NDArray[np.float64]]:
    """(slices,) background noise, ghosting and entropy of each slice, on the voxels as acquired; NaN where nothing is outside or inside.

    noise: SD outside the head over the mean inside. ghosting: mean of what lies half a field of view beside the head (where a ghost falls)
    less the rest outside, over the mean inside; the larger of both axes. entropy: of the intensities inside, bits.
    """
    slices, inside = np.moveaxis(data, grid.normal, 0), np.moveaxis(head, grid.normal, 0)
    low, high = np.percentile(data[head], CLIP_PERCENTILES)
    scores: dict[str, list[float]] = {"noise": [], "ghosting": [], "entropy": []}
    for values, within in zip(slices, inside, strict=True):
        outside = ~within
        if not within.any() or not outside.any():
            for found in scores.values():
                found.append(np.nan)
            continue
        level = max(float(np.abs(values[within]).mean()), 1e-12)
        ghosts = []
        for axis in (0, 1):
            beside = np.roll(within, values.shape[axis] // 2, axis) & outside
            rest = outside & ~beside
            ghosts.append(float(values[beside].mean() - values[rest].mean()) if beside.any() and rest.any() else 0.0)
        counts = np.histogram(values[within], 64, (float(low), float(high) + 1e-9))[0]
        shares = counts[counts > 0] / max(1, counts.sum())
        scores["noise"].append(float(values[outside].std()) / level)
        scores["ghosting"].append(max(ghosts) / level)
        scores["entropy"].append(float(-(shares * np.log2(shares)).sum()))
    return {name: np.array(values) for name, values in scores.items()}


def outliers(scores: NDArray[np.float64], groups: Sequence[str], *, limit: float) -> NDArray[np.bool_]:
    """(slices,) scores farther than ``limit`` robust SDs (1.4826 MAD) from the median of their group; groups below 20 have none."""
    found = np.zeros(len(scores), bool)
    names = np.asarray(groups)
    for name in np.unique(names):
        mine = np.flatnonzero((names == name) & np.isfinite(scores))
        if len(mine) < 20:
            continue
        middle = np.median(scores[mine])
        spread = 1.4826 * np.median(np.abs(scores[mine] - middle))
        if spread > 0:
            found[mine] = np.abs(scores[mine] - middle) > limit * spread
    return found
