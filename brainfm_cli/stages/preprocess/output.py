"""The output dataset of ``brainfm preprocess``: ours, with fMRIPrep named beside us where it did the work."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from brainfm_cli.bids.derivatives import OutputDataset, chained_hash, write_text
from brainfm_cli.bids.names import BIDSIGNORE

if TYPE_CHECKING:
    from brainfm_cli.config import Invocation
    from brainfm_cli.stages.preprocess.settings import PreprocessSettings

# As in fMRIPrep's own .bidsignore, which ours takes the place of, and what the validator of today does not know.
_IGNORED = """\
*.surf.gii
*_bold.func.gii
*_mixing.tsv
*_dwiref.*
.work
"""
_TEMPLATEFLOW = "https://github.com/templateflow/templateflow"


def planned_dataset(call: Invocation, settings: PreprocessSettings) -> OutputDataset:
    """The output as it would be; nothing is written."""
    digest = chained_hash("preprocess", settings, (call.input_dir,))
    return OutputDataset(root=call.output_dir, command="preprocess", configuration_hash=digest)


def open_dataset(call: Invocation, settings: PreprocessSettings) -> OutputDataset:
    """The output folder. The links named raw and templateflow are those that ``Sources`` use."""
    datasets = {"raw": call.input_dir, **call.datasets}
    links = {name: os.path.relpath(folder.resolve(), call.output_dir.resolve()) for name, folder in datasets.items()}
    dataset = OutputDataset.open(
        call.output_dir,
        command="preprocess",
        settings=settings,
        sources=(call.input_dir,),
        made_with=settings.made_with,
        links={**links, "templateflow": _TEMPLATEFLOW},
    )
    write_text(dataset.root / ".bidsignore", BIDSIGNORE + _IGNORED)
    return dataset
