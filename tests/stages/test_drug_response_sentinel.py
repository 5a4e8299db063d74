"""Nothing of a test fold reaches a scaler, a weight or a cut: one person's series become a sentinel, and only the folds change in which they train."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.learning.checkpoints import read_tensors
from tests.stages.command import brainfm_on_cpu as brainfm
from tests.stages.command import only

TRAINING = (
    "system.preset=tiny", "system.width=32", "system.windows.patch_s=20", "system.windows.window_s=80", "system.windows.min_s=40",
    "epochs=1", "batch_size=8", "validation_fraction=0",
)  # fmt: skip
TUNE = ("--target", "sex", "--set", "tuning.epochs=0", "tuning.inner_folds=2")
QUICK = (
    "refit=always", "pretraining=inside", "design.folds=2", "floors.kinds=[majority]", "evaluation.bootstraps=100",
    "evaluation.permutations=99", "evaluation.inner_folds=2", "evaluation.groups=[sex]", "random_encoder=false",
)  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sentinel")
    options = ("--participants", 24, "--seed", 4, "--atlases", "Schaefer100", "--set", "frames=60")
    assert brainfm("simulate", root / "plain", "--kind", "rest", "--level", "series", *options) == 0
    shutil.copytree(root / "plain", root / "planted")
    cohort = Cohort.open(root / "planted")
    row = next(row for row in cohort.index.itertuples() if row.participant == sentinel(root))
    (store,) = (root / "planted").rglob("atlas-*.npy")
    series = np.load(store, mmap_mode="r+")
    frames = len(cohort.series(row))
    series[row.offset : row.offset + frames] *= np.linspace(1, 5000, series.shape[1], dtype=series.dtype)
    series.flush()
    for name in ("plain", "planted"):
        assert brainfm("pretrain", root / name, root / f"{name}-model", "group", "--system", "drug-response", "--set", *TRAINING) == 0
        model = only(root / f"{name}-model" / "models")
        assert brainfm("prompt-tune", root / name, root / f"{name}-tuned", "group", "--model", model, *TUNE) == 0
        tuned = only(root / f"{name}-tuned" / "models")
        assert brainfm("predict", root / name, root / f"{name}-scored", "group", "--model", tuned, "--set", *QUICK) == 0
    return root


def sentinel(root: Path) -> str:
    return sorted(Cohort.open(root / "plain").participants.index)[5]


def fold_tested(root: Path, name: str) -> int:
    split = pd.read_csv(root / "plain-scored" / "split.tsv", sep="\t", dtype={"participant_id": str})
    return int(split.loc[(split["participant_id"] == name) & (split["role"] == "test"), "fold"].iloc[0])


def model_of(root: Path, name: str, fold: int) -> Path:
    (found,) = (root / f"{name}-scored" / "models").glob(f"*-fold{fold}")
    return found


def test_the_sentinel_reaches_no_scaler_and_no_weight_of_the_fold_that_tests_it(root: Path) -> None:
    tested = fold_tested(root, sentinel(root))
    for fold in (1, 2):
        plain, planted = (read_tensors(model_of(root, name, fold) / "model.safetensors") for name in ("plain", "planted"))
        same = {name: plain[name].equal(planted[name]) for name in plain}
        scales = [name for name in plain if "scaler" in name]
        assert scales
        if fold == tested:
            assert all(same.values())
        else:  # where the person trains, the sentinel is seen: the test could fail
            assert not all(same[name] for name in scales)
            assert not all(same.values())


def test_the_sentinel_moves_no_other_prediction_of_its_fold(root: Path) -> None:
    who, found = sentinel(root), []
    for name in ("plain", "planted"):
        table = pd.read_csv(root / f"{name}-scored" / "predictions.tsv", sep="\t", dtype={"participant_id": str})
        first = table[table["predictor"] == table["predictor"].iloc[0]].set_index("participant_id")
        found.append(first[first["fold"] == fold_tested(root, who)]["p1"])
    plain, planted = found
    pd.testing.assert_series_equal(plain.drop(who), planted.drop(who), rtol=1e-9)
    assert plain[who] != planted[who]
