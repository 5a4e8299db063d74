"""The only training loop: Lightning carries it out, this module makes it resume exactly.

Batches, masks and dropout are functions of (seed, step), the learning rate of the step, and the state
(weights, moments, progress, log) is written whole at step borders. A run that was killed at any moment and
started again therefore ends with the same weights, bit for bit on one device.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from brainfm_cli.config import Execution, Frozen
from brainfm_cli.errors import InputDatasetError, SettingsError, StoppedError
from brainfm_cli.learning.checkpoints import (
    TrainingState,
    newest_state,
    optimiser_moments,
    read_tensors,
    restore_moments,
    save_state,
    write_tensors,
)
from brainfm_cli.learning.device import choose_device
from brainfm_cli.learning.log import TrainingLog

log = logging.getLogger(__name__)
console = Console(stderr=True)
MONITOR = "monitor_"
# Besides every 'checkpoint_every' steps; states do not change the result, so a clock may decide.
_LONGEST_UNSAVED_S = 300.0


class OptimiserSettings(Frozen):
    """AdamW with linear warm-up and cosine decay."""

    learning_rate: float = Field(default=3e-4, gt=0)
    """Largest learning rate."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled weight decay of matrices; vectors, norms and biases have none."""
    warmup_epochs: float = Field(default=1.0, ge=0)
    """Epochs (fractions allowed) of linear warm-up."""
    final_fraction: float = Field(default=0.01, ge=0, le=1)
    """Last learning rate as a share of the largest."""
    clip: float = Field(default=1.0, gt=0)
    """Largest norm of the whole gradient."""


class Trainable(Protocol):
    """What the loop needs of a system."""

    @property
    def module(self) -> nn.Module:
        """The module whose parameters are trained."""

    @property
    def loss_weights(self) -> dict[str, float]:
        """Weight of each loss term."""

    def losses(self, batch: Any, *, epoch: float) -> dict[str, Tensor]:  # noqa: ANN401  (each system has its own batch)
        """Unweighted terms, and ``monitor_…`` values that are only logged."""


@runtime_checkable
class Staged(Protocol):
    """A system some of whose parameters train later and slower than the others."""

    def rate_factor(self, name: str, progress: float) -> float:
        """Share of the learning rate of a parameter, ``progress`` being the share of all steps that is done."""


@runtime_checkable
class Judged(Protocol):
    """A system whose epochs are not chosen by the validation loss."""

    def judge(self, epoch: int) -> float | None:
        """What is smallest in the best epoch; none where this epoch cannot be the best. Called once the validation batches are done."""


@runtime_checkable
class Compilable(Protocol):
    """A system that names the parts of its module which are worth compiling: those that repeat, so that one compilation serves all."""

    @property
    def repeated_parts(self) -> Iterable[nn.Module]:
        """Modules of the same code and sizes."""


Probe = Callable[[], dict[str, float]]
"""What the model tells of people, by name; looked at after every epoch and only logged."""


