"""An evaluation from cohort to files and back: pooled predictions, scores, differences, groups, schema."""

from __future__ import annotations

import json
import types
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import mean_absolute_error, roc_auc_score

from brainfm_cli.errors import InputDatasetError, InputNotFoundError, InternalError, SettingsError
from brainfm_cli.learning.evaluation import Context, EvaluationSettings, evaluate
from brainfm_cli.learning.floors import FloorSettings, LinearFloor, majority, make_floors
from brainfm_cli.learning.forecasts import Forecast
from brainfm_cli.learning.results import EvaluationResult, Metrics, Truth
from brainfm_cli.learning.scores import PRIMARY
from brainfm_cli.learning.splits import DesignSettings, fixed_split, make_split
from brainfm_cli.learning.targets import TargetSettings, participant_table, read_target
from tests.learning.cohorts import binary_target, case_cohort, continuous_target, multiclass_target, names_of, plain_table

QUICK = EvaluationSettings(bootstraps=200, permutations=99, inner_folds=3)
MODEL = "Model"


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return case_cohort(tmp_path_factory.mktemp("toy") / "cohort", people=60, effect=1.2, atlases=("One", "Two"))


def run(cohort, column, settings=QUICK, design=None, kinds=("fisherz",), **context):
    target = read_target(cohort, column, TargetSettings())
    table = participant_table(cohort)
    floors = make_floors(cohort, target, table, FloorSettings(kinds=kinds, penalties=(1.0, 100.0)))
    predictors = {**floors.predictors, MODEL: LinearFloor(kernel=floors.kernels["One"], penalties=(10.0,))}
    split = make_split(target, table, design or DesignSettings(folds=3, repeats=2))
    return evaluate(target, split, predictors, Context(table=table, models=(MODEL,), pools=floors.pools, kernels=floors.kernels, notes=floors.notes, **context), settings)  # fmt: skip


@pytest.fixture(scope="module", params=["group", "site", "age"])
def result(request, cohort):
    return run(cohort, request.param, kinds=("majority", "covariates", "fisherz", "tangent", "svm"))


def test_scores_are_those_of_the_pooled_predictions(result):
    metrics = result.metrics
    for name, pooled in result.pooled.items():
        found = metrics.of(name).scores
        if metrics.kind == "continuous":
            expected = np.mean([mean_absolute_error(result.observed, row) for row in pooled.predicted])
            assert found["mae"].value == pytest.approx(expected)
        else:
            onehot = np.eye(len(metrics.classes))[result.observed.astype(int)]
            expected = np.mean([roc_auc_score(onehot, row, average="macro") for row in pooled.predicted])
            assert found["auroc"].value == pytest.approx(expected)
        primary = found[PRIMARY[metrics.kind]]
        assert primary.low <= primary.value <= primary.high
        assert np.isfinite(pooled.predicted).all()


def test_pools_are_means_of_their_members(result):
    pools = [one for one in result.metrics.predictors if one.pooled_from]
    assert {one.name for one in pools} == {"Linear, Fisher-z", "Linear, tangent", "Linear SVM, Fisher-z"}
    for pool in pools:
        members = [result.pooled[name].predicted for name in pool.pooled_from]
        np.testing.assert_allclose(result.pooled[pool.name].predicted, np.mean(members, axis=0))


def test_the_model_is_compared_with_every_floor(result):
    metrics = result.metrics
    assert metrics.predictors[0].name == MODEL
    floors = [one.name for one in metrics.predictors if one.role == "floor"]
    assert [item.second for item in metrics.differences] == floors
    for item in metrics.differences:
        values = [metrics.of(name).scores[item.metric].value for name in (MODEL, item.second)]
        assert item.value == pytest.approx(values[0] - values[1])
        assert item.low <= item.value <= item.high
        assert (item.delong_p is not None) == (metrics.kind == "binary")


def test_everybody_is_once_in_every_breakdown(result):
    for column in {item.column for item in result.metrics.groups}:
        one = [item for item in result.metrics.groups if item.column == column and item.predictor == MODEL]
        assert sum(item.people for item in one) == result.metrics.people
        if result.metrics.classes:
            assert sum(sum(item.counts.values()) for item in one) == result.metrics.people
    assert result.metrics.target not in {item.column for item in result.metrics.groups}


