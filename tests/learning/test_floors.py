"""Floors against plain scikit-learn on the explicit features, and that nothing of a test person reaches a fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from nilearn.connectome import ConnectivityMeasure, sym_matrix_to_vec
from scipy.linalg import logm
from scipy.spatial.distance import pdist
from sklearn.covariance import LedoitWolf
from sklearn.decomposition import PCA
from sklearn.impute import SimpleImputer
from sklearn.kernel_ridge import KernelRidge
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC, SVR

from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning.floors import (
    CovariateFloor,
    FloorSettings,
    LinearFloor,
    majority,
    make_floors,
    typed,
    usable_covariates,
)
from brainfm_cli.learning.forecasts import TrainingFold
from brainfm_cli.learning.kernels import Kernel, connectivity_features, connectivity_kernel, shared_atlases
from brainfm_cli.learning.machines import KernelRidgeFloor, SupportVectorFloor
from brainfm_cli.learning.regions import RegionFloor, region_features
from brainfm_cli.learning.splits import inner_folds
from brainfm_cli.learning.targets import participant_table, read_target
from tests.learning.cohorts import (
    binary_target,
    case_cohort,
    continuous_target,
    multiclass_target,
    names_of,
    pack_cohort,
    plain_table,
    series_of,
)

PEOPLE, TRAIN = 40, 28


def fold_of(target, train=TRAIN, seed=0):
    training = target.keep(target.participants[:train])
    return TrainingFold(target=training, inner=inner_folds(training, groups={}, folds=4, seed=seed), repeat=1, fold=1, seed=seed)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return case_cohort(tmp_path_factory.mktemp("toy") / "cohort", people=PEOPLE, effect=0.7)


@pytest.fixture(scope="module")
def edges(cohort):
    """(people, 28) Fisher z, worked out run by run with numpy."""
    rows = []
    for name in names_of(PEOPLE):
        (run,) = cohort.index[cohort.index["participant"] == name].itertuples()
        rows.append(np.arctanh(np.corrcoef(np.asarray(cohort.series(run), float).T)[np.triu_indices(8, 1)]))
    return np.array(rows)


def standard(train, test):
    """Centred on the training mean, scaled to a mean squared norm of 1."""
    centre = train.mean(0)
    scale = np.sqrt(np.mean(np.sum((train - centre) ** 2, axis=1)))
    return (train - centre) / scale, (test - centre) / scale


def kernel_of(features):
    features = features.astype(np.float64)
    return Kernel(participants=tuple(names_of(len(features))), matrix=features @ features.T)


def targets():
    rng = np.random.default_rng(2)
    return {
        "binary": binary_target([0, 1] * (PEOPLE // 2)),
        "multiclass": multiclass_target(list(rng.permutation(np.arange(PEOPLE) % 3))),
        "continuous": continuous_target(rng.normal(20, 5, PEOPLE)),
    }


def test_features_are_fisher_z_of_pearson(cohort, edges):
    found = connectivity_features(cohort, names_of(PEOPLE), "Toy", "fisherz")
    np.testing.assert_allclose(found, edges, atol=2e-6)  # float32


def test_tangent_features_are_matrix_logarithms(cohort):
    found = connectivity_features(cohort, names_of(3), "Toy", "tangent")
    for name, row in zip(names_of(3), found, strict=True):
        (run,) = cohort.index[cohort.index["participant"] == name].itertuples()
        series = np.asarray(cohort.series(run), float)
        series = (series - series.mean(0)) / series.std(0)
        covariance = LedoitWolf(assume_centered=True).fit(series).covariance_
        np.testing.assert_allclose(np.sort(row), np.sort(np.sqrt(2) * sym_matrix_to_vec(logm(covariance))), atol=1e-5)


def test_tangent_space_resembles_that_of_nilearn(cohort):
    """nilearn's reference is the geometric mean, ours log-Euclidean: alike, not the same."""
    ours = connectivity_kernel(cohort, names_of(PEOPLE), "Toy", "tangent").similarity()
    series = [np.asarray(cohort.series(run), float) for run in cohort.index.itertuples()]
    theirs = np.corrcoef(ConnectivityMeasure(kind="tangent", vectorize=True, standardize="zscore_sample").fit_transform(series))
    upper = np.triu_indices(PEOPLE, 1)
    assert np.corrcoef(ours[upper], theirs[upper])[0, 1] > 0.9


