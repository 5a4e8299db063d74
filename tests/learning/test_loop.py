"""The training loop on a toy: stopped anywhere and started again it ends with the same bits; steps against a plain loop."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from brainfm_cli.config import Execution
from brainfm_cli.errors import InputDatasetError, SettingsError
from brainfm_cli.learning import checkpoints, loop
from brainfm_cli.learning.checkpoints import newest_state
from brainfm_cli.learning.loop import OptimiserSettings, TrainingPlan, TrainingResult, train

if TYPE_CHECKING:
    from pathlib import Path

CPU = Execution(device="cpu")
PLAN = TrainingPlan(
    epochs=3,
    steps=None,
    seed=7,
    accumulate=1,
    patience=None,
    checkpoint_every=1,
    log_every=1,
    optimiser=OptimiserSettings(learning_rate=0.05, weight_decay=0.1, warmup_epochs=1.0, final_fraction=0.1, clip=0.5),
)


@dataclass(frozen=True)
class Batch:
    x: Tensor
    keys: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.x.to(device), self.keys.to(device))


class Batches(Dataset[Batch]):
    def __init__(self, count: int, epoch: int, sizes: tuple[int, ...] = ()) -> None:
        self.count, self.epoch, self.sizes = count, epoch, sizes

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, place: int) -> Batch:
        size = self.sizes[place] if self.sizes else 6
        generator = torch.Generator().manual_seed(1000 * (self.epoch + 2) + place)
        return Batch(torch.randn(size, 4, generator=generator), torch.arange(size))


@dataclass
class Source:
    num_batches: int = 5
    held_out: tuple[int, ...] = (4, 2)
    """Sizes of the validation batches."""

    def training(self, epoch: int, *, rank: int, world_size: int) -> Batches:
        assert (rank, world_size) == (0, 1)
        return Batches(self.num_batches, epoch)

    def validation(self, *, rank: int, world_size: int) -> Batches | None:
        return Batches(len(self.held_out), -1, self.held_out) if self.held_out else None


class StoppedError(Exception):
    """What a kill looks like from inside."""


@dataclass
class Toy:
    """A small network that learns to keep its input; it can be made to stop at its n-th batch."""

    dropout: float = 0.3
    stop_at: int | None = None
    scripted: tuple[float, ...] = ()
    """Validation losses by epoch, instead of computed ones."""

    def __post_init__(self) -> None:
        torch.manual_seed(3)
        self.module = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Dropout(self.dropout), nn.GELU(), nn.Linear(8, 4))
        self.module.register_buffer("fitted", torch.tensor([2.0]))
        self.calls = 0
        self.seen: list[tuple[bool, float]] = []

    @property
    def loss_weights(self) -> dict[str, float]:
        return {"fit": 1.0, "size": 0.1, "unused": 5.0}

    def losses(self, batch: Batch, *, epoch: float) -> dict[str, Tensor]:
        self.calls += 1
        if self.stop_at == self.calls:
            raise StoppedError
        self.seen.append((self.module.training, epoch))
        out = self.module(batch.x)
        terms = {"fit": (out - batch.x).square().mean(), "size": out.abs().mean(), "monitor_largest": out.abs().max()}
        if self.scripted and not self.module.training:
            done = sum(not training for training, _ in self.seen) - 1
            terms |= {"fit": torch.tensor(self.scripted[done]), "size": torch.tensor(0.0)}
        return terms


def run(folder: Path, toy: Toy | None = None, plan: TrainingPlan = PLAN, source: Source | None = None) -> TrainingResult:
    return train(toy or Toy(), source or Source(), plan, CPU, folder)


def same(one: TrainingResult, two: TrainingResult) -> bool:
    return (
        one.position == two.position
        and one.log.to_csv() == two.log.to_csv()
        and one.weights.keys() == two.weights.keys()
        and all(torch.equal(value, two.weights[name]) for name, value in one.weights.items())
    )


SHORT = replace(PLAN, epochs=2)
PLANS = {
    "every step saved": SHORT,
    "two batches a step, not each saved": replace(SHORT, accumulate=2, checkpoint_every=2, log_every=2),
    "ended within an epoch": replace(SHORT, steps=5, accumulate=2),
}


@pytest.mark.parametrize("name", PLANS)
def test_stopped_at_any_batch_and_resumed_ends_the_same(tmp_path: Path, name: str) -> None:
    plan = PLANS[name]
    calm = Toy()
    undisturbed = run(tmp_path / "calm", calm, plan)
    assert undisturbed.position.step == plan.total_steps(5)
    assert calm.calls > 11
    for stop_at in range(1, calm.calls + 1):  # validation batches too
        folder = tmp_path / f"stopped-{stop_at}"
        with pytest.raises(StoppedError):
            run(folder, Toy(stop_at=stop_at), plan)
        assert same(run(folder, plan=plan), undisturbed), f"stopped at batch {stop_at}"


def test_stopped_again_and_again(tmp_path: Path) -> None:
    undisturbed = run(tmp_path / "calm")
    for _ in range(14):
        try:
            result = run(tmp_path / "restless", Toy(stop_at=4))  # three batches at most each time
        except StoppedError:
            continue
        assert same(result, undisturbed)
        return
    pytest.fail("resuming made no headway")


@pytest.mark.parametrize("stop_at", [1, 2, 5, 11, 12, 13, 23])
def test_stopped_while_a_file_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    undisturbed = run(tmp_path / "calm")
    written = 0
    real = checkpoints.write_tensors

    def torn(path: Path, tensors: Any) -> Path:
        nonlocal written
        written += 1
        if written == stop_at:
            path.write_bytes(b"half")
            raise StoppedError
        return real(path, tensors)

    with monkeypatch.context() as patched:
        patched.setattr(checkpoints, "write_tensors", torn)
        patched.setattr(loop, "write_tensors", torn)
        try:
            run(tmp_path / "torn")
        except StoppedError:
            pass
        else:
            assert written < stop_at
    assert same(run(tmp_path / "torn"), undisturbed)
    assert not [path for path in (tmp_path / "torn").iterdir() if path.name.startswith(".")], "leftovers are swept"


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = run(tmp_path)
    toy = Toy(stop_at=1)
    assert same(run(tmp_path, toy), first)
    assert toy.calls == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"best-{first.position.best_epoch:04d}.safetensors", "step-00000015-0003"]


def by_hand(plan: TrainingPlan, batches: int) -> dict[str, Tensor]:
    """The same training as a plain torch loop, without dropout."""
    toy = Toy(dropout=0.0)
    toy.module.train()
    matrices = [p for p in toy.module.parameters() if p.ndim >= 2]
    vectors = [p for p in toy.module.parameters() if p.ndim < 2]
    optimiser = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=1.0)
    step = 0
    for epoch in range(plan.epochs):
        places = list(range(batches))
        while places and (plan.steps is None or step < plan.steps):
            group, places = places[: plan.accumulate], places[plan.accumulate :]
            optimiser.zero_grad()
            for place in group:
                terms = toy.losses(Batches(batches, epoch)[place], epoch=0.0)
                ((terms["fit"] + 0.1 * terms["size"]) / plan.accumulate).backward()
            nn.utils.clip_grad_norm_(toy.module.parameters(), plan.optimiser.clip)
            for parameters in optimiser.param_groups:
                parameters["lr"] = plan.learning_rate(step, batches)
            optimiser.step()
            step += 1
    return toy.module.state_dict()


@pytest.mark.parametrize("steps", [None, 5])
@pytest.mark.parametrize("accumulate", [1, 2, 5])
def test_steps_are_those_of_a_plain_loop(tmp_path: Path, accumulate: int, steps: int | None) -> None:
    plan = replace(PLAN, accumulate=accumulate, steps=steps)
    result = run(tmp_path, Toy(dropout=0.0), plan, Source(held_out=()))
    assert result.position.step == plan.total_steps(5) == min(steps or 99, 3 * math.ceil(5 / accumulate))
    expected = by_hand(plan, 5)
    for name, value in result.weights.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
    assert not torch.equal(result.weights["0.weight"], Toy().module[0].weight)


@dataclass
class Drawing(Toy):
    """Notes the first random number of every training batch, as dropout would meet it."""

    def losses(self, batch: Batch, *, epoch: float) -> dict[str, Tensor]:
        if self.module.training:
            self.draws = [*getattr(self, "draws", []), float(torch.rand(()))]
        return super().losses(batch, epoch=epoch)


def test_dropout_is_another_in_every_batch_and_for_every_seed(tmp_path: Path) -> None:
    draws = {}
    for name, seed in (("first", 7), ("again", 7), ("other", 8)):
        toy = Drawing()
        run(tmp_path / name, toy, replace(PLAN, seed=seed))
        draws[name] = toy.draws
    assert draws["first"] == draws["again"]
    assert len({*draws["first"], *draws["other"]}) == 30


def test_learning_rate_is_the_closed_form(tmp_path: Path) -> None:
    plan = replace(PLAN, epochs=4, optimiser=replace_settings(warmup_epochs=1.5))
    rates = run(tmp_path, plan=plan).log.curve("train", "learning_rate")[1]
    warmup, total = 8, 20  # 1.5 epochs of 5 steps, rounded half to even
    expected = [0.05 * (step + 1) / warmup for step in range(warmup)]
    expected += [0.05 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2) for step in range(warmup, total)]
    assert rates == pytest.approx(expected)
    assert max(rates) == pytest.approx(0.05)


@pytest.mark.parametrize(("warmup_epochs", "steps"), [(0.0, None), (100.0, None), (1.0, 3), (0.01, 1)])
def test_learning_rate_at_the_edges(warmup_epochs: float, steps: int | None) -> None:
    plan = replace(PLAN, steps=steps, optimiser=replace_settings(warmup_epochs=warmup_epochs))
    rates = [plan.learning_rate(step, 5) for step in range(plan.total_steps(5))]
    assert all(0 < rate < 0.0500001 for rate in rates)
    if warmup_epochs == 0:
        assert rates[0] == pytest.approx(0.05)
        assert rates == sorted(rates, reverse=True)
    if warmup_epochs == 100:  # warm-up never outlasts the run
        assert rates[-1] == pytest.approx(0.05)


def replace_settings(**changes: float) -> OptimiserSettings:
    return PLAN.optimiser.model_copy(update=changes)


def test_the_best_validation_epoch_is_kept(tmp_path: Path) -> None:
    plan = replace(PLAN, epochs=4)
    scripted = Toy(scripted=(3.0, 3.0, 1.0, 1.0, 2.0, 2.0, 1.0, 1.0))
    result = run(tmp_path / "whole", scripted, plan)
    assert (result.position.best_epoch, result.position.best_loss) == (1, pytest.approx(1.0))  # the first of equals
    two = run(tmp_path / "two", Toy(), replace(plan, epochs=2), Source(held_out=()))
    # the schedule differs, so the weights of epoch 1 come from a run with the same one, stopped there
    with pytest.raises(StoppedError):
        run(tmp_path / "stopped", Toy(stop_at=11), plan, Source(held_out=()))
    state = newest_state(tmp_path / "stopped")
    assert state is not None
    assert state.progress["position"]["epoch"] == 2
    assert all(torch.equal(value, state.weights[name]) for name, value in result.weights.items())
    assert not torch.equal(two.weights["0.weight"], result.weights["0.weight"])


def test_validation_is_the_mean_over_items_in_evaluation_mode(tmp_path: Path) -> None:
    toy = Toy(scripted=(1.0, 4.0) * 3)
    log = run(tmp_path, toy).log
    assert log.curve("validation", "loss")[1] == pytest.approx([2.0] * 3)  # (4 · 1 + 2 · 4) / 6
    assert log.curve("validation", "loss")[0] == [5, 10, 15]
    assert all(math.isinf(epoch) for training, epoch in toy.seen if not training)  # the hardest masks
    assert [epoch for training, epoch in toy.seen if training] == pytest.approx([place / 5 for place in range(15)])


def test_training_stops_when_patience_ends(tmp_path: Path) -> None:
    plan = replace(PLAN, epochs=9, patience=2)
    losses = (3.0, 2.0, 2.5, 2.2, 1.0)  # of epoch 4 nothing is known any more
    toy = Toy(scripted=tuple(loss for loss in losses for _ in range(2)))
    result = run(tmp_path, toy, plan)
    assert result.position.stopped
    assert (result.position.best_epoch, result.position.epoch, result.position.step) == (1, 4, 20)
    idle = Toy(stop_at=1)
    assert same(run(tmp_path, idle, plan), result)
    assert idle.calls == 0
    # and stopped in between, patience goes on counting
    with pytest.raises(StoppedError):
        run(tmp_path / "again", Toy(stop_at=17, scripted=toy.scripted), plan)
    later = Toy(scripted=toy.scripted[4:])
    assert run(tmp_path / "again", later, plan).position == result.position


def test_nobody_held_out_keeps_the_last_weights(tmp_path: Path) -> None:
    toy = Toy()
    result = run(tmp_path, toy, source=Source(held_out=()))
    assert result.position.best_epoch is None
    assert all(torch.equal(value, result.weights[name]) for name, value in toy.module.state_dict().items())
    assert result.log.curve("validation", "loss") == ([], [])


def test_the_log_holds_the_rows_asked_for(tmp_path: Path) -> None:
    log = run(tmp_path, plan=replace(PLAN, log_every=4)).log
    assert log.curve("train", "loss")[0] == [1, 4, 8, 12, 15]
    assert log.terms() == ["fit", "monitor_largest", "size"]
    fit, size, loss = (log.curve("train", name)[1] for name in ("fit", "size", "loss"))
    assert loss == pytest.approx([f + 0.1 * s for f, s in zip(fit, size, strict=True)])
    assert max(log.curve("train", "gradient_norm")[1]) > 0.5  # as it was before clipping


@dataclass
class Diverging(Toy):
    """Its loss is not a number from the n-th training batch on."""

    from_batch: int = 3
    validating: bool = False

    def losses(self, batch: Batch, *, epoch: float) -> dict[str, Tensor]:
        terms = super().losses(batch, epoch=epoch)
        count = sum(training for training, _ in self.seen)
        if count >= self.from_batch and self.validating != self.module.training:
            terms["fit"] = terms["fit"] * torch.nan
        return terms


@pytest.mark.parametrize(("from_batch", "log_every"), [(1, 1), (3, 4), (7, 4), (3, 50), (11, 50)])
def test_a_loss_that_is_no_number_is_said_and_never_saved(tmp_path: Path, from_batch: int, log_every: int) -> None:
    with pytest.raises(InputDatasetError, match="no longer finite"):
        run(tmp_path, Diverging(from_batch=from_batch), replace(PLAN, log_every=log_every))
    state = newest_state(tmp_path)
    assert state is None or all(torch.isfinite(value).all() for value in state.weights.values())
    # whoever mends the cause goes on from a sound state
    assert torch.isfinite(run(tmp_path).weights["0.weight"]).all()


def test_a_validation_loss_that_is_no_number_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputDatasetError, match="validation loss is no longer finite"):
        run(tmp_path, Diverging(from_batch=1, validating=True))


def test_a_damaged_state_is_a_named_error(tmp_path: Path) -> None:
    with pytest.raises(StoppedError):
        run(tmp_path, Toy(stop_at=9))
    (state,) = tmp_path.glob("step-*")
    weights = state / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(InputDatasetError, match="unfinished training is damaged"):
        run(tmp_path)


def test_an_unknown_precision_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="unknown precision '64'"):
        train(Toy(), Source(), PLAN, Execution(device="cpu", precision="64"), tmp_path)


def test_compiling_is_for_gpus(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="for GPUs"):
        train(Toy(), Source(), PLAN, Execution(device="cpu", compile=True), tmp_path)
