"""What a model is taught to say of a study, from its report alone: the report, closed questions, an explanation in plain words.

The report is read by :mod:`brainfm_cli.learning.radiology_reports`; its answers are therefore only as right as that parser. Facts that were
measured in a mask stand in the question, so that a model has to put them into words and need not guess them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from brainfm_cli.bids.reports import Conversation, StudyReport
from brainfm_cli.learning.radiology_reports import Finding, affirmed, language_of, parse_report, plain_words, said_of

if TYPE_CHECKING:
    from brainfm_cli.signals.lesions import LesionFacts

REPORT = "Write the findings and the impression of this study."
PRESENT, DISEASE, SIDE, PLACE = "Is there a lesion?", "Which disease is it?", "On which side is it?", "In which part of the brain is it?"
SIZE, PLAIN = "How large is it?", "Explain it to the patient in plain words."
CLOSED = (PRESENT, DISEASE, SIDE, PLACE)
"""Questions with one right answer, in the order in which they are asked."""
_NO_LESION = "There is no lesion."
_LESIONS = {"lesion", "tumour"}  # what names no disease


def main_finding(report: str) -> Finding | None:
    """The first disease that a report affirms, a named one before 'lesion'; none where nothing is there."""
    there = affirmed(parse_report(report))
    return next((one for one in there if one.disease not in _LESIONS), there[0] if there else None)


def statement_of(finding: Finding | None, *, with_place: bool = True) -> str:
    """A finding in one English sentence, whatever language it was said in."""
    if finding is None:
        return "No lesion is seen."
    side = {"left": "left ", "right": "right ", "both": "bilateral ", None: ""}[finding.side]
    places = " and ".join(said_of("places", place) for place in finding.places)
    where = f" in the {side}{places}" if places else f" of the {side}hemisphere" if side else ""
    return f"{said_of('diseases', finding.disease).capitalize()}{where if with_place else ''}."


def facts_sentence(facts: LesionFacts | None) -> str:
    """Measured facts in one sentence, for a question; empty where nothing was measured."""
    if facts is None:
        return ""
    if facts.volume_ml == 0:
        return "Measured: no lesion."
    side = {"left": "left", "right": "right", "both": "both sides", None: "side unknown"}[facts.side]
    signals = "".join(f", {signal} on {name}" for name, signal in facts.signals)
    return f"Measured: {facts.volume_ml:.2f} mL, {side}, up to {facts.longest_mm:.0f} mm{signals}."


def report_answer(report: StudyReport) -> str:
    """A report as a model is to write it."""
    return f"Findings: {report.findings} Impression: {report.impression}" if report.impression else f"Findings: {report.findings}"


def parts_of(answer: str) -> tuple[str, str]:
    """Findings and impression of what a model wrote."""
    findings, _, impression = answer.removeprefix("Findings:").partition("Impression:")
    return findings.strip(), impression.strip()


def report_question(facts: LesionFacts | None) -> str:
    """How a report is asked for."""
    return f"{facts_sentence(facts)} {REPORT}".strip()


def conversations_of(participant: str, report: StudyReport, facts: LesionFacts | None) -> tuple[Conversation, ...]:
    """What is taught of one study: its report, and a dialogue of closed questions that ends in plain words."""
    finding = main_finding(report.text)
    written = Conversation(participant=participant, task="report", turns=((report_question(facts), report_answer(report)),))
    opening = f"{facts_sentence(facts)} {PRESENT}".strip()
    if finding is None:
        turns: list[tuple[str, str]] = [(opening, f"No. {_NO_LESION}"), (PLAIN, plain_words(None))]
    else:
        turns = [(opening, "Yes."), (DISEASE, f"{said_of('diseases', finding.disease).capitalize()}.")]
        if finding.side is not None:
            turns.append((SIDE, {"left": "Left.", "right": "Right.", "both": "Both sides."}[finding.side]))
        if finding.places:
            turns.append((PLACE, f"{' and '.join(said_of('places', place) for place in finding.places).capitalize()}."))
        size = _measured(finding, signals=False)
        if size:
            turns.append((SIZE, size))
        turns.append((PLAIN, plain_words(finding)))
    return written, Conversation(participant=participant, task="dialogue", turns=tuple(turns))


def closed_answer(question: str, said: str) -> str:
    """The answer to a closed question as one word of the lexicon: yes or no, a disease, a side, a place; empty where there is none."""
    if question == PRESENT:
        return next((word for word in ("no", "yes") if said.strip().lower().startswith(word)), "")
    found = affirmed(parse_report(said if question == DISEASE else f"lesion: {said}"))
    return _word(question, found[0] if found else None)


def closed_truth(question: str, report: str) -> str:
    """The right answer to a closed question by a report; empty where the report does not say."""
    finding = main_finding(report)
    return ("no" if finding is None else "yes") if question == PRESENT else _word(question, finding)


def _word(question: str, finding: Finding | None) -> str:
    if finding is None:
        return ""
    return {DISEASE: finding.disease, SIDE: finding.side or "", PLACE: finding.places[0] if finding.places else ""}[question]


def language_written_in(report: StudyReport) -> str:
    """The language that the dataset states of a report, or the one that its words are in."""
    return report.language or language_of(report.text)


def restated(report: StudyReport) -> StudyReport:
    """What the parser finds in a report, in English; findings beyond the lexicon are lost."""
    there = affirmed(parse_report(report.findings)) or affirmed(parse_report(report.impression))
    if not there:
        return StudyReport(findings="No lesion is seen.", impression="No lesion.", language="en")
    statements = [statement_of(one) for one in there]
    told = " ".join(f"{said} {_measured(one)}".strip() for said, one in zip(statements, there, strict=True))
    return StudyReport(findings=told, impression=" ".join(dict.fromkeys(statements)), language="en")


def _measured(finding: Finding, *, signals: bool = True) -> str:
    length = "" if finding.longest_mm is None else f"It measures up to {finding.longest_mm:.0f} mm"
    volume = "" if finding.volume_ml is None else f"{', with' if length else 'It has'} a volume of {finding.volume_ml:.2f} mL"
    seen = [f"It is {signal} on {name}." for name, signal in finding.signals if name and signals]
    return " ".join([*([f"{length}{volume}."] if length or volume else []), *seen])
