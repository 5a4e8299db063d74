"""prompt-tune for mri-language: a class for each study, or its lesions, on the frozen encoder; scored on held-out people beside floors."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field
from rich.console import Console

from brainfm_cli.bids.derivatives import OutputDataset, write_json, write_text, write_tsv
from brainfm_cli.bids.inputs import choose_participants
from brainfm_cli.bids.scans import read_studies
from brainfm_cli.bids.slice_cohort import SliceCohort
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.config import Selection, Settings
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, InternalError, SettingsError
from brainfm_cli.learning.checkpoints import copy_backbone, model_files, read_model_config, source_of_model, write_tensors
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.loop import OptimiserSettings, ScheduleSettings
from brainfm_cli.learning.scan_tuning import NO_SCORES, classification_scores, divide_for_tuning, mean_scores
from brainfm_cli.learning.segmentation import score_masks
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.learning.targets import Target, TargetSettings, target_of_table
from brainfm_cli.learning.tuned import read_seen
from brainfm_cli.provenance import package_versions
from brainfm_cli.reports.scan_tuning import scores_section, tuning_card
from brainfm_cli.reports.training import training_page
from brainfm_cli.signals.segmentations import NativeChances, joined_labels, native_chances, to_labels
from brainfm_cli.signals.slice_packing import SliceSettings, pack_cohort
from brainfm_cli.signals.slices import read_volume
from brainfm_cli.systems.mri_language import MriLanguage
from brainfm_cli.systems.mri_language.augmentation import AugmentSettings
from brainfm_cli.systems.mri_language.classification import HEAD_FILE
from brainfm_cli.systems.mri_language.encoder import CREDITS
from brainfm_cli.systems.mri_language.segmentation import DECODER_FILE, SMALLEST_LESIONS, ScanSegmenter, lesion_chances
from brainfm_cli.systems.mri_language.tuning import (
    ScanTuningRecord,
    encoder_hash,
    fit_classifier,
    fit_mean_mask,
    fit_segmenter,
    random_twin,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from brainfm_cli.bids.slice_cohort import PackedScan
    from brainfm_cli.config import Execution, Invocation
    from brainfm_cli.learning.loop import TrainingResult
    from brainfm_cli.learning.scan_tuning import TuningPeople

_LEAST_PEOPLE = 5
_ONE_CLASS = "lesion"


class TuneScansSettings(Settings):
    """Settings of ``brainfm prompt-tune`` for mri-language models."""

    task: Literal["classification", "segmentation"] = "classification"
    """classification learns a column (--target); segmentation learns the lesion masks of the dataset."""
    target: str | None = None
    """Column of participants.tsv to learn (--target)."""
    coding: TargetSettings = TargetSettings()
    """How the column is read."""
    slices: SliceSettings = SliceSettings()
    """How scans become slices; the size is the model's."""
    test_fraction: float = Field(default=0.3, ge=0, lt=1)
    """Share of people who test, drawn within classes; the study design's 7:3. 0 tests nobody: then nothing is claimed."""
    validation_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of the others who choose the epoch, the temperature and the smallest lesion."""
    transductive: bool = False
    """Let people of the encoder's pretraining test; then said in every table."""
    random_encoder: bool = True
    """Whether the same is fitted on an encoder that was never pretrained, as a floor."""
    augment: AugmentSettings = AugmentSettings()
    """For segmentation: how training slices are varied."""
    tolerance_mm: float = Field(default=2.0, gt=0)
    """For segmentation: tolerance of the surface Dice."""
    schedule: ScheduleSettings = ScheduleSettings(
        epochs=40, batch_size=16, patience=10, optimiser=OptimiserSettings(learning_rate=1e-3, warmup_epochs=1.0)
    )
    """How long and how fast."""
    seed: int = Field(default=0, ge=0)
    """Seed of the split, first weights, order and augmentation."""


@dataclass(frozen=True, kw_only=True)
class _Outcome:
    """What a fit gives to the model folder."""

    record: ScanTuningRecord
    scores: pd.DataFrame
    people_scores: pd.DataFrame
    result: TrainingResult
    files: list[Path]
    notes: tuple[str, ...]


