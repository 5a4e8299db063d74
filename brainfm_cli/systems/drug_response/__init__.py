"""Drug-response: a masked series autoencoder whose frozen readout stands beside connectivity (FMM_TC). Settings, assembly, losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from scipy.cluster.hierarchy import fcluster, ward
from torch import Tensor, nn

from brainfm_cli.bids.cohort import Cohort, CohortAtlas
from brainfm_cli.config import Frozen
from brainfm_cli.errors import InputDatasetError
from brainfm_cli.learning import objectives
from brainfm_cli.learning.checkpoints import AtlasRecord, check_atlas, load_weights, read_model_config, shared_atlases
from brainfm_cli.learning.explanation import CONNECTIVITY, SERIES, Modality
from brainfm_cli.learning.pretraining import Credits
from brainfm_cli.learning.samples import PretrainBatch, WindowRule, Windows, pad_windows
from brainfm_cli.learning.tuning import EMBEDDING
from brainfm_cli.models.graphs import correlate, hashed_uniform
from brainfm_cli.models.readouts import connectivity_blocks
from brainfm_cli.models.series_encoder import (
    Patches,
    SeriesEncoder,
    SeriesModel,
    SeriesShape,
    choose_hidden_patches,
    cut_patches,
    masked_patch_loss,
    masked_spectrum_loss,
    place_regions,
)
from brainfm_cli.models.series_readout import RegionPrompt, ReliableAxes, SeriesClassifier, SeriesReadout, sum_by_region
from brainfm_cli.models.series_scaling import Gain, SeriesScaler, population_spread, resample, robust_spread

PRESETS: dict[str, SeriesShape] = {
    "base": SeriesShape(),
    "tiny": SeriesShape(width=64, num_heads=4, feedforward=128, num_layers=2),
    "large": SeriesShape(width=768, num_heads=12, feedforward=3072, num_layers=12),
}
_SIZES = ("width", "num_heads", "feedforward", "num_layers", "decoder_layers")
_FACTOR_OF_UNITS = 8.0  # gains of scanners differ by less; percent signal change and raw intensity by more
_ENCODED_AT_ONCE = 16
_FEWEST_HALVED, _MOST_HALVED = 100, 4000  # scans whose halves are compared, in each atlas
_HIDE, _KIND = range(2)  # streams of the hashed random numbers
_SOURCE = "Fan et al., FMM_TC (MICCAI 2025)"
_CREDITS = Credits(
    methods=(
        "Region series were resampled to one repetition time (band-limited), cut into random windows of fixed duration, and scaled by the "
        "interquartile range of each region over the training people. A transformer over patches of region and time, which knows each region "
        "by the coordinates of its centre, was trained to reconstruct hidden patches and their log spectra (mean squared error) from the visible ones; hidden were "
        "single patches or whole regions. Its readout of a scan was cut to the axes along which both halves of the training people's scans agree, where "
        "there were enough scans to learn them."
    ),
    citation="Fan et al., foundation-model-boosted multimodal learning for drug response, MICCAI 2025, LNCS 15974",
    follows=f"{_SOURCE}\nand BrainLM (Caro et al., ICLR 2024), whose masked autoencoder of region series they follow.",
    prompts=f"{_SOURCE},\nwhose joining of a frozen series encoder with connectivity they follow.",
)


class WindowSettings(Frozen):
    """Time, all in seconds, so that any scanner's repetition time fits."""

    repetition_time_s: float = Field(default=2.0, gt=0)
    """Repetition time of the encoder; series of another are resampled."""
    patch_s: float = Field(default=40.0, gt=0)
    """Length of a patch."""
    window_s: float = Field(default=200.0, gt=0)
    """Longest window: what is encoded at once; longer runs are cut into evenly spaced windows whose readouts are averaged."""
    min_s: float = Field(default=80.0, gt=0)
    """Shortest run that pretraining uses."""

    @model_validator(mode="after")
    def _patches_fit(self) -> WindowSettings:
        if self.patch_frames < 2:
            raise ValueError(f"a patch of {self.patch_s:g} s holds fewer than two frames of {self.repetition_time_s:g} s")
        if self.window_s < 2 * self.patch_s or self.min_s < self.patch_s:
            raise ValueError(f"a window must hold two patches of {self.patch_s:g} s, and the shortest run one")
        return self

    @property
    def patch_frames(self) -> int:
        """Frames of a patch."""
        return round(self.patch_s / self.repetition_time_s)

    @property
    def window_frames(self) -> int:
        """Frames of the longest window, a whole number of patches."""
        return int(self.window_s / self.repetition_time_s + 1e-6) // self.patch_frames * self.patch_frames


