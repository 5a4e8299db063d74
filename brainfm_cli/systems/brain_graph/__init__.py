"""Brain-graph: one graph model for any atlas (BrainGFM). Settings, assembly, losses, loading, embedding."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from scipy.cluster.hierarchy import fcluster, ward
from torch import Tensor, nn

from brainfm_cli.bids.cohort import Cohort, CohortAtlas
from brainfm_cli.config import Frozen
from brainfm_cli.errors import SettingsError
from brainfm_cli.learning import objectives
from brainfm_cli.learning.checkpoints import (
    AtlasRecord,
    check_atlas,
    load_weights,
    read_model_config,
    read_tensors,
    shared_atlases,
    write_tensors,
)
from brainfm_cli.learning.explanation import CONNECTIVITY, Modality
from brainfm_cli.learning.meta import MetaStart, read_starts
from brainfm_cli.learning.pretraining import Credits
from brainfm_cli.learning.samples import PretrainBatch, WindowRule, Windows, pad_windows
from brainfm_cli.learning.tuning import EMBEDDING
from brainfm_cli.models.attention import twice_differentiable
from brainfm_cli.models.graph_encoder import EncoderShape, Encoding
from brainfm_cli.models.graph_model import GraphModel
from brainfm_cli.models.graphs import (
    NUM_WALK_STEPS,
    Connectivity,
    Edges,
    Graphs,
    build_graphs,
    choose_hidden,
    connect,
    correlate,
    fisher_z,
    full_precision,
    hashed_normal,
    hashed_uniform,
    hide_nodes,
    perturb,
)
from brainfm_cli.models.prompts import TargetPrompt
from brainfm_cli.models.readouts import connectivity_blocks
from brainfm_cli.models.text_conditioning import CouplingReader

PRESETS: dict[str, EncoderShape] = {
    "base": EncoderShape(),
    "small": EncoderShape(width=128, num_heads=4, feedforward=256, num_layers=2),
    "tiny": EncoderShape(width=64, num_heads=4, feedforward=128, num_blocks=2, num_layers=1, dropout=0.0),
}
_CREDITS = Credits(
    methods=(
        "Region series were cut into two random windows per scan; connectivity was standardised edge by edge with the statistics of the training "
        "people. The encoder was trained to reconstruct the connectivity rows (smooth L1) and edges (cross-entropy) of hidden regions, and by "
        "contrast between the two windows of a scan and between two atlases, negatives coming from other people of the same dataset."
    ),
    citation="Wei et al., A Brain Graph Foundation Model, ICLR 2026",
    follows="BrainGFM: A Brain Graph\nFoundation Model (Wei et al., ICLR 2026), whose architecture and objectives they follow.",
    prompts="BrainGFM: A Brain Graph\nFoundation Model (Wei et al., ICLR 2026), whose graph prompts it uses.",
)
_TEXT, _READER = "text_direction.safetensors", ("shares", "weights", "offset")
_SMALLEST_SPREAD = 1e-4  # an edge without spread tells nothing, and dividing by it would blow noise up
_HIDE_FIRST, _HIDE_SECOND, _DROP, _NOISE, _NON_EDGES = range(5)  # streams of the hashed random numbers


class GraphSettings(Frozen):
    """How a window of region series becomes a graph."""

    connectivity: Connectivity = "fisher-z"
    """pearson or fisher-z: what the connectivity rows hold."""
    standardise: bool = True
    """Centre and scale every edge by the pretraining people's mean and standard deviation."""
    edges: Edges = "top-k"
    """top-k (largest positive correlations per region), threshold, or knn (nearest connectivity rows)."""
    density: float = Field(default=0.1, gt=0, le=1)
    """Edges per region as a share of the regions, for top-k and knn."""
    threshold: float = Field(default=0.3, ge=0, lt=1)
    """Smallest correlation of an edge, for threshold."""
    min_frames: int = Field(default=60, ge=4)
    """Frames of the shortest window (which is also at least half the run); shorter runs are left out of pretraining."""


