"""Region averages, denoising and matrices against nilearn, which reads the whole image and resamples itself."""

from __future__ import annotations

import tracemalloc
from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
from nilearn.connectome import ConnectivityMeasure
from nilearn.interfaces.fmriprep import load_confounds_strategy
from nilearn.maskers import NiftiLabelsMasker
from sklearn.covariance import EmpiricalCovariance, LedoitWolf

from brainfm_cli.atlases.catalogue import find_atlas
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.records import RunFiles, RunKey
from brainfm_cli.signals import parcellation
from brainfm_cli.signals.denoise import Denoising
from brainfm_cli.signals.parcellation import average_regions
from brainfm_cli.signals.runs import matrices, parcellate_run
from tests import synthetic_bids as synthetic

if TYPE_CHECKING:
    from pathlib import Path

    from brainfm_cli.atlases.atlas import Atlas

SPACE = synthetic.TEMPLATE
SHAPE = (11, 13, 9)
AFFINE = np.array([[-8.0, 0, 0, 40], [0, 8, 0, -50], [0, 0, 8, -30], [0, 0, 0, 1]])


def blobs(shape: tuple[int, int, int], number: int, seed: int) -> np.ndarray:
    """A label image in which every voxel belongs to the nearest of ``number`` random centres, with a background border."""
    generator = np.random.default_rng(seed)
    centres = generator.uniform(0.2, 0.8, (number, 3)) * shape
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), -1)
    distance = np.linalg.norm(grid[..., None, :] - centres, axis=-1)
    return np.where(distance.min(-1) < min(shape) / 2.5, distance.argmin(-1) + 1, 0).astype(np.int16)


def make_atlas(folder: Path, name: str, labels: np.ndarray, affine: np.ndarray = AFFINE) -> Atlas:
    place = folder / f"tpl-{SPACE}"
    place.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(labels, affine), place / f"tpl-{SPACE}_atlas-{name}_dseg.nii.gz")
    values = np.unique(labels[labels > 0])
    table = pd.DataFrame({"index": values, "name": [f"R{value}" for value in values]})
    table.to_csv(place / f"tpl-{SPACE}_atlas-{name}_dseg.tsv", sep="\t", index=False)
    return find_atlas(f"{name}@{SPACE}", {"here": folder})


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE, *, dtype: type = np.float64, slope: float | None = None) -> Path:
    if slope is not None:
        image = nib.Nifti1Image(data, affine)
        image.set_data_dtype(np.int16)
        image.header.set_slope_inter(slope, 700.0)
    else:
        image = nib.Nifti1Image(data.astype(dtype), affine)
    image.header["pixdim"][4] = 2.0
    image.header.set_xyzt_units("mm", "sec")
    nib.save(image, path)
    return path


@pytest.fixture
def atlases(tmp_path: Path) -> list[Atlas]:
    return [make_atlas(tmp_path / "atlases", name, blobs(SHAPE, number, seed)) for name, number, seed in (("A", 6, 1), ("B", 9, 2))]


@pytest.fixture
def mask(tmp_path: Path, generator: np.random.Generator) -> Path:
    return save(tmp_path / "mask.nii.gz", generator.random(SHAPE) < 0.8, dtype=np.uint8)


def by_nilearn(image: Path, mask: Path, atlas: Atlas) -> np.ndarray:
    masker = NiftiLabelsMasker(labels_img=str(atlas.path), mask_img=str(mask), standardize=None, resampling_target=None)
    return masker.fit_transform(str(image))


@pytest.mark.parametrize("name", ["bold.nii.gz", "bold.nii"])
@pytest.mark.parametrize(("dtype", "slope"), [(np.float64, None), (np.float32, None), (np.int16, None), (np.int16, 0.37), (">i2", None)])
def test_averages_equal_nilearn(
    tmp_path: Path, atlases: list[Atlas], mask: Path, generator: np.random.Generator, name: str, dtype: type, slope: float | None
) -> None:
    data = 1000 + 50 * generator.standard_normal((*SHAPE, 37))  # 37 frames: not a multiple of the batch
    image = save(tmp_path / name, data, dtype=dtype, slope=slope)
    found = average_regions(image, atlases, space=SPACE, mask=mask)
    stored = nib.load(image).get_fdata()
    inside = nib.load(mask).get_fdata() > 0
    for atlas, average in zip(atlases, found, strict=True):
        labels = nib.load(atlas.path).get_fdata()
        for region, value in enumerate(atlas.values):
            place = (labels == value) & inside
            np.testing.assert_allclose(average.series[:, region], stored[place].mean(0), rtol=1e-12)
            assert average.coverage[region] == pytest.approx(place.sum() / (labels == value).sum())
        # nilearn keeps the type on disk for its averages
        tolerance = 1e-12 if dtype is np.float64 else 1e-5
        np.testing.assert_allclose(average.series, by_nilearn(image, mask, atlas), rtol=tolerance)


