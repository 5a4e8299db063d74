"""The frozen language model: gradients reach what stands in front of it, and it says what the library says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from brainfm_cli.errors import CheckpointMismatchError, InputNotFoundError
from brainfm_cli.models.causal_language import CausalLanguageModel, load_language_model
from tests.models.tiny_language import trained_llama

SAID = ["A red dog on a table in the kitchen.", "A cat."]


@pytest.fixture(scope="module")
def folder() -> Path:
    return trained_llama()


@pytest.fixture(scope="module")
def language(folder: Path) -> CausalLanguageModel:
    return load_language_model(folder)


def test_loss_is_the_library_s_own(folder: Path, language: CausalLanguageModel) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    prefix = torch.randn(2, 3, language.width)
    said = language.tokens(SAID)
    found = language.loss(prefix, said)
    for place in range(2):
        ids = said.ids[place][said.valid[place]][None]
        inputs = torch.cat([prefix[place : place + 1], model.get_input_embeddings()(ids)], dim=1)
        labels = torch.cat([torch.full((1, 3), -100), ids], dim=1)
        assert float(found[place]) == pytest.approx(float(model(inputs_embeds=inputs, labels=labels).loss), abs=1e-5)
    assert said.ids[1, : said.valid[1].sum()].tolist()[-1] == language.end


def test_gradients_reach_the_prefix_and_nothing_else(language: CausalLanguageModel) -> None:
    prefix = torch.randn(2, 3, language.width, requires_grad=True)
    before = language.fingerprint()
    language.loss(prefix, language.tokens(SAID)).mean().backward()
    assert prefix.grad is not None
    assert (prefix.grad.abs().sum(dim=(1, 2)) > 0).all()
    assert all(weight.grad is None for weight in language._model.parameters())
    assert language.fingerprint() == before


def test_a_prefix_learns_to_make_the_model_speak(language: CausalLanguageModel) -> None:
    torch.manual_seed(0)
    prefix = (0.1 * torch.randn(2, 6, language.width)).requires_grad_()
    said = language.tokens(SAID)
    optimiser = torch.optim.Adam([prefix], lr=0.05)
    for _ in range(300):
        optimiser.zero_grad()
        loss = language.loss(prefix, said).mean()
        loss.backward()
        optimiser.step()
    spoken = language.generate(prefix.detach(), max_tokens=20)
    assert spoken.texts == ("A red dog on a table in the kitchen .", "A cat .")
    torch.testing.assert_close(spoken.log_probability, -language.loss(prefix.detach(), said), atol=1e-4, rtol=1e-3)
    assert language.generate(prefix.detach(), beams=3, max_tokens=20).texts == spoken.texts


def test_every_beam_is_given_back_the_likeliest_first(language: CausalLanguageModel) -> None:
    torch.manual_seed(1)
    prefix = torch.randn(3, 4, language.width)
    every = language.generate(prefix, beams=4, max_tokens=12, every=True)
    best = language.generate(prefix, beams=4, max_tokens=12)
    assert every.texts[::4] == best.texts
    torch.testing.assert_close(every.log_probability[::4], best.log_probability)
    scores = every.log_probability.view(3, 4)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert all(len(set(every.texts[start : start + 4])) == 4 for start in (0, 4, 8))


def test_generation_stops_at_the_longest_caption(language: CausalLanguageModel) -> None:
    torch.manual_seed(3)
    spoken = language.generate(torch.randn(3, 2, language.width), max_tokens=4)
    assert len(spoken.texts) == 3
    assert all(len(text.split()) <= 4 for text in spoken.texts)
    assert torch.isfinite(spoken.log_probability).all()
    assert (spoken.log_probability < 0).all()


def test_questions_stand_behind_the_vectors(language: CausalLanguageModel) -> None:
    before = torch.randn(1, 4, language.width)
    asked = language.chat_prefix(before, "what colour is it ?")
    again = language.chat_prefix(before, "what is it ?", [("what colour is it ?", "red")])
    assert again.shape[1] > asked.shape[1]
    torch.testing.assert_close(asked[:, 1:5], before)  # behind the one word "user"


TURNS = [[("a cat ?", "a dog"), ("the house ?", "a red cat")], [("it is ?", "a chair")]]


def test_the_loss_of_a_dialogue_is_the_library_s_own(folder: Path, language: CausalLanguageModel) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(4)
    before = torch.randn(2, 3, language.width)
    said = language.dialogues(TURNS, room=3, longest=64)
    found = language.dialogue_loss(before, said)
    for place in range(2):
        there = said.valid[place]
        inputs = language.vectors(said.ids[place][there]).clone()
        inputs[said.room[place][there]] = before[place]
        labels = said.ids[place][there].masked_fill(~said.learnt[place][there], -100)
        expected = model(inputs_embeds=inputs[None], labels=labels[None]).loss
        assert float(found[place]) == pytest.approx(float(expected.detach()), abs=1e-5)
    spoken = [language._tokenizer.decode(row[kept]).replace(" ", "") for row, kept in zip(said.ids, said.learnt, strict=True)]
    assert spoken == ["adog<end>aredcat<end>", "achair<end>"]


def test_what_is_asked_stands_as_it_was_learnt(language: CausalLanguageModel) -> None:
    """The prefix of the last question is the dialogue up to its answer, the earlier answers included."""
    before = torch.randn(1, 3, language.width)
    said = language.dialogues(TURNS[:1], room=3, longest=64)
    last = int(said.learnt[0].nonzero()[-4])  # "a red cat" and its end
    asked = language.chat_prefix(before, "the house ?", TURNS[0][:1])
    whole = language.vectors(said.ids).masked_scatter(said.room[:, :, None], before)
    torch.testing.assert_close(asked, whole[:, :last])


def test_long_dialogues_are_cut(language: CausalLanguageModel) -> None:
    assert language.dialogues(TURNS, room=3, longest=9).ids.shape == (2, 9)


def test_prefixes_of_several_lengths_are_continued_as_if_alone(language: CausalLanguageModel) -> None:
    torch.manual_seed(5)
    short, long = torch.randn(1, 3, language.width), torch.randn(1, 6, language.width)
    padded = torch.cat([torch.cat([torch.zeros(1, 3, language.width), short], dim=1), long])
    valid = torch.tensor([[False] * 3 + [True] * 3, [True] * 6])
    together = language.generate(padded, max_tokens=8, valid=valid)
    for place, alone in enumerate((short, long)):
        one = language.generate(alone, max_tokens=8)
        assert together.texts[place] == one.texts[0]
        torch.testing.assert_close(together.log_probability[place], one.log_probability[0], atol=1e-4, rtol=1e-3)


def test_what_is_no_language_model_is_refused(tmp_path: Path, folder: Path) -> None:
    with pytest.raises(InputNotFoundError):
        load_language_model(tmp_path / "absent")
    with pytest.raises(CheckpointMismatchError):
        load_language_model(tmp_path)
    (tmp_path / "damaged").mkdir()
    for path in folder.iterdir():
        (tmp_path / "damaged" / path.name).write_bytes(path.read_bytes()[:100] if path.suffix == ".safetensors" else path.read_bytes())
    with pytest.raises(CheckpointMismatchError, match="cannot be read"):
        load_language_model(tmp_path / "damaged")
