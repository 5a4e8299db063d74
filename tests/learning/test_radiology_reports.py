"""Reports read by rule: hand-labelled sentences in two languages; facts written, read again and checked."""

from __future__ import annotations

import pytest

from brainfm_cli.errors import SettingsError
from brainfm_cli.learning.radiology_reports import affirmed, check_report, language_of, parse_report, write_report
from brainfm_cli.signals.lesions import LesionFacts

FACTS = LesionFacts(
    volume_ml=12.34,
    parts=2,
    side="left",
    left_share=1.0,
    centre_mm=(-30.0, 20.0, 10.0),
    extent_mm=(30.0, 41.0, 25.0),
    regions=(("frontal lobe", 0.7), ("insula", 0.3)),
    signals=(("FLAIR", "hyperintense"), ("T1w", "hypointense")),
)
NONE = LesionFacts(volume_ml=0.0)
# text, then what is said of each disease: (disease, there, side, places)
SENTENCES = [
    ("No evidence of acute infarct, hemorrhage or mass.", [("infarct", False), ("haemorrhage", False), ("tumour", False)]),
    (
        "No hemorrhage, but an acute infarct in the right basal ganglia.",
        [("haemorrhage", False), ("infarct", True, "right", "basal ganglia")],
    ),
    ("There is an acute infarct without hemorrhage.", [("infarct", True), ("haemorrhage", False)]),
    ("Hemorrhage is not seen. Bilateral white matter hyperintensities.", [("haemorrhage", False), ("white matter lesion", True, "both")]),
    ("Left frontal glioma with surrounding edema.", [("glioma", True, "left", "frontal lobe"), ("oedema", True)]),
    ("A right-sided cerebellar metastasis is new.", [("metastasis", True, "right", "cerebellum")]),
    ("The brain is normal.", []),
    ("左侧额叶可见胶质瘤，未见出血。", [("glioma", True, "left", "frontal lobe"), ("haemorrhage", False)]),
    ("未见明显梗死及出血。", [("infarct", False), ("haemorrhage", False)]),
    ("颅内未见占位，右侧丘脑可见急性梗死灶。", [("tumour", False), ("infarct", True, "right", "thalamus")]),
    ("双侧脑室旁白质病变。", [("white matter lesion", True, "both", "ventricle")]),
    ("无脑积水。左侧颞叶占位性病变。", [("hydrocephalus", False), ("tumour", True, "left", "temporal lobe")]),
]


@pytest.mark.parametrize(("text", "expected"), SENTENCES, ids=[text[:24] for text, _ in SENTENCES])
def test_hand_labelled_sentences(text: str, expected: list[tuple[object, ...]]) -> None:
    found = parse_report(text)
    assert [(one.disease, not one.negated) for one in found] == [row[:2] for row in expected]
    for one, row in zip(found, expected, strict=True):
        if len(row) > 2:
            assert one.side == row[2]
        if len(row) > 3:
            assert one.places == (row[3],)
        assert text[one.start : one.end]  # offsets lie in the text
    assert [one.disease for one in affirmed(found)] == [row[0] for row in expected if row[1]]


@pytest.mark.parametrize(
    ("text", "longest", "volume"),
    [
        ("Mass of 2.3 x 1.8 cm.", 23.0, None),
        ("Mass, 8 mm.", 8.0, None),
        ("Mass. It measures 45 mm and 12.5 mL.", 45.0, 12.5),
        ("占位，大小约3.2×2.5cm，体积约8.1毫升。", 32.0, 8.1),
        ("Mass of 4 cm3.", None, None),  # a volume in other words than the lexicon's stays unread rather than a length
    ],
)
def test_sizes_have_units(text: str, longest: float | None, volume: float | None) -> None:
    (one,) = parse_report(text)
    assert one.longest_mm == longest
    if volume is not None:
        assert one.volume_ml == volume


@pytest.mark.parametrize(
    ("text", "signals"),
    [
        (
            "Lesion, hyperintense on FLAIR and T2, hypointense on T1.",
            {("FLAIR", "hyperintense"), ("T2w", "hyperintense"), ("T1w", "hypointense")},
        ),
        ("The lesion is T1 isointense and T2 hyperintense.", {("T1w", "isointense"), ("T2w", "hyperintense")}),
        ("病灶T1WI呈低信号，T2WI呈高信号。", {("T1w", "hypointense"), ("T2w", "hyperintense")}),
    ],
)
def test_signals_belong_to_sequences(text: str, signals: set[tuple[str, str]]) -> None:
    assert set(parse_report(text)[0].signals) == signals


def test_certainty_and_enhancement() -> None:
    (one,) = parse_report("Possible meningioma with enhancement.")
    assert (one.certainty, one.enhancing) == ("possible", True)
    assert parse_report("左侧额叶胶质瘤可能。")[0].certainty == "possible"
    assert parse_report("Findings compatible with metastasis.")[0].certainty == "probable"
    told = parse_report("Glioma of the left insula. No enhancement.")[0]
    assert told.enhancing is False
    assert parse_report("Glioma.")[0].enhancing is None


def test_languages() -> None:
    assert language_of("Left frontal glioma.") == "en"
    assert language_of("左侧额叶胶质瘤，T1WI低信号，FLAIR高信号，大小 3 cm。") == "zh"
    assert language_of("左侧额叶 glioma with surrounding edema 可见。") == "mixed"


@pytest.mark.parametrize("language", ["en", "zh"])
def test_what_is_written_is_read_again_and_contradicts_nothing(language: str) -> None:
    report = write_report(FACTS, language=language, disease="glioma")  # type: ignore[arg-type]
    found = affirmed(parse_report(report.findings))
    assert [one.disease for one in found] == ["glioma"]
    assert (found[0].side, found[0].places) == ("left", ("frontal lobe", "insula"))
    assert (found[0].longest_mm, found[0].volume_ml) == (41.0, 12.34)
    assert set(found[0].signals) == set(FACTS.signals)
    known = ("frontal lobe", "insula", "thalamus")
    assert check_report(report.text, FACTS, known_places=known) == ()
    assert check_report(write_report(NONE, language=language).text, NONE) == ()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("Right frontal glioma, 12.3 mL.", ["side"]),
        ("Left frontal glioma, 14.0 mL.", ["volume"]),
        ("Left frontal glioma, 12.9 mL.", []),  # within 5 %
        ("Left thalamic glioma.", ["place"]),
        ("Left occipital glioma.", []),  # no region that the facts could have named
        ("Left frontal glioma, hypointense on FLAIR.", ["signal"]),
        ("No lesion is seen.", ["presence"]),
        ("左侧额叶胶质瘤，体积约20毫升。", ["volume"]),
        ("右侧额叶胶质瘤。", ["side"]),
    ],
)
def test_contradictions_are_named(text: str, kinds: list[str]) -> None:
    assert [one.kind for one in check_report(text, FACTS, known_places=("frontal lobe", "insula", "thalamus"))] == kinds


def test_a_lesion_where_none_is() -> None:
    assert [one.kind for one in check_report("Left frontal glioma.", NONE)] == ["presence"]
    assert check_report("Mild atrophy, no mass effect.", NONE) == ()


def test_an_unknown_disease_cannot_be_written() -> None:
    with pytest.raises(SettingsError, match="not among the diseases"):
        write_report(FACTS, disease="flu")
