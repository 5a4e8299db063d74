"""Scores of reconstructed images against torchmetrics, and losses against their definitions."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

from brainfm_cli.learning.image_objectives import masked_brain_loss, mean_over, psnr, ssim_map, vicreg


@pytest.mark.parametrize("dims", [2, 3])
def test_similarity_is_that_of_torchmetrics(dims: int) -> None:
    torch.manual_seed(0)
    first = torch.rand(2, *(24,) * dims)
    second = (first + 0.2 * torch.randn_like(first)).clamp(0, 1)
    found = ssim_map(first, second, data_range=1.0)
    _, expected = structural_similarity_index_measure(second[:, None], first[:, None], data_range=1.0, return_full_image=True)
    assert torch.allclose(found, expected[:, 0], atol=2e-4)
    assert torch.allclose(ssim_map(first, first, data_range=1.0), torch.ones_like(first), atol=1e-4)


def test_peak_ratio_is_that_of_torchmetrics() -> None:
    torch.manual_seed(0)
    first, second = torch.rand(1, 16, 16), torch.rand(1, 16, 16)
    everything = torch.ones(1, 16, 16, dtype=torch.bool)
    assert torch.allclose(psnr(first, second, everything, data_range=1.0)[0], peak_signal_noise_ratio(second, first, data_range=1.0))
    some = everything.clone()
    some[:, 8:] = False
    changed = torch.where(some, second, 0.3)
    assert torch.equal(psnr(first, second, some, data_range=1.0), psnr(first, changed, some, data_range=1.0))
    assert math.isnan(float(mean_over(first, ~everything)))


def test_the_loss_is_that_of_normalised_cells() -> None:
    torch.manual_seed(0)
    target, predicted = torch.rand(2, 32, 32), torch.rand(2, 32, 32)
    counted = torch.zeros(2, 32, 32, dtype=torch.bool)
    counted[0, :16, 16:] = True
    cell, guess = target[0, :16, 16:], predicted[0, :16, 16:]
    scale = (cell.var(correction=0) + 0.0025).sqrt()
    normalised = (cell - cell.mean()) / scale
    expected = ((guess - cell.mean()) / scale - normalised).square().mean()
    assert torch.allclose(masked_brain_loss(predicted, target, counted, cell=16), expected)
    assert float(masked_brain_loss(predicted, target, torch.zeros_like(counted), cell=16)) == 0.0


def test_collapse_costs() -> None:
    torch.manual_seed(0)
    spread = torch.randn(64, 8)
    assert vicreg(spread, spread) < 0.1
    assert vicreg(torch.zeros(64, 8), torch.zeros(64, 8)) > 0.9
    one = spread[:, :1].expand(-1, 8)
    assert vicreg(one, one) > vicreg(spread, spread) + 0.1
    assert vicreg(spread, torch.randn(64, 8)) > 1.0
