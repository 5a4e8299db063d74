"""align for brain-caption: a Q-Former between the pretrained voxel encoder and a frozen language model, on captions of what was seen."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field
from rich.console import Console

from brainfm_cli.bids.derivatives import OutputDataset, write_text
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.bids.voxel_cohort import VoxelCohort
from brainfm_cli.config import Settings
from brainfm_cli.learning.checkpoints import model_files, source_of_model
from brainfm_cli.learning.loop import ScheduleSettings
from brainfm_cli.models.causal_language import DEFAULT_LANGUAGE_MODEL
from brainfm_cli.models.language import DEFAULT_ENCODER
from brainfm_cli.reports.training import training_page
from brainfm_cli.systems.brain_caption.aligned import CaptionFitSettings, load_language, load_sentences
from brainfm_cli.systems.brain_caption.encoder import CREDITS
from brainfm_cli.systems.brain_caption.fitting import fit_captioner, prepare_alignment, read_split, write_captioner
from brainfm_cli.systems.brain_caption.pictures import read_picture_vectors

if TYPE_CHECKING:
    from brainfm_cli.config import Execution, Invocation
    from brainfm_cli.learning.loop import TrainingResult
    from brainfm_cli.systems.brain_caption.fitting import PreparedCaptioner


class AlignCaptionSettings(Settings):
    """Settings of ``brainfm align`` for brain-caption models."""

    llm: str = DEFAULT_LANGUAGE_MODEL
    """Frozen language model: a name of 'brainfm assets list', or the folder (or .gguf file) of any causal model."""
    text_encoder: str = DEFAULT_ENCODER
    """Sentence encoder: a name of 'brainfm assets list', a folder, or a hub name."""
    vision: Path | None = None
    """Contrast with pictures in place of sentences: a table of picture vectors (TSV: name, numbers), or the folder of a vision model that
    embeds the pictures of ``pictures``."""
    pictures: Path | None = None
    """Folder of the pictures that a vision model embeds, e.g. the dataset's ``stimuli``."""
    fit: CaptionFitSettings = CaptionFitSettings()
    """What is aligned with what; the published ablations are fit.pretrained, fit.alignment and fit.captions_per_image."""
    schedule: ScheduleSettings = ScheduleSettings()
    """How long and how fast."""
    seed: int = Field(default=0, ge=0)
    """Seed of first weights, order and sampled captions."""


def align_captions(call: Invocation, model: Path, settings: AlignCaptionSettings) -> int:
    """Align and write ``models/<id>``; gives back the exit code."""
    cohort = VoxelCohort.open(call.input_dir)
    participants = _participants(call, model, cohort)
    split = read_split(model, cohort)
    if call.dry_run:
        counts = split.table["role"].value_counts()
        Console().print(
            f"align {model.name} with captions through {settings.llm}: {len(participants)} participants, {counts['train']} {split.unit}s train, "
            f"{counts['validation']} choose the epoch, at most {settings.schedule.epochs} epochs of batches of {settings.schedule.batch_size}",
            highlight=False,
        )
        return 0
    sources = [call.input_dir, source_of_model(model)]
    dataset = OutputDataset.open(call.output_dir, command="align", settings=settings, sources=sources, citation=_CITATION)
    folder = dataset.root / "models" / f"brain-caption-{dataset.configuration_hash[:8]}"
    arguments = {
        "cohort_dir": cohort.root,
        "model": model,
        "folder": folder,
        "settings": settings,
        "execution": call.execution,
        "participants": tuple(participants),
    }
    given = [settings.vision] if settings.vision is not None and settings.vision.is_file() else []
    inputs = (*cohort.files, *model_files(model), model / "split.tsv", *given)
    code = run_units(dataset, [Unit(name=f"model-{folder.name}", inputs=tuple(dict.fromkeys(inputs)), work=write_model, arguments=arguments)], call.execution)  # fmt: skip
    if code == 0:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return code


def write_model(
    cohort_dir: Path, model: Path, folder: Path, settings: AlignCaptionSettings, execution: Execution, participants: tuple[str, ...]
) -> UnitResult | None:
    """Align on ``participants`` and write a model folder that needs no other but the language model."""
    cohort = VoxelCohort.open(cohort_dir)
    prepared = prepare_alignment(
        model,
        cohort,
        participants,
        settings.fit,
        batch_size=settings.schedule.batch_size,
        seed=settings.seed,
        language=load_language(settings.llm),
        sentences=load_sentences(settings.text_encoder),
        pictures=None if settings.vision is None else read_picture_vectors(settings.vision, settings.pictures, cohort),
    )
    result = fit_captioner(prepared, settings.schedule.plan(settings.seed), execution, folder, new_people=False)
    if not result.is_first_rank:
        return None
    outputs = (
        *write_captioner(prepared, result, model, folder, settings.seed),
        write_text(folder / "README.md", _card(folder.name, prepared, result)),
        write_text(folder / "report.html", _report(folder.name, prepared, result)),
    )
    result.barrier()
    return UnitResult(outputs=outputs, seed=settings.seed)


def _participants(call: Invocation, model: Path, cohort: VoxelCohort) -> list[str]:
    from brainfm_cli.learning.checkpoints import read_model_config

    if call.selection.participant_label:
        return cohort.choose_participants(call.selection.participant_label)
    known = read_model_config(model).viewers
    return [name for name in cohort.choose_participants(()) if name in known] or cohort.choose_participants(())


def _card(name: str, prepared: PreparedCaptioner, result: TrainingResult) -> str:
    record = prepared.config.alignment
    position = result.position
    chosen = "" if position.best_epoch is None else f"* Epoch chosen on validation pictures: {position.best_epoch} ({position.best_loss:.4f}, minus CIDEr or loss)\n"  # fmt: skip
    return (
        f"# {name}\n\nSays in words what a participant saw: a pretrained voxel encoder and a Q-Former in front of the frozen language model "
        f"{record['language_model']}, by `brainfm align`.\n\n"
        f"* Participants: {', '.join(prepared.participants)}\n* Contrast with {record['contrast_with']}; captions per picture: {record['fit']['captions_per_image']}\n"
        f"* Captions {'made from category names (template)' if record['templates'] else 'of people'}\n{chosen}* Optimiser steps: {position.step}\n\n"
        "Use: `brainfm caption COHORT OUTPUT participant --model THIS_FOLDER`, then `group` to score it beside its floors on test pictures.\n"
        "`captions.json` holds the training captions, under their own licence. The language model is not in this folder. "
        "The model is no medical device.\n"
    )


def _report(name: str, prepared: PreparedCaptioner, result: TrainingResult) -> str:
    record = prepared.config.alignment
    return training_page(
        result.log,
        title=f"Alignment of {name}",
        subtitle=f"brainfm align, brain-caption, {record['language_model']}",
        facts={
            "Participants": str(len(prepared.participants)),
            "Training trials": str(sum(len(one.rows) for one in prepared.source.trials)),
            "Contrast": str(record["contrast_with"]),
            "Steps": str(result.position.step),
            "Best epoch": "last" if result.position.best_epoch is None else str(result.position.best_epoch),
        },
        notes=("The epoch was chosen on validation pictures: these are no test scores.",),
        methods=CREDITS.methods,
        citations=(CREDITS.citation,),
    ).render()


_CITATION = f"""# How this was made

Aligned with `brainfm align`. Cite brainfm (CITATION.cff) and, for brain-caption models, {CREDITS.prompts}
"""
