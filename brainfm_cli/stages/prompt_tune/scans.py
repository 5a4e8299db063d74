"""prompt-tune for mri-language: classes, grades, survival or lesions on the encoder; scored on held-out people beside floors."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from rich.console import Console

from brainfm_cli.bids.derivatives import OutputDataset, write_json, write_text, write_tsv
from brainfm_cli.bids.inputs import choose_participants
from brainfm_cli.bids.slice_cohort import SliceCohort
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.errors import InputNotFoundError, InternalError, SettingsError
from brainfm_cli.learning.checkpoints import copy_backbone, model_files, read_model_config, source_of_model
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.learning.tuned import read_seen
from brainfm_cli.provenance import package_versions
from brainfm_cli.reports.scan_tuning import scores_section, tuning_card
from brainfm_cli.reports.training import training_page
from brainfm_cli.signals.slice_packing import pack_cohort
from brainfm_cli.stages.prompt_tune.scan_lesions import tune_lesions
from brainfm_cli.stages.prompt_tune.scan_settings import Outcome, TuneScansSettings, TuningCall
from brainfm_cli.stages.prompt_tune.scan_studies import tune_studies
from brainfm_cli.systems.mri_language import MriLanguage
from brainfm_cli.systems.mri_language.encoder import CREDITS
from brainfm_cli.systems.mri_language.tuning import encoder_hash

if TYPE_CHECKING:
    from pathlib import Path

    from brainfm_cli.config import Execution, Invocation
    from brainfm_cli.learning.scan_tuning import TuningPeople


def tune_scans(call: Invocation, model: Path, settings: TuneScansSettings) -> int:
    """Pack, tune and write ``models/<id>``; gives back the exit code."""
    _check(settings)
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
        what = {"survival": f"survival by '{settings.follow_up.event}'", "segmentation": "lesion masks"}.get(
            settings.task, f"'{settings.target}'"
        )
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
    slug = "".join(c for c in settings.target or settings.follow_up.event or settings.task if c.isalnum())
    folder = dataset.root / "models" / f"mri-language-{slug}-{dataset.configuration_hash[:8]}"
    arguments = {
        "cohort_dir": cohort.root, "raw": call.datasets.get("raw", call.input_dir), "model": model, "folder": folder, "settings": settings,
        "execution": call.execution, "people": call.selection.participant_label,
        "mask_roots": tuple(where for name, where in call.datasets.items() if name != "raw"),
    }  # fmt: skip
    inputs = (*cohort.files, *model_files(model))
    tuned = run_units(dataset, [Unit(name=f"model-{folder.name}", inputs=inputs, work=write_model, arguments=arguments)], call.execution)
    if tuned == 0:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return tuned or code


def _check(settings: TuneScansSettings) -> None:
    if settings.task in {"classification", "grading"} and settings.target is None:
        raise SettingsError(
            f"{settings.task} needs a column",
            fix="give --target COLUMN, or --set task=segmentation for lesion masks, task=survival for follow_up",
        )
    if settings.task == "survival" and settings.target is not None:
        raise SettingsError("survival is read from two columns, not from --target", fix="set follow_up.time and follow_up.event instead")
    if settings.task == "survival" and (settings.follow_up.time is None or settings.follow_up.event is None):
        raise SettingsError("survival needs two columns", fix="set follow_up.time and follow_up.event")
    if settings.task == "segmentation" and settings.clinical.columns:
        raise SettingsError("clinical variables say nothing of where a lesion is", fix="leave clinical.columns out for task=segmentation")


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
    chosen = tuple(label for label in cohort.labels_of_people if not people or label in people)
    call = TuningCall(
        system=system, cohort=cohort, chosen=chosen, settings=settings, execution=execution, folder=folder, model=model, raw=raw,
        mask_roots=mask_roots,
    )  # fmt: skip
    split, outcome = tune_lesions(call) if settings.task == "segmentation" else tune_studies(call)
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
    card = tuning_card(
        folder.name,
        f"{record.task} of `{record.target}`",
        outcome.scores,
        tune=record.tune,
        trained=record.people,
        tested=tests,
        notes=notes,
    )
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


def _provenance(cohort: SliceCohort, model: Path, split: TuningPeople, settings: TuneScansSettings, outcome: Outcome) -> dict[str, Any]:
    datasets, seen = cohort.dataset_of, read_seen(model)
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
