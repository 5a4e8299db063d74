"""pretrain for mri-language: pack the scans of a BIDS dataset into OUTPUT/cohort, then train the masked encoder on its slices."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from brainfm_cli.bids.derivatives import OutputDataset, write_text
from brainfm_cli.bids.inputs import choose_participants
from brainfm_cli.bids.scans import has_scans, study_files
from brainfm_cli.bids.slice_cohort import SliceCohort
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.errors import InputNotFoundError
from brainfm_cli.learning.loop import OptimiserSettings
from brainfm_cli.reports.reconstruction import reconstruction_sections
from brainfm_cli.reports.training import training_page
from brainfm_cli.signals.slice_packing import SliceSettings, pack_cohort
from brainfm_cli.systems.mri_language import MriLanguageSettings
from brainfm_cli.systems.mri_language.pretraining import PreparedMri, prepare, pretrain_encoder

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd

    from brainfm_cli.config import Execution, Invocation
    from brainfm_cli.learning.loop import TrainingResult
    from brainfm_cli.learning.pretraining import PretrainingSettings

HELD_OUT = 0.2  # the study design's 8:2
LEARNING_RATE = 1.5e-4


def with_defaults(settings: PretrainingSettings) -> PretrainingSettings:
    """The settings with this system's own share of held-out people and learning rate where none was given."""
    given = settings.model_fields_set
    update: dict[str, object] = {} if "validation_fraction" in given else {"validation_fraction": HELD_OUT}
    if "optimiser" not in given:
        update["optimiser"] = OptimiserSettings(learning_rate=LEARNING_RATE)
    return settings.model_copy(update=update)


def pretrain_slices(
    call: Invocation, factory: MriLanguageSettings, settings: PretrainingSettings, slices: SliceSettings, citation: str
) -> int:
    """Pack, train and write ``models/<id>``; gives back the exit code."""
    packed = is_packed(call.input_dir)
    if not packed and not (call.input_dir.is_dir() and has_scans(call.input_dir)):
        raise InputNotFoundError(
            "no structural or diffusion images and no packed slices here",
            where=call.input_dir, fix="give a BIDS dataset with anat/, dwi/ or swi/ images, or the OUTPUT of an earlier pretraining",
        )  # fmt: skip
    if call.dry_run:
        _print_plan(call, factory, settings, slices, packed=packed)
        return 0
    dataset = OutputDataset.open(call.output_dir, command="pretrain", settings=settings, sources=[call.input_dir], citation=citation)
    if packed:
        code, cohort = 0, SliceCohort.open(call.input_dir)
    else:
        code, found = pack_cohort(
            dataset,
            call.input_dir,
            slices,
            size=slices.size or factory.size,
            dims=factory.dims,
            selection=call.selection,
            execution=call.execution,
            mask_roots=tuple(call.datasets.values()),
        )
        if found is None:
            return code
        cohort = found
    folder = dataset.root / "models" / f"{factory.kind}-{dataset.configuration_hash[:8]}"
    arguments = {"cohort_dir": cohort.root, "folder": folder, "factory": factory, "settings": settings, "execution": call.execution}
    trained = run_units(
        dataset, [Unit(name=f"model-{folder.name}", inputs=cohort.files, work=write_model, arguments=arguments)], call.execution
    )
    if trained == 0:  # only now: until the record is written, a killed run must be able to go on
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return trained or code


def is_packed(folder: Path) -> bool:
    """Whether a folder holds a packed slice cohort."""
    return any((place / "slices.parquet").is_file() for place in (folder / "cohort", folder))