@pytest.mark.parametrize("kind", ["binary", "multiclass", "continuous"])
def test_linear_floor_is_the_penalised_regression_on_the_edges(edges, kind):
    target = targets()[kind]
    fold = fold_of(target)
    train, test = standard(edges[:TRAIN], edges[TRAIN:])
    observed = target.observed[:TRAIN]
    for penalty in (0.1, 10.0, 1000.0):
        found = LinearFloor(kernel=kernel_of(edges), penalties=(penalty,))(fold, target.participants[TRAIN:])
        if kind == "continuous":
            expected, tolerance = Ridge(alpha=1 / penalty).fit(train, observed).predict(test), 1e-9
        else:
            solver = {"solver": "newton-cholesky", "tol": 1e-12} if kind == "binary" else {"solver": "lbfgs", "tol": 1e-10}
            expected = LogisticRegression(C=penalty, max_iter=5000, **solver).fit(train, observed).predict_proba(test)
            tolerance = 1e-10 if kind == "binary" else 1e-5  # lbfgs stops earlier than Newton
        np.testing.assert_allclose(found.test, expected, atol=tolerance, rtol=tolerance)
        assert found.choices == {"C": penalty}


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_the_penalty_is_the_best_of_inner_folds_fitted_by_hand(edges, kind):
    target = targets()[kind]
    fold = fold_of(target)
    observed, penalties = target.observed[:TRAIN], (0.01, 1.0, 100.0)
    losses, held_out = [], []
    for penalty in penalties:
        shape = (TRAIN, 2) if kind == "binary" else (TRAIN,)
        inside = np.empty(shape)
        for train, validation in fold.inner:
            rows, others = standard(edges[train], edges[validation])
            model = LogisticRegression(C=penalty, max_iter=5000, tol=1e-10) if kind == "binary" else Ridge(alpha=1 / penalty)
            model.fit(rows, observed[train])
            inside[validation] = model.predict_proba(others) if kind == "binary" else model.predict(others)
        held_out.append(inside)
        losses.append(-roc_auc_score(observed, inside[:, 1]) if kind == "binary" else np.mean((observed - inside) ** 2))
    found = LinearFloor(kernel=kernel_of(edges), penalties=penalties)(fold, target.participants[TRAIN:])
    assert found.choices["C"] == penalties[int(np.argmin(losses))]
    np.testing.assert_allclose(found.train, held_out[int(np.argmin(losses))], atol=1e-3)


@pytest.mark.parametrize("kind", ["binary", "multiclass", "continuous"])
def test_support_vectors_are_those_of_sklearn_on_the_edges(edges, kind):
    target = targets()[kind]
    fold = fold_of(target)
    observed = target.observed[:TRAIN]
    found = SupportVectorFloor(kernel=kernel_of(edges), penalties=(10.0,))(fold, target.participants[TRAIN:])
    train, test = standard(edges[:TRAIN], edges[TRAIN:])
    if kind == "continuous":
        centre, spread = observed.mean(), observed.std()
        expected = SVR(kernel="linear", C=10.0).fit(train, (observed - centre) / spread).predict(test) * spread + centre
        np.testing.assert_allclose(found.test, expected, atol=0.02 * spread)
        return
    inside = np.empty((TRAIN, 1 if kind == "binary" else 3))
    for rows, validation in fold.inner:
        inner, others = standard(edges[rows], edges[validation])
        machine = SVC(kernel="linear", C=10.0).fit(inner, observed[rows])
        inside[validation] = machine.decision_function(others).reshape(len(validation), -1)
    platt = LogisticRegression(C=1e4, max_iter=1000).fit(inside, observed)
    machine = SVC(kernel="linear", C=10.0).fit(train, observed)
    expected = platt.predict_proba(machine.decision_function(test).reshape(len(test), -1))
    np.testing.assert_allclose(found.test, expected, atol=2e-2)


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_kernel_ridge_is_that_of_sklearn_with_a_gaussian_kernel(edges, kind):
    target = targets()[kind]
    fold = fold_of(target)
    found = KernelRidgeFloor(kernel=kernel_of(edges), penalties=(10.0,))(fold, target.participants[TRAIN:])

    def by_hand(rows, others, values):
        train, test = standard(rows, others)
        width = np.median(pdist(train, "sqeuclidean"))
        return KernelRidge(kernel="rbf", gamma=1 / width, alpha=0.1).fit(train, values - values.mean()).predict(test) + values.mean()

    observed = target.observed[:TRAIN]
    expected = by_hand(edges[:TRAIN], edges[TRAIN:], observed)
    if kind == "binary":
        inside = np.empty(TRAIN)
        for rows, validation in fold.inner:
            inside[validation] = by_hand(edges[rows], edges[validation], observed[rows])
        platt = LogisticRegression(C=1e4, max_iter=1000).fit(inside[:, None], observed)
        expected = platt.predict_proba(expected[:, None])
    np.testing.assert_allclose(found.test, expected, rtol=1e-6, atol=1e-6)


