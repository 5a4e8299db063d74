"""Acute stroke masks of real people (SOOP, ds004889): severity and outcome from the lesion, and reports of facts that a script checks.

outcome: the stroke scale on admission (NIHSS, in its five grades) and the modified Rankin scale as ordered classes, from the shares of arterial
territories that the mask covers, with age and sex, beside age + sex + volume, age + sex, and the majority, on the same folds of the
evaluation. reports: the volume, side and places that written reports state, against figures counted another way.

    python benchmarks/stroke_outcome.py outcome LESIONS_SOOP --out soop.json
    python benchmarks/stroke_outcome.py reports LESIONS_SOOP --count 50
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nibabel as nib
import numpy as np
import pandas as pd
from scipy.ndimage import map_coordinates
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from brainfm_cli.atlases.catalogue import find_atlas
from brainfm_cli.learning.evaluation import Context, EvaluationSettings, evaluate
from brainfm_cli.learning.forecasts import Forecast, TrainingFold
from brainfm_cli.learning.radiology_reports import affirmed, check_report, parse_report, write_report
from brainfm_cli.learning.splits import DesignSettings, make_split
from brainfm_cli.learning.targets import Target
from brainfm_cli.signals.lesions import lesion_facts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

_GRADES = (0, 4, 15, 20, 42)  # none, minor, moderate, moderate to severe, severe (Brott 1989 and usage since)
_PENALTIES = (0.001, 0.01, 0.1, 1.0)
_ATLAS = "ArterialAtlas136.nii.gz"


@dataclass(frozen=True)
class OrderedLogistic:
    """One logistic model per threshold between ordered classes (Frank and Hall 2001); the penalty by inner log-loss."""

    features: pd.DataFrame

    def __call__(self, fold: TrainingFold, test: Sequence[str]) -> Forecast:
        """Class probabilities of ``test``."""
        x, y = self.features.loc[list(fold.target.participants)].to_numpy(float), fold.labels
        count = len(fold.target.classes)
        losses = {}
        for penalty in _PENALTIES:
            parts = [-np.log(self._fit(x[a], y[a], x[b], count, penalty)[np.arange(len(b)), y[b]]).mean() for a, b in fold.inner]
            losses[penalty] = float(np.mean(parts))
        best = min(losses, key=losses.__getitem__)
        held = np.full((len(y), count), np.nan)
        for a, b in fold.inner:
            held[b] = self._fit(x[a], y[a], x[b], count, best)
        test_x = self.features.loc[list(test)].to_numpy(float)
        return Forecast(test=self._fit(x, y, test_x, count, best), train=held, choices={"penalty": best})

    @staticmethod
    def _fit(x: NDArray[Any], y: NDArray[Any], test: NDArray[Any], count: int, penalty: float) -> NDArray[np.float64]:
        above = np.ones((len(test), count + 1))
        above[:, count] = 0
        for threshold in range(1, count):
            over = y >= threshold
            if over.all() or not over.any():
                above[:, threshold] = over.mean()
                continue
            model = make_pipeline(StandardScaler(), LogisticRegression(C=penalty, max_iter=500))
            above[:, threshold] = model.fit(x, over).predict_proba(test)[:, 1]
        above = np.minimum.accumulate(above, axis=1)  # thresholds are fitted apart and may cross
        chances = np.clip(-np.diff(above, axis=1), 1e-6, None)
        return chances / chances.sum(axis=1, keepdims=True)


def territories(folder: Path) -> pd.DataFrame:
    """Share of every arterial territory that each person's mask covers, and the volume (mL); one row per mask."""
    atlas = nib.load(folder / "masks" / _ATLAS)
    labels = np.asarray(atlas.dataobj).astype(int)
    sizes, rows = np.bincount(labels.ravel()), {}
    used = [value for value in range(1, len(sizes)) if sizes[value]]
    for path in sorted((folder / "masks").glob("bwsrsub-*_lesion.nii.gz")):
        image = nib.load(path)
        if image.shape != atlas.shape:
            raise SystemExit(f"{path.name}: another grid than the atlas")
        mask = np.asarray(image.dataobj) > 0
        covered = np.bincount(labels[mask], minlength=len(sizes))
        name = "sub-" + path.name.split("-")[1].split("_")[0]
        volume = mask.sum() * abs(np.linalg.det(image.affine[:3, :3])) / 1000
        rows[name] = {**{f"territory{value}": covered[value] / sizes[value] for value in used}, "volume_ml": volume}
    return pd.DataFrame.from_dict(rows, orient="index")


