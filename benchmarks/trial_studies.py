"""What an explanation recovers, what survives another scanner, and what the interaction test can find, in simulated trials.

explained: per seed two trials of the same people, the effect of one planted in dynamics only (the spectrum of one network), of the other
           in coupling only (one pair of networks). Integrated gradients of test people by the model of their own fold; AUROC of the
           attribution of regions against the planted ones, share of the modalities, gap of completeness.
crossed:   per seed one trial at two sites of other repetition times (2.0 and 2.5 s). Fitted at one site, everything frozen, tested once
           at the other, both ways, beside cross-validation within the site that is tested.
power:     the interaction test on scores that correlate with the truth by a stated amount, no scan needed: how often it finds a planted
           predictive effect, and how often it raises a false alarm where a score is prognostic only, or tells nothing.
encoders:  trials drawn from one pool of simulated people, whose scans are read once, each with its own planted effects and outcomes: the
           pretrained encoder beside a random one, with and without the axes that its readout owes to the pretraining people.

    python benchmarks/trial_studies.py explained --model MODEL --trials 8 --patients 200 --effect 2.5 --out explained.jsonl
    python benchmarks/trial_studies.py crossed --model MODEL --trials 16 --patients 400 --out crossed.jsonl
    python benchmarks/trial_studies.py power --trials 200 --out power.jsonl
    python benchmarks/trial_studies.py encoders --model MODEL --trials 40 --people 200 --effect 2.5 --out encoders.jsonl
    python benchmarks/trial_studies.py report explained.jsonl crossed.jsonl power.jsonl
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score
from trials import ATTAINABLE, BLOCKS, FITTED, RANDOM, encode, linear_predictor, mean_scores, resumed, simulate

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.attributions import ExplanationSettings, mean_maps
from brainfm_cli.learning.explanation import CONNECTIVITY, SERIES, FoldExplainer
from brainfm_cli.learning.floors import FloorSettings, make_floors
from brainfm_cli.learning.pooling import pool_all, run_folds
from brainfm_cli.learning.splits import DesignSettings, fixed_split, make_split
from brainfm_cli.learning.targets import Target, participant_table, read_target
from brainfm_cli.learning.trials import InteractionSettings, interaction
from brainfm_cli.learning.tuned import TunedPredictor, prepare_inputs
from brainfm_cli.learning.tuning import TuningSettings
from brainfm_cli.simulation.population import PopulationSettings
from brainfm_cli.simulation.sources import Scan
from brainfm_cli.simulation.trial import DRUG, Trial, TrialSettings, build_trial, draw_patient, expected_analgesia
from brainfm_cli.simulation.truth import attainable_features
from brainfm_cli.systems import load_system

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from brainfm_cli.learning.attributions import Attribution
    from brainfm_cli.learning.splits import Split

PLANTED_IN = {SERIES: 1.0, CONNECTIVITY: 0.0}
"""Share of the planted score that lies in dynamics, by the modality that shows it."""
_SIZES = (56, 112)
_AGREEMENTS = (0.5, 0.7, 1.0)
_SITES = ("siteA", "siteB")
_TIMES_S = (2.0, 2.5)


def explained(seed: int, *, model: Path, patients: int, effect: float, atlas: str, explanation: ExplanationSettings) -> dict[str, Any]:
    """Where the explanation of a trial looks, with the effect in dynamics and with the effect in coupling."""
    system, row = load_system(model), {"study": "explained", "seed": seed, "patients": patients, "effect": effect}
    for modality, share in PLANTED_IN.items():
        with tempfile.TemporaryDirectory() as scratch:
            root = Path(scratch)
            trial = {"dynamics_share": share, "couplings_per_score": 1, "predictive": 0.0}
            cohort = simulate(root, seed=seed, patients=patients, drug_free=0, atlas=atlas, effect=effect, trial=trial)
            truth = json.loads((root / "truth.json").read_text(encoding="utf-8"))
            table, target = participant_table(cohort), read_target(cohort, "analgesia")
            inputs = encode(system, cohort, list(table.index))[""]
            watch = FoldExplainer(cohort, explanation)
            predictor = TunedPredictor(prepared=lambda _fold, made=inputs: made, settings=TuningSettings(epochs=0), watch=watch)
            split = make_split(target, table, DesignSettings(folds=5, repeats=1, strata=("arm",), seed=seed))
            forecasts, _ = run_folds(target, split, {"both": predictor}, inner=5, seed=seed)
            pooled = pool_all(target.keep(split.tested), split, forecasts, {})["both"]
            row[modality] = {
                "planted": sorted(truth["scores"]["prognostic"]["loadings"]),
                "scores": mean_scores(target.keep(split.tested), pooled),
                "maps": {one: _recovered(watch, one, planted_regions(truth)) for one in explanation.baselines},
            }
    return row


def planted_regions(truth: Mapping[str, Any]) -> NDArray[np.bool_]:
    """(regions,) whether a region belongs most to a network whose spectrum or coupling carries the prognostic score."""
    (atlas,) = truth["atlases"].values()
    network = np.asarray(atlas["network_shares"]).argmax(axis=1)
    named = [place for place, name in enumerate(truth["networks"]) if any(name in one for one in truth["scores"]["prognostic"]["loadings"])]
    return np.isin(network, named)


def _recovered(watch: FoldExplainer, baseline: str, planted: NDArray[np.bool_]) -> dict[str, Any]:
    """AUROC of the mean map of each modality against the planted regions, the same of a random encoder's, shares and gap."""
    mine = [one for one in watch.found if one.baseline == baseline]
    maps = mean_maps(mine)

    def recovery(found: Sequence[Attribution]) -> dict[str, float]:
        return {name: float(roc_auc_score(planted, values)) for name, values in mean_maps(found).regions.items()}

    return {
        "people": len(mine),
        "auroc": recovery(mine),
        "random_auroc": recovery([one for one in watch.random if one.baseline == baseline]),
        "share": {name: _share(mine, name, per_element=False) for name in maps.regions},
        "share_per_element": {name: _share(mine, name, per_element=True) for name in maps.regions},
        "largest_gap": max(one.gap for one in mine),
        "most_steps": max(one.steps for one in mine),
    }


