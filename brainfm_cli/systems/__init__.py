"""The systems: thin assemblies that choose parts and wire losses. They never import one another."""

from __future__ import annotations

from pathlib import Path

from brainfm_cli.errors import CheckpointMismatchError
from brainfm_cli.learning.checkpoints import read_model_config
from brainfm_cli.systems.brain_graph import BrainGraph, BrainGraphSettings

# Add a system here: one more member of both, joined with "|" as Annotated[A | B, Field(discriminator="kind")].
SystemSettings = BrainGraphSettings
System = BrainGraph

_LOADERS = {"brain-graph": BrainGraph.load}


def load_system(model_dir: Path) -> System:
    """The model of a ``models/<id>`` folder, rebuilt from the folder alone.

    Raises
    ------
    InputNotFoundError
        There is no model.
    CheckpointMismatchError
        The folder holds no brainfm model, a damaged one, or one of an unknown system.
    """
    kind = read_model_config(model_dir).system.get("kind")
    if kind not in _LOADERS:
        raise CheckpointMismatchError(f"the model's system '{kind}' is unknown", where=model_dir, fix=f"known: {', '.join(_LOADERS)}")
    return _LOADERS[kind](model_dir)