def outcome(folder: Path, out: Path | None, repeats: int) -> None:
    """Print quadratic κ, and its difference to each floor, of both tasks."""
    people = pd.read_csv(folder / "participants.tsv", sep="\t", na_values="n/a").set_index("participant_id")
    people["age"] = pd.to_numeric(people["age"].astype(str).str.removesuffix("+"), errors="coerce")  # "89+" hides the oldest
    loads = territories(folder)
    print(json.dumps({"masks": len(loads), "people": len(people)}))
    table = people.join(loads, how="inner")
    table["female"], table["log_volume"] = (table["sex"] == "F").astype(float), np.log1p(table["volume_ml"])
    spread = loads.drop(columns="volume_ml")
    spread = spread.loc[:, (spread > 0).mean() > 0.01]
    for task in ("nihss", "gs_rankin_6isdeath"):
        known = table[table[task].notna() & table["age"].notna() & table["sex"].notna()]
        values = known[task].to_numpy()
        if task == "nihss":
            observed = np.searchsorted(_GRADES, values)
            classes: tuple[str, ...] = ("0", "1 to 4", "5 to 15", "16 to 20", "21 to 42")
        else:
            observed, classes = values.astype(int), tuple(map(str, range(7)))
        target = Target(
            name=task, kind="multiclass", participants=tuple(known.index), observed=observed.astype(float), classes=classes, ordered=True
        )
        basic = known[["age", "female"]]
        features = {
            "territories + volume + age + sex": basic.assign(v=known["log_volume"]).join(spread),
            "age + sex + volume": basic.assign(v=known["log_volume"]),
            "age + sex": basic,
            "volume": known[["log_volume"]],
        }
        context_table = pd.DataFrame({"dataset": "soop", "site": "one", "mean_fd": 0.0}, index=known.index)
        split = make_split(target, context_table, DesignSettings(repeats=repeats))
        predictors = {name: OrderedLogistic(values) for name, values in features.items()}
        context = Context(table=context_table, models=("territories + volume + age + sex",))
        result = evaluate(target, split, predictors, context, EvaluationSettings(groups=(), permutations=999)).metrics
        print(f"## {task}: {result.people} people, classes {target.counts()}")
        for one in result.predictors:
            print(
                f"{one.name}: " + ", ".join(f"{name} {score}" for name, score in one.scores.items() if score.value is not None),
                one.permutation_p,
            )
        for one in result.differences:
            print(f"{one.first} - {one.second}: {one}")
        if out:
            out.with_suffix(f".{task}.json").write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")


def reports(folder: Path, count: int, seed: int) -> None:
    """Write and check reports of ``count`` masks, drawn at random."""
    atlas = find_atlas("AAL116")
    labels, affine = atlas.load()
    names = dict(zip(atlas.values, atlas.regions.names, strict=True))
    paths = sorted((folder / "masks").glob("bwsrsub-*_lesion.nii.gz"))
    chosen = np.random.default_rng(seed).choice(len(paths), count, replace=False)
    wrong: dict[str, list[str]] = {"side": [], "volume": [], "place": [], "contradiction": []}
    for path in (paths[place] for place in sorted(chosen)):
        image = nib.load(path)
        mask = np.asarray(image.dataobj) > 0
        grid = np.indices(mask.shape).reshape(3, -1)
        there = nib.affines.apply_affine(np.linalg.inv(affine) @ image.affine, grid.T).T
        placed = map_coordinates(labels, there, order=0, mode="constant").reshape(mask.shape)
        facts = lesion_facts(mask, image.affine, labels=placed, names=names)
        # counted another way: voxel sizes of the header, halves of the array in RAS order, the atlas label of most voxels
        ras = nib.as_closest_canonical(image)
        turned = np.asarray(ras.dataobj) > 0
        volume = turned.sum() * np.prod(ras.header.get_zooms()[:3]) / 1000
        middle = round(float(np.linalg.inv(ras.affine)[0, 3]))
        left = turned[:middle].sum() / turned.sum()
        side = "left" if left > 0.95 else "right" if left < 0.05 else "both"
        for language in ("en", "zh"):
            text = write_report(facts, language=language, disease="infarct").text
            (first, *_) = affirmed(parse_report(text))
            if first.side != side:
                wrong["side"].append(path.name)
            if first.volume_ml is None or abs(first.volume_ml - volume) > 0.05 * volume + 0.005:
                wrong["volume"].append(path.name)
            values = np.bincount(placed[mask])
            values[0] = 0
            if values.sum() and first.places and not _holds(names[int(values.argmax())], first.places):
                wrong["place"].append(path.name)
            if check_report(text, facts, known_places=tuple(names.values())):
                wrong["contradiction"].append(path.name)
    print(
        json.dumps({"masks": count, "reports": 2 * count, **{name: len(found) for name, found in wrong.items()}, "which": wrong}, indent=2)
    )


def _holds(region: str, places: Sequence[str]) -> bool:
    """Whether the region of most voxels is one of the places named."""
    words = {place for one in parse_report(f"lesion of the {region.replace('_', ' ')}") for place in one.places}
    return not words or bool(words & set(places))


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["outcome", "reports"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.what == "outcome":
        outcome(arguments.folder, arguments.out, arguments.repeats)
    else:
        reports(arguments.folder, arguments.count, arguments.seed)


if __name__ == "__main__":
    main()
