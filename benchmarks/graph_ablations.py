"""What each part of brain-graph is worth: `tiny` with one part taken away at a time, on simulated people.

A cohort is simulated in several atlases; models are pretrained on its discovery people; one disorder, which meta-learning and
alignment never saw, is then told from none, in one functional and one anatomical atlas, with all labels and with five people
of each class, and by text alone. An atlas that a model was not pretrained in is added to it first (backbone frozen). The
people tested are the holdout people. Two heads: the embedding alone, which shows what the encoder is worth, and everything
that the shipped head reads (connectivity too), which hides it.

    python benchmarks/graph_ablations.py run --seed 1 --out ablations1.npz
    python benchmarks/graph_ablations.py table ablations1.npz ablations2.npz ablations3.npz

Every seed is another population, with other disorders. Intervals resample the people tested, within seeds; the models stay.

`--cohort` takes a packed cohort of real people in place of the simulation: half of them, drawn by the seed, are tested. Rows that need
disorders or their texts are then left out.

    python benchmarks/graph_ablations.py run --cohort COHORT --target sex --functional BASC064 --anatomical AAL116 --seed 1 --out sex1.npz
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional

from brainfm_cli.atlases.catalogue import find_atlas
from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.config import Execution
from brainfm_cli.learning.draws import few_shot_splits
from brainfm_cli.learning.meta import MetaSettings, list_tasks, meta_learn
from brainfm_cli.learning.pretraining import PretrainingSettings, prepare, prepare_addition, pretrain_model
from brainfm_cli.learning.scores import weighted_auroc
from brainfm_cli.learning.splits import Fold, fixed_split, inner_folds
from brainfm_cli.learning.targets import TargetSettings, participant_table, read_target
from brainfm_cli.learning.texts import DisorderText
from brainfm_cli.learning.tuned import forecast, prepare_inputs, tune
from brainfm_cli.learning.tuning import EMBEDDING, AtlasInputs, TuningSettings, select_rows
from brainfm_cli.learning.uncertainty import averaged, over, resample_weights
from brainfm_cli.stages.simulate import SimulateSettings, write_cohort
from brainfm_cli.systems.brain_graph import BrainGraph, BrainGraphSettings, LossSettings
from brainfm_cli.systems.brain_graph import texts as alignment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from brainfm_cli.learning.targets import Target

FUNCTIONAL = ("Schaefer100", "Schaefer200", "Schaefer400", "Power264", "Dosenbach160", "Seitzman300")
ANATOMICAL = ("AAL116", "AAL3v1")
DISORDERS = ("Arvel", "Brennic", "Caldor", "Hallow")
TESTED = "Hallow"
"""The disorder that meta-learning and alignment are not shown."""
BASE = "all atlases"
RANDOM = "random frozen encoder"
SHOTS = 5
_BOTH = ("embedding", "whole head")
_BLOCKS = {"embedding": (EMBEDDING,), "whole head": TuningSettings().blocks}
_LOSSES = {"masked nodes": "node", "masked edges": "edge", "window contrast": "contrast", "cross-atlas contrast": "cross_atlas"}


@dataclass(frozen=True, kw_only=True)
class Study:
    """One population and what is asked of it."""

    cohort: Cohort
    """Everybody."""
    target: Target
    """The tested disorder against none, or what is asked of real people."""
    discovery: tuple[str, ...]
    """People to pretrain on; nobody of them is tested."""
    whole: Fold
    """Discovery people train, holdout people test."""
    few: tuple[Fold, ...]
    """The same with five training people of each class, drawn several times."""
    labels: tuple[str, str]
    """A functional and an anatomical atlas, in which everything is tested."""
    execution: Execution
    """Device."""
    work: Path
    """Scratch."""
    arguments: argparse.Namespace
    """Sizes."""

    def pretrain(self, name: str, atlases: Sequence[str] = (), **off: float) -> BrainGraph:
        """A model pretrained on the discovery people, in ``atlases`` (labels; all where empty); tested atlases it lacks are added."""
        people, given = list(self.discovery), self.arguments
        settings = PretrainingSettings(epochs=given.epochs, batch_size=given.batch_size, atlases=tuple(atlases), seed=given.seed)
        factory = BrainGraphSettings(kind="brain-graph", preset="tiny", losses=LossSettings(**off))
        folder = self.work / name.replace(" ", "-")
        prepared = prepare(factory, settings, self.cohort, people)
        pretrain_model(prepared, settings, self.execution, folder)
        lacking = [label for label in self.labels if atlases and label not in atlases]
        if lacking:
            wanted = settings.model_copy(update={"atlases": tuple(lacking)})
            prepared = prepare_addition(factory, wanted, self.cohort, people, folder)
            pretrain_model(prepared, wanted, self.execution, self.work / f"{folder.name}-added")
        return self.ready(prepared.system)

    def ready(self, system: BrainGraph) -> BrainGraph:
        """On the device, in evaluation mode."""
        system.module.to(self.execution.device)
        system.module.eval()
        return system

    def inputs(self, system: BrainGraph) -> dict[str, AtlasInputs]:
        """Everybody's inputs in the tested atlases."""
        return prepare_inputs(system, self.cohort, self.target.participants, self.labels)

    def folds(self, shots: str) -> tuple[Fold, ...]:
        """The folds of a column."""
        return self.few if shots == "few" else (self.whole,)


