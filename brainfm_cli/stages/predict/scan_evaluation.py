"""predict group for mri-language: classes, grades, survival and lesions on held-out people of every fold, in one report beside their floors."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from rich.console import Console

from brainfm_cli.bids.derivatives import OutputDataset, write_json, write_text, write_tsv
from brainfm_cli.bids.inputs import choose_participants
from brainfm_cli.bids.slice_cohort import SliceCohort
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, SettingsError
from brainfm_cli.learning.checkpoints import model_files, read_model_config, source_of_model
from brainfm_cli.learning.clinical import fit_clinical
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.follow_up import time_grid
from brainfm_cli.learning.outcome_scores import at_time, mean_over_draws
from brainfm_cli.learning.scan_tuning import choose_validation, few_people
from brainfm_cli.learning.splits import make_split, participant_hash
from brainfm_cli.learning.targets import Target, class_text
from brainfm_cli.learning.tuned import read_seen
from brainfm_cli.reports.scan_evaluation import scan_evaluation_page
from brainfm_cli.signals.drawn_lesions import DrawnLesions
from brainfm_cli.signals.slice_packing import pack_cohort
from brainfm_cli.systems.mri_language import MriLanguage
from brainfm_cli.systems.mri_language.comparison import CLINICAL, TWIN, compare_studies, primary_of, score_answers
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
from brainfm_cli.systems.mri_language.questions import Question, question_of
from brainfm_cli.systems.mri_language.tuning import random_twin

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from brainfm_cli.config import Execution, Invocation
    from brainfm_cli.learning.scan_tuning import TuningPeople
    from brainfm_cli.stages.predict import PredictSettings
    from brainfm_cli.stages.predict.scan_settings import ScanTask
    from brainfm_cli.systems.mri_language.outcomes import StudyTask

_FOLDER = "scan-evaluation"


@dataclass(frozen=True, kw_only=True)
class _Fold:
    """Who trains and tests, and in a few-shot draw how many train."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    share: float = 1.0
    draw: int = 0


def evaluate_scans(call: Invocation, model: Path, settings: PredictSettings) -> int:
    """Pack, tune in every fold of every task, and write tables and one report; gives back the exit code."""
    scans = settings.scans
    _check(settings)
    packing = read_model_config(model).pretraining.get("slices", {})
    size, dims = int(packing.get("size", 0)), int(packing.get("dims", 2))
    packed = (call.input_dir / "cohort" / "slices.parquet").is_file()
    if packed and "raw" not in call.datasets and any(one.task == "segmentation" for one in scans.tasks.values()):
        raise InputNotFoundError("masks are scored on the voxels of the scans, which packed slices lack", where=call.input_dir, fix="give the BIDS dataset as INPUT, or beside it: -d raw=DIR")  # fmt: skip
    if call.dry_run:
        people = SliceCohort.open(call.input_dir).labels_of_people if packed else choose_participants(call.input_dir, call.selection)
        Console().print(f"predict {model.name}: {', '.join(scans.tasks)} on {len(people)} people, {settings.design.kind}", highlight=False)
        return 0
    dataset = OutputDataset.open(call.output_dir, command="predict", settings=settings, sources=[call.input_dir, source_of_model(model)])
    roots = tuple(folder for name, folder in call.datasets.items() if name not in {"raw", "truth"})
    if packed:
        cohort = SliceCohort.open(call.input_dir)
    else:
        code, found = pack_cohort(dataset, call.input_dir, scans.slices, size=size, dims=dims, selection=call.selection, execution=call.execution, mask_roots=roots)  # fmt: skip
        if found is None:
            return code
        cohort = found
    chosen = tuple(label for label in cohort.labels_of_people if not call.selection.participant_label or label in call.selection.participant_label)  # fmt: skip
    common = {"cohort_dir": cohort.root, "model": model, "settings": settings, "execution": call.execution, "chosen": chosen,
              "root": dataset.root / _FOLDER, "raw": call.datasets.get("raw", call.input_dir), "mask_roots": roots}  # fmt: skip
    inputs, units = (*cohort.files, *model_files(model)), []
    for name, task in scans.tasks.items():
        strata, _ = _strata(task, cohort, chosen)
        folds = _folds(settings, cohort, model, strata)
        few = _few_shot(settings, task, folds)
        units += [
            Unit(name=f"{name}-{fold.name}", inputs=inputs, work=write_fold, arguments={**common, "name": name, "fold": fold})
            for fold in (*folds, *few)
        ]
    code = run_units(dataset, units, call.execution)
    if code:
        return code
    files = tuple(sorted((dataset.root / _FOLDER).glob("*/fold-*.json")))
    arguments = {name: common[name] for name in ("cohort_dir", "settings", "chosen", "root")} | {
        "page": dataset.root / "report.html",
        "title": model.name,
    }
    return run_units(dataset, [Unit(name="group", inputs=files, work=write_scores, arguments=arguments)], call.execution)


