"""Single-trial maps: what is written is read back in the stored order, and what does not fit together is named."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainfm_cli.bids.images import sidecar
from brainfm_cli.bids.trials import TrialRun, find_trials, holds_trials, write_trials
from brainfm_cli.config import Selection
from brainfm_cli.errors import InputDatasetError, InputNotFoundError
from brainfm_cli.records import RunKey
from brainfm_cli.signals.trial_maps import read_mask, read_responses, read_table, same_voxels

AFFINE = np.array([[-2.0, 0, 0, 30], [0, 2, 0, -40], [0, 0, 2.5, 0], [0, 0, 0, 1]])


@pytest.fixture
def mask(generator: np.random.Generator) -> np.ndarray:
    return generator.random((6, 5, 4)) > 0.5


@pytest.fixture
def responses(mask: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    return generator.standard_normal((7, mask.sum())).astype(np.float32)


@pytest.fixture
def run(tmp_path: Path, mask: np.ndarray, responses: np.ndarray) -> TrialRun:
    write(tmp_path, mask, responses)
    (found,) = find_trials(tmp_path, "01", Selection())
    return found


def write(root: Path, mask: np.ndarray, responses: np.ndarray, *, run: str = "1", label: str = "visual") -> None:
    table = pd.DataFrame({"stim_id": [f"s{number}" for number in range(len(responses))]})
    write_trials(
        root, RunKey(participant="01", task="view", run=run), "T1w", iter(responses), table, mask, AFFINE, facts={}, mask_label=label
    )


def test_responses_come_back_in_the_stored_order(run: TrialRun, mask: np.ndarray, responses: np.ndarray) -> None:
    voxels = read_mask(run)
    found = np.stack(list(read_responses(run, voxels)))
    flat = np.flatnonzero(mask)
    np.testing.assert_array_equal(found, responses[:, np.searchsorted(flat, voxels.order)])
    assert sorted(voxels.order) == flat.tolist()
    places = voxels.space("01", "T1w").places_mm
    np.testing.assert_allclose(places[0], (AFFINE @ [*np.unravel_index(voxels.order[0], mask.shape), 1])[:3])
    assert len(read_table(run, 7)) == 7


def test_neighbours_in_the_order_are_neighbours_in_the_brain(tmp_path: Path) -> None:
    write(tmp_path, np.ones((8, 8, 8), bool), np.zeros((2, 512), np.float32))
    (run,) = find_trials(tmp_path, "01", Selection())
    places = read_mask(run).space("01", "T1w").places_mm.reshape(-1, 16, 3)
    spread = np.linalg.norm(places - places.mean(1, keepdims=True), axis=2).mean()
    rows = np.argwhere(np.ones((8, 8, 8))) @ AFFINE[:3, :3].T
    plain = np.linalg.norm(rows.reshape(-1, 16, 3) - rows.reshape(-1, 16, 3).mean(1, keepdims=True), axis=2).mean()
    assert spread < 0.6 * plain


def test_regions_come_first(run: TrialRun, mask: np.ndarray) -> None:
    labels = np.where(np.arange(6)[:, None, None] < 3, 2, 1) * np.ones(mask.shape)
    nib.save(nib.Nifti1Image(labels.astype(np.uint8), AFFINE), run.mask.with_name(run.mask.name.replace("mask", "dseg")))
    (found,) = find_trials(run.image.parents[2], "01", Selection())
    voxels = read_mask(found)
    assert list(voxels.regions) == sorted(voxels.regions)
    assert {"1", "2"} == set(voxels.regions)
    assert not np.array_equal(voxels.order, read_mask(run).order)


def as_integers(run: TrialRun, scale: float | None) -> None:
    image = nib.load(run.image)
    values = np.rint(image.get_fdata() * 300).astype(np.int16)
    nib.save(nib.Nifti1Image(values, image.affine), run.image)
    path = sidecar(run.image)
    path.write_text(json.dumps(json.loads(path.read_text()) | ({} if scale is None else {"Scale": scale})))


def test_integers_need_their_scale(run: TrialRun, mask: np.ndarray, responses: np.ndarray) -> None:
    as_integers(run, None)
    voxels = read_mask(run)
    with pytest.raises(InputDatasetError, match="int16 without a scale"):
        list(read_responses(run, voxels))
    as_integers(run, None)
    path = sidecar(run.image)
    path.write_text(json.dumps({"Scale": -1}))
    with pytest.raises(InputDatasetError, match="Scale is -1"):
        list(read_responses(run, voxels))


def test_the_scale_is_applied(run: TrialRun, responses: np.ndarray, mask: np.ndarray) -> None:
    as_integers(run, 1 / 300)
    voxels = read_mask(run)
    found = np.stack(list(read_responses(run, voxels)))
    np.testing.assert_allclose(found, responses[:, np.searchsorted(np.flatnonzero(mask), voxels.order)], atol=1 / 500)


def test_what_does_not_fit_is_named(run: TrialRun, mask: np.ndarray, tmp_path: Path) -> None:
    with pytest.raises(InputDatasetError, match=r"7 rows and the map .* 9 volumes"):
        read_table(run, 9)
    moved = AFFINE.copy()
    moved[0, 3] += 2
    voxels = read_mask(run)
    nib.save(nib.Nifti1Image(mask.astype(np.uint8), moved), run.mask)
    other = read_mask(run)
    with pytest.raises(InputDatasetError, match="another grid"):
        list(read_responses(run, other))
    with pytest.raises(InputDatasetError, match="mask differs"):
        same_voxels(voxels, other)
    nib.save(nib.Nifti1Image(np.zeros(mask.shape, np.uint8), AFFINE), run.mask)
    with pytest.raises(InputDatasetError, match="holds no voxel"):
        read_mask(run)


def test_voxels_without_a_number_are_refused(run: TrialRun, mask: np.ndarray) -> None:
    image = nib.load(run.image)
    data = image.get_fdata().astype(np.float32)
    data[tuple(np.argwhere(mask)[2])] = np.nan
    nib.save(nib.Nifti1Image(data, image.affine), run.image)
    with pytest.raises(InputDatasetError, match="1 voxels of the mask have no number in volume 0"):
        list(read_responses(run, read_mask(run)))


def test_files_that_are_missing_or_many(run: TrialRun, tmp_path: Path, mask: np.ndarray, responses: np.ndarray) -> None:
    assert holds_trials(tmp_path)
    write(tmp_path, mask, responses, label="other")
    with pytest.raises(InputDatasetError, match="several masks"):
        find_trials(tmp_path, "01", Selection())
    (found,) = find_trials(tmp_path, "01", Selection(), mask="visual")
    assert "desc-visual" in found.mask.name
    found.table.unlink()
    with pytest.raises(InputNotFoundError, match="0 tables of trials"):
        find_trials(tmp_path, "01", Selection(), mask="visual")
    found.image.unlink()
    with pytest.raises(InputNotFoundError, match="no single-trial maps"):
        find_trials(tmp_path, "01", Selection(), mask="visual")
