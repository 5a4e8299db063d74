"""What is planted, how well it could be told with perfect knowledge, and how well from the series at hand.

*Bayes-optimal*: the generator's own likelihood of the latent couplings, age, sex and site being known.
*Attainable*: a logistic model on exactly the planted couplings, measured from the same finite series, tested on other people.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import signal, special, stats
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import KFold, StratifiedKFold
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from brainfm_cli.bids.cohort import iterate_runs
from brainfm_cli.simulation.anatomy import YEO_NETWORKS
from brainfm_cli.simulation.population import CONTROL, COUPLINGS, SPREAD, coupling_name, coupling_words

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from brainfm_cli.bids.cohort import Cohort
    from brainfm_cli.simulation.anatomy import RegionMap
    from brainfm_cli.simulation.population import Disorder, Person, Population
    from brainfm_cli.simulation.rest import PersonSeries, RestSimulation

COUPLING_NAMES = tuple(coupling_name(pair) for pair in COUPLINGS)
TILT_NAMES = tuple(f"tilt {network}" for network in YEO_NETWORKS)
_SLOW_HZ, _FAST_HZ = (0.01, 0.04), (0.05, 0.12)
_ROWS, _COLUMNS = np.triu_indices(len(YEO_NETWORKS))
# Keeps the logarithm finite where a short series hardly shows a network; chosen for the best recovery of the latent couplings.
_RIDGE = 0.3
_FEWEST = 40
_FOLDS = 5
_DRAWS = 40_000


def network_shares(region_map: RegionMap) -> NDArray[np.float64]:
    """(regions, 7) share of each Yeo network in each region, as truth.json keeps it."""
    return np.round(region_map.network_share[:, : len(YEO_NETWORKS)].astype(float), 4)


def measure_couplings(series: NDArray, shares: NDArray[np.float64]) -> NDArray[np.float64]:
    """(28,) couplings between Yeo networks as one run shows them, in the order of :data:`COUPLING_NAMES`.

    Network signals are unmixed from standardised region series by the regions' network shares; a coupling is an entry of
    the logarithm of their covariance, which is where shifts are planted. Regions without signal are left out.
    """
    usable = np.isfinite(series).all(0)
    usable &= np.where(usable, series.std(0), 0) > 0
    values = series[:, usable].astype(float)
    values = (values - values.mean(0)) / values.std(0)
    weights = shares[usable] / np.maximum(np.linalg.norm(shares[usable], axis=1, keepdims=True), 0.05)
    signals = values @ np.linalg.pinv(weights).T
    eigenvalues, vectors = np.linalg.eigh(signals.T @ signals / len(signals) + _RIDGE * np.eye(len(YEO_NETWORKS)))
    return ((vectors * np.log(eigenvalues)) @ vectors.T)[_ROWS, _COLUMNS]


def measure_tilts(series: NDArray, shares: NDArray[np.float64], repetition_time_s: float) -> NDArray[np.float64]:
    """(7,) tilts of the Yeo networks' spectra as one run shows them, in the order of :data:`TILT_NAMES`.

    The logarithm of fast over slow power of a network's regions, over the distance of the bands' centres, so that it is in
    units of the planted exponent.
    """
    usable = np.isfinite(series).all(0)
    usable &= np.where(usable, series.std(0), 0) > 0
    values = series[:, usable].astype(float)
    frequency, power = signal.periodogram((values - values.mean(0)) / values.std(0), 1 / repetition_time_s, axis=0)
    slow, fast = (((frequency >= low) & (frequency < high)) for low, high in (_SLOW_HZ, _FAST_HZ))
    weights = shares[usable] ** 2  # regions of one network tell of it, mixed ones of several
    ratio = (power[fast].mean(0) @ weights) / (power[slow].mean(0) @ weights)
    return np.log(ratio) / np.log(sum(_FAST_HZ) / sum(_SLOW_HZ))


def latent_couplings(coupling: NDArray[np.float64]) -> NDArray[np.float64]:
    """(28,) a person's true couplings, in the order of :data:`COUPLING_NAMES`."""
    return coupling[_ROWS, _COLUMNS]


class Couplings:
    """The 28 couplings of people as they are simulated, so that no series need be kept or read again."""

    def __init__(self, simulation: RestSimulation) -> None:
        self._shares = {region_map.label: network_shares(region_map) for region_map in simulation.maps}
        self._rows: list[tuple[Any, ...]] = []

    def add(self, participant: str, seen: PersonSeries) -> Person:
        """Measure one person in every atlas; gives the person back."""
        for (label, shares), series in zip(self._shares.items(), seen.series, strict=True):
            self._rows.append((participant, label, *measure_couplings(series, shares)))
        return seen.person

    def table(self) -> pd.DataFrame:
        """As :func:`attainable_features`: one row per participant and atlas."""
        table = pd.DataFrame(self._rows, columns=["participant_id", "atlas", *COUPLING_NAMES])
        return table.sort_values("atlas", key=lambda labels: labels.map(list(self._shares).index), kind="stable", ignore_index=True)


