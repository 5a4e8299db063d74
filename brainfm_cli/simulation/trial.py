"""A drug trial with planted responses: two arms, several sites, and a large drug-free cohort of the same population.

What a patient's pain does depends on two things that differ between all people, patients or not: how their networks are
coupled, which connectivity shows, and how fast their networks fluctuate, which it does not: a network's spectrum is tilted
while its covariances stay. Each of the two effects has a part in both, so that either modality alone leaves some of it out:

* the *prognostic* effect holds in both arms;
* the *predictive* effect holds under the drug only: who gains from the drug rather than from time and hope.

By default every coupling and every spectrum varies by itself, and a score lies in a few of them: nothing that drug-free people
show tells which, and 50 patients cannot tell either. With ``patterns`` people differ mostly along a few shared patterns of
couplings and of spectra, the same in every population, and a score lies along one of each: there is something to be learnt
from people who were never treated.

Patient ``i`` depends on (seed, i) and the settings only.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field
from scipy import stats

from brainfm_cli.config import Frozen
from brainfm_cli.simulation.anatomy import NETWORKS, YEO_NETWORKS
from brainfm_cli.simulation.population import COUPLINGS, SPREAD, Person, draw_person, known_shift, stream
from brainfm_cli.simulation.rest import PersonSeries, RestSimulation, build_rest, series_of
from brainfm_cli.simulation.sources import Scan
from brainfm_cli.simulation.trial_patterns import mixing_of, named_patterns, shared_patterns, variance_along
from brainfm_cli.simulation.truth import (
    COUPLING_NAMES,
    TILT_NAMES,
    cross_validated,
    describe_atlases,
    latent_couplings,
    measure_couplings,
    measure_tilts,
    network_shares,
    with_patterns,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from brainfm_cli.simulation.population import PopulationSettings

PLACEBO, DRUG = "placebo", "drug"
RESPONDER, NON_RESPONDER = "responder", "non-responder"
TRIAL, DRUG_FREE = "trial", "drug-free"
TILT_SPREAD = 0.8
"""SD over people of the exponent of a network's spectrum."""
_FIRST_DRUG_FREE = 10_000_000  # numbers of the drug-free people, so that more patients never change who they are
_BLOCK = 4  # patients per block of the randomisation
_GRID = 4001
COLUMNS: dict[str, Any] = {
    "age": {"Description": "Age", "Units": "year"},
    "sex": {"Description": "Sex", "Levels": {"F": "female", "M": "male"}},
    "site": {"Description": "Site of the scanner"},
    "cohort": {"Description": "Who", "Levels": {TRIAL: "patient of the trial", DRUG_FREE: "neither treated nor followed"}},
    "arm": {"Description": "What the patient was given, at random", "Levels": {PLACEBO: "placebo", DRUG: "drug"}},
    "analgesia": {"Description": "Decrease of pain from before to after treatment", "Units": "%"},
    "response": {
        "Description": "Whether the decrease reached the trial's threshold (truth.json)",
        "Levels": {NON_RESPONDER: "below the threshold", RESPONDER: "at or above the threshold"},
        "PositiveClass": RESPONDER,
    },
    "split": {"Description": "Random halves of unequal size", "Levels": {"discovery": "to learn from", "holdout": "to test on"}},
}