class MaskSettings(Frozen):
    """What is hidden in pretraining."""

    ratio: float = Field(default=0.75, gt=0, lt=1)
    """Share of patches that is hidden."""
    tube_share: float = Field(default=0.5, ge=0, le=1)
    """Share of scans in which whole regions are hidden (tube) instead of single patches (random)."""
    spectrum: float = Field(default=0.5, ge=0)
    """Weight of the reconstruction of hidden patches' log spectra, beside that of the patches themselves."""


class ScalingSettings(Frozen):
    """How series are scaled."""

    gain: Gain = "scan"
    """scan divides each scan's overall gain out, so that units do not matter; kept keeps it, and refuses series in other units."""
    clip: float = Field(default=6.0, gt=1)
    """Largest absolute value of a scaled series, in spreads: spikes of motion must not rule the loss."""


class ReadoutSettings(Frozen):
    """What is kept of what the frozen encoder says of a scan."""

    axes: int = Field(default=32, ge=0)
    """Axes along which people differ reliably, found by comparing both halves of each pretraining scan; 0 keeps the whole readout."""


class DrugResponseSettings(Frozen):
    """The drug-response system."""

    kind: Literal["drug-response"]
    """Which system."""
    preset: Literal["base", "tiny", "large"] = "base"
    """Size of the encoder; each size below overrides it."""
    width: int | None = Field(default=None, ge=8)
    """Length of a token."""
    num_heads: int | None = Field(default=None, ge=1)
    """Attention heads; must divide the width."""
    feedforward: int | None = Field(default=None, ge=8)
    """Hidden length of the feed-forward part."""
    num_layers: int | None = Field(default=None, ge=1)
    """Encoder layers."""
    decoder_layers: int | None = Field(default=None, ge=1)
    """Decoder layers, which only pretraining uses."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of activations dropped in training."""
    windows: WindowSettings = WindowSettings()
    """Repetition time, patches and windows."""
    masking: MaskSettings = MaskSettings()
    """What is hidden in pretraining."""
    scaling: ScalingSettings = ScalingSettings()
    """How series are scaled."""
    readout: ReadoutSettings = ReadoutSettings()
    """What is kept of the encoder's readout."""

    @property
    def shape(self) -> SeriesShape:
        """The preset's sizes with the overrides."""
        sizes = {name: getattr(self, name) or getattr(PRESETS[self.preset], name) for name in _SIZES}
        return SeriesShape(**sizes, patch_frames=self.windows.patch_frames, dropout=self.dropout)

    @model_validator(mode="after")
    def _heads_divide_width(self) -> DrugResponseSettings:
        if self.shape.width % self.shape.num_heads:
            raise ValueError(f"width {self.shape.width} is not a multiple of num_heads {self.shape.num_heads}")
        return self

    @property
    def credits(self) -> Credits:
        """What the outputs say of the method and whom to cite."""
        return _CREDITS

    def remember(self, atlas: CohortAtlas) -> AtlasRecord:
        """What a model keeps of an atlas, centres included.

        Raises
        ------
        InputDatasetError
            The atlas states no centres.
        """
        centres = atlas.regions.centroids_mm
        if centres is None or not np.isfinite(centres).all():
            raise InputDatasetError(
                f"atlas {atlas.label} states no centres of its regions, which are how this system tells regions apart",
                fix="parcellate with an atlas of 'brainfm assets list', or choose others with --atlases",
            )
        places = tuple((float(x), float(y), float(z)) for x, y, z in np.round(centres.astype(float), 2))
        return AtlasRecord.of(atlas).model_copy(update={"centroids_mm": places})

    def build(self, atlases: Mapping[str, AtlasRecord]) -> DrugResponse:
        """A new model for these atlases, with weights from torch's global generator."""
        sizes = {label: len(record.regions) for label, record in atlases.items()}
        features = {label: self.shape.width * (2 + _groups(record).shape[1]) for label, record in atlases.items()}
        return DrugResponse(settings=self, atlases=dict(atlases), model=_Module(self.shape, sizes, features, self.readout.axes))