def _check(settings: PredictSettings) -> None:
    if settings.design.repeats != 1:
        raise SettingsError("tasks of scans take one repetition of the folds", fix="leave design.repeats at 1")
    for name, task in settings.scans.tasks.items():
        if task.task in {"classification", "grading"} and task.target is None:
            raise SettingsError(f"task '{name}' needs a column", fix=f"set scans.tasks.{name}.target")
        if not name.isidentifier():
            raise SettingsError(f"'{name}' is no name of a task", fix="use letters, digits and _")


def _question(task: ScanTask, cohort: SliceCohort, chosen: Sequence[str]) -> Question:
    place = str(cohort.root / "participants.tsv")
    return question_of(task, cohort.participants, chosen, place)


def _strata(task: ScanTask, cohort: SliceCohort, chosen: Sequence[str]) -> tuple[dict[str, str], Question | None]:
    if task.task == "segmentation":
        return masked_people(cohort, chosen), None
    question = _question(task, cohort, chosen)
    return dict(question.strata), question


def _folds(settings: PredictSettings, cohort: SliceCohort, model: Path, strata: Mapping[str, str]) -> list[_Fold]:
    """Folds over people whom the encoder has not seen; those it has seen train, except where their site is left out."""
    seen, design = read_seen(model)["pretrained_on"], settings.design
    first = cohort.slices.drop_duplicates("participant").set_index("participant")
    known = {label for label in strata if participant_hash(str(first.loc[label, "dataset"]), label) in seen}
    free = [label for label in sorted(strata) if design.transductive or label not in known]
    if len(free) < 4:
        raise InputDatasetError(
            f"{len(known)} of {len(strata)} people were in the encoder's pretraining: {len(free)} are left to test", where=cohort.root,
            fix="use other people, pretrain on fewer (--participant-label), or say so in every table: --set design.transductive=true",
        )  # fmt: skip
    names = sorted(set(strata.values()))
    target = Target(
        name="task", kind="binary" if len(names) == 2 else "multiclass", participants=tuple(free), classes=tuple(names),
        observed=np.array([names.index(strata[label]) for label in free], float),
    )  # fmt: skip
    table = cohort.participants.reindex(sorted(strata)).copy()
    if "site" not in table:
        table["site"] = [str(first.loc[label, "site"]) for label in table.index]
    split, rest = make_split(target, table, design), [label for label in sorted(strata) if label not in free]
    found = []
    for number, fold in enumerate(split.folds(), start=1):
        away = {class_text(table.loc[label, design.site]) for label in fold.test} if design.kind == "leave-one-site-out" else set()
        more = tuple(label for label in rest if not away or class_text(table.loc[label, design.site]) not in away)
        found.append(_Fold(name=f"fold-{number}", train=(*fold.train, *more), test=fold.test))
    return found


def _few_shot(settings: PredictSettings, task: ScanTask, folds: Sequence[_Fold]) -> list[_Fold]:
    few = settings.scans.few_shot
    if task.task == "segmentation":
        return []
    return [
        replace(fold, name=f"{fold.name}-share-{round(100 * share)}-draw-{draw}", share=share, draw=draw)
        for share in few.shares
        for draw in range(1, few.draws + 1)
        for fold in folds
    ]


