"""Pretraining on several processes (gloo) is that on one: the same losses, the same weights up to rounding, one record, resumable on fewer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

# 23 people train: batches of 7 and 8, so that two ranks do not divide them evenly.
PEOPLE, BATCH = 26, 8
BRAIN_GRAPH = ("--system", "brain-graph", "--set", "system.preset=tiny")
DRUG_RESPONSE = ("--system", "drug-response", "--set", "system.preset=tiny")


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks") / "series"
    sizes = ("--participants", PEOPLE, "--seed", 3, "--atlases", "Schaefer100", "AAL116", "--set", "frames=80")
    subprocess.run(command("simulate", folder, "--kind", "rest", "--level", "series", *sizes), check=True, capture_output=True)
    return folder


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "brainfm_cli", *map(str, arguments)]


def pretraining(simulated: Path, out: Path, ranks: int, system: tuple[str, ...], *more: str) -> list[str]:
    settings = ("epochs=2", f"batch_size={BATCH}", "log_every=1", f"execution.devices={ranks}", *more)
    return command("pretrain", simulated, out, "group", "--device", "cpu", *system, *settings)


def log_of(out: Path) -> pd.DataFrame:
    (path,) = (out / "models").glob("*/log.csv")
    return pd.read_csv(path)


def weights_of(out: Path) -> dict[str, np.ndarray]:
    (path,) = (out / "models").glob("*/model.safetensors")
    return load_file(path)


def assert_same_training(first: Path, second: Path, terms: list[str]) -> None:
    one, many = log_of(first), log_of(second)
    assert list(one["step"]) == list(many["step"])
    for term in (*terms, "loss", "gradient_norm", "learning_rate"):
        np.testing.assert_allclose(many[term], one[term], rtol=1e-5, err_msg=term)
    expected = weights_of(first)
    for name, values in weights_of(second).items():
        np.testing.assert_allclose(values, expected[name], atol=1e-4, err_msg=name)


@pytest.mark.parametrize(
    ("system", "terms", "ranks"),
    [
        pytest.param(BRAIN_GRAPH, ["node", "edge", "contrast", "cross_atlas"], 2, id="brain-graph"),
        pytest.param(DRUG_RESPONSE, ["patch", "spectrum"], 2, id="drug-response", marks=pytest.mark.long),
        pytest.param(BRAIN_GRAPH, ["node", "edge", "contrast", "cross_atlas"], 4, id="brain-graph-4", marks=pytest.mark.long),
        pytest.param(DRUG_RESPONSE, ["patch", "spectrum"], 4, id="drug-response-4", marks=pytest.mark.long),
    ],
)
def test_ranks_train_as_one(simulated: Path, tmp_path: Path, system: tuple[str, ...], terms: list[str], ranks: int) -> None:
    for number in (1, ranks):
        subprocess.run(pretraining(simulated, tmp_path / str(number), number, system), check=True, capture_output=True)
    assert_same_training(tmp_path / "1", tmp_path / str(ranks), terms)
    (record,) = (tmp_path / str(ranks) / "logs" / "records").glob("model-*.json")
    values = json.loads(record.read_text())
    assert values["status"] == "done"
    assert any(stamp["path"].endswith("model.safetensors") for stamp in values["outputs"])


@pytest.mark.long
def test_killed_on_two_ranks_goes_on_on_one(simulated: Path, tmp_path: Path) -> None:
    plain, killed = tmp_path / "plain", tmp_path / "killed"
    subprocess.run(pretraining(simulated, plain, 1, BRAIN_GRAPH, "checkpoint_every=1"), check=True, capture_output=True)
    process = subprocess.Popen(
        pretraining(simulated, killed, 2, BRAIN_GRAPH, "checkpoint_every=1"),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not list(killed.glob("models/*/checkpoints/step-0000000[3-9]*")):
        assert process.poll() is None, "ended before it could be killed"
        assert time.monotonic() < deadline, "no state was saved"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not list(killed.glob("models/*/provenance.json"))
    subprocess.run(pretraining(simulated, killed, 1, BRAIN_GRAPH, "checkpoint_every=1"), check=True, capture_output=True)
    assert_same_training(plain, killed, ["node", "edge", "contrast", "cross_atlas"])
