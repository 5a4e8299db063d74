"""A frozen MRI encoder joined to a frozen language model: settings, what is trained between them, its losses, loading.

Slices are encoded once. A small Transformer reads a study's slices; its study token is contrasted with what the report says, and a bridge
(perceiver or two-layer perceptron) puts vectors into the first question of a conversation, of which the answers are learnt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from brainfm_cli.bids.slice_cohort import PLANES, SEQUENCES, SliceCohort
from brainfm_cli.config import Frozen
from brainfm_cli.errors import CheckpointMismatchError
from brainfm_cli.learning.alignment import FrozenTextRecord
from brainfm_cli.learning.checkpoints import load_weights, read_model_config
from brainfm_cli.models.causal_language import CausalLanguageModel, Generated, load_language_model
from brainfm_cli.models.language import TextEncoder, load_text_encoder
from brainfm_cli.models.mri_encoder import STRIDE, Context, MriEncoder
from brainfm_cli.models.q_former import QFormerShape, same_image_contrast
from brainfm_cli.models.study_reader import Bridge, StudyShape, StudySpeaker
from brainfm_cli.programs.assets import source_of
from brainfm_cli.systems.mri_language.classification import StudyFeatures, read_slices
from brainfm_cli.systems.mri_language.encoder import MriLanguage
from brainfm_cli.systems.mri_language.told_studies import ToldBatch
from brainfm_cli.systems.mri_language.tuning import encoder_hash

SPEAKER_FILE = "speaker.safetensors"
_CELLS = {2: 4, 3: 2}


@dataclass(frozen=True)
class _Sizes:
    width: int
    num_layers: int
    num_heads: int
    num_queries: int
    query_layers: int


_SIZES = {
    "nano": _Sizes(64, 2, 4, 8, 2),
    "tiny": _Sizes(128, 2, 4, 16, 2),
    "small": _Sizes(256, 2, 8, 32, 4),
    "base": _Sizes(512, 4, 8, 32, 6),
    "large": _Sizes(768, 4, 12, 64, 6),
}


class SpeakerSettings(Frozen):
    """Sizes of what is trained; unset ones are those of the encoder's preset."""

    width: int | None = Field(default=None, ge=8)
    """Length of a slice's token and of a query."""
    num_layers: int | None = Field(default=None, ge=1)
    """Layers of the Transformer over slices."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads; must divide the width."""
    num_queries: int | None = Field(default=None, ge=1)
    """Vectors in front of the language model."""
    query_layers: int | None = Field(default=None, ge=1)
    """Layers of the perceiver, cross-attention in every second."""
    bridge: Bridge = "perceiver"
    """perceiver: queries attend to all slices; mlp: the study token through two layers."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of activations dropped in training."""

    def sizes(self, preset: str) -> _Sizes:
        """The preset's with the overrides."""
        names = ("width", "num_layers", "num_heads", "num_queries", "query_layers")
        return _Sizes(**{name: getattr(self, name) or getattr(_SIZES[preset], name) for name in names})


class SpeakFitSettings(Frozen):
    """How studies and reports are aligned."""

    contrast: bool = True
    """Whether studies are contrasted with their reports; off is an ablation."""
    contrast_weight: float = Field(default=0.3, gt=0)
    """Weight of the contrast beside the language model's loss."""
    temperature: float = Field(default=0.1, gt=0)
    """Temperature of the contrast."""
    contrast_with: Literal["findings", "sentences"] = "findings"
    """findings: what the parser finds in a report, restated in English, so that any language that it reads will do; sentences: the report as it is."""
    same_findings: bool = True
    """Whether studies with the same disease, side and place are positives of one another rather than negatives."""
    contrast_epochs: float = Field(default=30.0, ge=0)
    """First epochs that train on the contrast alone: a hundred times cheaper than those through the language model."""
    language_items: int | None = Field(default=8, ge=1)
    """Studies of each training batch that go through the language model, the first ones; all where unset. Contrast wants large batches, a CPU
    small ones."""
    longest: int = Field(default=320, ge=32)
    """Tokens of a conversation; what is longer is cut."""
    facts: bool = True
    """Whether facts measured in lesion masks stand in the question."""
    drop_facts: float = Field(default=0.3, ge=0, le=1)
    """Share of training studies whose facts are left out, so that studies without a mask can be described too."""
    drop_sequence: float = Field(default=0.3, ge=0, le=1)
    """Share of training studies with several sequences of which one is hidden."""
    built_in: bool = True
    """Whether the tasks that follow from a report (itself, closed questions, plain words) are taught; off leaves the given instructions alone."""
    lora: int = Field(default=0, ge=0)
    """Rank of weights that are added to queries and values of the language model and trained too; 0 trains what stands in front of it alone.
    Its own weights stay as they are."""
    speaker: SpeakerSettings = SpeakerSettings()
    """Sizes of what is trained."""


