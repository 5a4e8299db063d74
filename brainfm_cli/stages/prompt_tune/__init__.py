"""prompt-tune: prompts and a head for one target on a frozen backbone."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import Field
from rich.console import Console

from brainfm_cli.atlases.catalogue import atlas_labels
from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.bids.derivatives import OutputDataset, write_json, write_text
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.config import Settings
from brainfm_cli.errors import InternalError, UsageError
from brainfm_cli.learning.checkpoints import copy_backbone, model_files, read_model_config, read_provenance, source_of_model
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.joined import DONOR, join
from brainfm_cli.learning.meta import MetaSettings
from brainfm_cli.learning.samples import select_participants
from brainfm_cli.learning.scores import best_threshold
from brainfm_cli.learning.splits import inner_folds, participant_hash, people_groups
from brainfm_cli.learning.targets import TargetSettings, participant_table, read_target
from brainfm_cli.learning.texts import read_disorders
from brainfm_cli.learning.tuned import TargetRecord, prepare_inputs, save_tuned, tune, write_held_out
from brainfm_cli.learning.tuning import TuningSettings
from brainfm_cli.provenance import file_sha256, package_versions
from brainfm_cli.reports.tuning import AtlasTuning, tuning_page
from brainfm_cli.stages.prompt_tune.meta import meta_tune
from brainfm_cli.stages.prompt_tune.participants import TuneParticipantSettings, tune_participants
from brainfm_cli.stages.prompt_tune.scan_settings import TuneScansSettings
from brainfm_cli.stages.prompt_tune.scans import tune_scans
from brainfm_cli.systems import BrainGraph, load_system, read_system_settings
from brainfm_cli.systems.brain_graph import write_text_readers
from brainfm_cli.systems.brain_graph.texts import alignable, coupling_readers

if TYPE_CHECKING:
    from brainfm_cli.config import Execution, Invocation
    from brainfm_cli.learning.targets import Target
    from brainfm_cli.learning.tuned import Tuning
    from brainfm_cli.learning.tuning import TunedAtlas
    from brainfm_cli.models.text_conditioning import CouplingReader
    from brainfm_cli.systems import System


class PromptTuneSettings(Settings):
    """Settings of ``brainfm prompt-tune``."""

    target: str = Field(min_length=1)
    """Column of participants.tsv to learn (--target)."""
    coding: TargetSettings = TargetSettings()
    """How the column is read."""
    where: dict[str, tuple[str, ...]] = {}
    """Columns of participants.tsv and the values that people must have, e.g. {split: [discovery]}."""
    atlases: tuple[str, ...] = ()
    """Atlases to tune in; all that the cohort and the model share where empty."""
    group: str | None = None
    """Column that names people who must stay together in inner folds (family, twins)."""
    text: str | None = None
    """What is said of the positive class (or of high values): the name of a disorder in the table that the model was aligned with, or a
    description. The head then reads how much a person shows of it; needs a model of 'brainfm align'."""
    donor: Path | None = None
    """A second pretrained model, whose frozen embedding the head reads beside the first one's: a graph encoder beside a series encoder."""
    tuning: TuningSettings = TuningSettings()
    """How prompts and head are fitted."""
    meta: MetaSettings | None = None
    """Learn no target but a start for targets with few labels, over the disorders of the target column, e.g. ``meta.exclude=[ADHD]``."""
    seed: int = Field(default=0, ge=0)
    """Seed of the inner folds and of the order of people."""


def prompt_tune(call: Invocation) -> int:
    """Tune and write ``models/<id>``, with the settings of the model's system; gives back the exit code."""
    if call.model is None:
        raise UsageError("prompt-tune needs a model", fix="give --model OUT/models/<id> of 'brainfm pretrain'")
    choose_device(call.execution.device)
    kind = read_model_config(call.model).system.get("kind")
    if kind == "brain-caption":
        return tune_participants(call, call.model, TuneParticipantSettings.read(call.config, call.overrides))
    if kind == "mri-language":
        return tune_scans(call, call.model, TuneScansSettings.read(call.config, call.overrides))
    return tune_target(call, call.model, PromptTuneSettings.read(call.config, call.overrides))