def _share(found: Sequence[Attribution], modality: str, *, per_element: bool) -> float | None:
    """Mean share of a modality over people; none where nothing is attributed to any input."""
    shares = [one.share(modality, per_element=per_element) for one in found]
    known = [share for share in shares if np.isfinite(share)]
    return float(np.mean(known)) if known else None


def crossed(seed: int, *, model: Path, patients: int, effect: float, repeats: int, atlas: str) -> dict[str, Any]:
    """Scores at each site of a model fitted at the other, beside those of cross-validation within the site."""
    system = load_system(model)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        cohort = simulate(
            root, seed=seed, patients=patients, drug_free=0, atlas=atlas, effect=effect, trial={"repetition_times_s": _TIMES_S}
        )
        truth = json.loads((root / "truth.json").read_text(encoding="utf-8"))
        table = participant_table(cohort)
        row: dict[str, Any] = {"study": "crossed", "seed": seed, "patients": patients, "effect": effect, "scores": {}}
        encoded = encode(system, cohort, list(table.index))
        features = attainable_features(cohort, truth).set_index("participant_id").loc[list(table.index)]
        for name in ("response", "analgesia"):
            target = read_target(cohort, name)
            predictors = {
                f"both{suffix}": TunedPredictor(prepared=lambda _fold, made=made: made, settings=TuningSettings(epochs=0))
                for suffix, made in encoded.items()
            }
            predictors |= make_floors(cohort, target, table, FloorSettings(kinds=("fisherz",))).predictors
            predictors[ATTAINABLE] = linear_predictor(tuple(table.index), features[truth["targets"][name]["planted"]].to_numpy(float))
            row["scores"][name] = {}
            for site in _SITES:
                inside = table.index[table["site"] == site]
                others = table.index[table["site"] != site]
                people = target.keep([one for one in target.participants if one in set(inside)])
                within = make_split(
                    people, table.loc[list(people.participants)], DesignSettings(folds=5, repeats=repeats, strata=("arm",), seed=seed)
                )
                across = fixed_split(target, train=np.array(others), test=np.array(inside), why=f"fitted at the other site than {site}")
                row["scores"][name][site] = {
                    "people": len(inside),
                    "within": _scored(people, within, predictors, seed),
                    "across": _scored(target, across, predictors, seed),
                }
    return row


