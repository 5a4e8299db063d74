"""demo: the whole chain on a simulated cohort, driven through the command line as a user would."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field
from rich.console import Console
from rich.table import Table

from brainfm_cli.bids.derivatives import write_once
from brainfm_cli.config import Invocation, Settings
from brainfm_cli.errors import EXIT_OK, InternalError

log = logging.getLogger(__name__)
Step = list[str | Path]
_CLASSES = {
    "diagnosis_binary": ("control", "case"),
    "sex": ("F", "M"),
    "split": ("discovery", "holdout"),
}


class DemoSettings(Settings):
    """What the demo simulates and how long it trains."""

    imaged: int = Field(default=12, ge=1)
    """People whose voxel images are simulated and parcellated."""
    people: int = Field(default=1200, ge=100)
    """People whose region series are simulated directly, from the same population."""
    disorder: str = "Arvel"
    """The disorder that half of the people have."""
    atlases: tuple[str, ...] = ("Schaefer100", "AAL116")
    """Parcellations."""
    epochs: int = Field(default=5, ge=1)
    """Epochs of pretraining."""
    tuning_epochs: int = Field(default=4, ge=0)
    """Longest tuning of the prompts."""
    seed: int = 1
    """Seed of everything random."""


def demo(call: Invocation, settings: DemoSettings) -> int:
    """Run simulate, parcellate, pretrain, prompt-tune and predict into ``call.output_dir``; print the result.

    Killed and started again, it goes on: each command skips what is current.
    """
    out, started = call.output_dir, time.monotonic()
    labels = write_once(out / "labels.yaml", yaml.safe_dump({"labels": _label_table()}, sort_keys=False))
    nprocs: Step = ["--nprocs", str(call.execution.nprocs)]
    for step in _first_steps(out, labels, settings, nprocs):
        if code := _run(step):
            return code
    tune: Step = ["prompt-tune", out / "parcellate", out / "prompt-tune", "group", "--model", _only_model(out / "pretrain")]
    tune += ["--target", "diagnosis_binary", "--seed", str(settings.seed)]
    tune += ["--set", "coding.positive=case", "where.split=[discovery]", f"tuning.epochs={settings.tuning_epochs}", "tuning.stops=1"]
    if code := _run(tune):
        return code
    apply: Step = ["--model", _only_model(out / "prompt-tune"), "--set", "where.split=[holdout]", "--datasets", f"truth={out / 'series'}"]
    for level in ("participant", "group"):
        if code := _run(["predict", out / "parcellate", out / "predict", level, *apply]):
            return code
    _show(out / "predict", minutes=(time.monotonic() - started) / 60)
    return EXIT_OK


def _first_steps(out: Path, labels: Path, settings: DemoSettings, nprocs: Step) -> list[Step]:
    """Simulate, parcellate, pretrain."""
    bold, series, packed = out / "bold", out / "series", out / "parcellate"
    atlases: Step = ["--atlases", *settings.atlases]
    seed: Step = ["--seed", str(settings.seed)]
    simulate: Step = ["--kind", "rest", *seed, *atlases, "--set", f"population.disorders=[{settings.disorder}]"]
    training = ["system.preset=tiny", f"epochs={settings.epochs}", "where.split=[discovery]"]
    return [
        ["simulate", bold, "--level", "bold", "--participants", str(settings.imaged), *simulate, *nprocs],
        [
            "simulate",
            series,
            "--level",
            "series",
            "--participants",
            str(settings.people),
            *simulate,
            f"first_participant={settings.imaged + 1}",
        ],
        ["parcellate", bold, packed, "participant", *atlases, "--config", labels, *nprocs],
        ["parcellate", bold, packed, "group", *atlases, "--config", labels, "--datasets", f"series={series}"],
        ["pretrain", packed, out / "pretrain", "group", "--system", "brain-graph", *seed, "--set", *training],
    ]


def _label_table() -> dict[str, Any]:
    """How both datasets code each target: here alike, but it must be said."""
    coded: dict[str, dict[str, Any]] = {
        name: {"column": name, "classes": {value: value for value in classes}} for name, classes in _CLASSES.items()
    }
    coded["age"] = {"column": "age", "continuous": True}
    return {name: {dataset: dict(coding) for dataset in ("bold", "series")} for name, coding in coded.items()}


def _run(step: Step) -> int:
    arguments = [str(part) for part in step]
    log.info("brainfm %s", " ".join(arguments))
    return subprocess.run([sys.executable, "-m", "brainfm_cli", *arguments], check=False).returncode


def _only_model(folder: Path) -> Path:
    found = sorted(path for path in (folder / "models").iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(found) != 1:
        raise InternalError(f"expected one model, found {len(found)}", where=folder, fix="remove the demo folder and start again")
    return found[0]


def _show(folder: Path, *, minutes: float) -> None:
    """The table of scores, best possible ones included, and where the report is."""
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    primary, console = metrics["primary"], Console()
    members = {name for row in metrics["predictors"] for name in row["pooled_from"]}
    table = Table("predictor", "role", primary.upper(), metrics["interval"].split(" ")[0] + " interval", box=None)
    for row in metrics["predictors"]:
        if row["name"] in members:
            continue
        score = row["scores"][primary]
        span = "" if score.get("low") is None else f"{score['low']:.3f} to {score['high']:.3f}"
        table.add_row(row["name"], row["role"], "n/a" if score["value"] is None else f"{score['value']:.3f}", span)
    truth = metrics["truth"]
    table.add_row("linear model on the planted features", "attainable", f"{truth['attainable']:.3f}", "")
    table.add_row("the generator's own likelihood", "Bayes-optimal", f"{truth['bayes_optimal']:.3f}", "")
    console.print(f"'{metrics['target']}' of {metrics['people']} people whom the model never saw ({minutes:.1f} minutes):", highlight=False)
    console.print(table)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True, markup=False, highlight=False)