@pytest.mark.parametrize(
    "denoising",
    [
        Denoising(),
        Denoising(strategy="none"),
        Denoising(strategy="scrubbing+gsr", fd_threshold=0.12, scrub=2),
        Denoising(strategy="compcor", n_compcor=3, detrend=True),
        Denoising(strategy="scrubbing", fd_threshold=0.12, scrub=2, low_pass=0.1, high_pass=0.01, standardize="psc"),
    ],
    ids=lambda denoising: denoising.strategy,
)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int16])
def test_series_and_matrices_equal_nilearn(tmp_path: Path, denoising: Denoising, dtype: type) -> None:
    made = synthetic.write_fmriprep(tmp_path / "fmriprep", participants=("01",), frames=150, seed=4)
    folder = made.root / "sub-01" / "func"
    stem = folder / f"sub-01_task-rest_space-{SPACE}_res-2"
    bold, mask = f"{stem}_desc-preproc_bold.nii.gz", f"{stem}_desc-brain_mask.nii.gz"
    image = nib.load(bold)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj).astype(dtype), image.affine, dtype=dtype), bold)
    atlas = find_atlas(synthetic.ATLAS, {"tests": made.atlases})
    files = RunFiles(
        key=RunKey(participant="01", task="rest"), bold=stem.with_name(bold.rpartition("/")[2]), space=SPACE,
        mask=stem.with_name(mask.rpartition("/")[2]), repetition_time_s=2.0, confounds=folder / "sub-01_task-rest_desc-confounds_timeseries.tsv",
    )  # fmt: skip
    run = parcellate_run(files, [atlas], denoising, min_coverage=0.5).runs[0]

    # The reference: nilearn on a float64 copy of the same numbers, with its own reading of the confounds.
    reference = tmp_path / "reference"
    reference.mkdir()
    for path in folder.iterdir():
        (reference / path.name).write_bytes(path.read_bytes())
    double = reference / bold.rpartition("/")[2]
    nib.save(nib.Nifti1Image(nib.load(bold).get_fdata(), image.affine), double)
    extra = {
        "scrubbing": {"fd_threshold": denoising.fd_threshold, "scrub": denoising.scrub},
        "compcor": {"n_compcor": denoising.n_compcor},
    }
    confounds, sample_mask = None, None
    if denoising.strategy != "none":
        options = extra.get(denoising.base, {}) | ({"global_signal": "basic"} if denoising.strategy.endswith("+gsr") else {})
        confounds, sample_mask = load_confounds_strategy(str(double), denoise_strategy=denoising.base, **options)
    masker = NiftiLabelsMasker(
        labels_img=str(atlas.path), mask_img=mask, resampling_target=None, t_r=2.0, detrend=denoising.detrend,
        standardize=denoising.standardize, low_pass=denoising.low_pass, high_pass=denoising.high_pass,
    )  # fmt: skip
    expected = masker.fit_transform(str(double), confounds=confounds, sample_mask=sample_mask)
    if denoising.base == "scrubbing":
        assert len(expected) < 150, "the case must drop frames"
    np.testing.assert_allclose(run.series, expected, atol=1e-6 if dtype is np.float64 else 1e-5)
    found = matrices(run.series, ("pearson", "partial", "fisherz"))
    # nilearn shrinks correlations unless it is told not to. Partial ones are shrunk by both, which depends on units: ours are of z-scores.
    scaled = (expected - expected.mean(0)) / expected.std(0, ddof=1)
    for kind, name, estimator in (("pearson", "correlation", EmpiricalCovariance()), ("partial", "partial correlation", LedoitWolf())):
        measured = ConnectivityMeasure(cov_estimator=estimator, kind=name, standardize="zscore_sample").fit_transform([scaled])[0]
        np.testing.assert_allclose(found[kind], measured, atol=1e-6)
    off = ~np.eye(4, dtype=bool)
    np.testing.assert_allclose(found["fisherz"][off], np.arctanh(found["pearson"][off]), atol=1e-12)


