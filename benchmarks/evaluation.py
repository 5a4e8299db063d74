"""Whether the evaluation's own numbers can be believed, and how far connectivity alone goes on real people.

calibration: coverage of intervals on independent test people and on pooled cross-validated scores, false alarms of both
permutation tests under the null, size of paired tests. Truth is known in closed form: Gaussian features, linear models.
floors: every floor on the targets of a packed cohort. speed: linear floors for a thousand people and 400 regions.

    python benchmarks/evaluation.py calibration --cohorts 200
    python benchmarks/evaluation.py floors COHORT --targets group sex age --site scanner
    python benchmarks/evaluation.py speed
"""

from __future__ import annotations

import argparse
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.linear_model import LogisticRegression, Ridge

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.learning.evaluation import Context, EvaluationSettings, evaluate
from brainfm_cli.learning.floors import LinearFloor, make_floors
from brainfm_cli.learning.forecasts import Forecast, Predictor, TrainingFold
from brainfm_cli.learning.kernels import Kernel
from brainfm_cli.learning.machines import SupportVectorFloor
from brainfm_cli.learning.scores import PRIMARY
from brainfm_cli.learning.splits import DesignSettings, fixed_split, make_split
from brainfm_cli.learning.targets import Target, TargetSettings, class_text, participant_table, read_target

if TYPE_CHECKING:
    from collections.abc import Sequence

FEATURES = 60
SETTINGS = EvaluationSettings(bootstraps=1000, permutations=199, inner_folds=3, groups=())


def draw(people: int, effect: float, kind: str, rng: np.random.Generator, sites: int = 1) -> tuple[np.ndarray, Target, pd.DataFrame]:
    """(people, features), labels and table; ``effect`` lies in the first feature, sites shift the last one and the class balance."""
    names = tuple(f"p{index:04d}" for index in range(people))
    site = rng.integers(0, sites, people)
    features = rng.normal(size=(people, FEATURES))
    if kind == "binary":
        chance = np.linspace(0.35, 0.65, sites)[site] if sites > 1 else np.full(people, 0.5)
        observed = (rng.uniform(size=people) < chance).astype(float)
        features[:, 0] += effect * observed
        classes = ("no", "yes")
    else:
        observed = rng.normal(size=people) + 0.5 * site
        features[:, 0] += effect * (observed - observed.mean())
        classes = ()
    features[:, -1] += 2.0 * site
    target = Target(name="y", kind=kind, participants=names, observed=observed, classes=classes)
    return features, target, pd.DataFrame({"dataset": "x", "site": site.astype(str)}, index=list(names))


def floor_of(features: np.ndarray, target: Target, penalty: float = 1.0) -> LinearFloor:
    """The linear floor on explicit features."""
    return LinearFloor(kernel=Kernel(participants=target.participants, matrix=features @ features.T), penalties=(penalty,))


def plain_floor(features: np.ndarray, target: Target) -> Predictor:
    """The same at its fixed penalty without inner folds, for permutations through the whole pipeline."""
    kernel = Kernel(participants=target.participants, matrix=features @ features.T)

    def predict(fold: TrainingFold, test: Sequence[str]) -> Forecast:
        inside, outside = kernel.coordinates(fold.target.participants, test)
        if fold.target.kind == "continuous":
            return Forecast(test=Ridge(alpha=1.0).fit(inside, fold.target.observed).predict(outside))
        return Forecast(test=LogisticRegression(C=1.0, max_iter=2000).fit(inside, fold.labels).predict_proba(outside))

    return predict


def true_auroc(features: np.ndarray, target: Target, train: np.ndarray, effect: float) -> float:
    """Area on infinitely many new people of the linear rule fitted on ``train``, in closed form."""
    rows = features[train]
    centre = rows.mean(0)
    scale = np.sqrt(np.mean(np.sum((rows - centre) ** 2, axis=1)))
    weights = LogisticRegression(C=1.0, tol=1e-8, max_iter=2000).fit((rows - centre) / scale, target.observed[train]).coef_[0]
    return float(stats.norm.cdf(effect * weights[0] / (np.sqrt(2) * np.linalg.norm(weights))))


