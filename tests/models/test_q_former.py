"""Q-Former, its two outlets and the contrast with several positives."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from brainfm_cli.models.q_former import BrainBridge, QFormer, QFormerShape, same_image_contrast

TINY = QFormerShape(num_queries=4, width=16, num_layers=3, num_heads=2)


def test_every_second_layer_looks_at_the_brain() -> None:
    former = QFormer(TINY, 24)
    assert sorted(former.cross) == ["0", "2"]
    tokens = torch.randn(2, 7, 24)
    found = former(tokens)
    assert found.shape == (2, 4, 16)
    order = torch.cat([torch.tensor([0]), 1 + torch.randperm(6)])  # tokens carry their place themselves; the first is the summary
    torch.testing.assert_close(former(tokens[:, order]), found, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(former(tokens + 1.5 * torch.randn(2, 7, 24)), found, atol=1e-3)


def test_queries_start_from_the_summary_unless_published() -> None:
    for from_summary in (True, False):
        former = QFormer(replace(TINY, from_summary=from_summary), 24)
        for cross in former.cross.values():  # nothing can come by attention
            torch.nn.init.zeros_(cross.merge.weight)
        tokens = torch.randn(2, 7, 24)
        other_summary, other_tokens = tokens.clone(), tokens.clone()
        other_summary[:, 0] += torch.randn(2, 24)
        other_tokens[:, 1:] += torch.randn(2, 6, 24)
        found = former(tokens)
        assert torch.allclose(former(other_summary), found) != from_summary
        assert torch.allclose(former(other_tokens), found)


def test_prefixes_are_as_long_as_token_vectors() -> None:
    bridge = BrainBridge(TINY, token_width=24, language_width=40, contrast_width=12, token_norm=3.5)
    prefix, vector = bridge(torch.randn(5, 7, 24))
    assert prefix.shape == (5, 4, 40)
    torch.testing.assert_close(prefix.norm(dim=2), torch.full((5, 4), 3.5))
    torch.testing.assert_close(vector.norm(dim=1), torch.ones(5))


def test_without_repeats_the_contrast_is_cross_entropy() -> None:
    brains, others = (functional.normalize(torch.randn(6, 8), dim=1) for _ in range(2))
    found = same_image_contrast(brains, others, torch.arange(6), temperature=0.1)
    logits, own = brains @ others.T / 0.1, torch.arange(6)
    expected = 0.5 * (functional.cross_entropy(logits, own) + functional.cross_entropy(logits.T, own))
    assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_rows_of_one_image_are_no_negatives() -> None:
    vector = functional.normalize(torch.randn(1, 8), dim=1)
    apart = functional.normalize(torch.randn(2, 8), dim=1)
    brains = torch.cat([vector, vector, apart])
    images = torch.tensor([0, 0, 1, 2])
    together = same_image_contrast(brains, brains, images, temperature=0.05)
    told_apart = same_image_contrast(brains, brains, torch.arange(4), temperature=0.05)
    assert float(together) == pytest.approx(float(told_apart), rel=0.2)  # the two cannot be told apart either way …
    worse = same_image_contrast(brains, torch.cat([vector, -vector, apart]), images, temperature=0.05)
    assert float(worse) > float(together) + 1.0  # … but a positive that lies elsewhere costs


def test_each_kind_of_vector_is_taken_from_its_own_mean() -> None:
    torch.manual_seed(0)
    bridge = BrainBridge(TINY, token_width=24, language_width=40, contrast_width=12, token_norm=2.0).read_vectors()
    reader, sentences = bridge.from_vector, torch.randn(64, 12)
    assert reader is not None
    brains = sentences + 3.0 * torch.randn(12)  # the same but for where they lie
    for kind, vectors in (("brain", brains), ("sentence", sentences)):
        for part in vectors.split(16):
            reader.count(part, kind)
    torch.testing.assert_close(reader.mean_brain, brains.mean(dim=0))
    torch.testing.assert_close(bridge.prefix_of(brains, "brain"), bridge.prefix_of(sentences, "sentence"), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(bridge.prefix_of(brains, "sentence"), bridge.prefix_of(sentences, "sentence"), atol=1e-2)
    tokens = torch.randn(4, 5, 24)
    before = reader.mean_brain.clone()
    bridge.eval()(tokens)
    torch.testing.assert_close(reader.mean_brain, before)  # use changes nothing
    bridge.train()(tokens)
    assert not torch.allclose(reader.mean_brain, before)
    before = reader.mean_brain.clone()
    reader.requires_grad_(requires_grad=False)  # as when a person is added
    bridge(tokens)
    torch.testing.assert_close(reader.mean_brain, before)
