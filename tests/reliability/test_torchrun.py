"""Processes that torchrun starts train as one process does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.bad_input_bench import Bench
from tests.stages.command import brainfm, only

pytestmark = pytest.mark.long


def test_two_processes_of_torchrun_give_the_losses_of_one(tmp_path: Path) -> None:
    series = Bench(tmp_path / "bench").healthy("series")
    options = (
        "group",
        "--system",
        "brain-graph",
        "--device",
        "cpu",
        "--set",
        "system.preset=tiny",
        "epochs=1",
        "batch_size=8",
        "log_every=1",
    )
    assert brainfm("pretrain", series, tmp_path / "one", *options) == 0
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "brainfm_cli"]
    line = ("pretrain", series, tmp_path / "two", *options, "execution.devices=2")
    subprocess.run([*torchrun, *map(str, line)], check=True, capture_output=True, cwd=Path(__file__).parents[2])
    one, two = (pd.read_csv(only(tmp_path / name / "models") / "log.csv") for name in ("one", "two"))
    assert list(one["step"]) == list(two["step"])
    for term in ("loss", "gradient_norm", "learning_rate"):
        np.testing.assert_allclose(two[term], one[term], rtol=1e-5, err_msg=term)
