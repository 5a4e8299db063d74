"""align for mri-language: studies and their reports are contrasted, and a bridge into a frozen language model learns to write and to answer."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from pydantic import Field
from rich.console import Console

from brainfm_cli.bids.derivatives import OutputDataset, write_json, write_text, write_tsv
from brainfm_cli.bids.inputs import choose_participants, list_participants
from brainfm_cli.bids.reports import StudyReport, find_reports, read_conversations, read_reports
from brainfm_cli.bids.slice_cohort import SliceCohort
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.config import Selection, Settings
from brainfm_cli.errors import InputDatasetError, InputNotFoundError, InternalError, SettingsError, UnsupportedStageError
from brainfm_cli.learning.checkpoints import copy_backbone, model_files, read_model_config, source_of_model, write_tensors
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.loop import OptimiserSettings, ScheduleSettings, train
from brainfm_cli.learning.radiology_reports import known_diseases, language_of
from brainfm_cli.learning.report_tasks import language_written_in, main_finding, restated
from brainfm_cli.learning.scan_tuning import TuningPeople, divide_for_tuning
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.learning.tuned import read_seen
from brainfm_cli.models.causal_language import DEFAULT_LANGUAGE_MODEL
from brainfm_cli.models.language import DEFAULT_ENCODER
from brainfm_cli.provenance import package_versions
from brainfm_cli.reports.scan_tuning import scores_section
from brainfm_cli.reports.training import training_page
from brainfm_cli.signals.slice_packing import SliceSettings, pack_cohort
from brainfm_cli.signals.study_facts import study_facts
from brainfm_cli.systems.mri_language import MriLanguage
from brainfm_cli.systems.mri_language.encoder import CREDITS
from brainfm_cli.systems.mri_language.report_alignment import (
    MODEL,
    RIDGE,
    RIDGE_FILE,
    abstain_threshold,
    alignment_scores,
    closed_dialogue,
    fit_ridge,
    question_vectors,
    report_vectors,
    tell_studies,
)
from brainfm_cli.systems.mri_language.speaking import (
    SPEAKER_FILE,
    SpeakerRecord,
    SpeakFitSettings,
    StudyTeller,
    cell_features,
    check_languages,
    context_of_rows,
    load_language,
    load_sentences,
    new_speaker,
)
from brainfm_cli.systems.mri_language.tuning import encoder_hash

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from brainfm_cli.bids.reports import Conversation
    from brainfm_cli.config import Execution, Invocation
    from brainfm_cli.learning.loop import TrainingResult
    from brainfm_cli.models.language import TextEncoder
    from brainfm_cli.signals.lesions import LesionFacts
    from brainfm_cli.systems.mri_language.classification import StudyFeatures
    from brainfm_cli.systems.mri_language.told_studies import ToldStudies

_LEAST_PEOPLE = 5


class AlignReportSettings(Settings):
    """Settings of ``brainfm align`` for mri-language models."""

    llm: str = DEFAULT_LANGUAGE_MODEL
    """Frozen language model: a name of 'brainfm assets list', or the folder (or .gguf file) of any causal model with a chat template."""
    text_encoder: str = DEFAULT_ENCODER
    """Sentence encoder: a name of 'brainfm assets list', a folder, or a hub name."""
    reports: Path | None = None
    """Reports: a TSV (participant_id, findings, impression, language) or a JSON of cases; unset takes phenotype/radiology_report.tsv or
    phenotype/reports.tsv of the dataset."""
    instructions: Path | None = None
    """Further instructions with answers, JSON lines: {"participant_id", "task", "turns": [[question, answer], …]}."""
    written_in: Literal["as is", "en"] = "as is"
    """Language that is learnt: as is, or English restatements of what the parser finds, for reports in a language that the model lacks."""
    slices: SliceSettings = SliceSettings()
    """How scans become slices; the size is the model's."""
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    """Share of people who test, drawn within diseases; the study design's 8:2."""
    validation_fraction: float = Field(default=0.15, gt=0, lt=1)
    """Share of the others who choose the epoch."""
    exclude: tuple[str, ...] = ()
    """Diseases (names of the lexicon) that must not be learnt from: whose main finding is one of them tests, which shows what is told of a
    disease that no training report names."""
    transductive: bool = False
    """Let people of the encoder's pretraining test; then said in every table."""
    fit: SpeakFitSettings = SpeakFitSettings()
    """What is aligned with what; fit.contrast=false is the ablation."""
    schedule: ScheduleSettings = ScheduleSettings(epochs=60, batch_size=32, patience=10, optimiser=OptimiserSettings(learning_rate=1e-3, warmup_epochs=1.0))  # fmt: skip
    """How long and how fast."""
    seed: int = Field(default=0, ge=0)
    """Seed of the split, first weights, order and draws."""


