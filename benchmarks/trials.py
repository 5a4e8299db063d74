"""What the drug-response system finds in simulated trials of 56 patients, and what it finds where there is nothing.

One tiny series encoder is pretrained once, on drug-free people of another simulated population. Then:

planted: per trial (its own seed, its own planted effects) every predictor on the same folds: series, connectivity and both, with the
         pretrained and with a random frozen encoder and the same head; linear probes; floors; the linear model on exactly the planted
         features. Also what the score saves a next trial, and the treatment × score interaction.
null:    trials in which the response is drawn at random, of people whose embeddings are fixed, one split each; beside it the same
         people with a head whose epoch is selected on the test fold, as proof that the check can fail.

Every trial is one line of the file given by --out; a run that was stopped goes on where it was.

    python benchmarks/trials.py pretrain --model MODEL --people 2000 --epochs 3
    python benchmarks/trials.py planted --model MODEL --trials 24 --out planted.jsonl
    python benchmarks/trials.py planted --model MODEL --trials 24 --parts --rivals series-cnn --rival-epochs 30 --out rivals.jsonl
    python benchmarks/trials.py null --model MODEL --trials 200 --out null.jsonl
    python benchmarks/trials.py report planted.jsonl rivals.jsonl null.jsonl

``--patterns 4 2`` in both studies: people who differ along shared patterns, so that drug-free people tell something of where a score may lie.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from sklearn.metrics import matthews_corrcoef
from sklearn.model_selection import StratifiedKFold

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.bids.derivatives import write_text
from brainfm_cli.config import Execution
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.checkpoints import write_tensors
from brainfm_cli.learning.evaluation import Context, EvaluationSettings, evaluate
from brainfm_cli.learning.floors import FloorSettings, make_floors
from brainfm_cli.learning.loop import OptimiserSettings
from brainfm_cli.learning.networks import NetworkSettings
from brainfm_cli.learning.pooling import pool_all, run_folds
from brainfm_cli.learning.pretraining import PretrainingSettings, prepare, pretrain_model, whole_training_scans
from brainfm_cli.learning.regions import RegionFloor
from brainfm_cli.learning.results import Pooled
from brainfm_cli.learning.scores import score
from brainfm_cli.learning.splits import DesignSettings, fixed_split, make_split
from brainfm_cli.learning.stratification import StrataSettings, stratify
from brainfm_cli.learning.targets import Target, participant_table, read_target
from brainfm_cli.learning.trials import InteractionSettings, interaction
from brainfm_cli.learning.tuned import TunedPredictor, prepare_inputs
from brainfm_cli.learning.tuning import EMBEDDING, AtlasInputs, TuningSettings
from brainfm_cli.simulation.trial import DRUG
from brainfm_cli.simulation.truth import attainable_features
from brainfm_cli.stages.predict.rivals import NAMES as RIVAL_NAMES
from brainfm_cli.stages.predict.rivals import RivalSettings, make_rivals
from brainfm_cli.stages.simulate import SimulateSettings, write_trial
from brainfm_cli.systems import load_system
from brainfm_cli.systems.drug_response import DrugResponseSettings

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    from brainfm_cli.learning.forecasts import Predictor

_PRETRAINING_SEED = 100_000
_POOL_SEED = 200_000
CONNECTIVITY = ("edges", "edges_log", "groups", "groups_log")
_HIDDEN = 32
BLOCKS = {"both": (EMBEDDING, *CONNECTIVITY), "series only": (EMBEDDING,), "connectivity only": CONNECTIVITY}
RANDOM = ", random frozen encoder"
FITTED = f"{RANDOM}, axes fitted on the same people"
PARTS = ("model", "probes", "floors")
ATTAINABLE = "linear model on the planted features"
FLOORS = FloorSettings(kinds=("majority", "spread", "fisherz", "tangent", "kernel-ridge"))


def simulate(
    folder: Path, *, seed: int, patients: int, drug_free: int, atlas: str, effect: float = 1.0, trial: Mapping[str, Any] | None = None
) -> Cohort:
    """A trial, or drug-free people, as region series; ``trial`` are further settings of the trial."""
    settings = SimulateSettings.from_values(
        {
            "kind": "drug",
            "level": "series",
            "participants": max(patients, 1),
            "seed": seed,
            "effect": effect,
            "atlases": [atlas],
            # pretraining people must not share a name, and so a hash, with patients
            "label_prefix": "pretraining" if drug_free else "patient",
            "trial": {"drug_free": drug_free, **(trial or {})},
        }
    )
    write_trial(folder, settings, ())
    return Cohort.open(folder / "cohort")


def pretrain(folder: Path, *, people: int, atlas: str, epochs: int, spectrum: float = 0.5, trial: Mapping[str, Any] | None = None) -> None:
    """The shared encoder; in ``random`` below it one with random weights, whose readout is fitted on the same people."""
    with tempfile.TemporaryDirectory() as scratch:
        cohort = simulate(Path(scratch), seed=_PRETRAINING_SEED, patients=0, drug_free=people, atlas=atlas, trial=trial)
        chosen = sorted(cohort.participants.index[cohort.participants["cohort"] == "drug-free"])
        settings = PretrainingSettings(epochs=epochs, batch_size=16, optimiser=OptimiserSettings(learning_rate=2e-3))
        system = DrugResponseSettings.from_values({"kind": "drug-response", "preset": "tiny", "masking": {"spectrum": spectrum}})
        prepared = prepare(system, settings, cohort, chosen)
        pretrain_model(prepared, settings, Execution(), folder)
        twin = prepared.system.randomised(0)
        twin.fit_readout(whole_training_scans(prepared))
        write_tensors(folder / "random" / "model.safetensors", twin.module.state_dict())
        write_text(folder / "random" / "config.yaml", prepared.config.to_yaml())


def planted(
    seed: int,
    *,
    model: Path,
    patients: int,
    repeats: int,
    atlas: str,
    effect: float,
    rivals: RivalSettings | None = None,
    parts: Sequence[str] = PARTS,
    trial: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Scores on one trial of the predictors of some parts, of rivals, and of who knows the planted features."""
    system = load_system(model)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        cohort = simulate(root, seed=seed, patients=patients, drug_free=0, atlas=atlas, effect=effect, trial=trial)
        truth = json.loads((root / "truth.json").read_text(encoding="utf-8"))
        latents = pd.read_csv(root / "latents.tsv", sep="\t", dtype={"participant_id": str}).set_index("participant_id")
        table = participant_table(cohort)
        world = {"patients": patients, "effect": effect, "repeats": repeats, "trial": dict(trial or {})}
        row: dict[str, Any] = {"seed": seed, **world, "scores": {}, "bayes": {}}
        inputs = encode(system, cohort, list(table.index))
        if (model / "random").is_dir():
            twin = load_system(model / "random")
            inputs[FITTED] = (twin, prepare_inputs(twin, cohort, list(table.index), sorted(cohort.atlases)))
        for name in ("response", "analgesia"):
            target = read_target(cohort, name)
            predictors = _predictors(inputs, parts)
            if "floors" in parts:
                predictors |= make_floors(cohort, target, table, FLOORS).predictors
            predictors |= make_rivals(system, cohort, list(table.index), sorted(cohort.atlases), rivals or RivalSettings())
            features = attainable_features(cohort, truth).set_index("participant_id").loc[list(table.index)]
            predictors[ATTAINABLE] = linear_predictor(tuple(table.index), features[truth["targets"][name]["planted"]].to_numpy(float))
            split = make_split(target, table, DesignSettings(folds=5, repeats=repeats, strata=("arm",), seed=seed))
            forecasts, _ = run_folds(target, split, predictors, inner=5, seed=seed)
            pooled = pool_all(target.keep(split.tested), split, forecasts, {})
            row["scores"][name] = {key: mean_scores(target.keep(split.tested), one) for key, one in pooled.items()}
            row["bayes"][name] = truth["targets"][name]["bayes_by_arm"]["pooled"]
            if name == "response":
                row["counts"] = target.counts()
            people = target.keep(split.tested)
            if "model" in parts:
                row[f"trial_{name}"] = {key: _of_trial(people, pooled[key], table, latents) for key in ("both", ATTAINABLE)}
    return row