def cover(seed: int, *, people: int, effect: float, design: str, method: str) -> bool:
    """Whether one cohort's AUROC interval contains the truth."""
    rng = np.random.default_rng(seed)
    settings = SETTINGS.model_copy(update={"interval": method, "permutations": 99})
    training = 100 if design == "independent" else 0
    features, target, table = draw(people + training, effect, "binary", rng)
    floor = floor_of(features, target)
    names = np.array(target.participants)
    if design == "independent":
        split = fixed_split(target, train=names[:training], test=names[training:], why="independent")
    else:
        split = make_split(target, table, DesignSettings(seed=seed))
    score = evaluate(target, split, {"Linear": floor}, Context(table=table), settings).metrics.of("Linear").scores["auroc"]
    truth = np.mean([true_auroc(features, target, target.rows(fold.train), effect) for fold in split.folds()])
    return score.low is not None and score.high is not None and score.low <= truth <= score.high


def false_alarm(seed: int, *, people: int, sites: int, kind: str, design: str, refits: int) -> tuple[float, float]:
    """(p against fixed predictions, p through the pipeline) where labels are independent of everything but the site."""
    rng = np.random.default_rng([seed, people, sites])
    features, target, table = draw(people, 0.0, kind, rng, sites)
    settings = SETTINGS.model_copy(update={"bootstraps": 100, "interval": "percentile", "refit_permutations": refits})
    names = np.array(target.participants)
    split = (
        fixed_split(target, train=names[: people // 2], test=names[people // 2 :], why="half")
        if design == "holdout"
        else make_split(target, table, DesignSettings(seed=seed))
    )
    found = evaluate(target, split, {"Linear": plain_floor(features, target)}, Context(table=table), settings).metrics.of("Linear")
    return found.permutation_p or 1.0, found.refit_p or np.nan


def paired(seed: int, *, people: int, design: str) -> tuple[float, float]:
    """(bootstrap p, DeLong p) of two rules that are equally good: each sees one of two features of equal effect."""
    rng = np.random.default_rng([seed, people])
    total = people + (2000 if design == "independent" else 0)
    features, target, table = draw(total, 0.8, "binary", rng)
    features[:, 1] += 0.8 * target.observed
    names = np.array(target.participants)
    split = (
        fixed_split(target, train=names[people:], test=names[:people], why="independent")
        if design == "independent"
        else make_split(target, table, DesignSettings(seed=seed))
    )
    predictors = {"First": floor_of(features[:, :1], target), "Second": floor_of(features[:, 1:2], target)}
    settings = SETTINGS.model_copy(update={"permutations": 99, "interval": "percentile"})
    (item,) = evaluate(target, split, predictors, Context(table=table, models=("First",)), settings).metrics.differences
    return item.bootstrap_p or 1.0, item.delong_p or 1.0


def share(hits: int, of: int) -> str:
    """A share with its exact binomial interval."""
    low, high = stats.binomtest(hits, of).proportion_ci()
    return f"{hits / of:.1%} [{low:.1%}, {high:.1%}]"


def coverage(pool: ProcessPoolExecutor, cohorts: int) -> None:
    """Print how often intervals contain the truth."""
    print("| interval | design | people | coverage (nominal 95 %) |\n|---|---|---|---|")
    for design in ("independent", "cross-validated"):
        for people in (40, 100, 300):
            for method in ("bca", "percentile"):
                hits = list(pool.map(partial(cover, people=people, effect=1.5, design=design, method=method), range(cohorts), chunksize=10))  # fmt: skip
                print(f"| {method} | {design} | {people} | {share(sum(hits), len(hits))} |", flush=True)


def alarms(pool: ProcessPoolExecutor, cohorts: int) -> None:
    """Print how often independent labels seem predictable."""
    print("\n| p from | target | design | people | sites | p ≤ 0.05 | KS p against uniform |\n|---|---|---|---|---|---|---|")
    ks = []
    for kind in ("binary", "continuous"):
        for design in ("holdout", "cross-validated"):
            for people, sites in ((40, 1), (80, 3)):
                # refitting is slow: once per kind of target, where it matters
                refits = 99 if design == "cross-validated" and sites == 3 else 0
                alarm = partial(false_alarm, people=people, sites=sites, kind=kind, design=design, refits=refits)
                found = np.array(list(pool.map(alarm, range(cohorts), chunksize=5)))
                for column, how, steps in ((0, "fixed predictions", 200), (1, "refitting", 100)):
                    p = found[:, column]
                    if np.isnan(p).all():
                        continue
                    # p values are counts over steps: spread evenly between neighbours they are uniform
                    ks.append(stats.kstest(p - np.random.default_rng(0).uniform(0, 1 / steps, cohorts), "uniform").pvalue)
                    hits = share(int(np.sum(p <= 0.05)), cohorts)
                    print(f"| {how} | {kind} | {design} | {people} | {sites} | {hits} | {ks[-1]:.3f} |", flush=True)
    print(f"\nSmallest Holm-corrected KS p of {len(ks)}: {min(1.0, min(ks) * len(ks)):.3f}")


def sizes(pool: ProcessPoolExecutor, cohorts: int) -> None:
    """Print how often two equally good rules seem to differ."""
    print("\n| design | people | bootstrap p ≤ 0.05 | DeLong p ≤ 0.05 |\n|---|---|---|---|")
    for design in ("independent", "cross-validated"):
        for people in (60, 200):
            found = np.array(list(pool.map(partial(paired, people=people, design=design), range(cohorts), chunksize=10)))
            print(f"| {design} | {people} | {share(int((found[:, 0] <= 0.05).sum()), len(found))} | {share(int((found[:, 1] <= 0.05).sum()), len(found))} |", flush=True)  # fmt: skip


def calibration(cohorts: int, processes: int) -> None:
    """Print the tables of the calibration study."""
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        coverage(pool, 2 * cohorts)
        alarms(pool, cohorts)
        sizes(pool, 2 * cohorts)


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


def speed(people: int, regions: int) -> None:
    """Print the time of the linear floors at full size, from Gram matrices of random features."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(people, regions * (regions - 1) // 2)).astype(np.float32)
    labels = rng.integers(0, 2, people).astype(float)
    features[:, :200] += 0.1 * labels[:, None].astype(np.float32)
    target = Target(name="y", kind="binary", participants=tuple(f"p{index:04d}" for index in range(people)), observed=labels, classes=("no", "yes"))  # fmt: skip
    table = pd.DataFrame({"dataset": "x"}, index=list(target.participants))
    start = time.perf_counter()
    kernel = Kernel(participants=target.participants, matrix=features.astype(np.float64) @ features.T.astype(np.float64))
    print(f"Gram matrix of {people} x {features.shape[1]}: {time.perf_counter() - start:.0f} s")
    for name, floor in (("Linear", LinearFloor(kernel=kernel, penalties=(0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0))), ("Linear SVM", SupportVectorFloor(kernel=kernel))):  # fmt: skip
        split = make_split(target, table, DesignSettings(repeats=10))
        start = time.perf_counter()
        evaluate(target, split, {name: floor}, Context(table=table), EvaluationSettings(groups=()))
        print(f"{name}, 5 x 10 folds: {(time.perf_counter() - start) / 60:.1f} min", flush=True)
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB")


def main() -> None:
    """Run one study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="study", required=True)
    one = parts.add_parser("calibration")
    one.add_argument("--cohorts", type=int, default=200)
    one.add_argument("--processes", type=int, default=2)
    two = parts.add_parser("floors")
    two.add_argument("cohort", type=Path)
    two.add_argument("--targets", nargs="+", required=True)
    two.add_argument("--site", default="site")
    two.add_argument("--repeats", type=int, default=2)
    two.add_argument("--among", default="", help="COLUMN=VALUE: only these people")
    three = parts.add_parser("speed")
    three.add_argument("--people", type=int, default=1000)
    three.add_argument("--regions", type=int, default=400)
    given = parser.parse_args()
    if given.study == "calibration":
        calibration(given.cohorts, given.processes)
    elif given.study == "floors":
        floors(given.cohort, given.targets, given.site, given.repeats, given.among)
    else:
        speed(given.people, given.regions)


if __name__ == "__main__":
    main()
