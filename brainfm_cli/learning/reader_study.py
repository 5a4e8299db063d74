"""Reader studies: what doctors reach with and without a model, in all and by kind of doctor, and what the model reaches alone.

Accuracies are areas under the ROC curve, sensitivity, specificity, concordance with follow-up; beside them reading time,
reliance on a model that is right or wrong, and agreement between readers. Each is analysed over random readers and cases
(:mod:`brainfm_cli.learning.mrmc`). Only the difference of arms over all readers is meant to confirm anything: strata are
exploratory, their p values are not corrected.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from brainfm_cli.config import Frozen
from brainfm_cli.learning.agreement import Agreement, agreement
from brainfm_cli.learning.mrmc import (
    VARIANTS,
    Cells,
    Components,
    Estimate,
    Group,
    Omnibus,
    areas,
    components,
    estimate,
    jackknifed,
    means,
    of_arm,
    of_change,
    omnibus,
)
from brainfm_cli.learning.survival import Outcome, weighted_harrell

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from brainfm_cli.learning.reading_table import ReaderStudySettings, Readings
    from brainfm_cli.learning.uncertainty import Weighted

_FEWEST = 2


class ReaderValue(Frozen):
    """What one reader reached in one arm."""

    reader: str
    """Name."""
    arm: str
    """Name."""
    value: float
    """The endpoint."""
    strata: dict[str, str] = {}
    """Column → level."""


class Change(Frozen):
    """An arm less the reference."""

    arm: str
    """Name."""
    design: str
    """The same readers in both arms, or other ones."""
    readers: int
    """Readers behind it."""
    random: Estimate
    """Holds for other readers and other cases."""
    fixed_readers: Estimate
    """Holds for these readers and other cases."""
    fixed_cases: Estimate
    """Holds for other readers and these cases."""


class Stratum(Frozen):
    """Readers of one kind."""

    column: str
    """What sorts them."""
    level: str
    """Their kind."""
    readers: int
    """How many."""
    arms: dict[str, Estimate]
    """Mean in each arm."""
    changes: dict[str, Estimate]
    """Arm less reference."""


class Gap(Frozen):
    """One kind of reader less another."""

    column: str
    """What sorts them."""
    first: str
    """Kind."""
    second: str
    """Kind it is compared with."""
    arm: str
    """In which arm."""
    benefit: bool
    """Whether it is the change from the reference to ``arm`` that is compared (an interaction)."""
    difference: Estimate
    """First less second, random readers and cases."""


class Endpoint(Frozen):
    """One measure of all readers and arms."""

    name: str
    """Short name."""
    label: str
    """As printed."""
    meaning: str
    """One sentence."""
    log10: bool = False
    """Values are decimal logarithms: a difference is a ratio."""
    cells: tuple[ReaderValue, ...]
    """Each reader in each arm."""
    arms: dict[str, Estimate]
    """Mean over readers, random readers and cases."""
    changes: tuple[Change, ...] = ()
    """Arms less the reference."""
    omnibus: tuple[Omnibus, ...] = ()
    """Tests of all arms being equal, where every reader read in every arm."""
    components: Components | None = None
    """Variances behind them."""
    strata: tuple[Stratum, ...] = ()
    """By kind of reader."""
    gaps: tuple[Gap, ...] = ()
    """Between kinds of readers."""
    model: Estimate | None = None
    """The model alone (fixed reader, random cases)."""
    model_less_readers: dict[str, Estimate] = {}
    """Model alone less the readers' mean in each arm."""
    reason: str | None = None
    """Why nothing is computed."""


class ReaderStudy(Frozen):
    """Everything that a table of readings says."""

    readers: int
    """People."""
    cases: int
    """Cases."""
    positive: int
    """Cases with the condition."""
    arms: tuple[str, ...]
    """Names; the first is the reference."""
    level: float
    """Level of intervals."""
    endpoints: tuple[Endpoint, ...]
    """By measure; the first is the primary one."""
    agreement: tuple[Agreement, ...] = ()
    """By arm."""
    notes: tuple[str, ...] = ()
    """What to know of it."""
    predictions_sha256: str | None = None
    """Hash of the locked predictions that the model's scores are from."""


def analyse(readings: Readings, settings: ReaderStudySettings) -> ReaderStudy:
    """The whole analysis.

    Raises
    ------
    InputDatasetError
        A reader scored fewer than two cases of one class in an arm.
    """
    study = _Study(readings, settings)
    return ReaderStudy(
        readers=len(readings.readers),
        cases=len(readings.cases),
        positive=int(readings.truth.sum()),
        arms=readings.arms,
        level=settings.level,
        endpoints=tuple(study.endpoints()),
        agreement=tuple(agreement(readings, settings)) if len(readings.readers) >= _FEWEST else (),
        notes=tuple(_notes(readings)),
    )


