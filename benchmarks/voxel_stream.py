"""Peak memory of brain-caption on a cohort that is larger than it: 10,000 trials of 15,000 voxels stay on disk; kill and resume.

A packed cohort of random responses is written trial by trial. Then, each in a process of its own whose peak resident memory is measured:
pretraining to the end; the same killed (SIGKILL) once half of its steps are saved and started again, whose weights must be the same;
alignment, where a language model is given. Memory of pages of the memory-mapped store, which the system may take back at any time, is
counted in.

    python benchmarks/voxel_stream.py OUT --trials 10000 --voxels 15000 --steps 40
    python benchmarks/voxel_stream.py OUT --llm smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from brainfm_cli.bids.stimuli import Stimulus
from brainfm_cli.bids.voxel_cohort import VoxelCohort, VoxelCohortWriter, VoxelSpace
from brainfm_cli.learning.checkpoints import newest_state, read_tensors

_REPEATS = 3
_SPLIT = ("split.test_fraction=0.02", "split.validation_fraction=0.02")
_POLL_S = 0.1


def write_cohort(root: Path, *, trials: int, voxels: int) -> None:
    """One participant's random responses, each picture seen three times."""
    generator = np.random.default_rng(0)
    order = np.arange(voxels, dtype=np.int32)
    places = (40 * generator.standard_normal((voxels, 3))).astype(np.float32)
    space = VoxelSpace(participant="0001", space="T1w", mask_sha256="0" * 64, order_sha256="1" * 64, places_mm=places)
    names = [f"picture{trial // _REPEATS:05d}" for trial in range(trials)]
    rows = [
        {"dataset": "random", "session": "", "run": "task-viewing", "trial": trial, "stimulus": name, "repeat": 1 + trial % _REPEATS}
        for trial, name in enumerate(names)
    ]
    with VoxelCohortWriter(root / "cohort") as writer:
        writer.add_participant(space, order)
        for name in dict.fromkeys(names):
            writer.add_stimulus(Stimulus(name=name, captions=(f"A picture called {name}.",), source="captions", file="", fields={}))
        writer.add_trials("0001", (generator.standard_normal(voxels).astype(np.float32) for _ in range(trials)), rows)
        writer.finish(pd.DataFrame(index=pd.Index(["0001"], name="participant_id")))


def measured(command: list[str], *, kill_when: Path | None = None) -> dict[str, Any]:
    """Peak resident memory and seconds of a process; killed as soon as a training state lies in ``kill_when``."""
    started = time.monotonic()
    process = subprocess.Popen(command, start_new_session=True)
    while kill_when is not None and process.poll() is None:
        if any(newest_state(path) for path in kill_when.glob("models/*/checkpoints")):
            os.killpg(process.pid, signal.SIGKILL)
            break
        time.sleep(_POLL_S)
    _, status, usage = os.wait4(process.pid, 0)
    killed = os.WIFSIGNALED(status)
    process.returncode = -9 if killed else os.waitstatus_to_exitcode(status)
    if process.returncode and not (killed and kill_when is not None):
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return {"peak_gb": round(usage.ru_maxrss / 1e6, 2), "seconds": round(time.monotonic() - started, 1), "killed": killed}


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--voxels", type=int, default=15_000)
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--llm", default="", help="also measure alignment through this language model")
    arguments = parser.parse_args()
    out, store = arguments.out, arguments.out / "packed"
    if not (store / "cohort").is_dir():
        write_cohort(store, trials=arguments.trials, voxels=arguments.voxels)
    stored = VoxelCohort.open(store).responses("0001")
    result: dict[str, Any] = {"trials": len(stored), "voxels": stored.shape[1], "store_gb": round(stored.nbytes / 1e9, 2)}
    steps = [f"steps={arguments.steps}", "epochs=1000", f"batch_size={arguments.batch}", f"checkpoint_every={arguments.steps // 2}"]
    common = ["group", "--system", "brain-caption", "--device", "cpu", "--set", f"system.preset={arguments.preset}", *steps, *_SPLIT]
    command = [sys.executable, "-m", "brainfm_cli", "pretrain", str(store)]
    for name in ("calm", "killed"):
        shutil.rmtree(out / name, ignore_errors=True)
    result["pretrain"] = measured([*command, str(out / "calm"), *common])
    result["until killed"] = measured([*command, str(out / "killed"), *common], kill_when=out / "killed")
    result["resumed"] = measured([*command, str(out / "killed"), *common])
    (calm,), (resumed,) = ([*(out / name / "models").iterdir()] for name in ("calm", "killed"))
    first, second = (read_tensors(path / "model.safetensors") for path in (calm, resumed))
    result["same weights"] = all(bool((first[name] == second[name]).all()) for name in first)
    result["rows of the log"] = [len((path / "log.csv").read_text(encoding="utf-8").splitlines()) for path in (calm, resumed)]
    if arguments.llm:
        schedule = [f"schedule.steps={arguments.steps // 4}", f"schedule.batch_size={arguments.batch}"]
        fit = [f"llm={arguments.llm}", "fit.judge=loss", "fit.judged_images=8", *schedule]
        shutil.rmtree(out / "aligned", ignore_errors=True)
        aligned = [sys.executable, "-m", "brainfm_cli", "align", str(store), str(out / "aligned"), "group", "--model", str(calm)]
        result["align"] = measured([*aligned, "--device", "cpu", "--set", *fit])
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