def encode(system: Any, cohort: Cohort, people: Sequence[str], seed: int = 0) -> dict[str, tuple[Any, dict[str, AtlasInputs]]]:
    """The pretrained and the random encoder with what they make of ``people``."""
    atlases = sorted(cohort.atlases)
    twin = system.randomised(seed)
    return {
        "": (system, prepare_inputs(system, cohort, people, atlases)),
        RANDOM: (twin, prepare_inputs(twin, cohort, people, atlases)),
    }


def _predictors(encoded: Mapping[str, tuple[Any, dict[str, AtlasInputs]]], parts: Sequence[str]) -> dict[str, Predictor]:
    found: dict[str, Predictor] = {}
    for suffix, made in encoded.items():
        for name, blocks in BLOCKS.items() if "model" in parts else ():
            if suffix and EMBEDDING not in blocks:
                continue
            found[name + suffix] = TunedPredictor(prepared=lambda _fold, made=made: made, settings=TuningSettings(epochs=0, blocks=blocks))
        if suffix == FITTED or "probes" not in parts:
            continue
        system, inputs = made
        (one,) = inputs.values()
        embedding = one.average(system.read(one.graphs, system.new_prompt(one.atlas)).detach())
        found[f"linear probe, series{suffix}"] = linear_predictor(one.participants, embedding)
        graph = np.hstack([one.blocks[name] for name in ("groups", "groups_log")])
        found["linear probe, network connectivity"] = linear_predictor(one.participants, graph)
        fused = np.hstack([embedding, graph])
        found[f"linear probe, series and network connectivity{suffix}"] = linear_predictor(one.participants, fused)
    return found


