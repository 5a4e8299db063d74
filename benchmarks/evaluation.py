"""How far connectivity alone goes on real people, and how long the floors take at full size.

floors: every floor on the targets of a packed cohort, within and across sites. speed: linear floors for a thousand people and
400 regions, from the series on. Whether the numbers can be believed is measured by calibration.py.

    python benchmarks/evaluation.py floors COHORT --targets group sex age scanner --site scanner
    python benchmarks/evaluation.py floors COHORT --targets sex age --site scanner --among group=child
    python benchmarks/evaluation.py speed
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

from brainfm_cli.bids.cohort import Cohort, CohortAtlas, CohortWriter
from brainfm_cli.learning.evaluation import Context, EvaluationSettings, evaluate
from brainfm_cli.learning.floors import FloorSettings, LinearFloor, make_floors
from brainfm_cli.learning.kernels import connectivity_kernel
from brainfm_cli.learning.machines import SupportVectorFloor
from brainfm_cli.learning.scores import PRIMARY
from brainfm_cli.learning.splits import DesignSettings, make_split
from brainfm_cli.learning.targets import TargetSettings, class_text, participant_table, read_target
from brainfm_cli.records import RegionTable


def floors(folder: Path, targets: list[str], site: str, repeats: int, among: str) -> None:
    """Print every floor's primary score on a cohort, within and across the values of ``site``."""
    cohort = Cohort.open(folder)
    table = participant_table(cohort)
    table["site"] = table[site]
    print("| target | design | people | floor | score | permutation p | minutes |\n|---|---|---|---|---|---|---|")
    for column in targets:
        target = read_target(cohort, column, TargetSettings())
        if among:
            name, value = among.split("=")
            target = target.keep([person for person in target.participants if class_text(table.loc[person, name]) == value])
        designs = [(f"5-fold, {repeats} repetitions", target, DesignSettings(repeats=repeats))]
        if column != site:
            designs.append((f"across {site}", target, DesignSettings(kind="leave-one-site-out")))
        for name, chosen, design in designs:
            start = time.perf_counter()
            try:
                split = make_split(chosen, table, design)
            except Exception as error:  # noqa: BLE001  (a benchmark prints what the program says)
                print(f"| {column} | {name} | | | {error} | | |")
                continue
            made = make_floors(cohort, chosen, table)
            context = Context(table=table, pools=made.pools, kernels=made.kernels, notes=made.notes)
            metrics = evaluate(chosen, split, made.predictors, context, EvaluationSettings(groups=())).metrics
            minutes = (time.perf_counter() - start) / 60
            for one in metrics.predictors:
                print(f"| {column} | {name} | {metrics.people} | {one.name} | {metrics.primary} {one.scores[PRIMARY[metrics.kind]]} | {one.permutation_p} | {minutes:.1f} |", flush=True)  # fmt: skip
            for item in metrics.audit:
                print(f"<!-- {column}, {name}: {item.check}: {item.verdict}: {item.text} -->")


def simulate(folder: Path, people: int, regions: int, frames: int) -> Cohort:
    """A packed cohort of noise; a case's first twenty regions share a signal."""
    rng = np.random.default_rng(0)
    names = [f"p{index:04d}" for index in range(people)]
    case = rng.integers(0, 2, people)
    atlas = CohortAtlas(label="Full", regions=RegionTable(names=tuple(f"r{index}" for index in range(regions))), template="none")
    with CohortWriter(folder) as writer:
        writer.add_atlas(atlas)
        for name, code in zip(names, case, strict=True):
            series = rng.normal(size=(frames, regions)).astype(np.float32)
            series[:, :20] += (0.1 + 0.1 * code) * rng.normal(size=(frames, 1)).astype(np.float32)
            writer.add_run("Full", series, {"participant": name, "dataset": "x", "session": "", "run": "1", "site": "", "repetition_time": 2.0, "mean_fd": 0.1, "kept_fraction": 1.0})  # fmt: skip
        writer.finish(pd.DataFrame({"group": np.where(case == 1, "case", "control")}, index=names))
    return Cohort.open(folder)


def speed(people: int, regions: int, frames: int) -> None:
    """Print time and memory of the linear floors at full size."""
    with tempfile.TemporaryDirectory() as folder:
        cohort = simulate(Path(folder) / "cohort", people, regions, frames)
        target, table = read_target(cohort, "group", TargetSettings(positive="case")), participant_table(cohort)
        print("| floor | folds | kernel | fits and scores | AUROC | peak memory |\n|---|---|---|---|---|---|")
        for measure, repeats, name in (("fisherz", 10, "linear"), ("tangent", 1, "linear"), ("fisherz", 10, "SVM")):
            start = time.perf_counter()
            kernel = connectivity_kernel(cohort, target.participants, "Full", measure)
            made = time.perf_counter()
            floor = LinearFloor(kernel=kernel, penalties=FloorSettings().penalties) if name == "linear" else SupportVectorFloor(kernel=kernel)  # fmt: skip
            split = make_split(target, table, DesignSettings(repeats=repeats))
            found = evaluate(target, split, {name: floor}, Context(table=table), EvaluationSettings(groups=())).metrics.of(name)
            seconds = time.perf_counter() - made
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(f"| {name}, {measure} | 5 x {repeats} | {made - start:.0f} s | {seconds / 60:.1f} min | {found.scores['auroc']} | {peak:.1f} GiB |", flush=True)  # fmt: skip


def main() -> None:
    """Run one study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="study", required=True)
    two = parts.add_parser("floors")
    two.add_argument("cohort", type=Path)
    two.add_argument("--targets", nargs="+", required=True)
    two.add_argument("--site", default="site")
    two.add_argument("--repeats", type=int, default=2)
    two.add_argument("--among", default="", help="COLUMN=VALUE: only these people")
    three = parts.add_parser("speed")
    three.add_argument("--people", type=int, default=1000)
    three.add_argument("--regions", type=int, default=400)
    three.add_argument("--frames", type=int, default=200)
    given = parser.parse_args()
    if given.study == "floors":
        floors(given.cohort, given.targets, given.site, given.repeats, given.among)
    else:
        speed(given.people, given.regions, given.frames)


if __name__ == "__main__":
    main()
