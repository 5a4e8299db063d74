"""What reads a study: absent slices do not matter, every parameter learns, both bridges give vectors of the language model's size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from brainfm_cli.models.mri_encoder import Context
from brainfm_cli.models.q_former import QFormerShape
from brainfm_cli.models.study_reader import Bridge, StudyShape, StudySpeaker

FEATURES = 12


def speaker(bridge: Bridge = "perceiver") -> StudySpeaker:
    torch.manual_seed(0)
    made = StudySpeaker(
        StudyShape(width=16, num_layers=2, num_heads=2), bridge, QFormerShape(num_queries=3, width=16, num_layers=2, num_heads=2),
        features=FEATURES, language_width=20, contrast_width=7, token_norm=2.5,
    )  # fmt: skip
    made.reader.set_scale(torch.zeros(FEATURES), torch.ones(FEATURES))
    return made.eval()


def context(batch: int, slices: int) -> Context:
    numbers = torch.arange(batch * slices).view(batch, slices)
    return Context(sequence=numbers % 4, plane=numbers % 3, z_mm=numbers.float() * 3 - 20)


@pytest.mark.parametrize("bridge", ["perceiver", "mlp"])
def test_absent_slices_change_nothing_and_present_ones_do(bridge: Bridge) -> None:
    model, slices = speaker(bridge), torch.randn(2, 5, FEATURES)
    present = torch.tensor([[True] * 5, [True, True, True, False, False]])
    prefix, study = model(slices, present, context(2, 5))
    assert prefix.shape == (2, 3, 20)
    torch.testing.assert_close(prefix.norm(dim=-1), torch.full((2, 3), 2.5))
    torch.testing.assert_close(study.norm(dim=-1), torch.ones(2))
    changed = slices.clone()
    changed[1, 3:] = 99.0
    for one, other in zip((prefix, study), model(changed, present, context(2, 5)), strict=True):
        torch.testing.assert_close(one, other)
    short = replace(context(2, 5), **{name: getattr(context(2, 5), name)[1:, :3] for name in ("sequence", "plane", "z_mm")})
    alone, _ = model(slices[1:, :3], present[1:, :3], short)
    torch.testing.assert_close(alone, prefix[1:], atol=1e-5, rtol=1e-4)
    changed[1, 0] += 1.0
    assert not torch.allclose(model(changed, present, context(2, 5))[0][1], prefix[1])


def test_height_and_sequence_of_a_slice_are_known() -> None:
    model, slices, present = speaker(), torch.randn(1, 5, FEATURES), torch.ones(1, 5, dtype=torch.bool)
    first, _ = model(slices, present, context(1, 5))
    for name in ("sequence", "plane", "z_mm"):
        moved = replace(context(1, 5), **{name: getattr(context(1, 5), name).roll(1, dims=1)})
        assert not torch.allclose(model(slices, present, moved)[0], first)


@pytest.mark.parametrize("bridge", ["perceiver", "mlp"])
def test_every_parameter_gets_a_gradient(bridge: Bridge) -> None:
    model = speaker(bridge).train()
    prefix, study = model(torch.randn(3, 12, FEATURES), torch.ones(3, 12, dtype=torch.bool), context(3, 12))
    (prefix.square() @ torch.randn(20)).sum().add((study @ torch.randn(7)).sum()).backward()
    assert [name for name, one in model.named_parameters() if one.grad is None or not one.grad.abs().sum()] == []
