"""What a study is asked: a class, an ordered grade, or survival (Cox, or discrete time, with a competing end); its loss and its answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from brainfm_cli.learning.outcome_objectives import (
    baseline_hazard,
    cox_loss,
    fit_linear,
    hazard_loss,
    incidence_of_cox,
    incidence_of_hazards,
    likelihood_loss,
)
from brainfm_cli.models.outcome_links import HazardBaseline, OrderedThresholds

TaskKind = Literal["classification", "grading", "cox", "discrete"]
PENALTIES = (1.0, 0.3, 0.1, 0.03, 0.01, 0.003)
"""Ridge penalties of linear floors, strongest first; chosen on validation people."""


@dataclass(frozen=True, kw_only=True)
class StudyTask:
    """What is asked of everybody, and what is known."""

    kind: TaskKind
    """Which loss and answer."""
    labels: Mapping[str, int]
    """By participant the class, the grade, or the cause (0 censored, 1 the event, 2 the competing end)."""
    count: int
    """Classes, grades or causes."""
    times: Mapping[str, float] = field(default_factory=dict)
    """By participant the follow-up; empty without survival."""
    edges: tuple[float, ...] = ()
    """Of survival: times at which curves are told, which for discrete time are the upper ends of its bins."""

    @property
    def is_survival(self) -> bool:
        """Whether answers are curves over time."""
        return self.kind in {"cox", "discrete"}

    @property
    def outputs(self) -> int:
        """Scores per study."""
        return 1 if self.kind == "grading" else self.count

    def classes_of(self, people: Sequence[str]) -> NDArray[np.int64]:
        """(people,) labels."""
        return np.array([self.labels[label] for label in people], np.int64)

    def times_of(self, people: Sequence[str]) -> NDArray[np.float64]:
        """(people,) follow-up."""
        return np.array([self.times[label] for label in people], np.float64)

    def new_link(self, people: Sequence[str] = ()) -> nn.Module | None:
        """From scores to probabilities, starting where everybody among ``people`` is given the same; none where scores need no parameter."""
        if self.kind == "grading":
            return OrderedThresholds(np.bincount(self.classes_of(people), minlength=self.count).tolist() if people else [1] * self.count)
        if self.kind != "discrete":
            return None
        hazards = torch.full((len(self.edges), self.count), 0.1)
        if people:
            time, cause = self.times_of(people), self.classes_of(people)
            place = np.searchsorted(self.edges, time)
            for number in range(len(self.edges)):
                at_risk = max(1, int((place >= number).sum()))
                hazards[number] = torch.tensor([((place == number) & (cause == one)).sum() / at_risk for one in range(1, self.count + 1)])
        return HazardBaseline(hazards)

    def loss(self, scores: Tensor, link: nn.Module | None, labels: Tensor, times: Tensor, weights: Tensor | None = None) -> Tensor:
        """Mean loss of (people, outputs) scores; ``weights`` (classes,) balance classes."""
        if self.kind == "classification":
            return functional.cross_entropy(scores, labels, weight=None if weights is None else weights.to(scores))
        if self.kind == "cox":
            parts = [cox_loss(scores[:, number], times, labels == number + 1) for number in range(self.count)]
            return torch.stack(parts).sum().to(scores.dtype)
        assert link is not None  # noqa: S101  (new_link made one)
        if self.kind == "grading":
            return likelihood_loss(link(scores), labels)
        return hazard_loss(link(scores), times, labels, torch.tensor(self.edges, dtype=times.dtype, device=times.device))

    def baseline(self, scores: Tensor, people: Sequence[str]) -> Tensor | None:
        """(times, causes) cumulative baseline hazards of a Cox model from its training people's scores; none for other kinds."""
        if self.kind != "cox":
            return None
        time, cause, at = torch.tensor(self.times_of(people)), torch.tensor(self.classes_of(people)), torch.tensor(self.edges)
        columns = [baseline_hazard(scores[:, number], time, cause == number + 1, at.double()) for number in range(self.count)]
        return torch.stack(columns, dim=1)

    @torch.no_grad()
    def answer(self, scores: Tensor, link: nn.Module | None, baseline: Tensor | None) -> NDArray[np.float64]:
        """(people, classes) probabilities, or (people, times, causes) cumulative incidences."""
        if self.kind == "classification":
            return np.asarray(scores.double().softmax(dim=1).numpy(), np.float64)
        if self.kind == "cox":
            assert baseline is not None  # noqa: S101  (fitted with the scores)
            return np.asarray(incidence_of_cox(scores, baseline.double()).numpy(), np.float64)
        assert link is not None  # noqa: S101  (new_link made one)
        found = link(scores).double().log_softmax(dim=-1)  # once more, for the sums of single precision
        return np.asarray((found.exp() if self.kind == "grading" else incidence_of_hazards(found)).numpy(), np.float64)


