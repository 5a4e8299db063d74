"""caption group for mri-language: reports and answers of people who took no part, scored beside floors that know less."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from rich.console import Console

from brainfm_cli.bids.derivatives import write_json, write_text, write_tsv
from brainfm_cli.bids.inputs import list_participants
from brainfm_cli.bids.reports import StudyReport, find_reports, read_reports
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.checkpoints import model_files, read_provenance
from brainfm_cli.learning.radiology_reports import write_report
from brainfm_cli.learning.report_scores import report_scores
from brainfm_cli.learning.report_tasks import CLOSED, closed_answer, closed_truth, language_written_in, main_finding, parts_of, restated
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.learning.text_scores import TextScore, mean_of
from brainfm_cli.reports.study_reports import study_reports_page
from brainfm_cli.signals.lesions import LesionFacts
from brainfm_cli.stages.caption.studies import StudyCaptionSettings, load, open_output, read_report, report_path
from brainfm_cli.stages.caption.tables import Predictor, resample_pictures, score_predictors, score_texts, show_examples
from brainfm_cli.systems.mri_language.encoder import CREDITS
from brainfm_cli.systems.mri_language.report_alignment import closed_dialogue, report_vectors

if TYPE_CHECKING:
    from brainfm_cli.config import Invocation
    from brainfm_cli.systems.mri_language.speaking import LoadedTeller

_EVERYBODY = "everybody"
_MODEL, _NO_IMAGE, _FACTS = "mri-language", "the model without images", "measured facts, commonest disease"
_CONSTANT, _SHUFFLED, _RIDGE, _NEAREST = "most central training report", "reports of others", "ridge to nearest training report", "nearest training report by the model's vector"  # fmt: skip
_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class _Scored:
    """Everything that the scores are made of."""

    loaded: LoadedTeller
    said: dict[str, dict[str, Any]]
    true: dict[str, StudyReport]
    training: dict[str, StudyReport]
    written_in: dict[str, str]
    settings: StudyCaptionSettings

    @property
    def people(self) -> list[str]:
        return list(self.said)

    @cached_property
    def facts(self) -> dict[str, LesionFacts | None]:
        known = {one.name for one in fields(LesionFacts)}
        return {
            label: None
            if one["facts"] is None
            else LesionFacts(**{name: _tupled(value) for name, value in one["facts"].items() if name in known})
            for label, one in self.said.items()
        }

    @cached_property
    def commonest(self) -> str:
        """The disease that most training reports affirm."""
        named = Counter(finding.disease for report in self.training.values() if (finding := main_finding(report.text)))
        return named.most_common(1)[0][0] if named else "lesion"


def score_reports(call: Invocation, model: Path, settings: StudyCaptionSettings, people: Sequence[str]) -> int:
    """Score the reports of participants that are done; gives back the exit code."""
    dataset = open_output(call, model, settings)
    path = find_reports(call.input_dir, settings.reports)
    true = read_reports(path, list_participants(call.input_dir))
    done = [label for label in people if label in true and report_path(dataset.root, label).is_file()]
    if not done:
        read_report(dataset.root, next((label for label in people if label in true), people[0]))  # says that it has not run
    if call.dry_run:
        Console().print(f"score {len(done)} reports against {path.name}", highlight=False)
        return 0
    inputs = (path, *(report_path(dataset.root, label) for label in done), *model_files(model))
    arguments = {"raw": call.input_dir, "path": path, "model": model, "root": dataset.root, "settings": settings, "device": call.execution.device, "people": tuple(done)}  # fmt: skip
    return run_units(dataset, [Unit(name="group", inputs=inputs, work=write_scores, arguments=arguments)], call.execution)


def write_scores(raw: Path, path: Path, model: Path, root: Path, settings: StudyCaptionSettings, device: str, people: tuple[str, ...]) -> UnitResult:  # fmt: skip
    """Write reports.tsv, metrics.json and report.html."""
    found, notes = _read(raw, path, model, root, settings, device, people)
    predictors = [_predictor(_MODEL, "model", {label: _text(one) for label, one in found.said.items()}), *_floors(found)]
    counts = resample_pictures(len(found.people), settings.bootstraps, settings.seed)
    references = {label: (_true_text(report),) for label, report in found.true.items()}
    scored = score_predictors(partial(_scores, found, found.people), references, predictors, found.people, counts)
    metrics: dict[str, Any] = {
        "model": model.name,
        "language_model": found.loaded.record.language_model,
        "people": len(found.people),
        "bootstraps": settings.bootstraps,
        "seed": settings.seed,
        "metrics": scored.meanings,
        "rows": scored.rows,
        "closed": _closed(found, counts),
        "languages": _languages(found, predictors, references),
    }
    table = pd.DataFrame(
        [(f"sub-{label}", one.name, text) for one in predictors for label, text in one.captions[_EVERYBODY]],
        columns=["participant_id", "predictor", "report"],
    )
    examples = show_examples(references, predictors, scored, count=6).drop(columns="participant").rename(columns={"picture": "participant", "said by people": "true report"})  # fmt: skip
    page = study_reports_page(
        metrics, examples, title="Reports of studies", subtitle=f"brainfm caption, model {model.name}", notes=notes,
        methods=CREDITS.methods, citations=(CREDITS.citation,),
    )  # fmt: skip
    outputs = (
        write_tsv(root / "reports.tsv", table),
        write_json(root / "metrics.json", metrics),
        write_text(root / "report.html", page.render()),
    )
    return UnitResult(outputs=outputs, notes=notes, seed=settings.seed)


def _read(
    raw: Path, path: Path, model: Path, root: Path, settings: StudyCaptionSettings, device: str, people: tuple[str, ...]
) -> tuple[_Scored, tuple[str, ...]]:
    loaded = load(model, device, settings.llm)
    everything = read_reports(path, list_participants(raw))
    written_in = {label: language_written_in(report) for label, report in everything.items()}
    if loaded.record.restated:
        everything = {label: restated(report) for label, report in everything.items()}
    said = {label: read_report(root, label) for label in people}
    learnt = [label for label, one in said.items() if "tuned_on" in one["seen_in"]]
    kept = {label: one for label, one in said.items() if label not in learnt}
    if not kept:
        raise InputDatasetError(
            "everybody with a report was among the people the model was aligned on: nobody tests it", where=root, fix="caption the test people too (split.tsv of the model)"
        )  # fmt: skip
    taught = set(read_provenance(model)["tuned_on"])
    training = {label: report for label, report in everything.items() if participant_hash(raw.resolve().name, label) in taught}
    notes = [] if training else ["no training report is in this dataset: floors that rest on them are not computed"]
    if learnt:
        notes.append(f"{len(learnt)} people were aligned on and are left out")
    if loaded.record.restated:
        notes.append("reports are English restatements of what the parser finds, as the model was taught")
    true = {label: everything[label] for label in kept}
    return _Scored(loaded=loaded, said=kept, true=true, training=training, written_in=written_in, settings=settings), tuple(notes)


def _predictor(name: str, role: Any, texts: Mapping[str, str]) -> Predictor:  # noqa: ANN401  (model or floor)
    return Predictor(name=name, role=role, average="", captions={_EVERYBODY: list(texts.items())})


def _floors(found: _Scored) -> list[Predictor]:
    own = {label: _text(one) for label, one in found.said.items()}
    people = found.people
    step = int(np.random.default_rng(found.settings.seed).integers(1, max(2, len(people))))
    made = [
        _predictor(_SHUFFLED, "floor", {label: own[people[(place + step) % len(people)]] for place, label in enumerate(people)}),
        _predictor(_NO_IMAGE, "floor", _without_images(found)),
    ]
    if all(one is not None for one in found.facts.values()):
        made.append(_predictor(_FACTS, "floor", {label: _of_facts(facts, found.commonest) for label, facts in found.facts.items() if facts}))  # fmt: skip
    if not found.training:
        return made
    texts = {label: _true_text(report) for label, report in found.training.items()}
    vectors = report_vectors(found.training, found.loaded.sentences, found.loaded.record.fit)
    bank = torch.stack([vectors[label] for label in texts])
    names = list(texts)
    central = texts[names[int((bank @ bank.mean(dim=0)).argmax())]]
    made.append(_predictor(_CONSTANT, "floor", dict.fromkeys(people, central)))
    for name, key in ((_RIDGE, "ridge_vector"), (_NEAREST, "vector")):
        nearest = {label: texts[names[int((bank @ torch.tensor(one[key])).argmax())]] for label, one in found.said.items()}
        made.append(_predictor(name, "floor", nearest))
    return made


def _without_images(found: _Scored) -> dict[str, str]:
    """What is written where every slice has the mean features of training: the question, with its facts, is all there is."""
    teller, people = found.loaded.teller, found.people
    prefix = teller.without_images()
    told: dict[str, str] = {}
    for start in range(0, len(people), _BATCH):
        part = people[start : start + _BATCH]
        asked = [[(str(found.said[label]["question"]), "")] for label in part]
        said = teller.answer([prefix] * len(part), asked, max_tokens=found.settings.max_tokens)
        told |= {label: " ".join(parts_of(text)) for label, text in zip(part, said.texts, strict=True)}
    return told


def _of_facts(facts: LesionFacts, disease: str) -> str:
    written = write_report(facts, disease=disease)
    return f"{written.findings} {written.impression}"


def _text(one: Mapping[str, Any]) -> str:
    return f"{one['report']['findings']} {one['report']['impression']}".strip()


def _true_text(report: StudyReport) -> str:
    return f"{report.findings} {report.impression}".strip()


def _scores(found: _Scored, people: Sequence[str], candidates: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, TextScore]:
    said = report_scores(candidates, references, [found.facts[label] for label in people])
    return {**said, **score_texts(found.loaded.sentences, candidates, references)}


def _languages(found: _Scored, predictors: Sequence[Predictor], references: Mapping[str, Sequence[str]]) -> dict[str, list[dict[str, Any]]]:
    """Scores of the model and its floors by the language that a report was written in, where there are several."""
    groups: dict[str, list[str]] = {}
    for label in found.people:
        groups.setdefault(found.written_in[label], []).append(label)
    if len(groups) < 2:
        return {}
    rows = {}
    for name, labels in sorted(groups.items()):
        theirs = [_predictor(one.name, one.role, {label: text for label, text in one.captions[_EVERYBODY] if label in labels}) for one in predictors]  # fmt: skip
        counts = resample_pictures(len(labels), found.settings.bootstraps, found.settings.seed)
        scored = score_predictors(partial(_scores, found, labels), references, theirs, labels, counts)
        rows[name] = [row | {"people": len(labels)} for row in scored.rows if row["participant"] == "mean"]
    return rows


def _closed(found: _Scored, counts: Any) -> list[dict[str, Any]]:  # noqa: ANN401  (resamples, people)
    """Share of right answers to each question, by the model and by what knows less."""
    without = _answers_without_images(found)
    rows = []
    for question in CLOSED:
        truth = {label: closed_truth(question, report.text) for label, report in found.true.items()}
        learnt = Counter(answer for report in found.training.values() if (answer := closed_truth(question, report.text)))
        said = {label: {one["question"]: one for one in values["closed"]} for label, values in found.said.items()}
        own = {label: closed_answer(question, one[question]["answer"]) if question in one else "" for label, one in said.items()}
        withheld = sum(bool(one[question]["withheld"]) for one in said.values() if question in one)
        by = {_MODEL: own, _NO_IMAGE: {label: closed_answer(question, answers.get(question, "")) for label, answers in without.items()}}
        if learnt:
            by["commonest answer"] = dict.fromkeys(found.people, learnt.most_common(1)[0][0])
        for name, answers in by.items():
            values = np.array([float(answers[label] == truth[label]) if truth[label] else np.nan for label in found.people])
            score = mean_of("right", question, values)
            told = score.score(counts.astype(np.float64))
            value = {"value": told.value, "low": told.low, "high": told.high, "reason": told.reason}
            rows.append({"question": question, "name": name, "score": value, "people": int(np.isfinite(values).sum()), "withheld": withheld if name == _MODEL else 0})  # fmt: skip
    return rows


def _answers_without_images(found: _Scored) -> dict[str, dict[str, str]]:
    teller, people = found.loaded.teller, found.people
    prefix = teller.without_images()
    told = closed_dialogue(
        teller, [prefix] * len(people), [found.facts[label] for label in people], max_tokens=found.settings.answer_tokens
    )
    return {label: {question: said for question, said, _ in turns} for label, turns in zip(people, told, strict=True)}


def _tupled(value: object) -> Any:  # noqa: ANN401
    """JSON's lists as the tuples they were."""
    return tuple(_tupled(one) for one in value) if isinstance(value, list) else value
