"""A voxel encoder joined to a frozen language model: settings, the module that is trained, its losses, loading and saving."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from brainfm_cli.config import Frozen
from brainfm_cli.errors import CheckpointMismatchError
from brainfm_cli.learning.alignment import FrozenTextRecord
from brainfm_cli.learning.checkpoints import ViewerRecord, load_weights, read_model_config
from brainfm_cli.learning.voxel_samples import TrialBatch
from brainfm_cli.models.causal_language import CausalLanguageModel, Generated, load_language_model
from brainfm_cli.models.graphs import full_precision, hashed_normal, hashed_uniform
from brainfm_cli.models.language import TextEncoder, load_text_encoder
from brainfm_cli.models.q_former import BrainBridge, QFormerShape, same_image_contrast
from brainfm_cli.models.voxel_encoder import Viewer, VoxelEncoder, VoxelScale, VoxelShape, choose_hidden_patches, cut_voxels
from brainfm_cli.programs.assets import source_of
from brainfm_cli.systems.brain_caption.encoder import BrainCaption, BrainCaptionSettings

if TYPE_CHECKING:
    from brainfm_cli.systems.brain_caption.decoding import BeamChoice

Q_FORMERS: dict[str, QFormerShape] = {
    "nano": QFormerShape(num_queries=8, width=64, num_layers=2, num_heads=4),
    "small": QFormerShape(num_queries=16, width=256, num_layers=4, num_heads=4),
    "base": QFormerShape(num_queries=16, width=256, num_layers=4, num_heads=4),
    "large": QFormerShape(),
}
_HIDE, _NOISE, _BLUR = 1, 2, 3  # streams of the hashed random numbers
_MOST_TOKENS = 40  # of a caption in training


class QFormerSettings(Frozen):
    """Sizes of the Q-Former; unset ones are those of the system's preset."""

    num_queries: int | None = Field(default=None, ge=1)
    """Queries, and so vectors in front of the language model."""
    width: int | None = Field(default=None, ge=8)
    """Length of a query."""
    num_layers: int | None = Field(default=None, ge=1)
    """Layers, cross-attention in every second."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads; must divide the width."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of activations dropped in training."""
    from_summary: bool = True
    """Whether each query starts from a linear map of the encoder's summary, beside what it has learnt; off is the published design."""

    def shape(self, preset: str) -> QFormerShape:
        """The preset's sizes with the overrides."""
        sizes = {
            name: getattr(self, name) or getattr(Q_FORMERS[preset], name) for name in ("num_queries", "width", "num_layers", "num_heads")
        }
        return QFormerShape(**sizes, dropout=self.dropout, from_summary=self.from_summary)


