"""Score disorders by their text alone, beside what a text must beat: no text, other texts, random vectors, no encoder.

The people tested have the disorder or none; nobody with the disorder was labelled for the model. Floors learn, on the
people the model was aligned with, to tell any of *their* disorders from none, and are applied to the same test people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field
from scipy import stats
from sklearn.metrics import roc_auc_score

from brainfm_cli.config import Frozen
from brainfm_cli.learning.forecasts import Forecast, TrainingFold
from brainfm_cli.learning.scores import Score
from brainfm_cli.learning.targets import Target
from brainfm_cli.learning.texts import DisorderText


class Shuffled(Frozen):
    """How well other texts tell the same people apart."""

    count: int
    """Texts of as many statements about random couplings."""
    mean: float
    """Mean AUROC."""
    mean_low: float
    """Lower end of the 95 % interval of that mean."""
    mean_high: float
    """Upper end."""
    low: float
    """2.5th percentile over texts."""
    high: float
    """97.5th percentile."""
    share_above: float
    """Share of them that reach the AUROC of the disorder's own text, (1 + b) / (1 + m)."""


class Retrieval(Frozen):
    """Whether a person's disorder is found among the texts."""

    texts: int
    """Texts to choose from."""
    people: int
    """People with one of these disorders."""
    first: float
    """Share of people whose own disorder's text scores highest."""
    reciprocal_rank: float
    """Mean of 1 / rank of the own text."""
    chance_first: float
    """The same of a random order."""
    chance_reciprocal_rank: float
    """The same of a random order."""


class TestedDisorder(Frozen):
    """One disorder scored by its text."""

    name: str
    """As the target column calls it."""
    text: str
    """What was said of it."""
    seen: bool
    """Whether the model was aligned with other people who have it: then this is no zero-shot score."""
    people: int
    """People tested, with the disorder or without any."""
    cases: int
    """Those with the disorder."""
    auroc: Score
    """By its own text."""
    neutral_spread: float
    """Largest difference between people's logits by a text that says nothing; 0 means it tells nobody apart."""
    shuffled: Shuffled
    """By texts about random couplings."""
    others: dict[str, Score]
    """AUROC of control rules and floors on the same people."""


class ZeroShot(Frozen):
    """What ``zero_shot.json`` holds."""

    model: str
    """Folder of the aligned model."""
    column: str
    """Column of participants.tsv."""
    disorders: tuple[TestedDisorder, ...]
    """Every disorder that was scored."""
    retrieval: Retrieval | None = None
    """Whether a person's own disorder is found among these texts; none for a single one."""


class TextSettings(Frozen):
    """Which disorders a model that was aligned with texts is asked about, and how."""

    disorders: tuple[str, ...] = ()
    """Values of the target column to score people for; empty takes those that the model was not aligned with."""
    texts: dict[str, str] = {}
    """Text by disorder, in place of the table's: free clinical prose."""
    table: Path | None = None
    """Table of texts, YAML or TSV; unset takes the texts that the model was aligned with, then the packaged table."""
    shuffles: int = Field(default=20, ge=2)
    """Control texts: as many statements about random couplings, as many stronger as weaker over all of them."""
    seed: int = Field(default=0, ge=0)
    """Seed of the control texts and of random vectors."""


@dataclass(frozen=True, kw_only=True)
class TextPredictor:
    """A rule that learns nothing from a fold: the logits of people are known."""

    scores: Mapping[str, float]
    """Logit by participant key."""

    def __call__(self, fold: TrainingFold, test: Sequence[str]) -> Forecast:
        """Probabilities of the disorder for ``test``; the decision is made at a logit of zero."""
        del fold
        probability = 1 / (1 + np.exp(-np.array([self.scores[name] for name in test])))
        return Forecast(test=np.stack([1 - probability, probability], axis=1))


def binary_target(target: Target, control: Sequence[str], disorder: str, *, trained: Sequence[str], tested: Sequence[str]) -> Target:
    """Any disorder against none for ``trained``, this one against none for ``tested``; everybody else is left out."""
    names = np.array([target.classes[int(value)] for value in target.observed])
    side = np.isin(list(target.participants), list(tested))
    kept = np.isin(list(target.participants), list(trained)) | (side & (np.isin(names, list(control)) | (names == disorder)))
    rows = np.flatnonzero(kept)
    return replace(
        target,
        name=disorder,
        kind="binary",
        classes=("none", disorder),
        ordered=False,
        participants=tuple(target.participants[row] for row in rows),
        observed=(~np.isin(names[rows], list(control))).astype(np.float64),
        dropped={},
        notes=(),
    )


def compare_shuffled(own: NDArray[np.float64], others: NDArray[np.float64], labels: NDArray[np.int64]) -> Shuffled:
    """AUROC of other texts, (people, texts) logits, beside that of the own one, (people,)."""
    areas = np.array([roc_auc_score(labels, column) for column in others.T])
    best = roc_auc_score(labels, own)
    low, high = np.percentile(areas, [2.5, 97.5])
    half = float(stats.t.ppf(0.975, len(areas) - 1) * areas.std(ddof=1) / np.sqrt(len(areas)))
    return Shuffled(
        count=len(areas),
        mean=round(float(areas.mean()), 4),
        mean_low=round(float(areas.mean()) - half, 4),
        mean_high=round(float(areas.mean()) + half, 4),
        low=round(float(low), 4),
        high=round(float(high), 4),
        share_above=round((1 + int(np.sum(areas >= best))) / (1 + len(areas)), 4),
    )


def retrieve(logits: NDArray[np.float64], own: NDArray[np.int64]) -> Retrieval:
    """Rank of each person's own text among (people, texts) logits; ties share their mean rank."""
    texts = logits.shape[1]
    mine = logits[np.arange(len(own)), own][:, None]
    rank = 1 + (logits > mine).sum(1) + 0.5 * ((logits == mine).sum(1) - 1)
    ranks = np.arange(1, texts + 1)
    return Retrieval(
        texts=texts,
        people=len(own),
        first=round(float(np.mean(rank == 1)), 4),
        reciprocal_rank=round(float(np.mean(1 / rank)), 4),
        chance_first=round(1 / texts, 4),
        chance_reciprocal_rank=round(float(np.mean(1 / ranks)), 4),
    )


def shuffled_texts(statements: int, called: Sequence[str], count: int, *, seed: int) -> list[DisorderText]:
    """Texts of as many statements about random couplings of the networks ``called``, directions balanced over all of them."""
    rng = np.random.default_rng(seed)
    pairs = list(combinations_with_replacement(range(len(called)), 2))
    statements = min(statements, len(pairs))
    signs = rng.permutation(np.resize([1, -1], count * statements)).reshape(count, statements)
    texts = []
    for row in signs:
        chosen = [pairs[place] for place in rng.choice(len(pairs), statements, replace=False)]
        clauses = [
            f"{'stronger' if sign > 0 else 'weaker'} coupling "
            + (f"within the {called[first]}" if first == second else f"between the {called[first]} and the {called[second]}")
            for (first, second), sign in zip(chosen, row, strict=True)
        ]
        texts.append(DisorderText(name="a disorder", description=f"The disorder shows {', '.join(clauses)}."))
    return texts