def tune_target(call: Invocation, model: Path, settings: PromptTuneSettings) -> int:
    """Prompts and a head for one column; gives back the exit code."""
    cohort = Cohort.open(call.input_dir)
    config = read_model_config(model)
    settings = settings.model_copy(update={"atlases": _atlases(cohort, sorted(config.atlases), settings, call)})
    participants = select_participants(cohort, settings.where, call.selection.participant_label)
    if settings.meta is not None:
        return meta_tune(call, model, settings, settings.meta, column=settings.target, atlases=settings.atlases, participants=participants)
    target = read_target(cohort, settings.target, settings.coding, participants=participants)
    if call.dry_run:
        _print_plan(model, target, settings)
        return 0
    sources = [call.input_dir, source_of_model(model)]
    dataset = OutputDataset.open(call.output_dir, command="prompt-tune", settings=settings, sources=sources, citation=_citation(model))
    folder = dataset.root / "models" / f"{config.system['kind']}-{_slug(settings.target)}-{dataset.configuration_hash[:8]}"
    arguments = {
        "cohort_dir": cohort.root,
        "model": model,
        "folder": folder,
        "settings": settings,
        "execution": call.execution,
        "participants": target.participants,
    }
    given = () if settings.donor is None else model_files(settings.donor)
    unit = Unit(name=f"model-{folder.name}", inputs=(*cohort.files, *model_files(model), *given), work=write_model, arguments=arguments)
    return run_units(dataset, [unit], call.execution)


def write_model(
    cohort_dir: Path, model: Path, folder: Path, settings: PromptTuneSettings, execution: Execution, participants: tuple[str, ...]
) -> UnitResult:
    """Tune on ``participants`` and write a model folder that needs no other."""
    cohort = Cohort.open(cohort_dir)
    system = load_system(model)
    system.module.to(choose_device(execution.device))
    if settings.donor is not None:
        system = join(system, load_system(settings.donor))
        system.module.to(choose_device(execution.device))
    readers = {} if settings.text is None else _readers(system, model, settings.text)
    if readers and isinstance(system, BrainGraph):
        system = replace(system, text=readers)
    before = _state_hash(system)
    target = read_target(cohort, settings.target, settings.coding, participants=participants)
    table = participant_table(cohort)
    system.usable_atlases(cohort)  # refuses an atlas with other regions than the model's
    inputs = prepare_inputs(system, cohort, target.participants, settings.atlases)
    folds = inner_folds(
        target,
        groups=people_groups(table.loc[list(target.participants)], settings.group),
        folds=settings.tuning.inner_folds,
        seed=settings.seed,
    )
    tuning = tune(system, inputs, target, folds, settings.tuning, seed=settings.seed)
    if _state_hash(system) != before:
        raise InternalError("the frozen backbone has changed during tuning", where=model, fix="this is a bug in brainfm; please report it")
    written = [write_text_readers(folder, readers)] if readers else []
    return UnitResult(outputs=(*written, *_write(folder, model, target, table, tuning, settings)), seed=settings.seed)


def _readers(system: System, model: Path, text: str) -> dict[str, CouplingReader]:
    """What is said of the target, as the aligned model reads it in each atlas."""
    described = model / "disorders.yaml"
    table = read_disorders(described if described.is_file() else None)
    known = table.find(text) or read_disorders(None).find(text)
    return coupling_readers(model, known or table.text_of(text), alignable(system, model))


def _write(folder: Path, model: Path, target: Target, table: pd.DataFrame, tuning: Tuning, settings: PromptTuneSettings) -> list[Path]:
    weights, *others = copy_backbone(model, folder)
    donor = settings.donor or model / DONOR  # a model that was tuned before may have one already
    others += _copy_donor(donor, folder) if donor.is_dir() else []
    record = _record(target, tuning, settings)
    config = read_model_config(model).model_copy(update={"tuning": record.model_dump(mode="json"), "alignment": {}})
    written = [weights, *others, write_text(folder / "config.yaml", config.to_yaml()), *save_tuned(folder, tuning.atlases)]
    page = tuning_page(
        [_summary(label, tuned) for label, tuned in tuning.atlases.items()],
        title=f"Tuning of {folder.name}",
        subtitle=f"brainfm prompt-tune for '{target.name}'",
        facts=_facts(target),
        notes=_notes(target),
    )
    return [
        *written,
        write_held_out(folder / "held_out.tsv", target, table["dataset"].astype(str), tuning.held_out),
        write_text(folder / "README.md", _card(folder.name, target, record)),
        write_text(folder / "report.html", page.render()),
        write_json(folder / "provenance.json", _provenance(model, weights, target, table, settings)),
    ]


