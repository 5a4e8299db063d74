"""predict: participant applies a tuned model; group evaluates it beside its floors, on the same people and folds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from rich.console import Console

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.bids.derivatives import OutputDataset, write_json, write_text
from brainfm_cli.bids.names import output_name
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.config import Settings
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, UsageError
from brainfm_cli.learning.attributions import ExplanationSettings
from brainfm_cli.learning.checkpoints import model_files, read_model_config, source_of_model
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.draws import FewShotSettings
from brainfm_cli.learning.evaluation import EvaluationSettings
from brainfm_cli.learning.explanation import FoldExplainer
from brainfm_cli.learning.floors import FloorSettings
from brainfm_cli.learning.reading_table import ReaderStudySettings
from brainfm_cli.learning.results import EvaluationResult, Metrics, Truth
from brainfm_cli.learning.samples import select_participants
from brainfm_cli.learning.splits import DesignSettings, participant_hash
from brainfm_cli.learning.targets import TargetSettings, participant_table, read_target
from brainfm_cli.learning.tuned import TargetRecord, forecast_by_atlas, load_tuned, prepare_inputs, read_seen, weighted_mean
from brainfm_cli.learning.zero_shot import TextSettings
from brainfm_cli.reports.evaluation import evaluation_page
from brainfm_cli.reports.few_shot import few_shot_page
from brainfm_cli.simulation.truth import attainable_features, attainable_score
from brainfm_cli.stages.predict.arms import ArmSettings, verdict, with_strata, write_interaction
from brainfm_cli.stages.predict.explaining import read_sections, write_explanation
from brainfm_cli.stages.predict.rivals import RivalSettings, make_rivals
from brainfm_cli.stages.predict.scan_settings import ScanEvaluationSettings
from brainfm_cli.systems import load_system

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from brainfm_cli.config import Execution, Invocation
    from brainfm_cli.learning.comparison import Mode
    from brainfm_cli.learning.splits import Split
    from brainfm_cli.learning.targets import Target
    from brainfm_cli.learning.tuned import AtlasModel
    from brainfm_cli.records import RegionTable
    from brainfm_cli.systems import System


_FEW_SHOT = "few-shot"


class PredictSettings(Settings):
    """Settings of ``brainfm predict``."""

    target: str | None = None
    """Column of participants.tsv that holds the labels; the one the model was tuned for where unset (--target)."""
    where: dict[str, tuple[str, ...]] = {}
    """Columns of participants.tsv and the values that people must have, e.g. {split: [holdout]}."""
    refit: Literal["auto", "never", "always"] = "auto"
    """group: never applies the model once to people it has not seen; always tunes it again in every fold of the design; auto
    does the first where nobody was tuned on, the second where everybody was."""
    pretraining: Literal["given", "inside"] = "given"
    """group: given keeps the model's backbone; inside pretrains a new one in every outer fold, without its test people."""
    design: DesignSettings = DesignSettings()
    """How people are divided where the model is refitted."""
    floors: FloorSettings = FloorSettings()
    """What stands beside the model."""
    random_encoder: bool = True
    """Whether a random frozen encoder with the same head is one of the floors."""
    ablations: dict[str, tuple[str, ...]] = {}
    """group: name → blocks of heads that read less, on the same folds, e.g. {series only: [embedding], connectivity only: [edges]}."""
    rivals: RivalSettings = RivalSettings()
    """group: networks that are trained from scratch in every fold, beside the model."""
    arms: ArmSettings | None = None
    """group: arms of a randomised trial; the interaction of the model's score with the treatment is then tested, and a next trial sized."""
    explain: ExplanationSettings | None = None
    """group: explain the predictions of test people by integrated gradients, e.g. {people: 4}."""
    evaluation: EvaluationSettings = EvaluationSettings()
    """Scores, intervals, permutations."""
    few_shot: FewShotSettings = FewShotSettings()
    """group: learning curves, the model tuned again on few people beside the floors on the same few."""
    text: TextSettings = TextSettings()
    """For a model of 'brainfm align': which disorders people are scored for, and by which texts."""
    scans: ScanEvaluationSettings = ScanEvaluationSettings()
    """group, for an mri-language model: the tasks that it is evaluated on, each tuned anew in every fold of the design."""
    reader_study: ReaderStudySettings = ReaderStudySettings()
    """group with --reader-study: how doctors' readings are analysed."""
    seed: int = 0
    """Seed of the random encoder."""


