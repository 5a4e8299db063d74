"""Weights, settings and training state in folders: safetensors and JSON, nothing pickled, whole or absent.

A finished model is ``models/<id>/``: ``model.safetensors``, ``config.yaml`` (from which alone the model is rebuilt),
``normalisation.json``, ``README.md``, ``provenance.json``, ``log.csv``, ``report.html`` and ``checkpoints/``.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import yaml
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from brainfm_cli.bids.cohort import Cohort, CohortAtlas
from brainfm_cli.bids.derivatives import write_bytes
from brainfm_cli.bids.voxel_cohort import VoxelSpace
from brainfm_cli.config import Frozen
from brainfm_cli.documents import parse_yaml, read_json
from brainfm_cli.errors import CheckpointMismatchError, InputDatasetError, InputNotFoundError, InternalError
from brainfm_cli.provenance import file_sha256

MODEL_FORMAT = 1
DONOR = "donor"
"""Folder of a second model in a tuned model's, and name of the block that its embedding gives."""
_WHOLE = "copy the model folder again, provenance.json included"
_FARTHEST_MM = 1.0  # rounding of centres in another file of the same atlas


class AtlasRecord(Frozen):
    """An atlas as a model remembers it."""

    template: str
    """Template of the series the model was trained on."""
    regions: tuple[str, ...]
    """Region names, in order."""
    networks: tuple[str | None, ...] = ()
    """Functional network of each region, empty where unknown."""
    centroids_mm: tuple[tuple[float, float, float], ...] = Field(default=(), exclude_if=lambda value: not value)
    """Centre of each region in template millimetres, for systems that read places; absent where not kept."""

    @classmethod
    def of(cls, atlas: CohortAtlas) -> AtlasRecord:
        """The record of a cohort's atlas."""
        return cls(template=atlas.template, regions=atlas.regions.names, networks=atlas.regions.networks)


class ViewerRecord(Frozen):
    """A participant's voxels as a model remembers them."""

    voxels: int
    """Number of voxels."""
    space: str
    """Label of ``space-``."""
    mask_sha256: str
    """Hash of the mask."""
    order_sha256: str
    """Hash of the mask and the order of its voxels."""

    @classmethod
    def of(cls, space: VoxelSpace) -> ViewerRecord:
        """The record of a cohort's participant."""
        return cls(voxels=space.num_voxels, space=space.space, mask_sha256=space.mask_sha256, order_sha256=space.order_sha256)