def same(one, other):
    assert one.metrics == other.metrics
    pd.testing.assert_frame_equal(one.split.table, other.split.table)
    assert one.people == other.people
    np.testing.assert_array_equal(one.observed, other.observed)
    np.testing.assert_array_equal(one.fold_of, other.fold_of)
    assert list(one.pooled) == list(other.pooled)
    for name, pooled in one.pooled.items():
        np.testing.assert_array_equal(pooled.predicted, other.pooled[name].predicted)
        np.testing.assert_array_equal(pooled.decided, other.pooled[name].decided)


def test_files_come_back_as_they_were(result, tmp_path):
    paths = result.write(tmp_path)
    assert all(path.is_file() for path in paths)
    same(EvaluationResult.read(tmp_path), result)
    before = {path: path.read_bytes() for path in paths}
    EvaluationResult.read(tmp_path).write(tmp_path)
    assert {path: path.read_bytes() for path in paths} == before


def test_the_phenotype_table_is_described(result, tmp_path):
    result.write(tmp_path)
    (path,) = (tmp_path / "phenotype").glob("*.tsv")
    table = pd.read_csv(path, sep="\t", dtype={"participant_id": str})
    described = json.loads(path.with_suffix(".json").read_text())
    assert set(table.columns) <= {"participant_id", *described}
    assert table["participant_id"].tolist() == [f"sub-{name}" for name in result.people]
    if result.metrics.kind == "binary":
        np.testing.assert_allclose(table["model_control"], result.pooled[MODEL].predicted.mean(0)[:, 1], atol=1e-5)


def check(schema, value, root, where="metrics"):
    """As much of JSON Schema as pydantic writes."""
    if "$ref" in schema:
        return check(root["$defs"][schema["$ref"].split("/")[-1]], value, root, where)
    if "anyOf" in schema:
        problems = []
        for one in schema["anyOf"]:
            try:
                return check(one, value, root, where)
            except AssertionError as error:
                problems.append(error)
        raise AssertionError(f"{where}: {problems}")
    if "enum" in schema:
        assert value in schema["enum"], where
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": int | float, "boolean": bool, "null": types.NoneType}
    assert isinstance(value, kinds[schema["type"]]), f"{where} is no {schema['type']}"
    if isinstance(value, dict):
        known = schema.get("properties", {})
        assert set(schema.get("required", ())) <= set(value), where
        for key, one in value.items():
            inner = known.get(key) or schema.get("additionalProperties")
            assert inner, f"{where}.{key} is not in the schema"
            if inner is not True:
                check(inner, one, root, f"{where}.{key}")
    if isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, one in enumerate(value):
            check(schema["items"], one, root, f"{where}[{index}]")
    return None


def test_metrics_obey_their_schema(result, tmp_path):
    result.write(tmp_path)
    schema = json.loads((tmp_path / "logs" / "metrics.schema.json").read_text())
    values = json.loads((tmp_path / "metrics.json").read_text())
    check(schema, values, schema)
    for spoil in ({"people": "sixty"}, {"kind": "ordinal"}, {"invented": 1}):
        with pytest.raises(AssertionError):
            check(schema, {**values, **spoil}, schema)
    del values["statement"]
    with pytest.raises(AssertionError):
        check(schema, values, schema)


def test_equal_seeds_give_equal_bytes_and_other_seeds_do_not(cohort, tmp_path):
    first, second = run(cohort, "group"), run(cohort, "group")
    same(first, second)
    other = run(cohort, "group", replace_seed(QUICK, 5))
    assert other.metrics != first.metrics


def replace_seed(settings, seed):
    return settings.model_copy(update={"seed": seed})


def test_damaged_files_are_named_errors(cohort, tmp_path):
    with pytest.raises(InputNotFoundError, match="no evaluation here"):
        EvaluationResult.read(tmp_path)
    result = run(cohort, "group")
    result.write(tmp_path)
    text = (tmp_path / "metrics.json").read_text()
    (tmp_path / "metrics.json").write_text(text[:200])
    with pytest.raises(InputDatasetError, match="unreadable"):
        EvaluationResult.read(tmp_path)
    (tmp_path / "metrics.json").write_text(text.replace(result.split.digest(), "0" * 64))
    with pytest.raises(InputDatasetError, match=r"another split\.tsv"):
        EvaluationResult.read(tmp_path)
    (tmp_path / "metrics.json").write_text(text)
    predictions = (tmp_path / "predictions.tsv").read_text().splitlines()
    (tmp_path / "predictions.tsv").write_text("\n".join(predictions[:-3]) + "\n")
    with pytest.raises(InputDatasetError, match="for everybody"):
        EvaluationResult.read(tmp_path)