class _Module(nn.Module):
    """What is trained, the scale of its input, and which part of its readout is kept."""

    def __init__(self, shape: SeriesShape, sizes: Mapping[str, int], features: Mapping[str, int], axes: int) -> None:
        super().__init__()
        self.series = SeriesModel(shape)
        self.scaler = SeriesScaler(sizes)
        self.kept = nn.ModuleDict({label: ReliableAxes(length, axes) for label, length in features.items()} if axes else {})


@dataclass(frozen=True, kw_only=True)
class DrugResponse:
    """A drug-response model with what is needed to feed and train it."""

    settings: DrugResponseSettings
    """Sizes, windows, masking, scaling."""
    atlases: dict[str, AtlasRecord]
    """Atlases that the model knows, by label."""
    model: _Module
    """The torch module."""

    @classmethod
    def load(cls, model_dir: Path) -> DrugResponse:
        """The pretrained model of a ``models/<id>`` folder, in evaluation mode."""
        config = read_model_config(model_dir)
        # models of before there were axes have none
        system = DrugResponseSettings.from_values({"readout": {"axes": 0}, **config.system}, where=model_dir / "config.yaml").build(
            config.atlases
        )
        load_weights(system.model, model_dir / "model.safetensors")
        system.model.eval()
        return system

    def randomised(self, seed: int) -> DrugResponse:
        """The same model with random weights, the scale of the input kept; the floor of a frozen encoder."""
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            fresh = self.settings.build(self.atlases)
        fresh.model.scaler.load_state_dict(self.model.scaler.state_dict())
        fresh.model.eval()
        return fresh

    @property
    def module(self) -> nn.Module:
        """The module that is trained."""
        return self.model

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term."""
        return {"patch": 1.0, "spectrum": self.settings.masking.spectrum}

    @property
    def window_rule(self) -> WindowRule:
        """Windows as long as the encoder takes them, or the whole run."""
        windows = self.settings.windows
        return WindowRule(min_seconds=windows.min_s, max_seconds=windows.window_s, min_share=1.0, setting="system.windows.min_s")

    @property
    def cross_atlas_probability(self) -> float:
        """Nothing is compared between atlases."""
        return 0.0

    @torch.no_grad()
    def fit_normalisation(self, windows: Iterable[Windows]) -> dict[str, Any]:
        """Spread of every region over whole scans; a summary per atlas."""
        spreads: dict[str, list[Tensor]] = {}
        for batch in windows:
            spreads.setdefault(batch.atlas, []).extend(robust_spread(one) for one in self._resampled(batch))
        summary = {}
        for label, found in sorted(spreads.items()):
            spread = population_spread(torch.stack(found))
            self.model.scaler.set(label, spread)
            summary[label] = {
                "scans": len(found),
                "repetition_time_s": self.settings.windows.repetition_time_s,
                "patch_frames": self.settings.windows.patch_frames,
                "spread": round(float(spread.median()), 6),
                "tensors": [f"scaler.spread_{label}"],
            }
        return summary

    @torch.no_grad()
    def fit_readout(self, windows: Iterable[Windows]) -> None:
        """Learn which part of the readout is reliable from whole scans of the training people; too few scans leave all of it."""
        halves: dict[str, list[tuple[Tensor, Tensor]]] = {}
        device, shortest = next(self.model.parameters()).device, self.settings.windows.patch_frames
        for batch in windows if self.settings.readout.axes else ():
            found = halves.setdefault(batch.atlas, [])
            if len(found) * _ENCODED_AT_ONCE >= _MOST_HALVED:
                continue
            scaled = [one for one in self._scaled(batch.to(device)) if len(one) >= 2 * shortest]
            prompt = self.new_prompt(batch.atlas)
            if scaled:
                parts = [[one[: len(one) // 2] for one in scaled], [one[len(one) // 2 :] for one in scaled]]
                first, second = (prompt(self._encode(batch.atlas, part)).float().cpu() for part in parts)
                found.append((first, second))
        for label, found in halves.items():
            first, second = (torch.cat([pair[side] for pair in found] or [torch.empty(0, 1)]) for side in (0, 1))
            if len(first) >= _FEWEST_HALVED:
                axes = self.model.kept[label]
                assert isinstance(axes, ReliableAxes)  # noqa: S101  (for the type checker)
                axes.fit(first, second)

    def check_atlas(self, atlas: CohortAtlas) -> None:
        """Refuse an atlas that the model was not made for."""
        check_atlas(self.atlases, atlas)

    def usable_atlases(self, cohort: Cohort) -> list[str]:
        """The cohort's atlases that the model knows, each checked; sorted."""
        return shared_atlases(self.atlases, cohort)

    def losses(self, batch: PretrainBatch, *, epoch: float) -> dict[str, Tensor]:  # noqa: ARG002  (the share hidden does not change)
        """The loss of hidden patches in the first window of each scan, and ``monitor_…`` values that are only logged."""
        masking = self.settings.masking
        patches = self.patches(batch.first)
        scores = hashed_uniform(batch.keys, tuple(patches.usable.shape[1:]), stream=_HIDE)
        tube = hashed_uniform(batch.keys, (1,), stream=_KIND) < masking.tube_share
        hidden = torch.where(
            tube[:, :, None],
            choose_hidden_patches(patches.usable, scores, ratio=masking.ratio, masking="tube"),
            choose_hidden_patches(patches.usable, scores, ratio=masking.ratio, masking="random"),
        )
        predicted, spectrum, encoding = self.model.series.reconstruct(patches, hidden)
        judged = hidden & batch.counted[:, None, None]
        count = (judged & patches.usable).sum()
        loss = masked_patch_loss(predicted, patches, judged)
        power = masked_patch_loss(torch.zeros_like(predicted), patches, judged)
        return {
            "patch": objectives.over_ranks(loss, count),
            "spectrum": objectives.over_ranks(masked_spectrum_loss(spectrum, patches, judged), count),
            "monitor_explained_share": 1 - loss.detach() / power.clamp_min(1e-12),
            "monitor_hidden_share": hidden.sum() / patches.usable.sum().clamp_min(1),
            "monitor_window_seconds": batch.first.seconds.mean(),
            "monitor_embedding_spread": objectives.embedding_spread(encoding.summary),
            "monitor_effective_rank": objectives.effective_rank(encoding.summary),
        }

    @torch.no_grad()
    def graphs(self, windows: Windows) -> SeriesReadout:
        """Readout of whole runs by the frozen encoder: evenly spaced windows, averaged; no prompt reaches further down.

        Raises
        ------
        InputDatasetError
            A run is shorter than a patch, has no region with a signal, or is in other units than those pretrained on.
        """
        return self._encode(windows.atlas, self._scaled(windows))

    def _encode(self, atlas: str, series: Sequence[Tensor]) -> SeriesReadout:
        """Readout of (frames, regions) scaled series; gradients reach them."""
        cuts = [(run, one[start : start + length]) for run, one in enumerate(series) for start, length in self._starts(len(one))]
        regions, device, width = series[0].shape[1], series[0].device, self.settings.shape.width
        summary = torch.zeros(len(series), width, device=device)
        sums = torch.zeros(len(series), regions, width, device=device)
        counts = torch.zeros(len(series), regions, device=device)
        number = torch.zeros(len(series), device=device)
        for begin in range(0, len(cuts), _ENCODED_AT_ONCE):
            part = cuts[begin : begin + _ENCODED_AT_ONCE]
            owner = torch.tensor([run for run, _ in part], device=device)
            patches = self._patches(atlas, [cut for _, cut in part])
            encoding = self.model.series.encoder(patches)
            summary.index_add_(0, owner, encoding.summary.float())
            sums.index_add_(0, owner, sum_by_region(encoding, patches.usable).float())
            counts.index_add_(0, owner, patches.usable.sum(dim=2).float())
            number.index_add_(0, owner, torch.ones(len(part), device=device))
        return SeriesReadout(
            atlas=atlas,
            summary=summary / number[:, None],
            regions=sums / counts.clamp_min(1)[:, :, None],
            present=counts > 0,
        )

    def new_prompt(self, atlas: str) -> RegionPrompt:
        """Weights of regions for one target in one atlas, all equal."""
        return RegionPrompt(len(self.atlases[atlas].regions), _groups(self.atlases[atlas])).to(next(self.model.parameters()).device)

    def read(self, graphs: SeriesReadout, prompt: RegionPrompt) -> Tensor:
        """(runs, axes) readout, or all (runs, width · (2 + groups)) of it where no axes were learnt; gradients reach the prompt."""
        whole: Tensor = prompt(graphs)
        return self.model.kept[graphs.atlas](whole) if graphs.atlas in self.model.kept else whole

    @torch.no_grad()
    def embed(self, series: Sequence[np.ndarray], atlas: str, *, repetition_time_s: float, batch_size: int = 32) -> np.ndarray:
        """(scans, as :meth:`read`) float32 untuned readouts of whole (frames, regions) series, in order."""
        prompt, parts = self.new_prompt(atlas), []
        device = next(self.model.parameters()).device
        was_training = self.model.training
        self.model.eval()
        for start in range(0, len(series), batch_size):
            chunk = series[start : start + batch_size]
            windows = pad_windows(chunk, atlas, [repetition_time_s] * len(chunk)).to(device)
            parts.append(self.read(self.graphs(windows), prompt).float().cpu().numpy())
        self.model.train(was_training)
        return np.concatenate(parts)

    @torch.no_grad()
    def connectivity_blocks(self, windows: Windows) -> dict[str, Tensor]:
        """What the head reads beside the embedding, (batch, features) each: connectivity of regions and of their groups."""
        correlation, present = correlate(windows.series, windows.frames)
        return connectivity_blocks(correlation, present, _groups(self.atlases[windows.atlas]))

    def modalities(self, windows: Windows) -> dict[str, Modality]:
        """What the model reads of the one run in ``windows``: scaled series at the encoder's repetition time, and correlations."""
        (scaled,) = self._scaled(windows)
        correlation, present = correlate(windows.series, windows.frames)
        return {
            SERIES: Modality(values=torch.nan_to_num(scaled)[None], present=torch.isfinite(scaled).all(dim=0), symmetric=False),
            CONNECTIVITY: Modality(values=correlation, present=present[0], symmetric=True),
        }

    def blocks_of(self, values: Mapping[str, Tensor], windows: Windows, prompt: RegionPrompt) -> dict[str, Tensor]:
        """Blocks of a head, (rows, features) each, of inputs that stand in for those of the run; gradients reach them."""
        given = self.modalities(windows)
        series, correlation = values[SERIES], values[CONNECTIVITY]
        seen = torch.where(given[SERIES].present, series, torch.nan)
        blocks = {EMBEDDING: self.read(self._encode(windows.atlas, list(seen)), prompt)}
        whole, present = (correlation + correlation.transpose(1, 2)) / 2, given[CONNECTIVITY].present.expand(len(correlation), -1)
        return blocks | connectivity_blocks(whole, present, _groups(self.atlases[windows.atlas]))

    @torch.no_grad()
    def scaled_series(self, windows: Windows) -> Tensor:
        """(runs, frames, regions) scaled series at the encoder's repetition time, cut to the shortest run; NaN in absent regions."""
        series = self._scaled(windows)
        shortest = min(*(len(one) for one in series), self.settings.windows.window_frames)
        return torch.stack([one[:shortest] for one in series])

    def untrained(self, atlas: str, outputs: int) -> nn.Module:
        """The encoder with random weights and a head of its own, for training from scratch on :meth:`scaled_series`."""
        record, windows = self.atlases[atlas], self.settings.windows
        return SeriesClassifier(
            SeriesEncoder(self.settings.shape),
            RegionPrompt(len(record.regions), _groups(self.atlases[atlas])),
            place_regions(torch.tensor(record.centroids_mm)),
            outputs,
            repetition_time_s=windows.repetition_time_s,
        )

    def _resampled(self, windows: Windows) -> list[Tensor]:
        """Each item's own frames at the encoder's repetition time."""
        target = self.settings.windows.repetition_time_s
        times = (windows.seconds.double() / windows.frames).tolist()
        if not all(0 < time < float("inf") for time in times):
            raise InputDatasetError(
                "the repetition time of a run is unknown, and patches are in seconds",
                fix="state it when parcellating (--set repetition_time_s=SECONDS), and pack again",
            )
        # to the tenth of a millisecond: a quotient of float32 numbers must not ask for resampling of its own
        lengths = windows.frames.tolist()
        return [
            resample(series[:length], round(time, 4), target) for series, length, time in zip(windows.series, lengths, times, strict=True)
        ]

    @torch.no_grad()
    def _scaled(self, windows: Windows) -> list[Tensor]:
        """Each item's scaled series, at the encoder's repetition time."""
        scaling, shortest = self.settings.scaling, self.settings.windows.patch_frames
        found = []
        for one in self._resampled(windows):
            if len(one) < shortest:
                raise InputDatasetError(
                    f"a run of {len(one) * self.settings.windows.repetition_time_s:g} s is shorter than a patch of the encoder "
                    f"({self.settings.windows.patch_s:g} s)",
                    fix="leave the person out ('where'), or pretrain with a smaller system.windows.patch_s",
                )
            scaled, gain = self.model.scaler(one, windows.atlas, gain=scaling.gain, clip=scaling.clip)
            if not torch.isfinite(scaled).any():
                raise InputDatasetError(
                    "a run has no region with a signal", fix="check its parcellation, or leave the person out ('where')"
                )
            if scaling.gain == "kept" and not 1 / _FACTOR_OF_UNITS < float(gain) < _FACTOR_OF_UNITS:
                raise InputDatasetError(
                    f"a run's series are {float(gain):.3g} times as large as those pretrained on: they are in other units",
                    fix="scale all series alike (percent signal change), or pretrain with system.scaling.gain=scan",
                )
            found.append(scaled)
        return found

    def patches(self, windows: Windows) -> Patches:
        """What the encoder reads of a batch of windows: resampled, scaled and cut."""
        return self._patches(windows.atlas, self._scaled(windows))

    def _patches(self, atlas: str, series: Sequence[Tensor]) -> Patches:
        """Patches of (frames, regions) scaled series of one atlas."""
        frames = torch.tensor([len(one) for one in series], device=series[0].device)
        places = place_regions(torch.tensor(self.atlases[atlas].centroids_mm, device=series[0].device))
        windows = self.settings.windows
        return cut_patches(
            nn.utils.rnn.pad_sequence(list(series), batch_first=True),
            frames,
            places,
            patch_frames=windows.patch_frames,
            repetition_time_s=windows.repetition_time_s,
        )

    def _starts(self, frames: int) -> list[tuple[int, int]]:
        """Evenly spaced windows that cover a run: start and length in frames."""
        longest = self.settings.windows.window_frames
        if frames <= longest:
            return [(0, frames)]
        count = -(-frames // longest)
        return [(round(start), longest) for start in np.linspace(0, frames - longest, count)]


def _groups(record: AtlasRecord) -> Tensor:
    """(regions, groups) 0/1: networks of the atlas table, else clusters of neighbouring regions."""
    if any(record.networks):
        names = sorted({name for name in record.networks if name})
        return torch.tensor([[name == network for name in names] for network in record.networks], dtype=torch.float32)
    count = round(len(record.regions) ** 0.5)
    return torch.from_numpy(np.eye(count, dtype=np.float32)[fcluster(ward(np.array(record.centroids_mm)), count, "maxclust") - 1])
