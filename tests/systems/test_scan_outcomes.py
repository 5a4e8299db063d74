"""Grades and survival on the MRI encoder: what images add to clinical variables, what is trained of the encoder, and what is read back."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch

from brainfm_cli.bids.slice_cohort import SliceCohort
from brainfm_cli.config import Execution
from brainfm_cli.learning.checkpoints import write_tensors
from brainfm_cli.learning.loop import OptimiserSettings, ScheduleSettings
from brainfm_cli.learning.outcome_scores import at_time, median_class, score_classes, score_survival
from brainfm_cli.learning.scan_tuning import TuningPeople, divide_for_tuning
from brainfm_cli.learning.survival import Outcome, weighted_uno
from brainfm_cli.models.lora import LowRank, add_low_rank
from brainfm_cli.models.rivals import SliceNetwork
from brainfm_cli.systems.mri_language import MriLanguage, MriLanguageSettings
from brainfm_cli.systems.mri_language.adaptation import ADAPTED_FILE, AdaptationSettings, adapted_tensors, load_adapted
from brainfm_cli.systems.mri_language.classification import encode_studies, study_scores
from brainfm_cli.systems.mri_language.comparison import (
    CLINICAL,
    FROZEN,
    JOINED,
    NETWORK,
    NUMBERS,
    TWIN,
    ScanFloors,
    compare_studies,
    score_answers,
)
from brainfm_cli.systems.mri_language.image_numbers import NUMBERS as NAMES
from brainfm_cli.systems.mri_language.image_numbers import image_numbers, standardised
from brainfm_cli.systems.mri_language.outcomes import StudyTask, fit_linear_answer, marginal_answer, risk_of
from brainfm_cli.systems.mri_language.tuning import encoder_hash
from tests.learning.slice_cohorts import write_slice_cohort

CPU = Execution(device="cpu", precision="32-true")
SHORT = ScheduleSettings(epochs=25, batch_size=16, patience=25, optimiser=OptimiserSettings(learning_rate=5e-3))
PEOPLE = 90


def system() -> MriLanguage:
    torch.manual_seed(0)
    return MriLanguageSettings.from_values({"kind": "mri-language", "preset": "nano"}).build()


def studies(root: Path) -> tuple[SliceCohort, np.ndarray, dict[str, np.ndarray]]:
    """Heads with a lesion of one of three sizes, and a standardised age that has nothing to do with it."""
    rng = np.random.default_rng(1)
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, 32),) * 2, indexing="ij"))
    head = (grid**2).sum(0) < 0.8
    size = rng.permutation(np.arange(PEOPLE) % 3)
    items, ages = {}, {}
    for number in range(PEOPLE):
        centre = rng.uniform(-0.35, 0.35, 2)
        lesion = ((grid - centre[:, None, None]) ** 2).sum(0) < (0.02, 0.08, 0.2)[size[number]]
        stack = [head * (90 + rng.normal(0, 8, head.shape)) + (110 * (lesion & head) if place in (1, 2) else 0) for place in range(4)]
        items[f"{number:02d}"] = np.clip(stack, 0, 255).astype(np.uint8)
        ages[f"{number:02d}"] = rng.normal(size=1).astype(np.float32)
    return write_slice_cohort(root, items), size, ages


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[SliceCohort, np.ndarray, dict[str, np.ndarray]]:
    return studies(tmp_path_factory.mktemp("studies") / "cohort")


def survival(size: np.ndarray, ages: dict[str, np.ndarray], kind: str) -> StudyTask:
    rng = np.random.default_rng(2)
    labels, times = {}, {}
    for place, label in enumerate(ages):
        event = rng.exponential(20 * np.exp(-2.5 * (size[place] - 1) - 0.7 * ages[label][0]))
        other, last = rng.exponential(120), rng.uniform(20, 200)
        times[label] = float(np.ceil(min(event, other, last)))
        labels[label] = 1 if event <= min(other, last) else 2 if other <= last else 0
    edges = np.unique(np.quantile([t for k, t in times.items() if labels[k]], np.linspace(0.1, 1, 10)))
    return StudyTask(kind=kind, labels=labels, times=times, count=2, edges=tuple(map(float, edges)))  # type: ignore[arg-type]


def divided(task: StudyTask) -> TuningPeople:
    strata = {label: str(value) for label, value in task.labels.items()}
    return divide_for_tuning(strata, dict.fromkeys(strata, "tests"), (), test=0.3, validation=0.2, seed=0, transductive=False)


def compared(made: tuple, task: StudyTask, folder: Path, *, tune: str = "linear", floors: ScanFloors | None = None, clinical: bool = True):  # type: ignore[no-untyped-def]
    cohort, _, ages = made
    given, split = system(), divided(task)
    beside = ages if clinical else {label: np.zeros(0, np.float32) for label in ages}
    found = compare_studies(
        given, cohort, task, split, SHORT.plan(0) if tune == "linear" else SHORT.model_copy(update={"epochs": 2}).plan(0), clinical=beside,
        tune=tune, adaptation=AdaptationSettings(rank=4, slices=3), floors=floors or ScanFloors(random_encoder=False), batch_size=8,
        execution=CPU, folder=folder,
    )  # fmt: skip
    return given, split, found


def test_grades_keep_their_order_and_beat_what_everybody_is_told(made: tuple, tmp_path: Path) -> None:
    cohort, size, _ = made
    task = StudyTask(kind="grading", labels=dict(zip(cohort.labels_of_people, map(int, size), strict=True)), count=3)
    _, split, found = compared(made, task, tmp_path, clinical=False)
    test = split.role("test")
    scores = score_answers(task, found.answers, split.role("train"), test, horizons=(), unit="", seed=0).set_index(["method", "score"])
    assert scores.index[0] == ("model", "Quadratic κ")
    assert scores.loc[("model", "Quadratic κ"), "value"] > 0.7
    assert scores.loc[("shares of grades", "Quadratic κ"), "value"] == pytest.approx(0)
    assert scores.loc[("model − shares of grades", "Concordance of grades"), "low"] > 0
    assert scores.loc[("shares of grades", "Concordance of grades"), "value"] == 0.5
    for chances in found.answers.values():
        np.testing.assert_allclose(chances.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("kind", ["discrete", pytest.param("cox", marks=pytest.mark.long)])
def test_images_add_to_clinical_variables_and_curves_are_incidences(made: tuple, tmp_path: Path, kind: str) -> None:
    _, size, ages = made
    task = survival(size, ages, kind)
    _, split, found = compared(made, task, tmp_path)
    train, test = split.role("train"), split.role("test")
    for name in ("model", "everybody alike", CLINICAL, NUMBERS, JOINED):
        curves = found.answers[name]
        assert curves.shape == (len(test), len(task.edges), 2)
        assert (np.diff(curves, axis=1) >= -1e-9).all()
        assert (curves.sum(2) <= 1 + 1e-9).all()
    scores = score_answers(task, found.answers, train, test, horizons=(10.0,), unit="months", seed=0).set_index(["method", "score"])
    value = lambda name, score="Uno C": scores.loc[(name, score), "value"]  # noqa: E731
    assert value("everybody alike") == 0.5
    assert value("model") > value(CLINICAL)
    assert value("model") > 0.65
    assert value("model", "Integrated Brier score") < value("everybody alike", "Integrated Brier score")
    assert value(f"model − {CLINICAL}") == pytest.approx(value("model") - value(CLINICAL))
    assert scores.loc[("model", "AUROC at 10 months"), "value"] > 0.6
    truth = {
        role: Outcome(
            time=np.array([task.times[one] for one in people]), event=np.array([task.labels[one] == 1 for one in people]),
            competing=np.array([task.labels[one] == 2 for one in people]),
        )
        for role, people in (("train", train), ("test", test))
    }  # fmt: skip
    oracle = weighted_uno(truth["train"], truth["test"], risk_of(found.answers["model"]), until=np.inf)(np.ones((1, len(test))))[0]
    assert value("model") == pytest.approx(oracle)


def test_everybody_alike_is_the_aalen_johansen_curve() -> None:
    time, cause = np.array([1.0, 2.0, 3.0, 4.0, 5.0]), np.array([1, 2, 0, 1, 2])
    labels = {str(n): int(c) for n, c in enumerate(cause)}
    task = StudyTask(
        kind="discrete", labels=labels, times={str(n): float(t) for n, t in enumerate(time)}, count=2, edges=(1.0, 2.0, 4.0, 5.0)
    )
    found = marginal_answer(task, tuple(labels), 2)
    # Nelson–Aalen steps 1/5, 1/4, 1/2, 1/1, survival by their exponential
    free = np.exp(-np.cumsum([0.2, 0.25, 0.5, 1.0]))
    np.testing.assert_allclose(1 - found[0].sum(1), free, atol=1e-9)
    np.testing.assert_allclose(found[0][:, 0], [1 - free[0]] * 2 + [1 - free[0] + free[1] - free[2]] * 2, atol=1e-9)


@pytest.mark.parametrize("tune", ["lora", pytest.param("full", marks=pytest.mark.long)])
def test_only_what_is_asked_for_is_trained_and_it_is_read_back(made: tuple, tmp_path: Path, tune: str) -> None:
    cohort, size, ages = made
    task = survival(size, ages, "discrete")
    given, split, found = compared(
        made, task, tmp_path, tune=tune, floors=ScanFloors(random_encoder=tune == "lora", network=tune == "full", image_numbers=False)
    )
    fresh = system().model.encoder
    assert encoder_hash(given.model.encoder) == encoder_hash(fresh)
    assert found.adapted is not None
    assert (encoder_hash(found.adapted) == encoder_hash(fresh)) == (tune == "lora")
    assert {FROZEN, CLINICAL, TWIN if tune == "lora" else NETWORK} <= set(found.answers)
    assert np.abs(found.answers["model"] - found.answers[FROZEN]).max() > 1e-4
    write_tensors(tmp_path / ADAPTED_FILE, adapted_tensors(found.adapted, tune))  # type: ignore[arg-type]
    again = load_adapted(fresh, tmp_path, tune, AdaptationSettings(rank=4))  # type: ignore[arg-type]
    test = split.role("test")
    features = encode_studies(again, cohort, test)
    scores, _ = study_scores(found.fitted.head, features, ages, test)
    np.testing.assert_allclose(task.answer(scores.float(), found.fitted.head.link, None), found.answers["model"], atol=1e-5)


def test_low_rank_layers_begin_as_they_were_and_freeze_the_rest() -> None:
    encoder = system().model.encoder
    layer = copy.deepcopy(encoder.layers[0].qkv)
    count = add_low_rank(encoder, 4, 8.0)
    assert count == 4 * len(encoder.layers) + 2 * (len(encoder.fine_blocks) + len(encoder.middle_blocks))
    adapted = encoder.layers[0].qkv
    assert isinstance(adapted, LowRank)
    x = torch.randn(3, layer.in_features)
    assert torch.equal(adapted(x), layer(x))
    with torch.no_grad():
        adapted.up.add_(0.1)
    expected = layer(x) + 2.0 * x @ adapted.down.T @ adapted.up.T
    torch.testing.assert_close(adapted(x), expected)
    names = {name.rpartition(".")[2] for name, one in encoder.named_parameters() if one.requires_grad}
    assert names == {"down", "up"}


def test_the_plain_network_has_about_as_many_parameters() -> None:
    wanted = sum(one.numel() for one in system().model.encoder.parameters())
    network = SliceNetwork(SliceNetwork.width_for(wanted))
    assert 0.6 < sum(one.numel() for one in network.parameters()) / wanted < 1.6
    assert network(torch.rand(2, 32, 32)).shape == (2, network.features)


def test_image_numbers_by_hand(tmp_path: Path) -> None:
    items = {}
    for place, label in enumerate(("a", "b")):
        image = np.zeros((2, 16, 16), np.uint8)
        image[:, 4:12, 4:12] = 100
        image[0, 4:8, 4:12] = 100 + 50 * place  # the left half of one slice
        items[label] = image
    cohort = write_slice_cohort(tmp_path / "cohort", items)
    found = image_numbers(cohort, ("a", "b"))
    named = dict(zip(NAMES, found["b"], strict=True))
    assert named["mean"] == pytest.approx(112.5)
    assert named["SD"] == pytest.approx(np.sqrt(0.25 * 0.75) * 50)
    assert named["head volume"] == pytest.approx(128 * 5 / 1000)
    assert named["asymmetry"] == pytest.approx(2 * 32 * 50 / (128 * 112.5))
    assert dict(zip(NAMES, found["a"], strict=True))["asymmetry"] == 0
    scaled = standardised({**found, "c": np.full(len(NAMES), np.nan)}, ("a", "b"))
    np.testing.assert_allclose(scaled["a"][0], -1, rtol=1e-6)
    assert not scaled["c"].any()


def test_the_penalty_is_chosen_on_validation_people() -> None:
    rng = np.random.default_rng(0)
    numbers = {str(n): rng.normal(size=20).astype(np.float32) for n in range(80)}
    noise = StudyTask(kind="classification", labels={label: int(rng.random() < 0.5) for label in numbers}, count=2)
    clear = StudyTask(kind="classification", labels={label: int(x[0] > 0) for label, x in numbers.items()}, count=2)
    people = tuple(numbers)
    assert (
        fit_linear_answer(noise, numbers, people[:50], people[50:]).penalty
        > fit_linear_answer(clear, numbers, people[:50], people[50:]).penalty
    )


def test_decisions_and_curves_at_a_time() -> None:
    assert median_class(np.array([[0.5, 0.1, 0.4], [0.2, 0.2, 0.6], [0.45, 0.1, 0.45]])).tolist() == [0, 2, 1]
    assert at_time(np.array([[0.2, 0.6]]), np.array([10.0, 20.0]), 5.0)[0] == pytest.approx(0.1)
    assert at_time(np.array([[0.2, 0.6]]), np.array([10.0, 20.0]), 99.0)[0] == pytest.approx(0.6)
    assert score_classes(np.zeros(0, np.int64), {}, classes=2, seed=0).empty


def test_scores_that_cannot_be_computed_have_a_reason() -> None:
    outcome = Outcome(time=np.array([1.0, 2.0, 3.0]), event=np.zeros(3, bool))
    found = score_survival(outcome, outcome, {"model": np.full((3, 2), 0.5)}, times=(1.0, 2.0), horizons=(1.5,), unit="d", seed=0)
    unknown = found[found["score"] == "Uno C"].iloc[0]
    assert np.isnan(unknown["value"]) or unknown["value"] is None
    assert unknown["reason"] == "no two people can be compared"
