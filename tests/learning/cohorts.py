"""Small packed cohorts whose connectivity carries a class, a number, both or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from brainfm_cli.bids.cohort import Cohort, CohortAtlas, CohortWriter
from brainfm_cli.learning.targets import Target
from brainfm_cli.records import RegionTable

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray


def names_of(number: int) -> list[str]:
    """Participant keys."""
    return [f"p{index:03d}" for index in range(number)]


def series_of(coupling: float, rng: np.random.Generator, *, frames: int = 80, regions: int = 8) -> NDArray[np.float32]:
    """(frames, regions): regions 0 to 2 share a signal of strength ``coupling``."""
    series = rng.normal(size=(frames, regions))
    series[:, :3] += coupling * rng.normal(size=(frames, 1))
    return series.astype(np.float32)


def pack_cohort(
    folder: Path,
    table: pd.DataFrame,
    series: Mapping[str, Sequence[NDArray]],
    *,
    atlases: Sequence[str] = ("Toy",),
    descriptions: Mapping[str, object] | None = None,
) -> Cohort:
    """A packed cohort: ``series`` holds the runs of each person, the same in every atlas."""
    regions = next(iter(series.values()))[0].shape[1]
    with CohortWriter(folder) as writer:
        for atlas in atlases:
            writer.add_atlas(
                CohortAtlas(label=atlas, regions=RegionTable(names=tuple(f"r{index}" for index in range(regions))), template="t")
            )
            for name in table.index:
                for number, run in enumerate(series[name]):
                    row = {"participant": name, "dataset": table.get("dataset", pd.Series("toy", index=table.index))[name], "session": "", "run": f"run-{number}", "site": table.get("site", pd.Series("", index=table.index))[name], "repetition_time": 2.0, "mean_fd": 0.1, "kept_fraction": 1.0}  # fmt: skip
                    writer.add_run(atlas, run, row)
        writer.finish(table, descriptions)
    return Cohort.open(folder)


def case_cohort(folder: Path, *, people: int = 60, effect: float = 1.0, seed: int = 0, atlases: Sequence[str] = ("Toy",)) -> Cohort:
    """Half cases; ``effect`` is what being a case adds to the coupling. Columns group, age, sex, site, family."""
    rng = np.random.default_rng(seed)
    names = names_of(people)
    case = rng.permutation(np.arange(people) % 2)
    table = pd.DataFrame(
        {
            "group": np.where(case == 1, "case", "control"),
            "age": rng.uniform(8, 40, people).round(1),
            "sex": rng.choice(["F", "M"], people),
            "site": rng.choice(["A", "B", "C"], people),
            "family": [f"f{index // 2}" for index in range(people)],
        },
        index=names,
    )
    series = {name: [series_of(0.8 + effect * code, rng)] for name, code in zip(names, case, strict=True)}
    return pack_cohort(folder, table, series, atlases=atlases)


def binary_target(labels: Sequence[int], names: Sequence[str] | None = None) -> Target:
    """A two-class target."""
    names = names or names_of(len(labels))
    return Target(
        name="group", kind="binary", participants=tuple(names), observed=np.asarray(labels, dtype=np.float64), classes=("no", "yes")
    )


def continuous_target(values: Sequence[float] | NDArray) -> Target:
    """A continuous target."""
    return Target(name="age", kind="continuous", participants=tuple(names_of(len(values))), observed=np.asarray(values, dtype=np.float64))


def multiclass_target(labels: Sequence[int]) -> Target:
    """A target of several classes."""
    classes = tuple(f"c{index}" for index in range(max(labels) + 1))
    return Target(name="kind", kind="multiclass", participants=tuple(names_of(len(labels))), observed=np.asarray(labels, dtype=np.float64), classes=classes)  # fmt: skip


def plain_table(number: int, **columns: Sequence[object]) -> pd.DataFrame:
    """A participant table with a dataset column."""
    return pd.DataFrame({"dataset": ["toy"] * number, **columns}, index=names_of(number))
