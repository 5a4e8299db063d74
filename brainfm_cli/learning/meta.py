"""Meta-learning of a start for prompts and head: what helps to tell any disorder apart from few people (MAML, Finn et al. 2017).

A task is one disorder of one dataset in one atlas against that dataset's people without a disorder. In every task a few people
(support) adapt a copy of prompts and linear head by gradient steps; other people (query) judge the adapted copy, and the start
moves so that the next adaptation ends better. The backbone stays frozen. Nothing here writes files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from brainfm_cli.config import Frozen
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.checkpoints import read_tensors, write_tensors
from brainfm_cli.learning.tuning import AtlasInputs, Tunable, select_rows

META_FILE = "meta.safetensors"
_SMALLEST_SPREAD = 1e-6
_SPACE = ":"  # between atlas and tensor; no atlas label holds it


class MetaTunable(Tunable, Protocol):
    """What meta-learning needs of a system beside tuning."""

    def through_gradients(self) -> AbstractContextManager[None]:
        """Inside, the backbone has second derivatives."""


class MetaSettings(Frozen):
    """How a start is meta-learned over the disorders of the target column."""

    control: tuple[str, ...] = ("control",)
    """Values of people without a disorder."""
    exclude: tuple[str, ...] = ()
    """Disorders that must not be learnt from: those that the start will be tested on."""
    order: Literal["first", "second"] = "first"
    """Whether the outer step looks through the inner steps (second) or takes them as given (first)."""
    shots: int = Field(default=5, ge=1)
    """Support people per class."""
    queries: int = Field(default=10, ge=1)
    """Query people per class at most; others than the support."""
    inner_steps: int = Field(default=5, ge=1)
    """Gradient steps on the support."""
    inner_rate: float = Field(default=1e-2, gt=0)
    """Step size of the inner steps."""
    outer_rate: float = Field(default=1e-3, gt=0)
    """Adam's step size for the start."""
    tasks_per_step: int = Field(default=4, ge=1)
    """Tasks per step of the start."""
    epochs: int = Field(default=50, ge=1)
    """Passes over all tasks, each with new support and query people."""
    seed: int = Field(default=0, ge=0)
    """Seed of who supports and who queries, and of the order of tasks."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """One disorder of one dataset in one atlas."""

    disorder: str
    """Its name."""
    dataset: str
    """Whose people."""
    atlas: str
    """Atlas label."""
    cases: NDArray[np.int64]
    """Positions in the atlas' inputs of people with it."""
    controls: NDArray[np.int64]
    """Positions of the dataset's people without a disorder."""


@dataclass(frozen=True, kw_only=True)
class MetaStart:
    """What meta-learning leaves behind in one atlas."""

    prompt: dict[str, Tensor]
    """State of the prompt."""
    weight: Tensor
    """(width,) weights of the linear head on the standardised embedding."""
    bias: Tensor
    """() offset of the head."""
    centre: Tensor
    """(width,) mean of the embedding before meta-learning."""
    spread: Tensor
    """(width,) its standard deviation."""

    def score(self, embedding: Tensor) -> Tensor:
        """(rows,) log odds that the start gives (rows, width) embeddings read with its prompt."""
        own = {name: getattr(self, name).to(embedding.device) for name in ("weight", "bias", "centre", "spread")}
        return (embedding - own["centre"]) / own["spread"] @ own["weight"] + own["bias"]

    def tensors(self) -> dict[str, Tensor]:
        """All of it, by name."""
        own = {name: getattr(self, name) for name in ("weight", "bias", "centre", "spread")}
        return own | {f"prompt.{name}": value for name, value in self.prompt.items()}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> MetaStart:
        """The reverse of :meth:`tensors`."""
        prompt = {name.removeprefix("prompt."): value for name, value in tensors.items() if name.startswith("prompt.")}
        return cls(prompt=prompt, **{name: tensors[name] for name in ("weight", "bias", "centre", "spread")})