Results = dict[str, "NDArray[np.float64]"]
"""Row|atlas|head|shots -> (draws, people) probability of the disorder."""


def make_study(work: Path, arguments: argparse.Namespace) -> Study:
    """Simulate a population, or open the one given, and divide it."""
    table, target = (_simulated if arguments.cohort is None else _given)(work / "cohort", arguments)
    cohort = Cohort.open(arguments.cohort or work / "cohort")
    sides = {side: sorted(table.index[table["split"] == side]) for side in ("discovery", "holdout")}
    having = set(target.participants)
    train, test = ([name for name in people if name in having] for people in sides.values())
    split = fixed_split(target, train=train, test=test, why="holdout")
    few = few_shot_splits(target, split, shots=[SHOTS], draws=arguments.draws, seed=arguments.seed)[SHOTS]
    return Study(
        cohort=cohort,
        target=target,
        discovery=tuple(sides["discovery"]),
        whole=next(iter(split.folds())),
        few=tuple(few.folds()),
        labels=(labels_of(arguments.functional, arguments)[0], labels_of(arguments.anatomical, arguments)[0]),
        execution=Execution(device=arguments.device),
        work=work,
        arguments=arguments,
    )


def _simulated(folder: Path, arguments: argparse.Namespace) -> tuple[pd.DataFrame, Target]:
    atlases = [*arguments.functional, *arguments.anatomical]
    population = {"disorders": list(DISORDERS), "case_share": 0.6, "holdout_share": 0.5}
    values = {"level": "series", "participants": arguments.people, "seed": arguments.seed, "atlases": atlases, "population": population}
    write_cohort(folder, SimulateSettings.from_values(values), ())
    cohort = Cohort.open(folder)
    coding = TargetSettings(type="categorical", classes=("control", TESTED), positive=TESTED)
    return participant_table(cohort), read_target(cohort, "diagnosis", coding)


def _given(_folder: Path, arguments: argparse.Namespace) -> tuple[pd.DataFrame, Target]:
    cohort = Cohort.open(arguments.cohort)
    target = read_target(cohort, arguments.target)
    train, _ = train_test_split(
        np.array(target.participants), test_size=0.5, stratify=target.observed.astype(np.int64), random_state=arguments.seed
    )
    table = participant_table(cohort).loc[list(target.participants)]
    return table.assign(split=np.where(table.index.isin(train), "discovery", "holdout")), target


def labels_of(names: Sequence[str], arguments: argparse.Namespace) -> list[str]:
    """Labels of atlases; those of a given cohort are named by their labels."""
    return [find_atlas(name).label if arguments.cohort is None else name for name in names]


