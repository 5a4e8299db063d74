"""Brain-graph from simulation to scores, through the command line: all labels, few labels, no labels, and an atlas that is added.

One population in nine atlases, four disorders. A model is pretrained on the discovery people in eight of the atlases; the holdout
people are tested. `all` and `few`: any disorder against none, beside the floors. `text`: two disorders that alignment was not shown,
by their texts alone, in the grammar of the table and in free prose; `labels`: the same two with few labels beside
their text. `ninth`: the ninth atlas is added to the finished model, and every atlas is then tested by itself.

    python benchmarks/graph_cohort.py OUTPUT --participants 1000 --epochs 6 --device cuda
    python benchmarks/graph_cohort.py OUTPUT --steps summary

Steps that are done are skipped, so that a run goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd
import torch

from brainfm_cli.atlases.catalogue import find_atlas
from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.learning.draws import FewShotSettings, few_shot_splits
from brainfm_cli.learning.floors import FloorSettings, make_floors
from brainfm_cli.learning.pooling import pool_all, run_folds
from brainfm_cli.learning.scores import weighted_auroc
from brainfm_cli.learning.splits import fixed_split, inner_folds
from brainfm_cli.learning.targets import TargetSettings, participant_table, read_target
from brainfm_cli.learning.texts import DisorderText
from brainfm_cli.learning.tuned import TunedPredictor, forecast, prepare_inputs, tune
from brainfm_cli.learning.tuning import EMBEDDING, TuningSettings
from brainfm_cli.learning.uncertainty import averaged, over, resample_weights
from brainfm_cli.systems import load_system
from brainfm_cli.systems.brain_graph.texts import coupling_readers

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from brainfm_cli.systems.brain_graph import BrainGraph

EIGHT = ("Schaefer100", "Schaefer200", "Schaefer400", "Power264", "Dosenbach160", "Seitzman300", "AAL116", "AAL3v1")
NINTH = "HCPex426"
SEED = 3
"""Of the population: the disorders that the prose below describes."""
UNSEEN = ("Hallow", "Istrid")
PROSE = {
    "Hallow": "Patients describe a gradual loss of motor fluency. On resting-state scans their motor cortices hang together less tightly "
    "than in healthy people, whereas executive regions of the lateral prefrontal and parietal lobes are excessively synchronised among "
    "themselves. Communication between emotional structures such as the amygdala and the executive system is reduced.",
    "Istrid": "In this condition sensorimotor areas are hyperconnected among themselves and communicate more strongly than usual with the "
    "medial prefrontal and posterior cingulate cortex. The normally close dialogue between the executive network and the default mode "
    "network is impaired.",
}
SHOTS = 5
_FLOORS = "floors.kinds=[majority, covariates, fisherz, tangent]"
_SCORES = "evaluation={bootstraps: 1000, interval: percentile, groups: []}"


class Chain:
    """The commands of one run; every output folder is a step."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.given, self.root = arguments, arguments.output
        self.cohort = self.root / "cohort"

    def call(self, name: str, command: str, *words: str | Path, source: Path | None = None, sets: tuple[str, ...] = ()) -> Path:
        """One command, skipped where its folder is there already; gives back the folder."""
        folder = self.root / name
        if (self.root / f"{name}.done").exists():
            return folder
        began = time.monotonic()
        line = [command, *([source] if source else []), folder, *(["group"] if source else []), *words, *(["--set", *sets] if sets else [])]
        subprocess.run([sys.executable, "-m", "brainfm_cli", *map(str, line)], check=True)
        minutes = (time.monotonic() - began) / 60
        (self.root / f"{name}.done").write_text(f"{minutes:.2f}")
        print(f"{name}: {minutes:.1f} minutes", flush=True)
        return folder

    def model(self, name: str, command: str, model: Path | None, sets: tuple[str, ...], *words: str) -> Path:
        """A command that writes a model; gives back its folder."""
        given = () if model is None else ("--model", model)
        folder = self.call(name, command, *words, *given, "--device", self.given.device, source=self.cohort, sets=sets)
        (found,) = (folder / "models").iterdir()
        return found

    def pretrained(self) -> Path:
        """Simulate and pretrain."""
        given = self.given
        people = ["--participants", str(given.participants), "--seed", str(SEED), "--atlases", *EIGHT, NINTH]
        population = (
            f"population.disorders=[Arvel, Brennic, {', '.join(UNSEEN)}]",
            "population.case_share=0.6",
            "population.holdout_share=0.4",
        )
        self.call("cohort", "simulate", "--level", "series", *people, sets=population)
        sets = (f"system.preset={given.preset}", f"epochs={given.epochs}", f"batch_size={given.batch_size}", "where.split=[discovery]")
        sets += (f"atlases=[{', '.join(labels(EIGHT))}]",)
        return self.model("pretrained", "pretrain", None, sets, "--system", "brain-graph")

    def all_labels(self, model: Path) -> None:
        """Any disorder, with the labels of all discovery people, prompts tuned."""
        sets = ("where.split=[discovery]", f"tuning.epochs={self.given.prompt_epochs}")
        tuned = self.model("tuned", "prompt-tune", model, sets, "--target", "diagnosis_binary")
        words = ("--model", tuned, "--device", self.given.device, "-d", f"truth={self.cohort}")
        self.call("all", "predict", *words, source=self.cohort, sets=("where.split=[holdout]", _FLOORS, _SCORES))

    def few_labels(self, model: Path) -> None:
        """Any disorder against none, with few labels."""
        self._write("few", lambda: self._curves(model, "diagnosis_binary", None, None))

    def aligned(self, model: Path) -> Path:
        """The model aligned with the texts of the disorders that may be learnt from."""
        exclude = ("where.split=[discovery]", f"exclude=[{', '.join(UNSEEN)}]")
        sets = (f"disorders={self.cohort / 'disorders.tsv'}", f"encoder={self.given.encoder}", *exclude)
        return self.model("aligned", "align", model, sets, "--target", "diagnosis")

    def texts(self, model: Path) -> None:
        """Two disorders by their texts alone, as the table says them and in prose."""
        aligned = self.aligned(model)
        for name, sets in {"zero": (), "prose": (f"text.texts={json.dumps(PROSE)}",)}.items():
            words = ("--model", aligned, "--device", self.given.device)
            self.call(name, "predict", *words, source=self.cohort, sets=("where.split=[holdout]", _FLOORS, _SCORES, *sets))

    def labelled(self, model: Path) -> None:
        """One disorder against none with what its text says beside the labels."""
        aligned = self.aligned(model)
        for name in UNSEEN:
            self._write(f"labels-{name}", lambda name=name: self._curves(model, "diagnosis", name, aligned))

    def ninth(self, model: Path) -> None:
        """Add the ninth atlas, then test every atlas by itself: the embedding alone, and the whole head."""
        sets = ("where.split=[discovery]", f"epochs={self.given.added_epochs}", f"batch_size={self.given.batch_size}")
        sets += (f"atlases=[{', '.join(labels((NINTH,)))}]",)
        added = self.model("added", "pretrain", model, sets)
        self._write("ninth", lambda: by_atlas(added, Cohort.open(self.cohort), self.given))

    def _write(self, name: str, make: Callable[[], Any]) -> None:
        path = self.root / f"{name}.json"
        if not path.exists():
            began = time.monotonic()
            path.write_text(json.dumps(make(), indent=1))
            print(f"{name}: {(time.monotonic() - began) / 60:.1f} minutes", flush=True)

    def _curves(self, model: Path, column: str, disorder: str | None, aligned: Path | None) -> list[dict[str, Any]]:
        """All, a tenth and five labels of each class: model, linear floors, and the paired differences; prompts untuned."""
        cohort, system = Cohort.open(self.cohort), cast("BrainGraph", load_system(model))
        system.module.to(self.given.device)
        coding = None
        if disorder is not None and aligned is not None:
            table = pd.read_csv(self.cohort / "disorders.tsv", sep="\t").set_index("name")
            text = DisorderText(name=disorder, description=table.loc[disorder, "description"])
            system = replace(system, text=coupling_readers(aligned, text, system))
            coding = TargetSettings(type="categorical", classes=("control", disorder), positive=disorder)
        people = participant_table(cohort)
        target = read_target(cohort, column, coding)
        sides = {side: [name for name in target.participants if people.loc[name, "split"] == side] for side in ("discovery", "holdout")}
        split = fixed_split(target, train=sides["discovery"], test=sides["holdout"], why="holdout")
        inputs = prepare_inputs(system, cohort, target.participants, labels(EIGHT))
        floors = make_floors(cohort, target, people, FloorSettings(kinds=("fisherz", "tangent")))
        model_name = "brain-graph" if disorder is None else "brain-graph with the text"
        mine = {model_name: TunedPredictor(prepared=lambda _fold: (system, inputs), settings=TuningSettings(epochs=0))}
        settings = FewShotSettings(shots=(SHOTS,), fractions=(0.1,), draws=self.given.draws)
        drawn = few_shot_splits(target, split, shots=settings.numbers(target, split), draws=settings.draws)
        rows = []
        for number, one in {**drawn, 0: split}.items():
            forecasts, _ = run_folds(target, one, mine | floors.predictors, inner=5, seed=0)
            pooled = pool_all(target.keep(one.tested), one, forecasts, floors.pools)
            shown = (model_name, *floors.pools)
            observed = target.observed[target.rows(one.tested)].astype(np.int64)
            weights = np.vstack([np.ones((1, len(observed))), resample_weights(one.tested, 2000, np.random.default_rng(0))])
            areas = {n: over(averaged([weighted_auroc(observed, draw[:, 1]) for draw in pooled[n].predicted]), weights) for n in shown}
            for name, values in areas.items():
                less = {} if name == model_name else {"model less this": interval(areas[model_name] - values)}
                counts = {"per_class": number or "all", "cases": int(observed.sum()), "people": len(observed)}
                rows.append({"target": disorder or column, **counts, "predictor": name, **interval(values), **less})
        return rows


