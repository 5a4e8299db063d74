"""The masked MRI encoder as a system: views, losses, floors and scores."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from brainfm_cli.errors import SettingsError
from brainfm_cli.learning.reconstruction import inpaint, score_reconstruction, summarise
from brainfm_cli.learning.slice_samples import SliceBatch
from brainfm_cli.systems.mri_language import MriLanguageSettings
from brainfm_cli.systems.mri_language.augmentation import AugmentSettings, make_view
from brainfm_cli.systems.mri_language.encoder import fill_with_mean, spread_cells
from tests.systems.half_precision import assert_trains_in_half_precision

STILL = AugmentSettings(rotation_deg=0, scale=0, flip=0, gamma=0, contrast=0, bias_field=0, noise=0, blur=0)


def discs(batch: int, *, size: int = 64, dims: int = 2) -> torch.Tensor:
    """uint8 heads with a dark core and a bright spot on the left (low first axis)."""
    axes = torch.meshgrid(*(torch.linspace(-1, 1, size),) * dims, indexing="ij")
    radius = sum(axis.square() for axis in axes)
    image = 120.0 * (radius < 0.7) - 60 * (radius < 0.1)
    spot = sum((axis - centre).square() for axis, centre in zip(axes, (-0.5, 0.1, 0.0), strict=False)) < 0.04
    image[spot] = 250
    steps = torch.linspace(0.7, 1.0, batch).view(-1, *(1,) * dims)
    return (image * steps).to(torch.uint8)


def batch(count: int = 8, *, dims: int = 2, size: int = 64) -> SliceBatch:
    return SliceBatch(
        images=discs(count, dims=dims, size=size),
        sequence=torch.zeros(count, dtype=torch.int64),
        plane=torch.zeros(count, dtype=torch.int64),
        z_mm=torch.zeros(count),
        participant=torch.arange(count),
        keys=torch.arange(count) * 7_919 + 11,
    )


def settings(**changes: object) -> MriLanguageSettings:
    return MriLanguageSettings.from_values({"kind": "mri-language", "preset": "nano", **changes})


def test_still_views_are_the_slices() -> None:
    images = discs(4)
    view = make_view(images, torch.zeros(4, dtype=torch.int64), torch.arange(4), STILL, view=0)
    assert torch.allclose(view.clean, images.float() / 255, atol=1e-5)
    assert torch.allclose(view.seen, view.clean, atol=1e-4)
    assert torch.equal(view.brain, images > 0)


def side(images: torch.Tensor) -> torch.Tensor:
    """(batch,) mean place of the brightest pixels along the first axis, -1 (left) to 1 (right)."""
    bright = images > 0.85 * images.flatten(1).amax(1).view(-1, *(1,) * (images.ndim - 1))
    place = torch.linspace(-1, 1, images.shape[1]).view(1, -1, *(1,) * (images.ndim - 2))
    return (bright * place).flatten(1).sum(1) / bright.flatten(1).sum(1)


@pytest.mark.parametrize("dims", [2, 3])
def test_both_views_have_the_same_flip_and_sagittal_slices_none(dims: int) -> None:
    images, keys = discs(32, dims=dims, size=32), torch.arange(32)
    plane = torch.zeros(32, dtype=torch.int64)
    first, second = (make_view(images, plane, keys, AugmentSettings(blur=0, noise=0), view=number) for number in range(2))
    signs = [torch.sign(side(view.clean)) for view in (first, second)]
    assert torch.equal(*signs)
    assert 5 < int((signs[0] > 0).sum()) < 27  # about half of them
    assert not torch.allclose(first.clean, second.clean)
    none = make_view(images, plane, keys, AugmentSettings(flip=0), view=0)
    assert (side(none.clean) < 0).all()
    sagittal = make_view(images, plane + 2, keys, AugmentSettings(flip=1), view=0)
    assert (side(sagittal.clean) < 0).all()
    all_flipped = make_view(images, plane, keys, AugmentSettings(flip=1), view=0)
    assert (side(all_flipped.clean) > 0).all()


def test_the_seen_image_differs_and_the_target_is_clean() -> None:
    images = discs(8)
    lit = AugmentSettings(rotation_deg=0, scale=0, flip=0)
    view = make_view(images, torch.zeros(8, dtype=torch.int64), torch.arange(8), lit, view=0)
    assert torch.allclose(view.clean, images.float() / 255, atol=1e-5)
    assert ((view.seen - view.clean).abs().flatten(1).amax(1) > 0.02).all()
    assert view.seen[~view.brain].abs().max() == 0
    assert 0 <= view.seen.min() <= view.seen.max() <= 1


def test_a_turn_keeps_what_is_turned() -> None:
    images = discs(16)
    turned = make_view(
        images, torch.zeros(16, dtype=torch.int64), torch.arange(16), AugmentSettings(scale=0, flip=0, gamma=0, rotation_deg=90), view=0
    )
    assert torch.allclose(turned.clean.flatten(1).mean(1), (images.float() / 255).flatten(1).mean(1), rtol=0.03)
    assert side(turned.clean).std() > 0.1


@pytest.mark.parametrize(("contrast", "dims"), [("infonce", 2), ("vicreg", 2), ("none", 2), ("infonce", 3)])
def test_losses_fall_and_repeat(contrast: str, dims: int) -> None:
    torch.manual_seed(0)
    system = settings(contrast=contrast, dims=dims).build()
    given = batch(4, dims=dims, size=64 if dims == 2 else 32)
    optimiser = torch.optim.AdamW(system.module.parameters(), lr=3e-3)
    values = []
    for _ in range(15 if dims == 2 else 8):
        terms = system.losses(given, epoch=0.0)
        loss = sum(system.loss_weights[name] * value for name, value in terms.items() if not name.startswith("monitor_"))
        optimiser.zero_grad()
        loss.backward()  # type: ignore[union-attr]
        optimiser.step()
        values.append(float(terms["patch"].detach()))
    assert values[-1] < 0.7 * values[0]
    assert ("contrast" in terms) == (contrast != "none")
    assert "ssim" in terms
    with torch.no_grad():
        again = system.losses(given, epoch=0.0), system.losses(given, epoch=3.0)
    assert {name: float(value) for name, value in again[0].items()} == {name: float(value) for name, value in again[1].items()}


def test_the_masked_share_lies_between_the_bounds() -> None:
    system = settings(mask_low=0.5, mask_high=0.75).build()
    ratios = {system.mask_ratio(torch.tensor([key, 0])) for key in range(50)}
    assert 0.5 <= min(ratios) < 0.55 < 0.7 < max(ratios) <= 0.75
    with pytest.raises(SettingsError, match="mask_low"):
        settings(mask_low=0.8, mask_high=0.6)


def test_floors_and_scores_against_what_is_known() -> None:
    ramp = torch.linspace(0.2, 0.8, 32).repeat(1, 32, 1)
    brain = torch.ones(1, 32, 32, dtype=torch.bool)
    hidden = torch.zeros_like(brain)
    hidden[:, 8:24, 8:24] = True
    assert torch.allclose(inpaint(ramp, hidden, brain), ramp, atol=1e-3)  # a plane is harmonic
    filled = fill_with_mean(ramp, hidden, brain)
    assert torch.allclose(filled[hidden], ramp[~hidden].mean())
    assert torch.equal(filled[~hidden], ramp[~hidden])
    scores = score_reconstruction({"model": ramp, "mean fill": filled}, ramp, hidden, brain)
    assert float(scores["model"]["ssim_hidden"]) == pytest.approx(1, abs=1e-3)
    expected = 10 * np.log10(1 / float((filled - ramp)[hidden].square().mean()))
    assert float(scores["mean fill"]["psnr_hidden"]) == pytest.approx(expected, rel=1e-4)
    assert float(scores["mean fill"]["psnr_whole"]) > float(scores["mean fill"]["psnr_hidden"])  # pasted pixels inflate
    outside = score_reconstruction({"model": ramp}, ramp, hidden, ~hidden)
    assert np.isnan(float(outside["model"]["ssim_hidden"]))
    assert spread_cells(torch.tensor([[[True, False]]])).sum() == 256


def test_intervals_are_over_patients_not_slices() -> None:
    rng = np.random.default_rng(0)
    people = np.repeat([f"p{n}" for n in range(20)], 50)
    level = np.repeat(rng.normal(0.5, 0.1, 20), 50)
    methods = ("model", "mean fill", "inpainting")
    shift = dict(zip(methods, (0.2, 0.0, 0.1), strict=True))
    columns = {f"{m}/{s}": level + shift[m] for m in methods for s in ("ssim_hidden", "psnr_hidden", "ssim_whole", "psnr_whole")}
    table = summarise(pd.DataFrame({"participant": people, **columns}), seed=1, methods=methods)
    row = table[(table["score"] == "SSIM, hidden brain") & (table["method"] == "model")].iloc[0]
    assert row["patients"] == 20
    assert row["high"] - row["low"] == pytest.approx(2 * 1.96 * 0.1 / np.sqrt(20), rel=0.4)
    difference = table[(table["score"] == "SSIM, hidden brain") & (table["method"] == "model less inpainting")].iloc[0]
    assert (difference["low"], difference["high"]) == pytest.approx((0.1, 0.1))


def test_half_precision_trains() -> None:
    torch.manual_seed(0)
    assert_trains_in_half_precision(settings().build(), batch(4))
