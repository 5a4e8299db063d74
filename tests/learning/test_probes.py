"""Probes of site and diagnosis during pretraining: what they find, what they leave out, and that they change nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.config import Execution
from brainfm_cli.learning.pretraining import PretrainingSettings, prepare, pretrain_model
from brainfm_cli.learning.probes import make_probes, probe
from brainfm_cli.learning.targets import Target
from brainfm_cli.stages.simulate import SimulateSettings, write_cohort
from brainfm_cli.systems.brain_graph import BrainGraphSettings

if TYPE_CHECKING:
    from pathlib import Path

TINY = BrainGraphSettings(kind="brain-graph", preset="tiny", width=16, feedforward=16, num_blocks=1)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Cohort:
    root = tmp_path_factory.mktemp("probes")
    population = {"disorders": ["Arvel"], "num_sites": 2}
    values = {"level": "series", "participants": 40, "seed": 4, "frames": 100, "atlases": ["Schaefer100"], "population": population}
    write_cohort(root, SimulateSettings.from_values(values), ())
    return Cohort.open(root)


def _target(values: np.ndarray, classes: tuple[str, ...]) -> Target:
    names = tuple(f"p{row:03d}" for row in range(len(values)))
    kind = "continuous" if not classes else "binary" if len(classes) == 2 else "multiclass"
    return Target(name="x", kind=kind, classes=classes, participants=names, observed=values.astype(float))


@pytest.mark.parametrize("classes", [("a", "b"), ("a", "b", "c"), ()])
def test_a_probe_finds_what_is_in_the_vectors_and_nothing_in_noise(classes: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    values = rng.integers(0, len(classes), 240) if classes else rng.normal(size=240)
    target = _target(values, classes)
    noise = rng.normal(size=(240, 12))
    told = noise.copy()
    told[:, 0] += 3.0 * values if not classes else 0.0
    for code in range(len(classes)):
        told[:, code] += 3.0 * (values == code)
    chance = 0.5 if classes else 0.0
    assert probe(told, target) > 0.9
    assert abs(probe(noise, target) - chance) < 0.25  # held-out correlations of noise lie below 0


def test_probes_are_logged_after_every_epoch_and_the_weights_are_the_same_without_them(cohort: Cohort, tmp_path: Path) -> None:
    people = sorted(cohort.participants.index)
    weights = []
    for number, columns in enumerate([("site", "diagnosis", "age", "nowhere"), ()]):
        settings = PretrainingSettings(epochs=2, probes=columns)
        prepared = prepare(TINY, settings, cohort, people)
        result, _ = pretrain_model(prepared, settings, Execution(device="cpu"), tmp_path / str(number))
        weights.append(result.weights)
        for name in ("site", "diagnosis", "age"):
            steps, values = result.log.curve("validation", f"monitor_probe_{name}")
            assert len(steps) == (2 if columns else 0)
            assert all(-1 <= value <= 1 for value in values)
        assert result.log.curve("validation", "monitor_probe_nowhere")[0] == []
        assert len(result.log.curve("validation", "loss")[0]) == 2
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_rare_values_and_columns_that_do_not_vary_are_not_probed(cohort: Cohort) -> None:
    prepared = prepare(TINY, PretrainingSettings(), cohort, sorted(cohort.participants.index))
    table = cohort.participants
    few = [*table.index[table["site"] == "siteA"][:12], *table.index[table["site"] == "siteB"][:3]]
    assert make_probes(prepared.system, cohort, few, prepared.atlases, ("site",), seed=0) is None
    both = make_probes(prepared.system, cohort, sorted(table.index), prepared.atlases, ("site",), seed=0)
    assert both is not None
    assert [one.name for one in both.targets] == ["site"]
    assert set(both()) == {"probe_site"}