def test_leave_one_site_out_pools_every_site(cohort):
    result = run(cohort, "group", design=DesignSettings(kind="leave-one-site-out"))
    assert "every site left out once" in result.metrics.design
    assert "sites like these that the model has not seen" in result.metrics.statement
    sites = participant_table(cohort)["site"]
    for name, fold in zip(result.people, result.fold_of[0], strict=True):
        assert fold == sorted(set(sites)).index(sites[name]) + 1


def test_a_fixed_split_has_no_caveat_and_truth_is_kept(cohort):
    result = run(cohort, "group", design=DesignSettings(kind="fixed", test_where={"site": ("A",)}), truth=Truth(bayes_optimal=0.9))
    assert result.metrics.interval_caveat is None
    assert not result.metrics.cross_validated
    assert result.metrics.truth.bayes_optimal == 0.9
    assert result.metrics.people == int((participant_table(cohort)["site"] == "A").sum())


@pytest.mark.parametrize(
    ("forecast", "match"),
    [
        (np.full((3, 2), 0.5), "shape"),
        (np.full((10, 2), np.nan), "not finite"),
        (np.full((10, 2), 0.4), "do not sum to 1"),
        (np.tile([1.5, -0.5], (10, 1)), "negative"),
    ],
)
def test_a_predictor_that_breaks_the_protocol_is_named(forecast, match):
    target = binary_target([0, 1] * 10)
    split = fixed_split(target, train=names_of(10), test=names_of(20)[10:], why="by hand")
    with pytest.raises(InternalError, match=f"predictor 'Bad' .*{match}"):
        evaluate(target, split, {"Bad": lambda fold, test: Forecast(test=forecast)}, Context(table=plain_table(20)), QUICK)


@pytest.mark.parametrize(
    ("predictors", "context", "match"),
    [
        ({}, {}, "nothing to evaluate"),
        ({"A": majority}, {"pools": {"A": ("A",)}}, "a predictor and a pool"),
        ({"A": majority}, {"pools": {"P": ("B",)}}, "no predictor is called 'B'"),
        ({"A": majority}, {"models": ("M",)}, "no predictor is called 'M'"),
    ],
)
def test_names_must_fit_together(predictors, context, match):
    target = binary_target([0, 1] * 10)
    split = fixed_split(target, train=names_of(10), test=names_of(20)[10:], why="by hand")
    with pytest.raises(SettingsError, match=match):
        evaluate(target, split, predictors, Context(table=plain_table(20), **context), QUICK)


def test_groups_with_one_class_say_so_and_ages_are_banded():
    table = plain_table(40, age=[5.0, 30.0] * 20, sex=["F"] * 39 + [None])
    target = binary_target([0, 1] * 20)
    metrics = evaluate(
        target, make_split(target, table, DesignSettings(folds=2)), {"Majority": majority}, Context(table=table), QUICK
    ).metrics
    bands = {item.level: item for item in metrics.groups if item.column == "age"}
    assert list(bands) == ["under 6", "18 to 40"]
    assert bands["under 6"].scores["auroc"].reason == "one class only among these people"
    assert {item.level: item.people for item in metrics.groups if item.column == "sex"} == {"F": 39, "unknown": 1}


def guessing(value):
    return lambda fold, test: Forecast(test=np.array([value(name) for name in test]))