@dataclass(frozen=True)
class _Study:
    readings: Readings
    settings: ReaderStudySettings

    def endpoints(self) -> list[Endpoint]:
        found = [self._auc(), *self._decided()]
        if self.readings.follow_up is not None:
            found.append(self._concordance())
        return [*found, *self._times(), *self._reliance()]

    def _auc(self) -> Endpoint:
        read, model = self.readings, self.readings.model_scores
        own = None if model is None else areas(model[None, None], read.truth)
        return self._endpoint("auc", "AUC", "area under the ROC curve of the readers' scores", areas(read.scores, read.truth), own)

    def _decided(self) -> list[Endpoint]:
        read = self.readings
        kinds = (
            ("sensitivity", "Sensitivity", "share of cases with the condition that were called positive", read.truth, True),
            ("specificity", "Specificity", "share of cases without the condition that were called negative", ~read.truth, False),
        )
        if read.decisions is None:
            reason = "the table has no decision, and no threshold is set (reader_study.threshold)"
            return [
                Endpoint(name=name, label=label, meaning=meaning, cells=(), arms={}, reason=reason) for name, label, meaning, _, _ in kinds
            ]
        return [
            self._endpoint(
                name,
                label,
                meaning,
                means(_right(read.decisions, counted, called=called)),
                None if read.model_decisions is None else means(_right(read.model_decisions[None, None], counted, called=called)),
            )
            for name, label, meaning, counted, called in kinds
        ]

    def _concordance(self) -> Endpoint:
        """Harrell's C: a higher score ought to mean an earlier event."""
        read = self.readings
        assert read.follow_up is not None  # noqa: S101  (checked by the caller)
        assert read.event is not None  # noqa: S101  (both or none)
        followed = np.isfinite(read.follow_up)
        time, event = np.where(followed, read.follow_up, 0.0), read.event

        def weighted(scores: NDArray[np.float64]) -> Weighted | None:
            known = followed & np.isfinite(scores)
            if not (known & event).any():
                return None
            score = weighted_harrell(Outcome(time=time[known], event=event[known]), scores[known])
            return lambda weights: score(weights[:, known])

        cells = jackknifed([[weighted(row) for row in arm] for arm in read.scores], len(read.cases))
        model = None if read.model_scores is None else jackknifed([[weighted(read.model_scores)]], len(read.cases))
        return self._endpoint("concordance", "Concordance", "Harrell's C of the scores with the time to the event", cells, model)

    def _times(self) -> list[Endpoint]:
        seconds = self.readings.seconds
        if seconds is None:
            return []
        cells = means(np.log10(seconds))
        return [
            self._endpoint("time", "Reading time", "geometric mean of seconds per case; a difference is a ratio", cells, None, log10=True)
        ]

    def _reliance(self) -> list[Endpoint]:
        read = self.readings
        if read.decisions is None or read.model_decisions is None:
            return []
        wrong = np.isfinite(read.model_decisions) & (read.model_decisions != read.truth)
        right = np.isfinite(read.model_decisions) & ~wrong
        same = np.where(np.isfinite(read.decisions), read.decisions == np.nan_to_num(read.model_decisions, nan=-1), np.nan)
        found = []
        for name, label, meaning, where in (
            ("over_reliance", "Same as a wrong model", "share of readings that repeat the model where it is wrong; a rise with the model is over-reliance", wrong),
            ("reliance", "Same as a right model", "share of readings that agree with the model where it is right", right),
        ):  # fmt: skip
            if where.sum() < _FEWEST:
                reason = f"the model is {'wrong' if name == 'over_reliance' else 'right'} on {int(where.sum())} cases: two are needed"
                found.append(Endpoint(name=name, label=label, meaning=meaning, cells=(), arms={}, reason=reason))
                continue
            found.append(self._endpoint(name, label, meaning, means(np.where(where, same, np.nan)), None))
        return found

    def _endpoint(self, name: str, label: str, meaning: str, cells: Cells, model: Cells | None, *, log10: bool = False) -> Endpoint:
        read, level = self.readings, self.settings.level
        everybody = range(len(read.readers))
        known = components(cells)
        alone = None if model is None or not np.isfinite(model.values[0, 0]) else of_arm(model, 0, [0], fixed=True)
        means_of = {arm: estimate(of_arm(cells, place, everybody), level=level, test=False) for place, arm in enumerate(read.arms)}
        tests = [] if known is None else [omnibus(known, len(read.arms), len(read.readers), variant) for variant in VARIANTS]
        return Endpoint(
            name=name,
            label=label,
            meaning=meaning,
            log10=log10,
            cells=tuple(
                ReaderValue(
                    reader=reader,
                    arm=arm,
                    value=float(cells.values[row, place]),
                    strata={column: levels[place] for column, levels in read.strata.items()},
                )
                for row, arm in enumerate(read.arms)
                for place, reader in enumerate(read.readers)
                if np.isfinite(cells.values[row, place])
            ),
            arms=means_of,
            changes=tuple(_change(cells, place, arm, everybody, level) for place, arm in enumerate(read.arms) if place),
            omnibus=tuple(one for one in tests if one is not None),
            components=known,
            strata=tuple(self._strata(cells)),
            gaps=tuple(self._gaps(cells)),
            model=None if alone is None else estimate(alone, level=level, test=False),
            model_less_readers={}
            if alone is None
            else {arm: estimate(alone, of_arm(cells, place, everybody), level=level) for place, arm in enumerate(read.arms)},
        )

    def _strata(self, cells: Cells) -> list[Stratum]:
        read, level = self.readings, self.settings.level
        return [
            Stratum(
                column=column,
                level=kind,
                readers=len(members),
                arms={arm: estimate(of_arm(cells, place, members), level=level, test=False) for place, arm in enumerate(read.arms)},
                changes={arm: _difference(cells, place, members, level) for place, arm in enumerate(read.arms) if place},
            )
            for column, levels in read.strata.items()
            for kind, members in _members(levels).items()
        ]

    def _gaps(self, cells: Cells) -> list[Gap]:
        read, level = self.readings, self.settings.level
        found = []
        for column, levels in read.strata.items():
            for (first, some), (second, others) in combinations(_members(levels).items(), 2):
                for place, arm in enumerate(read.arms):
                    gap = estimate(of_arm(cells, place, some), of_arm(cells, place, others), level=level)
                    found.append(Gap(column=column, first=first, second=second, arm=arm, benefit=False, difference=gap))
                    if place:
                        more, less = (of_change(cells, place, 0, group) for group in (some, others))
                        both = estimate(more, less, level=level)
                        found.append(Gap(column=column, first=first, second=second, arm=arm, benefit=True, difference=both))
        return found