def _scored(target: Target, split: Split, predictors: Mapping[str, Any], seed: int) -> dict[str, Any]:
    forecasts, _ = run_folds(target, split, predictors, inner=5, seed=seed)
    people = target.keep(split.tested)
    return {name: mean_scores(people, one) for name, one in pool_all(people, split, forecasts, {}).items()}


def power(seed: int, *, bootstraps: int) -> dict[str, Any]:
    """Interaction tests of one trial per size, as p: scores of several agreements with the truth, outcomes with and without the effect."""
    row: dict[str, Any] = {"study": "power", "seed": seed, "p": {}}
    for predictive, truth in ((1.2, "predictive"), (0.0, "prognostic"), (0.0, "nothing")):
        trial = build_trial(
            TrialSettings(predictive=predictive), PopulationSettings(), seed=seed, effect=1.0, atlases=("Schaefer100",), datasets={},
            scan=Scan(frames=200, repetition_time_s=2.0, non_steady_frames=1), resolution_mm=8.0,
        )  # fmt: skip
        drawn = [draw_patient(trial, index) for index in range(1, max(_SIZES) + 1)]
        traits, arm = np.stack([one.traits for one in drawn]), np.array([one.arm for one in drawn])
        analgesia = np.array([one.analgesia for one in drawn], float)
        noise = np.random.default_rng([seed, 55]).normal(size=(2, len(drawn)))
        true = {"predictive": trial.predictive.of(traits), "prognostic": trial.prognostic.of(traits), "nothing": noise[1]}[truth]
        for agreement in _AGREEMENTS if truth == "predictive" else (1.0,):
            score = agreement * true + np.sqrt(1 - agreement**2) * noise[0]
            for size in _SIZES:
                for kind, outcome in (("response", (analgesia >= trial.settings.threshold).astype(float)), ("analgesia", analgesia)):
                    row["p"][f"{truth}, r {agreement:g}, n {size}, {kind}"] = _interaction_p(
                        outcome[:size], score[:size], arm[:size], binary=kind == "response", bootstraps=bootstraps, seed=seed
                    )
    return row


def encoders(
    seed: int, *, pool: Target, traits: NDArray[np.float64], predictors: Mapping[str, Any], patients: int, effect: float
) -> dict[str, Any]:
    """Scores of one trial of ``patients`` drawn from the pool, whose (people, 35) traits carry newly drawn effects."""
    rng = np.random.default_rng([seed, 91])
    settings = TrialSettings()
    rows = np.sort(rng.permutation(len(pool.participants))[:patients])
    drug = rng.permutation(np.arange(patients) % 2).astype(bool)
    trial = _plain_trial(seed, settings, effect)
    expected = np.where(drug, *(expected_analgesia(trial, traits[rows], drug=one) for one in (True, False)))
    analgesia = expected + settings.noise_sd * rng.normal(size=patients)
    people = tuple(pool.participants[row] for row in rows)
    table = pd.DataFrame({"arm": np.where(drug, DRUG, "placebo"), "dataset": "pool"}, index=pd.Index(people, name="participant_id"))
    row: dict[str, Any] = {"study": "encoders", "seed": seed, "patients": patients, "effect": effect, "scores": {}}
    for name, kind, observed in (
        ("response", "binary", (analgesia >= settings.threshold).astype(float)),
        ("analgesia", "continuous", analgesia),
    ):
        classes = ("non-responder", "responder") if kind == "binary" else ()
        target = replace(pool, name=name, kind=kind, participants=people, observed=observed, classes=classes)
        split = make_split(target, table, DesignSettings(folds=5, repeats=1, strata=("arm",), seed=seed))
        row["scores"][name] = _scored(target, split, predictors, seed)
    return row


def _plain_trial(seed: int, settings: TrialSettings, effect: float) -> Trial:
    scan = Scan(frames=200, repetition_time_s=2.0, non_steady_frames=1)
    return build_trial(
        settings, PopulationSettings(), seed=seed, effect=effect, atlases=("Schaefer100",), datasets={}, scan=scan, resolution_mm=8.0
    )


