"""Any small network as a predictor: trained from scratch inside each fold, how long chosen on its inner folds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional

from brainfm_cli.config import Frozen
from brainfm_cli.learning.forecasts import Forecast, TrainingFold


class NetworkSettings(Frozen):
    """How networks without pretraining are trained; the published reference's optimiser by default."""

    epochs: int = Field(default=60, ge=1)
    """Longest training, passes over the people; how long is chosen on inner folds."""
    stops: int = Field(default=3, ge=1)
    """Number of evenly spaced lengths that are compared."""
    inner_folds: int = Field(default=3, ge=1)
    """Inner folds used, of those that the design has."""
    batch_size: int = Field(default=16, ge=2)
    """People per step."""
    learning_rate: float = Field(default=5e-4, gt=0)
    """Of AdamW, falling by a cosine to 1e-7."""
    weight_decay: float = Field(default=1e-2, ge=0)
    """Of AdamW."""


@dataclass(frozen=True, kw_only=True)
class NetworkPredictor:
    """Trains ``build(outputs)`` on the training people and predicts the test people; nothing outside the fold is looked at."""

    participants: tuple[str, ...]
    """Participant keys, in the order of ``inputs``."""
    inputs: Tensor
    """(people, …) what the network reads."""
    build: Callable[[int], nn.Module]
    """A network with so many outputs, with weights from torch's global generator."""
    settings: NetworkSettings
    """Optimiser and lengths."""

    def __call__(self, fold: TrainingFold, test: Sequence[str]) -> Forecast:
        """The forecast for ``test``."""
        place = {name: row for row, name in enumerate(self.participants)}
        people = self.inputs[[place[name] for name in fold.target.participants]]
        others = self.inputs[[place[name] for name in test]]
        settings = self.settings
        stops = sorted({max(1, round(settings.epochs * part / settings.stops)) for part in range(1, settings.stops + 1)})
        shape = (len(stops), len(people), *((len(fold.target.classes),) if fold.target.classes else ()))
        held_out = np.full(shape, np.nan)
        for train, validation in fold.inner[: settings.inner_folds]:
            held_out[:, validation] = self._fitted(fold, people[train], train, people[validation], stops)
        known = np.isfinite(held_out[0]).reshape(len(people), -1).all(1)
        losses = [_loss(values[known], fold.target.observed[known], len(fold.target.classes)) for values in held_out]
        best = int(np.argmin(losses))
        predicted = self._fitted(fold, people, np.arange(len(people)), others, [stops[best]])[0]
        return Forecast(test=predicted, train=held_out[best], choices={"epochs": float(stops[best])})

    def _fitted(
        self, fold: TrainingFold, people: Tensor, rows: NDArray[np.int64], others: Tensor, stops: Sequence[int]
    ) -> NDArray[np.float64]:
        """(stops, others, …) predictions after each of ``stops`` epochs."""
        settings, classes = self.settings, len(fold.target.classes)
        observed = fold.target.observed[rows]
        # the scale of a number is that of these people alone
        centre, spread = (0.0, 1.0) if classes else (float(observed.mean()), float(observed.std()) or 1.0)
        wanted = torch.from_numpy(observed.astype(np.int64) if classes else ((observed - centre) / spread).astype(np.float32))
        found = []
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(fold.seed % 2**31)
            network = self.build(classes or 1)
            optimiser = torch.optim.AdamW(network.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, settings.epochs, eta_min=1e-7)
            for epoch in range(1, max(stops) + 1):
                network.train()
                for part in torch.randperm(len(people)).split(settings.batch_size):
                    scores = network(people[part])
                    loss = functional.cross_entropy(scores, wanted[part]) if classes else functional.mse_loss(scores[:, 0], wanted[part])
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                    optimiser.step()
                schedule.step()
                if epoch in stops:
                    network.eval()
                    with torch.no_grad():
                        scores = torch.cat([network(part) for part in others.split(settings.batch_size)]).double()
                    values = torch.softmax(scores, dim=1) if classes else scores[:, 0] * spread + centre
                    found.append(values.numpy())
        return np.stack(found)


def _loss(predicted: NDArray[np.float64], observed: NDArray[np.float64], classes: int) -> float:
    if not classes:
        return float(np.mean((predicted - observed) ** 2))
    return float(-np.log(np.clip(predicted[np.arange(len(observed)), observed.astype(np.int64)], 1e-12, None)).mean())
