"""False alarms of the whole chain on cohorts in which diagnosis is independent of everything.

One tiny model is pretrained on people of its own. For each null cohort it is tuned on the discovery people, everything that is
chosen being chosen on inner folds, and applied once to the holdout people; p comes from permuting their labels within sites
against the fixed predictions. The share of p <= 0.05 must lie in the binomial 95 % interval of 5 %. With --refits the model is
also tuned again on every permutation (slow: for a few cohorts).

    python benchmarks/null_cohorts.py --cohorts 200 --nprocs 2 --out null_cohorts.json
    python benchmarks/null_cohorts.py --cohorts 3 --refits 19 --out null_refits.json
"""

from __future__ import annotations

import argparse
import functools
import json
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from scipy import stats

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.config import Execution
from brainfm_cli.learning.evaluation import Context, EvaluationSettings, evaluate
from brainfm_cli.learning.pretraining import PretrainingSettings, prepare, pretrain_model
from brainfm_cli.learning.splits import fixed_split
from brainfm_cli.learning.targets import participant_table, read_target
from brainfm_cli.learning.tuned import TunedPredictor, prepare_inputs
from brainfm_cli.learning.tuning import TuningSettings
from brainfm_cli.stages.simulate import SimulateSettings, write_cohort
from brainfm_cli.systems import load_system
from brainfm_cli.systems.brain_graph import BrainGraphSettings

_PRETRAINING_SEED = 100_000


def simulate(folder: Path, *, seed: int, people: int, atlas: str) -> Cohort:
    """A null cohort of region series."""
    population = {"disorders": ["Arvel"], "holdout_share": 0.4}
    settings = SimulateSettings.from_values(
        {"level": "series", "participants": people, "seed": seed, "effect": 0.0, "atlases": [atlas], "population": population}
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


@functools.lru_cache(maxsize=1)
def _system(model: Path) -> Any:
    torch.set_num_threads(1)
    return load_system(model)


def one(seed: int, *, model: Path, people: int, atlas: str, refits: int) -> dict[str, float | None]:
    """AUROC and p of one null cohort."""
    system = _system(model)
    with tempfile.TemporaryDirectory() as scratch:
        cohort = simulate(Path(scratch), seed=seed, people=people, atlas=atlas)
        target, table = read_target(cohort, "diagnosis_binary"), participant_table(cohort)
        sides = {side: [name for name in target.participants if table.loc[name, "split"] == side] for side in ("discovery", "holdout")}
        split = fixed_split(target, train=sides["discovery"], test=sides["holdout"], why="holdout")
        inputs = prepare_inputs(system, cohort, target.participants, sorted(cohort.atlases))
        predictor = TunedPredictor(prepared=lambda _fold: (system, inputs), settings=TuningSettings(epochs=2, stops=1))
        settings = EvaluationSettings(bootstraps=100, interval="percentile", permutations=999, refit_permutations=refits, groups=())
        result = evaluate(target, split, {"model": predictor}, Context(table=table, models=("model",)), settings)
    found = result.metrics.of("model")
    return {
        "seed": seed,
        "auroc": float(found.scores["auroc"].value or "nan"),
        "p": float("nan") if found.permutation_p is None else found.permutation_p,
        "refit_p": found.refit_p,
    }


def main() -> None:
    """Print and write the rate of false alarms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cohorts", type=int, default=200)
    parser.add_argument("--people", type=int, default=120)
    parser.add_argument("--atlas", default="Schaefer100")
    parser.add_argument("--refits", type=int, default=0, help="permutations through the whole tuning, of each cohort")
    parser.add_argument("--epochs", type=int, default=5, help="of the shared pretraining")
    parser.add_argument("--nprocs", type=int, default=2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        model = pretrain(Path(folder) / "model", people=arguments.people, atlas=arguments.atlas, epochs=arguments.epochs)
        work = functools.partial(one, model=model, people=arguments.people, atlas=arguments.atlas, refits=arguments.refits)
        with ProcessPoolExecutor(arguments.nprocs, mp_context=get_context("spawn")) as pool:
            rows = list(pool.map(work, range(1, arguments.cohorts + 1)))
    alarms = sum(row["p"] <= 0.05 for row in rows)
    low, high = stats.binom.interval(0.95, len(rows), 0.05)
    result = {
        "cohorts": len(rows),
        "people": arguments.people,
        "false_alarms": alarms,
        "binomial_interval": [int(low), int(high)],
        "inside": bool(low <= alarms <= high),
        "mean_auroc": sum(row["auroc"] for row in rows) / len(rows),
        "refit_p": [row["refit_p"] for row in rows if row["refit_p"] is not None],
        "minutes": round((time.monotonic() - started) / 60, 1),
    }
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.write_text(json.dumps({**result, "rows": rows}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