def write_fold(
    cohort_dir: Path, model: Path, settings: PredictSettings, execution: Execution, chosen: tuple[str, ...], root: Path, raw: Path,
    mask_roots: tuple[Path, ...], name: str, fold: _Fold,
) -> UnitResult:  # fmt: skip
    """Fit the model and its floors on one fold and write what each says of the test people."""
    cohort, system, task = SliceCohort.open(cohort_dir), MriLanguage.load(model), settings.scans.tasks[name]
    system.model.to(choose_device(execution.device))
    strata, question = _strata(task, cohort, chosen)
    seed = settings.seed + fold.draw
    train = few_people(strata, fold.train, share=fold.share, seed=seed) if fold.draw else fold.train
    people = choose_validation(strata, train, fold.test, fraction=settings.scans.validation_fraction, seed=seed)
    folder = root / name
    checkpoints = folder / f"checkpoints-{fold.name}"
    if question is None:
        truth = DrawnLesions(raw=raw, mask_roots=mask_roots, slices=settings.scans.slices, tolerance_mm=settings.scans.tolerance_mm)
        values: dict[str, Any] = {"rows": _lesions(system, cohort, people, settings, execution, truth, checkpoints, seed)}
    else:
        values = _answers(system, cohort, people, settings, task, question, execution, checkpoints, seed, few=bool(fold.draw))
    shutil.rmtree(checkpoints, ignore_errors=True)
    values |= {"share": fold.share, "draw": fold.draw, "train": people.role("train"), "test": people.role("test")}
    return UnitResult(outputs=(write_json(folder / f"{fold.name}.json", values),), seed=seed)


def _answers(
    system: MriLanguage, cohort: SliceCohort, people: TuningPeople, settings: PredictSettings, task: ScanTask, question: Question,
    execution: Execution, checkpoints: Path, seed: int, *, few: bool,
) -> dict[str, Any]:  # fmt: skip
    scans, place = settings.scans, str(cohort.root / "participants.tsv")
    asked = question.task(people.role("train"))
    everybody = tuple(people.table["participant_id"])
    asked = replace(asked, labels={label: asked.labels[label] for label in everybody})
    coding = fit_clinical(cohort.participants, people.role("train"), task.clinical, place)
    numbers = coding.encode(cohort.participants, everybody, place)
    made = compare_studies(
        system, cohort, asked, people, scans.schedule.plan(seed), clinical=dict(zip(everybody, numbers, strict=True)), tune=scans.tune,
        adaptation=scans.adaptation, floors=scans.floors.model_copy(update={"network": False}) if few else scans.floors,
        batch_size=scans.schedule.batch_size, execution=execution, folder=checkpoints,
    )  # fmt: skip
    return {"edges": asked.edges, "answers": {method: found.round(7).tolist() for method, found in made.answers.items()}}


def _lesions(
    system: MriLanguage, cohort: SliceCohort, people: TuningPeople, settings: PredictSettings, execution: Execution, truth: DrawnLesions,
    checkpoints: Path, seed: int,
) -> list[dict[str, Any]]:  # fmt: skip
    scans, values = settings.scans, tuple(cohort.labels)
    shared: dict[str, Any] = {"values": values, "augment": scans.augment, "batch_size": scans.schedule.batch_size, "execution": execution,
                              "tune": scans.tune, "adaptation": scans.adaptation, "sequences": scans.segmentation}  # fmt: skip
    encoders = {"model": system.model.encoder}
    if scans.floors.random_encoder:
        encoders[TWIN_DECODER] = random_twin(system, seed=seed).model.encoder
    fits: dict[str, tuple[Chances, int]] = {}
    for number, (name, encoder) in enumerate(encoders.items()):
        fits[name] = fit_lesions(encoder, cohort, people, scans.schedule.plan(seed), truth, folder=checkpoints / str(number), **shared)[2]
    fits[MEAN_MASK] = (mean_chances(cohort, people.role("train"), values), 0)
    rows = lesion_rows(fits, cohort, people.role("test"), values, truth)
    return [{str(key): value for key, value in row.items()} for row in rows.astype(object).where(rows.notna(), None).to_dict("records")]


