"""One division of people: the model and everything it must beat, fitted on the same training people, chosen on the same others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainfm_cli.bids.slice_cohort import SliceCohort
from brainfm_cli.config import Frozen
from brainfm_cli.learning.outcome_scores import MODEL, last_known, primary_classes, score_classes, score_survival
from brainfm_cli.learning.survival import Outcome, weighted_uno
from brainfm_cli.systems.mri_language.adaptation import AdaptationSettings, Tune
from brainfm_cli.systems.mri_language.encoder import MriLanguage
from brainfm_cli.systems.mri_language.image_numbers import image_numbers, standardised
from brainfm_cli.systems.mri_language.outcomes import StudyTask, fit_linear_answer, marginal_answer, risk_of
from brainfm_cli.systems.mri_language.tuning import FittedStudies, adapt_studies, fit_studies, random_twin

if TYPE_CHECKING:
    from brainfm_cli.config import Execution
    from brainfm_cli.learning.loop import TrainingPlan
    from brainfm_cli.learning.scan_tuning import TuningPeople
    from brainfm_cli.learning.uncertainty import Weighted
    from brainfm_cli.models.mri_encoder import MriEncoder

MARGINAL = {"classification": "majority", "grading": "shares of grades", "cox": "everybody alike", "discrete": "everybody alike"}
CLINICAL, NUMBERS, NETWORK, TWIN, FROZEN = (
    "clinical variables only", "intensities and volumes, linear", "plain CNN from scratch", "no pretraining, same head", "frozen encoder, same head"
)  # fmt: skip
JOINED = "intensities, volumes and clinical variables, linear"


class ScanFloors(Frozen):
    """What stands beside a model of studies, beside what everybody is told alike and clinical variables alone."""

    random_encoder: bool = True
    """The same on an encoder that was never pretrained."""
    image_numbers: bool = True
    """A linear model of intensities, head volume and asymmetry of each sequence, with the clinical variables where there are any."""
    network: bool = False
    """A plain convolutional network of about as many parameters, trained from scratch on the same people: slow."""


@dataclass(frozen=True, kw_only=True)
class StudyComparison:
    """What every method says of the test people."""

    fitted: FittedStudies
    """The model."""
    adapted: MriEncoder | None
    """The encoder as tuned; none where it stayed frozen."""
    answers: dict[str, NDArray[np.float64]]
    """By method, the model first: (test people, classes) probabilities or (test people, times, causes) incidences."""


def compare_studies(
    system: MriLanguage,
    cohort: SliceCohort,
    task: StudyTask,
    people: TuningPeople,
    plan: TrainingPlan,
    *,
    clinical: Mapping[str, NDArray[np.float32]],
    tune: Tune,
    adaptation: AdaptationSettings,
    floors: ScanFloors,
    batch_size: int,
    execution: Execution,
    folder: Path,
) -> StudyComparison:
    """Fit the model and its floors, and let them answer for the test people; goes on from ``folder`` where it was killed."""
    test, train, validation = (people.role(name) for name in ("test", "train", "validation"))
    shared = {"batch_size": batch_size, "execution": execution}

    def fit(encoder: MriEncoder, name: str) -> tuple[FittedStudies, FittedStudies, MriEncoder | None]:
        begun = fit_studies(encoder, cohort, task, people, plan, clinical=clinical, folder=folder / name, **shared)  # type: ignore[arg-type]
        if tune == "linear":
            return begun, begun, None
        tuned, adapted = adapt_studies(
            begun, encoder, encoder, cohort, people, plan, tune=tune, settings=adaptation, folder=folder / f"{name}-{tune}", **shared  # type: ignore[arg-type]
        )  # fmt: skip
        return tuned, begun, adapted

    model, begun, adapted = fit(system.model.encoder, MODEL)
    answers = {MODEL: model.answer(test)}
    if tune != "linear":
        answers[FROZEN] = begun.answer(test)
    answers[MARGINAL[task.kind]] = marginal_answer(task, train, len(test))
    if model.clinical_only is not None:
        answers[CLINICAL] = model.clinical_only.answer(_stacked(clinical, test))
    if floors.image_numbers:
        numbers = standardised(image_numbers(cohort, tuple(task.labels)), train)
        joined = {label: np.r_[numbers[label], clinical[label]] for label in task.labels}
        answers[NUMBERS] = fit_linear_answer(task, numbers, train, validation).answer(_stacked(numbers, test))
        if model.clinical_only is not None:
            answers[JOINED] = fit_linear_answer(task, joined, train, validation).answer(_stacked(joined, test))
    if floors.random_encoder:
        twin = random_twin(system, seed=plan.seed)
        twin.model.to(next(system.model.parameters()).device)
        answers[TWIN] = fit(twin.model.encoder, "random")[0].answer(test)
    if floors.network:
        network, _ = adapt_studies(
            begun, None, system.model.encoder, cohort, people, plan, tune="full", settings=adaptation, folder=folder / "network", **shared  # type: ignore[arg-type]
        )  # fmt: skip
        answers[NETWORK] = network.answer(test)
    return StudyComparison(fitted=model, adapted=adapted, answers=answers)


def _stacked(numbers: Mapping[str, NDArray[np.float32]], people: Sequence[str]) -> NDArray[np.float32]:
    width = len(next(iter(numbers.values())))
    return np.stack([numbers[label] for label in people]) if people else np.zeros((0, width), np.float32)


def score_answers(
    task: StudyTask, answers: Mapping[str, NDArray[np.float64]], train: Sequence[str], test: Sequence[str], *, horizons: Sequence[float], unit: str, seed: int
) -> pd.DataFrame:  # fmt: skip
    """Every score of every method on the test people, with differences from the model."""
    if not task.is_survival:
        return score_classes(task.classes_of(test), answers, classes=task.count, seed=seed, ordered=task.kind == "grading")
    first = {name: curves[:, :, 0] for name, curves in answers.items()}
    return score_survival(outcome_of(task, train), outcome_of(task, test), first, times=task.edges, horizons=horizons, unit=unit, seed=seed)


def primary_of(task: StudyTask, answer: NDArray[np.float64], train: Sequence[str], test: Sequence[str]) -> tuple[str, Weighted]:
    """The score that few-shot curves show, and its name."""
    if task.is_survival:
        known = outcome_of(task, train)
        return "Uno C", weighted_uno(known, outcome_of(task, test), risk_of(answer), until=last_known(known))
    ordered = task.kind == "grading"
    return "Concordance of grades" if ordered else "AUROC", primary_classes(task.classes_of(test), answer, ordered=ordered)


def outcome_of(task: StudyTask, people: Sequence[str]) -> Outcome:
    """Follow-up of people as scores want it."""
    cause = task.classes_of(people)
    return Outcome(time=task.times_of(people), event=cause == 1, competing=cause == 2)


def answer_rows(
    task: StudyTask, answers: Mapping[str, NDArray[np.float64]], people: Sequence[str], names: Sequence[str], causes: Sequence[str]
) -> list[dict[str, object]]:
    """One row per method and person, for predictions.tsv: probabilities of classes, or the incidence of each cause at each time."""
    rows: list[dict[str, object]] = []
    for method, found in answers.items():
        for label, one in zip(people, found, strict=True):
            row: dict[str, object] = {"participant_id": f"sub-{label}", "predictor": method}
            if task.is_survival:
                row |= {"time": task.times[label], "cause": task.labels[label]}
                row |= {f"{cause}_by_{when:g}": round(float(one[place, number]), 6) for number, cause in enumerate(causes) for place, when in enumerate(task.edges)}  # fmt: skip
            else:
                row |= {
                    "observed": names[task.labels[label]],
                    **{f"p_{name}": round(float(p), 6) for name, p in zip(names, one, strict=True)},
                }
            rows.append(row)
    return rows
