"""demo: the whole chain on a simulated cohort, driven through the command line as a user would."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from brainfm_cli.config import Invocation, Settings
from brainfm_cli.errors import EXIT_OK, InternalError

if TYPE_CHECKING:
    from pathlib import Path

log = logging.getLogger(__name__)


class DemoSettings(Settings):
    """What the demo simulates."""

    imaged: int = 12
    """People whose voxel images are simulated and parcellated."""
    people: int = 700
    """People whose region series are simulated directly, from the same population."""
    target: str = "diagnosis"
    """Column that the model learns to predict."""
    atlases: tuple[str, ...] = ("Schaefer100", "AAL116")
    """Parcellations."""
    seed: int = 1
    """Seed of everything random."""


def demo(call: Invocation, settings: DemoSettings) -> int:
    """Run simulate, parcellate, pretrain, prompt-tune and predict into ``call.output_dir``; print the result.

    Killed and started again, it goes on: each command skips what is current.
    """
    out, common = call.output_dir, ["--nprocs", str(call.execution.nprocs)]
    atlases, seed = ["--atlases", *settings.atlases], ["--seed", str(settings.seed)]
    discovery = ["--set", "where.split=[discovery]"]
    train = [*seed, *discovery]
    bold, series, packed = out / "bold", out / "series", out / "parcellate"
    steps: list[list[str | Path]] = [
        ["simulate", bold, "--kind", "rest", "--level", "bold", "--participants", str(settings.imaged), *seed, *common],
        ["simulate", series, "--kind", "rest", "--level", "series", "--participants", str(settings.people), *seed, *atlases,
         "--set", f"first_participant={settings.imaged + 1}"],
        ["parcellate", bold, packed, "participant", *atlases, *common],
        ["parcellate", bold, packed, "group", *atlases, "--datasets", f"series={series}"],
        ["pretrain", packed, out / "pretrain", "group", "--system", "brain-graph", "--set", "system.preset=tiny", *train],
    ]  # fmt: skip
    for step in steps:
        if code := _run(step):
            return code
    backbone = _only_model(out / "pretrain")
    tune: list[str | Path] = ["prompt-tune", packed, out / "prompt-tune", "group", "--model", backbone, "--target", settings.target, *train]
    if code := _run(tune):
        return code
    tuned = _only_model(out / "prompt-tune")
    apply = ["--model", tuned, "--target", settings.target, "--set", "where.split=[holdout]", f"truth={series}"]
    for level in ("participant", "group"):
        if code := _run(["predict", packed, out / "predict", level, *apply]):
            return code
    _show(out / "predict")
    return EXIT_OK


def _run(step: list[str | Path]) -> int:
    arguments = [str(part) for part in step]
    log.info("brainfm %s", " ".join(arguments))
    return subprocess.run([sys.executable, "-m", "brainfm_cli", *arguments], check=False).returncode


def _only_model(folder: Path) -> Path:
    found = sorted(path for path in (folder / "models").iterdir() if path.is_dir() and not path.name.startswith("."))
    if len(found) != 1:
        raise InternalError(f"expected one model, found {len(found)}", where=folder, fix="remove the demo folder and start again")
    return found[0]


def _show(folder: Path) -> None:
    metrics: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    table = Table("predictor", "score", "95 % interval", box=None)
    for row in metrics["predictors"]:
        table.add_row(str(row), "", "")
    console = Console()
    console.print(table)
    console.print(f"report: {folder / 'report.html'}", soft_wrap=True, markup=False)