class CaptionFitSettings(Frozen):
    """How brains and captions are aligned; the first three are the published ablations."""

    pretrained: bool = True
    """Whether the encoder starts from the pretrained weights; a random one keeps the model's split and scale, and trains from the start."""
    alignment: bool = True
    """Whether the mean query is contrasted with sentence (or picture) vectors."""
    captions_per_image: int | None = Field(default=5, ge=1)
    """Captions of a picture that training draws from, the first ones; all where unset."""
    contrast_weight: float = Field(default=0.1, gt=0)
    """Weight of the contrast beside the language model's loss."""
    contrast_target: Literal["caption", "picture"] = "caption"
    """What sentences a brain is contrasted with: the one caption that was sampled, or the mean vector of the captions that may be."""
    temperature: float = Field(default=0.07, gt=0)
    """Temperature of the contrast."""
    word_weight: float = Field(default=0.0, ge=0)
    """Weight of a loss that makes the vectors in front of the language model resemble the token vectors of the caption's rarer words, in every
    epoch, the first ones included. It costs next to nothing and spares most epochs through the language model; not in the published design."""
    contrast_epochs: float = Field(default=0.0, ge=0)
    """First epochs that train on the contrast alone (BLIP-2's first stage): a hundred times cheaper than epochs through the language model."""
    language_reaches: Literal["encoder", "projection"] = "encoder"
    """How far the language model's gradient goes: to the Q-Former and encoder, or to the last linear layer alone, for few and small batches whose
    gradient would undo what the contrast has taught."""
    speaks_from: Literal["queries", "vector"] = "queries"
    """What the language model reads: the Q-Former's queries, as published, or the vector that is contrasted with sentences. What reads a vector
    learns to say captions from their own vectors, blurred by ``text_noise``, and no brain is needed to teach it (CapDec); brains learn by contrast."""
    text_noise: float = Field(default=1.0, ge=0)
    """Size of what blurs these vectors, beside the spread of captions: 1 leaves as much of the caption as of others. It should make a blurred
    vector as unlike its caption as the vector of a brain that was never seen is."""
    hidden_share: float = Field(default=0.0, ge=0, lt=1)
    """Share of patches that each training trial hides, others in every epoch: against learning single voxels by heart."""
    noise: float = Field(default=0.0, ge=0)
    """Standard deviation of noise added to z-scored voxels in training, new in every epoch."""
    lora: int = Field(default=0, ge=0)
    """Rank of weights that are added to queries and values of the language model and trained too; 0 is the published design, which trains what
    stands in front of it alone. Its own weights stay as they are."""
    lora_rate: float = Field(default=1.0, gt=0)
    """Learning rate of these weights as a multiple: they are fresh when the schedule's rate has already fallen, after ``contrast_epochs``."""
    language_items: int | None = Field(default=None, ge=1)
    """Trials of each batch that go through the language model, the first ones; all where unset. Contrast wants large batches, a CPU small ones."""
    encoder_frozen: float = Field(default=0.1, ge=0, le=1)
    """Share of steps before a pretrained encoder trains too."""
    encoder_rate: float = Field(default=0.1, ge=0, le=1)
    """Its learning rate afterwards, as a share."""
    q_former: QFormerSettings = QFormerSettings()
    """Sizes of the Q-Former."""
    judge: Literal["cider", "loss"] = "cider"
    """What chooses the epoch: CIDEr of captions of validation pictures, or the language model's loss."""
    judged_images: int = Field(default=32, ge=2)
    """Validation pictures of each participant that choose the epoch, one trial each."""

    @model_validator(mode="after")
    def _vectors_are_taught(self) -> CaptionFitSettings:
        if self.speaks_from == "vector" and not self.alignment:
            raise ValueError("speaks_from=vector needs alignment: the brain's vector is learnt by contrast alone")
        return self


class CaptionRecord(FrozenTextRecord):
    """What config.yaml says of an aligned model (``alignment``)."""

    kind: Literal["captions"] = "captions"
    """What the model was aligned with."""
    contrast_with: Literal["sentences", "images", "nothing"]
    """What brains were contrasted with."""
    split_sha256: str
    """Hash of the split of pictures."""
    templates: bool
    """Whether captions were made from category names."""
    fit: dict[str, Any]
    """Settings of the fit."""