def tune_scans(call: Invocation, model: Path, settings: TuneScansSettings) -> int:
    """Pack, tune and write ``models/<id>``; gives back the exit code."""
    if settings.task == "classification" and settings.target is None:
        raise SettingsError("classification needs a column", fix="give --target COLUMN, or --set task=segmentation for lesion masks")
    packing = read_model_config(model).pretraining.get("slices", {})
    size, dims = int(packing.get("size", 0)), int(packing.get("dims", 2))
    packed = (call.input_dir / "cohort" / "slices.parquet").is_file()
    if packed and settings.task == "segmentation" and "raw" not in call.datasets:
        raise InputNotFoundError(
            "masks are scored on the voxels of the scans, which packed slices lack", where=call.input_dir, fix="give the BIDS dataset as INPUT, or beside it: -d raw=DIR"
        )  # fmt: skip
    if settings.slices.size not in (None, size):
        raise SettingsError(f"the model reads {size} pixels a side, slices.size is {settings.slices.size}", fix="leave slices.size unset")
    if call.dry_run:
        people = SliceCohort.open(call.input_dir).labels_of_people if packed else choose_participants(call.input_dir, call.selection)
        what = f"'{settings.target}'" if settings.task == "classification" else "lesion masks"
        Console().print(
            f"prompt-tune {model.name} for {what} on {len(people)} people, {settings.test_fraction:.0%} of whom test", highlight=False
        )
        return 0
    citation = f"# How this was made\n\nTuned with `brainfm prompt-tune`. Cite brainfm (CITATION.cff) and, for mri-language models, {CREDITS.prompts}\n"
    sources = [call.input_dir, source_of_model(model)]
    dataset = OutputDataset.open(call.output_dir, command="prompt-tune", settings=settings, sources=sources, citation=citation)
    if packed:
        code, cohort = 0, SliceCohort.open(call.input_dir)
    else:
        code, found = pack_cohort(
            dataset, call.input_dir, settings.slices, size=size, dims=dims, selection=call.selection, execution=call.execution,
            mask_roots=tuple(folder for name, folder in call.datasets.items() if name != "raw"),
        )  # fmt: skip
        if found is None:
            return code
        cohort = found
    slug = "".join(c for c in settings.target or settings.task if c.isalnum())
    folder = dataset.root / "models" / f"mri-language-{slug}-{dataset.configuration_hash[:8]}"
    arguments = {
        "cohort_dir": cohort.root, "raw": call.datasets.get("raw", call.input_dir), "model": model, "folder": folder, "settings": settings,
        "execution": call.execution, "people": call.selection.participant_label,
        "mask_roots": tuple(where for name, where in call.datasets.items() if name != "raw"),
    }  # fmt: skip
    inputs = (*cohort.files, *model_files(model))
    tuned = run_units(dataset, [Unit(name=f"model-{folder.name}", inputs=inputs, work=write_model, arguments=arguments)], call.execution)
    if tuned == 0:
        for name in ("checkpoints", "checkpoints-random"):
            shutil.rmtree(folder / name, ignore_errors=True)
    return tuned or code


def write_model(
    cohort_dir: Path,
    raw: Path,
    model: Path,
    folder: Path,
    settings: TuneScansSettings,
    execution: Execution,
    people: tuple[str, ...],
    mask_roots: tuple[Path, ...],
) -> UnitResult | None:
    """Tune on training people, score the test people, and write a model folder that needs no other; none on ranks but the first."""
    cohort, system = SliceCohort.open(cohort_dir), MriLanguage.load(model)
    system.model.to(choose_device(execution.device))
    before = encoder_hash(system.model.encoder)
    chosen = [label for label in cohort.labels_of_people if not people or label in people]
    tune = _tune_classes if settings.task == "classification" else _tune_lesions
    split, outcome = tune(system, cohort, chosen, settings, execution, folder, model, raw, mask_roots)
    if encoder_hash(system.model.encoder) != before:
        raise InternalError("the frozen encoder has changed during tuning", where=model, fix="this is a bug in brainfm; please report it")
    if not outcome.result.is_first_rank:
        return None
    config = read_model_config(model).model_copy(update={"tuning": outcome.record.model_dump(mode="json")})
    notes = outcome.notes + (
        (f"{split.seen_in_test} of the test people were in the encoder's pretraining (transductive)",) if split.seen_in_test else ()
    )
    record, tests = outcome.record, len(split.role("test"))
    facts = {"Training people": str(record.people), "Test people": str(tests), "Steps": str(outcome.result.position.step)}
    subtitle = f"brainfm prompt-tune, mri-language, {record.task} of '{record.target}'"
    page = training_page(
        outcome.result.log, title=f"Tuning of {folder.name}", subtitle=subtitle, facts=facts, notes=notes,
        sections=(scores_section(outcome.scores),), methods=CREDITS.methods, citations=(CREDITS.citation,),
    )  # fmt: skip
    card = tuning_card(folder.name, f"{record.task} of `{record.target}`", outcome.scores, trained=record.people, tested=tests, notes=notes)
    outputs = [
        *copy_backbone(model, folder),
        *outcome.files,
        write_text(folder / "config.yaml", config.to_yaml()),
        write_tsv(folder / "split.tsv", split.table.replace({"stratum": {"": "n/a"}})),
        write_tsv(folder / "predictions.tsv", outcome.people_scores),
        write_json(folder / "evaluation.json", outcome.scores.astype(object).where(outcome.scores.notna(), None).to_dict("records")),
        write_text(folder / "log.csv", outcome.result.log.to_csv()),
        write_text(folder / "README.md", card),
        write_text(folder / "report.html", page.render()),
        write_json(folder / "provenance.json", _provenance(cohort, model, split, settings, outcome)),
    ]
    return UnitResult(outputs=tuple(outputs), seed=settings.seed, notes=notes)


