"""What is taught of a study follows from its report, and what is said is scored by what it says."""

from __future__ import annotations

import numpy as np
import pytest

from brainfm_cli.bids.reports import StudyReport
from brainfm_cli.learning.radiology_reports import known_diseases, parse_report, plain_words, write_report
from brainfm_cli.learning.report_scores import report_scores
from brainfm_cli.learning.report_tasks import (
    DISEASE,
    PLACE,
    PLAIN,
    PRESENT,
    SIDE,
    SIZE,
    closed_answer,
    closed_truth,
    conversations_of,
    facts_sentence,
    main_finding,
    parts_of,
    report_answer,
    report_question,
    restated,
)  # fmt: skip
from brainfm_cli.signals.lesions import LesionFacts

LEFT = StudyReport(
    findings="There is a glioblastoma in the left frontal lobe. It measures up to 31 mm, with a volume of 12.30 mL. It is hyperintense on FLAIR. No hydrocephalus.",
    impression="Glioblastoma in the left frontal lobe.",
)
NOTHING = StudyReport(findings="No lesion is seen.", impression="No glioblastoma.")
CHINESE = StudyReport(findings="右侧颞叶可见脑膜瘤，FLAIR呈高信号，最长径约24 mm，体积约5.10 mL。", impression="右侧颞叶脑膜瘤。")
FACTS = LesionFacts(
    volume_ml=12.3, parts=1, side="left", left_share=1.0, centre_mm=(-30.0, 0.0, 0.0), extent_mm=(31.0, 20.0, 20.0), signals=(("FLAIR", "hyperintense"),)
)  # fmt: skip


def test_a_report_becomes_a_dialogue_whose_answers_it_bears_out() -> None:
    written, dialogue = conversations_of("01", LEFT, FACTS)
    (question, answer) = written.turns[0]
    assert question == report_question(FACTS)
    assert question.startswith("Measured: 12.30 mL, left, up to 31 mm, hyperintense on FLAIR.")
    assert parts_of(answer) == (LEFT.findings, LEFT.impression)
    told = dict(dialogue.turns)
    assert [asked for asked, _ in dialogue.turns][1:] == [DISEASE, SIDE, PLACE, SIZE, PLAIN]
    assert (told[DISEASE], told[SIDE], told[PLACE]) == ("Glioblastoma.", "Left.", "Frontal lobe.")
    assert told[SIZE] == "It measures up to 31 mm, with a volume of 12.30 mL."
    assert "left side" in told[PLAIN]
    assert conversations_of("01", LEFT, None)[1].turns[0] == (PRESENT, "Yes.")


def test_nothing_seen_ends_the_dialogue_early() -> None:
    _, dialogue = conversations_of("02", NOTHING, LesionFacts(volume_ml=0.0))
    assert dialogue.turns[0] == (f"Measured: no lesion. {PRESENT}", "No. There is no lesion.")
    assert dialogue.turns[1] == (PLAIN, plain_words(None))


@pytest.mark.parametrize("report", [LEFT, CHINESE])
def test_restated_reports_say_the_same_in_english(report: StudyReport) -> None:
    said = restated(report)
    assert said.text.isascii()
    before, after = main_finding(report.text), main_finding(said.text)
    assert before is not None
    assert after is not None
    names = ("disease", "side", "places", "longest_mm", "volume_ml", "signals")
    assert [getattr(after, name) for name in names] == [getattr(before, name) for name in names]
    assert said.findings.count(before.disease.capitalize()) == 1  # the impression says it once more
    assert restated(NOTHING).text == "No lesion is seen.\nNo lesion."


@pytest.mark.parametrize(
    ("question", "said", "answer"),
    [
        (PRESENT, "Yes.", "yes"), (PRESENT, "No. There is no lesion.", "no"), (PRESENT, "Perhaps.", ""), (DISEASE, "It is a GBM.", "glioblastoma"),
        (SIDE, "Right.", "right"), (SIDE, "Both sides.", "both"), (PLACE, "Temporal lobe.", "temporal lobe"), (DISEASE, "I do not know.", ""),
    ],
)  # fmt: skip
def test_closed_answers_are_read_as_words_of_the_lexicon(question: str, said: str, answer: str) -> None:
    assert closed_answer(question, said) == answer


def test_the_right_answers_are_those_of_the_report() -> None:
    assert [closed_truth(question, CHINESE.text) for question in (PRESENT, DISEASE, SIDE, PLACE)] == [
        "yes",
        "meningioma",
        "right",
        "temporal lobe",
    ]
    assert [closed_truth(question, NOTHING.text) for question in (PRESENT, DISEASE, SIDE)] == ["no", "", ""]


def test_every_disease_can_be_explained() -> None:
    for name in known_diseases():
        (finding,) = parse_report(write_report(FACTS, disease=name).impression)
        assert finding.disease == name
        assert name.split()[0][:5] in plain_words(finding)


def test_scores_tell_a_wrong_disease_side_and_volume_apart() -> None:
    right, wrong_side = LEFT.text, LEFT.text.replace("left", "right")
    wrong_volume, other = LEFT.text.replace("12.30", "40.00"), LEFT.text.replace("lioblastoma", "lioma").replace("frontal", "parietal")
    said = [right, wrong_side, wrong_volume, other, NOTHING.text]
    found = report_scores(said, [(LEFT.text,)] * 5, [FACTS] * 5)
    values = {name: score.items.tolist() for name, score in found.items() if score.items is not None}
    assert values["disease"] == [1, 1, 1, 0, 0]
    assert values["presence"] == [0, 0, 0, 0, 1]
    assert values["side"][:4] == [0, 1, 0, 0]
    assert np.isnan(values["side"][4])
    assert values["place"] == [1, 1, 1, 0, 0]
    assert values["mask"] == [0, 1, 1, 0, 1]
    assert found["side"].value() == pytest.approx(0.25)
    assert report_scores([right], [(LEFT.text,)], [None])["mask"].value() is None


def test_facts_are_told_in_one_sentence() -> None:
    assert facts_sentence(None) == ""
    assert report_answer(StudyReport(findings="x", impression="")) == "Findings: x"
