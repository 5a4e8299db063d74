"""Model folders and training states: what does not fit is named, what is written is whole."""

from __future__ import annotations

import json
import stat
from typing import TYPE_CHECKING

import pytest
import torch
import yaml
from torch import nn

from brainfm_cli.errors import CheckpointMismatchError, InputDatasetError, InputNotFoundError
from brainfm_cli.learning.checkpoints import (
    AtlasRecord,
    ModelConfig,
    TrainingState,
    load_weights,
    model_files,
    newest_state,
    optimiser_moments,
    read_model_config,
    read_tensors,
    restore_moments,
    save_state,
    source_of_model,
    write_tensors,
)

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = ModelConfig(
    system={"kind": "brain-graph", "preset": "tiny"},
    atlases={"Toy": AtlasRecord(template="t", regions=("left", "Région ü"), networks=("Vis", None))},
    pretraining={"epochs": 3, "where": {"split": ["discovery"]}},
)


def module(width: int = 3) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, width), nn.BatchNorm1d(width))
    net.register_buffer("mean", torch.arange(4.0))
    return net


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG.to_yaml(), encoding="utf-8")
    write_tensors(folder / "model.safetensors", module().state_dict())
    return folder


def test_weights_and_config_come_back(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "models" / "one")
    other = module()
    with torch.no_grad():
        for value in other.state_dict().values():
            value.zero_()
    load_weights(other, folder / "model.safetensors")
    expected = module().state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in other.state_dict().items())
    assert read_model_config(folder) == CONFIG
    assert read_model_config(folder).atlases["Toy"].regions == ("left", "Région ü")