def _split(cohort: SliceCohort, strata: dict[str, str], settings: TuneScansSettings, model: Path) -> TuningPeople:
    if len(strata) < _LEAST_PEOPLE and settings.test_fraction:
        raise InputDatasetError(
            f"{len(strata)} people can take part: {_LEAST_PEOPLE} are needed",
            where=cohort.root,
            fix="give more people with labels or masks",
        )
    return divide_for_tuning(
        strata, _datasets(cohort), read_seen(model)["pretrained_on"], test=settings.test_fraction,
        validation=settings.validation_fraction, seed=settings.seed, transductive=settings.transductive,
    )  # fmt: skip


def _datasets(cohort: SliceCohort) -> dict[str, str]:
    first = cohort.slices.drop_duplicates("participant")
    return {str(label): str(name) for label, name in zip(first["participant"], first["dataset"], strict=True)}


def _tune_classes(
    system: MriLanguage, cohort: SliceCohort, chosen: Sequence[str], settings: TuneScansSettings, execution: Execution, folder: Path, model: Path,
    raw: Path, mask_roots: tuple[Path, ...],  # noqa: ARG001  (the same call for both tasks)
) -> tuple[TuningPeople, _Outcome]:  # fmt: skip
    assert settings.target is not None  # noqa: S101  (checked before anything was written)
    target = target_of_table(
        cohort.participants, settings.target, settings.coding, participants=chosen, place=str(cohort.root / "participants.tsv")
    )
    if target.kind == "continuous":
        raise SettingsError(
            f"'{target.name}' is continuous: classification needs classes", fix="set coding.type=categorical, or choose another --target"
        )
    labels = {label: int(value) for label, value in zip(target.participants, target.observed, strict=True)}
    split = _split(cohort, {label: target.classes[number] for label, number in labels.items()}, settings, model)
    plan, shared = (
        settings.schedule.plan(settings.seed),
        {"classes": len(target.classes), "batch_size": settings.schedule.batch_size, "execution": execution},
    )
    fitted = fit_classifier(system.model.encoder, cohort, labels, split, plan, folder=folder / "checkpoints", **shared)  # type: ignore[arg-type]
    test = split.role("test")
    counts = np.bincount([labels[label] for label in split.role("train")], minlength=len(target.classes))
    predicted = {"model": fitted.chances(test), "majority": np.tile(counts / counts.sum(), (len(test), 1))}
    if settings.random_encoder:
        twin = random_twin(system, seed=settings.seed)
        twin.model.to(choose_device(execution.device))
        other = fit_classifier(twin.model.encoder, cohort, labels, split, plan, folder=folder / "checkpoints-random", **shared)  # type: ignore[arg-type]
        predicted["no pretraining, same head"] = other.chances(test)
    observed = np.array([labels[label] for label in test])
    scores = (
        NO_SCORES
        if not test
        else classification_scores(observed, predicted, classes=len(target.classes), seed=settings.seed, ordered=target.ordered)
    )
    record = _record(
        system, cohort, settings, split, target=target.name, classes=target.classes, ordered=target.ordered, temperature=fitted.temperature
    )
    rows = [
        {"participant_id": f"sub-{label}", "predictor": name, "observed": target.classes[truth], **{f"p_{c}": round(float(p), 6) for c, p in zip(target.classes, one, strict=True)}}
        for name, chances in predicted.items()
        for label, truth, one in zip(test, observed, chances, strict=True)
    ]  # fmt: skip
    files = [write_tensors(folder / HEAD_FILE, fitted.head.state_dict())]
    return split, _Outcome(
        record=record, scores=scores, people_scores=pd.DataFrame(rows), result=fitted.result, files=files, notes=_notes(target)
    )