class TrialSettings(Frozen):
    """The trial. Part of the settings of ``simulate``; the simulation's ``participants`` are its patients."""

    drug_free: int = Field(default=100, ge=0, le=1_000_000)
    """People of the same population beside the patients, scanned and never treated: to pretrain on."""
    repetition_times_s: tuple[float, ...] = Field(default=(2.0, 2.0), min_length=1, max_length=26)
    """Seconds between frames at each site; as many sites. Scans last equally long at all of them."""
    prognostic: float = Field(default=0.8, ge=0)
    """Analgesia per SD of the prognostic score, in SDs of what nothing explains; times ``effect``."""
    predictive: float = Field(default=1.2, ge=0)
    """The same of the predictive score, under the drug only."""
    dynamics_share: float = Field(default=0.5, ge=0, le=1)
    """Share of either score's variance that lies in dynamics, which connectivity does not show; the rest is coupling."""
    couplings_per_score: int = Field(default=3, ge=1, le=10)
    """Network couplings that carry the coupling part of a score."""
    patterns: tuple[Annotated[int, Field(ge=2, le=28)], Annotated[int, Field(ge=2, le=7)]] | None = None
    """How many shared patterns of couplings, and of spectra, people differ along; each score then lies along one of each instead of in
    ``couplings_per_score`` couplings and one network. None: every coupling and every spectrum varies by itself."""
    mean_analgesia: float = 28.0
    """Mean decrease of pain under placebo, %."""
    drug_benefit: float = 5.0
    """What the drug adds on average, %."""
    noise_sd: float = Field(default=15.0, gt=0)
    """SD of the analgesia that nothing explains, %."""
    threshold: float = 30.0
    """Analgesia from which a patient is a responder, %."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    """One planted score: a direction in the space of couplings and one in that of dynamics, unit variance over people."""

    couplings: NDArray[np.float64]
    """(28,) loadings on the couplings, in the order of :data:`COUPLING_NAMES`."""
    tilts: NDArray[np.float64]
    """(7,) loadings on the networks' tilts, in the order of :data:`TILT_NAMES`."""
    patterns: tuple[str, ...] = ()
    """Names of the patterns along which it lies, if people differ along patterns."""

    @property
    def columns(self) -> list[str]:
        """Names of what carries it: its patterns, or its couplings and tilts."""
        if self.patterns:
            return list(self.patterns)
        names = zip((*COUPLING_NAMES, *TILT_NAMES), (*self.couplings, *self.tilts), strict=True)
        return [name for name, loading in names if loading]

    def of(self, traits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Scores of (…, 28 + 7) standardised traits."""
        return traits @ np.concatenate([self.couplings, self.tilts])


@dataclass(frozen=True, kw_only=True, eq=False)
class Trial:
    """A population, a protocol per site, and what is planted."""

    settings: TrialSettings
    """Sizes of effects, outcome."""
    sites: tuple[RestSimulation, ...]
    """The same population and atlases with each site's scan."""
    prognostic: Score
    """Holds in both arms."""
    predictive: Score
    """Holds under the drug only."""
    effect: float
    """Factor of both effects; 0 makes responses independent of everything."""
    mixing: NDArray[np.float64]
    """(35, 35) what makes traits go together: traits are it times independent ones. The identity where there are no patterns."""

    @property
    def covariance(self) -> NDArray[np.float64]:
        """(35, 35) covariance of traits over people."""
        return self.mixing @ self.mixing.T

    @property
    def simulation(self) -> RestSimulation:
        """What all sites share."""
        return self.sites[0]


@dataclass(frozen=True, kw_only=True, eq=False)
class Patient:
    """One person, treated or not."""

    person: Person
    """Who, and how their networks are coupled and tilted."""
    cohort: str
    """``trial`` or ``drug-free``."""
    site: int
    """Number of the site."""
    traits: NDArray[np.float64]
    """(28 + 7,) own couplings and tilts in SDs over people (on average over traits), what age, sex and site explain taken off."""
    arm: str | None
    """``placebo``, ``drug``, or none for the drug-free."""
    analgesia: float | None
    """Decrease of pain, %."""

    def response(self, threshold: float) -> str | None:
        """``responder`` or ``non-responder``; none for the drug-free."""
        return None if self.analgesia is None else RESPONDER if self.analgesia >= threshold else NON_RESPONDER


def build_trial(
    settings: TrialSettings,
    population: PopulationSettings,
    *,
    seed: int,
    effect: float,
    scan: Scan,
    resolution_mm: float,
    atlases: tuple[str, ...],
    datasets: Mapping[str, Path],
) -> Trial:
    """A trial that is ready to draw people from; ``scan`` says how long a scan is, the settings how fast at each site."""
    people = population.model_copy(update={"num_sites": len(settings.repetition_times_s), "confounding": 0.0})
    # no disorders: at effect 0 a diagnosis changes nothing
    first = build_rest(people, seed=seed, effect=0.0, scan=scan, resolution_mm=resolution_mm, atlases=atlases, datasets=datasets)
    seconds = scan.frames * scan.repetition_time_s
    scans = [replace(scan, frames=round(seconds / time), repetition_time_s=time) for time in settings.repetition_times_s]
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence(seed, spawn_key=(2,))))
    mixing, couplings = mixing_of(settings.patterns), len(COUPLING_NAMES)
    prognostic, predictive = _draw_scores(settings, rng) if settings.patterns is None else _draw_patterned_scores(settings, rng)
    shared = replace(first.population, mixing=None if settings.patterns is None else mixing[:couplings, :couplings])
    return Trial(
        settings=settings,
        sites=tuple(replace(first, population=shared, scan=one) for one in scans),
        prognostic=prognostic,
        predictive=predictive,
        effect=effect,
        mixing=mixing,
    )


