"""A drug-response model meets series that it cannot read: each is a named error before anything is learnt; another repetition time is not."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest

from brainfm_cli.errors import EXIT_BAD_DATA, EXIT_SETTINGS
from tests.stages.command import brainfm_on_cpu as brainfm
from tests.stages.command import only

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SMALL = (
    "system.preset=tiny", "system.width=32", "system.windows.patch_s=20", "system.windows.window_s=80", "system.windows.min_s=40",
    "epochs=1", "batch_size=8", "where.cohort=[drug-free]",
)  # fmt: skip
TUNE = ("--target", "response", "--set", "where.cohort=[trial]", "tuning.epochs=0", "tuning.inner_folds=2")


def simulate(folder: Path, *options: str, atlas: str = "Schaefer100") -> Path:
    sizes = ("--participants", 24, "--seed", 2, "--atlases", atlas, "--set", "frames=60", "trial.drug_free=8", *options)
    assert brainfm("simulate", folder, "--kind", "drug", "--level", "series", *sizes) == 0
    return folder


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("bad")
    simulate(root / "sim")
    for name, more in (("scan", ()), ("kept", ("system.scaling.gain=kept",))):
        assert brainfm("pretrain", root / "sim", root / name, "group", "--system", "drug-response", "--set", *SMALL, *more) == 0
    return root


def tune(root: Path, series: Path, out: Path, *, model: str = "scan") -> int:
    return brainfm("prompt-tune", series, out, "group", "--model", only(root / model / "models"), *TUNE)


def spoilt(root: Path, to: Path, change: Callable[[pd.DataFrame], object]) -> Path:
    """A copy of the cohort with another index."""
    shutil.copytree(root / "sim", to)
    path = to / "cohort" / "index.parquet"
    index = pd.read_parquet(path)
    change(index)
    index.to_parquet(path)
    return to


def set_patient(column: str, value: float) -> Callable[[pd.DataFrame], object]:
    """Another value for the first patient of the trial."""

    def change(index: pd.DataFrame) -> None:
        patients = index.index[~index["participant"].str.contains("free")]
        index.loc[patients[0], column] = value

    return change


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("repetition_time", np.nan, "the repetition time of a run is unknown"),
        ("frames", 8, "a run of 16 s is shorter than a patch of the encoder (20 s)"),
    ],
)
def test_a_run_that_cannot_be_encoded_is_said(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, column: str, value: float, said: str
) -> None:
    assert tune(root, spoilt(root, tmp_path / "sim", set_patient(column, value)), tmp_path / "out") == EXIT_BAD_DATA
    assert said in caplog.text
    assert not list((tmp_path / "out").glob("models/*/head.safetensors"))


def test_unscaled_series_are_refused_where_the_gain_counts_and_change_nothing_where_it_does_not(
    root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(root / "sim", tmp_path / "sim")
    (path,) = (tmp_path / "sim" / "cohort").glob("atlas-*.npy")
    np.save(path, 1000 * np.load(path))
    assert tune(root, tmp_path / "sim", tmp_path / "kept", model="kept") == EXIT_BAD_DATA
    assert "they are in other units" in caplog.text
    assert tune(root, tmp_path / "sim", tmp_path / "scan") == 0
    assert tune(root, root / "sim", tmp_path / "as-they-were") == 0
    assert tune(root, root / "sim", tmp_path / "both", model="kept") == 0  # the units pretrained on
    held_out = [next((tmp_path / name).rglob("*held_out*.tsv")) for name in ("scan", "as-they-were")]
    raw, scaled = (pd.read_csv(one, sep="\t").filter(like="predicted").to_numpy() for one in held_out)
    np.testing.assert_allclose(raw, scaled, atol=1e-3)


def test_a_model_of_another_atlas_is_refused(root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    other = simulate(tmp_path / "other", atlas="AAL116")
    assert tune(root, other, tmp_path / "out") in (EXIT_SETTINGS, EXIT_BAD_DATA)
    assert "atlas" in caplog.text
    assert not list((tmp_path / "out").glob("models/*/head.safetensors"))


def test_series_of_another_repetition_time_are_resampled(root: Path, tmp_path: Path) -> None:
    other = simulate(tmp_path / "other", "trial.repetition_times_s=[2.5]")
    assert pd.read_parquet(other / "cohort" / "index.parquet")["repetition_time"].unique().tolist() == [2.5]
    assert tune(root, other, tmp_path / "out") == 0