def _copy_donor(donor: Path, folder: Path) -> list[Path]:
    """The donor beside the model, so that the tuned folder needs no other."""
    copied = copy_backbone(donor, folder / DONOR)
    return [*copied, write_text(folder / DONOR / "config.yaml", read_model_config(donor).to_yaml())]


def _record(target: Target, tuning: Tuning, settings: PromptTuneSettings) -> TargetRecord:
    threshold = None
    if target.kind == "binary":
        threshold = best_threshold(target.observed.astype(np.int64), tuning.held_out[:, 1])
    return TargetRecord(
        name=target.name,
        kind=target.kind,
        classes=target.classes,
        atlases=tuple(sorted(tuning.atlases)),
        weights={label: round(weight, 6) for label, weight in sorted(tuning.weights.items())},
        threshold=threshold,
        people=len(target.participants),
        settings=settings.tuning.model_dump(mode="json"),
        text=settings.text or "",
    )


def _provenance(model: Path, weights: Path, target: Target, table: pd.DataFrame, settings: PromptTuneSettings) -> dict[str, Any]:
    values = read_provenance(model)
    if settings.donor is not None:  # whom the donor has seen, the model has seen
        seen = read_provenance(settings.donor)
        values |= {name: sorted({*values.get(name, ()), *seen.get(name, ())}) for name in ("pretrained_on", "validated_on", "aligned_on")}
        values["donor"] = settings.donor.name
    tuned = sorted(participant_hash(str(table.loc[name, "dataset"]), name) for name in target.participants)
    return values | {
        "tuned_on": tuned,
        "target": target.name,
        "backbone": model.name,
        "backbone_sha256": file_sha256(weights),
        "tuning_seed": settings.seed,
        "versions": package_versions(),
    }


def _summary(label: str, tuned: TunedAtlas) -> AtlasTuning:
    return AtlasTuning(
        atlas=label,
        epochs=tuned.epochs,
        score=tuned.choice.score,
        scores=tuned.choice.scores,
        shares=tuned.choice.shares(),
        losses=tuned.losses,
    )


def _facts(target: Target) -> dict[str, str]:
    counts = {f"People: {name}": str(count) for name, count in target.counts().items()}
    return {"Target": target.name, "Kind": target.kind, **(counts or {"People": str(len(target.participants))})}


def _notes(target: Target) -> tuple[str, ...]:
    dropped = tuple(f"{count} people left out: {reason}" for reason, count in target.dropped.items())
    return (*target.notes, *dropped)


def _card(name: str, target: Target, record: TargetRecord) -> str:
    classes = f", classes {', '.join(target.classes)}" if target.classes else ""
    return (
        f"# {name}\n\nPrompts and a head for `{target.name}` ({target.kind}{classes}), tuned by `brainfm prompt-tune` on "
        f"{record.people} people; the backbone in `model.safetensors` is unchanged.\n\n"
        f"* Atlases: {', '.join(record.atlases)}\n\n"
        "Use: `brainfm predict COHORT OUTPUT participant --model THIS_FOLDER`, and `group` to evaluate it beside its floors on people\n"
        "it has not seen. The figures in `report.html` are inner ones, by which settings were chosen: they are no test scores.\n"
        "The model is no medical device.\n"
    )


def _citation(model: Path) -> str:
    system = read_system_settings(model)
    return (
        "# How this was made\n\nTuned with `brainfm prompt-tune`. Cite brainfm (CITATION.cff) and, "
        f"for {system.kind} models, {system.credits.prompts}\n"
    )


def _atlases(cohort: Cohort, known: list[str], settings: PromptTuneSettings, call: Invocation) -> tuple[str, ...]:
    wanted = atlas_labels(settings.atlases, cohort.atlases, call.datasets)
    found = cohort.choose_atlases(wanted)
    shared = [label for label in wanted or found if label in known]
    return tuple(shared or wanted or found)


def _state_hash(system: System) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(system.module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _slug(text: str) -> str:
    return "".join(character if character.isalnum() else "" for character in text) or "target"


def _print_plan(model: Path, target: Target, settings: PromptTuneSettings) -> None:
    console = Console()
    console.print(f"prompt-tune {model.name} for '{target.name}' ({target.kind}) on {len(target.participants)} people", highlight=False)
    for name, count in target.counts().items():
        console.print(f"  {name}: {count}", highlight=False)
    console.print(f"atlases: {', '.join(settings.atlases)}; blocks: {', '.join(settings.tuning.blocks)}", highlight=False)