def linear_predictor(participants: tuple[str, ...], features: NDArray[Any]) -> RegionFloor:
    """Penalised logistic or ridge regression of standardised features, penalty by inner folds."""
    return RegionFloor(participants=participants, features=np.asarray(features, float), components=None, penalties=FLOORS.penalties)


def mean_scores(people: Target, pooled: Pooled) -> dict[str, float | None]:
    """Scores averaged over repetitions."""
    found = [
        score(people.kind, people.observed, predicted, None if pooled.decided is None else pooled.decided[repeat])
        for repeat, predicted in enumerate(pooled.predicted)
    ]
    names = ("auroc", "balanced_accuracy", "mcc") if people.kind == "binary" else ("r2", "pearson_r")
    values = {name: [one[name].value for one in found] for name in names}
    return {name: None if None in each else round(float(np.mean(each)), 4) for name, each in values.items()}  # type: ignore[arg-type]


def _of_trial(people: Target, pooled: Pooled, table: pd.DataFrame, latents: pd.DataFrame) -> dict[str, Any]:
    """What a score saves a next trial, by the outcomes seen and by those that are true; and p of the interaction."""
    arm = table.loc[list(people.participants), "arm"].to_numpy(str)
    predicted = pooled.predicted[..., 1] if people.kind == "binary" else pooled.predicted
    mean = predicted.mean(axis=0)
    if people.kind == "binary":
        clipped = np.clip(mean, 1e-4, 1 - 1e-4)
        mean = np.log(clipped / (1 - clipped))
    binary, true = people.kind == "binary", latents.loc[list(people.participants)]
    found: dict[str, Any] = {"interaction_p": None}
    if pooled.places is not None:
        strata = stratify(people.observed, pooled.places, mean, arm, predictor="", treated=DRUG, settings=StrataSettings(bootstraps=500))
        found["gap"] = strata.gap.value
        found["gap_shown"] = bool((strata.gap.low or 0) > 0)
        found["ratios"] = {one.rule: [one.ratio.value, one.ratio.low, one.ratio.high] for one in strata.sizes[1:]}
        stratum = np.median(pooled.places, axis=0) >= strata.cuts[1]
        benefit = (true["expected_drug"] - true["expected_placebo"]).to_numpy()
        found["true_benefit_likely"] = round(float(benefit[stratum].mean()), 3) if stratum.any() else None
        found["true_benefit_all"] = round(float(benefit.mean()), 3)
    expected = np.where(arm == DRUG, true["expected_drug"], true["expected_placebo"])
    found["true_r"] = round(float(np.corrcoef(mean, expected)[0, 1]), 4) if np.ptp(mean) > 0 and np.ptp(expected) > 0 else None
    try:
        tested = interaction(people.observed, mean, arm, treated=DRUG, binary=binary, settings=InteractionSettings(bootstraps=199))
        found["interaction_p"] = tested.p
    except InputDatasetError as error:
        found["interaction_p_reason"] = str(error)
    return found


def null_pool(folder: Path, *, people: int, atlas: str) -> Cohort:
    """People from whom null trials are drawn; what their responses are is drawn anew in each."""
    return simulate(folder, seed=_POOL_SEED, patients=people, drug_free=0, atlas=atlas, effect=0.0)


