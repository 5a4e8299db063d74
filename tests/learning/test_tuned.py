"""Tuning on a frozen backbone: what is saved predicts the same, no label reaches its own prediction, atlases are averaged."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from brainfm_cli.bids.cohort import Cohort, CohortAtlas, CohortWriter
from brainfm_cli.errors import CheckpointMismatchError, InputDatasetError, InputNotFoundError
from brainfm_cli.learning import head_fit
from brainfm_cli.learning import tuning as tuning_module
from brainfm_cli.learning.checkpoints import AtlasRecord, read_tensors
from brainfm_cli.learning.forecasts import TrainingFold, check_forecast
from brainfm_cli.learning.splits import inner_folds
from brainfm_cli.learning.targets import Target, read_target
from brainfm_cli.learning.tuned import (
    AppliedPredictor,
    TargetRecord,
    TunedPredictor,
    Tuning,
    forecast,
    load_tuned,
    prepare_inputs,
    read_held_out,
    read_seen,
    save_tuned,
    stack_weights,
    tune,
    write_held_out,
)
from brainfm_cli.learning.tuning import EMBEDDING, AtlasInputs, TuningSettings, embed, prepare
from brainfm_cli.records import RegionTable
from brainfm_cli.systems.brain_graph import BrainGraph, BrainGraphSettings
from tests.learning.cohorts import series_of

if TYPE_CHECKING:
    from pathlib import Path

REGIONS = {"Eight": 8, "Ten": 10}
PEOPLE = 40
SETTINGS = TuningSettings(epochs=4, stops=2, batch_size=16, inner_folds=2)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    """Cases couple more strongly; people 0–3 lack atlas Ten, 4–7 lack Eight, 8 and 9 have two runs."""
    rng = np.random.default_rng(0)
    names = [f"p{place:02d}" for place in range(PEOPLE)]
    case = np.arange(PEOPLE) % 2
    group = np.where(case == 1, "case", "control")
    table = pd.DataFrame({"group": group, "age": 30 + 8 * case + rng.normal(0, 3, PEOPLE), "kind": np.array(["a", "b", "c"])[np.arange(PEOPLE) % 3]}, index=names)  # fmt: skip
    with CohortWriter(tmp_path_factory.mktemp("tuned") / "cohort") as writer:
        for label, regions in REGIONS.items():
            writer.add_atlas(
                CohortAtlas(label=label, regions=RegionTable(names=tuple(f"{label}{r}" for r in range(regions))), template="t")
            )
        for place, name in enumerate(names):
            for label, regions in REGIONS.items():
                if (name in names[:4] and label == "Ten") or (name in names[4:8] and label == "Eight"):
                    continue
                for run in range(2 if place in (8, 9) else 1):
                    row = {"dataset": "toy", "participant": name, "session": "", "run": f"run-{run}", "site": "", "repetition_time": 2.0, "mean_fd": 0.1, "kept_fraction": 1.0}  # fmt: skip
                    writer.add_run(label, series_of(0.6 + 0.9 * case[place], rng, frames=70, regions=regions), row)
        writer.finish(table)
    return Cohort.open(writer.root)


@pytest.fixture(scope="module")
def system(cohort: Cohort) -> BrainGraph:
    torch.manual_seed(0)
    settings = BrainGraphSettings(kind="brain-graph", preset="tiny", width=16, num_heads=2, feedforward=24, num_blocks=1, input_width=20)
    system = settings.build({label: AtlasRecord.of(atlas) for label, atlas in cohort.atlases.items()})
    system.model.eval()
    return system


@pytest.fixture(scope="module")
def inputs(system: BrainGraph, cohort: Cohort) -> dict[str, AtlasInputs]:
    return prepare_inputs(system, cohort, list(cohort.participants.index), ["Eight", "Ten"])


def folds_of(target: Target) -> tuple[tuple[NDArray[np.int64], NDArray[np.int64]], ...]:
    return inner_folds(target, groups={}, folds=2, seed=0)


def tuned_for(system: BrainGraph, inputs: dict[str, AtlasInputs], target: Target, settings: TuningSettings = SETTINGS) -> Tuning:
    return tune(system, inputs, target, folds_of(target), settings, seed=3)


@pytest.fixture(scope="module")
def target(cohort: Cohort) -> Target:
    return read_target(cohort, "group").keep(list(cohort.participants.index[:30]))


@pytest.fixture(scope="module")
def tuning(system: BrainGraph, inputs: dict[str, AtlasInputs], target: Target) -> Tuning:
    return tuned_for(system, inputs, target)


def state_of(system: BrainGraph) -> str:
    digest = hashlib.sha256()
    for name, value in system.model.state_dict().items():
        digest.update(name.encode() + value.numpy().tobytes())
    return digest.hexdigest()


def test_the_backbone_is_unchanged_and_the_prompt_is_tuned(system: BrainGraph, inputs: dict[str, AtlasInputs], target: Target) -> None:
    before = state_of(system)
    only_embedding = SETTINGS.model_copy(update={"blocks": (EMBEDDING,)})
    found = tuned_for(system, inputs, target, only_embedding)
    assert state_of(system) == before
    assert all(parameter.grad is None for parameter in system.model.parameters())
    for label, one in found.atlases.items():
        assert [len(curve) for curve in one.losses] == [4, 4, one.epochs]
        assert all(curve[-1] < curve[0] for curve in one.losses if curve)
        start = system.new_prompt(label).state_dict()
        assert all(torch.equal(value, start[name]) for name, value in one.prompt.items()) == (one.epochs == 0)


def test_tuning_is_deterministic(system: BrainGraph, inputs: dict[str, AtlasInputs], target: Target, tuning: Tuning) -> None:
    torch.manual_seed(77)
    again = tuned_for(system, inputs, target)
    np.testing.assert_array_equal(again.held_out, tuning.held_out)
    for label, one in tuning.atlases.items():
        assert all(torch.equal(value, again.atlases[label].prompt[name]) for name, value in one.prompt.items())


def test_what_is_saved_predicts_the_same(
    system: BrainGraph, inputs: dict[str, AtlasInputs], cohort: Cohort, target: Target, tuning: Tuning, tmp_path: Path
) -> None:
    everybody = list(cohort.participants.index)
    expected = forecast(system, inputs, tuning.atlases, everybody)
    assert expected.shape == (PEOPLE, 2)
    np.testing.assert_allclose(expected.sum(1), 1)
    paths = save_tuned(tmp_path, tuning.atlases)
    assert [path.name for path in paths] == ["prompts.safetensors", "head.safetensors"]
    record = TargetRecord(name="group", kind="binary", classes=target.classes, atlases=("Eight", "Ten"), weights=tuning.weights)
    loaded = load_tuned(tmp_path, record)
    np.testing.assert_array_equal(forecast(system, inputs, loaded, everybody), expected)
    new = expected[30:, 1]
    labels = read_target(cohort, "group").observed[30:]
    assert new[labels == 1].mean() > new[labels == 0].mean() + 0.2  # the signal is there


def test_damaged_heads_are_named(tuning: Tuning, target: Target, tmp_path: Path) -> None:
    save_tuned(tmp_path, tuning.atlases)
    record = TargetRecord(name="group", kind="binary", classes=target.classes, atlases=("Eight", "Ten"), weights=tuning.weights)
    with pytest.raises(CheckpointMismatchError, match="head of atlas Other is incomplete"):
        load_tuned(tmp_path, record.model_copy(update={"atlases": ("Other",)}))
    tensors = read_tensors(tmp_path / "head.safetensors")
    del tensors["Ten:shift"]
    save_file(tensors, tmp_path / "head.safetensors")
    with pytest.raises(CheckpointMismatchError, match="head of atlas Ten is incomplete"):
        load_tuned(tmp_path, record)
    (tmp_path / "prompts.safetensors").write_bytes(b"half")
    with pytest.raises(CheckpointMismatchError, match="unreadable"):
        load_tuned(tmp_path, record)
    (tmp_path / "prompts.safetensors").unlink()
    with pytest.raises(InputNotFoundError, match="absent"):
        load_tuned(tmp_path, record)


def test_people_lacking_an_atlas_are_averaged_over_the_rest(
    system: BrainGraph, inputs: dict[str, AtlasInputs], cohort: Cohort, tuning: Tuning
) -> None:
    everybody = list(cohort.participants.index)
    pooled = forecast(system, inputs, tuning.atlases, everybody)
    single = {}
    for label in REGIONS:
        having = list(inputs[label].participants)
        single[label] = dict(zip(having, forecast(system, {label: inputs[label]}, tuning.atlases, having), strict=True))
    assert set(everybody) - set(single["Ten"]) == set(everybody[:4])
    assert set(everybody) - set(single["Eight"]) == set(everybody[4:8])
    for place, name in enumerate(everybody):
        expected = np.mean([single[label][name] for label in REGIONS if name in single[label]], axis=0)
        np.testing.assert_allclose(pooled[place], expected)
    # in any order, and of some people only
    np.testing.assert_array_equal(forecast(system, inputs, tuning.atlases, everybody[::-3]), pooled[::-3])
    with pytest.raises(InputDatasetError, match="no series in an atlas"):
        forecast(system, {"Ten": inputs["Ten"]}, tuning.atlases, everybody)


def test_another_set_of_atlases(system: BrainGraph, cohort: Cohort, target: Target, tuning: Tuning) -> None:
    some = [name for name in target.participants if name >= "p08"]
    ten = prepare_inputs(system, cohort, some, ["Ten"])
    kept = target.keep(some)
    found = tuned_for(system, ten, kept)
    assert set(found.atlases) == {"Ten"}
    assert np.isfinite(found.held_out).all()
    # a model of two atlases predicts people who have one
    assert forecast(system, ten, tuning.atlases, some).shape == (len(some), 2)
    with pytest.raises(InputDatasetError, match=r"4 people have no series in an atlas of the model, e\.g\. p00"):
        prepare_inputs(system, cohort, target.participants, ["Ten"])


def test_runs_are_averaged_per_person(system: BrainGraph, cohort: Cohort, inputs: dict[str, AtlasInputs]) -> None:
    one = inputs["Eight"]
    assert len(one.owner) == len(one.participants) + 2
    prompt = system.new_prompt("Eight").state_dict()
    together = embed(system, one, prompt)
    place = one.participants.index("p08")
    alone = prepare(system, cohort, ["p08"], "Eight")
    np.testing.assert_allclose(embed(system, alone, prompt)[0], together[place], atol=1e-5)
    rows = cohort.index[(cohort.index["participant"] == "p08") & (cohort.index["atlas"] == "Eight")]
    series = [np.asarray(cohort.series(row)) for row in rows.itertuples()]
    np.testing.assert_allclose(system.embed(series, "Eight").mean(0), together[place], atol=1e-5)
    z = [np.arctanh(np.corrcoef(run.astype(float), rowvar=False)[np.triu_indices(8, 1)]) for run in series]
    np.testing.assert_allclose(one.blocks["edges"][place], np.mean(z, axis=0), atol=1e-5)


@pytest.mark.parametrize("block", ["edges", EMBEDDING])
def test_held_out_predictions_do_not_see_their_own_label(
    system: BrainGraph, inputs: dict[str, AtlasInputs], target: Target, monkeypatch: pytest.MonkeyPatch, block: str
) -> None:
    """With nothing to weigh (one block, one penalty, one length) a fold's scores are fixed, up to a factor, by the other folds' labels."""
    monkeypatch.setattr(head_fit, "PENALTIES", (1.0,))
    monkeypatch.setattr(tuning_module, "_stops", lambda _: (3,))
    settings = SETTINGS.model_copy(update={"blocks": (block,)})
    folds = folds_of(target)
    part = folds[0][1]
    flipped = target.observed.copy()
    flipped[part[::3]] = 1 - flipped[part[::3]]
    changed = replace(target, observed=flipped)
    before, after = (tune(system, inputs, one, folds, settings, seed=3) for one in (target, changed))
    for label in REGIONS:
        people = [name for name in target.participants if name in inputs[label].participants]
        own = np.isin(people, [target.participants[row] for row in part])
        scores = [tuning.atlases[label].choice.held_out[:, 0] for tuning in (before, after)]
        assert np.corrcoef(scores[0][own], scores[1][own])[0, 1] > 1 - 1e-6
        assert np.corrcoef(scores[0][~own], scores[1][~own])[0, 1] < 0.99  # others trained on the changed labels


def test_labels_of_new_people_are_not_needed(
    system: BrainGraph, inputs: dict[str, AtlasInputs], cohort: Cohort, target: Target, tuning: Tuning
) -> None:
    """The predictor of an outer fold sees test people's names only, and tuning uses training people's rows only."""
    new = list(cohort.participants.index[30:])
    fold = TrainingFold(target=target, inner=folds_of(target), repeat=1, fold=1, seed=3)
    predictor = TunedPredictor(prepared=lambda _: (system, inputs), settings=SETTINGS)
    found = check_forecast("tuned", predictor(fold, new), fold, new)
    np.testing.assert_allclose(found.test, forecast(system, inputs, tuning.atlases, new, weights=tuning.weights))
    np.testing.assert_allclose(found.train, tuning.held_out)
    assert any(name.startswith("Ten: share of") for name in found.choices)
    # other test people beside them change nothing
    fewer = prepare_inputs(system, cohort, [*target.participants, *new[:3]], ["Eight", "Ten"])
    alone = TunedPredictor(prepared=lambda _: (system, fewer), settings=SETTINGS)(fold, new[:3])
    np.testing.assert_allclose(alone.test, found.test[:3], atol=1e-4)


@pytest.mark.parametrize("column", ["age", "kind"])
def test_other_kinds_of_targets(system: BrainGraph, inputs: dict[str, AtlasInputs], cohort: Cohort, column: str) -> None:
    kept = read_target(cohort, column).keep(list(cohort.participants.index[:30]))
    new = list(cohort.participants.index[30:])
    settings = SETTINGS.model_copy(update={"epochs": 2, "stops": 1})
    predictor = TunedPredictor(prepared=lambda _: (system, inputs), settings=settings)
    fold = TrainingFold(target=kept, inner=folds_of(kept), repeat=1, fold=1, seed=3)
    found = check_forecast("tuned", predictor(fold, new), fold, new)
    if column == "age":
        assert np.corrcoef(found.train, kept.observed)[0, 1] > 0.5
        assert 20 < found.train.min() < found.train.max() < 50
        assert np.corrcoef(found.test, read_target(cohort, "age").observed[30:])[0, 1] > 0.5
        assert 20 < found.test.min() < found.test.max() < 50
    else:
        assert found.test.shape == (10, 3)


def test_without_the_embedding_nothing_is_tuned(system: BrainGraph, inputs: dict[str, AtlasInputs], target: Target) -> None:
    found = tuned_for(system, inputs, target, SETTINGS.model_copy(update={"blocks": ("edges", "edges_log")}))
    for one in found.atlases.values():
        assert (one.epochs, one.losses) == (0, ((),))
        assert EMBEDDING not in one.head.weights


def test_an_embedding_is_computed_once_per_backbone_and_prompt(
    system: BrainGraph, cohort: Cohort, target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = prepare_inputs(system, cohort, target.participants, ["Eight", "Ten"])["Eight"]
    calls = []
    read = BrainGraph.read
    monkeypatch.setattr(BrainGraph, "read", lambda self, graphs, prompt: calls.append(self) or read(self, graphs, prompt))
    untuned = {name: value.clone() for name, value in system.new_prompt("Eight").state_dict().items()}
    first = embed(system, one, untuned)
    assert np.array_equal(embed(system, one, untuned), first)
    assert len(calls) == 1
    random = system.randomised(1)
    assert not np.array_equal(embed(random, one, random.new_prompt("Eight").state_dict()), first)
    assert len(calls) == 2
    untuned["token"] = untuned["token"] + 1
    assert not np.array_equal(embed(system, one, untuned), first)
    assert len(calls) == 3


def test_held_out_predictions_come_back_by_hash(cohort: Cohort, target: Target, tuning: Tuning, tmp_path: Path) -> None:
    datasets = pd.Series("toy", index=cohort.participants.index)
    held_out = tuning.held_out.copy()
    held_out[3] = np.nan
    path = write_held_out(tmp_path / "held_out.tsv", target, datasets, held_out)
    assert not any(name in path.read_text() for name in target.participants)
    back = read_held_out(path, list(cohort.participants.index), dict(datasets))
    assert set(back) == set(target.participants)  # nobody else was tuned on
    for row, name in enumerate(target.participants):
        np.testing.assert_allclose(back[name], held_out[row], atol=1e-6)
    with pytest.raises(CheckpointMismatchError, match="held-out predictions are unreadable"):
        read_held_out(tmp_path / "absent.tsv", [], {})
    (tmp_path / "other.tsv").write_text("a\tb\n1\t2\n")
    with pytest.raises(CheckpointMismatchError, match="held-out predictions are unreadable"):
        read_held_out(tmp_path / "other.tsv", [], {})


def test_an_applied_model_learns_nothing(
    system: BrainGraph, inputs: dict[str, AtlasInputs], cohort: Cohort, target: Target, tuning: Tuning
) -> None:
    new = list(cohort.participants.index[30:])
    held_out = dict(zip(target.participants[1:], tuning.held_out[1:], strict=True))
    predictor = AppliedPredictor(system=system, inputs=inputs, atlases=tuning.atlases, weights=tuning.weights, held_out=held_out)
    fold = TrainingFold(target=target, inner=(), repeat=1, fold=1, seed=0)
    flipped = replace(fold, target=replace(target, observed=1 - target.observed))
    first, second = (check_forecast("applied", predictor(one, new), one, new) for one in (fold, flipped))
    np.testing.assert_array_equal(first.test, second.test)
    assert first.train is not None
    assert np.isnan(first.train[0]).all()
    np.testing.assert_array_equal(first.train[1:], tuning.held_out[1:])


def test_whom_a_model_has_seen(tmp_path: Path) -> None:
    path = tmp_path / "provenance.json"
    path.write_text('{"pretrained_on": ["a"], "validated_on": ["b"], "tuned_on": ["c"]}')
    assert read_seen(tmp_path) == {"pretrained_on": {"a", "b"}, "tuned_on": {"c"}, "aligned_on": set()}
    path.write_text('{"pretrained_on": ["a"], "validated_on": ["b"], "aligned_on": ["d"]}')
    assert read_seen(tmp_path) == {"pretrained_on": {"a", "b", "d"}, "tuned_on": set(), "aligned_on": {"d"}}
    path.write_text('{"pretrained_on": ["a"], "validated_on": []}')
    assert read_seen(tmp_path)["tuned_on"] == set()
    for text in ("{}", "[]", "{", '{"pretrained_on": 3, "validated_on": []}', None):
        path.unlink() if text is None else path.write_text(text)
        with pytest.raises(CheckpointMismatchError, match="does not say whom it has seen"):
            read_seen(tmp_path)


def test_atlases_are_weighed_by_what_they_say_of_held_out_people(target: Target, generator: np.random.Generator) -> None:
    wanted = np.eye(2)[target.observed.astype(int)]
    noise = generator.uniform(size=(len(wanted), 1))
    rubbish = np.concatenate([1 - noise, noise], axis=1)
    weights = stack_weights({"good": 0.4 * wanted + 0.3, "rubbish": rubbish}, target)
    assert weights["good"] > 0.9
    assert sum(weights.values()) == pytest.approx(1)
    against = stack_weights({"against": 1 - wanted, "rubbish": np.full_like(wanted, 0.5)}, target)
    assert against == {"against": 0.5, "rubbish": 0.5}  # nothing helps: equal, never negative
    lacking = wanted.copy()
    lacking[1:] = np.nan
    assert stack_weights({"one": lacking, "other": np.where(np.isnan(lacking), wanted, np.nan)}, target) == {"one": 0.5, "other": 0.5}


def test_weights_count_among_the_atlases_a_person_has(
    system: BrainGraph, inputs: dict[str, AtlasInputs], cohort: Cohort, tuning: Tuning
) -> None:
    having = {label: set(one.participants) for label, one in inputs.items()}
    first, second = inputs
    both = sorted(having[first] & having[second])
    only = sorted(having[first] ^ having[second])
    alone = {label: forecast(system, {label: inputs[label]}, tuning.atlases, both) for label in inputs}
    mixed = forecast(system, inputs, tuning.atlases, both, weights={first: 0.8, second: 0.2})
    np.testing.assert_allclose(mixed, 0.8 * alone[first] + 0.2 * alone[second], atol=1e-7)
    assert only  # the cohort has somebody with one atlas
    label = first if only[0] in having[first] else second
    zero = forecast(system, inputs, tuning.atlases, [only[0]], weights={first: 1.0, second: 1.0} | {label: 0.0})
    np.testing.assert_allclose(zero, forecast(system, {label: inputs[label]}, tuning.atlases, [only[0]]), atol=1e-7)
