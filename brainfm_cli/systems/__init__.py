"""The systems: thin assemblies that choose parts and wire losses. They never import one another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field

from brainfm_cli.errors import CheckpointMismatchError, UnsupportedStageError
from brainfm_cli.learning.checkpoints import read_model_config
from brainfm_cli.learning.joined import DONOR, Joined, join
from brainfm_cli.systems.brain_caption import BrainCaptionSettings
from brainfm_cli.systems.brain_graph import BrainGraph, BrainGraphSettings
from brainfm_cli.systems.drug_response import DrugResponse, DrugResponseSettings
from brainfm_cli.systems.mri_language import MriLanguageSettings

# Add a system here: one more member of both unions, and its kind.
SystemSettings = Annotated[
    BrainGraphSettings | DrugResponseSettings | BrainCaptionSettings | MriLanguageSettings, Field(discriminator="kind")
]
System = BrainGraph | DrugResponse | Joined

_KNOWN: dict[str, tuple[type[BrainGraphSettings | DrugResponseSettings], type[BrainGraph | DrugResponse]]] = {
    "brain-graph": (BrainGraphSettings, BrainGraph),
    "drug-response": (DrugResponseSettings, DrugResponse),
}


def read_system_settings(model_dir: Path) -> BrainGraphSettings | DrugResponseSettings:
    """Settings of the system of a ``models/<id>`` folder.

    Raises
    ------
    CheckpointMismatchError
        The system is unknown.
    """
    values = read_model_config(model_dir).system
    return _known(model_dir)[0].from_values(values, where=model_dir / "config.yaml")


def load_system(model_dir: Path) -> System:
    """The model of a ``models/<id>`` folder, rebuilt from the folder alone, its donor included where it has one.

    Raises
    ------
    InputNotFoundError
        There is no model.
    CheckpointMismatchError
        The folder holds no brainfm model, a damaged one, or one of an unknown system.
    """
    system = _known(model_dir)[1].load(model_dir)
    donor = model_dir / DONOR
    return join(system, load_system(donor)) if donor.is_dir() else system


def _known(model_dir: Path) -> tuple[type[BrainGraphSettings | DrugResponseSettings], type[BrainGraph | DrugResponse]]:
    kind = read_model_config(model_dir).system.get("kind")
    if kind == "brain-caption":  # reads voxels, not regions: its stages have loaders of their own
        raise UnsupportedStageError(
            "brain-caption models are aligned, tuned and asked for captions", where=model_dir, fix="use: align, prompt-tune, caption"
        )
    if kind == "mri-language":
        raise UnsupportedStageError("mri-language models read scans, not packed regions", where=model_dir, fix="use: prompt-tune, predict")
    if kind not in _KNOWN:
        raise CheckpointMismatchError(f"the model's system '{kind}' is unknown", where=model_dir, fix=f"known: {', '.join(_KNOWN)}")
    return _KNOWN[kind]
