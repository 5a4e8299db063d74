"""Pretrain a system on some people of a packed cohort: the one way, used by ``pretrain`` and by every outer fold of ``predict``.

The same people, settings and seed give the same weights, whether the run was killed in between or not.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch.utils.data import Dataset

from brainfm_cli.bids.cohort import Cohort, CohortAtlas
from brainfm_cli.bids.derivatives import write_json, write_text
from brainfm_cli.config import Execution, Settings
from brainfm_cli.documents import read_json
from brainfm_cli.errors import CheckpointMismatchError, InputDatasetError, UsageError
from brainfm_cli.learning.checkpoints import (
    AtlasRecord,
    ModelConfig,
    newest_state,
    read_model_config,
    read_provenance,
    shared_atlases,
    write_tensors,
)
from brainfm_cli.learning.loop import OptimiserSettings, Trainable, TrainingPlan, TrainingResult, train
from brainfm_cli.learning.probes import make_probes
from brainfm_cli.learning.samples import (
    BatchPlan,
    PretrainBatch,
    PretrainSamples,
    Scan,
    WindowRule,
    Windows,
    hold_out,
    list_scans,
    plan_epoch,
    shard,
    whole_scans,
)
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.provenance import package_versions

_NORMALISATION_BATCH = 16


class PretrainingSettings(Settings):
    """Who trains, how long, and how."""

    where: dict[str, tuple[str, ...]] = {}
    """Columns of participants.tsv and the values that people must have, e.g. {split: [discovery]}."""
    atlases: tuple[str, ...] = ()
    """Atlases of the cohort to train on; all where empty."""
    validation_fraction: float = Field(default=0.1, ge=0, lt=1)
    """Share of people held out to choose the epoch; 0 takes the last."""
    epochs: int = Field(default=50, ge=1)
    """Passes over the data: every scan once in each of its atlases."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps to stop after, whatever the epochs."""
    batch_size: int = Field(default=32, ge=2)
    """Scans per batch, over all ranks."""
    accumulate: int = Field(default=1, ge=1)
    """Batches per optimiser step."""
    patience: int | None = Field(default=None, ge=1)
    """Epochs without a better validation loss before training stops; never where unset."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Optimiser steps between saved states (and at most five minutes)."""
    log_every: int = Field(default=10, ge=1)
    """Optimiser steps between rows of the log."""
    seed: int = Field(default=0, ge=0)
    """Seed of first weights, windows, masks, dropout and of who is held out."""
    optimiser: OptimiserSettings = OptimiserSettings()
    """Learning rate and decay."""
    probes: tuple[str, ...] = ("site", "diagnosis")
    """Columns of participants.tsv that are read from the untuned embedding after every epoch, by a cross-validated linear model, for the
    log alone (monitor_probe_…: AUROC of classes, correlation of numbers); those that are absent or do not vary are left out."""

    @property
    def plan(self) -> TrainingPlan:
        """What the training loop needs to know."""
        return TrainingPlan(
            epochs=self.epochs,
            steps=self.steps,
            seed=self.seed,
            accumulate=self.accumulate,
            patience=self.patience,
            checkpoint_every=self.checkpoint_every,
            log_every=self.log_every,
            optimiser=self.optimiser,
        )


@dataclass(frozen=True, kw_only=True)
class Credits:
    """What outputs say of a system."""

    methods: str
    """How it is pretrained, one paragraph for a methods section."""
    citation: str
    """Whom to cite, one reference."""
    follows: str
    """What is taken over from there, ending the sentence of logs/CITATION.md."""
    prompts: str
    """The same of a model tuned for a target."""


class Pretrainable(Trainable, Protocol):
    """What pretraining needs of a system beside its losses."""

    @property
    def window_rule(self) -> WindowRule:
        """How long windows are."""

    @property
    def cross_atlas_probability(self) -> float:
        """Share of batches with a view in another atlas."""

    def fit_normalisation(self, windows: Iterable[Windows]) -> dict[str, Any]:
        """Take over the statistics of the training people's whole scans; gives back a summary of plain values."""


@runtime_checkable
class Read(Protocol):
    """A system whose readout is fitted once its encoder is trained."""

    def fit_readout(self, windows: Iterable[Windows]) -> None:
        """Learn from the training people's whole scans; buffers of the module change, no parameter does."""


class SystemFactory(Protocol):
    """Settings of a system, from which a new model is built."""

    @property
    def credits(self) -> Credits:
        """What the outputs say of the method and whom to cite."""

    def remember(self, atlas: CohortAtlas) -> AtlasRecord:
        """What a model keeps of an atlas; refuses one that the system cannot use."""

    def build(self, atlases: Mapping[str, AtlasRecord]) -> Any:  # noqa: ANN401  (a Pretrainable)
        """A model with fresh weights."""

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """The settings as plain values."""


