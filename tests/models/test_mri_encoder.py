"""The masked MRI encoder: sizes, no leak of hidden pixels, reconstruction, both numbers of dimensions and all backbones."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from brainfm_cli.models.mri_encoder import (
    Context,
    MriAutoencoder,
    MriEncoder,
    choose_hidden_cells,
    from_cells,
    to_cells,
)
from brainfm_cli.systems.mri_language.presets import PRESETS

NANO = PRESETS["nano"]


def context(batch: int) -> Context:
    return Context(sequence=torch.arange(batch) % 8, plane=torch.arange(batch) % 3, z_mm=torch.linspace(-60, 70, batch))


def hide(batch: int, dims: int, ratio: float = 0.6, cells: int = 4) -> torch.Tensor:
    scores = torch.rand(batch, *(cells,) * dims)
    return choose_hidden_cells(scores, torch.rand_like(scores) > 0.4, ratio)


@pytest.mark.parametrize(
    ("preset", "encoder_m", "whole_m"),
    [("nano", 0.17, 0.27), ("tiny", 3.0, 3.6), ("small", 22.6, 24.7), ("base", 90.6, 98.9), ("large", 314, 341)],
)
def test_presets_have_the_sizes_of_the_table(preset: str, encoder_m: float, whole_m: float) -> None:
    with torch.device("meta"):
        model = MriAutoencoder(PRESETS[preset])
    encoder = sum(parameter.numel() for parameter in model.encoder.parameters()) / 1e6
    whole = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    assert encoder == pytest.approx(encoder_m, rel=0.01 if preset != "nano" else 0.03)
    assert whole == pytest.approx(whole_m, rel=0.01 if preset != "nano" else 0.05)


@pytest.mark.parametrize("backbone", ["hybrid", "convnext", "transformer"])
@pytest.mark.parametrize("dims", [2, 3])
def test_hidden_pixels_never_reach_visible_features(backbone: str, dims: int) -> None:
    torch.manual_seed(0)
    shape = dataclasses.replace(NANO, dims=dims, backbone=backbone, widths=(8, 16, 32))
    model = MriAutoencoder(shape)
    for parameter in model.parameters():  # response normalisation starts at zero: let it do something
        torch.nn.init.normal_(parameter, std=0.1)
    side = 64 if dims == 2 else 48
    images = torch.rand(3, *(side,) * dims)
    hidden = hide(3, dims, cells=side // 16)
    altered = torch.where(spread(hidden), torch.rand_like(images) * 5 - 2, images)
    assert (altered != images).any()
    first, one = model.reconstruct(images, context(3), hidden)
    second, other = model.reconstruct(altered, context(3), hidden)
    assert (first - second).abs().max() == 0.0
    assert (one.summary - other.summary).abs().max() == 0.0
    assert (one.tokens - other.tokens).abs().max() == 0.0
    if one.fine is not None and other.fine is not None:
        assert (one.fine - other.fine).abs().max() == 0.0
    seen = torch.where(spread(hidden), images, torch.rand_like(images))
    third, _ = model.reconstruct(seen, context(3), hidden)
    assert (first - third).abs().max() > 0  # what is visible does


def spread(hidden: torch.Tensor) -> torch.Tensor:
    for axis in range(1, hidden.ndim):
        hidden = hidden.repeat_interleave(16, dim=axis)
    return hidden


@pytest.mark.parametrize("dims", [2, 3])
def test_cells_are_cut_and_joined_in_order(dims: int) -> None:
    images = torch.rand(2, *(48,) * dims)
    grid = (3,) * dims
    cells = to_cells(images)
    assert torch.equal(from_cells(cells, grid), images)
    if dims == 2:
        assert torch.equal(cells[1, 5].view(16, 16), images[1, 16:32, 32:48])


def test_as_many_cells_are_hidden_in_every_item_and_in_brain_as_outside() -> None:
    torch.manual_seed(0)
    brain = torch.zeros(200, 16, 16, dtype=torch.bool)
    for item in range(200):
        brain[item, : 1 + item % 15] = True
    hidden = choose_hidden_cells(torch.rand(200, 16, 16), brain, 0.7)
    assert set(hidden.flatten(1).sum(1).tolist()) == {round(0.7 * 256)}
    inside = (hidden & brain).flatten(1).sum(1) / brain.flatten(1).sum(1)
    assert (inside - 0.7).abs().max() < 0.06
    assert 0.6 < hidden.float().mean(0).min() < hidden.float().mean(0).max() < 0.8  # no place is preferred


def test_everything_visible_equals_no_mask() -> None:
    torch.manual_seed(0)
    model = MriEncoder(NANO)
    images = torch.rand(2, 64, 64)
    none = model(images, context(2))
    empty = model(images, context(2), torch.zeros(2, 4, 4, dtype=torch.bool))
    assert torch.allclose(none.summary, empty.summary, atol=1e-6)
    assert none.token_map().shape == (2, 64, 4, 4)
    assert torch.equal(none.token_map()[:, :, 1, 2], none.tokens[:, 6])


def test_any_size_that_sixteen_divides() -> None:
    model = MriEncoder(NANO)
    assert model(torch.rand(1, 96, 64), context(1)).token_map().shape == (1, 64, 6, 4)


@pytest.mark.parametrize("backbone", ["hybrid", "convnext", "transformer"])
def test_one_batch_is_learnt(backbone: str) -> None:
    torch.manual_seed(0)
    model = MriAutoencoder(dataclasses.replace(NANO, backbone=backbone))
    images = torch.rand(4, 4, 4).repeat_interleave(16, 1).repeat_interleave(16, 2)
    hidden = hide(4, 2)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        predicted, _ = model.reconstruct(images, context(4), hidden)
        loss = (predicted - images)[spread(hidden)].square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.15 * losses[0]


def test_backbones_have_near_equal_sizes() -> None:
    sizes = {}
    for backbone in ("hybrid", "convnext"):
        with torch.device("meta"):
            model = MriEncoder(dataclasses.replace(PRESETS["tiny"], backbone=backbone))
        sizes[backbone] = sum(parameter.numel() for parameter in model.parameters())
    assert sizes["convnext"] == pytest.approx(sizes["hybrid"], rel=0.05)
