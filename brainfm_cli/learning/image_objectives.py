"""Objectives and scores of reconstructed images, and agreement of two views: pure functions of tensors, in two or three dimensions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

_SMALLEST_VARIANCE = 0.0025  # of a cell of intensities in [0, 1]: flat cells must not rule the loss
_SIGMA, _WINDOW = 1.5, 11  # Wang et al. 2004


def masked_brain_loss(predicted: Tensor, target: Tensor, counted: Tensor, *, cell: int) -> Tensor:
    """Mean squared error of the counted pixels, each relative to the variance of its cell of ``cell`` pixels a side in the target.

    All are (batch, *pixels). The same as predicting cells normalised by their own mean and standard deviation (He et al. 2022), yet the
    prediction stays an intensity, which needs no statistics of what is hidden.
    """
    mean, square = (_cell_means(values, cell) for values in (target, target.square()))
    variance = (square - mean.square()).clamp_min(0) + _SMALLEST_VARIANCE
    error = (predicted - target).square() / _spread(variance, cell)
    return torch.where(counted, error, 0.0).sum() / counted.sum().clamp_min(1)


def _cell_means(images: Tensor, cell: int) -> Tensor:
    pool = functional.avg_pool2d if images.ndim == 3 else functional.avg_pool3d
    return pool(images[:, None], cell)[:, 0]


def _spread(values: Tensor, cell: int) -> Tensor:
    for axis in range(1, values.ndim):
        values = values.repeat_interleave(cell, dim=axis)
    return values


def ssim_map(first: Tensor, second: Tensor, *, data_range: float) -> Tensor:
    """(batch, *pixels) structural similarity of two images (Wang et al. 2004): Gaussian window of 11 pixels, SD 1.5, edges reflected."""
    place = torch.arange(_WINDOW, device=first.device, dtype=first.dtype) - _WINDOW // 2
    kernel = torch.exp(-0.5 * (place / _SIGMA).square())
    kernel = kernel / kernel.sum()
    stacked = torch.stack([first, second, first * first, second * second, first * second], dim=1)
    x, y, xx, yy, xy = _smooth(stacked, kernel).unbind(dim=1)
    low, high = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    covariance, variances = xy - x * y, xx - x * x + yy - y * y
    return (2 * x * y + low) * (2 * covariance + high) / ((x * x + y * y + low) * (variances + high))


def _smooth(stacked: Tensor, kernel: Tensor) -> Tensor:
    """(batch, channels, *pixels) smoothed along every axis."""
    dims, half = stacked.ndim - 2, len(kernel) // 2
    convolve = functional.conv2d if dims == 2 else functional.conv3d
    flat = stacked.flatten(0, 1)[:, None]
    flat = functional.pad(flat, (half, half) * dims, mode="reflect")
    for axis in range(dims):
        shape = [1] * (dims + 2)
        shape[2 + axis] = len(kernel)
        flat = convolve(flat, kernel.view(shape))
    return flat[:, 0].view(stacked.shape)


def mean_over(values: Tensor, counted: Tensor) -> Tensor:
    """(batch,) mean of (batch, *pixels) values over each item's counted pixels; NaN where none is counted."""
    flat, chosen = values.flatten(1), counted.flatten(1)
    return torch.where(chosen, flat, 0.0).sum(dim=1) / chosen.sum(dim=1)


def psnr(first: Tensor, second: Tensor, counted: Tensor, *, data_range: float) -> Tensor:
    """(batch,) peak signal-to-noise ratio over each item's counted pixels, decibels."""
    return 10 * torch.log10(data_range**2 / mean_over((first - second).square(), counted).clamp_min(1e-12))


def vicreg(first: Tensor, second: Tensor) -> Tensor:
    """Invariance, variance and covariance of two views' (batch, width) vectors (Bardes et al. 2022, weights 25, 25, 1, over 25): for small batches."""
    invariance = functional.mse_loss(first, second)
    batch, width = first.shape
    total = invariance
    for view in (first, second):
        centred = view - view.mean(dim=0)
        spread = (centred.square().sum(dim=0) / max(1, batch - 1) + 1e-4).sqrt()
        covariance = centred.T @ centred / max(1, batch - 1)
        off = covariance.square().sum() - covariance.diagonal().square().sum()
        total = total + 0.5 * functional.relu(1 - spread).mean() + 0.5 * off / width / 25
    return total


def dice_and_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One minus the soft Dice over the batch, mean over lesion classes that occur, and the cross-entropy.

    ``logits`` (batch, classes, *pixels), ``labels`` (batch, *pixels) int64. Over the batch, as most slices hold no lesion (nnU-Net's batch Dice).
    """
    chances = logits.float().softmax(dim=1)
    truth = functional.one_hot(labels, logits.shape[1]).movedim(-1, 1).to(chances.dtype)
    places = (0, *range(2, logits.ndim))
    common = (chances * truth).sum(dim=places)[1:]
    both = (chances.sum(dim=places) + truth.sum(dim=places))[1:]
    occurs = truth.sum(dim=places)[1:] > 0
    dice = (2 * common + 1) / (both + 1)
    loss = torch.where(occurs, 1 - dice, 0.0).sum() / occurs.sum().clamp_min(1)
    return loss, functional.cross_entropy(logits.float(), labels)
