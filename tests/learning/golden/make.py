"""Scores of other libraries on small data of ours, written to scores.json beside this file.

None of these libraries is a dependency (scikit-survival is GPL, MONAI heavy), so their values are kept, not called:

    pip install scikit-survival torchsurv monai surface-distance MLstatkit
    python tests/learning/golden/make.py
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from MLstatkit import Delong_test
from monai.metrics import compute_dice, compute_hausdorff_distance, compute_surface_dice
from sksurv.metrics import (
    brier_score,
    concordance_index_censored,
    concordance_index_ipcw,
    cumulative_dynamic_auc,
    integrated_brier_score,
)
from sksurv.util import Surv
from torchsurv.metrics.cindex import ConcordanceIndex

PEOPLE = 70
LIBRARIES = ("scikit-survival", "torchsurv", "monai", "MLstatkit")


def people(rng: np.random.Generator, *, ties: bool, closed: float) -> dict[str, list]:
    """Follow-up until the study is ``closed``, event and risk; with ``ties`` whole months and whole risks."""
    risk = rng.normal(size=PEOPLE)
    event_at, censored_at = rng.exponential(20 * np.exp(-0.8 * risk)), rng.exponential(30, PEOPLE)
    time = np.minimum(event_at, censored_at) + 0.5
    event_at, time = np.where(time > closed, np.inf, event_at), np.minimum(time, closed)
    noisy = risk + rng.normal(scale=0.7, size=PEOPLE)
    if ties:
        time, noisy = np.ceil(time), np.round(noisy)
    return {"time": np.round(time, 3).tolist(), "event": (event_at <= censored_at).tolist(), "risk": np.round(noisy, 3).tolist()}


def survival(seed: int, *, ties: bool) -> dict[str, object]:
    """Both sets of people and what the libraries say of them."""
    rng = np.random.default_rng(seed)
    train, test = people(rng, ties=ties, closed=40.0), people(rng, ties=ties, closed=30.0)
    fitted, outcome = (Surv.from_arrays(one["event"], one["time"]) for one in (train, test))
    risk, until, times = np.array(test["risk"]), 20.0, [3.0, 6.0, 9.0, 14.0]
    free = np.round(np.exp(-0.04 * np.outer(np.exp(0.8 * risk), times)), 4)
    areas, _ = cumulative_dynamic_auc(fitted, outcome, risk, times)
    harrell = ConcordanceIndex()(torch.tensor(risk), torch.tensor(test["event"]), torch.tensor(test["time"]))
    return {
        "train": train,
        "test": test,
        "until": until,
        "times": times,
        "free": free.tolist(),
        "harrell": concordance_index_censored(np.array(test["event"]), np.array(test["time"]), risk)[0],
        "harrell_torchsurv": float(harrell),
        "uno": concordance_index_ipcw(fitted, outcome, risk, tau=until)[0],
        "auroc_at": areas.tolist(),
        "brier": brier_score(fitted, outcome, free, times)[1].tolist(),
        "integrated_brier": float(integrated_brier_score(fitted, outcome, free, times)),
    }


def balls(centres: list[list[float]], radii: list[float]) -> np.ndarray:
    """Balls on a grid of 24 x 20 x 16 voxels, in voxels."""
    grid = np.stack(np.meshgrid(*(np.arange(size) for size in (24, 20, 16)), indexing="ij"), axis=-1)
    return np.any([np.sum((grid - centre) ** 2, axis=-1) <= radius**2 for centre, radius in zip(centres, radii, strict=True)], axis=0)


def masks() -> list[dict[str, object]]:
    """Pairs of masks, and what MONAI says of them."""
    pairs = [
        ([[10, 9, 8]], [5], [[11, 10, 8]], [5], [1.0, 1.0, 1.0], 1.0),
        ([[8, 8, 8], [18, 12, 6]], [4, 2], [[8, 8, 8]], [3], [1.0, 1.0, 2.5], 2.0),
        ([[2, 2, 2]], [4], [[1, 3, 2], [20, 16, 12]], [4, 1], [0.8, 0.9, 3.0], 1.5),
    ]
    found = []
    for first, radii, second, others, spacing, tolerance in pairs:
        predicted, observed = (torch.tensor(balls(*one))[None, None] for one in ((first, radii), (second, others)))
        found.append(
            {
                "predicted": [first, radii],
                "observed": [second, others],
                "voxel_mm": spacing,
                "tolerance_mm": tolerance,
                "dice": float(compute_dice(predicted, observed)),
                "hd95": float(compute_hausdorff_distance(predicted, observed, include_background=True, percentile=95, spacing=spacing)),
                "nsd": float(compute_surface_dice(predicted, observed, [tolerance], include_background=True, spacing=spacing)),
            }
        )
    return found


def areas() -> dict[str, object]:
    """DeLong's test of two correlated curves with ties."""
    rng = np.random.default_rng(5)
    labels = rng.permutation([0] * 35 + [1] * 25)
    first = np.round(rng.normal(size=60) + labels, 1)
    second = np.round(0.5 * first + rng.normal(size=60) + 0.3 * labels, 1)
    z, p = Delong_test(labels, first, second)[:2]
    return {"labels": labels.tolist(), "first": first.tolist(), "second": second.tolist(), "z": float(z), "p": float(p)}


if __name__ == "__main__":
    values = {
        "versions": {name: version(name) for name in LIBRARIES},
        "survival": {"plain": survival(1, ties=False), "ties": survival(2, ties=True)},
        "masks": masks(),
        "delong": areas(),
    }
    (Path(__file__).parent / "scores.json").write_text(json.dumps(values) + "\n", encoding="utf-8")