class BatchSource(Protocol):
    """What the loop needs of the data: whole batches by position, each with a method ``to(device)``."""

    @property
    def num_batches(self) -> int:
        """Batches per epoch, the same in every epoch."""

    def training(self, epoch: int, *, rank: int, world_size: int) -> Dataset[Any]:
        """One epoch of this rank's batches, in order."""

    def validation(self, *, rank: int, world_size: int) -> Dataset[Any] | None:
        """The validation batches, the same in every epoch; none where nobody is held out."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """How long and how to train."""

    epochs: int
    """Passes over the data."""
    steps: int | None
    """Optimiser steps to stop after, whatever the epochs; none for no limit."""
    seed: int
    """Seed of dropout."""
    accumulate: int
    """Batches per optimiser step."""
    patience: int | None
    """Epochs without a better validation loss before stopping; none for never."""
    checkpoint_every: int
    """Optimiser steps between saved states."""
    log_every: int
    """Optimiser steps between rows of the log."""
    optimiser: OptimiserSettings
    """Learning rate and decay."""

    def total_steps(self, num_batches: int) -> int:
        """Optimiser steps of the whole run."""
        full = self.epochs * self.steps_per_epoch(num_batches)
        return full if self.steps is None else min(full, self.steps)

    def steps_per_epoch(self, num_batches: int) -> int:
        """Optimiser steps of one epoch; the last may accumulate fewer batches."""
        return -(-num_batches // self.accumulate)

    def learning_rate(self, step: int, num_batches: int) -> float:
        """Learning rate of optimiser step ``step``, counted from 0."""
        settings, total = self.optimiser, self.total_steps(num_batches)
        warmup = min(total, round(settings.warmup_epochs * self.steps_per_epoch(num_batches)))
        if step < warmup:
            return settings.learning_rate * (step + 1) / warmup
        progress = (step - warmup) / max(1, total - warmup)
        share = settings.final_fraction + (1 - settings.final_fraction) * 0.5 * (1 + math.cos(math.pi * progress))
        return settings.learning_rate * share


class ScheduleSettings(Frozen):
    """How long something is fitted to a pretrained model, and how."""

    epochs: int = Field(default=30, ge=1)
    """Passes over the training data."""
    steps: int | None = Field(default=None, ge=1)
    """Optimiser steps to stop after, whatever the epochs."""
    batch_size: int = Field(default=32, ge=2)
    """Items per batch (trials of one participant, studies or slices), over all ranks."""
    accumulate: int = Field(default=1, ge=1)
    """Batches per optimiser step."""
    patience: int | None = Field(default=5, ge=1)
    """Epochs without a better validation score before training stops; never where unset."""
    checkpoint_every: int = Field(default=200, ge=1)
    """Optimiser steps between saved states (and at most five minutes)."""
    log_every: int = Field(default=10, ge=1)
    """Optimiser steps between rows of the log."""
    optimiser: OptimiserSettings = OptimiserSettings(learning_rate=1e-4, warmup_epochs=0.5)
    """Learning rate and decay."""

    def plan(self, seed: int) -> TrainingPlan:
        """What the training loop needs to know."""
        return TrainingPlan(
            epochs=self.epochs, steps=self.steps, seed=seed, accumulate=self.accumulate, patience=self.patience,
            checkpoint_every=self.checkpoint_every, log_every=self.log_every, optimiser=self.optimiser,
        )  # fmt: skip


@dataclass(kw_only=True)
class Position:
    """Where a run stands, at a border between optimiser steps."""

    epoch: int = 0
    """Epoch in progress."""
    batch: int = 0
    """Batches of that epoch that are done."""
    step: int = 0
    """Optimiser steps done."""
    best_loss: float | None = None
    """Smallest validation loss so far."""
    best_epoch: int | None = None
    """Epoch it belongs to."""
    stopped: bool = False
    """Early stopping has ended the run."""


@dataclass(frozen=True, kw_only=True)
class TrainingResult:
    """How a run ended."""

    weights: dict[str, Tensor]
    """Of the best validation epoch, or the last where nobody is held out."""
    position: Position
    """Steps done, best epoch and loss."""
    log: TrainingLog
    """Every logged row."""
    seconds: float
    """Wall time of this process."""
    is_first_rank: bool
    """Whether this process writes the results."""
    barrier: Callable[[], None]
    """Waits for the other ranks."""


def train(
    system: Trainable, source: BatchSource, plan: TrainingPlan, execution: Execution, folder: Path, *, probe: Probe | None = None
) -> TrainingResult:
    """Train ``system.module`` to the end of the plan, going on from the newest state in ``folder`` where there is one.

    Raises
    ------
    InputDatasetError
        The loss is no longer finite, or a state is damaged.
    StoppedError
        The process was told to stop (SIGUSR1, as batch systems send before a time limit); its state is saved.
    """
    started = time.perf_counter()
    if execution.compile:
        _compile(system, choose_device(execution.device))
    state = newest_state(folder)
    run = _Run(system, source, plan, folder, state, probe)
    trainer = _trainer(plan, execution, run)
    if state is not None:
        log.info("resuming after step %d", run.position.step)
    if not run.finished:
        with _stopped_by_signal(run):
            _fit(trainer, run)
    trainer.strategy.barrier()  # the first rank has written the best weights
    best = run.best_path if run.position.best_epoch is not None else None
    weights = read_tensors(best) if best is not None else {k: v.detach().cpu() for k, v in system.module.state_dict().items()}
    return TrainingResult(
        weights=weights,
        position=run.position,
        log=run.log_rows,
        seconds=time.perf_counter() - started,
        is_first_rank=trainer.is_global_zero,
        barrier=trainer.strategy.barrier,
    )


class _Run(lightning.LightningModule):
    """One training run as Lightning sees it."""

    def __init__(
        self, system: Trainable, source: BatchSource, plan: TrainingPlan, folder: Path, state: TrainingState | None, probe: Probe | None
    ) -> None:
        super().__init__()
        self.module = system.module
        self.position = Position(**state.progress["position"]) if state else Position()
        self.log_rows = TrainingLog.parse(state.log) if state else TrainingLog()
        self._system, self._source, self._plan, self._folder = system, source, plan, folder
        self._state, self._probe = state, probe
        self._names = {id(parameter): name for name, parameter in self.module.named_parameters()}
        self._row: dict[str, Tensor] = {}
        self._validation: list[tuple[float, dict[str, Tensor]]] = []
        self._saved_at = time.monotonic()
        self.stop_asked = False
        if state:
            self.module.load_state_dict(state.weights)

    @property
    def total_steps(self) -> int:
        return self._plan.total_steps(self._source.num_batches)

    @property
    def finished(self) -> bool:
        return self.position.stopped or self.position.step >= self.total_steps

    @property
    def best_path(self) -> Path:
        return self._folder / f"best-{self.position.best_epoch:04d}.safetensors"

    def configure_optimizers(self) -> torch.optim.Optimizer:
        settings = self._plan.optimiser
        decayed = [p for p in self.module.parameters() if p.requires_grad and p.ndim >= 2]
        plain = [p for p in self.module.parameters() if p.requires_grad and p.ndim < 2]
        groups: list[dict[str, Any]] = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}]
        if isinstance(self._system, Staged):
            groups = [{**group, "params": [p], "name": self._names[id(p)]} for group in groups for p in group["params"]]
        # the fused kernel cannot be unscaled and clipped with 16-bit gradient scaling
        fused = str(self.trainer.precision) != "16-mixed" and self.device.type in {"cpu", "cuda"}
        return torch.optim.AdamW(groups, lr=settings.learning_rate, fused=fused)

    def on_train_start(self) -> None:
        if self._state is None:
            return
        restore_moments(_optimiser(self), self._names, self._state.moments)
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and self._state.progress.get("scaler"):
            scaler.load_state_dict(self._state.progress["scaler"])
        self._state = None  # its memory is no longer needed

    def train_dataloader(self) -> DataLoader[Any]:
        batches = self._source.training(self.position.epoch, rank=self.global_rank, world_size=self.trainer.world_size)
        first = self.position.step - self.position.batch // self._plan.accumulate
        steps_left = self.total_steps - first
        last = min(self._source.num_batches, steps_left * self._plan.accumulate)
        return self._loader(batches, range(self.position.batch, last))

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        batches = self._source.validation(rank=self.global_rank, world_size=self.trainer.world_size)
        return [] if batches is None else self._loader(batches, range(len(batches)))  # type: ignore[arg-type]

    def _loader(self, batches: Dataset[Any], order: range) -> DataLoader[Any]:
        workers: int = self._workers
        return DataLoader(batches, batch_size=None, sampler=order, num_workers=workers, collate_fn=_as_it_is)

    _workers = 0

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:  # noqa: ANN401, ARG002
        return batch.to(device)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:  # noqa: ANN401, ARG002
        self.module.train()
        # dropout depends on the position alone, so that it survives resuming
        torch.manual_seed(_mixed(self._plan.seed, self.position.epoch, self.position.batch, self.global_rank))
        epoch = self.position.epoch + self.position.batch / self._source.num_batches
        terms = self._system.losses(batch, epoch=epoch)
        loss = self._weighted(terms)
        self._row = {"loss": loss.detach(), **{name: value.detach() for name, value in terms.items()}}
        return loss

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:  # noqa: ANN401
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        self._row["gradient_norm"] = nn.utils.clip_grad_norm_(trained, self._plan.optimiser.clip).detach()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401, ARG002
        rate = self._plan.learning_rate(self.position.step, self._source.num_batches)
        for group in _optimiser(self).param_groups:
            group["lr"] = rate
            if isinstance(self._system, Staged):
                group["lr"] *= self._system.rate_factor(group["name"], self.position.step / self.total_steps)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401, ARG002
        position, plan = self.position, self._plan
        position.batch += 1
        if position.batch % plan.accumulate and position.batch < self._source.num_batches:
            return
        rate = plan.learning_rate(position.step, self._source.num_batches)
        position.step += 1
        if position.step % plan.log_every == 0 or position.step in {1, self.total_steps}:
            values = self._averaged_row()
            if not math.isfinite(values["loss"]):
                raise self._diverged("training")
            self.log_rows.add("train", step=position.step, epoch=position.epoch, learning_rate=rate, **values)
        # the state at the end of an epoch is saved after its validation
        if position.batch < self._source.num_batches and position.step < self.total_steps:
            due = position.step % plan.checkpoint_every == 0 or time.monotonic() - self._saved_at > _LONGEST_UNSAVED_S
            if due or self.stop_asked:
                self._save()
            self._stop_if_asked()

    def on_validation_epoch_start(self) -> None:
        self._validation = []

    def validation_step(self, batch: Any, batch_idx: int) -> None:  # noqa: ANN401, ARG002
        terms = self._system.losses(batch, epoch=math.inf)
        self._validation.append((self._size(batch), {"loss": self._weighted(terms), **terms}))

    def _size(self, batch: Any) -> float:  # noqa: ANN401
        """What a validation batch weighs: a rank's own items, or an equal share of those of all ranks where losses are means over them all."""
        if self.trainer.world_size == 1 or not hasattr(batch, "counted"):
            return len(batch.keys)
        return float(torch.as_tensor(self.all_gather(batch.counted.sum().double())).mean())

    def on_train_epoch_end(self) -> None:
        position, patience = self.position, self._plan.patience
        probed = {} if self._probe is None else {f"{MONITOR}{name}": value for name, value in self._probe().items()}
        if probed and not self._validation:
            self.log_rows.add("validation", step=position.step, epoch=position.epoch, **probed)
        if self._validation:
            means = self._validation_means()
            if not math.isfinite(means["loss"]):
                raise self._diverged("validation")
            judged: float | None = means["loss"]
            if isinstance(self._system, Judged):
                judged = self._system.judge(position.epoch)
                means |= {} if judged is None else {f"{MONITOR}judged": judged}
            self.log_rows.add("validation", step=position.step, epoch=position.epoch, **means, **probed)
            if judged is not None and (position.best_loss is None or judged < position.best_loss):
                position.best_loss, position.best_epoch = judged, position.epoch
                if self.trainer.is_global_zero:
                    write_tensors(self.best_path, self.module.state_dict())
            elif patience is not None and position.best_epoch is not None and position.epoch - position.best_epoch >= patience:
                position.stopped = True
                self.trainer.should_stop = True
        position.epoch += 1
        position.batch = 0
        self._save()
        if self.finished:
            self.trainer.should_stop = True
        else:
            self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        if self.stop_asked:
            raise StoppedError(f"stopped on request after step {self.position.step}, state saved", fix="the same command goes on from here")

    def _weighted(self, terms: Mapping[str, Tensor]) -> Tensor:
        weights = self._system.loss_weights
        return torch.stack([weights[name] * value for name, value in terms.items() if not name.startswith(MONITOR)]).sum()

    def _averaged_row(self) -> dict[str, float]:
        """The last step's terms, averaged over ranks; terms are the same on every rank."""
        names = sorted(self._row)
        values = torch.stack([self._row[name].detach().double().reshape(()) for name in names])
        if self.trainer.world_size > 1:
            values = torch.as_tensor(self.all_gather(values)).mean(dim=0)
        found = dict(zip(names, values.tolist(), strict=True))
        return {name: found[name] for name in self._row}

    def _validation_means(self) -> dict[str, float]:
        """Means over validation batches and ranks, weighted by their sizes; a term counts where it was computed."""
        names = sorted({name for _, terms in self._validation for name in terms})
        sums = torch.zeros(len(names), 2, dtype=torch.float64, device=self.device)
        for size, terms in self._validation:
            for place, name in enumerate(names):
                if name in terms:
                    sums[place] += torch.stack(
                        [size * terms[name].double(), torch.tensor(float(size), device=self.device, dtype=torch.float64)]
                    )
        if self.trainer.world_size > 1:
            sums = torch.as_tensor(self.all_gather(sums)).sum(dim=0)
        return {name: float(total / count) for name, (total, count) in zip(names, sums, strict=True)}

    def _diverged(self, what: str) -> InputDatasetError:
        fix = "lower optimiser.learning_rate, or use --set execution.precision=32-true"
        return InputDatasetError(f"the {what} loss is no longer finite at step {self.position.step}", fix=fix)

    def _save(self) -> None:
        self._saved_at = time.monotonic()
        # the loss is looked at where it is logged; a state in between must not keep what no setting could mend
        if not all(bool(torch.isfinite(parameter).all()) for parameter in self.module.parameters()):
            raise self._diverged("training")
        if not self.trainer.is_global_zero:
            return
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        progress = {"position": asdict(self.position), "scaler": None if scaler is None else scaler.state_dict()}
        state = TrainingState(
            weights=self.module.state_dict(),
            moments=optimiser_moments(_optimiser(self), self._names),
            progress=progress,
            log=self.log_rows.to_csv(),
        )
        save_state(self._folder, f"step-{self.position.step:08d}-{self.position.epoch:04d}", state)
        for path in self._folder.glob("best-*.safetensors"):
            if self.position.best_epoch is None or path != self.best_path:
                path.unlink()


