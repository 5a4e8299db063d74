"""The decoder of hidden regions and the contrast projection."""

from __future__ import annotations

import pytest
import torch

from brainfm_cli.models.heads import ContrastHead, NodeDecoder

WIDTH, REGIONS = 16, 6


@pytest.fixture
def decoder() -> NodeDecoder:
    torch.manual_seed(0)
    return NodeDecoder(WIDTH, {"Other": 9, "Toy": REGIONS}, feedforward=24).eval()


@pytest.fixture
def inputs() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    hidden = torch.zeros(2, REGIONS, dtype=torch.bool)
    hidden[0, 1] = hidden[1, [2, 4]] = True
    present = torch.ones(2, REGIONS, dtype=torch.bool)
    present[0, 5] = False
    return {"nodes": torch.randn(2, REGIONS, WIDTH), "hidden": hidden, "present": present, "identity": torch.randn(REGIONS, WIDTH)}


def test_a_hidden_regions_vector_is_never_read(decoder: NodeDecoder, inputs: dict[str, torch.Tensor]) -> None:
    first = decoder(**inputs)
    changed = torch.where(inputs["hidden"][:, :, None], 50.0, inputs["nodes"])
    assert torch.equal(decoder(**inputs | {"nodes": changed}), first)
    seen = inputs["nodes"].clone()
    seen[0, 0] += 1
    moved = (decoder(**inputs | {"nodes": seen}) - first).abs().amax(dim=2)
    assert moved[0, 1] > 1e-4  # hidden regions are told from visible ones
    assert not moved[1].any()


def test_hidden_regions_are_told_apart_by_identity(decoder: NodeDecoder, inputs: dict[str, torch.Tensor]) -> None:
    decoded = decoder(**inputs)
    assert (decoded[1, 2] - decoded[1, 4]).abs().max() > 1e-2
    alike = inputs | {"identity": torch.zeros(REGIONS, WIDTH)}
    torch.testing.assert_close(decoder(**alike)[1, 2], decoder(**alike)[1, 4])


def test_absent_regions_are_not_attended_to(decoder: NodeDecoder, inputs: dict[str, torch.Tensor]) -> None:
    first = decoder(**inputs)
    changed = inputs["nodes"].clone()
    changed[0, 5] = 50.0
    other = decoder(**inputs | {"nodes": changed})
    assert torch.equal(other[0, :5], first[0, :5])
    everyone = decoder(**inputs | {"present": None, "nodes": changed})
    assert not torch.equal(everyone[0, :5], first[0, :5])


def test_rows_and_edges_are_products_of_decoded_vectors(decoder: NodeDecoder, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        decoder.offset["Toy"].normal_()
        decoder.edge_shift.fill_(-2.0)
    decoded = decoder(**inputs).detach()
    rows, logits = decoder.rows(decoded, "Toy"), decoder.edge_logits(decoded)
    columns, offset = decoder.columns["Toy"], decoder.offset["Toy"]
    centred = decoded - decoded.mean(dim=1, keepdim=True)
    for item in range(2):
        for i in range(REGIONS):
            for j in range(REGIONS):
                torch.testing.assert_close(rows[item, i, j], decoded[item, i] @ columns[j] + offset[j])
                cosine = torch.cosine_similarity(centred[item, i], centred[item, j], dim=0)
                torch.testing.assert_close(logits[item, i, j], cosine - 2, atol=1e-5, rtol=1e-5)
    assert decoder.rows(decoded, "Other").shape == (2, REGIONS, 9)


def test_contrast_vectors_have_length_one_and_keep_direction_only() -> None:
    torch.manual_seed(0)
    head = ContrastHead(WIDTH, 8)
    readout = torch.randn(5, 2 * WIDTH)
    vectors = head(readout)
    assert vectors.shape == (5, 8)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(5))
    raw = head.layers(readout)
    torch.testing.assert_close(vectors * raw.norm(dim=1, keepdim=True), raw)