def test_denoising_gives_the_planted_correlations(tmp_path: Path) -> None:
    from brainfm_cli.bids.inputs import find_runs
    from brainfm_cli.config import Selection

    made = synthetic.write_fmriprep(tmp_path / "fmriprep", participants=("01",))
    atlas = find_atlas(synthetic.ATLAS, {"tests": made.atlases})
    (files,) = find_runs(made.root, "01", Selection())
    run = parcellate_run(files, [atlas], Denoising(), min_coverage=0.5).runs[0]
    np.testing.assert_allclose(matrices(run.series, ("pearson",))["pearson"], synthetic.CORRELATION, atol=1e-6)
    raw = parcellate_run(files, [atlas], Denoising(strategy="none"), min_coverage=0.5).runs[0]
    assert np.abs(matrices(raw.series, ("pearson",))["pearson"] - synthetic.CORRELATION).max() > 0.01


def test_memory_does_not_grow_with_the_number_of_frames(tmp_path: Path, atlases: list[Atlas], mask: Path) -> None:
    def peak(frames: int) -> int:
        image = save(tmp_path / f"{frames}.nii.gz", np.random.default_rng(0).standard_normal((*SHAPE, frames)))
        average_regions(image, atlases, space=SPACE, mask=mask)  # the operator is made
        tracemalloc.start()
        average_regions(image, atlases, space=SPACE, mask=mask)
        size = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return size

    growth = peak(2400) - peak(800)
    read_ahead = 2**21  # what the decompressing thread holds at a time, more or less of it from run to run
    assert growth < 6 * 1600 * 15 * 8 + read_ahead  # the means themselves, a few times; the voxels would be 1600 * 1287 * 8 = 16 MB


def test_numbers_outside_the_mask_are_never_read(tmp_path: Path, atlases: list[Atlas], mask: Path, generator: np.random.Generator) -> None:
    data = generator.standard_normal((*SHAPE, 12))
    clean = average_regions(save(tmp_path / "clean.nii.gz", data), atlases, space=SPACE, mask=mask)
    outside = nib.load(mask).get_fdata() == 0
    data[outside] = np.nan
    spoilt = average_regions(save(tmp_path / "spoilt.nii.gz", data), atlases, space=SPACE, mask=mask)
    for one, two in zip(clean, spoilt, strict=True):
        np.testing.assert_array_equal(one.series, two.series)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_voxel_without_number_inside_the_mask_is_named(tmp_path: Path, atlases: list[Atlas], mask: Path, value: float) -> None:
    data = np.ones((*SHAPE, 40))
    inside = (nib.load(mask).get_fdata() > 0) & (nib.load(atlases[1].path).get_fdata() > 0)
    data[(*np.argwhere(inside)[5], 33)] = value
    image = save(tmp_path / "bold.nii.gz", data)
    with pytest.raises(InputDatasetError, match=r"no finite number in 1 of 40 frames, first in frame 33"):
        average_regions(image, atlases, space=SPACE, mask=mask)


def test_what_the_field_of_view_cuts_off_counts_as_uncovered(tmp_path: Path, atlases: list[Atlas]) -> None:
    keep = slice(0, 6)
    affine = AFFINE
    data = np.random.default_rng(0).standard_normal((*SHAPE[:2], 6, 5))
    image = save(tmp_path / "cut.nii.gz", data, affine)
    mask = save(tmp_path / "mask.nii.gz", np.ones((*SHAPE[:2], 6)), affine, dtype=np.uint8)
    (average,) = average_regions(image, atlases[:1], space=SPACE, mask=mask)
    labels = nib.load(atlases[0].path).get_fdata()
    expected = [(labels[:, :, keep] == value).sum() / (labels == value).sum() for value in atlases[0].values]  # noqa: PD011
    np.testing.assert_allclose(average.coverage, expected)
    assert min(expected) < 0.5 < max(expected)


