"""Real responses: Haxby et al. (2001), one person, eight viewed categories in twelve runs, through the whole brain-caption chain.

Runs are held out, a few at a time until each was tested once; captions come from a template ("a photo of a face"), so that only the category
says anything. Category accuracy from generated text stands beside chance, a linear support vector machine and ridge classification on the same
responses and runs, and a permutation p (categories exchanged within runs). One person and 96 blocks at 25 mm show that the chain reads
real responses, and nothing about captions of pictures.

    python benchmarks/haxby.py DATA/haxby2001 OUT --llm smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pandas as pd

TEMPLATE = "a photo of a {category}"
SECONDS = 2.5


def write_derivative(data: Path, root: Path) -> Path:
    """The runs as fMRIPrep would name them, with a brain mask and events beside them."""
    func = root / "sub-001" / "func"
    func.mkdir(parents=True, exist_ok=True)
    _json(
        root / "dataset_description.json",
        {"Name": "haxby2001", "BIDSVersion": "1.10.0", "DatasetType": "derivative", "GeneratedBy": [{"Name": "fMRIPrep"}]},
    )
    for number in range(1, 13):
        given = data / "sub001" / "BOLD" / f"task001_run{number:03d}"
        image = nib.load(given / "bold_25mm.nii.gz")
        brain = nib.load(data / "sub001" / "masks" / "25mm" / "brain.nii.gz")
        stem = f"sub-001_task-objectviewing_run-{number:02d}"
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine), func / f"{stem}_space-T1w_desc-preproc_bold.nii.gz")
        _json(
            func / f"{stem}_space-T1w_desc-preproc_bold.json",
            {"RepetitionTime": SECONDS, "SkullStripped": False, "TaskName": "objectviewing"},
        )
        mask = (np.asarray(brain.dataobj) > 0) & (np.asarray(image.dataobj).mean(-1) > 0)
        nib.save(nib.Nifti1Image(mask.astype(np.uint8), image.affine), func / f"{stem}_space-T1w_desc-brain_mask.nii.gz")
        events = pd.read_csv(given / "bold_events.tsv", sep="\t")
        events["stim_id"] = events["trial_type"].replace({"scrambledpix": "scrambled_picture"})
        events.to_csv(func / f"{stem}_events.tsv", sep="\t", index=False)
    return root


def run_fold(root: Path, trials: Path, fold: int, seed: int, llm: str, arguments: argparse.Namespace) -> pd.DataFrame:
    """Pretrain, align and caption with one set of test runs; one row per test block."""
    out = root / f"fold{fold}-seed{seed}"
    said_by = out / "captions" / "sub-001" / "sub-001_desc-brainfm_caption.json"
    if said_by.is_file():  # a fold that is done is not done again
        return _rows(said_by, fold)
    split = ["split.unit=run", "split.test_fraction=0.25", "split.validation_fraction=0.12", f"split.seed={seed}"]
    sizes = ["system.preset=nano", "batch_size=16", "epochs=10", "optimiser.learning_rate=0.002"]
    _brainfm("pretrain", trials, out / "pretrained", "group", "--system", "brain-caption", "--device", "cpu", "--set", *sizes, *split)
    (model,) = (out / "pretrained" / "models").iterdir()
    fit = [
        "fit.judge=loss",
        "fit.contrast_epochs=12",
        "fit.contrast_weight=1",
        "fit.speaks_from=vector",  # some 70 blocks teach no language model; the templates' own vectors do
        "fit.text_noise=0.3",
        "fit.word_weight=1",
        "fit.encoder_frozen=0",
        "fit.encoder_rate=1",
        "fit.hidden_share=0.2",
        "fit.language_items=8",  # a few through the language model teach a template; a CPU manages no more
        f"llm={llm}",
    ]
    schedule = [
        f"schedule.epochs={arguments.epochs}",
        "schedule.batch_size=16",
        "schedule.patience=null",
        "schedule.optimiser.learning_rate=0.002",
        "schedule.optimiser.final_fraction=0.6",
    ]
    _brainfm("align", trials, out / "aligned", "group", "--model", model, "--device", "cpu", "--set", *fit, *schedule)
    (model,) = (out / "aligned" / "models").iterdir()
    _brainfm("caption", trials, out / "captions", "participant", "--model", model, "--device", "cpu", "--set", "max_tokens=12")
    return _rows(said_by, fold)


def _rows(said_by: Path, fold: int) -> pd.DataFrame:
    said = json.loads(said_by.read_text(encoding="utf-8"))
    rows = [(one["trials"][0], one["stimulus"], one["caption"], fold) for one in said["single_trials"]]
    return pd.DataFrame(rows, columns=["row", "category", "caption", "fold"])


def decided(caption: str, categories: list[str]) -> str:
    """The one category that a caption names; empty where it names none or several."""
    found = [name for name in categories if name.replace("_", " ") in caption.lower()]
    return found[0] if len(found) == 1 else ""


def floors(trials: Path, table: pd.DataFrame) -> dict[str, np.ndarray]:
    """What linear models decide for the same blocks, trained on the other runs of each fold."""
    from sklearn.linear_model import RidgeClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    store = np.load(trials / "cohort" / "voxels-001.npy")
    index = pd.read_parquet(trials / "cohort" / "trials.parquet").sort_values("row")
    made = {"linear SVM": lambda: LinearSVC(C=0.01, max_iter=20_000), "ridge classifier": lambda: RidgeClassifier(alpha=100.0)}
    found = {name: np.empty(len(table), object) for name in made}
    for fold in table["fold"].unique():
        tested = (table["fold"] == fold).to_numpy()
        rows = table.loc[tested, "row"].to_numpy()
        runs = set(index.loc[index["row"].isin(rows), "run"])
        train = index[~index["run"].isin(runs)]
        for name, build in made.items():
            model = make_pipeline(StandardScaler(), build()).fit(store[train["row"]], train["stimulus"])
            found[name][tested] = model.predict(store[rows])
    return found


def permutation_p(said: np.ndarray, truth: np.ndarray, runs: np.ndarray, *, permutations: int = 10_000, seed: int = 0) -> float:
    """Share of exchanges of the categories within runs in which the same sayings are right as often."""
    generator = np.random.default_rng(seed)
    observed = (said == truth).mean()
    as_good = 0
    for _ in range(permutations):
        shuffled = truth.copy()
        for run in np.unique(runs):
            where = np.flatnonzero(runs == run)
            shuffled[where] = truth[generator.permutation(where)]
        as_good += (said == shuffled).mean() >= observed
    return (1 + as_good) / (1 + permutations)


def interval(right: np.ndarray, runs: np.ndarray, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the share that is right, over resampled runs."""
    generator = np.random.default_rng(seed)
    names = np.unique(runs)
    means = [np.concatenate([right[runs == name] for name in generator.choice(names, len(names))]).mean() for _ in range(2000)]
    low, high = np.percentile(means, [2.5, 97.5])
    return round(float(low), 3), round(float(high), 3)