class ModelConfig(Frozen):
    """``config.yaml`` of a model folder."""

    format: int = MODEL_FORMAT
    """Version of the folder's layout."""
    system: dict[str, Any]
    """Settings of the system, with its ``kind``."""
    atlases: dict[str, AtlasRecord] = {}
    """Atlases the model knows, by label."""
    pretraining: dict[str, Any] = {}
    """How it was pretrained, from which pretraining can be repeated on other people."""
    added: list[dict[str, Any]] = Field(default=[], exclude_if=lambda value: not value)
    """Atlases that were added to the finished model, and how, in order; absent where there are none."""
    meta: dict[str, Any] = Field(default={}, exclude_if=lambda value: not value)
    """Tasks that a start for prompts and head was meta-learned from; absent where there is none."""
    tuning: dict[str, Any] = {}
    """Target and settings of prompt-tune; empty for a model that was not tuned."""
    alignment: dict[str, Any] = {}
    """Texts that the model was aligned with; empty for a model that knows none."""
    viewers: dict[str, ViewerRecord] = Field(default={}, exclude_if=lambda value: not value)
    """Participants whose voxels the model knows; absent for systems that read regions or volumes."""

    def to_yaml(self) -> str:
        """The configuration as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100)


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """Everything that a training run needs to go on as if it had never stopped."""

    weights: dict[str, Tensor]
    """Parameters and buffers of the trained module."""
    moments: dict[str, Tensor]
    """``<parameter>/<quantity>`` of the optimiser."""
    progress: dict[str, Any]
    """Plain values: epoch, batch, step, best loss, patience, scaler."""
    log: str
    """The log so far, as CSV."""


def read_model_config(model_dir: Path) -> ModelConfig:
    """The configuration of a model folder.

    Raises
    ------
    InputNotFoundError
        The folder or its config.yaml does not exist.
    CheckpointMismatchError
        It is no brainfm model, or of an unknown layout.
    """
    path = model_dir / "config.yaml"
    if not path.is_file():
        raise InputNotFoundError("no model here", where=model_dir, fix="give the path of a models/<id> folder")
    try:
        config = ModelConfig.model_validate(parse_yaml(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValidationError) as error:
        raise CheckpointMismatchError(f"config.yaml is not a brainfm model's: {error}", where=path, fix="give a models/<id> folder") from error  # fmt: skip
    if config.format != MODEL_FORMAT:
        raise CheckpointMismatchError(f"the model has layout {config.format}, not {MODEL_FORMAT}", where=path, fix="use the brainfm version that made it")  # fmt: skip
    return config


def read_provenance(model_dir: Path, *needed: str) -> dict[str, Any]:
    """provenance.json of a model folder: whom the model has seen, and from what it was made; it must have the ``needed`` fields.

    Raises
    ------
    CheckpointMismatchError
        It is absent or unreadable: nobody could say whether test people are new.
    """
    path = model_dir / "provenance.json"
    try:
        values = read_json(path)
        _ = [values[name] for name in needed]
        hashes = [name for name, known in values.items() if name.endswith("_on") and not _are_hashes(known)]
    except (OSError, ValueError, AttributeError, KeyError, TypeError) as error:
        raise CheckpointMismatchError("the model does not say whom it has seen", where=path, fix=_WHOLE) from error
    if hashes:
        raise CheckpointMismatchError(f"the model does not say whom it has seen: '{hashes[0]}' lists no hashes", where=path, fix=_WHOLE)
    return dict(values)


def _are_hashes(known: object) -> bool:
    return isinstance(known, list) and all(isinstance(one, str) for one in known)


def check_atlas(known: Mapping[str, AtlasRecord], atlas: CohortAtlas) -> None:
    """Refuse an atlas that a model was not made for; ``known`` are the model's atlases by label.

    Raises
    ------
    CheckpointMismatchError
        The model does not know the atlas, or knows it with other regions or with regions in other places.
    """
    record = known.get(atlas.label)
    if record is None:
        raise CheckpointMismatchError(
            f"the model does not know atlas {atlas.label}",
            fix=f"parcellate with one of: {', '.join(sorted(known))}; or pretrain with this atlas",
        )
    if record.regions != atlas.regions.names:
        raise CheckpointMismatchError(
            f"atlas {atlas.label} has other regions than the one the model was made for", fix="use the same atlas file for both"
        )
    places = atlas.regions.centroids_mm
    if record.centroids_mm and (places is None or np.abs(np.asarray(record.centroids_mm) - places).max() > _FARTHEST_MM):
        raise CheckpointMismatchError(
            f"atlas {atlas.label} has its regions in other places than the one the model was made for",
            fix="use the same atlas file for both",
        )


def check_viewer(known: Mapping[str, ViewerRecord], space: VoxelSpace) -> None:
    """Refuse responses of a participant or of voxels that a model was not made for; the field that differs is named.

    Raises
    ------
    CheckpointMismatchError
        The model has not seen the participant, or with another mask or order of voxels.
    """
    record = known.get(space.participant)
    if record is None:
        raise CheckpointMismatchError(
            f"the model has never seen participant {space.participant}",
            fix=f"it knows {', '.join(sorted(known))}; tune it for this participant with 'brainfm prompt-tune'",
        )
    for name, what in (("voxels", "number of voxels"), ("mask_sha256", "mask"), ("order_sha256", "order of voxels"), ("space", "space")):
        given = ViewerRecord.of(space)
        if getattr(record, name) != getattr(given, name):
            raise CheckpointMismatchError(
                f"participant {space.participant} has another {what} than the model was made for ({name}: {getattr(given, name)}, not {getattr(record, name)})",
                fix="pack the cohort with the mask that the model was trained with, or train again",
            )


def shared_atlases(known: Mapping[str, AtlasRecord], cohort: Cohort) -> list[str]:
    """The cohort's atlases that a model knows, each checked; sorted.

    Raises
    ------
    CheckpointMismatchError
        There is none, or one has other regions.
    """
    shared = sorted(set(cohort.atlases) & set(known))
    for label in shared or sorted(cohort.atlases)[:1]:
        check_atlas(known, cohort.atlases[label])
    return shared


def model_files(model_dir: Path) -> tuple[Path, ...]:
    """Every file of a model folder whose change changes the model, sorted; refuses a folder that lacks its configuration or provenance."""
    read_model_config(model_dir)
    read_provenance(model_dir)  # before anything is written: what is made from the model says whom it has seen
    folders = [model_dir, *([model_dir / DONOR] if (model_dir / DONOR).is_dir() else [])]
    kinds = {".safetensors", ".yaml", ".json", ".tsv"}
    return tuple(sorted(path for folder in folders for path in folder.iterdir() if path.suffix in kinds))


def source_of_model(model_dir: Path) -> Path:
    """The derivative that a model folder lies in (``OUT`` of ``OUT/models/<id>``), or the folder itself where it was moved."""
    derivative = model_dir.resolve().parent.parent
    return derivative if (derivative / "dataset_description.json").is_file() else model_dir


def copy_backbone(model_dir: Path, folder: Path) -> list[Path]:
    """Copy a model's weights, its normalisation's summary and its meta-learned start where it has them, into another folder; weights first.

    Raises
    ------
    InternalError
        The copy differs from its source.
    """
    weights = write_bytes(folder / "model.safetensors", (model_dir / "model.safetensors").read_bytes())
    if file_sha256(weights) != file_sha256(model_dir / "model.safetensors"):
        raise InternalError("the copy of the backbone differs from its source", where=weights, fix="check the disk, then run again")
    others = [path for name in ("normalisation.json", "meta.safetensors") if (path := model_dir / name).is_file()]
    return [weights, *(write_bytes(folder / path.name, path.read_bytes()) for path in others)]


def load_weights(module: nn.Module, path: Path, *, beside: Mapping[str, Tensor] = MappingProxyType({})) -> None:
    """Fill a module's parameters and buffers from a safetensors file, and ``beside`` it; every name and shape must fit.

    Raises
    ------
    InputNotFoundError
        The file does not exist.
    CheckpointMismatchError
        The file is damaged or belongs to another model.
    """
    tensors = {**beside, **read_tensors(path)}
    own = module.state_dict()
    missing, extra = sorted(set(own) - set(tensors)), sorted(set(tensors) - set(own))
    shapes = [name for name in own if name in tensors and own[name].shape != tensors[name].shape]
    if missing or extra or shapes:
        examples = ", ".join([*missing, *extra, *shapes][:3])
        raise CheckpointMismatchError(
            f"the weights do not fit the model ({len(missing)} missing, {len(extra)} unknown, {len(shapes)} of another shape: {examples})",
            where=path,
            fix="config.yaml and model.safetensors must come from the same model folder",
        )
    module.load_state_dict(tensors)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU."""
    try:
        return load_file(path)
    except FileNotFoundError as error:
        raise InputNotFoundError("the weights are absent", where=path, fix="give a complete models/<id> folder") from error
    except (OSError, SafetensorError) as error:
        raise CheckpointMismatchError(f"the weights are unreadable: {error}", where=path, fix="copy the model folder again") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> Path:
    """Write tensors atomically; the same values give the same bytes."""
    # through bytes: save_file makes files that only their owner may read, which a shared model folder must not have
    return write_bytes(path, save({name: tensor.detach().cpu().contiguous().clone() for name, tensor in sorted(tensors.items())}))


