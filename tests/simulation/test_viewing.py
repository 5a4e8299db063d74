"""Simulated viewers: what is planted is there, and perfect knowledge decodes it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.simulation import viewing_scenes as grammar
from brainfm_cli.simulation.viewing import ViewingSettings, bayes_decode, draw_stimuli, draw_viewer, view

SMALL = ViewingSettings(images=60, shared=20, voxels=120, repeats=4, trials_per_run=50, noise_ceiling=0.3)


def test_the_grammar_is_enumerated_once() -> None:
    scenes = grammar.all_scenes()
    assert len(set(scenes)) == len(scenes) == 16 * 6 * 5 * 15 * 8
    assert all(scene.thing != scene.other for scene in scenes)
    values = grammar.features(list(scenes[:7]))
    assert values.shape == (7, len(grammar.feature_slots()))
    slots = grammar.feature_slots()
    for slot in range(len(grammar.SLOTS)):
        assert (np.isclose(values[:, slots == slot].max(1) - values[:, slots == slot].min(1), 1)).all()
    assert grammar.scene_number(scenes[12345]) == 12345


def test_captions_speak_of_their_scene(generator: np.random.Generator) -> None:
    scene = grammar.Scene("dog", "red", "under", "table", "kitchen")
    assert grammar.full_caption(scene) == "A red dog under a table in the kitchen."
    said = grammar.captions(scene, 200, generator)
    assert all(any(word in text.lower() for word in ("dog", "puppy")) and "table" in text for text in said)
    assert 0.6 < np.mean(["red" in text for text in said]) < 0.9
    assert 0.6 < np.mean(["kitchen" in text for text in said]) < 0.9
    assert len(set(said)) > 10


def test_pictures_show_what_differs() -> None:
    scene = grammar.Scene("dog", "red", "under", "table", "kitchen")
    shown = [scene, *(grammar.Scene(**{slot: getattr(scene, slot) for slot in grammar.SLOTS} | {slot: value}) for slot, value in (("colour", "blue"), ("relation", "on"), ("place", "snow"), ("thing", "boat"), ("other", "chair")))]  # fmt: skip
    pictures = [np.asarray(Image.open(io.BytesIO(grammar.draw_picture(one, 64)))) for one in shown]
    assert all(picture.shape == (64, 64, 3) for picture in pictures)
    assert all((pictures[0] != other).mean() > 0.01 for other in pictures[1:])
    np.testing.assert_array_equal(pictures[0], np.asarray(Image.open(io.BytesIO(grammar.draw_picture(scene, 64)))))


def test_a_person_depends_on_seed_and_number_alone() -> None:
    one, again, other = (draw_viewer(SMALL, seed=3, index=index) for index in (2, 2, 5))
    np.testing.assert_array_equal(one.tuning, again.tuning)
    assert one.mask.sum() != other.mask.sum()
    stimuli = {index: draw_stimuli(SMALL, seed=3, index=index) for index in (2, 5)}
    assert [one.name for one in stimuli[2][:20]] == [one.name for one in stimuli[5][:20]]
    assert [one.captions for one in stimuli[2][:20]] == [one.captions for one in stimuli[5][:20]]
    own = {one.name for one in stimuli[2][20:]}
    assert len(own) == 40
    assert not own & {one.name for one in stimuli[2][:20]}
    assert len(own & {one.name for one in stimuli[5][20:]}) < 5


def test_the_stated_noise_ceiling_is_that_of_the_responses() -> None:
    settings = SMALL.model_copy(update={"images": 400, "shared": 0, "repeats": 2})
    viewer, stimuli = draw_viewer(settings, seed=1, index=1), draw_stimuli(settings, seed=1, index=1)
    trials = view(viewer, stimuli, settings, seed=1)
    assert viewer.ceilings.mean() == pytest.approx(0.3, abs=0.01)
    order = np.argsort(trials.stimuli, kind="stable").reshape(400, 2)
    first, second = trials.responses[order[:, 0]], trials.responses[order[:, 1]]
    measured = [np.corrcoef(first[:, voxel], second[:, voxel])[0, 1] for voxel in range(first.shape[1])]
    assert np.mean(measured) == pytest.approx(0.3, abs=0.04)
    assert np.corrcoef(measured, viewer.ceilings)[0, 1] > 0.9


def test_tuning_is_partly_common_to_people_at_one_place() -> None:
    settings = SMALL.model_copy(update={"common": 1.0, "voxels": 400})
    one, other = (draw_viewer(settings, seed=1, index=index) for index in (1, 2))
    shared = one.mask & other.mask
    rows = [viewer.tuning[shared[viewer.mask]] for viewer in (one, other)]
    assert np.corrcoef(rows[0].ravel(), rows[1].ravel())[0, 1] > 0.999
    apart = settings.model_copy(update={"common": 0.0})
    one, other = (draw_viewer(apart, seed=1, index=index) for index in (1, 2))
    rows = [viewer.tuning[shared[viewer.mask]] for viewer in (one, other)]
    assert abs(np.corrcoef(rows[0].ravel(), rows[1].ravel())[0, 1]) < 0.2


def test_perfect_knowledge_decodes_and_is_blind_without_an_effect() -> None:
    stimuli = draw_stimuli(SMALL, seed=1, index=1)
    candidates = np.stack([one.features for one in stimuli])
    viewer = draw_viewer(SMALL, seed=1, index=1)
    decoded = bayes_decode(viewer, stimuli, view(viewer, stimuli, SMALL, seed=1), candidates)
    assert (decoded.rank == 1).mean() > 0.9
    assert decoded.rank.mean() <= decoded.first_trial_rank.mean()
    right = np.mean([said.thing == one.scene.thing for said, one in zip(decoded.scenes, stimuli, strict=True) if one.scene])
    assert right > 0.8
    null = draw_viewer(SMALL, seed=1, index=1, effect=0.0)
    blind = bayes_decode(null, stimuli, view(null, stimuli, SMALL, seed=1), candidates, scenes=False)
    assert blind.rank.mean() == pytest.approx(30.5)
    # the likelihood is the decoder's: a wrong noise model ranks worse or equally well
    plain = ((view(viewer, stimuli, SMALL, seed=1).responses[:60] @ viewer.tuning) @ candidates.T).argmax(1)
    assert np.mean(plain == np.array(view(viewer, stimuli, SMALL, seed=1).stimuli[:60])) <= (decoded.first_trial_rank == 1).mean()


def test_captions_of_any_file_can_be_simulated(tmp_path: Path) -> None:
    words = ["dog", "cat", "boat", "tree", "car", "bird"]
    said = {
        f"{number:04d}": [f"A {words[number % 6]} near a {words[number // 6 % 6]}.", f"Some {words[number % 6]}."] for number in range(60)
    }
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(said))
    settings = ViewingSettings(images=30, shared=10, voxels=80, caption_file=path, captions=2)
    stimuli = draw_stimuli(settings, seed=1, index=1)
    assert len({one.name for one in stimuli}) == 30
    assert stimuli[0].captions == tuple(said[stimuli[0].name.removeprefix("img")])
    viewer = draw_viewer(settings, seed=1, index=1)
    assert viewer.tuning.shape[1] == len(stimuli[0].features)
    decoded = bayes_decode(viewer, stimuli, view(viewer, stimuli, settings, seed=1), np.stack([one.features for one in stimuli]))
    assert decoded.rank.mean() < 5
    assert decoded.scenes == ()
    with pytest.raises(InputDatasetError, match="fewer than the 99"):
        draw_stimuli(settings.model_copy(update={"images": 99}), seed=1, index=1)
