"""The smallest pretraining of each system, and what two of them must have in common."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from tests.synthetic_scans import write_scans

# 23 people of the series train: batches of 7 and 8, so that ranks do not divide them evenly; nor those of the other stores.
PEOPLE, BATCH = 26, 8
VIEWERS = ("participants=2", "viewing.images=24", "viewing.shared=8", "viewing.voxels=40", "viewing.repeats=2", "viewing.captions=2")


@dataclass(frozen=True)
class Pretraining:
    """One system's smallest pretraining."""

    data: str
    """Which input."""
    settings: tuple[str, ...]
    """Beside those of all systems."""
    terms: tuple[str, ...]
    """Losses that must be those of one rank."""


SYSTEMS = {
    "brain-graph": Pretraining("series", ("system.preset=tiny",), ("node", "edge", "contrast", "cross_atlas")),
    "drug-response": Pretraining("series", ("system.preset=tiny",), ("patch", "spectrum")),
    "brain-caption": Pretraining("voxels", ("system.preset=nano", "batch_size=7"), ("patch",)),
    "mri-language": Pretraining(
        "scans",
        ("system.preset=nano", "slices.size=48", "slices.sequences=[FLAIR]", "system.evaluated_slices=8", "batch_size=15"),
        ("patch", "ssim", "contrast"),
    ),
}


def make_input(root: Path, name: str) -> Path:
    """Write one of the inputs into ``root``, if it is not there yet, and give back its folder."""
    folder = root / name
    if folder.is_dir():
        return folder
    if name == "scans":
        return write_scans(folder, participants=10).root
    if name == "series":
        sizes = ("--participants", PEOPLE, "--seed", 3, "--atlases", "Schaefer100", "AAL116", "--set", "frames=80")
        run("simulate", folder, "--kind", "rest", "--level", "series", *sizes)
        return folder
    run("simulate", root / "viewing", "--kind", "viewing", "--seed", 1, "--set", *VIEWERS)
    run("parcellate", root / "viewing", folder, "group", "--trials")
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "brainfm_cli", *map(str, arguments)]


def run(*arguments: object) -> None:
    done = subprocess.run(command(*arguments), check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def pretraining(source: Path, out: Path, ranks: int, system: str, *more: str) -> tuple[object, ...]:
    common = ("epochs=2", f"batch_size={BATCH}", "log_every=1", f"execution.devices={ranks}")
    settings = (*common, *SYSTEMS[system].settings, *more)
    return ("pretrain", source, out, "group", "--device", "cpu", "--system", system, "--set", *settings)


def log_of(out: Path) -> pd.DataFrame:
    (path,) = (out / "models").glob("*/log.csv")
    return pd.read_csv(path)


def weights_of(out: Path) -> dict[str, np.ndarray]:
    (path,) = (out / "models").glob("*/model.safetensors")
    return load_file(path)


def assert_same_training(first: Path, second: Path, terms: tuple[str, ...]) -> None:
    one, many = log_of(first), log_of(second)
    assert list(one["step"]) == list(many["step"])
    assert set(one["kind"]) == {"train", "validation"}
    for term in (*terms, "loss", "gradient_norm", "learning_rate"):
        np.testing.assert_allclose(many[term], one[term], rtol=1e-5, err_msg=term)
    expected = weights_of(first)
    for name, values in weights_of(second).items():
        np.testing.assert_allclose(values, expected[name], atol=1e-4, err_msg=name)
