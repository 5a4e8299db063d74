"""How long a plan takes on a large dataset: a made-up fMRIPrep tree of 1,000 participants x 2 sessions x 2 runs, or of other sizes.

python benchmarks/plan.py --participants 1000 --out plan.json
python benchmarks/plan.py --participants 10000 --sessions 1 --runs 1 --repeats 3
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SPACE = "MNI152NLin2009cAsym"


def write_tree(root: Path, participants: int, sessions: tuple[str, ...], runs: tuple[str, ...]) -> int:
    """Folders and files as fMRIPrep names them, each a few bytes; gives back their number."""
    written = 0

    def write(path: Path, text: str = "{}") -> None:
        nonlocal written
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        written += 1

    description = {"Name": "plan", "BIDSVersion": "1.10.0", "DatasetType": "derivative", "GeneratedBy": [{"Name": "fMRIPrep", "Version": "25.1.0"}]}  # fmt: skip
    write(root / "dataset_description.json", json.dumps(description))
    for number in range(participants):
        label = f"sub-{number:05}"
        write(root / f"{label}.html", "<html></html>")
        for session in sessions:
            folder = root / label / f"ses-{session}"
            for name in ("desc-preproc_T1w.nii.gz", f"space-{SPACE}_res-2_desc-preproc_T1w.nii.gz", f"space-{SPACE}_res-2_desc-brain_mask.nii.gz"):  # fmt: skip
                write(folder / "anat" / f"{label}_ses-{session}_{name}", "x")
            for run in runs:
                stem = f"{label}_ses-{session}_task-rest_run-{run}"
                here = folder / "func"
                write(here / f"{stem}_space-{SPACE}_res-2_desc-preproc_bold.nii.gz", "x")
                write(here / f"{stem}_space-{SPACE}_res-2_desc-preproc_bold.json", '{"RepetitionTime": 2.0}')
                write(here / f"{stem}_space-{SPACE}_res-2_desc-brain_mask.nii.gz", "x")
                write(here / f"{stem}_space-{SPACE}_res-2_boldref.nii.gz", "x")
                write(here / f"{stem}_desc-confounds_timeseries.tsv", "framewise_displacement\n0.1\n")
                write(here / f"{stem}_desc-confounds_timeseries.json")
                write(root / label / "figures" / f"{stem}_desc-carpetplot_bold.svg", "<svg/>")
    return written


def write_finished(root: Path, participants: int, sessions: tuple[str, ...], runs: tuple[str, ...]) -> int:
    """The output of the participant level for the same people in two atlases, with its records; contents are a few bytes."""
    from brainfm_cli.provenance import UnitRecord, record_path, stamp_output

    description = {"Name": "plan", "BIDSVersion": "1.10.0", "DatasetType": "derivative", "GeneratedBy": [{"Name": "brainfm"}]}
    kinds = ["mean_timeseries", "coverage_bold", *(f"{kind}_relmat" for kind in ("pearsoncorrelation", "fisherz", "partialcorrelation"))]
    root.mkdir(parents=True)
    (root / "dataset_description.json").write_text(json.dumps(description), encoding="utf-8")
    written = 1
    for number in range(participants):
        label = f"sub-{number:05}"
        outputs = [root / f"{label}.html"]
        for session in sessions:
            folder = root / label / f"ses-{session}" / "func"
            folder.mkdir(parents=True)
            for run in runs:
                for atlas in ("Schaefer2018_seg-7n_scale-100", "AAL116"):
                    stem = f"{label}_ses-{session}_task-rest_run-{run}_space-{SPACE}_atlas-{atlas}"
                    outputs += [folder / f"{stem}_stat-{kind}.{ending}" for kind in kinds for ending in ("tsv", "json")]
        for path in outputs:
            path.write_text("{}", encoding="utf-8")
        stamps = tuple(stamp_output(path, root=root) for path in outputs)
        record = UnitRecord(unit=label, command="parcellate", status="done", configuration_hash="0", outputs=stamps)
        path = record_path(root, label)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(record.model_dump_json(indent=2), encoding="utf-8")
        written += len(outputs) + 1
    return written


def time_plan(arguments: list[str], repeats: int) -> tuple[list[float], float, str]:
    """Seconds of a whole process, its largest resident size in megabytes, and what it printed."""
    seconds, memory, shown = [], 0.0, ""
    for _ in range(repeats):
        with tempfile.TemporaryFile("w+") as said:
            start = time.perf_counter()
            process = subprocess.Popen([sys.executable, "-m", "brainfm_cli", *arguments], stdout=said, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
            seconds.append(time.perf_counter() - start)
            process.returncode = os.waitstatus_to_exitcode(status)
            said.seek(0)
            shown, memory = said.read(), max(memory, usage.ru_maxrss / 1024)
        if process.returncode:
            raise SystemExit(f"brainfm {' '.join(arguments)} ended with {process.returncode}: {shown}")
    return seconds, memory, shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--participants", type=int, default=1000)
    parser.add_argument("--sessions", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        tree, output = Path(place) / "fmriprep", Path(place) / "out"
        sessions, runs = (tuple(str(number + 1) for number in range(count)) for count in (arguments.sessions, arguments.runs))
        files = write_tree(tree, arguments.participants, sessions, runs)
        one = f"{arguments.participants // 2:05}"
        common = ["parcellate", str(tree), str(output)]
        plans = {
            "participant, one of them": [*common, "participant", "--participant-label", one, "--dry-run"],
            "participant, all": [*common, "participant", "--dry-run"],
        }
        finished = Path(place) / "finished"
        made = write_finished(finished, arguments.participants, sessions, runs)
        plans["group"] = ["parcellate", str(tree), str(finished), "group", "--dry-run"]
        plans["status --json"] = ["status", str(finished), "--json"]
        plans["status"] = ["status", str(finished)]
        plans["submit --dry-run"] = ["submit", *common, "participant", "--dry-run"]
        result: dict[str, Any] = {"files": files, "files of the finished output": made, "seconds": {}, "memory_mb": {}}
        for name, command in plans.items():
            seconds, memory, shown = time_plan(command, arguments.repeats)
            result["seconds"][name], result["memory_mb"][name] = seconds, memory
            spread = f"({min(seconds):.2f} to {max(seconds):.2f})"
            print(f"{name:26s} {statistics.median(seconds):.2f} s {spread}, {memory:.0f} MB, {len(shown.splitlines())} lines", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
