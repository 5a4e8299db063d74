"""Who is likely to respond, and what a trial gains by knowing: strata with cuts fixed in training folds, and sizes of trials. No torch.

A patient's *place* is the share of the training people's held-out predictions that lie below the patient's own, so that cuts on
places are cuts that the training fold alone decides. A trial may use the score in two ways: *enrich*, enrolling only patients
above a cut (Simon and Maitournam 2004), or *adjust*, randomising everybody and fitting the score beside the arm, which takes the
share r² off the variance (Borm 2007). The first pays where the score is predictive, the second where it is prognostic.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import Field, model_validator
from scipy.special import ndtri

from brainfm_cli.config import Frozen
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.scores import Score

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

Name = Literal["unlikely", "uncertain", "likely"]
NAMES: tuple[Name, ...] = ("unlikely", "uncertain", "likely")
_FEWEST = 2  # patients per arm, below which a rule has no size
_ENDS = (2.5, 97.5)
_NO_BENEFIT = "the treated do not fare better than the controls: no number of patients is enough"
_NO_END = "no upper end: in resamples the treated do not fare better"


class StrataSettings(Frozen):
    """Likely, uncertain and unlikely responders, and the trial that is sized with them."""

    cuts: tuple[float, float] = (1 / 3, 2 / 3)
    """Places among the training people below which a patient is unlikely to respond, and from which likely."""
    power: float = Field(default=0.8, gt=0.5, lt=1)
    """Power of the trial that is sized."""
    level: float = Field(default=0.05, gt=0, lt=1)
    """Its two-sided level."""
    bootstraps: int = Field(default=2000, ge=100)
    """Resamples of patients within arms for the intervals."""
    seed: int = 0
    """Seed of the resamples."""

    @model_validator(mode="after")
    def _ordered(self) -> StrataSettings:
        if not 0 < self.cuts[0] < self.cuts[1] < 1:
            raise ValueError(f"the cuts must lie between 0 and 1, the lower one first; they are {self.cuts[0]:g} and {self.cuts[1]:g}")
        return self


class Stratum(Frozen):
    """What became of the patients of one stratum."""

    name: Name
    """unlikely, uncertain or likely."""
    patients: dict[str, int]
    """Patients by arm."""
    outcome: Score
    """Mean outcome (of a response: the share of responders), both arms together."""
    by_arm: dict[str, Score]
    """The same by arm."""
    benefit: Score
    """Treated minus controls."""


class TrialSize(Frozen):
    """A trial with one rule of using the score."""

    rule: str
    """Who is enrolled, and whether the score is fitted beside the arm."""
    enrolled: Score
    """Share of the screened patients that is randomised."""
    benefit: Score
    """Treated minus controls among them."""
    randomise: Score
    """Patients to randomise, both arms together."""
    screen: Score
    """Patients to screen."""
    ratio: Score
    """Patients to randomise, relative to a trial without the score; below 1 the score saves patients."""


class Stratification(Frozen):
    """What a trial's patients say of the use of one score."""

    predictor: str
    """Whose score."""
    treated: str
    """The arm under treatment."""
    cuts: tuple[float, float]
    """Places among the training people."""
    power: float
    """Power of the trials that are sized."""
    level: float
    """Their two-sided level."""
    strata: tuple[Stratum, ...]
    """unlikely, uncertain, likely."""
    gap: Score
    """Mean outcome of the likely minus that of the unlikely."""
    sizes: tuple[TrialSize, ...]
    """Without the score first."""
    statement: str
    """What this allows to say."""


def place_among(training: Values, values: Values) -> Values:
    """(people,) share of the finite ``training`` predictions below each of ``values``, equal ones counted half; NaN without any."""
    known = np.sort(training[np.isfinite(training)])
    if not len(known):
        return np.full(len(values), np.nan)
    return (np.searchsorted(known, values, "left") + np.searchsorted(known, values, "right")) / (2 * len(known))


def strata_of(places: Values, cuts: tuple[float, float]) -> NDArray[np.int64]:
    """(patients,) position in :data:`NAMES`."""
    return (places >= cuts[0]).astype(np.int64) + (places >= cuts[1])