def test_the_same_values_give_the_same_bytes_and_everybody_may_read_them(tmp_path: Path) -> None:
    tensors = module().state_dict()
    shuffled = dict(reversed(list(tensors.items())))
    shuffled["0.weight"] = shuffled["0.weight"].T.contiguous().T  # another layout in memory
    one, two = write_tensors(tmp_path / "a", tensors), write_tensors(tmp_path / "b", shuffled)
    assert one.read_bytes() == two.read_bytes()
    (tmp_path / "plain").write_text("as any file")
    assert stat.S_IMODE(one.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    shared = torch.randn(3)
    back = read_tensors(write_tensors(tmp_path / "shared", {"x": shared, "y": shared, "z": shared[1:]}))
    assert torch.equal(back["y"], shared)
    assert torch.equal(back["z"], shared[1:])


def test_absent_models_are_not_found(tmp_path: Path) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(InputNotFoundError, match="no model here"):
            read_model_config(folder)
    with pytest.raises(InputNotFoundError, match="weights are absent"):
        read_tensors(tmp_path / "model.safetensors")


FOREIGN = {
    "a list": "- 1\n- 2\n",
    "empty": "",
    "another program's": "model_type: bert\nhidden_size: 768\n",
    "no YAML": "a: [1, 2\n",
    "a wrong value": "system: brain-graph\natlases: {}\n",
    "a wrong atlas": "system: {kind: brain-graph}\natlases: {Toy: {regions: 3}}\n",
}


@pytest.mark.parametrize("what", FOREIGN)
def test_foreign_configurations_are_named(tmp_path: Path, what: str) -> None:
    (tmp_path / "config.yaml").write_text(FOREIGN[what])
    with pytest.raises(CheckpointMismatchError, match="not a brainfm model's") as error:
        read_model_config(tmp_path)
    assert error.value.exit_code == 65


def test_binary_configurations_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(CheckpointMismatchError, match="not a brainfm model's"):
        read_model_config(tmp_path)


def test_another_layout_is_named(tmp_path: Path) -> None:
    values = yaml.safe_load(CONFIG.to_yaml()) | {"format": 2}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(CheckpointMismatchError, match="layout 2, not 1"):
        read_model_config(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_weights_are_named(tmp_path: Path, keep: int) -> None:
    path = write_tensors(tmp_path / "model.safetensors", module().state_dict())
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointMismatchError, match="unreadable"):
        load_weights(module(), path)


def test_pickled_and_text_weights_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    torch.save(module().state_dict(), path)
    with pytest.raises(CheckpointMismatchError, match="unreadable"):
        read_tensors(path)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n")
    with pytest.raises(CheckpointMismatchError, match="unreadable"):
        read_tensors(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointMismatchError, match="unreadable"):
        read_tensors(path)


def test_weights_of_another_model_are_named_and_change_nothing(tmp_path: Path) -> None:
    own = module()
    before = {name: value.clone() for name, value in own.state_dict().items()}
    faults = {
        "0 missing, 0 unknown, 6 of another shape": module(4).state_dict(),
        "1 missing, 0 unknown, 0 of": {name: value for name, value in before.items() if name != "mean"},
        "0 missing, 1 unknown, 0 of": before | {"extra": torch.ones(1)},
    }
    for place, (message, tensors) in enumerate(faults.items()):
        path = write_tensors(tmp_path / f"{place}.safetensors", tensors)
        with pytest.raises(CheckpointMismatchError, match=message):
            load_weights(own, path)
    assert all(torch.equal(value, before[name]) for name, value in own.state_dict().items())


def test_files_of_a_model_are_those_whose_change_changes_it(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "out" / "models" / "one")
    for name in ("provenance.json", "held_out.tsv", "README.md", "report.html", "log.csv"):
        (folder / name).write_text("{}")
    assert [path.name for path in model_files(folder)] == ["config.yaml", "held_out.tsv", "model.safetensors", "provenance.json"]
    assert source_of_model(folder) == folder  # moved out of its derivative
    (tmp_path / "out" / "dataset_description.json").write_text("{}")
    assert source_of_model(folder) == tmp_path / "out"


def test_moments_come_back(tmp_path: Path) -> None:
    def trained(steps: int, moments: dict[str, torch.Tensor] | None = None, weights: dict[str, torch.Tensor] | None = None) -> tuple:
        net = nn.Linear(3, 2)
        torch.manual_seed(1)
        if weights is None:
            nn.init.normal_(net.weight)
            nn.init.zeros_(net.bias)
        else:
            net.load_state_dict(weights)
        names = {id(parameter): name for name, parameter in net.named_parameters()}
        optimiser = torch.optim.AdamW(net.parameters(), lr=0.1)
        if moments is not None:
            restore_moments(optimiser, names, moments)
        for _ in range(steps):
            net(torch.ones(4, 3)).square().sum().backward()
            optimiser.step()
            optimiser.zero_grad()
        return net.state_dict(), optimiser_moments(optimiser, names)

    through, _ = trained(5)
    weights, moments = trained(3)
    assert set(moments) == {f"{name}/{what}" for name in ("weight", "bias") for what in ("step", "exp_avg", "exp_avg_sq")}
    stored = read_tensors(write_tensors(tmp_path / "moments", moments))
    resumed, _ = trained(2, stored, weights)
    assert all(torch.equal(value, through[name]) for name, value in resumed.items())
    forgotten, _ = trained(2, None, weights)
    assert not torch.equal(forgotten["weight"], through["weight"])


def state(step: int) -> TrainingState:
    return TrainingState(
        weights={"w": torch.full((2,), float(step))}, moments={"w/step": torch.tensor(step)}, progress={"position": {"step": step}}, log="kind,step\n"
    )  # fmt: skip


def test_the_newest_whole_state_is_found_and_older_ones_go(tmp_path: Path) -> None:
    assert newest_state(tmp_path / "nowhere") is None
    assert newest_state(tmp_path) is None
    for step in (9, 10, 100):
        save_state(tmp_path, f"step-{step:08d}-0000", state(step))
    (tmp_path / ".step-00000200-0000.1.x.part").mkdir()  # a killed process's
    (tmp_path / "step-00000300-0000").mkdir()  # removed half-way
    (tmp_path / "best-0001.safetensors").write_bytes(b"kept")
    found = newest_state(tmp_path)
    assert found is not None
    assert found.progress == {"position": {"step": 100}}
    assert torch.equal(found.weights["w"], torch.full((2,), 100.0))
    save_state(tmp_path, "step-00000400-0001", state(400))
    save_state(tmp_path, "step-00000400-0001", state(401))  # the same name again
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best-0001.safetensors", "step-00000400-0001"]
    found = newest_state(tmp_path)
    assert found is not None
    assert found.progress == {"position": {"step": 401}}


@pytest.mark.parametrize(
    ("name", "keep"),
    [("model.safetensors", None), ("model.safetensors", 40), ("optimiser.safetensors", None), ("optimiser.safetensors", 0), ("progress.json", 9), ("log.csv", None)],
)  # fmt: skip
def test_a_damaged_state_is_named(tmp_path: Path, name: str, keep: int | None) -> None:
    folder = save_state(tmp_path, "step-00000001-0000", state(1))
    content = (folder / name).read_bytes()
    (folder / name).unlink()
    if keep is not None:
        (folder / name).write_bytes(content[:keep])
    with pytest.raises(InputDatasetError, match="unfinished training is damaged") as error:
        newest_state(tmp_path)
    assert error.value.where is not None
    assert str(error.value.where).endswith("step-00000001-0000")


def test_nothing_is_pickled(tmp_path: Path) -> None:
    folder = save_state(tmp_path, "step-00000001-0000", state(1))
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json", ".csv"}
    assert json.loads((folder / "progress.json").read_text()) == {"position": {"step": 1}}
