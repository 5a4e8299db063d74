"""Training objectives against explicit loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from brainfm_cli.learning.objectives import (
    distinct_rows,
    embedding_spread,
    gather_ranks,
    mask_ratio,
    masked_edge_loss,
    masked_node_loss,
    nt_xent,
)


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    vectors = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return functional.normalize(vectors, dim=-1)


def nt_xent_by_loop(
    first: np.ndarray, second: np.ndarray, dataset: list[int], participant: list[int], temperature: float, valid: list[bool] | None = None
) -> float:
    """Every anchor and every negative in turn."""
    count = len(first)
    views = [*first, *second]
    losses = []
    for anchor in range(2 * count):
        scan = anchor % count
        if valid is not None and not valid[scan]:
            continue
        partner = (anchor + count) % (2 * count)
        positive = math.exp(float(views[anchor] @ views[partner]) / temperature)
        negatives = [
            math.exp(float(views[anchor] @ views[other]) / temperature)
            for other in range(2 * count)
            if dataset[other % count] == dataset[scan]
            and participant[other % count] != participant[scan]
            and (valid is None or valid[other % count])
        ]
        if negatives:
            losses.append(-math.log(positive / (positive + sum(negatives))))
    return sum(losses) / len(losses) if losses else 0.0


CASES = {
    "one dataset": ([0] * 6, [0, 1, 2, 3, 4, 5], None),
    "two datasets": ([0, 1, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5], None),
    "two runs of one person": ([0] * 6, [0, 0, 1, 2, 2, 3], None),
    "a dataset of one person": ([0, 0, 0, 0, 1, 1], [0, 1, 2, 3, 4, 4], None),
    "scans without a second view": ([0, 1, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5], [True, True, False, True, True, False]),
    "one view only": ([0] * 6, [0, 1, 2, 3, 4, 5], [False, False, True, False, False, False]),
}


@pytest.mark.parametrize("case", CASES)
def test_contrast_is_that_of_a_double_loop(case: str) -> None:
    dataset, participant, valid = CASES[case]
    first, second = unit(6, 5), unit(6, 5, seed=1)
    loss = nt_xent(
        first,
        second,
        dataset=torch.tensor(dataset),
        participant=torch.tensor(participant),
        temperature=0.2,
        valid=None if valid is None else torch.tensor(valid),
    )
    expected = nt_xent_by_loop(first.numpy(), second.numpy(), dataset, participant, 0.2, valid)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    assert (expected == 0) == (case == "one view only")


def test_contrast_of_nobody_is_zero_with_gradient_zero() -> None:
    first, second = unit(4, 5).requires_grad_(), unit(4, 5, seed=1).requires_grad_()
    loss = nt_xent(first, second, dataset=torch.zeros(4), participant=torch.zeros(4), temperature=0.1)
    loss.backward()
    assert float(loss.detach()) == 0
    for vectors in (first, second):
        assert vectors.grad is not None
        assert not vectors.grad.any()
        assert torch.isfinite(vectors.grad).all()


def test_other_datasets_and_own_runs_get_no_gradient_from_an_anchor() -> None:
    first, second = unit(4, 5).requires_grad_(), unit(4, 5, seed=1)
    dataset, participant = torch.tensor([0, 0, 1, 0]), torch.tensor([0, 1, 2, 0])
    # row 2 is alone in its dataset: it takes no part, and pushes nobody
    nt_xent(first, second, dataset=dataset, participant=participant, temperature=0.2).backward()
    assert first.grad is not None
    assert not first.grad[2].any()
    assert first.grad[[0, 1, 3]].abs().amax(dim=1).min() > 0


def test_contrast_of_perfect_views_is_near_zero_and_of_mixed_up_ones_large() -> None:
    views = torch.eye(8)
    people, one = torch.arange(8), torch.zeros(8)
    good = float(nt_xent(views, views, dataset=one, participant=people, temperature=0.1))
    bad = float(nt_xent(views, views.roll(1, 0), dataset=one, participant=people, temperature=0.1))
    assert good == pytest.approx(math.log1p(14 * math.exp(-10)), rel=1e-2)
    assert bad > 10


def masked_case() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    hidden, present = torch.rand(3, 6, generator=generator) < 0.5, torch.rand(3, 6, generator=generator) < 0.8
    hidden &= present
    assert hidden.any()
    assert not present.all()
    values = torch.randn(2, 3, 6, 6, generator=generator) * 2
    adjacency = (torch.rand(3, 6, 6, generator=generator) < 0.3).float()
    adjacency = torch.maximum(adjacency, adjacency.transpose(1, 2))
    scores = torch.rand(3, 6, 6, generator=generator)
    return {"hidden": hidden, "present": present, "first": values[0], "second": values[1], "adjacency": adjacency, "scores": scores}


def test_masked_nodes_are_those_of_a_loop() -> None:
    case = masked_case()
    losses = []
    for item in range(3):
        for i in range(6):
            for j in range(6):
                if case["hidden"][item, i] and case["present"][item, j] and i != j:
                    gap = abs(float(case["first"][item, i, j] - case["second"][item, i, j]))
                    losses.append(0.5 * gap**2 if gap < 1 else gap - 0.5)
    loss = masked_node_loss(case["first"], case["second"], case["hidden"], case["present"])
    assert float(loss) == pytest.approx(np.mean(losses), rel=1e-5)


def test_masked_edges_are_those_of_a_loop() -> None:
    case = masked_case()
    edges, others = [], []
    for item in range(3):
        pairs = [
            (i, j)
            for i in range(6)
            for j in range(6)
            if case["hidden"][item, i] and case["present"][item, i] and case["present"][item, j] and i != j
        ]
        linked = [pair for pair in pairs if case["adjacency"][item][pair] > 0]
        share = len(linked) / max(1, len(pairs) - len(linked))
        for pair in pairs:
            odds = float(case["first"][item][pair])
            if pair in linked:
                edges.append(-math.log(1 / (1 + math.exp(-odds))))
            elif float(case["scores"][item][pair]) < share:
                others.append(-math.log(1 - 1 / (1 + math.exp(-odds))))
    assert edges
    assert others
    loss = masked_edge_loss(case["first"], case["adjacency"], case["hidden"], case["present"], case["scores"])
    assert float(loss) == pytest.approx(0.5 * np.mean(edges) + 0.5 * np.mean(others), rel=1e-5)


def test_as_many_non_edges_as_edges_are_sampled() -> None:
    generator = torch.Generator().manual_seed(0)
    adjacency = (torch.rand(4, 60, 60, generator=generator) < 0.1).float()
    adjacency = torch.maximum(adjacency, adjacency.transpose(1, 2))
    everyone = torch.ones(4, 60, dtype=torch.bool)
    logits = torch.zeros(4, 60, 60, requires_grad=True)
    masked_edge_loss(logits, adjacency, everyone, everyone, torch.rand(4, 60, 60, generator=generator)).backward()
    assert logits.grad is not None
    pulled, pushed = int((logits.grad < 0).sum()), int((logits.grad > 0).sum())
    assert pulled == int((adjacency - adjacency * torch.eye(60)).sum())
    assert abs(pushed - pulled) < 5 * math.sqrt(pulled)
    assert float(logits.grad.sum().abs()) < 1e-5  # both sides weigh the same


def test_losses_over_nothing_are_zero() -> None:
    nothing = torch.zeros(2, 5, dtype=torch.bool)
    some = torch.randn(2, 5, 5)
    assert float(masked_node_loss(some, some + 1, nothing, ~nothing)) == 0
    assert float(masked_edge_loss(some, some.abs(), nothing, ~nothing, some)) == 0


def test_mask_ratio_rises_linearly_and_stays() -> None:
    ratio = [mask_ratio(epoch, first=0.3, last=0.5, ramp_epochs=5) for epoch in (0, 1, 2.5, 5, 50, math.inf)]
    assert ratio == pytest.approx([0.3, 0.34, 0.4, 0.5, 0.5, 0.5])
    assert mask_ratio(0, first=0.3, last=0.5, ramp_epochs=0) == 0.5


def test_collapse_is_seen() -> None:
    rows = torch.randn(2, 7, 9)
    assert float(distinct_rows(rows)) == 7
    collapsed = rows.clone()
    collapsed[0] = rows[0, :1]  # one item: every row the same
    assert float(distinct_rows(collapsed)) == pytest.approx((1 + 7) / 2)
    assert float(distinct_rows(1e-6 * rows)) == 7  # relative to the largest entry
    pairs = rows[:, [0, 0, 1, 1, 2, 2, 3]]
    assert float(distinct_rows(pairs)) == 4
    vectors = torch.randn(20, 4, dtype=torch.float64)
    assert float(embedding_spread(vectors)) == pytest.approx(np.std(vectors.numpy(), axis=0).mean(), rel=1e-5)
    assert float(embedding_spread(vectors[:1].expand(20, -1))) == pytest.approx(0, abs=1e-6)


def test_one_rank_gathers_itself() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    assert gather_ranks(x) is x