@dataclass(frozen=True, kw_only=True)
class CohortBatches:
    """Batches of a cohort's scans, as the training loop wants them."""

    cohort: Cohort
    """Where the series are."""
    scans: tuple[Scan, ...]
    """Scans that train."""
    validation_scans: tuple[Scan, ...]
    """Scans that choose the epoch."""
    batch_size: int
    """Scans per batch."""
    seed: int
    """Of order and windows."""
    rule: WindowRule
    """How long windows are."""
    cross_atlas: float
    """Share of batches with a view in another atlas."""
    atlases: tuple[str, ...] = ()
    """Atlases that have batches; all of the scans' where empty."""

    @cached_property
    def num_batches(self) -> int:
        """Batches per epoch."""
        return len(self._plans(self.scans, 0, shuffle=False))

    def training(self, epoch: int, *, rank: int, world_size: int) -> Dataset[PretrainBatch]:
        """One epoch of this rank's batches."""
        return self._samples(self.scans, self._plans(self.scans, epoch, shuffle=True), rank, world_size)

    def validation(self, *, rank: int, world_size: int) -> Dataset[PretrainBatch] | None:
        """The same batches, windows and masks in every epoch."""
        if not self.validation_scans:
            return None
        return self._samples(self.validation_scans, self._plans(self.validation_scans, 0, shuffle=False), rank, world_size)

    def _plans(self, scans: Sequence[Scan], epoch: int, *, shuffle: bool) -> list[BatchPlan]:
        return plan_epoch(
            scans,
            batch_size=self.batch_size,
            seed=self.seed,
            epoch=epoch,
            cross_atlas=self.cross_atlas,
            shuffle=shuffle,
            atlases=self.atlases,
        )

    def _samples(self, scans: Sequence[Scan], plans: Sequence[BatchPlan], rank: int, world_size: int) -> PretrainSamples:
        mine = [shard(plan, rank=rank, world_size=world_size) for plan in plans]
        return PretrainSamples(self.cohort, scans, mine, seed=self.seed, rule=self.rule)


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A pretraining that is ready to start."""

    system: Any
    """A Pretrainable with fresh weights."""
    config: ModelConfig
    """What config.yaml will hold."""
    source: CohortBatches
    """The batches."""
    training: tuple[str, ...]
    """People who train."""
    validation: tuple[str, ...]
    """People who choose the epoch."""
    atlases: tuple[str, ...]
    """Labels of the atlases that are learnt."""
    base: Path | None = None
    """The finished model that atlases are added to; none where everything is learnt."""


def prepare(factory: SystemFactory, settings: PretrainingSettings, cohort: Cohort, participants: Sequence[str]) -> Prepared:
    """Who trains on what, and a new model.

    Raises
    ------
    InputNotFoundError
        The cohort does not have an atlas of the settings.
    InputDatasetError
        No run is long enough, or fewer than two people train.
    """
    atlases = cohort.choose_atlases(settings.atlases)
    training, validation = hold_out(participants, settings.validation_fraction, seed=settings.seed)
    if len(training) < 2:
        raise InputDatasetError(
            f"{len(training)} people train: contrast needs two", where=cohort.root, fix="give more people, or relax 'where'"
        )
    records = {label: factory.remember(cohort.atlases[label]) for label in atlases}
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        system = factory.build(records)
    source = CohortBatches(
        cohort=cohort,
        scans=tuple(list_scans(cohort, training, atlases, rule=system.window_rule)),
        validation_scans=tuple(list_scans(cohort, validation, atlases, rule=system.window_rule)) if validation else (),
        batch_size=settings.batch_size,
        seed=settings.seed,
        rule=system.window_rule,
        cross_atlas=system.cross_atlas_probability if len(atlases) > 1 else 0.0,
    )
    config = ModelConfig(
        system=factory.model_dump(mode="json"),
        atlases=records,
        pretraining={name: value for name, value in settings.model_dump(mode="json").items() if name in PretrainingSettings.model_fields},
    )
    return Prepared(
        system=system, config=config, source=source, training=tuple(training), validation=tuple(validation), atlases=tuple(atlases)
    )


def new_atlases(settings: PretrainingSettings, cohort: Cohort, base: Path) -> tuple[str, ...]:
    """Labels of the cohort's atlases that a finished model can be taught.

    Raises
    ------
    CheckpointMismatchError
        The model was aligned or tuned already, or one of its atlases has other regions here.
    UsageError
        The model knows every atlas asked for.
    """
    config = read_model_config(base)
    if config.tuning or config.alignment:
        raise CheckpointMismatchError(
            "atlases are added to a model before it is aligned or tuned", where=base, fix="give the folder that 'brainfm pretrain' wrote"
        )
    added = tuple(label for label in cohort.choose_atlases(settings.atlases) if label not in config.atlases)
    if not added:
        raise UsageError(
            f"the model knows every atlas asked for ({', '.join(cohort.choose_atlases(settings.atlases))})",
            fix="parcellate with another atlas, or use the model as it is",
        )
    return added


def prepare_addition(
    factory: SystemFactory, settings: PretrainingSettings, cohort: Cohort, participants: Sequence[str], base: Path
) -> Prepared:
    """A finished model with atlases of the cohort that it does not know yet, their parameters alone left to train.

    Raises as :func:`new_atlases` and :func:`prepare` do.
    """
    added, config = new_atlases(settings, cohort, base), read_model_config(base)
    known = shared_atlases(config.atlases, cohort)
    prepared = prepare(factory, settings.model_copy(update={"atlases": (*added, *known)}), cohort, participants)
    records = {**config.atlases, **{label: prepared.config.atlases[label] for label in added}}
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        system = factory.build(records)
    system.adopt(base, added)
    own = {name: value for name, value in settings.model_dump(mode="json").items() if name in PretrainingSettings.model_fields}
    return replace(
        prepared,
        system=system,
        config=config.model_copy(update={"atlases": records, "added": [*config.added, own | {"atlases": list(added)}]}),
        source=replace(prepared.source, atlases=added, cross_atlas=system.cross_atlas_probability if known else 0.0),
        atlases=added,
        base=base,
    )


def pretrain_model(
    prepared: Prepared, settings: PretrainingSettings, execution: Execution, folder: Path
) -> tuple[TrainingResult, list[Path]]:
    """Train to the end, going on from ``folder/checkpoints``, and write the model folder; gives back its files.

    Files: model.safetensors, config.yaml, normalisation.json, log.csv, provenance.json (last: it says that the rest is there).
    """
    checkpoints = folder / "checkpoints"
    normalisation = folder / "normalisation.json"
    if newest_state(checkpoints) is None or not normalisation.is_file():
        before = {} if prepared.base is None else _read_json(prepared.base / normalisation.name)
        write_json(normalisation, before | prepared.system.fit_normalisation(whole_training_scans(prepared)))
    people = (*prepared.training, *prepared.validation)
    probe = make_probes(prepared.system, prepared.source.cohort, people, prepared.atlases, settings.probes, seed=settings.seed)
    result = train(prepared.system, prepared.source, settings.plan, execution, checkpoints, probe=probe)
    prepared.system.module.load_state_dict(result.weights)
    prepared.system.module.eval()
    if not result.is_first_rank:
        result.barrier()
        return result, []
    if isinstance(prepared.system, Read):
        prepared.system.fit_readout(whole_training_scans(prepared))
    files = [
        write_tensors(folder / "model.safetensors", prepared.system.module.state_dict()),
        write_text(folder / "config.yaml", prepared.config.to_yaml()),
        normalisation,
        write_text(folder / "log.csv", result.log.to_csv()),
        write_json(folder / "provenance.json", _provenance(prepared, settings, result)),
    ]
    result.barrier()
    return result, files


def is_finished(folder: Path) -> bool:
    """Whether a model folder is complete."""
    return (folder / "provenance.json").is_file()


def whole_training_scans(prepared: Prepared) -> Iterator[Windows]:
    """The training people's whole scans in the atlases that are learnt, in batches."""
    for label in prepared.atlases:
        scans = [scan for scan in prepared.source.scans if label in scan.rows]
        for start in range(0, len(scans), _NORMALISATION_BATCH):
            yield whole_scans(prepared.source.cohort, scans[start : start + _NORMALISATION_BATCH], label)


def _read_json(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = read_json(path) if path.is_file() else {}
    return values


def _provenance(prepared: Prepared, settings: PretrainingSettings, result: TrainingResult) -> dict[str, Any]:
    datasets = prepared.source.cohort.dataset_of

    def hashes(people: Sequence[str]) -> list[str]:
        return sorted(participant_hash(datasets[key], key) for key in people)

    position = result.position
    before = {} if prepared.base is None else read_provenance(prepared.base)
    return {
        "pretrained_on": sorted({*before.get("pretrained_on", ()), *hashes(prepared.training)}),
        "validated_on": sorted({*before.get("validated_on", ()), *hashes(prepared.validation)}),
        "datasets": sorted({*before.get("datasets", ()), *(datasets[key] for key in (*prepared.training, *prepared.validation))}),
        "atlases": sorted(prepared.config.atlases),
        **({} if prepared.base is None else {"added_to": prepared.base.name, "added": list(prepared.atlases)}),
        "scans": len(prepared.source.scans),
        "seed": settings.seed,
        "steps": position.step,
        "best_epoch": position.best_epoch,
        "best_loss": position.best_loss,
        "versions": package_versions(),
    }
