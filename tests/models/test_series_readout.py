"""Reliable axes of a readout: what differs between people is kept, what changes within a scan is not."""

from __future__ import annotations

import torch

from brainfm_cli.models.series_readout import ReliableAxes


def halves(people: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Readouts of both halves of scans, and the two traits that they share, hidden among thirty that each half draws anew."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    traits = torch.randn(people, 2, generator=generator)

    def half() -> torch.Tensor:
        noise = torch.randn(people, 30, generator=generator)
        return torch.cat([traits + 0.3 * torch.randn(people, 2, generator=generator), noise], dim=1) @ mixing + 5

    return half(), half(), traits


def test_what_people_share_between_halves_is_found_among_noise() -> None:
    axes = ReliableAxes(32, 4)
    first, second, _ = halves(1000, seed=1)
    axes.fit(first, second)
    reliability = axes.get_buffer("reliability")
    assert reliability[:2].min() > 0.6
    assert reliability[2:].max() < 0.3
    other, _, traits = halves(400, seed=2)
    kept = axes(other)
    assert kept.shape == (400, 4)
    residual = torch.linalg.lstsq(kept[:, :2], traits).solution
    explained = 1 - (traits - kept[:, :2] @ residual).square().sum() / traits.square().sum()
    assert explained > 0.8
    before = torch.linalg.lstsq(other[:, :2] - other[:, :2].mean(0), traits).solution
    assert 1 - (traits - (other[:, :2] - other[:, :2].mean(0)) @ before).square().sum() / traits.square().sum() < 0.4
    assert kept.std(0)[:2].min() > 2 * kept.std(0)[2:].max()  # what is reliable is large: a ridge penalty spares it


def test_without_a_fit_the_readout_stays_and_a_fit_travels_with_the_state() -> None:
    axes, twin = ReliableAxes(32, 64), ReliableAxes(32, 64)
    first, second, _ = halves(200, seed=1)
    assert not axes.fitted
    assert torch.equal(axes(first), first)
    axes.fit(first, second)
    twin.load_state_dict(axes.state_dict())
    assert axes(first).shape == (200, 32)  # no more axes than numbers
    assert torch.equal(twin(first), axes(first))