def align_reports(call: Invocation, model: Path, settings: AlignReportSettings) -> int:
    """Pack, align and write ``models/<id>``; gives back the exit code."""
    config = read_model_config(model)
    if config.tuning or config.alignment:
        raise UnsupportedStageError("the model was tuned or aligned already", where=model, fix="give the model of 'brainfm pretrain'")
    packing = config.pretraining.get("slices", {})
    size, dims = int(packing.get("size", 0)), int(packing.get("dims", 2))
    if settings.slices.size not in (None, size):
        raise SettingsError(f"the model reads {size} pixels a side, slices.size is {settings.slices.size}", fix="leave slices.size unset")
    packed = (call.input_dir / "cohort" / "slices.parquet").is_file()
    raw = call.datasets.get("raw", None if packed else call.input_dir)
    if raw is None:
        raise InputNotFoundError("reports and masks lie beside the scans, which packed slices lack", where=call.input_dir, fix="give the BIDS dataset as INPUT, or beside it: -d raw=DIR")  # fmt: skip
    path = find_reports(raw, settings.reports)
    read_reports(path, list_participants(raw))  # what is wrong with it is said before anything is packed
    if call.dry_run:
        people = SliceCohort.open(call.input_dir).labels_of_people if packed else choose_participants(call.input_dir, call.selection)
        Console().print(f"align {model.name} with reports of {path.name} through {settings.llm}: {len(people)} people, {settings.test_fraction:.0%} of whom test", highlight=False)  # fmt: skip
        return 0
    dataset = OutputDataset.open(
        call.output_dir, command="align", settings=settings, sources=[call.input_dir, source_of_model(model)], citation=_CITATION
    )
    roots = tuple(folder for name, folder in call.datasets.items() if name != "raw")
    if packed:
        code, cohort = 0, SliceCohort.open(call.input_dir)
    else:
        code, found = pack_cohort(
            dataset, call.input_dir, settings.slices, size=size, dims=dims, selection=call.selection, execution=call.execution, mask_roots=roots
        )  # fmt: skip
        if found is None:
            return code
        cohort = found
    folder = dataset.root / "models" / f"mri-language-reports-{dataset.configuration_hash[:8]}"
    arguments = {
        "cohort_dir": cohort.root, "raw": raw, "model": model, "folder": folder, "settings": settings, "reports": path,
        "execution": call.execution, "people": call.selection.participant_label, "selection": call.selection, "mask_roots": roots,
    }  # fmt: skip
    given = [path, *([settings.instructions] if settings.instructions is not None else [])]
    unit = Unit(name=f"model-{folder.name}", inputs=(*cohort.files, *model_files(model), *given), work=write_model, arguments=arguments)
    aligned = run_units(dataset, [unit], call.execution)
    if aligned == 0:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return aligned or code


