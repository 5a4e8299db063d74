"""A tuned model beside its floors: applied once, refitted in every fold, or pretrained anew inside every fold."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pandas as pd

from brainfm_cli.bids.cohort import Cohort
from brainfm_cli.bids.derivatives import write_json
from brainfm_cli.config import Execution, digest_of
from brainfm_cli.documents import read_json
from brainfm_cli.errors import SettingsError
from brainfm_cli.learning.checkpoints import load_weights, read_model_config
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.draws import FewShotSettings, few_shot_splits, origin_of
from brainfm_cli.learning.evaluation import Context, EvaluationSettings, evaluate
from brainfm_cli.learning.floors import FloorSettings, make_floors
from brainfm_cli.learning.forecasts import Predictor, TrainingFold
from brainfm_cli.learning.joined import Joined
from brainfm_cli.learning.pretraining import PretrainingSettings, is_finished, prepare, pretrain_model
from brainfm_cli.learning.results import EvaluationResult, Truth
from brainfm_cli.learning.samples import select_participants
from brainfm_cli.learning.splits import DesignSettings, Fold, Split, fixed_split, make_split, people_groups, write_split
from brainfm_cli.learning.targets import Target, participant_table
from brainfm_cli.learning.tuned import (
    AppliedPredictor,
    TargetRecord,
    TunedPredictor,
    Watch,
    load_tuned,
    prepare_inputs,
    read_held_out,
    read_seen,
)
from brainfm_cli.learning.tuning import EMBEDDING, AtlasInputs, TuningSettings
from brainfm_cli.provenance import file_sha256

log = logging.getLogger(__name__)
Mode = Literal["apply", "refit"]
RANDOM_ENCODER = "Random frozen encoder, same head"
_ONE_SHOT = (
    "One person of each class trains: nobody can be held out, so that penalties, thresholds and calibration come from the people learnt "
    "from. Only scores that do not depend on a threshold (AUROC) can be read."
)


@dataclass(frozen=True, kw_only=True)
class Request:
    """One evaluation of one tuned model."""

    model: Path
    """Model folder."""
    system: Any
    """The system of that folder, on its device."""
    cohort: Cohort
    """Everybody."""
    record: TargetRecord
    """What the model predicts and how it was tuned."""
    target: Target
    """Labels of everybody who takes part, also of the people tuned on where the model is applied once."""
    people: Sequence[str]
    """The people asked for: those tested where the model is applied once."""
    mode: Mode
    """apply or refit."""
    inside: bool
    """Pretrain anew in every outer fold."""
    design: DesignSettings
    """Folds of a refit."""
    floors: FloorSettings
    """Which floors."""
    random_encoder: bool
    """Whether a random frozen encoder is one of them."""
    evaluation: EvaluationSettings
    """Scores and intervals."""
    seed: int
    """Of the random encoder."""
    truth: Callable[[Split], Truth] | None
    """Best possible scores on a split, for simulated data."""
    root: Path
    """Where split and fold models are written."""
    ablations: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Name → blocks of a head that reads less, fitted on the same folds."""
    rivals: Mapping[str, Predictor] = field(default_factory=dict)
    """Networks without pretraining, by name, on the same folds."""
    watch: Watch | None = None
    """Sees the model of every fold of the whole split."""
    few_shot: FewShotSettings = field(default_factory=FewShotSettings)
    """Learning curves, none unless asked for."""


