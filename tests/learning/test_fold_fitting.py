"""Everything fitted in the fold: whole evaluations against scikit-learn by hand, and a probe that finds what looks at test people."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from sklearn.base import BaseEstimator, TransformerMixin
from sklearn.compose import ColumnTransformer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score, cohen_kappa_score, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import OneHotEncoder, StandardScaler

from brainfm_cli.learning.evaluation import Context, EvaluationSettings, evaluate
from brainfm_cli.learning.floors import CovariateFloor, LinearFloor, majority
from brainfm_cli.learning.forecasts import Forecast, TrainingFold
from brainfm_cli.learning.kernels import Kernel, StandardisedEdges
from brainfm_cli.learning.machines import KernelRidgeFloor, SupportVectorFloor
from brainfm_cli.learning.regions import RegionFloor
from brainfm_cli.learning.splits import DesignSettings, inner_folds, make_split
from tests.learning.cohorts import binary_target, continuous_target, multiclass_target, names_of, plain_table

PEOPLE, TRAIN = 60, 42
QUICK = EvaluationSettings(bootstraps=100, permutations=99, inner_folds=4, interval="percentile")
PENALTIES = (0.01, 1.0, 100.0)


class Norm(BaseEstimator, TransformerMixin):
    """Centred on, and scaled to a mean squared norm of 1 by, the people it is fitted on."""

    def fit(self, X, y=None):
        self.centre_ = X.mean(0)
        self.scale_ = np.sqrt(np.mean(np.sum((X - self.centre_) ** 2, axis=1)))
        return self

    def transform(self, X):
        return (X - self.centre_) / self.scale_


def data(kind, seed=0):
    rng = np.random.default_rng(seed)
    features = rng.normal(3, 2, size=(PEOPLE, 150))
    target = binary_target(rng.permutation([0, 1, 1] * 20)) if kind == "binary" else continuous_target(rng.normal(20, 5, PEOPLE))
    features[:, :4] += 0.3 * target.observed[:, None]
    return features, target


def kernel_of(features):
    return Kernel(participants=tuple(names_of(len(features))), matrix=features @ features.T)


def seen_folds(target, split, settings):
    """The training folds that the evaluation hands to predictors."""
    found = []

    def watching(fold, test):
        found.append((fold, test))
        return majority(fold, test)

    evaluate(target, split, {"Watching": watching}, Context(table=plain_table(PEOPLE)), settings)
    return found


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_standardised_edges_are_those_of_a_scaler_fitted_on_training_people(kind):
    features, target = data(kind)
    features[:, 10] = 4.0  # the same in everybody
    features[:, 11] *= 50
    edges = StandardisedEdges(participants=tuple(names_of(PEOPLE)), features=features.astype(np.float32))
    names = names_of(PEOPLE)
    inside, outside = edges.coordinates(names[:TRAIN], names[TRAIN:])
    scaler = StandardScaler().fit(features[:TRAIN])
    scaled, others = scaler.transform(features[:TRAIN]), scaler.transform(features[TRAIN:])
    size = np.mean(np.sum(scaled**2, axis=1))
    np.testing.assert_allclose(inside @ inside.T, scaled @ scaled.T / size, atol=1e-5)
    np.testing.assert_allclose(outside @ inside.T, others @ scaled.T / size, atol=1e-5)
    fold, test = seen_folds(target, make_split(target, plain_table(PEOPLE), DesignSettings(folds=3)), QUICK)[0]
    found = LinearFloor(kernel=edges, penalties=(1.0,))(fold, test).test
    rows, outside_rows = [names.index(name) for name in fold.target.participants], [names.index(name) for name in test]
    model = make_pipeline(StandardScaler(), Norm(), LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-12) if kind == "binary" else Ridge(alpha=1.0))  # fmt: skip
    fitted = model.fit(features[rows], target.observed[rows])
    expected = getattr(fitted, "predict_proba" if kind == "binary" else "predict")(features[outside_rows])
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["binary", "continuous"])
def test_an_evaluation_of_the_linear_floor_is_a_nested_pipeline_of_sklearn(kind):
    """Ten outer folds, penalty by four inner folds, scaler refitted everywhere: pooled predictions agree to 1e-10."""
    features, target = data(kind)
    table = plain_table(PEOPLE)
    split = make_split(target, table, DesignSettings(folds=5, repeats=2))
    floor = LinearFloor(kernel=kernel_of(features), penalties=PENALTIES)
    result = evaluate(target, split, {"Linear": floor}, Context(table=table), QUICK)
    place = {name: row for row, name in enumerate(target.participants)}
    observed = target.observed

    def model(penalty):
        fit = LogisticRegression(C=penalty, solver="newton-cholesky", tol=1e-12, max_iter=500) if kind == "binary" else Ridge(alpha=1 / penalty)  # fmt: skip
        return make_pipeline(Norm(), fit)

    expected = np.full(result.pooled["Linear"].predicted.shape, np.nan)
    decided = np.zeros(expected.shape[:2], int)
    chosen = set()
    for fold, test in seen_folds(target, split, QUICK):
        rows, others = [place[name] for name in fold.target.participants], [place[name] for name in test]
        inside = {penalty: np.full((len(rows), *expected.shape[2:]), np.nan) for penalty in PENALTIES}
        for penalty, (train, validation) in ((penalty, pair) for penalty in PENALTIES for pair in fold.inner):
            fitted = model(penalty).fit(features[rows][train], observed[rows][train])
            inside[penalty][validation] = getattr(fitted, "predict_proba" if kind == "binary" else "predict")(features[rows][validation])
        losses = {penalty: -roc_auc_score(observed[rows], p[:, 1]) if kind == "binary" else np.mean((p - observed[rows]) ** 2) for penalty, p in inside.items()}  # fmt: skip
        best = min(PENALTIES, key=losses.__getitem__)
        chosen.add(best)
        fitted = model(best).fit(features[rows], observed[rows])
        expected[fold.repeat - 1, others] = getattr(fitted, "predict_proba" if kind == "binary" else "predict")(features[others])
        if kind == "binary":
            threshold = result.pooled["Linear"].thresholds[(fold.repeat - 1) * 5 + fold.fold - 1]
            # just above: the floor's inner fits stop at 1e-6, so that its threshold may fall short of the exact largest probability
            cuts = (threshold, threshold + 1e-5, *inside[best][:, 1])
            worth = [balanced_accuracy_score(observed[rows], inside[best][:, 1] >= cut) for cut in cuts]
            assert max(worth[:2]) == max(worth)
            decided[fold.repeat - 1, others] = expected[fold.repeat - 1, others, 1] >= threshold
    np.testing.assert_allclose(result.pooled["Linear"].predicted, expected, rtol=1e-10, atol=1e-10)
    assert set(result.metrics.of("Linear").choices["C"]) == chosen
    if kind == "binary":
        np.testing.assert_array_equal(result.pooled["Linear"].decided, decided)
        area = np.mean([roc_auc_score(observed, row[:, 1]) for row in expected])
        assert result.metrics.of("Linear").scores["auroc"].value == pytest.approx(area, abs=1e-12)


def test_an_evaluation_of_covariates_is_a_pipeline_of_sklearn():
    """Imputation, missingness, scaling, site coding and model, refitted in each of ten folds."""
    rng = np.random.default_rng(1)
    target = binary_target(rng.permutation([0, 1] * 30))
    table = plain_table(PEOPLE, age=rng.uniform(8, 60, PEOPLE) + 5 * target.observed, site=rng.choice(["A", "B", "C"], PEOPLE))
    table.loc[rng.choice(table.index, 9, replace=False), "age"] = np.nan
    split = make_split(target, table, DesignSettings(folds=5, repeats=2))
    floor = CovariateFloor(table=table[["age", "site"]], penalties=(1.0,))
    found = evaluate(target, split, {"Covariates": floor}, Context(table=table), QUICK).pooled["Covariates"].predicted
    number = make_pipeline(SimpleImputer(strategy="median", add_indicator=True), StandardScaler())
    columns = ColumnTransformer([("n", number, ["age"]), ("t", OneHotEncoder(handle_unknown="ignore"), ["site"])], sparse_threshold=0)
    pipeline = make_pipeline(columns, LogisticRegression(C=1.0, solver="newton-cholesky", tol=1e-12))
    for fold in split.folds():
        fitted = pipeline.fit(table.loc[list(fold.train), ["age", "site"]], target.observed[target.rows(fold.train)])
        expected = fitted.predict_proba(table.loc[list(fold.test), ["age", "site"]])
        np.testing.assert_allclose(found[fold.repeat - 1, target.rows(fold.test)], expected, rtol=1e-10, atol=1e-10)


def peeks(make, features, target):
    """What ``make(features, target)`` takes from test people: their data or their labels; none where nothing.

    A predictor is made and fitted twice: once on everything as it is, once with the data (then the labels) of all test
    people but one changed grossly. Whatever differs on training people, or for the one who was left alone, was learnt from test people.
    """
    training = target.keep(target.participants[:TRAIN])
    fold = TrainingFold(target=training, inner=inner_folds(training, groups={}, folds=3, seed=0), repeat=1, fold=1, seed=0)
    test = target.participants[TRAIN:]
    spoilt, observed = features.copy(), target.observed.copy()
    spoilt[TRAIN + 1 :] = 5 * spoilt[TRAIN + 1 :][:, ::-1] + 40
    observed[TRAIN:] = np.roll(np.sort(observed[TRAIN:]), 7) if target.kind == "continuous" else 1 - observed[TRAIN:]
    plain = make(features, target)(fold, test)
    for what, changed in (("data", make(spoilt, target)), ("labels", make(features, replace(target, observed=observed)))):
        other = changed(fold, test)
        same = plain.train is None or np.allclose(plain.train, other.train, rtol=0, atol=1e-7, equal_nan=True)
        if not same or not np.allclose(plain.test[0], other.test[0], rtol=0, atol=1e-7):
            return what
    return None


def table_of(features):
    return plain_table(len(features), age=features[:, 0], mean_fd=np.abs(features[:, 1]))[["age", "mean_fd"]]


def regions_of(features, components):
    return RegionFloor(participants=tuple(names_of(PEOPLE)), features=features, components=components, penalties=PENALTIES)


def scaled_on_everybody(features, _):
    return LinearFloor(kernel=kernel_of(StandardScaler().fit_transform(features)), penalties=PENALTIES)


def scaled_on_training_and_test(features, target):
    """The scaler sees the test people of the call, not their labels."""
    place = {name: row for row, name in enumerate(target.participants)}

    def predict(fold, test):
        rows, others = features[[place[name] for name in fold.target.participants]], features[[place[name] for name in test]]
        scaler = StandardScaler().fit(np.vstack([rows, others]))
        fitted = LogisticRegression().fit(scaler.transform(rows), fold.labels)
        return Forecast(test=fitted.predict_proba(scaler.transform(others)))

    return predict


def imputed_from_everybody(features, _):
    """The mean of a column over everybody stands for a person's missing value."""
    filled = features.copy()
    filled[::5, 2] = features[:, 2].mean()
    return LinearFloor(kernel=kernel_of(filled), penalties=PENALTIES)