def write_model(
    cohort_dir: Path,
    raw: Path,
    model: Path,
    folder: Path,
    settings: AlignReportSettings,
    reports: Path,
    execution: Execution,
    people: tuple[str, ...],
    selection: Selection,
    mask_roots: tuple[Path, ...],
) -> UnitResult | None:
    """Align on training people, score the test people, and write a model folder that needs no other but the language model."""
    cohort, system, device = SliceCohort.open(cohort_dir), MriLanguage.load(model), choose_device(execution.device)
    system.model.to(device)
    before = encoder_hash(system.model.encoder)
    language, sentences = load_language(settings.llm), load_sentences(settings.text_encoder)
    language_before = language.fingerprint()
    everybody = list_participants(raw)
    told, written_in, notes = _told(cohort, everybody, reports, people, settings)
    if settings.written_in == "as is":
        check_languages(_by_language(told), sentences if settings.fit.contrast_with == "sentences" else None, language)
    split = _split(told, cohort, model, settings)
    facts = _facts(tuple(told), raw, selection, settings, mask_roots) if settings.fit.facts else {}
    instructions = _instructions(settings, everybody, told)
    targets = report_vectors(told, sentences, settings.fit)
    features = cell_features(system.model.encoder, cohort, tuple(told))
    source = tell_studies(
        features, cohort, told, facts, instructions, targets, settings.fit,
        people=split.role("train"), validation_people=split.role("validation"), batch_size=settings.schedule.batch_size, seed=settings.seed,
    )  # fmt: skip
    if len(source.people) < 2:
        raise InputDatasetError("nobody trains: no instruction is about training people", where=settings.instructions or reports, fix="give more instructions, or fit.built_in=true")  # fmt: skip
    width = next(iter(features.slices.values())).shape[1]
    speaker = new_speaker(system, settings.fit, language, features=width, contrast_width=len(next(iter(targets.values()))), seed=settings.seed)  # fmt: skip
    seen = torch.cat([features.slices[label] for label in source.people])
    speaker.reader.set_scale(seen.mean(dim=0), seen.std(dim=0))
    teller = StudyTeller(fit=settings.fit, speaker=speaker, language=language.to(device))
    result = train(teller, source, settings.schedule.plan(settings.seed), execution, folder / "checkpoints")
    speaker.load_state_dict(result.weights)
    speaker.cpu().eval()
    teller.language.to(torch.device("cpu"))
    for what, found, known in (("encoder", encoder_hash(system.model.encoder), before), ("language model", language.fingerprint(), language_before)):  # fmt: skip
        if found != known:
            raise InternalError(f"the frozen {what} has changed", where=folder, fix="this is a bug in brainfm; please report it")
    if not result.is_first_rank:
        return None
    ridge = fit_ridge(features.slices, targets, source.people)
    scores = _scores(teller, ridge, source, features, cohort, told, written_in, targets, sentences, split, settings)
    record = SpeakerRecord(
        language_model=settings.llm,
        language_sha256=language_before,
        language_width=language.width,
        text_encoder=settings.text_encoder,
        text_encoder_sha256=sentences.fingerprint(),
        contrast_width=len(next(iter(targets.values()))),
        encoder_sha256=before,
        size=cohort.size,
        plane=settings.slices.plane,
        sequences=settings.slices.sequences,
        diseases=tuple(sorted({finding.disease for label in source.people if (finding := main_finding(told[label].text))})),
        restated=settings.written_in == "en",
        written_in=", ".join(sorted(_by_language(told))),
        people=len(source.people),
        abstain_below=_threshold(teller, source, facts),
        fit=settings.fit,
    )
    notes = (*notes, *((f"{split.seen_in_test} of the test people were in the encoder's pretraining (transductive)",) if split.seen_in_test else ()))  # fmt: skip
    outputs = [
        *copy_backbone(model, folder),
        write_tensors(folder / SPEAKER_FILE, result.weights),
        write_tensors(folder / RIDGE_FILE, {**ridge.tensors(), "questions": question_vectors(source, sentences)}),
        write_text(
            folder / "config.yaml", read_model_config(model).model_copy(update={"alignment": record.model_dump(mode="json")}).to_yaml()
        ),
        write_tsv(folder / "split.tsv", split.table.replace({"stratum": {"": "n/a"}})),
        write_json(folder / "evaluation.json", scores.astype(object).where(scores.notna(), None).to_dict("records")),
        write_text(folder / "log.csv", result.log.to_csv()),
        write_text(folder / "README.md", _card(folder.name, record, split, notes)),
        write_text(folder / "report.html", _page(folder.name, record, split, scores, result, notes)),
        write_json(folder / "provenance.json", _provenance(cohort, model, split, settings, result)),
    ]
    result.barrier()
    return UnitResult(outputs=tuple(outputs), seed=settings.seed, notes=notes)


