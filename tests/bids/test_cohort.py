from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainfm_cli.bids.cohort import Cohort, CohortAtlas, CohortWriter, read_participants
from brainfm_cli.errors import InputDatasetError, InputNotFoundError
from brainfm_cli.records import RegionTable

REGIONS = RegionTable(names=("a", "b", "c"), networks=("Vis", None, "Default"), centroids_mm=np.eye(3, dtype=np.float32))
ROW = {"dataset": "x", "session": "", "run": "task-rest", "site": "s", "repetition_time": 2.0, "mean_fd": 0.1, "kept_fraction": 1.0}


def pack(root: Path, series: list[np.ndarray]) -> None:
    with CohortWriter(root / "cohort") as writer:
        writer.add_atlas(CohortAtlas(label="Toy", regions=REGIONS, template="MNI152NLin2009cAsym"))
        for number, one in enumerate(series):
            writer.add_run("Toy", one, {**ROW, "participant": f"{number:02d}"})
        writer.finish(pd.DataFrame({"age": np.arange(len(series)) + 0.5}, index=[f"{number:02d}" for number in range(len(series))]))


def test_round_trip(tmp_path: Path, generator: np.random.Generator) -> None:
    series = [generator.normal(size=(frames, 3)).astype(np.float32) for frames in (5, 7, 2)]
    pack(tmp_path, series)
    cohort = Cohort.open(tmp_path)
    for row, expected in zip(cohort.index.itertuples(), series, strict=True):
        np.testing.assert_array_equal(cohort.series(row), expected)
    assert cohort.participants["age"].tolist() == [0.5, 1.5, 2.5]
    regions = cohort.atlases["Toy"].regions
    assert (regions.names, regions.networks) == (REGIONS.names, REGIONS.networks)
    np.testing.assert_array_equal(regions.centroids_mm, REGIONS.centroids_mm)


def test_packing_is_byte_identical_and_replaces(tmp_path: Path) -> None:
    pack(tmp_path, [np.ones((4, 3)), np.zeros((2, 3))])
    before = {path.name: path.read_bytes() for path in (tmp_path / "cohort").iterdir()}
    pack(tmp_path, [np.ones((4, 3)), np.zeros((2, 3))])
    assert {path.name: path.read_bytes() for path in (tmp_path / "cohort").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["cohort"]


def test_an_interrupted_packing_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), CohortWriter(tmp_path / "cohort") as writer:
        writer.add_atlas(CohortAtlas(label="Toy", regions=REGIONS, template="t"))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_the_same_label_with_other_regions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputDatasetError, match="other regions"), CohortWriter(tmp_path / "cohort") as writer:
        writer.add_atlas(CohortAtlas(label="Toy", regions=REGIONS, template="t"))
        writer.add_atlas(CohortAtlas(label="Toy", regions=RegionTable(names=("a", "b", "d")), template="t"))


@pytest.mark.parametrize("spoil", ["truncate", "empty", "index", "participants", "atlas"])
def test_damaged_cohorts_are_named_errors(tmp_path: Path, spoil: str) -> None:
    pack(tmp_path, [np.ones((400, 3))])
    folder = tmp_path / "cohort"
    path = {
        "truncate": "atlas-Toy.npy",
        "empty": "atlas-Toy.npy",
        "index": "index.parquet",
        "participants": "participants.tsv",
        "atlas": "atlas-Toy.json",
    }[spoil]
    data = (folder / path).read_bytes()
    (folder / path).write_bytes(data[: len(data) // 2] if spoil == "truncate" else b"")
    with pytest.raises(InputDatasetError):
        Cohort.open(tmp_path)


def test_no_cohort(tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="no packed cohort"):
        Cohort.open(tmp_path)


@pytest.mark.parametrize(
    ("text", "says"),
    [("participant_id\tage\nsub-01\t3\nsub-01\t4\n", "twice"), ("age\n3\n", "participant_id"), ("", "unreadable")],
)
def test_bad_participants_tables(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "participants.tsv").write_text(text)
    with pytest.raises(InputDatasetError, match=says):
        read_participants(tmp_path / "participants.tsv")


def test_participants_labels_stay_text(tmp_path: Path) -> None:
    (tmp_path / "participants.tsv").write_text("participant_id\tage\tsex\nsub-001\tn/a\tF\n002\t4\tNA\n")
    table = read_participants(tmp_path / "participants.tsv")
    assert table.index.tolist() == ["001", "002"]
    assert np.isnan(table["age"].iloc[0])
    assert table["sex"].tolist() == ["F", "NA"]
