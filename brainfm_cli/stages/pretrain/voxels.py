"""pretrain for brain-caption: the masked voxel encoder, from a packed voxel cohort."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pandas as pd
from rich.console import Console
from rich.table import Table

from brainfm_cli.bids.derivatives import OutputDataset, write_text
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.bids.voxel_cohort import VoxelCohort
from brainfm_cli.reports.page import Section, table
from brainfm_cli.reports.training import training_page
from brainfm_cli.systems.brain_caption import BrainCaptionSettings
from brainfm_cli.systems.brain_caption.pretraining import PreparedEncoder, prepare, pretrain_encoder

if TYPE_CHECKING:
    from pathlib import Path

    from brainfm_cli.config import Execution, Invocation
    from brainfm_cli.learning.image_split import ImageSplitSettings
    from brainfm_cli.learning.loop import TrainingResult
    from brainfm_cli.learning.pretraining import PretrainingSettings


def pretrain_voxels(
    call: Invocation, factory: BrainCaptionSettings, settings: PretrainingSettings, split: ImageSplitSettings, citation: str
) -> int:
    """Train and write ``models/<id>``; gives back the exit code."""
    cohort = VoxelCohort.open(call.input_dir)
    participants = cohort.choose_participants(call.selection.participant_label)
    if call.dry_run:
        _print_plan(prepare(factory, settings, split, cohort, participants), settings)
        return 0
    dataset = OutputDataset.open(call.output_dir, command="pretrain", settings=settings, sources=[call.input_dir], citation=citation)
    folder = dataset.root / "models" / f"{factory.kind}-{dataset.configuration_hash[:8]}"
    arguments = {
        "cohort_dir": cohort.root,
        "folder": folder,
        "factory": factory,
        "settings": settings,
        "split": split,
        "execution": call.execution,
        "participants": tuple(participants),
    }
    unit = Unit(name=f"model-{folder.name}", inputs=cohort.files, work=write_model, arguments=arguments)
    code = run_units(dataset, [unit], call.execution)
    if code == 0:  # only now: until the record is written, a killed run must be able to go on
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return code


def write_model(
    cohort_dir: Path,
    folder: Path,
    factory: BrainCaptionSettings,
    settings: PretrainingSettings,
    split: ImageSplitSettings,
    execution: Execution,
    participants: tuple[str, ...],
) -> UnitResult | None:
    """Pretrain on ``participants`` and write the model folder with its card and report."""
    prepared = prepare(factory, settings, split, VoxelCohort.open(cohort_dir), participants)
    result, evaluation, files = pretrain_encoder(prepared, settings, execution, folder)
    if not result.is_first_rank:
        return None
    outputs = (
        *files,
        write_text(folder / "README.md", _card(folder.name, prepared, evaluation, result, settings)),
        write_text(folder / "report.html", _report(folder.name, prepared, evaluation, result)),
    )
    return UnitResult(outputs=outputs, seed=settings.seed)


def _card(name: str, prepared: PreparedEncoder, evaluation: pd.DataFrame, result: TrainingResult, settings: PretrainingSettings) -> str:
    counts = prepared.split.table["role"].value_counts()
    scores = evaluation.drop(columns="participant").mean()
    lines = [
        f"# {name}",
        "",
        "A `brain-caption` encoder of single-trial responses, pretrained without captions by `brainfm pretrain`.",
        "",
        f"* Parameters: {_parameters(prepared):,}",
        f"* Participants: {', '.join(prepared.participants)} ({', '.join(str(one.voxels) for one in prepared.config.viewers.values())} voxels)",
        f"* Split by {prepared.split.unit}: {counts['train']} train, {counts['validation']} choose the epoch, {counts['test']} test (`split.tsv`)",
        f"* Mean squared error of hidden voxels of test trials: {scores['model']:.4f} (predict zero {scores['predict zero']:.4f}, mean of neighbours {scores['mean of neighbours']:.4f})",
        f"* Optimiser steps: {result.position.step}; seed {settings.seed}",
        "",
        "Use: `brainfm align COHORT OUTPUT group --model THIS_FOLDER`. The model reads the voxels of these participants, in the stored order, alone;",
        "others are added with `brainfm prompt-tune`. It is no medical device.",
        "",
        "Weights derive from the data they were trained on and keep its conditions of use.",
    ]
    return "\n".join(lines) + "\n"


def _report(name: str, prepared: PreparedEncoder, evaluation: pd.DataFrame, result: TrainingResult) -> str:
    position = result.position
    page = training_page(
        result.log,
        title=f"Pretraining of {name}",
        subtitle="brainfm pretrain, brain-caption",
        facts={
            "Participants": str(len(prepared.participants)),
            "Training trials": str(sum(len(one.rows) for one in prepared.source.trials)),
            "Parameters": f"{_parameters(prepared):,}",
            "Steps": str(position.step),
            "Best epoch": "last" if position.best_epoch is None else str(position.best_epoch),
        },
        sections=(
            Section(
                title="Hidden voxels of test trials",
                lead="Mean squared error in units of each voxel's variance over the training trials, on pictures that were never trained on. "
                "The model must be below both floors.",
                blocks=(table(evaluation.round(4)),),
            ),
        ),
        methods=prepared.system.settings.credits.methods,
        citations=(prepared.system.settings.credits.citation,),
    )
    return page.render()


def _parameters(prepared: PreparedEncoder) -> int:
    return sum(parameter.numel() for parameter in prepared.system.module.parameters())


def _print_plan(prepared: PreparedEncoder, settings: PretrainingSettings) -> None:
    batches, plan = prepared.source.num_batches, settings.plan
    counts = prepared.split.table["role"].value_counts()
    shown = Table("what", "value", box=None)
    for what, value in (
        ("system", f"brain-caption, {_parameters(prepared):,} parameters"),
        ("participants", ", ".join(prepared.participants)),
        ("trials", f"{sum(len(one.rows) for one in prepared.source.trials)} train, {sum(len(one.rows) for one in prepared.source.validation_trials)} choose the epoch"),
        (prepared.split.unit + "s", f"{counts['train']} train, {counts['validation']} choose the epoch, {counts['test']} test"),
        ("steps", f"{plan.total_steps(batches)} in at most {settings.epochs} epochs of {batches} batches"),
    ):  # fmt: skip
        shown.add_row(what, value)
    Console().print(shown)
