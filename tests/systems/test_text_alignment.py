"""What texts state, how couplings are measured and matched, and the controls of zero-shot scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import linalg
from sklearn.metrics import log_loss

from brainfm_cli.atlases.catalogue import find_atlas
from brainfm_cli.atlases.membership import near_networks
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.targets import Target
from brainfm_cli.learning.texts import DisorderText, packaged_networks
from brainfm_cli.learning.zero_shot import binary_target, compare_shuffled, retrieve, shuffled_texts
from brainfm_cli.models.readouts import SHRINKAGE, network_couplings
from brainfm_cli.models.text_alignment import sigmoid_contrast
from brainfm_cli.models.text_conditioning import ClauseCondition, NetworkNames, StatedCouplings, coupling_pairs
from brainfm_cli.records import RegionTable
from brainfm_cli.simulation.anatomy import YEO_NETWORKS


def correlations(people: int, regions: int, seed: int = 0) -> torch.Tensor:
    series = np.random.default_rng(seed).normal(size=(people, 90, regions)) @ np.eye(regions) + np.random.default_rng(1).normal(
        size=(people, 90, 1)
    )
    matrices = np.stack([np.corrcoef(one, rowvar=False) for one in series])
    matrices[:, np.arange(regions), np.arange(regions)] = 0
    return torch.from_numpy(matrices)


def test_couplings_are_the_logarithm_of_the_networks_covariance():
    regions, networks = 12, 3
    correlation, shares = (
        correlations(4, regions),
        torch.rand(regions, networks, generator=torch.Generator().manual_seed(2), dtype=torch.float64),
    )
    found = network_couplings(correlation, torch.ones(4, regions, dtype=torch.bool), shares).numpy()
    for one, matrix in zip(found, correlation.numpy(), strict=True):
        weights = (shares / shares.sum(0)).numpy()
        covariance = weights.T @ (matrix + np.eye(regions)) @ weights
        expected = linalg.logm(covariance / np.diag(covariance).mean() + SHRINKAGE * np.eye(networks))
        np.testing.assert_allclose(one, expected[np.triu_indices(networks)], atol=1e-5)


def test_absent_regions_and_empty_networks_leave_the_other_couplings_as_they_are():
    correlation = correlations(3, 9)
    shares = torch.zeros(9, 3)
    shares[:5, 0] = shares[5:, 1] = 1
    present = torch.ones(3, 9, dtype=torch.bool)
    present[:, 8] = False
    gone = correlation.clone()
    gone[:, 8] = gone[:, :, 8] = 0
    found = network_couplings(gone, present, shares)
    smaller = network_couplings(correlation[:, :8, :8], present[:, :8], shares[:8])
    torch.testing.assert_close(found, smaller)
    pairs = coupling_pairs(3)
    assert torch.all(found[:, [pairs.index((0, 2)), pairs.index((1, 2))]].abs() < 1e-6)


def test_regions_near_parcels_of_a_network_belong_to_it():
    regions = find_atlas("Schaefer100").regions
    shares = near_networks(regions, YEO_NETWORKS)
    own = np.array([YEO_NETWORKS.index(str(name)) for name in regions.networks])
    assert np.mean(shares.argmax(1) == own) > 0.85
    np.testing.assert_allclose(shares.sum(1), 1)


def test_deep_structures_belong_to_no_cortical_network():
    regions = find_atlas("AAL116").regions
    total = near_networks(regions, YEO_NETWORKS).sum(1)
    deep = np.array([name.startswith(("Thalamus", "Putamen", "Caudate", "Vermis", "Cerebelum_8")) for name in regions.names])
    cortical = np.array([name.startswith(("Precentral", "Calcarine", "Cuneus", "Angular", "Precuneus")) for name in regions.names])
    assert np.all(total[deep] == 0)
    np.testing.assert_allclose(total[cortical], 1)


def test_an_atlas_without_networks_and_centres_is_refused():
    with pytest.raises(InputDatasetError, match="neither networks nor centres"):
        near_networks(RegionTable(names=("a", "b")), YEO_NETWORKS)


def stated(names: NetworkNames, pair: tuple[int, int], sign: float) -> StatedCouplings:
    ends = names.networks[list(pair)]
    return StatedCouplings(ends=ends[None], clauses=names.couplings[:1], placed=torch.tensor([True]), signs=torch.tensor([sign]))


@pytest.fixture
def condition() -> tuple[ClauseCondition, NetworkNames]:
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize
    names = NetworkNames(
        networks=unit(torch.randn(4, 32, generator=generator), dim=1), couplings=unit(torch.randn(10, 32, generator=generator), dim=1)
    )
    return ClauseCondition(8, 32), names


@pytest.mark.parametrize("pair", [(0, 0), (1, 3)])
def test_a_statement_points_at_its_coupling_alone(condition, pair):
    module, names = condition
    direction = module.direction(stated(names, pair, 1.0), names)
    place = coupling_pairs(4).index(pair)
    expected = torch.zeros(10)
    expected[place] = 1.0
    torch.testing.assert_close(direction, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(module.direction(stated(names, pair, -1.0), names), -direction)


def test_a_text_that_states_nothing_gives_everybody_the_same_score(condition):
    module, names = condition
    directions = torch.stack([module.direction(StatedCouplings.none(32), names), module.direction(stated(names, (0, 1), 1.0), names)])
    logits = module(directions, torch.randn(20, 10), torch.eye(10), torch.randn(20, 4, 8))
    assert torch.all(logits[:, 0] == logits[0, 0])
    assert logits[:, 1].std() > 0


def test_logits_follow_the_equation(condition):
    module, _ = condition
    torch.nn.init.constant_(module.whitened_gain, 0.7)
    torch.nn.init.normal_(module.bilinear)
    generator = torch.Generator().manual_seed(3)
    couplings, nodes = torch.randn(6, 10, generator=generator), torch.randn(6, 4, 8, generator=generator)
    root = torch.randn(10, 10, generator=generator)
    inverse = root @ root.T + torch.eye(10)
    direction = torch.randn(10, generator=generator)
    normed = module.norm(nodes)
    reading = torch.stack(
        [(normed[:, first] * normed[:, second] * module.bilinear).sum(1) / 8**0.5 for first, second in coupling_pairs(4)], dim=1
    )
    total = couplings + reading
    expected = total @ direction / direction.norm() + 0.7 * total @ (inverse @ direction) / (direction @ inverse @ direction).sqrt()
    torch.testing.assert_close(module(direction[None], couplings, inverse, nodes)[:, 0], expected)


def test_the_contrast_is_a_balanced_logistic_loss():
    rng = np.random.default_rng(0)
    logits, pairs = rng.normal(size=(30, 4)), rng.random((30, 4)) < 0.3
    found = float(sigmoid_contrast(torch.from_numpy(logits), torch.from_numpy(pairs)))
    expected = [
        log_loss(pair, 1 / (1 + np.exp(-column)), sample_weight=np.where(pair, 1 / pair.sum(), 1 / (~pair).sum()))
        for column, pair in zip(logits.T, pairs.T, strict=True)
    ]
    assert found == pytest.approx(np.mean(expected), abs=1e-12)


def test_control_texts_state_as_much_and_are_balanced():
    words = packaged_networks()
    called = [words.words_of(name) for name in YEO_NETWORKS]
    texts = shuffled_texts(3, called, 20, seed=0)
    facts = [text.facts(words) for text in texts]
    assert [len(one) for one in facts] == [3] * 20
    assert sum(fact.sign for one in facts for fact in one) == 0
    assert len({tuple(sorted((fact.first.network, (fact.second or fact.first).network, fact.sign) for fact in one)) for one in facts}) == 20
    assert shuffled_texts(3, called, 20, seed=0) == texts


def test_shuffled_scores_count_the_texts_that_do_as_well():
    labels = np.array([0, 0, 0, 1, 1, 1])
    own = np.array([0.0, 1, 2, 3, 4, 5])
    others = np.stack([own, -own, np.array([5.0, 0, 1, 2, 3, 4])], axis=1)
    found = compare_shuffled(own, others, labels)
    assert found.mean == pytest.approx((1 + 0 + 2 / 3) / 3, abs=1e-4)
    assert found.share_above == pytest.approx((1 + 1) / 4)


def test_retrieval_ranks_the_own_text():
    logits = np.array([[3.0, 2, 1], [3, 2, 1], [1, 1, 1]])
    found = retrieve(logits, np.array([0, 2, 1]))
    assert found.first == pytest.approx(1 / 3, abs=1e-4)
    assert found.reciprocal_rank == pytest.approx((1 + 1 / 3 + 1 / 2) / 3, abs=1e-4)
    assert found.chance_reciprocal_rank == pytest.approx((1 + 1 / 2 + 1 / 3) / 3, abs=1e-4)


def test_floors_learn_other_disorders_and_are_tested_on_this_one():
    classes = ("control", "healthy", "A", "B", "C")
    target = Target(
        name="diagnosis", kind="multiclass", classes=classes, observed=np.array([0.0, 2, 3, 0, 1, 2, 4]), participants=tuple("abcdefg")
    )
    found = binary_target(target, ("control", "healthy"), "C", trained=list("abc"), tested=list("defg"))
    assert found.participants == tuple("abcdeg")  # f has A: neither control nor C
    assert found.observed.tolist() == [0, 1, 1, 0, 0, 1]
    assert found.kind == "binary"
    assert found.positive == "C"


def test_a_disorder_is_found_by_name_or_described_by_prose():
    words = packaged_networks()
    prose = DisorderText(name="x", description="Executive regions are excessively synchronised among themselves.")
    (fact,) = prose.facts(words)
    assert (fact.first.network, fact.second, fact.sign) == ("Control", None, 1)
