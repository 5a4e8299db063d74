"""The voxel encoder: padding counts for nothing, hidden patches are hidden, people are told apart, and it learns."""

from __future__ import annotations

import pytest
import torch

from brainfm_cli.models.voxel_encoder import (
    Viewer,
    VoxelModel,
    VoxelPatches,
    VoxelShape,
    choose_hidden_patches,
    masked_voxel_loss,
    patch_places,
    predict_from_neighbours,
)

TINY = VoxelShape(width=32, num_layers=1, num_heads=2, decoder_width=16, decoder_layers=1, decoder_heads=2)


def viewer(voxels: int, seed: int = 0) -> Viewer:
    return Viewer(places_mm=30 * torch.randn(voxels, 3, generator=torch.Generator().manual_seed(seed)))


@pytest.fixture
def model() -> VoxelModel:
    torch.manual_seed(0)
    return VoxelModel(TINY, {"01": viewer(100), "02": viewer(64, 1)}).eval()


@pytest.mark.parametrize(("voxels", "patches", "filled"), [(64, 4, 0), (65, 5, 15), (100, 7, 12), (16, 1, 0)])
def test_patches_are_as_many_as_needed(voxels: int, patches: int, filled: int) -> None:
    places, real = patch_places(torch.ones(voxels, 3), 16)
    assert real.shape == (patches, 16)
    assert int((~real).sum()) == filled
    torch.testing.assert_close(places, torch.ones(patches, 3))


def test_filling_counts_for_nothing(model: VoxelModel) -> None:
    patches = model.patches("01", torch.randn(3, 100))
    assert not patches.values[:, ~patches.real].any()
    hidden = torch.zeros(3, 7, dtype=torch.bool)
    hidden[:, -1] = True
    predicted = patches.values.clone()
    predicted[:, ~patches.real] = 100.0
    assert float(masked_voxel_loss(predicted, patches, hidden)) == 0.0
    predicted[:, -1, 0] += 2.0
    assert float(masked_voxel_loss(predicted, patches, hidden)) == pytest.approx(4.0 / 4)  # four real voxels in the last patch


def test_hidden_patches_do_not_reach_the_encoder(model: VoxelModel) -> None:
    first = torch.randn(2, 100)
    hidden = choose_hidden_patches(torch.rand(2, 7), 0.75)
    assert hidden.sum(dim=1).tolist() == [5, 5]
    second = first.clone()
    for item in range(2):
        for patch in torch.nonzero(hidden[item]).ravel().tolist():
            second[item, 16 * patch : 16 * (patch + 1)] += 5.0
    one, two = (model.reconstruct(model.patches("01", values), hidden) for values in (first, second))
    torch.testing.assert_close(one[0], two[0])
    torch.testing.assert_close(one[1].summary, two[1].summary)
    visible = first.clone()
    patch = int(torch.nonzero(~hidden[0]).ravel()[0])
    visible[0, 16 * patch] += 5.0
    assert not torch.allclose(model.reconstruct(model.patches("01", visible), hidden)[0][0], one[0][0])


def test_nothing_is_hidden_in_use(model: VoxelModel) -> None:
    encoding = model.encoder(model.patches("01", torch.randn(2, 100)))
    assert encoding.tokens.shape == (2, 7, 32)
    assert encoding.order.tolist() == [list(range(7))] * 2


def test_people_and_places_matter(model: VoxelModel) -> None:
    values = torch.randn(2, 64)
    one = model.encoder(model.patches("02", values)).summary
    twin = VoxelModel(TINY, {"01": viewer(100), "02": viewer(64, 1)}).eval()
    twin.load_state_dict(model.state_dict())
    twin.encoder.get_buffer("places_02").mul_(-1)
    assert not torch.allclose(twin.encoder(twin.patches("02", values)).summary, one, atol=1e-4)
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        twin.encoder.people["02"].mul_(-3)
    assert not torch.allclose(twin.encoder(twin.patches("02", values)).summary, one, atol=1e-4)


def test_a_shared_first_layer_has_no_parts_of_one_person() -> None:
    shape = VoxelShape(**{**vars(TINY), "first_layer": "shared"})
    model = VoxelModel(shape, {"01": viewer(100)})
    assert not [name for name, _ in model.named_parameters() if name.startswith(("encoder.first", "last"))]
    assert model.encoder(model.patches("01", torch.randn(2, 100))).summary.shape == (2, 32)


def test_a_constant_voxel_is_zero_and_statistics_are_taken_over(model: VoxelModel) -> None:
    mean, sd = torch.arange(64.0), torch.full((64,), 2.0)
    sd[3] = 0.0
    model.scale.set("02", mean, sd)
    scaled = model.scale("02", mean + 4.0)
    assert float(scaled[3]) == 0.0
    assert float(scaled[4]) == 2.0


def test_neighbours_are_the_nearest_visible_patches() -> None:
    real = torch.ones(4, 2, dtype=torch.bool)
    values = torch.tensor([[[1.0, 1.0], [2.0, 2.0], [30.0, 50.0], [4.0, 4.0]]])
    centres = torch.tensor([[0.0, 0, 0], [1, 0, 0], [1.5, 0, 0], [9, 0, 0]])
    hidden = torch.tensor([[False, False, True, False]])
    found = predict_from_neighbours(VoxelPatches(participant="x", values=values, real=real), centres, hidden)
    assert found[0, 2].tolist() == [1.5, 1.5]


def test_it_learns_to_fill_in_what_neighbours_share() -> None:
    torch.manual_seed(0)
    model = VoxelModel(TINY, {"01": viewer(96)})
    mixing = torch.randn(3, 96)
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(250):
        responses = torch.randn(32, 3) @ mixing / 3**0.5
        patches = model.patches("01", responses)
        hidden = choose_hidden_patches(torch.rand(32, 6), 0.5)
        loss = masked_voxel_loss(model.reconstruct(patches, hidden)[0], patches, hidden)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss) / float(masked_voxel_loss(torch.zeros_like(patches.values), patches, hidden)))
    assert sum(losses[-20:]) / 20 < 0.5