def evaluate_model(request: Request, execution: Execution) -> tuple[EvaluationResult, dict[int, EvaluationResult]]:
    """Write the split, then fit and score the model and every floor on it; then the same with few training people, by their number.

    Raises
    ------
    InputDatasetError
        Test people were in the pretraining (and the design is not transductive), or the split leaks.
    """
    table = participant_table(request.cohort)
    split = _split(request, table)
    write_split(request.root / "split.tsv", split)
    backbones = _Backbones(request, execution, split, table)
    name = f"{read_model_config(request.model).system['kind']}, {'pretrained in each fold' if request.inside else 'prompt-tuned'}"
    predictors: dict[str, Predictor] = {name: backbones.model()}
    if request.random_encoder:
        predictors[RANDOM_ENCODER] = TunedPredictor(prepared=backbones.random, settings=backbones.tuning)
    predictors |= {**backbones.ablations(), **request.rivals}
    floors = make_floors(request.cohort, request.target, table, request.floors)
    context = Context(
        table=table,
        models=(name,),
        pools=floors.pools,
        kernels=floors.kernels,
        pretrained=read_seen(request.model)["aligned_on" if request.inside else "pretrained_on"],
        transductive=request.design.transductive,
        truth=None if request.truth is None else request.truth(split),
        notes=(*floors.notes, *backbones.notes()),
    )
    progress = lambda what, fold: log.info("repeat %d, fold %d: %s", fold.repeat, fold.fold, what)  # noqa: E731
    whole = evaluate(request.target, split, predictors | floors.predictors, context, request.evaluation, progress=progress)
    # A model that was tuned on everybody is no few-shot model: it is tuned again on the few.
    predictors[name] = TunedPredictor(prepared=backbones.prepared, settings=backbones.tuning)
    return whole, _few_shot(request, split, predictors | floors.predictors, replace(context, truth=None), backbones)


def _few_shot(
    request: Request, split: Split, predictors: Mapping[str, Predictor], context: Context, backbones: _Backbones
) -> dict[int, EvaluationResult]:
    """Every predictor fitted on few people, by their number per class."""
    settings = request.few_shot
    numbers = settings.numbers(request.target, split)
    found = {}
    for number, drawn in (
        few_shot_splits(request.target, split, shots=numbers, draws=settings.draws, seed=settings.seed).items() if numbers else ()
    ):
        log.info("%d people per class, %d draws", number, settings.draws)
        # what no training person could be held out for
        told = replace(context, notes=(*context.notes, _ONE_SHOT)) if number == 1 else context
        with backbones.drawing(settings.draws):
            found[number] = evaluate(request.target, drawn, predictors, told, request.evaluation)
    return found


