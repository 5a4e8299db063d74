"""Steps of one BOLD run, each from files to files in its own folder: store, realign, time slices, coregister, resample, confounds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from brainfm_cli.bids.derivatives import temporary_path, write_json, write_text, write_tsv
from brainfm_cli.bids.images import write_image
from brainfm_cli.programs.embedded import itk
from brainfm_cli.programs.embedded.bias import fit_bias
from brainfm_cli.programs.embedded.brain import mutual_information
from brainfm_cli.programs.embedded.grids import box_around, coarser, moved_affine, read_ras, zooms_of
from brainfm_cli.signals import confounds as noise
from brainfm_cli.signals.realignment import average_reference, build_target, realign
from brainfm_cli.signals.slice_timing import check_slice_times, reference_time, shift_slice, slice_axis
from brainfm_cli.signals.transforms import centre_of_mass_mm, itk_text, motion_table, read_itk, rms_deviation
from brainfm_cli.signals.volumes import open_series

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from brainfm_cli.programs.embedded.settings import EmbeddedSettings

    Volume = NDArray[np.float32]
    Mask = NDArray[np.bool_]
    Matrix = NDArray[np.float64]

_FIT_MM, _TISSUE_MM = 2.0, 1.0
_COARSE: dict[str, Any] = {
    "aff_iterations": (500, 250), "aff_shrink_factors": (4, 2), "aff_smoothing_sigmas": (2, 1), "aff_random_sampling_rate": 0.3,
}  # fmt: skip
_FINE: dict[str, Any] = {
    "aff_iterations": (100,),
    "aff_shrink_factors": (1,),
    "aff_smoothing_sigmas": (0,),
    "aff_random_sampling_rate": 0.3,
}
_SLAB_BYTES = 256 << 20
_TISSUE_FRACTIONS = (0.99, 0.95, 0.9, 0.8, 0.7, 0.5)  # of a BOLD voxel that must be one tissue; the first that leaves enough voxels
_ENOUGH_VOXELS = 30
_CORE_PROBABILITY = 0.95
_FROM_GREY_MM = {"CSF": 1.0, "WM": 2.0}


@dataclass(frozen=True, kw_only=True, eq=False)
class Series:
    """A stored run: float32 frames on disk, mapped into memory."""

    frames: NDArray[np.float32]
    """(frames, x, y, z) without NaN."""
    affine: Matrix
    """(4, 4) voxels to millimetres, RAS."""
    first: int
    """Number of frames before the steady state."""
    repetition_time_s: float
    """Seconds between frames."""

    @property
    def steady(self) -> range:
        """Positions of the frames in steady state."""
        return range(self.first, len(self.frames))


def store(folder: Path, bold: str, repetition_time_s: float) -> str:
    """The run as uncompressed float32 frames, which later steps map into memory; gives back the description of it."""
    first_frames: list[Volume] = []
    place = folder / "series.npy"
    with open_series(Path(bold)) as (header, volumes):
        shape = (header.num_frames, *header.shape)
        temporary = temporary_path(place)
        stored = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
        for index, volume in enumerate(volumes):
            frame = np.nan_to_num(volume.astype(np.float32) * header.slope + header.intercept, nan=0, posinf=0, neginf=0).astype(np.float32)
            stored[index] = frame.reshape(header.shape, order="F")
            if index < noise.STEADY_STATE_FRAMES:
                first_frames.append(frame)
        affine = header.affine
    stored.flush()
    temporary.replace(place)
    about = {
        "series": str(place),
        "affine": affine.tolist(),
        "first": noise.non_steady_frames(np.stack(first_frames)),
        "repetition_time_s": repetition_time_s,
    }
    return str(write_json(folder / "series.json", about))


def open_stored(about: str) -> Series:
    """A stored run."""
    values = json.loads(Path(about).read_text(encoding="utf-8"))
    frames = np.load(values["series"], mmap_mode="r")
    return Series(frames=frames, affine=np.array(values["affine"]), first=values["first"], repetition_time_s=values["repetition_time_s"])


def align_frames(folder: Path, about: str, threads: int) -> tuple[str, str]:
    """The reference volume, and the transforms from it to each frame as ITK text."""
    series = open_stored(about)
    read = _reader(series)
    reference = average_reference(read, series.steady, series.affine, threads=threads)
    transforms = realign(read, range(len(series.frames)), build_target(reference, series.affine), threads=threads)
    path = write_image(folder / "boldref.nii", reference, series.affine)
    return str(path), str(write_text(folder / "motion.txt", itk_text(transforms)))


def time_slices(folder: Path, about: str, times_s: Sequence[float] | None, direction: str) -> tuple[str, float | None]:
    """The run with every slice moved to the middle of the acquisition, and that moment in seconds.

    The run as it is, and no moment, where times are not stated.
    """
    if times_s is None:
        return about, None
    series = open_stored(about)
    axis, reverse = slice_axis(direction)
    shape = series.frames.shape
    times = check_slice_times(times_s, num_slices=shape[axis + 1], repetition_time_s=series.repetition_time_s)
    times = times[::-1] if reverse else times
    target = reference_time(times)
    place = folder / "series.npy"
    temporary = temporary_path(place)
    stored = np.lib.format.open_memmap(temporary, "w+", np.float32, shape)
    source, sink = np.moveaxis(series.frames, axis + 1, 1), np.moveaxis(stored, axis + 1, 1)
    thickness = max(1, _SLAB_BYTES // (4 * len(source) * int(np.prod(source.shape[2:]))))
    for start in range(0, source.shape[1], thickness):
        slab = np.array(source[:, start : start + thickness])
        for offset in range(slab.shape[1]):
            part = np.ascontiguousarray(slab[:, offset]).reshape(len(slab), -1)
            shift_slice(part, time_s=times[start + offset], target_s=target, repetition_time_s=series.repetition_time_s, first=series.first)
            slab[:, offset] = part.reshape(slab[:, offset].shape)
        sink[:, start : start + thickness] = slab
    stored.flush()
    temporary.replace(place)
    changed = json.loads(Path(about).read_text(encoding="utf-8")) | {"series": str(place)}
    return str(write_json(folder / "series.json", changed)), target


def coregister(folder: Path, boldref: str, t1w: str, mask: str, settings: EmbeddedSettings, seed: int) -> tuple[str, float]:
    """The transform from structural points to reference points as ITK text, and the mutual information reached.

    Two beginnings are tried, because either may be far off: that scanner coordinates agree, and that centres of mass do.
    """
    structural, affine = read_ras(Path(t1w))
    inside = read_ras(Path(mask))[0] > 0
    fixed, fixed_affine = coarser(np.where(inside, structural, 0), affine, _FIT_MM)
    near = np.asarray(ndimage.binary_dilation(coarser(inside, affine, _FIT_MM)[0] > 0.5, iterations=3), bool)
    reference, reference_affine = read_ras(Path(boldref))
    reference = reference / fit_bias(reference, reference > 0.2 * np.percentile(reference, 98))
    kind = "Rigid" if settings.coregistration_dof == 6 else "Affine"
    header = write_text(folder / "header.txt", itk_text(np.eye(4)))

    def fit(name: str, start: Path | None, options: dict[str, Any]) -> tuple[float, Path]:
        forward, _ = itk.register(
            (fixed, fixed_affine), (reference, reference_affine), kind, folder,
            name=name, seed=seed, fixed_mask=near, start=start, options=options,
        )  # fmt: skip
        moved = itk.warp(reference, reference_affine, fixed.shape, fixed_affine, [forward])
        return mutual_information(moved[near], fixed[near]), forward

    _, coarse = max(fit(name, start, _COARSE) for name, start in (("header", header), ("mass", None)))
    information, forward = fit("fine", coarse, _FINE)
    return str(write_text(folder / "coreg.txt", itk_text(itk.matrix_of(forward)))), information


def native_masks(folder: Path, boldref: str, coreg: str, mask: str, probabilities: Sequence[str]) -> tuple[str, dict[str, float]]:
    """Brain and tissue masks on the reference's grid (brain 1, CSF 2, WM 4, added), and the tissue fraction demanded of each."""
    reference, affine = _read_native(Path(boldref))
    to_structural = np.linalg.inv(read_itk(Path(coreg))[0])
    inside, structural = read_ras(Path(mask))
    box = box_around(inside > 0, 4)
    structural = moved_affine(structural, box)

    def small(path: str) -> tuple[Volume, Matrix]:
        return coarser(read_ras(Path(path))[0][box], structural, _TISSUE_MM)

    tissues = {name: small(path)[0] for name, path in zip(("CSF", "GM", "WM"), probabilities, strict=True)}
    inside, structural = small(mask)
    brain = _fraction(inside, structural, reference.shape, affine, to_structural) > 0.5
    codes, demanded = brain.astype(np.uint8), {}
    distance = ndimage.distance_transform_edt(tissues["GM"] < 0.5, sampling=zooms_of(structural))
    deep = ndimage.distance_transform_edt(inside > 0.5, sampling=zooms_of(structural))
    for name, code in (("CSF", 2), ("WM", 4)):
        core = (tissues[name] > _CORE_PROBABILITY) & (distance > _FROM_GREY_MM[name]) & (deep > 3.0)
        share = _fraction(core.astype(np.float32), structural, reference.shape, affine, to_structural) * brain
        demanded[name] = next((one for one in _TISSUE_FRACTIONS if (share >= one).sum() >= _ENOUGH_VOXELS), _TISSUE_FRACTIONS[-1])
        codes += np.uint8(code) * (share >= demanded[name])
    return str(write_image(folder / "masks.nii", codes, affine)), demanded


