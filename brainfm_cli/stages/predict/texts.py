"""predict with a model that was aligned with texts: people are scored by what is said of a disorder, without any label of it."""

from __future__ import annotations

import logging
from functools import lru_cache, partial
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.bids.derivatives import OutputDataset, write_json, write_text
from brainfm_cli.bids.names import output_name
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, UsageError
from brainfm_cli.learning.alignment import AlignmentRecord
from brainfm_cli.learning.checkpoints import model_files, read_model_config, source_of_model
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.evaluation import Context, evaluate
from brainfm_cli.learning.floors import make_floors
from brainfm_cli.learning.samples import select_participants
from brainfm_cli.learning.splits import fixed_split, participant_hash, people_groups
from brainfm_cli.learning.targets import TargetSettings, class_text, participant_table, read_target
from brainfm_cli.learning.texts import NEUTRAL, DisorderText, read_disorders
from brainfm_cli.learning.tuned import read_seen
from brainfm_cli.learning.zero_shot import (
    TestedDisorder,
    TextPredictor,
    ZeroShot,
    binary_target,
    compare_shuffled,
    retrieve,
    shuffled_texts,
)
from brainfm_cli.reports.evaluation import evaluation_page
from brainfm_cli.reports.zero_shot import zero_shot_page
from brainfm_cli.systems import load_system
from brainfm_cli.systems.brain_graph import texts as alignment

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from brainfm_cli.config import Invocation
    from brainfm_cli.learning.results import EvaluationResult
    from brainfm_cli.learning.targets import Target
    from brainfm_cli.learning.zero_shot import TextSettings
    from brainfm_cli.stages.predict import PredictSettings

log = logging.getLogger(__name__)
MODEL = "Text of the disorder"
WITHOUT = "Text, connectivity only"
RANDOM = "Random vectors for the text"
_FOLDER = "zero-shot"


def predict_by_text(call: Invocation, settings: PredictSettings) -> int:
    """Score people by texts; gives back the exit code."""
    model = call.model
    assert model is not None  # noqa: S101  (checked by the caller)
    if call.reports_only:
        return _rebuild(call.output_dir)
    choose_device(call.execution.device)
    record = _record(model)
    cohort = Cohort.open(call.input_dir)
    people = select_participants(cohort, settings.where, call.selection.participant_label)
    common = {"cohort_dir": cohort.root, "model": model, "settings": settings, "device": call.execution.device}
    tables = [settings.text.table] if settings.text.table is not None else []
    inputs = (*cohort.files, *model_files(model), *tables)
    if call.level == "participant":
        wanted = _wanted(settings, record, ())
        for name in wanted:
            _text(name, model, settings.text)  # a text that is not there ends the run before anything is written
        if call.dry_run:
            Console().print(f"predict {model.name}: {len(people)} participants, texts of {', '.join(wanted)}", highlight=False)
            return 0
        dataset = _open(call, settings)
        arguments = {**common, "root": dataset.root, "disorders": wanted}
        units = [
            Unit(name=f"sub-{key}", inputs=inputs, work=write_prediction, arguments={**arguments, "participant": key}) for key in people
        ]
        return run_units(dataset, units, call.execution)
    target = _target(cohort, model, record, settings, people)
    tested = set(people)
    present = {target.classes[int(value)] for name, value in zip(target.participants, target.observed, strict=True) if name in tested}
    wanted = _wanted(settings, record, sorted(present))
    for name in wanted:
        _text(name, model, settings.text)
    if call.dry_run:
        unseen = [name for name in wanted if name not in record.disorders]
        Console().print(
            f"predict {model.name}: {', '.join(wanted)} by text; never labelled for the model: {', '.join(unseen) or 'none'}",
            highlight=False,
        )
        return 0
    dataset = _open(call, settings)
    arguments = {**common, "root": dataset.root, "disorders": wanted, "people": tuple(people)}
    return run_units(dataset, [Unit(name="group", inputs=inputs, work=write_evaluation, arguments=arguments)], call.execution)


