"""``brainfm preprocess``: raw BIDS to fMRIPrep-named derivatives; the group level sums up their quality."""

from __future__ import annotations

from typing import TYPE_CHECKING

from brainfm_cli.bids.raw import check_raw_dataset
from brainfm_cli.programs.fmriprep import check_options
from brainfm_cli.stages.preprocess.settings import PreprocessSettings

if TYPE_CHECKING:
    from brainfm_cli.config import Invocation

__all__ = ["PreprocessSettings", "preprocess"]


def preprocess(call: Invocation, settings: PreprocessSettings) -> int:
    """Preprocess participants, or sum up the finished ones; gives back the exit code."""
    call = call.model_copy(update={"input_dir": call.input_dir.absolute(), "output_dir": call.output_dir.absolute()})
    settings = PreprocessSettings.from_values({**settings.model_dump(), "options": (*settings.options, *call.passthrough)})
    check_options(settings.options)
    check_raw_dataset(call.input_dir)
    if call.validate_input:
        from brainfm_cli.programs.validator import validate

        validate(call.input_dir)
    if call.level == "group":
        from brainfm_cli.stages.preprocess.group import summarise

        return summarise(call, settings)
    if settings.engine == "embedded":
        from brainfm_cli.stages.preprocess import embedded

        return embedded.preprocess_participants(call, settings)
    from brainfm_cli.stages.preprocess import external

    return external.preprocess_participants(call, settings)
