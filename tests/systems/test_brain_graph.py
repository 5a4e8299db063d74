"""The brain-graph system: what it refuses, its random twin, embeddings, losses, groups for the head."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from brainfm_cli.bids.cohort import CohortAtlas
from brainfm_cli.errors import CheckpointMismatchError, InputNotFoundError, SettingsError, UnsupportedStageError
from brainfm_cli.learning.attributions import ExplanationSettings
from brainfm_cli.learning.checkpoints import AtlasRecord, ModelConfig, write_tensors
from brainfm_cli.learning.explanation import attribute_run
from brainfm_cli.learning.samples import PretrainBatch, pad_windows
from brainfm_cli.records import RegionTable
from brainfm_cli.systems import load_system
from brainfm_cli.systems.brain_graph import PRESETS, BrainGraph, BrainGraphSettings
from tests.systems.half_precision import assert_trains_in_half_precision

if TYPE_CHECKING:
    from pathlib import Path

SETTINGS = BrainGraphSettings(kind="brain-graph", preset="tiny", width=16, num_heads=2, feedforward=24, num_blocks=1, input_width=24)
REGIONS = {"Nine": 9, "Twelve": 12}
ATLASES = {
    "Nine": AtlasRecord(template="t", regions=tuple(f"n{r}" for r in range(9))),
    "Twelve": AtlasRecord(template="t", regions=tuple(f"t{r}" for r in range(12)), networks=("Vis", "Def", None) * 4),
}


def series_of(atlas: str, items: int = 6, frames: int = 70, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    mixing = rng.normal(size=(REGIONS[atlas], REGIONS[atlas]))
    return [(rng.normal(size=(frames + item, REGIONS[atlas])) @ mixing).astype(np.float32) for item in range(items)]


def windows_of(atlas: str, **kwargs: int):
    series = series_of(atlas, **kwargs)
    return pad_windows(series, atlas, [2.0] * len(series))


@pytest.fixture
def system() -> BrainGraph:
    torch.manual_seed(0)
    system = SETTINGS.build(ATLASES)
    system.fit_normalisation([windows_of("Nine"), windows_of("Twelve")])
    system.model.eval()
    return system


def save(system: BrainGraph, folder: Path) -> Path:
    folder.mkdir(parents=True)
    config = ModelConfig(system=system.settings.model_dump(mode="json"), atlases=system.atlases)
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    write_tensors(folder / "model.safetensors", system.model.state_dict())
    return folder


def test_a_saved_model_is_rebuilt_from_its_folder(system: BrainGraph, tmp_path: Path) -> None:
    loaded = load_system(save(system, tmp_path / "model"))
    assert loaded.settings == system.settings
    assert loaded.atlases == system.atlases
    assert not loaded.model.training
    for atlas in REGIONS:
        np.testing.assert_array_equal(loaded.embed(series_of(atlas), atlas), system.embed(series_of(atlas), atlas))


def test_what_is_no_such_model_is_refused(system: BrainGraph, tmp_path: Path) -> None:
    with pytest.raises(InputNotFoundError, match="no model here"):
        load_system(tmp_path)
    folder = save(system, tmp_path / "model")
    text = (folder / "config.yaml").read_text()
    for old, new, error, message in (
        ("kind: brain-graph", "kind: brain-unknown", CheckpointMismatchError, "system 'brain-unknown' is unknown"),
        ("width: 16", "width: 32", CheckpointMismatchError, "do not fit the model"),
        ("    - n8\n", "", CheckpointMismatchError, "do not fit the model"),
        ("preset: tiny", "preset: huge", SettingsError, "preset"),
    ):
        assert old in text
        (folder / "config.yaml").write_text(text.replace(old, new, 1))
        with pytest.raises(error, match=message):
            load_system(folder)


def atlas_of(label: str, names: tuple[str, ...]) -> CohortAtlas:
    return CohortAtlas(label=label, regions=RegionTable(names=names), template="t")


def test_other_regions_and_unknown_atlases_are_refused(system: BrainGraph) -> None:
    names = ATLASES["Nine"].regions
    system.check_atlas(atlas_of("Nine", names))
    with pytest.raises(CheckpointMismatchError, match="does not know atlas Ten") as error:
        system.check_atlas(atlas_of("Ten", names))
    assert "Nine, Twelve" in str(error.value)
    for other in (names[:-1], names[::-1], (*names[:-1], "m8")):
        with pytest.raises(CheckpointMismatchError, match="other regions than"):
            system.check_atlas(atlas_of("Nine", other))


def test_an_atlas_wider_than_the_projection_is_refused() -> None:
    narrow = BrainGraphSettings(kind="brain-graph", preset="tiny", input_width=16)
    with pytest.raises(SettingsError, match=r"Twelve has 12 regions") as error:
        narrow.build(ATLASES)
    assert "system.input_width=17" in str(error.value)
    BrainGraphSettings(kind="brain-graph", preset="tiny", input_width=17).build(ATLASES)


def test_sizes_of_a_preset_can_be_overridden() -> None:
    assert BrainGraphSettings(kind="brain-graph").shape == PRESETS["base"]
    own = BrainGraphSettings(kind="brain-graph", preset="small", dropout=0.0, num_layers=3).shape
    assert own == replace(PRESETS["small"], dropout=0.0, num_layers=3)
    with pytest.raises(ValidationError, match="not a multiple of num_heads"):
        BrainGraphSettings(kind="brain-graph", preset="tiny", width=66)


def test_the_random_twin_keeps_statistics_and_changes_weights(system: BrainGraph) -> None:
    before = {name: value.clone() for name, value in system.model.state_dict().items()}
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    twin, again, other = system.randomised(1), system.randomised(1), system.randomised(2)
    assert torch.equal(torch.rand(2), expected)  # the caller's random numbers go on undisturbed
    assert all(torch.equal(value, before[name]) for name, value in system.model.state_dict().items())
    state = twin.model.state_dict()
    kept = [name for name in state if name.startswith("standardiser.")]
    assert len(kept) == 4
    assert all(torch.equal(state[name], before[name]) for name in kept)
    matrices = [name for name, value in state.items() if value.ndim == 2 and not name.endswith("edge_bias") and name not in kept]
    assert not any(torch.equal(state[name], before[name]) for name in matrices)
    assert all(torch.equal(value, state[name]) for name, value in again.model.state_dict().items())
    assert not torch.equal(other.model.encoder.projection.weight, twin.model.encoder.projection.weight)
    assert not twin.model.training


def test_embedding_is_deterministic_and_free_of_order_and_batches(system: BrainGraph) -> None:
    series = series_of("Nine")
    first = system.embed(series, "Nine")
    assert first.shape == (6, 32)
    assert first.dtype == np.float32
    np.testing.assert_array_equal(system.embed(series, "Nine"), first)
    np.testing.assert_allclose(system.embed(series[::-1], "Nine")[::-1], first, atol=1e-5)
    np.testing.assert_allclose(system.embed(series, "Nine", batch_size=1), first, atol=1e-5)
    system.model.train()
    np.testing.assert_allclose(system.embed(series, "Nine"), first, atol=1e-6)
    assert system.model.training  # as it was


def test_embedding_ignores_units_of_the_series(system: BrainGraph) -> None:
    series = series_of("Nine")
    np.testing.assert_allclose(system.embed([5 * one + 300 for one in series], "Nine"), system.embed(series, "Nine"), atol=1e-2)
    assert np.abs(system.embed(series_of("Nine", seed=3), "Nine") - system.embed(series, "Nine")).max() > 0.1


def test_statistics_leave_absent_regions_out() -> None:
    torch.manual_seed(0)
    system = SETTINGS.build(ATLASES)
    series = series_of("Nine")
    whole = np.stack([np.arctanh(np.corrcoef(one.astype(float), rowvar=False) - np.eye(9)) for one in series])
    for one in series[:2]:
        one[:, 4] = np.nan
    for one in series[1:]:
        one[:, 7] = 3.0  # constant: one scan has it
    summary = system.fit_normalisation([pad_windows(series[:4], "Nine", [2.0] * 4), pad_windows(series[4:], "Nine", [2.0] * 2)])
    mean, scale = (system.model.standardiser.get_buffer(f"{what}_Nine").numpy() for what in ("mean", "scale"))
    np.testing.assert_allclose(mean[0, 1], whole[:, 0, 1].mean(), atol=1e-5)
    np.testing.assert_allclose(mean[0, 4], whole[2:, 0, 4].mean(), atol=1e-5)
    np.testing.assert_allclose(scale[0, 4], whole[2:, 0, 4].std(), atol=1e-5)
    assert not mean[7].any()  # one scan tells no mean
    assert (scale[7] == 1).all()
    assert summary["Nine"]["scans"] == 6
    plain = SETTINGS.model_copy(update={"graph": SETTINGS.graph.model_copy(update={"standardise": False})}).build(ATLASES)
    assert plain.fit_normalisation([windows_of("Nine")]) == {}


def batch_of(*, crossed: bool = True, items: int = 6) -> PretrainBatch:
    rows = torch.tensor([0, 2, 3])
    return PretrainBatch(
        first=windows_of("Nine", items=items),
        second=windows_of("Nine", items=items, seed=1),
        crossed=crossed,
        other=windows_of("Twelve", items=3) if crossed else None,
        other_rows=rows if crossed else torch.tensor([], dtype=torch.int64),
        keys=torch.arange(items) + 1000,
        dataset=torch.zeros(items, dtype=torch.int64),
        participant=torch.arange(items),
        counted=torch.ones(items, dtype=torch.bool),
    )


def test_losses_are_finite_deterministic_and_reach_every_parameter(system: BrainGraph) -> None:
    # a bias that is zero is multiplied by what it waits for: gradients exist from the start
    terms = system.losses(batch_of(), epoch=0.0)
    assert {name for name in terms if not name.startswith("monitor_")} == set(system.loss_weights)
    assert all(torch.isfinite(value) for value in terms.values())
    again = system.losses(batch_of(), epoch=0.0)
    assert all(torch.equal(value, again[name]) for name, value in terms.items())
    sum(system.loss_weights[name] * value for name, value in terms.items() if name in system.loss_weights).backward()  # type: ignore[union-attr]
    without = {name for name, parameter in system.model.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    # the other atlas is encoded, not reconstructed
    assert without == {"decoder.columns.Twelve", "decoder.offset.Twelve"}


def test_hidden_share_follows_the_epoch(system: BrainGraph) -> None:
    for epoch, share in ((0.0, 3 / 9), (100.0, 4 / 9), (float("inf"), 4 / 9)):  # 0.3 · 9 rounds to 3, 0.5 · 9 to 4
        assert float(system.losses(batch_of(), epoch=epoch)["monitor_hidden_share"]) == pytest.approx(share)


def test_the_cross_atlas_term_is_where_the_plan_asks_for_it(system: BrainGraph) -> None:
    assert "cross_atlas" not in system.losses(batch_of(crossed=False), epoch=0.0)
    nobody = replace(batch_of(), other=None, other_rows=torch.tensor([], dtype=torch.int64))
    term = system.losses(nobody, epoch=0.0)["cross_atlas"]
    assert float(term.detach()) == 0
    off = SETTINGS.model_copy(update={"losses": SETTINGS.losses.model_copy(update={"cross_atlas": 0.0})}).build(ATLASES)
    assert "cross_atlas" not in off.losses(batch_of(), epoch=0.0)
    assert off.cross_atlas_probability == 0


def test_scans_without_the_other_atlas_take_no_part(system: BrainGraph) -> None:
    vectors, valid = system._other_atlas(batch_of(), torch.zeros(6, system.model.contrast.layers[-1].out_features))
    assert valid.tolist() == [True, False, True, True, False, False]
    expected = system.model.contrast(system.model.encode(system.graphs(windows_of("Twelve", items=3))).readout)
    torch.testing.assert_close(vectors[valid], expected)
    assert not vectors[~valid].any()


def test_masks_depend_on_the_scan_not_on_its_batch(system: BrainGraph) -> None:
    """The node loss of two half batches, both equally masked, averages to that of the whole."""
    whole = batch_of(crossed=False)

    def part(rows: slice) -> PretrainBatch:
        windows = {
            name: replace(one, series=one.series[rows], frames=one.frames[rows], seconds=one.seconds[rows])
            for name, one in (("first", whole.first), ("second", whole.second))
        }
        own = {name: getattr(whole, name)[rows] for name in ("keys", "dataset", "participant", "counted")}
        return replace(whole, **windows, **own)

    halves = [float(system.losses(part(rows), epoch=0.0)["node"].detach()) for rows in (slice(0, 3), slice(3, 6))]
    assert float(system.losses(whole, epoch=0.0)["node"].detach()) == pytest.approx(np.mean(halves), rel=1e-5)


def test_the_head_reads_networks_or_clusters(system: BrainGraph) -> None:
    networks = system.connectivity_blocks(windows_of("Twelve"))
    assert networks["groups"].shape == (6, 3)  # two networks: within, between, within
    clusters = system.connectivity_blocks(windows_of("Nine"))
    assert clusters["groups"].shape == (6, 6)  # √9 clusters
    assert clusters["edges"].shape == (6, 36)
    unfitted = SETTINGS.build(ATLASES)
    assert set(unfitted.connectivity_blocks(windows_of("Nine"))) == {"edges", "edges_log"}


def test_half_precision_trains_on_the_same_graphs(system: BrainGraph) -> None:
    # which edges there are must not depend on the precision of the encoder
    assert_trains_in_half_precision(system, batch_of(), exactly=["monitor_edge_density", "monitor_hidden_share"])
    windows = windows_of("Nine")
    with torch.autocast("cpu", torch.bfloat16):
        half = system.graphs(windows)
    assert torch.equal(half.features, system.graphs(windows).features)


@pytest.mark.parametrize("connectivity", ["fisher-z", "pearson"])
def test_an_explanation_reads_what_the_head_reads(connectivity: str) -> None:
    torch.manual_seed(0)
    graph = {"graph": {"connectivity": connectivity}}
    system = BrainGraphSettings.model_validate(SETTINGS.model_dump() | graph).build(ATLASES)
    system.fit_normalisation([windows_of("Twelve")])
    system.model.eval()
    windows, prompt = windows_of("Twelve", items=1), system.new_prompt("Twelve")
    given = system.modalities(windows)
    blocks = system.blocks_of({name: one.values for name, one in given.items()}, windows, prompt)
    expected = system.connectivity_blocks(windows) | {"embedding": system.read(system.graphs(windows), prompt)}
    assert blocks.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(blocks[name], values, msg=name)


def test_attributions_add_up_and_find_the_regions_that_a_head_reads(system: BrainGraph) -> None:
    windows, prompt = windows_of("Twelve", items=1), system.new_prompt("Twelve")
    read = {name: values.shape[1] for name, values in system.connectivity_blocks(windows).items()}
    weights = {name: np.zeros((width, 1)) for name, width in read.items()} | {"embedding": np.ones((32, 1))}
    settings = ExplanationSettings(steps=32, most_steps=256)
    head = SimpleNamespace(slope=1.0, weights=weights)
    parts, _, change, gap, _ = attribute_run(system, windows, prompt.state_dict(), head, "zero", settings)  # type: ignore[arg-type]
    assert gap < settings.tolerance
    assert float(parts["connectivity"].sum()) == pytest.approx(change, rel=settings.tolerance)
    rows, columns = np.triu_indices(12, k=1)
    one_edge = ((rows == 2) & (columns == 7)).astype(float)[:, None]
    head = SimpleNamespace(slope=1.0, weights=weights | {"edges": one_edge, "embedding": np.zeros((32, 1))})
    parts, *_ = attribute_run(system, windows, prompt.state_dict(), head, "zero", settings)  # type: ignore[arg-type]
    by_region = parts["connectivity"][0].abs().sum(dim=0)
    assert set(by_region.nonzero().flatten().tolist()) == {2, 7}
    head = SimpleNamespace(slope=1.0, weights={"donor": np.ones((3, 1))})
    with pytest.raises(UnsupportedStageError, match="'donor'"):
        attribute_run(system, windows, prompt.state_dict(), head, "zero", settings)  # type: ignore[arg-type]