class SpeakerRecord(FrozenTextRecord):
    """What config.yaml says of an aligned model (``alignment``)."""

    kind: Literal["reports"] = "reports"
    """What the model was aligned with."""
    encoder_sha256: str
    """Hash of the pretrained encoder's weights."""
    size: int
    """Pixels along each side."""
    plane: str
    """Which way slices run."""
    sequences: tuple[str, ...] = ()
    """Sequences that are read; all where empty."""
    diseases: tuple[str, ...]
    """Diseases of training reports."""
    restated: bool
    """Whether it learnt English restatements of reports in place of the reports."""
    written_in: str
    """Languages of the reports that it learnt to write."""
    people: int
    """Training people."""
    abstain_below: float
    """Mean log-probability of a token below which an answer is withheld: what one in twenty answers about validation people falls below."""
    fit: SpeakFitSettings
    """How it was aligned."""


class CellReader(nn.Module):
    """The encoder as something that makes features of slices which know where things are."""

    def __init__(self, encoder: MriEncoder) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor, context: Context) -> Tensor:
        """(slices, (1 + cells) · width): class token, and the mean token of each of 4 × 4 parts of a slice (2 × 2 × 2 of a cube)."""
        found = self.encoder(images, context)
        cells = found.tokens.transpose(1, 2).unflatten(2, found.grid).float()
        pool = functional.adaptive_avg_pool2d if len(found.grid) == 2 else functional.adaptive_avg_pool3d
        parts = pool(cells, tuple(min(_CELLS[len(found.grid)], side) for side in found.grid))
        return torch.cat([found.summary.float(), parts.flatten(1)], dim=1)


def cell_features(encoder: MriEncoder, cohort: SliceCohort, people: Sequence[str]) -> StudyFeatures:
    """(slices, features) of every slice of these people."""
    return read_slices(CellReader(encoder), cohort, people)


def context_of_rows(cohort: SliceCohort, rows: Any) -> Context:  # noqa: ANN401  (places in the index)
    """What is known of slices beside their pixels; fields (slices,)."""
    table = cohort.slices.iloc[rows]
    codes = {
        name: table[name].astype(str).map({one: place for place, one in enumerate(known)}).to_numpy("int64", copy=True)
        for name, known in (("sequence", SEQUENCES), ("plane", PLANES))
    }
    return Context(
        sequence=torch.from_numpy(codes["sequence"]),
        plane=torch.from_numpy(codes["plane"]),
        z_mm=torch.from_numpy(table["z_mm"].to_numpy("float32", copy=True)),
    )