def _members(levels: Sequence[str]) -> dict[str, list[int]]:
    return {kind: [place for place, one in enumerate(levels) if one == kind] for kind in sorted(set(levels))}


def _groups(cells: Cells, arm: int, readers: Sequence[int]) -> tuple[Group, Group | None, str]:
    """What is compared with the reference: changes of the readers who read in both arms, else two groups of readers."""
    paired = of_change(cells, arm, 0, readers)
    if len(paired.values):
        return paired, None, "the same readers in both arms"
    return of_arm(cells, arm, readers), of_arm(cells, 0, readers), "other readers in each arm"


def _difference(cells: Cells, arm: int, readers: Sequence[int], level: float) -> Estimate:
    first, second, _ = _groups(cells, arm, readers)
    return estimate(first, second, level=level)


def _change(cells: Cells, arm: int, name: str, readers: Sequence[int], level: float) -> Change:
    first, second, design = _groups(cells, arm, readers)
    random, fixed_readers, fixed_cases = (estimate(first, second, variant=variant, level=level) for variant in VARIANTS)
    count = len(first.values) + (0 if second is None else len(second.values))
    return Change(arm=name, design=design, readers=count, random=random, fixed_readers=fixed_readers, fixed_cases=fixed_cases)


def _right(decisions: NDArray[np.float64], counted: NDArray[np.bool_], *, called: bool) -> NDArray[np.float64]:
    """1 where a counted case was called as it should be, 0 where not, NaN elsewhere."""
    return np.where(np.isfinite(decisions) & counted, decisions == called, np.nan)


def _notes(readings: Readings) -> list[str]:
    notes = []
    unread = np.isnan(readings.scores)
    absent = np.asarray(unread.all(axis=2))
    partly = int((unread & ~absent[:, :, None]).sum())
    if partly:
        notes.append(f"{partly} readings are missing; each reader is judged on the cases that were read.")
    if absent.any():
        notes.append(f"{int(absent.sum())} of {absent.size} reader–arm pairs were not read: arms are compared over readers who read in both, else between readers.")  # fmt: skip
    if len(readings.readers) < 4:
        notes.append(f"{len(readings.readers)} readers: intervals over random readers are very wide, and rest on normality.")
    counts: Mapping[str, int] = {"with": int(readings.truth.sum()), "without": int((~readings.truth).sum())}
    notes += [f"Only {count} cases {name} the condition: intervals over cases rest on large numbers." for name, count in counts.items() if count < 20]  # fmt: skip
    return notes
