"""Align a pretrained voxel encoder with captions, or add a participant to an aligned one: what trains on what, and the model folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from brainfm_cli.bids.derivatives import write_json, write_text
from brainfm_cli.documents import read_json
from brainfm_cli.errors import CheckpointMismatchError, InputDatasetError, InternalError, UsageError
from brainfm_cli.learning.checkpoints import (
    ModelConfig,
    ViewerRecord,
    check_viewer,
    newest_state,
    read_model_config,
    read_provenance,
    read_tensors,
    write_tensors,
)
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.image_split import ImageSplit, ImageSplitSettings, extend_split, refuse_same_pictures
from brainfm_cli.learning.loop import TrainingPlan, TrainingResult, train
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.learning.text_scores import cider
from brainfm_cli.learning.voxel_samples import PersonTrials, TrialBatches, select_trials
from brainfm_cli.models.voxel_encoder import Viewer
from brainfm_cli.provenance import package_versions
from brainfm_cli.systems.brain_caption.aligned import (
    AlignedCaptioner,
    CaptionFitSettings,
    CaptionRecord,
    CaptionWords,
    build_captioner,
    load_captioner,
    sentence_targets,
)
from brainfm_cli.systems.brain_caption.decoding import list_viewings, speak
from brainfm_cli.systems.brain_caption.encoder import BrainCaption
from brainfm_cli.systems.brain_caption.floors import CaptionBank, picture_vectors
from brainfm_cli.systems.brain_caption.pretraining import fit_scale

if TYPE_CHECKING:
    from torch import Tensor

    from brainfm_cli.bids.voxel_cohort import VoxelCohort
    from brainfm_cli.config import Execution
    from brainfm_cli.models.causal_language import CausalLanguageModel
    from brainfm_cli.models.language import TextEncoder

_JUDGED_TOKENS = 24


@dataclass(frozen=True, kw_only=True)
class PreparedCaptioner:
    """A training of a captioner that is ready to start."""

    captioner: AlignedCaptioner
    """The system."""
    source: TrialBatches
    """Training trials, and a few validation trials."""
    split: ImageSplit
    """The pretrained model's."""
    bank: CaptionBank
    """Captions of the training pictures."""
    config: ModelConfig
    """What config.yaml will hold."""
    participants: tuple[str, ...]
    """Whose trials train."""
    sentences: TextEncoder
    """The sentence encoder."""


def read_split(model_dir: Path, cohort: VoxelCohort, *, new: ImageSplitSettings | None = None) -> ImageSplit:
    """The split that a model was trained with, checked against a cohort; pictures that the model does not know test, or are drawn by ``new``.

    Raises
    ------
    CheckpointMismatchError
        split.tsv is not the one that the model was trained with (split_sha256).
    InputDatasetError
        The cohort shows the same picture under names of several sides.
    """
    split, config = ImageSplit.read(model_dir / "split.tsv"), read_model_config(model_dir)
    if split.sha256 != config.pretraining.get("split_sha256"):
        raise CheckpointMismatchError("split.tsv is not the one that the model was trained with (split_sha256)", where=model_dir, fix="copy the model folder again")  # fmt: skip
    refuse_same_pictures(split, cohort.stimuli)
    return extend_split(split, cohort, new)


def prepare_alignment(
    model_dir: Path,
    cohort: VoxelCohort,
    participants: Sequence[str],
    fit: CaptionFitSettings,
    *,
    batch_size: int,
    seed: int,
    language: CausalLanguageModel,
    sentences: TextEncoder,
    pictures: Mapping[str, Tensor] | None,
) -> PreparedCaptioner:
    """A captioner in front of ``language``, and the trials it trains on.

    ``pictures`` are vectors of the pictures by name, with which brains are then contrasted in place of sentences.
    """
    encoder, split = BrainCaption.load(model_dir), read_split(model_dir, cohort, new=_split_settings(model_dir))
    for name in participants:
        check_viewer(encoder.viewers, cohort.spaces[name])
    source = _batches(cohort, split, participants, fit, batch_size=batch_size, seed=seed)
    captions = {name: source.captions_of(name) for one in (*source.trials, *source.validation_trials) for name in one.names}
    targets = sentence_targets(sentences, [text for said in captions.values() for text in said])
    bank = _bank(source, targets)
    width = sentences.width
    if pictures is not None and fit.speaks_from == "vector":
        raise UsageError(
            "brains are contrasted with pictures, and no caption has a picture's vector to learn from (fit.speaks_from=vector)",
            fix="contrast with sentences (without vision), or set fit.speaks_from=queries",
        )
    if pictures is not None:
        absent = sorted(set(captions) - set(pictures))
        if absent:
            raise InputDatasetError(
                f"{len(absent)} pictures have no vector, e.g. '{absent[0]}'", fix="embed every picture of the cohort (vision)"
            )
        width = len(next(iter(pictures.values())))
    captioner = build_captioner(encoder, fit, language, contrast_width=width, seed=seed)
    if fit.alignment:
        captioner.targets, captioner.by_image = _sentence_targets(fit, captions, targets) if pictures is None else (pictures, True)
    if fit.word_weight:
        captioner.words = CaptionWords(language, bank.captions, temperature=fit.temperature)
    captioner.score = _judge(captioner, cohort, source)
    record = CaptionRecord(
        language_model=language.name,
        language_sha256=language.fingerprint(),
        language_width=language.width,
        text_encoder=sentences.name,
        text_encoder_sha256=sentences.fingerprint(),
        contrast_width=width,
        contrast_with="nothing" if not fit.alignment else "sentences" if pictures is None else "images",
        split_sha256=split.sha256,
        templates=cohort.templated,
        fit=fit.model_dump(mode="json"),
    )
    config = _with_split(read_model_config(model_dir), split).model_copy(update={"alignment": record.model_dump(mode="json")})
    return PreparedCaptioner(
        captioner=captioner, source=source, split=split, bank=bank, config=config, participants=tuple(participants), sentences=sentences
    )


