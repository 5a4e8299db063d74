"""Pretrain the masked voxel encoder on the training pictures' trials, and evaluate it on trials of test pictures beside its floors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from brainfm_cli.bids.derivatives import write_json, write_text
from brainfm_cli.learning.checkpoints import ModelConfig, ViewerRecord, newest_state, write_tensors
from brainfm_cli.learning.image_split import ImageSplit, ImageSplitSettings, make_split
from brainfm_cli.learning.loop import TrainingResult, train
from brainfm_cli.learning.pretraining import PretrainingSettings
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.learning.voxel_samples import PersonTrials, TrialBatches, select_trials, voxel_statistics
from brainfm_cli.models.voxel_encoder import VoxelScale
from brainfm_cli.provenance import package_versions
from brainfm_cli.systems.brain_caption.encoder import BrainCaption, BrainCaptionSettings

if TYPE_CHECKING:
    from brainfm_cli.bids.voxel_cohort import VoxelCohort
    from brainfm_cli.config import Execution

_FLOORS = {"patch": "model", "monitor_predict_zero": "predict zero", "monitor_neighbour_mean": "mean of neighbours"}


@dataclass(frozen=True, kw_only=True)
class PreparedEncoder:
    """A pretraining that is ready to start."""

    system: BrainCaption
    """With fresh weights."""
    config: ModelConfig
    """What config.yaml will hold."""
    source: TrialBatches
    """Training and validation batches."""
    split: ImageSplit
    """Which pictures train, choose and test."""
    participants: tuple[str, ...]
    """Who takes part."""


def prepare(
    factory: BrainCaptionSettings,
    settings: PretrainingSettings,
    split: ImageSplitSettings,
    cohort: VoxelCohort,
    participants: Sequence[str],
) -> PreparedEncoder:
    """Which trials train, and a new model."""
    made = make_split(cohort, split)
    records = {name: ViewerRecord.of(cohort.spaces[name]) for name in participants}
    places = {name: torch.from_numpy(np.array(cohort.spaces[name].places_mm)) for name in participants}
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        system = factory.assemble(records, places)
    source = TrialBatches(
        cohort=cohort,
        trials=select_trials(cohort, made, participants, "train"),
        validation_trials=select_trials(cohort, made, participants, "validation"),
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    config = ModelConfig(
        system=factory.model_dump(mode="json"),
        viewers=records,
        pretraining={name: value for name, value in settings.model_dump(mode="json").items() if name in PretrainingSettings.model_fields}
        | {"split": split.model_dump(mode="json"), "split_sha256": made.sha256},
    )
    return PreparedEncoder(system=system, config=config, source=source, split=made, participants=tuple(participants))


def pretrain_encoder(
    prepared: PreparedEncoder, settings: PretrainingSettings, execution: Execution, folder: Path
) -> tuple[TrainingResult, pd.DataFrame, list[Path]]:
    """Train to the end, going on from ``folder/checkpoints``; gives back the result, the evaluation on test pictures, and the files.

    The split is written first. Files: split.tsv, normalisation.json, model.safetensors, config.yaml, log.csv, evaluation.json,
    provenance.json (last: it says that the rest is there).
    """
    checkpoints, cohort = folder / "checkpoints", prepared.source.cohort
    split = prepared.split.write(folder / "split.tsv")
    normalisation = folder / "normalisation.json"
    if newest_state(checkpoints) is None or not normalisation.is_file():
        write_json(normalisation, fit_scale(prepared.system.model.scale, cohort, prepared.source.trials))
    result = train(prepared.system, prepared.source, settings.plan, execution, checkpoints)
    prepared.system.model.load_state_dict(result.weights)
    prepared.system.model.eval()
    if not result.is_first_rank:
        result.barrier()
        return result, pd.DataFrame(), []
    evaluation = evaluate_encoder(prepared, settings)
    files = [
        split,
        normalisation,
        write_tensors(folder / "model.safetensors", result.weights),
        write_text(folder / "config.yaml", prepared.config.to_yaml()),
        write_text(folder / "log.csv", result.log.to_csv()),
        write_json(folder / "evaluation.json", evaluation.round(6).to_dict("records")),
        write_json(folder / "provenance.json", provenance(cohort, prepared.participants, prepared.split, result, settings.seed)),
    ]
    result.barrier()
    return result, evaluation, files


def fit_scale(scale: VoxelScale, cohort: VoxelCohort, trials: Sequence[PersonTrials]) -> dict[str, Any]:
    """Mean and SD of every voxel over the training trials alone; gives back a summary of plain values."""
    summary = {}
    for one in trials:
        mean, sd = voxel_statistics(cohort, one)
        scale.set(one.participant, mean, sd)
        summary[one.participant] = {
            "trials": len(one.rows),
            "voxels": len(mean),
            "constant_voxels": int((sd <= 0).sum()),
            "mean": round(float(mean.mean()), 6),
            "sd": round(float(sd.median()), 6),
            "tensors": [f"scale.mean_{one.participant}", f"scale.sd_{one.participant}"],
        }
    return summary


@torch.no_grad()
def evaluate_encoder(prepared: PreparedEncoder, settings: PretrainingSettings) -> pd.DataFrame:
    """Mean squared error of hidden voxels of test pictures' trials per participant: the model, and what it must beat on the same voxels."""
    cohort, system = prepared.source.cohort, prepared.system
    device = next(system.model.parameters()).device
    rows = []
    for one in select_trials(cohort, prepared.split, prepared.participants, "test"):
        batches = TrialBatches(cohort=cohort, trials=(one,), validation_trials=(one,), batch_size=settings.batch_size, seed=settings.seed)
        found = batches.validation(rank=0, world_size=1)
        assert found is not None  # noqa: S101  (validation trials are given)
        sums: dict[str, float] = {}
        for place in range(len(found)):  # type: ignore[arg-type]
            batch = found[place].to(device)
            for name, value in system.measure(batch)[0].items():  # other ranks do not take part
                sums[name] = sums.get(name, 0.0) + float(value) * len(batch.names)
        row: dict[str, Any] = {"participant": one.participant, "trials": len(one.rows)}
        row |= {label: sums[name] / len(one.rows) for name, label in _FLOORS.items()}
        rows.append(row | {"correlation": sums["monitor_correlation"] / len(one.rows)})
    return pd.DataFrame(rows)


def provenance(cohort: VoxelCohort, participants: Sequence[str], split: ImageSplit, result: TrainingResult, seed: int) -> Mapping[str, Any]:
    """Whom and which pictures a model has seen."""
    datasets = cohort.dataset_of
    position = result.position
    return {
        "pretrained_on": sorted(participant_hash(datasets[name], name) for name in participants),
        "datasets": sorted({datasets[name] for name in participants}),
        "split_sha256": split.sha256,
        "split_unit": split.unit,
        "pictures": {role: int((split.table["role"] == role).sum()) for role in ("train", "validation", "test")},
        "seed": seed,
        "steps": position.step,
        "best_epoch": position.best_epoch,
        "best_loss": position.best_loss,
        "versions": package_versions(),
    }
