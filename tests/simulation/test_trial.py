"""The simulated trial: who is randomised, what is planted where, and that an oracle reaches the ceilings that are stated."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
from scipy import signal
from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeCV
from sklearn.metrics import r2_score, roc_auc_score
from sklearn.model_selection import cross_val_predict

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.errors import SettingsError
from brainfm_cli.programs.validator import validate
from brainfm_cli.simulation.population import PopulationSettings
from brainfm_cli.simulation.sources import Scan, rest_noise
from brainfm_cli.simulation.trial import (
    DRUG,
    PLACEBO,
    Trial,
    TrialSettings,
    bayes_score,
    build_trial,
    draw_drug_free,
    draw_patient,
    expected_analgesia,
)
from brainfm_cli.simulation.truth import attainable_features
from brainfm_cli.stages.simulate import SimulateSettings, write_trial
from tests.stages.command import brainfm

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

PEOPLE = 160


def trial_of(*, effect: float = 1.0, seed: int = 5, **settings: object) -> Trial:
    scan = Scan(frames=200, repetition_time_s=2.0, non_steady_frames=1)
    return build_trial(
        TrialSettings.model_validate(settings), PopulationSettings(), seed=seed, effect=effect, scan=scan, resolution_mm=8.0,
        atlases=("Schaefer100",), datasets={},
    )  # fmt: skip


@pytest.fixture(scope="module")
def trial() -> Trial:
    return trial_of()


@pytest.fixture(scope="module")
def patients(trial: Trial) -> pd.DataFrame:
    """2,000 patients without their scans."""
    drawn = [draw_patient(trial, index) for index in range(1, 2001)]
    traits = np.stack([one.traits for one in drawn])
    return pd.DataFrame(
        {
            "drug": [one.arm == DRUG for one in drawn],
            "analgesia": [one.analgesia for one in drawn],
            "prognostic": trial.prognostic.of(traits),
            "predictive": trial.predictive.of(traits),
            "placebo": expected_analgesia(trial, traits, drug=False),
            "treated": expected_analgesia(trial, traits, drug=True),
        }
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trial")
    values = {"drug_free": 12, "repetition_times_s": [2.0, 2.5], "threshold": 28.0}
    settings = SimulateSettings.from_values(
        {"kind": "drug", "level": "series", "participants": PEOPLE, "seed": 5, "atlases": ["Schaefer100"], "trial": values}
    )
    write_trial(root, settings, ())
    return root


def test_an_oracle_of_the_true_traits_reaches_the_stated_ceilings(trial: Trial, patients: pd.DataFrame) -> None:
    response = patients["analgesia"] >= trial.settings.threshold
    known = np.where(patients["drug"], patients["treated"], patients["placebo"])
    for rows, arms in ((patients["drug"], [DRUG]), (~patients["drug"], [PLACEBO]), (patients["drug"] | True, [PLACEBO, DRUG])):
        assert roc_auc_score(response[rows], known[rows]) == pytest.approx(bayes_score(trial, "response", arms), abs=0.02)
        assert r2_score(patients["analgesia"][rows], known[rows]) == pytest.approx(bayes_score(trial, "analgesia", arms), abs=0.03)
    # a model that must learn the loadings does not beat who knows them
    half = np.arange(len(patients)) < 1000
    columns = patients.loc[patients["drug"], ["prognostic", "predictive"]]
    train = half[patients["drug"]]
    fitted = LogisticRegression().fit(columns[train], response[patients["drug"]][train])
    learnt = roc_auc_score(response[patients["drug"]][~train], fitted.decision_function(columns[~train]))
    assert learnt == pytest.approx(bayes_score(trial, "response", [DRUG]), abs=0.03)


def test_each_modality_is_needed(trial: Trial) -> None:
    for target in ("response", "analgesia"):
        for arms in ([PLACEBO], [DRUG]):
            both = bayes_score(trial, target, arms)
            alone = [bayes_score(trial, target, arms, **{kind: False}) for kind in ("couplings", "tilts")]  # type: ignore[arg-type]
            assert max(alone) < both - 0.05
            assert min(alone) > (0.6 if target == "response" else 0.1)
    assert not set(trial.prognostic.columns) & set(trial.predictive.columns)


def test_the_predictive_score_matters_under_the_drug_only(trial: Trial, patients: pd.DataFrame) -> None:
    slopes = {
        drug: LinearRegression().fit(rows[["prognostic", "predictive"]], rows["analgesia"]).coef_ / trial.settings.noise_sd
        for drug, rows in patients.groupby("drug")
    }
    np.testing.assert_allclose(slopes[False], [0.8, 0.0], atol=0.08)
    np.testing.assert_allclose(slopes[True], [0.8, 1.2], atol=0.08)
    np.testing.assert_allclose(np.corrcoef(patients["prognostic"], patients["predictive"])[0, 1], 0, atol=0.06)
    np.testing.assert_allclose(patients[["prognostic", "predictive"]].std(), 1.0, atol=0.05)


def test_nothing_is_planted_in_a_null_trial() -> None:
    null = trial_of(effect=0.0)
    assert bayes_score(null, "response", [PLACEBO]) == pytest.approx(0.5)
    assert bayes_score(null, "analgesia", [DRUG]) == 0
    drawn = [draw_patient(null, index) for index in range(1, 801)]
    scores = null.predictive.of(np.stack([one.traits for one in drawn]))
    assert abs(np.corrcoef(scores, [one.analgesia for one in drawn])[0, 1]) < 0.1


def test_patients_depend_on_their_number_alone_and_arms_are_balanced(trial: Trial) -> None:
    again = trial_of(drug_free=5, repetition_times_s=(2.0, 2.0))
    for index in (1, 7, 300):
        one, two = draw_patient(trial, index), draw_patient(again, index)
        assert (one.arm, one.analgesia, one.person.site) == (two.arm, two.analgesia, two.person.site)
        np.testing.assert_array_equal(one.traits, two.traits)
    assert not np.array_equal(draw_drug_free(trial, 1).traits, draw_patient(trial, 1).traits)
    assert draw_drug_free(trial, 1).arm is None
    arms = [draw_patient(trial, index).arm for index in range(1, 57)]
    assert arms.count(DRUG) == 28
    assert all(arms[start : start + 4].count(DRUG) == 2 for start in range(0, 56, 4))


def test_tilts_change_spectra_and_leave_the_variance_that_remains() -> None:
    scan = Scan(frames=4000, repetition_time_s=2.0, non_steady_frames=0)
    plain, tilted = (rest_noise(np.random.default_rng(0), 3, scan, tilt=tilt).astype(float) for tilt in (None, np.array([-1.0, 0.0, 1.0])))
    np.testing.assert_allclose(tilted[:, 1], plain[:, 1], atol=1e-5)
    frequency, before = signal.welch(plain, 0.5, nperseg=512, axis=0)
    after = signal.welch(tilted, 0.5, nperseg=512, axis=0)[1]
    band = (frequency > 0.01) & (frequency < 0.1)
    for place, tilt in enumerate((-1.0, 0.0, 1.0)):
        slope = np.polyfit(np.log(frequency[band]), np.log(after[band, place] / before[band, place]), 1)[0]
        assert slope == pytest.approx(tilt, abs=0.05)
        kept = frequency > 1 / 100
        assert after[kept, place].sum() == pytest.approx(before[kept, place].sum(), rel=0.1)


def held_out_correlation(features: NDArray, target: NDArray) -> float:
    predicted = cross_val_predict(RidgeCV(np.logspace(0, 5, 11)), features, target, cv=5)
    return float(np.corrcoef(predicted, target)[0, 1])


def test_series_show_dynamics_and_connectivity_does_not(written: Path) -> None:
    truth = json.loads((written / "truth.json").read_text())
    cohort = Cohort.open(written)
    table = pd.read_csv(written / "planted.tsv", sep="\t").set_index("participant_id")
    patients = table.index[:PEOPLE]
    trial = trial_of(repetition_times_s=(2.0, 2.5))
    traits = np.stack([draw_patient(trial, index).traits for index in range(1, PEOPLE + 1)])
    (label,) = cohort.atlases
    rows = cohort.index.set_index("participant").loc[patients]
    edges = []
    for row in rows.itertuples():
        values = np.corrcoef(np.asarray(cohort.series(row), float), rowvar=False)
        edges.append(np.arctanh(np.clip(values[np.triu_indices(len(values), 1)], -0.999, 0.999)))
    for place, name in enumerate(truth["tilts"]):
        tilt = traits[:, 28 + place]
        assert np.corrcoef(table.loc[patients, name], tilt)[0, 1] > 0.4, name
        assert held_out_correlation(np.stack(edges), tilt) < 0.25, name
    planted = [name for score in truth["scores"].values() for name in score["loadings"] if not name.startswith("tilt")]
    for name in planted:
        coupling = traits[:, truth["couplings"].index(name)]
        assert np.corrcoef(table.loc[patients, name], coupling)[0, 1] > 0.4, name
    # what is measured again from the packed cohort is what was written
    features = attainable_features(cohort, truth).set_index("participant_id")
    np.testing.assert_allclose(features.loc[table.index, truth["tilts"]], table[truth["tilts"]], atol=1e-4)
    assert label in truth["targets"]["response"]["attainable"]


def test_tables_say_who_was_given_what(written: Path) -> None:
    table = pd.read_csv(written / "participants.tsv", sep="\t", na_values="n/a")
    trial = table[table["cohort"] == "trial"]
    free = table[table["cohort"] == "drug-free"]
    assert (len(trial), len(free)) == (PEOPLE, 12)
    assert trial["arm"].value_counts().to_dict() == {PLACEBO: PEOPLE // 2, DRUG: PEOPLE // 2}
    assert free[["arm", "analgesia", "response"]].isna().all(axis=None)
    np.testing.assert_array_equal(trial["response"] == "responder", trial["analgesia"] >= 28.0)
    index = Cohort.open(written).index
    assert dict(index.groupby("site")["repetition_time"].unique().explode()) == {"siteA": 2.0, "siteB": 2.5}
    assert dict(index.groupby("site")["frames"].unique().explode()) == {"siteA": 199, "siteB": 159}
    latents = pd.read_csv(written / "latents.tsv", sep="\t", index_col="participant_id")
    assert list(latents.columns) == ["prognostic", "predictive", "expected_placebo", "expected_drug"]
    truth = json.loads((written / "truth.json").read_text())["targets"]["response"]
    (measured,) = truth["attainable_by_arm"][DRUG].values()
    assert 0.55 < measured["cross_validated"] < truth["bayes_by_arm"][DRUG]["both"] + 0.05


def test_the_command_writes_valid_bids(tmp_path: Path) -> None:
    options = ("--participants", "12", "--atlases", "Schaefer100", "--set", "trial.drug_free=6", "frames=60")
    assert brainfm("simulate", tmp_path / "out", "--kind", "drug", "--level", "series", *options) == 0
    validate(tmp_path / "out")


def test_a_trial_is_written_as_series_only() -> None:
    with pytest.raises(SettingsError, match="add --level series"):
        SimulateSettings.from_values({"kind": "drug"})


def test_with_patterns_people_differ_along_them_in_every_population() -> None:
    trial, other = trial_of(patterns=(4, 2)), trial_of(patterns=(4, 2), seed=6)
    drawn = [draw_patient(trial, index) for index in range(1, 1501)]
    traits = np.stack([one.traits for one in drawn])
    free = np.stack([draw_drug_free(other, index).traits for index in range(1, 1501)])
    for seen in (traits, free):
        np.testing.assert_allclose(np.cov(seen, rowvar=False), trial.covariance, atol=0.35)
        values = np.linalg.eigvalsh(np.cov(seen[:, :28], rowvar=False))[::-1]
        assert values[3] > 10 * values[4]
        values = np.linalg.eigvalsh(np.cov(seen[:, 28:], rowvar=False))[::-1]
        assert values[1] > 5 * values[2]
    assert np.trace(trial.covariance) == pytest.approx(35)
    # the person's own covariance has them too: what is planted is what is scanned
    shown = np.stack([one.person.coupling[np.triu_indices(7)] for one in drawn])
    assert np.corrcoef(shown @ trial.prognostic.couplings, traits @ np.r_[trial.prognostic.couplings, np.zeros(7)])[0, 1] > 0.9
    scores = np.stack([trial.prognostic.of(traits), trial.predictive.of(traits)])
    np.testing.assert_allclose(np.cov(scores), np.eye(2), atol=0.08)
    assert len({*trial.prognostic.columns, *trial.predictive.columns}) == 4
    # half of either score lies in dynamics, as without patterns, and the ceilings are those of any two scores of variance 1
    for target in ("response", "analgesia"):
        assert bayes_score(trial, target, [DRUG]) == pytest.approx(bayes_score(trial_of(), target, [DRUG]), abs=1e-6)
        assert bayes_score(trial, target, [DRUG], tilts=False) == pytest.approx(
            bayes_score(trial_of(), target, [DRUG], tilts=False), abs=1e-6
        )


def test_planted_patterns_are_measured(tmp_path: Path) -> None:
    values = {"drug_free": 0, "patterns": [4, 2]}
    settings = SimulateSettings.from_values(
        {"kind": "drug", "level": "series", "participants": 60, "seed": 5, "atlases": ["Schaefer100"], "trial": values}
    )
    write_trial(tmp_path, settings, ())
    truth = json.loads((tmp_path / "truth.json").read_text())
    traits = np.stack([draw_patient(trial_of(patterns=(4, 2)), index).traits for index in range(1, 61)])
    features = attainable_features(Cohort.open(tmp_path), truth).set_index("participant_id")
    assert len(truth["patterns"]) == 6
    for name in truth["targets"]["analgesia"]["planted"]:
        weights = truth["patterns"][name]
        columns = [[*truth["couplings"], *truth["tilts"]].index(one) for one in weights]
        assert np.corrcoef(features[name], traits[:, columns] @ list(weights.values()))[0, 1] > 0.7, name
