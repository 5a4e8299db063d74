"""Simulated viewers: people with visual cortices of their own who see captioned pictures while they are scanned.

A response is ``tuning · semantic features + nuisance + noise``. Tuning is a smooth field over the cortex, partly the same in
everybody at the same place and partly a person's own. How much of a single trial's variance is signal is stated voxel by
voxel (the noise ceiling of Allen et al., NSD, 2022). As everything is Gaussian and the grammar can be enumerated, the
decoder with perfect knowledge is exact: :func:`bayes_decode`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field, model_validator

from brainfm_cli.config import Frozen
from brainfm_cli.documents import read_json
from brainfm_cli.errors import InputDatasetError, InputNotFoundError
from brainfm_cli.simulation import viewing_scenes as grammar

if TYPE_CHECKING:
    from numpy.typing import NDArray

_BOX_MM = ((-44.0, 44.0), (-106.0, -50.0), (-22.0, 26.0))  # around the occipital lobe
_WAVES = 64  # of one smooth field
_SALIENCE = {"thing": 1.3, "colour": 0.9, "relation": 0.8, "other": 1.0, "place": 1.2}
_NUISANCE = ("trans_y", "trans_z", "gaze_x", "gaze_y", "pupil")
_NUISANCE_MEMORY = 0.9  # of the previous trial's: people drift
_SHARED, _OWN, _ORDER, _NOISE, _CAPTIONS, _CORTEX = range(1, 7)  # streams of random numbers
_TEXT_FEATURES = 48


class ViewingSettings(Frozen):
    """What the simulated viewers see, and how their brains respond."""

    images: int = Field(default=600, ge=8)
    """Pictures that each person sees."""
    shared: int = Field(default=150, ge=0)
    """Of these, pictures that everybody sees; the others are each person's own."""
    repeats: int = Field(default=3, ge=1)
    """How often each is seen."""
    captions: int = Field(default=5, ge=1)
    """Captions per picture."""
    caption_file: Path | None = None
    """Captions of other pictures: COCO-format JSON, or one that maps image names to lists of sentences; unset uses the own grammar."""
    voxels: int = Field(default=400, ge=16)
    """Voxels of visual cortex, on average."""
    voxel_spread: float = Field(default=0.25, ge=0, lt=0.9)
    """How much people differ in their number of voxels, as a share."""
    noise_ceiling: float = Field(default=0.15, gt=0, lt=1)
    """Share of a single trial's variance that the picture explains, mean over voxels."""
    common: float = Field(default=0.7, ge=0, le=1)
    """Share of tuning that is the same in everybody at the same place."""
    smoothness_mm: float = Field(default=10.0, gt=0)
    """Length over which tuning changes."""
    nuisance: float = Field(default=0.1, ge=0, lt=1)
    """Share of the noise that comes from motion, gaze and arousal."""
    trials_per_run: int = Field(default=150, ge=2)
    """Trials of a run, the last may have fewer."""
    resolution_mm: float = Field(default=4.0, ge=2, le=8)
    """Voxel size."""
    picture_px: int = Field(default=64, ge=32, le=512)
    """Size of the rendered pictures; a caption file has none."""

    @model_validator(mode="after")
    def _shared_are_seen(self) -> ViewingSettings:
        if self.shared > self.images:
            raise ValueError(f"{self.shared} shared pictures are more than the {self.images} that each person sees")
        return self


@dataclass(frozen=True, kw_only=True)
class Stimulus:
    """One picture with its captions."""

    name: str
    """Identifier, ``stim_id`` of the tables."""
    captions: tuple[str, ...]
    """What people say of it."""
    features: NDArray[np.float32]
    """(features,) semantic features."""
    shared: bool
    """Whether everybody sees it."""
    scene: grammar.Scene | None
    """What is in it; none for pictures of a caption file."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Viewer:
    """One person: cortex, tuning, and how noisy they are."""

    index: int
    """Number of the person."""
    mask: NDArray[np.bool_]
    """(x, y, z) visual cortex."""
    affine: NDArray[np.float64]
    """(4, 4) voxels to millimetres."""
    tuning: NDArray[np.float32]
    """(voxels, features), voxels in C order of the mask; a picture's signal has unit variance in no particular voxel."""
    ceilings: NDArray[np.float32]
    """(voxels,) share of single-trial variance that is signal."""
    nuisance_loadings: NDArray[np.float32]
    """(voxels, nuisance variables)."""
    noise_sd: NDArray[np.float32]
    """(voxels,) of what is neither signal nor nuisance."""

    @property
    def positions_mm(self) -> NDArray[np.float32]:
        """(voxels, 3) centres of the voxels."""
        return _centres(self.mask, self.affine)

    @cached_property
    def whitened(self) -> NDArray[np.float32]:
        """(voxels, features) Σ⁻¹ W: noise covariance is a diagonal plus what the nuisance variables share (Woodbury)."""
        return _solve_noise(self, self.tuning)