@dataclass(kw_only=True)
class StudyTeller:
    """Speaker and frozen language model with what is needed to train the former and to let both speak."""

    fit: SpeakFitSettings
    """How it is, or was, aligned."""
    speaker: StudySpeaker
    """What is trained."""
    language: CausalLanguageModel
    """The frozen language model."""
    _epoch: float = 0.0
    _language_losses: list[float] = field(default_factory=list)

    @property
    def module(self) -> nn.Module:
        """The module that is trained."""
        return self.speaker

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term."""
        return {"language": 1.0, "contrast": self.fit.contrast_weight}

    def losses(self, batch: ToldBatch, *, epoch: float) -> dict[str, Tensor]:
        """The language model's loss of one conversation per study, the contrast, and the share of studies told apart in the batch."""
        validating = epoch == float("inf")
        self._epoch = self._epoch if validating else epoch
        self.language.to(batch.slices.device)
        prefix, studies = self.speaker(batch.slices, batch.present, batch.context)
        terms: dict[str, Tensor] = {}
        if self.fit.contrast:
            targets = batch.targets.to(studies)
            terms["contrast"] = same_image_contrast(studies, targets, batch.groups, temperature=self.fit.temperature)
            found = batch.groups[(studies.detach() @ targets.T).argmax(dim=1)] == batch.groups
            terms["monitor_told_apart"] = found.float().mean()
        if not self._contrast_alone:
            most = None if validating else self.fit.language_items  # a choice among epochs wants everybody
            said = self.language.dialogues(batch.turns[:most], room=self.speaker.num_vectors, longest=self.fit.longest).to(prefix.device)
            terms["language"] = self.language.dialogue_loss(prefix[:most], said).mean()
            if validating:
                self._language_losses.append(float(terms["language"]))
        return terms

    def judge(self, epoch: int) -> float | None:  # noqa: ARG002  (the state of training says it)
        """The language model's loss of validation people; none while the contrast trains alone."""
        seen, self._language_losses = self._language_losses, []
        return None if self._contrast_alone or not seen else sum(seen) / len(seen)

    @property
    def _contrast_alone(self) -> bool:
        return self.fit.contrast and self._epoch < self.fit.contrast_epochs

    @torch.no_grad()
    def read(self, slices: Tensor, context: Context) -> tuple[Tensor, Tensor]:
        """(1, vectors, width) for the language model and (1, contrast width) of one study's (slices, features)."""
        device = next(self.speaker.parameters()).device
        self.speaker.eval()
        one = Context(sequence=context.sequence[None], plane=context.plane[None], z_mm=context.z_mm[None]).to(device)
        found: tuple[Tensor, Tensor] = self.speaker(
            slices[None].to(device), torch.ones(1, len(slices), dtype=torch.bool, device=device), one
        )
        return found

    def without_images(self) -> Tensor:
        """(1, vectors, width) of a study of one slice with the mean features of training: what is left is the language model."""
        zero = torch.zeros(1, dtype=torch.int64)
        mean = self.speaker.reader.get_buffer("mean").cpu()
        return self.read(mean[None], Context(sequence=zero, plane=zero, z_mm=torch.zeros(1)))[0]

    @torch.no_grad()
    def answer(self, prefixes: Sequence[Tensor], asked: Sequence[Sequence[tuple[str, str]]], *, max_tokens: int) -> Generated:
        """What is said to the last question of each conversation, whose earlier turns have answers; ``prefixes`` are (1, vectors, width)."""
        self.language.to(prefixes[0].device)
        rows = [self.language.chat_prefix(one, turns[-1][0], turns[:-1])[0] for one, turns in zip(prefixes, asked, strict=True)]
        longest = max(map(len, rows))
        padded = torch.stack([functional.pad(row, (0, 0, longest - len(row), 0)) for row in rows])
        valid = torch.stack([torch.arange(longest, device=padded.device) >= longest - len(row) for row in rows])
        return self.language.generate(padded, max_tokens=max_tokens, valid=valid)


