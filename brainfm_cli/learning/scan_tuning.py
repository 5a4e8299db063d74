"""Who trains, who chooses and who tests when an encoder of scans is tuned, and scores of held-out people beside floors."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.scores import METRICS, score, statistic
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.learning.uncertainty import interval, resample_weights

RESAMPLES = 2000
NO_SCORES = pd.DataFrame(columns=["score", "method", "value", "low", "high", "reason", "people", "seed"])
"""Where nobody tests."""


@dataclass(frozen=True, kw_only=True)
class TuningPeople:
    """The split of people for tuning."""

    table: pd.DataFrame
    """participant_id, stratum, role (train, validation or test)."""
    seen_in_test: int
    """Test people whom the encoder has seen in pretraining, 0 unless that was allowed."""

    def role(self, name: str) -> tuple[str, ...]:
        """Participants of one role."""
        return tuple(self.table.loc[self.table["role"] == name, "participant_id"])


def divide_for_tuning(
    strata: Mapping[str, str],
    datasets: Mapping[str, str],
    seen: Collection[str],
    *,
    test: float,
    validation: float,
    seed: int,
    transductive: bool,
) -> TuningPeople:
    """People by stratum (class): a share ``test`` tests (0: nobody), of the others a share ``validation`` chooses the epoch.

    Only people whom the encoder has not seen test, unless ``transductive``.

    Raises
    ------
    InputDatasetError
        Too few people whom the encoder has not seen.
    """
    known = {label for label in strata if participant_hash(datasets[label], label) in seen}
    free = [label for label in strata if transductive or label not in known]
    wanted = max(1, round(test * len(strata))) if test else 0
    if len(free) < wanted:
        raise InputDatasetError(
            f"{len(strata) - len(free)} of {len(strata)} people were in the encoder's pretraining: {len(free)} are left to test, {wanted} are needed",
            fix="tune on a dataset with other people, pretrain on fewer (--participant-label), lower test_fraction, or say so in every table: --set transductive=true",
        )
    tests = _drawn({label: strata[label] for label in free}, wanted, seed, "test")
    rest = {label: stratum for label, stratum in strata.items() if label not in tests}
    if len(rest) < 2:
        raise InputDatasetError(f"{len(rest)} people are left to train and choose: two are needed", fix="give more people")
    chosen = _drawn(rest, min(len(rest) - 1, max(1, round(validation * len(rest)))), seed, "validation")
    rows = [(label, strata[label], "test" if label in tests else "validation" if label in chosen else "train") for label in sorted(strata)]
    return TuningPeople(table=pd.DataFrame(rows, columns=["participant_id", "stratum", "role"]), seen_in_test=len(tests & known))


def choose_validation(
    strata: Mapping[str, str], train: Collection[str], test: Collection[str], *, fraction: float, seed: int
) -> TuningPeople:
    """A fold as given, a share ``fraction`` of its training people choosing the epoch.

    Raises
    ------
    InputDatasetError
        Fewer than two training people.
    """
    rest = {label: strata[label] for label in train}
    if len(rest) < 2:
        raise InputDatasetError(f"{len(rest)} people are left to train and choose: two are needed", fix="give more people")
    chosen = _drawn(rest, min(len(rest) - 1, max(1, round(fraction * len(rest)))), seed, "validation")
    rows = [(label, strata[label], "validation" if label in chosen else "train") for label in sorted(rest)]
    rows += [(label, strata[label], "test") for label in sorted(test)]
    return TuningPeople(table=pd.DataFrame(rows, columns=["participant_id", "stratum", "role"]), seen_in_test=0)


def few_people(strata: Mapping[str, str], train: Collection[str], *, share: float, seed: int) -> tuple[str, ...]:
    """A share of training people from every stratum in step; with the same seed smaller shares lie in larger ones."""
    rest = {label: strata[label] for label in train}
    return tuple(sorted(_drawn(rest, max(min(len(rest), 2), round(share * len(rest))), seed, "few")))


def _drawn(strata: Mapping[str, str], count: int, seed: int, what: str) -> set[str]:
    """``count`` people, from every stratum in step."""
    ranked: list[tuple[float, str, str]] = []
    for stratum in sorted(set(strata.values())):
        members = sorted((label for label, of in strata.items() if of == stratum), key=lambda label: _hash(seed, what, label))
        ranked += [((place + 0.5) / len(members), _hash(seed, what, label), label) for place, label in enumerate(members)]
    return {label for _, _, label in sorted(ranked)[:count]}


def _hash(seed: int, what: str, text: str) -> str:
    return hashlib.sha256(f"{seed}|{what}|{text}".encode()).hexdigest()


def classification_scores(
    observed: NDArray[np.int64],
    predicted: Mapping[str, NDArray[np.float64]],
    *,
    classes: int,
    seed: int,
    ordered: bool = False,
    only: str | None = None,
) -> pd.DataFrame:
    """Every score of every predictor's (people, classes) probabilities, or the ``only`` one, with 95 % intervals over people."""
    kind = "binary" if classes == 2 else "multiclass"
    weights = resample_weights([str(place) for place in range(len(observed))], RESAMPLES, np.random.default_rng(seed))
    rows = []
    for name, chances in predicted.items():
        for metric, found in score(kind, observed.astype(float), chances, ordered=ordered).items():
            if only not in (None, metric):
                continue
            weighted = statistic(metric, kind, observed.astype(float), chances) if found.value is not None else None
            made = None if weighted is None else interval(weighted, weights, method="percentile", level=0.95)
            rows.append(
                {
                    "score": METRICS[metric].label,
                    "method": name,
                    "value": found.value,
                    "low": None if made is None else made.low,
                    "high": None if made is None else made.high,
                    "reason": found.reason or (None if made is None else made.reason),
                    "people": len(observed),
                    "seed": seed,
                }
            )
    return pd.DataFrame(rows)


def mean_scores(values: Mapping[str, Sequence[float | None]], *, seed: int) -> pd.DataFrame:
    """Mean of each ``<method>|<score>`` over people with 95 % bootstrap intervals; people for whom it is undefined are left out and counted."""
    rows = []
    for key, found in values.items():
        method, _, name = key.partition("|")
        kept = np.array([value for value in found if value is not None], float)
        made = None
        if len(kept) > 1:
            weights = resample_weights([str(place) for place in range(len(kept))], RESAMPLES, np.random.default_rng(seed))
            made = interval(lambda w, kept=kept: (w @ kept) / w.sum(1), weights, method="percentile", level=0.95)  # type: ignore[misc]
        rows.append(
            {
                "score": name,
                "method": method,
                "value": float(kept.mean()) if len(kept) else None,
                "low": None if made is None else made.low,
                "high": None if made is None else made.high,
                "reason": None if made is not None else "fewer than two people with a value",
                "people": len(kept),
                "seed": seed,
            }
        )
    return pd.DataFrame(rows)
