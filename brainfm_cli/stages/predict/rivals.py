"""predict group: networks without pretraining beside the model, trained from scratch in the same folds."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch

from brainfm_cli.config import Frozen
from brainfm_cli.errors import UnsupportedStageError
from brainfm_cli.learning.joined import Joined
from brainfm_cli.learning.networks import NetworkPredictor, NetworkSettings
from brainfm_cli.learning.samples import list_scans, whole_scans
from brainfm_cli.models.graphs import correlate, fisher_z
from brainfm_cli.models.rivals import BrainNetworkTransformer, SeriesNetwork
from brainfm_cli.models.series_scaling import resample

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor, nn

    from brainfm_cli.bids.cohort import Cohort
    from brainfm_cli.learning.forecasts import Predictor
    from brainfm_cli.learning.samples import Windows

Rival = Literal["brain-network-transformer", "series-cnn", "same-encoder"]
NAMES: dict[Rival, str] = {
    "brain-network-transformer": "Brain Network Transformer",
    "series-cnn": "1-D CNN on series",
    "same-encoder": "Same encoder, trained from scratch",
}
_BATCH = 32


class RivalSettings(Frozen):
    """Networks without pretraining."""

    kinds: tuple[Rival, ...] = ()
    """Which: the Brain Network Transformer on connectivity rows, a convolutional network on series, the model's own encoder untrained."""
    training: NetworkSettings = NetworkSettings()
    """How they are trained."""


def make_rivals(
    system: Any,  # noqa: ANN401
    cohort: Cohort,
    participants: Sequence[str],
    atlases: Sequence[str],
    settings: RivalSettings,
) -> dict[str, Predictor]:
    """Predictors by printed name, in the first of ``atlases`` that everybody has; a person's first run counts.

    Raises
    ------
    UnsupportedStageError
        The system's encoder cannot be trained from scratch, or nobody shares an atlas.
    """
    if not settings.kinds:
        return {}
    having = {label: set(cohort.index.loc[cohort.index["atlas"] == label, "participant"]) for label in atlases}
    shared = [label for label in atlases if set(participants) <= having[label]]
    if not shared:
        raise UnsupportedStageError("networks without pretraining need an atlas that everybody has", fix="leave 'rivals' out")
    found: dict[str, Predictor] = {}
    for kind in settings.kinds:
        read, build = _made(kind, system, shared[0], len(cohort.atlases[shared[0]].regions.names))
        found[NAMES[kind]] = NetworkPredictor(
            participants=tuple(participants), inputs=_inputs(cohort, participants, shared[0], read), build=build, settings=settings.training
        )
    return found


def _made(kind: Rival, system: Any, atlas: str, regions: int) -> tuple[Callable[[Windows], Tensor], Callable[[int], nn.Module]]:  # noqa: ANN401
    """What a network reads of runs, and how it is built for a number of outputs."""
    if kind == "brain-network-transformer":
        return connectivity_rows, partial(BrainNetworkTransformer, regions)
    if kind == "series-cnn":
        return standardised_series, partial(SeriesNetwork, regions)
    own = system.system if isinstance(system, Joined) else system
    if not hasattr(own, "untrained"):
        raise UnsupportedStageError("this system's encoder cannot be trained from scratch", fix="leave 'same-encoder' out of rivals.kinds")
    return own.scaled_series, partial(own.untrained, atlas)


def connectivity_rows(windows: Windows) -> Tensor:
    """(runs, regions, regions) Fisher z."""
    return fisher_z(correlate(windows.series, windows.frames)[0])


def standardised_series(windows: Windows, *, repetition_time_s: float = 2.0) -> Tensor:
    """(runs, frames, regions) series at one repetition time, each region of a run of mean 0 and spread 1, absent ones 0; cut to the shortest."""
    found = []
    for series, frames, seconds in zip(windows.series, windows.frames.tolist(), windows.seconds.tolist(), strict=True):
        one = torch.nan_to_num(resample(series[:frames], round(seconds / frames, 4), repetition_time_s))
        found.append((one - one.mean(0)) / one.std(0).clamp_min(1e-6))
    shortest = min(len(one) for one in found)
    return torch.stack([one[:shortest] for one in found])


def _inputs(cohort: Cohort, participants: Sequence[str], atlas: str, read: Callable[[Windows], Tensor]) -> Tensor:
    first = {scan.participant: scan for scan in reversed(list_scans(cohort, participants, [atlas]))}
    scans = [first[name] for name in participants]
    parts = [read(whole_scans(cohort, scans[start : start + _BATCH], atlas)) for start in range(0, len(scans), _BATCH)]
    shortest = min(part.shape[1] for part in parts)
    return torch.cat([part[:, :shortest] for part in parts])
