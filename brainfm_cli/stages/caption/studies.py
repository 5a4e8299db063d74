"""caption for mri-language: the report of a study with what was measured, held against the mask; closed questions, and a conversation."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pydantic import Field
from rich.console import Console

from brainfm_cli.bids.derivatives import OutputDataset, write_json
from brainfm_cli.bids.inputs import choose_participants
from brainfm_cli.bids.names import output_name
from brainfm_cli.bids.scans import study_files
from brainfm_cli.bids.slice_cohort import SliceCohort
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.config import Settings
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError
from brainfm_cli.learning.checkpoints import model_files, read_tensors, source_of_model
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.radiology_reports import check_report, parse_report, write_report
from brainfm_cli.learning.report_tasks import facts_sentence, parts_of, report_question
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.learning.tuned import read_seen
from brainfm_cli.signals.slice_packing import SliceSettings, pack_participant
from brainfm_cli.signals.study_facts import study_facts
from brainfm_cli.systems.mri_language import NOT_CLINICAL
from brainfm_cli.systems.mri_language.encoder import CREDITS
from brainfm_cli.systems.mri_language.report_alignment import RIDGE_FILE, RidgeStudies, closed_dialogue
from brainfm_cli.systems.mri_language.speaking import LoadedTeller, cell_features, context_of_rows, load_teller, read_speaker_record

if TYPE_CHECKING:
    from brainfm_cli.config import Invocation, Selection
    from brainfm_cli.signals.lesions import LesionFacts

_NEAREST = 0.35  # least cosine of a question with one that was taught
_WITHHELD = "I cannot tell from this study."
_ELSEWHERE = "I can only answer questions about this study."


class StudyCaptionSettings(Settings):
    """Settings of ``brainfm caption`` for mri-language models."""

    max_tokens: int = Field(default=160, ge=8)
    """Longest report, in tokens."""
    answer_tokens: int = Field(default=60, ge=4)
    """Longest answer, in tokens."""
    chat: tuple[str, ...] = ()
    """Questions asked of every study, one after another, each knowing the earlier ones (--chat)."""
    abstain: bool = True
    """Whether an answer that the model is less sure of than of 95 % of its answers about validation people is withheld, and one to a question
    that is not about the study refused."""
    llm: str | None = None
    """Where the model's language model now is, if it has moved."""
    reports: Path | None = None
    """group: the true reports; unset takes phenotype/radiology_report.tsv or phenotype/reports.tsv of the dataset."""
    bootstraps: int = Field(default=2000, ge=10)
    """group: resamples of people behind every interval."""
    seed: int = Field(default=0, ge=0)
    """group: seed of resamples and of what is shuffled."""


@dataclass(frozen=True, kw_only=True)
class _Study:
    """One study as the model sees it."""

    prefix: torch.Tensor
    vector: torch.Tensor
    ridge: torch.Tensor
    facts: LesionFacts | None
    sequences: list[str]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class _Beside:
    """What lies beside the model's weights."""

    ridge: RidgeStudies
    taught: torch.Tensor
    seen: dict[str, set[str]]


def caption_studies(call: Invocation, model: Path, settings: StudyCaptionSettings) -> int:
    """Write reports or score them; gives back the exit code."""
    record = read_speaker_record(model)
    people = choose_participants(call.input_dir, call.selection)
    if call.level == "group":
        from brainfm_cli.stages.caption.study_scoring import score_reports

        return score_reports(call, model, settings, people)
    if call.dry_run:
        Console().print(f"caption {model.name}: a report of each of {len(people)} participants through {record.language_model}, {len(settings.chat)} questions", highlight=False)  # fmt: skip
        return 0
    dataset = open_output(call, model, settings)
    roots = tuple(folder for name, folder in call.datasets.items() if name != "raw")
    units = [
        Unit(
            name=f"sub-{label}",
            inputs=(*study_files(call.input_dir, label, call.selection), *model_files(model)),
            work=write_study_report,
            arguments={"raw": call.input_dir, "model": model, "root": dataset.root, "label": label, "selection": call.selection, "settings": settings,
                       "device": call.execution.device, "mask_roots": roots},
        )
        for label in people
    ]  # fmt: skip
    return run_units(dataset, units, call.execution)


def open_output(call: Invocation, model: Path, settings: StudyCaptionSettings) -> OutputDataset:
    """The output of both levels."""
    return OutputDataset.open(
        call.output_dir, command="caption", settings=settings, sources=[call.input_dir, source_of_model(model)], citation=_CITATION
    )


@lru_cache(maxsize=1)
def load(model: Path, device: str, language_model: str | None) -> LoadedTeller:
    """Loaded once per process: a worker writes many reports."""
    return load_teller(model, language_model=language_model, device=choose_device(device))


@lru_cache(maxsize=1)
def _beside(model: Path) -> _Beside:
    """Read once per process: whom it has seen may be tens of thousands of hashes."""
    tensors = read_tensors(model / RIDGE_FILE)
    return _Beside(ridge=RidgeStudies.of_tensors(tensors), taught=tensors["questions"], seen=read_seen(model))