class CaptionModule(nn.Module):
    """Everything that is trained in front of the language model, and the scale of the input."""

    def __init__(self, shape: VoxelShape, viewers: Mapping[str, Viewer], bridge: BrainBridge) -> None:
        super().__init__()
        self.scale = VoxelScale()
        self.encoder = VoxelEncoder(shape, {})
        self.bridge = bridge
        self.language_parts = nn.ParameterDict()
        """What was added to the language model."""
        for name, viewer in sorted(viewers.items()):
            self.add(name, viewer)

    def add(self, name: str, viewer: Viewer) -> None:
        """Make room for a participant."""
        self.scale.add(name, viewer.num_voxels)
        self.encoder.add(name, viewer)

    def forward(self, participant: str, responses: Tensor) -> tuple[Tensor, Tensor]:
        """Vectors for the language model and unit vectors for contrast, from (batch, voxels) responses as stored."""
        return self.read(participant, self.scale(participant, responses))

    def read(
        self, participant: str, scaled: Tensor, hidden: Tensor | None = None, *, projection_alone: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The same from scaled responses, of which ``hidden`` (batch, patches) are not seen."""
        encoding = self.encoder(cut_voxels(participant, scaled, self.encoder.real(participant)), hidden)
        tokens = torch.cat([encoding.summary[:, None], encoding.tokens], dim=1)
        return self.bridge(tokens, projection_alone=projection_alone)


class CaptionWords:
    """Tokens of the training captions as vectors of the language model: which of them a caption holds can be read off the prefix.

    A query names a token with the softmax of their cosines; a token is named if any query names it. The loss is minus the log-probability of
    each token of the caption, rare ones (inverse document frequency) weighing more; those of every caption weigh nothing.
    """

    def __init__(self, language: CausalLanguageModel, captions: Sequence[str], *, temperature: float) -> None:
        self._language, self._temperature = language, temperature
        tokens = language.tokens(sorted(set(captions)), longest=_MOST_TOKENS, end=False)
        held = [set(row[valid].tolist()) for row, valid in zip(tokens.ids, tokens.valid, strict=True)]
        self.ids = torch.tensor(sorted(set().union(*held)))
        self._place = {int(token): place for place, token in enumerate(self.ids)}
        often = torch.zeros(len(self.ids))
        for row in held:
            often[[self._place[token] for token in row]] += 1
        self.weights = (len(held) / often).log()
        self._known: dict[str, Tensor] = {}

    def loss(self, prefix: Tensor, captions: Sequence[str]) -> Tensor:
        """Of (batch, queries, width) vectors and the caption of each; tokens that training never had count for nothing."""
        device = prefix.device
        vectors = functional.normalize(self._language.vectors(self.ids.to(self._language.device)).float(), dim=1).to(device)
        with full_precision(device):  # in half precision a token that is surely named has a probability of one
            cosines = functional.normalize(prefix.float(), dim=2) @ vectors.T
        named = (cosines / self._temperature).log_softmax(dim=2).exp()
        missed = torch.log1p(-named.clamp_max(1 - 1e-6)).sum(dim=1)  # no query names the token
        weights = torch.stack([self._weights_of(text) for text in captions]).to(device)
        found = torch.log(-torch.expm1(missed.clamp_max(-1e-7)))
        return -(weights * found).sum() / weights.sum().clamp_min(1e-6)

    def _weights_of(self, text: str) -> Tensor:
        if text not in self._known:
            tokens = self._language.tokens([text], longest=_MOST_TOKENS, end=False).ids[0].tolist()
            row = torch.zeros(len(self.ids))
            places = [self._place[token] for token in tokens if token in self._place]
            row[places] = self.weights[places]
            self._known[text] = row
        return self._known[text]


@dataclass(kw_only=True)
class AlignedCaptioner:
    """A brain captioner with what is needed to train it and to let it speak."""

    settings: BrainCaptionSettings
    """Sizes of the encoder."""
    fit: CaptionFitSettings
    """How it is, or was, aligned."""
    viewers: dict[str, ViewerRecord]
    """Participants that it knows."""
    model: CaptionModule
    """The torch module, the language model not included."""
    language: CausalLanguageModel
    """The frozen language model."""
    targets: Mapping[str, Tensor] = field(default_factory=dict)
    """Vector that a caption (or a picture, by name) is contrasted with; only for training."""
    by_image: bool = False
    """Whether :attr:`targets` are of pictures."""
    words: CaptionWords | None = None
    """Words of the training captions, where these are learnt too."""
    score: Callable[[], float] | None = None
    """CIDEr of what the model now says of the judged pictures."""
    _epoch: float = 0.0
    _language_losses: list[float] = field(default_factory=list)

    @property
    def module(self) -> nn.Module:
        """The module that is trained."""
        return self.model

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term."""
        return {"language": 1.0, "contrast": self.fit.contrast_weight, "words": self.fit.word_weight}

    def rate_factor(self, name: str, progress: float) -> float:
        """A pretrained encoder trains later and slower than the bridge, unless the bridge is frozen, as when a person is added."""
        if name.startswith("language_parts."):
            return self.fit.lora_rate
        alone = not next(self.model.bridge.parameters()).requires_grad
        if alone or not (self.fit.pretrained and name.startswith("encoder.")):
            return 1.0
        return 0.0 if progress < self.fit.encoder_frozen else self.fit.encoder_rate

    def losses(self, batch: TrialBatch, *, epoch: float) -> dict[str, Tensor]:
        """The language model's loss of one caption per trial, the contrast, and the share of trials told apart in the batch."""
        validating = epoch == float("inf")
        self._epoch = self._epoch if validating else epoch
        self.language.to(batch.responses.device)
        prefix, brains = self._read(batch) if self.model.training else self.model(batch.participant, batch.responses)
        if self.fit.speaks_from == "vector" and self.model.training:
            prefix = self._from_text(batch)
        terms: dict[str, Tensor] = {}
        if self.fit.alignment and self.targets:
            others = self._targets_of(batch).to(brains)
            terms["contrast"] = same_image_contrast(brains, others, batch.images, temperature=self.fit.temperature)
            found = batch.images[(brains.detach() @ others.T).argmax(dim=1)] == batch.images
            terms["monitor_told_apart"] = found.float().mean()
        if self.words is not None and self.fit.word_weight:
            terms["words"] = self.words.loss(prefix, batch.captions)
        if not self._contrast_alone:
            most = self.fit.language_items
            said = self.language.tokens(batch.captions[:most], longest=_MOST_TOKENS).to(prefix.device)
            terms["language"] = self.language.loss(prefix[:most], said).mean()
            if validating:
                self._language_losses.append(float(terms["language"]))
        return terms

    def _targets_of(self, batch: TrialBatch) -> Tensor:
        """(batch, width) vectors that the trials are contrasted with."""
        return torch.stack([self.targets[one] for one in (batch.names if self.by_image else batch.captions)])

    def _from_text(self, batch: TrialBatch) -> Tensor:
        """(batch, queries, language width) what the language model learns from where it reads vectors."""
        vectors, bridge = self._blurred(batch), self.model.bridge
        assert bridge.from_vector is not None  # noqa: S101  (fit.speaks_from)
        bridge.from_vector.count(vectors, "sentence")
        return bridge.prefix_of(vectors, "sentence")

    def _blurred(self, batch: TrialBatch) -> Tensor:
        """(batch, width) unit vectors of the batch's captions or pictures, blurred like what a brain tells of them.

        The blur is a random sum of the other vectors' differences from their mean, so that it varies as sentences do: what a brain
        tells wrongly is another thing or place, and not noise that no sentence has.
        """
        wanted = self._targets_of(batch).to(batch.responses)
        count = len(wanted)
        blur = hashed_normal(batch.keys, (count,), stream=_BLUR).to(wanted) @ (wanted - wanted.mean(dim=0)) / count**0.5
        return functional.normalize(wanted + self.fit.text_noise * blur, dim=1)

    def _read(self, batch: TrialBatch) -> tuple[Tensor, Tensor]:
        """As in use, with what is hidden and the noise of training; both depend on the trial and the epoch alone."""
        scaled = self.model.scale(batch.participant, batch.responses)
        if self.fit.noise:
            scaled = scaled + self.fit.noise * hashed_normal(batch.keys, (scaled.shape[1],), stream=_NOISE)
        hidden = None
        if self.fit.hidden_share:
            scores = hashed_uniform(batch.keys, (len(self.model.encoder.real(batch.participant)),), stream=_HIDE)
            hidden = choose_hidden_patches(scores, self.fit.hidden_share)
        alone = self.fit.language_reaches == "projection" and not self._contrast_alone
        return self.model.read(batch.participant, scaled, hidden, projection_alone=alone)

    def judge(self, epoch: int) -> float | None:  # noqa: ARG002  (the state of training says it)
        """What is smallest in the best epoch: minus CIDEr of validation pictures, or the language model's loss."""
        seen, self._language_losses = self._language_losses, []
        if self._contrast_alone:
            return None
        if self.score is None or self.fit.judge == "loss":
            return sum(seen) / max(1, len(seen))
        was = self.model.training
        self.model.eval()
        value = -self.score()
        self.model.train(was)
        return value

    @property
    def _contrast_alone(self) -> bool:
        return self.fit.alignment and bool(self.targets) and self._epoch < self.fit.contrast_epochs

    @torch.no_grad()
    def say(
        self, participant: str, scaled: Tensor, *, beams: int = 1, max_tokens: int = 30, choice: BeamChoice | None = None
    ) -> tuple[Generated, Tensor]:
        """What the model says of (batch, voxels) scaled responses, and (batch, contrast width) vectors.

        The likeliest of the beams, or the one that ``choice`` finds best with the brain's vector.
        """
        prefix, brains = self.model.read(participant, scaled)
        found = self.language.to(prefix.device).generate(prefix, beams=beams, max_tokens=max_tokens, every=choice is not None)
        return (found if choice is None else choice.best(found, brains, beams)), brains


def build_captioner(
    encoder: BrainCaption, fit: CaptionFitSettings, language: CausalLanguageModel, *, contrast_width: int, seed: int
) -> AlignedCaptioner:
    """A new captioner in front of a language model, from a pretrained encoder or, as an ablation, a random one."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = _module(encoder.settings, fit, encoder.viewers, language, contrast_width)
        places = {
            key: value
            for key, value in encoder.model.state_dict().items()
            if key.startswith(("encoder.places_", "encoder.real_", "scale."))
        }
        if fit.pretrained:
            places = {key: value for key, value in encoder.model.state_dict().items() if key.startswith(("encoder.", "scale."))}
        absent, unknown = model.load_state_dict(places, strict=False)
        if unknown or (fit.pretrained and not all(key.startswith(("bridge.", "language_parts.")) for key in absent)):
            raise CheckpointMismatchError(
                f"the pretrained encoder does not fit ({', '.join([*unknown, *absent][:3])})", fix="report this as a bug"
            )
    return AlignedCaptioner(settings=encoder.settings, fit=fit, viewers=dict(encoder.viewers), model=model, language=language)


def load_captioner(
    model_dir: Path, *, language_model: str | None = None, device: torch.device | None = None
) -> tuple[AlignedCaptioner, CaptionRecord]:
    """The aligned model of a ``models/<id>`` folder with its language model, in evaluation mode.

    ``language_model`` says where the language model now is, if it has moved.

    Raises
    ------
    CheckpointMismatchError
        The folder holds no aligned captioner, or the language model is another one.
    """
    config = read_model_config(model_dir)
    if config.system.get("kind") != "brain-caption" or config.alignment.get("kind") != "captions":
        raise CheckpointMismatchError(
            "this model says nothing: it was not aligned with captions", where=model_dir, fix="run 'brainfm align' first"
        )
    record = CaptionRecord.from_values(config.alignment, where=model_dir / "config.yaml")
    settings = BrainCaptionSettings.from_values(config.system, where=model_dir / "config.yaml")
    fit = CaptionFitSettings.from_values(record.fit, where=model_dir / "config.yaml")
    language = load_language(language_model or record.language_model)
    if language.fingerprint() != record.language_sha256:
        raise CheckpointMismatchError(
            f"the language model '{language.name}' is not the one that the model was aligned with (language_sha256)",
            where=model_dir,
            fix=f"give {record.language_model} as it was",
        )
    model = _module(settings, fit, config.viewers, language, record.contrast_width)
    load_weights(model, model_dir / "model.safetensors")
    model.eval()
    captioner = AlignedCaptioner(settings=settings, fit=fit, viewers=config.viewers, model=model, language=language)
    if device is not None:
        model.to(device)
        language.to(device)
    return captioner, record


def load_language(name: str) -> CausalLanguageModel:
    """A language model by asset name or local path."""
    return load_language_model(Path(source_of(name)), name=name)


def load_sentences(name: str) -> TextEncoder:
    """A sentence encoder by asset name, folder or hub name; never another than the one asked for."""
    return load_text_encoder(source_of(name), name=name)


def _module(
    settings: BrainCaptionSettings,
    fit: CaptionFitSettings,
    viewers: Mapping[str, ViewerRecord],
    language: CausalLanguageModel,
    contrast_width: int,
) -> CaptionModule:
    shape = settings.shape
    bridge = BrainBridge(
        fit.q_former.shape(settings.preset),
        token_width=shape.width,
        language_width=language.width,
        contrast_width=contrast_width,
        token_norm=language.token_norm,
    )
    if fit.speaks_from == "vector":
        bridge.read_vectors()
    module = CaptionModule(shape, {name: Viewer(places_mm=torch.zeros(one.voxels, 3)) for name, one in viewers.items()}, bridge)
    if fit.lora:
        module.language_parts.update(language.adapt(fit.lora))  # the same parameters, so that they are trained and saved with the rest
    return module


def sentence_targets(encoder: TextEncoder, captions: Sequence[str]) -> dict[str, Tensor]:
    """Unit vector of every caption."""
    unique = sorted(set(captions))
    return dict(zip(unique, encoder.sentences(unique), strict=True))
