"""prompt-tune for mri-language: a class, a grade or survival of each person, with clinical variables fused late, beside its floors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from brainfm_cli.learning.checkpoints import write_tensors
from brainfm_cli.learning.clinical import fit_clinical
from brainfm_cli.stages.prompt_tune.scan_settings import Outcome, TuningCall
from brainfm_cli.systems.mri_language.adaptation import ADAPTED_FILE, adapted_tensors
from brainfm_cli.systems.mri_language.classification import HEAD_FILE
from brainfm_cli.systems.mri_language.comparison import ScanFloors, answer_rows, compare_studies, score_answers
from brainfm_cli.systems.mri_language.questions import question_of

if TYPE_CHECKING:
    from brainfm_cli.learning.scan_tuning import TuningPeople


def tune_studies(call: TuningCall) -> tuple[TuningPeople, Outcome]:
    """Head and clinical variables on the encoder; everything is fitted on training people and chosen on validation people."""
    settings, cohort = call.settings, call.cohort
    question = question_of(settings, cohort.participants, call.chosen, call.place)
    split = call.split(dict(question.strata))
    task = question.task(split.role("train"))
    coding = fit_clinical(cohort.participants, split.role("train"), settings.clinical, call.place)
    people = tuple(task.labels)
    numbers = coding.encode(cohort.participants, people, call.place)
    made = compare_studies(
        call.system, cohort, task, split, settings.schedule.plan(settings.seed), clinical=dict(zip(people, numbers, strict=True)),
        tune=settings.tune, adaptation=settings.adaptation, batch_size=settings.schedule.batch_size, execution=call.execution,
        floors=ScanFloors(random_encoder=settings.random_encoder, image_numbers=settings.image_numbers, network=settings.network),
        folder=call.folder / "checkpoints",
    )  # fmt: skip
    test, horizons = split.role("test"), question.horizons(split.role("train"))
    scores = score_answers(
        task, made.answers, split.role("train"), test, horizons=horizons, unit=settings.follow_up.unit, seed=settings.seed
    )
    files = [write_tensors(call.folder / HEAD_FILE, made.fitted.head.state_dict())]
    if made.adapted is not None:
        files.append(write_tensors(call.folder / ADAPTED_FILE, adapted_tensors(made.adapted, settings.tune)))
    baseline = made.fitted.baseline
    fields = {"classes": question.names, "ordered": task.kind == "grading", "temperature": made.fitted.temperature}
    if task.is_survival:
        fields = {
            "method": task.kind, "causes": question.names, "times": task.edges, "horizons": horizons, "unit": settings.follow_up.unit,
            "baseline": () if baseline is None else tuple(tuple(row) for row in baseline.tolist()),
        }  # fmt: skip
    return split, Outcome(
        record=call.record(split, target=question.name, clinical=coding, **fields),
        scores=scores,
        people_scores=pd.DataFrame(answer_rows(task, made.answers, test, question.names, question.names)),
        result=made.fitted.result,
        files=files,
        notes=(*question.notes, *coding.notes(cohort.participants, people, call.place)),
    )