def write_study_report(
    raw: Path, model: Path, root: Path, label: str, selection: Selection, settings: StudyCaptionSettings, device: str, mask_roots: tuple[Path, ...]
) -> UnitResult:  # fmt: skip
    """Write what the model says of one participant."""
    loaded = load(model, device, settings.llm)
    study = _read(loaded, model, raw, label, selection, mask_roots)
    question = report_question(study.facts)
    said = loaded.teller.answer([study.prefix], [[(question, "")]], max_tokens=settings.max_tokens)
    findings, impression = parts_of(said.texts[0])
    contradictions = () if study.facts is None else check_report(f"{findings} {impression}", study.facts)
    key = participant_hash(raw.resolve().name, label)
    values: dict[str, Any] = {
        "participant": label,
        "model": model.name,
        "language_model": loaded.record.language_model,
        "sequences": study.sequences,
        "seen_in": [name for name, hashes in _beside(model).seen.items() if key in hashes],
        "question": question,
        "report": {
            "findings": findings,
            "impression": impression,
            "log_probability": round(float(said.log_probability[0]), 5),
            "contradictions": [one.model_dump() for one in contradictions],
        },
        "facts": None if study.facts is None else asdict(study.facts) | {"longest_mm": study.facts.longest_mm},
        "measured_report": None if study.facts is None else _measured(study.facts),
        "closed": _closed(loaded, study, settings),
        "vector": [round(value, 5) for value in study.vector.tolist()],
        "ridge_vector": [round(value, 5) for value in study.ridge.tolist()],
        "note": NOT_CLINICAL,
    }
    if settings.chat:
        values["chat"] = _chat(loaded, model, study, settings)
    notes = [*study.notes]
    if contradictions:
        notes.append(f"the report of {label} says what the mask does not bear out: " + "; ".join(f"{one.said} (measured: {one.measured})" for one in contradictions))  # fmt: skip
    if "tuned_on" in values["seen_in"]:
        notes.append(f"{label} was among the people the model was aligned on: this is no test of it")
    return UnitResult(outputs=(write_json(report_path(root, label), values),), notes=tuple(notes))


def report_path(root: Path, label: str) -> Path:
    """Where a participant's report is written."""
    return root / f"sub-{label}" / output_name("report", {"sub": label})


def read_report(root: Path, label: str) -> dict[str, Any]:
    """What the participant level wrote.

    Raises
    ------
    InputNotFoundError
        It has not run.
    InputDatasetError
        The file is damaged.
    """
    path = report_path(root, label)
    try:
        values: dict[str, Any] = read_json(path)
        _ = values["report"]["findings"], values["closed"], values["vector"]
    except FileNotFoundError as error:
        raise InputNotFoundError(f"participant {label} has no report yet", where=path, fix="run 'brainfm caption … participant' first") from error  # fmt: skip
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputDatasetError(f"the report is unreadable: {error}", where=path, fix="run the participant level again") from error
    return values


def _read(loaded: LoadedTeller, model: Path, raw: Path, label: str, selection: Selection, mask_roots: tuple[Path, ...]) -> _Study:
    record, dims = loaded.record, loaded.system.settings.dims
    slices = SliceSettings.from_values({"plane": record.plane, "sequences": list(record.sequences), "masks": False})
    with tempfile.TemporaryDirectory(prefix="brainfm-") as folder:
        packed = pack_participant(raw, Path(folder), label, "", selection, slices, record.size, dims, ())
        cohort = SliceCohort.of_participant(Path(folder), label, size=record.size, dims=dims)
        if cohort.slices.empty:
            raise InputDatasetError(f"no slice of sub-{label} holds enough brain", where=raw / f"sub-{label}", fix="check the images")
        features = cell_features(loaded.system.model.encoder, cohort, [label])
        context = context_of_rows(cohort, features.rows[label])
        sequences = sorted(map(str, cohort.slices["sequence"].unique()))
    prefix, vector = loaded.teller.read(features.slices[label], context)
    ridge = _beside(model).ridge.predict(features.slices[label])
    facts = study_facts(raw, label, selection, slices, mask_roots) if record.fit.facts else None
    return _Study(prefix=prefix, vector=vector[0].cpu(), ridge=ridge, facts=facts, sequences=sequences, notes=packed.notes)


def _measured(facts: LesionFacts) -> dict[str, str]:
    """The facts in words, without any model."""
    written = write_report(facts)
    return {"findings": written.findings, "impression": written.impression}


def _closed(loaded: LoadedTeller, study: _Study, settings: StudyCaptionSettings) -> list[dict[str, Any]]:
    (told,) = closed_dialogue(loaded.teller, [study.prefix], [study.facts], max_tokens=settings.answer_tokens)
    return [
        {"question": question, "answer": said, "log_probability": round(score, 5), "withheld": score < loaded.record.abstain_below}
        for question, said, score in told
    ]


def _chat(loaded: LoadedTeller, model: Path, study: _Study, settings: StudyCaptionSettings) -> list[dict[str, Any]]:
    """Each question with its answer; what was withheld or refused is part of the conversation as it was said."""
    turns: list[tuple[str, str]] = []
    told = []
    for question in settings.chat:
        asked = f"{facts_sentence(study.facts)} {question}".strip() if not turns else question
        said = loaded.teller.answer([study.prefix], [[*turns, (asked, "")]], max_tokens=settings.answer_tokens)
        score = float(said.log_probability[0])
        answer, why = said.texts[0], ""
        if settings.abstain and not _about_the_study(loaded, model, question):
            answer, why = _ELSEWHERE, "the question is unlike any that the model was taught"
        elif settings.abstain and score < loaded.record.abstain_below:
            answer, why = _WITHHELD, f"log-probability {score:.2f} is below {loaded.record.abstain_below:.2f}"
        turns.append((asked, answer))
        told.append({"question": question, "answer": answer, "log_probability": round(score, 5), "withheld": bool(why), "why": why, "note": NOT_CLINICAL})  # fmt: skip
    return told


def _about_the_study(loaded: LoadedTeller, model: Path, question: str) -> bool:
    """Whether a question names something of the lexicon, or resembles one that was taught."""
    return bool(parse_report(question)) or float((_beside(model).taught @ loaded.sentences.sentences([question])[0]).max()) >= _NEAREST


_CITATION = f"""# How this was made

Reports by `brainfm caption`. Cite brainfm (CITATION.cff) and, for mri-language models, {CREDITS.prompts}
"""