@dataclass(frozen=True, kw_only=True)
class MetaResult:
    """A meta-learned start and how it came about."""

    starts: dict[str, MetaStart]
    """By atlas."""
    tasks: tuple[Task, ...]
    """What was learnt from."""
    losses: tuple[float, ...]
    """Mean query loss after adaptation, per epoch."""
    before: tuple[float, ...]
    """Mean query loss before adaptation, per epoch."""


def list_tasks(
    inputs: Mapping[str, AtlasInputs], diagnosis: Mapping[str, str], dataset: Mapping[str, str], settings: MetaSettings
) -> tuple[Task, ...]:
    """Every (dataset, disorder, atlas) with more than ``shots`` people on both sides.

    Parameters
    ----------
    inputs
        By atlas.
    diagnosis, dataset
        Of every participant key.

    Raises
    ------
    InputDatasetError
        There is none.
    """
    tasks = []
    for atlas, one in sorted(inputs.items()):
        said = np.array([diagnosis[name] for name in one.participants])
        where = np.array([dataset[name] for name in one.participants])
        for source in sorted(set(where)):
            controls = np.flatnonzero((where == source) & np.isin(said, settings.control))
            for disorder in sorted(set(said[where == source]) - {*settings.control, *settings.exclude, ""}):
                cases = np.flatnonzero((where == source) & (said == disorder))
                if min(len(cases), len(controls)) > settings.shots:
                    tasks.append(Task(disorder=disorder, dataset=source, atlas=atlas, cases=cases, controls=controls))
    if not tasks:
        raise InputDatasetError(
            f"no disorder of one dataset has more than {settings.shots} people with and without it",
            fix="lower meta.shots, name the people without a disorder (meta.control), or relax 'where' and meta.exclude",
        )
    return tuple(tasks)


def draw_people(task: Task, settings: MetaSettings, seed: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64], Tensor, Tensor]:
    """Support and query people, who are never the same, with their (people,) float labels; cases first."""
    draw = np.random.default_rng(list(seed))
    sides = [draw.permutation(side) for side in (task.cases, task.controls)]
    support = [side[: settings.shots] for side in sides]
    query = [side[settings.shots : settings.shots + settings.queries] for side in sides]

    def labels(parts: Sequence[NDArray[np.int64]]) -> Tensor:
        return torch.cat([torch.ones(len(parts[0])), torch.zeros(len(parts[1]))])

    return np.concatenate(support), np.concatenate(query), labels(support), labels(query)


