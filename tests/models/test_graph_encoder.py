"""The graph encoder: its parts against plain formulas and torch_geometric, and what must not change its outputs."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch_geometric.nn import DenseGCNConv

from brainfm_cli.models import attention
from brainfm_cli.models.attention import EdgeBias, biased_attention
from brainfm_cli.models.graph_encoder import EncoderShape, GraphConvolution, GraphEncoder, read_out
from brainfm_cli.models.graph_model import GraphModel, Standardiser
from brainfm_cli.models.graphs import Graphs, build_graphs, correlate, hide_nodes, normalised_adjacency
from brainfm_cli.systems.brain_graph import PRESETS

ATLASES = {"Ten": 10, "Twelve": 12}
SHAPE = EncoderShape(width=32, num_heads=4, feedforward=48, num_blocks=2, num_layers=2, dropout=0.0, input_width=20)


@pytest.fixture
def model() -> GraphModel:
    """Every parameter away from its start: zeros would hide what they multiply."""
    torch.manual_seed(0)
    model = GraphModel(SHAPE, ATLASES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def graphs_of(atlas: str = "Ten", items: int = 3, *, absent: tuple[int, ...] = ()) -> Graphs:
    regions = ATLASES[atlas]
    generator = torch.Generator().manual_seed(5)
    series = torch.randn(items, 50, regions, generator=generator) @ torch.randn(regions, regions, generator=generator)
    series[0, :, list(absent)] = torch.nan
    return build_graphs(
        atlas, *correlate(series, torch.full((items,), 50)), connectivity="fisher-z", edges="top-k", density=0.3, threshold=0.3
    )


def test_convolution_is_torch_geometrics() -> None:
    torch.manual_seed(0)
    ours, theirs = GraphConvolution(16, 0.0), DenseGCNConv(16, 16)
    with torch.no_grad():
        ours.bias.normal_()
        theirs.lin.weight.copy_(ours.linear.weight)
        theirs.bias.copy_(ours.bias)
    adjacency = torch.rand(2, 7, 7).triu(1)
    adjacency = adjacency + adjacency.transpose(1, 2)
    nodes = torch.randn(2, 7, 16)
    torch.testing.assert_close(ours.propagate(nodes, normalised_adjacency(adjacency)), theirs(nodes, adjacency), atol=1e-6, rtol=1e-5)


def plain_attention(qkv: Tensor, bias: Tensor, absent: Tensor) -> Tensor:
    """Softmax attention head by head, token by token; ``bias`` (batch, heads, tokens, tokens)."""
    batch, tokens, _, heads, width = qkv.shape
    out = torch.zeros(batch, tokens, heads * width, dtype=qkv.dtype)
    for item in range(batch):
        there = [token for token in range(tokens) if not absent[item, token]]
        for head in range(heads):
            q, k, v = (qkv[item, :, part, head] for part in range(3))
            for token in range(tokens):
                scores = torch.stack([q[token] @ k[other] / math.sqrt(width) + bias[item, head, token, other] for other in there])
                out[item, token, head * width : (head + 1) * width] = scores.softmax(0) @ v[there]
    return out


@pytest.mark.parametrize("prompted", [True, False])
def test_biased_attention_is_plain_softmax_attention(*, prompted: bool) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64)
    adjacency, prompt = torch.rand(2, 4, 4, dtype=torch.float64), torch.rand(1, 4, 4, dtype=torch.float64)
    present = torch.ones(2, 4, dtype=torch.bool)
    present[1, 2] = False
    weights = torch.randn(2, 4, dtype=torch.float64)
    bias = EdgeBias.over_tokens(adjacency, prompt if prompted else None, present, num_extra=2)
    expected = torch.zeros(2, 4, 6, 6, dtype=torch.float64)
    for head in range(4):  # nothing on the two tokens that are no regions
        expected[:, head, 2:, 2:] = weights[0, head] * adjacency + (weights[1, head] * prompt if prompted else 0)
    absent = torch.zeros(2, 6, dtype=torch.bool)
    absent[1, 4] = True
    torch.testing.assert_close(biased_attention(qkv, bias, weights), plain_attention(qkv, expected, absent))
    torch.testing.assert_close(biased_attention(qkv, bias, None), plain_attention(qkv, torch.zeros_like(expected), absent))


@pytest.mark.parametrize("piece", [1, 2 * 4 * 36, 1 << 18])  # one item at a time, two, all
@pytest.mark.parametrize("shared", [True, False])
def test_training_on_cpus_gives_the_gradients_of_plain_attention(piece: int, *, shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_PIECE", piece)
    torch.manual_seed(0)
    qkv = torch.randn(3, 6, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    adjacency = torch.rand(3, 6, 6, dtype=torch.float64, requires_grad=True)
    prompt = torch.rand(1 if shared else 3, 6, 6, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    absent = torch.zeros(3, 6, dtype=torch.bool)
    absent[1, 4] = True
    bias = EdgeBias(adjacency=adjacency, prompt=prompt, absent=absent)
    inputs, direction = (qkv, adjacency, prompt, weights), torch.randn(3, 6, 20, dtype=torch.float64)
    found = biased_attention(qkv, bias, weights)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    plain = (q @ k.transpose(-1, -2) / math.sqrt(5) + attention.head_bias(bias, weights)).softmax(-1) @ v
    expected = plain.transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, expected)
    for one, other in zip(torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True):
        torch.testing.assert_close(one, other)


def test_dropped_attention_is_dropped_alike_in_both_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "_PIECE", 2 * 2 * 25)
    qkv = torch.randn(3, 5, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    bias = EdgeBias(adjacency=torch.rand(3, 5, 5, dtype=torch.float64), prompt=None, absent=None)
    weights = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)

    def dropping(qkv: Tensor, weights: Tensor) -> Tensor:
        torch.manual_seed(3)
        return biased_attention(qkv, bias, weights, dropout=0.4)

    assert torch.autograd.gradcheck(dropping, (qkv, weights))
    torch.manual_seed(4)
    other = biased_attention(qkv, bias, weights, dropout=0.4)
    assert not torch.equal(dropping(qkv, weights), other)


def test_dropout_of_attention_keeps_its_mean() -> None:
    torch.manual_seed(0)
    qkv = torch.randn(1, 30, 3, 2, 4, requires_grad=True)
    bias = EdgeBias(adjacency=torch.rand(1, 30, 30), prompt=None, absent=None)
    weights = torch.randn(2, 2, requires_grad=True)
    with torch.no_grad():
        whole = biased_attention(qkv, bias, weights)
    mean = torch.stack([biased_attention(qkv, bias, weights, dropout=0.2).detach() for _ in range(2000)]).mean(0)
    torch.testing.assert_close(mean, whole, atol=0.05, rtol=0)


def test_edge_bias_starts_at_zero_and_learns() -> None:
    torch.manual_seed(0)
    model = GraphModel(SHAPE, ATLASES)
    biases = {name: p for name, p in model.encoder.named_parameters() if name.endswith("edge_bias")}
    assert len(biases) == 4
    assert not any(bias.any() for bias in biases.values())
    model.encode(graphs_of()).readout.square().sum().backward()
    assert all(bias.grad is not None and bias.grad.abs().min() > 0 for bias in biases.values())


def test_tokens_are_the_projection_of_padded_rows(model: GraphModel) -> None:
    graphs = model.prompted(graphs_of())
    encoder = model.encoder
    padded = torch.zeros(3, 10, SHAPE.input_width)
    padded[..., :10], padded[..., -5:] = graphs.features, graphs.walks
    expected = encoder.projection(padded) + encoder.node_identity["Ten"]
    tokens = encoder.tokens(graphs)
    torch.testing.assert_close(tokens[:, 2:], expected)
    torch.testing.assert_close(tokens[:, 0], encoder.no_disorder.expand(3, -1))
    torch.testing.assert_close(tokens[:, 1], encoder.projection(encoder.atlas_vector["Ten"]).expand(3, -1))


def test_readout_is_mean_and_maximum_of_present_regions() -> None:
    nodes = torch.randn(2, 5, 3) - 10  # all negative: a zero for absent regions would win the maximum
    present = torch.tensor([[True, False, True, True, False], [True] * 5])
    expected = torch.stack([torch.cat([nodes[i][p].mean(0), nodes[i][p].max(0).values]) for i, p in enumerate(present)])
    torch.testing.assert_close(read_out(nodes, present), expected)
    torch.testing.assert_close(read_out(nodes[1:], None), expected[1:])


def test_absent_regions_change_no_present_one(model: GraphModel) -> None:
    graphs = graphs_of(absent=(3, 8))
    there = graphs.present[0]
    encoding = model.encode(graphs)
    # what stands in an absent region's row cannot matter: the identity, its only other content, is changed
    with torch.no_grad():
        model.encoder.node_identity["Ten"][[3, 8]] += 5.0
        model.prompt.edge["Ten"][3] += 3.0
        model.prompt.node["Ten"][:, 8] -= 3.0
    other = model.encode(graphs)
    torch.testing.assert_close(other.nodes[0][there], encoding.nodes[0][there], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(other.readout[0], encoding.readout[0], atol=1e-5, rtol=1e-5)
    assert (other.readout[1] - encoding.readout[1]).abs().max() > 1e-2  # where they are present, they do


def test_an_item_does_not_depend_on_its_batch(model: GraphModel) -> None:
    graphs = graphs_of(absent=(3,))
    together = model.encode(graphs).readout
    for place in range(3):
        alone = replace(graphs, **{name: getattr(graphs, name)[place : place + 1] for name in ("features", "adjacency", "present")})
        torch.testing.assert_close(model.encode(alone).readout[0], together[place], atol=1e-5, rtol=1e-5)


def test_visible_regions_do_not_see_hidden_ones(model: GraphModel) -> None:
    graphs = graphs_of()
    hidden = torch.zeros(3, 10, dtype=torch.bool)
    hidden[:, [2, 6]] = True
    changed = replace(graphs, features=graphs.features.clone(), adjacency=graphs.adjacency.clone())
    changed.features[:, 2] = changed.features[:, :, 2] = 4.0
    changed.adjacency[:, 6] = changed.adjacency[:, :, 6] = 1.0
    keep = (~hidden).float()
    visible = graphs.adjacency * keep[:, :, None] * keep[:, None, :]
    assert torch.equal(model.encode(hide_nodes(changed, hidden, visible)).nodes, model.encode(hide_nodes(graphs, hidden, visible)).nodes)
    assert not torch.equal(model.encode(changed).nodes, model.encode(graphs).nodes)


def test_regions_are_told_apart_by_identity_not_by_place(model: GraphModel) -> None:
    graphs = graphs_of()
    encoded = model.encode(graphs).readout
    order = torch.randperm(10, generator=torch.Generator().manual_seed(1))
    shuffled = replace(
        graphs,
        features=graphs.features[:, order][:, :, order],
        adjacency=graphs.adjacency[:, order][:, :, order],
        present=graphs.present[:, order],
    )
    assert (model.encode(shuffled).readout - encoded).abs().max() > 1e-2
    with torch.no_grad():  # everything that names regions is reordered with them
        model.encoder.node_identity["Ten"].copy_(model.encoder.node_identity["Ten"][order])
        model.prompt.node["Ten"].copy_(model.prompt.node["Ten"][order][:, order])
        model.prompt.edge["Ten"].copy_(model.prompt.edge["Ten"][order][:, order])
        model.encoder.projection.weight[:, :10] = model.encoder.projection.weight[:, order]
        model.encoder.atlas_vector["Ten"][:10] = model.encoder.atlas_vector["Ten"][order]
    torch.testing.assert_close(model.encode(shuffled).readout, encoded, atol=1e-5, rtol=1e-5)


def test_one_model_holds_several_atlases(model: GraphModel) -> None:
    ten = model.encode(graphs_of("Ten"))
    twelve = model.encode(graphs_of("Twelve"))
    assert ten.nodes.shape == (3, 10, 32)
    assert twelve.nodes.shape == (3, 12, 32)
    assert ten.readout.shape == twelve.readout.shape == (3, 64)
    twelve.readout.square().sum().backward()
    touched = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert not any(name.endswith(".Ten") for name in touched)
    assert {"encoder.atlas_vector.Twelve", "encoder.node_identity.Twelve", "prompt.node.Twelve", "prompt.edge.Twelve"} <= touched
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".Twelve"):
                parameter.add_(1.0)
    assert torch.equal(model.encode(graphs_of("Ten")).readout, ten.readout)


def test_a_disorder_token_changes_the_readout_and_none_means_the_learned_one(model: GraphModel) -> None:
    graphs = graphs_of()
    plain = model.encode(graphs).readout
    named = model.encoder.no_disorder.detach()[None].expand(3, -1)
    torch.testing.assert_close(model.encode(graphs, disorder=named).readout, plain, atol=1e-6, rtol=1e-5)
    assert (model.encode(graphs, disorder=named + 1).readout - plain).abs().amax(dim=1).min() > 1e-3


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    model = GraphModel(replace(SHAPE, dropout=0.3), ATLASES)
    graphs = graphs_of()
    assert not torch.equal(model.encode(graphs).readout, model.encode(graphs).readout)
    model.eval()
    assert torch.equal(model.encode(graphs).readout, model.encode(graphs).readout)


def test_standardised_edges_have_mean_zero_and_spread_one() -> None:
    graphs = graphs_of("Ten", 40, absent=(3,))
    standardiser = Standardiser(ATLASES)
    assert torch.equal(standardiser(graphs).features, graphs.features)
    mean, spread = graphs.features[1:].mean(dim=0), graphs.features[1:].std(dim=0, correction=0)
    spread.fill_diagonal_(1.0)
    standardiser.set("Ten", mean, spread)
    features = standardiser(graphs).features
    off = ~torch.eye(10, dtype=torch.bool)
    torch.testing.assert_close(features[1:].mean(0)[off], torch.zeros(90), atol=1e-5, rtol=0)
    torch.testing.assert_close(features[1:].std(0, correction=0)[off], torch.ones(90), atol=1e-5, rtol=0)
    assert not features[0, 3].any()  # an absent entry stays zero, it is not minus the mean
    assert not features[0, :, 3].any()
    assert not features.diagonal(dim1=1, dim2=2).any()


# Two atlases of 100 and 116 regions; the encoder alone, then the model with prompts, decoder and contrast head.
@pytest.mark.parametrize(
    ("preset", "encoder", "whole"),
    [("base", 8_888_064, 10_407_838), ("small", 1_222_208, 1_661_662), ("tiny", 123_920, 277_102)],
)
def test_sizes_are_pinned(preset: str, encoder: int, whole: int) -> None:
    shape = PRESETS[preset]
    model = GraphModel(shape, {"Schaefer": 100, "AAL": 116})
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in (("encoder", model.encoder), ("model", model))}
    assert count == {"encoder": encoder, "model": whole}
    # the same by hand: what a change of the architecture must be argued against
    width, inner = shape.width, shape.feedforward
    layer = 2 * 2 * width + 4 * (width * width + width) + 2 * width * inner + inner + width + 2 * shape.num_heads
    block = shape.num_layers * layer + width * width + 3 * width
    start = shape.input_width * width + width + 2 * shape.input_width + 216 * width + width + shape.input_width
    assert encoder == start + shape.num_blocks * block + 2 * width


def test_shapes_of_the_presets_fit_their_heads() -> None:
    for shape in PRESETS.values():
        assert shape.width % shape.num_heads == 0
        encoder = GraphEncoder(replace(shape, num_blocks=1), {"Toy": 7})
        assert encoder.node_identity["Toy"].shape == (7, shape.width)


def test_rollout_follows_attention_and_edges(model: GraphModel) -> None:
    """Rows add up to 1; absent regions give nothing; the weights are those that attention uses."""
    graphs = graphs_of(absent=(2, 7))
    flow = model.rollout(graphs)
    torch.testing.assert_close(flow.sum(1), torch.ones(3))
    assert bool((flow[0, [4, 9]] == 0).all())
    assert bool((flow[1:, 2:] > 0).all())
    given = model.prompted(graphs)
    layer, tokens, bias = model.encoder.blocks[0].layers[0], model.encoder.tokens(given), model.encoder._edges(given)
    qkv = layer._heads(tokens)
    weights = attention.attention_weights(qkv, bias, layer.edge_bias)
    mixed = torch.einsum("bhqk,bkhw->bqhw", weights, qkv[:, :, 2]).flatten(2)
    torch.testing.assert_close(mixed, biased_attention(qkv, bias, layer.edge_bias), atol=1e-5, rtol=1e-4)


def test_rollout_without_attention_is_the_graph() -> None:
    """Queries of zero attend to all tokens alike: one block is half itself, half the mean, then half a step over the edges."""
    model = GraphModel(replace(SHAPE, num_blocks=1, num_layers=1), ATLASES).eval()
    layer = model.encoder.blocks[0].layers[0]
    with torch.no_grad():
        layer.qkv.weight.zero_()
        layer.qkv.bias.zero_()
    graphs = graphs_of(items=1)
    spread = normalised_adjacency(model.prompted(graphs).adjacency)
    spread = spread / spread.sum(-1, keepdim=True)
    first = 0.5 * torch.eye(12) + torch.full((12, 12), 0.5 / 12)
    wanted = ((first[2:] + spread[0] @ first[2:]) / 2).mean(0)
    torch.testing.assert_close(model.rollout(graphs)[0], wanted)