@dataclass(frozen=True, kw_only=True, eq=False)
class Trials:
    """What one person saw, in order, and the responses."""

    stimuli: tuple[int, ...]
    """Position in the person's stimuli of each trial."""
    repeat: tuple[int, ...]
    """How often it had been seen, from 1."""
    run: tuple[int, ...]
    """Run of each trial, from 1."""
    responses: NDArray[np.float32]
    """(trials, voxels) percent signal change."""
    nuisance: NDArray[np.float32]
    """(trials, nuisance variables)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Decoded:
    """What perfect knowledge makes of one person's responses to each picture, repeats averaged."""

    rank: NDArray[np.float64]
    """(stimuli,) place of the true picture among the candidates, 1 is best, the middle place of ties."""
    first_trial_rank: NDArray[np.float64]
    """(stimuli,) the same from the first trial alone."""
    scenes: tuple[grammar.Scene, ...]
    """The most probable scene of the whole grammar; empty for a caption file."""


def draw_stimuli(settings: ViewingSettings, *, seed: int, index: int) -> list[Stimulus]:
    """Pictures of one person: the shared ones first, the same for everybody."""
    if settings.caption_file is not None:
        return _from_file(settings, index=index, seed=seed)
    shared = grammar.draw_scenes(settings.shared, np.random.default_rng([seed, _SHARED])) if settings.shared else []
    more = grammar.draw_scenes(settings.images, np.random.default_rng([seed, _OWN, index]))
    scenes = [*shared, *(scene for scene in more if scene not in set(shared))][: settings.images]
    values = grammar.features(scenes)
    stimuli = []
    for place, scene in enumerate(scenes):
        number = grammar.scene_number(scene)  # two people's own pictures may be the same one: then it has one name and the same captions
        said = tuple(grammar.captions(scene, settings.captions, np.random.default_rng([seed, _CAPTIONS, number])))
        stimuli.append(
            Stimulus(name=f"scene{number:05d}", captions=said, features=values[place], shared=place < settings.shared, scene=scene)
        )
    return stimuli


def draw_viewer(settings: ViewingSettings, *, seed: int, index: int, effect: float = 1.0) -> Viewer:
    """One person, who depends on the seed and their number alone; ``effect`` scales every tuning."""
    generator = np.random.default_rng([seed, _CORTEX, index])
    mask, affine = _cortex(settings, generator)
    positions = _centres(mask, affine)
    weights = _feature_weights(settings)
    fields = [_smooth_fields(positions, len(weights), settings.smoothness_mm, rng) for rng in (np.random.default_rng([seed, _CORTEX]), generator)]  # fmt: skip
    tuning = (np.sqrt(settings.common) * fields[0] + np.sqrt(1 - settings.common) * fields[1]) * weights
    tuning *= 1 / np.sqrt((tuning**2 @ _feature_variances(settings)).mean())
    signal = tuning**2 @ _feature_variances(settings)
    # A ceiling of its own for every voxel, with the stated mean.
    ceilings = np.clip(generator.beta(2, 2 * (1 / settings.noise_ceiling - 1), size=len(positions)), 0.005, 0.95)
    ceilings = np.clip(ceilings * settings.noise_ceiling / ceilings.mean(), 0.002, 0.97)
    noise = signal * (1 - ceilings) / ceilings
    loadings = generator.standard_normal((len(positions), len(_NUISANCE)))
    loadings *= np.sqrt(settings.nuisance * noise / (loadings**2).sum(1))[:, None]
    return Viewer(
        index=index,
        mask=mask,
        affine=affine,
        tuning=(effect * tuning).astype(np.float32),
        ceilings=ceilings.astype(np.float32),
        nuisance_loadings=loadings.astype(np.float32),
        noise_sd=np.sqrt((1 - settings.nuisance) * noise).astype(np.float32),
    )


