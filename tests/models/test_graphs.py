"""Series to graphs against numpy, nilearn, networkx and torch_geometric, and what masking must not let through."""

from __future__ import annotations

import itertools
import math

import networkx as nx
import numpy as np
import pytest
import torch
from nilearn.connectome import ConnectivityMeasure
from scipy import stats
from torch import Tensor
from torch_geometric.data import Data
from torch_geometric.nn.conv.gcn_conv import gcn_norm
from torch_geometric.transforms import AddRandomWalkPE
from torch_geometric.utils import dense_to_sparse, to_dense_adj

from brainfm_cli.models.graphs import (
    Edges,
    Graphs,
    build_graphs,
    choose_hidden,
    connect,
    correlate,
    fisher_z,
    hashed_normal,
    hashed_uniform,
    hide_nodes,
    normalised_adjacency,
    perturb,
    random_walk_encoding,
)

REGIONS = 9


def series_of(items: int = 3, frames: int = 40, regions: int = REGIONS) -> Tensor:
    """(items, frames, regions) correlated series with an offset, as a scanner's units have."""
    generator = torch.Generator().manual_seed(4)
    mixing = torch.randn(regions, regions, generator=generator)
    return torch.randn(items, frames, regions, generator=generator) @ mixing + 100.0


def whole(series: Tensor) -> Tensor:
    return torch.full((len(series),), series.shape[1])


def graphs_of(series: Tensor, edges: Edges = "top-k") -> Graphs:
    return build_graphs("Toy", *correlate(series, whole(series)), connectivity="fisher-z", edges=edges, density=0.3, threshold=0.2)


def visible_of(series: Tensor, hidden: Tensor, edges: Edges) -> Graphs:
    """What is left of the graphs without the hidden regions."""
    correlation, present = correlate(series, whole(series))
    graphs = build_graphs("Toy", correlation, present, connectivity="fisher-z", edges=edges, density=0.3, threshold=0.2)
    return hide_nodes(graphs, hidden, connect(correlation, present & ~hidden, edges=edges, density=0.3, threshold=0.2))


def off_diagonal(matrix: np.ndarray) -> np.ndarray:
    matrix = matrix.copy()
    np.fill_diagonal(matrix, 0.0)
    return matrix


def test_correlation_is_numpys_and_nilearns() -> None:
    series = series_of()
    correlation, present = correlate(series, whole(series))
    assert present.all()
    nilearns = ConnectivityMeasure(kind="correlation", standardize=False, cov_estimator=_empirical()).fit_transform(list(series.numpy()))
    for item, nilearn in zip(range(len(series)), nilearns, strict=True):
        expected = off_diagonal(np.corrcoef(series[item].double().numpy(), rowvar=False))
        np.testing.assert_allclose(correlation[item], expected, atol=2e-5)
        np.testing.assert_allclose(correlation[item], off_diagonal(nilearn), atol=2e-5)


def _empirical():
    from sklearn.covariance import EmpiricalCovariance

    return EmpiricalCovariance(store_precision=False)


def test_correlation_ignores_frames_past_the_end() -> None:
    series = series_of()
    alone, _ = correlate(series[1:2, :25], torch.tensor([25]))
    for garbage in (0.0, 1e6, torch.nan):
        padded = series.clone()
        padded[1, 25:] = garbage
        correlation, present = correlate(padded, torch.tensor([40, 25, 40]))
        assert present.all()
        torch.testing.assert_close(correlation[1], alone[0])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0, 7.0, 12345.678])
def test_absent_and_constant_regions_are_zero_and_change_nobody(value: float) -> None:
    series = series_of()
    series[0, :, 4] = value
    correlation, present = correlate(series, whole(series))
    assert present.tolist() == [[place != 4 for place in range(REGIONS)], [True] * REGIONS, [True] * REGIONS]
    assert not correlation[0, 4].any()
    assert not correlation[0, :, 4].any()
    others = [place for place in range(REGIONS) if place != 4]
    expected = off_diagonal(np.corrcoef(series[0][:, others].double().numpy(), rowvar=False))
    np.testing.assert_allclose(correlation[0][np.ix_(others, others)], expected, atol=2e-5)


