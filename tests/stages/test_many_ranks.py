"""Pretraining on several processes (gloo) is that on one: the same losses, the same weights up to rounding, one record, resumable on fewer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.stages.pretrainings import SYSTEMS, assert_same_training, command, make_input, pretraining, run


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


CASES = [
    pytest.param(system, ranks, id=f"{system}-{ranks}", marks=() if (system, ranks) == ("brain-graph", 2) else pytest.mark.long)
    for system in SYSTEMS
    for ranks in (2, 4)
]


@pytest.mark.parametrize(("system", "ranks"), CASES)
def test_ranks_train_as_one(inputs: Path, tmp_path: Path, system: str, ranks: int) -> None:
    for number in (1, ranks):
        run(*pretraining(make_input(inputs, SYSTEMS[system].data), tmp_path / str(number), number, system))
    assert_same_training(tmp_path / "1", tmp_path / str(ranks), SYSTEMS[system].terms)
    (record,) = (tmp_path / str(ranks) / "logs" / "records").glob("model-*.json")
    values = json.loads(record.read_text())
    assert values["status"] == "done"
    assert any(stamp["path"].endswith("model.safetensors") for stamp in values["outputs"])


@pytest.mark.long
@pytest.mark.parametrize("system", SYSTEMS)
def test_killed_on_two_ranks_goes_on_on_one(inputs: Path, tmp_path: Path, system: str) -> None:
    source, plain, killed = make_input(inputs, SYSTEMS[system].data), tmp_path / "plain", tmp_path / "killed"
    run(*pretraining(source, plain, 1, system, "checkpoint_every=1"))
    process = subprocess.Popen(
        command(*pretraining(source, killed, 2, system, "checkpoint_every=1")),
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
    run(*pretraining(source, killed, 1, system, "checkpoint_every=1"))
    assert_same_training(plain, killed, SYSTEMS[system].terms)
