"""Maps against masks, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from brainfm_cli.learning.localisation import localise, random_agreement

HEAD = np.zeros((6, 6, 6), bool)
HEAD[1:5, 1:5, 1:5] = True
MASK = np.zeros_like(HEAD)
MASK[1:3, 1:3, 1:3] = True


def test_a_flat_map_has_the_energy_of_chance_and_a_perfect_one_all() -> None:
    flat = localise(np.ones(HEAD.shape), MASK, HEAD)
    assert flat.energy == pytest.approx(8 / 64)
    assert flat.gain == pytest.approx(1)
    perfect = localise(MASK.astype(float), MASK, HEAD)
    assert (perfect.energy, perfect.pointing, perfect.gain) == (1.0, True, pytest.approx(8))
    wrong = localise((HEAD & ~MASK).astype(float), MASK, HEAD)
    assert (wrong.energy, wrong.pointing) == (0.0, False)
    half = localise(np.where(MASK, 3.0, 1.0), MASK, HEAD)
    assert half.energy == pytest.approx(24 / (24 + 56))
    assert half.top_iou == pytest.approx(1.0 if (np.quantile(np.where(MASK, 3.0, 1.0)[HEAD], 0.85) > 1) else 8 / 64)


def test_outside_the_head_nothing_counts_and_nothing_is_no_number() -> None:
    values = np.ones(HEAD.shape)
    values[~HEAD] = 1e6
    assert localise(values, MASK, HEAD).energy == pytest.approx(8 / 64)
    empty = localise(np.zeros(HEAD.shape), MASK, HEAD)
    assert (empty.energy, empty.pointing, empty.gain) == (None, None, None)


def test_agreement_with_a_random_map() -> None:
    rng = np.random.default_rng(0)
    values = rng.random(HEAD.shape)
    assert random_agreement(values, values**2, HEAD) == pytest.approx(1)
    assert abs(random_agreement(values, rng.random(HEAD.shape), HEAD) or 0) < 0.35
    assert random_agreement(values, np.zeros(HEAD.shape), HEAD) is None
