"""The tasks of mri-language once on simulated patients: an encoder pretrained on other people, every task beside its floors, one table.

Simulates two datasets (people to pretrain on, people to learn and test on), then runs ``pretrain`` and ``predict group`` through the command
line; every step resumes. What the table says depends on how small this is: a preset of nano, slices of 64 pixels, one sequence.

    python benchmarks/mri_tasks.py OUTPUT --participants 100 --epochs 4
    python benchmarks/mri_tasks.py OUTPUT --few-shot   # learning curves of two tasks besides
    python benchmarks/mri_tasks.py OUTPUT --centres    # every centre left out once
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

SURVIVAL = {
    "time": "follow_up_days", "event": "ending", "happened": ["metastasis"], "competing": ["death"], "censored": ["alive"], "bins": 6, "horizons": [365, 730],
}  # fmt: skip
CLINICAL = {"columns": ["age", "sex"]}
TASKS = {
    "disease": {"task": "classification", "target": "diagnosis"},
    "grade": {"task": "grading", "target": "grade", "clinical": CLINICAL},
    "metastasis": {"task": "survival", "follow_up": SURVIVAL, "clinical": CLINICAL},
}
LESIONS = {"lesions": {"task": "segmentation"}}


def brainfm(*arguments: object) -> None:
    """Run the command, and stop where it fails."""
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "brainfm_cli", *map(str, arguments)], check=True)
    print(f"{arguments[0]}: {time.monotonic() - began:.0f} s", flush=True)


def simulate(folder: Path, people: int, seed: int, sequences: str, hazard: float) -> Path:
    """Patients of three centres with scans of the named sequences; ``hazard`` is the log hazard ratio of malignancy."""
    if not (folder / "truth.json").is_file():
        sizes = (f"mri.sequences=[{sequences}]", "mri.slice_mm=8", "mri.voxel_mm=4", f"mri.hazard={hazard}")
        brainfm("simulate", folder, "--kind", "mri", "--participants", people, "--seed", seed, "--effect", 1.0, "--set", *sizes)
    return folder


def evaluate(raw: Path, out: Path, model: Path, tasks: dict[str, object], *settings: str) -> list[dict[str, object]]:
    """Scores of tasks on the holdout part, or as ``settings`` say."""
    brainfm("predict", raw, out, "group", "--model", model, "--device", "cpu", "--set", f"scans.tasks={json.dumps(tasks)}", "execution.precision=32-true", *settings)  # fmt: skip
    return json.loads((out / "scan-evaluation" / "evaluation.json").read_text())


def show(rows: list[dict[str, object]]) -> None:
    """First score of every task as a Markdown table."""
    print("\n| task | score | method | value | 95 % interval | people |\n|---|---|---|---|---|---|")
    first: dict[object, object] = {}
    for row in rows:
        if first.setdefault(row["task"], row["score"]) == row["score"]:
            ends = "–" if row["low"] is None else f"{row['low']:.3f} to {row['high']:.3f}"
            value = "–" if row["value"] is None else f"{row['value']:.3f}"
            print(f"| {row['task']} | {row['score']} | {row['method']} | {value} | {ends} | {row['people']} |")


def main() -> None:
    """Run what is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--participants", type=int, default=100)
    parser.add_argument("--pretrained-on", type=int, default=80)
    parser.add_argument("--epochs", type=int, default=4, help="of pretraining")
    parser.add_argument("--slices", type=int, default=512, help="slices per epoch of pretraining")
    parser.add_argument("--sequences", default="FLAIR", help="with commas; lesions are segmented on FLAIR")
    parser.add_argument("--hazard", type=float, default=1.2, help="log hazard ratio of malignancy, for metastasis and death")
    parser.add_argument("--head-epochs", type=int, default=40)
    parser.add_argument("--lesion-epochs", type=int, default=6)
    parser.add_argument("--no-lesions", action="store_true")
    parser.add_argument("--network", action="store_true", help="the plain network from scratch too: slow")
    parser.add_argument("--few-shot", action="store_true")
    parser.add_argument("--centres", action="store_true")
    given = parser.parse_args()
    others = simulate(given.output / "others", given.pretrained_on, 11, given.sequences, given.hazard)
    raw = simulate(given.output / "patients", given.participants, 12, given.sequences, given.hazard)
    sizes = ("system.preset=nano", f"epochs={given.epochs}", "batch_size=32", f"system.slices_per_epoch={given.slices}", "system.validation_slices=128", "system.evaluated_slices=64")  # fmt: skip
    pretrained = given.output / "pretrained"
    brainfm("pretrain", others, pretrained, "group", "--system", "mri-language", "--device", "cpu", "--set", *sizes)
    (model,) = (pretrained / "models").iterdir()
    # a few dozen people make few steps per epoch
    heads = (
        f"scans.schedule.epochs={given.head_epochs}",
        "scans.schedule.batch_size=8",
        "scans.schedule.patience=15",
        "scans.schedule.optimiser.learning_rate=0.005",
    )
    held_out = ("design.kind=fixed", "design.test_where={split: [holdout]}")
    rows = evaluate(raw, given.output / "tasks", model, TASKS, *held_out, *heads, f"scans.floors.network={str(given.network).lower()}")
    if not given.no_lesions:
        fast = ("scans.schedule.optimiser.learning_rate=0.005", "scans.schedule.batch_size=32", "scans.slices.sequences=[FLAIR]")
        rows += evaluate(raw, given.output / "lesions", model, LESIONS, *held_out, f"scans.schedule.epochs={given.lesion_epochs}", *fast)
    show(rows)
    if given.few_shot:
        two = {name: TASKS[name] for name in ("disease", "grade")}
        few = ("scans.few_shot={shares: [0.1, 0.5, 1.0], draws: 3}", "scans.floors={network: false, image_numbers: false}")
        evaluate(raw, given.output / "few", model, two, *held_out, *heads, *few)
        for name in two:
            print(f"\n{name}\n{(given.output / 'few' / 'scan-evaluation' / name / 'few_shot.tsv').read_text()}")
    if given.centres:
        show(evaluate(raw, given.output / "centres", model, TASKS, "design.kind=leave-one-site-out", *heads, "scans.floors.network=false"))
    best = json.loads((raw / "truth.json").read_text())
    print(json.dumps({key: value for key, value in best.items() if key != "people"}, indent=1)[:2000])


if __name__ == "__main__":
    main()
