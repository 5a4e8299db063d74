"""Fit a linear head on several blocks of features: which blocks, how much ridge and how long the prompts were
tuned are weighed on inner validation people, then everything is refitted on all people given.

No set of blocks is simply chosen: on a few hundred people the held-out winner is often luck. Each set and penalty
is weighted by its held-out likelihood (pseudo-BMA; Geisser and Eddy 1979, Yao et al. 2018); an average of linear
heads is one linear head. Everything runs on Gram matrices, so that 80,000 edges cost no more than 100. No torch.

A block may be *told*: one number per person whose direction is known before any label is seen, such as what a text
says of the target. With ten people its sign and its worth would be learnt from noise; so it also enters as it is, its
agreement with the target being taken for known from some number of people before, whose sums are added to those observed
(a conjugate prior).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import minimize

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    Matrix = NDArray[np.float64]
    Blocks = Mapping[str, NDArray[np.float32]]
    Folds = Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]]

PENALTIES = tuple(float(value) for value in np.logspace(-2, 3, 11))
"""Ridge penalties tried, relative to kernels whose mean diagonal is 1."""
SMALLEST_SLOPE = 0.05
"""Calibration may not turn a score around: on small samples held-out scores lean against the labels by chance."""
SLOPE_PEOPLE = 10
"""A slope on a continuous target is drawn towards 0 as by so many people in whom score and target have nothing to do with each other."""
SMALLEST_WEIGHT = 0.02
"""Heads with less weight are left out of the average."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is predicted, one entry per person."""

    values: Matrix
    """Class codes 0, 1, …, or the continuous target."""
    num_classes: int
    """0 for a continuous target."""
    balanced: bool = True
    """Whether every class weighs the same in the fit."""

    def take(self, people: NDArray[np.int64]) -> Outcome:
        """The outcome of some people."""
        return Outcome(values=self.values[people], num_classes=self.num_classes, balanced=self.balanced)

    @property
    def codes(self) -> NDArray[np.int64]:
        """(people,) class codes."""
        return self.values.astype(np.int64)

    def targets(self) -> Matrix:
        """(people, outputs): ±1 per class (one column for two classes), or the values themselves."""
        if self.num_classes == 0:
            return self.values[:, None].astype(np.float64)
        signs = np.where(self.codes[:, None] == np.arange(self.num_classes), 1.0, -1.0)
        return signs[:, 1:] if self.num_classes == 2 else signs

    def weights(self) -> Matrix:
        """(people,) weights of mean 1."""
        if self.num_classes == 0 or not self.balanced:
            return np.ones(len(self.values))
        counts = np.bincount(self.codes, minlength=self.num_classes)
        weights = len(self.values) / counts[self.codes]
        return weights / weights.mean()


@dataclass(frozen=True, kw_only=True)
class Told:
    """What is believed of a told block before labels are seen."""

    correlation: float
    """With the target, within a sample in which every class weighs the same."""
    people: float
    """How many labelled people this belief is worth."""


@dataclass(frozen=True, kw_only=True)
class Component:
    """One head of the average."""

    blocks: tuple[str, ...]
    """Blocks that it reads, each scaled to the same average size."""
    penalty: float | None
    """Ridge penalty; None for a told block taken as it is."""
    weight: float
    """Share in the average; shares add up to 1."""
    scale: float
    """Factor that brings its held-out scores to the size of the target."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What inner validation found."""

    step: int
    """Position of the candidate (how long the prompts were tuned) with the most evidence."""
    components: tuple[Component, ...]
    """The heads to average."""
    score: float
    """Held-out correlation of the average with the target, within folds."""
    scores: dict[str, float]
    """Held-out correlation of the best penalty of every set of blocks, for the report."""
    steps: tuple[float, ...]
    """Held-out correlation of the best head that reads tuned blocks, per candidate."""
    held_out: Matrix
    """(people, outputs) held-out scores of the average; NaN for people in no validation part."""

    def shares(self) -> dict[str, float]:
        """Share of each block in the average, adding up to 1."""
        found: dict[str, float] = {}
        for component in self.components:
            for name in component.blocks:
                found[name] = found.get(name, 0.0) + component.weight / len(component.blocks)
        return dict(sorted(found.items()))