def attainable_features(cohort: Cohort, truth: Mapping[str, Any]) -> pd.DataFrame:
    """What may be planted as everybody's series in a packed cohort show it, one row per participant and atlas; runs are averaged.

    Atlases that truth.json does not describe are left out. Columns: participant_id, atlas, :data:`COUPLING_NAMES`, and of a
    trial :data:`TILT_NAMES` and its patterns.
    """
    tilted = bool(truth.get("tilts"))
    tables = []
    for label, described in truth["atlases"].items():
        if label not in cohort.atlases:
            continue
        shares = np.asarray(described["network_shares"])
        rows = [
            (
                run.participant,
                label,
                *measure_couplings(series, shares),
                *(measure_tilts(series, shares, run.repetition_time) if tilted else ()),
            )
            for run, series in iterate_runs(cohort, label)
        ]
        table = pd.DataFrame(rows, columns=["participant_id", "atlas", *COUPLING_NAMES, *(TILT_NAMES if tilted else ())])
        tables.append(table.groupby(["participant_id", "atlas"], as_index=False, sort=False).mean())
    return with_patterns(pd.concat(tables, ignore_index=True), truth.get("patterns", {}))


def with_patterns(table: pd.DataFrame, patterns: Mapping[str, Mapping[str, float]]) -> pd.DataFrame:
    """The table with a column for each pattern of its columns: their sum with the pattern's weights."""
    sums = {name: table[list(weights)].to_numpy(float) @ np.array(list(weights.values())) for name, weights in patterns.items()}
    return table.assign(**sums)


def attainable_score(features: pd.DataFrame, target: pd.Series, train: Sequence[str] | NDArray, test: Sequence[str] | NDArray) -> float:
    """AUROC (R² for numbers) on ``test`` of a linear model of ``features`` fitted on ``train``; nan where undefined.

    ``features`` and ``target`` are indexed by participant; ``target`` holds 0 and 1, or numbers.
    """
    if target.isin([0, 1]).all():
        if target[list(train)].nunique() < 2 or target[list(test)].nunique() < 2:
            return float("nan")
        model = make_pipeline(StandardScaler(), LogisticRegression())
        model.fit(features.loc[list(train)], target[list(train)])
        return float(roc_auc_score(target[list(test)], model.decision_function(features.loc[list(test)])))
    model = make_pipeline(StandardScaler(), LinearRegression())
    model.fit(features.loc[list(train)], target[list(train)])
    return float(r2_score(target[list(test)], model.predict(features.loc[list(test)])))


