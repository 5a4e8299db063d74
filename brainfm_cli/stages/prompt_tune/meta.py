"""prompt-tune with ``meta``: a start for prompts and head, learnt over many disorders, for targets that have few labels."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.bids.derivatives import OutputDataset, write_json, write_text
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.errors import CheckpointMismatchError, InternalError, SettingsError, UnsupportedStageError
from brainfm_cli.learning.checkpoints import copy_backbone, model_files, read_model_config, read_provenance, source_of_model
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.meta import MetaResult, MetaSettings, list_tasks, meta_learn, write_starts
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.learning.targets import class_text, participant_table, require_column
from brainfm_cli.learning.tuned import prepare_inputs
from brainfm_cli.provenance import file_sha256, package_versions
from brainfm_cli.reports.meta import meta_page
from brainfm_cli.systems import BrainGraph, load_system

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd

    from brainfm_cli.config import Execution, Invocation, Settings

_CITATION = """# How this was made

Meta-learned with `brainfm prompt-tune`. Cite brainfm (CITATION.cff), BrainGFM: A Brain Graph Foundation Model (Wei et al., ICLR 2026),
and Model-Agnostic Meta-Learning (Finn et al., ICML 2017).
"""


def meta_tune(
    call: Invocation,
    model: Path,
    settings: Settings,
    meta: MetaSettings,
    *,
    column: str,
    atlases: Sequence[str],
    participants: Sequence[str],
) -> int:
    """Learn a start and write ``models/<id>``, to be given to prompt-tune as ``--model``; gives back the exit code."""
    cohort = Cohort.open(call.input_dir)
    config = read_model_config(model)
    if config.tuning:
        raise CheckpointMismatchError(
            "the model is tuned for a target already", where=model, fix="give the folder that 'brainfm pretrain' wrote"
        )
    if config.system.get("kind") != "brain-graph":
        raise UnsupportedStageError(
            f"{config.system.get('kind')} models have no prompts to meta-learn", where=model, fix="leave 'meta' out"
        )
    people = _diagnosed(cohort, column, participants, meta)
    if call.dry_run:
        _print_plan(cohort, column, people, meta, atlases)
        return 0
    sources = [call.input_dir, source_of_model(model)]
    dataset = OutputDataset.open(call.output_dir, command="prompt-tune", settings=settings, sources=sources, citation=_CITATION)
    folder = dataset.root / "models" / f"{config.system['kind']}-meta-{dataset.configuration_hash[:8]}"
    arguments = {
        "cohort_dir": cohort.root,
        "model": model,
        "folder": folder,
        "column": column,
        "meta": meta,
        "atlases": tuple(atlases),
        "participants": people,
        "execution": call.execution,
    }
    unit = Unit(name=f"model-{folder.name}", inputs=(*cohort.files, *model_files(model)), work=write_meta, arguments=arguments)
    return run_units(dataset, [unit], call.execution)


def write_meta(
    cohort_dir: Path,
    model: Path,
    folder: Path,
    column: str,
    meta: MetaSettings,
    atlases: tuple[str, ...],
    participants: tuple[str, ...],
    execution: Execution,
) -> UnitResult:
    """Learn a start from ``participants`` and write a model folder that needs no other."""
    cohort = Cohort.open(cohort_dir)
    system = load_system(model)
    if not isinstance(system, BrainGraph):
        raise InternalError("this system has no prompts to meta-learn", where=model, fix="please report it")
    system.module.to(choose_device(execution.device))
    system.usable_atlases(cohort)  # refuses an atlas with other regions than the model's
    table = participant_table(cohort)
    diagnosis = {name: class_text(table.loc[name, column]) for name in participants}
    dataset = {name: str(table.loc[name, "dataset"]) for name in participants}
    inputs = prepare_inputs(system, cohort, participants, atlases)
    result = meta_learn(system, inputs, list_tasks(inputs, diagnosis, dataset, meta), meta)
    return UnitResult(outputs=tuple(_write(folder, model, column, meta, table.loc[list(participants)], result)), seed=meta.seed)


def _diagnosed(cohort: Cohort, column: str, participants: Sequence[str], meta: MetaSettings) -> tuple[str, ...]:
    """People with a value that is not excluded."""
    table = participant_table(cohort)
    require_column(table, column, str(cohort.root / "participants.tsv"))
    said = table[column].map(class_text)
    if not set(meta.control) & set(said.loc[list(participants)]):
        raise SettingsError(
            f"nobody of column '{column}' has a value of meta.control ({', '.join(meta.control)})",
            where=cohort.root / "participants.tsv",
            fix=f"it holds {', '.join(sorted(set(said) - {''}))}; set meta.control",
        )
    return tuple(name for name in participants if said[name] and said[name] not in meta.exclude)


def _write(folder: Path, model: Path, column: str, meta: MetaSettings, table: pd.DataFrame, result: MetaResult) -> list[Path]:
    weights, *others = copy_backbone(model, folder)
    tasks = [
        {"dataset": t.dataset, "disorder": t.disorder, "atlas": t.atlas, "cases": len(t.cases), "controls": len(t.controls)}
        for t in result.tasks
    ]
    record = {"column": column, **meta.model_dump(mode="json"), "tasks": tasks}
    config = read_model_config(model).model_copy(update={"meta": record})
    disorders = sorted({task.disorder for task in result.tasks})
    page = meta_page(
        result.before,
        result.losses,
        tasks,
        title=f"Meta-learning of {folder.name}",
        subtitle=f"brainfm prompt-tune, column '{column}', {meta.order} order",
        facts={"People": str(len(table)), "Tasks": str(len(tasks)), "Disorders": str(len(disorders))},
    )
    return [
        weights,
        *(path for path in others if path.name != "meta.safetensors"),
        write_text(folder / "config.yaml", config.to_yaml()),
        write_starts(folder, result.starts),
        write_text(folder / "README.md", _card(folder.name, column, disorders, meta, len(table))),
        write_text(folder / "report.html", page.render()),
        write_json(folder / "provenance.json", _provenance(model, weights, table, column, meta.seed)),
    ]


def _provenance(model: Path, weights: Path, table: pd.DataFrame, column: str, seed: int) -> dict[str, Any]:
    values = read_provenance(model)
    learnt = {participant_hash(str(table.loc[name, "dataset"]), str(name)) for name in table.index}
    return values | {
        # Their diagnoses shaped the start, as those of an alignment shape the reading of texts: never test people.
        "aligned_on": sorted({*values.get("aligned_on", ()), *learnt}),
        "target": column,
        "backbone": model.name,
        "backbone_sha256": file_sha256(weights),
        "tuning_seed": seed,
        "versions": package_versions(),
    }


def _card(name: str, column: str, disorders: Sequence[str], meta: MetaSettings, people: int) -> str:
    return (
        f"# {name}\n\nA pretrained model with a start for prompts and head, meta-learned ({meta.order}-order MAML) by `brainfm prompt-tune` over "
        f"{len(disorders)} disorders of `{column}` ({', '.join(disorders)}) on {people} people; the backbone in `model.safetensors` is unchanged.\n\n"
        "Use: `brainfm prompt-tune COHORT OUTPUT group --model THIS_FOLDER --target COLUMN` for a target with few labels. The people above are\n"
        "refused as test people. The model is no medical device.\n"
    )


def _print_plan(cohort: Cohort, column: str, people: Sequence[str], meta: MetaSettings, atlases: Sequence[str]) -> None:
    table = participant_table(cohort).loc[list(people)]
    counts = table[column].map(class_text).value_counts()
    console = Console()
    console.print(f"meta-learning over '{column}' of {len(people)} people, {meta.order} order, {meta.epochs} epochs", highlight=False)
    for name, count in counts.items():
        console.print(f"  {name}{' (control)' if name in meta.control else ''}: {count}", highlight=False)
    console.print(f"atlases: {', '.join(atlases)}", highlight=False)