def new_speaker(system: MriLanguage, fit: SpeakFitSettings, language: CausalLanguageModel, *, features: int, contrast_width: int, seed: int) -> StudySpeaker:  # fmt: skip
    """A speaker with fresh weights in front of a language model."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return _speaker(system, fit, language, features=features, contrast_width=contrast_width)  # fmt: skip


def features_width(system: MriLanguage, size: int) -> int:
    """Length of a slice's features at ``size`` pixels a side."""
    shape = system.settings.shape
    side = min(_CELLS[shape.dims], size // STRIDE)
    return (1 + side**shape.dims) * shape.widths[2]


def _speaker(
    system: MriLanguage, fit: SpeakFitSettings, language: CausalLanguageModel, *, features: int, contrast_width: int
) -> StudySpeaker:
    sizes = fit.speaker.sizes(system.settings.preset)
    made = StudySpeaker(
        StudyShape(width=sizes.width, num_layers=sizes.num_layers, num_heads=sizes.num_heads, dropout=fit.speaker.dropout, num_sequences=len(SEQUENCES), num_planes=len(PLANES)),
        fit.speaker.bridge,
        QFormerShape(num_queries=sizes.num_queries, width=sizes.width, num_layers=sizes.query_layers, num_heads=sizes.num_heads, dropout=fit.speaker.dropout),
        features=features,
        language_width=language.width,
        contrast_width=contrast_width,
        token_norm=language.token_norm,
    )  # fmt: skip
    if fit.lora:
        made.language_parts.update(language.adapt(fit.lora))  # the same parameters, so that they are trained and saved with the rest
    return made


def load_language(name: str) -> CausalLanguageModel:
    """A language model by asset name or local path."""
    return load_language_model(Path(source_of(name)), name=name)


def load_sentences(name: str) -> TextEncoder:
    """A sentence encoder by asset name, folder or hub name; never another than the one asked for."""
    return load_text_encoder(source_of(name), name=name)


def read_speaker_record(model_dir: Path) -> SpeakerRecord:
    """How a model was aligned with reports.

    Raises
    ------
    CheckpointMismatchError
        It was not.
    """
    config = read_model_config(model_dir)
    if config.system.get("kind") != "mri-language" or config.alignment.get("kind") != "reports":
        raise CheckpointMismatchError(
            "this model writes nothing: it was not aligned with reports", where=model_dir, fix="run 'brainfm align' first"
        )
    return SpeakerRecord.from_values(config.alignment, where=model_dir / "config.yaml")


@dataclass(frozen=True, kw_only=True)
class LoadedTeller:
    """An aligned model, ready to speak."""

    system: MriLanguage
    """The frozen encoder."""
    teller: StudyTeller
    """What speaks."""
    record: SpeakerRecord
    """How it was aligned."""
    sentences: TextEncoder
    """The sentence encoder it was aligned with."""


def load_teller(model_dir: Path, *, language_model: str | None = None, device: torch.device | None = None) -> LoadedTeller:
    """The aligned model of a folder with its language model; ``language_model`` says where that now is, if it has moved.

    Raises
    ------
    CheckpointMismatchError
        The model was not aligned with reports, or its encoder, language model or sentence encoder is another one.
    """
    record, system = read_speaker_record(model_dir), MriLanguage.load(model_dir)
    language, sentences = load_language(language_model or record.language_model), load_sentences(record.text_encoder)
    for what, found, known, fix in (
        ("language model", language.fingerprint(), record.language_sha256, f"give {record.language_model} as it was"),
        ("sentence encoder", sentences.fingerprint(), record.text_encoder_sha256, f"install {record.text_encoder} as it was"),
        ("encoder", encoder_hash(system.model.encoder), record.encoder_sha256, "copy the model folder again"),
    ):
        if found != known:
            raise CheckpointMismatchError(f"the {what} is not the one that the model was aligned with", where=model_dir, fix=fix)
    speaker = _speaker(system, record.fit, language, features=features_width(system, record.size), contrast_width=record.contrast_width)
    load_weights(speaker, model_dir / SPEAKER_FILE)
    speaker.eval()
    if device is not None:
        system.model.to(device)
        speaker.to(device)
        language.to(device)
    return LoadedTeller(system=system, teller=StudyTeller(fit=record.fit, speaker=speaker, language=language), record=record, sentences=sentences)  # fmt: skip


def check_languages(texts: Mapping[str, Sequence[str]], encoder: TextEncoder | None, language: CausalLanguageModel) -> None:
    """Refuse reports that the models cannot read: a language whose words a tokenizer does not know (``texts`` by language).

    Raises
    ------
    CheckpointMismatchError
        More than one in twenty tokens is unknown to the sentence encoder, or the language model cuts texts finer than characters.
    """
    for name, said in texts.items():
        unknown = 0.0 if encoder is None else encoder.unknown_share(said)
        if encoder is not None and unknown > 0.05:
            raise CheckpointMismatchError(
                f"{unknown:.0%} of the tokens of reports in '{name}' are unknown to the sentence encoder '{encoder.name}'",
                fix="set fit.contrast_with=findings, or give an encoder of that language: --set text_encoder=FOLDER",
            )
        if language.tokens_per_character(said) > 1:
            raise CheckpointMismatchError(
                f"the language model '{language.name}' reads reports in '{name}' byte by byte: it knows none of their words",
                fix="give a model of that language: --set llm=FOLDER, or restate what reports say in English: --set written_in=en",
            )
