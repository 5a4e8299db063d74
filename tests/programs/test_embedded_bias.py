"""Bias field and tissue classes against planted truth, ITK's N4 and Atropos."""

from __future__ import annotations

import numpy as np
import pytest

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.programs.embedded import itk
from brainfm_cli.programs.embedded.bias import fit_bias
from brainfm_cli.programs.embedded.gates import dice
from brainfm_cli.programs.embedded.grids import coarser
from brainfm_cli.programs.embedded.mixture import tissue_probabilities
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
    import ants

    options = {"shrink_factor": 2, "convergence": {"iters": [20, 20], "tol": 1e-5}, "spline_param": 200.0, "return_bias_field": True}
    theirs = ants.n4_bias_field_correction(itk.to_itk(image, AFFINE), mask=itk.to_itk(inside, AFFINE), **options).numpy()
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


def test_tissues_are_found_in_noise_and_agree_with_atropos(generator: np.random.Generator) -> None:
    labels = tissues()
    inside = (labels > 0) & (labels < 4)
    image = t1w(labels, generator, noise=90.0)
    found = tissue_probabilities(image, inside)
    np.testing.assert_allclose(found.sum(0), inside, atol=1e-5)
    itk.prepare(1, 1)
    import ants

    theirs = ants.atropos(
        a=itk.to_itk(image, AFFINE), x=itk.to_itk(inside, AFFINE), i="kmeans[3]", m="[0.1,1x1x1]", c="[5,0]", priorweight=0
    )
    alone = np.digitize(image, [450, 825])  # what intensity says without neighbours
    for place, tissue in enumerate((1, 2, 3)):
        truth, mine = labels == tissue, (found.argmax(0) == place) & inside
        other = np.stack([one.numpy() for one in theirs["probabilityimages"]]).argmax(0) == place
        assert dice(mine, truth) > max(0.8, dice(other & inside, truth) - 0.02)
        if tissue == 3:  # a thin shell of CSF has no neighbours to lean on
            assert dice(mine, truth) > dice((alone == place) & inside, truth)


def test_classes_learned_from_a_coarser_copy_are_the_same(generator: np.random.Generator) -> None:
    affine = np.diag([1.5, 1.5, 1.5, 1.0])
    affine[:3, 3] = -72, -90, -72
    labels = tissues((96, 120, 96), affine)
    inside = (labels > 0) & (labels < 4)
    image = t1w(labels, generator, noise=60.0)
    slow = tissue_probabilities(image, inside).argmax(0)[inside]
    coarse = coarser(image, affine, 3.0)[0], coarser(inside, affine, 3.0)[0] > 0.5
    fast = tissue_probabilities(image, inside, learn_from=coarse).argmax(0)[inside]
    truth = labels[inside] - 1
    assert (slow == fast).mean() > 0.97
    assert (fast == truth).mean() > (slow == truth).mean() - 0.01


def test_one_intensity_is_no_tissue() -> None:
    with pytest.raises(InputDatasetError, match="one intensity"):
        tissue_probabilities(np.ones((5, 5, 5), np.float32), np.ones((5, 5, 5), bool))
