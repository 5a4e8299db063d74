"""pretrain: a foundation model from a packed cohort, or further atlases for a finished one."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pandas as pd
from rich.console import Console
from rich.table import Table

from brainfm_cli.atlases.catalogue import atlas_labels
from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.bids.derivatives import OutputDataset, write_text
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.errors import UnsupportedStageError
from brainfm_cli.learning.checkpoints import model_files, source_of_model
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.image_split import ImageSplitSettings
from brainfm_cli.learning.log import PROBE
from brainfm_cli.learning.pretraining import PretrainingSettings, new_atlases, prepare, prepare_addition, pretrain_model
from brainfm_cli.learning.samples import select_participants
from brainfm_cli.reports.training import training_page
from brainfm_cli.signals.slice_packing import SliceSettings
from brainfm_cli.stages.pretrain.slices import pretrain_slices, with_defaults
from brainfm_cli.stages.pretrain.voxels import pretrain_voxels
from brainfm_cli.systems import SystemSettings, read_system_settings
from brainfm_cli.systems.brain_caption import BrainCaptionSettings
from brainfm_cli.systems.brain_graph import BrainGraphSettings
from brainfm_cli.systems.mri_language import MriLanguageSettings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from brainfm_cli.config import Execution, Invocation
    from brainfm_cli.learning.loop import TrainingResult
    from brainfm_cli.learning.pretraining import Prepared
    from brainfm_cli.systems.drug_response import DrugResponseSettings

    Factory = BrainGraphSettings | DrugResponseSettings


class PretrainSettings(PretrainingSettings):
    """Settings of ``brainfm pretrain``."""

    system: SystemSettings
    """Which system, its size and its losses; ``kind`` is required (--system)."""
    split: ImageSplitSettings = ImageSplitSettings()
    """For brain-caption: which pictures train, choose the epoch and test, for this model and all that start from it."""

    slices: SliceSettings = SliceSettings()
    """For mri-language: how scans become the slices that are packed into OUTPUT/cohort."""


class AddAtlasSettings(PretrainingSettings):
    """Settings of ``brainfm pretrain --model``: atlases of the cohort that the model does not know are added to it.

    Their tokens, region identities, prompts and decoder columns are learnt with the model's own losses; all else stays frozen.
    """


def pretrain(call: Invocation) -> int:
    """Train and write ``models/<id>``; gives back the exit code."""
    choose_device(call.execution.device)
    if call.model is not None:
        return _pretrain_regions(call, AddAtlasSettings.read(call.config, call.overrides), _extensible(call.model), call.model)
    settings = PretrainSettings.read(call.config, call.overrides)
    if isinstance(settings.system, BrainCaptionSettings):
        return pretrain_voxels(call, settings.system, settings, settings.split, _citation(settings.system))
    if isinstance(settings.system, MriLanguageSettings):
        return pretrain_slices(call, settings.system, with_defaults(settings), settings.slices, _citation(settings.system))
    return _pretrain_regions(call, settings, settings.system, None)


def _extensible(model: Path) -> BrainGraphSettings:
    factory = read_system_settings(model)
    if not isinstance(factory, BrainGraphSettings):
        raise UnsupportedStageError(
            f"a {factory.kind} model reads every atlas with centres: none is added", where=model, fix="use it as it is"
        )
    return factory


def _pretrain_regions(call: Invocation, settings: PretrainingSettings, factory: Factory, base: Path | None) -> int:
    cohort = Cohort.open(call.input_dir)
    settings = settings.model_copy(update={"atlases": atlas_labels(settings.atlases, cohort.atlases, call.datasets)})
    participants = select_participants(cohort, settings.where, call.selection.participant_label)
    if base is not None:
        new_atlases(settings, cohort, base)  # before anything is written
    if call.dry_run:
        _print_plan(_prepared(factory, settings, cohort, participants, base), settings, factory.kind)
        return 0
    sources = [call.input_dir, *([] if base is None else [source_of_model(base)])]
    dataset = OutputDataset.open(call.output_dir, command="pretrain", settings=settings, sources=sources, citation=_citation(factory))
    folder = dataset.root / "models" / f"{factory.kind}-{dataset.configuration_hash[:8]}"
    arguments = {
        "cohort_dir": cohort.root,
        "folder": folder,
        "factory": factory,
        "settings": settings,
        "execution": call.execution,
        "participants": tuple(participants),
        "base": base,
    }
    inputs = (*cohort.files, *(() if base is None else model_files(base)))
    unit = Unit(name=f"model-{folder.name}", inputs=inputs, work=write_model, arguments=arguments)
    code = run_units(dataset, [unit], call.execution)
    if code == 0:  # only now: until the record is written, a killed run must be able to go on
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    return code


def _prepared(factory: Factory, settings: PretrainingSettings, cohort: Cohort, participants: Sequence[str], base: Path | None) -> Prepared:
    return (
        prepare(factory, settings, cohort, participants)
        if base is None
        else prepare_addition(factory, settings, cohort, participants, base)
    )


def write_model(
    cohort_dir: Path,
    folder: Path,
    factory: Factory,
    settings: PretrainingSettings,
    execution: Execution,
    participants: tuple[str, ...],
    base: Path | None,
) -> UnitResult | None:
    """Pretrain on ``participants``, or add atlases to ``base``, and write the model folder with its card and report."""
    cohort = Cohort.open(cohort_dir)
    prepared = _prepared(factory, settings, cohort, participants, base)
    result, files = pretrain_model(prepared, settings, execution, folder)
    if not result.is_first_rank:
        return None
    outputs = (
        *files,
        write_text(folder / "README.md", model_card(folder.name, prepared, settings, result, factory.kind)),
        write_text(folder / "report.html", _report(folder.name, prepared, result, factory)),
    )
    return UnitResult(outputs=outputs, seed=settings.seed)


def model_card(name: str, prepared: Prepared, settings: PretrainingSettings, result: TrainingResult, kind: str) -> str:
    """README.md of the model folder."""
    index = prepared.source.cohort.index
    datasets = ", ".join(sorted(set(index.loc[index["participant"].isin(prepared.training), "dataset"].astype(str))))
    lines = [
        f"# {name}",
        "",
        f"A `{kind}` model, pretrained without labels by `brainfm pretrain`."
        + ("" if prepared.base is None else f" Atlases were added to {prepared.base.name}, whose weights are unchanged."),
        "",
        f"* Parameters: {_parameters(prepared):,}",
        f"* Atlases: {', '.join(sorted(prepared.config.atlases))}"
        + ("" if prepared.base is None else f"; added: {', '.join(prepared.atlases)}"),
        f"* Trained on {len(prepared.training)} people ({len(prepared.source.scans)} scans) of: {datasets}",
        f"* Epoch chosen on {len(prepared.validation)} other people: {result.position.best_epoch}, loss {result.position.best_loss}",
        f"* Optimiser steps: {result.position.step}; seed {settings.seed}",
        *_probed(result),
        "",
        "Use: `brainfm prompt-tune COHORT OUTPUT group --model THIS_FOLDER --target COLUMN`.",
        "",
        "In Python:",
        "",
        "```python",
        "from brainfm_cli.api import embed_cohort, load_cohort, load_model",
        'model, cohort = load_model("THIS_FOLDER"), load_cohort("COHORT")',
        f'embedding = embed_cohort(model, cohort, "{min(prepared.config.atlases)}")',
        "```",
        "",
        "`config.yaml` rebuilds the model, `provenance.json` lists the hashes of the people it has seen: `brainfm predict` refuses",
        "to test on them. The model is no medical device; its scores on another cohort must be measured there, beside the floors.",
        "",
        "Weights derive from the data they were trained on and keep its conditions of use.",
    ]
    return "\n".join(lines) + "\n"


def _probed(result: TrainingResult) -> list[str]:
    """A line of the model card: what the embedding tells of people; none where nothing was probed."""
    names = [name for name in result.log.terms() if name.startswith(PROBE)]
    last = {name.removeprefix(PROBE): result.log.curve("validation", name)[1][-1] for name in names}
    told = ", ".join(f"{name} {value:.2f}" for name, value in last.items())
    return [f"* Read from the untuned embedding after the last epoch (AUROC of classes, correlation of numbers): {told}"] if told else []


def _citation(factory: Factory | BrainCaptionSettings | MriLanguageSettings) -> str:
    return (
        "# How this was made\n\nPretrained with `brainfm pretrain`. Cite brainfm (CITATION.cff) and, "
        f"for {factory.kind} models, {factory.credits.follows}\n"
    )


def _report(name: str, prepared: Prepared, result: TrainingResult, factory: Factory) -> str:
    position = result.position
    facts = {
        "People": str(len(prepared.training)),
        "Held out": str(len(prepared.validation)),
        "Atlases": str(len(prepared.atlases)),
        "Parameters": f"{_parameters(prepared):,}",
        "Steps": str(position.step),
        "Best epoch": "last" if position.best_epoch is None else str(position.best_epoch),
    }
    notes = (
        () if prepared.validation else ("Nobody was held out: the last epoch is kept, and the losses below say nothing of other people.",)
    )
    page = training_page(
        result.log,
        title=f"Pretraining of {name}",
        subtitle=f"brainfm pretrain, {factory.kind}, {', '.join(prepared.atlases)}",
        facts=facts,
        notes=notes,
        people=_people(prepared),
        methods=factory.credits.methods,
        citations=(factory.credits.citation,),
    )
    return page.render()


def _people(prepared: Prepared) -> pd.DataFrame:
    datasets = pd.Series(prepared.source.cohort.dataset_of)
    sides = {"training": prepared.training, "held out": prepared.validation}
    rows = [
        (side, str(name), int(count))
        for side, keys in sides.items()
        for name, count in datasets[list(keys)].value_counts(sort=False).items()
    ]
    return pd.DataFrame(rows, columns=["role", "dataset", "people"])


def _parameters(prepared: Prepared) -> int:
    return sum(parameter.numel() for parameter in prepared.system.module.parameters())


def _print_plan(prepared: Prepared, settings: PretrainingSettings, kind: str) -> None:
    batches, plan = prepared.source.num_batches, settings.plan
    table = Table("what", "value", box=None)
    weights = _parameters(prepared) * 4 / 1e6
    for what, value in (
        (
            "system",
            f"{kind}, {_parameters(prepared):,} parameters ({weights:.0f} MB; {4 * weights:.0f} MB with gradients and moments)",
        ),
        ("people", f"{len(prepared.training)} train, {len(prepared.validation)} choose the epoch"),
        ("scans", f"{len(prepared.source.scans)} train, {len(prepared.source.validation_scans)} choose the epoch"),
        ("atlases", ", ".join(prepared.atlases)),
        ("batches", f"{batches} per epoch of {settings.batch_size} scans"),
        ("steps", f"{plan.total_steps(batches)} in at most {settings.epochs} epochs"),
    ):
        table.add_row(what, value)
    Console().print(table)
