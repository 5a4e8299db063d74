"""Processes that torchrun starts train as one process does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.stages.pretrainings import SYSTEMS, assert_same_training, make_input, pretraining, run

pytestmark = pytest.mark.long


@pytest.mark.parametrize("system", SYSTEMS)
def test_two_processes_of_torchrun_give_the_losses_of_one(tmp_path: Path, system: str) -> None:
    source = make_input(tmp_path / "input", SYSTEMS[system].data)
    run(*pretraining(source, tmp_path / "one", 1, system))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "brainfm_cli"]
    line = map(str, pretraining(source, tmp_path / "two", 2, system))
    done = subprocess.run([*torchrun, *line], check=False, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-4000:]
    assert_same_training(tmp_path / "one", tmp_path / "two", SYSTEMS[system].terms)
