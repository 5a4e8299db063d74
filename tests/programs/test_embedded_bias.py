"""The bias field against planted fields and against ITK's N4."""

from __future__ import annotations

import numpy as np
import pytest

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.programs.embedded import itk
from brainfm_cli.programs.embedded.bias import fit_bias
from tests.programs.heads import AFFINE, smooth_field, t1w, tissues


def spread(values: np.ndarray) -> float:
    return float(values.std() / values.mean())


def test_a_planted_field_is_found_beside_whatever_the_image_had(generator: np.random.Generator) -> None:
    labels = tissues()
    image, field = t1w(labels, generator), smooth_field(labels.shape)
    inside = (labels > 0) & (labels < 4)
    before, after = fit_bias(image, inside), fit_bias(image * field, inside)
    assert spread(field[inside]) > 0.1
    assert spread((after / before / field)[inside]) < 0.25 * spread(field[inside])
    assert spread((after / field)[inside]) < 0.3 * spread(field[inside])


def test_tissues_become_even(generator: np.random.Generator) -> None:
    labels = tissues()
    clean, field = t1w(labels, generator), smooth_field(labels.shape)
    inside = (labels > 0) & (labels < 4)
    mended = clean * field / fit_bias(clean * field, inside)
    for tissue in (2, 3):
        assert spread((clean * field)[labels == tissue]) > 2 * spread(clean[labels == tissue])
        assert spread(mended[labels == tissue]) < 1.1 * spread(clean[labels == tissue])


def test_agrees_with_itk(generator: np.random.Generator) -> None:
    labels = tissues()
    image = t1w(labels, generator) * smooth_field(labels.shape)
    inside = (labels > 0) & (labels < 4)
    itk.prepare(1, 1)
    theirs = itk.bias_field(image, inside, AFFINE, shrink=2, iterations=(20, 20))
    assert np.corrcoef(np.log(fit_bias(image, inside)[inside]), np.log(theirs[inside]))[0, 1] > 0.97


def test_the_field_stays_believable_outside_the_mask(generator: np.random.Generator) -> None:
    labels = tissues()
    inside = labels == 3
    field = fit_bias(t1w(labels, generator), inside)
    assert field[inside].min() / 1.05 <= field.min()
    assert field.max() <= field[inside].max() * 1.05


def test_an_empty_image_is_refused() -> None:
    with pytest.raises(InputDatasetError, match="above the background"):
        fit_bias(np.zeros((20, 20, 20), np.float32), np.ones((20, 20, 20), bool))