def meta_learn(system: MetaTunable, inputs: Mapping[str, AtlasInputs], tasks: Sequence[Task], settings: MetaSettings) -> MetaResult:
    """A start for prompts and head over all ``tasks``; the same seed gives the same start."""
    system.module.requires_grad_(False)  # noqa: FBT003
    system.module.eval()
    learners = {atlas: _Learner(system, inputs[atlas]) for atlas in sorted({task.atlas for task in tasks})}
    optimiser = torch.optim.Adam([p for learner in learners.values() for p in learner.parameters()], lr=settings.outer_rate)
    losses, before = [], []
    for epoch in range(settings.epochs):
        order = np.random.default_rng([settings.seed, epoch]).permutation(len(tasks))
        sums = np.zeros(2)
        for group in np.array_split(order, -(-len(order) // settings.tasks_per_step)):
            optimiser.zero_grad(set_to_none=True)
            for number in group:
                people = draw_people(tasks[number], settings, [settings.seed, epoch, int(number)])
                first, adapted = learners[tasks[number].atlas].learn(people, settings, share=1 / len(group))
                sums += first, adapted
            optimiser.step()
        before.append(float(sums[0] / len(tasks)))
        losses.append(float(sums[1] / len(tasks)))
    return MetaResult(
        starts={atlas: learner.start() for atlas, learner in learners.items()},
        tasks=tuple(tasks),
        losses=tuple(losses),
        before=tuple(before),
    )


def write_starts(folder: Path, starts: Mapping[str, MetaStart]) -> Path:
    """Write meta.safetensors into a model folder; gives back its path."""
    tensors = {f"{atlas}{_SPACE}{name}": value for atlas, start in starts.items() for name, value in start.tensors().items()}
    return write_tensors(folder / META_FILE, tensors)


def read_starts(folder: Path) -> dict[str, MetaStart]:
    """The starts of a model folder, by atlas; none where nothing was meta-learned."""
    if not (folder / META_FILE).is_file():
        return {}
    by_atlas: dict[str, dict[str, Tensor]] = {}
    for key, value in read_tensors(folder / META_FILE).items():
        atlas, _, name = key.partition(_SPACE)
        by_atlas.setdefault(atlas, {})[name] = value
    return {atlas: MetaStart.of(tensors) for atlas, tensors in by_atlas.items()}


class _Learner(nn.Module):
    """Prompt and linear head in one atlas, from the frozen backbone's standardised embedding."""

    centre: Tensor
    spread: Tensor

    def __init__(self, system: MetaTunable, inputs: AtlasInputs) -> None:
        super().__init__()
        self._system, self._inputs = system, inputs
        self.prompt = system.new_prompt(inputs.atlas)
        with torch.no_grad():
            rows = torch.arange(len(inputs.owner))
            embedded = torch.cat([system.read(select_rows(inputs.graphs, part), self.prompt) for part in rows.split(128)])
        self.register_buffer("centre", embedded.mean(0))
        self.register_buffer("spread", embedded.std(0).clamp_min(_SMALLEST_SPREAD))
        self.weight = nn.Parameter(torch.zeros_like(embedded[0]))
        self.bias = nn.Parameter(torch.zeros_like(embedded[0, 0]))

    def forward(self, graphs: Any) -> Tensor:  # noqa: ANN401  (each system's own record)
        """(rows,) log odds."""
        standardised = (self._system.read(graphs, self.prompt) - self.centre) / self.spread
        return standardised @ self.weight + self.bias

    def learn(
        self, people: tuple[NDArray[np.int64], NDArray[np.int64], Tensor, Tensor], settings: MetaSettings, *, share: float
    ) -> tuple[float, float]:
        """Adapt on the support and add the gradient of the query loss; gives back that loss before and after adapting."""
        support, query, support_labels, query_labels = people
        near, near_labels = self._rows(support, support_labels)
        far, far_labels = self._rows(query, query_labels)
        fast: dict[str, Tensor] = dict(self.named_parameters())
        twice = settings.order == "second"
        with torch.no_grad():
            first = float(_loss(functional_call(self, fast, (far,)), far_labels))
        with self._system.through_gradients() if twice else nullcontext():
            for _ in range(settings.inner_steps):
                loss = _loss(functional_call(self, fast, (near,)), near_labels)
                gradients = torch.autograd.grad(loss, list(fast.values()), create_graph=twice)
                # Where the inner gradients have no graph, d(adapted)/d(start) is the identity: first-order MAML.
                fast = {name: value - settings.inner_rate * slope for (name, value), slope in zip(fast.items(), gradients, strict=True)}
            loss = _loss(functional_call(self, fast, (far,)), far_labels)
            (share * loss).backward()
        return first, float(loss.detach())

    def start(self) -> MetaStart:
        """What was learnt, on the CPU."""
        own = {name: value.detach().cpu().clone() for name, value in self.state_dict().items()}
        return MetaStart(
            prompt={name.removeprefix("prompt."): value for name, value in own.items() if name.startswith("prompt.")},
            weight=own["weight"],
            bias=own["bias"],
            centre=own["centre"],
            spread=own["spread"],
        )

    def _rows(self, people: NDArray[np.int64], labels: Tensor) -> tuple[Any, Tensor]:
        """The runs of these people and a label for each."""
        label_of = {int(person): float(label) for person, label in zip(people, labels, strict=True)}
        rows = np.flatnonzero(np.isin(self._inputs.owner, people))
        values = [label_of[int(person)] for person in self._inputs.owner[rows]]
        return select_rows(self._inputs.graphs, torch.from_numpy(rows)), torch.tensor(
            values, device=self.bias.device, dtype=self.bias.dtype
        )


def _loss(log_odds: Tensor, labels: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(log_odds, labels)