def test_one_bad_frame_makes_a_region_absent_only_where_the_frame_counts() -> None:
    series = series_of()
    series[:, 30, 2] = torch.nan
    _, present = correlate(series, torch.tensor([40, 30, 31]))
    assert present[:, 2].tolist() == [False, True, False]


def test_a_small_signal_on_a_large_mean_is_no_constant() -> None:
    series = series_of()
    series[:, :, 1] = 10_000 + 2 * torch.randn(3, 40, generator=torch.Generator().manual_seed(0))  # 0.02 % change
    assert correlate(series, whole(series))[1].all()


def test_fisher_z_is_arctanh_and_stays_finite_where_series_are_alike() -> None:
    series = series_of()
    series[:, :, 1] = series[:, :, 0]
    series[:, :, 2] = -series[:, :, 0]
    graphs = graphs_of(series)
    assert torch.isfinite(graphs.features).all()
    assert graphs.features[0, 0, 1] > 6
    assert graphs.features[0, 0, 2] < -6
    r = torch.linspace(-0.99, 0.99, 21)
    np.testing.assert_allclose(fisher_z(r), np.arctanh(r.numpy()), rtol=1e-6)
    plain = build_graphs("Toy", *correlate(series, whole(series)), connectivity="pearson", edges="top-k", density=0.3, threshold=0.2)
    torch.testing.assert_close(plain.features, correlate(series, whole(series))[0])


def edges_by_loop(correlation: np.ndarray, present: np.ndarray, edges: Edges, density: float, threshold: float) -> np.ndarray:
    """One graph the slow way."""
    count = len(correlation)
    found = np.zeros((count, count))
    k = min(count - 1, math.ceil(density * count))
    for i, j in itertools.product(range(count), range(count)):
        if edges == "threshold":
            found[i, j] = i != j and correlation[i, j] > threshold
            continue
        others = [other for other in range(count) if other != i and present[other]] if present[i] else []
        if edges == "top-k":
            nearest = sorted((other for other in others if correlation[i, other] > 0), key=lambda other: -correlation[i, other])
        else:
            nearest = sorted(others, key=lambda other: np.linalg.norm(correlation[i] - correlation[other]))
        if j in nearest[:k]:
            found[i, j] = found[j, i] = 1
    return found


@pytest.mark.parametrize("density", [0.1, 0.3, 1.0])
@pytest.mark.parametrize("edges", ["top-k", "threshold", "knn"])
def test_edges_are_those_of_a_plain_loop(edges: Edges, density: float) -> None:
    series = series_of()
    series[1, :, [0, 5]] = torch.nan
    correlation, present = correlate(series, whole(series))
    adjacency = connect(correlation, present, edges=edges, density=density, threshold=0.2)
    for item in range(3):
        expected = edges_by_loop(correlation[item].double().numpy(), present[item].numpy(), edges, density, 0.2)
        np.testing.assert_array_equal(adjacency[item].numpy(), expected)
    assert not adjacency[1, 0].any()
    assert not adjacency.diagonal(dim1=1, dim2=2).any()


@pytest.mark.parametrize(("regions", "density", "degree"), [(100, 0.1, 10), (100, 0.07, 7), (116, 0.1, 12), (10, 0.3, 3)])
def test_how_many_edges_a_density_asks_for(regions: int, density: float, degree: int) -> None:
    # 100 · 0.07 is 7.000000000000001 in floating point, and must not become 8
    correlation = (0.1 + torch.rand(1, regions, regions, generator=torch.Generator().manual_seed(0))).triu(1)
    correlation = correlation + correlation.transpose(1, 2)
    adjacency = connect(correlation, torch.ones(1, regions, dtype=torch.bool), edges="top-k", density=density, threshold=0.0)
    assert int(adjacency.sum(dim=-1).min()) == degree


