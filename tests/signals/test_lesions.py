"""Facts of lesion masks: planted spheres in both orders on disk, regions, signals, refusals."""

from __future__ import annotations

import numpy as np
import pytest

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.signals.lesions import lesion_facts

SHAPE = (40, 44, 30)
RAS = np.array([[2.0, 0, 0, -39], [0, 2.0, 0, -43], [0, 0, 3.0, -40], [0, 0, 0, 1]])
LAS = np.array([[-2.0, 0, 0, 39], [0, 2.0, 0, -43], [0, 0, 3.0, -40], [0, 0, 0, 1]])
ORDERS = pytest.mark.parametrize("affine", [RAS, LAS], ids=["RAS", "LAS"])


def ball(affine: np.ndarray, centre: tuple[float, float, float], radius: float) -> np.ndarray:
    """Voxels whose centres lie within ``radius`` mm of a place in the world."""
    grid = np.stack(np.meshgrid(*map(np.arange, SHAPE), indexing="ij"), axis=-1) @ affine[:3, :3].T + affine[:3, 3]
    return (((grid - centre) ** 2).sum(axis=-1) <= radius**2).astype(np.uint8)


@ORDERS
@pytest.mark.parametrize(("x", "side"), [(-22.0, "left"), (22.0, "right")])
def test_a_planted_ball_is_described(affine: np.ndarray, x: float, side: str) -> None:
    found = lesion_facts(ball(affine, (x, 5.0, 8.0), 12.0), affine)
    assert found.side == side
    assert found.volume_ml == pytest.approx(4 / 3 * np.pi * 12**3 / 1000, rel=0.05)
    assert found.parts == 1
    np.testing.assert_allclose(found.centre_mm, (x, 5.0, 8.0), atol=0.5)
    np.testing.assert_allclose(found.extent_mm, (24, 24, 24), atol=3)
    assert found.longest_mm == max(found.extent_mm)  # type: ignore[arg-type]


@ORDERS
def test_both_sides_and_parts(affine: np.ndarray) -> None:
    mask = ball(affine, (-20, 0, 0), 8.0) | 3 * ball(affine, (24, 0, 0), 6.0)
    found = lesion_facts(mask, affine)
    assert (found.side, found.parts) == ("both", 2)
    assert found.left_share == pytest.approx((ball(affine, (-20, 0, 0), 8.0).sum()) / (mask > 0).sum())
    # seen from a midline that lies to its left, everything is right
    assert lesion_facts(mask, affine, midline_mm=-35.0).side == "right"


@ORDERS
def test_regions_are_shares_of_the_volume(affine: np.ndarray) -> None:
    x = np.arange(SHAPE[0]) * affine[0, 0] + affine[0, 3]
    labels = np.where(x < -10, 1, np.where(x < 10, 2, 0))[:, None, None] * np.ones(SHAPE, int)
    mask = ball(affine, (-6, 0, 0), 10.0)
    found = lesion_facts(mask, affine, labels=labels, names={1: "lateral", 2: "medial"})
    shares = dict(found.regions)
    assert shares["lateral"] == pytest.approx(mask[x < -10].sum() / mask.sum())
    assert sum(shares.values()) == pytest.approx(1.0)
    assert lesion_facts(mask, affine, labels=labels).regions[0][0] == "region 2"


@ORDERS
def test_signals_are_against_the_other_hemisphere(affine: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    mask = ball(affine, (-20, 0, 0), 9.0)
    images = {name: rng.normal(100, 5, SHAPE) + height * mask for name, height in (("FLAIR", 30.0), ("T1w", -30.0), ("T2w", 1.0))}
    assert dict(lesion_facts(mask, affine, images=images).signals) == {"FLAIR": "hyperintense", "T1w": "hypointense", "T2w": "isointense"}


def test_no_lesion_is_no_error_and_other_grids_are() -> None:
    empty = np.zeros(SHAPE, np.uint8)
    assert lesion_facts(empty, RAS).volume_ml == 0
    assert lesion_facts(empty, RAS).side is None
    with pytest.raises(InputDatasetError, match=r"the atlas has the grid \(3, 3, 3\)"):
        lesion_facts(empty, RAS, labels=np.zeros((3, 3, 3), int))
    with pytest.raises(InputDatasetError, match="FLAIR has the grid"):
        lesion_facts(empty, RAS, images={"FLAIR": np.zeros((3, 3, 3))})
    with pytest.raises(InputDatasetError, match="three dimensions"):
        lesion_facts(np.zeros((3, 3)), RAS)
