"""pretrain: a foundation model from a packed cohort."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pandas as pd
from rich.console import Console
from rich.table import Table

from brainfm_cli.atlases.catalogue import atlas_labels
from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.bids.derivatives import OutputDataset, write_text
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.pretraining import PretrainingSettings, prepare, pretrain_model
from brainfm_cli.learning.samples import select_participants
from brainfm_cli.reports.training import training_page
from brainfm_cli.systems import SystemSettings

if TYPE_CHECKING:
    from pathlib import Path

    from brainfm_cli.config import Execution, Invocation
    from brainfm_cli.learning.loop import TrainingResult
    from brainfm_cli.learning.pretraining import Prepared


class PretrainSettings(PretrainingSettings):
    """Settings of ``brainfm pretrain``."""

    system: SystemSettings
    """Which system, its size and its losses; ``kind`` is required (--system)."""


def pretrain(call: Invocation, settings: PretrainSettings) -> int:
    """Train and write ``models/<id>``; gives back the exit code."""
    choose_device(call.execution.device)
    cohort = Cohort.open(call.input_dir)
    settings = settings.model_copy(update={"atlases": atlas_labels(settings.atlases, cohort.atlases, call.datasets)})
    participants = select_participants(cohort, settings.where, call.selection.participant_label)
    if call.dry_run:
        _print_plan(prepare(settings.system, settings, cohort, participants), settings)
        return 0
    dataset = OutputDataset.open(
        call.output_dir, command="pretrain", settings=settings, sources=[call.input_dir], citation=_citation(settings)
    )
    folder = dataset.root / "models" / f"{settings.system.kind}-{dataset.configuration_hash[:8]}"
    arguments = {
        "cohort_dir": cohort.root,
        "folder": folder,
        "settings": settings,
        "execution": call.execution,
        "participants": tuple(participants),
    }
    unit = Unit(name=f"model-{folder.name}", inputs=cohort.files, work=write_model, arguments=arguments)
    code = run_units(dataset, [unit], call.execution)
    if code == 0:  # only now: until the record is written, a killed run must be able to go on
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return code


def write_model(
    cohort_dir: Path, folder: Path, settings: PretrainSettings, execution: Execution, participants: tuple[str, ...]
) -> UnitResult:
    """Pretrain on ``participants`` and write the model folder with its card and report."""
    cohort = Cohort.open(cohort_dir)
    prepared = prepare(settings.system, settings, cohort, participants)
    result, files = pretrain_model(prepared, settings, execution, folder)
    if not result.is_first_rank:
        return UnitResult(outputs=(), seed=settings.seed)
    outputs = (
        *files,
        write_text(folder / "README.md", model_card(folder.name, prepared, settings, result)),
        write_text(folder / "report.html", _report(folder.name, prepared, settings, result)),
    )
    return UnitResult(outputs=outputs, seed=settings.seed)


def model_card(name: str, prepared: Prepared, settings: PretrainSettings, result: TrainingResult) -> str:
    """README.md of the model folder."""
    index = prepared.source.cohort.index
    datasets = ", ".join(sorted(set(index.loc[index["participant"].isin(prepared.training), "dataset"].astype(str))))
    lines = [
        f"# {name}",
        "",
        f"A `{settings.system.kind}` model, pretrained without labels by `brainfm pretrain`.",
        "",
        f"* Parameters: {_parameters(prepared):,}",
        f"* Atlases: {', '.join(prepared.atlases)}",
        f"* Trained on {len(prepared.training)} people ({len(prepared.source.scans)} scans) of: {datasets}",
        f"* Epoch chosen on {len(prepared.validation)} other people: {result.position.best_epoch}, loss {result.position.best_loss}",
        f"* Optimiser steps: {result.position.step}; seed {settings.seed}",
        "",
        "Use: `brainfm prompt-tune COHORT OUTPUT group --model THIS_FOLDER --target COLUMN`.",
        "",
        "`config.yaml` rebuilds the model, `provenance.json` lists the hashes of the people it has seen: `brainfm predict` refuses",
        "to test on them. The model is no medical device; its scores on another cohort must be measured there, beside the floors.",
        "",
        "Weights derive from the data they were trained on and keep its conditions of use.",
    ]
    return "\n".join(lines) + "\n"


def _citation(settings: PretrainSettings) -> str:
    return (
        "# How this was made\n\nPretrained with `brainfm pretrain`. Cite brainfm (CITATION.cff) and, "
        f"for {settings.system.kind} models, {settings.system.credits.follows}\n"
    )


def _report(name: str, prepared: Prepared, settings: PretrainSettings, result: TrainingResult) -> str:
    position = result.position
    facts = {
        "People": str(len(prepared.training)),
        "Held out": str(len(prepared.validation)),
        "Atlases": str(len(prepared.atlases)),
        "Parameters": f"{_parameters(prepared):,}",
        "Steps": str(position.step),
        "Best epoch": "last" if position.best_epoch is None else str(position.best_epoch),
    }
    notes = (
        () if prepared.validation else ("Nobody was held out: the last epoch is kept, and the losses below say nothing of other people.",)
    )
    page = training_page(
        result.log,
        title=f"Pretraining of {name}",
        subtitle=f"brainfm pretrain, {settings.system.kind}, {', '.join(prepared.atlases)}",
        facts=facts,
        notes=notes,
        people=_people(prepared),
        methods=settings.system.credits.methods,
        citations=(settings.system.credits.citation,),
    )
    return page.render()


def _people(prepared: Prepared) -> pd.DataFrame:
    datasets = pd.Series(prepared.source.cohort.dataset_of)
    sides = {"training": prepared.training, "held out": prepared.validation}
    rows = [
        (side, str(name), int(count))
        for side, keys in sides.items()
        for name, count in datasets[list(keys)].value_counts(sort=False).items()
    ]
    return pd.DataFrame(rows, columns=["role", "dataset", "people"])


def _parameters(prepared: Prepared) -> int:
    return sum(parameter.numel() for parameter in prepared.system.module.parameters())


def _print_plan(prepared: Prepared, settings: PretrainSettings) -> None:
    batches, plan = prepared.source.num_batches, settings.plan
    table = Table("what", "value", box=None)
    weights = _parameters(prepared) * 4 / 1e6
    for what, value in (
        (
            "system",
            f"{settings.system.kind}, {_parameters(prepared):,} parameters ({weights:.0f} MB; {4 * weights:.0f} MB with gradients and moments)",
        ),
        ("people", f"{len(prepared.training)} train, {len(prepared.validation)} choose the epoch"),
        ("scans", f"{len(prepared.source.scans)} train, {len(prepared.source.validation_scans)} choose the epoch"),
        ("atlases", ", ".join(prepared.atlases)),
        ("batches", f"{batches} per epoch of {settings.batch_size} scans"),
        ("steps", f"{plan.total_steps(batches)} in at most {settings.epochs} epochs"),
    ):
        table.add_row(what, value)
    Console().print(table)
