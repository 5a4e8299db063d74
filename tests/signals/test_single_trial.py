"""Single-trial estimation: nilearn's own LSS as oracle, planted responses recovered, and trials that cannot be."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.signals.single_trial import SingleTrialSettings, choose_trials, estimate_trials, read_motion, trial_weights
from brainfm_cli.signals.trial_maps import VoxelMask, read_mask_image

SECONDS, FRAMES, SHAPE = 2.0, 90, (3, 3, 2)
AFFINE = np.diag([3.0, 3.0, 3.0, 1.0])
HERE = Path("events.tsv")


def events(gap: float = 8.0, count: int = 18) -> pd.DataFrame:
    return pd.DataFrame({"onset": 10 + gap * np.arange(count), "duration": 2.0, "trial_type": ["face", "house"] * (count // 2)})


def write(folder: Path, series: np.ndarray) -> tuple[Path, VoxelMask]:
    """(frames, voxels) as an image of all voxels."""
    nib.save(nib.Nifti1Image(series.T.reshape(*SHAPE, FRAMES).astype(np.float64), AFFINE), folder / "bold.nii.gz")
    nib.save(nib.Nifti1Image(np.ones(SHAPE, np.uint8), AFFINE), folder / "mask.nii.gz")
    return folder / "bold.nii.gz", read_mask_image(folder / "mask.nii.gz")


@pytest.mark.parametrize("hrf", ["glover", "glover + derivative"])
def test_least_squares_separate_is_nilearn_s(hrf: str, tmp_path: Path, generator: np.random.Generator) -> None:
    from nilearn.glm.first_level import make_first_level_design_matrix, run_glm

    series = 100 + generator.standard_normal((FRAMES, 18)).cumsum(0)
    motion = 0.1 * generator.standard_normal((FRAMES, 6)).cumsum(0)
    bold, voxels = write(tmp_path, series)
    settings = SingleTrialSettings(hrf=hrf)
    found = estimate_trials(bold, voxels, events(), motion, settings, repetition_time_s=SECONDS)
    times = (np.arange(FRAMES) + 0.5) * SECONDS
    for trial in (0, 5, 17):
        apart = events().assign(trial_type=["mine" if row == trial else "other" for row in range(18)])
        design = make_first_level_design_matrix(times, apart, hrf_model=hrf, drift_model="cosine", high_pass=0.01, add_regs=motion)
        _, fits = run_glm(series, design.to_numpy(), noise_model="ols")
        (fit,) = fits.values()
        expected = 100 * fit.theta[list(design.columns).index("mine")] / series.mean(0)
        np.testing.assert_allclose(found.responses[trial], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("estimator", ["lss", "ridge"])
def test_planted_responses_are_recovered(estimator: str, tmp_path: Path, generator: np.random.Generator) -> None:
    from nilearn.glm.first_level import make_first_level_design_matrix

    planted = generator.standard_normal((18, 18))
    alone = events().assign(trial_type=[f"t{row:02d}" for row in range(18)])
    design = make_first_level_design_matrix((np.arange(FRAMES) + 0.5) * SECONDS, alone, hrf_model="glover", drift_model=None)
    clean = design[[f"t{row:02d}" for row in range(18)]].to_numpy() @ planted
    slow = 5 * np.cos(2 * np.pi * (np.arange(FRAMES) + 0.5) / FRAMES)[:, None]  # a drift that cosines can take out
    bold, voxels = write(tmp_path, 100 + clean + slow + 0.05 * generator.standard_normal(clean.shape))
    found = estimate_trials(bold, voxels, events(), None, SingleTrialSettings(estimator=estimator, penalty=0.01), repetition_time_s=SECONDS)
    # evenly spaced trials leave what they have in common to the mean of the series
    apart = [values - values.mean(0) for values in (found.responses, planted)]
    # neighbouring trials overlap: one model per trial shares their responses out, all in one does not
    assert np.corrcoef(apart[0].ravel(), apart[1].ravel())[0, 1] > {"lss": 0.85, "ridge": 0.95}[estimator]


def test_overlapping_trials_are_told_apart_better_by_all_in_one_ridge(generator: np.random.Generator) -> None:
    fast = events(gap=2.0, count=60)
    ridge, separate = (
        trial_weights(
            fast, None, SingleTrialSettings(estimator=name, penalty=0.02), num_frames=FRAMES, repetition_time_s=SECONDS, where=HERE
        )
        for name in ("ridge", "lss")
    )
    assert np.linalg.norm(ridge) < np.linalg.norm(separate) * 10
    assert ridge.shape == separate.shape == (60, FRAMES)
    np.testing.assert_allclose(ridge.sum(1), 0, atol=1e-9)  # no weight on the mean


def test_voxels_without_a_signal_respond_with_zero(tmp_path: Path, generator: np.random.Generator) -> None:
    series = 100 + generator.standard_normal((FRAMES, 18))
    series[:, 4] = 0
    bold, voxels = write(tmp_path, series)
    found = estimate_trials(bold, voxels, events(), None, SingleTrialSettings(), repetition_time_s=SECONDS)
    assert found.empty_voxels == 1
    assert not found.responses[:, 4].any()
    assert np.isfinite(found.responses).all()


def choose(table: pd.DataFrame, **settings: object) -> pd.DataFrame:
    return choose_trials(table.astype(str), SingleTrialSettings(**settings), num_frames=FRAMES, repetition_time_s=SECONDS, where=HERE)


def test_trials_outside_the_run_are_refused() -> None:
    late = events()
    late.loc[3, "onset"] = 181.0
    with pytest.raises(InputDatasetError, match="row 4: the trial at 181 s lies outside the run of 180 s"):
        choose(late)
    late.loc[3, "onset"] = -1.0
    with pytest.raises(InputDatasetError, match="row 4: the trial at -1 s"):
        choose(late)
    with pytest.raises(InputDatasetError, match="no event is a trial"):
        choose(events(), where={"trial_type": ["shoe"]})
    with pytest.raises(InputDatasetError, match="no column 'onset'"):
        choose(events().drop(columns="onset"))
    assert len(choose(events(), where={"trial_type": ["face"]})) == 9


def test_blocks_join_events_of_one_kind() -> None:
    table = pd.DataFrame(
        {"onset": [0, 1, 2, 3, 10, 11, 30, 31], "duration": 0.5, "trial_type": ["a"] * 2 + ["b"] * 2 + ["b"] * 2 + ["a"] * 2}
    )
    found = choose(table, unit="block", gap_s=2.0)
    assert found["onset"].tolist() == [0, 2, 10, 30]
    assert found["duration"].tolist() == [1.5] * 4
    assert found["events"].tolist() == [2] * 4


def test_motion_must_belong_to_the_run(tmp_path: Path) -> None:
    path = tmp_path / "confounds.tsv"
    pd.DataFrame({name: [0.0] * 5 for name in ("trans_x", "trans_y", "trans_z", "rot_x", "rot_y", "rot_z")}).to_csv(
        path, sep="\t", index=False
    )
    assert read_motion(path, 5).shape == (5, 6)
    with pytest.raises(InputDatasetError, match="5 rows and the image 6 frames"):
        read_motion(path, 6)
    path.write_text("trans_x\n1\n")
    with pytest.raises(InputDatasetError, match="no motion parameters"):
        read_motion(path, 1)