def test_region_floors_are_a_pipeline_of_sklearn(tmp_path):
    rng = np.random.default_rng(0)
    table = plain_table(PEOPLE)
    labels = np.arange(PEOPLE) % 2
    gain = np.exp(0.3 * rng.normal(size=(PEOPLE, 8)) + 0.5 * labels[:, None] * (np.arange(8) < 2))
    series = {name: [100 + 5 * labels[row] + gain[row] * rng.normal(size=(80, 8))] for row, name in enumerate(table.index)}
    series["p003"][0][:, 4] = np.nan
    cohort = pack_cohort(tmp_path / "raw", table, series)
    names = names_of(PEOPLE)
    spread = region_features(cohort, names, "Toy", "sd")
    expected = np.log([series[name][0].astype(np.float32).astype(float).std(0) for name in names])
    np.testing.assert_allclose(spread, expected, atol=1e-6)
    assert np.isnan(spread[3, 4])
    means = region_features(cohort, names, "Toy", "mean")
    np.testing.assert_allclose(means[0], series["p000"][0].mean(0), rtol=1e-6)

    target = binary_target(labels.tolist())
    found = RegionFloor(participants=tuple(names), features=spread, components=3, penalties=(10.0,))(fold_of(target), names[TRAIN:])
    by_hand = make_pipeline(SimpleImputer(strategy="median"), StandardScaler(), PCA(3)).fit(spread[:TRAIN])
    train, test = by_hand.transform(spread[:TRAIN]), by_hand.transform(spread[TRAIN:])
    scale = np.sqrt(np.mean(np.sum(train**2, axis=1)))
    model = LogisticRegression(C=10.0, tol=1e-10).fit(train / scale, labels[:TRAIN])
    np.testing.assert_allclose(found.test, model.predict_proba(test / scale), atol=1e-5)

    kinds = FloorSettings(kinds=("means", "spread"))
    assert set(make_floors(cohort, target, table, kinds).predictors) == {"Linear, region means", "PCA + linear, region SD"}
    standardised = {name: [(run[0] - run[0].mean(0)) / run[0].std(0, ddof=1)] for name, run in series.items()}
    floors = make_floors(pack_cohort(tmp_path / "standardised", table, standardised), target, table, kinds)
    assert floors.predictors == {}
    assert [note.split(":")[0] for note in floors.notes] == [
        "'Linear, region means' is not computed",
        "'PCA + linear, region SD' is not computed",
    ]


def test_nothing_of_a_test_person_reaches_the_training_coordinates(edges):
    names = names_of(PEOPLE)
    spoilt = edges.copy()
    spoilt[TRAIN:] = 7 * spoilt[TRAIN:] + 3
    before, others = kernel_of(edges).coordinates(names[:TRAIN], names[TRAIN:])
    after, _ = kernel_of(spoilt).coordinates(names[:TRAIN], names[TRAIN:])
    np.testing.assert_array_equal(before, after)
    one, _ = kernel_of(edges).coordinates(names[:TRAIN], names[TRAIN : TRAIN + 1])
    np.testing.assert_array_equal(one, before)
    np.testing.assert_allclose(np.mean(np.sum(before**2, axis=1)), 1)
    np.testing.assert_allclose(before.mean(0), 0, atol=1e-12)
    train, test = standard(edges[:TRAIN], edges[TRAIN:])
    np.testing.assert_allclose(others @ before.T, test @ train.T, atol=1e-10)


