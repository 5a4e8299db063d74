"""Segmentation scores against MONAI, closed forms and counts by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.segmentation import LesionCounts, count_lesions, score_masks

GOLDEN = json.loads((Path(__file__).parent / "golden" / "scores.json").read_text())["masks"]
CUBIC = {"voxel_mm": (1.0, 1.0, 1.0), "tolerance_mm": 1.0}


def balls(centres, radii):
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in (24, 20, 16)), indexing="ij"), axis=-1)
    return np.any([np.sum((grid - np.array(centre)) ** 2, axis=-1) <= radius**2 for centre, radius in zip(centres, radii, strict=True)], axis=0)  # fmt: skip


def box(*corners, shape=(20, 20, 20)):
    mask = np.zeros(shape, bool)
    for low, high in corners:
        mask[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = True
    return mask


@pytest.mark.parametrize("case", GOLDEN)
def test_scores_are_those_of_monai(case):
    found = score_masks(balls(*case["predicted"]), balls(*case["observed"]), voxel_mm=case["voxel_mm"], tolerance_mm=case["tolerance_mm"])
    for name in ("dice", "hd95", "nsd"):
        assert found[name].value == pytest.approx(case[name], abs=1e-5), name


def test_a_shifted_cube_is_its_closed_form():
    """A cube of side 6 moved by 2 along one axis: Dice 4/6; opposite faces are 2 mm apart and the overlap of the sides 0."""
    one, other = box(((4, 4, 4), (10, 10, 10))), box(((6, 4, 4), (12, 10, 10)))
    found = score_masks(one, other, voxel_mm=(1.0, 1.0, 1.0), tolerance_mm=1.9)
    assert found["dice"].value == pytest.approx(4 / 6)
    assert found["hd95"].value == pytest.approx(2.0)
    # Of 6³ − 4³ = 152 surface voxels, near are those within 1.9 mm of the other surface: counted on the cube by hand below.
    surface = [(x, y, z) for x in range(6) for y in range(6) for z in range(6) if {0, 5} & {x, y, z}]
    moved = {(x + 2, y, z) for x, y, z in surface}
    near = sum(min(np.hypot(np.hypot(x - a, y - b), z - c) for a, b, c in moved) <= 1.9 for x, y, z in surface)
    assert found["nsd"].value == pytest.approx(near / len(surface))  # by symmetry the other way round too
    assert 0 < near < len(surface)
    stretched = score_masks(one, other, voxel_mm=(3.0, 1.0, 1.0), tolerance_mm=1.9)
    assert stretched["hd95"].value > found["hd95"].value
    assert stretched["dice"] == found["dice"]


def test_equal_masks_are_perfect_also_at_the_edge_of_the_volume():
    mask = box(((0, 0, 0), (5, 20, 20)))
    found = score_masks(mask, mask, **CUBIC)
    assert {name: one.value for name, one in found.items()} == {"dice": 1.0, "hd95": 0.0, "nsd": 1.0, "lesion_f1": 1.0}


@pytest.mark.parametrize(
    ("predicted", "observed", "expected", "reasons"),
    [
        (False, False, {"dice": None, "hd95": None, "nsd": None, "lesion_f1": None}, "neither mask"),
        (True, False, {"dice": 0.0, "hd95": None, "nsd": 0.0, "lesion_f1": 0.0}, "the true mask is empty"),
        (False, True, {"dice": 0.0, "hd95": None, "nsd": 0.0, "lesion_f1": 0.0}, "the predicted mask is empty"),
    ],
)
def test_empty_masks_have_reasons(predicted, observed, expected, reasons):
    lesion = box(((4, 4, 4), (8, 8, 8)))
    found = score_masks(lesion & predicted, lesion & observed, **CUBIC)
    assert {name: one.value for name, one in found.items()} == expected
    assert all(reasons in one.reason for one in found.values() if one.value is None)


def test_lesions_are_counted_by_hand():
    observed = box(((1, 1, 1), (4, 4, 4)), ((8, 8, 8), (10, 10, 10)), ((14, 1, 1), (16, 3, 3)))
    predicted = box(((3, 3, 3), (5, 5, 5)), ((15, 2, 2), (17, 4, 4)), ((1, 15, 15), (3, 17, 17)), ((17, 17, 17), (18, 18, 18)))
    counts = count_lesions(predicted, observed)
    assert counts == LesionCounts(found=2, missed=1, invented=2)
    assert counts.f1.value == pytest.approx(4 / 7)
    corner = box(((1, 1, 1), (3, 3, 3)), ((3, 3, 3), (5, 5, 5)))  # two cubes that share a corner are one lesion
    assert count_lesions(corner, corner) == LesionCounts(found=1, missed=0, invented=0)


@pytest.mark.parametrize(
    ("predicted", "observed", "voxel_mm", "match"),
    [
        (np.ones((4, 4, 4), bool), np.ones((4, 4, 5), bool), (1, 1, 1), "masks of"),
        (np.ones((4, 4, 4), bool), np.ones((4, 4, 4), bool), (1, 1), "2 voxel sizes"),
        (np.ones((4, 4, 4)), np.ones((4, 4, 4), bool), (1, 1, 1), "not true or false"),
    ],
)
def test_masks_that_cannot_be_compared_are_named_errors(predicted, observed, voxel_mm, match):
    with pytest.raises(InputDatasetError, match=match) as caught:
        score_masks(predicted, observed, voxel_mm=voxel_mm, tolerance_mm=1.0)
    assert caught.value.fix
