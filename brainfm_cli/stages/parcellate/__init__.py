"""``brainfm parcellate``: preprocessed runs to region series and connectivity; the group level packs the cohort."""

from __future__ import annotations

from typing import TYPE_CHECKING

from brainfm_cli.bids.derivatives import OutputDataset, chained_hash
from brainfm_cli.bids.inputs import choose_participants, open_source
from brainfm_cli.stages.parcellate.settings import ParcellateSettings, choose_atlases

if TYPE_CHECKING:
    from brainfm_cli.bids.inputs import Source
    from brainfm_cli.config import Invocation

__all__ = ["ParcellateSettings", "parcellate"]


def parcellate(call: Invocation, settings: ParcellateSettings) -> int:
    """Parcellate participants, or pack the finished ones; gives back the exit code."""
    call = call.model_copy(update={"input_dir": call.input_dir.absolute(), "output_dir": call.output_dir.absolute()})
    if settings.trials:
        from brainfm_cli.stages.parcellate import trials

        return trials.run(call, settings)
    source = open_source(call.input_dir)
    # An atlas or a participant that does not exist ends the run before anything is written.
    choose_atlases(settings, source, call.datasets)
    if source.kind != "cohort":
        choose_participants(source.root, call.selection)
    if call.validate_input:
        from brainfm_cli.programs.validator import validate

        validate(call.input_dir)
    dataset = _open(call, settings, source)
    if call.level == "participant":
        from brainfm_cli.stages.parcellate.participant import run
    else:
        from brainfm_cli.stages.parcellate.group import run
    return run(call, settings, source, dataset)


def _open(call: Invocation, settings: ParcellateSettings, source: Source) -> OutputDataset:
    own = settings.of_participants()
    if call.dry_run:  # a plan writes nothing
        digest = chained_hash("parcellate", own, (source.given,))
        return OutputDataset(root=call.output_dir, command="parcellate", configuration_hash=digest)
    return OutputDataset.open(call.output_dir, command="parcellate", settings=own, sources=(source.given,))
