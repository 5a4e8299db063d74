"""Memory of pretraining on many people of many datasets, and whether a killed run goes on to the same weights.

Writes a packed cohort of noise whose datasets differ in repetition time, length, atlases and label coding, pretrains on it for a
few steps in a process whose anonymous memory (RssAnon) is watched, then again with a SIGKILL in the middle of an epoch.

    python benchmarks/load.py --work FOLDER --people 5000 --datasets 27 --steps 60
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import load_file

from brainfm_cli.atlases.catalogue import find_atlas
from brainfm_cli.bids.cohort import CohortAtlas, CohortWriter

ATLASES = ("Schaefer100", "AAL116", "Dosenbach160", "Schaefer200")
REPETITION_TIMES_S = (0.72, 0.8, 1.5, 2.0, 2.2, 2.5, 3.0)
CODINGS = (("control", "patient"), ("0", "1"), ("1", "2"), ("HC", "MDD"))
SOURCES = 10


def write_cohort(folder: Path, people: int, datasets: int, seed: int) -> dict[str, int]:
    """A packed cohort; gives back its numbers of scans (a scan in one atlas) and of bytes."""
    rng = np.random.default_rng(seed)
    atlases = [find_atlas(name) for name in ATLASES]
    mixing = {atlas.label: rng.normal(size=(SOURCES, len(atlas.regions.names))).astype(np.float32) for atlas in atlases}
    table, scans = [], 0
    with CohortWriter(folder / "cohort") as writer:
        for atlas in atlases:
            writer.add_atlas(CohortAtlas(label=atlas.label, regions=atlas.regions, template=atlas.template))
        for number in range(people):
            place = number % datasets
            dataset, traits = f"ds{place:03d}", np.random.default_rng([seed, place])
            time_s, frames = float(traits.choice(REPETITION_TIMES_S)), int(traits.integers(100, 260))
            chosen = traits.permutation(len(atlases))[: int(traits.integers(2, len(atlases) + 1))]
            key = f"{dataset}+p{number:05d}"
            table.append(
                {"participant_id": key, "dataset": dataset, "site": dataset, "diagnosis": str(rng.choice(CODINGS[place % len(CODINGS)]))}
            )
            source = rng.normal(size=(frames, SOURCES)).astype(np.float32)
            for index in chosen:
                atlas = atlases[index]
                series = source @ mixing[atlas.label] + 2 * rng.normal(size=(frames, len(atlas.regions.names))).astype(np.float32)
                row = {"participant": key, "dataset": dataset, "session": "", "run": "", "site": dataset, "repetition_time": time_s, "mean_fd": 0.1, "kept_fraction": 1.0}  # fmt: skip
                writer.add_run(atlas.label, series.astype(np.float32), row)
                scans += 1
        files = writer.finish(pd.DataFrame(table).set_index("participant_id"))
    return {"scans": scans, "bytes": sum(path.stat().st_size for path in files)}


def anonymous_mb(pid: int) -> float:
    """RssAnon of a process and its children, megabytes; memory maps of files do not count."""
    total = 0.0
    for child in (pid, *_children(pid)):
        try:
            lines = Path(f"/proc/{child}/status").read_text(encoding="utf-8").splitlines()
        except (FileNotFoundError, ProcessLookupError):
            continue
        total += sum(float(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon"))
    return total


def watch(command: list[str], *, kill_at: Path | None = None) -> dict[str, float]:
    """Run to the end, or until ``kill_at`` exists, then SIGKILL; seconds and peak of RssAnon."""
    start, peak = time.monotonic(), 0.0
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while process.poll() is None:
        peak = max(peak, anonymous_mb(process.pid))
        if kill_at is not None and list(kill_at.parent.glob(kill_at.name)):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return {"seconds": round(time.monotonic() - start, 1), "peak_rss_anon_mb": round(peak, 1)}
        time.sleep(0.2)
    if process.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{process.stderr.read().decode() if process.stderr else ''}")
    return {"seconds": round(time.monotonic() - start, 1), "peak_rss_anon_mb": round(peak, 1)}


def main() -> None:
    """Write the cohort (once), train, kill, train on, compare; one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--people", type=int, default=5000)
    parser.add_argument("--datasets", type=int, default=27)
    parser.add_argument("--preset", default="tiny")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    packed = given.work / "packed"
    written = write_cohort(packed, given.people, given.datasets, given.seed) if not (packed / "cohort").is_dir() else {}
    settings = [
        f"system.preset={given.preset}",
        f"steps={given.steps}",
        "epochs=1",
        "checkpoint_every=10",
        "log_every=1",
        "validation_fraction=0.01",
    ]

    def command(out: Path) -> list[str]:
        arguments = [str(packed), str(out), "group", "--system", "brain-graph", "--device", "cpu", "--set", *settings]
        return [sys.executable, "-m", "brainfm_cli", "pretrain", *arguments]

    whole = watch(command(given.work / "whole"))
    (model,) = (given.work / "whole" / "models").iterdir()
    killed = given.work / "killed" / "models" / model.name
    first = watch(command(given.work / "killed"), kill_at=killed / "checkpoints" / "step-00000010-*")
    if (killed / "provenance.json").is_file():
        raise SystemExit("the run ended before it could be killed: give more --steps")
    second = watch(command(given.work / "killed"))
    weights, again = (load_file(folder / "model.safetensors") for folder in (model, killed))
    same = all(np.array_equal(weights[name], again[name]) for name in weights)
    logs = [(folder / "log.csv").read_bytes() for folder in (model, killed)]
    result = {"people": given.people, "datasets": given.datasets, "atlases": len(ATLASES), **written, "whole": whole, "killed": first, "resumed": second, "same_weights": same, "same_log": logs[0] == logs[1]}  # fmt: skip
    print(json.dumps(result, indent=2))


def _children(pid: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split()]
    except (FileNotFoundError, ProcessLookupError):
        return []


if __name__ == "__main__":
    main()