@dataclass(frozen=True, kw_only=True)
class _Loaded:
    """A tuned model with the cohort it is applied to."""

    system: System
    cohort: Cohort
    record: TargetRecord
    atlases: Mapping[str, AtlasModel]
    seen: Mapping[str, set[str]]


def predict(call: Invocation, settings: PredictSettings) -> int:
    """Apply, evaluate, lock, or analyse readings; gives back the exit code."""
    if call.reader_study is not None:
        from brainfm_cli.stages.predict.reader_study import study_readers

        return study_readers(call, settings, settings.reader_study)
    if call.model is None:
        raise UsageError("predict needs a model", fix="give --model OUT/models/<id> of 'brainfm prompt-tune'")
    if read_model_config(call.model).system.get("kind") == "mri-language":
        from brainfm_cli.stages.predict.scans import predict_scans

        return predict_scans(call, settings)
    if call.lock:
        from brainfm_cli.stages.predict.locking import lock_predictions

        return lock_predictions(call, settings)
    if read_model_config(call.model).alignment:
        from brainfm_cli.stages.predict.texts import predict_by_text

        return predict_by_text(call, settings)
    if call.reports_only:
        return _rebuild(call.output_dir, call.model, Cohort.open(call.input_dir))
    choose_device(call.execution.device)
    record = _record(call.model)
    cohort = Cohort.open(call.input_dir)
    people = select_participants(cohort, settings.where, call.selection.participant_label)
    if call.level == "participant":
        return _participants(call, settings, cohort, people)
    mode, target = _plan(call.model, record, cohort, people, settings)
    if call.dry_run:
        _print_plan(call.model, mode, target, people, settings)
        return 0
    dataset = _open(call, settings)
    arguments = {
        "cohort_dir": cohort.root,
        "model": call.model,
        "root": dataset.root,
        "settings": settings,
        "execution": call.execution,
        "people": tuple(people),
        "truth": call.datasets.get("truth"),
    }
    inputs = (*cohort.files, *model_files(call.model), *([call.datasets["truth"] / "truth.json"] if "truth" in call.datasets else []))
    return run_units(dataset, [Unit(name="group", inputs=inputs, work=write_evaluation, arguments=arguments)], call.execution)


def write_evaluation(
    cohort_dir: Path,
    model: Path,
    root: Path,
    settings: PredictSettings,
    execution: Execution,
    people: tuple[str, ...],
    truth: Path | None,
) -> UnitResult:
    """Evaluate on ``people`` and write metrics, predictions, phenotype table and report."""
    from brainfm_cli.learning.comparison import Request, evaluate_model  # brings lightning, which applying does not need

    cohort, record = Cohort.open(cohort_dir), _record(model)
    mode, target = _plan(model, record, cohort, people, settings)
    system = load_system(model)
    system.module.to(choose_device(execution.device))
    system.usable_atlases(cohort)
    explainer = None if settings.explain is None else FoldExplainer(cohort, settings.explain)
    request = Request(
        model=model,
        system=system,
        cohort=cohort,
        record=record,
        target=target,
        people=people,
        mode=mode,
        inside=settings.pretraining == "inside",
        design=settings.design,
        floors=settings.floors,
        random_encoder=settings.random_encoder,
        evaluation=settings.evaluation,
        seed=settings.seed,
        truth=None if truth is None else partial(_read_truth, truth, cohort, target),
        root=root,
        few_shot=settings.few_shot,
        ablations=settings.ablations,
        watch=explainer,
        rivals=make_rivals(system, cohort, target.participants, record.atlases, settings.rivals),
    )
    result, few = evaluate_model(request, execution)
    written = []
    if settings.arms is not None:
        table = participant_table(cohort)
        result = with_strata(result, table, settings.arms)
        written.append(write_interaction(root, result, table, settings.arms))
    written += result.write(root)
    regions = {label: atlas.regions for label, atlas in cohort.atlases.items()}
    if explainer is not None and settings.explain is not None:
        written += write_explanation(root, explainer, settings.explain, regions)
    written.append(_write_report(root, model, result, regions))
    for number, one in few.items():
        written += one.write(root / _FEW_SHOT / str(number))
    if few:
        written.append(_write_curves(root, model, {number: one.metrics for number, one in few.items()}, result.metrics))
    return UnitResult(outputs=tuple(written), seed=settings.evaluation.seed)


