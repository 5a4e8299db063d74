"""Confounds against nipype's and nilearn's own code and numbers that can be worked out by hand."""

from __future__ import annotations

import json
import sys
import types

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainfm_cli.signals import confounds

TR = 2.0


@pytest.fixture
def run(generator):
    """(frames, voxels) with drift, a shared fluctuation and noise."""
    frames, voxels = 120, 300
    time = np.arange(frames)[:, None]
    shared = np.sin(time / 5) * generator.normal(0, 6, voxels)
    drift = time / frames * generator.normal(0, 20, voxels)
    return (1000 + 100 * generator.standard_normal(voxels) + shared + drift + generator.normal(0, 10, (frames, voxels))).astype(np.float32)


@pytest.fixture
def nipype_confounds(monkeypatch):
    """nipype's reference code; the Yule-Walker estimate that it takes from nitime is written out here."""
    monkeypatch.setenv("NO_ET", "1")
    pytest.importorskip("nipype")

    def estimate(x, order, rxx=None):
        assert order == 1
        assert rxx is None
        x = x - x.mean()
        return np.array([(x[1:] * x[:-1]).sum() / (x * x).sum()]), 0.0

    algorithms = types.ModuleType("nitime.algorithms")
    algorithms.AR_est_YW = estimate
    monkeypatch.setitem(sys.modules, "nitime", types.ModuleType("nitime"))
    monkeypatch.setitem(sys.modules, "nitime.algorithms", algorithms)
    from nipype.algorithms import confounds as reference

    return reference


def as_image(series: np.ndarray) -> nib.Nifti1Image:
    return nib.Nifti1Image(np.ascontiguousarray(series.T)[:, None, None, :], np.eye(4))


def test_dvars_equal_nipypes(run, nipype_confounds, tmp_path):
    run[:, 7] = 900  # a voxel that never changes is left out
    as_image(run).to_filename(tmp_path / "bold.nii")
    nib.Nifti1Image(np.ones((300, 1, 1), np.uint8), np.eye(4)).to_filename(tmp_path / "mask.nii")
    standard, plain, _ = nipype_confounds.compute_dvars(str(tmp_path / "bold.nii"), str(tmp_path / "mask.nii"), remove_zerovariance=True)
    ours = confounds.dvars(run)
    assert np.isnan(ours[0][0])
    np.testing.assert_allclose(ours[0][1:], plain, rtol=1e-5)
    np.testing.assert_allclose(ours[1][1:], standard, rtol=1e-5)


def test_a_spike_stands_out_in_dvars(run):
    run[60] += 40
    _, standard = confounds.dvars(run)
    assert set(np.argsort(standard[1:])[-2:] + 1) == {60, 61}
    assert np.median(standard[1:]) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("first", [0, 3])
def test_components_equal_nipypes(run, nipype_confounds, first):
    wanted = np.zeros(300, bool)
    wanted[50:250] = True
    mask = nib.Nifti1Image(wanted.astype(np.uint8)[:, None, None], np.eye(4))
    theirs, _, metadata = nipype_confounds.compute_noise_components(
        as_image(run[first:]).get_fdata(), [mask], 0.5, "cosine", 0, 128, TR, mask_names=["WM"]
    )
    ours = confounds.noise_components(run, wanted, repetition_time_s=TR, first=first)
    assert ours.series.shape == (120, theirs.shape[1])
    assert not ours.series[:first].any()
    agreement = np.abs((ours.series[first:] * theirs).sum(0))
    np.testing.assert_allclose(agreement, 1, atol=1e-5)  # equal up to their sign, which is arbitrary
    kept = np.array(metadata["retained"])
    np.testing.assert_allclose(ours.singular_values, metadata["singular_value"][kept], rtol=1e-5)
    np.testing.assert_allclose(ours.variance, metadata["variance_explained"][kept], rtol=1e-5)


@pytest.mark.parametrize(("frames", "repetition_time_s"), [(120, 2.0), (20, 2.52), (157, 0.8), (64, 2.0)])
def test_cosines_equal_nipypes(nipype_confounds, frames, repetition_time_s):
    drift = nipype_confounds._cosine_drift(128, repetition_time_s * np.arange(frames))[:, :-1]
    np.testing.assert_allclose(confounds.cosine_basis(frames, repetition_time_s), drift, atol=1e-12)


def test_non_steady_frames_equal_nipypes(generator, nipype_confounds):
    for bright in (0, 1, 2, 4):
        volumes = (500 + generator.normal(0, 2, (40, 400))).astype(np.float32)
        volumes[:bright] *= np.linspace(1.5, 1.2, bright)[:, None] if bright else 1
        clipped = np.clip(volumes, 0, np.percentile(volumes, 99.8))
        assert confounds.non_steady_frames(volumes) == nipype_confounds.is_outlier(clipped.mean(1)) == bright


