"""caption for brain-caption: what participants saw, in words, from their single-trial responses."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, model_validator
from rich.console import Console

from brainfm_cli.bids.derivatives import OutputDataset, write_json
from brainfm_cli.bids.names import output_name
from brainfm_cli.bids.units import Unit, UnitResult, run_units
from brainfm_cli.bids.voxel_cohort import VoxelCohort
from brainfm_cli.config import Settings
from brainfm_cli.documents import read_json
from brainfm_cli.errors import SettingsError
from brainfm_cli.learning.checkpoints import check_viewer, model_files, read_model_config, source_of_model
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.voxel_samples import PersonTrials, select_trials
from brainfm_cli.systems.brain_caption.aligned import CaptionRecord, load_captioner, load_sentences
from brainfm_cli.systems.brain_caption.decoding import BeamChoice, list_viewings, speak
from brainfm_cli.systems.brain_caption.encoder import CREDITS
from brainfm_cli.systems.brain_caption.fitting import read_bank, read_split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from brainfm_cli.config import Invocation
    from brainfm_cli.learning.image_split import ImageSplit
    from brainfm_cli.models.language import TextEncoder
    from brainfm_cli.systems.brain_caption.aligned import AlignedCaptioner
    from brainfm_cli.systems.brain_caption.decoding import Alteration, Average, Spoken, Viewing
    from brainfm_cli.systems.brain_caption.floors import CaptionBank

Role = Literal["test", "validation", "train"]


class CaptionSettings(Settings):
    """Settings of ``brainfm caption`` for brain-caption models."""

    role: Role = "test"
    """Which pictures are captioned: those that test; those of training are no test of anything."""
    single_trials: bool = True
    """Whether every single trial is captioned too, beside the average of a picture's repeats."""
    beams: int = Field(default=1, ge=1)
    """Beams of the search; 1 is greedy."""
    vector_weight: float = Field(default=0.0, ge=0)
    """Weight of the cosine between the brain's vector and a sentence's, beside the mean log-probability of its tokens, in choosing among the beams;
    0 says the likeliest. Needs ``beams`` of 2 or more, and a model that was contrasted with sentences."""
    max_tokens: int = Field(default=30, ge=1)
    """Longest caption, in tokens."""
    batch_size: int = Field(default=32, ge=1)
    """Captions made at a time."""
    chat: tuple[str, ...] = ()
    """Questions asked of every picture, one after another (--chat); the model was not trained to answer them."""
    llm: str | None = None
    """Where the model's language model now is, if it has moved."""
    floors: tuple[Literal["constant", "shuffled captions", "zeroed voxels", "shuffled voxels", "ridge"], ...] = (
        "constant", "shuffled captions", "zeroed voxels", "shuffled voxels", "ridge",
    )  # fmt: skip
    """group: what stands beside the model, on the same pictures."""
    bootstraps: int = Field(default=2000, ge=10)
    """group: resamples of pictures behind every interval."""
    seed: int = Field(default=0, ge=0)
    """Seed of resamples and of what is shuffled."""

    @model_validator(mode="after")
    def _something_to_choose_from(self) -> CaptionSettings:
        if self.vector_weight and self.beams < 2:
            raise ValueError("vector_weight chooses among beams: give beams=2 or more")
        return self


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """An aligned model with the cohort it speaks about."""

    captioner: AlignedCaptioner
    """The model, on its device."""
    record: CaptionRecord
    """How it was aligned."""
    cohort: VoxelCohort
    """Where the responses are."""
    split: ImageSplit
    """The model's."""
    bank: CaptionBank
    """Captions of the training pictures."""
    sentences: TextEncoder
    """The sentence encoder it was aligned with."""

    def speak(self, viewings: Sequence[Viewing], settings: CaptionSettings, altered: Alteration = "none") -> list[Spoken]:
        """Captions of viewings as the settings ask for them; the brain ``altered`` as :func:`speak` has it."""
        return speak(
            self.captioner,
            self.cohort,
            viewings,
            altered=altered,
            seed=settings.seed,
            beams=settings.beams,
            max_tokens=settings.max_tokens,
            batch_size=settings.batch_size,
            choice=BeamChoice(sentences=self.sentences, weight=settings.vector_weight) if settings.vector_weight else None,
        )


def caption_viewing(call: Invocation, model: Path, settings: CaptionSettings) -> int:
    """Speak or score; gives back the exit code."""
    cohort = VoxelCohort.open(call.input_dir)
    known = read_model_config(model).viewers
    people = cohort.choose_participants(call.selection.participant_label or [name for name in sorted(cohort.spaces) if name in known])
    for name in people:
        check_viewer(known, cohort.spaces[name])
    read_split(model, cohort)
    if settings.vector_weight and read_model_config(model).alignment.get("contrast_with") in {"images", "nothing"}:
        raise SettingsError(
            "vector_weight compares sentences with the brain's vector, and this model's was not contrasted with sentences",
            where=model, fix="set vector_weight=0",
        )  # fmt: skip
    if call.level == "group":
        from brainfm_cli.stages.caption.scoring import score_group

        return score_group(call, model, settings, cohort, people)
    if call.dry_run:
        Console().print(
            f"caption {model.name}: {len(people)} participants, one JSON each, pictures of role {settings.role}", highlight=False
        )
        return 0
    dataset = open_output(call, model, settings)
    common = {"cohort_dir": cohort.root, "model": model, "root": dataset.root, "settings": settings, "device": call.execution.device}
    inputs = tuple(dict.fromkeys((*cohort.files, *model_files(model))))
    units = [Unit(name=f"sub-{name}", inputs=inputs, work=write_captions, arguments={**common, "participant": name}) for name in people]
    return run_units(dataset, units, call.execution)


