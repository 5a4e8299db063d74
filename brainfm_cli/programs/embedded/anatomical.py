"""Structural steps, each from files to files in its own folder: conform, unbias, strip, classify, register, resample."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import ndimage

from brainfm_cli.bids.derivatives import write_json
from brainfm_cli.bids.images import write_image
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.programs.embedded import brain, itk
from brainfm_cli.programs.embedded.bias import fit_bias
from brainfm_cli.programs.embedded.gates import Gate, check_brain, sequence_gates, template_gates
from brainfm_cli.programs.embedded.grids import box_around, coarser, moved_affine, on_grid, read_ras
from brainfm_cli.programs.embedded.mixture import tissue_probabilities
from brainfm_cli.programs.embedded.template import Template, load_template, output_grid

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from brainfm_cli.programs.embedded.settings import EmbeddedSettings

TISSUES = ("CSF", "GM", "WM")
_FIELD_MM, _TISSUE_MM, _CLASS_MM, _FIT_MM = 4.0, 1.0, 2.0, 2.0
_HEAD = 0.1  # of the 98th percentile
_OUTPUT_MEDIAN = 1000.0  # brain intensity of the written image, so that integers hold it
_RIGID: dict[str, Any] = {"aff_iterations": (500, 250, 100, 0), "aff_random_sampling_rate": 0.2}
_AFFINE: dict[str, Any] = {
    "aff_iterations": (200, 100), "aff_shrink_factors": (4, 2), "aff_smoothing_sigmas": (2, 1), "aff_random_sampling_rate": 0.2,
}  # fmt: skip
_SHAPE: dict[str, dict[str, Any]] = {
    "fast": {"reg_iterations": (40, 20, 10), "syn_metric": "mattes", "syn_sampling": 32},
    "full": {"reg_iterations": (70, 50, 20), "syn_metric": "CC", "syn_sampling": 4},
}


def conform(folder: Path, images: Sequence[str], seed: int) -> str:
    """The structural image with axes towards right, anterior, superior; of several, the mean after rigid alignment to the first."""
    first, affine = read_ras(Path(images[0]))
    total = first / _scale(first)
    for number, path in enumerate(images[1:], 1):
        other, other_affine = read_ras(Path(path))
        fixed, moving = coarser(first, affine, _FIT_MM), coarser(other, other_affine, _FIT_MM)
        forward, _ = itk.register(fixed, moving, "Rigid", folder, name=f"average{number}", seed=seed, options=_RIGID)
        total += itk.warp(other / _scale(other), other_affine, first.shape, affine, [forward], interpolation="bSpline")
    return str(write_image(folder / "image.nii", np.maximum(total / len(images) * _OUTPUT_MEDIAN, 0).astype(np.float32), affine))


def unbias(folder: Path, image: str, mask: str | None) -> str:
    """The image divided by its bias field, fitted in the mask, or in the head where there is none yet; median 1000 in it."""
    values, affine = read_ras(Path(image))
    inside = read_ras(Path(mask))[0] > 0 if mask else values > _HEAD * np.percentile(values, 98)
    small, small_affine = coarser(values, affine, _FIELD_MM)
    field = fit_bias(small, coarser(inside, affine, _FIELD_MM)[0] > 0.5)
    # The coarse grid may end a few voxels before the fine one does.
    matrix = np.linalg.inv(small_affine) @ affine
    values /= ndimage.affine_transform(field, matrix[:3, :3], matrix[:3, 3], values.shape, order=1, mode="nearest", output=np.float32)
    values *= np.float32(_OUTPUT_MEDIAN / max(float(np.median(values[inside])), 1e-6))
    return str(write_image(folder / "unbiased.nii", values, affine))


def extract(folder: Path, image: str, modality: str, template: Template, settings: EmbeddedSettings, seed: int) -> tuple[str, str]:
    """Brain mask and the name of the method that found it.

    Raises
    ------
    InputDatasetError
        No allowed method gives a believable mask.
    """
    values, affine = read_ras(Path(image))
    refused = []
    for method in _methods(values, affine, modality, settings):
        mask = _extract_with(method, values, affine, template, folder, seed)
        mask = brain.largest_blob(mask) if mask.any() else mask
        gate = check_brain(mask, values, affine, settings)
        if gate.passed:
            path = write_image(folder / "mask.nii", mask.astype(np.uint8), affine)
            return str(path), method
        refused.append(f"{method}: {gate.sentence}")
    raise InputDatasetError(
        f"no believable brain mask was found ({'; '.join(refused)})",
        fix="look at the structural image; for small heads lower brain_ml, or use another engine",
    )


def classify(folder: Path, image: str, mask: str) -> tuple[list[str], str]:
    """Probability of CSF, grey and white matter, and the most probable class (GM 1, WM 2, CSF 3, as in fMRIPrep)."""
    values, affine = read_ras(Path(image))
    inside = read_ras(Path(mask))[0] > 0
    box = box_around(inside, 4)
    cut = moved_affine(affine, box)
    small, small_affine = coarser(np.where(inside, values, 0)[box], cut, _TISSUE_MM)
    small_inside = coarser(inside[box], cut, _TISSUE_MM)[0] > 0.5
    coarse = coarser(small, small_affine, _CLASS_MM)[0]
    coarse_inside = coarser(small_inside, small_affine, _CLASS_MM)[0] > 0.5
    classes = tissue_probabilities(small, small_inside, learn_from=(coarse, coarse_inside))
    parts = np.stack([on_grid(one, small_affine, inside[box].shape, cut) * inside[box] for one in classes])
    total = parts.sum(0)
    parts /= np.where(total > 0, total, 1)
    codes = np.array([3, 1, 2], np.uint8)[parts.argmax(0)] * (total > 0)
    paths = [write_image(folder / f"{name}.nii", _whole(one, values.shape, box), affine) for name, one in zip(TISSUES, parts, strict=True)]
    return [str(path) for path in paths], str(
        write_image(folder / "classes.nii", _whole(codes.astype(np.uint8), values.shape, box), affine)
    )


def normalise(folder: Path, image: str, mask: str, template: Template, settings: EmbeddedSettings, seed: int) -> tuple[str, str]:
    """Composite transforms as ``.h5``: the one that brings images onto the template, and the one that brings them back."""
    values, affine = read_ras(Path(image))
    inside = read_ras(Path(mask))[0] > 0
    box = box_around(inside, 6)
    wanted = load_template(template)
    size_mm = _FIT_MM if settings.registration == "fast" else 1.0
    moving = coarser(np.where(inside, values, 0)[box], moved_affine(affine, box), size_mm)
    fixed = coarser(wanted.brain, wanted.affine, size_mm)
    # antspyx's own "SyN" cannot be told how long to fit the affine part.
    start, _ = itk.register(fixed, moving, "Affine", folder, name="affine", seed=seed, options=_AFFINE)
    shape = _SHAPE[settings.registration]
    forward, inverse = itk.register(fixed, moving, "SyNOnly", folder, name="template", seed=seed, start=start, options=shape)
    return str(forward), str(inverse)


def resample(
    folder: Path,
    image: str,
    mask: str,
    classes: str | None,
    probabilities: Sequence[str],
    forward: str,
    modality: str,
    template: Template,
    settings: EmbeddedSettings,
) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """Image, mask and, where there are any, classes and probabilities on the template's output grid, and their gates.

    Raises
    ------
    InputDatasetError
        The image does not resemble the template after registration.
    """
    shape, target = output_grid(settings.resolution)

    inside, own = read_ras(Path(mask))
    box = box_around(inside > 0, 4)

    def place(path: str, interpolation: itk.Interpolation) -> NDArray[np.float32]:
        values = read_ras(Path(path))[0][box]  # nothing of masks and tissues lies outside
        return itk.warp(values, moved_affine(own, box), shape, target, [Path(forward)], interpolation=interpolation)

    whole, affine = read_ras(Path(image))
    moved = itk.warp(whole, affine, shape, target, [Path(forward)], interpolation="lanczosWindowedSinc").clip(0)
    moved_mask = place(mask, "linear") > 0.5
    images = {
        "image": write_image(folder / "image.nii", moved, target, space="template"),
        "mask": write_image(folder / "mask.nii", moved_mask.astype(np.uint8), target, space="template"),
    }
    if classes:
        codes = place(classes, "nearestNeighbor").astype(np.uint8)
        images["classes"] = write_image(folder / "classes.nii", codes, target, space="template")
    for name, path in zip(TISSUES if probabilities else (), probabilities, strict=True):
        images[name] = write_image(folder / f"{name}.nii", place(path, "linear").clip(0, 1), target, space="template")
    gates = template_gates(moved, moved_mask, target, load_template(template), settings, modality=modality)
    write_json(folder / "gates.json", [gate.as_row() for gate in gates])
    _refuse_failed(gates)
    return {name: str(path) for name, path in images.items()}, [gate.as_row() for gate in gates]


def align_other(folder: Path, image: str, reference: str, mask: str, seed: int) -> tuple[str, str, list[dict[str, Any]]]:
    """Another sequence of the same head in the reference's space: the resampled image, the transform as ITK text's ``.h5``, gates.

    Raises
    ------
    InputDatasetError
        The two images share more when one of them is displaced.
    """
    moving, moving_affine = read_ras(Path(image))
    fixed, affine = read_ras(Path(reference))
    inside = coarser(read_ras(Path(mask))[0], affine, _FIT_MM)[0] > 0.5
    near = ndimage.binary_dilation(inside, iterations=4)
    forward, _ = itk.register(
        coarser(fixed, affine, _FIT_MM), coarser(moving, moving_affine, _FIT_MM), "Rigid", folder,
        name="rigid", seed=seed, fixed_mask=np.asarray(near, bool), options=_RIGID,
    )  # fmt: skip
    moved = itk.warp(moving, moving_affine, fixed.shape, affine, [forward]).clip(0)
    gates = sequence_gates(coarser(fixed, affine, _FIT_MM)[0], coarser(moved, affine, _FIT_MM)[0], inside, _FIT_MM)
    write_json(folder / "gates.json", [gate.as_row() for gate in gates])
    _refuse_failed(gates, what=f"{Path(image).name}: ")
    return str(write_image(folder / "image.nii", moved, affine)), str(forward), [gate.as_row() for gate in gates]


def move_other(folder: Path, image: str, forward: str, gates: Sequence[dict[str, Any]], settings: EmbeddedSettings) -> str:  # noqa: ARG001
    """Another sequence, already in the reference's space, on the template's output grid; ``gates`` make it wait for them."""
    values, affine = read_ras(Path(image))
    shape, target = output_grid(settings.resolution)
    moved = itk.warp(values, affine, shape, target, [Path(forward)]).clip(0)
    return str(write_image(folder / "image.nii", moved, target, space="template"))


def _methods(
    values: NDArray[np.float32], affine: NDArray[np.float64], modality: str, settings: EmbeddedSettings
) -> tuple[brain.Method, ...]:
    if brain.is_stripped(values, affine, settings.brain_ml):
        return ("stripped",)
    if settings.brain_extraction != "auto":
        return (settings.brain_extraction,)
    # deepbet was trained on T1w; elsewhere its masks look believable and are not.
    return ("deepbet", "template") if modality == "T1w" else ("template",)


def _extract_with(
    method: brain.Method, values: NDArray[np.float32], affine: NDArray[np.float64], template: Template, folder: Path, seed: int
) -> NDArray[np.bool_]:
    if method == "stripped":
        return values != 0
    if method == "deepbet":
        return brain.deepbet_mask(values, affine)
    return brain.template_mask(values, affine, load_template(template), folder, seed=seed)


def _refuse_failed(gates: Sequence[Gate], *, what: str = "") -> None:
    for gate in gates:
        if not gate.passed:
            raise InputDatasetError(
                f"{what}{gate.sentence}", fix="look at the image and at its brain mask in the work folder; nothing is published"
            )


def _whole(part: NDArray[Any], shape: Sequence[int], box: tuple[slice, slice, slice]) -> NDArray[Any]:
    """An image that is 0 around a box; in the order in which images are stored."""
    image = np.zeros(tuple(shape), part.dtype, order="F")
    image[box] = part
    return image


def _scale(values: NDArray[np.float32]) -> np.float32:
    return np.float32(np.percentile(values[values > _HEAD * np.percentile(values, 98)], 75))