def write_evaluation(
    cohort_dir: Path, model: Path, root: Path, settings: PredictSettings, device: str, disorders: tuple[str, ...], people: tuple[str, ...]
) -> UnitResult:
    """Evaluate every disorder's text on ``people``, beside control texts and floors; write the whole in one page."""
    cohort, aligned = Cohort.open(cohort_dir), _load(model, device)
    target = _target(cohort, model, aligned.record, settings, people)
    texts = [_text(name, model, settings.text) for name in disorders]
    inputs = aligned.inputs(cohort, target.participants)
    logits = partial(aligned.logits, inputs, target.participants)
    own = aligned.vectors(texts)
    rules = {MODEL: logits(own), RANDOM: logits(alignment.random_texts(own, seed=settings.text.seed))}
    if aligned.record.condition == "clauses":
        rules[WITHOUT] = logits(own, encoder=False)
    neutral = logits(aligned.vectors([DisorderText(name="a disorder", description=NEUTRAL)]))[:, 0]
    written: list[Path] = []
    tested: list[TestedDisorder] = []
    for column, (name, text) in enumerate(zip(disorders, texts, strict=True)):
        log.info("%s by its text", name)
        place = root / _FOLDER / _slug(name)
        result = _evaluate(
            cohort, aligned, target, name, people, {rule: values[:, column] for rule, values in rules.items()}, model, settings
        )
        page = evaluation_page(
            result, title=f"{name} by its text", subtitle=f"brainfm predict, model {model.name}", facts={"Text": text.sentence}, notes=()
        )
        written += [*result.write(place), write_text(place / "report.html", page.render())]
        rows = target.rows(result.people)
        labels = result.observed.astype(np.int64)
        others = shuffled_texts(
            len(text.facts(aligned.words)) or 3, _called(aligned), settings.text.shuffles, seed=settings.text.seed + column
        )
        score = next(one for one in result.metrics.predictors if one.name == MODEL).scores["auroc"]
        tested.append(
            TestedDisorder(
                name=name,
                text=text.sentence,
                seen=name in aligned.record.disorders,
                people=len(rows),
                cases=int(labels.sum()),
                auroc=score,
                neutral_spread=round(float(np.ptp(neutral[rows])), 6),
                shuffled=compare_shuffled(rules[MODEL][rows, column], logits(aligned.vectors(others))[rows], labels),
                others={one.name: one.scores["auroc"] for one in result.metrics.predictors if one.name != MODEL and "auroc" in one.scores},
            )
        )
    own_text = {name: column for column, name in enumerate(disorders)}
    cases = [
        row for row, name in enumerate(target.participants) if name in set(people) and target.classes[int(target.observed[row])] in own_text
    ]
    found = retrieve(rules[MODEL][cases], np.array([own_text[target.classes[int(target.observed[row])]] for row in cases]))
    summary = ZeroShot(
        model=model.name, column=aligned.record.column, disorders=tuple(tested), retrieval=found if len(disorders) > 1 else None
    )
    written.append(write_text(root / "zero_shot.json", summary.model_dump_json(indent=2) + "\n"))
    written.append(write_text(root / "report.html", zero_shot_page(summary).render()))
    return UnitResult(outputs=tuple(written), seed=settings.evaluation.seed)


def write_prediction(
    cohort_dir: Path, model: Path, root: Path, settings: PredictSettings, device: str, disorders: tuple[str, ...], participant: str
) -> UnitResult:
    """Write how much one participant shows of what each text states."""
    cohort, aligned = Cohort.open(cohort_dir), _load(model, device)
    texts = [_text(name, model, settings.text) for name in disorders]
    inputs = aligned.inputs(cohort, [participant])
    logits = aligned.logits(inputs, [participant], aligned.vectors(texts))[0]
    key = participant_hash(cohort.dataset_of[participant], participant)
    values = {
        "participant": participant,
        "kind": "text",
        "model": model.name,
        "texts": {
            name: {
                "value": round(float(1 / (1 + np.exp(-logit))), 6),
                "text": text.sentence,
                "aligned_with": name in aligned.record.disorders,
                "statements": len(text.facts(aligned.words)),
            }
            for name, text, logit in zip(disorders, texts, logits, strict=True)
        },
        "seen_in": [name for name, hashes in read_seen(model).items() if key in hashes],
    }
    return UnitResult(outputs=(write_json(root / f"sub-{participant}" / output_name("prediction", {"sub": participant}), values),))


def _evaluate(
    cohort: Cohort,
    aligned: alignment.Aligned,
    target: Target,
    name: str,
    people: Sequence[str],
    rules: Mapping[str, NDArray[np.float64]],
    model: Path,
    settings: PredictSettings,
) -> EvaluationResult:
    table = participant_table(cohort)
    tested = set(people)
    trained = [key for key in target.participants if key not in tested]
    binary = binary_target(target, aligned.record.control, name, trained=trained, tested=people)
    split = fixed_split(
        binary,
        train=[key for key in binary.participants if key not in tested],
        test=[key for key in binary.participants if key in tested],
        groups=people_groups(table.loc[list(binary.participants)], settings.design.group),
        why="not among the people that the model was aligned with",
    )
    predictors = {
        rule: TextPredictor(scores=dict(zip(target.participants, values.tolist(), strict=True))) for rule, values in rules.items()
    }
    floors = make_floors(cohort, binary, table, settings.floors)
    note = (
        f"Floors were fitted on the people the model was aligned with: any of their disorders ({', '.join(aligned.record.disorders)}) against none. "
        f"Nobody among them has {name}."
        if name not in aligned.record.disorders
        else f"The model was aligned with other people who have {name}: this is no zero-shot score."
    )
    context = Context(
        table=table,
        models=(MODEL,),
        pools=floors.pools,
        kernels=floors.kernels,
        pretrained=read_seen(model)["pretrained_on"],
        transductive=settings.design.transductive,
        notes=(note, *floors.notes),
    )
    return evaluate(binary, split, {**predictors, **floors.predictors}, context, settings.evaluation)