def test_random_walks_return_as_matrix_powers_and_torch_geometric_say() -> None:
    series = series_of()
    series[2, :, 3] = torch.nan  # a region without edges
    adjacency = graphs_of(series).adjacency
    encoding = random_walk_encoding(adjacency)
    for item in range(3):
        a = adjacency[item].double().numpy()
        degree = a.sum(axis=1)
        walk = np.divide(a, degree[:, None], out=np.zeros_like(a), where=degree[:, None] > 0)
        powers = np.stack([np.diag(np.linalg.matrix_power(walk, k)) for k in range(1, 6)], axis=1)
        np.testing.assert_allclose(encoding[item], powers, atol=1e-6)
        index, weight = dense_to_sparse(adjacency[item])
        data = Data(edge_index=index, edge_weight=weight, num_nodes=REGIONS)
        theirs = AddRandomWalkPE(5, attr_name="pe")(data).pe
        torch.testing.assert_close(encoding[item], theirs, atol=1e-6, rtol=1e-5)
    assert not encoding[2, 3].any()
    assert encoding[..., 1].max() > 0.1


def test_random_walks_of_weighted_graphs() -> None:
    weights = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(3)).triu(1)
    weights = weights + weights.transpose(1, 2)
    walk = (weights / weights.sum(-1, keepdim=True)).double()
    expected = torch.stack([torch.linalg.matrix_power(walk, k).diagonal(dim1=1, dim2=2) for k in range(1, 6)], dim=-1)
    torch.testing.assert_close(random_walk_encoding(weights).double(), expected, atol=1e-6, rtol=1e-5)


def test_propagation_is_that_of_torch_geometric_and_networkx() -> None:
    adjacency = graphs_of(series_of()).adjacency
    adjacency[0] *= 0.7  # weights count, loops weigh 1
    propagation = normalised_adjacency(adjacency)
    for item in range(3):
        index, weight = gcn_norm(*dense_to_sparse(adjacency[item]), num_nodes=REGIONS)
        torch.testing.assert_close(propagation[item], to_dense_adj(index, edge_attr=weight, max_num_nodes=REGIONS)[0])
        looped = nx.from_numpy_array((adjacency[item] + torch.eye(REGIONS)).numpy())
        theirs = np.eye(REGIONS) - nx.normalized_laplacian_matrix(looped).toarray()
        np.testing.assert_allclose(propagation[item], theirs, atol=1e-6)


@pytest.mark.parametrize("edges", ["threshold", "top-k", "knn"])
def test_nothing_of_a_hidden_region_is_left(edges: Edges) -> None:
    """From the series on: visible features, edges and walks are the same to the last bit whatever hidden regions did."""
    series = series_of()
    hidden = torch.zeros(3, REGIONS, dtype=torch.bool)
    hidden[:2, [2, 5]] = True
    other = series.clone()
    other[:2, :, [2, 5]] = torch.randn(2, 40, 2, generator=torch.Generator().manual_seed(8))
    assert not torch.equal(graphs_of(series, edges).adjacency[:2], graphs_of(other, edges).adjacency[:2])
    first, second = visible_of(series, hidden, edges), visible_of(other, hidden, edges)
    assert torch.equal(first.features, second.features)
    assert torch.equal(first.adjacency, second.adjacency)
    assert first.adjacency[0].any()
    # visible regions keep their rows among themselves, and a graph without hidden regions all its edges
    whole_graph, seen = graphs_of(series, edges), ~hidden[0]
    assert torch.equal(first.features[0][seen][:, seen], whole_graph.features[0][seen][:, seen])
    assert torch.equal(first.adjacency[2], whole_graph.adjacency[2])
    assert not first.adjacency[0, 2].any()
    assert not first.features[0, :, 5].any()


