"""Blocks of connectivity for the head, against scipy's matrix logarithm and plain averages of series."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.linalg import logm

from brainfm_cli.models.graphs import correlate
from brainfm_cli.models.readouts import SHRINKAGE, connectivity_blocks

REGIONS = 7
GROUP_OF = np.array([0, 0, 1, 1, 1, 2, 2])


def series_of(items: int = 3, frames: int = 60) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(items, frames, REGIONS, generator=generator) @ torch.randn(REGIONS, REGIONS, generator=generator)


def blocks_of(series: torch.Tensor, groups: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    correlation, present = correlate(series, torch.full((len(series),), series.shape[1]))
    return connectivity_blocks(correlation, present, groups)


def groups_of() -> torch.Tensor:
    return torch.eye(3)[GROUP_OF]


def test_edges_are_fisher_z_of_the_upper_triangle() -> None:
    series = series_of()
    edges = blocks_of(series)["edges"]
    assert edges.shape == (3, 21)
    for item in range(3):
        r = np.corrcoef(series[item].double().numpy(), rowvar=False)[np.triu_indices(REGIONS, 1)]
        np.testing.assert_allclose(edges[item], np.arctanh(r), atol=1e-4)


def triangle(matrix: np.ndarray) -> np.ndarray:
    """Upper triangle, off-diagonal entries times √2."""
    weights = np.where(np.eye(len(matrix)), 1.0, np.sqrt(2))
    return (matrix * weights)[np.triu_indices(len(matrix))]


def test_logarithm_is_scipys() -> None:
    series = series_of()
    blocks = blocks_of(series, groups_of())
    share = groups_of().numpy() / groups_of().numpy().sum(0)
    for item in range(3):
        correlation = np.corrcoef(series[item].double().numpy(), rowvar=False)
        shrunk = (1 - SHRINKAGE) * correlation + SHRINKAGE * np.eye(REGIONS)
        np.testing.assert_allclose(blocks["edges_log"][item], triangle(logm(shrunk)), atol=1e-4)
        pooled = share.T @ correlation @ share
        np.testing.assert_allclose(blocks["groups_log"][item], triangle(logm(pooled)), atol=1e-3)


def test_distances_between_logarithms_are_those_between_matrices() -> None:
    series = series_of()
    log = blocks_of(series)["edges_log"].double().numpy()
    full = [logm((1 - SHRINKAGE) * np.corrcoef(one.double().numpy(), rowvar=False) + SHRINKAGE * np.eye(REGIONS)) for one in series]
    assert np.linalg.norm(log[0] - log[1]) == pytest.approx(np.linalg.norm(full[0] - full[1]), rel=1e-4)


def test_groups_are_covariances_of_average_series() -> None:
    series = series_of()
    groups = blocks_of(series, groups_of())["groups"]
    for item in range(3):
        one = series[item].double().numpy()
        standard = (one - one.mean(0)) / one.std(0)
        average = np.stack([standard[:, group == GROUP_OF].mean(1) for group in range(3)], axis=1)
        expected = np.cov(average, rowvar=False, bias=True)[np.triu_indices(3)]
        np.testing.assert_allclose(groups[item], expected, atol=1e-5)


def test_absent_regions_stand_as_uncorrelated_and_leave_their_group() -> None:
    series = series_of()
    series[0, :, 3] = torch.nan
    series[0, :, 5:] = torch.nan  # a group without any region
    blocks = blocks_of(series, groups_of())
    assert all(torch.isfinite(values).all() for values in blocks.values())
    there = [0, 1, 2, 4]
    correlation = np.eye(REGIONS)
    correlation[np.ix_(there, there)] = np.corrcoef(series[0][:, there].double().numpy(), rowvar=False)
    # the diagonal of an absent region is one, as if its series were unrelated noise
    shrunk = (1 - SHRINKAGE) * correlation + SHRINKAGE * np.eye(REGIONS)
    np.testing.assert_allclose(blocks["edges_log"][0], triangle(logm(shrunk)), atol=1e-4)
    share = np.zeros((4, 2))
    share[:2, 0], share[2:, 1] = 1 / 2, 1 / 2  # regions 0 and 1; 2 and 4
    pooled = np.zeros((3, 3))
    pooled[:2, :2] = share.T @ correlation[np.ix_(there, there)] @ share
    np.testing.assert_allclose(blocks["groups"][0], pooled[np.triu_indices(3)], atol=1e-5)
    pooled[2, 2] = 1.0
    np.testing.assert_allclose(blocks["groups_log"][0], triangle(logm(pooled)), atol=1e-3)


def test_short_and_duplicated_series_stay_finite() -> None:
    series = series_of(frames=4)  # fewer frames than regions: the correlation is singular
    series[:, :, 1] = series[:, :, 0]
    blocks = blocks_of(series, groups_of())
    assert all(torch.isfinite(values).all() for values in blocks.values())
    assert blocks["edges"].abs().max() < 4  # |r| is clipped at 0.999


def test_no_groups_no_group_blocks() -> None:
    assert set(blocks_of(series_of())) == {"edges", "edges_log"}
    assert set(blocks_of(series_of(), groups_of())) == {"edges", "edges_log", "groups", "groups_log"}


def test_gradients_of_the_logarithm_are_right_and_finite_where_eigenvalues_are_equal() -> None:
    correlation, present = correlate(series_of(items=1, frames=40), torch.tensor([40]))

    def logarithm(matrix: torch.Tensor) -> torch.Tensor:
        return connectivity_blocks((matrix + matrix.transpose(1, 2)) / 2, present, groups_of())["edges_log"].double()

    assert torch.autograd.gradcheck(logarithm, correlation.double().requires_grad_(), eps=1e-3, atol=2e-2, rtol=2e-2)
    for start in (torch.zeros(1, REGIONS, REGIONS), torch.full((1, REGIONS, REGIONS), 0.3)):
        matrix = (start - torch.diag_embed(start.diagonal(dim1=1, dim2=2))).requires_grad_()
        sum(values.sum() for values in connectivity_blocks(matrix, present, None).values()).backward()
        assert torch.isfinite(matrix.grad).all()
        assert matrix.grad.any()
