"""Where participants are worked on, and their share of the machine: the same for every engine."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

from brainfm_cli.config import digest_of
from brainfm_cli.errors import InputNotFoundError
from brainfm_cli.provenance import stamp_input
from brainfm_cli.stages.preprocess.output import planned_dataset

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from brainfm_cli.bids.raw import RawParticipant
    from brainfm_cli.config import Execution, Invocation
    from brainfm_cli.stages.preprocess.settings import PreprocessSettings


def work_dir(call: Invocation) -> Path:
    """Scratch folder of a run.

    A hidden folder of the output, unless told otherwise: a private temporary folder would not let a killed job resume.
    """
    return (call.execution.work_dir or call.output_dir / ".work").absolute()


def participant_folder(call: Invocation, settings: PreprocessSettings, label: str, inputs: Sequence[Path]) -> Path:
    """Scratch folder of one participant.

    Other inputs or settings get another folder, so that nothing made from the old ones is taken for new.
    """
    made_from = [planned_dataset(call, settings).configuration_hash, [stamp_input(path).model_dump(mode="json") for path in inputs]]
    selected = call.selection.model_dump(mode="json", exclude={"participant_label"})
    return work_dir(call) / f"brainfm_sub-{label}_{digest_of([made_from, selected])[:8]}"


def remove_folders(work: Path, label: str) -> None:
    """Remove every scratch folder of one participant below ``work``, also what other inputs or settings left."""
    for old in work.glob(f"brainfm_sub-{label}_*"):
        shutil.rmtree(old)


def check_has_runs(participant: RawParticipant) -> None:
    """Refuse a participant without BOLD runs.

    Raises
    ------
    InputNotFoundError
        There is none.
    """
    if not participant.bold:
        where = participant.root / f"sub-{participant.label}"
        raise InputNotFoundError("there is no BOLD run", where=where, fix="preprocess structural images only with --anat-only")


def threads_each(execution: Execution, participants: int) -> int:
    """Threads of each of the participants at a time."""
    # What the scheduler gives this job may be less than the machine has.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return execution.omp_nthreads or max(1, cores // at_a_time(execution, participants))


def at_a_time(execution: Execution, participants: int) -> int:
    """Participants that are preprocessed at the same time."""
    return max(1, min(execution.nprocs, participants))