def test_hidden_regions_are_the_share_asked_for_of_present_ones_with_the_lowest_scores() -> None:
    present = torch.ones(200, 20, dtype=torch.bool)
    present[::2, 10:] = False
    scores = hashed_uniform(torch.arange(200), (20,), stream=0)
    hidden = choose_hidden(present, scores, 0.3)
    assert hidden.sum(dim=1).tolist() == [3, 6] * 100
    assert not (hidden & ~present).any()
    visible = torch.where(present & ~hidden, scores, torch.inf).amin(dim=1)
    assert (torch.where(hidden, scores, -torch.inf).amax(dim=1) < visible).all()
    share = hidden[1::2].float().mean(dim=0)
    assert (share - 0.3).abs().max() < 0.2  # every region has its turn: 0.3 ± 4 standard errors
    assert choose_hidden(present, scores, 1e-6).sum(dim=1).eq(1).all()


def test_perturbation_drops_the_share_of_edges_and_adds_the_noise_asked_for() -> None:
    items, regions = 8, 40
    series = series_of(items, 60, regions)
    series[0, :, 7] = torch.nan
    graphs = graphs_of(series)
    keys = torch.arange(items)
    drop, noise = hashed_uniform(keys, (regions, regions), stream=1), hashed_normal(keys, (regions, regions), stream=2)
    changed = perturb(graphs, drop, noise, edge_drop=0.2, noise_scale=0.05)
    assert torch.equal(changed.adjacency, changed.adjacency.transpose(1, 2))
    assert ((changed.adjacency == graphs.adjacency) | (changed.adjacency == 0)).all()
    edges = int(graphs.adjacency.sum()) / 2
    left = float(changed.adjacency.sum() / graphs.adjacency.sum())
    assert abs(left - 0.8) < 4 * math.sqrt(0.16 / edges)
    added = changed.features - graphs.features
    torch.testing.assert_close(added, added.transpose(1, 2))
    assert not added[0, 7].any()
    assert not added.diagonal(dim1=1, dim2=2).any()
    assert float(added[1:].triu(1)[added[1:].triu(1) != 0].std()) == pytest.approx(0.05, rel=0.05)
    still = perturb(graphs, drop, noise, edge_drop=0.0, noise_scale=0.0)
    assert torch.equal(still.features, graphs.features)
    assert torch.equal(still.adjacency, graphs.adjacency)


def test_hashed_numbers_are_uniform_and_normal() -> None:
    keys = torch.arange(2**62, 2**62 + 200)
    uniform = hashed_uniform(keys, (500,), stream=3)
    assert uniform.min() >= 0
    assert uniform.max() < 1
    assert stats.kstest(uniform.flatten().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(hashed_normal(keys, (500,), stream=3).flatten().numpy(), "norm").pvalue > 1e-3
    # neighbours in key, position and stream are unrelated
    other = hashed_uniform(keys, (500,), stream=4)
    for one, two in ((uniform[1:], uniform[:-1]), (uniform[:, 1:], uniform[:, :-1]), (uniform, other)):
        r = np.corrcoef(one.flatten(), two.flatten())[0, 1]
        assert abs(r) < 4 / math.sqrt(one.numel())


def test_hashed_numbers_depend_on_key_and_stream_alone() -> None:
    keys = torch.tensor([3, 2**40 + 3, 3, -5, 2**63 - 1])
    together = hashed_uniform(keys, (6, 7), stream=2)
    assert together.shape == (5, 6, 7)
    assert torch.equal(together[0], together[2])
    assert not torch.equal(together[0], together[1])  # the upper half of the key counts
    for place in range(5):
        assert torch.equal(hashed_uniform(keys[place : place + 1], (6, 7), stream=2)[0], together[place])
    assert torch.equal(hashed_uniform(keys.flip(0), (6, 7), stream=2), together.flip(0))


def lowbias32(x: int) -> int:
    """Wellons' hash in plain integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ x >> 16


def test_hashed_numbers_are_those_of_the_published_hash() -> None:
    key, stream = 2**45 + 12345, 1
    start = lowbias32((key ^ stream * 0x9E3779B1) & 0xFFFFFFFF)
    start = lowbias32(start ^ key >> 32)
    expected = [lowbias32(start + place * 0x9E3779B1 & 0xFFFFFFFF) >> 8 for place in range(4)]
    assert (hashed_uniform(torch.tensor([key]), (4,), stream=stream) * 2**24).long().tolist() == [expected]
