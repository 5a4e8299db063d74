"""Meta-learning: gradients against finite differences, who is drawn, what changes and what must not, and that a start transfers."""

from __future__ import annotations

import copy
import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning import meta as meta_module
from brainfm_cli.learning.checkpoints import AtlasRecord
from brainfm_cli.learning.meta import MetaSettings, Task, draw_people, list_tasks, meta_learn, read_starts, write_starts
from brainfm_cli.learning.tuning import AtlasInputs, prepare
from brainfm_cli.systems.brain_graph import BrainGraph, BrainGraphSettings
from tests.learning.cohorts import names_of, pack_cohort, series_of

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from brainfm_cli.bids.cohort import Cohort

PEOPLE = 160
DISORDERS = ("control", "A", "B", "C", "D")
QUICK = MetaSettings(epochs=2, shots=3, queries=4, inner_steps=2, exclude=("D",))


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Every disorder strengthens the same coupling; two datasets; some people have two runs."""
    rng = np.random.default_rng(5)
    names = names_of(PEOPLE)
    diagnosis = np.array(DISORDERS)[np.arange(PEOPLE) % 5]
    table = pd.DataFrame({"diagnosis": diagnosis, "dataset": np.where(np.arange(PEOPLE) < 100, "one", "two")}, index=names)
    series = {
        name: [series_of(0.4 + 1.2 * (ill != "control"), rng) for _ in range(1 + (place % 10 == 0))]
        for place, (name, ill) in enumerate(zip(names, diagnosis, strict=True))
    }
    return pack_cohort(tmp_path_factory.mktemp("meta"), table, series)


@pytest.fixture(scope="module")
def system(cohort: Cohort) -> BrainGraph:
    settings = BrainGraphSettings(kind="brain-graph", preset="tiny", width=16, feedforward=32, num_blocks=1)
    torch.manual_seed(0)
    system = settings.build({label: AtlasRecord.of(atlas) for label, atlas in cohort.atlases.items()})
    system.model.eval()
    return system


@pytest.fixture(scope="module")
def inputs(system: BrainGraph, cohort: Cohort) -> dict[str, AtlasInputs]:
    return {"Toy": prepare(system, cohort, sorted(cohort.participants.index), "Toy")}


def tasks_of(cohort: Cohort, inputs: dict[str, AtlasInputs], settings: MetaSettings) -> tuple[Task, ...]:
    table = cohort.participants
    return list_tasks(inputs, dict(table["diagnosis"]), dict(table["dataset"]), settings)


def state_of(system: BrainGraph) -> str:
    return hashlib.sha256(b"".join(value.numpy().tobytes() for value in system.model.state_dict().values())).hexdigest()


def test_tasks_are_disorders_of_one_dataset(cohort: Cohort, inputs: dict[str, AtlasInputs]) -> None:
    tasks = tasks_of(cohort, inputs, QUICK)
    assert [(task.dataset, task.disorder) for task in tasks] == [(where, what) for where in ("one", "two") for what in "ABC"]
    table, names = cohort.participants, np.array(inputs["Toy"].participants)
    for task in tasks:
        assert set(table.loc[names[task.cases], "diagnosis"]) == {task.disorder}
        assert set(table.loc[names[task.controls], "diagnosis"]) == {"control"}
        assert set(table.loc[names[[*task.cases, *task.controls]], "dataset"]) == {task.dataset}


def test_no_task_is_an_error(cohort: Cohort, inputs: dict[str, AtlasInputs]) -> None:
    with pytest.raises(InputDatasetError, match="more than 3 people"):
        tasks_of(cohort, inputs, QUICK.model_copy(update={"control": ("healthy",)}))


def test_support_and_query_people_are_never_the_same(cohort: Cohort, inputs: dict[str, AtlasInputs]) -> None:
    for number, task in enumerate(tasks_of(cohort, inputs, QUICK)):
        for epoch in range(20):
            support, query, near, far = draw_people(task, QUICK, [0, epoch, number])
            assert not set(support) & set(query)
            assert set(support[near == 1]) | set(query[far == 1]) <= set(task.cases)
            assert set(support[near == 0]) | set(query[far == 0]) <= set(task.controls)
            assert near.sum() == 3 == len(near) - near.sum()
    draws = {tuple(draw_people(task, QUICK, [0, epoch, 0])[0]) for epoch in range(20)}
    assert len(draws) > 15


@pytest.fixture
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def in_double(system: BrainGraph, inputs: AtlasInputs) -> tuple[BrainGraph, AtlasInputs]:
    model = copy.deepcopy(system.model).double()
    graphs = replace(inputs.graphs, features=inputs.graphs.features.double(), adjacency=inputs.graphs.adjacency.double())
    return replace(system, model=model), replace(inputs, graphs=graphs)


@pytest.mark.usefixtures("double_precision")
@pytest.mark.parametrize("order", ["first", "second"])
def test_gradients_are_those_of_the_adapted_loss(cohort: Cohort, system: BrainGraph, inputs: dict[str, AtlasInputs], order: str) -> None:
    """Second order: central differences of the query loss after adapting. First order: the gradient where the adapted copy stands."""
    settings = QUICK.model_copy(update={"order": order, "inner_rate": 0.02})
    task = tasks_of(cohort, inputs, QUICK)[0]
    people = draw_people(task, settings, [1, 2, 3])
    torch.manual_seed(1)
    learner = meta_module._Learner(*in_double(system, inputs["Toy"]))
    with torch.no_grad():
        learner.weight.normal_(std=0.1)
    learner.learn(people, settings, share=1.0)
    found = {name: value.grad.clone() for name, value in learner.named_parameters() if value.grad is not None}

    def after(name: str, direction: torch.Tensor, size: float) -> float:
        parameter = dict(learner.named_parameters())[name]
        with torch.no_grad():
            parameter.add_(size * direction)
        loss = learner.learn(people, settings, share=0.0)[1]
        with torch.no_grad():
            parameter.sub_(size * direction)
        return loss

    measured, given = [], []
    for name in ("weight", "prompt.graph.node.Toy", "prompt.token"):
        direction = torch.randn_like(found[name])
        measured.append((after(name, direction, 1e-5) - after(name, direction, -1e-5)) / 2e-5)
        given.append(float((found[name] * direction).sum()))
    if order == "second":
        assert given == pytest.approx(measured, rel=1e-4)
    else:
        assert given[0] != pytest.approx(measured[0], rel=0.02)


def test_the_start_changes_and_the_backbone_does_not(cohort: Cohort, system: BrainGraph, inputs: dict[str, AtlasInputs]) -> None:
    before = state_of(system)
    result = meta_learn(system, inputs, tasks_of(cohort, inputs, QUICK), QUICK)
    assert state_of(system) == before
    untouched = system.new_prompt("Toy").state_dict()
    changed = {name for name, value in result.starts["Toy"].prompt.items() if not torch.equal(value, untouched[name])}
    assert {"token", "graph.node.Toy", "graph.edge.Toy"} <= changed
    again = meta_learn(system, inputs, tasks_of(cohort, inputs, QUICK), QUICK)
    assert all(torch.equal(value, again.starts["Toy"].tensors()[name]) for name, value in result.starts["Toy"].tensors().items())
    other = meta_learn(system, inputs, tasks_of(cohort, inputs, QUICK), QUICK.model_copy(update={"seed": 1}))
    assert not torch.equal(result.starts["Toy"].weight, other.starts["Toy"].weight)


def test_a_start_tells_a_disorder_it_has_never_seen(
    cohort: Cohort, system: BrainGraph, inputs: dict[str, AtlasInputs], tmp_path: Path
) -> None:
    settings = MetaSettings(epochs=15, shots=5, inner_steps=3, outer_rate=0.02, exclude=("D",))
    result = meta_learn(system, inputs, tasks_of(cohort, inputs, settings), settings)
    assert result.losses[-1] < result.losses[0] < 0.75
    write_starts(tmp_path, result.starts)
    read = read_starts(tmp_path)["Toy"]
    assert all(torch.equal(value, read.tensors()[name]) for name, value in result.starts["Toy"].tensors().items())
    ready = BrainGraph(settings=system.settings, atlases=system.atlases, model=system.model, meta={"Toy": read})
    assert all(torch.equal(value, read.prompt[name]) for name, value in ready.new_prompt("Toy").state_dict().items())
    blocks = prepare(ready, cohort, sorted(cohort.participants.index), "Toy").blocks
    assert "meta" not in inputs["Toy"].blocks
    said = cohort.participants.loc[sorted(cohort.participants.index), "diagnosis"].to_numpy()
    unseen = np.isin(said, ("D", "control"))
    assert roc_auc_score(said[unseen] == "D", blocks["meta"][unseen, 0]) > 0.8