def main() -> None:
    """Print accuracies as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--llm", default="smollm2-135m-instruct")
    parser.add_argument("--epochs", type=int, default=18)
    parser.add_argument("--folds", type=int, default=4)
    arguments = parser.parse_args()
    source, trials = write_derivative(arguments.data, arguments.out / "derivative"), arguments.out / "trials"
    estimate = ["space=T1w", "single_trial.motion=false", f"stimuli.template={TEMPLATE}"]
    for level in ("participant", "group"):
        _brainfm("parcellate", source, trials, level, "--trials", "--set", *estimate)
    index = pd.read_parquet(trials / "cohort" / "trials.parquet").set_index("row")
    tables, tested, seed = [], set(), 0
    while len(tables) < arguments.folds and seed < 100:  # seeds whose test runs were not tested before
        runs = _test_runs(trials, seed)
        if not runs & tested:
            tables.append(run_fold(arguments.out, trials, len(tables) + 1, seed, arguments.llm, arguments))
            tested |= runs
        seed += 1
    table = pd.concat(tables, ignore_index=True)
    categories = sorted(set(index["stimulus"]))
    said = np.array([decided(text, categories) for text in table["caption"]], object)
    truth, runs = table["category"].to_numpy(object), index.loc[table["row"], "run"].to_numpy(object)
    result: dict[str, Any] = {
        "blocks": len(table),
        "runs": len(set(runs)),
        "folds": len(tables),
        "chance": 1 / len(categories),
        "named no category": int((said == "").sum()),
    }
    for name, decisions in {"brain-caption": said, **floors(trials, table)}.items():
        right = decisions == truth
        result[name] = {
            "accuracy": round(float(right.mean()), 4),
            "interval": interval(right, runs),
            "p": permutation_p(decisions, truth, runs),
        }
    table.assign(decided=said).to_csv(arguments.out / "captions.tsv", sep="\t", index=False)
    print(json.dumps(result, indent=2))


def _test_runs(trials: Path, seed: int) -> set[str]:
    from brainfm_cli.bids.voxel_cohort import VoxelCohort
    from brainfm_cli.learning.image_split import ImageSplitSettings, make_split

    settings = ImageSplitSettings(unit="run", test_fraction=0.25, validation_fraction=0.12, seed=seed)
    return set(make_split(VoxelCohort.open(trials), settings).names("test"))


def _brainfm(*arguments: object) -> None:
    subprocess.run([sys.executable, "-m", "brainfm_cli", *map(str, arguments)], check=True)


def _json(path: Path, values: object) -> None:
    path.write_text(json.dumps(values) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