def _told(
    cohort: SliceCohort, known: Collection[str], path: Path, people: tuple[str, ...], settings: AlignReportSettings
) -> tuple[dict[str, StudyReport], dict[str, str], tuple[str, ...]]:
    """Reports of people with slices, the languages that they were written in, and what to say of the others."""
    everything = read_reports(path, known)
    chosen = [label for label in cohort.labels_of_people if not people or label in people]
    told = {label: everything[label] for label in chosen if label in everything}
    if len(told) < _LEAST_PEOPLE:
        raise InputDatasetError(f"{len(told)} people have slices and a report: {_LEAST_PEOPLE} are needed", where=path, fix="give more reports or scans")  # fmt: skip
    written_in = {label: language_written_in(report) for label, report in told.items()}
    if settings.written_in == "en":
        told = {label: restated(report) for label, report in told.items()}
    mixed = sum(language_of(report.text) == "mixed" for report in told.values())
    without = len(chosen) - len(told)
    notes = (
        *((f"{without} people with scans have no report and took no part",) if without else ()),
        *((f"{mixed} reports mix languages; each sentence is read by its own words",) if mixed else ()),
    )
    return told, written_in, notes


def _by_language(told: Mapping[str, StudyReport]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for report in told.values():
        found.setdefault(language_written_in(report), []).append(report.text)
    return found


def _split(told: Mapping[str, StudyReport], cohort: SliceCohort, model: Path, settings: AlignReportSettings) -> TuningPeople:
    """Who trains, chooses and tests; everybody with an excluded disease tests besides.

    Raises
    ------
    SettingsError
        An excluded disease is not in the lexicon.
    """
    unknown = set(settings.exclude) - set(known_diseases())
    if unknown:
        raise SettingsError(f"'{min(unknown)}' is no disease of the lexicon", fix=f"exclude some of: {', '.join(known_diseases())}")
    strata = {label: finding.disease if (finding := main_finding(report.text)) else "none" for label, report in told.items()}
    held = {label: disease for label, disease in strata.items() if disease in settings.exclude}
    datasets, seen = cohort.dataset_of, read_seen(model)["pretrained_on"]
    people = divide_for_tuning(
        {label: disease for label, disease in strata.items() if label not in held}, datasets, seen,
        test=settings.test_fraction, validation=settings.validation_fraction, seed=settings.seed, transductive=settings.transductive,
    )  # fmt: skip
    known = {label for label in held if participant_hash(datasets[label], label) in seen}
    testing = sorted(label for label in held if settings.transductive or label not in known)
    rows = pd.DataFrame([(label, held[label], "test") for label in testing], columns=people.table.columns)
    further = len(known) if settings.transductive else 0
    return TuningPeople(table=pd.concat([people.table, rows], ignore_index=True), seen_in_test=people.seen_in_test + further)


def _facts(
    people: tuple[str, ...], raw: Path, selection: Selection, settings: AlignReportSettings, roots: tuple[Path, ...]
) -> dict[str, LesionFacts]:
    found = {label: study_facts(raw, label, selection, settings.slices, roots) for label in people}
    return {label: facts for label, facts in found.items() if facts is not None}


def _instructions(settings: AlignReportSettings, known: Collection[str], told: Mapping[str, StudyReport]) -> tuple[Conversation, ...]:
    if settings.instructions is None:
        return ()
    if not settings.instructions.is_file():
        raise InputNotFoundError("there is no file of instructions", where=settings.instructions, fix="give a JSON lines file")
    return tuple(one for one in read_conversations(settings.instructions, known) if one.participant in told)


def _scores(
    teller: StudyTeller, ridge: Any, source: ToldStudies, features: StudyFeatures, cohort: SliceCohort, told: Mapping[str, StudyReport],  # noqa: ANN401
    written_in: Mapping[str, str], targets: Mapping[str, torch.Tensor], sentences: TextEncoder, split: TuningPeople, settings: AlignReportSettings,
) -> pd.DataFrame:  # fmt: skip
    test = split.role("test")
    vectors = {RIDGE: {label: ridge.predict(features.slices[label]) for label in test}}
    if settings.fit.contrast:
        own = {label: teller.read(features.slices[label], context_of_rows(cohort, features.rows[label]))[1][0] for label in test}
        vectors = {MODEL: own, **vectors}
    return alignment_scores(vectors, told, targets, sentences, test=test, train=source.people, seed=settings.seed, written_in=written_in)


def _threshold(teller: StudyTeller, source: ToldStudies, facts: Mapping[str, LesionFacts]) -> float:
    people = source.validation_people
    prefixes = [teller.read(source.slices[label], source.contexts[label])[0] for label in people]
    return abstain_threshold(closed_dialogue(teller, prefixes, [facts.get(label) for label in people]))


def _provenance(
    cohort: SliceCohort, model: Path, split: TuningPeople, settings: AlignReportSettings, result: TrainingResult
) -> dict[str, Any]:
    datasets, seen = cohort.dataset_of, read_seen(model)

    def hashes(*roles: str) -> list[str]:
        return sorted(participant_hash(datasets[label], label) for role in roles for label in split.role(role))

    return {
        "pretrained_on": sorted(seen["pretrained_on"]),
        "validated_on": [],
        "tuned_on": hashes("train", "validation"),
        "aligned_on": hashes("train", "validation"),
        "tested_on": hashes("test"),
        "backbone": model.name,
        "seed": settings.seed,
        "steps": result.position.step,
        "best_epoch": result.position.best_epoch,
        "versions": package_versions(),
    }


def _card(name: str, record: SpeakerRecord, split: TuningPeople, notes: tuple[str, ...]) -> str:
    return (
        f"# {name}\n\nA frozen `mri-language` encoder in front of the frozen language model {record.language_model}: what lies between was aligned with "
        f"reports of {record.people} people by `brainfm align`.\n\n"
        f"* Diseases of training reports: {', '.join(record.diseases)}\n* Reports written in: {record.written_in}\n* Test people: {len(split.role('test'))} (evaluation.json)\n"
        + "".join(f"* {note}\n" for note in notes)
        + "\nUse: `brainfm caption DATASET OUTPUT participant --model THIS_FOLDER` writes reports and answers (`--chat`), `group` scores them beside floors.\n"
        "No report is kept in this folder. The language model is not in it. The model is no medical device and not for clinical use.\n"
    )


def _page(
    name: str, record: SpeakerRecord, split: TuningPeople, scores: pd.DataFrame, result: TrainingResult, notes: tuple[str, ...]
) -> str:
    facts = {"Training people": str(record.people), "Test people": str(len(split.role("test"))), "Steps": str(result.position.step), "Language model": record.language_model}  # fmt: skip
    return training_page(
        result.log, title=f"Alignment of {name}", subtitle="brainfm align, mri-language, reports", facts=facts, notes=notes,
        sections=(scores_section(scores),), methods=CREDITS.methods, citations=(CREDITS.citation,),
    ).render()  # fmt: skip


_CITATION = f"""# How this was made

Aligned with `brainfm align`. Cite brainfm (CITATION.cff) and, for mri-language models, {CREDITS.prompts}
The bridge follows BLIP-2 (Li et al., ICML 2023), instruction tuning LLaVA (Liu et al., NeurIPS 2023).
"""