def test_a_region_outside_the_mask_is_nan_and_its_neighbours_are_not(tmp_path: Path, atlases: list[Atlas]) -> None:
    labels = nib.load(atlases[0].path).get_fdata()
    mask = save(tmp_path / "mask.nii.gz", labels != 3, dtype=np.uint8)
    image = save(tmp_path / "bold.nii.gz", np.random.default_rng(0).standard_normal((*SHAPE, 5)))
    average = average_regions(image, atlases, space=SPACE, mask=mask)[0]
    assert np.isnan(average.series).all(0).tolist() == [value == 3 for value in atlases[0].values]  # noqa: PD011
    assert average.coverage[2] == 0


def test_labels_are_placed_once_per_grid_and_operators_once_per_mask(
    tmp_path: Path, atlases: list[Atlas], mask: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed, built = [], []
    place, build = parcellation.labels_on_grid, parcellation._build
    monkeypatch.setattr(parcellation, "labels_on_grid", lambda *arguments: placed.append(1) or place(*arguments))
    monkeypatch.setattr(parcellation, "_build", lambda *arguments: built.append(1) or build(*arguments))
    data = np.random.default_rng(0).standard_normal((*SHAPE, 5))
    whole = save(tmp_path / "whole.nii.gz", np.ones(SHAPE), dtype=np.uint8)
    image = save(tmp_path / "bold.nii.gz", data)
    for used in (mask, mask, whole, mask):
        average_regions(image, atlases, space=SPACE, mask=used)
    assert (len(placed), len(built)) == (2, 2)
    moved = AFFINE + np.array([[0.0, 0, 0, 8], [0] * 4, [0] * 4, [0] * 4])
    other, shifted = save(tmp_path / "moved.nii.gz", data, moved), save(tmp_path / "m.nii.gz", np.ones(SHAPE), moved, dtype=np.uint8)
    a = average_regions(other, atlases, space=SPACE, mask=shifted)[0].series
    b = average_regions(image, atlases, space=SPACE, mask=whole)[0].series
    assert np.abs(a - b).max() > 1e-3


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("empty", "the brain mask is empty"),
        ("grid", "different grids"),
        ("shape", "different grids"),
        ("zero", "0 bytes"),
        ("text", "cannot be read"),
    ],
)
def test_bad_masks_are_named(tmp_path: Path, atlases: list[Atlas], fault: str, says: str) -> None:
    image = save(tmp_path / "bold.nii.gz", np.ones((*SHAPE, 5)))
    mask = tmp_path / "mask.nii.gz"
    if fault == "zero":
        mask.touch()
    elif fault == "text":
        mask.write_text("no image")
    else:
        shape = (*SHAPE[:2], 8) if fault == "shape" else SHAPE
        affine = AFFINE + (np.eye(4, k=3) if fault == "grid" else 0)
        save(mask, np.zeros(shape) if fault == "empty" else np.ones(shape), affine, dtype=np.uint8)
    with pytest.raises(InputDatasetError, match=says):
        average_regions(image, atlases, space=SPACE, mask=mask)


@pytest.mark.long
def test_a_real_image_equals_nilearn(tmp_path: Path, test_data: Path) -> None:
    """A real BOLD run of 156 volumes (int16), eight overlapping parcellations on its grid, against nilearn."""
    (image,) = sorted((test_data / "bids_localizer").rglob("*_bold.nii.gz"))[:1]
    bold = nib.load(image)
    shape = bold.shape[:3]
    atlases = [make_atlas(tmp_path / "atlases", f"P{number}", blobs(shape, number, number), bold.affine) for number in range(20, 100, 10)]
    mean = np.asarray(bold.dataobj[..., :20], float).mean(-1)
    mask = save(tmp_path / "mask.nii.gz", mean > 0.3 * mean.max(), bold.affine, dtype=np.uint8)
    found = average_regions(image, atlases, space=SPACE, mask=mask)
    double = tmp_path / "double.nii.gz"
    nib.save(nib.Nifti1Image(bold.get_fdata(), bold.affine), double)
    for atlas, average in zip(atlases, found, strict=True):
        covered = average.coverage > 0
        masker = NiftiLabelsMasker(labels_img=str(atlas.path), mask_img=str(mask), standardize=None, resampling_target=None)
        expected = masker.fit_transform(str(double))
        if expected.shape[1] == len(covered):
            expected = expected[:, covered]
        np.testing.assert_allclose(average.series[:, covered], expected, rtol=1e-9)
        np.testing.assert_allclose(np.corrcoef(average.series[:, covered].T), np.corrcoef(expected.T), atol=1e-6)