def null(
    seed: int, system: Any, inputs: Mapping[str, AtlasInputs], table: pd.DataFrame, *, patients: int, epochs: int = 100
) -> dict[str, Any]:
    """One null trial: MCC and p of the head on one split, and MCC in five folds of a head whose last or best epoch is taken."""
    rng = np.random.default_rng([seed, 77])
    names = [str(name) for name in rng.permutation(table.index.to_numpy(str))[:patients]]
    order = [name for name in table.index if name in set(names)]
    labels = rng.permutation(np.arange(patients) % 2)
    target = Target(
        name="response", kind="binary", participants=tuple(order), observed=labels.astype(float), classes=("non-responder", "responder")
    )
    fold_of = np.zeros(patients, int)
    for fold, (_, test) in enumerate(StratifiedKFold(5, shuffle=True, random_state=seed).split(labels, labels)):
        fold_of[test] = fold
    inside = np.isin(fold_of, (0, 1, 2))  # three of five folds train
    split = fixed_split(target, train=np.array(order)[inside], test=np.array(order)[~inside], why="random")
    predictor = TunedPredictor(prepared=lambda _fold: (system, inputs), settings=TuningSettings(epochs=0))
    settings = EvaluationSettings(bootstraps=100, interval="percentile", permutations=999, groups=())
    result = evaluate(target, split, {"model": predictor}, Context(table=table, models=("model",)), settings)
    found = result.metrics.of("model")
    (one,) = inputs.values()
    rows = one.positions(order)
    embedding = one.average(system.read(one.graphs, system.new_prompt(one.atlas)).detach())[rows]
    fused = np.hstack([embedding, one.blocks["groups_log"][rows]])
    tests = fold_of == np.arange(5)[:, None]
    curves = epoch_scores(np.stack([fused] * 5), np.stack([labels] * 5), tests, epochs=epochs, seed=seed)
    return {
        "seed": seed,
        "mcc": found.scores["mcc"].value,
        "auroc": found.scores["auroc"].value,
        "p": found.permutation_p,
        "last_epoch_mcc": float(curves[:, -1].mean()),
        "selected_epoch_mcc": float(curves.max(1).mean()),
    }


def epoch_scores(features: NDArray[Any], labels: NDArray[np.int64], tests: NDArray[np.bool_], *, epochs: int, seed: int) -> NDArray[Any]:
    """(heads, epochs) MCC on each head's test people after every epoch of small networks; taking the largest is what must not be done.

    One hidden layer with dropout, AdamW at 5e-3, cosine to 1e-7 over the epochs, batches of 8, cross-entropy: the published schedule, with
    a larger step because the network is smaller. ``features`` (heads, people, width), ``labels`` and ``tests`` (heads, people); heads are
    trained at once and know nothing of one another.
    """
    generator = torch.Generator().manual_seed(seed)
    trained = ~tests
    weight = torch.from_numpy(trained).float()[:, :, None]
    given = torch.from_numpy(np.asarray(features, np.float32))
    centre = (given * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True)
    spread = (((given - centre).square() * weight).sum(1, keepdim=True) / (weight.sum(1, keepdim=True) - 1)).sqrt().clamp_min(1e-6)
    given, wanted = (given - centre) / spread, torch.from_numpy(labels)
    heads, people, width = given.shape
    shapes = ((width, _HIDDEN), (1, _HIDDEN), (_HIDDEN, 2), (1, 2))
    weights = [torch.nn.Parameter(torch.empty(heads, *shape).uniform_(-1, 1, generator=generator) / shape[0] ** 0.5) for shape in shapes]
    optimiser = torch.optim.AdamW(weights, lr=5e-3)

    def network(inputs: torch.Tensor, kept: torch.Tensor | float = 1.0) -> torch.Tensor:
        return (torch.relu(inputs @ weights[0] + weights[1]) * kept) @ weights[2] + weights[3]

    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, epochs, eta_min=1e-7)
    scores = np.zeros((heads, epochs))
    for epoch in range(epochs):
        # training people first, in random order; a head with fewer of them has a shorter last batch
        order = (torch.rand(heads, people, generator=generator) + torch.from_numpy(tests).float() * 2).argsort(dim=1)
        counted = weight[:, :, 0].gather(1, order)
        for part in range(0, int(trained.sum(1).max()), 8):
            rows, use = order[:, part : part + 8], counted[:, part : part + 8]
            kept = (torch.rand(heads, rows.shape[1], _HIDDEN, generator=generator) < 0.5).float() * 2
            logits = network(given.gather(1, rows[:, :, None].expand(-1, -1, width)), kept)
            losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.gather(1, rows).flatten(), reduction="none")
            loss = ((losses.view_as(use) * use).sum(1) / use.sum(1).clamp_min(1)).sum()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
        schedule.step()
        with torch.no_grad():
            said = network(given).argmax(2).numpy()
        scores[:, epoch] = [matthews_corrcoef(labels[head, tests[head]], said[head, tests[head]]) for head in range(heads)]
    return scores


