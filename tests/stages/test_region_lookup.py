"""Which regions the columns of ready-made series stand for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from brainfm_cli.atlases.catalogue import find_atlas
from brainfm_cli.records import ParcellatedRun, RegionTable, RunKey
from brainfm_cli.stages.parcellate.results import region_lookup

ATLAS = find_atlas("AAL116")
NUMBERS = range(1, ATLAS.num_regions + 1)


@pytest.fixture
def looked_up(tmp_path: Path) -> Callable[[Sequence[str], bool], RegionTable]:
    """The regions of a series with such column names."""
    series = np.zeros((3, ATLAS.num_regions))
    run = ParcellatedRun(
        key=RunKey(participant="01", task="rest"),
        atlas=ATLAS.label,
        space="MNI152NLin2009cAsym",
        series=series,
        coverage=np.ones(ATLAS.num_regions),
        repetition_time_s=2.0,
    )
    return lambda names, named: region_lookup({})(run, tuple(names), named, tmp_path)


@pytest.mark.parametrize("pattern", ["AAL116_{:03d}", "AAL116-{}", "AAL116{:04d}"])
def test_columns_that_only_count_are_the_regions_of_the_atlas(looked_up, pattern: str) -> None:
    assert looked_up([pattern.format(place) for place in NUMBERS], True).names == ATLAS.regions.names


def test_the_atlas_own_names_and_none_are_its_regions(looked_up) -> None:
    assert looked_up(ATLAS.regions.names, True).names == ATLAS.regions.names
    assert looked_up([str(place) for place in NUMBERS], False).names == ATLAS.regions.names


@pytest.mark.parametrize(
    "names",
    [
        [f"AAL116_{place:03d}" for place in reversed(NUMBERS)],
        [f"AAL116_{place + 1:03d}" for place in NUMBERS],
        [f"AAL3v1_{place:03d}" for place in NUMBERS],
        [f"region{place:03d}" for place in NUMBERS],
    ],
    ids=["another order", "another start", "another atlas", "names of their own"],
)
def test_other_columns_keep_their_names(looked_up, names: list[str]) -> None:
    found = looked_up(names, True)
    assert found.names == tuple(names)
    assert found.centroids_mm is None