def build_truth(
    simulation: RestSimulation, participants: pd.DataFrame, planted: pd.DataFrame, *, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything that truth.json says. ``participants`` is indexed by label; ``planted`` is :func:`attainable_features`'s table."""
    population = simulation.population
    return {
        "kind": "rest",
        "seed": population.seed,
        "effect": population.effect,
        "null": population.effect == 0,
        "settings": dict(settings),
        "networks": list(YEO_NETWORKS),
        "couplings": list(COUPLING_NAMES),
        "spread_sd": SPREAD,
        "disorders": {disorder.name: _describe(disorder, population.effect) for disorder in population.disorders},
        "covariate_effects": {
            "age_per_12_years": _named(population.age_shift),
            "sex_male_minus_female": _named(population.sex_shift),
            "site": {f"site{chr(ord('A') + index)}": _named(shift) for index, shift in enumerate(population.site_shifts)},
        },
        "targets": {name: _score(population, participants, planted, name) for name in target_names(population)},
        "atlases": describe_atlases(simulation),
    }


def describe_atlases(simulation: RestSimulation) -> dict[str, Any]:
    """What truth.json says of each atlas: its regions, and how much of each network is in each."""
    return {
        region_map.label: {
            "regions": list(atlas.regions.names),
            "networks": list(region_map.networks),
            "network_shares": network_shares(region_map).tolist(),
        }
        for atlas, region_map in zip(simulation.atlases, simulation.maps, strict=True)
    }


def target_names(population: Population) -> tuple[str, ...]:
    """Targets with a planted effect: case or control, each disorder against control, sex, age."""
    return ("diagnosis_binary", *(disorder.name for disorder in population.present), "sex", "age")


def target_column(participants: pd.DataFrame, name: str) -> pd.Series:
    """The target as 0 and 1 (numbers for age), people who do not belong to it left out."""
    if name == "diagnosis_binary":
        return (participants["diagnosis"] != CONTROL).astype(int)
    if name == "sex":
        return (participants["sex"] == "M").astype(int)
    if name == "age":
        return participants["age"].astype(float)
    chosen = participants["diagnosis"][participants["diagnosis"].isin([CONTROL, name])]
    return (chosen == name).astype(int)


def _describe(disorder: Disorder, effect: float) -> dict[str, Any]:
    return {
        "abbreviation": disorder.abbreviation,
        "description": disorder.description,
        "effects": [
            {
                "coupling": coupling_name(pair),
                "networks": list(pair),
                "words": coupling_words(pair),
                "direction": sign,
                "size_sd": effect,
                "shift": round(sign * effect * SPREAD, 6),
            }
            for pair, sign in zip(disorder.couplings, disorder.directions, strict=True)
        ],
    }


def _named(shift: NDArray[np.float64]) -> dict[str, float]:
    return {name: round(float(value), 6) for name, value in zip(COUPLING_NAMES, latent_couplings(shift), strict=True) if value != 0}


def _score(population: Population, participants: pd.DataFrame, planted: pd.DataFrame, name: str) -> dict[str, Any]:
    """Planted couplings, the two ceilings and the number of people of one target."""
    shifts = _shifts(population, name)
    columns = [COUPLING_NAMES[index] for index in np.flatnonzero(np.abs(shifts).sum(0))] if population.effect > 0 or name in ("sex", "age") else [
        COUPLING_NAMES[index] for index in np.flatnonzero(sum(np.abs(latent_couplings(d.shift())) for d in population.present))
    ]  # fmt: skip
    target = target_column(participants, name)
    metric = "r2" if name == "age" else "auroc"
    people = {"people": len(target)} if name == "age" else {"negative": int((target == 0).sum()), "positive": int((target == 1).sum())}
    return {
        "metric": metric,
        **people,
        "planted": columns,
        "bayes": round(_bayes_r2(population) if name == "age" else _bayes_auroc(shifts), 4),
        "attainable": {
            atlas: cross_validated(table.set_index("participant_id")[columns], target, participants["split"])
            for atlas, table in planted.groupby("atlas", sort=False)
        },
    }


def _shifts(population: Population, name: str) -> NDArray[np.float64]:
    """(alternatives, 28) planted shifts in SDs between people: one row per way of belonging to the positive class."""
    if name == "sex":
        rows = [latent_couplings(population.sex_shift)]
    elif name == "age":
        rows = [latent_couplings(population.age_shift)]
    else:
        names = [name] if name != "diagnosis_binary" else [disorder.name for disorder in population.present]
        rows = [latent_couplings(population.shift_of(each)) for each in names]
    return np.stack(rows) / SPREAD


def _bayes_auroc(shifts: NDArray[np.float64]) -> float:
    """AUROC of the likelihood ratio of unit Gaussians: closed form for one shift, Monte Carlo for a mixture of several."""
    if len(shifts) == 1:
        return float(stats.norm.cdf(np.linalg.norm(shifts[0]) / np.sqrt(2)))
    rng = np.random.default_rng(0)  # accuracy of the integral, not a random outcome
    controls = rng.normal(size=(_DRAWS, shifts.shape[1]))
    cases = rng.normal(size=(_DRAWS, shifts.shape[1])) + shifts[rng.integers(len(shifts), size=_DRAWS)]
    ratios = [special.logsumexp(people @ shifts.T - 0.5 * (shifts**2).sum(1), axis=1) for people in (controls, cases)]
    return float(roc_auc_score(np.repeat([0, 1], _DRAWS), np.concatenate(ratios)))


def _bayes_r2(population: Population) -> float:
    """R² of age from the couplings: signal over signal and spread, in SDs of age."""
    signal = float(((latent_couplings(population.age_shift) / SPREAD) ** 2).sum())
    return signal / (1 + signal)


def cross_validated(features: pd.DataFrame, target: pd.Series, split: pd.Series) -> dict[str, float | str]:
    """:func:`attainable_score` cross-validated, and from 'discovery' to 'holdout'; too few people are said to be so."""
    people = target.index.to_numpy()
    counts = target.value_counts() if target.isin([0, 1]).all() else pd.Series([len(target) // 2])
    if len(people) < _FEWEST or (len(counts) == 2 and counts.min() < _FEWEST // 2):
        return {"cross_validated": "not computed: too few people", "holdout": "not computed: too few people"}
    folds = StratifiedKFold if target.isin([0, 1]).all() else KFold
    scores = [
        attainable_score(features, target, people[train], people[test])
        for train, test in folds(_FOLDS, shuffle=True, random_state=0).split(people, target)
    ]
    apart = split[target.index]
    holdout = (
        attainable_score(features, target, people[apart == "discovery"], people[apart == "holdout"])
        if (apart == "holdout").any()
        else np.nan
    )
    return {
        "cross_validated": round(float(np.mean(scores)), 4),
        "holdout": round(holdout, 4) if np.isfinite(holdout) else "not computed: nobody is held out",
    }
