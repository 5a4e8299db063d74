"""Resampling and scaling of region series: against scipy, planted sines and numpy's quartiles."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import signal

from brainfm_cli.models.series_scaling import SeriesScaler, population_spread, resample, robust_spread


def sine(frequency: float, repetition_time_s: float, seconds: float = 400.0) -> torch.Tensor:
    times = (torch.arange(int(seconds / repetition_time_s), dtype=torch.float64) + 0.5) * repetition_time_s
    return torch.sin(2 * math.pi * frequency * times)[:, None].float()


@pytest.mark.parametrize(("given", "target"), [(0.72, 2.0), (2.5, 2.0), (3.0, 2.0), (2.0, 2.5)])
def test_slow_signals_are_kept_and_nothing_is_folded_into_them(given: float, target: float) -> None:
    middle = slice(25, -25)  # the ends see half a kernel
    kept = resample(sine(0.05, given), given, target)
    torch.testing.assert_close(kept[middle], sine(0.05, target)[: len(kept)][middle], atol=5e-3, rtol=0)
    if given < target:
        beyond = 0.5 / target * 1.3  # would appear below the new Nyquist frequency
        assert resample(sine(beyond, given), given, target)[middle].abs().max() < 0.02


def test_resampling_agrees_with_scipys() -> None:
    noise = torch.from_numpy(signal.lfilter(*signal.butter(4, 0.3), np.random.default_rng(0).normal(size=500))).float()[:, None]
    ours = resample(noise, 1.0, 2.0)[:, 0].numpy()
    # scipy's samples are the frames' beginnings, ours their middles: half a frame apart at each rate
    theirs = signal.resample_poly(noise[:, 0].numpy(), 4, 1)[2::8][: len(ours)]
    assert np.corrcoef(ours[20:-20], theirs[20:-20])[0, 1] > 0.99


def test_constants_absent_regions_and_equal_times_are_left_alone() -> None:
    series = torch.full((100, 2), 7.0)
    series[:, 1] = torch.nan
    other = resample(series, 0.8, 2.0)
    assert len(other) == 40
    torch.testing.assert_close(other[:, 0], torch.full((40,), 7.0))
    assert other[:, 1].isnan().all()
    assert resample(series, 2.0, 2.0) is series


def test_spread_is_numpys_interquartile_range() -> None:
    values = np.random.default_rng(1).normal(3, 5, size=(201, 4)).astype(np.float32)
    expected = np.subtract(*np.percentile(values, [75, 25], axis=0)) / 1.349
    np.testing.assert_allclose(robust_spread(torch.from_numpy(values)), expected, rtol=1e-5)


def scaler(spread: list[float]) -> SeriesScaler:
    one = SeriesScaler({"A": len(spread)})
    one.set("A", torch.tensor(spread))
    return one


def test_units_and_offsets_do_not_matter_and_patterns_over_regions_do() -> None:
    torch.manual_seed(0)
    series = torch.randn(400, 3) * torch.tensor([1.0, 2.0, 4.0])
    one = scaler([1.0, 1.0, 1.0])
    scaled, gain = one(series, "A", gain="scan", clip=50.0)
    again, larger = one(100 * series + 9000.0, "A", gain="scan", clip=50.0)
    torch.testing.assert_close(again, scaled, atol=2e-3, rtol=1e-3)
    assert float(larger / gain) == pytest.approx(100, rel=1e-3)
    assert float(robust_spread(scaled)[2] / robust_spread(scaled)[0]) == pytest.approx(4, rel=0.2)
    kept, _ = one(100 * series, "A", gain="kept", clip=1e9)
    torch.testing.assert_close(robust_spread(kept), robust_spread(100 * series))
    assert scaled.median(dim=0).values.abs().max() == 0


def test_flat_and_absent_regions_have_no_signal_and_spikes_are_cut() -> None:
    torch.manual_seed(0)
    series = torch.randn(300, 4)
    series[:, 1] = 5.0
    series[:, 2] = torch.nan
    series[10, 0] = 1000.0
    scaled, _ = scaler([1.0] * 4)(series, "A", gain="scan", clip=6.0)
    assert scaled.isnan().all(dim=0).tolist() == [False, True, True, False]
    assert float(scaled[10, 0]) == 6.0


def test_population_spread_ignores_a_scan_in_other_units() -> None:
    pattern = torch.tensor([1.0, 2.0, 3.0, 4.0])
    scans = pattern * torch.tensor([1.0, 1.1, 0.9, 1.0, 1000.0])[:, None]
    scans[0, 3] = torch.nan
    torch.testing.assert_close(population_spread(scans) / population_spread(scans)[0], pattern, rtol=0.05, atol=0)
    assert float(population_spread(scans).median()) == pytest.approx(2.0, rel=0.15)
    nobody = scans.clone()
    nobody[:, 1] = torch.nan
    assert torch.isfinite(population_spread(nobody)).all()
