"""Pretrain the masked MRI encoder on the training people's slices, and score its reconstruction on those of held-out people."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from brainfm_cli.bids.derivatives import write_json, write_text, write_tsv
from brainfm_cli.bids.slice_cohort import SliceCohort
from brainfm_cli.errors import SettingsError
from brainfm_cli.learning.checkpoints import ModelConfig, write_tensors
from brainfm_cli.learning.loop import TrainingResult, train
from brainfm_cli.learning.pretraining import PretrainingSettings
from brainfm_cli.learning.reconstruction import FLOORS, inpaint, score_reconstruction, summarise
from brainfm_cli.learning.slice_samples import SliceBatches, SlicePeople, divide_people, draw_rows, rows_of, site_of_people
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.provenance import package_versions
from brainfm_cli.records import ReconstructedSlice
from brainfm_cli.systems.mri_language.augmentation import plain_view
from brainfm_cli.systems.mri_language.encoder import MriLanguage, MriLanguageSettings, context_of, fill_with_mean, spread_cells

if TYPE_CHECKING:
    from brainfm_cli.config import Execution

_EXAMPLES = 6


@dataclass(frozen=True, kw_only=True)
class PreparedMri:
    """A pretraining that is ready to start."""

    system: MriLanguage
    """With fresh weights."""
    config: ModelConfig
    """What config.yaml will hold."""
    source: SliceBatches
    """Training and validation batches."""
    people: SlicePeople
    """Who trains and who chooses the epoch."""


def prepare(factory: MriLanguageSettings, settings: PretrainingSettings, cohort: SliceCohort) -> PreparedMri:
    """Who trains on what, and a new model.

    Raises
    ------
    SettingsError
        The cohort holds slices where the system reads cubes, or the reverse.
    InputDatasetError
        Fewer than two people have slices.
    """
    if cohort.dims != factory.dims:
        raise SettingsError(f"the cohort was packed for dims={cohort.dims}, the system has dims={factory.dims}", fix="pack again into a new OUTPUT, or set system.dims")  # fmt: skip
    people = divide_people(site_of_people(cohort), settings.validation_fraction, seed=settings.seed)
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        system = factory.build()
    source = SliceBatches(
        cohort=cohort,
        rows=rows_of(cohort, people.role("train")),
        validation_rows=draw_rows(rows_of(cohort, people.role("validation")), factory.validation_slices, seed=settings.seed),
        batch_size=settings.batch_size,
        seed=settings.seed,
        per_epoch=factory.slices_per_epoch,
    )
    if len(source.rows) < settings.batch_size:
        raise SettingsError(f"{len(source.rows)} slices train: fewer than batch_size={settings.batch_size}", fix="lower batch_size")
    config = ModelConfig(
        system=factory.model_dump(mode="json"),
        pretraining={name: value for name, value in settings.model_dump(mode="json").items() if name in PretrainingSettings.model_fields}
        | {"slices": {"size": cohort.size, "dims": cohort.dims}},
    )
    return PreparedMri(system=system, config=config, source=source, people=people)


def pretrain_encoder(
    prepared: PreparedMri, settings: PretrainingSettings, execution: Execution, folder: Path
) -> tuple[TrainingResult, pd.DataFrame, list[ReconstructedSlice], list[Path]]:
    """Train to the end, going on from ``folder/checkpoints``; gives back the result, the scores of held-out people, examples, and the files.

    Files: split.tsv (first), model.safetensors, config.yaml, log.csv, evaluation.json, provenance.json (last: it says that the rest is there).
    """
    split = write_tsv(folder / "split.tsv", prepared.people.table.replace({"site": {"": "n/a"}}))
    result = train(prepared.system, prepared.source, settings.plan, execution, folder / "checkpoints")
    prepared.system.model.load_state_dict(result.weights)
    prepared.system.model.eval()
    if not result.is_first_rank:
        result.barrier()
        return result, pd.DataFrame(), [], []
    evaluation, examples = evaluate_reconstruction(prepared, settings)
    files = [
        split,
        write_tensors(folder / "model.safetensors", result.weights),
        write_text(folder / "config.yaml", prepared.config.to_yaml()),
        write_text(folder / "log.csv", result.log.to_csv()),
        write_json(folder / "evaluation.json", evaluation.astype(object).where(evaluation.notna(), None).to_dict("records")),
        write_json(folder / "provenance.json", _provenance(prepared, settings, result)),
    ]
    result.barrier()
    return result, evaluation, examples, files


@torch.no_grad()
def evaluate_reconstruction(prepared: PreparedMri, settings: PretrainingSettings) -> tuple[pd.DataFrame, list[ReconstructedSlice]]:
    """Scores of hidden pixels of held-out people, as scanned and not augmented, by the model and both floors; and examples.

    Empty where nobody is held out.
    """
    source, system = prepared.source, prepared.system
    held_out = rows_of(source.cohort, prepared.people.role("validation"))
    rows = draw_rows(held_out, system.settings.evaluated_slices, seed=settings.seed)
    tables: list[pd.DataFrame] = []
    examples: list[ReconstructedSlice] = []
    shown = set(np.linspace(0, max(0, len(rows) - 1), _EXAMPLES).round().astype(int).tolist())
    device = next(system.model.parameters()).device
    for start in range(0, len(rows), settings.batch_size):
        part = rows[start : start + settings.batch_size]
        batch = source.batch(part, None)
        view = plain_view(batch.images)
        cells = system.hide(view, batch.keys, system.mask_ratio(batch.keys), 0)
        moved = batch.to(device)
        predicted = system.model.reconstruct(view.seen.to(device), context_of(moved), cells.to(device))[0].float().cpu()
        hidden = spread_cells(cells)
        made = {
            "model": predicted,
            "mean fill": fill_with_mean(view.clean, hidden, view.brain),
            "inpainting": inpaint(view.clean, hidden, view.brain),
        }
        scores = score_reconstruction(made, view.clean, hidden, view.brain)
        found = {f"{method}/{name}": values.numpy() for method, named in scores.items() for name, values in named.items()}
        names = source.cohort.slices["participant"].to_numpy()[part].astype(str)
        tables.append(pd.DataFrame({"participant": names, **found}))
        for place in sorted(shown & set(range(start, start + len(part)))):
            joined = {
                name: torch.where(hidden & view.brain, images.clamp(0, 1), view.clean)[place - start] for name, images in made.items()
            }
            pictures = {"original": view.clean[place - start], "visible": torch.where(hidden, 0.0, view.clean)[place - start], **joined}
            examples.append(
                ReconstructedSlice(
                    participant=str(names[place - start]),
                    sequence=str(source.cohort.slices["sequence"].to_numpy()[part[place - start]]),
                    images={name: image.numpy() for name, image in pictures.items()},
                )
            )
    if not tables:
        return pd.DataFrame(), []
    return summarise(pd.concat(tables, ignore_index=True), seed=settings.seed, methods=("model", *FLOORS)), examples


def _provenance(prepared: PreparedMri, settings: PretrainingSettings, result: TrainingResult) -> Mapping[str, Any]:
    position = result.position
    first = prepared.source.cohort.slices.drop_duplicates("participant")
    dataset = {str(label): str(name) for label, name in zip(first["participant"], first["dataset"], strict=True)}
    return {
        "pretrained_on": sorted(participant_hash(dataset[label], label) for label in prepared.people.role("train")),
        "validated_on": sorted(participant_hash(dataset[label], label) for label in prepared.people.role("validation")),
        "datasets": sorted(set(dataset.values())),
        "slices": {"train": len(prepared.source.rows), "validation": len(prepared.source.validation_rows)},
        "seed": settings.seed,
        "steps": position.step,
        "best_epoch": position.best_epoch,
        "best_loss": position.best_loss,
        "versions": package_versions(),
    }