def prepare_person(
    model_dir: Path,
    cohort: VoxelCohort,
    participants: Sequence[str],
    *,
    share: float,
    batch_size: int,
    seed: int,
    sentences: TextEncoder,
    language_model: str | None = None,
) -> PreparedCaptioner:
    """An aligned captioner to which participants are added: only their embedding and first layer train, on ``share`` of their pictures."""
    captioner, record = load_captioner(model_dir, language_model=language_model)
    if sentences.fingerprint() != record.text_encoder_sha256:
        raise CheckpointMismatchError(f"the sentence encoder '{sentences.name}' is not the model's (text_encoder_sha256)", where=model_dir, fix=f"give {record.text_encoder} as it was")  # fmt: skip
    split = read_split(model_dir, cohort, new=_split_settings(model_dir))
    for name in participants:
        if name in captioner.viewers:
            raise InputDatasetError(
                f"the model knows participant {name} already",
                where=model_dir,
                fix="give participants it has not seen (--participant-label)",
            )
        space = cohort.spaces[name]
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            captioner.model.add(name, Viewer(places_mm=torch.from_numpy(np.array(space.places_mm))))
        captioner.viewers = captioner.viewers | {name: ViewerRecord.of(space)}
    own = tuple(f"encoder.{part}.{name}" for name in participants for part in ("people", "first", "whole"))
    for name, parameter in captioner.model.named_parameters():
        parameter.requires_grad_(name in own)
    source = _batches(cohort, split, participants, captioner.fit, batch_size=batch_size, seed=seed, share=share)
    captions = {name: source.captions_of(name) for one in (*source.trials, *source.validation_trials) for name in one.names}
    targets = sentence_targets(sentences, [text for said in captions.values() for text in said])
    if captioner.fit.alignment and record.contrast_with == "sentences":
        captioner.targets, captioner.by_image = _sentence_targets(captioner.fit, captions, targets)
    # what reads vectors has learnt to from text: a person has nothing to learn through the language model
    captioner.fit = captioner.fit.model_copy(update={"contrast_epochs": math.inf if captioner.fit.speaks_from == "vector" else 0.0})
    captioner.score = _judge(captioner, cohort, source)
    config = _with_split(read_model_config(model_dir), split).model_copy(
        update={"viewers": captioner.viewers, "tuning": {"kind": "participants", "participants": list(participants), "share": share}}
    )
    return PreparedCaptioner(
        captioner=captioner,
        source=source,
        split=split,
        bank=read_bank(model_dir),
        config=config,
        participants=tuple(participants),
        sentences=sentences,
    )


def fit_captioner(
    prepared: PreparedCaptioner, plan: TrainingPlan, execution: Execution, folder: Path, *, new_people: bool
) -> TrainingResult:
    """Train to the end, going on from ``folder/checkpoints``; the split is written first.

    Raises
    ------
    InternalError
        The frozen language model has changed.
    """
    captioner, checkpoints = prepared.captioner, folder / "checkpoints"
    prepared.split.write(folder / "split.tsv")
    if new_people and newest_state(checkpoints) is None:
        write_json(folder / "normalisation.json", fit_scale(captioner.model.scale, prepared.source.cohort, prepared.source.trials))
    before = captioner.language.fingerprint()
    captioner.language.to(choose_device(execution.device))
    result = train(captioner, prepared.source, plan, execution, checkpoints)
    captioner.model.load_state_dict(result.weights)
    captioner.model.eval()
    if captioner.language.fingerprint() != before:
        raise InternalError("the frozen language model has changed", where=folder, fix="this is a bug in brainfm; please report it")
    return result


