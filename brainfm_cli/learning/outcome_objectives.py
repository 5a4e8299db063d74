"""Losses of ordered grades and of survival as pure functions of tensors, the linear fit that clinical floors take, and baseline hazards.

Causes are numbered from 1, and 0 is censored. Risk sets are those of the people given: of a batch, where batches are given.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

_NEWTON_STEPS = 200


def likelihood_loss(log_chances: Tensor, classes: Tensor) -> Tensor:
    """Mean negative log-likelihood of (people, classes) log probabilities."""
    return -log_chances.gather(1, classes[:, None]).mean()


def cox_loss(risk: Tensor, time: Tensor, event: Tensor) -> Tensor:
    """Negative partial log-likelihood per event with Efron's handling of ties (1977); 0 where nobody has the event.

    ``risk`` is (people,) log relative hazards, ``time`` (people,), ``event`` (people,) bool.
    """
    if not bool(event.any()):
        return risk.sum() * 0.0
    risk = risk.double()
    moments = torch.unique(time[event])
    at_risk = (time[None] >= moments[:, None]).double()
    died = ((time[None] == moments[:, None]) & event[None]).double()
    shift = risk.detach().max()
    relative = (risk - shift).exp()
    whole, tied, count = at_risk @ relative, died @ relative, died.sum(1)
    place = torch.arange(int(count.max()), device=risk.device)
    left = whole[:, None] - place[None] / count[:, None] * tied[:, None]
    used = place[None] < count[:, None]
    # where not used, the logarithm of 1: no gradient of an infinite number
    logs = torch.where(used, left, torch.ones_like(left)).log() + shift * used
    return (logs.sum() - died.sum(0) @ risk) / count.sum()


def hazard_loss(log_hazards: Tensor, time: Tensor, cause: Tensor, edges: Tensor) -> Tensor:
    """Mean negative log-likelihood of discrete time with competing causes (Prentice and Gloeckler 1978; Tutz and Schmid 2016).

    Parameters
    ----------
    log_hazards
        (people, bins, 1 + causes) log probabilities within each bin: nothing happens, then each cause, given that nothing has before.
    time, cause
        (people,) follow-up and number of the cause, 0 where censored.
    edges
        (bins,) upper ends, ascending; a bin holds its upper end. A person counts in the bins that were lived through whole and, with an
        event, in the bin of the event. After the last end everybody is censored.
    """
    ended = torch.bucketize(time.to(edges.dtype), edges)  # the bin that holds the time; bins where it is after the last
    through = ended + ((cause == 0) & (time == edges[ended.clamp(max=len(edges) - 1)])).long()
    survived = torch.arange(len(edges), device=time.device)[None] < through[:, None]
    loss = -(log_hazards[:, :, 0] * survived).sum(1)
    happened = (cause > 0) & (ended < len(edges))
    at = log_hazards[torch.arange(len(time)), ended.clamp(max=len(edges) - 1), cause]
    return (loss - torch.where(happened, at, torch.zeros_like(at))).mean()


def incidence_of_hazards(log_hazards: Tensor) -> Tensor:
    """(people, bins, causes) cumulative incidence of each cause by the end of each bin."""
    free = log_hazards[:, :, 0].cumsum(1)
    before = torch.cat([torch.zeros_like(free[:, :1]), free[:, :-1]], 1).exp()
    return (before[:, :, None] * log_hazards[:, :, 1:].exp()).cumsum(1)


def baseline_hazard(risk: Tensor, time: Tensor, event: Tensor, at: Tensor) -> Tensor:
    """(times,) Breslow's cumulative baseline hazard of people's (people,) log relative hazards at each of ``at``."""
    moments = torch.unique(time[event])
    relative = risk.double().exp()
    whole = (time[None] >= moments[:, None]).double() @ relative
    steps = ((time[None] == moments[:, None]) & event[None]).double().sum(1) / whole
    return ((moments[None] <= at[:, None]).double() * steps).sum(1)


def incidence_of_cox(risk: Tensor, baseline: Tensor) -> Tensor:
    """(people, times, causes) cumulative incidence from cause-specific (people, causes) risks and (times, causes) cumulative baselines.

    Between two times the causes share what happens by their hazards, which is exact for hazards that are proportional there.
    """
    steps = torch.diff(baseline, dim=0, prepend=torch.zeros_like(baseline[:1]))
    mine = steps[None] * risk.double().exp()[:, None, :]
    together = mine.sum(2)
    before = (-(together.cumsum(1) - together)).exp()
    happened = before * -torch.expm1(-together)
    share = mine / together.clamp_min(1e-300)[:, :, None]
    return (happened[:, :, None] * share).cumsum(1)


def fit_linear(
    features: Tensor, outputs: int, link: nn.Module | None, loss: Callable[[Tensor], Tensor], *, penalty: float, bias: bool
) -> tuple[Tensor, Tensor]:
    """Weights (features, outputs) and bias (outputs,) of the linear scores of least ``loss`` + penalty/2 · mean squared weights, by L-BFGS.

    The parameters of ``link`` are fitted with them, in place, unpenalised. Everything is computed in double precision.
    """
    weights = torch.zeros(features.shape[1], outputs, dtype=torch.float64, requires_grad=True)
    offset = torch.zeros(outputs, dtype=torch.float64, requires_grad=bias)
    free = [weights, *([offset] if bias else []), *(link.double().parameters() if link is not None else ())]
    optimiser = torch.optim.LBFGS(free, max_iter=_NEWTON_STEPS, tolerance_grad=1e-9, tolerance_change=1e-12, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimiser.zero_grad()
        value = loss(features.double() @ weights + offset) + 0.5 * penalty * weights.square().sum()
        value.backward()
        return value

    optimiser.step(step)  # type: ignore[no-untyped-call]
    return weights.detach(), offset.detach()
