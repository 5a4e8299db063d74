"""People, windows and batches: functions of seed, epoch and scan, never of what was drawn before."""

from __future__ import annotations

import hashlib
from collections import Counter

import numpy as np
import pandas as pd
import pytest
import torch

from brainfm_cli.bids.cohort import Cohort, CohortAtlas, CohortWriter
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, SettingsError
from brainfm_cli.learning.samples import (
    BatchPlan,
    PretrainSamples,
    Scan,
    WindowRule,
    draw_window,
    hold_out,
    list_scans,
    pad_windows,
    plan_epoch,
    select_participants,
    shard,
    whole_scans,
)
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.records import RegionTable

PEOPLE = [f"one+{place:02d}" for place in range(7)] + [f"two+{place:02d}" for place in range(5)]
REGIONS = {"A": 5, "B": 6}
RULE = WindowRule(min_frames=60)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Two datasets; the first person has two runs, the last three people no atlas B, one run is short."""
    rng = np.random.default_rng(0)
    with CohortWriter(tmp_path_factory.mktemp("samples") / "cohort") as writer:
        for label, regions in REGIONS.items():
            writer.add_atlas(
                CohortAtlas(label=label, regions=RegionTable(names=tuple(f"{label}{r}" for r in range(regions))), template="t")
            )
            for person in PEOPLE:
                if label == "B" and person in PEOPLE[-3:]:
                    continue
                for run in range(2 if person == PEOPLE[0] else 1):
                    frames = 30 if person == PEOPLE[1] else 90 + 10 * run
                    row = {"dataset": person[:3], "participant": person, "session": "", "run": f"run-{run}", "site": "", "repetition_time": 2.0, "mean_fd": 0.1, "kept_fraction": 1.0}  # fmt: skip
                    writer.add_run(label, rng.normal(size=(frames, regions)).astype(np.float32), row)
        half = ["discovery", "holdout"] * 6
        age = [20.0, 21.0, 22.5, *[30.0] * 9]
        people = pd.DataFrame({"split": half, "age": age, "wave": [1, 2] * 6, "site": ["x", *[None] * 11]}, index=PEOPLE)
        people.loc["two+99"] = ["discovery", 20.0, 1, "x"]  # in the table, never scanned
        writer.finish(people)
    return Cohort.open(writer.root)


@pytest.fixture(scope="module")
def scans(cohort: Cohort) -> list[Scan]:
    return list_scans(cohort, PEOPLE, ["A", "B"], rule=RULE)


def test_people_are_selected_by_columns_and_labels(cohort: Cohort) -> None:
    assert select_participants(cohort, {}) == sorted(PEOPLE)  # never-scanned people are left out
    assert select_participants(cohort, {"split": ["holdout"]}) == PEOPLE[1::2]
    assert select_participants(cohort, {"split": ["holdout"], "age": ["21"]}) == ["one+01"]
    assert select_participants(cohort, {"age": ["22.5", 20]}) == ["one+00", "one+02"]  # type: ignore[list-item]
    assert select_participants(cohort, {"wave": ["2"]}, ["01", "two+03"]) == ["one+01"]
    assert select_participants(cohort, {}, ["01", "two+03"]) == ["one+01", "two+01", "two+03"]
    assert select_participants(cohort, {"site": ["n/a"]}) == PEOPLE[1:]
    with pytest.raises(SettingsError, match="names the column 'spilt'"):
        select_participants(cohort, {"spilt": ["holdout"]})
    for where, labels in (({"split": ["neither"]}, ()), ({}, ["77"]), ({}, ["99"])):
        with pytest.raises(InputNotFoundError, match="no participant with series"):
            select_participants(cohort, where, labels)


def test_scans_gather_the_atlases_of_a_run(cohort: Cohort, scans: list[Scan]) -> None:
    assert [scan.name for scan in scans] == sorted(scan.name for scan in scans)
    assert len(scans) == len(PEOPLE)  # one run too many, one too short
    assert PEOPLE[1] not in {scan.participant for scan in scans}
    assert Counter(scan.participant for scan in scans)[PEOPLE[0]] == 2
    for scan in scans:
        assert list(scan.rows) == (["A"] if scan.participant in PEOPLE[-3:] else ["A", "B"])
        assert all(row.participant == scan.participant and row.atlas == label for label, row in scan.rows.items())
        assert scan.repetition_time_s == 2.0
    assert [scan.participant for scan in list_scans(cohort, [PEOPLE[1]], ["A"])] == [PEOPLE[1]]
    with pytest.raises(InputDatasetError, match=r"no run has 60 frames \(the longest has 30"):
        list_scans(cohort, [PEOPLE[1]], ["A"], rule=RULE)
    with pytest.raises(InputDatasetError, match="no run"):
        list_scans(cohort, PEOPLE[-3:], ["B"])


def test_who_is_held_out_depends_on_seed_and_key_alone() -> None:
    people = [f"sub{place}" for place in range(100)]
    training, held_out = hold_out(people, 0.2, seed=1)
    assert len(held_out) == 20
    assert sorted(training + held_out) == sorted(people)
    assert hold_out(people[::-1], 0.2, seed=1) == (training, held_out)
    assert hold_out(people, 0.2, seed=2)[1] != held_out
    # people who join displace only whom they outrank: of the old ones, nobody who trained is held out
    more_training, more_held_out = hold_out([*people, *(f"new{place}" for place in range(20))], 20 / 120, seed=1)
    assert set(more_held_out) & set(people) <= set(held_out)
    assert len(set(more_held_out) & set(held_out)) > 10
    assert set(training) <= set(more_training)


@pytest.mark.parametrize(("people", "fraction", "expected"), [(10, 0.0, 0), (10, 0.01, 1), (2, 0.9, 1), (1, 0.5, 0), (10, 0.25, 2)])
def test_how_many_are_held_out(people: int, fraction: float, expected: int) -> None:
    assert len(hold_out([str(place) for place in range(people)], fraction, seed=0)[1]) == expected


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("batch_size", [2, 5, 100])
def test_each_scan_comes_once_per_epoch_and_atlas(scans: list[Scan], batch_size: int, *, shuffle: bool) -> None:
    for epoch in range(2):
        plans = plan_epoch(scans, batch_size=batch_size, seed=3, epoch=epoch, cross_atlas=0.5, shuffle=shuffle)
        seen = Counter((plan.atlas, place) for plan in plans for place in plan.scans)
        assert set(seen.values()) == {1}
        assert set(seen) == {(label, place) for place, scan in enumerate(scans) for label in scan.rows}
        for label in "AB":
            sizes = [len(plan.scans) for plan in plans if plan.atlas == label]
            assert max(sizes) <= batch_size
            assert max(sizes) - min(sizes) <= 1
        assert {plan.epoch for plan in plans} == {epoch}
        assert all(plan.other_atlas in {None, "A", "B"} - {plan.atlas} for plan in plans)


def test_the_plan_of_an_epoch_is_a_function_of_seed_and_epoch(scans: list[Scan]) -> None:
    def plan(seed: int, epoch: int) -> list[BatchPlan]:
        return plan_epoch(scans, batch_size=3, seed=seed, epoch=epoch, cross_atlas=0.5)

    assert plan(1, 4) == plan(1, 4)
    orders = {tuple((p.atlas, p.scans) for p in plan(seed, epoch)) for seed in (1, 2) for epoch in range(3)}
    batches = {frozenset(frozenset(p.scans) for p in plan(seed, epoch)) for seed in (1, 2) for epoch in range(3)}
    assert len(orders) == len(batches) == 6  # who is with whom changes, not only when


def test_how_often_another_atlas_is_asked_for(scans: list[Scan]) -> None:
    def crossed(share: float) -> list[bool]:
        return [
            plan.other_atlas is not None
            for epoch in range(60)
            for plan in plan_epoch(scans, batch_size=4, seed=0, epoch=epoch, cross_atlas=share)
            if plan.atlas == "B"  # where every scan has another atlas
        ]

    assert not any(crossed(0.0))
    assert all(crossed(1.0))
    assert abs(np.mean(crossed(0.3)) - 0.3) < 4 * np.sqrt(0.21 / len(crossed(0.3)))
    alone = [scan for scan in scans if list(scan.rows) == ["A"]]
    assert all(plan.other_atlas is None for plan in plan_epoch(alone, batch_size=2, seed=0, epoch=0, cross_atlas=1.0))


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 16])
def test_shares_cover_the_batch_and_are_equally_large(world_size: int) -> None:
    plan = BatchPlan(atlas="A", scans=(4, 9, 2, 7, 5, 0, 8), other_atlas="B", epoch=2)
    shares = [shard(plan, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(share.scans) for share in shares}) == 1
    everything = [place for share in shares for place in share.scans]
    assert set(everything) == set(plan.scans)
    assert everything == [*plan.scans, *plan.scans, *plan.scans][: len(everything)]  # the first ones twice
    assert len(everything) < 7 + world_size
    assert {(share.atlas, share.other_atlas, share.epoch) for share in shares} == {("A", "B", 2)}


@pytest.mark.parametrize(("frames", "shortest"), [(200, 100), (100, 60), (60, 60), (40, 40)])
def test_windows_are_at_least_half_the_run_and_the_shortest_allowed(frames: int, shortest: int) -> None:
    cuts = [draw_window(frames, 2.0, RULE, key=key, view=view) for key in range(800) for view in (0, 1)]
    lengths = {length for _, length in cuts}
    assert min(lengths) == shortest
    assert max(lengths) == frames
    assert min(start for start, _ in cuts) == 0
    assert max(start + length for start, length in cuts) == frames
    assert cuts == [draw_window(frames, 2.0, RULE, key=key, view=view) for key in range(800) for view in (0, 1)]
    if shortest < frames:
        pairs = list(zip(cuts[::2], cuts[1::2], strict=True))
        assert sum(one != two for one, two in pairs) > 0.99 * len(pairs)  # two views are two windows


def by_scan(cohort: Cohort, scans: list[Scan], plans: list[BatchPlan], seed: int) -> dict[tuple[str, int, str], torch.Tensor]:
    """Key and both windows of every scan of every batch."""
    samples = PretrainSamples(cohort, scans, plans, seed=seed, rule=RULE)
    found = {}
    for place in range(len(samples)):
        batch = samples[place]
        for row, scan in enumerate(samples.plans[place].scans):
            windows = [w.series[row, : int(w.frames[row])].flatten() for w in (batch.first, batch.second)]
            found[plans[place].atlas, plans[place].epoch, scans[scan].name] = torch.cat([batch.keys[row : row + 1], *windows])
    return found


def test_windows_are_a_function_of_seed_epoch_and_scan(cohort: Cohort, scans: list[Scan]) -> None:
    plans = plan_epoch(scans, batch_size=4, seed=1, epoch=5)
    expected = by_scan(cohort, scans, plans, 1)
    assert len(expected) == sum(len(scan.rows) for scan in scans)
    # other batches, another order, another rank, fewer people: the same windows
    shares = [shard(plan, rank=1, world_size=2) for plan in plan_epoch(scans, batch_size=9, seed=8, epoch=5, shuffle=False)][::-1]
    fewer = scans[2:6]
    for other in (by_scan(cohort, scans, shares, 1), by_scan(cohort, fewer, plan_epoch(fewer, batch_size=2, seed=1, epoch=5), 1)):
        assert 0 < len(other) < len(expected)
        assert all(torch.equal(expected[name], value) for name, value in other.items())
    for seed, epoch in ((2, 5), (1, 6)):
        changed = by_scan(cohort, scans, plan_epoch(scans, batch_size=4, seed=1, epoch=epoch), seed)
        assert not any(torch.equal(expected[label, 5, name], value) for (label, _, name), value in changed.items())


def test_a_batch_is_cut_from_its_scans(cohort: Cohort, scans: list[Scan]) -> None:
    plan = BatchPlan(atlas="A", scans=tuple(range(len(scans))), other_atlas="B", epoch=0)
    batch = PretrainSamples(cohort, scans, [plan], seed=0, rule=RULE)[0]
    assert batch.crossed
    assert batch.other is not None
    assert batch.other_rows.tolist() == [row for row, scan in enumerate(scans) if "B" in scan.rows]
    assert (batch.first.atlas, batch.second.atlas, batch.other.atlas) == ("A", "A", "B")
    for windows, rows in ((batch.first, range(len(scans))), (batch.second, range(len(scans))), (batch.other, batch.other_rows.tolist())):
        assert windows.series.shape == (len(list(rows)), int(windows.frames.max()), REGIONS[windows.atlas])
        torch.testing.assert_close(windows.seconds, 2.0 * windows.frames.float())
        for place, row in enumerate(rows):
            own = np.asarray(cohort.series(scans[row].rows[windows.atlas]))
            length = int(windows.frames[place])
            window = windows.series[place, :length].numpy()
            starts = [start for start in range(len(own) - length + 1) if np.array_equal(own[start : start + length], window)]
            assert len(starts) == 1
            assert not windows.series[place, length:].any()
    assert len(set(batch.keys.tolist())) == len(scans)
    same = batch.participant[:, None] == batch.participant[None, :]
    assert same.tolist() == [[one.participant == two.participant for two in scans] for one in scans]
    together = batch.dataset[:, None] == batch.dataset[None, :]
    assert together.tolist() == [[one.dataset == two.dataset for two in scans] for one in scans]


def test_a_batch_whose_other_atlas_nobody_has_says_so(cohort: Cohort, scans: list[Scan]) -> None:
    lacking = tuple(row for row, scan in enumerate(scans) if "B" not in scan.rows)
    batch = PretrainSamples(cohort, scans, [BatchPlan(atlas="A", scans=lacking, other_atlas="B", epoch=0)], seed=0, rule=RULE)[0]
    assert batch.crossed  # as on the ranks whose scans have it: their contrast waits for this one
    assert batch.other is None
    assert batch.other_rows.tolist() == []
    assert batch.to(torch.device("cpu")).other is None


def test_whole_scans_hold_every_frame(cohort: Cohort, scans: list[Scan]) -> None:
    windows = whole_scans(cohort, scans, "A")
    for place, scan in enumerate(scans):
        own = cohort.series(scan.rows["A"])
        np.testing.assert_array_equal(windows.series[place, : len(own)], own)
        assert int(windows.frames[place]) == len(own)
    assert pad_windows([np.ones((3, 2)), np.ones((5, 2))], "A", [2.0, 0.5]).seconds.tolist() == [6.0, 2.5]


def test_a_person_has_one_hash_in_a_single_and_in_a_packed_cohort() -> None:
    expected = hashlib.sha256(b"ds+01").hexdigest()
    assert participant_hash("ds", "01") == expected
    assert participant_hash("ds", "ds+01") == expected
    assert participant_hash("other", "01") != expected