def write_scores(cohort_dir: Path, settings: PredictSettings, chosen: tuple[str, ...], root: Path, page: Path, title: str) -> UnitResult:
    """Pool the folds of every task, score them, and write tables and the report."""
    cohort = SliceCohort.open(cohort_dir)
    outputs, tables, curves, notes = [], {}, {}, []
    for name, task in settings.scans.tasks.items():
        found = [read_json(path) for path in sorted((root / name).glob("fold-*.json"))]
        whole = [one for one in found if not one["draw"]]
        if task.task == "segmentation":
            tables[name] = lesion_scores(pd.DataFrame([row for one in whole for row in one["rows"]]), seed=settings.seed)
        else:
            question = _question(task, cohort, chosen)
            asked = _common(question)
            tables[name] = _score_pool(asked, question, task, whole, settings.seed)
            notes += [f"{name}: {note}" for note in question.notes]
            few = [one for one in found if one["draw"]]
            if few:
                curves[name] = _score_few(asked, few, settings)
                outputs.append(write_tsv(root / name / "few_shot.tsv", curves[name]))
        outputs.append(write_tsv(root / name / "scores.tsv", tables[name]))
    together = pd.concat([table.assign(task=name) for name, table in tables.items()], ignore_index=True)
    outputs.append(write_json(root / "evaluation.json", together.astype(object).where(together.notna(), None).to_dict("records")))
    made = scan_evaluation_page(tables, curves, title=title, design=settings.design.kind, notes=tuple(notes))
    return UnitResult(outputs=(*outputs, write_text(page, made.render())), seed=settings.seed, notes=tuple(notes))


def _common(question: Question) -> StudyTask:
    """The task with one grid of times for all folds."""
    asked = question.task(tuple(question.strata))
    if asked.is_survival and question.follow_up is not None and question.settings is not None:
        asked = replace(asked, edges=time_grid(question.follow_up.time, question.follow_up.cause, question.settings.bins))
    return asked


def _pooled(asked: StudyTask, found: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Any], list[str], list[str]]:
    """Answers of all folds by method, test people in the same order, and everybody who trained somewhere."""
    test = [label for one in found for label in one["test"]]
    train = sorted({label for one in found for label in one["train"]})
    answers = {}
    for method in found[0]["answers"]:
        parts = [np.array(one["answers"][method], np.float64) for one in found]
        if asked.is_survival:
            parts = [_on_grid(part, np.array(one["edges"]), asked.edges) for part, one in zip(parts, found, strict=True)]
        answers[method] = np.concatenate(parts)
    return answers, test, train


def _on_grid(curves: Any, times: Any, edges: Sequence[float]) -> Any:  # noqa: ANN401  (arrays)
    columns = [np.stack([at_time(curves[:, :, cause], times, when) for when in edges], axis=1) for cause in range(curves.shape[2])]
    return np.stack(columns, axis=2)


def _score_pool(asked: StudyTask, question: Question, task: ScanTask, found: Sequence[Mapping[str, Any]], seed: int) -> pd.DataFrame:
    answers, test, train = _pooled(asked, found)
    horizons = question.horizons(tuple(question.strata))
    return score_answers(asked, answers, train, test, horizons=horizons, unit=task.follow_up.unit, seed=seed)


def _score_few(asked: StudyTask, found: Sequence[Mapping[str, Any]], settings: PredictSettings) -> pd.DataFrame:
    tables = []
    for share in settings.scans.few_shot.shares:
        draws, label, people = [], "", 0
        for draw in range(1, settings.scans.few_shot.draws + 1):
            mine = [one for one in found if one["draw"] == draw and one["share"] == share]
            answers, test, train = _pooled(asked, mine)
            scored = {method: primary_of(asked, answer, train, test) for method, answer in answers.items()}
            label, people = next(iter(scored.values()))[0], len(test)
            draws.append({method: weighted for method, (_, weighted) in scored.items()})
        table = mean_over_draws(draws, people, label=label, against=(TWIN, CLINICAL), seed=settings.seed)
        tables.append(table.assign(share=share, draws=len(draws)))
    return pd.concat(tables, ignore_index=True)
