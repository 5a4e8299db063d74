"""Let an aligned captioner speak: one caption per picture (repeats averaged) or per trial, and the same with the brain taken away."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from brainfm_cli.learning.voxel_samples import read_rows
from brainfm_cli.models.causal_language import Generated

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from brainfm_cli.bids.voxel_cohort import VoxelCohort
    from brainfm_cli.learning.voxel_samples import PersonTrials
    from brainfm_cli.models.language import TextEncoder
    from brainfm_cli.models.voxel_encoder import VoxelScale
    from brainfm_cli.systems.brain_caption.aligned import AlignedCaptioner

Average = Literal["repeats", "none"]
Alteration = Literal["none", "zeroed", "shuffled"]


@dataclass(frozen=True, kw_only=True)
class BeamChoice:
    """Which of several sentences fits what the brain's vector says: the vector holds more of the picture than the likeliest words do."""

    sentences: TextEncoder
    """The sentence encoder that brains were contrasted with."""
    weight: float
    """Of the cosine beside the mean log-probability of a token."""

    def best(self, said: Generated, brains: Tensor, beams: int) -> Generated:
        """One of every ``beams`` sentences in a row, for (items, width) unit vectors of brains."""
        vectors = self.sentences.sentences([text or "." for text in said.texts]).to(brains).unflatten(0, (-1, beams))
        cosines = (functional.normalize(vectors, dim=2) * brains[:, None]).sum(dim=2)
        scores = said.log_probability.unflatten(0, (-1, beams)) + self.weight * cosines.to(said.log_probability)
        places = scores.argmax(dim=1) + beams * torch.arange(len(scores), device=scores.device)
        return Generated(texts=tuple(said.texts[int(place)] for place in places), log_probability=said.log_probability[places])


@dataclass(frozen=True, kw_only=True)
class Viewing:
    """Trials that get one caption together."""

    participant: str
    """Who saw it."""
    name: str
    """The picture."""
    rows: tuple[int, ...]
    """Rows of the participant's store: all repeats, or one."""


@dataclass(frozen=True, kw_only=True)
class Spoken:
    """What the model says of one viewing."""

    viewing: Viewing
    """Of what."""
    caption: str
    """In words."""
    log_probability: float
    """Mean log-probability of its tokens."""
    vector: Tensor
    """(contrast width,) unit vector of the brain."""


def list_viewings(trials: PersonTrials, average: Average) -> list[Viewing]:
    """One viewing per picture with all its repeats, or one per trial; in the order of the store."""
    if average == "none":
        return [
            Viewing(participant=trials.participant, name=name, rows=(int(row),))
            for name, row in zip(trials.names, trials.rows, strict=True)
        ]
    rows: dict[str, list[int]] = {}
    for name, row in zip(trials.names, trials.rows, strict=True):
        rows.setdefault(name, []).append(int(row))
    return [Viewing(participant=trials.participant, name=name, rows=tuple(found)) for name, found in rows.items()]


@torch.no_grad()
def scaled_responses(scale: VoxelScale, cohort: VoxelCohort, viewings: Sequence[Viewing]) -> Tensor:
    """(viewings, voxels) z-scores, averaged over the trials of each viewing of one participant; read from disk here."""
    participant = viewings[0].participant
    rows = np.array([row for one in viewings for row in one.rows], np.int64)
    device = scale.get_buffer(f"mean_{participant}").device
    scaled = scale(participant, read_rows(cohort, participant, rows).to(device))
    owner = torch.tensor([place for place, one in enumerate(viewings) for _ in one.rows], device=device)
    sums = torch.zeros(len(viewings), scaled.shape[1], device=device).index_add_(0, owner, scaled)
    counts = torch.tensor([len(one.rows) for one in viewings], device=device)
    return sums / counts[:, None]


def speak(
    captioner: AlignedCaptioner,
    cohort: VoxelCohort,
    viewings: Sequence[Viewing],
    *,
    altered: Alteration = "none",
    seed: int = 0,
    beams: int = 1,
    max_tokens: int = 30,
    batch_size: int = 32,
    choice: BeamChoice | None = None,
) -> list[Spoken]:
    """Captions of viewings, in their order; ``choice`` says which of the beams where it is not the likeliest.

    ``altered`` takes the brain away: zeroed puts every voxel at its mean, shuffled exchanges the voxels of each person, by
    one permutation; then only the language model and what it has learnt of captions in general is left to speak.
    """
    spoken: list[Spoken | None] = [None] * len(viewings)
    for places in _by_participant(viewings, batch_size):
        part = [viewings[place] for place in places]
        scaled = alter(scaled_responses(captioner.model.scale, cohort, part), altered, seed)
        said, vectors = captioner.say(part[0].participant, scaled, beams=beams, max_tokens=max_tokens, choice=choice)
        for place, text, score, vector in zip(places, said.texts, said.log_probability.tolist(), vectors.cpu(), strict=True):
            spoken[place] = Spoken(viewing=viewings[place], caption=text, log_probability=score, vector=vector)
    return [one for one in spoken if one is not None]


def alter(scaled: Tensor, altered: Alteration, seed: int) -> Tensor:
    """(batch, voxels) responses as they are, at their mean, or with voxels exchanged."""
    if altered == "zeroed":
        return torch.zeros_like(scaled)
    if altered == "shuffled":
        order = torch.randperm(scaled.shape[1], generator=torch.Generator().manual_seed(seed))
        return scaled[:, order.to(scaled.device)]
    return scaled


def _by_participant(viewings: Sequence[Viewing], batch_size: int) -> Iterator[NDArray[np.int64]]:
    people = np.array([one.participant for one in viewings])
    for name in dict.fromkeys(people.tolist()):
        places = np.flatnonzero(people == name)
        yield from (places[start : start + batch_size] for start in range(0, len(places), batch_size))


@torch.no_grad()
def answer(
    captioner: AlignedCaptioner, cohort: VoxelCohort, viewing: Viewing, questions: Sequence[str], *, max_tokens: int = 60
) -> list[tuple[str, str]]:
    """Each question with its answer, the earlier ones being part of the conversation."""
    scaled = scaled_responses(captioner.model.scale, cohort, [viewing])
    prefix, _ = captioner.model.read(viewing.participant, scaled)
    language = captioner.language.to(prefix.device)
    turns: list[tuple[str, str]] = []
    for question in questions:
        said = language.generate(language.chat_prefix(prefix, question, turns), max_tokens=max_tokens)
        turns.append((question, said.texts[0]))
    return turns