class LossSettings(Frozen):
    """Weights and constants of the pretraining losses."""

    node: float = Field(default=1.0, ge=0)
    """Weight of the masked-node loss."""
    edge: float = Field(default=0.1, ge=0)
    """Weight of the masked-edge loss."""
    contrast: float = Field(default=1.0, ge=0)
    """Weight of the contrast between two windows of a scan."""
    cross_atlas: float = Field(default=0.5, ge=0)
    """Weight of the contrast between two atlases of a scan."""
    cross_atlas_probability: float = Field(default=0.5, ge=0, le=1)
    """Share of batches that get a view in another atlas."""
    temperature: float = Field(default=0.2, gt=0)
    """Temperature of both contrasts."""
    mask_first: float = Field(default=0.3, gt=0, lt=1)
    """Share of regions hidden at the start."""
    mask_last: float = Field(default=0.5, gt=0, lt=1)
    """Share of regions hidden after the ramp."""
    mask_ramp_epochs: float = Field(default=5.0, ge=0)
    """Epochs over which the hidden share rises."""
    edge_drop: float = Field(default=0.1, ge=0, lt=1)
    """Share of edges left out in the second window."""
    noise: float = Field(default=0.02, ge=0)
    """Standard deviation of the noise on the second window's connectivity."""


class BrainGraphSettings(Frozen):
    """The brain-graph system."""

    kind: Literal["brain-graph"]
    """Which system."""
    preset: Literal["base", "small", "tiny"] = "base"
    """Size of the encoder; each size below overrides it."""
    width: int | None = Field(default=None, ge=8)
    """Length of a token."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads; must divide the width."""
    feedforward: int | None = Field(default=None, ge=8)
    """Hidden length of the feed-forward part."""
    num_blocks: int | None = Field(default=None, ge=1)
    """Blocks, each of transformer layers and one graph convolution."""
    num_layers: int | None = Field(default=None, ge=1)
    """Transformer layers per block."""
    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Share of activations dropped in training."""
    input_width: int | None = Field(default=None, ge=16)
    """Columns of the shared input projection: regions of the largest atlas plus five."""
    graph: GraphSettings = GraphSettings()
    """Windows, connectivity, edges."""
    losses: LossSettings = LossSettings()
    """Weights and constants of the losses."""

    @property
    def shape(self) -> EncoderShape:
        """The preset's sizes with the overrides."""
        preset = PRESETS[self.preset]
        return EncoderShape(
            **{name: getattr(self, name) or getattr(preset, name) for name in preset.__dataclass_fields__} | self._dropout()
        )

    @model_validator(mode="after")
    def _heads_divide_width(self) -> BrainGraphSettings:
        if self.shape.width % self.shape.num_heads:
            raise ValueError(f"width {self.shape.width} is not a multiple of num_heads {self.shape.num_heads}")
        return self

    def _dropout(self) -> dict[str, float]:
        return {} if self.dropout is None else {"dropout": self.dropout}  # 0 is a value, not 'unset'

    @property
    def credits(self) -> Credits:
        """What the outputs say of the method and whom to cite."""
        return _CREDITS

    def remember(self, atlas: CohortAtlas) -> AtlasRecord:
        """What a model keeps of an atlas."""
        return AtlasRecord.of(atlas)

    def build(self, atlases: Mapping[str, AtlasRecord]) -> BrainGraph:
        """A new model for these atlases, with weights from torch's global generator."""
        for label, atlas in atlases.items():
            if len(atlas.regions) + NUM_WALK_STEPS > self.shape.input_width:
                raise SettingsError(
                    f"atlas {label} has {len(atlas.regions)} regions, more than the input projection takes",
                    fix=f"set system.input_width={len(atlas.regions) + NUM_WALK_STEPS} or larger",
                )
        sizes = {label: len(atlas.regions) for label, atlas in atlases.items()}
        return BrainGraph(settings=self, atlases=dict(atlases), model=GraphModel(self.shape, sizes))