def _notes(target: Target) -> tuple[str, ...]:
    return (*target.notes, *(f"{count} people left out: {reason}" for reason, count in target.dropped.items()))


def _record(system: MriLanguage, cohort: SliceCohort, settings: TuneScansSettings, split: TuningPeople, **fields: Any) -> ScanTuningRecord:  # noqa: ANN401
    return ScanTuningRecord(
        task=settings.task, size=cohort.size, plane=settings.slices.plane, sequences=settings.slices.sequences,
        people=len(split.role("train")), encoder_sha256=encoder_hash(system.model.encoder), **fields,
    )  # fmt: skip


def _tune_lesions(
    system: MriLanguage, cohort: SliceCohort, chosen: Sequence[str], settings: TuneScansSettings, execution: Execution, folder: Path, model: Path,
    raw: Path, mask_roots: tuple[Path, ...],
) -> tuple[TuningPeople, _Outcome]:  # fmt: skip
    lesions = cohort.slices.groupby("participant", observed=True)["lesion"].max()
    masked = {
        str(label): "with lesion" if most > 0 else "free" for label, most in lesions.items() if most >= 0 and str(label) in set(chosen)
    }
    if not cohort.labels or "with lesion" not in masked.values():
        raise InputDatasetError(
            "no scan has a lesion mask with voxels", where=cohort.root, fix="put masks under derivatives/ or give their dataset with -d"
        )
    split = _split(cohort, masked, settings, model)
    values = tuple(cohort.labels)
    plan = settings.schedule.plan(settings.seed)
    shared: dict[str, Any] = {
        "values": values,
        "augment": settings.augment,
        "batch_size": settings.schedule.batch_size,
        "execution": execution,
    }
    segmenter, result = fit_segmenter(system.model.encoder, cohort, split, plan, folder=folder / "checkpoints", **shared)
    truth = _Truth(raw=raw, mask_roots=mask_roots, settings=settings)
    smallest = _smallest_lesion(segmenter, cohort, split.role("validation"), truth)
    fits: dict[str, tuple[Callable[[str, PackedScan], NDArray[np.float32]], int]] = {"model": (_of(segmenter, cohort), smallest)}
    mean = fit_mean_mask(cohort, split.role("train"), values)
    fits["mean mask"] = (_of_mean(mean, cohort, len(values) + 1), 0)
    if settings.random_encoder:
        twin, _ = fit_segmenter(
            random_twin(system, seed=settings.seed).model.encoder, cohort, split, plan, folder=folder / "checkpoints-random", **shared
        )
        fits["no pretraining, same decoder"] = (_of(twin, cohort), _smallest_lesion(twin, cohort, split.role("validation"), truth))
    rows = [
        {"participant_id": f"sub-{label}", "predictor": name, **row}
        for name, (chances, least) in fits.items()
        for label in split.role("test")
        for row in _score_person(cohort, label, chances, values, least, truth)
    ]
    people = pd.DataFrame(rows)
    collected: dict[str, list[float | None]] = {}
    for name in fits if len(people) else ():
        for score in ("dice", "hd95", "nsd", "lesion_f1", "volume error (mL)"):
            mine = people.loc[people["predictor"] == name].groupby("participant_id")[score].mean()
            collected[f"{name}|{score}"] = [None if np.isnan(value) else float(value) for value in mine]
    record = _record(system, cohort, settings, split, target=_ONE_CLASS, labels=cohort.labels, smallest_lesion=smallest)
    files = [write_tensors(folder / DECODER_FILE, segmenter.decoder_tensors())]
    notes = (
        "lesions of every label count together; a person without lesion and without prediction has no Dice and is left out of its mean",
    )
    return split, _Outcome(
        record=record,
        scores=mean_scores(collected, seed=settings.seed) if len(people) else NO_SCORES,
        people_scores=people,
        result=result,
        files=files,
        notes=notes,
    )


