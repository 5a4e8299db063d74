"""How long a plan takes on a large dataset: a made-up fMRIPrep tree of 1,000 participants x 2 sessions x 2 runs.

python benchmarks/plan.py --participants 1000 --out plan.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SPACE = "MNI152NLin2009cAsym"


def write_tree(root: Path, participants: int) -> int:
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
        label = f"sub-{number:04}"
        write(root / f"{label}.html", "<html></html>")
        for session in ("1", "2"):
            folder = root / label / f"ses-{session}"
            for name in ("desc-preproc_T1w.nii.gz", f"space-{SPACE}_res-2_desc-preproc_T1w.nii.gz", f"space-{SPACE}_res-2_desc-brain_mask.nii.gz"):  # fmt: skip
                write(folder / "anat" / f"{label}_ses-{session}_{name}", "x")
            for run in ("1", "2"):
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


def write_finished(root: Path, participants: int) -> int:
    """The output of the participant level for the same people in two atlases, with its records; contents are a few bytes."""
    from brainfm_cli.provenance import UnitRecord, record_path, stamp_output

    description = {"Name": "plan", "BIDSVersion": "1.10.0", "DatasetType": "derivative", "GeneratedBy": [{"Name": "brainfm"}]}
    kinds = ["mean_timeseries", "coverage_bold", *(f"{kind}_relmat" for kind in ("pearsoncorrelation", "fisherz", "partialcorrelation"))]
    root.mkdir(parents=True)
    (root / "dataset_description.json").write_text(json.dumps(description), encoding="utf-8")
    written = 1
    for number in range(participants):
        label = f"sub-{number:04}"
        outputs = [root / f"{label}.html"]
        for session in ("1", "2"):
            folder = root / label / f"ses-{session}" / "func"
            folder.mkdir(parents=True)
            for run in ("1", "2"):
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


def time_plan(arguments: list[str], repeats: int) -> tuple[list[float], str]:
    """Seconds of a whole process, and what it printed."""
    seconds, shown = [], ""
    for _ in range(repeats):
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-m", "brainfm_cli", *arguments], capture_output=True, text=True, check=False)
        seconds.append(time.perf_counter() - start)
        if done.returncode:
            raise SystemExit(f"brainfm {' '.join(arguments)} ended with {done.returncode}: {done.stderr}")
        shown = done.stdout
    return seconds, shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--participants", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        tree, output = Path(place) / "fmriprep", Path(place) / "out"
        files = write_tree(tree, arguments.participants)
        one = f"{arguments.participants // 2:04}"
        common = ["parcellate", str(tree), str(output)]
        plans = {
            "participant, one of them": [*common, "participant", "--participant-label", one, "--dry-run"],
            "participant, all": [*common, "participant", "--dry-run"],
        }
        finished = Path(place) / "finished"
        made = write_finished(finished, arguments.participants)
        plans["group"] = ["parcellate", str(tree), str(finished), "group", "--dry-run"]
        result = {"files": files, "files of the finished output": made, "seconds": {}}
        for name, command in plans.items():
            seconds, shown = time_plan(command, arguments.repeats)
            result["seconds"][name] = seconds
            print(
                f"{name:26s} {statistics.median(seconds):.2f} s ({min(seconds):.2f} to {max(seconds):.2f}), {len(shown.splitlines())} lines"
            )
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
