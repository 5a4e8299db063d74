"""prompt-tune for mri-language: the lesions of each scan, scored in the grid of its file."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from brainfm_cli.learning.checkpoints import write_tensors
from brainfm_cli.signals.drawn_lesions import DrawnLesions
from brainfm_cli.stages.prompt_tune.scan_settings import Outcome, TuningCall
from brainfm_cli.systems.mri_language.adaptation import ADAPTED_FILE, adapted_tensors
from brainfm_cli.systems.mri_language.lesion_scores import (
    MEAN_MASK,
    TWIN_DECODER,
    Chances,
    fit_lesions,
    lesion_rows,
    lesion_scores,
    masked_people,
    mean_chances,
)
from brainfm_cli.systems.mri_language.segmentation import DECODER_FILE, told_sequences
from brainfm_cli.systems.mri_language.tuning import random_twin

if TYPE_CHECKING:
    from brainfm_cli.learning.scan_tuning import TuningPeople

_TARGET = "lesion"
_NOTE = "lesions of every label count together; a person without lesion and without prediction has no Dice and is left out of its mean"


def tune_lesions(call: TuningCall) -> tuple[TuningPeople, Outcome]:
    """A decoder on the encoder, beside the mean mask and the same on an encoder without pretraining."""
    settings, cohort, system = call.settings, call.cohort, call.system
    split = call.split(masked_people(cohort, call.chosen))
    values, plan = tuple(cohort.labels), settings.schedule.plan(settings.seed)
    shared: dict[str, Any] = {
        "values": values, "augment": settings.augment, "batch_size": settings.schedule.batch_size, "execution": call.execution,
        "tune": settings.tune, "adaptation": settings.adaptation, "sequences": settings.segmentation,
    }  # fmt: skip
    truth = DrawnLesions(raw=call.raw, mask_roots=call.mask_roots, slices=settings.slices, tolerance_mm=settings.tolerance_mm)
    checkpoints = call.folder / "checkpoints"
    segmenter, result, own = fit_lesions(system.model.encoder, cohort, split, plan, truth, folder=checkpoints / "model", **shared)
    fits: dict[str, tuple[Chances, int]] = {"model": own}
    fits[MEAN_MASK] = (mean_chances(cohort, split.role("train"), values), 0)
    if settings.random_encoder:
        encoder = random_twin(system, seed=settings.seed).model.encoder
        fits[TWIN_DECODER] = fit_lesions(encoder, cohort, split, plan, truth, folder=checkpoints / "random", **shared)[2]
    rows = lesion_rows(fits, cohort, split.role("test"), values, truth)
    files = [write_tensors(call.folder / DECODER_FILE, segmenter.decoder_tensors())]
    if settings.tune != "linear":
        files.append(write_tensors(call.folder / ADAPTED_FILE, adapted_tensors(segmenter.model.encoder, settings.tune)))
    return split, Outcome(
        record=call.record(split, target=_TARGET, labels=cohort.labels, together=settings.segmentation.together, smallest_lesion=own[1]),
        scores=lesion_scores(rows, seed=settings.seed),
        people_scores=rows,
        result=result,
        files=files,
        notes=(_NOTE, *((told_sequences(cohort, split.role("train")),) if settings.segmentation.together else ())),
    )
