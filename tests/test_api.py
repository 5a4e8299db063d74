"""The Python interface: models load from their folder, cohorts are embedded as the systems do it, graphs are torch_geometric's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch_geometric.nn import GCNConv
from torch_geometric.utils import is_undirected

from brainfm_cli.api import attention_rollout, cohort_graphs, embed_cohort, load_cohort, load_model
from brainfm_cli.config import Execution
from brainfm_cli.errors import BrainFMError, InputNotFoundError, UsageError
from brainfm_cli.learning.pretraining import PretrainingSettings, prepare, pretrain_model
from brainfm_cli.systems.brain_graph import BrainGraphSettings
from tests.learning.cohorts import case_cohort

if TYPE_CHECKING:
    from pathlib import Path

PEOPLE = 20


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(packed cohort, model folder)."""
    root = tmp_path_factory.mktemp("api")
    cohort = case_cohort(root / "cohort", people=PEOPLE, atlases=("Toy", "Other"))
    factory = BrainGraphSettings(kind="brain-graph", preset="tiny", graph={"min_frames": 20})
    settings = PretrainingSettings(epochs=1, batch_size=8, steps=2)
    prepared = prepare(factory, settings, cohort, list(cohort.participants.index))
    pretrain_model(prepared, settings, Execution(device="cpu"), root / "model")
    return root / "cohort", root / "model"


def test_an_embedded_cohort_is_what_the_model_says_of_each_run(folders: tuple[Path, Path]) -> None:
    cohort, model = load_cohort(folders[0]), load_model(folders[1])
    table = embed_cohort(model, cohort, "Toy")
    assert list(table.index) == list(cohort.participants.index)
    assert table.shape == (PEOPLE, model.readout_width)
    runs = [row for row in cohort.index.itertuples() if row.atlas == "Toy"]
    expected = model.embed([cohort.series(run) for run in runs], "Toy")
    for run, values in zip(runs, expected, strict=True):
        np.testing.assert_allclose(table.loc[run.participant], values, atol=1e-5)
    some = embed_cohort(model, cohort, "Toy", participants=["p003", "p001"])
    assert list(some.index) == ["p003", "p001"]
    np.testing.assert_allclose(some, table.loc[["p003", "p001"]], atol=1e-5)


def test_attention_rollout_is_a_share_of_each_region(folders: tuple[Path, Path]) -> None:
    cohort, model = load_cohort(folders[0]), load_model(folders[1])
    table = attention_rollout(model, cohort, "Toy", participants=["p003", "p001"])
    assert list(table.index) == ["p003", "p001"]
    assert list(table.columns) == ["disorder token", "atlas token", *cohort.atlases["Toy"].regions.names]
    np.testing.assert_allclose(table.sum(axis=1), 1.0, atol=1e-5)
    with pytest.raises(UsageError, match="do not share the atlas 'AAL116'"):
        attention_rollout(model, cohort, "AAL116")


def test_a_loaded_model_is_frozen(folders: tuple[Path, Path]) -> None:
    model = load_model(folders[1])
    assert not model.module.training
    assert not any(parameter.requires_grad for parameter in model.module.parameters())


def test_graphs_are_the_runs(folders: tuple[Path, Path]) -> None:
    cohort = load_cohort(folders[0])
    graphs = list(cohort_graphs(cohort, "Toy", density=0.3))
    runs = [row for row in cohort.index.itertuples() if row.atlas == "Toy"]
    assert [graph.participant for graph in graphs] == [run.participant for run in runs]
    for graph, run in zip(graphs, runs, strict=True):
        correlation = np.corrcoef(cohort.series(run).T)
        first, second = graph.edge_index.numpy()
        np.testing.assert_allclose(graph.edge_attr[:, 0], correlation[first, second], atol=1e-5)
        assert is_undirected(graph.edge_index)
        off = ~np.eye(len(correlation), dtype=bool)
        np.testing.assert_allclose(graph.x.numpy()[off], np.arctanh(correlation[off]), atol=1e-4)
        # three of eight regions, united both ways: between 3 and 7 neighbours, and the nearest one is always there
        nearest = np.where(off, correlation, -np.inf).argmax(axis=1)
        assert {(row, column) for row, column in enumerate(nearest)} <= set(zip(first.tolist(), second.tolist(), strict=True))
    out = GCNConv(8, 4)(graphs[0].x, graphs[0].edge_index)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize(
    ("call", "kind", "told"),
    [
        (lambda cohort, model: embed_cohort(load_model(model), load_cohort(cohort)), UsageError, "share 2 atlases"),
        (lambda cohort, model: embed_cohort(load_model(model), load_cohort(cohort), "Third"), UsageError, "Third"),
        (lambda cohort, _: load_model(cohort), BrainFMError, "model"),
        (lambda _, model: load_cohort(model), InputNotFoundError, "no packed cohort"),
        (lambda cohort, _: next(cohort_graphs(load_cohort(cohort), "Third")), InputNotFoundError, "Third"),
    ],
)
def test_what_is_not_there_is_said(folders: tuple[Path, Path], call: object, kind: type[Exception], told: str) -> None:
    with pytest.raises(kind, match=told):
        call(*folders)  # type: ignore[operator]