@dataclass(frozen=True, kw_only=True)
class LinearAnswer:
    """A linear model of numbers per person, with the same loss as the head: clinical variables alone, or simple image features."""

    weights: Tensor
    """(numbers, outputs)."""
    bias: Tensor
    """(outputs,)."""
    link: nn.Module | None
    """From scores to probabilities."""
    baseline: Tensor | None
    """Of a Cox model."""
    task: StudyTask
    """What was asked."""
    penalty: float
    """Ridge penalty, chosen on validation people."""

    def answer(self, numbers: NDArray[np.float32]) -> NDArray[np.float64]:
        """Probabilities or incidences of (people, numbers)."""
        return self.task.answer(torch.tensor(numbers).double() @ self.weights + self.bias, self.link, self.baseline)


def fit_linear_answer(
    task: StudyTask, numbers: Mapping[str, NDArray[np.float32]], people: Sequence[str], validation_people: Sequence[str]
) -> LinearAnswer:
    """Fit on ``people`` along the penalties and keep the one of least loss on ``validation_people`` (the strongest where there is nobody)."""
    fitted = [_fit(task, numbers, people, penalty) for penalty in PENALTIES]
    if not validation_people:
        return fitted[0]
    labels, times = _truth(task, validation_people)
    given = torch.tensor(np.stack([numbers[label] for label in validation_people])).double()
    with torch.no_grad():
        losses = [float(task.loss(given @ one.weights + one.bias, one.link, labels, times)) for one in fitted]
    return fitted[int(np.argmin(losses))]


def _fit(task: StudyTask, numbers: Mapping[str, NDArray[np.float32]], people: Sequence[str], penalty: float) -> LinearAnswer:
    given, link = torch.tensor(np.stack([numbers[label] for label in people])).double(), task.new_link(people)
    labels, times = _truth(task, people)
    balance = balanced_weights(task, people)
    weights, bias = fit_linear(
        given, task.outputs, link, lambda scores: task.loss(scores, link, labels, times, balance),
        penalty=penalty, bias=task.kind == "classification",
    )  # fmt: skip
    scores = given @ weights + bias
    return LinearAnswer(weights=weights, bias=bias, link=link, baseline=task.baseline(scores, people), task=task, penalty=penalty)


def _truth(task: StudyTask, people: Sequence[str]) -> tuple[Tensor, Tensor]:
    return torch.tensor(task.classes_of(people)), torch.tensor(task.times_of(people) if task.is_survival else np.zeros(len(people)))


def balanced_weights(task: StudyTask, people: Sequence[str]) -> Tensor | None:
    """(classes,) weights that make every class count alike; none where the order of grades or times does the balancing."""
    if task.kind != "classification":
        return None
    counts = torch.bincount(torch.tensor(task.classes_of(people)), minlength=task.count).clamp_min(1)
    return counts.sum() / (task.count * counts)


def marginal_answer(task: StudyTask, people: Sequence[str], number: int) -> NDArray[np.float64]:
    """What everybody is told by one who has seen nobody: the shares of classes, or the incidences among training people."""
    if not task.is_survival:
        counts = np.bincount(task.classes_of(people), minlength=task.count)
        return np.tile(counts / counts.sum(), (number, 1))
    zero = torch.zeros(len(people), task.outputs, dtype=torch.float64)
    cox = StudyTask(kind="cox", labels=task.labels, count=task.count, times=task.times, edges=task.edges)
    return np.repeat(cox.answer(zero[:1], None, cox.baseline(zero, people)), number, axis=0)


def risk_of(incidences: NDArray[np.float64]) -> NDArray[np.float64]:
    """(people,) the event's cumulative incidence at the last time, by which people are ordered."""
    return np.asarray(incidences[:, -1, 0], np.float64)
