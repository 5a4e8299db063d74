"""prompt-tune for brain-caption: a participant whom an aligned model has not seen, from little data."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from pydantic import Field
from rich.console import Console

from brainfm_cli.bids.derivatives import OutputDataset, write_text
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.bids.voxel_cohort import VoxelCohort
from brainfm_cli.config import Settings
from brainfm_cli.errors import InputNotFoundError
from brainfm_cli.learning.checkpoints import model_files, read_model_config, source_of_model
from brainfm_cli.learning.loop import OptimiserSettings, ScheduleSettings
from brainfm_cli.reports.training import training_page
from brainfm_cli.systems.brain_caption.aligned import CaptionRecord, load_sentences
from brainfm_cli.systems.brain_caption.encoder import CREDITS
from brainfm_cli.systems.brain_caption.fitting import fit_captioner, prepare_person, write_captioner

if TYPE_CHECKING:
    from pathlib import Path

    from brainfm_cli.config import Execution, Invocation


class TuneParticipantSettings(Settings):
    """Settings of ``brainfm prompt-tune`` for brain-caption models."""

    share: float = Field(default=1.0, gt=0, le=1)
    """Share of each new participant's training pictures that is used, with all their repeats."""
    llm: str | None = None
    """Where the model's language model now is, if it has moved."""
    schedule: ScheduleSettings = ScheduleSettings(optimiser=OptimiserSettings(learning_rate=1e-3, warmup_epochs=0.5))
    """How long and how fast; only the participant's embedding and first layer train."""
    seed: int = Field(default=0, ge=0)
    """Seed of first weights, order, sampled captions, and of the pictures of the share."""


def tune_participants(call: Invocation, model: Path, settings: TuneParticipantSettings) -> int:
    """Tune and write ``models/<id>``; gives back the exit code."""
    cohort = VoxelCohort.open(call.input_dir)
    known = read_model_config(model).viewers
    people = cohort.choose_participants(call.selection.participant_label or [name for name in sorted(cohort.spaces) if name not in known])
    if all(name in known for name in cohort.spaces) and not call.selection.participant_label:
        raise InputNotFoundError(
            "the model knows every participant of the cohort already", where=cohort.root, fix="give a cohort with new participants"
        )
    if call.dry_run:
        Console().print(f"tune {model.name} for {', '.join(people)} on {settings.share:.0%} of their training pictures", highlight=False)
        return 0
    sources = [call.input_dir, source_of_model(model)]
    citation = f"# How this was made\n\nTuned with `brainfm prompt-tune`. Cite brainfm (CITATION.cff) and, for brain-caption models, {CREDITS.prompts}\n"
    dataset = OutputDataset.open(call.output_dir, command="prompt-tune", settings=settings, sources=sources, citation=citation)
    folder = dataset.root / "models" / f"brain-caption-{dataset.configuration_hash[:8]}"
    arguments = {
        "cohort_dir": cohort.root,
        "model": model,
        "folder": folder,
        "settings": settings,
        "execution": call.execution,
        "participants": tuple(people),
    }
    inputs = tuple(dict.fromkeys((*cohort.files, *model_files(model), model / "split.tsv")))
    code = run_units(dataset, [Unit(name=f"model-{folder.name}", inputs=inputs, work=write_model, arguments=arguments)], call.execution)
    if code == 0:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return code


def write_model(
    cohort_dir: Path, model: Path, folder: Path, settings: TuneParticipantSettings, execution: Execution, participants: tuple[str, ...]
) -> UnitResult | None:
    """Add ``participants`` to the model, everything else unchanged, and write a model folder."""
    record = CaptionRecord.from_values(read_model_config(model).alignment, where=model / "config.yaml")
    prepared = prepare_person(
        model,
        VoxelCohort.open(cohort_dir),
        participants,
        share=settings.share,
        batch_size=settings.schedule.batch_size,
        seed=settings.seed,
        sentences=load_sentences(record.text_encoder),
        language_model=settings.llm,
    )
    result = fit_captioner(prepared, settings.schedule.plan(settings.seed), execution, folder, new_people=True)
    if not result.is_first_rank:
        return None
    trials = sum(len(one.rows) for one in prepared.source.trials)
    card = (
        f"# {folder.name}\n\nThe aligned model `{model.name}` with {', '.join(participants)} added by `brainfm prompt-tune` on {trials} trials "
        f"({settings.share:.0%} of the training pictures).\n\nOnly the embedding and the first layer of these participants were trained; everything else is unchanged.\n\n"
        "Use: `brainfm caption COHORT OUTPUT participant --model THIS_FOLDER --participant-label …`. The model is no medical device.\n"
    )
    page = training_page(
        result.log,
        title=f"Tuning of {folder.name}",
        subtitle=f"brainfm prompt-tune, brain-caption, {', '.join(participants)}",
        facts={"New participants": str(len(participants)), "Training trials": str(trials), "Steps": str(result.position.step)},
        notes=("The epoch was chosen on validation pictures: these are no test scores.",),
    )
    outputs = (
        *write_captioner(prepared, result, model, folder, settings.seed),
        folder / "normalisation.json",
        write_text(folder / "README.md", card),
        write_text(folder / "report.html", page.render()),
    )
    result.barrier()
    return UnitResult(outputs=outputs, seed=settings.seed)
