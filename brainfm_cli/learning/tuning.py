"""Adapt a frozen backbone to one target: prompts by gradient, the head in closed form, both judged on inner validation people.

Works with any system that offers :class:`Tunable`. Each atlas has prompts and a head of its own; predictions are
averaged over the atlases that a person has. Nothing here writes files.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.config import Frozen
from brainfm_cli.learning.head_fit import Choice, FittedHead, Outcome, Told, choose, fit
from brainfm_cli.learning.samples import Windows, list_scans, whole_scans

Folds = Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]
_KEPT = 4
EMBEDDING = "embedding"
"""Name of the block that depends on the prompts."""
TEXT = "text"
"""Name of the block that says how much a person shows of what a text says of the target."""


class TuningSettings(Frozen):
    """How prompts and head are fitted."""

    epochs: int = Field(default=10, ge=0)
    """Longest tuning of the prompts, passes over the people; how long is chosen on inner validation people."""
    stops: int = Field(default=2, ge=1)
    """Number of evenly spaced lengths that are compared, beside not tuning at all."""
    batch_size: int = Field(default=128, ge=2)
    """Runs per step."""
    learning_rate: float = Field(default=1e-2, gt=0)
    """Adam's step for the prompts."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Pull of the prompts towards their pretrained state, per step, as a share of the learning rate."""
    inner_folds: int = Field(default=3, ge=2)
    """Folds of the people tuned on, for everything that is chosen; predict group uses its design's inner folds instead."""
    blocks: tuple[str, ...] = (EMBEDDING, "edges", "edges_log", "groups", "groups_log", TEXT, "meta", "donor")
    """What the head may read: the prompted embedding; connectivity (Fisher z) and its logarithm, of regions and of groups; how much a person
    shows of what a text says of the target, for a model aligned with texts; what a meta-learned start says before it is tuned; the embedding of a second frozen model, where one was given."""
    text_correlation: float = Field(default=0.4, ge=0, lt=1)
    """Correlation with the target that is expected of what a text says, before labels are seen (AUROC 0.73 in two equal classes)."""
    text_people: float = Field(default=40, ge=0)
    """How many labelled people that expectation is worth; 0 lets the labels alone decide what the text is worth."""
    balanced: bool = True
    """Whether every class weighs the same in the fit; probabilities follow the classes' own frequencies either way."""


class Tunable(Protocol):
    """What tuning needs of a system."""

    @property
    def module(self) -> nn.Module:
        """The backbone."""

    def graphs(self, windows: Windows) -> Any:  # noqa: ANN401
        """The frozen part of the input: a record of tensors with one row per window."""

    def new_prompt(self, atlas: str) -> nn.Module:
        """A prompt at its pretrained state."""

    def read(self, graphs: Any, prompt: Any) -> Tensor:  # noqa: ANN401  (each system has its own records and prompts)
        """(rows, width) embedding; gradients reach the prompt."""

    def connectivity_blocks(self, windows: Windows) -> dict[str, Tensor]:
        """Blocks that depend on no prompt, (rows, features) each."""


@dataclass(frozen=True, kw_only=True)
class AtlasInputs:
    """Everything that tuning and predicting need of some people in one atlas, computed once."""

    atlas: str
    """Atlas label."""
    participants: tuple[str, ...]
    """Participant keys, in the order of all rows of blocks."""
    owner: NDArray[np.int64]
    """(runs,) position in ``participants`` of each run's person."""
    graphs: Any
    """The frozen part of the encoder's input, one row per run."""
    blocks: dict[str, NDArray[np.float32]]
    """(people, features) blocks that depend on no prompt, averaged over runs."""
    embedded: dict[tuple[int, str], tuple[nn.Module, NDArray[np.float32]]] = field(default_factory=dict, repr=False, compare=False)
    """The last embeddings, by backbone and state of the prompt: folds and few-shot draws that leave the prompt untuned share one."""

    def positions(self, participants: Sequence[str]) -> NDArray[np.int64]:
        """Positions of those of ``participants`` that have this atlas."""
        place = {name: row for row, name in enumerate(self.participants)}
        return np.array([place[name] for name in participants if name in place], dtype=np.int64)

    def average(self, values: Tensor) -> NDArray[np.float32]:
        """(people, features) means over each person's runs."""
        sums = np.zeros((len(self.participants), values.shape[1]), np.float64)
        np.add.at(sums, self.owner, values.double().cpu().numpy())
        return (sums / np.bincount(self.owner, minlength=len(self.participants))[:, None]).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class TunedAtlas:
    """What was learnt for one target in one atlas."""

    prompt: dict[str, Tensor]
    """State of the prompt."""
    head: FittedHead
    """The head."""
    choice: Choice
    """What inner validation found."""
    epochs: int
    """Epochs of tuning that were chosen."""
    losses: tuple[tuple[float, ...], ...]
    """Training loss per epoch: one row per inner fold, then the final fit."""


