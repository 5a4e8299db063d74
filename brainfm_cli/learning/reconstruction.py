"""How well hidden pixels are reconstructed: structural similarity and peak signal-to-noise ratio beside two floors, over patients.

Scores over hidden brain pixels judge the model; those over the whole image, into which the visible pixels are pasted, are inflated by
what was never hidden and are given because they are customary. ``data_range`` is 1: intensities lie in [0, 1].
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from brainfm_cli.learning.image_objectives import mean_over, psnr, ssim_map
from brainfm_cli.learning.uncertainty import interval, resample_weights

SCORES = {
    "ssim_hidden": "SSIM, hidden brain",
    "psnr_hidden": "PSNR, hidden brain (dB)",
    "ssim_whole": "SSIM, whole image, visible pixels pasted",
    "psnr_whole": "PSNR, whole image, visible pixels pasted (dB)",
}
FLOORS = ("mean fill", "inpainting")
_RESAMPLES = 2000
_ITERATIONS = 300
_PULL = 1e-4


def score_reconstruction(reconstructed: Mapping[str, Tensor], clean: Tensor, hidden: Tensor, brain: Tensor) -> dict[str, dict[str, Tensor]]:
    """(batch,) values of :data:`SCORES` by method; NaN where no brain pixel of an item is hidden. All tensors are (batch, *pixels)."""
    counted, everything = hidden & brain, torch.ones_like(hidden)
    scores = {}
    for name, images in reconstructed.items():
        joined = torch.where(counted, images.clamp(0, 1), clean)
        similarity = ssim_map(joined, clean, data_range=1.0)
        scores[name] = {
            "ssim_hidden": mean_over(similarity, counted),
            "psnr_hidden": torch.where(counted.flatten(1).any(dim=1), psnr(joined, clean, counted, data_range=1.0), torch.nan),
            "ssim_whole": mean_over(similarity, everything),
            "psnr_whole": psnr(joined, clean, everything, data_range=1.0),
        }
    return scores


def inpaint(images: Tensor, hidden: Tensor, brain: Tensor) -> Tensor:
    """(batch, *pixels) with hidden brain filled by the smoothest continuation of the visible brain: each pixel the mean of its neighbours in the brain."""
    filled = images.clone()
    for place in range(len(images)):
        unknown = (hidden & brain)[place].numpy()
        if unknown.any():
            visible = (brain & ~hidden)[place].numpy()
            filled[place] = torch.from_numpy(_harmonic(images[place].numpy(), unknown, visible).astype(np.float32))
    return filled


def _harmonic(known: NDArray[np.float32], unknown: NDArray[np.bool_], visible: NDArray[np.bool_]) -> NDArray[np.float64]:
    number = np.full(unknown.shape, -1)
    number[unknown] = np.arange(int(unknown.sum()))
    count = int(unknown.sum())
    middle = float(known[visible].mean()) if visible.any() else 0.0
    degree, right = np.full(count, _PULL), np.full(count, _PULL * middle)  # a part that touches nothing visible takes the mean
    rows: list[NDArray[np.int64]] = []
    columns: list[NDArray[np.int64]] = []
    for axis in range(unknown.ndim):
        for step in (1, -1):
            here = [slice(None)] * unknown.ndim
            there = [slice(None)] * unknown.ndim
            here[axis], there[axis] = (slice(None, -1), slice(1, None)) if step == 1 else (slice(1, None), slice(None, -1))
            mine, other, value = number[tuple(here)], number[tuple(there)], known[tuple(there)]
            both, beside = (mine >= 0) & (other >= 0), (mine >= 0) & visible[tuple(there)]
            np.add.at(degree, mine[both | beside], 1)
            np.add.at(right, mine[beside], value[beside])
            rows.append(mine[both])
            columns.append(other[both])
    row, column = np.concatenate(rows), np.concatenate(columns)
    matrix = sparse.diags(degree) - sparse.coo_matrix((np.ones(len(row)), (row, column)), shape=(count, count)).tocsr()
    solved, _ = sparse.linalg.cg(matrix.tocsr(), right, rtol=1e-5, maxiter=_ITERATIONS)
    out = known.astype(np.float64)
    out[unknown] = solved
    return out


def summarise(items: pd.DataFrame, *, seed: int, methods: Sequence[str]) -> pd.DataFrame:
    """Mean of every score by method, and of the model less each floor, with 95 % intervals over patients.

    ``items`` has a row per slice: participant and ``<method>/<score>``; a patient's slices are averaged first.
    """
    people = items.groupby("participant", observed=True).mean(numeric_only=True)
    rows = []
    for score, label in SCORES.items():
        values = {method: people[f"{method}/{score}"].to_numpy(float) for method in methods}
        named = dict(values) | {f"model less {floor}": values["model"] - values[floor] for floor in FLOORS}
        for name, found in named.items():
            kept = found[np.isfinite(found)]
            weights = resample_weights([str(place) for place in range(len(kept))], _RESAMPLES, np.random.default_rng(seed))
            made = interval(lambda w, kept=kept: (w @ kept) / w.sum(1), weights, method="percentile", level=0.95) if len(kept) > 1 else None  # type: ignore[misc]
            rows.append(
                {
                    "score": label,
                    "method": name,
                    "mean": float(kept.mean()) if len(kept) else np.nan,
                    "low": np.nan if made is None or made.low is None else made.low,
                    "high": np.nan if made is None or made.high is None else made.high,
                    "patients": len(kept),
                    "seed": seed,
                }
            )
    return pd.DataFrame(rows)