@dataclass(frozen=True, kw_only=True)
class FittedHead:
    """A linear head: score = Σ_blocks features · weight + bias, then calibration."""

    num_classes: int
    """0 for a continuous target."""
    weights: dict[str, Matrix]
    """Per block, (features, outputs)."""
    bias: Matrix
    """(outputs,)."""
    slope: float
    """Calibration of scores to log-odds; 1 for continuous targets."""
    shift: Matrix
    """(outputs,) calibration offset; 0 for continuous targets."""

    def scores(self, blocks: Blocks) -> Matrix:
        """(people, outputs) uncalibrated scores."""
        return self.bias + sum(blocks[name] @ weight for name, weight in self.weights.items())

    def predict(self, blocks: Blocks) -> Matrix:
        """(people, classes) probabilities, or (people, 1) values of a continuous target."""
        scores = self.scores(blocks)
        return probabilities_of(scores, self.slope, self.shift) if self.num_classes else scores


def choose(
    shared: Blocks,
    candidates: Sequence[Sequence[Blocks]],
    outcome: Outcome,
    folds: Folds,
    *,
    told: Mapping[str, Told] | None = None,
) -> Choice:
    """The weights of all sets of blocks and penalties, and the candidate, by how well they predict inner validation people.

    Parameters
    ----------
    shared
        Blocks that do not depend on tuning, (people, features) each.
    candidates
        ``candidates[fold][step]``: blocks of all people as seen by prompts that were tuned, without the fold's
        validation people, for ``step`` units of time. Empty where nothing is tuned.
    folds
        (training, validation) positions; validation parts are disjoint.
    told
        What is believed of those of ``shared`` that are told, one feature each, larger where the target is.
    """
    tables = _held_out_tables(shared, candidates, outcome, folds)
    beliefs: dict[tuple[str, ...], Told] = {}
    for name, belief in (told or {}).items():
        beliefs[name,] = belief
        tables[0, (name,)] = _as_it_is(shared[name], outcome, folds)
    tuned = set(candidates[0][0]) if candidates else set()
    people = sum(len(part) for _, part in folds)
    fits = {
        (step, mix, row): _agreement(scores, outcome, folds, beliefs.get(mix))
        for (step, mix), table in tables.items()
        for row, scores in enumerate(table)
    }
    best: dict[int, float] = {}
    for (step, mix, _), (correlation, _) in fits.items():
        if not tuned or set(mix) & tuned:
            best[step] = max(best.get(step, -1.0), correlation)
    step = max(best, key=lambda place: best[place])
    # What does not read tuned blocks was computed at step 0 and holds at every step.
    eligible = {key: fit for key, fit in fits.items() if key[0] == step or not set(key[1]) & tuned}
    worth = {mix: people + belief.people for mix, belief in beliefs.items()}
    evidence = {key: -0.5 * worth.get(key[1], people) * np.log1p(-(min(max(r, 0.0), 0.999999) ** 2)) for key, (r, _) in eligible.items()}
    # Before labels are seen, one told head weighs as much as all that are learnt: among hundreds, some fit ten people by luck.
    learnt = sum(key[1] not in beliefs for key in evidence)
    evidence |= {key: value + np.log(max(learnt, 1)) for key, value in evidence.items() if key[1] in beliefs and eligible[key][0] > 0}
    highest = max(evidence.values())
    weights = {key: float(np.exp(value - highest)) for key, value in evidence.items()}
    kept = {key: weight for key, weight in weights.items() if weight >= SMALLEST_WEIGHT * max(weights.values())}
    total = sum(kept.values())
    components = tuple(
        Component(blocks=mix, penalty=None if mix in beliefs else PENALTIES[row], weight=weight / total, scale=eligible[step_, mix, row][1])
        for (step_, mix, row), weight in kept.items()
    )
    base = _base(outcome, folds)
    average = base + sum(weight / total * eligible[key][1] * (tables[key[0], key[1]][key[2]] - base) for key, weight in kept.items())
    by_mix: dict[str, float] = {}
    for key, (correlation, _) in eligible.items():
        observed = _agreement(tables[key[0], key[1]][key[2]], outcome, folds)[0] if key[1] in beliefs else correlation
        by_mix["+".join(key[1])] = max(by_mix.get("+".join(key[1]), -1.0), observed)
    return Choice(
        step=step,
        components=components,
        score=_agreement(average, outcome, folds)[0],
        scores=by_mix,
        steps=tuple(best[place] for place in sorted(best)),
        held_out=average,
    )


