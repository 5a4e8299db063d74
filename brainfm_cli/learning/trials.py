"""Is a score predictive or only prognostic: the treatment × score interaction, its null distribution, and its power.

A score that tells who gets better is *prognostic*; one that tells who gets better because of the drug is *predictive*, and only
the second helps to choose whom to treat. The difference is an interaction (Polley 2013; Janes 2014), tested here against a
parametric bootstrap of the model without it, because at the size of such trials the likelihood ratio is no χ². No torch.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field
from scipy import stats

from brainfm_cli.config import Frozen
from brainfm_cli.errors import InputDatasetError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

_FEWEST = 5  # patients per arm, and per arm and class


class InteractionSettings(Frozen):
    """How the treatment × score interaction is tested."""

    bootstraps: int = Field(default=1000, ge=19)
    """Trials drawn from the model without interaction."""
    level: float = Field(default=0.05, gt=0, lt=1)
    """p below which the score is called predictive."""
    seed: int = 0
    """Seed of the drawn trials."""


@dataclass(frozen=True, kw_only=True)
class Interaction:
    """What a trial says of one score."""

    kind: str
    """``response`` (logistic) or ``continuous`` (linear)."""
    patients: dict[str, int]
    """Patients per arm."""
    slopes: dict[str, float]
    """Change of the outcome (log-odds, or its own unit) per SD of the score in each arm."""
    estimate: float
    """Slope under treatment minus slope under control."""
    interval: tuple[float, float]
    """95 % Wald interval of the estimate."""
    statistic: float
    """Likelihood ratio of the models with and without interaction."""
    p: float
    """Share of trials drawn without interaction that show at least this much, itself counted (Davison and Hinkley 1997)."""
    p_prognostic: float
    """Likelihood-ratio p of the score's main effect, without interaction."""
    predictive: bool
    """Whether p is below the level."""

    @property
    def verdict(self) -> str:
        """One sentence for the report."""
        if self.predictive:
            return f"The score is predictive: what it says differs between arms (interaction p = {self.p:.3g})."
        if self.p_prognostic < 0.05:
            return f"The score is prognostic, not predictive: no difference between arms was shown (interaction p = {self.p:.3g})."
        return f"Neither a prognostic nor a predictive value of the score was shown (interaction p = {self.p:.3g})."


def interaction(
    outcome: Values,
    score: Values,
    arm: NDArray[Any],
    *,
    treated: str,
    covariates: Values | None = None,
    binary: bool,
    settings: InteractionSettings | None = None,
) -> Interaction:
    """Test whether ``score`` says something else under ``treated`` than in the other arm.

    Parameters
    ----------
    outcome
        (patients,) 0 and 1, or a number.
    score
        (patients,) *held-out* scores: of a model that has not seen the patient's outcome.
    arm
        (patients,) two different values.
    covariates
        (patients, columns) of numbers, fitted beside the score.

    Raises
    ------
    InputDatasetError
        There are not two arms, the treated one is not among them, too few patients, or a constant score.
    """
    settings = settings or InteractionSettings()
    treatment = _checked(outcome, score, arm, treated, binary=binary)
    scaled = (score - score.mean()) / score.std()
    others = np.empty((len(score), 0)) if covariates is None else np.asarray(covariates, float)
    without = np.column_stack([np.ones(len(score)), treatment, scaled, others])
    full = np.column_stack([without, treatment * scaled])
    null, fitted = _fit(outcome, without, binary=binary), _fit(outcome, full, binary=binary)
    base = _fit(outcome, np.delete(without, 2, axis=1), binary=binary)
    statistic = max(0.0, 2 * (fitted.llf - null.llf))
    drawn = _bootstrap(null, without, full, binary=binary, settings=settings)
    estimate, error = float(fitted.params[-1]), float(fitted.bse[-1])
    control = next(str(name) for name in np.unique(arm) if str(name) != treated)
    p = (1 + int((drawn >= statistic - 1e-12).sum())) / (1 + len(drawn))
    return Interaction(
        kind="response" if binary else "continuous",
        patients={control: int((treatment == 0).sum()), treated: int(treatment.sum())},
        slopes={control: float(fitted.params[2]), treated: float(fitted.params[2]) + estimate},
        estimate=estimate,
        interval=(estimate - 1.96 * error, estimate + 1.96 * error),
        statistic=statistic,
        p=p,
        p_prognostic=float(stats.chi2.sf(2 * (null.llf - base.llf), 1)),
        predictive=p < settings.level,
    )


def _checked(outcome: Values, score: Values, arm: NDArray[Any], treated: str, *, binary: bool) -> Values:
    """(patients,) 1 under treatment; refuses what cannot be tested."""
    names = sorted({str(name) for name in arm})
    if len(names) != 2 or treated not in names:
        raise InputDatasetError(
            f"an interaction needs two arms, '{treated}' among them; there are: {', '.join(names)}",
            fix="name the column of arms, the treated arm, and leave other arms out ('where')",
        )
    if not np.isfinite(score).all() or np.std(score) == 0:
        raise InputDatasetError("the score is constant or not finite: it cannot differ between arms", fix="use another model")
    treatment = (arm.astype(str) == treated).astype(float)
    for name in names:
        inside = outcome[arm.astype(str) == name]
        counts = [int((inside == value).sum()) for value in (0, 1)] if binary else [len(inside)]
        if min(counts) < _FEWEST:
            what = f"arm '{name}' has {min(counts)} patients" + (" of one class" if binary else "")
            raise InputDatasetError(
                f"{what}, fewer than {_FEWEST}: no interaction can be tested", fix="test the continuous outcome, or pool sites"
            )
    return treatment


def _fit(outcome: Values, design: Values, *, binary: bool) -> Any:  # noqa: ANN401  (statsmodels' results)
    # only now: it takes a second, which no plan should wait for
    import statsmodels.api as sm
    from statsmodels.tools.sm_exceptions import ConvergenceWarning, HessianInversionWarning, PerfectSeparationWarning

    with warnings.catch_warnings():
        for kind in (ConvergenceWarning, HessianInversionWarning, PerfectSeparationWarning, RuntimeWarning):
            warnings.simplefilter("ignore", kind)
        return sm.Logit(outcome, design).fit(disp=0, maxiter=50) if binary else sm.OLS(outcome, design).fit()


def _bootstrap(null: Any, without: Values, full: Values, *, binary: bool, settings: InteractionSettings) -> Values:  # noqa: ANN401
    """(bootstraps,) likelihood ratios of outcomes drawn from the model without interaction."""
    rng = np.random.default_rng(settings.seed)
    mean = np.asarray(null.predict(without))
    shape = (settings.bootstraps, len(mean))
    if not binary:
        drawn = mean + rng.normal(size=shape) * np.sqrt(null.scale)
        return np.asarray(len(mean) * np.log(_residual(drawn, without) / _residual(drawn, full)))
    found = []
    for one in (rng.random(shape) < mean).astype(float):
        constant = one.min() == one.max()
        found.append(0.0 if constant else 2 * (_fit(one, full, binary=True).llf - _fit(one, without, binary=True).llf))
    return np.nan_to_num(np.array(found), nan=np.inf)


def _residual(outcomes: Values, design: Values) -> Values:
    """(trials,) residual sums of squares of (trials, patients) outcomes."""
    basis = np.linalg.qr(design)[0]
    return np.asarray(np.square(outcomes - outcomes @ basis @ basis.T).sum(axis=1))