class _Backbones:
    """The system and the inputs of a fold; those of one fold are kept, so that model and floor share them."""

    def __init__(self, request: Request, execution: Execution, split: Split, table: pd.DataFrame) -> None:
        self.request, self.execution, self.table = request, execution, table
        self.tuning = TuningSettings.from_values(dict(request.record.settings), where=request.model / "config.yaml")
        self._folds = {(fold.repeat, fold.fold): fold for fold in split.folds()}
        self._device = choose_device(execution.device)
        self._config = read_model_config(request.model)
        self._given = request.system
        self._kept: tuple[tuple[int, int], Any, dict[str, AtlasInputs]] | None = None
        self._random: tuple[int, Any, dict[str, AtlasInputs]] | None = None
        self._draws = 1

    def model(self) -> Predictor:
        """The model as a predictor."""
        if self.request.mode == "refit":
            return TunedPredictor(prepared=self.prepared, settings=self.tuning, watch=self.request.watch)
        return AppliedPredictor(
            system=self._given,
            inputs=self._inputs(self._given),
            atlases=load_tuned(self.request.model, self.request.record),
            weights=self.request.record.weights,
            held_out=read_held_out(self.request.model / "held_out.tsv", self.request.target.participants, self.request.cohort.dataset_of),
            watch=self.request.watch,
        )

    def prepared(self, fold: TrainingFold) -> tuple[Any, Mapping[str, AtlasInputs]]:
        """The backbone of a fold and everybody's inputs."""
        key = (origin_of(fold.repeat, self._draws), fold.fold) if self.request.inside else (0, 0)
        if self._kept is None or self._kept[0] != key:
            system = self._pretrained(self._folds[key]) if self.request.inside else self._given
            self._kept = (key, system, self._inputs(system))
        return self._kept[1], self._kept[2]

    @contextmanager
    def drawing(self, draws: int) -> Iterator[None]:
        """Repetitions are draws from the repetitions of the whole split while this lasts: few-shot folds share its backbones."""
        self._draws = draws
        try:
            yield
        finally:
            self._draws = 1

    def random(self, fold: TrainingFold) -> tuple[Any, Mapping[str, AtlasInputs]]:
        """A backbone with random weights and the statistics of the pretrained one, and what it makes of everybody.

        Its inputs are its own: a system may read people by its weights already there, and not only when a prompt reads further.
        """
        system, _ = self.prepared(fold)
        if self._random is None or self._random[0] != id(system.module):
            random = system.randomised(self.request.seed)
            random.module.to(self._device)
            self._random = (id(system.module), random, self._inputs(random))
        return self._random[1], self._random[2]

    def ablations(self) -> dict[str, Predictor]:
        """Heads that read fewer blocks; those that read the encoder with random weights too, where that floor is asked for."""
        found: dict[str, Predictor] = {}
        for name, blocks in self.request.ablations.items():
            fewer = self.tuning.model_copy(update={"blocks": tuple(blocks)})
            found[name] = TunedPredictor(prepared=self.prepared, settings=fewer)
            if self.request.random_encoder and EMBEDDING in blocks:
                found[f"{name}, random frozen encoder"] = TunedPredictor(prepared=self.random, settings=fewer)
        return found

    def notes(self) -> tuple[str, ...]:
        """What the reader should know of the backbone."""
        if not self.request.inside:
            return ()
        return (
            "The backbone was pretrained anew in every outer fold, on people outside its test set; nothing of the given model's weights is used.",
        )

    def _inputs(self, system: Any) -> dict[str, AtlasInputs]:  # noqa: ANN401
        return prepare_inputs(system, self.request.cohort, self.request.target.participants, self.request.record.atlases)

    def _pretrained(self, fold: Fold) -> Any:  # noqa: ANN401
        if isinstance(self._given, Joined):
            raise SettingsError("a model with a donor cannot be pretrained inside folds: the donor is given", fix="leave pretraining=inside out, or tune without a donor")  # fmt: skip
        if self._config.added or self._config.meta:
            what = "atlases were added to" if self._config.added else "a start was meta-learned for"
            raise SettingsError(
                f"{what} this model, which is not repeated inside folds", fix="leave pretraining=inside out, or use a model without"
            )
        settings = PretrainingSettings.from_values(dict(self._config.pretraining), where=self.request.model / "config.yaml")
        people = self._outside(fold, settings)
        folder = self._folder(fold, people)
        prepared = prepare(self._given.settings, settings, self.request.cohort, people)
        if is_finished(folder):
            load_weights(prepared.system.module, folder / "model.safetensors")
            prepared.system.module.eval()
        else:
            log.info("repeat %d, fold %d: pretraining on %d people", fold.repeat, fold.fold, len(people))
            pretrain_model(prepared, settings, self.execution, folder)
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)
        prepared.system.module.to(self._device)
        said = getattr(self._given, "text", None)  # what is said of the target does not depend on the backbone
        return replace(prepared.system, text=said) if said else prepared.system

    def _folder(self, fold: Fold, people: Sequence[str]) -> Path:
        """The fold's model folder; what was pretrained there on other people or other series is removed.

        Otherwise a cohort that has grown, and is divided anew, would be tested with a model that has seen test people.
        """
        folder = self.request.root / "models" / f"{self.request.model.name}-repeat{fold.repeat}-fold{fold.fold}"
        stamp, values = folder / "inputs.json", {"sha256": digest_of({"people": sorted(people), "series": self._series})}
        if not stamp.is_file() or read_json(stamp) != values:
            shutil.rmtree(folder, ignore_errors=True)
            write_json(stamp, values)
        return folder

    @cached_property
    def _series(self) -> list[str]:
        return [file_sha256(path) for path in self.request.cohort.files if path.suffix in {".npy", ".parquet"}]

    def _outside(self, fold: Fold, settings: PretrainingSettings) -> list[str]:
        """Everybody the pretraining may see, labelled or not: not the fold's test people, nor their families."""
        groups = people_groups(self.table, self.request.design.group)
        away = {groups[name] for name in fold.test}
        return [name for name in select_participants(self.request.cohort, settings.where) if groups[name] not in away]


def _split(request: Request, table: pd.DataFrame) -> Split:
    if request.mode == "refit":
        return make_split(request.target, table, request.design)
    tested = set(request.people)
    test = [name for name in request.target.participants if name in tested]
    train = [name for name in request.target.participants if name not in tested]
    groups = people_groups(table.loc[list(request.target.participants)], request.design.group)
    return fixed_split(request.target, train=train, test=test, groups=groups, why="not among the people that the model was tuned on")