def tabulate(folder: Path, about: str, native: str, masks: str, boldref: str, motion: str) -> tuple[str, str]:
    """The confounds table and its description."""
    series = open_stored(about)
    codes = _read_native(Path(masks))[0].astype(np.uint8)
    reference, affine = _read_native(Path(boldref))
    labels = codes[(codes & 1) > 0]
    values = np.load(native, mmap_mode="r")
    csf, white, everything = (labels & 2) > 0, (labels & 4) > 0, np.ones(len(labels), bool)
    areas = {"global_signal": everything, "csf": csf, "white_matter": white, "csf_wm": csf | white}
    transforms = read_itk(Path(motion))
    shape, seconds = reference.shape, series.repetition_time_s

    def components(area: Mask) -> noise.Components:
        return noise.noise_components(values, area, repetition_time_s=seconds, first=series.first)

    table, described = noise.build_table(
        signals=noise.mean_signals(values, areas),
        motion=motion_table(transforms, shape, affine, centre_of_mass_mm(reference, zooms_of(affine).tolist())),
        rmsd=rms_deviation(transforms, shape, affine),
        dvars_pair=noise.dvars(values),
        components={"CSF": components(csf), "WM": components(white), "combined": components(csf | white)},
        repetition_time_s=seconds,
        first=series.first,
    )
    return str(write_tsv(folder / "confounds.tsv", table)), str(write_json(folder / "confounds.json", described))