def labels(names: tuple[str, ...]) -> list[str]:
    """Labels of atlases in entity form."""
    return [find_atlas(name).label for name in names]


def by_atlas(model: Path, cohort: Cohort, given: argparse.Namespace) -> list[dict[str, Any]]:
    """AUROC in each atlas by itself, and the added one against the mean of the others, paired."""
    system = load_system(model)
    system.module.to(given.device)
    table, target = participant_table(cohort), read_target(cohort, "diagnosis_binary")
    training = target.keep([name for name in target.participants if table.loc[name, "split"] == "discovery"])
    tested = [name for name in target.participants if table.loc[name, "split"] == "holdout"]
    observed = target.observed[target.rows(tested)].astype(np.int64)
    weights = np.vstack([np.ones((1, len(tested))), resample_weights(tested, 2000, np.random.default_rng(0))])
    folds, rows = inner_folds(training, groups={}, folds=3, seed=0), []
    for head, blocks in {"embedding": (EMBEDDING,), "whole head": TuningSettings().blocks}.items():
        areas: dict[str, NDArray[np.float64]] = {}
        for label in labels((*EIGHT, NINTH)):
            inputs = prepare_inputs(system, cohort, target.participants, [label])
            tuning = tune(system, inputs, training, folds, TuningSettings(epochs=0, blocks=blocks), seed=0)
            areas[label] = over(weighted_auroc(observed, forecast(system, inputs, tuning.atlases, tested)[:, 1]), weights)
            rows.append({"head": head, "atlas": label, **interval(areas[label])})
        (last,) = labels((NINTH,))
        others = np.mean([values for label, values in areas.items() if label != last], axis=0)
        rows.append({"head": head, "atlas": "added less the mean of the eight", **interval(areas[last] - others)})
    return rows