def write_prediction(cohort_dir: Path, model: Path, root: Path, participant: str, device: str) -> UnitResult:
    """Write what the model says of one participant."""
    loaded = _load(cohort_dir, model, device)
    record = loaded.record
    inputs = prepare_inputs(loaded.system, loaded.cohort, [participant], record.atlases)
    single = forecast_by_atlas(loaded.system, inputs, loaded.atlases, [participant])
    pooled = weighted_mean(single, record.weights, 1)[0]
    key = participant_hash(loaded.cohort.dataset_of[participant], participant)
    values: dict[str, Any] = {"participant": participant, "target": record.name, "kind": record.kind, "model": model.name}
    if record.kind == "continuous":
        values |= {"value": round(float(pooled[0]), 6), "atlases": {label: round(float(one[0, 0]), 6) for label, one in single.items()}}
    else:
        decided = record.classes[int(pooled.argmax())]
        if record.threshold is not None:
            decided = record.classes[int(pooled[1] >= record.threshold)]
        values |= {
            "value": round(float(pooled[1] if record.kind == "binary" else pooled.max()), 6),
            "probabilities": {name: round(float(value), 6) for name, value in zip(record.classes, pooled, strict=True)},
            "decided": decided,
            "threshold": record.threshold,
            "atlases": {label: round(float(one[0, 1] if record.kind == "binary" else one.max()), 6) for label, one in single.items()},
        }
    values["seen_in"] = [name for name, hashes in loaded.seen.items() if key in hashes]
    notes = (
        (f"{participant} was among the people the model was tuned on: this is no prediction",) if "tuned_on" in values["seen_in"] else ()
    )
    path = root / f"sub-{participant}" / output_name("prediction", {"sub": participant})
    return UnitResult(outputs=(write_json(path, values),), notes=notes)


def _participants(call: Invocation, settings: PredictSettings, cohort: Cohort, people: Sequence[str]) -> int:
    model = call.model
    assert model is not None  # noqa: S101  (checked by the caller)
    if call.dry_run:
        Console().print(f"predict {model.name}: {len(people)} participants, one JSON each", highlight=False)
        return 0
    dataset = _open(call, settings)
    common = {"cohort_dir": cohort.root, "model": model, "root": dataset.root, "device": call.execution.device}
    files = (*cohort.files, *model_files(model))
    units = [Unit(name=f"sub-{key}", inputs=files, work=write_prediction, arguments={**common, "participant": key}) for key in people]
    return run_units(dataset, units, call.execution)


def _open(call: Invocation, settings: PredictSettings) -> OutputDataset:
    assert call.model is not None  # noqa: S101  (checked by the caller)
    sources = [call.input_dir, source_of_model(call.model)]
    return OutputDataset.open(call.output_dir, command="predict", settings=settings, sources=sources)


@lru_cache(maxsize=1)
def _load(cohort_dir: Path, model: Path, device: str) -> _Loaded:
    """Loaded once per process: a worker predicts many people."""
    cohort, record, system = Cohort.open(cohort_dir), _record(model), load_system(model)
    system.module.to(choose_device(device))
    system.usable_atlases(cohort)
    return _Loaded(system=system, cohort=cohort, record=record, atlases=load_tuned(model, record), seen=read_seen(model))


def _record(model: Path) -> TargetRecord:
    config = read_model_config(model)
    if not config.tuning:
        raise InputNotFoundError(
            "the model was pretrained, not tuned for a target", where=model, fix="run 'brainfm prompt-tune' or 'brainfm align' first"
        )
    return TargetRecord.from_values(config.tuning, where=model / "config.yaml")


def _plan(model: Path, record: TargetRecord, cohort: Cohort, people: Sequence[str], settings: PredictSettings) -> tuple[Mode, Target]:
    """How the model is evaluated, and the labels of everybody who takes part."""
    column = settings.target or record.name
    coding = TargetSettings(
        type="continuous" if record.kind == "continuous" else "categorical",
        classes=record.classes,
        positive=record.classes[1] if record.kind == "binary" else None,
    )
    chosen = read_target(cohort, column, coding, participants=people)
    tuned_on = read_seen(model)["tuned_on"]
    table = participant_table(cohort)
    tuned = [name for name in table.index if participant_hash(str(table.loc[name, "dataset"]), name) in tuned_on]
    known = set(tuned) & set(chosen.participants)
    if (
        settings.refit == "always"
        or settings.pretraining == "inside"
        or (settings.refit == "auto" and len(known) == len(chosen.participants))
    ):
        return "refit", chosen
    if known:
        raise InputDatasetError(
            f"{len(known)} of {len(chosen.participants)} people were among those the model was tuned on",
            where=cohort.root,
            fix="choose people it has not seen (where), or tune again in every fold of all of them (--set refit=always)",
        )
    if not tuned:
        raise InputNotFoundError(
            "none of the people the model was tuned on is in this cohort, so that no floor can be fitted beside it",
            where=cohort.root,
            fix="pack both datasets into one cohort (parcellate group --datasets); 'predict participant' needs no floors",
        )
    return "apply", read_target(cohort, column, coding, participants=[*tuned, *chosen.participants])


