"""Slice-timing correction: known waves are seen at the wanted moment; bad metadata is named."""

from __future__ import annotations

import numpy as np
import pytest

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.signals import slice_timing

TR = 2.0


@pytest.mark.parametrize("frequency_hz", [0.01, 0.05, 0.1])
@pytest.mark.parametrize("frames", [40, 600])
def test_a_wave_is_seen_at_the_reference_time(frequency_hz, frames):
    start = np.arange(frames) * TR
    series = np.sin(2 * np.pi * frequency_hz * (start + 0.4) + 1)[:, None].astype(np.float32).repeat(3, 1)
    slice_timing.shift_slice(series, time_s=0.4, target_s=1.0, repetition_time_s=TR)
    expected = np.sin(2 * np.pi * frequency_hz * (start + 1.0) + 1)
    np.testing.assert_allclose(series[6:-6, 1], expected[6:-6], atol=1e-3)


def test_a_slice_at_the_reference_time_keeps_its_values(generator):
    series = generator.standard_normal((30, 5)).astype(np.float32)
    before = series.copy()
    slice_timing.shift_slice(series, time_s=1.0, target_s=1.0, repetition_time_s=TR)
    np.testing.assert_array_equal(series, before)


def test_frames_before_steady_state_neither_change_nor_leak(generator):
    series = generator.standard_normal((30, 4)).astype(np.float32)
    series[:3] += 1000
    alone = series[3:].copy()
    before = series[:3].copy()
    slice_timing.shift_slice(series, time_s=0.2, target_s=1.0, repetition_time_s=TR, first=3)
    slice_timing.shift_slice(alone, time_s=0.2, target_s=1.0, repetition_time_s=TR)
    np.testing.assert_array_equal(series[:3], before)
    np.testing.assert_array_equal(series[3:], alone)


def test_blocks_do_not_change_results(generator, monkeypatch):
    series = generator.standard_normal((300, 4)).astype(np.float32)
    whole = series.copy()
    slice_timing.shift_slice(series, time_s=0.2, target_s=1.0, repetition_time_s=TR)
    monkeypatch.setattr(slice_timing, "_BLOCK", 1000)
    slice_timing.shift_slice(whole, time_s=0.2, target_s=1.0, repetition_time_s=TR)
    np.testing.assert_allclose(series, whole, atol=1e-5)


def test_reference_time_is_the_middle():
    assert slice_timing.reference_time(np.array([0.0, 1.25, 2.4325])) == 1.216


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0, 0.5, 1.0], "3 entries, the image 4 slices"),
        ([0, 500, 1000, 1500], "beyond the repetition time"),
        ([0, -0.5, 0.5, 1], "beyond the repetition time"),
        ([0, "a", 1, 1.5], "no number"),
        ([0, float("nan"), 1, 1.5], "beyond the repetition time"),
    ],
)
def test_bad_slice_times_are_named(times, message):
    with pytest.raises(InputDatasetError, match=message):
        slice_timing.check_slice_times(times, num_slices=4, repetition_time_s=TR)


def test_directions():
    assert slice_timing.slice_axis("k") == (2, False)
    assert slice_timing.slice_axis("j-") == (1, True)
    with pytest.raises(InputDatasetError, match="SliceEncodingDirection"):
        slice_timing.slice_axis("z")