def mask_of(images):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The brain mask among the images in template space. nipype copies this text: it stands alone, without types."""
    return images["mask"]


def native_of(files):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201
    """The series on the reference's grid among the files of a run. As above."""
    return files["native"]


def _reader(series: Series) -> Callable[[int], Volume]:
    def read(frame: int) -> Volume:
        return np.array(series.frames[frame])

    return read


def _read_native(path: Path) -> tuple[Volume, Matrix]:
    """An image of ours on its own grid, axes as they are."""
    import nibabel as nib

    image: Any = nib.load(path)
    return np.asarray(image.dataobj, np.float32), np.asarray(image.affine, np.float64)


def _fraction(values: Volume, affine: Matrix, shape: Sequence[int], target: Matrix, to_structural: Matrix) -> Volume:
    """Share of each larger voxel that an area fills: the area blurred to the voxel's size, looked up at its centre."""
    sigma = zooms_of(target).mean() / zooms_of(affine) / np.sqrt(12)  # a box of one voxel has this spread
    blurred = ndimage.gaussian_filter(np.asarray(values, np.float32), sigma, truncate=3)
    matrix = np.linalg.inv(affine) @ to_structural @ target
    return ndimage.affine_transform(blurred, matrix[:3, :3], matrix[:3, 3], tuple(shape), order=1, mode="constant", output=np.float32)