def test_statements_follow_the_numbers():
    rng = np.random.default_rng(0)
    target, table = binary_target([0, 1] * 40), plain_table(80)
    label = dict(zip(target.participants, target.observed, strict=True))
    split = make_split(target, table, DesignSettings(folds=2))

    def noisy(scale):
        p = {name: float(np.clip(0.5 + scale * (code - 0.5) + rng.normal(scale=0.2), 0, 1)) for name, code in label.items()}
        return guessing(lambda name: [1 - p[name], p[name]])

    def told(model, floor):
        return evaluate(target, split, {MODEL: noisy(model), "Floor": noisy(floor)}, Context(table=table, models=(MODEL,)), QUICK).metrics.statement  # fmt: skip

    assert "the model adds to it" in told(0.8, 0.0)
    assert "the model is worse than it" in told(0.1, 0.9)
    assert "do not show that the model adds anything" in told(0.5, 0.5)
    assert "not distinguishable from chance" in told(0.0, 0.0)
    alone = evaluate(target, split, {MODEL: noisy(0.5)}, Context(table=table, models=(MODEL,)), QUICK).metrics.statement
    assert "nothing can be said about what the model adds" in alone
    values = continuous_target(rng.normal(size=80))
    known = dict(zip(values.participants, values.observed, strict=True))
    weak = guessing(lambda name: 5 + 0.5 * known[name])  # goes along with the target, but is worse than its mean
    text = evaluate(values, make_split(values, table, DesignSettings(folds=2)), {MODEL: weak}, Context(table=table, models=(MODEL,)), QUICK).metrics.statement  # fmt: skip
    assert "go along with 'age'" in text
    assert "better than chance" not in text


def test_a_test_set_without_a_class_is_scored_where_it_can_be():
    target = multiclass_target([0, 1, 2] * 8)
    chosen = [name for name, code in zip(target.participants, target.observed, strict=True) if code < 2][-8:]
    split = fixed_split(target, train=[name for name in target.participants if name not in chosen], test=chosen, why="by hand")
    result = evaluate(target, split, {"Majority": majority}, Context(table=plain_table(24)), QUICK)
    assert result.metrics.of("Majority").scores["auroc"].value is None
    assert result.metrics.of("Majority").permutation_p is None
    assert "allow no statement" in result.metrics.statement
    assert Metrics.model_validate_json(result.metrics.model_dump_json()) == result.metrics


def test_a_shuffled_target_is_not_predicted(cohort):
    target = read_target(cohort, "group")
    shuffled = replace(target, observed=np.random.default_rng(0).permutation(target.observed))
    table = participant_table(cohort)
    floors = make_floors(cohort, target, table, FloorSettings(kinds=("fisherz",)))
    found = [
        evaluate(one, make_split(one, table, DesignSettings()), floors.predictors, Context(table=table), QUICK).metrics.predictors[0]
        for one in (target, shuffled)
    ]
    assert found[0].scores["auroc"].value > 0.85
    assert found[0].permutation_p == 0.01
    assert abs(found[1].scores["auroc"].value - 0.5) < 0.2
    assert found[1].permutation_p > 0.01


def test_permutation_through_the_pipeline_is_a_refit_on_permuted_people(cohort):
    target, table = read_target(cohort, "group"), participant_table(cohort)
    kernel = make_floors(cohort, target, table, FloorSettings(kinds=("fisherz",))).kernels["One"]
    floor = LinearFloor(kernel=kernel, penalties=(10.0,))
    split = make_split(target, table, DesignSettings(folds=3, group="family"))
    seen = []

    def watching(fold, test):
        seen.append((fold.repeat, fold.fold, tuple(fold.target.observed), fold.target.participants, tuple(test)))
        return floor(fold, test)

    settings = QUICK.model_copy(update={"refit_permutations": 19})
    metrics = evaluate(target, split, {"Linear": watching}, Context(table=table), settings).metrics
    assert metrics.of("Linear").refit_p == 0.05  # the effect is large: none of 19 reaches it
    assert len(seen) == 3 * (1 + 1 + 19)
    real, permuted = seen[:3], seen[6:]
    assert [one[:3] for one in permuted] == [one[:3] for one in real] * 19  # labels and folds stay
    site = table["site"]
    for place, one in enumerate(permuted):
        assert one[3:] != real[place % 3][3:]
        assert [site[name] for name in one[3] + one[4]] == [site[name] for name in real[place % 3][3] + real[place % 3][4]]
        assert not set(one[3]) & set(one[4])
    assert evaluate(target, split, {"Linear": floor}, Context(table=table), QUICK).metrics.of("Linear").refit_p is None