@dataclass(frozen=True, kw_only=True)
class BrainGraph:
    """A brain-graph model with what is needed to feed and train it."""

    settings: BrainGraphSettings
    """Sizes, graph construction, losses."""
    atlases: dict[str, AtlasRecord]
    """Atlases that the model knows, by label."""
    model: GraphModel
    """The torch module."""
    text: Mapping[str, CouplingReader] = field(default_factory=dict)
    """What is said of the target, by atlas: one more block for the head; empty where nothing is."""
    meta: Mapping[str, MetaStart] = field(default_factory=dict)
    """A meta-learned start for prompts and head, by atlas; empty where there is none."""

    @classmethod
    def load(cls, model_dir: Path) -> BrainGraph:
        """The pretrained model of a ``models/<id>`` folder, in evaluation mode."""
        config = read_model_config(model_dir)
        system = BrainGraphSettings.from_values(config.system, where=model_dir / "config.yaml").build(config.atlases)
        load_weights(system.model, model_dir / "model.safetensors")
        system.model.eval()
        return replace(system, text=_read_text(model_dir) if config.tuning.get("text") else {}, meta=read_starts(model_dir))

    def randomised(self, seed: int) -> BrainGraph:
        """The same model with random weights, the statistics of edges kept; the floor of a frozen encoder."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fresh = self.settings.build(self.atlases)
        fresh.model.standardiser.load_state_dict(self.model.standardiser.state_dict())
        fresh.model.eval()
        return replace(fresh, text=self.text)

    def adopt(self, model_dir: Path, added: Collection[str]) -> None:
        """Take over a pretrained model's weights and freeze them; what belongs to the ``added`` atlases alone is left to train.

        Raises
        ------
        CheckpointMismatchError
            The weights are those of another model.
        """
        fresh = {name: value for name, value in self.model.state_dict().items() if _atlas_of(name) in added}
        load_weights(self.model, model_dir / "model.safetensors", beside=fresh)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in fresh)

    @property
    def module(self) -> GraphModel:
        """The module that is trained."""
        return self.model

    @property
    def repeated_parts(self) -> Iterable[nn.Module]:
        """The encoder's blocks."""
        return self.model.encoder.blocks

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term."""
        losses = self.settings.losses
        return {"node": losses.node, "edge": losses.edge, "contrast": losses.contrast, "cross_atlas": losses.cross_atlas}

    @property
    def window_rule(self) -> WindowRule:
        """How long windows are."""
        return WindowRule(min_frames=self.settings.graph.min_frames, setting="system.graph.min_frames")

    @property
    def cross_atlas_probability(self) -> float:
        """Share of batches with a view in another atlas."""
        return self.settings.losses.cross_atlas_probability if self.settings.losses.cross_atlas > 0 else 0.0

    @torch.no_grad()
    def fit_normalisation(self, windows: Iterable[Windows]) -> dict[str, Any]:
        """Mean and spread of every edge over whole scans, absent regions left out; a summary per atlas.

        An edge that fewer than two scans have keeps mean 0 and spread 1.
        """
        if not self.settings.graph.standardise:
            return {}
        sums: dict[str, list[Tensor]] = {}
        for batch in windows:
            graph = self._raw_graphs(batch.atlas, *correlate(batch.series, batch.frames))
            there = (graph.present[:, :, None] & graph.present[:, None, :]).double()
            values = graph.features.double() * there
            part = [there.sum(0), values.sum(0), values.square().sum(0)]
            sums[batch.atlas] = [old + new for old, new in zip(sums[batch.atlas], part, strict=True)] if batch.atlas in sums else part
        summary = {}
        for label, (count, first, second) in sorted(sums.items()):
            mean = first / count.clamp_min(1)
            scale = (second / count.clamp_min(1) - mean.square()).clamp_min(0).sqrt()
            usable = (count >= 2) & (scale > _SMALLEST_SPREAD)
            mean, scale = torch.where(count >= 2, mean, 0.0), torch.where(usable, scale, 1.0)
            self.model.standardiser.set(label, mean.float(), scale.float())
            off = ~torch.eye(len(mean), dtype=torch.bool)
            summary[label] = {
                "scans": int(count.max()),
                "edges": self.settings.graph.connectivity,
                "mean": round(float(mean[off].mean()), 6),
                "spread": round(float(scale[off].mean()), 6),
                "tensors": [f"standardiser.mean_{label}", f"standardiser.scale_{label}"],
            }
        return summary

    def check_atlas(self, atlas: CohortAtlas) -> None:
        """Refuse an atlas that the model was not made for."""
        check_atlas(self.atlases, atlas)

    def usable_atlases(self, cohort: Cohort) -> list[str]:
        """The cohort's atlases that the model knows, each checked; sorted."""
        return shared_atlases(self.atlases, cohort)

    def graphs(self, windows: Windows) -> Graphs:
        """Standardised graphs of a batch of windows, on the windows' device."""
        with torch.no_grad(), full_precision(windows.series.device):
            return self.model.standardiser(self._raw_graphs(windows.atlas, *correlate(windows.series, windows.frames)))

    def _raw_graphs(self, atlas: str, correlation: Tensor, present: Tensor) -> Graphs:
        return build_graphs(atlas, correlation, present, connectivity=self.settings.graph.connectivity, **self._edge_rule)

    @property
    def _edge_rule(self) -> dict[str, Any]:
        graph = self.settings.graph
        return {"edges": graph.edges, "density": graph.density, "threshold": graph.threshold}

    @torch.no_grad()
    def embed(self, series: Sequence[np.ndarray], atlas: str, *, batch_size: int = 32) -> np.ndarray:
        """(scans, 2 · width) float32 readouts of whole (frames, regions) series, in order, in evaluation mode."""
        device = next(self.model.parameters()).device
        was_training = self.model.training
        self.model.eval()
        parts = []
        for start in range(0, len(series), batch_size):
            chunk = series[start : start + batch_size]
            windows = pad_windows(chunk, atlas, [1.0] * len(chunk)).to(device)
            parts.append(self.model.encode(self.graphs(windows)).readout.float().cpu().numpy())
        self.model.train(was_training)
        return np.concatenate(parts)

    def losses(self, batch: PretrainBatch, *, epoch: float) -> dict[str, Tensor]:
        """Unweighted loss terms of one batch, and ``monitor_…`` values that are only logged."""
        settings = self.settings.losses
        ratio = objectives.mask_ratio(epoch, first=settings.mask_first, last=settings.mask_last, ramp_epochs=settings.mask_ramp_epochs)
        whole, hidden, first = self._masked(batch.first, batch.keys, ratio, _HIDE_FIRST)
        _, _, second = self._masked(batch.second, batch.keys, ratio, _HIDE_SECOND)
        encoded, other_window = self.model.encode(first), self.model.encode(self._perturb(second, batch.keys))
        terms = self._reconstruction(whole, hidden & batch.counted[:, None], encoded, batch.keys)
        scope = {"dataset": objectives.gather_ranks(batch.dataset), "participant": objectives.gather_ranks(batch.participant)}
        counted = objectives.gather_ranks(batch.counted)
        anchor = self.model.contrast(encoded.readout)
        anchors = objectives.gather_ranks(anchor)
        positives = objectives.gather_ranks(self.model.contrast(other_window.readout))
        terms["contrast"] = objectives.nt_xent(anchors, positives, temperature=settings.temperature, valid=counted, **scope)
        if batch.crossed and settings.cross_atlas > 0:
            vectors, valid = self._other_atlas(batch, anchor)
            terms["cross_atlas"] = objectives.nt_xent(
                anchors,
                objectives.gather_ranks(vectors),
                temperature=settings.temperature,
                valid=counted & objectives.gather_ranks(valid),
                **scope,
            )
        return terms | {
            "monitor_hidden_share": hidden.sum() / whole.present.sum().clamp_min(1),
            "monitor_window_seconds": torch.cat([batch.first.seconds, batch.second.seconds]).mean(),
            "monitor_edge_density": whole.adjacency.mean(),
            "monitor_embedding_spread": objectives.embedding_spread(encoded.readout),
        }

    def _reconstruction(self, whole: Graphs, hidden: Tensor, encoded: Encoding, keys: Tensor) -> dict[str, Tensor]:
        regions = whole.features.shape[-1]
        decoded = self.model.decode(encoded, whole, hidden)
        rows = self.model.decoder.rows(decoded, whole.atlas)
        scores = hashed_uniform(keys, (regions, regions), stream=_NON_EDGES)
        return {
            "node": objectives.masked_node_loss(rows, whole.features, hidden, whole.present),
            "edge": objectives.masked_edge_loss(self.model.decoder.edge_logits(decoded), whole.adjacency, hidden, whole.present, scores),
            "monitor_distinct_rows": objectives.distinct_rows(rows[:2]),
        }

    @torch.no_grad()
    def _masked(self, windows: Windows, keys: Tensor, ratio: float, stream: int) -> tuple[Graphs, Tensor, Graphs]:
        """The whole graphs, (batch, regions) bool of what is hidden, and the graphs of what is left."""
        with full_precision(windows.series.device):
            correlation, present = correlate(windows.series, windows.frames)
            whole = self.model.standardiser(self._raw_graphs(windows.atlas, correlation, present))
            hidden = choose_hidden(present, hashed_uniform(keys, (present.shape[1],), stream=stream), ratio)
            return whole, hidden, hide_nodes(whole, hidden, connect(correlation, present & ~hidden, **self._edge_rule))

    def _perturb(self, graphs: Graphs, keys: Tensor) -> Graphs:
        square = tuple(graphs.adjacency.shape[1:])
        return perturb(
            graphs,
            hashed_uniform(keys, square, stream=_DROP),
            hashed_normal(keys, square, stream=_NOISE),
            edge_drop=self.settings.losses.edge_drop,
            noise_scale=self.settings.losses.noise,
        )

    def _other_atlas(self, batch: PretrainBatch, anchor: Tensor) -> tuple[Tensor, Tensor]:
        """Unit vectors of the other atlas's view, zero where a scan has none, and where it has one."""
        vectors = torch.zeros_like(anchor)
        valid = torch.zeros(len(anchor), dtype=torch.bool, device=anchor.device)
        if batch.other is not None:
            encoded = self.model.encode(self.graphs(batch.other))
            vectors = vectors.index_copy(0, batch.other_rows, self.model.contrast(encoded.readout).to(vectors.dtype))
            valid[batch.other_rows] = True
        return vectors, valid

    def new_prompt(self, atlas: str) -> TargetPrompt:
        """A prompt for one target in one atlas, at the pretrained or the meta-learned state."""
        prompt = TargetPrompt(self.model.prompt, self.model.encoder.no_disorder, atlas)
        if atlas in self.meta:
            prompt.load_state_dict(self.meta[atlas].prompt)
        return prompt

    def through_gradients(self) -> AbstractContextManager[None]:
        """Inside, the backbone has second derivatives, for second-order meta-learning."""
        return twice_differentiable()

    @property
    def token_width(self) -> int:
        """Length of a context token and of a region vector."""
        return self.settings.shape.width

    @property
    def readout_width(self) -> int:
        """Length of a readout: mean and maximum over regions."""
        return 2 * self.settings.shape.width

    @torch.no_grad()
    def region_vectors(self, graphs: Graphs) -> Tensor:
        """(batch, regions, width) vectors of regions, the model's own prompt applied."""
        return self.model.encode(graphs).nodes

    def conditioned(self, graphs: Graphs, token: Tensor) -> Tensor:
        """(batch, 2 · width) readout with (batch, width) disorder tokens in place of the learned one; gradients reach them."""
        return self.model.encode(graphs, disorder=token).readout

    def read(self, graphs: Graphs, prompt: TargetPrompt) -> Tensor:
        """(batch, 2 · width) readout of prompted graphs; gradients reach the prompt."""
        return self.model.encode(graphs, prompt=prompt.graph, disorder=prompt.token).readout

    @torch.no_grad()
    def connectivity_blocks(self, windows: Windows) -> dict[str, Tensor]:
        """What the head reads beside the embedding, (batch, features) each: connectivity of regions and of their groups."""
        correlation, present = correlate(windows.series, windows.frames)
        return self._blocks(windows.atlas, correlation, present, lambda: self.graphs(windows))

    def _blocks(self, atlas: str, correlation: Tensor, present: Tensor, graphs: Callable[[], Graphs]) -> dict[str, Tensor]:
        """Blocks of the head beside the embedding, of connectivity and, where needed, the graphs made of it; gradients reach both."""
        blocks = connectivity_blocks(correlation, present, self._groups(atlas))
        if atlas in self.text:
            blocks["text"] = self.text[atlas](correlation, present)[:, None]
        if atlas in self.meta:
            blocks["meta"] = self.meta[atlas].score(self.read(graphs(), self.new_prompt(atlas)))[:, None]
        return blocks

    def modalities(self, windows: Windows) -> dict[str, Modality]:
        """What the model reads of the one run in ``windows``: correlations."""
        correlation, present = correlate(windows.series, windows.frames)
        return {CONNECTIVITY: Modality(values=correlation, present=present[0], symmetric=True)}

    def blocks_of(self, values: Mapping[str, Tensor], windows: Windows, prompt: TargetPrompt) -> dict[str, Tensor]:
        """Blocks of a head, (rows, features) each, of (rows, regions, regions) correlations that stand in for the run's.

        Gradients reach the correlations. Which regions are joined stays as in the run: that choice has no gradient.
        """
        own, given = self.graphs(windows), values[CONNECTIVITY]
        whole, rows = (given + given.transpose(1, 2)) / 2, len(given)
        features = fisher_z(whole) if self.settings.graph.connectivity == "fisher-z" else whole
        present = own.present.expand(rows, -1)
        graphs = self.model.standardiser(
            replace(own, features=features, adjacency=own.adjacency.expand(rows, -1, -1), present=present)
        )  # fmt: skip
        return {EMBEDDING: self.read(graphs, prompt)} | self._blocks(windows.atlas, whole, present, lambda: graphs)

    def _groups(self, atlas: str) -> Tensor | None:
        """(regions, groups) 0/1: networks of the atlas table, else clusters of the pretraining people's mean connectivity, else none."""
        networks = self.atlases[atlas].networks
        if any(networks):
            names = sorted({name for name in networks if name})
            return torch.tensor([[name == network for name in names] for network in networks], dtype=torch.float32)
        mean = self.model.standardiser.get_buffer(f"mean_{atlas}").double().cpu().numpy()
        if not mean.any():  # graph.standardise is off: no mean was kept
            return None
        count = round(len(mean) ** 0.5)
        return torch.from_numpy(np.eye(count, dtype=np.float32)[fcluster(ward(mean), count, criterion="maxclust") - 1])


def _atlas_of(name: str) -> str:
    """The atlas that a parameter or a buffer belongs to; else a word that is none."""
    last = name.rpartition(".")[2]
    return last.partition("_")[2] if name.startswith("standardiser.") else last


def write_text_readers(folder: Path, readers: Mapping[str, CouplingReader]) -> Path:
    """Write what is said of the target into a model folder; gives back the path."""
    tensors = {f"{label}:{name}": getattr(reader, name) for label, reader in readers.items() for name in _READER}
    return write_tensors(folder / _TEXT, tensors)


def _read_text(folder: Path) -> dict[str, CouplingReader]:
    tensors = read_tensors(folder / _TEXT)
    labels = sorted({name.rpartition(":")[0] for name in tensors})
    return {label: CouplingReader(**{name: tensors[f"{label}:{name}"] for name in _READER}) for label in labels}