def joined(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Rows of the same trials in several files as one, by world: effect, patients, repetitions and settings of the trial.

    Trials that some file lacks are left out.
    """
    found: dict[str, dict[int, list[Mapping[str, Any]]]] = {}
    for row in rows:
        world = ", ".join(f"{name} {row.get(name)}" for name in ("effect", "patients", "repeats", "trial") if row.get(name))
        found.setdefault(world, {}).setdefault(row["seed"], []).append(row)
    merged: dict[str, list[dict[str, Any]]] = {}
    for world, trials in found.items():
        most = max(len(parts) for parts in trials.values())
        for parts in trials.values():
            if len(parts) == most:
                scores = {name: {key: value for one in parts for key, value in one["scores"][name].items()} for name in parts[0]["scores"]}
                merged.setdefault(world, []).append({key: value for one in parts for key, value in one.items()} | {"scores": scores})
    return merged


def report_planted(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over trials with bootstrap intervals over trials, and paired differences."""
    rng = np.random.default_rng(0)
    drawn = rng.integers(0, len(rows), (5000, len(rows)))

    def mean(values: Sequence[float]) -> list[float]:
        array = np.asarray(values, float)
        return [round(float(value), 4) for value in (array.mean(), *np.percentile(array[drawn].mean(1), (2.5, 97.5)))]

    found: dict[str, Any] = {"trials": len(rows), "patients": rows[0]["patients"]}
    for name, metric, chance in (("response", "auroc", 0.5), ("analgesia", "r2", 0.0), ("analgesia", "pearson_r", 0.0)):
        table = {key: [row["scores"][name][key][metric] for row in rows] for key in rows[0]["scores"][name]}
        table = {key: values for key, values in table.items() if None not in values}
        part: dict[str, Any] = {"scores": {key: mean(values) for key, values in table.items()}}
        pairs = [("both", other) for other in table if other != "both" and "both" in table] + [
            ("series only", other) for other in table if other.startswith("series only,")
        ]
        part["differences"] = {
            f"{first} - {second}": mean(np.subtract(table[first], table[second]))
            for first, second in pairs  # type: ignore[arg-type]
        }
        if metric == "auroc":
            part["bayes"] = {kind: mean([row["bayes"][name][kind] for row in rows]) for kind in rows[0]["bayes"][name]}
        if "both" in table:
            best, model = np.asarray(table[ATTAINABLE], float) - chance, np.asarray(table["both"], float) - chance
            share = model[drawn].mean(1) / best[drawn].mean(1)
            limits = np.percentile(share, (2.5, 97.5))
            part["share_of_attainable"] = [round(float(value), 3) for value in (model.mean() / best.mean(), *limits)]
        found[f"{name}, {metric}"] = part
    for name in ("response", "analgesia"):
        for score_of in ("both", ATTAINABLE) if f"trial_{name}" in rows[0] else ():
            trials = [row[f"trial_{name}"][score_of] for row in rows]
            p = [one["interaction_p"] for one in trials if one["interaction_p"] is not None]
            ratios = {rule: [one["ratios"][rule] for one in trials if "ratios" in one] for rule in trials[0].get("ratios", {})}
            found[f"trial, {name}, {score_of}"] = {
                "interaction_tested": len(p),
                "interaction_found": int(sum(value <= 0.05 for value in p)),
                "gap_shown": int(sum(one.get("gap_shown", False) for one in trials)),
                "true_benefit_all": mean([one.get("true_benefit_all", np.nan) for one in trials]),
                "true_benefit_likely": mean([one["true_benefit_likely"] or np.nan for one in trials]),
                "median_ratio": {rule: _median([one[0] for one in each]) for rule, each in ratios.items()},
                "saving_shown": {rule: int(sum(one[2] is not None and one[2] < 1 for one in each)) for rule, each in ratios.items()},
            }
    return found


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return round(float(np.median(known)), 3) if known else None


def report_null(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean MCC with its interval, the p's, and what selecting the epoch on the test fold would have given."""
    found: dict[str, Any] = {"trials": len(rows)}
    for name in ("mcc", "last_epoch_mcc", "selected_epoch_mcc"):
        # one decision for everybody has no MCC: it counts as 0, as scikit-learn has it
        values = np.nan_to_num(np.array([row[name] for row in rows], float))
        error = values.std(ddof=1) / np.sqrt(len(values))
        found[name] = [round(float(value), 4) for value in (values.mean(), values.mean() - 1.96 * error, values.mean() + 1.96 * error)]
    p = np.array([row["p"] for row in rows], float)
    low, high = stats.binom.interval(0.95, len(p), 0.05)
    found |= {
        "ks_p": round(float(stats.kstest(p, "uniform").pvalue), 4),
        "false_alarms": int((p <= 0.05).sum()),
        "binomial_interval": [int(low), int(high)],
    }
    return found


def resumed(path: Path, seeds: Sequence[int], work: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per seed; those that are there are not done again."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []
    done = {row["seed"] for row in rows}
    for seed in seeds:
        if seed in done:
            continue
        started = time.monotonic()
        row = work(seed)
        rows.append({**row, "seconds": round(time.monotonic() - started, 1)})
        with path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(rows[-1]) + "\n")
        print(json.dumps({"seed": seed, "seconds": rows[-1]["seconds"]}), flush=True)
    return [row for row in rows if row["seed"] in set(seeds)]


def main() -> None:
    """Run one study, or print what the files hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=["pretrain", "planted", "null", "report"])
    parser.add_argument("files", nargs="*", type=Path, help="of report")
    parser.add_argument("--model", type=Path)
    parser.add_argument(
        "--people", type=int, default=2000, help="drug-free people to pretrain on, or people from whom null trials are drawn"
    )
    parser.add_argument("--epochs", type=int, default=3, help="of the pretraining")
    parser.add_argument("--spectrum", type=float, default=0.5, help="weight of log spectra in the pretraining")
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--first", type=int, default=1, help="seed of the first trial, so that several processes share a study")
    parser.add_argument("--rivals", nargs="*", choices=list(RIVAL_NAMES), default=(), help="networks without pretraining beside the model")
    parser.add_argument("--rival-epochs", type=int, default=NetworkSettings().epochs, help="longest training of those networks")
    parser.add_argument(
        "--parts",
        nargs="*",
        choices=PARTS,
        default=PARTS,
        help="predictors beside who knows the planted features; report joins files of the same trials",
    )
    parser.add_argument("--patients", type=int, default=56)
    parser.add_argument("--repeats", type=int, default=2, help="repetitions of five folds")
    parser.add_argument("--effect", type=float, default=1.0)
    parser.add_argument("--patterns", nargs=2, type=int, help="shared patterns of couplings and of spectra in the simulated people")
    parser.add_argument("--atlas", default="Schaefer100")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    world = {"patterns": arguments.patterns} if arguments.patterns else {}
    if arguments.study == "report":
        rows = [json.loads(line) for path in arguments.files for line in path.read_text(encoding="utf-8").splitlines()]
        for world, trials in joined([row for row in rows if "scores" in row]).items():
            print(json.dumps({f"planted, {world}": report_planted(trials)}, indent=1))
        if without := [row for row in rows if "scores" not in row]:
            print(json.dumps({"null": report_null(without)}, indent=1))
        return
    if arguments.model is None:
        parser.error("--model is needed")
    if arguments.study == "pretrain":
        names = ("people", "atlas", "epochs", "spectrum")
        pretrain(arguments.model, **{name: getattr(arguments, name) for name in names}, trial=world)
        return
    if arguments.out is None:
        parser.error("--out is needed")
    seeds = range(arguments.first, arguments.first + arguments.trials)
    if arguments.study == "planted":
        options = {name: getattr(arguments, name) for name in ("model", "patients", "repeats", "atlas", "effect", "parts")}
        training = NetworkSettings(epochs=arguments.rival_epochs)
        options |= {"trial": world, "rivals": RivalSettings(kinds=tuple(arguments.rivals), training=training)}
        resumed(arguments.out, seeds, lambda seed: planted(seed, **options))
        return
    with tempfile.TemporaryDirectory() as scratch:
        cohort, system = null_pool(Path(scratch), people=arguments.people, atlas=arguments.atlas), load_system(arguments.model)
        table = participant_table(cohort)
        inputs = prepare_inputs(system, cohort, list(table.index), sorted(cohort.atlases))
        print(json.dumps(report_null(resumed(arguments.out, seeds, lambda seed: null(seed, system, inputs, table, patients=arguments.patients))), indent=1))  # fmt: skip


if __name__ == "__main__":
    main()