def write_captions(cohort_dir: Path, model: Path, root: Path, settings: CaptionSettings, device: str, participant: str) -> UnitResult:
    """Write what the model says that one participant saw."""
    loaded = load(cohort_dir, model, device, settings.llm)
    (trials,) = select_trials(loaded.cohort, loaded.split, [participant], settings.role)
    values: dict[str, Any] = {
        "participant": participant,
        "model": model.name,
        "role": settings.role,
        "split": loaded.split.unit,
        "language_model": loaded.record.language_model,
        "captions_of_training": "template" if loaded.record.templates else "people",
        "captions": _said(loaded, trials, settings, "repeats"),
    }
    if settings.single_trials:
        values["single_trials"] = _said(loaded, trials, settings, "none")
    if settings.chat:
        values["answers"] = _answers(loaded, trials, settings)
        values["note"] = (
            "Answers come from an instruction-tuned language model behind vectors that were trained to be put into one caption."
        )
    notes = () if settings.role == "test" else (f"pictures of role {settings.role} are no test: the model has learnt from them",)
    path = root / f"sub-{participant}" / output_name("caption", {"sub": participant})
    return UnitResult(outputs=(write_json(path, values),), notes=notes, seed=settings.seed)


@lru_cache(maxsize=1)
def load(cohort_dir: Path, model: Path, device: str, language_model: str | None) -> Loaded:
    """Loaded once per process: a worker captions many people."""
    cohort = VoxelCohort.open(cohort_dir)
    captioner, record = load_captioner(model, language_model=language_model, device=choose_device(device))
    return Loaded(
        captioner=captioner,
        record=record,
        cohort=cohort,
        split=read_split(model, cohort),
        bank=read_bank(model),
        sentences=load_sentences(record.text_encoder),
    )


def open_output(call: Invocation, model: Path, settings: CaptionSettings) -> OutputDataset:
    """The output of both levels."""
    return OutputDataset.open(
        call.output_dir, command="caption", settings=settings, sources=[call.input_dir, source_of_model(model)], citation=_CITATION
    )  # fmt: skip


def _said(loaded: Loaded, trials: PersonTrials, settings: CaptionSettings, average: Average) -> list[dict[str, Any]]:
    spoken = loaded.speak(list_viewings(trials, average), settings)
    nearest = loaded.bank.nearest(loaded.sentences.sentences([one.caption or "." for one in spoken]))
    return [_row(one, near) for one, near in zip(spoken, nearest, strict=True)]


def _row(one: Spoken, near: tuple[str, float]) -> dict[str, Any]:
    return {
        "stimulus": one.viewing.name,
        "trials": list(one.viewing.rows),
        "caption": one.caption,
        "log_probability": round(one.log_probability, 5),
        "nearest_training_caption": near[0],
        "nearest_cosine": round(near[1], 5),
        "vector": [round(value, 5) for value in one.vector.tolist()],
    }


def _answers(loaded: Loaded, trials: PersonTrials, settings: CaptionSettings) -> list[dict[str, Any]]:
    from brainfm_cli.systems.brain_caption.decoding import answer

    rows = []
    for viewing in list_viewings(trials, "repeats"):
        asked = answer(loaded.captioner, loaded.cohort, viewing, settings.chat, max_tokens=settings.max_tokens)
        rows.append({"stimulus": viewing.name, "turns": [{"question": question, "answer": said} for question, said in asked]})
    return rows


def read_captions(root: Path, participant: str) -> dict[str, Any]:
    """What the participant level wrote.

    Raises
    ------
    InputNotFoundError
        It has not run.
    InputDatasetError
        The file is damaged.
    """
    from brainfm_cli.errors import InputDatasetError, InputNotFoundError

    path = root / f"sub-{participant}" / output_name("caption", {"sub": participant})
    try:
        values: dict[str, Any] = read_json(path)
        _ = values["captions"][0]["caption"]
    except FileNotFoundError as error:
        raise InputNotFoundError(
            f"participant {participant} has no captions yet", where=path, fix="run 'brainfm caption … participant' first"
        ) from error
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise InputDatasetError(f"the captions are unreadable: {error}", where=path, fix="run the participant level again") from error
    return values


_CITATION = f"""# How this was made

Captions by `brainfm caption`. Cite brainfm (CITATION.cff) and, for brain-caption models, {CREDITS.prompts}
"""
