"""What a model's untuned vectors tell of people while it is pretrained: their site, which it should not learn, and their diagnosis.

A probe is a cross-validated linear model on the embedding of whole scans. Pretraining never sees the labels, so that the people
it trains on may be probed. Values are only logged; they choose nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import RidgeClassifierCV, RidgeCV
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import KFold, StratifiedKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.errors import BrainFMError
from brainfm_cli.learning.samples import Scan, list_scans, whole_scans
from brainfm_cli.learning.targets import Target, participant_table, read_target
from brainfm_cli.learning.tuning import Tunable

_FOLDS = 5
_PENALTIES = tuple(float(value) for value in np.logspace(-1, 4, 6))
_MOST_PEOPLE, _BATCH = 300, 32


@dataclass(frozen=True, kw_only=True)
class Probes:
    """The columns that are probed, and the scans they are read from."""

    system: Tunable
    """The model, as it is trained."""
    cohort: Cohort
    """Where the series are."""
    atlas: str
    """Atlas that is read."""
    scans: tuple[Scan, ...]
    """One scan per person."""
    targets: tuple[Target, ...]
    """Columns, each for those of the people who have a value."""

    def __call__(self) -> dict[str, float]:
        """``probe_<column>``: macro AUROC (chance 0.5) of classes, correlation (chance 0) of numbers."""
        vectors = self._vectors()
        place = {scan.participant: row for row, scan in enumerate(self.scans)}
        return {f"probe_{one.name}": probe(vectors[[place[name] for name in one.participants]], one) for one in self.targets}

    @torch.no_grad()
    def _vectors(self) -> NDArray[np.float64]:
        """(scans, width) untuned embeddings; training goes on as if nobody had looked."""
        device, training = next(self.system.module.parameters()).device, self.system.module.training
        self.system.module.eval()
        parts = []
        with torch.random.fork_rng(devices=[]):
            prompt = self.system.new_prompt(self.atlas)
            for start in range(0, len(self.scans), _BATCH):
                windows = whole_scans(self.cohort, self.scans[start : start + _BATCH], self.atlas).to(device)
                parts.append(self.system.read(self.system.graphs(windows), prompt).double().cpu().numpy())
        self.system.module.train(training)
        return np.concatenate(parts)


def make_probes(system: Tunable, cohort: Cohort, people: Sequence[str], atlases: Sequence[str], columns: Sequence[str], *, seed: int) -> Probes | None:  # fmt: skip
    """Probes of those ``columns`` that can be told apart among ``people``; none where nothing can.

    At most 300 people are read, in the atlas that most of them have; values of fewer than five people are left out.
    """
    drawn = sorted(np.random.default_rng(seed).permutation(sorted(people))[:_MOST_PEOPLE].tolist())
    found = {label: {scan.participant: scan for scan in list_scans(cohort, drawn, [label])} for label in sorted(atlases)}
    atlas = max(found, key=lambda label: len(found[label]))
    scans = tuple(found[atlas].values())
    targets = tuple(one for one in (_target(cohort, column, list(found[atlas])) for column in columns) if one is not None)
    return Probes(system=system, cohort=cohort, atlas=atlas, scans=scans, targets=targets) if targets else None


def probe(vectors: NDArray[np.float64], target: Target) -> float:
    """Cross-validated score of (people, width) vectors; folds are the same at every call."""
    if not target.classes:
        model = make_pipeline(StandardScaler(), RidgeCV(_PENALTIES))
        found = cross_val_predict(model, vectors, target.observed, cv=KFold(_FOLDS, shuffle=True, random_state=0))
        return float(np.corrcoef(found, target.observed)[0, 1])
    codes = target.observed.astype(np.int64)
    model = make_pipeline(StandardScaler(), RidgeClassifierCV(_PENALTIES, class_weight="balanced"))
    folds = StratifiedKFold(_FOLDS, shuffle=True, random_state=0)
    scores = cross_val_predict(model, vectors, codes, cv=folds, method="decision_function").reshape(len(codes), -1)
    if scores.shape[1] == 1:
        return float(roc_auc_score(codes, scores[:, 0]))
    return float(np.mean([roc_auc_score(codes == code, scores[:, place]) for place, code in enumerate(np.unique(codes))]))


def _target(cohort: Cohort, column: str, people: Sequence[str]) -> Target | None:
    """The column of ``people``, values that fewer than five of them have left out; none where it cannot be read or does not vary."""
    if column not in participant_table(cohort):
        return None
    try:
        target = read_target(cohort, column, participants=people)
    except BrainFMError:
        return None
    if not target.classes:
        return target if len(target.participants) >= 2 * _FOLDS else None
    counts = target.counts()
    kept = [n for n, value in zip(target.participants, target.observed, strict=True) if counts[target.classes[int(value)]] >= _FOLDS]
    target = target.keep(kept)
    return target if len(np.unique(target.observed)) > 1 else None