def test_one_persons_spoilt_series_changes_only_that_person(tmp_path):
    """The tangent reference is taken in the fold: a test person's series cannot move the others' forecasts."""
    rng = np.random.default_rng(1)
    table = plain_table(PEOPLE)
    series = {name: [series_of(1.0, rng)] for name in table.index}
    target = binary_target([0, 1] * (PEOPLE // 2))
    forecasts = []
    for folder in ("a", "b"):
        if folder == "b":
            series = {**series, "p039": [series_of(9.0, rng)]}
        kernel = connectivity_kernel(pack_cohort(tmp_path / folder, table, series), names_of(PEOPLE), "Toy", "tangent")
        forecasts.append(LinearFloor(kernel=kernel, penalties=(1.0, 100.0))(fold_of(target), target.participants[TRAIN:]))
    np.testing.assert_array_equal(forecasts[0].test[:-1], forecasts[1].test[:-1])
    np.testing.assert_array_equal(forecasts[0].train, forecasts[1].train)
    assert not np.allclose(forecasts[0].test[-1], forecasts[1].test[-1])


def test_covariates_are_imputed_scaled_and_coded_by_hand():
    rng = np.random.default_rng(3)
    table = plain_table(PEOPLE, age=rng.uniform(5, 60, PEOPLE), site=rng.choice(["A", "B"], PEOPLE))
    table.loc[["p001", "p030"], "age"] = np.nan
    table.loc["p035", "site"] = "new"
    target = targets()["binary"]
    found = CovariateFloor(table=table[["age", "site"]], penalties=(1.0,))(fold_of(target), target.participants[TRAIN:])

    train = table["age"].iloc[:TRAIN]
    filled = table["age"].fillna(train.median())
    columns = [filled, table["age"].isna().astype(float)]
    columns = [(one - one.iloc[:TRAIN].mean()) / one.iloc[:TRAIN].std(ddof=0) for one in columns]
    design = np.column_stack([*columns, table["site"] == "A", table["site"] == "B"]).astype(float)
    model = LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-12).fit(design[:TRAIN], target.observed[:TRAIN])
    np.testing.assert_allclose(found.test, model.predict_proba(design[TRAIN:]), atol=1e-10)


def test_the_majority_knows_nothing():
    fold = fold_of(binary_target([1] * 20 + [0] * 20))
    assert majority(fold, ["x", "y"]).test.tolist() == [[0, 1], [0, 1]]
    values = continuous_target(np.arange(40.0))
    assert majority(fold_of(values), ["x"]).test.tolist() == [13.5]


def test_everybody_alike_is_a_named_error():
    kernel = kernel_of(np.ones((10, 3)))
    with pytest.raises(InputDatasetError, match="the same connectivity"):
        kernel.coordinates(names_of(10)[:6], names_of(10)[6:])


def test_regions_without_signal_take_the_persons_own_mean(tmp_path):
    rng = np.random.default_rng(4)
    table = plain_table(6)
    series = {name: [series_of(1.0, rng)] for name in table.index}
    series["p001"][0][:, 5] = np.nan
    series["p002"][0][:, 6] = 3.0
    for name in ("p000", "p003", "p004", "p005"):
        series[name][0][:, 7] = 0.0
    cohort = pack_cohort(tmp_path / "cohort", table, series)
    found = connectivity_features(cohort, list(table.index), "Toy", "fisherz")
    assert found.shape == (6, 21)  # region 7 is lacking in most people
    rows, columns = np.triu_indices(7, 1)
    for name, lacking in (("p001", 5), ("p002", 6)):
        good = np.delete(np.arange(7), lacking)
        z = np.arctanh(np.corrcoef(series[name][0][:, good].astype(float).T)[np.triu_indices(6, 1)])
        touched = (rows == lacking) | (columns == lacking)
        np.testing.assert_allclose(found[int(name[1:]), touched], z.mean(), atol=1e-6)
        np.testing.assert_allclose(np.sort(found[int(name[1:]), ~touched]), np.sort(z), atol=2e-6)
    assert np.isfinite(connectivity_features(cohort, list(table.index), "Toy", "tangent")).all()


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (lambda run: run[:2], "2 frames: too short"),
        (lambda run: np.full_like(run, np.nan), "no usable region"),
        (lambda run: np.ones_like(run), "no usable region"),
    ],
)
def test_unusable_series_are_named_errors(tmp_path, spoil, match):
    rng = np.random.default_rng(0)
    table = plain_table(5)
    series = {name: [series_of(1.0, rng)] for name in table.index}
    series["p003"] = [spoil(series["p003"][0])]
    cohort = pack_cohort(tmp_path / "cohort", table, series)
    with pytest.raises(InputDatasetError, match=match) as caught:
        connectivity_features(cohort, list(table.index), "Toy", "fisherz")
    assert "p003" in str(caught.value)