def selected_by_all_labels(features, target):
    gap = np.abs(np.corrcoef(features.T, target.observed)[-1, :-1])
    return LinearFloor(kernel=kernel_of(features[:, np.argsort(-gap)[:10]]), penalties=PENALTIES)


LEAKS = {
    "scaler of everybody": scaled_on_everybody,
    "scaler of training and test people": scaled_on_training_and_test,
    "imputation from everybody": imputed_from_everybody,
    "selection by everybody's labels": selected_by_all_labels,
}
FLOORS = {
    "linear": lambda features, _: LinearFloor(kernel=kernel_of(features), penalties=PENALTIES),
    "support vectors": lambda features, _: SupportVectorFloor(kernel=kernel_of(features)),
    "kernel ridge": lambda features, _: KernelRidgeFloor(kernel=kernel_of(features)),
    "region means": lambda features, _: regions_of(features, None),
    "components of region SD": lambda features, _: regions_of(features, 5),
    "covariates": lambda features, _: CovariateFloor(table=table_of(features), penalties=PENALTIES),
    "majority": lambda *_: majority,
}


@pytest.mark.parametrize("kind", ["binary", "continuous"])
@pytest.mark.parametrize("name", FLOORS)
def test_no_floor_takes_anything_from_test_people(name, kind):
    features, target = data(kind)
    assert peeks(FLOORS[name], features, target) is None