@torch.no_grad()
def prepare(system: Tunable, cohort: Cohort, participants: Sequence[str], atlas: str, *, batch_size: int = 64) -> AtlasInputs:
    """Inputs of those ``participants`` that have runs in ``atlas``; on the backbone's device, blocks in memory.

    Raises
    ------
    InputDatasetError
        Nobody has a run in this atlas.
    """
    device = next(system.module.parameters()).device
    scans = list_scans(cohort, participants, [atlas])
    having = {scan.participant for scan in scans}
    kept = tuple(name for name in participants if name in having)
    place = {name: row for row, name in enumerate(kept)}
    graphs, blocks = [], []
    for start in range(0, len(scans), batch_size):
        windows = whole_scans(cohort, scans[start : start + batch_size], atlas).to(device)
        graphs.append(system.graphs(windows))
        blocks.append({name: values.cpu() for name, values in system.connectivity_blocks(windows).items()})
    inputs = AtlasInputs(
        atlas=atlas,
        participants=kept,
        owner=np.array([place[scan.participant] for scan in scans]),
        graphs=_joined(graphs),
        blocks={},
    )
    return replace(inputs, blocks={name: inputs.average(torch.cat([part[name] for part in blocks])) for name in blocks[0]})


def tune_atlas(
    system: Tunable, inputs: AtlasInputs, people: NDArray[np.int64], outcome: Outcome, folds: Folds, settings: TuningSettings, *, seed: int
) -> TunedAtlas:
    """Prompts and head for ``people`` (positions in ``inputs``), whose labels ``outcome`` holds in the same order.

    ``folds`` are positions in ``people``. Blocks, ridge and epochs are weighed on their validation parts; then prompts and
    head are refitted on all people.
    """
    shared = {name: values[people] for name, values in inputs.blocks.items() if name in settings.blocks}
    stops = _stops(settings) if EMBEDDING in settings.blocks else ()
    candidates, losses = [], []
    for training, _ in folds if stops else ():
        states, curve = _tune_prompt(system, inputs, people[training], outcome.take(training), stops, settings, seed=seed)
        candidates.append([{EMBEDDING: embed(system, inputs, state)[people]} for state in states])
        losses.append(curve)
    belief = Told(correlation=settings.text_correlation, people=settings.text_people)
    told = {TEXT: belief} if TEXT in shared and settings.text_people and outcome.targets().shape[1] == 1 else {}
    choice = choose(shared, candidates, outcome, folds, told=told)
    epochs = stops[choice.step] if stops else 0
    states, curve = _tune_prompt(system, inputs, people, outcome, (epochs,), settings, seed=seed)
    blocks = shared | ({EMBEDDING: embed(system, inputs, states[-1])[people]} if stops else {})
    return TunedAtlas(prompt=states[-1], head=fit(blocks, outcome, choice), choice=choice, epochs=epochs, losses=(*losses, curve))


def score_atlas(system: Tunable, inputs: AtlasInputs, tuned: TunedAtlas) -> NDArray[np.float64]:
    """(people, classes) probabilities or (people, 1) values of everybody in ``inputs``."""
    blocks = dict(inputs.blocks)
    if EMBEDDING in tuned.head.weights:
        blocks[EMBEDDING] = embed(system, inputs, tuned.prompt)
    return tuned.head.predict(blocks)


@torch.no_grad()
def embed(system: Tunable, inputs: AtlasInputs, prompt: Mapping[str, Tensor], *, batch_size: int = 128) -> NDArray[np.float32]:
    """(people, width) prompted embeddings, averaged over runs."""
    key = (id(system.module), _digest(prompt))
    if key not in inputs.embedded:
        module = system.new_prompt(inputs.atlas)
        module.load_state_dict(dict(prompt))
        rows = torch.arange(len(inputs.owner))
        found = inputs.average(torch.cat([system.read(select_rows(inputs.graphs, part), module) for part in rows.split(batch_size)]))
        while len(inputs.embedded) >= _KEPT:
            del inputs.embedded[next(iter(inputs.embedded))]
        inputs.embedded[key] = (system.module, found)  # the backbone is kept too, so that its id stays its own
    return inputs.embedded[key][1]