def read_pool(folder: Path, model: Path, people: int, atlas: str) -> tuple[Target, NDArray[np.float64], dict[str, Any]]:
    """Simulated people as a target without values, their traits, and a predictor per encoder and set of blocks."""
    cohort = simulate(folder, seed=300_000, patients=people, drug_free=0, atlas=atlas)
    names = list(participant_table(cohort).index)
    trial = _plain_trial(300_000, TrialSettings(), 1.0)
    traits = np.stack([draw_patient(trial, int(name.removeprefix("patient"))).traits for name in names])
    predictors: dict[str, Any] = {}
    system, fitted = load_system(model), load_system(model / "random")
    for suffix, one in (("", system), (RANDOM, system.randomised(0)), (FITTED, fitted)):
        made = (one, prepare_inputs(one, cohort, names, sorted(cohort.atlases)))
        for kind, blocks in BLOCKS.items():
            if not suffix or kind != "connectivity only":
                tuning = TuningSettings(epochs=0, blocks=blocks)
                predictors[kind + suffix] = TunedPredictor(prepared=lambda _fold, made=made: made, settings=tuning)
    truth = json.loads((folder / "truth.json").read_text(encoding="utf-8"))
    measured = attainable_features(cohort, truth).set_index("participant_id").loc[names, truth["tilts"]].to_numpy(float)
    predictors["linear, all seven measured tilts"] = linear_predictor(tuple(names), measured)
    pool = Target(name="pool", kind="continuous", participants=tuple(names), observed=np.zeros(len(names)))
    return pool, traits, predictors


