"""Whether the evaluation's own numbers can be believed: coverage, false alarms, power. Truth is known in closed form.

coverage: how often 95 % intervals contain the truth, on independent test people and on pooled cross-validated scores.
alarms:   p of the permutation test where labels are independent of everything but the site; refits: through the whole pipeline.
selection: the same for a predictor that chooses on the test people, as proof that the check can fail.
pairs:    p of paired tests of two rules that are equally good.
power:    how often tests find the effect that the program calls just detectable.

Every cohort is one line of the file given by --out; a run that was stopped goes on where it was.

    python benchmarks/calibration.py coverage --out coverage.jsonl
    python benchmarks/calibration.py alarms --out alarms.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import expit
from sklearn.metrics import roc_auc_score

from brainfm_cli.learning.evaluation import Context, EvaluationSettings, evaluate
from brainfm_cli.learning.floors import LinearFloor
from brainfm_cli.learning.forecasts import Forecast, TrainingFold
from brainfm_cli.learning.kernels import Kernel
from brainfm_cli.learning.linear import fit_model, rescaled
from brainfm_cli.learning.scores import weighted_auroc
from brainfm_cli.learning.splits import DesignSettings, Split, fixed_split, make_split
from brainfm_cli.learning.targets import Target
from brainfm_cli.learning.uncertainty import (
    bootstrap_p,
    delong,
    detectable_auroc,
    detectable_difference,
    holm,
    over,
    permutation_p,
    resample_weights,
)

FEATURES = 60
SETTINGS = EvaluationSettings(bootstraps=1000, permutations=199, inner_folds=3, groups=())
Configuration = dict[str, Any]


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
        features[:, 0] += effect * (observed - 0.25 * (sites - 1))
        classes = ()
    features[:, -1] += 2.0 * site
    target = Target(name="y", kind=kind, participants=names, observed=observed, classes=classes)
    return features, target, pd.DataFrame({"dataset": "x", "site": site.astype(str)}, index=list(names))


def linear(features: np.ndarray, target: Target, penalties: Sequence[float] = (1.0,)) -> LinearFloor:
    """The linear floor on explicit features."""
    return LinearFloor(kernel=Kernel(participants=target.participants, matrix=features @ features.T), penalties=tuple(penalties))


def divided(target: Target, table: pd.DataFrame, design: str, seed: int, training: int, folds: int = 5) -> Split:
    """The first ``training`` people against the others, or folds of everybody."""
    names = np.array(target.participants)
    if design == "independent":
        return fixed_split(target, train=names[:training], test=names[training:], why="independent")
    return make_split(target, table, DesignSettings(folds=folds, seed=seed))


def truth(features: np.ndarray, target: Target, train: np.ndarray, effect: float) -> float:
    """AUROC or R² on infinitely many new people of the linear rule fitted on ``train``, in closed form."""
    rows = features[train]
    centre = rows.mean(0)
    inputs, _ = rescaled(rows, rows)
    scale = np.sqrt(np.mean(np.sum((rows - centre) ** 2, axis=1)))
    model = "ridge" if target.kind == "continuous" else "logistic"
    predict = fit_model(model, inputs, target.observed[train], 1.0, exact=True)
    if target.kind == "continuous":
        base = float(predict((np.zeros((1, FEATURES)) - centre) / scale)[0])
        slope = predict((np.eye(FEATURES) - centre) / scale) - base
        # y ~ N(0, 1), x = noise + effect·y·e1: the error is y − base − slope·x
        return 1 - float((1 - effect * slope[0]) ** 2 + np.sum(slope**2) + base**2)
    logit = np.log(predict((np.vstack([np.zeros(FEATURES), np.eye(FEATURES)]) - centre) / scale))
    slope = np.diff(logit, axis=1)[:, 0]
    weights = slope[1:] - slope[0]
    return float(stats.norm.cdf(effect * weights[0] / (np.sqrt(2) * np.linalg.norm(weights))))


def cover(seed: int, *, kind: str, design: str, people: int, method: str) -> dict[str, Any]:
    """Whether one cohort's interval contains the truth."""
    effect = 1.5 if kind == "binary" else 1.0
    features, target, table = draw(people + (100 if design == "independent" else 0), effect, kind, np.random.default_rng(seed))
    split = divided(target, table, design, seed, 100)
    settings = SETTINGS.model_copy(update={"interval": method, "permutations": 99})
    found = evaluate(target, split, {"Linear": linear(features, target)}, Context(table=table), settings).metrics
    score = found.predictors[0].scores[found.primary]
    expected = np.mean([truth(features, target, target.rows(fold.train), effect) for fold in split.folds()])
    if score.low is None or score.high is None:
        return {"hit": None}
    return {"hit": bool(score.low <= expected <= score.high), "width": score.high - score.low}