def _read_truth(folder: Path, cohort: Cohort, target: Target, split: Split) -> Truth:
    """Bayes-optimal and attainable score of a simulated target on the same folds.

    Attainable is the best of linear models on the planted couplings as seen in each atlas and in all together.

    Raises
    ------
    InputNotFoundError
        There is no truth.json, or it does not describe the target.
    """
    try:
        truth = read_json(folder / "truth.json")
        described = truth["targets"].get(target.name)
    except FileNotFoundError as error:
        raise InputNotFoundError("there is no truth.json", where=folder, fix="give the folder that 'brainfm simulate' wrote") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputDatasetError(
            f"truth.json is unreadable: {error}", where=folder, fix="give the folder that 'brainfm simulate' wrote"
        ) from error
    if described is None or target.kind == "multiclass":
        raise InputNotFoundError(
            f"truth.json says nothing of '{target.name}'",
            where=folder,
            fix=f"it describes {', '.join(truth['targets'])}; leave -d truth out",
        )
    features = attainable_features(cohort, truth).set_index(["participant_id", "atlas"])[described["planted"]]
    wide = features.unstack("atlas").reindex(list(target.participants))  # noqa: PD010
    labels = pd.Series(target.observed, index=list(target.participants))
    if wide.isna().any(axis=None):
        raise InputDatasetError("somebody lacks an atlas that truth.json describes", where=folder, fix="leave -d truth out")
    sets = [wide.xs(atlas, axis=1, level="atlas") for atlas in wide.columns.get_level_values("atlas").unique()]
    scores = [
        float(np.mean([attainable_score(one, labels, list(fold.train), list(fold.test)) for fold in split.folds()]))
        for one in (*sets, wide.set_axis([f"{a} {b}" for a, b in wide.columns], axis=1))
    ]
    return Truth(bayes_optimal=described["bayes"], attainable=round(max(scores), 4))


def _write_report(root: Path, model: Path, result: EvaluationResult, regions: dict[str, RegionTable]) -> Path:
    metrics = result.metrics
    facts = {
        "Target": metrics.target,
        "People tested": str(metrics.people),
        "Model": model.name,
        "Design": metrics.design,
    }
    page = evaluation_page(
        result,
        title=f"Prediction of {metrics.target}",
        subtitle=f"brainfm predict, model {model.name}",
        facts=facts,
        notes=verdict(root),
        extra=read_sections(root, metrics, regions),
    )
    return write_text(root / "report.html", page.render())


def _write_curves(root: Path, model: Path, few: Mapping[int, Metrics], whole: Metrics) -> Path:
    return write_text(root / _FEW_SHOT / "report.html", few_shot_page(few, whole, model=model.name).render())


def _rebuild(root: Path, model: Path, cohort: Cohort) -> int:
    result = EvaluationResult.read(root)
    _write_report(root, model, result, {label: atlas.regions for label, atlas in cohort.atlases.items()})
    few = {int(path.name): EvaluationResult.read(path).metrics for path in (root / _FEW_SHOT).glob("[0-9]*")}
    if few:
        _write_curves(root, model, dict(sorted(few.items())), result.metrics)
    return 0


def _print_plan(model: Path, mode: Mode, target: Target, people: Sequence[str], settings: PredictSettings) -> None:
    console = Console()
    how = {"apply": "applied once to people it has not seen", "refit": f"tuned again in every fold ({settings.design.kind})"}[mode]
    console.print(
        f"predict {model.name}: '{target.name}' of {len(people)} people, {how}; pretraining {settings.pretraining}", highlight=False
    )
    console.print(f"floors: {', '.join(settings.floors.kinds)}{', random encoder' if settings.random_encoder else ''}", highlight=False)
