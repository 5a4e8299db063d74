"""The series encoder: what it must not depend on, what it must depend on, and that it learns."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brainfm_cli.models.series_encoder import (
    Patches,
    SeriesModel,
    SeriesShape,
    choose_hidden_patches,
    cut_patches,
    log_spectrum,
    masked_patch_loss,
    masked_spectrum_loss,
    place_regions,
    time_code,
)

TINY = SeriesShape(width=64, num_heads=4, feedforward=128, num_layers=2, patch_frames=10)


@pytest.fixture
def model() -> SeriesModel:
    torch.manual_seed(0)
    return SeriesModel(TINY).eval()


def batch(regions: int = 6, frames: int = 60, items: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(items, frames, regions), place_regions(40 * torch.randn(regions, 3))


def cut(series: torch.Tensor, places: torch.Tensor, frames: list[int] | None = None) -> Patches:
    lengths = torch.tensor(frames or [series.shape[1]] * len(series))
    return cut_patches(series, lengths, places, patch_frames=10, repetition_time_s=2.0)


def test_patches_hold_the_frames_they_name() -> None:
    series, places = batch()
    patches = cut(series, places, [60, 35, 60])
    torch.testing.assert_close(patches.values[0, 2, 1], series[0, 10:20, 2])
    assert patches.usable[1].sum(dim=1).tolist() == [3] * 6  # 35 frames hold three whole patches of ten
    torch.testing.assert_close(patches.seconds, torch.arange(6) * 20.0 + 10.0)


def test_summary_is_repeatable_and_ignores_the_order_of_regions(model: SeriesModel) -> None:
    series, places = batch()
    first = model.encoder(cut(series, places)).summary
    assert torch.equal(first, model.encoder(cut(series, places)).summary)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    torch.testing.assert_close(model.encoder(cut(series[:, :, order], places[order])).summary, first, atol=1e-5, rtol=1e-5)
    elsewhere = model.encoder(cut(series[:, :, order], places)).summary
    assert (elsewhere - first).abs().max() > 1e-3  # another region with the same series is another brain


def test_padding_and_absent_regions_change_nothing(model: SeriesModel) -> None:
    series, places = batch()
    short = model.encoder(cut(series[:1, :40], places)).summary
    padded = series.clone()
    padded[0, 40:] = 7.0
    torch.testing.assert_close(model.encoder(cut(padded, places, [40, 60, 60])).summary[:1], short, atol=1e-5, rtol=1e-5)
    without = model.encoder(cut(series[:, :, :5], places[:5])).summary
    absent = series.clone()
    absent[:, :, 5] = torch.nan
    torch.testing.assert_close(model.encoder(cut(absent, places)).summary, without, atol=1e-5, rtol=1e-5)


def test_hidden_patches_do_not_leak(model: SeriesModel) -> None:
    series, places = batch()
    patches = cut(series, places)
    hidden = choose_hidden_patches(patches.usable, torch.rand(patches.usable.shape), ratio=0.75, masking="random")
    changed = Patches(
        values=torch.where(hidden[..., None], 99.0, patches.values), usable=patches.usable, places=patches.places, seconds=patches.seconds
    )
    first, second = model.reconstruct(patches, hidden)[0], model.reconstruct(changed, hidden)[0]
    assert torch.equal(first, second)


@pytest.mark.parametrize("masking", ["random", "tube"])
def test_the_share_of_hidden_patches(masking: str) -> None:
    usable = torch.ones(4, 20, 5, dtype=torch.bool)
    usable[:, 15:] = False
    hidden = choose_hidden_patches(usable, torch.rand(usable.shape), ratio=0.6, masking=masking)  # type: ignore[arg-type]
    assert not (hidden & ~usable).any()
    assert hidden.flatten(1).sum(dim=1).tolist() == [45] * 4
    if masking == "tube":
        assert torch.equal(hidden.any(dim=2), hidden.all(dim=2))


def test_every_parameter_learns_and_one_batch_is_overfitted() -> None:
    torch.manual_seed(0)
    model = SeriesModel(TINY)
    series = torch.cumsum(torch.randn(4, 60, 6), dim=1)
    series = (series - series.mean(dim=1, keepdim=True)) / series.std(dim=1, keepdim=True)
    patches = cut(series, batch()[1])
    hidden = choose_hidden_patches(patches.usable, torch.rand(patches.usable.shape), ratio=0.5, masking="random")
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for step in range(150):
        predicted, spectrum, _ = model.reconstruct(patches, hidden)
        loss = masked_patch_loss(predicted, patches, hidden) + 0.1 * masked_spectrum_loss(spectrum, patches, hidden)
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
        optimiser.step()
        losses.append(float(loss))
    assert losses[-1] < 0.2 * losses[0]


def test_spectra_are_numpys_and_free_of_offsets() -> None:
    values = torch.randn(2, 3, 4, 10)
    expected = np.abs(np.fft.rfft(values.numpy() - values.numpy().mean(-1, keepdims=True))) ** 2 / 10
    np.testing.assert_allclose(log_spectrum(values), np.log(expected + 0.05), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(log_spectrum(values + 7), log_spectrum(values), atol=1e-3, rtol=1e-3)


def test_time_code_tells_seconds_apart() -> None:
    code = time_code(torch.tensor([0.0, 20.0, 40.0, 2000.0]), 64)
    assert code.shape == (4, 64)
    assert torch.cdist(code, code).fill_diagonal_(9).min() > 0.5


def test_published_sizes() -> None:
    base = sum(p.numel() for p in SeriesModel(SeriesShape()).parameters())
    large = sum(p.numel() for p in SeriesModel(SeriesShape(width=768, num_heads=12, feedforward=3072, num_layers=12)).parameters())
    assert 4.5e6 < base < 5.2e6  # 3.2 million in the encoder, 1.7 million in the decoder
    assert 0.95e8 < large < 1.05e8