def alarm(seed: int, *, kind: str, design: str, people: int, sites: int, refits: int) -> dict[str, Any]:
    """The p values of the linear floor where labels are independent of everything but the site."""
    features, target, table = draw(people, 0.0, kind, np.random.default_rng([seed, people, sites]), sites)
    settings = SETTINGS.model_copy(update={"bootstraps": 100, "interval": "percentile", "refit_permutations": refits, "inner_folds": 2})
    split = divided(target, table, design, seed, people // 2, folds=3 if refits else 5)  # fewer folds where each is fitted a hundred times
    floor = linear(features, target, (1.0, 100.0))
    found = evaluate(target, split, {"Linear": floor}, Context(table=table), settings).metrics.predictors[0]
    return {"fixed": found.permutation_p, "refitted": found.refit_p}


def pair(seed: int, *, design: str, people: int) -> dict[str, Any]:
    """Paired p values of two rules that are equally good: each sees one of two features of equal effect."""
    rng = np.random.default_rng([seed, people])
    training = 2000 if design == "independent" else 0
    features, target, table = draw(people + training, 0.8, "binary", rng)
    features[:, 1] += 0.8 * target.observed
    split = divided(target, table, design, seed, training)
    predictors = {"First": linear(features[:, :1], target), "Second": linear(features[:, 1:2], target)}
    settings = SETTINGS.model_copy(update={"permutations": 99, "interval": "percentile"})
    (item,) = evaluate(target, split, predictors, Context(table=table, models=("First",)), settings).metrics.differences
    return {"bootstrap": item.bootstrap_p, "delong": item.delong_p}


def power(seed: int, *, positives: int, negatives: int) -> dict[str, Any]:
    """Whether the effects that the program calls just detectable are found on one independent test set.

    One score of the area that ``detectable_auroc`` gives, against chance; and two correlated ones whose areas differ by
    ``detectable_difference`` of their true standard error.
    """
    rng = np.random.default_rng([seed, positives, negatives])
    labels = np.r_[np.ones(positives, dtype=np.int64), np.zeros(negatives, dtype=np.int64)]
    area = detectable_auroc(positives, negatives)
    scores = rng.normal(size=len(labels)) + np.sqrt(2) * stats.norm.ppf(area) * labels
    ranked = stats.rankdata(scores) / (len(labels) + 1)
    p = permutation_p("binary", labels.astype(float), np.column_stack([1 - ranked, ranked])[None], strata=None, permutations=199, rng=rng)
    stronger, weaker = separations(positives, negatives)
    common = rng.normal(size=len(labels))
    both = np.stack([np.sqrt(0.5) * (common + rng.normal(size=len(labels))) + shift * labels for shift in (stronger, weaker)])
    weights = resample_weights(np.arange(len(labels)), 400, rng)
    gaps = over(weighted_auroc(labels, both[0]), weights) - over(weighted_auroc(labels, both[1]), weights)
    return {
        "single": bool(p is not None and p <= 0.05),
        "bootstrap": bool(bootstrap_p(gaps) <= 0.05),
        "delong": bool(delong(labels, both).difference(0, 1)[2] <= 0.05),
        "stated": detectable_difference(float(np.nanstd(gaps, ddof=1))),
        "true": area_of(stronger) - area_of(weaker),
    }


def area_of(shift: float) -> float:
    """AUROC of two unit normals this far apart."""
    return float(stats.norm.cdf(shift / np.sqrt(2)))


@cache
def separations(positives: int, negatives: int) -> tuple[float, float]:
    """Shifts of two scores, correlated 0.5 within classes, whose areas differ by what is detectable at their standard error.

    The standard error is that of DeLong on a large sample of the same law, scaled to this size.
    """
    rng = np.random.default_rng(0)
    large = 20_000
    labels = np.r_[np.ones(large, dtype=np.int64), np.zeros(large, dtype=np.int64)]
    common = rng.normal(size=2 * large)
    noise = [np.sqrt(0.5) * (common + rng.normal(size=2 * large)) for _ in range(2)]
    weaker = 0.8
    stronger = weaker + 0.5
    for _ in range(6):
        cases, controls = _components(labels, np.stack([noise[0] + stronger * labels, noise[1] + weaker * labels]))
        error = np.sqrt(np.var(cases[0] - cases[1]) / positives + np.var(controls[0] - controls[1]) / negatives)
        stronger = float(np.sqrt(2) * stats.norm.ppf(min(0.999, area_of(weaker) + detectable_difference(float(error)))))
    return stronger, weaker


def _components(labels: np.ndarray, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """DeLong's components of cases and controls: the share of the other class that each beats."""
    cases, controls = scores[:, labels == 1], scores[:, labels == 0]
    return (
        np.stack([np.searchsorted(np.sort(below), above) / len(below) for above, below in zip(cases, controls, strict=True)]),
        np.stack([1 - np.searchsorted(np.sort(above), below) / len(above) for above, below in zip(cases, controls, strict=True)]),
    )


def selected(seed: int, *, people: int, choose: bool) -> dict[str, Any]:
    """The p of one of sixty one-feature rules: the first, or (a cheat) the one that does best on the test people."""
    features, target, table = draw(people, 0.0, "binary", np.random.default_rng([seed, people]), 1)

    def rule(fold: TrainingFold, test: Sequence[str]) -> Forecast:
        rows, others = features[target.rows(fold.target.participants)], features[target.rows(test)]
        gap = rows[fold.labels == 1].mean(0) - rows[fold.labels == 0].mean(0)
        values, labels = (others - rows.mean(0)) * gap, target.observed[target.rows(test)]
        best = int(np.argmax([roc_auc_score(labels, column) for column in values.T])) if choose else 0
        p = expit(values[:, best])
        return Forecast(test=np.column_stack([1 - p, p]))

    split = divided(target, table, "independent", seed, people // 2)
    settings = SETTINGS.model_copy(update={"bootstraps": 100, "interval": "percentile"})
    found = evaluate(target, split, {"Rule": rule}, Context(table=table), settings).metrics.predictors[0]
    return {"fixed": found.permutation_p}


def share(hits: Sequence[bool]) -> str:
    """A share with its exact binomial interval."""
    low, high = stats.binomtest(int(sum(hits)), len(hits)).proportion_ci()
    return f"{np.mean(hits):.1%} [{low:.1%}, {high:.1%}]"


def uniform_p(p: Sequence[float], steps: int) -> float:
    """Kolmogorov–Smirnov p against uniform; p values are counts over ``steps``, so they are spread evenly between neighbours."""
    spread = np.random.default_rng(0).uniform(0, 1 / steps, len(p))
    return float(stats.kstest(np.asarray(p) - spread, "uniform").pvalue)


def too_small_p(p: Sequence[float], steps: int) -> float:
    """The same, one-sided: rejected only where small p values are too common."""
    spread = np.random.default_rng(0).uniform(0, 1 / steps, len(p))
    return float(stats.kstest(np.asarray(p) - spread, "uniform", alternative="greater").pvalue)


def print_coverage(groups: Iterator[tuple[Configuration, list[dict[str, Any]]]]) -> None:
    """Coverage with its binomial interval."""
    print("| score | design | test people | interval | coverage (nominal 95 %) | mean width | cohorts |\n|---|---|---|---|---|---|---|")
    for config, rows in groups:
        known = [row for row in rows if row["hit"] is not None]
        score = "AUROC" if config["kind"] == "binary" else "R²"
        print(f"| {score} | {config['design']} | {config['people']} | {config['method']} | {share([row['hit'] for row in known])} | {np.mean([row['width'] for row in known]):.3f} | {len(known)} |")  # fmt: skip


def print_alarms(groups: Iterator[tuple[Configuration, list[dict[str, Any]]]]) -> None:
    """False alarms; KS of the tests that are exact, corrected for their number (Holm)."""
    print(
        "| p from | target | design | people | sites | p ≤ 0.05 | cohorts | KS p | KS p, too small |\n|---|---|---|---|---|---|---|---|---|"
    )
    exact = []
    for config, rows in groups:
        for name, steps in (("fixed", SETTINGS.permutations + 1), ("refitted", config["refits"] + 1)):
            p = [row[name] for row in rows if row[name] is not None]
            if not p:
                continue
            ks = uniform_p(p, steps)
            if name == "refitted" or config["design"] == "independent":
                exact.append(ks)
            print(f"| {name} | {config['kind']} | {config['design']} | {config['people']} | {config['sites']} | {share([one <= 0.05 for one in p])} | {len(p)} | {ks:.3f} | {too_small_p(p, steps):.3f} |")  # fmt: skip
    print(f"\nSmallest Holm-corrected KS p of the {len(exact)} exact tests: {min(holm(exact)):.3f}")


def print_selection(groups: Iterator[tuple[Configuration, list[dict[str, Any]]]]) -> None:
    """False alarms of a predictor that chooses by the test fold."""
    for config, rows in groups:
        p = [row["fixed"] for row in rows if row["fixed"] is not None]
        how = "chosen on the test people" if config["choose"] else "fixed beforehand"
        print(f"Rule {how}: p ≤ 0.05 in {share([one <= 0.05 for one in p])} of {len(p)} cohorts, KS p {uniform_p(p, SETTINGS.permutations + 1):.1e}")  # fmt: skip


def print_pairs(groups: Iterator[tuple[Configuration, list[dict[str, Any]]]]) -> None:
    """How often two equally good rules seem to differ."""
    print("| design | people | bootstrap p ≤ 0.05 | DeLong p ≤ 0.05 | cohorts |\n|---|---|---|---|---|")
    for config, rows in groups:
        print(f"| {config['design']} | {config['people']} | {share([row['bootstrap'] <= 0.05 for row in rows])} | {share([row['delong'] <= 0.05 for row in rows])} | {len(rows)} |")  # fmt: skip


def print_power(groups: Iterator[tuple[Configuration, list[dict[str, Any]]]]) -> None:
    """How often what should be found in 80 % is found."""
    print("| cases | controls | detectable AUROC | found | detectable difference: true | as stated (mean) | found by bootstrap | found by DeLong | test sets |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    for config, rows in groups:
        m, n = config["positives"], config["negatives"]
        print(f"| {m} | {n} | {detectable_auroc(m, n):.3f} | {share([row['single'] for row in rows])} | {rows[0]['true']:.3f} | {np.mean([row['stated'] for row in rows]):.3f} | {share([row['bootstrap'] for row in rows])} | {share([row['delong'] for row in rows])} | {len(rows)} |")  # fmt: skip


Printer = Callable[[Iterator[tuple[Configuration, list[dict[str, Any]]]]], None]
STUDIES: dict[str, tuple[Callable[..., dict[str, Any]], list[Configuration], int, Printer]] = {
    "coverage": (
        cover,
        [
            {"kind": kind, "design": design, "people": people, "method": method}
            for kind, methods in (("binary", ("bca", "percentile")), ("continuous", ("bca",)))
            for design in ("independent", "cross-validated")
            for people in (40, 100, 300)
            for method in methods
        ],
        400,
        print_coverage,
    ),
    "alarms": (
        alarm,
        [
            {"kind": kind, "design": design, "people": people, "sites": sites, "refits": 0}
            for kind in ("binary", "continuous")
            for design in ("independent", "cross-validated")
            for people, sites in ((40, 1), (80, 3), (160, 6))
        ],
        200,
        print_alarms,
    ),
    "refits": (
        alarm,
        [
            {"kind": kind, "design": "cross-validated", "people": people, "sites": sites, "refits": 99}
            for kind in ("continuous", "binary")
            for people, sites in ((48, 3),)
        ],
        200,
        print_alarms,
    ),
    "selection": (selected, [{"people": 60, "choose": choose} for choose in (False, True)], 200, print_selection),
    "pairs": (
        pair,
        [{"design": design, "people": people} for design in ("independent", "cross-validated") for people in (60, 200)],
        400,
        print_pairs,
    ),
    "power": (power, [{"positives": m, "negatives": n} for m, n in ((20, 20), (30, 50), (15, 85), (100, 100))], 1000, print_power),
}


def one(job: tuple[str, Configuration, int]) -> dict[str, Any]:
    """One cohort, as a line of the results."""
    study, config, seed = job
    return {"study": study, "config": config, "seed": seed, **STUDIES[study][0](seed, **config)}


def run(study: str, cohorts: int, processes: int, out: Path) -> list[dict[str, Any]]:
    """Every cohort of a study; those in ``out`` are not computed again."""
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()] if out.is_file() else []
    done = {json.dumps([row["study"], row["config"], row["seed"]], sort_keys=True) for row in rows}
    jobs = [(study, config, seed) for config in STUDIES[study][1] for seed in range(cohorts)]
    jobs = [job for job in jobs if json.dumps(job, sort_keys=True) not in done]
    with out.open("a", encoding="utf-8") as file, ExitStack() as stack:
        pool = stack.enter_context(ProcessPoolExecutor(processes, mp_context=get_context("spawn"))) if processes > 1 else None
        for row in map(one, jobs) if pool is None else pool.map(one, jobs, chunksize=5):
            file.write(json.dumps(row) + "\n")
            file.flush()
            rows.append(row)
    return [row for row in rows if row["study"] == study and row["seed"] < cohorts]


def main() -> None:
    """Run one study and print its table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--cohorts", type=int, help="of each configuration")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one cohort each")
    given = parser.parse_args()
    _, configurations, cohorts, show = STUDIES[given.study]
    rows = run(given.study, given.cohorts or cohorts, given.processes, given.out)
    show((config, [row for row in rows if row["config"] == config]) for config in configurations)


if __name__ == "__main__":
    main()
