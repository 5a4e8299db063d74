"""Batches of trials: what trains is what the split says, statistics are those of the training trials, order resumes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from brainfm_cli.bids.voxel_cohort import VoxelCohort
from brainfm_cli.errors import InputDatasetError, InputNotFoundError
from brainfm_cli.learning.image_split import ImageSplitSettings, make_split
from brainfm_cli.learning.voxel_samples import TrialBatches, select_trials, voxel_statistics
from tests.learning.voxel_cohorts import write_cohort


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> VoxelCohort:
    return write_cohort(tmp_path_factory.mktemp("samples"))


def batches(cohort: VoxelCohort, **values: object) -> TrialBatches:
    split = make_split(cohort, ImageSplitSettings())
    given = {
        "cohort": cohort, "trials": select_trials(cohort, split, ["01", "02"], "train"), "batch_size": 16, "seed": 0,
        "validation_trials": select_trials(cohort, split, ["01", "02"], "validation"),
    }  # fmt: skip
    return TrialBatches(**(given | values))  # type: ignore[arg-type]


def test_every_training_trial_comes_once_an_epoch_and_no_other(cohort: VoxelCohort) -> None:
    source = batches(cohort)
    split = make_split(cohort, ImageSplitSettings())
    seen = []
    found = source.training(3, rank=0, world_size=1)
    assert len(found) == source.num_batches
    for place in range(len(found)):
        batch = found[place]
        store = np.asarray(cohort.responses(batch.participant))
        for response, name, caption in zip(batch.responses, batch.names, batch.captions, strict=True):
            (row,) = np.flatnonzero((store == response.numpy()).all(1))
            index = cohort.trials_of(batch.participant).iloc[row]
            assert index["stimulus"] == name
            assert caption in cohort.stimuli[name].captions
            seen.append((batch.participant, int(row)))
        assert len(set(batch.images.tolist())) == len(set(batch.names))
    wanted = cohort.trials[(split.roles(cohort.trials) == "train").to_numpy()]
    assert sorted(seen) == sorted(zip(wanted["participant"], wanted["row"], strict=True))


def test_an_epoch_is_the_same_whenever_it_is_asked_for(cohort: VoxelCohort) -> None:
    one, two = (batches(cohort).training(2, rank=0, world_size=1) for _ in range(2))
    for place in (4, 0):  # in any order
        torch.testing.assert_close(one[place].responses, two[place].responses)
        assert one[place].captions == two[place].captions
        torch.testing.assert_close(one[place].keys, two[place].keys)
    other = batches(cohort).training(3, rank=0, world_size=1)
    assert not torch.equal(one[0].keys, other[0].keys)
    validation = batches(cohort).validation(rank=0, world_size=1)
    assert validation is not None
    assert validation[0].captions == tuple(cohort.stimuli[name].captions[0] for name in validation[0].names)


def test_captions_are_sampled_from_as_many_as_asked(cohort: VoxelCohort) -> None:
    said: dict[int, set[str]] = {}
    for most in (1, 3):
        source = batches(cohort, captions_per_image=most)
        name = source.trials[0].names[0]
        said[most] = set()
        for epoch in range(20):
            data = source.training(epoch, rank=0, world_size=1)
            for place in range(source.num_batches):
                batch = data[place]
                said[most] |= {caption for one, caption in zip(batch.names, batch.captions, strict=True) if one == name}
    assert said[1] == {cohort.stimuli[name].captions[0]}
    assert said[3] == set(cohort.stimuli[name].captions)


def test_ranks_share_each_batch(cohort: VoxelCohort) -> None:
    source = batches(cohort)
    whole = source.training(0, rank=0, world_size=1)[1]
    parts = [source.training(0, rank=rank, world_size=2)[1] for rank in range(2)]
    assert sorted(whole.keys.tolist()) == sorted(parts[0].keys.tolist() + parts[1].keys.tolist())
    assert {part.participant for part in parts} == {whole.participant}


def test_statistics_never_see_a_test_trial(cohort: VoxelCohort, tmp_path: Path) -> None:
    split = make_split(cohort, ImageSplitSettings())
    (trials,) = select_trials(cohort, split, ["01"], "train")
    mean, sd = voxel_statistics(cohort, trials)
    own = np.asarray(cohort.responses("01"))[trials.rows].astype(np.float64)
    np.testing.assert_allclose(mean, own.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(sd, own.std(0), rtol=1e-4)
    # sentinel: test and validation trials that would be noticed
    poisoned = write_cohort(tmp_path)
    path = poisoned.root / "voxels-01.npy"
    store = np.load(path)
    others = np.setdiff1d(np.arange(len(store)), trials.rows)
    store[others] = 1e6
    np.save(path, store)
    again = VoxelCohort.open(tmp_path)
    found = voxel_statistics(again, trials)
    torch.testing.assert_close(found[0], mean)
    torch.testing.assert_close(found[1], sd)


def test_a_share_of_the_pictures_keeps_all_their_repeats(cohort: VoxelCohort) -> None:
    split = make_split(cohort, ImageSplitSettings())
    (whole,) = select_trials(cohort, split, ["01"], "train")
    (part,) = select_trials(cohort, split, ["01"], "train", share=0.25)
    assert len(set(part.names)) == round(0.25 * len(set(whole.names)))
    assert all(part.names.count(name) == whole.names.count(name) for name in part.names)
    (more,) = select_trials(cohort, split, ["01"], "train", share=0.5)
    assert set(part.names) < set(more.names)


def test_damaged_cohorts_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="no packed trials"):
        VoxelCohort.open(tmp_path)
    cohort = write_cohort(tmp_path)
    with pytest.raises(InputNotFoundError, match="no participant 'x'"):
        cohort.choose_participants(["x"])
    path = cohort.root / "voxels-01.npy"
    np.save(path, np.load(path)[:, :-1])
    with pytest.raises(InputDatasetError, match="does not fit its index"):
        VoxelCohort.open(tmp_path)
    (cohort.root / "stimuli.json").write_text("{}")
    with pytest.raises(InputDatasetError, match="stimuli of the index are not described"):
        VoxelCohort.open(tmp_path)