def draw_patient(trial: Trial, index: int) -> Patient:
    """Patient number ``index``, from 1."""
    person, site, traits = _draw_traits(trial, index)
    seed = trial.simulation.population.seed
    block = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(3, (index - 1) // _BLOCK)))
    arm = str(block.permutation([PLACEBO, DRUG] * (_BLOCK // 2))[(index - 1) % _BLOCK])
    noise = float(stream(seed, index, 7).normal())
    analgesia = float(expected_analgesia(trial, traits, drug=arm == DRUG)) + trial.settings.noise_sd * noise
    return Patient(person=person, cohort=TRIAL, site=site, traits=traits, arm=arm, analgesia=round(min(analgesia, 100.0), 2))


def draw_drug_free(trial: Trial, index: int) -> Patient:
    """Drug-free person number ``index``, from 1."""
    person, site, traits = _draw_traits(trial, _FIRST_DRUG_FREE + index)
    return Patient(person=person, cohort=DRUG_FREE, site=site, traits=traits, arm=None, analgesia=None)


def expected_analgesia(trial: Trial, traits: NDArray[np.float64], *, drug: bool) -> NDArray[np.float64]:
    """Mean analgesia of people with (…, 35) traits in an arm, %."""
    settings = trial.settings
    scores = settings.prognostic * trial.prognostic.of(traits) + (settings.predictive * trial.predictive.of(traits) if drug else 0.0)
    return settings.mean_analgesia + settings.drug_benefit * drug + settings.noise_sd * trial.effect * scores


def patient_series(trial: Trial, patient: Patient) -> PersonSeries:
    """A person's scan at their site, in every atlas."""
    return series_of(trial.sites[patient.site], patient.person)


class Planted:
    """What may be planted, as people's series show it; no series need be kept."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial
        self._shares = {region_map.label: network_shares(region_map) for region_map in trial.simulation.maps}
        self._rows: list[tuple[Any, ...]] = []

    def add(self, label: str, patient: Patient, seen: PersonSeries) -> None:
        """Measure one person in every atlas."""
        seconds = self._trial.sites[patient.site].scan.repetition_time_s
        for (atlas, shares), series in zip(self._shares.items(), seen.series, strict=True):
            self._rows.append((label, atlas, *measure_couplings(series, shares), *measure_tilts(series, shares, seconds)))

    def table(self) -> pd.DataFrame:
        """One row per participant and atlas, as :func:`~brainfm_cli.simulation.truth.attainable_features` gives it."""
        table = pd.DataFrame(self._rows, columns=["participant_id", "atlas", *COUPLING_NAMES, *TILT_NAMES])
        table = table.sort_values("atlas", key=lambda labels: labels.map(list(self._shares).index), kind="stable", ignore_index=True)
        return with_patterns(table, named_patterns(self._trial.settings.patterns))


def participants(trial: Trial, labels: Sequence[str], patients: Sequence[Patient]) -> pd.DataFrame:
    """participants.tsv, without ``sub-``."""
    return pd.DataFrame(
        {
            "participant_id": list(labels),
            "age": [one.person.age for one in patients],
            "sex": [one.person.sex for one in patients],
            "site": [one.person.site for one in patients],
            "cohort": [one.cohort for one in patients],
            "arm": [one.arm for one in patients],
            "analgesia": [one.analgesia for one in patients],
            "response": [one.response(trial.settings.threshold) for one in patients],
            "split": [one.person.split for one in patients],
        }
    )


def latents(trial: Trial, labels: Sequence[str], patients: Sequence[Patient]) -> pd.DataFrame:
    """Each person's true scores and the analgesia expected in either arm: what an oracle would know."""
    traits = np.stack([one.traits for one in patients])
    return pd.DataFrame(
        {
            "participant_id": list(labels),
            "prognostic": trial.prognostic.of(traits),
            "predictive": trial.predictive.of(traits),
            "expected_placebo": expected_analgesia(trial, traits, drug=False),
            "expected_drug": expected_analgesia(trial, traits, drug=True),
        }
    ).round(6)


def build_trial_truth(trial: Trial, table: pd.DataFrame, planted: pd.DataFrame, *, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that truth.json says; ``table`` is :func:`participants`' and ``planted`` that of :class:`Planted`."""
    population = trial.simulation.population
    return {
        "kind": "drug",
        "seed": population.seed,
        "effect": trial.effect,
        "null": trial.effect == 0,
        "settings": dict(settings),
        "networks": list(YEO_NETWORKS),
        "couplings": list(COUPLING_NAMES),
        "spread_sd": SPREAD,
        "tilts": list(TILT_NAMES),
        "tilt_sd": TILT_SPREAD,
        "patterns": named_patterns(trial.settings.patterns),
        "threshold": trial.settings.threshold,
        "scores": {
            name: {"per_sd": round(size * trial.effect * trial.settings.noise_sd, 4), "arms": arms, "loadings": _named(score)}
            for name, score, size, arms in (
                ("prognostic", trial.prognostic, trial.settings.prognostic, [PLACEBO, DRUG]),
                ("predictive", trial.predictive, trial.settings.predictive, [DRUG]),
            )
        },
        "targets": {name: _target(trial, table, planted, name) for name in ("response", "analgesia")},
        "atlases": describe_atlases(trial.simulation),
    }


def bayes_score(trial: Trial, target: str, arms: Sequence[str], *, couplings: bool = True, tilts: bool = True) -> float:
    """AUROC (``response``) or R² (``analgesia``) of who knows everybody's true traits of some kinds, and the arm.

    Patients are divided evenly over ``arms``. A trait that is not known is noise.
    """
    settings, groups = trial.settings, []
    for arm in arms:
        loadings = trial.effect * settings.noise_sd * _loadings(trial, drug=arm == DRUG)
        known = np.concatenate([np.full(len(COUPLING_NAMES), couplings), np.full(len(TILT_NAMES), tilts)])
        mean = settings.mean_analgesia + settings.drug_benefit * (arm == DRUG)
        # couplings and tilts are independent of one another, so that a kind that is not known tells nothing of one that is
        signal, rest = (float(part @ trial.covariance @ part) for part in (loadings * known, loadings * ~known))
        groups.append((mean, signal, settings.noise_sd**2 + rest))
    if target == "analgesia":
        between = float(np.var([mean for mean, _, _ in groups]))
        explained = between + float(np.mean([signal for _, signal, _ in groups]))
        return explained / (explained + float(np.mean([noise for _, _, noise in groups])))
    # the distribution of the chance to respond, on a grid of standard deviations of what is known, in each arm
    steps = np.linspace(-8, 8, _GRID)
    weight = stats.norm.pdf(steps)
    chance = np.stack(
        [stats.norm.cdf((mean + np.sqrt(signal) * steps - settings.threshold) / np.sqrt(noise)) for mean, signal, noise in groups]
    )
    weights = np.broadcast_to(weight, chance.shape)
    order = np.argsort(chance, axis=None, kind="stable")
    values, yes, no = chance.ravel()[order], (weights * chance).ravel()[order], (weights * (1 - chance)).ravel()[order]
    # ties (a null trial) count half
    _, where = np.unique(np.round(values, 12), return_inverse=True)
    yes, no = np.bincount(where, yes), np.bincount(where, no)
    below = np.cumsum(no) - 0.5 * no
    return float(yes @ below / (yes.sum() * no.sum()))


def _draw_traits(trial: Trial, index: int) -> tuple[Person, int, NDArray[np.float64]]:
    population = trial.simulation.population
    person = draw_person(population, index)
    site = ord(person.site[-1]) - ord("A")
    own = person.coupling - known_shift(population, age=person.age, male=person.sex == "M", site=site)
    # what is no Yeo network (subcortex) has the typical spectrum
    tilts = trial.mixing[len(COUPLING_NAMES) :, len(COUPLING_NAMES) :] @ stream(population.seed, index, 6).normal(size=len(YEO_NETWORKS))
    by_network = np.array([TILT_SPREAD * tilts[YEO_NETWORKS.index(name)] if name in YEO_NETWORKS else 0.0 for name in NETWORKS])
    traits = np.concatenate([latent_couplings(own) / SPREAD, tilts])
    return replace(person, node_tilt=by_network[population.node_networks]), site, traits


def _draw_scores(settings: TrialSettings, rng: np.random.Generator) -> tuple[Score, Score]:
    """Two scores that share no coupling and no network."""
    couplings = rng.permutation(len(COUPLINGS))
    networks = rng.permutation(len(YEO_NETWORKS))
    count, scores = settings.couplings_per_score, []
    for number in (0, 1):
        loadings, tilts = np.zeros(len(COUPLING_NAMES)), np.zeros(len(TILT_NAMES))
        chosen = couplings[number * count : (number + 1) * count]
        loadings[chosen] = rng.choice([-1, 1], count) * np.sqrt((1 - settings.dynamics_share) / count)
        tilts[networks[number]] = rng.choice([-1, 1]) * np.sqrt(settings.dynamics_share)
        scores.append(Score(couplings=loadings, tilts=tilts))
    return scores[0], scores[1]


def _draw_patterned_scores(settings: TrialSettings, rng: np.random.Generator) -> tuple[Score, Score]:
    """Two scores that share no pattern, each along one of couplings and one of spectra."""
    kinds = shared_patterns(settings.patterns)
    chosen = [rng.permutation(directions.shape[1])[:2] for directions in kinds]
    signs = rng.choice([-1, 1], (2, 2))
    scores = []
    for number in (0, 1):
        couplings, tilts = (
            np.sqrt(share / variance_along(directions)) * sign * directions[:, places[number]]
            for share, directions, places, sign in zip(
                (1 - settings.dynamics_share, settings.dynamics_share), kinds, chosen, signs[number], strict=True
            )
        )
        names = (f"coupling pattern {chosen[0][number] + 1}", f"tilt pattern {chosen[1][number] + 1}")
        scores.append(Score(couplings=couplings, tilts=tilts, patterns=names))
    return scores[0], scores[1]


def _loadings(trial: Trial, *, drug: bool) -> NDArray[np.float64]:
    """(35,) analgesia per SD of each trait in an arm, in SDs of noise at effect 1."""
    both = [np.concatenate([score.couplings, score.tilts]) for score in (trial.prognostic, trial.predictive)]
    return trial.settings.prognostic * both[0] + (trial.settings.predictive * both[1] if drug else 0.0)


def _named(score: Score) -> dict[str, float]:
    values = zip((*COUPLING_NAMES, *TILT_NAMES), (*score.couplings, *score.tilts), strict=True)
    return {name: round(float(value), 6) for name, value in values if value}


def _target(trial: Trial, table: pd.DataFrame, planted: pd.DataFrame, name: str) -> dict[str, Any]:
    """What is planted in one target, its ceilings in every arm and with one modality only, and how many people have it."""
    patients = table[table["arm"].notna()].set_index("participant_id")
    target = (patients["response"] == RESPONDER).astype(int) if name == "response" else patients["analgesia"]
    columns = [*trial.prognostic.columns, *trial.predictive.columns]
    kinds = {"both": {}, "coupling": {"tilts": False}, "dynamics": {"couplings": False}}
    arms = {PLACEBO: [PLACEBO], DRUG: [DRUG], "pooled": [PLACEBO, DRUG]}
    measured = {
        atlas: rows.set_index("participant_id").loc[patients.index, columns] for atlas, rows in planted.groupby("atlas", sort=False)
    }
    return {
        "metric": "auroc" if name == "response" else "r2",
        "people": len(target),
        **({"negative": int((target == 0).sum()), "positive": int((target == 1).sum())} if name == "response" else {}),
        "planted": columns,
        "bayes": round(bayes_score(trial, name, arms["pooled"]), 4),
        "bayes_by_arm": {
            arm: {kind: round(bayes_score(trial, name, which, **known), 4) for kind, known in kinds.items()} for arm, which in arms.items()
        },
        "attainable": {atlas: cross_validated(rows, target, patients["split"]) for atlas, rows in measured.items()},
        "attainable_by_arm": {
            arm: {
                atlas: cross_validated(rows[of_arm.to_numpy()], target[of_arm], patients.loc[of_arm, "split"])
                for atlas, rows in measured.items()
            }
            for arm, of_arm in ((arm, patients["arm"] == arm) for arm in (PLACEBO, DRUG))
        },
    }