def test_the_probe_finds_labels_where_data_are_left_alone():
    features, target = data("binary")

    def by_labels(_, given):
        gap = np.abs(np.corrcoef(features.T, given.observed)[-1, :-1])
        return LinearFloor(kernel=kernel_of(features[:, np.argsort(-gap)[:10]]), penalties=PENALTIES)

    assert peeks(by_labels, features, target) == "labels"


def test_classes_of_a_rare_kind_are_scored_in_the_order_of_the_target():
    """A multiclass evaluation with the ordered classes' κ, by hand from the pooled decisions."""
    rng = np.random.default_rng(4)
    target = replace(multiclass_target(list(rng.permutation(np.arange(PEOPLE) % 4))), ordered=True)
    features = rng.normal(size=(PEOPLE, 20)) + 0.8 * target.observed[:, None]
    split = make_split(target, plain_table(PEOPLE), DesignSettings(folds=5, repeats=2))
    result = evaluate(target, split, {"Linear": LinearFloor(kernel=kernel_of(features), penalties=(10.0,))}, Context(table=plain_table(PEOPLE)), QUICK)  # fmt: skip
    found = result.metrics.of("Linear").scores["quadratic_kappa"]
    by_hand = [cohen_kappa_score(target.observed, row, weights="quadratic") for row in result.pooled["Linear"].decided]
    assert found.value == pytest.approx(np.mean(by_hand), abs=1e-12)
    assert found.low < found.value < found.high
    plain = evaluate(replace(target, ordered=False), split, {"Majority": majority}, Context(table=plain_table(PEOPLE)), QUICK)
    assert "quadratic_kappa" not in plain.metrics.of("Majority").scores
