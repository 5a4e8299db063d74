"""Graph prompts: the published formula written out, an untuned prompt changes nothing, gradients reach the prompt alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.special import erf, expit

from brainfm_cli.models.graph_encoder import EncoderShape
from brainfm_cli.models.graph_model import GraphModel
from brainfm_cli.models.graphs import Graphs, build_graphs, correlate, hide_nodes
from brainfm_cli.models.prompts import GraphPrompt, TargetPrompt

ATLASES = {"Eight": 8, "Ten": 10}
SHAPE = EncoderShape(width=16, num_heads=2, feedforward=24, num_blocks=1, num_layers=1, dropout=0.1, input_width=20)


def graphs_of(atlas: str = "Eight", items: int = 3) -> Graphs:
    generator = torch.Generator().manual_seed(5)
    series = torch.randn(items, 50, ATLASES[atlas], generator=generator)
    series[0, :, 2] = torch.nan
    return build_graphs(
        atlas, *correlate(series, torch.full((items,), 50)), connectivity="fisher-z", edges="top-k", density=0.3, threshold=0.3
    )


def trained_looking(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))


@pytest.fixture
def model() -> GraphModel:
    torch.manual_seed(0)
    model = GraphModel(SHAPE, ATLASES).eval()
    trained_looking(model)
    return model


@pytest.mark.parametrize("named", [1, 3])
def test_prompt_is_the_published_formula(named: int) -> None:
    torch.manual_seed(0)
    prompt = GraphPrompt(16, ATLASES).double()
    trained_looking(prompt)
    graphs = graphs_of()
    graphs = replace(graphs, features=graphs.features.double(), adjacency=graphs.adjacency.double())
    disorder, atlas = torch.randn(named, 16).double(), torch.randn(1, 16).double()
    features, adjacency, edge = (part.detach().numpy() for part in prompt(graphs, disorder, atlas))

    weights = {name: value.numpy() for name, value in prompt.state_dict().items()}
    assert edge.shape == (named, 8, 8)
    for item in range(3):
        context = np.concatenate([disorder[min(item, named - 1)], atlas[0]])
        inner = weights["gates.0.weight"] @ context + weights["gates.0.bias"]
        inner = inner * 0.5 * (1 + erf(inner / np.sqrt(2)))
        a_node, b_node, a_edge, b_edge = weights["gates.2.weight"] @ inner + weights["gates.2.bias"]
        gain = 1 + np.tanh(a_node * weights["node.Eight"] + b_node)
        np.testing.assert_allclose(features[item], graphs.features[item].numpy() * gain)
        raw = expit(a_edge * weights["edge.Eight"] + b_edge)
        offered = (raw + raw.T) / 2
        np.fill_diagonal(offered, 0)
        np.testing.assert_allclose(edge[min(item, named - 1)], offered)
        there = graphs.present[item].numpy()
        before = graphs.adjacency[item].numpy()
        np.testing.assert_allclose(adjacency[item], before + 0.3 * offered * np.outer(there, there) * (1 - before))


def test_prompted_adjacency_stays_a_graph_of_usable_regions() -> None:
    torch.manual_seed(0)
    prompt = GraphPrompt(16, ATLASES)
    trained_looking(prompt)
    hidden = torch.zeros(3, 8, dtype=torch.bool)
    hidden[1, 5] = True
    graphs = graphs_of()
    visible = graphs.adjacency.clone()
    visible[1, 5] = visible[1, :, 5] = 0.0
    graphs = hide_nodes(graphs, hidden, visible)
    features, adjacency, _ = prompt(graphs, torch.randn(1, 16), torch.randn(1, 16))
    torch.testing.assert_close(adjacency, adjacency.transpose(1, 2))
    assert adjacency.min() >= 0
    assert adjacency.max() <= 1
    assert not adjacency.diagonal(dim1=1, dim2=2).any()
    for item, place in ((0, 2), (1, 5)):  # absent, hidden
        assert not adjacency[item, place].any()
        assert not features[item, place].any()
    assert (adjacency[2] > 0).sum() == 56


def test_a_new_prompt_keeps_the_graph_sparse() -> None:
    torch.manual_seed(0)
    model = GraphModel(SHAPE, ATLASES)
    graphs = graphs_of()
    prompted = model.prompted(graphs)
    added = (prompted.adjacency - graphs.adjacency).detach()
    assert float(added.max()) < 0.01  # 0.3 · σ(−4) = 0.0054
    assert float(added[2][graphs.adjacency[2] == 0].max()) > 0.004
    torch.testing.assert_close(prompted.features, graphs.features, atol=0.2, rtol=0.2)


@pytest.mark.parametrize("atlas", list(ATLASES))
def test_an_untuned_target_prompt_changes_nothing(model: GraphModel, atlas: str) -> None:
    graphs = graphs_of(atlas)
    own = TargetPrompt(model.prompt, model.encoder.no_disorder, atlas)
    tuned = model.encode(graphs, prompt=own.graph, disorder=own.token)
    assert torch.equal(tuned.readout, model.encode(graphs).readout)
    with torch.no_grad():
        own.token.add_(0.1)
    assert not torch.equal(model.encode(graphs, prompt=own.graph, disorder=own.token).readout, tuned.readout)


def test_a_target_prompt_is_a_copy_of_one_atlas(model: GraphModel) -> None:
    own = TargetPrompt(model.prompt, model.encoder.no_disorder, "Ten")
    names = set(own.state_dict())
    assert names == {"token", "graph.node.Ten", "graph.edge.Ten", *(f"graph.gates.{n}.{p}" for n in (0, 2) for p in ("weight", "bias"))}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trained_looking(own)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gradients_reach_only_the_prompt(model: GraphModel) -> None:
    model.requires_grad_(False)
    own = TargetPrompt(model.prompt, model.encoder.no_disorder, "Eight")
    assert all(parameter.requires_grad for parameter in own.parameters())
    model.encode(graphs_of(), prompt=own.graph, disorder=own.token).readout.square().sum().backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    reached = {name: bool(parameter.grad is not None and parameter.grad.any()) for name, parameter in own.named_parameters()}
    assert all(reached.values()), reached
    off = ~torch.eye(8, dtype=torch.bool)
    assert own.graph.edge["Eight"].grad is not None
    assert own.graph.edge["Eight"].grad[off].abs().min() > 0
    assert not own.graph.edge["Eight"].grad.diagonal().any()
