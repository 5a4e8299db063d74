from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.signals.temporal import temporal_snr

AFFINE = np.diag([3.0, 3.0, 3.5, 1.0])


def write(folder: Path, data: np.ndarray, mask: np.ndarray, *, slope: float = 1.0, intercept: float = 0.0) -> tuple[Path, Path]:
    image = nib.Nifti1Image(data, AFFINE)
    image.header.set_slope_inter(slope, intercept)
    nib.save(image, folder / "bold.nii.gz")
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), AFFINE), folder / "mask.nii.gz")
    return folder / "bold.nii.gz", folder / "mask.nii.gz"


@pytest.mark.parametrize("first", [0, 3])
def test_against_numpy_with_large_means(first: int, tmp_path: Path, generator: np.random.Generator) -> None:
    data = (20_000 + generator.normal(0, 3, (5, 6, 4, 40))).astype(np.int16)
    data[..., :3] += 500  # frames before the steady state
    mask = generator.random((5, 6, 4)) > 0.4
    bold, path = write(tmp_path, data, mask)
    series = nib.load(bold).get_fdata()[mask][:, first:]
    tsnr, volume_ml = temporal_snr(bold, path, first=first)
    assert tsnr == pytest.approx(np.median(series.mean(axis=1) / series.std(axis=1, ddof=1)), rel=1e-12)
    assert volume_ml == pytest.approx(mask.sum() * 3 * 3 * 3.5 / 1000)


def test_the_scale_of_the_file_counts(tmp_path: Path, generator: np.random.Generator) -> None:
    data = generator.integers(0, 100, (4, 4, 4, 30)).astype(np.int16)
    mask = np.ones((4, 4, 4), bool)
    bold, path = write(tmp_path, data, mask, slope=0.5, intercept=1000.0)
    series = nib.load(bold).get_fdata()[mask]
    assert temporal_snr(bold, path)[0] == pytest.approx(np.median(series.mean(axis=1) / series.std(axis=1, ddof=1)))


def test_flat_voxels_are_left_out_and_a_flat_image_has_no_answer(tmp_path: Path, generator: np.random.Generator) -> None:
    data = np.full((4, 4, 4, 20), 7, np.int16)
    mask = np.ones((4, 4, 4), bool)
    assert np.isnan(temporal_snr(*write(tmp_path, data, mask))[0])
    data[0, 0, 0] = generator.integers(90, 110, 20)
    expected = data[0, 0, 0].mean() / data[0, 0, 0].std(ddof=1)
    assert temporal_snr(*write(tmp_path, data, mask))[0] == pytest.approx(expected)
    assert np.isnan(temporal_snr(*write(tmp_path, data, mask), first=19)[0]), "one frame has no deviation"


def test_a_truncated_series_is_refused(tmp_path: Path, generator: np.random.Generator) -> None:
    bold, mask = write(tmp_path, generator.integers(0, 100, (4, 4, 4, 30)).astype(np.int16), np.ones((4, 4, 4), bool))
    bold.write_bytes(bold.read_bytes()[:-100])
    with pytest.raises(InputDatasetError):
        temporal_snr(bold, mask)