def report_encoders(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over trials, and paired differences to the pretrained encoder; trials share people, which the intervals do not know."""
    found: dict[str, Any] = {"trials": len(rows), "patients": rows[0]["patients"], "effect": rows[0]["effect"]}
    for name, metric in (("response", "auroc"), ("analgesia", "pearson_r")):
        table = {
            key: [row["scores"][name][key][metric] or (0.5 if metric == "auroc" else 0.0) for row in rows]
            for key in rows[0]["scores"][name]
        }
        found[f"{name}, {metric}"] = {key: mean_interval(values) for key, values in table.items()}
        for kind in ("both", "series only"):
            for suffix in (RANDOM, FITTED):
                difference = np.subtract(table[kind], table[kind + suffix]).tolist()
                found[f"{name}, {metric}, {kind} less {kind}{suffix}"] = mean_interval(difference)
        for other in ("series only", "connectivity only"):
            found[f"{name}, {metric}, both less {other}"] = mean_interval(np.subtract(table["both"], table[other]).tolist())
    return found


def _interaction_p(
    outcome: NDArray[Any], score: NDArray[Any], arm: NDArray[Any], *, binary: bool, bootstraps: int, seed: int
) -> float | None:
    """p, or none where the trial cannot be tested (fewer than five of a class in an arm)."""
    try:
        return interaction(
            outcome, score, arm, treated=DRUG, binary=binary, settings=InteractionSettings(bootstraps=bootstraps, seed=seed)
        ).p
    except InputDatasetError:
        return None


def mean_interval(values: Sequence[float | None]) -> list[float]:
    """Mean with its 95 % bootstrap interval over the trials that have a value."""
    array = np.array([value for value in values if value is not None and np.isfinite(value)])
    drawn = array[np.random.default_rng(0).integers(0, len(array), (5000, len(array)))].mean(1)
    return [round(float(value), 3) for value in (array.mean(), *np.percentile(drawn, (2.5, 97.5)))]


def report_explained(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over trials, by the modality in which the effect is planted."""
    found: dict[str, Any] = {"trials": len(rows), "patients": rows[0]["patients"], "effect": rows[0]["effect"]}
    for modality in PLANTED_IN:
        parts = [row[modality] for row in rows]
        found[modality] = {"pearson_r": mean_interval([one["scores"]["pearson_r"] or 0.0 for one in parts])}
        for baseline in parts[0]["maps"]:
            maps = [one["maps"][baseline] for one in parts]
            found[modality][baseline] = {
                "auroc of its map": mean_interval([one["auroc"][modality] for one in maps]),
                "lowest": min(round(one["auroc"][modality], 3) for one in maps),
                "trials at 0.9 or more": sum(one["auroc"][modality] >= 0.9 for one in maps),
                # of the random encoder one baseline only is explained
                **({"random encoder": mean_interval([one["random_auroc"][modality] for one in maps])} if maps[0]["random_auroc"] else {}),
                "its share": mean_interval([one["share"][modality] for one in maps]),
                "its share per element": mean_interval([one["share_per_element"][modality] for one in maps]),
                "largest gap": max(round(one["largest_gap"], 5) for one in maps),
            }
    for kind in ("share", "share_per_element"):
        pairs = [tuple(row[modality]["maps"]["zero"][kind][SERIES] for modality in PLANTED_IN) for row in rows]
        moved = [here - there for here, there in pairs if here is not None and there is not None]
        found[f"{kind} of series: planted there less planted in coupling"] = {
            "mean": mean_interval(moved),
            "moved": sum(one > 0 for one in moved),
        }
    return found


def report_crossed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean scores per site and predictor, and what is lost from within to across, over trials."""
    found: dict[str, Any] = {"trials": len(rows), "patients": rows[0]["patients"], "effect": rows[0]["effect"]}
    for name, metric in (("response", "auroc"), ("analgesia", "pearson_r")):
        for site in _SITES:
            parts = [row["scores"][name][site] for row in rows]
            found[f"{name}, {metric}, tested at {site}"] = {
                key: {
                    "within": mean_interval([one["within"][key][metric] for one in parts]),
                    "across": mean_interval([one["across"][key][metric] for one in parts]),
                    "across - within": mean_interval([one["across"][key][metric] - one["within"][key][metric] for one in parts]),
                }
                for key in parts[0]["within"]
            }
    return found


def report_power(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Share of trials with p of 0.05 or less, with its exact interval, of those that could be tested."""
    found: dict[str, Any] = {"trials": len(rows)}
    for key in rows[0]["p"]:
        p = np.array([row["p"][key] for row in rows if row["p"][key] is not None])
        hits = int((p <= 0.05).sum())
        interval = stats.binomtest(hits, len(p)).proportion_ci(method="exact")
        found[key] = [len(p), round(hits / len(p), 3), round(interval.low, 3), round(interval.high, 3)]
    return found


REPORTS = {"explained": report_explained, "crossed": report_crossed, "power": report_power, "encoders": report_encoders}


def main() -> None:
    """Run one study, or print what the files hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=[*REPORTS, "report"])
    parser.add_argument("files", nargs="*", type=Path, help="of report")
    parser.add_argument("--model", type=Path)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--first", type=int, default=1, help="seed of the first trial, so that several processes share a study")
    parser.add_argument("--patients", type=int, default=200)
    parser.add_argument("--effect", type=float, default=1.0)
    parser.add_argument("--people", type=int, default=2, help="test people explained in each fold, or people of the pool")
    parser.add_argument("--repeats", type=int, default=2, help="repetitions of five folds within a site")
    parser.add_argument("--bootstraps", type=int, default=199, help="of the interaction test")
    parser.add_argument("--atlas", default="Schaefer100")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.study == "report":
        rows = [json.loads(line) for path in arguments.files for line in path.read_text(encoding="utf-8").splitlines()]
        for key in sorted({(row["study"], row.get("patients", 0), row.get("effect", 0)) for row in rows}):
            print(json.dumps({key[0]: REPORTS[key[0]]([row for row in rows if (row["study"], row.get("patients", 0), row.get("effect", 0)) == key])}, indent=1))  # fmt: skip
        return
    if arguments.out is None:
        parser.error("--out is needed")
    names = {"explained": ("model", "patients", "effect", "atlas"), "crossed": ("model", "patients", "effect", "repeats", "atlas"), "power": ("bootstraps",), "encoders": ("patients", "effect")}  # fmt: skip
    work = {"explained": explained, "crossed": crossed, "power": power, "encoders": encoders}[arguments.study]
    options = {name: getattr(arguments, name) for name in names[arguments.study]}
    if arguments.study == "explained":
        options["explanation"] = ExplanationSettings(people=arguments.people)
    if arguments.study == "encoders":
        with tempfile.TemporaryDirectory() as scratch:
            made = read_pool(Path(scratch), arguments.model, arguments.people, arguments.atlas)
        options |= dict(zip(("pool", "traits", "predictors"), made, strict=True))
    rows = resumed(arguments.out, range(arguments.first, arguments.first + arguments.trials), lambda seed: work(seed, **options))
    print(json.dumps(REPORTS[arguments.study](rows), indent=1))


if __name__ == "__main__":
    main()
