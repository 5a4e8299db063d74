"""The page of an evaluation: everything is on it, hostile names stay text, the same result gives the same bytes."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from brainfm_cli.learning.evaluation import Context, EvaluationSettings, evaluate
from brainfm_cli.learning.floors import majority
from brainfm_cli.learning.forecasts import Forecast
from brainfm_cli.learning.results import EvaluationResult, Truth
from brainfm_cli.learning.splits import DesignSettings, make_split, participant_hash
from brainfm_cli.reports.evaluation import evaluation_page, leaders
from brainfm_cli.reports.evaluation_figures import confusion_counts
from tests.learning.cohorts import binary_target, continuous_target, multiclass_target, plain_table
from tests.reports.pages import parse

HOSTILE = "<script>alert(1)</script> $\\frac{ _x"
PEOPLE = 60
SECTIONS = {
    "binary": ["ROC and precision-recall", "Calibration", "Decision curve", "Confusion"],
    "multiclass": ["ROC and precision-recall", "Calibration", "Confusion"],
    "continuous": ["Predicted and observed"],
}


def evaluated(kind, *, models=(HOSTILE,), transductive=False, repeats=2):
    rng = np.random.default_rng(1)
    target = {
        "binary": binary_target([0, 1] * (PEOPLE // 2)),
        "multiclass": multiclass_target([0, 1, 2] * (PEOPLE // 3)),
        "continuous": continuous_target(rng.normal(30, 8, PEOPLE)),
    }[kind]
    known = dict(zip(target.participants, target.observed, strict=True))

    def noisy(strength):
        def predict(fold, test):
            if kind == "continuous":
                return Forecast(test=np.array([30 + strength * (known[name] - 30) + rng.normal() for name in test]))
            classes = len(target.classes)
            logits = np.array([strength * np.eye(classes)[int(known[name])] + rng.normal(size=classes) for name in test])
            p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            inside = np.random.default_rng(0).dirichlet(np.ones(classes), len(fold.target.participants))
            return Forecast(test=p, train=inside, choices={"C": 1.0})

        return predict

    table = plain_table(
        PEOPLE, site=["<b>A</b>", "B"] * (PEOPLE // 2), sex=["F", "F", "M"] * (PEOPLE // 3), age=list(np.linspace(5, 70, PEOPLE))
    )
    if kind == "continuous":
        table = table.drop(columns="age")
    seen = {participant_hash("toy", "p003")} if transductive else set()
    context = Context(
        table=table,
        models=models,
        pools={"Both": ("Part & 1", "Part & 2")},
        pretrained=seen,
        transductive=transductive,
        truth=Truth(bayes_optimal=0.93, attainable=0.9),
        notes=("a note & more",),
    )
    predictors = {"Majority": majority, "Part & 1": noisy(0.4), "Part & 2": noisy(0.6), HOSTILE: noisy(1.2)}
    split = make_split(target, table, DesignSettings(folds=3, repeats=repeats))
    return evaluate(target, split, predictors, context, EvaluationSettings(bootstraps=100, permutations=99, inner_folds=2))


def page(result, **more):
    return evaluation_page(
        result, title=f"Prediction of {HOSTILE}", subtitle="sub", facts={"Target": HOSTILE}, notes=("look here",), **more
    ).render()


@pytest.fixture(scope="module", params=["binary", "multiclass", "continuous"])
def result(request):
    return evaluated(request.param)


def test_everything_is_on_the_page(result):
    kind = result.metrics.kind
    found = parse(page(result))
    expected = ["What the numbers say", "All scores", "Model against floors", *SECTIONS[kind], "By site, sex and age", "Who was where", "Audit", "Choices in each fold", "Notes"]  # fmt: skip
    if kind == "continuous":
        expected.remove("Choices in each fold")
    assert [text for text in found.headings if text in expected] == expected
    for text in ("look here", "a note & more", result.metrics.statement, result.metrics.split_sha256, "attainable", "<b>A</b>"):
        assert text in found.text
    for one in result.metrics.predictors:
        assert f"{one.name} {one.scores[result.metrics.primary]}" in found.alts[0]
    for item in result.metrics.audit:
        assert item.text in found.text
    assert found.text.count(result.metrics.interval_caveat) == 2  # under the picture of intervals, and under their table
    assert "was measured to cover" in result.metrics.interval_caveat
    assert "docs/results.md" in result.metrics.interval_caveat
    # of the two classes each is one site here, so that there is no p to be wary of
    assert (result.metrics.permutation_caveat in found.text) == (kind != "binary")
    assert f"{result.metrics.differences[0].detectable:.3f}" in found.text
    curves = {"binary": 4, "multiclass": 7, "continuous": 1}[kind]  # ROC and calibration per class, decision curve, confusion
    assert found.pictures == 1 + curves
    assert found.external == []
    assert "script" not in found.tags
    assert "TRANSDUCTIVE" not in found.text


def test_the_same_result_gives_the_same_bytes_also_when_read_again(result, tmp_path):
    result.write(tmp_path)
    assert page(result) == page(EvaluationResult.read(tmp_path))


def test_a_transductive_result_says_so_on_top():
    text = parse(page(evaluated("binary", transductive=True, repeats=1))).text
    assert text.index("TRANSDUCTIVE: 1 of 60 test people") < text.index("What the numbers say")


def test_floors_alone_make_a_page():
    result = evaluated("binary", models=(), repeats=1)
    found = parse(page(result))
    assert "Model against floors" not in found.headings
    assert leaders(result.metrics) == [HOSTILE, "Both"]


def test_confusion_counts_people_once(result):
    if result.metrics.kind == "continuous":
        pytest.skip("no classes")
    counts = confusion_counts(result, HOSTILE)
    assert counts.sum() == pytest.approx(PEOPLE)
    np.testing.assert_allclose(counts.sum(1), list(result.metrics.counts.values()))
    right = result.metrics.of(HOSTILE).scores["accuracy"].value
    assert np.trace(counts) / PEOPLE == pytest.approx(right)


def test_importing_the_page_imports_neither_torch_nor_matplotlib():
    code = (
        "import sys, brainfm_cli.reports.evaluation; assert not {'torch', 'matplotlib', 'nilearn'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