def fit(blocks: Blocks, outcome: Outcome, choice: Choice) -> FittedHead:
    """The head of ``choice``, fitted on everybody in ``blocks``."""
    weights, targets = outcome.weights(), outcome.targets()
    share, root = weights / weights.sum(), np.sqrt(weights)[:, None]
    mean = share @ targets
    names = sorted({name for component in choice.components for name in component.blocks})
    centre = {name: share @ blocks[name].astype(np.float64) for name in names}
    centred = {name: blocks[name] - centre[name] for name in names}
    size = {name: _size(np.square(centred[name]).sum(1)) for name in names}
    kernels = {name: centred[name] @ centred[name].T / size[name] for name in names}
    linear = {name: np.zeros((blocks[name].shape[1], targets.shape[1])) for name in names}
    bias = np.zeros(targets.shape[1])
    for component in choice.components:
        if component.penalty is None:
            (name,) = component.blocks
            linear[name] += component.weight * component.scale / np.sqrt(size[name])
            continue
        kernel = sum(kernels[name] for name in component.blocks) / len(component.blocks)
        system = root * kernel * root.T + component.penalty * np.eye(len(kernel))
        dual = component.weight * component.scale * root * np.linalg.solve(system, root * (targets - mean))
        for name in component.blocks:
            linear[name] += centred[name].T @ dual / (size[name] * len(component.blocks))
        bias += component.weight * component.scale * mean
    if outcome.num_classes == 0:
        bias = mean  # scaled scores spread around the mean of the target
    bias = bias - sum(centre[name] @ linear[name] for name in names)
    known = np.flatnonzero(~np.isnan(choice.held_out).any(1))
    slope, shift = _calibrate(choice.held_out[known], outcome.take(known))
    return FittedHead(num_classes=outcome.num_classes, weights=linear, bias=bias, slope=slope, shift=shift)


def probabilities_of(scores: Matrix, slope: float, shift: Matrix) -> Matrix:
    """(people, classes) probabilities of calibrated scores; one output stands for two classes."""
    odds = slope * scores + shift
    if odds.shape[1] == 1:
        odds = np.concatenate([np.zeros_like(odds), odds], axis=1)
    exponent = np.exp(odds - odds.max(1, keepdims=True))
    return exponent / exponent.sum(1, keepdims=True)


def _held_out_tables(
    shared: Blocks, candidates: Sequence[Sequence[Blocks]], outcome: Outcome, folds: Folds
) -> dict[tuple[int, tuple[str, ...]], Matrix]:
    """Per candidate and set of blocks, (penalties, people, outputs) held-out scores."""
    shape = (len(PENALTIES), *outcome.targets().shape)
    static = {name: _gram(values) for name, values in shared.items()}
    tables: dict[tuple[int, tuple[str, ...]], Matrix] = {}
    for fold, (training, validation) in enumerate(folds):
        part = outcome.take(training)
        kernels = {name: _split(gram, training, validation, part.weights()) for name, gram in static.items()}
        for step, blocks in enumerate(candidates[fold] if candidates else [{}]):
            tuned = {name: _split(_gram(values), training, validation, part.weights()) for name, values in blocks.items()}
            for mix in _mixes([*kernels, *tuned]):
                if step and not set(mix) & set(tuned):
                    continue  # does not depend on tuning: computed at the first step
                pairs = [(kernels | tuned)[name] for name in mix]
                inside, outside = (np.mean([pair[side] for pair in pairs], axis=0) for side in (0, 1))
                tables.setdefault((step, mix), np.full(shape, np.nan))[:, validation] = _ridge_path(inside, outside, part)
    return tables


def _as_it_is(block: NDArray[np.float32], outcome: Outcome, folds: Folds) -> Matrix:
    """(1, people, outputs) held-out scores of a told block: its deviation from the training people's mean in units of their spread."""
    values, scores = block.astype(np.float64), np.full((1, *outcome.targets().shape), np.nan)
    if values.shape[1] != 1 or scores.shape[2] != 1:
        raise ValueError("a told block has one feature, and tells of a target with one output")
    base = _base(outcome, folds)
    for training, validation in folds:
        weights = outcome.take(training).weights()
        centre = (weights / weights.sum()) @ values[training]
        spread = np.sqrt(_size(np.square(values[training] - centre).sum(1)))
        scores[0, validation] = base[validation] + (values[validation] - centre) / spread
    return scores


