"""Simulated reader studies with known areas under the ROC curve (Roe & Metz 1997).

A score is the separation of its arm and kind of reader (for cases with the condition), plus random effects of reader,
case, their interaction and the reading itself; reader and case effects also change between arms. Every effect is normal
and drawn anew for cases with and without the condition, so that the area over other readers and cases is known in closed form.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from scipy.special import ndtri

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

ARMS = ALONE, ASSISTED = "alone", "with model"
_CUT = 0.6  # score at and above which a simulated reader calls a case positive


@dataclass(frozen=True, kw_only=True)
class ReadingDesign:
    """Who reads what, and how well."""

    readers: Mapping[str, int] = field(default_factory=lambda: {"junior": 4, "senior": 4})
    """Kind of reader → how many."""
    cases: int = 80
    """Cases, half of them with the condition."""
    auc: Mapping[tuple[str, str], float] = field(
        default_factory=lambda: {("junior", ALONE): 0.75, ("junior", ASSISTED): 0.85, ("senior", ALONE): 0.85, ("senior", ASSISTED): 0.88}
    )
    """(kind, arm) → true area over other readers and cases."""
    model_auc: float = 0.85
    """True area of the model over other cases."""
    reader: float = 0.01
    """Variance of readers, in each arm alike."""
    reader_arm: float = 0.005
    """Variance of readers by arm."""
    case: float = 0.3
    """Variance of cases, in each arm alike; with those below it is 1."""
    case_arm: float = 0.1
    """Variance of cases by arm."""
    reader_case: float = 0.2
    """Variance of readers by case."""
    nested: bool = False
    """Whether each reader reads in one arm only, as in a trial of doctors."""
    minutes: float = 3.0
    """Median reading time alone."""
    faster: float = 0.8
    """Reading time with the model, as a share of that alone."""
    column: str = "seniority"
    """Name of the stratum."""

    def separation(self, kind: str, arm: str) -> float:
        """Distance of the two normal distributions that gives the area: Φ(d/√(2·(1 + reader variances)))."""
        return float(ndtri(self.auc[kind, arm]) * np.sqrt(2 * (1 + self.reader + self.reader_arm)))

    def true_mean(self, arm: str, kinds: tuple[str, ...] = ()) -> float:
        """True area, averaged over readers of ``kinds`` (all by default)."""
        chosen = {kind: count for kind, count in self.readers.items() if not kinds or kind in kinds}
        return float(sum(self.auc[kind, arm] * count for kind, count in chosen.items()) / sum(chosen.values()))


@dataclass(frozen=True, kw_only=True, eq=False)
class SimulatedScores:
    """One simulated study as arrays."""

    scores: NDArray[np.float64]
    """(arms, readers, cases); NaN where a reader does not read in an arm."""
    kinds: tuple[str, ...]
    """Kind of each reader."""
    truth: NDArray[np.bool_]
    """(cases,)."""
    model: NDArray[np.float64]
    """(cases,) scores of the model."""


def simulate_scores(design: ReadingDesign, rng: np.random.Generator) -> SimulatedScores:
    """Scores of every reader in every arm, and of the model."""
    truth = np.arange(design.cases) % 2 == 1
    kinds = tuple(kind for kind, count in design.readers.items() for _ in range(count))
    difficulty = rng.normal(size=design.cases)  # what makes a case look ill, to readers and to the model
    scores = _scores(design, kinds, truth, difficulty, rng)
    noise = np.sqrt(0.5) * difficulty + np.sqrt(0.5) * rng.normal(size=design.cases)
    model = noise + ndtri(design.model_auc) * np.sqrt(2) * truth
    if design.nested:
        for place in range(len(kinds)):
            scores[1 - place % 2, place] = np.nan
    return SimulatedScores(scores=scores, kinds=kinds, truth=truth, model=model)


def simulate_readings(design: ReadingDesign, rng: np.random.Generator) -> pd.DataFrame:
    """A table as :mod:`brainfm_cli.learning.reading_table` reads it, with the model's scores."""
    made = simulate_scores(design, rng)
    rows = []
    for place, kind in enumerate(made.kinds):
        for row, arm in enumerate(ARMS):
            scores = made.scores[row, place]
            if np.isnan(scores).all():
                continue
            seconds = 60 * design.minutes * np.exp(0.3 * rng.normal(size=design.cases)) * (design.faster if row else 1.0)
            rows.append(
                pd.DataFrame(
                    {
                        "reader": f"{kind}{place + 1:02d}",
                        "case": [f"case{number + 1:03d}" for number in range(design.cases)],
                        "arm": arm,
                        "score": np.round(scores, 6),
                        "decision": (scores >= _CUT).astype(int),
                        "truth": made.truth.astype(int),
                        "time_s": np.round(seconds, 1),
                        design.column: kind,
                        "model_score": np.round(made.model, 6),
                        "model_decision": (made.model >= _CUT).astype(int),
                    }
                )
            )
    return pd.concat(rows, ignore_index=True)


def _scores(
    design: ReadingDesign, kinds: tuple[str, ...], truth: NDArray[np.bool_], difficulty: NDArray[np.float64], rng: np.random.Generator
) -> NDArray[np.float64]:
    """(arms, readers, cases)."""
    shape = (len(ARMS), len(kinds), len(truth))
    own = 1 - design.case - design.case_arm - design.reader_case
    # reader effects differ between cases with and without the condition, as in Roe & Metz: (…, 2) picked by class
    readers = np.sqrt(design.reader) * rng.normal(size=(1, shape[1], 2)) + np.sqrt(design.reader_arm) * rng.normal(size=(*shape[:2], 2))
    noise = (
        np.sqrt(design.case) * difficulty
        + np.sqrt(design.case_arm) * rng.normal(size=(shape[0], 1, shape[2]))
        + np.sqrt(design.reader_case) * rng.normal(size=(1, *shape[1:]))
        + np.sqrt(own) * rng.normal(size=shape)
    )
    distance = np.array([[design.separation(kind, arm) for kind in kinds] for arm in ARMS])
    return readers[:, :, truth.astype(int)] + noise + distance[:, :, None] * truth