def _digest(prompt: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, value in sorted(prompt.items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _stops(settings: TuningSettings) -> tuple[int, ...]:
    return tuple(sorted({round(settings.epochs * part / settings.stops) for part in range(settings.stops + 1)}))


def _tune_prompt(
    system: Tunable,
    inputs: AtlasInputs,
    people: NDArray[np.int64],
    outcome: Outcome,
    stops: Sequence[int],
    settings: TuningSettings,
    *,
    seed: int,
) -> tuple[list[dict[str, Tensor]], tuple[float, ...]]:
    """The prompt's state at each of ``stops`` (epochs), and the training loss of every epoch.

    A linear probe is trained along, from the ridge solution on the untuned embedding; it is thrown away.
    """
    system.module.requires_grad_(False)  # noqa: FBT003
    system.module.eval()
    prompt = system.new_prompt(inputs.atlas)
    rows = np.flatnonzero(np.isin(inputs.owner, people))
    order = {person: row for row, person in enumerate(people)}
    label_rows = np.array([order[person] for person in inputs.owner[rows]])
    states, losses = [], []
    if 0 in stops:
        states.append(_state(prompt))
    if max(stops) == 0:
        return states, ()
    device = next(system.module.parameters()).device
    with torch.no_grad():
        start = torch.cat(
            [system.read(select_rows(inputs.graphs, part), prompt) for part in torch.from_numpy(rows).split(settings.batch_size)]
        )
    centre, spread = start.mean(0), start.std(0).clamp_min(1e-6)
    targets, weights = _targets(outcome)
    probe = _ridge_probe((start - centre) / spread, targets[label_rows].to(device), weights[label_rows].to(device))
    anchor = [parameter.detach().clone() for parameter in prompt.parameters()]
    optimiser = torch.optim.Adam(
        [
            {"params": list(prompt.parameters()), "lr": settings.learning_rate},
            {"params": list(probe.parameters()), "lr": 0.1 * settings.learning_rate},
        ]
    )
    shuffle = np.random.default_rng([seed, len(rows)])
    for epoch in range(1, max(stops) + 1):
        parts = np.array_split(shuffle.permutation(len(rows)), -(-len(rows) // settings.batch_size))
        total = 0.0
        for part in parts:
            embedding = (system.read(select_rows(inputs.graphs, torch.from_numpy(rows[part])), prompt) - centre) / spread
            loss = _loss(probe(embedding), targets[label_rows[part]].to(device), weights[label_rows[part]].to(device), outcome.num_classes)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            with torch.no_grad():
                for parameter, first in zip(prompt.parameters(), anchor, strict=True):
                    parameter.lerp_(first, settings.weight_decay * settings.learning_rate)
            total += float(loss.detach()) * len(part)
        losses.append(total / len(rows))
        if epoch in stops:
            states.append(_state(prompt))
    return states, tuple(losses)


def _targets(outcome: Outcome) -> tuple[Tensor, Tensor]:
    """(people, outputs) float targets of mean 0 and spread 1, or ±1 per class, and (people,) weights."""
    values = outcome.targets()
    if outcome.num_classes == 0:
        values = (values - values.mean()) / (values.std() or 1.0)
    return torch.from_numpy(values).float(), torch.from_numpy(outcome.weights()).float()


def _ridge_probe(features: Tensor, targets: Tensor, weights: Tensor) -> nn.Linear:
    """A linear layer at the ridge solution with penalty = number of features."""
    width = features.shape[1]
    root = weights.sqrt()[:, None]
    mean = (weights[:, None] * targets).sum(0) / weights.sum()
    scaled = root * features
    system = scaled.T @ scaled + width * torch.eye(width, device=features.device)
    probe = nn.Linear(width, targets.shape[1]).to(features.device)
    with torch.no_grad():
        probe.weight.copy_(torch.linalg.solve(system, scaled.T @ (root * (targets - mean))).T)
        probe.bias.copy_(mean)
    return probe


def _loss(scores: Tensor, targets: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    if num_classes == 0:
        return (weights[:, None] * (scores - targets).square()).mean()
    # One logistic per output: ±1 targets, scores of the ridge probe are about half a log-odd.
    return (weights[:, None] * functional.softplus(-2 * targets * scores)).mean()


def _state(prompt: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in prompt.state_dict().items()}


def _joined(records: Sequence[Any]) -> Any:  # noqa: ANN401  (any frozen record of tensors)
    first = records[0]
    tensors = {field.name: [getattr(record, field.name) for record in records] for field in fields(first)}
    return replace(first, **{name: torch.cat(values) for name, values in tensors.items() if isinstance(values[0], Tensor)})


def select_rows(record: Any, rows: Tensor) -> Any:  # noqa: ANN401  (any frozen record of tensors)
    """Some rows of every tensor of a record."""
    tensors = {field.name: getattr(record, field.name) for field in fields(record)}
    return replace(record, **{name: value[rows.to(value.device)] for name, value in tensors.items() if isinstance(value, Tensor)})
