"""False alarms of the whole chain on cohorts in which diagnosis is independent of everything.

One tiny model is pretrained on people of its own. For each null cohort it is tuned on the discovery people, everything that is
chosen being chosen on inner folds, and applied once to the holdout people; p comes from permuting their labels within sites
against the fixed predictions. The share of p <= 0.05 must lie in the binomial 95 % interval of 5 %. With --refits the model is
also tuned again on every permutation (slow: for a few cohorts). ``few-shot`` tunes on five discovery people of each class alone;
``zero-shot`` reads the text of the cohort's disorder, which has no effect, with a model aligned with other people's.

A head that finds nothing in ten people says the same of everybody. Every permutation then ties with the labels as they are: p is 1
and the test errs on the safe side, but such p cannot be uniform. Whether predictions vary does not depend on the labels tested, so
that p of the cohorts where they do must be uniform; the Kolmogorov-Smirnov test takes those, and the others are counted.

    python benchmarks/null_cohorts.py --cohorts 200 --nprocs 2 --out null_cohorts.jsonl
    python benchmarks/null_cohorts.py --cohorts 200 --kinds few-shot zero-shot --out null_few.jsonl
    python benchmarks/null_cohorts.py --cohorts 1000 --first 201 --kinds zero-shot --out null_more.jsonl
    python benchmarks/null_cohorts.py --cohorts 3 --refits 19 --out null_refits.jsonl

Started again with the same --out, it goes on with the cohorts that are missing.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import stats

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.config import Execution
from brainfm_cli.learning.evaluation import Context, EvaluationSettings, evaluate
from brainfm_cli.learning.pretraining import PretrainingSettings, prepare, pretrain_model
from brainfm_cli.learning.splits import fixed_split
from brainfm_cli.learning.targets import participant_table, read_target
from brainfm_cli.learning.texts import DisorderText
from brainfm_cli.learning.tuned import TunedPredictor, prepare_inputs
from brainfm_cli.learning.tuning import TuningSettings
from brainfm_cli.learning.uncertainty import permutation_p
from brainfm_cli.learning.zero_shot import TextPredictor
from brainfm_cli.stages.simulate import SimulateSettings, write_cohort
from brainfm_cli.systems import load_system
from brainfm_cli.systems.brain_graph import BrainGraphSettings
from brainfm_cli.systems.brain_graph import texts as alignment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from brainfm_cli.learning.targets import Target

_PRETRAINING_SEED = 100_000
SHOTS = 5
"""Labelled people of each class, few-shot."""


def simulate(folder: Path, *, seed: int, people: int, atlas: str, effect: float = 0.0, disorders: Sequence[str] = ("Arvel",)) -> Cohort:
    """A cohort of region series; a null cohort by default."""
    population = {"disorders": list(disorders), "holdout_share": 0.4}
    settings = SimulateSettings.from_values(
        {"level": "series", "participants": people, "seed": seed, "effect": effect, "atlases": [atlas], "population": population}
    )
    write_cohort(folder, settings, ())
    return Cohort.open(folder)


def pretrain(folder: Path, *, people: int, atlas: str, epochs: int) -> Path:
    """The shared model."""
    with tempfile.TemporaryDirectory() as scratch:
        cohort = simulate(Path(scratch), seed=_PRETRAINING_SEED, people=people, atlas=atlas)
        settings = PretrainingSettings(epochs=epochs)
        prepared = prepare(BrainGraphSettings(kind="brain-graph", preset="tiny"), settings, cohort, sorted(cohort.participants.index))
        pretrain_model(prepared, settings, Execution(device="cpu"), folder)
    return folder


def align(folder: Path, model: Path, *, people: int, atlas: str, encoder: str) -> Path:
    """The shared model aligned with the texts of twelve disorders of other people, who have them."""
    simulate(folder / "people", seed=_PRETRAINING_SEED + 1, people=people, atlas=atlas, effect=1.0, disorders=())
    command = ["align", folder / "people", folder / "aligned", "group", "--model", model, "--target", "diagnosis", "--device", "cpu"]
    command += ["--set", f"disorders={folder / 'people' / 'disorders.tsv'}", f"encoder={encoder}"]
    subprocess.run([sys.executable, "-m", "brainfm_cli", *map(str, command)], check=True)
    (found,) = (folder / "aligned" / "models").iterdir()
    return found


@functools.lru_cache(maxsize=1)
def _system(model: Path) -> Any:
    torch.set_num_threads(1)
    return load_system(model)


@functools.lru_cache(maxsize=1)
def _aligned(model: Path) -> alignment.Aligned:
    torch.set_num_threads(1)
    return alignment.Aligned.load(model, alignment.alignable(load_system(model), model))


def one(seed: int, *, models: Mapping[str, Path], people: int, atlas: str, refits: int, relabel: int = 0) -> dict[str, Any]:
    """AUROC and p of one null cohort, by kind."""
    row: dict[str, Any] = {"seed": seed}
    with tempfile.TemporaryDirectory() as scratch:
        cohort = simulate(Path(scratch), seed=seed, people=people, atlas=atlas)
        target, table = read_target(cohort, "diagnosis_binary"), participant_table(cohort)
        sides = {side: [name for name in target.participants if table.loc[name, "split"] == side] for side in ("discovery", "holdout")}
        settings = EvaluationSettings(bootstraps=100, interval="percentile", permutations=999, refit_permutations=refits, groups=())
        for kind, model in models.items():
            train, predictor = sides["discovery"], None
            if kind == "zero-shot":
                aligned = _aligned(model)
                described = pd.read_csv(Path(scratch) / "disorders.tsv", sep="\t").set_index("name").loc["Arvel"]
                text = DisorderText(name="Arvel", abbreviation=described["abbreviation"], description=described["description"])
                logits = aligned.logits(aligned.inputs(cohort, target.participants), target.participants, aligned.vectors([text]))[:, 0]
                predictor = TextPredictor(scores=dict(zip(target.participants, logits.tolist(), strict=True)))
            else:
                if kind == "few-shot":
                    train = few_of(target, train, seed=seed)
                system = _system(model)
                inputs = prepare_inputs(system, cohort, target.participants, sorted(cohort.atlases))
                tuning = TuningSettings(epochs=2, stops=1)
                predictor = TunedPredictor(prepared=lambda _fold, given=(system, inputs): given, settings=tuning)
            split = fixed_split(target, train=train, test=sides["holdout"], why="holdout")
            result = evaluate(target, split, {"model": predictor}, Context(table=table, models=("model",)), settings)
            found = result.metrics.of("model")
            row[kind] = {"auroc": found.scores["auroc"].value, "p": found.permutation_p, "refit_p": found.refit_p}
            if isinstance(predictor, TextPredictor):
                row[kind]["relabelled"] = relabelled(predictor, table.loc[sides["holdout"], "site"], relabel, seed=seed)
    return row


def relabelled(predictor: TextPredictor, sites: pd.Series, count: int, *, seed: int) -> list[float]:
    """P of a fixed rule where the diagnoses of its people are drawn anew, ``count`` times: nothing but the test itself is tested."""
    rng = np.random.default_rng([seed, 1])
    scores = np.array([predictor.scores[name] for name in sites.index])
    predicted = np.stack([-scores, scores], axis=1)[None]
    drawn = rng.integers(0, 2, (count, len(scores))).astype(np.float64)
    found = [permutation_p("binary", labels, predicted, strata=sites.to_numpy(), permutations=999, rng=rng) for labels in drawn]
    return [p for p in found if p is not None]


def few_of(target: Target, people: Sequence[str], *, seed: int) -> list[str]:
    """Five people of each class, drawn from ``people``."""
    rng = np.random.default_rng(seed)
    labels = target.observed[target.rows(people)]
    return [str(name) for value in np.unique(labels) for name in rng.choice(np.array(people)[labels == value], SHOTS, replace=False)]


def summary(rows: Sequence[dict[str, Any]], kind: str) -> dict[str, Any]:
    """How often p is small, and what chance allows."""
    found = [row[kind] for row in rows if kind in row and row[kind]["p"] is not None]
    p = np.array([one["p"] for one in found])
    low, high = stats.binom.interval(0.95, len(p), 0.05)
    alarms = int((p <= 0.05).sum())
    auroc = np.array([one["auroc"] for one in found])
    constant = (p == 1) & (auroc == 0.5)
    return {
        "kind": kind,
        "cohorts": len(p),
        "false_alarms": alarms,
        "binomial_interval": [int(low), int(high)],
        "inside": bool(low <= alarms <= high),
        "constant_predictions": int(constant.sum()),
        "ks_p_uniform": round(float(stats.kstest(p[~constant], "uniform").pvalue), 3),
        "mean_auroc": round(float(auroc.mean()), 4),
        "mean_auroc_se": round(float(auroc.std(ddof=1) / len(auroc) ** 0.5), 4),
        **_relabelled([p for one in found for p in one.get("relabelled", [])]),
        "refit_p": [one["refit_p"] for one in found if one["refit_p"] is not None],
    }


def _relabelled(p: Sequence[float]) -> dict[str, Any]:
    """The same of diagnoses drawn anew, where that was asked for."""
    if not p:
        return {}
    alarms = int((np.array(p) <= 0.05).sum())
    return {
        "relabelled": len(p),
        "relabelled_alarms": alarms,
        "relabelled_interval": [int(x) for x in stats.binom.interval(0.95, len(p), 0.05)],
    }


def main() -> None:
    """Print and write the rate of false alarms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=int, default=200)
    parser.add_argument("--first", type=int, default=1, help="seed of the first cohort; the last one's is --cohorts")
    parser.add_argument("--relabel", type=int, default=0, help="zero-shot: draw the diagnoses of each cohort anew, so many times")
    parser.add_argument("--kinds", nargs="+", choices=["tuned", "few-shot", "zero-shot"], default=["tuned"])
    parser.add_argument("--people", type=int, default=120)
    parser.add_argument("--atlas", default="Schaefer100")
    parser.add_argument("--refits", type=int, default=0, help="permutations through the whole tuning, of each cohort")
    parser.add_argument("--epochs", type=int, default=5, help="of the shared pretraining")
    parser.add_argument("--aligned-people", type=int, default=400, help="people of the alignment, for zero-shot")
    parser.add_argument("--encoder", default="all-minilm-l6-v2", help="text encoder of zero-shot: a name or a folder")
    parser.add_argument("--nprocs", type=int, default=2)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines, one per cohort")
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.out.read_text(encoding="utf-8").splitlines()] if arguments.out.exists() else []
    missing = [seed for seed in range(arguments.first, arguments.cohorts + 1) if seed not in {row["seed"] for row in rows}]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model = pretrain(folder / "model", people=arguments.people, atlas=arguments.atlas, epochs=arguments.epochs)
        models = dict.fromkeys(arguments.kinds, model)
        if "zero-shot" in models:
            models["zero-shot"] = align(folder, model, people=arguments.aligned_people, atlas=arguments.atlas, encoder=arguments.encoder)
        sizes = {"people": arguments.people, "atlas": arguments.atlas, "refits": arguments.refits, "relabel": arguments.relabel}
        work = functools.partial(one, models=models, **sizes)
        with (
            ProcessPoolExecutor(arguments.nprocs, mp_context=get_context("spawn")) as pool,
            arguments.out.open("a", encoding="utf-8") as out,
        ):
            for row in pool.map(work, missing):
                rows.append(row)
                print(json.dumps(row), file=out, flush=True)
    for kind in arguments.kinds:
        print(json.dumps(summary(rows, kind), indent=2))


if __name__ == "__main__":
    main()