def test_runs_are_averaged_per_person(tmp_path):
    rng = np.random.default_rng(0)
    runs = [series_of(1.0, rng), series_of(1.0, rng, frames=50)]
    cohort = pack_cohort(tmp_path / "cohort", plain_table(1), {"p000": runs})
    expected = np.mean([np.arctanh(np.corrcoef(run.astype(float).T)[np.triu_indices(8, 1)]) for run in runs], axis=0)
    np.testing.assert_allclose(connectivity_features(cohort, ["p000"], "Toy", "fisherz")[0], expected, atol=2e-6)


@pytest.mark.parametrize(
    ("column", "values", "target", "left_out"),
    [
        ("age", "labels", "binary", "is the target"),
        ("age", "labels as text", "binary", "is the target"),
        ("age", "values", "continuous", "is the target"),
        ("age", "months", "continuous", "determines"),
        ("age", "threshold", "binary", "determines"),
        ("age", "nothing", "binary", "nobody has a value"),
        ("age", "constant", "binary", "the same value"),
        ("age", "noise", "binary", None),
        ("mean_fd", "threshold", "binary", None),  # motion that tells the classes apart is a confound, and stays
    ],
)
def test_covariates_that_are_the_target_are_left_out(column, values, target, left_out):
    rng = np.random.default_rng(0)
    what = replace(targets()[target], name="label")
    noise = rng.uniform(5, 60, PEOPLE)
    table = plain_table(PEOPLE)
    table[column] = {
        "labels": [what.classes[int(code)] if what.classes else code for code in what.observed],
        "labels as text": [what.classes[int(code)] if what.classes else "" for code in what.observed],
        "values": what.observed,
        "months": what.observed * 12 + rng.normal(scale=0.01, size=PEOPLE),
        "threshold": 18 + 10 * (what.observed - 0.5) + rng.uniform(-4, 4, PEOPLE),
        "nothing": np.full(PEOPLE, np.nan),
        "constant": np.full(PEOPLE, 7.0),
        "noise": noise,
    }[values]
    columns, notes = usable_covariates(what, table, (column, "absent"))
    assert "no such column" in notes[-1]
    if left_out is None:
        assert columns == [column]
    else:
        assert columns == []
        assert left_out in notes[0]


def test_floors_of_a_cohort_are_named_pooled_and_noted(tmp_path):
    cohort = case_cohort(tmp_path / "cohort", people=24, atlases=("One", "Two"))
    target, table = read_target(cohort, "group"), participant_table(cohort)
    floors = make_floors(cohort, target, table, FloorSettings(kinds=("majority", "covariates", "fisherz", "svm")))
    assert floors.pools["Linear, Fisher-z"] == ("Linear, Fisher-z · One", "Linear, Fisher-z · Two")
    assert {"Majority", "Motion, age, sex, site"} <= set(floors.predictors)
    assert set(floors.kernels) == {"One", "Two"}
    assert any("mean_fd" in note and "same value" in note for note in floors.notes)
    index = cohort.index
    lacking = index[~((index["atlas"] == "Two") & (index["participant"] == "p003"))]
    object.__setattr__(cohort, "index", lacking)
    assert shared_atlases(cohort, target.participants) == (["One"], ["Two"])
    assert any("leave out Two" in note for note in make_floors(cohort, target, table, FloorSettings(kinds=("fisherz",))).notes)
    object.__setattr__(cohort, "index", lacking[lacking["participant"] != "p005"])
    with pytest.raises(InputDatasetError, match="no atlas has series of all"):
        shared_atlases(cohort, target.participants)


def test_sites_coded_as_numbers_are_names():
    """The middle one of three sites has all the cases: no line through the site's number can say so."""
    table = plain_table(PEOPLE, site=np.tile([1, 2, 3, 2], PEOPLE // 4))
    target = binary_target((table["site"] == 2).astype(int).tolist())
    floor = CovariateFloor(table=typed(table[["site"]]), penalties=(10.0,))(fold_of(target), target.participants[TRAIN:])
    np.testing.assert_array_equal(floor.test.argmax(1), target.observed[TRAIN:])