class _Bar(Callback):
    """Progress on a terminal, a line per epoch elsewhere."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total} steps"),
            TextColumn("loss {task.fields[loss]}"), TimeElapsedColumn(), TimeRemainingColumn(),
            console=console, disable=not console.is_terminal,
        )  # fmt: skip

    def on_train_start(self, trainer: lightning.Trainer, run: Any) -> None:  # noqa: ANN401
        if trainer.is_global_zero:
            self._progress.start()
            self._task = self._progress.add_task("training", total=run.total_steps, completed=run.position.step, loss="–")

    def on_train_batch_end(self, trainer: lightning.Trainer, run: Any, *_: Any) -> None:  # noqa: ANN401
        if trainer.is_global_zero and console.is_terminal:
            loss = f"{float(run._row['loss']):.3f}"  # noqa: SLF001  (same module)
            self._progress.update(self._task, completed=run.position.step, loss=loss)

    def on_train_epoch_end(self, trainer: lightning.Trainer, run: Any) -> None:  # noqa: ANN401
        if trainer.is_global_zero and not console.is_terminal:
            log.info("epoch %d, step %d of %d: %s", run.position.epoch, run.position.step, run.total_steps, run.log_rows.last())

    def on_train_end(self, trainer: lightning.Trainer, run: Any) -> None:  # noqa: ANN401, ARG002
        self._progress.stop()

    def on_exception(self, *_: Any) -> None:  # noqa: ANN401
        self._progress.stop()


def _trainer(plan: TrainingPlan, execution: Execution, run: _Run) -> lightning.Trainer:
    for noisy in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(noisy).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
    if execution.omp_nthreads:
        torch.set_num_threads(execution.omp_nthreads)
    run._workers = execution.num_workers  # noqa: SLF001  (same module)
    many = execution.num_nodes > 1 or execution.devices not in (1, "auto")
    return lightning.Trainer(
        accelerator={"cuda": "gpu"}.get(execution.device, execution.device),
        devices=1 if execution.devices == "auto" and execution.device == "cpu" else execution.devices,
        num_nodes=execution.num_nodes,
        # parameters of the atlases that a batch does not hold get no gradient
        strategy="ddp_find_unused_parameters_true" if many else "auto",
        precision=_precision(execution),  # type: ignore[arg-type]
        max_epochs=max(1, plan.epochs - run.position.epoch),
        accumulate_grad_batches=plan.accumulate,
        reload_dataloaders_every_n_epochs=1,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[_Bar()],
        default_root_dir=run._folder,  # noqa: SLF001  (same module)
    )


@contextlib.contextmanager
def _stopped_by_signal(run: _Run) -> Iterator[None]:
    """SIGUSR1 ends the training at the next step border. Lightning's own answer to it would requeue the job by itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(_signal: int, _frame: object) -> None:
        run.stop_asked = True

    before = signal.signal(signal.SIGUSR1, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


def _compile(system: Trainable, device: torch.device) -> None:
    if device.type != "cuda":
        raise SettingsError("execution.compile is for GPUs", fix="leave it out, or use --device cuda")
    if not isinstance(system, Compilable):
        raise SettingsError("this system has no parts that are worth compiling", fix="leave execution.compile out")
    for part in system.repeated_parts:
        part.compile(dynamic=False)  # one atlas, one shape; in place, so that the names of weights stay


def _fit(trainer: lightning.Trainer, run: _Run) -> None:
    try:
        trainer.fit(run)
    except SystemExit as error:
        # Lightning turns Ctrl+C into exit code 1; the command line has its own code for it
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise


def _precision(execution: Execution) -> str:
    known = ("32-true", "bf16-mixed", "16-mixed")
    if execution.precision == "auto":
        gpu = execution.device in {"auto", "cuda"} and torch.cuda.is_available() and torch.cuda.is_bf16_supported()
        return "bf16-mixed" if gpu else "32-true"
    if execution.precision not in known:
        raise SettingsError(f"unknown precision '{execution.precision}'", fix=f"use auto or one of: {', '.join(known)}")
    return execution.precision


def _optimiser(run: lightning.LightningModule) -> torch.optim.Optimizer:
    optimiser = run.optimizers(use_pl_optimizer=False)
    if isinstance(optimiser, list):
        raise TypeError("the loop has one optimiser")
    return optimiser


def _as_it_is(batch: object) -> object:
    return batch


def _mixed(*values: int) -> int:
    seed = 0
    for value in values:
        seed = (seed * 1_000_003 + value + 1) % (2**63 - 25)
    return seed
