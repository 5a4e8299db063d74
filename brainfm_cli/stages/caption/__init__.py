"""caption: participant lets a model speak; group scores what it said beside floors. Each kind of model has its own module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from brainfm_cli.errors import UnsupportedStageError, UsageError
from brainfm_cli.learning.checkpoints import read_model_config
from brainfm_cli.learning.device import choose_device
from brainfm_cli.stages.caption.studies import StudyCaptionSettings, caption_studies
from brainfm_cli.stages.caption.viewing import CaptionSettings, caption_viewing

if TYPE_CHECKING:
    from brainfm_cli.config import Invocation

__all__ = ["CaptionSettings", "StudyCaptionSettings", "caption"]


def caption(call: Invocation) -> int:
    """Speak or score, with the settings of the model's system; gives back the exit code."""
    if call.model is None:
        raise UsageError("caption needs a model", fix="give --model OUT/models/<id> of 'brainfm align'")
    choose_device(call.execution.device)
    kind = read_model_config(call.model).system.get("kind")
    if kind == "brain-caption":
        return caption_viewing(call, call.model, CaptionSettings.read(call.config, call.overrides))
    if kind == "mri-language":
        return caption_studies(call, call.model, StudyCaptionSettings.read(call.config, call.overrides))
    raise UnsupportedStageError(
        f"{kind} models have no captions", where=call.model, fix="caption takes models of brain-caption and mri-language"
    )