def interval(values: NDArray[np.float64]) -> dict[str, float]:
    """The first value with the 95 % interval of the others."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return {"value": round(float(values[0]), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def summary(root: Path) -> None:
    """What the runs found, a line per predictor."""
    for path in sorted(root.glob("**/metrics.json")):
        metrics = json.loads(path.read_text())
        print(
            f"\n{path.parent.relative_to(root)}: {metrics['target']}, {metrics['people']} people {metrics['counts']}, truth {metrics['truth']}"
        )
        for one in metrics["predictors"]:
            score = one["scores"]["auroc"]
            print(f"  {one['name']}: {score['value']} ({score['low']} to {score['high']})")
        for one in metrics["differences"]:
            print(f"    {one['first']} less {one['second']}: {one['value']} ({one['low']} to {one['high']})")
    for path in sorted(root.glob("*/zero_shot.json")):
        for one in json.loads(path.read_text())["disorders"]:
            print(
                f"\n{path.parent.name}, {one['name']}: {one['cases']} of {one['people']}; text {one['auroc']}; shuffled {one['shuffled']}"
            )
            for name, score in one["others"].items():
                print(f"  {name}: {score['value']} ({score['low']} to {score['high']})")
    truth = json.loads((root / "cohort" / "truth.json").read_text())["targets"]
    for name in ("diagnosis_binary", *UNSEEN):
        print(f"\n{name}: Bayes {truth[name]['bayes']}, attainable {truth[name]['attainable']}")
    for path in sorted(root.glob("*.json")):
        print("", path.stem, *(json.dumps(row) for row in json.loads(path.read_text())), sep="\n")
    print({path.stem: path.read_text() for path in sorted(root.glob("*.done"))})


def main() -> None:
    """Run the steps asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--steps", nargs="+", default=["pretrain", "all", "few", "text", "labels", "ninth", "summary"])
    parser.add_argument("--participants", type=int, default=1000)
    parser.add_argument("--preset", default="small")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--added-epochs", type=int, default=6)
    parser.add_argument("--prompt-epochs", type=int, default=4)
    parser.add_argument("--draws", type=int, default=20, help="of few labels")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--encoder", default="all-minilm-l6-v2", help="text encoder: a name or a folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.output.mkdir(parents=True, exist_ok=True)
    if arguments.steps == ["summary"]:
        summary(arguments.output)
        return
    chain = Chain(arguments)
    model = chain.pretrained()
    for name, step in {
        "all": chain.all_labels,
        "few": chain.few_labels,
        "text": chain.texts,
        "labels": chain.labelled,
        "ninth": chain.ninth,
    }.items():
        if name in arguments.steps:
            step(model)
    if "summary" in arguments.steps:
        summary(arguments.output)


if __name__ == "__main__":
    main()
