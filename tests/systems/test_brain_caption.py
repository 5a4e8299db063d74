"""Brain-caption as a system: masked loss and its floors, the captioner in front of a tiny language model, decoding and floors."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from brainfm_cli.bids.voxel_cohort import VoxelCohort
from brainfm_cli.errors import CheckpointMismatchError, SettingsError
from brainfm_cli.learning.checkpoints import load_weights, write_tensors
from brainfm_cli.learning.image_split import ImageSplitSettings
from brainfm_cli.learning.pretraining import PretrainingSettings
from brainfm_cli.learning.voxel_samples import TrialBatch, TrialBatches, select_trials
from brainfm_cli.models.causal_language import CausalLanguageModel, Generated, load_language_model
from brainfm_cli.models.language import TextEncoder, load_text_encoder
from brainfm_cli.simulation.viewing import draw_stimuli
from brainfm_cli.systems.brain_caption import BrainCaptionSettings
from brainfm_cli.systems.brain_caption.aligned import (
    AlignedCaptioner,
    CaptionFitSettings,
    CaptionWords,
    QFormerSettings,
    build_captioner,
    sentence_targets,
)
from brainfm_cli.systems.brain_caption.decoding import Alteration, BeamChoice, alter, list_viewings, scaled_responses, speak
from brainfm_cli.systems.brain_caption.encoder import PRESETS
from brainfm_cli.systems.brain_caption.floors import CaptionBank, fit_ridge
from brainfm_cli.systems.brain_caption.pretraining import PreparedEncoder, evaluate_encoder, fit_scale, prepare
from tests.learning.voxel_cohorts import SETTINGS, write_cohort
from tests.models.tiny_language import trained_llama, write_bert
from tests.systems.half_precision import assert_trains_in_half_precision

NANO = BrainCaptionSettings(kind="brain-caption", preset="nano")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> VoxelCohort:
    return write_cohort(tmp_path_factory.mktemp("viewers"))


@pytest.fixture(scope="module")
def language() -> CausalLanguageModel:
    return load_language_model(trained_llama())


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> TextEncoder:
    return load_text_encoder(write_bert(tmp_path_factory.mktemp("bert")))


@pytest.fixture
def prepared(cohort: VoxelCohort) -> PreparedEncoder:
    found = prepare(NANO, PretrainingSettings(batch_size=16), ImageSplitSettings(), cohort, ["01", "02"])
    fit_scale(found.system.model.scale, cohort, found.source.trials)
    return found


def captioner(prepared: PreparedEncoder, language: CausalLanguageModel, sentences: TextEncoder, **fit: object) -> AlignedCaptioner:
    settings = CaptionFitSettings(q_former=QFormerSettings(num_queries=8, width=48, num_layers=2, num_heads=2), **fit)  # type: ignore[arg-type]
    made = build_captioner(prepared.system, settings, language, contrast_width=sentences.width, seed=0)
    made.targets = sentence_targets(sentences, [text for one in prepared.source.cohort.stimuli.values() for text in one.captions])
    return made


def first_batch(source: TrialBatches, epoch: int = 0) -> TrialBatch:
    return source.training(epoch, rank=0, world_size=1)[0]


def test_presets_have_the_published_sizes() -> None:
    assert (PRESETS["large"].width, PRESETS["large"].num_layers, PRESETS["large"].num_heads) == (1024, 24, 16)
    assert (PRESETS["large"].decoder_width, PRESETS["large"].decoder_layers, PRESETS["large"].mlp_ratio) == (512, 8, 1.0)
    assert NANO.shape.width == 64


def test_targets_are_z_scores_and_predict_zero_is_their_variance(prepared: PreparedEncoder) -> None:
    terms = prepared.system.losses(first_batch(prepared.source), epoch=0.0)
    assert float(terms["monitor_predict_zero"]) == pytest.approx(1.0, abs=0.15)
    again = prepared.system.losses(first_batch(prepared.source), epoch=0.0)
    assert float(terms["patch"]) == float(again["patch"])  # masks depend on the trial and the epoch alone


def test_pretraining_beats_its_floors(tmp_path: Path) -> None:
    smooth = SETTINGS.model_copy(update={"images": 150, "voxels": 96, "voxel_spread": 0.0, "noise_ceiling": 0.6, "smoothness_mm": 40.0})
    found = prepare(
        NANO, PretrainingSettings(batch_size=32), ImageSplitSettings(), write_cohort(tmp_path, people=1, settings=smooth), ["01"]
    )
    fit_scale(found.system.model.scale, found.source.cohort, found.source.trials)
    torch.manual_seed(0)
    optimiser = torch.optim.AdamW(found.system.module.parameters(), lr=3e-3)
    for epoch in range(25):
        data = found.source.training(epoch, rank=0, world_size=1)
        for place in range(found.source.num_batches):
            optimiser.zero_grad()
            found.system.losses(data[place], epoch=epoch)["patch"].backward()
            optimiser.step()
    found.system.model.eval()
    table = evaluate_encoder(found, PretrainingSettings(batch_size=32))
    assert list(table["participant"]) == ["01"]
    assert (table["model"] < 0.95 * table["predict zero"]).all()
    assert (table["model"] < table["mean of neighbours"]).all()
    assert (table["correlation"] > 0.2).all()


def test_the_encoder_s_weights_are_taken_over(prepared: PreparedEncoder, language: CausalLanguageModel, sentences: TextEncoder) -> None:
    made = captioner(prepared, language, sentences)
    own, given = made.model.state_dict(), prepared.system.model.state_dict()
    assert all(torch.equal(own[name], given[name]) for name in own if not name.startswith("bridge."))
    fresh = captioner(prepared, language, sentences, pretrained=False).model.state_dict()
    assert not torch.equal(fresh["encoder.patch.weight"], given["encoder.patch.weight"])
    assert all(torch.equal(fresh[name], given[name]) for name in fresh if name.startswith(("scale.", "encoder.places_")))


def test_the_encoder_starts_late_and_slow(prepared: PreparedEncoder, language: CausalLanguageModel, sentences: TextEncoder) -> None:
    made = captioner(prepared, language, sentences)
    assert [made.rate_factor("encoder.patch.weight", progress) for progress in (0.0, 0.09, 0.11)] == [0.0, 0.0, 0.1]
    assert made.rate_factor("bridge.to_language.weight", 0.0) == 1.0
    assert captioner(prepared, language, sentences, pretrained=False).rate_factor("encoder.patch.weight", 0.0) == 1.0
    faster = captioner(prepared, language, sentences, lora_rate=8.0)
    assert [faster.rate_factor(name, 0.5) for name in ("language_parts.q_up", "bridge.to_language.weight")] == [8.0, 1.0]


def test_losses_by_phase_and_ablation(prepared: PreparedEncoder, language: CausalLanguageModel, sentences: TextEncoder) -> None:
    batch = first_batch(prepared.source)
    staged = captioner(prepared, language, sentences, contrast_epochs=2.0)
    assert "language" not in staged.losses(batch, epoch=1.9)
    assert staged.judge(1) is None
    assert {"language", "contrast"} <= set(staged.losses(batch, epoch=2.0))
    staged.losses(batch, epoch=float("inf"))
    assert staged.judge(2) is not None
    plain = captioner(prepared, language, sentences, alignment=False, contrast_epochs=2.0)
    assert set(plain.losses(batch, epoch=0.0)) == {"language"}


def test_the_language_model_is_in_no_state(prepared: PreparedEncoder, language: CausalLanguageModel, sentences: TextEncoder) -> None:
    made = captioner(prepared, language, sentences)
    before = language.fingerprint()
    terms = made.losses(first_batch(prepared.source), epoch=0.0)
    (terms["language"] + terms["contrast"]).backward()
    torch.optim.AdamW(made.module.parameters(), lr=0.1).step()
    assert language.fingerprint() == before
    assert all(name.startswith(("scale.", "encoder.", "bridge.")) for name in made.module.state_dict())
    grown = [name for name, weight in made.module.named_parameters() if weight.grad is not None and weight.grad.abs().sum() > 0]
    assert any(name.startswith("encoder.first.") for name in grown)


def test_low_rank_weights_are_trained_and_the_language_model_s_own_are_not(prepared: PreparedEncoder, sentences: TextEncoder) -> None:
    language = load_language_model(trained_llama())  # its own: low-rank weights are added to it
    before, batch = language.fingerprint(), first_batch(prepared.source)
    plain = captioner(prepared, load_language_model(trained_llama()), sentences).losses(batch, epoch=0.0)
    made = captioner(prepared, language, sentences, lora=2)
    terms = made.losses(batch, epoch=0.0)
    torch.testing.assert_close(terms["language"], plain["language"])  # nothing is added at the start
    terms["language"].backward()
    torch.optim.AdamW(made.module.parameters(), lr=0.02).step()
    assert language.fingerprint() == before
    added = {name: value for name, value in made.module.state_dict().items() if name.startswith("language_parts.")}
    assert len(added) == 2 * 2 * 2  # layers, queries and values, down and up
    assert any(value.abs().sum() > 0 for name, value in added.items() if name.endswith("up"))
    assert float(made.losses(batch, epoch=0.0)["language"]) < float(terms["language"])


def test_what_reads_vectors_learns_from_text_alone(
    prepared: PreparedEncoder, language: CausalLanguageModel, sentences: TextEncoder
) -> None:
    batch, before = first_batch(prepared.source), language.fingerprint()
    made = captioner(prepared, language, sentences, speaks_from="vector", text_noise=0.5)
    made.model.train()
    terms = made.losses(batch, epoch=0.0)
    other = replace(batch, responses=torch.randn_like(batch.responses))
    made.model.bridge.from_vector.batches_sentence.zero_()  # type: ignore[union-attr, operator]  # the first batch again
    assert float(made.losses(other, epoch=0.0)["language"]) == float(terms["language"])  # another brain, the same lesson
    terms["language"].backward()
    grown = {name for name, weight in made.module.named_parameters() if weight.grad is not None and weight.grad.abs().sum() > 0}
    assert {name.split(".")[1] for name in grown} == {"from_vector"}
    assert len(grown) == 4  # weights and biases of both layers
    torch.optim.AdamW(made.module.parameters(), lr=0.01).step()
    assert language.fingerprint() == before
    made.model.eval()
    own, foreign = made.losses(batch, epoch=0.0)["language"], made.losses(other, epoch=0.0)["language"]
    assert float(own) != float(foreign)  # in use the brain's vector is read
    prefix, vectors = made.model(batch.participant, batch.responses)
    torch.testing.assert_close(prefix, made.model.bridge.prefix_of(vectors, "brain"))


def test_what_reads_vectors_is_in_the_weights(
    prepared: PreparedEncoder, language: CausalLanguageModel, sentences: TextEncoder, tmp_path: Path
) -> None:
    batch = first_batch(prepared.source)
    made, again = (captioner(prepared, language, sentences, speaks_from="vector") for _ in range(2))
    made.model.train()
    for epoch in range(3):  # means are taken of both kinds
        made.losses(replace(batch, keys=batch.keys + epoch), epoch=float(epoch))
    made.model.eval()
    again.model.eval()
    before = again.model(batch.participant, batch.responses)[0]
    load_weights(again.model, write_tensors(tmp_path / "model.safetensors", made.model.state_dict()))
    found, wanted = (one.model(batch.participant, batch.responses)[0] for one in (again, made))
    torch.testing.assert_close(found, wanted)
    assert not torch.allclose(before, wanted)
    published = captioner(prepared, language, sentences)  # what an earlier version wrote
    assert not any(name.startswith("bridge.from_vector") for name in published.model.state_dict())
    with pytest.raises(CheckpointMismatchError, match=r"bridge\.from_vector"):
        load_weights(again.model, write_tensors(tmp_path / "published.safetensors", published.model.state_dict()))


def test_blurred_vectors_are_as_unlike_as_asked(prepared: PreparedEncoder, language: CausalLanguageModel, sentences: TextEncoder) -> None:
    batch = first_batch(prepared.source)
    kept = {}
    for noise in (0.0, 0.5, 2.0):
        made = captioner(prepared, language, sentences, speaks_from="vector", text_noise=noise)
        blurred = made._blurred(batch)
        torch.testing.assert_close(blurred, made._blurred(batch))  # the trial and the epoch alone decide
        kept[noise] = float((blurred * torch.stack([made.targets[one] for one in batch.captions])).sum(dim=1).mean())
    assert kept[0.0] == pytest.approx(1.0, abs=1e-5)
    assert kept[0.0] > kept[0.5] > kept[2.0]


def test_settings_that_teach_no_vector_are_refused() -> None:
    with pytest.raises(SettingsError, match="alignment"):
        CaptionFitSettings.from_values({"speaks_from": "vector", "alignment": False})


def test_the_brain_s_vector_chooses_among_beams(sentences: TextEncoder) -> None:
    texts = ("a dog", "a red cat", "a boat on the beach", "a cow", "a table", "a horse")
    said = Generated(texts=texts, log_probability=torch.tensor([-0.1, -0.2, -0.3, -0.4, -0.5, -0.6]))
    brains = functional.normalize(sentences.sentences([texts[2], texts[4]]), dim=1)
    likeliest = BeamChoice(sentences=sentences, weight=0.0).best(said, brains, 3)
    assert likeliest.texts == ("a dog", "a cow")
    chosen = BeamChoice(sentences=sentences, weight=1e4).best(said, brains, 3)
    assert chosen.texts == ("a boat on the beach", "a table")
    torch.testing.assert_close(chosen.log_probability, torch.tensor([-0.3, -0.5]))


def test_one_batch_can_be_learnt_by_heart(prepared: PreparedEncoder, language: CausalLanguageModel, sentences: TextEncoder) -> None:
    made = captioner(prepared, language, sentences, pretrained=False)
    whole, few = first_batch(prepared.source), slice(0, 6)
    batch = replace(
        whole,
        responses=whole.responses[few],
        keys=whole.keys[few],
        images=whole.images[few],
        names=whole.names[few],
        captions=whole.captions[few],
    )
    optimiser = torch.optim.AdamW(made.module.parameters(), lr=4e-3, weight_decay=0.0)
    made.model.train()
    for _ in range(400):
        optimiser.zero_grad()
        terms = made.losses(batch, epoch=0.0)
        (terms["language"] + 0.1 * terms["contrast"]).backward()
        optimiser.step()
    assert float(terms["language"]) < 0.5  # sums in another order (threads) end between 0.2 and 0.35
    assert float(terms["monitor_told_apart"]) > 0.9
    made.model.eval()
    said, _ = made.say(batch.participant, made.model.scale(batch.participant, batch.responses), max_tokens=24)
    right = [text.replace(" .", ".") == caption for text, caption in zip(said.texts, batch.captions, strict=True)]
    assert np.mean(right) >= 0.5
    # without the brain there is one sentence for all, which is right at most once; with voxels exchanged it is no better
    silent, _ = made.say(batch.participant, torch.zeros_like(batch.responses), max_tokens=24)
    assert len(set(silent.texts)) == 1
    exchanged = alter(made.model.scale(batch.participant, batch.responses), "shuffled", 0)
    wrong, _ = made.say(batch.participant, exchanged, max_tokens=24)
    assert np.mean([text.replace(" .", ".") == caption for text, caption in zip(wrong.texts, batch.captions, strict=True)]) <= 1 / 6


def test_pictures_never_seen_are_told_apart_and_by_chance_without_the_brain(
    tmp_path: Path, language: CausalLanguageModel, sentences: TextEncoder
) -> None:
    settings = SETTINGS.model_copy(update={"images": 160, "shared": 30})
    cohort = write_cohort(tmp_path, settings=settings)
    found = prepare(NANO, PretrainingSettings(batch_size=64), ImageSplitSettings(shared=True), cohort, ["01", "02"])
    fit_scale(found.system.model.scale, cohort, found.source.trials)
    made = captioner(found, language, sentences, pretrained=False, contrast_epochs=999.0)
    scenes = {one.name: one.features for index in (1, 2) for one in draw_stimuli(settings, seed=1, index=index)}
    made.targets = {name: functional.normalize(torch.from_numpy(features), dim=0) for name, features in scenes.items()}
    made.by_image = True
    made.model.bridge.to_contrast = torch.nn.Linear(48, len(next(iter(made.targets.values()))))
    optimiser = torch.optim.AdamW(made.module.parameters(), lr=3e-3, weight_decay=0.05)
    made.model.train()
    for epoch in range(20):
        batches = found.source.training(epoch, rank=0, world_size=1)
        for place in range(len(batches)):  # type: ignore[arg-type]
            optimiser.zero_grad()
            made.losses(batches[place], epoch=float(epoch))["contrast"].backward()
            optimiser.step()
    made.model.eval()
    first: dict[Alteration, list[bool]] = {"none": [], "zeroed": [], "shuffled": []}
    for trials in select_trials(cohort, found.split, ["01", "02"], "test"):
        viewings = list_viewings(trials, "repeats")
        wanted = torch.stack([made.targets[one.name] for one in viewings])
        scaled = scaled_responses(made.model.scale, cohort, viewings)
        for altered, right in first.items():
            with torch.no_grad():
                _, vectors = made.model.read(trials.participant, alter(scaled, altered, 0))
            right += ((vectors @ wanted.T).argmax(dim=1) == torch.arange(len(viewings))).tolist()
    assert len(first["none"]) == 60
    assert np.mean(first["none"]) > 0.3  # chance 1/30; about 0.47 from 260 training trials
    assert np.mean(first["zeroed"]) == pytest.approx(1 / 30)  # the same picture for everybody
    assert np.mean(first["shuffled"]) < 0.15


def test_words_are_read_off_the_prefix(language: CausalLanguageModel) -> None:
    captions = ["A red dog.", "A blue cat.", "A green cat."]
    words = CaptionWords(language, captions, temperature=0.07)
    names = dict(zip(language._tokenizer.convert_ids_to_tokens(words.ids.tolist()), words.weights.tolist(), strict=True))
    assert names["A"] == names["."] == 0.0
    assert names["dog"] > names["cat"] > 0.0
    said = language.vectors(language.tokens(["red dog"], end=False).ids)
    right, wrong = (float(words.loss(said, [text])) for text in ("A red dog.", "A blue cat."))
    assert right < 0.1 < 1.0 < wrong
    prefix = torch.randn(1, 2, language.width, requires_grad=True)
    words.loss(prefix, ["A red dog, never seen."]).backward()
    assert torch.isfinite(prefix.grad).all()


def test_words_are_read_in_half_precision_too(language: CausalLanguageModel) -> None:
    words = CaptionWords(language, ["a red dog", "a blue cat"], temperature=0.01)
    named = language.tokens(["red dog"], end=False).ids[0]
    prefix = language.vectors(named)[None].clone().requires_grad_()
    plain = words.loss(prefix, ["a red dog"])
    with torch.autocast("cpu", torch.bfloat16):
        found = words.loss(prefix, ["a red dog"])
    torch.testing.assert_close(found, plain)
    found.backward()
    assert torch.isfinite(prefix.grad).all()  # type: ignore[arg-type]


def test_viewings_average_repeats(prepared: PreparedEncoder, cohort: VoxelCohort) -> None:
    (trials,) = select_trials(cohort, prepared.split, ["01"], "test")
    averaged, single = list_viewings(trials, "repeats"), list_viewings(trials, "none")
    assert len(single) == 2 * len(averaged)
    scale = prepared.system.model.scale
    both = scaled_responses(scale, cohort, [one for one in single if one.name == averaged[0].name])
    torch.testing.assert_close(scaled_responses(scale, cohort, averaged[:1])[0], both.mean(0))


def test_taking_the_brain_away(
    prepared: PreparedEncoder, language: CausalLanguageModel, sentences: TextEncoder, cohort: VoxelCohort
) -> None:
    scaled = torch.randn(3, 70)
    assert not alter(scaled, "zeroed", 0).any()
    shuffled = alter(scaled, "shuffled", 0)
    assert not torch.equal(shuffled, scaled)
    torch.testing.assert_close(shuffled.sort(dim=1).values, scaled.sort(dim=1).values)
    made = captioner(prepared, language, sentences)
    made.model.eval()
    (trials,) = select_trials(cohort, prepared.split, ["01"], "test")
    viewings = list_viewings(trials, "repeats")
    spoken = speak(made, cohort, viewings, max_tokens=6)
    assert [one.viewing for one in spoken] == viewings
    small = speak(made, cohort, viewings, max_tokens=6, batch_size=3)
    assert [one.caption for one in small] == [one.caption for one in spoken]
    assert len({one.caption for one in speak(made, cohort, viewings, altered="zeroed", max_tokens=6)}) == 1


def test_ridge_is_scikit_learn_s(prepared: PreparedEncoder, cohort: VoxelCohort, sentences: TextEncoder) -> None:
    from sklearn.linear_model import Ridge

    captions = {name: one.captions for name, one in cohort.stimuli.items()}
    targets = sentence_targets(sentences, [text for said in captions.values() for text in said])
    train, held = (select_trials(cohort, prepared.split, ["01"], role)[0] for role in ("train", "validation"))
    scale = prepared.system.model.scale
    ridge = fit_ridge(scale, cohort, train, held, captions, targets)
    x = scaled_responses(scale, cohort, list_viewings(train, "repeats")).double()
    values = torch.linalg.eigvalsh(x @ x.T).clamp_min(0)
    from brainfm_cli.systems.brain_caption.floors import picture_vectors

    y = picture_vectors([one.name for one in list_viewings(train, "repeats")], captions, targets).double()
    oracle = Ridge(alpha=float(ridge.penalty * values.mean()), fit_intercept=False).fit(x.numpy(), (y - y.mean(0)).numpy())
    other = scaled_responses(scale, cohort, list_viewings(held, "repeats"))
    expected = oracle.predict(other.double().numpy()) + y.mean(0).numpy()
    np.testing.assert_allclose(ridge.predict(other).numpy(), expected, rtol=1e-2, atol=1e-4)


def test_nearest_captions() -> None:
    bank = CaptionBank(captions=("a", "b", "c"), vectors=torch.eye(3))
    assert bank.nearest(torch.tensor([[0.0, 3.0, 1.0]]))[0][0] == "b"
    assert bank.nearest(torch.tensor([[0.0, 3.0, 4.0]]))[0][1] == pytest.approx(0.8)


def test_vectors_of_pictures(tmp_path: Path, cohort: VoxelCohort) -> None:
    from brainfm_cli.errors import InputNotFoundError, UsageError
    from brainfm_cli.simulation import viewing_scenes as grammar
    from brainfm_cli.systems.brain_caption.pictures import read_picture_vectors
    from tests.models.tiny_language import write_vit

    vit = write_vit(tmp_path / "vit")
    with pytest.raises(UsageError, match="needs the pictures"):
        read_picture_vectors(vit, None, cohort)
    with pytest.raises(InputNotFoundError, match="picture is absent"):
        read_picture_vectors(vit, tmp_path, cohort)
    for name in cohort.stimuli:
        scene = grammar.all_scenes()[int(name.removeprefix("scene"))]
        (tmp_path / f"{name}.png").write_bytes(grammar.draw_picture(scene, 32))
    vectors = read_picture_vectors(vit, tmp_path, cohort)
    assert set(vectors) == set(cohort.stimuli)
    assert len({tuple(np.round(vector.numpy(), 5)) for vector in vectors.values()}) > 0.9 * len(vectors)
    table = tmp_path / "vectors.tsv"
    table.write_text("name\ta\tb\n" + "".join(f"{name}\t3\t4\n" for name in cohort.stimuli))
    assert next(iter(read_picture_vectors(table, None, cohort).values())).tolist() == pytest.approx([0.6, 0.8])


def test_half_precision_trains(prepared: PreparedEncoder, language: CausalLanguageModel, sentences: TextEncoder) -> None:
    assert_trains_in_half_precision(prepared.system, first_batch(prepared.source))
    assert_trains_in_half_precision(captioner(prepared, language, sentences), first_batch(prepared.source))