def optimiser_moments(optimiser: torch.optim.Optimizer, names: Mapping[int, str]) -> dict[str, Tensor]:
    """The optimiser's per-parameter state as flat tensors; ``names`` maps ``id(parameter)`` to its name."""
    moments = {}
    for parameter, state in optimiser.state.items():
        for quantity, value in state.items():
            moments[f"{names[id(parameter)]}/{quantity}"] = torch.as_tensor(value)
    return moments


def restore_moments(optimiser: torch.optim.Optimizer, names: Mapping[int, str], moments: Mapping[str, Tensor]) -> None:
    """Put flat tensors back as the optimiser's state."""
    by_name = {names[id(p)]: p for group in optimiser.param_groups for p in group["params"]}
    fused = any(group.get("fused") for group in optimiser.param_groups)
    for key, value in moments.items():
        name, _, quantity = key.rpartition("/")
        parameter = by_name[name]
        # 'step' stays on the CPU unless the fused kernel counts on the device
        device = parameter.device if quantity != "step" or fused else torch.device("cpu")
        optimiser.state[parameter][quantity] = value.to(device).clone()


def save_state(folder: Path, name: str, state: TrainingState) -> Path:
    """Write ``folder/name`` as a whole, then remove older states."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{name}.{os.getpid()}.{secrets.token_hex(4)}.part"
    temporary.mkdir()
    write_tensors(temporary / "model.safetensors", state.weights)
    write_tensors(temporary / "optimiser.safetensors", state.moments)
    (temporary / "log.csv").write_text(state.log, encoding="utf-8")
    (temporary / "progress.json").write_text(json.dumps(state.progress, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    final = folder / name
    if final.exists():
        shutil.rmtree(final)
    temporary.replace(final)
    for other in folder.iterdir():
        if other.is_dir() and other.name != name and (other.name.startswith(("step-", ".step-"))):
            shutil.rmtree(other, ignore_errors=True)
    return final


def newest_state(folder: Path) -> TrainingState | None:
    """The newest complete state in ``folder``; none where there is none.

    Raises
    ------
    InputDatasetError
        It is damaged.
    """
    states = sorted(path for path in folder.glob("step-*") if (path / "progress.json").is_file()) if folder.is_dir() else []
    if not states:
        return None
    newest = states[-1]
    try:
        return TrainingState(
            weights=read_tensors(newest / "model.safetensors"),
            moments=read_tensors(newest / "optimiser.safetensors"),
            progress=read_json(newest / "progress.json"),
            log=(newest / "log.csv").read_text(encoding="utf-8"),
        )
    except (OSError, ValueError, CheckpointMismatchError, InputNotFoundError) as error:
        raise InputDatasetError(
            f"the state of an unfinished training is damaged: {error}", where=newest, fix="delete this folder; training starts anew"
        ) from error