@dataclass(frozen=True, kw_only=True)
class _Truth:
    """Where the true labels are read."""

    raw: Path
    mask_roots: tuple[Path, ...]
    settings: TuneScansSettings

    def labels(self, label: str, grid: NativeChances) -> NDArray[np.uint8] | None:
        """(x, y, z) RAS labels on the grid of a scan; none where its study has no mask."""
        slices = self.settings.slices
        studies = read_studies(self.raw, label, Selection(), sequences=slices.sequences, space=slices.space, mask_roots=self.mask_roots)
        for study in studies:
            for scan in study.scans:
                if scan.name == grid.reference.name:
                    return joined_labels(study.masks, read_volume(scan.path, gradients=scan.gradients))[0]
        raise InputNotFoundError(
            f"the scan {grid.reference.name} is no longer there", where=self.raw, fix="give the dataset that was packed"
        )


def _of(segmenter: ScanSegmenter, cohort: SliceCohort) -> Callable[[str, PackedScan], NDArray[np.float32]]:
    return lambda label, scan: lesion_chances(segmenter, cohort, label, scan.name)


def _of_mean(mean: Any, cohort: SliceCohort, classes: int) -> Callable[[str, PackedScan], NDArray[np.float32]]:  # noqa: ANN401
    def chances(label: str, scan: PackedScan) -> NDArray[np.float32]:
        table = cohort.slices
        rows = np.flatnonzero(((table["participant"] == label) & (table["scan"] == scan.name)).to_numpy())
        count = 1 if cohort.dims == 3 else int(scan.grid["shape"][{"sagittal": 0, "coronal": 1, "axial": 2}[scan.grid["plane"]]])
        out = np.zeros((classes, count, *cohort.item_shape), np.float32)
        out[0] = 1
        out[:, table["slice"].to_numpy()[rows]] = mean.chances(
            scan.grid["plane"], table["z_mm"].to_numpy()[rows], classes, cohort.item_shape
        )
        return out

    return chances


def _score_person(
    cohort: SliceCohort, label: str, chances: Callable[[str, PackedScan], NDArray[np.float32]], values: Sequence[int], smallest: int, truth: _Truth
) -> list[dict[str, Any]]:  # fmt: skip
    rows = []
    for grid in native_chances([scan for scan in cohort.scans(label) if scan.mask is not None], lambda scan: chances(label, scan)):
        observed = truth.labels(label, grid)
        if observed is None:
            continue
        predicted = to_labels(grid.chances, values, smallest=smallest)
        found = score_masks(predicted > 0, observed > 0, voxel_mm=grid.voxel_mm, tolerance_mm=truth.settings.tolerance_mm)
        row: dict[str, Any] = {"grid": grid.reference.name, **{name: one.value for name, one in found.items()}}
        row["volume error (mL)"] = abs(grid.millilitres(predicted) - grid.millilitres(observed))
        rows.append(row | {"predicted (mL)": grid.millilitres(predicted), "observed (mL)": grid.millilitres(observed)})
    return rows


def _smallest_lesion(segmenter: ScanSegmenter, cohort: SliceCohort, people: Sequence[str], truth: _Truth) -> int:
    dice: dict[int, list[float]] = {size: [] for size in SMALLEST_LESIONS}
    for label in people:
        scans = [scan for scan in cohort.scans(label) if scan.mask is not None]
        for grid in native_chances(scans, partial(_of(segmenter, cohort), label)):
            observed = truth.labels(label, grid)
            if observed is None:
                continue
            for size in SMALLEST_LESIONS:
                predicted = to_labels(grid.chances, segmenter.values, smallest=size) > 0
                both = int(predicted.sum()) + int((observed > 0).sum())
                dice[size].append(2 * int((predicted & (observed > 0)).sum()) / both if both else 1.0)
    return max(SMALLEST_LESIONS, key=lambda size: (float(np.mean(dice[size])) if dice[size] else 0.0, -size))


def _provenance(cohort: SliceCohort, model: Path, split: TuningPeople, settings: TuneScansSettings, outcome: _Outcome) -> dict[str, Any]:
    datasets, seen = _datasets(cohort), read_seen(model)
    tuned = [participant_hash(datasets[label], label) for role in ("train", "validation") for label in split.role(role)]
    return {
        "pretrained_on": sorted(seen["pretrained_on"]),
        "validated_on": [],
        "tuned_on": sorted(tuned),
        "tested_on": sorted(participant_hash(datasets[label], label) for label in split.role("test")),
        "backbone": model.name,
        "seed": settings.seed,
        "steps": outcome.result.position.step,
        "best_epoch": outcome.result.position.best_epoch,
        "versions": package_versions(),
    }