def _record(model: Path) -> AlignmentRecord:
    return AlignmentRecord.from_values(read_model_config(model).alignment, where=model / "config.yaml")


@lru_cache(maxsize=1)
def _load(model: Path, device: str) -> alignment.Aligned:
    """Loaded once per process: a worker predicts many people."""
    system = alignment.alignable(load_system(model), model)
    system.module.to(choose_device(device))
    return alignment.Aligned.load(model, system)


def _called(aligned: alignment.Aligned) -> list[str]:
    """Words for the networks that have regions in an atlas of the model."""
    present = np.any([module.get_buffer("shares").sum(0).numpy() > 0 for module in aligned.modules.values()], axis=0)
    return [aligned.words.words_of(name) for name, there in zip(aligned.record.networks, present, strict=True) if there]


def _wanted(settings: PredictSettings, record: AlignmentRecord, present: Sequence[str]) -> tuple[str, ...]:
    """Disorders to score: those asked for, else those among ``present`` that the model was not aligned with."""
    unseen = [name for name in present if name not in {*record.control, *record.disorders}]
    wanted = settings.text.disorders or tuple(settings.text.texts) or tuple(unseen)
    if not wanted:
        raise UsageError("no disorder is named", fix="give --set 'text.disorders=[NAME]' or a text: --set 'text.texts={NAME: ...}'")
    absent = [name for name in wanted if present and name not in present]
    if absent:
        raise InputNotFoundError(
            f"nobody tested has {', '.join(absent)} in column '{record.column}'",
            fix=f"it holds {', '.join(present)}; check text.disorders and where",
        )
    return wanted


def _text(name: str, model: Path, settings: TextSettings) -> DisorderText:
    """What is said of a disorder: in the settings, in the table given, in the model's own table, or in the packaged one."""
    if name in settings.texts:
        return DisorderText(name=name, description=settings.texts[name])
    for path in (settings.table,) if settings.table is not None else (model / "disorders.yaml", None):
        found = read_disorders(path).find(name)
        if found is not None:
            return found
    return read_disorders(settings.table).text_of(name)  # the error that names what there is


def _target(cohort: Cohort, model: Path, record: AlignmentRecord, settings: PredictSettings, people: Sequence[str]) -> Target:
    """Diagnoses of the people tested and of those that the model was aligned with, who train the floors.

    Raises
    ------
    InputDatasetError
        The model was aligned with some of the people tested.
    InputNotFoundError
        None of the people it was aligned with is in this cohort.
    """
    column = settings.target or record.column
    table = participant_table(cohort)
    hashes = read_seen(model)["tuned_on"]
    trained = {name for name in table.index if participant_hash(str(table.loc[name, "dataset"]), name) in hashes}
    known = trained & set(people)
    if known:
        raise InputDatasetError(
            f"the model was aligned with {len(known)} of {len(people)} people, e.g. {min(known)}",
            where=cohort.root,
            fix="choose people it has not seen, e.g. --set 'where.split=[holdout]'",
        )
    if not trained:
        raise InputNotFoundError(
            "none of the people the model was aligned with is in this cohort, so that no floor can be fitted beside it",
            where=cohort.root,
            fix="pack both datasets into one cohort (parcellate group --datasets); 'predict participant' needs no floors",
        )
    chosen = [name for name in table.index if name in trained or name in set(people)]
    found = sorted(set(table.loc[chosen, column].map(class_text)) - {""}) if column in table else []
    classes = (*(name for name in record.control if name in found), *(name for name in found if name not in record.control))
    coding = TargetSettings(type="categorical", classes=classes, positive=classes[-1] if len(classes) == 2 else None)
    return read_target(cohort, column, coding, participants=chosen)


def _open(call: Invocation, settings: PredictSettings) -> OutputDataset:
    assert call.model is not None  # noqa: S101  (checked by the caller)
    sources = [call.input_dir, source_of_model(call.model)]
    return OutputDataset.open(call.output_dir, command="predict", settings=settings, sources=sources)


def _rebuild(root: Path) -> int:
    path = root / "zero_shot.json"
    try:
        summary = ZeroShot.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise InputNotFoundError("no evaluation here", where=root, fix="run without --reports-only first") from error
    except ValueError as error:
        raise InputDatasetError(f"the evaluation is unreadable: {error}", where=path, fix="evaluate again") from error
    write_text(root / "report.html", zero_shot_page(summary).render())
    return 0


def _slug(text: str) -> str:
    return "".join(character if character.isalnum() else "" for character in text) or "disorder"
