"""A model tuned for one target over several atlases: fit, forecast, save, load; and the predictor that evaluation calls."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from pydantic import model_validator
from scipy.optimize import nnls
from torch import Tensor

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.bids.derivatives import write_tsv
from brainfm_cli.config import Frozen
from brainfm_cli.errors import CheckpointMismatchError, InputDatasetError
from brainfm_cli.learning.checkpoints import read_provenance, read_tensors, write_tensors
from brainfm_cli.learning.forecasts import Forecast, TrainingFold
from brainfm_cli.learning.head_fit import Choice, FittedHead, Outcome, probabilities_of
from brainfm_cli.learning.splits import participant_hash
from brainfm_cli.learning.targets import Target
from brainfm_cli.learning.tuning import AtlasInputs, Tunable, TunedAtlas, TuningSettings, prepare, score_atlas, tune_atlas

_SMALLEST_WEIGHT = 1e-9
_SPACE = ":"  # between atlas and tensor in the files; no atlas label holds it


class TargetRecord(Frozen):
    """What a tuned model predicts."""

    name: str
    """Column of participants.tsv."""
    kind: Literal["binary", "multiclass", "continuous"]
    """What it is."""
    classes: tuple[str, ...] = ()
    """Class names by index; of two, the second is positive."""
    atlases: tuple[str, ...] = ()
    """Atlases with a prompt and a head."""
    weights: dict[str, float]
    """Weight of each atlas in the prediction of a person who has them all; they add up to 1."""
    threshold: float | None = None
    """Probability of the positive class at which it is decided, chosen on held-out predictions of the people tuned on."""
    people: int = 0
    """People tuned on."""
    settings: dict[str, Any] = {}
    """How prompts and head were fitted."""
    text: str = ""
    """What was said of the positive class, or of high values; empty where nothing was."""

    @model_validator(mode="after")
    def _classes_of_kind(self) -> TargetRecord:
        if self.kind == "binary" and len(self.classes) != 2:
            raise ValueError("a binary target has two classes")
        if (self.kind == "continuous") != (not self.classes):
            raise ValueError("a continuous target has no classes, every other has")
        return self


@dataclass(frozen=True, kw_only=True)
class AtlasModel:
    """What is kept of the tuning in one atlas."""

    prompt: dict[str, Tensor]
    """State of the prompt."""
    head: FittedHead
    """The head."""


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """One tuning on some people, with what was learnt on the way."""

    atlases: dict[str, TunedAtlas]
    """By label."""
    weights: dict[str, float]
    """Weight of each atlas, found on held-out predictions; they add up to 1."""
    held_out: NDArray[np.float64]
    """(people, classes) or (people,): predictions of the people tuned on, each without their own label; NaN where there is none."""

    def choices(self) -> dict[str, float | str]:
        """What was chosen inside, for the report."""
        found: dict[str, float | str] = {}
        for label, tuned in self.atlases.items():
            found[f"{label}: epochs of prompt tuning"] = float(tuned.epochs)
            found[f"{label}: weight of the atlas"] = round(self.weights[label], 3)
            found |= {f"{label}: share of {block}": round(share, 3) for block, share in tuned.choice.shares().items()}
        return found


def prepare_inputs(system: Tunable, cohort: Cohort, participants: Sequence[str], atlases: Sequence[str]) -> dict[str, AtlasInputs]:
    """Inputs in every atlas that one of ``participants`` has; people without any are refused.

    Raises
    ------
    InputDatasetError
        Somebody has no run in any of the atlases.
    """
    having = set(cohort.index.loc[cohort.index["participant"].isin(set(participants)), "atlas"])
    inputs = {label: prepare(system, cohort, participants, label) for label in atlases if label in having}
    seen = {name for one in inputs.values() for name in one.participants}
    lacking = [name for name in participants if name not in seen]
    if lacking:
        raise InputDatasetError(
            f"{len(lacking)} people have no series in an atlas of the model, e.g. {lacking[0]}",
            where=cohort.root,
            fix=f"parcellate them with one of {', '.join(atlases)}, or leave them out ('where')",
        )
    return inputs


def tune(
    system: Tunable,
    inputs: Mapping[str, AtlasInputs],
    target: Target,
    folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    settings: TuningSettings,
    *,
    seed: int,
) -> Tuning:
    """Tune on everybody in ``target``; ``folds`` are rows of ``target``."""
    num_classes = len(target.classes)
    tuned: dict[str, TunedAtlas] = {}
    held_out: dict[str, NDArray[np.float64]] = {}
    for label, one in inputs.items():
        having = set(one.participants)
        rows = np.array([row for row, name in enumerate(target.participants) if name in having], dtype=np.int64)
        if not len(rows):
            continue
        people = one.positions([target.participants[row] for row in rows])
        outcome = Outcome(values=target.observed[rows], num_classes=num_classes, balanced=settings.balanced)
        tuned[label] = tune_atlas(system, one, people, outcome, _renumbered(folds, rows), settings, seed=seed)
        held_out[label] = np.full((len(target.participants), num_classes or 1), np.nan)
        held_out[label][rows] = _held_out(tuned[label].choice, tuned[label].head)
    weights = stack_weights(held_out, target)
    mean = weighted_mean(held_out, weights, len(target.participants))
    return Tuning(atlases=tuned, weights=weights, held_out=mean if num_classes else mean[:, 0])


def stack_weights(held_out: Mapping[str, NDArray[np.float64]], target: Target) -> dict[str, float]:
    """Weights of atlases that add up to 1: non-negative least squares on held-out predictions (stacked regressions, Breiman 1996).

    ``held_out`` has (people, outputs) by atlas, NaN where a person lacks it; only people with all of them count. Equal
    weights where nobody has all, or where no atlas predicts anything.
    """
    labels = list(held_out)
    equal = dict.fromkeys(labels, 1 / len(labels))
    known = np.all([np.isfinite(values).all(1) for values in held_out.values()], axis=0)
    if len(labels) == 1 or not known.any():
        return equal
    observed = target.observed[known]
    wanted = np.eye(len(target.classes))[observed.astype(np.int64)] if target.classes else observed[:, None]
    columns = np.stack([(values[known] - values[known].mean(0)).ravel() for values in held_out.values()], axis=1)
    found, _ = nnls(columns, (wanted - wanted.mean(0)).ravel())
    return {label: float(value) for label, value in zip(labels, found / found.sum(), strict=True)} if found.sum() > 0 else equal


def forecast(
    system: Tunable,
    inputs: Mapping[str, AtlasInputs],
    atlases: Mapping[str, Any],
    participants: Sequence[str],
    *,
    weights: Mapping[str, float] | None = None,
) -> NDArray[np.float64]:
    """(people, classes) probabilities or (people,) values: weighted means over the atlases that each person has.

    Raises
    ------
    InputDatasetError
        Somebody has none of the atlases.
    """
    predicted = forecast_by_atlas(system, inputs, atlases, participants)
    mean = weighted_mean(predicted, weights or dict.fromkeys(atlases, 1.0), len(participants))
    if not len(mean) or np.isnan(mean).any():
        raise InputDatasetError("somebody has no series in an atlas that the model was tuned in", fix="parcellate with the model's atlases")
    return mean[:, 0] if mean.shape[1] == 1 else mean


def forecast_by_atlas(
    system: Tunable, inputs: Mapping[str, AtlasInputs], atlases: Mapping[str, Any], participants: Sequence[str]
) -> dict[str, NDArray[np.float64]]:
    """(people, outputs) by atlas; NaN where a person lacks it."""
    place = {name: row for row, name in enumerate(participants)}
    predicted: dict[str, NDArray[np.float64]] = {}
    for label in [label for label in atlases if label in inputs]:
        scores = score_atlas(system, inputs[label], atlases[label])
        predicted[label] = np.full((len(participants), scores.shape[1]), np.nan)
        mine = [row for row, name in enumerate(inputs[label].participants) if name in place]
        predicted[label][[place[inputs[label].participants[row]] for row in mine]] = scores[mine]
    return predicted


def weighted_mean(predicted: Mapping[str, NDArray[np.float64]], weights: Mapping[str, float], people: int) -> NDArray[np.float64]:
    """(people, outputs) means over the atlases that each person has; NaN where a person has none."""
    if not predicted:
        return np.empty((0, people))
    # A person who has only atlases of weight 0 is predicted from those all the same.
    stacked = np.stack(list(predicted.values()))
    there = np.isfinite(stacked)
    share = np.array([max(weights[label], _SMALLEST_WEIGHT) for label in predicted])[:, None, None] * there
    with np.errstate(invalid="ignore"):
        return (np.where(there, stacked, 0.0) * share).sum(0) / share.sum(0)


class Watch(Protocol):
    """Looks at the model of a fold and at the people it is tested on, e.g. to explain its predictions."""

    def __call__(self, system: Any, atlases: Mapping[str, Any], test: Sequence[str], *, repeat: int, fold: int) -> None:  # noqa: ANN401
        """``atlases``: prompt and head by atlas label."""


@dataclass(frozen=True, kw_only=True)
class TunedPredictor:
    """Tunes on the training people of a fold and predicts its test people; the backbone may be another one in every fold."""

    prepared: Callable[[TrainingFold], tuple[Tunable, Mapping[str, AtlasInputs]]]
    """The system of a fold and the inputs of all its people."""
    settings: TuningSettings
    """How prompts and head are fitted."""
    watch: Watch | None = None
    """Sees the model of every fold before it is forgotten."""

    def __call__(self, fold: TrainingFold, test: Sequence[str]) -> Forecast:
        """The forecast for ``test``."""
        system, inputs = self.prepared(fold)
        tuning = tune(system, inputs, fold.target, fold.inner, self.settings, seed=fold.seed % 2**31)
        predicted = forecast(system, inputs, tuning.atlases, test, weights=tuning.weights)
        if self.watch is not None:
            self.watch(system, tuning.atlases, test, repeat=fold.repeat, fold=fold.fold)
        return Forecast(test=predicted, train=tuning.held_out, choices=tuning.choices())


@dataclass(frozen=True, kw_only=True)
class AppliedPredictor:
    """A finished model, applied once: nothing is learnt from the fold."""

    system: Tunable
    """The backbone."""
    inputs: Mapping[str, AtlasInputs]
    """Inputs of the test people."""
    atlases: Mapping[str, Any]
    """:class:`AtlasModel` by label."""
    weights: Mapping[str, float]
    """Weight of each atlas."""
    held_out: Mapping[str, NDArray[np.float64]]
    """Held-out prediction of the people tuned on, by participant key."""
    watch: Watch | None = None
    """Sees the model."""

    def __call__(self, fold: TrainingFold, test: Sequence[str]) -> Forecast:
        """The forecast for ``test``."""
        predicted = forecast(self.system, self.inputs, self.atlases, test, weights=self.weights)
        if self.watch is not None:
            self.watch(self.system, self.atlases, test, repeat=fold.repeat, fold=fold.fold)
        missing = np.full(len(fold.target.classes), np.nan) if fold.target.classes else np.nan
        return Forecast(test=predicted, train=np.array([self.held_out.get(name, missing) for name in fold.target.participants]))


def save_tuned(folder: Path, atlases: Mapping[str, TunedAtlas]) -> list[Path]:
    """Write prompts.safetensors and head.safetensors; gives back the paths."""
    prompts = {f"{label}{_SPACE}{name}": value for label, tuned in atlases.items() for name, value in tuned.prompt.items()}
    heads: dict[str, Tensor] = {}
    for label, tuned in atlases.items():
        head = tuned.head
        arrays = {f"weights.{name}": value for name, value in head.weights.items()}
        arrays |= {"bias": head.bias, "shift": head.shift, "slope": np.array([head.slope])}
        heads |= {f"{label}{_SPACE}{name}": torch.from_numpy(np.ascontiguousarray(value, np.float64)) for name, value in arrays.items()}
    return [write_tensors(folder / "prompts.safetensors", prompts), write_tensors(folder / "head.safetensors", heads)]


def load_tuned(folder: Path, target: TargetRecord) -> dict[str, AtlasModel]:
    """Prompts and heads of a tuned model folder, by atlas.

    Raises
    ------
    CheckpointMismatchError
        The files do not belong to the configuration.
    """
    prompts, heads = read_tensors(folder / "prompts.safetensors"), read_tensors(folder / "head.safetensors")
    found = {}
    for label in target.atlases:
        own = _of(heads, label)
        try:
            head = FittedHead(
                num_classes=len(target.classes),
                weights={name.removeprefix("weights."): value.numpy() for name, value in own.items() if name.startswith("weights.")},
                bias=own["bias"].numpy(),
                slope=float(own["slope"][0]),
                shift=own["shift"].numpy(),
            )
        except (KeyError, IndexError) as error:
            raise CheckpointMismatchError(
                f"the head of atlas {label} is incomplete", where=folder / "head.safetensors", fix="copy the model folder again"
            ) from error
        found[label] = AtlasModel(prompt=_of(prompts, label), head=head)
    return found


def write_held_out(path: Path, target: Target, datasets: pd.Series, held_out: NDArray[np.float64]) -> Path:
    """The people tuned on, hashed, with label and held-out prediction; thresholds of later test people come from here."""
    hashes = [participant_hash(str(datasets[name]), name) for name in target.participants]
    table = pd.DataFrame({"participant_hash": hashes, "observed": target.observed})
    values = held_out if held_out.ndim == 2 else held_out[:, None]
    for column in range(values.shape[1]):
        table[f"predicted{column}"] = values[:, column]
    return write_tsv(path, table.sort_values("participant_hash"))


def read_held_out(path: Path, participants: Sequence[str], datasets: Mapping[str, str]) -> dict[str, NDArray[np.float64]]:
    """Held-out predictions of those of ``participants`` that the model was tuned on."""
    try:
        table = pd.read_csv(path, sep="\t", na_values=["n/a"]).set_index("participant_hash")
        values = table.filter(like="predicted").to_numpy(float)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointMismatchError(
            f"the held-out predictions are unreadable: {error}", where=path, fix="copy the model folder again"
        ) from error
    values = values[:, 0] if values.shape[1] == 1 else values
    row = {key: place for place, key in enumerate(table.index)}
    hashes = {name: participant_hash(datasets[name], name) for name in participants}
    return {name: np.asarray(values[row[key]]) for name, key in hashes.items() if key in row}


def read_seen(folder: Path) -> dict[str, set[str]]:
    """Hashes of the people that a model has seen: pretrained_on (validation and alignment included), tuned_on and aligned_on.

    Raises
    ------
    CheckpointMismatchError
        provenance.json is absent or unreadable: nobody could say whether test people are new.
    """
    values = read_provenance(folder, "pretrained_on", "validated_on")
    # Diagnoses shaped how a text is read: people of the alignment are as good as seen in pretraining.
    pretrained = set(values["pretrained_on"]) | set(values["validated_on"]) | set(values.get("aligned_on", ()))
    return {"pretrained_on": pretrained, "tuned_on": set(values.get("tuned_on", ())), "aligned_on": set(values.get("aligned_on", ()))}


def _of(tensors: Mapping[str, Tensor], label: str) -> dict[str, Tensor]:
    start = f"{label}{_SPACE}"
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def _renumbered(
    folds: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], rows: NDArray[np.int64]
) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Folds as positions in ``rows``; people that are not among them drop out."""
    place = {int(row): position for position, row in enumerate(rows)}

    def inside(part: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.array([place[int(row)] for row in part if int(row) in place], dtype=np.int64)

    return [(inside(train), inside(validation)) for train, validation in folds]


def _held_out(choice: Choice, head: FittedHead) -> NDArray[np.float64]:
    """(people, outputs) held-out predictions; NaN for people in no validation part."""
    if head.num_classes == 0:
        return choice.held_out
    predicted = np.full((len(choice.held_out), head.num_classes), np.nan)
    known = ~np.isnan(choice.held_out).any(1)
    predicted[known] = probabilities_of(choice.held_out[known], head.slope, head.shift)
    return predicted