def _base(outcome: Outcome, folds: Folds) -> Matrix:
    """(people, outputs) what scaled scores spread around: of a continuous target the mean of each fold's training people, as in the fit."""
    base = np.full(outcome.targets().shape, np.nan)
    for training, validation in folds:
        part = outcome.take(training)
        base[validation] = (part.weights() / part.weights().sum()) @ part.targets() if outcome.num_classes == 0 else 0.0
    return base


def _mixes(names: Iterable[str]) -> list[tuple[str, ...]]:
    names = tuple(names)
    return [mix for size in range(1, len(names) + 1) for mix in itertools.combinations(names, size)]


def _gram(values: NDArray[np.float32]) -> Matrix:
    # Centred on everybody first: the fold's own centring then works on small numbers.
    centred = values - values.mean(0, keepdims=True)
    return (centred @ centred.T).astype(np.float64)


def _split(gram: Matrix, training: NDArray[np.int64], validation: NDArray[np.int64], weights: Matrix) -> tuple[Matrix, Matrix]:
    """Training and validation-by-training kernels, centred and scaled by training people only."""
    share = weights / weights.sum()
    towards = gram[:, training] @ share
    offset = share @ towards[training]
    inside = gram[np.ix_(training, training)] - towards[training, None] - towards[training] + offset
    outside = gram[np.ix_(validation, training)] - towards[validation, None] - towards[training] + offset
    size = _size(inside.diagonal())
    return inside / size, outside / size


def _size(squares: Matrix) -> float:
    return float(squares.mean()) or 1.0  # a constant block has no size and no say


def _ridge_path(inside: Matrix, outside: Matrix, outcome: Outcome) -> Matrix:
    """(penalties, validation people, outputs) scores of weighted kernel ridge."""
    weights, targets = outcome.weights(), outcome.targets()
    root = np.sqrt(weights)[:, None]
    mean = (weights / weights.sum()) @ targets
    values, vectors = np.linalg.eigh(root * inside * root.T)
    projected = vectors.T @ (root * (targets - mean))
    basis = outside @ (root * vectors)
    return np.stack([basis @ (projected / (np.clip(values, 0, None) + penalty)[:, None]) + mean for penalty in PENALTIES])


def _agreement(scores: Matrix, outcome: Outcome, folds: Folds, belief: Told | None = None) -> tuple[float, float]:
    """Held-out correlation with the target, and the slope of target on score (never below 0), both within folds.

    Within folds, because between folds the intercepts differ, always against the labels. The people of a ``belief`` count as
    people of the same spreads in whom the correlation was as believed.
    """
    weights, targets = outcome.weights(), outcome.targets()
    people = sum(len(part) for _, part in folds)
    product = score_square = target_square = 0.0
    for _, part in folds:
        share = weights[part] / weights[part].sum()
        score, target = scores[part] - share @ scores[part], targets[part] - share @ targets[part]
        product += float((weights[part, None] * score * target).sum())
        score_square += float((weights[part, None] * score**2).sum())
        target_square += float((weights[part, None] * target**2).sum())
    if score_square <= 0 or target_square <= 0:
        return 0.0, 0.0
    if belief is not None:
        ratio = belief.people / people
        product += ratio * belief.correlation * np.sqrt(score_square * target_square)
        score_square, target_square = (1 + ratio) * score_square, (1 + ratio) * target_square
    slope = max(product / score_square, 0.0)
    if outcome.num_classes == 0:  # a prior on the slope; of classes, calibration finds the slope
        slope *= people / (people + SLOPE_PEOPLE)
    return product / np.sqrt(score_square * target_square), slope


def _calibrate(scores: Matrix, outcome: Outcome) -> tuple[float, Matrix]:
    """Slope and offsets that turn held-out scores into log-odds at the sample's own class frequencies."""
    outputs = scores.shape[1]
    if outcome.num_classes == 0:
        return 1.0, np.zeros(outputs)
    people, codes = np.arange(len(scores)), outcome.codes
    spread = float(scores.std()) or 1.0

    def loss(free: Matrix) -> float:
        probabilities = probabilities_of(scores, free[0] / spread, free[1:])
        # A weak prior keeps separable samples finite.
        prior = 0.05 * ((free[0] - 1) ** 2 + float((free[1:] ** 2).sum()))
        return prior - float(np.log(np.clip(probabilities[people, codes], 1e-12, None)).sum())

    bounds = [(SMALLEST_SLOPE, None), *[(None, None)] * outputs]
    result = minimize(loss, np.array([1.0, *np.zeros(outputs)]), method="L-BFGS-B", bounds=bounds)
    return float(result.x[0] / spread), result.x[1:]