def write_model(
    cohort_dir: Path, folder: Path, factory: MriLanguageSettings, settings: PretrainingSettings, execution: Execution
) -> UnitResult | None:
    """Pretrain and write the model folder with its card and report; none on ranks but the first."""
    prepared = prepare(factory, settings, SliceCohort.open(cohort_dir))
    result, scores, examples, files = pretrain_encoder(prepared, settings, execution, folder)
    if not result.is_first_rank:
        return None
    position = result.position
    page = training_page(
        result.log,
        title=f"Pretraining of {folder.name}",
        subtitle="brainfm pretrain, mri-language",
        facts={
            "People": str(len(prepared.people.role("train"))),
            "Held out": str(len(prepared.people.role("validation"))),
            "Slices": f"{len(prepared.source.rows):,}",
            "Parameters": f"{_parameters(prepared):,}",
            "Steps": str(position.step),
            "Best epoch": "last" if position.best_epoch is None else str(position.best_epoch),
        },
        sections=reconstruction_sections(scores, examples),
        methods=factory.credits.methods,
        citations=(factory.credits.citation,),
    )
    card = _card(folder.name, prepared, scores, result, settings)
    outputs = (*files, write_text(folder / "README.md", card), write_text(folder / "report.html", page.render()))
    return UnitResult(outputs=outputs, seed=settings.seed)


def _card(name: str, prepared: PreparedMri, scores: pd.DataFrame, result: TrainingResult, settings: PretrainingSettings) -> str:
    hidden = scores[scores["score"].str.startswith("SSIM, hidden")] if len(scores) else scores
    said = "; ".join(f"{row.method} {row.mean:.3f} ({row.low:.3f} to {row.high:.3f})" for row in hidden.itertuples(index=False))
    sequences = ", ".join(sorted(map(str, prepared.source.cohort.slices["sequence"].unique())))
    lines = [
        f"# {name}",
        "",
        "An `mri-language` encoder of brain MRI, pretrained without labels by `brainfm pretrain`.",
        "",
        f"* Parameters: {_parameters(prepared):,}; {prepared.source.cohort.size} pixels a side, dims {prepared.source.cohort.dims}",
        f"* Trained on {len(prepared.people.role('train'))} people ({len(prepared.source.rows):,} slices: {sequences}); {len(prepared.people.role('validation'))} others chose the epoch",
        f"* SSIM of hidden brain of held-out people, with 95 % interval over patients (seed {settings.seed}): {said or 'not computed (nobody held out)'}",
        f"* Optimiser steps: {result.position.step}; best epoch {result.position.best_epoch}, loss {result.position.best_loss}",
        "",
        "Use: `brainfm prompt-tune DATASET OUTPUT group --model THIS_FOLDER --target COLUMN`.",
        "",
        "`provenance.json` lists the hashes of the people it has seen: never test on them. The model is no medical device and not for clinical use.",
        "",
        "Weights derive from the data they were trained on and keep its conditions of use.",
    ]
    return "\n".join(lines) + "\n"


def _parameters(prepared: PreparedMri) -> int:
    return sum(parameter.numel() for parameter in prepared.system.module.parameters())


def _print_plan(
    call: Invocation, factory: MriLanguageSettings, settings: PretrainingSettings, slices: SliceSettings, *, packed: bool
) -> None:
    shown = Table("what", "value", box=None)
    size = slices.size or factory.size
    if packed:
        prepared = prepare(factory, settings, SliceCohort.open(call.input_dir))
        batches, plan = prepared.source.num_batches, settings.plan
        rows = [
            ("people", f"{len(prepared.people.role('train'))} train, {len(prepared.people.role('validation'))} choose the epoch"),
            ("slices", f"{len(prepared.source.rows):,} train, {len(prepared.source.validation_rows):,} choose the epoch"),
            ("steps", f"{plan.total_steps(batches)} in at most {settings.epochs} epochs of {batches} batches"),
        ]
        parameters = _parameters(prepared)
    else:
        labels = choose_participants(call.input_dir, call.selection)
        files = sum(
            path.name.endswith((".nii", ".nii.gz"))
            for label in labels
            for path in study_files(call.input_dir, label, call.selection, mask_roots=tuple(call.datasets.values()))
        )
        kept = size**factory.dims * files * (1 if factory.dims == 3 else 150) / 1e9
        rows = [
            ("people", f"{len(labels)}"),
            ("images and masks", f"{files}"),
            ("store", f"at most about {kept:.1f} GB at 150 slices an image"),
        ]
        parameters = sum(parameter.numel() for parameter in factory.build().module.parameters())
    for what, value in (("system", f"{factory.kind}, {parameters:,} parameters"), ("pixels", f"{size} a side, dims {factory.dims}"), *rows):
        shown.add_row(what, value)
    Console().print(shown)
