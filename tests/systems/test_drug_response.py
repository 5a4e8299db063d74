"""The drug-response system: what it refuses, what its readout does not depend on, masks, prompts, statistics."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import yaml
from pydantic import ValidationError

from brainfm_cli.bids.cohort import CohortAtlas
from brainfm_cli.errors import CheckpointMismatchError, InputDatasetError
from brainfm_cli.learning import objectives
from brainfm_cli.learning.checkpoints import AtlasRecord, ModelConfig, write_tensors
from brainfm_cli.learning.samples import PretrainBatch, Windows, pad_windows
from brainfm_cli.records import RegionTable
from brainfm_cli.systems import drug_response, load_system
from brainfm_cli.systems.drug_response import PRESETS, DrugResponse, DrugResponseSettings
from tests.systems.half_precision import assert_trains_in_half_precision

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = DrugResponseSettings.from_values(
    {"kind": "drug-response", "preset": "tiny", "width": 32, "windows": {"patch_s": 20.0, "window_s": 80.0, "min_s": 40.0}}
)
REGIONS = 9
CENTRES = np.random.default_rng(7).normal(0, 40, (REGIONS, 3)).astype(np.float32)
TABLE = RegionTable(names=tuple(f"r{number}" for number in range(REGIONS)), centroids_mm=CENTRES)
ATLAS = CohortAtlas(label="Nine", regions=TABLE, template="t")


def series_of(items: int = 6, frames: int = 70, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(REGIONS, REGIONS))
    return [(rng.normal(size=(frames + item, REGIONS)).cumsum(0) @ mixing).astype(np.float32) for item in range(items)]


def windows_of(repetition_time_s: float = 2.0, **options: int) -> Windows:
    series = series_of(**options)
    return pad_windows(series, "Nine", [repetition_time_s] * len(series))


def new(settings: DrugResponseSettings = SETTINGS) -> DrugResponse:
    torch.manual_seed(0)
    system = settings.build({"Nine": settings.remember(ATLAS)})
    system.fit_normalisation([windows_of()])
    system.model.eval()
    return system


@pytest.fixture
def system() -> DrugResponse:
    return new()


def embed(system: DrugResponse, series: list[np.ndarray], repetition_time_s: float = 2.0, **options: int) -> np.ndarray:
    return system.embed(series, "Nine", repetition_time_s=repetition_time_s, **options)


def save(system: DrugResponse, folder: Path) -> Path:
    folder.mkdir(parents=True)
    config = ModelConfig(system=system.settings.model_dump(mode="json"), atlases=system.atlases)
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    write_tensors(folder / "model.safetensors", system.model.state_dict())
    return folder


def test_a_saved_model_is_rebuilt_from_its_folder_centres_and_statistics_included(system: DrugResponse, tmp_path: Path) -> None:
    loaded = load_system(save(system, tmp_path / "model"))
    assert isinstance(loaded, DrugResponse)
    assert loaded.settings == system.settings
    assert loaded.atlases == system.atlases
    assert not loaded.model.training
    np.testing.assert_array_equal(embed(loaded, series_of()), embed(system, series_of()))
    np.testing.assert_allclose(loaded.atlases["Nine"].centroids_mm, CENTRES, atol=0.01)
    assert float(loaded.model.scaler.get_buffer("spread_Nine").std()) > 0


def test_atlases_without_or_with_other_centres_are_refused(system: DrugResponse) -> None:
    for centres in (None, np.full_like(CENTRES, np.nan)):
        bare = CohortAtlas(label="Nine", regions=RegionTable(names=TABLE.names, centroids_mm=centres), template="t")
        with pytest.raises(InputDatasetError, match="Nine states no centres"):
            SETTINGS.remember(bare)
    system.check_atlas(ATLAS)
    moved = replace(ATLAS, regions=RegionTable(names=TABLE.names, centroids_mm=CENTRES + 5))
    with pytest.raises(CheckpointMismatchError, match="regions in other places"):
        system.check_atlas(moved)
    with pytest.raises(CheckpointMismatchError, match="does not know atlas Ten"):
        system.check_atlas(replace(ATLAS, label="Ten"))


def test_graph_models_remember_no_centres() -> None:
    assert "centroids_mm" not in ModelConfig(system={}, atlases={"Nine": AtlasRecord.of(ATLAS)}).to_yaml()


def test_sizes_and_times_are_checked() -> None:
    assert replace(DrugResponseSettings(kind="drug-response").shape) == PRESETS["base"]
    with pytest.raises(ValidationError, match="not a multiple of num_heads"):
        DrugResponseSettings(kind="drug-response", preset="tiny", width=66)
    for wrong, message in (({"patch_s": 2.0}, "fewer than two frames"), ({"window_s": 60.0}, "two patches")):
        with pytest.raises(ValidationError, match=message):
            DrugResponseSettings.model_validate({"kind": "drug-response", "windows": wrong})


def test_the_random_twin_keeps_statistics_and_changes_weights(system: DrugResponse) -> None:
    before = {name: value.clone() for name, value in system.model.state_dict().items()}
    twin, again = system.randomised(1), system.randomised(1)
    state = twin.model.state_dict()
    assert torch.equal(state["scaler.spread_Nine"], before["scaler.spread_Nine"])
    matrices = [name for name, value in state.items() if value.ndim == 2 and not name.startswith("kept.")]  # no axes are learnt here
    assert not any(torch.equal(state[name], before[name]) for name in matrices)
    assert all(torch.equal(value, state[name]) for name, value in again.model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in system.model.state_dict().items())


def test_readout_is_repeatable_and_free_of_units_batches_and_companions(system: DrugResponse) -> None:
    series = series_of()
    first = embed(system, series)
    assert first.shape == (6, 32 * (2 + 3))  # class token, mean, three clusters of nine regions
    np.testing.assert_array_equal(embed(system, series), first)
    np.testing.assert_allclose(embed(system, series[::-1])[::-1], first, atol=1e-5)
    np.testing.assert_allclose(embed(system, series, batch_size=1), first, atol=1e-5)
    np.testing.assert_allclose(embed(system, [40 * one + 9000 for one in series]), first, atol=2e-2)
    assert np.abs(embed(system, series_of(seed=3)) - first).max() > 0.1
    system.model.train()
    np.testing.assert_allclose(embed(system, series), first, atol=1e-6)
    assert system.model.training  # as it was


def test_the_same_brain_at_another_repetition_time_reads_alike(system: DrugResponse) -> None:
    rng = np.random.default_rng(5)
    phases, frequencies = rng.uniform(0, 6.3, (6, REGIONS)), rng.uniform(0.01, 0.06, (6, REGIONS))

    def scan(repetition_time_s: float) -> list[np.ndarray]:
        times = (np.arange(int(160 / repetition_time_s)) + 0.5) * repetition_time_s
        return [np.sin(2 * np.pi * f * times[:, None] + p).astype(np.float32) for f, p in zip(frequencies, phases, strict=True)]

    native, other = embed(system, scan(2.0)), embed(system, scan(2.5), 2.5)
    taken_for_native = embed(system, scan(2.5))
    between_people = np.abs(native - native.mean(0)).mean()
    assert np.abs(other - native).mean() < 0.15 * between_people
    assert np.abs(taken_for_native - native).mean() > 0.4 * between_people


def test_long_runs_are_covered_by_evenly_spaced_windows(system: DrugResponse) -> None:
    assert system._starts(40) == [(0, 40)]
    assert system._starts(30) == [(0, 30)]
    assert system._starts(100) == [(0, 40), (30, 40), (60, 40)]
    (long,) = series_of(items=1, frames=100)
    readout = system.graphs(pad_windows([long], "Nine", [2.0]))
    # windows are scaled with the whole run's statistics
    (scaled,) = system._scaled(pad_windows([long], "Nine", [2.0]))
    alone = [system.model.series.encoder(system._patches("Nine", [scaled[start : start + 40]])).summary for start in (0, 30, 60)]
    torch.testing.assert_close(readout.summary, torch.stack(alone).mean(0), atol=1e-5, rtol=1e-5)


def test_absent_regions_take_no_part(system: DrugResponse) -> None:
    series = series_of()
    for one in series[:3]:
        one[:, 4] = np.nan
    readout = system.graphs(pad_windows(series, "Nine", [2.0] * 6))
    assert readout.present.sum(dim=1).tolist() == [8] * 3 + [9] * 3
    assert not readout.regions[:3, 4].any()
    prompt = system.new_prompt("Nine")
    mean = system.read(readout, prompt)[:, 32:64]
    torch.testing.assert_close(mean[0], readout.regions[0].sum(0) / 8)
    assert torch.isfinite(system.read(readout, prompt)).all()


def test_the_prompt_learns_which_region_matters(system: DrugResponse) -> None:
    readout = system.graphs(windows_of(items=20))
    target = readout.regions[:, 2, 0] - readout.regions[:, :, 0].mean(1)
    prompt = system.new_prompt("Nine")
    optimiser = torch.optim.Adam(prompt.parameters(), lr=1e-2)
    for _ in range(60):
        mean = system.read(readout, prompt)[:, 32]
        loss = (mean - readout.regions[:, :, 0].mean(1) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert int(prompt.logits.argmax()) == 2


def test_what_cannot_be_encoded_is_said(system: DrugResponse) -> None:
    with pytest.raises(InputDatasetError, match=r"a run of 16 s is shorter than a patch"):
        system.graphs(windows_of(items=1, frames=8))
    with pytest.raises(InputDatasetError, match="no region with a signal"):
        system.graphs(pad_windows([np.full((60, REGIONS), 3.0, np.float32)], "Nine", [2.0]))
    with pytest.raises(InputDatasetError, match="repetition time of a run is unknown"):
        system.graphs(windows_of(float("nan"), items=1))
    kept = new(DrugResponseSettings.model_validate(SETTINGS.model_dump() | {"scaling": {"gain": "kept"}}))
    kept.graphs(windows_of())
    with pytest.raises(InputDatasetError, match="in other units"):
        kept.graphs(pad_windows([1000 * one for one in series_of()], "Nine", [2.0] * 6))


def batch_of(items: int = 6) -> PretrainBatch:
    return PretrainBatch(
        first=windows_of(items=items),
        second=windows_of(items=items, seed=1),
        crossed=False,
        other=None,
        other_rows=torch.tensor([], dtype=torch.int64),
        keys=torch.arange(items) + 1000,
        dataset=torch.zeros(items, dtype=torch.int64),
        participant=torch.arange(items),
        counted=torch.ones(items, dtype=torch.bool),
    )


def test_losses_are_finite_deterministic_and_reach_every_parameter(system: DrugResponse) -> None:
    terms = system.losses(batch_of(), epoch=0.0)
    assert {name for name in terms if not name.startswith("monitor_")} == set(system.loss_weights)
    assert all(torch.isfinite(value) for value in terms.values())
    again = system.losses(batch_of(), epoch=3.0)
    assert all(torch.equal(value, again[name]) for name, value in terms.items())
    (terms["patch"] + terms["spectrum"]).backward()
    assert not [name for name, parameter in system.model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert float(terms["monitor_hidden_share"]) == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize(("share", "whole"), [(1.0, True), (0.0, False)])
def test_tubes_hide_whole_regions(share: float, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    system = new(DrugResponseSettings.model_validate(SETTINGS.model_dump() | {"masking": {"tube_share": share, "ratio": 0.5}}))
    seen = {}
    given = type(system.model.series).reconstruct
    monkeypatch.setattr(
        type(system.model.series), "reconstruct", lambda model, patches, hidden: seen.update(hidden=hidden) or given(model, patches, hidden)
    )
    system.losses(batch_of(), epoch=0.0)
    assert torch.equal(seen["hidden"].any(dim=2), seen["hidden"].all(dim=2)) == whole


def test_statistics_are_of_the_people_given_only() -> None:
    system = SETTINGS.build({"Nine": SETTINGS.remember(ATLAS)})
    series = series_of()
    summary = system.fit_normalisation([pad_windows(series[:3], "Nine", [2.0] * 3), pad_windows(series[3:5], "Nine", [2.0] * 2)])
    spreads = np.stack([np.subtract(*np.percentile(one.astype(float), [75, 25], axis=0)) / 1.349 for one in series[:5]])
    sizes = np.median(spreads, axis=1, keepdims=True)
    expected = np.median(spreads / sizes, axis=0) * np.median(sizes)
    np.testing.assert_allclose(system.model.scaler.get_buffer("spread_Nine"), expected, rtol=1e-4)
    assert summary["Nine"]["scans"] == 5


def test_effective_rank_tells_collapse() -> None:
    torch.manual_seed(0)
    line = torch.randn(30, 1) @ torch.randn(1, 16)
    assert float(objectives.effective_rank(line)) == pytest.approx(1, abs=0.01)
    assert float(objectives.effective_rank(torch.randn(300, 16))) > 14


def test_the_readout_is_cut_to_axes_that_enough_scans_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, series = new(SETTINGS), series_of(items=12)
    scans = [pad_windows(series, "Nine", [2.0] * 12), pad_windows([one[:30] for one in series[:2]], "Nine", [2.0] * 2)]
    whole = embed(system, series)
    system.fit_readout(scans)
    np.testing.assert_array_equal(embed(system, series), whole)  # twelve scans are too few
    monkeypatch.setattr(drug_response, "_FEWEST_HALVED", 12)
    system.fit_readout(scans)  # runs too short to be halved take no part
    kept = embed(system, series)
    assert kept.shape == (12, SETTINGS.readout.axes)
    assert np.isfinite(kept).all()
    np.testing.assert_allclose(embed(system, series[::-1])[::-1], kept, atol=1e-3)
    np.testing.assert_allclose(embed(load_system(save(system, tmp_path / "new")), series), kept, atol=1e-5)  # type: ignore[arg-type]


def test_models_of_before_there_were_axes_are_read(tmp_path: Path) -> None:
    system = new(SETTINGS.model_copy(update={"readout": drug_response.ReadoutSettings(axes=0)}))
    folder = save(system, tmp_path / "old")
    values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    del values["system"]["readout"]
    (folder / "config.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    np.testing.assert_array_equal(embed(load_system(folder), series_of()), embed(system, series_of()))  # type: ignore[arg-type]


def test_half_precision_trains(system: DrugResponse) -> None:
    assert_trains_in_half_precision(system, batch_of())