def stratify(
    outcome: Values,
    places: Values,
    score: Values,
    arm: NDArray[Any],
    *,
    predictor: str,
    treated: str,
    settings: StrataSettings | None = None,
) -> Stratification:
    """Outcomes by stratum and sizes of trials, with percentile intervals over patients resampled within arms.

    Parameters
    ----------
    outcome
        (patients,) 0 and 1, or a number of which more is better.
    places
        (patients,) or (repetitions, patients) places among training people (:func:`place_among`); of several the median counts.
    score
        (patients,) held-out scores, fitted beside the arm by the rule that adjusts.
    arm
        (patients,) two different values, ``treated`` among them.

    Raises
    ------
    InputDatasetError
        There are not two arms, or somebody has no place.
    """
    settings = settings or StrataSettings()
    arms = sorted({str(name) for name in arm}, key=lambda name: name == treated)
    if len(arms) != 2 or treated not in arms:
        raise InputDatasetError(
            f"sizing a trial needs two arms, '{treated}' among them; there are: {', '.join(arms)}",
            fix="name the column of arms, the treated arm, and leave other arms out ('where')",
        )
    middle = np.median(np.atleast_2d(places), axis=0)
    if not np.isfinite(middle).all():
        raise InputDatasetError(
            "no held-out prediction of the training people is at hand, so that no cut can be fixed on them",
            fix="refit the model in every fold (--set refit=always)",
        )
    stratum = strata_of(middle, settings.cuts)
    is_treated = arm.astype(str) == treated
    sample = _Sample(outcome=np.asarray(outcome, float), score=np.asarray(score, float), treated=is_treated)
    weights = _resamples(is_treated, settings)
    strata = tuple(_stratum(name, stratum == place, sample, arms, weights) for place, name in enumerate(NAMES))
    likely, unlikely = stratum == 2, stratum == 0
    gap = _interval(sample.mean(weights, likely) - sample.mean(weights, unlikely), "a stratum is empty")
    sizes = _sizes(sample, stratum, weights, settings)
    return Stratification(
        predictor=predictor,
        treated=treated,
        cuts=settings.cuts,
        power=settings.power,
        level=settings.level,
        strata=strata,
        gap=gap,
        sizes=sizes,
        statement=_statement(strata, gap, sizes, settings),
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Sample:
    """The patients; every method takes (resamples, patients) weights, of which the first row is the sample itself."""

    outcome: Values
    score: Values
    treated: NDArray[np.bool_]

    def mean(self, weights: Values, who: NDArray[np.bool_]) -> Values:
        """(resamples,) mean outcome; NaN for nobody."""
        chosen = weights * who
        with np.errstate(invalid="ignore", divide="ignore"):
            return (chosen @ self.outcome) / chosen.sum(1)

    def variance(self, weights: Values, who: NDArray[np.bool_]) -> Values:
        """(resamples,) variance of the outcome; NaN for fewer than two."""
        chosen = weights * who
        total, mean = chosen.sum(1), self.mean(weights, who)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(total > 1, ((chosen @ self.outcome**2) / total - mean**2) * total / (total - 1), np.nan)

    def benefit(self, weights: Values, who: NDArray[np.bool_]) -> Values:
        """(resamples,) treated minus controls."""
        return self.mean(weights, who & self.treated) - self.mean(weights, who & ~self.treated)

    def explained(self, weights: Values) -> Values:
        """(resamples,) share of the outcome's variance within arms that goes with the score, corrected for its one degree of freedom."""
        products = []
        for first, second in ((self.score, self.outcome), (self.score, self.score), (self.outcome, self.outcome)):
            total = np.zeros(len(weights))
            for arm in (self.treated, ~self.treated):
                chosen = weights * arm
                total += chosen @ (first * second) - (chosen @ first) * (chosen @ second) / chosen.sum(1)
            products.append(total)
        with np.errstate(invalid="ignore", divide="ignore"):
            square = np.nan_to_num(products[0] ** 2 / (products[1] * products[2]))
        freedom = weights.sum(1) - 3
        # A score that goes against the outcome is fitted all the same, but would not be used.
        return np.where(products[0] > 0, np.maximum(0.0, 1 - (1 - square) * (freedom + 1) / freedom), 0.0)


def _resamples(treated: NDArray[np.bool_], settings: StrataSettings) -> Values:
    """(1 + bootstraps, patients) weights: the sample itself, then resamples within arms."""
    rng = np.random.default_rng(settings.seed)
    weights = np.zeros((1 + settings.bootstraps, len(treated)))
    weights[0] = 1
    for arm in (np.flatnonzero(treated), np.flatnonzero(~treated)):
        weights[1:, arm] = rng.multinomial(len(arm), np.full(len(arm), 1 / len(arm)), size=settings.bootstraps)
    return weights


def _stratum(name: Name, who: NDArray[np.bool_], sample: _Sample, arms: list[str], weights: Values) -> Stratum:
    sides = {arms[0]: who & ~sample.treated, arms[1]: who & sample.treated}
    return Stratum(
        name=name,
        patients={arm: int(rows.sum()) for arm, rows in sides.items()},
        outcome=_interval(sample.mean(weights, who), "nobody"),
        by_arm={arm: _interval(sample.mean(weights, rows), "nobody") for arm, rows in sides.items()},
        benefit=_interval(sample.benefit(weights, who), "nobody in one arm"),
    )


def _sizes(sample: _Sample, stratum: NDArray[np.int64], weights: Values, settings: StrataSettings) -> tuple[TrialSize, ...]:
    factor = 2 * float(ndtri(1 - settings.level / 2) + ndtri(settings.power)) ** 2
    everybody = np.ones(len(stratum), bool)
    rules = (
        ("everybody, without the score", everybody, False),
        ("likely responders only", stratum == 2, False),
        ("likely and uncertain responders", stratum >= 1, False),
        ("everybody, the score as covariate", everybody, True),
    )
    plain: Values | None = None
    found = []
    for rule, who, adjusted in rules:
        benefit = sample.benefit(weights, who)
        spread = sample.variance(weights, who & sample.treated) + sample.variance(weights, who & ~sample.treated)
        if adjusted:
            spread = spread * (1 - sample.explained(weights))
        with np.errstate(invalid="ignore", divide="ignore"):
            needed = np.where(benefit > 0, factor * spread / benefit**2, np.where(np.isnan(benefit), np.nan, np.inf))
            enrolled = (weights * who).sum(1) / weights.sum(1)
            screened = needed / enrolled
        plain = needed if plain is None else plain
        few = min(int((who & sample.treated).sum()), int((who & ~sample.treated).sum())) < _FEWEST
        why = f"fewer than {_FEWEST} patients in an arm"
        with np.errstate(invalid="ignore"):
            # Where a trial without the score never ends and one with it does, the ratio is 0; where neither does, there is none.
            ratio = np.where(np.isinf(plain), np.where(np.isinf(needed), np.nan, 0.0), needed / plain)
        found.append(
            TrialSize(
                rule=rule,
                enrolled=_interval(enrolled, why),
                benefit=Score(reason=why) if few else _interval(benefit, why),
                randomise=Score(reason=why) if few else _number(needed),
                screen=Score(reason=why) if few else _number(screened),
                ratio=Score(reason=why) if few else _ratio(ratio),
            )
        )
    return tuple(found)


def _interval(values: Values, reason: str) -> Score:
    """The sample's value with the percentile interval of its resamples; undefined resamples are left out."""
    if not np.isfinite(values[0]):
        return Score(reason=reason)
    known = values[1:][np.isfinite(values[1:])]
    low, high = np.percentile(known, _ENDS)
    return Score(value=float(values[0]), low=float(low), high=float(high))


def _number(values: Values) -> Score:
    """A number of patients, which may be infinite: then there is none, or its interval has no upper end."""
    known = values[1:][~np.isnan(values[1:])]
    low, high = np.percentile(known, _ENDS, method="closest_observation")
    lower = float(low) if np.isfinite(low) else None
    if not np.isfinite(values[0]):
        return Score(low=lower, reason=_NO_BENEFIT)
    return Score(value=float(values[0]), low=lower, high=float(high) if np.isfinite(high) else None, reason=None if np.isfinite(high) else _NO_END)  # fmt: skip


def _ratio(values: Values) -> Score:
    """A ratio of numbers; without an interval where more than a twentieth of the resamples has none."""
    if not np.isfinite(values[0]):
        return Score(reason=_NO_BENEFIT)
    known = values[1:][~np.isnan(values[1:])]
    if len(known) < 0.95 * (len(values) - 1):
        return Score(value=float(values[0]), reason=f"no interval: no benefit in {len(values) - 1 - len(known)} of {len(values) - 1} resamples")  # fmt: skip
    low, high = np.percentile(known, _ENDS, method="closest_observation")
    return Score(value=float(values[0]), low=float(low), high=float(high) if np.isfinite(high) else None, reason=None if np.isfinite(high) else _NO_END)  # fmt: skip


def _statement(strata: tuple[Stratum, ...], gap: Score, sizes: tuple[TrialSize, ...], settings: StrataSettings) -> str:
    counts = {one.name: sum(one.patients.values()) for one in strata}
    told = f"{counts['likely']} patients are likely, {counts['uncertain']} uncertain and {counts['unlikely']} unlikely responders."
    if gap.value is None or gap.low is None:
        return f"{told} Their outcomes are not compared: {gap.reason}."
    shown = "is" if gap.low > 0 else "is not"
    told += f" A better outcome of the likely than of the unlikely {shown} shown (difference {gap})."
    saving = [one for one in sizes[1:] if one.ratio.high is not None and one.ratio.high < 1]
    if not saving:
        return f"{told} No saving of patients is shown for a trial of {settings.power:.0%} power that uses the score."
    told_of = "; ".join(f"{one.rule}: {one.ratio}" for one in saving)
    return f"{told} Patients of a trial of {settings.power:.0%} power, relative to one without the score ({len(sizes) - 1} uses were looked at): {told_of}."  # fmt: skip
