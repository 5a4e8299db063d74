"""Batches of slices: who trains, every slice once, the same numbers again, bounded memory."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.slice_samples import SliceBatches, divide_people, draw_rows, rows_of, site_of_people
from tests.learning.slice_cohorts import write_slice_cohort


def pixels(people: int = 5, slices: int = 6, size: int = 16) -> dict[str, np.ndarray]:
    # every pixel of a slice holds the slice's number, so that it is known again
    blank = np.zeros((slices, size, size), np.uint8)
    return {f"{n:02d}": blank + ((n * slices + np.arange(slices)) % 256).astype(np.uint8)[:, None, None] for n in range(people)}


def test_people_are_divided_within_each_site() -> None:
    sites = {f"a{n}": "A" for n in range(50)} | {f"b{n}": "B" for n in range(10)} | {f"c{n}": "C" for n in range(5)}
    people = divide_people(sites, 0.2, seed=1)
    held = people.role("validation")
    assert {site: sum(sites[label] == site for label in held) for site in "ABC"} == {"A": 10, "B": 2, "C": 1}
    assert set(held) | set(people.role("train")) == set(sites)
    assert divide_people(sites, 0.2, seed=1).role("validation") == held
    assert divide_people(sites, 0.2, seed=2).role("validation") != held
    assert divide_people({"a": "", "b": ""}, 0.2, seed=0).role("validation") != ()
    with pytest.raises(InputDatasetError, match="two are needed"):
        divide_people({"a": ""}, 0.2, seed=0)


def test_an_epoch_has_every_slice_once_and_ranks_share_it(tmp_path: Path) -> None:
    cohort = write_slice_cohort(tmp_path, pixels(), sites={"00": "x"})
    assert site_of_people(cohort)["00"] == "x"
    rows = rows_of(cohort, ["00", "01", "02", "03"])
    source = SliceBatches(cohort=cohort, rows=rows, validation_rows=rows_of(cohort, ["04"]), batch_size=8, seed=3)
    assert source.num_batches == 3
    seen = [int(value) for batch in source.training(0, rank=0, world_size=1) for value in batch.images[:, 0, 0]]  # type: ignore[attr-defined]
    assert sorted(seen) == list(range(24))
    halves = [[int(v) for batch in source.training(0, rank=rank, world_size=2) for v in batch.images[:, 0, 0]] for rank in (0, 1)]  # type: ignore[attr-defined]
    assert sorted(halves[0] + halves[1]) == list(range(24))
    other = [int(value) for batch in source.training(1, rank=0, world_size=1) for value in batch.images[:, 0, 0]]  # type: ignore[attr-defined]
    assert sorted(other) == sorted(seen)
    assert other != seen
    thirds = [batch for rank in range(3) for batch in source.training(0, rank=rank, world_size=3)]  # type: ignore[attr-defined]
    assert {len(batch.keys) for batch in thirds} == {3}
    assert sorted(int(value) for batch in thirds for value in batch.images[batch.counted, 0, 0]) == list(range(24))
    parts = [source.validation(rank=rank, world_size=4) for rank in range(4)]
    assert [[int(batch.counted.sum()) for batch in part] for part in parts] == [[2], [2], [2], [0]]  # type: ignore[union-attr]


def test_keys_change_with_the_epoch_and_stay_in_validation(tmp_path: Path) -> None:
    cohort = write_slice_cohort(tmp_path, pixels())
    source = SliceBatches(cohort=cohort, rows=rows_of(cohort, ["00"]), validation_rows=rows_of(cohort, ["01"]), batch_size=6, seed=0)
    row = np.array([2])
    assert torch.equal(source.batch(row, 0).keys, source.batch(row, 0).keys)
    assert not torch.equal(source.batch(row, 0).keys, source.batch(row, 1).keys)
    first, second = (source.validation(rank=0, world_size=1)[0] for _ in range(2))  # type: ignore[index]
    assert torch.equal(first.keys, second.keys)
    assert first.masks is None
    assert first.to(torch.device("cpu")).images.dtype == torch.uint8


def test_masks_come_with_their_slices(tmp_path: Path) -> None:
    items = pixels(2)
    masks = {label: (values % 3 == 0).astype(np.uint8) for label, values in items.items()}
    cohort = write_slice_cohort(tmp_path, items, masks=masks)
    source = SliceBatches(
        cohort=cohort, rows=rows_of(cohort, ["00", "01"]), validation_rows=np.array([], np.int64), batch_size=12, seed=0, masks=True
    )
    batch = source.training(0, rank=0, world_size=1)[0]
    assert batch.masks is not None
    assert torch.equal(batch.masks > 0, batch.images % 3 == 0)
    assert source.validation(rank=0, world_size=1) is None


def test_draws_are_bounded_and_repeat() -> None:
    rows = np.arange(100) * 2
    drawn = draw_rows(rows, 10, seed=1)
    assert len(set(drawn.tolist())) == 10
    assert np.array_equal(drawn, draw_rows(rows, 10, seed=1))
    assert np.array_equal(draw_rows(rows, None, seed=1), rows)


def test_memory_does_not_grow_with_the_store(tmp_path: Path) -> None:
    cohort = write_slice_cohort(tmp_path, pixels(people=2, slices=400, size=64))  # 3.3 MB
    source = SliceBatches(cohort=cohort, rows=rows_of(cohort, ["00", "01"]), validation_rows=np.array([], np.int64), batch_size=8, seed=0)
    epoch = source.training(0, rank=0, world_size=1)
    _ = epoch[0]
    tracemalloc.start()
    for place in range(40):
        epoch[place]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 400_000  # a batch has 32,768 pixels