def prompted(
    study: Study, system: BrainGraph, row: str, *, heads: Sequence[str] = _BOTH, extra: Sequence[str] = (), epochs: int | None = None
) -> Results:
    """Prompts and head fitted on the frozen model; ``extra`` blocks stand beside the embedding, ``epochs`` 0 leaves prompts untuned."""
    inputs, found = study.inputs(system), {}
    longest = study.arguments.prompt_epochs if epochs is None else epochs
    for head in heads:
        blocks = (*_BLOCKS[head], *(name for name in extra if name not in _BLOCKS[head]))
        settings = TuningSettings(epochs=longest, stops=1, blocks=blocks)
        for label in study.labels:
            one = {label: inputs[label]}
            for shots in ("all", "few"):
                rows = []
                for number, fold in enumerate(study.folds(shots)):
                    training = study.target.keep(fold.train)
                    folds = inner_folds(training, groups={}, folds=3, seed=number)
                    tuning = tune(system, one, training, folds, settings, seed=number)
                    rows.append(forecast(system, one, tuning.atlases, fold.test)[:, 1])
                found[f"{row}|{label}|{head}|{shots}"] = np.stack(rows)
    return found


def fine_tuned(study: Study, system: BrainGraph, row: str) -> Results:
    """Every weight and a linear head trained on the labels; how long is chosen on inner folds, as it is for prompts."""
    inputs, found = study.inputs(system), {}
    for label in study.labels:
        for shots in ("all", "few"):
            rows = []
            for number, fold in enumerate(study.folds(shots)):
                training = study.target.keep(fold.train)
                stops = (study.arguments.fine_epochs // 2, study.arguments.fine_epochs)
                areas = np.zeros(len(stops))
                for train, validation in inner_folds(training, groups={}, folds=3, seed=number):
                    names = [training.participants[place] for place in validation]
                    scored = _train_all(system, inputs[label], training.keep([training.participants[p] for p in train]), stops, number)
                    labels = training.observed[validation].astype(np.int64)
                    areas += [
                        float(weighted_auroc(labels, one[inputs[label].positions(names)])(np.ones((1, len(names))))[0]) for one in scored
                    ]
                (best,) = _train_all(system, inputs[label], training, (stops[int(areas.argmax())],), number)
                rows.append(best[inputs[label].positions(fold.test)])
            found[f"{row}|{label}|embedding|{shots}"] = np.stack(rows)
    return found


def _train_all(system: BrainGraph, inputs: AtlasInputs, training: Target, stops: Sequence[int], seed: int) -> list[NDArray[np.float64]]:
    """(people,) scores of everybody in ``inputs`` at each of ``stops`` epochs; the given model stays as it is."""
    own = replace(system, model=copy.deepcopy(system.model))
    own.model.requires_grad_(True)  # noqa: FBT003
    torch.manual_seed(seed)
    device = next(own.model.parameters()).device
    head = nn.Linear(own.readout_width, 1).to(device)
    place = {int(person): float(value) for person, value in zip(inputs.positions(training.participants), training.observed, strict=True)}
    rows = torch.tensor([row for row, owner in enumerate(inputs.owner) if int(owner) in place])
    wanted = torch.tensor([place[int(inputs.owner[row])] for row in rows], device=device)
    weights = torch.where(wanted > 0, len(wanted) / (2 * wanted.sum()), len(wanted) / (2 * (1 - wanted).sum()))
    optimiser = torch.optim.AdamW([*own.model.parameters(), *head.parameters()], lr=1e-3, weight_decay=0.01)
    shuffle, scores = torch.Generator().manual_seed(seed), []
    for epoch in range(1, max(stops) + 1):
        for part in torch.randperm(len(rows), generator=shuffle).split(32):
            logits = head(own.model.encode(select_rows(inputs.graphs, rows[part])).readout)[:, 0]
            chosen = part.to(device)
            loss = functional.binary_cross_entropy_with_logits(logits, wanted[chosen], weight=weights[chosen])
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        if epoch in stops:
            with torch.no_grad():
                everybody = torch.arange(len(inputs.owner)).split(128)
                read = [head(own.model.encode(select_rows(inputs.graphs, part)).readout) for part in everybody]
                scores.append(inputs.average(torch.cat(read))[:, 0].astype(np.float64))
    return scores


def meta_learned(study: Study, system: BrainGraph) -> Results:
    """A start learnt over the other disorders: with five labels of each class, and scored by itself without any."""
    table = participant_table(study.cohort)
    people = sorted(table.index[(table["split"] == "discovery") & (table["diagnosis"] != TESTED)])
    settings = MetaSettings(exclude=(TESTED,), epochs=study.arguments.meta_epochs, seed=study.arguments.seed)
    inputs = prepare_inputs(system, study.cohort, people, study.labels)
    diagnosis, dataset = (table[column].astype(str).to_dict() for column in ("diagnosis", "dataset"))
    result = meta_learn(system, inputs, list_tasks(inputs, diagnosis, dataset, settings), settings)
    own = replace(system, meta=result.starts)
    found = prompted(study, own, "with a meta-learned start", heads=("embedding",), extra=("meta",))
    for label, one in study.inputs(own).items():
        rows = one.positions(study.whole.test)
        found[f"meta-learned start, no label|{label}|embedding|none"] = one.blocks["meta"][rows].T.astype(np.float64)
    return found


def by_text(study: Study, system: BrainGraph, model: Path) -> Results:
    """With what a text says of the disorder: beside five labels, and alone, next to random vectors and to no text."""
    command = ["align", study.work / "cohort", study.work / "aligned", "group", "--model", model, "--target", "diagnosis"]
    values = [f"disorders={study.work / 'cohort' / 'disorders.tsv'}", f"exclude=[{TESTED}]", "where.split=[discovery]"]
    values += [f"encoder={study.arguments.encoder}", f"atlases=[{', '.join(study.labels)}]"]
    command += ["--device", study.arguments.device, "--set", *values]
    subprocess.run([sys.executable, "-m", "brainfm_cli", *map(str, command)], check=True)
    (folder,) = (study.work / "aligned" / "models").iterdir()
    described = pd.read_csv(study.work / "cohort" / "disorders.tsv", sep="\t").set_index("name").loc[TESTED]
    text = DisorderText(name=TESTED, abbreviation=described["abbreviation"], description=described["description"])
    own = replace(system, text=alignment.coupling_readers(folder, text, system))
    found = prompted(study, own, "with the disorder's text", extra=("text",))
    aligned = alignment.Aligned.load(folder, system)
    vectors = aligned.vectors([text])
    tested = list(study.whole.test)
    for label, inputs in aligned.inputs(study.cohort, tested).items():
        for row, said, encoder in (
            ("text alone, no label", vectors, True),
            ("text alone, connectivity only", vectors, False),
            ("random vectors for the text", alignment.random_texts(vectors, seed=study.arguments.seed), True),
        ):
            found[f"{row}|{label}|embedding|none"] = aligned.logits({label: inputs}, tested, said, encoder=encoder).T
    return found


def run(arguments: argparse.Namespace) -> None:
    """Every row for one population."""
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(scratch)
        study = make_study(work, arguments)
        functional_ones, anatomical_ones = (labels_of(names, arguments) for names in (arguments.functional, arguments.anatomical))
        every = study.pretrain(BASE)
        none = study.ready(every.randomised(arguments.seed))
        steps: dict[str, Any] = {
            BASE: lambda: prompted(study, every, BASE),
            RANDOM: lambda: prompted(study, none, RANDOM),
            "prompts off": lambda: prompted(study, every, "prompts off", epochs=0),
            "full fine-tuning": lambda: fine_tuned(study, every, "full fine-tuning"),
            "no pretraining": lambda: fine_tuned(study, none, "no pretraining, everything trained"),
            "meta": lambda: meta_learned(study, every),
            "text": lambda: by_text(study, every, work / BASE.replace(" ", "-")),
            "one": lambda: prompted(study, study.pretrain("one", functional_ones[:1]), "one functional atlas"),
            "functional": lambda: prompted(study, study.pretrain("functional", functional_ones), "all functional"),
            "anatomical": lambda: prompted(study, study.pretrain("anatomical", anatomical_ones), "all anatomical"),
            **{
                f"without {what}": lambda what=what, name=name: prompted(study, study.pretrain(what, **{name: 0.0}), f"without {what}")
                for what, name in _LOSSES.items()
            },
        }
        tested = study.target.rows(study.whole.test)
        found: Results = {"observed": study.target.observed[tested]}
        if arguments.cohort is not None:
            steps = {name: step for name, step in steps.items() if name not in {"meta", "text"}}
        for name in arguments.rows or steps:
            step = steps[name]
            began = time.monotonic()
            found |= step()
            print(f"{name}: {(time.monotonic() - began) / 60:.1f} minutes", flush=True)
            np.savez_compressed(arguments.out, **found)


def table(paths: Sequence[Path], *, bootstraps: int) -> list[dict[str, Any]]:
    """Mean AUROC over seeds and draws of every row and column, its interval, and the paired difference to :data:`BASE`."""
    seeds = [dict(np.load(path)) for path in paths]
    rng = np.random.default_rng(0)
    people = [np.arange(len(one["observed"])) for one in seeds]
    weights = [np.vstack([np.ones((1, len(one))), resample_weights(one, bootstraps, rng)]) for one in people]

    def areas(key: str) -> NDArray[np.float64]:
        """(1 + resamples,) mean over the seeds; the first is the value itself."""
        return np.mean(
            [
                over(averaged([weighted_auroc(one["observed"].astype(np.int64), row) for row in one[key]]), drawn)
                for one, drawn in zip(seeds, weights, strict=True)
            ],
            axis=0,
        )

    rows = []
    for key in [name for name in seeds[0] if name != "observed" and all(name in one for one in seeds)]:
        row, atlas, head, shots = key.split("|")
        own, base = areas(key), f"{BASE}|{atlas}|{head}|{shots}"
        entry = {"row": row, "atlas": atlas, "head": head, "shots": shots, "seeds": len(seeds), **_interval(own)}
        if base in seeds[0] and row != BASE:
            entry["difference"] = _interval(own - areas(base))
        rows.append(entry)
    return rows


def _interval(values: NDArray[np.float64]) -> dict[str, float]:
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return {"value": round(float(values[0]), 3), "low": round(float(low), 3), "high": round(float(high), 3)}


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The table as text: a row per model, a column per atlas and number of labels."""
    lines = []
    for head in _BOTH:
        mine = [row for row in rows if row["head"] == head]
        columns = sorted({(row["shots"], row["atlas"]) for row in mine})
        lines += [
            f"\n{head}\n",
            "| | " + " | ".join(f"{atlas}, {shots}" for shots, atlas in columns) + " |",
            "|---" * (len(columns) + 1) + "|",
        ]
        for name in dict.fromkeys(row["row"] for row in mine):
            cells = {(row["shots"], row["atlas"]): row for row in mine if row["row"] == name}
            lines.append(f"| {name} | " + " | ".join(_cell(cells.get(column)) for column in columns) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return "–"
    difference = row.get("difference")
    told = "" if difference is None else f"; {difference['value']:+.3f} ({difference['low']:+.3f} to {difference['high']:+.3f})"
    return f"{row['value']:.3f} ({row['low']:.3f} to {row['high']:.3f}){told}"


def main() -> None:
    """Run one population, or print the table of several."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("--seed", type=int, default=1)
    one.add_argument("--people", type=int, default=600)
    one.add_argument("--cohort", type=Path, help="a packed cohort in place of the simulation")
    one.add_argument("--target", help="of two classes, with --cohort")
    one.add_argument("--functional", nargs="+", default=list(FUNCTIONAL), help="atlases; the first is tested")
    one.add_argument("--anatomical", nargs="+", default=list(ANATOMICAL), help="atlases; the first is tested")
    one.add_argument("--epochs", type=int, default=4, help="of pretraining")
    one.add_argument("--batch-size", type=int, default=32)
    one.add_argument("--prompt-epochs", type=int, default=4)
    one.add_argument("--fine-epochs", type=int, default=10)
    one.add_argument("--meta-epochs", type=int, default=15)
    one.add_argument("--draws", type=int, default=10, help="of five people of each class")
    one.add_argument("--rows", nargs="+", default=[], help="some steps only")
    one.add_argument("--encoder", default="all-minilm-l6-v2", help="text encoder: a name or a folder")
    one.add_argument("--device", default="cpu")
    one.add_argument("--threads", type=int, default=1)
    one.add_argument("--out", type=Path, required=True)
    two = commands.add_parser("table")
    two.add_argument("paths", type=Path, nargs="+")
    two.add_argument("--bootstraps", type=int, default=1000)
    two.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    if arguments.command == "run":
        run(arguments)
        return
    rows = table(arguments.paths, bootstraps=arguments.bootstraps)
    print(json.dumps(rows) if arguments.json else markdown(rows))


if __name__ == "__main__":
    main()
