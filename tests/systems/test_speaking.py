"""Alignment of studies with reports: what is trained, what is not, and what a conversation remembers."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brainfm_cli.bids.reports import StudyReport
from brainfm_cli.config import Execution
from brainfm_cli.errors import CheckpointMismatchError
from brainfm_cli.learning.loop import OptimiserSettings, ScheduleSettings, train
from brainfm_cli.models.causal_language import DEFAULT_LANGUAGE_MODEL
from brainfm_cli.models.language import DEFAULT_ENCODER
from brainfm_cli.models.mri_encoder import Context
from brainfm_cli.systems.mri_language import MriLanguageSettings
from brainfm_cli.systems.mri_language.report_alignment import alignment_scores, disease_vector, fit_ridge, groups_of, report_vectors
from brainfm_cli.systems.mri_language.speaking import (
    CellReader,
    SpeakFitSettings,
    StudyTeller,
    check_languages,
    features_width,
    load_language,
    load_sentences,
    new_speaker,
)  # fmt: skip
from brainfm_cli.systems.mri_language.told_studies import ToldStudies

DISEASES, SIDES, PLACES = ("glioblastoma", "meningioma"), ("left", "right"), ("frontal lobe", "occipital lobe")
CASES = [(disease, side, place) for disease in DISEASES for side in SIDES for place in PLACES]


def report(disease: str, side: str, place: str) -> StudyReport:
    return StudyReport(findings=f"There is a {disease} in the {side} {place}.", impression=f"{disease.capitalize()}, {side}.")


def eight_pairs(fit: SpeakFitSettings, features: int, batch_size: int = 8) -> tuple[ToldStudies, dict[str, StudyReport]]:
    """Eight studies of three slices with features of their own, each with its report."""
    generator = torch.Generator().manual_seed(0)
    reports = {f"{place:02d}": report(*case) for place, case in enumerate(CASES)}
    targets = report_vectors(reports, load_sentences(DEFAULT_ENCODER), fit)
    context = Context(sequence=torch.tensor([0, 1, 2]), plane=torch.zeros(3, dtype=torch.int64), z_mm=torch.tensor([-10.0, 0, 10]))
    turns = {label: ((("Write the report.", one.findings),),) for label, one in reports.items()}
    return ToldStudies(
        slices={label: torch.randn(3, features, generator=generator) for label in reports}, contexts=dict.fromkeys(reports, context), targets=targets,
        groups=groups_of(reports, fit), conversations=turns, without_facts=turns, people=tuple(reports), validation_people=(),
        batch_size=batch_size, seed=0, drop_sequence=0.0, drop_facts=0.0,
    ), reports  # fmt: skip


@pytest.mark.long
def test_the_bridge_alone_overfits_eight_pairs_and_writes_them(tmp_path) -> None:
    system = MriLanguageSettings(kind="mri-language", preset="nano").build()
    language, fit = (
        load_language(DEFAULT_LANGUAGE_MODEL),
        SpeakFitSettings(contrast_epochs=0, language_items=None, speaker={"dropout": 0.0}),
    )
    source, reports = eight_pairs(fit, features=32)
    speaker = new_speaker(system, fit, language, features=32, contrast_width=len(source.targets["00"]), seed=0)
    teller, before = StudyTeller(fit=fit, speaker=speaker, language=language), language.fingerprint()
    plan = ScheduleSettings(epochs=80, patience=None, optimiser=OptimiserSettings(learning_rate=3e-3, warmup_epochs=2)).plan(0)
    speaker.load_state_dict(train(teller, source, plan, Execution(device="cpu"), tmp_path).weights)
    assert language.fingerprint() == before
    for label, one in reports.items():
        prefix, _ = teller.read(source.slices[label], source.contexts[label])
        said = teller.answer([prefix], [[("Write the report.", "")]], max_tokens=24)
        assert said.texts[0] == one.findings


def test_contrast_tells_studies_of_other_reports_apart(tmp_path) -> None:
    from tests.models.tiny_language import trained_llama

    fit = SpeakFitSettings(contrast_epochs=100, speaker={"dropout": 0.0})
    system, language = MriLanguageSettings(kind="mri-language", preset="nano").build(), load_language(str(trained_llama()))
    source, _ = eight_pairs(fit, features=32)
    speaker = new_speaker(system, fit, language, features=32, contrast_width=len(source.targets["00"]), seed=0)
    plan = ScheduleSettings(epochs=40, patience=None, optimiser=OptimiserSettings(learning_rate=3e-3, warmup_epochs=2)).plan(0)
    teller = StudyTeller(fit=fit, speaker=speaker, language=language)
    result = train(teller, source, plan, Execution(device="cpu"), tmp_path)
    speaker.load_state_dict(result.weights)
    found = torch.cat([teller.read(source.slices[label], source.contexts[label])[1] for label in source.people])
    wanted = torch.stack([source.targets[label] for label in source.people])
    assert (found @ wanted.T).argmax(dim=1).tolist() == list(range(8))
    assert "language" not in result.log.rows[-1]


def test_low_rank_weights_are_trained_and_the_language_model_s_own_are_not(tmp_path) -> None:
    from tests.models.tiny_language import trained_llama

    fit = SpeakFitSettings(contrast=False, lora=2, speaker={"dropout": 0.0})
    system, language = MriLanguageSettings(kind="mri-language", preset="nano").build(), load_language(str(trained_llama()))
    source, _ = eight_pairs(fit, features=32)
    before, tokens = language.fingerprint(), language.dialogues([(("a cat ?", "a dog"),)], room=8, longest=40)
    alone = language.dialogue_loss(torch.zeros(1, 8, language.width), tokens)
    speaker = new_speaker(system, fit, language, features=32, contrast_width=len(source.targets["00"]), seed=0)
    assert len(speaker.language_parts) == 2 * 2 * 2  # layers, queries and values, down and up
    torch.testing.assert_close(language.dialogue_loss(torch.zeros(1, 8, language.width), tokens), alone)  # nothing at the start
    teller = StudyTeller(fit=fit, speaker=speaker, language=language)
    plan = ScheduleSettings(epochs=2, patience=None, optimiser=OptimiserSettings(learning_rate=1e-2, warmup_epochs=0)).plan(0)
    weights = train(teller, source, plan, Execution(device="cpu"), tmp_path).weights
    assert language.fingerprint() == before
    assert any(name.startswith("language_parts.") and name.endswith("up") and value.abs().sum() > 0 for name, value in weights.items())
    changed = language.dialogue_loss(torch.zeros(1, 8, language.width), tokens)
    assert not torch.allclose(changed, alone)
    fresh = load_language(str(trained_llama()))
    again = new_speaker(system, fit, fresh, features=32, contrast_width=len(source.targets["00"]), seed=1)
    again.load_state_dict(weights)
    torch.testing.assert_close(fresh.dialogue_loss(torch.zeros(1, 8, language.width), tokens), changed)


@pytest.mark.long
def test_a_conversation_remembers_its_first_turn_in_the_fifth(tmp_path) -> None:
    """One study, so that the same vectors stand in front: who asked, said in the first turn alone, decides the fifth answer; without low-rank weights 60 epochs do not teach that."""
    between = (("Which disease is it?", "Glioma."), ("On which side is it?", "Left."), ("How large is it?", "31 mm."))
    answers = {"I am a doctor.": "Left frontal glioma, 31 mm.", "I am the patient.": "There is a tumour in your brain."}
    said = {first: ((first, "Hello."), *between, ("What did you find?", answer)) for first, answer in answers.items()}
    language, fit = (
        load_language(DEFAULT_LANGUAGE_MODEL),
        SpeakFitSettings(contrast=False, language_items=None, lora=8, speaker={"dropout": 0.0}),
    )
    source, _ = eight_pairs(fit, features=8)
    slices, target = source.slices["00"], source.targets["00"]
    both = ToldStudies(
        slices=dict.fromkeys(said, slices), contexts=dict.fromkeys(said, source.contexts["00"]), targets=dict.fromkeys(said, target),
        groups=dict.fromkeys(said, 0), conversations={first: (turns,) for first, turns in said.items()},
        without_facts={first: (turns,) for first, turns in said.items()}, people=tuple(said), validation_people=(), batch_size=2, seed=0,
        drop_sequence=0.0, drop_facts=0.0,
    )  # fmt: skip
    speaker = new_speaker(
        MriLanguageSettings(kind="mri-language", preset="nano").build(), fit, language, features=8, contrast_width=len(target), seed=0
    )
    teller = StudyTeller(fit=fit, speaker=speaker, language=language)
    plan = ScheduleSettings(epochs=40, patience=None, optimiser=OptimiserSettings(learning_rate=3e-3, warmup_epochs=2)).plan(0)
    speaker.load_state_dict(train(teller, both, plan, Execution(device="cpu"), tmp_path).weights)
    prefix, _ = teller.read(slices, source.contexts["00"])
    for turns in said.values():
        assert teller.answer([prefix], [[*turns[:-1], (turns[-1][0], "")]], max_tokens=16).texts[0] == turns[-1][1]


def test_sides_are_told_apart_though_sentences_hardly_are() -> None:
    encoder = load_sentences(DEFAULT_ENCODER)
    left, right = (StudyReport(findings=f"There is an infarct in the {side} frontal lobe.", impression="") for side in SIDES)
    sentences = encoder.sentences([left.findings, right.findings])
    found = report_vectors({"l": left, "r": right}, encoder, SpeakFitSettings())
    assert float(sentences[0] @ sentences[1]) > 0.95
    assert float(found["l"] @ found["r"]) < 0.85


def test_a_disease_without_any_label_is_ranked_by_its_name() -> None:
    encoder, fit = load_sentences(DEFAULT_ENCODER), SpeakFitSettings()
    reports = {f"{place}": report(*case) for place, case in enumerate(CASES * 3)}
    targets = report_vectors(reports, encoder, fit)
    noise = torch.Generator().manual_seed(1)
    studies = {"model": {label: one + 0.05 * torch.randn(one.shape, generator=noise) for label, one in targets.items()}}
    train_people = [label for label, one in reports.items() if "meningioma" in one.findings]
    test_people = list(reports)
    table = alignment_scores(studies, reports, targets, encoder, test=test_people, train=train_people, seed=0)
    named = table[table["score"].str.contains("by its name")].set_index("score")["value"]
    assert any("zero-shot" in name and "glioblastoma" in name for name in named.index)
    assert all(value > 0.95 for value in named)
    random = {"model": {label: torch.randn(targets["0"].shape, generator=noise) for label in reports}}
    by_chance = alignment_scores(random, reports, targets, encoder, test=test_people, train=train_people, seed=0)
    assert by_chance[by_chance["score"].str.contains("by its name")]["value"].max() < 0.85
    assert disease_vector("abscess", encoder, ()).norm() == pytest.approx(1.0)


def test_reports_of_each_language_are_found_among_those_of_everybody() -> None:
    encoder, fit = load_sentences(DEFAULT_ENCODER), SpeakFitSettings()
    reports = {f"{place}": report(*case) for place, case in enumerate(CASES)}
    targets, people = report_vectors(reports, encoder, fit), [f"{place}" for place in range(len(CASES))]
    written_in = {label: "zh" if label in people[:2] else "en" for label in people}
    # those in Chinese find their own report; the others that of the person before them
    studies = {"model": {label: targets[label if written_in[label] == "zh" else people[place - 1]] for place, label in enumerate(people)}}
    given = {"test": people, "train": people, "seed": 0}
    table = alignment_scores(studies, reports, targets, encoder, **given, written_in=written_in).set_index("score")
    first = f"own among the first 1 of {len(people)}"
    assert table.loc[f"reports in zh: {first}", "value"] == 1
    assert table.loc[f"reports in en: {first}", "value"] == 0
    assert table.loc[f"reports: {first}", "value"] == pytest.approx(2 / len(people))
    assert table.loc[[f"reports in zh: {first}", f"reports in en: {first}"], "people"].tolist() == [2, len(people) - 2]
    one = alignment_scores(studies, reports, targets, encoder, **given, written_in=dict.fromkeys(people, "en"))
    assert not one["score"].str.contains("reports in").any()


def test_groups_are_of_studies_that_say_the_same() -> None:
    reports = {"a": report(*CASES[0]), "b": report(*CASES[0]), "c": report(*CASES[1])}
    same = groups_of(reports, SpeakFitSettings())
    assert same["a"] == same["b"] != same["c"]
    assert len(set(groups_of(reports, SpeakFitSettings(same_findings=False)).values())) == 3


def test_ridge_recovers_a_linear_map() -> None:
    generator = torch.Generator().manual_seed(0)
    slices = {f"{place}": torch.randn(4, 6, generator=generator) for place in range(60)}
    weights = torch.randn(6, 3, generator=generator)
    targets = {label: one.mean(dim=0) @ weights for label, one in slices.items()}
    ridge = fit_ridge(slices, targets, [str(place) for place in range(50)])
    for place in range(50, 60):
        torch.testing.assert_close(ridge.predict(slices[str(place)]), targets[str(place)], atol=0.02, rtol=0.05)


def test_chinese_is_refused_by_models_that_do_not_know_it() -> None:
    texts = {"zh": ["右侧颞叶可见脑膜瘤，最长径约24 mm，体积约5.10 mL。"]}
    language = load_language(DEFAULT_LANGUAGE_MODEL)
    with pytest.raises(CheckpointMismatchError, match="unknown to the sentence encoder"):
        check_languages(texts, load_sentences(DEFAULT_ENCODER), language)
    with pytest.raises(CheckpointMismatchError, match="byte by byte"):
        check_languages(texts, None, language)
    check_languages({"en": ["A left frontal meningioma."]}, load_sentences(DEFAULT_ENCODER), language)


@pytest.mark.parametrize("backbone", ["hybrid", "convnext"])
def test_features_know_in_which_part_of_a_slice_something_is(backbone: str) -> None:
    system = MriLanguageSettings(kind="mri-language", preset="nano", backbone=backbone).build()
    reader = CellReader(system.model.encoder).eval()
    images = torch.zeros(2, 64, 64)
    images[0, 8:16, 8:16] = images[1, 8:16, 48:56] = 1.0
    zero = torch.zeros(2, dtype=torch.int64)
    with torch.no_grad():
        found = reader(images, Context(sequence=zero, plane=zero, z_mm=torch.zeros(2)))
    assert found.shape == (2, features_width(system, 64))
    cells = found[:, 64:].unflatten(1, (64, 4, 4))
    change = (cells[0] - cells[1]).abs().mean(dim=0)
    there = np.unravel_index(np.argsort(change.flatten().numpy())[-2:], (4, 4))
    assert set(zip(*map(list, there), strict=True)) == {(0, 0), (0, 3)}