def view(viewer: Viewer, stimuli: list[Stimulus], settings: ViewingSettings, *, seed: int) -> Trials:
    """Every picture ``repeats`` times, in an order of the person's own; no picture twice in a row while there is another."""
    generator = np.random.default_rng([seed, _ORDER, viewer.index])
    order = np.concatenate([generator.permutation(len(stimuli)) for _ in range(settings.repeats)])
    seen: dict[int, int] = {}
    repeat = []
    for stimulus in order:
        seen[int(stimulus)] = seen.get(int(stimulus), 0) + 1
        repeat.append(seen[int(stimulus)])
    noise = np.random.default_rng([seed, _NOISE, viewer.index])
    nuisance = np.zeros((len(order), len(_NUISANCE)), np.float32)
    step = np.sqrt(1 - _NUISANCE_MEMORY**2)
    nuisance[0] = noise.standard_normal(len(_NUISANCE))
    for trial in range(1, len(order)):
        nuisance[trial] = _NUISANCE_MEMORY * nuisance[trial - 1] + step * noise.standard_normal(len(_NUISANCE))
    features = np.stack([stimulus.features for stimulus in stimuli])[order]
    responses = features @ viewer.tuning.T + nuisance @ viewer.nuisance_loadings.T
    responses += viewer.noise_sd * noise.standard_normal(responses.shape)
    return Trials(
        stimuli=tuple(map(int, order)),
        repeat=tuple(repeat),
        run=tuple(1 + trial // settings.trials_per_run for trial in range(len(order))),
        responses=responses.astype(np.float32),
        nuisance=nuisance,
    )


def nuisance_names() -> tuple[str, ...]:
    """Columns of :attr:`Trials.nuisance`."""
    return _NUISANCE


def bayes_decode(
    viewer: Viewer, stimuli: list[Stimulus], trials: Trials, candidates: NDArray[np.float32], *, scenes: bool = True
) -> Decoded:
    """Decode with the generator's own likelihood, nuisance unknown but its spread known.

    ``candidates`` (pictures, features) are who a picture is told from; row i is stimulus i, further rows may follow. ``scenes``
    also asks for the most probable scene of the whole grammar.
    """
    owner = np.array(trials.stimuli)
    count = len(stimuli)
    averages = np.stack([trials.responses[owner == place].mean(0) for place in range(count)])
    first = np.stack([trials.responses[np.flatnonzero(owner == place)[0]] for place in range(count)])
    gram = viewer.tuning.T @ viewer.whitened
    ranks = []
    for responses in (averages, first):
        scores = _log_likelihoods(responses @ viewer.whitened, gram, candidates)
        own = scores[np.arange(count), np.arange(count)][:, None]
        # the middle of ties: without an effect every picture is as likely as every other
        ranks.append(0.5 + (scores > own).sum(1) + 0.5 * (scores == own).sum(1))
    best: tuple[grammar.Scene, ...] = ()
    if scenes and stimuli[0].scene is not None:
        everything = grammar.all_features()
        parts = [_log_likelihoods(part @ viewer.whitened, gram, everything).argmax(1) for part in np.array_split(averages, 1 + count // 64)]
        best = tuple(grammar.all_scenes()[int(place)] for place in np.concatenate(parts))
    return Decoded(rank=ranks[0], first_trial_rank=ranks[1], scenes=best)


def read_caption_file(path: Path) -> dict[str, list[str]]:
    """Captions by image name, of COCO-format JSON or of a plain mapping.

    Raises
    ------
    InputNotFoundError
        The file is absent.
    InputDatasetError
        It is neither of the two.
    """
    try:
        values = read_json(path)
        if "annotations" in values:
            found: dict[str, list[str]] = {}
            for annotation in values["annotations"]:
                found.setdefault(str(annotation["image_id"]), []).append(str(annotation["caption"]))
            return found
        return {str(name): [str(text) for text in texts] for name, texts in values.items()}
    except FileNotFoundError as error:
        raise InputNotFoundError("the caption file is absent", where=path, fix="check viewing.caption_file") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputDatasetError(
            f"the caption file is unreadable: {error}", where=path, fix="give COCO-format JSON, or {image: [sentences]}"
        ) from error


def _from_file(settings: ViewingSettings, *, index: int, seed: int) -> list[Stimulus]:
    path = settings.caption_file
    assert path is not None  # noqa: S101  (checked by the caller)
    said = read_caption_file(path)
    names = sorted(said)
    if len(names) < settings.images:
        raise InputDatasetError(
            f"the file has captions of {len(names)} images, fewer than the {settings.images} that each person sees",
            where=path, fix="lower viewing.images",
        )  # fmt: skip
    shuffled = [names[place] for place in np.random.default_rng([seed, _SHARED]).permutation(len(names))]
    rest = shuffled[settings.shared :]
    own = [rest[place] for place in np.random.default_rng([seed, _OWN, index]).permutation(len(rest))]
    chosen = [*shuffled[: settings.shared], *own[: settings.images - settings.shared]]
    values = dict(zip(names, text_features([" ".join(said[name]) for name in names]), strict=True))
    return [
        Stimulus(
            name="img" + "".join(character for character in name if character.isalnum()),
            captions=tuple(text.strip() for text in said[name][: settings.captions]),
            features=values[name],
            shared=place < settings.shared,
            scene=None,
        )
        for place, name in enumerate(chosen)
    ]


def text_features(texts: list[str]) -> NDArray[np.float32]:
    """(texts, features) of unit variance: latent semantic analysis of their words, so that any captions can be simulated."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer

    words = TfidfVectorizer(stop_words="english", min_df=min(3, max(1, len(texts) // 10)), sublinear_tf=True).fit_transform(texts)
    size = min(_TEXT_FEATURES, min(words.shape) - 1)
    values = TruncatedSVD(size, random_state=0).fit_transform(words)
    return ((values - values.mean(0)) / values.std(0)).astype(np.float32)


def _feature_weights(settings: ViewingSettings) -> NDArray[np.float64]:
    if settings.caption_file is None:
        return np.array([_SALIENCE[grammar.SLOTS[slot]] for slot in grammar.feature_slots()])
    count = len(_text_features_of(settings.caption_file))
    return np.asarray((1.0 + np.arange(count)) ** -0.25, np.float64)


def _feature_variances(settings: ViewingSettings) -> NDArray[np.float64]:
    if settings.caption_file is not None:
        return np.ones(len(_feature_weights(settings)))
    slots = grammar.feature_slots()
    share = 1 / np.bincount(slots)[slots]
    return share * (1 - share)


def _text_features_of(path: Path) -> NDArray[np.float32]:
    said = read_caption_file(path)
    return text_features([" ".join(said[name]) for name in sorted(said)])[0]


def _cortex(settings: ViewingSettings, generator: np.random.Generator) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """A folded band in the box: the voxels nearest to a wavy sheet, as many as the person has."""
    step = settings.resolution_mm
    axes = [np.arange(low, high + step / 2, step) for low, high in _BOX_MM]
    affine = np.diag([step, step, step, 1.0])
    affine[:3, 3] = [axis[0] for axis in axes]
    x, y, z = np.meshgrid(*axes, indexing="ij")
    sheet = -62 - 30 * np.exp(-((x / 30) ** 2)) + 3 * np.sin(z / 6 + generator.uniform(0, 1)) + generator.normal(0, 1.5)
    distance = np.abs(y - sheet) + 0.15 * np.abs(z - 2) + 0.05 * np.abs(x)
    wanted = round(settings.voxels * (1 + settings.voxel_spread * generator.uniform(-1, 1)))
    if wanted > distance.size:
        raise InputDatasetError(f"{wanted} voxels do not fit at {step:g} mm", fix="lower viewing.voxels or viewing.resolution_mm")
    mask = np.zeros(distance.shape, bool)
    mask.ravel()[np.argsort(distance.ravel(), kind="stable")[:wanted]] = True
    return mask, affine


def _centres(mask: NDArray[np.bool_], affine: NDArray[np.float64]) -> NDArray[np.float32]:
    return (np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]).astype(np.float32)


def _smooth_fields(positions: NDArray[np.float32], count: int, length_mm: float, generator: np.random.Generator) -> NDArray[np.float64]:
    """(voxels, count) random fields of unit variance that change over ``length_mm`` (random Fourier features)."""
    waves = generator.standard_normal((count, _WAVES, 3)) / length_mm
    phases = generator.uniform(0, 2 * np.pi, (count, _WAVES))
    sizes = generator.standard_normal((count, _WAVES)) * np.sqrt(2 / _WAVES)
    return np.stack([np.cos(positions @ waves[k].T + phases[k]) @ sizes[k] for k in range(count)], axis=1).astype(np.float64)


def _solve_noise(viewer: Viewer, values: NDArray[np.float32]) -> NDArray[np.float32]:
    inverse = 1 / viewer.noise_sd.astype(np.float64)[:, None] ** 2
    loadings = viewer.nuisance_loadings.astype(np.float64)
    small = np.eye(loadings.shape[1]) + loadings.T @ (inverse * loadings)
    plain = inverse * values
    return (plain - inverse * loadings @ np.linalg.solve(small, loadings.T @ plain)).astype(np.float32)


def _log_likelihoods(projected: NDArray[np.float32], gram: NDArray[np.float32], candidates: NDArray[np.float32]) -> NDArray[np.float32]:
    """(responses, candidates) up to a constant of each response."""
    return projected @ candidates.T - 0.5 * np.einsum("cf,fg,cg->c", candidates, gram, candidates, optimize=True)