def write_captioner(prepared: PreparedCaptioner, result: TrainingResult, model_dir: Path, folder: Path, seed: int) -> list[Path]:
    """Write the model folder: weights, configuration, training captions with their vectors, log, and what was seen; gives back the files."""
    bank = prepared.bank
    before = read_provenance(model_dir)
    datasets = prepared.source.cohort.dataset_of
    seen = sorted(participant_hash(datasets[name], name) for name in prepared.participants)
    position = result.position
    return [
        folder / "split.tsv",
        write_tensors(folder / "model.safetensors", result.weights),
        write_text(folder / "config.yaml", prepared.config.to_yaml()),
        write_json(folder / "captions.json", list(bank.captions)),
        write_tensors(folder / "captions.safetensors", {"vectors": bank.vectors}),
        write_text(folder / "log.csv", result.log.to_csv()),
        write_json(
            folder / "provenance.json",
            before
            | {
                "aligned_on": sorted({*before.get("aligned_on", ()), *seen}),
                "backbone": model_dir.name,
                "alignment_seed": seed,
                "alignment_steps": position.step,
                "alignment_epoch": position.best_epoch,
                "versions": package_versions(),
            },
        ),
    ]


def read_bank(model_dir: Path) -> CaptionBank:
    """Training captions of an aligned model.

    Raises
    ------
    CheckpointMismatchError
        Captions and vectors do not fit together.
    """
    try:
        captions = tuple(map(str, read_json(model_dir / "captions.json")))
        vectors = read_tensors(model_dir / "captions.safetensors")["vectors"]
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointMismatchError(
            f"the training captions are unreadable: {error}", where=model_dir, fix="copy the model folder again"
        ) from error
    if len(captions) != len(vectors):
        raise CheckpointMismatchError(
            "training captions and their vectors differ in number", where=model_dir, fix="copy the model folder again"
        )
    return CaptionBank(captions=captions, vectors=vectors)


def _split_settings(model_dir: Path) -> ImageSplitSettings:
    return ImageSplitSettings.from_values(read_model_config(model_dir).pretraining["split"], where=model_dir / "config.yaml")


def _with_split(config: ModelConfig, split: ImageSplit) -> ModelConfig:
    return config.model_copy(update={"pretraining": config.pretraining | {"split_sha256": split.sha256}})


def _batches(
    cohort: VoxelCohort,
    split: ImageSplit,
    participants: Sequence[str],
    fit: CaptionFitSettings,
    *,
    batch_size: int,
    seed: int,
    share: float = 1.0,
) -> TrialBatches:
    held = select_trials(cohort, split, participants, "validation")
    return TrialBatches(
        cohort=cohort,
        trials=select_trials(cohort, split, participants, "train", share=share, seed=seed),
        validation_trials=tuple(_one_trial_each(one, fit.judged_images) for one in held),
        batch_size=batch_size,
        seed=seed,
        captions_per_image=fit.captions_per_image,
    )


def _sentence_targets(
    fit: CaptionFitSettings, captions: Mapping[str, Sequence[str]], targets: Mapping[str, Tensor]
) -> tuple[Mapping[str, Tensor], bool]:
    """Vectors by caption or, as means, by picture; and whether it is by picture."""
    if fit.contrast_target == "caption":
        return targets, False
    return dict(zip(captions, picture_vectors(list(captions), captions, targets), strict=True)), True


def _one_trial_each(trials: PersonTrials, most: int) -> PersonTrials:
    first: dict[str, int] = {}
    for name, row in zip(trials.names, trials.rows, strict=True):
        first.setdefault(name, int(row))
    kept = list(first.items())[:most]
    return PersonTrials(
        participant=trials.participant, rows=np.array([row for _, row in kept], np.int64), names=tuple(name for name, _ in kept)
    )


def _bank(source: TrialBatches, targets: Mapping[str, Tensor]) -> CaptionBank:
    names = dict.fromkeys(name for one in source.trials for name in one.names)
    captions = tuple(dict.fromkeys(text for name in names for text in source.captions_of(name)))
    return CaptionBank(captions=captions, vectors=torch.stack([targets[text] for text in captions]))


def _judge(captioner: AlignedCaptioner, cohort: VoxelCohort, source: TrialBatches) -> Callable[[], float] | None:
    """CIDEr of the judged pictures, where it chooses the epoch."""
    if captioner.fit.judge == "loss":
        return None
    return partial(_score, captioner, cohort, source.validation_trials)


def _score(captioner: AlignedCaptioner, cohort: VoxelCohort, trials: Sequence[PersonTrials]) -> float:
    """CIDEr of what the captioner says of single validation trials."""
    viewings = [one for person in trials for one in list_viewings(person, "none")]
    spoken = speak(captioner, cohort, viewings, max_tokens=_JUDGED_TOKENS)
    references = [cohort.stimuli[one.viewing.name].captions for one in spoken]
    return cider([one.caption for one in spoken], references).value() or 0.0