def test_framewise_displacement_equals_fmripreps(test_data):
    table = pd.read_csv(
        test_data / "fmriprep_reference" / "sub-01_task-mixedgamblestask_run-01_desc-motion_timeseries.tsv", sep="\t", na_values="n/a"
    )
    ours = confounds.framewise_displacement(table[list(confounds.MOTION)].to_numpy())
    assert np.isnan(ours[0])
    np.testing.assert_allclose(ours[1:], table["framewise_displacement"][1:], atol=1e-9)


def test_mean_signals_are_means(run):
    masks = {"csf": np.arange(300) < 10, "empty": np.zeros(300, bool), "all": np.ones(300, bool)}
    means = confounds.mean_signals(run, masks)
    np.testing.assert_allclose(means["csf"], run[:, :10].mean(1), rtol=1e-6)
    np.testing.assert_allclose(means["all"], run.mean(1), rtol=1e-6)
    assert np.isnan(means["empty"]).all()


def test_blocks_do_not_change_results(run, monkeypatch):
    whole = confounds.dvars(run), confounds.mean_signals(run, {"a": np.arange(300) % 3 == 0})
    monkeypatch.setattr(confounds, "_BLOCK_BYTES", 8 * 120 * 7)
    parts = confounds.dvars(run), confounds.mean_signals(run, {"a": np.arange(300) % 3 == 0})
    np.testing.assert_allclose(parts[0][1][1:], whole[0][1][1:], rtol=1e-9)
    np.testing.assert_allclose(parts[1]["a"], whole[1]["a"], rtol=1e-9)


@pytest.fixture
def table(run, generator):
    motion = np.cumsum(generator.normal(0, [0.03, 0.03, 0.03, 3e-4, 3e-4, 3e-4], (120, 6)), 0)
    motion[70:, 0] += 2.0  # one jump
    masks = {"CSF": np.arange(300) < 60, "WM": (np.arange(300) >= 60) & (np.arange(300) < 160), "combined": np.arange(300) < 160}
    found = {name: confounds.noise_components(run, mask, repetition_time_s=TR, first=2) for name, mask in masks.items()}
    signals = confounds.mean_signals(run, {"global_signal": np.ones(300, bool), "csf": masks["CSF"], "white_matter": masks["WM"], "csf_wm": masks["combined"]})  # fmt: skip
    return confounds.build_table(
        signals=signals, motion=motion, rmsd=np.r_[np.nan, np.zeros(119)], dvars_pair=confounds.dvars(run), components=found,
        repetition_time_s=TR, first=2,
    )  # fmt: skip


def test_the_table_has_fmripreps_columns(table):
    columns, described = table
    for name in (*confounds.MOTION, "csf", "white_matter", "global_signal"):
        for suffix in ("", "_derivative1", "_power2", "_derivative1_power2"):
            assert name + suffix in columns
    assert columns["trans_x_derivative1"].isna().tolist() == [True] + [False] * 119
    np.testing.assert_allclose(columns["csf_derivative1_power2"][1:], np.diff(columns["csf"]) ** 2)
    assert [name for name in columns if name.startswith("non_steady")] == ["non_steady_state_outlier00", "non_steady_state_outlier01"]
    assert columns["non_steady_state_outlier01"].to_numpy().nonzero()[0].tolist() == [1]
    assert "cosine01" in columns
    assert not columns["cosine01"][:2].any()
    spikes = [name for name in columns if name.startswith("motion_outlier")]
    assert {int(columns[name].to_numpy().argmax()) for name in spikes} >= {70}
    assert all(columns[name].sum() == 1 for name in spikes)
    assert described["a_comp_cor_00"]["Mask"] == "combined"
    assert described["c_comp_cor_00"]["Mask"] == "CSF"


@pytest.mark.parametrize("strategy", ["simple", "scrubbing", "compcor"])
def test_nilearn_accepts_the_table(table, tmp_path, strategy):
    from nilearn.interfaces.fmriprep import load_confounds_strategy

    columns, described = table
    stem = "sub-01_task-rest_desc-confounds_timeseries"
    columns.to_csv(tmp_path / f"{stem}.tsv", sep="\t", index=False, na_rep="n/a")
    (tmp_path / f"{stem}.json").write_text(json.dumps(described))
    image = tmp_path / "sub-01_task-rest_space-MNI152NLin2009cAsym_desc-preproc_bold.nii.gz"
    nib.Nifti1Image(np.zeros((2, 2, 2, 120), np.float32), np.eye(4)).to_filename(image)
    chosen, mask = load_confounds_strategy(str(image), denoise_strategy=strategy)
    assert len(chosen) == 120
    assert not chosen.isna().any().any()
    assert mask is not None
    assert 0 not in mask
    assert any("cosine" in name for name in chosen)
    if strategy == "compcor":
        assert any(name.startswith("a_comp_cor") for name in chosen)
    if strategy == "scrubbing":
        assert 70 not in mask
